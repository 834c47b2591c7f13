"""Episodes: whether a prompt of four pictures costs what its tokens and pictures cost apart.

Predicted is a text of as many tokens, plus the pictures through tower and connector; and for the
making of inputs four prompts of one picture each. The rest would be the cost of telling pictures
and earlier turns apart.
"""

import torch

from benchmarks.command import start
from benchmarks.harness import Goal, Report, always, ratio, timed
from benchmarks.subjects import Subject, batch_of, subjects
from xlvlms_tutorial.methods.in_context import as_prompts, episodes, examples
from xlvlms_tutorial.models.spans import Batch
from xlvlms_tutorial.models.vlm import VLM

ROUNDS = 15
SHOTS = 3  # and the query: four pictures
ALLOWED = 1.05


def measure(report: Report) -> None:
    """All promises about episodes."""
    size = report.options.pick(4, 2)
    report.setting |= {
        "episodes": size,
        "pictures": SHOTS + 1,
        "rounds": report.options.rounds(ROUNDS),
    }
    for subject in subjects(report):
        if subject.samples is not None:
            about(report, subject, size)


def about(report: Report, subject: Subject, size: int) -> None:
    """The forward of episodes, and the making of their inputs."""
    vlm, samples = subject.vlm, subject.samples
    items = examples(samples, {question.type for question in samples[0].questions})
    support = [example for example in items if example.id not in {s.id for s in samples[:size]}]
    queries = [next(e for e in items if e.id == sample.id) for sample in samples[:size]]
    prompts = as_prompts(episodes(support, queries, SHOTS))
    batch = vlm.batch(**prompts)
    text = of_text(vlm, batch)
    alone = samples[: size * (SHOTS + 1)]
    inputs = {
        "episode": lambda: vlm.batch(**prompts),
        "predicted": lambda: batch_of(vlm, alone),
    }
    forward = {
        "episode": lambda: vlm.forward(batch, logits=False, use_cache=False),
        "predicted": lambda: predicted(vlm, batch, text),
    }
    rounds = report.options.rounds(ROUNDS)
    both = {name: always(lambda name=name: (inputs[name](), forward[name]())) for name in inputs}
    seconds = timed(both, rounds, subject.device, label="episodes")
    report.promise(
        f"episodes of {SHOTS + 1} pictures, inputs and forward, over what their tokens predict",
        ratio(seconds, "episode", "predicted"),
        Goal("<=", ALLOWED),
    )
    for label, calls in (("the inputs", inputs), ("the forward", forward)):
        ways = {name: always(call) for name, call in calls.items()}
        seconds = timed(ways, rounds, subject.device, label=label)
        report.tell(f"{label} of them alone", ratio(seconds, "episode", "predicted"))


def of_text(vlm: VLM, batch: Batch) -> Batch:
    """The same prompts with an ordinary token in the place of each picture's."""
    ids = batch["input_ids"].clone()
    ids[batch.mask("image")] = ids[batch.mask("question")][0]
    return vlm.prepare({"input_ids": ids, "attention_mask": batch["attention_mask"]})


@torch.no_grad()
def predicted(vlm: VLM, batch: Batch, text: Batch) -> None:
    """The pictures through tower and connector, and a forward of text."""
    vlm.model.get_image_features(pixel_values=batch["pixel_values"])
    vlm.forward(text, logits=False, use_cache=False)


if __name__ == "__main__":
    start({"in_context": measure})
