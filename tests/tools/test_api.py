"""The API pages: written from what the front doors offer, a page a subject."""

import re
from importlib import import_module
from types import ModuleType

import pytest

from tools import ROOT, api
from tools.api import Public, about, home, offered, sentence

DOORS = sorted(
    ".".join(path.relative_to(ROOT).parent.parts)
    for path in (ROOT / "xlvlms_tutorial").rglob("__init__.py")
)


def test_the_pages_are_those_of_the_front_doors():
    pages = api.pages()
    assert set(api.FOLDER.glob("*.md")) | {api.FRONT_PAGE} == set(pages), "run `make api`"
    for file, text in pages.items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run `make api`"


def test_every_front_door_has_a_page():
    assert {f"xlvlms_tutorial.{door}" for door in api.SUBJECTS} | {
        "xlvlms_tutorial",
        "xlvlms_tutorial.methods",
    } == {
        *DOORS,
        "xlvlms_tutorial.errors",
    }


def test_what_is_offered_is_documented_once():
    names = re.findall(
        r"^\.\. auto(?:class|function|module):: ([\w.]+)$", "".join(api.pages().values()), re.M
    )
    assert len(names) == len(set(names))
    for door in DOORS:
        for public in offered(door):
            path = (
                public.module
                if isinstance(public.what, ModuleType)
                else f"{public.module}.{public.there}"
            )
            assert (
                path in names
                or not (callable(public.what) or isinstance(public.what, ModuleType))
                or door.endswith(".methods")
            )


@pytest.mark.parametrize("door", DOORS)
def test_a_name_leads_to_where_it_is_defined(door):
    for public in offered(door):
        module = import_module(public.module)
        assert public.what is (getattr(module, public.there) if public.there else module)
        assert about(public)


@pytest.mark.parametrize(
    "text, first",
    [
        ("One. Two.", "One."),
        ("One\n    line more. Two.", "One line more."),
        ("``a.b`` and 1.5, e.g. this. Two.", "``a.b`` and 1.5, e.g. this."),
        ("Is it? Yes.", "Is it?"),
        ("No end\n\nTwo.", "No end"),
        ("A list:\n\n- one.", "A list:"),
    ],
)
def test_the_first_sentence(text, first):
    assert sentence(text) == first


def test_a_name_that_is_handed_on_leads_to_its_own_module():
    assert home("xlvlms_tutorial", "load") == ("xlvlms_tutorial.loading.loading", "load")
    assert home("xlvlms_tutorial", "plots") == ("xlvlms_tutorial.view.plots", "")
    assert home("xlvlms_tutorial.data", "load_samples") == ("xlvlms_tutorial.data", "load_samples")


def test_a_constant_is_told_by_its_comment_or_its_value():
    datasets = Public("DATASETS", (), "xlvlms_tutorial.data", "DATASETS")
    assert about(datasets) == "Embedded: they need neither network nor files"
    readings = Public("READINGS", (), *home("xlvlms_tutorial.methods.alignment", "READINGS"))
    assert about(readings) == "``('layer', 'input')``"
