"""Splitting any network into stages, in the order in which it uses them.

The network runs once on made input without memory or arithmetic (torch's ``meta`` device). That run tells when each
tensor is first used and how large each block's output is. Blocks at one resolution form a stage; where the resolution
never falls, as in a ViT, each block is a stage.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from transferkit.exceptions import SettingError, one_line

__all__ = ["StageNames", "run_twin", "split_into_stages"]

logger = logging.getLogger("transferkit")


@dataclass(frozen=True)
class StageNames:
    """One stage by the names of what belongs to it.

    Attributes:
        name: ``"stem"``, ``"stage1"`` …, ``"head"``.
        tensors: Dotted names of its parameters and buffers.
        modules: Dotted names of its modules; their training mode is the stage's.
    """

    name: str
    tensors: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass
class _Unit:
    """A block, or a single layer, that stays in one stage whole."""

    path: str
    module: nn.Module
    leads: bool = False  # whether it is the first child of its container
    start: int = -1
    shape: tuple[int, ...] = ()

    @property
    def is_block(self) -> bool:
        return any(True for child in self.module.children() for _ in child.parameters())

    @property
    def trains(self) -> bool:
        """Whether it holds parameters."""
        return any(True for _ in self.module.parameters())

    @property
    def has_weights(self) -> bool:
        """Whether it holds more than a norm's vectors."""
        return any(parameter.ndim > 1 for parameter in self.module.parameters())

    @property
    def positions(self) -> int:
        """Rows of a picture-like output (both layouts), 1 after pooling, or tokens."""
        return self.shape[2] if len(self.shape) == 4 else self.shape[1] if len(self.shape) == 3 else 1


@dataclass
class _Stage:
    name: str
    units: list[_Unit] = field(default_factory=list)


def split_into_stages(
    network: nn.Module, *, head_paths: tuple[str, ...], channels: int, size: int, must_run: bool = False
) -> tuple[StageNames, ...]:
    """Assign every parameter, buffer and module of a network to exactly one stage, in execution order.

    Args:
        network: Any classifier; it is left as it is.
        head_paths: Dotted names of its classification layers; they form the last stage.
        channels: Channels of its input.
        size: Side of its input in pixels.
        must_run: Whether a network that cannot run on such a picture is refused; else its stages follow the order in
            which its modules were declared, with a warning.

    Returns:
        ``stem``, ``stage1`` … ``stageN``, ``head``. Tensors of the network itself (``cls_token``, ``pos_embed``) belong
        to the stage that ran just before their first use; a tensor or module that is shared to its first user's.

    Raises:
        SettingError: The network must run, and cannot.

    Example:
        >>> from torchvision.models import resnet18
        >>> stages = split_into_stages(resnet18(), head_paths=("fc",), channels=3, size=224)
        >>> [stage.name for stage in stages]
        ['stem', 'stage1', 'stage2', 'stage3', 'stage4', 'head']
        >>> stages[1].tensors[0]
        'layer1.0.conv1.weight'
    """
    heads = {id(network.get_submodule(path)) for path in head_paths}
    containers: list[str] = [""]
    units: list[_Unit] = []
    for unit in _units(network, "", heads, containers):
        if all(unit.module is not other.module for other in units):
            units.append(unit)
    clock = _run(network, units, channels, size, must_run)
    _order(units, clock)
    weighted = [unit for unit in units if _own_tensors(unit.module)]
    stages = _group(weighted)
    owner = {id(unit): stage.name for stage in stages for unit in stage.units}
    current = stages[0].name
    for unit in units:
        current = owner.setdefault(id(unit), current)

    names = [*(stage.name for stage in stages), "head"]
    tops = [*((owner[id(unit)], unit.path) for unit in units), *(("head", path) for path in head_paths)]
    modules = _modules_by_stage(network, names, tops)

    def user(tensor: Tensor) -> str:
        """Name the stage that ran just before a tensor's first use."""
        first = clock.get(id(tensor), -1)
        return next((owner[id(unit)] for unit in reversed(weighted) if unit.start <= first), owner[id(weighted[0])])

    tensors = _tensors_by_stage(network, modules, containers, user)
    return tuple(StageNames(name, tuple(tensors[name]), tuple(modules[name])) for name in names)


