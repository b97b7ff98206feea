"""The GPU experiments of stabkit: predict first, then run. ResNet-18, a vision transformer and a language model.

    PYTHONPATH=. STABKIT_DATA=... python benchmarks/gpu/run.py --folder OUT --minutes 9 --workers 6
    PYTHONPATH=. STABKIT_DATA=... python benchmarks/gpu/run.py --folder OUT --minutes 150 --scale reduced --workers 2

The second takes the same way on a CPU with narrow networks and a fifth of the images; `--scale small`, with tiny ones and
some hundred, only shows that every job runs. The full scale is refused where there is no GPU. Works through jobs in order
of importance and stops beginning them when the minutes are used up; called again with the same folder it goes on where it
was. Each job leaves one file. What they left is gathered in OUT/results.json, OUT/predictions.json and, as a page,
OUT/page.md. Of a folder these two files alone need to be kept: called on a folder that holds no more, it goes on after what
they tell, and trains anew the networks that further jobs need. Estimates are of an H200; where the jobs so far took longer,
the others are expected to.

Several workers fill the device, which waits for the next kernel most of the time where batches are small. On NVIDIA's GPUs
start its multi-process service before (`nvidia-cuda-mps-control -d`): without it processes take turns at the device, and
what consists of many small operations becomes very slow. What is timed is done alone. Two calls may share a folder and a
GPU if `--only` gives them jobs of different networks and `--memory` a share of its memory each. Where the data have to be
carried to the GPU, `shards.py` packs them to 58 %.

Every real run is preceded by predictions of it that are on disk, with time and SHA-256. BatchNorm is frozen, the
library's default, in runs and predictions alike, but for one cell. Networks are of seed 0, retrained ones of seed
100. Every result has its `seeds`: of training the network's, of a cell those of its runs, which draw with 777 more, and
otherwise all that its network, vectors, rollouts and runs were made with. Needs PyTorch, NumPy, SciPy, scikit-learn,
joblib, threadpoolctl and tqdm; curvlinops and weightwatcher are timed where they are installed.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from benchmarks.gpu import speed, tables
from benchmarks.gpu.scale import SCALES, Scale
from benchmarks.gpu.store import Store, now
from benchmarks.gpu.tasks import GOLD_SEED, Task
from benchmarks.gpu.unlearning import GOLDS, PUBLISHED, Cell, cell, published, quiet

ALGORITHMS = ("graddiff", "sfr_on", "salun", "scrub", "ga", "agu", "sragu")
# Minutes that jobs are expected to take at the full scale with six of them at once.
TRAIN_MINUTES = {"resnet18": 2.0, "vit": 2.2, "lm": 0.7, "lm-gpt2": 1.2}
MIX_MINUTES = {"resnet18": 2.0, "vit": 1.6, "lm": 1.0, "lm-gpt2": 0.8}  # of a cell, for each mix
SPEED_MINUTES = {
    "sfr_on": 1.0,
    "predictions": 2.8,
    "exponents": 0.2,
    "products": 0.4,
    "precision": 0.3,
    "spectrum": 0.4,
    "steps": 0.3,
    "compiled": 6.0,  # eight compilations
}
# Of the vectors that `speed.py` draws; its network is of seed 0, and its rollouts count from there.
VECTOR_SEEDS = {"products": (1,), "precision": (2,), "compiled": (1,)}
WORKERS_MEMORY = 0.9  # of an accelerator's memory, over all worker processes, where the call has it to itself
WORKER_BYTES = 17e9  # that a job beside others takes at most: ResNet-18's cells took 16.5e9 of an H200's


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to do and keep.

    Attributes:
        key: Name, and that of its file.
        task: The task it is about.
        minutes: How long it is expected to take at the full scale on an H200; estimated, not measured.
        needs: Jobs whose results, and networks if they train any, it needs.
        make: Does it.
        alone: Whether nothing else is done meanwhile, because it is about time or takes the memory.
    """

    key: str
    task: str
    minutes: float
    needs: tuple[str, ...]
    make: Callable[[Store, Task], dict[str, Any]]
    alone: bool = False


