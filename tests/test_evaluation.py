import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from xlvlms_tutorial.data import PROMPTS, load_samples
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.evaluation import evaluate
from xlvlms_tutorial.metrics.hallucination import pope
from xlvlms_tutorial.metrics.intervals import bootstrap, proportion
from xlvlms_tutorial.samples import Sample


def truthful(image, text):
    """Right about everything but the place of every third picture and the bush."""
    number = image.getpixel((0, 0))[0]
    place = "sand" if number % 3 == 0 else "snow"
    if text == PROMPTS["image"]:
        return (
            f"A robot walks in the {place} near a red key."
            if number % 2
            else f"A frog in the {place} near a rock."
        )
    return {"What colour is the key?": "Red."}.get(text, "yes")


def test_every_metric_has_its_value_and_interval(fake_vlm, samples):
    report = evaluate(fake_vlm(truthful), samples(40), progress=False, dataset="scenes")
    table = report.summary().set_index("metric")
    correct = [i % 3 != 0 for i in range(40)]
    assert (
        table.loc["caption/place", ["value", "low", "high"]].tolist()
        == list(proportion(correct).asdict().values())[:3]
    )
    assert table.loc["caption/all", "value"] == np.mean(correct)
    assert table.loc["caption/subject", "value"] == 1
    assert table.loc[["caption/subject", "caption/colour", "caption/action"], "n"].tolist() == [
        40,
        20,
        20,
    ]
    assert table.loc[["qa/overall", "qa/colour", "qa/presence"], "value"].tolist() == [
        60 / 100,
        1,
        0.5,
    ]
    assert table.loc["presence/popular/yes_ratio", "value"] == 1
    assert table.loc["presence/random/accuracy", "value"] == 1
    assert table.loc["presence/overall/precision", "value"] == 0.5


def test_the_scores_of_each_sample_average_to_what_it_named_and_answered(fake_vlm, samples):
    report = evaluate(fake_vlm(truthful), samples(40), progress=False)
    scores = report.scores()
    assert scores.index.tolist() == report.captions["sample"].tolist()
    named = report.captions.set_index("sample").drop(columns="caption")
    for sample, row in named.iterrows():
        values = [bool(value) for value in row if not pd.isna(value)]
        assert scores.loc[sample, "caption"] == pytest.approx(np.mean(values))
        answers = report.answers[report.answers["sample"] == sample]
        assert scores.loc[sample, "answer"] == pytest.approx(answers["correct"].mean())


def test_questions_are_resampled_by_scene(fake_vlm, samples):
    report = evaluate(fake_vlm(truthful), samples(40), seed=5, progress=False)
    expected = bootstrap(report.answers["correct"], report.answers["sample"], seed=5)
    row = report.summary().set_index("metric").loc["qa/overall"]
    assert (row["low"], row["high"], row["n"]) == (expected.low, expected.high, 100)


def test_answers_and_captions_stay_with_their_samples(fake_vlm, samples):
    vlm = fake_vlm(lambda image, text: f"{image.getpixel((0, 0))[0]} {text}")
    report = evaluate(vlm, samples(70), progress=False)
    assert report.captions["caption"].tolist() == [f"{i} {PROMPTS['image']}" for i in range(70)]
    for row in report.answers.itertuples():
        assert row.prediction == f"{row.sample[1:]} {row.question}"
    assert len(vlm.calls) == 6  # three parts of at most 32 scenes, captions and answers


def test_a_report_is_written_whole_and_says_what_made_it(fake_vlm, samples, tmp_path):
    report = evaluate(fake_vlm(truthful), samples(4), seed=3, progress=False, dataset="scenes")
    content = json.loads(report.save(tmp_path / "report.json").read_text())
    assert content == json.loads(report.to_json())
    assert (content["model"], content["dataset"], content["seed"], content["n"]) == (
        "fake",
        "scenes",
        3,
        4,
    )
    assert content["versions"]["torch"]
    assert content["captions"][0]["colour"] is None
    assert content["captions"][1]["colour"] is True
    assert len(content["answers"]) == 10
    assert {"metric", "value", "low", "high", "n"} == set(content["summary"][0])


