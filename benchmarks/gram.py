"""Per-sample curvature Gram, layer by layer, against the same matrix from vmap(jacrev) rows, in one run.

    python benchmarks/gram.py

writes benchmarks/results/gram.json. Every job runs in a process of its own on one thread, warmed up on two samples, so its
peak resident memory is its own; the parent takes the jobs of a case in turn, `--repeats` times, and reports medians. Ratios
of time are of the process's CPU seconds, which other load on the machine disturbs least; wall seconds are kept too. Both
sides give the inner products tr(H_i H_j) of the same samples, and the result holds their relative difference. The rows are
made as one calls it first ("rows", all samples at once) and at their best ("rows-chunked", a few samples at a time).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

import stabkit
from stabkit.curvature import curvature_gram
from stabkit.models import SmallCNN
from stabkit.problem import UnlearningProblem
from stabkit.samples import Samples

CLASSES = 10
JOBS = ("gram", "rows-chunked", "rows")
CASES = {  # network, samples, bytes for the Gram
    "small-cnn-64": ("small-cnn", 64, 2**26),
    "small-cnn-128": ("small-cnn", 128, 2**27),
    "resnet20-64": ("resnet20", 64, 2**27),
    "resnet20-64-256MiB": ("resnet20", 64, 2**28),
}
CHUNK = 8


class _Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet20() -> nn.Module:
    """ResNet-20 for 32 x 32 images, 272,000 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for out in (16, 32, 64):
        for index in range(3):
            layers.append(_Block(channels, out, 2 if index == 0 and out > 16 else 1))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def problem_of(case: str) -> UnlearningProblem:
    """A network with its first weights on random images; cost and memory do not depend on the values."""
    kind, m, _ = CASES[case]
    torch.manual_seed(0)
    model, shape = (resnet20(), (3, 32, 32)) if kind == "resnet20" else (SmallCNN(1, 28, CLASSES), (1, 28, 28))
    x, y = torch.randn(m + 2, *shape), torch.arange(m + 2) % CLASSES
    warnings.simplefilter("ignore")
    return UnlearningProblem(model.eval(), (x[:2], y[:2]), (x[2:], y[2:]))


def by_rows(problem: UnlearningProblem, samples: Samples, chunk: int) -> Tensor:
    """tr(H_i H_j) from the whole (m·C) x d matrix of factor rows."""

    def single(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return problem.outputs(parameters, sample.unsqueeze(0)).reshape(-1)

    rows: Tensor | None = None
    with torch.no_grad():
        for start in range(0, samples.size, chunk):
            inputs, targets = samples.batch(torch.arange(start, min(start + chunk, samples.size)))
            found = vmap(jacrev(single), in_dims=(None, 0))(problem.parameters, inputs)
            jacobian = torch.cat([found[name].flatten(2) for name in problem.parameters], 2)
            factors = problem.loss.factor_transpose(problem.outputs(problem.parameters, inputs), targets, jacobian)
            if rows is None:
                rows = torch.empty(samples.size, *factors.shape[1:])
            rows[start : start + factors.shape[0]] = factors
        flat = rows.flatten(0, 1)
        matrix = (flat @ flat.T).double()
        return matrix.view(samples.size, CLASSES, samples.size, CLASSES).square().sum((1, 3))


def resident(field: str) -> int:
    """Resident or peak resident memory of this process, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii")).group(1))


def measure(case: str, job: str, output: Path) -> None:
    """Run one job; print its seconds and peak bytes above what model and data take; keep its products."""
    torch.set_num_threads(1)
    problem = problem_of(case)
    _, m, memory = CASES[case]

    def work(samples: Samples) -> tuple[Tensor, int | None]:
        if job == "gram":
            gram = curvature_gram(problem, samples, memory=memory)
            return gram.products(), gram.passes
        return by_rows(problem, samples, CHUNK if job == "rows-chunked" else m), None

    work(problem.forget)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before, begin, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    products, passes = work(problem.retain)
    found = {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - begin,
        "peak_bytes": resident("VmHWM") - before,
        "passes": passes,
        "parameters": problem.size,
    }
    torch.save(products, output)
    print(json.dumps(found))


def compare(case: str, repeats: int) -> dict[str, object]:
    """All jobs of a case in turn, with ratios to ours."""
    runs: dict[str, list[dict[str, float]]] = {job: [] for job in JOBS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for job in JOBS:
                command = [sys.executable, __file__, "--measure", case, job, f"{folder}/{job}.pt"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[job].append(json.loads(done.stdout.splitlines()[-1]))
        ours, theirs = (torch.load(f"{folder}/{job}.pt") for job in ("gram", "rows-chunked"))
    median = {
        job: {
            key: statistics.median(run[key] for run in found) for key in ("cpu_seconds", "wall_seconds", "peak_bytes")
        }
        for job, found in runs.items()
    }
    kind, m, memory = CASES[case]
    return {
        "network": kind,
        "parameters": runs["gram"][0]["parameters"],
        "samples": m,
        "outputs_per_sample": CLASSES,
        "memory": memory,
        "passes": runs["gram"][0]["passes"],
        "median": median,
        "times_faster": {job: median[job]["cpu_seconds"] / median["gram"]["cpu_seconds"] for job in JOBS[1:]},
        "times_less_memory": {job: median[job]["peak_bytes"] / median["gram"]["peak_bytes"] for job in JOBS[1:]},
        "relative_difference": float((ours - theirs).norm() / theirs.norm()),
        "runs": runs,
    }


def main() -> None:
    """Compare every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gram.json")
    parser.add_argument("--measure", nargs=3, metavar=("CASE", "JOB", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], options.measure[1], Path(options.measure[2]))
        return
    result = {
        "cases": {case: compare(case, options.repeats) for case in options.cases},
        "repeats": options.repeats,
        "threads": 1,
        "device": "cpu",
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for case, found in result["cases"].items():
        print(case, json.dumps({key: found[key] for key in ("times_faster", "times_less_memory", "passes")}))


if __name__ == "__main__":
    main()
