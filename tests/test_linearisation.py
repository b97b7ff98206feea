"""The compressed linearisation: how near the best it is, what it says of itself, and what it costs (theory §§5-6)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stabkit._memory
import stabkit.curvature.jacobian
import stabkit.curvature.linearised
import stabkit.curvature.room
from stabkit.curvature import ScaledJacobian, linearisation_cost, linearise
from stabkit.curvature.room import OVERSAMPLING
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from tests.cases import CASES, TiedLanguageModel, dense_jacobian, forget_rows, go_by_rows

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def dense_rows(problem, p):
    """J P^{1/2} of either set, its rows weighted by 1/√m, those that the loss does not read being zero."""
    blocks = []
    for which in ("retain", "forget"):
        outputs, targets, jacobian = dense_jacobian(problem, which)
        jacobian = jacobian.detach() * p.sqrt()
        counted = problem.loss.counted(outputs, targets)
        if counted is not None:
            jacobian = jacobian * counted.unsqueeze(-1)
        blocks.append(jacobian.flatten(0, 1) / jacobian.shape[0] ** 0.5)
    return blocks


def wide_problem(seed=0, *, interpolated=False, forget=15):
    """Wide enough for a spectrum with a long tail: 100 rows in 206 parameters."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(8, 2, hidden=(18,), activation=nn.Tanh).double()
    x = torch.randn(50, 8, generator=g, dtype=torch.float64)
    y = torch.randn(50, 2, generator=g, dtype=torch.float64)
    if interpolated:
        y = model(x).detach()
    return UnlearningProblem(model, (x[:forget], y[:forget]), (x[forget:], y[forget:]), loss="mse")


