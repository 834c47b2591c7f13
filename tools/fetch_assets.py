"""Fetch the widget manager and MathJax for reading offline: ``python -m tools.fetch_assets``.

The tarballs come through npm, are pinned by version and hash, and only the files that pages load
are kept, in a folder that git ignores. Without npm or a network the pages load the same
libraries from their usual servers.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tools import ROOT

VENDOR = ROOT / "assets" / "vendor"
PINS = {
    "@jupyter-widgets/html-manager@1.0.15": (
        "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638"
    ),
    "requirejs@2.3.8": "777158e89275e16bd51aec3ef714fbcb5dc45789e7078659933bc814916d7dec",
    "mathjax@3.2.2": "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
}
# Member of a tarball -> folders below VENDOR. The icon fonts are asked for under two
# names, by the two ways of loading.
KEEP = (
    (r"package/dist/(embed-amd\.js)", ("widgets",)),
    (
        r"package/dist/(\w+\.woff2)",
        ("widgets/@jupyter-widgets", "widgets/@jupyter-widgets/html-manager/dist"),
    ),
    (r"package/(require\.js)", ("widgets",)),
    (
        (
            r"package/es5/(tex-mml-chtml\.js|output/chtml/fonts/woff-v2/[\w-]+\.woff|input/"
            r"tex/extensions/[\w-]+\.js)"
        ),
        ("mathjax",),
    ),
)


def pack(name: str, folder: Path) -> bytes | None:
    """The tarball of one package through npm, or None where npm or the network is missing."""
    if shutil.which("npm") is None:
        return None
    command = ["npm", "pack", name, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return (folder / done.stdout.split()[-1]).read_bytes() if done.returncode == 0 else None


def check(name: str, data: bytes) -> None:
    """Stop when a tarball is not the one that was pinned."""
    found = hashlib.sha256(data).hexdigest()
    if found != PINS[name]:
        problem = f"{name} is not what was pinned: expected sha256 {PINS[name]}, found {found}"
        raise SystemExit(f"{problem}; run `npm cache verify`, then try again.")


def unpack(data: bytes) -> None:
    """Write the members that pages load, under names of ours only."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            for pattern, folders in KEEP:
                match = re.fullmatch(pattern, member.name)
                for folder in folders if match and member.isfile() else ():
                    target = VENDOR / folder / match[1]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(member).read())


def fetch() -> bool:
    """Fetch what is missing; True when pages can be read offline."""
    stamp = VENDOR / "pins.json"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == PINS:
        return True
    with tempfile.TemporaryDirectory() as folder:
        tarballs = {name: pack(name, Path(folder)) for name in PINS}
    if None in tarballs.values():
        return False
    shutil.rmtree(VENDOR, ignore_errors=True)
    for name, data in tarballs.items():
        check(name, data)
        unpack(data)
    stamp.write_text(json.dumps(PINS, indent=1), encoding="utf-8")
    return True


if __name__ == "__main__":
    print(
        "pages will read offline"
        if fetch()
        else "npm is missing or cannot fetch: pages will load libraries from their servers"
    )
