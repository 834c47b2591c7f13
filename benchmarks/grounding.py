"""Grounding: the words of 20 concepts over a vocabulary of 150,000 tokens.

Today's way sorts the whole vocabulary, decodes the first 50 tokens one by one, and
looks each up in a list of words.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import typer
import wordfreq
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.command import start
from benchmarks.harness import CPU, Goal, Options, Report, always, count, median, ratio, timed
from xlvlms_tutorial.methods.concepts.words import as_lists, concept_words
from xlvlms_tutorial.methods.logit_lens.wordlists import ENGLISH, WordFilter
from xlvlms_tutorial.models.spans import decode
from xlvlms_tutorial.models.vlm import VLM

ROUNDS = 7
N_WORDS = 10
BEFORE_FILTER = 50  # how many tokens the released code looks at
LISTED = 236_736  # words in the list of the released code


def measure(report: Report) -> None:
    """All promises about the words of concepts."""
    options = report.options
    sizes = {
        "vocabulary": options.pick(150_000, 5000),
        "width": options.pick(4096, 64),
        "concepts": 20,
    }
    report.setting |= sizes | {"words": N_WORDS, "rounds": options.rounds(ROUNDS)}
    for device in devices(options):
        vlm = model(sizes["vocabulary"], sizes["width"], device)
        report.about(vlm.name)
        directions = torch.randn(
            sizes["concepts"], sizes["width"], generator=torch.Generator().manual_seed(1)
        )
        about(report, vlm, directions)
        del vlm


def about(report: Report, vlm: VLM, directions: Tensor) -> None:
    """All promises on one device."""
    listed = sorted(wordfreq.get_frequency_dict("en", "large"))[: report.options.pick(LISTED, 1000)]
    fresh, looked_up = fresh_filters(), set(listed)
    ways = {
        "ours": always(lambda: concept_words(vlm, directions, N_WORDS)),
        "first": always(lambda: concept_words(vlm, directions, N_WORDS, words=next(fresh))),
        "today": always(lambda: words_listed(vlm, directions, listed)),
        "sorted": always(lambda: words_listed(vlm, directions, looked_up)),
        "unembedding": always(lambda: vlm.unembed(directions)),
    }
    seconds = timed(ways, report.options.rounds(ROUNDS), vlm.device, label="words")
    k, size = len(directions), len(vlm.tokenizer)
    description = f"the words of {k} concepts over {size:,} tokens"
    report.promise(f"seconds: {description}", median(seconds["ours"]), Goal("<=", 1))
    report.promise(
        f"seconds: {description}, the filter used for the first time",
        median(seconds["first"]),
        Goal("<=", 2),
    )
    report.promise(
        f"{description}, sorted and looked up in a list (today's way), over ours",
        ratio(seconds, "today", "ours"),
        Goal(">=", 5),
    )
    report.promise(
        f"{description}, sorted and looked up in a set, over ours",
        ratio(seconds, "sorted", "ours"),
        Goal(">=", 1),
    )
    report.tell(f"{description}, over the bare logits", ratio(seconds, "ours", "unembedding"))
    short = sum(
        len(row_words) < N_WORDS
        for row_words in as_lists(concept_words(vlm, directions, N_WORDS)).values()
    )
    report.promise(
        f"concepts of {k} with fewer than {N_WORDS} words", count(short, k), Goal("==", 0)
    )
    short = sum(len(row_words) < N_WORDS for row_words in words_listed(vlm, directions, listed))
    report.tell(f"concepts of {k} with fewer than {N_WORDS} words, today's way", count(short, k))


def words_listed(vlm: VLM, directions: Tensor, listed: list[str] | set[str]) -> list[list[str]]:
    """The words of each direction as published code finds them, but for the logits.

    These are here those of all directions at once.
    """
    rows = []
    for logits in vlm.unembed(directions, norm=False):
        order = logits.argsort(descending=True)
        texts = [
            decode(vlm.tokenizer, [token]).lower().strip()
            for token in order[:BEFORE_FILTER].tolist()
        ]
        names = [
            text
            for text in texts
            if text in listed and len(text) > 2 and text not in ENGLISH_STOP_WORDS
        ]
        rows.append(names[:N_WORDS])
    return rows


def fresh_filters() -> Iterator[WordFilter]:
    """The same filter again and again, each new to the memory of filters."""
    number = 0
    while True:
        number += 1
        yield WordFilter(min_frequency=ENGLISH.min_frequency + 1e-6 * number)


def model(size: int, width: int, device: torch.device) -> VLM:
    """A language model of one layer with so many tokens.

    Two thirds begin a word, the others are pieces that go on with one.
    """
    vocabulary = list(wordfreq.get_frequency_dict("en", "large"))
    pieces = dict.fromkeys(
        [
            "<pad>",
            *(f"Ġ{word}" for word in vocabulary[: 2 * size // 3]),
            *(word[1:] for word in vocabulary),
        ]
    )
    tokens = [piece for piece in pieces if piece.removeprefix("Ġ")][:size]
    raw = Tokenizer(models.BPE({piece: number for number, piece in enumerate(tokens)}, []))
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with device:
        network = LlamaForCausalLM(config).eval().requires_grad_(False)
    return VLM(
        network,
        SimpleNamespace(tokenizer=tokenizer),
        f"{len(tokens):,} tokens of width {width:,} on {device.type}",
    )


def devices(options: Options) -> list[torch.device]:
    """The CPU, a GPU, or both.

    Raises
    ------
    typer.BadParameter
        If CUDA is asked for and absent.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "PyTorch finds no GPU here; use cpu or auto.", param_hint="--device"
        )
    result = [CPU] if options.device in ("auto", "cpu") else []
    return result + [torch.device("cuda")] * (
        options.device in ("auto", "cuda") and torch.cuda.is_available()
    )


if __name__ == "__main__":
    start({"grounding": measure})
