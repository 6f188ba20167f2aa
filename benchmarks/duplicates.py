"""How many copies does the duplicate finder find, and how much of what it finds is none?

    python benchmarks/duplicates.py ASSETS [--output benchmarks/results/duplicates.md]

ASSETS holds hymenoptera_data/, flowers5_small/ and weights/. Of 200 of their pictures, copies are planted in ten ways;
recall is the share of these that is found, by the pictures' looks and by the features of a MobileNetV2. A pair that was
not planted counts as wrong unless the originals of its files are a pair as well; these are listed, to be looked at.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from _report import markdown_table
from _runs import hand_out, heading
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from transferkit.create import create_model
from transferkit.exceptions import PictureError
from transferkit.fingerprints import NEAR, near_pairs
from transferkit.kept_features import ALIKE, alike_pairs
from transferkit.loading import loader
from transferkit.model import TransferModel
from transferkit.pictures import find_pictures, read_picture
from transferkit.scan import scan_pictures
from transferkit.sources import Picture, PictureFiles
from transferkit.transforms import eval_transform

SETS = ("hymenoptera_data", "flowers5_small")
LIMITS = (12, 18, 24, NEAR, 40)
COSINES = (0.9, ALIKE, 0.95, 0.97, 0.98, 0.99)
PLANTED = 200
MOBILENET = "mobilenet_v2-77326c9b.pth"
NOWHERE = ""


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
    "a quarter cropped": (cropped(0.25), 90),
    "grey": (lambda image: image.convert("L").convert("RGB"), 90),
    "turned by 5 degrees": (lambda image: image.rotate(5, Image.Resampling.BICUBIC), 90),
}


def measured(assets: Path) -> tuple[dict[str, list[list[str]]], list[str], list[int]]:
    """Return a table by what is compared, the pairs found among the originals, and how many originals there are."""
    originals: list[str] = []
    counts = []
    for name in SETS:
        paths = find_pictures(assets / name).pictures
        readable = [path for path, facts in zip(paths, scan_pictures(paths), strict=True) if facts.cause is None]
        counts.append(len(readable))
        originals += readable
    chosen = np.random.default_rng(0).choice(len(originals), PLANTED, replace=False).tolist()
    model = create_model("torchvision/mobilenet_v2", weights=assets / "weights" / MOBILENET, num_classes=2).eval()
    with tempfile.TemporaryDirectory() as place:
        copies: dict[str, list[str]] = {}
        for way, (change, quality) in WAYS.items():
            copies[way] = []
            for index in chosen:
                copies[way].append(str(Path(place) / f"{way}-{index}.jpg"))
                change(read_picture(originals[index])).save(copies[way][-1], quality=quality)
        looks = {way: _looks(paths) for way, paths in {NOWHERE: originals, **copies}.items()}
        features = {way: features_of(model, paths) for way, paths in {NOWHERE: originals, **copies}.items()}

    def by_look(way: str, limit: float) -> set[tuple[int, int]]:
        both = looks[NOWHERE] + ([] if way == NOWHERE else looks[way])
        return {(pair.first, pair.second) for pair in near_pairs(both, limit=int(limit))}

    def by_features(way: str, limit: float) -> set[tuple[int, int]]:
        both = torch.cat([features[NOWHERE], *([] if way == NOWHERE else [features[way]])])
        return set(alike_pairs(both, limit=limit))

    tables = {
        "looks": [_row(by_look, limit, chosen, len(originals)) for limit in LIMITS],
        "features": [_row(by_features, limit, chosen, len(originals)) for limit in COSINES],
    }
    known = [f"{_short(originals[one], assets)} = {_short(originals[two], assets)}" for one, two in
             sorted(by_look(NOWHERE, NEAR))]  # fmt: skip
    return tables, known, counts


def _row(
    pairs_of: Callable[[str, float], set[tuple[int, int]]], limit: float, chosen: Sequence[int], count: int
) -> list[str]:
    """Return the recall by way, and how many pairs are neither planted nor found among the originals."""
    among = pairs_of(NOWHERE, limit)
    stems = [*range(count), *chosen]  # which original a file comes from
    shares, wrong = [], 0
    for way in WAYS:
        pairs = pairs_of(way, limit)
        shares.append(len({(index, count + place) for place, index in enumerate(chosen)} & pairs) / PLANTED)
        origins = {tuple(sorted((stems[one], stems[two]))) for one, two in pairs}
        wrong += sum(one != two and (one, two) not in among for one, two in origins)
    return [f"{limit:g}", str(len(among)), *(f"{share:.3f}" for share in shares), str(wrong)]


def _looks(paths: Sequence[str]) -> list[bytes]:
    return [facts.look for facts in scan_pictures(paths, remember=False)]


def features_of(model: TransferModel, paths: Sequence[str]) -> Tensor:
    """Return what a head would receive of pictures, as the activation cache keeps it."""
    pictures = PictureFiles([Picture(path, 0) for path in paths])
    batches = loader(pictures, eval_transform("imagenet", model.preprocessing), batch_size=16, train=False)
    with torch.inference_mode():
        return torch.cat([model.features(images) for images, _ in batches])


def _short(path: str, assets: Path) -> str:
    return str(Path(path).relative_to(assets))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    try:
        tables, known, counts = measured(options.assets)
    except PictureError as error:
        raise SystemExit(str(error)) from error
    head = ["pairs among the originals", *WAYS, "other pairs"]
    originals = " and ".join(f"`{name}` ({count:,} pictures)" for name, count in zip(SETS, counts, strict=True))
    found = "\n".join(f"- {pair}" for pair in known) or "None."
    report = f"""# Copies found

{heading("duplicates.py ASSETS")}

{originals}, of which {PLANTED} were planted again in
each of {len(WAYS)} ways. Recall by way, and the pairs that are neither planted nor found among the originals, in all
ways together. The default is {NEAR} signs of 255, and a cosine of {ALIKE:g} where features are kept.

## By their looks

{markdown_table(["signs apart, at most", *head], tables["looks"])}

## By the features of a MobileNetV2

{markdown_table(["cosine, at least", *head], tables["features"])}

## Pairs among the originals at {NEAR} signs

{found}
"""
    hand_out(report, options.output)


if __name__ == "__main__":
    main()
