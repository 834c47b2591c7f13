"""Contract checks of what is shown: no picture, one or several in a prompt, and earlier turns.

Where there is no processor for the tiny model, inputs of two pictures are made by hand.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.contract.reference import GENERATION, Case, agree, differ
from tests.zoo.inputs import single
from tests.zoo.processors import RECIPES, save_processor
from xlvlms_tutorial.activations.hooks import read
from xlvlms_tutorial.errors import InputError, SpanError
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.models import Turn, anatomy
from xlvlms_tutorial.models.processors import ALONG_THE_SEQUENCE, load_processor, reads
from xlvlms_tutorial.models.prompts import picture_marks
from xlvlms_tutorial.models.spans import SPANS, Batch
from xlvlms_tutorial.models.vlm import VLM

RED, BLUE, GREEN = (
    Image.new("RGB", size, colour)
    for size, colour in [((40, 30), "red"), ((40, 30), "blue"), ((30, 60), "green")]
)
# its processor wants a package that is not installed here
_BY_HAND = ("smolvlm",)
_ONE = ("blip2", "instructblip", "got_ocr2")
_QUESTIONS = ("What colour is the key ?", "Is there a woman ?", "Describe the picture .")


def several_pictures(case: Case) -> str | None:
    """Prompts about none, one and several pictures, with earlier turns, in one batch as alone."""
    if case.name not in RECIPES or case.name in _BY_HAND:
        return _by_hand(case)
    vlm = VLM(case.vlm.model, processor(case.name), case.name)
    if "image" not in reads(vlm.processor):
        return "takes no pictures"
    if case.name in _ONE:
        return _refused(vlm)
    images = [[RED, BLUE], [GREEN], []]
    history = [[], [Turn(RED, _text(vlm, _QUESTIONS[0], 1), "red .")], []]
    texts = [_text(vlm, text, len(shown)) for text, shown in zip(_QUESTIONS, images, strict=True)]
    if case.name == "mllama":
        with pytest.raises(InputError, match="sample 2 has no picture, others have"):
            vlm.batch(images, texts, history=history)
        images, history, texts = images[:2], history[:2], texts[:2]
    batch = vlm.batch(images, texts, history=history)
    scores = vlm.forward(batch).logits[:, -1]
    for row, text in enumerate(texts):
        shown = [images[row]]
        if not shown[0] and case.name == "paligemma":  # its processor asks for a picture
            continue
        alone = vlm.batch(shown, [text], history=[history[row]])
        n = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -n:], alone["input_ids"][0]), row
        assert torch.equal(batch.spans[row, -n:], alone.spans[0]), row
        assert torch.equal(batch.numbers[row, -n:], alone.numbers[0]), row
        agree(scores[row], vlm.forward(alone).logits[0, -1], f"row {row} alone")
    _order(vlm, texts[0])
    return _numbered(vlm, batch, texts[0])


def _numbered(vlm: VLM, batch: Batch, text: str) -> str | None:
    """What is called the second picture is where another second picture makes other tokens."""
    kinds = {SPANS[kind] for kind in batch.spans[1].tolist()}
    assert kinds >= {"question", "demonstration", "demonstration answer"}
    if not vlm.placeholders:
        with pytest.raises(SpanError):
            vlm.batch([[RED, BLUE]], [text]).mask("image 2")
        return "no positions to number"
    first, second = (vlm.batch([[RED, shown]], [text]) for shown in (BLUE, RED))
    changed = (_embedded(vlm, first) != _embedded(vlm, second)).any(-1)
    assert torch.equal(changed, first.mask("image 2") & changed) and changed.any()
    pictures = [first.mask(f"image {number}") for number in (1, 2)]
    assert torch.equal(pictures[0] | pictures[1], first.mask("image"))
    assert not (pictures[0] & pictures[1]).any()
    vector = torch.linspace(-9, 9, vlm.width)
    with add(vlm, vector, 1, positions="image 2"):
        named = read(vlm, first, 2)[2, "resid_post"]
    with add(vlm, vector, 1, positions=pictures[1]):
        masked = read(vlm, first, 2)[2, "resid_post"]
    assert torch.equal(named, masked)
    differ(named, read(vlm, first, 2)[2, "resid_post"], "a vector at image 2")
    return None


def _order(vlm: VLM, text: str) -> None:
    """The pictures of a prompt are not the same in another order."""
    one, other = (vlm.batch([shown], [text]) for shown in ([RED, GREEN], [GREEN, RED]))
    first, second = (vlm.forward(batch).logits[:, -1] for batch in (one, other))
    assert not torch.equal(first, second)


def _embedded(vlm: VLM, batch: Batch) -> Tensor:
    """What goes into the decoder, pictures merged in."""
    inputs: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(kwargs["inputs_embeds"])

    hook = anatomy.decoder(vlm.model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        vlm.forward(batch)
    finally:
        hook.remove()
    return inputs[0]


def _refused(vlm: VLM) -> str:
    text = _text(vlm, _QUESTIONS[0], 1)
    for shown in ([RED, BLUE], []):
        with pytest.raises(InputError, match=f"{len(shown)} pictures .* takes one a prompt"):
            vlm.batch([[RED], shown], [text, text])
    assert len(vlm.batch([[RED], BLUE], [text, text])["input_ids"]) == 2
    return "refused: takes one"


def _text(vlm: VLM, text: str, n: int) -> str:
    """The text; without a chat template it says itself where its pictures go."""
    if vlm.processor.chat_template is not None or "Blip" in type(vlm.processor).__name__:
        return text
    return " ".join([*picture_marks(vlm.processor)[:1] * n, text])


@cache
def processor(name: str) -> object:
    """The genuine processor of a tiny model of the zoo."""
    from tests.zoo import build

    with TemporaryDirectory() as folder:
        build(name)[0].config.save_pretrained(folder)
        save_processor(name, Path(folder))
        return load_processor(folder, local_files_only=True)


def _by_hand(case: Case) -> str:
    """Two pictures in a row: what enters is that of each, and the first does not see the second."""
    if case.modality != "image":
        return "takes no pictures"
    vlm, inputs = case.vlm, single(case.name)
    n = inputs["input_ids"].shape[1]
    batch = vlm.prepare(twice(case.name, inputs))
    states, alone = (read(vlm, part, "all") for part in (batch, vlm.prepare(inputs)))
    # all pictures of Molmo2 see each other, in both directions
    for layer in range(1 if case.name == "molmo2" else vlm.n_layers + 1):
        key = layer, "resid_post"
        agree(states[key][:, :n], alone[key], key)
    negative = {
        key: -value if value.is_floating_point() else value for key, value in inputs.items()
    }
    second = read(vlm, vlm.prepare(negative), 0)[0, "resid_post"]
    agree(states[0, "resid_post"][:, n:], second, "the second picture's embeddings")
    assert batch.mask("image").sum() == 2 * vlm.prepare(inputs).mask("image").sum()
    with pytest.raises(SpanError, match="made elsewhere"):
        batch.mask("image 2")
    assert vlm.generate_ids(batch, **GENERATION).shape == (1, GENERATION["max_new_tokens"])
    return "inputs made by hand"


def twice(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One row that holds a row of one picture twice, the second time with its negative."""
    double = {}
    for key, value in inputs.items():
        other = -value if value.is_floating_point() else value
        if key in ("image_token_pooling",):  # which number the patches of all pictures
            other = value + value.numel()
        nested = key in ALONG_THE_SEQUENCE or (name in _BY_HAND and value.is_floating_point())
        double[key] = torch.cat([value, other], dim=1 if nested else 0)
    return double
