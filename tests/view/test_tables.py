import pandas as pd
import pytest
from bs4 import BeautifulSoup

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.view.tables import SIGNS, badge, table


def cells(shown):
    page = BeautifulSoup(shown._repr_html_(), "html.parser")
    return [[cell.text for cell in row.find_all(["th", "td"])] for row in page.find_all("tr")]


def test_a_column_has_the_same_number_of_decimals_down_to_its_end():
    numbers = pd.DataFrame({"share": [0.5, 0.123456, 1.0]}, index=["a", "b", "c"])
    assert cells(table(numbers, 3)) == [
        ["", "share"],
        ["a", "0.500"],
        ["b", "0.123"],
        ["c", "1.000"],
    ]


def test_decimals_can_be_set_column_by_column():
    numbers = pd.DataFrame({"share": [0.123], "seconds": [12.34]}, index=["a"])
    assert cells(table(numbers, {"seconds": 1}))[1] == ["a", "0.12", "12.3"]


def test_whole_numbers_have_no_decimals_and_long_ones_are_grouped():
    numbers = pd.DataFrame({"n": [25.0, 49152.0], "layer": [3, 24]}, index=["a", "b"])
    assert cells(table(numbers))[1:] == [["a", "25", "3"], ["b", "49,152", "24"]]


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA])
def test_what_is_missing_is_a_dash_and_leaves_whole_numbers_whole(missing):
    numbers = pd.DataFrame({"n": [3, missing]}, index=["a", "b"], dtype=object)
    assert cells(table(numbers))[1:] == [["a", "3"], ["b", "–"]]


def test_a_number_that_rounds_to_zero_has_no_sign():
    numbers = pd.DataFrame({"change": [-0.001, -0.25]}, index=["a", "b"])
    assert cells(table(numbers))[1:] == [["a", "0.00"], ["b", "-0.25"]]


def test_truth_values_are_words():
    assert cells(table(pd.DataFrame({"right": [True, False]}, index=[1, 2])))[1:] == [
        ["1", "yes"],
        ["2", "no"],
    ]


def test_a_group_of_rows_is_named_once():
    index = pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 2)], names=["task", "layer"])
    rows = cells(table(pd.DataFrame({"share": [0.1, 0.2, 0.3]}, index=index)))
    assert [row[:2] for row in rows] == [["task", "layer"], ["a", "1"], ["", "2"], ["b", "2"]]


def test_what_comes_from_data_is_escaped():
    hostile = "<script>alert(1)</script>"
    numbers = pd.DataFrame({hostile: [hostile]}, index=[hostile])
    page = BeautifulSoup(table(numbers, caption=hostile)._repr_html_(), "html.parser")
    assert page.find("script") is None
    assert page.text.count(hostile) == 4


@pytest.mark.parametrize("word", SIGNS)
def test_a_verdict_is_a_mark_with_its_word(word):
    page = BeautifulSoup(table(pd.Series({"claim": word}))._repr_html_(), "html.parser")
    assert word in page.find(class_="sign").text
    assert str(badge(word)) in table(pd.Series({"claim": word}))._repr_html_()


def test_the_text_of_a_table_is_that_of_its_cells():
    assert repr(table(pd.Series({"share": 0.123}, name="value"))).split() == [
        "value",
        "share",
        "0.12",
    ]


def test_a_table_without_rows_is_refused():
    with pytest.raises(InputError, match="a table without rows"):
        table(pd.DataFrame({"share": []}))
