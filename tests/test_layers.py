"""Imports go down only, and importing the package does nothing but define names."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import os
import random
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

PACKAGE = Path(importlib.util.find_spec("transferkit").origin or "").parent  # type: ignore[union-attr]

# DESIGN §2, lowest first; a module may import from its own layer and from those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "__init__",
        "exceptions",
        "ranges",
        "preprocessing",
        "randomness",
        "closeness",
        "heads",
        "calibration",
        "metrics",
        "validation",
        "history",
        "interrupts",
        "pages",
        "plain_files",
        "resume",
    ),
    (
        "backbones",
        "backbones._adapt",
        "backbones._base",
        "backbones._channels",
        "backbones._load",
        "backbones._stages",
        "backbones._state_dict",
        "backbones._timm",
        "backbones._torch_file",
        "backbones._torchvision",
        "backbones._weights",
        "backbones.stem",
    ),
    ("model", "create", "transform_steps", "transforms", "tta", "pictures"),
    (
        "freezing",
        "splitting",
        "cutting",
        "tracing",
        "optim",
        "schedules",
        "folders",
        "fingerprints",
        "scan",
        "bad_pictures",
        "check",
        "sampling",
        "sources",
        "data",
        "loading",
        "reading",
        "resident",
        "batch_transforms",
        "callbacks._base",
        "devices",
        "batches",
        "evaluation",
        "transferability",
        "distribution",
        "identity",
        "kept_features",
        "activation_store",
        "activations",
        "frozen_pass",
        "export",
        "inference",
        "folding",
        "watching",
        "fusing",
        "allocator",
    ),
    (
        "trainer",
        "placement",
        "gradients",
        "artifact_config",
        "rebuilding",
        "checkpoint",
        "callbacks",
        "callbacks.averaging",
        "callbacks.checkpointing",
        "callbacks.logging",
        "callbacks.lr_scheduler",
        "callbacks.recording",
        "callbacks.resuming",
        "callbacks.tracking",
    ),
    (
        "prediction",
        "recipes",
        "plan",
        "run_folder",
        "run_record",
        "hub",
        "settings",
        "pieces",
        "fitting",
        "finetuner",
        "explain",
        "plots",
        "plots._style",
        "plots.calibration",
        "plots.confusion",
        "plots.curves",
        "plots.pictures",
        "plots.tradeoff",
        "report",
        "lr_finder",
        "backbone_facts",
        "trials",
        "leaderboard",
        "comparison",
        "integrations",
        "integrations._hosted",
        "integrations.lightning",
        "integrations.transformers",
    ),
    (
        "demo",
        "cli",
        "cli._app",
        "cli.comparing",
        "cli.exporting",
        "cli.looking",
        "cli.reporting",
        "cli.training",
        "cli.using",
        "__main__",
    ),
)
LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}
HEAVY = ("torch", "torchvision", "timm", "matplotlib", "accelerate", "sklearn", "numpy", "PIL")


def modules() -> dict[str, Path]:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return found


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if not only_for_types(child):
            yield child
            yield from nodes(child)


def own_imports(file: Path) -> Iterator[str]:
    """Yield the package's modules that a file imports, at the top or inside a function."""
    known = modules()
    for node in nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively; the house style names the package"
            targets = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for origin, name in targets:
            package, _, module = origin.partition(".")
            if package == "transferkit":
                inner = f"{module}.{name}".strip(".")
                yield inner if inner in known else module or "__init__"


def test_the_layer_table_names_exactly_the_modules_that_exist() -> None:
    assert set(LAYER_OF) == set(modules())
    assert sum(map(len, LAYERS)) == len(LAYER_OF)


@pytest.mark.parametrize("module", sorted(LAYER_OF))
def test_a_module_imports_from_its_own_layer_or_below(module: str) -> None:
    upward = [target for target in own_imports(modules()[module]) if LAYER_OF[target] > LAYER_OF[module]]
    assert not upward


def test_the_import_reader_sees_imports_inside_functions_and_none_for_types(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "if TYPE_CHECKING:\n    from transferkit.trainer import Trainer\n"
        "from transferkit import __version__\n"
        "def late():\n    import transferkit.model\n    from transferkit.backbones import _timm\n",
        encoding="utf-8",
    )
    assert list(own_imports(file)) == ["__init__", "model", "backbones._timm"]


def answer_of(code: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("module", ["transferkit", "transferkit.cli", "transferkit.exceptions"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    answer = answer_of(
        f"import json, sys, {module}\nprint(json.dumps({{'loaded': [n for n in {HEAVY} if n in sys.modules]}}))"
    )
    assert answer == {"loaded": []}


def surroundings() -> dict[str, object]:
    loggers = [logging.getLogger(name) for name in (None, "transferkit", "timm", "accelerate", "matplotlib")]
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]  # noqa: NPY002
        "python": random.getstate(),
        "logging": [(list(each.handlers), each.level, each.propagate) for each in loggers],
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("module", sorted(set(LAYER_OF) - {"__main__"}))
def test_a_modules_code_has_no_side_effects_on_import(module: str) -> None:
    importlib.import_module(f"transferkit.{module}".removesuffix(".__init__"))  # what other libraries do is not ours
    before = surroundings()
    runpy.run_path(str(modules()[module]), run_name="run_once_more")
    assert surroundings() == before
