"""Prompts and what is shown with them, as a model's processor takes them.

Inputs that a processor would not take, or take wrongly, are refused.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import BatchFeature

from xlvlms_tutorial.errors import (
    InputError,
    LoadError,
    XlvlmsError,
    not_a_picture,
    unusable_prompt,
)
from xlvlms_tutorial.models.failures import FAILURES, reason
from xlvlms_tutorial.models.turns import Conversation, Turn
from xlvlms_tutorial.samples import as_sound

# what processors call the text by which they find a picture's place
_MARKS = ("image_token", "video_token", "audio_token", "boi_token")

# the marks of those that stand for a picture: a chat template writes one of the two
_PICTURE_MARKS = ("image_token", "boi_token")

# take one picture a text as a list of pictures; all others take a list for each text
_FLAT = ("GotOcr2Processor", "IdeficsProcessor")


class Unpromptable(InputError):
    """A prompt that the processor does not take, or that has no place for what is shown."""

    def __init__(self, prompt: str, advice: str) -> None:
        super().__init__(f"cannot make a prompt from {prompt!r}", advice)


def marks(processor: object) -> tuple[str, ...]:
    """Return the texts by which a processor finds the places of what is shown in a prompt.

    They stand for pictures, videos and sounds.
    """
    texts = []
    for name in _MARKS:
        mark = getattr(processor, name, None)
        if mark is not None:
            texts.append(str(mark))
    return tuple(dict.fromkeys(texts))


def picture_marks(processor: object) -> list[str]:
    """Return the texts that may stand for a picture in a prompt: the one that is there counts."""
    tokens = [str(getattr(processor, name, None) or "") for name in _PICTURE_MARKS]
    tokens = [token for token in tokens if token]
    number = getattr(processor, "image_token_id", None)
    if not tokens and number is not None:
        tokens.append(processor.tokenizer.convert_ids_to_tokens(number))
    return tokens


def spoken(processor: object, text: str) -> str:
    """Return a text as it stands in the prompt, without the marks that are replaced by pictures."""
    if getattr(processor, "chat_template", None) is None:
        for mark in (*marks(processor), *picture_marks(processor)):
            text = text.replace(mark, "")
    return text.strip()


def _reserved(processor: object) -> set[str]:
    """Return the marks, and what a tokenizer has in their place once they are found.

    In a text, each is taken for a picture.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    ids = []
    tokens = []
    for name in _MARKS:
        number = getattr(processor, f"{name}_id", None)
        if number is not None:
            ids.append(number)
        tokens.append(getattr(tokenizer, name, None))
    if tokenizer is not None:
        tokens += tokenizer.convert_ids_to_tokens(ids)
    reserved = set(marks(processor))
    for token in tokens:
        if token:
            reserved.add(str(token))
    return reserved


def counted(
    texts: Sequence[str] | object,
    answers: Sequence[str] | object | None = None,
    minimum: int = 1,
    **contents: Sequence[object] | object | None,
) -> dict[str, Sequence[object]]:
    """Return what is shown by its kind, if there is one of it for each text.

    Parameters
    ----------
    texts : sequence of str
        The questions or instructions.
    answers : sequence of str, optional
        One for each text; none by default.
    minimum : int
        The smallest number of texts, 1 by default.
    **contents : sequence or None
        Pictures, videos or sounds by their kind, None for a kind that is not given.

    Returns
    -------
    dict
        What is shown, without the kinds that are not given.

    Raises
    ------
    InputError
        If one of the lists is none, or they are not equally many.
    """
    lists = {"text": texts, "answer": answers, **contents}
    for name, values in lists.items():
        is_list = hasattr(values, "__len__") and not isinstance(values, (str, bytes))
        if values is not None and not is_list:
            raise unusable_prompt(
                f"{type(values).__name__} as {name}", "give a list, with one for each sample"
            )
    media = {name: values for name, values in contents.items() if values is not None}
    sizes = set(map(len, media.values()))
    if answers is not None:
        sizes.add(len(answers))
    n = len(texts)
    if sizes - {n} or n < minimum:
        counts = [f"{len(values)} {name}s" for name, values in media.items()]
        listed = ", ".join(counts) or "no pictures"
        n_answers = 0 if answers is None else len(answers)
        raise unusable_prompt(f"{n} texts, {n_answers} answers, {listed}")
    return media


