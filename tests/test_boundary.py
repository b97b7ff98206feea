"""Critical step sizes and mixes against closed forms, single rollouts and known crossings."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import stabkit
import stabkit.boundary
from stabkit.algorithms import AGU, FineTune, GradDiff, GradientAscent
from stabkit.boundary import (
    POINTS_PER_DECADE,
    CriticalValue,
    critical_lr,
    critical_mix,
    staged_critical_lr,
    surroundings,
)
from stabkit.checks import seeds_check
from stabkit.curvature import linearise
from stabkit.frontier import Frontier, frontier
from stabkit.judge import _with_seeds_at
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from tests.cases import CASES, dense_hessian, mean_loss

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
GRID = 10 ** (1 / POINTS_PER_DECADE)  # ratio of neighbours in the first scan
REFINED = GRID ** (1 / 64)  # and after two refinements by 8
MIX_REFINED = 1 / 20 / 64


def linear_problem(seed=0):
    """Least squares: the linearisation is the model, and every run has a closed form."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(4, 3).double()
    x = torch.randn(30, 4, generator=g, dtype=torch.float64)
    y = model(x).detach() + 0.3 * torch.randn(30, 3, generator=g, dtype=torch.float64)
    return UnlearningProblem(model, (x[:10], y[:10]), (x[10:], y[10:]), loss="mse")


def held_whole(problem):
    return linearise(problem, Identity(), rank=1000, retain_samples=None, forget_samples=None)


def worst_retain_loss(problem, mix, steps):
    """Largest retain loss of full-batch gradient descent within its steps, as a function of the step size.

    δ_k = -η Σ_j (1 - ηλ)^j b along each eigenvector of D, and L_R is quadratic in δ.
    """
    theta = problem.vector()
    hessians = [dense_hessian(problem, which) for which in ("retain", "forget")]
    slopes = [torch.func.grad(mean_loss(problem, which))(theta) for which in ("retain", "forget")]
    d, b = ((1 - mix) * pair[0] - mix * pair[1] for pair in (hessians, slopes))
    values, vectors = torch.linalg.eigh(d)

    def worst(lr):
        powers = (1 - lr * values) ** torch.arange(steps, dtype=torch.float64).unsqueeze(1)
        delta = -lr * (powers.cumsum(0) * (vectors.T @ b)) @ vectors.T  # (K, d)
        losses = problem.retain_loss + delta @ slopes[0] + ((delta @ hessians[0]) * delta).sum(1) / 2
        return float(losses.max())

    return worst, float(torch.linalg.eigvalsh(hessians[0])[-1])


def first_crossing(problem, mix, steps):
    """Smallest step size at which the worst loss is the level: a fine scan, then a root."""
    worst, top = worst_retain_loss(problem, mix, steps)

    def excess(log_lr):
        return math.log(worst(math.exp(log_lr)) / problem.divergence_level)

    grid = np.linspace(math.log(1e-4 / top), math.log(1e2 / top), 3000)
    place = next(i for i, at in enumerate(grid) if excess(at) >= 0)
    return math.exp(scipy.optimize.brentq(excess, grid[place - 1], grid[place], xtol=1e-12)), top


# ------------------------------------------------------------------ the critical step size


@pytest.mark.parametrize("mix", [0.0, 0.2, 0.45, 1.0])
@pytest.mark.parametrize("steps", [2, 7, 60])
@pytest.mark.parametrize("guess", [0.05, 2.0])
def test_the_critical_step_of_full_batches_is_that_of_the_closed_form(mix, steps, guess):
    problem = linear_problem()
    algorithm = GradDiff(mix=mix, steps=steps)
    found = critical_lr(held_whole(problem), algorithm, batch_sizes=(20, 10), seeds=[0, 1], guess=guess)
    truth, _ = first_crossing(problem, mix, steps)
    assert found.found
    assert found.low < truth * (1 + 1e-9)
    assert truth <= found.value * (1 + 1e-9)
    assert found.value / found.low <= REFINED * (1 + 1e-9)
    assert found.high == found.value  # nothing is random in full batches
    assert found.scanned == pytest.approx((guess / 1000, guess * 100))


