import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlms_tutorial.claims import claims, spread
from xlvlms_tutorial.claims.claims import (
    CLAIMS,
    claim,
    judged,
    merge,
    read_register,
    record,
    sentence,
    verdict,
)
from xlvlms_tutorial.claims.headlines import SCHEMA
from xlvlms_tutorial.errors import FileError, InputError
from xlvlms_tutorial.metrics.intervals import Estimate

COUNTS = {"IMA": 12, "SKIP": 7, "COX": 7, "SHIFT": 4, "STEER": 7, "VLM": 1}
IDS = {f"{prefix}-{k}" for prefix, n in COUNTS.items() for k in range(1, n + 1)}
IDS |= {"LEARN-1", "LEARN-2", "LEARN-3", "LEARN-4", "HALL-1", "READ-1", "CAM-1", "CAM-2", "DROP-1"}
IDS |= {"KNOCK-1", "ICL-1", "ICL-2", "ICL-3", "ICL-4", "ICL-5"}
IDS |= {"AIM-1"}
IDS |= {"MERGE-1", "MERGE-2", "MERGE-3", "MERGE-5", "PEFT-1", "PEFT-2"}
RUN = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0, "against": "chance"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(claims.FOLDER_VARIABLE, str(tmp_path / "claims"))
    return tmp_path / "claims"


def interval(low, high):
    return Estimate((low + high) / 2, low, high, 10)


@st.composite
def estimates(draw):
    low, value, high = sorted(draw(st.tuples(*[st.floats(-2, 2)] * 3)))
    return Estimate(value, low, high, 10)


any_claim = st.sampled_from([*CLAIMS.values()])


def test_the_register_holds_every_claim_once():
    assert claims.read_register() == CLAIMS
    assert set(CLAIMS) == IDS
    for known_claim in CLAIMS.values():
        assert all(
            (
                known_claim.part,
                known_claim.paper,
                known_claim.where,
                known_claim.metric,
                known_claim.rival,
            )
        ), known_claim.id
        assert known_claim.statement.endswith("."), known_claim.id
        assert re.match(r"arXiv \d{4}\.\d{5}, \w", known_claim.paper), known_claim.id


SMALL = """
sources:
  IMA: {part: I Alignment, paper: "arXiv 2405.16700, a paper"}
claims:
  IMA-1:
    {where: Fig. 2, statement: It is so., metric: this minus that, rival: that,
     fidelity: method, reason: As there., about: models}
  IMA-2:
    {where: Fig. 3, statement: It is about half., metric: share, rival: none, direction: equal,
     "null": 0.5, margin: 0.1, fidelity: proxy, reason: Not as there., about: pictures,
     effect: ratio}
"""


