"""Groups, searches and controls of the chapter on perceptual and textual tokens, on made states."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from xlvlms_tutorial import load_samples
from xlvlms_tutorial.activations import Activations
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics import Estimate
from xlvlms_tutorial.models import SITES
from xlvlms_tutorial.tutorials import Experiment, alignment
from xlvlms_tutorial.view import plots

N, D = 8, 16


def states(vectors, layers=(0, 1), site="resid_post"):
    """Two tokens a sample that lie on both sides of its vector."""
    rows = vectors.repeat_interleave(2, dim=0)
    rows = rows + 0.01 * torch.tensor([1.0, -1.0]).repeat(len(vectors))[:, None]
    table = pd.DataFrame(
        {
            "sample": np.repeat(range(len(vectors)), 2),
            "id": np.repeat([f"s{k}" for k in range(len(vectors))], 2),
            "position": np.tile([0, 4], len(vectors)),
        }
    )
    return Activations({(layer, site): rows for layer in layers}, table, {})


def kind(direction, marks):
    """A modality whose P and T point in two directions, with something of each sample's own."""
    cone = torch.zeros(D)
    cone[direction] = 5
    other = torch.zeros(D)
    other[direction + 1] = 5
    samples = load_samples("scenes", n=N)
    return alignment.Kind("model", "scenes", samples, states(cone + marks), states(other + marks))


@pytest.fixture
def marks():
    return 0.3 * torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kinds(marks):
    return {"image": kind(0, marks), "video": kind(2, marks)}


def test_samples_are_pooled_to_the_mean_of_their_tokens(marks):
    assert torch.allclose(alignment.pooled(states(marks), 0), marks, atol=1e-6)


def test_groups_in_cones_have_their_own_for_neighbours_and_mixed_ones_have_not(kinds, marks):
    shares = alignment.own_group_shares(kinds, [0])
    assert shares.loc[0].to_dict() == dict.fromkeys(["image P", "video P", "image T", "video T"], 1)
    mixed = {"image": kind(0, marks), "video": kind(0, marks)}
    assert alignment.own_group_shares(mixed, [0]).to_numpy().max() == 0  # the twin is nearer


def test_captions_of_all_modalities_are_one_more(kinds):
    parts = alignment.modalities(kinds, 0)
    assert {name: len(part) for name, part in parts.items()} == {
        "image": N,
        "video": N,
        "text": 2 * N,
    }
    assert list(alignment.groups(kinds, 0)) == ["image P", "video P", "image T", "video T"]


def test_cosines_are_averaged_by_what_two_groups_have_in_common(kinds):
    cosines = alignment.cosines_by_pair(kinds, [0, 1])
    assert set(cosines) == {
        "P, one modality",
        "P, two modalities",
        "P with T",
        "T, one modality",
        "T, two modalities",
    }
    assert cosines["P, one modality"].min() > 0.9
    assert cosines[["P, two modalities", "P with T"]].abs().max().max() < 0.2


def test_a_group_lies_nowhere_from_itself_and_far_from_another_cone(kinds):
    p, t = kinds["image"].P, kinds["image"].T
    assert alignment.apart(p, p, 0).value < 0.02
    assert alignment.apart(p, t, 0).value > 0.8
    assert alignment.beyond_runs((p, t), (p, t)).value == 0
    assert alignment.beyond_runs((p, p), (p, t)).value < -0.8


def test_a_probe_is_compared_where_it_beats_its_baseline_least():
    probe = pd.DataFrame({"value": [0.9, 0.8, 1.0], "low": 0.7, "high": 1.0, "n": 40})
    baseline = probe.assign(value=[0.5, 0.5, 0.9], low=0.5, high=1.0).iloc[1:]
    assert alignment.least_beyond(probe).value == pytest.approx(0.3)
    assert alignment.least_beyond(probe, baseline).value == pytest.approx(0.1)
    with pytest.raises(InputError, match="no layer"):
        alignment.least_beyond(probe, baseline.set_axis([7, 8], axis=0))


def test_probes_read_every_fourth_token_and_tell_cones_apart(kinds):
    probes = alignment.probe_pairs({"P and T": (kinds["image"].P, kinds["image"].T)}, folds=2)
    assert probes["P and T"]["value"].tolist() == [1, 1]
    assert set(probes["P and T"]["n"]) == {4 * N}  # positions 0 and 4 of both groups


def test_a_caption_is_found_where_it_shares_what_is_its_own(kinds, marks):
    behind = states(marks.roll(-1, 0))  # each caption holds what the picture before it shows
    hits = alignment.search_captions(kinds["image"].P, kinds["image"].T, behind, [0])
    assert hits["own caption, centred"].item() == 1
    assert hits["describes it, stands elsewhere"].item() == 0
    assert hits["stands behind it, describes another"].item() == 1


