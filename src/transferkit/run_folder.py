"""The folder a run writes into: checked before anything is trained, kept to one run, cleared when training starts."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from transferkit.callbacks import ResumeCheckpoint
from transferkit.checkpoint import CONFIG, HISTORY, WEIGHTS, read_config, read_weights
from transferkit.exceptions import OutputError, SettingError
from transferkit.history import History
from transferkit.resume import ResumeStore

__all__ = ["BAD_IMAGES", "RunFolder"]

RESUME = "resume"
BAD_IMAGES = "bad_images.csv"
_LOCK = ".lock"


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

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Check the folder, and keep every other run out of it until the ``with`` ends, or this process does.

        Where the system cannot lock files (Windows, some network drives), nobody is kept out.

        Raises:
            OutputError: As for :meth:`check`, or another run is writing into the folder.
        """
        self.check()
        with self._locked():
            self.check()  # another may have come and gone
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            fcntl: Any = importlib.import_module("fcntl")
        except ImportError:
            yield
            return
        file = self._open_lock(fcntl)
        try:
            yield
        finally:
            with suppress(OSError):
                (self.path / _LOCK).unlink()
            file.close()

    def _open_lock(self, fcntl: Any) -> IO[str]:
        while True:
            try:
                file = (self.path / _LOCK).open("a+", encoding="utf-8")
            except OSError as error:
                raise OutputError(f"the output folder {self.path} cannot be written: {error}") from error
            try:
                # Not flock: worker processes inherit that, and may outlive a run that was killed.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                who = file.read().strip() or "another process"
                file.close()
                raise OutputError(
                    f"{who} is writing a run into {self.path}; wait for it, or choose another folder"
                ) from None
            except OSError:  # a drive without locks
                return file
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), (self.path / _LOCK).stat()):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
                    return file
            file.close()  # whoever had it has removed it meanwhile

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
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"the output folder {self.path} cannot be written: {error}") from error

    def clear(self) -> None:
        """Remove the run that is to be replaced."""
        ResumeStore(self.resume_path).clear()
        for file in (*self._present(), self.path / BAD_IMAGES):
            file.unlink(missing_ok=True)

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
