"""Make the docstrings' house style readable on the site: Sphinx roles, ``Example:`` and ``Source:``."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class HouseStyle(griffe.Extension):
    """Rewrite each docstring before it is parsed, and hide special methods, which say nothing new on a page."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if isinstance(obj, griffe.Function) and obj.name.startswith("__") and obj.name != "__init__":
            obj.public = False
        if obj.docstring is None:
            return
        text = _ROLE.sub(lambda role: f"`{role[1].removeprefix('transferkit.')}`", obj.docstring.value)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        # A lone "Source: …" would be read as the title of an empty section.
        obj.docstring.value = re.sub(r"^Source: ", "**Source:** ", text, flags=re.MULTILINE)
