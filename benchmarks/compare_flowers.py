"""Which of four backbones for 200 photos of flowers? The leaderboard, and how long it takes to make.

    python benchmarks/compare_flowers.py ASSETS [--output benchmarks/results/compare_flowers.md] [--folder PLACE]

Heads alone, three seeds; everything else is what `transferkit compare` does by itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from _runs import hand_out, heading

from transferkit import compare

ASKED = 300
"""Seconds."""


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help="where the leaderboard's own files go")
    options = parser.parse_args()
    weights = options.assets / "weights"
    backbones = [
        {
            "name": "MobileNetV2, ImageNet",
            "backbone": "torchvision/mobilenet_v2",
            "weights": weights / "mobilenet_v2-77326c9b.pth",
        },
        {
            "name": "SqueezeNet 1.1, ImageNet",
            "backbone": "torchvision/squeezenet1_1",
            "weights": weights / "squeezenet1_1-a3c258a5.pth",
        },
        {"name": "MobileNetV2 0.5, bundled", "backbone": "timm/mobilenetv2_050", "weights": "bundled"},
        {"name": "ResNet-18, random", "backbone": "torchvision/resnet18", "weights": None},
    ]
    started = time.perf_counter()
    board = compare(
        options.assets / "flowers5_small",
        backbones,
        output_dir=options.folder,
        on_progress=lambda done, count, doing: print(f"{done}/{count} {doing}", file=sys.stderr),
    )
    seconds = time.perf_counter() - started
    about = board.about
    seeds = ", ".join(map(str, about["seeds"]))
    report = f"""# Four backbones on flowers

{heading("compare_flowers.py ASSETS")}

`flowers5_small`: {about["training pictures"]} training and {about["validation pictures"]} validation photos of
{about["classes"]} kinds. Head alone, {about["epochs"]} epochs, seeds {seeds}, each backbone in a process of its own.
The input is that of the weights. Asked under {ASKED} s in all, came to {seconds:.0f} s.

{board.to_markdown()}"""
    hand_out(report, options.output)


if __name__ == "__main__":
    main()
