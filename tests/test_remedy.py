"""Recommendations hold what they say: by the rollout they come from, on the front, and in real runs."""

from __future__ import annotations

import dataclasses
import importlib
import math
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch

import stabkit
from stabkit.algorithms import FineTune, GradientAscent, L1Sparse, StepPlan
from stabkit.calibration import calibration
from stabkit.curvature import linearise
from stabkit.modes import MODES
from stabkit.problem import UnlearningProblem
from stabkit.recommendations import ParetoPoint, Recommendations
from stabkit.remedy import algorithm_at
from stabkit.runner import run

mpl.use("Agg")
QUICK = {"rank": 30, "retain_samples": 128, "forget_samples": 64, "spectrum_samples": 64, "seeds": 2, "steps": 40}
pytestmark = pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")


@pytest.fixture(scope="module")
def report(digits_mlp, class_deletion):
    return stabkit.predict(digits_mlp, *class_deletion, lr=0.8, mix=0.5, **QUICK)


@pytest.fixture(scope="module")
def found(report):
    return report.recommend()


def test_every_way_out_is_as_the_rollout_has_it(report, found):
    assert not found.asked.holds
    assert found.asked.probability == pytest.approx(report.rollout.probability)
    assert {"step size", "mix", "warm-up", "decay", "forget decay", "batch size", "clipping"} <= {
        item.remedy for item in found.items
    }
    assert found.front[-1].forget_loss >= max(i.forget_loss for i in found.items if i.remedy == "step size")
    for item in found.items:
        if item.algorithm is not None:
            continue
        again = report.at(**item.changes)
        said = again.rollout.probability
        assert said == pytest.approx(item.probability, abs=1e-3)  # settings side by side round differently
        if item.further_probability is None:  # staged rollouts do not go on from what does not hold
            assert item.probability > found.risk
            assert not item.holds
            continue
        further = again.at(lr=found.margin * again.run.settings["lr"])
        assert further.rollout.probability == pytest.approx(item.further_probability, abs=1e-3)
        assert item.holds == (max(item.probability, item.further_probability) <= found.risk), item.remedy
    held = {item.remedy for item in found.items if item.holds}
    assert {"step size", "clipping"} <= held


def test_what_holds_in_a_network_that_is_wrong_there_is_called_unsure(digits_mlp, class_deletion, monkeypatch):
    """Whatever moved the outputs further than a bound is wrong by assumption: ways out keep below it, or are unsure."""
    report = stabkit.predict(digits_mlp, *class_deletion, lr=0.3, mix=0.3, mode="standard", **QUICK)
    report = report.at(lr=report.critical_lr / 30)
    sure = report.recommend()
    assert all(item.error is None or item.error <= 0.3 for item in (sure.asked, *sure.items) if item.holds)
    assert any(item.holds for item in sure.items)
    lengths = []

    def errors(problem, network, rolled):
        lengths.append(float(rolled.coordinates[0, 0].norm()))
        return (0.0 if lengths[-1] < bound else 1.0), 0.0

    bound = math.inf
    monkeypatch.setattr("stabkit.remedy.linearisation_errors", errors)
    step = next(item for item in report.recommend().items if item.remedy == "step size")
    assert step.holds
    bound, lengths[:] = sorted(lengths)[0], []  # nothing is right but what moves less than all of these
    unsure = report.recommend()
    lower = next(item for item in unsure.items if item.remedy == "step size")
    assert lower.changes["lr"] < step.changes["lr"]
    assert lower.holds
    others = [item for item in unsure.items if item.unsure]
    assert others
    assert all(not item.holds and max(item.probability, item.further_probability) <= unsure.risk for item in others)
    assert "unsure" in str(unsure)
    assert "Unsure: holds in a linearised network that is wrong there" in str(unsure)
    assert "orange is unsure" in unsure.plot()[1].get_title()
    assert Recommendations.from_json(unsure.to_json()) == unsure
    monkeypatch.setattr("stabkit.remedy.linearisation_errors", lambda *given: (0.0, 0.2))  # dormant ones awake
    assert not any(item.holds for item in report.recommend().items)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_decay_that_breaks_a_run_can_be_left_out(optimizer, digits_mlp, class_deletion):
    """Decay that leaves e⁻³ of the weights takes the predictions with it, and without it nothing happens."""
    settings = {"lr": 1e-4, "mix": 0.0, "weight_decay": 750.0, "optimizer": optimizer, "mode": "standard", **QUICK}
    report = stabkit.predict(digits_mlp, *class_deletion, **settings)
    assert report.verdict == "diverges"
    (item,) = (item for item in report.recommend().items if item.remedy == "no weight decay")
    assert item.holds
    assert item.changes == {"weight_decay": 0.0}
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    asked = stabkit.algorithms.resolve_algorithm("graddiff").replace(**report.run.settings)
    assert run(problem, asked).diverged
    assert not run(problem, asked.replace(**item.changes)).diverged
    plain = report.at(weight_decay=0.0).recommend()
    assert "no weight decay" not in {item.remedy for item in plain.items}


