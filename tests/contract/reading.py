"""Contract checks of what is read: parts, positions, states and logits."""

import pytest
import torch
from torch import Tensor

from tests.contract.reference import (
    GENERATION,
    Case,
    agree,
    experts_beside,
    experts_inside,
    repeated,
)
from tests.zoo.inputs import prefixed, single
from xlvlms_tutorial.activations.hooks import read, reading
from xlvlms_tutorial.errors import AnatomyError, InputError, SpanError
from xlvlms_tutorial.interventions.edits import add
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.spans import Batch


def parts(case: Case) -> None:
    """Every part of the anatomy is a module of the model, of the size its configuration names."""
    vlm, config = case.vlm, case.vlm.model.config.get_text_config(decoder=True)
    assert vlm.n_layers == len(vlm.blocks) == config.num_hidden_layers == 3
    assert vlm.width == config.hidden_size == 32
    inside = list(anatomy.decoder(vlm.model).modules())
    for block in vlm.blocks:
        finders = [
            anatomy.attention,
            anatomy.mlp,
            anatomy.mlp_exit,
            anatomy.first_norm,
            anatomy.second_norm,
        ]
        # the parts of a mixture of experts that do not exist are refused, never half of them given
        absent = []
        if experts_beside(block):
            absent = [anatomy.mlp, anatomy.mlp_exit]
        elif experts_inside(block):
            absent = [anatomy.mlp_exit]
        for find in finders:
            if find in absent:
                with pytest.raises(AnatomyError, match="no single MLP|last linear map of the MLP"):
                    find(block)
            else:
                assert any(find(block) is module for module in block.modules())
    assert any(anatomy.final_norm(vlm.model) is module for module in inside)
    assert anatomy.unembedding(vlm.model).weight.shape[1] == vlm.width
    heard = case.modality == "audio"
    tower, connector = (
        anatomy.tower(vlm.model, "audio" if heard else "image"),
        anatomy.connector(vlm.model),
    )
    assert sum(p.numel() for p in tower.parameters()) > 0
    assert sum(p.numel() for p in connector.parameters()) > 0
    # the decoder of Idefics holds the tower: its blocks do not
    assert not {id(m) for m in tower.modules()} & {
        id(m) for block in vlm.blocks for m in block.modules()
    }
    assert not heard or anatomy.tower(vlm.model, "image") is None


