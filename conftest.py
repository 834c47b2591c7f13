"""What holds for every test run, the notebooks in book/ and the examples of docstrings included."""

import re

import pytest
from _pytest.doctest import DoctestItem


def pytest_collectstart(collector):
    # Text alone is compared. A table's HTML says the same as its text in a form that changes with
    # the version of pandas; what libraries complain about on stderr is theirs. nbval itself leaves
    # out pictures and the ids of widgets.
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html", "stderr")


@pytest.fixture(scope="session")
def example_objects():
    """What the examples of docstrings may use without making it.

    A model with its processor, four samples, and a batch of them with a question each.
    """
    from xlvlms_tutorial import load, load_samples

    vlm, samples = load("pocket-llava"), load_samples("scenes", n=4)
    images = [sample.image for sample in samples]
    batch = vlm.batch(images, ["What colour is the sky?"] * len(images))
    return {"vlm": vlm, "samples": samples, "batch": batch}


@pytest.fixture(scope="session")
def records_of_tests(tmp_path_factory):
    """A folder for what examples and tests record, away from the records of the book."""
    return tmp_path_factory.mktemp("records")


@pytest.fixture(autouse=True)
def recorded_elsewhere(request, monkeypatch):
    """Keep the records of the book as its pages made them."""
    # the plugin that executes pages says itself where their records go
    if isinstance(request.node, (DoctestItem, pytest.Function)):
        monkeypatch.setenv("XLVLMS_CLAIMS", str(request.getfixturevalue("records_of_tests")))
        # tests of that plugin leave its settings behind in their process
        monkeypatch.delenv("XLVLMS_ONE_RECORD", raising=False)


@pytest.fixture(autouse=True)
def examples(request):
    """Give an example what it uses, and load a model only for one that uses it."""
    if not isinstance(request.node, DoctestItem):
        return
    source = "".join(example.source for example in request.node.dtest.examples)
    if re.search(r"\b(vlm|samples|batch)\b", source):
        request.node.dtest.globs.update(request.getfixturevalue("example_objects"))
