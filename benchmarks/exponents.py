"""Exponents of every layer of a ResNet-18 with stabkit and with weightwatcher, in one run.

    OMP_NUM_THREADS=1 python benchmarks/exponents.py

writes benchmarks/results/exponents.json: the largest difference of exponents, and ratios of CPU seconds (weightwatcher's
over ours, medians of `--repeats` turns) for the whole table and for its two parts: eigenvalues (squared singular values by
SciPy, as weightwatcher finds them, against eigenvalues of the Gram matrix) and fits of the same spectra. Both sides use
double precision, and one thread; the whole is timed again by the clock, with a thread for every core. Ours
compares with shuffled copies only where the name says so. The weights are the initial ones, whose entries are uniform, and
the same with every entry scaled at random, which gives them heavy tails.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy
import torch
import weightwatcher
from threadpoolctl import threadpool_limits
from torch import nn
from weightwatcher.WW_powerlaw import WWFit

import stabkit
from stabkit.heavy_tail import EIGENVALUE_FLOOR, fit_power_law, layer_exponents
from stabkit.heavy_tail.layers import gram_eigenvalues
from stabkit.heavy_tail.matrices import WeightMatrix, weight_matrices
from stabkit.models import ResNet

WEIGHTS = ("initial", "heavy-tailed")
SHUFFLES = 9


def network(weights: str) -> nn.Module:
    """ResNet-18 with ten classes, 21 weight matrices or stacks of them."""
    model = ResNet(3, 10)
    if weights == "heavy-tailed":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.randn(parameter.shape, generator=generator).exp())
    return model


def by_weightwatcher(model: nn.Module) -> dict[str, float]:
    """Its exponents by layer name."""
    table = weightwatcher.WeightWatcher(model=model).analyze(pool=True)
    return {row["longname"]: row["alpha"] for row in table.to_dict("records")}


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and its result; weightwatcher prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        begin = time.process_time()
        result = function()
        return time.process_time() - begin, result


def clocked(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Wall-clock seconds of ours with a thread for every core, of weightwatcher with one and with as many, and their ratio.

    The quicker of weightwatcher's two counts: threads make its small singular value problems slower on some machines.
    """
    threads = os.cpu_count() or 1
    jobs = {"ours": (threads, ours), "weightwatcher": (threads, theirs), "weightwatcher_one_thread": (1, theirs)}
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, (count, job) in jobs.items():
            torch.set_num_threads(count)
            with threadpool_limits(count), contextlib.redirect_stdout(io.StringIO()):
                begin = time.perf_counter()
                job()
                taken[name].append(time.perf_counter() - begin)
    torch.set_num_threads(1)
    median = {name: statistics.median(values) for name, values in taken.items()}
    quicker = min(median["weightwatcher"], median["weightwatcher_one_thread"])
    return {"threads": threads, "times_faster": quicker / median["ours"], "seconds": median}


def compare(weights: str, repeats: int) -> dict[str, Any]:
    """Both programs on one set of weights, in turn."""
    model = network(weights)
    other = copy.deepcopy(model)  # weightwatcher works on the model it is given
    stacks = [e.matrices().double() for e in weight_matrices(model) if isinstance(e, WeightMatrix)]
    spectra = [gram_eigenvalues(stack).numpy() for stack in stacks]
    kept = [values[values > EIGENVALUE_FLOOR] for values in spectra]
    jobs: dict[str, Callable[[], Any]] = {
        "whole_ours": lambda: layer_exponents(model, shuffles=0),
        "whole_weightwatcher": lambda: by_weightwatcher(other),
        "eigenvalues_ours": lambda: [gram_eigenvalues(stack) for stack in stacks],
        "eigenvalues_weightwatcher": lambda: [
            scipy.linalg.svd(matrix.numpy(), compute_uv=False) for stack in stacks for matrix in stack
        ],
        "fits_ours": lambda: [fit_power_law(values) for values in kept],
        "fits_weightwatcher": lambda: [WWFit(values) for values in kept],
        "whole_ours_with_shuffles": lambda: layer_exponents(model, shuffles=SHUFFLES),
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, job in jobs.items():
            spent, results[name] = seconds(job)
            taken[name].append(spent)
    median = {name: statistics.median(values) for name, values in taken.items()}
    ours = {row.name: row.exponent for row in results["whole_ours"].rows}
    theirs = results["whole_weightwatcher"]
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"the programs read different layers: {sorted(ours.keys() ^ theirs.keys())}")
    return {
        "layers": len(ours),
        "largest_difference": max(abs(ours[name] - theirs[name]) for name in ours),
        "exponents": [min(ours.values()), max(ours.values())],
        "times_faster": {
            part: median[f"{part}_weightwatcher"] / median[f"{part}_ours"] for part in ("whole", "eigenvalues", "fits")
        },
        "shuffles": SHUFFLES,
        "times_faster_with_shuffles": median["whole_weightwatcher"] / median["whole_ours_with_shuffles"],
        "by_the_clock": clocked(jobs["whole_ours"], jobs["whole_weightwatcher"], repeats),
        "cpu_seconds": median,
    }


def main() -> None:
    """Compare on every set of weights and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "exponents.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # weightwatcher's
    torch.set_num_threads(1)
    result = {
        "network": "ResNet-18",
        "weights": {weights: compare(weights, options.repeats) for weights in WEIGHTS},
        "repeats": options.repeats,
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "versions": {
            "stabkit": stabkit.__version__,
            "weightwatcher": weightwatcher.__version__,
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for weights, found in result["weights"].items():
        print(weights, json.dumps({key: found[key] for key in ("largest_difference", "times_faster")}))


if __name__ == "__main__":
    main()
