"""Trace an answer back to the picture: pairs of pictures, spans, knocked out windows, bands.

The chapter "Where does the answer fetch the picture?" uses this.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from xlvlms_tutorial.data import Question, Sample, load_samples
from xlvlms_tutorial.data.pocket import counterfactual_samples
from xlvlms_tutorial.interventions import PatchingGrid, knock_out
from xlvlms_tutorial.interventions.overrides import Positions
from xlvlms_tutorial.metrics import Estimate, bootstrap, difference, proportion
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.validation import require

_CANDIDATES = 40  # scenes that are looked at for each pair that is wanted
_CHANGED = 0.02  # the share of a cell's pixels from which on it shows something else


class Pair(NamedTuple):
    """A question, and two pictures with different answers to it.

    Parameters
    ----------
    kind : str
        The type of the question, such as "colour".
    question : str
        Its text.
    clean, corrupt : PIL.Image.Image
        The picture that is asked about, and one in which the fact is another.
    answers : (str, str)
        The right answer to either; "" where it is not known.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tracing import make_pairs
    >>> (pair,) = make_pairs("scenes", ["place"], 1)
    >>> pair.answers[0] != pair.answers[1]
    True
    """

    kind: str
    question: str
    clean: Image.Image
    corrupt: Image.Image
    answers: tuple[str, str]


def make_pairs(
    dataset: str, kinds: Sequence[str], n: int, split: str = "test", seed: int = 0
) -> list[Pair]:
    """Make pairs of pictures that differ in one fact, with a question about it.

    The embedded scenes are drawn twice, with one factor changed. In other data sets the corrupt
    picture is that of another sample with a question of the same type and another answer; where
    they have no such types, all questions count as one type.

    Parameters
    ----------
    dataset : str
        "scenes", or a data set whose samples have questions.
    kinds : sequence of str
        Types of questions, which are factors of the scenes too: "colour", "place", ...
    n : int
        How many pairs of each type, at most.
    split : str, default "test"
        The split.
    seed : int, default 0
        Of the scenes.

    Returns
    -------
    list of Pair
        The pairs, type after type.

    Raises
    ------
    InputError
        If there is no pair.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tracing import make_pairs
    >>> [pair.kind for pair in make_pairs("scenes", ["colour", "place"], 2)]
    ['colour', 'colour', 'place', 'place']
    """
    pairs = []
    if dataset == "scenes":
        for kind in kinds:
            pairs += _drawn_twice(kind, n, split, seed)
    else:
        pairs = _swapped(dataset, kinds, n, split, seed)
    require(pairs, f"no two pictures with different answers in {dataset!r}", "give another")
    return pairs


def _drawn_twice(kind: str, n: int, split: str, seed: int) -> list[Pair]:
    pairs: list[Pair] = []
    for sample, counterpart in counterfactual_samples(_CANDIDATES * n, kind, split, seed):
        question, changed = _asked(sample, kind), _asked(counterpart, kind)
        if len(pairs) == n or question is None or changed is None:
            continue
        if changed.answer != question.answer:
            answers = question.answer, changed.answer
            pairs.append(Pair(kind, question.text, sample.image, counterpart.image, answers))
    return pairs


def _asked(sample: Sample, kind: str) -> Question | None:
    return next((question for question in sample.questions if question.type == kind), None)


def _swapped(dataset: str, kinds: Sequence[str], n: int, split: str, seed: int) -> list[Pair]:
    questions = []
    for sample in load_samples(dataset, _CANDIDATES * n, split, seed):
        questions += [(question, sample) for question in sample.questions]
    present = {question.type for question, _ in questions}
    pairs = []
    for kind in [kind for kind in kinds if kind in present] or ["any"]:
        of_kind = [pair for pair in questions if kind in ("any", pair[0].type)]
        n_pairs = 0
        for number, (question, sample) in enumerate(of_kind):
            for second_question, second in of_kind[number + 1 :]:
                if (
                    n_pairs < n
                    and second_question.answer != question.answer
                    and second is not sample
                ):
                    pictures = sample.image, second.image
                    pairs.append(Pair(kind, question.text, *pictures, (question.answer, "")))
                    n_pairs += 1
                    break
    return pairs


class AnsweredPairs:
    """Pairs that a model answers rightly, with its inputs and first tokens.

    Pairs are kept where both answers begin as they should (those that are known) and differ; where
    fewer than two are, all are kept, and the likeliest other token stands for the corrupt answer.

    Parameters
    ----------
    vlm : VLM
        The model.
    pairs : sequence of Pair
        The pairs to try, such as from :func:`make_pairs`.
    n : int, optional
        How many of each kind are kept at most; by default all.
    both : bool, default True
        Whether the corrupt pictures are run too. False asks about the clean ones alone, which
        halves the time: ``corrupt`` is then None, and the second token the likeliest other one.

    Attributes
    ----------
    pairs : list of Pair
        The pairs that are kept, b of them.
    clean, corrupt : Batch
        The inputs.
    tokens : tensor (b, 2)
        The first token of the answer to the clean and to the corrupt picture.
    kinds : array (b,)
        The kinds.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3))
    >>> study.tokens.shape == (len(study.pairs), 2)
    True
    """

    def __init__(
        self, vlm: VLM, pairs: Sequence[Pair], n: int | None = None, both: bool = True
    ) -> None:
        self.vlm = vlm
        first = _first_logits(vlm, _batch(vlm, pairs, 0)).topk(2, dim=-1).indices
        tokens = first.clone()
        if both:
            corrupt = _first_logits(vlm, _batch(vlm, pairs, 1)).argmax(dim=-1)
            tokens[:, 1] = torch.where(corrupt == first[:, 0], first[:, 1], corrupt)
        rows = []
        for row, pair in enumerate(pairs):
            correct = self._begins(tokens[row, 0], pair.answers[0])
            if both:
                differs = bool(corrupt[row] != first[row, 0])
                correct = correct and differs and self._begins(corrupt[row], pair.answers[1])
            if correct:
                rows.append(row)
        selected = _first_of_each(pairs, rows if len(rows) > 1 else range(len(pairs)), n)
        self.tokens = tokens[selected]
        self.pairs = [pairs[row] for row in selected]
        self.clean = _batch(vlm, self.pairs, 0)
        self.corrupt = _batch(vlm, self.pairs, 1) if both else None
        self.kinds = np.array([pair.kind for pair in self.pairs])

    @cached_property
    def step(self) -> "LastStep":
        """The last position of the clean inputs, ready to be run again."""
        return LastStep(self.vlm, self.clean)

    def _begins(self, token: Int[Tensor, ""], answer: str) -> bool:
        word = self.vlm.tokenizer.decode([int(token)]).strip()
        return not answer or (bool(word) and answer.startswith(word))

    def words(self, logits: Float[Tensor, "b v"]) -> list[str]:
        """Return the answers that logits lead to, whole words where they are known.

        Parameters
        ----------
        logits : tensor (b, v)
            Logits of the last position.

        Returns
        -------
        list of str
            The clean or the corrupt answer where the first token is its, else that token.

        Examples
        --------
        >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs
        >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3))
        >>> study.words(study.step.logits()) == [pair.answers[0] for pair in study.pairs]
        True
        """
        words = []
        for token, pair, first_tokens in zip(
            logits.argmax(dim=-1), self.pairs, self.tokens, strict=True
        ):
            word = self.vlm.tokenizer.decode([int(token)]).strip()
            for number in (1, 0):
                if token == first_tokens[number] and pair.answers[number].startswith(word or "?"):
                    word = pair.answers[number]
            words.append(word)
        return words

    def gap(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b"]:
        """Return the logit of the clean answer minus that of the corrupt one.

        Parameters
        ----------
        logits : tensor (b, v)
            Logits of the last position.

        Returns
        -------
        tensor (b,)
            Positive where the model is nearer to the clean picture's answer.

        Examples
        --------
        >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs
        >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3))
        >>> logits = vlm.forward(study.clean, logits=False).logits[:, -1]
        >>> bool((study.gap(logits) > 0).all())
        True
        """
        gathered = logits.gather(1, self.tokens.to(logits.device))
        return gathered[:, 0] - gathered[:, 1]

    def lost(self, logits: Float[Tensor, "b v"]) -> Float[np.ndarray, "b"]:
        """Return 1 where the first token is no longer that of the clean answer, else 0.

        Parameters
        ----------
        logits : tensor (b, v)
            Logits of the last position.

        Returns
        -------
        array (b,)
            0 or 1 a pair.

        Examples
        --------
        >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs
        >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3))
        >>> study.lost(vlm.forward(study.clean, logits=False).logits[:, -1]).sum()
        np.float64(0.0)
        """
        return (logits.argmax(dim=-1).cpu() != self.tokens[:, 0]).numpy().astype(float)

    def spans(self) -> dict[str, Bool[Tensor, "b t"]]:
        """Return the parts of the prompts that are patched, with the world's truth.

        Returns
        -------
        dict of str to tensor (b, t)
            "cells that differ" and "other cells", the image tokens where the two pictures differ
            and the rest; "question"; "marks", the template's marks between it and the answer; and
            "last". Without a square grid of cells there is "picture" in place of both cells. What
            some pair does not have is left out.

        Examples
        --------
        >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs
        >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3))
        >>> list(study.spans())
        ['cells that differ', 'other cells', 'question', 'marks', 'last']
        """
        batch = self.clean
        picture = batch.mask("image") if "image" in self.vlm.placeholders else None
        masks: dict[str, Tensor] = {}
        if picture is not None:
            masks = {"picture": picture}
            differing = _differing_cells(self.pairs, picture)
            if differing is not None:
                rest = picture & ~differing
                masks = {"cells that differ": differing, "other cells": rest}
        last = torch.zeros_like(batch.spans, dtype=torch.bool)
        last[:, -1] = True
        masks["question"] = batch.mask("question")
        first = masks["question"].float().argmax(dim=1, keepdim=True)
        after = torch.arange(batch.spans.shape[1], device=first.device) > first
        masks["marks"] = after & ~masks["question"] & ~last
        masks["last"] = last
        present = {}
        for name, mask in masks.items():
            if bool(mask.any(dim=1).all()):
                present[name] = mask
        return present


def _first_of_each(pairs: Sequence[Pair], rows: Sequence[int], n: int | None) -> list[int]:
    """Return the first ``n`` rows of each kind."""
    counts: dict[str, int] = {}
    selected = []
    for row in rows:
        kind = pairs[row].kind
        counts[kind] = counts.get(kind, 0) + 1
        if n is None or counts[kind] <= n:
            selected.append(row)
    return selected


def _batch(vlm: VLM, pairs: Sequence[Pair], number: int) -> Batch:
    pictures = [(pair.clean, pair.corrupt)[number] for pair in pairs]
    return vlm.batch(pictures, [pair.question for pair in pairs])


def _first_logits(vlm: VLM, batch: Batch) -> Float[Tensor, "b v"]:
    return vlm.forward(batch, logits=False, use_cache=False).logits[:, -1].float().cpu()


def _differing_cells(
    pairs: Sequence[Pair], picture: Bool[Tensor, "b t"]
) -> Bool[Tensor, "b t"] | None:
    """Mark the image tokens whose cell of the picture differs; None without a square grid."""
    counts = picture.sum(dim=1).tolist()
    side = round(counts[0] ** 0.5)
    if set(counts) != {side * side}:
        return None
    mask = torch.zeros_like(picture)
    for row, pair in enumerate(pairs):
        if pair.clean.size != pair.corrupt.size:
            return None
        pixels = [np.asarray(image.convert("RGB"), int) for image in (pair.clean, pair.corrupt)]
        changed = torch.tensor((pixels[0] != pixels[1]).any(axis=2), dtype=torch.float32)
        shares = torch.nn.functional.adaptive_avg_pool2d(changed[None], side)[0]
        mask[row, picture[row]] = (shares.flatten() > _CHANGED).to(mask.device)
    return mask


class LastStep:
    """Run the last position of prompts again and again, all else computed once.

    Cutting the attention of the last position leaves all earlier positions as they are. So their
    keys and values are computed once, and each knock-out costs a step of one token. This holds in
    a LLaVA whose cache keeps everything; elsewhere each call is a whole forward.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        The prompts.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.interventions import knock_out
    >>> from xlvlms_tutorial.tutorials.tracing import LastStep
    >>> step = LastStep(vlm, batch)
    >>> logits = step.logits(knock_out(vlm, "last", "image", [24]))
    >>> with knock_out(vlm, "last", "image", [24]):
    ...     expected = vlm.forward(batch, logits=False).logits[:, -1]
    >>> torch.allclose(logits, expected, atol=1e-3)
    True
    """

    def __init__(self, vlm: VLM, batch: Batch) -> None:
        self.vlm = vlm
        self.batch = batch
        self._saved: list[tuple[Tensor, Tensor]] = []
        if vlm.model.config.model_type != "llava":
            return
        inputs = dict(batch)
        for name in ("input_ids", "attention_mask"):
            inputs[name] = batch[name][:, :-1]
        start = vlm.prepare(inputs, batch.spans[:, :-1])
        cache = vlm.forward(start, logits=False, use_cache=True).past_key_values
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            self._cache = cache
            self._saved = [(layer.keys, layer.values) for layer in cache.layers]

    @torch.no_grad()
    def logits(self, change: AbstractContextManager | None = None) -> Float[Tensor, "b v"]:
        """Return the logits of the last position under a change of it alone.

        Parameters
        ----------
        change : context manager, optional
            Such as ``knock_out(vlm, "last", ...)``; it must leave earlier positions alone. By
            default there is none.

        Returns
        -------
        tensor (b, v)
            Logits in float32, on the CPU.
        """
        with change or nullcontext():
            if not self._saved:
                return _first_logits(self.vlm, self.batch)
            for layer, (keys, values) in zip(self._cache.layers, self._saved, strict=True):
                layer.keys, layer.values = keys, values
            inputs = {"input_ids": self.batch["input_ids"][:, -1:]}
            inputs["attention_mask"] = self.batch["attention_mask"]
            with self.vlm.run(self.batch):
                output = self.vlm.model(**inputs, past_key_values=self._cache, use_cache=True)
        return output.logits[:, -1].float().cpu()


def windows(n_layers: int, width: int) -> list[range]:
    """Return all windows of as many consecutive blocks.

    Parameters
    ----------
    n_layers : int
        The number of blocks.
    width : int
        The number of blocks in a window; no more than there are.

    Returns
    -------
    list of range
        The blocks, from 1, of each window in order.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tracing import windows
    >>> windows(4, 3)
    [range(1, 4), range(2, 5)]
    """
    width = min(width, n_layers)
    return [range(first, first + width) for first in range(1, n_layers - width + 2)]


def sweep(
    study: AnsweredPairs, tried: Sequence[Sequence[int]], to_span: Positions = "image"
) -> Float[np.ndarray, "w b"]:
    """Cut the last position off from a span in each of some windows, and see which answers go.

    Parameters
    ----------
    study : AnsweredPairs
        The questions, about the clean pictures.
    tried : sequence of sequence of int
        The windows, each several blocks.
    to_span : str, tuple of str, mask (b, t), or function, default "image"
        What the last position no longer sees.

    Returns
    -------
    array (windows, b)
        1 where the first token of the answer changes, else 0.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs, sweep
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3), both=False)
    >>> sweep(study, [range(1, 4), range(1, 31)]).mean(axis=1).tolist()
    [0.0, 1.0]
    """
    rows = []
    for window in tried:
        rows.append(study.lost(study.step.logits(knock_out(study.vlm, "last", to_span, window))))
    return np.array(rows)


def routes(study: AnsweredPairs) -> pd.DataFrame:
    """Cut one route from the picture to the answer in all blocks, and count the answers that go.

    Parameters
    ----------
    study : AnsweredPairs
        The questions, about the clean pictures.

    Returns
    -------
    pandas.DataFrame
        A row a kind; columns: the share of answers lost where the last position does not see the
        picture, where no other word sees it, and where the last position does not see the question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs, routes
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3), both=False)
    >>> list(routes(study))
    ['picture to last', 'picture to words', 'question to last']
    """
    vlm = study.vlm
    every = range(1, vlm.n_layers + 1)
    spans = study.spans()
    between = spans["question"] | spans.get("marks", spans["question"])
    with knock_out(vlm, between, "image", every):
        deaf = _first_logits(vlm, study.clean)
    lost = {
        "picture to last": sweep(study, [every])[0],
        "picture to words": study.lost(deaf),
        "question to last": sweep(study, [every], spans["question"])[0],
    }
    return pd.DataFrame(lost).groupby(study.kinds, sort=False).mean()


def random_positions(study: AnsweredPairs, seed: int = 0) -> Bool[Tensor, "b t"]:
    """Draw as many earlier positions of each prompt as it has image tokens, whatever they hold.

    Parameters
    ----------
    study : AnsweredPairs
        The prompts.
    seed : int, default 0
        Of the draw.

    Returns
    -------
    tensor (b, t)
        True at the positions; the last one is never drawn.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs, random_positions
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3), both=False)
    >>> random_positions(study).sum(dim=1).unique().tolist()
    [16]
    """
    batch = study.clean
    generator = np.random.default_rng(seed)
    n = int(batch.mask("image")[0].sum())
    mask = torch.zeros_like(batch.spans, dtype=torch.bool)
    for row, filled in enumerate(batch["attention_mask"]):
        earlier = filled.nonzero().flatten()[:-1].cpu().numpy()
        mask[row, generator.permutation(earlier)[: min(n, len(earlier) - 1)]] = True
    return mask


def strongest(lost: Float[np.ndarray, "w b"], tried: Sequence[range]) -> tuple[int, int]:
    """Return the window that loses most answers, and the best of those that share no block with it.

    Parameters
    ----------
    lost : array (windows, b)
        From :func:`sweep`.
    tried : sequence of range
        The windows.

    Returns
    -------
    tuple of int
        Their numbers. Of equals the window in the middle; without a disjoint window the second is
        the farthest.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.tracing import strongest, windows
    >>> strongest(np.array([[0.2], [0.5], [0.9], [0.6], [0.1]]), windows(6, 2))
    (2, 0)
    """
    shares = lost.mean(axis=1)
    best = _middle(np.flatnonzero(shares == shares.max()))
    disjoint = []
    for number, window in enumerate(tried):
        if not set(window) & set(tried[best]):
            disjoint.append(number)
    if not disjoint:
        return best, max(range(len(tried)), key=lambda number: abs(number - best))
    return best, max(disjoint, key=lambda number: shares[number])


def choose(
    lost: Float[np.ndarray, "w b"], tried: Sequence[range], kinds: np.ndarray
) -> dict[str, tuple[int, int]]:
    """Choose a window for each kind of question, and the strongest elsewhere.

    Parameters
    ----------
    lost : array (windows, b)
        From :func:`sweep` on validation questions.
    tried : sequence of range
        The windows.
    kinds : array (b,)
        The kinds of the questions.

    Returns
    -------
    dict of str to (int, int)
        The numbers of both windows, as :func:`strongest` gives them, by kind.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.tracing import choose, windows
    >>> lost = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> choose(lost, windows(3, 1), np.array(["colour", "place"]))
    {'colour': (2, 0), 'place': (1, 0)}
    """
    return {str(kind): strongest(lost[:, kinds == kind], tried) for kind in dict.fromkeys(kinds)}


def losses(
    study: AnsweredPairs,
    lost: Float[np.ndarray, "w b"],
    tried: Sequence[range],
    choice: Mapping[str, tuple[int, int]],
    n_draws: int = 3,
) -> dict[str, Float[np.ndarray, "b"]]:
    """Return which test answers go in the window chosen for their kind, and under both baselines.

    Parameters
    ----------
    study : AnsweredPairs
        The test questions.
    lost : array (windows, b)
        From :func:`sweep` on them.
    tried : sequence of range
        The windows.
    choice : mapping of str to (int, int)
        From :func:`choose`. A kind that is not in it gets the first choice there is.
    n_draws : int, default 3
        How many draws of random positions are averaged.

    Returns
    -------
    dict of str to array (b,)
        "band", "equal window elsewhere" and "random positions", the last a share of the draws.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, losses, make_pairs, sweep
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3), both=False)
    >>> tried = [range(1, 4), range(1, 31)]
    >>> result = losses(study, sweep(study, tried), tried, {"place": (1, 0)}, n_draws=1)
    >>> result["band"].tolist(), result["equal window elsewhere"].tolist()
    ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """
    of_row = [choice.get(str(kind), next(iter(choice.values()))) for kind in study.kinds]
    best, elsewhere = np.array(of_row).T
    rows = np.arange(len(of_row))
    random = np.zeros(len(of_row))
    for draw in range(n_draws):
        positions = random_positions(study, draw)
        for number in set(best.tolist()):
            (cut,) = sweep(study, [tried[number]], positions)
            random += np.where(best == number, cut, 0) / n_draws
    return {
        "band": lost[best, rows],
        "equal window elsewhere": lost[elsewhere, rows],
        "random positions": random,
    }


def _middle(numbers: np.ndarray) -> int:
    return int(numbers[(len(numbers) - 1) // 2])


def where(
    lost: Float[np.ndarray, "w b"], tried: Sequence[range], seed: int = 0, n_resamples: int = 1000
) -> Estimate:
    """Estimate where in depth the strongest window lies.

    Parameters
    ----------
    lost : array (windows, b)
        From :func:`sweep`.
    tried : sequence of range
        The windows.
    seed : int, default 0
        Of the bootstrap.
    n_resamples : int, default 1000
        How often pictures are drawn again.

    Returns
    -------
    Estimate
        The middle block of the window that loses most answers, with an interval over pictures: all
        windows where there is but one picture.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.tracing import where, windows
    >>> print(where(np.eye(4)[[0, 0, 1, 0]].repeat(3, axis=1) * 0 + [[0], [0], [1], [0]],
    ...             windows(6, 3)))
    4.00 [4.00, 4.00]
    """
    middles = np.array([np.mean(window) for window in tried])

    def middle(rows: np.ndarray) -> float:
        shares = rows.mean(axis=0)
        return float(middles[_middle(np.flatnonzero(shares == shares.max()))])

    if lost.shape[1] < 2:
        return Estimate(middle(lost.T), middles[0], middles[-1], lost.shape[1])
    return bootstrap(lost.T, statistic=middle, n_resamples=n_resamples, seed=seed)


def curves(
    study: AnsweredPairs, lost: Float[np.ndarray, "w b"], tried: Sequence[range], seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Return the share of answers lost by window, for each kind of question.

    Parameters
    ----------
    study : AnsweredPairs
        The questions.
    lost : array (windows, b)
        From :func:`sweep`.
    tried : sequence of range
        The windows.
    seed : int, default 0
        Of the intervals.

    Returns
    -------
    dict of str to pandas.DataFrame
        By kind, a row a window: its middle block as the index, "lost", "low" and "high".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, curves, make_pairs, sweep
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3), both=False)
    >>> tried = [range(1, 4), range(23, 26)]
    >>> curves(study, sweep(study, tried), tried)["place"].index.tolist()
    [2.0, 24.0]
    """
    result = {}
    for kind in dict.fromkeys(study.kinds):
        rows = []
        for values in lost[:, study.kinds == kind]:
            share = proportion(values == 1, seed=seed)
            rows.append((share.value, share.low, share.high))
        middles = [float(np.mean(window)) for window in tried]
        result[kind] = pd.DataFrame(rows, middles, ["lost", "low", "high"])
    return result


