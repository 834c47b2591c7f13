"""Files that are whole or absent: text, JSON, tensors with metadata; and what made a result."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkstemp
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from xlvlms_tutorial.errors import FileError, damaged_record, not_written

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_PACKAGES = (
    "xlvlms_tutorial",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pandas",
    "scikit-learn",
)

FOLDER_VARIABLE = "XLVLMS_CLAIMS"  # where records of claims go


def default_folder() -> Path:
    """Return the folder for records of claims.

    ``$XLVLMS_CLAIMS``, else ``_build/claims`` of the book around the working
    directory, else of that directory.
    """
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    return build_folder() / "claims"


def build_folder() -> Path:
    """Return the folder into which runs, results and the built book go.

    Returns
    -------
    Path
        ``_build`` of the book around the working directory, else of that directory.

    Examples
    --------
    >>> from xlvlms_tutorial.io import build_folder
    >>> build_folder().name
    '_build'
    """
    working = Path.cwd()
    for folder in (working, *working.parents):
        if (folder / "_config.yml").exists() and (folder / "_toc.yml").exists():
            return folder / "_build"
    return working / "_build"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on.

    Returns
    -------
    dict of str to str
        The version by name; "source" for this package where it runs uninstalled, "absent" for
        others.

    Examples
    --------
    >>> list(versions())[:3]
    ['python', 'xlvlms_tutorial', 'torch']
    """
    result = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "source" if name == "xlvlms_tutorial" else "absent"
    return result


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give an empty file beside ``path`` to write to, which takes its place when the block ends.

    A reader finds the old file or the whole new one, also when the writer is killed. Where the
    block fails, the old file stays. The folder is made where it is missing, and the new file may be
    read by everybody.

    Parameters
    ----------
    path : str or Path
        The file to write or to replace.

    Yields
    ------
    Path
        The draft: a hidden file in the same folder, with a name of its own for each writer.

    Raises
    ------
    OSError
        If the file cannot be written, as the system says it; the functions that write whole files
        make ``FileError`` of it.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> path = Path(mkdtemp()) / "words.txt"
    >>> with replacing(path) as draft:
    ...     _ = draft.write_text("a key", encoding="utf-8")
    >>> path.read_text(encoding="utf-8")
    'a key'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # temporary files are private; results need not be
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file by a function that takes a path; it is whole or absent, see :func:`replacing`.

    Parameters
    ----------
    path : str or Path
        The file to write or to replace.
    write : callable
        Called with the path of the draft, to which it writes; what it returns does not matter.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileError
        If the file cannot be written.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> path = write_atomically(Path(mkdtemp()) / "a", lambda draft: draft.write_bytes(b"01"))
    >>> path.read_bytes()
    b'01'
    """
    path = Path(path)
    try:
        with replacing(path) as draft:
            write(draft)
    except OSError as cause:
        raise not_written(path, cause.strerror or cause) from cause
    return path


def write_utf8(path: str | Path, text: str) -> Path:
    """Write a text file in UTF-8; it is whole or absent.

    Parameters
    ----------
    path : str or Path
        The file to write or to replace.
    text : str
        What it holds. Half of a surrogate pair, as in names of files that are no UTF-8, is written
        as its number.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileError
        If the file cannot be written.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> write_utf8(Path(mkdtemp()) / "a.txt", "a key").read_text(encoding="utf-8")
    'a key'
    """
    return write_atomically(
        path, lambda draft: draft.write_text(text, encoding="utf-8", errors="backslashreplace")
    )


def as_json(content: object, indent: int = 2) -> str:
    r"""Convert a result to strict JSON text, indented.

    Parameters
    ----------
    content : object
        What JSON knows: no NaN and no infinity.
    indent : int, default 2
        Blanks a level.

    Returns
    -------
    str
        The text, with a line break at its end.

    Raises
    ------
    ValueError
        If the content holds NaN or infinity, which JSON does not know.

    Examples
    --------
    >>> as_json({"n": None})
    '{\n  "n": null\n}\n'
    """
    return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, content: object, indent: int = 2) -> Path:
    """Write a result as JSON; the file is whole or absent, see :func:`replacing`.

    Parameters
    ----------
    path : str or Path
        The file to write or to replace.
    content : object
        What JSON knows: no NaN and no infinity.
    indent : int, default 2
        Blanks a level.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileError
        If the file cannot be written.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> read_json(write_json(Path(mkdtemp()) / "a.json", {"n": [1, None]}))
    {'n': [1, None]}
    """
    # where write_utf8 puts the number of half of a surrogate pair, JSON reads it as the same half
    return write_utf8(path, as_json(content, indent))


def read_json(path: str | Path) -> Any:
    """Read the content of a JSON file.

    Parameters
    ----------
    path : str or Path
        A file in UTF-8.

    Returns
    -------
    dict, list, str, int, float, bool or None
        What it holds.

    Raises
    ------
    OSError, ValueError, RecursionError
        If it cannot be read, is no JSON, or is nested too deep; of
        results, :func:`reading` says it.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> read_json(write_utf8(Path(mkdtemp()) / "a.json", "[1, true]"))
    [1, True]
    """
    return json.loads(Path(path).read_text(encoding="utf-8"))


@contextmanager
def reading(source: object, problem: str) -> Iterator[None]:
    """Report whatever fails in a block that reads a file's content as damage of the file.

    Parameters
    ----------
    source : object
        The file, for the message.
    problem : str
        What the file is not, such as "no plan of a batch".

    Raises
    ------
    FileError
        If the file is missing, or its content is not of the form that the block expects.

    Examples
    --------
    >>> with reading("a.json", "no list"):
    ...     words = {}["words"]  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    xlvlms_tutorial.errors.FileError: a.json: no list (KeyError: 'words'); correct it, or ...
    """
    try:
        yield
    except FileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise damaged_record(source, f"{problem} ({type(cause).__name__}: {cause})") from cause


def write_sealed(path: str | Path, content: dict[str, object]) -> Path:
    """Write a result as :func:`write_json` does, with a digest of its content as "sha256".

    Parameters
    ----------
    path : str or Path
        The file to write or to replace.
    content : dict
        What JSON knows: no NaN and no infinity.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileError
        If the file cannot be written.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> read_sealed(write_sealed(Path(mkdtemp()) / "a.json", {"n": 3}))
    {'n': 3}
    """
    return write_json(path, content | {"sha256": digest(content)})


def read_sealed(path: str | Path) -> dict[str, object]:
    """Read the content of a file of :func:`write_sealed`, without its digest.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    dict
        What was written.

    Raises
    ------
    FileError
        If the file is missing, cut off, or not what was written.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> read_sealed(write_sealed(Path(mkdtemp()) / "a.json", {"n": 3}))
    {'n': 3}
    """
    with reading(path, "not a whole results file"):
        content = read_json(path)
        stated = content.pop("sha256")
        computed = digest(content)  # of what is left
    if stated != computed:
        raise damaged_record(path, "its content is not what was written (its digest differs)")
    return content


def digest(content: object, ensure_ascii: bool = True) -> str:
    """Compute the sha256 of what JSON knows, the same for the same content in any order of keys.

    Parameters
    ----------
    content : object
        What is digested, as JSON with sorted keys.
    ensure_ascii : bool, default True
        Whether letters beyond ASCII are digested as their numbers or, if False, as UTF-8: the
        digests differ.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    ValueError
        If the content holds NaN or infinity.

    Examples
    --------
    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, allow_nan=False, ensure_ascii=ensure_ascii)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """Compute the sha256 of a file's bytes, read in pieces.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> file_digest(write_utf8(Path(mkdtemp()) / "empty", ""))[:12]
    'e3b0c44298fc'
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, "Tensor | np.ndarray"],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write tensors and metadata to one file of safetensors, which :func:`load_tensors` reads.

    The file is whole or absent, see :func:`replacing`.

    Parameters
    ----------
    path : str or Path
        The file to write or to replace.
    tensors : mapping of str to Tensor or ndarray
        Tensors of torch or arrays of NumPy, one kind in a file, of any shapes and of the dtypes
        that safetensors has. Tensors must not share memory.
    metadata : mapping of str to str, optional
        What the file says of itself, such as the kind and version of its content.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileError
        If the file cannot be written.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> import numpy as np
    >>> path = Path(mkdtemp()) / "a.safetensors"
    >>> _ = save_tensors(path, {"x": np.arange(3)}, {"format": "numbers 1"})
    >>> load_tensors(path, framework="np")
    ({'x': array([0, 1, 2])}, {'format': 'numbers 1'})
    """
    import numpy as np  # here: most commands that write records need neither

    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file

        ready = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    else:
        from safetensors.torch import save_file

        ready = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(draft: Path) -> None:
        try:
            save_file(ready, draft, metadata and dict(metadata))
        except SafetensorError as cause:  # such as a full disk, which safetensors passes on as text
            raise OSError(str(cause)) from cause

    return write_atomically(path, write)


