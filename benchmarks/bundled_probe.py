"""How good is the bundled backbone? Linear probes against random weights and against ImageNet's MobileNetV2.

    python benchmarks/bundled_probe.py ASSETS [--weights model.safetensors]

A probe is scikit-learn's logistic regression on standardised features of one plain view per picture; its strength of
regularisation is chosen by 5-fold cross-validation inside the training pictures. The seed shuffles the folds and, for
random weights, also draws the network.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from transferkit import create_model, image_folder, loader
from transferkit.demo import write_digits
from transferkit.model import TransferModel
from transferkit.sources import LabelledPictures
from transferkit.transforms import imagenet_eval

SEEDS = (0, 1, 2)


def features(model: TransferModel, source: LabelledPictures) -> tuple[np.ndarray, np.ndarray]:
    model.eval()
    batches = loader(source, imagenet_eval(model.preprocessing), batch_size=8, train=False)
    with torch.inference_mode():
        parts = [(model.features(images), labels) for images, labels in batches]
    return torch.cat([part[0] for part in parts]).numpy(), torch.cat([part[1] for part in parts]).numpy()


def probe(train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], seed: int) -> float:
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    regression = LogisticRegressionCV(
        Cs=list(np.logspace(-5, 1, 7)), cv=folds, max_iter=2000, l1_ratios=(0.0,), use_legacy_attributes=False
    )
    classifier = make_pipeline(StandardScaler(), regression).fit(*train)
    return float(classifier.score(*val))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--weights", default="bundled", help="a state dict instead of the bundled one")
    parser.add_argument("--size", type=int, default=None, help="input side for the small network, in pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sets = {name: options.assets / name for name in ("hymenoptera_data", "flowers5_small")}
        sets["digits (20 + 80 per class)"] = write_digits(Path(folder), train_per_class=20, val_per_class=80)
        print("| data | random weights | bundled | gain, points | ImageNet MobileNetV2 |\n|---|---|---|---|---|")
        for name, root in sets.items():
            data = image_folder(root)

            def accuracies(seeds: tuple[int, ...], data=data, **model_settings) -> list[float]:
                found = []
                for seed in seeds:
                    torch.manual_seed(seed)
                    model = create_model(class_names=data.class_names, **model_settings)
                    train, val = features(model, data.train), features(model, data.val)
                    found += [probe(train, val, each) for each in (SEEDS if len(seeds) == 1 else (seed,))]
                return found

            small = {"name": "timm/mobilenetv2_050", "image_size": options.size or 112}
            random = accuracies(SEEDS, weights=None, **small)
            bundled = accuracies((0,), weights=options.weights, **small)
            teacher = accuracies(
                (0,), name="torchvision/mobilenet_v2", weights=options.assets / "weights" / "mobilenet_v2-77326c9b.pth"
            )
            cells = [
                f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
                for values in (random, bundled, teacher)
            ]
            gain = 100 * (statistics.mean(bundled) - statistics.mean(random))
            print(f"| {name} | {cells[0]} | {cells[1]} | {gain:+.1f} | {cells[2]} |", flush=True)


if __name__ == "__main__":
    main()
