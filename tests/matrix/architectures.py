"""Every architecture of both libraries, examined without memory or arithmetic, and the page that tells what was found.

The matrix test and ``scripts/architecture_table.py`` share this module, so what is tested is what is documented.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torchvision
from timm.models import model_entrypoint
from torch import Tensor, nn
from torchvision import models
from torchvision.models import regnet

from transferkit.backbones import build_network, list_models, model_info
from transferkit.create import create_model
from transferkit.exceptions import SettingError
from transferkit.heads import Head, build_head
from transferkit.model import TransferModel

__all__ = ["PAGE", "Row", "examine", "examine_all", "family_of", "on_device", "render", "smallest_members"]

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"

# On meta a recurrent layer is taken apart step by step: 50 s for one of these, against 3 s with values.
_WITH_VALUES = frozenset({"timm/sequencer"})


@dataclass(frozen=True)
class Row:
    """What was found of one architecture.

    Attributes:
        name: ``"timm/convnext_atto"``.
        family: The module that defines it, ``"timm/convnext"``.
        heads: Dotted name and kind of each classification layer.
        stages: Name and number of parameters of each stage.
        failures: What does not hold; empty where everything does.
        refusal: What :func:`create_model` says where there is no classifier to replace, by the library's own word.
    """

    name: str
    family: str
    heads: tuple[tuple[str, str], ...] = ()
    stages: tuple[tuple[str, int], ...] = ()
    failures: tuple[str, ...] = ()
    refusal: str | None = None


def family_of(name: str) -> str:
    """Return library and module of an architecture: ``"timm/vision_transformer"``."""
    library, _, architecture = name.partition("/")
    builder = models.get_model_builder(architecture) if library == "torchvision" else model_entrypoint(architecture)
    return f"{library}/{builder.__module__.rpartition('.')[2]}"


def smallest_members() -> dict[str, str]:
    """Return the architecture of each family that has the fewest parameters among those with a classifier."""
    smallest: dict[str, tuple[int, str]] = {}
    for name in list_models():
        if not name.endswith("_enc"):
            family, size = family_of(name), model_info(name).parameters or 0
            smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return {family: smallest[family][1] for family in sorted(smallest)}


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Build networks on a device; on meta also RegNets, whose builder reads the widths it computes."""
    compute_widths = regnet.BlockParams.from_init_params

    def with_values(**settings: float) -> Any:
        with torch.device("cpu"):
            return compute_widths(**settings)

    with torch.device(device), patch.object(regnet.BlockParams, "from_init_params", with_values):
        yield


def examine(name: str) -> Row:
    """Build one architecture for three classes and check everything that needs no arithmetic."""
    family = family_of(name)
    device = "cpu" if family in _WITH_VALUES else "meta"
    with _listening() as said:
        try:
            with on_device(device):
                model = create_model(name, weights=None, num_classes=3)
        except SettingError as error:
            if _has_classifier(name):
                return Row(name, family, failures=(f"refused: {error}",))
            return Row(name, family, refusal=str(error))
        except Exception as error:
            return Row(name, family, failures=(f"cannot be made: {_said(error)}",))
    layers = {path: model.network.get_submodule(path) for path in model.head_paths}
    heads = tuple((path, type(layer).__name__) for path, layer in layers.items())
    stages = tuple((stage.name, stage.num_parameters) for stage in model.stages)
    failures = list(said)  # a warning says that the network could not run, so that its stages are guessed
    for check in (_partition, _head_stage, _freezing, _outputs, _native_keys):
        try:
            failures += check(model, device)
        except Exception as error:
            failures.append(f"{check.__name__.strip('_')}: {_said(error)}")
    return Row(name, family, heads, stages, tuple(failures))


