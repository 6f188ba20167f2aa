"""A network in two halves: what is frozen, run once per picture, and what trains on what the frozen half gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.closeness import same_but_for_rounding
from transferkit.cutting import Halves, cut_at_heads, cut_graph, made_images
from transferkit.evaluation import undisturbed
from transferkit.exceptions import SplitError
from transferkit.model import TransferModel
from transferkit.randomness import seed_generators
from transferkit.tracing import Host, cannot, in_words

__all__ = ["Prefix", "Split", "Suffix", "split"]


class Prefix(Host):
    """The half that is frozen: from pictures to what the suffix needs to know of them.

    Args:
        network: The whole network. Nothing of it is copied.
        halves: The programs, and tensors that the network keeps neither as parameters nor as buffers.
    """

    def __init__(self, network: nn.Module, halves: Halves) -> None:
        """Hold the network."""
        super().__init__(network, halves.constants)
        self.program = halves.prefix

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return tensors (B, …) for pictures (B, C, H, W), float and normalised."""
        return self.program(self, images)


class Suffix(Host):
    """The half that trains: from what the frozen half gave to what the whole network would give.

    It calls the network's own modules and reads the network's own tensors: an optimizer, ``.train()``, a freeze or a
    state dict of the model concern it too, and its state dict has the model's keys.

    Args:
        network: The whole network; whether it is in training mode decides which program runs. Nothing of it is copied.
        halves: The programs, and tensors that the network keeps neither as parameters nor as buffers.
        overwritten: Positions of the tensors that the programs change in place, and that are copied for this reason.
    """

    def __init__(self, network: nn.Module, halves: Halves, *, overwritten: frozenset[int] = frozenset()) -> None:
        """Hold the network."""
        super().__init__(network, halves.constants)
        self.programs, self.overwritten = halves.suffixes, overwritten

    def forward(self, tensors: Sequence[Tensor]) -> Any:
        """Return what ``network(images)`` gives.

        Args:
            tensors: What :meth:`Split.prefix` gave for the pictures, each (B, …); they are left as they are.

        Returns:
            (B, num_classes) float, or the native output of a network whose auxiliary classifiers train along.
        """
        own = [each.clone() if number in self.overwritten else each for number, each in enumerate(tensors)]
        return self.programs[self.network.training](self, *own)


@dataclass(frozen=True, eq=False)
class Split:
    """A network cut behind its leading frozen stages; :func:`split` makes it.

    Attributes:
        stages: The frozen stages that run in the prefix; each must stay frozen.
        shapes: Shape of each tensor that is kept of one picture.
        dtypes: Type of each.
        image_shape: (C, H, W) of the pictures it is made for.
        frozen_half: The half that is frozen, as a module; :meth:`prefix` is the safe way to call it.
        suffix: The half that trains.
    """

    stages: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    image_shape: tuple[int, ...]
    frozen_half: Prefix = field(repr=False)
    suffix: Suffix
    _model: TransferModel = field(repr=False)

    @property
    def boundary(self) -> str:
        """The last of :attr:`stages`."""
        return self.stages[-1]

    @property
    def bytes_per_picture(self) -> int:
        """Bytes that are kept of one picture."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    def prefix(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what the suffix needs to know of these pictures, the same at every epoch.

        Args:
            images: (B, C, H, W) float, normalised, of :attr:`image_shape`.

        Returns:
            Tensors (B, …) of :attr:`shapes`, without gradient; they may share memory with one another.

        Raises:
            SplitError: The pictures have another shape, or one of :attr:`stages` is no longer frozen.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise SplitError(
                f"the split was made for pictures of shape {self.image_shape}, not {tuple(images.shape[1:])}; make "
                "the model with their image_size"
            )
        freed = [name for name in self.stages if name not in self._model.frozen]
        if freed:
            raise SplitError(f"{', '.join(freed)} is no longer frozen, so what it gives will change; split again")
        with torch.no_grad():
            given: tuple[Tensor, ...] = self.frozen_half(images)
            return given


def split(model: TransferModel) -> Split:
    """Cut a network behind its leading frozen stages, as they are frozen now.

    The cut is the one with the fewest bytes per picture of those behind everything that reads frozen tensors and can
    run once: pooling comes before it, what widens comes after it and is computed again. What draws random numbers in
    training, and all that follows, stays behind it. The two halves are compared with the whole network on made
    pictures, in both modes, before they are handed out; statistics, modes, gradients and random generators stay as
    they are.

    Args:
        model: A model of which :meth:`TransferModel.freeze` froze the first stage at least, and not every one.

    Returns:
        A :class:`Split`, good until one of its stages is freed.

    Raises:
        SplitError: Nothing can run once, nothing trains, or the network cannot be cut; one sentence says why.

    Source: torch.fx (Reed et al. 2022, "torch.fx: Practical Program Capture and Transformation for Deep Learning").

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("torchvision/resnet18", weights=None, num_classes=2, image_size=64)
        >>> halves = split(model.freeze(["stem", "stage1", "stage2", "stage3"]))
        >>> halves.boundary, halves.shapes, halves.bytes_per_picture
        ('stage3', ((256, 4, 4),), 16384)
        >>> halves.suffix(halves.prefix(torch.zeros(5, 3, 64, 64))).shape
        torch.Size([5, 2])
    """
    names = model.stage_names
    leading = names[: next((place for place, name in enumerate(names) if name not in model.frozen), len(names))]
    if not leading:
        raise SplitError(f"{names[0]}, the first stage of {model.name}, trains, so there is nothing to run once")
    if leading == names:
        raise SplitError(f"every stage of {model.name} is frozen, so there is nothing to train on what they give")
    with undisturbed(model):
        if leading == names[:-1]:
            # What the heads receive can be had of any network, and soon; it is enough where nothing comes after them.
            try:
                return _checked(model, cut_at_heads(model))
            except SplitError:
                pass
        return _checked(model, cut_graph(model, leading))


def _checked(model: TransferModel, halves: Halves) -> Split:
    """Hand the halves out if they give what the whole network gives, in both modes and picture by picture."""
    prefix, suffix = Prefix(model.network, halves), Suffix(model.network, halves)
    overwritten: set[int] = set()
    # Another order only in eval mode: batch norms of two pictures make much of what rounding leaves.
    for training, order in ((False, [2, 0, 1]), (True, [0, 1])):
        images = made_images(model, len(order))
        model.train(training)
        with undisturbed(model):
            seed_generators(0)
            expected = model.network(images[order])
            statistics = [buffer.clone() for buffer in model.network.buffers()]
        with undisturbed(model):
            try:
                kept = tuple(each[order] for each in prefix(images))
                versions = [each._version for each in kept]
                seed_generators(0)
                given = suffix(kept)
            except Exception as error:
                raise cannot(model, f"the halves do not run ({in_words(error)})") from error
            overwritten |= {place for place, each in enumerate(kept) if each._version != versions[place]}
            same = same_but_for_rounding(given, expected, reordered=False) and same_but_for_rounding(
                list(model.network.buffers()), statistics, reordered=False, least=1.0
            )
        if not same:
            raise cannot(model, f"the halves give other results in {'training' if training else 'eval'} mode")
    return Split(
        halves.stages,
        tuple(tuple(each.shape[1:]) for each in kept),
        tuple(each.dtype for each in kept),
        tuple(images.shape[1:]),
        prefix,
        Suffix(model.network, halves, overwritten=frozenset(overwritten)),
        model,
    )
