"""Links between the built pages lead somewhere, down to the anchor; no browser needed."""

from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

from tools.chapters import address


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
        missing = not target.is_file() or (target.suffix == ".html" and unquote(parts.fragment) not in anchors(target))
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
    page.write_text('<p id="here"></p><a href="#here"></a><a href="#gone"></a><a href="other.html"></a><a href="https://example.org"></a>')
    assert broken(page) == ["#gone", "other.html"]
