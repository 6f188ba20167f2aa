"""A folder for the Hub opens without transferkit, and its card says what the run knows, all of it and nothing more."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from transferkit import cli
from transferkit.checkpoint import load_artifact, save_artifact
from transferkit.create import adapt, create_model
from transferkit.exceptions import ArtifactError, ExportError, OutputError, SettingError
from transferkit.finetuner import Finetuner
from transferkit.history import EpochRecord, History
from transferkit.hub import export_hub, model_card, push_to_hub
from transferkit.preprocessing import Preprocessing

FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """The output folder of a run over two epochs, on 36 training and 18 validation pictures of three classes."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    tuner = Finetuner(
        "timm/test_efficientnet",
        weights=None,
        policy="last:1",
        epochs=2,
        image_size=32,
        seed=7,
        output_dir=folder,
        cache_dir=folder.parent / "secret-cache",
        progress=False,
        num_workers=0,
    )
    tuner.fit(picture_folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    return export_hub(run, tmp_path_factory.mktemp("hub") / "bees")


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def section(folder: Path, name: str) -> str:
    return card_of(folder).text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def some_card(
    *, weights: str | None = None, licence: str | None = None, history: History | None = None, **changes: Any
) -> ModelCard:
    """The card of a model in words, whose record says these things."""
    own = {
        "backbone": "torchvision/resnet18",
        "weights": weights,
        "native": True,
        "class_names": ["ant", "bee"],
        "preprocessing": Preprocessing().to_dict(),
        "eval_transform": "imagenet",
        "versions": {"transferkit": "0.1.0"},
    }
    config = {"transferkit": {**own, **changes.pop("own", {})}, "model_args": {}, **changes}
    return ModelCard(model_card(config, history or History(), folder="bees", licence=licence))


def test_timm_opens_the_folder_with_equal_logits_and_transferkit_too(folder: Path, run: Path) -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = load_artifact(run)(images)
        assert torch.equal(network(images), expected)
        assert torch.equal(load_artifact(folder)(images), expected)
    assert network.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "history.csv",
        "model.safetensors",
    ]


def test_no_folder_of_this_machine_goes_along(folder: Path, run: Path) -> None:
    assert "secret-cache" in (run / "config.json").read_text(encoding="utf-8")
    for file in folder.iterdir():
        content = file.read_bytes()
        assert b"secret-cache" not in content
        assert str(run.parent).encode() not in content


def test_weights_from_a_file_are_told_by_its_name_alone(tmp_path: Path, tiny_network: Any) -> None:
    torch.save(tiny_network().state_dict(), tmp_path / "mine.pth")
    model = create_model("timm/test_efficientnet", weights=tmp_path / "mine.pth", num_classes=2, image_size=32)
    folder = export_hub(model, tmp_path / "hub")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["transferkit"]["weights"] == "mine.pth"
    assert "| pretrained weights | mine.pth |" in section(folder, "Recipe")
    assert model.weights == str(tmp_path / "mine.pth")


def test_the_head_of_the_card_is_what_the_hub_reads(folder: Path) -> None:
    assert card_of(folder).data.to_dict() == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "transferkit", "timm"],
        "metrics": ["accuracy"],
    }


@pytest.mark.parametrize(
    ("weights", "base", "stated"),
    [
        ("timm mobilenetv2_050.lamb_in1k", "timm/mobilenetv2_050.lamb_in1k", "apache-2.0"),
        ("timm mobilenetv2_050.no_such_tag", None, None),
        ("MobileNet_V2_Weights.IMAGENET1K_V2", None, None),
        ("transferkit bundled", None, "apache-2.0"),
        (None, None, None),
    ],
)
def test_base_model_and_licence_are_those_of_the_pretrained_weights_where_timm_states_them(
    weights: str | None, base: str | None, stated: str | None
) -> None:
    card = some_card(weights=weights)
    assert (card.data.base_model, card.data.license) == (base, stated)
    assert (stated or "stated") in card.text.partition("## Licence")[2].partition("## ")[0]
    given = some_card(weights=weights, licence="cc-by-4.0")
    assert (given.data.base_model, given.data.license) == (base, "cc-by-4.0")
    assert "cc-by-4.0" in given.text


