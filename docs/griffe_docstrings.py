"""Make docstrings of the house style readable on the site, and mend what griffe makes of classes."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class HouseStyle(griffe.Extension):
    """Rewrite Sphinx roles, ``Example:`` and ``Source:`` before docstrings are parsed; mend classes afterwards."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is None:
            return
        text = _ROLE.sub(lambda role: f"`{role[1].removeprefix('transferkit.')}`", obj.docstring.value)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        # A lone "Source: …" would be read as the title of an empty section.
        obj.docstring.value = re.sub(r"^Source: ", "**Source:** ", text, flags=re.MULTILINE)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Mend every class of a package."""
        for module in pkg.modules.values():
            if not module.is_alias:
                self.on_package(pkg=module)
        for cls in pkg.classes.values():
            if not cls.is_alias:
                _mend(cls)


def _mend(cls: griffe.Class) -> None:
    # Special methods say nothing new on a page.
    for name in [name for name in cls.members if name.startswith("__") and name != "__init__"]:
        cls.del_member(name)
    # griffe overlooks a positional field of a keyword-only dataclass.
    for parameter in cls.parameters if "dataclass" in cls.labels else ():
        attribute = cls.members.get(parameter.name)
        if attribute is not None and "kw_only=False" in str(attribute.value):
            parameter.kind = griffe.ParameterKind.positional_or_keyword