def _has_classifier(name: str) -> bool:
    """Whether the library itself can give the network another classifier."""
    with on_device("meta"):
        return hasattr(build_network(name, num_classes=1000, arguments={}), "reset_classifier")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what transferkit warns of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transferkit")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _partition(model: TransferModel, device: str) -> Iterator[str]:
    """Every parameter, buffer and module in exactly one stage; stem, stage1 … head."""
    held = [id(each) for stage in model.stages for each in (*stage.parameters, *stage.buffers)]
    if sorted(held) != sorted(map(id, chain(model.network.parameters(), model.network.buffers()))):
        yield "a parameter or buffer is in no stage, or in two"
    modules = [id(module) for stage in model.stages for module in stage.modules]
    if len(modules) != len(set(modules)):
        yield "a module is in two stages"
    names = model.stage_names
    if names != ("stem", *(f"stage{number}" for number in range(1, len(names) - 1)), "head"):
        yield f"the stages are called {', '.join(names)}"
    if len(names) < 3:
        yield f"only {len(names)} stages"
    empty = [stage.name for stage in model.stages if not stage.parameters]
    if empty:
        yield f"nothing to train in {', '.join(empty)}"


def _head_stage(model: TransferModel, device: str) -> Iterator[str]:
    """The last stage holds the classification layers and nothing else."""
    layers = [model.network.get_submodule(path) for path in (*model.head_paths, *model.aux_paths)]
    inside = {id(module) for layer in layers for module in layer.modules()}
    if {id(module) for module in model.stages[-1].modules} != inside:
        yield f"the head stage is not exactly {', '.join(model.head_paths)}"
    if (
        sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        != model.stages[-1].num_parameters
    ):
        yield "the head stage has other parameters than the classification layers"


