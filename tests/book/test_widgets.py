"""Every slider and dropdown of every page moves its stack without a kernel."""

import pytest

from tools import ROOT
from tools.chapters import chapters

pytestmark = pytest.mark.browser
# The frame shown by the stack that shares a box with control number n. A stack keeps
# only the shown frame in the page.
VISIBLE_FRAMES = """n => {
  const control = document.querySelectorAll('article .widget-slider, article .widget-dropdown')[n];
  let box = control;
  while (box && !box.querySelector('.frame')) box = box.parentElement;
  const shown = [...box.querySelectorAll('.frame')].filter(f => f.offsetParent !== null);
  return shown.map(f => f.innerHTML);
}"""


def move(control) -> None:
    """Choose another entry: the next one, or the previous one at the end."""
    if "widget-dropdown" in control.get_attribute("class"):
        select = control.locator("select")
        select.select_option(index=1 if select.evaluate("s => s.selectedIndex") == 0 else 0)
        return
    handle = control.locator(".noUi-handle")
    at_end = float(handle.get_attribute("aria-valuenow")) >= float(
        handle.get_attribute("aria-valuemax")
    )
    handle.focus()
    handle.press("ArrowLeft" if at_end else "ArrowRight")


def test_each_control_moves_its_stack(visit, name):
    page = visit(name).page
    controls = page.locator("article .widget-slider, article .widget-dropdown")
    if not controls.count():
        pytest.skip("runs on pages with widgets; this one has none")
    for number in range(controls.count()):
        before = page.evaluate(VISIBLE_FRAMES, number)
        assert len(before) == 1, "exactly one frame is shown"
        move(controls.nth(number))
        page.wait_for_function(
            f"before => ({VISIBLE_FRAMES})({number})[0] !== before", arg=before[0], timeout=5_000
        )
        assert len(page.evaluate(VISIBLE_FRAMES, number)) == 1


def test_widgets_are_drawn_once(visit, name):
    page = visit(name).page
    placed = page.locator('article script[type="application/vnd.jupyter.widget-view+json"]').count()
    if not placed:
        pytest.skip("runs on pages with widgets; this one has none")
    assert (
        page.locator("article .widget-subarea, article .jupyter-widgets.widget-vbox").count()
        >= placed
    )
    assert (
        page.locator(
            "article .widget-stack, article .widget-container.jupyter-widget-stack"
        ).count()
        <= placed * 4
    )


def test_every_chapter_but_the_first_has_a_widget(visit):
    with_widgets = [
        chapter.stem
        for chapter in chapters()
        if visit(chapter.relative_to(ROOT).with_suffix(""))
        .page.locator("article .widget-slider, article .widget-dropdown")
        .count()
    ]
    assert set(with_widgets) >= {chapter.stem for chapter in chapters()} - {"welcome"}
