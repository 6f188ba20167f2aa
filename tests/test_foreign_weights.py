"""Weights of whatever making: the backbone is found and bit-equal, or one sentence says why not."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file, save_model
from timm.models import adapt_input_conv
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.tresnet import TResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from transferkit.backbones._channels import adapt_channels
from transferkit.backbones._state_dict import read_state_dict
from transferkit.backbones._weights import WeightsReport, fit_state_dict
from transferkit.checkpoint import WEIGHTS, save_artifact
from transferkit.exceptions import SettingError, WeightsError
from transferkit.model import TransferModel

State = dict[str, Tensor]


def vit(num_classes: int = 10, *, size: int = 32, patch: int = 8, **options: Any) -> VisionTransformer:
    return VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=32, depth=2, num_heads=2, num_classes=num_classes, **options
    )


def tv_vit(num_classes: int = 10, *, size: int = 32) -> TorchvisionViT:
    options = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": num_classes}
    return TorchvisionViT(image_size=size, patch_size=8, **options)


def resnet(num_classes: int = 10, *, blocks: tuple[int, ...] = (1, 1, 1, 1)) -> ResNet:
    return ResNet(BasicBlock, list(blocks), num_classes=num_classes)


def tiny(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=num_classes, **options)


def heads(network: nn.Module) -> tuple[str, ...]:
    stated = getattr(network, "pretrained_cfg", {}).get("classifier")
    if stated:
        return (stated,) if isinstance(stated, str) else tuple(stated)
    return ("heads.head",) if isinstance(network, TorchvisionViT) else ("fc" if hasattr(network, "fc") else "head",)


def body(network: nn.Module) -> State:
    own = network.state_dict()
    return {
        key: value for key, value in own.items() if not key.startswith(tuple(f"{path}." for path in heads(network)))
    }


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def noise(**shapes: tuple[int, ...]) -> State:
    return {key.replace("__", "."): torch.randn(shape) for key, shape in shapes.items()}


def assert_equal(network: nn.Module, expected: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    assert all(torch.equal(own[key], value) for key, value in expected.items())


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., WeightsReport]:
    """Write what a training script would have written, and load it into a network."""

    def write_and_load(content: Any, network: nn.Module, *, name: str = "weights.pth") -> WeightsReport:
        file = tmp_path / name
        save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
        return fit_state_dict(network, read_state_dict(file), head_paths=heads(network), source=file.name)

    return write_and_load


@pytest.fixture(scope="module")
def source() -> VisionTransformer:
    return vit()


# --- the shapes that others save in --------------------------------------------------------------------------------


def tiny_efficientnet(num_classes: int = 10) -> nn.Module:
    return tiny("test_efficientnet", num_classes)


@pytest.mark.parametrize(
    ("make", "name"),
    [(vit, name) for name in ("a.pth", "a.th", "a.pt", "a.bin", "a.ckpt", "a.safetensors")]
    + [(make, name) for make in (tv_vit, resnet, tiny_efficientnet) for name in ("a.pth", "a.safetensors")],
)
def test_a_plain_state_dict_is_loaded_whole(make: Any, name: str, load: Any) -> None:
    saved, network = make(10), make(3)
    report = load(saved.state_dict(), network, name=name)
    assert_equal(network, body(saved))
    assert (report.share, report.missing, report.of_another_shape) == (1.0, (), ())
    assert {key.rpartition(".")[0] for key in report.left_over} == set(heads(network))  # ten classes are not three
    assert not any("num_batches_tracked" in key for key in report.matched)


def test_a_head_of_the_same_shape_is_loaded_too(source: nn.Module, load: Any) -> None:
    network = vit()
    assert load(source.state_dict(), network).left_over == ()
    assert_equal(network, source.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "encoder.", "model.", "module.backbone.net."])
def test_a_prefix_is_found_and_named(prefix: str, source: nn.Module, load: Any) -> None:
    network = vit(3)
    report = load({"state_dict": prefixed(prefix, source.state_dict()), "epoch": 7}, network)
    assert_equal(network, body(source))
    assert (report.prefix, report.wrapper, report.share) == (prefix, "state_dict", 1.0)
    assert f"from 'state_dict', keys '{prefix}…'" in str(report)


def test_moco_v2_gives_the_trained_encoder(load: Any) -> None:
    queries, keys, network = resnet(), resnet(), resnet(3)
    projector = noise(fc__0__weight=(512, 512), fc__0__bias=(512,), fc__2__weight=(128, 512), fc__2__bias=(128,))
    state = {
        **prefixed("module.encoder_k.", {**body(keys), **projector}),
        **prefixed("module.encoder_q.", {**body(queries), **projector}),
        "module.queue": torch.randn(128, 16),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    report = load({"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}}, network)
    assert_equal(network, body(queries))
    assert (report.prefix, report.passed_over) == ("module.encoder_q.", ("module.encoder_k.",))
    assert {"fc.0.weight", "module.queue", "module.encoder_k.conv1.weight"} < set(report.left_over)


def test_moco_v3_gives_the_base_encoder(source: nn.Module, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    projector = noise(head__0__weight=(64, 32), head__1__running_mean=(64,), head__3__weight=(16, 64))
    state = {
        **prefixed("module.momentum_encoder.", {**body(vit()), **projector}),
        **prefixed("module.base_encoder.", {**body(source), **projector}),
        **noise(module__predictor__0__weight=(64, 16), module__predictor__1__running_mean=(64,)),
    }
    network = vit(3)
    with caplog.at_level(logging.INFO, logger="transferkit"):
        report = load({"state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, network)
    assert_equal(network, body(source))
    assert report.prefix == "module.base_encoder."
    assert report.missing == report.of_another_shape == ()
    assert "not the equally fitting 'module.momentum_encoder.…'" in caplog.text
    assert caplog.records[-1].levelno == logging.INFO


def test_dino_gives_the_teacher_and_says_so(source: nn.Module, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    projection = noise(head__mlp__0__weight=(64, 32), head__last_layer__weight_v=(128, 16))
    checkpoint = {
        "student": {**prefixed("module.backbone.", body(vit())), **prefixed("module.", projection)},
        "teacher": {**prefixed("backbone.", body(source)), **projection},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", lr=5e-4, crops=[1, 2]),
        "dino_loss": {"center": torch.zeros(1, 128)},
    }
    network = vit(3)
    with caplog.at_level(logging.INFO, logger="transferkit"):
        report = load(checkpoint, network)
    assert_equal(network, body(source))
    assert (report.wrapper, report.prefix) == ("teacher", "backbone.")
    assert set(report.left_over) == set(projection)
    assert "the weights under 'teacher' are taken, not student" in caplog.text
    checkpoint["student"] |= prefixed("module.backbone.", body(source))
    del checkpoint["teacher"]
    report = load(checkpoint, again := vit(3))
    assert_equal(again, body(source))
    assert (report.wrapper, report.prefix) == ("student", "module.backbone.")


def test_a_teacher_beside_its_student_in_one_state_dict_is_preferred(source: nn.Module, load: Any) -> None:
    state = {**prefixed("student.", vit().state_dict()), **prefixed("teacher.backbone.", source.state_dict())}
    report = load({"state_dict": state}, network := vit(3))
    assert_equal(network, body(source))
    assert (report.prefix, report.passed_over) == ("teacher.backbone.", ("student.",))


def mae(network: nn.Module) -> State:
    decoder = noise(
        decoder_embed__weight=(16, 32), decoder_pos_embed=(1, 17, 16), decoder_blocks__0__mlp__fc1__weight=(64, 16)
    )
    return {"mask_token": torch.randn(1, 1, 16), **body(network), **decoder}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_mae_leaves_its_decoder_over(prefix: str, source: nn.Module, load: Any) -> None:
    network = vit(3)
    report = load({"model": prefixed(prefix, mae(source)), "args": argparse.Namespace(blr=1e-3)}, network)
    assert_equal(network, body(source))
    assert (report.share, report.wrapper, report.prefix) == (1.0, "model", prefix)
    assert set(report.left_over) == mae(source).keys() - body(source).keys()


def test_mae_for_an_average_pooled_network_lacks_only_its_norm(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    network = vit(3, global_pool="avg")
    report = load({"model": mae(vit())}, network)
    assert report.missing == ("fc_norm.weight", "fc_norm.bias")
    assert "2 missing: fc_norm.weight, fc_norm.bias" in caplog.text
    assert "keeps its initial values" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


def test_mae_is_resampled_to_another_size_as_timm_does(source: nn.Module, load: Any) -> None:
    network = vit(3, size=48, patch=16)
    report = load({"model": mae(source)}, network)
    expected = checkpoint_filter_fn(dict(body(source)), vit(3, size=48, patch=16))
    assert expected["patch_embed.proj.weight"].shape[-1] == 16
    assert_equal(network, expected)
    assert report.share == 1.0
    assert "decoder_pos_embed" in report.left_over


def test_dinov2_with_registers_goes_through_timms_conversion(load: Any) -> None:
    saved = vit(reg_tokens=2, no_embed_class=True, init_values=1e-5)
    state = body(saved)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([first := torch.randn(1, 1, 32), state["pos_embed"]], 1)
    state["mask_token"] = torch.zeros(1, 32)
    report = load(state, network := vit(3, reg_tokens=2, no_embed_class=True, init_values=1e-5))
    assert report.share == 1.0
    assert_equal(network, {**body(saved), "cls_token": state["cls_token"] + first[:, 0]})


def test_deit_three_keys_become_layer_scales(load: Any) -> None:
    saved, network = vit(init_values=0.3), vit(3, init_values=1e-5)
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): each for key, each in body(saved).items()
    }
    assert load({"model": state}, network).share == 1.0
    assert_equal(network, body(saved))


def beit(num_classes: int = 3, *, size: int = 32, **options: Any) -> Beit:
    options = {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1, **options}
    return Beit(img_size=size, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=num_classes, **options)


def randomize(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


def test_beit_fine_tuned_is_loaded_whole_also_at_another_size(load: Any) -> None:
    saved = randomize(beit(10))
    state = {**saved.state_dict(), "blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    same, larger = beit(), beit(size=48)
    assert load({"model": state}, same).share == load({"module": state}, larger).share == 1.0
    assert_equal(same, body(saved))
    table = "blocks.1.attn.relative_position_bias_table"
    assert larger.state_dict()[table].shape == (11 * 11 + 3, 2)
    assert torch.equal(larger.state_dict()[table][-3:], saved.state_dict()[table][-3:])
    assert_equal(larger, {key: each for key, each in body(saved).items() if not key.endswith("bias_table")})


@pytest.mark.parametrize("size", [32, 48])
def test_beit_pretrained_shares_one_bias_table_that_every_block_gets(size: int, load: Any) -> None:
    saved = randomize(beit(10, use_rel_pos_bias=False, use_shared_rel_pos_bias=True))
    state = {**body(saved), **noise(mask_token=(1, 1, 32), lm_head__weight=(64, 32))}
    report = load({"model": state}, network := beit(size=size))
    assert (report.missing, report.of_another_shape, report.share) == ((), (), 1.0)
    first, second = (network.state_dict()[f"blocks.{i}.attn.relative_position_bias_table"] for i in range(2))
    assert torch.equal(first, second)
    shared = state["rel_pos_bias.relative_position_bias_table"]
    assert torch.equal(first[-3:], shared[-3:])
    assert torch.equal(first, shared) == (size == 32)
    assert {"mask_token", "lm_head.weight", "rel_pos_bias.relative_position_bias_table"} == set(report.left_over)


def test_tables_of_blocks_are_left_over_by_a_network_that_shares_one(load: Any) -> None:
    saved = beit(10, size=48, use_abs_pos_emb=True)
    report = load(body(saved), network := beit(use_abs_pos_emb=True, use_rel_pos_bias=False))
    assert report.share == 1.0
    assert network.pos_embed.shape == (1, 17, 32)
    assert set(report.left_over) == {f"blocks.{i}.attn.relative_position_bias_table" for i in range(2)}


def test_a_masked_image_models_norm_becomes_evas(load: Any) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "qkv_fused": False}
    saved = randomize(Eva(**options, num_classes=10))
    state = {key.replace("fc_norm", "norm"): value for key, value in body(saved).items()} | noise(mask_token=(1, 1, 32))
    network = Eva(**options, num_classes=3)
    assert load({"model": state}, network).share == 1.0
    assert_equal(network, body(saved))


def test_timms_training_checkpoint_gives_the_average(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    live, average, network = (tiny("test_efficientnet") for _ in range(3))
    checkpoint = {
        "epoch": 12,
        "arch": "test_efficientnet",
        "state_dict": live.state_dict(),
        "state_dict_ema": average.state_dict(),
        "optimizer": torch.optim.SGD(live.parameters(), lr=0.1, momentum=0.9).state_dict(),
        "version": 2,
        "args": argparse.Namespace(model="test_efficientnet", lr=0.1, mean=None),
        "metric": 71.2,
    }
    with caplog.at_level(logging.INFO, logger="transferkit"):
        report = load(checkpoint, network)
    assert_equal(network, average.state_dict())
    assert report.wrapper == "state_dict_ema"
    assert "the weights under 'state_dict_ema' are taken, not state_dict" in caplog.text


@pytest.mark.parametrize(
    "ema", [None, {}, {"decay": 0.99, "num_updates": torch.tensor(3), "shadow_params": [torch.ones(2)]}]
)
def test_an_average_that_is_none_is_passed_over(ema: Any, source: nn.Module, load: Any) -> None:
    report = load({"ema": ema, "model": source.state_dict()}, network := vit(3))
    assert_equal(network, body(source))
    assert report.wrapper == "model"


def test_wrappers_lie_in_each_other(source: nn.Module, load: Any) -> None:
    trunk = {"trunk": prefixed("_feature_blocks.", body(source)), "heads": {"0.weight": torch.ones(1)}}
    report = load({"classy_state_dict": {"base_model": {"model": trunk, "meters": {}}}}, network := vit(3))
    assert_equal(network, body(source))
    assert (report.wrapper, report.prefix) == ("classy_state_dict.base_model.model.trunk", "_feature_blocks.")


def test_lightnings_checkpoint_is_opened(load: Any) -> None:
    saved, network = tiny("test_resnet"), tiny("test_resnet", 3)
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {**prefixed("model.", saved.state_dict()), "loss.weight": torch.ones(10)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "hyper_parameters": {"lr": 0.1},
    }
    report = load(checkpoint, network, name="last.ckpt")
    assert_equal(network, body(saved))
    assert report.prefix == "model."
    assert "loss.weight" in report.left_over


def test_an_averaged_model_of_torch_is_opened(load: Any) -> None:
    saved = tiny("test_resnet")
    average = torch.optim.swa_utils.AveragedModel(saved)
    report = load({"model_ema": average.state_dict()}, network := tiny("test_resnet", 3))
    assert_equal(network, body(saved))
    assert (report.prefix, "n_averaged" in report.left_over) == ("module.", True)


def test_a_model_that_transferkit_saved_gives_its_backbone(
    tiny_model: Callable[..., TransferModel], tmp_path: Path
) -> None:
    saved = tiny_model()
    save_artifact(saved, tmp_path)
    network = tiny("test_efficientnet", 1000)
    state = read_state_dict(tmp_path / WEIGHTS)
    report = fit_state_dict(network, state, head_paths=saved.head_paths, source="ours")
    assert_equal(network, body(saved.network))
    assert (report.share, report.prefix, report.wrapper) == (1.0, "", "")
    assert set(report.left_over) == {"classifier.weight", "classifier.bias"}


# --- networks and files that make it hard --------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder."])
def test_an_own_key_that_starts_like_a_prefix_is_kept(prefix: str, load: Any) -> None:
    saved, network = tv_vit(), tv_vit(3)
    report = load(prefixed(prefix, saved.state_dict()), network)
    assert_equal(network, body(saved))
    assert report.prefix == prefix


def test_torchvisions_old_names_are_renamed(load: Any) -> None:
    saved, network = tv_vit(), tv_vit(3)
    state = {
        key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): each for key, each in body(saved).items()
    }
    assert load(state, network).share == 1.0
    assert_equal(network, body(saved))
    options = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}
    dense = models.DenseNet(**options)
    state = {
        key.replace("norm1", "norm.1")
        .replace("norm2", "norm.2")
        .replace("conv1", "conv.1")
        .replace("conv2", "conv.2"): each
        for key, each in dense.state_dict().items()
    }
    assert not state.keys() >= dense.state_dict().keys()
    network = models.DenseNet(**options)
    assert fit_state_dict(network, state, head_paths=["classifier"], source="old").share == 1.0
    assert_equal(network, dense.state_dict())


def test_a_network_that_wants_a_version_beside_its_weights_is_loaded() -> None:
    saved, network = models.MNASNet(0.1), models.MNASNet(0.1)
    assert fit_state_dict(network, dict(saved.state_dict()), head_paths=["classifier.1"], source="file").share == 1.0
    assert_equal(network, saved.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_torchvisions_position_embeddings_are_interpolated(prefix: str, load: Any) -> None:
    saved = tv_vit()
    report = load(prefixed(prefix, saved.state_dict()), network := tv_vit(3, size=64))
    assert report.share == 1.0
    grid = saved.encoder.pos_embedding.detach()[0, 1:].T.reshape(1, 32, 4, 4)
    wanted = nn.functional.interpolate(grid, size=8, mode="bicubic", align_corners=True).reshape(32, 64).T
    torch.testing.assert_close(network.encoder.pos_embedding.detach()[0, 1:], wanted)


class Tied(nn.Module):
    """A head whose name begins like its neighbours', a tied pair and a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight
        self.fc_norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 2)
        self.register_buffer("index", torch.arange(6))