def many_samples(n=300, forget=15):
    """A retain set from which to sample."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, 8, generator=g, dtype=torch.float64)
    y = torch.randn(n, 2, generator=g, dtype=torch.float64)
    return UnlearningProblem(wide_problem().new_model(), (x[:forget], y[:forget]), (x[forget:], y[forget:]), loss="mse")


def everything(problem, preconditioner, **settings):
    return linearise(problem, preconditioner, **{"retain_samples": None, "forget_samples": None, **settings})


@given(rank=st.integers(1, 60), seed=st.integers(0, 20), preconditioned=st.booleans())
def test_the_truncated_decomposition_is_near_the_best_of_its_rank(rank, seed, preconditioned):
    """Halko et al. 2011, theorem 10.5: with p columns more, the squared error is at most 1 + r/(p - 1) tails on average."""
    problem = wide_problem(seed % 3)
    p = torch.ones(problem.size, dtype=torch.float64)
    if preconditioned:
        p = torch.rand(problem.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    network = everything(problem, Diagonal(p), rank=rank, seed=seed)
    rows = torch.cat(dense_rows(problem, p))
    tail = torch.linalg.svdvals(rows)[rank:].square().sum()
    error = (rows - rows @ network.basis @ network.basis.T).square().sum()
    assert network.rank == rank
    assert float(error) >= (1 - 1e-9) * float(tail)  # nothing of that rank is nearer
    assert float(error) <= (1 + rank / (OVERSAMPLING - 1)) * float(tail)


def test_a_falling_spectrum_is_found_to_its_end():
    """Where the tail past the oversampling is negligible, values and directions are those of the dense decomposition."""
    problem = wide_problem()
    p = torch.logspace(0, -100, problem.size, dtype=torch.float64)
    network = everything(problem, Diagonal(p), rank=8)
    _, values, directions = torch.linalg.svd(torch.cat(dense_rows(problem, p)), full_matrices=False)
    torch.testing.assert_close(network.singular_values, values[:8], rtol=1e-3, atol=0)
    cosines = (network.basis * directions[:8].T).sum(0).abs()
    assert float(cosines[:4].min()) > 0.999


@cases
@given(rank=st.integers(1, 12), seed=st.integers(0, 100))
def test_features_are_products_with_the_basis(case, rank, seed):
    problem = case.problem()
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    network = everything(problem, Diagonal(p), rank=rank, seed=seed)
    assert network.rank == network.basis.shape[1] == network.singular_values.numel() == rank
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(network.basis.T @ network.basis, eye, rtol=0, atol=1e-10)
    energy = torch.zeros(rank, rank, dtype=torch.float64)
    for which, rows in zip(("retain", "forget"), dense_rows(problem, p), strict=True):
        part = getattr(network, which)
        outputs, targets, _ = dense_jacobian(problem, which)
        torch.testing.assert_close(part.outputs, outputs)
        assert torch.equal(part.targets, targets)
        weighted = part.features.flatten(0, 1) / part.samples**0.5
        torch.testing.assert_close(weighted, rows @ network.basis, rtol=1e-8, atol=1e-9)
        energy += weighted.T @ weighted
    # Right singular vectors: their images are orthogonal, as long as the singular values, and in falling order.
    torch.testing.assert_close(
        energy, network.singular_values.square().diag(), rtol=1e-7, atol=1e-7 * float(energy.max())
    )
    assert bool((network.singular_values.diff() <= 0).all())


@given(rank=st.integers(1, 100), seed=st.integers(0, 30))
def test_captured_is_the_smaller_share_of_the_two_sets(rank, seed):
    problem = wide_problem(seed % 3)
    network = everything(problem, Identity(), rank=rank, seed=seed)
    shares = [
        float((rows @ network.basis).square().sum() / rows.square().sum())
        for rows in dense_rows(problem, torch.ones(problem.size, dtype=torch.float64))
    ]
    assert 0 <= network.captured <= 1
    spread = (min(shares) * max(0.0, 1 - min(shares))) ** 0.5  # of eight probes, with the signs as unlucky as they come
    assert network.captured == pytest.approx(min(shares), abs=1e-6 + 0.9 * spread)


def test_captured_is_averaged_right():
    """Over many seeds the estimate is the dense share, up to the bias of a ratio. One forget sample is captured nearly
    whole, so that the smaller share is always the retain set's."""
    problem = wide_problem(forget=1)
    found, shares = [], []
    rows = dense_rows(problem, torch.ones(problem.size, dtype=torch.float64))
    for seed in range(60):
        network = everything(problem, Identity(), rank=5, seed=seed)
        found.append(network.captured)
        shares.append([float((r @ network.basis).square().sum() / r.square().sum()) for r in rows])
    retain, forget = torch.tensor(shares).T
    assert bool((retain + 0.2 < forget).all())
    assert torch.tensor(found).mean() == pytest.approx(float(retain.mean()), abs=0.02)


