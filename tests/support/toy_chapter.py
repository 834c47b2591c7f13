"""A chapter that runs in a second.

It measures what it is told to, fails or dies when asked to, and needs no model.
"""

from pathlib import Path

FRONT = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
    format_version: 0.13
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
PARAMETERS = """model = "pocket-llava"
dataset = "scenes"
n_samples = 4
seed = 0
effect = 0.5
end = ""
layers, wide = (1, 2), range(2, 8, 2)
share: float = 0.5
names = {"a": "b"}
computed = 2 * 3
"""
# The record is written by hand, since to import what writes records takes longer than all the rest
BODY = """
import json, os, sys
from pathlib import Path

if end == "raise":
    raise ValueError("asked \\x1b[31mto\\x1b[0m fail")
if end == "die":
    os._exit(9)
key = {"id": "IMA-1", "chapter": "toy", "model": model, "dataset": dataset, "seeds": [seed]}
value = effect + seed / 100
measured = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n_samples}
measured |= {"variant": "", "verdict": "confirmed", "versions": {}}
measured |= {"against": "chance", "interval_over": "pictures", "choice": "fixed", "scale": "pocket"}
folder = Path(os.environ["XLVLMS_CLAIMS"])
folder.mkdir(parents=True)
(folder / "toy.json").write_text(json.dumps(key | measured))
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], Path.cwd().name)
"""


def toy_chapter(folder: Path, name: str = "toy", body: str = BODY) -> Path:
    """Write the chapter into a folder and return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = (
        "# Toy\n"
        "\n"
        "```{code-cell} ipython3\n"
        ":tags: [parameters]\n"
        f"{PARAMETERS}```\n"
        "\n"
        "```{code-cell} ipython3\n"
        f"{body.strip()}\n"
        "```\n"
    )
    file = folder / f"{name}.md"
    file.write_text(FRONT + cells, encoding="utf-8")
    return file
