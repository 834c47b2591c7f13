"""Links between the built pages lead somewhere, down to the anchor; no browser needed."""

import base64
import hashlib
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from tools import ROOT
from tools.build import OFFLINE
from tools.chapters import address, config
from tools.fetch_assets import VENDOR


@lru_cache
def soup(file: Path) -> BeautifulSoup:
    return BeautifulSoup(file.read_text(), "html.parser")


@lru_cache
def anchors(file: Path) -> frozenset[str]:
    return frozenset(tag["id"] for tag in soup(file).find_all(id=True)) | {"", "top"}


def broken(file: Path) -> list[str]:
    """The links and sources of a page that lead nowhere."""
    wrong = []
    for tag in soup(file).find_all(["a", "img", "link", "script"]):
        reference = tag.get("href") or tag.get("src") or ""
        parts = urlsplit(reference)
        if parts.scheme or parts.netloc or not reference:
            continue
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        missing = not target.is_file() or (
            target.suffix == ".html" and unquote(parts.fragment) not in anchors(target)
        )
        if missing and not reference.startswith("#pst-"):
            wrong.append(reference)
    return wrong


def test_page_exists_and_its_links_resolve(html, name):
    assert (html / f"{name}.html").is_file()
    assert broken(html / f"{name}.html") == []


def test_first_page_leads_to_the_root_of_the_contents(html):
    assert "book/welcome.html" in (html / "index.html").read_text()


def test_repository_links_carry_the_address_of_the_settings(html, name):
    links = [tag["href"] for tag in soup(html / f"{name}.html").find_all("a", href=True)]
    assert any(link.startswith(address()) for link in links)


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<p id="here"></p><a href="#here"></a><a href="#gone"></a><a '
        'href="other.html"></a><a href="https://example.org"></a>'
    )
    assert broken(page) == ["#gone", "other.html"]


def loose(file: Path) -> list[str]:
    """The scripts of a page that another server could change."""
    scripts = soup(file).find_all("script")
    foreign = [
        script["src"]
        for script in scripts
        if urlsplit(script.get("src", "")).netloc and not script.get("integrity")
    ]
    return foreign + ["thebe" for script in scripts if "THEBE_JS_URL" in script.text]


def test_no_page_takes_a_script_from_elsewhere_without_its_hash(html, name):
    assert loose(html / f"{name}.html") == []


def test_scripts_without_a_hash_are_found(tmp_path):
    page = tmp_path / "page.html"
    hashed = (
        '<script src="https://example.org/a.js" '
        'integrity="sha384-x"></script><script src="b.js"></script>'
    )
    page.write_text(
        f'{hashed}<script src="//example.org/c.js"></script><script>const THEBE_JS_URL = '
        '"x"</script>'
    )
    assert loose(page) == ["//example.org/c.js", "thebe"]


def test_the_hashes_are_those_of_the_files_beside_the_pages(html):
    if not (VENDOR / "pins.json").exists():
        pytest.skip("runs once npm has fetched the scripts: `make book` on a machine with npm")
    served, beside = config()["sphinx"]["config"], OFFLINE
    files = {
        Path(name).name: ROOT / "assets" / name
        for name in (beside["mathjax_path"], *beside["nb_ipywidgets_js"])
    }
    for script, options in (
        {served["mathjax_path"]: served["mathjax_options"]} | served["nb_ipywidgets_js"]
    ).items():
        digest = hashlib.sha384(files[Path(script).name].read_bytes()).digest()
        assert options["integrity"] == f"sha384-{base64.b64encode(digest).decode()}", script
