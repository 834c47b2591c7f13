"""Samples, prompts and answers as batches of a model, in their order."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from tqdm.auto import tqdm

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.models.prompts import require_texts
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.turns import Turn
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample
from xlvlms_tutorial.validation import require_same_length

Samples = Sequence[Sample] | Sequence[str]
Prompts = str | Sequence[str] | Callable[[Sample], str] | None
Answers = Sequence[str] | Callable[[Sample], str] | None
Turns = Sequence[Turn | tuple]
History = Sequence[Turns] | Callable[[Sample], Turns] | None


def batches(
    vlm: VLM,
    samples: Iterable[Sample] | Iterable[str],
    prompts: Prompts = None,
    answers: Answers = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
    desc: str = "batches",
    history: History = None,
    system: str | None = None,
) -> Iterator[Batch]:
    """Make the batches of samples, their prompts and answers, one at a time.

    Use it to run a model over more samples than fit through it at once. Everything is checked
    before the first batch is made.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : iterable of Sample, or of str
        Samples with what they show, or plain texts, which the model reads as they are.
    prompts : str, sequence of str, or function of a sample, optional
        What the model is asked: one text for all, one for each sample, or a function that gives it.
        By default a description of what the sample shows.
    answers : sequence of str, or function of a sample, optional
        The text that follows each sample's prompt; by default prompts end where answers begin.
    batch_size : int
        Samples of a batch, 16 by default; the last batch holds what remains.
    progress : bool
        Whether a progress bar is shown; not by default.
    desc : str
        What the progress bar is called.
    history : sequence of sequences of Turn, or function of a sample, optional
        Earlier turns for each sample, such as the demonstrations of in-context learning.
    system : str, optional
        A system prompt for all.

    Returns
    -------
    iterator of Batch
        The batches, in the order of the samples. Each is made when it is asked for.

    Raises
    ------
    InputError
        If there are no samples, the batch size is below 1, or plain texts are empty, among samples
        or have answers. If the numbers of samples, prompts and answers differ. If a prompt or an
        answer is empty or holds what marks a picture for this model.

    Examples
    --------
    >>> from xlvlms_tutorial.models import batches
    >>> for inputs in batches(vlm, samples, "What is in the picture?", batch_size=3):
    ...     print(len(inputs["input_ids"]), int(inputs.mask("image").sum()))
    3 48
    1 16
    """
    samples = list(samples)
    if not samples or batch_size < 1:
        raise InputError(
            f"{len(samples)} samples in batches of {batch_size}", "give at least one of each"
        )
    answers = answers_of(samples, answers)
    history = history_of(samples, history)
    plain = any(isinstance(sample, str) for sample in samples)
    if plain:
        _require_plain(samples, answers, history, system)
    else:
        prompts = prompts_of(samples, prompts)
        ids = [sample.id for sample in samples]
        # before a long run rather than in it
        require_texts(vlm.processor, prompts, answers, ids)

    def batch_of(rows: slice) -> Batch:
        if plain:
            inputs = vlm.tokenizer(samples[rows], return_tensors="pt", padding=True)
            return vlm.prepare(inputs)
        part = None if answers is None else answers[rows]
        earlier = None if history is None else history[rows]
        return vlm.batch_of(samples[rows], prompts[rows], part, earlier, system)

    starts = range(0, len(samples), batch_size)
    bar = tqdm(starts, desc=desc, unit="batch", leave=False, disable=not progress)
    return (batch_of(slice(start, start + batch_size)) for start in bar)


def prompts_of(samples: Sequence[Sample], prompts: Prompts) -> list:
    """Return a prompt for each sample; :func:`batches` checks that it is a text.

    Parameters
    ----------
    samples : sequence of Sample
        What the prompts are about.
    prompts : str, sequence of str, or function of a sample, or None
        As for :func:`batches`.

    Raises
    ------
    InputError
        If there are not as many prompts as samples.
    """
    if prompts is None:
        # samples of an unknown modality are refused where they are batched
        return [PROMPTS.get(sample.modality, PROMPTS["image"]) for sample in samples]
    if isinstance(prompts, str):
        return [prompts] * len(samples)
    if callable(prompts):
        return [prompts(sample) for sample in samples]
    prompts = list(prompts)
    require_same_length(samples=samples, prompts=prompts)
    return prompts


def answers_of(samples: Samples, answers: Answers) -> list | None:
    """Return an answer for each sample, or None; :func:`batches` checks that it is a text.

    Parameters
    ----------
    samples : sequence of Sample, or of str
        What the answers are about.
    answers : sequence of str, or function of a sample, or None
        As for :func:`batches`.

    Raises
    ------
    InputError
        If there are not as many answers as samples.
    """
    if answers is None:
        return None
    if callable(answers):
        return [answers(sample) for sample in samples]
    answers = list(answers)
    require_same_length(samples=samples, answers=answers)
    return answers


def history_of(samples: Samples, history: History) -> list[Turns] | None:
    """Return the earlier turns of each sample, or None; :func:`batches` checks what they hold.

    Parameters
    ----------
    samples : sequence of Sample, or of str
        What the last turns are about.
    history : sequence of sequences of Turn, or function of a sample, or None
        As for :func:`batches`.

    Raises
    ------
    InputError
        If there are not as many lists of turns as samples.
    """
    if history is None:
        return None
    if callable(history):
        return [history(sample) for sample in samples]
    history = list(history)
    require_same_length(samples=samples, history=history)
    return history


def require_samples(samples: Sequence[Sample]) -> None:
    """Refuse an empty list of samples.

    Raises
    ------
    InputError
        If there is no sample.
    """
    if not samples:
        raise InputError("no samples", "give at least one")


def first_captions(samples: Sequence[Sample], advice: str) -> list[str]:
    """Return the first caption of each sample.

    Parameters
    ----------
    samples : sequence of Sample
        Samples with captions.
    advice : str
        What the error tells those to do whose samples have none.

    Raises
    ------
    InputError
        If a sample has no caption, with the first such sample.
    """
    bare = [sample.id for sample in samples if not sample.captions]
    if bare:
        raise InputError(f"{len(bare)} samples without a caption, such as {bare[0]!r}", advice)
    return [sample.captions[0] for sample in samples]


def with_eos(vlm: VLM, answers: Sequence[str]) -> list[str]:
    """Return answers with the token by which the model ends them, if it has one."""
    eos = vlm.model.generation_config.eos_token_id
    if isinstance(eos, list):
        eos = eos[0]
    if eos is None:
        return list(answers)
    token = vlm.tokenizer.convert_ids_to_tokens(eos)
    return [answer + token for answer in answers]


def _require_plain(
    samples: Samples,
    answers: Sequence[str] | None,
    history: Sequence[Turns] | None,
    system: str | None,
) -> None:
    written = all(isinstance(sample, str) and sample.strip() for sample in samples)
    with_more = any(part is not None for part in (answers, history, system))
    if with_more or not written:
        raise InputError(
            "texts with answers or earlier turns, empty ones, or texts among samples",
            "give plain texts alone, or samples alone",
        )