def test_schedules_come_on_top_of_the_one_that_the_run_has(report):
    scheduled = report.at(lr_schedule="linear")
    found = scheduled.recommend()
    ways = {item.remedy: item for item in found.items}
    falling = [1 - k / 40 for k in range(40)]
    rising = [min((k + 1) / 4, 1.0) for k in range(40)]
    assert ways["warm-up"].changes["lr_schedule"] == pytest.approx([
        a * b for a, b in zip(falling, rising, strict=True)
    ])
    assert ways["forget decay"].changes["forget_schedule"] == "cosine"
    assert "lr_schedule=40 factors, 0.025 to 0.925" in str(found)
    again = scheduled.at(**ways["warm-up"].changes)
    assert again.rollout.probability == pytest.approx(ways["warm-up"].probability, abs=1e-3)
    repeated = report.at(lr_schedule="warmup").recommend()
    assert "warm-up" not in {item.remedy for item in repeated.items}


def test_the_step_is_the_largest_that_holds(report, found):
    (step,) = (item for item in found.items if item.remedy == "step size")
    spacing = 100 ** (1 / 23)
    further = report.at(lr=step.changes["lr"] * found.margin * spacing * 1.001)
    assert further.rollout.probability > found.risk
    assert step.changes["lr"] * found.margin < report.critical_lr


@pytest.mark.parametrize("mode", ["standard", "thorough"])
def test_what_holds_is_about_within_the_risk_in_a_report_too(mode, digits_mlp, class_deletion):
    """Which weighs the boundary's uncertainty; its seeds' spread may make that a little wider."""
    report = stabkit.predict(digits_mlp, *class_deletion, lr=0.8, mix=0.5, mode=mode, **QUICK)
    found = report.recommend()
    assert found.margin == calibration(found.kind).margin(0.05)
    assert any(item.holds for item in found.items)
    for item in found.items:
        if item.holds and item.algorithm is None:
            assert report.at(**item.changes).probability <= 1.2 * found.risk, item.remedy


def test_step_sizes_reach_the_boundary_from_however_far_below(digits_mlp, class_deletion, found):
    """A report about a step size far too small offered a hundred times that, and a run that forgets nothing."""
    tiny = stabkit.predict(digits_mlp, *class_deletion, lr=1e-7, mix=0.5, **QUICK).recommend()
    step, usual = (next(i for i in of.items if i.remedy == "step size").changes["lr"] for of in (tiny, found))
    assert step == pytest.approx(usual, rel=0.3)
    assert tiny.front[-1].forget_loss == pytest.approx(found.front[-1].forget_loss, rel=0.3)


def test_where_nothing_breaks_a_large_step_size_is_looked_past_too(digits_mlp, class_deletion):
    """A second scan around the curvature's own, smaller step size would end at the asked one."""
    clipped = stabkit.FineTune(lr=100.0, max_gradient_norm=1e-7)
    report = stabkit.predict(digits_mlp, *class_deletion, algorithm=clipped, mode="standard", **QUICK)
    assert not report.critical_lr_detail.found
    assert report.thresholds.step_limit < 100.0
    step = next(item for item in report.recommend().items if item.remedy == "step size")
    assert step.changes["lr"] > 1000.0


def test_a_recommended_step_survives_for_real(digits_mlp, class_deletion, found):
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    asked = stabkit.GradDiff(lr=0.8, mix=0.5, steps=40)
    assert run(problem, asked).diverged
    for item in found.items:
        if item.holds:
            assert not run(problem, item.apply(asked), seed=5).diverged, item.remedy


