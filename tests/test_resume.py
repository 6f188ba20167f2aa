"""A run that was broken off and resumed is the run that was left alone: to the bit, or it is refused by name."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from torch import nn

from resuming import Killed, Stop, assert_equal
from transferkit import Finetuner
from transferkit.callbacks import Callback
from transferkit.exceptions import ArtifactError, OutputError, SettingError
from transferkit.freezing import FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.history import History
from transferkit.interrupts import Interrupted
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.resume import ResumeStore
from transferkit.trainer import Trainer

UNFREEZE = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()}, lr={1: 2e-3})
TINY: dict[str, Any] = {
    "backbone": "timm/test_efficientnet",
    "weights": None,
    "epochs": 3,
    "policy": UNFREEZE,
    "lr": 5e-3,
    "image_size": 32,
    "batch_size": 8,  # 36 pictures: 5 batches, the last one of 4
    "num_workers": 0,
    "device": "cpu",
    "progress": False,
    "checkpoint_interval": 0.0,
}


class Last(Callback):
    """Keeps the whole state that a run ends with, before the best weights take the place of the last ones."""

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self.state = copy.deepcopy(trainer.state_dict())


class Count(Callback):
    """Counts batches."""

    batches = 0

    def on_train_batch_end(self, trainer: Trainer) -> None:
        self.batches += 1


def outcome(tuner: Finetuner) -> dict[str, Any]:
    assert tuner.model is not None
    return {"weights": dict(tuner.model.network.state_dict()), "history": tuner.history.to_dicts()}


def tuner_of(folder: Path | None, *callbacks: Callback, **settings: Any) -> Finetuner:
    settings = {**TINY, "callbacks": callbacks, "output_dir": folder, **settings}
    backbone = settings.pop("backbone")
    return Finetuner(backbone() if callable(backbone) else backbone, **settings)


def fitted(
    data: Any, folder: Path | None, *callbacks: Callback, resume: str | None = None, **settings: Any
) -> Finetuner:
    tuner = tuner_of(folder, *callbacks, **settings)
    tuner.fit(data, resume=resume)
    return tuner


def broken_off(data: Any, folder: Path, *stops: Stop, **settings: Any) -> None:
    """Begin a run and let every stop end it, the next one after it was resumed."""
    for stop in stops:
        with pytest.raises(Killed if stop.kill else Interrupted) as stopped:
            fitted(data, folder, stop, resume="auto", **settings)
        traceback.clear_frames(
            stopped.tb
        )  # loaders in them that meet the garbage collector wait 10 s for their workers
        if stop.kill:
            stop.restore(folder)


# --- what goes on is the same run


def drop_path_network() -> nn.Module:
    with seeded(0):
        network: nn.Module = timm.create_model("test_efficientnet", drop_path_rate=0.4, drop_rate=0.2, num_classes=3)
    return network


OWN = {"backbone": drop_path_network, "image_size": None, "preprocessing": Preprocessing(size=32, resize_size=32)}

CASES: dict[str, tuple[list[Stop], dict[str, Any]]] = {
    "within an epoch before and after the unfreeze": (
        [Stop("on_train_batch_end", 0, 2), Stop("on_train_batch_end", 2, 3)],
        {},
    ),
    "within validation, with an average of the weights": (
        [Stop("on_validation_start", 0), Stop("on_validation_start", 2)],
        {"ema": 0.8, "dropout": 0.3},
    ),
    "at the end of an epoch, with two workers": ([Stop("on_train_batch_start", 1, 4)], {"num_workers": 2}),
    "killed, with the state of an earlier step": (
        [
            Stop("on_fit_start", kill=True),
            Stop("on_train_batch_start", 0, 0, kill=True),
            Stop("on_train_batch_end", 0, 4, kill=True),
            Stop("on_validation_end", 1, kill=True),
            Stop("on_before_optimizer_step", 2, 2, kill=True),
            Stop("on_fit_end", 2, kill=True),
        ],
        {"checkpoint_every": 2, "ema": 0.9, "patience": 3},
    ),
    "mixup and cutmix": ([Stop("on_train_batch_start", 1, 1)], {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1}),
    "accumulation, clipping, momentum": (
        [Stop("on_train_batch_start", 0, 1), Stop("on_train_batch_end", 2, 4)],
        {"accumulate": 2, "optimizer": "sgd", "clip_grad_norm": 0.5, "balanced": True},
    ),
    "plateau": ([Stop("on_validation_start", 1), Stop("on_train_batch_start", 2, 3)], {"schedule": "plateau"}),
    "one cycle": ([Stop("on_train_batch_end", 1, 1)], {"schedule": "one_cycle", "policy": "gradual"}),
    "early stopping that had come": (
        [Stop("on_train_batch_start", 1, 2), Stop("on_fit_end", 1, kill=True)],
        {"policy": "full", "patience": 1, "monitor": "val_loss", "lr": 1e-9, "epochs": 6},
    ),
    "drop path and dropout": ([Stop("on_train_batch_start", 1, 2)], OWN),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_one_that_was_left_alone_to_the_bit(
    case: str, picture_folder: Path, tmp_path: Path
) -> None:
    stops, settings = CASES[case]
    alone, last = Last(), Last()
    wanted = fitted(picture_folder, tmp_path / "alone", alone, **settings)
    broken_off(picture_folder, tmp_path / "run", *(stop.again() for stop in stops), **settings)
    got = fitted(picture_folder, tmp_path / "run", last, resume="auto", **settings)
    assert_equal(outcome(got), outcome(wanted))
    if hasattr(last, "state"):  # else the last epoch was done before
        assert_equal(last.state, alone.state)
    tables = [History.load_csv(tmp_path / name / "history.csv").to_dicts() for name in ("run", "alone")]
    assert_equal(tables[0], tables[1])
    assert (len(got.history) < got.epochs) == (case == "early stopping that had come")


def test_resuming_where_nothing_is_begins_anew(picture_folder: Path, tmp_path: Path) -> None:
    wanted = fitted(picture_folder, None, epochs=1)
    for folder in (tmp_path / "missing", tmp_path):
        assert_equal(outcome(fitted(picture_folder, folder, epochs=1, resume="auto")), outcome(wanted))


def test_resuming_a_finished_run_returns_its_results_and_trains_and_writes_nothing(
    picture_folder: Path, tmp_path: Path
) -> None:
    wanted, count = fitted(picture_folder, tmp_path), Count()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    got = fitted(picture_folder, tmp_path, count, resume="auto")
    assert count.batches == 0
    assert_equal(outcome(got), outcome(wanted))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    assert len(got.predict(picture_folder / "val" / "red")) == 6


def test_what_changes_nothing_of_the_outcome_may_be_another(picture_folder: Path, tmp_path: Path) -> None:
    wanted = fitted(picture_folder, None)
    broken_off(picture_folder, tmp_path / "run", Stop("on_train_batch_start", 1, 2))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = shutil.copytree(picture_folder, tmp_path / "pictures")
    got = fitted(
        moved, tmp_path / "moved", Count(), resume="auto", checkpoint_every=1, num_workers=1, checkpoint_interval=60.0
    )
    assert_equal(outcome(got), outcome(wanted))


# --- what is another run is refused


@pytest.fixture(scope="module")
def half_a_run(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its first epoch, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    broken_off(picture_folder, folder, Stop("on_train_batch_start", 0, 2))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "timm/test_resnet"}, r"has network 'timm/test_efficientnet with .* parameters' and cannot"),
        ({"policy": "head"}, r"has policy 'ScheduledUnfreeze.*' and cannot be resumed with 'LinearProbe\(\)'"),
        ({"lr": 1e-2}, "has lr 0.005 and cannot be resumed with 0.01"),
        ({"seed": 1}, "has seed 0 and cannot be resumed with 1"),
        ({"batch_size": 4}, "has batch_size 8 and cannot be resumed with 4"),
        ({"epochs": 4}, "has epochs 3 and cannot be resumed with 4"),
        ({"schedule": "step"}, r"has schedule 'Cosine\(.*' and cannot be resumed with 'StepDecay\("),
        ({"accumulate": 2, "ema": 0.9}, "accumulate 1 and cannot be resumed with 2, ema None and .* with 0.9"),
        ({"dropout": 0.5}, "has dropout 0.0 and cannot be resumed with 0.5"),
    ],
)
def test_another_setting_is_refused_by_its_name(
    settings: dict[str, Any], message: str, half_a_run: Path, picture_folder: Path
) -> None:
    with pytest.raises(ArtifactError, match=message) as refused:
        fitted(picture_folder, half_a_run, resume="auto", **settings)
    assert "give it the same, or start anew with overwrite=True (--overwrite)" in str(refused.value)
    assert ResumeStore(half_a_run / "resume").read() is not None


def one_more(folder: Path) -> None:
    shutil.copy(folder / "train" / "red" / "0.jpg", folder / "train" / "red" / "100.jpg")


def another_size(folder: Path) -> None:
    shutil.copy(folder / "train" / "red" / "0.jpg", folder / "train" / "red" / "2.jpg")


def another_label(folder: Path) -> None:
    (folder / "train" / "red" / "0.jpg").rename(folder / "train" / "blue" / "100.jpg")


def another_validation(folder: Path) -> None:
    (folder / "val" / "red" / "0.jpg").unlink()


def another_class(folder: Path) -> None:
    for part in ("train", "val"):
        (folder / part / "red").rename(folder / part / "rose")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_more, "has training pictures 36 and cannot be resumed with 37, list of training pictures"),
        (another_size, "has list of training pictures"),
        (another_label, "has list of training pictures"),
        (another_validation, "has validation pictures 18 and cannot be resumed with 17"),
        (another_class, "has classes .*'red'.* and cannot be resumed with .*'rose'"),
    ],
)
def test_other_pictures_are_refused(
    change: Callable[[Path], None], message: str, half_a_run: Path, picture_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(picture_folder, tmp_path / "pictures")
    change(folder)
    with pytest.raises(ArtifactError, match=message):
        fitted(folder, half_a_run, resume="auto")


def test_resuming_and_overwriting_at_once_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="choose one"):
        fitted(picture_folder, tmp_path, resume="auto", overwrite=True)


def test_resuming_without_a_folder_or_by_another_word_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="output_dir"):
        fitted(picture_folder, None, resume="auto")
    with pytest.raises(SettingError, match="resume='yes'; it can be 'auto', or None"):
        fitted(picture_folder, tmp_path, resume="yes")


def test_a_model_without_a_state_cannot_be_gone_on_with(picture_folder: Path, tmp_path: Path) -> None:
    fitted(picture_folder, None, epochs=1).save(tmp_path)
    with pytest.raises(OutputError, match=r"holds a run .* but no state to go on from"):
        fitted(picture_folder, tmp_path, epochs=1, resume="auto")


def test_a_run_is_not_begun_over_another_that_could_go_on(half_a_run: Path, picture_folder: Path) -> None:
    with pytest.raises(OutputError, match=r"already holds a run \(resume\).*--resume"):
        fitted(picture_folder, half_a_run)


def test_a_damaged_state_is_named_and_can_be_replaced(half_a_run: Path, picture_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(half_a_run, tmp_path / "run")
    tensors = next(folder.glob("resume/state-*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"cannot be used .*start anew with overwrite=True"):
        fitted(picture_folder, folder, resume="auto")
    got = fitted(picture_folder, folder, overwrite=True)
    assert_equal(outcome(got), outcome(fitted(picture_folder, None)))


class Trap:
    """Runs something when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_no_pickle_in_the_folder_is_opened(half_a_run: Path, picture_folder: Path, tmp_path: Path) -> None:
    folder, trap = shutil.copytree(half_a_run, tmp_path / "run"), tmp_path / "sprung"
    planted = pickle.dumps(Trap(trap))
    names = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "pytorch_model.bin")
    for name in names:
        (folder / "resume" / name).write_bytes(planted)
    fitted(picture_folder, folder, resume="auto", epochs=3)
    for name in ("state.json", "state-1.safetensors"):
        shutil.rmtree(folder)
        shutil.copytree(half_a_run, folder)
        file = next(folder.glob(f"resume/{name.replace('1', '*')}"))
        file.write_bytes(planted.ljust(file.stat().st_size))
        with pytest.raises(ArtifactError, match="cannot be used"):
            fitted(picture_folder, folder, resume="auto")
    assert not trap.exists()
    pickle.loads(planted)
    assert trap.exists(), "the trap would have told nothing"


