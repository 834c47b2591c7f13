"""What holds for every test run, the notebooks in book/ included."""


def pytest_collectstart(collector):
    # A table is compared by its plain text: its HTML says the same in a form that changes with the version of pandas.
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html",)
