"""Front doors: what a package offers, it offers by name, from one place, and what is dear to import is imported when it is asked for."""

import re
import subprocess
import sys
from importlib import import_module

import pytest

from tools import ROOT
from tools.chapters import notebooks, read

PACKAGE = ROOT / "xlvlms_tutorial"
DOORS = sorted(".".join(path.relative_to(ROOT).parent.parts) for path in PACKAGE.rglob("__init__.py"))
OFFERING = [door for door in DOORS if hasattr(import_module(door), "__all__")]


@pytest.mark.parametrize("door", DOORS)
def test_a_package_says_what_it_is_for(door):
    assert import_module(door).__doc__


@pytest.mark.parametrize("door", OFFERING)
def test_what_a_package_offers_is_there_and_listed_once(door):
    package = import_module(door)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("door", ["xlvlms_tutorial", "xlvlms_tutorial.batch", "xlvlms_tutorial.metrics", "xlvlms_tutorial.pocket"])
def test_no_name_that_is_imported_when_it_is_asked_for_is_that_of_a_module(door):
    modules = {path.stem for path in (ROOT / door.replace(".", "/")).iterdir()}
    assert modules.isdisjoint(import_module(door).__all__)
    with pytest.raises(AttributeError, match=f"module '{door}' has no attribute 'nothing'"):
        import_module(door).nothing  # noqa: B018


def test_samples_and_intervals_need_no_torch():
    wanted = "from xlvlms_tutorial import load_samples; from xlvlms_tutorial.metrics import bootstrap"
    code = f"{wanted}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("page", notebooks(), ids=lambda page: page.stem)
def test_pages_import_from_front_doors_only(page):
    """A package, or a module that lies in none."""
    code = "\n".join(cell.source for cell in read(page).cells if cell.cell_type == "code")
    modules = set(re.findall(r"^\s*from (xlvlms_tutorial[\w.]*) import", code, re.M))
    alone = {f"xlvlms_tutorial.{path.stem}" for path in PACKAGE.glob("*.py")}
    assert modules - {*DOORS, *alone} == set()
