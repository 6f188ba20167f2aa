"""Which default recipe? Accuracy of candidate recipes on real pictures with real ImageNet weights, 3 seeds each.

python benchmarks/default_recipe.py ASSETS [--only WORD …] [--sets …] [--networks …]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from _report import mean_spread

from transferkit import Finetuner

NETWORKS = {
    "mobilenet_v2": "mobilenet_v2-77326c9b.pth",
    "squeezenet1_1": "squeezenet1_1-a3c258a5.pth",
}
CANDIDATES: dict[str, dict[str, Any]] = {
    "head only (policy head)": {"policy": "head"},
    "default: head 2, full 3, kept statistics": {},
    "the same, plain view": {"train_preset": "none"},
    "the same, plain view, moving statistics": {"train_preset": "none", "keep_statistics": False},
}
SEEDS = (0, 1, 2)


def spread(assets: Path, network: str, data: str, **settings: Any) -> list[str]:
    """Run every seed; returns best and last validation accuracy with their spread, and seconds per run, as cells."""
    best, last, seconds = [], [], []
    for seed in SEEDS:
        weights = assets / "weights" / NETWORKS[network]
        started = time.perf_counter()
        tuner = Finetuner(f"torchvision/{network}", weights=weights, seed=seed, progress=False, **settings)
        history = tuner.fit(assets / data)
        seconds.append(time.perf_counter() - started)
        best.append(history.best().val_accuracy)
        last.append(history.records[-1].val_accuracy)
    return [mean_spread(best), mean_spread(last), f"{statistics.mean(seconds):.0f}"]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what is run: where the assets are, which rows, data sets and networks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="run the rows whose name holds one of these")
    parser.add_argument("--sets", nargs="*", default=["flowers5_small", "hymenoptera_data"])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    return parser


def main() -> None:
    options = parser_of(__doc__).parse_args()
    print("| network | data | recipe | best val_accuracy | last | seconds per run |\n|---|---|---|---|---|---|")
    for network in options.networks:
        for data in options.sets:
            for name, settings in CANDIDATES.items():
                if not any(word in name for word in options.only):
                    continue
                cells = spread(options.assets, network, data, **settings)
                print(f"| {network} | {data} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