def test_many_steps_of_descent_diverge_past_two_over_the_largest_eigenvalue():
    """T4 is the limit of many steps; fewer forgive more."""
    problem = linear_problem()
    network = held_whole(problem)
    found = [
        critical_lr(network, FineTune(steps=k), batch_sizes=(20, 10), seeds=[0], guess=1.0).value for k in (3, 30, 400)
    ]
    limit = 2 / first_crossing(problem, 0.0, 3)[1]
    assert found[0] > found[1] > found[2] > limit
    assert found[2] == pytest.approx(limit, rel=0.02)


def test_a_setting_is_not_monotone_and_the_first_crossing_is_found():
    """Two axes. Along the first a run settles where it is, or overshoots at ηD_1 > 1 and leaks; along the second it creeps
    away. Small steps creep across the level, larger ones leak and are stopped before they do, still larger ones jump."""
    axes = torch.eye(2, dtype=torch.float64)
    retain = (axes * torch.tensor([1.1, 0.9]).double().sqrt(), torch.tensor([[-0.95 * 1.1**0.5], [0.0]]).double())
    forget = (axes.clone(), torch.tensor([[-0.945], [1e-6]]).double())
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    problem = UnlearningProblem(model, forget, retain, loss="mse")
    network = replace(held_whole(problem), divergence_level=0.6)
    algorithm = AGU(mix=0.5, steps=80, drift_tolerance=None, leakage_bound=1.2)
    batches = {"batch_sizes": (2, 2), "seeds": [0]}
    probability = rollout(network, algorithm, lr=[1.0, 10.0, 38.0, 80.0], mix=[0.5] * 4, **batches).probability >= 0.5
    assert probability.tolist() == [False, True, False, True]
    found = critical_lr(network, algorithm, guess=20.0, **batches)
    assert found.found
    below = np.geomspace(0.1, found.low, 200).tolist()
    assert not bool((rollout(network, algorithm, lr=below, mix=[0.5] * 200, **batches).score >= 0).any())
    assert float(rollout(network, algorithm, lr=[found.value], mix=[0.5], **batches).score) >= 0
    assert 1 < found.value < 10


# ------------------------------------------------------------------ scans over known crossings


def known(crosses, seeds):
    """A rollout whose seed s crosses at value v where `crosses(s, v)`."""
    base = rollout(held_whole(linear_problem()), GradDiff(steps=1), lr=[0.1], mix=[0.5], batch_sizes=(4, 4), seeds=[0])
    asked = []

    def fake(network, algorithm, *, lr, mix, batch_sizes, seeds, **options):
        varied = lr if len(set(mix)) == 1 else mix
        asked.append(len(varied))
        score = torch.tensor([[1.0 if crosses(s, v) else -1.0 for v in varied] for s in seeds], dtype=torch.float64)
        return replace(base, score=score)

    return fake, asked


def scan_lr(crosses, seeds=(0,), guess=1.0, lr=0.01):
    fake, asked = known(crosses, seeds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stabkit.boundary, "rollout", fake)
        found = critical_lr(None, GradDiff(lr=lr, mix=0.3), batch_sizes=(1, 1), seeds=list(seeds), guess=guess)
    return found, asked


@given(threshold=st.floats(-5.9, 5.9).map(lambda x: 10**x), lr=st.sampled_from((1e-7, 1e-3, 1.0, 1e5)))
def test_the_scan_reaches_the_step_size_that_is_asked_about(threshold, lr):
    """Where none breaks around the guess: a run that breaks has a critical step size at or below its own."""
    found, asked = scan_lr(lambda s, v: v >= threshold, guess=1e-5, lr=lr)
    usual = 1e-3 * (1 + 1e-9)
    top = max(1e-3, lr) if threshold > usual else 1e-3
    assert found.scanned == pytest.approx((1e-8, top))
    assert found.found == (threshold <= top * (1 + 1e-9))
    if found.found:
        assert found.value / REFINED * (1 - 1e-9) <= threshold <= found.value * (1 + 1e-9)
    else:
        assert found.value == pytest.approx(top)
    if min(threshold, lr) <= usual:  # something breaks without it, or there is nothing to reach
        assert asked == scan_lr(lambda s, v: v >= threshold, guess=1e-5, lr=1e-9)[1]


