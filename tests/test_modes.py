"""Modes of `predict`: what they measure, what they cost, and that a thorough one finds what one linearisation cannot."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import stabkit
from stabkit.algorithms import AGU, GradDiff
from stabkit.calibration import beyond, calibration, kind_at
from stabkit.checks import MARGIN, margin_check
from stabkit.curvature import forward_size, rows_pay
from stabkit.models import SmallCNN
from stabkit.modes import (
    MODES,
    OPERATIONS_A_SECOND,
    ROLLOUTS,
    SMALL_WORK,
    STEP_SECONDS,
    Sizes,
    estimate_cost,
    small_work,
)
from stabkit.problem import UnlearningProblem
from stabkit.training import train

SMALL = {"batch_size": 8, "steps": 30, "lr": 0.05, "seeds": 2}


@pytest.fixture(scope="module")
def case():
    """A small curved network, trained on three classes of 200 points."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5)
    torch.manual_seed(0)
    model = train(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), x, y, epochs=40, lr=0.02, seed=0)
    return model, (x[:60], y[:60]), (x[60:], y[60:])


def said_step(report: stabkit.Report) -> float:
    """The step size that a report's advice tells to stay below."""
    return float(re.search(r"lower the step size to (\S+) or less", " ".join(report.advice))[1])


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
@pytest.mark.parametrize("mode", list(MODES))
def test_a_mode_measures_what_it_says(case, mode):
    report = stabkit.predict(*case, mode=mode, **SMALL)
    assert report.mode == mode
    samples = min(140, MODES[mode].retain_samples), min(60, MODES[mode].forget_samples)
    staged = mode == "thorough"
    assert report.rollout.samples == samples
    assert report.calibration == calibration("staged" if staged else kind_at("one", report.critical_lr_error))
    assert (report.critical_lr_error is None) == staged
    assert ("staged rollouts" in {cost.stage for cost in report.costs}) == staged
    low, high = report.critical_lr_interval
    assert low <= report.critical_lr_detail.low <= report.critical_lr <= high
    assert stabkit.Report.from_json(report.to_json()) == report
    assert mode in report.summary()
    checks = {check.name for check in report.checks}
    assert ("linearisation error" in checks) != staged  # a staged rollout goes on without it
    assert ("change with half the rank" in checks) == (report.rollout.real_steps == 0)
    assert report.linearisation_error > 0
    if not staged:
        assert report.rollout.real_steps == 0


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_a_thorough_report_says_what_it_took_on_the_real_network(case):
    report = stabkit.predict(*case, mode="thorough", mix=0.2, **{**SMALL, "lr": 1.0})
    assert 0 < report.rollout.real_steps <= SMALL["steps"]
    assert f"{report.rollout.real_steps:.3g} steps taken on the real network" in report._repr_html_()
    told = {cost.stage: cost.gradient_equivalents for cost in report.costs}
    assert told["staged rollouts"] > report.rollout.real_steps * 16


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_a_thorough_verdict_changes_sides_at_its_critical_step(case):
    report = stabkit.predict(*case, mode="thorough", mix=0.6, **{**SMALL, "seeds": 1})
    detail = report.critical_lr_detail
    assert detail.found
    assert detail.high / detail.low < 1.1
    assert report.at(lr=detail.low).probability < 0.5 <= report.at(lr=detail.high).probability
    mixes = report.critical_mix_detail
    if mixes.found:
        assert mixes.high - mixes.low < 0.02
    kept = report.at(lr=detail.low)
    assert kept.critical_lr == report.critical_lr  # the step alone has changed: nothing is searched again
    costs = {cost.stage: cost.gradient_equivalents for cost in kept.costs}
    assert costs["linearisation"] == 0 < costs["staged rollouts"]


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
@pytest.mark.filterwarnings("ignore::stabkit.BudgetWarning")
def test_auto_takes_the_most_thorough_that_fits(case):
    costs = {mode: stabkit.predict_cost(*case, mode=mode, **_settings()) for mode in MODES}
    order = [costs[mode].gradient_equivalents for mode in ("fast", "standard", "thorough")]
    assert order == sorted(order)
    for mode, budget in (
        ("fast", 1.0),
        ("standard", costs["standard"].gradient_equivalents),
        ("thorough", costs["thorough"].gradient_equivalents),
        ("thorough", "1000000s"),
        ("fast", "0.000001s"),
    ):
        assert stabkit.predict_cost(*case, mode="auto", budget=budget, **_settings()).mode == mode
    assert stabkit.predict(*case, mode="auto", budget=1.0, **SMALL).mode == "fast"


