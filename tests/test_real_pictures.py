"""What the library promises on real photos with real ImageNet weights, from the terminal. Needs TRANSFERKIT_ASSETS."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import mobilenet_v2
from typer.testing import CliRunner

from transferkit import cli, image_folder, loader
from transferkit.checkpoint import load_artifact
from transferkit.transforms import eval_transform

pytestmark = pytest.mark.long

WEIGHTS = {
    "torchvision/mobilenet_v2": "mobilenet_v2-77326c9b.pth",
    "torchvision/squeezenet1_1": "squeezenet1_1-a3c258a5.pth",
}


@pytest.fixture(autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def command(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def accuracies(
    assets: Path, tmp_path: Path, data: str, model: str, *options: str, seeds: tuple[int, ...] = (0, 1, 2)
) -> list[float]:
    return [
        command(
            "finetune",
            assets / data,
            *("--model", model, "--weights", assets / "weights" / WEIGHTS[model]),
            *("--epochs", 5, "--seed", seed, "--output", tmp_path / f"{'-'.join(options)}-{seed}"),
            *options,
        )["best"]["val_accuracy"]
        for seed in seeds
    ]


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("model", "seeds", "least"),
    [("torchvision/mobilenet_v2", (0, 1, 2), 0.95), ("torchvision/squeezenet1_1", (0,), 0.91)],
)
def test_ants_and_bees_by_the_head_alone(
    assets: Path, tmp_path: Path, model: str, seeds: tuple[int, ...], least: float
):
    found = accuracies(assets, tmp_path, "hymenoptera_data", model, "--policy", "head", seeds=seeds)
    assert statistics.mean(found) >= least, found


@pytest.mark.by_hand
@pytest.mark.timeout(2400)
def test_flowers_by_the_head_alone_and_by_the_default_recipe(assets: Path, tmp_path: Path):
    model = "torchvision/mobilenet_v2"
    head = accuracies(assets, tmp_path, "flowers5_small", model, "--policy", "head")
    recipe = accuracies(assets, tmp_path, "flowers5_small", model)
    assert statistics.mean(head) >= 0.80, head
    # Level within the spread of 0.02: 0.890 against 0.883 on one processor, 0.873 against 0.883 on another
    # (benchmarks/results/default_recipe.md). A picture is a point.
    assert statistics.mean(recipe) >= 0.85, recipe
    assert statistics.mean(recipe) > statistics.mean(head) - 0.03, (recipe, head)


@pytest.mark.timeout(2400)
def test_a_saved_run_evaluates_predicts_and_opens_in_torchvision_alike(assets: Path, tmp_path: Path):
    data, run = assets / "hymenoptera_data", tmp_path / "run"
    weights = assets / "weights" / WEIGHTS["torchvision/mobilenet_v2"]
    options = ("--model", "mobilenet_v2", "--weights", weights, "--policy", "head", "--epochs", 1)
    best = command("finetune", data, *options, "--output", run)["best"]

    evaluation = command("evaluate", run, data / "val")
    assert evaluation["accuracy"] == best["val_accuracy"]
    assert evaluation["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    predictions = command("predict", run, data / "val")["predictions"]
    right = [Path(each["path"]).parent.name == each["label"] for each in predictions]
    assert sum(right) / len(right) == evaluation["accuracy"]

    plain = mobilenet_v2(num_classes=2)
    plain.load_state_dict(load_file(run / "model.safetensors"), strict=True)
    ours = load_artifact(run)
    images, _ = next(
        iter(loader(image_folder(data).val, eval_transform("imagenet", ours.preprocessing), batch_size=8, train=False))
    )
    with torch.inference_mode():
        assert torch.equal(plain.eval()(images), ours(images))
