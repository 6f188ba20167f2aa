"""Backbones side by side: figures, failures, interrupts, resuming, the leaderboard's files, and the command."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from scipy.stats import kendalltau, spearmanr
from torchvision import models

from browsing import TELL, answer_of, axe_faults
from test_cli import _restore_logging, run  # noqa: F401  # the fixture works by being here
from transferkit import (
    ArtifactError,
    ComparisonInterrupted,
    Finetuner,
    Leaderboard,
    LeaderboardRow,
    OutputError,
    Preprocessing,
    SettingError,
    TransferModel,
    UnknownModelError,
    adapt,
    compare,
    create_model,
    image_folder,
    loader,
)
from transferkit.backbone_facts import count_macs, licence_of, look_at
from transferkit.create import outline
from transferkit.interrupts import EXIT_CODE
from transferkit.sources import PictureData
from transferkit.transferability import h_score, log_me
from transferkit.transforms import eval_transform
from transferkit.trials import Job, Run, Trial, run_apart, run_here

HERE: dict[str, Any] = {"isolated": False, "device": "cpu", "image_size": 32, "num_workers": 0}
ONE, OTHER = "timm/test_efficientnet@none", "timm/test_resnet@none"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of a tiny network."""
    file = tmp_path_factory.mktemp("weights") / "tiny.pth"
    model = create_model("timm/test_efficientnet", weights=None, num_classes=5, seed=3)
    torch.save(model.network.state_dict(), file)
    return file


def without_time(board: Leaderboard) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "pictures_per_second")}
        for row in board.to_dicts()
    ]


# --- figures


def test_accuracies_are_those_of_the_same_runs_on_their_own_and_the_split_is_seed_zeros(picture_folder: Path) -> None:
    data = picture_folder / "train"  # without val/
    board = compare(data, [ONE], seeds=[3], epochs=1, full=True, val_fraction=0.4, **HERE)
    pictures = image_folder(data, val_fraction=0.4, seed=0)
    settings: dict[str, Any] = {"weights": None, "seed": 3, "epochs": 1, "image_size": 32, "progress": False}
    row = board.best()
    for policy, accuracy in (("head", row.accuracy), ("full", row.full_accuracy)):
        history = Finetuner("timm/test_efficientnet", policy=policy, device="cpu", **settings).fit(pictures)
        assert history.best().val_accuracy == accuracy
    assert (row.seeds, row.spread, row.full_spread) == ((3,), None, None)


def test_a_row_has_every_figure_and_the_best_is_first(picture_folder: Path, weights: Path) -> None:
    board = compare(picture_folder, [OTHER, f"test_efficientnet@{weights}"], seeds=[0], epochs=1, **HERE)
    assert {row.backbone for row in board.rows} == {OTHER, "timm/test_efficientnet@tiny.pth"}
    assert board.rows[0].accuracy >= board.rows[1].accuracy
    for row in board.rows:
        assert (row.failure, row.image_size, row.full_accuracy) == (None, 32, None)
        assert 0 < row.accuracy <= 1
        assert row.seconds > 0
        assert row.pictures_per_second > 0
        assert row.peak_memory is None  # it shared this process
        name = row.backbone.partition("@")[0]
        model = create_model(name, weights=None, num_classes=3, image_size=32)
        assert row.parameters == sum(each.numel() for each in model.network.parameters())
        assert row.macs == count_macs(model)
        tuner = Finetuner(name, weights=row.weights, image_size=32, device="cpu", num_workers=0)
        look = look_at(tuner, image_folder(picture_folder))
        assert row.log_me == pytest.approx(log_me(look.features, look.labels))
        assert row.h_score == pytest.approx(h_score(look.features, look.labels, regularised=True))
    tiny = next(row for row in board.rows if row.backbone.endswith("tiny.pth"))
    assert (tiny.weights, tiny.licence) == (str(weights), "not stated")
    assert board.about["training pictures"] == 36
    assert board.about["seeds"] == [0]


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "torchvision/squeezenet1_1", "timm/test_vit"])
def test_scores_are_of_what_the_head_receives_of_the_training_pictures(picture_folder: Path, name: str) -> None:
    size = 64 if "squeezenet" in name else None
    tuner = Finetuner(name, weights=None, policy="head", image_size=size, device="cpu", progress=False)
    data = image_folder(picture_folder)
    look = look_at(tuner, data)
    model = create_model(name, weights=None, class_names=data.class_names, image_size=size, seed=0).eval()
    batches = loader(data.train, eval_transform("imagenet", model.preprocessing), batch_size=36, train=False)
    [(images, labels)] = list(batches)
    with torch.no_grad():
        expected = model.features(images)
    torch.testing.assert_close(torch.from_numpy(look.features), expected, rtol=1e-3, atol=1e-4)
    assert look.labels.tolist() == labels.tolist()


