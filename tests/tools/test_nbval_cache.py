"""One run of a notebook tests it and fills the cache of the book: outputs, widgets.

Nothing of a page that raised or ran in part.
"""

import nbformat
import pytest

from tools import ROOT, build, execute, nbval_cache
from tools.chapters import read

pytest_plugins = "pytester"

HEAD = (ROOT / "book" / "welcome.md").read_text().split("```")[0]
CHECKED = "# NBVAL_CHECK_OUTPUT\nprint({})"
OPTIONS = (
    "-p",
    nbval_cache.__name__,
    "--color=no",
    "--nbval-lax",
    "--nbval-current-env",
    "--nbval-sanitize-with=sanitize.cfg",
)
WIDGETS = "application/vnd.jupyter.widget-state+json"


@pytest.fixture
def root(pytester, monkeypatch):
    for module in (build, execute):
        for name, path in {
            "BUILD": "_build",
            "CACHE": "_build/cache",
            "CLAIMS": "_build/claims",
        }.items():
            monkeypatch.setattr(module, name, pytester.path / path, raising=False)
    monkeypatch.setattr(
        execute, "QUIET", {"XLVLMS_CLAIMS": str(pytester.path / "_build" / "claims")}
    )
    monkeypatch.setenv("XLVLMS_CLAIMS", "restored afterwards")
    monkeypatch.setattr(build, "fingerprint", lambda: "unchanged")
    (pytester.path / "_build").mkdir()
    (pytester.path / "_build" / "fingerprint.txt").write_text("unchanged")
    return pytester.path


@pytest.fixture
def run(root, pytester):
    """A function that runs nbval with the plugin on the notebooks of the folder."""
    pytester.makeini("[pytest]")
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    (root / "sanitize.cfg").write_text((ROOT / "tests" / "sanitize.cfg").read_text())
    return lambda *arguments: pytester.runpytest_inprocess(
        *OPTIONS, *arguments, *root.glob("*.ipynb")
    )


