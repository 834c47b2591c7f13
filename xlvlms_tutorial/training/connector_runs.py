"""Make the training runs whose weights are shipped; ``make pocket`` makes them again."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from types import ModuleType

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from xlvlms_tutorial.io import save_tensors, write_json
from xlvlms_tutorial.pocket import build, clips, language, sounds, world
from xlvlms_tutorial.pocket.cache import cache_dir
from xlvlms_tutorial.pocket.encoders import CALIBRATION, ENCODERS, statistics_file, tower_state
from xlvlms_tutorial.pocket.languages import LANGUAGES
from xlvlms_tutorial.pocket.processor import seen
from xlvlms_tutorial.pocket.tower import Tower
from xlvlms_tutorial.pocket.variants import Variant
from xlvlms_tutorial.samples import PROMPTS, Question
from xlvlms_tutorial.training.compressed import COMPRESSED
from xlvlms_tutorial.training.connector import (
    Mix,
    Packed,
    Recipe,
    encode_pictures,
    pack,
    scale_projector,
    train,
)


@dataclass(frozen=True)
class Material:
    """What a connector is trained on.

    Records of one modality, the pictures that the tower sees of each, and what is said and asked.
    """

    draw: Callable[[int], list]
    look: Callable[[object], list[Image.Image]]
    tell: Callable[[object], list[str]]
    ask: Callable[[object, int], list[Question]]


MATERIAL = {
    "image": Material(
        world.scenes, lambda scene: [world.render(scene)], language.captions, language.questions
    ),
    "video": Material(
        clips.clips,
        lambda clip: seen(clips.render_clip(clip)),
        clips.clip_captions,
        clips.clip_questions,
    ),
    "audio": Material(
        sounds.sounds,
        lambda sound: [sounds.log_mel(sounds.waveform(sound))],
        sounds.sound_captions,
        sounds.sound_questions,
    ),
}


@dataclass(frozen=True)
class Run:
    """A training run: its recipe, what it reads, and what its connector starts from.

    It reads through an encoder; the connector is that of a run and step.
    """

    recipe: Recipe
    variant: Variant
    start: tuple[str, str | None] | None = None  # without a step, the last one
    compact: bool = False  # whether only what changed since the start is kept, in eight bits
    factors: Mapping[str, float] = field(default_factory=dict)  # of the rate, by parameter


def _short_recipe(steps: int, mixes: tuple[Mix, ...], **changes: object) -> Recipe:
    return Recipe(**({"steps": steps, "restart": steps, "mixes": mixes, "save_at": ()} | changes))


_ENCODER = _short_recipe(160, (Mix(160, 1, 0, 1),), n_scenes=3000, warmup=20)
# The training runs of connectors by name.
RUNS = {
    "image": Run(Recipe(), Variant("image")),
    "video": Run(
        _short_recipe(
            300,
            (Mix(300, 1, 1, 2),),
            n_scenes=2000,
            batch_size=8,
            learning_rate=1e-3,
            warmup=20,
        ),
        Variant("video", reads=("video",)),
        start=("image", None),
    ),
    "audio": Run(
        _short_recipe(
            540,
            (Mix(200, 1, 1, 2), Mix(420, 3, 1, 1), Mix(540, 1, 0, 3)),
            restart=200,
            again=(420,),
            n_scenes=3000,
            learning_rate=2e-3,
            warmup=20,
            save_at=(420,),
        ),
        Variant("audio", reads=("audio",)),
        start=("image", None),
    ),
    "joint": Run(
        _short_recipe(
            180,
            (Mix(180, 1, 1, 2),),
            n_scenes=2000,
            batch_size=10,
            learning_rate=1e-3,
            warmup=20,
        ),
        Variant("joint", reads=("image", "video", "audio")),
        start=("audio", "step-0420"),
    ),
}
# The image connector of the second language model, whose embeddings are 25 times as long: with Adam
# the last layer would move too slowly at the rate of the first.
RUNS["gemma"] = Run(
    Recipe(save_at=()),
    Variant("gemma", language="gemma"),
    factors={"linear_2.weight": 4.0, "linear_2.bias": 4.0},
)
# Other seeds of the image connector, up to a step whose weights the first seed ships too: for
# intervals over connectors. All of it would take three times as long.
for _seed in (1, 2):
    RUNS[f"image-{_seed}"] = Run(
        Recipe(steps=450, seed=_seed, save_at=()), Variant(f"image-{_seed}")
    )
for _encoder in ENCODERS:
    RUNS[f"encoder-{_encoder}"] = Run(_ENCODER, Variant(f"encoder-{_encoder}", _encoder))
# through a language model with half of the blocks or most of the weights left out: the first seed
# is shipped, of others the record
for _name in COMPRESSED:
    _seed = int(_name.partition("-")[2] or 0)
    RUNS[_name] = Run(
        _short_recipe(300, (Mix(300, 2, 1, 1),), n_scenes=3000, warmup=20, seed=_seed),
        Variant(_name),
        start=("image", None),
        compact=True,
    )
# Experts for merging: of captions and of presence. All have one start, but for one of captions; of
# presence there are two orders of the data. They stop before their rate is 0.
EXPERT_STEPS = 110
EXPERT_SKILLS = {
    "captions": Mix(EXPERT_STEPS, 3, 0, 0),
    "presence": Mix(EXPERT_STEPS, 0, 5, 0),
}
EXPERT_START = ("image", "step-0450")
OTHER_START = ("image-1", "step-0450")
EXPERTS = {}
for _skill, _number, _seed, _start in (
    ("captions", "0", 0, EXPERT_START),
    ("presence", "0", 0, EXPERT_START),
    ("presence", "1", 1, EXPERT_START),
    ("captions", "other", 1, OTHER_START),
):
    _name = f"expert-{_skill}-{_number}"
    _recipe = Recipe(
        steps=EXPERT_STEPS,
        restart=150,
        batch_size=8,
        learning_rate=1e-3,
        warmup=10,
        seed=_seed,
        mixes=(EXPERT_SKILLS[_skill],),
        save_at=(50,),
    )
    EXPERTS[_name] = Run(_recipe, Variant(_name), _start, compact=True)
RUNS |= EXPERTS


def pixels(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Turn pictures into the tower's input: (value - 127) / 128, (b, 3, h, w)."""
    values = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float().sub(127).div(128)