@pytest.mark.parametrize("interpolated", [False, True])
def test_as_many_directions_as_rows_hold_everything(interpolated):
    """Also where every gradient is zero, and the sketch has nothing from them."""
    problem = wide_problem(interpolated=interpolated)
    network = everything(problem, Identity(), rank=1000)
    rows = torch.cat(dense_rows(problem, torch.ones(problem.size, dtype=torch.float64)))
    assert network.captured == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(rows @ network.basis @ network.basis.T, rows, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(
        network.singular_values[: rows.shape[0]], torch.linalg.svdvals(rows), rtol=1e-6, atol=1e-8
    )


def test_either_sets_gradient_is_in_the_sketch():
    """Five strong directions, 195 faint ones, and two a little less faint that are the gradients: 17 random columns would
    find a small part of those two."""
    size = torch.full((202,), 1e-3, dtype=torch.float64)
    size[:5], size[100], size[201] = 1.0, 2e-3, 2e-3
    x, y = size.diag(), torch.zeros(202, 1, dtype=torch.float64)
    y[100], y[201] = 1.0, 1.0
    model = nn.Linear(202, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    problem = UnlearningProblem(model, (x[101:], y[101:]), (x[:101], y[:101]), loss="mse")
    for seed in range(5):
        network = everything(problem, Identity(), rank=7, seed=seed)
        for part, axis in ((network.retain, 100), (network.forget, 201)):
            gradient = part.factors(problem.loss).gradients.mean(0)
            assert float(gradient.norm()) == pytest.approx(2 * 2e-3 / 101, rel=0.01)
            assert float(network.basis[axis].norm()) > 0.99


def test_a_small_set_keeps_its_directions():
    """One forget sample beside 200 retain samples on other axes: equal weight, so its direction leads."""
    x = torch.zeros(201, 3, dtype=torch.float64)
    x[0, 2], x[1:, 0], x[1:, 1] = 1.0, 1.0, 0.5 * (-1.0) ** torch.arange(200)
    model, y = nn.Linear(3, 1, bias=False).double(), x.sum(1, keepdim=True)
    nn.init.zeros_(model.weight)
    network = everything(UnlearningProblem(model, (x[:1], y[:1]), (x[1:], y[1:]), loss="mse"), Identity(), rank=2)
    assert float(network.basis[2].norm()) == pytest.approx(1)
    torch.testing.assert_close(network.singular_values, torch.ones(2, dtype=torch.float64))


def test_sets_whose_samples_have_different_numbers_of_outputs():
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = TiedLanguageModel().double().eval()
    forget, retain = (torch.randint(0, 7, shape, generator=g) for shape in ((3, 5), (6, 3)))
    sets = [{"input_ids": t, "labels": t} for t in (forget, retain)]
    problem = UnlearningProblem(model, *sets, loss="causal_lm")
    network = everything(problem, Identity(), rank=1000)
    assert (network.retain.features.shape[1], network.forget.features.shape[1]) == (21, 35)
    for which, rows in zip(("retain", "forget"), dense_rows(problem, torch.ones(problem.size)), strict=True):
        part = getattr(network, which)
        found = (part.features @ network.basis.T).flatten(0, 1) / part.samples**0.5
        torch.testing.assert_close(found, rows, rtol=1e-6, atol=1e-7)


def test_a_network_that_does_not_move_is_held_whole():
    """No derivative at all: one direction, which carries nothing, and all there is."""
    problem = CASES[1].problem()
    network = everything(problem, Diagonal(torch.zeros(problem.size)), rank=5)
    assert (network.rank, network.captured) == (1, 1.0)
    assert float(network.retain.features.abs().max()) == 0


def test_a_seed_decides_it_and_the_random_state_is_left_alone():
    problem = wide_problem()
    before, vector = torch.get_rng_state(), problem.vector()
    first, again, other = (
        linearise(problem, Identity(), rank=6, retain_samples=20, forget_samples=9, seed=s) for s in (4, 4, 5)
    )
    assert torch.equal(first.basis, again.basis)
    assert torch.equal(first.retain.indices, again.retain.indices)
    assert first.captured == again.captured
    assert not torch.equal(first.retain.indices, other.retain.indices)
    assert not torch.equal(first.forget.indices, other.forget.indices)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(problem.vector(), vector)
    assert (first.retain.samples, first.forget.samples) == (20, 9)
    assert (first.retain.population, first.forget.population) == (35, 15)


@pytest.fixture
def counted(monkeypatch):
    """Every sample's forward, and every derivative taken of it, counted where it is taken."""
    counts = {"derivatives": 0, "forward": 0}
    module = stabkit.curvature.jacobian
    rows, pull, push, evaluate = module.jacobian_rows, module.vjp_block, module.jvp_block, UnlearningProblem.evaluate

    def counted_rows(problem, inputs):
        result = rows(problem, inputs)
        counts["derivatives"] += result.shape[0] * result.shape[1]
        return result

    def counted_block(function):
        def wrapped(problem, inputs, block, **settings):
            counts["derivatives"] += block.shape[-1] * inputs.shape[0]
            return function(problem, inputs, block, **settings)

        return wrapped

    def counted_evaluate(self, samples, parameters=None, indices=None):
        result = evaluate(self, samples, parameters, indices)
        counts["forward"] += result[0].shape[0]
        return result

    monkeypatch.setattr(module, "jacobian_rows", counted_rows)
    monkeypatch.setattr(module, "vjp_block", counted_block(pull))
    monkeypatch.setattr(module, "jvp_block", counted_block(push))
    monkeypatch.setattr(UnlearningProblem, "evaluate", counted_evaluate)
    return counts


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 30])
@pytest.mark.parametrize("power_iterations", [0, 2])
def test_costs_are_those_of_the_passes_made(monkeypatch, counted, by_rows, rank, power_iterations):
    problem = wide_problem()
    go_by_rows(monkeypatch, by_rows)
    counted.update(derivatives=0, forward=0)
    network = linearise(
        problem,
        Identity(),
        rank=rank,
        power_iterations=power_iterations,
        retain_samples=21,
        forget_samples=10,
    )
    assert counted["forward"] == 31
    assert network.gradient_equivalents == pytest.approx(counted["derivatives"] + counted["forward"] / 3)
    width = rank + OVERSAMPLING
    by_columns = 2 * width + 11 + 2 * power_iterations * width
    assert counted["derivatives"] == 31 * (2 if by_rows else by_columns)  # rows are kept
    if by_rows:
        forget_rows(monkeypatch)
        again = counted["derivatives"]
        other = linearise(
            problem, Identity(), rank=rank, power_iterations=power_iterations, retain_samples=21, forget_samples=10
        )
        assert counted["derivatives"] - again == 31 * 4 * (1 + power_iterations)
        assert other.gradient_equivalents == pytest.approx(31 * (4 * (1 + power_iterations) + 1 / 3))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 0}, ValueError, "`rank` of `linearise` must be a whole number >= 1; got 0"),
        ({"rank": 2.5}, TypeError, r"`rank` of `linearise` .*got 2\.5"),
        ({"retain_samples": 0}, ValueError, "`retain_samples` of `linearise` .*>= 1; got 0. None takes all"),
        ({"forget_samples": -1}, ValueError, "`forget_samples` of `linearise` .*>= 1; got -1. None takes all"),
        ({"sketch_samples": 0}, ValueError, "`sketch_samples` of `linearise` .*>= 1; got 0. None takes all"),
    ],
)
def test_what_is_wrong_is_said(settings, error, message):
    with pytest.raises(error, match=message):
        linearise(CASES[1].problem(), Identity(), **settings)


