"""What a network does, operation by operation, in both of its modes.

Tracing looks into what strings blocks together and takes the blocks themselves as they are: a block lies on one side of
a cut whole, so its control flow, its dropout and its modes never matter.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from transferkit.backbones import timm_layers
from transferkit.exceptions import SplitError, one_line
from transferkit.model import TransferModel

__all__ = ["Host", "Program", "as_function", "cannot", "held", "in_words", "needed", "nodes_in", "run", "trace"]


class Host(nn.Module):
    """What programs call modules and read tensors of, by their paths.

    Args:
        network: The whole network; nothing of it is copied.
        constants: Tensors that it keeps neither as parameters nor as buffers.
    """

    def __init__(self, network: nn.Module, constants: Mapping[str, Tensor]) -> None:
        """Hold the network."""
        super().__init__()
        self.network = network
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)


@dataclass(frozen=True)
class Program:
    """What a network does in both modes, as one graph in which the operations that both share are there once.

    Attributes:
        nodes: The operations that lead to an output, in the order of execution.
        outputs: What the network returns in training mode (``True``) and in eval mode, nodes in place of tensors.
        constants: Tensors that are neither parameters nor buffers.
    """

    nodes: tuple[fx.Node, ...]
    outputs: Mapping[bool, Any]
    constants: Mapping[str, Tensor]


def trace(model: TransferModel) -> Program:
    """Trace a model's network in both modes.

    Args:
        model: The model; it is left in eval mode.

    Raises:
        SplitError: Its forward decides by what the pictures hold or give, so it cannot be traced.

    Source: torch.fx (Reed et al. 2022, "torch.fx: Practical Program Capture and Transformation for Deep Learning").

    Example:
        >>> from transferkit.create import create_model
        >>> program = trace(create_model("torchvision/resnet18", weights=None, num_classes=2))
        >>> [str(node) for node in program.nodes][:3], program.outputs[True] == program.outputs[False]
        (['images', 'network_conv1', 'network_bn1'], True)
    """
    merged = fx.Graph()
    outputs: dict[bool, Any] = {}
    constants: dict[str, Tensor] = {}
    known: dict[str, list[fx.Node]] = {}
    blocks = {id(module): module for stage in model.stages for module in stage.modules}
    tensors = {id(each): each for each in (*model.network.parameters(), *model.network.buffers())}
    for training in (True, False):
        model.train(training)
        try:
            # What strings the blocks together is a copy, as it may remember what it is traced with.
            whole = _Whole(copy.deepcopy(model.network, {**blocks, **tensors}))
            graph = _Tracer(blocks).trace(whole)
        except Exception as error:  # networks raise whatever they like
            raise cannot(model, f"its forward cannot be traced ({in_words(error)})") from error
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "output":
                outputs[training] = fx.node.map_arg(node.args[0], env.__getitem__)
                break
            if node.op == "get_attr" and not node.target.startswith("network."):
                node.target = _adopt(constants, getattr(whole, node.target))
            arguments = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            twins = known.setdefault(f"{node.op} {node.target!r} {arguments}", [])
            # Each operation has one twin at most, so that one that changes its input in place keeps its own.
            env[node] = twins.pop(0) if twins and not training else merged.node_copy(node, env.__getitem__)
            if training:
                twins.append(env[node])
    live = needed(outputs, stop=())
    return Program(tuple(node for node in merged.nodes if node in live), outputs, constants)


def _adopt(constants: dict[str, Tensor], value: Tensor) -> str:
    """Name a tensor that is neither parameter nor buffer; each mode was traced with its own copy of it."""
    same = (name for name, other in constants.items() if value.shape == other.shape and torch.equal(value, other))
    name = next(same, f"constant{len(constants)}")
    constants.setdefault(name, value)
    return name


def nodes_in(argument: Any) -> list[fx.Node]:
    """List the nodes in nested tuples, lists and dicts."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(argument, note)
    return found


def needed(wanted: Any, *, stop: Collection[fx.Node]) -> set[fx.Node]:
    """Collect nodes and all that they are computed from.

    Args:
        wanted: Nodes, nested in whatever way.
        stop: Nodes that are not looked behind.
    """
    found: set[fx.Node] = set()
    stack = nodes_in(wanted)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in stop else node.all_input_nodes
    return found


def held(host: Host, node: fx.Node) -> list[Tensor]:
    """Return the parameters, buffers and constants that an operation reads by itself.

    Args:
        host: Where they are.
        node: The operation.
    """
    if node.op == "call_module":
        module = host.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    return [operator.attrgetter(str(node.target))(host)] if node.op == "get_attr" else []


def run(nodes: Collection[fx.Node], host: Host, images: Tensor) -> dict[fx.Node, Any]:
    """Run operations and say what they gave, leaving out those that draw random numbers and all that follows.

    Args:
        nodes: Operations in their order; one whose inputs are not among them is left out.
        host: Where their modules and tensors are.
        images: (B, C, H, W).

    Returns:
        The result of each, with tensors on torch's ``meta`` device.
    """
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = images
        elif all(each in values for each in node.all_input_nodes):
            before = _generators(images.device)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            value = _call(node, host, args, kwargs)
            if all(torch.equal(*each) for each in zip(before, _generators(images.device), strict=True)):
                values[node] = value
    return {node: tree_map(_without_values, value) for node, value in values.items()}


def _without_values(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def _call(node: fx.Node, host: Host, args: Any, kwargs: Any) -> Any:
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(host)
    if node.op == "call_module":
        return host.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def as_function(graph: fx.Graph) -> Callable[..., Any]:
    """Return a graph as a function of a :class:`Host` and the graph's placeholders.

    Args:
        graph: It refers to modules and tensors by their paths in the host, so they are looked up at every call.
    """
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    function: Callable[..., Any] = names["forward"]
    return function


def cannot(model: TransferModel, reason: str) -> SplitError:
    """Return the error that says why a model cannot be split.

    Args:
        model: The model.
        reason: A clause.
    """
    return SplitError(f"{model.name} cannot be split behind its frozen stages: {reason}; train it without a cache")


def in_words(error: Exception) -> str:
    """Return an error's first sentence."""
    return one_line(error).partition(". ")[0].rstrip(".")[:150] or type(error).__name__


class _Whole(nn.Module):
    """Calls the network with images alone, so that its other arguments keep their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


class _Tracer(fx.Tracer):
    def __init__(self, blocks: Collection[int]) -> None:
        import torchvision

        modules: Any = (math, torchvision.ops)  # torch 2.14 is typed for a single one
        layers = timm_layers()
        super().__init__(modules, () if layers is None else tuple(layers.get_notrace_functions()))
        self.blocks, self.closed = blocks, () if layers is None else tuple(layers.get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        closed = id(m) in self.blocks or isinstance(m, self.closed)
        return closed or super().is_leaf_module(m, module_qualified_name)