def _freezing(model: TransferModel, device: str) -> Iterator[str]:
    """Half of the stages frozen: they are in eval mode and exactly the others' parameters train."""
    half = model.stage_names[: len(model.stage_names) // 2]
    model.eval().freeze(half).train()
    for stage in model.stages:
        frozen = stage.name in half
        if any(parameter.requires_grad == frozen for parameter in stage.parameters):
            yield f"{stage.name} {'still has' if frozen else 'lacks'} parameters that require grad"
        if any(module.training == frozen for module in stage.modules):
            yield f"{stage.name} is {'not ' if frozen else ''}in eval mode after train()"
    model.freeze(())
    if not all(parameter.requires_grad for parameter in model.network.parameters()):
        yield "not everything trains after freeze(())"


def _outputs(model: TransferModel, device: str) -> Iterator[str]:
    """Logits in both modes, features, and heads of other shapes in the place of the new one."""
    size = model.preprocessing.size
    images = torch.zeros(2, len(model.preprocessing.mean), size, size, device=device)
    layers = {path: model.network.get_submodule(path) for path in model.head_paths}
    given: dict[nn.Module, tuple[Any, Any]] = {}
    with torch.inference_mode():
        watched = [model.network, *layers.values()]
        handles = [
            module.register_forward_hook(lambda module, inputs, output: given.update({module: (inputs[0], output)}))
            for module in watched
        ]
        features = model.eval().features(images)
        for handle in handles:
            handle.remove()
        logits = {"eval": given[model.network][1], "train": model.train()(images)}
        for mode, output in logits.items():
            if not isinstance(output, Tensor) or output.shape != (2, 3):
                yield f"{_shape(output)} instead of (2, 3) logits in {mode} mode"
        if features.shape != (2, model.num_features):
            yield f"features are {_shape(features)}, not (2, {model.num_features})"
        for path, layer in layers.items():
            if layer not in given:
                yield f"{path} is never run"
                continue
            inputs, output = given[layer]
            for head in (Head(1), Head(5, dropout=0.2), Head(5, dropout=0.2, hidden_size=8)):
                with torch.device(device):
                    other = build_head(layer, head)(inputs)
                axis = 1 if isinstance(layer, nn.Conv2d) else -1
                if other.shape[axis] != head.num_classes or other.select(axis, 0).shape != output.select(axis, 0).shape:
                    yield f"{path} gives {_shape(other)} with {head}"


def _shape(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def _native_keys(model: TransferModel, device: str) -> Iterator[str]:
    """The library's own network for three classes has the same keys and shapes, so no head was missed."""
    ours = _key_shapes(model.network)
    with on_device(device):
        if hasattr(model.network, "reset_classifier"):
            model.network.reset_classifier(3)
        # Building again is the truth and costs more; RepViT's reset drops its second head.
        if not hasattr(model.network, "reset_classifier") or _key_shapes(model.network) != ours:
            native = _key_shapes(build_network(model.name, num_classes=3, arguments=dict(model.arguments)))
            different = sorted(key for key in ours.keys() | native.keys() if ours.get(key) != native.get(key))
            if different:
                yield f"{len(different)} keys differ from the library's own for three classes, {different[0]} first"


def _key_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def examine_all(names: Iterable[str]) -> list[Row]:
    """Examine architectures in one process per core, the largest first."""
    by_size = sorted(names, key=lambda name: model_info(name).parameters or 0, reverse=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_prepare_worker) as pool:
        rows = pool.map(examine, by_size, chunksize=2)
        return sorted(rows, key=lambda row: (row.family, row.name))


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the libraries' own builders


def render(rows: Iterable[Row]) -> str:
    """Return the page: versions, totals, one line per family, exceptions."""
    rows = sorted(rows, key=lambda row: (row.family, row.name))
    lines = [
        *("---", "hide:", "  - navigation", "  - toc", "---", ""),  # the table needs the width
        "# Architectures",
        "",
        "Every architecture of both libraries was built for three classes, split into stages, frozen by half and run",
        "in eval and in train mode. `python scripts/architecture_table.py` writes this page; a test compares it with",
        "what it finds.",
        "",
        f"Found with torchvision {_version(torchvision)} and timm {_version(timm)}:",
        "",
    ]
    for library in ("torchvision", "timm"):
        own = [row for row in rows if row.family.startswith(f"{library}/")]
        if own:
            lines.append(f"- **{library}: {sum(_passed(row) for row in own)} of {len(own)}** architectures")
    lines += [
        "",
        "## Families",
        "",
        "A family is the module of the library that defines it. The example is its smallest member; the stages are the",
        "example's, with their parameters for three classes.",
        "",
        "| family | passed | classification layers | example and its stages |",
        "|---|---|---|---|",
    ]
    for family, members in groupby(rows, key=lambda row: row.family):
        group = list(members)
        with_head = [row for row in group if row.stages] or group
        example = min(with_head, key=lambda row: (sum(count for _, count in row.stages), row.name))
        heads = dict.fromkeys(
            f"{', '.join(f'`{path}`' for path, _ in row.heads)} ({row.heads[0][1]})" for row in with_head if row.heads
        )
        lines.append(
            f"| {family} | {sum(map(_passed, group))} of {len(group)} | {'<br>'.join(sorted(heads))} "
            f"| `{example.name.partition('/')[2]}`: {_in_short(example.stages)} |"
        )
    lines += ["", "## Exceptions", ""]
    exceptions = [row for row in rows if not _passed(row)]
    if not exceptions:
        lines.append("None.")
    if any(row.refusal for row in exceptions):
        lines += [
            "An encoder has no classifier that could be replaced, and the library cannot give it one; `create_model`",
            "refuses it with the sentence below.",
            "",
        ]
    lines += [f"- `{row.name}`: {row.refusal or '; '.join(row.failures)}" for row in exceptions]
    return "\n".join(lines) + "\n"


def _passed(row: Row) -> bool:
    return not row.failures and row.refusal is None


def _version(library: Any) -> str:
    return str(library.__version__).partition("+")[0]


def _in_short(stages: tuple[tuple[str, int], ...]) -> str:
    """Write runs of stages of one size as one: ``stem 9.5 k, stage1–stage12 7.1 M, head 2.3 k``."""
    parts = []
    for count, run in groupby(stages, key=lambda stage: stage[1]):
        names = [name for name, _ in run]
        written = names[0] if len(names) == 1 else f"{names[0]}–{names[-1]}"
        parts.append(f"{written} {_rounded(count)}")
    return ", ".join(parts)


def _rounded(count: int) -> str:
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count // size} {unit}"
    return str(count)
