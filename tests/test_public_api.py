"""What the package offers at its top is real, complete and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import transferkit

HOME = {name: module for module, names in transferkit._EXPORTS.items() for name in names}


def test_each_name_has_one_home() -> None:
    assert len(HOME) == sum(len(names) for names in transferkit._EXPORTS.values())


def test_all_is_the_exports_and_the_version() -> None:
    assert set(transferkit.__all__) == {*HOME, "__version__"}
    assert len(transferkit.__all__) == len(set(transferkit.__all__))
    assert dir(transferkit) == sorted(transferkit.__all__)


@pytest.mark.parametrize("name", sorted(HOME))
def test_a_public_name_is_the_object_that_its_module_offers(name: str) -> None:
    module = importlib.import_module(f"transferkit.{HOME[name]}")
    assert name in module.__all__
    assert getattr(transferkit, name) is getattr(module, name)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(transferkit.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = [
        (node.module, alias.name, alias.asname)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(seen) == sorted((f"transferkit.{module}", name, name) for name, module in HOME.items())


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'transferkit' has no attribute 'FineTuner'"):
        _ = transferkit.FineTuner


def test_star_import_works() -> None:
    names: dict[str, Any] = {}
    exec("from transferkit import *", names)
    assert set(transferkit.__all__) <= set(names)


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert transferkit.__version__ == version("transferkit")


def arguments(thing: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def inherited_documentation(owner: type, name: str) -> str:
    """The docstrings of a method in its class and in those it overrides."""
    return "\n".join((vars(base)[name].__doc__ or "") for base in owner.__mro__ if name in vars(base))


def public_callables() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Yield every public function, class and method with the documentation that a reader finds for it."""
    for name, module in HOME.items():
        thing = getattr(importlib.import_module(f"transferkit.{module}"), name)
        if inspect.isclass(thing) and issubclass(thing, BaseException):
            continue
        yield name, thing, thing.__doc__ or ""
        if not inspect.isclass(thing):
            continue
        for method_name, member in vars(thing).items():
            method = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if not method_name.startswith("_") and inspect.isfunction(method):
                yield f"{name}.{method_name}", method, inherited_documentation(thing, method_name)


@pytest.mark.parametrize("name", sorted(HOME))
def test_a_public_name_and_its_public_members_have_a_docstring(name: str) -> None:
    thing = getattr(transferkit, name)
    assert (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__ or "").strip()
    if inspect.isclass(thing):
        members = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
        described = (inspect.isfunction, inspect.isdatadescriptor)
        undocumented = [
            key
            for key, value in members.items()
            if any(kind(value) for kind in described) and not inspect.ismemberdescriptor(value) and not value.__doc__
        ]
        assert not undocumented


@pytest.mark.parametrize(
    ("name", "thing", "documentation"), [pytest.param(*each, id=each[0]) for each in public_callables()]
)
def test_what_takes_arguments_explains_them(name: str, thing: Callable[..., Any], documentation: str) -> None:
    if arguments(thing) == ["trainer"]:
        return  # a callback's hook; Callback explains the one signature of all
    # A result type is read, not built: its fields are attributes.
    explained = "Args:" in documentation or (inspect.isclass(thing) and "Attributes:" in documentation)
    assert explained or not arguments(thing), f"{name}{inspect.signature(thing)} has no Args section"
