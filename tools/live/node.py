"""Run the page's engine in node, on jobs of ``live/check.js``."""

import base64
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from tools.live import SOURCE
from xlvlms_tutorial.io import write_json

KERNELS = SOURCE / "kernels.wasm"
MINUTES = 60


class EngineError(RuntimeError):
    """The engine stopped, with what it said."""


def node() -> str | None:
    """Where node is, None where there is none."""
    return shutil.which("node")


def run(job: Mapping[str, object]) -> dict[str, object]:
    """Run a job of ``live/check.js``.

    Raises
    ------
    EngineError
        If the engine stopped.
    """
    with TemporaryDirectory() as folder:
        file = write_json(Path(folder) / "job.json", job)
        command = [node() or "node", str(SOURCE / "check.js"), str(file)]
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60 * MINUTES
        )
    if process.returncode:
        raise EngineError(process.stderr.strip())
    return json.loads(process.stdout)


def ask(
    pack: Mapping[str, object],
    folders: Sequence[Path],
    pictures: Sequence[Image.Image],
    asks: Sequence[Mapping[str, object]],
    vectors: Sequence[np.ndarray] = (),
    **more: object,
) -> dict[str, object]:
    """Let the engine answer questions about pictures.

    Parameters
    ----------
    pack : mapping
        The manifest of the weights.
    folders : sequence of Path
        Where the shards lie.
    pictures : sequence of PIL.Image.Image
        Pictures of 256 x 256 pixels.
    asks : sequence of mapping
        ``picture`` and ``question``, ``steer``, ``skip``, ``states``, ``answer`` as in
        ``live/check.js``.
    vectors : sequence of array (576,)
        What ``steer`` refers to by number.
    **more
        Other entries of the job.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        pixels = [np.asarray(picture.convert("RGBA")).tobytes() for picture in pictures]
        (folder / "pictures").write_bytes(b"".join(pixels))
        raw = [np.asarray(vector, np.float32).tobytes() for vector in vectors]
        (folder / "vectors").write_bytes(b"".join(raw))
        job = {
            "kernels": str(KERNELS),
            "manifest": str(write_json(folder / "manifest.json", pack, indent=0)),
            "folders": [str(each) for each in folders],
            "pictures": str(folder / "pictures"),
            "vectors": str(folder / "vectors"),
            "asks": list(asks),
        }
        return run(job | more)


def floats(text: str, width: int = 576) -> np.ndarray:
    """Read an array (n, width) that ``live/check.js`` wrote."""
    return np.frombuffer(base64.b64decode(text), np.float32).reshape(-1, width)
