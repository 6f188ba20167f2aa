"""What all tests share: a quiet, deterministic torch, tiny pictures and tiny networks."""

import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from transferkit.create import create_model
from transferkit.model import TransferModel
from transferkit.randomness import seeded

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


@pytest.fixture(scope="session", autouse=True)
def little_garbage() -> Iterator[None]:
    """Take what is imported for good: accelerate collects garbage at every phase, 0.5 s among all these modules."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread sums in one order, and two tests at a time do not fight for two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of pictures stays among the tests' own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_leaves() -> Iterator[None]:
    """Trackers tell nobody, and are not told by the machine's environment where to write."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
            patch.delenv(name)
        for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "WANDB_SILENT"):
            patch.setenv(name, "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/, three classes told by their colour, 12 and 6 pictures of 40 px each.

    It is shared by all tests, so none may write into it.
    """
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                noisy = np.array(colour) + rng.normal(0, 60, (40, 40, 3))
                picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
                picture.save(folder / f"{index}.{'png' if index % 2 else 'jpg'}")
    return root


@pytest.fixture
def tiny_network() -> Callable[..., nn.Module]:
    """Make a native timm network with batch norm and 100 000 random weights that answers in milliseconds at 32 px."""

    def make(num_classes: int = 1000, *, seed: int = 0) -> nn.Module:
        with seeded(seed):
            network: nn.Module = timm.create_model("test_efficientnet", pretrained=False, num_classes=num_classes)
        return network

    return make


@pytest.fixture
def tiny_model() -> Callable[..., TransferModel]:
    """Make a :class:`TransferModel` of the same architecture for three classes at 32 px."""

    def make(*, seed: int = 0, name: str = "timm/test_efficientnet", **options: object) -> TransferModel:
        settings = {"class_names": sorted(COLOURS), "weights": None, "image_size": 32, **options}
        with seeded(seed):
            return create_model(name, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real pictures and weights, where this machine has it."""
    folder = os.environ.get("TRANSFERKIT_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TRANSFERKIT_ASSETS names no folder with hymenoptera_data, flowers5_small and weights/")
    return Path(folder)


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """Let no file grow beyond so many bytes, as on a full disk, within ``with small_files(100):``."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
