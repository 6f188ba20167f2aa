"""Ours and the peers as processes, in turn: the same pictures, weights, epochs, batch size, threads and workers."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from _report import Outcome
from PIL import Image

__all__ = [
    "Case",
    "Contestant",
    "Outcomes",
    "commit",
    "hand_out",
    "heading",
    "limit",
    "ours",
    "ours_in_bf16",
    "peers",
    "processor",
    "publish",
    "read_options",
    "run_case",
    "setting",
    "workplace",
]

HERE = Path(__file__).resolve().parent
MOBILENET = "mobilenet_v2-77326c9b.pth"
Outcomes = dict[str, list[Outcome] | str]

# name on the command line: the row's name, its script, the module without which it cannot run
PEERS = {
    "tutorial": ("PyTorch tutorial loop", "tutorial_loop.py", "torchvision"),
    "fastai": ("fastai", "fastai_learner.py", "fastai.vision.all"),
    "lightning": ("Lightning", "lightning_finetuning.py", "lightning.pytorch"),
    "hf": ("HF Trainer", "hf_trainer.py", "transformers.trainer"),
}
TURNS = """\
Everyone takes turns, one process per run and seed. Seconds: median (smallest–largest) of the whole process, imports
included, and of its own training and validation. Ratios: medians over the seeds, above 1 where it takes longer than
ours. Accuracy: best epoch, mean ± standard deviation."""
PROBE = """
import importlib, importlib.metadata, json, sys, torch
importlib.import_module(sys.argv[1])
names = "torch torchvision fastai lightning transformers accelerate".split()
versions = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
found = {name: versions[name] for name in names if name in versions}
bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
print(json.dumps({"versions": found, "cpu": torch.backends.cpu.get_cpu_capability(), "bf16": bf16}))
"""


@dataclass(frozen=True)
class Contestant:
    """A way to train.

    Attributes:
        name: Its row.
        python: Its interpreter.
        script: Its script in ``peers/``; ``None`` for transferkit's own command line.
        extra: Options of its own, which win over the case's.
        environment: Variables of its own.
        missing: Why it cannot run here, if it cannot.
    """

    name: str
    python: str = sys.executable
    script: str | None = None
    extra: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Case:
    """One table: a network, a policy, and who trains it.

    Attributes:
        title: The table's heading.
        model: A network of torchvision's that ``peers/_common.py`` knows.
        policy: What trains, as the command line writes it.
        weights: A state dict, or ``"none"``.
        contestants: In the order in which they take turns.
    """

    title: str
    model: str
    policy: str
    weights: str
    contestants: tuple[Contestant, ...]


def read_options(description: str | None, *, epochs: int, rivals: str = ",".join(PEERS)) -> argparse.Namespace:
    """Read the command line that all benchmarks share; ``--quick`` makes everything small.

    Args:
        description: Of the benchmark.
        epochs: How many by default.
        rivals: Which peers by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, nargs="?", help="folder with hymenoptera_data/ and weights/")
    parser.add_argument("--only", default="", help="part of a case's title")
    parser.add_argument("--peers", default=rivals, help=f"some of {','.join(PEERS)}, or '' for none")
    parser.add_argument("--fastai-python", default=sys.executable, help="interpreter that has fastai")
    parser.add_argument("--seeds", default="0,1,2", help="one repeat each")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=2, help="processes that read pictures for the peers")
    parser.add_argument("--output", type=Path, help="file for the report; standard output by default")
    parser.add_argument("--quick", action="store_true", help="two epochs on a few made pictures: does everything run?")
    options = parser.parse_args()
    if options.assets is None and not options.quick:
        parser.error("give the folder with hymenoptera_data/ and weights/, or --quick")
    unknown = [name for name in options.peers.split(",") if name and name not in PEERS]
    if unknown:
        parser.error(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    if options.quick:
        options.epochs, options.batch_size, options.image_size, options.seeds = 2, 4, 64, "0"
        options.threads, options.workers = 1, 0
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.mobilenet_weights = "none" if options.quick else str((options.assets / "weights" / MOBILENET).resolve())
    return options


@contextmanager
def workplace(options: argparse.Namespace) -> Iterator[Path]:
    """Yield a folder for the runs with ``pictures/`` in it, where every contestant finds the same files."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for part in ("train", "val"):
            if options.quick:
                _make_pictures(place / "pictures" / part, count=8 if part == "train" else 4)
            else:
                # Libraries differ in what they take for a picture; the set has a GIF that says "not found".
                source = options.assets / "hymenoptera_data" / part
                shutil.copytree(source, place / "pictures" / part, ignore=shutil.ignore_patterns("*.gif", ".*"))
        yield place


def _make_pictures(folder: Path, *, count: int) -> None:
    rng = np.random.default_rng(0)
    for name, colour in {"blue": (40, 60, 200), "green": (50, 180, 60)}.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noisy = np.array(colour) + rng.normal(0, 60, (80, 80, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.jpg")


@cache
def _probe(python: str, module: str) -> dict | str:
    """Return an interpreter's versions, or in words why a module cannot be imported there."""
    found = subprocess.run([python, "-c", PROBE, module], capture_output=True, text=True, check=False)
    if found.returncode == 0:
        return json.loads(found.stdout.splitlines()[-1])
    return f"not installed ({_last_line(found.stderr)})"


def _last_line(text: str) -> str:
    lines = [line.strip(" │|") for line in text.splitlines()]
    return next((line for line in reversed(lines) if any(map(str.isalnum, line))), "no message").replace("|", "/")[:160]


def ours(name: str, *extra: str) -> Contestant:
    """Return transferkit's command line with options of its own."""
    return Contestant(name, extra=extra)


def ours_in_bf16(name: str) -> Contestant:
    """Return the same in half precision; where the processor has no instructions for it, it says so."""
    answer = _probe(sys.executable, "torchvision")
    missing = None if isinstance(answer, dict) and answer["bf16"] else "this processor has no bf16 instructions"
    return Contestant(name, extra=("--precision", "bf16"), missing=missing)


def peers(options: argparse.Namespace) -> tuple[Contestant, ...]:
    """Return the peers that were asked for; one that cannot be imported says so."""
    found = []
    for name in filter(None, options.peers.split(",")):
        title, script, module = PEERS[name]
        python = options.fastai_python if name == "fastai" else sys.executable
        answer = _probe(python, module)
        found.append(Contestant(title, python, script, missing=answer if isinstance(answer, str) else None))
    return tuple(found)


def limit(name: str, **environment: str) -> Contestant:
    """Return the loop tuned by hand."""
    return Contestant(name, script="plain_loop.py", environment=environment)


def run_case(case: Case, options: argparse.Namespace, place: Path) -> Outcomes:
    """Run everyone once per seed, in turn; one that fails is not run again, and its row says why."""
    outcomes: Outcomes = {each.name: [] if each.missing is None else each.missing for each in case.contestants}
    for seed in options.seeds:
        for contestant in case.contestants:
            so_far = outcomes[contestant.name]
            if isinstance(so_far, str):
                continue
            outcome = _run(contestant, case, options, seed, place)
            print(f"{case.title}, seed {seed}, {contestant.name}: {outcome}", file=sys.stderr, flush=True)
            if isinstance(outcome, str):
                outcomes[contestant.name] = outcome
            else:
                so_far.append(outcome)
    return outcomes


def _run(contestant: Contestant, case: Case, options: argparse.Namespace, seed: int, place: Path) -> Outcome | str:
    threads = str(options.threads)
    settings = {
        "--weights": case.weights,
        "--policy": case.policy,
        "--epochs": options.epochs,
        "--batch-size": options.batch_size,
        "--image-size": options.image_size,
        "--seed": seed,
    }
    common = [str(part) for pair in settings.items() for part in pair]
    data = str(place / "pictures")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        if contestant.script is None:
            command = ["-m", "transferkit", "finetune", data, "--model", f"torchvision/{case.model}", *common]
            command += ["--device", "cpu", "--output", f"{folder}/run", "--json"]
        else:
            command = [str(HERE / "peers" / contestant.script), "--data", data, "--model", case.model, *common]
            command += ["--threads", threads, "--workers", str(options.workers)]
        started = time.perf_counter()
        ended = subprocess.run(
            [contestant.python, *command, *contestant.extra],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "", **contestant.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        process = time.perf_counter() - started
    if ended.returncode != 0:
        print(ended.stderr[-2000:], file=sys.stderr)
        return f"failed ({_last_line(ended.stderr)})"
    said = json.loads(ended.stdout.splitlines()[-1])
    if contestant.script is None:
        epochs = tuple(record["seconds"] for record in said["history"])
        return Outcome(process, sum(epochs), epochs, said["best"]["val_accuracy"], command=said["seconds"])
    return Outcome(process, said["seconds"], tuple(said["epochs_seconds"]), said["val_accuracy"])


def publish(title: str, cases: list[Case], options: argparse.Namespace, write: Callable[[Case, Outcomes], str]) -> None:
    """Run the cases and print the report; the exit status is 1 where somebody failed.

    Args:
        title: Heading of the report.
        cases: Those whose title holds ``--only`` are run.
        options: As :func:`read_options` gave them.
        write: Makes a case's part of the report.
    """
    with workplace(options) as place:
        sections, failed = [f"# {title}", setting(options, place, cases), TURNS], False
        for case in cases:
            if options.only not in case.title:
                continue
            outcomes = run_case(case, options, place)
            failed |= any(isinstance(each, str) and each.startswith("failed") for each in outcomes.values())
            sections.append(f"## {case.title}\n\n{write(case, outcomes)}")
            if options.output is not None:  # what is done stays if a later case fails
                hand_out("\n\n".join(sections) + "\n", options.output)
    if options.output is None:
        hand_out("\n\n".join(sections), None)
    sys.exit(int(failed))


def setting(options: argparse.Namespace, place: Path, cases: Sequence[Case] = ()) -> str:
    """Say when, where and with what.

    Args:
        options: As :func:`read_options` gave them.
        place: From :func:`workplace`.
        cases: Whose interpreters are named beside this one.
    """
    interpreters = {each.python for case in cases for each in case.contestants if each.missing is None}
    versions = [_versions(python) for python in (sys.executable, *(interpreters - {sys.executable}))]
    train, val = (sum(each.is_file() for each in (place / "pictures" / part).rglob("*")) for part in ("train", "val"))
    what = "Made pictures and random weights, to see that everything runs" if options.quick else "`hymenoptera_data`"
    settings = ("epochs", "batch_size", "image_size", "threads", "workers", "seeds")
    chosen = "; ".join(f"{name.replace('_', ' ')} {str(getattr(options, name)).strip('[]')}" for name in settings)
    command = shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"""{datetime.date.today()}, {os.cpu_count()} CPU cores ({processor()}), commit {commit()};
Python {platform.python_version()}, {"; fastai's interpreter: ".join(versions)}.
`python {command}`

{what}: {train} training, {val} validation pictures, one is {100 / val:.2f} points; {chosen}."""


def _versions(python: str) -> str:
    answer = _probe(python, "torchvision")
    if isinstance(answer, str):
        return answer
    return ", ".join(f"{name} {version}" for name, version in answer["versions"].items())


def processor() -> str:
    """Name the processor, and the instructions that torch uses."""
    answer = _probe(sys.executable, "torchvision")
    instructions = answer["cpu"] if isinstance(answer, dict) else "torch cannot be imported"
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {instructions}"


def heading(command: str) -> str:
    """Say when, where, of which commit and by which command a report was made that has no peers in it."""
    return f"""{datetime.date.today()}, {os.cpu_count()} CPU cores ({processor()}), Python {platform.python_version()},
commit {commit()}.
`python benchmarks/{command}`"""


def hand_out(report: str, output: Path | None) -> None:
    """Write a report into a file, or print it where there is none."""
    if output is None:
        print(report)
    else:
        output.write_text(report, encoding="utf-8")


def commit() -> str:
    """Name the commit that is checked out, and say whether anything was changed since."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(asked, cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
