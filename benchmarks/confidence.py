"""Where one linearisation's verdict is wrong, is its network wrong too? What the bounds of a report's confidence rest on.

    python benchmarks/confidence.py            # some ten minutes on one core

Goes over the calibration cells that `stabkit bench verify` has recorded in benchmarks/results/verify, linearises each
network anew, rolls every recorded setting out, and evaluates the real network at the predicted parameters, as a report does.
Writes how far the linearised outputs are from the real ones, for verdicts that were right and for those that were not, into
benchmarks/results/confidence.json. Of AdamW's cells, apart from the others, the real network is evaluated after the run's
first steps. Evaluation cells are not looked at.

And where verdicts are about step sizes near the boundary: how many of a report's are wrong there, and how many elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import stabkit
from stabkit._serialise import dumps, write_atomically
from stabkit.bench.cells import CELLS, Cell, prepared
from stabkit.bench.records import ROLLOUT_SEEDS, algorithm_of
from stabkit.bench.verification import read_cell
from stabkit.calibration import beyond, calibration, kind_at
from stabkit.cause import linearisation_errors, start_errors
from stabkit.checks import MAX_ERROR_OF_A_CROSSING, MAX_ERROR_OF_A_STABLE_RUN, margin_check
from stabkit.curvature import linearise, sample_coordinates
from stabkit.measure import COORDINATES
from stabkit.modes import MODES
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.staged import MAX_PATH_ERROR
from stabkit.verdict import verdict_of

RESULTS = Path(__file__).parent / "results"
STANDARD = MODES["standard"]
BOUNDS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def settings_of(cell: Cell, seed: int) -> list[dict[str, Any]]:
    """Verdict, outcome and error of the linearised outputs of every recorded setting of a cell."""
    recorded = read_cell(RESULTS / "verify" / f"{cell.key}-s{seed}.json")
    trained, deletion = prepared(cell, seed)
    x, y = trained.split.x_train, trained.split.y_train
    forget, retain = ((x[rows], y[rows]) for rows in (deletion.forget, deletion.retain))
    problem = UnlearningProblem(trained.model, forget, retain, loss=trained.loss)
    algorithm = algorithm_of(cell, problem)
    read, sizes = problem.reading(algorithm.reads), algorithm.batch_sizes(problem)
    p = algorithm.step_preconditioner(problem)
    count = COORDINATES * STANDARD.rank  # as the standard mode has it for few outputs
    network = (
        sample_coordinates(read, Identity(), run_p=p, count=count, seed=seed)
        if algorithm.adaptive
        else linearise(read, p, seed=seed)
    )
    rolled = rollout(
        network,
        algorithm,
        lr=[record.lr for record in recorded.records],
        mix=[record.mix for record in recorded.records],
        batch_sizes=sizes,
        seeds=ROLLOUT_SEEDS,
    )
    found = []
    for place, record in enumerate(recorded.records):
        if algorithm.adaptive:
            here = algorithm.replace(lr=record.lr, mix=record.mix)
            error, _ = start_errors(read, network, here, batch_sizes=sizes, seed=ROLLOUT_SEEDS[0], staged=True)
        else:
            one = replace(rolled, coordinates=rolled.coordinates[:, place : place + 1])
            error, _ = linearisation_errors(read, network, one, staged=True)
        found.append({
            "called_diverging": bool(rolled.probability[place] >= 0.5),
            "diverged": record.diverged,
            "error": error if math.isfinite(error) else None,
        })
    return found


def summary(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """By verdict and bound: settings beyond it and within it, and the share of wrong verdicts among each."""
    sides = {}
    for name, called in (("stable", False), ("diverging", True)):
        mine = [s for s in settings if s["called_diverging"] == called]
        rows = []
        for bound in BOUNDS:
            beyond = [s for s in mine if s["error"] is None or s["error"] > bound]
            within = [s for s in mine if s["error"] is not None and s["error"] <= bound]
            rows.append({"bound": bound, "beyond": _wrong(beyond), "within": _wrong(within)})
        sides[name] = {"all": _wrong(mine), "bounds": rows}
    return sides


def margins(cells: list[Cell], kind: str) -> dict[str, dict[str, Any]]:
    """How many verdicts on recorded settings are wrong, near the boundary that was found and clear of it, by a report's P.

    Near is where `margin_check` fails. Marginal verdicts, which claim nothing, are left out.
    """
    adamw = cells[0].optimizer == "adamw"
    settings: dict[str, list[dict[str, Any]]] = {"near": [], "clear": []}
    for path in (path for cell in cells for path in sorted((RESULTS / "verify").glob(f"{cell.key}-s[0-9].json"))):
        recorded = read_cell(path)
        edges = {boundary.mix: boundary for boundary in recorded.boundaries}
        for record in recorded.records:
            boundary = edges.get(record.mix)
            edge = boundary and getattr(boundary, kind)
            if boundary is None or edge is None:
                continue
            chosen = "adamw" if adamw and kind == "one" else kind_at(kind, boundary.error_below)
            interval = calibration(chosen).interval(edge, edge, edge)
            said = verdict_of(getattr(record, kind).probability)  # a report's, as `read_cell` gives it
            clear = margin_check(beyond(record.lr, edge, interval), interval, said, staged=kind == "staged").passed
            if said != "marginal":
                one = {"called_diverging": said == "diverges", "diverged": record.diverged}
                settings["clear" if clear else "near"].append(one)
    return {place: _wrong(found) for place, found in settings.items()}


def _wrong(settings: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """How many settings, and how many of them were called wrongly."""
    wrong = sum(s["called_diverging"] != s["diverged"] for s in settings)
    return {"settings": len(settings), "wrong": wrong, "share": wrong / len(settings) if settings else None}


def main() -> None:
    """Look at every calibration cell and write down what is seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "confidence.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", stabkit.StabkitWarning)
    cells = [cell for cell in CELLS if cell.role == "calibration"]
    adamw = [cell for cell in CELLS if cell.role == "AdamW calibration"]
    verdicts, adamws = (
        summary([setting for cell in some for setting in settings_of(cell, 0)]) for some in (cells, adamw)
    )
    result = {
        "cells": [cell.key for cell in cells],
        "seed": 0,
        "verdicts": verdicts,
        "used": {"stable": MAX_ERROR_OF_A_STABLE_RUN, "diverging": MAX_ERROR_OF_A_CROSSING},
        "margins": {
            name: {kind: margins(some, kind) for kind in ("one", "staged")}
            for name, some in (("sgd", cells), ("adamw", adamw))
        },
        "adamw": {"cells": [cell.key for cell in adamw], "verdicts": adamws, "used": MAX_PATH_ERROR},
        "device": "cpu",
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_atomically(options.output, dumps(result) + "\n")
    print(json.dumps({"sgd": verdicts, "adamw": adamws}))


if __name__ == "__main__":
    main()