# --- what is written, and when


def test_frozen_tensors_are_written_once_for_a_phase(picture_folder: Path, tmp_path: Path) -> None:
    class Look(Callback):
        files: list[tuple[int, int, int]] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: Trainer) -> None:
            (constant,) = tmp_path.glob("resume/constant-*.safetensors")
            (state,) = tmp_path.glob("resume/state-*.safetensors")
            assert (constant.stat().st_size > state.stat().st_size) == (trainer.epoch == 0 or trainer.batch == 0)
            self.files.append((trainer.epoch, trainer.batch, constant.stat().st_ino))

    fitted(picture_folder, tmp_path, Look(), checkpoint_every=1, epochs=2)
    probing = {file for epoch, _, file in Look.files if epoch == 0}
    assert len(probing) == 1
    assert not (tmp_path / "resume").exists(), "a run that has ended needs no state"


def test_an_error_leaves_the_state_before_it(picture_folder: Path, tmp_path: Path) -> None:
    """Also where the only state is that of the beginning, since states keep their distance."""
    wanted = fitted(picture_folder, None)
    for number, settings in enumerate(({"checkpoint_every": 1}, {"checkpoint_interval": 3600.0})):
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            fitted(picture_folder, folder, Stop("on_train_batch_start", 1, 2, kill=True), **settings)
        got = fitted(picture_folder, folder, resume="auto", **settings)
        assert_equal(outcome(got), outcome(wanted))


