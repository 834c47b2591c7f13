"""Train and measure adapters towards captions that dwell on place, colour or mood.

Those shipped with pocket LLaVA, what they changed, and new ones.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

from xlvlms_tutorial.checkpoint import FILE
from xlvlms_tutorial.data import DATASETS, PROMPTS, Sample, load_samples
from xlvlms_tutorial.errors import AnnotationError, InputError
from xlvlms_tutorial.io import read_json, write_json
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.loading.adapters import BASE, SHIPPED
from xlvlms_tutorial.metrics.intervals import difference
from xlvlms_tutorial.models.finetune import fine_tune
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.pocket.build import adapter_folder
from xlvlms_tutorial.pocket.encoders import WEIGHTS
from xlvlms_tutorial.text import STYLE_WORDS, style_rate, style_share, whole_words
from xlvlms_tutorial.training.connector_runs import versions
from xlvlms_tutorial.validation import require

MEASURED = 100  # unseen scenes
# samples whose captions hold words of a style: with fewer there is nothing to fine-tune on
FEWEST = 8


@dataclass(frozen=True)
class LoraRecipe:
    """How an adapter is made: all that its weights depend on besides the connector and the style.

    The defaults are those of the shipped adapters; fewer steps or scenes are faster.

    Parameters
    ----------
    steps : int, default 160
        Training steps.
    batch_size : int, default 8
        Samples a step.
    learning_rate : float, default 4e-3
        The highest learning rate.
    rank : int, default 4
        Rank of the LoRA.
    seed : int, default 0
        Seed of the samples and of the training.
    n_scenes : int, default 3000
        Training samples drawn.
    save_at : tuple of int, default ()
        Steps at which the adapter is saved, besides the last.

    Examples
    --------
    >>> from xlvlms_tutorial.training import LoraRecipe
    >>> LoraRecipe(steps=80).steps, LoraRecipe().rank
    (80, 4)
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
    """An adapter towards a style, with the steps of its training.

    :func:`style_adapters` returns one for each style.

    Parameters
    ----------
    final : str
        The adapter as ``load(..., adapter=...)`` takes it.
    steps : mapping of int to str
        What there is of its training, by step, itself as the last; empty where it was given.

    Examples
    --------
    >>> from xlvlms_tutorial.training.adapters import StyleAdapter
    >>> StyleAdapter("pocket-mood", {160: "pocket-mood@step-0160"}).final
    'pocket-mood'
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
    """Find or train an adapter of a model for each style.

    Use it to compare a model before and after fine-tuning. The adapter of a style is the given one,
    the shipped one of pocket LLaVA, or one trained here on the captions of :func:`lessons`. A style
    of which the captions have hardly any words is left out.

    Parameters
    ----------
    model : str or path
        The model, as ``load`` takes it.
    dataset : str or path
        The dataset whose training split is used.
    styles : sequence of str
        "place", "colour" or "mood".
    folder : path
        Where the steps of training are written, one folder a style.
    given : mapping of str to str, or a single one, optional
        Folders or hub ids of adapters by style; a single one is that of the first style. By default
        none.
    recipe : LoraRecipe, optional
        How adapters are trained; by default as the shipped ones.
    without : collection of str, default ()
        Ids of samples that are not trained on.
    dtype : str, default "auto"
        The dtype in which the model is loaded for training.

    Returns
    -------
    dict of str to StyleAdapter
        The adapters by style: ``final`` as ``load(..., adapter=...)`` takes it, and ``steps``, what
        there is of its training by step (empty where it was given).

    Raises
    ------
    InputError
        If a style is unknown, or no style is left.
    LoadError
        If the model cannot be loaded, or peft is not installed.

    Examples
    --------
    >>> from xlvlms_tutorial.training import style_adapters
    >>> adapters = style_adapters("pocket-llava", "scenes", ["place", "mood"], folder="adapters")
    >>> adapters["place"].final, list(adapters["place"].steps)
    ('pocket-place', [10, 20, 40, 80, 160])
    """
    recipe = recipe or LoraRecipe()
    by_style = {styles[0]: given} if isinstance(given, (str, os.PathLike)) else given or {}
    if unknown := [style for style in (*styles, *by_style) if style not in STYLE_WORDS]:
        raise InputError(f"no style {unknown[0]!r}", f"allowed: {', '.join(STYLE_WORDS)}")
    adapters = {}
    for style in styles:
        if style in by_style:
            adapters[style] = StyleAdapter(str(by_style[style]), {})
            continue
        if str(model) == BASE:
            adapters[style] = _shipped_adapter(style)
            continue
        samples = lessons(dataset, style, recipe, without)
        if len(samples) >= FEWEST:
            of_style = Path(folder) / style
            adapters[style] = _train_style(model, style, samples, recipe, of_style, dtype)
    require(
        adapters,
        f"hardly any caption of {dataset} has words of {', '.join(styles)}",
        f"give adapters, or a dataset with {FEWEST} such captions or more",
    )
    return adapters


def lessons(
    dataset: str | Path, style: str, recipe: LoraRecipe | None = None, without: Collection[str] = ()
) -> list[Sample]:
    """Select training samples that have a caption in a style; only this caption is kept.

    Use it to fine-tune a model towards a style. There may be none.

    Parameters
    ----------
    dataset : str or path
        The dataset whose training split is used.
    style : str
        "place", "colour" or "mood".
    recipe : LoraRecipe, optional
        How many samples are drawn, and with which seed; by default 3000 with seed 0.
    without : collection of str, default ()
        Ids of samples to leave out.

    Returns
    -------
    list of Sample
        The samples, each with one caption.

    Examples
    --------
    >>> from xlvlms_tutorial.training import LoraRecipe, lessons
    >>> [len(sample.captions) for sample in lessons("scenes", "colour", LoraRecipe(n_scenes=3))]
    [1, 1, 1]
    """
    recipe = recipe or LoraRecipe()
    try:
        samples = load_samples(
            f"{dataset}-{style}", n=recipe.n_scenes, split="train", seed=recipe.seed
        )
    except AnnotationError:  # the captions have no such word
        return []
    captions = [sample.captions[0] for sample in samples]
    shares = style_share(captions, style)
    in_this_style = []
    for sample, share in zip(samples, shares, strict=True):
        if share and sample.id not in without:
            in_this_style.append(sample)
    return in_this_style


def in_style(
    samples: Sequence[Sample],
    dataset: str | Path,
    style: str,
    word: str,
    n: int = 3000,
    seed: int = 0,
) -> list[Sample]:
    """Replace the captions of samples by one caption each in a style.

    Use it to compare captions of two styles on the same pictures. The embedded world has one such
    caption a scene. Elsewhere it is the caption with most words of the style, among those with the
    word (or all, where none has it).

    Parameters
    ----------
    samples : sequence of Sample
        The samples.
    dataset : str or path
        The dataset they are from.
    style : str
        "place", "colour" or "mood".
    word : str
        A word that the caption has where it can; not used for the embedded world.
    n : int, default 3000
        For the embedded world: the samples are among the first ``n`` of the dataset.
    seed : int, default 0
        For the embedded world: the seed with which the samples were drawn.

    Returns
    -------
    list of Sample
        The same samples, each with one caption.

    Raises
    ------
    InputError
        If a sample has no caption, or is none of the first ``n``.

    Examples
    --------
    >>> from xlvlms_tutorial.training import in_style
    >>> styled = in_style(samples, "scenes", "colour", word="key", n=4)
    >>> [len(sample.captions) for sample in styled], styled[0].id == samples[0].id
    ([1, 1, 1, 1], True)
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
    if missing := [sample.id for sample in samples if not captions.get(sample.id)]:
        raise InputError(
            f"{len(missing)} samples without a caption in the style, such as {missing[0]!r}",
            "leave them out, or raise n",
        )
    styled = []
    for sample in samples:
        candidates = captions[sample.id]
        best = candidates[int(style_rate(candidates, style).argmax())]
        styled.append(replace(sample, captions=(best,)))
    return styled