@given(
    thresholds=st.lists(st.floats(-11.9, 1.9), min_size=1, max_size=5).map(lambda logs: [10**x for x in logs]),
    guess=st.sampled_from((1e-6, 1.0, 300.0)),
)
def test_thresholds_anywhere_in_reach_are_found(thresholds, guess):
    """Also far below the guess, and where some seeds cross there and others far above."""
    seeds = range(len(thresholds))
    found, _ = scan_lr(lambda s, v: v >= guess * thresholds[s], seeds, guess)
    ordered = sorted(guess * t for t in thresholds)
    pooled = ordered[(len(ordered) - 1) // 2]  # where half of the seeds cross
    assert found.found
    assert found.value / REFINED * (1 - 1e-9) <= pooled <= found.value * (1 + 1e-9)
    low = max(ordered[0], found.scanned[0])
    assert low / GRID * (1 - 1e-9) <= found.low <= low * (1 + 1e-9)
    assert ordered[-1] * (1 - 1e-9) <= found.high <= ordered[-1] * GRID * (1 + 1e-9)
    assert found.low <= found.value <= found.high
    assert found.scanned[1] == pytest.approx(100 * guess)


def test_the_scan_reaches_down_only_while_its_smallest_step_diverges():
    _, asked = scan_lr(lambda s, v: v >= 0.5)
    assert asked == [26, 7, 7]
    found, asked = scan_lr(lambda s, v: v >= 1e-8)
    assert asked == [26, 15, 15, 7, 7]
    assert found.scanned == pytest.approx((1e-9, 100))
    found, asked = scan_lr(lambda s, v: True)
    assert asked == [26, 15, 15, 15]
    assert (found.found, found.value, found.low, found.high) == (True, *[found.scanned[0]] * 3)
    assert found.scanned == pytest.approx((1e-12, 100))


def test_a_seed_that_crosses_everywhere_does_not_hide_where_the_others_do():
    found, _ = scan_lr(lambda s, v: s == 0 or v >= 0.5, seeds=(0, 1, 2))
    assert found.found
    assert found.value / REFINED <= 0.5 <= found.value
    assert found.low == found.scanned[0] == pytest.approx(1e-3)


def test_nothing_found_says_how_far_it_looked():
    found, asked = scan_lr(lambda s, v: False, seeds=(0, 1))
    assert asked == [26]
    assert not found.found
    assert found.value == found.low == found.high == found.scanned[1] == pytest.approx(100)
    found, _ = scan_lr(lambda s, v: s == 0 and v >= 2, seeds=(0, 1, 2))  # one seed of three is not one half
    assert not found.found
    assert found.low < 2 <= found.low * GRID
    assert found.value == found.high == found.scanned[1]


@given(island=st.floats(-2.5, 0.5), width=st.floats(0.21, 0.5), beyond=st.floats(1.2, 1.9))
def test_an_island_of_divergence_is_the_first_crossing(island, width, beyond):
    """Wider than the scan's spacing; bisection would see the far shore alone."""

    def crosses(seed, value):
        return 10**island <= value < 10 ** (island + width) or value >= 10**beyond

    found, _ = scan_lr(crosses)
    assert found.value / REFINED <= 10**island * (1 + 1e-9)
    assert found.value >= 10**island * (1 - 1e-9)


@given(threshold=st.floats(0, 1), other=st.floats(0, 1))
def test_the_critical_mix_is_found_to_a_thousandth(threshold, other):
    assume(threshold <= other)
    fake, asked = known(lambda s, v: v >= (threshold, other)[s], (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stabkit.boundary, "rollout", fake)
        found = critical_mix(None, GradDiff(lr=0.3), batch_sizes=(1, 1), seeds=[0, 1])
    assert found.found
    assert found.scanned == (0, 1)
    assert threshold - 1e-12 <= found.value <= threshold + MIX_REFINED + 1e-12
    assert found.low <= threshold
    assert other - 1e-12 <= found.high <= other + 0.05
    assert asked == ([21] if found.value == 0 else [21, 7, 7])


# ------------------------------------------------------------------ searches side by side


@pytest.mark.parametrize(
    "algorithm",
    [GradDiff(lr=0.2, mix=0.3, steps=20), AGU(lr=0.4, mix=0.5, steps=20), GradientAscent(lr=0.05, steps=20)],
    ids=lambda a: a.name,
)
@pytest.mark.parametrize("guess", [None, 0.5, 1e4])  # further down by three decades, and once more, from the last one
def test_side_by_side_everything_is_found_that_is_found_one_after_another(monkeypatch, algorithm, guess):
    network, batches = held_whole(linear_problem()), {"batch_sizes": (5, 4), "seeds": [0, 1]}
    rolled = []

    def counted(*args, **options):
        rolled.append(len(options["lr"]))
        return rollout(*args, **options)

    monkeypatch.setattr(stabkit.boundary, "rollout", counted)
    found = surroundings(network, algorithm, guess=guess, **batches)
    together, rolled[:] = list(rolled), []
    alone = rollout(network, algorithm, lr=[algorithm.lr], mix=[algorithm.mix], **batches)
    for name in ("lr", "mix", "divergence_step", "stopped_step"):
        torch.testing.assert_close(getattr(found.rolled, name), getattr(alone, name), rtol=0, atol=0, equal_nan=True)
    for name in ("score", "coordinates", "retain_loss", "forget_loss"):
        torch.testing.assert_close(getattr(found.rolled, name), getattr(alone, name), rtol=1e-9, atol=1e-12)
    rounds = []
    if guess is None:
        assert found.lr is None
    else:
        assert found.lr == critical_lr(network, algorithm, guess=guess, **batches)
        rounds, rolled[:] = [list(rolled)], []
    if algorithm.fixed_mix:
        assert found.mix == CriticalValue(value=1.0, low=1.0, high=1.0, found=False, scanned=(1.0, 1.0))
    else:
        assert found.mix == critical_mix(network, algorithm, **batches)
        rounds.append(list(rolled))
    assert together == [sum(sizes) for sizes in itertools.zip_longest([1], *rounds, fillvalue=0)]


@pytest.mark.parametrize("guess", [0.0, -1.0, math.inf])
def test_a_guess_is_checked_side_by_side_too(guess):
    with pytest.raises(ValueError, match="`guess` of `surroundings` must be a finite number"):
        surroundings(None, GradDiff(), batch_sizes=(1, 1), seeds=[0], guess=guess)


# ------------------------------------------------------------------ the critical mix


def test_the_critical_mix_of_full_batches_is_that_of_the_closed_form():
    problem = linear_problem()
    steps, lr = 30, 0.2
    found = critical_mix(held_whole(problem), GradDiff(lr=lr, steps=steps), batch_sizes=(20, 10), seeds=[0])

    def excess(mix):
        return worst_retain_loss(problem, mix, steps)[0](lr) - problem.divergence_level

    truth = scipy.optimize.brentq(excess, 0, 1)
    assert excess(0) < 0 < excess(1)
    assert found.low < truth <= found.value
    assert found.value - found.low <= MIX_REFINED + 1e-12


@pytest.mark.filterwarnings("ignore::stabkit.OverlapWarning")  # the same samples on purpose
def test_forgetting_can_save_a_run_that_fine_tuning_breaks():
    """A step too long for the retain set's curvature; much of it taken away by the forget set's; then too much of that."""
    x, y = linear_problem().retain.batch(torch.arange(20))
    problem = UnlearningProblem(linear_problem().new_model(), (x.clone(), y.clone()), (x, y), loss="mse")
    top = first_crossing(problem, 0.0, 3)[1]
    algorithm = GradDiff(lr=3 / top, steps=12)
    network, batches = held_whole(problem), {"batch_sizes": (20, 20), "seeds": [0]}
    rolled = rollout(network, algorithm, lr=[3 / top] * 3, mix=[0.0, 0.4, 1.0], **batches)
    assert (rolled.probability >= 0.5).tolist() == [True, False, True]
    found = critical_mix(network, algorithm, **batches)
    assert (found.value, found.low, found.high, found.found) == (0.0, 0.0, 0.0, True)


def test_no_mix_diverges_at_a_tiny_step():
    found = critical_mix(held_whole(linear_problem()), GradDiff(lr=1e-9, steps=5), batch_sizes=(4, 4), seeds=[0, 1])
    assert (found.value, found.low, found.high, found.found) == (1.0, 1.0, 1.0, False)


# ------------------------------------------------------------------ the map


@pytest.fixture(scope="module")
def mapped():
    problem = CASES[0].problem()
    network = replace(
        linearise(problem, Identity(), rank=12, retain_samples=None, forget_samples=None), divergence_level=2.5
    )
    algorithm = GradDiff(steps=40, sampling="poisson")
    options = {"batch_sizes": (4, 2), "seeds": [3, 8]}
    lrs, mixes = [3.0, 0.01, 0.3, 0.01], (0.9, 0.0, 0.5)
    return network, algorithm, options, frontier(network, algorithm, lr=lrs, mix=mixes, **options)


def test_the_map_is_its_single_rollouts(mapped):
    network, algorithm, options, found = mapped
    assert found.algorithm == "graddiff"
    assert found.lr.tolist() == [0.01, 0.3, 3.0]
    assert found.mix.tolist() == [0.0, 0.5, 0.9]
    for i, lr in enumerate(found.lr.tolist()):
        for j, mix in enumerate(found.mix.tolist()):
            alone = rollout(network, algorithm, lr=[lr], mix=[mix], **options)
            step = alone.expected_divergence_step()[0]
            np.testing.assert_allclose(found.probability[i, j], float(alone.probability[0]), rtol=1e-9)
            np.testing.assert_equal(found.divergence_step[i, j], math.nan if step is None else step)
            np.testing.assert_allclose(found.retain_loss[i, j], float(alone.retain_loss[:, 0, -1].mean()), rtol=1e-9)
            np.testing.assert_allclose(found.forget_loss[i, j], float(alone.forget_loss[:, 0, -1].mean()), rtol=1e-9)
    assert found.probability.min() < 0.1 < 0.9 < found.probability.max()


def map_of(probability, lr):
    probability = np.array(probability, dtype=float)
    blank = np.full(probability.shape, math.nan)
    return Frontier(
        algorithm="graddiff",
        lr=np.array(lr),
        mix=np.linspace(0, 1, probability.shape[1]),
        probability=probability,
        score=blank,
        divergence_step=blank,
        retain_loss=blank,
        forget_loss=blank,
    )


def test_the_boundary_is_read_log_linearly_off_the_map():
    found = map_of([[0.1, 0.0, 0.6, 0.2], [0.4, 0.0, 0.9, 0.5], [0.9, 1.0, 0.1, 0.9]], [0.01, 0.1, 1.0]).critical_lr
    np.testing.assert_allclose(found[[0, 1, 3]], [10 ** (-1 + 0.1 / 0.5), 10**-0.5, 0.1])
    assert math.isnan(found[2])  # crossed at the smallest step already: not bracketed
    assert np.isnan(map_of([[0.1], [0.49]], [0.1, 1.0]).critical_lr).all()
    island = map_of([[0.0], [1.0], [0.0], [1.0]], [1.0, 10.0, 100.0, 1000.0]).critical_lr
    np.testing.assert_allclose(island, [10**0.5])


def test_the_maps_boundary_is_the_critical_step():
    """Between the two grid points around the one that the scan finds, at every mix."""
    problem = linear_problem()
    network, options = held_whole(problem), {"batch_sizes": (20, 10), "seeds": [0]}
    lrs, mixes = np.geomspace(0.02, 5, 25), [0.0, 0.3, 0.6, 1.0]
    found = frontier(network, GradDiff(steps=30), lr=lrs.tolist(), mix=mixes, **options).critical_lr
    for mix, value in zip(mixes, found.tolist(), strict=True):
        exact = critical_lr(network, GradDiff(steps=30, mix=mix), guess=0.5, **options).value
        assert abs(math.log(value / exact)) <= math.log(lrs[1] / lrs[0])


def test_a_progress_bar_is_drawn_on_request(mapped, capsys):
    network, algorithm, options, _ = mapped
    frontier(network, algorithm, lr=[0.1], mix=[0.5], **options)
    assert capsys.readouterr().err == ""
    frontier(network, algorithm, lr=[0.1], mix=[0.5], progress=True, **options)
    assert "rollout" in capsys.readouterr().err


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("guess", [0.0, -1.0, math.inf, math.nan])
def test_a_guess_must_be_a_step_size(guess):
    with pytest.raises(ValueError, match=rf"`guess` of `critical_lr` must be .*\(0, inf\); got {guess}"):
        critical_lr(None, GradDiff(), batch_sizes=(1, 1), seeds=[0], guess=guess)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": []}, ValueError, "`lr` of `frontier` must name at least one value; got none"),
        ({"mix": []}, ValueError, "`mix` of `frontier` must name at least one value; got none"),
        ({"lr": [0.1, -2.0]}, ValueError, r"`lr` of `frontier` must be .*\(0, inf\); got -2\.0"),
        ({"lr": [math.nan]}, ValueError, "`lr` of `frontier` .*got nan"),
        ({"mix": [0.5, 1.5]}, ValueError, r"`mix` of `frontier` must be .*\[0, 1\]; got 1\.5"),
        ({"mix": ["half"]}, TypeError, "`mix` of `frontier` .*got 'half'"),
    ],
)
def test_what_is_wrong_is_said(mapped, changes, error, message):
    network, algorithm, options, _ = mapped
    with pytest.raises(error, match=message):
        frontier(network, algorithm, **{"lr": [0.1], "mix": [0.5], **changes}, **options)


