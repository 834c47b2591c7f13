"""Pooling runs: the closed form against a loop and a case made by hand, refusals, files."""

from math import isnan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.support.runs import run
from xlvlms_tutorial.claims import headlines
from xlvlms_tutorial.claims.claims import CLAIMS, record
from xlvlms_tutorial.claims.pooled import (
    FILE,
    pool,
    random_effects,
    read_runs,
    runs_needed,
    samples_needed,
    write_runs,
)
from xlvlms_tutorial.errors import FileError, InputError
from xlvlms_tutorial.metrics import Estimate

Z = stats.norm.ppf(0.975)
CLAIM = CLAIMS["IMA-1"]  # above 0


def estimates_of(*values, half=0.1, n=50):
    return [Estimate(value, value - half, value + half, n) for value in values]


def by_loop(values, errors):
    """DerSimonian and Laird, Knapp and Hartung, number by number."""
    k = len(values)
    v = [1 / e**2 for e in errors]
    centre = sum(a * y for a, y in zip(v, values, strict=True)) / sum(v)
    q_total = sum(a * (y - centre) ** 2 for a, y in zip(v, values, strict=True))
    tau2 = max(0.0, (q_total - (k - 1)) / (sum(v) - sum(a**2 for a in v) / sum(v)))
    w = [1 / (e**2 + tau2) for e in errors]
    mean = sum(a * y for a, y in zip(w, values, strict=True)) / sum(w)
    q = sum(a * (y - mean) ** 2 for a, y in zip(w, values, strict=True)) / (k - 1)
    half = stats.t.ppf(0.975, k - 1) * sqrt(max(1.0, q) / sum(w))
    inconsistency = max(0.0, 1 - (k - 1) / q_total) if q_total else 0.0
    return mean, mean - half, mean + half, sqrt(tau2), inconsistency


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 0.5)), min_size=2, max_size=6),
)
def test_pooling_is_the_formula(runs):
    pooled = random_effects([Estimate(y, y - Z * e, y + Z * e, n=10) for y, e in runs])
    estimate = pooled.estimate
    ours = (estimate.value, estimate.low, estimate.high, pooled.between, pooled.inconsistency)
    values, errors = zip(*runs, strict=True)
    np.testing.assert_allclose(ours, by_loop(values, errors), rtol=1e-6, atol=1e-6)
    assert (estimate.n, pooled.runs) == (10 * len(runs), len(runs))


def test_a_case_worked_out_by_hand():
    # standard errors 1, values 0, 3, 6: Q = 18, tau² = (18 - 2) / (3 - 1) = 8, w = 1/9 each,
    # q = (9 + 9) / 9 / 2 = 1, half = 4.3027 * sqrt(3), I² = 1 - 2/18
    pooled = random_effects([Estimate(y, y - Z, y + Z, n=1) for y in (0.0, 3.0, 6.0)])
    assert pooled.estimate.value == pytest.approx(3)
    assert pooled.between == pytest.approx(sqrt(8))
    assert pooled.inconsistency == pytest.approx(8 / 9)
    assert pooled.estimate.high - 3 == pytest.approx(4.30265 * sqrt(3), rel=1e-5)


def test_equal_runs_do_not_differ_and_gain_less_than_more_samples_would():
    pooled = random_effects(estimates_of(0.3, 0.3, 0.3, 0.3, 0.3))
    assert pooled.estimate.value == pytest.approx(0.3)
    assert (pooled.between, pooled.inconsistency) == (0, 0)
    assert 0.1 / sqrt(5) < pooled.estimate.high - 0.3 < 0.1


def test_runs_that_differ_much_widen_the_interval():
    close = random_effects(estimates_of(0.29, 0.30, 0.31)).estimate
    apart = random_effects(estimates_of(0.0, 0.3, 0.6))
    assert apart.estimate.high - apart.estimate.low > 2 * (close.high - close.low)
    assert apart.between > 0.2 and apart.inconsistency > 0.9


