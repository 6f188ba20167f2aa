"""The built site in a browser: light on a phone, dark on a desk."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from browsing import browser

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PAGES = (
    "index.html",
    "zh/index.html",
    "tutorials/ants-and-bees.html",
    "results.html",
    "comparison.html",
    "reference/cli.html",
    "reference/finetuner.html",
)
# Faults noted before any script of a page runs.
WATCH = """<script>window.faults = [];
addEventListener("error", (event) => faults.push(String(event.message || event.target.outerHTML)), true);
addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
console.error = (...said) => faults.push(said.join(" "));</script>"""
# Each page in a frame of the width and scheme wanted: a window of Chromium cannot be as narrow as a phone.
LOOK = """<!doctype html><title>look</title><body><script>
const open = (page, width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = page; frame.onload = () => done(frame);
  document.body.append(frame);
});
const add = (frame, source) => new Promise((done) => {
  const script = frame.contentDocument.createElement("script");
  script.src = source; script.onload = done; frame.contentDocument.head.append(script);
});
(async () => {
  const answer = [];
  for (const page of PAGES) for (const [width, scheme] of [[375, "default"], [1280, "slate"]]) {
    const frame = await open(page, width);
    await add(frame, "/axe.min.js");
    const root = frame.contentDocument.documentElement;
    frame.contentDocument.body.setAttribute("data-md-color-scheme", scheme);
    await new Promise((done) => setTimeout(done, 300));  // colours fade into each other
    const found = await frame.contentWindow.axe.run({ resultTypes: ["violations"] });
    const bad = found.violations.filter((each) => ["serious", "critical"].includes(each.impact));
    answer.push({
      page, width, scheme, checked: found.passes.length, wide: root.scrollWidth - root.clientWidth,
      accessibility: bad.map((each) => [each.id, each.nodes[0].html]), faults: frame.contentWindow.faults,
    });
    frame.remove();
  }
  await fetch("/answer", { method: "POST", body: JSON.stringify(answer) });
})().catch((fault) => fetch("/answer", { method: "POST", body: JSON.stringify(String(fault.stack)) }));
</script>"""


class Server(ThreadingHTTPServer):
    """A folder, the paths asked for that are not in it, and the answer of the page that looks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.missing: list[str] = []
        self.answer: Any = None
        self.answered = threading.Event()


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.answer = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.answered.set()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.server.missing.append(self.path)
        super().send_error(code, message, explain)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The site was built, and its pages opened in both widths."""
    for package in ("mkdocs", "material", "mkdocs_static_i18n", "mkdocstrings"):
        pytest.importorskip(package, reason="the docs extra is not installed")
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1400,1000"]
    site = tmp_path_factory.mktemp("site") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=120)
    (site / "axe.min.js").write_bytes(Path(axe.__file__).with_name("axe.min.js").read_bytes())
    for page in PAGES:
        text = (site / page).read_text(encoding="utf-8")
        (site / page).write_text(text.replace("<head>", f"<head>{WATCH}", 1), encoding="utf-8")
    (site / "look.html").write_text(LOOK.replace("PAGES", json.dumps(PAGES), 1), encoding="utf-8")
    with Server(site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/look.html"
        with subprocess.Popen([*command, url], stderr=subprocess.DEVNULL) as chromium:
            try:
                assert server.answered.wait(120), "the browser did not answer"
            finally:
                chromium.terminate()
        yield server
        server.shutdown()


# One test: the processes of pytest-xdist would each build the site for theirs.
def test_pages_are_accessible_fit_a_phone_and_run_without_errors(looked: Server) -> None:
    assert isinstance(looked.answer, list), looked.answer
    assert len(looked.answer) == 2 * len(PAGES)
    for view in looked.answer:
        name = f"{view['page']}, {view['width']} px, {view['scheme']}"
        assert view["accessibility"] == [], name
        assert view["checked"] > 15, name
        assert view["wide"] <= 0, f"{name}: the page can be scrolled sideways"
        assert view["faults"] == [], name
    assert [path for path in looked.missing if path != "/favicon.ico"] == []  # of the page that looks
