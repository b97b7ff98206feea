"""Constructions with known answers: what they promise, against dense truth and against the library's own iterations."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.dexter import count_alarms
from stabkit.algorithms import GradDiff
from stabkit.coherence import coherence
from stabkit.curvature import HessianOperator
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from stabkit.sampling import SAMPLINGS
from stabkit.stability import (
    LinearDynamics,
    coherence_rule,
    critical_lr_mean_square,
    critical_mix,
    mean_square,
    moments,
    rayleigh_bounds,
)
from stabkit.synthetic.constructions import (
    RANDOM_KINDS,
    RANK_ONE_KINDS,
    aligned_sets,
    linear_regression,
    random_family,
    rank_one_family,
)

seeds = st.integers(0, 2**32 - 1)
samplings = st.sampled_from(SAMPLINGS)
spectra = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), min_size=1, max_size=5).filter(any)


def one_set(part, batch, sampling):
    """Training on one set: mix 0, whatever the other set."""
    return LinearDynamics(retain=part, forget=part, mix=0.0, batch_sizes=(batch, batch), sampling=sampling)


def enumerated_radius(dynamics, lr):
    """The largest eigenvalue of E[(I - ηA) ⊗ (I - ηA)] over every batch of a single set, each listed."""
    n, batch, r = dynamics.retain.samples, dynamics.batch_sizes[0], dynamics.rank
    h = dynamics.retain.matrices().numpy()
    if dynamics.sampling == "without_replacement":
        drawn = [(c, 1 / math.comb(n, batch)) for c in itertools.combinations(range(n), batch)]
    elif dynamics.sampling == "with_replacement":
        drawn = [(c, 1 / n**batch) for c in itertools.product(range(n), repeat=batch)]
    else:
        share = batch / n
        subsets = [c for size in range(n + 1) for c in itertools.combinations(range(n), size)]
        drawn = [(c, share ** len(c) * (1 - share) ** (n - len(c))) for c in subsets]
    total = np.zeros((r * r, r * r))
    for chosen, probability in drawn:
        step = np.eye(r) - lr * h[list(chosen)].sum(0) / batch
        total += probability * np.kron(step, step)
    return float(np.linalg.eigvalsh(total)[-1])


# Rank-one families


@st.composite
def rank_one_families(draw, max_samples=9):
    n = draw(st.integers(2, max_samples))
    kind = draw(st.sampled_from(RANK_ONE_KINDS))
    sigma = draw(st.integers(1, n)) if kind == "shared" else draw(st.floats(1, n))
    curvature = draw(st.sampled_from([0.01, 1.0, 30.0]))
    return rank_one_family(n, sigma=sigma, curvature=curvature, kind=kind, seed=draw(st.none() | seeds))


@given(rank_one_families(max_samples=30))
@settings(max_examples=100)
def test_rank_one_families_have_the_coherence_and_sharpness_they_promise(family):
    part = family.factors
    found = coherence(part, part, mix=0.0)
    assert found.retain == pytest.approx(family.sigma, rel=1e-6)  # a square root of tr(H_i H_j), which may be rounding
    values = torch.linalg.eigvalsh(part.matrices())
    torch.testing.assert_close(values[:, -1], torch.full_like(values[:, -1], family.sample_curvature))
    assert float(values[:, :-1].abs().max()) <= 1e-10 * family.sample_curvature if part.rank > 1 else True
    assert float(torch.linalg.eigvalsh(part.mean())[-1]) == pytest.approx(family.curvature, rel=1e-9)
    assert not part.gradients.any()


@given(rank_one_families(max_samples=16), samplings, st.data())
@settings(max_examples=150)
def test_rank_one_thresholds_equal_the_librarys(family, sampling, data):
    batch = data.draw(st.integers(1, family.factors.samples))
    dynamics = one_set(family.factors, batch, sampling)
    limit = family.critical_lr(batch, sampling)
    assert critical_lr_mean_square(dynamics, tolerance=1e-9) == pytest.approx(limit, rel=1e-6)
    assert mean_square(dynamics, 1.01 * limit).radius > 1 + 1e-9
    assert mean_square(dynamics, 0.99 * limit).radius <= 1 + 1e-9


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("kind", "sigma"), [("shared", 1), ("shared", 3), ("equiangular", 1.7), ("equiangular", 5)])
def test_rank_one_thresholds_are_where_listing_every_batch_puts_them(kind, sigma, sampling):
    family = rank_one_family(5, sigma=sigma, curvature=2.0, kind=kind, seed=0)
    for batch in (1, 2, 4):
        dynamics = one_set(family.factors, batch, sampling)
        limit = family.critical_lr(batch, sampling)
        assert enumerated_radius(dynamics, 0.999 * limit) <= 1 + 1e-9
        assert enumerated_radius(dynamics, 1.001 * limit) > 1 + 1e-6


@given(st.integers(2, 200), st.data())
def test_the_shared_direction_meets_dexters_companion_exactly(n, data):
    sigma, batch = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    family = rank_one_family(n, sigma=sigma, curvature=1.5, kind="shared")
    companion = 2 / 1.5 * sigma / (sigma + n / batch - 1)
    assert family.critical_lr(batch, "poisson") == pytest.approx(companion)


def test_both_kinds_agree_where_they_are_the_same_family():
    for sampling, batch in itertools.product(SAMPLINGS, (1, 3, 6)):
        for sigma in (1, 6):
            limits = [
                rank_one_family(6, sigma=sigma, curvature=2.0, kind=kind).critical_lr(batch, sampling)
                for kind in RANK_ONE_KINDS
            ]
            assert limits[0] == pytest.approx(limits[1])
        between = [
            rank_one_family(6, sigma=3, curvature=2.0, kind=kind).critical_lr(batch, sampling)
            for kind in RANK_ONE_KINDS
        ]
        # One sample at a time overshoots beyond 2/h, whatever the others do, and a full batch beyond 2/λ.
        alone, full = batch == 1 and sampling != "poisson", batch == 6 and sampling != "with_replacement"
        assert (between[0] == pytest.approx(between[1])) == (alone or full)


# Two sets


@given(
    st.integers(1, 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.floats(0, 1),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    st.none() | seeds,
    st.floats(0, 1),
)
@settings(max_examples=100)
def test_aligned_sets_have_the_alignment_and_spectra_they_promise(k, times, alignment, curvature, seed, mix):
    sets = aligned_sets(k * times[0], k * times[1], alignment=alignment, curvature=curvature, directions=k, seed=seed)
    found = coherence(sets.retain, sets.forget, mix=mix)
    assert found.cross == pytest.approx(alignment, abs=1e-9)
    assert found.cosine == pytest.approx(alignment, abs=1e-9)
    assert (found.retain, found.forget) == (pytest.approx(times[0]), pytest.approx(times[1]))
    for part, height in zip((sets.retain, sets.forget), curvature, strict=True):
        values = torch.linalg.eigvalsh(part.mean())
        torch.testing.assert_close(values[-k:], torch.full((k,), height).double())
        assert float(values[:-k].abs().max()) <= 1e-10 * height
    mixed = torch.linalg.eigvalsh((1 - mix) * sets.retain.mean() - mix * sets.forget.mean())
    low, high = sets.mixed_extremes(mix)
    scale = max(curvature)
    assert (low, high) == (
        pytest.approx(float(mixed[0]), abs=1e-10 * scale),
        pytest.approx(float(mixed[-1]), abs=1e-10 * scale),
    )


@given(st.floats(0, 1), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(1e-3, 1))
def test_critical_mix_of_aligned_sets_equals_the_librarys(alignment, retain, forget, damping):
    sets = aligned_sets(4, 2, alignment=alignment, curvature=(retain, forget), directions=2, seed=1)
    found = critical_mix(sets.retain.mean(), sets.forget.mean(), damping=damping)
    assert sets.critical_mix(damping) == pytest.approx(found.mix, rel=1e-8)


# Linear regression


@st.composite
def regressions(draw, design=None, noise=None):
    size = draw(st.integers(1, 5))
    entries = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), min_size=size, max_size=size).filter(any)
    return linear_regression(
        retain_spectrum=draw(entries),
        forget_spectrum=draw(entries),
        samples=(draw(st.integers(size, 12)), draw(st.integers(size, 12))),
        design=draw(st.sampled_from(["dense", "orthogonal"])) if design is None else design,
        noise=draw(st.sampled_from([0.0, 0.5])) if noise is None else noise,
        seed=draw(seeds),
    )


def dynamics_of(problem, mix, batch_sizes, sampling):
    retain, forget = problem.factors()
    return LinearDynamics(retain=retain, forget=forget, mix=mix, batch_sizes=batch_sizes, sampling=sampling)


@given(regressions(), st.floats(0, 1), st.floats(1e-3, 1))
@settings(max_examples=100)
def test_regressions_have_the_hessians_they_promise(problem, mix, damping):
    means = []
    for part, spectrum in zip(problem.factors(), (problem.retain_spectrum, problem.forget_spectrum), strict=True):
        truth = problem.basis @ torch.diag(spectrum) @ problem.basis.T
        torch.testing.assert_close(part.mean(), truth, rtol=0, atol=1e-11)
        means.append(part.mean())
    mixed = torch.linalg.eigvalsh((1 - mix) * means[0] - mix * means[1])
    torch.testing.assert_close(problem.mixed_spectrum(mix).sort().values, mixed, rtol=0, atol=1e-11)
    found = critical_mix(*means, damping=damping)
    assert problem.critical_mix(damping) == pytest.approx(found.mix, rel=1e-8)
    if problem.design == "orthogonal":
        along = torch.cat([x @ problem.basis for x, _ in (problem.retain, problem.forget)])
        assert bool(((along.abs() > 1e-9).sum(1) == 1).all())


@pytest.mark.filterwarnings("ignore::stabkit.OverlapWarning")  # few drawn samples may be the same in both sets
@given(regressions(noise=0.0))
def test_the_librarys_hessians_are_the_closed_ones(problem):
    assume(min(len(problem.retain[0]), len(problem.forget[0])) > 1)
    unlearning = UnlearningProblem(problem.model, problem.forget, problem.retain, loss="mse")
    for samples, part in zip((unlearning.retain, unlearning.forget), problem.factors(), strict=True):
        found = HessianOperator(unlearning, samples) @ torch.eye(part.rank).double()
        torch.testing.assert_close(found, part.mean(), rtol=0, atol=1e-10)


@given(regressions(noise=0.5))
def test_gradients_are_those_of_the_squared_loss(problem):
    for (x, y), part in zip((problem.retain, problem.forget), problem.factors(), strict=True):
        weights = problem.model.weight.detach().requires_grad_()
        for i, loss in enumerate((x @ weights.T - y).square().flatten()):
            (gradient,) = torch.autograd.grad(loss, weights, retain_graph=True)
            torch.testing.assert_close(part.gradients[i], gradient[0], rtol=1e-10, atol=1e-12)


@given(regressions(design="orthogonal"), st.sampled_from([0.0, 0.05, 0.3]), samplings, st.floats(0.1, 3), st.data())
@settings(max_examples=150)
def test_orthogonal_designs_have_the_radius_and_threshold_of_their_formulas(problem, mix, sampling, factor, data):
    sizes = tuple(data.draw(st.integers(1, len(x))) for x, _ in (problem.retain, problem.forget))
    dynamics = dynamics_of(problem, mix, sizes, sampling)
    lr = factor / float(problem.retain_spectrum.max())
    found = problem.radius(lr, mix=mix, batch_sizes=sizes, sampling=sampling)
    assert found == pytest.approx(mean_square(dynamics, lr).radius, rel=1e-9)
    # With D's own eigenvectors the Rayleigh bound is the radius; where an eigenvalue is repeated they are not the basis.
    spectrum = problem.mixed_spectrum(mix)
    if len(spectrum) == len(spectrum.unique()):
        assert rayleigh_bounds(dynamics, lr) == pytest.approx(found, rel=1e-6)
    limit = problem.critical_lr(mix=mix, batch_sizes=sizes, sampling=sampling)
    assert limit == pytest.approx(critical_lr_mean_square(dynamics, tolerance=1e-9), rel=1e-6)


@given(regressions(), st.floats(0, 1), st.floats(0.1, 3))
def test_full_batches_have_the_mean_threshold_in_any_design(problem, mix, factor):
    sizes = tuple(len(x) for x, _ in (problem.retain, problem.forget))
    options = {"mix": mix, "batch_sizes": sizes, "sampling": "without_replacement"}
    dynamics = dynamics_of(problem, mix, sizes, "without_replacement")
    spectrum = problem.mixed_spectrum(mix)
    assume(float(spectrum.abs().max()) > 1e-3)
    limit = problem.critical_lr(**options)
    if float(spectrum.min()) < -1e-9:
        assert limit == 0
    elif float(spectrum.min()) >= 0:
        assert limit == pytest.approx(2 / float(spectrum.max()))
    assert limit == pytest.approx(critical_lr_mean_square(dynamics), rel=1e-5)
    lr = factor / float(problem.retain_spectrum.max())
    assert problem.radius(lr, **options) == pytest.approx(mean_square(dynamics, lr).radius, rel=1e-9)


def test_thresholds_where_nothing_is_stable_or_everything_is():
    options = {"batch_sizes": (1, 1), "sampling": "poisson"}

    def problem(retain, forget):
        return linear_regression(retain_spectrum=retain, forget_spectrum=forget, samples=(4, 4), design="orthogonal")

    assert problem([1.0, 2.0], [1.0, 1.0]).critical_lr(mix=1.0, **options) == 0  # ascent
    assert problem([1.0, 2.0], [1.0, 2.0]).critical_lr(mix=0.5, **options) == 0  # D = 0, and batches act
    full = {"batch_sizes": (4, 4), "sampling": "without_replacement"}
    assert problem([1.0, 2.0], [1.0, 2.0]).critical_lr(mix=0.5, **full) == math.inf
    assert problem([1.0, 0.0], [0.0, 2.0]).critical_mix(0.0) == 0
    assert problem([1.0, 3.0], [1.0, 1.0]).critical_mix(0.0) == pytest.approx(0.5)


@given(regressions(), st.floats(0, 1), st.floats(0.01, 2), samplings)
def test_the_mean_course_is_that_of_every_batch_scheme(problem, mix, factor, sampling):
    lr = factor / float(problem.retain_spectrum.max())
    course = problem.mean_displacement(lr, mix=mix, steps=7)
    found = moments(dynamics_of(problem, mix, (1, 1), sampling), lr=lr, steps=7)
    scale = 1 + float(course.abs().max())
    torch.testing.assert_close(course[-1], found.mean, rtol=0, atol=1e-9 * scale)
    assert not course[0].any()


def test_the_mean_drifts_evenly_where_the_sets_cancel():
    problem = linear_regression(
        retain_spectrum=[1.0, 2.0], forget_spectrum=[1.0, 0.5], samples=(6, 4), noise=0.5, seed=2
    )
    assert problem.mixed_spectrum(0.5)[0] == 0
    course = problem.mean_displacement(0.4, mix=0.5, steps=9)
    found = moments(dynamics_of(problem, 0.5, (2, 2), "with_replacement"), lr=0.4, steps=9)
    torch.testing.assert_close(course[-1], found.mean, rtol=1e-10, atol=1e-12)
    along = course @ problem.basis[:, 0]
    assert abs(float(along[1])) > 1e-3
    torch.testing.assert_close(along, along[1] * torch.arange(10), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("design", ["dense", "orthogonal"])
def test_a_real_full_batch_run_takes_the_closed_course(design):
    problem = linear_regression(
        retain_spectrum=[2.0, 1.0, 0.5, 0.0],
        forget_spectrum=[1.0, 0.0, 0.5, 0.7],
        samples=(20, 10),
        design=design,
        noise=0.1,
        seed=3,
    )
    course = problem.mean_displacement(0.3, mix=0.2, steps=12)
    algorithm = GradDiff(lr=0.3, mix=0.2, steps=12, batch_size=20, forget_batch_size=10, sampling="without_replacement")
    before = problem.model.weight.detach().clone()
    unlearning = UnlearningProblem(problem.model, problem.forget, problem.retain, loss="mse")
    result = run(unlearning, algorithm, stop_on_divergence=False)
    torch.testing.assert_close((result.model.weight - before)[0], course[-1], rtol=1e-10, atol=1e-12)
    distances = [check.distance for check in result.trajectory]
    assert distances == pytest.approx([float(course[c.step].norm()) for c in result.trajectory], rel=1e-9, abs=1e-12)
    assert distances[-1] > 1e-3


def test_noise_in_the_labels_is_drift_and_none_is_interpolation():
    options = {"retain_spectrum": [2.0, 1.0], "forget_spectrum": [1.0, 1.0], "samples": (12, 5), "seed": 1}
    exact, noisy = linear_regression(**options), linear_regression(**options, noise=0.3)
    for part in exact.factors():
        assert float(part.gradients.abs().max()) < 1e-12
    retain, forget = noisy.factors()
    assert float(retain.mean_gradient().norm()) > 1e-3
    whole = 12 * retain.mean_gradient() + 5 * forget.mean_gradient()  # the fit is to both sets together
    assert float(whole.abs().max()) < 1e-11
    assert torch.equal(exact.retain[0], noisy.retain[0])


# Random families, and the rules on all of them


def test_random_families_are_semidefinite_and_varied():
    families = [random_family(seed) for seed in range(200)]
    for part in families:
        values = torch.linalg.eigvalsh(part.matrices())
        assert float(values.min()) >= -1e-10 * float(values.max())
        assert (part.signs, part.population) == (None, part.samples)
    assert {part.samples for part in families} == set(range(2, 17))
    assert {part.rank for part in families} == set(range(1, 7))
    shares = [coherence(part, part, mix=0.0).retain / part.samples for part in families]
    assert min(shares) < 0.25
    assert max(shares) > 0.9
    assert len(RANDOM_KINDS) == 4


def test_no_rule_calls_a_stable_family_divergent():
    """T13, T10 and the self-loop bound on one set under Poisson sampling, where each is a theorem."""
    found = count_alarms(300)
    assert found["stable"] + found["unstable"] == 300
    assert min(found["stable"], found["unstable"]) >= 90
    assert [found[f"{name}_on_stable"] for name in ("rule", "self_loop", "rayleigh")] == [0, 0, 0]
    assert found["rule_on_unstable"] >= 0.3 * found["unstable"]
    assert found["self_loop_on_unstable"] >= 0.3 * found["unstable"]
    assert found["rayleigh_on_unstable"] >= 0.8 * found["unstable"]


@given(rank_one_families(max_samples=20), st.floats(0.2, 5), st.data())
@settings(max_examples=200)
def test_the_rule_with_a_prescribed_coherence_keeps_to_the_closed_threshold(family, factor, data):
    n = family.factors.samples
    batch = data.draw(st.integers(1, n))
    limit = family.critical_lr(batch, "poisson")
    lr = factor * limit
    verdict = coherence_rule(one_set(family.factors, batch, "poisson"), lr, sigma=family.sigma)
    assert lr > limit * (1 - 1e-9) or not verdict.diverges
    # From λ >= (σ/η)(n/B - 1)^{-1/2} on it does fire: the rule is that inequality, with λ and σ as they were asked for.
    said = family.curvature * lr * math.sqrt(max(n / batch - 1, 0)) / family.sigma
    if abs(said - 1) > 1e-6 and abs(family.curvature * lr / 2 - 1) > 1e-6:
        assert verdict.diverges == (said > 1 or family.curvature * lr > 2)


# Errors, and what is left alone


def test_global_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    linear_regression(retain_spectrum=[1.0], forget_spectrum=[1.0], samples=(2, 2))
    rank_one_family(4, sigma=2, curvature=1.0, seed=0)
    aligned_sets(2, 2, alignment=0.5, seed=0)
    random_family(0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rank_one_families_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"`samples` of `rank_one_family` must be a whole number >= 2; got 1"):
        rank_one_family(1, sigma=1, curvature=1.0)
    with pytest.raises(ValueError, match=r"`sigma` of `rank_one_family` must be .* in \[1, 5\]; got 5\.5"):
        rank_one_family(5, sigma=5.5, curvature=1.0)
    with pytest.raises(
        ValueError, match=r"`sigma` of `rank_one_family` must be a whole number for kind='shared'.*; got 2\.5"
    ):
        rank_one_family(5, sigma=2.5, curvature=1.0, kind="shared")
    with pytest.raises(ValueError, match=r"`curvature` of `rank_one_family`.*\(0, inf\); got 0\.0"):
        rank_one_family(5, sigma=2, curvature=0.0)
    with pytest.raises(ValueError, match=r"`kind` of `rank_one_family`.*got 'share'.*Did you mean 'shared'\?"):
        rank_one_family(5, sigma=2, curvature=1.0, kind="share")
    family = rank_one_family(5, sigma=2, curvature=1.0)
    with pytest.raises(ValueError, match=r"`batch` of `RankOneFamily.critical_lr` must be .* in \[1, 5\]; got 6"):
        family.critical_lr(6, "poisson")
    with pytest.raises(ValueError, match=r"`sampling` of `RankOneFamily.critical_lr`.*got 'loader'"):
        family.critical_lr(2, "loader")


def test_aligned_sets_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"`alignment` of `aligned_sets` must be .* in \[0, 1\]; got 1\.5"):
        aligned_sets(4, 4, alignment=1.5)
    with pytest.raises(ValueError, match=r"`directions` of `aligned_sets` must be .* >= 1; got 0"):
        aligned_sets(4, 4, alignment=0.5, directions=0)
    with pytest.raises(ValueError, match=r"`retain_samples` of `aligned_sets` must be .* >= 1; got 0"):
        aligned_sets(0, 4, alignment=0.5)
    with pytest.raises(ValueError, match=r"`forget_samples` of `aligned_sets` must be a multiple of .* is 3; got 4"):
        aligned_sets(6, 4, alignment=0.5, directions=3)
    with pytest.raises(ValueError, match=r"`curvature\[1\]` of `aligned_sets`.*got -1"):
        aligned_sets(4, 4, alignment=0.5, curvature=(1.0, -1.0))
    sets = aligned_sets(4, 4, alignment=0.5)
    with pytest.raises(ValueError, match=r"`mix` of `AlignedSets.mixed_extremes`.*got 2"):
        sets.mixed_extremes(2)
    with pytest.raises(ValueError, match=r"`damping` of `AlignedSets.critical_mix` must be .*\(0, inf\); got 0"):
        sets.critical_mix(0)


def test_regressions_say_what_is_wrong():
    options = {"retain_spectrum": [1.0, 2.0], "forget_spectrum": [1.0, 2.0], "samples": (4, 4)}
    with pytest.raises(ValueError, match=r"`retain_spectrum\[1\]` of `linear_regression`.*got -2"):
        linear_regression(**options | {"retain_spectrum": [1.0, -2.0]})
    with pytest.raises(
        ValueError, match=r"`forget_spectrum` of `linear_regression` must have a positive.*got \[0\.0, 0\.0\]"
    ):
        linear_regression(**options | {"forget_spectrum": [0.0, 0.0]})
    with pytest.raises(
        ValueError, match=r"`forget_spectrum` of `linear_regression` must be as long.*got 1 entries for 2"
    ):
        linear_regression(**options | {"forget_spectrum": [1.0]})
    with pytest.raises(ValueError, match=r"`samples\[1\]` of `linear_regression` must be a whole number >= 2; got 1"):
        linear_regression(**options | {"samples": (4, 1)})
    with pytest.raises(ValueError, match=r"`noise` of `linear_regression`.*got -0\.1"):
        linear_regression(**options, noise=-0.1)
    with pytest.raises(ValueError, match=r"`design` of `linear_regression`.*got 'dens'.*Did you mean 'dense'\?"):
        linear_regression(**options, design="dens")
    dense = linear_regression(**options)
    for owner in ("radius", "critical_lr"):
        arguments = (0.1,) if owner == "radius" else ()
        with pytest.raises(ValueError, match=rf"`batch_sizes` of `LinearRegression.{owner}` must be full.*got 2 of 4"):
            getattr(dense, owner)(*arguments, mix=0.3, batch_sizes=(2, 4), sampling="without_replacement")
        with pytest.raises(ValueError, match=rf"`sampling` of `LinearRegression.{owner}`.*got 'loader'"):
            getattr(dense, owner)(*arguments, mix=0.3, batch_sizes=(4, 4), sampling="loader")
    with pytest.raises(ValueError, match=r"`lr` of `LinearRegression.radius`.*got 0"):
        dense.radius(0, mix=0.3, batch_sizes=(4, 4), sampling="poisson")
    with pytest.raises(ValueError, match=r"`mix` of `LinearRegression.mixed_spectrum`.*got 1\.2"):
        dense.mixed_spectrum(1.2)
    with pytest.raises(ValueError, match=r"`damping` of `LinearRegression.critical_mix`.*got -1"):
        dense.critical_mix(-1)
    with pytest.raises(ValueError, match=r"`steps` of `LinearRegression.mean_displacement`.*got 0"):
        dense.mean_displacement(0.1, mix=0.3, steps=0)
    with pytest.raises(ValueError, match=r"`lr` of `LinearRegression.mean_displacement`.*got -1"):
        dense.mean_displacement(-1, mix=0.3, steps=1)


def test_random_families_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"`max_samples` of `random_family` must be .* >= 2; got 1"):
        random_family(0, max_samples=1)
    with pytest.raises(ValueError, match=r"`max_rank` of `random_family` must be .* >= 1; got 0"):
        random_family(0, max_rank=0)
