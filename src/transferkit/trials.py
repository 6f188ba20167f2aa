"""One backbone of a comparison: looked at once, then trained once per seed, here or in a process of its own."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from transferkit.allocator import tune_allocator
from transferkit.backbone_facts import BackboneFacts, look_at, peak_memory
from transferkit.devices import choose_device
from transferkit.exceptions import SettingError, TransferkitError, one_line
from transferkit.finetuner import Finetuner
from transferkit.freezing import FreezePolicy
from transferkit.interrupts import EXIT_CODE
from transferkit.sources import PictureData
from transferkit.transferability import h_score, log_me

__all__ = ["Job", "Run", "Trial", "run_apart", "run_here"]

# Seconds that a process gets to stop in, once it is asked to.
_PATIENCE = 10
# Settings that have no effect, and are refused, where everything trains.
_OF_ACTIVATIONS = ("views", "cache_budget", "cache_dir")

_NOT_SENT = "the data or a setting cannot be sent to another process ({}); isolated=False compares in this one"

# SIGINT goes to all processes of a terminal; only the one that compares decides what becomes of it. And what libraries
# print is for people, not for the pipe.
_CHILD = """import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
results = os.dup(1)
os.dup2(2, 1)
from transferkit.trials import _serve
_serve(results)"""


class Run(NamedTuple):
    """One training of a backbone.

    Attributes:
        seed: Of everything that is random, but for the split.
        full: Whether everything trains, instead of what the comparison's policy says.
    """

    seed: int
    full: bool = False

    def __str__(self) -> str:
        """Say which, in words."""
        return f"seed {self.seed}" + (", everything trained" if self.full else "")


@dataclass(frozen=True)
class Job:
    """What to do with one backbone.

    Args:
        settings: Of :class:`Finetuner`, but for seed and policy.
        data: What it is trained and validated on.
        policy: What is frozen when, as for :class:`Finetuner`.
        runs: One or more.
        cache_dir: Where what frozen stages gave stays from one run to the next, unless ``settings`` say.
    """

    settings: Mapping[str, Any]
    data: PictureData
    policy: FreezePolicy | str
    runs: Sequence[Run]
    cache_dir: str | None = None

    def finetuner(self, run: Run) -> Finetuner:
        """Return what trains one of the runs; it writes nothing but activations."""
        settings = {name: value for name, value in self.settings.items() if not (run.full and name in _OF_ACTIVATIONS)}
        if isinstance(settings["backbone"], nn.Module):
            settings["backbone"] = copy.deepcopy(settings["backbone"])  # every run begins with its own weights
        tuner = Finetuner(**settings, policy="full" if run.full else self.policy, seed=run.seed, progress=False)
        with suppress(SettingError):  # it is refused where nothing will be kept
            return replace(tuner, cache_dir=tuner.cache_dir or self.cache_dir)
        return tuner


@dataclass(frozen=True)
class Trial:
    """What one run gave.

    Attributes:
        seed: As for :class:`Run`.
        full: The same.
        accuracy: Share of validation pictures that the best epoch has right, 0 to 1.
        epoch: That epoch, counted from 1.
        seconds: What the run took; the first one's include loading, the frozen pass and the scores.
        facts: What is known of the backbone.
    """

    seed: int
    full: bool
    accuracy: float
    epoch: int
    seconds: float
    facts: BackboneFacts

    @property
    def run(self) -> Run:
        """Which one it was."""
        return Run(self.seed, self.full)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Take back what :meth:`to_dict` gave.

        Args:
            values: That dictionary.

        Raises:
            TypeError: Something is missing, or there is something else.
        """
        return cls(**{**values, "facts": BackboneFacts(**values["facts"])})


def run_here(job: Job) -> Iterator[Trial | str]:
    """Do the runs of one backbone in this process.

    Args:
        job: What to do.

    Yields:
        A trial per run; where something fails, one sentence that says why, and nothing more.
    """
    return _told(job, alone=False)


def run_apart(job: Job) -> Iterator[Trial | str]:
    """Do the runs of one backbone in a process of its own: what it takes and whether it dies is that backbone's alone.

    Where the caller stops early, the process is ended.

    Args:
        job: What to do.

    Yields:
        As for :func:`run_here`.

    Raises:
        SettingError: The data or a setting cannot be sent to another process.
    """
    try:
        message = pickle.dumps(sys.path) + pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SettingError(_NOT_SENT.format(_in_a_sentence(error))) from error
    command = [sys.executable, "-c", _CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has died, which its exit code tells
                process.stdin.write(message)
                process.stdin.close()
            for line in process.stdout:
                told = json.loads(line)
                yield told if isinstance(told, str) else Trial.from_dict(told)
            code = process.wait()
        finally:
            process.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
            finally:
                process.kill()
    if code:
        yield _ended_with(code)


def _ended_with(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}, as happens when memory runs out"
    return f"its process ended with exit code {code}; what it said is on standard error"


def _serve(results: int) -> None:
    """Be the process of :func:`run_apart`: a job comes on standard input, a JSON line per run goes to ``results``."""
    tune_allocator()
    try:
        with os.fdopen(results, "w", encoding="utf-8") as lines:
            for told in _received():
                print(json.dumps(told if isinstance(told, str) else told.to_dict()), file=lines, flush=True)
    except KeyboardInterrupt:
        sys.exit(EXIT_CODE)


def _received() -> Iterator[Trial | str]:
    sys.path[:] = pickle.load(sys.stdin.buffer)  # both are from the caller, whose own classes they may need
    try:
        job = pickle.load(sys.stdin.buffer)
    except Exception as error:  # of classes that are defined in a notebook, for example
        return iter([_NOT_SENT.format(_in_a_sentence(error))])
    return _told(job, alone=True)


def _told(job: Job, *, alone: bool) -> Iterator[Trial | str]:
    try:
        yield from _trials(job, alone=alone)
    except TransferkitError as error:
        yield str(error)
    except Exception as error:  # of torch, timm or Python: the other backbones are to be compared all the same
        yield _in_a_sentence(error)


def _in_a_sentence(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}").rstrip(": ")


def _trials(job: Job, *, alone: bool) -> Iterator[Trial]:
    started = time.perf_counter()
    device = choose_device(job.settings.get("device"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    look = look_at(job.finetuner(job.runs[0]), job.data)
    facts: BackboneFacts | None = None
    for run in job.runs:
        tuner = job.finetuner(run)
        with _errors_only():  # the look has given the warnings already
            best = tuner.fit(job.data).best(tuner.monitor)
        if facts is None:
            facts = BackboneFacts(
                **look.facts,
                # before the scores, which training does not need
                peak_memory=peak_memory(device) if alone or device.type == "cuda" else None,
                log_me=log_me(look.features, look.labels),
                h_score=h_score(look.features, look.labels, regularised=True),
            )
        seconds = time.perf_counter() - started
        yield Trial(run.seed, run.full, best.val_accuracy, best.epoch, seconds, facts)
        started = time.perf_counter()


@contextmanager
def _errors_only() -> Iterator[None]:
    logger = logging.getLogger("transferkit")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
