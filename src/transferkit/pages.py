"""Pages of one file each: HTML from the templates of this package, and the tables of Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["in_markdown", "markdown_table", "render_page"]


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
    from jinja2 import Environment, PackageLoader

    pages = Environment(
        loader=PackageLoader("transferkit", "_templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template(template).render(**content)


def markdown_table(rows: Sequence[Sequence[object]], *, numbers: Collection[int] = ()) -> list[str]:
    """Write a table as lines of Markdown.

    Args:
        rows: The first one is its head.
        numbers: Columns that are set to the right, counted from 0.

    Example:
        >>> markdown_table([["class", "pictures"], ["a|b", 3]], numbers=[1])
        ['| class | pictures |', '| --- | ---: |', '| a\\\\|b | 3 |']
    """
    head, *rest = [[in_markdown(str(cell)) for cell in row] for row in rows]
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rest)]


def in_markdown(text: str) -> str:
    """Return a text on one line, with no bar that a table would take for its own."""
    return " ".join(text.split()).replace("|", "\\|")
