"""The folder a run writes into: checked before anything is trained, cleared when training starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transferkit.callbacks import ResumeCheckpoint
from transferkit.checkpoint import CONFIG, HISTORY, WEIGHTS, read_config, read_weights
from transferkit.exceptions import OutputError, SettingError
from transferkit.history import History
from transferkit.resume import ResumeStore

__all__ = ["RunFolder"]

RESUME = "resume"


class RunFolder:
    """An output folder that keeps the run it holds unless told otherwise.

    Args:
        folder: Where the run goes; made by :meth:`check` if missing.
        overwrite: Whether a run that is already there may be replaced.
        resume: Whether a run that is already there is gone on with.

    Raises:
        SettingError: It cannot be both.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     run = RunFolder(Path(place) / "run")
        ...     run.check()
        ...     run.path.is_dir()
        True
    """

    def __init__(self, folder: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
        """Store the settings; nothing is touched yet."""
        if overwrite and resume:
            raise SettingError(
                "resume goes on with the run that is there and overwrite replaces it; choose one of them"
            )
        self.path = Path(folder)
        self.overwrite, self.resume = overwrite, resume
        self.resume_path = self.path / RESUME

    def check(self) -> None:
        """Make sure that the folder can be written and holds no run that must be kept.

        Raises:
            OutputError: It cannot, or does.
        """
        present = [file.name for file in self._present()]
        resumable = ResumeStore(self.resume_path).exists()
        if self.resume and present and not resumable and not self._ended():
            raise OutputError(
                f"{self.path} holds a run ({present[0]}) but no state to go on from; choose another folder, or replace "
                "it (--overwrite)"
            )
        if (present or resumable) and not (self.overwrite or self.resume):
            raise OutputError(
                f"{self.path} already holds a run ({(present or [RESUME])[0]}); choose another folder, go on with it "
                "(--resume), or replace it (--overwrite)"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputError(f"the output folder {self.path} cannot be written: {error}") from error

    def clear(self) -> None:
        """Remove the run that is to be replaced."""
        ResumeStore(self.resume_path).clear()
        for file in self._present():
            file.unlink()

    def state(self) -> dict[str, Any] | None:
        """Return what a run goes on from.

        Returns:
            The state :class:`ResumeCheckpoint` has saved; of a run that has ended its ``"weights"``, ``"history"`` and
            ``"identity"``; ``None`` where there is no run.

        Raises:
            ArtifactError: It is damaged.
        """
        state = ResumeCheckpoint(self.resume_path).read()
        if state is not None or not self._ended():
            return state
        return {
            "identity": self._ended(),
            "weights": read_weights(self.path),
            "history": History.load_csv(self.path / HISTORY),
        }

    def _ended(self) -> dict[str, Any] | None:
        """Return the identity of a run that has ended."""
        if not (self.path / CONFIG).exists():
            return None
        identity = read_config(self.path).get("run", {}).get("identity")
        return identity if isinstance(identity, dict) else None

    def _present(self) -> list[Path]:
        return [file for file in (self.path / name for name in (CONFIG, WEIGHTS, HISTORY)) if file.exists()]
