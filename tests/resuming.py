"""Ways to end a run, and what runs are compared by."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transferkit.callbacks import Callback, ResumeCheckpoint
from transferkit.trainer import Trainer


class Killed(BaseException):
    """Ends a run at once."""


class Stop(Callback):
    """Ends a run, once, in a hook at an epoch and a batch: by Ctrl-C, or at once."""

    def __init__(self, hook: str, epoch: int = 0, batch: int | None = None, *, kill: bool = False) -> None:
        self.hook, self.place, self.kill, self.armed = hook, (epoch, batch), kill, True
        setattr(self, hook, self.stop)

    def __repr__(self) -> str:
        return f"Stop({self.hook!r}, {self.place[0]}, {self.place[1]}, kill={self.kill})"

    def again(self) -> Stop:
        return Stop(self.hook, *self.place, kill=self.kill)

    def stop(self, trainer: Trainer) -> None:
        epoch, batch = self.place
        if self.armed and trainer.epoch == epoch and batch in (None, trainer.batch):
            self.armed = False
            if self.kill:
                (store,) = (each.store for each in trainer.callbacks if isinstance(each, ResumeCheckpoint))
                shutil.copytree(store.path.parent, store.path.parent.with_suffix(".killed"))
                raise Killed
            signal.raise_signal(signal.SIGINT)

    def restore(self, folder: Path) -> None:
        """After a kill: put the folder back as it was at that instant, whatever has been done on the way out."""
        shutil.rmtree(folder)
        folder.with_suffix(".killed").rename(folder)


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts and lists by its place; seconds are left out, tensors are their bytes."""
    if isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if key != "seconds":
                yield from leaves(value, f"{path}/{key}")
    elif isinstance(content, Tensor):
        yield path, content.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield path, content


def assert_equal(first: Any, second: Any) -> None:
    first, second = dict(leaves(first)), dict(leaves(second))
    assert [path for path in {**first, **second} if first.get(path, path) != second.get(path, path)] == []
