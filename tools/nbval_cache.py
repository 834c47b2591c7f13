"""Keep for the book what nbval executed.

``python -m pytest -p tools.nbval_cache --nbval-lax book``. nbval executes each paired notebook and
compares the text of its checked cells. This plugin listens to the same messages of the same kernel.
It puts what all cells show, with the state of the widgets, into the cache that the book is built
from; so a page is executed once for its test and for the book. A page whose checked cells differ is
kept too: these are its outputs, the test fails all the same, and ``make pairs`` takes them from
there. A page that raised, or of which some cells were left out, is not kept.
"""

import os
from collections.abc import Iterator
from difflib import ndiff
from pathlib import Path
from time import perf_counter

import pytest
from jupyter_client import KernelClient
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionComplete
from nbval.plugin import IPyNbFile

from tools import chapters, execute

# The pages that take longest, in this order: two workers end at about the same time when these
# come first. The findings and the ledger come last.
LONG = (
    "skipping",
    "steering-answers",
    "steering-limits",
    "steering-style",
    "learned-steering",
    "hallucination",
    "in-context",
    "tracing",
    "merging",
    "peft",
    "pruning",
    "shift",
    "skip-training",
    "dropping",
    "alignment-score",
    "grounding",
    "grounding-depth",
    "explain",
    "cam",
    "subnetworks",
    "concept-dictionaries",
    "concepts",
    "outside",
    "vocabulary",
    "reading",
    "inside",
    "alignment",
)
# seconds between two messages of a cell that has ended: pictures come late from a busy machine
PATIENCE = 60


class Recorder:
    """What a page shows while nbval runs it, gathered as nbclient gathers it."""

    def __init__(self, page: Path, kernel: KernelClient) -> None:
        self.page, self.start = page, perf_counter()
        self.notebook = execute.read(page)
        info = kernel.kernel_info(reply=True, timeout=PATIENCE)["content"]
        self.notebook.metadata["language_info"] = info["language_info"]
        self.client = NotebookClient(self.notebook, record_timing=False)
        self.client.kc, run = kernel, kernel.execute
        # nbval leaves cells out of the kernel's history, and IPython looks there for the semicolon
        # that silences a cell's last value
        kernel.execute = lambda code, **how: run(code, **how | {"store_history": True})
        self.client.clear_before_next_output = False
        self.places = [
            place for place, cell in enumerate(self.notebook.cells) if cell.cell_type == "code"
        ]
        self.begun: set[int] = set()
        # cells that ran to their end; nbval stops listening to one that raises
        self.ended: set[int] = set()

    def begin(self, number: int) -> None:
        """A code cell is about to run."""
        self.number, self.request = number, None
        self.begun.add(number)

    def take(self, message: dict) -> None:
        """Put what the kernel sent into the cell that runs."""
        request = message["parent_header"].get("msg_id")
        if message["msg_type"] == "execute_input":
            self.request = request
        if self.request is None or request != self.request:  # late news of an earlier cell
            return
        place = self.places[self.number]
        try:
            self.client.process_message(message, self.notebook.cells[place], place)
        except CellExecutionComplete:
            self.ended.add(self.number)

    def keep(self) -> None:
        """Put the page into the cache of the book, if all of its cells ran."""
        if len(self.ended) < len(self.places):
            return
        self.client.set_widgets_metadata()
        execute.keep(self.page, self.notebook, perf_counter() - self.start)


class Page(IPyNbFile):
    """A notebook as nbval runs it.

    If it is paired with a page, what it shows is kept for the book.
    """

    recorder: Recorder | None = None

    def setup(self) -> None:
        """Start the kernel, with what belongs to an earlier run of the page forgotten."""
        page = self.path.with_suffix(".md")
        paired = page.exists() and sources(self.nb) == sources(chapters.read(page))
        if paired:
            # only now: it imports the package, whose types are checked if pytest has started before
            from tools.build import refresh_cache

            refresh_cache()
            execute.forget(page)
        os.environ.update(execute.QUIET)  # kernels take the environment of their parent
        super().setup()
        if paired:
            self.recorder = Recorder(page, self.kernel.kc)

    def get_kernel_message(self, timeout: float | None = None, stream: str = "iopub") -> dict:
        """The kernel's next message, of which the recorder takes note."""
        message = super().get_kernel_message(timeout, stream)
        if self.recorder is not None:
            self.recorder.take(message)
        return message

    def teardown(self) -> None:
        """Stop the kernel and keep what the page showed."""
        super().teardown()
        if self.recorder is not None:
            self.recorder.keep()


def sources(notebook: object) -> list[str]:
    """The code of a notebook's cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Iterator:
    """Collect as pages the notebooks that nbval collects."""
    found = yield
    return [
        Page.from_parent(parent, path=file_path) if isinstance(one, IPyNbFile) else one
        for one in found
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long pages first, those that show all others last, the rest by name, in every process."""
    order = {name: place for place, name in enumerate(LONG)}
    order |= {name: len(LONG) + 1 + place for place, name in enumerate(execute.LAST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
    for item in items:
        item.output_timeout = PATIENCE


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Tell the recorder which cell runs; behind a cell that raised there is nothing to see."""
    if isinstance(item.parent, Page) and (recorder := item.parent.recorder) is not None:
        if recorder.begun > recorder.ended:
            pytest.skip("an earlier cell of this page raised")
        recorder.begin(item.cell_num)


@pytest.hookimpl(tryfirst=True)
def pytest_assertrepr_compare(left: object, right: object) -> list[str] | None:
    """Both texts, line by line.

    pytest's own account marks what is new as missing here, since nbval asks in the other order.
    """
    if not (isinstance(left, str) and isinstance(right, str)):
        return None
    lines = ndiff(left.splitlines(), right.splitlines())
    return ["- in the paired notebook, + shown now:", *(line.rstrip("\n") for line in lines)]