def handover(grid: PatchingGrid, before: Sequence[str], seed: int = 0) -> Estimate:
    """Estimate the layer from which the last position carries more of the fact than the picture.

    Parameters
    ----------
    grid : PatchingGrid
        By layer and span, one of them "last".
    before : sequence of str
        The spans that carry it before.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    Estimate
        The first layer of the grid at which patching "last" restores more than patching the other
        spans (added up), with an interval over pictures (all layers where there is but one); the
        last layer where none does.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.interventions import PatchingGrid
    >>> from xlvlms_tutorial.tutorials.tracing import handover
    >>> values = np.array([[[1.0] * 3, [0.0] * 3], [[0.1] * 3, [0.9] * 3]])
    >>> grid = PatchingGrid(values, np.ones(3), np.zeros(3), (8, 24), ("image", "last"), "denoise")
    >>> print(handover(grid, ["image"]))
    24.00 [24.00, 24.00]
    """
    changes = grid.changes()
    numbers = [grid.columns.index(name) for name in before]
    lead = changes[:, grid.columns.index("last")] - changes[:, numbers].sum(axis=1)

    def first(rows: np.ndarray) -> float:
        ahead = np.flatnonzero(rows.mean(axis=0) > 0)
        return float(grid.layers[ahead[0] if len(ahead) else -1])

    rows = np.nan_to_num(lead.T)
    if len(rows) < 2:
        return Estimate(first(rows), grid.layers[0], grid.layers[-1], len(rows))
    return bootstrap(rows, statistic=first, seed=seed)


