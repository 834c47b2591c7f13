"""Maps over image tokens: where in the picture the next word of a vision-language model comes from.

Gradients, occlusion and attention, for one score: the log-probability of a word in an answer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.interventions.edits import patch
from xlvlms_tutorial.interventions.replay import Resumable
from xlvlms_tutorial.methods.concepts.attribution import image_mask, to_grid, up_to_words
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.batching import answers_of, batches
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.samples import PROMPTS, Sample
from xlvlms_tutorial.validation import require, require_counts, require_one_of

TOKEN_METHODS = ("gradient", "occlusion", "rollout", "attention")


class WordScores:
    """The log-probability of a word in answers about pictures, with chosen image tokens kept.

    Use it as the score of :func:`token_maps` and of
    :func:`~xlvlms_tutorial.methods.attribution.perturbation_curves`. Tower and connector run once;
    an image token that is not kept is replaced, where it enters the decoder, by its mean over all
    samples.

    Parameters
    ----------
    vlm : VLM
        The model.
    samples : sequence of Sample
        Two samples or more, with pictures that have the same number of image tokens.
    words : str or sequence of str
        Words of interest: the first one that occurs in an answer is scored, by its first piece.
    answers : sequence of str or function
        One answer for each sample that has one of the words, or a function of the sample.
    prompt : str
        The question about each picture; by default the model is asked to describe it.
    batch_size : int, default 16
        Samples in a forward.

    Attributes
    ----------
    side : int
        Rows, and columns, of the image tokens.

    Raises
    ------
    InputError
        If there is a single sample, an answer lacks the words, or the image tokens are no square or
        differ in number.
    SpanError
        If the samples have no image tokens.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import WordScores
    >>> scores = WordScores(vlm, samples, "picture", ["A picture"] * 4)
    >>> everything = torch.ones(4, scores.side, scores.side, dtype=torch.bool)
    >>> scores(everything).shape, bool((scores(everything) < 0).all())
    (torch.Size([4]), True)
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        words: str | Sequence[str],
        answers: Sequence[str] | Callable[[Sample], str],
        prompt: str = PROMPTS["image"],
        batch_size: int = 16,
    ) -> None:
        require_counts(batch_size=batch_size)
        require(len(samples) > 1, f"{len(samples)} sample(s)", "give two or more: means are taken")
        self.vlm = vlm
        texts = answers_of(samples, answers)
        words = (words,) if isinstance(words, str) else tuple(words)
        self._parts: list[_Part] = []
        for batch in batches(vlm, samples, prompt, texts, batch_size=batch_size):
            expected = self._parts[0].n_tokens if self._parts else None
            self._parts.append(_Part(vlm, batch, words, expected))
        rows = torch.cat([part.tokens for part in self._parts])
        self.means = rows.mean(dim=0)
        self.side = to_grid(rows[0, :, 0]).shape[-1]

    def __len__(self) -> int:
        return sum(len(part.tokens) for part in self._parts)

    def __call__(self, visible: Bool[Tensor, "n side side"]) -> Float[Tensor, "n"]:
        """Score the words with these image tokens alone.

        Parameters
        ----------
        visible : Tensor of bool (n, side, side)
            True where an image token stays as it is.

        Returns
        -------
        Tensor (n,)
            Log-probabilities in nats.

        Raises
        ------
        InputError
            If the mask has another size than the image tokens.
        """
        size = (len(self), self.side, self.side)
        require(
            tuple(visible.shape) == size,
            f"a mask of {tuple(visible.shape)} for image tokens of {size}",
            "give one value for each image token of each sample",
        )
        scores = []
        first = 0
        for part in self._parts:
            rows = visible[first : first + len(part.tokens)].flatten(1)
            scores.append(part.score(rows, self.means))
            first += len(rows)
        return torch.cat(scores)

    def _each(self, compute: Callable[["_Part"], Tensor]) -> Float[Tensor, "n t"]:
        return torch.cat([compute(part).float().cpu() for part in self._parts])