def test_one_seeds_value_takes_the_spread_of_several_from_another_way():
    found = CriticalValue(value=4.0, low=3.6, high=4.0, found=True, scanned=(0.1, 100.0))
    other = CriticalValue(value=2.0, low=0.5, high=3.0, found=True, scanned=(0.01, 10.0))
    spread = found.with_spread_of(other)
    assert (spread.value, spread.low, spread.high, spread.scanned) == (4.0, 1.0, 6.0, (0.1, 100.0))
    assert found.with_spread_of(other, most=5.0).high == 5.0
    narrow = replace(other, low=1.99, high=2.0)
    assert (found.with_spread_of(narrow).low, found.with_spread_of(narrow).high) == (3.6, 4.0)
    for none in (replace(other, found=False), replace(other, value=0.0)):
        assert found.with_spread_of(none) == found
    assert replace(found, found=False).with_spread_of(other) == replace(found, found=False)


# ------------------------------------------------------------------ staged searches


def staged_scan(monkeypatch, crosses, batchnorm, guess=1.0):
    """Where a staged search ends whose rollouts break at v where `crosses(v)`, and how many there were."""
    asked = []

    def fake(problem, network, algorithm, *, batch_sizes, seeds):
        asked.append(algorithm.lr)
        rolled = SimpleNamespace(probability=torch.tensor([0.9 if crosses(algorithm.lr) else 0.1]))
        return SimpleNamespace(rollout=rolled, gradient_equivalents=10.0)

    monkeypatch.setattr(stabkit.boundary, "staged_rollout", fake)
    problem = SimpleNamespace(batchnorm=batchnorm)
    found, spent = staged_critical_lr(problem, None, GradDiff(mix=0.3), batch_sizes=(1, 1), seed=0, guess=guess)
    assert len(asked) == len(set(asked))
    assert spent == 10 * len(asked)
    return found, len(asked)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(threshold=st.floats(-2.5, 2.5).map(lambda x: 10**x))
