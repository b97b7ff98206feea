"""Curvature products over several processes: the answer of one, and an error where a rank is missing or astray."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch
from torch import distributed, multiprocessing

from stabkit.curvature import MixedOperator, curvature_operator
from stabkit.models import MLP
from stabkit.parallel import DataParallel
from stabkit.problem import UnlearningProblem
from stabkit.spectrum import extreme_eigenpairs

pytestmark = [pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")]


def problem_of(rows=slice(None), seed=0):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 4, generator=g), torch.arange(20) % 3
    retain = x[7:][rows], y[7:][rows]
    return UnlearningProblem(MLP(4, 3, hidden=(6,), seed=seed).double(), (x[:7], y[:7]), retain)


def vectors(d, seed=2):
    return torch.randn(d, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def eigenvalues(problem, parallel=None):
    retain, forget = (curvature_operator(problem, s, parallel=parallel) for s in (problem.retain, problem.forget))
    return extreme_eigenpairs(MixedOperator(retain, forget, 0.4), tolerance=1e-9).values


# ------------------------------------------------------------------ what a rank does


def products(rank, ranks):
    torch.set_num_threads(1)
    found = {}
    sharing = DataParallel(timeout=60)
    problem = problem_of()
    for kind in ("hessian", "ggn", "fisher"):
        found[kind] = curvature_operator(problem, problem.retain, kind=kind, parallel=sharing) @ vectors(problem.size)
    found["eigenvalues"] = eigenvalues(problem, sharing)
    found["few"] = curvature_operator(problem, problem.retain, indices=torch.tensor([3]), parallel=sharing) @ vectors(
        problem.size
    )
    bounds = torch.linspace(0, 13, ranks + 1).square().div(13).round().int().tolist()  # uneven shards
    own = problem_of(slice(bounds[rank], bounds[rank + 1]) if rank < ranks - 1 else slice(bounds[rank], 13))
    sharded = DataParallel(holds="shard", timeout=60)
    found["shards"] = curvature_operator(own, own.retain, parallel=sharded) @ vectors(own.size)
    found["count"] = own.retain.size
    return found


def other_vectors(rank, ranks):
    problem = problem_of()
    operator = curvature_operator(problem, problem.retain, parallel=DataParallel(timeout=20))
    return operator @ vectors(problem.size, seed=rank)


def other_weights(rank, ranks):
    problem = problem_of(seed=rank)
    return curvature_operator(problem, problem.retain, parallel=DataParallel(timeout=20))


def problem_with(rank, what):
    """One that differs on the second rank."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 4, generator=g), torch.arange(20) % 3
    order = torch.arange(13)
    if rank == 1 and what == "order":
        order = order.flip(0)
    if rank == 1 and what == "number":
        order = order[:9]
    loss = "cross_entropy"
    if rank == 1 and what == "loss":
        loss = lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets, reduction="none")  # noqa: E731
    return UnlearningProblem(
        MLP(4, 3, hidden=(6,), seed=0).double(), (x[:7], y[:7]), (x[7:][order], y[7:][order]), loss=loss
    )


def other_data(rank, ranks):
    """What every mismatch is called."""
    torch.set_num_threads(1)
    said = {}
    for what in ("order", "number", "loss", "set", "indices", "holds"):
        problem = problem_with(rank, what)
        odd = rank == 1
        samples = problem.forget if what == "set" and odd else problem.retain
        indices = torch.tensor([1, 3] if odd else [1, 2]) if what == "indices" else None
        sharing = DataParallel(holds="shard" if what == "holds" and odd else "all", timeout=60)
        try:
            curvature_operator(problem, samples, indices=indices, parallel=sharing)
            said[what] = "nothing"
        except ValueError as error:
            said[what] = str(error)
        except KeyError as error:
            said[what] = f"KeyError {error}"
    return said


def one_dies(rank, ranks):
    problem = problem_of()
    operator = curvature_operator(problem, problem.retain, parallel=DataParallel(timeout=3))
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    try:
        operator @ vectors(problem.size)
    finally:
        assert time.monotonic() - start < 30


