"""What a run is going to do, printed before it starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from PIL import Image

from transferkit.activations import Choice
from transferkit.callbacks.lr_scheduler import factor_at, span_of
from transferkit.freezing import FreezePolicy
from transferkit.model import TransferModel
from transferkit.reading import in_channels
from transferkit.recipes import Recipe
from transferkit.schedules import MetricSchedule, Plateau, Schedule
from transferkit.sources import LabelledPictures, PictureData

__all__ = ["lr_over_time", "note_enlarging", "plan_text"]

logger = logging.getLogger("transferkit")

_COLUMNS = 5  # points in time that fit beside the stages' names into 80 characters


def plan_text(
    model: TransferModel,
    data: PictureData,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
    activations: Sequence[tuple[int, Choice]] = (),
) -> str:
    """Describe a run: network, pictures, policy, and per stage when it trains, at which rates.

    Args:
        model: What is trained; it is frozen as in the first epoch.
        data: The pictures.
        recipe: Policy and schedule.
        optimizer: Where each stage's own lr and weight decay are read from.
        epochs: Length of the run.
        steps_per_epoch: Optimizer steps of one epoch.
        activations: What is kept of frozen stages, with the epoch from which on it is, counted from 0.

    Returns:
        Lines of text. All but the descriptions of policy, schedule and activations fit into 80 characters.

    Example:
        >>> from PIL import Image
        >>> from transferkit.create import create_model
        >>> from transferkit.data import from_datasets
        >>> from transferkit.optim import param_groups
        >>> from transferkit.recipes import default_recipe
        >>> pictures = [(Image.new("RGB", (8, 8)), label) for label in (0, 1)]
        >>> data = from_datasets(pictures, pictures, class_names=["ant", "bee"])
        >>> model = create_model("timm/test_efficientnet", weights=None, class_names=data.class_names, image_size=32)
        >>> optimizer, recipe = torch.optim.SGD(param_groups(model, lr=0.1)), default_recipe(None, 5)
        >>> text = plan_text(model, data, recipe, optimizer, epochs=5, steps_per_epoch=8)
        >>> text.splitlines()[1]
        '2 training and 2 validation pictures of 2 classes'
    """
    policy = recipe.policy
    model.freeze(policy.frozen_stages(model.stage_names, 0))
    lines = [
        f"{model.name}, {model.weights or 'random weights'}, {model.preprocessing.size} px",
        f"{len(data.train)} training and {len(data.val)} validation pictures of {len(data.class_names)} classes",
        f"epochs: {epochs}, each of {steps_per_epoch} steps",
        f"policy: {policy}",
        f"schedule: {recipe.schedule}",
        *(f"activations{f' from epoch {start + 1}' if start else ''}: {choice}" for start, choice in activations),
        "",
        model.summary(),
        "",
        *_lr_table(model, recipe, optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch),
    ]
    return "\n".join(lines)


def lr_over_time(
    model: TransferModel,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
) -> list[dict[str, float | None]]:
    """Return each stage's lr in the first step of each epoch, ``None`` where it is frozen.

    Args:
        model: Its stages.
        recipe: Policy and schedule. A schedule of a metric is taken as if that got better in every epoch.
        optimizer: As it is before training; of a stage with several groups the first one's lr is meant.
        epochs: Length of the run.
        steps_per_epoch: Optimizer steps of one epoch.

    Returns:
        One dictionary of stages per epoch.

    Example:
        >>> from transferkit.create import create_model
        >>> from transferkit.freezing import GradualUnfreezing
        >>> from transferkit.optim import param_groups
        >>> from transferkit.schedules import StepDecay
        >>> model = create_model("timm/test_efficientnet", weights=None, num_classes=2)
        >>> optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
        >>> recipe = Recipe(GradualUnfreezing(), lr=0.1, schedule=StepDecay(every=2, gamma=0.5))
        >>> lrs = lr_over_time(model, recipe, optimizer, epochs=3, steps_per_epoch=8)
        >>> [(each["stage5"], each["head"]) for each in lrs]
        [(None, 0.1), (0.1, 0.1), (0.05, 0.05)]
    """
    starts = range(0, epochs * steps_per_epoch, steps_per_epoch)
    own = _own_lrs(model, optimizer)
    return [_lrs_at(step, own, recipe, epochs=epochs, steps_per_epoch=steps_per_epoch) for step in starts]


def _own_lrs(model: TransferModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the lr of each stage's first group; 0 where a stage has no parameters."""
    groups = optimizer.param_groups
    group_of = {id(each): index for index, group in enumerate(groups) for each in group["params"]}
    firsts = {
        stage.name: min((group_of[id(each)] for each in stage.parameters), default=None) for stage in model.stages
    }
    return {name: 0.0 if first is None else float(groups[first]["lr"]) for name, first in firsts.items()}


