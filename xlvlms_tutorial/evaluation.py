"""Evaluate any model in one way: its captions, its answers, and what it says yes to.

Only ``model.generate`` is used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import no_estimate, unequal_lengths
from xlvlms_tutorial.io import as_json, versions, write_json
from xlvlms_tutorial.metrics.answers import COLUMNS, accuracy_by_type, answer_table
from xlvlms_tutorial.metrics.captions import CAPTION_FACTORS, SOUND_FACTORS, caption_attributes
from xlvlms_tutorial.metrics.hallucination import pope
from xlvlms_tutorial.metrics.intervals import proportion
from xlvlms_tutorial.samples import PROMPTS, Question, Sample, media

CAPTION_TOKENS, ANSWER_TOKENS = 48, 16
_PRESENCE = ("accuracy", "yes_ratio", "precision", "recall", "f1")
SCENES_AT_ONCE = 32  # samples held open at a time


@runtime_checkable
class Generator(Protocol):
    """Describe what a model must offer to be evaluated.

    A name, and greedy generation from texts and pictures (or ``videos``, ``audio``), as
    :class:`~xlvlms_tutorial.models.VLM` has them.
    """

    name: str

    def generate(
        self,
        images: Sequence[Image.Image] | None,
        texts: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 16,
        progress: bool = False,
        **contents: Sequence[object],
    ) -> list[str]:
        """Generate one text for each pair of a picture, clip or sound and a text.

        Parameters
        ----------
        images : sequence of Image, optional
            The pictures, None where clips or sounds are given.
        texts : sequence of str
            One prompt for each of them.
        max_new_tokens : int, default 32
            Tokens after which a text is cut.
        batch_size : int, default 16
            Pairs that go through the model together.
        progress : bool, default False
            Whether to show a progress bar.
        **contents
            ``videos`` or ``audio`` in the place of pictures.

        Returns
        -------
        list of str
            The generated texts.
        """
        ...


@dataclass(frozen=True)
class Report:
    """Hold the result of an evaluation, as :func:`evaluate` returns it.

    Parameters
    ----------
    model : str
        The model's name.
    dataset : str
        The dataset's name.
    seed : int
        Of the bootstrap intervals.
    captions : pandas.DataFrame
        One row a sample: sample (its id), caption, a boolean column for each known factor.
    answers : pandas.DataFrame
        One row a question: sample, then the columns of
        :func:`~xlvlms_tutorial.metrics.answers.answer_table`.
    versions : dict of str to str
        Of the packages that numbers depend on; by default those of this process.

    Examples
    --------
    >>> from xlvlms_tutorial import evaluate
    >>> report = evaluate(vlm, samples[:1], progress=False, caption_tokens=4, answer_tokens=1)
    >>> report.summary().columns.tolist()
    ['metric', 'value', 'low', 'high', 'n']
    >>> report.scores().columns.tolist()
    ['caption', 'answer']
    """

    model: str
    dataset: str
    seed: int
    captions: pd.DataFrame
    answers: pd.DataFrame
    versions: dict[str, str] = field(default_factory=versions)

    def summary(self) -> pd.DataFrame:
        """Summarise the report, with one row a metric.

        Returns
        -------
        pandas.DataFrame
            Columns metric, value, low, high, n. "caption/<factor>" is the share of captions that
            name the factor, with Wilson's interval; "caption/all" the share that name every factor
            of their scene; "qa/<type>" an accuracy, resampled by scene; "presence/<stratum>/<name>"
            a number of :meth:`presence`.
        """
        rows = [*self._caption_rows(), *self._answer_rows(), *self._presence_rows()]
        return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "n"])

    def presence(self) -> pd.DataFrame:
        """Score presence questions as :func:`~xlvlms_tutorial.metrics.hallucination.pope` does.

        Returns
        -------
        pandas.DataFrame
            One row a stratum; no rows if there are no presence questions.
        """
        if not (self.answers["type"] == "presence").any():
            return pd.DataFrame(columns=[*_PRESENCE, "n"], index=pd.Index([], name="stratum"))
        return pope(self.answers, self.answers["sample"], seed=self.seed)

    def scores(self) -> pd.DataFrame:
        """Score each sample by its caption and by its answers.

        Use it for means over samples, and for differences between models on the same samples.

        Returns
        -------
        pandas.DataFrame
            One row a sample, by its id. Columns caption, the share of its known factors that the
            caption names, and answer, the share of correct answers. NaN where nothing is known or
            asked.
        """
        named = self.captions.drop(columns=["caption"]).set_index("sample").astype("Float64")
        correct = self.answers.astype({"correct": float}).groupby("sample")["correct"].mean()
        table = pd.DataFrame(
            {"caption": named.mean(axis=1).astype(float), "answer": correct.reindex(named.index)}
        )
        return table.rename_axis("sample")

    def _caption_rows(self) -> Iterator[dict[str, object]]:
        factors = self.captions.drop(columns=["sample", "caption"])
        with_truth = factors[factors.notna().any(axis=1)]
        if not with_truth.empty:
            factors = factors.assign(all=with_truth.fillna(True).all(axis=1).astype("boolean"))
        for name in factors:
            named = factors[name].dropna()
            if len(named):
                yield {"metric": f"caption/{name}", **proportion(named.astype(bool)).asdict()}

    def _answer_rows(self) -> Iterator[dict[str, object]]:
        if not len(self.answers):
            return
        by_type = accuracy_by_type(self.answers, self.answers["sample"], seed=self.seed)
        for kind, row in by_type.to_dict("index").items():
            yield {"metric": f"qa/{kind}", **row}

    def _presence_rows(self) -> Iterator[dict[str, object]]:
        for stratum, row in self.presence().to_dict("index").items():
            for name in _PRESENCE:
                entry = {"metric": f"presence/{stratum}/{name}", "value": row[name]}
                entry["low"] = row.get(f"{name}_low")
                entry["high"] = row.get(f"{name}_high")
                entry["n"] = int(row["n"])
                yield entry

    def content(self) -> dict[str, object]:
        """Return the whole report in plain types.

        Returns
        -------
        dict of str to object
            model, dataset, seed, n, versions, summary, captions, answers; None where undefined.
        """
        tables = {"summary": self.summary(), "captions": self.captions, "answers": self.answers}
        rows = {}
        for name, table in tables.items():
            rows[name] = table.astype(object).where(table.notna(), None).to_dict("records")
        provenance = {
            "model": self.model,
            "dataset": self.dataset,
            "seed": self.seed,
            "n": len(self.captions),
            "versions": self.versions,
        }
        return provenance | rows

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        return as_json(self.content())

    def save(self, path: str | Path) -> Path:
        """Write the whole report as a JSON file.

        Parameters
        ----------
        path : str or Path
            The file to write or to replace.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        FileError
            If the file cannot be written.
        """
        return write_json(path, self.content())


def evaluate(
    vlm: Generator,
    samples: Sequence[Sample],
    seed: int = 0,
    progress: bool = True,
    dataset: str = "",
    batch_size: int = 16,
    caption_tokens: int = CAPTION_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
) -> Report:
    """Caption every sample and ask all its questions, with greedy decoding, and score the results.

    Use it to compare models, or a model before and after steering or compression: it uses only what
    :class:`Generator` describes.

    Parameters
    ----------
    vlm : Generator
        The model, such as :func:`~xlvlms_tutorial.loading.load` returns it.
    samples : sequence of Sample
        Scenes, clips or sounds, one modality, each with its own id.
    seed : int, default 0
        Of the bootstrap intervals.
    progress : bool, default True
        Whether to show a progress bar.
    dataset : str, default ""
        The dataset's name, for the report.
    batch_size : int, default 16
        Prompts that go through the model together.
    caption_tokens : int, default CAPTION_TOKENS
        Tokens after which captions are cut: a model that has learnt nothing never ends by itself.
    answer_tokens : int, default ANSWER_TOKENS
        Tokens after which answers are cut.

    Returns
    -------
    Report
        The captions, the answers, and their scores.

    Raises
    ------
    InputError
        If there are no samples, or two samples share an id. If the model returns another number of
        texts than asked. If samples of several modalities are mixed. If a picture cannot be read.

    Examples
    --------
    >>> from xlvlms_tutorial import evaluate
    >>> report = evaluate(vlm, samples[:1], progress=False, caption_tokens=4, answer_tokens=1)
    >>> len(report.captions), len(report.answers) == len(samples[0].questions)
    (1, True)
    """
    ids = [sample.id for sample in samples]
    n_ids = len(set(ids))
    if not ids or n_ids < len(ids):
        raise no_estimate(
            "samples",
            f"{len(ids)} samples with {n_ids} ids",
            "one sample or more, each with its own id",
        )
    captions: list[str] = []
    tables: list[pd.DataFrame] = []
    with tqdm(
        total=len(samples), disable=not progress, unit="sample", desc=f"evaluating {vlm.name}"
    ) as bar:
        for start in range(0, len(samples), SCENES_AT_ONCE):
            part = samples[start : start + SCENES_AT_ONCE]
            texts, answers = _ask(vlm, part, batch_size, caption_tokens, answer_tokens)
            captions += texts
            if len(answers):
                tables.append(answers)
            bar.update(len(part))
    truths = [sample.truth for sample in samples]
    factors = []
    for factor in (*CAPTION_FACTORS, *SOUND_FACTORS):
        if any(truth.get(factor) is not None for truth in truths):
            factors.append(factor)
    attributes = caption_attributes(captions, truths, factors)
    table = pd.DataFrame({"sample": ids, "caption": captions}).join(attributes)
    if tables:
        answers = pd.concat(tables, ignore_index=True)
    else:
        answers = pd.DataFrame(columns=["sample", *COLUMNS])
    return Report(vlm.name, dataset, seed, table, answers)


def _ask(
    vlm: Generator,
    samples: Sequence[Sample],
    batch_size: int,
    caption_tokens: int,
    answer_tokens: int,
) -> tuple[list[str], pd.DataFrame]:
    """Generate captions of a few samples, and the answers to all their questions."""
    (name, contents), *_ = media(samples).items()
    prompts = [PROMPTS[sample.modality] for sample in samples]
    captions = _generate(vlm, name, contents, prompts, caption_tokens, batch_size)
    ids: list[str] = []
    repeated: list[object] = []
    questions: list[Question] = []
    for sample, content in zip(samples, contents, strict=True):
        n = len(sample.questions)
        ids += [sample.id] * n
        repeated += [content] * n
        questions += sample.questions
    prompts = [question.text for question in questions]
    answers = _generate(vlm, name, repeated, prompts, answer_tokens, batch_size)
    table = answer_table(answers, questions)
    table.insert(0, "sample", ids)
    return captions, table


def _generate(
    vlm: Generator,
    name: str,
    contents: list[object],
    texts: list[str],
    tokens: int,
    batch_size: int,
) -> list[str]:
    if not texts:
        return []
    inputs = {"images": None} | {name: contents}
    generated = vlm.generate(
        **inputs, texts=texts, max_new_tokens=tokens, batch_size=batch_size, progress=False
    )
    if len(generated) != len(texts):
        raise unequal_lengths(asked=len(texts), generated=len(generated))
    return [text.strip() for text in generated]