def test_a_run_without_width_does_not_outweigh_the_others():
    saturated = Estimate(1.0, 1.0, 1.0, n=50)
    pooled = random_effects([saturated, *estimates_of(0.7, 0.8)])
    assert pooled.estimate.value == pytest.approx(2.5 / 3)
    nothing = random_effects([Estimate(y, y, y, n=5) for y in (0.2, 0.4)])
    assert nothing.estimate.value == pytest.approx(0.3)
    assert nothing.between == pytest.approx(sqrt(0.02))  # their standard deviation


def test_one_run_keeps_its_interval():
    pooled = random_effects([Estimate(0.2, 0.1, 0.25, n=5)])
    assert pooled.estimate == Estimate(0.2, 0.1, 0.25, n=5)
    assert pooled.runs == 1 and isnan(pooled.between)


@pytest.mark.parametrize("k", [3, 5])
def test_the_interval_covers_the_true_effect_about_as_often_as_it_says(k):
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        true = draw.normal(0.3, 0.1, size=k)  # runs differ by more than their samples explain
        errors = draw.uniform(0.03, 0.08, size=k)
        values = draw.normal(true, errors)
        runs = []
        for value, error in zip(values, errors, strict=True):
            runs.append(Estimate(value, value - Z * error, value + Z * error, n=1))
        estimate = random_effects(runs).estimate
        inside += estimate.low <= 0.3 <= estimate.high
    assert 0.925 <= inside / 1000 <= 0.985


def test_samples_needed_bring_the_interval_to_the_bar():
    assert samples_needed(CLAIM, Estimate(0.05, -0.05, 0.15, n=100)) == 400
    assert samples_needed(CLAIM, Estimate(-0.05, -0.15, 0.05, n=100)) == 400
    assert samples_needed(CLAIM, Estimate(0.0, -0.1, 0.1, n=100)) is None
    assert samples_needed(CLAIM, Estimate(1e-5, -0.1, 0.1, n=100)) is None


def test_runs_needed_are_the_fewest_whose_interval_would_decide():
    pooled = random_effects(estimates_of(0.0, 0.05, 0.1))
    k = runs_needed(CLAIM, pooled)
    # as many runs of the same errors around the same value, which do not differ
    for number, decides in ((k, True), (k - 1, False)):
        assert (random_effects(estimates_of(*[0.05] * number)).estimate.low > 0) is decides
    assert runs_needed(CLAIM, random_effects(estimates_of(-0.1, 0.1, 0.0))) is None
    with pytest.raises(InputError, match="give two or more"):
        runs_needed(CLAIM, random_effects(estimates_of(0.1)))


def test_runs_are_pooled_by_setting_and_model():
    records = [run(0.3 + 0.01 * seed, seed) for seed in (4, 0, 2)]
    records += [run(0.1, model="pocket-gemma"), run(0.0, variant="w")]
    entries = pool(records)
    assert [(entry["model"], entry["variant"], entry["runs"]) for entry in entries] == [
        ("pocket-gemma", "v", 1),
        ("pocket-llava", "v", 3),
        ("pocket-llava", "w", 1),
    ]
    three, single = entries[1:]
    assert (three["seeds"], three["n"], three["verdict"]) == ([0, 2, 4], 150, "confirmed")
    assert three["same_sign"] and three["needed_runs"] is None
    assert headlines([three])[0]["headline"] == "holds"
    assert single["verdict"] == "undecided" and single["needed_runs"] is None


def test_an_undecided_measurement_says_what_would_decide_it():
    [entry] = pool([run(value, seed) for seed, value in enumerate((-0.02, 0.05, 0.1))])
    assert entry["verdict"] == "undecided" and not entry["same_sign"]
    assert entry["needed_runs"] > 3
    assert entry["needed_samples"] == 50 * entry["needed_runs"]
    [entry] = pool([run(0.05, half=0.1)])
    assert (entry["needed_runs"], entry["needed_samples"]) == (None, 200)


def test_what_does_not_depend_on_the_seed_is_one_run():
    [entry] = pool([run(0.3, seed) for seed in range(5)])
    assert (entry["runs"], entry["n"], entry["low"]) == (1, 50, pytest.approx(0.2))


