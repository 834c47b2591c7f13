"""What every written result shares: the versions that made it, and a file that is either whole or absent."""

import hashlib
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile

from xlvlms_tutorial.errors import OutputError, RecordError

_PACKAGES = ("xlvlms_tutorial", "torch", "transformers", "tokenizers", "numpy", "pandas", "scikit-learn")

FOLDER_VARIABLE = "XLVLMS_CLAIMS"  # where records of claims go


def default_folder() -> Path:
    """Where records go: ``$XLVLMS_CLAIMS``, else ``_build/claims`` of the book around the working directory, else of that directory."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    return build_folder() / "claims"


def build_folder() -> Path:
    """Where what is made goes: ``_build`` of the book around the working directory, else of that directory."""
    here = Path.cwd()
    book = (place for place in (here, *here.parents) if (place / "_config.yml").exists() and (place / "_toc.yml").exists())
    return next(book, here) / "_build"


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
    # half of a surrogate pair, as in names of files that are no UTF-8, becomes its number, which JSON reads as the same
    path, text = Path(path), as_json(content).encode("utf-8", "backslashreplace").decode("utf-8")
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


def write_sealed(path: str | Path, content: dict[str, object]) -> Path:
    """Write a result as :func:`write_json` does, with a digest of its content as "sha256".

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    return write_json(path, content | {"sha256": _digest(content)})


def read_sealed(path: str | Path) -> dict[str, object]:
    """The content of a file of :func:`write_sealed`, without its digest.

    Raises
    ------
    RecordError
        If the file is missing, cut off, or not what was written.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        stated, computed = content.pop("sha256"), _digest(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise RecordError(path, f"not a whole results file ({type(cause).__name__}: {cause})") from cause
    if stated != computed:
        raise RecordError(path, "its content is not what was written (its digest differs)")
    return content


def _digest(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def peak_memory() -> dict[str, object]:
    """Largest memory of this process so far, in bytes: main memory, and what torch took of the GPU; None where it cannot be told."""
    found: dict[str, object] = {"peak_bytes": None, "peak_gpu_bytes": None, "gpu": None}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        at = max(range(torch.cuda.device_count()), key=torch.cuda.max_memory_allocated)
        found |= {"peak_gpu_bytes": torch.cuda.max_memory_allocated(at), "gpu": torch.cuda.get_device_name(at)}
    return found
