"""Kill a training process at random instants and go on with --resume each time, until the run ends.

    python scripts/kill_test.py --data DATA --kills 50 --epochs 5 --checkpoint-every 2

What comes out must equal, to the bit, what the same run gives when it is left alone: the best weights, the last state
(weights, optimizer, callbacks) and the history, but for its seconds. After every kill the state on disk is read. Every
option that is not listed by --help goes to ``transferkit finetune``.

Imports take longer than most kills leave to a process. So this one imports everything and forks each training process,
which runs the command line and is killed by a SIGKILL, as a process of its own would be.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

import accelerate.optimizer  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import sklearn.model_selection  # noqa: F401
import timm  # noqa: F401
import torch
import torch._dynamo
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import transferkit.finetuner
import transferkit.plots  # noqa: F401
from transferkit.checkpoint import CONFIG, read_weights
from transferkit.cli import main as transferkit_main
from transferkit.exceptions import ArtifactError
from transferkit.history import History
from transferkit.resume import ResumeStore
from transferkit.run_folder import RESUME, RunFolder

POLL = 5e-4
LAST = "last-state"


class Marks(ctypes.Structure):
    """What a training process tells of itself, in memory that outlives it."""

    _fields_ = [
        ("steps", ctypes.c_longlong),
        ("saves", ctypes.c_longlong),
        ("saving", ctypes.c_int),
        ("seconds_saving", ctypes.c_double),
    ]


class Place(NamedTuple):
    """How far a run has come that is on disk: in words, and in optimizer steps."""

    text: str
    steps: int


class Run:
    """One output folder, and the processes that work on it."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder = folder
        self.arguments = ["finetune", *arguments, "--output", str(folder), "--device", "cpu", "--resume"]
        self.store = ResumeStore(folder / RESUME)
        self.log = folder.with_suffix(".log")
        self.marks: Any = multiprocessing.get_context("fork").RawValue(Marks)

    def start(self) -> ForkProcess:
        ctypes.memset(ctypes.byref(self.marks), 0, ctypes.sizeof(Marks))
        process = multiprocessing.get_context("fork").Process(target=self._train)
        process.start()
        return process

    def _train(self) -> None:
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        register_optimizer_step_post_hook(self._count)
        ResumeStore.write = self._marked(ResumeStore.write)  # type: ignore[method-assign]
        ResumeStore.clear = self._copying(ResumeStore.clear)  # type: ignore[method-assign]
        sys.argv = ["transferkit", *self.arguments]
        transferkit_main()

    def _count(self, *_: Any) -> None:
        self.marks.steps += 1

    def _marked(self, write: Any) -> Any:
        @wraps(write)
        def marked(store: ResumeStore, *content: Any, **more: Any) -> None:
            started = time.perf_counter()
            self.marks.saving = 1
            write(store, *content, **more)
            self.marks.saving = 0
            self.marks.seconds_saving += time.perf_counter() - started
            self.marks.saves += 1

        return marked

    def _copying(self, clear: Any) -> Any:
        """A run that has ended leaves no state behind; keep its last one, for it is to be compared."""

        @wraps(clear)
        def copying(store: ResumeStore) -> None:
            if store.exists():
                shutil.copytree(store.path, self.folder / LAST, dirs_exist_ok=True)
            clear(store)

        return copying

    def place(self) -> Place | None:
        """Read what is on disk, as --resume does."""
        state = RunFolder(self.folder, resume=True).state()
        if state is None:
            if (self.folder / CONFIG).exists():
                raise ArtifactError("there is a model, but no state to go on from")
            return None
        if "weights" in state:
            return Place("the run has ended", sys.maxsize)
        read_weights(self.folder) if state["history"] else None
        epochs, batch, accumulate = len(state["history"]), state["batch"], state["identity"]["accumulate"]
        steps = epochs * -(-state["batches_per_epoch"] // accumulate) + -(-batch // accumulate)
        return Place(f"epoch {epochs + 1}, batch {batch}", steps)


def wait(process: ForkProcess, reached: Callable[[], object]) -> None:
    """Wait until something is reached, or the process has ended."""
    while process.is_alive() and not reached():
        time.sleep(POLL)


def leave_alone(run: Run) -> tuple[int, float, float]:
    """Train without a kill; returns steps, the longest seconds from one to the next, and the usual ones of a save."""
    process = run.start()
    marks, steps, since, longest = run.marks, 0, None, 0.0
    while process.is_alive():
        time.sleep(POLL)
        if marks.steps != steps:
            steps, now = marks.steps, time.perf_counter()
            longest, since = max(longest, now - since if since else 0.0), now
    finish(process, run)
    return marks.steps, longest, marks.seconds_saving / marks.saves


def finish(process: ForkProcess, run: Run) -> None:
    process.join()
    if process.exitcode != 0:
        sys.exit(f"a process ended with exit code {process.exitcode}:\n{run.log.read_text()[-3000:]}")


def kill_again_and_again(run: Run, kills: int, generator: random.Random, figures: tuple[int, float, float]) -> int:
    """Kill that many processes, at instants spread over the whole run; returns how many were saving."""
    steps, longest, save = figures
    place, inside = None, 0
    for number, target in enumerate(sorted(generator.choices(range(steps + 1), k=kills)), 1):
        wanted = target - (place.steps if place else 0)
        process = run.start()
        wait(process, lambda wanted=wanted: run.marks.steps >= wanted)
        if generator.random() < 0.5:
            wait(process, lambda: run.marks.saving)
            time.sleep(generator.uniform(0, save))
        else:
            end = time.perf_counter() + generator.uniform(0, longest)
            wait(process, lambda end=end: time.perf_counter() >= end)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            finish(process, run)
        before, place = place, run.place()
        if before is not None and (place is None or place.steps < before.steps):
            raise ArtifactError(f"the state on disk was at {before}, and is at {place}")
        inside += run.marks.saving
        print(
            f"{number:3d}/{kills}  {'ended' if process.exitcode == 0 else 'killed'} after {run.marks.steps:3d} steps, "
            f"{'inside' if run.marks.saving else 'outside'} saving; on disk: {place.text if place else 'nothing yet'}",
            flush=True,
        )
    return inside


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts and lists by its place; seconds are left out, tensors are their bytes."""
    if isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if key != "seconds":
                yield from leaves(value, f"{path}/{key}")
    elif isinstance(content, Tensor):
        yield path, (content.dtype, content.shape, content.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield path, content


def outcome(folder: Path) -> dict[str, Any]:
    found = ResumeStore(folder / LAST).read()
    if found is None:
        raise ArtifactError(f"{folder} has no last state")
    parts = {
        "best weights": read_weights(folder),
        "last state": found[0],
        "frozen tensors": found[1],
        "history.csv": History.load_csv(folder / "history.csv").to_dicts(),
    }
    return dict(leaves(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help="picture folder")
    parser.add_argument("--kills", type=int, default=50, help="how many processes are killed")
    parser.add_argument("--kill-seed", type=int, default=0, help="of the instants of the kills")
    parser.add_argument("--checkpoint-every", type=int, default=2, help="steps between two states")
    own, others = parser.parse_known_args()
    arguments = [str(own.data), *others, "--checkpoint-every", str(own.checkpoint_every), "--checkpoint-interval", "0"]
    with tempfile.TemporaryDirectory() as place:
        reference, killed = (Run(Path(place) / name, arguments) for name in ("reference", "killed"))
        started = time.perf_counter()
        figures = leave_alone(reference)
        print(
            f"left alone: {figures[0]} steps, {reference.marks.saves} saves of {figures[2] * 1000:.0f} ms, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
        inside = kill_again_and_again(killed, own.kills, random.Random(own.kill_seed), figures)
        process = killed.start()
        finish(process, killed)
        wanted, got = outcome(reference.folder), outcome(killed.folder)
        different = [path for path in {**wanted, **got} if wanted.get(path) != got.get(path)]
        print(f"{own.kills} kills, {inside} inside saving, every state readable; {time.perf_counter() - started:.0f} s")
        if different:
            sys.exit(f"DIFFERENT in {len(different)} of {len(wanted)} values, {', '.join(different[:5])}")
        print(f"EQUAL to the bit in all of {len(wanted)} tensors and values")


if __name__ == "__main__":
    main()