def test_a_staged_search_halves_to_the_crossing(threshold, monkeypatch):
    frozen, rollouts = staged_scan(monkeypatch, lambda v: v >= threshold, "frozen")
    assert frozen.low < threshold <= frozen.value == frozen.high <= frozen.low * 2 ** (1 / 8) * (1 + 1e-9)
    coupled, more = staged_scan(monkeypatch, lambda v: v >= threshold, "batch")
    assert coupled == frozen
    assert more <= rollouts + 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(island=st.floats(0.32, 0.34))
def test_in_train_mode_a_staged_search_looks_below_the_crossing(island, monkeypatch):
    """Runs that break, hold, and break again at a third of the step size, which walking by halves steps over."""

    def crosses(value):
        return island <= value < 1.2 * island or value >= 0.98

    found, _ = staged_scan(monkeypatch, crosses, "batch")
    assert found.low < island <= found.value <= island * 2 ** (1 / 8) * (1 + 1e-9)
    frozen, _ = staged_scan(monkeypatch, crosses, "frozen")
    assert frozen.value > 0.9


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
@pytest.mark.parametrize("claimed", [10.0, 1.05])
def test_a_run_that_breaks_at_a_safe_step_size_has_the_critical_one_searched_again(
    claimed, digits_mlp, class_deletion, monkeypatch
):
    """Where the interval calls the step size safe that broke; what is near enough to be within it stays."""
    setting = {"mix": 0.5, "steps": 40, "seeds": 2, "rank": 30, "retain_samples": 128, "forget_samples": 64}
    setting |= {"spectrum_samples": 64, "mode": "thorough"}
    plain = stabkit.predict(digits_mlp, *class_deletion, lr=0.8, **setting)
    assert plain.verdict == "diverges"
    lr = 1.2 * plain.critical_lr
    wrong = [
        (
            CriticalValue(
                value=claimed * lr, low=claimed * lr, high=claimed * lr, found=True, scanned=(lr / 9, 99 * lr)
            ),
            0.0,
        )
    ]
    searched = []

    def search(*arguments, **options):
        searched.append(options["guess"])
        return wrong.pop() if wrong else staged_critical_lr(*arguments, **options)

    monkeypatch.setattr("stabkit.judge.staged_critical_lr", search)
    report = stabkit.predict(digits_mlp, *class_deletion, lr=lr, **setting)
    assert report.rollout.probability >= 0.5
    if claimed < 2:
        assert report.critical_lr == claimed * lr
        assert len(searched) == 1
        return
    assert searched[1:] == [lr]
    assert report.verdict == "diverges"
    assert report.critical_lr == pytest.approx(plain.critical_lr, rel=0.3)
    assert report.critical_lr <= lr
    further = report.at(lr=report.critical_lr / 3)  # which knows the lower one
    assert further.critical_lr == report.critical_lr
    assert further.verdict == "stable"
    assert len(searched) == 2


