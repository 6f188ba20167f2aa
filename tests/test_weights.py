"""Weights by path, by tag and from the caches: the right tensors, or one clear sentence; never a pickle's code."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from transferkit import backbones
from transferkit.backbones import load_backbone, read_state_dict
from transferkit.create import create_model
from transferkit.exceptions import WeightsError
from transferkit.model import TransferModel

SQUEEZENET_FILE = "squeezenet1_1-b8a52dc0.pth"
BUNDLED_FILE = Path(backbones.__file__).parent / "bundled" / "model.safetensors"


class NoNetwork(socket.socket):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        raise OSError("this test has no network")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Cut the network, and let torch and the hub look for downloads in an empty folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(socket, "socket", NoNetwork)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets on import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def body(model: TransferModel) -> dict[str, Tensor]:
    heads = tuple(f"{path}." for path in model.head_paths)
    return {key: value for key, value in model.network.state_dict().items() if not key.startswith(heads)}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# --- weights from a file -------------------------------------------------------------------------------------------


def native(name: str) -> nn.Module:
    library, architecture = name.split("/")
    return models.get_model(architecture) if library == "torchvision" else timm.create_model(architecture)


def write(state: dict[str, Tensor], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/mobilenetv2_050"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_fills_the_body_and_the_head_is_new(name: str, suffix: str, as_text: bool, tmp_path: Path) -> None:
    source = native(name)
    file = write(source.state_dict(), tmp_path / f"weights{suffix}")
    model = create_model(name, weights=str(file) if as_text else file, num_classes=3)
    assert equal(body(model), {key: source.state_dict()[key] for key in body(model)})
    head = model.network.get_submodule(model.head_paths[0])
    assert head.weight.shape[0] == 3
    assert model.weights == str(file)


@pytest.mark.parametrize("wrap", [lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state}])
def test_a_state_dict_may_lie_in_a_checkpoint(wrap: Any, tmp_path: Path) -> None:
    source = native("torchvision/squeezenet1_1")
    torch.save(wrap(source.state_dict()), tmp_path / "checkpoint.pth")
    model = create_model("torchvision/squeezenet1_1", weights=tmp_path / "checkpoint.pth", num_classes=3)
    assert torch.equal(model.network.features[0].weight, source.features[0].weight)


def test_a_head_of_any_width_or_none_at_all_fits(tmp_path: Path) -> None:
    source = models.squeezenet1_1(num_classes=7).state_dict()
    write(source, tmp_path / "seven.pth")
    write({key: value for key, value in source.items() if "classifier" not in key}, tmp_path / "bare.pth")
    for file in ("seven.pth", "bare.pth"):
        model = create_model("torchvision/squeezenet1_1", weights=tmp_path / file, num_classes=2)
        assert torch.equal(model.network.features[0].weight, source["features.0.weight"])


def test_weights_of_another_architecture_are_refused_in_one_short_sentence(tmp_path: Path) -> None:
    file = write(models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(WeightsError) as caught:
        create_model("torchvision/squeezenet1_1", weights=file, num_classes=2)
    assert "missing: features.0.weight" in str(caught.value)
    assert "left over: conv1.weight" in str(caught.value)
    assert len(str(caught.value)) < 500


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("hidden_in", [lambda evil: evil, lambda evil: {"features.0.weight": evil}])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_carries_code_is_refused_and_never_runs(hidden_in: Any, legacy: bool, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    file = tmp_path / "weights.pth"
    torch.save(hidden_in(Malicious(target)), file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"weights.pth cannot be read as a state dict"):
        create_model("torchvision/squeezenet1_1", weights=file, num_classes=2)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"these are no weights\n", b"\x00" * 64, b"\x80\x02}q\x00."])
def test_a_file_that_holds_no_weights_is_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="weights"):
        create_model("torchvision/squeezenet1_1", weights=file, num_classes=2)


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {"a": 1}, {}, {"state_dict": {"a": "b"}}])
def test_a_file_that_holds_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="not a state dict of tensors by name"):
        read_state_dict(tmp_path / "other.pth")


@pytest.mark.parametrize("small_images", ["upsample", "stem"])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_a_file_that_cannot_be_read_is_told_before_the_network_is_built(
    name: str, small_images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **keywords: Any) -> nn.Module:
        raise AssertionError("it was built")

    monkeypatch.setattr(models, "get_model", build)
    monkeypatch.setattr(timm, "create_model", build)
    (tmp_path / "empty.pth").touch()
    for file, reason in (("missing.pth", "no weights file at"), ("empty.pth", "it is empty")):
        with pytest.raises(WeightsError, match=reason):
            load_backbone(name, weights=tmp_path / file, small_images=small_images)
    if name.startswith("timm"):
        with pytest.raises(WeightsError, match="no bundled weights for timm/resnet18"):
            load_backbone(name, weights="bundled", small_images=small_images)


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/mobilenetv2_050"])
@pytest.mark.parametrize("file", ["nowhere/weights.pth", "weights.safetensors", "folder/"])
def test_a_missing_file_is_named(name: str, file: str) -> None:
    with pytest.raises(WeightsError, match="no weights file at"):
        create_model(name, weights=file, num_classes=2)


def test_position_embeddings_are_interpolated_from_a_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in models.vit_b_32().state_dict().items()}
    state = {key: torch.ones(1).expand(shape) for key, shape in shapes.items()}  # one stored number per tensor
    state["encoder.pos_embedding"] = torch.randn(shapes["encoder.pos_embedding"])
    torch.save(state, tmp_path / "vit.pth")
    model = create_model("torchvision/vit_b_32", weights=tmp_path / "vit.pth", num_classes=2, image_size=64)
    embedding = model.network.encoder.pos_embedding
    assert embedding.shape == (1, 2 * 2 + 1, 768)
    assert torch.equal(embedding[:, 0], state["encoder.pos_embedding"][:, 0])  # the class token's is kept as it is
    grid = state["encoder.pos_embedding"][0, 1:].T.reshape(1, 768, 7, 7)
    expected = nn.functional.interpolate(grid, size=2, mode="bicubic", align_corners=True)
    torch.testing.assert_close(embedding[0, 1:].T.reshape(1, 768, 2, 2), expected)


# --- weights by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "known"),
    [
        ("torchvision/resnet50", "IMAGENET1K_V3", ["IMAGENET1K_V1", "IMAGENET1K_V2", "did you mean 'IMAGENET1K_V"]),
        ("torchvision/resnet50", "bundled", ["IMAGENET1K_V1"]),
        ("timm/convnext_atto", "d3_in1k", ["d2_in1k", "did you mean 'd2_in1k'"]),
        ("timm/convnext_atto.d3_in1k", "default", ["d2_in1k"]),
        ("timm/convnext_atto.d3_in1k", None, ["d2_in1k"]),
        ("timm/resnet10t", "bundled", ["timm/mobilenetv2_050"]),
    ],
)
def test_an_unknown_tag_is_answered_with_the_known_ones(name: str, weights: str | None, known: list[str]) -> None:
    with pytest.raises(WeightsError) as caught:
        create_model(name, weights=weights, num_classes=2)
    assert "no weights" in str(caught.value) or "no bundled weights" in str(caught.value)
    assert all(each in str(caught.value) for each in known)


def test_torchvision_weights_come_from_torchs_cache_without_a_network(offline: Path) -> None:
    source = models.squeezenet1_1()
    file = offline / "hub" / "checkpoints" / SQUEEZENET_FILE
    file.parent.mkdir(parents=True)
    torch.save(source.state_dict(), file)
    model = create_model("squeezenet1_1", num_classes=2)
    assert equal(body(model), {key: source.state_dict()[key] for key in body(model)})
    assert model.weights == "SqueezeNet1_1_Weights.IMAGENET1K_V1"


def hub_file(offline: Path, repository: str, name: str) -> Path:
    """Make the place where the Hugging Face hub keeps a downloaded file."""
    cached = offline / "hub-cache" / f"models--timm--{repository}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return cached / "snapshots" / ("0" * 40) / name


@pytest.mark.parametrize("name", ["timm/mobilenetv2_050", "timm/mobilenetv2_050.lamb_in1k"])
def test_timm_weights_come_from_the_hubs_cache_without_a_network(name: str, offline: Path) -> None:
    source = native("timm/mobilenetv2_050").state_dict()
    write(source, hub_file(offline, "mobilenetv2_050.lamb_in1k", "model.safetensors"))
    model = create_model(name, num_classes=2)
    assert equal(body(model), {key: source[key] for key in body(model)})
    assert model.weights == "timm mobilenetv2_050.lamb_in1k"
    by_tag = create_model("timm/mobilenetv2_050", weights="lamb_in1k", num_classes=2)
    assert equal(body(by_tag), body(model))


@pytest.mark.parametrize("content", ["malicious", b"", b"no weights", b"\x00" * 64])
def test_what_is_planted_or_damaged_in_a_cache_is_refused_and_never_runs(content: Any, offline: Path) -> None:
    ours = offline / "hub" / "checkpoints" / SQUEEZENET_FILE
    ours.parent.mkdir(parents=True)
    hubs = hub_file(offline, "mobilenetv2_050.lamb_in1k", "pytorch_model.bin")
    for file in (ours, hubs):
        if content == "malicious":
            torch.save({"features.0.weight": Malicious(offline / "pwned")}, file)
        else:
            file.write_bytes(content)
    for name in ("torchvision/squeezenet1_1", "timm/mobilenetv2_050"):
        with pytest.raises(WeightsError, match=f"{name} could not be downloaded or read"):
            create_model(name, num_classes=2)
    assert not (offline / "pwned").exists()


def test_a_damaged_safetensors_file_in_the_hubs_cache_is_refused(offline: Path) -> None:
    hub_file(offline, "mobilenetv2_050.lamb_in1k", "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="timm/mobilenetv2_050 could not be downloaded or read"):
        create_model("timm/mobilenetv2_050", num_classes=2)


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/resnet10t", "timm/resnet10t.c3_in1k"])
def test_a_download_that_fails_says_what_to_do_and_fails_fast(name: str, offline: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        create_model(name, num_classes=2)
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert name in message
    assert "could not be downloaded" in message
    assert "weights=PATH" in message
    assert "\n" not in message


def test_a_timm_model_without_weights_says_so() -> None:
    name = next(name for name in timm.list_models() if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(WeightsError, match=f"timm has no pretrained weights for {name}"):
        create_model(f"timm/{name}", num_classes=2)


def test_random_weights_need_no_network(offline: Path) -> None:
    assert create_model("timm/mobilenetv2_050", weights=None, num_classes=2).weights is None
    assert create_model("torchvision/squeezenet1_1", weights=None, num_classes=2).weights is None


@pytest.mark.skipif(not BUNDLED_FILE.is_file(), reason="the bundled weights are not in this checkout")
def test_the_bundled_weights_need_no_network_and_bring_their_preprocessing(offline: Path) -> None:
    model = create_model("timm/mobilenetv2_050", weights="bundled", num_classes=2)
    assert model.weights == "transferkit bundled"
    assert (model.preprocessing.size, model.preprocessing.resize_size) == (112, 128)
    stored = read_state_dict(BUNDLED_FILE)
    key = "conv_stem.weight"
    assert torch.equal(model.network.state_dict()[key], stored[key].float())
    assert all(value.dtype != torch.float16 for value in model.network.state_dict().values())


@pytest.mark.parametrize("tag", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_torchvision_preprocessing_follows_the_chosen_weights(tag: str, offline: Path) -> None:
    weights = models.MobileNet_V2_Weights[tag]
    file = offline / "hub" / "checkpoints" / Path(weights.url).name
    file.parent.mkdir(parents=True)
    torch.save(models.mobilenet_v2().state_dict(), file)
    loaded = load_backbone("torchvision/mobilenet_v2", weights=tag)
    preset = weights.transforms()
    assert (loaded.preprocessing.size, loaded.preprocessing.resize_size) == (preset.crop_size[0], preset.resize_size[0])
    assert loaded.weights == f"MobileNet_V2_Weights.{tag}"
