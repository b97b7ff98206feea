"""Growth with momentum and in cycles, the settings that keep it in bounds, and maps over two settings (T6-T8)."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from test_moments import HOW, options, problem, samplings, torch_like_step
from test_stability import batches

from stabkit import schedules
from stabkit.stability import (
    Optimiser,
    critical_batch_within,
    critical_lr_mean_square,
    critical_lr_within,
    critical_mix_within,
    mean_growth,
    mean_square,
    mean_stability,
    moments,
    stability_map,
    step_limit,
)
from tests.strategies import two_sets, unit_lr


def dense_radius(dynamics, lrs, mixes, how):
    """Spectral radius of the product of E[M_k ⊗ M_k] over a cycle, M_k the matrix of a step on (δ, v)."""
    r = dynamics.rank
    h = [part.matrices().numpy() for part in (dynamics.retain, dynamics.forget)]
    drawn = [
        list(zip(*batches(part.samples, batch, dynamics.sampling), strict=True))
        for part, batch in zip((dynamics.retain, dynamics.forget), dynamics.batch_sizes, strict=True)
    ]
    metric = np.eye(r) if dynamics.metric is None else dynamics.metric.numpy()
    total = np.eye(4 * r * r)
    for lr, mix in zip(lrs, mixes, strict=True):
        average = np.zeros_like(total)
        for (w_r, p_r), (w_f, p_f) in itertools.product(*drawn):
            a = (1 - mix) * np.tensordot(w_r, h[0], 1) - mix * np.tensordot(w_f, h[1], 1)
            columns = []
            for e in np.eye(2 * r):
                pull = dynamics.weight_decay * metric @ e[:r]
                columns.append(np.concatenate(torch_like_step(e[:r], e[r:], a @ e[:r], pull, lr, how)))
            step = np.stack(columns, 1)
            average += p_r * p_f * np.kron(step, step)
        total = average @ total
    return float(np.abs(np.linalg.eigvals(total)).max())


@samplings
@options
@pytest.mark.parametrize("lr", [0.1, 0.8])
def test_growth_is_the_spectral_radius_over_all_batches(sampling, how, decay, lr):
    dynamics = problem(sampling, sizes=(3, 2), batch_sizes=(2, 1), rank=2, **decay)
    found = mean_square(dynamics, lr, optimiser=Optimiser(**how))
    truth = dense_radius(dynamics, [lr], [dynamics.mix], Optimiser(**how))
    assert found.radius == pytest.approx(truth, rel=1e-8)
    assert found.residual < 1e-4 * found.radius
    assert float(found.eigenmatrix.trace()) == pytest.approx(1)
    assert float(torch.linalg.eigvalsh(found.eigenmatrix)[0]) > -1e-12


@samplings
@options
def test_growth_in_a_cycle_is_that_of_the_composed_steps(sampling, how, decay):
    dynamics = problem(sampling, sizes=(3, 2), batch_sizes=(2, 1), rank=2, **decay)
    lrs, mixes = schedules.alternating(3, lr=0.5, forget_lr=0.2, retain_steps=2)
    found = mean_square(dynamics, lrs, mix=mixes, optimiser=Optimiser(**how))
    truth = dense_radius(dynamics, lrs, mixes, Optimiser(**how))
    assert found.radius == pytest.approx(truth, rel=1e-8)
    assert found.cycle == 3
    assert found.radius_a_step == pytest.approx(truth ** (1 / 3))
    assert found.growth(30) == pytest.approx(10 * math.log(truth))


@pytest.mark.parametrize("name", ["heavy ball", "nesterov, decay to the origin", "decoupled decay"])
@pytest.mark.parametrize("cycle", [1, 4])
def test_large_problems_take_arnoldi_to_the_growth_of_the_moments(name, cycle):
    options, decay = HOW[name]
    dynamics, how = (
        problem("without_replacement", sizes=(30, 10), batch_sizes=(4, 3), rank=9, **decay),
        Optimiser(**options),
    )
    lrs = [0.4, 0.1, 0.3, 0.7][:cycle]
    found = mean_square(dynamics, lrs, optimiser=how)
    assert found.residual < 1e-3
    steps = 400
    start = torch.ones(9, dtype=torch.float64)
    course = moments(
        replace(dynamics, retain=still(dynamics.retain), forget=still(dynamics.forget), anchor=None),
        lr=lrs * (steps // cycle),
        steps=steps,
        optimiser=how,
        start=start,
    ).squared_distance
    assert float(course[-1] / course[-1 - cycle]) == pytest.approx(found.radius, rel=1e-5)


def still(part):
    """The same curvature without gradients."""
    return replace(part, gradients=torch.zeros_like(part.gradients))


def test_a_cycle_of_equal_steps_is_one_step_repeated():
    dynamics = problem("poisson", rank=3)
    one, four = mean_square(dynamics, 0.4), mean_square(dynamics, [0.4] * 4)
    assert four.radius == pytest.approx(one.radius**4, rel=1e-8)
    assert four.growth(100) == pytest.approx(one.growth(100), rel=1e-8)


def test_full_batches_with_momentum_grow_like_the_mean():
    dynamics = problem("without_replacement", batch_sizes=(6, 4), rank=3)
    for nesterov, lr in itertools.product((False, True), (0.05, 0.5, 3.0)):
        how = Optimiser(momentum=0.9, nesterov=nesterov)
        values = torch.linalg.eigvalsh(dynamics.mean_hessian())
        truth = float(mean_growth(values, lr, momentum=0.9, nesterov=nesterov).max()) ** 2
        assert mean_square(dynamics, lr, optimiser=how).radius == pytest.approx(truth, rel=1e-6)


@given(st.floats(0.05, 0.95), st.booleans(), st.floats(0.1, 10))
def test_the_step_limit_is_where_the_mean_stops_growing(momentum, nesterov, curvature):
    limit = step_limit(curvature, momentum=momentum, nesterov=nesterov)
    value = torch.tensor([curvature], dtype=torch.float64)
    below, above = (
        float(mean_growth(value, factor * limit, momentum=momentum, nesterov=nesterov)) for factor in (0.999, 1.001)
    )
    assert below < 1 < above
    found = mean_stability(torch.diag(torch.tensor([0.01, curvature])), momentum=momentum, nesterov=nesterov)
    assert found.critical_lr == pytest.approx(limit, rel=1e-6)


def test_frozen_adam_stops_at_38_over_its_step_size():
    # Cohen et al. 2022, "Adaptive gradient methods at the edge of stability": 38/η with β₁ = 0.9, as m = β₁m + (1-β₁)g.
    assert step_limit(38.0, momentum=0.9) / (1 - 0.9) == pytest.approx(1.0)


# What keeps it in bounds


def growth_of(dynamics, lr, steps, how=None):
    return mean_square(dynamics, lr, optimiser=how).growth(steps)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mix", [0.0, 0.1, 0.6])
def test_the_critical_step_with_momentum_is_where_growth_passes_the_bound(nesterov, mix):
    dynamics, how = problem("without_replacement", mix=mix, rank=2), Optimiser(momentum=0.8, nesterov=nesterov)
    found = critical_lr_within(dynamics, 50, 100.0, optimiser=how)
    assert 0 < found < math.inf
    assert growth_of(dynamics, found, 50, how) <= math.log(100) + 1e-5
    assert growth_of(dynamics, found * 1.001, 50, how) > math.log(100)
    # It is the first crossing.
    for share in np.geomspace(0.01, 0.99, 12):
        assert growth_of(dynamics, share * found, 50, how) <= math.log(100) + 1e-5


@pytest.mark.parametrize(
    "how", [Optimiser(momentum=1e-9), Optimiser(momentum=0.9), Optimiser(momentum=0.9, nesterov=True)]
)
@pytest.mark.parametrize(
    ("steps", "growth", "mix"), [(10, 100.0, 0.0), (3, 2.0, 0.3), (2000, 2.0, 1.0), (10**5, 1.5, 1.0)]
)
def test_the_critical_step_with_momentum_may_lie_beyond_what_is_scanned(how, steps, growth, mix):
    """Above, where few steps may grow much; and below, where slow ascent has many steps to grow in."""
    full = problem("without_replacement", mix=mix, batch_sizes=(6, 4), rank=2)
    found = critical_lr_within(full, steps, growth, optimiser=how)
    assert 0 < found < math.inf
    assert growth_of(full, found, steps, how) <= math.log(growth) + 1e-5
    assert growth_of(full, found * 1.01, steps, how) > math.log(growth)
    for share in np.geomspace(0.03, 0.99, 12):
        assert growth_of(full, share * found, steps, how) <= math.log(growth) + 1e-5
    if how.momentum < 1e-6:
        assert found == pytest.approx(critical_lr_within(full, steps, growth), rel=2e-3)


def test_adamw_with_a_still_second_moment_is_the_documented_optimiser():
    """m⁺ = β₁m + (1-β₁)g, θ⁺ = θ - η(P m̂ + γθ), the bias correction left out: in coordinates where P is the identity."""
    dynamics = problem("without_replacement", mix=0.3, batch_sizes=(6, 4), rank=2)
    eta, beta, gamma = 0.05, 0.9, 0.4
    anchor = torch.tensor([0.7, -1.3], dtype=torch.float64)
    decaying = replace(
        dynamics, weight_decay=gamma / (1 - beta), metric=torch.eye(2, dtype=torch.float64), anchor=anchor
    )
    how = Optimiser(momentum=beta, decoupled=True)
    h, g = dynamics.mean_hessian(), dynamics.mean_gradient()
    delta, m = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(1, 13):
        m = beta * m + (1 - beta) * (h @ delta + g)
        delta = delta - eta * (m + gamma * (delta + anchor))
        found = moments(decaying, lr=eta * (1 - beta), steps=step, optimiser=how)
        torch.testing.assert_close(found.mean, delta, rtol=1e-9, atol=1e-12)


def test_arguments_of_growth_are_checked():
    dynamics = problem("without_replacement", rank=2)
    expected = mean_square(dynamics, 0.1).radius
    assert (
        mean_square(dynamics, np.array(0.1)).radius
        == mean_square(dynamics, torch.tensor(0.1, dtype=torch.float64)).radius
    )
    assert mean_square(dynamics, np.array(0.1)).radius == pytest.approx(expected)
    with pytest.raises(
        ValueError, match="`lr` and `mix` of `mean_square` must hold at least one step's value; got none"
    ):
        mean_square(dynamics, [])
    for ask in (
        lambda: mean_square(dynamics, 0.1, tolerance=-1.0),
        lambda: critical_lr_within(dynamics, 5, 2.0, optimiser=Optimiser(momentum=0.5), tolerance=0.0),
    ):
        with pytest.raises(ValueError, match=r"`tolerance` of `\w+` must be a finite number in \(0"):
            ask()


def test_a_critical_step_with_momentum_that_allows_no_growth():
    quiet = problem("without_replacement", mix=0.0, batch_sizes=(6, 4), rank=2)
    how = Optimiser(momentum=0.5)
    limit = step_limit(float(torch.linalg.eigvalsh(quiet.mean_hessian())[-1]), momentum=0.5)
    assert critical_lr_within(quiet, 100, 1.0, optimiser=how) == pytest.approx(limit, rel=1e-3)
    assert critical_lr_within(quiet.at(1.0), 10_000, 1.0, optimiser=how) == 0  # pure ascent
    empty = replace(quiet.retain, factors=torch.zeros_like(quiet.retain.factors))
    nothing = replace(quiet, retain=empty, forget=replace(quiet.forget, factors=0 * quiet.forget.factors))
    assert critical_lr_within(nothing, 10, 2.0, optimiser=how) == math.inf


@settings(max_examples=40)
@given(two_sets(), st.floats(0.05, 2.0), st.sampled_from((1.5, 100.0)))
def test_mixes_in_bounds_are_one_interval(dynamics, factor, growth):
    lr, steps = factor * unit_lr(dynamics), 20
    found = critical_mix_within(dynamics, lr=lr, steps=steps, growth=growth)
    assert found.method == "bracketing"
    for mix in np.linspace(0, 1, 9):
        excess = growth_of(dynamics.at(float(mix)), lr, steps) - math.log(growth)
        if not found.found or mix < found.low - 2e-3 or mix > found.high + 2e-3:
            assert excess > -1e-3
        elif found.low + 2e-3 < mix < found.high - 2e-3:
            assert excess < 1e-3


@settings(max_examples=60)
@given(two_sets(), st.floats(0.05, 2.0), st.floats(0, 1), st.floats(0, 1))
def test_growth_is_convex_in_the_mix(dynamics, factor, left, right):
    lr = factor * unit_lr(dynamics)
    radii = [mean_square(dynamics.at(mix), lr).radius for mix in (left, (left + right) / 2, right)]
    assert radii[1] <= (radii[0] + radii[2]) / 2 + 1e-6 * max(radii)


def test_where_retaining_alone_overshoots_some_forgetting_can_help():
    dynamics = problem("without_replacement", batch_sizes=(6, 4), rank=1)
    curvature = float(dynamics.retain.mean())
    found = critical_mix_within(dynamics, lr=2.5 / curvature, steps=50, growth=10.0)
    assert 0 < found.low < found.high < 1
    for mix, sign in ((found.low - 0.01, 1), (found.low + 0.01, -1), (found.high - 0.01, -1), (found.high + 0.01, 1)):
        assert sign * (growth_of(dynamics.at(mix), 2.5 / curvature, 50) - math.log(10)) > 0
    none = critical_mix_within(dynamics, lr=1e6, steps=50, growth=1.0)
    assert not none.found


def test_mixes_are_scanned_with_momentum():
    dynamics, how = problem("without_replacement", rank=2), Optimiser(momentum=0.5)
    found = critical_mix_within(dynamics, lr=0.2, steps=50, growth=100.0, optimiser=how)
    assert found.method == "scan"
    assert 0 == found.low < found.high < 1
    assert growth_of(dynamics.at(found.high), 0.2, 50, how) <= math.log(100) + 1e-5
    assert growth_of(dynamics.at(found.high + 2e-3), 0.2, 50, how) > math.log(100)
    assert not critical_mix_within(dynamics, lr=1e3, steps=50, growth=1.0, optimiser=how).found


@samplings
@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("which", ["retain", "forget", "both"])
def test_the_critical_batch_is_the_smallest_in_bounds(sampling, momentum, which):
    dynamics, how = problem(sampling, mix=0.3, rank=2, copies=3), Optimiser(momentum=momentum)
    sizes = dynamics.retain.population, dynamics.forget.population

    def growth(batch):
        chosen = tuple(
            min(batch, n) if which in {name, "both"} else b
            for name, n, b in zip(("retain", "forget"), sizes, dynamics.batch_sizes, strict=True)
        )
        return growth_of(replace(dynamics, batch_sizes=chosen), 0.3, 30, how)

    most = {"retain": sizes[0], "forget": sizes[1], "both": max(sizes)}[which]
    course = [growth(batch) for batch in range(1, most + 1)]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(course))
    bound = (course[0] + course[-1]) / 2
    assert course[0] > bound > course[-1]
    found = critical_batch_within(
        dynamics, lr=0.3, steps=30, growth=math.exp(max(bound, 0.0)), which=which, optimiser=how
    )
    truth = next((b for b, value in enumerate(course, start=1) if value <= max(bound, 0.0)), None)
    assert found == truth
    assert critical_batch_within(dynamics, lr=50.0, steps=30, growth=1.0, which=which, optimiser=how) is None


# Maps


@samplings
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    "axes",
    [
        {"lr": np.geomspace(0.02, 3, 7), "mix": np.linspace(0, 1, 5)},
        {"lr": np.geomspace(0.02, 3, 5), "batch": [1, 2, 4, 18]},
        {"retain_batch": [1, 3, 9], "forget_batch": [2, 5]},
    ],
    ids=lambda axes: "-".join(axes),
)
def test_maps_are_the_growth_of_every_setting(sampling, decay, axes):
    dynamics = problem(sampling, sizes=(9, 6), copies=2, rank=14, weight_decay=decay)
    lr = None if "lr" in axes else 0.5
    found = stability_map(dynamics, axes, lr=lr)
    assert found.applications < 120
    assert float(found.residual.max()) <= 1e-3
    names, values = found.names, found.values
    for i, j in itertools.product(range(values[0].size), range(values[1].size)):
        point = {names[0]: values[0][i], names[1]: values[1][j]}
        sizes = list(dynamics.batch_sizes)
        for place, name in enumerate(("retain_batch", "forget_batch")):
            population = (dynamics.retain, dynamics.forget)[place].population
            limit = math.inf if sampling == "with_replacement" else population
            sizes[place] = int(min(point.get("batch", point.get(name, sizes[place])), limit))
        one = replace(dynamics, mix=float(point.get("mix", dynamics.mix)), batch_sizes=tuple(sizes))
        truth = mean_square(one, float(point.get("lr", lr)), tolerance=1e-12).radius
        assert found.radius[i, j] <= truth * (1 + 1e-8)
        assert found.radius[i, j] == pytest.approx(truth, rel=2e-4)


def test_a_tight_tolerance_is_met():
    dynamics = problem("without_replacement", sizes=(9, 6), rank=10)
    axes = {"lr": [0.1, 0.5], "mix": [0.0, 0.5]}
    found = stability_map(dynamics, axes, tolerance=1e-9)
    for i, j in itertools.product(range(2), range(2)):
        truth = mean_square(dynamics.at(axes["mix"][j]), axes["lr"][i], tolerance=1e-12).radius
        assert found.radius[i, j] == pytest.approx(truth, rel=2e-9)


def test_a_basis_that_may_not_grow_says_what_it_leaves():
    dynamics = problem("poisson", sizes=(9, 6), rank=14)
    found = stability_map(dynamics, {"lr": np.geomspace(0.1, 3, 6), "mix": [0.1, 0.9]}, tolerance=1e-12, max_basis=16)
    assert found.applications == 16
    assert float(found.residual.max()) > 1e-12


def test_maps_over_momentum_are_the_growth_of_every_setting():
    dynamics = problem("without_replacement", rank=2)
    how = Optimiser(momentum=0.1, nesterov=True)
    found = stability_map(dynamics, {"momentum": [0.0, 0.5, 0.9], "lr": [0.1, 0.6]}, optimiser=how)
    assert found.applications is None
    for i, j in itertools.product(range(3), range(2)):
        beta = found.values[0][i]
        how = Optimiser(momentum=beta, nesterov=beta > 0)
        assert found.radius[i, j] == pytest.approx(mean_square(dynamics, found.values[1][j], optimiser=how).radius)


def test_the_contour_is_where_the_critical_step_is():
    dynamics = problem("without_replacement", sizes=(9, 6), rank=4)
    found = stability_map(dynamics, {"lr": np.geomspace(0.02, 3, 40), "mix": np.linspace(0, 0.6, 13)})
    (line,) = found.contour(50, growth=100.0)
    assert line.shape[1] == 2
    checked = 0
    for lr, mix in line:
        if mix in found.values[1]:
            truth = critical_lr_within(dynamics.at(float(mix)), 50, 100.0)
            assert lr == pytest.approx(truth, rel=0.01)
            checked += 1
    assert checked >= 10
    assert found.contour(50, growth=1e300) == []


def test_the_boundary_without_forgetting_is_the_critical_step():
    dynamics = problem("poisson", sizes=(9, 6), rank=4, mix=0.0)
    limit = critical_lr_mean_square(dynamics)
    found = stability_map(dynamics, {"lr": np.geomspace(limit / 2, limit * 2, 41), "batch": [2, 4]})
    points = [lr for line in found.contour(10) for lr, batch in line if batch == 2]
    assert points == [pytest.approx(limit, rel=1e-2)]


def test_maps_show_themselves():
    dynamics = problem("without_replacement", rank=2)
    found = stability_map(dynamics, {"lr": np.geomspace(0.02, 5, 9), "mix": np.linspace(0, 1, 6)})
    text = str(found)
    assert text.startswith("Mean-square stability over lr (9 values, 0.02 to 5) and mix (6 values, 0 to 1): ρ from ")
    assert f"to {found.radius.max():.3g}, below 1 on {(found.radius < 1).mean():.0%} of the grid" in text
    figure, ax = found.plot(50, growth=10.0)
    assert ax.get_yscale() == "log"
    assert ax.get_xscale() == "linear"
    drawn = ax.collections[0].get_array()
    np.testing.assert_allclose(drawn, np.clip(found.growth(50), -20, 20))
    assert len(ax.lines) == len(found.contour(50, 10.0)) > 0
    plt.close(figure)
    figure, ax = plt.subplots()
    assert stability_map(dynamics, {"batch": [2], "mix": [0.5]}, lr=0.1).plot(5, ax=ax)[1] is ax
    plt.close(figure)


@pytest.mark.parametrize(
    ("axes", "more", "message"),
    [
        ({"lr": [0.1]}, {}, r"`axes` of `stability_map` must name two settings; got 1"),
        ({"lr": [0.1], "alpha": [0.1]}, {}, r"`axes` of `stability_map` must be one of .*; got 'alpha'"),
        ({"lr": [0.1], "mix": []}, {}, r"must hold values; got none for 'mix'"),
        (
            {"batch": [1], "retain_batch": [1]},
            {"lr": 1.0},
            r"not set a batch size twice; got \['batch', 'retain_batch'\]",
        ),
        (
            {"batch": [1], "mix": [1]},
            {},
            r"`lr` of `stability_map` must be .*; got lr=None with axes \['batch', 'mix'\]",
        ),
        ({"lr": [1], "mix": [1]}, {"lr": 0.1}, r"`lr` of `stability_map` .*; got lr=0\.1"),
        ({"lr": [0.0], "mix": [1]}, {}, r"`lr` of `stability_map` must be .*; got 0\.0"),
        ({"lr": [1], "mix": [1.5]}, {}, r"`mix` of `stability_map` must be .*; got 1\.5"),
        ({"lr": [1], "batch": [1.5]}, {}, r"`batch` of `stability_map` must be a whole number >= 1; got 1\.5"),
        ({"lr": [1], "forget_batch": [5]}, {}, r"`forget_batch` of `stability_map` must be .* in \[1, 4\]; got 5"),
        ({"lr": [1], "momentum": [1.0]}, {}, r"`momentum` of `stability_map` must be .*; got 1\.0"),
        ({"lr": [1], "mix": [1]}, {"tolerance": 0}, r"`tolerance` of `stability_map` must be .*; got 0"),
        ({"lr": [1], "mix": [1]}, {"max_basis": 2}, r"`max_basis` of `stability_map` must be .* >= 16; got 2"),
    ],
)
def test_maps_check_their_arguments(axes, more, message):
    with pytest.raises((ValueError, TypeError), match=message):
        stability_map(problem("poisson"), axes, **more)


def test_other_arguments_are_checked():
    dynamics = problem("poisson")
    found = stability_map(dynamics, {"lr": [0.1], "mix": [0.0, 0.5]})
    with pytest.raises(ValueError, match=r"`contour` of a map needs two values.*got 1 of lr and 2 of mix"):
        found.contour(5)
    with pytest.raises(ValueError, match=r"`steps` of `StabilityMap.growth` must be .*; got 0"):
        found.growth(0)
    with pytest.raises(ValueError, match=r"`growth` of `StabilityMap.contour` must be .*; got 0"):
        found.contour(5, 0)
    for call, owner in ((critical_mix_within, "critical_mix_within"), (critical_batch_within, "critical_batch_within")):
        with pytest.raises(ValueError, match=rf"`growth` of `{owner}` must be .*; got 0\.5"):
            call(dynamics, lr=0.1, steps=5, growth=0.5)
        with pytest.raises(ValueError, match=rf"`lr` of `{owner}` must be .*; got 0"):
            call(dynamics, lr=0, steps=5, growth=2.0)
        with pytest.raises(ValueError, match=rf"`steps` of `{owner}` must be .*; got 0"):
            call(dynamics, lr=0.1, steps=0, growth=2.0)
    with pytest.raises(ValueError, match=r"`which` of `critical_batch_within` must be one of .*; got 'all'"):
        critical_batch_within(dynamics, lr=0.1, steps=5, growth=2.0, which="all")
    with pytest.raises(ValueError, match=r"`tolerance` of `critical_mix_within` must be .*; got 0"):
        critical_mix_within(dynamics, lr=0.1, steps=5, growth=2.0, tolerance=0)


# Schedules


def test_schedules_are_those_of_torch():
    for ours, make in (
        (schedules.cosine(20), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
        (schedules.linear(20), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=20)),
        (schedules.linear(20, end=0.1), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=20)),
        (schedules.cosine(20, end=0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.1)),
        (schedules.staircase(20, at=[5, 11]), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [5, 11])),
        (schedules.warmup(20, over=8), lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: min((k + 1) / 8, 1))),
    ):
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(optimiser)
        for factor in ours:
            assert factor == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-12)
            optimiser.step()
            scheduler.step()


def test_turns_are_taken_as_said():
    lr, mix = schedules.alternating(7, lr=0.2, forget_lr=0.05, retain_steps=2, forget_steps=1)
    assert mix.tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert lr.tolist() == [0.2, 0.2, 0.05, 0.2, 0.2, 0.05, 0.2]
    assert schedules.alternating(2, lr=0.2)[0].tolist() == [0.2, 0.2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.warmup(0, over=1), r"`steps` of `warmup` .*; got 0"),
        (lambda: schedules.warmup(5, over=0), r"`over` of `warmup` .*; got 0"),
        (lambda: schedules.cosine(0), r"`steps` of `cosine` .*; got 0"),
        (lambda: schedules.linear(5, end=-1), r"`end` of `linear` .*; got -1"),
        (lambda: schedules.cosine(5, end=2), r"`end` of `cosine` .*; got 2"),
        (lambda: schedules.staircase(0, at=[1]), r"`steps` of `staircase` .*; got 0"),
        (lambda: schedules.staircase(5, at=[0]), r"`at\[0\]` of `staircase` .*; got 0"),
        (lambda: schedules.staircase(5, at=[1], factor=0), r"`factor` of `staircase` .*; got 0"),
        (lambda: schedules.alternating(0, lr=0.1), r"`steps` of `alternating` .*; got 0"),
        (lambda: schedules.alternating(5, lr=0), r"`lr` of `alternating` .*; got 0"),
        (lambda: schedules.alternating(5, lr=0.1, forget_lr=-1), r"`forget_lr` of `alternating` .*; got -1"),
        (lambda: schedules.alternating(5, lr=0.1, retain_steps=0), r"`retain_steps` of `alternating` .*; got 0"),
        (lambda: schedules.alternating(5, lr=0.1, forget_steps=0), r"`forget_steps` of `alternating` .*; got 0"),
    ],
)
def test_schedules_check_their_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
