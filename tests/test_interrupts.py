"""Ctrl-C and SIGTERM: the step is finished, the state saved, and the command line that goes on is printed."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from resuming import assert_equal
from transferkit.callbacks import Callback, ResumeCheckpoint
from transferkit.cli import app
from transferkit.data import image_folder
from transferkit.history import History
from transferkit.interrupts import EXIT_CODE, Interrupted, Interrupts
from transferkit.loading import loader
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.trainer import Trainer
from transferkit.transforms import eval_transform

# --- what happens to signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts() as interrupts:
        assert interrupts.name is None
        signal.raise_signal(number)
        assert interrupts.name == number.name
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_ends_at_once_but_not_where_a_launcher_repeats_it() -> None:
    with Interrupts():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as ended:
            signal.raise_signal(signal.SIGINT)
    assert not isinstance(ended.value, Interrupted)
    with Interrupts(patient=True) as interrupts:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    assert interrupts.name == "SIGTERM"


def test_a_sigterm_after_a_sigterm_is_only_noted() -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.name == "SIGTERM"


@pytest.fixture
def foreign() -> Iterator[list[int]]:
    """A handler for SIGTERM that the program has set itself; what it was called with."""
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    yield called
    signal.signal(signal.SIGTERM, before)


def test_a_handler_of_the_programs_own_is_left_alone(foreign: list[int]) -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.name is None
        signal.raise_signal(signal.SIGINT)
        assert interrupts.name == "SIGINT"
    assert foreign == [signal.SIGTERM]


# --- what happens to a fit

BATCHES = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3)] * 3


class Press(Callback):
    """Presses Ctrl-C so many times in the second batch."""

    def __init__(self, times: int) -> None:
        self.times, self.handlers = times, []

    def on_train_batch_start(self, trainer: Trainer) -> None:
        self.handlers.append(signal.getsignal(signal.SIGINT))
        if trainer.batch == 1:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def trainer_of(model: Any, *callbacks: Callback) -> Trainer:
    return Trainer(model, build_optimizer("sgd", param_groups(model, lr=0.01)), callbacks=callbacks, device="cpu")


def test_ctrl_c_finishes_the_step_and_saves_it(tiny_model: Any, tmp_path: Path) -> None:
    before, checkpoint = signal.getsignal(signal.SIGINT), ResumeCheckpoint(tmp_path, min_interval=3600)
    with pytest.raises(Interrupted, match=r"^interrupted after step 2 of 3 in epoch 1 of 1$"):
        trainer_of(tiny_model(), Press(1), checkpoint).fit(BATCHES, BATCHES, epochs=1)
    state = checkpoint.read()
    assert state is not None
    assert state["batch"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_a_fit_within_the_step_and_the_state_before_it_stays(
    tiny_model: Any, tmp_path: Path
) -> None:
    before, checkpoint = signal.getsignal(signal.SIGINT), ResumeCheckpoint(tmp_path, every=1)
    with pytest.raises(KeyboardInterrupt) as ended:
        trainer_of(tiny_model(), Press(2), checkpoint).fit(BATCHES, BATCHES, epochs=1)
    assert not isinstance(ended.value, Interrupted)
    state = checkpoint.read()
    assert state is not None
    assert state["batch"] == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fit_outside_the_main_thread_touches_no_handler(tiny_model: Any) -> None:
    before, press = signal.getsignal(signal.SIGINT), Press(0)
    trainer = trainer_of(tiny_model(), press)
    thread = threading.Thread(target=trainer.fit, args=(BATCHES, BATCHES), kwargs={"epochs": 1})
    thread.start()
    thread.join()
    assert len(trainer.history) == 1
    assert set(press.handlers) == {before}


# --- what happens to the command line


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_command_line_is_interrupted_and_goes_on_as_it_says(
    number: signal.Signals, picture_folder: Path, tmp_path: Path
) -> None:
    """Ctrl-C in a terminal reaches the workers too, as does a SIGTERM to the whole group."""
    words = f"finetune {picture_folder} --model timm/test_efficientnet --weights none --epochs 4 --image-size 32"
    options = ["--batch-size", "4", "--checkpoint-every", "3", "--checkpoint-interval", "0", "--device", "cpu"]
    output, path = tmp_path / "the run", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["transferkit", *words.split(), *options, "--output", str(output), "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path},
        start_new_session=True,
    )
    while not (output / "history.csv").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE, said
    assert "Traceback" not in said
    told = re.search(r"^transferkit: interrupted after step \d of 9 in epoch \d of 4; to go on:\n  (.*)\n", said, re.M)
    assert told, said
    line = shlex.split(told[1])
    assert (line[0], line.count("--resume")) == ("transferkit", 1)
    line = [*line[1:], "--workers", "0"]
    assert CliRunner().invoke(app, line).exit_code == 0
    alone = [str(tmp_path / "alone") if word == str(output) else word for word in line]
    assert CliRunner().invoke(app, alone).exit_code == 0
    assert_equal(load_file(output / "model.safetensors"), load_file(tmp_path / "alone" / "model.safetensors"))
    tables = [History.load_csv(folder / "history.csv").to_dicts() for folder in (output, tmp_path / "alone")]
    assert_equal(tables[0], tables[1])


def test_workers_are_not_of_the_group_that_a_signal_is_sent_to(picture_folder: Path) -> None:
    data = image_folder(picture_folder)
    batches = loader(
        data.val, eval_transform("imagenet", Preprocessing(32, 32)), batch_size=9, train=False, num_workers=2
    )
    assert len(list(batches)) == 2  # one of each worker
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    assert os.getpgrp() not in {os.getpgid(worker.pid or 0) for worker in workers}
