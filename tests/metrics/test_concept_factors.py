import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import concept_factors
from xlvlms_tutorial.metrics.concept_factors import adjusted_mutual_information, factor_information
from xlvlms_tutorial.samples import Sample


def binned(column):
    """The rule of the module, in words: zero, then thirds of the other codes by rank."""
    bins, others = np.zeros(len(column), dtype=int), np.flatnonzero(column)
    for i in others:
        rank = (column[others] < column[i]).sum() + ((column[others] == column[i]).sum() - 1) / 2
        bins[i] = 1 + int(3 * (rank + 0.5) / len(others))
    return bins


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    action = rng.choice(["climb", "fall", "stand"], size=150)
    codes = np.maximum(rng.normal(size=(150, 4)), 0)
    codes[:, 0] = (action == "fall") * rng.uniform(1, 2, size=150)
    codes[:, 1] = 0
    frame = pd.DataFrame({"action": action, "place": rng.choice(["sand", "snow"], size=150)})
    return codes, frame, factor_information(codes, frame, n_permutations=400)


def test_information_agrees_with_scikit_learn_on_the_bins(world):
    codes, frame, table = world
    assert len(table) == 8
    for row in table.itertuples():
        expected = mutual_info_score(binned(codes[:, row.concept]), frame[row.factor])
        assert row.information == pytest.approx(expected, abs=1e-6)
        assert row.excess == pytest.approx(row.information - row.null)
        share = row.excess / entropy(frame[row.factor].value_counts())
        assert row.share == pytest.approx(share)


@given(st.lists(st.sampled_from([0.0, 0.0, -1.0, 0.5, 0.5, 2.0, 3.0]), min_size=1, max_size=30))
@settings(deadline=None)
def test_bins_are_zero_and_thirds_by_rank(column):
    np.testing.assert_array_equal(
        concept_factors._bins(np.array(column)[:, None])[:, 0], binned(np.array(column))
    )


def test_null_and_p_agree_with_a_plain_loop(world):
    codes, frame, table = world
    rng = np.random.default_rng(5)
    for concept in (0, 2):
        bins = binned(codes[:, concept])
        null = np.array(
            [mutual_info_score(bins, rng.permutation(frame["action"])) for _ in range(400)]
        )
        row = table.query("concept == @concept and factor == 'action'").iloc[0]
        assert row["null"] == pytest.approx(null.mean(), rel=0.15)
        assert row["p"] == pytest.approx((1 + (null >= row["information"]).sum()) / 401, abs=0.08)


def test_a_concept_that_is_one_value_is_found_and_noise_is_not(world):
    _, _, table = world
    rows = table.set_index(["concept", "factor"])
    first = rows.loc[(0, "action")]
    assert (first["value"], first["purity"]) == ("fall", 1)
    assert first["p"] == first["p_purity"] == 1 / 401
    assert first["p_adjusted"] < 0.05 < rows.loc[2:, "p_adjusted"].min()
    assert (rows["null_purity"].dropna() > rows["base_rate"].dropna() - 0.1).all()


def test_a_concept_that_is_zero_everywhere_says_nothing(world):
    _, _, table = world
    dead = table.query("concept == 1")
    assert (dead["information"].abs() < 1e-9).all()
    assert (dead[["p", "p_purity"]] == 1).all(axis=None)
    assert dead[["value", "purity", "base_rate", "null_purity"]].isna().all(axis=None)


def test_one_concept_for_each_value_has_the_factors_entropy():
    factor = np.repeat(["a", "b"], 50)
    row = factor_information(np.where(factor == "a", 1.0, 0.0)[:, None], {"factor": factor}).iloc[0]
    assert row["information"] == pytest.approx(np.log(2))
    assert 0.95 < row["share"] < 1
    assert (row["n"], row["n_values"], row["base_rate"]) == (100, 2, 0.5)


def test_p_is_about_uniform_where_nothing_is_linked():
    rng = np.random.default_rng(1)
    table = factor_information(
        rng.normal(size=(90, 200)), {"factor": rng.integers(4, size=90)}, n_permutations=200
    )
    assert 0.4 < table["p"].mean() < 0.6
    assert (table["p"] < 0.1).mean() == pytest.approx(0.1, abs=0.06)
    assert abs(table["excess"].mean()) < 0.01
    # shares of ten rows tie often, which makes it conservative
    assert 0.4 < table["p_purity"].mean() < 0.7


