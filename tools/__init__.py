"""What builds the book.

Kept out of the package, run with ``python -m tools.NAME`` from the root.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