def media_of(
    conversations: Sequence[Conversation],
    videos: Sequence[object] | None,
    audio: Sequence[object] | None,
) -> dict[str, list]:
    """Return what is shown in the form and by the names in which processors take it.

    The pictures of ``conversations`` are a list for each text, none where no text is about one;
    ``videos`` and ``audio`` are lists, None where there is none of the kind.

    Raises
    ------
    InputError
        If a sound is none.
    """
    media = {}
    pictures = [conversation.pictures for conversation in conversations]
    if any(pictures):
        media["images"] = pictures
    if videos is not None:
        media["videos"] = list(videos)
    if audio is not None:
        media["audio"] = [as_sound(wave) for wave in audio]
    return media


def require_texts(
    processor: object,
    texts: Sequence[object],
    answers: Sequence[object] | None = None,
    names: Sequence[object] | None = None,
    conversations: Sequence[Conversation] | None = None,
) -> None:
    """Refuse texts and answers of which no prompt can be made.

    Parameters
    ----------
    processor : object
        The model's processor.
    texts : sequence
        The questions or instructions.
    answers : sequence, optional
        One for each text, None for a text without one; none by default.
    names : sequence, optional
        What errors call the samples; by default they are not named.
    conversations : sequence of Conversation, optional
        What stands before each text; nothing by default.

    Raises
    ------
    InputError
        If one is no text, a text is empty, or one holds a mark by which
        the processor finds a picture.
    """
    # without a chat template it is the text that says where the picture goes, except where the
    # processor (of BLIP-2) puts it first
    reserved = sorted(_reserved(processor))
    places_itself = getattr(processor, "chat_template", None) is None and not hasattr(
        processor, "num_query_tokens"
    )
    for row, text in enumerate(texts):
        answer = None if answers is None else answers[row]
        if not isinstance(text, str) or not text.strip():
            raise unusable_prompt(text)
        if not isinstance(answer, str | None):
            raise unusable_prompt(answer)
        questions, others = [text], [answer or ""]
        for kind, _, part in () if conversations is None else conversations[row].parts:
            (questions if kind == "demonstration" else others).append(part)
        for part in others if places_itself else questions + others:
            for mark in reserved:
                if mark in part:
                    advice = (
                        f"{mark!r} marks the place of a picture, video or sound for this "
                        "model: write it in another way"
                    )
                    raise unusable_prompt(_named(part, names, row), advice)


def prompt_of(
    processor: object,
    model: str,
    text: str,
    answer: str | None,
    media: Sequence[str],
    history: Sequence[Turn] = (),
    system: str | None = None,
) -> str:
    """Return the prompt for a text about what is shown, with its answer when one is given.

    Where there is no chat template, the text stays as it is, after the earlier turns, each on a
    line with its answer.

    Parameters
    ----------
    processor : object
        The model's processor.
    model : str
        The model's name, for errors.
    text : str
        The question or instruction.
    answer : str or None
        The answer, put where the model would begin its own.
    media : sequence of str
        What is shown in the last turn: "image", "video" or "audio", as often as there are some.
    history : sequence of Turn
        The earlier turns, each with a list of its pictures.
    system : str or None
        The system prompt.

    Raises
    ------
    InputError
        If the text is empty, or text or answer hold what marks a picture for this model. If the
        chat template leaves out the system prompt or what an earlier turn says.
    LoadError
        If the chat template fails.
    """
    before = [Conversation(tuple(history), [], system)]
    require_texts(processor, [text], [answer], conversations=before)
    if getattr(processor, "chat_template", None) is None:
        lines = [] if system is None else [system]
        for turn in history:
            lines.append(f"{turn.text} {turn.answer}".strip())
        return "\n".join([*lines, text]) + (f" {answer}" if answer else "")
    turns = [*history, Turn((), text)]
    messages = []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    parts: list[dict[str, str]] = []
    for turn in turns:
        parts += _content(turn, media if turn is turns[-1] else ["image"] * len(turn.images), parts)
        if turn.answer:
            messages.append({"role": "user", "content": parts})
            content = [{"type": "text", "text": turn.answer}]
            messages.append({"role": "assistant", "content": content})
            parts = []
    messages.append({"role": "user", "content": parts})
    chat = chat_of(processor, model, messages)
    for kind, _, part in before[0].parts:
        if part.strip() not in chat:
            raise Unpromptable(
                part,
                f"the chat template of {model!r} leaves out the {kind} of a conversation: "
                "say it in the question",
            )
    if not answer:
        return chat
    # LLaVA 1.5 opens an answer by "ASSISTANT:": the first word that it generates has its space
    # before it, another token than without
    spaced = chat[-1:].isspace() or answer[0].isspace()
    return chat + answer if spaced else f"{chat} {answer}"


