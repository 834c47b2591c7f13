"""Tokenizers that cut words as those of well-known models do, and what they make of a text."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?'-"
PIECES = ["▁dog", "▁do", "▁cat", "tle", "▁hot", "▁red", "▁a", "ing", "▁Dog"]


def pieces_tokenizer(prepend: str = "first") -> PreTrainedTokenizerFast:
    """Like LLaMA's: a bare space is a piece, and stands before digits and rare words.

    "always" puts one after special tokens too.
    """
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = (
        [(piece, 0.0) for piece in special] + [("▁", -2.0)] + [(piece, -3.0) for piece in PIECES]
    )
    raw = Tokenizer(
        models.Unigram(
            vocabulary + [(letter, -9.0) for letter in LETTERS], unk_id=1, byte_fallback=False
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    raw.decoder = decoders.Metaspace(prepend_scheme=prepend)
    raw.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def tokens_of(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text))


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Letters are tokens and all else falls back to bytes, as in LLaMA and Gemma."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, ":", "<unk>"]
    raw = Tokenizer(
        models.BPE(
            {name: k for k, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    raw.decoder = decoders.Sequence(back)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def wrapped(raw: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")


def bytes_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """Like GPT-2's: a token that begins a word has the space before it, written Ġ."""
    raw = Tokenizer(
        models.BPE(
            {token: k for k, token in enumerate(["<pad>", "<unk>", *tokens])}, [], unk_token="<unk>"
        )
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return wrapped(raw)


def bert_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """Like BERT's: a token that goes on with a word has ## before it."""
    raw = Tokenizer(
        models.WordPiece(
            {token: k for k, token in enumerate(["<pad>", "<unk>", *tokens])}, unk_token="<unk>"
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    return wrapped(raw)
