"""What other libraries raise at files that are damaged, of another version or not theirs, and how it is said here."""

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from xlvlms_tutorial.errors import LoadError

FAILURES = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError, StrictDataclassError)


def unreadable(what: str, cause: Exception) -> LoadError:
    """What went wrong in another library, as this package's error."""
    reason = " ".join(str(cause).split())[:300]
    return LoadError(f"{what} cannot be loaded ({type(cause).__name__}: {reason})", "correct what it names and load again")
