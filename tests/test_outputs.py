"""What a run has learnt is not lost: not to a callback that fails, a full disk, a wrong folder or a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from resuming import assert_equal
from transferkit import Finetuner
from transferkit.bad_pictures import save_bad_images
from transferkit.callbacks import HOOKS, Callback
from transferkit.checkpoint import load_artifact
from transferkit.cli import app
from transferkit.exceptions import CallbackError, OutputError
from transferkit.freezing import LinearProbe, ScheduledUnfreeze, TrainLast
from transferkit.history import History
from transferkit.interrupts import Interrupted
from transferkit.trainer import Trainer

TINY: dict[str, Any] = {
    "weights": None,
    "epochs": 3,
    # another pass through frozen stages at the second epoch
    "policy": ScheduledUnfreeze({0: LinearProbe(), 1: TrainLast(1)}),
    "lr": 5e-3,
    "image_size": 32,
    "batch_size": 12,
    "num_workers": 0,
    "device": "cpu",
    "progress": False,
    "checkpoint_interval": 0.0,
    "monitor": "train_loss",  # which every epoch lowers
}


def tuner_of(folder: Path | None, *callbacks: Callback, **settings: Any) -> Finetuner:
    return Finetuner("timm/test_efficientnet", **{**TINY, "output_dir": folder, "callbacks": callbacks, **settings})


def weights(tuner: Finetuner) -> dict[str, Tensor]:
    assert tuner.model is not None
    return dict(tuner.model.network.state_dict())


class Watch(Callback):
    """Keeps the weights that each epoch was validated with."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Tensor]] = []

    def on_validation_end(self, trainer: Trainer) -> None:
        self.epochs.append({key: value.clone() for key, value in trainer.model.network.state_dict().items()})


class Fail(Callback):
    """Raises an error in a hook of one epoch."""

    def __init__(self, hook: str, *, epoch: int = 1, error: BaseException | None = None) -> None:
        self.epoch, self.error = epoch, ZeroDivisionError("of yours") if error is None else error
        setattr(self, hook, self.fail)

    def fail(self, trainer: Trainer) -> None:
        if trainer.epoch == self.epoch:
            raise self.error


@pytest.fixture(scope="module")
def undisturbed(picture_folder: Path) -> tuple[Finetuner, Watch]:
    """A run that nothing happens to."""
    watch = Watch()
    tuner = tuner_of(None, watch)
    tuner.fit(picture_folder)
    losses = tuner.history["train_loss"]
    assert losses == sorted(losses, reverse=True)
    return tuner, watch


# --- a callback fails


OFTEN = ("on_train_batch_end", "on_validation_end", "on_fit_end")


