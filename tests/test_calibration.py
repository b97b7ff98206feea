"""From what rollouts say, and from where the boundary lies, to a report's probability."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import logistic

import stabkit
from stabkit.algorithms import GradDiff
from stabkit.calibration import FAR_ERROR, beyond, calibration, combined, kind_at
from stabkit.checks import MARGIN
from stabkit.judge import ADVISED
from stabkit.models import MLP
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from stabkit.training import train

QUICK = {
    "rank": 20,
    "retain_samples": 96,
    "forget_samples": 48,
    "spectrum_samples": 96,
    "seeds": 2,
    "steps": 30,
    "mode": "standard",
}
sides = st.floats(0.01, 4.0)  # of the interval, in the logarithm
places = st.floats(-5.0, 5.0)  # of the step size


@given(places, places, sides, sides)
def test_past_the_boundary_is_a_logistic_on_either_side(critical, away, below, above):
    value, lr = math.exp(critical), math.exp(critical + away)
    interval = math.exp(critical - below), math.exp(critical + above)
    p = beyond(lr, value, interval)
    side = above if away > 0 else below
    assert p == pytest.approx(logistic.cdf(away, scale=side / logistic.ppf(0.95)), abs=1e-9)
    assert beyond(value, value, interval) == 0.5
    assert beyond(interval[0], value, interval) == pytest.approx(0.05)
    assert beyond(interval[1], value, interval) == pytest.approx(0.95)


@given(places, places, sides, sides)
def test_a_larger_step_is_no_likelier_to_hold(first, second, below, above):
    interval = math.exp(-below), math.exp(above)
    low, high = sorted((first, second))
    assert beyond(math.exp(low), 1.0, interval) <= beyond(math.exp(high), 1.0, interval)


def test_an_interval_without_width_is_a_step():
    assert [beyond(lr, 2.0, (2.0, 2.0)) for lr in (1.9, 2.0, 2.1)] == [0.0, 1.0, 1.0]
    assert beyond(1.9, 2.0, (2.0, 3.0)) == 0.0  # each side for itself
    assert 0.5 < beyond(2.1, 2.0, (2.0, 3.0)) < 1.0
    assert beyond(1e-300, 1.0, (0.99, 1.01)) == 0.0  # no overflow
    assert beyond(1e300, 1.0, (0.99, 1.01)) == 1.0


@given(st.floats(0, 1), st.floats(-3, 3), sides)
def test_both_opinions_count_alike(rolled, away, width):
    interval = math.exp(-width), math.exp(width)
    p = combined(rolled, math.exp(away), 1.0, interval)
    assert combined(rolled, 1.0, 1.0, interval) == pytest.approx(rolled / 2 + 0.25)
    assert combined(rolled, interval[0], 1.0, interval) == pytest.approx(rolled / 2 + 0.025)
    assert combined(rolled, interval[1], 1.0, interval) == pytest.approx(rolled / 2 + 0.475)
    # Where they agree about the side of one half, so does the mean: no verdict is turned round.
    if (rolled >= 0.5) == (away >= 0):
        assert (p >= 0.5) == (rolled >= 0.5)


@given(st.floats(0.001, 0.999))
def test_the_margin_is_where_the_boundary_alone_is_worth_the_risk(risk):
    for kind in ("one", "far", "staged"):
        used = calibration(kind)
        margin = used.margin(risk)
        p = combined(0.0, 1.0, margin, used.interval(margin, margin, margin))
        assert margin >= 1
        assert p == pytest.approx(min(risk, 0.25)), kind  # at the critical step size itself it is a quarter
    assert calibration("far").margin(0.05) > calibration("one").margin(0.05) > 1
    assert calibration("staged").margin(0.05) > 1
    assert replace(calibration("one"), step_factor=None).margin(0.05) == 1


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")  # of few samples near the boundary
def test_a_report_weighs_both(digits_mlp, random_deletion):
    """Its probability is of what it shows: the rollouts' and the interval's."""
    report = stabkit.predict(digits_mlp, *random_deletion, algorithm="graddiff", lr=0.1, mix=0.3, **QUICK)
    for share in (0.3, 0.8, 1.5):
        said = report.at(lr=share * report.critical_lr)
        scores = torch.tensor(said.rollout.score, dtype=torch.float64)
        assert said.rollout.probability == pytest.approx(float(calibration("one").probability(scores)))
        assert said.critical_lr_interval == report.critical_lr_interval  # whatever the step size in question
        past = beyond(said.run.lr, said.critical_lr, said.critical_lr_interval)
        assert said.probability == pytest.approx((said.rollout.probability + past) / 2)
        assert f"of the rollouts alone: {said.rollout.probability:.2f}" in str(said)
        assert f"that the critical step size is smaller: {past:.2f}" in str(said)
    assert said.calibration == calibration(kind_at("one", said.critical_lr_error))
    margin = max(ADVISED, said.calibration.margin(0.05))
    bound = said.critical_lr_detail.low / margin
    step = float(re.search(r"lower the step size to (\S+) or less", said.advice[0])[1])
    assert 0.9 * bound < step <= bound  # two digits, rounded down
    near = report.at(lr=0.8 * report.critical_lr)
    times = near.critical_lr / near.run.lr
    assert (
        f"{near.critical_lr:.3g}, is {times:.2g} times this one: leave a margin of {margin:.2g} times" in near.advice[1]
    )
    assert near.probability > near.rollout.probability + 0.05


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_a_boundary_that_the_network_is_far_from_below_is_said_to_be_wide(digits_mlp, class_deletion, monkeypatch):
    """What a report is calibrated by hangs on the error after a run of half the critical step size."""
    settings = {"algorithm": "graddiff", "lr": 0.01, "mix": 0.05, **QUICK}
    near = stabkit.predict(digits_mlp, *class_deletion, **settings)
    assert near.critical_lr_error is not None
    half = near.at(lr=near.critical_lr / 2)
    assert half.linearisation_error == pytest.approx(near.critical_lr_error, rel=1e-3)
    assert half.critical_lr_error == near.critical_lr_error  # whatever the step size in question
    for limit, kind in ((near.critical_lr_error * 1.01, "one"), (near.critical_lr_error * 0.99, "far")):
        monkeypatch.setattr("stabkit.calibration.FAR_ERROR", limit)
        said = near.at(lr=0.011)
        used = calibration(kind)
        assert said.calibration == used
        low, high = said.critical_lr_interval
        detail = said.critical_lr_detail
        assert low == pytest.approx(min(detail.low, detail.value / used.step_factor))
        assert high == pytest.approx(max(detail.high, detail.value * used.step_factor_above))
        assert said.recommend().margin == used.margin(0.05)
        assert ("hence the wide interval" in str(said)) == (kind == "far")
        assert stabkit.Report.from_json(said.to_json()) == said


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_what_else_says_that_a_boundary_is_known_roughly(digits_mlp, class_deletion, monkeypatch):
    """Dormant parameters that matter below it, and the run in question where its step size is smaller still."""
    settings = {"algorithm": "graddiff", "lr": 0.01, "mix": 0.05, **QUICK}
    near = stabkit.predict(digits_mlp, *class_deletion, **settings)
    monkeypatch.setattr("stabkit.calibration.FAR_ERROR", 1.01 * near.critical_lr_error)
    for factor, kind in ((0.49, "far"), (0.51, "one")):  # of the critical step size
        with monkeypatch.context() as patch:
            patch.setattr("stabkit.judge.linearisation_errors", lambda *given, **named: (5.0, 0.0))
            said = near.at(lr=factor * near.critical_lr)
        assert said.calibration.kind == kind
        assert said.critical_lr_error == (5.0 if kind == "far" else near.critical_lr_error)
    for awake, kind in ((0.09, "one"), (0.11, "far")):
        seen = near.critical_lr_error, awake
        monkeypatch.setattr("stabkit.judge.errors_below", lambda *given, seen=seen, **named: seen)
        said = stabkit.predict(digits_mlp, *class_deletion, **settings)
        assert said.calibration == calibration(kind)
        assert ("parameters come to matter there" in str(said)) == (kind == "far")


def one_class_kept():
    """Two clusters, of which one is forgotten whole: steps of any size make the linearised network surer of the other."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(240, 2, generator=g) + torch.tensor([2.0, 0.0]) * (torch.arange(240) % 2 * 2 - 1).unsqueeze(1)
    y = torch.arange(240) % 2
    model = train(MLP(2, 2, hidden=(24, 24)), x, y, epochs=40, lr=1e-2)
    return model, (x[y == 1], y[y == 1]), (x[y == 0], y[y == 0])


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_where_no_step_size_breaks_the_linearised_network_its_reach_is_told():
    model, forget, retain = one_class_kept()
    algorithm = GradDiff(lr=1e-4, mix=0.3, steps=60, batch_size=16)
    report = stabkit.predict(model, forget, retain, algorithm=algorithm, mode="standard", seeds=2)
    assert report.critical_lr == math.inf
    reach = report.critical_lr_detail.scanned[1]
    assert report.critical_lr_interval == (reach, math.inf)
    assert report.critical_lr_error is None
    # The looks that found it are told, beside that at the end of the run itself.
    samples = sum(report.rollout.samples)
    told = next(cost for cost in report.costs if cost.stage == "rollouts and theory")
    assert 3 * samples / 3 < told.gradient_equivalents <= 9 * samples / 3
    assert report.at(lr=reach).linearisation_error <= FAR_ERROR
    beyond_it = report.at(lr=1.3 * reach)
    assert beyond_it.linearisation_error > FAR_ERROR
    assert report.at(lr=0.9 * reach).probability == report.at(lr=0.9 * reach).rollout.probability < 0.01
    assert beyond_it.probability == (beyond_it.rollout.probability + 0.5) / 2
    assert (beyond_it.verdict, beyond_it.confidence) == ("marginal", "low")
    assert beyond_it.advice[0].startswith("No step size up to ")
    assert "known" not in beyond_it.advice[0]
    problem = UnlearningProblem(model, forget, retain)
    assert run(problem, algorithm.replace(lr=100 * reach)).diverged
    for item in report.at(lr=20 * reach).recommend().items:
        if item.holds:
            assert not run(problem, algorithm.replace(lr=20 * reach).replace(**item.changes), seed=7).diverged, item


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_a_network_past_the_level_has_its_critical_step_size_below_the_scan(digits_mlp, class_deletion):
    worse = copy.deepcopy(digits_mlp)
    with torch.no_grad():
        next(worse.parameters()).mul_(-3)
    report = stabkit.predict(worse, *class_deletion, algorithm="graddiff", lr=0.01, **QUICK)
    assert report.critical_lr_interval == (0.0, report.critical_lr)


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
@pytest.mark.parametrize(
    ("retain", "forget", "few"), [(29, 40, True), (40, 29, True), (30, 30, False), (40, None, False)]
)
def test_few_samples_that_stand_for_a_set_are_no_ground_for_confidence(digits_mlp, class_deletion, retain, forget, few):
    asked = {
        "retain_samples": retain,
        "forget_samples": forget,
        "rank": 10,
        "seeds": 1,
        "steps": 10,
        "mode": "standard",
    }
    report = stabkit.predict(digits_mlp, *class_deletion, algorithm="graddiff", lr=1e-4, **asked)
    (check,) = (check for check in report.checks if check.name == "linearised samples")
    assert check.passed is not few
    assert check.value == min(n for n in (retain, forget) if n)
    if few:
        with pytest.warns(stabkit.LowConfidenceWarning, match=r"linearised samples 29 where at least 30 is wanted"):
            report.at(lr=2e-4)


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_a_forward_pass_below_the_boundary_is_counted(digits_mlp, random_deletion):
    settings = {"algorithm": "graddiff", "lr": 0.01, "mix": 0.3, "mode": "standard", **QUICK}
    report = stabkit.predict(digits_mlp, *random_deletion, **settings)
    assert report.critical_lr_error is not None

    def theory(costs):
        return next(cost.gradient_equivalents for cost in costs if cost.stage == "rollouts and theory")

    passes = sum(report.rollout.samples) / 3
    assert theory(report.costs) == pytest.approx(2 * passes)  # at the run's end, and at half the critical step size
    assert theory(report.at(lr=0.011).costs) == pytest.approx(passes)  # which is known by then
    assert theory(stabkit.predict_cost(digits_mlp, *random_deletion, **settings).stages) == pytest.approx(2 * passes)


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_where_nothing_holds_a_verdict_of_divergence_is_clear_of_the_boundary(digits_mlp, random_deletion):
    forget, retain = random_deletion
    wrong = retain[0], retain[1].roll(1)  # past the level before the run
    report = stabkit.predict(digits_mlp, forget, wrong, algorithm="graddiff", lr=1e-6, mix=0.3, **QUICK)
    assert report.verdict == "diverges"
    assert not report.critical_lr_detail.bracketed
    (check,) = (check for check in report.checks if check.name == MARGIN)
    assert (check.value, check.passed) == (0.0, True)


