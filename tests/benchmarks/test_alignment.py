"""The loop over pairs gives what ours gives, and everything that is promised is measured."""

import numpy as np
import pytest

from benchmarks import alignment
from benchmarks.harness import Options, Report
from xlvlms_tutorial.methods.alignment.similarity import BY_PAIR, POOLED

SIZES = alignment.Sizes(examples=3, perceptual=4, textual=5, width=16, layers=2, pairs=2)


@pytest.mark.parametrize("mode", POOLED + BY_PAIR)
def test_todays_loop_gives_the_same_similarities(mode):
    p, t = SIZES.tokens()
    ours = alignment.ours(p, t, mode)()
    for layer in range(2):
        theirs = [
            [alignment.one_pair(x.numpy(), y.numpy(), mode) for y in t[layer]] for x in p[layer]
        ]
        np.testing.assert_allclose(ours[layer], theirs, atol=1e-6)


def test_every_mode_is_measured_against_the_products_and_the_loop():
    report = Report("trial", Options(repeats=2, quick=True))
    alignment.about(report, SIZES)
    promised = [finding.label for finding in report.promises]
    assert len(promised) == 2 * len(POOLED + BY_PAIR)
    for mode in POOLED + BY_PAIR:
        assert sum(f", {mode}," in label for label in promised) == 2
    assert all(finding.estimate.value > 0 for finding in report.findings)
