"""Prepare a vision-language model for one of many ways to tune few of its weights, and undo it.

Prompt tuning, IA3, LoRA and added biases come from peft; tuned norms, parallel adapters, random
weights, the connector alone and all weights are added here. Zahweh et al., 2023, arXiv 2310.01825,
compare such ways under a shift of domain.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.utils import is_peft_available

from xlvlms_tutorial.errors import InputError, LoadError
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.failures import require_installed
from xlvlms_tutorial.models.finetune import TARGETS, blocks_pattern, import_peft
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.validation import require, require_counts, require_equal, require_one_of

ADAPTER_SCALE = 0.1  # of what a parallel adapter adds, as in AdaptFormer

_tuned: WeakSet[nn.Module] = WeakSet()


@dataclass
class Tuning:
    """What is trained of a model, and the way back.

    :func:`tune` makes it. As a context manager it takes itself away at the end of the block.

    Parameters
    ----------
    method : str
        A key of ``TUNINGS``.
    base : str
        The name of the model that was prepared.
    parameters : dict of str to Parameter
        What is trained, in float32.
    total : int
        Weights of the model before it was prepared.
    prefix : str, default ""
        What has to stand before each question: places for learned tokens, or nothing.

    Examples
    --------
    >>> from xlvlms_tutorial.models import tune
    >>> with tune(vlm, "lora", rank=1) as tuning:
    ...     print(tuning.count, f"{100 * tuning.share:.2f} %", list(tuning.parameters)[0][-21:])
    57600 0.04 % lora_A.default.weight
    """

    method: str
    base: str
    parameters: dict[str, nn.Parameter]
    total: int
    prefix: str = ""
    _back: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.parameters.values())

    @property
    def share(self) -> float:
        """How many numbers are trained, as a share of the model's weights."""
        return self.count / self.total

    def state(self) -> dict[str, Tensor]:
        """Return a copy of what is trained.

        Returns
        -------
        dict of str to Tensor
            The numbers by name, for :meth:`load`.
        """
        return {name: weight.detach().clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], base: str | None = None) -> None:
        """Put trained numbers in place, such as those of the same tuning of a copy.

        Parameters
        ----------
        state : mapping of str to Tensor
            As :meth:`state` gives it.
        base : str, optional
            The name of the model they were trained on; by default it is not compared.

        Raises
        ------
        InputError
            If they were trained on another model, or their names or shapes differ.
        """
        advice = "prepare the model they were trained on, by the same method"
        if base is not None:
            require_equal("models", base, self.base, advice)
        shapes = {name: tuple(weight.shape) for name, weight in state.items()}
        here = {name: tuple(weight.shape) for name, weight in self.parameters.items()}
        differing = {name for name in {*shapes, *here} if shapes.get(name) != here.get(name)}
        if differing:
            name = min(differing)
            raise InputError(
                f"{name!r} has shape {shapes.get(name)} there and {here.get(name)} here", advice
            )
        for name, weight in self.parameters.items():
            weight.copy_(state[name])

    def undo(self) -> None:
        """Take away what was added, and put back what was trained; it is exact."""
        self._back.close()

    def __enter__(self) -> "Tuning":
        """Return the tuning itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo the tuning."""
        self.undo()


