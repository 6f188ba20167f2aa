"""Two computations are the same but for rounding, or they are not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transferkit.closeness import same_but_for_rounding


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), power=st.integers(-6, 6))
def test_another_order_of_the_same_sum_is_the_same(seed: int, power: int) -> None:
    torch.manual_seed(seed)
    terms = torch.randn(8, 300) * 10.0**power
    order = torch.randperm(300)
    assert same_but_for_rounding(terms[:, order].cumsum(1)[:, -1], terms.cumsum(1)[:, -1])


@settings(deadline=None)
@given(share=st.floats(-3e-4, 3e-4), reordered=st.booleans())
def test_differences_count_as_a_share_of_the_largest_number(share: float, reordered: bool) -> None:
    expected = torch.tensor([0.0, 1000.0])
    moved = expected + torch.tensor([1000 * share, 0.0])
    limit = 1e-4 if reordered else 100 * torch.finfo(torch.float32).eps
    if abs(abs(share) - limit) > 1e-7:
        assert same_but_for_rounding(moved, expected, reordered=reordered) == (abs(share) < limit)


def test_what_ran_in_the_same_order_is_held_to_the_digits_of_its_type() -> None:
    expected = torch.tensor([1.0], dtype=torch.float64)
    assert same_but_for_rounding(expected + 1e-6, expected)
    assert not same_but_for_rounding(expected + 1e-6, expected, reordered=False)
    assert same_but_for_rounding(expected + 1e-14, expected, reordered=False)


def test_small_tensors_can_be_measured_by_something_larger() -> None:
    tiny, zero = torch.tensor([1e-7]), torch.tensor([0.0])
    assert not same_but_for_rounding(tiny, zero)
    assert same_but_for_rounding(tiny, zero, least=1.0)


def test_types_of_few_digits_may_differ_in_their_last_ones() -> None:
    expected = torch.tensor([1.0], dtype=torch.bfloat16)
    assert same_but_for_rounding(expected + 0.03, expected)
    assert not same_but_for_rounding(expected + 0.1, expected)


def test_equal_infinities_are_equal_and_hide_nothing() -> None:
    bounds = torch.tensor([-torch.inf, 1.0, torch.inf])
    assert same_but_for_rounding(bounds.clone(), bounds)
    assert same_but_for_rounding(torch.tensor(torch.inf), torch.tensor(torch.inf))
    assert not same_but_for_rounding(torch.tensor([-torch.inf, 2.0, torch.inf]), bounds)
    assert not same_but_for_rounding(-bounds, bounds)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")])),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (0.0, torch.zeros(1)),
        ((torch.zeros(1), 3), (torch.zeros(1), 4)),
        ((torch.zeros(1),), (torch.zeros(1), torch.zeros(1))),
    ],
    ids=["shape", "type", "no number", "whole numbers", "no tensor", "what is no tensor", "count"],
)
def test_what_rounding_does_not_explain_is_not_the_same(found: object, expected: object) -> None:
    assert not same_but_for_rounding(found, expected)


def test_all_leaves_are_looked_at() -> None:
    expected = {"logits": torch.ones(2), "more": [torch.zeros(0), torch.tensor([4]), None]}
    assert same_but_for_rounding({"logits": torch.ones(2), "more": [torch.zeros(0), torch.tensor([4]), None]}, expected)
