"""Export one member of every family of both libraries and write ``docs/reference/exports.md``.

    python scripts/export_table.py              # hours on two cores; started again, it goes on where it was
    python scripts/export_table.py timm/convnext torchvision/resnet  # these families alone, also if they were done

Each family is exported in a process of its own, which may take half an hour. What is found is written down in
``tests/matrix/exports.jsonl`` at once, and the page is written as far as it goes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "matrix"))

from architectures import smallest_members
from exports import FORMATS, PAGE, Row, examine, read_rows, render, write_row
from test_families import SIZE, SIZES

LIMIT = 30 * 60


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        family, name, size = sys.argv[2:]
        for row in examine(family, name, int(size), FORMATS):
            print(json.dumps(asdict(row)), flush=True)
        return
    members = smallest_members()
    done = {(row.family, row.kind) for row in read_rows()}
    wanted = sys.argv[1:] or [family for family in members if any((family, kind) not in done for kind in FORMATS)]
    for number, family in enumerate(wanted, 1):
        for row in in_a_process(family, members[family], SIZES.get(family, SIZE)):
            write_row(row)
            told = row.failure or f"{row.difference:.1g} of {row.spread:.2g}"
            print(f"{number} of {len(wanted)}: {family} {row.kind}, {row.seconds:.0f} s: {told}", flush=True)
        PAGE.write_text(render(read_rows(), members), encoding="utf-8")


def in_a_process(family: str, name: str, size: int) -> list[Row]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", family, name, str(size)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        output, said = ended.stdout, (ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        output, said = (error.stdout or b"").decode(), f"it takes more than {LIMIT // 60} minutes"
    rows = [Row(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]
    left = list(FORMATS)[len(rows) :]
    return [*rows, *(Row(family, name, size, kind, 0.0, failure=f"cannot be exported: {said[:300]}") for kind in left)]


if __name__ == "__main__":
    main()
