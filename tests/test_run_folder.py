"""A folder holds one run, and one run at a time writes into it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transferkit.exceptions import OutputError
from transferkit.run_folder import RunFolder

HOLD = """
import sys, time
from transferkit.run_folder import RunFolder
with RunFolder(sys.argv[1]).claimed():
    if sys.argv[2:] == ["worker"]:
        import multiprocessing
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        worker.start()
        print(worker.pid, flush=True)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start another process that claims the folder, and wait until it has."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert other.stdout is not None
    line = other.stdout.readline()
    assert line, "the other process has ended"
    return other


def test_a_second_run_is_kept_out_and_told_who_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with hold(folder) as other:
        try:
            with (
                pytest.raises(OutputError, match=rf"process {other.pid} on .* is writing a run into"),
                RunFolder(folder).claimed(),
            ):
                pytest.fail("two runs write into one folder")
        finally:
            other.kill()


def test_a_run_that_was_killed_keeps_nobody_out_though_its_workers_live_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with hold(folder, "worker") as other:
        assert other.stdout is not None
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with RunFolder(folder).claimed():
            assert (folder / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
        os.killpg(other.pid, signal.SIGKILL)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").claimed():
        assert (tmp_path / "run" / ".lock").exists()
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run").claimed():
        raise ZeroDivisionError
    assert list((tmp_path / "run").iterdir()) == []


def test_where_files_cannot_be_locked_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with RunFolder(tmp_path / "run").claimed(), RunFolder(tmp_path / "run").claimed():
        assert not (tmp_path / "run" / ".lock").exists()


def _take_turns(folder: Path, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with RunFolder(folder).claimed():
                with log.open("a") as file:
                    file.write("in\n")
                time.sleep(0.002)
                with log.open("a") as file:
                    file.write("out\n")
            return
        except OutputError:
            time.sleep(0.001)


def test_of_many_that_try_at_once_one_is_in_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_take_turns, args=(tmp_path / "run", tmp_path / "log")) for _ in range(6)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 6


def test_an_output_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), RunFolder(tmp_path / "run").claimed():
        pytest.fail("a file is no folder")
    assert (tmp_path / "run").read_text() == ""