def jobs() -> list[Job]:
    """All jobs, the most important first: networks, what is timed, a little of everything, then the rest of each."""
    return [
        _train("resnet18"),
        _train("resnet18", "random10"),
        _train("vit"),
        *map(_speed, ("exponents", "sfr_on", "predictions", "products", "steps", "spectrum")),
        *(_cell("resnet18", "random10", name, mixes=2 if name == "graddiff" else 1) for name in ALGORITHMS),
        *(_cell("vit", "random10", name, mixes=1) for name in ALGORITHMS[:5]),
        *map(_published, ("sfr_on-paper", "salun-torchunlearn", "neggrad-torchunlearn", "scrub-torchunlearn")),
        _published("ga-sfr_on-paper"),
        _train("lm-gpt2"),
        *(_cell("lm-gpt2", "people", name, mixes=1) for name in ("graddiff", "npo", "ga")),
        _train("resnet18", "class"),
        _train("resnet18", "random50"),
        *(_cell("resnet18", "class", name, mixes=1) for name in ALGORITHMS),
        _speed("precision"),
        *(_cell("resnet18", "random50", name, mixes=1) for name in ALGORITHMS),
        *(_cell("vit", "random10", name, mixes=1) for name in ALGORITHMS[5:]),
        _cell("vit", "class", "graddiff", mixes=1),
        _cell("resnet18", "random10", "graddiff", mixes=1, batchnorm="batch"),
        _train("lm"),
        *map(_published, ("ga-open-unlearning", "graddiff-open-unlearning")),
        *(_cell("lm", "people", name) for name in ("graddiff", "npo", "ga")),
        *map(_published, ("ga-open-unlearning-adamw", "graddiff-open-unlearning-adamw")),
        *(_cell("lm", "people", name, mixes=1, optimizer="adamw") for name in ("graddiff", "npo")),
        _cell("vit", "random10", "graddiff", mixes=1, optimizer="adamw"),
        _cell("resnet18", "random10", "graddiff", mixes=1, optimizer="adamw"),
        _cell("lm-gpt2", "people", "graddiff", mixes=1, optimizer="adamw"),
        _speed("compiled"),
    ]


def _train(task: str, deletion: str | None = None) -> Job:
    """Train a task's network on everything, or on what a deletion retains."""
    key = f"train-{task}" if deletion is None else f"gold-{task}-{deletion}"
    make = partial(_trained, deletion=deletion)
    return Job(key=key, task=task, minutes=TRAIN_MINUTES[task], needs=(), make=make)


def _trained(store: Store, task: Task, *, deletion: str | None) -> dict[str, Any]:
    """Train and keep the weights."""
    started, seed = time.perf_counter(), 0 if deletion is None else GOLD_SEED
    model, found = task.trained(seed, deletion)
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
        "augmented": how.augment and not task.name.startswith("lm"),
        "seeds": [seed],
        "train_seconds": time.perf_counter() - started,
    }


def _cell(
    task: str, deletion: str, algorithm: str, *, mixes: int = 2, batchnorm: str = "frozen", optimizer: str = "sgd"
) -> Job:
    """Predict and run a combination."""
    spec = Cell(
        task=task, deletion=deletion, algorithm=algorithm, mixes=mixes, batchnorm=batchnorm, optimizer=optimizer
    )
    key = f"cell-{spec.key}"
    make = partial(cell, spec=spec, job=key)
    minutes = MIX_MINUTES[task] * (1 if algorithm == "ga" else mixes)
    # The largest network's linearisation ran out of a fifth of an H200's memory.
    alone = task == "lm-gpt2"
    return Job(key=key, task=task, minutes=minutes, needs=_networks(task, deletion), make=make, alone=alone)


def _networks(task: str, deletion: str) -> tuple[str, ...]:
    """Jobs that train what a deletion's runs start from and are held against."""
    return (f"train-{task}", *([f"gold-{task}-{deletion}"] if (task, deletion) in GOLDS else []))


def _published(name: str) -> Job:
    setting = next(p for p in PUBLISHED if p.name == name)
    key, minutes = f"published-{name}", 2.0 if setting.task == "resnet18" else 0.5
    make = partial(published, setting=setting, job=key)
    return Job(key=key, task=setting.task, minutes=minutes, needs=_networks(setting.task, setting.deletion), make=make)


def _speed(part: str) -> Job:
    return Job(
        key=f"speed-{part}",
        task="resnet18",
        minutes=SPEED_MINUTES[part],
        needs=("train-resnet18",),
        make=partial(_timed, part=part),
        alone=part != "precision",
    )


def _timed(store: Store, task: Task, *, part: str) -> dict[str, Any]:
    """Time a part and say which seeds its network, vectors and rollouts are of."""
    rollouts = range(task.scale.measured[task.name]["seeds"] if part in {"predictions", "sfr_on"} else 0)
    return {**speed.PARTS[part](store, task), "seeds": sorted({0, *VECTOR_SEEDS.get(part, ()), *rollouts})}


def jobs_named(only: Sequence[str] | None) -> list[Job]:
    """Jobs in order of importance.

    Args:
        only: Beginnings of their names; None for all.

    Returns:
        Those jobs and whatever they need, which is done again only where something is left to be done with it.

    Raises:
        ValueError: If one of them is the beginning of no job's name.
    """
    every = jobs()
    unknown = [name for name in only or () if not any(job.key.startswith(name) for job in every)]
    if unknown:
        raise ValueError(f"no job's name begins with {' or '.join(map(repr, unknown))}; --list tells all names.")
    wanted = {job.key for job in every if only is None or job.key.startswith(tuple(only))}
    for job in reversed(every):  # each comes after what it needs
        wanted.update(job.needs if job.key in wanted else ())
    return [job for job in every if job.key in wanted]