def test_a_neighbour_of_the_head_and_whole_numbers_belong_to_the_backbone(load: Any) -> None:
    saved, network = randomize(Tied()), Tied()
    saved.index.copy_(torch.arange(6).flip(0))
    report = load(saved.state_dict(), network)
    assert {"fc_norm.weight", "fc_norm.bias", "index", "layers.2.weight"} < set(report.matched)
    assert not {"fc.weight", "fc.bias"} & set(report.matched)
    assert_equal(network, saved.state_dict())
    assert network.layers[0].weight is network.layers[2].weight


def test_a_tied_tensor_may_be_in_the_file_once(tmp_path: Path) -> None:
    saved, network = randomize(Tied()), Tied()
    save_model(saved, str(tmp_path / "tied.safetensors"))
    state = read_state_dict(tmp_path / "tied.safetensors")
    assert len(state) < len(saved.state_dict())
    assert fit_state_dict(network, state, head_paths=["fc"], source="tied").missing == ()
    assert_equal(network, saved.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [32, 48])
def test_other_precisions_become_the_networks_own(dtype: torch.dtype, size: int, source: nn.Module, load: Any) -> None:
    state = {key: value.to(dtype) for key, value in source.state_dict().items()}
    network = vit(3, size=size)
    assert load(state, network).share == 1.0
    assert all(value.dtype == torch.float32 for value in network.state_dict().values())
    assert_equal(network, {key: state[key].float() for key in body(source) if key != "pos_embed"})


