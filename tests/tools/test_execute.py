"""A page is executed once into the cache of the book; its old records go, those of others stay.

The ledger comes last.
"""

import json

import pytest

from tools import execute
from xlvlms_tutorial.claims import claims

HEAD = "---\nkernelspec:\n  name: python3\n---\n\n# A page\n\n"
CELL = "```{{code-cell}} ipython3\n{}\n```\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name, path in {
        "ROOT": "",
        "BUILD": "_build",
        "CACHE": "_build/cache",
        "CLAIMS": "_build/claims",
    }.items():
        monkeypatch.setattr(execute, name, tmp_path / path)
    (tmp_path / "_build" / "claims").mkdir(parents=True)
    return tmp_path


def page(root, name, code):
    file = root / f"{name}.md"
    file.write_text(HEAD + CELL.format(code))
    return file


def test_outputs_are_kept_until_the_code_changes(root):
    file = page(root, "one", "print(6 * 7)")
    assert not execute.cached(file)
    [cell] = [cell for cell in execute.execute(file).cells if cell.cell_type == "code"]
    assert cell.outputs[0].text == "42\n"
    assert execute.cached(file)
    file.write_text(file.read_text() + "\nMore prose.\n")
    assert execute.cached(file)
    file.write_text(file.read_text().replace("42", "43").replace("6 * 7", "6 * 8"))
    assert not execute.cached(file)


def test_a_page_that_raises_is_named_with_its_error_and_not_kept(root):
    file = page(root, "bad", "1 / 0")
    with pytest.raises(execute.PageError, match=r"bad\.md failed:(.|\n)*ZeroDivisionError"):
        execute.execute(file)
    assert not execute.cached(file)


def test_only_the_page_s_own_records_and_outputs_are_deleted(root):
    pages = [page(root, name, f"print({name!r})") for name in ("one", "two")]
    for file in pages:
        execute.keep(file, execute.read(file), 1.0)
        (root / "_build" / "claims" / f"{file.stem}.json").write_text(
            json.dumps({"chapter": file.stem})
        )
    execute.forget(pages[0])
    assert [file.name for file in (root / "_build" / "claims").iterdir()] == ["two.json"]
    assert [execute.cached(file) for file in pages] == [False, True]
    execute.forget(pages[0])


def test_a_record_that_another_page_forgets_at_the_same_moment_is_no_failure(root, monkeypatch):
    file, claims = page(root, "one", "1"), root / "_build" / "claims"
    for name in ("a", "b", "c"):
        (claims / f"{name}.json").write_text(
            json.dumps({"chapter": "one" if name == "b" else "other"})
        )
    real, files_read = execute.Path.read_text, []

    def read(path, **options):
        text = None
        if path.name == "a.json":
            path.unlink()  # before it is read
        text = real(path, **options)
        if path.name == "b.json":
            path.unlink()  # after it was read
        files_read.append(path.name)
        return text

    monkeypatch.setattr(execute.Path, "read_text", read)
    execute.forget(file)
    assert "b.json" in files_read and [path.name for path in claims.iterdir()] == ["c.json"]


def test_what_is_missing_is_filled_in_and_the_ledger_comes_last(root, monkeypatch, capsys):
    class InProcess:
        """Runs jobs in this process, so that the patched folders hold."""

        def __init__(self, workers, mp_context):
            assert workers in (1, 2)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, job, *arguments):
            from concurrent.futures import Future

            future = Future()
            try:
                future.set_result(job(*arguments))
            except execute.PageError as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(execute, "ProcessPoolExecutor", InProcess)
    ledger, findings, valid, bad = (
        page(root, "claims", "1"),
        page(root, "findings", "1 + 1"),
        page(root, "known", "2"),
        page(root, "bad", "1 / 0"),
    )
    execute.execute(valid)
    tree = root / "_build" / ".doctrees" / "claims.doctree"
    tree.parent.mkdir()
    tree.write_bytes(b"old")
    execute.execute(findings)  # is executed again all the same
    pages = [findings, ledger, valid, bad, page(root, "new", "3")]
    assert execute.fill(pages) == ["bad"]
    executed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert executed == ["new", "claims", "findings"]
    assert not tree.exists()


def test_pages_are_executed_with_records_of_one_name_each():
    """The plugin of pytest that executes pages must not import the package before it is checked."""
    assert execute.QUIET[claims.ONE_RECORD] == "1"