# ---- directions from few samples, features of many

PART = {"rank": 4, "retain_samples": 120, "forget_samples": None}


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [(10, 4 * (4 + OVERSAMPLING) // 2), (40, 40), (70, 70)],  # four rows a column at least; two outputs a sample
)
def test_directions_lie_in_the_rows_they_are_drawn_from_and_features_are_of_all(asked, drawn):
    problem = many_samples()
    network = linearise(problem, Identity(), sketch_samples=asked, seed=1, **PART)
    outputs, targets, retain = dense_jacobian(problem, "retain")
    retain, forget = retain.detach(), dense_jacobian(problem, "forget")[2].detach()
    held, first = network.retain.indices, network.retain.indices[:drawn]
    residual = problem.loss.residual(outputs, targets).detach().flatten(1)
    gradient = torch.einsum("mod,mo->d", retain[held], residual[held])  # of all
    rows = torch.cat([retain[first].flatten(0, 1), forget.flatten(0, 1), gradient.unsqueeze(0)])
    span = torch.linalg.svd(rows, full_matrices=False)
    inside = span.Vh[1e-10 * span.S[0] < span.S]
    assert 2 * drawn < inside.shape[0] < problem.size  # else the next line could not fail
    torch.testing.assert_close(inside.T @ (inside @ network.basis), network.basis, rtol=0, atol=1e-8)
    for held, jacobian in ((network.retain, retain[network.retain.indices]), (network.forget, forget)):
        torch.testing.assert_close(held.features, jacobian @ network.basis, rtol=1e-8, atol=1e-9)
    weighted = [part.features.flatten(0, 1) / part.samples**0.5 for part in (network.retain, network.forget)]
    energy = sum(rows.T @ rows for rows in weighted)
    torch.testing.assert_close(energy, network.singular_values.square().diag(), rtol=1e-7, atol=1e-7)


def test_the_mean_gradient_of_all_samples_is_in_a_sketch_of_few():
    """One sample that was not drawn from has nearly all of it, along a direction of its own."""
    problem = many_samples()
    chosen = linearise(problem, Identity(), sketch_samples=28, **PART).retain.indices
    x, y = problem.retain.batch(torch.arange(285))
    x[chosen[110]], y[chosen[110]] = 4 * x[chosen[110]].roll(1), 100.0
    other = UnlearningProblem(problem.new_model(), problem.forget.batch(torch.arange(15)), (x, y), loss="mse")
    network = linearise(other, Identity(), sketch_samples=28, **{**PART, "rank": 40})
    assert torch.equal(network.retain.indices, chosen)
    outputs, targets, jacobian = dense_jacobian(other, "retain")
    residual = other.loss.residual(outputs, targets).detach().flatten(1)
    gradient = torch.einsum("mod,mo->d", jacobian.detach()[chosen], residual[chosen])
    assert float((gradient @ network.basis).norm()) > 0.95 * float(gradient.norm())


@pytest.mark.parametrize("held", [120, 285])
def test_the_samples_drawn_from_are_no_matter_of_the_data_s_order(held):
    """Sorted data sets are common: the first of a sorted sample would be those of the first classes."""
    network = linearise(many_samples(), Identity(), sketch_samples=30, **{**PART, "retain_samples": held})
    places = network.retain.indices[:30].double()
    assert network.retain.indices.unique().numel() == held
    assert float(places.mean()) == pytest.approx(142, abs=4 * 285 / 12**0.5 / 30**0.5)


def test_small_sets_held_whole_and_ranks_that_are_found_are_drawn_from_all():
    problem = many_samples(250)
    whole = {"retain_samples": None, "forget_samples": None, "rank": 5}
    first, second = (linearise(problem, Identity(), sketch_samples=s, **whole) for s in (None, 10))
    assert torch.equal(first.basis, second.basis)
    part = {"retain_samples": 60, "forget_samples": None, "rank": None, "tolerance": 0.3}
    first, second = (linearise(problem, Identity(), sketch_samples=s, **part) for s in (None, 10))
    assert first.gradient_equivalents == second.gradient_equivalents
    assert first.rank == second.rank
    part = {"retain_samples": 60, "forget_samples": None, "rank": 3, "power_iterations": 1}
    first, second = (linearise(problem, Identity(), sketch_samples=s, **part) for s in (None, 10))
    assert first.gradient_equivalents == second.gradient_equivalents
    large = {"retain_samples": None, "forget_samples": None, "rank": 3}
    first, second = (linearise(many_samples(), Identity(), sketch_samples=s, **large) for s in (None, 10))
    assert first.gradient_equivalents > second.gradient_equivalents


@pytest.mark.parametrize("held", [200, 29])
def test_what_is_captured_where_few_samples_are_drawn_from_is_averaged_right(held):
    problem = many_samples(forget=1)  # captured nearly whole, so that the smaller share is the retain set's
    rows = dense_jacobian(problem, "retain")[2].detach()
    found, shares = [], []
    for seed in range(60):
        network = linearise(problem, Identity(), sketch_samples=20, seed=seed, **{**PART, "retain_samples": held})
        found.append(network.captured)
        mine = rows[network.retain.indices]
        shares.append(float((mine @ network.basis).square().sum() / mine.square().sum()))
    assert torch.tensor(found).mean() == pytest.approx(float(torch.tensor(shares).mean()), abs=0.02)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("asked", [5, 50])
def test_few_samples_to_draw_from_save_as_much_as_is_said(monkeypatch, counted, by_rows, asked):
    problem = many_samples()
    go_by_rows(monkeypatch, by_rows)
    counted.update(derivatives=0, forward=0)
    network = linearise(problem, Identity(), sketch_samples=asked, **PART)
    drawn = max(asked, 28) + 15
    both = 2 * 135 if by_rows else (14 + 9) * drawn + (14 + 2) * 135
    assert counted["derivatives"] == both + 135 - drawn  # the last ones for the mean gradient alone
    assert network.gradient_equivalents == pytest.approx(counted["derivatives"] + counted["forward"] / 3)
    if by_rows:
        told = linearisation_cost((120, 15), (285, 15), 2, 4, sketch_samples=asked, rows_kept=1e9)
        assert network.gradient_equivalents == pytest.approx(told)
        forget_rows(monkeypatch)
        told = linearisation_cost((120, 15), (285, 15), 2, 4, sketch_samples=asked)
        other = linearise(problem, Identity(), sketch_samples=asked, **PART)
        assert other.gradient_equivalents == pytest.approx(told)
        assert other.gradient_equivalents == network.gradient_equivalents + 2 * drawn


@pytest.mark.parametrize(("columns", "most"), [(False, 40), (True, 40), (True, 57)])
def test_what_a_rank_that_is_found_takes_is_told_for_the_largest(monkeypatch, columns, most):
    problem = many_samples()
    monkeypatch.setattr(stabkit.curvature.room, "FIRST_RANK", 10)
    go_by_rows(monkeypatch, not columns)
    network = linearise(
        problem, Identity(), rank=None, tolerance=0.0, max_rank=most, retain_samples=60, forget_samples=None
    )
    assert network.rank == most
    outputs = 10**9 if columns else 2
    told = linearisation_cost(
        (60, 15), (285, 15), outputs, None, max_rank=most, sketch_samples=96, rows_kept=0 if columns else 75
    )
    assert network.gradient_equivalents == pytest.approx(told)


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 0.01, 0.0])
def test_the_rank_grows_until_enough_is_captured(digits_mlp, random_deletion, tolerance):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    options = {"retain_samples": 40, "forget_samples": 20, "seed": 1}
    found = linearise(problem, Identity(), rank=None, tolerance=tolerance, **options)
    assert found.captured >= 1 - tolerance - 1e-5 or found.rank == found.retain.samples * 10 + found.forget.samples * 10
    levels = [r for r in (50, 100, 200, 400, 800) if r < 2 * found.rank]
    for rank in levels[:-1]:
        assert linearise(problem, Identity(), rank=rank, **options).captured < 1 - tolerance
    # By rows, each doubling takes a pull and a push, of ten passes each.
    assert found.gradient_equivalents == pytest.approx(60 * (20 * len(levels) + 1 / 3))


