"""Answers as the VQA challenge scores them.

The accuracy is that of Antol et al. (2015), with leave-one-out averaging, on answers normalised by
the challenge's published rules. Its official script departs from these rules; what it gives is
``vqa_accuracy(..., official=True)``.
"""

from collections.abc import Sequence
from math import isfinite
from numbers import Real

import numpy as np
from jaxtyping import Float64

from xlvlms_tutorial.errors import no_estimate
from xlvlms_tutorial.metrics.plain import require_estimate, require_lists
from xlvlms_tutorial.metrics.vqa_official import as_compared
from xlvlms_tutorial.text import vqa_normalise
from xlvlms_tutorial.validation import require_same_length


def vqa_accuracy(
    predictions: Sequence[str | Real],
    references: Sequence[Sequence[str | Real]],
    official: bool = False,
) -> Float64[np.ndarray, "n"]:
    """Compute the VQA accuracy of each prediction against the answers that people gave.

    Right where three of the others said the same. With m references of which k match, each is left
    out once: ( k min(1, (k-1)/3) + (m-k) min(1, k/3) ) / m, which is the mean over the subsets of
    m - 1 people. A single reference is matched exactly. Both sides are normalised
    (:func:`~xlvlms_tutorial.text.vqa_normalise`). With two or three references no answer can reach
    1; the challenge has ten. From "VQA: Visual Question Answering" (Antol et al. 2015,
    arXiv 1505.00468).

    Parameters
    ----------
    predictions : sequence of str or number
        What a model has said; a number counts as its digits.
    references : sequence of sequence of str or number
        What people said to each question, one answer or more.
    official : bool, default False
        Whether to give what the challenge's evaluation script gives, with its own normalisation,
        for numbers that stand beside published ones. Where all people gave the same answer it
        normalises nothing, so that "Yes" against ten "yes" is 0; that alone lowers scores of models
        that write capitals or periods by several points. It never matches a single reference.

    Returns
    -------
    ndarray (n,)
        The accuracy of each prediction, 0 to 1.

    Raises
    ------
    InputError
        If there are no predictions, a question has no references, or text in place of a list of
        them, or an answer is no text or number. If there are not as many lists of references as
        predictions.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import vqa_accuracy
    >>> references = [["2"] * 10, ["red"] * 2 + ["blue"] * 8]
    >>> vqa_accuracy(["Two.", "red"], references).round(2).tolist()
    [1.0, 0.6]
    """
    require_same_length(predictions=predictions, references=references)
    require_estimate(len(predictions) > 0, "VQA accuracy", "no predictions", "one or more")
    require_lists(references, "VQA accuracy", "a list of one answer or more for each question")
    matches = []
    sizes = []
    for prediction, answers in zip(predictions, references, strict=True):
        text = _text(prediction)
        texts = list(map(_text, answers))
        if official:
            text, texts = as_compared(text, texts)
        else:
            text = vqa_normalise(text)
            texts = list(map(vqa_normalise, texts))
        matches.append(texts.count(text))
        sizes.append(len(texts))
    k = np.array(matches, dtype=np.float64)
    m = np.array(sizes, dtype=np.float64)
    # the mean over leaving out each person: k of the m gave this answer
    among_k = k * np.clip((k - 1) / 3, 0, 1)
    among_others = (m - k) * np.minimum(k / 3, 1)
    accuracy = (among_k + among_others) / m
    return accuracy if official else np.where(m == 1, k, accuracy)


def _text(answer: object) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, Real) or not isfinite(answer):
        raise no_estimate("VQA accuracy", f"the answer {answer!r}", "texts and finite numbers")
    return str(answer)
