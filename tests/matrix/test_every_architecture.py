"""Every architecture of both libraries, on torch's meta device, and the page of the docs that says so."""

from __future__ import annotations

import pytest
import timm
import torchvision
from architectures import PAGE, Row, examine_all, render

from transferkit.backbones import list_models

pytestmark = [pytest.mark.matrix, pytest.mark.long, pytest.mark.timeout(1800)]

# timm's encoders have no classifier, and timm offers no way to give them one.
ENCODERS = {
    "timm/deepseek_vit_412m_enc",
    "timm/gemma4_vit_167m_enc",
    "timm/gemma4_vit_570m_enc",
    "timm/mobilenetv5_300m_enc",
    "timm/qwen3_vit_306m_enc",
    "timm/qwen3_vit_416m_enc",
    "timm/qwen3_vit_88m_enc",
}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return examine_all(list_models())


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_every_architecture_swaps_its_head_splits_freezes_and_runs(library: str, rows: list[Row]) -> None:
    own = [row for row in rows if row.family.startswith(f"{library}/")]
    assert len(own) == len(list_models(f"{library}/*")) > 0
    failed = [f"{row.name}: {'; '.join(row.failures)}" for row in own if row.failures]
    assert not failed, f"{len(failed)} of {len(own)} fail:\n" + "\n".join(failed)


def test_only_timms_encoders_are_refused_and_each_in_one_sentence(rows: list[Row]) -> None:
    refusals = {row.name: row.refusal for row in rows if row.refusal is not None}
    assert set(refusals) == ENCODERS & {row.name for row in rows}
    for name, sentence in refusals.items():
        assert "\n" not in sentence, name
        assert "head" in sentence, name


def test_the_page_of_the_docs_says_what_was_found(rows: list[Row]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    stated = f"torchvision {torchvision.__version__.partition('+')[0]} and timm {timm.__version__}"
    if stated not in page:
        pytest.skip(f"the page was not written with {stated}")
    assert page == render(rows), "run python scripts/architecture_table.py"
