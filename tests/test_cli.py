"""The terminal: exit codes, one clear sentence for a mistake, and JSON that is alone on standard output."""

from __future__ import annotations

import gc
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transferkit import __version__, cli

NETWORK = ["--model", "timm/test_resnet", "--weights", "none", "--image-size", "32"]


@pytest.fixture(autouse=True)
def _restore_logging():
    root, logger = logging.getLogger(), logging.getLogger("transferkit")
    handlers, level = list(root.handlers), logger.level
    yield
    root.handlers[:] = handlers
    logger.setLevel(level)


def run(*arguments: object, expect: int = 0) -> tuple[str, str]:
    """Run a command in this process; returns standard output and standard error, or a mistake's message."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if isinstance(result.exception, cli.TransferkitError):
        assert expect == 2, result.exception
        return result.stdout, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("cli") / "run"
    stdout, _ = run("finetune", picture_folder, *NETWORK, "--epochs", 1, "--output", output)
    assert "best epoch 1" in stdout
    return output


def test_finetune_writes_model_history_and_plots(trained: Path):
    assert {each.name for each in trained.iterdir()} == {
        "model.safetensors",
        "config.json",
        "history.csv",
        "curves.png",
        "predictions.png",
        "report.html",
        "validation.csv",
    }


def test_finetune_json_has_the_promised_keys(tmp_path: Path, picture_folder: Path):
    stdout, _ = run("finetune", picture_folder, *NETWORK, "--epochs", 2, "--output", tmp_path / "run", "--json")
    result = json.loads(stdout)
    assert set(result) == {"output", "report", "classes", "best", "history", "seconds"}
    assert set(result["best"]) == {"epoch", "val_accuracy", "val_loss"}
    assert [row["epoch"] for row in result["history"]] == [1, 2]
    assert set(result["history"][0]) == {"epoch", "train_loss", "val_loss", "val_accuracy", "seconds"}
    assert result["classes"] == sorted(result["classes"])
    assert result["seconds"] > 0


def test_evaluate_agrees_with_the_best_epoch_and_predict_with_evaluate(tmp_path: Path, picture_folder: Path):
    stdout, _ = run("finetune", picture_folder, *NETWORK, "--epochs", 2, "--output", tmp_path / "run", "--json")
    best = json.loads(stdout)["best"]
    evaluation = json.loads(run("evaluate", tmp_path / "run", picture_folder / "val", "--json")[0])
    assert set(evaluation) == {"accuracy", "accuracy_interval", "loss", "ece", "count", "per_class"}
    assert evaluation["accuracy"] == best["val_accuracy"]
    assert evaluation["loss"] == pytest.approx(best["val_loss"], rel=1e-6)

    stdout, _ = run("predict", tmp_path / "run", picture_folder / "val", "--top", 2, "--json")
    predictions = json.loads(stdout)["predictions"]
    assert len(predictions) == evaluation["count"]
    assert all(set(each) == {"path", "label", "confidence", "top"} and len(each["top"]) == 2 for each in predictions)
    assert all(each["top"][0] == [each["label"], each["confidence"]] for each in predictions)
    right = sum(Path(each["path"]).parent.name == each["label"] for each in predictions)
    assert right / len(predictions) == evaluation["accuracy"]


def test_evaluate_and_predict_print_tables(trained: Path, picture_folder: Path):
    stdout, _ = run("evaluate", trained, picture_folder / "val")
    assert stdout.startswith("accuracy ")
    assert "recall" in stdout
    picture = next(each for each in sorted((picture_folder / "val").rglob("*")) if each.is_file())
    stdout, _ = run("predict", trained, picture, "--top", 2)
    assert stdout.startswith(str(picture))


def test_models_lists_names_parameters_size_and_licence():
    result = json.loads(run("models", "timm/mobilenetv2_050", "--json")[0])
    assert result["models"] == [
        {"name": "timm/mobilenetv2_050", "parameters": 1968680, "input_size": 224, "licence": "apache-2.0"}
    ]
    table, _ = run("models", "torchvision/resnet1*")
    assert "torchvision/resnet18   11.7 M" in table


def test_all_models_are_listed_at_once():
    listed = json.loads(run("models", "--json")[0])["models"]
    assert len(listed) > 1000
    assert all(each["parameters"] and each["input_size"] for each in listed)


@pytest.mark.parametrize("policy", ["head", "full", "gradual", "until:stage2", "last:1"])
def test_every_policy_trains(tmp_path: Path, picture_folder: Path, policy: str):
    output = tmp_path / "run"
    run("finetune", picture_folder, *NETWORK, "--epochs", 2, "--policy", policy, "--output", output, "--json")
    assert (output / "model.safetensors").is_file()


def one_class(folder: Path) -> Path:
    from PIL import Image

    (folder / "only").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "only" / "a.png")
    return folder


MISTAKES = {
    "unknown model": (["{data}", "--model", "resnet81"], ["resnet81", "did you mean", "resnet18"]),
    "unknown stage": (["{data}", *NETWORK, "--policy", "until:stage9"], ["stage9", "stem", "did you mean"]),
    "unknown policy": (["{data}", *NETWORK, "--policy", "heads"], ["heads", "until:STAGE", "did you mean 'head'"]),
    "missing folder": (["{data}s", *NETWORK], ["no file or folder"]),
    "no pictures": (["{tmp}/empty", *NETWORK], ["one folder per class"]),
    "one class": (["{tmp}/single", *NETWORK], ["only"]),
    "missing weights": (["{data}", "--model", "timm/test_resnet", "--weights", "{tmp}/no.pth"], ["no weights file"]),
    "weights that do not fit": (
        ["{data}", "--model", "timm/test_resnet", "--weights", "{tmp}/other.pth"],
        ["does not fit", "missing", "left over"],
    ),
    "output holds a run": (["{data}", *NETWORK, "--output", "{tmp}/used"], ["already holds a run", "--overwrite"]),
    "no epoch": (["{data}", *NETWORK, "--epochs", "0"], ["epochs", "from 1 to 1,000,000", "0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_code_2(tmp_path: Path, picture_folder: Path, mistake: str):
    import torch

    (tmp_path / "empty").mkdir()
    one_class(tmp_path / "single")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    arguments, words = MISTAKES[mistake]
    filled = [each.format(data=picture_folder, tmp=tmp_path) for each in arguments]
    if "--output" not in filled:
        filled += ["--output", str(tmp_path / "run")]
    stdout, message = run("finetune", *filled, expect=2)
    assert stdout == ""
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_evaluating_another_class_is_one_sentence(trained: Path, tmp_path: Path):
    _, message = run("evaluate", trained, one_class(tmp_path / "single"), expect=2)
    assert "only" in message
    assert "\n" not in message


def test_opening_a_folder_without_a_model_is_one_sentence(tmp_path: Path):
    _, message = run("predict", tmp_path, tmp_path, expect=2)
    assert "holds no saved model" in message


def test_the_process_exits_with_2_and_prints_no_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "transferkit", "finetune", str(tmp_path / "missing")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("transferkit: ")
    assert "Traceback" not in result.stderr


def test_leaving_at_once_still_says_everything_and_runs_what_was_registered_for_the_end():
    code = (
        "import atexit, sys; from transferkit.__main__ import run; atexit.register(print, 'last words');"
        "sys.argv = ['transferkit', '--version']; run()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines() == [__version__, "last words"]
    assert result.stderr == ""


def test_a_program_that_calls_the_command_goes_on_after_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["transferkit", "--version"])
    collector = gc.get_threshold()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    gc.set_threshold(*collector)
    assert not ended.value.code


def test_a_reader_that_stops_early_sees_no_traceback():
    command = f"{shlex.quote(sys.executable)} -m transferkit models --json | head -c 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "{"
    assert "Traceback" not in result.stderr


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from transferkit.cli import app;"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0;"
        "print([name for name in ('torch', 'timm', 'torchvision', 'matplotlib', 'sklearn') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ, check=True
    )
    assert result.stdout.strip() == "[]"


def test_version_is_printed():
    stdout, _ = run("--version")
    assert stdout.strip() == __version__


def test_stages_prints_names_parameters_and_native_modules():
    table, _ = run("stages", "resnet18", "--num-classes", "2")
    lines = table.splitlines()
    assert lines[0] == "torchvision/resnet18: 11,177,538 parameters, 224 px, 512 features"
    assert [line.split()[0] for line in lines[1:]] == ["stage", "stem", *(f"stage{n}" for n in range(1, 5)), "head"]
    assert lines[3].split() == ["stage1", "147,968", "yes", "layer1.0,", "layer1.1"]
    found = json.loads(run("stages", "timm/vit_tiny_patch16_224", "--image-size", "64", "--json")[0])
    assert [stage["name"] for stage in found["stages"]] == ["stem", *(f"stage{n}" for n in range(1, 13)), "head"]
    assert found["stages"][1] == {
        "name": "stage1",
        "parameters": 444864,
        "batch_norm": False,
        "modules": ["blocks.0"],
    }
    assert found["num_features"] == 192


def test_stages_of_an_unknown_network_is_one_sentence():
    stdout, message = run("stages", "resnet81", expect=2)
    assert stdout == ""
    assert "no torchvision or timm classifier named 'resnet81'" in message


def test_find_lr_suggests_a_rate_and_draws_it(picture_folder: Path, tmp_path: Path):
    network = ["--model", "timm/test_efficientnet", "--weights", "none", "--image-size", "32", "--policy", "full"]
    stdout, _ = run("find-lr", picture_folder, *network, "--steps", 40, "--plot", tmp_path / "lr.png", "--workers", 0)
    assert stdout.startswith("suggested lr ")
    assert (tmp_path / "lr.png").stat().st_size > 1000
    stdout, _ = run("find-lr", picture_folder, *network, "--steps", 40, "--json", "--workers", 0)
    found = json.loads(stdout)
    assert found["suggestion"] in found["lrs"]
