"""Every algorithm against a retrained gold, over three data sets, three deletions and three seeds; does SRAGU's gate help?

    STABKIT_DATA=... python benchmarks/algorithms.py            # some three hours on one core
    STABKIT_DATA=... python benchmarks/algorithms.py --quick    # one cell, one seed, to try it out

Parts of MNIST, Adult and CIFAR-10. Writes one file for each cell and seed into benchmarks/results/algorithms, and sums up
in benchmarks/results/algorithms.json; what is there is not made again, and algorithms that a file lacks are added to it,
and the membership attack's AUC, if the original and the gold that are trained for them anew are those of the file. Every
algorithm runs 60 steps at the same mix and half the step size that `predict` finds safe, chosen before any run. AGU and
SRAGU also run over a grid of step sizes from a tenth to ten times AGU's critical one: how many of them survive, and how
near the best of them comes to the gold.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import stabkit
from stabkit._serialise import dumps, to_plain, write_atomically
from stabkit.algorithms import ALGORITHMS, Algorithm
from stabkit.bench.cells import EPOCHS, MODELS, Cell, prepared
from stabkit.metrics import ModelAudit, audit
from stabkit.problem import UnlearningProblem
from stabkit.report import Report
from stabkit.runner import run
from stabkit.training import train

STEPS = 60
MIX = 0.2
GRID = np.geomspace(0.1, 10, 7)
GRIDDED = ("agu", "sragu")
ATTACK = "entropy/logistic"
WATCHED = 512  # samples of each set behind the verdict on a real run
SEEDS = (0, 1, 2)
SAME = 1e-3  # difference in accuracy up to which a network that is trained anew is the stored one
MEASURED = {
    "mode": "standard",
    "rank": 50,
    "retain_samples": 256,
    "forget_samples": 128,
    "spectrum_samples": 128,
    "seeds": 2,
}
CELLS = tuple(
    Cell(dataset=dataset, model=model, deletion=deletion, algorithm="", steps=STEPS)
    for dataset, model in (("mnist", "cnn"), ("mnist", "wide-mlp"), ("adult", "tabular"), ("cifar10", "cnn"))
    for deletion in ("random10", "subclass" if dataset == "adult" else "class", "influence")
)
MEASURES = (
    "forget_accuracy",
    "retain_accuracy",
    "test_accuracy",
    "mia",
    "attack_auc",
    "average_gap",
    "kl_forget",
    "kl_retain",
)


def measured(found: ModelAudit) -> dict[str, Any]:
    """One model's numbers with their intervals over samples."""
    attack = found.attack(ATTACK)
    numbers = {
        "forget_accuracy": found.forget.accuracy,
        "retain_accuracy": found.retain.accuracy,
        "test_accuracy": found.test.accuracy if found.test else None,
        "mia": attack.forget_called_member if attack else None,
        "attack_auc": attack.auc if attack else None,
        "average_gap": found.average_gap,
        "kl_forget": found.forget.distances.kl_from_gold if found.forget.distances else None,
        "kl_retain": found.retain.distances.kl_from_gold if found.retain.distances else None,
    }
    return {name: None if value is None else to_plain(value) for name, value in numbers.items()}


def settings_of(name: str, problem: UnlearningProblem) -> Algorithm:
    """The algorithm with the settings that all share; its own for the rest, but for schedules made for longer runs."""
    known = ALGORITHMS[name].__dataclass_fields__
    shared: dict[str, object] = {
        "steps": STEPS,
        "mix": MIX,
        "batch_size": min(64, problem.retain.size),
        "lr_schedule": None,
    }
    if name == "remain_newton":
        shared |= {"rank": 10, "curvature_samples": 128}  # its damped solves would outweigh all else here
    if name in {"ga", "finetune", "l1_sparse"}:
        shared.pop("mix")
    return ALGORITHMS[name]().replace(**{key: value for key, value in shared.items() if key in known})