def test_of_many_pictures_every_so_many_are_scored(picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"weights": None, "image_size": 32, "device": "cpu", "batch_size": 5, "num_workers": 0}
    data = image_folder(picture_folder)
    everything = look_at(Finetuner("timm/test_efficientnet", **settings), data)
    monkeypatch.setattr("transferkit.backbone_facts._MOST_SCORED", 12)
    some = look_at(Finetuner("timm/test_efficientnet", **settings), data)
    assert some.labels.tolist() == everything.labels[::3].tolist()
    assert (some.features == everything.features[::3]).all()


def test_the_frozen_pass_runs_once_for_all_seeds_and_random_weights_are_drawn_for_each(
    picture_folder: Path, weights: Path, tmp_path: Path
) -> None:
    for name, stores in ((f"timm/test_efficientnet@{weights}", 2), (ONE, 4)):  # training and validation pictures
        kept = tmp_path / str(stores)
        compare(picture_folder, [name], seeds=(0, 1), epochs=1, cache_dir=kept, **HERE)
        assert len(list(kept.glob("*/0.npy"))) == stores


def test_macs_are_those_that_torchvision_states() -> None:
    for entry in (models.ResNet18_Weights.DEFAULT, models.ViT_B_32_Weights.DEFAULT):
        name = type(entry).__name__.removesuffix("_Weights").lower()
        assert count_macs(outline(f"torchvision/{name}")) / 1e9 == pytest.approx(entry.meta["_ops"], abs=2e-3)


def test_macs_of_a_network_of_ones_own() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10)
    )
    model = adapt(network, num_classes=4, preprocessing=Preprocessing(16, 16))
    assert count_macs(model) == 16 * 16 * 8 * 3 * 9 + 8 * 4


@pytest.mark.parametrize(
    ("backbone", "given", "licence"),
    [
        ("timm/mobilenetv2_050", "default", "apache-2.0"),
        ("timm/mobilenetv2_050", "lamb_in1k", "apache-2.0"),
        ("timm/mobilenetv2_050", "bundled", "apache-2.0"),
        ("timm/mobilenetv2_050", "folder/own.pth", "not stated"),
        ("timm/vit_base_patch16_224.augreg_in21k", Path("own.pth"), "not stated"),
        ("torchvision/resnet18", "default", "not stated"),
        ("torchvision/resnet18", None, None),
        (torch.nn.Linear(1, 1), "default", "not stated"),
    ],
)
def test_the_licence_is_that_of_the_weights(backbone: Any, given: Any, licence: str | None) -> None:
    assert licence_of(backbone, given) == licence


def test_a_module_of_ones_own_begins_every_run_with_its_own_weights(
    picture_folder: Path, tiny_network: Callable[..., torch.nn.Module]
) -> None:
    network = tiny_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    own = {"name": "mine", "backbone": network, "preprocessing": Preprocessing(32, 32)}
    settings = {name: value for name, value in HERE.items() if name != "image_size"}
    board = compare(picture_folder, [own], seeds=[0], epochs=1, full=True, **settings)
    assert board.best().backbone == "mine"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- names


