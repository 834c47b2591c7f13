"""The frames of a widget that changes its HTML with a control."""

from collections.abc import Iterator

import ipywidgets
from bs4 import BeautifulSoup


def widgets(top: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
    """A widget and all below it."""
    yield top
    for child in getattr(top, "children", ()):
        yield from widgets(child)


def frames(top: ipywidgets.Widget) -> list[BeautifulSoup]:
    """The frames of a dial or of a tradeoff as parsed HTML, in order."""
    parts = [widget.value for widget in widgets(top) if isinstance(widget, ipywidgets.HTML)]
    return [
        BeautifulSoup(part, "html.parser")
        for part in parts
        if 'class="dial"' in part or 'class="tradeoff"' in part
    ]