def test_pictures_without_questions_or_truth_are_only_captioned(fake_vlm, samples):
    bare = [Sample(s.id, s.source) for s in samples(3)]
    report = evaluate(fake_vlm(truthful), bare, progress=False)
    assert len(report.captions) == 3
    assert report.answers.empty
    assert report.summary().empty
    result = evaluate(
        fake_vlm(truthful),
        [Sample(s.id, s.source, (), s.questions) for s in samples(3)],
        progress=False,
    )
    assert result.summary()["metric"].str.startswith("caption").sum() == 0


def test_presence_is_scored_by_stratum_and_has_no_row_where_nobody_asked(fake_vlm, samples):
    report = evaluate(fake_vlm(truthful), samples(12), progress=False)
    assert report.presence().equals(
        pope(report.answers, report.answers["sample"], seed=report.seed)
    )
    mute = evaluate(
        fake_vlm(truthful), [Sample(s.id, s.source) for s in samples(3)], progress=False
    ).presence()
    assert mute.empty
    assert set(mute.columns) <= set(report.presence().columns)


def content_of(sample):
    """The bytes of what a sample shows, by which a fake model can tell it."""
    content = sample.content
    return (
        content.tobytes()
        if isinstance(content, np.ndarray)
        else b"".join(frame.tobytes() for frame in content)
    )


@pytest.mark.parametrize(
    ("dataset", "kind", "factors"),
    [
        ("clips", "video", ["subject", "action", "item", "colour", "place"]),
        ("sounds", "audio", ["sound", "loudness", "background"]),
    ],
)
def test_clips_and_sounds_are_captioned_and_asked_like_scenes(fake_vlm, dataset, kind, factors):
    """A model that knows every other sample and says nothing about the rest."""
    samples = load_samples(dataset, n=4)
    by_content = {content_of(sample): (k, sample) for k, sample in enumerate(samples)}

    def say(content, text):
        k, sample = by_content[content_of(Sample("x", lambda: content, modality=kind))]
        if k % 2:
            return "nothing"
        return (
            sample.captions[0]
            if text == PROMPTS[kind]
            else next(q.answer for q in sample.questions if q.text == text)
        )

    report = evaluate(fake_vlm(say), samples, progress=False, dataset=dataset)
    assert report.captions.columns.tolist() == ["sample", "caption", *factors]
    assert report.captions["sample"].tolist() == [sample.id for sample in samples]
    for factor in factors:
        has = [sample.truth[factor] is not None for sample in samples]
        named = [bool(k % 2 == 0) if mentioned else None for k, mentioned in enumerate(has)]
        assert [
            None if pd.isna(value) else bool(value) for value in report.captions[factor]
        ] == named
    assert len(report.answers) == sum(len(sample.questions) for sample in samples)
    even = report.answers["sample"].isin([sample.id for sample in samples[::2]])
    assert (report.answers["correct"].astype(bool) == even).all()
    metrics = report.summary().set_index("metric")["value"]
    pairs = {"clips": ("caption/action", "qa/action"), "sounds": ("caption/sound", "qa/sound")}
    expected = pairs[dataset]
    assert metrics[list(expected)].tolist() == [0.5, 0.5] and metrics["caption/all"] == 0.5


def test_samples_of_several_modalities_are_refused(fake_vlm):
    mixed = [load_samples(dataset, n=1)[0] for dataset in ("scenes", "sounds")]
    with pytest.raises(InputError, match="samples of modality image, audio"):
        evaluate(fake_vlm(lambda content, text: "yes"), mixed, progress=False)


def test_one_scene_is_enough(fake_vlm, samples):
    table = evaluate(fake_vlm(truthful), samples(1), progress=False).summary()
    intervals = table.dropna(subset=["low"])
    assert (intervals["high"] > intervals["low"]).all()


def test_bad_samples_and_a_model_that_loses_answers_raise(fake_vlm, samples):
    with pytest.raises(InputError, match="0 samples"):
        evaluate(fake_vlm(truthful), [], progress=False)
    with pytest.raises(InputError, match="2 samples with 1 ids"):
        evaluate(fake_vlm(truthful), samples(1) * 2, progress=False)
    with pytest.raises(InputError):
        evaluate(fake_vlm(truthful), [Sample("x", Path("absent.png"))], progress=False)
    deaf = fake_vlm(truthful)
    deaf.generate = lambda *_, **__: ["one"]
    with pytest.raises(InputError, match="asked: 2, generated: 1"):
        evaluate(deaf, samples(2), progress=False)
