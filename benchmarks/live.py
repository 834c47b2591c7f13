"""Live: what the model in the page costs a reader, in a browser, on the built book.

Chromium opens the page from disk, with the processors that it takes by itself; the engine uses one
thread. Every round is a new browser page.
"""

import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from playwright.sync_api import Page, sync_playwright

from benchmarks.command import start
from benchmarks.harness import Goal, Report, count
from tools.execute import BUILD
from tools.live.record import wait_for_answer
from tools.live.site import FOLDER
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.intervals import bootstrap

HTML = BUILD / "html"
PAGE = HTML / "book" / "live.html"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ROUNDS = 5
COSTS = """() => [...document.querySelectorAll('#live-cost tbody tr')].map(
  row => Number(row.children[1].textContent))"""


def measure(report: Report) -> None:
    """Everything that is promised of the page "Live"."""
    if not PAGE.exists() or BROWSER is None:
        raise InputError(
            "the built book or Chromium is missing", "run `make book`, install Chromium"
        )
    rounds = report.options.rounds(ROUNDS)
    report.setting |= {"rounds": rounds}
    loads, firsts, rates, memory = [], [], [], []
    for _ in range(rounds):
        with opened() as page:
            page.click("#live-load")
            wait_for_answer(page, 0)
            loaded = page.locator("#live-load").get_attribute("data-loaded")
            seconds, megabytes = (float(number) for number in loaded.split())
            first, *others = page.evaluate(COSTS)
        loads.append(seconds)
        memory.append(megabytes / 1000)
        firsts.append(first / 1000)
        rates.append(1000 / statistics.mean(others))
    size = sum((HTML / FOLDER / name).stat().st_size for name in ("data.js", "page.js", "live.css"))
    size += PAGE.stat().st_size + (HTML / "_static" / "live.webp").stat().st_size
    report.promise("seconds to the first word", median(firsts), Goal("<=", 2.0))
    report.promise("words a second after it", median(rates), Goal(">=", 10.0))
    report.promise("memory of the model, GB", median(memory), Goal("<=", 0.6))
    report.promise("the page without its model, MB", count(size / 1e6), Goal("<=", 1.5))
    report.tell("seconds to load the model from disk", median(loads))


def median(values: list[float]) -> object:
    """The median over rounds, with its interval."""
    return bootstrap(np.array(values), statistic=np.median)


@contextmanager
def opened() -> Iterator[Page]:
    """The live page in a new browser."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        try:
            page = browser.new_page()
            page.goto(PAGE.as_uri())
            page.wait_for_selector("#live-palette button")
            yield page
        finally:
            browser.close()


if __name__ == "__main__":
    start({"live": measure})
