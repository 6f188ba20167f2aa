"""Convolutions that train as one operation with the kept batch norm and the activation behind them, on a CPU.

A batch norm that keeps its statistics multiplies and shifts each channel by numbers that do not depend on the batch. So
the convolution before it can take it in: scaled weights give what scaling afterwards would give, and the chain rule
carries the gradients on to weight, scale and shift. Training then goes over what convolutions give two to five times
less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.closeness import same_but_for_rounding
from transferkit.evaluation import undisturbed
from transferkit.randomness import seed_generators
from transferkit.watching import Seen, activation_behind, watch, what_is_left

__all__ = ["Fusion", "find_fusions", "fused"]

# Pictures of a batch. Fixed, so that the same layers are fused whatever batch a run goes on with.
_PICTURES = 16
_FUSED_ACTIVATIONS = ("relu", "hardtanh")  # their gradients can be told from what they give


@dataclass(frozen=True, eq=False)
class Fusion:
    """A convolution that takes in what follows it.

    Attributes:
        layer: The convolution.
        norm: The batch norm that alone reads what it gives, and keeps its statistics.
        left: What else the norm does, an activation of its own, or nothing.
        activation: What alone reads that and is computed with the convolution, or ``None``.
        kind: Of the activation, as oneDNN names it; ``"none"`` for none.
        numbers: The activation's own.
    """

    layer: nn.Conv2d
    norm: _BatchNorm
    left: nn.Module
    activation: nn.Module | None = None
    kind: str = "none"
    numbers: tuple[float, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        """Return what convolution, norm and fused activation give for images (B, C, H, W)."""
        layer, norm = self.layer, self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        before = norm.running_mean if layer.bias is None else norm.running_mean - layer.bias
        bias = -before * scale if norm.bias is None else norm.bias - before * scale
        weight = layer.weight * scale.view(-1, 1, 1, 1)
        stride, padding, dilation, groups = place = (layer.stride, layer.padding, layer.dilation, layer.groups)
        if self.activation is None:
            return F.conv2d(images, weight, bias, stride, padding, dilation, groups)
        result: Tensor = _ConvolutionAndActivation.apply(images, weight, bias, place, self.kind, self.numbers)
        return result


@contextmanager
def fused(fusions: list[Fusion]) -> Iterator[None]:
    """Let a network's own modules compute fused inside the block, forwards and backwards.

    Args:
        fusions: Of :func:`find_fusions`; all that was true of the network then must be true now.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval(), nn.ReLU())
        >>> images = torch.rand(2, 3, 8, 8)
        >>> with fused(find_fusions(layers, images)):
        ...     given = layers(images)
        >>> given.grad_fn.name(), torch.allclose(given, layers(images), atol=1e-6)
        ('_ConvolutionAndActivationBackward', True)
    """
    stand_ins: list[tuple[nn.Module, Callable[[Any], Any]]] = []
    for each in fusions:
        stand_ins += [(each.layer, each), (each.norm, each.left)]
        if each.activation is not None:
            stand_ins.append((each.activation, _unchanged))
    try:
        for module, forward in stand_ins:
            module.__dict__["forward"] = forward  # where torch looks first; nn.Module's own way in takes far longer
        yield
    finally:
        for module, _ in stand_ins:
            module.__dict__.pop("forward", None)


def find_fusions(module: nn.Module, inputs: Any) -> list[Fusion]:
    """Find the convolutions of a module in training that can take in what follows them, and are worth it.

    Their norm is in eval mode, what they give is larger than their weights, and nobody else sees what lies between.
    The module is run with and without the fusions; where it does not give the same, but for rounding, there are none.

    Args:
        module: What is trained, in its modes, on a CPU, in single precision. It is left as it is.
        inputs: A few pictures (B, C, H, W), or whatever it takes for a few.

    Source: the norm, Jacob et al. 2018, §3.2; one operation with the activation is oneDNN's.

    Example:
        >>> from torchvision.models import mobilenet_v2
        >>> network = mobilenet_v2(num_classes=2).train()
        >>> len(find_fusions(network, torch.rand(2, 3, 64, 64)))
        0
        >>> for each in network.modules():
        ...     each.training &= not isinstance(each, nn.BatchNorm2d)
        >>> len(find_fusions(network, torch.rand(2, 3, 224, 224)))
        49
    """
    if not any(_is_kept(each) for each in module.modules()) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    try:
        with undisturbed(module), torch.autocast("cpu", enabled=False):
            seed_generators(0)
            seen = watch(module, inputs)
        found = [each for norm in module.modules() if (each := _fusion(seen, norm)) is not None]
        with undisturbed(module), fused(found):
            seed_generators(0)
            given = module(inputs)
    except Exception:  # networks do whatever they like
        return []
    return found if same_but_for_rounding(given, seen.given) else []


def _fusion(seen: Seen, norm: nn.Module) -> Fusion | None:
    left, call = what_is_left(norm), seen.only_call(norm)
    if left is None or call is None or not isinstance(norm, _BatchNorm) or not _is_kept(norm):
        return None
    before = seen.only_maker(call)
    layer = None if before is None else before.module
    if before is None or type(layer) is not nn.Conv2d or not seen.convolves_once(layer, before):
        return None
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros" or layer.weight.dtype != torch.float32:
        return None
    made = before.gave[0]
    if layer.weight.nbytes * len(made) > made.nbytes * _PICTURES or _is_looked_at(layer) or _is_looked_at(norm):
        return None
    fusion = partial(Fusion, layer, norm, left)
    activation, (kind, numbers) = activation_behind(seen, call.gave[0])
    if activation is None or kind not in _FUSED_ACTIVATIONS or _is_looked_at(activation):
        return fusion()
    return fusion(activation, kind, tuple(numbers))


def _is_kept(module: nn.Module) -> bool:
    """Whether a batch norm trains, but for its statistics."""
    if not isinstance(module, _BatchNorm) or module.training or module.running_mean is None:
        return False
    return any(each.requires_grad for each in module.parameters())


def _is_looked_at(module: nn.Module) -> bool:
    """Whether somebody watches a module, or has replaced its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class _ConvolutionAndActivation(torch.autograd.Function):
    """oneDNN's one operation for both, with a gradient: that of the activation needs only what it gave."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        place: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
        kind: str,
        numbers: tuple[float, ...],
    ) -> Tensor:
        stride, padding, dilation, groups = place
        words = (list(padding), list(stride), list(dilation), groups, kind, list(numbers), "")
        result: Tensor = torch.ops.mkldnn._convolution_pointwise.default(images, weight, bias, *words)
        ctx.save_for_backward(images, weight, result)
        ctx.place, ctx.numbers = place, numbers
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, result = ctx.saved_tensors
        if ctx.numbers:
            gradient = torch.ops.aten.hardtanh_backward(gradient, result, *ctx.numbers)
        else:
            gradient = torch.ops.aten.threshold_backward(gradient, result, 0)
        stride, padding, dilation, groups = ctx.place
        gradients = torch.ops.aten.convolution_backward(
            gradient,
            images,
            weight,
            [len(weight)],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            list(ctx.needs_input_grad[:3]),
        )
        return (*gradients, None, None, None)
