"""Ask about what is not there under several ways to decode, and compare them at one rate of yes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.methods.decoding import contrast, distorted
from xlvlms_tutorial.methods.steering import first_pieces
from xlvlms_tutorial.metrics import Estimate, answer_table, bootstrap, chair, pope
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.sharing import beginnings, by_picture, common_beginning, continued
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.models.watching import on_input
from xlvlms_tutorial.samples import Question
from xlvlms_tutorial.text import normalise
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.tutorials.learned_steering import Item
from xlvlms_tutorial.tutorials.outside import objects_of

# of VCD, ICD, mean steering, the prompt and L2S in the figure
COLOURS = ("#17809a", "#9a5d10", "#6b4fa0", "#b03060", "#3b7d3b")


@dataclass(frozen=True)
class Quiz:
    """The presence questions of some samples, in their order.

    Parameters
    ----------
    scenes : list of str
        The id of each question's sample.
    images : list of PIL.Image.Image
        Its picture; questions about one sample share it.
    questions : list of Question
        The questions.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import quiz
    >>> poll = quiz(samples[:1])
    >>> len(poll), poll.present.shape == (len(poll),)
    (3, True)
    """

    scenes: list[str]
    images: list[Image.Image]
    questions: list[Question]

    def __len__(self) -> int:
        """How many questions there are."""
        return len(self.questions)

    @property
    def texts(self) -> list[str]:
        """What the model is asked."""
        return [question.text for question in self.questions]

    @cached_property
    def present(self) -> np.ndarray:
        """Whether the object is there, booleans (n,)."""
        return np.array([normalise(q.answer) == "yes" for q in self.questions], dtype=bool)


def quiz(samples: Iterable[Sample]) -> Quiz:
    """Collect the presence questions of samples.

    Parameters
    ----------
    samples : iterable of Sample
        Pictures with questions; those of other types are left out.

    Returns
    -------
    Quiz
        One row a question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import quiz
    >>> {question.type for question in quiz(samples).questions}
    {'presence'}
    """
    scenes, images, questions = [], [], []
    for sample in samples:
        presence = [question for question in sample.questions if question.type == "presence"]
        image = sample.image if presence else None
        for question in presence:
            scenes.append(sample.id)
            images.append(image)
            questions.append(question)
    return Quiz(scenes, images, questions)


def split(samples: Sequence[Sample], n_validation: int, n_learning: int) -> tuple[Quiz, Quiz, Quiz]:
    """Share samples out, and collect the presence questions of each share.

    Parameters
    ----------
    samples : sequence of Sample
        The samples.
    n_validation, n_learning : int
        How many are for the choice of settings, and how many to learn from; a third at most each.

    Returns
    -------
    tuple of Quiz
        For validation (the first samples), test, and learning (the last).

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import split
    >>> [len(set(part.scenes)) for part in split(samples, 1, 1)]
    [1, 2, 1]
    """
    third = len(samples) // 3
    start = min(n_validation, third)
    end = len(samples) - min(n_learning, third)
    return quiz(samples[:start]), quiz(samples[start:end]), quiz(samples[end:])


def items(poll: Quiz) -> list[Item]:
    """Return the questions as learned steering takes them, one item each.

    Parameters
    ----------
    poll : Quiz
        The questions.

    Returns
    -------
    list of Item
        In their order; what is wanted is the right answer.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import items, quiz
    >>> item = items(quiz(samples[:1]))[0]
    >>> {item.target, item.opposite} == {"yes", "no"}
    True
    """
    result = []
    for row, question in enumerate(poll.questions):
        sample = Sample(f"{poll.scenes[row]}/{row}", poll.images[row], questions=(question,))
        target, opposite = ("yes", "no") if poll.present[row] else ("no", "yes")
        result.append(Item(sample, target, target, opposite))
    return result


@dataclass(frozen=True)
class Reading:
    """What a model computes before the first word of its answers.

    Parameters
    ----------
    logits : Tensor
        Logits (n, v) of the first word.
    states : Tensor
        States (n, d) of the last layer, before the final norm.
    """

    logits: Float[Tensor, "n v"]
    states: Float[Tensor, "n d"]


@torch.no_grad()
def read_first(
    vlm: VLM,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    noise: float = 0.0,
    batch_size: int = 24,
) -> Reading:
    """Read the logits with which answers begin, and the states they come from.

    A picture that several texts are about runs once where the model allows it. Use it to try any
    strength of :func:`~xlvlms_tutorial.methods.decoding.contrast` without running the model again.

    Parameters
    ----------
    vlm : VLM
        The model.
    images : sequence of PIL.Image.Image
        A picture for each text; equal ones are the same object and follow each other.
    texts : sequence of str
        The questions.
    noise : float, default 0.0
        As for :func:`~xlvlms_tutorial.methods.decoding.distorted`; 0 leaves the pictures.
    batch_size : int, default 24
        Texts that run together.

    Returns
    -------
    Reading
        Logits and states in float32 on the CPU, in the order of the texts.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import quiz, read_first
    >>> poll = quiz(samples[:1])
    >>> reading = read_first(vlm, poll.images, poll.texts)
    >>> reading.logits.argmax(dim=-1).shape
    torch.Size([3])
    """
    logits, states = {}, {}
    for rows in by_picture(images, batch_size):
        pictures = [images[row] for row in rows]
        batch = vlm.batch(pictures, [texts[row] for row in rows], names=rows)
        if noise:
            batch = distorted(batch, noise)
        entering: list[Tensor] = []
        with on_input(anatomy.final_norm(vlm.model), entering.append):
            last = _last_logits(vlm, batch, pictures)
        for k, row in enumerate(rows):
            logits[row] = last[k].float().cpu()
            states[row] = entering[-1][k, -1].float().cpu()
    order = range(len(texts))
    return Reading(
        torch.stack([logits[row] for row in order]), torch.stack([states[row] for row in order])
    )


def read(vlm: VLM, poll: Quiz, noise: float = 0.0, prompt: str = "{}") -> Reading:
    """Read the first words of all answers of a quiz, as :func:`read_first` does.

    Parameters
    ----------
    vlm : VLM
        The model.
    poll : Quiz
        The questions.
    noise : float, default 0.0
        As for :func:`~xlvlms_tutorial.methods.decoding.distorted`.
    prompt : str, default "{}"
        What is asked; the question stands in place of the braces.

    Returns
    -------
    Reading
        One row a question.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import quiz, read
    >>> read(vlm, quiz(samples[:1]), prompt="{} Look carefully.").states.shape
    torch.Size([3, 576])
    """
    texts = [prompt.format(text) for text in poll.texts]
    return read_first(vlm, poll.images, texts, noise)


def _last_logits(vlm: VLM, batch: Batch, pictures: Sequence[object]) -> Float[Tensor, "b v"]:
    """The logits after each prompt; the beginning that prompts share runs once a picture."""
    row_of = {id(picture): row for row, picture in enumerate(pictures)}
    shared = vlm.model.config.model_type == "llava" and len(row_of) < len(pictures)
    start = common_beginning(batch) if shared else ()
    if not len(start):
        return vlm.forward(batch, logits=False).logits[:, -1]
    first = vlm.prepare(beginnings(batch, start, list(row_of.values())))
    cache = vlm.forward(first, logits=False, use_cache=True).past_key_values
    number_of = {picture: number for number, picture in enumerate(row_of)}
    numbers = [number_of[id(picture)] for picture in pictures]
    cache.batch_select_indices(torch.tensor(numbers, device=vlm.device))
    rest = continued(batch, start)
    n = len(start)
    positions = (rest["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    inputs = {
        "input_ids": rest["input_ids"][:, n:].to(vlm.device),
        "attention_mask": rest["attention_mask"].to(vlm.device),
        "position_ids": positions[:, n:].to(vlm.device),
    }
    keep = torch.tensor([-1])
    return vlm.model(**inputs, past_key_values=cache, logits_to_keep=keep).logits[:, -1]


def first_words(vlm: VLM, logits: Float[Tensor, "n v"]) -> list[str]:
    """Return the most probable first word of each answer.

    Parameters
    ----------
    vlm : VLM
        The model whose logits these are.
    logits : Tensor
        Logits (n, v).

    Returns
    -------
    list of str
        The first piece of each answer, which for yes and no is the word.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.hallucination import first_words
    >>> token = vlm.tokenizer("yes", add_special_tokens=False).input_ids[0]
    >>> first_words(vlm, torch.eye(49152)[[token]])
    ['yes']
    """
    tokens = logits.argmax(dim=-1).tolist()
    return [vlm.tokenizer.decode([token]).strip() for token in tokens]


def yes_gap(vlm: VLM, logits: Float[Tensor, "n v"]) -> np.ndarray:
    """Return by how much yes is likelier than no, in nats, at the first word.

    Use it to decide by another threshold than zero.

    Parameters
    ----------
    vlm : VLM
        The model whose logits these are.
    logits : Tensor
        Logits (n, v).

    Returns
    -------
    array of float
        (n,): the logit of the likeliest form of yes minus that of no.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.hallucination import yes_gap
    >>> token = vlm.tokenizer("yes", add_special_tokens=False).input_ids[0]
    >>> yes_gap(vlm, 3 * torch.eye(49152)[[token]]).tolist()
    [3.0]
    """
    best = [logits[:, first_pieces(vlm, word)].amax(dim=-1) for word in ("yes", "no")]
    return (best[0] - best[1]).double().numpy()


def matched_threshold(gaps: np.ndarray, yes_ratio: float) -> float:
    """Find the threshold above which a share of the gaps lies.

    Use it on validation questions, so that a bare threshold says yes as often as another method.

    Parameters
    ----------
    gaps : array of float
        As :func:`yes_gap` gives them, (n,).
    yes_ratio : float
        The share of yes that is wanted.

    Returns
    -------
    float
        Halfway between the two gaps that the share separates.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.hallucination import matched_threshold
    >>> matched_threshold(np.array([-1.0, 0.0, 1.0, 2.0]), 0.25)
    1.5
    """
    ordered = np.sort(gaps)[::-1]
    n_yes = round(yes_ratio * len(gaps))
    if n_yes == 0:
        return float(ordered[0] + 1)
    if n_yes == len(gaps):
        return float(ordered[-1] - 1)
    return float((ordered[n_yes - 1] + ordered[n_yes]) / 2)


def by_threshold(gaps: np.ndarray, threshold: float) -> list[str]:
    """Answer yes where a gap is above a threshold, else no.

    Parameters
    ----------
    gaps : array of float
        As :func:`yes_gap` gives them, (n,).
    threshold : float
        In nats; 0 is what the model itself does.

    Returns
    -------
    list of str
        The answers.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.hallucination import by_threshold
    >>> by_threshold(np.array([-1.0, 0.5]), 0.0)
    ['no', 'yes']
    """
    return ["yes" if gap > threshold else "no" for gap in gaps]


def score(poll: Quiz, answers: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Score answers to presence questions as POPE should be, by stratum, resampled by scene.

    The column "published F1" is 2a / (1 + a) of the accuracy a: what some published code calls F1.

    Parameters
    ----------
    poll : Quiz
        The questions.
    answers : sequence of str
        What was said.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        As :func:`~xlvlms_tutorial.metrics.pope` gives it, and "published F1".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import quiz, score
    >>> poll = quiz(samples)
    >>> row = score(poll, ["no"] * len(poll)).loc["overall"]
    >>> float(row["f1"]), bool(row["published F1"] > 0.5)
    (0.0, True)
    """
    result = pope(answer_table(answers, poll.questions), poll.scenes, seed)
    accuracy = result["accuracy"]
    result["published F1"] = 2 * accuracy / (1 + accuracy)
    return result