def test_purity_counts_the_top_rows_and_shares_tied_places():
    codes = np.array([5.0, -4, 3, 3, 3, 3, 1, 0])[:, None]
    factor = ["x", "y", "x", "x", "y", "y", "y", "y"]
    row = factor_information(codes, {"factor": factor}, top=4).iloc[
        0
    ]  # 5, -4, and half of each of the four 3s
    assert (row["value"], row["purity"], row["base_rate"]) == (
        "x",
        pytest.approx(0.5),
        pytest.approx(3 / 8),
    )
    few = factor_information(
        np.array([5.0, 0, 0, 0, 0, 0, 0, 0])[:, None], {"factor": factor}, top=4
    ).iloc[0]
    assert (few["value"], few["purity"]) == ("x", pytest.approx(1))


def test_rows_without_a_value_and_constant_factors_are_left_out():
    rng = np.random.default_rng(2)
    codes, action = rng.normal(size=(60, 3)), rng.choice(["run", "sit"], size=60).astype(object)
    action[::3] = None
    action[1] = np.nan
    with_gaps = factor_information(codes, {"action": action, "same": ["one"] * 60})
    labelled = pd.notna(action)
    alone = factor_information(codes[labelled], {"action": action[labelled]}, top=10)
    pd.testing.assert_frame_equal(with_gaps, alone)
    assert (with_gaps["n"] == 39).all()


def test_factors_do_not_disturb_each_other_and_the_seed_repeats(world):
    codes, frame, table = world
    alone = factor_information(codes, frame[["place"]], n_permutations=400).drop(
        columns="p_adjusted"
    )
    together = table.query("factor == 'place'").drop(columns="p_adjusted").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, together)
    second_run = factor_information(codes, frame, n_permutations=400, seed=1)
    assert not np.allclose(second_run["null"], table["null"], rtol=1e-12)


def test_blocks_of_permutations_do_not_change_the_result(world, monkeypatch):
    codes, frame, table = world
    monkeypatch.setattr(concept_factors, "_BLOCK", 50_000)
    pd.testing.assert_frame_equal(factor_information(codes, frame, n_permutations=400), table)


@pytest.mark.parametrize(
    ("codes", "factors", "arguments", "error"),
    [
        (np.full((6, 2), np.nan), {"a": [0, 1] * 3}, {}, InputError),
        (np.empty((0, 2)), {"a": []}, {}, InputError),
        (np.ones(6), {"a": [0, 1] * 3}, {}, InputError),
        (np.ones((6, 2)), {"a": [0, 1]}, {}, InputError),
        (np.ones((6, 2)), {"a": [1] * 6}, {}, InputError),
        (np.ones((6, 2)), {}, {}, InputError),
        (np.ones((6, 2)), {"a": [None] * 6}, {}, InputError),
        (np.ones((6, 2)), {"a": [0, 1] * 3}, {"n_permutations": 10}, InputError),
        (np.ones((6, 2)), {"a": [0, 1] * 3}, {"top": 0}, InputError),
        (np.ones((6, 2)), {"caption": list("abcdef")}, {}, InputError),
        (np.ones((6, 2)), {"a": [[0], [1]] * 3}, {}, InputError),
    ],
)
def test_what_gives_no_number_is_refused(codes, factors, arguments, error):
    with pytest.raises(error):
        factor_information(codes, factors, **arguments)


def test_agreement_is_the_adjusted_mutual_information_of_the_largest_codes():
    rng = np.random.default_rng(3)
    codes, factor = rng.normal(size=(200, 5)), rng.integers(3, size=200)
    codes[np.arange(200), factor] += 2
    labels = np.abs(codes).argmax(axis=1)
    estimate = adjusted_mutual_information(codes, factor)
    assert estimate.value == pytest.approx(adjusted_mutual_info_score(factor, labels))
    assert estimate == adjusted_mutual_information(labels, factor)
    assert estimate.low > 0.1
    assert estimate.n == 200


def test_agreement_of_equals_is_1_and_of_strangers_near_0():
    rng = np.random.default_rng(4)
    labels, random_labels = rng.choice(list("abc"), size=300), rng.integers(6, size=300)
    same = adjusted_mutual_information(labels, labels)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))
    strangers = adjusted_mutual_information(labels, random_labels)
    assert strangers.low <= 0 <= strangers.high
    assert strangers.high - strangers.low < 0.1