def test_parameters_and_frozen_networks_are_filled_without_a_gradient(source: nn.Module, load: Any) -> None:
    network = vit(3).requires_grad_(False)
    load({"model": dict(source.named_parameters())}, network)
    assert_equal(network, body(source))
    assert not any(each.requires_grad or each.grad_fn for each in network.parameters())


def test_counters_of_batch_norms_never_count(load: Any) -> None:
    saved, network = tiny("test_resnet"), tiny("test_resnet", 3)
    state = {key: value for key, value in saved.state_dict().items() if "num_batches_tracked" not in key}
    assert load(state, network).missing == ()
    report = load(prefixed("module.", saved.state_dict()), network)
    assert not any("num_batches_tracked" in key for key in (*report.matched, *report.left_over))
    counter = next(key for key in saved.state_dict() if "num_batches_tracked" in key)
    saved.state_dict()[counter].fill_(7)
    load(saved.state_dict(), network)
    assert network.state_dict()[counter] == 7


names = st.text("abcdefgkmoq_", min_size=1, max_size=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return tmp_path_factory.mktemp("random")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.lists(names | st.sampled_from(["blocks", "head", "encoder", "0", "module", "patch_embed"]), max_size=3),
    wrappers=st.lists(st.sampled_from(["state_dict", "model", "teacher", "ema", "module", "network"]), max_size=3),
    beside=st.dictionaries(names, st.integers() | st.text() | st.none(), max_size=3),
    extra=st.sets(names, max_size=3),
)
def test_whatever_the_prefix_and_wrapper_the_weights_are_bit_equal(
    prefix: list[str], wrappers: list[str], beside: dict[str, Any], extra: set[str], source: nn.Module, folder: Path
) -> None:
    start = "".join(f"{each}." for each in prefix)
    content: Any = {**prefixed(start, source.state_dict()), **{f"extra.{each}": torch.ones(2) for each in extra}}
    for wrapper in wrappers:
        content = {**beside, wrapper: content}
    torch.save(content, folder / "random.pth")
    network = vit(3)
    report = fit_state_dict(network, read_state_dict(folder / "random.pth"), head_paths=["head"], source="random")
    assert_equal(network, body(source))
    assert (report.share, report.prefix, report.wrapper) == (1.0, start, ".".join(reversed(wrappers)))
    assert {f"extra.{each}" for each in extra} < set(report.left_over)