class _Part:
    """One batch, up to the position that predicts the word."""

    def __init__(
        self, vlm: VLM, batch: Batch, words: tuple[str, ...], n_tokens: int | None
    ) -> None:
        self.vlm = vlm
        self.batch, self.mask = up_to_words(vlm, batch, words, "predicting")
        self.image = image_mask(vlm, self.batch, n_tokens)
        _, places = self.mask.nonzero(as_tuple=True)
        rows = torch.arange(len(places), device=places.device)
        self.targets = batch["input_ids"][rows, places + 1].cpu()
        self.run = Resumable(vlm, self.batch)
        self.entering = self.run.read(0, dtype=torch.float32)
        self.tokens = self.entering[self.image.cpu()].unflatten(0, (len(rows), -1))
        self.n_tokens = self.tokens.shape[1]

    def score(
        self, visible: Bool[Tensor, "b t"], means: Float[Tensor, "t d"]
    ) -> Float[Tensor, "b"]:
        states = self.entering.clone()
        states[self.image.cpu()] = torch.where(visible[..., None], self.tokens, means).flatten(0, 1)
        change = patch(self.vlm, states, 0, self.image)
        last = self.run.read(self.vlm.n_layers, self.mask, change=change)
        return self._picked(self.vlm.unembed(last).cpu())

    def gradients(self) -> Float[Tensor, "b t"]:
        """The gradient times the state of each image token."""
        reached: list[Tensor] = []

        def detach(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            """Hook ``(_module, args, kwargs)``: the states that enter become a leaf."""
            reached.append(anatomy.states_in(args, kwargs).detach().requires_grad_())
            if args:
                return (reached[0], *args[1:]), kwargs
            return args, kwargs | {"hidden_states": reached[0]}

        handle = self.vlm.blocks[0].register_forward_pre_hook(detach, with_kwargs=True)
        try:
            with self.vlm.run(self.batch), torch.enable_grad():
                logits = self.vlm.model(**self.batch, use_cache=False).logits[self.mask]
                score = self._picked(logits.float())
                (gradients,) = torch.autograd.grad(score.sum(), reached)
        finally:
            handle.remove()
        products = (gradients * reached[0].detach()).sum(dim=-1)
        return products[self.image].unflatten(0, (len(products), -1))

    def attentions(self) -> list[Float[Tensor, "b heads t t"]]:
        """The attention of each block."""
        with _eager(anatomy.decoder(self.vlm.model)):
            output = self.vlm.forward(self.batch, output_attentions=True, use_cache=False)
        attentions = [] if output.attentions is None else list(output.attentions)
        usable = attentions and all(weights is not None for weights in attentions)
        require(usable, f"{self.vlm.name} returns no attention", "choose gradient or occlusion")
        return attentions

    def seen(self, weights: Float[Tensor, "b t t"]) -> Float[Tensor, "b t2"]:
        """What the predicting position has of each image token."""
        return weights[self.mask][self.image].unflatten(0, (len(weights), -1))

    def _picked(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b"]:
        logs = logits.log_softmax(dim=-1)
        return logs.gather(1, self.targets.to(logs.device)[:, None])[:, 0]


def token_maps(scores: WordScores, method: str = "gradient") -> Float[Tensor, "n side side"]:
    r"""Compute which image tokens the log-probability of a word comes from.

    Use it to ask whether a word comes from where the thing stands. One score, four ways to share it
    out over the image tokens :math:`x_j` that enter the decoder.

    Parameters
    ----------
    scores : WordScores
        The model, the samples and the words.
    method : str, default "gradient"
        "gradient": :math:`x_j \cdot \partial S / \partial x_j` (gradient x activation), one
        backward. "occlusion": the score minus that without token j, one forward a token.
        "rollout": attention multiplied through the blocks with their residual streams, see
        :func:`attention_rollout`. "attention": its mean over blocks and heads. The last two know
        nothing of the word.

    Returns
    -------
    Tensor (n, side, side)
        The maps, on the CPU. Those of "gradient" and "occlusion" have a sign.

    Raises
    ------
    InputError
        If the method is unknown, or the model returns no attention.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.attribution import WordScores, token_maps
    >>> scores = WordScores(vlm, samples, "picture", ["A picture"] * 4)
    >>> token_maps(scores, "gradient").shape
    torch.Size([4, 4, 4])
    """
    require_one_of(method, TOKEN_METHODS, "method")
    if method == "occlusion":
        return _occlusion(scores)
    if method == "gradient":
        return to_grid(scores._each(_Part.gradients))
    summary = attention_rollout if method == "rollout" else _mean_attention
    return to_grid(scores._each(lambda part: part.seen(summary(part.attentions()))))


def attention_rollout(attentions: Sequence[Float[Tensor, "b heads t t"]]) -> Float[Tensor, "b t t"]:
    r"""Multiply attention through the blocks (Abnar and Zuidema, 2020, arXiv 2005.00928).

    .. math:: R = \prod_{l=L}^{1} \tfrac{1}{2} (\bar{A}_l + I)

    with :math:`\bar{A}_l` the mean over heads: half of each state is taken to come from attention,
    half from the residual stream.

    Parameters
    ----------
    attentions : sequence of Tensor (b, heads, t, t)
        The attention of each block, the first block first; rows sum to 1.

    Returns
    -------
    Tensor (b, t, t)
        Row by row, what each position is taken to have of each input position.

    Raises
    ------
    InputError
        If there is no block.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.attribution import attention_rollout
    >>> looks_back = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    >>> attention_rollout([looks_back, looks_back])[0].tolist()
    [[1.0, 0.0], [0.75, 0.25]]
    """
    if not len(attentions):
        raise InputError("no attention", "give that of one block or more")
    result = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for weights in attentions:
        mean = weights.float().mean(dim=1)
        result = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2 @ result
    return result


def _mean_attention(attentions: Sequence[Tensor]) -> Float[Tensor, "b t t"]:
    return torch.stack([weights.float().mean(dim=1) for weights in attentions]).mean(dim=0)


def _occlusion(scores: WordScores) -> Float[Tensor, "n side side"]:
    n, side = len(scores), scores.side
    visible = torch.ones(n, side, side, dtype=torch.bool)
    unchanged = scores(visible)
    drops = torch.zeros(n, side, side)
    for row in range(side):
        for column in range(side):
            visible[:, row, column] = False
            drops[:, row, column] = unchanged - scores(visible)
            visible[:, row, column] = True
    return drops


@contextmanager
def _eager(decoder: nn.Module) -> Iterator[None]:
    """Let a decoder compute its attention so that it can return it; towers stay as they are."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
