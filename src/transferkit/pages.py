"""HTML pages of one file each, from the templates of this package."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader

__all__ = ["render_page"]


def render_page(template: str, **content: object) -> str:
    """Fill in a page; style and scripts are in it, so it needs no network and no other file.

    Args:
        template: File in ``transferkit/_templates``.
        content: What the template names. Text is escaped.

    Example:
        >>> page = render_page("report.html", title="<b>", facts=[("classes", "2")], sections=[])
        >>> "<h1>&lt;b&gt;</h1>" in page, "<dd>2</dd>" in page
        (True, True)
    """
    pages = Environment(
        loader=PackageLoader("transferkit", "_templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template(template).render(**content)
