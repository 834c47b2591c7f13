"""What is fetched is what was pinned, and a missing npm is no error."""

import hashlib
import io
import tarfile

import pytest

from tools import fetch_assets


def tarball(**members):
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()


@pytest.fixture
def vendor(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_assets, "VENDOR", tmp_path / "vendor")
    return tmp_path / "vendor"


def test_without_npm_nothing_is_fetched_and_nothing_raised(vendor, monkeypatch):
    monkeypatch.setattr(fetch_assets.shutil, "which", lambda name: None)
    assert fetch_assets.fetch() is False
    assert not vendor.exists()


def test_only_what_pages_load_is_kept_under_our_names(vendor, monkeypatch):
    members = {
        "package/require.js": b"code",
        "package/README.md": b"no",
        "package/dist/ab1.woff2": b"font",
    }
    members["package/../../escape.js"] = b"no"
    data = tarball(**members)
    monkeypatch.setattr(fetch_assets, "PINS", {"one@1": hashlib.sha256(data).hexdigest()})
    monkeypatch.setattr(fetch_assets, "pack", lambda name, folder: data)
    assert fetch_assets.fetch() is True
    files = {str(path.relative_to(vendor)) for path in vendor.rglob("*") if path.is_file()}
    fonts = {
        "widgets/@jupyter-widgets/ab1.woff2",
        "widgets/@jupyter-widgets/html-manager/dist/ab1.woff2",
    }
    assert files == {"widgets/require.js", "pins.json"} | fonts
    monkeypatch.setattr(fetch_assets, "pack", lambda name, folder: pytest.fail("fetched twice"))
    assert fetch_assets.fetch() is True


def test_a_damaged_tarball_stops_with_both_hashes(vendor, monkeypatch):
    monkeypatch.setattr(fetch_assets, "PINS", {"one@1": "0" * 64})
    monkeypatch.setattr(fetch_assets, "pack", lambda name, folder: tarball())
    with pytest.raises(
        SystemExit, match=f"one@1 .* expected sha256 {'0' * 64}, found [0-9a-f]{{64}}"
    ):
        fetch_assets.fetch()
