"""Put the common first cell into chapters.

``python -m tools.first_cell book/NAME.md ...`` (all of the contents by default).
"""

import re
import sys

from tools import ROOT
from tools.chapters import FIRST_CELL, notebooks

BLOCK = f"```{{code-cell}} ipython3\n:tags: [remove-cell, first-cell]\n\n{FIRST_CELL}\n```\n"
_OLD = re.compile(
    r"^```\{code-cell\} ipython3\n:tags: \[remove-cell, first-cell\]\n.*?^```\n", re.S | re.M
)
_FRONT = re.compile(r"\A---\n.*?^---\n", re.S | re.M)


def with_first_cell(text: str) -> str:
    """The page with the first cell in its place.

    Where it stood, or a line ``FIRSTCELL`` asks for it, or after the front matter.
    """
    text = text.replace("\nFIRSTCELL\n", f"\n{BLOCK}")
    if _OLD.search(text):
        return _OLD.sub(lambda _: BLOCK, text, count=1)
    front = _FRONT.match(text)
    if front is None:
        raise SystemExit(
            "a chapter starts with front matter that names its kernel; see CONTRIBUTING.md"
        )
    return f"{front[0]}\n{BLOCK}\n{text[front.end() :].lstrip()}"


def main() -> None:
    """Rewrite the pages named on the command line, or all."""
    for page in [ROOT / name for name in sys.argv[1:]] or notebooks():
        page.write_text(with_first_cell(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
