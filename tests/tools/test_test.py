"""Parts are announced, timed and summed up, whatever becomes of them."""

import subprocess

import pytest

from tools import test as parts


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The commands that were run; what ends on a name in ``bad`` fails with 3."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if command[-1] == "stop":
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 3 if command[-1] == "bad" else 0)

    monkeypatch.setattr(parts, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(parts.subprocess, "run", run)
    return commands


def make(monkeypatch, **commands):
    monkeypatch.setattr(
        parts,
        "PARTS",
        {name: (f"what {name} does", [(command,)]) for name, command in commands.items()},
    )


def test_what_will_run_is_said_first_and_how_long_it_took_last(ran, monkeypatch, capsys):
    assert parts.main([]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "to run:"
    assert (
        [line.split()[0] for line in output[1:5]]
        == list(parts.ALL)
        == [line.split()[0] for line in output[-4:]]
    )
    assert all(line.split()[2:] == ["s", "passed"] for line in output[-4:])
    assert (parts.BUILD / "seconds.txt").read_text().splitlines() == output[-4:]
    assert len(ran) == 7


def test_a_failure_is_the_exit_status_and_the_rest_runs(ran, monkeypatch, capsys):
    make(monkeypatch, one="good", two="bad", three="good")
    assert parts.main(["one", "two", "three"]) == 3
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        "passed",
        "FAILED",
        "passed",
    ]


def test_behind_a_failed_lint_nothing_runs(ran, monkeypatch, capsys):
    make(monkeypatch, lint="bad", unit="good")
    assert parts.main(["lint", "unit"]) == 3
    assert capsys.readouterr().out.endswith("not run\n")
    assert ran == [("bad",)]


def test_a_stop_from_the_keyboard_is_summed_up_too(ran, monkeypatch, capsys):
    make(monkeypatch, one="good", two="stop", three="good")
    with pytest.raises(KeyboardInterrupt):
        parts.main(["one", "two", "three"])
    assert [line.split()[2:] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        ["s", "passed"],
        ["s", "stopped"],
        ["run"],
    ]


def test_an_unknown_part_is_told_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        parts.main(["wrong"])
    assert "no part wrong; there are: lint, quick, unit, models, pages" in capsys.readouterr().err
