"""Damage saved models, weights files and resume states in thousands of ways, open each, and say what became of it.

    python scripts/fuzz.py                       # 20,000 files, about ten minutes on one core
    python scripts/fuzz.py --count 1000 --seed 7
    python scripts/fuzz.py --seconds 60

Each file is opened by the public loaders, in this process, and a trainer takes what a resume state holds. It must open
and give the logits (the state) of the undamaged file, or be refused by an error of transferkit in one line; within 5
seconds of processor time and 1 GiB. Two kinds may give others: a file that somebody changed who then made its checksums
anew, for it is another model or run; and foreign weights without checksums (a .safetensors file, one of torch before
1.6), in which a changed value is a value. Planted pickles make a folder when they are run: it must not be there at the
end. Prints a table, and exits with 1 if anything went wrong. Linux only, for the memory is read from /proc. The ways
are in ``_damage.py``.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from _damage import (
    Files,
    Mutation,
    appended,
    beside,
    bits,
    config,
    cut,
    header,
    linked,
    noise,
    pickled,
    planted,
    records,
    resigned,
    state,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from transferkit.callbacks import BestCheckpoint, EarlyStopping, ResumeCheckpoint, StepRecorder
from transferkit.checkpoint import CONFIG, WEIGHTS, load_artifact, save_artifact
from transferkit.create import adapt, create_model
from transferkit.exceptions import ArtifactError, TransferkitError
from transferkit.freezing import LinearProbe
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.trainer import Trainer

SECONDS, BYTES = 5.0, 2**30
MODEL, SIDE = "timm/test_efficientnet", 32
IMAGES = torch.linspace(-1, 1, 2 * 3 * SIDE * SIDE).reshape(2, 3, SIDE, SIDE)
STATE = "state.json"


class TooSlow(BaseException):
    """Not an Exception: nobody may take it for a damaged file."""


@dataclass
class Row:
    """One kind of file, one kind of damage, and what became of it."""

    kind: str
    damage: str
    files: Files
    opened: Callable[[Path], object]
    mutate: Mutation
    whole: object
    exact: bool  # whether it must give what the undamaged file gives
    loaded: int = 0
    refused: int = 0
    slowest: float = 0.0
    growth: int = 0
    wrong: list[str] = field(default_factory=list)


def logits(model: torch.nn.Module) -> bytes:
    with torch.no_grad():
        found: Tensor = model.eval()(IMAGES)
    return found.numpy().tobytes()


def open_artifact(folder: Path) -> object:
    model = load_artifact(folder)
    return logits(model), model.class_names


def open_weights(folder: Path, *, name: str) -> object:
    model = create_model(MODEL, weights=folder / name, num_classes=3, image_size=SIDE, seed=0)
    if not all(torch.isfinite(value).all() for value in model.network.state_dict().values()):
        raise AssertionError("there are values that are no finite numbers")
    return logits(model)


def open_state(folder: Path, *, trainer: Trainer) -> object:
    found = ResumeCheckpoint(folder).read()
    if found is None:
        raise ArtifactError("there is no state")
    trainer.load_state_dict(found)
    return repr(found)


def small_run(folder: Path) -> Trainer:
    """Train a small network, and keep what the run would go on from."""
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9))
    model = adapt(nn.Sequential(*layers), num_classes=3, preprocessing=Preprocessing(SIDE, SIDE))
    callbacks = [StepRecorder(), BestCheckpoint(), EarlyStopping(), ResumeCheckpoint(folder, identity={"lr": 0.1})]
    optimizer = build_optimizer("adamw", param_groups(model, lr=0.1))
    trainer = Trainer(model, optimizer, policy=LinearProbe(), callbacks=callbacks, device="cpu")
    batches = [(IMAGES, torch.tensor([0, 2]))]
    trainer.fit(batches, batches, epochs=2)
    return trainer


def rows(place: Path, canary: Path) -> Iterator[Row]:
    """Make one file of each kind, and list the ways in which it is damaged."""
    plant = partial(planted, canary=canary)
    model = create_model(MODEL, class_names=["ant", "bee", "wasp 🐝"], weights=None, image_size=SIDE, seed=0)
    run = {"best": {"epoch": 3, "val_loss": 0.5}, "settings": {"lr": 0.1}}
    folder = save_artifact(model, place / "artifact", extra=run)
    ways: dict[str, tuple[Mutation, bool]] = {
        "pickle beside": (partial(beside, canary=canary), True),
        f"`{CONFIG}`: values, fields": (partial(config, seal=False), True),
        f"`{CONFIG}`: values, fields; checksums anew": (partial(config, seal=True), False),
        f"`{WEIGHTS}`: header": (partial(header, WEIGHTS), True),
        f"`{WEIGHTS}`: header; checksums anew": (partial(resigned, mutation=partial(header, WEIGHTS)), False),
        f"`{WEIGHTS}`: bits; checksums anew": (partial(resigned, mutation=partial(bits, WEIGHTS)), False),
    }
    for name in (CONFIG, WEIGHTS):
        for way in (bits, cut, appended, noise, linked):
            ways[f"`{name}`: {way.__name__}"] = partial(way, name), True
        ways[f"`{name}`: pickle planted"] = partial(plant, name), True
    yield from subject("saved model", folder, open_artifact, ways)

    tensors = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    content = {"state_dict": tensors, "epoch": 3}
    for kind in ("safetensors", "torch", "torch before 1.6"):
        folder = place / kind
        folder.mkdir()
        name = "weights.safetensors" if kind == "safetensors" else "weights.pth"
        checked = kind == "torch"  # the records of a zip archive have checksums
        ways = {way.__name__: (partial(way, name), checked) for way in (bits, cut, appended, noise)}
        ways["pickle planted"] = partial(plant, name), True
        if kind == "safetensors":
            save_file(tensors, folder / name)
            ways["header"] = partial(header, name), False
        else:
            torch.save(content, folder / name, _use_new_zipfile_serialization=checked)
        if checked:
            ways["zip records"] = partial(records, name), True
            ways["pickle; checksums anew"] = partial(pickled, name), False
        yield from subject(f"weights, {kind}", folder, partial(open_weights, name=name), ways)

    folder = place / "resume"
    trainer = small_run(folder)
    tensors_file = next(file.name for file in folder.glob("state-*.safetensors"))
    ways = {
        "pickle beside": (partial(beside, canary=canary), True),
        f"`{STATE}`: values, fields": (partial(state, STATE, sign=False), True),
        f"`{STATE}`: values, fields; checksum anew": (partial(state, STATE, sign=True), False),
        f"`{tensors_file}`: header": (partial(header, tensors_file), True),
    }
    for name in (STATE, tensors_file):
        for way in (bits, cut, appended, linked):
            ways[f"`{name}`: {way.__name__}"] = partial(way, name), True
        ways[f"`{name}`: pickle planted"] = partial(plant, name), True
    yield from subject("resume state", folder, partial(open_state, trainer=trainer), ways)


def subject(
    kind: str, folder: Path, opened: Callable[[Path], object], ways: dict[str, tuple[Mutation, bool]]
) -> Iterator[Row]:
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    whole = opened(folder)
    for damage, (mutate, exact) in ways.items():
        yield Row(kind, damage, files, opened, mutate, whole, exact)


def write(folder: Path, files: Files) -> None:
    """Write files; see :func:`_damage.linked` for those that are none."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        place = folder / name
        if content == b"LINK":
            place.symlink_to("/etc/passwd")
        elif content == b"LOOP":
            place.symlink_to(name)
        elif content == b"PIPE":
            os.mkfifo(place)
        elif content == b"FOLDER":
            place.mkdir()
        elif content != b"NOTHING":
            place.write_bytes(content)


