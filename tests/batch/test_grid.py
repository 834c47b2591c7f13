"""A file of experiments becomes a list of runs, or is refused with the line that is wrong."""

import re

import pytest

from tests.support.toy_chapter import toy_chapter
from xlvlms_tutorial.batch import run as run_module
from xlvlms_tutorial.batch.batch import EXPERIMENTS
from xlvlms_tutorial.batch.grid import read_grid
from xlvlms_tutorial.errors import InputError

GOOD = """\
defaults:
  models: [pocket-llava, a/tiny]
  seeds: [0, 1]
  parameters: {n_samples: 8}
  minutes: 5
experiments:
  - chapters: [toy, other]
    vary: {effect: [0.1, 0.2]}
  - chapters: toy
    models: pocket-llava
    datasets: [scenes-mood, coco-place]
    seeds: 7
    parameters: {share: 1, layers: [3]}
    gpus: 1
"""


@pytest.fixture
def grid(tmp_path):
    """Reads a text as a file of experiments on two toy chapters."""
    for name in ("toy", "other"):
        toy_chapter(tmp_path / "chapters", name)

    def read(text):
        (tmp_path / "grid.yaml").write_text(text)
        return read_grid(
            tmp_path / "grid.yaml", tmp_path / "chapters", ("pocket-llava", "pocket-llava-video")
        )

    return read


def test_every_combination_is_one_run(grid):
    cells = grid(GOOD)
    assert len(cells) == 2 * 2 * 2 * 2 + 2
    assert len({cell.id for cell in cells}) == len(cells)
    first, last = cells[0], cells[-1]
    assert first.chapter == "toy" and {cell.chapter for cell in cells} == {"toy", "other"}
    assert first.parameters == {
        "model": "pocket-llava",
        "dataset": "scenes",
        "seed": 0,
        "effect": 0.1,
        "n_samples": 8,
    }
    assert last.parameters["share"] == 1
    assert last.parameters["layers"] == [3]
    assert last.parameters["seed"] == 7
    assert (first.gpus, last.gpus, first.minutes, last.threads, last.retries) == (0, 1, 5, 1, 1)


def test_names_are_readable_safe_and_stay_the_same(grid):
    cells = grid(GOOD)
    assert [cell.id for cell in cells] == [
        cell.id for cell in grid(GOOD.replace("minutes: 5", "minutes: 9"))
    ]
    assert cells[0].id.startswith("toy-pocket-llava-scenes-s0-")
    assert any("-tiny-" in cell.id for cell in cells)
    assert all(re.fullmatch(r"[a-z0-9-]+", cell.id) for cell in cells)
    assert {cell.id for cell in cells}.isdisjoint(
        cell.id for cell in grid(GOOD.replace("n_samples: 8", "n_samples: 9"))
    )


