"""A report that a script fills in a trial."""

import pytest

from benchmarks.harness import Options, Report


@pytest.fixture
def report():
    return Report("trial", Options(repeats=2, quick=True))