def test_pictures_of_one_place_share_a_cone_where_the_place_says_their_direction():
    samples = load_samples("scenes", n=N)
    places = ["sand", "grass"] * (N // 2)
    named = [replace(s, truth={"place": p}) for s, p in zip(samples, places, strict=True)]
    vectors = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    vectors[:, 0] += torch.tensor([20.0 if place == "sand" else -20.0 for place in places])
    rows = alignment.factor_cones(states(vectors), named, ("place", "time"), [0])
    # "time" is known of none of them, and dealt in turn the halves are the places
    # cosines are near 1 within a place and near -1 between two
    values = rows.set_index("factor")["value"]
    assert values.to_dict() == pytest.approx({"place": 2, "halves": 2}, abs=0.2)


def test_sites_are_measured_one_by_one(marks):
    def at_all_sites(vectors):
        parts = {site: states(vectors, site=site) for site in SITES}
        tensors = {key: rows for part in parts.values() for key, rows in part.tensors.items()}
        return Activations(tensors, parts[SITES[0]].table, {})

    tables = alignment.measures_by_site(at_all_sites(marks + 5), at_all_sites(3 * marks))
    assert list(tables["median norm of P"]) == list(SITES)
    assert tables["cosine of P, one block on"].to_numpy() == pytest.approx(1)
    assert (tables["median norm of P"] > tables["median norm of T"]).to_numpy().all()


def test_a_map_has_a_point_for_each_sample_and_role(kinds):
    class Corner:
        def fit_transform(self, X):
            assert X.shape == (4 * N, D)
            return X[:, :2]

    ax = alignment.draw_map(kinds, 0, Corner(), legend=False)
    assert len(ax.collections[0].get_offsets()) == 4 * N
    plots.png(ax.figure)


def outcomes(check, *arguments):
    """Return whether each sentence holds that a function writes down."""
    experiment, holds = Experiment("alignment", "tiny", "scenes"), []
    experiment.check = lambda statement, value: holds.append(bool(value))
    check(experiment, *arguments)
    return holds


def test_neighbours_of_sounds_words_do_not_count():
    shares = pd.DataFrame(
        {"image P": [1.0, 0.95], "image T": [0.5, 0.8], "audio P": 1.0, "audio T": [0.9, 0.1]}
    )
    assert outcomes(alignment.check_neighbours, shares) == [True, True]
    shares.loc[1, "image T"], shares.loc[0, "audio P"] = 0.65, 0.85
    assert outcomes(alignment.check_neighbours, shares) == [False, False]


def test_the_order_of_cosines_needs_a_margin_for_p_and_for_t():
    means = {"P with T": 0.1, "P, two modalities": 0.5, "P, one modality": 0.9}
    means |= {"T, two modalities": 0.6, "T, one modality": 0.8}
    assert outcomes(alignment.check_order, pd.DataFrame([means])) == [True]
    narrow = means | {"T, one modality": 0.64}
    assert outcomes(alignment.check_order, pd.DataFrame([narrow])) == [False]
    single = {name: value for name, value in means.items() if "two" not in name}
    assert outcomes(alignment.check_order, pd.DataFrame([single])) == [False]


def test_sentences_about_relatives_follow_the_distances():
    rows = {
        "same pictures, another run": [0.4, 0.4, 0.4, 0.4],
        "pictures and clips, own connectors": [0.05] * 4,
        "pictures and sounds, own connectors": [0.2, 0.3, 0.5, 0.6],
        "pictures and sounds, joint connector": [0.06, 0.2, 0.35, 0.4],
        "frames of clips, same connector": [0.01, -0.01, 0.0, 0.0],
        "pictures and clips, joint connector": [0.05, 0.01, 0.0, 0.0],
    }
    apart = pd.DataFrame(rows).T
    assert outcomes(alignment.check_relatives, apart) == [True] * 6
    apart.loc["pictures and sounds, joint connector", 3] = 0.3
    apart.loc["frames of clips, same connector", 1] = -0.03
    assert outcomes(alignment.check_relatives, apart) == [True, True, True, False, False, True]


def test_sentences_about_turns_follow_the_profiles():
    def profile(cosines, level):
        return pd.DataFrame({"value": cosines, "rival": level, "to": range(1, 11)})

    middle = [0.9] * 7
    late = profile([*middle, 0.1, 0.1, 0.1], 0.2)
    steps = {"image P": late, "audio P": late.assign(rival=0.5)}
    steps["image T"] = profile([0.1, 0.2, 0.2, *middle], 0.1)
    effects = {"image": Estimate(0.5, 0.4, 0.6, 9), "audio": Estimate(0.2, 0.1, 0.3, 9)}
    against_all = Estimate(0.7, 0.6, 0.8, 9)
    assert outcomes(alignment.check_turns, steps, effects, against_all, 10) == [True] * 3
    steps["audio P"] = profile([0.1, 0.1, 0.1, *middle], 0.1)
    weak = Estimate(0.5, 0.4, 0.6, 9)
    assert outcomes(alignment.check_turns, steps, effects, weak, 10) == [False] * 3


def test_sentences_about_the_search_follow_the_hits():
    hits = pd.DataFrame(
        {
            "raw": [0.1, 0.3, 0.3, 0.3, 0.3],
            "centred": [0.1, 0.9, 0.9, 0.9, 0.9],
            "described": [0.1, 0.9, 0.9, 0.5, 0.1],
            "behind": [0.1, 0.1, 0.1, 0.4, 0.8],
        }
    )
    assert outcomes(alignment.check_search, hits, 4) == [True] * 3
    hits.loc[0, "raw"], hits.loc[4, "described"], hits.loc[3, "centred"] = 0.4, 0.6, 0.7
    assert outcomes(alignment.check_search, hits, 4) == [False] * 3


def test_a_cone_of_places_needs_halves_without_one():
    curves = pd.DataFrame({"factor": ["place", "halves"], "value": [0.2, 0.01]})
    assert outcomes(alignment.check_factors, curves) == [True]
    assert outcomes(alignment.check_factors, curves.assign(value=[0.2, -0.1])) == [False]
    assert outcomes(alignment.check_factors, curves[curves["factor"] == "halves"]) == [False]
