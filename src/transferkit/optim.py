"""Parameter groups with real learning rates, and the optimizers that take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import nn

from transferkit.exceptions import SettingError, closest
from transferkit.ranges import check_number

__all__ = [
    "HasParameters",
    "HasStages",
    "OptimizerFactory",
    "build_optimizer",
    "check_rates",
    "find_optimizer",
    "param_groups",
    "unassigned_parameters",
]

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer of a list of groups, such as ``functools.partial(torch.optim.RMSprop, alpha=0.9)``."""

_OPTIMIZERS: Mapping[str, tuple[OptimizerFactory, Mapping[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),  # torch has no fused one for sharded networks
}


class HasParameters(Protocol):
    """One stage: its name and its own parameters."""

    @property
    def name(self) -> str:
        """The stage's name."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that belong to this stage and to no other."""


class HasStages(Protocol):
    """What :func:`param_groups` needs of a model; a ``TransferModel`` has it."""

    @property
    def network(self) -> nn.Module:
        """The native network."""

    @property
    def stages(self) -> Sequence[HasParameters]:
        """The stages in execution order, the head last."""


def param_groups(
    model: HasStages,
    *,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Put every parameter into a torch group with the learning rate and weight decay it really gets.

    A stage ``k`` steps below the head has ``lr * layer_decay**k``, the head ``lr * head_lr_multiplier``. Norms,
    biases, other 1-d parameters and those the network lists in ``no_weight_decay()`` (timm) are not decayed. Frozen
    parameters are in their groups too, so freezing and unfreezing never changes the groups.

    Args:
        model: Its stages in execution order, the head last; a ``TransferModel``.
        lr: Learning rate of the stage below the head if ``layer_decay`` is 1; above 0.
        weight_decay: Of weight matrices and kernels; 0 or more.
        layer_decay: Factor from one stage to the one before it; above 0, at most 1. With 1 all stages learn alike.
        head_lr_multiplier: Factor of the head's learning rate; above 0.

    Returns:
        One or two groups per stage, ``{"params", "lr", "weight_decay", "stage"}``, in the order of the stages; groups
        without parameters are left out.

    Raises:
        SettingError: A number is outside its range, or the stages do not hold every parameter exactly once.

    Source: ELECTRA (Clark et al. 2020) and BEiT (Bao et al. 2021) layer-wise decay; timm's
    ``param_groups_layer_decay`` makes the same groups with an ``lr_scale`` that torch's schedulers do not read.

    Example:
        >>> from types import SimpleNamespace as Plain
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> stages = [Plain(name="stem", parameters=tuple(network[0].parameters())),
        ...           Plain(name="head", parameters=tuple(network[1].parameters()))]
        >>> groups = param_groups(Plain(network=network, stages=stages), lr=0.1, weight_decay=0.01, layer_decay=0.5)
        >>> [(group["stage"], group["lr"], group["weight_decay"]) for group in groups]
        [('stem', 0.05, 0.01), ('stem', 0.05, 0.0), ('head', 0.1, 0.01), ('head', 0.1, 0.0)]
    """
    check_rates(lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, head_lr_multiplier=head_lr_multiplier)
    undecayed = _undecayed(model.network)
    groups: list[dict[str, Any]] = []
    stages = tuple(model.stages)
    for depth, stage in zip(reversed(range(len(stages))), stages, strict=True):
        stage_lr = float(lr * (layer_decay**depth if depth else head_lr_multiplier))  # whatever numpy calls a number
        decayed = [parameter for parameter in stage.parameters if id(parameter) not in undecayed]
        others = [parameter for parameter in stage.parameters if id(parameter) in undecayed]
        groups += [
            {"params": params, "lr": stage_lr, "weight_decay": decay, "stage": stage.name}
            for params, decay in ((decayed, float(weight_decay)), (others, 0.0))
            if params
        ]
    _require_every_parameter_once(model.network, groups)
    return groups


def check_rates(
    *, lr: float, weight_decay: float = 0.0, layer_decay: float = 1.0, head_lr_multiplier: float = 1.0
) -> None:
    """Raise ``SettingError`` unless these settings of :func:`param_groups` are within their ranges."""
    check_number("lr", lr, above=0)
    check_number("weight_decay", weight_decay, at_least=0)
    check_number("layer_decay", layer_decay, above=0, at_most=1)
    check_number("head_lr_multiplier", head_lr_multiplier, above=0)


def build_optimizer(
    name_or_factory: str | OptimizerFactory, groups: Iterable[Mapping[str, Any]], **options: Any
) -> torch.optim.Optimizer:
    """Make a torch optimizer of groups that carry their own learning rates.

    Args:
        name_or_factory: ``"adamw"``, ``"sgd"`` (Nesterov momentum 0.9), or a callable that takes the groups.
        groups: As :func:`param_groups` returns them; they are copied, so one list can make several optimizers.
        **options: More keywords of the optimizer, such as ``betas`` or ``momentum``.

    Returns:
        The optimizer; each of its ``param_groups`` keeps its ``lr``, ``weight_decay`` and ``stage``.

    Raises:
        SettingError: The name is unknown, the optimizer refuses an option, or an option is already in the groups,
            where torch would ignore it.

    Source: ``torch.optim.AdamW`` (Loshchilov & Hutter 2019) and ``torch.optim.SGD``.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = build_optimizer("sgd", [{"params": [weight], "lr": 0.1, "weight_decay": 0.0, "stage": "head"}])
        >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        (0.1, 0.9)
    """
    factory, defaults = find_optimizer(name_or_factory)
    own_groups = [dict(group) for group in groups]
    taken = sorted(options.keys() & {key for group in own_groups for key in group})
    if taken:
        raise SettingError(f"{', '.join(taken)} belongs to the parameter groups; give it to param_groups instead")
    try:
        optimizer = factory(own_groups, **{**defaults, **options})
    except (TypeError, ValueError) as error:
        raise SettingError(f"optimizer {name_or_factory!r} refuses options {options}: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingError(f"optimizer {name_or_factory!r} returned {type(optimizer).__name__}, no torch Optimizer")
    return optimizer


def find_optimizer(name_or_factory: str | OptimizerFactory) -> tuple[OptimizerFactory, Mapping[str, Any]]:
    """Return the callable of a name and the options it gets; a callable is returned as it is, without options.

    Args:
        name_or_factory: As for :func:`build_optimizer`.

    Raises:
        SettingError: The name is unknown.
    """
    if not isinstance(name_or_factory, str):
        return name_or_factory, {}
    if name_or_factory not in _OPTIMIZERS:
        raise SettingError(
            f"no optimizer named {name_or_factory!r}; give {', '.join(_OPTIMIZERS)} or a callable"
            f"{closest(name_or_factory, _OPTIMIZERS)}"
        )
    return _OPTIMIZERS[name_or_factory]


def _undecayed(network: nn.Module) -> set[int]:
    """Identities of the parameters that weight decay must leave alone."""
    list_names = getattr(network, "no_weight_decay", None)
    patterns = tuple(list_names()) if callable(list_names) else ()
    by_name = {
        id(parameter)
        for name, parameter in network.named_parameters(remove_duplicate=False)
        # timm's lists hold wildcards, such as "pos_embed.*"
        if parameter.ndim <= 1 or name.endswith("bias") or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    # these two can normalise over several dimensions, so their weights are not always 1-d
    norms = (module for module in network.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm))
    return by_name | {id(parameter) for norm in norms for parameter in norm.parameters()}


def _require_every_parameter_once(network: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise SettingError unless the groups hold each parameter of the network exactly once, by identity."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    held = Counter(id(parameter) for group in groups for parameter in group["params"])
    missing = [name for identity, name in names.items() if identity not in held]
    repeated = [name for identity, name in names.items() if held[identity] > 1]
    if missing or repeated or len(held) != len(names):
        foreign = len(held.keys() - names.keys())
        raise SettingError(
            "every parameter of the network must belong to exactly one stage; "
            f"in none: {', '.join(missing) or '-'}; in several: {', '.join(repeated) or '-'}; "
            f"in a stage but not in the network: {foreign}"
        )


def unassigned_parameters(network: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the parameters that no optimizer group holds, compared by identity.

    Args:
        network: The network to be trained.
        groups: ``optimizer.param_groups``.
    """
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return [name for name, parameter in network.named_parameters() if id(parameter) not in held]
