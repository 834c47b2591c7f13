"""The style of each piece comes out of one file, and is shipped with the package."""

import re
import tomllib

import pytest

from tools import ROOT
from xlvlms_tutorial.view.cards import Html, style_of

PIECES = ["thumb", "dial", "tradeoff", "ledger", "shown", "sign"]


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_has_rules_for_itself_alone(piece):
    style = style_of(piece)
    assert isinstance(style, Html)
    rules = re.fullmatch(r"<style>(.*)</style>", style, re.S)[1]
    selectors = re.findall(r"([^{}]+)\{[^{}]*\}", rules)
    assert selectors
    assert all(
        selector.strip().startswith(f".{piece}")
        for listed in selectors
        for selector in listed.split(",")
    )
    assert re.sub(r"[^{}]+\{[^{}]*\}", "", rules).strip() == ""  # nothing but whole rules


def test_every_rule_of_the_file_belongs_to_a_piece():
    file = (ROOT / "xlvlms_tutorial/view/style.css").read_text(encoding="utf-8")
    assert sum(style_of(piece).count("{") for piece in PIECES) == file.count("{")
    with pytest.raises(KeyError):
        style_of("card")


def test_the_file_is_part_of_the_package():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]["package-data"]
    assert "view/style.css" in shipped["xlvlms_tutorial"]