def score_all(poll: Quiz, answers: Mapping[str, Sequence[str]], seed: int = 0) -> pd.DataFrame:
    """Score several ways to answer over all strata, as :func:`score` does, one row a way.

    Parameters
    ----------
    poll : Quiz
        The questions.
    answers : mapping of str to sequence of str
        What is said, by way.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        The columns of :func:`score`.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import quiz, score_all
    >>> poll = quiz(samples)
    >>> float(score_all(poll, {"always": ["yes"] * len(poll)}).loc["always", "recall"])
    1.0
    """
    rows = {}
    for way, words in answers.items():
        rows[way] = score(poll, words, seed).loc["overall"]
    return pd.DataFrame(rows).T.astype(float)


def yes_f1(rows: np.ndarray) -> float:
    """Return the F1 of yes from columns present and said yes, (n, 2); 0 where nobody says yes."""
    hits = (rows[:, 0] * rows[:, 1]).sum()
    total = rows.sum()
    return float(2 * hits / total) if total else 0.0


def f1_gain(poll: Quiz, answers: Sequence[str], baseline: Sequence[str], seed: int = 0) -> Estimate:
    """Estimate how much higher the F1 of yes is than that of a baseline on the same questions.

    Parameters
    ----------
    poll : Quiz
        The questions.
    answers, baseline : sequence of str
        What was said by both.
    seed : int, default 0
        Of the bootstrap over scenes.

    Returns
    -------
    Estimate
        The difference with its interval.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import f1_gain, quiz
    >>> poll = quiz(samples)
    >>> truth = [question.answer for question in poll.questions]
    >>> f1_gain(poll, truth, ["no"] * len(truth)).value
    1.0
    """
    rows = np.stack([poll.present, _said_yes(answers), _said_yes(baseline)], axis=1).astype(float)
    return bootstrap(rows, poll.scenes, _f1_difference, n_resamples=1000, seed=seed)


