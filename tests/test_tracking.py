"""What trackers were told is read back from their own files, and equals what the run did."""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from typer.testing import CliRunner

from transferkit import cli
from transferkit.callbacks import BestCheckpoint, Callback, LRScheduler, Tracker
from transferkit.exceptions import CallbackError, SettingError
from transferkit.finetuner import Finetuner
from transferkit.freezing import FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.interrupts import Interrupted
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.schedules import Cosine
from transferkit.trainer import Trainer

FIGURES = ("train_loss", "val_loss", "val_accuracy", "seconds")
NETWORK = {"weights": None, "image_size": 32, "num_workers": 0, "device": "cpu", "progress": False}

Make = Callable[..., TransferModel]
Told = dict[str, dict[int, float]]


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def trainer_of(model: TransferModel, *callbacks: Callback, **settings: Any) -> Trainer:
    groups = param_groups(model, lr=0.01, layer_decay=0.5)
    return Trainer(
        model,
        build_optimizer("sgd", groups[::-1]),
        callbacks=[LRScheduler(Cosine()), *callbacks],
        device="cpu",
        **settings,
    )


def fitted(model: TransferModel, *callbacks: Callback, epochs: int = 3, **settings: Any) -> Trainer:
    trainer = trainer_of(model, *callbacks, **settings)
    trainer.fit(batches(4, 4), batches(4), epochs=epochs)
    return trainer


def by_epoch(trainer: Trainer, name: str) -> dict[int, float]:
    return dict(enumerate(trainer.history[name], start=1))


class Rates(Callback):
    """Keeps the rates of the stages that trained, as they were in each epoch's last step."""

    def __init__(self) -> None:
        self.told: Told = {}

    def on_validation_start(self, trainer: Trainer) -> None:
        for group in trainer.optimizer.param_groups:
            if group["stage"] not in trainer.model.frozen:
                self.told.setdefault(f"lr/{group['stage']}", {})[trainer.epoch + 1] = group["lr"]


class Stop(Callback):
    """Ends a run by an error where its second epoch has ended."""

    def __init__(self, error: type[BaseException] = ZeroDivisionError) -> None:
        self.error = error

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        if len(trainer.history) == 2:
            raise self.error("enough")


# Readers


def in_tensorboard(folder: Path) -> Told:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def in_wandb(folder: Path) -> tuple[Told, dict[str, Any], int]:
    """Return the history, the config and the exit code in the only ``.wandb`` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    records: list[Any] = []
    deadline = time.monotonic() + 30
    while not (records and records[-1].HasField("exit")):  # a process of its own writes it
        assert time.monotonic() < deadline
        time.sleep(0.01)
        records = [Record.FromString(data) for data in log_records(file.read_bytes())]
    told: Told = {}
    for record in records:
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name in [name for name in row if not name.startswith("_")]:
            told.setdefault(name, {})[row["_step"]] = row[name]
    config = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    return told, config, records[-1].exit.exit_code


def log_records(data: bytes) -> Iterator[bytes]:
    """Read LevelDB's log format: blocks of 32 KiB, of records with checksum, length and kind."""
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def in_mlflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Told, Any]]:
    """Return the metrics of each run of the project, newest first, and the run."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("transferkit")
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        found.append(({name: {each.step: each.value for each in values} for name, values in histories.items()}, run))
    return found


def test_the_log_reader_joins_records_that_blocks_divide() -> None:
    def record(kind: int, content: bytes) -> bytes:
        return struct.pack("<IHB", 0, len(content), kind) + content

    filled = 32768 - 7 - 7 - 10
    data = b":W&B\xe1\xbe\x00" + record(1, b"a" * (filled - 7)) + record(2, b"b" * 10)
    data += record(4, b"c") + record(1, b"d")
    assert list(log_records(data)) == [b"a" * (filled - 7), b"b" * 10 + b"c", b"d"]


# What is told


def test_tensorboard_holds_the_history_and_the_rates_of_what_trained(tiny_model: Make, tmp_path: Path) -> None:
    rates, best = Rates(), BestCheckpoint()
    policy = ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()})
    trainer = fitted(tiny_model(), best, rates, Tracker("tensorboard", tmp_path), policy=policy)
    expected = {name: by_epoch(trainer, name) for name in FIGURES} | rates.told
    expected |= {f"best/{name}": {3: value} for name, value in best.best.to_dict().items()}
    in_float32 = {
        name: {step: float(np.float32(value)) for step, value in told.items()} for name, told in expected.items()
    }
    assert in_tensorboard(tmp_path) == in_float32
    assert list(rates.told["lr/head"]) == [1, 2, 3]
    assert list(rates.told["lr/stem"]) == [3]


def test_tensorboard_holds_the_hyperparameters(tiny_model: Make, tmp_path: Path) -> None:
    fitted(tiny_model(), Tracker("tensorboard", tmp_path))
    (file,) = tmp_path.glob("tensorboard/*/events*")
    plugin = EventAccumulator(str(file)).Reload().SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"timm/test_efficientnet" in plugin
    assert b"FullFinetune()" in plugin


def test_a_wandb_file_holds_the_history_the_settings_and_the_best(tiny_model: Make, tmp_path: Path) -> None:
    rates, best = Rates(), BestCheckpoint()
    tracker = Tracker("wandb", tmp_path, mode="offline", settings={"x_disable_stats": True})
    trainer = fitted(tiny_model(), best, rates, tracker)
    told, config, code = in_wandb(tmp_path)
    expected = {name: by_epoch(trainer, name) for name in FIGURES} | rates.told
    assert told == expected | {f"best/{name}": {3: value} for name, value in best.best.to_dict().items()}
    assert code == 0
    assert config["backbone"] == "timm/test_efficientnet"
    assert config["epochs"] == 3
    assert config["weights"] is None


def test_an_mlflow_folder_holds_the_history_the_settings_and_the_best(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, best = Rates(), BestCheckpoint()
    trainer = fitted(tiny_model(), best, rates, Tracker("mlflow", tmp_path / "100 % bees"))
    assert not mlflow.is_tracking_uri_set()
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ
    ((told, run),) = in_mlflow(tmp_path / "100 % bees", monkeypatch)
    expected = {name: by_epoch(trainer, name) for name in FIGURES} | rates.told
    assert told == expected | {f"best/{name}": {3: value} for name, value in best.best.to_dict().items()}
    assert run.info.status == "FINISHED"
    assert run.data.params["backbone"] == "timm/test_efficientnet"
    assert run.data.params["weights"] == "None"


class Listener(GeneralTracker):
    """A tracker of the user's own."""

    name = "listener"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.heard

    def start(self) -> None:
        self.heard.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.heard.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.heard.append((step, values))

    def finish(self) -> None:
        self.heard.append("finish")


