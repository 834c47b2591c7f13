"""Front doors: what a package offers, it offers by name, from one place, and what is dear to
import is imported when it is asked for.
"""

import ast
import pickle
import subprocess
import sys
from importlib import import_module
from inspect import getsource

import pytest

from tests.support.doors import DOORS
from tools import ROOT

LAZY = [door for door in DOORS if hasattr(import_module(door), "__getattr__")]


@pytest.mark.parametrize("door", DOORS)
def test_a_package_says_what_it_is_for(door):
    assert import_module(door).__doc__


@pytest.mark.parametrize("door", DOORS)
def test_what_a_package_offers_is_there_and_listed_once(door):
    package = import_module(door)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("door", LAZY)
def test_a_lazy_name_is_that_of_a_module_only_where_it_is_that_module(door):
    package = import_module(door)
    modules = {path.stem for path in (ROOT / door.replace(".", "/")).iterdir()}
    block = next(node for node in ast.parse(getsource(package)).body if isinstance(node, ast.If))
    lazy = {alias.name for statement in block.body for alias in statement.names}
    for name in modules & lazy:
        assert getattr(package, name) is import_module(f"{door}.{name}")
    with pytest.raises(AttributeError, match=f"module '{door}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("door", DOORS)
def test_dir_shows_what_a_package_offers(door):
    assert set(import_module(door).__all__) <= set(dir(import_module(door)))


def test_what_the_package_offers_can_be_pickled():
    for name in ("Sample", "Estimate", "SteeringVectors", "capture", "load"):
        offered = getattr(import_module("xlvlms_tutorial"), name)
        assert pickle.loads(pickle.dumps(offered)) is offered


def test_the_package_itself_imports_nothing_that_is_dear():
    code = (
        "import xlvlms_tutorial, sys; sys.exit(bool({'numpy', 'pandas', 'torch', "
        "'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_samples_and_intervals_need_no_torch():
    imports = (
        "from xlvlms_tutorial import load_samples; from xlvlms_tutorial.metrics import bootstrap"
    )
    code = f"{imports}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_models_need_no_loading():
    code = (
        "from xlvlms_tutorial import models; import sys; "
        "sys.exit('xlvlms_tutorial.loading' in sys.modules or hasattr(models, 'load'))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