@pytest.mark.parametrize(
    "hook", [pytest.param(hook, marks=[] if hook in OFTEN else pytest.mark.long) for hook in HOOKS[:-1]]
)
def test_a_callback_that_fails_costs_neither_the_best_model_nor_the_run(
    hook: str, undisturbed: tuple[Finetuner, Watch], picture_folder: Path, tmp_path: Path
) -> None:
    wanted, watch = undisturbed
    epoch = {"on_fit_start": 0, "on_fit_end": 2}.get(hook, 1)
    broken = tuner_of(tmp_path / "run", Fail(hook, epoch=epoch))
    with pytest.raises(CallbackError) as failed:
        broken.fit(picture_folder)
    message = str(failed.value)
    assert message.startswith(f"Fail.{hook} has failed (ZeroDivisionError: of yours); ")
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert "\n" not in message
    done = {"on_fit_start": 0, "on_validation_end": 2, "on_train_epoch_end": 2, "on_fit_end": 3}.get(hook, 1)
    assert len(broken.history) == done
    if done:
        assert f"the best model so far, of epoch {done}, is in {tmp_path / 'run'}; " in message
        assert "go on with resume='auto' (--resume)" in message
        best = watch.epochs[done - 1]
        assert_equal(load_artifact(tmp_path / "run").network.state_dict(), best)
        assert_equal(weights(broken), best)
        assert len(History.load_csv(tmp_path / "run" / "history.csv")) == done
    else:
        assert message.endswith("; no epoch had ended by then, so mend it and start the run again")
    mended = tuner_of(tmp_path / "run")
    mended.fit(picture_folder, resume="auto")
    assert_equal(weights(mended), weights(wanted))
    assert_equal(mended.history.to_dicts(), wanted.history.to_dicts())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["an error", "Ctrl-C twice"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_without_a_folder_the_model_has_the_best_weights_so_far(
    hook: str, error: BaseException | None, undisturbed: tuple[Finetuner, Watch], picture_folder: Path
) -> None:
    tuner = tuner_of(None, Fail(hook, epoch=2, error=error))
    with pytest.raises(CallbackError if error is None else KeyboardInterrupt) as broken_off:
        tuner.fit(picture_folder)
    done = 3 if hook == "on_validation_end" else 2
    if error is None:
        assert str(broken_off.value).endswith(f"; the best weights so far, of epoch {done}, are in the model")
    assert_equal(weights(tuner), undisturbed[1].epochs[done - 1])
    assert len(tuner.history) == done
    assert tuner.model is not None
    assert not any(module.training for module in tuner.model.modules())
    assert len(tuner.predict(picture_folder / "val" / "red")) == 6


def test_after_one_ctrl_c_the_model_has_the_best_weights_so_far(
    undisturbed: tuple[Finetuner, Watch], picture_folder: Path
) -> None:
    class Press(Callback):
        def on_train_batch_end(self, trainer: Trainer) -> None:
            if trainer.epoch == 2:
                signal.raise_signal(signal.SIGINT)

    tuner = tuner_of(None, Press())
    with pytest.raises(Interrupted):
        tuner.fit(picture_folder)
    assert_equal(weights(tuner), undisturbed[1].epochs[1])


def test_a_callback_that_fails_at_the_start_does_not_cost_the_run_that_was_to_be_replaced(
    picture_folder: Path, tmp_path: Path
) -> None:
    tuner_of(tmp_path, epochs=1).fit(picture_folder)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CallbackError, match=r"Fail\.on_fit_start has failed"):
        tuner_of(tmp_path, Fail("on_fit_start", epoch=0), overwrite=True).fit(picture_folder)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_error_shows_where_the_callback_has_failed_and_nothing_else_as_its_cause(picture_folder: Path) -> None:
    with pytest.raises(CallbackError) as failed:
        tuner_of(None, Fail("on_train_batch_end")).fit(picture_folder)
    assert failed.value.__suppress_context__
    cause = failed.value.__cause__
    assert cause is not None
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "fail"


# --- a folder that cannot be written is known before anything is read


def a_file(place: Path) -> Path:
    place.touch()
    return place


def in_a_file(place: Path) -> Path:
    return a_file(place) / "runs" / "mine"


def a_dangling_link(place: Path) -> Path:
    place.symlink_to(place / "nowhere")
    return place


def a_long_name(place: Path) -> Path:
    return place / ("x" * 300)


def a_zero_byte(place: Path) -> Path:
    return place / "a\0b"


def a_device(place: Path) -> Path:
    return Path(os.devnull)


WRONG = {
    a_file: "is no folder; choose another",
    in_a_file: "place is no folder; choose another",
    a_dangling_link: "place is no folder; choose another",
    a_long_name: "File name too long; choose another",
    a_zero_byte: "null byte",
    a_device: f"{os.devnull} is no folder; choose another",
}


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_that_cannot_be_written_is_told_before_the_data_is_looked_for(
    make: Callable[[Path], Path], resume: str | None, tmp_path: Path
) -> None:
    folder = make(tmp_path / "place")
    with pytest.raises(OutputError, match=r"^the output folder .* cannot be written: ") as told:
        tuner_of(folder).fit(tmp_path / "no such data", resume=resume)
    assert WRONG[make] in str(told.value)
    assert "\n" not in str(told.value)