def test_a_tracker_of_ones_own_hears_the_same(tiny_model: Make) -> None:
    listener = Listener()
    trainer = fitted(tiny_model(), Tracker(listener), epochs=1)
    first, hyperparameters, (step, figures), last = listener.heard
    assert (first, last, step) == ("start", "finish", 1)
    assert {name: figures[name] for name in FIGURES} == {name: trainer.history[name][0] for name in FIGURES}
    assert all(isinstance(value, str | int | float | bool | None) for value in hyperparameters.values())
    assert hyperparameters["classes"] == 3


def test_a_finetuners_settings_are_hyperparameters(picture_folder: Path, tmp_path: Path) -> None:
    listener = Listener()
    settings = {"policy": "head", "batch_size": 8, "epochs": 1, "class_weights": [1.0, 2.0, 3.0]}
    tuner = Finetuner(
        "timm/test_efficientnet", **NETWORK, **settings, output_dir=tmp_path / "run", callbacks=[Tracker(listener)]
    )
    tuner.fit(picture_folder)
    told = listener.heard[1]
    assert told["batch_size"] == 8
    assert told["policy"] == "LinearProbe()"
    assert told["class_weights"] == "[1.0, 2.0, 3.0]"
    assert told["lr"] == tuner.recipe.lr
    assert told["train_preset"] == tuner.recipe.train_preset
    assert not {"output_dir", "callbacks", "overwrite"} & set(told)


def test_files_go_into_the_runs_folder_unless_told_otherwise(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fitted(tiny_model(), Tracker("tensorboard"), epochs=1)
    fitted(tiny_model(), BestCheckpoint("run"), Tracker("tensorboard"), epochs=1)
    fitted(tiny_model(), BestCheckpoint("run"), Tracker("tensorboard", "other"), epochs=1)
    folders = [each.relative_to(tmp_path).as_posix() for each in tmp_path.rglob("tensorboard")]
    assert sorted(folders) == ["other/tensorboard", "run/tensorboard", "tensorboard"]


def test_mlflow_writes_where_its_environment_says(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "shared" / "mlruns").as_uri())
    fitted(tiny_model(), Tracker("mlflow", tmp_path / "run"), epochs=2)
    assert not (tmp_path / "run").exists()
    ((told, _),) = in_mlflow(tmp_path / "shared", monkeypatch)
    assert list(told["val_loss"]) == [1, 2]
    assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"]