def patching_statements(
    study: AnsweredPairs, grid: PatchingGrid, noised: PatchingGrid, centre: int, seed: int = 0
) -> dict[str, bool]:
    """Say which sentences of the chapter about patching hold.

    Parameters
    ----------
    study : AnsweredPairs
        The pairs.
    grid, noised : PatchingGrid
        Clean states in the corrupt prompt by the spans of :meth:`AnsweredPairs.spans`, and corrupt
        states in the clean one by "picture", "last" and others.
    centre : int
        The layer at which the fact is expected at the last position.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    dict of str to bool
        Whether each sentence holds.

    Examples
    --------
    >>> from xlvlms_tutorial.interventions import patch_spans
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs, patching_statements
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3))
    >>> inputs = vlm, study.clean, study.corrupt
    >>> grid = patch_spans(*inputs, study.spans(), [20, 25], study.gap)
    >>> whole = {"picture": "image", "last": "last"}
    >>> noised = patch_spans(*inputs, whole, [20, 25], study.gap, "noise")
    >>> statements = patching_statements(study, grid, noised, 24)
    >>> statements["late, the last position carries nearly all of it"]
    True
    """
    spans, shares, back = study.spans(), grid.shares(), noised.shares()
    picture = [name for name in spans if name in ("picture", "cells that differ", "other cells")]
    text = [name for name in ("question", "marks") if name in shares]
    first, rest = picture[0], picture[-1]
    counts = {name: int(spans[name].sum()) for name in picture}
    early, late = shares.loc[: centre - 1], shares.loc[centre + 1 :]
    turn = handover(grid, picture, seed)
    return {
        "early, the image tokens carry nearly all of the fact": bool(
            early[picture].sum(axis=1).min() > 0.8
        ),
        "the cells that differ carry more of it than the others, and are fewer": bool(
            (early[first] > early[rest]).all() and counts[first] < counts[rest]
        ),
        "the other cells carry a part too": bool(early[rest].min() > 0.2),
        "late, the last position carries nearly all of it": bool(late["last"].min() > 0.9),
        "question and marks carry less than a tenth at all layers": bool(
            shares[text].abs().max(axis=None) < 0.1
        ),
        "the fact passes to the last position within a layer of the expected one": bool(
            max(abs(turn.low - centre), abs(turn.high - centre)) <= 1
        ),
        "noise tells the same: first the picture is needed, then the last position": bool(
            back["picture"].iloc[0] > 0.7 and back["last"].iloc[-1] > 0.7
        ),
    }