def test_a_budget_below_the_fast_modes_cost_is_told(case):
    fast = stabkit.predict_cost(*case, mode="fast", **_settings())
    stage = max(fast.stages, key=lambda s: s.gradient_equivalents).stage
    with pytest.warns(stabkit.BudgetWarning, match=rf"gradient-equivalents; got 100\..*'{stage}'") as told:
        assert stabkit.predict_cost(*case, mode="auto", budget=100, **_settings()).mode == "fast"
    assert told[0].filename == __file__
    with pytest.warns(stabkit.BudgetWarning, match=r"seconds; got '0\.000001s'"):
        stabkit.predict_cost(*case, mode="auto", budget="0.000001s", **_settings())
    with warnings.catch_warnings():
        warnings.simplefilter("error", stabkit.BudgetWarning)
        stabkit.predict_cost(*case, mode="auto", budget=fast.gradient_equivalents, **_settings())


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_without_a_budget_small_networks_and_runs_are_predicted_thoroughly(case):
    thorough = stabkit.predict_cost(*case, **_settings())
    assert thorough.mode == "thorough"
    parameters = sum(p.numel() for p in case[0].parameters())
    assert thorough.gradient_equivalents * parameters < SMALL_WORK
    # Staged rollouts cost by the step, so that a long enough run is predicted by one linearisation.
    long = {**_settings(), "steps": 10**6, "batch_size": 64}
    assert stabkit.predict_cost(*case, **long).mode == "standard"
    with pytest.MonkeyPatch.context() as patch:  # a GPU does a hundred times as much in the time
        patch.setattr("stabkit.modes.small_work", lambda device: small_work(torch.device("cuda", 0)))
        assert stabkit.predict_cost(*case, **long).mode == "thorough"
    assert stabkit.predict(*case, **SMALL).mode == "thorough"


def test_the_estimate_is_near_what_the_report_tells(case):
    estimate = stabkit.predict_cost(*case, **_settings())
    others = {"mix": 0.1, "seed": 3, "momentum": 0.5, "progress": False, "precision": "float32", "curvature": "ggn"}
    same = stabkit.predict_cost(*case, **_settings(), **others)
    assert [c.gradient_equivalents for c in same.stages] == [c.gradient_equivalents for c in estimate.stages]
    with pytest.raises(TypeError, match=r"`predict_cost` must be given what `predict` takes; got 'stepz'\."):
        stabkit.predict_cost(*case, stepz=3)
    for name, value in (("curvature", "bogus"), ("seed", -5), ("precision", "half")):
        with pytest.raises(ValueError, match=f"`{name}` of `predict_cost`"):
            stabkit.predict_cost(*case, **{name: value})
    report = stabkit.predict(*case, **SMALL)
    told = {cost.stage: cost.gradient_equivalents for cost in report.costs}
    for stage in estimate.stages:
        if stage.stage == "staged rollouts":  # of a run that stays where it is linearised next to nothing is for real
            assert 1 < stage.gradient_equivalents / told[stage.stage] < 3
            continue
        assert stage.gradient_equivalents == pytest.approx(told[stage.stage], rel=0.6), stage.stage
    assert estimate.run.gradient_equivalents == 30 * 16
    assert estimate.seconds > 0
    assert "30 steps" in str(estimate)
    assert "<table" in estimate._repr_html_()


def test_long_runs_of_small_networks_cost_their_calls(case):
    """Which take the longer part of their seconds, though they compute next to nothing."""
    problem, settings = UnlearningProblem(*case), Sizes().settings(MODES["fast"], curvature="hessian", seed=0)

    def rolled(steps):
        algorithm = GradDiff(steps=steps, batch_size=8)
        found = estimate_cost(problem, algorithm, settings, seeds=1, seconds_per_gradient=0.0)
        return next(stage for stage in found.stages if "theory" in stage.stage)

    told = [rolled(steps) for steps in (1000, 3000)]
    calls = ROLLOUTS * STEP_SECONDS * 2  # a step on both sets
    assert told[1].seconds - told[0].seconds > 2000 * calls
    assert told[1].gradient_equivalents == told[0].gradient_equivalents


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_what_the_caller_asks_for_comes_before_the_mode(case):
    report = stabkit.predict(*case, mode="fast", rank=7, retain_samples="all", forget_samples=20, **SMALL)
    assert report.rollout.rank == 7
    assert report.rollout.samples == (140, 20)
    found = stabkit.predict(*case, mode="fast", rank="auto", **SMALL)
    assert found.rollout.rank >= 30


