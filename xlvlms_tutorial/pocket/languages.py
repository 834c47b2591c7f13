"""The frozen language models behind the embedded connectors, and how they are spoken to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xlvlms_tutorial.pocket.assets import gemma_folder, language_model_folder

__all__ = ["LANGUAGES", "LanguageModel"]

_TURNS = (
    "{% for message in messages %}BEGIN"
    "{% for part in message['content'] %}{% if part['type'] in ('image', 'video', 'audio') %}"
    "PLACEHOLDER{% else %}TEXT{% endif %}{% endfor %}"
    "END{% endfor %}{% if add_generation_prompt %}GO{% endif %}"
)


def _template(**parts: str) -> str:
    template = _TURNS
    for name, text in parts.items():
        template = template.replace(name, text)
    return template


@dataclass(frozen=True)
class LanguageModel:
    """A frozen language model, and the form of its prompts.

    A prompt is the head, the picture's placeholders, the question and the answer, one after the
    other. A chat template says the same for whole conversations.

    Parameters
    ----------
    folder : callable
        Gives the folder of its weights and tokenizer, made on first use.
    placeholder : str
        A token that no text has: where the picture goes. No embedding has to be added.
    head : str
        What stands before the picture.
    question, answer : str
        Their forms, with "{}" for the text.
    chat_template : str
        The same in Jinja.
    stops : tuple of str
        The tokens that end an answer; the first also pads.
    numbers : int
        Weights, where they are so many that memory is asked before they are read; else 0.
    """

    folder: Callable[[], Path]
    placeholder: str
    head: str
    question: str
    answer: str
    chat_template: str
    stops: tuple[str, ...]
    numbers: int = 0


_RESERVED, _UNUSED = "<reponame>", "<unused0>"
LANGUAGES = {
    "smollm2": LanguageModel(
        language_model_folder,
        _RESERVED,
        "<|im_start|>user\n",
        "{}<|im_end|>\n<|im_start|>assistant\n",
        "{}<|im_end|>",
        _template(
            BEGIN="<|im_start|>{{ message['role'] }}\n",
            PLACEHOLDER=_RESERVED,
            TEXT="{{ part['text'] }}",
            END="<|im_end|>\n",
            GO="<|im_start|>assistant\n",
        ),
        ("<|im_end|>",),
    ),
    # A base model: it never saw marks of turns. Its tokenizer puts the beginning of text in front.
    "gemma": LanguageModel(
        gemma_folder,
        _UNUSED,
        "<bos>",
        "\nQuestion: {}\nAnswer:",
        " {}\n",
        _template(
            BEGIN="",
            PLACEHOLDER=_UNUSED,
            TEXT="{% if message['role'] == 'assistant' %}{{ '\\n' }}Answer: {% else %}"
            "{{ '\\n' }}Question: {% endif %}{{ part['text'] }}",
            END="",
            GO="{{ '\\n' }}Answer:",
        ),
        ("<eos>", "\n"),
        268_098_176,
    ),
}
