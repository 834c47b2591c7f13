"""Read facts off states layer by layer, and count what an intervention changes in captions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float

from xlvlms_tutorial.activations import capture
from xlvlms_tutorial.data import Sample
from xlvlms_tutorial.models import VLM
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.text import whole_words
from xlvlms_tutorial.tutorials.experiments import substitute


def first_tokens(tokens: Iterable[str], letters: int = 45) -> str:
    """Write tokens side by side, in a line of limited length.

    Use it to show in a table what a span begins with.

    Parameters
    ----------
    tokens : iterable of str
        The tokens of a span.
    letters : int, default 45
        How many letters the line has at most.

    Returns
    -------
    str
        The tokens as Python writes them.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.inside import first_tokens
    >>> first_tokens(["A", " man", " is"])
    "'A' ' man' ' is'"
    """
    return " ".join(map(repr, tokens))[:letters]


def truth_chances(
    vlm: VLM, samples: Sequence[Sample], captions: Sequence[str], factor: str
) -> Float[torch.Tensor, "pictures layers"]:
    """Read how probable the logit lens finds the true word, at each layer, in each caption.

    Use it to see at which depth a fact of the picture can be read as a word. It reads the state
    that predicts the first piece of the word.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Pictures whose truth is known.
    captions : sequence of str
        A caption for each.
    factor : str
        The known fact that is looked for, such as "place".

    Returns
    -------
    Tensor (pictures, layers)
        Probabilities, one row a caption that says the true word. There are no rows if none does.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.inside import truth_chances
    >>> captions = [sample.captions[0] for sample in samples]
    >>> truth_chances(vlm, samples, captions, "subject").shape[1] == vlm.n_layers + 1
    True
    """
    true_words = [str(sample.truth.get(factor)) for sample in samples]
    naming = []
    for number, (word, caption) in enumerate(zip(true_words, captions, strict=True)):
        if whole_words([word]).search(caption):
            naming.append(number)
    if not naming:
        return torch.zeros(0, vlm.n_layers + 1)
    words = sorted({true_words[number] for number in naming})
    answers = [captions[number] for number in naming]
    states = capture(
        vlm, [samples[number] for number in naming], "all", words=words, answers=answers
    )
    expected = [true_words[naming[row]] for row in states.table["sample"]]
    states = states.select(states.table["word"].to_numpy() == expected)
    tokens = [int(vlm.token_ids(word)[0]) for word in states.table["word"]]
    rows = torch.arange(len(tokens))
    chances = []
    for layer in states.layers:
        probabilities = vlm.unembed(states[layer]).softmax(dim=-1).cpu()
        chances.append(probabilities[rows, tokens])
    return torch.stack(chances, dim=1)


def groups_by_place(samples: Sequence[Sample], places: Sequence[str]) -> dict[str, list[Sample]]:
    """Collect the pictures of some places.

    Use it where a chapter compares two places, such as sand with snow. Places that no picture shows
    are replaced by those that most pictures show.

    Parameters
    ----------
    samples : sequence of Sample
        Pictures, some of which have a true "place".
    places : sequence of str
        The places.

    Returns
    -------
    dict of str to list of Sample
        The pictures by their place, in the order of ``places``.

    Examples
    --------
    >>> from xlvlms_tutorial import load_samples
    >>> from xlvlms_tutorial.tutorials.inside import groups_by_place
    >>> list(groups_by_place(load_samples("scenes", n=40), ["sand", "snow"]))
    ['sand', 'snow']
    """
    counts = Counter(str(sample.truth["place"]) for sample in samples if sample.truth.get("place"))
    groups: dict[str, list[Sample]] = {}
    for place in substitute(places, counts):
        groups[place] = [sample for sample in samples if sample.truth.get("place") == place]
    return groups


def count_words(
    captions: Mapping[object, Sequence[str]], samples: Sequence[Sample], words: Sequence[str]
) -> pd.DataFrame:
    """Count the captions that have a word, and those that still name the subject.

    Use it to see what an intervention changes in captions and what it leaves.

    Parameters
    ----------
    captions : mapping to sequence of str
        The captions of all samples, by what was done to the model.
    samples : sequence of Sample
        The pictures, in the order of the captions.
    words : sequence of str
        The words to count.

    Returns
    -------
    pandas.DataFrame
        One row for each key of ``captions``: how many captions have each word, and "subject kept".

    Examples
    --------
    >>> from xlvlms_tutorial import Sample
    >>> from xlvlms_tutorial.tutorials.inside import count_words
    >>> samples = [Sample("a", None, ("A man in snow.",), truth={"subject": "man"})]
    >>> count_words({"steered": ["A man on sand."]}, samples, ["sand", "snow"])
             sand  snow  subject kept
    steered     1     0             1
    """
    rows = {}
    for key, texts in captions.items():
        counts = {word: sum(word in text for text in texts) for word in words}
        subjects = [str(sample.truth.get("subject")) for sample in samples]
        same = [subject in text for subject, text in zip(subjects, texts, strict=True)]
        rows[key] = counts | {"subject kept": sum(same)}
    return pd.DataFrame.from_dict(rows, orient="index")


def share_predicted(vlm: VLM, batch: Batch) -> float:
    """Measure how many tokens of the answers the model predicts, as it is now.

    Use it inside an intervention. With answers that the model gave itself, it measures what the
    intervention costs.

    Parameters
    ----------
    vlm : VLM
        The model.
    batch : Batch
        Pictures, questions and answers.

    Returns
    -------
    float
        The share of the answers' tokens that are the most probable next token.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.inside import share_predicted
    >>> images, prompts = [samples[0].image], ["Describe the picture."]
    >>> answers = vlm.generate(images, prompts, max_new_tokens=4)
    >>> share_predicted(vlm, vlm.batch(images, prompts, answers)) > 0.7
    True
    """
    predicting = batch.mask("answer").roll(-1, dims=1)
    expected = batch["input_ids"].roll(-1, dims=1)[predicting]
    logits = vlm.forward(batch, use_cache=False).logits[predicting]
    return float((logits.argmax(dim=-1) == expected).float().mean())
