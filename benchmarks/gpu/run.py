"""The GPU experiments of stabkit: predict first, then run. ResNet-18, a vision transformer and a language model.

    PYTHONPATH=. STABKIT_DATA=... python benchmarks/gpu/run.py --folder OUT --minutes 9
    PYTHONPATH=. STABKIT_DATA=... python benchmarks/gpu/run.py --folder OUT --scale small --device cpu --minutes 15

The second takes the same way on one core. Works through jobs in order of importance and stops beginning them when the
minutes are used up; called again with the same folder it goes on where it was. Each job leaves one file. What they
left is gathered in OUT/results.json, OUT/predictions.json and, as a page, OUT/page.md. Of a folder these two files
alone need to be kept: called on a folder that holds no more, it goes on after what they tell, and trains anew the
networks that further jobs need. Estimates are of an H200; where the jobs so far took longer, the others are expected to.

Every real run is preceded by predictions of it that are on disk, with time and SHA-256. BatchNorm is frozen, the
library's default, in runs and predictions alike, but for one cell. Networks are of seed 0, retrained ones of seed
100. Needs PyTorch, NumPy, SciPy, scikit-learn, joblib and tqdm; curvlinops and weightwatcher are timed where they are
installed.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import speed, tables
from benchmarks.gpu.scale import SCALES, Scale
from benchmarks.gpu.store import Store, now
from benchmarks.gpu.tasks import GOLD_SEED, Task
from benchmarks.gpu.unlearning import GOLDS, PUBLISHED, Cell, cell, published, quiet

ALGORITHMS = ("graddiff", "salun", "sfr_on", "scrub", "ga", "agu", "sragu")
# Minutes that a cell is expected to take at the full scale, and what its algorithm makes of that on ResNet-18.
CELL_MINUTES = {"resnet18": 1.6, "vit": 1.0, "lm": 0.8, "lm-gpt2": 2.5}
ALGORITHM_COST = {"graddiff": 1.0, "salun": 1.4, "sfr_on": 1.3, "scrub": 1.1, "ga": 0.7, "agu": 1.4, "sragu": 1.5}
SMALL_MINUTES = 0.5  # of any job at the small scale


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to do and keep.

    Attributes:
        key: Name, and that of its file.
        task: The task it is about.
        minutes: How long it is expected to take at the full scale on an H200; estimated, not measured.
        needs: Jobs whose results, and networks if they train any, it needs.
        make: Does it.
    """

    key: str
    task: str
    minutes: float
    needs: tuple[str, ...]
    make: Callable[[Store, Task], dict[str, Any]]


def jobs() -> list[Job]:
    """All jobs, the most important first: a little of everything, then the rest of each."""
    return [
        _train("resnet18", 0.8),
        _gold("resnet18", "random10", 0.8),
        _cell("resnet18", "random10", "graddiff"),
        *map(_speed, ("predictions", "exponents")),
        *map(_published, ("neggrad-torchunlearn", "scrub-torchunlearn", "sfr_on-paper")),
        _train("lm", 0.5),
        _cell("lm", "people", "graddiff"),
        *map(_published, ("ga-open-unlearning", "graddiff-open-unlearning")),
        _train("vit", 1.2),
        _cell("vit", "random10", "graddiff"),
        *(_cell("resnet18", "random10", name) for name in ("salun", "sfr_on", "scrub", "ga")),
        *map(_published, ("salun-torchunlearn", "ga-sfr_on-paper")),
        *map(_speed, ("products", "precision", "spectrum")),
        *(_cell("lm", "people", name) for name in ("npo", "ga")),
        _cell("vit", "class", "graddiff"),
        _train("lm-gpt2", 1.0),
        _cell("lm-gpt2", "people", "graddiff"),
        *(_cell("resnet18", "random10", name) for name in ("agu", "sragu")),
        _cell("lm", "people", "graddiff", mode="thorough", minutes=2.5),
        _cell("resnet18", "random10", "graddiff", batchnorm="batch", minutes=2.5),
        _gold("resnet18", "class", 0.8),
        *(_cell("resnet18", "class", name) for name in ALGORITHMS),
        _cell("vit", "class", "graddiff", mode="thorough", minutes=3.0),
        *(_cell("lm-gpt2", "people", name) for name in ("npo", "ga")),
        _gold("resnet18", "random50", 0.6),
        *(_cell("resnet18", "random50", name) for name in ALGORITHMS),
        *(_cell("vit", "random10", name) for name in ALGORITHMS[1:]),
        _cell("resnet18", "class", "graddiff", mode="thorough", minutes=7.0),
    ]


def _train(task: str, minutes: float) -> Job:
    """Train a task's network on everything."""
    return Job(key=f"train-{task}", task=task, minutes=minutes, needs=(), make=partial(_trained, deletion=None))


def _gold(task: str, deletion: str, minutes: float) -> Job:
    """Train it on what a deletion retains."""
    return Job(
        key=f"gold-{task}-{deletion}", task=task, minutes=minutes, needs=(), make=partial(_trained, deletion=deletion)
    )


