"""The same result with less work: layers that take in what follows them, and wide parts that see one picture at a time.

Nothing is traced. One forward pass is watched, operation by operation. Each function changes the module it gets, which
is a copy in eval mode, and its caller compares what that gives before and after.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["fold_norms", "pack_convolutions", "part_wide_modules"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_norms(module: nn.Module, images: Tensor) -> None:
    """Fold each batch norm into the convolution or linear layer whose result it alone reads.

    A norm of timm's that brings its activation leaves the activation in its place.

    Args:
        module: A copy that computes without gradients, in eval mode; it is changed.
        images: (B, C, H, W), or whatever else it takes.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks", §3.2; ``torch.nn.utils.fusion``.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
        >>> fold_norms(layers, torch.zeros(1, 3, 8, 8))
        >>> layers
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    seen = _watch(module, images)
    for norm in list(module.modules()):
        left = _what_is_left(norm)
        call = seen.only_call(norm)
        if left is None or call is None or norm.running_mean is None:
            continue
        before = seen.maker(call.read[0])
        if before is None or not seen.is_read_by(call, alone=True):
            continue
        layer = before.module
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        if isinstance(layer, _CONVOLUTIONS) and seen.convolves_once(layer, before):
            layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics)  # type: ignore[arg-type]
        elif type(layer) is nn.Linear and seen.reads_once(layer.weight) and before.gave[0].dim() == 2 and norm.affine:
            layer.weight, layer.bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)  # type: ignore[arg-type]
        else:
            continue
        _replace(module, norm, left)


def pack_convolutions(module: nn.Module, images: Tensor, *, rows: int) -> None:
    """Give convolutions the activation that alone reads their result, and weights in the order the processor reads.

    Args:
        module: A copy that computes in single precision on the CPU without gradients, in eval mode; it is changed, and
            computes in nothing else from then on.
        images: (B, C, H, W).
        rows: The batch size that the weights are put in order for; others give the same results.

    Source: oneDNN, as torch's own compiler uses it (``torch/_inductor/fx_passes/mkldnn_fusion.py``).

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6()).requires_grad_(False)
        >>> pictures = torch.ones(2, 3, 8, 8)
        >>> expected = layers(pictures)
        >>> pack_convolutions(layers, pictures, rows=2)
        >>> type(layers[1]), torch.allclose(layers(pictures), expected, atol=1e-6)
        (<class 'torch.nn.modules.linear.Identity'>, True)
    """
    seen = _watch(module, images)
    for layer in list(module.modules()):
        call = seen.only_call(layer)
        if type(layer) is not nn.Conv2d or call is None or not seen.convolves_once(layer, call):
            continue
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            continue
        size = list(call.read[0].shape)
        size[0] = size[0] * rows // len(images)
        activation, words = _activation_behind(seen, call.gave[0])
        if activation is not None:
            _replace(module, activation, nn.Identity())
        _replace(module, layer, _Packed(layer, size, *words))