def test_growing_by_columns_costs_what_asking_at_once_does(monkeypatch, counted):
    """Three directions of the first block past the noise and eight probes aside, a column is pulled once and pushed once."""
    monkeypatch.setattr(stabkit.curvature.room, "FIRST_RANK", 5)
    go_by_rows(monkeypatch, False)
    problem = wide_problem()
    counted.update(derivatives=0)
    found = everything(problem, Identity(), rank=None, tolerance=0.02, seed=3)
    assert found.rank in {20, 40, 80}
    direct = everything(problem, Identity(), rank=found.rank, seed=3)
    assert found.gradient_equivalents == direct.gradient_equivalents
    assert counted["derivatives"] == 2 * 50 * (2 * (found.rank + OVERSAMPLING) + 11)


@pytest.mark.parametrize("tolerance", [0.2, 0.02, 1e-4])
def test_a_rank_that_is_found_gives_the_directions_of_that_rank(monkeypatch, tolerance):
    monkeypatch.setattr(stabkit.curvature.room, "FIRST_RANK", 5)
    problem = wide_problem()
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = everything(problem, Diagonal(p), rank=None, tolerance=tolerance, seed=3)
    assert found.rank > 5
    direct = everything(problem, Diagonal(p), rank=found.rank, seed=3)
    torch.testing.assert_close(found.singular_values, direct.singular_values, rtol=1e-10, atol=1e-10)
    # The same subspace, but for what lies outside the row space.
    rows = torch.cat(dense_rows(problem, p))
    seen = [rows @ network.basis @ network.basis.T for network in (found, direct)]
    torch.testing.assert_close(*seen, rtol=0, atol=1e-8)
    assert found.captured == pytest.approx(direct.captured, abs=1e-10)
    torch.testing.assert_close(found.retain.features.abs(), direct.retain.features.abs(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("power_iterations", [0, 1])
def test_growth_to_the_last_row_is_exact(monkeypatch, power_iterations):
    """With more doublings than there are rows, in float32 and float64: everything is captured by orthonormal directions."""
    monkeypatch.setattr(stabkit.curvature.room, "FIRST_RANK", 5)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        problem = wide_problem()
        model = problem.new_model()
        sets = [samples.batch(torch.arange(samples.size)) for samples in (problem.forget, problem.retain)]
        problem = UnlearningProblem(model, *sets, loss="mse", dtype=dtype)
        network = everything(problem, Identity(), rank=None, tolerance=0, power_iterations=power_iterations)
        rows = torch.cat(dense_rows(problem, torch.ones(problem.size, dtype=dtype)))
        eye = torch.eye(network.rank, dtype=dtype)
        torch.testing.assert_close(network.basis.T @ network.basis, eye, rtol=0, atol=tolerance)
        # Float32 rounds the captured share to 1 some directions before the last.
        left = (rows - rows @ network.basis @ network.basis.T).norm() / rows.norm()
        assert float(left) <= tolerance
        assert network.captured == pytest.approx(1, abs=tolerance)


def test_rank_and_tolerance_are_checked(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    with pytest.raises(ValueError, match=r"`rank` of `linearise` must be a whole number >= 1; got 0\. None finds one"):
        linearise(problem, Identity(), rank=0)
    with pytest.raises(ValueError, match=r"`tolerance` of `linearise` must be .*\[0, 1\]; got 1\.5"):
        linearise(problem, Identity(), rank=None, tolerance=1.5)


def test_a_thinned_linearisation_is_its_leading_directions_and_some_of_its_samples(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    network = linearise(problem, Identity(), rank=40, retain_samples=101, forget_samples=None)
    less = network.thinned(rank=15)
    assert less.rank == 15
    assert torch.equal(less.forget.features, network.forget.features[..., :15])
    c = torch.randn(15, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([c, torch.zeros(25)])
    torch.testing.assert_close(less.displacement(c), network.displacement(padded))
    for name in ("metric", "anchor"):
        full = getattr(network, name)
        torch.testing.assert_close(getattr(less, name), full[:15, :15] if full.dim() == 2 else full[:15])
    half = network.thinned(samples=0.5)
    assert (half.retain.samples, half.retain.population) == (51, network.retain.population)
    assert half.forget.samples == network.forget.samples == network.forget.population  # held whole, and left so
    places = (half.retain.indices.unsqueeze(1) == network.retain.indices).nonzero()[:, 1]
    assert torch.equal(network.retain.indices[places], half.retain.indices)
    for name in ("outputs", "features", "targets"):
        assert torch.equal(getattr(network.retain, name)[places], getattr(half.retain, name))
    same = network.thinned()
    assert same.retain.samples == 101
    assert torch.equal(same.basis, network.basis)


@pytest.mark.parametrize("rank", [4, 30])
def test_factors_are_no_larger_than_the_coordinates(digits_mlp, random_deletion, rank, monkeypatch):
    """A language model has more outputs a sample than there are directions."""
    monkeypatch.setattr(stabkit.curvature.linearised, "FACTORED_AT_ONCE", 7)
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    network = linearise(problem, Identity(), rank=rank, retain_samples=20, forget_samples=15)
    for part in (network.retain, network.forget):
        found = part.factors(network.loss)
        assert found.factors.shape == (part.samples, min(10, rank), rank)
        rows = network.loss.factor_transpose(part.outputs.double(), part.targets, part.features.double())
        gram = torch.einsum("mor,mos->mrs", rows, rows)
        torch.testing.assert_close(torch.einsum("mcr,mcs->mrs", found.factors, found.factors), gram)
        residual = network.loss.residual(part.outputs.double(), part.targets)
        torch.testing.assert_close(found.gradients, torch.einsum("mor,mo->mr", part.features.double(), residual))


@pytest.mark.parametrize(("free", "expected"), [(2**40, 2**37), (2**10, 1000)])
def test_a_pass_is_as_large_as_an_accelerators_memory_allows(monkeypatch, free, expected):
    monkeypatch.setattr(stabkit._memory, "free_memory", lambda device: free)
    assert stabkit._memory.pass_bytes(1000, torch.device("cuda")) == expected
    assert stabkit._memory.pass_bytes(1000, torch.device("cpu")) == 1000


@pytest.mark.parametrize(("wanted", "expected"), [(900, 1000), (3000, 3000), (5000, 4096)])
def test_a_pass_on_a_cpu_may_hold_what_large_networks_want(monkeypatch, wanted, expected):
    monkeypatch.setattr(stabkit._memory, "host_memory", lambda: 8 * 4096)
    assert stabkit._memory.pass_bytes(1000, torch.device("cpu"), wanted=wanted) == expected
    assert stabkit._memory.pass_bytes(5000, torch.device("cpu"), wanted=wanted) == 5000


def test_rows_of_a_network_whose_own_are_many_still_go_where_memory_allows(monkeypatch):
    problem = wide_problem()
    row = 2 * problem.size * 8
    monkeypatch.setattr(stabkit.curvature.jacobian, "ROW_BYTES", row - 1)
    known = stabkit.curvature.jacobian.forward_size
    monkeypatch.setattr(stabkit.curvature.jacobian, "forward_size", lambda *given: (known(*given)[0], 0))
    for memory, by_rows in ((64 * row, True), (8 * row, True), (7 * row, False)):
        monkeypatch.setattr(stabkit._memory, "host_memory", lambda memory=memory: memory)
        jacobian = ScaledJacobian(problem, problem.retain, torch.arange(9), Identity())
        assert jacobian.by_rows(30) is by_rows
        block = torch.randn(problem.size, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(
            jacobian @ block, dense_rows(problem, torch.ones(problem.size))[0].view(35, 2, -1)[:9] @ block * 35**0.5
        )


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 60 + 10 - 4), (0.5, 50 - 4), (0.02, 0), (None, 60 + 10 - 4)])
def test_free_memory_of_an_accelerator_is_within_the_process_s_share(monkeypatch, fraction, expected):
    """60 of 100 bytes are free; of the 10 that this process holds it uses 4."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    if fraction is None:  # before torch 2.8
        monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction", raising=False)
    else:
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction, raising=False)
    assert stabkit._memory.free_memory(torch.device("cuda")) == expected


@pytest.mark.parametrize("by", ["rows", "vectors"])
def test_what_the_loss_does_not_read_is_no_sensitivity(by, monkeypatch):
    """Features, captured share and error are those of the labelled positions; the others' rows are as good as zero."""
    torch.manual_seed(0)
    model = TiedLanguageModel().double()
    tokens = torch.randint(0, 7, (18, 5), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, :3] = -100  # a prompt
    sets = [({"input_ids": tokens[place]}, labels[place]) for place in (slice(0, 6), slice(6, 18))]
    problem = UnlearningProblem(model, *sets, loss="causal_lm")
    if by == "vectors":
        monkeypatch.setattr(stabkit.curvature.jacobian.ScaledJacobian, "by_rows", lambda self, vectors: False)
    network = everything(problem, Identity(), rank=10)
    jacobians = [dense_jacobian(problem, which)[2].detach() for which in ("retain", "forget")]
    counted = torch.zeros(5, 7, dtype=torch.bool)
    counted[2:4] = True  # these positions predict the two labels
    for part, jacobian in zip((network.retain, network.forget), jacobians, strict=True):
        assert torch.equal(problem.loss.counted(part.outputs, part.targets), counted.flatten().expand(part.samples, -1))
        truth = (jacobian @ network.basis) * counted.flatten()[:, None]
        torch.testing.assert_close(part.features, truth, rtol=1e-9, atol=1e-10)
    whole = everything(problem, Identity(), rank=10_000)
    assert whole.captured == pytest.approx(1.0)
    c = 1e-4 * torch.randn(whole.rank, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    there = problem.unflatten(problem.vector() + whole.displacement(c))
    outputs = [problem.evaluate(samples, there)[0] for samples in (problem.retain, problem.forget)]
    assert whole.output_error(c, outputs) < 1e-3
    for values in outputs:
        values[:, 0] = torch.nan  # of a position that does not count
    assert whole.output_error(c, outputs) < 1e-3
    assert (
        problem.loss.counted(outputs[0], tokens[6:]) is not None
    )  # a shifted sequence's last position predicts nothing
