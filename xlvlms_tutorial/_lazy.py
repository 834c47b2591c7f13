"""Names of a package that are imported when they are first asked for: what is dear to import is paid for by those who use it."""

from collections.abc import Callable
from functools import cache
from importlib import import_module


def lazy_attributes(package: str) -> Callable[[str], object]:
    """The ``__getattr__`` of a package (PEP 562): a name comes from where the package's block ``if TYPE_CHECKING:`` imports it from.

    So editors, type checkers and this function read the same lines. No name may be that of a module beside it, which would hide it.
    """

    @cache
    def homes() -> dict[str, str]:
        import ast
        from pathlib import Path

        source = Path(import_module(package).__file__).read_text(encoding="utf-8")
        block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
        return {alias.name: statement.module for statement in block.body for alias in statement.names}

    def get(name: str) -> object:
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes()[name]), name)

    return get