# --- channels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "base"), [(1, 3), (2, 3), (4, 3), (7, 3), (3, 4), (1, 12), (3, 1), (3, 3)])
def test_kernels_are_adapted_by_timms_rule(channels: int, base: int) -> None:
    state = {"stem.conv.weight": torch.randn(8, base, 3, 3), "stem.bn.weight": torch.randn(8)}
    before = state["stem.conv.weight"].clone()
    adapted = adapt_channels(state, first_convs=("stem.conv", "absent"), in_chans=channels)
    expected = adapt_input_conv(channels, before.clone(), base_chans=base)
    torch.testing.assert_close(adapted["stem.conv.weight"], expected)
    assert torch.equal(state["stem.conv.weight"], before)
    assert adapted["stem.bn.weight"] is state["stem.bn.weight"]


def test_folded_kernels_are_adapted_by_timms_rule() -> None:
    weight = torch.randn(8, 48, 3, 3)
    one = adapt_channels({"a.weight": weight}, first_convs=["a"], in_chans=1, base_chans=3)["a.weight"]
    torch.testing.assert_close(one, adapt_input_conv(1, weight, base_chans=3))
    six = adapt_channels({"a.weight": weight}, first_convs=["a"], in_chans=6, base_chans=3)["a.weight"]
    grey = torch.randn(2, 16, 1, 5, 5)  # three or six equal channels in each fold are answered alike
    answers = [
        nn.functional.conv2d(grey.repeat(1, 1, n, 1, 1).flatten(1, 2), each) for n, each in ((3, weight), (6, six))
    ]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_half_precision_kernels_stay_half() -> None:
    state = {"a.weight": torch.randn(8, 3, 3, 3).half()}
    assert adapt_channels(state, first_convs=["a"], in_chans=4)["a.weight"].dtype == torch.float16


