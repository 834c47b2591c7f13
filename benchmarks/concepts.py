"""Concepts: how long Semi-NMF takes and how low its objective gets.

Against the ways it is done today. The authors of CoX-LMM call scikit-learn's
``DictionaryLearning``; ``overcomplete`` has a Semi-NMF in PyTorch, without a penalty.
"""

import sys
import time
import warnings
from contextlib import suppress
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import DictionaryLearning
from sklearn.exceptions import ConvergenceWarning

from benchmarks.command import start
from benchmarks.harness import Goal, Report, always, count, median, timed
from xlvlms_tutorial.methods.concepts import SemiNMF

ROUNDS = 5
# of the paper; the penalty is the rival's alpha of 1, which halves the square
CONCEPTS, PENALTY = 20, 2.0
# without a penalty: overcomplete's own, of its codes; and ours, of the objective
THEIR_TOLERANCE, OUR_TOLERANCE = 1e-4, 1e-5

Floats = NDArray[np.float32]


def measure(report: Report) -> None:
    """All promises about Semi-NMF."""
    pick = report.options.pick
    n, d, steps = pick(2614, 120), pick(4096, 48), pick(5000, 5)
    report.setting |= {
        "device": "cpu",
        "samples": n,
        "width": d,
        "concepts": CONCEPTS,
        "penalty": PENALTY,
        "formats": "float32",
    }
    report.setting |= {"rounds": report.options.rounds(ROUNDS), "most steps of scikit-learn": steps}
    A = activations(n, d)
    against_scikit_learn(report, A, steps)
    against_overcomplete(report, A)
    growth(report, pick(1024, 64), pick(1024, 32), pick(6, 3))


def activations(n: int, d: int, directions: int = 24, seed: int = 0) -> Floats:
    """Like hidden states of one word.

    Sparse non-negative sums of unit directions, one common offset, and noise.
    """
    random = np.random.default_rng(seed)
    units = random.standard_normal((directions, d))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    amounts = random.gamma(2.0, 8.0, (n, directions)) * (random.random((n, directions)) < 0.2)
    offset = random.standard_normal(d)
    offset *= 40 / np.linalg.norm(offset)
    return (amounts @ units + offset + 0.5 * random.standard_normal((n, d))).astype(np.float32)


def against_scikit_learn(report: Report, A: Floats, steps: int) -> None:
    """The objective and the time of today's way, which is run once: it takes minutes."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of single lassos, thousands of times
        theirs = authors_way(A, steps)
        today = time.perf_counter() - began
        reached = objective(A, theirs.transform(A), theirs.components_)
    fitted: list[SemiNMF] = []
    ways = {"ours": always(lambda: fitted.append(SemiNMF(CONCEPTS, penalty=PENALTY).fit(A)))}
    seconds = timed(ways, report.options.rounds(ROUNDS), label="semi-nmf")["ours"]
    model = fitted[-1]
    lower = objective(A, model.transform(A), model.components_) / reached
    report.promise(
        "objective of Semi-NMF, over scikit-learn's DictionaryLearning (the authors' way)",
        count(lower),
        Goal("<=", 1.0),
    )
    description = (
        "time of scikit-learn's DictionaryLearning (the authors' way, run once), over ours"
    )
    report.promise(
        description, median([today / duration for duration in seconds]), Goal(">=", 50.0)
    )
    report.tell("seconds of scikit-learn's DictionaryLearning", count(today))
    report.tell("seconds of our fit", median(seconds))
    report.tell("steps: scikit-learn", count(theirs.n_iter_))
    report.tell("steps: ours, after the choice of a start", count(model.n_iter_))
    seconds = timed(
        {"codes": always(lambda: model.transform(A))}, report.options.rounds(ROUNDS), label="codes"
    )["codes"]
    report.tell(
        f"milliseconds of exact codes of {len(A):,} samples",
        median([1000 * duration for duration in seconds]),
    )


def authors_way(A: Floats, steps: int) -> DictionaryLearning:
    """DictionaryLearning, fitted with the arguments of the code released with CoX-LMM."""
    return DictionaryLearning(
        CONCEPTS,
        alpha=PENALTY / 2,
        positive_code=True,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        max_iter=steps,
        random_state=0,
    ).fit(A)


def against_overcomplete(report: Report, A: Floats) -> None:
    """Time and squared error without a penalty, which overcomplete's objective does not have.

    One row says so where it is not installed.
    """
    rival = overcomplete_semi_nmf()
    if rival is None:
        report.tell(
            "overcomplete is not installed, and was not measured (0); make bench installs it",
            count(0),
        )
        return
    tensor, theirs, ours = torch.from_numpy(A), [], []
    torch.manual_seed(0)  # it draws its start without a seed of its own
    ways = {
        "ours": always(
            lambda: ours.append(SemiNMF(CONCEPTS, penalty=0.0, tol=OUR_TOLERANCE).fit(A))
        ),
        "overcomplete": always(
            lambda: theirs.append(
                squared_error(tensor, *rival(CONCEPTS, tol=THEIR_TOLERANCE).fit(tensor))
            )
        ),
    }
    seconds = timed(ways, min(3, report.options.rounds(ROUNDS)), label="overcomplete")
    ratios = np.array(seconds["overcomplete"]) / np.array(seconds["ours"])
    report.promise(
        "time of overcomplete's SemiNMF, over ours without a penalty",
        median(list(ratios)),
        Goal(">=", 2.0),
    )
    description = "squared error of ours without a penalty, over the lowest of overcomplete's"
    report.promise(description, count(ours[-1].objective_[-1] / min(theirs)), Goal("<=", 1.0))
    report.tell("seconds of overcomplete's SemiNMF", median(seconds["overcomplete"]))
    report.tell("seconds of our fit without a penalty", median(seconds["ours"]))


def overcomplete_semi_nmf() -> type | None:
    """The class of overcomplete, if it is there.

    Its front door needs torchvision for its models, its optimisation does not.
    """
    if find_spec("overcomplete") is None:
        return None
    with suppress(ModuleNotFoundError):
        import overcomplete  # noqa: F401
    return getattr(sys.modules.get("overcomplete.optimization.semi_nmf"), "SemiNMF", None)


def growth(report: Report, n: int, d: int, k: int) -> None:
    """Seconds of a fit with as many samples, dimensions and concepts.

    And with two and four times as many of one of them.
    """
    sizes = [
        (n, d, k),
        (2 * n, d, k),
        (4 * n, d, k),
        (n, 2 * d, k),
        (n, 4 * d, k),
        (n, d, 2 * k),
        (n, d, 4 * k),
    ]
    for samples, width, concepts in sizes:
        A, fitted = activations(samples, width), []
        # called at once
        way = {"fit": always(lambda: fitted.append(SemiNMF(concepts).fit(A)))}  # noqa: B023
        seconds = timed(way, min(3, report.options.rounds(ROUNDS)), label="growth")["fit"]
        description = f"{samples:,} samples, {width:,} dimensions, {concepts} concepts"
        report.tell(
            f"seconds of a fit: {description} ({fitted[-1].n_iter_} steps)", median(seconds)
        )


def objective(A: Floats, Z: Floats, D: Floats) -> float:
    """What is minimised, with the penalty."""
    return float(np.square(A - Z @ D, dtype=np.float64).sum() + PENALTY * Z.sum(dtype=np.float64))


def squared_error(A: torch.Tensor, Z: torch.Tensor, D: torch.Tensor) -> float:
    """What is minimised without a penalty."""
    return float((A - Z @ D).double().square().sum())


if __name__ == "__main__":
    start({"concepts": measure})
