"""Exponents of spectra against published values, a plain scan, two other programs, and samples of known tails."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabkit.heavy_tail import fit_power_law
from stabkit.heavy_tail.scan import log_excess, scan
from stabkit.heavy_tail.truncated import fit_truncated

# (n, seed): exponents for a = 2, 3, 4, 6, then the tail's size and the distance, which do not depend on a.
SAMPLED = {
    (500, 0): ((1.985880, 2.971759, 3.957639, 5.929398), 487, 0.028872),
    (500, 1): ((1.974078, 2.948156, 3.922233, 5.870389), 500, 0.027932),
    (500, 2): ((2.047188, 3.094377, 4.141565, 6.235942), 491, 0.018585),
    (500, 3): ((2.080781, 3.161562, 4.242343, 6.403905), 369, 0.027242),
    (2000, 0): ((1.934653, 2.869306, 3.803959, 5.673264), 1230, 0.011932),
}
QUANTILES = {500: (2.001696, 3.003393, 4.005089, 6.008482), 2000: (2.000423, 3.000847, 4.001270, 6.002117)}
GAUSSIAN = {(1024, 1024): (6.969705, 44.080767, 17.897974), (512, 2048): (30.242436, 10.968441, 20.388013)}
TRUE = (2, 3, 4, 6)
SIX_DECIMALS = 1e-6


def pareto(uniform, exponent):
    return (1 - uniform) ** (-1 / (exponent - 1))


def draws(n, seed):
    return np.random.default_rng(seed).random(n)


def plain_scan(logs):
    """Every start tried in turn: the definition, with no cleverness."""
    best = (math.inf, 0, math.nan)
    for i in range(len(logs) - 1):
        tail = logs[i:] - logs[i]
        n = len(tail)
        if tail.sum() == 0:
            continue
        slope = n / tail.sum()
        distance = np.abs(1 - np.exp(-slope * tail) - np.arange(n) / n).max()
        if distance < best[0]:
            best = (distance, i, 1 + slope)
    return best


@pytest.mark.parametrize(("n", "seed"), SAMPLED)
def test_reference_values_of_seeded_pareto_samples(n, seed):
    exponents, n_tail, distance = SAMPLED[n, seed]
    u = np.random.RandomState(seed).random_sample(n)
    for a, expected in zip(TRUE, exponents, strict=True):
        fit = fit_power_law(pareto(u, a))
        assert fit.exponent == pytest.approx(expected, abs=SIX_DECIMALS)
        assert fit.n_tail == n_tail
        assert fit.distance == pytest.approx(distance, abs=SIX_DECIMALS)
        assert fit.standard_error == pytest.approx((fit.exponent - 1) / math.sqrt(n_tail), rel=1e-12)


@pytest.mark.parametrize("n", QUANTILES)
def test_reference_values_of_exact_quantiles(n):
    u = (np.arange(1, n + 1) - 0.5) / n
    found = [fit_power_law(pareto(u, a)).exponent for a in TRUE]
    assert found == pytest.approx(QUANTILES[n], abs=SIX_DECIMALS)


@pytest.mark.parametrize("shape", GAUSSIAN)
def test_reference_values_of_gaussian_matrices(shape):
    for seed, expected in enumerate(GAUSSIAN[shape]):
        w = np.random.RandomState(seed).standard_normal(shape) / math.sqrt(shape[1])
        eigenvalues = np.linalg.svd(w, compute_uv=False) ** 2
        assert fit_power_law(eigenvalues).exponent == pytest.approx(expected, abs=SIX_DECIMALS)


@given(
    n=st.integers(20, 400),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["pareto", "lognormal", "uniform", "rounded", "two tails"]),
)
@settings(max_examples=150, deadline=None)
def test_pruned_scan_is_the_plain_scan(n, seed, kind):
    rng = np.random.default_rng(seed)
    if kind == "pareto":
        values = pareto(rng.random(n), 1.2 + 5 * rng.random())
    elif kind == "lognormal":
        values = np.exp(2 * rng.standard_normal(n))
    elif kind == "uniform":
        values = rng.random(n) + 1e-3
    elif kind == "rounded":  # many ties
        values = 1 + np.round(5 * rng.random(n))
    else:
        values = np.concatenate([rng.random(n // 2) + 0.1, 5 * pareto(rng.random(n - n // 2), 2.5)])
    logs = np.sort(np.log(values))
    distance, start, exponent = plain_scan(logs)
    found, asked = scan(logs), scan(logs, rivals=True)
    assert (found.start, found.distance) == (asked.start, asked.distance)
    assert found.distance == pytest.approx(distance, abs=1e-12)
    # Two starts may tie but for rounding; then only the distance is determined.
    if found.start != start:
        assert abs(found.distance - distance) < 1e-13
    else:
        assert found.exponent == pytest.approx(exponent, rel=1e-10)


def test_log_excess_is_exactly_zero_on_ties():
    logs = np.log([1.0, 1.7, 3.3, 3.3, 3.3])
    assert log_excess(logs)[2:].tolist() == [0.0, 0.0, 0.0]
    expected = [np.sum(logs[i:] - logs[i]) for i in range(5)]
    assert log_excess(logs) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("n", [2, 5, 7, 8, 9, 12, 19])
def test_small_samples_follow_weightwatcher(n, weightwatcher_fit):
    for seed in range(10):
        values = pareto(draws(n, seed), 3.0)
        reference = weightwatcher_fit(values)
        fit = fit_power_law(values)
        assert fit.exponent == pytest.approx(reference.alpha, rel=1e-10)
        assert fit.lambda_min == reference.xmin
        assert fit.distance == pytest.approx(reference.D, abs=1e-12)


@pytest.fixture(scope="module")
def weightwatcher_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        powerlaw = pytest.importorskip("weightwatcher.WW_powerlaw")
    return powerlaw.WWFit


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("exponent", [1.8, 3.0, 5.0])
def test_agrees_with_powerlaw(seed, exponent):
    powerlaw = pytest.importorskip("powerlaw")
    values = np.exp(0.3 * np.random.default_rng(seed).standard_normal(150)) * pareto(draws(150, seed + 50), exponent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its default range [0, 3] would clip the larger exponents.
        reference = powerlaw.Fit(values, parameter_ranges={"alpha": [1, None]}, verbose=False)
        alpha, xmin = reference.power_law.alpha, reference.xmin
    fit = fit_power_law(values)
    assert fit.lambda_min == pytest.approx(xmin, rel=1e-12)
    assert fit.exponent == pytest.approx(alpha, rel=1e-6)


@given(n=st.integers(20, 300), seed=st.integers(0, 10**6), scale=st.floats(1e-2, 1e6))
@settings(max_examples=60, deadline=None)
def test_exponent_does_not_change_with_scale(n, seed, scale):
    values = pareto(draws(n, seed), 2.5)
    one, other = fit_power_law(values), fit_power_law(scale * values)
    assert other.distance == pytest.approx(one.distance, abs=1e-9)
    if other.n_tail == one.n_tail:  # near-equal minima may be decided by rounding
        assert other.exponent == pytest.approx(one.exponent, rel=1e-9)
        assert other.lambda_min == pytest.approx(scale * one.lambda_min, rel=1e-9)


@given(n=st.integers(20, 300), seed=st.integers(0, 10**6), exponent=st.floats(1.3, 8))
@settings(max_examples=60, deadline=None)
def test_same_draws_give_a_constant_relative_slope(n, seed, exponent):
    # λ = (1-u)^(-1/(a-1)) scales every ln λ by 1/(a-1), hence (ξ-1)/(a-1) depends on u alone.
    u = draws(n, seed)
    one, other = fit_power_law(pareto(u, 2.0)), fit_power_law(pareto(u, exponent))
    assert other.distance == pytest.approx(one.distance, abs=1e-9)
    if other.n_tail == one.n_tail:
        assert (other.exponent - 1) / (exponent - 1) == pytest.approx(one.exponent - 1, rel=1e-8)


@given(n=st.integers(2, 60), seed=st.integers(0, 10**6), method=st.sampled_from(["mle", "hill", "truncated"]))
@settings(max_examples=60, deadline=None)
def test_order_and_container_do_not_matter(n, seed, method):
    rng = np.random.default_rng(seed)
    values = pareto(rng.random(n), 3.0)
    before = values.copy()
    fit = fit_power_law(values, method=method)
    assert (values == before).all()
    assert fit == fit_power_law(torch.tensor(rng.permutation(values)), method=method)
    assert fit == fit_power_law(values.tolist(), method=method)


def test_intervals_cover_the_truth_at_about_the_stated_rate():
    # Percentile intervals of a tail whose start is searched: 95 % nominal. 100 samples have a standard error of
    # 2.2 points, so [0.86, 1] is the nominal rate within four of them.
    for n, truth in ((60, 2.0), (200, 3.0)):
        covered = 0
        for seed in range(100):
            low, high = fit_power_law(pareto(draws(n, seed), truth), bootstrap=60, seed=seed).interval
            covered += low <= truth <= high
        assert 86 <= covered <= 100


def test_estimates_converge():
    errors = [
        np.median([abs(fit_power_law(pareto(draws(n, seed), 3.0)).exponent - 3) for seed in range(30)])
        for n in (50, 3000)
    ]
    assert errors[1] < errors[0] / 3  # √60 ≈ 7.7 times smaller in expectation


def test_tail_of_a_mixture_is_found():
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.uniform(0.2, 1.0, 600), pareto(rng.random(400), 3.0)])
    fit = fit_power_law(values)
    assert 0.8 < fit.lambda_min < 2.0
    assert abs(fit.exponent - 3) < 4 * fit.standard_error


def test_hill_on_a_fixed_tail():
    values = np.sort(pareto(draws(200, 5), 3.0))
    for tail, k in ((20, 20), (0.25, 50), (None, 100), (10**6, 199)):
        fit = fit_power_law(values, method="hill", tail=tail)
        base = values[-k - 1]
        assert fit.exponent == pytest.approx(1 + k / np.log(values[-k:] / base).sum(), rel=1e-12)
        assert (fit.n_tail, fit.lambda_min) == (k, base)
        assert fit.standard_error == pytest.approx((fit.exponent - 1) / math.sqrt(k), rel=1e-12)


def test_mle_on_a_fixed_tail():
    values = np.sort(pareto(draws(200, 6), 3.0))
    for tail, k in ((30, 30), (0.1, 20)):
        fit = fit_power_law(values, tail=tail)
        assert fit.exponent == pytest.approx(1 + k / np.log(values[-k:] / values[-k]).sum(), rel=1e-12)
        assert (fit.n_tail, fit.lambda_min) == (k, values[-k])


def truncated_sample(n, exponent, cutoff, seed):
    rng, kept = np.random.default_rng(seed), np.empty(0)
    while len(kept) < n:
        proposal = pareto(rng.random(4 * n), exponent)
        kept = np.append(kept, proposal[rng.random(4 * n) < np.exp(-cutoff * (proposal - 1))])
    return kept[:n]


@pytest.mark.parametrize(("exponent", "cutoff"), [(1.5, 0.1), (2.0, 0.05), (3.0, 0.2)])
def test_truncated_law_agrees_with_powerlaw_and_the_truth(exponent, cutoff):
    powerlaw = pytest.importorskip("powerlaw")
    values = truncated_sample(800, exponent, cutoff, 0)
    fit = fit_power_law(values, method="truncated", tail=len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = powerlaw.Fit(
            values, xmin=values.min(), parameter_ranges={"alpha": [-5, None], "Lambda": [0, None]}, verbose=False
        ).truncated_power_law
        alpha, rate = reference.alpha, reference.Lambda
    assert fit.exponent == pytest.approx(alpha, abs=1e-3)
    assert fit.cutoff == pytest.approx(rate, abs=1e-3)
    assert abs(fit.exponent - exponent) < 4 * fit.standard_error
    assert fit.distance < 1.63 / math.sqrt(len(values))  # the 1 % point of Kolmogorov's statistic


def test_truncated_law_without_a_cutoff_is_the_power_law():
    values = pareto((np.arange(1, 401) - 0.5) / 400, 2.5)
    fit = fit_power_law(values, method="truncated", tail=400)
    assert fit.exponent == pytest.approx(fit_power_law(values, tail=400).exponent, abs=0.02)
    assert fit.cutoff * fit.lambda_max < 1.0  # no visible cut-off within the data


def test_truncated_gradient_vanishes_at_the_fit():
    # At the maximum, model means of (ln y, y) equal the sample's; the density is integrated independently here.
    values = np.sort(truncated_sample(500, 1.5, 0.1, 2))
    fit = fit_truncated(np.log(values))
    y = values / values[0]
    beta = fit.cutoff * values[0]
    grid = np.linspace(0, math.log(80 / beta), 400001)
    density = np.exp((1 - fit.exponent) * grid - beta * np.exp(grid))
    density /= density.sum()
    assert (density * grid).sum() == pytest.approx(np.log(y).mean(), rel=1e-4)
    assert (density * np.exp(grid)).sum() == pytest.approx(y.mean(), rel=1e-4)
    assert fit.converged


def test_p_value_tells_a_power_law_from_a_lognormal():
    rng = np.random.default_rng(1)
    tail = fit_power_law(pareto(rng.random(400), 3.0), tail=400, p_value_draws=100)
    body = fit_power_law(np.exp(rng.standard_normal(400)), tail=400, p_value_draws=100)
    assert tail.p_value > 0.05
    assert body.p_value < 0.02


def test_p_values_of_true_power_laws_are_not_small():
    small = sum(fit_power_law(pareto(draws(100, s), 3.0), p_value_draws=25, seed=s).p_value < 0.1 for s in range(40))
    assert small <= 12  # 4 expected, four standard errors of 1.9 above


def test_near_minima_are_flagged():
    smooth = fit_power_law(pareto((np.arange(1, 501) - 0.5) / 500, 3.0))
    assert not smooth.near_minima
    # Two power laws joined: the whole and the upper part fit about equally well, with exponents 2 and 3.
    rng = np.random.default_rng(0)
    flagged = 0
    for _ in range(30):
        values = np.concatenate([pareto(rng.random(200), 2.0), 20 * pareto(rng.random(60), 4.0)])
        flagged += fit_power_law(values).near_minima
    assert flagged > 0


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_near_minima_is_what_the_plain_scan_says(seed):
    rng = np.random.default_rng(seed)
    logs = np.sort(np.log(np.concatenate([pareto(rng.random(60), 1.8), 10 * pareto(rng.random(40), 4.0)])))
    chosen = scan(logs, rivals=True)
    expected = False
    for i in range(len(logs) - 1):
        tail = logs[i:] - logs[i]
        slope = len(tail) / tail.sum()
        distance = np.abs(1 - np.exp(-slope * tail) - np.arange(len(tail)) / len(tail)).max()
        apart = 3 * (chosen.exponent - 1) / math.sqrt(len(logs) - chosen.start)
        expected |= distance <= 1.1 * chosen.distance and abs(1 + slope - chosen.exponent) > apart
    assert chosen.rival == expected


def test_seeds_repeat_and_the_global_generator_is_left_alone():
    values = pareto(draws(80, 9), 3.0)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    first = fit_power_law(values, bootstrap=40, p_value_draws=20, seed=4)
    assert first == fit_power_law(values, bootstrap=40, p_value_draws=20, seed=4)
    assert first.interval != fit_power_law(values, bootstrap=40, seed=5).interval
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones(30), "all 30 eigenvalues are equal"),
        (np.zeros(30), "fewer than 2 eigenvalues above 1e-05: 0"),
        ([3.0], "fewer than 2 eigenvalues above 1e-05: 1"),
        ([], "fewer than 2 eigenvalues above 1e-05: 0"),
        ([1.0, math.nan, 2.0], "1 of 3 eigenvalues are NaN or infinite"),
        ([1.0, math.inf, -math.inf], "2 of 3 eigenvalues are NaN or infinite"),
    ],
)
@pytest.mark.parametrize("method", ["mle", "hill", "truncated"])
def test_undefined_is_nan_with_a_reason(values, reason, method):
    fit = fit_power_law(values, method=method)
    assert fit.reason == reason
    assert not fit.defined
    assert math.isnan(fit.exponent)
    assert math.isnan(fit.standard_error)
    assert fit.interval is None


def test_a_fixed_tail_of_ties_is_undefined():
    values = [1.0, 2.0, 5.0, 5.0, 5.0]
    for method, tail in (("mle", 3), ("hill", 2), ("truncated", 2)):
        fit = fit_power_law(values, method=method, tail=tail)
        assert fit.reason == "all eigenvalues of the tail are equal"


@given(st.lists(st.sampled_from([0.0, 1e-6, 1.0, 2.0, 2.0 + 1e-12, 7.0]), max_size=40))
@settings(max_examples=100, deadline=None)
def test_never_infinite_and_never_raises(values):
    for method in ("mle", "hill", "truncated"):
        fit = fit_power_law(values, method=method)
        assert fit.defined == math.isfinite(fit.exponent)
        assert not math.isinf(fit.standard_error)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"method": "mel"}, ValueError, r"`method` of `fit_power_law` .*got 'mel'. Did you mean 'mle'"),
        ({"tail": 1}, ValueError, r"`tail` of `fit_power_law` .*got 1"),
        ({"tail": 1.5}, ValueError, r"`tail` of `fit_power_law` .*got 1.5"),
        ({"tail": "half"}, TypeError, r"`tail` of `fit_power_law` .*got 'half'"),
        ({"bootstrap": 5}, ValueError, r"`bootstrap` of `fit_power_law` must be 0 or at least 20; got 5"),
        ({"p_value_draws": -1}, ValueError, r"`p_value_draws` of `fit_power_law` .*got -1"),
        ({"p_value_draws": 9, "method": "hill"}, ValueError, r"must be 0 for method 'hill'; got 9"),
        ({"threshold": -1.0}, ValueError, r"`threshold` of `fit_power_law` .*got -1.0"),
        ({"seed": 0.5}, TypeError, r"`seed` of `fit_power_law` .*got 0.5"),
    ],
)
def test_errors_name_what_came(kwargs, error, match):
    with pytest.raises(error, match=match):
        fit_power_law([1.0, 2.0, 3.0], **kwargs)
