"""Steps whose batch does not fit into memory, and steps whose numbers are none."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from resuming import Stop, assert_equal
from transferkit import Finetuner
from transferkit.callbacks import Callback, ResumeCheckpoint
from transferkit.checkpoint import load_artifact
from transferkit.create import adapt
from transferkit.exceptions import TransferkitError
from transferkit.interrupts import Interrupted
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.resume import ResumeStore
from transferkit.sampling import EpochSampler
from transferkit.trainer import Trainer


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 3) for size in sizes]


def model_of(*, norm: bool) -> TransferModel:
    with seeded(0):
        middle = nn.BatchNorm2d(4) if norm else nn.ReLU()
        network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), middle, nn.Flatten(), nn.Linear(36, 3))
        return adapt(network, num_classes=3, preprocessing=Preprocessing(size=8, resize_size=8))


class SmallMemory(Callback):
    """Lets no more pictures than these through the network while it trains, from a batch on."""

    def __init__(self, pictures: int, *, from_batch: int = 0) -> None:
        self.pictures, self.from_batch, self.sizes = pictures, from_batch, []

    def on_fit_start(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.hook = trainer.model.network.register_forward_pre_hook(self.look)

    def look(self, network: nn.Module, images: tuple[Tensor]) -> None:
        if network.training:
            self.sizes.append(len(images[0]))
            if len(images[0]) > self.pictures and self.trainer.batch >= self.from_batch:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def on_fit_end(self, trainer: Trainer) -> None:
        self.hook.remove()

    on_exception = on_fit_end


def trainer_of(model: TransferModel, *callbacks: Callback, **settings: Any) -> Trainer:
    optimizer = build_optimizer("sgd", param_groups(model, lr=0.05))
    return Trainer(model, optimizer, callbacks=callbacks, device="cpu", **settings)


def trained(model: TransferModel, *callbacks: Callback, train: Any, **settings: Any) -> Trainer:
    trainer = trainer_of(model, *callbacks, **settings)
    trainer.fit(train, batches(4), epochs=2)
    return trainer


# --- out of memory


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((8, 8, 5), {}),
        ((8, 6, 7), {"accumulate": 2, "label_smoothing": 0.1}),
        ((8, 8), {"class_weights": [0.2, 1.0, 3.0]}),
        ((8, 8), {"mixup": 0.5, "clip_grad_norm": 0.3}),
    ],
)
def test_smaller_batches_add_up_to_the_gradients_of_the_whole_ones(
    sizes: tuple[int, ...], settings: dict[str, Any]
) -> None:
    memory = SmallMemory(3)
    wanted = trained(model_of(norm=False), train=batches(*sizes), **settings)
    got = trained(model_of(norm=False), memory, train=batches(*sizes), **settings)
    assert got.gradients.micro_batch == 2
    assert memory.sizes.count(8) == 1, "what does not fit is tried once"
    torch.testing.assert_close(got.model.network.state_dict(), wanted.model.network.state_dict())
    assert got.history["train_loss"] == pytest.approx(wanted.history["train_loss"])


@pytest.mark.parametrize("from_batch", [0, 1, 2])
def test_batch_norms_count_no_picture_of_a_failed_attempt(from_batch: int) -> None:
    """Whichever batch of a step fails: the first, or one after others that were counted."""
    model, train = model_of(norm=True), batches(8, 8, 8)
    norm = copy.deepcopy(model.network[1])  # type: ignore[index]
    trainer = trainer_of(model, SmallMemory(4, from_batch=from_batch), accumulate=3)
    optimizer_free = copy.deepcopy(model.network[0])  # type: ignore[index]
    trainer.fit(train, batches(4), epochs=1)
    norm.train()
    for images, _ in train:  # the weights do not change within the step, so neither do the activations
        for part in images.split(4):
            norm(optimizer_free(part))
    assert_equal(dict(model.network[1].named_buffers()), dict(norm.named_buffers()))  # type: ignore[index]


def test_the_log_tells_what_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "transferkit"):
        trained(model_of(norm=True), SmallMemory(2), train=batches(8, 4), accumulate=2)
    (message,) = (record.getMessage() for record in caplog.records if "memory" in record.getMessage())
    assert message == (
        "out of memory: batches of 8 pictures are now computed 2 at a time, and their gradients added up, so a step "
        "still sees 12 pictures; batch norms in training see the smaller ones"
    )


def test_a_picture_that_is_too_large_alone_is_told_in_a_sentence() -> None:
    with pytest.raises(TransferkitError, match="not even one picture fits into the memory of cpu; choose a smaller"):
        trained(model_of(norm=False), SmallMemory(0), train=batches(8))


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    class Broken(Callback):
        def on_fit_start(self, trainer: Trainer) -> None:
            trainer.model.network.register_forward_pre_hook(self.fail)

        def fail(self, network: nn.Module, images: Any) -> None:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        trained(model_of(norm=False), Broken(), train=batches(8))


def test_the_smaller_batches_survive_a_resume(tmp_path: Path) -> None:
    """Decided once, stored and reused: the resumed process meets no lack of memory and computes as before."""
    train = batches(8, 8, 8)
    wanted = trained(model_of(norm=True), SmallMemory(4), train=train)
    with pytest.raises(Interrupted):
        trained(
            model_of(norm=True),
            SmallMemory(4),
            Stop("on_train_batch_end", 0, 2),
            ResumeCheckpoint(tmp_path),
            train=train,
        )
    memory = SmallMemory(99)
    trainer = trainer_of(model_of(norm=True), memory)
    trainer.load_state_dict(ResumeCheckpoint(tmp_path).read() or {})
    trainer.fit(train, batches(4), epochs=2)
    assert set(memory.sizes) == {4}
    assert_equal(trainer.model.network.state_dict(), wanted.model.network.state_dict())


# --- numbers that are none


WHITE = (255, 255, 255)


class Blinding:
    """Turns white pictures into infinities."""

    def __init__(self) -> None:
        self.plain = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])

    def __call__(self, picture: Image.Image) -> Tensor:
        tensor = self.plain(picture)
        return tensor / 0 if bool((tensor == 1).all()) else tensor


@pytest.fixture(scope="module")
def with_a_white_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of noise and a white one, the last of its class."""
    root = tmp_path_factory.mktemp("white")
    for part in ("train", "val"):
        for name in ("ants", "bees"):
            (root / part / name).mkdir(parents=True)
            for index in range(6):
                Image.effect_noise((32, 32), 60).convert("RGB").save(root / part / name / f"{index}.png")
    Image.new("RGB", (32, 32), WHITE).save(root / "train" / "bees" / "white.png")
    return root