def test_whose_calibration_a_boundary_has():
    assert kind_at("one", None) == kind_at("one", FAR_ERROR) == "one"
    assert kind_at("one", 1.01 * FAR_ERROR) == kind_at("one", math.inf) == "far"
    assert kind_at("staged", math.inf) == "staged"
    assert kind_at("adamw", math.inf) == "adamw"


def test_without_a_boundary_the_rollouts_have_the_say(digits_mlp, random_deletion):
    """Steps of next to no length never diverge, and none of them is past anything."""
    report = stabkit.predict(
        digits_mlp, *random_deletion, algorithm="graddiff", lr=0.1, mix=0.3, max_gradient_norm=1e-9, **QUICK
    )
    assert math.isinf(report.critical_lr)
    assert report.probability == report.rollout.probability < 0.25
    assert "critical step size is smaller" not in str(report)


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_a_scan_that_crosses_from_its_first_value_on_bounds_nothing():
    """A model that is past the level already diverges at every step size, however small."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=g), torch.arange(60) % 3
    model = torch.nn.Linear(4, 3)
    torch.nn.init.normal_(model.weight, std=5.0, generator=g)
    report = stabkit.predict(
        model, (x[:20], y[:20]), (x[20:], y[20:]), lr=1e-12, steps=5, batch_size=8, mode="standard"
    )
    assert report.critical_lr_detail.found
    assert not report.critical_lr_detail.bracketed
    assert report.probability == report.rollout.probability > 0.9
    assert report.verdict == "diverges"
