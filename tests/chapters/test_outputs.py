"""Every page runs from top to bottom, and its checked cells show what its paired notebook shows."""

import configparser
import re

import nbformat
import pytest

from tools import ROOT
from tools.build import refresh_cache
from tools.chapters import notebooks
from tools.execute import execute
from tools.pair import checked, text_of

RULES = configparser.RawConfigParser()
RULES.read(ROOT / "tests" / "sanitize.cfg")


def shown(outputs):
    """What outputs say: printed text in one piece, and each value as plain text, without times and addresses."""
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    values = [output.data["text/plain"] for output in outputs if output.output_type != "stream"]
    found = [printed, *values]
    for rule in RULES.sections():
        found = [re.sub(RULES[rule]["regex"], RULES[rule]["replace"], text) for text in found]
    return found


def test_times_and_addresses_do_not_count_and_numbers_do():
    said = lambda text: shown([nbformat.v4.new_output("stream", name="stdout", text=text)])
    assert said("took 3.1 s") == said("took 12 s")
    assert said("0.31") != said("0.32")


@pytest.mark.parametrize("page", notebooks(), ids=lambda page: page.stem)
def test_a_page_runs_and_shows_what_its_pair_shows(page):
    refresh_cache()
    executed = [cell for cell in execute(page).cells if cell.cell_type == "code"]
    paired = [cell for cell in nbformat.read(page.with_suffix(".ipynb"), 4).cells if cell.cell_type == "code"]
    assert len(executed) == len(paired) > 0
    for now, then in zip(executed, paired, strict=True):
        if checked(now):
            assert shown(text_of(now, page)) == shown(then.outputs), now.source
