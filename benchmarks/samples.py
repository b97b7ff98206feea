"""How many samples a linearisation needs on whole data sets, and what its directions should be drawn from.

    STABKIT_DATA=... python benchmarks/samples.py            # some half an hour on one core

Trains a small CNN on all of MNIST and of CIFAR-10, deletes a random tenth or a class, and predicts the critical step size of
GradDiff from linearisations of several sizes, three seeds each, and from staged rollouts of the sizes that `predict` takes;
then finds the real one, of three seeds of real runs. Into benchmarks/results/samples.json.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stabkit
from stabkit._serialise import dumps, write_atomically
from stabkit.algorithms import GradDiff
from stabkit.boundary import critical_lr, staged_critical_lr
from stabkit.curvature import linearise
from stabkit.datasets import Deletion, TensorSplit, cifar10, mnist
from stabkit.deletion import one_class, random_fraction
from stabkit.models import SmallCNN
from stabkit.modes import MODES
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.training import train

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
STEPS, BATCH, MIX = 150, 64, 0.3
FACTOR, HALVINGS = 1.5, 3  # of the search for the real boundary
FORGOTTEN = 3  # the class

SETS: dict[str, tuple[Callable[..., TensorSplit], int]] = {"mnist": (mnist, 5), "cifar10": (cifar10, 12)}  # and epochs
DELETIONS: dict[str, Callable[[Tensor], Deletion]] = {
    "random10": lambda y: random_fraction(y, 0.1),
    "class": lambda y: one_class(y, FORGOTTEN),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """One linearisation's size.

    Attributes:
        name: What it is called; a mode's if it is that mode's.
        rank: Directions.
        retain: Retain samples.
        forget: Forget samples.
        drawn_from: Samples of each set that directions are drawn from; all when None.
    """

    name: str
    rank: int
    retain: int
    forget: int
    drawn_from: int | None = None


def _of_mode(name: str) -> Size:
    mode = MODES[name]
    assert mode.rank is not None
    assert mode.retain_samples is not None
    assert mode.forget_samples is not None
    return Size(
        name=name,
        rank=mode.rank,
        retain=mode.retain_samples,
        forget=mode.forget_samples,
        drawn_from=mode.sketch_samples,
    )


# Beside the modes: about their cost with directions drawn from all samples, and more samples than either has.
SIZES = (
    Size(name="few, drawn from all", rank=40, retain=128, forget=96),
    _of_mode("fast"),
    Size(name="some, drawn from all", rank=100, retain=512, forget=256),
    _of_mode("standard"),
    Size(name="many", rank=100, retain=2048, forget=1024, drawn_from=96),
)


def real_boundary(problem: UnlearningProblem, algorithm: GradDiff, guess: float, seed: int) -> float:
    """Smallest step size, to a factor of 1.06, at which a real run diverges, walking from a guess."""

    def diverges(lr: float) -> bool:
        return stabkit.run(problem, algorithm.replace(lr=lr), seed=seed).diverged

    here, beyond = guess, diverges(guess)
    while True:
        following = here / FACTOR if beyond else here * FACTOR
        if diverges(following) != beyond:
            break
        here = following
    low, high = sorted((here, following))
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if diverges(middle) else (middle, high)
    return high


def predicted(problem: UnlearningProblem, algorithm: GradDiff, size: Size, seed: int) -> dict[str, Any]:
    """One linearisation's critical step size; that of staged rollouts too, where a mode has its size."""
    start = time.process_time()
    network = linearise(
        problem,
        Identity(),
        rank=size.rank,
        retain_samples=size.retain,
        forget_samples=size.forget,
        sketch_samples=size.drawn_from,
        seed=seed,
    )
    batches = (BATCH, BATCH)
    found = critical_lr(network, algorithm, batch_sizes=batches, seeds=SEEDS, guess=0.1)
    row = {
        "seed": seed,
        "critical_lr": found.value,
        "captured": network.captured,
        "gradient_equivalents": network.gradient_equivalents,
        "seconds": time.process_time() - start,
    }
    if size.name == "standard":
        staged, _ = staged_critical_lr(problem, network, algorithm, batch_sizes=batches, seed=seed, guess=found.value)
        row["staged_critical_lr"] = staged.value
    return row


def case(name: str, deletion: str, trained: tuple[torch.nn.Module, TensorSplit]) -> dict[str, Any]:
    """Every prediction of one deletion, then the real runs."""
    model, split = trained
    x, y = split.x_train, split.y_train
    rows = DELETIONS[deletion](y)
    problem = UnlearningProblem(model, (x[rows.forget], y[rows.forget]), (x[rows.retain], y[rows.retain]))
    algorithm = GradDiff(mix=MIX, steps=STEPS, batch_size=BATCH)
    sizes = []
    for size in SIZES:
        found = [predicted(problem, algorithm, size, seed) for seed in SEEDS]
        sizes.append({**vars(size), "predictions": found})
        print(name, deletion, size.name, [f"{row['critical_lr']:.3g}" for row in found], flush=True)
    guess = statistics.median(row["critical_lr"] for row in sizes[-1]["predictions"])
    real = [real_boundary(problem, algorithm, guess, seed) for seed in SEEDS]
    print(name, deletion, "real", [f"{lr:.3g}" for lr in real], flush=True)
    return {
        "dataset": name,
        "deletion": deletion,
        "retain": problem.retain.size,
        "forget": problem.forget.size,
        "retain_loss": problem.retain_loss,
        "sizes": sizes,
        "real": real,
    }


def main() -> None:
    """Run the benchmark and store its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", stabkit.StabkitWarning)
    cases = []
    for name, (load, epochs) in SETS.items():
        split = load(seed=0)
        model = SmallCNN(split.x_train.shape[1], split.x_train.shape[2], 10, seed=0)
        trained = train(model, split.x_train, split.y_train, epochs=epochs, lr=3e-3, seed=0).eval()
        cases += [case(name, deletion, (trained, split)) for deletion in DELETIONS]
    versions = {"stabkit": stabkit.__version__, "torch": torch.__version__, "python": platform.python_version()}
    result = {
        "versions": versions,
        "seeds": list(SEEDS),
        "steps": STEPS,
        "batch": BATCH,
        "mix": MIX,
        "epochs": {name: epochs for name, (_, epochs) in SETS.items()},
        "cases": cases,
    }
    write_atomically(RESULTS / "samples.json", dumps(result) + "\n")


if __name__ == "__main__":
    main()
