"""The cheapest place to cut a network behind its frozen stages, and the programs on both sides of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from transferkit.model import TransferModel
from transferkit.tracing import Host, Program, as_function, cannot, held, in_words, needed, nodes_in, run, trace

__all__ = ["Halves", "cut_at_heads", "cut_graph", "made_images"]

_BATCHES = (2, 3)
"""Sizes at which a network is looked at: what grows from one to the other counts pictures."""


@dataclass(frozen=True)
class Halves:
    """The two halves as programs, functions of a :class:`Host` and tensors.

    Attributes:
        stages: The frozen stages that ``prefix`` reads.
        prefix: From the host and images (B, C, H, W) to the tensors that cross the cut, each (B, …).
        suffixes: From the host and these tensors to the network's output, in training mode (``True``) and in eval mode.
        constants: What the host must hold beside the network.
    """

    stages: tuple[str, ...]
    prefix: Callable[..., tuple[Tensor, ...]]
    suffixes: Mapping[bool, Callable[..., Any]]
    constants: Mapping[str, Tensor] = field(default_factory=dict)


def cut_graph(model: TransferModel, leading: tuple[str, ...]) -> Halves:
    """Cut a network at the fewest bytes per picture behind its leading frozen stages.

    Args:
        model: The model; its modes and statistics may change.
        leading: Its first stages, all of them frozen.

    Returns:
        The halves; what crosses the cut holds no number or size, no part that does not depend on the pictures.

    Raises:
        SplitError: The network cannot be traced, or what would cross the cut cannot be kept picture by picture.

    Source: torch.fx (Reed et al. 2022); the minimum cut is networkx's.
    """
    program = trace(model)
    host = Host(model.network, program.constants)
    owners = {
        id(each): stage.name for stage in model.stages for each in (*stage.parameters, *stage.buffers, *stage.modules)
    }
    model.train()
    try:
        seen = _observe(model, program, host, owners, leading)
    except Exception as error:
        raise cannot(model, f"its operations cannot be run one by one ({in_words(error)})") from error
    kept = _smallest_cut(model, program, seen)
    run_once = {owners.get(id(tensor)) for node in needed(kept, stop=()) for tensor in held(host, node)}
    stages = leading[: max((place for place, name in enumerate(leading, 1) if name in run_once), default=0)]
    if not stages:
        raise cannot(model, f"nothing of {leading[0]} can run before what trains")
    suffixes = {training: _suffix(model, program, seen, kept, training) for training in (True, False)}
    return Halves(stages, _prefix(program, seen, kept), suffixes, program.constants)


def cut_at_heads(model: TransferModel) -> Halves:
    """Cut a network where its heads receive what they classify, for networks whose output is the heads' mean.

    Args:
        model: Any model; whether its output is the heads' mean is for the caller to find out.

    Returns:
        The halves; the tensors are what each head receives.
    """
    paths = model.head_paths

    def prefix(host: Host, images: Tensor) -> tuple[Tensor, ...]:
        received: dict[str, Tensor] = {}
        handles = [
            host.network.get_submodule(path).register_forward_pre_hook(
                lambda module, inputs, path=path: received.update({path: inputs[0]})
            )
            for path in paths
        ]
        try:
            host.network(images)
        finally:
            for handle in handles:
                handle.remove()
        return tuple(received[path] for path in paths)

    def suffix(host: Host, *tensors: Tensor) -> Tensor:
        given = [host.network.get_submodule(path)(each) for path, each in zip(paths, tensors, strict=True)]
        return given[0] if len(given) == 1 else torch.stack(given).mean(0)

    return Halves(model.stage_names[:-1], prefix, {True: suffix, False: suffix})


def made_images(model: TransferModel, count: int) -> Tensor:
    """Return noise of the shape, type and device that a model takes, the same at every call.

    Args:
        model: A model with at least one parameter.
        count: Number of pictures.

    Returns:
        (count, C, H, W) float.
    """
    side = model.preprocessing.size
    noise = torch.randn(count, model.preprocessing.channels, side, side, generator=torch.Generator().manual_seed(count))
    return noise.to(next(each for each in model.parameters() if each.is_floating_point()))


@dataclass(frozen=True)
class _Seen:
    """What an operation that may come before the cut gave for two and for three pictures.

    Attributes:
        values: Both results, tensors without their values.
        varies: Whether it holds tensors that depend on what is in the pictures, not only on their number and size.
        fixed: Whether it reads tensors of the network and is not to be computed again.
    """

    values: tuple[Any, Any]
    varies: bool
    fixed: bool

    @property
    def plain(self) -> bool:
        """Whether it holds no tensor: a size, a type, a device."""
        return not _has_tensor(self.values[0])

    @property
    def rows(self) -> int:
        """Rows per picture, 0 where it is no tensor or its rows are not pictures or parts of them."""
        two, three = self.values
        if not isinstance(two, Tensor) or not two.is_floating_point() or two.ndim == 0:
            return 0
        rows = len(two) // _BATCHES[0]
        fits = all(len(each) == rows * batch for each, batch in zip(self.values, _BATCHES, strict=True))
        return rows if fits and two.shape[1:] == three.shape[1:] else 0

    @property
    def size(self) -> int:
        """Bytes per picture of a tensor with rows."""
        tensor: Tensor = self.values[0]
        return tensor.nbytes // _BATCHES[0]


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _observe(
    model: TransferModel, program: Program, host: Host, owners: Mapping[int, str], leading: Sequence[str]
) -> dict[fx.Node, _Seen]:
    """Run what depends on the pictures and the leading stages alone and draws no random numbers."""
    tensors = {node: held(host, node) for node in program.nodes}

    def allowed(node: fx.Node) -> bool:
        modules = host.get_submodule(str(node.target)).modules() if node.op == "call_module" else ()
        # What belongs to no stage only strings together what does.
        return all(owners.get(id(each), leading[0]) in leading for each in (*tensors[node], *modules))

    nodes = [node for node in program.nodes if allowed(node)]
    two, three = (run(nodes, host, made_images(model, batch)) for batch in _BATCHES)
    seen: dict[fx.Node, _Seen] = {}
    reading: set[fx.Node] = set()  # the operations whose results are the network's tensors, or made of them alone
    for node in nodes:
        if node in two and node in three:
            inputs = node.all_input_nodes
            reads = bool(tensors[node]) or any(each in reading for each in inputs)
            varies = node.op == "placeholder" or any(seen[each].varies for each in inputs)
            varies = varies and _has_tensor(two[node])
            if reads and not varies and _has_tensor(two[node]):
                reading.add(node)
            seen[node] = _Seen((two[node], three[node]), varies, fixed=reads or node.op == "placeholder")
    return seen


def _smallest_cut(model: TransferModel, program: Program, seen: Mapping[fx.Node, _Seen]) -> list[fx.Node]:
    """Choose what to keep: the fewest bytes between what must not be computed again and what cannot be run once.

    Of equal cuts it is the latest.
    """
    import networkx

    live = set(program.nodes)
    given = set(nodes_in(program.outputs))
    flow = networkx.DiGraph()
    flow.add_nodes_from(("pictures", "rest"))
    for node, each in seen.items():
        if not each.varies:
            continue
        # An edge without a capacity holds any flow, so it is never cut.
        flow.add_edge((node, "in"), (node, "out"), **({"capacity": each.size} if each.rows else {}))
        if each.fixed:
            flow.add_edge("pictures", (node, "in"))
        if node in given or any(user in live and user not in seen for user in node.users):
            flow.add_edge((node, "out"), "rest")
        flow.add_edges_from(((node, "out"), (user, "in")) for user in node.users if user in seen and seen[user].varies)
    try:
        _, (before, after) = networkx.minimum_cut(flow, "pictures", "rest")
    except networkx.NetworkXUnbounded:
        raise cannot(model, "what they give has no rows that belong to one picture each") from None
    return [node for node in seen if (node, "in") in before and (node, "out") in after]


def _prefix(program: Program, seen: Mapping[fx.Node, _Seen], kept: Collection[fx.Node]) -> Callable[..., Any]:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    before = needed(kept, stop=())
    for node in program.nodes:
        if node in before:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(
        tuple(
            env[node] if seen[node].rows == 1 else graph.call_method("unflatten", (env[node], 0, (-1, seen[node].rows)))
            for node in kept
        )
    )
    return as_function(graph)


def _suffix(
    model: TransferModel,
    program: Program,
    seen: Mapping[fx.Node, _Seen],
    kept: Collection[fx.Node],
    training: bool,
) -> Callable[..., Any]:
    graph = fx.Graph()
    slots = [graph.placeholder(f"kept{number}") for number in range(len(kept))]
    env: dict[fx.Node, Any] = {
        node: slot if seen[node].rows == 1 else graph.call_method("flatten", (slot, 0, 1))
        for node, slot in zip(kept, slots, strict=True)
    }
    plain = {node for node, each in seen.items() if each.plain}
    after = needed(program.outputs[training], stop={*kept, *plain})
    for node in program.nodes:
        if node in plain & after:
            env[node] = _literal(model, graph, slots[0], *seen[node].values)
        elif node in after and node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(fx.node.map_arg(program.outputs[training], env.__getitem__))
    return as_function(graph)


def _literal(model: TransferModel, graph: fx.Graph, slot: fx.Node, two: Any, three: Any) -> Any:
    """Write a value that is no tensor without what it was read from; what counts pictures counts the rows kept."""
    if isinstance(two, tuple | list):
        return tuple(_literal(model, graph, slot, *pair) for pair in zip(two, three, strict=True))
    if isinstance(two, torch.device):
        return graph.call_function(getattr, (slot, "device"))
    if two == three:
        return two
    if not isinstance(two, int):
        raise cannot(model, f"{two!r} becomes {three!r} with the number of pictures")
    growth = (three - two) // (_BATCHES[1] - _BATCHES[0])
    count = graph.call_method("size", (slot, 0))
    counted = count if growth == 1 else graph.call_function(operator.mul, (count, growth))
    start = two - growth * _BATCHES[0]
    return graph.call_function(operator.add, (counted, start)) if start else counted
