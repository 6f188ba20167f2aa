"""Where does a run's time go? Shares of decoding, frozen pass, training steps, validation, writing, plots and report.

    python benchmarks/where_time_goes.py ASSETS [--epochs 10] [--output FILE]
    python benchmarks/where_time_goes.py --quick         made pictures: does everything run?

The whole command runs in a process of its own. What it calls for each kind of work is timed there, less what it calls
that has a row of its own. Pictures are read in threads of the process that trains, so that reading counts too; in
worker processes it costs as much, beside the rest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from _report import markdown_table
from _runs import hand_out, read_options, setting, workplace

# Row: what does this work, as module:object.
WORK = {
    "reading pictures": ["transferkit.reading:TransformedDataset.__getitems__"],
    "frozen pass": ["transferkit.frozen_pass:FrozenPass._shared"],
    "training steps": ["transferkit.gradients:Gradients.add", "transferkit.trainer:Trainer._optimizer_step"],
    "validation": ["transferkit.trainer:Trainer._collect"],
    "writing": [
        "transferkit.checkpoint:save_artifact",
        "transferkit.resume:ResumeStore.write",
        "transferkit.history:History.save_csv",
    ],
    "plots and report": [
        "transferkit.finetuner:Finetuner.plot_history",
        "transferkit.finetuner:Finetuner.plot_predictions",
        "transferkit.report:write_report",
    ],
}
IMPORTS, REST = "imports", "all else: the network, the plan, the loop"
CASES = {"head only": "head", "last stage and head": "last:1", "everything": "full"}


class Clock:
    """Adds up what passes between two changes of what is being done."""

    def __init__(self) -> None:
        """Start, with the imports."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.doing = [IMPORTS]
        self.since = time.perf_counter()

    def turn(self) -> None:
        """Give the time since the last change to what was done in it."""
        now = time.perf_counter()
        self.seconds[self.doing[-1]] += now - self.since
        self.since = now

    def timed(self, work: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts as this work, until it calls another such function."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            self.turn()
            self.doing.append(work)
            try:
                return function(*arguments, **options)
            finally:
                self.turn()
                self.doing.pop()

        return run


def watch(clock: Clock) -> None:
    for work, places in WORK.items():
        for place in places:
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            original = getattr(owner, name)
            timed = clock.timed(work, original)
            setattr(owner, name, timed)
            for other in list(sys.modules.values()) if not parents else ():
                if getattr(other, "__name__", "").startswith("transferkit") and vars(other).get(name) is original:
                    setattr(other, name, timed)


def run_here(arguments: list[str]) -> None:
    """Run the command in this process and print the seconds of each kind of work."""
    clock = Clock()
    from transferkit.allocator import tune_allocator
    from transferkit.cli import app

    tune_allocator()
    for name in ("finetuner", "plots", "report", "demo"):
        importlib.import_module(f"transferkit.{name}")
    watch(clock)
    clock.turn()
    clock.doing[-1] = REST
    with contextlib.redirect_stdout(io.StringIO()):
        app(["finetune", *arguments], standalone_mode=False)
    clock.turn()
    print(json.dumps(clock.seconds))


def main() -> None:
    if sys.argv[1:2] == ["--run-here"]:
        run_here(sys.argv[2:])
        return
    options = read_options(__doc__, epochs=10, rivals="")
    options.workers, options.seeds = 0, [0]
    found: dict[str, dict[str, float]] = {}
    with workplace(options) as place:
        for title, policy in CASES.items():
            if options.only not in title:
                continue
            settings = {
                "--model": "torchvision/mobilenet_v2",
                "--weights": options.mobilenet_weights,
                "--policy": policy,
                "--epochs": options.epochs if policy != "full" else min(options.epochs, 2),
                "--batch-size": options.batch_size,
                "--image-size": options.image_size,
                "--workers": 0,
                "--output": place / policy.replace(":", "-"),
            }
            arguments = [str(part) for pair in settings.items() for part in pair]
            command = [sys.executable, __file__, "--run-here", str(place / "pictures"), *arguments]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                sys.exit(ended.stderr)
            found[f"{title}, {settings['--epochs']} epochs"] = json.loads(ended.stdout.splitlines()[-1])
        head = ["work", *(f"{title}, s" for title in found), *(f"{title}, %" for title in found)]
        rows = [
            [
                work,
                *(f"{seconds.get(work, 0):.2f}" for seconds in found.values()),
                *(f"{100 * seconds.get(work, 0) / sum(seconds.values()):.1f}" for seconds in found.values()),
            ]
            for work in (IMPORTS, *WORK, REST)
        ]
        rows.append(["all", *(f"{sum(seconds.values()):.2f}" for seconds in found.values()), *["100"] * len(found)])
        report = f"# Where the time goes\n\n{setting(options, place)}\n\n{markdown_table(head, rows)}\n"
    hand_out(report, options.output)


if __name__ == "__main__":
    main()
