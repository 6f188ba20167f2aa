"""Fine-tune any torchvision or timm classifier on a folder of pictures.

python examples/finetune_folder.py data/hymenoptera_data --model torchvision/mobilenet_v2
"""

from __future__ import annotations

import argparse

from transferkit import Finetuner, TransferkitError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/ and val/, or with one folder per class")
    parser.add_argument("--model", default="torchvision/mobilenet_v2")
    parser.add_argument("--weights", default="default", help="default, a tag, a path, bundled, or none")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--image-size", type=int, help="input side in pixels; that of the weights by default")
    parser.add_argument("--output", default="runs/finetune_folder")
    options = parser.parse_args()

    tuner = Finetuner(
        options.model,
        weights=None if options.weights == "none" else options.weights,
        epochs=options.epochs,
        image_size=options.image_size,
        output_dir=options.output,
        overwrite=True,
    )
    try:
        history = tuner.fit(options.data)
    except TransferkitError as error:  # one sentence says what to do
        parser.error(str(error))

    tuner.plot_history(f"{options.output}/curves.png")
    tuner.plot_predictions(f"{options.output}/predictions.png")
    best = history.best()
    print(f"best epoch {best.epoch}: val_accuracy {best.val_accuracy:.4f}, saved in {options.output}")
    for name, figures in tuner.evaluate(options.data)["per_class"].items():
        print(f"{name}: recall {figures['recall']:.3f} of {figures['count']} pictures")


if __name__ == "__main__":
    main()
