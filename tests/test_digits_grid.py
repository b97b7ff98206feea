"""Predictions against real runs on digits, over a whole grid: the figure that everything else serves."""

from __future__ import annotations

import numpy as np
import stabkit
from stabkit.problem import UnlearningProblem
from stabkit.runner import run

MIXES = (0.05, 0.2, 0.5, 0.9)
STEPS = 150
GRIDS = {
    stabkit.GradDiff: np.geomspace(10**-3.5, 10**0.5, 9),
    stabkit.AGU: 10 * np.geomspace(10**-3.5, 10**0.5, 9),
}
REAL_SEED = 777  # of the real runs' batches; the rollouts draw others


def test_balanced_accuracy_over_steps_mixes_deletions_and_algorithms(digits_cnn, random_deletion, class_deletion):
    predicted, real = [], []
    for forget, retain in (random_deletion, class_deletion):
        problem = UnlearningProblem(digits_cnn, forget, retain)
        for algorithm, grid in GRIDS.items():
            chosen = algorithm(lr=float(grid[4]), mix=0.3, steps=STEPS)
            front = stabkit.predict(digits_cnn, forget, retain, algorithm=chosen).frontier(lr=grid.tolist(), mix=MIXES)
            predicted.append(front.probability >= 0.5)
            preconditioner = chosen.preconditioner(problem)
            real.append([
                [
                    run(
                        problem,
                        chosen.replace(lr=float(lr), mix=mix),
                        preconditioner=preconditioner,
                        seed=REAL_SEED,
                    ).diverged
                    for mix in MIXES
                ]
                for lr in grid
            ])
    said, happened = np.array(predicted).ravel(), np.array(real).ravel()
    assert said.size == 2 * 2 * 9 * 4
    assert 0.25 < happened.mean() < 0.75  # both outcomes are well represented
    sensitivity, specificity = said[happened].mean(), (~said[~happened]).mean()
    balanced = (sensitivity + specificity) / 2
    print(f"balanced accuracy {balanced:.3f}, sensitivity {sensitivity:.3f}, specificity {specificity:.3f}")
    assert balanced >= 0.90
