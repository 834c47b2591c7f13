"""Experts of pocket LLaVA: its connector, trained further on one skill alone, for merging.

``EXPERTS`` says how they are made. All have one start, a step on the way of the connector that is
shipped, but for one whose start is a connector of the same recipe from other first weights. They
are shipped as changes in eight bits; of the presence expert of a second order the record is.
"""

from torch import Tensor

from xlvlms_tutorial.pocket.build import connector_state
from xlvlms_tutorial.training.connector_runs import EXPERT_SKILLS, EXPERT_START, OTHER_START
from xlvlms_tutorial.validation import require_one_of


def expert(skill: str, seed: int | str = 0, step: str | None = None) -> dict[str, Tensor]:
    """Read the connector of an expert of pocket LLaVA, or the one that experts start from.

    Use it with :func:`~xlvlms_tutorial.methods.merging.interpolate`. Load it into
    ``vlm.model.model.multi_modal_projector``.

    Parameters
    ----------
    skill : {"captions", "presence", "start"}
        What it was trained on: to describe, or to say whether something is there; "start" gives
        what it was trained from.
    seed : {0, 1, "other"}, default 0
        Which order of the data, or "other" for another start.
    step : str, optional
        A step on the way, such as "step-0050"; by default the end.

    Returns
    -------
    dict of str to Tensor
        The weights by name, float32.

    Raises
    ------
    InputError
        If there is no such skill or seed.
    LoadError
        If the expert or its step is not shipped.

    Examples
    --------
    >>> from xlvlms_tutorial.training import expert
    >>> tuple(expert("captions")["linear_2.weight"].shape)
    (576, 576)
    """
    require_one_of(skill, (*EXPERT_SKILLS, "start"), "skill")
    require_one_of(seed, (0, 1, "other"), "seed")
    if skill == "start":
        return connector_state(*(OTHER_START if seed == "other" else EXPERT_START))
    return connector_state(f"expert-{skill}-{seed}", step)
