"""Every page opens without a complaint, offline, in light and dark, and on a phone."""

from pathlib import Path

import pytest

from tools import ROOT
from tools.fetch_assets import VENDOR

pytestmark = pytest.mark.browser
PHONE = 390
LUMINANCE = """() => {
  const colour = getComputedStyle(document.body).backgroundColor;
  const rgb = colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  return (0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]) / 255;
}"""
WIDE = """(width) => [...document.querySelectorAll('article *')].filter(e => {
  if (e.getBoundingClientRect().right <= width + 1 || e.offsetParent === null) return false;
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)
        && p !== document.body && p !== document.documentElement
        && p.getBoundingClientRect().right <= width + 1) return false;
  return true;
}).map(e => e.tagName + '.' + e.className + ' ' + (e.textContent || '').slice(0, 40)).slice(0, 5)"""


def test_page_is_rendered_without_complaints(visit, name):
    page_visit = visit(name)
    assert page_visit.page.locator("article h1").first.inner_text().strip()
    assert page_visit.complaints == []


def test_page_asks_for_nothing_outside(visit, name):
    if not (VENDOR / "pins.json").exists():
        pytest.skip("runs once npm has fetched the scripts: `make book` on a machine with npm")
    assert visit(name).outside == []


def test_images_have_words_and_are_drawn(visit, name):
    images = (
        visit(name)
        .page.locator("article img")
        .evaluate_all(
            "all => all.map(i => [i.alt, i.getAttribute('src').slice(0, 80), "
            "i.complete && i.naturalWidth > 0])"
        )
    )
    assert [source for alt, source, _ in images if not alt.strip()] == []
    assert [source for _, source, loaded in images if not loaded] == []


def test_outputs_hold_no_errors_and_no_bare_widgets(visit, name):
    text = visit(name).page.locator("article").inner_text()
    assert "Traceback (most recent call last)" not in text
    assert "VBox(children=" not in text


def test_phone_width_has_no_sideways_scroll(visit, name):
    page = visit(name, width=PHONE).page
    assert page.evaluate(WIDE, PHONE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


@pytest.mark.parametrize("width", [PHONE, 1200])
def test_menu_button_shows_and_hides_the_contents(visit, width):
    page = visit(Path("book/reference/glossary"), width=width).page
    link = page.get_by_role("link", name="Bibliography", exact=True).first
    assert link.is_visible() == (width > PHONE)
    page.locator(".bd-header-article .primary-toggle").click()
    link.wait_for(state="hidden" if width > PHONE else "visible", timeout=5_000)


def test_dark_scheme_is_dark_and_light_is_light(visit, name):
    assert visit(name, scheme="dark").page.evaluate(LUMINANCE) < 0.2
    assert visit(name).page.evaluate(LUMINANCE) > 0.8


def test_chapters_offer_colab(visit, name):
    page = visit(name).page
    links = page.locator('a[href*="colab.research.google.com"]').evaluate_all(
        "all => all.map(a => a.href)"
    )
    if (ROOT / f"{name}.ipynb").exists():
        assert any(link.endswith(f"{name}.ipynb") for link in links)
    else:
        assert links == []


def test_maths_is_typeset(visit, name):
    page = visit(name).page
    if not page.locator("article .math").count():
        pytest.skip("runs on pages with maths; this one has none")
    assert page.locator("article mjx-container").count() >= page.locator("article .math").count()
