"""The self-checks pass on models that are as we say, and each fails on one
that is broken in its own way.
"""

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn

from tests.support.tiny import tiny_llava
from tests.zoo import build, padded
from xlvlms_tutorial.errors import DeviceMemoryError
from xlvlms_tutorial.loading.self_check import CHECKS, REQUIRED, self_check
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import SPANS
from xlvlms_tutorial.models.vlm import VLM

NAMES = [
    "llava",
    "qwen2_vl",
    "qwen3_vl",
    "paligemma",
    "gemma3",
    "molmo2",
    "blip2",
    "mllama",
    "qwen2_audio",
]


@pytest.fixture
def checked():
    """A function that checks the tiny LLaVA, or another, after something was done to it."""

    def check(spoil=lambda vlm: None, name="llava"):
        model, inputs = build(name)
        vlm = VLM(model, None, name)
        batch = vlm.prepare(padded(name, inputs))
        spoil(vlm)
        return self_check(vlm, batch).set_index("check")

    return check


def failed(table) -> list[str]:
    return table.index[~table["passed"]].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_tested_architectures_pass(checked, name):
    table = checked(name=name)
    assert failed(table) == []
    assert list(table.index) == list(CHECKS)
    assert table.columns.tolist() == ["passed", "detail"]
    assert table["detail"].str.len().gt(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_no_failure(checked, dtype):
    assert failed(checked(lambda vlm: vlm.model.to(dtype))) == []


def test_a_model_with_its_processor_passes():
    vlm = tiny_llava()
    batch = vlm.batch(
        [Image.new("RGB", (40, 30))] * 2, ["What is the key ?", "Describe the picture ."]
    )
    table = self_check(vlm, batch).set_index("check")
    assert failed(table) == []
    assert table.loc["spans", "detail"] == "8 positions labelled, 8 measured, 0 differ"


def test_the_search_that_a_folder_asks_for_is_no_failure(checked):
    settings = {"num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.8}
    assert failed(checked(lambda vlm: vlm.model.generation_config.update(**settings))) == []


def test_the_positions_of_cross_attention_are_skipped_with_a_note(checked):
    assert (
        checked(name="mllama").loc["spans", "detail"]
        == "skipped: pictures enter by cross-attention, not in the sequence"
    )


def test_the_model_is_left_as_it_was(checked):
    recorded = []
    assert failed(checked(recorded.append)) == []
    (vlm,) = recorded
    modules = list(vlm.model.modules())
    # transformers keeps its own recorders of hidden states
    hooks = [
        hook
        for module in modules
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not [hook for hook in hooks if not hook.__module__.startswith("transformers.")]
    assert vlm.running is None


def test_a_block_more_in_the_config_fails(checked):
    def hide(vlm):
        vlm.model.config.text_config.num_hidden_layers = 4

    table = checked(hide)
    assert "blocks counted" in failed(table)
    assert table.loc["blocks counted", "detail"] == "3 blocks found, the config says 4"


def test_a_decoder_that_hides_a_block_fails(checked):
    """One block runs inside another.

    The list that is found holds two, and the config says three.
    """

    class Pair(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second
            self.self_attn, self.mlp = second.self_attn, second.mlp
            self.input_layernorm, self.post_attention_layernorm = (
                second.input_layernorm,
                second.post_attention_layernorm,
            )

        def forward(self, states, **options):
            return self.second(self.first(states, **options), **options)

    def hide(vlm):
        stack = vlm.blocks
        pair = Pair(stack[1], stack[2])
        del stack[2]
        stack[1] = pair
        anatomy.decoder(vlm.model).config.num_hidden_layers = 2  # the loop over the list
        vlm.model.config.text_config = hf.LlamaConfig(
            **vlm.model.config.text_config.to_dict() | {"num_hidden_layers": 3}
        )

    table = checked(hide)
    assert table.loc["blocks counted", "detail"] == "2 blocks found, the config says 3"
    assert not table.loc["blocks counted", "passed"]


def test_a_block_that_never_runs_fails(checked):
    def shorten(vlm):
        decoder = anatomy.decoder(vlm.model)
        decoder.config.num_hidden_layers = 2
        vlm.model.config.text_config = hf.LlamaConfig(
            **vlm.model.config.text_config.to_dict() | {"num_hidden_layers": 3}
        )

    table = checked(shorten)
    assert {"states", "logits"} <= set(failed(table)) and "blocks counted" not in failed(table)
    assert "no state of layer 3 in a forward" in table.loc["states", "detail"]


def test_a_part_under_an_unknown_name_fails_and_is_named(checked):
    def rename(vlm):
        block = vlm.blocks[1]
        block._modules["thinking"] = block._modules.pop("mlp")

    table = checked(rename)
    assert "no MLP found in LlamaDecoderLayer" in table.loc["parts of each block", "detail"]
    assert not table.loc["parts of each block", "passed"]
    # whatever the model raises without it is told, and ends no other check
    assert "AttributeError" in table.loc["states", "detail"]
    assert table.loc["blocks counted", "passed"]


def test_a_model_without_unembedding_fails(checked):
    table = checked(lambda vlm: setattr(vlm.model, "get_output_embeddings", lambda: None))
    assert failed(table) == ["final norm and unembedding", "logits"]


def test_a_wrong_placeholder_fails(checked):
    def rename(vlm):
        vlm.model.config.image_token_id = 21  # a word of the prompt

    table = checked(rename)
    # transformers counts them
    assert "spans" in failed(table) and "ValueError" in table.loc["spans", "detail"]


def test_positions_labelled_wrongly_fail():
    model, inputs = build("llava")
    vlm = VLM(model, None, "llava")
    spans = vlm.prepare(inputs).spans.clone()
    spans[0, 1] = SPANS.index("image")
    table = self_check(vlm, vlm.prepare(inputs, spans)).set_index("check")
    assert failed(table) == ["spans"]
    assert table.loc["spans", "detail"] == "5 positions labelled, 4 measured, 1 differ"


def test_a_decoder_that_gets_ids_has_no_positions_to_measure(checked):
    """Chameleon's pictures are words of its vocabulary."""

    def discrete(vlm):
        stack = anatomy.decoder(vlm.model)
        stack.register_forward_pre_hook(
            lambda _, args, named: (
                args,
                named | {"inputs_embeds": None, "input_ids": vlm.running["input_ids"]},
            ),
            with_kwargs=True,
        )

    table = checked(discrete)
    assert "spans" in failed(table)
    assert table.loc["spans", "detail"].startswith(
        "the decoder gets ids and no embeddings: pictures are words of its vocabulary"
    )


def test_positions_that_a_mask_tells_and_no_id_are_named():
    """As in Kosmos-2."""
    model, inputs = build("llava")
    vlm = VLM(model, None, "llava")
    vlm.placeholders = {}
    table = self_check(vlm, vlm.prepare(inputs)).set_index("check")
    assert "spans" in failed(table)
    assert (
        "4 measured, 4 differ: no id marks a picture's positions (the "
        "config names no image_token_id)"
    ) in table.loc["spans", "detail"]


def test_ids_that_are_replaced_beside_the_configs_are_named(checked):
    """As in Ovis2, whose visual indicators are overwritten too."""

    def overwrite(vlm):
        def replace(_, args, named):
            embeddings = named["inputs_embeds"].clone()
            embeddings[torch.isin(vlm.running["input_ids"], torch.tensor([11, 23]))] += 1
            return args, named | {"inputs_embeds": embeddings}

        anatomy.decoder(vlm.model).register_forward_pre_hook(replace, with_kwargs=True)

    table = checked(overwrite)
    assert failed(table)[0] == "spans"
    assert table.loc["spans", "detail"].endswith(
        "4 differ: more ids than the config's are replaced (11, 23)"
    )


def test_a_batch_without_a_picture_says_nothing_about_positions():
    model, inputs = build("llava")
    vlm = VLM(model, None, "llava")
    text = {name: inputs[name][:, -4:] for name in ("input_ids", "attention_mask")}
    table = self_check(vlm, vlm.prepare(text)).set_index("check")
    assert failed(table) == ["spans"]
    assert table.loc["spans", "detail"] == "0 positions labelled, 0 measured, 0 differ"


def norm_apart(vlm):
    """Puts an identity under the norm's name, and the norm where the finder does not look."""
    decoder = anatomy.decoder(vlm.model)
    decoder.hidden_norm, decoder.norm = decoder.norm, nn.Identity()
    decoder.register_forward_hook(
        lambda module, args, output: setattr(
            output, "last_hidden_state", module.hidden_norm(output[0])
        )
    )


def test_a_norm_that_is_elsewhere_fails(checked):
    table = checked(norm_apart)
    assert "logits" in failed(table) and "largest difference" in table.loc["logits", "detail"]


def test_hidden_states_that_are_not_what_the_blocks_give_fail(checked):
    def hide(vlm):
        def report(_, args, output):
            output.hidden_states = tuple(
                states + (layer == 1) for layer, states in enumerate(output.hidden_states or ())
            )

        anatomy.decoder(vlm.model).register_forward_hook(report)

    table = checked(hide)
    assert failed(table) == ["states"]
    assert table.loc["states", "detail"].startswith("layer 1 differs by")


def test_nan_is_never_equal(checked):
    def spoil(vlm):
        vlm.model.lm_head.weight.data[:] = torch.nan

    assert {"logits", "block bypass"} <= set(failed(checked(spoil)))


def test_a_cache_that_changes_the_answer_fails(checked):
    def spoil(vlm):
        def at_single_tokens(_, args, output):
            return -output if output.shape[1] == 1 else output

        vlm.blocks[1].register_forward_hook(at_single_tokens)

    table = checked(spoil)
    # which rest on it
    assert set(failed(table)) == {"generation", "block skipped", "MLP skipped", "attention skipped"}
    assert "tokens differ from new token 2 on" in table.loc["generation", "detail"]


@pytest.mark.parametrize(("gap", "passes"), [(1e-6, True), (1e-2, False)])
def test_two_tokens_within_rounding_count_as_the_same(checked, gap, passes):
    """Two words are the best by turns.

    The one when a single token enters the blocks, and the other when the whole sequence does.
    """
    selected = []

    def tie(vlm):
        single = {}
        vlm.blocks[0].register_forward_pre_hook(
            lambda _, args: single.update(now=args[0].shape[1] == 1)
        )

        def nearly_even(_, args, output):
            logits = torch.zeros_like(output)
            logits[..., 50 + single["now"]], logits[..., 51 - single["now"]] = 1, 1 - gap
            return logits

        vlm.model.lm_head.register_forward_hook(nearly_even)
        batch = vlm.prepare(build("llava")[1])
        selected.extend(
            vlm.generate_ids(batch, 3, use_cache=use_cache)[0].tolist()
            for use_cache in (True, False)
        )

    table = checked(tie)
    assert selected == [[50, 51, 51], [50, 50, 50]]
    assert table.loc["generation", "passed"] == passes


def test_a_block_whose_output_nothing_reads_fails(checked):
    def shadow(vlm):
        """The block's output is put back after whatever a hook made of it."""
        recorded = {}
        inner = vlm.blocks[1].forward

        def remember(*args, **named):
            recorded["output"] = inner(*args, **named)
            return recorded["output"]

        vlm.blocks[1].forward = remember
        vlm.blocks[1].register_forward_hook(lambda *_: recorded["output"])

    table = checked(shadow)
    assert [name for name in failed(table) if name in REQUIRED] == ["block bypass"]
    assert table.loc["block bypass", "detail"] == "without block 2 logits differ by 0.0e+00"


def test_a_check_that_raises_is_a_failure_with_the_errors_words(checked):
    def full(vlm):
        def forward(*_, **__):
            raise torch.OutOfMemoryError("no memory\nin many lines")

        vlm.model.forward = forward

    table = checked(full)
    assert {"spans", "states", "logits", "block bypass"} <= set(failed(table))
    assert table.loc["states", "detail"].startswith(
        f"{DeviceMemoryError.__name__}: the device ran out of memory"
    )
    assert not table["detail"].str.contains("\n").any()
