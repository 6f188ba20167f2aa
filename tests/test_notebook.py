"""The notebook runs in a real kernel, without a network, and shows its progress and its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_kept_without_what_a_run_leaves() -> None:
    assert cells("code")
    assert [cell["id"] for cell in cells("code") if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_notebook_shows_progress_and_pictures_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel, of the test extra")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel, of the test extra")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()

    shown = {cell["id"]: cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"}
    for name in ("look", "curves", "predictions"):
        assert [output for output in shown[name] if "image/png" in output.get("data", {})], name
    said = "".join(output.get("data", {}).get("text/plain", "") for output in shown["fit"])
    assert "policy:" in said  # the plan
    assert "epoch 4/4" in said
    assert [output for output in shown["fit"] if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert [output["text"] for outputs in shown.values() for output in outputs if output.get("name") == "stderr"] == []
    (top,) = (output["data"]["text/plain"] for output in shown["load"] if "data" in output)
    assert top.startswith("[('7'")