def attempt(row: Row, folder: Path, chance: random.Random, label: str) -> None:
    """Damage one file and open it."""
    files = dict(row.files)
    row.mutate(files, chance)
    write(folder, files)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM counts from here
    before = memory()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + BYTES, limits[1]))
    faulthandler.dump_traceback_later(60, exit=True)  # for what waits, or hears no signal
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor's time: others may be at work too
    started = time.process_time()
    try:
        found = row.opened(folder)
        row.loaded += 1
        if row.exact and found != row.whole:
            row.wrong.append(f"{label}: it opened, and is another")
    except TransferkitError as error:
        row.refused += 1
        if len(str(error).splitlines()) != 1 or len(str(error)) > 2_000:
            row.wrong.append(f"{label}: its message is no sentence: {str(error)[:300]!r}")
    except (Exception, TooSlow):
        row.wrong.append(f"{label}: {traceback.format_exc(limit=-3)}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)
    row.slowest = max(row.slowest, time.process_time() - started)
    row.growth = max(row.growth, memory()["VmHWM"] - before["VmRSS"])


def memory() -> dict[str, int]:
    """Return this process's memory in bytes: VmSize, VmRSS, and VmHWM, the largest VmRSS since that was set back."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    lines = (line.split() for line in text.splitlines() if line.startswith("Vm"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}


def table(found: list[Row]) -> str:
    names = ("file", "damage", "files", "opened", "refused", "slowest, ms", "memory, MiB")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    figures = [(f"{row.kind} | {row.damage}", row.loaded, row.refused, row.slowest, row.growth) for row in found]
    _, loaded, refused, slowest, growth = zip(*figures, strict=True)
    figures.append(("**all** |", sum(loaded), sum(refused), max(slowest), max(growth)))
    for name, opened, turned, seconds, size in figures:
        counts = f"{opened + turned:,} | {opened:,} | {turned:,}"
        lines.append(f"| {name} | {counts} | {seconds * 1e3:.0f} | {size / 2**20:.0f} |")
    return "\n".join(lines)


def too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="files to damage and open")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so many")
    options = parser.parse_args()
    logging.getLogger("transferkit").setLevel(logging.ERROR)  # what is left out of weights that are not complete
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, too_slow)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place, canary = Path(name), Path(name) / "canary"
        found = list(rows(place, canary))
        for number in range(options.count):
            if time.perf_counter() - started > options.seconds:
                break
            row = found[number % len(found)]
            chance = random.Random(f"{options.seed}/{number}")
            attempt(row, place / "damaged", chance, f"seed {options.seed}, file {number}")
        executed = canary.exists()
    seconds = time.perf_counter() - started
    wrong = [f"{row.kind}, {row.damage}, {each}" for row in found for each in row.wrong]
    print(table(found))
    print(f"\n{len(wrong)} went wrong; planted code {'RAN' if executed else 'never ran'}; {seconds:.0f} s")
    print("\n".join(wrong[:20]))
    sys.exit(bool(wrong or executed))


if __name__ == "__main__":
    main()
