"""Run many cells, resume where a run was cut off, and write down what came out."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed

from stabkit._serialise import dumps, from_plain, to_plain, write_atomically
from stabkit._validate import check_int, check_seed
from stabkit._version import __version__
from stabkit.bench.cells import CELLS, Cell, cells_named
from stabkit.bench.fitting import by_error, fit_calibration, of_boundary, reliability, with_probabilities
from stabkit.bench.misses import misses, worst
from stabkit.bench.records import HALVINGS, CellResult, record_cell
from stabkit.bench.scores import BOUNDARIES, KINDS, REAL, boundary_ratios, pooled, scores
from stabkit.calibration import Calibration, calibration

SCHEMA = 5
EARLIER_SAMPLES = [512, 256]  # at most, where a file does not say


def verify_cells(
    folder: str | Path,
    *,
    cells: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 1,
    quick: bool = False,
    stored: bool = False,
) -> dict[str, Any]:
    """Predict and run cells, one file for each and seed, and sum them up.

    A file that is there is not made again, so that a run that was cut off goes on. Jobs go through joblib: inside a
    `joblib.parallel_config` they run on whatever backend it names.

    Args:
        folder: Where the files lie; made if missing.
        cells: Keys of cells to run, or beginnings of keys; all when None.
        seeds: Seeds of data, training, deletion and runs.
        jobs: Processes, one thread each.
        quick: Eight settings a cell, into files of their own.
        stored: Run nothing: sum up which of these cells and seeds the folder holds.

    Returns:
        The summary, which is also written to `summary.json` in the folder.

    Raises:
        ValueError: If a seed or the number of jobs is out of its domain, or nothing is stored where only that was asked for.
    """
    for seed in seeds:
        check_seed(seed, name="seeds", owner="verify_cells")
    check_int(jobs, name="jobs", owner="verify_cells", low=-1)
    if jobs == 0:
        raise ValueError("`jobs` of `verify_cells` must be a number of processes, or -1 for one a core; got 0.")
    place, chosen = Path(folder), cells_named(cells)
    work = [
        (cell, seed, place / f"{cell.key}-s{seed}{'-quick' if quick else ''}.json") for cell in chosen for seed in seeds
    ]
    if stored:
        work = [(cell, seed, path) for cell, seed, path in work if path.exists()]
    if not work:
        raise ValueError(
            f"`folder` of `verify_cells` must hold a cell's file with stored=True; got {os.fspath(place)!r}, which holds "
            "none of these cells and seeds. Run them first."
        )
    place.mkdir(parents=True, exist_ok=True)  # not of what was refused
    missing = [(cell, seed, path) for cell, seed, path in work if not path.exists()]
    Parallel(n_jobs=jobs, verbose=0)(delayed(_one)(cell, seed, path, quick) for cell, seed, path in missing)
    results = [read_cell(path) for _, _, path in work]
    summary = summarise(results)
    write_atomically(place / "summary.json", dumps(summary) + "\n")
    return summary


def calibrate(folder: str | Path, path: str | Path) -> dict[str, Calibration]:
    """Measure P(diverge) and the interval of the critical step on a folder's calibration cells, and write both down.

    Args:
        folder: Where `verify_cells` left its files.
        path: The file to write; the package reads its own `calibration.json`.

    Returns:
        The calibration of each kind of rollout.

    Raises:
        ValueError: If the folder is not there, or holds no calibration cell.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"`folder` of `calibrate` must be there; got {str(folder)!r}. `verify_cells` makes it.")
    results = [read_cell(place) for place in sorted(Path(folder).glob("*-s*.json")) if "-quick" not in place.name]
    mine = [result for result in results if result.cell.role == "calibration"]
    adamw = [result for result in results if result.cell.role == "AdamW calibration"]
    near, far = by_error(mine)
    # Staged rollouts end in real steps, whatever the optimiser is. Of what there are no cells the shipped one stays.
    fitted = {
        "one": fit_calibration(near, "one", sided=True),
        "far": fit_calibration(far, "one", name="far", sided=True) if far else calibration("far"),
        "staged": fit_calibration([*mine, *adamw], "staged"),
    }
    fitted["adamw"] = fit_calibration(adamw, "one", name="adamw", sided=True) if adamw else calibration("adamw")
    write_atomically(path, dumps(to_plain(fitted)) + "\n")
    return fitted


