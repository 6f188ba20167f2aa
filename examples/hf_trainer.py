"""The Hugging Face Trainer around a transferkit model: its loop, our stages, freezing and rates.

The head in the first epoch, then everything. Needs ``pip install transferkit[transformers]``.

    python examples/hf_trainer.py --data data/hymenoptera_data

Measured: with MobileNetV2 and its ImageNet weights, 128 px, 3 epochs, one seed: val_accuracy 0.928 after the last (153
validation pictures); 2.4 minutes on one thread of a busy machine.
"""

from __future__ import annotations

import torch
from _pictures import command_line, parse
from transformers import Trainer, TrainingArguments

from transferkit import (
    FullFinetune,
    LinearProbe,
    ScheduledUnfreeze,
    build_optimizer,
    create_model,
    eval_transform,
    image_folder,
    param_groups,
    save_artifact,
    train_transform,
)
from transferkit.integrations.transformers import PolicyCallback, WithLoss, collate, compute_metrics
from transferkit.reading import TransformedDataset


def main() -> None:
    options = parse(command_line(__doc__, model="torchvision/mobilenet_v2", epochs=3))

    data = image_folder(options.data)
    model = create_model(
        options.model, class_names=data.class_names, weights=options.weights, image_size=options.image_size
    )
    model.keep_statistics = True  # of the pretrained batch norms, also while they train
    train_view = train_transform("light", model.preprocessing)
    val_view = eval_transform(model.eval_preset, model.preprocessing)
    # every parameter, also what is frozen at first
    groups = param_groups(model, lr=3e-5, weight_decay=0.01, layer_decay=0.7, head_lr_multiplier=100)

    trainer = Trainer(
        WithLoss(model),
        TrainingArguments(
            str(options.output),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            eval_strategy="epoch",
            save_strategy="no",
            lr_scheduler_type="cosine",
            dataloader_pin_memory=torch.cuda.is_available(),  # without a GPU torch warns of it
            report_to="none",
        ),
        train_dataset=TransformedDataset(data.train, train_view, augmented=False),
        eval_dataset=TransformedDataset(data.val, val_view, augmented=False),
        data_collator=collate,
        compute_metrics=compute_metrics,
        optimizers=(build_optimizer("adamw", groups), None),
        callbacks=[PolicyCallback(ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()}))],
    )
    trainer.train()
    print(f"last epoch: val_accuracy {trainer.evaluate()['eval_accuracy']:.4f}")
    print("saved in", save_artifact(model, options.output))


if __name__ == "__main__":
    main()
