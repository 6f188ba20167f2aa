"""The range test trains a copy, stops in time, suggests a rate that trains, and leaves everything as it was."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from transferkit.create import adapt, create_model
from transferkit.data import image_folder
from transferkit.exceptions import DataError, SettingError, TransferkitError, UnknownStageError
from transferkit.freezing import FreezeUntil, FullFinetune, LinearProbe
from transferkit.loading import loader
from transferkit.lr_finder import LRFinding, find_lr
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.trainer import Trainer
from transferkit.transforms import train_transform

Batch = tuple[Tensor, Tensor]
SIZE = Preprocessing(size=8, resize_size=8)


def batches(count: int = 4, *, pictures: int = 16, size: int = 8, seed: int = 0) -> list[Batch]:
    """Noise pictures whose brightness tells one of three classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count * pictures,), generator=generator)
    images = torch.randn(count * pictures, 3, size, size, generator=generator) + labels.view(-1, 1, 1, 1)
    return list(zip(images.split(pictures), labels.split(pictures), strict=True))


def small_model(*, dropout: float = 0.0, seed: int = 0) -> TransferModel:
    """A network of a few hundred weights in several stages."""
    with seeded(seed):
        first = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
        network = nn.Sequential(first, second, nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, 3))
        return adapt(network, num_classes=3, preprocessing=SIZE)


def optimizer_of(
    model: TransferModel, name: Any = "sgd", *, lr: float = 0.1, **options: float
) -> torch.optim.Optimizer:
    return build_optimizer(name, param_groups(model, lr=lr, **options))


