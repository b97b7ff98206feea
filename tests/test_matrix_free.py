"""Directions that are not held: to rounding the network that holds them, in any number of columns at a time."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stabkit
import stabkit.curvature.matrix_free as matrix_free_module
import stabkit.curvature.room as room_module
import stabkit.modes
from stabkit.curvature import basis_fits, linearisation_cost, linearise, ritz_residuals
from stabkit.curvature.matrix_free import MatrixFreeNetwork
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal, Identity, Preconditioner
from stabkit.problem import UnlearningProblem
from tests.cases import CASES, ResidualBlockNet, go_by_rows, problem_of

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")


class Rotated(Preconditioner):
    """P = (I - u uᵀ) / 2 + u uᵀ, which mixes parameters."""

    def __init__(self, u):
        self._u = u / u.norm()

    def _along(self, vectors, across):
        u = self._u.to(vectors)
        inside = u @ vectors
        return across * vectors + (1 - across) * (torch.outer(u, inside) if vectors.dim() == 2 else u * inside)

    def apply(self, vectors):
        return self._along(vectors, 0.5)

    def sqrt(self, vectors):
        return self._along(vectors, 0.5**0.5)


def preconditioner_of(kind, size, seed):
    g = torch.Generator().manual_seed(seed)
    entries = torch.rand(size, generator=g, dtype=torch.float64)
    return {
        "identity": Identity(),
        "diagonal": Diagonal(entries + 0.1),
        "mask": Diagonal((entries > 0.4).double()),
        "dense": Rotated(entries),
    }[kind]


def both_of(problem, p, at_once, **settings):
    """The network with its basis held, and not, and their features' shared kernel to compare them in."""
    held = linearise(problem, p, hold=True, **settings)
    with mock.patch.object(matrix_free_module, "columns_at_once", return_value=at_once):
        free = linearise(problem, p, hold=False, **settings)
    assert type(free) is MatrixFreeNetwork
    assert free.basis.numel() == 0
    return held, free


def rows_of(network):
    return torch.cat([part.features.flatten(0, 1).double() for part in (network.retain, network.forget)])


def assert_same(held, free, vector, mask, *, tolerance=1e-8):
    """What both say in terms that no rotation of the coordinates changes."""
    assert free.rank == held.rank
    assert free.landmarks == held.landmarks
    assert free.parameters == held.parameters == vector.numel()
    assert free.dormant == held.dormant
    assert free.captured == pytest.approx(held.captured, abs=tolerance)
    a, b = rows_of(held), rows_of(free)
    near = {"rtol": tolerance, "atol": tolerance * float(a.norm()) ** 2}
    torch.testing.assert_close(free.singular_values, held.singular_values, rtol=tolerance, atol=near["atol"])
    torch.testing.assert_close(b @ b.T, a @ a.T, **near)
    for name in ("metric", "gradient_metric", "decay_metric"):
        torch.testing.assert_close(b @ getattr(free, name) @ b.T, a @ getattr(held, name) @ a.T, **near)
    for name in ("anchor", "decay_anchor"):
        torch.testing.assert_close(b @ getattr(free, name), a @ getattr(held, name), **near)
    torch.testing.assert_close(b @ free.masked(mask).double() @ b.T, a @ held.masked(mask).double() @ a.T, **near)
    torch.testing.assert_close(b @ free.inside(vector), a @ held.inside(vector), **near)
    torch.testing.assert_close(
        b @ free.gradient_along(vector).double(), a @ held.gradient_along(vector).double(), **near
    )
    place = int(a.square().sum(1).argmax())
    torch.testing.assert_close(free.displacement(b[place]), held.displacement(a[place]), **near)
    assert free.anchor_norm == held.anchor_norm
    assert free.layered == held.layered