@pytest.mark.parametrize("channels", [0, -1])
def test_no_channels_at_all_are_refused(channels: int) -> None:
    with pytest.raises(SettingError, match=f"in_chans={channels}; pictures have 1 or more channels"):
        adapt_channels({}, first_convs=["a"], in_chans=channels)


@pytest.mark.parametrize("channels", [1, 4, 5])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_file_for_colour_pictures_fits_other_channels(
    channels: int, name: str, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    saved, network = tiny(name), tiny(name, 3, in_chans=channels)
    with caplog.at_level(logging.INFO, logger="transferkit"):
        report = load(prefixed("module.", saved.state_dict()), network)
    first = f"{saved.pretrained_cfg['first_conv']}.weight"
    assert report.share == 1.0
    assert_equal(network, {key: value for key, value in body(saved).items() if key != first})
    torch.testing.assert_close(network.state_dict()[first], adapt_input_conv(channels, saved.state_dict()[first]))
    assert f"is adapted from 3 to {channels} channels" in caplog.text


def test_torchvisions_first_convolution_is_adapted_too(load: Any) -> None:
    saved, network = resnet(), resnet(3)
    network.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    assert load(saved.state_dict(), network).share == 1.0
    torch.testing.assert_close(network.conv1.weight, saved.conv1.weight.sum(1, keepdim=True))


@pytest.mark.parametrize("channels", [1, 4])
def test_pixels_folded_into_channels_are_told_from_channels(channels: int, load: Any) -> None:
    saved, network = (TResNet([1, 1, 1, 1], in_chans=each, width_factor=0.25) for each in (3, channels))
    report = fit_state_dict(network, saved.state_dict(), head_paths=["head.fc"], source="file")
    assert report.share == 1.0
    adapted = network.body.conv1.conv.weight.unflatten(1, (16, channels))
    folds = saved.body.conv1.conv.weight.unflatten(1, (16, 3))
    torch.testing.assert_close(adapted[:, :, -1], folds.sum(2) if channels == 1 else folds[:, :, 0] * 0.75)


# --- what is refused -----------------------------------------------------------------------------------------------


def refusal(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        fit_state_dict(network, state, head_paths=heads(network), source="file.pth")
    assert_equal(network, before)
    message = str(caught.value)
    assert message.startswith(f"file.pth does not fit {type(network).__name__}: ")
    assert "pass weights of the same architecture" in message
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_under_nine_tenths_nothing_is_loaded_and_the_counts_are_named(source: nn.Module) -> None:
    state = body(source)
    for key in ("cls_token", "norm.weight", "norm.bias"):
        del state[key]
    state["surprise"] = torch.ones(1)
    state["blocks.0.norm1.bias"] = torch.ones(3)
    message = refusal(vit(3), state)
    assert "86 % of the backbone's tensors match, 90 % are needed (26 of 30 matched" in message
    assert "3 missing: cls_token, norm.weight, norm.bias" in message
    assert "1 of another shape: blocks.0.norm1.bias is (3,) in the file, (32,) in the network" in message
    assert "1 left over: surprise" in message
    del state["blocks.0.norm1.bias"]
    state |= {key: source.state_dict()[key] for key in ("cls_token", "blocks.0.norm1.bias")}
    report = fit_state_dict(vit(3), state, head_paths=["head"], source="file.pth")
    assert report.share == pytest.approx(28 / 30)


def test_an_incomplete_backbone_is_a_warning_with_names(
    source: nn.Module, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    state = {**body(source), "norm.bias": torch.ones(3)}
    del state["norm.weight"]
    network = vit(3)
    kept = network.norm.weight.detach().clone()
    report = load(state, network)
    assert (report.missing, report.of_another_shape) == (("norm.weight",), ("norm.bias",))
    assert torch.equal(network.norm.weight, kept)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert (
        "28 of 30 tensors of the backbone are filled; 1 missing: norm.weight; 1 of another shape: norm.bias"
        in record.message
    )


def test_weights_of_another_architecture_are_refused(source: nn.Module) -> None:
    assert "0 of 30 matched; 30 missing: cls_token" in refusal(vit(3), resnet().state_dict())
    assert "left over: cls_token" in refusal(resnet(), source.state_dict())
    assert "missing" in refusal(tiny("test_resnet"), tiny("test_efficientnet").state_dict())
    bottlenecks = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10)
    assert "of another shape" in refusal(resnet(), bottlenecks.state_dict())


def test_weights_of_a_deeper_network_are_refused_though_all_names_match() -> None:
    message = refusal(resnet(), resnet(blocks=(1, 2, 2, 2)).state_dict())
    assert "in blocks that the network lacks: layer2.1.conv1.weight" in message
    assert "30 in blocks" in message
    deeper = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=3)
    assert "24 in blocks that the network lacks: blocks.2.norm1.weight" in refusal(
        vit(3), prefixed("module.", deeper.state_dict())
    )


def test_a_projection_head_or_a_longer_classifier_is_no_deeper_network(load: Any) -> None:
    saved = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    report = fit_state_dict(network, saved.state_dict(), head_paths=["2"], source="file")
    assert (report.share, len(report.left_over)) == (1.0, 6)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


class Configured(argparse.Namespace):
    """A class that is not the allowed one, though it derives from it."""


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("hide", [lambda evil: evil, lambda evil: argparse.Namespace(hook=evil), lambda evil: [evil]])
def test_a_pickle_that_carries_code_is_refused_and_never_runs(hide: Any, legacy: bool, tmp_path: Path) -> None:
    target, file = tmp_path / "pwned", tmp_path / "weights.pth"
    content = {"model": {"a": torch.ones(2)}, "args": hide(Malicious(target))}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError) as caught:
        read_state_dict(file)
    assert not target.exists()
    assert "cannot be read as a state dict (it wants to run posix.mkdir, and code from a file is never run)" in str(
        caught.value
    )
    assert "save its tensors alone" in str(caught.value)


