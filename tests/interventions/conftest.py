"""The tiny LLaVA with a batch for it."""

import pytest

from tests.contract.reference import case


@pytest.fixture(scope="module")
def example():
    return case("llava")