def _content(turn: Turn, media: Sequence[str], before: Sequence[object]) -> list[dict[str, str]]:
    """Return what a user shows and says in a turn, which may go on with a turn before."""
    parts = [{"type": kind} for kind in media]
    if turn.text:
        apart = "\n" if before and not parts else ""
        parts.append({"type": "text", "text": apart + turn.text})
    return parts


def placeholders_of(placeholders: dict[str, int], kinds: tuple[str, ...]) -> dict[str, int]:
    """Return a model's placeholders under the name of what is shown.

    A model that takes clips or sounds in the place of a picture has a picture's placeholder only:
    it gets the name of what is shown (``kinds``), and the other marks are left out.
    ``placeholders`` are the model's own.
    """
    if len(kinds) == 1 and "image" in placeholders and kinds[0] not in placeholders:
        return {kinds[0]: placeholders["image"]}
    return placeholders


def chat_of(processor: object, model: str, messages: Sequence[Mapping[str, object]]) -> str:
    """Return the chat-formatted prompt of a conversation, up to where the answer begins.

    Parameters
    ----------
    processor : object
        The model's processor, with a chat template.
    model : str
        The model's name, for errors.
    messages : sequence of Mapping
        Who shows and says what, in the form that chat templates take.

    Raises
    ------
    LoadError
        If the chat template is no template, or fails.
    """
    try:
        return processor.apply_chat_template(list(messages), add_generation_prompt=True)
    except Exception as cause:
        # a template is a program of its own, and raises whatever it leads to
        raise LoadError(
            f"the chat template of {model!r} fails ({reason(cause)})", "correct it and load again"
        ) from cause


def inputs_of(
    processor: object,
    prompts: Sequence[str],
    contents: Mapping[str, Sequence[object]],
    names: Sequence[object],
) -> BatchFeature:
    """Return model inputs for prompts and what is given with them, padded.

    Parameters
    ----------
    processor : object
        The model's processor.
    prompts : sequence of str
        Chat-formatted prompts.
    contents : Mapping of str to sequence
        Pictures, videos or sounds, one for each prompt, by the processor's names for them.
    names : sequence
        What errors call the samples.

    Raises
    ------
    InputError
        If the processor takes one of the pictures, or of the prompts, not.
    """
    options = {"return_tensors": "pt", "padding": True}
    start = getattr(processor.tokenizer, "bos_token", None)
    if start and all(prompt.startswith(start) for prompt in prompts):
        # transformers' own apply_chat_template: the tokenizer would add a second one
        options["add_special_tokens"] = False
    several = any(len(pictures) > 1 for pictures in contents.get("images", ()))
    if several and hasattr(processor, "return_text_replacement_offsets"):
        # what each picture was replaced by tells one from the next
        options["return_text_replacement_offsets"] = True
    try:
        return _called(processor, list(prompts), contents, options)
    except XlvlmsError:
        raise
    except (OSError, LookupError, *FAILURES) as cause:
        raise _unfit(processor, prompts, contents, names, options, cause) from cause


def _called(
    processor: object,
    prompts: list[str],
    contents: Mapping[str, Sequence[object]],
    options: Mapping[str, object],
) -> object:
    """Return what a processor makes of prompts and what is shown with them."""
    classes = {kind.__name__ for kind in type(processor).__mro__}
    if classes.isdisjoint(_FLAT):
        return processor(text=prompts, **contents, **options)
    if not contents:
        # Idefics takes a list of texts without pictures for the pieces of one
        return processor(text=[[prompt] for prompt in prompts], **options)
    if "images" not in contents:
        return processor(text=prompts, **contents, **options)
    if any(len(pictures) != 1 for pictures in contents["images"]):
        pieces = []
        for prompt, pictures in zip(prompts, contents["images"], strict=True):
            pieces.append(_interleaved(prompt, pictures, picture_marks(processor)[0]))
        return processor(text=pieces, **options)
    flat = dict(contents)
    flat["images"] = [picture for (picture,) in contents["images"]]
    return processor(text=prompts, **flat, **options)


def _interleaved(prompt: str, pictures: Sequence[object], mark: str) -> list[object]:
    """Return the pieces of a prompt, each picture at its mark; without marks pictures go first."""
    texts = prompt.split(mark)
    if len(texts) == 1:
        return [*pictures, prompt]
    pieces: list[object] = []
    for number, text in enumerate(texts):
        if number:
            pieces.append(pictures[number - 1])
        if text.strip():
            pieces.append(text)
    return pieces


