"""The training runs whose weights are shipped. ``make pocket`` makes them again."""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from xlvlms_tutorial.pocket import build, language, world
from xlvlms_tutorial.pocket.assets import cache_dir, tower_state_dict
from xlvlms_tutorial.pocket.tower import Tower, TowerConfig
from xlvlms_tutorial.pocket.training import Mix, Packed, Recipe, encode_pictures, pack, scale_projector, train

CALIBRATION = 500  # training scenes from which each channel's mean and deviation are taken


def pixels(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Pictures as the tower's input: (value - 127) / 128, (b, 3, h, w)."""
    values = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float().sub(127).div(128)


def calibrated_tower() -> Tower:
    """The frozen tower with its channels standardised over the first training scenes; the statistics are shipped too."""
    tower = Tower(TowerConfig()).eval().requires_grad_(False)
    tower.net.load_state_dict(tower_state_dict())
    file = build.WEIGHTS / "tower.safetensors"
    if file.exists():
        tower.load_state_dict(build.tower_statistics(), strict=False)
    else:
        tower.calibrate(pixels([world.render(scene) for scene in world.scenes(CALIBRATION)]))
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": tower.mean.clone(), "std": tower.std.clone()}, file)
    return tower


def dialogue(scene: world.Scene, rng: np.random.Generator, mix: Mix) -> list[tuple[str, str]]:
    """Captions and questions about a scene, as many of each as the mix says, drawn anew each time."""
    asked = language.questions(scene, seed=int(rng.integers(2**31)))
    presence = [q for q in asked if q.type == "presence"]
    while len(presence) < mix.presence:
        presence += [q for q in language.questions(scene, seed=int(rng.integers(2**31))) if q.type == "presence"]
    chosen = _some(presence, mix.presence, rng) + _some([q for q in asked if q.type != "presence"], mix.others, rng)
    told = language.captions(scene)
    first = int(rng.integers(5))
    captions = [told[(first + k) % 5] for k in range(mix.captions)]
    return [(language.CAPTION_PROMPT, caption) for caption in captions] + [(q.text, q.answer) for q in chosen]


def _some(values: list, n: int, rng: np.random.Generator) -> list:
    return [values[k] for k in rng.permutation(len(values))[:n]]


def train_image_connector(recipe: Recipe, run: str = "image") -> dict:
    """Train the image connector, ship its checkpoints in fp16 and write the record beside them."""
    folder, records = cache_dir() / "training" / run, world.scenes(recipe.n_scenes, "train")
    tower = calibrated_tower()

    def pictures(size: int = 50) -> Iterator[Tensor]:
        for start in range(0, len(records), size):
            yield pixels([world.render(scene) for scene in records[start : start + size]])

    tokens = encode_pictures(tower.fuse(), pictures(), len(records), folder / f"tokens-{recipe.n_scenes}.npy")
    torch.manual_seed(recipe.seed)
    model, processor = build.build(dtype=torch.bfloat16, trained=False)
    projector = model.model.multi_modal_projector.float().requires_grad_(True)
    norm = model.get_input_embeddings().weight.float().norm(dim=-1).mean().item()
    scale_projector(projector, torch.from_numpy(np.array(tokens[:200])), norm)

    def batch(rng: np.random.Generator, mix: Mix) -> tuple[Tensor, Packed]:
        rows = np.sort(rng.choice(len(records), recipe.batch_size, replace=False))
        texts = [dialogue(records[row], rng, mix) for row in rows]
        packed = pack(texts, processor.tokenizer, model.config.image_token_id, tokens.shape[1])
        return torch.from_numpy(np.array(tokens[rows])).float(), packed

    def export(revision: str) -> None:
        state = {name: weight.detach().half().contiguous() for name, weight in projector.state_dict().items()}
        target = build.WEIGHTS / run
        target.mkdir(parents=True, exist_ok=True)
        save_file(state, target / f"{revision}.safetensors")

    result = train(model, dict(projector.named_parameters()), batch, recipe, folder, export)
    return _write_record(result, recipe, run)


def _write_record(result: dict, recipe: Recipe, run: str) -> dict:
    history = result["history"]
    seconds = [entry["seconds"] for entry in history]
    record = {
        "run": run,
        "recipe": asdict(recipe),
        "data": {"split": "train", "seed": 0, "n_scenes": recipe.n_scenes, "calibration_scenes": CALIBRATION},
        "loss": [entry["loss"] for entry in history[:: max(1, len(history) // 100)]] + [history[-1]["loss"]],
        "seconds_per_step": round(float(np.median(seconds)), 2),
        "seconds_total": round(float(np.sum(seconds))),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }
    (build.WEIGHTS / run / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record