def test_a_resumed_run_is_at_no_instant_without_a_state(picture_folder: Path, tmp_path: Path) -> None:
    """Also where it is resumed from its beginning, as if it were new."""
    folder = tmp_path / "run"
    broken_off(picture_folder, folder, Stop("on_train_batch_start", 1, kill=True), checkpoint_interval=3600.0)

    class Look(Callback):
        def on_fit_start(self, trainer: Trainer) -> None:
            assert trainer.at_beginning
            assert ResumeStore(folder / "resume").exists()

    fitted(picture_folder, folder, Look(), resume="auto")


def test_numbers_of_numpy_are_settings_like_others(picture_folder: Path, tmp_path: Path) -> None:
    policy = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()}, lr={1: np.float64(2e-3)})
    settings = {"lr": np.float32(5e-3), "weight_decay": np.float64(1e-2), "policy": policy, "epochs": np.int64(2)}
    broken_off(picture_folder, tmp_path, Stop("on_train_batch_start", 1, 2), **settings)
    got = fitted(picture_folder, tmp_path, resume="auto", **settings)
    assert_equal(outcome(got), outcome(fitted(picture_folder, None, **settings)))


# --- real pictures, real kills


@pytest.mark.long
def test_a_run_on_real_pictures_that_is_killed_again_and_again_ends_as_one_that_is_left_alone(assets: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "kill_test.py"
    data, weights = assets / "flowers5_small", assets / "weights" / "squeezenet1_1-a3c258a5.pth"
    options = f"--data {data} --weights {weights} --model torchvision/squeezenet1_1 --image-size 64 --epochs 2".split()
    done = subprocess.run(
        [sys.executable, str(script), *options, "--workers", "0", "--kills", "6", "--checkpoint-every", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EQUAL to the bit" in done.stdout


def test_the_precision_in_use_counts_and_not_its_name(picture_folder: Path, tmp_path: Path) -> None:
    broken_off(picture_folder, tmp_path / "run", Stop("on_train_batch_start", 1, 2))
    with pytest.raises(ArtifactError, match="saved in fp32; give it precision='fp32'"):
        tuner_of(tmp_path / "run", precision="bf16").fit(picture_folder, resume="auto")
    assert len(tuner_of(tmp_path / "run", precision="fp32").fit(picture_folder, resume="auto")) == TINY["epochs"]
