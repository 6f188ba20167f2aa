"""The classic loops of the examples do what a plain torch loop does, and reach on real pictures what one expects."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from transferkit.callbacks import Callback
from transferkit.create import create_model, outline
from transferkit.data import image_folder
from transferkit.finetuner import Finetuner
from transferkit.freezing import FreezeFirst, TrainLast
from transferkit.loading import loader
from transferkit.trainer import Trainer
from transferkit.transforms import eval_transform, train_transform

EXAMPLES = Path(__file__).parents[1] / "examples"
LOOPS = {
    "ants_bees_feature_extractor": "tutorial",
    "ants_bees_finetune": "tutorial",
    "cifar10_resnet18_cpu": "last_block",
    "cifar10_resnet18_scheduled_unfreeze": "scheduled",
    "cifar10_resnet50_sgd": "plain_sgd",
    "cifar10_vgg16": "fully_connected",
    "faces_vgg16_partial_freeze": "partly_frozen",
}
NETWORK = "timm/test_efficientnet"


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finetuner]:
    """Make the Finetuner of an example."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def make(name: str, model: str = NETWORK, **settings: object) -> Finetuner:
        tuner: Finetuner = runpy.run_path(str(EXAMPLES / f"{name}.py"))[LOOPS[name]](model, **settings)
        return tuner

    return make


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


@pytest.mark.parametrize(("name", "all_layers"), [("ants_bees_feature_extractor", False), ("ants_bees_finetune", True)])
def test_the_tutorials_loops_equal_the_tutorials_own_code(
    name: str, all_layers: bool, loop: Callable[..., Finetuner], picture_folder: Path
) -> None:
    last = LastWeights()
    settings = {"image_size": 32, "num_workers": 0, "progress": False, "device": "cpu", "views": 0, "callbacks": [last]}
    history = loop(name, weights=None, epochs=9, **settings).fit(picture_folder)
    figures, network = tutorial(picture_folder, all_layers=all_layers)
    assert [each.val_accuracy for each in history] == [accuracy for accuracy, _ in figures]
    assert history["val_loss"] == pytest.approx([loss for _, loss in figures], rel=1e-6)
    theirs = network.state_dict()
    assert [key for key in theirs if not torch.equal(last.weights[key], theirs[key])] == []


def test_the_loops_are_the_ones_the_field_knows(loop: Callable[..., Finetuner]) -> None:
    tuners = {name: loop(name, weights=None) for name in LOOPS}
    for name in ("ants_bees_feature_extractor", "ants_bees_finetune", "cifar10_resnet50_sgd", "cifar10_vgg16"):
        (group,) = tuners[name].optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
        assert (group["momentum"], group["nesterov"], tuners[name].lr) == (0.9, False, 1e-3)
    assert tuners["cifar10_resnet18_scheduled_unfreeze"].recipe.policy.phase_lrs() == {5: 1e-4}
    assert tuners["cifar10_resnet18_cpu"].recipe.policy == TrainLast(1)
    assert tuners["cifar10_resnet18_cpu"].dropout == 0.5
    faces = tuners["faces_vgg16_partial_freeze"]
    assert (faces.recipe.policy, faces.recipe.schedule.gamma, faces.recipe.schedule.every) == (FreezeFirst(3), 0.92, 2)
    assert faces.val_fraction == 0.2


def test_the_stages_of_vgg16_are_the_blocks_that_its_examples_speak_of() -> None:
    stages = {stage.name: stage.paths for stage in outline("torchvision/vgg16", num_classes=10).stages}
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "stage4", "stage5", "head"]
    first_three = [path for name in ("stem", "stage1", "stage2") for path in stages[name]]
    # ten layers with weights and ReLUs before the third pooling, features.16
    assert {int(path.split(".")[1]) for path in first_three} <= set(range(17))
    assert "features.14" in first_three
    assert [path for path in stages["stage5"] if path.startswith("classifier")]


# Least accuracies, well below the measured ones, after fewer epochs; benchmarks/results/classic_loops.md has all.
FLOORS = {
    "ants_bees_feature_extractor": 0.88,
    "ants_bees_finetune": 0.80,
    "cifar10_resnet18_scheduled_unfreeze": 0.85,
    "cifar10_resnet18_cpu": 0.82,
}
EPOCHS = {"cifar10_resnet18_scheduled_unfreeze": 6}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FLOORS)
def test_a_loop_reaches_on_ants_and_bees_what_one_expects(
    name: str, loop: Callable[..., Finetuner], assets: Path
) -> None:
    weights = assets / "weights" / "mobilenet_v2-77326c9b.pth"
    settings = {"weights": weights, "image_size": 128, "epochs": EPOCHS.get(name, 4), "progress": False}
    tuner = loop(name, "torchvision/mobilenet_v2", **settings)
    # photos, also for the loops that are meant for pictures of 32 px
    tuner = replace(tuner, train_preset="imagenet", eval_preset="imagenet")
    assert tuner.fit(assets / "hymenoptera_data").best().val_accuracy >= FLOORS[name]
