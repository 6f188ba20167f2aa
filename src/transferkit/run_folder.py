"""The folder a run writes into: checked before anything is trained, kept to one run, cleared when training starts."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from transferkit.bad_pictures import save_bad_images
from transferkit.callbacks import Callback, ResumeCheckpoint
from transferkit.checkpoint import CONFIG, HISTORY, WEIGHTS, read_config, read_weights
from transferkit.exceptions import OutputError, SettingError
from transferkit.history import History
from transferkit.resume import ResumeStore

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

__all__ = ["BAD_IMAGES", "VALIDATION", "ClearFolder", "ListLeftOut", "RunFolder"]

RESUME = "resume"
BAD_IMAGES, VALIDATION = "bad_images.csv", "validation.csv"
_LOCK = ".lock"
_PROBE = 4096  # bytes: a full disk takes the name of a file, and nothing in it


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
        try:
            file = self._open_lock(fcntl)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            with suppress(OSError):
                (self.path / _LOCK).unlink()
            with suppress(OSError):  # what could not be written before is tried again
                file.close()

    def _open_lock(self, fcntl: Any) -> IO[str]:
        while True:
            file = (self.path / _LOCK).open("a+", encoding="utf-8", errors="replace")
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
                    with suppress(OSError):  # the lock holds all the same; a disk that is full now is told later
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            try:
                probe.write_bytes(bytes(_PROBE))
            finally:
                probe.unlink(missing_ok=True)
            present = [file.name for file in self._present()]
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
            raise self._unwritable(error) from error
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

    def _unwritable(self, error: OSError | ValueError) -> OutputError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        for place in (self.path, *self.path.parents) if isinstance(error, FileExistsError | NotADirectoryError) else ():
            if os.path.lexists(place) and not place.is_dir():
                reason = f"{place} is no folder"
        return OutputError(f"the output folder {self.path} cannot be written: {reason}; choose another")

    def clear(self) -> None:
        """Remove the run that is to be replaced.

        Raises:
            OutputError: A file of it cannot be removed.
        """
        ResumeStore(self.resume_path).clear()
        for file in (*self._present(), self.path / BAD_IMAGES, self.path / VALIDATION):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(f"{file}, of the run that is to be replaced, cannot be removed: {error}") from error

    def state(self) -> dict[str, Any] | None:
        """Return what a run goes on from.

        Returns:
            The state :class:`ResumeCheckpoint` has saved; of a run that has ended its ``"weights"``,
            ``"temperature"``, ``"history"`` and ``"identity"``; ``None`` where there is no run.

        Raises:
            ArtifactError: It is damaged.
        """
        state = ResumeCheckpoint(self.resume_path).read()
        if state is not None or not self._ended():
            return state
        return {
            "identity": self._ended(),
            "weights": read_weights(self.path),
            "temperature": read_config(self.path)["transferkit"].get("temperature", 1.0),
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


class ClearFolder(Callback):
    """Remove the run that is to be replaced, once nothing but training can fail.

    Args:
        folder: Where it is.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Store the folder; nothing is removed yet."""
        self.folder = folder

    def on_fit_start(self, trainer: Trainer) -> None:
        """Do it where the run begins."""
        if trainer.is_main_process and trainer.at_beginning:
            self.folder.clear()


class ListLeftOut(Callback):
    """Write down what could not be read, where the run begins and again when there is more of it.

    Args:
        folder: Where the run goes.
        causes: Cause by file; what is added while the run goes on is written after the epoch.
    """

    def __init__(self, folder: RunFolder, causes: Mapping[str, str]) -> None:
        """Store both; nothing is written yet."""
        self.folder, self.causes = folder, causes
        self._listed = -1  # until training begins, the folder may hold a run that is to stay

    def on_fit_start(self, trainer: Trainer) -> None:
        """Do it where the run begins."""
        self._listed = 0
        self.on_train_epoch_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Do it where there is more."""
        if trainer.is_main_process and 0 <= self._listed < len(self.causes):
            save_bad_images(self.causes, self.folder.path / BAD_IMAGES)
            self._listed = len(self.causes)

    on_exception = on_train_epoch_end
