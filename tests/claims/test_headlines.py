"""Headlines follow from measurements by rule, and no order of them changes one."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from xlvlms_tutorial.claims import CLAIMS, headlines, holm, merge, multiplicity, record
from xlvlms_tutorial.claims.headlines import (
    HEADLINES,
    SCHEMA,
    corrected,
    distance,
    effect_in_words,
    p_value,
    summed_up,
    write_claims,
)
from xlvlms_tutorial.metrics.intervals import Estimate

RUN = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0}
FAR, NEAR, OPEN, BELOW = (0.1, 0.5, 0.9), (0.01, 0.5, 0.99), (-0.2, 0.1, 0.4), (-0.9, -0.5, -0.1)


def entries(folder, *measurements, claim="IMA-1", **more):
    """Records of a claim: pairs of what it is measured against and (low, value, high)."""
    for number, (against, (low, value, high)) in enumerate(measurements):
        estimate = Estimate(value, low, high, 20)
        names = RUN | {"against": against, "variant": str(number)} | more
        record(claim, estimate, folder=folder, **names)
    return merge(folder)


def line(folder, *measurements, claim="IMA-1", **more):
    """The headline of that claim."""
    rows = headlines(entries(folder, *measurements, claim=claim, **more))
    return next(row for row in rows if row["id"] == claim)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "not measured"),
        (["confirmed"], "holds"),
        (["confirmed", "confirmed"], "holds"),
        (["confirmed", "undecided"], "holds in part"),
        (["confirmed", "refuted", "refuted"], "holds in part"),
        (["refuted"], "does not hold"),
        (["refuted", "refuted", "undecided"], "does not hold"),
        (["refuted", "undecided"], "cannot tell"),
        (["undecided"], "cannot tell"),
    ],
)
def test_a_headline_follows_from_the_verdicts(verdicts, expected):
    assert summed_up(verdicts) == expected
    assert summed_up(verdicts[::-1]) == expected


@given(st.lists(st.sampled_from(["confirmed", "refuted", "undecided"]), min_size=1))
def test_turning_every_verdict_round_never_leaves_a_claim_that_holds(verdicts):
    turned = {"confirmed": "refuted", "refuted": "confirmed", "undecided": "undecided"}
    opposite = summed_up([turned[verdict] for verdict in verdicts])
    if summed_up(verdicts) == "holds":
        assert opposite == "does not hold"
    else:
        # the opposite holds only where every verdict spoke against the claim
        assert (opposite == "holds") == (set(verdicts) == {"refuted"})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_its_closed_form(p_values):
    order = np.argsort(p_values, kind="stable")
    for index, adjusted in enumerate(holm(p_values)):
        rank = list(order).index(index)
        candidates = []
        for earlier in range(rank + 1):
            candidates.append((len(p_values) - earlier) * p_values[order[earlier]])
        assert adjusted == pytest.approx(min(1.0, max(candidates)))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_value_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert list(np.argsort(adjusted, kind="stable")) == list(
        np.lexsort((np.arange(len(p_values)), adjusted))
    )
    assert min(adjusted) == pytest.approx(min(1.0, len(p_values) * min(p_values)))


@given(st.floats(-3, 3), st.floats(0.01, 2))
def test_the_p_value_of_an_interval_is_that_of_a_normal_estimate(value, error):
    z = stats.norm.ppf(0.975)
    entry = {"value": value, "low": value - z * error, "high": value + z * error}
    expected = 2 * stats.norm.sf(abs(value) / error)
    assert p_value(CLAIMS["IMA-1"], entry) == pytest.approx(expected, abs=1e-9)
    # it excludes its bar where its p-value is below 5 %
    excludes = entry["low"] > 0 or entry["high"] < 0
    if abs(abs(value) - z * error) > 1e-9:
        assert excludes == (p_value(CLAIMS["IMA-1"], entry) < 0.05)


def test_the_half_of_an_interval_that_points_to_the_bar_counts():
    entry = {"value": 0.5, "low": 0.4, "high": 3.0}
    narrow = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert p_value(CLAIMS["IMA-1"], entry) == p_value(CLAIMS["IMA-1"], narrow)


def test_equality_needs_both_ends_excluded_and_its_opposite_one():
    equal = CLAIMS["STEER-2"]  # within 0 +- 0.05
    inside = p_value(equal, {"value": 0.0, "low": -0.02, "high": 0.02})
    lopsided = p_value(equal, {"value": 0.04, "low": 0.02, "high": 0.06})
    outside = p_value(equal, {"value": 0.2, "low": 0.15, "high": 0.25})
    assert inside < 0.001 and outside < 0.001
    assert lopsided > 0.05


def test_an_interval_of_no_width_decides_alone():
    claimed = CLAIMS["IMA-1"]
    assert p_value(claimed, {"value": 0.1, "low": 0.1, "high": 0.1}) == 0
    assert p_value(claimed, {"value": 0.0, "low": 0.0, "high": 0.0}) == 1


def test_a_narrow_escape_does_not_survive_the_correction(tmp_path):
    alone = line(tmp_path / "one", ("chance", NEAR))
    assert (alone["headline"], alone["confirmed"]) == ("holds", 1)
    among = line(tmp_path / "many", *[("chance", NEAR)] + [("chance", OPEN)] * 9)
    assert (among["headline"], among["confirmed"], among["undecided"]) == ("cannot tell", 0, 10)


def test_the_strongest_rival_is_the_one_that_the_claim_does_worst_against(tmp_path):
    row = line(tmp_path, ("chance", FAR), ("logit bias", BELOW), ("random vector", OPEN))
    assert (row["headline"], row["strongest_rival"], row["survived"]) == (
        "holds in part",
        "logit bias",
        False,
    )
    assert [one["headline"] for one in row["rivals"]] == ["holds", "does not hold", "cannot tell"]


def test_of_rivals_that_are_all_beaten_the_nearest_is_the_strongest(tmp_path):
    row = line(tmp_path, ("chance", (0.4, 0.5, 0.6)), ("noise", (0.2, 0.5, 0.8)))
    assert (row["headline"], row["strongest_rival"], row["survived"]) == ("holds", "noise", True)


@pytest.mark.parametrize("measured", [FAR, BELOW])
def test_another_question_settles_nothing(tmp_path, measured, monkeypatch):
    other = replace(CLAIMS["IMA-1"], fidelity="other question")
    settled = line(tmp_path, ("chance", measured))["headline"]
    assert settled in ("holds", "does not hold")
    monkeypatch.setitem(CLAIMS, "IMA-1", other)
    assert line(tmp_path, ("chance", measured))["headline"] == "cannot tell"


def test_what_an_interval_is_over_and_seeds_and_scales_are_listed(tmp_path):
    entries(tmp_path, ("chance", FAR), seeds=[0, 1])
    row = line(
        tmp_path,
        ("chance", FAR),
        seeds=[1, 2],
        interval_over="connectors",
        model="a-lab/a-model",
    )
    assert sorted(row["interval_over"]) == ["connectors", "pictures"]
    assert row["connectors_varied"] and row["seeds"] == 3
    assert set(row["scales"]) == {"pocket", "published"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.001], "next to nothing"),
        ([0.05], "small, on the claimed side"),
        ([0.2], "medium, on the claimed side"),
        ([0.4, 0.5], "large, on the claimed side"),
        ([-0.4], "large, on the other side"),
        ([-0.4, 0.5, 0.6], "large, on both sides of the bar"),
    ],
)
def test_the_size_of_an_effect_is_said_in_words(values, words):
    assert effect_in_words(CLAIMS["IMA-1"], values) == words


def test_a_distance_is_above_zero_on_the_claimed_side():
    assert distance(CLAIMS["IMA-1"], 0.2) == 0.2
    assert distance(CLAIMS["IMA-9"], 0.2) == -0.2  # claimed to be negative
    assert distance(CLAIMS["STEER-2"], 0.01) == pytest.approx(0.04)
    assert distance(CLAIMS["STEER-2"], -0.2) == pytest.approx(-0.15)


def test_intervals_that_exclude_their_bar_are_counted_before_and_after(tmp_path):
    rows = entries(tmp_path, *[("chance", NEAR)] * 2 + [("chance", OPEN)] * 18)
    assert multiplicity(rows) == {
        "intervals": 20,
        "excluding": 2,
        "by_chance": 1.0,
        "after_holm": 0,
        "families": 1,
    }


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.floats(-1, 1), st.floats(0.01, 1)),
        min_size=1,
        max_size=6,
    )
)
def test_the_order_of_measurements_does_not_matter(tmp_path_factory, measured):
    rows = []
    for against, value, half in measured:
        rows.append((against, (value - half, value, value + half)))
    first = line(tmp_path_factory.mktemp("one"), *rows)
    second = line(tmp_path_factory.mktemp("two"), *rows[::-1])
    for name in ("headline", "survived", "confirmed", "refuted", "undecided"):
        assert first[name] == second[name], name


def test_the_correction_never_adds_a_verdict(tmp_path):
    rows = entries(tmp_path, ("a", FAR), ("a", NEAR), ("b", OPEN), ("b", BELOW))
    rows = [row for row in rows if row["value"] is not None]
    for row, verdict in zip(rows, corrected(rows), strict=True):
        assert verdict in (row["verdict"], "undecided")


def test_the_file_for_machines_follows_its_schema(tmp_path):
    rows = entries(tmp_path, ("chance", FAR), ("noise", OPEN))
    content = write_claims(rows, tmp_path / "claims.json")
    written = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert written == content and written["schema"] == 2
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(written, schema)
    assert {row["headline"] for row in written["headlines"]} <= set(HEADLINES)
    assert [row["id"] for row in written["headlines"]] == list(CLAIMS)
    for damage in ("headline", "fidelity", "survived", "reason"):
        wrong = json.loads(json.dumps(written))
        del wrong["headlines"][0][damage]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    wrong = json.loads(json.dumps(written))
    wrong["headlines"][0]["headline"] = "confirmed"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
