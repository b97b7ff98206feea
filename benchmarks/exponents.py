"""Exponents of every layer of a ResNet-18 with stabkit and with weightwatcher, in one run.

    OMP_NUM_THREADS=1 python benchmarks/exponents.py

writes benchmarks/results/exponents.json: the largest difference of exponents, and ratios of CPU seconds (weightwatcher's
over ours, medians of `--repeats` turns) for

- the exponents: our whole table against weightwatcher's without the edge of the random bulk and the spikes beyond it, and
  its two parts: eigenvalues (squared singular values by SciPy, as weightwatcher finds them, against eigenvalues of the Gram
  matrix) and fits of the same spectra;
- the table: the same of ours against weightwatcher's with that edge and those spikes (`mp_fit`), which ours always has;
- the table with a test: both with shuffled weights beside it, one copy by weightwatcher (`randomize`), by ours as many as
  decide whether a layer is trusted, up to 9.

Both sides use double precision, and one thread; the first two are timed again by the clock, with a thread for every core.
The weights are the initial ones, whose entries are uniform, and the same with every entry scaled at random, which gives
them heavy tails.
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


def by_weightwatcher(model: nn.Module, **asked: bool) -> dict[str, dict[str, Any]]:
    """Its table by layer name; `asked` is what else this is to hold."""
    table = weightwatcher.WeightWatcher(model=model).analyze(pool=True, **asked)
    return {row["longname"]: row for row in table.to_dict("records")}


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
        "table_weightwatcher": lambda: by_weightwatcher(other, mp_fit=True),
        "tested_weightwatcher": lambda: by_weightwatcher(other, mp_fit=True, randomize=True),
        "eigenvalues_ours": lambda: [gram_eigenvalues(stack) for stack in stacks],
        "eigenvalues_weightwatcher": lambda: [
            scipy.linalg.svd(matrix.numpy(), compute_uv=False) for stack in stacks for matrix in stack
        ],
        "fits_ours": lambda: [fit_power_law(values) for values in kept],
        "fits_weightwatcher": lambda: [WWFit(values) for values in kept],
        "tested_ours": lambda: layer_exponents(model, shuffles=SHUFFLES),
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, job in jobs.items():
            spent, results[name] = seconds(job)
            taken[name].append(spent)
    median = {name: statistics.median(values) for name, values in taken.items()}
    ours = {row.name: row for row in results["whole_ours"].rows}
    theirs = results["table_weightwatcher"]
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"the programs read different layers: {sorted(ours.keys() ^ theirs.keys())}")
    pairs = {
        "exponents": ("whole_ours", "whole_weightwatcher"),
        "eigenvalues": ("eigenvalues_ours", "eigenvalues_weightwatcher"),
        "fits": ("fits_ours", "fits_weightwatcher"),
        "table": ("whole_ours", "table_weightwatcher"),
        "table_with_test": ("tested_ours", "tested_weightwatcher"),
    }
    return {
        "layers": len(ours),
        "largest_difference": max(abs(row.exponent - theirs[name]["alpha"]) for name, row in ours.items()),
        "exponents": [reach(row.exponent for row in ours.values()) for reach in (min, max)],
        # Beside the largest eigenvalue, as weightwatcher halves those of convolutions.
        "edges": [
            reach(
                row.mp_edge / row.lambda_max / (theirs[name]["bulk_max"] / theirs[name]["lambda_max"])
                for name, row in ours.items()
            )
            for reach in (min, max)
        ],
        "times_faster": {part: median[theirs] / median[ours] for part, (ours, theirs) in pairs.items()},
        "shuffles": SHUFFLES,
        "by_the_clock": {
            "exponents": clocked(*(jobs[name] for name in pairs["exponents"]), repeats),
            "table": clocked(*(jobs[name] for name in pairs["table"]), 1),  # half a minute of weightwatcher's each
        },
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
