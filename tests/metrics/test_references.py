"""CIDEr-D against a slow loop over its definition, BLEU against counts by hand."""

from collections import Counter
from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.errors import EstimateError, LengthError
from xlvlms_tutorial.metrics.references import bleu, cider

TOLD = [
    "A cat sits on the mat.",
    "two dogs run in the snow",
    "a bird",
    "a red key near the red key near a robot",
]
KNOWN = [
    ["A cat sits on the mat", "the cat is on a mat"],
    ["Two dogs, running in snow!"],
    ["a small bird flies", "bird", "a bird"],
    ["a red key near a robot", "a robot by a key"],
]


def grams(text, n):
    told = "".join(letter for letter in text.lower() if letter.isalnum() or letter == " ").split()
    return Counter(tuple(told[k : k + n]) for k in range(len(told) - n + 1))


def slow_cider(candidates, references):
    n_images, scores = len(candidates), []
    for candidate, known in zip(candidates, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            frequency = Counter(
                g for texts in references for g in {g for text in texts for g in grams(text, n)}
            )
            weight = lambda text, n=n, df=frequency: {
                g: c * (log(n_images) - log(max(1, df[g]))) for g, c in grams(text, n).items()
            }
            mine = weight(candidate)
            for reference in known:
                theirs = weight(reference)
                dot = sum(min(mine.get(g, 0.0), w) * w for g, w in theirs.items())
                norm = sqrt(sum(w * w for w in mine.values())) * sqrt(
                    sum(w * w for w in theirs.values())
                )
                apart = sum(grams(candidate, 1).values()) - sum(grams(reference, 1).values())
                total += dot / norm * exp(-(apart**2) / 72) / len(known) if norm else 0.0
        scores.append(10 * total / 4)
    return np.array(scores)


def test_cider_is_its_definition():
    scores, corpus = cider(TOLD, KNOWN)
    assert scores == pytest.approx(slow_cider(TOLD, KNOWN), rel=1e-12)
    assert corpus == pytest.approx(scores.mean())
    assert scores.dtype == np.float64


TEXT = st.lists(
    st.sampled_from(["a", "red", "key", "robot", "snow", "Near"]), min_size=1, max_size=7
).map(" ".join)


@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=2, max_size=5))
@settings(deadline=None, max_examples=60)
def test_cider_is_its_definition_on_random_captions(made):
    told, known = map(list, zip(*made, strict=True))
    scores, _ = cider(told, known)
    assert scores == pytest.approx(slow_cider(told, known), abs=1e-10)
    assert ((scores >= 0) & (scores <= 10 + 1e-9)).all()
    assert 0 <= bleu(told, known) <= 1


def test_the_only_reference_itself_scores_ten_and_other_words_nothing():
    known = [["a cat sits on the mat"], ["two dogs run in snow"]]
    assert cider([texts[0] for texts in known], known)[0] == pytest.approx([10, 10])
    assert cider(["", "birds fly over every hill"], known)[0].tolist() == [0, 0]
    assert bleu([texts[0] for texts in known], known) == 1
    assert bleu(["", "birds fly over every hill"], known) == 0


def test_repeating_words_does_not_raise_cider():
    known = [["a red key by a robot"], ["snow falls on a frog"]]
    plain, repeated = (
        cider([first, "a frog"], known)[0][0]
        for first in ("a red key by a robot", "a red key by a robot red key red key")
    )
    assert repeated < plain


def test_what_all_images_share_has_no_weight_in_cider():
    known = [["a picture of cats"], ["a picture of dogs"]]
    assert cider(["a picture of", "a picture of"], known)[0].tolist() == [0, 0]


def test_the_order_of_captions_and_of_references_does_not_matter():
    turned = [texts[::-1] for texts in KNOWN[::-1]]
    assert cider(TOLD[::-1], turned)[0][::-1] == pytest.approx(cider(TOLD, KNOWN)[0])
    assert bleu(TOLD[::-1], turned) == pytest.approx(bleu(TOLD, KNOWN))


def test_bleu_is_its_definition():
    clipped, possible = np.zeros(4), np.zeros(4)
    for told, known in zip(TOLD, KNOWN, strict=True):
        for n in (1, 2, 3, 4):
            most = Counter()
            for text in known:
                most |= grams(text, n)
            clipped[n - 1] += (grams(told, n) & most).total()
            possible[n - 1] += grams(told, n).total()
    lengths = [[grams(text, 1).total() for text in texts] for texts in KNOWN]
    mine = [grams(text, 1).total() for text in TOLD]
    closest = sum(
        min(ls, key=lambda length, m=m: (abs(length - m), length))
        for m, ls in zip(mine, lengths, strict=True)
    )
    penalty = min(1, exp(1 - closest / sum(mine)))
    assert bleu(TOLD, KNOWN) == pytest.approx(
        penalty * np.exp(np.log(clipped / possible).mean()), rel=1e-9
    )


@pytest.mark.parametrize("score", [cider, bleu])
@pytest.mark.parametrize(
    ("told", "known", "error"),
    [
        ([], [], EstimateError),
        (["a", "b"], [["a"]], LengthError),
        (["a", "b"], [["a"], []], EstimateError),
        (["a", "b"], [["a"], "b"], EstimateError),
        (["a", "b"], [["a"], ["?!"]], EstimateError),
    ],
)
def test_what_cannot_be_scored_is_refused(score, told, known, error):
    with pytest.raises(error):
        score(told, known)


def test_one_image_has_no_cider():
    with pytest.raises(EstimateError, match="2 or more"):
        cider(["a cat"], [["a cat"]])


def test_scripts_without_spaces_are_scored_by_characters():
    told, known = (
        [
            "\u4e00\u53ea\u732b\u5728\u96ea\u5730\u91cc",
            "\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a",
        ],
        [
            ["\u4e00\u53ea\u732b\u5728\u96ea\u5730\u4e0a"],
            ["\u4e00\u53ea\u72d7\u5728\u8349\u5730\u91cc"],
        ],
    )
    apart = " ".join
    assert (
        1
        < cider(told, known)[1]
        == pytest.approx(cider(list(map(apart, told)), [list(map(apart, one)) for one in known])[1])
    )
    assert 0.5 < bleu(told, known) < 1


def test_accents_are_the_same_however_they_were_typed():
    composed = (
        ["une fille au caf\u00e9 l\u00e0", "un chien dort"],
        [["une fille au caf\u00e9"], ["un chien noir"]],
    )
    apart = (
        ["une fille au cafe\u0301 la\u0300", "un chien dort"],
        [["une fille au caf\u00e9"], ["un chien noir"]],
    )
    assert cider(*apart)[1] == pytest.approx(cider(*composed)[1])
    assert bleu(*apart) == pytest.approx(bleu(*composed))
