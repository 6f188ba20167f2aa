"""Examine every torchvision and timm architecture and write ``docs/reference/architectures.md``.

    python scripts/architecture_table.py            # about ten minutes on two cores
    python scripts/architecture_table.py "*levit*"  # prints the page for these alone and writes nothing

What is checked is in ``tests/matrix/architectures.py``; the matrix test runs the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "matrix"))

from architectures import PAGE, examine_all, render

from transferkit.backbones import list_models


def main() -> None:
    pattern = sys.argv[1] if len(sys.argv) > 1 else None
    names = list_models(pattern or "*")
    if not names:
        sys.exit(f"no architecture matches {pattern!r}")
    page = render(examine_all(names))
    if pattern is None:
        PAGE.write_text(page, encoding="utf-8")
        print(f"{len(names)} architectures; written to {PAGE}")
    else:
        print(page)


if __name__ == "__main__":
    main()
