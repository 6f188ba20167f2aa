"""CIFAR-10 with ResNet-18 on a laptop without a GPU: the last block and a head with dropout train, at 224 pixels.

AdamW at 0.0001, a tenth of that when the validation accuracy has stopped rising. What is frozen runs once for each kept
view of a picture instead of once per epoch. The run's folder holds the best epoch's file, from which the results come,
and three pictures: ``samples.png``, ``curves.png`` and ``predictions.png``. A single picture is answered in words.

    python examples/cifar10_resnet18_cpu.py --data data/cifar10 --per-class 500

Measured: with MobileNetV2 and its ImageNet weights in place of ResNet-18, 224 px, the first 100 training and test
pictures of each class as JPEG files, 8 epochs, one seed: val_accuracy 0.752 in the best epoch (the 7th), 0.738 in the
last; 4.3 minutes on one thread of a busy machine.
"""

from __future__ import annotations

from typing import Any

from _pictures import command_line, parse

from transferkit import Finetuner, Plateau, image_folder
from transferkit.plots import plot_samples, save_figure


def last_block(model: str, **settings: Any) -> Finetuner:
    return Finetuner(
        model,
        policy="last:1",
        dropout=0.5,
        optimizer="adamw",
        lr=1e-4,
        layer_decay=1.0,  # one rate
        head_lr_multiplier=1.0,  # for both
        weight_decay=0.01,
        keep_statistics=False,  # batch norms of the last block follow the batches
        schedule=Plateau(monitor="val_accuracy", mode="max", patience=1),
        train_preset="cifar",
        eval_preset="cifar",
        **settings,
    )


def main() -> None:
    parser = command_line(__doc__, model="torchvision/resnet18", epochs=8, image_size=224)
    parser.add_argument("--picture", help="a single picture to classify; by default one of those validated on")
    options = parse(parser)

    data = image_folder(options.data)
    some = [data.train[index] for index in range(0, len(data.train), -(-len(data.train) // 16))]
    samples = plot_samples([image for image, _ in some], [data.class_names[label] for _, label in some])
    save_figure(samples, options.output / "samples.png")

    tuner = last_block(options.model, **options.settings)
    history = tuner.fit(data)
    tuner.plot_history(options.output / "curves.png")
    print(f"best epoch {history.best().epoch}, saved in {options.output}")

    best = Finetuner.load(options.output)
    best.plot_predictions(options.output / "predictions.png", data=options.data)
    print(f"val_accuracy of the saved model: {best.evaluate(options.data)['accuracy']:.4f}")
    (answer,) = best.predict(options.picture or data.val.name(0))
    print(f"{answer.path}: {answer.label}")
    for name, probability in answer.top(len(data.class_names)):
        print(f"  {name:12}{probability:7.2%}")


if __name__ == "__main__":
    main()