def tuner_of(folder: Path, *callbacks: Callback, **settings: Any) -> Finetuner:
    tiny = {"weights": None, "policy": "full", "image_size": 32, "batch_size": 2, "epochs": 2, "lr": 1e-3}
    quiet = {"device": "cpu", "num_workers": 0, "progress": False, "checkpoint_interval": 0.0, "checkpoint_every": 1}
    return Finetuner("timm/test_efficientnet", output_dir=folder, callbacks=callbacks, **{**tiny, **quiet, **settings})


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({}, {"shuffle": True}),
        ({"accumulate": 2}, {"shuffle": True}),
        ({"accumulate": 2, "balanced": True}, {"shuffle": True, "labels": [0] * 6 + [1] * 7}),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_loss_that_is_no_number_names_the_pictures_of_its_step(
    resumed: bool, settings: dict[str, Any], drawn: dict[str, Any], with_a_white_one: Path, tmp_path: Path
) -> None:
    sampler = EpochSampler(13, seed=0, **drawn)
    order = [index for _, index, _ in sampler]
    pictures = 2 * settings.get("accumulate", 1)
    step = order.index(12) // pictures
    assert step > 0, "choose another seed: a step before it must have been saved"
    if resumed:
        with pytest.raises(Interrupted):
            tuner_of(tmp_path, Stop("on_train_batch_start"), train_preset=Blinding(), **settings).fit(with_a_white_one)
    tuner = tuner_of(tmp_path, train_preset=Blinding(), **settings)
    with pytest.raises(TransferkitError, match="the training loss is no longer a number") as stopped:
        tuner.fit(with_a_white_one, resume="auto")
    message = str(stopped.value)
    assert re.search(rf"number in step {step + 1} of epoch 1 at lr [\d.e-]+, whose pictures are ", message)
    named = re.findall(r"(ants|bees)/(\d|white)\.png", message.partition("whose pictures are")[2])
    files = [("ants", str(index)) for index in range(6)] + [("bees", str(index)) for index in range(6)]
    files.append(("bees", "white"))
    assert named == [files[index] for index in order[step * pictures : (step + 1) * pictures]]
    state, _ = ResumeStore(tmp_path / "resume").read() or ({}, {})
    assert state["batch"] == step * settings.get("accumulate", 1)
    assert all(bool(each.isfinite().all()) for each in state["network"].values())


def test_a_gradient_that_is_no_number_leaves_the_best_weights_and_a_state_to_go_on_from(
    with_a_white_one: Path, tmp_path: Path
) -> None:
    class Explode(Callback):
        """The loss stays a number; its gradient does not."""

        def on_train_batch_start(self, trainer: Trainer) -> None:
            if (trainer.epoch, trainer.batch) == (1, 2):
                weight = trainer.model.stages[-1].parameters[0]
                weight.register_hook(lambda gradient: gradient / 0)

    with pytest.raises(TransferkitError, match=r"the gradient is no longer a number in step 3 of epoch 2 at lr .*png"):
        tuner_of(tmp_path / "run", Explode()).fit(with_a_white_one)
    saved = load_artifact(tmp_path / "run")
    assert all(bool(each.isfinite().all()) for each in saved.network.state_dict().values())
    wanted, got = tuner_of(tmp_path / "alone"), tuner_of(tmp_path / "run")
    assert_equal(got.fit(with_a_white_one, resume="auto").to_dicts(), wanted.fit(with_a_white_one).to_dicts())
    assert got.model is not None
    assert wanted.model is not None
    assert_equal(got.model.network.state_dict(), wanted.model.network.state_dict())