@given(
    case=st.integers(0, len(CASES) - 1),
    kind=st.sampled_from(["identity", "diagonal", "mask", "dense"]),
    rank=st.integers(1, 12),
    at_once=st.integers(1, 9),
    marks=st.integers(0, 2),
    layered=st.booleans(),
    few=st.booleans(),
    seed=st.integers(0, 10),
)
def test_a_basis_that_is_not_held_is_the_same_to_rounding(case, kind, rank, at_once, marks, layered, few, seed):
    problem = problem_of(case)
    g = torch.Generator().manual_seed(seed)
    entries = [torch.rand(problem.size, generator=g, dtype=torch.float64) for _ in range(5)]
    settings = {
        "rank": rank,
        "retain_samples": 7 if few else None,
        "forget_samples": None,
        "sketch_samples": 3 if few else None,
        "landmarks": entries[:marks],
        "paces": entries[2] + 0.5 if layered else None,
        "decays": entries[3] if layered else None,
        "seed": seed,
    }
    held, free = both_of(problem, preconditioner_of(kind, problem.size, seed), at_once, **settings)
    # Directions past what the Gram matrix tells from rounding are left out, and matter as little.
    if free.rank != held.rank:
        assert float(held.singular_values[free.rank - held.landmarks]) < 1e-6 * float(held.singular_values[0])
        return
    assert_same(held, free, entries[4], entries[4] > 0.5, tolerance=1e-6)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_coupled_batches_are_pulled_and_pushed_as_they_are(at_once):
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResidualBlockNet().double()
    x, y = torch.randn(30, 1, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (30,), generator=g)
    problem = UnlearningProblem(model.train(), (x[:8], y[:8]), (x[8:], y[8:]), batchnorm="batch")
    settings = {"rank": 6, "retain_samples": 15, "forget_samples": None, "sketch_samples": 4, "batch_sizes": (5, 4)}
    held, free = both_of(problem, Identity(), at_once, **settings)
    v = torch.randn(problem.size, generator=g, dtype=torch.float64)
    assert_same(held, free, v, v > 0)


def test_single_precision_loses_nothing_but_rounding():
    problem = problem_of(0)
    single = UnlearningProblem(
        problem.new_model().float(),
        *(tuple(t.float() if t.is_floating_point() else t for t in s) for s in sets_of(problem)),
    )
    held, free = both_of(single, Identity(), 2, rank=8, retain_samples=None, forget_samples=None)
    v = torch.randn(single.size, generator=torch.Generator().manual_seed(0))
    assert_same(held, free, v, v > 0, tolerance=1e-4)


def sets_of(problem):
    return [samples.batch(torch.arange(samples.size)) for samples in (problem.forget, problem.retain)]


