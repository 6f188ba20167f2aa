"""Look at every picture file once: in a few threads, and remembered until a file changes."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, fields
from pathlib import Path

from transferkit.fingerprints import PictureFacts, picture_facts

__all__ = ["facts_file", "scan_pictures"]

log = logging.getLogger("transferkit")

# Pictures between two looks at the clock: of what was found by then nothing is lost to an interrupt.
_CHUNK = 256
_COLUMNS = [each.name for each in fields(PictureFacts)][1:]  # a cause may be gone at the next look
# Its name changes with what a row means.
_TABLE = "facts_1"


def facts_file() -> Path:
    """Say where facts are remembered: in the user's cache folder, ``XDG_CACHE_HOME`` or ``~/.cache``.

    Example:
        >>> facts_file().name
        'pictures.sqlite'
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "transferkit" / "pictures.sqlite"


def scan_pictures(
    paths: Sequence[str],
    *,
    workers: int | None = None,
    remember: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> list[PictureFacts]:
    """Decode every file and say what it is; those known from an earlier scan, by their size and time, are not opened.

    Args:
        paths: The files.
        workers: Threads; one per core by default. Pillow decodes in them side by side.
        remember: Whether facts are looked up and kept in :func:`facts_file`, some 200 bytes each. Where that cannot be
            written, nothing is remembered.
        on_progress: Called with the number of files done, now and then.

    Returns:
        Facts in the order of the paths; of unreadable files the cause.

    Example:
        >>> [facts.cause for facts in scan_pictures(["/no/such/file.jpg"], remember=False)]
        ['there is no such file']
    """
    found: dict[int, PictureFacts] = {}
    with _Store(facts_file() if remember else None) as store, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(paths), _CHUNK):
            part = range(start, min(start + _CHUNK, len(paths)))
            found |= {index: facts for index in part if (facts := store.recall(paths[index])) is not None}
            new = [index for index in part if index not in found]
            # The filters belong to all threads, so none of them may change them.
            with warnings.catch_warnings(action="ignore"):
                looked_at = dict(zip(new, pool.map(picture_facts, [paths[index] for index in new]), strict=True))
            store.keep([(paths[index], facts) for index, facts in looked_at.items()])
            found |= looked_at
            if on_progress is not None:
                on_progress(len(found))
    return [found[index] for index in range(len(paths))]


class _Store:
    """Facts by a file's path, size and time; one that cannot be opened or written is empty and stays so."""

    def __init__(self, file: Path | None) -> None:
        self.connection: sqlite3.Connection | None = None
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(file, timeout=5)
            self.connection.execute(
                f"create table if not exists {_TABLE} (path blob primary key, size, time, {', '.join(_COLUMNS)})"
            )
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *error: object) -> None:
        if self.connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self.connection.close()

    def recall(self, path: str) -> PictureFacts | None:
        if self.connection is None or (key := _key(path)) is None:
            return None
        columns = ", ".join(_COLUMNS)
        try:
            row = self.connection.execute(
                f"select {columns} from {_TABLE} where path = ? and size = ? and time = ?", key
            ).fetchone()
            return None if row is None else PictureFacts(None, *row)
        except sqlite3.Error as error:
            self._give_up(error)
            return None

    def keep(self, looked_at: Sequence[tuple[str, PictureFacts]]) -> None:
        rows = [
            (*key, *astuple(facts)[1:])
            for path, facts in looked_at
            if facts.cause is None and (key := _key(path)) is not None
        ]
        if self.connection is None or not rows:
            return
        places = ", ".join("?" * len(rows[0]))
        try:
            with self.connection:
                self.connection.executemany(f"insert or replace into {_TABLE} values ({places})", rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.debug("what is known of pictures is not remembered: %s", error)
        self.__exit__()
        self.connection = None


def _key(path: str) -> tuple[bytes, int, int] | None:
    try:
        file = Path(path).stat()
    except OSError:
        return None
    return os.fsencode(Path(path).absolute()), file.st_size, file.st_mtime_ns