def test_a_register_is_read_with_what_is_left_out(tmp_path):
    file = tmp_path / "register.yaml"
    file.write_text(SMALL)
    first, second = read_register(file).values()
    assert first == claims.Claim(
        id="IMA-1",
        part="I Alignment",
        paper="arXiv 2405.16700, a paper",
        where="Fig. 2",
        statement="It is so.",
        metric="this minus that",
        direction="greater",
        null=0.0,
        rival="that",
        margin=0.0,
        fidelity="method",
        reason="As there.",
        about="models",
        effect="share",
    )
    assert (second.fidelity, second.about, second.effect) == ("proxy", "pictures", "ratio")
    assert (second.direction, second.null, second.margin, second.part) == (
        "equal",
        0.5,
        0.1,
        "I Alignment",
    )


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rival: that", "rivals: that", "IMA-1.*rival"),
        (", rival: that", "", "IMA-1.*rival"),
        ("rival: that", "rival:", "IMA-1.*rival"),
        ("rival: that", 'rival: ""', "IMA-1.*rival"),
        ("where: Fig. 2", "where: 2", "IMA-1.*where"),
        ("rival: that", "rival: that, rival: other", "rival twice"),
        ("IMA-2:", "IMA-1:", "IMA-1 twice from line 5"),
        (", reason: As there.", "", "IMA-1.*reason"),
        ("reason: As there.", 'reason: ""', "reason of claim IMA-1"),
        ("fidelity: method, ", "", "IMA-1.*fidelity"),
        ("fidelity: method", "fidelity: exact", "fidelity of IMA-1.*exact"),
        ("about: models", "about: stars", "about of IMA-1.*stars"),
        ("effect: ratio", "effect: metres", "effect of IMA-2.*metres"),
        ("rival: that", "rival: that, part: II", "IMA-1.*part"),
        ("IMA-2", "COX-2", "COX-2.*COX"),
        ("IMA-2", "7", "7: "),
        ("margin: 0.1", "margins: 0.1", "IMA-2.*margins"),
        ('"null": 0.5', "null: 0.5", "IMA-2"),
        ('"null": 0.5', '"null": half', "IMA-2.*null"),
        ('"null": 0.5', '"null": true', "IMA-2.*null"),
        ('"null": 0.5', '"null": .nan', "IMA-2.*nan"),
        ("margin: 0.1", "margin: 0", "IMA-2.*margin"),
        ("equal", "more", "IMA-2.*more"),
        ("part: I Alignment, ", "", "IMA-1.*part"),
        ("part:", "parts:", "IMA-1.*part"),
        ("sources:", "papers:", "papers, claims"),
        ("claims:", "claims: {}\nmore:", "sources, claims, more"),
        ("{where: Fig. 2", "[where: Fig. 2", "YAML|Error"),
        (SMALL, "", "Error"),
        (SMALL, "- 1", "Error"),
    ],
)
def test_a_register_with_a_wrong_field_is_refused(tmp_path, old, new, named):
    file = tmp_path / "register.yaml"
    file.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(FileError, match=f"(?s)register.yaml.*{named}"):
        read_register(file)


def test_a_claim_may_have_a_source_by_its_whole_id():
    assert "2509.25584" in CLAIMS["SKIP-7"].paper and "2410.09454" in CLAIMS["SKIP-6"].paper
    assert "2404.03592" in CLAIMS["LEARN-4"].paper and CLAIMS["LEARN-4"].part.startswith("III")


def test_a_register_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileError, match="nowhere.yaml.*FileNotFoundError"):
        read_register(tmp_path / "nowhere.yaml")


def test_every_claim_can_be_confirmed_and_refuted():
    for known_claim in CLAIMS.values():
        verdicts = {
            verdict(known_claim, interval(low, low + 0.001)) for low in np.linspace(-2, 2, 401)
        }
        assert {"confirmed", "refuted"} <= verdicts, known_claim.id


def test_a_wrong_direction_flips_the_verdict():
    valid = claim("IMA-1")
    wrong = replace(valid, direction="less")
    assert verdict(valid, interval(0.2, 0.4)) == "confirmed"
    assert verdict(wrong, interval(0.2, 0.4)) == "refuted"
    assert verdict(valid, interval(-0.4, -0.2)) == "refuted"
    assert verdict(wrong, interval(-0.4, -0.2)) == "confirmed"
    assert verdict(valid, interval(-0.1, 0.2)) == verdict(wrong, interval(-0.1, 0.2)) == "undecided"
    assert verdict(valid, None) == "not measured"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.96, 0.99, "confirmed"),
        (0.951, 1.02, "confirmed"),
        (0.95, 0.99, "undecided"),
        (0.9, 0.96, "undecided"),
        (0.8, 0.95, "refuted"),
    ],
)
def test_a_margin_says_what_about_means(low, high, expected):
    assert verdict(claim("SKIP-3"), interval(low, high)) == expected
    assert claim("SKIP-3").test == "> 0.95"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.04, 0.04, "confirmed"),
        (-0.06, 0.04, "undecided"),
        (0.01, 0.08, "undecided"),
        (0.05, 0.2, "refuted"),
        (-0.2, -0.06, "refuted"),
    ],
)
def test_equality_needs_the_whole_interval_inside_the_margin(low, high, expected):
    assert verdict(claim("STEER-2"), interval(low, high)) == expected


def test_an_effect_on_the_null_does_not_confirm():
    assert verdict(claim("IMA-1"), interval(0.0, 0.0)) == "refuted"
    assert verdict(claim("IMA-1"), interval(0.0, 0.3)) == "undecided"


