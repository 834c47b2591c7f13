"""What the first cell of a notebook does to the images in which hosted notebooks
run, as far as these are recorded.
"""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.requirements import environment, pins
from tools import ROOT
from tools.chapters import FIRST_CELL, RUNTIME, notebooks, read

IMAGES = pytest.mark.parametrize("image", ["2026-04", "2026-08", "2026-09"])
LEFT_ALONE = {"torch", "torchvision", "numpy", "pandas"}
REPLACED = {"transformers", "tokenizers", "huggingface-hub"}
CONSTRAINTS = {
    canonicalize_name(requirement.name): requirement
    for requirement, _ in pins("requirements-hosted.txt")
}
# What the hub of the constraints asks for: the one that is installed here is another
OF_THE_HUB = """
    click<9.0.0,>=8.4.2 filelock>=3.10.0 fsspec>=2023.5.0 hf-xet<2.0.0,>=1.6.0 httpx<1,>=0.23.0
    packaging>=20.9 pyyaml>=5.1 tqdm>=4.42.1 typing-extensions>=4.1.0
"""
# What packages of the images ask of those that are replaced there
ASKED_BACK = {
    "datasets 4.0.0 and 4.8.5": "huggingface-hub<2.0",
    "peft 0.20.0": "transformers",
    "accelerate 1.14.0": "huggingface-hub>=0.21",
}


def recorded(image):
    """The versions in an image by name; what a list leaves out is as in September."""
    lines = [
        line
        for month in ("2026-09", image)
        for line in (ROOT / f"tests/hosted/{month}.txt").read_text().splitlines()
    ]
    versions = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in versions.items()}


def needs(name):
    """What a package asks for in the version that the constraints allow."""
    return (
        OF_THE_HUB.split() if name == "huggingface-hub" else importlib.metadata.requires(name) or []
    )


def installed_version(name):
    """The version of a package that pip takes under the constraints, where
    an image has none that will do.
    """
    (specifier, *further) = CONSTRAINTS[name].specifier
    return (
        specifier.version
        if specifier.operator == "==" and not further
        else importlib.metadata.version(name)
    )


def installed(image):
    """The versions that pip installs into an image, all else staying as it is."""
    versions = recorded(image)
    marker_environment = environment(".".join(versions["python"].split(".")[:2]), "Linux")
    requirements = [
        Requirement(line)
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    new = {}
    for requirement in requirements:  # grows: what is installed asks for more
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate(marker_environment):
            continue
        allowed = CONSTRAINTS.get(name, Requirement(name)).specifier
        if name not in new and not (
            name in versions
            and requirement.specifier.contains(versions[name])
            and allowed.contains(versions[name])
        ):
            assert name in CONSTRAINTS, (
                f"{image} has {name} {versions.get(name)}, {requirement} is asked for, and "
                "requirements-hosted.txt does not say which"
            )
            new[name] = installed_version(name)
            requirements += map(Requirement, needs(name))
        assert requirement.specifier.contains(new.get(name, versions.get(name))), (
            f"{requirement}, but {name} {new.get(name)} is taken"
        )
    return new


@IMAGES
def test_first_cell_finds_a_set_that_goes_together_and_leaves_torch_numpy_and_pandas(image):
    new = installed(image)
    assert set(new) >= REPLACED
    assert not LEFT_ALONE & set(new)
    for who, line in ASKED_BACK.items():
        requirement = Requirement(line)
        assert requirement.specifier.contains(new[canonicalize_name(requirement.name)]), who


def test_what_is_replaced_in_the_current_image_is_what_the_cell_says():
    replaced = {name for name in installed("2026-08") if name in recorded("2026-08")}
    assert replaced == REPLACED
    names = re.search(r'print\("Takes some seconds\. (.*) are replaced', FIRST_CELL)[1]
    assert {canonicalize_name(name) for name in re.split(", | and ", names)} == replaced
    comment = (ROOT / "pyproject.toml").read_text()
    assert all(
        f"{name}" in comment.partition("dependencies = [")[0]
        for name in replaced | {"torch", "numpy", "pandas"}
    )


def test_constraints_are_of_what_is_tested_and_within_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    specifiers = {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in map(Requirement, project["dependencies"])
    }
    tested = {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
        for requirement, _ in pins()
    }
    assert not LEFT_ALONE & set(CONSTRAINTS)
    for name, pin in CONSTRAINTS.items():
        assert name not in specifiers or specifiers[name].contains(installed_version(name))
        assert pin.specifier.contains(tested[name]) == (name != "huggingface-hub"), pin


def test_every_python_that_is_declared_is_one_that_colab_has_or_that_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [line.rpartition(" ")[2] for line in project["classifiers"]]
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    assert (
        declared
        == ["3.11", "3.12", "3.13"]
        == re.findall(r"3\.\d+", re.search(r"matrix: \{python: (.*)\}", workflow)[1])
    )
    for image in ("2026-04", "2026-09"):
        assert ".".join(recorded(image)["python"].split(".")[:2]) in declared
    assert ".".join(map(str, sys.version_info[:2])) in declared


@pytest.mark.parametrize(
    "versions",
    [{"torch": "2.11.0+cu128", "numpy": "2.1.3", "pandas": "2.2.3"}, {"numpy": "2.1.3"}, {}],
)
def test_first_cell_asks_for_torch_numpy_and_pandas_as_they_are(monkeypatch, capsys, versions):
    ran = []
    monkeypatch.setattr("importlib.util.find_spec", versions.get)
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(FIRST_CELL, {})
    pinned = [f"{name}=={version}" for name, version in versions.items()]
    constraints = ["-c", "xlvlms-tutorial/requirements-hosted.txt", "./xlvlms-tutorial"]
    assert ran[1] == [sys.executable, "-m", "pip", "install", "-q", *pinned, *constraints]
    assert "need not restart" in capsys.readouterr().out


def test_notebooks_ask_for_a_past_runtime_of_colab():
    assert re.fullmatch(r"20\d\d\.(01|04|07|10)", RUNTIME)
    assert read(notebooks()[0]).metadata["colab"] == {
        "runtime_attributes": {"runtime_version": RUNTIME}
    }
