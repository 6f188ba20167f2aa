"""Models of 1, 4 and 5 channels predict what their transform makes of the picture."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from transferkit.backbones import change_channels
from transferkit.create import adapt
from transferkit.exceptions import DataError
from transferkit.model import TransferModel
from transferkit.pictures import as_picture
from transferkit.prediction import predict
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.transforms import eval_transform


@pytest.fixture
def model_of() -> Callable[[int], TransferModel]:
    """Make a tiny model of so many channels, two classes, at 32 px."""

    def make(channels: int) -> TransferModel:
        with seeded(0):
            network = timm.create_model("test_efficientnet", pretrained=False, in_chans=channels, num_classes=2)
            preprocessing = Preprocessing(32, 32).with_channels(channels)
            return adapt(network, class_names=["a", "b"], preprocessing=preprocessing).eval()

    return make


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_first_convolution_is_changed_where_it_is(channels, groups):
    old = nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2, groups=groups, padding_mode="reflect")
    network = nn.Sequential(copy.deepcopy(old), nn.Conv2d(6, 2, 1))
    convolution, bias = network[0], network[0].bias
    convolution.weight.requires_grad_(False)
    change_channels(network, channels)
    assert network[0] is convolution
    assert convolution.bias is bias
    assert not convolution.weight.requires_grad
    assert convolution.extra_repr() == old.extra_repr().replace("3, 6", f"{channels}, 6").replace(", groups=3", "")
    own = torch.randn(2, channels, 9, 9)
    weight = old.weight if groups == 1 else old.weight.expand(-1, 3, -1, -1) / 3
    expected = nn.Conv2d(channels, 6, 3, stride=2, padding=1, dilation=2, padding_mode="reflect")
    expected.load_state_dict({"weight": timm.models.adapt_input_conv(channels, weight), "bias": old.bias})
    torch.testing.assert_close(convolution(own), expected(own))


def noise(channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 36, channels), dtype=np.uint8)


def said(model: TransferModel, picture: Image.Image | torch.Tensor) -> list[float]:
    """What the network says of the picture through the evaluation transform, with nothing of ``predict``."""
    view = eval_transform("imagenet", model.preprocessing)(as_picture(picture, channels=model.preprocessing.channels))
    with torch.no_grad():
        return torch.softmax(model(view[None]).double(), dim=1)[0].tolist()


def probabilities(predictions):
    return [pytest.approx(list(each.probabilities.values()), abs=1e-6) for each in predictions]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_and_images_are_predicted_in_the_model_s_channels(tmp_path, model_of, channels, num_workers):
    model = model_of(channels)
    pictures = [Image.fromarray(noise(4)), Image.fromarray(noise(3)), Image.fromarray(noise(3)).convert("L")]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    expected = [said(model, picture) for picture in pictures]
    assert expected == probabilities(predict(model, pictures, batch_size=1, num_workers=num_workers))
    assert expected == probabilities(predict(model, tmp_path, batch_size=1, num_workers=num_workers))


def test_transparency_is_seen_with_four_channels_and_not_with_three(model_of):
    clear, half, full = (Image.new("RGBA", (40, 40), (255, 255, 255, alpha)) for alpha in (0, 128, 255))
    four = [each.confidence for each in predict(model_of(4), [clear, half, full])]
    assert len(set(four)) == 3
    three = [each.confidence for each in predict(model_of(3), [clear, half, full])]
    assert len(set(three)) == 1


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tensors_are_predicted_alone_and_in_lists(model_of, channels, dtype):
    model = model_of(channels)
    tensors = [torch.from_numpy(noise(channels, seed)).permute(2, 0, 1) for seed in range(3)]
    if dtype == torch.float32:
        tensors = [tensor / 255 for tensor in tensors]
    expected = [said(model, tensor) for tensor in tensors]
    predictions = predict(model, tensors)
    assert [each.path for each in predictions] == [None] * 3
    assert expected == probabilities(predictions)
    assert expected[:1] == probabilities(predict(model, tensors[0]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_model_of_five_channels_asks_for_tensors(tmp_path, model_of, num_workers):
    Image.fromarray(noise(3)).save(tmp_path / "picture.png")
    model = model_of(5)
    for pictures in (tmp_path, Image.fromarray(noise(3))):
        with pytest.raises(DataError, match=r"^picture files and PIL images have 1, 3 or 4 .* tensors \(5, H, W\)"):
            predict(model, pictures, batch_size=1, num_workers=num_workers)
