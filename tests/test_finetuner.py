import functools
import io
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder

from transferkit import Finetuner
from transferkit.callbacks import Callback
from transferkit.data import image_folder
from transferkit.exceptions import (
    ArtifactError,
    DataError,
    OutputError,
    SettingError,
    TransferkitError,
    UnknownModelError,
    UnknownStageError,
    WeightsError,
)
from transferkit.history import History
from transferkit.pieces import build_model, make_loader
from transferkit.preprocessing import Preprocessing
from transferkit.sources import PictureData
from transferkit.transforms import eval_transform

COLOURS = ("blue", "green", "red")
TINY = {
    "backbone": "timm/test_efficientnet",
    "weights": None,
    "epochs": 3,
    "policy": "full",
    "lr": 3e-3,
    "image_size": 32,
    "batch_size": 8,
    "num_workers": 0,
    "device": "cpu",
    "progress": False,
}


def tuner_of(**settings):
    settings = {**TINY, **settings}
    return Finetuner(settings.pop("backbone"), **settings)


def fitted(data, **settings):
    tuner = tuner_of(**settings)
    tuner.fit(data)
    return tuner


@pytest.fixture(scope="module")
def run(picture_folder, tmp_path_factory):
    """A finished run and its output folder, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return fitted(picture_folder, output_dir=folder), folder


def assert_equal_weights(first, second):
    first, second = first.model.network.state_dict(), second.model.network.state_dict()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


# A whole run


def test_a_run_learns_and_its_best_epoch_is_what_evaluate_measures(run, picture_folder):
    tuner, _ = run
    assert len(tuner.history) == 3
    best = tuner.history.best()
    assert best.val_accuracy > 0.6
    for data in (picture_folder, picture_folder / "val", ImageFolder(picture_folder / "val")):
        result = tuner.evaluate(data)
        assert result["accuracy"] == best.val_accuracy
        assert result["loss"] == pytest.approx(best.val_loss, rel=1e-6)
        assert result["count"] == 18
        assert {name: each["count"] for name, each in result["per_class"].items()} == dict.fromkeys(COLOURS, 6)
    assert json.loads(json.dumps(result)) == result


def test_predictions_on_the_validation_pictures_agree_with_evaluate(run, picture_folder):
    tuner, _ = run
    said = tuner.predict(picture_folder / "val")
    assert [each.path for each in said] == sorted(str(path) for path in (picture_folder / "val").rglob("*.*"))
    right = [each.label == Path(each.path).parent.name for each in said]
    result = tuner.evaluate(picture_folder / "val")
    assert sum(right) / len(right) == result["accuracy"]
    loss = sum(-math.log(each.probabilities[Path(each.path).parent.name]) for each in said) / len(said)
    assert loss == pytest.approx(result["loss"], rel=1e-6)
    for each in said:
        assert tuple(each.probabilities) == COLOURS
        assert sum(each.probabilities.values()) == pytest.approx(1)
        assert (
            (each.label, each.confidence) == each.top(1)[0] == max(each.probabilities.items(), key=lambda pair: pair[1])
        )


def test_a_picture_is_classified_alike_however_it_is_given(run, picture_folder):
    tuner, _ = run
    paths = [picture_folder / "val" / "red" / name for name in ("0.jpg", "1.png")]
    expected = [{**each.__dict__, "path": None} for each in tuner.predict(paths)]
    alone = [tuner.predict(path)[0] for path in paths]
    images = [Image.open(path) for path in paths]
    for said in (
        alone,
        tuner.predict(images),
        tuner.predict(list(map(str, paths))),
        [*tuner.predict(images[0]), alone[1]],
    ):
        for each, other in zip(said, expected, strict=True):
            assert each.label == other["label"]
            assert each.probabilities == pytest.approx(other["probabilities"], rel=1e-5)
    assert [each.path for each in tuner.predict([images[0], paths[1]])] == [None, str(paths[1])]


@pytest.mark.parametrize("mode", [True, False])
def test_predict_and_evaluate_leave_the_mode_of_the_model_alone(run, picture_folder, mode):
    tuner = Finetuner.load(run[1], device="cpu", num_workers=0)
    tuner.model.train(mode)
    tuner.predict(picture_folder / "val" / "red")
    tuner.evaluate(picture_folder / "val")
    assert all(module.training == mode for module in tuner.model.modules())


def test_nothing_to_predict_is_a_data_error(run, tmp_path):
    tuner, _ = run
    with pytest.raises(DataError, match="no pictures"):
        tuner.predict([])
    with pytest.raises(DataError):
        tuner.predict(tmp_path / "missing.jpg")
    with pytest.raises(DataError):
        tuner.predict(tmp_path)


def test_an_output_folder_holds_the_best_model_and_the_history(run, picture_folder):
    tuner, folder = run
    names = ["config.json", "history.csv", "model.safetensors", "validation.csv"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert History.load_csv(folder / "history.csv") == tuner.history
    kept = json.loads((folder / "config.json").read_text())["run"]
    assert kept["best"] == tuner.history.best().to_dict()
    assert kept["settings"]["epochs"] == 3
    assert kept["seconds"] > 0
    loaded = Finetuner.load(folder, device="cpu", num_workers=0, batch_size=8)
    assert_equal_weights(loaded, tuner)
    assert loaded.history == tuner.history
    assert loaded.evaluate(picture_folder) == tuner.evaluate(picture_folder)
    assert loaded.predict(picture_folder / "val") == tuner.predict(picture_folder / "val")


def test_a_saved_run_comes_back(run, tmp_path, picture_folder):
    tuner, _ = run
    assert tuner.save(tmp_path / "final") == tmp_path / "final"
    loaded = Finetuner.load(tmp_path / "final", device="cpu", batch_size=3, num_workers=0)
    assert_equal_weights(loaded, tuner)
    assert loaded.batch_size == 3
    assert loaded.model.class_names == COLOURS
    assert loaded.history == tuner.history
    expected, other = tuner.evaluate(picture_folder), loaded.evaluate(picture_folder)
    assert other["accuracy"] == expected["accuracy"]
    assert other["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_plots_are_drawn_and_saved(run, tmp_path, picture_folder):
    tuner, folder = run
    tuner.plot_history(tmp_path / "curves.png")
    tuner.plot_predictions(tmp_path / "grid.png", count=4)
    Finetuner.load(folder, device="cpu").plot_history(tmp_path / "loaded.png")
    Finetuner.load(folder, device="cpu").plot_predictions(tmp_path / "data.png", count=4, data=picture_folder)
    for name in ("curves.png", "grid.png", "loaded.png", "data.png"):
        with Image.open(tmp_path / name) as figure:
            assert min(figure.size) > 200
    with pytest.raises(SettingError, match="which pictures"):
        Finetuner.load(folder, device="cpu").plot_predictions()


def test_the_default_recipe_trains_the_head_first_and_then_everything(picture_folder):
    epochs = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer):
            epochs.append(trainer.model.frozen)

    tuner = fitted(picture_folder, policy=None, lr=None, callbacks=[Look()])
    body = frozenset(tuner.model.stage_names[:-1])
    assert epochs[0] == body
    assert epochs[-1] == frozenset()
    assert tuner.recipe.policy.changes(tuner.model.stage_names, 3)


def test_a_frozen_body_stays_as_it_was(picture_folder):
    tuner = fitted(picture_folder, policy="head", epochs=2, seed=3)
    fresh = build_model(tuner_of(seed=3), image_folder(picture_folder))
    state, trained = fresh.network.state_dict(), tuner.model.network.state_dict()
    assert {key for key in state if not torch.equal(state[key], trained[key])} == {
        "classifier.weight",
        "classifier.bias",
    }


# Repeatability


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(picture_folder):
    first = fitted(picture_folder, epochs=2, mixup=0.2, dropout=0.2)
    torch.manual_seed(99)
    second = fitted(picture_folder, epochs=2, mixup=0.2, dropout=0.2, num_workers=2)
    assert_equal_weights(first, second)
    assert [row.val_loss for row in first.history] == [row.val_loss for row in second.history]
    other = fitted(picture_folder, epochs=2, mixup=0.2, dropout=0.2, seed=1)
    assert not torch.equal(first.model.network.classifier.weight, other.model.network.classifier.weight)


def test_showing_progress_and_writing_files_change_nothing(run, picture_folder, tmp_path, capsys):
    tuner, _ = run
    loud = fitted(picture_folder, progress=True, output_dir=tmp_path / "run")
    assert_equal_weights(loud, tuner)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "timm/test_efficientnet, random weights, 32 px" in shown.err
    assert "36 training and 18 validation pictures of 3 classes" in shown.err
    assert shown.err.count("val_accuracy") == 3


# Data


def test_data_can_be_a_folder_sources_or_data_sets(run, picture_folder):
    tuner, _ = run
    as_sources = fitted(image_folder(picture_folder))
    as_datasets = fitted((ImageFolder(picture_folder / "train"), ImageFolder(picture_folder / "val")))
    assert as_datasets.model.class_names == as_sources.model.class_names == COLOURS
    assert as_datasets.evaluate(picture_folder)["count"] == 18
    assert_equal_weights(as_sources, tuner)


def test_a_folder_without_a_split_is_split_by_seed(picture_folder):
    tuner = fitted(picture_folder / "train", epochs=1, val_fraction=0.25, seed=4)
    assert (len(tuner.data.train), len(tuner.data.val)) == (27, 9)
    again = fitted(picture_folder / "train", epochs=1, val_fraction=0.25, seed=4)
    assert_equal_weights(tuner, again)
    assert tuner.data.val_counts() == dict.fromkeys(COLOURS, 3)


def test_tensors_of_five_channels_are_trained_on_and_drawn():
    pictures = [(torch.rand(5, 32, 32), index % 2) for index in range(16)]
    tuner = fitted((pictures, pictures), in_chans=5, epochs=1)
    assert tuner.evaluate(pictures)["count"] == 16
    assert len(tuner.plot_predictions(count=3).axes) == 3


@pytest.mark.parametrize("wrapped", [False, True], ids=["a list of pairs", "a class of one's own"])
def test_sources_that_know_nothing_of_channels_are_trained_on_and_drawn(picture_folder, wrapped):
    class Own:
        def __init__(self, pictures):
            self.pictures = pictures

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, index):
            return self.pictures[index]

        def labels(self):
            return [label for _, label in self.pictures]

        def name(self, index):
            return f"picture {index}"

    known = image_folder(picture_folder)
    train, val = ([part[index] for index in range(len(part))] for part in (known.train, known.val))
    data = PictureData(Own(train), Own(val), COLOURS) if wrapped else PictureData(train, val, COLOURS)
    tuner = fitted(data, epochs=1)
    assert tuner.history.best().val_loss == fitted(known, epochs=1).history.best().val_loss
    assert len(tuner.plot_predictions(count=3).axes) == 3


def test_other_data_is_refused(picture_folder):
    with pytest.raises(DataError, match="cannot fit a list"):
        tuner_of().fit([1, 2])
    with pytest.raises(DataError, match=r"must be \(train, val\), got 3"):
        tuner_of().fit((1, 2, 3))
    with pytest.raises(DataError):
        tuner_of().fit(picture_folder / "missing")


def test_balanced_class_weights_are_inverse_to_the_shares(picture_folder, tmp_path):
    for name, count in (("blue", 8), ("red", 2)):
        for part in ("train", "val"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.png").symlink_to(picture_folder / "train" / name / "1.png")
    seen = []

    class Look(Callback):
        def on_fit_start(self, trainer):
            seen.append(trainer.loss_function.weight.tolist())

    fitted(tmp_path, epochs=1, class_weights="balanced", callbacks=[Look()])
    fitted(tmp_path, epochs=1, class_weights=[1.0, 4.0], callbacks=[Look()])
    assert seen == [[0.625, 2.5], [1.0, 4.0]]


# Output folder


def test_nothing_is_written_without_an_output_folder(picture_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted(picture_folder, epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_another_run_is_left_alone_unless_it_may_be_replaced(picture_folder, tmp_path):
    fitted(picture_folder, epochs=1, output_dir=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match=r"already holds a run \(config.json\); choose another folder, go on"):
        fitted(picture_folder, epochs=1, seed=1, output_dir=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    tuner = fitted(picture_folder, epochs=2, seed=1, output_dir=tmp_path, overwrite=True)
    assert_equal_weights(Finetuner.load(tmp_path, device="cpu"), tuner)
    assert len(History.load_csv(tmp_path / "history.csv")) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"data": "missing"}, DataError),
        ({"backbone": "timm/nope"}, UnknownModelError),
        ({"policy": "until:stage99"}, UnknownStageError),
        ({"class_weights": [1.0]}, SettingError),
    ],
)
def test_a_mistake_does_not_cost_the_run_that_was_to_be_replaced(run, picture_folder, tmp_path, settings, error):
    tuner, _ = run
    folder = tuner.save(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = settings.pop("data", picture_folder)
    with pytest.raises(error):
        fitted(data, output_dir=folder, overwrite=True, **settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_folder_that_cannot_be_made_is_named(picture_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        fitted(picture_folder, output_dir=tmp_path / "file" / "run")


# Settings and mistakes


def test_constructing_does_nothing(tmp_path):
    tuner = Finetuner("torchvision/no_such_network", output_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    assert tuner.model is None
    assert tuner.data is None
    assert len(tuner.history) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "half"}, "precision='half'; it can be auto, fp32, bf16, fp16"),
        ({"class_weights": "equal"}, "class_weights='equal'; it can be 'balanced', a list, or None"),
        ({"monitor": "accuracy"}, r"monitor='accuracy'; it can be val_accuracy, .* did you mean 'val_accuracy'"),
        ({"train_preset": "heavy"}, "heavy"),
        ({"eval_preset": "light"}, "light"),
        ({"policy": "heads"}, r"no freeze policy 'heads'; there are head, full, .* did you mean 'head'"),
        ({"schedule": "cosin"}, r"no schedule named 'cosin'; .* did you mean 'cosine'"),
        ({"optimizer": "adam"}, r"no optimizer named 'adam'; give adamw, sgd or a callable"),
        ({"lr": -1.0, "policy": None}, "lr.* above 0"),
    ],
    ids=str,
)
def test_a_wrong_choice_is_named_with_those_there_are_at_construction(settings, message):
    with pytest.raises(SettingError, match=message):
        tuner_of(**settings)


def test_what_only_the_network_or_the_data_can_tell_is_an_error_before_training(picture_folder, tmp_path):
    for settings, error, message in (
        ({"backbone": "timm/test_efficientnut"}, UnknownModelError, "did you mean"),
        ({"weights": tmp_path / "missing.pth"}, WeightsError, "no weights file"),
        ({"policy": "until:stage99"}, UnknownStageError, "stages are stem"),
        ({"class_weights": [1.0, 2.0]}, SettingError, "one weight for each of 3 classes, got 2"),
        ({"device": "cuda:77"}, SettingError, "is not there"),
    ):
        with pytest.raises(error, match=message):
            fitted(picture_folder, **settings)


def test_what_needs_a_model_says_so(picture_folder, tmp_path):
    tuner = tuner_of()
    for call in (
        functools.partial(tuner.evaluate, picture_folder),
        functools.partial(tuner.predict, picture_folder),
        functools.partial(tuner.save, tmp_path / "final"),
        tuner.plot_predictions,
    ):
        with pytest.raises(SettingError, match=r"no model yet: call fit\(DATA\) first, or Finetuner.load"):
            call()
    with pytest.raises(SettingError):
        tuner.plot_history()
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_the_model_does_not_know_is_named(run, tmp_path):
    tuner, _ = run
    (tmp_path / "yellow").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "yellow" / "1.png")
    with pytest.raises(DataError, match="'yellow', which is not among the classes 'blue', 'green', 'red'"):
        tuner.evaluate(tmp_path)


def test_loading_something_else_is_an_artifact_error(tmp_path, run):
    with pytest.raises(ArtifactError, match="holds no saved model"):
        Finetuner.load(tmp_path)
    folder = run[0].save(tmp_path / "run")
    (folder / "history.csv").write_text("nothing\n")
    with pytest.raises(ArtifactError, match="is no history of a run"):
        Finetuner.load(folder)


# Settings that reach the parts


def test_settings_reach_the_parts(picture_folder, tmp_path, caplog):
    seen = {}

    class Look(Callback):
        def on_fit_start(self, trainer):
            seen.update(
                smoothing=trainer.loss_function.label_smoothing,
                optimizer=type(trainer.optimizer).__name__,
                decays={group["weight_decay"] for group in trainer.optimizer.param_groups},
                lrs=sorted({group["lr"] for group in trainer.optimizer.param_groups}),
                accumulate=trainer.accumulate,
                clip=trainer.clip_grad_norm,
            )

    preprocessing = Preprocessing(size=24, resize_size=30, mean=(0.5,) * 3, std=(0.5,) * 3)
    with caplog.at_level(logging.INFO, "transferkit"):
        tuner = fitted(
            picture_folder,
            epochs=1,
            preprocessing=preprocessing,
            image_size=None,
            train_preset="imagenet",
            eval_preset="cifar",
            hidden_size=5,
            label_smoothing=0.1,
            optimizer=functools.partial(torch.optim.RMSprop, alpha=0.9),
            weight_decay=0.2,
            layer_decay=0.5,
            lr=0.01,
            schedule="constant",
            accumulate=3,
            clip_grad_norm=1.5,
            monitor="val_loss",
            callbacks=[Look()],
            output_dir=tmp_path,
        )
    assert seen["smoothing"] == 0.1
    assert seen["optimizer"] == "RMSprop"
    assert seen["decays"] == {0.0, 0.2}
    assert seen["lrs"] == pytest.approx([0.01 * 0.5**depth for depth in range(6, -1, -1)])
    assert (seen["accumulate"], seen["clip"]) == (3, 1.5)
    assert tuner.model.preprocessing == preprocessing
    assert tuner.model.head.hidden_size == 5
    assert "epoch 1: training stem" in caplog.text
    loaded = Finetuner.load(tmp_path, device="cpu")
    assert loaded.model.eval_preset == "cifar"
    assert loaded.model.preprocessing == preprocessing


def test_a_module_of_ones_own_can_be_tuned_saved_and_loaded(picture_folder, tmp_path):
    def network():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 9),
        )

    preprocessing = Preprocessing(size=32, resize_size=32)
    tuner = fitted(
        picture_folder, backbone=network(), weights="default", image_size=None, preprocessing=preprocessing, lr=0.05
    )
    assert tuner.history.best().val_accuracy > 0.6
    tuner.save(tmp_path / "own")
    loaded = Finetuner.load(tmp_path / "own", network=network(), device="cpu")
    assert_equal_weights(loaded, tuner)
    json.dumps(tuner.settings())


def test_the_loss_that_is_no_number_is_told_and_the_output_folder_stays_usable(picture_folder, tmp_path):
    with pytest.raises(TransferkitError, match="lower lr"):
        fitted(picture_folder, lr=1e30, output_dir=tmp_path, schedule="constant")
    assert not (tmp_path / "model.safetensors").exists()
    fitted(picture_folder, epochs=1, output_dir=tmp_path)


def test_a_stream_that_is_no_terminal_gets_no_bar(picture_folder, monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    fitted(picture_folder, epochs=1, progress=True)
    assert "\x1b" not in text.getvalue()
    assert "epoch 1/1" in text.getvalue()


def test_a_loaded_model_trains_on_from_its_own_weights(run, picture_folder):
    tuner, folder = run
    again = Finetuner.load(
        folder, **{**{k: TINY[k] for k in TINY if k not in ("backbone", "weights")}, "policy": "head"}
    )
    again.fit(picture_folder)
    before = tuner.model.network.state_dict()
    body = {key: value for key, value in again.model.network.state_dict().items() if not key.startswith("classifier.")}
    assert body
    assert all(torch.equal(value, before[key]) for key, value in body.items())


def test_the_model_is_ready_to_be_used_after_fitting(run):
    tuner, _ = run
    assert not any(module.training for module in tuner.model.modules())


def test_random_weights_learn_as_fast_as_the_head_and_move_their_statistics(run):
    tuner, _ = run  # of random weights
    assert tuner.recipe.head_lr_multiplier == 1.0
    assert not tuner.model.keep_statistics
    assert tuner_of(weights="default").recipe.head_lr_multiplier > 1.0


@pytest.mark.parametrize(
    ("device", "given", "cores", "workers"),
    [
        ("cpu", None, 2, 0),
        ("cpu", None, 4, 2),
        ("cpu", None, 1, 0),
        ("meta", None, 2, 1),
        ("cpu", 1, 2, 1),
        ("meta", 0, 4, 0),
    ],
)
def test_one_process_reads_per_spare_core_and_one_less_where_a_cpu_computes(
    picture_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, given: int | None, cores: int, workers: int
) -> None:
    monkeypatch.setattr("transferkit.pieces.usable_cores", lambda: cores)
    tuner = Finetuner("timm/test_efficientnet", batch_size=2, num_workers=given, device=device)
    data = image_folder(picture_folder)
    transform = eval_transform("imagenet", Preprocessing(32, 32))
    made = make_loader(tuner, data.train, transform, train=True, channels=3)
    assert (made.num_workers, made.ordered().num_workers) == (workers, workers)
