"""What is wrong with a folder of labelled pictures, before anything is trained on it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transferkit.data import sort_pictures
from transferkit.exceptions import DataError
from transferkit.fingerprints import PictureFacts, near_pairs
from transferkit.folders import Part, list_parts
from transferkit.kept_features import MOST, alike_pairs, kept_features
from transferkit.scan import scan_pictures
from transferkit.sources import LabelledPictures, PictureData, PictureFiles

__all__ = ["DataCheck", "Finding", "check_data", "same_files"]

# From here on a picture or a class is worth a word; nothing is done about it.
_RATIO, _SHORT, _PIXELS = 4, 32, 50_000_000
_IMBALANCE, _FEW = 10, 5
_PLAIN_MODES = frozenset({"RGB", "L", "YCbCr"})


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        kind: ``structure``, ``unreadable``, ``leak``, ``near leak``, ``two labels``, ``near two labels``,
            ``duplicates``, ``near duplicates``, ``missing class``, ``imbalance``, ``few pictures``, ``modes``,
            ``shapes``, ``sizes`` or ``left out``.
        hurts: Whether training or its figures would suffer; the rest is for you to know.
        message: One sentence.
        pictures: The files meant, in groups: a picture and its copies are one.
    """

    kind: str
    hurts: bool
    message: str
    pictures: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class DataCheck:
    """What :func:`check_data` found.

    Args:
        root: The folder.
        counts: Pictures by part, ``train``, ``val`` and ``test``, and class.
        unreadable: The cause by file.
        findings: Those that hurt first.
    """

    root: str
    counts: Mapping[str, Mapping[str, int]]
    unreadable: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def hurts(self) -> bool:
        """Whether anything would hurt."""
        return any(finding.hurts for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        return {
            "root": self.root,
            "counts": {part: dict(counts) for part, counts in self.counts.items()},
            "unreadable": dict(self.unreadable),
            "hurts": self.hurts,
            "findings": [
                {
                    "kind": finding.kind,
                    "hurts": finding.hurts,
                    "message": finding.message,
                    "pictures": [list(group) for group in finding.pictures],
                }
                for finding in self.findings
            ],
        }


@dataclass(frozen=True, slots=True)
class _Looked:
    """A picture, where it lies, and what it is."""

    path: str
    part: str
    label: str
    facts: PictureFacts


def check_data(
    root: str | os.PathLike[str],
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    remember: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Decode every picture of a folder once and say what would hurt: unreadable files, leaks, wrong labels and more.

    A leak is a picture, or one that looks the same, that is trained on and validated on: it makes the figures too good.
    Near duplicates are told by :func:`transferkit.fingerprints.near_pairs`, and by the features of a network where an
    earlier run has kept them.

    Args:
        root: As for :func:`transferkit.image_folder`. Where it has no ``val/``, the split that a run would make is
            looked at.
        val_fraction: As for :func:`transferkit.image_folder`.
        seed: The same.
        remember: Whether the next look at the same files is to be fast (:func:`transferkit.scan.scan_pictures`).
        cache_dir: That of an earlier run that trained a head on these pictures, whose features then tell more near
            duplicates (:func:`transferkit.kept_features.kept_features`).
        on_progress: Called with the number of files done and of all.

    Raises:
        DataError: The folder does not exist.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, colour in (("cats/1.png", "red"), ("cats/2.png", "tan"), ("dogs/1.png", "red")):
        ...         (Path(folder) / name).parent.mkdir(exist_ok=True)
        ...         Image.new("RGB", (40, 40), colour).save(Path(folder) / name)
        ...     check = check_data(folder, remember=False)
        >>> check.hurts, [finding.kind for finding in check.findings if finding.hurts]
        (True, ['leak', 'two labels'])
    """
    listed = list_parts(root)
    data, parts, findings = _sorted_into_parts(listed, val_fraction, seed)
    places = [(path, part, label) for part, classes in parts.items() for label in classes for path in classes[label]]
    report = None if on_progress is None else (lambda done: on_progress(done, len(places)))
    facts = scan_pictures([path for path, *_ in places], remember=remember, on_progress=report)
    looked = [_Looked(*place, fact) for place, fact in zip(places, facts, strict=True)]
    unreadable = {each.path: each.facts.cause for each in looked if each.facts.cause is not None}
    readable = [each for each in looked if each.facts.cause is None]
    findings += _unreadable(unreadable)
    features = {} if data is None or cache_dir is None else _features(data, unreadable, cache_dir)
    findings += _copies(readable, features)
    findings += _classes(parts)
    findings += _oddities(readable)
    findings += _left_out(list(listed.values()))
    findings.sort(key=lambda finding: not finding.hurts)
    counts = {part: {label: len(paths) for label, paths in classes.items()} for part, classes in parts.items()}
    return DataCheck(os.fspath(root), counts, unreadable, tuple(findings))


def same_files(data: PictureData, facts: Mapping[str, PictureFacts]) -> list[Finding]:
    """Find the identical files of a data set: leaks, two labels, and harmless ones.

    Args:
        data: Sources that are no files are left out.
        facts: Of :func:`transferkit.bad_pictures.facts_of`.

    Example:
        >>> from transferkit.sources import Picture
        >>> train, val = PictureFiles([Picture("a.jpg", 0)]), PictureFiles([Picture("b.jpg", 0)])
        >>> facts = {path: PictureFacts(content=b"the same") for path in ("a.jpg", "b.jpg")}
        >>> [finding.kind for finding in same_files(PictureData(train, val, ("cats", "dogs")), facts)]
        ['leak']
    """
    parts = {"train": data.train, "val": data.val, "test": data.test}
    looked = [
        _Looked(picture.path, part, data.class_names[picture.label], facts[picture.path])
        for part, source in parts.items()
        if isinstance(source, PictureFiles)
        for picture in source.pictures
    ]
    return _copies_told([group for group in _by_content(looked) if len(group) > 1], "", "set(s) of identical files")


_Classes = Mapping[str, Sequence[str]]


def _sorted_into_parts(
    listed: Mapping[str, Part], val_fraction: float, seed: int
) -> tuple[PictureData | None, dict[str, _Classes], list[Finding]]:
    """Sort files as a run would; where it would refuse, as they lie."""
    as_they_lie = {part.replace("all", "train"): each.pictures for part, each in listed.items()}
    try:
        data, _ = sort_pictures(listed, val_fraction=val_fraction, seed=seed)
    except DataError as error:
        return None, as_they_lie, [Finding("structure", True, str(error))]
    if "all" not in listed:
        return data, as_they_lie, []
    sides = {"train": data.train, "val": data.val}
    return data, {name: _by_class(side, data.class_names) for name, side in sides.items()}, []


def _by_class(source: LabelledPictures, names: Sequence[str]) -> _Classes:
    assert isinstance(source, PictureFiles)
    found: dict[str, list[str]] = {name: [] for name in names}
    for picture in source.pictures:
        found[names[picture.label]].append(picture.path)
    return found


def _unreadable(causes: Mapping[str, str]) -> list[Finding]:
    if not causes:
        return []
    listing = _listing(f"{path} ({cause})" for path, cause in causes.items())
    message = f"{_files(len(causes), 'cannot', 'cannot')} be read: {listing}; replace or remove what cannot"
    return [Finding("unreadable", True, message, tuple((path,) for path in causes))]


def _copies(looked: Sequence[_Looked], features: Mapping[str, Tensor]) -> list[Finding]:
    """Tell copies by where they are: on both sides of the split, under two labels, or harmlessly together."""
    groups = _by_content(looked)
    exact = [group for group in groups if len(group) > 1]
    # Of identical files one stands for all.
    distinct = [group[0] for group in groups]
    pairs = {(pair.first, pair.second) for pair in near_pairs([each.facts.look for each in distinct])}
    known = [index for index, each in enumerate(distinct) if each.path in features]
    if known:
        alike = alike_pairs(torch.stack([features[distinct[index].path] for index in known]))
        pairs |= {(known[one], known[other]) for one, other in alike}
    near = [[distinct[one], distinct[other]] for one, other in sorted(pairs)]
    return [
        *_copies_told(exact, "", "set(s) of identical files"),
        *_copies_told(near, "near ", "pair(s) of pictures that look the same"),
    ]


def _features(data: PictureData, unreadable: Mapping[str, str], directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return what an earlier run kept of the readable pictures, by path."""
    found: dict[str, Tensor] = {}
    for source in (data.train, data.val):
        assert isinstance(source, PictureFiles)
        files = replace(source, pictures=[each for each in source.pictures if each.path not in unreadable])
        features = kept_features(files, directory)
        if features is not None:
            found.update(zip((picture.path for picture in files.pictures), features, strict=True))
    return found if len(found) <= MOST else {}


def _by_content(looked: Sequence[_Looked]) -> list[list[_Looked]]:
    by_content: dict[bytes, list[_Looked]] = defaultdict(list)
    for each in looked:
        by_content[each.facts.content].append(each)
    return list(by_content.values())


def _copies_told(groups: Sequence[Sequence[_Looked]], how: str, words: str) -> list[Finding]:
    sorted_groups: dict[str, list[Sequence[_Looked]]] = {"leak": [], "two labels": [], "duplicates": []}
    for group in groups:
        parts, labels = {each.part for each in group}, {each.label for each in group}
        if len(labels) > 1:
            sorted_groups["two labels"].append(group)
        if len(parts) > 1 and "train" in parts:
            sorted_groups["leak"].append(group)
        elif len(labels) == 1:
            sorted_groups["duplicates"].append(group)
    what = {
        "leak": "are trained on and validated on, which makes figures too good",
        "two labels": "have two labels, of which one is wrong",
        "duplicates": "are in one class, and count twice",
    }
    return [
        Finding(
            how + kind,
            kind != "duplicates",
            f"{len(found)} {words} {what[kind]}: "
            f"{_listing(' = '.join(each.path for each in group) for group in found)}",
            tuple(tuple(each.path for each in group) for group in found),
        )
        for kind, found in sorted_groups.items()
        if found
    ]


def _classes(parts: Mapping[str, _Classes]) -> list[Finding]:
    train = {label: len(paths) for label, paths in parts.get("train", {}).items() if paths}
    findings = []
    for part, classes in parts.items():
        missing = [label for label in train if not classes.get(label)]
        if part != "train" and missing:
            findings.append(Finding("missing class", False, f"{part} has no pictures of class {_listing(missing)}"))
    few = [label for label, count in train.items() if count < _FEW]
    if few:
        message = f"class {_listing(few)} has fewer than {_FEW} pictures to train on"
        findings.append(Finding("few pictures", False, message))
    if train and max(train.values()) >= _IMBALANCE * min(train.values()):
        largest, smallest = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
        message = (
            f"class {largest!r} has {train[largest]} pictures to train on and {smallest!r} has {train[smallest]}; "
            "--balanced draws every class equally often"
        )
        findings.append(Finding("imbalance", False, message))
    return findings


def _oddities(looked: Sequence[_Looked]) -> list[Finding]:
    modes = Counter(each.facts.mode for each in looked if each.facts.mode not in _PLAIN_MODES)
    findings = []
    if modes:
        listing = ", ".join(f"{count} {mode}" for mode, count in modes.most_common())
        odd = [each.path for each in looked if each.facts.mode in modes]
        message = f"{_files(len(odd), 'is', 'are')} neither RGB nor grey, to be converted: {listing}"
        findings.append(Finding("modes", False, message, _each(odd)))
    long = [each.path for each in looked if _longer(each.facts) > _RATIO * _shorter(each.facts)]
    if long:
        message = f"{_files(len(long), 'is', 'are')} over {_RATIO} times as long as wide, of which the middle is seen"
        findings.append(Finding("shapes", False, f"{message}: {_listing(long)}", _each(long)))
    small = [each.path for each in looked if _shorter(each.facts) < _SHORT]
    if small:
        message = f"{_files(len(small), 'is', 'are')} under {_SHORT} pixels on a side"
        findings.append(Finding("sizes", False, f"{message}: {_listing(small)}", _each(small)))
    large = [each.path for each in looked if each.facts.width * each.facts.height > _PIXELS]
    if large:
        message = f"{_files(len(large), 'has', 'have')} over {_PIXELS // 10**6} million pixels, slow to read"
        findings.append(Finding("sizes", False, f"{message}: {_listing(large)}", _each(large)))
    return findings


def _left_out(listed: Sequence[Part]) -> list[Finding]:
    kinds: dict[str, list[str]] = {
        "picture(s) in no class folder": [path for part in listed for path in part.loose],
        "file(s) that are no pictures": [path for part in listed for path in part.others],
        "hidden file(s) or folder(s)": [path for part in listed for path in part.hidden],
    }
    return [
        Finding("left out", False, f"{len(paths):,} {what}: {_listing(paths)}", _each(paths))
        for what, paths in kinds.items()
        if paths
    ]


def _longer(facts: PictureFacts) -> int:
    return max(facts.width, facts.height)


def _shorter(facts: PictureFacts) -> int:
    return min(facts.width, facts.height)


def _each(paths: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((path,) for path in paths)


def _files(count: int, one: str, more: str) -> str:
    return f"1 file {one}" if count == 1 else f"{count:,} files {more}"


def _listing(names: Iterable[str], *, most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
