"""One member of each family of both libraries trains fused, its batch norms keeping statistics, and as it is."""

from __future__ import annotations

import pytest
import torch
from test_families import SIZE, SIZES
from test_splitting_families import FAMILIES, MEMBERS, RATES, WITHOUT, build
from torch import Tensor, nn

from transferkit.fusing import find_fusions, fused
from transferkit.model import TransferModel
from transferkit.randomness import seeded

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

# Of a gradient's length: what moves across a kink of ReLU or of pooling has another gradient altogether.
APART = 0.02


def keeping(family: str) -> TransferModel:
    """Make a family's smallest member with statistics and scales that say something."""
    name = MEMBERS[family]
    rates = [rate for rate in RATES if name.startswith("timm/") and rate not in WITHOUT.get(family, ())]
    model, _ = build(name, SIZES.get(family, SIZE), rates)
    with seeded(3):
        for each in model.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.running_mean is not None:
                each.running_mean.uniform_(-0.1, 0.1)
                each.running_var.uniform_(0.8, 1.2)
                if each.affine:
                    nn.init.uniform_(each.weight, 0.8, 1.2)
    model.keep_statistics = True
    model.network.to(memory_format=torch.channels_last)
    return model.freeze(()).train()


def trained(model: TransferModel, images: Tensor, *, fuse: bool) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Return how much is fused, and logits and gradients of one batch."""
    model.zero_grad()
    found = find_fusions(model, images[:2]) if fuse else []
    with seeded(2), fused(found):
        logits = model(images)
        nn.functional.cross_entropy(logits, torch.arange(4) % 3).backward()
    gradients = {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}
    return len(found), logits.detach(), gradients


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in gradients.values()])


def apart(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_same_logits_and_gradients_where_it_is_fused(family: str) -> None:
    with seeded(1):
        model = keeping(family)
        size, channels = model.preprocessing.size, model.preprocessing.channels
        images = torch.randn(4, channels, size, size).contiguous(memory_format=torch.channels_last)
    _, expected, gradients = trained(model, images, fuse=False)
    count, logits, found = trained(model, images, fuse=True)
    if not count:
        pytest.skip("nothing to fuse")
    assert found.keys() == gradients.keys()
    assert apart(logits, expected) < 1e-3
    off = apart(joined(found), joined(gradients))
    if off >= APART:  # some networks with random weights do not bear rounding, whatever it comes from
        _, _, moved = trained(model, images * (1 + 1e-6), fuse=False)
        assert off < 3 * apart(joined(moved), joined(gradients))