@pytest.mark.parametrize("mode", ["standard", "thorough"])
def test_another_algorithm_is_predicted_as_if_it_had_been_asked_about(mode, digits_mlp, class_deletion):
    """Ascent alone is given a retain part; on ascent with one NPO's weights are tried."""
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    for asked, names in (
        (stabkit.GradientAscent(lr=0.1, steps=40, momentum=0.5), ["graddiff", "npo"]),
        (stabkit.GradDiff(lr=0.3, mix=0.5, steps=40), ["npo"]),
    ):
        report = stabkit.predict(digits_mlp, *class_deletion, algorithm=asked, mode=mode, **QUICK)
        assert report.verdict == "diverges"
        items = [item for item in report.recommend().items if item.remedy == "algorithm"]
        assert [item.algorithm for item in items] == names
        for item in items:
            other = item.apply(asked)
            assert (other.name, other.steps, other.momentum) == (item.algorithm, asked.steps, asked.momentum)
            assert other.mix == item.changes["mix"] <= asked.mix
            assert other.lr == item.changes.get("lr", asked.lr)
            again = stabkit.predict(digits_mlp, *class_deletion, algorithm=other, mode=mode, **QUICK)
            assert again.rollout.probability == pytest.approx(item.probability, abs=1e-3)
            if item.holds and mode == "thorough":  # one linearisation may be wrong about what it has not seen
                assert not run(problem, other, seed=5).diverged
        assert any(item.holds for item in items)
        assert item.algorithm in str(report.recommend())
    elsewhere = stabkit.predict(digits_mlp, *class_deletion, algorithm="agu", lr=5.0, mode="fast")
    assert all(item.algorithm is None for item in elsewhere.recommend().items)  # it has a P of its own


def test_no_point_of_the_front_is_beaten_and_all_hold(found):
    assert len(found.front) > 3
    for left, right in zip(found.front, found.front[1:], strict=False):
        assert left.forget_loss < right.forget_loss
        assert left.retain_loss < right.retain_loss
    assert all(p.probability <= found.risk and 1 <= p.steps <= 40 for p in found.front)


