"""How many views of a picture should be kept? Accuracy against the number, for each policy with frozen stages.

python benchmarks/views.py ASSETS [--only WORD …] [--sets …] [--networks …] [--views …]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from _report import mean_spread
from default_recipe import NETWORKS, SEEDS

from transferkit import Finetuner

POLICIES: dict[str, dict[str, Any]] = {
    "head, 10 epochs": {"policy": "head", "epochs": 10, "train_preset": "light"},
    "last:1, 10 epochs": {"policy": "last:1", "epochs": 10},
    "until three quarters, 10 epochs": {"epochs": 10},
    "the default recipe, 5 epochs": {},
}
STAGES = {"mobilenet_v2": "until:stage4", "squeezenet1_1": "until:stage3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="run the policies whose name holds one of these")
    parser.add_argument("--sets", nargs="*", default=["flowers5_small", "hymenoptera_data"])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--views", nargs="*", type=int, default=[1, 2, 4, 8, 0])
    options = parser.parse_args()
    print("| network | data | policy | views | best val_accuracy | last epoch | seconds per run |")
    print("|---|---|---|---|---|---|---|")
    for network in options.networks:
        for data in options.sets:
            for name, settings in POLICIES.items():
                if not any(word in name for word in options.only):
                    continue
                if name.startswith("until"):
                    settings = {**settings, "policy": STAGES[network]}
                for views in options.views:
                    best, last, seconds = [], [], []
                    for seed in SEEDS:
                        history = Finetuner(
                            f"torchvision/{network}",
                            weights=options.assets / "weights" / NETWORKS[network],
                            seed=seed,
                            views=views,
                            progress=False,
                            **settings,
                        ).fit(options.assets / data)
                        best.append(history.best().val_accuracy)
                        last.append(history.records[-1].val_accuracy)
                        seconds.append(sum(record.seconds for record in history.records))
                    cells = [str(views), mean_spread(best), mean_spread(last), f"{statistics.mean(seconds):.0f}"]
                    print(f"| {network} | {data} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
