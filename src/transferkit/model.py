"""TransferModel: a native network with a new head, known by its stages, that stays frozen where it is frozen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.backbones import Backbone, StageNames, split_into_stages
from transferkit.exceptions import SettingError, UnknownStageError, closest
from transferkit.heads import Head, build_head, head_inputs, replace_module
from transferkit.ranges import check_number

__all__ = ["Stage", "TrainingOutput", "TransferModel"]


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a network that is frozen or trained as one.

    Attributes:
        name: ``"stem"``, ``"stage1"`` …, ``"head"``.
        parameters: Its parameters; each belongs to exactly one stage of a network.
        buffers: Its buffers, running statistics for example.
        modules: Its modules, which share one training mode when frozen.
        paths: Dotted native names of the outermost modules that hold its tensors, ``("layer1.0", "layer1.1")``.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    buffers: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]
    paths: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Number of scalars in the parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def has_batch_norm(self) -> bool:
        """Whether a module keeps running statistics."""
        return any(_has_statistics(module) for module in self.modules)


class TrainingOutput(NamedTuple):
    """What a network with auxiliary classifiers gives while it trains; :meth:`TransferModel.loss` takes it.

    Attributes:
        logits: (B, num_classes) float.
        auxiliary: One tensor (B, num_classes) per auxiliary classifier.
    """

    logits: Tensor
    auxiliary: tuple[Tensor, ...]


def as_output(native: Any) -> Tensor | TrainingOutput:
    """Return what :meth:`TransferModel.forward` gives for what the native network gave."""
    if isinstance(native, Tensor):
        return native
    logits, *auxiliary = native
    return TrainingOutput(logits, tuple(each for each in auxiliary if each is not None))


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _outermost(names: StageNames) -> tuple[str, ...]:
    holding = {tensor[:end] for tensor in names.tensors for end, sign in enumerate(tensor) if sign == "."}
    modules = set(names.modules)
    return tuple(path for path in names.modules if path in holding and path.rpartition(".")[0] not in modules)


def _averaged(features: Tensor) -> Tensor:
    """Average (B, F, H, W) over positions or (B, N, F) over tokens; (B, F) stays."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features


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
        small_images: ``"stem"`` where the network was adapted to small pictures, else ``"upsample"``.
        stem: The layers that were changed for them, beyond what ``arguments`` say.
        num_features: Width of what the head receives.
        aux_paths: Dotted names of the auxiliary classification layers that train along, none for most networks.
        frozen: Names of the frozen stages.
        keep_statistics: Whether batch norms keep their pretrained running statistics, and use them, also in stages that
            train; their weights train all the same. Read by :meth:`freeze`. Worth it where batches are small or few.

    Raises:
        SettingError: Names and head disagree, names repeat, or the head cannot be replaced.

    Example:
        >>> from transferkit.backbones import load_backbone
        >>> backbone = load_backbone("torchvision/resnet18", weights=None)
        >>> model = TransferModel(backbone, class_names=["ant", "bee"])
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
        if not backbone.head_paths:
            raise SettingError(f"{backbone.name} comes without the name of a classification layer to replace")
        if head.num_classes != len(names):
            raise SettingError(f"the head has {head.num_classes} classes, but {len(names)} class names are given")
        self.name = backbone.name
        self.weights = backbone.weights
        self.arguments = dict(backbone.arguments)
        self.preprocessing = backbone.preprocessing
        self.eval_preset = "imagenet"
        self._temperature = 1.0
        self.class_names = names
        self.head = head
        self.head_paths, self.aux_paths = backbone.head_paths, backbone.aux_paths
        self.aux_weight = backbone.aux_weight
        self.small_images, self.stem = backbone.small_images, backbone.stem
        self.frozen: frozenset[str] = frozenset()
        self.keep_statistics = False
        self.network = backbone.network
        widths = [head_inputs(self.network.get_submodule(path)) for path in self.head_paths]
        self.num_features = widths[0] if len(set(widths)) == 1 else sum(widths)
        for path in (*self.head_paths, *self.aux_paths):
            shape = head if path in self.head_paths else Head(len(names))
            replace_module(self.network, path, build_head(self.network.get_submodule(path), shape))
        if isinstance(getattr(self.network, "num_classes", None), int):
            self.network.num_classes = len(names)  # type: ignore[assignment]  # a plain attribute in both libraries
        self._stage_names = split_into_stages(
            self.network,
            head_paths=(*self.head_paths, *self.aux_paths),
            channels=len(self.preprocessing.mean),
            size=self.preprocessing.size,
            must_run=not self.name.startswith("module/"),
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
                _outermost(names),
            )
            for names in self._stage_names
        )

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of :attr:`stages`."""
        return tuple(names.name for names in self._stage_names)

    @property
    def temperature(self) -> float:
        """What logits are divided by before they become confidences, 1 for nothing; logits and losses do not know it.

        It can be set to 0.001 to 1000; training and :meth:`Finetuner.calibrate` fit it to validation pictures.
        """
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_number("temperature", value, at_least=1e-3, at_most=1e3)
        self._temperature = float(value)

    def forward(self, images: Tensor) -> Tensor | TrainingOutput:
        """Return logits.

        Args:
            images: (B, C, H, W) float, normalised as :attr:`preprocessing` says.

        Returns:
            (B, num_classes) float; while training with ``aux="train"``, a :class:`TrainingOutput`.
        """
        return as_output(self.network(images))

    def loss(
        self,
        output: Tensor | TrainingOutput,
        targets: Tensor,
        loss_function: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    ) -> Tensor:
        """Return one scalar for what :meth:`forward` gave, auxiliary classifiers included.

        Args:
            output: Logits, or a :class:`TrainingOutput`, whose auxiliary losses count 0.3 each for GoogLeNet and 0.4
                for Inception v3.
            targets: What ``loss_function`` takes beside logits: labels (B,) int, or shares (B, num_classes) float.
            loss_function: From (logits, targets) to a scalar; cross-entropy by default.

        Source: Szegedy et al. 2015, "Going deeper with convolutions", §5.

        Example:
            >>> from transferkit.create import create_model
            >>> model = create_model("torchvision/googlenet", weights=None, num_classes=2, aux="train").train()
            >>> output = model(torch.zeros(2, 3, 64, 64))
            >>> len(output.auxiliary), model.loss(output, torch.tensor([0, 1])).shape
            (2, torch.Size([]))
        """
        if isinstance(output, Tensor):
            return loss_function(output, targets)
        total = loss_function(output.logits, targets)
        for auxiliary in output.auxiliary:
            total = total + self.aux_weight * loss_function(auxiliary, targets)
        return total

    def features(self, images: Tensor | tuple[Tensor, ...], *, network: nn.Module | None = None) -> Tensor:
        """Return what the head receives, one vector per picture.

        Positions are averaged where the head is a convolution or sees every token. Of several heads, inputs of one
        width are averaged, as the distilled networks' two tokens; of different widths, put one after the other.

        Args:
            images: (B, C, H, W) float, normalised as :attr:`preprocessing` says; or what ``network`` takes.
            network: What runs, ``None`` for the whole network; the half behind frozen stages
                (:func:`~transferkit.splitting.split`) takes what the half before them gave.

        Returns:
            (B, num_features) float.
        """
        received: dict[str, Tensor] = {}
        handles = [
            self.network.get_submodule(path).register_forward_pre_hook(
                lambda module, inputs, path=path: received.update({path: inputs[0]})
            )
            for path in self.head_paths
        ]
        try:
            (self.network if network is None else network)(images)
        finally:
            for handle in handles:
                handle.remove()
        vectors = [_averaged(received[path]) for path in self.head_paths]
        if len({vector.shape[1] for vector in vectors}) == 1:
            return torch.stack(vectors).mean(0)
        return torch.cat(vectors, 1)

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
            >>> from transferkit.create import create_model
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