def test_a_backbone_is_called_after_what_was_given(picture_folder: Path) -> None:
    given: list[Any] = [
        "test_efficientnet@NONE",
        {"backbone": "timm/test_efficientnet", "weights": None, "image_size": 48},
        {"backbone": "timm/test_efficientnet", "weights": None, "name": "a name of mine"},
    ]

    def stop(*progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(ComparisonInterrupted, match=r"^stopped after 0 of 9 runs$") as stopped:
        compare(picture_folder, given, on_progress=stop, **HERE)
    assert [row.backbone for row in stopped.value.leaderboard.rows] == [
        "timm/test_efficientnet@none",
        "timm/test_efficientnet@none image_size=48",
        "a name of mine",
    ]


@pytest.mark.parametrize(
    ("backbones", "settings", "error", "words"),
    [
        (["resnet81"], {}, UnknownModelError, "did you mean"),
        ([], {}, SettingError, "no backbones"),
        ([ONE, "test_efficientnet@none"], {}, SettingError, "two backbones are called timm/test_efficientnet@none"),
        ([{"weights": None}], {}, SettingError, "'backbone' in it"),
        ([3], {}, SettingError, "3 is no backbone"),
        ([{"backbone": "timm/test_vit", "epochs": 3}], {}, SettingError, "epochs cannot be set here"),
        ([{"backbone": "timm/test_vit", "image_sise": 3}], {}, SettingError, "did you mean 'image_size'"),
        ([ONE], {"seed": 3}, SettingError, "seed cannot be set here"),
        ([ONE], {"learning_rate": 3}, SettingError, "no setting 'learning_rate'"),
        ([ONE], {"seeds": [0, 0]}, SettingError, "different whole numbers"),
        ([ONE], {"seeds": []}, SettingError, "different whole numbers"),
        ([ONE], {"epochs": 0}, SettingError, "epochs"),
        ([ONE], {"policy": "heads"}, SettingError, "did you mean 'head'"),
        ([ONE], {"resume": True}, SettingError, "set output_dir"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(
    backbones: list[Any], settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)) as told:
        compare("no/such/folder", backbones, **{"isolated": False, **settings})
    assert "\n" not in str(told.value)


# --- failures


def test_a_backbone_that_fails_keeps_a_row_that_says_why(picture_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    torch.save({"a.weight": torch.zeros(1)}, broken)
    board = compare(picture_folder, [f"timm/test_resnet@{broken}", ONE], seeds=[0], epochs=1, **HERE)
    assert [row.backbone for row in board.rows] == [ONE, "timm/test_resnet@broken.pth"]
    lost = board.rows[1]
    assert lost.accuracy is None
    assert lost.failure is not None
    assert "does not fit" in lost.failure
    assert "\n" not in lost.failure
    assert any("test_resnet@broken.pth failed: " in note for note in board.notes())
    assert board.table()[2][1:] == ["–"] * (len(board.table()[0]) - 1)


class Broken:
    """A data set whose pictures cannot be had."""

    targets = [0, 1] * 4

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise ZeroDivisionError("of a\nlibrary")


class Deadly(Broken):
    """One that kills the process which reads it, as running out of memory does."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def job(data: PictureData, *runs: Run, **settings: Any) -> Job:
    given = {"backbone": "timm/test_efficientnet", "weights": None, "image_size": 32, "device": "cpu", "epochs": 1}
    return Job({**given, **settings}, data, "head", runs or (Run(0),))


def test_an_error_of_anothers_code_becomes_one_sentence() -> None:
    broken = PictureData(*[_source(Broken())] * 2, ("a", "b"))
    assert list(run_here(job(broken))) == ["ZeroDivisionError: of a library"]


def _source(dataset: Any) -> Any:
    from transferkit.data import from_datasets

    return from_datasets(dataset, dataset).train


def test_what_cannot_be_sent_to_another_process_is_told(picture_folder: Path) -> None:
    data = image_folder(picture_folder)
    with pytest.raises(SettingError, match="isolated=False"):
        next(run_apart(job(data, train_preset=lambda picture: picture)))


def test_a_process_of_its_own_gives_the_same_figures_and_its_memory(picture_folder: Path) -> None:
    data = image_folder(picture_folder)
    [ours], [theirs] = (list(runs(job(data, Run(1)))) for runs in (run_here, run_apart))
    assert isinstance(ours, Trial)
    assert isinstance(theirs, Trial)
    assert (theirs.run, theirs.accuracy, theirs.epoch) == (ours.run, ours.accuracy, ours.epoch)
    assert theirs.facts.log_me == pytest.approx(ours.facts.log_me, rel=1e-4)
    assert ours.facts.peak_memory is None
    assert 50e6 < (theirs.facts.peak_memory or 0) < 5e9
    assert Trial.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.long
def test_a_data_set_that_another_process_cannot_know_is_told() -> None:
    own = type("Own", (Broken,), {})
    data = PictureData(*[_source(own())] * 2, ("a", "b"))
    sys.modules["__main__"].Own = own  # type: ignore[attr-defined]
    own.__module__ = "__main__"
    try:
        [told] = list(run_apart(job(data)))
    finally:
        del sys.modules["__main__"].Own  # type: ignore[attr-defined]
    assert isinstance(told, str)
    assert "isolated=False" in told


@pytest.mark.long
def test_the_memory_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it(picture_folder: Path) -> None:
    data = image_folder(picture_folder)
    ballast = torch.ones(2**29)  # 2 GiB, more than a process needs that trains this network
    [trial] = list(run_apart(job(data)))
    assert isinstance(trial, Trial)
    assert trial.facts.peak_memory is not None
    assert trial.facts.peak_memory < ballast.nbytes < psutil.Process().memory_info().rss


@pytest.mark.long
def test_a_process_that_is_killed_costs_one_row(tmp_path: Path) -> None:
    data = PictureData(*[_source(Deadly())] * 2, ("a", "b"))
    board = compare(data, [ONE], seeds=[0], epochs=1, output_dir=tmp_path, image_size=32)
    assert board.rows[0].failure == "its process was ended by SIGKILL, as happens when memory runs out"
    assert (tmp_path / "leaderboard.html").exists()
    assert not (tmp_path / "tradeoff.png").exists()


# --- interrupts and resuming


def test_results_are_taken_over_and_only_what_is_missing_is_done(picture_folder: Path, tmp_path: Path) -> None:
    asked: list[tuple[int, int, str]] = []

    def told(*progress: Any) -> None:
        asked.append(progress)

    compare(picture_folder, [ONE], seeds=[0], epochs=1, output_dir=tmp_path, on_progress=told, **HERE)
    assert asked == [(0, 1, f"{ONE}, seed 0"), (1, 1, "done")]
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "leaderboard.csv",
        "leaderboard.html",
        "leaderboard.json",
        "leaderboard.md",
        "results",
        "tradeoff.png",
    ]
    asked.clear()
    more = {"seeds": [0, 1], "epochs": 1, "output_dir": tmp_path, "resume": True, "on_progress": told}
    board = compare(picture_folder, [ONE, OTHER], **more, **HERE)
    assert [doing for _, _, doing in asked] == [
        f"{ONE}, seed 1",
        f"{OTHER}, seed 0",
        f"{OTHER}, seed 1",
        "done",
    ]
    assert [(done, count) for done, count, _ in asked] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    files = [
        json.loads((tmp_path / "results" / f"timm-test_efficientnet@none-seed{seed}.json").read_text())
        for seed in (0, 1)
    ]
    accuracies = [each["trial"]["accuracy"] for each in files]
    one = next(row for row in board.rows if row.backbone == ONE)
    assert (one.accuracy, one.spread) == pytest.approx((statistics.mean(accuracies), statistics.stdev(accuracies)))
    at_once = without_time(compare(picture_folder, [ONE], seeds=[0, 1], epochs=1, **HERE))
    assert [each for each in without_time(board) if each["backbone"] == ONE] == at_once


def test_results_are_not_mixed_with_those_of_other_data_or_settings(picture_folder: Path, tmp_path: Path) -> None:
    given = {"seeds": [0], "epochs": 1, "output_dir": tmp_path, **HERE}
    compare(picture_folder, [ONE], **given)
    with pytest.raises(OutputError, match="--resume"):
        compare(picture_folder, [ONE], **given)
    with pytest.raises(ArtifactError, match="with epochs 1, not 2"):
        compare(picture_folder, [ONE], **{**given, "epochs": 2}, resume=True)
    with pytest.raises(ArtifactError, match="with policy"):
        compare(picture_folder, [ONE], **given, policy="full", resume=True)
    with pytest.raises(ArtifactError, match="made with training pictures"):
        compare(picture_folder / "train", [ONE], **given, resume=True)
    [file] = (tmp_path / "results").iterdir()
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ArtifactError, match=r"seed0.json is damaged .*; delete it"):
        compare(picture_folder, [ONE], **given, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_keeps_what_is_done_and_the_rest_can_be_done_later(
    picture_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def press(done: int, count: int, doing: str) -> None:
        if done == 1:
            signal.raise_signal(number)

    given = {"seeds": [0], "epochs": 1, "output_dir": tmp_path, **HERE}
    with pytest.raises(ComparisonInterrupted, match="stopped after 1 of 2 runs; what is done is in") as stopped:
        compare(picture_folder, [ONE, OTHER], on_progress=press, **given)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [row.failure for row in stopped.value.leaderboard.rows] == [None, "it was not reached"]
    written = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [row["backbone"] for row in written["rows"]] == [ONE, OTHER]
    board = compare(picture_folder, [ONE, OTHER], resume=True, **given)
    assert [row.failure for row in board.rows] == [None, None]
    assert stopped.value.leaderboard.best() in board.rows


# --- the leaderboard


def board_of(*rows: LeaderboardRow) -> Leaderboard:
    return Leaderboard(rows, {"validation pictures": 50, "seeds": [0, 1]})


def row(name: str, accuracy: float, log: float, h: float, **more: Any) -> LeaderboardRow:
    figures = {"seeds": (0, 1), "seconds": 61.2, "macs": 1_810_000_000, "parameters": 11_700_000, "image_size": 224}
    return LeaderboardRow(name, accuracy, 0.01, log_me=log, h_score=h, **{**figures, **more})


FOUR = board_of(
    row("a", 0.9, 0.3, 1.5, peak_memory=612_300_000, pictures_per_second=87.6, licence="mit"),
    row("b", 0.8, 0.1, 1.4),
    row("c", 0.7, 0.2, 1.3),
    row("d", 0.6, 0.0, 1.2),
    LeaderboardRow("e", failure="no weights"),
)


def test_scores_are_compared_with_the_accuracies_as_scipy_does() -> None:
    log, h = FOUR.agreements()
    accuracies, scores = [0.9, 0.8, 0.7, 0.6], [0.3, 0.1, 0.2, 0.0]
    assert (log.count, h.count) == (4, 4)
    assert log.kendall == pytest.approx(kendalltau(scores, accuracies).statistic)
    assert log.spearman == pytest.approx(spearmanr(scores, accuracies).statistic)
    assert str(log) == "LogME told the order of the 4 backbones nearly (Kendall 0.67, Spearman 0.80)."
    assert str(h) == "H-score told the order of the 4 backbones exactly (Kendall 1.00, Spearman 1.00)."


def test_little_is_said_of_scores_over_few_backbones() -> None:
    log, h = board_of(row("a", 0.9, 0.1, 1.0), row("b", 0.8, 0.2, 1.0)).agreements()
    assert str(log).startswith("LogME did not tell the order of the 2 backbones (Kendall -1.00")
    assert "over fewer than 4 backbones that says little" in str(log)
    assert str(h) == "H-score has no order to tell: there are fewer than 2 backbones, or all have one figure."
    assert board_of(row("a", 0.9, 0.1, 1.0)).agreements()[0].kendall is None


def test_the_table_shows_figures_with_units_and_dashes_for_what_is_not_known() -> None:
    head, first, second, *_, last = FOUR.table()
    assert dict(zip(head, first, strict=True)) == {
        "backbone": "a",
        "val accuracy": "0.900 ± 0.010",
        "seconds": "61",
        "parameters": "11.7 M",
        "MACs": "1.81 G",
        "input": "224 px",
        "pictures/s": "88",
        "peak memory": "612.3 MB",
        "licence of weights": "mit",
        "LogME": "0.300",
        "H-score": "1.500",
    }
    assert second[head.index("peak memory")] == "–"
    assert last == ["e", *["–"] * (len(head) - 1)]
    assert "everything trained" in board_of(row("a", 0.9, 0.1, 1.0, full_accuracy=0.95)).table()[0]


def test_an_empty_leaderboard_has_no_best() -> None:
    with pytest.raises(SettingError, match="rows say why"):
        board_of(LeaderboardRow("e", failure="no weights")).best()


class Page(HTMLParser):
    """The cells of a page's table, and all addresses in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.values: list[str] = []
        self.addresses: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.addresses += [value or "" for name, value in given.items() if name in ("src", "href", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")
            self.values.append(given.get("data-value") or "")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data.strip()


def test_the_files_hold_the_same_and_escape_names(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> | & \"b\""
    board = board_of(row(evil, 0.9, 0.3, 1.5), LeaderboardRow("lost", failure="<b>why</b> | so"))
    assert board.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    files = {each.suffix: each for each in (tmp_path / "new" / "folder").iterdir()}
    assert json.loads(files[".json"].read_text()) == board.to_dict()
    with files[".csv"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["backbone"] for line in lines] == [evil, "lost"]
    assert (lines[0]["accuracy"], lines[0]["seeds"], lines[1]["accuracy"]) == ("0.9", "0 1", "")
    markdown = files[".md"].read_text().splitlines()
    assert markdown[2].startswith("| <script>alert('x')</script> \\| & ")
    assert {len(re.split(r"(?<!\\)\|", line)) for line in markdown[:4]} == {len(board.table()[0]) + 2}
    page = files[".html"].read_text()
    assert "<script>alert" not in page
    assert "<b>why" not in page
    parsed = Page(page)
    assert parsed.rows == board.table()
    assert "0.9" in parsed.values
    assert parsed.addresses
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert "http" not in page
    with Image.open(files[".png"]) as picture:
        assert picture.width > 500


ASK = f"""<script>window.addEventListener("load", () => {{
  const table = document.querySelector("table.sortable");
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  const column = [...table.tHead.rows[0].cells].findIndex((head) => head.textContent === "val accuracy");
  const click = (place) => table.tHead.rows[0].cells[place].querySelector("button").click();
  const answer = {{ before: names() }};
  click(column); answer.up = names();
  click(column); answer.down = names();
  click(0); answer.named = names();
  answer.faults = window.faults;
  answer.wide = document.documentElement.scrollWidth > window.innerWidth;
  {TELL} }});</script>"""


@pytest.fixture(scope="module")
def leaderboard_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [row("b", 0.9, 0.3, 1.5), row("a", 0.8, 0.2, 1.0), row("c", 0.95, 0.1, 2.0)]
    folder = board_of(*rows, LeaderboardRow("lost", failure="why")).save(tmp_path_factory.mktemp("board"))
    return (folder / "leaderboard.html").read_text()


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_sorts_in_a_browser_and_what_is_unknown_stays_below(
    leaderboard_page: str, tmp_path: Path, width: int
) -> None:
    answer = answer_of(leaderboard_page, tmp_path, ASK, width=width)
    assert answer == {
        "before": ["b", "a", "c", "lost"],
        "up": ["a", "b", "c", "lost"],
        "down": ["c", "b", "a", "lost"],
        "named": ["a", "b", "c", "lost"],
        "faults": [],
        "wide": False,
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_in_the_leaderboard(leaderboard_page: str, tmp_path: Path, scheme: str) -> None:
    assert axe_faults(leaderboard_page, tmp_path, scheme) == []


def test_a_leaderboard_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        FOUR.save(tmp_path / "file")


# --- the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "resnet81"], "did you mean"),
        (["--models", " , "], "no backbones"),
        (["--models", "timm/test_vit@none", "--seeds", "0,one"], "--seeds '0,one'"),
    ],
)
def test_a_mistake_is_one_sentence(picture_folder: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    stdout, message = run("compare", picture_folder, *arguments, "--output", tmp_path, expect=2)
    assert stdout == ""
    assert words in message
    assert "\n" not in message


@pytest.mark.long
def test_the_command_prints_saves_and_goes_on(picture_folder: Path, tmp_path: Path, weights: Path) -> None:
    broken = tmp_path / "broken.pth"
    torch.save({"a.weight": torch.zeros(1)}, broken)
    names = f"timm/test_efficientnet@{weights},timm/test_resnet@{broken}"
    given = ["compare", picture_folder, "--models", names, "--seeds", "0", "--epochs", 1, "--output", tmp_path / "out"]
    told = json.loads(run(*given, "--json")[0])
    assert set(told) == {"output", "about", "rows", "scores"}
    assert [each["failure"] is None for each in told["rows"]] == [True, False]
    assert told["rows"][0]["peak_memory"] > 50e6
    stdout, _ = run(*given, "--resume")
    assert stdout.startswith("backbone ")
    assert "timm/test_resnet@broken.pth failed: " in stdout
    assert "saved in" in stdout
    stdout, message = run(*given[:3], names.split(",")[1], *given[4:9], tmp_path / "none", expect=2)
    assert "no backbone could be trained" in message


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_is_interrupted_and_goes_on_as_it_says(
    picture_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C in a terminal goes to the process that trains as well, SIGTERM often to the first one alone."""
    command = ["-m", "transferkit", "compare", str(picture_folder), "--models", ONE, "--epochs", "2"]
    process = subprocess.Popen(
        [sys.executable, *command, "--seeds", "0,1,2,3", "--output", str(tmp_path), "--device", "cpu"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    while not list(tmp_path.glob("results/*.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, said
    assert "Traceback" not in said
    assert psutil.wait_procs(children, timeout=10)[1] == []
    told = re.search(
        r"^transferkit: stopped after (\d) of 4 runs; what is done is in .*; to go on:\n  (.*)\n", said, re.M
    )
    assert told, said
    assert int(told[1]) == len(list(tmp_path.glob("results/*.json")))
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_dir()) == ["results"]
    if number == signal.SIGINT:
        [row] = json.loads(run(*shlex.split(told[2])[1:], "--json")[0])["rows"]
        assert (row["failure"], row["seeds"]) == (None, [0, 1, 2, 3])


def test_a_job_is_sent_whole(picture_folder: Path) -> None:
    data = image_folder(picture_folder)
    sent = job(data, Run(3, full=True))
    assert pickle.loads(pickle.dumps(sent)) == sent


def test_a_model_is_no_backbone_of_its_own(tiny_model: Callable[..., TransferModel]) -> None:
    with pytest.raises(SettingError, match="is no backbone"):
        compare("no/such/folder", [tiny_model()])  # type: ignore[list-item]
