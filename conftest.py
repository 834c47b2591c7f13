"""What holds for every test run, the notebooks in book/ included."""


def pytest_collectstart(collector):
    # Text alone is compared. A table's HTML says the same as its text in a form that changes with
    # the version of pandas; what libraries complain about on stderr is theirs. nbval itself leaves
    # out pictures and the ids of widgets.
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html", "stderr")
