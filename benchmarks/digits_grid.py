"""Predictions against real runs on digits: step sizes x mixes x deletions x algorithms, pooled over seeds.

    python benchmarks/digits_grid.py --seeds 0 1 2

writes benchmarks/results/digits_grid.json. Nothing here was used to choose a constant of the library. Every prediction is
made from the trained model and the data alone, before the runs it is about; a run diverges if its retain loss ever reaches
the best constant predictor's. About two minutes a seed on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, roc_auc_score

import stabkit
from stabkit.datasets import digits
from stabkit.deletion import one_class, random_fraction
from stabkit.models import SmallCNN
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from stabkit.training import train

MIXES = (0.05, 0.2, 0.5, 0.9)
STEPS = 150
FORGOTTEN_CLASS = 3
FIRST_RUN_SEED = 777  # of the real runs' batches; the rollouts draw others
GRIDS = {
    stabkit.GradDiff: np.geomspace(10**-3.5, 10**0.5, 9),
    stabkit.AGU: 10 * np.geomspace(10**-3.5, 10**0.5, 9),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One cell of the grid: what was said and what happened."""

    deletion: str
    algorithm: str
    seed: int
    lr: float
    mix: float
    probability: float
    step_limit: float
    diverged: bool
    predicted_step: float | None
    divergence_step: int | None


def settings_of(seed: int) -> list[Setting]:
    """Predict and run the whole grid for one seed of data, training, deletion and batches."""
    data = digits(seed=seed)
    model = train(SmallCNN(1, 8, 10, seed=seed), data.x_train, data.y_train, epochs=30, lr=3e-3, seed=seed)
    found = []
    for rows in (
        random_fraction(data.y_train, 0.1, seed=seed),
        one_class(data.y_train, FORGOTTEN_CLASS),
    ):
        forget = data.x_train[rows.forget], data.y_train[rows.forget]
        retain = data.x_train[rows.retain], data.y_train[rows.retain]
        problem = UnlearningProblem(model, forget, retain)
        for algorithm, grid in GRIDS.items():
            chosen = algorithm(lr=float(grid[4]), mix=MIXES[0], steps=STEPS)
            report = stabkit.predict(model, forget, retain, algorithm=chosen, mode="standard", seed=seed)
            front = report.frontier(lr=grid.tolist(), mix=MIXES)
            limits = [report.at(mix=mix).thresholds.step_limit for mix in MIXES]
            preconditioner = chosen.preconditioner(problem)
            for i, lr in enumerate(grid.tolist()):
                for j, mix in enumerate(MIXES):
                    changed = chosen.replace(lr=lr, mix=mix)
                    real = run(problem, changed, preconditioner=preconditioner, seed=FIRST_RUN_SEED + seed)
                    step = float(front.divergence_step[i, j])
                    found.append(
                        Setting(
                            deletion=rows.name,
                            algorithm=chosen.name,
                            seed=seed,
                            lr=lr,
                            mix=mix,
                            probability=float(front.probability[i, j]),
                            step_limit=limits[j],
                            diverged=real.diverged,
                            predicted_step=None if math.isnan(step) else step,
                            divergence_step=real.divergence_step,
                        )
                    )
    return found


def scores(settings: list[Setting]) -> dict[str, float]:
    """Balanced accuracy, AUC and Brier score of the prediction; balanced accuracy of the 2/λ_max rule beside it."""
    happened = np.array([s.diverged for s in settings])
    said = np.array([s.probability for s in settings])
    rule = np.array([s.lr > s.step_limit for s in settings])
    return {
        "settings": len(settings),
        "share_diverged": float(happened.mean()),
        "balanced_accuracy": float(balanced_accuracy_score(happened, said >= 0.5)),
        "auc": float(roc_auc_score(happened, said)),
        "brier": float(brier_score_loss(happened, said)),
        "balanced_accuracy_of_step_limit": float(balanced_accuracy_score(happened, rule)),
    }


def main() -> None:
    """Run the grid for the given seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "digits_grid.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", stabkit.LowConfidenceWarning)
    settings = [s for seed in options.seeds for s in settings_of(seed)]
    cells = sorted({(s.deletion, s.algorithm) for s in settings})
    result = {
        "pooled": scores(settings),
        "cells": {
            f"{deletion}, {algorithm}": scores([
                s for s in settings if (s.deletion, s.algorithm) == (deletion, algorithm)
            ])
            for deletion, algorithm in cells
        },
        "seeds": options.seeds,
        "steps": STEPS,
        "device": "cpu",
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "settings": [asdict(s) for s in settings],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"pooled": result["pooled"], "cells": result["cells"]}, indent=1))


if __name__ == "__main__":
    main()