def tune(
    vlm: VLM,
    method: str,
    *,
    rank: int = 4,
    n_tokens: int = 8,
    placeholder: str | None = None,
    seed: int = 0,
) -> Tuning:
    r"""Prepare a model for training by one method, in place, and count what will be trained.

    Use it to compare ways to tune few weights. Everything else is frozen. At the start the model's
    answers are what they were, except with learned tokens, which lengthen each question. What is
    trained is in float32, whatever the dtype of the model; train it with any loop.

    "prompt" learns the embeddings of tokens before each question (Lester et al., 2021, arXiv
    2104.08691). "ia3" learns factors of keys, values and the MLP's hidden states (Liu et al., 2022,
    arXiv 2205.05638). "norm" trains the gains of the blocks' norms. "bias" adds a bias to the
    values, for language models that have none. "lora" is
    :math:`W + 2 B A` for queries and values (Hu et al., 2021, arXiv 2106.09685). "adapter" stands
    beside each MLP, :math:`x + \mathrm{MLP}(x) + 0.1 \cdot U \max(0, D x)` with :math:`U = 0` at
    the start (AdaptFormer, arXiv 2205.13535). "subset" trains as many weights of queries and values
    as "lora" of this rank, drawn at random. "connector" trains what lies between tower and language
    model. "full" trains connector, blocks and final norm; embeddings and tower stay.

    Parameters
    ----------
    vlm : VLM
        The model, without an adapter; it is changed in place until the tuning is undone.
    method : str
        A key of ``TUNINGS``.
    rank : int, default 4
        Rank of "lora", width of "adapter", and the size of "subset".
    n_tokens : int, default 8
        Learned tokens of "prompt".
    placeholder : str, optional
        A token of the vocabulary that no text has, for the places of learned tokens; by default the
        tokenizer's unknown token, or a special token that nothing uses.
    seed : int, default 0
        Draws what is drawn at the start.

    Returns
    -------
    Tuning
        What is trained, its number, and ``undo()``.

    Raises
    ------
    InputError
        If there is no such method, a number is below 1, or the model lacks what is to be trained.
    LoadError
        If peft is needed and not installed, or the model has an adapter already.

    Examples
    --------
    >>> from xlvlms_tutorial.models import TUNINGS, tune
    >>> for method in ("prompt", "norm", "bias", "adapter", "connector"):
    ...     with tune(vlm, method) as tuning:
    ...         print(method, tuning.count)
    prompt 4608
    norm 35136
    bias 5760
    adapter 155640
    connector 1162368
    """
    require_one_of(method, TUNINGS, "method")
    require_counts(rank=rank, n_tokens=n_tokens)
    require(seed >= 0, f"seed is {seed}", "give 0 or more")
    if vlm.model in _tuned or getattr(vlm.model, "peft_config", None):
        raise LoadError(f"{vlm.name!r} has an adapter already", "undo it, or load the model again")
    tuning = Tuning(method, vlm.name, {}, sum(w.numel() for w in vlm.model.parameters()))
    trained = [weight for weight in vlm.model.parameters() if weight.requires_grad]
    tuning._back.callback(_require_grad, trained, True)
    _require_grad(trained, False)
    torch.manual_seed(seed)
    options = _Options(rank, n_tokens, placeholder)
    try:
        tuning.parameters = TUNINGS[method](vlm, options, tuning._back)
    except BaseException:
        tuning.undo()
        raise
    if method == "prompt":
        tuning.prefix = _placeholder(vlm, placeholder) * n_tokens
    for weight in tuning.parameters.values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    _tuned.add(vlm.model)
    tuning._back.callback(_tuned.discard, vlm.model)
    tuning._back.callback(setattr, vlm, "name", vlm.name)
    vlm.name += f" + {method}"  # states captured from here on are not the plain model's
    return tuning


@dataclass(frozen=True)
class _Options:
    rank: int
    n_tokens: int
    placeholder: str | None


def _require_grad(weights: Iterable[nn.Parameter], value: bool) -> None:
    for weight in weights:
        weight.requires_grad_(value)


def _prompt(vlm: VLM, options: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    _require_peft()
    from peft import PromptEmbedding, PromptTuningConfig

    words = vlm.model.get_input_embeddings()
    config = PromptTuningConfig(
        num_virtual_tokens=options.n_tokens,
        token_dim=words.embedding_dim,
        num_transformer_submodules=1,
        prompt_tuning_init="SAMPLE_VOCAB",
    )
    learned = PromptEmbedding(config, words)
    token = vlm.tokenizer.convert_tokens_to_ids(_placeholder(vlm, options.placeholder))

    def replace(module: nn.Module, args: tuple, output: Float[Tensor, "b t d"]) -> Tensor:
        """The hook of the embedding ``module``: its ``output`` for ids in ``args``, replaced."""
        places = args[0] == token
        # several questions about one picture may stand in one row, each with all learned tokens
        numbers = (places.cumsum(dim=-1) - 1).clamp_min(0) % options.n_tokens
        return torch.where(places[..., None], learned(numbers).to(output.dtype), output)

    back.callback(words.register_forward_hook(replace).remove)
    return dict(learned.named_parameters())


def _placeholder(vlm: VLM, placeholder: str | None) -> str:
    placeholder = placeholder or vlm.tokenizer.unk_token or _unused(vlm)
    known = placeholder is not None and placeholder in vlm.tokenizer.get_vocab()
    advice = "give a token of the vocabulary that no text has, such as a reserved one"
    require(known, f"placeholder {placeholder!r} is no token", advice)
    return placeholder


def _unused(vlm: VLM) -> str | None:
    """A special token that neither the model, its chat format nor the ends of texts use."""
    tokenizer = vlm.tokenizer
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for name, value in vlm.model.config.to_dict().items():
        if name.endswith("_token_id"):
            used.update(value if isinstance(value, list) else [value])
    chat = str(getattr(vlm.processor, "chat_template", None) or tokenizer.chat_template)
    for number, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True):
        if token.special and number not in used and token.content not in chat:
            return token.content
    return None


def _require_peft() -> None:
    require_installed("peft", is_peft_available(), "this tuning", "try again")
    import_peft()