def load_tensors(path: str | Path, framework: str = "pt") -> tuple[dict[str, Any], dict[str, str]]:
    """Read the tensors of a file of safetensors by name, and its metadata.

    What kind of file it is, and whether its content is whole, is for the caller to say.

    Parameters
    ----------
    path : str or Path
        A file that :func:`save_tensors` or another library wrote.
    framework : {"pt", "np"}, default "pt"
        Whether to give tensors of torch or arrays of NumPy.

    Returns
    -------
    tensors : dict of str to Tensor or ndarray
        Of the stored shapes and dtypes, on the CPU.
    metadata : dict of str to str
        Empty where the file has none.

    Raises
    ------
    OSError
        If there is no such file, or it is damaged, no file of safetensors, or of a dtype that the
        framework does not have.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> import torch
    >>> path = save_tensors(Path(mkdtemp()) / "a.safetensors", {"x": torch.ones(2)})
    >>> tensors, metadata = load_tensors(path)
    >>> tensors["x"], metadata
    (tensor([1., 1.]), {})
    """
    try:
        with safe_open(path, framework) as file:
            return file.get_tensors(), file.metadata() or {}
    except (SafetensorError, TypeError) as cause:  # TypeError: NumPy has no bfloat16
        raise OSError(str(cause)) from cause


def output_of(*command: str, folder: str | Path | None = None, seconds: float = 10) -> str:
    """Return what a command writes, nothing where it cannot be run.

    Parameters
    ----------
    *command : str
        The program and its arguments.
    folder : str or Path, optional
        Where it is run; by default in the working directory.
    seconds : float, default 10
        After which it is given up.

    Returns
    -------
    str
        Its standard output.

    Examples
    --------
    >>> output_of("a-program-that-is-not-there")
    ''
    """
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout


def peak_memory() -> dict[str, object]:
    """Return the largest memory of this process so far, in bytes.

    Returns
    -------
    dict of str to object
        peak_bytes, of main memory; peak_gpu_bytes, what torch took of the GPU that it filled most;
        gpu, the name of that GPU. None where it cannot be told.

    Examples
    --------
    >>> list(peak_memory())
    ['peak_bytes', 'peak_gpu_bytes', 'gpu']
    """
    result: dict[str, object] = {"peak_bytes": None, "peak_gpu_bytes": None, "gpu": None}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device = max(range(torch.cuda.device_count()), key=torch.cuda.max_memory_allocated)
        result |= {
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(device),
            "gpu": torch.cuda.get_device_name(device),
        }
    return result