def test_a_disk_that_is_full_is_told_before_the_data_is_looked_for(tmp_path: Path, small_files: Any) -> None:
    with small_files(1000), pytest.raises(OutputError, match=r"cannot be written: File too large; choose another"):
        tuner_of(tmp_path / "run").fit(tmp_path / "no such data")
    assert list((tmp_path / "run").iterdir()) == []


def test_what_lies_in_the_place_of_a_file_of_the_run_is_told(picture_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OutputError, match=r"model\.safetensors, of the run that is to be replaced, cannot be removed"):
        tuner_of(tmp_path, epochs=1, overwrite=True).fit(picture_folder)


WRITE = """
import os, sys
from pathlib import Path
from transferkit.exceptions import OutputError
from transferkit.run_folder import RunFolder

if sys.argv[2:] == ["as nobody"]:
    os.setuid(65534)
for folder in (Path(sys.argv[1]), Path(sys.argv[1], "new")):
    try:
        with RunFolder(folder).claimed():
            print("written")
    except OutputError as error:
        print(error)
"""


def mounting(*options: str) -> list[str]:
    """Return what runs a command where the folder that its first argument names is a file system of its own."""
    mount = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'mount -t tmpfs -o {",".join(options)} none "$1" && shift && exec "$@"',
        "sh",
    ]
    if not shutil.which("unshare") or subprocess.run([*mount, "/mnt", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs of their own")
    return mount


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.long
def test_a_read_only_disk_is_told(tmp_path: Path) -> None:
    done = run(*mounting("ro"), tmp_path, sys.executable, "-c", WRITE, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("the output folder ")
        assert line.endswith("cannot be written: Read-only file system; choose another")


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_else_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):  # pytest keeps its folders from others
        folder.chmod(0o755)
    done = run(sys.executable, "-c", WRITE, tmp_path, "as nobody")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("cannot be written: Permission denied; choose another") for line in lines)


# --- a disk that fills up while a run goes on


class Full(Callback):
    """Lets no file grow beyond so many bytes from a hook of the second epoch on."""

    def __init__(self, limit: Any, hook: str) -> None:
        self.limit = limit
        setattr(self, hook, self.fill)

    def fill(self, trainer: Trainer) -> None:
        if trainer.epoch == 1:
            self.limit()


class Spoil(Callback):
    """Makes the second epoch worse than the first."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        if trainer.epoch == 1:
            trainer.model.stages[-1].parameters[0].data.mul_(-50)


FILLS = {
    "the resume state": ("on_train_epoch_end", 100_000, r"the resume state cannot be written in .*: .*File too large"),
    "the best model": ("on_validation_start", 100_000, r"the model cannot be saved in .*File too large"),
    "the table": ("on_validation_start", 90, r"history\.csv cannot be written: .*File too large"),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what == "the best model" else pytest.mark.long) for what in FILLS]
)
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(
    what: str, undisturbed: tuple[Finetuner, Watch], picture_folder: Path, tmp_path: Path, small_files: Any
) -> None:
    hook, size, message = FILLS[what]
    # A best model is saved before the table; where the epoch is no better, the table is the first to be written.
    settings = {"monitor": "val_loss"} if what == "the table" else {}
    more = [Spoil()] if what == "the table" else []
    with ExitStack() as stack:
        full = Full(lambda: stack.enter_context(small_files(size)), hook)
        with pytest.raises(OutputError, match=message) as told:
            tuner_of(tmp_path / "run", full, *more, **settings).fit(picture_folder)
    assert "\n" not in str(told.value)
    saved = load_artifact(tmp_path / "run").network.state_dict()
    if not settings:
        assert_equal(saved, undisturbed[1].epochs[1 if what == "the resume state" else 0])
    assert len(History.load_csv(tmp_path / "run" / "history.csv")) == (2 if what == "the resume state" else 1)
    assert {each.name for each in (tmp_path / "run").iterdir()} == {
        "config.json",
        "history.csv",
        "model.safetensors",
        "resume",
    }
    mended = tuner_of(tmp_path / "run", **settings)
    mended.fit(picture_folder, resume="auto")
    assert len(mended.history) == 3
    if not settings:
        assert_equal(weights(mended), weights(undisturbed[0]))


def test_a_disk_too_small_for_the_first_state_is_told_before_the_first_batch(
    picture_folder: Path, tmp_path: Path, small_files: Any
) -> None:
    class Count(Callback):
        batches = 0

        def on_train_batch_end(self, trainer: Trainer) -> None:
            self.batches += 1

    count = Count()
    with small_files(10_000), pytest.raises(OutputError, match="the resume state cannot be written"):
        tuner_of(tmp_path / "run", count).fit(picture_folder)
    assert count.batches == 0


def test_a_disk_that_is_full_at_the_very_end_leaves_the_best_model_and_the_run_to_be_ended(
    undisturbed: tuple[Finetuner, Watch], picture_folder: Path, tmp_path: Path, small_files: Any
) -> None:
    class FullAtTheEnd(Callback):
        def on_fit_end(self, trainer: Trainer) -> None:
            stack.enter_context(small_files(100_000))

    with ExitStack() as stack:
        tuner = tuner_of(tmp_path / "run", FullAtTheEnd())
        with pytest.raises(OutputError, match="the model cannot be saved"):
            tuner.fit(picture_folder)
    assert_equal(weights(tuner), weights(undisturbed[0]))
    assert_equal(load_artifact(tmp_path / "run").network.state_dict(), weights(undisturbed[0]))
    ended = tuner_of(tmp_path / "run")
    assert len(ended.fit(picture_folder, resume="auto")) == 3
    assert_equal(weights(ended), weights(undisturbed[0]))


def test_lists_and_plots_that_cannot_be_written_are_told(
    undisturbed: tuple[Finetuner, Watch], tmp_path: Path, small_files: Any
) -> None:
    tuner, _ = undisturbed
    figure = tmp_path / "curves.png"
    tuner.plot_history()  # draws what matplotlib keeps in files of its own
    with small_files(100):
        with pytest.raises(OutputError, match=r"bad_images\.csv"):
            save_bad_images({f"{number}.jpg": "truncated" for number in range(99)}, tmp_path / "bad_images.csv")
        with pytest.raises(OutputError, match=r"curves\.png"):
            tuner.plot_history(figure)
        with pytest.raises(OutputError, match="the model cannot be saved"):
            tuner.save(tmp_path / "final")


SMALL_DISK = """
import sys

import torch
from transferkit import Finetuner
from transferkit.exceptions import OutputError
from transferkit.history import History

disk, data = sys.argv[1:]
torch.set_num_threads(1)
tuner = Finetuner(
    "timm/test_efficientnet", weights=None, image_size=32, epochs=3, policy="full", num_workers=0, device="cpu",
    progress=False, checkpoint_interval=0, output_dir=disk + "/run",
)
try:
    tuner.fit(data)
except OutputError as error:
    print(error)
saved = Finetuner.load(disk + "/run", device="cpu")
print(len(saved.history), len(saved.predict(data + "/val/red")))
"""


@pytest.mark.long
def test_a_small_real_disk_fills_up_and_keeps_the_best_model(picture_folder: Path, tmp_path: Path) -> None:
    """It takes the state of the beginning and the best model, but not the state of an epoch, which is larger."""
    done = run(*mounting("size=1500k"), tmp_path, sys.executable, "-c", SMALL_DISK, tmp_path, picture_folder)
    assert done.returncode == 0, done.stderr
    message, rest = done.stdout.splitlines()
    assert message.startswith(f"the resume state cannot be written in {tmp_path}/run/resume: ")
    assert "No space left on device" in message
    assert rest == "1 6"
    assert "Traceback" not in done.stderr


# --- a process that is killed while it saves

# One process without threads, so that it may fork: importing torch for each kill would take most of the time.
KILLED = """
import os, random, shutil, signal, sys, time, torch
from transferkit import Finetuner, create_model, load_artifact, save_artifact
from transferkit.history import EpochRecord, History

torch.set_num_threads(1)
folder, how, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
chance, least, seen = random.Random(0), 0, set()
tuner = Finetuner("timm/test_efficientnet", weights=None)
tuner.model = create_model("timm/test_efficientnet", weights=None, num_classes=2, image_size=32)
tuner.history = History([EpochRecord(1, 1.0, 1.0, 0.5, 1.0)])

def save(number):
    with torch.no_grad():
        for tensor in (*tuner.model.network.parameters(), *tuner.model.network.buffers()):
            tensor.fill_(number)
    tuner.save(folder) if how == "Finetuner.save" else save_artifact(tuner.model, folder, extra={"number": number})

for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            for number in range(least + 1, least + 10_000):
                save(number)
                os.write(writer, number.to_bytes(4, "big"))
        finally:
            os._exit(1)
    os.close(writer)
    if kill % 2 or not kill:  # on a busy machine some writers are killed before they have begun
        least = int.from_bytes(os.read(reader, 4), "big")
    time.sleep(chance.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    while told := os.read(reader, 4):
        least = int.from_bytes(told, "big")
    os.close(reader)
    tensors = load_artifact(folder).network.state_dict().values()
    numbers = {float(value) for tensor in tensors for value in tensor.flatten()[[0, -1]].tolist() if tensor.numel()}
    assert len(numbers) == 1, f"half of one and half of another: {numbers}"
    (number,) = numbers
    assert number in (least, least + 1), (number, least)
    least = int(number)
    seen.add(least)
    if how == "Finetuner.save":
        assert len(Finetuner.load(folder, device="cpu").history) == 1
print(len(seen))
"""


@pytest.mark.long
@pytest.mark.parametrize("how", ["Finetuner.save", "save_artifact"])
def test_a_process_that_is_killed_while_it_saves_leaves_the_old_model_or_the_new_one(how: str, tmp_path: Path) -> None:
    done = run(sys.executable, "-c", KILLED, tmp_path / "model", how, 30)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10  # different models: writers got somewhere before they were killed


# --- two runs at once


@pytest.mark.long
def test_of_two_commands_with_one_folder_the_second_ends_with_2_and_says_who_writes(
    picture_folder: Path, tmp_path: Path
) -> None:
    options = ["--model", "timm/test_efficientnet", "--weights", "none", "--image-size", "32", "--device", "cpu"]
    command = [sys.executable, "-m", "transferkit", "finetune", str(picture_folder), *options, "--workers", "0"]
    command += ["--checkpoint-interval", "0", "--output", str(tmp_path / "run")]
    with subprocess.Popen([*command, "--epochs", "100000"], stderr=subprocess.PIPE, text=True) as first:
        try:
            while not (tmp_path / "run" / "history.csv").exists():
                assert first.poll() is None, first.communicate()[1]
                time.sleep(0.05)
            for more in ([], ["--overwrite"]):
                second = run(*command, "--epochs", 1, *more)
                assert second.returncode == 2
                assert second.stdout == ""
                (line,) = second.stderr.splitlines()
                if more:
                    assert line.startswith(f"transferkit: process {first.pid} on ")
                    assert line.endswith(
                        f"is writing a run into {tmp_path / 'run'}; wait for it, or choose another folder"
                    )
                else:
                    assert "already holds a run" in line
            first.send_signal(signal.SIGINT)
            said = first.communicate(timeout=60)[1]
        finally:
            first.kill()
    assert first.returncode == 130, said
    load_artifact(tmp_path / "run")


def test_a_command_whose_output_is_a_file_ends_with_one_sentence(picture_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    result = CliRunner().invoke(app, ["finetune", str(picture_folder), "--output", str(tmp_path / "run")])
    assert isinstance(result.exception, OutputError)
    assert str(result.exception).endswith("run is no folder; choose another")
