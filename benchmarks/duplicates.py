"""How many copies does the duplicate finder find, and how much of what it finds is none?

    python benchmarks/duplicates.py ASSETS [--output benchmarks/results/duplicates.md]

ASSETS holds hymenoptera_data/ and flowers5_small/. Of 200 of their pictures, copies are planted in seven ways; recall
is the share of these that is found. A pair that was not planted counts as wrong unless the originals of its files are a
pair as well; these are listed, to be looked at.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from _report import markdown_table
from _runs import commit, processor
from PIL import Image, ImageEnhance, ImageOps

from transferkit.exceptions import PictureError
from transferkit.fingerprints import NEAR, near_pairs
from transferkit.pictures import find_pictures, read_picture
from transferkit.scan import scan_pictures

SETS = ("hymenoptera_data", "flowers5_small")
LIMITS = (12, 18, 24, NEAR, 40)
PLANTED = 200


def scaled(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((max(8, round(image.width * share)), max(8, round(image.height * share))))


def cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    def crop(image: Image.Image) -> Image.Image:
        x, y = image.width * share / 2, image.height * share / 2
        return image.crop((round(x), round(y), round(image.width - x), round(image.height - y)))

    return crop


WAYS: Mapping[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "half the size": (scaled(0.5), 90),
    "a fifth of the size": (scaled(0.2), 90),
    "twice the size": (scaled(2.0), 90),
    "JPEG quality 20": (lambda image: image, 20),
    "mirrored": (ImageOps.mirror, 90),
    "a third brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.33), 90),
    "2 % cropped": (cropped(0.02), 90),
}


def measured(assets: Path) -> tuple[list[list[str]], list[str], list[int]]:
    """Return the table, the pairs found among the originals, and how many originals there are."""
    originals: list[str] = []
    counts = []
    for name in SETS:
        paths = find_pictures(assets / name).pictures
        readable = [path for path, facts in zip(paths, scan_pictures(paths), strict=True) if facts.cause is None]
        counts.append(len(readable))
        originals += readable
    looks = [facts.look for facts in scan_pictures(originals)]
    chosen = np.random.default_rng(0).choice(len(originals), PLANTED, replace=False).tolist()
    with tempfile.TemporaryDirectory() as place:
        planted: dict[str, list[bytes]] = {}
        for way, (change, quality) in WAYS.items():
            paths = []
            for index in chosen:
                paths.append(str(Path(place) / f"{way}-{index}.jpg"))
                change(read_picture(originals[index])).save(paths[-1], quality=quality)
            planted[way] = [facts.look for facts in scan_pictures(paths, remember=False)]
    rows, known = [], []
    for limit in LIMITS:
        among = {(pair.first, pair.second) for pair in near_pairs(looks, limit=limit)}
        if limit == NEAR:
            known = [
                f"{_short(originals[one], assets)} = {_short(originals[two], assets)}" for one, two in sorted(among)
            ]
        shares, wrong = [], 0
        for copies in planted.values():
            stems = [*range(len(looks)), *chosen]  # which original a file comes from
            pairs = {(pair.first, pair.second) for pair in near_pairs([*looks, *copies], limit=limit)}
            found = {(index, len(looks) + place) for place, index in enumerate(chosen)} & pairs
            shares.append(len(found) / PLANTED)
            origins = [tuple(sorted((stems[one], stems[two]))) for one, two in pairs]
            wrong += sum(one != two and (one, two) not in among for one, two in origins)
        rows.append([str(limit), str(len(among)), *(f"{share:.3f}" for share in shares), str(wrong)])
    return rows, known, counts


def _short(path: str, assets: Path) -> str:
    return str(Path(path).relative_to(assets))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    try:
        rows, known, counts = measured(options.assets)
    except PictureError as error:
        raise SystemExit(str(error)) from error
    head = ["signs apart, at most", "pairs among the originals", *WAYS, "other pairs"]
    originals = " and ".join(f"`{name}` ({count:,} pictures)" for name, count in zip(SETS, counts, strict=True))
    found = "\n".join(f"- {pair}" for pair in known) or "None."
    report = f"""# Copies found

{datetime.date.today()}, {os.cpu_count()} CPU cores ({processor()}), Python {platform.python_version()},
commit {commit()}.
`python benchmarks/duplicates.py ASSETS`

{originals}, of which {PLANTED} were planted again in
each of {len(WAYS)} ways. Recall by way, and the pairs that are neither planted nor found among the originals, in all
ways together. The default is {NEAR} signs of 255.

{markdown_table(head, rows)}

## Pairs among the originals at {NEAR} signs

{found}
"""
    if options.output is None:
        print(report)
    else:
        options.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