def one_is_silent(rank, ranks):
    problem = problem_of()
    operator = curvature_operator(problem, problem.retain, parallel=DataParallel(timeout=2))
    if rank == 1:
        time.sleep(8)
        return None
    return operator @ vectors(problem.size)


# ------------------------------------------------------------------ running them


def _rank(rank, ranks, port, task, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        result = task(rank, ranks)
        if isinstance(result, dict):
            result = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in result.items()}
            queue.put((rank, "ok", result))
        else:
            queue.put((rank, "ok", None))
    except Exception as error:  # the parent judges
        queue.put((rank, type(error).__name__, str(error)))


def launch(task, ranks, answers=None):
    """Every rank's outcome, by rank; the processes are gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, ranks, port, task, queue), daemon=True) for r in range(ranks)]
    for process in processes:
        process.start()
    try:
        return {rank: (kind, said) for rank, kind, said in (queue.get(timeout=120) for _ in range(answers or ranks))}
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()


def test_ranks_with_other_data_are_refused():
    """Products over some samples twice and over others not at all have no error of their own."""
    for kind, said in launch(other_data, 2).values():
        assert kind == "ok", said
        for what, name in (
            ("order", "samples"),
            ("number", "number of samples"),
            ("loss", "loss"),
            ("set", "set"),
            ("indices", "indices"),
            ("holds", "holds"),
        ):
            assert f"all ranks must have the same {name}" in said[what], (what, said[what])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_gives_the_answer_of_one_process(ranks):
    problem = problem_of()
    found = launch(products, ranks)
    assert {kind for kind, _ in found.values()} == {"ok"}, found
    results = [found[r][1] for r in range(ranks)]
    assert sum(r["count"] for r in results) == 13
    for result in results:
        for kind in ("hessian", "ggn", "fisher"):
            alone = curvature_operator(problem, problem.retain, kind=kind) @ vectors(problem.size)
            torch.testing.assert_close(torch.tensor(result[kind], dtype=torch.float64), alone, rtol=1e-6, atol=1e-9)
        alone = curvature_operator(problem, problem.retain) @ vectors(problem.size)
        torch.testing.assert_close(torch.tensor(result["shards"], dtype=torch.float64), alone, rtol=1e-6, atol=1e-9)
        single = curvature_operator(problem, problem.retain, indices=torch.tensor([3])) @ vectors(problem.size)
        torch.testing.assert_close(torch.tensor(result["few"], dtype=torch.float64), single, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            torch.tensor(result["eigenvalues"], dtype=torch.float64), eigenvalues(problem), rtol=1e-6, atol=1e-9
        )
        assert result["hessian"] == results[0]["hessian"]  # to the last bit, or the ranks' Lanczos runs would part


def test_different_vectors_are_an_error_on_every_rank():
    found = launch(other_vectors, 2)
    assert {kind for kind, _ in found.values()} == {"RuntimeError"}
    assert all("the ranks multiplied different vectors" in said for _, said in found.values())


def test_different_weights_are_an_error_on_every_rank():
    found = launch(other_weights, 2)
    assert {kind for kind, _ in found.values()} == {"ValueError"}
    assert all("all ranks must have the same weights; got" in said for _, said in found.values())


@pytest.mark.parametrize(("task", "answers"), [(one_dies, 1), (one_is_silent, 2)])
def test_a_missing_rank_is_an_error_and_not_a_hang(task, answers):
    found = launch(task, 2, answers)
    kind, said = found[0]
    assert kind == "RuntimeError"
    assert "rank 0 of 2 got no answer from the others for its product within" in said


def test_without_a_process_group_there_is_an_error():
    with pytest.raises(RuntimeError, match=r"`DataParallel` needs a process group; got none"):
        DataParallel()
    with pytest.raises(ValueError, match=r"`holds` of `DataParallel` .*got 'some'"):
        DataParallel(holds="some")
    with pytest.raises(ValueError, match=r"`timeout` of `DataParallel` .*got 0"):
        DataParallel(timeout=0)