def work(
    store: Store,
    scale: Scale,
    wanted: Sequence[Job],
    *,
    minutes: float,
    retry: bool = False,
    workers: int = 1,
    memory: float = WORKERS_MEMORY,
    say: Callable[[str], object] = print,
) -> list[str]:
    """Do what is missing, as far as the minutes reach.

    Args:
        store: Where results lie.
        scale: Sizes.
        wanted: Jobs, the most important first.
        minutes: What this call may take; a job that is expected to take longer than what is left is not begun.
        retry: Whether to try again what failed before.
        workers: Jobs at once, each in a process of its own where there are several; then they must be among `jobs`.
        memory: Share of an accelerator's memory that those processes may take together.
        say: Told of every job.

    Returns:
        Keys of the jobs that were done, in the order in which they ended.
    """
    begun = time.perf_counter()
    finished: list[str] = []
    waiting, running = list(wanted), dict[Future[Outcome], Job]()
    suspected = set[str]()  # went down with a process: each is done once more, by itself, to tell whose fault it was

    def by_itself(job: Job) -> bool:
        return job.alone or job.key in suspected

    def expected(job: Job) -> float:
        return (scale.minutes or job.minutes) * store.pace()

    def left() -> float:
        return minutes - (time.perf_counter() - begun) / 60

    def begin(job: Job) -> bool:
        """Whether the job is dealt with: begun, done, or not to be begun; not where it has to wait."""
        needed = any(
            job.key in other.needs
            and not store.done(other.key)
            and (retry or not store.failed(other.key))
            and expected(job) + expected(other) <= left()
            for other in wanted
        )
        # A network that is lost is trained anew where something is left to be done with it.
        if store.ready(job.key) or (store.done(job.key) and not needed):
            return True
        missing = [need for need in job.needs if not store.ready(need)]
        if {other.key for other in (*waiting, *running.values())} & set(missing):
            return False
        reason = ""
        if store.failed(job.key) and not retry:
            reason = "failed before"
        elif missing:
            reason = f"needs {missing[0]}"
        elif expected(job) > left():
            reason = f"would take some {expected(job):.1f} minutes of the {left():.1f} left"
        elif len(running) >= (1 if by_itself(job) else workers):
            return False
        if reason:
            say(f"-- {job.key}: {reason}")
            return True
        running[pool.submit(job)] = job
        return True

    with _pool(store, scale, workers, memory) as pool:
        while waiting or running:
            for job in list(waiting):
                if any(map(by_itself, running.values())):
                    break
                if begin(job):
                    waiting.remove(job)
                elif by_itself(job) and running and all(map(store.ready, job.needs)):
                    break  # what is timed by itself is waited for
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    outcome = future.result()
                except BrokenProcessPool as error:
                    # A process was killed, which ends the others too.
                    for lost in running.values():
                        if store.ready(lost.key):
                            finished.append(lost.key)
                            say(f"ok {lost.key}: just before a process beside it died")
                        elif len(running) == 1:
                            store.write_failure(lost.key, f"its process died: {error}")
                            say(f"!! {lost.key}: its process died")
                        else:
                            suspected.add(lost.key)
                            waiting.insert(0, lost)
                            say(f"-- {lost.key}: its process, or one beside it, died; once more by itself")
                    running.clear()
                    pool.renew()
                    store.pack()
                    break
                job = running.pop(future)
                if outcome.trouble is None:
                    finished.append(job.key)
                    say(f"ok {job.key}: {outcome.seconds:.1f} s")
                else:
                    say(f"!! {job.key}: {outcome.trouble}")
                store.pack()
        for job in waiting:
            say(f"-- {job.key}: waits for what is not done")
    return finished


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job.

    Attributes:
        seconds: How long it took.
        trouble: The error in a line; None if it left its result.
    """

    seconds: float
    trouble: str | None = None


class _Here:
    """Does a job in this process, at once."""

    def renew(self) -> None:
        """Nothing that could be lost."""

    def __init__(self, store: Store, scale: Scale) -> None:
        self._store, self._scale, self._tasks = store, scale, dict[str, Task]()

    def submit(self, job: Job) -> Future[Outcome]:
        """Do it."""
        future: Future[Outcome] = Future()
        future.set_result(self.do(job))
        return future

    def do(self, job: Job) -> Outcome:
        """Do it, leave its result, and say what became of it."""
        store, task = self._store, self._tasks.setdefault(job.task, Task(job.task, self._scale, self._store.device))
        started, start = now(), time.perf_counter()
        try:
            content = job.make(store, task)
            seconds = time.perf_counter() - start
            estimate = self._scale.minutes or job.minutes
            store.write(job.key, content, started=started, seconds=seconds, minutes=estimate)
            return Outcome(seconds=seconds)
        except Exception as error:  # one job's trouble is no other's; it is kept to be read
            store.write_failure(job.key, traceback.format_exc())
            first = str(error).splitlines()[0] if str(error) else ""
            return Outcome(seconds=time.perf_counter() - start, trouble=f"{type(error).__name__}: {first}")
        finally:
            gc.collect()
            if store.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


class _Beside:
    """Does jobs in processes beside this one: small batches leave an accelerator waiting for its next kernel."""

    def __init__(self, store: Store, scale: Scale, workers: int, memory: float) -> None:
        self._workers, self._place = workers, (os.fspath(store.folder), scale.name, str(store.device), workers, memory)
        self.renew()

    def renew(self) -> None:
        """Begin with new processes."""
        self.executor = ProcessPoolExecutor(
            self._workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=self._place
        )

    def submit(self, job: Job) -> Future[Outcome]:
        """Have it done."""
        return self.executor.submit(_in_worker, job.key)


@contextmanager
def _pool(store: Store, scale: Scale, workers: int, memory: float) -> Iterator[_Here | _Beside]:
    """Where jobs are done: here, or in that many processes."""
    if workers == 1:
        yield _Here(store, scale)
        return
    pool = _Beside(store, scale, workers, memory)
    try:
        yield pool
    finally:
        pool.executor.shutdown()


_WORKER: dict[str, Any] = {}  # what a worker process does jobs with


def _begin_worker(folder: str, scale: str, device: str, workers: int, memory: float) -> None:
    """Make a process ready for jobs, which it does not outlive its parent for."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # otherwise it went on, and a later call shared the device with it

    threading.Thread(target=watch, daemon=True).start()
    quiet()
    store = Store(folder, scale, torch.device(device), beside=workers, gathered=False)
    _WORKER.update(
        here=_Here(store, SCALES[scale]),
        jobs={job.key: job for job in jobs()},
        store=store,
        workers=workers,
        memory=memory,
    )


