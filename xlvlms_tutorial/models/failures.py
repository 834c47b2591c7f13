"""What other libraries raise at files that are not as they should be, and how it is reported.

Such files are damaged, of another version or not theirs.
"""

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from xlvlms_tutorial.errors import LoadError

FAILURES = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ImportError,
    ArithmeticError,
    SafetensorError,
    StrictDataclassError,
)


def require(condition: bool, problem: str, advice: str) -> None:
    """Refuse to load something unless a ``condition`` holds.

    ``problem`` says what is wrong otherwise, ``advice`` what to do.

    Raises
    ------
    LoadError
        With both.
    """
    if not condition:
        raise LoadError(problem, advice)


def require_installed(package: str, available: bool, purpose: str, then: str) -> None:
    """Refuse a ``purpose`` that needs a package which is not ``available``.

    ``then`` tells what to do once the package is installed.

    Raises
    ------
    LoadError
        With the package.
    """
    message = f"{purpose} needs {package}, which is not installed"
    require(available, message, f"pip install {package} and {then}")


def unreadable(name: str, cause: Exception) -> LoadError:
    """Return this package's error for what went wrong in another library."""
    return LoadError(
        f"{name} cannot be loaded ({reason(cause)})", "correct what it names and load again"
    )


def reason(cause: Exception) -> str:
    """Return what another library says, in one line."""
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