def _f1_difference(rows: np.ndarray) -> float:
    return yes_f1(rows[:, [0, 1]]) - yes_f1(rows[:, [0, 2]])


def _said_yes(answers: Sequence[str]) -> np.ndarray:
    return np.array([normalise(answer).partition(" ")[0] == "yes" for answer in answers])


def record_gains(
    experiment: Experiment, poll: Quiz, answers: Mapping[str, Sequence[str]], seed: int = 0
) -> None:
    """Record HALL-1 and LEARN-2 against greedy decoding, the prompt and the matched threshold.

    Parameters
    ----------
    experiment : Experiment
        What the records belong to.
    poll : Quiz
        The test questions.
    answers : mapping of str to sequence of str
        Answers of "VCD", "ICD", "L2S", "greedy", "prompt", and "threshold as" each of the first
        three.
    seed : int, default 0
        Of the bootstrap.
    """
    for way, claim in {"VCD": "HALL-1", "ICD": "HALL-1", "L2S": "LEARN-2"}.items():
        baselines = {
            "greedy": "greedy",
            "prompt": "prompt",
            "threshold with the same yes-rate": f"threshold as {way}",
        }
        for against, name in baselines.items():
            gain = f1_gain(poll, answers[way], answers[name], seed)
            variant = f"{way}, against {against}"
            experiment.record(claim, gain, against, variant, "validation")


