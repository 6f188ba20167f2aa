"""A translated page says what its original says: the same code, links and pictures, under as many headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
TRANSLATED = sorted(DOCS.rglob("*.zh.md"))
FENCE = re.compile(r"^```[^\n]*\n.*?^```$", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#+) ", re.MULTILINE)
CHINESE = re.compile("[\u4e00-\u9fff]")


def original_of(page: Path) -> Path:
    return page.with_name(page.name.replace(".zh.md", ".md"))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def test_home_and_every_tutorial_are_translated() -> None:
    wanted = {DOCS / "index.md", *(page for page in DOCS.glob("tutorials/*.md") if not page.name.endswith(".zh.md"))}
    assert {original_of(page) for page in TRANSLATED} == wanted


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_a_translation_has_the_code_of_its_original(page: Path) -> None:
    blocks, originals = (FENCE.findall(each.read_text(encoding="utf-8")) for each in (page, original_of(page)))
    assert blocks == originals


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_a_translation_has_the_headings_links_and_figures_of_its_original(page: Path) -> None:
    text, original = prose(page), prose(original_of(page))
    assert HEADING.findall(text) == HEADING.findall(original)
    assert sorted(TARGET.findall(text)) == sorted(TARGET.findall(original))
    assert len(CHINESE.findall(text)) > len(original) / 10  # it is not the original under another name
