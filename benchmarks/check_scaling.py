"""What listing and checking a folder costs as the files become more.

    python benchmarks/check_scaling.py [--output benchmarks/results/check_scaling.md]

Made JPEG pictures of 48 px, in ten classes, a tenth of them for validation. Each count is listed and checked in a
process of its own; the second check finds what the first has remembered. Memory per file is what listing adds to it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _report import markdown_table
from _runs import hand_out, heading
from PIL import Image

COUNTS = (1_000, 10_000, 100_000)
CLASSES = 10


def make_pictures(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for index in range(count):
        part = "val" if index % 10 == 0 else "train"
        place = folder / part / f"class-{index // 10 % CLASSES}"
        if index < 10 * CLASSES:
            place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((48, 48), Image.Resampling.BILINEAR).save(place / f"{index:06d}.jpg")


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(folder: Path) -> None:
    """List, check twice, and print what it took."""
    import logging

    from transferkit.check import check_data
    from transferkit.data import image_folder

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:  # what is imported or made once is not counted
        make_pictures(Path(place), 200)
        image_folder(place)
    before, started = resident(), time.perf_counter()
    data = image_folder(folder)
    measured = {
        "list": time.perf_counter() - started,
        "bytes": (resident() - before) / (len(data.train) + len(data.val)),
    }
    for name in ("check", "again"):
        started = time.perf_counter()
        found = check_data(folder)
        measured[name] = time.perf_counter() - started
    measured["findings"] = len(found.findings)
    print(json.dumps(measured))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        child(options.folder)
        return
    rows = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "data"
            make_pictures(folder, count)
            environment = {**os.environ, "XDG_CACHE_HOME": place}
            words = [sys.executable, __file__, "--folder", str(folder)]
            result = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
        seen = json.loads(result.stdout.splitlines()[-1])
        print(count, seen, file=sys.stderr)
        rows.append(
            [
                f"{count:,}",
                f"{seen['list']:.2f}",
                f"{seen['bytes']:.0f}",
                f"{seen['check']:.1f}",
                f"{seen['check'] / count * 1e3:.2f}",
                f"{seen['again']:.1f}",
                f"{seen['again'] / count * 1e3:.2f}",
            ]
        )
    head = ["files", "list, s", "memory, bytes/file", "check, s", "ms/file", "check again, s", "ms/file"]
    report = f"""# Listing and checking as files become more

{heading("check_scaling.py")}

Made JPEG pictures of 48 px in {CLASSES} classes. `check` decodes every file; `check again` finds what is remembered.

{markdown_table(head, rows)}
"""
    hand_out(report, options.output)


if __name__ == "__main__":
    main()
