"""How many views of a picture should be kept? Accuracy against the number, for each policy with frozen stages.

python benchmarks/views.py ASSETS [--only WORD …] [--sets …] [--networks …] [--views …]
"""

from __future__ import annotations

from typing import Any

from default_recipe import parser_of, spread

POLICIES: dict[str, dict[str, Any]] = {
    "head, 10 epochs": {"policy": "head", "epochs": 10, "train_preset": "light"},
    "last:1, 10 epochs": {"policy": "last:1", "epochs": 10},
    "until three quarters, 10 epochs": {"epochs": 10},
    "the default recipe, 5 epochs": {},
}
STAGES = {"mobilenet_v2": "until:stage4", "squeezenet1_1": "until:stage3"}


def main() -> None:
    parser = parser_of(__doc__)
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
                    cells = spread(options.assets, network, data, views=views, **settings)
                    print(f"| {network} | {data} | {name} | {views} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
