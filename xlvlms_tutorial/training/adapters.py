"""Adapters towards captions that dwell on place, colour or mood.

Those shipped with pocket LLaVA, what they changed, and new ones.
"""

import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

from xlvlms_tutorial.checkpoint import FILE
from xlvlms_tutorial.data import DATASETS, PROMPTS, Sample, load_samples
from xlvlms_tutorial.errors import AnnotationError, SelectionError
from xlvlms_tutorial.io import read_json, write_json
from xlvlms_tutorial.metrics.intervals import difference
from xlvlms_tutorial.models.adapters import BASE, SHIPPED
from xlvlms_tutorial.models.finetune import fine_tune
from xlvlms_tutorial.models.loading import load
from xlvlms_tutorial.pocket.build import adapter_folder
from xlvlms_tutorial.pocket.encoders import WEIGHTS
from xlvlms_tutorial.text import STYLE_WORDS, style_rate, style_share, whole_words

MEASURED = 100  # unseen scenes
# samples whose captions hold words of a style: with fewer there is nothing to fine-tune on
FEWEST = 8


@dataclass(frozen=True)
class LoraRecipe:
    """How an adapter is made.

    Everything that its weights depend on besides the connector and the style.
    """

    steps: int = 160
    batch_size: int = 8
    learning_rate: float = 4e-3
    rank: int = 4
    seed: int = 0
    n_scenes: int = 3000
    save_at: tuple[int, ...] = ()


RECIPES = {
    name: LoraRecipe(save_at=(10, 20, 40, 80) if name == "pocket-place" else ()) for name in SHIPPED
}


@dataclass(frozen=True)
class StyleAdapter:
    """An adapter towards a style as ``load(..., adapter=...)`` takes it.

    And what there is of its training, by step, itself as the last.
    """

    final: str
    steps: Mapping[int, str]


def style_adapters(
    model: str | os.PathLike,
    dataset: str | Path,
    styles: Sequence[str],
    folder: str | Path,
    *,
    given: Mapping[str, str] | str | os.PathLike | None = None,
    recipe: LoraRecipe | None = None,
    without: Collection[str] = (),
    dtype: str = "auto",
) -> dict[str, StyleAdapter]:
    """An adapter of the model for each style.

    The one given, the shipped one of pocket LLaVA, or one trained here. ``given`` maps styles to
    folders or hub ids; a single one is that of the first style. Training takes the captions of
    :func:`lessons` and ``recipe``, and writes its steps under ``folder``. A style of which the
    captions have no words is left out.

    Raises
    ------
    SelectionError
        If a style is unknown, or no style is left.
    LoadError
        If the model cannot be loaded, or peft is not installed.
    """
    given = {styles[0]: given} if isinstance(given, (str, os.PathLike)) else given or {}
    if unknown := [style for style in (*styles, *given) if style not in STYLE_WORDS]:
        raise SelectionError(f"no style {unknown[0]!r}", f"allowed: {', '.join(STYLE_WORDS)}")
    adapters = {}
    for style in styles:
        if style in given:
            adapters[style] = StyleAdapter(str(given[style]), {})
        elif str(model) == BASE:
            adapters[style] = _shipped(style)
        elif len(samples := lessons(dataset, style, recipe or LoraRecipe(), without)) >= FEWEST:
            adapters[style] = _trained(
                model, style, samples, recipe or LoraRecipe(), Path(folder) / style, dtype
            )
    if not adapters:
        advice = f"give adapters, or a dataset with {FEWEST} such captions or more"
        raise SelectionError(
            f"hardly any caption of {dataset} has words of {', '.join(styles)}", advice
        )
    return adapters


def lessons(
    dataset: str | Path, style: str, recipe: LoraRecipe | None = None, without: Collection[str] = ()
) -> list[Sample]:
    """Training samples that have a caption in a style, each with this caption.

    Of a dataset's training split, with words of the style, without those ids. There may be none.
    ``recipe`` says how many are drawn, and with which seed.
    """
    recipe = recipe or LoraRecipe()
    try:
        samples = load_samples(
            f"{dataset}-{style}", n=recipe.n_scenes, split="train", seed=recipe.seed
        )
    except AnnotationError:  # the captions have no such word
        return []
    shares = style_share([sample.captions[0] for sample in samples], style)
    return [
        sample
        for sample, share in zip(samples, shares, strict=True)
        if share and sample.id not in without
    ]


