import json
from collections import Counter

import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from tests.support.steering import noise
from tests.support.tiny import lively, tiny_llava
from xlvlms_tutorial.claims import merge, read_checks
from xlvlms_tutorial.data import Question, Sample
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.steering import Run, SteeringVectors
from xlvlms_tutorial.metrics import Estimate
from xlvlms_tutorial.tutorials import experiments
from xlvlms_tutorial.tutorials.experiments import (
    Experiment,
    answer_of,
    balanced_questions,
    band_table,
    describe,
    describe_steered,
    glue,
    question_of,
    substitute,
    try_exercise,
)

LARGE = Estimate(0.3, 0.2, 0.4, 50)
NONE = Estimate(0.0, -0.1, 0.1, 50)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("XLVLMS_CLAIMS", str(tmp_path))
    return Experiment("inside", "pocket-llava", "scenes", seeds=3, interval_over="questions")


def test_a_record_reaches_the_ledger_with_everything_that_was_said_once(experiment, tmp_path):
    assert experiment.record("IMA-1", LARGE, "another run", "layer 8") == "confirmed"
    (entry,) = [one for one in merge(tmp_path) if one["id"] == "IMA-1"]
    assert entry["chapter"] == "inside"
    assert entry["seeds"] == [3]
    assert entry["interval_over"] == "questions"
    assert entry["against"] == "another run"
    assert entry["value"] == 0.3


def test_a_measurement_that_is_made_again_replaces_the_first(experiment):
    experiment.record("IMA-1", LARGE, "another run", "layer 8")
    experiment.record("IMA-1", NONE, "another run", "layer 8")
    assert experiment.verdict("IMA-1", "layer 8") == "undecided"
    assert len(experiment.records) == 1


def test_what_was_not_measured_has_no_verdict(experiment):
    assert experiment.verdict("IMA-1", "layer 8") == "not measured"


def test_a_check_is_written_down_whether_it_holds_or_not(experiment, tmp_path):
    assert experiment.check("one is less than two", 1 < 2)
    assert not experiment.check("two is less than one", 2 < 1)
    assert {one["statement"]: one["holds"] for one in read_checks(tmp_path)} == {
        "one is less than two": True,
        "two is less than one": False,
    }


def test_lines_and_results_show_the_claims_that_are_wanted(experiment):
    experiment.record("IMA-1", LARGE, "another run", "layer 8")
    experiment.record("IMA-3", NONE, "another token")
    assert experiment.lines("IMA-1") == "layer 8: IMA-1 confirmed: 0.3 [0.2, 0.4], claimed > 0"
    assert list(experiment.results("IMA-3").cells["verdict"]) == ["undecided"]
    assert len(experiment.results().cells) == 2


def test_a_claim_that_could_not_be_measured_has_a_row_that_says_so(experiment):
    experiment.record("IMA-1", LARGE, "another run")
    shown = experiment.results("IMA-1", "IMA-2").cells
    assert shown["verdict"].to_dict() == {"IMA-1": "confirmed", "IMA-2": "not measured"}
    assert shown.loc["IMA-2", "effect"] == "–"
    assert experiment.lines("IMA-2") == ""


def test_a_claim_that_the_register_does_not_hold_is_refused(experiment):
    experiment.record("IMA-1", LARGE, "another run")
    with pytest.raises(InputError, match="IMA-1"):
        experiment.results("IMA-99")


def test_headlines_are_of_this_page_alone_and_in_the_order_of_the_register(experiment):
    experiment.record("IMA-3", NONE, "another token")
    experiment.record("IMA-1", LARGE, "another run")
    lines = experiment.headlines()
    assert [(line["id"], line["headline"]) for line in lines] == [
        ("IMA-1", "holds"),
        ("IMA-3", "cannot tell"),
    ]


def test_the_summary_names_each_claim_with_its_headline(experiment):
    experiment.record("IMA-1", LARGE, "another run")
    page = BeautifulSoup(experiment.summary(), "html.parser")
    assert page.find("b").text == "IMA-1"
    assert "holds" in page.find(class_="sign").text
    assert "one measurement" in page.text