def test_only_the_plain_namespace_is_let_in_and_only_for_the_moment(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())  # a list of a set: in any order
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(a=1)}, tmp_path / "plain.pth")
    assert read_state_dict(tmp_path / "plain.pth").keys() == {"a"}
    torch.save({"model": {"a": torch.ones(2)}, "args": Configured(a=1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="Configured"):
        read_state_dict(tmp_path / "other.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"wants to run torch.nn.modules.linear.Linear"):
        read_state_dict(tmp_path / "module.pth")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"these are no weights\n", b"\x00" * 64, b"\x80\x02}q\x00.", b"PK\x03\x04 zip"])
def test_a_file_that_holds_no_weights_is_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot be read as a state dict|not a state dict of tensors") as caught:
        read_state_dict(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_an_empty_or_truncated_file_says_to_copy_it_again(
    suffix: str, share: float, source: Any, tmp_path: Path
) -> None:
    file = tmp_path / f"weights{suffix}"
    state = source.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match="cannot be read as a state dict") as caught:
        read_state_dict(file)
    assert "copy or download it again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights file at .*nowhere.pth; check the path"):
        read_state_dict(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="it is a folder, name the file in it"):
        read_state_dict(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        [torch.ones(2)],
        {"a": 1},
        {},
        {"state_dict": {"a": "b"}},
        {"state_dict": None, "epoch": 3},
        {"my_net": {"a": torch.ones(2)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    ],
)
def test_a_wrapper_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="not a state dict of tensors by name") as caught:
        read_state_dict(tmp_path / "other.pth")
    assert all(key in str(caught.value) for key in content) if isinstance(content, dict) else True
    assert "torch.save(network.state_dict(), path)" in str(caught.value)


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pth")
    with pytest.raises(WeightsError, match="not a state dict"):
        read_state_dict(tmp_path / "loop.pth")


# --- real weights --------------------------------------------------------------------------------------------------


def test_the_real_mobilenet_fills_torchvisions_and_no_other(assets: Path) -> None:
    state = read_state_dict(assets / "weights" / "mobilenet_v2-77326c9b.pth")
    network = models.mobilenet_v2()
    report = fit_state_dict(network, state, head_paths=["classifier.1"], source="mobilenet")
    assert (report.share, report.left_over) == (1.0, ())
    assert_equal(network, state)
    assert "0 of 260 matched" in refusal(tiny("mobilenetv2_100"), state)
    assert "left over: features.0.0.weight" in refusal(models.resnet18(), state)
