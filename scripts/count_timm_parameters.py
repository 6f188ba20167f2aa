"""Count the parameters of every timm architecture, so that ``transferkit models`` need not build 1,300 networks.

    python scripts/count_timm_parameters.py

Writes ``src/transferkit/backbones/timm_parameters.json``; architectures that are not in it are counted when listed.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch

TARGET = Path(__file__).parents[1] / "src" / "transferkit" / "backbones" / "timm_parameters.json"


def main() -> None:
    counts = {}
    for name in timm.list_models():
        with torch.device("meta"):
            network = timm.create_model(name, pretrained=False)
        counts[name] = sum(parameter.numel() for parameter in network.parameters())
    TARGET.write_text(json.dumps(counts, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(counts)} architectures of timm {timm.__version__}")


if __name__ == "__main__":
    main()
