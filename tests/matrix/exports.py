"""One member of each family of both libraries, exported in both formats, and the page that tells what was found.

The tests and ``scripts/export_table.py`` share this module, so what is tested is what is documented.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.create import create_model
from transferkit.exceptions import ExportError
from transferkit.export import export_onnx, export_program, sample_images
from transferkit.randomness import seeded

__all__ = ["FORMATS", "PAGE", "RESULTS", "VERSIONS", "Row", "examine", "read_rows", "render", "stir", "write_row"]

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "exports.md"
RESULTS = Path(__file__).with_suffix(".jsonl")
FORMATS = {"pt2": export_program, "onnx": export_onnx}
VERSIONS = {name: version(name).partition("+")[0] for name in ("torch", "torchvision", "timm", "onnxruntime")}


@dataclass(frozen=True)
class Row:
    """What came of one export.

    Attributes:
        family: ``"timm/convnext"``.
        name: Its smallest member.
        size: Side of the pictures in pixels.
        kind: ``"onnx"`` or ``"pt2"``.
        seconds: How long it took, the check included.
        spread: How far apart the original's logits for eight pieces of photographs are; where they hardly differ, that
            they are equal says little.
        difference: As in :class:`transferkit.export.Export`; ``None`` where it was not exported.
        failure: Why not.
    """

    family: str
    name: str
    size: int
    kind: str
    seconds: float
    spread: float = 0.0
    difference: float | None = None
    failure: str = ""


def examine(family: str, name: str, size: int, kinds: Iterable[str]) -> Iterator[Row]:
    """Export a network of random weights, which is compared with the original in doing so; one row per format."""
    with seeded(0):
        model = create_model(name, weights=None, num_classes=3, image_size=size)
    images = sample_images(model)
    stir(model.network, images)
    with torch.no_grad():
        logits = model.network(images)
    spread = float((logits.max(0).values - logits.min(0).values).max() / logits.abs().max().clamp(min=1))
    for kind in kinds:
        started, difference, failure = time.perf_counter(), None, ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                difference = FORMATS[kind](model, Path(folder) / f"network.{kind}").difference
            except ExportError as error:
                failure = str(error).removeprefix(f"{model.name} ")
        yield Row(family, name, size, kind, time.perf_counter() - started, spread, difference, failure)


def stir(network: nn.Module, images: Tensor) -> None:
    """Move every weight a little, and measure the norms' statistics on images.

    Branches that begin at zero would hide what they compute, and statistics of other images shrink it to nothing.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [each for each in network.eval().modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), seeded(0):
        for parameter in network.parameters():
            scale = float(parameter.std()) if parameter.numel() > 1 else 0.0
            scale = scale if scale > 1e-3 else 1.0  # ones, zeros, and what scales a branch by a millionth
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1 * scale)
        for norm in norms:
            norm.train().momentum = 1.0
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def write_row(row: Row) -> None:
    """Add a row to the file of what was found."""
    with RESULTS.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"versions": VERSIONS, "row": asdict(row)}) + "\n")


def read_rows() -> list[Row]:
    """Return what was found with the libraries that are installed; of one export the last counts."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    rows = [Row(**line["row"]) for line in lines if line["versions"] == VERSIONS]
    return list({(row.family, row.kind): row for row in rows}.values())


def render(rows: Iterable[Row], members: Mapping[str, str]) -> str:
    """Return the page: versions, totals, one line per family, and why some are not exported.

    Args:
        rows: What was found.
        members: The member of each family that is exported.
    """
    by_family: dict[str, dict[str, Row]] = {family: {} for family in members}
    for row in rows:
        by_family[row.family][row.kind] = row
    versions = ", ".join(f"{name} {number}" for name, number in VERSIONS.items())
    lines = [
        "# What can be exported",
        "",
        "`python scripts/export_table.py` exports the smallest member of every family of both libraries, with random",
        "weights, as ONNX and as an exported program (`.pt2`), and writes this page as far as it has come. A file",
        "counts where it gives the network's own logits at batches of 1, 3 and 8 photographs, within 1e-4, or within a",
        "ten-thousandth of the largest logit where that is above 1. [The guide](../how-to/export.md) says how to",
        "export, and what is in the files.",
        "",
        f"Found with {versions}:",
        "",
    ]
    titles = {"onnx": "ONNX", "pt2": "`.pt2`"}
    for kind, title in titles.items():
        own = [row[kind] for row in by_family.values() if kind in row]
        left = len(members) - len(own)
        later = f"; {left} of the {len(members)} have not been tried yet" if left else ""
        lines.append(f"- **{title}: {sum(not row.failure for row in own)} of {len(own)}** families{later}")
    lines += [
        "",
        "## Families",
        "",
        "A family is the module of the library that defines it; the number is the largest difference of a logit.",
        "",
        "| family | example | ONNX | `.pt2` |",
        "|---|---|---|---|",
    ]
    for family, found in by_family.items():
        cells = [_cell(found.get(kind)) for kind in titles]
        lines.append(f"| {family} | `{members[family].partition('/')[2]}` | {' | '.join(cells)} |")
    lines += ["", "## What is not exported, and why", ""]
    failures = [row for found in by_family.values() for row in found.values() if row.failure]
    lines += [f"- {row.family}, {titles[row.kind]}: `{row.name}` {row.failure}" for row in failures]
    lines += [] if failures else ["None has failed so far." if any(map(len, by_family.values())) else "None was tried."]
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return "not tried"
    if row.difference is None:
        return "no"
    return f"{row.difference:.0e}" if row.difference else "0"
