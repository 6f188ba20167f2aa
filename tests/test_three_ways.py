"""The same fine-tuning written three ways reaches the same weights from the same seed, bit for bit."""

import copy

import pytest
import torch
from torch import nn

import transferkit as tk
from transferkit.schedules import Progress

SEED, EPOCHS, BATCH, LR, DECAY, LAYER_DECAY = 3, 4, 8, 3e-3, 0.05, 0.7


def policy():
    return tk.ScheduledUnfreeze({0: tk.LinearProbe(), 1: tk.FreezeUntil("stage4"), 2: tk.FullFinetune()})


def schedule():
    return tk.Cosine(warmup_epochs=0.5)


def pieces(folder):
    """The data, the model and the optimizer, each from its own function."""
    data = tk.image_folder(folder)
    model = tk.create_model(
        "timm/test_efficientnet", class_names=data.class_names, weights=None, image_size=32, seed=SEED
    )
    train_transform = tk.train_transform("light", model.preprocessing)
    eval_transform = tk.eval_transform("imagenet", model.preprocessing)
    train = tk.loader(data.train, train_transform, batch_size=BATCH, seed=SEED, train=True)
    val = tk.loader(data.val, eval_transform, batch_size=BATCH, train=False)
    groups = tk.param_groups(model, lr=LR, weight_decay=DECAY, layer_decay=LAYER_DECAY)
    return model, train, val, tk.build_optimizer("adamw", groups)


def by_finetuner(folder):
    tuner = tk.Finetuner(
        "timm/test_efficientnet",
        weights=None,
        image_size=32,
        epochs=EPOCHS,
        policy=policy(),
        schedule=schedule(),
        train_preset="light",
        batch_size=BATCH,
        lr=LR,
        weight_decay=DECAY,
        layer_decay=LAYER_DECAY,
        head_lr_multiplier=1.0,
        label_smoothing=0.1,
        seed=SEED,
        device="cpu",
        num_workers=0,
        views=0,  # kept views of the pictures would be others
        progress=False,
    )
    return tuner.fit(folder), tuner.model


def by_trainer(folder):
    model, train, val, optimizer = pieces(folder)
    trainer = tk.Trainer(
        model,
        optimizer,
        policy=policy(),
        callbacks=[tk.LRScheduler(schedule()), tk.BestCheckpoint()],
        seed=SEED,
        label_smoothing=0.1,
        device="cpu",
    )
    return trainer.fit(train, val, epochs=EPOCHS), model


def by_own_loop(folder):
    model, train, val, optimizer = pieces(folder)
    model.network.to(
        memory_format=torch.channels_last
    )  # as the trainer does; another order of memory rounds differently
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    lrs = [group["lr"] for group in optimizer.param_groups]
    history, best, best_weights, step = tk.History(), None, None, 0
    for epoch in range(EPOCHS):
        model.freeze(policy().frozen_stages(model.stage_names, epoch)).train()
        train.sampler.set_epoch(epoch)
        total = 0.0
        for images, labels in train:
            factor = schedule().factor(Progress(step, EPOCHS * len(train), len(train)))
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(labels)
            step += 1
        model.eval()
        with torch.no_grad():
            logits, labels = zip(*((model(images), labels) for images, labels in val), strict=True)
        logits, labels = torch.cat(logits), torch.cat(labels)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        val_loss = nn.functional.cross_entropy(logits.double(), labels).item()
        history.records.append(tk.EpochRecord(epoch + 1, total / len(train.dataset), val_loss, accuracy, 0.0))
        if best is None or (accuracy, -val_loss) > best:
            best, best_weights = (accuracy, -val_loss), copy.deepcopy(model.network.state_dict())
    model.network.load_state_dict(best_weights)
    return history, model


def test_three_ways_reach_the_same_weights(picture_folder):
    (history, model), *others = [way(picture_folder) for way in (by_finetuner, by_trainer, by_own_loop)]
    assert len(history) == EPOCHS
    assert len(set(history["val_loss"])) == EPOCHS  # it does train
    for other_history, other in others:
        for key, value in model.network.state_dict().items():
            assert torch.equal(value, other.network.state_dict()[key]), key
        assert other_history["val_loss"] == history["val_loss"]
        assert other_history["val_accuracy"] == history["val_accuracy"]
        assert other_history["train_loss"] == pytest.approx(history["train_loss"], rel=1e-6)
