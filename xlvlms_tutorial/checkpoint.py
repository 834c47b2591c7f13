"""Checkpoints from which a training run that was killed goes on.

Parameters, the optimiser's state and the history, in one file.
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
    """Write the state of a training run after its last step of the history.

    The file is swapped at once, so a kill never leaves halves. :func:`resumed` reads it.

    Parameters
    ----------
    folder : Path
        The folder of the run.
    parameters : dict of str to Parameter
        The parameters that are trained, by name.
    optimiser : torch.optim.Optimizer
        Their optimiser, whose state is written too.
    history : list of dict
        One entry a step, of what JSON knows.

    Raises
    ------
    FileError
        If the file cannot be written.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> folder, parameters = Path(mkdtemp()), {"w": nn.Parameter(torch.ones(2))}
    >>> optimiser = torch.optim.AdamW(parameters.values())
    >>> parameters["w"].sum().backward()
    >>> optimiser.step()
    >>> keep(folder, parameters, optimiser, [{"loss": 2.0}])
    >>> resumed(folder, parameters, optimiser)
    [{'loss': 2.0}]
    """
    state = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimiser.state[p].items():
            state[f"{name}/{key}"] = value.clone()
    # the draft of a run that was killed while it wrote: large, and of no use
    for draft in folder.glob(f".{FILE}.*"):
        draft.unlink()
    save_tensors(folder / FILE, state, {"history": json.dumps(history)})


def resumed(
    folder: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.AdamW
) -> list[dict]:
    """Restore what :func:`keep` wrote, and return the history.

    Parameters
    ----------
    folder : Path
        The folder of the run.
    parameters : dict of str to Parameter
        The parameters, which are overwritten.
    optimiser : torch.optim.AdamW
        Their optimiser, whose state is overwritten.

    Returns
    -------
    list of dict
        The history; empty where nothing was written, and nothing is changed then.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> parameters = {"w": nn.Parameter(torch.ones(2))}
    >>> resumed(Path(mkdtemp()), parameters, torch.optim.AdamW(parameters.values()))
    []
    """
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
