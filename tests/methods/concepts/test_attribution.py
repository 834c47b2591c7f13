"""Heat over image tokens against one sample at a time with a hook of our own,
and against cosines in a loop.
"""

import jaxtyping
import numpy as np
import pytest
import torch

from tests.support.mentions import ANSWERS, FIRST, PROMPT, WORDS, pictures
from tests.support.tiny import PICTURE, lively, tiny_llava
from tests.zoo.processors import save
from xlvlms_tutorial import interventions
from xlvlms_tutorial.activations.capture import capture, residual_stream
from xlvlms_tutorial.errors import InputError, LayerError, SpanError
from xlvlms_tutorial.loading import load
from xlvlms_tutorial.methods.concepts.attribution import concept_heatmap, to_grid
from xlvlms_tutorial.methods.concepts.base import Dictionary
from xlvlms_tutorial.models import anatomy


class Projections(Dictionary):
    """Codes that bend, so that a difference of states alone would not do."""

    def __init__(self, n_components=3, device="cpu", width=32):
        self.n_components, self.device, self.width = n_components, device, width
        self.components_ = (
            np.random.default_rng(0).normal(size=(n_components, width)).astype(np.float32)
        )
        self.n_features_in_ = width

    def _encode(self, A):
        return torch.tanh(A @ torch.as_tensor(self.components_).to(A).T / 50)


@pytest.fixture
def vlm():
    return lively(tiny_llava())


def one_by_one(vlm, samples, answers, dictionary, layer, after):
    """Occlusion as its definition says.

    Each sample and token alone, everything computed anew, the token set by a plain hook.
    """
    batches = [
        vlm.batch([sample.image], [PROMPT], [answer])
        for sample, answer in zip(samples, answers, strict=True)
    ]
    places = [batch.mask("image")[0].nonzero().flatten() for batch in batches]
    means = torch.stack(
        [
            residual_stream(vlm, batch)[0, 0, position]
            for batch, position in zip(batches, places, strict=True)
        ]
    ).mean(dim=0)
    rows = []
    for batch, positions, first in zip(batches, places, FIRST, strict=False):
        place = batch.mask("answer")[0].nonzero()[first, 0] - 1 + after

        def code(place=place, batch=batch):
            return dictionary.transform(residual_stream(vlm, batch)[layer, :, place])[0]

        def hooked(j, positions=positions, code=code):
            def change(module, args, kwargs):
                states = (args[0] if args else kwargs["hidden_states"]).clone()
                states[:, positions[j]] = means[j]
                return (
                    ((states, *args[1:]), kwargs)
                    if args
                    else (args, kwargs | {"hidden_states": states})
                )

            handle = vlm.blocks[0].register_forward_pre_hook(change, with_kwargs=True, prepend=True)
            try:
                return code()
            finally:
                handle.remove()

        rows.append(np.stack([code() - hooked(j) for j in range(len(positions))], axis=1))
    return torch.tensor(np.stack(rows))


@pytest.mark.parametrize(
    ("layer", "position", "batch_size"),
    [(1, "token", 16), (2, "predicting", 2), (3, "token", 1), (3, "predicting", 3)],
)
def test_an_occlusion_is_the_code_without_the_token(vlm, layer, position, batch_size):
    dictionary, samples = Projections(), pictures(5)
    heatmap = concept_heatmap(
        vlm,
        samples,
        dictionary,
        [2, 0],
        layer,
        WORDS,
        ANSWERS,
        side=position,
        prompt=PROMPT,
        batch_size=batch_size,
    )
    expected = one_by_one(vlm, samples, ANSWERS, dictionary, layer, int(position == "token"))
    assert heatmap.shape == (5, 2, 4)
    torch.testing.assert_close(heatmap, expected[:, [2, 0]], atol=1e-5, rtol=1e-4)
    assert heatmap.abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "paligemma", "idefics3"])
def test_an_occlusion_in_other_architectures(name, tmp_path):
    vlm = load(save(name, tmp_path), device="cpu")
    samples, dictionary = pictures(3, (56, 56)), Projections(width=vlm.width)
    answers = ["a woman on the grass", "red", "the grass"]
    heatmap = concept_heatmap(
        vlm,
        samples,
        dictionary,
        range(3),
        vlm.n_layers,
        WORDS,
        answers,
        side="token",
        prompt=PROMPT,
    )
    expected = one_by_one(vlm, samples, answers, dictionary, vlm.n_layers, 1)
    torch.testing.assert_close(heatmap, expected, atol=1e-5, rtol=1e-3)
    assert heatmap.abs().max() > 0


def test_codes_are_those_of_the_states_that_capture_gives(vlm):
    """With every image token replaced by what it is already, nothing changes; and
    the state is that of the word.
    """
    samples, dictionary = pictures(1) * 3, Projections()
    heatmap = concept_heatmap(
        vlm, samples, dictionary, [0], 3, "woman", ["a woman in the grass"] * 3, prompt=PROMPT
    )
    assert heatmap.abs().max() < 1e-5
    second_samples = pictures(4)
    visible = capture(vlm, second_samples, 3, words="woman", answers=["a woman"] * 4, prompt=PROMPT)
    with interventions.patch(vlm, torch.zeros(vlm.width), 0, "image"):
        blind = capture(
            vlm, second_samples, 3, words="woman", answers=["a woman"] * 4, prompt=PROMPT
        )
        message = concept_heatmap(
            vlm, second_samples, dictionary, [0], 3, "woman", ["a woman"] * 4, prompt=PROMPT
        )
    assert (visible[3] - blind[3]).abs().max() > 1e-3
    # what intervenes from outside holds inside: all pictures are the same then
    assert message.abs().max() < 1e-5


