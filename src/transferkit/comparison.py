"""Which backbone for these pictures? Each gets the same budget; what is done stays whatever happens to the rest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import statistics
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from transferkit.backbones import resolve_name
from transferkit.devices import choose_device
from transferkit.exceptions import ArtifactError, OutputError, SettingError, closest
from transferkit.finetuner import Data, Finetuner
from transferkit.freezing import FreezePolicy
from transferkit.identity import contents_of, described
from transferkit.interrupts import Interrupted
from transferkit.leaderboard import Leaderboard, LeaderboardRow
from transferkit.pieces import read_pictures
from transferkit.run_folder import RunFolder
from transferkit.sources import LabelledPictures, PictureData
from transferkit.trials import Job, Run, Trial, run_apart, run_here

__all__ = ["ComparisonInterrupted", "compare"]

_FORMAT = 1
_RESULTS = "results"
# The same for all backbones, or not theirs to decide.
_SHARED = {
    "epochs",
    "natural_sort",
    "on_bad_image",
    "output_dir",
    "overwrite",
    "policy",
    "progress",
    "seed",
    "val_fraction",
}


class ComparisonInterrupted(Interrupted):
    """A comparison was asked to stop; the message says how far it came.

    Args:
        message: That.
        leaderboard: Of what was done.
    """

    def __init__(self, message: str, leaderboard: Leaderboard) -> None:
        """Hold them."""
        super().__init__(message)
        self.leaderboard = leaderboard


def compare(
    data: Data,
    backbones: Sequence[str | Mapping[str, Any]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    policy: FreezePolicy | str = "head",
    epochs: int = 10,
    full: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    isolated: bool = True,
    on_progress: Callable[[int, int, str], None] | None = None,
    **settings: Any,
) -> Leaderboard:
    """Train each backbone on the same pictures with the same budget, on several seeds, and set them side by side.

    The data is read, looked at and split once, by seed 0; a seed decides the new head, the order of the pictures, and
    random weights. With the head alone training, the frozen pass runs once per backbone and all its seeds train on what
    it gave. Accuracies are those of the best epoch.

    A backbone that fails keeps a row that says why. A picture folder, its classes and the settings are looked at before
    anything is trained, and a mistake there is raised.

    Args:
        data: As for :meth:`Finetuner.fit`.
        backbones: Names, ``"torchvision/resnet18"``; names with weights, ``"torchvision/resnet18@bees.pth"`` (a path, a
            tag, ``bundled``, or ``none`` for random ones); or dictionaries of a :class:`Finetuner`'s settings,
            ``{"backbone": "torchvision/resnet18", "image_size": 160}``, with a ``"name"`` of your own if you like.
        seeds: One or more, each 0 or more.
        policy: What is frozen when, as for :class:`Finetuner`.
        epochs: Passes over the training pictures, 1 or more. After the first, those of a head alone cost little.
        full: Whether each backbone is also trained as a whole, as often and as long, for a column of its own.
        output_dir: Folder for the leaderboard (:meth:`Leaderboard.save`) and the result of each run; ``None`` writes
            nothing.
        resume: Whether results that are already in ``output_dir`` are taken over, and only what is missing is done.
        isolated: Whether each backbone has a process of its own. Then its memory is measured, and running out of it
            costs one row; each start takes some seconds. ``False`` is for data sets and settings that cannot be sent to
            another process.
        on_progress: Called with the number of runs that are done, of all, and what is done next in words.
        **settings: More settings of :class:`Finetuner`, the same for all.

    Returns:
        One row per backbone, the best first.

    Raises:
        SettingError: A setting is outside its range, or two backbones have one name.
        UnknownModelError: No such backbone.
        DataError: The data cannot be used for classification.
        OutputError: ``output_dir`` cannot be written, or holds results and ``resume`` was not asked for.
        ArtifactError: Results that are there were made with other data or settings.
        ComparisonInterrupted: Ctrl-C or SIGTERM came; the leaderboard of what is done is written, and with the error.

    Example:
        >>> from PIL import Image
        >>> pictures = [(Image.new("RGB", (32, 32), colour), label) for label, colour in enumerate(("red", "blue"))] * 4
        >>> backbones = [{"name": "tiny", "backbone": "timm/test_efficientnet", "weights": None, "image_size": 32}]
        >>> board = compare((pictures, pictures), backbones, seeds=[0], epochs=1, isolated=False, device="cpu")
        >>> board.best().backbone, board.best().failure
        ('tiny', None)
    """
    candidates = _candidates(backbones, {**settings, "epochs": epochs})
    wanted = _wanted(seeds, full=full)
    for candidate in candidates:
        Finetuner(**candidate.settings, policy=policy)  # refuses what it can before anything is read
    report = on_progress or (lambda *_: None)
    count = len(candidates) * len(wanted)
    with _claimed(output_dir) as folder, _sigterm_like_ctrl_c():
        store = _Store(folder, resume=resume)
        pictures = read_pictures(Finetuner(**candidates[0].settings), data)
        facts = {**_identity(pictures), "policy": str(policy)} if folder is not None else {}
        identities = {
            each.name: {**facts, **{name: described(value) for name, value in each.settings.items()}}
            for each in candidates
        }
        found = {each.name: store.load(each, wanted, identities[each.name]) for each in candidates}
        failures: dict[str, str] = {}
        about = _about(pictures, seeds=seeds, policy=policy, epochs=epochs, device=settings.get("device"))
        try:
            for place, candidate in enumerate(candidates):
                kept = found[candidate.name]
                runs = [run for run in wanted if run not in [trial.run for trial in kept]]
                with closing(_outcomes(candidate, pictures, policy, runs, folder, isolated=isolated)) as outcomes:
                    for run in runs:
                        report(place * len(wanted) + len(kept), count, f"{candidate.name}, {run}")
                        outcome = next(outcomes)
                        if isinstance(outcome, str):
                            failures[candidate.name] = outcome
                            break
                        store.save(candidate, outcome, identities[candidate.name])
                        kept.append(outcome)
            report(count, count, "done")
        except KeyboardInterrupt:
            board = _saved(_board(found, failures, about), folder)
            trained = sum(map(len, found.values()))
            where = f"; what is done is in {folder}" if folder is not None else ""
            raise ComparisonInterrupted(f"stopped after {trained} of {count} runs{where}", board) from None
        return _saved(_board(found, failures, about), folder)


def _saved(board: Leaderboard, folder: Path | None) -> Leaderboard:
    if folder is not None:
        board.save(folder)
    return board


@dataclass(frozen=True)
class _Candidate:
    """A backbone by its name in the comparison, with the settings that a :class:`Finetuner` gets."""

    name: str
    settings: Mapping[str, Any]

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.@+-]+", "-", self.name)


def _candidates(backbones: Sequence[str | Mapping[str, Any]], shared: Mapping[str, Any]) -> list[_Candidate]:
    known = {each.name for each in fields(Finetuner) if each.init}
    for name in shared:
        _check_setting(name, known, {"backbone", "output_dir", "overwrite", "progress", "seed"})
    candidates = []
    for given in [backbones] if isinstance(backbones, str | Mapping) else backbones:
        name, own = _named(given)
        for setting in own:
            _check_setting(setting, known, _SHARED)
        candidates.append(_Candidate(name, {**shared, **own}))
    if not candidates:
        raise SettingError("there are no backbones to compare; name one or more")
    slugs = [each.slug for each in candidates]
    for position, candidate in enumerate(candidates):
        if candidate.slug in slugs[:position]:
            raise SettingError(
                f"two backbones are called {candidate.name}; leave one out, or give them names of their own: "
                "{'name': …, 'backbone': …}"
            )
    return candidates


def _check_setting(name: str, known: set[str], refused: set[str]) -> None:
    if name in refused:
        raise SettingError(f"{name} cannot be set here; a comparison sets it itself, or has the same for all backbones")
    if name not in known:
        raise SettingError(f"no setting {name!r} of Finetuner{closest(name, known)}")


def _named(given: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what a backbone is called, and its own settings."""
    if isinstance(given, str):
        backbone, at, weights = given.partition("@")
        given = {"backbone": backbone} | ({"weights": None if weights.lower() == "none" else weights} if at else {})
    if not isinstance(given, Mapping) or not isinstance(given.get("backbone"), str | nn.Module):
        raise SettingError(
            f"{given!r} is no backbone; give a name, NAME@WEIGHTS, or a dictionary of settings with 'backbone' in it"
        )
    own = dict(given)
    called = own.pop("name", None)
    backbone = own["backbone"]
    if isinstance(backbone, str):
        own["backbone"] = name = "/".join(resolve_name(backbone))
    else:
        name = type(backbone).__name__
    weights = own.get("weights", "default")
    if weights != "default":
        name += f"@{'none' if weights is None else Path(weights).name}"
    rest = [f"{key}={value}" for key, value in own.items() if key not in ("backbone", "weights")]
    return called or " ".join([name, *rest]), own


