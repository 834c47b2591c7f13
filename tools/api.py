"""Write the API pages from what the front doors offer (``__all__``), a page a subject.

``python -m tools.api``. A page has a table with the first sentence of each docstring, and below it
the docstrings whole, as Sphinx reads them.
"""

import ast
import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tools import ROOT

PACKAGE = "xlvlms_tutorial"
FRONT_PAGE = ROOT / "book" / "reference" / "api.md"
FOLDER = ROOT / "book" / "reference" / "api"
# Each subject's door and title, in the order of the pages
SUBJECTS = {
    "data": "Data",
    "loading": "Loading models",
    "models": "Models",
    "activations": "Activations",
    "interventions": "Interventions",
    "methods.alignment": "Methods: alignment",
    "methods.logit_lens": "Methods: the logit lens",
    "methods.concepts": "Methods: concepts",
    "methods.attribution": "Methods: attribution",
    "methods.steering": "Methods: steering",
    "methods.decoding": "Methods: contrastive decoding",
    "methods.connectors": "Methods: connectors",
    "methods.in_context": "Methods: in-context learning",
    "methods.dropping": "Methods: image tokens left out",
    "methods.shift": "Methods: fine-tuning shift",
    "methods.merging": "Methods: merging",
    "methods.skipping": "Methods: skipping",
    "methods.pruning": "Methods: pruning",
    "metrics": "Metrics",
    "claims": "Claims",
    "batch": "Batches",
    "view": "Figures and widgets",
    "pocket": "The pocket world and its model",
    "training": "How the shipped weights were made",
    "tutorials": "What chapters need",
    "errors": "Errors",
}
INTRODUCTION = """\
# API

What the package offers, it offers at its front doors: `xlvlms_tutorial` itself, where most uses
start, and a package a subject. Nothing else is public. `python -m tools.api` writes these pages.
"""


class Public(NamedTuple):
    """A public name: what it is, and the module and name under which it is defined."""

    name: str
    what: object
    module: str
    there: str


@cache
def statements(module: str) -> list[ast.stmt]:
    """The statements of a module of the package, those that only type checkers read among them."""
    body = ast.parse(Path(import_module(module).__file__).read_text(encoding="utf-8")).body
    return body + [inner for node in body if isinstance(node, ast.If) for inner in node.body]


def home(module: str, name: str) -> tuple[str, str]:
    """The module and the name under which that is defined which a module offers.

    No name if it is a module itself.
    """
    imports = [
        node
        for node in statements(module)
        if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE)
    ]
    for origin, alias in [(node.module, alias) for node in imports for alias in node.names]:
        if name == (alias.asname or alias.name):
            is_module = isinstance(getattr(import_module(origin), alias.name), ModuleType)
            return (f"{origin}.{alias.name}", "") if is_module else home(origin, alias.name)
    return module, name


def offered(module: str) -> Iterator[Public]:
    """What a module offers: what it lists, or the functions and classes that it defines."""
    found = import_module(module)
    defined = [
        name
        for name, what in vars(found).items()
        if getattr(what, "__module__", "") == module and not name.startswith("_")
    ]
    for name in getattr(found, "__all__", None) or defined:
        yield Public(name, getattr(found, name), *home(module, name))


def sentence(text: str) -> str:
    """The first sentence of a docstring."""
    first = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
    return re.match(r".*?[.!?](?= |$)(?<!e\.g\.)(?<!i\.e\.)|.*", first)[0]