def test_the_tower_runs_twice_a_batch_and_nothing_is_left_behind(vlm):
    # a first run leaves transformers' own hooks
    residual_stream(vlm, vlm.batch([PICTURE], [PROMPT]))
    runs = []
    hook = anatomy.tower(vlm.model).register_forward_hook(lambda *arguments: runs.append(1))
    before = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in vlm.model.modules()
    )
    concept_heatmap(
        vlm, pictures(4), Projections(), [0], 3, WORDS, ["a woman"] * 4, prompt=PROMPT, batch_size=2
    )
    after = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in vlm.model.modules()
    )
    hook.remove()
    assert len(runs) == 4
    assert (before, vlm.active, vlm.running) == (after, [], None)


def test_where_nothing_of_the_picture_has_arrived_there_is_no_heat(vlm):
    heatmap = concept_heatmap(
        vlm, pictures(3), Projections(), [0, 1], 0, WORDS, ["a woman"] * 3, prompt=PROMPT
    )
    assert heatmap.abs().max() == 0


def test_an_activation_is_the_cosine_with_the_state_less_its_mean(vlm):
    dictionary, samples = Projections(), pictures(4)
    heatmap = concept_heatmap(
        vlm, samples, dictionary, [1, 2], 2, method="activation", prompt=PROMPT, batch_size=3
    )
    cosines = (
        capture(vlm, samples, 2, span="image", reduce=None, prompt=PROMPT)[2]
        .double()
        .numpy()
        .reshape(4, 4, 32)
    )
    for n in range(4):
        for c, concept in enumerate([1, 2]):
            for t in range(4):
                state, direction = (
                    cosines[n, t] - cosines[:, t].mean(axis=0),
                    dictionary.components_[concept],
                )
                cosine = state @ direction / np.linalg.norm(state) / np.linalg.norm(direction)
                assert heatmap[n, c, t].item() == pytest.approx(cosine, abs=1e-5)


def test_a_grid_has_the_rows_of_the_picture():
    flat = torch.arange(24.0).reshape(2, 3, 4)
    assert to_grid(flat).shape == (2, 3, 2, 2)
    assert to_grid(flat)[1, 2].tolist() == [[20, 21], [22, 23]]
    with pytest.raises(InputError, match="6 image tokens"):
        to_grid(torch.zeros(2, 6))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_no_image_tokens_are_no_square(shape, monkeypatch):
    # its checks refuse some of these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="0 image tokens are no square"):
        to_grid(torch.zeros(shape))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_grid_of_what_is_not_finite_is_refused(bad):
    flat = torch.zeros(2, 4)
    flat[1, 2] = bad
    with pytest.raises(InputError, match="1 of 8 values are NaN or infinite"):
        to_grid(flat)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"method": "gradient"}, InputError, "'occlusion', 'activation'"),
        ({"side": "after"}, InputError, "'predicting', 'token'"),
        ({"words": None}, InputError, "without words"),
        ({"answers": None}, InputError, "without words or answers"),
        ({"answers": ["a woman"]}, InputError, "answers: 1"),
        ({"answers": ["a woman", "grass", "a key"]}, InputError, "a key"),
        ({"concepts": [3]}, InputError, "0 to 2"),
        ({"concepts": [-1]}, InputError, "0 to 2"),
        ({"concepts": []}, InputError, "at least"),
        ({"samples": []}, InputError, "at least"),
        ({"layer": 4}, LayerError, "0 to 3"),
        ({"batch_size": 0}, InputError, "at least 1"),
        ({"dictionary": Projections(width=31)}, InputError, "widths"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(vlm, changed, error, message):
    options = {
        "samples": pictures(3),
        "dictionary": Projections(),
        "concepts": [0],
        "layer": 2,
        "words": WORDS,
        "answers": ["a woman"] * 3,
    }
    with pytest.raises(error, match=message):
        concept_heatmap(vlm, **(options | {"prompt": PROMPT} | changed))


def test_a_single_sample_and_equal_pictures_differ_from_no_mean(vlm):
    for method in ("occlusion", "activation"):
        with pytest.raises(InputError, match="one sample"):
            concept_heatmap(
                vlm, pictures(1), Projections(), [0], 2, "woman", ["a woman"], method=method
            )
    with pytest.raises(InputError, match="pictures that differ"):
        concept_heatmap(
            vlm, pictures(1) * 3, Projections(), [0], 2, method="activation", prompt=PROMPT
        )
    dead = Projections()
    dead.components_[1] = 0
    with pytest.raises(InputError, match="never used"):
        concept_heatmap(vlm, pictures(3), dead, [1], 2, method="activation", prompt=PROMPT)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("method", ["occlusion", "activation"])
def test_pictures_of_several_sizes_are_refused(tmp_path, method, batch_size):
    vlm = load(save("qwen2_vl", tmp_path), device="cpu")
    mixed = [*pictures(2, (56, 56)), *pictures(2, (112, 56))]
    with pytest.raises(InputError, match="numbers of image tokens differ: 4 and 8"):
        concept_heatmap(
            vlm,
            mixed,
            Projections(width=vlm.width),
            [0],
            1,
            "woman",
            ["a woman"] * 4,
            method=method,
            prompt=PROMPT,
            batch_size=batch_size,
        )


@pytest.mark.parametrize("method", ["occlusion", "activation"])
def test_models_whose_pictures_have_no_positions_say_so(tmp_path, method):
    vlm = load(save("mllama", tmp_path), device="cpu")
    with pytest.raises(SpanError, match="cross-attention"):
        concept_heatmap(
            vlm,
            pictures(2, (28, 28)),
            Projections(width=vlm.width),
            [0],
            1,
            "woman",
            ["a woman"] * 2,
            method=method,
            prompt=PROMPT,
        )
