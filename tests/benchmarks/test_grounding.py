"""Today's way names the same words where it names any, and
everything that is promised is measured.
"""

import pytest
import torch
import wordfreq

from benchmarks import grounding
from benchmarks.harness import CPU, Options, Report
from xlvlms_tutorial.methods.concepts.words import as_lists, concept_words


@pytest.fixture(scope="module")
def vlm():
    return grounding.model(600, 32, CPU)


def test_todays_way_finds_the_first_of_our_words(vlm):
    directions = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    common = {
        word
        for word, share in wordfreq.get_frequency_dict("en", "large").items()
        if share >= 10 ** (2.5 - 9) and word.isalpha()
    }
    theirs = grounding.words_listed(vlm, directions, common)
    ours = as_lists(concept_words(vlm, directions, 200, norm=False))
    for k, row_words in enumerate(theirs):
        begins = [word for word in row_words if f"Ġ{word}" in vlm.tokenizer.get_vocab()]
        assert begins
        assert [word for word in ours[k] if word in begins] == list(dict.fromkeys(begins))


def test_the_vocabulary_has_words_and_pieces(vlm):
    tokens = vlm.tokenizer.convert_ids_to_tokens(range(600))
    assert len(set(tokens)) == len(vlm.tokenizer) == vlm.model.lm_head.weight.shape[0] == 600
    assert sum(token.startswith("Ġ") for token in tokens) == 400


def test_a_fresh_filter_passes_the_same_words_and_is_never_known(vlm):
    directions, fresh = torch.randn(3, 32), grounding.fresh_filters()
    first, second = next(fresh), next(fresh)
    assert first != second
    assert concept_words(vlm, directions, words=first).equals(concept_words(vlm, directions))


def test_everything_is_measured():
    report = Report("trial", Options(device="cpu", repeats=2, quick=True))
    grounding.measure(report)
    assert len(report.promises) == 5
    assert sum("seconds" in finding.label for finding in report.promises) == 2
    assert all(
        finding.estimate.value > 0 for finding in report.findings if "fewer" not in finding.label
    )
