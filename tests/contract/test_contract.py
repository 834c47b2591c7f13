"""Every architecture keeps every point of the contract, and every check
leaves the model as it found it.
"""

from functools import cache

import pytest
import torch

from tests.contract.checks import CHECKS
from tests.contract.reference import Case, case, generated, traces
from tests.zoo import MODELS
from xlvlms_tutorial.models.architectures import ARCHITECTURES

case_of = cache(case)


@cache
def clean(name: str) -> torch.Tensor:
    return generated(case(name))[1]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", MODELS)
def test_contract(name, check):
    checked_case: Case = case_of(name)
    before = clean(name)
    CHECKS[check](checked_case)
    assert traces(checked_case.vlm) == []
    assert torch.equal(generated(checked_case)[1], before)


def test_the_architectures_that_we_name_are_those_under_contract():
    assert {case_of(name).vlm.model.config.model_type for name in MODELS} == set(ARCHITECTURES)