def record(
    experiment: Experiment,
    study: AnsweredPairs,
    lost: Mapping[str, Float[np.ndarray, "b"]],
    seed: int = 0,
) -> pd.DataFrame:
    """Record KNOCK-1 for each kind of question against both nulls.

    Parameters
    ----------
    experiment : Experiment
        The page's experiment.
    study : AnsweredPairs
        The test questions.
    lost : mapping of str to array (b,)
        Which answers go: "band", "equal window elsewhere" and "random positions".
    seed : int, default 0
        Of the intervals.

    Returns
    -------
    pandas.DataFrame
        The share of answers lost, a row a kind, a column each.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials import Experiment
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, make_pairs, record
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3), both=False)
    >>> lost = {"band": np.ones(3)}
    >>> lost |= dict.fromkeys(["equal window elsewhere", "random positions"], np.zeros(3))
    >>> record(Experiment("tracing", "pocket-llava", "scenes"), study, lost).loc["place", "band"]
    np.float64(1.0)
    """
    rows = {}
    for kind in dict.fromkeys(study.kinds):
        mask = study.kinds == kind
        rows[kind] = {name: values[mask].mean() for name, values in lost.items()}
        if mask.sum() < 2:
            continue
        for null in ("equal window elsewhere", "random positions"):
            drop = difference(lost["band"][mask], lost[null][mask], paired=True, seed=seed)
            variant = f"{kind}, {null}"
            experiment.record("KNOCK-1", drop, null, variant, choice="validation")
    return pd.DataFrame(rows).T


