"""A run in one HTML file: headline figure, plan, curves, classes, mistakes, calibration, data, and how to use it."""

from __future__ import annotations

import base64
import datetime
import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transferkit import __version__
from transferkit.bad_pictures import load_bad_images
from transferkit.calibration import expected_calibration_error, wilson_interval
from transferkit.checkpoint import HISTORY, load_artifact, read_config
from transferkit.data import labelled_folder
from transferkit.devices import choose_device
from transferkit.evaluation import collect_logits
from transferkit.exceptions import OutputError, PictureError, SettingError
from transferkit.explain import heat_map
from transferkit.history import History
from transferkit.loading import loader
from transferkit.metrics import per_class
from transferkit.model import TransferModel
from transferkit.pages import render_page
from transferkit.pictures import read_picture
from transferkit.plots import plot_confusion, plot_history, plot_reliability
from transferkit.run_folder import BAD_IMAGES, VALIDATION
from transferkit.transforms import eval_transform
from transferkit.validation import Judgement, confusion_matrix, judge, load_judgements

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["REPORT", "write_report"]

REPORT = "report.html"

_FIGURES = ("precision", "recall", "f1")
_MISTAKES = 8
_DOTS = 96  # per inch, on a page
_SMALL_MATRIX = 12  # classes whose confusion matrix is a table; more are drawn


@dataclass(frozen=True)
class _Cell:
    """A number of a table: as it is shown, as it is sorted by, and how strongly it is coloured, 0 to 1."""

    text: str
    value: float = 0.0
    share: float | None = None
    kind: str = "right"


@dataclass(frozen=True)
class _Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[_Cell]]
    sortable: bool = False


@dataclass(frozen=True)
class _Picture:
    source: str
    text: str
    width: int = 0


@dataclass(frozen=True)
class _Mistake:
    picture: str
    actual: str
    predicted: str
    confidence: str
    loss: str
    images: Sequence[_Picture]


@dataclass(frozen=True)
class _Section:
    id: str
    title: str
    lines: Sequence[str] = ()
    figures: Sequence[_Picture] = ()
    table: _Table | None = None
    mistakes: Sequence[_Mistake] = field(default_factory=tuple)
    code: str = ""


def write_report(
    run: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    model: TransferModel | None = None,
    device: str | None = None,
) -> Path:
    """Write a run's report: one HTML file that needs no network and no other file.

    Args:
        run: Output folder of a run, or any saved model.
        path: The file to write; ``None`` for ``report.html`` in ``run``.
        data: A folder of labelled pictures to judge the model on, as for :func:`transferkit.data.labelled_folder`;
            ``None`` for what the run noted of its validation pictures.
        model: The run's model, where it is there already.
        device: Where heat maps, and pictures of ``data``, are computed; ``None`` for the best there is.

    Returns:
        The file.

    Raises:
        ArtifactError: ``run`` holds no saved model.
        DataError: ``data`` cannot be used.
        OutputError: The file cannot be written.

    Source: the heat maps are Grad-CAM, Selvaraju et al. 2017; the interval is Wilson's, 1927.
    """
    folder = Path(run)
    config = read_config(folder)
    model = load_artifact(folder) if model is None else model
    place = choose_device(device)
    model.to(place)
    history = History.load_csv(folder / HISTORY) if (folder / HISTORY).is_file() else History()
    if data is not None:
        judged = _judged(model, data, place)
    else:
        judged = load_judgements(folder / VALIDATION) if (folder / VALIDATION).is_file() else []
    bad = load_bad_images(folder / BAD_IMAGES) if (folder / BAD_IMAGES).is_file() else {}
    noted = config.get("run", {})
    sections = [
        *_plan(noted),
        *_curves(history, noted),
        *(_judgements(judged, model, place) if judged else [_nothing_judged()]),
        *_data(noted, bad),
        *_environment(config, noted),
        _use(folder, config),
    ]
    page = render_page(
        "report.html",
        title=folder.resolve().name,
        headline=_headline(judged, history, noted),
        facts=_facts(model, history, noted),
        sections=sections,
        version=__version__,
        date=datetime.date.today().isoformat(),
    )
    file = folder / REPORT if path is None else Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"cannot write the report {file}: {error}") from error
    return file


