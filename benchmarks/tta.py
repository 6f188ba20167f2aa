"""Does test-time augmentation help? Accuracy, loss and processor time of one look, of two (flip) and of five (crops).

    python benchmarks/tta.py ASSETS

Heads trained on frozen ImageNet weights, 3 seeds, all validation pictures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from _report import markdown_table, mean_spread
from _runs import hand_out, heading
from calibration import DATA, trained
from default_recipe import NETWORKS, SEEDS

from transferkit.tta import TTA

EPOCHS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--output", type=Path, help="file for the report; standard output by default")
    options = parser.parse_args()
    rows = []
    cases = [(network, data) for network in NETWORKS for data in DATA]
    with tempfile.TemporaryDirectory() as cache:
        for network, data in cases:
            found: dict[str | None, list[tuple[float, float, float]]] = {tta: [] for tta in (None, *TTA)}
            for seed in SEEDS:
                tuner = trained(options.assets, network, data, seed=seed, epochs=EPOCHS, cache=Path(cache))
                for tta, figures in found.items():
                    started = time.process_time()
                    result = tuner.evaluate(options.assets / data, tta=tta)
                    figures.append((result["accuracy"], result["loss"], time.process_time() - started))
            for tta, figures in found.items():
                accuracy, loss, seconds = zip(*figures, strict=True)
                gains = [100 * (one[0] - plain[0]) for one, plain in zip(figures, found[None], strict=True)]
                gain = "" if tta is None else f"{statistics.mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})"
                row = [network, data, tta or "one look", mean_spread(accuracy), gain, mean_spread(loss)]
                rows.append([*row, f"{statistics.median(seconds):.1f}"])
    head = ["network", "data", "looks", "accuracy", "gain, points", "loss", "processor s"]
    report = f"""# Test-time augmentation

{heading("tta.py ASSETS")}

Heads on frozen ImageNet weights, {EPOCHS} epochs, best of them; 153 validation pictures of `hymenoptera_data`, 100 of
`flowers5_small`, so a point is one or two pictures. Mean ± standard deviation over {len(SEEDS)} seeds; gains seed by
seed, mean (smallest to largest); processor seconds of an evaluation, median, while another process reads the pictures.

{markdown_table(head, rows)}
"""
    hand_out(report, options.output)


if __name__ == "__main__":
    main()
