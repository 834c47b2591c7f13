"""The live model captions, steers and skips in the built book, and says what is wrong."""

import functools
import http.server
import os
import shutil
import threading

import pytest

from tools.live.site import FOLDER

pytestmark = pytest.mark.browser
PATIENCE = 180_000  # milliseconds, for a busy machine
DONE = "Number(document.getElementById('live-answer').dataset.done ?? 0)"
SAND = "A woman is standing on the sand next to two red keys."


class LivePage:
    """The live page in a browser, and what a reader does with it."""

    def __init__(self, context, address):
        self.page = context.new_page()
        self.complaints = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#live-palette button, #live-missing:not([hidden])")

    def load(self):
        self.page.click("#live-load")
        return self.answer_after(0)

    def answer_after(self, number):
        outcome = f"() => {DONE} > {number} || !document.getElementById('live-missing').hidden"
        # by time: a page that is not seen gets no frames
        self.page.wait_for_function(outcome, timeout=PATIENCE, polling=200)
        return self.text("answer")

    def answer_to(self, action):
        number = self.page.evaluate(DONE)
        action()
        return self.answer_after(number)

    def steer(self, strength):
        change = "(s, v) => { s.value = v; s.dispatchEvent(new Event('input')); }"
        slider = self.page.locator("#live-strength")
        return self.answer_to(lambda: slider.evaluate(change, strength))

    def text(self, name):
        return self.page.locator(f"#live-{name}").inner_text().strip()

    def is_shown(self, name):
        return self.page.locator(f"#live-{name}").is_visible()