def test_the_summary_quotes_more_runs_where_the_package_has_them(experiment, monkeypatch):
    experiment.record("IMA-1", LARGE, "another run")
    experiment.record("IMA-3", NONE, "another token")
    lines = {"pocket-llava": {"headline": "does not hold", "runs": 5}}
    lines["<mine>"] = {"headline": "holds", "runs": 3}
    monkeypatch.setattr(experiments, "pooled_headlines", lambda: {"IMA-1": lines})
    first, second = BeautifulSoup(experiment.summary(), "html.parser").find_all("p")
    pooled = (
        "Pooled over seeds: SmolLM2, first connector, 5 runs: does not hold; <mine>, 3 runs: holds"
    )
    assert first.text.endswith(pooled)
    assert first.find(class_="sign").text == "✓ holds"  # of this run, as before
    assert "Pooled" not in second.text


def test_what_is_pasted_elsewhere_is_not_shown_in_its_cell(monkeypatch):
    displayed = []
    monkeypatch.setattr(experiments, "display", lambda data, **more: displayed.append((data, more)))
    glue("best layer", 24)
    ((data, more),) = displayed
    assert data == {"application/papermill.record/text/plain": "24"}
    assert more["metadata"]["scrapbook"]["name"] == "best layer"
    json.dumps(more["metadata"])


def test_a_table_of_bands_has_a_column_for_each_part_of_the_keys():
    bands = band_table({("image", 8): LARGE, ("text", 9): NONE}, "modality", "layer")
    assert bands.to_dict("records") == [
        {"modality": "image", "layer": 8} | LARGE.asdict(),
        {"modality": "text", "layer": 9} | NONE.asdict(),
    ]
    with pytest.raises(InputError, match="name each part"):
        band_table({("image", 8): LARGE}, "modality")


ANSWERS = st.lists(st.lists(st.sampled_from("abc"), max_size=5), max_size=12)


@given(ANSWERS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_no_answer_and_no_picture_has_more_questions_than_allowed(pictures, n, each, more):
    samples = []
    for number, answers in enumerate(pictures):
        questions = tuple(Question("letter", f"{k}?", answer) for k, answer in enumerate(answers))
        samples.append(Sample(id=str(number), source=None, questions=questions))
    chosen = balanced_questions(samples, n, each, {"a": more})
    by_answer = Counter(one.questions[0].answer for one in chosen)
    by_picture = Counter(one.id.split("/")[0] for one in chosen)
    assert all(len(one.questions) == 1 for one in chosen)
    assert all(count <= (more if answer == "a" else n) for answer, count in by_answer.items())
    assert all(count <= each for count in by_picture.values())
    assert len({one.id for one in chosen}) == len(chosen)


def test_rare_words_give_way_to_the_most_frequent_others():
    counts = {"table": 7, "snow": 9, "chair": 3, "sand": 1}
    assert substitute(["sand", "snow", "grass"], counts, 3) == ["table", "snow", "chair"]
    assert substitute(["grass", "sand", "rock"], {"chair": 5}) == ["chair"]


def exercise_7(double):
    assert double(2) == 4, "twice two"
    return "twice two is four"


def test_an_exercise_waits_passes_or_says_what_is_wrong(capsys):
    def stub(x):
        raise NotImplementedError("yours to write")

    try_exercise(exercise_7, stub)
    assert "Exercise 7 waits for you" in capsys.readouterr().out
    try_exercise(exercise_7, lambda x: x + x)
    assert capsys.readouterr().out == "Exercise 7 passed: twice two is four\n"
    with pytest.raises(AssertionError, match="twice two"):
        try_exercise(exercise_7, lambda x: x)


def test_a_sample_is_asked_its_first_question():
    questions = (Question("colour", "Which colour ?", "red"), Question("count", "How many ?", "2"))
    sample = Sample("a", None, questions=questions)
    assert (question_of(sample), answer_of(sample)) == ("Which colour ?", "red")


def test_captions_of_many_ways_in_one_batch_are_those_of_each_alone(samples):
    vlm, shown = lively(tiny_llava()), samples(3)
    tensors = {layer: 3 * noise(vlm.width, seed=layer) for layer in (1, 2)}
    vectors = SteeringVectors(tensors, {"model": vlm.name})
    runs = [Run("v", vectors, layer, alpha) for layer in (2, 1) for alpha in (0.0, 1.0, -2.0)]
    prompts = ["What colour ?", "Describe the picture .", "Is there a key ?"]
    expected = []
    for run in runs:
        with run.steering(vlm, "all"):
            expected.append(describe(vlm, shown, 4, prompts, batch_size=1))
    for batch_size in (1, 7, 99):  # batches of 1, 2 and 6 runs
        written = describe_steered(vlm, runs, shown, 4, prompts, batch_size=batch_size)
        assert written == expected
    assert expected[0] == expected[3] != expected[1]
    assert vlm.active == []