def found(model: TransferModel, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> LRFinding:
    given_batches = options.pop("train_batches", None)
    return find_lr(
        model,
        optimizer_of(model) if optimizer is None else optimizer,
        batches() if given_batches is None else given_batches,
        **{"lowest": 1e-4, "steps": 40, "device": "cpu", **options},
    )


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_losses_are_those_of_the_textbook_loop(name: str) -> None:
    model, train = small_model(), batches()
    optimizer = optimizer_of(model, name, layer_decay=0.5, head_lr_multiplier=3.0)
    finding = found(model, optimizer, train_batches=train)

    model.train()
    expected = []
    for step, lr in enumerate(finding.lrs):
        for group in optimizer.param_groups:
            below = model.stage_names[::-1].index(group["stage"])
            group["lr"] = lr * (0.5**below / 3 if below else 1.0)
        images, labels = train[step % len(train)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
    assert finding.losses == pytest.approx(expected, rel=1e-4)


def test_the_optimizer_begins_with_the_state_it_has() -> None:
    model = small_model()
    optimizer = optimizer_of(model, "adamw")
    F.cross_entropy(model(torch.ones(2, 3, 8, 8)), torch.tensor([2, 2])).backward()
    weights = copy.deepcopy(model.state_dict())
    for _ in range(20):
        optimizer.step()
    model.load_state_dict(weights)
    assert found(model, optimizer).losses != found(model, optimizer_of(model, "adamw")).losses


def test_rates_grow_by_one_factor_from_the_lowest_to_the_highest() -> None:
    finding = found(small_model(), lowest=1e-5, highest=1e-2, steps=61)
    assert (finding.lrs[0], finding.lrs[-1]) == pytest.approx((1e-5, 1e-2))
    assert np.diff(np.log(finding.lrs)) == pytest.approx(math.log(1e3) / 60)
    assert len(finding.lrs) == len(finding.losses) == len(finding.smoothed) == 61
    assert finding.suggestion in finding.lrs


RATES: list[list[float]] = []


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that tells what it was asked to do."""

    def step(self, closure: Any = None) -> Any:
        RATES.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


@given(
    lr=st.floats(1e-4, 1.0),
    layer_decay=st.floats(0.3, 1.0),
    head=st.floats(0.1, 10.0),
    highest=st.floats(0.1, 1.0),
)
@settings(deadline=None, max_examples=8)
def test_every_group_keeps_its_ratio_to_the_head_whose_rate_is_reported(
    lr: float, layer_decay: float, head: float, highest: float
) -> None:
    RATES.clear()
    model = small_model()
    optimizer = optimizer_of(model, RecordingSGD, lr=lr, layer_decay=layer_decay, head_lr_multiplier=head)
    lrs = [group["lr"] for group in optimizer.param_groups]
    finding = found(model, optimizer, highest=highest, steps=20)
    assert len(RATES) == len(finding.lrs)
    for taken, reported in zip(RATES, finding.lrs, strict=True):
        assert taken[-1] == pytest.approx(reported)
        assert [each / taken[-1] for each in taken] == pytest.approx([each / lrs[-1] for each in lrs])


@given(seed=st.integers(0, 2**16), scale=st.floats(0.25, 4.0))
@settings(deadline=None, max_examples=6)
def test_on_a_convex_problem_plain_gradient_descent_converges_at_the_suggested_rate(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (64,), generator=generator)
    centres = torch.randn(3, 12, generator=generator)
    features = scale * (centres[labels] + 0.5 * torch.randn(64, 12, generator=generator))
    with seeded(seed):
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        model = adapt(network, num_classes=3, preprocessing=Preprocessing(size=2, resize_size=2))
    data = [(features.view(64, 3, 2, 2), labels)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    suggestion = find_lr(model, optimizer, data, device="cpu").suggestion

    # The Hessian of softmax cross-entropy is at most half the second moment of its inputs (Böhning 1992).
    inputs = torch.cat([features, torch.ones(64, 1)], 1)
    curvature = 0.5 * torch.linalg.eigvalsh(inputs.T @ inputs / 64)[-1].item()
    assert 0.05 / curvature < suggestion < 2 / curvature, "gradient descent crawls below and may diverge above"

    losses = []
    for group in optimizer.param_groups:
        group["lr"] = suggestion
    for _ in range(50):
        optimizer.zero_grad()
        loss = model.loss(model(data[0][0]), labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert all(after < before for before, after in pairwise(losses))


def test_it_ends_early_when_the_loss_explodes_and_leaves_that_step_out() -> None:
    finding = found(small_model(), highest=1e9, steps=100)
    assert 20 < len(finding.lrs) < 100
    assert all(map(math.isfinite, finding.losses))
    assert finding.smoothed[-1] <= 4 * min(finding.smoothed)
    assert finding.suggestion < finding.lrs[int(np.argmin(finding.smoothed))]


def test_a_loss_that_is_no_number_ends_it() -> None:
    train = batches()

    def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) * (math.nan if next(steps) == 30 else 1.0)

    steps = iter(range(100))
    finding = found(small_model(), train_batches=train, highest=1.0, steps=40, loss_function=loss_function)
    assert len(finding.losses) == 30


def test_class_weights_and_label_smoothing_come_with_the_loss_function() -> None:
    model = small_model()
    loss_function = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]), label_smoothing=0.2)
    images, labels = batches()[0]
    first = found(model, loss_function=loss_function).losses[0]
    assert first == pytest.approx(loss_function(model.train()(images), labels).item())


def test_it_is_a_function_of_the_seed() -> None:
    model = small_model(dropout=0.5)
    first, _, other = found(model, seed=3), torch.rand(7), found(model, seed=4)
    assert found(model, seed=3) == first
    assert other.losses != first.losses


# --- what is frozen ---------------------------------------------------------------------------------------------------


def watch(model: TransferModel) -> dict[str, list[tuple[bool, Tensor]]]:
    """Record the mode and running mean of each batch norm at each call, of copies too."""
    seen: dict[str, list[tuple[bool, Tensor]]] = {}
    for name, module in model.network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.setdefault(name, []).append(
                    (module.training, module.running_mean.clone())
                )
            )
    return seen


def test_frozen_stages_keep_their_statistics_on_the_copy_too() -> None:
    model = small_model()
    model.freeze(["stem"])
    seen = watch(model)
    found(model)
    assert list(seen) == ["0.1", "1.1"]
    for name, trains in (("0.1", False), ("1.1", True)):
        assert {mode for mode, _ in seen[name]} == {trains}
        assert {bool(mean.any()) for _, mean in seen[name]} == {trains}, "a running mean begins at 0"


def test_a_policy_decides_what_is_frozen_in_the_test_and_nothing_afterwards() -> None:
    model = small_model()
    now, probe = found(model), found(model, policy=LinearProbe())
    assert model.frozen == frozenset()
    assert probe.losses != now.losses
    assert found(model.freeze(model.stage_names[:-1])).losses == probe.losses
    assert found(model, policy=FullFinetune()).losses == now.losses
    assert model.frozen == frozenset(model.stage_names[:-1])


# --- what it leaves as it was -----------------------------------------------------------------------------------------


def everything(model: TransferModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy all that must not change."""
    state = {
        "tensors": model.state_dict(),
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "frozen": model.frozen,
        "optimizer": optimizer.state_dict(),
        "held": [[id(each) for each in group["params"]] for group in optimizer.param_groups],
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    return copy.deepcopy(state)


def assert_same(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


class BrokenBatches(list[Batch]):
    """Batches, one of which cannot be read, from a source that draws random numbers."""

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(super().__iter__()):
            random.random()
            np.random.rand()  # noqa: NPY002
            if index == 3:
                raise DataError("a picture cannot be read")
            yield batch


@pytest.mark.parametrize("ending", ["well", "in an exploding loss", "in an error", "without a suggestion"])
def test_everything_that_was_given_is_bit_equal_afterwards(ending: str) -> None:
    model = small_model(dropout=0.5)
    model.train().network[1][1].eval()  # a mode that no rule gives
    optimizer = optimizer_of(model, "adamw", layer_decay=0.5)
    for images, labels in batches(2):  # gives the optimizer a state and leaves gradients behind
        optimizer.zero_grad()
        model.loss(model(images), labels).backward()
        optimizer.step()
    model.freeze(model.stage_names[:1])
    before = everything(model, optimizer)
    match ending:
        case "well":
            found(model, optimizer, policy=FreezeUntil(model.stage_names[2]))
        case "in an exploding loss":
            assert len(found(model, optimizer, highest=1e9, steps=100).losses) < 100
        case "in an error":
            with pytest.raises(DataError, match="a picture cannot be read"):
                found(model, optimizer, train_batches=BrokenBatches(batches()))
        case _:
            with pytest.raises(SettingError, match="lowers the loss"):
                found(model, optimizer, loss_function=lambda logits, labels: 0 * logits.sum() + 1)
    assert_same(everything(model, optimizer), before)


def test_a_torch_scheduler_on_the_optimizer_does_not_lead_the_copy_to_the_original() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which binds optimizer.step to the original
    before = everything(model, optimizer)
    found(model, optimizer)
    assert_same(everything(model, optimizer), before)


def picture_batches(model: TransferModel, **options: Any) -> Any:
    generator = np.random.default_rng(0)
    pictures = []
    for index in range(24):
        pixels = (80 * (index % 3) + generator.integers(0, 60, (8, 8, 3))).astype(np.uint8)
        pictures.append((Image.fromarray(pixels), index % 3))
    return loader(pictures, train_transform("light", model.preprocessing), batch_size=8, train=True, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_as_if_nothing_had_been_read(num_workers: int) -> None:
    model = small_model()
    train = picture_batches(model, num_workers=num_workers)
    train.sampler.set_epoch(5)
    state, attributes = train.generator.get_state(), dict(vars(train.sampler))
    untouched = [images.clone() for images, _ in picture_batches(model)]
    finding = found(model, train_batches=train, lowest=1e-3, steps=20)
    assert vars(train.sampler) == attributes
    assert torch.equal(train.generator.get_state(), state)
    train.sampler.set_epoch(0)
    assert all(torch.equal(one, other) for one, (other, _) in zip(untouched, train, strict=True))
    assert finding == found(model, train_batches=picture_batches(model), lowest=1e-3, steps=20)


def test_the_order_of_a_plain_data_loader_is_what_it_would_have_been() -> None:
    pairs = [(images, label) for images, labels in batches() for images, label in zip(images, labels, strict=True)]

    def plain() -> Any:
        generator = torch.Generator().manual_seed(7)
        return torch.utils.data.DataLoader(pairs, batch_size=16, shuffle=True, generator=generator)  # type: ignore[arg-type]

    used, fresh = plain(), plain()
    found(small_model(), train_batches=used)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(used, fresh, strict=True))


def test_each_round_through_a_loader_is_another_epoch() -> None:
    epochs: list[int] = []

    class Told(list[Batch]):
        sampler = SimpleNamespace(set_epoch=epochs.append)

    found(small_model(), train_batches=Told(batches(4)), steps=12, lowest=1e-3)
    assert epochs == [0, 1, 2]


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"lowest": 0.0},
        {"lowest": math.nan},
        {"lowest": 1.0, "highest": 0.1},
        {"highest": math.inf},
        {"steps": 9},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(options))):
        found(small_model(), **options)


def test_a_model_that_is_frozen_whole_is_refused() -> None:
    model = small_model()
    model.freeze(model.stage_names)
    with pytest.raises(SettingError, match="every stage is frozen"):
        found(model)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(UnknownStageError, match="stage99"):
        found(small_model(), policy=FreezeUntil("stage99"))


def test_an_optimizer_without_a_rate_for_the_head_is_refused() -> None:
    model = small_model()
    body_only = torch.optim.SGD(model.stages[0].parameters, lr=0.1)
    at_zero = torch.optim.SGD(model.parameters(), lr=0.0)
    for optimizer in (body_only, at_zero):
        with pytest.raises(SettingError, match="no parameter of the head, or lr 0"):
            found(model, optimizer)


@pytest.mark.parametrize("make", [list, lambda: iter(batches(2))], ids=["none", "only once"])
def test_batches_that_run_out_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(DataError, match="can be gone through again"):
        found(small_model(), train_batches=make())


def test_a_first_loss_that_is_no_number_is_refused() -> None:
    images, labels = batches(1)[0]
    with pytest.raises(TransferkitError, match="first batch is no number"):
        found(small_model(), train_batches=[(images * math.nan, labels)])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"lowest": 1e-12, "highest": 1e-11}, "give a higher highest"),
        ({"lowest": 1e3, "highest": 1e9}, "give a lower lowest"),
    ],
)
def test_a_loss_that_never_falls_is_an_error_that_tells_where_to_look(options: dict[str, Any], advice: str) -> None:
    with pytest.raises(SettingError, match=advice):
        found(small_model(), **options)


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_plot_shows_the_losses_over_the_rates_and_marks_the_suggestion(tmp_path: Path) -> None:
    finding = found(small_model())
    figure = finding.plot(tmp_path / "plots" / "lr.png")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    each, smoothed, line, ring = axes.lines
    assert (list(each.get_xdata()), list(each.get_ydata())) == (list(finding.lrs), list(finding.losses))
    assert list(smoothed.get_ydata()) == list(finding.smoothed)
    assert {*line.get_xdata(), *ring.get_xdata()} == {finding.suggestion}
    assert axes.get_title(loc="right") == f"suggested lr {finding.suggestion:.2g}"
    with Image.open(tmp_path / "plots" / "lr.png") as picture:
        assert picture.width > 700


