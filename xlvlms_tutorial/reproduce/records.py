"""What every written result shares: the versions that made it, and a file that is either whole or absent."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile

from xlvlms_tutorial.errors import OutputError

_PACKAGES = ("xlvlms_tutorial", "torch", "transformers", "tokenizers", "numpy", "pandas", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; "source" for a package that runs uninstalled."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source" if name == "xlvlms_tutorial" else "absent"
    return found


def as_json(content: object) -> str:
    """Strict JSON text of a result, indented.

    Raises
    ------
    ValueError
        If the content holds NaN or infinity, which JSON does not know.
    """
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, content: object) -> Path:
    """Write a result as JSON; a reader finds the old file or the whole new one, also when the writer is killed.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path, text = Path(path), as_json(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as draft:
            draft.write(text)
        os.chmod(draft.name, 0o644)  # temporary files are private; results need not be
        os.replace(draft.name, path)
    except OSError as cause:
        if "draft" in locals():
            Path(draft.name).unlink(missing_ok=True)
        raise OutputError(path, cause.strerror or cause) from cause
    return path
