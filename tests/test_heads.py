"""The new head: its shape, its keys, its dropout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torchvision import models

from transferkit.exceptions import SettingError
from transferkit.heads import Head, build_head, head_inputs, replace_module

OLD = {"linear": nn.Linear(12, 1000), "conv": nn.Conv2d(12, 1000, kernel_size=1)}
INPUTS = {"linear": torch.ones(4, 12), "conv": torch.ones(4, 12, 3, 3)}


@pytest.mark.parametrize("kind", OLD)
def test_a_plain_head_is_of_the_native_kind(kind: str) -> None:
    new = build_head(OLD[kind], Head(3))
    assert type(new) is type(OLD[kind])
    assert new(INPUTS[kind]).shape[:2] == (4, 3)


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("hidden_size", [None, 8])
def test_dropout_never_renames_a_key(kind: str, hidden_size: int | None) -> None:
    without = build_head(OLD[kind], Head(3, hidden_size=hidden_size))
    dropping = build_head(OLD[kind], Head(3, dropout=0.5, hidden_size=hidden_size))
    assert list(dropping.state_dict()) == list(without.state_dict())
    dropping.load_state_dict(without.state_dict(), strict=True)
    assert torch.equal(dropping.eval()(INPUTS[kind]), without.eval()(INPUTS[kind]))


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("hidden_size", [None, 64])
def test_dropout_acts_in_training_only(kind: str, hidden_size: int | None) -> None:
    head = build_head(OLD[kind], Head(3, dropout=0.5, hidden_size=hidden_size))
    assert not torch.equal(head.train()(INPUTS[kind]), head(INPUTS[kind]))
    assert torch.equal(head.eval()(INPUTS[kind]), head(INPUTS[kind]))


def test_dropout_keeps_the_mean_of_the_inputs() -> None:
    head = build_head(nn.Linear(20_000, 10), Head(1, dropout=0.25)).train()
    with torch.no_grad():
        nn.init.ones_(head.weight)
        assert float(head(torch.ones(1, 20_000))) == pytest.approx(20_000, rel=0.03)


def test_dropout_of_a_convolution_drops_whole_channels() -> None:
    head = build_head(nn.Conv2d(12, 1000, 1), Head(2, dropout=0.5)).train()
    out = head(INPUTS["conv"])
    torch.testing.assert_close(out, out[:, :, :1, :1].expand_as(out))


@pytest.mark.parametrize("kind", OLD)
def test_an_mlp_head_has_one_hidden_layer_of_the_same_kind(kind: str) -> None:
    new = build_head(OLD[kind], Head(3, hidden_size=7))
    first, last = [module for module in new.modules() if type(module) is type(OLD[kind])]
    assert (head_inputs(first), head_inputs(last)) == (12, 7)
    assert new(INPUTS[kind]).shape[:2] == (4, 3)


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("hidden_size", [None, 7])
def test_first_logits_are_near_zero(kind: str, hidden_size: int | None) -> None:
    logits = build_head(OLD[kind], Head(3, hidden_size=hidden_size))(INPUTS[kind])
    assert logits.abs().max().item() < 0.3


def test_the_first_weights_come_from_torchs_global_generator() -> None:
    torch.manual_seed(3)
    first = build_head(OLD["linear"], Head(3))
    torch.manual_seed(3)
    second = build_head(OLD["linear"], Head(3, dropout=0.2))
    assert torch.equal(first.weight, second.weight)


@given(classes=st.integers(1, 50), inputs=st.integers(1, 40), hidden=st.none() | st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_a_head_has_one_output_per_class(classes: int, inputs: int, hidden: int | None) -> None:
    head = build_head(nn.Linear(inputs, 7), Head(classes, hidden_size=hidden))
    assert head(torch.zeros(2, inputs)).shape == (2, classes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be from 1 to 1,000,000, got 0"),
        ({"num_classes": 3, "dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"num_classes": 3, "dropout": -0.1}, "dropout must be at least 0"),
        ({"num_classes": 3, "dropout": float("nan")}, "dropout must be a finite number, at least 0 and below 1"),
        ({"num_classes": 3, "hidden_size": 0}, "hidden_size must be from 1 to 1,000,000"),
    ],
)
def test_wrong_values_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Head(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Conv1d(3, 4, 1)])
def test_other_layers_cannot_be_replaced(layer: nn.Module) -> None:
    with pytest.raises(SettingError, match=f"the head is a {type(layer).__name__}"):
        build_head(layer, Head(3))


def test_the_new_layer_takes_mode_and_dtype_of_the_old_one() -> None:
    network = models.squeezenet1_1().to(torch.float64).eval()
    replace_module(network, "classifier.1", build_head(network.classifier[1], Head(3)))
    assert network.classifier[1].weight.dtype == torch.float64
    assert not network.classifier[1].training
    assert network(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 3)
