"""Names of a package that are imported when they are first asked for.

What is dear to import is paid for by those who use it.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module


def lazy_attributes(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Names come from where its block ``if TYPE_CHECKING:`` imports them from. So editors, type
    checkers and these functions read the same lines. What the block imports from the package itself
    is a module of it. No other name may be that of a module beside it, which would hide it.
    """

    @cache
    def homes() -> dict[str, tuple[str, str]]:
        import ast
        from pathlib import Path

        source = Path(import_module(package).__file__).read_text(encoding="utf-8")
        block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
        by_name = {}
        for statement in block.body:
            for alias in statement.names:
                by_name[alias.asname or alias.name] = (statement.module, alias.name)
        return by_name

    def get(name: str) -> object:
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes()[name]
        if module == package:
            return import_module(f"{package}.{attribute}")
        return getattr(import_module(module), attribute)

    return get, lambda: sorted({*vars(import_module(package)), *homes()})
