"""A page in headless Chromium: what its scripts do, and what axe says of its accessibility."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# A page's own script errors and requests, noted before any script of the page runs.
WATCH = """<script>window.faults = [];
window.addEventListener("error", (event) => window.faults.push(String(event.message || event.target.src)), true);
</script>"""
TELL = """
  const note = document.createElement("pre");
  note.id = "answer"; note.textContent = JSON.stringify(answer);
  document.body.append(note);
"""


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium here")
    return found


def answer_of(page: str, folder: Path, question: str, *, width: int = 1280) -> dict[str, Any]:
    """Open the page without a network, and return what a script finds out about it."""
    file = folder / "page.html"
    watched = page.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{question}</body>", 1)
    file.write_text(watched, encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)
    assert found, "the page's scripts did not run to their end"
    return dict(json.loads(html.unescape(found[1])))


def axe_faults(page: str, folder: Path, scheme: str) -> list[Any]:
    """Return the serious faults that axe finds in the page, in the ``"light"`` or ``"dark"`` scheme."""
    package = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    axe = Path(package.__file__).with_name("axe.min.js").read_text(encoding="utf-8").replace("</script", "<\\/script")
    if scheme == "dark":
        page = page.replace("@media (prefers-color-scheme: dark)", "@media all", 1)
    ask = """axe.run().then((found) => {
      const faults = found.violations.filter((each) => ["serious", "critical"].includes(each.impact));
      const answer = { checked: found.passes.length, faults: faults.map((each) => [each.id, each.nodes[0].html]) };
    """
    answer = answer_of(page, folder, f"<script>{axe}</script><script>{ask}{TELL}}});</script>")
    assert answer["checked"] > 15
    return list(answer["faults"])
