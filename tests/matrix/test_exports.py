"""One member of each family of both libraries is exported in both formats and compared with the original."""

from __future__ import annotations

import pytest
from exports import FORMATS, PAGE, VERSIONS, examine, read_rows, render
from test_families import MEMBERS, SIZE, SIZES

EXPECTED = {(row.family, row.kind): row for row in read_rows()}

# .ci/run takes these, in two minutes; `pytest -m by_hand` the others, in hours.
QUICK = {
    "timm/byobnet",
    "timm/convnext",
    "timm/efficientnet",
    "timm/mambaout",
    "timm/nfnet",
    "timm/resnet",
    "timm/vision_transformer",
    "torchvision/alexnet",
    "torchvision/mnasnet",
    "torchvision/mobilenetv2",
    "torchvision/resnet",
    "torchvision/squeezenet",
}
FAMILIES = [pytest.param(family, marks=[] if family in QUICK else pytest.mark.by_hand) for family in MEMBERS]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same_logits_when_it_is_exported(family: str) -> None:
    for row in examine(family, MEMBERS[family], SIZES.get(family, SIZE), FORMATS):
        known = EXPECTED.get((family, row.kind))
        if known is not None and known.failure:
            assert row.failure, f"{row} was not exported before; run python scripts/export_table.py {family}"
        else:
            assert not row.failure, row
            assert row.difference is not None
            assert row.difference <= 1e-4 < row.spread / 10


def test_the_page_of_the_docs_says_what_was_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    stated = ", ".join(f"{name} {number}" for name, number in VERSIONS.items())
    if stated not in page:
        pytest.skip(f"the page was not written with {stated}")
    assert page == render(EXPECTED.values(), MEMBERS), "run python scripts/export_table.py"