def _trained(store: Store, task: Task, *, deletion: str | None) -> dict[str, Any]:
    """Train and keep the weights."""
    started = time.perf_counter()
    model, found = task.trained(0 if deletion is None else GOLD_SEED, deletion)
    store.save_weights(f"train-{task.name}" if deletion is None else f"gold-{task.name}-{deletion}", model)
    how = task.scale.training[task.name]
    return {
        "kind": "training",
        "task": task.name,
        "deletion": deletion,
        **found,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": how.epochs,
        "lr": how.lr,
        "batch_size": how.batch_size,
        "optimiser": how.optimiser,
        "train_seconds": time.perf_counter() - started,
    }


def _cell(
    task: str,
    deletion: str,
    algorithm: str,
    *,
    mode: str = "standard",
    batchnorm: str = "frozen",
    minutes: float | None = None,
) -> Job:
    spec = Cell(task=task, deletion=deletion, algorithm=algorithm, mode=mode, batchnorm=batchnorm)
    key, expected = f"cell-{spec.key}", minutes
    if expected is None:
        # Per-sample gradients of the whole forget set are what takes longer where it is half of the data.
        share = 2.0 if deletion == "random50" and algorithm in {"salun", "agu", "sragu"} else 1.0
        expected = CELL_MINUTES[task] * (ALGORITHM_COST[algorithm] if task == "resnet18" else 1.0) * share
    make = partial(cell, spec=spec, job=key)
    return Job(key=key, task=task, minutes=expected, needs=_networks(task, deletion), make=make)


def _networks(task: str, deletion: str) -> tuple[str, ...]:
    """Jobs that train what a deletion's runs start from and are held against."""
    return (f"train-{task}", *([f"gold-{task}-{deletion}"] if (task, deletion) in GOLDS else []))


def _published(name: str) -> Job:
    setting = next(p for p in PUBLISHED if p.name == name)
    key, minutes = f"published-{name}", 1.5 if setting.task == "resnet18" else 0.7
    make = partial(published, setting=setting, job=key)
    return Job(key=key, task=setting.task, minutes=minutes, needs=_networks(setting.task, setting.deletion), make=make)


def _speed(part: str) -> Job:
    make, minutes = speed.PARTS[part], 2.0 if part == "predictions" else 0.6
    return Job(key=f"speed-{part}", task="resnet18", minutes=minutes, needs=("train-resnet18",), make=make)


def work(
    store: Store,
    scale: Scale,
    wanted: list[Job],
    *,
    minutes: float,
    retry: bool = False,
    say: Callable[[str], object] = print,
) -> list[str]:
    """Do what is missing, as far as the minutes reach.

    Args:
        store: Where results lie.
        scale: Sizes.
        wanted: Jobs, the most important first.
        minutes: What this call may take; a job that is expected to take longer than what is left is not begun.
        retry: Whether to try again what failed before.
        say: Told of every job.

    Returns:
        Keys of the jobs that were done.
    """
    begun = time.perf_counter()
    tasks: dict[str, Task] = {}
    finished = []

    def expected(job: Job) -> float:
        return (job.minutes if scale.name == "full" else SMALL_MINUTES) * store.pace()

    for job in wanted:
        left = minutes - (time.perf_counter() - begun) / 60
        needed = any(
            job.key in other.needs
            and not store.done(other.key)
            and (retry or not store.failed(other.key))
            and expected(job) + expected(other) <= left
            for other in wanted
        )
        # A network that is lost is trained anew where something is left to be done with it.
        if store.ready(job.key) or (store.done(job.key) and not needed):
            continue
        missing = [need for need in job.needs if not store.ready(need)]
        reason = ""
        if store.failed(job.key) and not retry:
            reason = "failed before"
        elif missing:
            reason = f"needs {missing[0]}"
        elif expected(job) > left:
            reason = f"would take some {expected(job):.1f} minutes of the {left:.1f} left"
        if reason:
            say(f"-- {job.key}: {reason}")
            continue
        tasks.setdefault(job.task, Task(job.task, scale, store.device))
        started, start = now(), time.perf_counter()
        try:
            content = job.make(store, tasks[job.task])
        except Exception as error:  # one job's trouble is no other's; it is kept to be read
            store.write_failure(job.key, traceback.format_exc())
            say(f"!! {job.key}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            seconds = time.perf_counter() - start
            estimate = job.minutes if scale.name == "full" else SMALL_MINUTES
            store.write(job.key, content, started=started, seconds=seconds, minutes=estimate)
            finished.append(job.key)
            say(f"ok {job.key}: {seconds:.1f} s")
        gc.collect()
        if store.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        store.pack()
    return finished


def main() -> None:
    """Do jobs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where results, predictions and weights lie")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long this call may take")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--only", nargs="+", help="beginnings of the names of jobs to do; all when left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    parser.add_argument("--list", action="store_true", help="name the jobs and do nothing")
    options = parser.parse_args()
    wanted = [job for job in jobs() if not options.only or job.key.startswith(tuple(options.only))]
    if options.list:
        for job in wanted:
            print(f"{job.key}: {job.minutes:g} min")
        return
    quiet()
    store = Store(options.folder, options.scale, torch.device(options.device))
    work(
        store,
        SCALES[options.scale],
        wanted,
        minutes=options.minutes,
        retry=options.retry,
        say=partial(print, flush=True),
    )
    store.pack()
    tables.write(options.folder, options.folder / "page.md")


if __name__ == "__main__":
    main()
