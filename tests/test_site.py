"""The documentation site: it builds without a warning, and every page is opened in a real browser."""

from __future__ import annotations

import dataclasses
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urldefrag

import browser
import pytest

import roastify

# The first test waits until the site is built and every page was opened.
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[1]
SITE = ROOT / "out" / "site"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
# Markdown that was not understood shows in paragraphs: a list or a table without an empty line before it, a fence.
LEFT_OVER = re.compile(r"^\s*(?:[-*] \S|\d+\. \S|\|.*\||```|:::|--8<--|#+ )", re.MULTILINE)
FOUND_BY_BROWSER = """() => ({
    links: [...document.querySelectorAll('a[href]')].map(each => each.href),
    ids: [...document.querySelectorAll('[id], a[name]')].map(each => each.id || each.name),
    pictures: [...document.images].filter(each => !each.complete || !each.naturalWidth).map(each => each.src),
    paragraphs: [...document.querySelectorAll('article p')].map(each => each.textContent),
})"""
# What reaches past the right edge and cannot be scrolled within the page.
TOO_WIDE = """() => [...document.querySelectorAll('article *')].filter(each => {
    if (each.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let above = each; above.tagName !== 'ARTICLE'; above = above.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(above).overflowX)) return false;
    return true;
}).slice(0, 3).map(each => each.outerHTML.slice(0, 80))"""


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_that_of_the_code() -> None:
    settings = _script("settings")
    text = settings.markdown()
    assert text == settings.DOCUMENT.read_text(encoding="utf-8"), "run `python docs/site/settings.py`"
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(headings))
    assert named == [each.name for each in dataclasses.fields(roastify.RoastConfig)]


def test_diagrams_are_those_of_the_mapping() -> None:
    diagrams = _script("diagrams")
    for drawn in (diagrams.tiles, diagrams.fold):
        path = diagrams.FOLDER / f"how-{drawn.__name__}.svg"
        assert drawn() == path.read_text(encoding="utf-8"), "run `python docs/site/diagrams.py`"


def test_links_out_of_docs_lead_to_the_repository() -> None:
    hooks = _script("hooks")
    config = hooks.on_config(SimpleNamespace())
    assert config.repo_url == REPOSITORY

    def on_site(markdown: str, source: str) -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
        return hooks.on_page_markdown(markdown, page, config, None).replace(REPOSITORY, "REPO")

    assert on_site("[a](../kernels/view.py#x)", "how.md") == "[a](REPO/blob/main/kernels/view.py#x)"
    assert on_site("![c](../../examples)", "quickstart/a.md") == "![c](REPO/tree/main/examples)"
    same = "[a](../signs.md) [b](#here) [c](https://x.y/z) [d](mailto:a@b.c)"
    assert on_site(same, "quickstart/a.md") == same


@dataclass
class Opened:
    """What a browser found on a page: what went wrong, what is too wide for a phone, links and where they may lead."""

    problems: list[str] = field(default_factory=list)
    too_wide: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    pictures: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Build the site in out/site, and serve it on this machine."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "configs" / "mkdocs.yml")]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    handler = partial(_Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def window(address: str) -> Iterator[Any]:
    """Start the browser."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; `make docs` installs it"
    )
    if (path := browser.find_browser()) is None:
        pytest.skip("no browser: run `playwright install chromium`, or install one of " + ", ".join(browser.NAMES))
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=path)
        yield running
        running.close()


@pytest.fixture(scope="module")
def opened(address: str, window: Any) -> dict[str, Opened]:
    """Open every page at the width of a desktop and of a phone."""
    found: dict[str, Opened] = {str(path.relative_to(SITE)): Opened() for path in sorted(SITE.rglob("*.html"))}
    context = window.new_context(viewport=DESKTOP)
    for name, page in found.items():
        tab = context.new_page()
        _listen(tab, address, page.problems)
        tab.goto(address + name, wait_until="load")
        # The theme's scripts run on.
        tab.wait_for_load_state("networkidle")
        for what, values in tab.evaluate(FOUND_BY_BROWSER).items():
            setattr(page, what, set(values) if what == "ids" else values)
        tab.set_viewport_size(PHONE)
        page.too_wide = tab.evaluate(TOO_WIDE)
        tab.close()
    context.close()
    return found


def _listen(tab: Any, address: str, problems: list[str]) -> None:
    """Note what goes wrong on a page, and requests that leave this machine."""
    tab.on("pageerror", lambda error: problems.append(f"script error: {error}"))
    tab.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
    tab.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
    tab.on("response", lambda response: response.ok or problems.append(f"{response.status}: {response.url}"))
    tab.on(
        "request", lambda request: request.url.startswith((address, "data:", "blob:")) or problems.append(request.url)
    )


@pytest.mark.long
def test_every_page_opens_without_an_error_and_asks_no_other_host(opened: dict[str, Opened]) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {*map(str, pages), "404.html"} == opened.keys()
    assert {name: page.problems for name, page in opened.items() if page.problems} == {}


@pytest.mark.long
def test_every_picture_is_shown(opened: dict[str, Opened]) -> None:
    assert {name: page.pictures for name, page in opened.items() if page.pictures} == {}


@pytest.mark.long
def test_every_link_leads_to_a_page_a_place_on_it_or_a_file_of_the_repository(
    opened: dict[str, Opened], address: str
) -> None:
    checked, broken = 0, []
    for name, page in opened.items():
        for link in page.links:
            target, place = map(unquote, urldefrag(link))
            if target.startswith(address):
                checked += 1
                to = target.removeprefix(address) or "index.html"
                found = (SITE / to).is_file() and (not place or place in opened[to].ids)
            else:
                file = re.fullmatch(re.escape(REPOSITORY) + "/(?:blob|tree)/main/(.*)", target)
                found = file is None or (ROOT / file[1]).exists()
            broken += [] if found else [f"{name}: {link}"]
    assert checked > 1000 and not broken, "\n".join(broken)


@pytest.mark.long
def test_no_page_shows_markdown_that_was_not_understood(opened: dict[str, Opened]) -> None:
    wrong = [
        f"{name}: {line[0]}"
        for name, page in opened.items()
        for text in page.paragraphs
        for line in LEFT_OVER.finditer(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
def test_pages_fit_a_phone(opened: dict[str, Opened]) -> None:
    assert {name: page.too_wide for name, page in opened.items() if page.too_wide} == {}


@pytest.mark.long
def test_the_reference_has_every_public_name(opened: dict[str, Opened]) -> None:
    ids = set().union(*(page.ids for name, page in opened.items() if name.startswith("api/")))
    assert not {f"roastify.{name}" for name in [*roastify.__all__, "RoastifyConfig"]} - ids


@pytest.mark.long
def test_the_search_finds_a_page(address: str, window: Any) -> None:
    problems: list[str] = []
    tab = window.new_page(viewport=DESKTOP)
    _listen(tab, address, problems)
    tab.goto(address)
    tab.locator("input.md-search__input").fill("preconditioner")
    tab.locator(".md-search-result__link").first.click()
    assert "preconditioner" in tab.inner_text("article").lower()
    tab.close()
    assert not problems