@pytest.fixture
def context(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    yield context
    context.close()


@pytest.fixture
def copy(html, tmp_path):
    """The built page with all that it loads, as links: a file may be replaced."""
    folder = tmp_path / "html"
    (folder / "book").mkdir(parents=True)
    shutil.copy(html / "book" / "live.html", folder / "book")
    shutil.copytree(html / "_static", folder / "_static", copy_function=_link)
    return folder


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def shards(folder):
    return sorted((folder / FOLDER).glob("[0-9a-f]" * 16 + ".js"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def served(html):
    """The address of the built book over http, on this machine only."""
    handler = functools.partial(Quiet, directory=str(html))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/book/live.html"
    server.shutdown()


def test_from_disk_it_captions_steers_and_skips(context, html, tmp_path):
    live = LivePage(context, (html / "book" / "live.html").as_uri())
    assert live.load() == SAND
    assert live.text("named") == "woman, standing, key, red, sand"
    steered = live.steer(1.5)
    assert "snow" in steered
    assert live.text("invented") == "snow"
    assert live.steer(0) == SAND
    live.page.wait_for_function(
        f"Number(document.getElementById('live-lens').dataset.done) === {DONE}",
        timeout=PATIENCE,
        polling=200,
    )
    table = live.page.locator("#live-lens")
    assert table.locator("tbody tr").count() == 31
    assert table.locator("tbody tr").first.locator("td").nth(1).inner_text().strip() == "woman"
    assert live.page.locator("#live-cost tbody tr").count() == len(SAND.split()) + 1  # the dot

    live.page.click("#live details:has(#live-blocks) summary")
    box = live.page.locator("#live-blocks input[value='1']")
    assert live.answer_to(box.uncheck) != SAND
    assert "no language of the world" in live.text("broken")
    assert live.answer_to(lambda: live.page.click("#live-blocks-all")) == SAND

    live.page.fill("#live-question", "Is there a robot in the picture?")
    assert live.answer_to(lambda: live.page.click("#live-ask")) == "no"
    live.page.fill("#live-question", "  ")
    live.page.click("#live-ask")
    assert "The question is empty" in live.text("broken")

    live.page.fill("#live-question", "Describe the picture.")
    live.page.focus("#live-canvas")
    live.answer_to(lambda: live.page.keyboard.press("ArrowRight"))
    snowy = live.answer_to(lambda: live.page.select_option("#live-place", "snow"))
    assert "snow" in snowy
    other = tmp_path / "notes.png"
    other.write_text("no picture")
    live.page.set_input_files("#live-file", other)
    live.page.wait_for_selector("text=notes.png cannot be read as a picture", timeout=PATIENCE)
    assert live.complaints == []


def test_a_shard_that_was_cut_is_named(context, copy):
    shard = shards(copy)[2]
    whole = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(whole[: len(whole) // 2])
    live = LivePage(context, (copy / "book" / "live.html").as_uri())
    live.load()
    assert f"{shard.name} is damaged" in live.text("missing")
    assert live.is_shown("recorded")


def test_a_shard_that_is_missing_is_named(context, copy):
    shard = shards(copy)[0]
    shard.unlink()
    live = LivePage(context, (copy / "book" / "live.html").as_uri())
    live.load()
    assert f"{shard.name} is missing" in live.text("missing")


def test_over_http_a_changed_shard_is_fetched_again_and_the_model_is_kept(context, html, served):
    shard = shards(html)[1]
    requests = []

    def spoil(route):
        requests.append(route.request.url)
        raw = bytearray(shard.read_bytes())
        if len(requests) == 1:
            raw[len(raw) // 2] ^= 1
        route.fulfill(body=bytes(raw), content_type="text/javascript")

    context.route(f"**/{shard.name}", spoil)
    live = LivePage(context, served)
    assert live.load() == SAND
    assert len(requests) == 2
    context.route("**/live/" + "[0-9a-f]" * 16 + ".js", lambda route: route.abort())
    again = LivePage(context, served)
    assert again.load() == SAND  # from the browser's cache: nothing is fetched
    assert len(requests) == 2


class Trial:
    """The small live model inside a chapter."""

    def __init__(self, context, html, page):
        self.page = context.new_page()
        self.complaints = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto((html / "book" / f"{page}.html").as_uri())
        self.page.click(".live-try button")

    def answer_after(self, number):
        done = f"Number(document.querySelector('.live-try').dataset.done ?? 0) > {number}"
        self.page.wait_for_function(done, timeout=PATIENCE, polling=200)
        return self.page.locator(".live-try .live-answer").inner_text().strip()


def test_a_chapter_steers_when_its_model_is_loaded(context, html):
    trial = Trial(context, html, "steering-answers")
    assert "on the sand" in trial.answer_after(0)
    change = "slider => { slider.value = 1.5; slider.dispatchEvent(new Event('input')); }"
    trial.page.locator(".live-try input[type=range]").first.evaluate(change)
    assert "snow" in trial.answer_after(1)
    assert "invented: snow" in trial.page.locator(".live-try").inner_text()
    assert trial.complaints == []


def test_a_chapter_leaves_blocks_out_when_its_model_is_loaded(context, html):
    trial = Trial(context, html, "skipping")
    whole = trial.answer_after(0)
    trial.page.locator(".live-try input[value='1']").uncheck()
    assert trial.answer_after(1) != whole
    trial.page.click("text=All blocks run")
    assert trial.answer_after(2) == whole
    trial.page.click("text=Another picture")
    assert trial.answer_after(3) != whole
    assert trial.complaints == []


def test_a_chapter_says_what_a_device_lacks(context, html):
    context.add_init_script("WebAssembly.validate = () => false")
    trial = Trial(context, html, "skipping")
    reason = "text=This browser has no WebAssembly with 128-bit vectors"
    trial.page.wait_for_selector(reason, timeout=PATIENCE)
    assert trial.complaints == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("WebAssembly.validate = () => false", "no WebAssembly with 128-bit vectors"),
        ("delete window.WebAssembly", "no WebAssembly with 128-bit vectors"),
        (
            "Object.defineProperty(navigator, 'deviceMemory', { get: () => 0.5 })",
            "this device says that it has 0.5 GB",
        ),
    ],
)
def test_what_a_device_lacks_is_said_beside_a_recorded_picture(context, html, script, said):
    context.add_init_script(script)
    live = LivePage(context, (html / "book" / "live.html").as_uri())
    live.page.wait_for_selector("#live-missing:not([hidden])")
    assert said in live.text("missing")
    assert live.is_shown("recorded")
    assert live.page.locator("#live-load").is_disabled()


def test_the_page_without_its_model_is_small(html):
    names = ["data.js", "page.js", "live.css"]
    size = sum((html / FOLDER / name).stat().st_size for name in names)
    size += (html / "book" / "live.html").stat().st_size
    size += (html / "_static" / "live.webp").stat().st_size
    assert size < 1_500_000
