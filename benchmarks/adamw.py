"""How many parameters does an AdamW run have to be rolled out in? The critical step size by samples of several sizes.

    STABKIT_DATA=... python benchmarks/adamw.py            # some fifteen minutes on one core

Networks of `stabkit bench verify` forget by GradDiff with AdamW's steps. The critical step size of one linearisation is
found in samples of 100 to 1,600 parameters, three of each size, and by real runs of three other seeds. Writes
benchmarks/results/adamw.json.
"""

from __future__ import annotations

import argparse
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stabkit
from stabkit._serialise import dumps, write_atomically
from stabkit.adam import frozen_adam
from stabkit.algorithms import Algorithm, GradDiff
from stabkit.bench.cells import Cell, prepared
from stabkit.boundary import adamw_guess, critical_lr
from stabkit.curvature import sample_coordinates
from stabkit.problem import UnlearningProblem
from stabkit.runner import run

RESULTS = Path(__file__).parent / "results"
CELLS = tuple(
    Cell(dataset=dataset, model=model, deletion=deletion, algorithm="graddiff", optimizer="adamw")
    for dataset, model, deletion in (
        ("digits", "mlp", "class"),
        ("digits", "cnn", "class"),
        ("adult", "tabular", "random10"),
        ("profiles", "lm", "people10"),
    )
)
MIX, STEPS, SEED = 0.3, 100, 0
COUNTS, DRAWS = (100, 200, 400, 800, 1600), (0, 1, 2)
SAMPLES = {"profiles": (84, 84)}  # of texts, as many as `predict` takes; its standard mode's of others
RUN_SEEDS = (777, 778, 779)  # of the batches; rollouts draw others
HALVINGS = 6  # of a factor of ten around where the runs begin to break


def observed(problem: UnlearningProblem, algorithm: Algorithm) -> float:
    """Critical step size of real runs: median over the seeds, each by halving."""
    found = []
    for seed in RUN_SEEDS:

        def breaks(lr: float, seed: int = seed) -> bool:
            return run(problem, algorithm.replace(lr=lr), seed=seed).diverged

        lrs = adamw_guess(problem) * 10.0 ** np.arange(-3, 3)
        place = next(i for i, lr in enumerate(lrs) if breaks(float(lr)))
        low, high = float(lrs[place - 1]), float(lrs[place])
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if breaks(middle) else (middle, high)
        found.append((low * high) ** 0.5)
    return float(np.median(found))


def told(cell: Cell) -> dict[str, Any]:
    """What samples of every size say of a cell, and what happens."""
    trained, deletion = prepared(cell, SEED)
    x, y = trained.split.x_train, trained.split.y_train
    forget, retain = ((x[rows], y[rows]) for rows in (deletion.forget, deletion.retain))
    problem = UnlearningProblem(trained.model, forget, retain, loss=trained.loss)
    algorithm = GradDiff(mix=MIX, steps=STEPS, optimizer="adamw")
    read, sizes = problem.reading(algorithm.reads), algorithm.batch_sizes(problem)
    frozen = frozen_adam(read, mix=MIX, batch_sizes=sizes)
    rows = []
    for count in COUNTS:
        predicted = []
        for draw in DRAWS:
            retained, forgotten = SAMPLES.get(cell.dataset, (896, 448))
            network = sample_coordinates(
                read,
                frozen,
                run_p=algorithm.step_preconditioner(problem),
                count=count,
                retain_samples=retained,
                forget_samples=forgotten,
                seed=draw,
            )
            found = critical_lr(network, algorithm, batch_sizes=sizes, seeds=[0], guess=adamw_guess(problem))
            predicted.append(found.value)
        rows.append({"parameters": count, "critical_lr": predicted})
    return {
        "cell": cell.key,
        "parameters": problem.size,
        "outputs": network.retain.features.shape[1],
        "samples": [network.retain.samples, network.forget.samples],
        "predicted": rows,
        "observed": observed(problem, algorithm),
    }


def main() -> None:
    """Go over the cells and write down what comes out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "adamw.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", stabkit.StabkitWarning)
    result = {
        "cells": [told(cell) for cell in CELLS],
        "settings": {"mix": MIX, "steps": STEPS, "seed": SEED, "draws": list(DRAWS), "run_seeds": list(RUN_SEEDS)},
        "device": "cpu",
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_atomically(options.output, dumps(result) + "\n")
    print(dumps(result))


if __name__ == "__main__":
    main()