def spans(case: Case) -> str | None:
    if case.modality is None:
        return _no_positions(case)
    embeddings: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        embeddings.append(kwargs["inputs_embeds"])

    hook = anatomy.decoder(case.vlm.model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        case.vlm.forward(case.batch)
    finally:
        hook.remove()
    table = case.vlm.model.get_input_embeddings()
    # Molmo2 holds its 200 words and 8 special tokens in two tables
    rows = getattr(table, "num_embeddings", 208)
    with torch.no_grad():
        measured = (embeddings[0] != table(case.batch["input_ids"].clamp(max=rows - 1))).any(-1)
    assert measured.any() and torch.equal(measured, case.batch.mask(case.modality))
    return None


def _no_positions(case: Case) -> str:
    vlm = case.vlm
    for ask in (
        lambda: case.batch.mask("image"),
        lambda: read(vlm, case.batch, 1, positions="image"),
        lambda: _steered(case),
    ):
        try:
            ask()
        except SpanError as error:
            assert "image" in str(error) and "question" in str(error)
        else:
            raise AssertionError("image positions of a model that has none are no SpanError")
    assert vlm.placeholders == {} and anatomy.crossing(vlm.model)
    return "none, and says so"


def _steered(case: Case) -> None:
    with add(case.vlm, torch.ones(case.vlm.width), 1, positions="image"):
        case.vlm.forward(case.batch)


def states_forward(case: Case) -> None:
    """``read`` gives the hidden states that transformers gives, to the bit."""
    vlm = case.vlm
    output = vlm.forward(case.batch, output_hidden_states=True)
    recorded = getattr(output, "language_model_outputs", output).hidden_states
    ours = read(vlm, case.batch, "all")
    assert len(recorded) == vlm.n_layers + 1 == len(ours)
    for layer in range(vlm.n_layers):
        assert torch.equal(ours[layer, "resid_post"], recorded[layer]), f"layer {layer}"
    with torch.no_grad():
        last = anatomy.final_norm(vlm.model)(ours[vlm.n_layers, "resid_post"])
    assert torch.equal(last, recorded[-1]), "final norm of the last layer"


def states_generate(case: Case) -> None:
    """``reading`` gives those of each generated token too."""
    vlm = case.vlm
    with reading(vlm, "all") as ours:
        vlm.generate_ids(case.batch, **GENERATION)
    with vlm.run(case.batch), torch.no_grad():
        options = {
            "output_hidden_states": True,
            "return_dict_in_generate": True,
            "do_sample": False,
            "disable_compile": True,
        }
        recorded = vlm.model.generate(**case.batch, **GENERATION, **options).hidden_states
    assert len(recorded) == len(ours[1, "resid_post"]) == GENERATION["max_new_tokens"]
    for step, layers in enumerate(recorded):
        for layer in range(vlm.n_layers):
            assert torch.equal(ours[layer, "resid_post"][step], layers[layer]), (
                f"layer {layer}, step {step}"
            )
        with torch.no_grad():
            last = anatomy.final_norm(vlm.model)(ours[vlm.n_layers, "resid_post"][step])
        assert torch.equal(last, layers[-1]), f"final norm of the last layer, step {step}"


def unembedding(case: Case) -> None:
    vlm = case.vlm
    logits = vlm.forward(case.batch).logits
    agree(
        vlm.unembed(read(vlm, case.batch, vlm.n_layers)[vlm.n_layers, "resid_post"]),
        logits,
        "unembedding of the last layer",
    )


def batch_sizes(case: Case) -> None:
    """States of all layers, and the log-probability of the next token, do not
    depend on how many rows a batch has.
    """
    vlm, inputs = case.vlm, single(case.name)
    alone = [_read(case, vlm.prepare(row)) for row in (prefixed(case.name, inputs), inputs)]
    for size in (2, 4, 8):
        states, scores = _read(case, vlm.prepare(repeated(dict(case.batch), size // 2)))
        for row in range(size):
            own_states, score = alone[row % 2]
            agree(
                states[:, row, -own_states.shape[2] :],
                own_states[:, 0],
                f"states of row {row} of {size}",
            )
            agree(scores[row], score[0], f"score of row {row} of {size}")


def _read(case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
    states = torch.stack(list(read(case.vlm, batch, "all").values()))
    return states, case.vlm.forward(batch).logits[:, -1].log_softmax(-1).max(-1).values


def type_ids(case: Case) -> str | None:
    """What would change positions or masks without an error when it is left out, is asked for."""
    needed = {"mm_token_type_ids", "token_type_ids"} & set(case.batch)
    if not needed:
        return "needs none"
    lacking = type(case.batch)(
        {key: value for key, value in case.batch.items() if key not in needed}
    )
    lacking.spans = case.batch.spans
    for run in (case.vlm.forward, case.vlm.generate_ids):
        try:
            run(lacking)
        except InputError as error:
            assert all(name in str(error) for name in needed)
        else:
            raise AssertionError(f"runs without {needed}")
    return None


def recorder_order(case: Case) -> None:
    """Transformers' recorder, which stays once it is installed, sees what
    interventions did that came later.
    """
    vlm, vector = case.vlm, torch.linspace(-1, 1, case.vlm.width)

    def recorded() -> tuple[Tensor, ...]:
        output = vlm.forward(case.batch, output_hidden_states=True)
        return getattr(output, "language_model_outputs", output).hidden_states

    before = recorded()
    for layer in range(vlm.n_layers):
        with add(vlm, vector, layer):
            agree(recorded()[layer], before[layer] + vector, f"recorded layer {layer}")
    with add(vlm, vector, vlm.n_layers):
        after = recorded()[-1]
    with torch.no_grad():
        expected = anatomy.final_norm(vlm.model)(
            read(vlm, case.batch, vlm.n_layers)[vlm.n_layers, "resid_post"] + vector
        )
    agree(after, expected, "recorded last layer")