def page(root, *cells, printed=(), name="page"):
    """Write a page with these cells and its pair, whose last cells show the given texts."""
    file = root / f"{name}.md"
    file.write_text(
        HEAD
        + "# Title\n\n"
        + "\nBetween.\n\n".join(f"```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells)
    )
    pair = read(file)
    for cell, text in (
        zip(
            [cell for cell in pair.cells if cell.cell_type == "code"][-len(printed) :],
            printed,
            strict=True,
        )
        if printed
        else ()
    ):
        cell.outputs, cell.execution_count = (
            [nbformat.v4.new_output("stream", name="stdout", text=text)],
            1,
        )
    nbformat.write(pair, file.with_suffix(".ipynb"))
    return file


def outputs(file):
    """The outputs of each code cell of a page as the book will show them."""
    return [cell.outputs for cell in execute.shown(file).cells if cell.cell_type == "code"]


def test_what_was_shown_is_kept_as_the_book_s_own_run_would_give_it(root, run):
    cells = (
        "print('one')\n6 * 7",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        CHECKED.format("'two'"),
    )
    file = page(root, *cells, printed=["two\n"])
    run().assert_outcomes(passed=3)
    tested = execute.shown(file)
    kinds = [[output.output_type for output in cell_outputs] for cell_outputs in outputs(file)]
    assert kinds == [["stream", "execute_result"], ["display_data"], ["stream"]]
    assert set(outputs(file)[1][0].data) == {"image/png", "text/plain"}
    executed = execute.execute(file)
    for now, then in zip(tested.cells, executed.cells, strict=True):
        assert {**now, "id": None} == {**then, "id": None}
    assert tested.metadata.language_info == executed.metadata.language_info


def test_another_digit_fails_with_both_texts_and_is_kept_for_the_pair(root, run):
    file = page(root, "2", CHECKED.format("'share 0.31'"), "3", printed=["share 0.32\n", ""])
    result = run()
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.re_match_lines(
        [
            ".*Cell outputs differ",
            " *- in the paired notebook, . shown now:",
            " *- share 0.32",
            r" *\+ share 0.31",
        ]
    )
    assert outputs(file)[1][0].text == "share 0.31\n"


def test_times_tables_in_html_and_complaints_do_not_count(root, run):
    table = (
        "import sys\n"
        "import pandas as pd\n"
        "print('oh', file=sys.stderr)\n"
        "print('took 3.1 s')\n"
        "pd.Series([1], name='a').to_frame()"
    )
    file = page(root, f"# NBVAL_CHECK_OUTPUT\n{table}", printed=["took 12 s\n"])
    pair = nbformat.read(file.with_suffix(".ipynb"), 4)
    pair.cells[-1].outputs.append(
        nbformat.v4.new_output(
            "execute_result", data={"text/plain": "   a\n0  1"}, execution_count=1
        )
    )
    nbformat.write(pair, file.with_suffix(".ipynb"))
    run().assert_outcomes(passed=1)


def test_widgets_are_kept_with_their_state(root, run):
    cells = (
        "import ipywidgets as w\nslider = w.IntSlider(7)\nslider",
        "slider.max = 9\nw.Image(value=b'picture')",
    )
    file = page(root, *cells)
    run().assert_outcomes(passed=2)
    state = execute.shown(file).metadata.widgets[WIDGETS]["state"]
    assert sorted(model["model_name"] for model in state.values()) == sorted(
        model["model_name"]
        for model in execute.execute(file).metadata.widgets[WIDGETS]["state"].values()
    )
    [slider] = [
        model["state"] for model in state.values() if model["model_name"] == "IntSliderModel"
    ]
    assert (slider["value"], slider["max"]) == (7, 9)
    [picture] = [model for model in state.values() if model["model_name"] == "ImageModel"]
    assert picture["buffers"][0]["data"] == "cGljdHVyZQ=="


def test_a_page_that_raises_is_not_kept_nor_are_its_old_outputs_and_the_rest_of_it_is_skipped(
    root, run
):
    file = page(root, "import os\nassert 'BAD' not in os.environ", "2", "3")
    run().assert_outcomes(passed=3)
    assert execute.cached(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAD", "1")
        result = run()
    result.assert_outcomes(failed=1, skipped=2)
    result.stdout.fnmatch_lines(["*Cell execution caused an exception*", "*AssertionError*"])
    assert not execute.cached(file)


def test_old_outputs_are_replaced(root, run):
    file = page(root, "import os\nprint(os.environ['SAID'])")
    for text in ("old", "new"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAID", text)
            run().assert_outcomes(passed=1)
        assert outputs(file)[0][0].text == f"{text}\n"


def test_part_of_a_page_is_not_kept_and_neither_is_a_pair_out_of_step(root, run):
    file = page(root, "1", "2")
    run("-k", "Cell and 0").assert_outcomes(passed=1, deselected=1)
    assert not execute.cached(file)
    file.write_text(file.read_text().replace("\n2\n", "\n3\n"))
    run().assert_outcomes(passed=2)
    assert not execute.cached(file)


def test_records_of_claims_go_where_the_book_looks_for_them_and_old_ones_are_gone(root, run):
    page(
        root,
        (
            "import os\n"
            "print(os.environ['XLVLMS_CLAIMS'], sorted(os.listdir(os.environ['XLVLMS_CLAIMS'])))"
        ),
    )
    (root / "_build" / "claims").mkdir(parents=True)
    (root / "_build" / "claims" / "old.json").write_text('{"chapter": "page"}')
    run().assert_outcomes(passed=1)
    assert outputs(root / "page.md")[0][0].text == f"{root / '_build' / 'claims'} []\n"


def test_long_pages_come_first_ledger_and_findings_last(root, run):
    for name in ("claims", "findings", "abc", "shift"):
        page(root, "1", "2", name=name)
    files = [line.split("::")[0] for line in run("--collect-only", "-q").outlines if "::" in line]
    assert [name.rsplit("/", 1)[-1] for name in files] == [
        f"{name}.ipynb" for name in ("shift", "abc", "claims", "findings") for _ in range(2)
    ]
