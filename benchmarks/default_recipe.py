"""Which default recipe? Accuracy of candidate recipes on real pictures with real ImageNet weights, 3 seeds each.

python benchmarks/default_recipe.py ASSETS [--only WORD …] [--sets …] [--networks …]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="run the candidates whose name holds one of these")
    parser.add_argument("--sets", nargs="*", default=["flowers5_small", "hymenoptera_data"])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    options = parser.parse_args()
    print("| network | data | recipe | best val_accuracy | last | seconds per run |\n|---|---|---|---|---|---|")
    for network in options.networks:
        for data in options.sets:
            for name, settings in CANDIDATES.items():
                if not any(word in name for word in options.only):
                    continue
                started, best, last = time.perf_counter(), [], []
                for seed in SEEDS:
                    history = Finetuner(
                        f"torchvision/{network}",
                        weights=options.assets / "weights" / NETWORKS[network],
                        seed=seed,
                        progress=False,
                        **settings,
                    ).fit(options.assets / data)
                    best.append(history.best().val_accuracy)
                    last.append(history.records[-1].val_accuracy)
                seconds = (time.perf_counter() - started) / len(SEEDS)
                cells = [f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}" for found in (best, last)]
                print(f"| {network} | {data} | {name} | {cells[0]} | {cells[1]} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
