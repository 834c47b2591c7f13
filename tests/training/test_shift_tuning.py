"""Tuning under a shift: labels cover classes, the best is kept, and scores count all questions."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny_pocket import tiny_reader
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.models import tune
from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.training.shift_tuning import (
    N_LABELS,
    WAYS,
    Best,
    Lessons,
    blind,
    by_run,
    digits,
    domain,
    fit,
    labelled,
    labels,
    run_all,
    share,
)


def sample(number, *answers, item="key"):
    image = Image.new("RGB", (32, 32), (50 * number, 10, 200 - 40 * number))
    questions = tuple(Question(f"kind {k}", "Is there a key ?", a) for k, a in enumerate(answers))
    return Sample(f"s{number}", image, questions=questions, truth={"item": item})


PICTURES = [
    sample(0, "yes", "red"),
    sample(1, "no", "blue", "a red key"),
    sample(2, "yes"),
    sample(3, "no", "red"),
]


def test_what_is_judged_is_the_best_and_not_the_last():
    """The second bug of the published code: the best score was never written down."""
    vlm = tiny_reader()
    lessons = Lessons(vlm, PICTURES)

    class Scripted(Lessons):
        scores = iter([0.2, 0.9, 0.4])

        def correct(self, prefix=""):
            score = next(self.scores)
            return [[True] * round(10 * score) + [False] * round(10 - 10 * score)], 0.0

    states = []
    with tune(vlm, "norm") as tuning:
        offered = Best.offer

        def offer(best, score, step, state):
            states.append(state)
            offered(best, score, step, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Best, "offer", offer)
            best, losses = fit(
                tuning, lessons, Scripted(vlm, PICTURES), 0.05, steps=3, checks=(1, 2, 3)
            )
        assert (best.step, best.score, len(losses)) == (2, 0.9, 3)
        for name, weight in tuning.parameters.items():
            assert torch.equal(weight, states[1][name])
        name = next(iter(tuning.parameters))
        assert not torch.equal(tuning.parameters[name], states[2][name])


def test_the_first_of_equal_scores_stays():
    best = Best()
    best.offer(0.5, 1, {})
    best.offer(0.5, 2, {})
    assert best.step == 1


def test_a_score_counts_all_questions_and_no_batches():
    """The third bug of the published code: a mean of the scores of batches."""
    correct = [[True] * 6, [True, True], [False], [False]]
    of_batches = np.mean([share(correct[:2]), share(correct[2:])])
    assert share(correct) == pytest.approx(0.8)
    assert of_batches == pytest.approx(0.5)
    lessons = Lessons(tiny_reader(), PICTURES)
    results = [lessons.correct(batch_size=size) for size in (1, 3, 4)]
    for answers, loss in results[1:]:
        assert answers == results[0][0]
        assert loss == pytest.approx(results[0][1], abs=1e-5)


def test_an_answer_is_right_where_all_of_its_tokens_are():
    vlm = tiny_reader()
    lessons = Lessons(vlm, PICTURES)
    answers, _ = lessons.correct()
    assert [len(picture) for picture in answers] == [2, 3, 1, 2]
    hit = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1]).bool()
    marks = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1]).bool()
    assert by_run(hit, marks) == [True, False, True]


@pytest.mark.parametrize("method", ["lora", "prompt", "full"])
def test_a_tuning_learns_the_answers(method):
    vlm = tiny_reader()
    lessons = Lessons(vlm, PICTURES[:2])
    with tune(vlm, method, rank=2) as tuning:
        before = lessons.correct(tuning.prefix)[1]
        best, losses = fit(tuning, lessons, lessons, 0.05, steps=25, checks=(25,))
        assert lessons.correct(tuning.prefix)[1] < before - 0.05
        assert best.score == share(lessons.correct(tuning.prefix)[0])
    assert losses[-1] < losses[0]


def test_each_class_has_a_label_and_fewer_labels_than_classes_are_refused():
    pictures = [sample(k, "yes", item="key") for k in range(3)] + [sample(3, "no", item="gem")]
    assert [one.truth["item"] for one in labelled(pictures, 2)] == ["key", "gem"]
    with pytest.raises(InputError, match="1 labels for 2 classes of item"):
        labelled(pictures, 1)
    with pytest.raises(InputError, match="5 labels of 4 pictures"):
        labelled(pictures, 5)


def test_domains_differ_in_time_and_place_and_the_few_labels_are_among_the_many():
    home, away = domain("in domain", n=5), domain("out of domain", n=5)
    for one in home:
        assert one.truth["time"] == "day"
        assert one.truth["place"] in ("grass", "sand")
    for one in away:
        assert one.truth["time"] != "day"
        assert one.truth["place"] not in ("grass", "sand")
    with pytest.raises(InputError, match="part"):
        domain("elsewhere")
    few, many = labels(1, 16), labels(1)
    assert (len(few), len(many)) == (16, N_LABELS)
    assert [one.id for one in many[:16]] == [one.id for one in few]


def test_the_most_frequent_answer_of_each_type_needs_no_look():
    seen = [sample(0, "yes", "red"), sample(1, "yes", "blue"), sample(2, "no", "blue")]
    assert blind(seen, PICTURES) == [[True, False], [False, True, False], [True], [False, False]]


def test_digits_are_a_word_a_picture():
    assert digits([[True, False], [True]]) == "10 1"


def test_records_of_other_settings_are_not_continued(monkeypatch, tmp_path):
    from xlvlms_tutorial.training import shift_tuning

    monkeypatch.setattr(shift_tuning, "load", lambda *_, **__: tiny_reader())
    file = tmp_path / "records.json"
    file.write_text('{"settings": {}, "runs": []}', encoding="utf-8")
    with pytest.raises(InputError, match="other settings"):
        run_all(file)


def test_ways_have_names_of_their_own():
    names = [way.name for way in WAYS]
    assert len(set(names)) == len(names)
