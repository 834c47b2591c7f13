"""Say on a page that it was not executed: an extension of Sphinx for ``make page``.

A page of which there are no outputs shows its code, and would look broken without a word.
"""

from sphinx.application import Sphinx

NOTE = """
```{{note}}
This page was not executed: it shows code without what the code prints and draws.
`make page NAME={name}` makes its outputs, `make book` those of all pages.
```
"""


def with_note(text: str, name: str) -> str:
    """The source of a page with the note under its title, or above all where it has none."""
    lines = text.split("\n")
    fenced = False
    title = 0  # lines up to the title
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            fenced = not fenced
        if line.startswith("# ") and not fenced:
            title = number
            break
    return "\n".join([*lines[:title], NOTE.format(name=name), *lines[title:]])


def _add_note(app: Sphinx, name: str, source: list[str]) -> None:
    if name in app.config.not_executed:
        source[0] = with_note(source[0], name.rpartition("/")[2])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension and its setting: a list of pages, named as in the contents."""
    app.add_config_value("not_executed", [], "env")
    app.connect("source-read", _add_note)
    # what such a page pastes at its top is not there, and neither are figures that others name
    app.config.suppress_warnings.extend(["mystnb.glue", "ref.numref"])
    return {"parallel_read_safe": True, "parallel_write_safe": True}