@given(any_claim, estimates())
def test_a_narrower_interval_never_overturns_a_verdict(known_claim, estimate):
    point = Estimate(estimate.value, estimate.value, estimate.value, estimate.n)
    result = verdict(known_claim, estimate)
    if result != "undecided":
        assert verdict(known_claim, point) == result


@given(any_claim, estimates())
def test_the_mirrored_claim_gets_the_mirrored_verdict(known_claim, e):
    mirrored = replace(
        known_claim,
        direction={"greater": "less", "less": "greater"}.get(known_claim.direction, "equal"),
        null=-known_claim.null,
    )
    assert verdict(known_claim, e) == verdict(mirrored, Estimate(-e.value, -e.high, -e.low, e.n))


@given(estimates())
def test_opposite_claims_are_never_both_confirmed(e):
    known_claim = claim("IMA-1")
    assert [verdict(known_claim, e), verdict(replace(known_claim, direction="less"), e)].count(
        "confirmed"
    ) <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"direction": "more"},
        {"null": np.nan},
        {"margin": -1.0},
        {"direction": "equal", "margin": 0.0},
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(change):
    with pytest.raises(InputError):
        replace(claim("IMA-1"), **change)


def test_a_record_keeps_numbers_and_their_origin(folder):
    origin = {
        "model": "a/b",
        "dataset": "scenes",
        "seeds": [0, 1],
        "chapter": "outside",
        "variant": "layer 3",
        "against": "random negatives",
        "interval_over": "questions",
        "choice": "validation",
        "scale": "published",
    }
    written = record("VLM-1", Estimate(0.1, 0.05, 0.2, 300), **origin)
    (file,) = folder.iterdir()
    stored = json.loads(file.read_text())
    assert stored == written
    assert {name: stored[name] for name in ("id", "value", "low", "high", "n", "verdict")} == {
        "id": "VLM-1",
        "value": 0.1,
        "low": 0.05,
        "high": 0.2,
        "n": 300,
        "verdict": "confirmed",
    }
    assert {name: stored[name] for name in origin} == origin
    assert stored["versions"]["torch"]
    assert claims.sentence(written) == "VLM-1 confirmed: 0.1 [0.05, 0.2], claimed > 0"


def measured(folder=None):
    """The entries of the ledger that hold a measurement."""
    return [entry for entry in merge(folder) if entry["value"] is not None]


def test_a_rerun_replaces_its_own_record_and_no_other():
    record("IMA-1", interval(0.1, 0.3), **RUN)
    for change in (
        {"model": "b"},
        {"dataset": "b"},
        {"seeds": 1},
        {"chapter": "b"},
        {"variant": "b"},
    ):
        record("IMA-1", interval(0.1, 0.3), **RUN | change)
    record("IMA-2", interval(-0.3, -0.1), **RUN)
    assert len(measured()) == 7
    record("IMA-1", interval(-0.3, -0.1), **RUN)
    verdicts = sorted(entry["verdict"] for entry in measured())
    assert verdicts == ["confirmed"] * 5 + ["refuted"] * 2


def test_numpy_numbers_are_written_as_plain_ones():
    estimate = Estimate(np.float32(0.5), np.float32(0.25), np.float64(0.75), np.int64(4))
    written = record("IMA-1", estimate, **RUN | {"seeds": list(np.arange(2))})
    [entry] = measured()
    assert (entry["value"], entry["n"]) == (0.5, 4)
    assert written["seeds"] == [0, 1]


def test_a_verdict_in_a_file_is_not_believed(folder):
    record("IMA-1", interval(-0.3, -0.1), **RUN)
    (file,) = folder.iterdir()
    file.write_text(file.read_text().replace("refuted", "confirmed"))
    assert [entry["verdict"] for entry in measured()] == ["refuted"]


