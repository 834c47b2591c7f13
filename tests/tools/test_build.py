"""Cached outputs are forgotten when the package changes, and kept when it does not."""

import pytest
import yaml
from jupyter_book.config import get_default_sphinx_config

from tools import build, not_executed
from xlvlms_tutorial.io import read_json


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "xlvlms_tutorial").mkdir()
    (tmp_path / "xlvlms_tutorial" / "one.py").write_text("x = 1\n")
    (tmp_path / "requirements.txt").write_text("numpy==2.4.6\n")
    (tmp_path / "_build").mkdir()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "BUILD", tmp_path / "_build")
    # else a changed fingerprint would delete the records that the pages of this checkout made
    monkeypatch.setattr(build, "CLAIMS", tmp_path / "_build" / "claims")
    return tmp_path


def cached(root):
    file = root / "_build" / ".jupyter_cache" / "executed"
    file.parent.mkdir(exist_ok=True)
    file.write_text("outputs")
    return file


def test_cache_is_kept_while_nothing_changed(root):
    build.refresh_cache()
    file = cached(root)
    build.refresh_cache()
    assert file.exists()


@pytest.mark.parametrize(
    "name", ["xlvlms_tutorial/one.py", "xlvlms_tutorial/weights.bin", "requirements.txt"]
)
def test_cache_is_forgotten_when_source_weights_or_pins_change(root, name):
    build.refresh_cache()
    file = cached(root)
    record = root / "_build" / "claims" / "record.json"
    record.parent.mkdir()
    record.write_text("{}")
    (root / name).write_text("changed")
    build.refresh_cache()
    assert not file.exists()
    assert not record.exists()  # records live and die with the outputs of their pages


def test_compiled_files_do_not_count(root):
    before = build.fingerprint()
    (root / "xlvlms_tutorial" / "__pycache__").mkdir()
    (root / "xlvlms_tutorial" / "__pycache__" / "one.pyc").write_bytes(b"1")
    assert build.fingerprint() == before


@pytest.mark.parametrize("offline", [True, False])
def test_settings_point_to_fetched_libraries_only_where_there_are_any(root, offline):
    written = build.write_config(offline).read_text(encoding="utf-8")
    settings = yaml.safe_load(written)["sphinx"]["config"]
    scripts = {settings["mathjax_path"]: settings["mathjax_options"]} | settings["nb_ipywidgets_js"]
    assert [name.startswith("https://") for name in scripts] == (
        [False] * 4 if offline else [True] * 3
    )
    assert ["integrity" in options for options in scripts.values()] == (
        [False] * 4 if offline else [True] * 3
    )
    assert settings["nb_execution_raise_on_error"] is True


def test_pages_without_outputs_are_not_executed_and_say_so(root):
    (root / "book").mkdir()
    pages = [root / "book" / "inside.md"]
    settings = yaml.safe_load(build.write_config(False, pages).read_text(encoding="utf-8"))
    assert settings["execute"]["exclude_patterns"] == ["book/inside.md"]
    assert settings["sphinx"]["config"]["not_executed"] == ["book/inside"]
    assert settings["sphinx"]["config"]["extensions"][-1] == "tools.not_executed"
    assert (
        "exclude_patterns" not in yaml.safe_load(build.write_config(False).read_text())["execute"]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\na: 1\n---\n\n# Title\n\ntext", "---\na: 1\n---\n\n# Title\nNOTE\n\ntext"),
        ("```{code-cell}\n# a comment\n```\n# Title\n", None),
        ("no title", "NOTE\nno title"),
    ],
)
def test_the_note_stands_under_the_title(text, expected):
    changed = not_executed.with_note(text, "inside")
    note = not_executed.NOTE.format(name="inside")
    assert "make page NAME=inside" in note
    expected = expected or text.replace("# Title\n", "# Title\nNOTE\n")
    assert changed == expected.replace("NOTE", note)


def test_one_page_is_executed_built_and_shown(root, monkeypatch, capsys):
    pages = [root / "book" / f"{name}.md" for name in ("inside", "outside", "claims")]
    executed, built = [], []
    monkeypatch.setattr(build, "notebooks", lambda: pages)
    monkeypatch.setattr(build, "fetch", lambda: True)
    monkeypatch.setattr(build, "fill", lambda wanted: executed.extend(wanted) or [])
    monkeypatch.setattr(build, "cached", lambda page: page.stem != "claims")
    monkeypatch.setattr(build, "build_pages", lambda *arguments: built.append(arguments) or 0)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert build.main(["--page", "inside"]) == 0
    assert executed == pages[:1] and len(built) == 1
    settings = yaml.safe_load((root / "_build" / "config.yml").read_text(encoding="utf-8"))
    assert settings["sphinx"]["config"]["not_executed"] == ["book/claims"]
    assert f"open {root / '_build' / 'html' / 'book' / 'inside.html'}" in capsys.readouterr().out


def test_a_whole_book_lays_the_exports_of_its_ledger(root, monkeypatch):
    monkeypatch.setattr(build, "notebooks", lambda: [root / "book" / "inside.md"])
    monkeypatch.setattr(build, "pages", lambda: [])
    monkeypatch.setattr(build, "fetch", lambda: True)
    monkeypatch.setattr(build, "fill", lambda wanted: [])
    monkeypatch.setattr(build.ties, "problems", lambda *arguments: [])
    monkeypatch.setattr(build, "build_pages", lambda *arguments: 0)
    monkeypatch.setattr(build, "lay_live", lambda: None)
    laid = []
    monkeypatch.setattr(build.exports, "lay", lambda *arguments: laid.append(arguments))
    assert build.main([]) == 0
    ((content, folder, _),) = laid
    assert content == read_json(root / "_build" / "claims.json")
    assert folder == root / "_build" / "html" / "ledger"


def test_a_page_that_there_is_not_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        build.main(["--page", "insidr"])
    assert "no page 'insidr'; there are: welcome, outside, inside" in capsys.readouterr().err


def test_settings_have_all_extensions_of_jupyter_book_but_one():
    """The list replaces that of jupyter-book, so a new version of it
    must not bring one that is missed.
    """
    expected = [
        extension
        for extension in get_default_sphinx_config()["extensions"]
        if extension != "sphinx_thebe"
    ]
    assert build.config()["sphinx"]["config"]["extensions"][: len(expected)] == expected
