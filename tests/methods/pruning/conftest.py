"""A tiny model, and the inputs of its linear layers for two questions."""

import pytest

from tests.support.tiny import PICTURE, tiny_llava
from xlvlms_tutorial.methods.pruning.calibration import calibrate_on


@pytest.fixture(scope="module")
def vlm():
    return tiny_llava()


@pytest.fixture(scope="module")
def calibration(vlm):
    return calibrate_on(
        vlm, [vlm.batch([PICTURE] * 2, ["What colour ?", "Is there a red key in the picture ?"])]
    )
