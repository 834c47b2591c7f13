"""What is no row of real numbers is refused wherever numbers are taken,
and tensors of any kind are read.
"""

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.concepts import PCA, most_activating, top_concepts
from xlvlms_tutorial.metrics.concept_factors import factor_information
from xlvlms_tutorial.metrics.grounding import bert_scores, clip_score, top_scores
from xlvlms_tutorial.metrics.intervals import bootstrap, correlation, difference, proportion
from xlvlms_tutorial.metrics.plain import plain

GOOD = np.random.default_rng(0).random((40, 4))
STRANGE = {
    "complex": GOOD + 1j,
    "complex list": (GOOD + 1j).tolist(),
    "masked": np.ma.masked_less(GOOD, 0.2),
    "dates": np.full(GOOD.shape, np.datetime64("2020-01-01")),
    "text": GOOD.astype(str),
    "structured": np.zeros(GOOD.shape, dtype=[("a", float)]),
    "complex tensor": torch.from_numpy(GOOD + 1j),
}
FACTOR = {"colour": ["red", "blue"] * 20}
USES = {
    "bootstrap": (lambda codes: bootstrap(codes[:, 0]), InputError),
    "difference": (lambda codes: difference(codes[:, 0], GOOD[:, 0]), InputError),
    "correlation": (lambda codes: correlation(GOOD[:, 1], codes[:, 0]), InputError),
    "track": (lambda codes: factor_information(codes, FACTOR, 100), InputError),
    "top_scores": (lambda codes: top_scores(codes, GOOD, 3), InputError),
    "clip_score": (lambda codes: clip_score(codes, GOOD), InputError),
    "bert_scores": (lambda codes: bert_scores([GOOD], [codes]), InputError),
    "most_activating": (most_activating, InputError),
    "top_concepts": (top_concepts, InputError),
    "fit": (lambda codes: PCA(2).fit(codes), InputError),
    "inverse_transform": (
        lambda codes: PCA(4).fit(GOOD).inverse_transform(codes),
        InputError,
    ),
}


@pytest.fixture(autouse=True)
def untyped(monkeypatch):
    # its checks refuse some of these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_real_number_is_refused(kind, use):
    call, error = USES[use]
    values = np.array(STRANGE[kind]) if isinstance(STRANGE[kind], list) else STRANGE[kind]
    with pytest.raises(error):
        call(values)


@pytest.mark.parametrize("use", [name for name in USES if name != "inverse_transform"])
def test_tensors_with_a_gradient_count_as_their_values(use):
    call, _ = USES[use]
    first, second = call(torch.from_numpy(GOOD).requires_grad_()), call(GOOD)
    first, second = (
        value.components_ if isinstance(value, PCA) else value for value in (first, second)
    )
    assert (
        pd.DataFrame(first).equals(pd.DataFrame(second))
        if not hasattr(first, "low")
        else first == second
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_widened(dtype):
    assert plain(torch.tensor([0.5, 2.0], dtype=dtype)).tolist() == [0.5, 2.0]
    assert plain(torch.tensor([0.5, 2.0], dtype=dtype)).dtype == np.float32


def test_a_mask_that_hides_nothing_is_no_harm():
    assert proportion(np.ma.array([True, False], mask=[False, False])) == proportion([True, False])
    with pytest.raises(InputError):
        proportion(np.ma.array([True, False], mask=[False, True]))