def test_ranges_of_random_orders_are_not_pooled():
    ranges = [run(0.3 + seed, seed, interval_over="random orders", variant="r") for seed in (0, 1)]
    assert [entry["variant"] for entry in pool([*ranges, run(0.3)])] == ["v"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"seed": 0}, r"share the seeds \[0\]; give each run once"),
        ({"seeds": [2, 0]}, r"share the seeds \[0\]"),
        ({"against": "nothing"}, "baseline of runs of .* shuffled labels and nothing"),
        ({"interval_over": "tokens"}, "population .* pictures and tokens"),
        ({"choice": "validation"}, "choice of a setting .* fixed and validation"),
        ({"scale": "own"}, "scale of runs"),
        ({"recipe": "bbb"}, "recipe .* aaa and bbb; they come from different versions"),
        ({"test": "> 0.1"}, "bars of IMA-1 .* > 0.1 and > 0; the claim was changed"),
        ({"test": "< 0"}, "< 0 and > 0"),
        ({"verdict": "refuted"}, "verdicts of IMA-1 .* refuted and confirmed"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(second, message):
    changes = {"seed": 1, "recipe": "aaa"} | second
    with pytest.raises(InputError, match=message):
        pool([run(0.3, recipe="aaa"), run(0.4, **changes)])


def test_nothing_to_pool_is_refused():
    with pytest.raises(InputError, match="make reproduce FULL=1"):
        pool([])
    with pytest.raises(InputError, match="at least one run"):
        random_effects([])


@pytest.mark.parametrize("change", [{"low": 0.9}, {"value": float("nan")}, {"n": "many"}])
def test_a_damaged_record_is_refused(change):
    with pytest.raises(FileError, match="a record of IMA-1"):
        pool([run(0.3, verdict="confirmed") | change])


def test_an_unknown_claim_is_refused():
    with pytest.raises(InputError, match="NONE-1"):
        pool([run(0.3) | {"id": "NONE-1"}])


def test_what_a_chapter_records_can_be_pooled(tmp_path):
    where = {"model": "pocket-llava", "dataset": "scenes", "against": "chance", "folder": tmp_path}
    records = []
    for seed, estimate in enumerate(estimates_of(0.3, 0.35, 0.4)):
        records.append(record("IMA-1", estimate, seeds=seed, **where))
    [entry] = pool(records)
    assert (entry["runs"], entry["verdict"]) == (3, "confirmed")
    records[1]["test"] = "> 0.2"  # as before the claim was changed
    with pytest.raises(InputError, match="> 0.2 and > 0"):
        pool(records)


def test_runs_of_two_versions_are_not_written_together(tmp_path):
    second = run(0.4, 1, versions={"xlvlms_tutorial": "0.2.0"})
    with pytest.raises(InputError, match=r"versions of runs differ: .*0\.1\.0.*0\.2\.0"):
        write_runs([run(0.3), second], tmp_path / "runs.parquet")
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_what_was_measured(tmp_path):
    file = tmp_path / "runs.parquet"
    records = [run(0.1 + 0.2 * seed, seed, recipe="aaa") for seed in (0, 1)]
    write_runs(reversed(records), file, {"hardware": {"cores": 2}})
    back = read_runs(file)
    for before, after in zip(records, back, strict=True):
        assert before.items() <= after.items()
    assert pool(back) == pool(records)
    with pytest.raises(FileError, match="not a table of runs"):
        read_runs(tmp_path / "none.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FileError, match="not a table of runs"):
        read_runs(file)


def test_a_table_that_does_not_fit_its_json_is_refused(tmp_path):
    for name, count in (("a", 1), ("b", 2)):
        write_runs([run(0.3 + seed, seed) for seed in range(count)], tmp_path / f"{name}.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "b.parquet").read_bytes())
    with pytest.raises(FileError, match="2 records of 1"):
        read_runs(tmp_path / "a.parquet")


def test_the_package_holds_runs_that_pool():
    records = read_runs()
    assert FILE.stat().st_size < 100_000
    entries = pool(records)
    assert sum(entry["runs"] >= 3 for entry in entries) > 10
    assert all(record["recipe"] for record in records)
    for entry in entries:
        count = 0
        for row in records:
            names = ("id", "chapter", "model", "dataset", "variant")
            count += all(row[name] == entry[name] for name in names)
        assert entry["runs"] in (1, count)