def test_merge_lists_every_claim_measured_or_not(folder, tmp_path):
    record("IMA-1", interval(0.1, 0.3), **RUN)
    record("IMA-1", interval(-0.1, 0.3), **RUN | {"model": "b"})
    entries = merge()
    assert [e["id"] for e in entries if e["id"] != "IMA-1"] == [
        name for name in CLAIMS if name != "IMA-1"
    ]
    assert sorted((e["model"], e["verdict"]) for e in entries if e["id"] == "IMA-1") == [
        ("b", "undecided"),
        ("pocket-llava", "confirmed"),
    ]
    rest = [e for e in entries if e["id"] != "IMA-1"]
    assert {e["verdict"] for e in rest} == {"not measured"}
    assert all(e["value"] is None for e in rest)


def test_records_from_elsewhere_are_judged_and_merged_once(folder):
    first = record("IMA-1", interval(0.1, 0.3), **RUN)
    second = first | {
        "model": "llava-hf/llava-1.5-7b-hf",
        "seeds": [1],
        "low": -0.3,
        "value": -0.2,
        "high": -0.1,
        "verdict": "confirmed",
    }
    entries = [entry for entry in merge(more=[first, second, second]) if entry["id"] == "IMA-1"]
    assert [(entry["model"], entry["seeds"], entry["verdict"]) for entry in entries] == [
        ("pocket-llava", [0], "confirmed"),
        ("llava-hf/llava-1.5-7b-hf", [1], "refuted"),
    ]
    assert [entry["model"] for entry in measured()] == ["pocket-llava"]
    for damage, error in (({"low": 0.5}, FileError), ({"id": "IMA-99"}, InputError)):
        with pytest.raises(error):
            merge(more=[second | damage])
    with pytest.raises(FileError, match="elsewhere: not a record"):
        judged({"id": "IMA-1"}, "elsewhere")


def test_without_records_there_is_a_full_ledger():
    assert not measured()
    assert len(merge()) == len(IDS)


def test_the_default_folder_is_that_of_the_book_around(tmp_path, monkeypatch):
    monkeypatch.delenv(claims.FOLDER_VARIABLE)
    (tmp_path / "book").mkdir()
    monkeypatch.chdir(tmp_path / "book")
    assert claims.default_folder() == tmp_path / "book" / "_build" / "claims"
    (tmp_path / "_config.yml").touch()
    (tmp_path / "_toc.yml").touch()
    assert claims.default_folder() == tmp_path / "_build" / "claims"


def test_bad_input_raises_and_writes_nothing(folder):
    with pytest.raises(InputError, match="IMA-99.*known: VLM-1"):
        record("IMA-99", interval(0, 1), **RUN)
    with pytest.raises(InputError):
        record("IMA-1", Estimate(float("nan"), 0, 1, 3), **RUN)
    with pytest.raises(InputError):
        record("IMA-1", Estimate(2.0, 0, 1, 3), **RUN)
    for wrong in ({"model": ""}, {"dataset": ""}, {"seeds": []}):
        with pytest.raises(FileError):
            record("IMA-1", interval(0, 1), **RUN | wrong)
    with pytest.raises(FileError, match=r"IMA-1 \(layer 3\).*against="):
        record("IMA-1", interval(0, 1), **RUN | {"against": "", "variant": "layer 3"})
    for wrong in ({"interval_over": "stars"}, {"choice": "best"}, {"scale": "large"}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} of IMA-1"):
            record("IMA-1", interval(0, 1), **RUN | wrong)
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["{", "[]", '{"id": "IMA-1"}', None])
def test_a_damaged_record_is_named(folder, damage):
    record("IMA-1", interval(0.1, 0.3), **RUN)
    (file,) = folder.iterdir()
    file.write_text(
        damage if damage is not None else file.read_text().replace('"low": 0.1', '"low": 0.9')
    )
    with pytest.raises(FileError, match=re.escape(file.name)):
        merge()


