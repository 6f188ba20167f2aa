"""What a network gives, without training it, as fast as the machine allows.

The frozen pass of a cached run, validation and prediction are the same job: the weights stay as they are, and only what
the network gives is wanted.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from transferkit.closeness import same_but_for_rounding
from transferkit.exceptions import SettingError, one_line
from transferkit.export import frozen_copy, onnx_program, onnx_session
from transferkit.folding import fold_norms, pack_convolutions, part_wide_modules
from transferkit.randomness import keeps_generators

__all__ = ["ENGINES", "check_engine", "fast_forward", "micro_batch"]

_Step = Callable[[nn.Module, Tensor], object]

ENGINES = ("eager", "compile", "onnxruntime", "openvino")
"""What can compute: torch as it is, torch's compiler, and two runtimes that are extras."""

# Eight pictures of 224 px take 0 to 7 % less time than four: fewer take more calls, more leave the cache.
_PIXELS = 8 * 224 * 224
# Bytes. Nine networks with blocks that are wider inside took 0 to 11 % less time, MobileNetV2 5 to 10 %.
_WIDE = 1200 * 1024
# More Python threads than these wait for one another.
_THREADS = 8


def fast_forward(
    module: nn.Module, example: Tensor, *, engine: str = "eager", autocast: torch.dtype | None = None
) -> Callable[[Tensor], Any]:
    """Return a function that gives what a module gives in eval mode, for its weights as they are now.

    It computes with a copy: batch norms become part of the layers before them, pictures and weights lie channels last,
    and nothing is kept for a backward pass. On the CPU a batch is cut into micro-batches (:func:`micro_batch`) which
    run side by side, each on cores of its own, so that none waits for another operation by operation; convolutions
    take in the activation behind them; blocks that are much wider inside than outside see one picture at a time. All
    of this is done if two pictures give the same afterwards, but for a ten-thousandth of the largest number, else what
    of it leaves them so; a network that allows none runs as it is. The same pictures in the same batches give the same
    bits at every call.

    Args:
        module: A network, or anything else from images to a tensor (B, …) or nested tuples of such. It is left as it
            is. One that cannot be copied runs itself, in eval mode, with its weights as they are at each call.
        example: (B, C, H, W) of one picture or more, where the module is, of the size that will be asked for most.
        engine: One of :data:`ENGINES`. ``"compile"`` takes a minute to start and needs a C++ compiler on the CPU.
            ``"onnxruntime"`` and ``"openvino"`` compute on the CPU, in single precision.
        autocast: ``torch.bfloat16`` lets torch's own engine compute on the CPU as autocast does, which is faster where
            the processor has instructions for it; ``None`` for the type of the weights, whatever autocast says around
            a call. On other devices what is said there counts.

    Returns:
        A function from images (B, C, H, W), B from 0 on, to what the module gives for them, without gradient.

    Raises:
        SettingError: There is no such engine, it is not installed, or it cannot compute this network.

    Source: folding, Jacob et al. 2018, §3.2; the rest is what torch, ONNX Runtime and OpenVINO offer.

    Example:
        >>> from torchvision.models import mobilenet_v2
        >>> network, images = mobilenet_v2(num_classes=2), torch.rand(5, 3, 64, 64)
        >>> forward = fast_forward(network, images)
        >>> torch.allclose(forward(images), network.eval()(images), atol=1e-4)
        True
    """
    check_engine(engine)
    images = torch.cat([example[:1], example[:1].flip(-1)])
    with keeps_generators(), _computing():
        try:
            network: nn.Module = _Laid(frozen_copy(module))
        except Exception as error:  # networks hold whatever they like
            if engine != "eager":
                raise SettingError(f"engine={engine!r} needs a copy of the network ({error}); use 'eager'") from error
            return partial(_as_it_is, module)
        expected = network(images)
        halved = autocast if engine == "eager" and images.device.type == "cpu" else None
        network = _improved(network, images, expected, engine, packed=halved is None)
        if halved is not None:
            network = _halved(network, images, expected, halved)
            expected = network(images)
        if engine != "eager":
            return _checked(engine, network, images, expected)
        apart = _agrees(lambda: _joined([network(each) for each in torch.split(images, 1)]), expected)
    if images.device.type != "cpu" or images.dim() != 4 or not apart:
        return partial(_in_parts, partial(map, network), None)
    threads = torch.get_num_threads()
    workers = min(threads, _THREADS)
    return partial(_in_parts, _SideBySide(network, workers, threads // workers), workers)


def check_engine(engine: str) -> None:
    """Raise ``SettingError`` unless there is such an engine."""
    if engine not in ENGINES:
        raise SettingError(f"engine={engine!r}; it can be {', '.join(ENGINES)}")


def micro_batch(count: int, height: int, width: int, *, workers: int = 1) -> int:
    """Say how many pictures run at once on the CPU: as many as fit its cache, fewer where workers would idle.

    Args:
        count: Pictures in the batch, 1 or more.
        height: Of a picture.
        width: Of a picture.
        workers: How many micro-batches run side by side.

    Source: measured with six networks on two cores.

    Example:
        >>> micro_batch(32, 224, 224), micro_batch(32, 32, 32), micro_batch(4, 224, 224, workers=2)
        (8, 32, 2)
    """
    return max(1, min(_PIXELS // max(1, height * width), math.ceil(count / workers)))


class _Laid(nn.Module):
    """A network whose images are laid out in memory as its weights are, and that may compute in half precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False
        self.layout = torch.contiguous_format
        self.autocast: torch.dtype | None = None

    def forward(self, images: Tensor) -> Any:
        images = images.contiguous(memory_format=self.layout)
        if self.autocast is None:
            return self.network(images)
        with torch.autocast("cpu", self.autocast):
            return self.network(images)


class _SideBySide:
    """Runs micro-batches in a few threads, each with its own modules, since forwards may note things on them."""

    def __init__(self, network: nn.Module, workers: int, cores: int) -> None:
        tensors = {id(each): each for each in (*network.parameters(), *network.buffers())}
        self.idle: SimpleQueue[nn.Module] = SimpleQueue()
        for _ in range(workers):
            self.idle.put(copy.deepcopy(network, dict(tensors)))
        self.pool = ThreadPoolExecutor(workers) if workers > 1 else None
        if self.pool is not None:
            here, together = torch.get_num_threads(), Barrier(workers)
            list(self.pool.map(partial(_take_cores, together), [cores] * workers))
            # Threads that are yet to start take the number that was set last.
            torch.set_num_threads(here)

    def __call__(self, parts: Sequence[Tensor]) -> Iterable[Any]:
        return map(self._run, parts) if self.pool is None or len(parts) == 1 else self.pool.map(self._run, parts)

    def _run(self, part: Tensor) -> Any:
        network = self.idle.get()
        try:
            with torch.no_grad():
                return network(part)
        finally:
            self.idle.put(network)


def _take_cores(together: Barrier, cores: int) -> None:
    together.wait()  # so that every thread comes here once
    torch.set_num_threads(cores)


def _in_parts(run: Callable[[Sequence[Tensor]], Iterable[Any]], workers: int | None, images: Tensor) -> Any:
    if len(images) == 0:
        one = images.new_zeros(1, *images.shape[1:])
        return tree_map(lambda leaf: leaf[:0] if isinstance(leaf, Tensor) else leaf, _in_parts(run, workers, one))
    size = len(images) if workers is None else micro_batch(len(images), *images.shape[-2:], workers=workers)
    with _computing():
        return _joined(list(run(torch.split(images, size))))


def _joined(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(tree_leaves(part) for part in parts), strict=True)
    leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return tree_unflatten(leaves, tree_flatten(parts[0])[1])


@contextmanager
def _computing() -> Iterator[None]:
    # Weights in the processor's own order are single precision, and autocast would hand them half of it.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _as_it_is(module: nn.Module, images: Tensor) -> Any:
    modes = {each: each.training for each in module.modules()}
    try:
        for each in modes:
            each.training = False
        with torch.no_grad():
            return module(images)
    finally:
        for each, mode in modes.items():
            each.training = mode


def _improved(network: nn.Module, images: Tensor, expected: Any, engine: str, *, packed: bool) -> nn.Module:
    """Change a copy by all steps at once or, if that changes what it gives, step by step by those that do not."""
    kind = images.device.type
    steps: list[_Step] = [fold_norms]
    if engine in ("eager", "compile") and kind in ("cpu", "cuda") and images.dim() == 4:
        steps.append(_lay_channels_last)
    on_cpu = packed and engine == "eager" and kind == "cpu" and images.dtype == torch.float32
    if on_cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        steps.append(partial(pack_convolutions, rows=micro_batch(32, *images.shape[-2:])))
        steps.append(partial(part_wide_modules, limit=_WIDE))
    changed = _changed(network, images, expected, steps)
    if changed is not network:
        return changed
    for step in steps:
        network = _changed(network, images, expected, [step])
    return network


def _changed(network: nn.Module, images: Tensor, expected: Any, steps: Sequence[_Step]) -> nn.Module:
    """Return a copy changed by some steps, or the network itself where that changes what it gives."""
    # Weights in the processor's own order cannot be copied, and stay as they are.
    kept = {id(each): each for each in network.buffers() if each.is_mkldnn}
    try:
        changed = copy.deepcopy(network, kept)
        for step in steps:
            step(changed, images)
    except Exception:  # whatever a network does that a step does not know, it runs without
        return network
    return changed if _agrees(partial(changed, images), expected) else network


def _lay_channels_last(network: nn.Module, images: Tensor) -> None:
    network.to(memory_format=torch.channels_last)
    network.layout = torch.channels_last  # type: ignore[assignment]


def _halved(network: nn.Module, images: Tensor, expected: Any, dtype: torch.dtype) -> nn.Module:
    """Return a copy that computes under autocast, if what it gives is near enough; else the network as it is."""
    changed: Any = copy.deepcopy(network)
    changed.autocast = dtype
    for each in changed.modules():
        if type(each) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
            each.to(dtype)  # once, instead of by autocast at each call
    wanted = tree_map(lambda leaf: _as_type(leaf, dtype), expected)
    near = _agrees(lambda: tree_map(lambda leaf: _as_type(leaf, dtype), changed(images)), wanted)
    return changed if near else network


def _as_type(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _agrees(compute: Callable[[], Any], expected: Any) -> bool:
    try:
        return same_but_for_rounding(compute(), expected)
    except Exception:  # as in _improved
        return False


def _checked(engine: str, network: nn.Module, images: Tensor, expected: Any) -> Callable[[Tensor], Any]:
    """Set an engine up, and hand it out if it gives what torch gives."""
    if engine != "compile":
        missing = [name for name in ("onnx", "onnxscript", engine) if importlib.util.find_spec(name) is None]
        if missing:
            raise SettingError(
                f"engine={engine!r} needs {', '.join(missing)}; install it with pip install 'transferkit[{engine}]'"
            )
        if images.device.type != "cpu" or images.dtype != torch.float32:
            raise SettingError(
                f"engine={engine!r} computes in single precision on the CPU, not in {images.dtype} on {images.device}; "
                "use 'eager' or 'compile'"
            )
    try:
        run, workers = _STARTED[engine](network, images, expected)
        forward = partial(_in_parts, partial(map, run), workers)
        agrees = same_but_for_rounding(forward(images), expected) and same_but_for_rounding(
            _joined([forward(each) for each in torch.split(images, 1)]), expected
        )
    except Exception as error:
        raise SettingError(f"engine={engine!r} cannot compute this network ({one_line(error)}); use 'eager'") from error
    if not agrees:
        raise SettingError(f"engine={engine!r} gives other numbers than torch for this network; use 'eager'")
    return forward


_Started = tuple[Callable[[Tensor], Any], int | None]


def _compiled(network: nn.Module, images: Tensor, expected: Any) -> _Started:
    return torch.compile(network), None


def _onnxruntime(network: nn.Module, images: Tensor, expected: Any) -> _Started:
    session = onnx_session(_onnx_bytes(network, images))
    name = session.get_inputs()[0].name
    return lambda part: _filled(expected, session.run(None, {name: part.numpy()})), 1


def _openvino(network: nn.Module, images: Tensor, expected: Any) -> _Started:
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(_onnx_bytes(network, images)), "CPU", settings)
    return lambda part: _filled(expected, compiled(part.numpy()).to_tuple()), 1


_STARTED: dict[str, Callable[[nn.Module, Tensor, Any], _Started]] = {
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _onnx_bytes(network: nn.Module, images: Tensor) -> bytes:
    return bytes(onnx_program(network, images).model_proto.SerializeToString())


def _filled(expected: Any, arrays: Iterable[Any]) -> Any:
    """Put a runtime's arrays in the places that the network's tensors have."""
    found = iter(arrays)
    return tree_map(lambda leaf: torch.from_numpy(next(found)) if isinstance(leaf, Tensor) else leaf, expected)