def band_statements(
    study: AnsweredPairs,
    lost: Float[np.ndarray, "w b"],
    tried: Sequence[range],
    choice: Mapping[str, tuple[int, int]],
    places: Mapping[str, Estimate],
    by_kind: pd.DataFrame,
    centre: int,
) -> dict[str, bool]:
    """Say which sentences of the chapter about the band hold, where it asks what the book asks.

    Parameters
    ----------
    study : AnsweredPairs
        The test questions.
    lost : array (windows, b)
        From :func:`sweep` on them.
    tried : sequence of range
        The windows.
    choice : mapping of str to (int, int)
        From :func:`choose`.
    places : mapping of str to Estimate
        From :func:`where`, by kind.
    by_kind : pandas.DataFrame
        From :func:`record`.
    centre : int
        The block that was predicted.

    Returns
    -------
    dict of str to bool
        Whether each sentence holds; empty where colours, places or counts were not asked about.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.tracing import AnsweredPairs, band_statements, make_pairs
    >>> study = AnsweredPairs(vlm, make_pairs("scenes", ["place"], 3), both=False)
    >>> band_statements(study, np.zeros((1, 3)), [range(1, 4)], {}, {}, pd.DataFrame(), 24)
    {}
    """
    if not {"colour", "place", "count"} <= set(places) & set(choice):
        return {}
    direct = ["colour", "place"]
    ends = []
    for kind in direct:
        ends += [places[kind].low, places[kind].high]
    shares = lost.mean(axis=1)
    outer = []
    for number, window in enumerate(tried):
        if window[-1] < study.vlm.layer_at(0.25) or window[0] > centre + 1:
            outer.append(shares[number])
    early = [window[-1] <= study.vlm.layer_at(0.5) for window in tried]
    bands, baselines = by_kind.loc[direct, "band"], by_kind.loc[direct, "equal window elsewhere"]
    return {
        "for colour and place the window chosen on validation holds the expected block": all(
            centre in tried[choice[kind][0]] for kind in direct
        ),
        "the intervals of their middles lie within a block of the expected one": bool(
            max(abs(end - centre) for end in ends) <= 1
        ),
        "the band loses more than half of colours and places, the window elsewhere few": bool(
            bands.min() > 0.5 and baselines.max() < 0.35
        ),
        "counts have a second band before the middle of the depth": bool(
            lost[early][:, study.kinds == "count"].mean(axis=1).max() > 0.2
        ),
        "no window in the first quarter or behind the band loses a tenth of the answers": bool(
            max(outer) < 0.1
        ),
    }
