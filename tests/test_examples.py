"""Every example runs from its command line, on made pictures, and leaves what it promises."""

from __future__ import annotations

import ast
import re
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from transferkit import Finetuner
from transferkit.folders import list_parts

FOLDER = Path(__file__).parents[1] / "examples"
MODEL = ("model.safetensors", "config.json")
RUN = (*MODEL, "history.csv", "curves.png")
LEAVES = {
    "ants_bees_feature_extractor": (*RUN, "predictions.png"),
    "ants_bees_finetune": (*RUN, "predictions.png"),
    "cifar10_resnet18_cpu": (*RUN, "samples.png", "predictions.png"),
    "cifar10_resnet18_scheduled_unfreeze": RUN,
    "cifar10_resnet50_sgd": RUN,
    "cifar10_vgg16": (*RUN, "predictions.png"),
    "compare_backbones_cifar10": ("leaderboard.csv", "leaderboard.md"),
    "faces_vgg16_partial_freeze": (*RUN, "predictions.png"),
    "finetune_folder": (*RUN, "predictions.png"),
    "hf_trainer": MODEL,
    "inside_a_resnet": ("block.png",),
    "lightning_module": MODEL,
    "own_loop": MODEL,
    "pieces_and_trainer": MODEL,
}
SCRIPTS = sorted(FOLDER.glob("[!_]*.py"))
SAYS = {
    "cifar10_resnet18_cpu": r"  red +\d+\.\d\d%",  # every class with its probability
    "faces_vgg16_partial_freeze": "trained on 12 pictures, validated on 3",
    "inside_a_resnet": r"layer4\.1 .* [0-9.]+e-0[6-9]\n|layer4\.1 .* 0\.0e\+00\n",  # the sum is what the network gave
}


@pytest.fixture
def from_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run an example as ``python examples/NAME.py OPTIONS`` does, in an empty folder and without a network."""

    def no_network(*address: object) -> None:
        raise AssertionError(f"an example asked the network for {address}")

    def run(name: str, *options: str) -> Path:
        script = FOLDER / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *options])
        runpy.run_path(str(script), run_name="__main__")
        return tmp_path / "runs" / name

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)  # where Python looks when it starts a script
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    return run


def helper(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["an_example.py"])
    return runpy.run_path(str(FOLDER / "_pictures.py"))[name]


def test_what_every_example_leaves_is_known() -> None:
    assert sorted(LEAVES) == [script.stem for script in SCRIPTS]


def test_the_list_of_examples_is_whole() -> None:
    listed = re.findall(r"\]\((\S+)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted([*(script.name for script in SCRIPTS), "quickstart.ipynb"])


@pytest.mark.parametrize("name", LEAVES)
def test_an_example_runs_on_made_pictures(name: str, from_terminal, capsys: pytest.CaptureFixture[str]) -> None:
    folder = from_terminal(name, "--smoke")
    assert [file for file in LEAVES[name] if not (folder / file).is_file()] == []
    said = capsys.readouterr().out
    assert f"runs/{name}" in said
    assert re.search(SAYS.get(name, ""), said)
    if "model.safetensors" in LEAVES[name]:
        assert Finetuner.load(folder).model.class_names == ("blue", "green", "red")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_says_how_it_is_run_and_what_was_measured(script: Path) -> None:
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    assert f"python examples/{script.name} --data data/" in doc
    (measured,) = re.findall(r"^Measured: (.+)", doc, re.MULTILINE | re.DOTALL)
    assert re.search(r"\d\.\d", measured), measured


def test_an_example_without_pictures_says_what_to_give(from_terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        from_terminal("ants_bees_finetune")
    assert stop.value.code == 2
    assert "--data FOLDER, or try --smoke" in capsys.readouterr().err


@pytest.mark.parametrize("split", [True, False])
def test_per_class_links_the_first_pictures_of_each_class(
    split: bool, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = picture_folder if split else picture_folder / "train"
    few = list_parts(helper("first_of_each_class", monkeypatch)(folder, 4))
    assert list(few) == (["train", "val"] if split else ["all"])
    for part, listed in list_parts(folder).items():
        for name, pictures in listed.pictures.items():
            linked = [Path(picture).resolve() for picture in few[part].pictures[name]]
            assert linked == [Path(picture).resolve() for picture in pictures[:4]]