def _lrs_at(
    step: int, own: Mapping[str, float], recipe: Recipe, *, epochs: int, steps_per_epoch: int
) -> dict[str, float | None]:
    """Return each stage's lr in one step, by the function that sets it in training."""
    names = list(own)
    frozen = recipe.policy.frozen_stages(names, step // steps_per_epoch)
    factor = factor_at(
        recipe.schedule,
        recipe.policy,
        head_lr=own[names[-1]],
        step=step,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
    )
    return {name: None if name in frozen else lr * factor for name, lr in own.items()}


def _lr_table(
    model: TransferModel, recipe: Recipe, optimizer: torch.optim.Optimizer, *, epochs: int, steps_per_epoch: int
) -> list[str]:
    """Write a row per stage, and a column for each of a few steps that show the shape."""
    steps = _telling_steps(model, recipe, optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)
    own = _own_lrs(model, optimizer)
    at = [_lrs_at(step, own, recipe, epochs=epochs, steps_per_epoch=steps_per_epoch) for step in steps]
    places = [divmod(step, steps_per_epoch) for step in steps]
    rows = [
        ["lr", "trains in", "weight", *(f"epoch {epoch + 1}" for epoch, _ in places)],
        ["", "epochs", "decay", *(f"step {step + 1}" for _, step in places)],
    ]
    for stage in model.stages:
        mine = {id(parameter) for parameter in stage.parameters}
        decays = {
            group["weight_decay"] for group in optimizer.param_groups if mine & {id(each) for each in group["params"]}
        }
        trains = [stage.name not in recipe.policy.frozen_stages(model.stage_names, epoch) for epoch in range(epochs)]
        lrs = [each[stage.name] for each in at]
        rows.append(
            [
                stage.name,
                _ranges(trains),
                " / ".join(f"{decay:g}" for decay in sorted(decays)),
                *("–" if lr is None else f"{lr:.2g}" for lr in lrs),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()  # names left, numbers right
        for row in rows
    ]
    return [*lines, *_condition(recipe.schedule)]


def _ranges(flags: Sequence[bool]) -> str:
    """Write where flags are set, counted from 1.

    Example:
        >>> _ranges([True, False, True, True])
        '1, 3–4'
    """
    runs = []
    for is_set, run in groupby(enumerate(flags, 1), key=lambda each: each[1]):
        first, *rest = (number for number, _ in run)
        if is_set:
            runs.append(f"{first}–{rest[-1]}" if rest else f"{first}")
    return ", ".join(runs) or "–"


def _condition(schedule: Schedule) -> list[str]:
    """Say what a table of a schedule that looks at a metric cannot know."""
    if isinstance(schedule, Plateau):
        change = "falling" if schedule.mode == "min" else "rising"
        return [f"until {schedule.monitor} stops {change}, then × {schedule.factor:g} each time"]
    if isinstance(schedule, MetricSchedule):
        return [f"until {schedule.monitor} decides otherwise"]
    return []


def _telling_steps(
    model: TransferModel, recipe: Recipe, optimizer: torch.optim.Optimizer, *, epochs: int, steps_per_epoch: int
) -> list[int]:
    """Choose steps that show the shape: the ends, then peaks, then the first ones of phases, then of other epochs."""
    run = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
    rows = lr_over_time(model, recipe, optimizer, **run)
    spans = {span_of(recipe.policy, epoch, epochs=epochs) for epoch in range(epochs)}
    phases = {*recipe.policy.changes(model.stage_names, epochs), *(start for start, _ in spans)}
    changes = {epoch for epoch in range(1, epochs) if rows[epoch] != rows[epoch - 1]}
    starts = [{epoch * steps_per_epoch for epoch in some} for some in (phases, changes)]
    if isinstance(recipe.schedule, MetricSchedule):  # when it falls is not known
        return _spread({0}, starts)
    peaks = {_peak(recipe.schedule, recipe.policy, span, **run) for span in spans}
    return _spread({0, epochs * steps_per_epoch - 1}, [peaks, *starts])


def _spread(chosen: set[int], tiers: Sequence[set[int]]) -> list[int]:
    """Add as many steps as there are columns, earlier tiers first, each the farthest from those that are chosen."""
    for tier in tiers:
        while len(chosen) < _COLUMNS and (left := tier - chosen):
            chosen = chosen | {max(sorted(left), key=lambda step: min(abs(step - each) for each in chosen))}
    return sorted(chosen)


def _peak(schedule: Schedule, policy: FreezePolicy, span: tuple[int, int], *, epochs: int, steps_per_epoch: int) -> int:
    """Return the step of a span with the largest lr, for a schedule that rises and falls once."""

    def factor(step: int) -> float:
        return factor_at(schedule, policy, head_lr=1.0, step=step, steps_per_epoch=steps_per_epoch, epochs=epochs)

    start, end = span
    highest = max(range(start, end), key=lambda epoch: factor(epoch * steps_per_epoch))
    around = range(max(start, highest - 1) * steps_per_epoch, min(end, highest + 1) * steps_per_epoch)
    return max(around, key=factor)


def note_enlarging(model: TransferModel, source: LabelledPictures) -> None:
    """Say in the log that pictures are enlarged to more than twice their size; their first one is read for it.

    Args:
        model: What is trained. A stem that was adapted to small pictures has its own line in the log.
        source: The training pictures, 1 or more.

    Raises:
        PictureError: The first picture cannot be read.

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("timm/test_efficientnet", weights=None, num_classes=2, image_size=96)
        >>> note_enlarging(model, [(Image.new("RGB", (64, 48)), 0)])  # says nothing: they are half as large
    """
    if model.small_images != "upsample":
        return
    picture, _ = in_channels(source, model.preprocessing.channels)[0]
    side = min(picture.size if isinstance(picture, Image.Image) else picture.shape[-2:])
    if side < model.preprocessing.size // 2:
        logger.info(
            "pictures of %d px are enlarged to the network's %d px (small_images='upsample'); 'stem' adapts the "
            "network to them instead, and image_size= sets another size",
            side,
            model.preprocessing.size,
        )