def _modules_by_stage(network: nn.Module, names: list[str], tops: list[tuple[str, str]]) -> dict[str, list[str]]:
    """List each stage's modules by name, each with all that is inside; one that is shared counts for the first."""
    modules: dict[str, list[str]] = {name: [] for name in names}
    seen: set[int] = set()
    for name, path in tops:
        for inner, module in network.get_submodule(path).named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                modules[name].append(f"{path}.{inner}".rstrip("."))
    return modules


def _tensors_by_stage(
    network: nn.Module, modules: dict[str, list[str]], containers: list[str], user: Callable[[Tensor], str]
) -> dict[str, list[str]]:
    """List each stage's tensors by name; one that no block owns, ``cls_token`` for example, goes to its user."""
    tensors: dict[str, list[str]] = {name: [] for name in modules}
    seen: set[int] = set()
    owned = [(name, path) for name, paths in modules.items() for path in paths]
    for name, path in [*owned, *(("", path) for path in containers)]:
        for key, tensor in _direct_tensors(network.get_submodule(path)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name or user(tensor)].append(f"{path}.{key}".lstrip("."))
    return tensors


def _units(module: nn.Module, path: str, heads: set[int], containers: list[str]) -> Iterator[_Unit]:
    """Walk down through containers to the blocks and layers inside them, leaving out the head."""
    for position, (name, child) in enumerate(module.named_children()):
        child_path = f"{path}.{name}".lstrip(".")
        if id(child) in heads:
            continue
        if _is_container(child, heads):
            containers.append(child_path)
            yield from _units(child, child_path, heads, containers)
        else:
            yield _Unit(child_path, child, leads=position == 0)


def _is_container(module: nn.Module, heads: set[int]) -> bool:
    """Whether a module only strings blocks together: a list, what holds the head, or a stack of like blocks."""
    if not any(True for _ in module.children()):
        return False
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return True
    if any(id(inner) in heads for inner in module.modules()):
        return True
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(child) > 1:
            kinds = {type(block) for block in child}
            stacked = len(kinds) == 1 and not isinstance(child[0], nn.Sequential)
            if stacked and _Unit("", child[0]).is_block:
                return True
    return False


def _direct_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return list(itertools.chain(module.parameters(), module.buffers()))


class _Clock(TorchFunctionMode):
    """Notes at which tick each watched tensor is first handed to a torch function."""

    def __init__(self) -> None:
        super().__init__()
        self.watch([], [])

    def watch(self, tensors: list[Tensor], originals: list[Tensor]) -> None:
        """Start again: note the first use of each tensor under the identity of its original."""
        self.watched = {id(tensor): id(original) for tensor, original in zip(tensors, originals, strict=True)}
        self.first: dict[int, int] = {}
        self.tick = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            original = self.watched.get(id(leaf))
            if original is not None and original not in self.first:
                self.tick += 1
                self.first[original] = self.tick
        return func(*args, **(kwargs or {}))


def _run(network: nn.Module, units: list[_Unit], channels: int, size: int, must_run: bool) -> dict[int, int]:
    """Run the network once; returns the tick of each tensor's first use and fills in the units' starts and shapes."""
    clock = _Clock()

    def watch(probe: nn.Module) -> None:
        clock.watch(_own_tensors(probe), _own_tensors(network))
        for unit in units:
            unit.start, unit.shape = -1, ()
            twin = probe.get_submodule(unit.path)
            twin.register_forward_pre_hook(lambda module, inputs, unit=unit: note_start(unit))
            twin.register_forward_hook(lambda module, inputs, output, unit=unit: note_shape(unit, output))

    def note_start(unit: _Unit) -> None:
        if unit.start < 0:
            clock.tick += 1
            unit.start = clock.tick

    def note_shape(unit: _Unit, output: Any) -> None:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if shapes and not unit.shape:
            unit.shape = shapes[0]

    with clock:
        _, reason = run_twin(network, watch, channels=channels, size=size)
    if reason is None:
        return clock.first
    if must_run:
        raise SettingError(
            f"{type(network).__name__} cannot take {size}-px pictures of {channels} channels "
            f"({_in_words(reason)}); choose another image_size, or none for that of the weights"
        ) from reason
    for unit in units:
        unit.start, unit.shape = -1, ()
    logger.warning(
        "%s could not run on a made %d-px picture (%s); its stages follow the order of declaration",
        type(network).__name__,
        size,
        _in_words(reason),
    )
    return {}


