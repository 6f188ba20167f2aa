"""The report of a run: one file that holds all it shows, escapes what it is given, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from browsing import TELL, answer_of, axe_faults
from test_cli import _restore_logging, run  # noqa: F401  # the fixture works by being here
from transferkit import Finetuner
from transferkit.exceptions import ArtifactError, OutputError
from transferkit.report import write_report
from transferkit.validation import Judgement, confusion_matrix, judge, load_judgements, save_judgements

EVIL = '<script>alert("x")</script>'
CLASSES = (EVIL, "bees & wasps", "蚂蚁")
ASK = f"""<script>window.addEventListener("load", () => {{
  const table = document.querySelector("table.sortable");
  const column = (place) => [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);
  const click = (place) => table.tHead.rows[0].cells[place].querySelector("button").click();
  const answer = {{ before: column(0) }};
  click(3); answer.up = column(3);
  click(3); answer.down = column(3); answer.said = table.tHead.rows[0].cells[3].getAttribute("aria-sort");
  click(0); answer.names = column(0);
  answer.faults = window.faults;
  answer.wide = document.documentElement.scrollWidth > window.innerWidth;
  document.querySelector("main").style.maxWidth = "343px";  // a phone's
  answer.heads = [...document.querySelectorAll("thead th:first-child")].map((head) => head.offsetHeight);
  {TELL} }});</script>"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three classes that are hard to write."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 5)):
        for number, name in enumerate(CLASSES):
            folder = root / "data" / part / name.replace("/", "∕")
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.normal(90 + 30 * number, 60, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    (root / "data" / "train" / "蚂蚁" / "broken.jpg").write_bytes(b"no picture")
    Finetuner(
        "timm/test_efficientnet",
        weights=None,
        policy="full",
        epochs=2,
        image_size=32,
        num_workers=0,
        on_bad_image="skip",
        progress=False,
        output_dir=root / "run",
    ).fit(root / "data")
    return root / "run"


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return write_report(finished, device="cpu").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """All start tags with their attributes, and what is left open."""

    VOID = frozenset({"meta", "img", "link", "br", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def test_a_run_notes_what_it_said_of_each_validation_picture(finished: Path) -> None:
    judged = load_judgements(finished / "validation.csv")
    assert len(judged) == 15
    assert {each.actual for each in judged} == {name.replace("/", "∕") for name in CLASSES}
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    accuracy = sum(each.is_right for each in judged) / len(judged)
    assert accuracy == pytest.approx(config["run"]["best"]["val_accuracy"])
    assert sum(each.loss for each in judged) / len(judged) > 0
    said = Finetuner.load(finished, device="cpu").predict([each.picture for each in judged])
    assert [each.label for each in said] == [each.predicted for each in judged]
    assert [each.confidence for each in said] == pytest.approx([each.confidence for each in judged], abs=1e-5)


def test_the_page_holds_every_section_and_is_well_formed(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", page)
    assert titles == [
        "Plan that ran",
        "Curves",
        "Classes",
        "Confusion matrix",
        "Worst mistakes",
        "Calibration",
        "Data",
        "Environment and settings",
        "How to use the model",
    ]
    ids = [given["id"] for _, given in tags.found if "id" in given]
    assert len(ids) == len(set(ids))
    assert all(given.get("alt") for tag, given in tags.found if tag == "img")
    assert "broken.jpg" in page
    assert re.search(r"95 % interval [\d.]+ % to [\d.]+ %", page)


def test_the_page_refers_to_nothing_outside_of_itself(page: str) -> None:
    for tag, given in Tags(page).found:
        for name in ("src", "href"):
            if name in given:
                assert str(given[name]).startswith(("data:image/", "#")), (tag, given)
        assert tag not in ("link", "iframe", "object", "base")
    assert "@import" not in page
    assert "url(" not in page


def test_names_are_escaped(page: str) -> None:
    assert 'alert("x")' not in page
    assert "bees &amp; wasps" in page


@pytest.mark.parametrize("width", [1280, 500])  # Chromium's windows are no narrower
def test_the_page_works_in_a_browser(page: str, tmp_path: Path, width: int) -> None:
    answer = answer_of(page, tmp_path, ASK, width=width)
    assert answer["faults"] == []
    assert not answer["wide"], "the page is wider than its window"
    assert max(answer["heads"]) < 100, "a column's head is broken into letters"
    assert sorted(answer["up"], key=float) == answer["up"]
    assert answer["down"] == answer["up"][::-1]
    assert answer["said"] == "descending"
    assert sorted(answer["names"]) == sorted(answer["before"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_of_accessibility(page: str, tmp_path: Path, scheme: str) -> None:
    assert axe_faults(page, tmp_path, scheme) == []


def test_a_saved_model_without_a_run_is_judged_on_the_pictures_given(finished: Path, tmp_path: Path) -> None:
    tuner = Finetuner.load(finished, device="cpu")
    tuner.save(tmp_path / "bare")
    assert "transferkit report RUN DATA" in write_report(tmp_path / "bare").read_text(encoding="utf-8")
    data = finished.parent / "data"
    file = write_report(tmp_path / "bare", tmp_path / "sub" / "page.html", data=data, device="cpu")
    text = file.read_text(encoding="utf-8")
    assert "of 15 validation pictures right" in text
    assert "Worst mistakes" in text


def test_pictures_that_are_gone_are_named_without_being_shown(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    judged = [Judgement("/no/longer/here.png", each.actual, each.predicted, each.confidence, each.loss)
              for each in load_judgements(copy / "validation.csv")]  # fmt: skip
    save_judgements(judged, copy / "validation.csv")
    text = write_report(copy, device="cpu").read_text(encoding="utf-8")
    assert any(not each.is_right for each in judged) == ("/no/longer/here.png" in text)


def test_the_command_writes_a_report(finished: Path, tmp_path: Path) -> None:
    out, _ = run("report", finished, "--output", tmp_path / "mine.html", "--json")
    assert json.loads(out) == {"report": str(tmp_path / "mine.html")}
    assert (tmp_path / "mine.html").is_file()
    run("report", tmp_path, expect=2)


def test_a_report_that_cannot_be_written_says_so(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write the report"):
        write_report(finished, tmp_path / "file" / "report.html", device="cpu")
    with pytest.raises(ArtifactError, match="holds no saved model"):
        write_report(tmp_path)


def test_judgements_follow_from_logits() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.4, 0.3]])
    found = judge(logits, torch.tensor([0, 2]), CLASSES, ["a", "b"], temperature=2.0)
    shares = torch.softmax(logits / 2, 1)
    assert [each.confidence for each in found] == pytest.approx([float(shares[0, 0]), float(shares[1, 0])])
    assert [each.loss for each in found] == pytest.approx([-float(shares[0, 0].log()), -float(shares[1, 2].log())])
    assert confusion_matrix(found, CLASSES).tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]
