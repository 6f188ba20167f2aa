"""TransferModel: a native network with a new head, known by its stages, that stays frozen where it is frozen."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.backbones import Backbone, adopt_module, load_backbone, split_into_stages
from transferkit.exceptions import SettingError, UnknownStageError, closest
from transferkit.heads import Head, build_head, head_inputs, replace_module
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded

__all__ = ["Stage", "TransferModel", "create_model"]


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a network that is frozen or trained as one.

    Attributes:
        name: ``"stem"``, ``"stage1"`` …, ``"head"``.
        parameters: Its parameters; each belongs to exactly one stage of a network.
        buffers: Its buffers, running statistics for example.
        modules: Its modules, which share one training mode when frozen.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    buffers: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]

    @property
    def num_parameters(self) -> int:
        """Number of scalars in the parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def has_batch_norm(self) -> bool:
        """Whether a module keeps running statistics."""
        return any(_has_statistics(module) for module in self.modules)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _train_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for ``module.train`` while its stage is frozen: whatever is asked, it stays in eval mode."""
    return nn.Module.train(module, False)


class TransferModel(nn.Module):
    """A pretrained network with a new classification head.

    ``network`` is the untouched native class: its state dict has the native keys. What :meth:`freeze` names stays
    frozen — weights, running statistics, dropout and stochastic depth — through every later ``.train()``, also one
    called on ``model.network`` or on any module inside.

    Args:
        backbone: The native network and what is known of it; :func:`create_model` makes one from a name.
        class_names: One name per class, in the order of the logits.
        head: The shape of the new head; its ``num_classes`` must be ``len(class_names)``.

    Attributes:
        network: The native network with the new head.
        name: ``"torchvision/resnet18"`` for example.
        weights: What was loaded, in words, or ``None`` for random weights.
        class_names: One name per class.
        preprocessing: How pictures are prepared for these weights.
        eval_preset: Name of the transform that prepares them for evaluation (:func:`~transferkit.eval_transform`).
        num_features: Width of what the head receives.
        frozen: Names of the frozen stages.
        keep_statistics: Whether batch norms keep their pretrained running statistics, and use them, also in stages that
            train; their weights train all the same. Read by :meth:`freeze`. Worth it where batches are small or few.

    Raises:
        SettingError: Names and head disagree, names repeat, or the head cannot be replaced.

    Example:
        >>> model = create_model("torchvision/resnet18", weights=None, class_names=["ant", "bee"])
        >>> [stage.name for stage in model.stages]
        ['stem', 'stage1', 'stage2', 'stage3', 'stage4', 'head']
        >>> model(torch.zeros(1, 3, 64, 64)).shape, model.features(torch.zeros(1, 3, 64, 64)).shape
        (torch.Size([1, 2]), torch.Size([1, 512]))
    """

    def __init__(self, backbone: Backbone, *, class_names: Sequence[str], head: Head | None = None) -> None:
        """Replace the head and find the stages."""
        super().__init__()
        names = tuple(class_names)
        head = Head(len(names)) if head is None else head
        if len(set(names)) != len(names) or not names:
            raise SettingError(f"class_names must be different and at least one, got {list(names)}")
        if head.num_classes != len(names):
            raise SettingError(f"the head has {head.num_classes} classes, but {len(names)} class names are given")
        self.name = backbone.name
        self.weights = backbone.weights
        self.arguments = dict(backbone.arguments)
        self.preprocessing = backbone.preprocessing
        self.eval_preset = "imagenet"
        self.class_names = names
        self.head = head
        self.head_paths = backbone.head_paths
        self.frozen: frozenset[str] = frozenset()
        self.keep_statistics = False
        self.network = backbone.network
        self.num_features = head_inputs(self.network.get_submodule(self.head_paths[0]))
        for path in self.head_paths:
            replace_module(self.network, path, build_head(self.network.get_submodule(path), head))
        if isinstance(getattr(self.network, "num_classes", None), int):
            self.network.num_classes = len(names)  # type: ignore[assignment]  # a plain attribute in both libraries
        self._stage_names = split_into_stages(
            self.network,
            head_paths=self.head_paths,
            channels=len(self.preprocessing.mean),
            size=self.preprocessing.size,
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in execution order, holding the tensors that the network holds now."""
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        buffers = dict(self.network.named_buffers(remove_duplicate=False))
        modules = dict(self.network.named_modules(remove_duplicate=False))
        return tuple(
            Stage(
                names.name,
                tuple(parameters[key] for key in names.tensors if key in parameters),
                tuple(buffers[key] for key in names.tensors if key in buffers),
                tuple(modules[path] for path in names.modules),
            )
            for names in self._stage_names
        )

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of :attr:`stages`."""
        return tuple(names.name for names in self._stage_names)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits.

        Args:
            images: (B, C, H, W) float, normalised as :attr:`preprocessing` says.

        Returns:
            (B, num_classes) float.
        """
        logits: Tensor = self.network(images)
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return what the head receives; the mean over positions where the head is a convolution.

        Args:
            images: (B, C, H, W) float, normalised as :attr:`preprocessing` says.

        Returns:
            (B, num_features) float.
        """
        received: list[Tensor] = []
        head = self.network.get_submodule(self.head_paths[0])
        handle = head.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
        try:
            self.network(images)
        finally:
            handle.remove()
        features = received[0]
        convolutional = features.ndim == 4 and features.shape[1] == self.num_features
        return features.mean((2, 3)) if convolutional else features.flatten(1)

    def freeze(self, names: Iterable[str]) -> Self:
        """Freeze exactly these stages and train all others.

        A frozen stage gets no gradient, keeps no gradient, and stays in eval mode. A stage that is freed goes back to
        the mode of the model. Optimizers need not be told: give them all parameters once (:func:`param_groups`).

        Args:
            names: Stage names; an empty collection unfreezes everything.

        Returns:
            The model itself.

        Raises:
            UnknownStageError: A name is not among :attr:`stage_names`; nothing has changed then.

        Example:
            >>> model = create_model("torchvision/resnet18", weights=None, class_names=["ant", "bee"])
            >>> model.freeze(["stem", "stage1"]).train().network.bn1.training
            False
        """
        wanted = frozenset(names)
        for name in sorted(wanted):
            self.check_stage(name)
        self.frozen = wanted
        for stage in self.stages:
            frozen = stage.name in wanted
            for parameter in stage.parameters:
                parameter.requires_grad_(not frozen)
                if frozen:
                    parameter.grad = None  # a stale gradient would still move a re-frozen weight
            for module in stage.modules:
                if frozen or (self.keep_statistics and _has_statistics(module)):
                    # An instance attribute, so that network.train() and module.train() meet it too; a partial of a
                    # module-level function, so that deepcopy and pickle follow it to the copy.
                    module.__dict__["train"] = functools.partial(_train_frozen, module)
                else:
                    module.__dict__.pop("train", None)
        return self.train(self.training)

    def check_stage(self, name: str) -> None:
        """Raise unless the network has a stage of this name.

        Args:
            name: What should be among :attr:`stage_names`.

        Raises:
            UnknownStageError: It is not; the message names those that are.
        """
        if name not in self.stage_names:
            raise UnknownStageError(
                f"no stage named {name!r} in {self.name}; its stages are {', '.join(self.stage_names)}"
                f"{closest(name, self.stage_names, count=1)}"
            )

    def summary(self, optimizer: torch.optim.Optimizer | None = None) -> str:
        """Return the plan as a table: stage, parameters, frozen or trained, batch norm, lr, weight decay.

        Args:
            optimizer: Where lr and weight decay are read from; without it these columns are left out.
        """
        rows = [["stage", "parameters", "", "batch norm"] + (["lr", "weight decay"] if optimizer else [])]
        groups: list[dict[str, Any]] = optimizer.param_groups if optimizer else []
        for stage in self.stages:
            frozen = stage.name in self.frozen
            kept = frozen or self.keep_statistics
            norm = ("kept" if kept else "trained") if stage.has_batch_norm else "–"
            row = [stage.name, f"{stage.num_parameters:,}", "frozen" if frozen else "trained", norm]
            if optimizer:
                own = {id(parameter) for parameter in stage.parameters}
                mine = [group for group in groups if any(id(each) in own for each in group["params"])]
                lrs = sorted({group["lr"] for group in mine})
                decays = sorted({group["weight_decay"] for group in mine})
                row += ["–" if frozen else " / ".join(f"{lr:.2g}" for lr in lrs)]
                row += ["–" if frozen else " / ".join(f"{decay:g}" for decay in decays)]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numeric = {1, 4, 5}
        return "\n".join(
            "  ".join(
                cell.rjust(width) if index in numeric else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def create_model(
    name: str | nn.Module,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = "default",
    dropout: float = 0.0,
    hidden_size: int | None = None,
    image_size: int | None = None,
    head: str | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int | None = None,
) -> TransferModel:
    """Make a classifier for your classes from any torchvision or timm backbone, or from a module you built.

    Args:
        name: ``"torchvision/resnet18"``, ``"timm/convnext_atto.d2_in1k"``, a bare name (torchvision first, then timm),
            or an ``nn.Module``, which keeps the weights it has and whose head is replaced in place.
        class_names: One name per class; or give ``num_classes`` and they are called ``"0"``, ``"1"``, …
        num_classes: Number of classes, where they have no names.
        weights: ``"default"``; a tag (timm) or enum name (torchvision); ``"bundled"``, the small weights that ship
            with transferkit, for ``timm/mobilenetv2_050``; a path to a local state dict; ``None`` for random weights.
        dropout: Probability of dropping each of the head's inputs while training, in [0, 1).
        hidden_size: Width of a hidden layer in the head, or ``None`` for a linear head.
        image_size: Input side in pixels, or ``None`` for the size of the weights.
        head: For a module: dotted name of its classification layer, where it cannot be found.
        preprocessing: Overrides that of the weights.
        seed: Decides the weights that are drawn, those of the new head at least; ``None`` draws them from torch's
            global generator.

    Returns:
        A :class:`TransferModel` with nothing frozen.

    Raises:
        UnknownModelError: No such model; the message offers the closest names.
        WeightsError: The weights do not exist, cannot be read, or do not fit.
        SettingError: A value is outside its range, or does not go with the others.

    Example:
        >>> create_model("torchvision/squeezenet1_1", weights=None, num_classes=5).num_features
        512
    """
    if (class_names is None) == (num_classes is None):
        raise SettingError("give either class_names or num_classes")
    names = tuple(class_names) if class_names is not None else tuple(str(index) for index in range(num_classes or 0))
    shape = Head(len(names) if class_names is not None else num_classes or 0, dropout=dropout, hidden_size=hidden_size)
    with nullcontext() if seed is None else seeded(seed, 3):
        if isinstance(name, nn.Module):
            if image_size is not None:
                raise SettingError(
                    "image_size goes with a backbone's name; give a module preprocessing=Preprocessing(...)"
                )
            if weights not in (None, "default"):
                raise SettingError("weights goes with a backbone's name; load a module's weights before it is passed")
            backbone = adopt_module(name, head=head, preprocessing=preprocessing)
        else:
            if head is not None:
                raise SettingError("head= goes with a module; the head of a named backbone is known")
            backbone = load_backbone(name, weights=weights, image_size=image_size)
        model = TransferModel(backbone, class_names=names, head=shape)
    if preprocessing is not None:
        model.preprocessing = preprocessing
    return model