def _shipped_adapter(style: str) -> StyleAdapter:
    name = f"pocket-{style}"
    recipe = RECIPES[name]
    steps = (*recipe.save_at, recipe.steps)
    return StyleAdapter(name, {step: f"{name}@step-{step:04d}" for step in steps})


def _train_style(
    model: str | os.PathLike,
    style: str,
    samples: list[Sample],
    recipe: LoraRecipe,
    folder: Path,
    dtype: str,
) -> StyleAdapter:
    """Train an adapter on samples in a style, with the steps to keep on the way."""
    vlm = load(model, dtype=dtype)
    last = recipe.steps
    checkpoints = sorted({step for step in recipe.save_at if step < last})
    _fit(vlm, samples, replace(recipe, save_at=tuple(checkpoints)), folder)
    steps = {step: str(folder / f"step-{step:04d}") for step in (*checkpoints, last)}
    return StyleAdapter(steps[last], steps)


def _fit(
    vlm: VLM, samples: list[Sample], recipe: LoraRecipe, folder: Path, progress: bool = False
) -> pd.DataFrame:
    return fine_tune(
        vlm,
        samples,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        rank=recipe.rank,
        seed=recipe.seed,
        folder=folder,
        save_at=recipe.save_at,
        progress=progress,
    )


def train_adapter(name: str, progress: bool = True) -> dict:
    """Train an adapter of the table ``RECIPES``, and ship its weights in float16.

    The record is written beside them.
    """
    recipe = RECIPES[name]
    style = name.removeprefix("pocket-")
    vlm = load(BASE, device="cpu", dtype="bfloat16")
    samples = load_samples(f"scenes-{style}", n=recipe.n_scenes, split="train")
    history = _fit(vlm, samples, recipe, WEIGHTS / name, progress)
    (WEIGHTS / name / FILE).unlink(missing_ok=True)
    import peft  # loaded by now, without its warnings: see import_peft

    record = {"run": name, "base": BASE, "recipe": asdict(recipe)}
    record["data"] = {"dataset": f"scenes-{style}", "split": "train", "seed": 0}
    record["loss"] = [round(value, 4) for value in history["loss"]]
    record["seconds_per_step"] = round(float(np.median(history["seconds"])), 2)
    record["versions"] = versions(torch, transformers, peft)
    write_json(WEIGHTS / name / "training.json", record, indent=1)
    return record


def style_changes(name: str, n: int = MEASURED, dtype: str = "float32") -> pd.DataFrame:
    """Compare how much captions of unseen scenes speak of each style, with and without an adapter.

    Parameters
    ----------
    name : str
        The adapter.
    n : int
        Scenes that are captioned; by default 100.
    dtype : str, default "float32"
        The dtype of the model.

    Returns
    -------
    pandas.DataFrame
        One row a style; columns base and adapter (the share of words that speak of it), change,
        low, high and n.
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
