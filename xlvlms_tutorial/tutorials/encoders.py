"""Compare what vision encoders are trained for, and read what training on pixels adds.

``python -m xlvlms_tutorial.training.aim`` trains and probes again; what it wrote is shipped, and
:func:`load_records` reads it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.aimv2 import Aimv2VisionConfig, Aimv2VisionModel
from transformers.models.clip import CLIPVisionConfig, CLIPVisionModel
from transformers.models.dinov2 import Dinov2Config
from transformers.models.siglip import SiglipVisionConfig, SiglipVisionModel

from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.metrics.intervals import Estimate, mean_interval
from xlvlms_tutorial.tutorials.experiments import Experiment
from xlvlms_tutorial.validation import require, require_one_of
from xlvlms_tutorial.view import plots

FILE = Path(__file__).with_name("encoders.json")
DATASET = "scenes"
WORDS, BOTH = 0.0, 0.4  # the weights of pixels that are compared
# what all five captions of a picture say, and what two of the five say
ALWAYS = ("subject", "action", "item", "colour", "count", "place")
SOMETIMES = ("side", "time")
LINES = {WORDS: "words alone", BOTH: "words and pixels"}


@dataclass(frozen=True)
class Encoder:
    """A published encoder.

    Parameters
    ----------
    model : type
        Its class in transformers.
    config : PreTrainedConfig
        Its configuration.
    objective : str
        What it was trained for.
    attention : str
        Which patches a patch sees while it is trained.
    hub : str
        Its name on the hub.
    licence : str
        The licence of its weights.
    """

    model: type
    config: PreTrainedConfig
    objective: str
    attention: str
    hub: str
    licence: str


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
ENCODERS = {
    "CLIP": Encoder(
        CLIPVisionModel,
        CLIPVisionConfig(
            **_LARGE, intermediate_size=4096, patch_size=14, image_size=224, projection_dim=768
        ),
        "tell which text belongs to the picture",
        "all",
        "openai/clip-vit-large-patch14",
        "MIT",
    ),
    "SigLIP": Encoder(
        SiglipVisionModel,
        SiglipVisionConfig(**_LARGE, intermediate_size=4096, patch_size=16, image_size=256),
        "tell for each text whether it belongs",
        "all",
        "google/siglip-large-patch16-256",
        "Apache 2.0",
    ),
    "DINOv2": Encoder(
        AutoModel,
        Dinov2Config(**_LARGE, patch_size=14, image_size=518),
        "agree with a slow copy of itself about crops and hidden patches",
        "all",
        "facebook/dinov2-large",
        "Apache 2.0",
    ),
    "AIMv2": Encoder(
        Aimv2VisionModel,
        Aimv2VisionConfig(),
        "predict the next patch, and then the words",
        "a prefix, then those before",
        "apple/aimv2-large-patch14-224",
        "Apple's own",
    ),
}


def published(image_size: int = 224) -> pd.DataFrame:
    """Arrange published encoders: what they were trained for, and what they cost.

    Nothing is downloaded: the classes of transformers are built without weights.

    Parameters
    ----------
    image_size : int, default 224
        Pixels a side of the picture whose tokens are counted.

    Returns
    -------
    pandas.DataFrame
        A row an encoder of ``ENCODERS``; columns objective, attention, parameters (in millions),
        tokens (patches of the picture), hub and licence.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import encoders
    >>> int(encoders.published().loc["AIMv2", "tokens"])
    256
    """
    rows = {}
    for name, encoder in ENCODERS.items():
        with no_init_weights(), torch.device("meta"):
            if encoder.model is AutoModel:
                model = AutoModel.from_config(encoder.config)
            else:
                model = encoder.model(encoder.config)
        count = sum(weight.numel() for weight in model.parameters())
        rows[name] = {
            "objective": encoder.objective,
            "attention": encoder.attention,
            "parameters": round(count / 1e6),
            "tokens": (image_size // encoder.config.patch_size) ** 2,
            "hub": encoder.hub,
            "licence": encoder.licence,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("encoder")


def load_records(file: Path | None = None) -> dict[str, object]:
    """Read the records of small encoders trained with and without pixels.

    Parameters
    ----------
    file : Path, optional
        The records; by default those of the package.

    Returns
    -------
    dict
        ``settings``, ``controls`` and ``runs``, one a seed and weight of the pixels.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.encoders import load_records
    >>> len(load_records()["runs"])
    20
    """
    return read_json(file or FILE)


def curve(
    records: Mapping[str, object], alpha: float, factors: Sequence[str]
) -> Float[np.ndarray, "seeds looks"]:
    """Return what probes read off an encoder while it is trained.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.
    alpha : float
        The weight of pixels: 0 or 0.4.
    factors : sequence of str
        Over which factors the mean is taken.

    Returns
    -------
    array (seeds, looks)
        The mean share of right answers, by seed and by the steps of :func:`looks`.

    Raises
    ------
    InputError
        If no run has this weight, or a factor is unknown.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.encoders import curve, load_records
    >>> curve(load_records(), 0.4, ["side", "time"]).shape
    (10, 4)
    """
    rows = []
    for run in sorted(records["runs"], key=lambda run: run["seed"]):
        if run["alpha"] == alpha:
            for factor in factors:
                require_one_of(factor, run["scores"]["0"], "factor")
            rows.append([_mean(scores, factors) for scores in run["scores"].values()])
    require(rows, f"no run with alpha={alpha}", "0.0 or 0.4")
    return np.array(rows)


def looks(records: Mapping[str, object]) -> list[int]:
    """Return after how many steps the encoders were probed.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.

    Returns
    -------
    list of int
        The first is 0, the last the whole training.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.encoders import load_records, looks
    >>> looks(load_records())
    [0, 300, 600, 900]
    """
    return [int(done) for done in records["runs"][0]["scores"]]


def gain(records: Mapping[str, object], factors: Sequence[str], look: int = -1) -> Estimate:
    """Return by how much pixels improve an encoder.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.
    factors : sequence of str
        Over which factors the mean is taken.
    look : int, default -1
        The number of a look; the last by default.

    Returns
    -------
    Estimate
        The mean difference of what probes read, paired by seed, with Student's interval over seeds.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.encoders import gain, load_records
    >>> gain(load_records(), ["time"], look=0).value
    0.0
    """
    differences = curve(records, BOTH, factors)[:, look] - curve(records, WORDS, factors)[:, look]
    return mean_interval(differences)


def results(records: Mapping[str, object]) -> pd.DataFrame:
    """Arrange what probes read after the training, beside what is simpler.

    Parameters
    ----------
    records : mapping
        From :func:`load_records`.

    Returns
    -------
    pandas.DataFrame
        A row a factor; columns "words alone", "words and pixels", their "difference" with "low" and
        "high", and the baselines "untrained", "raw pixels" and "most frequent value".

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.encoders import load_records, results
    >>> bool(results(load_records()).loc["place", "words alone"] > 0.9)
    True
    """
    rows = {}
    for factor in (*ALWAYS, *SOMETIMES):
        difference = gain(records, [factor])
        row = {name: curve(records, alpha, [factor])[:, -1].mean() for alpha, name in LINES.items()}
        row |= {"difference": difference.value, "low": difference.low, "high": difference.high}
        row["untrained"] = curve(records, WORDS, [factor])[:, 0].mean()
        rows[factor] = row | {name: line[factor] for name, line in records["controls"].items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("factor")


def record(experiment: Experiment, records: Mapping[str, object]) -> dict[str, str]:
    """Record AIM-1: pixels beside words, against words alone.

    Nothing is recorded where the experiment is about other pictures.

    Parameters
    ----------
    experiment : Experiment
        Where it is recorded.
    records : mapping
        From :func:`load_records`.

    Returns
    -------
    dict of str to str
        The verdict by group of factors.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment
    >>> from xlvlms_tutorial.tutorials.encoders import load_records, record
    >>> record(Experiment("encoders", "pocket-llava", "coco"), load_records())
    {}
    """
    if experiment.run["dataset"] != DATASET:
        return {}
    verdicts = {}
    for variant, factors in (("in all captions", ALWAYS), ("in two captions of five", SOMETIMES)):
        estimate = gain(records, factors)
        verdicts[variant] = experiment.record(
            "AIM-1", estimate, LINES[WORDS], variant, interval_over="seeds"
        )
    return verdicts


def draw(axes: Iterable[Axes], records: Mapping[str, object]) -> None:
    """Draw what probes read against steps of training, a panel a group of factors.

    Parameters
    ----------
    axes : iterable of Axes
        Two.
    records : mapping
        From :func:`load_records`.
    """
    axes, steps = list(axes), looks(records)
    groups = {"in all captions": ALWAYS, "in two captions of five": SOMETIMES}
    for ax, (title, factors) in zip(axes, groups.items(), strict=True):
        for alpha, colour, marker in ((WORDS, "#9a5d10", "s"), (BOTH, "#17809a", "o")):
            values = curve(records, alpha, factors)
            ends = [mean_interval(column) for column in values.T]
            low, high = [end.low for end in ends], [end.high for end in ends]
            ax.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
            ax.plot(steps, values.mean(axis=0), marker=marker, color=colour, label=LINES[alpha])
        for name, style in (("raw pixels", "--"), ("most frequent value", ":")):
            level = _mean(records["controls"][name], factors)
            ax.axhline(level, color=plots.INK, ls=style, lw=1, label=name)
        ax.set(xlabel="steps of training", title=title, ylim=(0.2, 1.0))
    axes[0].set_ylabel("factors read (share right)")


def continued(
    picture: Image.Image, predicted: Float[Tensor, "n p"], prefix: int, patch: int
) -> Image.Image:
    """Show what a model predicts behind a prefix: each patch from the true ones before it.

    The model predicts normalised pixels. Mean and deviation of each true patch bring them back.

    Parameters
    ----------
    picture : PIL.Image.Image
        The true picture, a square of the size that the model sees.
    predicted : Tensor (n, p)
        What is predicted at each patch of the next one.
    prefix : int
        Patches that are shown as they are.
    patch : int
        Pixels a side of a patch.

    Returns
    -------
    PIL.Image.Image
        The picture, true in the prefix and predicted behind it.

    Raises
    ------
    InputError
        If the prefix is no number of patches of this picture.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.tutorials.encoders import continued
    >>> small = samples[0].image.resize((16, 16))
    >>> continued(small, torch.zeros(4, 192), 2, 8).size
    (16, 16)
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    side = picture.width // patch
    require(1 <= prefix <= side**2, f"a prefix of {prefix}", f"1 to {side**2} patches")
    for number in range(prefix, side**2):
        top, left = patch * (number // side), patch * (number % side)
        window = pixels[top : top + patch, left : left + patch]
        normalised = predicted[number - 1].reshape(patch, patch, 3).float().numpy()
        window[:] = normalised * (window.std() + 1e-2) + window.mean()
    return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def beside(pictures: Sequence[Image.Image], size: int = 160) -> Image.Image:
    """Put square pictures side by side.

    Parameters
    ----------
    pictures : sequence of PIL.Image.Image
        The pictures.
    size : int, default 160
        Pixels a side of each.

    Returns
    -------
    PIL.Image.Image
        A row of pictures with gaps.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials.encoders import beside
    >>> beside([samples[0].image] * 2).size
    (328, 160)
    """
    whole = Image.new("RGB", ((size + 8) * len(pictures) - 8, size), "white")
    for number, picture in enumerate(pictures):
        kind = Image.Resampling.NEAREST if picture.width <= size else Image.Resampling.BICUBIC
        whole.paste(picture.convert("RGB").resize((size, size), kind), (number * (size + 8), 0))
    return whole


def check_records(experiment: Experiment, records: Mapping[str, object]) -> None:
    """Check what the page says of ten seeds.

    Parameters
    ----------
    experiment : Experiment
        The page's experiment.
    records : mapping
        From :func:`load_records`.

    Examples
    --------
    >>> from xlvlms_tutorial.tutorials import Experiment, encoders
    >>> experiment = Experiment("encoders", "pocket-llava", "scenes")
    >>> encoders.check_records(experiment, encoders.load_records())
    """
    check = experiment.check
    early, late = gain(records, ALWAYS, look=1), gain(records, ALWAYS)
    check("pixels help early, with what all captions say", early.low > 0)
    check("pixels still help at the end, with what all captions say", late.low > 0)
    shrinks = _change(records, ALWAYS).high < 0
    check("the gain in what all captions say shrinks from the first look to the last", shrinks)
    grows = _change(records, ["side"]).low > 0
    check("the gain in the side grows from the first look to the last", grows)
    counting, rest = gain(records, ["count"]), [name for name in ALWAYS if name != "count"]
    check("most of the last gain is in the count", counting.value / len(ALWAYS) > late.value / 2)
    check("pixels still help at the end without the count", gain(records, rest).low > 0)
    unsure = [gain(records, [factor]) for factor in ("subject", "colour")]
    check("subject and colour are undecided", all(one.low < 0 < one.high for one in unsure))
    final = {alpha: curve(records, alpha, ALWAYS)[:, -1] for alpha in LINES}
    raw = _mean(records["controls"]["raw pixels"], ALWAYS)
    check(
        "raw pixels are read better than words alone, and no worse than both",
        raw > mean_interval(final[WORDS]).high and raw >= mean_interval(final[BOTH]).low,
    )
    untrained = curve(records, WORDS, ALWAYS)[:, 0]
    check(
        "both encoders read better after the training than before",
        all(mean_interval(values - untrained).low > 0 for values in final.values()),
    )
    easy = results(records).loc[["place", "time"], ["untrained", "raw pixels"]]
    check("place and time are read by anything", easy.to_numpy().min() > 0.95)
    check("pixels help with the side", gain(records, ["side"]).low > 0)


def _change(records: Mapping[str, object], factors: Sequence[str]) -> Estimate:
    """By how much the gain of pixels changes from the first look to the last."""
    differences = curve(records, BOTH, factors) - curve(records, WORDS, factors)
    return mean_interval(differences[:, -1] - differences[:, 1])


def _mean(scores: Mapping[str, float], factors: Sequence[str]) -> float:
    return float(np.mean([scores[factor] for factor in factors]))
