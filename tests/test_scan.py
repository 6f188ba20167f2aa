"""Every file is looked at once, and again only when it has changed."""

from __future__ import annotations

import os
import sqlite3
import warnings
from pathlib import Path

import pytest
from PIL import Image

from transferkit import scan
from transferkit.fingerprints import PictureFacts, picture_facts
from transferkit.scan import facts_file, scan_pictures


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return facts_file()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.png" for number in range(600)]
    for number, path in enumerate(paths):
        Image.new("L", (number % 90 + 1, 5), number % 256).save(path)
    return list(map(str, paths))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are looked at."""
    names: list[str] = []

    def noted(path: str) -> PictureFacts:
        names.append(path)
        return picture_facts(path)

    monkeypatch.setattr(scan, "picture_facts", noted)
    return names


def test_facts_come_in_the_order_of_the_paths(cache: Path, files: list[str]) -> None:
    facts = scan_pictures(files, workers=3)
    assert [each.width for each in facts] == [number % 90 + 1 for number in range(600)]
    assert facts == [picture_facts(path) for path in files]


def test_a_file_is_looked_at_again_only_when_it_has_changed(cache: Path, files: list[str], opened: list[str]) -> None:
    first = scan_pictures(files)
    assert sorted(opened) == sorted(files)
    opened.clear()
    assert scan_pictures(files) == first
    assert opened == []
    Image.new("L", (100, 7)).save(files[3])
    os.utime(files[5], ns=(1, 1))
    changed = scan_pictures(files)
    assert sorted(opened) == sorted([files[3], files[5]])
    assert (changed[3].width, changed[3].height) == (100, 7)
    assert changed[5] == first[5]


def test_without_remembering_nothing_is_written(cache: Path, files: list[str], opened: list[str]) -> None:
    scan_pictures(files[:5], remember=False)
    scan_pictures(files[:5], remember=False)
    assert len(opened) == 10
    assert not cache.exists()


def test_what_cannot_be_read_is_looked_at_again(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"no picture")
    assert scan_pictures([str(path)])[0].cause
    before = path.stat()
    Image.new("L", (4, 2)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert scan_pictures([str(path)])[0].cause is None


@pytest.mark.parametrize("spoil", ["folder", "damaged", "file in the way", "other table"])
def test_a_cache_that_cannot_be_used_is_done_without(cache: Path, files: list[str], spoil: str) -> None:
    expected = [picture_facts(path) for path in files]
    if spoil == "file in the way":
        cache.parent.parent.write_text("")
    else:
        cache.parent.mkdir(parents=True)
        if spoil == "folder":
            cache.mkdir()
        elif spoil == "damaged":
            cache.write_bytes(b"this is no data base" * 100)
        else:
            with sqlite3.connect(cache) as connection:
                connection.execute("create table facts_1 (something)")
    assert scan_pictures(files) == expected
    assert scan_pictures(files) == expected


def test_progress_counts_to_the_end(cache: Path, files: list[str]) -> None:
    done: list[int] = []
    scan_pictures(files, on_progress=done.append)
    assert done == sorted(done)
    assert done[-1] == len(files)


def test_what_was_found_before_an_interrupt_is_kept(cache: Path, files: list[str], opened: list[str]) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_pictures(files, on_progress=interrupt)
    kept = len(opened)
    assert 0 < kept < len(files)
    scan_pictures(files)
    assert len(opened) == len(files)


def test_names_that_are_no_text_are_remembered_too(cache: Path, tmp_path: Path, opened: list[str]) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")
    Image.new("L", (4, 2)).save(path)
    assert [scan_pictures([path])[0].width for _ in range(2)] == [4, 4]
    assert opened == [path]


def test_threads_leave_the_warning_filters_alone(cache: Path, files: list[str]) -> None:
    before = list(warnings.filters)
    scan_pictures(files, workers=8)
    assert warnings.filters == before


def test_no_files_no_facts(cache: Path) -> None:
    assert scan_pictures([]) == []
