"""Networks with more than one head: auxiliary, distilled, one per branch."""

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.checkpoint import load_artifact, save_artifact
from transferkit.create import create_model
from transferkit.exceptions import SettingError
from transferkit.freezing import LinearProbe
from transferkit.model import TrainingOutput, TransferModel
from transferkit.optim import param_groups
from transferkit.trainer import Trainer

AUXILIARY = {"googlenet": (("aux1.fc2", "aux2.fc2"), 0.3, 64), "inception_v3": (("AuxLogits.fc",), 0.4, 96)}


def cheap(name: str, **options: object) -> TransferModel:
    """Build without values."""
    with torch.device("meta"):
        return create_model(name, weights=None, num_classes=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", AUXILIARY)
def test_auxiliary_heads_are_dropped_or_resized(architecture: str) -> None:
    paths, weight, _ = AUXILIARY[architecture]
    dropped, kept = cheap(architecture), cheap(architecture, aux="train")
    assert (dropped.aux_paths, dropped.aux_weight) == ((), 0.0)
    assert not [key for key in dropped.network.state_dict() if key.lower().startswith("aux")]
    assert (kept.aux_paths, kept.aux_weight) == (paths, weight)
    assert all(kept.network.get_submodule(path).out_features == 3 for path in paths)
    head = {id(parameter) for parameter in kept.stages[-1].parameters}
    assert head == {id(each) for path in ("fc", *paths) for each in kept.network.get_submodule(path).parameters()}


def test_a_training_output_becomes_one_loss_as_the_paper_weighs_it() -> None:
    torch.manual_seed(0)
    model = create_model("googlenet", weights=None, num_classes=3, aux="train").train()
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    output = model(images)
    assert isinstance(output, TrainingOutput)
    main, first, second = (
        nn.functional.cross_entropy(each, labels).item() for each in (output.logits, *output.auxiliary)
    )
    loss = model.loss(output, labels)
    assert math.isclose(loss.item(), main + 0.3 * (first + second), rel_tol=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(images).shape == (4, 3)
    assert model.loss(output.logits, labels).item() == pytest.approx(main)


def test_the_trainer_trains_auxiliary_heads_and_a_saved_model_keeps_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("googlenet", weights=None, num_classes=3, aux="train", image_size=64)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    batches = [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))]
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
    trainer = Trainer(model, optimizer, policy=LinearProbe(), device="cpu")
    trainer.fit(batches, batches, epochs=1)
    changed = {key for key, value in model.network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{path}.{kind}" for path in ("fc", "aux1.fc2", "aux2.fc2") for kind in ("weight", "bias")}
    save_artifact(model.eval(), tmp_path)
    native = models.googlenet(num_classes=3, aux_logits=True, init_weights=False, transform_input=True)
    native.load_state_dict(load_artifact(tmp_path).network.state_dict())
    again = load_artifact(tmp_path)
    assert (again.aux_paths, again.aux_weight) == (model.aux_paths, 0.3)
    images = batches[0][0]
    assert torch.equal(again(images), model(images))
    assert torch.equal(native.eval()(images), model(images))


def test_weights_with_auxiliary_heads_load_where_these_are_dropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    native = models.googlenet(init_weights=False, transform_input=True).eval()
    torch.save(native.state_dict(), tmp_path / "googlenet.pth")
    images = torch.randn(2, 3, 64, 64)
    received: list[Tensor] = []
    native.fc.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    native(images)
    for aux in ("drop", "train"):
        model = create_model("googlenet", weights=tmp_path / "googlenet.pth", num_classes=2, aux=aux).eval()
        assert torch.equal(model.features(images), received[0])
    assert torch.equal(model.network.aux1.fc1.weight, native.aux1.fc1.weight)


def test_aux_is_checked() -> None:
    with pytest.raises(SettingError, match="aux='keep'; it can be 'train' or 'drop'"):
        create_model("googlenet", weights=None, num_classes=2, aux="keep")


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/inception_v3", "timm/inception_v3.tv_in1k"])
def test_auxiliary_heads_that_a_network_does_not_have_are_refused_before_its_weights_are_read(
    name: str, tmp_path: Path
) -> None:
    for weights in ("default", tmp_path / "missing.pth"):
        with pytest.raises(SettingError, match=f"^{name} has no auxiliary classifiers to train; leave aux alone$"):
            create_model(name, weights=weights, num_classes=2, aux="train")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("levit_128s", ("head.linear", "head_dist.linear")),
        ("levit_384_s8", ("head.linear", "head_dist.linear")),  # its metadata names only the first
        ("repvit_m0_9", ("head.head.l", "head.head_dist.l")),
        ("crossvit_9_240", ("head.0", "head.1")),
        ("efficientformer_l1", ("head", "head_dist")),
        ("volo_d1_224", ("head", "aux_head")),
    ],
)
def test_every_head_of_a_network_is_replaced(name: str, heads: tuple[str, ...]) -> None:
    model = cheap(f"timm/{name}")
    assert model.head_paths == heads
    size = model.preprocessing.size
    images = torch.zeros(2, 3, size, size, device="meta")
    assert model.eval()(images).shape == model.train()(images).shape == (2, 3)
    assert model.eval().features(images).shape == (2, model.num_features)
    assert {id(each) for each in model.stages[-1].parameters} == {
        id(each) for path in heads for each in model.network.get_submodule(path).parameters()
    }


def test_features_of_a_distilled_pair_are_timms_own() -> None:
    torch.manual_seed(0)
    model = create_model("timm/deit_tiny_distilled_patch16_224", weights=None, num_classes=2, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    network = model.network
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        torch.testing.assert_close(model.features(images), expected)


def test_features_of_two_branches_stand_side_by_side() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = create_model("timm/crossvit_9_240", weights=None, num_classes=2)
    assert model.num_features == sum(timm.create_model("crossvit_9_240").embed_dim)


@pytest.mark.parametrize("name", ["timm/dpn48b", "timm/levit_384_s8", "torchvision/squeezenet1_1", "timm/caformer_s18"])
def test_a_hidden_layer_and_dropout_fit_every_kind_of_head(name: str) -> None:
    model = cheap(name, hidden_size=16, dropout=0.5)
    size = model.preprocessing.size
    images = torch.zeros(2, 3, size, size, device="meta")
    assert model.train()(images).shape == (2, 3)
    assert model.features(images).shape == (2, model.num_features)
