"""All pretrained weights are fed what they were trained on; timm's and torchvision's own transforms are the oracle."""

from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torchvision import models

from transferkit.backbones import _timm, _torchvision
from transferkit.preprocessing import IMAGENET_MEAN
from transferkit.transforms import imagenet_eval

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """An oblong picture with some structure at every scale."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize(
        (270, 360), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 12, (360, 270, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def test_every_tag_of_timm_brings_its_own_statistics_size_and_crop() -> None:
    tags = timm.list_pretrained()
    read = {tag: _timm.preprocessing_from(get_pretrained_cfg(tag).to_dict()) for tag in tags}
    for tag, preprocessing in read.items():
        config = get_pretrained_cfg(tag)
        assert (preprocessing.mean, preprocessing.std) == (tuple(config.mean), tuple(config.std)), tag
        assert (preprocessing.channels, preprocessing.size) == (config.input_size[0], config.input_size[-1]), tag
        assert (preprocessing.interpolation, preprocessing.crop) == (config.interpolation, config.crop_mode), tag
    means = Counter(preprocessing.mean for preprocessing in read.values())
    assert {IMAGENET_MEAN, (0.5,) * 3, CLIP_MEAN, (0.0,) * 3} <= set(means)  # of all these there are many
    assert min(means[each] for each in (IMAGENET_MEAN, (0.5,) * 3, CLIP_MEAN, (0.0,) * 3)) > 40


def distinct() -> list[str]:
    """One tag for each different way of preparing a square picture."""
    found = {}
    for tag in timm.list_pretrained():
        preprocessing = _timm.preprocessing_from(get_pretrained_cfg(tag).to_dict())
        way = (preprocessing.mean, preprocessing.std, preprocessing.interpolation, preprocessing.crop)
        share = preprocessing.size / preprocessing.resize_size
        if len(set(get_pretrained_cfg(tag).input_size[1:])) == 1 and preprocessing.size <= 400:
            found.setdefault((*way, round(share, 2)), tag)
    return sorted(found.values())


@pytest.mark.parametrize("tag", distinct())
def test_our_transform_is_timms_for_each_way_of_preparing(tag: str, photo: Image.Image) -> None:
    config = get_pretrained_cfg(tag).to_dict()
    theirs = create_transform(**resolve_data_config({}, pretrained_cfg=config), is_training=False)
    ours = imagenet_eval(_timm.preprocessing_from(config))
    torch.testing.assert_close(ours(photo), theirs(photo), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["resnet18", "vit_l_16", "efficientnet_b3", "swin_v2_t", "inception_v3"])
def test_our_transform_is_torchvisions(architecture: str, photo: Image.Image) -> None:
    for entry in models.get_model_weights(architecture):
        theirs, ours = entry.transforms()(photo), imagenet_eval(_torchvision._preset(architecture, entry))(photo)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
