"""The run-time guard: what must never alarm it, what must, when it says the level is reached, and what its actions do."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

import stabkit
from benchmarks.monitor import Case, Setting, Trace, batches, clock, line, warnings_of
from stabkit.bench.cells import Cell
from stabkit.monitor import ACTIONS, Alert, Monitor

pytestmark = pytest.mark.filterwarnings("ignore:the run is watched")
LEVEL = 2.3
FEEDS = ("retain_loss", "forget_loss", "gradient_norm")
below = st.floats(1e-9, 2.2)
positive = st.floats(1e-6, 1e3)


def histories(values=positive, *, min_size=1):
    """Rows of retain loss, forget loss and gradient norm."""
    return st.lists(st.tuples(values, values, values), min_size=min_size, max_size=40)


def watch(guard: Monitor, rows) -> list[Alert]:
    return [guard.update(*row) for row in rows]


def first_alarm(alerts):
    """Number of the first update with an alarm; infinite where there is none."""
    return next((alert.step for alert in alerts if alert.state != "calm"), math.inf)


# ------------------------------------------------------------------ what must not alarm it


@given(columns=st.tuples(*[st.lists(below, min_size=30, max_size=30)] * 3), warn_ahead=st.integers(4, 40))
def test_falling_losses_never_alarm(columns, warn_ahead):
    rows = zip(*(sorted(column, reverse=True) for column in columns), strict=True)
    for alert in watch(Monitor(level=LEVEL, warn_ahead=warn_ahead, action="stop"), rows):
        assert (alert.state, alert.stop, alert.lr_factor, alert.crossing) == ("calm", False, 1.0, math.inf)


@given(row=st.tuples(below, positive, positive), warn_ahead=st.integers(4, 40))
def test_constant_losses_never_alarm(row, warn_ahead):
    assert first_alarm(watch(Monitor(level=LEVEL, warn_ahead=warn_ahead), [row] * 50)) == math.inf


@given(period=st.lists(st.tuples(below, positive, positive), min_size=1, max_size=6))
def test_what_has_been_before_is_no_rise(period):
    guard = Monitor(level=LEVEL)
    watch(guard, period * 10)
    assert first_alarm(watch(guard, period * 5)) == math.inf


def test_a_large_factor_between_negligible_losses_is_no_rise():
    rows = [(0.1, 1e-9, 1.0)] * 4 + [(0.1, 1e-3, 1.0)] * 4
    assert first_alarm(watch(Monitor(level=LEVEL), rows)) == math.inf


# ------------------------------------------------------------------ what must, and when


@given(rate=st.floats(0.03, 0.6), start=st.floats(0.03, 0.5), warn_ahead=st.sampled_from((4, 10, 16)))
def test_the_crossing_of_an_exponential_is_found_exactly(rate, start, warn_ahead):
    crossing = 1 + math.log(LEVEL / start) / rate
    assume(crossing > 6)
    guard = Monitor(level=LEVEL, warn_ahead=warn_ahead)
    alerts = [guard.update(start * math.exp(rate * k)) for k in range(math.ceil(crossing) - 1)]
    alarms = [alert for alert in alerts if alert.state == "rising"]
    assert alarms
    for alert in alarms:
        assert alert.crossing == pytest.approx(crossing, rel=1e-9)
    assert crossing - alarms[0].step <= 2 * warn_ahead


def test_the_crossing_is_counted_in_updates_where_a_loss_comes_at_every_third():
    guard = Monitor(level=LEVEL)
    alerts = [guard.update(0.05 * math.exp(0.1 * k) if k % 3 == 0 else None, 0.1) for k in range(37)]
    crossing = 1 + math.log(LEVEL / 0.05) / 0.1
    alarm = next(alert for alert in alerts if alert.state == "rising")
    assert alarm.step < crossing - 3
    assert alarm.crossing == pytest.approx(crossing, rel=1e-9)


@pytest.mark.parametrize("growth", [2.5, 4.0])
def test_the_forget_loss_warns_while_the_retain_loss_stands_still(growth):
    rows = [(0.3, 0.1 * growth**k) for k in range(6)]  # two steps' growth, squared, is compared with 2.3 / 0.3 = 7.7
    alarm = first_alarm(watch(Monitor(level=LEVEL, warn_ahead=4), rows))
    assert alarm == (math.inf if growth**2 < LEVEL / 0.3 else 4)
    assert first_alarm(watch(Monitor(level=LEVEL, warn_ahead=4), [row[:1] for row in rows])) == math.inf


@pytest.mark.parametrize(("factor", "alarm"), [(0.999, math.inf), (1.001, 3)])
def test_the_gradient_norm_counts_squared_against_its_largest_before(factor, alarm):
    norms = [4.0, 1.0, 4.0 * factor * math.sqrt(LEVEL / 0.2)]
    assert first_alarm(watch(Monitor(level=LEVEL), [(0.2, None, norm) for norm in norms])) == alarm


@given(rows=histories(), exponents=st.tuples(st.integers(-20, 20), st.integers(-20, 20)))
def test_units_do_not_matter(rows, exponents):
    scale, norm_scale = (2.0**e for e in exponents)  # exact
    plain = watch(Monitor(level=LEVEL), rows)
    scaled = watch(Monitor(level=scale * LEVEL), [(scale * r, scale * f, norm_scale * n) for r, f, n in rows])
    assert [(a.state, a.crossing) for a in scaled] == [(a.state, a.crossing) for a in plain]


@given(rows=histories(min_size=8), longer=st.integers(0, 30))
def test_looking_further_ahead_or_at_more_never_warns_later(rows, longer):
    alarm = first_alarm(watch(Monitor(level=LEVEL, warn_ahead=4), rows))
    assert first_alarm(watch(Monitor(level=LEVEL, warn_ahead=4 + longer), rows)) <= alarm
    for seen in (1, 2):
        assert first_alarm(watch(Monitor(level=LEVEL, warn_ahead=4), [row[:seen] for row in rows])) >= alarm


@pytest.mark.parametrize("level", [0.5, -0.5])
def test_losses_below_zero_count_from_where_they_begin(level):
    guard = Monitor(level=level)
    assert first_alarm(watch(guard, [(-2.0, -2.0)] * 10)) == math.inf
    alerts = [guard.update(-2.0 + 0.1 * 1.3**k, -2.0) for k in range(40)]
    before = next(k for k, a in enumerate(alerts) if a.state == "diverged")
    assert -2.0 + 0.1 * 1.3**before >= level > -2.0 + 0.1 * 1.3 ** (before - 2)
    assert first_alarm(alerts) < alerts[before].step - 2


# ------------------------------------------------------------------ diverged


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_diverged(feed, value):
    guard = Monitor(level=LEVEL, action="stop")
    assert watch(guard, [(0.1, 0.1, 1.0)] * 5)[-1].state == "calm"
    alert = guard.update(**{feed: value})
    assert (alert.state, alert.stop, alert.crossing) == ("diverged", True, 6.0)
    assert f"the {feed.replace('_', ' ')} is {value}" in alert.message
    assert guard.update(0.1, 0.1, 1.0).state == "calm"  # it does not poison what comes after


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_beside_finite_losses_is_a_step_to_skip(value):
    guard, plain = (Monitor(level=LEVEL, action="stop") for _ in range(2))
    with pytest.warns(
        stabkit.StabkitWarning, match=f"norm of step 1 is {value} .* must be skipped, as .*GradScaler"
    ) as got:
        alerts = watch(guard, [(0.1, 0.1, value)] * 3)
    assert [w.filename for w in got] == [__file__]  # once
    watch(plain, [(0.1, 0.1)] * 3)
    assert {(a.state, a.stop, a.lr_factor) for a in alerts} == {("calm", False, 1.0)}
    rows = [(0.1, 0.1, 1.0), (0.1, 0.1, 2.0), (0.2, 0.1, 20.0)]
    assert watch(guard, rows) == watch(plain, rows)  # nothing of it is remembered
    assert guard.update(math.nan, 0.1, value).state == "diverged"


def test_steps_that_a_gradient_scaler_skips_are_no_divergence(digits_mlp, class_deletion):
    forget, retain = class_deletion
    net, guard = copy.deepcopy(digits_mlp), Monitor(level=LEVEL, action="stop")
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**27)
    before = next(net.parameters()).detach().clone()

    def steps():
        for _ in range(20):
            with torch.autocast("cpu", torch.float16):
                losses = [F.cross_entropy(net(x), y) for x, y in (retain, forget)]
            optimiser.zero_grad()
            scaler.scale(0.7 * losses[0] - 0.3 * losses[1]).backward()
            scaler.unscale_(optimiser)
            norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), math.inf))
            alert = guard.update(*losses, norm)
            scaler.step(optimiser)
            scaler.update()
            yield math.isfinite(norm), torch.equal(next(net.parameters()), before), alert

    with pytest.warns(stabkit.StabkitWarning, match="must be skipped") as caught:
        taken = list(steps())
    assert len(caught) == 1
    assert not taken[0][0]
    assert taken[-1][0]
    assert all(stands for finite, stands, _ in taken if not finite)
    assert {alert.state for *_, alert in taken} == {"calm"}


def test_one_batch_past_the_level_is_an_alarm_and_two_are_divergence():
    guard = Monitor(level=LEVEL, action="shrink", shrink=0.5)
    alerts = watch(guard, [(0.1,), (0.1,), (2.4,), (2.4,)])
    assert [a.state for a in alerts] == ["calm", "calm", "rising", "diverged"]
    assert alerts[2].crossing == 3
    assert [a.stop for a in alerts] == [False, False, False, True]
    assert Monitor(level=LEVEL).update(LEVEL).state == "diverged"


# ------------------------------------------------------------------ actions


@given(rows=histories(min_size=12), action=st.sampled_from(ACTIONS), shrink=st.floats(0.1, 0.9))
def test_actions_do_what_they_say(rows, action, shrink):
    alerts = watch(Monitor(level=LEVEL, action=action, shrink=shrink), rows)
    reference = watch(Monitor(level=LEVEL), rows)
    assert [a.state for a in alerts] == [a.state for a in reference]
    factors = [1.0] + [a.lr_factor for a in alerts]
    changed = [k for k in range(1, len(factors)) if factors[k] != factors[k - 1]]
    for alert in alerts:
        assert alert.stop == (
            action != "warn" and (alert.state == "diverged" or (alert.state, action) == ("rising", "stop"))
        )
    if action == "shrink":
        assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(changed))
        assert all(alerts[k - 1].state == "rising" for k in changed)
        assert factors[-1] == pytest.approx(shrink ** len(changed))
        rising = next((k for k, a in enumerate(alerts, 1) if a.state == "rising"), None)
        assert changed[:1] == ([rising] if rising else [])
    else:
        assert not changed


def test_an_alarm_that_goes_on_shrinks_at_every_other_update():
    alerts = watch(Monitor(level=LEVEL, action="shrink", shrink=0.5), [(0.3, 0.1 * 4.0**k) for k in range(9)])
    assert [a.state for a in alerts] == ["calm"] * 3 + ["rising"] * 6
    assert [a.lr_factor for a in alerts] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimiser: torch.optim.lr_scheduler.StepLR(optimiser, 3, 0.5),
        lambda optimiser: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 12),
        lambda optimiser: torch.optim.lr_scheduler.LinearLR(optimiser, 0.1, 1.0, 6),
        lambda optimiser: torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 / (k + 1)),
    ],
    ids=["step", "cosine", "linear", "lambda"],
)
def test_a_guard_that_shrinks_beside_a_scheduler_leaves_its_course_alone(make):
    """The docstring's loop: each step size is the scheduler's own times the factor."""
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, (0.3, 0.1), strict=True)]
    optimizer = torch.optim.SGD(copy.deepcopy(groups))
    alone = torch.optim.SGD(groups)
    scheduler, reference = make(optimizer), make(alone)
    monitor = Monitor(level=LEVEL, action="shrink", shrink=0.5)
    factors = []
    planned = [group["lr"] for group in optimizer.param_groups]
    for step in range(12):
        alert = monitor.update(0.3, 0.1 * 4.0 ** min(step, 6))
        for group, lr in zip(optimizer.param_groups, planned, strict=True):
            group["lr"] = lr * alert.lr_factor
        factors.append(alert.lr_factor)
        expected = [group["lr"] * alert.lr_factor for group in alone.param_groups]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        optimizer.step()
        alone.step()
        for group, lr in zip(optimizer.param_groups, planned, strict=True):
            group["lr"] = lr
        scheduler.step()
        reference.step()
        planned = [group["lr"] for group in optimizer.param_groups]
    assert factors[0] == 1
    assert factors[-1] <= 0.25


def test_tensors_are_taken_without_a_word_and_left_alone():
    loss = torch.tensor([0.2], requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alert = Monitor(level=LEVEL).update(loss.sum(), torch.tensor(0.1), np.float32(3))
    assert alert.state == "calm"
    assert loss.grad is None


# ------------------------------------------------------------------ with a report


@pytest.fixture(scope="module")
def report(request):
    model, sets = request.getfixturevalue("digits_mlp"), request.getfixturevalue("class_deletion")
    quick = {"rank": 20, "retain_samples": 96, "forget_samples": 48, "spectrum_samples": 96, "seeds": 2}
    return stabkit.predict(model, *sets, lr=0.05, mix=0.5, steps=60, **quick)


CHECKS = (0, *range(1, 11), *range(20, 101, 10))
RATE = 0.05


def with_curves(report, *, diverges, start=0.1):
    """The report of a run whose losses grow exponentially, to twice the level, or only to half of it."""
    level = report.run.divergence_level
    top = (2 if diverges else 0.5) * level
    retain, forget = (
        tuple(min(a * math.exp(RATE * k), b) for k in CHECKS) for a, b in ((start, top), (2 * start, 10 * top))
    )
    crossing = math.log(level / start) / RATE
    step = next(float(k) for k in CHECKS if k >= crossing) if diverges else None
    rolled = replace(report.rollout, steps=CHECKS, retain_loss=retain, forget_loss=forget)
    return replace(report, rollout=rolled, divergence_step=step, run=replace(report.run, retain_loss=start)), crossing


@pytest.mark.parametrize("feed", ["retain_loss", "forget_loss"])
@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_the_run_is_found_on_its_predicted_course_however_fast_it_goes(report, feed, speed):
    predicted, crossing = with_curves(report, diverges=True)
    guard = Monitor(predicted, warn_ahead=10)
    start = predicted.rollout.retain_loss[0] if feed == "retain_loss" else predicted.rollout.forget_loss[0]
    for update in range(1, math.floor(crossing / speed)):
        at = speed * (update - 1)
        alert = guard.update(**{feed: start * math.exp(RATE * at)})
        if alert.state != "calm":
            break
        assert alert.crossing - alert.step == pytest.approx(crossing - at, rel=1e-6)
        assert crossing - at > 10
    assert alert.state == "rising"
    assert 10 - speed < crossing - at <= 10
    assert alert.crossing - alert.step == pytest.approx(crossing - at, rel=1e-6)
    assert not alert.unpredicted


def test_the_loss_that_is_further_on_its_course_counts(report):
    predicted, crossing = with_curves(report, diverges=True)
    for steps in ((0, 30), (30, 0)):
        losses = [a * math.exp(RATE * k) for a, k in zip((0.1, 0.2), steps, strict=True)]
        assert Monitor(predicted).update(*losses).crossing == pytest.approx(1 + crossing - 30)


def test_without_a_retain_loss_that_of_the_report_stands(report):
    predicted, _ = with_curves(report, diverges=False, start=0.5)
    rows = [(None, 1.0)] * 2 + [(None, 5.0)] * 2  # a factor 5 takes 0.5 past the level, and 1 % of it nowhere near
    assert first_alarm(watch(Monitor(predicted, warn_ahead=4), rows)) == 4
    assert first_alarm(watch(Monitor(level=predicted.run.divergence_level, warn_ahead=4), rows)) == math.inf


def test_a_run_predicted_to_cross_at_once_is_stopped_before_its_first_step(report):
    predicted, _ = with_curves(report, diverges=True, start=1.6)
    assert Monitor(predicted, action="stop").update(1.6, 3.2).stop
    calm, _ = with_curves(report, diverges=False, start=1.0)
    assert not Monitor(calm, action="stop").update(1.0, 2.0).stop


def test_a_rise_that_was_not_predicted_says_so(report):
    predicted, _ = with_curves(report, diverges=False)
    alerts = watch(Monitor(predicted), [(0.1 * 1.2**k, 0.2 * 1.5**k) for k in range(16)])
    alarm = next(alert for alert in alerts if alert.state != "calm")
    assert alarm.unpredicted
    assert "predicted to stay below" in alarm.message
    assert not alerts[0].unpredicted


def test_after_shrinking_the_prediction_is_of_another_run(report):
    predicted, _ = with_curves(report, diverges=True, start=1.6)
    alerts = watch(Monitor(predicted, action="shrink", shrink=0.5), [(1.6, 3.2, 1.0)] * 10)
    assert [a.state for a in alerts] == ["rising"] + ["calm"] * 9
    assert {a.lr_factor for a in alerts} == {0.5}
    assert alerts[-1].crossing == math.inf


def test_a_report_and_its_level_agree_where_nothing_is_predicted(report):
    predicted, _ = with_curves(report, diverges=False)
    rows = [(0.1 * 1.3**k, 0.2 * 1.4**k, 1.1**k) for k in range(12)]
    plain = watch(Monitor(level=predicted.run.divergence_level), rows)
    assert [a.state for a in watch(Monitor(predicted), rows)] == [a.state for a in plain]


# ------------------------------------------------------------------ real loops


def loop(model, forget, retain, *, lr, mix, guard, steps=60):
    """Plain gradient difference; the alerts, and the first step after which the whole retain set is at the level."""
    net = copy.deepcopy(model)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    streams = batches(retain, 64, 0), batches(forget, 64, 1)
    alerts = []
    for step in range(steps):
        losses = [F.cross_entropy(net(x), y) for x, y in map(next, streams)]
        optimiser.zero_grad()
        ((1 - mix) * losses[0] - mix * losses[1]).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), math.inf)
        alerts.append(guard.update(*losses, norm))
        for group in optimiser.param_groups:
            group["lr"] = lr * alerts[-1].lr_factor
        optimiser.step()
        with torch.no_grad():
            if not F.cross_entropy(net(retain[0]), retain[1]) < guard.level:
                return alerts, step + 1
    return alerts, math.inf


@pytest.mark.parametrize("informed", [False, True])
def test_real_runs_are_warned_of_ahead_and_stable_ones_are_not(report, digits_mlp, class_deletion, informed):
    """At many step sizes, as how far ahead depends on the run; benchmarks/monitor.py has more of them."""
    forget, retain = class_deletion

    def guard(lr, **options):
        return (
            Monitor(report.at(lr=lr), **options) if informed else Monitor(level=report.run.divergence_level, **options)
        )

    leads = []
    for factor in (2, 3, 4, 6, 8, 12, 16):
        large = factor * report.critical_lr
        alerts, crossing = loop(digits_mlp, forget, retain, lr=large, mix=0.5, guard=guard(large))
        assert crossing < math.inf
        leads.append(crossing - first_alarm(alerts) + 1)  # the first update sees the losses before the first step
        _, crossing = loop(digits_mlp, forget, retain, lr=large, mix=0.5, guard=guard(large, action="shrink"))
        assert crossing == math.inf  # shrinking rescues the run
    assert min(leads) >= (3 if informed else 1)
    small = 0.2 * report.critical_lr
    alerts, crossing = loop(digits_mlp, forget, retain, lr=small, mix=0.5, guard=guard(small))
    assert crossing == math.inf
    assert first_alarm(alerts) == math.inf


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"Either `report` or `level` of `Monitor` must be given; got neither\. ln C"),
        ({"level": "2"}, TypeError, r"`level` of `Monitor` must be a finite number in .*; got '2'"),
        ({"level": math.inf}, ValueError, r"`level` of `Monitor` must be a finite number in .*; got inf"),
        ({"report": 2.3}, TypeError, r"`report` of `Monitor` must be a Report; got 2\.3\. A number is given as"),
        ({"level": 2, "warn_ahead": 3}, ValueError, r"`warn_ahead` of `Monitor` must be a whole number >= 4; got 3"),
        (
            {"level": 2, "warn_ahead": 5.0},
            TypeError,
            r"`warn_ahead` of `Monitor` must be a whole number >= 4; got 5\.0",
        ),
        ({"level": 2, "action": "halt"}, ValueError, r"`action` of `Monitor` must be one of .*; got 'halt'"),
        ({"level": 2, "action": 1}, TypeError, r"`action` of `Monitor` must be one of .*; got 1"),
        ({"level": 2, "shrink": 1.0}, ValueError, r"`shrink` of `Monitor` must be .*\(0, 1\); got 1\.0"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        Monitor(**arguments)


def test_a_report_and_a_level_are_one_too_many(report):
    with pytest.raises(ValueError, match=r"must be given; got both"):
        Monitor(report, level=2.3)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("value", [[0.1, 0.2], "low", torch.ones(2), 1j])
def test_updates_are_checked(feed, value):
    with pytest.raises(
        TypeError, match=rf"`{feed}` of `Monitor\.update` must be one number; got .*Give the batch's mean"
    ):
        Monitor(level=LEVEL).update(**{feed: value})


def test_an_update_of_nothing_is_refused():
    guard = Monitor(level=LEVEL)
    with pytest.raises(ValueError, match=r"`update` of `Monitor` must be given .*; got none of them"):
        guard.update()
    assert guard.step == 0


# ------------------------------------------------------------------ the benchmark's counting


def setting(report, retain_losses, crossing):
    cell = Cell(dataset="digits", model="mlp", deletion="class", algorithm="graddiff")
    seen = np.array([(loss, loss, 1.0) for loss in retain_losses])
    trace = Trace(seen=seen, retain=seen[:, 0], crossing=crossing, lr_factor=1.0)
    return Setting(case=Case(cell=cell), seed=0, lr=0.1, mix=0.5, report=report, trace=trace, again=lambda guard: trace)


def test_leads_and_false_alarms_are_counted_as_described(report):
    calm = [0.1] * 10
    settings = [setting(report, calm, crossing) for crossing in (12, 8, 4, None, None)]
    alarms = iter([(2, 12.0), (8, 8.0), (None, math.inf), (0, 1.0), (None, math.inf)])  # leads 10, 0 and none
    found = warnings_of(settings, lambda s: next(alarms))
    assert (found["diverging"], found["stable"], found["false_alarms"], found["median_lead"]) == (3, 2, 0.5, 0.0)
    assert found["warned_ahead"] == {"1": 0.3333, "3": 0.3333, "5": 0.3333, "10": 0.3333}
    assert found["slow"]["warned_ahead"]["10"] == 0.5
    assert found["fast"] == {"diverging": 1, "warned_ahead": {"1": 0.0}}
    assert found["expected_over_actual"] == 1.0


def test_the_rules_it_is_compared_with(report):
    level = report.run.divergence_level
    growing = [0.1 * math.exp(0.2 * k) for k in range(15)]
    step, expected = line(setting(report, growing, 16))
    assert step == 7  # the window is full
    assert expected == pytest.approx(math.log(level / 0.1) / 0.2)
    assert line(setting(report, [0.1, 0.2] * 8, None)) == (None, math.inf)
    assert clock(setting(replace(report, divergence_step=13.0), growing, 16)) == (3, 13.0)
    assert clock(setting(replace(report, divergence_step=None), growing, 16)) == (None, math.inf)


def test_a_run_is_watched_by_a_hook(digits_mlp, class_deletion):
    problem = stabkit.UnlearningProblem(digits_mlp, *class_deletion)
    wild = stabkit.GradDiff(lr=0.3, mix=0.6, steps=60)
    unwatched = stabkit.run(problem, wild, seed=0)
    assert unwatched.diverged
    guard = Monitor(level=problem.divergence_level, action="stop")
    with pytest.warns(stabkit.StabkitWarning, match="the run is watched: step .*, rising") as caught:
        stopped = stabkit.run(problem, wild, seed=0, on_step=guard.on_step)
    assert {w.filename for w in caught} == {__file__}
    assert stopped.stop_reason == "on_step"
    assert stopped.steps == guard.alert.step < unwatched.steps
    watcher = Monitor(level=problem.divergence_level)
    with pytest.warns(stabkit.StabkitWarning, match="rising") as caught:
        watched = stabkit.run(problem, wild, seed=0, on_step=watcher.on_step)
    assert len(caught) == 1  # said once
    assert watched.steps == unwatched.steps
    calm = Monitor(level=problem.divergence_level, action="stop")
    assert stabkit.run(problem, wild.replace(lr=1e-3), seed=0, on_step=calm.on_step).stop_reason == "steps"
    assert calm.alert.state == "calm"
    with pytest.raises(ValueError, match=r"`action` of `Monitor` must be 'warn' or 'stop' in `run`.*; got 'shrink'"):
        stabkit.run(problem, wild, on_step=Monitor(level=1.0, action="shrink").on_step)


def test_a_guard_watches_one_run(digits_mlp, class_deletion):
    problem = stabkit.UnlearningProblem(digits_mlp, *class_deletion)
    guard, calm = Monitor(level=problem.divergence_level), stabkit.GradDiff(lr=1e-3, mix=0.5, steps=5)
    stabkit.run(problem, calm, on_step=guard.on_step)
    with pytest.raises(
        ValueError, match=r"must watch one run.*; got step 1 after step 5\. Make a new Monitor for each run"
    ):
        stabkit.run(problem, calm, on_step=guard.on_step)


def test_a_first_step_that_stands_still_is_no_level_to_rise_from(digits_mlp, class_deletion):
    """SCRUB's first step has a gradient of rounding alone."""
    problem = stabkit.UnlearningProblem(digits_mlp, *class_deletion)
    guard = Monitor(level=problem.divergence_level, action="stop")
    scrub = stabkit.SCRUB(lr=1e-3, steps=30)
    norms = []
    stabkit.run(
        problem, scrub.replace(steps=2, lr_schedule=None), seed=0, on_step=lambda s: norms.append(s.gradient_norm)
    )
    assert 0 < 1e3 * norms[0] < norms[1]
    plain = stabkit.run(problem, scrub, seed=0)
    assert not plain.diverged
    assert stabkit.run(problem, scrub, seed=0, on_step=guard.on_step).steps == plain.steps
    rising = Monitor(level=LEVEL)
    states = [rising.update(0.03, 0.03, norm).state for norm in (1e-6, 0.3, 0.3, 30.0)]
    assert states == ["calm", "calm", "calm", "rising"]
