"""CIDEr-D against a slow loop over its definition, BLEU against counts by hand."""

from collections import Counter
from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.references import bleu, cider

CANDIDATES = [
    "A cat sits on the mat.",
    "two dogs run in the snow",
    "a bird",
    "a red key near the red key near a robot",
]
REFERENCES = [
    ["A cat sits on the mat", "the cat is on a mat"],
    ["Two dogs, running in snow!"],
    ["a small bird flies", "bird", "a bird"],
    ["a red key near a robot", "a robot by a key"],
]


def grams(text, n):
    words = "".join(letter for letter in text.lower() if letter.isalnum() or letter == " ").split()
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def slow_cider(candidates, references):
    """CIDEr-D as its paper has it: cosines of clipped tf-idf, times a penalty on the length."""
    n_images, scores = len(candidates), []
    for candidate, captions_of_image in zip(candidates, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            # in the references of how many images each n-gram occurs
            frequency = Counter()
            for texts in references:
                frequency.update(set().union(*(grams(text, n) for text in texts)))
            weight = lambda text, n=n, df=frequency: {
                g: c * (log(n_images) - log(max(1, df[g]))) for g, c in grams(text, n).items()
            }
            mine = weight(candidate)
            for reference in captions_of_image:
                theirs = weight(reference)
                dot = sum(min(mine.get(g, 0.0), w) * w for g, w in theirs.items())
                norm = sqrt(sum(w * w for w in mine.values())) * sqrt(
                    sum(w * w for w in theirs.values())
                )
                apart = sum(grams(candidate, 1).values()) - sum(grams(reference, 1).values())
                total += (
                    dot / norm * exp(-(apart**2) / 72) / len(captions_of_image) if norm else 0.0
                )
        scores.append(10 * total / 4)
    return np.array(scores)


def test_cider_is_its_definition():
    scores, corpus = cider(CANDIDATES, REFERENCES)
    assert scores == pytest.approx(slow_cider(CANDIDATES, REFERENCES), rel=1e-12)
    assert corpus == pytest.approx(scores.mean())
    assert scores.dtype == np.float64


TEXT = st.lists(
    st.sampled_from(["a", "red", "key", "robot", "snow", "Near"]), min_size=1, max_size=7
).map(" ".join)


@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=2, max_size=5))
@settings(deadline=None, max_examples=60)
def test_cider_is_its_definition_on_random_captions(corpus):
    candidates, references = map(list, zip(*corpus, strict=True))
    scores, _ = cider(candidates, references)
    assert scores == pytest.approx(slow_cider(candidates, references), abs=1e-10)
    assert ((scores >= 0) & (scores <= 10 + 1e-9)).all()
    assert 0 <= bleu(candidates, references) <= 1


def test_the_only_reference_itself_scores_ten_and_other_words_nothing():
    references = [["a cat sits on the mat"], ["two dogs run in snow"]]
    assert cider([texts[0] for texts in references], references)[0] == pytest.approx([10, 10])
    assert cider(["", "birds fly over every hill"], references)[0].tolist() == [0, 0]
    assert bleu([texts[0] for texts in references], references) == 1
    assert bleu(["", "birds fly over every hill"], references) == 0


def test_repeating_words_does_not_raise_cider():
    references = [["a red key by a robot"], ["snow falls on a frog"]]
    plain, repeated = (
        cider([first, "a frog"], references)[0][0]
        for first in ("a red key by a robot", "a red key by a robot red key red key")
    )
    assert repeated < plain


def test_what_all_images_share_has_no_weight_in_cider():
    references = [["a picture of cats"], ["a picture of dogs"]]
    assert cider(["a picture of", "a picture of"], references)[0].tolist() == [0, 0]


def test_the_order_of_captions_and_of_references_does_not_matter():
    turned = [texts[::-1] for texts in REFERENCES[::-1]]
    assert cider(CANDIDATES[::-1], turned)[0][::-1] == pytest.approx(
        cider(CANDIDATES, REFERENCES)[0]
    )
    assert bleu(CANDIDATES[::-1], turned) == pytest.approx(bleu(CANDIDATES, REFERENCES))


def test_bleu_is_its_definition():
    clipped, possible = np.zeros(4), np.zeros(4)
    for candidate, references in zip(CANDIDATES, REFERENCES, strict=True):
        for n in (1, 2, 3, 4):
            maximum = Counter()
            for text in references:
                maximum |= grams(text, n)
            clipped[n - 1] += (grams(candidate, n) & maximum).total()
            possible[n - 1] += grams(candidate, n).total()
    lengths = [[grams(text, 1).total() for text in texts] for texts in REFERENCES]
    mine = [grams(text, 1).total() for text in CANDIDATES]
    closest = sum(
        min(ls, key=lambda length, m=m: (abs(length - m), length))
        for m, ls in zip(mine, lengths, strict=True)
    )
    penalty = min(1, exp(1 - closest / sum(mine)))
    assert bleu(CANDIDATES, REFERENCES) == pytest.approx(
        penalty * np.exp(np.log(clipped / possible).mean()), rel=1e-9
    )


@pytest.mark.parametrize("score", [cider, bleu])
@pytest.mark.parametrize(
    ("candidates", "references", "error"),
    [
        ([], [], InputError),
        (["a", "b"], [["a"]], InputError),
        (["a", "b"], [["a"], []], InputError),
        (["a", "b"], [["a"], "b"], InputError),
        (["a", "b"], [["a"], ["?!"]], InputError),
    ],
)
def test_what_cannot_be_scored_is_refused(score, candidates, references, error):
    with pytest.raises(error):
        score(candidates, references)


def test_one_image_has_no_cider():
    with pytest.raises(InputError, match="2 or more"):
        cider(["a cat"], [["a cat"]])


def test_scripts_without_spaces_are_scored_by_characters():
    candidates, references = (
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
        < cider(candidates, references)[1]
        == pytest.approx(
            cider(list(map(apart, candidates)), [list(map(apart, texts)) for texts in references])[
                1
            ]
        )
    )
    assert 0.5 < bleu(candidates, references) < 1


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