def summarise(results: Sequence[CellResult]) -> dict[str, Any]:
    """Scores by role, by cell and pooled, boundary ratios and costs.

    Args:
        results: Cells and seeds.

    Returns:
        Plain data.
    """
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {"stabkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": "cpu",
        "seeds": sorted({result.seed for result in results}),
        "missing": [cell.key for cell in CELLS if cell.key not in {result.cell.key for result in results}],
        "files": len(results),
        "without_path": [result.cell.key for result in results if not result.path_held],
        "grid_factor": float(np.median([_grid_factor(result) for result in results])),
        "roles": {},
    }
    for role in sorted({result.cell.role for result in results}, key=lambda role: (role.startswith("AdamW"), role)):
        mine = [result for result in results if result.cell.role == role]
        keys = list(dict.fromkeys(result.cell.key for result in mine))
        ratios = {
            kind: {key: [x for r in mine if r.cell.key == key for x in boundary_ratios(r, kind)] for key in keys}
            for kind in BOUNDARIES
        }
        everything = {kind: [ratio for values in ratios[kind].values() for ratio in values] for kind in BOUNDARIES}
        summary["roles"][role] = {
            "pooled": asdict(pooled(mine)),
            "rollouts_alone": _rollouts_alone(mine),
            "most_samples": sorted({result.most_samples for result in mine}),
            "boundary_runs": HALVINGS * sum(b.observed is not None for r in mine for b in r.boundaries),
            "boundary": {
                kind: _boundary(everything[kind]) | {"in_interval": _in_interval(mine, kind)} for kind in BOUNDARIES
            },
            "one_by_error": {
                place: _boundary([x for r in part for x in boundary_ratios(r, "one")])
                | {"in_interval": _in_interval(part, "one")}
                for place, part in zip(("near", "far"), by_error(mine), strict=True)
            },
            "ratios": everything,
            "reliability": {kind: _reliability(mine, kind) for kind in KINDS},
            "cost": {
                "measure_over_run": float(np.median([r.measure_seconds / r.run_seconds for r in mine])),
                "frontier_over_run": float(np.median([r.frontier_seconds / r.run_seconds for r in mine])),
                "staged_over_run": float(np.median([r.staged_seconds / r.run_seconds for r in mine])),
                "staged_over_run_gradients": float(np.median([r.staged_gradients / r.run_gradients for r in mine])),
            },
            "misses": {kind: asdict(misses(mine, kind)) for kind in KINDS},
            "worst": worst(mine),
            "cells": {
                key: {
                    "scores": asdict(scores([x for r in mine if r.cell.key == key for x in r.records])),
                    "boundary": {kind: _boundary(ratios[kind][key]) for kind in BOUNDARIES},
                }
                for key in keys
            },
        }
    return to_plain(summary)


def _grid_factor(result: CellResult) -> float:
    """Ratio of neighbouring step sizes."""
    lrs = sorted({record.lr for record in result.records})
    return (lrs[-1] / lrs[0]) ** (1 / max(1, len(lrs) - 1))


def _boundary(ratios: Sequence[float]) -> dict[str, float | int | None]:
    """How near predicted and observed critical step sizes are."""
    away = np.abs(np.log(np.array(ratios)))
    return {
        "boundaries": len(ratios),
        "median_ratio": float(np.median(ratios)) if len(ratios) else None,
        "within_1.5": float((away <= np.log(1.5)).mean()) if len(ratios) else None,
        "within_2": float((away <= np.log(2)).mean()) if len(ratios) else None,
        "over_2": float((np.array(ratios) > 2).mean()) if len(ratios) else None,
    }


def _in_interval(results: Sequence[CellResult], kind: str) -> float | None:
    """Share of real critical step sizes, those of both runs, in the predicted interval without the seeds' spread."""
    if kind not in KINDS:
        return None
    held = []
    for result in results:
        for boundary in result.boundaries:
            critical = getattr(boundary, kind)
            if critical is None:
                continue
            low, high = of_boundary(_calibrations(result.cell), kind, boundary).interval(critical, critical, critical)
            held += [low <= real <= high for of in REAL if (real := getattr(boundary, of)) is not None]
    return float(np.mean(held)) if held else None


def _reliability(results: Sequence[CellResult], kind: str) -> list[dict[str, float | int]]:
    """Mean P(diverge) and share diverged in equal bins of P."""
    said = [getattr(x, kind).probability for r in results for x in r.records]
    return [asdict(b) for b in reliability(said, [x.diverged for r in results for x in r.records])]


def _rollouts_alone(results: Sequence[CellResult]) -> dict[str, Any]:
    """How right P(diverge) would be without what the boundary says."""
    unaware = [with_probabilities(replace(r, boundaries=()), _calibrations(r.cell)) for r in results]
    found = pooled(unaware)
    return {kind: asdict(getattr(found, kind)) for kind in KINDS}


def _one(cell: Cell, seed: int, path: Path, quick: bool) -> None:
    """Make one file."""
    torch.set_num_threads(1)
    plain = {"schema": SCHEMA, **to_plain(record_cell(cell, seed, quick=quick))}
    write_atomically(path, dumps(plain) + "\n")


def read_cell(path: Path) -> CellResult:
    """Read one file back.

    Args:
        path: A file that `verify_cells` wrote.

    Returns:
        The cell's settings, P(diverge) by the shipped calibration from what was recorded before the runs: the scores and, of
        the mixes for which the grid brackets it, the predicted critical step size.

    Raises:
        ValueError: If it is none of this schema.
    """
    plain = json.loads(path.read_text(encoding="utf-8"))
    if plain.pop("schema", None) != SCHEMA:
        raise ValueError(
            f"{os.fspath(path)!r} must be a cell's file of schema {SCHEMA}. It was written by another version, or is none: "
            "delete it to have it made again."
        )
    cell = {"optimizer": "sgd", **plain["cell"]}  # of files from before AdamW's runs
    boundaries = [{"error_below": None, **boundary} for boundary in plain["boundaries"]]  # from before it was looked at
    values = {"most_samples": EARLIER_SAMPLES, "path_held": False, **plain, "cell": cell, "boundaries": boundaries}
    found = from_plain(CellResult, values)
    return with_probabilities(found, _calibrations(found.cell))


def _calibrations(cell: Cell) -> dict[str, Calibration]:
    """The shipped calibration of each kind of prediction of a cell."""
    kinds = (
        {"one": "adamw", "staged": "staged"} if cell.optimizer == "adamw" else {k: k for k in ("one", "far", "staged")}
    )
    return {kind: calibration(name) for kind, name in kinds.items()}