def test_agreements_interval_covers_what_the_value_is_on_average():
    rng = np.random.default_rng(5)

    def draw():
        factor = rng.integers(4, size=150)
        return np.where(rng.random(150) < 0.5, factor, rng.integers(4, size=150)), factor

    mean = np.mean([adjusted_mutual_info_score(*draw()) for _ in range(200)])
    estimates = [adjusted_mutual_information(*draw(), n_resamples=200) for _ in range(100)]
    assert 0.83 <= np.mean([estimate.low <= mean <= estimate.high for estimate in estimates]) <= 1


def test_agreement_counts_rows_of_zeros_as_a_concept_and_leaves_out_rows_without_a_value():
    codes = np.repeat([[1.0, 0], [0, -2], [0, 0]], 20, axis=0)
    factor = np.repeat(np.array(["a", "b", "c"], dtype=object), 20)
    assert adjusted_mutual_information(codes, factor).value == pytest.approx(1)
    factor[40:] = None
    assert (
        adjusted_mutual_information(codes, factor).value,
        adjusted_mutual_information(codes, factor).n,
    ) == (pytest.approx(1), 40)


def test_agreement_refuses_what_gives_no_number(monkeypatch):
    with pytest.raises(InputError):
        adjusted_mutual_information([0, 1, 0, 1], ["a"] * 4)
    with pytest.raises(InputError):
        adjusted_mutual_information([0, 1, 0], ["a", "b"])
    with pytest.raises(InputError):
        adjusted_mutual_information(np.full((4, 2), np.inf), ["a", "b"] * 2)
    labels, factor = np.arange(300) % 4, np.arange(300) % 3
    whole = adjusted_mutual_information(labels, factor, n_resamples=400)
    monkeypatch.setattr(concept_factors, "_BLOCK", 20_000)
    assert adjusted_mutual_information(labels, factor, n_resamples=400).value == whole.value


def test_informative_factors_are_those_that_can_be_asked_about():
    table = pd.DataFrame(
        {
            "action": ["walk", "sit", "walk", None, "sit", "walk"],
            "place": ["beach"] * 6,
            "colour": list("abcdef"),
            "time": [None] * 6,
            "side": ["left", "right", None, None, None, None],
        }
    )
    varying = concept_factors.varying_factors(table)
    assert list(varying) == ["action", "side"] and varying["action"].equals(table["action"])
    assert list(concept_factors.varying_factors({"a": [1, 1, 2], "b": [1, 1, 1]})) == ["a"]
    codes = np.random.default_rng(0).uniform(size=(6, 2))
    assert set(factor_information(codes, varying, n_permutations=100)["factor"]) == {
        "action",
        "side",
    }
    for names in (["colour"], ["place", "time"], []):
        with pytest.raises(
            InputError, match="a factor with at least 2 different values that repeat"
        ):
            concept_factors.varying_factors(table[names])


def captioned(text, **factors):
    return Sample(text, [], (text, "zebra"), truth=factors)


def test_words_that_are_not_said_often_give_way_to_what_samples_show():
    bare = Sample("bare", [])
    samples = [
        captioned("A woman with a red bus.", subject="bus", item="car"),
        captioned("The bus and the WOMAN."),
        captioned("nothing"),
    ]
    samples += [
        captioned("A hot dog, a bus, and a car.", subject="hot dog", item="bus"),
        captioned("two cars", subject="car"),
        bare,
    ]
    assert concept_factors.frequent_words(samples, ["woman", "bus"], min_count=2) == [
        "woman",
        "bus",
    ]
    # "cars" is another word
    assert concept_factors.frequent_words(samples, ["woman", "frog", "robot"], min_count=2) == [
        "woman",
        "bus",
    ]
    assert concept_factors.frequent_words(samples, ["woman", "frog", "robot"], min_count=1) == [
        "woman",
        "bus",
        "car",
    ]
    # a word of a second caption is not said
    assert concept_factors.frequent_words(samples, ["hot dog", "zebra"], min_count=1) == [
        "hot dog",
        "bus",
    ]
    with pytest.raises(
        InputError, match=r"fewer than 5 of 5 samples say 'frog'.*they say 'bus' \(3\), "
    ):
        concept_factors.frequent_words(samples, ["frog"], min_count=5)
