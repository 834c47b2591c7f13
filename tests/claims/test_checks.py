import json

import jaxtyping
import numpy as np
import pytest

from xlvlms_tutorial.claims import check, merge, read_checks
from xlvlms_tutorial.errors import FileError, InputError

RUN = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0, "chapter": "inside"}


@pytest.mark.parametrize("holds", [True, False, np.bool_(True), np.bool_(False)])
def test_what_is_checked_is_read_again(tmp_path, holds):
    assert check("norms grow", holds, folder=tmp_path, **RUN) is bool(holds)
    [entry] = read_checks(tmp_path)
    assert entry == {**RUN, "seeds": [0], "statement": "norms grow", "holds": bool(holds)}
    assert all(row["value"] is None for row in merge(tmp_path))  # a check is no measurement


def test_the_same_statement_again_replaces_its_own_check_and_no_other(tmp_path):
    check("norms grow", True, folder=tmp_path, **RUN)
    check("norms grow", False, folder=tmp_path, **RUN)
    for change in ({"model": "b"}, {"dataset": "b"}, {"seeds": 1}, {"chapter": "b"}):
        check("norms grow", True, folder=tmp_path, **RUN | change)
    check("norms shrink", True, folder=tmp_path, **RUN)
    holds = [entry["holds"] for entry in read_checks(tmp_path)]
    assert sorted(holds) == [False] + [True] * 5


@pytest.mark.parametrize("holds", [1, 0.0, None, "yes", float("nan"), np.array([True, False])])
def test_what_is_no_truth_value_is_refused(tmp_path, holds, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="norms grow.*truth value"):
        check("norms grow", holds, folder=tmp_path, **RUN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("statement", ["", "two\nlines", "an arrow --> here"])
def test_a_statement_that_a_comment_cannot_hold_is_refused(tmp_path, statement):
    with pytest.raises(InputError, match="statement"):
        check(statement, True, folder=tmp_path, **RUN)


@pytest.mark.parametrize("damage", ["{", "{}", '{"holds": 1}'])
def test_a_damaged_check_is_named(tmp_path, damage):
    check("norms grow", True, folder=tmp_path, **RUN)
    [file] = (tmp_path / "checks").iterdir()
    file.write_text(damage)
    with pytest.raises(FileError, match=file.name):
        read_checks(tmp_path)


def test_without_checks_there_are_none(tmp_path):
    assert read_checks(tmp_path / "absent") == []
    content = json.dumps(read_checks(tmp_path))
    assert content == "[]"