def record_captions(
    experiment: Experiment,
    samples: Sequence[Sample],
    captions: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> list[bool]:
    """Record HALL-1 on captions, where a decoding changes which objects they name.

    Parameters
    ----------
    experiment : Experiment
        What the records belong to.
    samples : sequence of Sample
        What the captions are of.
    captions : mapping of str to sequence of str
        Captions of "greedy", "VCD" and "ICD".
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    list of bool
        For each record, whether it is confirmed.
    """
    verdicts = []
    for way in ("VCD", "ICD"):
        gain = captions_gain(samples, captions[way], captions["greedy"], seed)
        # where no count changes there is no spread to resample, and nothing to judge
        if gain is None or gain.high == gain.low:
            continue
        verdict = experiment.record("HALL-1", gain, "greedy", f"captions, {way}", "fixed")
        verdicts.append(verdict == "confirmed")
    return verdicts


def best_on_validation(
    poll: Quiz, candidates: Mapping[object, Sequence[str]]
) -> tuple[object, pd.Series]:
    """Choose the setting whose answers have the highest F1 of yes.

    Parameters
    ----------
    poll : Quiz
        Validation questions.
    candidates : mapping of setting to sequence of str
        What is said at each setting; of equal ones the first is taken.

    Returns
    -------
    tuple of setting, and pandas.Series
        The choice, and the F1 of all.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import best_on_validation, quiz
    >>> poll = quiz(samples)
    >>> truth = [question.answer for question in poll.questions]
    >>> best_on_validation(poll, {0: ["no"] * len(truth), 1: truth})[0]
    1
    """
    scores = {}
    for setting, answers in candidates.items():
        scores[setting] = yes_f1(np.stack([poll.present, _said_yes(answers)], axis=1))
    best = max(scores, key=scores.__getitem__)
    return best, pd.Series(list(scores.values()), index=list(scores), name="F1 of yes")


def thresholds(gaps: np.ndarray) -> dict[float, list[str]]:
    """Return the answers under every threshold between two gaps, by threshold.

    Use it with :func:`best_on_validation`, for the best threshold.

    Parameters
    ----------
    gaps : array of float
        As :func:`yes_gap` gives them, (n,).

    Returns
    -------
    dict of float to list of str
        The thresholds from the highest, which says yes once, to the lowest, which always does.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.hallucination import thresholds
    >>> thresholds(np.array([0.0, 2.0]))
    {1.0: ['no', 'yes'], -1.0: ['yes', 'yes']}
    """
    result = {}
    for n_yes in range(1, len(gaps) + 1):
        threshold = matched_threshold(gaps, n_yes / len(gaps))
        result[threshold] = by_threshold(gaps, threshold)
    return result


def yes_share(answers: Sequence[str]) -> float:
    """Return the share of answers whose first word is yes.

    Parameters
    ----------
    answers : sequence of str
        What was said.

    Returns
    -------
    float
        From 0 to 1.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import yes_share
    >>> yes_share(["Yes.", "no", "snow", "yes"])
    0.5
    """
    return float(_said_yes(answers).mean())


def rates(poll: Quiz, answers: Sequence[str]) -> dict[str, float]:
    """Return the share of yes, and precision and recall of yes.

    Parameters
    ----------
    poll : Quiz
        The questions.
    answers : sequence of str
        What was said.

    Returns
    -------
    dict of str to float
        yes_ratio, precision and recall; NaN where undefined.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import quiz, rates
    >>> poll = quiz(samples[:2])
    >>> rates(poll, ["yes"] * len(poll))["recall"]
    1.0
    """
    yes = _said_yes(answers)
    hits = (yes & poll.present).sum()
    return {
        "yes_ratio": float(yes.mean()),
        "precision": float(hits / yes.sum()) if yes.any() else np.nan,
        "recall": float(hits / poll.present.sum()) if poll.present.any() else np.nan,
    }


def paths(
    poll: Quiz,
    logits: Float[Tensor, "n v"],
    second: Mapping[str, Float[Tensor, "n v"]],
    vlm: VLM,
    strengths: Sequence[float],
    beta: float,
) -> dict[str, pd.DataFrame]:
    """Score contrastive decodings at several strengths, for a figure.

    Parameters
    ----------
    poll : Quiz
        The questions.
    logits : Tensor
        Logits (n, v) of the model as it is.
    second : mapping of str to Tensor
        Logits (n, v) of the second branch, by decoding.
    vlm : VLM
        The model.
    strengths : sequence of float
        The strengths.
    beta : float
        The plausibility cut.

    Returns
    -------
    dict of str to pandas.DataFrame
        By decoding: the columns of :func:`rates`, one row a strength.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import paths, quiz, read_first
    >>> poll = quiz(samples[:1])
    >>> logits = read_first(vlm, poll.images, poll.texts).logits
    >>> paths(poll, logits, {"VCD": logits}, vlm, [0.0, 1.0], 0.1)["VCD"].shape
    (2, 3)
    """
    result = {}
    for way, disturbed in second.items():
        rows = []
        for alpha in strengths:
            words = first_words(vlm, contrast(logits, disturbed, alpha, beta))
            rows.append(rates(poll, words))
        result[way] = pd.DataFrame(rows)
    return result


def threshold_curve(poll: Quiz, gaps: np.ndarray) -> pd.DataFrame:
    """Score every threshold on the gaps: what moving the rate of yes alone can reach.

    Parameters
    ----------
    poll : Quiz
        The questions.
    gaps : array of float
        As :func:`yes_gap` gives them, (n,).

    Returns
    -------
    pandas.DataFrame
        Columns yes_ratio, precision and recall, one row a threshold, from the highest to the
        lowest.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.tutorials.hallucination import quiz, threshold_curve
    >>> poll = quiz(samples)
    >>> curve = threshold_curve(poll, np.arange(len(poll), dtype=float))
    >>> curve.iloc[-1].round(2).to_dict()["recall"]
    1.0
    """
    order = np.argsort(-gaps, kind="stable")
    hits = np.cumsum(poll.present[order])
    n_yes = np.arange(1, len(gaps) + 1)
    table = {
        "yes_ratio": n_yes / len(gaps),
        "precision": hits / n_yes,
        "recall": hits / max(1, poll.present.sum()),
    }
    return pd.DataFrame(table)


def off_curve(curve: pd.DataFrame, path: pd.DataFrame) -> float:
    """Return how far a path leaves the curve of thresholds, at most, in precision or recall.

    Parameters
    ----------
    curve : pandas.DataFrame
        From :func:`threshold_curve`.
    path : pandas.DataFrame
        Rows of :func:`rates`; those that never say yes do not count.

    Returns
    -------
    float
        The largest distance from the curve at the same yes-ratio.

    Examples
    --------
    >>> import pandas as pd
    >>> from xlvlms_tutorial.tutorials.hallucination import off_curve
    >>> columns = ["yes_ratio", "precision", "recall"]
    >>> curve = pd.DataFrame([[0.5, 1.0, 1.0], [1.0, 0.5, 1.0]], columns=columns)
    >>> off_curve(curve, pd.DataFrame([[0.75, 0.7, 1.0]], columns=columns))
    0.05
    """
    path = path.dropna()
    distances = [0.0]
    for name in ("precision", "recall"):
        expected = np.interp(path["yes_ratio"], curve["yes_ratio"], curve[name])
        distances += np.abs(path[name] - expected).round(12).tolist()
    return max(distances)


def chair_table(
    samples: Sequence[Sample], captions: Mapping[str, Sequence[str]], seed: int = 0
) -> pd.DataFrame:
    """Return CHAIR of several sets of captions, one row a set.

    Parameters
    ----------
    samples : sequence of Sample
        What the captions are of.
    captions : mapping of str to sequence of str
        The captions by way of decoding, one a sample.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        Columns CHAIR_i with low and high, n (objects named) and CHAIR_s; no rows where no object is
        known.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import chair_table
    >>> true = [sample.captions[0] for sample in samples]
    >>> chair_table(samples, {"true": true}).loc["true", ["CHAIR_i", "CHAIR_s"]].tolist()
    [0.0, 0.0]
    """
    present, objects = objects_of(samples)
    rows = {}
    for way, texts in captions.items():
        if objects:
            scores = chair(texts, present, objects, seed)
            by_object = scores.loc["CHAIR_i"].rename({"value": "CHAIR_i"})
            rows[way] = by_object.to_dict() | {"CHAIR_s": scores.loc["CHAIR_s", "value"]}
    columns = ["CHAIR_i", "low", "high", "n", "CHAIR_s"]
    return pd.DataFrame(list(rows.values()), index=list(rows), columns=columns)


def captions_gain(
    samples: Sequence[Sample], captions: Sequence[str], baseline: Sequence[str], seed: int = 0
) -> Estimate | None:
    """Estimate how much smaller the share of absent objects among those named is (CHAIR_i).

    Parameters
    ----------
    samples : sequence of Sample
        What the captions are of.
    captions, baseline : sequence of str
        The captions of both, one a sample.
    seed : int, default 0
        Of the bootstrap over samples.

    Returns
    -------
    Estimate or None
        CHAIR_i of the baseline minus that of the captions; None where no caption names an object.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import captions_gain
    >>> captions = [sample.captions[0] for sample in samples]
    >>> captions_gain(samples, captions, captions).value
    0.0
    """
    present, objects = objects_of(samples)
    if not objects:
        return None
    counts = []
    for names, first, second in zip(present, captions, baseline, strict=True):
        row = []
        for caption in (first, second):
            value, n = chair([caption], [names], objects).loc["CHAIR_i", ["value", "n"]]
            row += [value * n if n else 0.0, n]
        counts.append(row)
    rows = np.array(counts, dtype=float)
    if not rows[:, [1, 3]].sum(axis=0).all():
        return None
    return bootstrap(rows, statistic=_chair_difference, n_resamples=1000, seed=seed)


def _chair_difference(rows: np.ndarray) -> float:
    absent, named, absent_before, named_before = rows.sum(axis=0)
    if not named or not named_before:
        return float("nan")
    return float(absent_before / named_before - absent / named)


def marked_answers(poll: Quiz, rows: Sequence[int], answers: Sequence[str]) -> list[str]:
    """Write beside answers what is wrong with them.

    Use it for the answers of :func:`~xlvlms_tutorial.view.dial` at each strength, with "wrong" as
    the word that is marked.

    Parameters
    ----------
    poll : Quiz
        The questions.
    rows : sequence of int
        Which of them are shown.
    answers : sequence of str
        What was said to all of them.

    Returns
    -------
    list of str
        A line for each row that is shown.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import marked_answers, quiz
    >>> poll = quiz(samples[:1])
    >>> lines = marked_answers(poll, [0], ["yes"] * 3)
    >>> lines[0].startswith("yes")
    True
    """
    yes = _said_yes(answers)
    lines = []
    for row in rows:
        note = ""
        if yes[row] and not poll.present[row]:
            note = " (wrong: it is not there)"
        if poll.present[row] and not yes[row]:
            note = " (wrong: it is there)"
        lines.append(answers[row] + note)
    return lines


def at_strengths(
    poll: Quiz,
    rows: Sequence[int],
    logits: Float[Tensor, "n v"],
    second: Mapping[str, Float[Tensor, "n v"]],
    vlm: VLM,
    strengths: Sequence[float],
    beta: float,
) -> dict[tuple[str, str], list[str]]:
    """Collect the answers that a dial shows, by decoding and strength.

    Parameters
    ----------
    poll : Quiz
        The questions.
    rows : sequence of int
        Which of them are shown.
    logits : Tensor
        Logits (n, v) of the model as it is.
    second : mapping of str to Tensor
        Logits (n, v) of the second branch, by decoding.
    vlm : VLM
        The model.
    strengths : sequence of float
        The strengths.
    beta : float
        The plausibility cut.

    Returns
    -------
    dict of (str, str) to list of str
        By decoding and a label of the strength with the share of yes over all questions: the lines
        of :func:`marked_answers`.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.hallucination import at_strengths, quiz, read
    >>> poll = quiz(samples[:1])
    >>> logits = read(vlm, poll).logits
    >>> marked = at_strengths(poll, [0], logits, {"VCD": logits}, vlm, [0.0, 1.0], 0.1)
    >>> [decoding for decoding, _ in marked]
    ['VCD', 'VCD']
    """
    result = {}
    for way, disturbed in second.items():
        for alpha in strengths:
            words = first_words(vlm, contrast(logits, disturbed, alpha, beta))
            label = f"{alpha:g} (yes to {yes_share(words):.0%})"
            result[way, label] = marked_answers(poll, rows, words)
    return result


def check_rates(
    shares: Mapping[str, float],
    scored: pd.DataFrame,
    curve: pd.DataFrame,
    paths: Mapping[str, pd.DataFrame],
) -> dict[str, bool]:
    """Check what the chapter says about rates of yes.

    Parameters
    ----------
    shares : mapping of str to float
        The share of yes of each branch alone, with "VCD" and "ICD".
    scored : pandas.DataFrame
        As :func:`score_all` gives it.
    curve : pandas.DataFrame
        As :func:`threshold_curve` gives it.
    paths : mapping of str to pandas.DataFrame
        As the function of this name gives them.

    Returns
    -------
    dict of str to bool
        Statements, and whether they hold.
    """
    ratio = scored["yes_ratio"]
    distances = [off_curve(curve, paths[way]) for way in ("VCD", "ICD")]
    statements = {
        "the disturbed copies say no to most questions": max(shares["VCD"], shares["ICD"]) < 0.3,
        "both decodings say yes more often than greedy decoding": (
            ratio[["VCD", "ICD"]].min() > ratio["greedy"]
        ),
        "contrastive decoding stays near the curve of a bare threshold": max(distances) < 0.05,
        "mean steering says yes less often than greedy decoding": (
            ratio["mean steering"] < ratio["greedy"]
        ),
        "the best threshold says yes less often than greedy decoding": (
            ratio["threshold, best"] < ratio["greedy"]
        ),
    }
    return {statement: bool(holds) for statement, holds in statements.items()}