def test_the_card_tells_classes_data_figures_and_recipe_of_the_run(folder: Path, run: Path) -> None:
    best = json.loads((run / "config.json").read_text(encoding="utf-8"))["run"]["best"]
    assert section(folder, "Classes").splitlines()[1:4] == [
        "| logit | class | training pictures | validation pictures |",
        "| --- | --- | --- | --- |",
        "| 0 | blue | 12 | 6 |",
    ]
    assert "Trained on 36 pictures; 18 others were held out" in section(folder, "Data")
    figures = section(folder, "Figures")
    assert f"accuracy {best['val_accuracy']:.4f}, loss {best['val_loss']:.4f} after epoch {best['epoch']}" in figures
    rows = [line for line in figures.splitlines() if re.match(r"\| \d", line)]
    records = History.load_csv(run / "history.csv")
    assert rows == [
        f"| {each.epoch} | {each.train_loss:.4f} | {each.val_loss:.4f} | {each.val_accuracy:.4f} |" for each in records
    ]
    recipe = section(folder, "Recipe")
    for name, value in {
        "backbone": "timm/test_efficientnet",
        "pretrained weights": "none, drawn at random",
        "freeze policy": "TrainLast(count=1)",
        "epochs": "2",
        "seed": "7",
    }.items():
        assert f"| {name} | {value} |" in recipe
    assert "torch " in recipe
    resize_size = load_artifact(run).preprocessing.resize_size
    assert f"The shorter side is resized to {resize_size} pixels, then" in section(folder, "Preprocessing")
    assert "measured on 18 validation pictures" in section(folder, "Limits")


def test_the_interval_of_the_accuracy_is_wilsons() -> None:
    run = {
        "best": {"epoch": 3, "val_accuracy": 0.9, "val_loss": 0.4},
        "data": {"train": {"ant": 250, "bee": 150}, "val": {"ant": 60, "bee": 40}},
    }
    # Newcombe 1998, Statistics in Medicine 17, method 3, for 90 of 100
    assert "(Wilson) is 0.826 to 0.945" in some_card(run=run).text


def test_a_class_without_validation_pictures_counts_none() -> None:
    text = some_card(run={"data": {"train": {"ant": 124, "bee": 121}, "val": {"ant": 70}}}).text
    assert "| 1 | bee | 121 | 0 |" in text
    assert "Trained on 245 pictures; 70 others" in text


def test_without_a_record_the_card_says_so(tmp_path: Path) -> None:
    model = create_model("timm/test_efficientnet", weights=None, class_names=["ant", "bee"], image_size=32)
    folder = export_hub(model, tmp_path / "hub", repo_id="me/bees")
    assert "its pictures are not known" in section(folder, "Data")
    assert "No figures were recorded" in section(folder, "Figures")
    assert card_of(folder).text.startswith("\n# bees\n")
    assert 'timm.create_model("hf-hub:me/bees", pretrained=True)' in section(folder, "Use")
    assert "history.csv" not in [file.name for file in folder.iterdir()]


def test_class_names_of_any_kind_stay_in_their_cells(tmp_path: Path) -> None:
    names = ["a|b", "two\nlines", "日本", '"quoted"']
    model = create_model("timm/test_efficientnet", weights=None, class_names=names, image_size=32)
    rows = section(export_hub(model, tmp_path / "hub"), "Classes").splitlines()
    assert [row for row in rows if re.match(r"\| \d", row)] == [
        "| 0 | a\\|b |",
        "| 1 | two lines |",
        "| 2 | 日本 |",
        '| 3 | "quoted" |',
    ]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_limits_say_whether_confidences_were_calibrated(temperature: float) -> None:
    limits = some_card(own={"temperature": temperature}).text.partition("## Limits")[2]
    assert ("temperature 1.7" in limits) == (temperature != 1.0)
    assert ("not calibrated" in limits) == (temperature == 1.0)


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "torchvision/squeezenet1_1", "torchvision/mnasnet0_5"])
def test_the_lines_that_the_card_shows_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model(name, weights=None, class_names=["ant", "bee"], image_size=64)
    blocks = FENCE.findall(section(export_hub(model, tmp_path / "ants and bees"), "Use"))
    assert len(blocks) == 2
    Image.new("RGB", (80, 70), (200, 180, 40)).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
    with torch.no_grad():
        assert names["network"](torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_a_module_of_the_users_own_is_told_to_be_built_again(tmp_path: Path) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 9)
    )
    model = adapt(network, class_names=["ant", "bee"], preprocessing=Preprocessing(16, 16))
    saved = save_artifact(model, tmp_path / "saved")
    folder = export_hub(saved, tmp_path / "hub")
    assert card_of(folder).data.library_name == "transferkit"
    assert "network=YourModule()" in section(folder, "Use")