def part_wide_modules(module: nn.Module, images: Tensor, *, limit: int) -> None:
    """Let one picture at a time through the modules inside which it takes more room than the processor's cache has.

    An inverted residual block, say, whose inner channels are six times those it takes and gives: what it makes inside
    is read again before it has left the cache. Modules stay as they are that take or give half as much as they make
    inside, or whose weights, which each picture reads anew, are a quarter of that.

    Args:
        module: A copy that computes without gradients, in eval mode; it is changed.
        images: (B, C, H, W).
        limit: Bytes of one picture's tensor that are not too many.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 3, 1)).requires_grad_(False)
        >>> network, pictures = nn.Sequential(block), torch.zeros(2, 3, 8, 8)
        >>> part_wide_modules(network, pictures, limit=10_000)
        >>> network[0].one_by_one is block, network(pictures).shape
        (True, torch.Size([2, 3, 8, 8]))
    """
    seen = _watch(module, images)
    widest: dict[nn.Module, int] = defaultdict(int)
    for call in seen.calls:
        for tensor in call.gave:
            inside = seen.innermost(tensor)
            if inside is not None and inside is not module and tensor.shape[:1] == images.shape[:1]:
                widest[inside] = max(widest[inside], tensor.nbytes // len(images))
    for each, width in widest.items():
        weights = sum(part.numel() * part.element_size() for part in (*each.parameters(), *each.buffers()))
        outside = seen.widest_outside(each, len(images)) / len(images)
        if width > limit and width > 2 * outside and width > 4 * weights:
            _replace(module, each, _OneByOne(each))


class _OneByOne(nn.Module):
    """A module that sees one picture at a time."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.one_by_one = module

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.one_by_one(image) for image in torch.split(images, 1)])


class _Packed(nn.Module):
    """A convolution and its activation in one operation."""

    def __init__(self, layer: nn.Conv2d, size: list[int], activation: str, numbers: list[float]) -> None:
        super().__init__()
        place = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *place, size)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)
        self.settings = (*place, activation, numbers, "")

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._convolution_pointwise.default(images, self.weight, self.bias, *self.settings)
        return result


@dataclass(frozen=True, eq=False)
class _Call:
    """One operation: the modules it ran in, the tensors it read and gave, kept so that none takes another's place."""

    operation: Any
    inside: tuple[nn.Module, ...]
    read: tuple[Tensor, ...]
    gave: tuple[Tensor, ...]

    @property
    def module(self) -> nn.Module | None:
        return self.inside[-1] if self.inside else None


@dataclass(frozen=True)
class _Seen:
    """A forward pass."""

    calls: Sequence[_Call]
    results: frozenset[int]
    made: Mapping[int, _Call] = field(default_factory=dict)
    readers: Mapping[int, Sequence[_Call]] = field(default_factory=dict)
    called: Mapping[int, Sequence[_Call]] = field(default_factory=dict)
    passes: Mapping[nn.Module, Sequence[tuple[Any, Any]]] = field(default_factory=dict)

    def only_call(self, module: nn.Module | None) -> _Call | None:
        """Return the one operation that a module itself called in the whole pass."""
        calls = self.called.get(id(module), ())
        return calls[0] if len(calls) == 1 and calls[0].gave else None

    def maker(self, tensor: Tensor) -> _Call | None:
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

    def first_reader(self, tensor: Tensor) -> _Call | None:
        return next(iter(self.readers.get(id(tensor), ())), None)

    def is_read_by(self, call: _Call, *, alone: bool) -> bool:
        """Whether a call is the first to read its input and, if ``alone``, whether nothing else ever does."""
        readers = self.readers[id(call.read[0])]
        return readers[0] is call and not (alone and (len(readers) > 1 or id(call.read[0]) in self.results))

    def reads_once(self, weight: Tensor) -> bool:
        return len(self.readers.get(id(weight), ())) == 1

    def convolves_once(self, layer: nn.Module, call: _Call) -> bool:
        """Whether a layer's weight is used in this call alone, and as it is: some layers standardise it first."""
        weight = layer._parameters.get("weight")
        plain = call.operation is torch.ops.aten.convolution.default
        return plain and weight is not None and call.read[1] is weight and self.reads_once(weight)


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.running: list[nn.Module] = []
        self.passes: dict[nn.Module, list[tuple[Any, Any]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        if read:
            self.calls.append(_Call(func, tuple(self.running), read, _tensors(result)))
        return result

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        self.running.pop()
        self.passes[module].append(((*inputs, *named.values()), output))


def _watch(module: nn.Module, images: Tensor) -> _Seen:
    watcher = _Watcher()
    handles = []
    try:
        for each in module.modules():
            handles.append(each.register_forward_pre_hook(watcher.enter))
            handles.append(each.register_forward_hook(watcher.leave, with_kwargs=True))
        with torch.no_grad(), watcher:
            results = module(images)
    finally:
        for handle in handles:
            handle.remove()
    made: dict[int, _Call] = {}
    readers: dict[int, list[_Call]] = defaultdict(list)
    called: dict[int, list[_Call]] = defaultdict(list)
    for call in watcher.calls:
        called[id(call.module)].append(call)
        for tensor in call.read:
            readers[id(tensor)].append(call)
        for tensor in call.gave:
            made.setdefault(id(tensor), call)
    gave = frozenset(id(each) for each in _tensors(results))
    return _Seen(watcher.calls, gave, made, readers, called, watcher.passes)


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _what_is_left(norm: nn.Module) -> nn.Module | None:
    """Return what takes the place of a batch norm that is folded, or ``None`` for anything else."""
    from timm.layers import BatchNormAct2d

    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.Identity()
    return nn.Sequential(*norm.children()) if type(norm) is BatchNormAct2d else None  # its drop and act


def _activation_behind(seen: _Seen, made: Tensor) -> tuple[nn.Module | None, tuple[str, list[float]]]:
    """Find the activation that can become part of the layer that made a tensor, and name it as oneDNN does."""
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


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if module is old:
            root.set_submodule(path, new)
