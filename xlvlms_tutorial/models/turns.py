"""Pictures a text, earlier turns and a system prompt, in the form in which prompts are made.

A text may be about no picture, one or several, and stand at the end of a conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from PIL import Image

from xlvlms_tutorial.errors import InputError, unusable_prompt
from xlvlms_tutorial.samples import as_image
from xlvlms_tutorial.validation import require_same_length

# in a batch with pictures its model lets texts without one read blank pictures
_ALL_OR_NONE = ("MllamaProcessor",)

# take one picture a prompt: their model has one place for it, at the beginning
_ONE_PICTURE = ("Blip2Processor", "GotOcr2Processor", "InstructBlipProcessor")


class Turn(NamedTuple):
    """An earlier turn of a conversation: what was shown and asked, and the answer.

    Give lists of them as ``history`` to ``vlm.batch``, ``vlm.generate`` or ``capture``. A plain
    tuple of the three does as well.

    Parameters
    ----------
    images : picture, sequence of pictures, or None
        What the turn shows: none, one picture or several.
    text : str
        What was asked or said; empty where pictures stand alone.
    answer : str
        What was answered. Where it is empty, the turn goes on with the next one.

    Examples
    --------
    >>> from xlvlms_tutorial.models import Turn
    >>> earlier = Turn([samples[1].image], "What is in the picture?", "A frog.")
    >>> inputs = vlm.batch([samples[0].image], ["And here?"], history=[[earlier]])
    >>> inputs.mask("image").sum().item(), inputs.mask("image 2").sum().item()
    (32, 16)
    """

    images: object = ()
    text: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Conversation:
    """What stands before a text, and the pictures of all turns.

    Parameters
    ----------
    history : tuple of Turn
        The earlier turns, each with a list of its pictures.
    images : list of pictures
        Those of the last turn.
    system : str or None
        The system prompt.
    """

    history: tuple[Turn, ...]
    images: list[Image.Image]
    system: str | None

    @property
    def pictures(self) -> list[Image.Image]:
        """All pictures, in the order in which they are shown."""
        earlier = chain.from_iterable(turn.images for turn in self.history)
        return [*earlier, *self.images]

    @property
    def single(self) -> bool:
        """Whether it is one text about one picture, after no earlier turn."""
        return len(self.images) == 1 and not self.history

    @property
    def parts(self) -> list[tuple[str, int, str]]:
        """The texts before the last turn: kind of span, number of the turn (from 1) and text."""
        texts = [] if self.system is None else [("system", 0, self.system)]
        for number, turn in enumerate(self.history, start=1):
            texts.append(("demonstration", number, turn.text))
            texts.append(("demonstration answer", number, turn.answer))
        return texts


def conversations_of(
    texts: Sequence[str],
    images: Sequence[object] | None,
    history: Sequence[Sequence[Turn | tuple]] | object | None,
    system: str | None,
) -> list[Conversation]:
    """Return the conversation that ends with each text.

    Parameters
    ----------
    texts : sequence of str
        The questions or instructions of the last turns.
    images : sequence, or None
        For each text a picture, a list of pictures, or None.
    history : sequence of sequences of Turn, or None
        The earlier turns of each text.
    system : str or None
        The system prompt of all.

    Raises
    ------
    InputError
        If something given as a picture is none, a turn is no turn, or says and shows nothing, or
        the system prompt is no text.
    """
    if system is not None and (not isinstance(system, str) or not system.strip()):
        raise InputError(f"a system prompt {system!r}", "give a text, or None for no system prompt")
    require_history(texts, history)
    conversations = []
    for row in range(len(texts)):
        earlier = () if history is None else tuple(_turn(turn) for turn in history[row])
        shown = None if images is None else images[row]
        conversations.append(Conversation(earlier, _pictures(shown), system))
    return conversations


def require_history(
    texts: Sequence[str], history: Sequence[Sequence[Turn | tuple]] | object | None
) -> None:
    """Refuse earlier turns that are not a list for each text.

    Parameters
    ----------
    texts : sequence of str
        The questions or instructions of the last turns.
    history : sequence of sequences of Turn, or None
        The earlier turns of each text; None passes.

    Raises
    ------
    InputError
        If they are not.
    """
    if history is None:
        return
    if isinstance(history, str) or not hasattr(history, "__len__"):
        raise unusable_prompt(
            f"{type(history).__name__} as history", "give a list of turns for each text"
        )
    require_same_length(texts=texts, history=history)


def _turn(turn: object) -> Turn:
    """Return a turn with a list of its pictures, once it is checked."""
    if isinstance(turn, str) or not isinstance(turn, Sequence) or len(turn) != 3:
        raise InputError(
            f"{turn!r:.80} as an earlier turn", "give Turn(images, text, answer), or such a tuple"
        )
    images, text, answer = turn
    for part in (text, answer):
        if not isinstance(part, str):
            raise unusable_prompt(part, "give text and answer of an earlier turn as texts")
    pictures = _pictures(images)
    if not pictures and not text.strip():
        raise InputError("an earlier turn that shows and asks nothing", "leave it out")
    return Turn(pictures, text, answer)


def _pictures(images: object) -> list[Image.Image]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [as_image(picture) for picture in images]
    return [as_image(images)]


def require_takes(
    processor: object, model: str, conversations: Sequence[Conversation], names: Sequence[object]
) -> None:
    """Refuse numbers of pictures that a model does not take, or takes wrongly.

    Some take exactly one picture a prompt, others none only where the whole batch has none.

    Parameters
    ----------
    processor : object
        The model's processor.
    model : str
        The model's name, for errors.
    conversations : sequence of Conversation
        Where at least one of them has a picture.
    names : sequence
        What errors call the samples.

    Raises
    ------
    InputError
        If there are, with the first such sample.
    """
    classes = {kind.__name__ for kind in type(processor).__mro__}
    single = not classes.isdisjoint(_ONE_PICTURE)
    for row, conversation in enumerate(conversations):
        n = len(conversation.pictures)
        if not n and not classes.isdisjoint(_ALL_OR_NONE):
            raise InputError(
                f"sample {names[row]!r} has no picture, others have, and {model!r} "
                f"({type(processor).__name__}) takes them apart only",
                "make a batch of the texts about no picture",
            )
        if single and n != 1:
            raise InputError(
                f"{n} pictures in the prompt of sample {names[row]!r}, and {model!r} "
                f"({type(processor).__name__}) takes one a prompt",
                "give one picture for each text, or load a model that takes several",
            )
