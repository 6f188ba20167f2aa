import random

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from transferkit.randomness import derive_seed, seeded

PARTS = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002


@given(PARTS)
def test_a_seed_is_a_number_that_torch_takes(parts):
    seed = derive_seed(*parts)
    assert seed == derive_seed(*parts)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


@given(PARTS, PARTS)
def test_other_parts_give_another_seed(first, second):
    # SeedSequence takes trailing zeros for nothing, which equal numbers of parts never run into.
    if len(first) == len(second) and first != second:
        assert derive_seed(*first) != derive_seed(*second)


def test_order_and_position_matter():
    seeds = {derive_seed(*parts) for parts in [(0, 1), (1, 0), (1, 1), (0, 0), (0, 2), (2, 0)]}
    assert len(seeds) == 6


def test_seeds_are_the_same_on_every_machine_and_in_every_version():
    assert derive_seed(7, 1, 2) == 3_418_810_207_754_707_518
    assert derive_seed(7, 1, 2) == int(np.random.SeedSequence((7, 1, 2)).generate_state(1, np.uint64)[0]) // 2


def test_negative_parts_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        derive_seed(-1)


def test_a_block_draws_the_same_wherever_the_generators_stand():
    with seeded(0, 3):
        first = draw()
    torch.rand(5), np.random.rand(5), random.random()  # noqa: NPY002
    with seeded(0, 3):
        assert draw() == first
    with seeded(0, 4):
        assert draw() != first


def test_generators_go_on_as_if_there_had_been_no_block():
    def both(block):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
        before = draw()
        if block:
            with seeded(9):
                draw()
        return before, draw()

    assert both(True) == both(False)


def test_generators_are_put_back_after_an_error():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), seeded(5):
        raise ZeroDivisionError
    assert torch.equal(torch.rand(2), expected)


def test_blocks_can_be_nested():
    with seeded(1):
        expected = [draw(), draw()]
    with seeded(1):
        first = draw()
        with seeded(2):
            draw()
        assert [first, draw()] == expected
