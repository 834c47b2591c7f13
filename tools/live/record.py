"""Record the live page of the built book at work: ``python -m tools.live.record``.

``assets/live.webp`` is what the page shows where its model cannot run.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tools import ROOT
from tools.execute import BUILD

PAGE = BUILD / "html" / "book" / "live.html"
TARGET = ROOT / "assets" / "live.webp"
STRENGTHS = (0, 0.5, 1, 1.5, 2)
WIDTH, HEIGHT = 1240, 1000
SHOWN = 620  # pixels of the recording from the top of the page's tool
MILLISECONDS = 900
PATIENCE = 180_000  # milliseconds
DONE = "document.getElementById('live-answer').dataset.done"
SLIDE = """strength => {
  const slider = document.getElementById('live-strength');
  slider.value = strength;
  slider.dispatchEvent(new Event('input'));
}"""


def wait_for_answer(page: Page, after: int) -> int:
    """Wait until an answer later than number ``after`` is complete; its number."""
    page.wait_for_function(f"after => {DONE} > after", arg=after, timeout=PATIENCE, polling=200)
    return int(page.evaluate(DONE))


def frames(page: Page) -> list[Image.Image]:
    """The tool at each strength of the direction from sand to snow."""
    page.goto(PAGE.as_uri())
    page.click("#live-load")
    number = wait_for_answer(page, 0)
    pictures = []
    for strength in STRENGTHS:
        page.evaluate(SLIDE, strength)
        number = wait_for_answer(page, number)
        page.evaluate("document.getElementById('live').scrollIntoView()")
        box = page.locator("#live").bounding_box()
        clip = {"x": box["x"], "y": box["y"], "width": box["width"], "height": SHOWN}
        pictures.append(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))
    return pictures


def main() -> int:
    """Record; the exit status is 1 where the book or the browser is missing."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not Path(PAGE).exists() or program is None:
        print("build the book first (make book), and install Chromium")
        return 1
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        pictures = frames(page)
        browser.close()
    options = {"duration": MILLISECONDS, "loop": 0, "quality": 70, "method": 6}
    pictures[0].save(TARGET, save_all=True, append_images=pictures[1:], **options)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