def calibrated_tower(encoder: str = "lite0") -> Tower:
    """Load a frozen tower with its channels standardised over the first training scenes.

    The statistics are shipped too.
    """
    settings = ENCODERS[encoder]
    file = statistics_file(encoder)
    tower = Tower(settings.config).eval().requires_grad_(False)
    if file.exists():
        tower.load_state_dict(tower_state(encoder))
    else:
        tower.net.load_state_dict(settings.weights())
        tower.calibrate(pixels([world.render(scene) for scene in world.scenes(CALIBRATION)]))
        save_tensors(file, {"mean": tower.mean.clone(), "std": tower.std.clone()})
    return tower


def dialogue(
    record: object, rng: np.random.Generator, mix: Mix, kind: str = "image"
) -> list[tuple[str, str]]:
    """Draw captions and questions about a scene, clip or sound, anew each time.

    Parameters
    ----------
    record : Scene, Clip or Sound
        What the texts are about.
    rng : numpy.random.Generator
        What draws them.
    mix : Mix
        How many of each kind.
    kind : str, default "image"
        "image", "video" or "audio".

    Returns
    -------
    list of (str, str)
        Prompts and answers.
    """
    material = MATERIAL[kind]
    questions = material.ask(record, int(rng.integers(2**31)))
    presence = [q for q in questions if q.type == "presence"]
    while len(presence) < mix.presence:
        again = material.ask(record, int(rng.integers(2**31)))
        presence += [q for q in again if q.type == "presence"]
    others = [q for q in questions if q.type != "presence"]
    selected = _random_subset(presence, mix.presence, rng)
    selected += _random_subset(others, mix.others, rng)
    references = material.tell(record)
    first = int(rng.integers(5))
    captions = [references[(first + k) % 5] for k in range(mix.captions)]
    texts = [(PROMPTS[kind], caption) for caption in captions]
    texts += [(question.text, question.answer) for question in selected]
    return texts


def _random_subset(values: list, n: int, rng: np.random.Generator) -> list:
    return [values[k] for k in rng.permutation(len(values))[:n]]