def _wanted(seeds: Sequence[int], *, full: bool) -> list[Run]:
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise SettingError(f"seeds={list(seeds)}; they can be one or more different whole numbers, 0 or more")
    return [Run(seed, whole) for whole in ((False, True) if full else (False,)) for seed in seeds]


@contextmanager
def _claimed(output_dir: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    if output_dir is None:
        yield None
        return
    with RunFolder(output_dir).claimed():
        yield Path(output_dir)


def _outcomes(
    candidate: _Candidate,
    data: PictureData,
    policy: FreezePolicy | str,
    runs: Sequence[Run],
    folder: Path | None,
    *,
    isolated: bool,
) -> Generator[Trial | str]:
    if not runs:
        return
    # What frozen stages gave is worth keeping until the backbone's last seed, and may be large: beside the results.
    with tempfile.TemporaryDirectory(prefix="transferkit-cache-", dir=folder, ignore_cleanup_errors=True) as cache:
        job = Job(candidate.settings, data, policy, runs, cache)
        yield from (run_apart if isolated else run_here)(job)


class _Store:
    """The results of single runs, a JSON file each.

    Args:
        folder: Of the comparison; ``None`` keeps nothing.
        resume: Whether results may be there.
    """

    def __init__(self, folder: Path | None, *, resume: bool) -> None:
        self.folder = None if folder is None else folder / _RESULTS
        if resume and folder is None:
            raise SettingError("resume goes on with the comparison in output_dir, and there is none; set output_dir")
        if self.folder is not None and not resume and any(self.folder.glob("*.json")):
            raise OutputError(
                f"{folder} already holds a comparison; choose another folder, or go on with it (resume=True, --resume)"
            )

    def load(self, candidate: _Candidate, runs: Sequence[Run], identity: Mapping[str, Any]) -> list[Trial]:
        """Return the runs of a backbone that are done; raise where they were done otherwise."""
        found = []
        for run in runs if self.folder is not None else ():
            file = self._file(candidate, run)
            try:
                kept = json.loads(file.read_text(encoding="utf-8"))
                trial = Trial.from_dict(kept["trial"])
                before = dict(kept["identity"]) if kept["format"] == _FORMAT else {"format": kept["format"]}
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ArtifactError(
                    f"{file} is damaged ({type(error).__name__}); delete it, and this run is done again"
                ) from error
            if differing := [name for name in {**before, **identity} if before.get(name) != identity.get(name)]:
                name = differing[0]
                raise ArtifactError(
                    f"the results in {file.parent} were made with {name} {before.get(name)!r}, not "
                    f"{identity.get(name)!r}; give the same, or choose another folder"
                )
            found.append(trial)
        return found

    def save(self, candidate: _Candidate, trial: Trial, identity: Mapping[str, Any]) -> None:
        """Write a result, whole or not at all."""
        if self.folder is None:
            return
        file = self._file(candidate, trial.run)
        kept = {"format": _FORMAT, "backbone": candidate.name, "identity": dict(identity), "trial": trial.to_dict()}
        try:
            self.folder.mkdir(exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            raise OutputError(f"the result {file} cannot be written: {error.strerror or error}") from error

    def _file(self, candidate: _Candidate, run: Run) -> Path:
        assert self.folder is not None
        return self.folder / f"{candidate.slug}-seed{run.seed}{'-full' if run.full else ''}.json"


def _identity(data: PictureData) -> dict[str, Any]:
    return {
        "classes": list(data.class_names),
        "training pictures": _digest(data.train),
        "validation pictures": _digest(data.val),
    }


def _digest(source: LabelledPictures) -> str:
    """Return what tells pictures from others: the contents of files, else only number and labels."""
    return contents_of(source) or hashlib.sha256(str(source.labels()).encode()).hexdigest()


def _about(
    data: PictureData, *, seeds: Sequence[int], policy: FreezePolicy | str, epochs: int, device: str | None
) -> dict[str, Any]:
    return {
        "classes": len(data.class_names),
        "training pictures": len(data.train),
        "validation pictures": len(data.val),
        "policy": str(policy),
        "epochs": epochs,
        "seeds": list(seeds),
        "device": str(choose_device(device)),
        "versions": {name: version(name) for name in ("transferkit", "torch", "torchvision", "timm")},
    }


def _board(found: Mapping[str, Sequence[Trial]], failures: Mapping[str, str], about: Mapping[str, Any]) -> Leaderboard:
    rows = [_row(name, trials, failures.get(name)) for name, trials in found.items()]
    rows.sort(key=lambda row: (row.accuracy is None, -(row.accuracy or 0.0)))
    return Leaderboard(tuple(rows), about)


def _row(name: str, trials: Sequence[Trial], failure: str | None) -> LeaderboardRow:
    if not trials:
        return LeaderboardRow(name, failure=failure or "it was not reached")
    accuracy, spread = _mean_spread([trial.accuracy for trial in trials if not trial.full])
    full_accuracy, full_spread = _mean_spread([trial.accuracy for trial in trials if trial.full])
    return LeaderboardRow(
        name,
        accuracy,
        spread,
        full_accuracy,
        full_spread,
        seeds=tuple(trial.seed for trial in trials if not trial.full),
        seconds=sum(trial.seconds for trial in trials),
        **asdict(trials[0].facts),
        failure=failure,
    )


def _mean_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` at SIGTERM, unless the program has a handler of its own or this is no main thread."""
    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if usual:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
