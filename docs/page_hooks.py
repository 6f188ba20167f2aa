"""Mend what the theme gets wrong in every page of the site, before the page is written."""

from __future__ import annotations

import re
from typing import Any


def on_post_page(output: str, **kwargs: Any) -> str:
    """Name the search dialog for screen readers, and leave out links to sitemaps that do not exist.

    The theme looks for a ``sitemap.xml`` beside each alternate of a page, and a site has one at its root only. The
    menu of languages does not need these links.
    """
    output = re.sub(r'<link rel="alternate" [^>]*hreflang=[^>]*>\s*', "", output)
    label = re.search(r'class="md-search__input"[^>]* aria-label="([^"]*)"', output)
    if label is None:
        return output
    return output.replace('role="dialog"', f'role="dialog" aria-label="{label[1]}"', 1)