def in_style(
    samples: Sequence[Sample],
    dataset: str | Path,
    style: str,
    word: str,
    n: int = 3000,
    seed: int = 0,
) -> list[Sample]:
    """The same samples, each with one caption in a style.

    The embedded world has one (of its first ``n`` samples). Elsewhere it is the caption with most
    words of the style, among those with the word (or all, where none has it).

    Raises
    ------
    SelectionError
        If a sample has no caption, or is none of the first ``n``.
    """
    name = f"{dataset}-{style}"
    if name in DATASETS:
        captions = {sample.id: sample.captions for sample in load_samples(name, n=n, seed=seed)}
    else:
        pattern = whole_words([word], any_case=False)
        captions = {}
        for sample in samples:
            with_word = [text for text in sample.captions if pattern.search(text)]
            captions[sample.id] = with_word or sample.captions
    if silent := [sample.id for sample in samples if not captions.get(sample.id)]:
        raise SelectionError(
            f"{len(silent)} samples without a caption in the style, such as {silent[0]!r}",
            "leave them out, or raise n",
        )
    return [
        replace(s, captions=(captions[s.id][int(style_rate(captions[s.id], style).argmax())],))
        for s in samples
    ]


def _shipped(style: str) -> StyleAdapter:
    name = f"pocket-{style}"
    recipe = RECIPES[name]
    return StyleAdapter(
        name, {step: f"{name}@step-{step:04d}" for step in (*recipe.save_at, recipe.steps)}
    )


def _trained(
    model: str | os.PathLike,
    style: str,
    samples: list[Sample],
    recipe: LoraRecipe,
    folder: Path,
    dtype: str,
) -> StyleAdapter:
    vlm = load(model, dtype=dtype)
    checkpoints = sorted({step for step in recipe.save_at if step < recipe.steps})
    fine_tune(
        vlm,
        samples,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        rank=recipe.rank,
        seed=recipe.seed,
        folder=folder,
        save_at=checkpoints,
    )
    steps = {step: str(folder / f"step-{step:04d}") for step in (*checkpoints, recipe.steps)}
    return StyleAdapter(steps[recipe.steps], steps)


def train_adapter(name: str, progress: bool = True) -> dict:
    """Train an adapter of the table ``RECIPES`` and ship its weights in fp16.

    The record is written beside them.
    """
    recipe = RECIPES[name]
    style = name.removeprefix("pocket-")
    vlm = load(BASE, device="cpu", dtype="bfloat16")
    samples = load_samples(f"scenes-{style}", n=recipe.n_scenes, split="train")
    history = fine_tune(
        vlm,
        samples,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        rank=recipe.rank,
        seed=recipe.seed,
        folder=WEIGHTS / name,
        save_at=recipe.save_at,
        progress=progress,
    )
    (WEIGHTS / name / FILE).unlink(missing_ok=True)
    import peft  # loaded by now, without its warnings: see import_peft

    record = {
        "run": name,
        "base": BASE,
        "recipe": asdict(recipe),
        "data": {"dataset": f"scenes-{style}", "split": "train", "seed": 0},
        "loss": [round(value, 4) for value in history["loss"]],
        "seconds_per_step": round(float(np.median(history["seconds"])), 2),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)}
        | {"python": platform.python_version()},
    }
    write_json(WEIGHTS / name / "training.json", record, indent=1)
    return record


def style_changes(name: str, n: int = MEASURED, dtype: str = "float32") -> pd.DataFrame:
    """Style word rates (share of words) of captions of unseen scenes, one row a style.

    Base, adapter, their difference, its interval.
    """
    samples = load_samples("scenes", n=n)
    captions = [_captions(adapter, samples, dtype) for adapter in (None, name)]
    rows = {}
    for style in STYLE_WORDS:
        base, tuned = (style_rate(texts, style) for texts in captions)
        change = difference(tuned, base, paired=True)
        rows[style] = {
            "base": base.mean(),
            "adapter": tuned.mean(),
            "change": change.value,
            "low": change.low,
            "high": change.high,
            "n": n,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("style")


def measure_adapter(name: str) -> list[dict]:
    """Measure what an adapter's captions speak of, against the base's, in float32.

    It is written into the run's record.
    """
    table = style_changes(name).reset_index().round(4).to_dict("records")
    file = adapter_folder(name).parent / "training.json"
    write_json(file, read_json(file) | {"style_rates": table}, indent=1)
    return table


def _captions(adapter: str | None, samples: Sequence, dtype: str) -> list[str]:
    vlm = load(BASE, device="cpu", dtype=dtype, adapter=adapter)
    pictures = [sample.image for sample in samples]
    return vlm.generate(
        pictures, [PROMPTS["image"]] * len(samples), max_new_tokens=48, batch_size=32
    )
