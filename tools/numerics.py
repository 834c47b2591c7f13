"""Execute pages as on other processors, and say what differs.

``python -m tools.numerics [PAGE ...] [--settings NAME ...] [--write]``. Processors add numbers
in different orders. Four settings of the same libraries stand for four kinds of them. Each page
is executed under each setting; what its cells print and what it records is kept in
``_build/numerics/SETTING/PAGE.json``, so a run that is stopped goes on, and a page whose code,
package or pins have not changed is not executed again. The table says, for each page and setting,
how many checked cells, verdicts, checked statements and third digits differ from the first one.
``--write`` keeps what moved in ``spread.json`` of the package, where
:func:`xlvlms_tutorial.claims.claims.record` finds it.
"""

import argparse
import configparser
import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import nbformat
import pandas as pd
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tools import ROOT
from tools.build import sources
from tools.chapters import notebooks
from tools.execute import BUILD, LAST, LIMIT, QUIET, read
from tools.pair import checked, text_of
from xlvlms_tutorial.claims import spread
from xlvlms_tutorial.claims.checks import read_checks
from xlvlms_tutorial.claims.claims import claim, verdict
from xlvlms_tutorial.io import read_json, write_json
from xlvlms_tutorial.metrics.intervals import Estimate

FOLDER = BUILD / "numerics"
SETTINGS = {
    "native": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},  # bfloat16 emulated
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "OMP_NUM_THREADS": "2",
        "NUMBA_NUM_THREADS": "2",
        # a thread that waits for a busy core does not take it from those that work
        "OMP_WAIT_POLICY": "PASSIVE",
    },
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}


def digest(page: Path) -> str:
    """What the outputs of a page depend on.

    Package, pins and the page's own code; not what this tool writes itself.
    """
    total = hashlib.sha256()
    for path in sources():
        if path != spread.FILE:
            total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    for cell in read(page).cells:
        total.update(cell.source.encode() if cell.cell_type == "code" else b"")
    return total.hexdigest()


def result_file(page: Path, setting: str) -> Path:
    """Where the result of a page under a setting is kept."""
    return FOLDER / setting / f"{page.stem}.json"


def done(page: Path, setting: str, now: str) -> bool:
    """Whether the page has run under the setting as it is now."""
    file = result_file(page, setting)
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["digest"] == now


def seconds(cell: NotebookNode) -> float | None:
    """How long a cell took, by the kernel's own clock."""
    times = cell.metadata.get("execution", {})
    ends = [times.get(name) for name in ("iopub.execute_input", "shell.execute_reply")]
    start, end = (datetime.fromisoformat(time) if time else None for time in ends)
    return round((end - start).total_seconds(), 2) if start and end else None


def sanitised(outputs: list[NotebookNode]) -> list[str]:
    """The texts of outputs without times and addresses, by the rules that nbval uses."""
    rules = configparser.RawConfigParser()
    rules.read(ROOT / "tests" / "sanitize.cfg")
    texts = [
        output.text if output.output_type == "stream" else output.data["text/plain"]
        for output in outputs
    ]
    for rule in rules.sections():
        texts = [re.sub(rules[rule]["regex"], rules[rule]["replace"], text) for text in texts]
    return texts


def described(cell: NotebookNode, page: Path) -> dict:
    """What is kept of an executed cell: its code, time and texts.

    Of a checked cell the text that is compared.
    """
    kinds = {output.output_type for output in cell.outputs}
    compared = checked(cell) and bool(kinds) and "error" not in kinds
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
    ]
    kept = sanitised(text_of(cell, page)) if compared else texts
    return {"source": cell.source, "seconds": seconds(cell), "checked": compared, "text": kept}


def run(page: Path, setting: str, now: str) -> str:
    """Execute a page under a setting and keep what it shows; a line on how it went."""
    records = FOLDER / setting / page.stem
    shutil.rmtree(records, ignore_errors=True)
    # kernels take the environment of their parent
    os.environ.update(QUIET | SETTINGS[setting] | {"XLVLMS_CLAIMS": str(records)})
    notebook, start, error = read(page), perf_counter(), None
    place = {"metadata": {"path": str(page.parent)}}
    client = NotebookClient(
        notebook, timeout=LIMIT, kernel_name="python3", resources=place, record_timing=True
    )
    try:
        client.execute()
    except CellExecutionError as cause:
        error = str(cause)
    content = {
        "digest": now if error is None else "failed",
        "seconds": round(perf_counter() - start, 1),
        "processor_seconds": round(os.times().children_user + os.times().children_system, 1),
        "error": error,
        "cells": [described(cell, page) for cell in notebook.cells if cell.cell_type == "code"],
        "claims": [
            json.loads(file.read_text(encoding="utf-8")) for file in sorted(records.glob("*.json"))
        ],
        "checks": {check["statement"]: check["holds"] for check in read_checks(records)},
    }
    # to be looked at, where something differs
    nbformat.write(notebook, result_file(page, setting).with_suffix(".ipynb"))
    result_file(page, setting).write_text(json.dumps(content, indent=1), encoding="utf-8")
    shutil.rmtree(records, ignore_errors=True)
    return f"{setting} {page.stem}: {content['seconds']:.0f} s" + (
        f", FAILED\n{error}" if error else ""
    )


