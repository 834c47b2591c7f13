"""The front doors: packages by name, what each offers stands in its ``__all__``."""

from tools import ROOT

PACKAGE = ROOT / "xlvlms_tutorial"
DOORS = sorted(
    ".".join(path.relative_to(ROOT).parent.parts) for path in PACKAGE.rglob("__init__.py")
)