def _in_worker(key: str) -> Outcome:
    """Do a job with a worker's share of memory and threads, or with all of both if it is to be alone."""
    job, store, workers = _WORKER["jobs"][key], _WORKER["store"], _WORKER["workers"]
    share = 1 if job.alone else workers
    store.beside = share
    threads = max(1, (os.cpu_count() or 1) // share)
    torch.set_num_threads(threads)
    if store.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(_WORKER["memory"] / share)
    with threadpool_limits(threads):
        return _WORKER["here"].do(job)


def main() -> None:
    """Do jobs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where results, predictions and weights lie")
    parser.add_argument("--minutes", type=float, default=9.0, help="how long this call may take")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--only", nargs="+", help="beginnings of the names of jobs to do, with what they need")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="jobs at once, each in a process of its own")
    parser.add_argument(
        "--memory",
        type=float,
        default=WORKERS_MEMORY,
        help="share of a GPU's memory for the workers, where calls share it",
    )
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    parser.add_argument("--list", action="store_true", help="name the jobs and do nothing")
    parser.add_argument("--page", type=Path, help="write the page of what FOLDER holds there, and do nothing else")
    options = parser.parse_args()
    try:
        wanted = jobs_named(options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for job in wanted:
            print(f"{job.key}: {job.minutes:g} min")
        return
    if options.page:
        tables.write(options.folder, options.page, total=len(jobs()))
        return
    device = torch.device(options.device)
    if device.type == "cpu" and options.scale == "full":
        parser.error(
            "--scale full needs a GPU: on a CPU its jobs take hours each. Use --scale reduced, which takes some hours of a "
            "core in all, or --scale small, which only shows that every job runs."
        )
    quiet()
    try:
        store = Store(options.folder, options.scale, device)
    except ValueError as error:
        parser.error(str(error))
    workers = options.workers
    if store.device.type == "cuda" and options.scale == "full":
        room = options.memory * torch.cuda.get_device_properties(store.device).total_memory
        workers = min(workers, max(1, int(room // WORKER_BYTES)))
        if workers < options.workers:
            print(
                f"-- {workers} workers: each may need {WORKER_BYTES / 1e9:.0f} GB of the {room / 1e9:.0f} GB",
                flush=True,
            )
    work(
        store,
        SCALES[options.scale],
        wanted,
        minutes=options.minutes,
        retry=options.retry,
        workers=workers,
        memory=options.memory,
        say=partial(print, flush=True),
    )
    store.pack()
    tables.write(options.folder, options.folder / "page.md", total=len(jobs()))


if __name__ == "__main__":
    main()