@pytest.mark.parametrize(
    ("lr", "scores", "low", "high"),
    [
        (1.0, (-0.1, 0.1, 0.4), 1.0, 2.2),  # some break below
        (1.0, (-0.1, -0.2, -0.4), 1.8, 2.2),
        (1.9, (0.1, 0.2, 0.4), 1.8, 2.2),  # within the spread
        (5.0, (0.1, 0.1, -0.4), 1.8, 5.0),  # one holds above
        (5.0, (0.1, 0.1, 0.4), 1.8, 2.2),
    ],
)
def test_the_spread_holds_what_the_seeds_of_the_verdict_do(lr, scores, low, high):
    critical = CriticalValue(value=2.0, low=1.8, high=2.2, found=True, scanned=(0.1, 100.0))
    rolled = SimpleNamespace(kind="staged", score=torch.tensor([[score] for score in scores]))
    found = _with_seeds_at(critical, lr, rolled)
    assert (found.value, found.low, found.high) == (2.0, low, high)
    assert _with_seeds_at(critical, lr, SimpleNamespace(kind="one", score=rolled.score)) == critical
    none = replace(critical, found=False)
    assert _with_seeds_at(none, lr, rolled) == none


@pytest.mark.parametrize(
    ("lr", "scores", "against"),
    [
        (1.0, (-0.1, 0.1, -0.4), 1 / 3),
        (1.0, (-0.1, -0.1, -0.4), 0.0),
        (2.0, (-0.1, 0.1, 0.4), 0.0),  # where the critical one may lie, seeds may differ
        (4.0, (-0.1, -0.1, 0.4), 2 / 3),
        (4.0, (0.1, 0.1, 0.4), 0.0),
    ],
)
def test_seeds_that_end_otherwise_than_the_interval_says_are_no_high_confidence(lr, scores, against):
    rolled = SimpleNamespace(kind="staged", score=torch.tensor([[score] for score in scores]))
    (check,) = seeds_check(rolled, lr, (1.5, 3.0))
    assert check.value == pytest.approx(against)
    assert check.passed == (against == 0)
    assert seeds_check(SimpleNamespace(kind="one", score=rolled.score), lr, (1.5, 3.0)) == ()
