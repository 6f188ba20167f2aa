"""The same result with less work: layers that take in what follows them, and wide parts that see one picture at a time.

One forward pass is watched (:func:`~transferkit.watching.watch`). Each function changes the module it gets, which
is a copy in eval mode, and its caller compares what that gives before and after.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from transferkit.watching import activation_behind, watch, what_is_left

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
    seen = watch(module, images)
    for norm in list(module.modules()):
        left = what_is_left(norm)
        call = seen.only_call(norm)
        if left is None or call is None or norm.running_mean is None:
            continue
        before = seen.only_maker(call)
        if before is None:
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
    seen = watch(module, images)
    for layer in list(module.modules()):
        call = seen.only_call(layer)
        if type(layer) is not nn.Conv2d or call is None or not seen.convolves_once(layer, call):
            continue
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            continue
        size = list(call.read[0].shape)
        size[0] = size[0] * rows // len(images)
        activation, words = activation_behind(seen, call.gave[0])
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
    seen = watch(module, images)
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


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if module is old:
            root.set_submodule(path, new)
