"""Read the connectors that were released with *Implicit Multimodal Alignment*.

The repository ``mshukor/IMA-DePALM`` of the Hugging Face hub holds 25 of them, each trained for one
data set between a frozen encoder and a frozen language model. The names of their weights and the
shape of the connector were read in the authors' public code (``DePALM/models/connector.py``).
"""

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xlvlms_tutorial.errors import FileError, LoadError
from xlvlms_tutorial.methods.connectors.queries import QueryConnector

REPOSITORY = "mshukor/IMA-DePALM"
TABLE = Path(__file__).with_name("released.csv")
CHECKPOINT = "checkpoint_best.pth"
_PREFIX = re.compile(r"(?:module\.)?connector\.(\d+)\.(.+)")
# their names, then ours
_PARTS = {"down": "down", "const": "queries", "trans": "blocks", "up": "up", "proj": "out"}
_HEADS = 8  # where the file has no configuration
# The best score of a run may be a number of numpy, which is nothing but bytes.
_NUMBERS = (np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType)
_AUDIO, _VIDEO = ("AudioCaps", "Clotho", "Clotho-AQA"), ("MSRVTT", "MSRVTT-QA", "MSVD-QA")
_CAPTIONS = ("AudioCaps", "COCO", "Clotho", "MSRVTT")
# pages that a checkpoint's data fit; those of Part I and IV fit all
_EVERY = ("alignment", "vocabulary", "alignment-score", "subnetworks", "skipping", "pruning")
_IMAGE_CAPTIONS = ("concepts", "concept-dictionaries", "grounding", "explain")
_IMAGE_QUESTIONS = ("steering-answers", "steering-limits")


@dataclass(frozen=True)
class ReleasedConnector:
    """A connector from a released file, and what the file says of its training.

    :func:`load_released` gives it.

    Parameters
    ----------
    connector : QueryConnector
        The connector, float32, frozen.
    config : dict
        The configuration that the file holds, as the authors' code wrote it.
    epoch : int or None
        The epoch after which it was saved.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.connectors import QueryConnector, ReleasedConnector
    >>> released = ReleasedConnector(QueryConnector(8, 8), {"vis_tokens": "all"}, 12)
    >>> released.config["vis_tokens"]
    'all'
    """

    connector: QueryConnector
    config: dict[str, object]
    epoch: int | None


def released_checkpoints() -> pd.DataFrame:
    """List the released connectors: between which models, for which data, and for which pages.

    The list is the table of the authors' README.

    Returns
    -------
    pandas.DataFrame
        Columns language_model, encoder, dataset, modality ("image", "video" or "audio"), task
        ("captions" or "questions"), file (in the repository ``mshukor/IMA-DePALM``), and pages: the
        chapters whose data the checkpoint fits.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.connectors import released_checkpoints
    >>> table = released_checkpoints()
    >>> table.groupby("modality").size().to_dict()
    {'audio': 5, 'image': 12, 'video': 8}
    """
    table = pd.read_csv(TABLE)
    rows = []
    for dataset in table["dataset"]:
        modality = "image"
        if dataset in _AUDIO:
            modality = "audio"
        elif dataset in _VIDEO:
            modality = "video"
        task = "captions" if dataset in _CAPTIONS else "questions"
        pages = _EVERY
        if modality == "image":
            pages += _IMAGE_CAPTIONS if task == "captions" else _IMAGE_QUESTIONS
        rows.append({"modality": modality, "task": task, "pages": ", ".join(pages)})
    table["file"] = table.pop("folder") + f"/{CHECKPOINT}"
    return table.join(pd.DataFrame(rows))


def load_released(path: str | os.PathLike[str]) -> ReleasedConnector:
    """Read a connector of ``mshukor/IMA-DePALM`` from its file.

    Use it to run the models of *Implicit Multimodal Alignment* (arXiv 2405.16700): give the
    connector all tokens of the encoder's last layer, and put what comes out in front of the text's
    embeddings, before the beginning-of-text token. Nothing but tensors and plain values is read.

    Parameters
    ----------
    path : str or path
        A file such as ``checkpoint_best.pth``, downloaded from the repository.

    Returns
    -------
    ReleasedConnector
        The connector with the configuration of its training.

    Raises
    ------
    FileError
        If the file is missing or no file of weights, or would run code when it is read.
    LoadError
        If it holds no connector, or one of another kind: conditioned on the text, modulating
        layers, or feeding several layers.

    Examples
    --------
    A file in that form, made on the spot:

    >>> import tempfile, torch
    >>> from xlvlms_tutorial.methods.connectors import QueryConnector, load_released
    >>> theirs = {"queries": "const", "blocks": "trans", "out": "proj"}
    >>> weights = {}
    >>> for name, weight in QueryConnector(32, 48, 4, 16, n_blocks=1).state_dict().items():
    ...     part, dot, rest = name.partition(".")
    ...     weights[f"connector.0.{theirs.get(part, part)}{dot}{rest}"] = weight
    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save({"model": weights, "epoch": 3}, file.name)
    ...     released = load_released(file.name)
    >>> released.epoch, released.connector(torch.zeros(2, 9, 32)).shape
    (3, torch.Size([2, 4, 48]))
    """
    content = _read(Path(path))
    weights = content.get("model", content)
    config = content.get("config") or {}
    renamed = _own_weights(weights, str(path))
    settings = config.get("connector_config") or {}
    hidden, width = renamed["down.weight"].shape
    connector = QueryConnector(
        width,
        len(renamed["out.weight"]),
        len(renamed["queries"]),
        hidden,
        settings.get("num_heads", _HEADS),
        1 + max(int(name.split(".")[2]) for name in renamed if name.startswith("blocks.")),
    )
    try:
        connector.load_state_dict(renamed)
    except RuntimeError as error:
        raise LoadError(
            f"the connector of {path} has weights of other shapes than its first block: {error}",
            "use a file of the repository as it was released",
        ) from error
    frozen = connector.eval().requires_grad_(False)
    return ReleasedConnector(frozen, dict(config), content.get("epoch"))


def _read(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise FileError(f"there is no file {path}", f"download it from {REPOSITORY}")
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
    try:
        with torch.serialization.safe_globals([*_NUMBERS, scalar]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(
            f"{path} cannot be read as tensors and plain values ({reason})",
            f"download it again from {REPOSITORY}; a file that needs more is not opened",
        ) from error
    if not isinstance(content, Mapping):
        raise LoadError(f"{path} holds no weights by name", f"use a file of {REPOSITORY}")
    return content


def _own_weights(weights: object, name: str) -> dict[str, Tensor]:
    """The weights of the connector under our names, float32."""
    renamed, numbers = {}, set()
    items = weights.items() if isinstance(weights, Mapping) else ()
    for key, weight in items:
        match = _PREFIX.fullmatch(str(key))
        if match is None:
            continue
        numbers.add(match[1])
        part, dot, rest = match[2].partition(".")
        if part not in _PARTS:
            raise LoadError(
                f"the connector of {name} has the weight {match[2]!r}, which one with learned "
                "queries has not",
                "use one of released_checkpoints()",
            )
        renamed[f"{_PARTS[part]}{dot}{rest}"] = weight.float()
    if len(numbers) > 1:
        problem = f"{name} holds {len(numbers)} connectors, for several layers"
        raise LoadError(problem, "use one of released_checkpoints()")
    for needed in ("down.weight", "queries", "up.weight", "out.weight", "blocks.layers.0"):
        if not any(key.startswith(needed) for key in renamed):
            problem = f"{name} holds no connector with learned queries: {needed} is missing"
            raise LoadError(problem, "use one of released_checkpoints()")
    return renamed
