"""What the documentation shows runs, parses and exists."""

from __future__ import annotations

import re
import shlex
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import typer
from PIL import Image

from transferkit.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return line number and text of each fenced block in a language."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in FENCE.finditer(text) if match[1] == language]


# a translation has the code of its original (test_translations.py)
WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and not page.name.endswith(".zh.md")]
SHELL_LINES = [
    pytest.param(shlex.split(command), id=f"{name_of(page)}: {command.strip()[:60]}")
    for page in PAGES
    for _, text in blocks(page, "bash")
    for line in text.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if re.match(r"\s*(\S*/)?transferkit ", command)
]


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of torch in which MobileNetV2's default weights, made at random, need no download."""
    home = tmp_path_factory.mktemp("torch-home")
    file = home / "hub" / "checkpoints" / Path(torchvision.models.MobileNet_V2_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(torchvision.models.mobilenet_v2().state_dict(), file)
    return home


@pytest.fixture
def workplace(tmp_path: Path, torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the ants, bees, small pictures and single picture that the pages speak of."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for name, colour in (("ants", (120, 40, 30)), ("bees", (220, 190, 40))):
            folder = tmp_path / "data" / "hymenoptera_data" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.array(colour) + rng.normal(0, 40, (40, 48, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg")
    for part in ("train", "test"):
        for name, colour in (("airplane", (90, 140, 220)), ("frog", (60, 120, 50)), ("ship", (40, 60, 120))):
            folder = tmp_path / "data" / "cifar10" / part / name
            folder.mkdir(parents=True)
            for index in range(2):
                pixels = np.array(colour) + rng.normal(0, 40, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04d}.jpg")
    Image.new("RGB", (48, 40), (220, 190, 40)).save(tmp_path / "bee.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, workplace: Path) -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    for line, text in blocks(page, "python"):
        # the blank lines put the page's own line numbers into a traceback
        exec(compile("\n" * line + text, str(page), "exec"), namespace)


@pytest.mark.parametrize("words", SHELL_LINES)
def test_a_command_line_in_the_documentation_is_one_the_terminal_takes(words: list[str]) -> None:
    group = typer.main.get_command(app)
    context = group.make_context("transferkit", words[1:])
    name, command, rest = group.resolve_command(context, words[1:])  # type: ignore[attr-defined]
    command.make_context(name, rest, parent=context)


def test_the_command_line_page_lists_exactly_the_options_that_exist() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    listed = {
        section.split("\n", 1)[0]: re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
        for section in page.split("\n## ")[1:]
    }
    group = typer.main.get_command(app)
    existing = {
        name: [each.opts[0] if each.param_type_name == "option" else str(each.name).upper() for each in command.params]
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert listed == existing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_module_has_a_reference_page() -> None:
    package = ROOT / "src" / "transferkit"
    modules = {path.stem for path in chain(package.glob("[!_]*.py"), package.glob("[!_]*/")) if path.stem != "cli"}
    own = {"index", "cli", "architectures", "exports"}
    pages = {path.stem for path in (ROOT / "docs" / "reference").glob("*.md")} - own
    assert pages == modules


def test_the_readme_holds_the_test_command_that_continuous_integration_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^<!-- ci:test -->\n```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    steps = ["python3 -m venv .venv", '.venv/bin/pip install -e ".[test]"', ".venv/bin/python -m pytest -n auto"]
    assert command.strip().split(" && ") == steps
    runner = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- ci:test -->" in runner
    assert ".[test]" not in runner, "the runner has a copy of the command, which can differ from the README's"


def test_the_changelog_tells_of_this_version() -> None:
    from transferkit import __version__

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{__version__}]" in text or "\n## [Unreleased]\n\n#" in text
