"""One forward pass, watched operation by operation: what made a tensor, what reads it, and inside which modules.

Nothing is traced, so that a network may do in its forward what it likes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transferkit.backbones import timm_layers

__all__ = ["Call", "Seen", "activation_behind", "watch", "what_is_left"]


@dataclass(frozen=True, eq=False)
class Call:
    """One operation.

    Attributes:
        operation: Of torch's dispatcher.
        inside: The modules it ran in, the outermost first.
        read: The tensors it read, kept so that none takes another's place.
        gave: Those it gave.
    """

    operation: Any
    inside: tuple[nn.Module, ...]
    read: tuple[Tensor, ...]
    gave: tuple[Tensor, ...]

    @property
    def module(self) -> nn.Module | None:
        """The innermost module it ran in."""
        return self.inside[-1] if self.inside else None


@dataclass(frozen=True)
class Seen:
    """A forward pass.

    Attributes:
        calls: Its operations in their order.
        given: What the module gave.
        results: Identities of the tensors in that.
        made: The operation that made a tensor, by its identity.
        readers: The operations that read it.
        called: The operations that a module called itself, by its identity.
        passes: What each module was given and gave, each time.
    """

    calls: Sequence[Call]
    given: Any
    results: frozenset[int]
    made: Mapping[int, Call] = field(default_factory=dict)
    readers: Mapping[int, Sequence[Call]] = field(default_factory=dict)
    called: Mapping[int, Sequence[Call]] = field(default_factory=dict)
    passes: Mapping[nn.Module, Sequence[tuple[Any, Any]]] = field(default_factory=dict)

    def only_call(self, module: nn.Module | None) -> Call | None:
        """Return the one operation that a module itself called in the whole pass."""
        calls = self.called.get(id(module), ())
        return calls[0] if len(calls) == 1 and calls[0].gave else None

    def maker(self, tensor: Tensor) -> Call | None:
        """Return the operation that made a tensor, unless it came from outside."""
        return self.made.get(id(tensor))

    def innermost(self, tensor: Tensor) -> nn.Module | None:
        """Return the smallest module in which a tensor is both made and read."""
        calls = [*filter(None, [self.maker(tensor)]), *self.readers.get(id(tensor), ())]
        if len(calls) < 2:
            return None
        common = [each[0] for each in zip(*(call.inside for call in calls), strict=False) if len(set(each)) == 1]
        return common[-1] if common else None

    def widest_outside(self, module: nn.Module, count: int) -> float:
        """Return the bytes of what a module takes or gives; endless unless each is one tensor of so many pictures."""
        passes = self.passes.get(module, ())
        match passes:
            case [((Tensor() as taken,), Tensor() as given)] if len(taken) == len(given) == count:
                return max(taken.nbytes, given.nbytes)
        return math.inf

    def only_maker(self, call: Call) -> Call | None:
        """Return the operation that made what a call reads first, if nothing else ever reads that."""
        return self.maker(call.read[0]) if self.is_read_by(call, alone=True) else None

    def first_reader(self, tensor: Tensor) -> Call | None:
        """Return the operation that reads a tensor first, if any does."""
        return next(iter(self.readers.get(id(tensor), ())), None)

    def is_read_by(self, call: Call, *, alone: bool) -> bool:
        """Whether a call is the first to read its input and, if ``alone``, whether nothing else ever does."""
        readers = self.readers[id(call.read[0])]
        return readers[0] is call and not (alone and (len(readers) > 1 or id(call.read[0]) in self.results))

    def reads_once(self, weight: Tensor) -> bool:
        """Whether a single operation reads a tensor."""
        return len(self.readers.get(id(weight), ())) == 1

    def convolves_once(self, layer: nn.Module, call: Call) -> bool:
        """Whether a layer's weight is used in this call alone, and as it is: some layers standardise it first."""
        weight = layer._parameters.get("weight")
        plain = call.operation is torch.ops.aten.convolution.default
        return plain and weight is not None and call.read[1] is weight and self.reads_once(weight)


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.running: list[nn.Module] = []
        self.passes: dict[nn.Module, list[tuple[Any, Any]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        if read:
            self.calls.append(Call(func, tuple(self.running), read, _tensors(result)))
        return result

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        self.running.pop()
        self.passes[module].append(((*inputs, *named.values()), output))


def watch(module: nn.Module, inputs: Any) -> Seen:
    """Run a module once, without gradients, and note each operation and module on the way.

    Args:
        module: It runs in the modes it is in, so that running statistics and random generators may move.
        inputs: (B, C, H, W), or whatever else it takes.

    Source: ``torch.utils._python_dispatch.TorchDispatchMode``.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        >>> seen = watch(layers, torch.zeros(1, 3, 8, 8))
        >>> [type(call.module).__name__ for call in seen.calls if call.module is not None]
        ['Conv2d', 'ReLU']
        >>> seen.first_reader(seen.calls[0].gave[0]).module is layers[1]
        True
    """
    watcher = _Watcher()
    handles = []
    try:
        for each in module.modules():
            handles.append(each.register_forward_pre_hook(watcher.enter))
            handles.append(each.register_forward_hook(watcher.leave, with_kwargs=True))
        with torch.no_grad(), watcher:
            given = module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    made: dict[int, Call] = {}
    readers: dict[int, list[Call]] = defaultdict(list)
    called: dict[int, list[Call]] = defaultdict(list)
    for call in watcher.calls:
        called[id(call.module)].append(call)
        for tensor in call.read:
            readers[id(tensor)].append(call)
        for tensor in call.gave:
            made.setdefault(id(tensor), call)
    results = frozenset(id(each) for each in _tensors(given))
    return Seen(watcher.calls, given, results, made, readers, called, watcher.passes)


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def what_is_left(norm: nn.Module) -> nn.Module | None:
    """Return what takes the place of a batch norm that is folded, or ``None`` for anything else.

    Example:
        >>> what_is_left(nn.BatchNorm2d(4)), what_is_left(nn.ReLU())
        (Identity(), None)
    """
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.Identity()
    layers = timm_layers()
    with_activation = layers is not None and type(norm) is layers.BatchNormAct2d
    return nn.Sequential(*norm.children()) if with_activation else None  # its drop and act


def activation_behind(seen: Seen, made: Tensor) -> tuple[nn.Module | None, tuple[str, list[float]]]:
    """Find the activation that can become part of the layer that made a tensor, and name it as oneDNN does.

    Args:
        seen: A forward pass.
        made: What the layer gave in it.

    Returns:
        The activation and its name and numbers; ``None`` and ``"none"`` where there is none.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6())
        >>> seen = watch(layers, torch.zeros(1, 3, 8, 8))
        >>> activation_behind(seen, seen.calls[0].gave[0])
        (ReLU6(), ('hardtanh', [0.0, 6.0]))
    """
    call = seen.first_reader(made)
    if call is not None and call is seen.only_call(call.module):
        in_place = call.gave[0] is made  # what reads the tensor later reads what the activation left there
        if seen.is_read_by(call, alone=not in_place):
            match call.module:
                case nn.ReLU():
                    return call.module, ("relu", [])
                case nn.Hardtanh(min_val=low, max_val=high):  # ReLU6 is one
                    return call.module, ("hardtanh", [low, high])
                case nn.SiLU():
                    return call.module, ("swish", [])
                case nn.Hardswish():
                    return call.module, ("hardswish", [])
    return None, ("none", [])