def _by_peft(vlm: VLM, config: object, back: ExitStack) -> dict[str, nn.Parameter]:
    """Put an adapter of peft into the model."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # biases added to layers without any cannot be merged, which nobody does here
        warnings.filterwarnings("ignore", message=".*no bias term.*")
        # peft asks by a name that transformers will drop
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        adapted = get_peft_model(vlm.model, config)
    back.callback(_unload, vlm.model, adapted)
    vlm.model.eval()
    return {n: weight for n, weight in vlm.model.named_parameters() if weight.requires_grad}


def _unload(model: nn.Module, adapted: nn.Module) -> None:
    adapted.unload()
    if hasattr(model, "peft_config"):  # else the model would count as adapted
        del model.peft_config


def _lora(vlm: VLM, options: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    _require_peft()
    from peft import LoraConfig

    pattern = blocks_pattern(vlm, TARGETS)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=pattern)
    return _by_peft(vlm, config, back)


def _ia3(vlm: VLM, _: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    _require_peft()
    from peft import IA3Config

    config = IA3Config(
        target_modules=blocks_pattern(vlm, ("k_proj", "v_proj", "down_proj")),
        feedforward_modules=blocks_pattern(vlm, ("down_proj",)),
    )
    return _by_peft(vlm, config, back)


def _bias(vlm: VLM, _: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    _require_peft()
    from peft import BeftConfig

    return _by_peft(vlm, BeftConfig(target_modules=blocks_pattern(vlm, ("v_proj",))), back)


def _norm(vlm: VLM, _: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    # peft's norms answer in float32 when they are trained so, which a block in bfloat16 refuses
    norms = {anatomy.final_norm(vlm.model)}
    for block in vlm.blocks:
        norms |= {anatomy.first_norm(block), anatomy.second_norm(block)}
    return _own_weights(vlm, lambda module: module in norms, back)


def _connector(vlm: VLM, _: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    connector = anatomy.connector(vlm.model)
    require(connector is not None, f"{vlm.name!r} has no connector", "tune its blocks instead")
    parts = set(connector.modules())
    return _own_weights(vlm, lambda module: module in parts, back)


def _full(vlm: VLM, _: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    parts = {anatomy.final_norm(vlm.model)}
    for part in (*vlm.blocks, anatomy.connector(vlm.model)):
        if part is not None:
            parts |= set(part.modules())
    return _own_weights(vlm, lambda module: module in parts, back)


class _Cast(nn.Module):
    """Shows a weight that is trained in float32 in the dtype of the model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as the model sees it."""
        return weight.to(self.dtype)


def _own_weights(
    vlm: VLM, of_module: Callable[[nn.Module], bool], back: ExitStack
) -> dict[str, nn.Parameter]:
    """Train copies of the model's own weights; the originals come back untouched."""
    parameters = {}
    for module_name, module in list(vlm.model.named_modules()):
        if not of_module(module):
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            copy = nn.Parameter(weight.detach().float().clone())
            module._parameters[name] = copy
            # unsafe: the dtype changes
            parametrize.register_parametrization(module, name, _Cast(weight.dtype), unsafe=True)
            back.callback(_put_back, module, name, weight)
            parameters[f"{module_name}.{name}"] = copy
    return parameters


def _put_back(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    module._parameters[name] = weight


class _Subset(nn.Module):
    """Adds trained numbers to a few weights of a frozen matrix."""

    def __init__(self, places: Int[Tensor, "n"]) -> None:
        super().__init__()
        self.register_buffer("places", places)
        self.change = nn.Parameter(torch.zeros(len(places)))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Return the matrix with the change added."""
        change = self.change.to(weight.dtype)
        return weight.flatten().index_add(0, self.places, change).view_as(weight)


def _subset(vlm: VLM, options: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    blocks_pattern(vlm, TARGETS)  # refuses a model without such maps
    parameters = {}
    for number, block in enumerate(vlm.blocks):
        for name, module in list(block.named_modules()):
            if not (isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS):
                continue
            weight = module.weight
            n = min(options.rank * sum(weight.shape), weight.numel())
            places = torch.randperm(weight.numel())[:n].to(weight.device)
            subset = _Subset(places).to(weight.device)
            parametrize.register_parametrization(module, "weight", subset)
            back.callback(_put_back, module, "weight", weight)
            parameters[f"{number}.{name}"] = subset.change
    return parameters


class _ParallelAdapter(nn.Module):
    """A narrow MLP beside an MLP; it adds nothing at the start."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        # the published code leaves both as they are drawn, and so starts from a damaged model
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def beside(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The hook of the MLP ``module``: its ``output``, plus what is added for ``args``."""
        added = self.up(self.down(args[0].to(self.down.weight.dtype)).relu())
        return output + (ADAPTER_SCALE * added).to(output.dtype)


def _adapter(vlm: VLM, options: _Options, back: ExitStack) -> dict[str, nn.Parameter]:
    parameters = {}
    for number, block in enumerate(vlm.blocks):
        adapter = _ParallelAdapter(vlm.width, options.rank).to(vlm.model.device)
        back.callback(anatomy.mlp(block).register_forward_hook(adapter.beside).remove)
        for name, weight in adapter.named_parameters():
            parameters[f"{number}.{name}"] = weight
    return parameters


# ways to tune, by name, from few trained numbers to all
TUNINGS: dict[str, Callable[[VLM, _Options, ExitStack], dict[str, nn.Parameter]]] = {
    "prompt": _prompt,
    "bias": _bias,
    "ia3": _ia3,
    "norm": _norm,
    "subset": _subset,
    "lora": _lora,
    "adapter": _adapter,
    "connector": _connector,
    "full": _full,
}