def test_its_columns_are_orthonormal_and_lead_back_to_parameters():
    problem = problem_of(0)
    p = preconditioner_of("diagonal", problem.size, 0)
    held, free = both_of(problem, p, 3, rank=7, retain_samples=None, forget_samples=None, landmarks=[problem.vector()])
    v = torch.cat([block for _, block in free.columns()], 1)
    torch.testing.assert_close(v.T @ v, torch.eye(free.rank, dtype=torch.float64))
    c = torch.randn(free.rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(free.displacement(c), p.sqrt(v @ c))
    torch.testing.assert_close(free.inside(v[:, 2]), torch.eye(free.rank, dtype=torch.float64)[2])
    marked = p.sqrt(problem.vector())
    torch.testing.assert_close(v @ (v.T @ marked), marked)
    torch.testing.assert_close(ritz_residuals(problem, free), ritz_residuals(problem, held), rtol=1e-6, atol=1e-9)
    for rank in (3, 1):
        fewer, other = free.thinned(rank=rank, samples=0.5), held.thinned(rank=rank, samples=0.5)
        assert fewer.rank == fewer.directions.rank == rank
        torch.testing.assert_close(
            fewer.displacement(c[:rank]).abs(), other.displacement(c[:rank]).abs(), atol=1e-8, rtol=1e-6
        )
        torch.testing.assert_close(fewer.displacement(c[:rank]), p.sqrt(v[:, free.kept_columns(rank)] @ c[:rank]))
    assert free.on_host.directions is free.directions


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made has."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *found, 0) if found else self.numbers
        return result


def wide_problem():
    """More parameters than samples have outputs in all: 2,822."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 8, generator=g), torch.randint(0, 2, (60,), generator=g)
    return UnlearningProblem(MLP(8, 2, hidden=(40, 60)), (x[:20], y[:20]), (x[20:], y[20:]))


@pytest.mark.parametrize(("hold", "columns"), [(True, (20, math.inf)), (False, (0, 8))])
def test_no_more_parameter_sized_columns_are_made_than_are_taken_at_once(monkeypatch, hold, columns):
    problem = wide_problem()
    go_by_rows(monkeypatch, False)
    monkeypatch.setattr(matrix_free_module, "columns_at_once", lambda size, like: 2)
    with Largest() as seen:
        network = linearise(problem, Identity(), rank=20, sketch_samples=10, landmarks=[problem.vector()], hold=hold)
        network.displacement(torch.ones(network.rank))
    least, most = columns
    # Features of 60 samples count as less: 60 · 2 · 33 numbers.
    assert least * problem.size <= seen.numbers <= most * problem.size


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(("p", "products"), [(Identity(), 0), (None, 1)])
def test_what_it_takes_is_told_beforehand(monkeypatch, rows, p, products):
    problem = wide_problem()
    go_by_rows(monkeypatch, rows)
    monkeypatch.setattr(matrix_free_module, "columns_at_once", lambda size, like: 1)
    p = p or Diagonal(torch.linspace(0.5, 1, problem.size))
    found = linearise(
        problem, p, rank=9, retain_samples=30, sketch_samples=10, landmarks=[problem.vector()], hold=False
    )
    told = linearisation_cost((30, 20), (40, 20), 2, 9, sketch_samples=10, landmarks=1, hold=False, products=products)
    assert found.gradient_equivalents == pytest.approx(told)


def test_a_basis_is_held_where_it_fits(monkeypatch):
    problem = wide_problem()
    settings = {"rank": 20, "retain_samples": None, "forget_samples": None}
    column = 2 * 4 * (problem.size + 120)
    enough = column * (20 + 10 + 18) * 4 // 3 + 4
    assert type(linearise(problem, Identity(), memory=enough, **settings)) is not MatrixFreeNetwork
    assert type(linearise(problem, Identity(), memory=enough - 2 * column, **settings)) is MatrixFreeNetwork
    for free, kind in ((column * 48, False), (column * 48 - 1, True)):
        monkeypatch.setattr(room_module, "free_memory", lambda device, free=free: free)
        assert basis_fits(problem, 120, 20) is not kind
        assert (type(linearise(problem, Identity(), **settings)) is MatrixFreeNetwork) is kind


@pytest.mark.parametrize("given_", [{"rank": None}, {"power_iterations": 1}, {"checkpoint": "state"}])
def test_what_needs_the_basis_refuses_to_go_without(given_):
    with pytest.raises(ValueError, match="`hold` of `linearise` must not be False with a rank that is found"):
        linearise(problem_of(0), Identity(), hold=False, **given_)


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setattr(room_module.Room, "holds", lambda self, rank: False)
    for module in (matrix_free_module, stabkit.modes):
        monkeypatch.setattr(module, "columns_at_once", lambda size, like: 5)


@pytest.mark.parametrize("mode", ["standard", "thorough"])
def test_a_prediction_without_room_is_the_same(request, digits_mlp, random_deletion, mode):
    asked = {"algorithm": "sragu", "lr": 0.05, "steps": 40, "seeds": 2, "weight_decay": 1e-3, "mode": mode}
    held = stabkit.predict(digits_mlp, *random_deletion, **asked)
    request.getfixturevalue("no_room")
    free = stabkit.predict(digits_mlp, *random_deletion, **asked)
    assert free.critical_lr == pytest.approx(held.critical_lr, rel=0.02)
    assert free.probability == pytest.approx(held.probability, abs=0.02)
    assert free.divergence_step == held.divergence_step
    ours, theirs = ({share.name: share.share for share in found.cause.displacement_layers} for found in (free, held))
    assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)
    # The rollouts' end is displaced, which a held basis does for nothing; so are the looks of staged rollouts.
    spent = [{cost.stage: cost.gradient_equivalents for cost in found.costs} for found in (held, free)]
    for stage in ("rollouts and theory", *(["staged rollouts"] if mode == "thorough" else [])):
        assert spent[1][stage] > spent[0][stage]


def test_a_cost_estimate_knows_that_there_is_no_room(request, digits_mlp, random_deletion):
    def told():
        found = stabkit.predict_cost(digits_mlp, *random_deletion, algorithm="graddiff", mode="standard")
        return found.memory_bytes, {row.stage: row.gradient_equivalents for row in found.stages}["linearisation"]

    held = told()
    request.getfixturevalue("no_room")
    free = told()
    assert free[0] < held[0]
    assert free[1] > held[1]


@pytest.mark.parametrize("hold", [True, False])
def test_where_nothing_is_sensitive_one_direction_is_left(hold):
    problem = wide_problem()
    found = linearise(problem, Diagonal(torch.zeros(problem.size)), rank=5, hold=hold)
    assert found.rank == 1
    assert found.singular_values.tolist() == [0.0]
    assert float(found.displacement(torch.ones(1)).norm()) == 0
    assert not any(bool(part.features.any()) for part in (found.retain, found.forget))


def test_directions_that_float32_does_not_tell_from_rounding_are_left_out():
    """All others stay, and what the network captures with them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 40, generator=g) * torch.arange(1, 41).float() ** -2
    y = torch.randint(0, 3, (120,), generator=g)
    problem = UnlearningProblem(MLP(40, 3, hidden=(16,), activation=nn.Tanh), (x[:40], y[:40]), (x[40:], y[40:]))
    held, free = (linearise(problem, Identity(), rank=60, hold=hold) for hold in (True, False))
    shares = (held.singular_values / held.singular_values[0]).square()
    assert float(shares[-1]) < 1e-5
    assert free.rank < held.rank == 60
    assert free.rank >= int((shares > 2e-5).sum())
    assert free.captured == pytest.approx(held.captured, abs=1e-3)


