"""AIMv2's objective in miniature: an encoder learns from words, and from pixels too.

A small vision transformer and a causal decoder are trained from nothing on scenes and captions. At
this size, with a minute of training in place of months, that pixels help is **probably not to be
decided**; this was written before the runs. Sizes were chosen with seed 0, after pictures of 64
pixels had taught nothing in 300 steps, so the records are of other seeds. Seed 0 was judged on the
same test scenes. Captions name every factor: two of a scene's five the side, and two the time.
``python -m xlvlms_tutorial.training.aim`` makes them again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import process_time

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from xlvlms_tutorial.data import Sample, load_samples
from xlvlms_tutorial.io import read_json, write_json
from xlvlms_tutorial.models.loop import optimise, warmup_cosine
from xlvlms_tutorial.training.connector_runs import versions
from xlvlms_tutorial.validation import require, require_counts

FILE = Path(__file__).parents[1] / "tutorials" / "encoders.json"
ALPHAS = (0.0, 0.4)
SEEDS = tuple(range(1, 11))
N_LOOKS = 3  # times that a training is probed, behind its start
N_TRAIN, N_PROBE, N_TEST = 2400, 600, 300  # pictures to train on, to fit probes on, to judge
FACTORS = ("subject", "action", "item", "colour", "count", "place", "side", "time")
_PAD, _END = 0, 1


@dataclass(frozen=True)
class AimRecipe:
    """How a small encoder is trained with its decoder.

    Parameters
    ----------
    size : int, default 32
        Pixels a side of a picture.
    patch : int, default 8
        Pixels a side of a patch; it divides the size.
    width : int, default 96
        Width of both transformers.
    depth : int, default 4
        Blocks of the encoder.
    decoder_depth : int, default 2
        Blocks of the decoder.
    heads : int, default 4
        Heads of attention.
    steps : int, default 900
        Training steps.
    batch_size : int, default 32
        Pictures a step.
    rate : float, default 2e-3
        The highest learning rate of AdamW.

    Raises
    ------
    InputError
        If a number is below 1, the patches do not cover a picture, or heads do not share the width.

    Examples
    --------
    >>> from xlvlms_tutorial.training.aim import AimRecipe
    >>> AimRecipe(size=64, patch=8).n_patches
    64
    """

    size: int = 32
    patch: int = 8
    width: int = 96
    depth: int = 4
    decoder_depth: int = 2
    heads: int = 4
    steps: int = 900
    batch_size: int = 32
    rate: float = 2e-3

    def __post_init__(self) -> None:
        numbers = asdict(self)
        numbers.pop("rate")
        require_counts(**numbers)
        require(
            self.size % self.patch == 0,
            f"patches of {self.patch} pixels do not cover a side of {self.size}",
            f"a patch size that divides {self.size}",
        )
        require(
            self.width % self.heads == 0,
            f"{self.heads} heads do not share a width of {self.width}",
            f"a number of heads that divides {self.width}",
        )

    @property
    def n_patches(self) -> int:
        """Patches of a picture."""
        return (self.size // self.patch) ** 2


def to_patches(
    images: Sequence[Image.Image] | Float[np.ndarray, "b s s 3"], size: int, patch: int
) -> Float[Tensor, "b n d"]:
    """Cut pictures into patches, row by row from the upper left, each normalised by itself.

    Use it for what the encoder sees and what it predicts: with mean 0 and deviation 1 in each
    patch, a flat wall counts as much as a figure.

    Parameters
    ----------
    images : sequence of PIL.Image.Image, or array (b, s, s, 3)
        Pictures, resized to ``size``; an array of that size is taken as it is.
    size, patch : int
        Pixels a side of a picture and of a patch.

    Returns
    -------
    Tensor (b, n, 3 patch²)
        The patches.

    Examples
    --------
    >>> from xlvlms_tutorial.training.aim import to_patches
    >>> to_patches([samples[0].image], 64, 8).shape
    torch.Size([1, 64, 192])
    """
    AimRecipe(size=size, patch=patch)
    side = size // patch
    cut = pixels(images, size).unflatten(2, (side, patch)).unflatten(1, (side, patch))
    patches = cut.transpose(2, 3).flatten(3).flatten(1, 2)  # b row column p q c
    mean = patches.mean(dim=-1, keepdim=True)
    deviation = patches.std(dim=-1, keepdim=True, correction=0)
    return (patches - mean) / (deviation + 1e-2)  # a flat patch stays near 0


def pixels(
    images: Sequence[Image.Image] | Float[np.ndarray, "b s s 3"], size: int
) -> Float[Tensor, "b s s 3"]:
    """Return pictures of one size as numbers from 0 to 1; see :func:`to_patches`."""
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images).float()
    arrays = []
    for image in images:
        small = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(small, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(arrays))


def prefix_mask(prefix: Int[Tensor, "b"], n: int) -> Bool[Tensor, "b n n"]:
    r"""Return who may attend to whom: all of the prefix to each other, the rest causally.

    Position :math:`i` sees :math:`j` where :math:`j \le i` or :math:`j < M`, with the prefix of
    :math:`M` positions. With :math:`M = n` everything sees everything.

    Parameters
    ----------
    prefix : Tensor (b,)
        The length of each sequence's prefix.
    n : int
        Positions.

    Returns
    -------
    Tensor (b, n, n)
        True where the row's position sees the column's.

    References
    ----------
    Fini et al., 2025, Multimodal Autoregressive Pre-training of Large Vision Encoders,
    arXiv 2411.14402.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.training.aim import prefix_mask
    >>> prefix_mask(torch.tensor([2]), 3)[0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    places = torch.arange(n)
    causal = places[None, :] <= places[:, None]
    return causal | (places < prefix[:, None])[:, None, :]


class Block(nn.Module):
    """A block of the paper's kind: RMS norms, attention without biases, SwiGLU.

    Parameters
    ----------
    width, heads : int
        As in :class:`AimRecipe`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 8 * width // 3  # as many weights as an MLP of four times the width
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self, states: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n n"]
    ) -> Float[Tensor, "b n d"]:
        """Return the states behind the block."""
        split_heads = self.qkv(self.norms[0](states)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split_heads.permute(2, 0, 3, 1, 4)  # each b h n d
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.norms[1](states)
        return states + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class TinyAim(nn.Module):
    """An encoder with prefix attention, and a causal decoder of patches and words.

    Parameters
    ----------
    recipe : AimRecipe
        The sizes.
    words : sequence of str
        The words of captions; their order gives their numbers, from 2.

    Examples
    --------
    >>> from xlvlms_tutorial.training.aim import AimRecipe, TinyAim, to_patches
    >>> model = TinyAim(AimRecipe(width=16, heads=2, depth=1), ["a", "frog"])
    >>> model.features(to_patches([samples[0].image], 32, 8)).shape
    torch.Size([1, 16])
    """

    def __init__(self, recipe: AimRecipe, words: Sequence[str]) -> None:
        super().__init__()
        self.recipe = recipe
        self.numbers = {word: number for number, word in enumerate(words, start=2)}
        width, pixels_of_patch = recipe.width, 3 * recipe.patch**2
        self.embed = nn.Linear(pixels_of_patch, width)
        self.places = nn.Parameter(0.02 * torch.randn(recipe.n_patches, width))
        blocks = [Block(width, recipe.heads) for _ in range(recipe.depth)]
        self.encoder = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width)
        self.words = nn.Embedding(len(words) + 2, width)
        self.order = nn.Parameter(0.02 * torch.randn(64, width))  # places in a caption
        blocks = [Block(width, recipe.heads) for _ in range(recipe.decoder_depth)]
        self.decoder = nn.ModuleList(blocks)
        self.decoder_norm = nn.RMSNorm(width)
        self.pixel_head = nn.Linear(width, pixels_of_patch)
        self.word_head = nn.Linear(width, len(words) + 2)

    def encode(
        self, patches: Float[Tensor, "b n p"], mask: Bool[Tensor, "b n n"]
    ) -> Float[Tensor, "b n d"]:
        """Return the encoder's states under a mask of attention."""
        states = self.embed(patches) + self.places
        for block in self.encoder:
            states = block(states, mask)
        return self.norm(states)

    def features(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b d"]:
        """Return the mean state of each picture, every patch seeing all others."""
        full = torch.full((len(patches),), self.recipe.n_patches)
        return self.encode(patches, prefix_mask(full, self.recipe.n_patches)).mean(dim=1)

    def ids(self, captions: Sequence[str]) -> Int[Tensor, "b t"]:
        """Return the numbers of the captions' words, an end, and padding; unknown words are out."""
        rows = []
        for caption in captions:
            row = [self.numbers[word] for word in split(caption) if word in self.numbers]
            rows.append(torch.tensor([*row, _END]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PAD)

    def forward(
        self, patches: Float[Tensor, "b n p"], ids: Int[Tensor, "b t"], prefix: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b n p"], Float[Tensor, "b t v"]]:
        """Return what is predicted of the next patch at each patch, and of each word before it.

        Parameters
        ----------
        patches : Tensor (b, n, p)
            From :func:`to_patches`.
        ids : Tensor (b, t)
            From :meth:`ids`.
        prefix : Tensor (b,)
            The length of each picture's prefix.

        Returns
        -------
        tuple of Tensor (b, n, p) and Tensor (b, t, v)
            Pixels of the next patch, and logits of words.
        """
        n, t = patches.shape[1], ids.shape[1]
        image = self.encode(patches, prefix_mask(prefix, n))
        states = torch.cat([image, self.words(ids) + self.order[:t]], dim=1)
        causal = prefix_mask(torch.zeros_like(prefix), n + t)
        for block in self.decoder:
            states = block(states, causal)
        states = self.decoder_norm(states)
        return self.pixel_head(states[:, :n]), self.word_head(states[:, n - 1 : n - 1 + t])

    def losses(
        self, patches: Float[Tensor, "b n p"], ids: Int[Tensor, "b t"], prefix: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        r"""Return both losses: of words, and of the pixels behind the prefix.

        Their sum :math:`L_{text} + \alpha L_{img}` is what is trained. :math:`L_{text}` is the
        cross-entropy of a word. :math:`L_{img}` is the squared error of a normalised pixel, over
        patches outside the prefix, each predicted from those before it.

        Parameters
        ----------
        patches : Tensor (b, n, p)
            From :func:`to_patches`.
        ids : Tensor (b, t)
            From :meth:`ids`.
        prefix : Tensor (b,)
            The length of each picture's prefix, 1 to n - 1.

        Returns
        -------
        tuple of two scalars
            In nats a word, and in squared deviations a pixel.
        """
        next_patches, words = self(patches, ids, prefix)
        text = functional.cross_entropy(words.transpose(1, 2), ids, ignore_index=_PAD)
        errors = (next_patches[:, :-1] - patches[:, 1:]).square().mean(dim=-1)
        behind = torch.arange(1, patches.shape[1]) >= prefix[:, None]
        return text, errors[behind].mean()


def split(caption: str) -> list[str]:
    """Return the words of a caption, in lower case."""
    return re.findall(r"\w+", caption.lower())


def train_encoder(
    recipe: AimRecipe,
    samples: Sequence[Sample],
    alpha: float,
    seed: int = 0,
    at_step: Callable[[int, TinyAim], object] = lambda done, model: None,
) -> tuple[TinyAim, list[dict]]:
    """Train an encoder and its decoder from nothing.

    Parameters
    ----------
    recipe : AimRecipe
        Sizes and steps.
    samples : sequence of Sample
        Pictures with captions.
    alpha : float
        The weight of the pixels; 0 for words alone.
    seed : int, default 0
        Of the first weights, of the pictures and captions of each step, and of prefixes.
    at_step : callable, optional
        Is called with the number of steps done and the model, from 0; by default nothing is done.

    Returns
    -------
    tuple of TinyAim and list of dict
        The model, and for each step "step", "loss", "seconds", "text" and "pixels".

    Raises
    ------
    InputError
        If a picture has no caption, or alpha is no weight.

    Examples
    --------
    >>> from xlvlms_tutorial.training.aim import AimRecipe, train_encoder
    >>> recipe = AimRecipe(width=16, heads=2, depth=1, steps=2, batch_size=2)
    >>> model, history = train_encoder(recipe, samples[:4], alpha=0.4)
    >>> len(history), history[0]["loss"] > history[0]["text"]
    (2, True)
    """
    require(all(sample.captions for sample in samples), "a picture without a caption", "give one")
    require(0 <= alpha < float("inf"), f"alpha={alpha}", "0 or a positive number")
    words = sorted({w for sample in samples for caption in sample.captions for w in split(caption)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyAim(recipe, words)
    patches = to_patches([sample.image for sample in samples], recipe.size, recipe.patch)
    parts: list[dict[str, float]] = []

    def loss(step: int) -> Float[Tensor, ""]:
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(len(samples), min(recipe.batch_size, len(samples)), replace=False)
        captions = []
        for row in rows:
            captions.append(samples[row].captions[rng.integers(len(samples[row].captions))])
        prefix = torch.from_numpy(rng.integers(1, recipe.n_patches, len(rows)))
        text, image = model.losses(patches[torch.from_numpy(rows)], model.ids(captions), prefix)
        parts.append({"text": text.item(), "pixels": image.item()})
        return text + alpha * image

    history = optimise(
        dict(model.named_parameters()),
        loss,
        recipe.steps,
        lambda step: recipe.rate * warmup_cosine(step, recipe.steps, max(1, recipe.steps // 20)),
        weight_decay=0.05,
        at_step=lambda done: at_step(done, model),
        disable=True,
    )
    return model.eval(), [row | part for row, part in zip(history, parts, strict=True)]


def probe_scores(
    fitted: Float[np.ndarray, "n d"],
    judged: Float[np.ndarray, "m d"],
    truth: Mapping[str, tuple[Sequence[str], Sequence[str]]],
) -> dict[str, float]:
    """Read factors off frozen features with linear probes.

    Use it to compare encoders: whoever makes a factor readable for a line has it in its features.

    Parameters
    ----------
    fitted, judged : array (n, d) and (m, d)
        Features of the pictures that probes are fitted on, and of those that they are judged on.
    truth : mapping of str to two sequences of str
        By factor: the values of the first pictures, and of the second ones.

    Returns
    -------
    dict of str to float
        The share of right answers by factor. The strength of the probe's penalty is chosen by
        cross-validation among the first pictures.

    Examples
    --------
    >>> import numpy as np
    >>> from xlvlms_tutorial.training.aim import probe_scores
    >>> features = np.repeat(np.eye(2), 6, axis=0)
    >>> values = ["day"] * 6 + ["night"] * 6
    >>> probe_scores(features, features, {"time": (values, values)})
    {'time': 1.0}
    """
    scores = {}
    for factor, (values, expected) in truth.items():
        probe = make_pipeline(
            StandardScaler(),
            LogisticRegressionCV(
                Cs=(0.003, 0.03, 0.3),
                cv=3,
                max_iter=300,
                scoring="accuracy",
                l1_ratios=(0.0,),
                use_legacy_attributes=False,
            ),
        )
        probe.fit(fitted, np.asarray(values, dtype=str))
        scores[factor] = float(probe.score(judged, np.asarray(expected, dtype=str)))
    return scores


def truth_of(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """Return the value of each factor in each picture, "None" where there is none."""
    return {factor: [str(sample.truth[factor]) for sample in samples] for factor in FACTORS}


@torch.no_grad()
def features_of(model: TinyAim, samples: Sequence[Sample]) -> Float[np.ndarray, "n d"]:
    """Return the frozen features of pictures.

    Parameters
    ----------
    model : TinyAim
        The model.
    samples : sequence of Sample
        The pictures.

    Returns
    -------
    array (n, d)
        A row a picture.

    Examples
    --------
    >>> from xlvlms_tutorial.training.aim import AimRecipe, TinyAim, features_of
    >>> features_of(TinyAim(AimRecipe(width=16, heads=2), ["a"]), samples[:2]).shape
    (2, 16)
    """
    recipe = model.recipe
    rows = []
    for start in range(0, len(samples), 100):
        images = [sample.image for sample in samples[start : start + 100]]
        rows.append(model.features(to_patches(images, recipe.size, recipe.patch)).numpy())
    return np.concatenate(rows)


def run_all(
    file: Path | None = None,
    report: Callable[[str], object] = print,
    recipe: AimRecipe | None = None,
) -> dict[str, object]:
    """Train with each seed and weight, probe, and write what came out after each run.

    A run that was killed goes on: what the file has is not done again.

    Parameters
    ----------
    file : Path, optional
        The records; by default those of the package.
    report : callable
        Is called with a line for each finished run; ``print`` by default.
    recipe : AimRecipe, optional
        Sizes and steps; by default those of the records.

    Returns
    -------
    dict
        "settings"; "controls", the probes' scores on raw pixels and the share of the most frequent
        value; and "runs": seed, alpha, losses, and scores by the number of steps done, from 0.
    """
    torch.set_num_threads(1)
    file, recipe = file or FILE, recipe or AimRecipe()
    settings = {"recipe": asdict(recipe), "alphas": list(ALPHAS)}
    settings |= {"pictures": [N_TRAIN, N_PROBE, N_TEST], "versions": versions(torch)}
    records = read_json(file) if file.exists() else {"settings": settings, "runs": []}
    same = records["settings"] == settings
    require(same, f"{file!s} has runs with other settings", "remove the file")
    lessons = load_samples("scenes", N_TRAIN, "train", 11)
    fitted = load_samples("scenes", N_PROBE, "train", 12)
    judged = load_samples("scenes", N_TEST, "test", 11)
    values, expected = truth_of(fitted), truth_of(judged)
    truth = {factor: (values[factor], expected[factor]) for factor in FACTORS}
    if "controls" not in records:
        records["controls"] = _controls(fitted, judged, truth)
        write_json(file, records, indent=1)
    for seed, alpha in product(SEEDS, ALPHAS):
        if any((run["seed"], run["alpha"]) == (seed, alpha) for run in records["runs"]):
            continue
        start = process_time()
        scores: dict[str, dict[str, float]] = {}

        def look(done: int, model: TinyAim, scores: dict[str, dict[str, float]] = scores) -> None:
            """Probe the ``model`` after a third of its steps, by ``done``, into ``scores``."""
            if done % (recipe.steps // N_LOOKS) == 0:
                features = features_of(model, fitted), features_of(model, judged)
                scores[str(done)] = probe_scores(*features, truth)

        _, history = train_encoder(recipe, lessons, alpha, seed, look)
        run = {"seed": seed, "alpha": alpha, "scores": scores}
        for name in ("text", "pixels"):
            run[name] = [round(row[name], 3) for row in history[:: recipe.steps // 20]]
        run["seconds"] = round(process_time() - start, 1)
        records["runs"].append(run)
        write_json(file, records, indent=1)
        final = list(scores[str(recipe.steps)].values())
        report(f"seed {seed}, alpha {alpha}: {np.mean(final):.3f}")
    return records


def _controls(
    fitted: Sequence[Sample],
    judged: Sequence[Sample],
    truth: Mapping[str, tuple[Sequence[str], Sequence[str]]],
) -> dict[str, dict[str, float]]:
    raw = []
    for samples in (fitted, judged):
        raw.append(pixels([sample.image for sample in samples], 16).flatten(1).numpy())
    frequent = {}
    for factor, (values, expected) in truth.items():
        value = max(sorted(set(values)), key=list(values).count)
        frequent[factor] = float(np.mean(np.asarray(expected) == value))
    return {"raw pixels": probe_scores(*raw, truth), "most frequent value": frequent}


if __name__ == "__main__":
    run_all()