def test_a_verdict_that_another_processor_would_change_is_undecided_between_machines(
    folder, monkeypatch, tmp_path
):
    key = {
        "model": "pocket-llava",
        "dataset": "scenes",
        "seeds": [0],
        "chapter": "alignment",
        "variant": "layer 1",
        "against": "chance",
    }
    first, second = Estimate(0.2, 0.05, 0.3, 40), Estimate(0.2, -0.01, 0.29, 40)
    alone = record("IMA-1", first, folder=folder, **key)
    assert alone["verdict"] == "confirmed" and not alone["between_machines"]
    file = tmp_path / "spread.json"
    file.write_text(
        json.dumps({spread.name_of({"id": "IMA-1", **key}): [first.asdict(), second.asdict()]})
    )
    monkeypatch.setattr(spread, "FILE", file)
    for estimate in (first, second):  # the same words whichever processor this is
        joined = record("IMA-1", estimate, folder=folder, **key)
        assert (joined["verdict"], joined["low"], joined["high"]) == ("undecided", -0.01, 0.3)
        assert joined["alone"] == [estimate.low, estimate.high]
        assert sentence(joined).startswith("IMA-1 undecided between machines: 0.2 [-0.01, 0.3]")
    [row] = measured(folder)
    assert row["verdict"] == "undecided" and row["between_machines"]
    larger = record("IMA-1", Estimate(0.2, 0.05, 0.3, 80), folder=folder, **key)
    # measured on other samples: what moved then says nothing on these
    assert larger["verdict"] == "confirmed"


def test_what_moves_by_rounding_only_is_not_a_spread():
    estimate = Estimate(0.2, 0.1, 0.3, 40)
    assert not spread.moved([estimate, Estimate(0.2001, 0.1001, 0.3, 40)])
    assert spread.moved([estimate, Estimate(0.2, 0.09, 0.3, 40)])
    assert spread.joined(estimate, []) == estimate


@pytest.mark.parametrize(
    ("model", "scale"),
    [
        ("pocket-llava", "pocket"),
        ("pocket-llava-seed1", "pocket"),
        ("llava-hf/llava-1.5-7b-hf", "published"),
        ("/models/llava", "own"),
        ("./llava", "own"),
        ("tiny", "own"),
    ],
)
def test_the_scale_follows_from_the_name_of_the_model(model, scale):
    assert record("IMA-1", interval(0.1, 0.3), **RUN | {"model": model})["scale"] == scale


def test_a_folder_that_is_named_as_on_the_hub_is_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert claims.scale_of("models/mine") == "own"
    assert claims.scale_of("models/theirs") == "published"


def test_a_page_that_is_built_records_a_name_once(folder, monkeypatch):
    record("IMA-1", interval(0.1, 0.3), **RUN)
    record("IMA-1", interval(0.2, 0.3), **RUN)  # a cell that a reader runs again
    monkeypatch.setenv(claims.ONE_RECORD, "1")
    record("IMA-1", interval(0.2, 0.3), **RUN)
    with pytest.raises(FileError, match="IMA-1 .*recorded twice with other numbers"):
        record("IMA-1", interval(0.1, 0.3), **RUN)
    assert [entry["low"] for entry in measured()] == [0.2]


def test_two_files_with_a_record_of_one_name_are_refused(folder):
    record("IMA-1", interval(0.1, 0.3), **RUN)
    (file,) = folder.iterdir()
    (folder / "zz-copy.json").write_text(file.read_text())
    with pytest.raises(FileError, match=f"zz-copy.json: a second record of .*{file.name}"):
        merge()


@pytest.mark.parametrize("name", ["against", "interval_over", "choice", "scale"])
def test_a_record_of_an_earlier_version_is_named(folder, name):
    record("IMA-1", interval(0.1, 0.3), **RUN)
    (file,) = folder.iterdir()
    content = json.loads(file.read_text())
    del content[name]
    file.write_text(json.dumps(content))
    with pytest.raises(FileError, match=f"{re.escape(file.name)}.*{name}"):
        merge()


def test_a_range_of_random_orders_is_not_shown_as_an_interval():
    written = record("IMA-10", interval(0.6, 1.0), **RUN | {"interval_over": "random orders"})
    assert sentence(written) == "IMA-10 confirmed: 0.8 (random orders: 0.6 to 1), claimed > 0"


def test_the_schema_of_the_archive_knows_what_observations_can_be():
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    measured = schema["properties"]["measurements"]["items"]["properties"]
    assert measured["interval_over"]["enum"] == [*claims.OBSERVATIONS, None]
    assert [kind for kind in measured["choice"]["enum"] if kind] == list(claims.CHOICES)
