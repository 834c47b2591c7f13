"""Subnetworks: how long Wanda takes, and what packed masks save.

Wanda from samples to masks; packed masks in memory and in the time of their overlap. Today's way
holds one byte a weight, and counts the weights that two masks share in booleans.
"""

from collections.abc import Callable

from benchmarks.command import start
from benchmarks.harness import Goal, Report, always, count, median, ratio, timed
from benchmarks.subjects import Subject, subjects
from xlvlms_tutorial.methods.pruning.calibration import Calibration, calibrate, calibrate_on
from xlvlms_tutorial.methods.pruning.masks import Masks
from xlvlms_tutorial.methods.pruning.scores import random_masks, wanda

ROUNDS, LONG_ROUNDS = 9, 3  # the long ones take all samples through the model
SPARSITY = 0.5
MOST_SECONDS = 60


def measure(report: Report) -> None:
    """All promises about subnetworks."""
    options = report.options
    n, size = options.pick(32, 4), options.pick(16, 2)
    rounds = {
        "rounds": options.rounds(ROUNDS),
        "rounds of all samples": options.rounds(LONG_ROUNDS),
    }
    report.setting |= {"samples": n, "batch_size": size, "sparsity": SPARSITY, **rounds}
    for subject in subjects(report):
        about(report, subject, n, size)


def about(report: Report, subject: Subject, n: int, size: int) -> None:
    """All promises about the subnetworks of one model."""
    masks = from_samples_to_masks(report, subject, n, size)
    cost_of_calibrating(report, subject, size)
    overlap_of_masks(report, masks, random_masks(subject.vlm, SPARSITY, seed=0))


def from_samples_to_masks(report: Report, subject: Subject, n: int, size: int) -> Masks:
    """Calibration and masks, the samples' inputs prepared anew each time.

    Promised for the embedded model on a CPU.
    """
    results: list[Masks] = []
    calibration = calibrated(subject, n, size)
    ways = {
        "all": always(
            lambda: results.append(wanda(subject.vlm, calibrated(subject, n, size), SPARSITY))
        ),
        "masks": always(lambda: wanda(subject.vlm, calibration, SPARSITY)),
    }
    seconds = timed(ways, report.options.rounds(LONG_ROUNDS), subject.device, label="wanda")
    description = f"seconds from {n} samples to Wanda's masks of all linear maps"
    if subject.samples is not None:
        report.promise(description, median(seconds["all"]), Goal("<=", MOST_SECONDS))
    else:
        report.tell(description, median(seconds["all"]))
    report.tell("seconds of Wanda's scores and masks alone", median(seconds["masks"]))
    return results[-1]


def calibrated(subject: Subject, n: int, size: int) -> Calibration:
    """The calibration on so many samples, or on the inputs made by hand that are as many."""
    if subject.samples is not None:
        return calibrate(subject.vlm, subject.samples[:n], batch_size=size)
    return calibrate_on(subject.vlm, (subject.batch(size) for _ in range(0, n, size)))


def cost_of_calibrating(report: Report, subject: Subject, size: int) -> None:
    """A batch that is summed at every linear map, over the forward that is needed anyway."""
    batch = subject.batch(size)
    bare: Callable[[], object] = lambda: subject.vlm.forward(batch, logits=False, use_cache=False)
    ways = {"bare": always(bare), "calibrated": always(lambda: calibrate_on(subject.vlm, [batch]))}
    seconds = timed(ways, report.options.rounds(LONG_ROUNDS), subject.device, label="calibration")
    report.tell(
        "a forward that calibrates, over the bare forward", ratio(seconds, "calibrated", "bare")
    )


def overlap_of_masks(report: Report, first: Masks, second: Masks) -> None:
    """Memory and overlap of packed masks, against booleans that are in memory already."""
    plain = [[masks.unpack(*key) for key in masks] for masks in (first, second)]
    report.promise(
        "bytes of packed masks, over booleans",
        count(first.nbytes / sum(mask.nbytes for mask in plain[0])),
        Goal("==", 0.125),
    )
    ways = {
        "packed": always(lambda: first.iou(second)),
        "booleans": always(
            lambda: [int((a & b).sum()) / int((a | b).sum()) for a, b in zip(*plain, strict=True)]
        ),
        "unpacking": always(
            lambda: [
                int((first.unpack(*k) & second.unpack(*k)).sum())
                / int((first.unpack(*k) | second.unpack(*k)).sum())
                for k in first
            ]
        ),
    }
    seconds = timed(ways, report.options.rounds(ROUNDS), label="overlap")
    report.promise(
        "overlap of packed masks, over booleans in memory (today's way)",
        ratio(seconds, "packed", "booleans"),
        Goal("<=", 0.5),
    )
    report.tell(
        "overlap of packed masks, over unpacking them for it", ratio(seconds, "packed", "unpacking")
    )
    report.tell(
        "milliseconds of the overlap of two packed masks of all linear maps",
        median([1000 * s for s in seconds["packed"]]),
    )


if __name__ == "__main__":
    start({"subnetworks": measure})