def run_twin(
    network: nn.Module, watch: Callable[[nn.Module], None], *, channels: int, size: int
) -> tuple[Any, Exception | None]:
    """Run a copy of a network on a made picture in eval mode: without values (``meta``), else on the CPU if it has any.

    Args:
        network: Left as it is.
        watch: Called with each copy before it runs, to put hooks on it.
        channels: Channels of the picture.
        size: Its side in pixels.

    Returns:
        What the network returned and ``None``, or ``None`` and what it raised last.
    """
    dtype = next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.float32)
    reason: Exception | None = None
    there = {tensor.device.type for tensor in _own_tensors(network)}
    for device in ("meta",) if there == {"meta"} else ("meta", "cpu"):
        try:
            probe = _twin(network, device)
            watch(probe)
            # A real run may draw random numbers, in eval mode too.
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                return probe(torch.zeros(1, channels, size, size, device=device, dtype=dtype)), None
        except Exception as error:  # networks raise whatever they like
            reason = error
    return None, reason


def _in_words(error: Exception) -> str:
    return one_line(error, longest=200) or type(error).__name__


def _twin(network: nn.Module, device: str) -> nn.Module:
    """Copy a network, without its values for ``meta``."""
    tensors = _own_tensors(network)
    memo: dict[int, Any] = {}
    if device == "meta":
        for tensor in tensors:
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, memo).eval()


def _order(units: list[_Unit], clock: dict[int, int]) -> None:
    """Sort by first use; what is never used stays behind its neighbour in the declaration."""
    last = 0
    for unit in units:
        if unit.start < 0:  # never called itself; its tensors may be used all the same
            unit.start = min((clock[id(each)] for each in _own_tensors(unit.module) if id(each) in clock), default=last)
        last = unit.start
    units.sort(key=lambda unit: unit.start)


def _group(units: list[_Unit]) -> list[_Stage]:
    """Join units into stages: the stem, then one stage per resolution or, where it never falls, per block."""
    stem = _Stage("stem", units[:1])
    rest = units[1:]
    # What holds buffers alone (a table of rotary positions) opens no stage.
    while rest and not rest[0].is_block and (not rest[0].trains or rest[0].positions == stem.units[0].positions):
        stem.units.append(rest.pop(0))
    stages = _by_resolution(rest)
    blocks = [unit for unit in rest if unit.is_block]
    # A block that pools the tokens by attention comes last and leaves one vector.
    of_tokens = all(len(unit.shape) == 3 for unit in blocks if len(unit.shape) != 2)
    isotropic = sum(any(unit.is_block for unit in stage) for stage in stages) == 1
    if len(blocks) > 1 and (of_tokens or isotropic):
        stages = _by_block(rest)
    return [stem, *(_Stage(f"stage{number}", stage) for number, stage in enumerate(stages, 1))]


def _by_resolution(units: list[_Unit]) -> list[list[_Unit]]:
    stages: list[list[_Unit]] = []
    lowest = 0
    for unit in units:
        # A norm after pooling has fewer positions but is no stage of its own.
        if not stages or (unit.positions < lowest and unit.has_weights):
            # A norm that opens a downsampling layer (ConvNeXt) goes with it.
            opened = stages and stages[-1][-1].leads and not stages[-1][-1].has_weights
            stages.append([stages[-1].pop()] if opened else [])
            lowest = unit.positions
        stages[-1].append(unit)
    return stages


def _by_block(units: list[_Unit]) -> list[list[_Unit]]:
    stages: list[list[_Unit]] = []
    for unit in units:
        if not stages or unit.is_block:
            stages.append([])
        stages[-1].append(unit)
    return stages