def test_a_run_that_is_damaged_or_missing_leaves_nothing(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((run / "config.json").read_bytes())
    (damaged / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-5])
    for source in (damaged, tmp_path / "missing"):
        with pytest.raises(ArtifactError):
            export_hub(source, tmp_path / "hub")
    assert list((tmp_path / "hub").iterdir()) == []


def test_the_runs_own_folder_is_refused(run: Path) -> None:
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(OutputError, match="choose another for the Hub"):
        export_hub(run, run)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


@pytest.mark.parametrize("repo_id", ["bees", "me/bees/2", "me/", "-me/bees", "me/a b"])
def test_what_is_no_name_on_the_hub_is_refused(repo_id: str, run: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="give OWNER/NAME"):
        export_hub(run, tmp_path / "hub", repo_id=repo_id)
    with pytest.raises(SettingError, match="give OWNER/NAME"):
        push_to_hub(folder, repo_id)
    assert not (tmp_path / "hub").exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What would have been asked of the Hub; a folder with the names of the files in it."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(repo_id: str, **options: Any) -> str:
        asked.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(*, folder_path: Path, **options: Any) -> None:
        files = sorted(file.name for file in Path(folder_path).iterdir())
        card = (Path(folder_path) / "README.md").read_text(encoding="utf-8")
        asked.append(("upload_folder", {"files": files, "card": card, **options}))

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return asked


def test_pushing_makes_the_repository_and_uploads_the_folder(folder: Path, hub: list[Any]) -> None:
    assert push_to_hub(folder, "me/bees", private=True) == "https://huggingface.co/me/bees"
    (first, repository), (second, upload) = hub
    assert (first, repository) == ("create_repo", {"repo_id": "me/bees", "private": True, "exist_ok": True})
    assert (second, upload["repo_id"]) == ("upload_folder", "me/bees")
    assert upload["files"] == ["README.md", "config.json", "history.csv", "model.safetensors"]


def test_a_folder_without_a_card_is_not_pushed(run: Path, hub: list[Any]) -> None:
    with pytest.raises(ArtifactError, match=r"has no model card \(README\.md\)"):
        push_to_hub(run, "me/bees")
    assert hub == []


def test_offline_the_hubs_client_refuses_and_one_sentence_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 sets it
    with pytest.raises(ExportError) as error:
        push_to_hub(folder, "me/bees")
    assert str(error.value).startswith("me/bees could not be pushed to (")
    assert "offline mode is enabled" in str(error.value)
    assert "\n" not in str(error.value)


def invoke(*words: object) -> Any:
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    root.handlers[:] = handlers
    return result


def test_the_command_pushes_a_run_with_a_card_of_its_own(run: Path, hub: list[Any]) -> None:
    result = invoke("push", run, "--repo", "me/bees", "--json")
    assert json.loads(result.stdout) == {"repo": "me/bees", "url": "https://huggingface.co/me/bees"}
    assert "README.md" in hub[1][1]["files"]
    assert 'timm.create_model("hf-hub:me/bees"' in hub[1][1]["card"]
    assert hub[0][1]["private"] is False


def test_the_command_pushes_a_folder_for_the_hub_with_the_card_that_is_in_it(
    run: Path, tmp_path: Path, hub: list[Any]
) -> None:
    written = invoke("export", run, "--to", "hub", "--output", tmp_path / "hub")
    assert f"transferkit push {tmp_path / 'hub'}" in written.stdout
    (tmp_path / "hub" / "README.md").write_text("mine", encoding="utf-8")
    invoke("push", tmp_path / "hub", "--repo", "me/bees", "--private")
    assert hub[1][1]["card"] == "mine"
    assert hub[0][1]["private"] is True


def test_every_epoch_is_shown_and_small_pictures_are_described() -> None:
    records = [EpochRecord(epoch, 1 / epoch, 1 / epoch, 0.5, 1.0) for epoch in range(1, 31)]
    run = {"best": records[-1].to_dict()}
    text = some_card(history=History(records), run=run, own={"eval_transform": "cifar"}).text
    assert len(re.findall(r"^\| \d+ \| [\d.]+ \| [\d.]+ \| 0\.5000 \|$", text, re.MULTILINE)) == 30
    assert "the middle 32 × 32 is cut out and resized to 224 × 224" in text