def safe_step(report: Report) -> float:
    """Half the largest step size that is predicted stable, at most half of 2/λ_max."""
    detail = report.critical_lr_detail
    limits = [detail.low] if detail.found else []
    return 0.5 * min([*limits, report.thresholds.step_limit, detail.scanned[1]])


def one(cell: Cell, seed: int, names: Sequence[str], *, gridded: Sequence[str] = GRIDDED) -> dict[str, Any]:
    """Some algorithms in one cell, AGU among them where there are grids, which lie around its critical step size."""
    trained, deletion = prepared(cell, seed)
    split = trained.split
    x, y = split.x_train, split.y_train
    forget, retain = ((x[rows], y[rows]) for rows in (deletion.forget, deletion.retain))
    seen = torch.isin(split.y_test, retain[1].unique())  # a class that is gone is nothing to be right about
    test = split.x_test[seen], split.y_test[seen]
    problem = UnlearningProblem(trained.model, forget, retain, test=test)
    fresh = MODELS[cell.model](split, seed + 100)
    gold = train(fresh, *retain, epochs=EPOCHS[cell.dataset], lr=3e-3, seed=seed + 100)  # as long as the original
    models: dict[str, nn.Module] = {}
    rows: dict[str, dict[str, Any]] = {}
    grids: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        algorithm = settings_of(name, problem)
        try:
            report = stabkit.predict(trained.model, forget, retain, algorithm=algorithm, seed=seed, **MEASURED)
        except ValueError as error:  # an algorithm that this problem rules out says why
            rows[name] = {"refused": str(error)}
            continue
        chosen = algorithm.replace(lr=safe_step(report))
        real = run(problem, chosen, seed=seed, monitor_samples=WATCHED)
        models[name] = real.model
        probability = report.at(lr=chosen.lr).probability
        rows[name] = {"lr": chosen.lr, "probability": probability, "diverged": real.diverged}
        if name == "agu":
            centre = report.critical_lr if math.isfinite(report.critical_lr) else report.thresholds.step_limit
    for name in gridded:
        grids[name] = []
        preconditioner = settings_of(name, problem).preconditioner(problem)
        for place, factor in enumerate(GRID.tolist()):
            algorithm = settings_of(name, problem).replace(lr=factor * centre)
            real = run(problem, algorithm, preconditioner=preconditioner, seed=seed, monitor_samples=WATCHED)
            grids[name].append({"lr": algorithm.lr, "diverged": real.diverged})
            if not real.diverged:
                models[f"{name}-{place}"] = real.model
    found = audit(problem, models, gold=gold, attacks=[ATTACK], replicates=200, seed=seed)
    for name, row in rows.items():
        if name in models:
            row |= measured(found[name])
    for name, line in grids.items():
        for place, point in enumerate(line):
            gap = None if point["diverged"] else found[f"{name}-{place}"].average_gap
            point["gap"] = gap.value if gap else None
    return {
        "sizes": list(found.sizes),
        "gold": measured(found["gold"]),
        "original": measured(found["original"]),
        "algorithms": rows,
        "grids": grids,
        "gates": {key: float(value) for key, value in stabkit.SRAGU().gates(problem).gates.items()},
    }


