"""Episodes with made-up names, their conditions, scores and claims."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.support.tiny import lively, tiny_llava
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.in_context import Episode, Example, as_prompts, episodes
from xlvlms_tutorial.samples import Question, Sample
from xlvlms_tutorial.tutorials import in_context
from xlvlms_tutorial.tutorials.experiments import Experiment

GREY = Image.new("RGB", (32, 32), (90, 90, 90))


def made(values, start=0):
    samples = []
    for k, value in enumerate(values, start):
        question = Question("place", f"Where {k % 2}?", value)
        samples.append(Sample(f"s{k}", GREY, (f"a {value}",), (question,), {"subject": value}))
    return samples


def example(name, answer, image=GREY, question="Which?"):
    return Example(name, image, question, answer)


def test_values_are_the_most_frequent_that_both_worlds_have():
    samples = made("aaabbcdde")
    assert in_context.values_to_name(samples) == ["a", "b", "d", "c"]
    assert in_context.values_to_name(samples, made("dcz")) == ["d", "c"]
    photograph = Sample("p", GREY, (), (Question("place", "Where?", "sea"),))
    assert in_context.value_of(photograph) == "sea"
    assert in_context.value_of(Sample("p", GREY)) is None


def test_names_take_turns_and_follow_the_values():
    samples = made("aaabbc")
    items = in_context.named(samples, ["a", "b"], 4)
    assert [item.answer for item in items] == ["dax", "wug", "dax", "wug"]
    assert [item.id for item in items] == ["s0", "s3", "s1", "s4"]
    assert {item.question for item in items} == {in_context.NAMING}


def test_revealing_demonstrations_differ_and_show_the_answer_anywhere():
    support = [example(f"s{k}", answer) for k, answer in enumerate("aabbccdd")]
    queries = [example(f"q{k}", "abcdz"[k % 5]) for k in range(200)]
    made = in_context.revealing(support, queries, 3)
    assert [e.query for e in made] == [q for q in queries if q.answer != "z"]
    positions = []
    for episode in made:
        answers = [d.answer for d in episode.demonstrations]
        assert len(set(answers)) == 3
        positions.append(answers.index(episode.query.answer))
    assert min(positions.count(k) for k in range(3)) > 30


def test_conditions_change_one_thing_each():
    support = [example(f"s{k}", a, question=f"q{k}?") for k, a in enumerate("abcdef")]
    queries = [example(name, "a") for name in "uvwxyz"]
    intact = episodes(support, queries, 2)
    conditions = in_context.conditions(intact)
    assert list(conditions) == [
        "intact",
        "reversed",
        "query blind",
        "images remove",
        "images swap",
        "questions remove",
        "answers swap",
    ]
    for row, episode in enumerate(intact):
        assert conditions["reversed"][row].demonstrations == episode.demonstrations[::-1]
        dark = conditions["query blind"][row]
        assert dark.query.image is None and dark.demonstrations == episode.demonstrations
        for name, others in conditions.items():
            assert others[row].query.answer == episode.query.answer, name
    alike = episodes([replace(e, question="q?", answer="a") for e in support], queries, 2)
    assert not {"questions remove", "answers swap"} & set(in_context.conditions(alike))


def test_captions_take_the_place_of_all_pictures():
    samples = made("ab")
    demonstration = example("s0", "dax")
    (changed,) = in_context.captioned([Episode(example("s1", "wug"), (demonstration,))], samples)
    assert changed.query.image is None and changed.query.question == "a b Which?"
    assert changed.demonstrations[0].question == "a a Which?"
    assert as_prompts([changed])["images"] == [[]]


def test_answers_are_those_of_a_loop():
    vlm = lively(tiny_llava())
    support = [example(f"s{k}", a, question="red ?") for k, a in enumerate(["red", "blue"])]
    asked = episodes(support, [example("x", "red", question="blue ?")] * 3, 2)
    words = ["red", "blue", "yes", "no"]
    answers = in_context.answer(vlm, asked, words, batch_size=2)
    pieces = [vlm.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
    for row, episode in enumerate(asked):
        logits = vlm.forward(vlm.batch(**as_prompts([episode]))).logits[0, -1]
        best = max(range(4), key=lambda k: logits[pieces[k]].item())
        assert answers["constrained"][row] == words[best]
        first = int(logits.argmax())
        expected = words[pieces.index(first)] if first in pieces else ""
        assert answers["open"][row] == expected
    with pytest.raises(InputError, match="no words"):
        in_context.answer(vlm, asked, [])


def result(answers, truths, shown, shots):
    demonstrations = tuple(example(f"d{k}", a) for k, a in enumerate(shown))
    asked = [Episode(example(f"q{k}", t), demonstrations) for k, t in enumerate(truths)]
    return asked, pd.DataFrame({"constrained": list(answers), "open": [""] * len(truths)})


def test_scores_and_copies_by_hand():
    key = ("naming", "intact", 2)
    results = {key: result("cbbb", "ccbb", "cb", 2)}
    row = in_context.score(results).loc[key]
    assert (row["constrained"], row["open"], row["vote"]) == (0.75, 0.0, 0.5)
    rates = in_context.copies(results, [key])
    # b is wrong and last for the first two queries, and said once; c is never said wrongly
    assert rates["rate"].tolist() == [0.0, 0.5] and rates["n"].tolist() == [2, 2]


def test_claims_come_from_what_was_measured():
    experiment = Experiment("in-context", "pocket-llava", "scenes")
    truths = "ab" * 20
    good, bad = result(truths, truths, "ab", 2), result("c" * 40, truths, "ab", 2)
    results = {
        ("naming", "intact", 2): good,
        ("naming", "images swap", 2): bad,
        ("questions", "intact", 2): good,
        ("questions", "images swap", 2): bad,
        ("naming", "RICES", 2): good,
        ("naming", "random", 1): good,
        ("naming", "random", 2): good,
        ("naming, shifted", "random", 1): good,
        ("naming, shifted", "random", 2): bad,
    }
    rates = in_context.copies(results, [("naming", "intact", 2)])
    in_context.record(experiment, results, 2, rates)
    verdicts = {(r["id"], r["variant"]): r["verdict"] for r in experiment.records}
    assert verdicts == {
        ("ICL-1", "naming, images swap"): "confirmed",
        ("ICL-2", "questions, images swap"): "refuted",
        ("ICL-3", "naming"): "refuted",
        ("ICL-4", "naming, intact"): "refuted",
        ("ICL-5", "shifted demonstrations"): "confirmed",
        ("ICL-5", "minus no shift"): "confirmed",
    }
    gain = in_context.drop(results, ("naming", "intact", 2), ("naming", "images swap", 2))
    assert gain.value == 1.0 and gain.n == 40


def test_a_strip_has_a_gap_before_the_query():
    episode = Episode(example("q", "a"), (example("s", "b"),))
    picture = np.asarray(in_context.strip(episode, height=20))
    assert picture.shape == (20, 56, 3)
    assert (picture[:, 20:36] == 255).all() and (picture[:, :20] == 90).all()


def test_checks_compare_with_chance_the_vote_and_the_adapter():
    right, wrong = (pd.DataFrame({"constrained": [word] * 8}) for word in "ab")
    made = [Episode(example(f"q{k}", "a"), ()) for k in range(8)]
    rows = {
        ("naming", "intact", 2): (0.9, 0.6, 1.0, 0.5),
        ("naming", "caption as image", 2): (0.5, 0.4, 0.6, 0.5),
        ("naming", "RICES", 2): (0.9, 0.8, 1.0, 0.7),
        ("questions", "intact", 2): (0.9, 0.85, 1.0, 0.5),
        ("questions", "intact", 0): (0.8, 0.7, 0.9, float("nan")),
        ("questions", "query blind", 2): (0.3, 0.2, 0.4, 0.5),
    }
    columns = ["constrained", "low", "high", "vote"]
    scores = pd.DataFrame(rows.values(), pd.MultiIndex.from_tuples(rows), columns)
    results = {
        ("naming", "intact", 2): (made, right),
        ("naming", "no adapter", 2): (made, wrong),
    }
    experiment = Experiment("in-context", "pocket-llava", "scenes")
    sentences = {}
    experiment.check = lambda statement, holds: sentences.update({statement: bool(holds)})
    in_context.check_scores(experiment, results, scores, 2)
    assert sentences == {
        "naming is not surely better than copying one at random": False,
        "true captions do not surely help naming": True,
        "retrieved demonstrations help naming, and the vote names at least as well": False,
        "without any demonstration most questions are answered": True,
        "questions need the picture of the query": True,
        "demonstrations do not surely help questions": False,
        "the adapter is not surely better than none": False,
    }
