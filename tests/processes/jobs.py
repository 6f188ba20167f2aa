"""What test_many_processes.py trains, in one process or in each of several: ``torchrun … jobs.py FOLDER JOB…``.

Every process writes what it has seen to ``FOLDER/JOB-RANK.json`` and its weights to ``FOLDER/JOB-RANK.safetensors``.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from transferkit import (
    EMA,
    ActivationCache,
    BestCheckpoint,
    Callback,
    CallbackError,
    Cosine,
    EarlyStopping,
    Finetuner,
    FullFinetune,
    Interrupted,
    LinearProbe,
    LRScheduler,
    ResumeCheckpoint,
    ScheduledUnfreeze,
    Trainer,
    TransferkitError,
    build_optimizer,
    create_model,
    eval_transform,
    from_datasets,
    loader,
    param_groups,
    train_transform,
)
from transferkit.distribution import check_same_everywhere, share_object
from transferkit.randomness import seeded

EPOCHS, BATCH, CLASSES = 4, 8, ("dark", "grey", "light")
POLICY = ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()})


def pictures(count, seed):
    """Noise whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        label = index % len(CLASSES)
        noise = torch.randint(110, (32, 32, 3), generator=generator, dtype=torch.uint8) + 70 * label
        made.append((Image.fromarray(noise.numpy()), label))
    return made


DATA = from_datasets(pictures(24, 0), pictures(13, 1), class_names=CLASSES)  # 13: no number of processes divides it


def model_of(name, *, keep_statistics=False):
    with seeded(0):
        model = create_model(name, weights=None, class_names=CLASSES, image_size=32)
    model.keep_statistics = keep_statistics
    return model


def batches_of(trainer, *, batch=BATCH):
    processes = trainer.accelerator.num_processes
    where = {"rank": trainer.accelerator.process_index, "world_size": processes, "batch_size": batch // processes}
    preprocessing = trainer.model.preprocessing
    train = loader(DATA.train, train_transform("light", preprocessing), train=True, **where)
    return train, loader(DATA.val, eval_transform("imagenet", preprocessing), train=False, **where)


def trainer_of(name, *callbacks, keep_statistics=False, optimizer="sgd", kind=Trainer, **settings):
    model = model_of(name, keep_statistics=keep_statistics)
    chosen = build_optimizer(optimizer, param_groups(model, lr=0.02, layer_decay=0.7))
    settings = {"policy": POLICY, "callbacks": [LRScheduler(Cosine()), *callbacks], "device": "cpu", **settings}
    return kind(model, chosen, **settings)


def seen(trainer, **more):
    """Return the facts and the weights of a process."""
    history = [{**record, "seconds": 0} for record in trainer.history.to_dicts()]
    return {"history": history, **more}, {**trainer.model.network.state_dict()}


def fitted(name, *callbacks, batch=BATCH, **settings):
    trainer = trainer_of(name, *callbacks, **settings)
    trainer.fit(*batches_of(trainer, batch=batch), epochs=EPOCHS)
    return trainer


class DTensors(Callback):
    """Counts parameters that are spread, and that are not, after every step."""

    def __init__(self):
        self.spread, self.whole = set(), set()

    def on_before_optimizer_step(self, trainer):
        for key, each in trainer.model.network.named_parameters():
            (self.spread if isinstance(each, DTensor) else self.whole).add(key)


class Signal(Callback):
    """Sends this process a SIGTERM after a step."""

    def __init__(self, step, *, rank):
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer):
        if trainer.step == self.step and trainer.accelerator.process_index == self.rank:
            signal.raise_signal(signal.SIGTERM)


class Change(Callback):
    """Changes a weight in one process."""

    def on_train_epoch_start(self, trainer):
        if trainer.epoch == 1 and trainer.accelerator.process_index == 1:
            with torch.no_grad():
                weight = next(trainer.model.parameters())
                weight[(0,) * weight.ndim].add_(1e-6)


class Stop(Callback):
    """Asks in one process for an end."""

    def on_validation_end(self, trainer):
        trainer.should_stop = trainer.epoch == 1 and trainer.accelerator.process_index == 1


class WrappedOnce(Trainer):
    """What training over several processes is without wrapping the network again after an unfreeze."""

    first = None

    def _wrap(self, module):
        if self.first is None:
            self.first = super()._wrap(module)
        return self.first


def convnext(folder):
    trainer = fitted("timm/test_convnext", EMA(0.8), class_weights=[1.0, 4.0, 0.5], accumulate=2, batch=4)
    return seen(trainer, count=trainer.evaluate(batches_of(trainer)[1]).count)


def vit(folder):
    return seen(fitted("timm/test_vit", BestCheckpoint(), optimizer="sgd", clip_grad_norm=0.5))


def kept_statistics(folder):
    return seen(fitted("timm/test_efficientnet", keep_statistics=True, label_smoothing=0.1))


def batch_norm(folder):
    return seen(fitted("timm/test_efficientnet"))


def scalars(folder):
    return seen(fitted("timm/test_nfnet"))  # parameters without dimensions


def kept(folder):
    """Train on kept activations, which each process computes for its share of the pictures; they are in files."""
    return seen(fitted("timm/test_vit", activations=ActivationCache(views=2, budget=0)))


def wrapped_once(folder):
    trainer = trainer_of("timm/test_convnext", kind=WrappedOnce)
    return failing(trainer)


def changed(folder):
    return failing(trainer_of("timm/test_convnext", Change()))