def added(stored: dict[str, Any], cell: Cell, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """A stored cell with further algorithms against the same original and gold, and the attack's AUC on these two."""
    fresh = one(cell, seed, names, gridded=())
    for model in ("original", "gold"):
        for measure in ("forget_accuracy", "retain_accuracy", "test_accuracy"):
            if not math.isclose(stored[model][measure]["value"], fresh[model][measure]["value"], abs_tol=SAME):
                raise RuntimeError(
                    f"the {model} of {cell.key}, seed {seed}, is not the stored one: {measure} "
                    f"{fresh[model][measure]['value']:.4f}, stored {stored[model][measure]['value']:.4f}. Delete the file."
                )
    known = {model: {**stored[model], "attack_auc": fresh[model]["attack_auc"]} for model in ("original", "gold")}
    return {**stored, **known, "algorithms": {**stored["algorithms"], **fresh["algorithms"]}}


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means and ranges over seeds, by cell and algorithm, and the two grids."""
    cells: dict[str, Any] = {}
    for key in sorted({name.rsplit("-s", 1)[0] for name in found}):
        runs = [value for name, value in found.items() if name.rsplit("-s", 1)[0] == key]
        rows = {}
        for algorithm in ("original", "gold", *ALGORITHMS):
            entries = [r[algorithm] if algorithm in r else r["algorithms"].get(algorithm) for r in runs]
            entries = [e for e in entries if e and "refused" not in e]
            if entries:
                rows[algorithm] = {
                    measure: spread([e[measure]["value"] for e in entries if e.get(measure)]) for measure in MEASURES
                } | {"diverged": sum(bool(e.get("diverged")) for e in entries), "runs": len(entries)}
        grids = {}
        for name in GRIDDED:
            lines = [r["grids"][name] for r in runs]
            best = [min((p["gap"] for p in line if p["gap"] is not None), default=None) for line in lines]
            grids[name] = {
                "survived": sum(not p["diverged"] for line in lines for p in line),
                "runs": sum(len(line) for line in lines),
                "best_gap": spread([b for b in best if b is not None]),
            }
        cells[key] = {
            "sizes": runs[0]["sizes"],
            "algorithms": rows,
            "grids": grids,
            "gates": [r["gates"] for r in runs],
        }
    return cells


def draw(cells: dict[str, Any], path: Path) -> None:
    """AGU beside SRAGU: share of the step sizes that survive, and the best gap, cell by cell."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.45 * len(cells) + 1.6), layout="constrained", sharey=True)
    for offset, (name, colour) in enumerate(zip(GRIDDED, ("#0072b2", "#d55e00"), strict=True)):
        places = np.arange(len(cells)) + 0.36 * offset
        grids = [cell["grids"][name] for cell in cells.values()]
        axes[0].barh(places, [g["survived"] / g["runs"] for g in grids], height=0.34, color=colour, label=name.upper())
        for place, best in zip(places, [g["best_gap"] for g in grids], strict=True):
            if best is not None:
                axes[1].plot([100 * best["low"], 100 * best["high"]], [place, place], color=colour)
                axes[1].plot([100 * best["mean"]], [place], "o", color=colour)
    axes[0].set_yticks(np.arange(len(cells)) + 0.18, [key.rstrip("-") for key in cells])
    axes[0].set(xlabel="share of the grid's runs that survive", xlim=(0, 1))
    axes[1].set(xlabel="best gap to a retrained model, per cent")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def spread(values: list[float]) -> dict[str, float] | None:
    """Mean, smallest and largest of the seeds' values."""
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)} if values else None


def main() -> None:
    """Make what is missing and sum up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cells", nargs="+", help="beginnings of cells' names; all when left out")
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results" / "algorithms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", stabkit.StabkitWarning)
    chosen = [c for c in CELLS if not options.cells or any(c.key.startswith(name) for name in options.cells)]
    work = [(c, s) for c in chosen for s in options.seeds][: 1 if options.quick else None]
    for cell, seed in work:
        path = options.folder / f"{cell.key.rstrip('-')}-s{seed}.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            lacking = [name for name in options.algorithms if name not in stored["algorithms"]]
            content = added(stored, cell, seed, lacking) if lacking or "attack_auc" not in stored["original"] else None
        else:
            content = one(cell, seed, options.algorithms)
        if content is not None:
            write_atomically(path, dumps(to_plain(content)) + "\n")
            print(path.name, flush=True)
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(options.folder.glob("*-s*.json"))}
    result = {
        "cells": summary(found),
        "steps": STEPS,
        "mix": MIX,
        "grid": GRID.tolist(),
        "device": "cpu",
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_atomically(options.folder.parent / "algorithms.json", dumps(result) + "\n")
    draw(result["cells"], options.folder.parent.parent / "figures" / "sragu_gate.png")


if __name__ == "__main__":
    main()