def test_a_target_is_reached_at_least_harm(found):
    target = found.front[len(found.front) // 2].forget_loss
    chosen = found.reaching(target)
    assert chosen.forget_loss >= target
    assert all(p.retain_loss >= chosen.retain_loss for p in found.front if p.forget_loss >= target)
    assert found.reaching(1e9) == found.front[-1]
    with pytest.raises(ValueError, match=r"`forget_loss` of `Recommendations.reaching` must .*; got nan"):
        found.reaching(math.nan)
    with pytest.raises(ValueError, match=r"`front` of `Recommendations` must hold a point; .* at a risk of 0\.05"):
        dataclasses.replace(found, front=()).reaching(1.0)


def test_a_lower_risk_asks_for_weaker_settings(report, found):
    careful = report.recommend(risk=1e-6)
    steps = [next(i for i in r.items if i.remedy == "step size").changes["lr"] for r in (careful, found)]
    assert steps[0] <= steps[1]
    with pytest.raises(ValueError, match=r"`risk` of `recommend` must be .*; got 1\.5"):
        report.recommend(risk=1.5)


def test_recommendations_show_and_store_themselves(found, tmp_path):
    text = str(found)
    assert "does not hold" in text
    assert f"{found.asked.probability:.2f}" in text
    assert "<table" in found._repr_html_()
    assert Recommendations.from_json(found.to_json(tmp_path / "found.json")) == found
    figure, axes = found.plot()
    x, y = axes.lines[0].get_data()
    assert list(x) == [p.retain_loss for p in found.front]
    assert list(y) == [p.forget_loss for p in found.front]
    mpl.pyplot.close(figure)


@pytest.mark.parametrize("algorithm", [GradientAscent(lr=2.0), FineTune(lr=2.0)], ids=lambda a: a.name)
def test_a_mix_that_is_fixed_is_left_alone(digits_mlp, class_deletion, algorithm):
    found = stabkit.predict(digits_mlp, *class_deletion, algorithm=algorithm, **QUICK).recommend()
    assert "mix" not in {item.remedy for item in found.items}
    assert {p.mix for p in found.front} == {algorithm.mix}
    assert algorithm_at(algorithm, found.front[0]).mix == algorithm.mix


def test_a_plan_that_reads_no_schedule_is_offered_none(digits_mlp, class_deletion):
    class Halved(stabkit.GradDiff):
        name = "halved"

        def plan(self):
            return tuple(StepPlan(lr=0.99**k) for k in range(self.steps))

    algorithm = Halved(lr=0.8, mix=0.5, batch_size=32)
    found = stabkit.predict(digits_mlp, *class_deletion, algorithm=algorithm, **QUICK).recommend()
    offered = {item.remedy for item in found.items}
    assert {"step size", "mix", "batch size"} <= offered
    assert not offered & {"warm-up", "decay", "forget decay", "clipping"}


def test_a_report_from_a_file_cannot_recommend(report):
    with pytest.raises(RuntimeError, match="`recommend` of `Report` needs what was measured"):
        stabkit.Report.from_json(report.to_json()).recommend()


def test_staged_rollouts_confirm(digits_mlp, class_deletion):
    settings = {**QUICK, "seeds": 1, "steps": 12}
    report = stabkit.predict(digits_mlp, *class_deletion, lr=1.0, mix=0.5, mode="thorough", **settings)
    found = report.recommend()
    assert found.kind == "staged"
    (step,) = (item for item in found.items if item.remedy == "step size")
    assert step.holds
    assert report.at(**step.changes).rollout.probability == pytest.approx(step.probability, abs=1e-9)


# ------------------------------------------------------------------ tune


def test_tuning_reaches_its_target_without_breaking(digits_mlp, class_deletion):
    options = {key: value for key, value in QUICK.items() if key != "steps"}
    asked = stabkit.GradDiff(lr=5.0, steps=60, batch_size=32)
    tuned = stabkit.tune(digits_mlp, *class_deletion, algorithm=asked, forget_loss=3.0, **options)
    assert isinstance(tuned, stabkit.GradDiff)
    assert tuned.batch_size == 32
    assert tuned.steps <= 60
    real = run(UnlearningProblem(digits_mlp, *class_deletion), tuned, monitor_samples=None)
    assert not real.diverged
    assert real.trajectory[-1].forget_loss > 1.0  # from 0.1 or so: most of the way on the logarithm
    assert real.trajectory[-1].retain_loss < 0.5


@pytest.mark.filterwarnings("ignore::stabkit.TargetWarning")
@pytest.mark.parametrize("schedule", ["linear", "given"])
def test_a_tuned_run_is_the_one_that_was_predicted(digits_mlp, class_deletion, schedule, monkeypatch):
    """Fewer steps keep the factors that they had in the longer run, which a name would squeeze."""
    options = {key: value for key, value in QUICK.items() if key != "steps"}
    factors = [1 - k / 30 for k in range(30)]
    asked = stabkit.GradDiff(steps=30, batch_size=32, forget_schedule="linear" if schedule == "linear" else factors)
    mode = "standard" if schedule == "linear" else "thorough"
    point = ParetoPoint(lr=0.02, mix=0.3, steps=8, probability=0.0, retain_loss=0.1, forget_loss=2.0)
    monkeypatch.setattr(Recommendations, "reaching", lambda found, forget_loss: point)
    tuned = stabkit.tune(digits_mlp, *class_deletion, algorithm=asked, forget_loss=2.0, mode=mode, **options)
    assert tuned.steps == 8
    assert list(tuned.forget_schedule) == pytest.approx(factors[: tuned.steps])


def test_points_of_fewer_steps_are_beginnings_of_the_run(digits_mlp, random_deletion):
    asked = stabkit.GradDiff(lr=0.1, lr_schedule="cosine", steps=40)
    settings = {**QUICK, "steps": 40}
    report = stabkit.predict(digits_mlp, *random_deletion, algorithm=asked, mode="standard", **settings)
    point = next(p for p in report.recommend().front if p.steps < 40)
    cut = algorithm_at(asked, point)
    changes = {name: getattr(cut, name) for name in ("lr", "mix", "steps", "lr_schedule")}
    said = report.at(**changes).rollout
    assert np.mean(said.score) < 0
    both = said.retain_low[-1], said.retain_high[-1]  # of two seeds
    assert sum(both) / 2 == pytest.approx(point.retain_loss, rel=1e-3)


def test_a_plan_that_cannot_be_cut_is_offered_whole(digits_mlp, class_deletion):
    asked = L1Sparse(lr=0.01, penalty=1e-2)
    found = stabkit.predict(digits_mlp, *class_deletion, algorithm=asked, mode="standard", **QUICK).recommend()
    assert {p.steps for p in found.front} == {40}
    point = dataclasses.replace(found.front[0], steps=8)
    with pytest.raises(ValueError, match=r"`point` of `algorithm_at` must have the 40 steps of L1Sparse.*; got 8\."):
        algorithm_at(asked.replace(steps=40), point)


def test_fewer_steps_cut_a_schedule_that_was_given_factor_by_factor(report):
    falling = [1 - k / 80 for k in range(40)]
    scheduled = report.at(lr_schedule=falling, forget_schedule=falling)
    shorter = scheduled.at(steps=10)
    assert shorter.run.settings["lr_schedule"] == pytest.approx(falling[:10])
    assert shorter.rollout.retain_loss == pytest.approx(scheduled.rollout.retain_loss[:11])
    with pytest.raises(
        ValueError, match=r"`lr_schedule` of `GradDiff` must hold one factor for each of the 50 steps; got 40"
    ):
        scheduled.at(steps=50)


@pytest.mark.parametrize("mode", ["standard", "thorough"])
def test_what_is_tuned_has_a_report_that_holds(digits_mlp, class_deletion, mode, monkeypatch):
    """The front alone has no margin, and a point of it may break: then a part of its step size is taken, and said to be."""
    options = {**{key: value for key, value in QUICK.items() if key != "steps"}, "mode": mode}
    asked = stabkit.GradDiff(steps=40, batch_size=32)
    edge = ParetoPoint(lr=0.05, mix=0.5, steps=40, probability=0.01, retain_loss=1.0, forget_loss=30.0)
    monkeypatch.setattr(Recommendations, "reaching", lambda found, forget_loss: edge)
    with pytest.warns(
        stabkit.TargetWarning, match=r"to its target, 20: the step size that comes nearest, 0\.05, may break the run"
    ):
        tuned = stabkit.tune(digits_mlp, *class_deletion, algorithm=asked, forget_loss=20.0, **options)
    assert tuned.lr < 0.05
    said = stabkit.predict(digits_mlp, *class_deletion, algorithm=tuned, **options)
    assert said.rollout.probability <= 0.05
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    assert not any(run(problem, tuned, seed=seed).diverged for seed in range(10, 14))


@pytest.mark.filterwarnings("ignore::stabkit.TargetWarning")
@pytest.mark.parametrize(("staged", "lower"), [(0.04, False), (0.06, True)])
def test_a_doubtful_setting_is_tuned_by_a_staged_rollout(digits_mlp, class_deletion, staged, lower, monkeypatch):
    """Of a margin there is no doubt: what is tuned may lie near the boundary."""
    options = {**{key: value for key, value in QUICK.items() if key != "steps"}, "steps": 40}
    calls = []

    def rolled(measurement, seed):
        calls.append(measurement.algorithm.lr)
        return staged if len(calls) == 1 else 0.0

    monkeypatch.setattr("stabkit.judge._staged_probability", rolled)
    failed = importlib.import_module("stabkit.checks").MARGIN
    judged = stabkit.Report.at

    def doubtful(report, **changes):
        found = judged(report, **changes)
        check = stabkit.report.Check(name=failed, value=2.0, threshold=1.0, passed=False, meaning="", remedy="")
        return dataclasses.replace(found, checks=(check,))

    monkeypatch.setattr(stabkit.Report, "at", doubtful)
    near = stabkit.tune(digits_mlp, *class_deletion, forget_loss=0.5, **options)
    assert not calls
    failed = "linearisation error"
    tuned = stabkit.tune(digits_mlp, *class_deletion, forget_loss=0.5, **options)
    assert calls[0] == near.lr
    assert (tuned.lr < near.lr) is lower
    assert len(calls) == 1 + lower


def test_tuning_that_finds_nothing_sure_says_so(digits_mlp, class_deletion, monkeypatch):
    """Looked at with a check that no step size passes; and nothing is said of the settings looked at on the way."""
    judged = stabkit.Report.at

    def doubtful(report, **changes):
        found = judged(report, **changes)
        check = stabkit.report.Check(
            name="likeness", value=2.0, threshold=1.0, passed=False, meaning="", remedy="Look."
        )
        return dataclasses.replace(found, checks=(*found.checks, check))

    monkeypatch.setattr(stabkit.Report, "at", doubtful)
    options = {**{key: value for key, value in QUICK.items() if key != "steps"}, "mode": "standard", "steps": 20}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tuned = stabkit.tune(digits_mlp, *class_deletion, forget_loss=0.2, **options)
    unsure = [str(w.message) for w in said if w.category is stabkit.LowConfidenceWarning]
    assert len(unsure) == 1
    assert f"step size {tuned.lr:.3g}, " in unsure[0]
    assert "likeness 2 (Look.)" in unsure[0]
    assert "mode='thorough'" in unsure[0]


def test_held_out_data_are_the_target(digits_mlp, random_deletion, digits_data):
    options = {key: value for key, value in QUICK.items() if key != "steps"} | {"steps": 30}
    forget, retain = random_deletion
    held_out = (forget[0][:20] + 0.01, forget[1][:20].clone())
    held_out[1][0] = (held_out[1][0] + 1) % 10  # a confident mistake
    with torch.no_grad():
        p = digits_mlp(held_out[0]).softmax(1).gather(1, held_out[1].unsqueeze(1))
    assert float(-p.log().mean()) > 1.2 * float(-p.mean().log())
    loss = float(-p.mean().log())
    by_data = stabkit.tune(digits_mlp, forget, retain, test=held_out, **options)
    by_number = stabkit.tune(digits_mlp, forget, retain, forget_loss=loss, **options)
    found, expected = by_data.settings(), by_number.settings()
    assert found.pop("betas") == expected.pop("betas")
    assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"`forget_loss` of `tune` must be left out where `test` is given; got 1\.0"):
        stabkit.tune(digits_mlp, forget, retain, test=held_out, forget_loss=1.0)
    with pytest.raises(ValueError, match=r"`test` of `tune` must hold no sample of `forget`; they share"):
        stabkit.tune(digits_mlp, forget, retain, test=forget)


