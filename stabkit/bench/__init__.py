"""The predict-verify benchmark: what was said before each of many real runs, and what happened."""

from stabkit.bench.cells import CELLS, Cell, cells_named
from stabkit.bench.fitting import by_error, fit_calibration, reliability, with_probabilities
from stabkit.bench.misses import Misses, misses
from stabkit.bench.page import write_page
from stabkit.bench.records import Boundary, CellResult, Prediction, Record, record_cell
from stabkit.bench.scores import Quality, Scores, boundary_ratios, pooled, scores
from stabkit.bench.verification import calibrate, verify_cells

__all__ = [
    "CELLS",
    "Boundary",
    "Cell",
    "CellResult",
    "Misses",
    "Prediction",
    "Quality",
    "Record",
    "Scores",
    "boundary_ratios",
    "by_error",
    "calibrate",
    "cells_named",
    "fit_calibration",
    "misses",
    "pooled",
    "record_cell",
    "reliability",
    "scores",
    "verify_cells",
    "with_probabilities",
    "write_page",
]
