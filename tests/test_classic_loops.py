"""The classic loops do what a plain torch loop does, and reach on real pictures what one expects of them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from transferkit.callbacks import Callback
from transferkit.create import create_model
from transferkit.data import image_folder
from transferkit.freezing import FreezeFirst
from transferkit.loading import loader
from transferkit.trainer import Trainer
from transferkit.transforms import eval_transform, train_transform

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "classic_loops.py"))
LOOPS: dict[str, Any] = EXAMPLE["LOOPS"]
NETWORK = "timm/test_efficientnet"


class LastWeights(Callback):
    """Keeps the weights of the last epoch, before the best ones take their place."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: Trainer) -> None:
        self.weights = {key: value.clone() for key, value in trainer.model.network.state_dict().items()}


def tutorial(folder: Path, *, all_layers: bool) -> tuple[list[tuple[float, float]], nn.Module]:
    """The transfer-learning tutorial of PyTorch; only pictures and first weights are ours."""
    data = image_folder(folder)
    model = create_model(NETWORK, weights=None, class_names=data.class_names, image_size=32, seed=0)
    network, preprocessing = model.network, model.preprocessing
    network.to(memory_format=torch.channels_last)  # as the trainer does; another order of memory rounds differently
    train = loader(data.train, train_transform("imagenet", preprocessing), batch_size=16, train=True)
    val = loader(data.val, eval_transform("imagenet", preprocessing), batch_size=16, train=False)
    if not all_layers:
        for parameter in network.parameters():
            parameter.requires_grad = False
        for parameter in network.classifier.parameters():
            parameter.requires_grad = True
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.001, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    figures = []
    for epoch in range(9):
        network.train(all_layers)  # the tutorial's frozen batch norms went on changing; here they do not
        train.sampler.set_epoch(epoch)
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        scheduler.step()
        network.eval()
        with torch.no_grad():
            outputs = [(network(images), labels) for images, labels in val]
        right = sum(int((logits.argmax(1) == labels).sum()) for logits, labels in outputs)
        loss = sum(float(F.cross_entropy(logits, labels, reduction="sum")) for logits, labels in outputs)
        figures.append((right / len(data.val), loss / len(data.val)))
    return figures, network


@pytest.mark.parametrize(("name", "all_layers"), [("fixed feature extractor", False), ("full fine-tuning", True)])
def test_the_tutorials_loops_equal_the_tutorials_own_code(name: str, all_layers: bool, picture_folder: Path) -> None:
    last = LastWeights()
    settings = {"image_size": 32, "num_workers": 0, "progress": False, "device": "cpu", "views": 0, "callbacks": [last]}
    history = LOOPS[name](NETWORK, weights=None, **settings).fit(picture_folder)
    figures, network = tutorial(picture_folder, all_layers=all_layers)
    assert [each.val_accuracy for each in history] == [accuracy for accuracy, _ in figures]
    assert history["val_loss"] == pytest.approx([loss for _, loss in figures], rel=1e-6)
    theirs = network.state_dict()
    assert [key for key in theirs if not torch.equal(last.weights[key], theirs[key])] == []


def test_the_loops_are_the_ones_the_field_knows() -> None:
    tuners = {name: make(NETWORK, weights=None) for name, make in LOOPS.items()}
    assert len(tuners) == 7
    for name in ("fixed feature extractor", "full fine-tuning"):
        (group,) = tuners[name].optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
        assert (group["momentum"], group["nesterov"], tuners[name].lr) == (0.9, False, 1e-3)
    assert tuners["head, then all at 1e-4"].recipe.policy.phase_lrs() == {5: 1e-4}
    assert tuners["last block, dropout 0.5"].dropout == 0.5
    vgg = tuners["first three blocks frozen"]
    assert (vgg.recipe.policy, vgg.recipe.schedule.gamma, vgg.recipe.schedule.every) == (FreezeFirst(3), 0.92, 2)
    assert vgg.val_fraction == 0.2


def test_the_loop_that_splits_by_itself_gets_one_folder(picture_folder: Path) -> None:
    data_of = EXAMPLE["data_of"]
    assert data_of("first three blocks frozen", picture_folder) == picture_folder / "train"
    assert data_of("first three blocks frozen", picture_folder / "val") == picture_folder / "val"
    assert data_of("full fine-tuning", picture_folder) == picture_folder


# Least accuracies, well below the measured ones, after fewer epochs; the script itself runs all seven loops.
FLOORS = {
    "fixed feature extractor": 0.88,
    "full fine-tuning": 0.80,
    "head, then all at 1e-4": 0.85,
    "last block, dropout 0.5": 0.82,
}
EPOCHS = {"head, then all at 1e-4": 6}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FLOORS)
def test_a_loop_reaches_on_ants_and_bees_what_one_expects(name: str, assets: Path) -> None:
    weights = assets / "weights" / "mobilenet_v2-77326c9b.pth"
    make, folder = LOOPS[name], EXAMPLE["data_of"](name, assets / "hymenoptera_data")
    tuner = make(
        "torchvision/mobilenet_v2", weights=weights, image_size=128, epochs=EPOCHS.get(name, 4), progress=False
    )
    assert tuner.fit(folder).best().val_accuracy >= FLOORS[name]
