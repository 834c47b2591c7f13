"""Verdicts follow from numbers, times are paired, files say what was measured,
and only known benchmarks run.
"""

import gc
import json
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.__main__ import SCRIPTS
from benchmarks.command import application
from benchmarks.harness import (
    CPU,
    Finding,
    Goal,
    Options,
    Report,
    always,
    count,
    hardware,
    median,
    ratio,
    run,
    timed,
    verdict,
    within,
)
from benchmarks.memory import peak_bytes
from xlvlms_tutorial.metrics.intervals import Estimate

RUN = CliRunner()


@pytest.mark.parametrize(
    ("goal", "text", "value", "holds"),
    [
        (Goal("<=", 1.05), "<= 1.05", 1.05, True),
        (Goal("<=", 1.05), "<= 1.05", 1.0501, False),
        (Goal("<=", 1.1), "<= 1.10", 0.2, True),
        (Goal("<=", 0.9166666), "<= 0.917", 0.9169, True),
        (Goal("<=", 0.9166666), "<= 0.917", 0.9171, False),
        (Goal(">=", 4), ">= 4", 4.0, True),
        (Goal(">=", 4), ">= 4", 3.9999, False),
        (Goal("==", 0), "== 0", 0.0, True),
        (Goal("==", 0), "== 0", 1.0, False),
    ],
)
def test_a_promise_holds_if_its_number_meets_its_goal(goal, text, value, holds):
    assert str(goal) == text
    assert Finding("x", Estimate(value, value - 1, value + 1, 3), goal).holds is holds


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(0.9, 1.1, True), (1.0, 1.1, True), (0.9, 1.0, True), (1.001, 1.2, False), (0.8, 0.99, False)],
)
def test_no_difference_is_an_interval_that_covers_one(low, high, holds):
    goal = Goal("covers", 1.0)
    assert str(goal) == "interval covers 1.00"
    assert goal.holds(Estimate(high, low, high, 5)) is holds


def test_the_number_is_judged_as_it_is_written():
    finding = Finding("x", Estimate(1.05004, 1.0, 1.2, 5), Goal("<=", 1.05))
    assert finding.asdict() == {
        "what": "x",
        "measured": 1.05,
        "spread": [1.0, 1.2],
        "goal": "<= 1.05",
        "holds": True,
    }
    assert Finding("y", count(3, 9)).asdict() == {
        "what": "y",
        "measured": 3.0,
        "spread": [3.0, 3.0],
    }