def test_only_the_main_process_logs(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_main_process", False)
    listener = Listener()
    fitted(tiny_model(), Tracker(listener), Tracker("tensorboard", tmp_path), epochs=1)
    assert listener.heard == []
    assert list(tmp_path.iterdir()) == []


# Runs that break off, and go on


def test_an_error_leaves_what_was_logged_in_tensorboard(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(CallbackError):
        fitted(tiny_model(), Tracker("tensorboard", tmp_path), Stop())
    assert list(in_tensorboard(tmp_path)["val_loss"]) == [1, 2]


def test_an_error_is_a_failed_run_in_mlflow(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CallbackError):
        fitted(tiny_model(), Tracker("mlflow", tmp_path), Stop())
    assert mlflow.active_run() is None
    assert not mlflow.is_tracking_uri_set()
    ((told, run),) = in_mlflow(tmp_path, monkeypatch)
    assert list(told["val_loss"]) == [1, 2]
    assert run.info.status == "FAILED"


def test_an_interrupt_is_a_failed_run_in_wandb(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fitted(tiny_model(), Tracker("wandb", tmp_path, settings={"x_disable_stats": True}), Stop(Interrupted))
    told, _, code = in_wandb(tmp_path)
    assert list(told["val_loss"]) == [1, 2]
    assert code == 1


def test_a_tracker_that_cannot_start_leaves_nothing_behind(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(CallbackError, match=r"Tracker.on_fit_start has failed \(.*colour"):
        fitted(tiny_model(), Tracker("mlflow", tmp_path, colour="red"))
    assert not mlflow.is_tracking_uri_set()
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ


def resumed(model: Make, name: str, folder: Path) -> tuple[Trainer, Trainer]:
    """Break a run off where its second epoch has ended, and go on in another process's place."""
    first = trainer_of(model(), Tracker(name, folder), Stop())
    with pytest.raises(CallbackError):
        first.fit(batches(4, 4), batches(4), epochs=3)
    second = trainer_of(model(), Tracker(name, folder))
    second.load_state_dict(first.state_dict())
    second.fit(batches(4, 4), batches(4), epochs=3)
    return first, second


def test_a_run_goes_on_in_tensorboard(tiny_model: Make, tmp_path: Path) -> None:
    _, second = resumed(tiny_model, "tensorboard", tmp_path)
    told = in_tensorboard(tmp_path)
    assert list(told["lr/head"]) == [1, 2, 3]
    assert list(told["val_loss"].values()) == pytest.approx(second.history["val_loss"], rel=1e-6)


def test_a_run_that_goes_on_is_a_new_one_in_mlflow_with_all_epochs(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second = resumed(tiny_model, "mlflow", tmp_path)
    (told, run), (broken_off, _) = in_mlflow(tmp_path, monkeypatch)
    assert run.info.status == "FINISHED"
    assert {name: told[name] for name in FIGURES} == {name: by_epoch(second, name) for name in FIGURES}
    assert list(told["lr/head"]) == [3]
    assert list(broken_off["val_loss"]) == [1, 2]


def test_tensorboard_shows_nothing_of_the_run_that_was_replaced(tiny_model: Make, tmp_path: Path) -> None:
    fitted(tiny_model(), Tracker("tensorboard", tmp_path), epochs=3)
    replacing = fitted(tiny_model(seed=1), Tracker("tensorboard", tmp_path), epochs=2)
    told = in_tensorboard(tmp_path)
    assert list(told["val_loss"]) == [1, 2]
    assert list(told["val_loss"].values()) == pytest.approx(replacing.history["val_loss"], rel=1e-6)


# Mistakes


def test_an_unknown_tracker_is_told_with_those_that_exist() -> None:
    with pytest.raises(SettingError, match=r"no tracker 'wanddb'; there are aim, .*wandb — did you mean 'wandb'"):
        Tracker("wanddb")


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", r"'transferkit\[wandb\]'"), ("mlflow", r"'transferkit\[mlflow\]'"), ("aim", "aim")]
)
def test_a_package_that_is_missing_is_told_at_once_with_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        SettingError, match=rf"the tracker {name} is not installed; install it with pip install {package}$"
    ):
        Tracker(name)


def test_a_folder_that_is_called_like_a_tracker_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clearml").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("clearml").__file__ is None
    with pytest.raises(SettingError, match="pip install clearml"):
        Tracker("clearml")


def test_settings_go_with_a_name() -> None:
    with pytest.raises(SettingError, match="set up your tracker with them"):
        Tracker(Listener(), mode="offline")


# The terminal

FINETUNE = ["--model", "timm/test_resnet", "--weights", "none", "--image-size", "32", "--policy", "head"]


def test_the_terminal_tracks_with_several_trackers_at_once(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = ["--track", "tensorboard", "--track", "mlflow", "--track", "wandb", "--track", "wandb"]
    rest = ["--epochs", "2", "--device", "cpu", "--output", str(tmp_path / "run"), "--json", *trackers]
    result = CliRunner().invoke(cli.app, ["finetune", str(picture_folder), *FINETUNE, *rest])
    assert result.exit_code == 0, result.output
    history = {row["epoch"]: row["val_loss"] for row in json.loads(result.stdout)["history"]}
    assert in_tensorboard(tmp_path / "run")["val_loss"] == pytest.approx(history, rel=1e-6)
    ((told, _),) = in_mlflow(tmp_path / "run", monkeypatch)
    assert told["val_loss"] == history
    assert in_wandb(tmp_path / "run")[0]["val_loss"] == history


def test_the_terminal_refuses_a_tracker_before_it_looks_at_pictures(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.app, ["finetune", str(tmp_path / "missing"), "--track", "mlflo", "--output", str(tmp_path / "run")]
    )
    assert isinstance(result.exception, SettingError)
    assert "did you mean 'mlflow'" in str(result.exception)
    assert not (tmp_path / "run").exists()
