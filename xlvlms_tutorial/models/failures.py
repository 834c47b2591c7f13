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


def unreadable(what: str, cause: Exception) -> LoadError:
    """Return this package's error for what went wrong in another library."""
    return LoadError(
        f"{what} cannot be loaded ({reason(cause)})", "correct what it names and load again"
    )


def reason(cause: Exception) -> str:
    """Return what another library says, in one line."""
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