class FakeTime:
    """A clock that a call moves on by what it says it takes, and that remembers the order."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def way(self, name, seconds):
        durations = iter(seconds)

        def call():
            self.order.append(name)
            self.now += next(durations)

        return always(call)


def test_each_way_is_timed_once_a_round_in_changing_order_after_the_warm_up():
    clock = FakeTime()
    seconds = timed(
        {"a": clock.way("a", [9, 1, 2, 3]), "b": clock.way("b", [9, 4, 5, 6])}, 3, clock=clock
    )
    assert seconds == {"a": [1, 2, 3], "b": [4, 5, 6]}
    assert "".join(clock.order) == "ba" + "ab" + "ba" + "ab"


def test_preparing_and_tidying_up_are_not_timed_and_surround_each_call():
    clock, events = FakeTime(), []

    @contextmanager
    def slow():
        clock.now += 100
        events.append("in")
        yield lambda: events.append("call")
        clock.now += 100
        events.append("out")

    @contextmanager
    def context():
        clock.now += 50
        yield

    def call():
        clock.now += 1

    seconds = timed({"slow": slow, "inside": within(context, call)}, 2, clock=clock, warm_up=0)
    assert seconds == {"slow": [0, 0], "inside": [1, 1]}
    assert events == ["in", "call", "out"] * 2


def test_garbage_is_collected_between_the_calls_and_never_during_one():
    gc_states = []
    timed({"a": always(lambda: gc_states.append(gc.isenabled()))}, 2)
    assert gc_states == [False] * 3
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_ratio_is_the_median_of_paired_ratios_not_a_ratio_of_medians():
    seconds = {"ours": [2.0, 30.0, 4.0], "theirs": [1.0, 10.0, 4.0]}
    estimate = ratio(seconds, "ours", "theirs")
    assert (estimate.value, estimate.n) == (2.0, 3)
    assert 1.0 <= estimate.low <= 2.0 <= estimate.high <= 3.0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.5, 2)), min_size=2, max_size=9))
def test_a_machine_that_slows_both_sides_alike_changes_no_ratio(rounds):
    theirs = [speed for speed, _ in rounds]
    ours = [speed * factor for speed, factor in rounds]
    estimate = ratio({"ours": ours, "theirs": theirs}, "ours", "theirs")
    assert estimate.value == pytest.approx(np.median([factor for _, factor in rounds]))
    assert median([factor for _, factor in rounds]).low == pytest.approx(estimate.low)


def test_peak_memory_is_counted_to_the_byte():
    before = torch.zeros(1000)

    def call():
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.empty(500, dtype=torch.float64)  # 4,000 more
        del first
        third = before.clone()  # in place of the first: the peak stays
        return second, third

    assert peak_bytes(call, CPU) == 8000
    assert peak_bytes(lambda: None, CPU) == 0
    assert peak_bytes(lambda: [before.clone() for _ in range(3)][0], CPU) == 12000


def fake(report: Report) -> None:
    report.setting["rounds"] = report.options.rounds(9)
    report.about("a model")
    report.promise("speed", Estimate(1.01, 0.99, 1.04, 5), Goal("<=", 1.05))
    report.promise("size", Estimate(3.0, 2.0, 4.0, 5), Goal("<=", 1.1))
    report.tell("noise", Estimate(1.0, 0.9, 1.1, 5))


def test_the_file_says_what_was_measured_with_what_and_whether_it_holds(tmp_path, capsys):
    report = run("fake", fake, Options(folder=tmp_path))
    content = json.loads((tmp_path / "fake.json").read_text())
    assert list(content) == [
        "name",
        "created",
        "versions",
        "hardware",
        "model",
        "setting",
        "spread",
        "promises",
        "information",
    ]
    assert (content["name"], content["model"], content["setting"]) == (
        "fake",
        ["a model"],
        {"rounds": 9, "quick": False},
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["created"])
    assert (
        content["versions"]["torch"] == torch.__version__.split("+")[0]
        or content["versions"]["torch"] == torch.__version__
    )
    assert set(content["versions"]) == {"python", "torch", "transformers", "xlvlms_tutorial"}
    assert content["hardware"] | {"load_average": 0} == hardware() | {"load_average": 0}
    assert content["hardware"]["threads"] == torch.get_num_threads()
    assert content["promises"][0] == {
        "what": "a model: speed",
        "measured": 1.01,
        "spread": [0.99, 1.04],
        "goal": "<= 1.05",
        "holds": True,
    }
    assert [promise["holds"] for promise in content["promises"]] == [True, False]
    assert content["information"] == [
        {"what": "a model: noise", "measured": 1.0, "spread": [0.9, 1.1]}
    ]
    assert verdict([report, report]) == "4 promises, 2 hold"
    printed = capsys.readouterr().out
    assert "a model: size" in printed and "NO" in printed and "1.01" in printed


def test_quick_results_do_not_replace_those_that_are_kept():
    assert Options().results.name == "results"
    assert Options(quick=True).results != Options().results
    assert (
        Options(quick=True).rounds(15),
        Options().rounds(15),
        Options(repeats=7, quick=True).rounds(15),
    ) == (3, 15, 7)


def test_one_benchmark_or_all_run_and_the_last_line_counts_the_promises(tmp_path):
    app = application({"one": fake, "two": fake})
    for arguments, files, line in (
        ([], ["one.json", "two.json"], "4 promises, 2 hold"),
        (["two"], ["two.json"], "2 promises, 1 hold"),
    ):
        folder = tmp_path / str(len(files))
        ran = RUN.invoke(app, [*arguments, "--quick", "--folder", str(folder)])
        assert ran.exit_code == 0, ran.output
        assert ran.output.splitlines()[-1] == line
        assert sorted(path.name for path in folder.iterdir()) == files


@pytest.mark.parametrize("arguments", [["capturing"], ["--", "--quick"], ["--", "a; touch b"]])
def test_an_unknown_benchmark_is_refused_with_the_names_there_are(arguments, tmp_path):
    ran = RUN.invoke(
        application(SCRIPTS),
        ["--folder", str(tmp_path), *arguments],
        env={"COLUMNS": "200", "TERM": "dumb"},
    )
    assert ran.exit_code == 2
    text = " ".join(ran.output.replace("│", " ").split())
    names = (
        "capture, steering, skipping, tracing, dropping, storing, alignment, vocabulary, "
        "subnetworks, concepts, grounding, in_context, pruning, reliability, live"
    )
    assert f"there are: {names}." in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--repeats", "1"]])
def test_options_that_mean_nothing_are_refused(arguments, tmp_path):
    ran = RUN.invoke(application({"one": fake}), [*arguments, "--folder", str(tmp_path)])
    assert ran.exit_code == 2
    assert list(tmp_path.iterdir()) == []
