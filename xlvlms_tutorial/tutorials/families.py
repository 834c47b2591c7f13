"""Build one small model of each family of VLMs, and see how the picture enters and what it costs.

The classes are the genuine ones of transformers. Small models have random weights; those of
published sizes have none and lie on torch's meta device.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter

import pandas as pd
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from xlvlms_tutorial.metrics import count_flops
from xlvlms_tutorial.models import VLM, anatomy, support
from xlvlms_tutorial.tutorials import real_models
from xlvlms_tutorial.validation import require_counts, require_one_of
from xlvlms_tutorial.view import plots

PARTS = ("tower", "bridge", "language model")
_WORDS, _PICTURE = 100, 90  # the small vocabulary, and the id that stands for a picture
_MARK, _IMAGE = _WORDS, _WORDS + 1  # Idefics' own ids, behind the vocabulary
_BEFORE, _AFTER = (1, 11, 12), (21, 22, 23, 24)
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
# 28 pixels in patches of 14: four patches
_EYE = {**_SMALL, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
_TEXT = {**_SMALL, "vocab_size": _WORDS, "max_position_embeddings": 64, "pad_token_id": 0}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
_LATENTS = {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4}
_LATENTS |= {"resampler_head_dim": 8}


@dataclass(frozen=True)
class Family:
    """A family of VLMs: a published model as its configuration describes it, and a small one.

    Use ``FAMILIES`` for those that are known here.

    Parameters
    ----------
    cls : str
        The class of transformers.
    published : str
        The published model whose sizes are used, by its name on the hub.
    config : Mapping
        What its configuration says, where it differs from the default one of its class.
    small : Mapping
        The configuration of a model of the same class that is built in no time.
    pixels : tuple of int
        The shape of a picture of 640 x 480 pixels behind the published model's own processor.
    small_pixels : tuple of int
        The shape of a picture for the small one.
    way : str
        How the picture enters: "beside", "joint", "in the sequence" or "across".
    trained : tuple of str
        The ``PARTS`` that learn when picture and text are brought together.
    source : str
        Where sizes and training are said.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> families.FAMILIES["BLIP-2"].way, families.FAMILIES["BLIP-2"].trained
    ('in the sequence', ('bridge',))
    """

    cls: str
    published: str
    config: Mapping[str, object]
    small: Mapping[str, object]
    pixels: tuple[int, ...]
    small_pixels: tuple[int, ...]
    way: str
    trained: tuple[str, ...]
    source: str


FAMILIES: dict[str, Family] = {
    "CLIP": Family(
        "CLIPModel",
        "openai/clip-vit-large-patch14-336",
        {
            "projection_dim": 768,
            "text_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "projection_dim": 768,
            },
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
        {
            "text_config": {**_TEXT, "projection_dim": 32},
            "vision_config": {**_EYE, "projection_dim": 32},
            "projection_dim": 32,
        },
        (1, 3, 336, 336),
        (1, 3, 28, 28),
        "beside",
        PARTS,
        "Radford et al. 2021, table 20 (ViT-L/14 at 336 pixels)",
    ),
    "FLAVA": Family(
        "FlavaModel",
        "facebook/flava-full",
        {},
        {
            "image_config": _EYE,
            "text_config": {**_TEXT, "num_hidden_layers": 2},
            "multimodal_config": {**_SMALL, "num_hidden_layers": 2},
            "hidden_size": 32,
            "projection_dim": 32,
            "init_codebook": False,
        },
        (1, 3, 224, 224),
        (1, 3, 28, 28),
        "joint",
        PARTS,
        "the defaults of FlavaConfig, which are those of facebook/flava-full; Singh et al. 2022",
    ),
    "Idefics": Family(
        "IdeficsForVisionText2Text",
        "HuggingFaceM4/idefics-9b",
        {
            "additional_vocab_size": 2,
            "cross_layer_interval": 4,
            "qk_layer_norms": True,
            "use_resampler": True,
            "vision_config": {"embed_dim": 1280},
            "perceiver_config": {"use_resampler": True, "qk_layer_norms_perceiver": True},
        },
        {
            **_TEXT,
            "additional_vocab_size": 2,
            "cross_layer_interval": 2,
            "use_resampler": True,
            "vision_config": {"embed_dim": 32} | {k: _EYE[k] for k in _EYE if k != "hidden_size"},
            "perceiver_config": _LATENTS,
        },
        (1, 1, 3, 224, 224),
        (1, 1, 3, 28, 28),
        "across",
        ("bridge",),
        "the model card of idefics-9b, and the defaults of IdeficsConfig",
    ),
    "Idefics2": Family(
        "Idefics2ForConditionalGeneration",
        "HuggingFaceM4/idefics2-8b",
        real_models.SHAPES["HuggingFaceM4/idefics2-8b"].config,
        {
            "text_config": {**_TEXT, "model_type": "mistral", "num_key_value_heads": 2},
            "vision_config": _EYE,
            "perceiver_config": {**_LATENTS, "hidden_size": 32, "num_key_value_heads": 2},
            "image_token_id": _PICTURE,
        },
        (1, 5, 3, 480, 640),
        (1, 1, 3, 28, 28),
        "in the sequence",
        ("bridge",),
        "the configuration of idefics2-8b; Laurençon et al. 2024 (low-rank adapters elsewhere)",
    ),
    "BLIP-2": Family(
        "Blip2ForConditionalGeneration",
        "Salesforce/blip2-opt-2.7b",
        {
            "text_config": {
                "model_type": "opt",
                "hidden_size": 2560,
                "word_embed_proj_dim": 2560,
                "ffn_dim": 10240,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "vocab_size": 50272,
            }
        },
        {
            "vision_config": _EYE,
            "qformer_config": {**_EYE, "vocab_size": 10, "encoder_hidden_size": 32},
            "text_config": {
                **{k: _TEXT[k] for k in _TEXT if k != "intermediate_size"},
                "model_type": "opt",
                "word_embed_proj_dim": 32,
                "ffn_dim": 64,
            },
            "num_query_tokens": 2,
            "image_token_index": _PICTURE,
        },
        (1, 3, 224, 224),
        (1, 3, 28, 28),
        "in the sequence",
        ("bridge",),
        "the defaults of Blip2Config, and the configuration of facebook/opt-2.7b; Li et al. 2023",
    ),
    "LLaVA-1.5": Family(
        "LlavaForConditionalGeneration",
        "llava-hf/llava-1.5-7b-hf",
        real_models.SHAPES["llava-hf/llava-1.5-7b-hf"].config,
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_EYE, "model_type": "clip_vision_model"},
            "image_token_index": _PICTURE,
            "image_seq_length": 4,
        },
        (1, 3, 336, 336),
        (1, 3, 28, 28),
        "in the sequence",
        ("bridge", "language model"),
        "the configuration of llava-1.5-7b-hf; Liu et al. 2024 (first the bridge alone)",
    ),
    "Llama 3.2": Family(
        "MllamaForConditionalGeneration",
        "meta-llama/Llama-3.2-11B-Vision-Instruct",
        {"vision_config": {"image_size": 560}, "text_config": {}},
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "text_config": {
                **_TEXT,
                "num_key_value_heads": 2,
                "cross_attention_layers": [1, 3],
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            "image_token_index": _PICTURE,
        },
        (1, 1, 4, 3, 560, 560),
        (1, 1, 1, 3, 28, 28),
        "across",
        ("tower", "bridge"),
        "the defaults of MllamaConfig, those of Llama 3.2 11B, at 560 pixels; "
        "Grattafiori et al. 2024, section 7",
    ),
}
# Where transformers has tower and bridge; all else is the language model
_PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "clip": ("vision_model", ("visual_projection", "text_projection")),
    "flava": (
        "image_model",
        (
            "multimodal_model",
            "image_to_mm_projection",
            "text_to_mm_projection",
            "image_projection",
            "text_projection",
        ),
    ),
    "idefics": (
        "model.vision_model",
        ("model.perceiver_resampler", "model.gated_cross_attn_layers"),
    ),
    "idefics2": ("model.vision_model", ("model.connector",)),
    "blip-2": ("vision_model", ("qformer", "language_projection")),
    "llava": ("model.vision_tower", ("model.multi_modal_projector",)),
    "mllama": ("model.vision_model", ("model.multi_modal_projector",)),
}
# What each group of chapters asks of a model: an action and a site, or positions of the picture
NEEDS: dict[str, tuple[str, str]] = {
    "alignment, vocabulary": ("positions", "image"),
    "concepts, shift, steering": ("read", "resid_post"),
    "alignment inside a block": ("read", "resid_mid"),
    "skipping blocks": ("skip", "block"),
    "skipping MLPs": ("skip", "mlp"),
    "pruning by masks": ("read", "mlp_hidden"),
}


def small(name: str, seed: int = 0, gate: float = 1.0) -> PreTrainedModel:
    """Build a small model of a family, with random weights.

    Use it to see how the picture enters. Its weights are larger than usual, so that every layer
    changes the answer.

    Parameters
    ----------
    name : str
        One of ``FAMILIES``.
    seed : int, default 0
        The seed of the weights.
    gate : float, default 1.0
        What the gates of cross-attention have learnt, before their tanh. At the start of a training
        they are 0.

    Returns
    -------
    PreTrainedModel
        The model in evaluation mode, 32 numbers wide.

    Raises
    ------
    InputError
        If the family is unknown.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> type(families.small("Idefics")).__name__
    'IdeficsForVisionText2Text'
    """
    family = _family(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = _build(family, family.small)
        for weight_name, weight in model.named_parameters():
            # gates of cross-attention; the MLPs have larger ones
            if weight.numel() == 1 and ("gate" in weight_name or "alpha" in weight_name):
                weight.fill_(gate)
            elif weight.ndim > 1:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
    return model


def empty(name: str) -> PreTrainedModel:
    """Build the published model of a family without weights, in its genuine class.

    Use it to count parameters and operations. All parameters lie on the meta device.

    Parameters
    ----------
    name : str
        One of ``FAMILIES``.

    Returns
    -------
    PreTrainedModel
        The model in evaluation mode.

    Raises
    ------
    InputError
        If the family is unknown.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> families.empty("FLAVA").device.type
    'meta'
    """
    family = _family(name)
    with no_init_weights(), torch.device("meta"):
        return _build(family, family.config)


def inputs(name: str) -> dict[str, Tensor]:
    """Write the inputs of a small model: three words, a picture, and four words.

    Use it with :func:`small`. Where the picture takes positions of the sequence, there are as many
    placeholders as the model makes vectors of it.

    Parameters
    ----------
    name : str
        One of ``FAMILIES``.

    Returns
    -------
    dict of str to Tensor
        What the model's ``forward`` takes, for one row.

    Raises
    ------
    InputError
        If the family is unknown.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> families.inputs("BLIP-2")["input_ids"].tolist()  # 90 stands for the picture
    [[1, 11, 12, 90, 90, 21, 22, 23, 24]]
    """
    family = _family(name)
    places = {"Idefics": (_MARK, _IMAGE, _MARK), "Llama 3.2": (_PICTURE,)}
    places |= {"Idefics2": (_PICTURE,) * 3, "BLIP-2": (_PICTURE,) * 2, "LLaVA-1.5": (_PICTURE,) * 4}
    ids = torch.tensor([[*_BEFORE, *places.get(name, ()), *_AFTER]])
    pixels = torch.randn(family.small_pixels, generator=torch.Generator().manual_seed(0))
    written = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if family.way == "across":
        # words before the picture do not see it
        sees = (torch.arange(ids.shape[1]) >= len(_BEFORE)).long()[None, :, None]
        if name == "Idefics":
            return written | {"image_attention_mask": sees}
        ones = torch.ones(1, 1, dtype=torch.long)
        written |= {"cross_attention_mask": sees[..., None], "aspect_ratio_ids": ones}
        written |= {"aspect_ratio_mask": ones[..., None]}
    return written


def parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Find the modules of a model's tower, and of its bridge from picture to words.

    Use it to count by part. The bridge is what was added to bring the two together: projections, a
    resampler or queries, blocks of cross-attention, a joint encoder.

    Parameters
    ----------
    model : Module
        A model of a class of ``FAMILIES``.

    Returns
    -------
    dict of str to list of Module
        The modules of "tower" and "bridge". All else belongs to the language model.

    Raises
    ------
    InputError
        If the model is of another class.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> bridge = families.parts(families.small("Idefics"))["bridge"]
    >>> [type(module).__name__ for module in bridge[:2]]
    ['IdeficsPerceiverResampler', 'IdeficsGatedCrossAttentionLayer']
    """
    kind = model.config.model_type
    require_one_of(kind, _PLACES, "kind of model")
    tower, bridges = _PLACES[kind]
    bridge: list[nn.Module] = []
    for path in bridges:
        module = attrgetter(path)(model)
        # a list of modules is never called itself
        bridge += list(module) if isinstance(module, nn.ModuleList) else [module]
    if kind == "mllama":
        blocks = anatomy.decoder_blocks(model)
        bridge += [blocks[layer - 1] for layer in sorted(anatomy.cross_attention_layers(model))]
    return {"tower": [attrgetter(tower)(model)], "bridge": bridge}


def parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters of a model by part.

    Parameters
    ----------
    model : Module
        A model of a class of ``FAMILIES``, with weights or without.

    Returns
    -------
    dict of str to int
        The numbers of ``PARTS``. Weights that are used twice count once.

    Raises
    ------
    InputError
        If the model is of another class.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> families.parameters(families.empty("LLaVA-1.5"))["bridge"]
    20979712
    """
    counts = {}
    for part, modules in parts(model).items():
        weights = {id(weight): weight for module in modules for weight in module.parameters()}
        counts[part] = sum(weight.numel() for weight in weights.values())
    total = sum(weight.numel() for weight in model.parameters())
    return counts | {"language model": total - sum(counts.values())}


def operations(
    name: str, model: PreTrainedModel | None = None, text: int = 40
) -> dict[str, float | int | None]:
    """Count the operations with which a model reads a picture and a text, and writes one token.

    Use it to compare families. The genuine modules run on the meta device, where nothing is
    computed, and torch counts what they would do.

    Parameters
    ----------
    name : str
        One of ``FAMILIES``.
    model : PreTrainedModel, optional
        A model of that family, from :func:`small` or :func:`empty` (the default).
    text : int, default 40
        How many tokens of text there are beside the picture.

    Returns
    -------
    dict
        Floating-point operations of reading, by ``PARTS``; "one token" for each token that is
        written afterwards (None where a model does not write); "vectors", how many of the picture
        meet the words; "positions", how many it takes in the sequence.

    Raises
    ------
    InputError
        If the family is unknown or ``text`` is below 1.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> count = families.operations("BLIP-2")
    >>> count["vectors"], count["positions"], count["tower"] > count["one token"]
    (32, 32, True)
    """
    family = _family(name)
    require_counts(text=text)
    if model is None:
        model = empty(name)
    pixels = family.pixels if model.device.type == "meta" else family.small_pixels
    picture = torch.zeros(pixels, device=model.device)
    state: dict[str, object] = {}

    def read() -> None:
        with _Unmasked():
            state["vectors"], state["step"] = _READ[model.config.model_type](model, picture, text)

    def write() -> None:
        with _Unmasked():
            state["step"]()

    modules = parts(model)
    if model.config.model_type == "idefics2":
        # called piece by piece
        tower = modules["tower"][0]
        modules["tower"] = [tower.embeddings.patch_embedding, tower.encoder]
    with torch.no_grad():
        table = count_flops(read, modules).set_index("part")["flops"]
        written = None
        if state["step"] is not None:
            written = count_flops(write).set_index("part")["flops"]["total"]
    vectors = int(state["vectors"])
    return {
        "tower": int(table["tower"]),
        "bridge": int(table["bridge"]),
        "language model": int(table["rest"]),
        "one token": None if written is None else int(written),
        "vectors": vectors,
        "positions": vectors if family.way == "in the sequence" else 0,
    }


def reach(model: PreTrainedModel, model_inputs: Mapping[str, Tensor]) -> pd.DataFrame:
    """Find the states that a picture changes, by layer and position.

    Use it to see how the picture enters. The model reads the same words twice, with a picture and
    with its negative, and the states are compared.

    Parameters
    ----------
    model : PreTrainedModel
        A small model of a family.
    model_inputs : Mapping
        Its inputs, from :func:`inputs`.

    Returns
    -------
    pandas.DataFrame
        A row for each layer (0 is what enters the first block), a column for each position, named
        "word", "picture" or "mark" (a token that says where a picture belongs): 1 where the picture
        changes the state, 0 where it does not, NaN where there is no state. Rows of FLAVA's joint
        encoder are called "joint".

    Raises
    ------
    InputError
        If the model is of a class that is not in ``FAMILIES``.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> table = families.reach(families.small("LLaVA-1.5"), families.inputs("LLaVA-1.5"))
    >>> table.loc[0].tolist()  # three words, four vectors of the picture, four words
    [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    require_one_of(model.config.model_type, _PLACES, "kind of model")
    negative = {}
    for name, value in model_inputs.items():
        negative[name] = -value if value.is_floating_point() else value
    first, second = _states(model, model_inputs), _states(model, negative)
    rows = {}
    for layer, states in first.items():
        rows[layer] = ((states - second[layer]).abs().amax(dim=-1) > 1e-5).float().tolist()
    kinds = _kinds(model, model_inputs["input_ids"][0].tolist())
    if model.config.model_type == "flava":
        # the words have layers of their own first; the joint encoder sees its own token first
        n_words, n_joint = len(kinds), len(rows["joint 0"]) - 1
        kinds = ["picture"] * (n_joint - n_words) + kinds
        for layer, values in rows.items():
            gaps = [float("nan")] * (n_joint - n_words)
            rows[layer] = values[1:] if str(layer).startswith("joint") else gaps + values
    table = pd.DataFrame(list(rows.values()), index=list(rows), columns=kinds)
    return table.rename_axis("layer")


def draw_reach(table: pd.DataFrame, ax: Axes, title: str) -> Axes:
    """Draw where a picture has changed the states of a model.

    Use it on what :func:`reach` gives. Layers run downwards; positions are grouped under what
    stands there.

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`reach`.
    ax : matplotlib.axes.Axes
        Where to draw.
    title : str
        The name of the model.

    Returns
    -------
    matplotlib.axes.Axes
        The axes.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> from xlvlms_tutorial.view import plots
    >>> figure, (ax,) = plots.panels(1)
    >>> table = families.reach(families.small("BLIP-2"), families.inputs("BLIP-2"))
    >>> ax = families.draw_reach(table, ax, "BLIP-2")
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['words', 'picture', 'words']
    >>> plots.png(figure)[1:4]  # also closes the figure
    b'PNG'
    """
    kinds = list(table.columns)
    ax.pcolormesh(
        table.to_numpy(),
        cmap=ListedColormap(["#dfe3e4", plots.ACCENT]),
        vmin=0,
        vmax=1,
        edgecolors=plots.GROUND,
        linewidth=1.5,
    )
    ax.invert_yaxis()
    starts = [k for k in range(len(kinds)) if k == 0 or kinds[k] != kinds[k - 1]]
    ends = [*starts[1:], len(kinds)]
    centres = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    ax.set_xticks(centres, [kinds[start].replace("word", "words") for start in starts])
    for edge in starts[1:]:
        ax.axvline(edge, color=plots.INK, linewidth=1)
    labels = [str(layer).replace("joint ", "j") for layer in table.index]
    ax.set_yticks([k + 0.5 for k in range(len(table))], labels)
    ax.tick_params(length=0)
    ax.tick_params(axis="x", labelsize="x-small")
    ax.grid(visible=False)
    ax.set_title(title)
    return ax


def chapters(model: PreTrainedModel) -> dict[str, str]:
    """Say which chapters of this book apply to a model, and why the others do not.

    Use it on a small model of any kind. It asks the package's own table of support.

    Parameters
    ----------
    model : PreTrainedModel
        The model.

    Returns
    -------
    dict of str to str
        For each of ``NEEDS`` "yes", or what the model lacks.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import families
    >>> families.chapters(families.small("Llama 3.2"))["alignment, vocabulary"]
    'no positions'
    """
    if not hasattr(model, "generate") or model.config.model_type in ("clip", "flava"):
        return dict.fromkeys(NEEDS, "does not write")
    vlm = VLM(model, None, model.config.model_type)
    answers = {}
    for chapter, (action, site) in NEEDS.items():
        if action == "positions":
            answers[chapter] = "yes" if vlm.placeholders else "no positions"
            continue
        refusals = [support.refusal(block, action, site) for block in vlm.blocks]
        count = sum(refusal is not None for refusal in refusals)
        answers[chapter] = f"not in {count} of {len(refusals)} blocks" if count else "yes"
    return answers


def _family(name: str) -> Family:
    require_one_of(name, FAMILIES, "family")
    return FAMILIES[name]


def _build(family: Family, sizes: Mapping[str, object]) -> PreTrainedModel:
    cls = getattr(transformers, family.cls)
    model = cls._from_config(cls.config_class(**sizes))
    model.tie_weights()
    return model.eval().requires_grad_(False)


class _Unmasked(TorchDispatchMode):
    """Say yes where code asks whether a mask without values hides nothing."""

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        reads_value = func is torch.ops.aten._local_scalar_dense.default
        if reads_value and args[0].device.type == "meta":
            return True
        return func(*args, **(kwargs or {}))


def _zeros(model: PreTrainedModel, *shape: int, whole: bool = False) -> Tensor:
    return torch.zeros(shape, device=model.device, dtype=torch.long if whole else None)


def _read_clip(model: PreTrainedModel, picture: Tensor, text: int) -> tuple[int, None]:
    output = model(input_ids=_zeros(model, 1, text, whole=True), pixel_values=picture)
    return output.image_embeds.shape[0], None


def _read_flava(model: PreTrainedModel, picture: Tensor, text: int) -> tuple[int, None]:
    output = model(input_ids=_zeros(model, 1, text, whole=True), pixel_values=picture)
    return output.image_embeddings.shape[1], None


def _read_idefics(model: PreTrainedModel, picture: Tensor, text: int) -> tuple[int, Callable]:
    width, sees = model.config.hidden_size, _zeros(model, 1, text, 1, whole=True) + 1
    # embeddings, since looking up ids would ask for their values
    output = model(
        inputs_embeds=_zeros(model, 1, text, width),
        pixel_values=picture,
        image_attention_mask=sees,
        use_cache=True,
        logits_to_keep=1,
    )

    def step() -> None:
        model(
            inputs_embeds=_zeros(model, 1, 1, width),
            perceiver_embeddings=output.image_hidden_states,
            image_attention_mask=sees[:, :1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )

    return output.image_hidden_states.shape[2], step


def _read_mllama(model: PreTrainedModel, picture: Tensor, text: int) -> tuple[int, Callable]:
    tiles = picture.shape[2]
    sees = _zeros(model, 1, text, 1, tiles, whole=True) + 1
    output = model(
        input_ids=_zeros(model, 1, text, whole=True),
        pixel_values=picture,
        aspect_ratio_ids=_zeros(model, 1, 1, whole=True) + 1,
        aspect_ratio_mask=_zeros(model, 1, 1, tiles, whole=True) + 1,
        cross_attention_mask=sees,
        use_cache=True,
        logits_to_keep=1,
    )
    layer = min(anatomy.cross_attention_layers(model)) - 1
    vectors = output.past_key_values.layers[layer].keys.shape[2]

    def step() -> None:
        model(
            input_ids=_zeros(model, 1, 1, whole=True),
            cross_attention_mask=sees[:, :1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )

    return vectors, step


def _read_idefics2(model: PreTrainedModel, picture: Tensor, text: int) -> tuple[int, Callable]:
    tower, connector = model.model.vision_model, model.model.connector
    # patch by patch, since the positions of patches are looked up by values
    patches = tower.embeddings.patch_embedding(picture[0]).flatten(2).transpose(1, 2)
    features = tower.post_layernorm(tower.encoder(inputs_embeds=patches).last_hidden_state)
    mask = _zeros(model, *features.shape[:2], whole=True) + 1
    vectors = connector(features, attention_mask=mask)
    return _read_sequence(model, vectors.shape[0] * vectors.shape[1], text)


def _read_blip2(model: PreTrainedModel, picture: Tensor, text: int) -> tuple[int, Callable]:
    features = model.vision_model(pixel_values=picture).last_hidden_state
    queries = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=features)
    vectors = model.language_projection(queries.last_hidden_state)
    return _read_sequence(model, vectors.shape[1], text)


def _read_llava(model: PreTrainedModel, picture: Tensor, text: int) -> tuple[int, Callable]:
    vectors = model.model.get_image_features(
        pixel_values=picture,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    ).pooler_output
    return _read_sequence(model, sum(len(rows) for rows in vectors), text)


def _read_sequence(model: PreTrainedModel, vectors: int, text: int) -> tuple[int, Callable]:
    """Read vectors of a picture and of words as one sequence."""
    decoder, unembedding = anatomy.decoder(model), anatomy.unembedding(model)
    width = model.config.get_text_config(decoder=True).hidden_size
    output = decoder(inputs_embeds=_zeros(model, 1, vectors + text, width), use_cache=True)
    unembedding(output.last_hidden_state[:, -1:])

    def step() -> None:
        written = decoder(
            inputs_embeds=_zeros(model, 1, 1, width),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        unembedding(written.last_hidden_state)

    return vectors, step


_READ: dict[str, Callable[[PreTrainedModel, Tensor, int], tuple[int, Callable | None]]] = {
    "clip": _read_clip,
    "flava": _read_flava,
    "idefics": _read_idefics,
    "idefics2": _read_idefics2,
    "blip-2": _read_blip2,
    "llava": _read_llava,
    "mllama": _read_mllama,
}


def _kinds(model: PreTrainedModel, ids: list[int]) -> list[str]:
    """What stands at each position of the words' sequence."""
    across = model.config.model_type in ("idefics", "mllama")
    names = {_MARK: "mark", _IMAGE: "mark", _PICTURE: "mark" if across else "picture"}
    return [names.get(token, "word") for token in ids]


def _states(model: PreTrainedModel, model_inputs: Mapping[str, Tensor]) -> dict[int | str, Tensor]:
    """The states (positions, width) of one row that enter and leave each block that reads words."""
    kind = model.config.model_type
    stacks: dict[str, Iterable[nn.Module]] = {}
    if kind == "clip":
        stacks[""] = model.text_model.encoder.layers
    elif kind == "flava":
        stacks[""] = model.text_model.encoder.layer
        stacks["joint "] = model.multimodal_model.encoder.layer
    else:
        stacks[""] = anatomy.decoder_blocks(model)
    states: dict[int | str, Tensor] = {}

    def keep(name: int | str, output: object) -> None:
        states[name] = (output[0] if isinstance(output, tuple) else output)[0]

    with ExitStack() as hooks, torch.no_grad():
        for prefix, blocks in stacks.items():
            for number, block in enumerate(blocks):
                before, after = number, number + 1
                if prefix:
                    before, after = f"{prefix}{number}", f"{prefix}{number + 1}"
                if number == 0:
                    hooks.enter_context(
                        block.register_forward_pre_hook(
                            lambda _, args, kwargs, name=before: keep(
                                name, args[0] if args else kwargs["hidden_states"]
                            ),
                            with_kwargs=True,
                        )
                    )
                hooks.enter_context(
                    block.register_forward_hook(
                        lambda _, args, output, name=after: keep(name, output)
                    )
                )
        model(**model_inputs)
    return states