def _settings():
    return {key: value for key, value in SMALL.items() if key != "lr"}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_the_estimate_counts_what_is_multiplied_beside_the_passes(dense):
    """Of wide networks that is most of the time; with gradients that take none it is all that is left."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 500), nn.ReLU(), nn.Linear(500, 10))
        if not dense:
            model = SmallCNN(1, 8, 10)
    x, y = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(300) % 10
    problem = UnlearningProblem(model, (x[:60], y[:60]), (x[60:], y[60:]))
    settings = Sizes().settings(MODES["standard"], curvature="hessian", seed=0)
    found = estimate_cost(problem, GradDiff(steps=10, batch_size=8), settings, seeds=1, seconds_per_gradient=0.0)
    stage = next(stage for stage in found.stages if stage.stage == "linearisation")
    d, k, passes = problem.size, 100, stage.gradient_equivalents
    _, operations = forward_size(problem, problem.retain.batch(torch.arange(1))[0])
    each = 2 * operations * k / 10 if dense else 2 * d * k  # vectors through the network, or rows times the block
    assert stage.seconds * OPERATIONS_A_SECOND == pytest.approx(passes * each + 8 * d * k**2, rel=1e-6)
    assert rows_pay(10, k, size=d, operations=operations) == (not dense)


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_a_staged_boundary_is_that_of_a_middling_seed_and_as_wide_as_the_seeds_are_apart():
    """With batches of two and one, seeds differ by a factor of ten and more."""
    g = torch.Generator().manual_seed(1)
    y = torch.randint(0, 5, (300,), generator=g)
    x = 1.5 * torch.randn(5, 6, generator=g)[y] + torch.randn(300, 6, generator=g)
    torch.manual_seed(0)
    model = train(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)), x, y, epochs=60, lr=1e-2)
    sets = (x[:30], y[:30]), (x[30:], y[30:])
    algorithm = AGU(lr=8.0, sampling="poisson", batch_size=2, forget_batch_size=1, steps=60)
    reports = [stabkit.predict(model, *sets, algorithm=algorithm, seed=s, mode="thorough") for s in range(3)]
    problem = UnlearningProblem(model, *sets)
    for report in reports:
        low, high = report.critical_lr_interval
        assert all(low < other.critical_lr < high for other in reports)
        detail = report.critical_lr_detail
        advised = algorithm.replace(lr=said_step(report))
        assert 0.9 * detail.low / 2 <= advised.lr <= detail.low / 2  # two digits, rounded down
        ran = [stabkit.run(problem, advised, seed=s).diverged for s in range(100, 108)]
        assert sum(ran) <= 2


@pytest.mark.parametrize("staged", [False, True])
def test_a_verdict_near_the_boundary_is_told_to_keep_a_margin(staged):
    near, far = (margin_check(past, (0.8, 1.4), "stable", staged=staged) for past in (0.3, 0.04))
    assert (near.passed, far.passed) == (False, True)
    assert near.value == 0.3
    assert "leave a margin: 0.4 is" in near.remedy
    assert ("thorough" in near.remedy) != staged
    near, far = (margin_check(past, (0.8, 1.4), "diverges", staged=staged) for past in (0.7, 0.96))
    assert (near.passed, far.passed) == (False, True)
    assert near.value == pytest.approx(0.3)
    assert "verify()" in near.remedy
    assert margin_check(0.6, (0.8, 1.4), "marginal", staged=staged).passed


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
@pytest.mark.parametrize("mode", ["standard", "thorough"])
def test_what_is_advised_is_clear_of_the_boundary(case, mode):
    """Whoever takes the step size that the advice names is not told to leave a margin from it."""
    report = stabkit.predict(*case, mode=mode, **{**SMALL, "lr": 3.0, "mix": 0.3})
    assert report.verdict == "diverges"
    failed = {}
    for share in (said_step(report) / report.critical_lr, 0.97, 1.03):
        said = report.at(lr=share * report.critical_lr)
        (check,) = (check for check in said.checks if check.name == MARGIN)
        past = beyond(said.run.lr, said.critical_lr, said.critical_lr_interval)
        wrong = {"stable": past, "diverges": 1 - past, "marginal": 0.0}[said.verdict]
        assert check.value == pytest.approx(wrong)
        failed[share] = not check.passed
    assert not next(iter(failed.values()))
