"""The built book and a browser for it; a run that must have both says so with BOOK_REQUIRED=1."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools import ROOT
from tools.chapters import pages

HTML = ROOT / "_build" / "html"
LOCAL = ("file:", "data:", "blob:", "about:")
N_OPEN = 4  # pages that are kept open: the variants of one


def absent(reason: str) -> None:
    """Skip for this reason, or fail where the book is required."""
    (pytest.fail if os.environ.get("BOOK_REQUIRED") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def html() -> Path:
    """The folder of the built pages."""
    if not (HTML / "index.html").exists():
        absent("the book is not built; run `make book` first")
    return HTML


@pytest.fixture(scope="session")
def browser(html):
    """Headless Chromium, as Debian packages it."""
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        absent(
            "Chromium is not installed, so pages were not opened; `apt-get "
            "install chromium` brings it"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )


@dataclass
class Visit:
    """A page that was opened, with what it asked for and complained about."""

    page: object
    outside: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def visit(browser, html) -> Iterator:
    """A function that opens a page of the contents, once for each width and colour scheme.

    Nothing outside is let through. The pages opened last stay open: all of them at once would take
    more memory than a machine has.
    """
    opened: dict[tuple, Visit] = {}

    def open_page(name: Path, width: int = 1200, scheme: str = "light") -> Visit:
        key = name, width, scheme
        opened[key] = opened.pop(key, None) or _open(browser, html / f"{name}.html", width, scheme)
        while len(opened) > N_OPEN:
            opened.pop(next(iter(opened))).page.context.close()
        return opened[key]

    yield open_page
    for opened_visit in opened.values():
        opened_visit.page.context.close()


def _open(browser, file: Path, width: int, scheme: str) -> Visit:
    page = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    ).new_page()
    opened_visit = Visit(page)
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(LOCAL) else opened_visit.outside.append(request.url)
        ),
    )
    page.on("pageerror", lambda error: opened_visit.complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            opened_visit.complaints.append(message.text) if message.type == "error" else None
        ),
    )
    page.goto(file.as_uri(), wait_until="load")
    if page.locator('script[type="application/vnd.jupyter.widget-view+json"]').count():
        page.wait_for_selector(".jupyter-widgets", timeout=60_000)
    page.wait_for_function(
        "!window.MathJax?.startup?.promise || window.MathJax.startup.promise.then(() => true)",
        timeout=60_000,
    )
    return opened_visit


def pytest_generate_tests(metafunc):
    """Run a test that takes ``name`` once for each page of the contents."""
    if "name" in metafunc.fixturenames:
        # by module, so that pytest runs all tests of a page before it opens the next one
        metafunc.parametrize("name", pages(), ids=str, scope="module")
