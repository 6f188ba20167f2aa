"""The benchmarks' figures are computed right, the peers freeze what we freeze, and every script runs to its table."""

from __future__ import annotations

import doctest
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, strategies as st
from torchvision import models

from transferkit.create import outline
from transferkit.freezing import policy_from_text

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OURS = ("transferkit", "transferkit, views=4", "transferkit, 1 epoch")
PEERS = ("PyTorch tutorial loop", "Lightning", "HF Trainer")
TRAINING = "training and validation, s"


def module(path: str) -> ModuleType:
    """Import a file of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{Path(path).stem}", BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


report = module("_report.py")
common = module("peers/_common.py")


def runs(*seconds: float, accuracy: float = 0.9) -> list[Any]:
    return [report.Outcome(each, each / 2, (each / 4, each / 8, each / 8), accuracy) for each in seconds]


def cells(text: str, row: str) -> list[str]:
    line = next(each for each in text.splitlines() if each.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_examples_of_the_figures_hold() -> None:
    results = doctest.testmod(report)
    assert results.attempted >= 6
    assert results.failed == 0


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=9), st.floats(0.1, 100))
def test_the_ratio_of_paired_runs_is_the_factor_between_them(ours: list[float], factor: float) -> None:
    assert report.paired_ratio([each * factor for each in ours], ours) == pytest.approx(factor)


def test_pairs_are_compared_seed_by_seed_and_not_by_their_medians() -> None:
    # seed 1 ran while the machine was busy: both took ten times as long
    assert report.paired_ratio([20.0, 200.0, 21.0], [10.0, 100.0, 7.0]) == 2.0


def test_the_table_compares_everyone_with_each_of_ours_and_the_training_with_the_first() -> None:
    outcomes = {"ours": runs(10, 12, 14), "views": runs(20, 24, 28), "loop": runs(40, 48, 56, accuracy=0.8)}
    text = report.table(outcomes, ours=["ours", "views"])
    assert cells(text, "loop") == [
        "loop", "48.0 (40.0–56.0)", "4.00", "2.00", "24.0 (20.0–28.0)", "4.00", "0.800 ± 0.000", "50.0 %",
    ]  # fmt: skip
    assert cells(text, "ours")[2:4] == ["1.00", "0.50"]


def test_a_contestant_without_figures_keeps_its_row_and_says_why() -> None:
    text = report.table({"ours": runs(10), "fastai": "not installed (no module)"}, ours=["ours"])
    assert cells(text, "fastai") == ["fastai", "not installed (no module)", *["–"] * 5]


def test_accuracies_from_random_weights_are_left_out() -> None:
    assert cells(report.table({"ours": runs(10)}, ours=["ours"], accuracy=False), "ours")[5] == "–"


def test_the_verdict_names_the_fastest_rival_and_those_that_did_not_run() -> None:
    outcomes = {"ours": runs(2), "slow": runs(60), "fast": runs(20), "lost": "failed (killed)"}
    said = report.verdict(outcomes, "ours", ["slow", "fast", "lost"], asked=25)
    assert said == "ours: asked at least 25×, came to 10.00× (fast), not compared: lost."
    outcomes["ours"] = "failed (killed)"
    assert "came to" not in report.verdict(outcomes, "ours", ["slow", "fast", "lost"], asked=25)


@pytest.mark.parametrize("name", list(common.STAGES))
def test_the_peers_freeze_the_parameters_that_transferkit_freezes(name: str) -> None:
    model = outline(f"torchvision/{name}")
    assert list(common.STAGES[name]) == list(model.stage_names)
    network = models.get_model(name, weights=None)
    native = {id(parameter): key for key, parameter in network.named_parameters()}
    ours = {id(parameter): key for key, parameter in model.network.named_parameters()}
    for policy in ("full", "head", "last:1", "last:2", "last:99", *(f"until:{stage}" for stage in model.stage_names)):
        frozen = policy_from_text(policy).frozen_stages(model.stage_names, 0)
        expected = {ours[id(each)] for stage in model.stages if stage.name in frozen for each in stage.parameters}
        modules = common.frozen_modules(network, name, policy)
        assert {native[id(each)] for module in modules for each in module.parameters()} == expected, policy


def benchmark(script: str, *arguments: str, expect: int = 0) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == expect, ended.stdout + ended.stderr
    return ended.stdout if expect == 0 else ended.stderr


def assert_figures(text: str, *rows: str) -> None:
    for row in rows:
        head, found = cells(text, "run"), cells(text, row)
        process, training = (float(found[head.index(name)].split()[0]) for name in ("process, s", TRAINING))
        assert process > training > 0, found


def test_a_wrong_command_line_ends_with_one_sentence() -> None:
    assert "give the folder" in benchmark("head_only.py", expect=2)
    assert "no peer 'keras'; there are tutorial," in benchmark("head_only.py", "--quick", "--peers", "keras", expect=2)


@pytest.mark.long
@pytest.mark.by_hand
@pytest.mark.timeout(1200)
def test_head_only_runs_every_peer_that_is_installed() -> None:
    pytest.importorskip("lightning", reason="needs the lightning extra")
    pytest.importorskip("transformers", reason="needs the transformers extra")
    text = benchmark("head_only.py", "--quick")
    assert_figures(text, *OURS, *PEERS)
    fastai = cells(text, "fastai")[1]
    assert fastai.startswith("not installed") or float(fastai) > 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_head_only_compares_both_ways_of_ours_with_a_peer() -> None:
    text = benchmark("head_only.py", "--quick", "--peers", "tutorial")
    assert_figures(text, *OURS, "PyTorch tutorial loop")
    assert "transferkit, views=4: asked at least 8×, came to" in text
    assert "An epoch after the first, checkpoints included: asked under 3 %" in text
    assert "commit" in text
    assert "torch" in text


@pytest.mark.long
@pytest.mark.by_hand
@pytest.mark.timeout(1200)
def test_partly_frozen_has_a_table_per_network_and_policy() -> None:
    text = benchmark("partly_frozen.py", "--quick")
    titles = ["MobileNetV2, last:1", "MobileNetV2, until:stage4", "ResNet-18, last:1", "ResNet-18, until:stage3"]
    _, *sections = text.split("\n## ")
    assert [section.splitlines()[0] for section in sections] == titles
    for section in sections:
        assert_figures(section, "transferkit", "PyTorch tutorial loop")
        assert "asked at least 3×, came to" in section


@pytest.mark.long
@pytest.mark.by_hand
@pytest.mark.timeout(1200)
def test_full_finetuning_compares_with_the_loop_tuned_by_hand_too() -> None:
    text = benchmark("full_finetuning.py", "--quick", "--peers", "tutorial")
    _, *sections = text.split("\n## ")
    assert len(sections) == 2
    for section, asked in zip(sections, ("1.8", "1.05"), strict=True):
        rows = ["transferkit", "PyTorch tutorial loop", "loop tuned by hand", "loop tuned by hand, memory kept"]
        assert_figures(section, *rows)
        assert f"asked at least {asked}×, came to" in section
        assert "asked at least 0.9×, came to" in section


@pytest.mark.long
@pytest.mark.by_hand
def test_the_time_of_a_run_is_split_into_kinds_of_work_that_add_up() -> None:
    text = benchmark("where_time_goes.py", "--quick", "--only", "head only")
    seconds = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in text.splitlines()[-11:] if "." in line}
    assert sum(seconds.values()) == pytest.approx(2 * seconds["all"], abs=0.06)
    assert seconds["plots and report"] > 0, text
    for work in ("imports", "reading pictures", "frozen pass", "training steps", "validation", "writing"):
        assert seconds[work] > 0, text


@pytest.mark.long
@pytest.mark.by_hand
def test_a_peer_that_cannot_be_imported_keeps_a_row_that_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no fastai here' >&2\nexit 1\n")
    broken.chmod(0o755)
    text = benchmark("head_only.py", "--quick", "--peers", "fastai", "--fastai-python", str(broken))
    assert cells(text, "fastai")[1] == "not installed (no fastai here)"
    assert "not compared: fastai" in text