def _judged(model: TransferModel, data: str | os.PathLike[str], device: torch.device) -> list[Judgement]:
    files = labelled_folder(data, model.class_names)
    batches = loader(files, eval_transform(model.eval_preset, model.preprocessing), batch_size=16, train=False, lost={})
    logits, labels = collect_logits(model.network, batches, device)
    names = [picture.path for index, picture in enumerate(files.pictures) if index not in batches.lost_rows]
    return judge(logits, labels, model.class_names, names, temperature=model.temperature)


def _headline(judged: Sequence[Judgement], history: History, noted: Mapping[str, Any]) -> dict[str, Any] | None:
    if not judged:
        return None
    right = sum(each.is_right for each in judged)
    low, high = wilson_interval(right, len(judged))
    best = noted.get("best", {})
    return {
        "accuracy": _percent(right / len(judged)),
        "count": f"{len(judged):,}",
        "low": _percent(low),
        "high": _percent(high),
        "epoch": best.get("epoch"),
        "epochs": len(history),
        "seconds": _duration(noted["seconds"]) if "seconds" in noted else None,
    }


def _facts(model: TransferModel, history: History, noted: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("backbone", model.name),
        ("weights", model.weights or "random"),
        ("input", f"{model.preprocessing.size} × {model.preprocessing.size} px"),
        ("classes", f"{len(model.class_names):,}"),
    ]
    counts = noted.get("data", {})
    for part, words in (("train", "training pictures"), ("val", "validation pictures")):
        if part in counts:
            facts.append((words, f"{sum(counts[part].values()):,}"))
    if len(history):
        facts.append(("epochs", str(len(history))))
    return facts


def _plan(noted: Mapping[str, Any]) -> list[_Section]:
    return [_Section("plan", "Plan that ran", code=str(noted["plan"]))] if noted.get("plan") else []


def _curves(history: History, noted: Mapping[str, Any]) -> list[_Section]:
    if not len(history):
        return []
    unfreezings = [int(epoch) for epoch in noted.get("unfreeze_epochs", ())]
    figure = plot_history(history.to_dicts(), unfreeze_epochs=unfreezings)
    losses, accuracies = history["val_loss"], history["val_accuracy"]
    text = (
        f"Loss and validation accuracy over {len(history)} epochs: validation loss from {losses[0]:.3f} to "
        f"{losses[-1]:.3f}, validation accuracy from {_percent(accuracies[0])} to {_percent(accuracies[-1])}"
    )
    return [_Section("curves", "Curves", figures=[_drawn(figure, text)])]


def _nothing_judged() -> _Section:
    return _Section(
        "classes",
        "Classes and mistakes",
        lines=["Nothing was noted of validation pictures here. Give labelled pictures: transferkit report RUN DATA."],
    )


def _judgements(judged: Sequence[Judgement], model: TransferModel, device: torch.device) -> list[_Section]:
    matrix = confusion_matrix(judged, model.class_names)
    return [
        _Section("classes", "Classes", table=_per_class(matrix, model.class_names)),
        _confusions(matrix, model.class_names),
        _worst(judged, model, device),
        _calibration(judged, model),
    ]


def _per_class(matrix: Tensor, class_names: Sequence[str]) -> _Table:
    found = per_class(class_names, there=matrix.sum(1), said=matrix.sum(0), right=matrix.diagonal())
    rows = [
        [
            _Cell(name),
            _Cell(f"{figures['count']:,}", figures["count"]),
            *(_Cell(f"{figures[key]:.3f}", figures[key], round(figures[key], 3)) for key in _FIGURES),
        ]
        for name, figures in found.items()
    ]
    caption = "Per class; a column's head sorts by it"
    return _Table(caption, ["class", "pictures", "precision", "recall", "F1"], rows, sortable=True)