@pytest.mark.parametrize("kept", ["mask", "signs"])
def test_what_every_rollout_asks_of_a_mask_or_of_signs_takes_walks_once(monkeypatch, kept):
    problem = wide_problem()
    vector = torch.linspace(-1, 1, problem.size).sign()
    mask = (vector > 0).float()
    network = linearise(problem, Identity(), rank=9, retain_samples=30, sketch_samples=10, hold=False)

    def asked(of):
        return of.masked(mask) if kept == "mask" else of.gradient_along(vector)

    first, fewer = asked(network), network.thinned(rank=5)
    fresh = linearise(problem, Identity(), rank=9, retain_samples=30, sketch_samples=10, hold=False).thinned(rank=5)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(asked(fewer), asked(fresh), **near)
    monkeypatch.setattr(matrix_free_module.PulledBasis, "inner", None)  # no more walks
    assert asked(network) is first
    assert asked(fewer).shape[0] == 5
    with pytest.raises(TypeError):  # of another mask it does
        network.masked(mask.clone())


def test_the_walks_of_a_mask_and_of_the_cause_are_told(request, digits_mlp, random_deletion):
    request.getfixturevalue("no_room")
    reports = {
        name: stabkit.predict(
            digits_mlp, *random_deletion, algorithm=name, lr=0.05, mix=0.5, steps=20, seeds=1, mode="fast"
        )
        for name in ("graddiff", "sfr_on")
    }
    told = {name: next(c for c in found.costs if c.stage == "rollouts and theory") for name, found in reports.items()}
    again = next(c for c in reports["sfr_on"].at(lr=0.04).costs if c.stage == "rollouts and theory")
    assert told["sfr_on"].gradient_equivalents > told["graddiff"].gradient_equivalents + 40 * 40
    assert again.gradient_equivalents < told["graddiff"].gradient_equivalents + 1
