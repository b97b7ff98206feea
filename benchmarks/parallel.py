"""Hessian products over one rank and over two, each with one thread: how much a second process brings.

    python benchmarks/parallel.py

writes benchmarks/results/parallel.json. About a minute on two cores.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

import stabkit
from stabkit.curvature import HessianOperator
from stabkit.models import ResNet
from stabkit.parallel import DataParallel
from stabkit.problem import UnlearningProblem

SAMPLES = 128
PRODUCTS = 6


def measure(rank: int, ranks: int, port: int, queue: Any) -> None:
    """Time products on one rank; rank 0 reports."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES + 2, 3, 32, 32, generator=g), torch.randint(0, 10, (SAMPLES + 2,), generator=g)
    model = ResNet(3, 10, blocks=(3, 3, 3), width=16).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stabkit.UntrainedModelWarning)
        problem = UnlearningProblem(model, (x[:2], y[:2]), (x[2:], y[2:]))
    operator = HessianOperator(problem, problem.retain, memory="3GB", parallel=DataParallel())
    v = torch.randn(problem.size, generator=g)
    operator @ v
    times = []
    for _ in range(PRODUCTS):
        distributed.barrier()
        start = time.perf_counter()
        result = operator @ v
        times.append(time.perf_counter() - start)
    if rank == 0:
        queue.put((min(times), result.double().norm().item(), operator.kept))
    distributed.barrier()
    distributed.destroy_process_group()


def launch(ranks: int) -> tuple[float, float, bool]:
    """Best seconds of a product, its norm, and whether graphs were kept."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=measure, args=(rank, ranks, port, queue)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = queue.get(timeout=600)
    for process in processes:
        process.join()
    return found


def main() -> None:
    """Measure one rank, two, and one again, and write the ratio down."""
    (before, norm, kept), (two, norm_two, _), (after, _, _) = launch(1), launch(2), launch(1)
    one = min(before, after)
    result = {
        "model": "ResNet-20",
        "samples": SAMPLES,
        "graphs_kept": kept,
        "seconds_one_rank": one,
        "seconds_two_ranks": two,
        "speedup": one / two,
        "relative_difference": abs(norm - norm_two) / norm,
        "cores": os.cpu_count(),
        "device": platform.processor() or platform.machine(),
        "versions": {"stabkit": stabkit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "seed": 0,
    }
    print(json.dumps(result, indent=1))
    path = Path(__file__).parent / "results" / "parallel.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