def _confusions(matrix: Tensor, class_names: Sequence[str]) -> _Section:
    wrong = matrix.clone().fill_diagonal_(0)
    places = [place for place in torch.argsort(wrong.flatten(), descending=True)[:5].tolist() if wrong.flatten()[place]]
    pairs = [
        f"{class_names[place // len(matrix)]} taken for {class_names[place % len(matrix)]}: {wrong.flatten()[place]}"
        for place in places
    ]
    lines = [f"Most often: {'; '.join(pairs)}."] if pairs else ["No class was taken for another."]
    if len(class_names) > _SMALL_MATRIX:
        drawn = _drawn(plot_confusion(matrix, class_names), f"Confusion matrix of {len(class_names)} classes")
        return _Section("confusion", "Confusion matrix", lines=lines, figures=[drawn])
    sums = matrix.sum(1)
    rows = [
        [
            _Cell(name),
            *(
                _Cell(
                    str(int(count)),
                    float(count),
                    round(float(count) / max(int(sums[row]), 1), 3),
                    "right" if row == column else "wrong",
                )
                for column, count in enumerate(matrix[row])
            ),
        ]
        for row, name in enumerate(class_names)
    ]
    table = _Table("Rows: actual class; columns: predicted class", ["actual \\ predicted", *class_names], rows)
    return _Section("confusion", "Confusion matrix", lines=lines, table=table)


def _worst(judged: Sequence[Judgement], model: TransferModel, device: torch.device) -> _Section:
    wrong = sorted((each for each in judged if not each.is_right), key=lambda each: -each.loss)
    if not wrong:
        return _Section("mistakes", "Worst mistakes", lines=["All validation pictures were classified right."])
    worst = wrong[:_MISTAKES]
    images = _explained([each.picture for each in worst], model, device)
    mistakes = [
        _Mistake(each.picture, each.actual, each.predicted, _percent(each.confidence), f"{each.loss:.2f}", found)
        for each, found in zip(worst, images, strict=True)
    ]
    lines = [f"{len(wrong):,} of {len(judged):,} were wrong; the {len(worst)} with the highest loss:"]
    if any(images):
        lines.append("Left as the network sees it, right what spoke for its answer (Grad-CAM), from dark to bright.")
    return _Section("mistakes", "Worst mistakes", lines=lines, mistakes=mistakes)


def _explained(paths: Sequence[str], model: TransferModel, device: torch.device) -> list[list[_Picture]]:
    """Return each picture and its heat map; nothing of one that is no file any more."""
    transform = eval_transform(model.eval_preset, model.preprocessing)
    channels = model.preprocessing.channels
    seen: dict[int, Tensor] = {}
    for index, path in enumerate(paths if channels in (1, 3) else ()):
        with suppress(PictureError):
            seen[index] = transform(read_picture(path, channels=channels))
    if not seen:
        return [[] for _ in paths]
    batch = torch.stack(list(seen.values())).to(device)
    try:
        maps: Sequence[Tensor | None] = list(heat_map(model, batch).cpu())
    except SettingError:  # a network that keeps no place of what it sees
        maps = [None] * len(batch)
    found: list[list[_Picture]] = [[] for _ in paths]
    for index, image, heat in zip(seen, batch.cpu(), maps, strict=True):
        pixels = _visible(image, model)
        found[index].append(_Picture(_jpeg(pixels), f"picture {index + 1}"))
        if heat is not None:
            found[index].append(_Picture(_jpeg(_glowing(pixels, heat)), f"heat map of picture {index + 1}"))
    return found


