"""The adapters that are shipped: pocket LLaVA fine-tuned towards captions that dwell on place, colour or mood, and what they changed."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import peft
import torch
import transformers

from xlvlms_tutorial.data import PROMPTS, load_samples
from xlvlms_tutorial.metrics.captions import STYLE_WORDS, style_rate
from xlvlms_tutorial.metrics.uncertainty import difference
from xlvlms_tutorial.models.adapters import BASE, SHIPPED
from xlvlms_tutorial.models.finetune import fine_tune
from xlvlms_tutorial.models.loading import load
from xlvlms_tutorial.pocket.build import WEIGHTS, adapter_folder
from xlvlms_tutorial.resume import FILE

MEASURED = 100  # unseen scenes


@dataclass(frozen=True)
class LoraRecipe:
    """How an adapter is made; everything that its weights depend on besides the connector and the style."""

    steps: int = 160
    batch_size: int = 8
    learning_rate: float = 4e-3
    rank: int = 4
    seed: int = 0
    n_scenes: int = 3000
    save_at: tuple[int, ...] = ()


RECIPES = {name: LoraRecipe(save_at=(10, 20, 40, 80) if name == "pocket-place" else ()) for name in SHIPPED}


def train_adapter(name: str, progress: bool = True) -> dict:
    """Train an adapter of the table ``RECIPES``, ship its weights in fp16 and write the record beside them."""
    recipe, style = RECIPES[name], name.removeprefix("pocket-")
    vlm = load(BASE, device="cpu", dtype="bfloat16")
    samples = load_samples(f"scenes-{style}", n=recipe.n_scenes, split="train")
    history = fine_tune(
        vlm, samples, steps=recipe.steps, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate, rank=recipe.rank,
        seed=recipe.seed, folder=WEIGHTS / name, save_at=recipe.save_at, progress=progress,
    )  # fmt: skip
    (WEIGHTS / name / FILE).unlink(missing_ok=True)
    record = {
        "run": name,
        "base": BASE,
        "recipe": asdict(recipe),
        "data": {"dataset": f"scenes-{style}", "split": "train", "seed": 0},
        "loss": [round(value, 4) for value in history["loss"]],
        "seconds_per_step": round(float(np.median(history["seconds"])), 2),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)} | {"python": platform.python_version()},
    }
    (WEIGHTS / name / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def style_changes(name: str, n: int = MEASURED, dtype: str = "float32") -> pd.DataFrame:
    """Style word rates (share of words) of captions of unseen scenes, one row a style: base, adapter, their difference, its interval."""
    samples = load_samples("scenes", n=n)
    told = [_captions(adapter, samples, dtype) for adapter in (None, name)]
    rows = {}
    for style in STYLE_WORDS:
        base, tuned = (style_rate(texts, style) for texts in told)
        change = difference(tuned, base, paired=True)
        rows[style] = {"base": base.mean(), "adapter": tuned.mean(), "change": change.value, "low": change.low, "high": change.high, "n": n}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("style")


def measure_adapter(name: str) -> list[dict]:
    """Measure what an adapter's captions speak of, against the base's, in float32, and write it into the run's record."""
    table = style_changes(name).reset_index().round(4).to_dict("records")
    file = adapter_folder(name).parent / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"style_rates": table}, indent=1) + "\n")
    return table


def _captions(adapter: str | None, samples: Sequence, dtype: str) -> list[str]:
    vlm = load(BASE, device="cpu", dtype=dtype, adapter=adapter)
    pictures = [sample.image for sample in samples]
    return vlm.generate(pictures, [PROMPTS["image"]] * len(samples), max_new_tokens=48, batch_size=32)