def train_connector(
    name: str, through: Callable[[nn.Module, object], AbstractContextManager] | None = None
) -> dict:
    """Train a connector of the table ``RUNS``, ship its weights and write the record beside them.

    Use it to make shipped weights again, which takes minutes to an hour a run on two CPU cores.

    Parameters
    ----------
    name : str
        The run, a key of ``RUNS``.
    through : callable, optional
        It changes the language model while the connector is trained: given the model and its
        processor, it returns a context manager. By default nothing is changed.

    Returns
    -------
    dict
        The record: recipe, data, losses, seconds and versions.

    Examples
    --------
    >>> from xlvlms_tutorial.training.connector_runs import RUNS, train_connector
    >>> RUNS["video"].recipe.steps, RUNS["video"].variant.reads
    (300, ('video',))
    >>> record = train_connector("video")  # doctest: +SKIP
    """
    run = RUNS[name]
    recipe = run.recipe
    kinds = run.variant.reads
    folder = cache_dir() / "training" / name
    encoder = run.variant.encoder
    language_model = LANGUAGES[run.variant.language]
    tower = calibrated_tower(encoder).fuse()
    records = {kind: MATERIAL[kind].draw(recipe.n_scenes) for kind in kinds}
    tokens = {}
    for kind in kinds:
        tokens[kind] = visual_tokens(tower, encoder, kind, records[kind])
    torch.manual_seed(recipe.seed)
    model, processor = build.build(dtype=torch.bfloat16, variant=run.variant)
    projector = model.model.multi_modal_projector.float().requires_grad_(True)
    if run.start is not None:
        projector.load_state_dict(build.connector_state(*run.start))
    else:
        norm = embedding_norm(model)
        some_tokens = np.array(tokens[kinds[0]][:200])
        scale_projector(projector, torch.from_numpy(some_tokens), norm)

    def batch(rng: np.random.Generator, mix: Mix) -> tuple[Tensor, Packed]:
        kind = kinds[0]
        if len(kinds) > 1:
            kind = kinds[rng.integers(len(kinds))]
        rows = rng.choice(recipe.n_scenes, recipe.batch_size, replace=False)
        rows.sort()
        texts = [dialogue(records[kind][row], rng, mix, kind) for row in rows]
        visual = torch.from_numpy(np.array(tokens[kind][rows])).float()
        image_id = model.config.image_token_id
        packed = pack(texts, processor.tokenizer, image_id, visual.shape[1], language_model)
        return visual, packed

    def export(step: str) -> None:
        _export(projector, name, step)

    if run.compact:
        # of short rows a quarter faster on CPUs, forwards and backwards
        model.set_attn_implementation("eager")
    parameters = dict(projector.named_parameters())
    with nullcontext() if through is None else through(model, processor):
        result = train(model, parameters, batch, recipe, folder, export, run.factors)
    return _write_record(result, name)


def embedding_norm(model: nn.Module, size: int = 8192) -> float:
    """Return the mean norm of what the embedding module gives, over all tokens.

    Not of its weights: some models scale what they read from them.

    Parameters
    ----------
    model : nn.Module
        The model.
    size : int, default 8192
        Tokens at once; a large vocabulary takes much memory.

    Returns
    -------
    float
        The mean norm.
    """
    embed = model.get_input_embeddings()
    norms = []
    with torch.no_grad():
        for ids in torch.arange(embed.num_embeddings).split(size):
            norms.append(embed(ids).float().norm(dim=-1))
    return torch.cat(norms).mean().item()


def visual_tokens(
    tower: Tower, encoder: str, kind: str, records: list, size: int = 50
) -> np.ndarray:
    """Compute the tower's tokens of all records, or read them from the cache.

    Parameters
    ----------
    tower : Tower
        The vision tower.
    encoder : str
        The name of its encoder, for the name of the file.
    kind : str
        "image", "video" or "audio".
    records : list
        Scenes, clips or sounds.
    size : int, default 50
        Records a batch.

    Returns
    -------
    numpy.ndarray of shape (records, tokens, width)
        The tokens in float16.
    """
    look = MATERIAL[kind].look
    n = len(records)

    def pictures() -> Iterator[Tensor]:
        for start in range(0, n, size):
            values = torch.stack([pixels(look(record)) for record in records[start : start + size]])
            yield values[:, 0] if values.shape[1] == 1 else values

    file = cache_dir() / "training" / "tokens" / f"{encoder}-{kind}-{n}.npy"
    return encode_pictures(tower, pictures(), n, file)


def _export(projector: nn.Module, run: str, revision: str) -> None:
    file = build.WEIGHTS / run / f"{revision}.safetensors"
    if RUNS[run].compact:
        build.save_change(projector.state_dict(), RUNS[run].start, file)
        return
    weights = {name: weight.detach().half() for name, weight in projector.state_dict().items()}
    save_tensors(file, weights)


def thinned(losses: Sequence[float]) -> list[float]:
    """Return one to two hundred of the losses of a long run, evenly spaced, and the last."""
    return [*losses[:: max(1, len(losses) // 100)], losses[-1]]


def _write_record(result: dict, name: str) -> dict:
    """Write the record of a training beside the weights."""
    history = result["history"]
    run = RUNS[name]
    recipe = run.recipe
    losses = [entry["loss"] for entry in history]
    seconds = [entry["seconds"] for entry in history]
    data = {"reads": run.variant.reads, "split": "train", "seed": 0, "n_scenes": recipe.n_scenes}
    data["calibration_scenes"] = CALIBRATION
    record = {"run": name, "recipe": asdict(recipe), "start": run.start}
    record["encoder"] = run.variant.encoder
    record["data"] = data
    record["loss"] = thinned(losses)
    record["seconds_per_step"] = round(float(np.median(seconds)), 2)
    record["seconds_total"] = round(float(np.sum(seconds)))
    record["versions"] = versions(torch, transformers)
    write_json(build.WEIGHTS / name / "training.json", record, indent=1)
    return record


def versions(*modules: ModuleType) -> dict[str, str]:
    """Return the versions of what weights were trained with, and of Python."""
    numbers = {module.__name__: module.__version__ for module in modules}
    numbers["python"] = platform.python_version()
    return numbers