def _visible(image: Tensor, model: TransferModel) -> np.ndarray[Any, Any]:
    """Undo the normalisation: (C, S, S) to (S, S, 3) in [0, 1]."""
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (model.preprocessing.mean, model.preprocessing.std))
    return (image * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def _glowing(pixels: np.ndarray[Any, Any], heat: Tensor) -> np.ndarray[Any, Any]:
    from matplotlib import colormaps

    colours = colormaps["inferno"](heat.numpy())[..., :3]
    shown: np.ndarray[Any, Any] = 0.35 * pixels.mean(axis=2, keepdims=True) + 0.65 * colours
    return shown


def _calibration(judged: Sequence[Judgement], model: TransferModel) -> _Section:
    confidences, right = [each.confidence for each in judged], [each.is_right for each in judged]
    error = expected_calibration_error(confidences, right)
    temperature = f"; logits are divided by {model.temperature:.3g}" if model.temperature != 1 else ""
    lines = [
        f"Expected calibration error {error:.3f}{temperature}. Of pictures that the model is 90 % sure of, 90 % should "
        "be right."
    ]
    drawn = _drawn(plot_reliability(confidences, right), f"Reliability diagram, calibration error {error:.3f}")
    return _Section("calibration", "Calibration", lines=lines, figures=[drawn])


def _data(noted: Mapping[str, Any], bad: Mapping[str, str]) -> list[_Section]:
    counts: Mapping[str, Mapping[str, int]] = noted.get("data", {})
    lines = [str(line) for line in noted.get("findings", ())]
    if bad:
        lines.append(f"{len(bad)} picture(s) could not be read and were left out:")
        lines += [f"{path}: {cause}" for path, cause in list(bad.items())[:20]]
        if len(bad) > 20:
            lines.append(f"and {len(bad) - 20} more, in {BAD_IMAGES}")
    if not counts:
        return [_Section("data", "Data", lines=lines)] if lines else []
    if not lines:
        lines = ["All pictures could be read, and no file lies on both sides of the split or under two labels."]
    names = list(dict.fromkeys(name for part in counts.values() for name in part))
    rows = [
        [_Cell(name), *(_Cell(f"{part.get(name, 0):,}", part.get(name, 0)) for part in counts.values())]
        for name in names
    ]
    table = _Table("Pictures per class; a column's head sorts by it", ["class", *counts], rows, sortable=True)
    return [_Section("data", "Data", lines=lines, table=table)]


def _environment(config: Mapping[str, Any], noted: Mapping[str, Any]) -> list[_Section]:
    facts = {**config["transferkit"].get("versions", {}), **noted.get("environment", {})}
    settings = {name: value for name, value in noted.get("settings", {}).items() if value is not None}
    rows = [[_Cell(str(name)), _Cell(str(value))] for name, value in {**facts, **settings}.items()]
    table = _Table("Versions, machine, and the settings that were given", ["what", "value"], rows)
    return [_Section("environment", "Environment and settings", table=table)]


def _use(folder: Path, config: Mapping[str, Any]) -> _Section:
    name = folder.resolve().name
    own = config["transferkit"]
    code = f"""from transferkit import Finetuner

tuner = Finetuner.load("{name}")
print(tuner.predict("picture.jpg")[0].label)

# in the terminal
transferkit predict {name} PICTURES…"""
    if own["native"] and str(own["backbone"]).startswith("timm/"):
        code += f"""

# in timm alone
model = timm.create_model("local-dir:{name}", pretrained=True)"""
    return _Section("use", "How to use the model", code=code)


def _drawn(figure: Figure, text: str) -> _Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=1.5 * _DOTS)
    return _Picture(_uri(file.getvalue(), "png"), text, round(figure.get_size_inches()[0] * _DOTS))


def _jpeg(pixels: np.ndarray[Any, Any]) -> str:
    file = io.BytesIO()
    Image.fromarray((255 * pixels).round().astype(np.uint8)).save(file, "JPEG", quality=85)
    return _uri(file.getvalue(), "jpeg")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
