"""``python -m xlvlms_tutorial`` is the command ``xlvlms``."""

from xlvlms_tutorial.cli import app

app(prog_name="xlvlms")
