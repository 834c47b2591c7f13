"""What the front doors offer is explained: every argument, what is returned, and an example."""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import xlvlms_tutorial
from tests.support.doors import DOORS

SECTION = re.compile(r"^(Parameters|Returns|Yields|Raises|Examples|Notes)\n-+\n", re.M)
ENTRY = re.compile(r"^(\*{0,2}\w[\w*, ]*)(?: :.*)?$", re.M)


def offered() -> dict[str, object]:
    """Functions and classes of all front doors, each once, by where it is defined."""
    objects = {}
    for door in DOORS:
        package = import_module(door)
        for name in package.__all__:
            value = getattr(package, name)
            error = inspect.isclass(value) and issubclass(value, BaseException)
            if (inspect.isclass(value) or inspect.isroutine(value)) and not error:
                objects[f"{value.__module__}.{value.__qualname__}"] = value
    return objects


def sections(value: object) -> dict[str, str]:
    """The text of each section of a docstring; the first one, without a heading, is ""."""
    first, *others = SECTION.split(inspect.getdoc(value) or "")
    return {"": first.strip(), **dict(zip(others[::2], others[1::2], strict=True))}


def unexplained(function: object, text: dict[str, str]) -> list[str]:
    """Arguments that neither the section of parameters nor the text before it names."""
    explained = set(re.findall(r"``(\w+)``", text[""]))
    for names in ENTRY.findall(text.get("Parameters", "")):
        explained |= {name.strip().lstrip("*") for name in names.split(",")}
    arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
    return sorted(arguments - explained)


def own_methods(cls: type) -> Iterator[tuple[str, object]]:
    """The public methods that a class defines itself."""
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if inspect.isfunction(function) and not name.startswith("_"):
            yield name, function


OFFERED = offered()


@pytest.mark.parametrize("name", sorted(OFFERED))
def test_what_is_offered_says_what_it_does_what_it_takes_and_shows_an_example(name):
    value = OFFERED[name]
    text = sections(value)
    assert text[""].split("\n\n")[0].endswith((".", ":")), "the first sentence is a sentence"
    if inspect.isroutine(value) or "__init__" in vars(value):
        assert unexplained(value, text) == []
    assert ">>>" in text.get("Examples", ""), "an example that runs"
    if inspect.isgeneratorfunction(inspect.unwrap(value)):
        return  # a context manager: its first sentence says what holds inside it
    if inspect.isroutine(value) and inspect.signature(value).return_annotation is not None:
        assert "Returns" in text, "what is returned"


@pytest.mark.parametrize("name", sorted(n for n, v in OFFERED.items() if inspect.isclass(v)))
def test_the_methods_of_what_is_offered_explain_their_arguments(name):
    gaps = {}
    for method, function in own_methods(OFFERED[name]):
        text = sections(function)
        assert text[""], f"{method} has a docstring"
        if missing := unexplained(function, text):
            gaps[method] = missing
    assert gaps == {}


def test_enough_is_offered_for_this_to_mean_something():
    assert len(OFFERED) > 150


def test_no_default_is_a_path_of_the_machine():
    # an API page would show it
    paths = []
    for entry in pkgutil.walk_packages(xlvlms_tutorial.__path__, "xlvlms_tutorial."):
        if entry.name.endswith("__main__"):
            continue
        module = import_module(entry.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            for default in inspect.signature(function).parameters.values():
                if isinstance(default.default, Path) and default.default.is_absolute():
                    paths.append(f"{entry.name}.{name}: {default.name}")
    assert paths == []