def test_a_late_explosion_does_not_flatten_the_plot() -> None:
    finding = LRFinding(lrs=(0.1, 1.0, 10.0), losses=(2.0, 1.0, 90.0), smoothed=(2.0, 1.5, 5.0), suggestion=1.0)
    (axes,) = finding.plot().axes
    assert 2.0 < axes.get_ylim()[1] < 10


def test_a_suggestion_between_two_rates_is_marked_on_the_line_between_them() -> None:
    finding = LRFinding(lrs=(0.01, 1.0), losses=(2.0, 1.0), smoothed=(2.0, 1.0), suggestion=0.1)
    (axes,) = finding.plot().axes
    assert list(axes.lines[3].get_ydata()) == [pytest.approx(1.5)]


# --- on real pictures -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_on_real_pictures_a_head_trained_at_the_suggestion_tells_ants_from_bees(assets: Path) -> None:
    data = image_folder(assets / "hymenoptera_data")
    weights = assets / "weights" / "mobilenet_v2-77326c9b.pth"
    options = {"weights": weights, "class_names": data.class_names, "image_size": 96, "seed": 0}
    model = create_model("torchvision/mobilenet_v2", **options)  # of other first weights the rate is another one
    model.freeze(model.stage_names[:-1])
    transform = train_transform("light", model.preprocessing)
    train, val = (
        loader(source, transform, batch_size=16, train=part == "train")
        for part, source in (("train", data.train), ("val", data.val))
    )
    suggestion = found(model, optimizer_of(model, "adamw"), train_batches=train, lowest=1e-7, steps=80).suggestion
    assert 1e-4 < suggestion < 1e-2
    trainer = Trainer(model, optimizer_of(model, "adamw", lr=suggestion), policy=LinearProbe(), device="cpu")
    assert max(trainer.fit(train, val, epochs=2)["val_accuracy"]) > 0.85
