"""No page shows what belongs into a terminal.

Bars, paths of this machine, warnings, notes of a first use.
"""

import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from tools import ROOT
from xlvlms_tutorial.pocket.cache import cache_dir

WIDGETS = "application/vnd.jupyter.widget-state+json"
UNSEEN = ("script", "style", "template", "noscript", "head")
ANYWHERE = {
    "a bar": r"\d%\||[█▏▎▍▌▋▊▉]|\d\d:\d\d<[\d?]|\d\s?(?:it/s|s/it)\b",
    "a home folder": r"(?<![\w.])/(?:root|home/\w[\w.-]*|Users/\w[\w.-]*)/|\b[A-Z]:\\Users\\",
}
IN_OUTPUTS = {
    "a warning": r"\w*Warning\b|\bWARNING\b|\bwarnings\.warn\(",
    "a failure": r"\b[Ff]ailed to\b",
    "a note of a first use": (
        r"\bfirst use\b|\bfetching it\b|: converting .* to safetensors|There is no home folder"
    ),
}


def places() -> list[str]:
    """Folders of this machine that no page may name.

    The home, the cache, the checkout; not one that is only a root.
    """
    return [
        str(place)
        for place in (Path.home(), cache_dir(), ROOT)
        if len(place.parts) > 1 and place != Path("/tmp")
    ]


def misplaced(html: str, folders: list[str]) -> list[str]:
    """What a page shows that belongs into a terminal: the kind, and the text around it.

    Words that prose may use count in the outputs of cells alone; a bar of a notebook is a widget,
    so its state is looked at too.
    """
    soup = BeautifulSoup(html, "html.parser")
    states = [script.get_text() for script in soup.find_all("script", type=WIDGETS)]
    for tag in soup.find_all(UNSEEN):
        tag.decompose()
    outputs = "\n".join(
        tag.get_text()
        for tag in soup.find_all(class_="cell_output")
        if not tag.find_parent(class_="cell_output")
    )
    spoken = [
        tag.get(name) or ""
        for tag in soup.find_all(True)
        for name in ("alt", "title", "aria-label")
    ]
    page = "\n".join([soup.get_text(), *spoken])
    named = (
        {
            "a folder of this machine": "|".join(
                f"{re.escape(folder)}(?![\\w-])" for folder in folders
            )
        }
        if folders
        else {}
    )
    passages = [(kind, page, sign) for kind, sign in (ANYWHERE | named).items()]
    passages += [(kind, outputs, sign) for kind, sign in IN_OUTPUTS.items()]
    passages += [("a bar", state, r"\w+ProgressModel|HTMLModel.{0,400}?\d%\|") for state in states]
    return [
        f"{kind}: {_around(text, hit)}"
        for kind, text, sign in passages
        for hit in re.finditer(sign, text)
    ]


def _around(text: str, hit: re.Match) -> str:
    return " ".join(text[max(0, hit.start() - 40) : hit.end() + 40].split())


def output(text: str) -> str:
    return (
        '<article><div class="cell_output docutils container"><div class="output '
        f'stderr"><pre>{text}</pre></div></div></article>'
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a bar", "Loading weights:  37%|###7      | 101/272"),
        ("a bar", "100%|██████████| 3/3 [00:12&lt;00:00,  4.05s/step]"),
        ("a bar", "25 words [00:01, 17.2it/s]"),
        ("a bar", "12.1s/it"),
        ("a home folder", "converting in /home/ann/.cache/xlvlms"),
        ("a home folder", "File &quot;/home/someone/book.py&quot;"),
        ("a home folder", "/Users/a.b/Library/Caches"),
        ("a folder of this machine", "kept in /data/cache-7/smollm2"),
        ("a warning", "/x.py:3: FutureWarning: use other"),
        ("a warning", "[transformers] [WARNING] the fast path is not there"),
        ("a warning", "  warnings.warn("),
        ("a failure", "Failed to load the kernel"),
        (
            "a note of a first use",
            "first use: converting SmolLM2-135M-Instruct to safetensors in here, once.",
        ),
        ("a note of a first use", "arcade 3.3.3 is not installed: fetching it (43 MB)"),
    ],
)
def test_what_belongs_into_a_terminal_is_found_in_outputs(kind, text):
    assert kind in {line.partition(":")[0] for line in misplaced(output(text), ["/data/cache-7"])}


@pytest.mark.parametrize(
    "html",
    [
        (
            "<p>Fetching happens on first use, and a Warning is shown; it failed to "
            "help 100 % of the time.</p>"
        ),
        (
            "<p>An error is an <code>UserWarning</code>; put it below ~/home/ or in a "
            "/homely/ place, 5 units/s | 3</p>"
        ),
        (
            "<script>let bar = '50%|███'; let home = "
            "'/home/ann/x'</script><style>/* /home/ann/x */</style>"
        ),
        output("yes 97 % | no 3 %\n0.5 | 0.7\n3 bits, /data/cache-70"),
        output("<table><tr><td>12%</td><td>|</td></tr></table>").replace("|", "or"),
    ],
)
def test_prose_and_numbers_are_left_alone(html):
    assert misplaced(html, ["/data/cache-7"]) == []


def test_paths_and_bars_are_found_in_prose_and_in_alternative_texts_too():
    assert misplaced("<p>see /home/ann/here</p>", []) == ["a home folder: see /home/ann/here"]
    assert misplaced('<img alt="a plot in /home/me/x">', []) == [
        "a home folder: a plot in /home/me/x"
    ]
    assert misplaced("<p>10%|█</p>", [])


def test_bars_of_notebooks_are_found_in_the_state_of_widgets():
    state = (
        '<script type="application/vnd.jupyter.widget-state+json">{{"a": '
        '{{"model_name": "{}"}}}}</script>'
    )
    assert misplaced(state.format("FloatProgressModel"), []) == [
        'a bar: {"a": {"model_name": "FloatProgressModel"}}'
    ]
    assert misplaced(state.format("SelectionSliderModel"), []) == []


def test_nested_outputs_are_reported_once():
    assert len(misplaced(output(output("Failed to run")), [])) == 1


def test_no_page_shows_what_belongs_into_a_terminal(html, name):
    assert misplaced((html / f"{name}.html").read_text(encoding="utf-8"), places()) == []