def _unfit(
    processor: object,
    prompts: Sequence[str],
    contents: Mapping[str, Sequence[object]],
    names: Sequence[object],
    options: Mapping[str, object],
    cause: Exception,
) -> XlvlmsError:
    """Return this package's error for the first sample that a processor does not take alone."""
    row = 0
    for row, prompt in enumerate(prompts):
        try:
            content = {name: [values[row]] for name, values in contents.items()}
            _called(processor, [prompt], content, options)
        except (OSError, LookupError, *FAILURES) as own_cause:
            cause = own_cause
            break
    named = _named(prompts[row], names, row)
    places = marks(processor)
    if contents and places and not any(mark in prompts[row] for mark in places):
        return _placeless(processor, named)
    if "images" in contents and len(contents["images"][row]) == 1:
        width, height = contents["images"][row][0].size
        problem = (
            f"of {width} x {height} pixels is not taken by the model's processor ({reason(cause)})"
        )
        return not_a_picture(
            f"the picture of sample {names[row]!r}",
            problem,
            "crop or resize it, or leave the sample out",
        )
    return Unpromptable(
        f"{named}: {reason(cause)}", "change what the sample shows or says, or leave it out"
    )


def require_marks(
    processor: object,
    prompts: Sequence[str],
    conversations: Sequence[Conversation],
    names: Sequence[object],
) -> None:
    """Refuse prompts with more, or fewer, places for pictures than they have pictures.

    A processor counts them over the whole batch, and would give a row another's pictures. Prompts
    without any place are left to it: some put the picture first themselves.

    Parameters
    ----------
    processor : object
        The model's processor.
    prompts : sequence of str
        Chat-formatted prompts.
    conversations : sequence of Conversation
        What they show.
    names : sequence
        What errors call the samples.

    Raises
    ------
    InputError
        If there is one, with both numbers.
    """
    tokens = picture_marks(processor)
    for row, (prompt, conversation) in enumerate(zip(prompts, conversations, strict=True)):
        places = max((prompt.count(token) for token in tokens), default=0)
        n = len(conversation.pictures)
        if places in (0, n):
            continue
        if getattr(processor, "chat_template", None) is None:
            advice = f"write {tokens[0]!r} once for each picture"
        else:
            advice = "the chat template has to write one place for each picture: correct it"
        raise Unpromptable(
            f"{n} pictures and {places} places for them in the prompt of sample {names[row]!r}",
            advice,
        )


def require_places(
    processor: object,
    ids: Tensor,
    placeholders: Mapping[int, Sequence[bool]],
    texts: Sequence[str],
    names: Sequence[object],
) -> None:
    """Refuse rows without the ids that stand for what they show.

    The model would answer without having seen it.

    Parameters
    ----------
    processor : object
        The model's processor.
    ids : Tensor
        Input ids (b, t).
    placeholders : Mapping of int to sequence of bool
        For each id, whether it has to stand in each row.
    texts : sequence of str
        The questions or instructions, for errors.
    names : sequence
        What errors call the samples.

    Raises
    ------
    InputError
        If there is one, with what is missing.
    """
    for token, needed in placeholders.items():
        present = (ids == token).any(dim=1).tolist()
        for row, (has, needs) in enumerate(zip(present, needed, strict=True)):
            if needs and not has:
                raise _placeless(processor, _named(texts[row], names, row))


def _placeless(processor: object, prompt: str) -> Unpromptable:
    advice = "save one beside the processor (or set vlm.processor.chat_template)"
    if getattr(processor, "chat_template", None) is None:
        choices = " or ".join(map(repr, marks(processor)))
        return Unpromptable(
            prompt,
            (
                "there is no chat template to say where the picture goes: "
                f"{advice}, or write {choices} there"
            ),
        )
    return Unpromptable(
        prompt, f"the chat template has no place for what is shown: {advice} that has"
    )


def _named(text: str, names: Sequence[object] | None, row: int) -> str:
    return text if names is None else f"{text} (sample {names[row]!r})"


def text_options(processor: object) -> frozenset[str]:
    """Return the names of what a processor takes beside a text."""
    kwargs = getattr(processor, "valid_processor_kwargs", None)
    text = getattr(kwargs, "__annotations__", {}).get("text_kwargs")
    return frozenset(getattr(text, "__annotations__", {}))