def measured(result: dict) -> dict[str, Estimate]:
    """Each measurement of a page by name, with the interval of its run alone."""
    estimates = {}
    for one in result["claims"]:
        low, high = one.get("alone", (one["low"], one["high"]))
        estimates[spread.name_of(one)] = Estimate(one["value"], low, high, one["n"])
    return estimates


def verdicts(estimates: dict[str, Estimate]) -> dict[str, str]:
    """The verdict on each measurement, by name."""
    return {name: verdict(claim(name.split(" | ")[0]), one) for name, one in estimates.items()}


def differences(one: dict, other: dict) -> dict[str, int]:
    """How many checked cells, verdicts, checked statements and third digits of two results differ.

    Verdicts are of each run alone.
    """
    cells = sum(
        a["text"] != b["text"]
        for a, b in zip(one["cells"], other["cells"], strict=True)
        if a["checked"]
    )
    first, second = measured(one), measured(other)
    mine, theirs = verdicts(first), verdicts(second)
    both = first.keys() & second.keys()
    apart = sum(mine.get(name) != theirs.get(name) for name in first.keys() | second.keys())
    digits = sum(
        f"{getattr(first[k], n):.3g}" != f"{getattr(second[k], n):.3g}"
        for k in both
        for n in ("value", "low", "high")
    )
    said, other_said = one.get("checks", {}), other.get("checks", {})
    statements = 0
    for statement in said.keys() | other_said.keys():
        statements += said.get(statement) != other_said.get(statement)
    return {"cells": cells, "verdicts": apart, "statements": statements, "digits": digits}


def results(page: Path) -> dict[str, dict]:
    """What is known of a page, by setting; runs that failed are left out."""
    files = {setting: result_file(page, setting) for setting in SETTINGS}
    known = {
        setting: json.loads(file.read_text(encoding="utf-8"))
        for setting, file in files.items()
        if file.exists()
    }
    return {setting: result for setting, result in known.items() if result["error"] is None}


def table(pages: list[Path]) -> pd.DataFrame:
    """For each page, cells, measurements, seconds of processors and what differs.

    Cells are the checked ones; what differs from the first setting is told as cells /
    verdicts / checked statements / digits. The first column says whether all that is known was
    executed with the page, package and pins as they are now.
    """
    rows = {}
    for page in pages:
        known = results(page)
        if not known:
            continue
        base, *_ = known.values()
        fresh = {result["digest"] for result in known.values()} == {digest(page)}
        row = {"as it is now": "yes" if fresh else "no: run it again"}
        row |= {
            "checked": sum(cell["checked"] for cell in base["cells"]),
            "measured": len(base["claims"]),
        }
        # of all threads: a busy machine makes a page slower, and this hardly
        row |= {
            f"{setting} s": result.get("processor_seconds") for setting, result in known.items()
        }
        row |= {
            s: " / ".join(map(str, differences(base, result).values()))
            for s, result in known.items()
            if result is not base
        }
        rows[page.stem] = row
    return pd.DataFrame(rows).T


def moved(pages: list[Path]) -> dict[str, list[dict]]:
    """The measurements that differ between settings by more than rounding.

    With what they were under each. Those of a page that was not executed here stay as they are in
    the package.
    """
    moving = {}
    absent = {page.stem for page in pages if not results(page)}
    for name, estimates in (read_json(spread.FILE) if spread.FILE.exists() else {}).items():
        if name.split(" | ")[spread.KEY.index("chapter")] in absent:
            moving[name] = estimates
    for page in pages:
        several = [measured(result) for result in results(page).values()]
        for name in sorted(set().union(*several)):
            estimates = [one[name] for one in several if name in one]
            if spread.moved(estimates) or len(estimates) < len(several):
                moving[name] = [one.asdict() for one in dict.fromkeys(estimates)]
    return dict(sorted(moving.items()))


def main() -> int:
    """Execute what is missing, print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pages", nargs="*", help="pages, such as inside; all but the ledger by default"
    )
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="all by default"
    )
    parser.add_argument(
        "--write", action="store_true", help="keep what moved in the package, for all pages"
    )
    parser.add_argument("--jobs", type=int, default=1, help="pages at a time")
    options = parser.parse_args()
    known = {page.stem: page for page in notebooks() if page.stem not in LAST}
    if unknown := [name for name in options.pages if name not in known]:
        parser.error(f"no page {', '.join(unknown)}; there are: {', '.join(known)}")
    pages = [known[name] for name in options.pages or known]
    now = {page: digest(page) for page in pages}
    for setting in options.settings:
        (FOLDER / setting).mkdir(parents=True, exist_ok=True)
    todo = [
        (page, setting)
        for page in pages
        for setting in options.settings
        if not done(page, setting, now[page])
    ]
    wide = [one for one in todo if "OMP_NUM_THREADS" in SETTINGS[one[1]]]
    # pages of several threads one at a time: threads that wait for a busy
    # core take it from those that work
    for jobs, part in ((options.jobs, [one for one in todo if one not in wide]), (1, wide)):
        # a process for each run: what one sets in the environment must not reach the next
        with ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            for job in [pool.submit(run, page, setting, now[page]) for page, setting in part]:
                print(job.result(), flush=True)
    shown = table(list(known.values()))
    shown.to_csv(FOLDER / "table.csv")
    print(shown.to_string())
    if options.write:
        write_json(spread.FILE, moved(list(known.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
