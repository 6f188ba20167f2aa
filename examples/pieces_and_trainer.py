"""The same work with the pieces in hand: data, model, policy, groups, schedule, callbacks and the trainer.

python examples/pieces_and_trainer.py data/hymenoptera_data
"""

from __future__ import annotations

import argparse

from transferkit import (
    BestCheckpoint,
    Cosine,
    EarlyStopping,
    FullFinetune,
    LinearProbe,
    LRScheduler,
    Progress,
    ScheduledUnfreeze,
    Trainer,
    build_optimizer,
    create_model,
    eval_transform,
    image_folder,
    loader,
    param_groups,
    train_transform,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/ and val/, or with one folder per class")
    parser.add_argument("--model", default="torchvision/mobilenet_v2")
    parser.add_argument("--weights", default="default", help="default, a tag, a path, bundled, or none")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--image-size", type=int, help="input side in pixels; that of the weights by default")
    options = parser.parse_args()

    data = image_folder(options.data)
    weights = None if options.weights == "none" else options.weights
    model = create_model(options.model, class_names=data.class_names, weights=weights, image_size=options.image_size)
    train_view = train_transform("light", model.preprocessing)
    val_view = eval_transform(model.eval_preset, model.preprocessing)
    groups = param_groups(model, lr=1e-3, weight_decay=0.01, layer_decay=0.7)
    trainer = Trainer(
        model,
        build_optimizer("adamw", groups),
        policy=ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()}, lr={0: 3e-3, 2: 1e-3}),
        callbacks=[LRScheduler(Cosine()), BestCheckpoint("runs/pieces"), EarlyStopping(patience=3), Progress()],
    )
    batches = loader(data.train, train_view, batch_size=32, train=True)
    history = trainer.fit(batches, loader(data.val, val_view, batch_size=32, train=False), epochs=options.epochs)
    print(f"best val_accuracy {history.best().val_accuracy:.4f}, saved in runs/pieces")


if __name__ == "__main__":
    main()
