import contextlib
import io
import re

from tools import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_prints_what_the_readme_says():
    code, output = re.search(
        r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", README, re.S
    ).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == output


def test_the_pictures_of_the_readme_are_there_have_words_and_are_small():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert pictures
    for words, path in pictures:
        assert len(words) > 40
        assert (ROOT / path).stat().st_size < 1_000_000
