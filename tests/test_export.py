"""An exported network gives the original's logits, tells how its pictures are prepared, and is written whole or not."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from transferkit import cli, export
from transferkit.checkpoint import save_artifact
from transferkit.create import adapt, create_model
from transferkit.exceptions import ExportError, OutputError, SettingError
from transferkit.export import Export, describe, export_onnx, export_program, sample_images, whole_files
from transferkit.finetuner import Finetuner
from transferkit.model import TransferModel
from transferkit.pictures import find_pictures
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded

EXPORTS = {".onnx": export_onnx, ".pt2": export_program}
suffixes = pytest.mark.parametrize("suffix", EXPORTS)
# A translation to ONNX takes seconds, however small the network.
onnx_is_long = pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.long)])


def made(name: str, size: int = 32, **options: Any) -> TransferModel:
    """A network whose weights and statistics are all random, so that each tensor counts."""
    with seeded(0):
        model = create_model(name, class_names=["ant", "bee", "日本"], weights=None, image_size=size, **options)
    generator = torch.Generator().manual_seed(1)
    for value in model.network.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator) * 0.05)
    return model


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """Open a file as its reader would, without transferkit."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def images(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def assert_gives_the_logits_of(model: TransferModel, path: Path) -> None:
    network, run = copy.deepcopy(model.network).eval(), opened(path)
    for count in (1, 2, 3, 8, 17):
        inputs = images(count, model.preprocessing.size)
        with torch.no_grad():
            expected = network(inputs)
        assert count == 1 or expected.std(0).max() > 1e-3
        torch.testing.assert_close(run(inputs), expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


def state_of(model: TransferModel) -> dict[str, Any]:
    modules = dict(model.network.named_modules())
    return {
        "modes": {name: each.training for name, each in modules.items()},
        "frozen": {name for name, each in modules.items() if "train" in vars(each)},
        "trains": {name for name, each in model.network.named_parameters() if each.requires_grad},
        "types": {name: type(each) for name, each in modules.items()},
        "tensors": {key: value.tolist() for key, value in model.network.state_dict().items()},
        "generator": torch.get_rng_state().tolist(),
    }


@dataclass(frozen=True)
class Exported:
    """A model that trains with frozen stages, what it was before, and its file in each format."""

    model: TransferModel
    before: dict[str, Any]
    after: dict[str, Any]
    found: dict[str, Export]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = made("timm/test_efficientnet")
    model.freeze(model.stage_names[:2]).train()
    folder = tmp_path_factory.mktemp("exported") / "new"
    before = state_of(model)
    found = {suffix: write(model, folder / f"bees{suffix}") for suffix, write in EXPORTS.items()}
    return Exported(model, before, state_of(model), found)


@suffixes
def test_a_file_gives_the_networks_logits_for_batches_of_any_size(exported: Exported, suffix: str) -> None:
    found = exported.found[suffix]
    assert found.path.name == f"bees{suffix}"
    assert sorted(file.name for file in found.path.parent.iterdir()) == ["bees.onnx", "bees.pt2"]
    assert 0 <= found.difference <= 1e-4
    assert_gives_the_logits_of(exported.model, found.path)


@pytest.mark.parametrize(
    ("name", "size", "suffix"),
    [
        ("torchvision/squeezenet1_1", 32, ".pt2"),
        pytest.param("torchvision/squeezenet1_1", 32, ".onnx", marks=pytest.mark.long),
        pytest.param("timm/test_byobnet", 32, ".onnx", marks=pytest.mark.long),
        pytest.param("timm/test_vit", 64, ".pt2", marks=pytest.mark.long),
        pytest.param("timm/test_vit", 64, ".onnx", marks=pytest.mark.long),
    ],
)
def test_other_kinds_of_networks_do_too(name: str, size: int, suffix: str, tmp_path: Path) -> None:
    model = made(name, size)
    assert_gives_the_logits_of(model, EXPORTS[suffix](model, tmp_path / f"network{suffix}").path)


def test_the_original_is_untouched(exported: Exported) -> None:
    assert exported.after == exported.before
    assert exported.before["frozen"]
    assert True in exported.before["modes"].values()


def test_an_onnx_file_names_what_goes_in_and_comes_out(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported.found[".onnx"].path, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("images", ["batch", 3, 32, 32], "tensor(float)")
    assert (made.name, made.shape, made.type) == ("logits", ["batch", 3], "tensor(float)")


@suffixes
def test_a_file_says_how_pictures_are_prepared_and_what_logits_mean(exported: Exported, suffix: str) -> None:
    model, file = exported.model, exported.found[suffix].path
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        texts = session.get_modelmeta().custom_metadata_map
    else:
        texts = dict.fromkeys(describe(model), "")
        torch.export.load(file, extra_files=texts)
    about = {key: json.loads(text) for key, text in texts.items()}
    assert about == {
        "class_names": ["ant", "bee", "日本"],
        "preprocessing": {"transform": "imagenet", **model.preprocessing.to_dict(), "channel_order": "RGB"},
        "temperature": 1.0,
        "backbone": "timm/test_efficientnet",
        "transferkit": about["transferkit"],
    }


def test_the_temperature_of_a_calibrated_model_is_told_and_not_applied() -> None:
    model = made("timm/test_efficientnet")
    model.temperature = 1.5
    assert json.loads(describe(model)["temperature"]) == 1.5


@suffixes
def test_a_file_does_not_tell_where_the_code_lay(exported: Exported, suffix: str) -> None:
    file = exported.found[suffix].path
    contents = [file.read_bytes()]
    if suffix == ".pt2":
        with zipfile.ZipFile(file) as archive:
            contents += [archive.read(name) for name in archive.namelist()]
    folders = [Path(module.__file__).parent for module in (timm, torch, export)]
    assert not [folder for folder in folders for content in contents if str(folder).encode() in content]


@pytest.mark.long
def test_weights_that_are_too_large_for_one_file_lie_in_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_ONE_FILE", 1000)
    model = made("timm/test_efficientnet")
    path = export_onnx(model, tmp_path / "large.onnx").path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert path.stat().st_size < (tmp_path / "large.onnx.data").stat().st_size
    assert_gives_the_logits_of(model, path)


class Small(nn.Module):
    """A network of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).mean((2, 3)))


class ByBatch(Small):
    """Computes something else for large batches, which no graph of one batch shows."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (2 if len(images) > 5 else 1)


class Unsteady(ByBatch):
    """Loses most digits to rounding, too."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 1e5 - 1e5


class Windows(Small):
    """Attends within windows, in five dimensions, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.fused_attn = True

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.conv(images).flatten(2).unflatten(2, (2, 2, -1)).transpose(1, 4)[:, :8]  # (B, 8, 2, 2, C)
        if self.fused_attn:
            seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        else:
            seen = (tokens @ tokens.mT / tokens.shape[-1] ** 0.5).softmax(-1) @ tokens
        return self.fc(seen.mean((1, 2, 3)))


class Decides(Small):
    """Looks at values to know what to do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if float(images.sum()) > 0 else -images)


def adapted(network: nn.Module) -> TransferModel:
    with seeded(0):
        return adapt(network, class_names=["ant", "bee"], preprocessing=Preprocessing(16, 16))


@onnx_is_long
@pytest.mark.parametrize("network", [ByBatch(), Decides()], ids=lambda each: type(each).__name__)
def test_what_cannot_be_exported_is_refused_in_a_sentence_and_an_older_file_stays(
    network: nn.Module, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"network{suffix}"
    path.write_text("older")
    with pytest.raises(ExportError) as error:
        EXPORTS[suffix](adapted(network), path)
    assert str(error.value).startswith(f"module/{type(network).__name__} ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "older"


def test_onnx_that_gives_other_logits_is_told_by_how_much(tmp_path: Path) -> None:
    told = r"gives other logits as \.onnx, off by [0-9.e+-]+ at a batch of 8; it was not written"
    with pytest.raises(ExportError, match=told):
        export_onnx(adapted(ByBatch()), tmp_path / "network.onnx")


def test_a_file_that_does_not_open_is_told_by_the_name_it_would_have_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: str) -> None:
        raise RuntimeError(f"Load model from {file} failed")

    monkeypatch.setattr(export, "onnx_session", broken)
    with pytest.raises(ExportError, match=r"to \.onnx: RuntimeError: Load model from network\.onnx failed$"):
        export_onnx(adapted(Small()), tmp_path / "network.onnx")


@pytest.mark.long
def test_attention_in_windows_goes_into_onnx_though_the_fused_one_does_not(tmp_path: Path) -> None:
    assert export_onnx(adapted(Windows()), tmp_path / "network.onnx").difference < 1e-6


def test_a_network_that_rounding_alone_moves_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"at a batch of 8 \(rounding alone moves them by 0\.00"):
        export_onnx(adapted(Unsteady()), tmp_path / "network.onnx")


def test_a_network_with_a_foreign_forward_is_refused(tmp_path: Path) -> None:
    model = adapted(Small())
    inner = model.network.forward
    model.network.forward = lambda images: inner(images) * 2
    with pytest.raises(ExportError, match=r"cannot be copied to be exported: .*a function in place of its forward"):
        export_program(model, tmp_path / "network.pt2")


@onnx_is_long
def test_a_disk_that_is_full_leaves_the_older_file(
    suffix: str, tmp_path: Path, small_files: Callable[[int], Any]
) -> None:
    path = tmp_path / f"network{suffix}"
    path.write_text("older")
    with small_files(500), pytest.raises(OutputError, match=f"{tmp_path} cannot be written"):
        EXPORTS[suffix](adapted(Small()), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "older"


def test_files_are_moved_only_when_all_is_well(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_files(tmp_path) as place:
            (place / "half.txt").write_text("half")
            raise KeyError("what comes next")

    with pytest.raises(KeyError, match="what comes next"):
        fail()
    assert list(tmp_path.iterdir()) == []


@suffixes
def test_another_ending_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=rf"ends in {suffix}, and .* does not; call it .*bees{suffix}"):
        EXPORTS[suffix](adapted(Small()), tmp_path / "bees.pb")


@pytest.mark.parametrize("shape", [(3, 16, 16), (0, 3, 16, 16), (2, 3, 16, 17), (2, 1, 16, 16)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"give \(N, 3, 16, 16\), N 1 or more"):
        export_program(adapted(Small()), tmp_path / "network.pt2", images=torch.zeros(shape))


def test_logits_are_compared_on_the_images_that_are_given(tmp_path: Path) -> None:
    class Bright(Small):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    seen: list[Tensor] = []
    model = adapted(Bright())
    seen.clear()
    given = images(2, 16)
    export_program(model, tmp_path / "network.pt2", images=given)
    compared = [each for each in seen if type(each) is Tensor and each.any()]
    assert [len(each) for each in compared] == [1, 3, 8]
    assert torch.equal(compared[1], given[[0, 1, 0]])


def test_without_onnxruntime_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime; .*transferkit\[onnxruntime\]"):
        export_onnx(adapted(Small()), tmp_path / "network.onnx")


@pytest.mark.long
@pytest.mark.parametrize("opset", [18, 21])
def test_the_opset_can_be_chosen(opset: int, tmp_path: Path) -> None:
    import onnx

    path = export_onnx(adapted(Small()), tmp_path / "network.onnx", opset=opset).path
    assert [each.version for each in onnx.load(path).opset_import if not each.domain] == [opset]


@pytest.mark.long
def test_an_opset_that_the_exporter_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset=7"):
        export_onnx(adapted(Small()), tmp_path / "network.onnx", opset=7)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_sample_images_are_photographs_as_the_network_takes_them(channels: int) -> None:
    model = made("timm/test_efficientnet", in_chans=channels)
    found = sample_images(model)
    assert found.shape == (8, channels, 32, 32)
    assert found.dtype == torch.float32
    assert torch.equal(found, sample_images(model))
    assert found.flatten(1).std(1).min() > 0.1
    assert len({each.sum().item() for each in found}) == 8


def test_the_command_exports_a_run_and_refuses_other_formats(tmp_path: Path) -> None:
    model = made("timm/test_byobnet")
    save_artifact(model, tmp_path / "run")
    words = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "bees.pt2"), "--json"]
    answer = json.loads(CliRunner().invoke(cli.app, [*words, "--to", "pt2"]).stdout)
    assert (answer["output"], answer["to"]) == (str(tmp_path / "bees.pt2"), "pt2")
    assert 0 <= answer["difference"] <= 1e-4
    assert_gives_the_logits_of(model, tmp_path / "bees.pt2")
    refused = CliRunner().invoke(cli.app, [*words, "--to", "torchscript"])
    assert isinstance(refused.exception, SettingError)
    assert "it can be onnx, pt2 or hub" in str(refused.exception)


def prepared_with_numpy(path: str, how: dict[str, Any]) -> np.ndarray:
    """What the guide shows: one picture as the network takes it."""
    picture = Image.open(path).convert("RGB")
    width, height = (how["resize_size"] * side // min(picture.size) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling[how["interpolation"].upper()])
    left, top = round((width - how["size"]) / 2), round((height - how["size"]) / 2)
    picture = picture.crop((left, top, left + how["size"], top + how["size"]))
    return ((np.asarray(picture) / 255 - how["mean"]) / how["std"]).transpose(2, 0, 1).astype(np.float32)


@pytest.mark.long
def test_onnx_runtime_and_numpy_give_real_pictures_the_same_labels(assets: Path, tmp_path: Path) -> None:
    weights = assets / "weights" / "mobilenet_v2-77326c9b.pth"
    tuner = Finetuner("torchvision/mobilenet_v2", weights=weights, policy="head", epochs=2, progress=False)
    tuner.fit(assets / "hymenoptera_data")
    pictures = find_pictures(assets / "hymenoptera_data" / "val")[0]
    expected = [said.label for said in tuner.predict(pictures)]
    assert len(expected) > 150
    assert set(expected) == {"ants", "bees"}

    session = onnxruntime.InferenceSession(
        export_onnx(tuner.model, tmp_path / "bees.onnx").path, providers=["CPUExecutionProvider"]
    )
    about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    found = []
    for start in range(0, len(pictures), 8):
        batch = np.stack([prepared_with_numpy(path, about["preprocessing"]) for path in pictures[start : start + 8]])
        (logits,) = session.run(["logits"], {"images": batch})
        found += [about["class_names"][index] for index in logits.argmax(1)]
    assert found == expected
