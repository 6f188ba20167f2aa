"""Stages partition any network, in the order in which it runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.backbones import StageNames, split_into_stages


def torchvision_net(name: str) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None)


def timm_net(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False)


class Backwards(nn.Module):
    """Declares its layers in the reverse of the order in which it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)
        self.last = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.last(self.middle(self.first(images))).mean((2, 3)))


class ReadsValues(Backwards):
    """Cannot run without values, as its arithmetic reads one; also draws random numbers in eval mode."""

    def forward(self, images: Tensor) -> Tensor:
        scale = images.sum().item() + 1.0
        return super().forward(nn.functional.dropout(images * scale, 0.5))


class NeverRuns(Backwards):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("wants two pictures")


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.outer(torch.relu(self.inner(self.norm(tokens))))


class Tokens(nn.Module):
    """Has root tensors, used at different moments, and two blocks that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.late_scale = nn.Parameter(torch.ones(8))
        self.never_used = nn.Parameter(torch.ones(2))
        self.register_buffer("offset", torch.zeros(8))
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.blocks = nn.Sequential(*(Mixer(8) for _ in range(3)))
        self.blocks[2].inner.weight = self.blocks[0].inner.weight
        self.fc = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.blocks[1](self.blocks[0](tokens)) + self.offset
        return self.fc((self.blocks[2](tokens) * self.late_scale)[:, 0])


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 8, 3, stride=2, padding=1)
        self.norm = norm
        self.out = nn.Conv2d(8, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(images)))


def with_shared_norm() -> nn.Module:
    """Two blocks at two resolutions that use one and the same batch norm."""
    norm = nn.BatchNorm2d(8)
    blocks = [nn.Conv2d(3, 4, 3, padding=1), Residual(4, 4, norm), Residual(4, 4, norm)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def plain_sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16 * 16, 10),
        nn.Dropout(),
        nn.Linear(10, 2),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], int]] = {
    "resnet18": (torchvision_net("resnet18"), ("fc",), 64),
    "squeezenet1_1": (torchvision_net("squeezenet1_1"), ("classifier.1",), 64),
    "mobilenet_v3_small": (torchvision_net("mobilenet_v3_small"), ("classifier.3",), 64),
    "shufflenet_v2_x0_5": (torchvision_net("shufflenet_v2_x0_5"), ("fc",), 64),
    "resnet10t": (timm_net("resnet10t"), ("fc",), 64),
    "convnext_atto": (timm_net("convnext_atto"), ("head.fc",), 64),
    "vit_tiny": (timm_net("vit_tiny_patch16_224"), ("head",), 224),
    "mobilenetv2_050": (timm_net("mobilenetv2_050"), ("classifier",), 64),
    "deit_tiny_distilled": (timm_net("deit_tiny_distilled_patch16_224"), ("head", "head_dist"), 224),
    "sequential": (plain_sequential, ("8",), 32),
    "backwards": (Backwards, ("fc",), 32),
    "reads values": (ReadsValues, ("fc",), 32),
    "never runs": (NeverRuns, ("fc",), 32),
    "tokens": (Tokens, ("fc",), 32),
    "shared norm": (with_shared_norm, ("5",), 32),
}


def split(name: str) -> tuple[nn.Module, tuple[StageNames, ...]]:
    build, heads, size = NETWORKS[name]
    network = build()
    return network, split_into_stages(network, head_paths=heads, channels=3, size=size)


def stage_with(stages: tuple[StageNames, ...], tensor: str) -> str:
    (name,) = [stage.name for stage in stages if tensor in stage.tensors]
    return name


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_and_every_module_with_tensors_is_in_exactly_one_stage(name: str) -> None:
    network, stages = split(name)
    tensors = dict(itertools.chain(network.named_parameters(), network.named_buffers()))
    by_name = dict(
        itertools.chain(network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    )
    assigned = [id(by_name[key]) for stage in stages for key in stage.tensors]
    assert sorted(assigned) == sorted(id(tensor) for tensor in tensors.values())
    modules = [id(network.get_submodule(path)) for stage in stages for path in stage.modules]
    assert len(modules) == len(set(modules))
    with_tensors = {id(each) for each in network.modules() if each._parameters or each._buffers} - {id(network)}
    assert with_tensors <= set(modules)


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_are_called_stem_then_numbers_then_head(name: str) -> None:
    _, stages = split(name)
    assert [stage.name for stage in stages] == ["stem", *(f"stage{n}" for n in range(1, len(stages) - 1)), "head"]
    assert all(stage.tensors for stage in stages)
    assert {path.rpartition(".")[0] for path in stages[-1].tensors} == set(NETWORKS[name][1])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_left_as_it_was(name: str) -> None:
    build, heads, size = NETWORKS[name]
    network = build().train()
    for index, module in enumerate(network.modules()):
        module.training = index % 3 != 0
    before = {
        "state": {key: (id(value), value.clone()) for key, value in network.state_dict(keep_vars=True).items()},
        "modes": [module.training for module in network.modules()],
        "attributes": [set(vars(module)) for module in network.modules()],
        "gradients": [parameter.requires_grad for parameter in network.parameters()],
        "random": torch.get_rng_state(),
    }
    split_into_stages(network, head_paths=heads, channels=3, size=size)
    assert torch.equal(torch.get_rng_state(), before["random"])
    assert [module.training for module in network.modules()] == before["modes"]
    assert [set(vars(module)) for module in network.modules()] == before["attributes"]
    assert [parameter.requires_grad for parameter in network.parameters()] == before["gradients"]
    for key, tensor in network.state_dict(keep_vars=True).items():
        identity, value = before["state"][key]
        assert id(tensor) == identity
        assert torch.equal(tensor, value)
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        (
            "resnet18",
            {"conv1": "stem", "bn1": "stem", **{f"layer{n}": f"stage{n}" for n in (1, 2, 3, 4)}, "fc": "head"},
        ),
        (
            "squeezenet1_1",
            {"features.0": "stem", "features.3": "stage1", "features.6": "stage2", "features.9": "stage3"},
        ),
        (
            "convnext_atto",
            {"stem": "stem", **{f"stages.{n - 1}": f"stage{n}" for n in (1, 2, 3, 4)}, "head.norm": "stage4"},
        ),
        (
            "vit_tiny",
            {"patch_embed": "stem", **{f"blocks.{n - 1}": f"stage{n}" for n in range(1, 13)}, "norm": "stage12"},
        ),
        (
            "shufflenet_v2_x0_5",
            {"conv1": "stem", "stage2": "stage1", "stage3": "stage2", "stage4": "stage3", "conv5": "stage3"},
        ),
    ],
)
def test_stages_of_known_networks_follow_their_resolutions_or_blocks(name: str, blocks: dict[str, str]) -> None:
    _, stages = split(name)
    found = {
        block: {stage.name for stage in stages if any(key.startswith(f"{block}.") for key in stage.tensors)}
        for block in blocks
    }
    assert found == {block: {stage} for block, stage in blocks.items()}


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "resnet10t", "mobilenetv2_050", "sequential", "backwards", "tokens"]
)
def test_stages_follow_the_order_of_execution_seen_by_hooks(name: str) -> None:
    network, stages = split(name)
    ran: list[str] = []
    paths = {id(module): path for path, module in network.named_modules()}
    for module in network.modules():
        if module._parameters and module is not network:
            module.register_forward_pre_hook(lambda module, inputs: ran.append(paths[id(module)]))
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, NETWORKS[name][2], NETWORKS[name][2]))
    positions = {path: number for number, stage in enumerate(stages) for path in stage.modules}
    order = [positions[path] for path in ran]
    assert order == sorted(order)
    assert len(set(order)) == len(stages)


@pytest.mark.parametrize("name", ["backwards", "reads values"])
def test_order_is_that_of_execution_not_of_declaration(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _, stages = split(name)
    assert [stage.modules[0].split(".")[0] for stage in stages] == ["first", "middle", "last", "fc"]
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype_runs_too(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    stages = split_into_stages(Backwards().to(dtype), head_paths=("fc",), channels=3, size=32)
    assert [stage.modules[0].split(".")[0] for stage in stages] == ["first", "middle", "last", "fc"]
    assert not caplog.records


def test_a_network_that_cannot_run_keeps_its_declared_order_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="transferkit"):
        _, stages = split("never runs")
    body = [path.split(".")[0] for stage in stages[:-1] for path in stage.modules]
    assert list(dict.fromkeys(body)) == ["last", "middle", "first"]
    (record,) = caplog.records
    message = record.getMessage()
    assert "NeverRuns could not run on a made 32-px picture (wants two pictures)" in message
    assert "order of declaration" in message


def test_a_root_tensor_goes_with_the_stage_that_ran_just_before() -> None:
    _, stages = split("tokens")
    assert [stage.name for stage in stages] == ["stem", "stage1", "stage2", "stage3", "head"]
    homes = {key: stage_with(stages, key) for key in ("cls_token", "offset", "late_scale", "never_used")}
    assert homes == {"cls_token": "stem", "offset": "stage2", "late_scale": "stage3", "never_used": "stem"}


def test_tied_tensors_belong_to_their_first_user() -> None:
    _, stages = split("tokens")
    assert stage_with(stages, "blocks.0.inner.weight") == "stage1"
    assert all("blocks.2.inner.weight" not in stage.tensors for stage in stages)


def test_a_module_shared_by_two_stages_belongs_to_the_first() -> None:
    _, stages = split("shared norm")
    holding = [stage.name for stage in stages if any(path.endswith("norm") for path in stage.modules)]
    assert holding == [stage_with(stages, "1.norm.running_mean")] == ["stage1"]


def test_a_block_used_twice_is_one_stage() -> None:
    block = Residual(4, 4, nn.BatchNorm2d(8))
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(block), nn.Sequential(block), nn.Flatten(), nn.Linear(4 * 8 * 8, 2)
    )
    stages = split_into_stages(network, head_paths=("4",), channels=3, size=32)
    assert [stage.name for stage in stages] == ["stem", "stage1", "head"]


def test_layers_without_tensors_go_with_what_ran_before_them() -> None:
    _, stages = split("sequential")
    homes = {path: stage.name for stage in stages for path in stage.modules}
    assert homes["2"] == homes["0"] == "stem"
    assert homes["7"] == homes["6"]
    assert stages[-1].modules == ("8",)


def test_any_number_of_channels_will_do() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    stages = split_into_stages(network, head_paths=("2",), channels=1, size=8)
    assert [stage.name for stage in stages] == ["stem", "head"]
