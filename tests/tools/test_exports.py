"""The exports are whole, describe themselves, and show what comes from data as it is."""

import csv
import hashlib
import importlib
import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest

from tools import ROOT, crate, croissant, exports, release, report
from xlvlms_tutorial.claims import merge, record, write_claims
from xlvlms_tutorial.claims.headlines import SCHEMA
from xlvlms_tutorial.claims.tables import COLUMNS
from xlvlms_tutorial.io import read_json
from xlvlms_tutorial.metrics import Estimate
from xlvlms_tutorial.pocket import Scene, scenes, world

DAY = "2026-03-04"
AWKWARD = "<script>alert(1)</script> | [a](b) *c* $d$"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    run = {"model": "pocket-llava", "dataset": "scenes", "seeds": 0, "folder": folder}
    record("IMA-1", Estimate(0.3, 0.2, 0.4, 20), against=AWKWARD, **run)
    record("IMA-1", Estimate(-0.3, -0.4, -0.2, 20), against="chance", variant="b", **run)
    record("SKIP-3", Estimate(0.5, 0.4, 0.6, 20), against="dense model", **run)
    return write_claims(merge(folder), folder / "claims.json")


@pytest.fixture(scope="module")
def folder(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "ledger"
    folder.mkdir()
    (folder / "stale.txt").write_text("of an earlier build", encoding="utf-8")
    exports.lay(content, folder, DAY)
    return folder


@pytest.fixture(scope="module")
def entities(folder):
    graph = read_json(folder / crate.NAME)["@graph"]
    return {entity["@id"]: entity for entity in graph}


def links(value):
    """Every address that an entity names."""
    if isinstance(value, list):
        for one in value:
            yield from links(one)
    elif isinstance(value, dict):
        yield value["@id"]


def test_the_crate_names_every_file_with_its_size_and_digest_and_no_other(folder, entities):
    listed = {link["@id"] for link in entities["./"]["hasPart"]}
    present = {file.name for file in folder.iterdir()} - {crate.NAME}
    assert listed == present == set(crate.FILES)
    for name in listed:
        data = (folder / name).read_bytes()
        assert entities[name]["contentSize"] == str(len(data))
        assert entities[name]["sha256"] == hashlib.sha256(data).hexdigest()


def test_every_link_within_the_crate_has_an_entity(entities):
    for entity in entities.values():
        for name, value in entity.items():
            if name not in ("@id", "@type", "conformsTo") or name == "@graph":
                assert set(links(value)) <= entities.keys(), (entity["@id"], name)


def test_the_root_says_what_1_2_asks_of_it(entities):
    descriptor, root = entities[crate.NAME], entities["./"]
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.2"}
    assert descriptor["about"] == {"@id": "./"}
    assert {"name", "description", "datePublished", "license"} <= root.keys()
    assert root["datePublished"] == DAY
    assert root["license"]["@id"] == "https://spdx.org/licenses/MIT"


def test_papers_have_their_authors(entities):
    paper = entities["https://arxiv.org/abs/2405.16700"]
    names = [entities[link["@id"]]["name"] for link in paper["author"]]
    assert names == ["Mustafa Shukor", "Matthieu Cord"]
    assert len(entities["./"]["citation"]) >= 10


def test_software_has_versions_and_an_address(content, entities):
    programs = [one for one in entities.values() if one["@type"] == "SoftwareApplication"]
    assert {one["name"] for one in programs} == set(
        next(row["versions"] for row in content["measurements"] if row["versions"])
    )
    assert all(one["url"].startswith("https://") and one["version"] for one in programs)


def test_software_without_an_address_is_named_all_the_same(content, folder):
    rows = [{**row, "versions": {'a "b"/../': "1"}} for row in content["measurements"]]
    graph = crate.metadata(folder, {**content, "measurements": rows}, DAY)["@graph"]
    (entity,) = [entity for entity in graph if entity.get("name") == 'a "b"/../']
    assert re.fullmatch(r"#[A-Za-z0-9.-]+", entity["@id"])
    assert entity["@type"] == "CreativeWork"


def test_published_models_are_counted_where_there_are_any(content):
    assert crate.published(content) == "No published model was run."
    rows = [{**row, "scale": "published"} for row in content["measurements"][:2]]
    assert crate.published({"measurements": rows}) == "2 measurements are of published models."


def test_columns_of_tables_are_explained_in_the_crate(entities):
    described = [entities[link["@id"]] for link in entities["ledger.csv"]["variableMeasured"]]
    assert [one["name"] for one in described] == [column.name for column in COLUMNS["ledger"]]
    assert described[-1]["description"] == COLUMNS["ledger"][-1].meaning


def test_the_ledger_in_the_folder_is_the_ledger(folder, content):
    assert read_json(folder / "claims.json") == content
    jsonschema.validate(content, read_json(SCHEMA))


def test_a_row_of_the_world_is_the_scene_that_the_generator_draws(folder):
    with (folder / "scenes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(croissant.FIELDS)
    assert len({row["id"] for row in rows}) == len(rows) == 4 * croissant.PER_SPLIT
    for split in world.SPLITS:
        row = [row for row in rows if row["split"] == split][2]
        drawn = {factor: row[factor] or None for factor in world.FACTORS}
        counts = {"count": int(row["count"]), "layout": int(row["layout"])}
        scene = Scene(**drawn | counts)
        assert scene == scenes(3, split)[2]
        assert row["held_out"] == str(split == "composition")


def test_the_description_of_the_world_has_all_fields_splits_and_values(folder):
    content = read_json(folder / "world.json")
    sets = {one["name"]: one for one in content["recordSet"]}
    assert [field["name"] for field in sets["scenes"]["field"]] == list(croissant.FIELDS)
    assert {row["splits/name"] for row in sets["splits"]["data"]} == set(world.SPLITS)
    assert set(croissant.VALUES) == set(world.FACTORS)
    n_values = sum(map(len, croissant.VALUES.values()))
    assert len(sets["factor_values"]["data"]) == n_values
    ids = {one["@id"] for one in content["distribution"]}
    for field in sets["scenes"]["field"]:
        assert field["source"]["fileObject"]["@id"] in ids
    for one in content["distribution"]:
        data = (folder / one["contentUrl"]).read_bytes()
        assert one["sha256"] == hashlib.sha256(data).hexdigest()
    assert "not downloaded" in content["description"]


def test_the_generator_in_the_folder_is_that_of_the_package(folder):
    for name in croissant.CODE:
        module = importlib.import_module(f"xlvlms_tutorial.pocket.{name.removesuffix('.py')}")
        assert (folder / name).read_bytes() == Path(module.__file__).read_bytes()


def test_the_same_ledger_gives_the_same_bytes(folder, content, tmp_path):
    exports.lay(content, tmp_path / "again", DAY)
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_without_a_build_it_says_what_writes_the_ledger(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exports, "BUILD", tmp_path)
    assert exports.main() == 1
    assert "make book" in capsys.readouterr().err


def test_the_day_is_that_of_the_commit_or_of_the_variable(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setattr(release, "git", lambda *command: "2026-05-06\n")
    assert release.day() == "2026-05-06"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert release.day() == "1970-01-02"


def test_without_a_repository_the_day_is_today(monkeypatch):
    def none(*command):
        raise subprocess.CalledProcessError(128, command)

    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setattr(release, "git", none)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", release.day())


def test_validators_are_pinned_as_they_are_wanted():
    wanted = (ROOT / "tools" / "exports-requirements.in").read_text(encoding="utf-8")
    locked = (ROOT / "tools" / "exports-requirements.txt").read_text(encoding="utf-8")
    for line in wanted.splitlines():
        if not line.startswith("#"):
            assert re.search(rf"^{re.escape(line)} \\$", locked, re.M), f"{line}: run `make lock`"


def test_ids_within_the_crate_are_those_of_one_entity(folder):
    graph = json.loads((folder / crate.NAME).read_text(encoding="utf-8"))["@graph"]
    ids = [entity["@id"] for entity in graph]
    assert len(ids) == len(set(ids))


def test_the_report_is_among_the_exports(folder, content):
    assert (folder / "report.md").read_text(encoding="utf-8") == report.markdown(content, DAY)
