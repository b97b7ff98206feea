"""Does one linearisation cry wolf on networks that normalise by their own activations? What a bound of confidence rests on.

    python benchmarks/normalised.py            # some ten minutes on one core

LayerNorm and GroupNorm make a network's outputs flatten where its linearisation's grow. For networks with such layers on
scikit-learn's digits, and for the same ones without, runs are predicted by one linearisation (`mode="standard"`) at step
sizes around the critical one, then run with two seeds each. Writes how wrong the linearised outputs were, for verdicts that
were right and for those that were not, into benchmarks/results/normalised.json. None of the cells of `stabkit bench verify`
is among them: other class, networks and training.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stabkit
from benchmarks.confidence import RESULTS, summary
from stabkit._serialise import dumps, write_atomically
from stabkit.algorithms import AGU, Algorithm, GradDiff
from stabkit.datasets import digits
from stabkit.deletion import one_class, random_fraction
from stabkit.models import ResNet, VisionTransformer
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from stabkit.training import train

CLASS, SHARE, MIX, STEPS = 5, 0.1, 0.3, 40
STEP_FACTORS = [1.6**k for k in range(-2, 8)]  # of the predicted critical step size
RUN_SEEDS = (10_000, 10_001)  # of the batches; rollouts draw others


def perceptron(seed: int, *, normalised: bool) -> nn.Module:
    """Three layers, with LayerNorm or without."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norms = [nn.LayerNorm(24) if normalised else nn.Identity() for _ in range(2)]
        return nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(64, 24), norms[0], nn.ReLU()),
            *(nn.Linear(24, 24), norms[1], nn.ReLU()),
            nn.Linear(24, 10),
        )


def convolutions(seed: int, *, normalised: bool) -> nn.Module:
    """Two convolutions, with GroupNorm or without."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norms = [nn.GroupNorm(2, 8) if normalised else nn.Identity() for _ in range(2)]
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), norms[0], nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, stride=2, padding=1), norms[1], nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )


NETWORKS: dict[str, tuple[bool, Callable[[int], nn.Module]]] = {
    "perceptron, LayerNorm": (True, lambda seed: perceptron(seed, normalised=True)),
    "perceptron": (False, lambda seed: perceptron(seed, normalised=False)),
    "convolutions, GroupNorm": (True, lambda seed: convolutions(seed, normalised=True)),
    "convolutions": (False, lambda seed: convolutions(seed, normalised=False)),
    "residual, GroupNorm": (True, lambda seed: ResNet(1, 10, blocks=(1, 1), width=6, norm="group", seed=seed)),
    "vision transformer": (
        True,
        lambda seed: VisionTransformer(1, 8, 10, patch=2, width=16, depth=2, heads=2, seed=seed),
    ),
}


def cell(model: nn.Module, x: Tensor, y: Tensor, rows: tuple[Tensor, Tensor], algorithm: Algorithm) -> dict[str, Any]:
    """Verdicts of one linearisation around its critical step size, and what runs did.

    Args:
        model: The trained network.
        x: Inputs.
        y: Labels.
        rows: Of the forget and of the retain set.
        algorithm: The algorithm, without its step size.

    Returns:
        The critical step sizes, predicted and, where the grid brackets it, observed for each seed; and every setting with
        what was called, what happened and the error of the linearised outputs.
    """
    forget, retain = ((x[chosen], y[chosen]) for chosen in rows)
    problem = UnlearningProblem(model, forget, retain)
    report = stabkit.predict(model, forget, retain, algorithm=algorithm, mode="standard")
    preconditioner = algorithm.step_preconditioner(problem)
    settings = []
    for factor in STEP_FACTORS:
        lr = factor * report.critical_lr
        said = report.at(lr=lr)
        for seed in RUN_SEEDS:
            done = run(problem, algorithm.replace(lr=lr), preconditioner=preconditioner, seed=seed)
            settings.append({
                "lr": lr,
                "seed": seed,
                "called_diverging": said.probability >= 0.5,
                "probability": said.probability,
                "error": said.linearisation_error if math.isfinite(said.linearisation_error) else None,
                "diverged": done.diverged,
            })
    return {
        "critical_lr": report.critical_lr,
        "interval": list(report.critical_lr_interval),
        "observed": [_edge([s for s in settings if s["seed"] == seed]) for seed in RUN_SEEDS],
        "settings": settings,
    }


def _edge(settings: list[dict[str, Any]]) -> float | None:
    """Between the last step size that held and the first that did not; None where the grid does not bracket it."""
    first = next((place for place, s in enumerate(settings) if s["diverged"]), 0)
    return math.sqrt(settings[first - 1]["lr"] * settings[first]["lr"]) if first else None


def cells(seeds: range) -> Iterator[dict[str, Any]]:
    """All of them, one after the other."""
    split = digits()
    x, y = split.x_train, split.y_train
    for name, (normalised, make) in NETWORKS.items():
        for seed in seeds:
            model = train(make(seed), x, y, epochs=20, lr=1e-2, seed=seed)
            for what, chosen in (("class", one_class(y, CLASS)), ("random", random_fraction(y, SHARE, seed=seed))):
                for algorithm in (GradDiff(mix=MIX, steps=STEPS), AGU(mix=MIX, steps=STEPS)):
                    found = cell(model, x, y, (chosen.forget, chosen.retain), algorithm)
                    yield {
                        "network": name,
                        "normalised": normalised,
                        "seed": seed,
                        "deletion": what,
                        "algorithm": algorithm.name,
                        **found,
                    }


def main() -> None:
    """Predict and run every cell, and write down what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "normalised.json")
    parser.add_argument("--seeds", type=int, default=2, help="networks of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", stabkit.StabkitWarning)
    found = []
    for one in cells(range(options.seeds)):
        found.append(one)
        ratios = [None if edge is None else round(one["critical_lr"] / edge, 2) for edge in one["observed"]]
        print(one["network"], one["seed"], one["deletion"], one["algorithm"], ratios, flush=True)
    sides = {
        name: summary([s for one in found if one["normalised"] == wanted for s in one["settings"]])
        for name, wanted in (("normalised", True), ("plain", False))
    }
    result = {
        "cells": found,
        "verdicts": sides,
        "device": "cpu",
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_atomically(options.output, dumps(result) + "\n")
    print(json.dumps(sides))


if __name__ == "__main__":
    main()
