"""What the activation cache costs in time and memory as the pictures become more.

python benchmarks/cache_scaling.py [--output benchmarks/results/cache_scaling.md]

ResNet-18 behind its first stage keeps 64 kB of each picture of 64 px. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _report import markdown_table
from _runs import hand_out, heading
from PIL import Image

COUNTS = (500, 2000, 8000)
SIDE, EPOCHS = 64, 3


def make_pictures(folder: Path, count: int) -> None:
    """Write JPEG pictures of two classes, a tenth of them for validation."""
    generator = np.random.default_rng(0)
    for index in range(count):
        part = "val" if index // 2 % 10 == 0 else "train"
        place = folder / part / ("dark" if index % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (SIDE, SIDE, 3), dtype=np.uint8) + np.uint8(100 * (1 - index % 2))
        Image.fromarray(pixels).save(place / f"{index}.jpg")


def run(folder: Path, budget: str) -> dict[str, float]:
    """Train in another process, and return what it measured of itself."""
    words = [sys.executable, __file__, "--folder", str(folder), "--budget", budget]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    print(folder.name, budget, measured, file=sys.stderr)
    return measured


def child(folder: Path, budget: str) -> None:
    """Train one epoch after the other on kept activations; print seconds and memory."""
    import torch

    from transferkit import Callback, Finetuner, FreezeFirst, image_folder
    from transferkit.allocator import tune_allocator

    class Memory(Callback):
        """Notes the most memory in use after any batch, without files that are mapped: the system may drop those."""

        def __init__(self) -> None:
            self.peak = 0

        def on_train_batch_end(self, trainer: object) -> None:
            resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
            self.peak = max(self.peak, (resident - shared) * os.sysconf("SC_PAGE_SIZE"))

        on_frozen_pass_batch_end = on_train_batch_end

    tune_allocator()
    torch.set_num_threads(2)
    memory = Memory()
    tuner = Finetuner(
        "torchvision/resnet18", weights=None, policy=FreezeFirst(2), train_preset="none", image_size=SIDE,
        epochs=EPOCHS, views=0 if budget == "none" else None, cache_budget=None if budget == "none" else budget,
        num_workers=0, callbacks=[memory], progress=False, device="cpu",
    )  # fmt: skip
    data = image_folder(folder)
    started = time.perf_counter()
    history = tuner.fit(data)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "first": history.records[0].seconds,
                "later": history.records[-1].seconds,
                "peak": memory.peak,
                "most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        child(options.folder, options.budget)
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for count in options.counts:
            folder = Path(place) / str(count)
            make_pictures(folder, count)
            for budget in ("256MiB", "4GiB", "none"):
                seen = run(folder, budget)
                rows.append(
                    [
                        f"{count:,}",
                        f"{count * 65536 / 2**20:.0f} MiB" if budget != "none" else "–",
                        budget,
                        f"{seen['first']:.1f}",
                        f"{seen['later']:.2f}",
                        f"{seen['later'] / count * 1000:.2f}",
                        f"{seen['peak'] / 2**20:.0f} MiB",
                        f"{seen['most'] / 2**20:.0f} MiB",
                    ]
                )
    head = [
        "pictures",
        "cache",
        "budget",
        "first epoch, s",
        "later epoch, s",
        "later, ms/picture",
        "memory",
        "with files",
    ]
    report = f"""# The activation cache as pictures become more

{heading("cache_scaling.py")}

Made pictures of {SIDE} px, ResNet-18 with random weights, stem and first stage frozen, {EPOCHS} epochs, in one process
without workers. `none` is a run that keeps nothing. Memory is the most that the process held of its own, imports
included, and with what it had mapped of files, which the system takes back when it needs room.

{markdown_table(head, rows)}
"""
    hand_out(report, options.output)


if __name__ == "__main__":
    main()
