"""Execute pages into the cache that the book is built from.

``python -m tools.execute [--again] [NAME ...]``. The tests execute every page once and compare what
it shows (``tools.nbval_cache``); the book takes the outputs of that same run, as long as neither
page nor package nor pins have changed since. Pages that are not in the cache are executed here, two
at a time, before the book is built.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

from filelock import FileLock
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import NotebookNode

from tools import ROOT
from tools.chapters import notebooks

BUILD = ROOT / "_build"
CACHE = BUILD / ".jupyter_cache"
CLAIMS = BUILD / "claims"
LIMIT = 900  # seconds a cell
# The pages that show what all others recorded come last, in this order.
LAST = ("claims", "findings", "welcome")
# No progress bars on pages; and numba, behind UMAP, would give torch as many threads as there are
# processors for the rest of a page.
QUIET = {
    "TQDM_DISABLE": "1",
    "XLVLMS_CLAIMS": str(CLAIMS),
    "XLVLMS_ONE_RECORD": "1",  # a name is recorded once
    "NUMBA_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}


class PageError(RuntimeError):
    """A page raised; the message is its traceback."""


def read(page: Path) -> NotebookNode:
    """A page as the book reads it."""
    return read_myst_markdown_notebook(page.read_text(encoding="utf-8"))


def cached(page: Path) -> bool:
    """Whether the outputs of this page's code are in the cache."""
    with locked():
        try:
            get_cache(CACHE).match_cache_notebook(read(page))
        except KeyError:
            return False
    return True


def shown(page: Path) -> NotebookNode:
    """A page with its outputs from the cache.

    Raises
    ------
    KeyError
        If they are not there.
    """
    with locked():
        return get_cache(CACHE).merge_match_into_notebook(read(page))[1]


def keep(page: Path, notebook: NotebookNode, seconds: float) -> None:
    """Put an executed page into the cache, in place of an earlier run of the same code."""
    with locked():
        bundle = CacheBundleIn(notebook, str(page), data={"execution_seconds": seconds})
        get_cache(CACHE).cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def forget(page: Path) -> None:
    """Delete what an earlier run of the page left.

    Its outputs in the cache and its records of claims, which belong together.
    """
    with locked(), suppress(KeyError):
        get_cache(CACHE).remove_cache(get_cache(CACHE).match_cache_notebook(read(page)).pk)
    for file in CLAIMS.rglob("*.json"):  # those of its checks lie in a folder inside
        with suppress(FileNotFoundError):  # of another page, which forgets its own at this moment
            if json.loads(file.read_text(encoding="utf-8")).get("chapter") == page.stem:
                file.unlink(missing_ok=True)


def execute(page: Path) -> NotebookNode:
    """Execute a page where it lies, and keep its outputs for the book.

    Raises
    ------
    PageError
        If a cell raises or takes longer than the limit.
    """
    os.environ.update(QUIET)  # kernels take the environment of their parent
    notebook = read(page)
    forget(page)
    result = single_nb_execution(notebook, cwd=str(page.parent), timeout=LIMIT, allow_errors=False)
    if result.err is not None:
        raise PageError(f"{page.name} failed:\n{result.err}")
    keep(page, notebook, result.time)
    return notebook


def fill(pages: list[Path], again: bool = False) -> list[str]:
    """Execute the pages that are not in the cache, or all.

    Gives the pages that failed, with their tracebacks printed. The ledger and the findings are
    executed whenever they are asked for, after all others: their code does not say what they show.
    """
    first = [page for page in pages if page.stem not in LAST and (again or not cached(page))]
    last = [page for page in pages if page.stem in LAST]
    last.sort(key=lambda page: LAST.index(page.stem))
    workers = min(2, os.cpu_count() or 1)
    failed = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for group in (first, *([page] for page in last)):
            for page, job in [(page, pool.submit(execute, page)) for page in group]:
                if error := job.exception():
                    failed.append(page.stem)
                    print(error, file=sys.stderr, flush=True)
                else:
                    print(f"executed {page.stem}", flush=True)
    for page in last:  # a page whose text is unchanged would not be read again
        (BUILD / ".doctrees" / page.relative_to(ROOT).with_suffix(".doctree")).unlink(
            missing_ok=True
        )
    return failed


def locked() -> FileLock:
    """The lock under which the cache is read and written."""
    BUILD.mkdir(exist_ok=True)
    return FileLock(BUILD / "cache.lock")


def main() -> int:
    """Execute the pages named on the command line, or all; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="pages, such as inside; all by default")
    parser.add_argument("--again", action="store_true", help="execute also what is in the cache")
    asked = parser.parse_args()
    known = {page.stem: page for page in notebooks()}
    if unknown := [name for name in asked.names if name not in known]:
        parser.error(f"no page {', '.join(unknown)}; there are: {', '.join(known)}")
    return 1 if fill([known[name] for name in asked.names or known], asked.again) else 0


if __name__ == "__main__":
    sys.exit(main())