def constant(public: Public) -> str:
    """What the comment above the definition of a constant says.

    Without one, the definition, if it is short.
    """
    of = [
        node for node in statements(public.module) if isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    node = next(
        node
        for node in of
        if public.there
        in [
            getattr(to, "id", "")
            for to in getattr(node, "targets", [getattr(node, "target", None)])
        ]
    )
    lines = (
        Path(import_module(public.module).__file__)
        .read_text(encoding="utf-8")
        .splitlines()[: node.lineno - 1]
    )
    above = [
        line.lstrip("#: ")
        for line in itertools.takewhile(lambda line: line.startswith("#"), reversed(lines))
    ]
    said, value = " ".join(reversed(above)), ast.unparse(node.value)
    return said[:1].upper() + said[1:] or (
        f"``{value}``" if len(value) <= 120 else f"A {type(public.what).__name__}."
    )


def about(public: Public) -> str:
    """One sentence about a name."""
    return sentence(
        public.what.__doc__
        if callable(public.what) or isinstance(public.what, ModuleType)
        else constant(public)
    )


def role(public: Public) -> str:
    """A link to where a name is documented."""
    if isinstance(public.what, ModuleType):
        return f":mod:`{public.name} <{public.module}>`"
    kind = "class" if isinstance(public.what, type) else "func" if callable(public.what) else "data"
    return f":{kind}:`{public.name} <{public.module}.{public.there}>`"


def table(names: list[Public]) -> list[str]:
    """A table of names and first sentences."""
    rows = [
        line for public in names for line in (f"   * - {role(public)}", f"     - {about(public)}")
    ]
    return [".. list-table::", "   :widths: 30 70", "", *rows, ""]


def documented(public: Public, elsewhere: Iterable[str] = ()) -> list[str]:
    """The docstring of a name, whole.

    Of a module, those of what it defines without the names that are documented elsewhere.
    """
    path = f"{public.module}.{public.there}"
    if isinstance(public.what, ModuleType):
        without = [f"   :exclude-members: {', '.join(elsewhere)}"] if elsewhere else []
        return [f".. automodule:: {public.module}", "   :members:", *without, ""]
    if isinstance(public.what, type):
        made = [
            (
                "   :exclude-members: set_fit_request, set_transform_request, "
                "set_inverse_transform_request"
            )
        ]
        return [
            f".. autoclass:: {path}",
            "   :members:",
            *(made if hasattr(public.what, "set_fit_request") else []),
            "",
        ]
    if callable(public.what):
        return [f".. autofunction:: {path}", ""]
    return [
        f".. data:: {public.there}",
        f"   :module: {public.module}",
        "",
        f"   {constant(public)}",
        "",
    ]


def rst(lines: list[str]) -> str:
    """Lines of reStructuredText for a page in MyST."""
    return "\n".join(["```{eval-rst}", *lines]).rstrip() + "\n```\n"


def page(door: str, seen: set[tuple[str, str]]) -> str:
    """The page of a subject; what other pages have already is only in its table."""
    names = list(offered(f"{PACKAGE}.{door}"))
    new = [public for public in names if (public.module, public.there) not in seen]
    seen.update((public.module, public.there) for public in new)
    head = [f".. automodule:: {PACKAGE}.{door}", "   :no-members:", ""]
    shown = (
        f"from {PACKAGE}.{door} import ..."
        if hasattr(import_module(f"{PACKAGE}.{door}"), "__path__")
        else f"from {PACKAGE} import {door}"
    )
    parts = [f"# {SUBJECTS[door]}\n", f"`{shown}`\n", rst([*head, *table(names)])]
    values = [public for public in new if not isinstance(public.what, ModuleType)]
    if values:
        parts.append(rst([line for public in values for line in documented(public)]))
    for public in new:
        if public not in values:
            inside = [one for one in offered(public.module) if one.module == public.module]
            elsewhere = [one.there for one in inside if (one.module, one.there) in seen]
            seen.update((one.module, one.there) for one in inside)
            parts += [
                f"## `{public.name}`\n",
                rst([*table(inside), *documented(public, elsewhere)]),
            ]
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """Every page with its text."""
    seen: set[tuple[str, str]] = set()
    made = {
        FOLDER / f"{door.rpartition('.')[2].replace('_', '-')}.md": page(door, seen)
        for door in SUBJECTS
    }
    names = list(offered(PACKAGE))
    doors = {f"{PACKAGE}.{door}" for door in SUBJECTS}
    here = [one for one in names if (one.module, one.there) not in seen and one.module not in doors]
    front = rst([*table(names), *(line for public in here for line in documented(public))])
    links = "".join(
        f"- [{title}](api/{file.name})\n"
        for file, title in zip(made, SUBJECTS.values(), strict=True)
    )
    return {FRONT_PAGE: f"{INTRODUCTION}\n{front}\n{links}"} | made


def main() -> int:
    """Write the pages, and take away those of subjects that are gone."""
    made = pages()
    FOLDER.mkdir(exist_ok=True)
    for old in set(FOLDER.glob("*.md")) - set(made):
        old.unlink()
    for file, text in made.items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
