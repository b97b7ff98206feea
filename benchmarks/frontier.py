"""What a map of 20 x 20 step sizes and mixes costs, exact and rolled out, against its rivals.

    python benchmarks/frontier.py

writes benchmarks/results/frontier.json. One thread, CPU seconds. On a trained digits CNN at growing ranks: the
linearisation, the map of mean-square growth over 400 settings, one setting at a time by `mean_square`, and one of them by
a dense eigenproblem where the rank lets one form it; then the same settings rolled out, and one real run. On the costliest
networks of `stabkit bench verify` that need no further data: `predict`, with its spectrum as it comes and of few samples as
`tune` has it, and `report.frontier()`, three seeds each, against one real run of as many steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stabkit
from stabkit.algorithms import GradDiff
from stabkit.bench.cells import CELLS, prepared
from stabkit.curvature import linearise
from stabkit.datasets import digits
from stabkit.deletion import one_class
from stabkit.frontier import frontier
from stabkit.models import SmallCNN
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.stability import LinearDynamics, mean_square, stability_map
from stabkit.training import train
from stabkit.tune import SPECTRUM_SAMPLES

POINTS = 20
CLASS = 3
STEPS = 100
WHOLE_CELLS = ("digits-vit-random10-graddiff", "digits-resnet-random10-graddiff")
WHOLE_STEPS = 500  # of a short run as they are published


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the CPU seconds it took."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def dynamics_of(problem: UnlearningProblem, rank: int) -> tuple[Any, LinearDynamics]:
    """Linearisation and process at a rank."""
    network = linearise(problem, Identity(), rank=rank)
    retain, forget = network.retain.factors(problem.loss), network.forget.factors(problem.loss)
    return network, LinearDynamics(
        retain=retain, forget=forget, mix=0.5, batch_sizes=(64, 64), sampling="without_replacement"
    )


def axes_of(dynamics: LinearDynamics, points: int) -> dict[str, np.ndarray]:
    """Step sizes around 2/λ_max(H_R) and mixes."""
    limit = 2 / float(torch.linalg.eigvalsh(dynamics.means[0])[-1])
    return {"lr": np.geomspace(limit / 100, limit * 3, points), "mix": np.linspace(0, 1, points)}


def dense(dynamics: LinearDynamics, lr: float) -> float:
    """ρ by an eigenproblem of order r²."""
    h = [part.matrices().numpy() for part in (dynamics.retain, dynamics.forget)]
    r = dynamics.rank
    eye = np.eye(r)
    d = dynamics.mean_hessian().numpy()
    step = np.kron(eye - lr * d, eye - lr * d)
    for weight, part in zip(dynamics.noise_weights(), h, strict=True):
        mean = part.mean(0)
        spread = np.einsum("iab,icd->acbd", part, part).reshape(r * r, r * r) / part.shape[0] - np.kron(mean, mean)
        step += lr**2 * weight * spread
    return float(np.linalg.eigvalsh(step)[-1])


def whole(key: str, steps: int) -> dict[str, Any]:
    """Everything between a trained network and the rolled-out map, against one run."""
    cell = next(cell for cell in CELLS if cell.key == key)
    trained, deletion = prepared(cell, 0)
    x, y = trained.split.x_train, trained.split.y_train
    forget, retain = ((x[rows], y[rows]) for rows in (deletion.forget, deletion.retain))
    algorithm = GradDiff(lr=1e-3, mix=0.1, steps=steps, batch_size=64)  # holds, so that the run takes all its steps
    data = (trained.model, forget, retain)
    _, predicting = timed(lambda: stabkit.predict(*data, algorithm=algorithm, mode="standard"))
    report, lean = timed(
        lambda: stabkit.predict(*data, algorithm=algorithm, mode="standard", spectrum_samples=SPECTRUM_SAMPLES)
    )
    found, mapping = timed(lambda: report.frontier())
    fast, fast_predicting = timed(lambda: stabkit.predict(*data, algorithm=algorithm, mode="fast"))
    _, fast_mapping = timed(lambda: fast.frontier())
    problem = UnlearningProblem(*data)
    _, linearising = timed(lambda: linearise(problem, Identity()))  # as `predict` does
    ran, real = timed(lambda: stabkit.run(problem, algorithm, seed=0))
    if ran.diverged:
        raise RuntimeError(f"{key}: the run must take all its steps to be compared with")
    return {
        "cell": key,
        "parameters": problem.size,
        "settings": found.probability.size,
        "seeds": 3,
        "steps": steps,
        "predict_seconds": predicting,
        "lean_predict_seconds": lean,
        "linearisation_seconds": linearising,
        "map_seconds": mapping,
        "fast_predict_seconds": fast_predicting,
        "fast_map_seconds": fast_mapping,
        "run_seconds": real,
    }


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "frontier.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    chosen = one_class(data.y_train, CLASS)
    forget, retain = ((data.x_train[i], data.y_train[i]) for i in (chosen.forget, chosen.retain))
    model = train(SmallCNN(1, 8, 10), data.x_train, data.y_train, epochs=30, lr=3e-3)
    problem = UnlearningProblem(model, forget, retain)
    ranks: list[dict[str, Any]] = []
    for rank in options.ranks:
        (network, dynamics), decomposition = timed(lambda r=rank: dynamics_of(problem, r))
        axes = axes_of(dynamics, options.points)
        found, seconds = timed(lambda d=dynamics, a=axes: stability_map(d, a))
        row = {
            "rank": network.rank,
            "captured": network.captured,
            "decomposition_seconds": decomposition,
            "map_seconds": seconds,
            "applications": found.applications,
            "largest_residual": float(found.residual.max()),
        }
        generator = np.random.default_rng(0)
        errors, single = [], []
        for i, j in generator.integers(0, options.points, (5, 2)):
            one, spent = timed(
                lambda d=dynamics, f=found, i=i, j=j: mean_square(d.at(float(f.values[1][j])), float(f.values[0][i]))
            )
            single.append(spent)
            errors.append(abs(one.radius - float(found.radius[i, j])) / one.radius)
        row |= {"seconds_of_one_setting": float(np.mean(single)), "largest_difference": float(max(errors))}
        if rank <= 50:
            lr = float(axes["lr"][-2])
            radius, spent = timed(lambda d=dynamics, lr=lr: dense(d, lr))
            row |= {"dense_seconds": spent, "dense_difference": abs(radius - mean_square(dynamics, lr).radius) / radius}
        print(json.dumps(row), flush=True)
        ranks.append(row)
    algorithm = GradDiff(lr=0.01, mix=0.5, steps=STEPS, batch_size=64)
    grid = {name: values.tolist() for name, values in axes.items()}
    _, rolled = timed(lambda: frontier(network, algorithm, **grid, batch_sizes=(64, 64), seeds=[0]))
    _, real = timed(lambda: stabkit.run(problem, algorithm, seed=0))
    result = {
        "settings": options.points**2,
        "parameters": problem.size,
        "samples": network.retain.samples + network.forget.samples,
        "ranks": ranks,
        "rollout_seconds": rolled,
        "real_run_seconds": real,
        "whole": [whole(key, WHOLE_STEPS) for key in WHOLE_CELLS],
        "device": platform.processor() or platform.machine(),
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "seed": 0,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
