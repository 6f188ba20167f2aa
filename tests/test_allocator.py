"""The C library keeps memory when it is told to, and only then."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from transferkit.allocator import tune_allocator

# Pages that the system has to hand out when 64 MB are taken and given back twenty times, once the heap has settled.
FAULTS = """
import resource, sys
import torch
from transferkit.allocator import tune_allocator
if "tuned" in sys.argv:
    assert tune_allocator() is True
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

with_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def faults(*arguments: str) -> int:
    command = [sys.executable, "-c", FAULTS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@with_glibc
def test_memory_is_kept_once_it_is_told_so() -> None:
    pages = 20 * 2**26 // resource.getpagesize()
    assert faults() > 0.9 * pages
    assert faults("tuned") < 0.5 * pages


@pytest.fixture(autouse=True)
def own_collector() -> Iterator[None]:
    """Leave Python's collector to the other tests as it was."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_the_collector_looks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: NoGlibc())
    tune_allocator()
    assert gc.get_threshold()[0] == 50_000
    assert gc.isenabled()


class NoGlibc:
    """A C library that lacks what a name of glibc's would find."""


class OldGlibc:
    """It takes no threshold for mmap above 32 MiB."""

    gnu_get_libc_version = None

    def __init__(self) -> None:
        self.taken: dict[int, int] = {}

    def mallopt(self, name: int, value: int) -> int:
        if name == -3 and value > 2**25:
            return 0
        self.taken[name] = value
        return 1


def test_without_glibc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: NoGlibc())
    assert tune_allocator() is False


@pytest.mark.parametrize("error", [TypeError, OSError])
def test_without_a_c_library_to_open_it_says_so(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def refuse(name: object) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert tune_allocator() is False


def test_an_older_glibc_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    library = OldGlibc()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert tune_allocator() is True
    assert library.taken == {-1: 2**31 - 1, -2: 2**27, -3: 2**25}