def test_a_name_never_reaches_the_shell_as_it_was_given(grid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a$(b); 'c").mkdir()
    (cell,) = grid('experiments: [{chapters: toy, datasets: "./a$(b); \'c"}]')
    assert re.fullmatch(r"toy-pocket-llava-a-b-c-s0-[0-9a-f]{12}", cell.id)
    assert cell.parameters["dataset"] == str(tmp_path / "a$(b); 'c")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpus: 1", "gpu: 1", "line 9: unknown key 'gpu' .did you mean 'gpus'"),
        ("gpus: 1", "gpus: -1", "line 9, experiment 2: gpus=-1; give a whole number of 0 or more"),
        ("gpus: 1", "threads: 0", "threads=0; give a whole number of 1 or more"),
        ("gpus: 1", "mem_mb: lots", "mem_mb='lots'"),
        ("minutes: 5", "minute: 5", "defaults: unknown key 'minute'"),
        (
            "[toy, other]",
            "[toy, othr]",
            "line 7, experiment 1: no chapter 'othr' .* did you mean 'other'|did you mean 'other'",
        ),
        (
            "share: 1",
            "shar: 1",
            "line 9, experiment 2: chapter 'toy' has no parameter 'shar' .did you mean 'share'",
        ),
        ("share: 1", "share: one", "parameter share='one' of chapter 'toy' is of the wrong type"),
        ("share: 1", "share: 2026-01-01", "wrong type"),
        ("share: 1", "seed: 1", "'seed' is given in two places, or in the wrong one"),
        ("effect: [0.1, 0.2]", "n_samples: [1, 2]", "'n_samples' is given in two places"),
        ("effect: [0.1, 0.2]", "effect: []", "vary: effect has no value"),
        ("effect: [0.1, 0.2]", "effect: [0.1, 0.1]", "vary: effect has a value twice"),
        ("seeds: 7", "seeds: seven", "parameter seed='seven'"),
        ("seeds: 7", "seeds: [7, null]", "seeds has no value"),
        (
            "models: pocket-llava\n",
            "models: pocket-lava\n",
            "unknown model 'pocket-lava' .did you mean 'pocket-llava'",
        ),
        ("models: pocket-llava\n", "models: 3\n", "unknown model '3'"),
        ("scenes-mood", "scene", "unknown dataset 'scene' .did you mean 'scenes'"),
        ("seeds: 7", "seeds: 7\n    seeds: 8", "line 13: 'seeds' stands twice"),
        ("  - chapters: toy\n", "  - chapters: [toy]\n    {", "cannot be read"),
        ("experiments:", "experiment:", "unknown key 'experiment' .did you mean 'experiments'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(grid, old, new, message):
    assert old in GOOD
    with pytest.raises(InputError, match=message):
        grid(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "None is no mapping"),
        ("[]", "no mapping"),
        ("experiments: []", "no list of experiments"),
        ("experiments: [toy]", "line 1: 'toy' is no mapping"),
        ("experiments: [{models: pocket-llava}]", "chapters has no value"),
        (
            "experiments: [{chapters: toy}, {chapters: [toy]}]",
            "experiment 2: the run toy-pocket-llava-scenes-s0-.* is asked for twice",
        ),
    ],
)
def test_a_file_without_runs_is_refused(grid, text, message):
    with pytest.raises(InputError, match=message):
        grid(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.yaml cannot be read"):
        read_grid(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", ["experiments", "at-scale"])
def test_the_grids_of_the_repository_fit_the_chapters(name):
    from xlvlms_tutorial.pocket.variants import VARIANTS

    cells = read_grid(EXPERIMENTS.with_name(f"{name}.yaml"), embedded=tuple(VARIANTS))
    models = {cell.parameters["model"] for cell in cells}
    assert models == {"pocket-llava"} if name == "experiments" else len(models) == 3
    assert {cell.gpus for cell in cells} == ({0} if name == "experiments" else {1})


def test_the_full_grid_has_seeds_that_share_no_samples_and_every_connector():
    from xlvlms_tutorial.pocket.variants import VARIANTS

    cells = read_grid(EXPERIMENTS.with_name("full.yaml"), embedded=tuple(VARIANTS))
    seeds = {}
    for cell in cells:
        name = (cell.chapter, cell.parameters["model"])
        seeds.setdefault(name, set()).add(cell.parameters["seed"])
        assert set(cell.parameters) == {"model", "dataset", "seed"}  # the chapters' own sizes
    # several chapters take a second set of samples from seed + 1
    assert all(used == {0, 2, 4, 6, 8} for used in seeds.values())
    models = {model for _, model in seeds}
    assert models == {"pocket-llava", "pocket-llava-seed1", "pocket-llava-seed2", "pocket-gemma"}


@pytest.mark.parametrize("key", ["vary", "parameters"])
@pytest.mark.parametrize("wrong", ["[a]", "abc", "3", "[{effect: 1}]", "true"])
def test_what_should_be_a_mapping_and_is_none_is_refused(grid, key, wrong):
    with pytest.raises(
        InputError,
        match=f"line 1, experiment 1: {key} is .*, no mapping; give {key} as NAME: VALUE",
    ):
        grid(f"experiments: [{{chapters: toy, {key}: {wrong}}}]")
    with pytest.raises(InputError, match="no mapping"):
        grid(f"defaults: {{parameters: {wrong}}}\nexperiments: [{{chapters: toy}}]")


@pytest.mark.parametrize(
    "text",
    [
        "experiments: &a [*a]",
        "experiments: [&a {chapters: *a}]",
        "experiments: " + "[" * 3000,
        "experiments: [{chapters: toy, seeds: " + "[" * 3000,
    ],
)
def test_a_file_without_end_is_refused(grid, text):
    with pytest.raises(InputError, match=r"grid\.yaml.*(holds itself|nested too deep)"):
        grid(text)


@pytest.mark.parametrize("name", ["d" * 300, "d/" + "d" * 5000, "a\\0b", "~nosuch-user/d"])
@pytest.mark.parametrize("key", ["datasets", "models", "chapters"])
def test_names_that_no_file_can_have_are_unknown(grid, key, name):
    entry = {"chapters": "toy", "models": "pocket-llava", "datasets": "scenes"} | {key: name}
    if key == "models" and "/" in name:
        return  # the hub may have it
    with pytest.raises(InputError, match="unknown dataset|unknown model|no chapter"):
        grid(
            "experiments: [{"
            + ", ".join(f'{key}: "{value}"' for key, value in entry.items())
            + "}]"
        )


def test_words_of_a_grid_are_what_the_chapter_says(grid):
    first, second = grid(
        "experiments: [{chapters: toy, seeds: 010, parameters: {effect: 1e-3}, vary: "
        "{end: [no, yes]}, threads: 02}]"
    )
    assert first.parameters | {"end": ""} == second.parameters | {"end": ""} and first.threads == 2
    assert (first.parameters["seed"], first.parameters["effect"]) == (10, 0.001)
    assert [first.parameters["end"], second.parameters["end"]] == ["no", "yes"]


def test_many_runs_have_names_of_their_own_and_the_chapter_is_read_once(grid, monkeypatch):
    reads = []
    real = run_module.read_chapter
    monkeypatch.setattr(run_module, "read_chapter", lambda file: reads.append(file) or real(file))
    cells = grid(
        "experiments: [{chapters: [toy, other], vary: {n_samples: "
        f"{list(range(3000))}}}}}, {{chapters: toy, seeds: 5}}]"
    )
    # with six digits two of them would share one: 1275 and 5644 did
    assert len({cell.id for cell in cells}) == len(cells) == 6001
    assert sorted(file.stem for file in reads) == ["other", "toy"]
    assert (
        len(
            {
                cell.id
                for cell in grid("experiments: [{chapters: toy, vary: {n_samples: [1275, 5644]}}]")
            }
        )
        == 2
    )


def test_a_seed_that_is_text_makes_no_path(grid, tmp_path):
    file = tmp_path / "chapters" / "toy.md"
    file.write_text(file.read_text().replace("seed = 0", "seed = abs(0)"))
    (cell,) = grid("experiments: [{chapters: toy, seeds: ../../x}]")
    assert re.fullmatch(r"toy-pocket-llava-scenes-s-x-[0-9a-f]{12}", cell.id)
    assert cell.parameters["seed"] == "../../x"
