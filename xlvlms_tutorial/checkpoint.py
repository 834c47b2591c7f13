"""What a training run that was killed goes on from.

Parameters, the optimiser's memory of them and the history, in one file.
"""

import json
from pathlib import Path

import torch
from torch import nn

from xlvlms_tutorial.io import load_tensors, save_tensors

FILE = "checkpoint.safetensors"


def keep(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    history: list[dict],
) -> None:
    """Write the state of a run after its last step of the history.

    The file is swapped at once, so a kill never leaves halves.
    """
    state = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        state |= {f"{name}/{key}": value.clone() for key, value in optimiser.state[p].items()}
    # the draft of a run that was killed while it wrote: large, and of no use
    for left in folder.glob(f".{FILE}.*"):
        left.unlink()
    save_tensors(folder / FILE, state, {"history": json.dumps(history)})


def resumed(
    folder: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.AdamW
) -> list[dict]:
    """Put back what :func:`keep` wrote, and return the history; empty where nothing was written."""
    file = folder / FILE
    if not file.exists():
        return []
    state, metadata = load_tensors(file)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])
            optimiser.state[p] = {
                key: state[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return json.loads(metadata["history"])
