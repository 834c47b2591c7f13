"""One evaluation for every model: what its captions name, what it answers, what it says yes to.

Only what is shown, and words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from xlvlms_tutorial.errors import EstimateError, LengthError
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
    """What a model must offer to be evaluated.

    A name, and greedy generation from texts and pictures (or ``videos``, ``audio``).
    """

    name: str

    def generate(
        self,
        images: Sequence[Image.Image] | None,
        texts: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 16,
        progress: bool = False,
        **shown: Sequence[object],
    ) -> list[str]:
        """One text for each pair of a picture, clip or sound and a text."""
        ...


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    ``captions``: one row a sample (sample, caption, a boolean column for
    each known factor). ``answers``: one row a question (sample, then the
    columns of :func:`~xlvlms_tutorial.metrics.answers.answer_table`).
    """

    model: str
    dataset: str
    seed: int
    captions: pd.DataFrame
    answers: pd.DataFrame
    versions: dict[str, str] = field(default_factory=versions)

    def summary(self) -> pd.DataFrame:
        """One row a metric: metric, value, low, high, n.

        Shares of captions have Wilson intervals; questions are resampled by scene.
        "caption/all" is the share of captions that name every factor of their scene; precision,
        recall and f1 of presence have no interval.
        """
        rows = [*self._caption_rows(), *self._answer_rows(), *self._presence_rows()]
        return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "n"])

    def presence(self) -> pd.DataFrame:
        """Presence questions as :func:`~xlvlms_tutorial.metrics.hallucination.pope` scores them.

        A table without rows if none was asked.
        """
        if not (self.answers["type"] == "presence").any():
            return pd.DataFrame(columns=[*_PRESENCE, "n"], index=pd.Index([], name="stratum"))
        return pope(self.answers, self.answers["sample"], seed=self.seed)

    def scores(self) -> pd.DataFrame:
        """One row a sample, by its id.

        Caption, the share of its known factors that the caption names, and answer, that of right
        answers. NaN where nothing is known or asked; the mean over samples, and differences between
        models on the same samples, come from here.
        """
        known = self.captions.drop(columns=["caption"]).set_index("sample").astype("Float64")
        right = self.answers.astype({"correct": float}).groupby("sample")["correct"].mean()
        table = pd.DataFrame(
            {"caption": known.mean(axis=1).astype(float), "answer": right.reindex(known.index)}
        )
        return table.rename_axis("sample")

    def _caption_rows(self) -> Iterator[dict[str, object]]:
        factors = self.captions.drop(columns=["sample", "caption"])
        known = factors[factors.notna().any(axis=1)]
        if not known.empty:
            factors = factors.assign(all=known.fillna(True).all(axis=1).astype("boolean"))
        for name in factors:
            named = factors[name].dropna()
            if len(named):
                yield {"metric": f"caption/{name}", **proportion(named.astype(bool)).asdict()}

    def _answer_rows(self) -> Iterator[dict[str, object]]:
        if len(self.answers):
            by_type = accuracy_by_type(self.answers, self.answers["sample"], seed=self.seed)
            yield from (
                {"metric": f"qa/{kind}", **row} for kind, row in by_type.to_dict("index").items()
            )

    def _presence_rows(self) -> Iterator[dict[str, object]]:
        for stratum, row in self.presence().to_dict("index").items():
            for name in _PRESENCE:
                interval = {"low": row.get(f"{name}_low"), "high": row.get(f"{name}_high")}
                yield {
                    "metric": f"presence/{stratum}/{name}",
                    "value": row[name],
                    **interval,
                    "n": int(row["n"]),
                }

    def content(self) -> dict[str, object]:
        """The whole report in plain types.

        Model, dataset, seed, versions, summary, captions, answers; None where undefined.
        """
        tables = {"summary": self.summary(), "captions": self.captions, "answers": self.answers}
        plain = {
            name: table.astype(object).where(table.notna(), None).to_dict("records")
            for name, table in tables.items()
        }
        made_by = {
            "model": self.model,
            "dataset": self.dataset,
            "seed": self.seed,
            "n": len(self.captions),
            "versions": self.versions,
        }
        return made_by | plain

    def to_json(self) -> str:
        """The whole report as JSON text."""
        return as_json(self.content())

    def save(self, path: str | Path) -> Path:
        """Write the whole report as a JSON file.

        Raises
        ------
        OutputError
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
    """Caption every scene, clip or sound and ask all its questions, with greedy decoding.

    ``seed`` is that of the bootstrap. Captions and answers are cut after so many tokens: a model
    that has learnt nothing never ends by itself.

    Raises
    ------
    EstimateError
        If there are no samples, or two samples share an id.
    LengthError
        If the model returns another number of texts than asked.
    SelectionError
        If samples of several modalities are mixed.
    ImageError
        If a picture cannot be read.
    """
    ids = [sample.id for sample in samples]
    if not ids or len(set(ids)) < len(ids):
        raise EstimateError(
            "samples",
            f"{len(ids)} samples with {len(set(ids))} ids",
            "one sample or more, each with its own id",
        )
    told: list[str] = []
    answered: list[pd.DataFrame] = [pd.DataFrame(columns=["sample", *COLUMNS])]
    with tqdm(
        total=len(samples), disable=not progress, unit="sample", desc=f"evaluating {vlm.name}"
    ) as bar:
        for start in range(0, len(samples), SCENES_AT_ONCE):
            part = samples[start : start + SCENES_AT_ONCE]
            captions, answers = _ask(vlm, part, batch_size, caption_tokens, answer_tokens)
            told += captions
            answered.append(answers)
            bar.update(len(part))
    factors = [
        factor
        for factor in (*CAPTION_FACTORS, *SOUND_FACTORS)
        if any(sample.truth.get(factor) is not None for sample in samples)
    ]
    table = pd.DataFrame({"sample": ids, "caption": told}).join(
        caption_attributes(told, [sample.truth for sample in samples], factors)
    )
    answers = pd.concat([part for part in answered if len(part)] or answered, ignore_index=True)
    return Report(vlm.name, dataset, seed, table, answers)


def _ask(
    vlm: Generator,
    samples: Sequence[Sample],
    batch_size: int,
    caption_tokens: int,
    answer_tokens: int,
) -> tuple[list[str], pd.DataFrame]:
    """Captions of a few samples, and the answers to all their questions."""
    (name, shown), *_ = media(samples).items()
    asked: list[tuple[int, Question]] = [
        (k, question) for k, sample in enumerate(samples) for question in sample.questions
    ]
    captions = _generate(
        vlm,
        name,
        shown,
        [PROMPTS[sample.modality] for sample in samples],
        caption_tokens,
        batch_size,
    )
    answers = _generate(
        vlm,
        name,
        [shown[k] for k, _ in asked],
        [question.text for _, question in asked],
        answer_tokens,
        batch_size,
    )
    table = answer_table(answers, [question for _, question in asked])
    table.insert(0, "sample", [samples[k].id for k, _ in asked])
    return captions, table


def _generate(
    vlm: Generator, name: str, shown: list[object], texts: list[str], tokens: int, batch_size: int
) -> list[str]:
    if not texts:
        return []
    given = {"images": None} | {name: shown}
    generated = vlm.generate(
        **given, texts=texts, max_new_tokens=tokens, batch_size=batch_size, progress=False
    )
    if len(generated) != len(texts):
        raise LengthError(asked=len(texts), generated=len(generated))
    return [text.strip() for text in generated]
