"""What a training run that was killed goes on from: parameters, the optimiser's memory of them and the history, in one file."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

FILE = "checkpoint.safetensors"


def keep(folder: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, history: list[dict]) -> None:
    """Write the state of a run after its last step of the history; the file is swapped at once, so a kill never leaves halves."""
    state = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        state |= {f"{name}/{key}": value.clone() for key, value in optimiser.state[p].items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "new.safetensors", metadata={"history": json.dumps(history)})
    os.replace(folder / "new.safetensors", folder / FILE)


def resumed(folder: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.AdamW) -> list[dict]:
    """Put back what :func:`keep` wrote, and return the history; empty where nothing was written."""
    file = folder / FILE
    if not file.exists():
        return []
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        history = json.loads(opened.metadata()["history"])
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])
            optimiser.state[p] = {key: state[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return history