@pytest.mark.parametrize("decay", [0.0, 5e-4])
def test_a_damped_network_is_linearised_as_the_first_one_was(digits_cnn, class_deletion, monkeypatch, decay):
    algorithm = stabkit.GradDiff(lr=0.05, mix=0.5, steps=20, weight_decay=decay)
    asked, paces = [], []

    def noted(problem, preconditioner, **settings):
        paces.append(settings["paces"])
        asked.append({**settings, "landmarks": len(settings["landmarks"]), "paces": None})
        return linearise(problem, preconditioner, **settings)

    monkeypatch.setattr(importlib.import_module("stabkit.measure"), "linearise", noted)
    report = stabkit.predict(digits_cnn, *class_deletion, mode="fast", algorithm=algorithm)
    assert len(asked) == 1
    report.recommend()
    assert len(asked) > 1
    assert all(settings == asked[0] for settings in asked)
    assert paces[0] is None
    assert all(float(damped.min()) < float(damped.max()) for damped in paces[1:])
    assert asked[0]["sketch_samples"] == MODES["fast"].sketch_samples
    assert asked[0]["landmarks"] == bool(algorithm.weight_decay)


def test_the_layers_that_move_most_are_damped(digits_cnn, class_deletion):
    """One layer alone holds the network's movement; a smaller step for it is tried, and measured anew."""
    report = stabkit.predict(digits_cnn, *class_deletion, lr=0.05, mix=0.5, **QUICK)
    (item,) = (i for i in report.recommend().items if i.remedy == "layer damping")
    layers = set(item.changes["layer_lr"])
    shares = {share.name: share.share for share in report.cause.displacement_layers}
    assert sum(shares[layer] for layer in layers) >= 0.8
    assert set(item.changes["layer_lr"].values()) <= {0.3, 0.1}
    assert item.forget_loss < report.rollout.forget_loss[-1] or item.holds
    again = report.at(**item.changes)
    assert again.rollout.probability == pytest.approx(item.probability, abs=1e-3)
