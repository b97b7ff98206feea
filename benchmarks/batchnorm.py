"""Runs with BatchNorm in train mode against predictions of train mode, by one linearisation and staged, and of frozen ones.

    OMP_NUM_THREADS=1 python benchmarks/batchnorm.py

writes benchmarks/results/batchnorm.json. A small residual network on the digits; a class and a random tenth forgotten at two
mixes. Real runs in train mode over a grid of step sizes, and the observed critical step by halving, on a log scale, the
interval of the grid where runs begin to diverge.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stabkit
from stabkit.algorithms import GradDiff
from stabkit.boundary import critical_lr
from stabkit.curvature import LinearisedNetwork, linearise
from stabkit.datasets import TensorSplit, digits
from stabkit.deletion import one_class, random_fraction
from stabkit.models import ResNet
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.staged import staged_rollout
from stabkit.training import train

CLASS, FRACTION = 3, 0.1
BATCH = 64
LOWEST, HIGHEST = 0.003, 6.0
SEEDS = (0, 1, 2)  # of the rollouts
STAGED_SEEDS = SEEDS[:1]
RUN_SEED = 100  # no rollout has these batches


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the CPU seconds it took."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def problem_of(model: torch.nn.Module, data: TensorSplit, deletion: str, batchnorm: str) -> UnlearningProblem:
    """What is forgotten, and how BatchNorm is treated."""
    chosen = one_class(data.y_train, CLASS) if deletion == "class" else random_fraction(data.y_train, FRACTION)
    forget, retain = ((data.x_train[i], data.y_train[i]) for i in (chosen.forget, chosen.retain))
    return UnlearningProblem(model, forget, retain, batchnorm=batchnorm)


def balanced_accuracy(predicted: list[bool], real: list[bool]) -> float:
    """Mean of the shares found of the runs that diverge and of those that do not."""
    shares = []
    for outcome in (True, False):
        hits = [p == outcome for p, r in zip(predicted, real, strict=True) if r == outcome]
        shares.append(sum(hits) / len(hits))
    return sum(shares) / 2


def observed(diverges: Callable[[float], bool], grid: list[float], outcomes: list[bool], halvings: int) -> float | None:
    """Critical step: where the grid's runs begin to diverge, and nearer by halving; None where they do not, or all do."""
    first = outcomes.index(True) if any(outcomes) else 0
    if first == 0:
        return None
    low, high = grid[first - 1], grid[first]
    for _ in range(halvings):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if diverges(middle) else (middle, high)
    return math.sqrt(low * high)


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one cell, few steps and step sizes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "batchnorm.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    epochs, steps, points, halvings = (5, 15, 5, 1) if options.quick else (20, 100, 12, 3)
    cells = [("class", 0.5)] if options.quick else [(kind, mix) for kind in ("class", "random") for mix in (0.1, 0.5)]
    data = digits()
    model = train(ResNet(1, 10, blocks=(1, 1), width=8), data.x_train, data.y_train, epochs=epochs, lr=1e-2)
    grid = np.geomspace(LOWEST, HIGHEST, points).tolist()
    rows: list[dict[str, Any]] = []
    seconds: dict[str, list[float]] = {"run": [], "batch": [], "frozen": [], "staged": []}
    gradients: list[float] = []  # of a staged rollout, in runs
    networks: dict[str, LinearisedNetwork] = {}
    for deletion, mix in cells:
        problem = problem_of(model, data, deletion, "batch")
        if not rows or rows[-1]["deletion"] != deletion:
            frozen = problem_of(model, data, deletion, "frozen")
            for name, kind in (("batch", problem), ("frozen", frozen)):
                networks[name], spent = timed(lambda kind=kind: linearise(kind, Identity(), batch_sizes=(BATCH, BATCH)))
                seconds[name].append(spent)
        algorithm = GradDiff(lr=grid[0], mix=mix, steps=steps, batch_size=BATCH)

        def diverges(lr: float, problem: UnlearningProblem = problem, algorithm: GradDiff = algorithm) -> bool:
            result, took = timed(lambda: stabkit.run(problem, algorithm.replace(lr=lr), seed=RUN_SEED))
            if result.steps == algorithm.steps:
                seconds["run"].append(took)
            return bool(result.diverged)

        outcomes = [diverges(lr) for lr in grid]
        row: dict[str, Any] = {
            "deletion": deletion,
            "mix": mix,
            "diverged": outcomes,
            "critical_lr": observed(diverges, grid, outcomes, halvings),
            "predicted": {},
        }
        for name, network in networks.items():
            rolled = rollout(network, algorithm, lr=grid, mix=[mix] * points, batch_sizes=(BATCH, BATCH), seeds=SEEDS)
            critical = critical_lr(network, algorithm, batch_sizes=(BATCH, BATCH), seeds=SEEDS, guess=0.1)
            row["predicted"][name] = {
                "diverges": (rolled.score.median(0).values >= 0).tolist(),
                "critical_lr": critical.value if critical.found else None,
            }

        def said(lr: float, problem: UnlearningProblem = problem, algorithm: GradDiff = algorithm) -> bool:
            found, took = timed(
                lambda: staged_rollout(
                    problem, networks["batch"], algorithm.replace(lr=lr), batch_sizes=(BATCH, BATCH), seeds=STAGED_SEEDS
                )
            )
            seconds["staged"].append(took)
            gradients.append(found.gradient_equivalents / (2 * BATCH * steps))
            return bool(found.rollout.score[0, 0] >= 0)

        staged = [said(lr) for lr in grid]
        row["predicted"]["staged"] = {"diverges": staged, "critical_lr": observed(said, grid, staged, halvings)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    real = [outcome for row in rows for outcome in row["diverged"]]
    summary = {}
    for name in (*networks, "staged"):
        predicted = [outcome for row in rows for outcome in row["predicted"][name]["diverges"]]
        pairs = [(row["predicted"][name]["critical_lr"], row["critical_lr"]) for row in rows]
        ratios = [guess / seen for guess, seen in pairs if guess is not None and seen is not None]
        summary[name] = {
            "balanced_accuracy": balanced_accuracy(predicted, real),
            "missed": sum(r and not p for p, r in zip(predicted, real, strict=True)),
            "false_alarms": sum(p and not r for p, r in zip(predicted, real, strict=True)),
            "critical_lr_ratios": ratios,
            "median_critical_lr_ratio": float(np.median(ratios)) if ratios else None,
        }
    result = {
        "summary": summary,
        "runs": len(real),
        "diverged": sum(real),
        "step_sizes": grid,
        "steps": steps,
        "batch_size": BATCH,
        "parameters": problem_of(model, data, "class", "batch").size,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items() if values},
        "cells": rows,
        "device": platform.processor() or platform.machine(),
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "staged_gradients_over_run": float(np.mean(gradients)),
        "seeds": {"runs": RUN_SEED, "rollouts": SEEDS, "staged": STAGED_SEEDS},
    }
    print(json.dumps(summary, indent=1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
