"""One member of each family of both libraries trains for a step on small pictures."""

from __future__ import annotations

import pytest
import torch
from architectures import smallest_members
from torch import nn

from transferkit.create import create_model
from transferkit.randomness import seeded

pytestmark = pytest.mark.long

SIZE = 64

# The smallest pictures of those that cannot take SIZE: windows, biases and branches of one size, valid convolutions.
SIZES = {
    "timm/byoanet": 256,
    "timm/crossvit": 240,
    "timm/deepseek_vit": 56,
    "timm/efficientformer": 224,
    "timm/inception_resnet_v2": 75,
    "timm/inception_v3": 75,
    "timm/inception_v4": 75,
    "torchvision/inception": 75,
    "torchvision/maxvit": 224,
}

MEMBERS = smallest_members()


@pytest.mark.parametrize("family", MEMBERS)
def test_a_family_trains_what_is_free_and_keeps_what_is_frozen(family: str, caplog: pytest.LogCaptureFixture) -> None:
    size = SIZES.get(family, SIZE)
    with seeded(0):
        model = create_model(MEMBERS[family], weights=None, num_classes=3, image_size=size)
    assert not caplog.records  # the network ran, so its stages follow its execution
    frozen = model.stage_names[: len(model.stage_names) // 2]
    model.freeze(frozen).train()
    # Weight decay moves also what has no gradient to speak of, but only what has one at all.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    with seeded(2):
        loss = nn.functional.cross_entropy(model(images), torch.arange(4) % 3)
    loss.backward()
    optimizer.step()

    assert torch.isfinite(loss)
    # By the state dict, which leaves out what a network only remembers: ConViT's positions, made in its first run.
    after = model.network.state_dict(keep_vars=True)
    for stage in model.stages:
        held = {id(each) for each in (*stage.parameters, *stage.buffers)}
        own = {key: value for key, value in after.items() if id(value) in held}
        if stage.name in frozen:
            moved = [key for key, value in own.items() if not torch.equal(value, before[key])]
            assert not moved, f"{stage.name} is frozen, but {moved} changed"
            continue
        trained = {key: value for key, value in own.items() if isinstance(value, nn.Parameter)}
        without = [key for key, value in trained.items() if value.grad is None]
        assert not without, f"{stage.name} trains, but {without} got no gradient"
        learned = {key for key, value in trained.items() if value.grad.any()}
        assert learned, f"{stage.name} trains, but all its gradients are zero"
        unmoved = [
            key
            for key, value in trained.items()
            if torch.equal(value, before[key]) and (key in learned or before[key].any())
        ]
        assert not unmoved, f"{stage.name} trains, but {unmoved} did not change"
