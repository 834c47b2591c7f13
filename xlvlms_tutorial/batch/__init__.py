"""Chapters in batches: one run by papermill, grids by Snakemake, and what comes out of them."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.batch.batch import EXPERIMENTS, FOLDER, Options, reproduce
    from xlvlms_tutorial.batch.grid import read_grid
    from xlvlms_tutorial.batch.results import Gathered, gather, measurements, pooled
    from xlvlms_tutorial.batch.run import prepare, read_results, run_chapter
    from xlvlms_tutorial.io import build_folder

__all__ = [
    "EXPERIMENTS",
    "FOLDER",
    "Gathered",
    "Options",
    "build_folder",
    "gather",
    "measurements",
    "pooled",
    "prepare",
    "read_grid",
    "read_results",
    "reproduce",
    "run_chapter",
]

__getattr__, __dir__ = lazy_attributes(__name__)
