"""The folder a run writes into: checked before anything is trained, cleared when training starts."""

from __future__ import annotations

import os
from pathlib import Path

from transferkit.checkpoint import CONFIG, HISTORY, WEIGHTS
from transferkit.exceptions import OutputError

__all__ = ["RunFolder"]


class RunFolder:
    """An output folder that keeps the run it holds unless told otherwise.

    Args:
        folder: Where the run goes; made by :meth:`check` if missing.
        overwrite: Whether a run that is already there may be replaced.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     run = RunFolder(Path(place) / "run")
        ...     run.check()
        ...     run.path.is_dir()
        True
    """

    def __init__(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Store the settings; nothing is touched yet."""
        self.path = Path(folder)
        self.overwrite = overwrite

    def check(self) -> None:
        """Make sure that the folder can be written and holds no run that must be kept.

        Raises:
            OutputError: It cannot, or does.
        """
        present = self._present()
        if present and not self.overwrite:
            raise OutputError(
                f"{self.path} already holds a run ({present[0].name}); choose another folder, or replace it "
                "(--overwrite)"
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
        for file in self._present():
            file.unlink()

    def _present(self) -> list[Path]:
        return [file for file in (self.path / name for name in (CONFIG, WEIGHTS, HISTORY)) if file.exists()]