def other_rates(folder):
    trainer = trainer_of("timm/test_convnext")
    trainer.optimizer.param_groups[0]["lr"] *= 1 + trainer.accelerator.process_index
    return failing(trainer)


def failing(trainer):
    try:
        trainer.fit(*batches_of(trainer), epochs=EPOCHS)
    except TransferkitError as error:
        return seen(trainer, error=str(error))
    return seen(trainer, error=None)


def other_facts(folder):
    trainer = trainer_of("timm/test_convnext")
    try:
        check_same_everywhere(trainer.accelerator, {"list of pictures": f"{trainer.accelerator.process_index}"})
    except TransferkitError as error:
        return {"error": str(error)}, {}
    return {"error": None}, {}


def stopped(folder):
    return seen(fitted("timm/test_convnext", Stop(), EarlyStopping(patience=3)))


def sharded(folder):
    watch = DTensors()
    trainer = fitted(
        "timm/test_convnext", EMA(0.8), watch, class_weights=[1.0, 4.0, 0.5], accumulate=2, batch=4, shard=True
    )
    if trainer.is_main_process:
        tuner = Finetuner("timm/test_convnext", device="cpu")
        tuner.model = trainer.model
        tuner.save(folder / "artifact")
    whole = sorted(watch.whole)
    count = trainer.evaluate(batches_of(trainer)[1]).count
    native = not any(isinstance(each, DTensor) for group in trainer.optimizer.param_groups for each in group["params"])
    return seen(trainer, spread=len(watch.spread), whole=whole, count=count, native=native)


def interrupted(folder, **settings):
    """Train, be stopped within an epoch after the unfreeze, and go on in another trainer."""
    kind = "sharded" if settings else "replicated"
    checkpoint = ResumeCheckpoint(folder / f"resume-{kind}")
    parts = {"optimizer": "adamw", **settings}
    first = trainer_of("timm/test_convnext", EMA(0.8), BestCheckpoint(), checkpoint, Signal(8, rank=1), **parts)
    try:
        first.fit(*batches_of(first), epochs=EPOCHS)
    except Interrupted as error:
        message = str(error)
    second = trainer_of("timm/test_convnext", EMA(0.8), BestCheckpoint(), **parts)
    state = share_object(second.accelerator, checkpoint.read() if second.is_main_process else None)
    second.load_state_dict({key: value for key, value in state.items() if key != "identity"})
    second.fit(*batches_of(second), epochs=EPOCHS)
    return seen(second, message=message)


def interrupted_shards(folder):
    return interrupted(folder, shard=True)


def uninterrupted(folder, **settings):
    return seen(fitted("timm/test_convnext", EMA(0.8), BestCheckpoint(), optimizer="adamw", **settings))


def uninterrupted_shards(folder):
    return uninterrupted(folder, shard=True)


def continued_shards(folder):
    """Be stopped, and go on in the same trainer, whose optimizer has made steps."""
    trainer = trainer_of(
        "timm/test_convnext", EMA(0.8), BestCheckpoint(), Signal(8, rank=0), optimizer="adamw", shard=True
    )
    try:
        trainer.fit(*batches_of(trainer), epochs=EPOCHS)
    except Interrupted:
        trainer.callbacks.pop()
    trainer.fit(*batches_of(trainer), epochs=EPOCHS)
    return seen(trainer)


def broken_shards(folder):
    """Break off a sharded run; other processes must not be needed for what is left of it."""

    class Break(Callback):
        def on_train_epoch_end(self, trainer):
            if trainer.epoch == 1:
                raise RuntimeError("broken")

    before = model_of("timm/test_convnext").network.state_dict()
    trainer = trainer_of("timm/test_convnext", Break(), shard=True)
    try:
        trainer.fit(*batches_of(trainer), epochs=EPOCHS)
    except CallbackError as error:
        message = str(error.__cause__)
    facts, weights = seen(trainer, error=message)
    return {**facts, "as before": all(torch.equal(before[key], weights[key]) for key in before)}, weights


def alone(folder):
    """Fail in one process only."""

    class Fail(Callback):
        def on_train_batch_end(self, trainer):
            if trainer.step == 4 and trainer.accelerator.process_index == 1:
                raise TransferkitError("this picture is broken")

    return seen(fitted("timm/test_convnext", Fail()))


def finetuner(folder):
    """Run the whole job as a script does; only the main process has the right folder."""
    rank = os.environ.get("RANK", "0")
    tuner = Finetuner(
        "timm/test_convnext", weights=None, epochs=3, image_size=32, batch_size=4, patience=2, num_workers=0,
        progress=False, output_dir=folder / f"run-of-{rank}", device="cpu", val_fraction=0.4,
    )  # fmt: skip
    tuner.fit(DATA)
    return {"history": [{**each, "seconds": 0} for each in tuner.history.to_dicts()]}, tuner.model.network.state_dict()


def other_pictures(folder):
    """Give the second process another picture, in a run that writes nothing."""
    rank = int(os.environ.get("RANK", "0"))
    data = from_datasets(pictures(24 + rank, 0), pictures(13, 1), class_names=CLASSES)
    tuner = Finetuner("timm/test_convnext", weights=None, epochs=1, image_size=32, progress=False, device="cpu")
    try:
        tuner.fit(data)
    except TransferkitError as error:
        return {"error": str(error)}, {}
    return {"error": None}, {}


def main(folder, *names):
    rank = os.environ.get("RANK", "0")
    for name in names:
        facts, weights = globals()[name](folder)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))
        save_file(
            {key: each.detach().contiguous() for key, each in weights.items()}, folder / f"{name}-{rank}.safetensors"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
