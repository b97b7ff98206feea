"""Stability of the mean and the second moment against dense maps made from the definition (theory §11: 1, 3, 4, 5, 8)."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from stabkit.coherence import coherence
from stabkit.curvature import SampleFactors
from stabkit.sampling import SAMPLINGS, noise_level
from stabkit.stability import (
    LinearDynamics,
    coherence_rule,
    critical_lr_mean_square,
    critical_lr_within,
    critical_mix,
    mean_growth,
    mean_square,
    mean_stability,
    rayleigh_bounds,
    self_loop,
    step_limit,
)
from stabkit.stability.bounds import steepest
from tests.strategies import FAMILIES, random_factors, random_matrix, two_sets, unit_lr

samplings = pytest.mark.parametrize("sampling", SAMPLINGS)
seeds = st.integers(0, 2**32 - 1)


def batches(n, batch, sampling):
    """Every batch of a set with its probability: the weights w of the batch mean Σ_i w_i H_i."""
    if sampling == "without_replacement":
        chosen = list(itertools.combinations(range(n), batch))
        probability = [1 / len(chosen)] * len(chosen)
    elif sampling == "with_replacement":
        chosen = list(itertools.product(range(n), repeat=batch))
        probability = [1 / len(chosen)] * len(chosen)
    else:
        chosen = [c for size in range(n + 1) for c in itertools.combinations(range(n), size)]
        probability = [(batch / n) ** len(c) * (1 - batch / n) ** (n - len(c)) for c in chosen]
    weights = np.array([np.bincount(np.array(c, dtype=int), minlength=n) for c in chosen]) / batch
    return weights, np.array(probability)


def enumerated_map(dynamics, lr):
    """E[(I - ηA) ⊗ (I - ηA)] over all pairs of batches."""
    means, probabilities = [], []
    for part, batch in zip((dynamics.retain, dynamics.forget), dynamics.batch_sizes, strict=True):
        weights, probability = batches(part.samples, batch, dynamics.sampling)
        means.append(np.einsum("bi,ipq->bpq", weights, part.matrices().numpy()))
        probabilities.append(probability)
    mixed = (1 - dynamics.mix) * means[0][:, None] - dynamics.mix * means[1][None, :]
    steps = np.eye(dynamics.rank) - lr * mixed
    joint = np.outer(*probabilities)
    r = dynamics.rank
    return np.einsum("ab,abij,abkl->ikjl", joint, steps, steps, optimize=True).reshape(r * r, r * r)


def dense_map(dynamics, lr):
    """T_η of T6 as an r² × r² matrix, from the dense per-sample Hessians."""
    r = dynamics.rank
    d, noise = 0, 0
    for sign, weight, part, batch in zip(
        (1, -1), (1 - dynamics.mix, dynamics.mix), (dynamics.retain, dynamics.forget), dynamics.batch_sizes, strict=True
    ):
        h = part.matrices().numpy()
        mean = h.mean(0)
        d = d + sign * weight * mean
        spread = np.einsum("mij,mkl->ikjl", h, h).reshape(r * r, r * r) / len(h)
        if dynamics.sampling != "poisson":
            spread = spread - np.kron(mean, mean)
        noise = noise + weight**2 * noise_level(batch, part.population, dynamics.sampling) * spread
    step = np.eye(r) - lr * d
    return np.kron(step, step) + lr**2 * noise


def dense_radius(dynamics, lr):
    return float(np.linalg.eigvalsh(dense_map(dynamics, lr))[-1])


def as_matrix(dynamics, lr):
    """`apply` on every matrix unit, symmetrised: agrees with the map on symmetric matrices."""
    r = dynamics.rank
    columns = []
    for i, j in itertools.product(range(r), repeat=2):
        unit = torch.zeros(r, r, dtype=torch.float64)
        unit[i, j] += 0.5
        unit[j, i] += 0.5
        columns.append(dynamics.apply(unit, lr).numpy().ravel())
    return np.stack(columns, 1)


def bisect(feasible, high):
    """The largest feasible number of an interval [0, x]."""
    while feasible(high):
        high *= 2
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
    return low


def family(seed, *, sampling, mix, rank=None):
    """A seeded random problem with positive semi-definite samples of varied coherence, batch, and population.

    Every other one with two sets has a retain set that curves everywhere and more than the forget set, so that D > 0 is not
    rare.
    """
    rng = np.random.default_rng(seed)
    r = int(rng.integers(2, 6)) if rank is None else rank
    convex = mix > 0 and seed % 2 == 0
    parts = []
    for kind in (0, 1):
        samples = int(rng.integers(2 * r if convex and kind == 0 else 2, 2 * r + 6))
        scale = float(np.exp(rng.normal()))
        parts.append(
            random_factors(
                2 * seed + kind,
                samples=samples,
                rows=int(rng.integers(1, 4)),
                rank=r,
                family=str(rng.choice(FAMILIES[:3] if convex else FAMILIES)),
                scale=0.2 * parts[0].factors.square().mean().sqrt().item() if convex and kind == 1 else scale,
                population=samples * int(rng.integers(1, 4)),
            )
        )
    batch_sizes = tuple(int(rng.integers(1, part.population + 1)) for part in parts)
    return LinearDynamics(retain=parts[0], forget=parts[1], mix=mix, batch_sizes=batch_sizes, sampling=sampling)


# The map


@samplings
@pytest.mark.parametrize(("sizes", "batch_sizes"), [((4, 3), (2, 1)), ((3, 3), (3, 2)), ((1, 4), (1, 3))])
@pytest.mark.parametrize("signed", [False, True])
def test_map_is_the_expectation_over_all_batches(sampling, sizes, batch_sizes, signed):
    parts = [random_factors(7 + i, samples=n, rows=2, rank=3, signed=signed) for i, n in enumerate(sizes)]
    for mix in (0.0, 0.3, 1.0):
        dynamics = LinearDynamics(retain=parts[0], forget=parts[1], mix=mix, batch_sizes=batch_sizes, sampling=sampling)
        truth = enumerated_map(dynamics, 0.2)
        symmetric = np.eye(9)
        symmetric = (symmetric + symmetric.reshape(3, 3, 9).transpose(1, 0, 2).reshape(9, 9)) / 2
        np.testing.assert_allclose(as_matrix(dynamics, 0.2), truth @ symmetric, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(dense_map(dynamics, 0.2), truth, rtol=1e-12, atol=1e-13)


@given(two_sets(), seeds, st.floats(0.01, 10))
def test_map_keeps_semidefinite_matrices_so_and_is_self_adjoint(dynamics, seed, factor):
    lr = factor * unit_lr(dynamics)
    sigma = random_matrix(seed, dynamics.rank, semidefinite=True)
    image = dynamics.apply(sigma, lr)
    assert torch.linalg.eigvalsh(image)[0] >= -1e-10 * (image.norm() + sigma.norm())
    a, b = random_matrix(seed, dynamics.rank), random_matrix(seed + 1, dynamics.rank)
    left, right = (a * dynamics.apply(b, lr)).sum(), (dynamics.apply(a, lr) * b).sum()
    assert abs(left - right) <= 1e-11 * a.norm() * b.norm() * (1 + np.linalg.norm(dense_map(dynamics, lr), 2))


# Its largest eigenvalue


def check_mean_square(dynamics, lr, *, rtol, residual):
    found = mean_square(dynamics, lr)
    eigenvalues = np.linalg.eigvalsh(dense_map(dynamics, lr))
    rounding = 1e-12 * max(1, found.radius)  # T_η is a sum of terms of order 1, however small what is left
    assert found.radius == pytest.approx(eigenvalues[-1], rel=rtol, abs=rounding)
    assert found.radius >= np.abs(eigenvalues).max() * (1 - rtol) - rounding
    assert float(found.eigenmatrix.trace()) == pytest.approx(1)
    assert torch.linalg.eigvalsh(found.eigenmatrix)[0] >= -1e-12
    image = dynamics.apply(found.eigenmatrix, lr)
    true_residual = float((image - found.radius * found.eigenmatrix).norm() / found.eigenmatrix.norm())
    assert found.residual == pytest.approx(true_residual, abs=rounding)
    assert true_residual <= residual * max(1, found.radius)
    assert abs(found.radius - eigenvalues[-1]) <= found.residual + rounding


@given(two_sets(), st.floats(0.01, 10))
def test_radius_equals_the_dense_eigenvalue(dynamics, factor):
    check_mean_square(dynamics, factor * unit_lr(dynamics), rtol=1e-10, residual=1e-7)


@samplings
@pytest.mark.parametrize("rank", [13, 15])
@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_radius_equals_the_dense_eigenvalue_beyond_the_dense_path(sampling, rank, mix):
    for seed, factor in ((0, 0.05), (1, 1.0)):
        dynamics = family(seed, sampling=sampling, mix=mix, rank=rank)
        check_mean_square(dynamics, factor * unit_lr(dynamics), rtol=1e-6, residual=1e-4)


def test_eigenmatrix_is_semidefinite_where_the_eigenvalue_is_repeated():
    # Four of five directions have no curvature at all: ten matrices stay as they are.
    part = random_factors(0, samples=3, rows=1, rank=1)
    flat = torch.zeros(3, 1, 5, dtype=torch.float64)
    flat[..., 2:3] = part.factors
    still = type(part)(factors=flat, gradients=torch.zeros(3, 5, dtype=torch.float64), population=3)
    dynamics = LinearDynamics(retain=still, forget=still, mix=0.0, batch_sizes=(2, 2), sampling="poisson")
    check_mean_square(dynamics, 0.1 * unit_lr(dynamics), rtol=1e-12, residual=1e-12)


def test_growth_is_the_logarithm_over_the_horizon():
    dynamics = family(3, sampling="poisson", mix=0.3)
    found = mean_square(dynamics, 0.1)
    assert found.growth(150) == pytest.approx(150 * math.log(found.radius))
    assert type(found)(cycle=1, radius=0.0, eigenmatrix=torch.eye(1), residual=0.0).growth(3) == -math.inf


@given(two_sets(sampling="without_replacement", larger_population=False), st.floats(0.01, 3))
def test_full_batches_leave_the_mean_process(dynamics, factor):
    lr = factor * unit_lr(dynamics)
    full = LinearDynamics(
        retain=dynamics.retain,
        forget=dynamics.forget,
        mix=dynamics.mix,
        batch_sizes=(dynamics.retain.samples, dynamics.forget.samples),
        sampling="without_replacement",
    )
    values = torch.linalg.eigvalsh(full.mean_hessian())
    assert mean_square(full, lr).radius == pytest.approx(float((1 - lr * values).square().max()), rel=1e-10, abs=1e-12)


# Critical step sizes


@samplings
@pytest.mark.parametrize("mix", [0.0, 0.05])
def test_critical_lr_equals_bisection(sampling, mix):
    checked = 0
    for seed in range(30):
        dynamics = family(seed, sampling=sampling, mix=mix)
        found = critical_lr_mean_square(dynamics)
        stability = mean_stability(dynamics.mean_hessian())
        assert found <= stability.critical_lr * (1 + 1e-9)
        if stability.critical_lr == 0:
            assert found == 0
            continue
        # A matrix along directions without curvature stays: the radius of a stable map may be 1.
        truth = bisect(lambda lr, d=dynamics: dense_radius(d, lr) <= 1 + 1e-11, stability.step_limit)
        assert found == pytest.approx(truth, rel=1e-5)
        checked += 1
    assert checked >= 10


@samplings
def test_critical_lr_equals_bisection_beyond_the_dense_path(sampling):
    for seed in range(3):
        part = random_factors(
            seed, samples=4 + seed, rows=2, rank=14
        )  # fewer rows than directions: D is rank-deficient
        dynamics = LinearDynamics(retain=part, forget=part, mix=0.0, batch_sizes=(2, 2), sampling=sampling)
        assert torch.linalg.eigvalsh(dynamics.mean_hessian())[0] < 1e-10
        limit = mean_stability(dynamics.mean_hessian()).step_limit
        truth = bisect(lambda lr, d=dynamics: dense_radius(d, lr) <= 1 + 1e-10, limit)
        assert critical_lr_mean_square(dynamics) == pytest.approx(truth, rel=1e-4)


def test_critical_lr_where_nothing_is_stable_or_everything_is():
    part = random_factors(0, samples=4, rows=1, rank=2)
    zero = random_factors(0, samples=4, rows=1, rank=2, scale=0.0)

    def dynamics(retain, forget, mix, batch):
        return LinearDynamics(
            retain=retain, forget=forget, mix=mix, batch_sizes=(batch, batch), sampling="with_replacement"
        )

    assert critical_lr_mean_square(dynamics(part, part, 1.0, 2)) == 0  # pure ascent
    assert critical_lr_mean_square(dynamics(part, part, 0.5, 2)) == 0  # D = 0, and batches act
    assert critical_lr_mean_square(dynamics(part, zero, 0.5, 2)) > 0
    assert critical_lr_mean_square(dynamics(zero, zero, 0.5, 2)) == math.inf
    assert critical_lr_within(dynamics(zero, zero, 0.5, 2), 10, 2.0) == math.inf
    assert critical_lr_within(dynamics(part, part, 1.0, 2), 10, 1.0) == 0


@samplings
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("steps", "growth"), [(1, 3.0), (150, 100.0)])
def test_critical_lr_within_a_horizon_equals_bisection(sampling, mix, steps, growth):
    for seed in range(4):
        dynamics = family(seed, sampling=sampling, mix=mix)
        allowed = math.log(growth) / steps
        truth = bisect(lambda lr, d=dynamics, a=allowed: math.log(dense_radius(d, lr)) <= a, unit_lr(dynamics))
        assert critical_lr_within(dynamics, steps, growth) == pytest.approx(truth, rel=2e-4)


@samplings
def test_critical_lr_within_a_horizon_equals_bisection_beyond_the_dense_path(sampling):
    dynamics = family(1, sampling=sampling, mix=0.3, rank=14)
    truth = bisect(lambda lr: 50 * math.log(dense_radius(dynamics, lr)) <= math.log(10), unit_lr(dynamics))
    assert critical_lr_within(dynamics, 50, 10.0) == pytest.approx(truth, rel=2e-4)


@given(two_sets(mix=0.0, signed=False))
def test_a_horizon_without_growth_is_the_mean_square_limit(dynamics):
    limit = critical_lr_mean_square(dynamics)
    assume(limit < math.inf)
    assert critical_lr_within(dynamics, 10, 1.0) == pytest.approx(limit, rel=2e-4)


@samplings
def test_larger_batches_allow_larger_steps(sampling):
    grew = 0
    for seed in range(12):
        base = family(seed, sampling=sampling, mix=0.0)
        limits = [
            critical_lr_mean_square(
                LinearDynamics(
                    retain=base.retain, forget=base.forget, mix=0.0, batch_sizes=(batch, 1), sampling=sampling
                )
            )
            for batch in range(1, base.retain.population + 1)
        ]
        assert all(later >= earlier * (1 - 1e-6) for earlier, later in itertools.pairwise(limits))
        grew += limits[-1] > 1.05 * limits[0]
    assert grew >= 6


# Cheap conditions


@samplings
@pytest.mark.parametrize("mix", [0.0, 0.1, 0.6])
def test_rayleigh_bound_and_self_loop_never_contradict_the_exact_radius(sampling, mix):
    stable = unstable = bound_fired = loop_fired = 0
    for seed in range(120):
        dynamics = family(seed, sampling=sampling, mix=mix)
        limit = critical_lr_mean_square(dynamics)
        scale = limit if 0 < limit < math.inf else unit_lr(dynamics)
        lr = scale * float(np.random.default_rng(seed).uniform(0.3, 3))
        radius = dense_radius(dynamics, lr)
        bound, loop = rayleigh_bounds(dynamics, lr), self_loop(dynamics, lr)
        assert bound <= radius * (1 + 1e-10)
        assert radius > 1 or not loop
        stable += radius <= 1 + 1e-10
        unstable += radius > 1 + 1e-10
        bound_fired += bound > 1 + 1e-10
        loop_fired += loop
    assert unstable >= 30
    assert bound_fired >= 20
    assert loop_fired >= 1
    assert stable >= 10 or mix > 0.5


def test_coherence_rule_never_fires_on_a_stable_set():
    stable = unstable = fired = fired_by_noise = 0
    for seed in range(400):
        dynamics = family(seed, sampling="poisson", mix=0.0)
        sigma = coherence(dynamics.retain, dynamics.forget, mix=0.0).for_rule()
        limit = critical_lr_mean_square(dynamics)
        lr = limit * float(np.random.default_rng(seed).uniform(0.5, 3))
        radius = dense_radius(dynamics, lr)
        verdict = coherence_rule(dynamics, lr, sigma=sigma)
        assert verdict.curvature == pytest.approx(float(torch.linalg.eigvalsh(dynamics.retain.mean())[-1]))
        assert verdict.step_condition == 2 / lr
        assert radius > 1 - 1e-12 or not verdict.diverges
        assert radius > 1 + 1e-12 or not self_loop(dynamics, lr)
        stable += radius <= 1 + 1e-12
        unstable += radius > 1 + 1e-12
        fired += verdict.diverges
        fired_by_noise += verdict.noise_condition < verdict.curvature < verdict.step_condition
    assert stable >= 50
    assert unstable >= 200
    assert fired >= 100
    assert fired_by_noise >= 20


def test_self_loop_is_at_least_as_sharp_as_the_noise_condition_for_one_set():
    fired = 0
    for seed in range(300):
        dynamics = family(seed, sampling="poisson", mix=0.0)
        lr = critical_lr_mean_square(dynamics) * float(np.random.default_rng(seed).uniform(0.8, 4))
        sigma = coherence(dynamics.retain, dynamics.forget, mix=0.0).for_rule()
        verdict = coherence_rule(dynamics, lr, sigma=sigma)
        if verdict.curvature > verdict.noise_condition * (1 + 1e-9):
            fired += 1
            assert self_loop(dynamics, lr)
    assert fired >= 30


def test_coherence_rule_reads_the_set_in_use():
    part = random_factors(0, samples=4, rows=1, rank=2)
    small = random_factors(1, samples=2, rows=1, rank=2)

    def verdict(mix, batch_sizes, sigma=2.0, retain=part, forget=small):
        dynamics = LinearDynamics(retain=retain, forget=forget, mix=mix, batch_sizes=batch_sizes, sampling="poisson")
        return coherence_rule(dynamics, 0.1, sigma=sigma)

    assert verdict(0.0, (1, 1)).noise_condition == pytest.approx(20 / math.sqrt(3))
    assert verdict(1.0, (1, 1)).noise_condition == pytest.approx(20)
    assert verdict(0.5, (2, 1)).noise_condition == pytest.approx(20)  # n/B of the larger set
    assert verdict(0.5, (1, 2), retain=small, forget=part).noise_condition == pytest.approx(20)
    assert verdict(0.0, (4, 1)).noise_condition == math.inf
    assert verdict(0.0, (1, 1), sigma=math.nan).noise_condition == math.inf


@given(two_sets())
def test_steepest_finds_every_samples_largest_eigenvalue(dynamics):
    part = dynamics.retain
    values, vectors = steepest(part)
    h = part.matrices()
    scale = float(h.abs().max()) + 1e-300
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(part.samples, dtype=torch.float64))
    images = torch.einsum("mij,mj->mi", h, vectors)
    torch.testing.assert_close(images, values[:, None] * vectors, rtol=0, atol=1e-12 * scale * part.rank)
    # In fewer rows than directions only the eigenvalues other than the certain zeros are looked at.
    largest = torch.linalg.eigvalsh(h)[:, -1]
    assert bool((values <= largest + 1e-12 * scale * part.rank).all())
    positive = largest > 1e-12 * scale
    torch.testing.assert_close(values[positive], largest[positive], rtol=1e-10, atol=1e-12 * scale * part.rank)


# The mean


@given(two_sets(signed=False))
def test_mean_stability_reads_the_spectrum(dynamics):
    d = dynamics.mean_hessian()
    values = torch.linalg.eigvalsh(d)
    found = mean_stability(d)
    assert (found.smallest, found.largest) == (float(values[0]), float(values[-1]))
    if float(values[-1]) > 0:
        assert found.step_limit == pytest.approx(2 / float(values[-1]))
    if dynamics.mix == 0:
        assert found.critical_lr == found.step_limit
        lr = 0.999 * found.critical_lr if found.critical_lr < math.inf else 1.0
        assert float((1 - lr * values).abs().max()) <= 1 + 1e-9
    if dynamics.mix == 1 and float(values[0]) < 0:
        assert found.critical_lr == 0


def test_mean_stability_counts_rounding_as_zero_and_a_real_negative_not():
    assert mean_stability(torch.diag(torch.tensor([-1e-12, 2.0]))).critical_lr == pytest.approx(1.0)
    assert mean_stability(torch.diag(torch.tensor([-1e-6, 2.0]))).critical_lr == 0
    assert mean_stability(torch.diag(torch.tensor([-1e-6, 2.0])), tolerance=1e-5).critical_lr == pytest.approx(1.0)
    assert mean_stability(torch.zeros(2, 2)).critical_lr == math.inf


@given(
    value=st.floats(-3, 3), lr=st.floats(0.01, 5), momentum=st.sampled_from([0.0, 0.3, 0.9, 0.99]), steps=st.just(4000)
)
@example(value=0.99999, lr=1.0, momentum=0.0, steps=4000)
def test_mean_growth_is_that_of_the_heavy_ball(value, lr, momentum, steps):
    companion = np.array([[1 + momentum - lr * value, -momentum], [1, 0]])
    expected = np.abs(np.linalg.eigvals(companion)).max()
    found = float(mean_growth(torch.tensor([value], dtype=torch.float64), lr, momentum=momentum)[0])
    assert found == pytest.approx(expected, rel=1e-6)
    if momentum == 0:
        assert found == pytest.approx(abs(1 - lr * value), rel=1e-6)
    # The recursion itself, at rest at the start, from which the direction is seen to grow or fade.
    now, before = 1.0, 1.0
    for _ in range(steps):
        now, before = now - lr * value * now + momentum * (now - before), now
        if not 1e-100 < abs(now) + abs(before) < 1e100:
            break
    if abs(found - 1) > 0.02:
        assert (abs(now) + abs(before) > 1) == (found > 1)


@given(largest=st.floats(0.01, 100), momentum=st.sampled_from([0.0, 0.5, 0.9]))
def test_the_step_limit_is_where_growth_begins(largest, momentum):
    limit = step_limit(largest, momentum=momentum)
    values = torch.tensor(largest, dtype=torch.float64)
    below, above = (float(mean_growth(values, f * limit, momentum=momentum)) for f in (0.999, 1.001))
    assert below <= 1 < above
    assert step_limit(-largest, momentum=momentum) == step_limit(0.0) == math.inf


def test_the_coherence_rule_is_no_proof_beyond_its_theorem():
    """Alarms on stable processes, for two sets and for one without replacement: why it is reported and not relied on."""

    def scalars(values):
        factors = torch.tensor(values, dtype=torch.float64).sqrt().reshape(-1, 1, 1)
        return SampleFactors(factors=factors, gradients=torch.zeros(len(values), 1).double(), population=len(values))

    for mix, retain, forget, lr in ((0.0, [2.0, 1.0], [1.0], 1.1), (0.3, [1.0], [1.0, 0.0], 2.9)):
        parts = {"retain": scalars(retain), "forget": scalars(forget)}
        dynamics = LinearDynamics(**parts, mix=mix, batch_sizes=(1, 1), sampling="without_replacement")
        sigma = coherence(parts["retain"], parts["forget"], mix=mix).for_rule()
        assert mean_square(dynamics, lr).radius < 0.8
        assert coherence_rule(dynamics, lr, sigma=sigma).diverges


@given(two_sets(signed=False), st.floats(1e-3, 1))
def test_pencil_is_singular_at_the_critical_mix(dynamics, damping):
    retain, forget = dynamics.retain.mean(), dynamics.forget.mean()
    found = critical_mix(retain, forget, damping=damping)
    pencil = (1 - found.mix) * (retain + damping * torch.eye(dynamics.rank, dtype=torch.float64)) - found.mix * forget
    scale = float(retain.norm() + forget.norm()) + damping
    assert float(found.direction.norm()) == pytest.approx(1)
    if float(forget.norm()) < 1e-12 * scale:
        return
    assert found.damping == damping
    assert found.mix == pytest.approx(1 / (1 + found.generalised_eigenvalue))
    assert float(torch.linalg.eigvalsh(pencil)[0]) == pytest.approx(0, abs=1e-10 * scale)
    assert float((pencil @ found.direction).norm()) <= 1e-7 * scale
    beyond = min(1.0, found.mix + 1e-3)
    worse = (1 - beyond) * (retain + damping * torch.eye(dynamics.rank, dtype=torch.float64)) - beyond * forget
    assert float(torch.linalg.eigvalsh(worse)[0]) < 0


def test_critical_mix_is_one_without_forget_curvature():
    found = critical_mix(torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64), damping=0.0)
    assert found.mix == 1
    assert found.generalised_eigenvalue == 0


@given(two_sets(), seeds)
def test_preconditioned_samples_have_the_spectrum_of_the_preconditioned_hessian(dynamics, seed):
    p = random_matrix(seed, dynamics.rank, semidefinite=True)
    values, vectors = torch.linalg.eigh(p)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    parts = [
        type(part)(
            factors=part.factors @ root, gradients=part.gradients @ root, signs=part.signs, population=part.population
        )
        for part in (dynamics.retain, dynamics.forget)
    ]
    scaled = LinearDynamics(
        retain=parts[0],
        forget=parts[1],
        mix=dynamics.mix,
        batch_sizes=dynamics.batch_sizes,
        sampling=dynamics.sampling,
    )
    d = dynamics.mean_hessian()
    found = torch.linalg.eigvalsh(scaled.mean_hessian())
    size = float(p.norm() * d.norm()) + 1e-300
    torch.testing.assert_close(torch.linalg.eigvalsh(root @ d @ root), found, rtol=0, atol=1e-10 * size)
    truth = np.sort(np.linalg.eigvals((p @ d).numpy()).real)
    # PD is not normal: its zero eigenvalues are exact only to the root of the rounding.
    np.testing.assert_allclose(found.numpy(), truth, rtol=0, atol=1e-6 * size)
    torch.testing.assert_close(scaled.mean_gradient(), root @ dynamics.mean_gradient(), rtol=1e-9, atol=1e-9)


# Errors


def make(**changes):
    part = random_factors(0, samples=4, rows=1, rank=2)
    options = {"retain": part, "forget": part, "mix": 0.5, "batch_sizes": (2, 2), "sampling": "poisson"}
    return LinearDynamics(**(options | changes))


def test_dynamics_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"`mix` of `LinearDynamics` must be a finite number in \[0, 1\]; got 1\.4"):
        make(mix=1.4)
    with pytest.raises(TypeError, match=r"`mix` of `LinearDynamics`.*got '0\.5'"):
        make(mix="0.5")
    with pytest.raises(ValueError, match=r"`sampling` of `LinearDynamics`.*got 'poisso'.*Did you mean 'poisson'\?"):
        make(sampling="poisso")
    with pytest.raises(
        ValueError, match=r"`batch_sizes\[1\]` of `LinearDynamics`.*in \[1, 4\]; got 5.*cannot be larger"
    ):
        make(batch_sizes=(2, 5))
    with pytest.raises(ValueError, match=r"`batch_sizes\[0\]` of `LinearDynamics`.*>= 1; got 0"):
        make(batch_sizes=(0, 5), sampling="with_replacement")
    with pytest.raises(TypeError, match=r"`batch_sizes\[0\]` of `LinearDynamics`.*got 2\.0"):
        make(batch_sizes=(2.0, 2))
    with pytest.raises(ValueError, match=r"`batch_sizes` of `LinearDynamics` must be two.*; got 3 of them"):
        make(batch_sizes=(2, 2, 2))
    with pytest.raises(ValueError, match=r"same coordinates; got 2 and 3 of them"):
        make(forget=random_factors(0, samples=4, rows=1, rank=3))


@pytest.mark.parametrize(
    ("owner", "call"),
    [
        ("mean_square", mean_square),
        ("rayleigh_bounds", rayleigh_bounds),
        ("self_loop", self_loop),
        ("coherence_rule", lambda dynamics, lr: coherence_rule(dynamics, lr, sigma=1.0)),
    ],
)
def test_step_sizes_must_be_positive(owner, call):
    with pytest.raises(ValueError, match=rf"`lr` of `{owner}` must be a finite number in \(0, inf\); got -0\.5"):
        call(make(), -0.5)


def test_horizon_and_damping_are_checked():
    with pytest.raises(ValueError, match=r"`steps` of `critical_lr_within` must be a whole number >= 1; got 0"):
        critical_lr_within(make(), 0, 2.0)
    with pytest.raises(ValueError, match=r"`growth` of `critical_lr_within` must be .* in \[1, inf\); got 0\.5"):
        critical_lr_within(make(), 10, 0.5)
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`damping` of `critical_mix` must be .* in \[0, inf\); got -1\.0"):
        critical_mix(eye, eye, damping=-1.0)
    with pytest.raises(ValueError, match=r"must be positive definite; got damping 0\.5\. Raise it"):
        critical_mix(-eye, eye, damping=0.5)
