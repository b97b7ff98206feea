"""`verify` runs what was predicted, for real, and says who was right."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import stabkit
from stabkit.metrics import accuracies
from stabkit.models import MLP
from stabkit.problem import UnlearningProblem
from stabkit.runner import run

QUICK = {"rank": 20, "retain_samples": 96, "forget_samples": 48, "spectrum_samples": 96, "seeds": 2, "steps": 30}


@pytest.fixture(scope="module")
def sets(request):
    return request.getfixturevalue("class_deletion")


@pytest.fixture(scope="module")
def report(request, sets):
    model = request.getfixturevalue("digits_mlp")
    return stabkit.predict(model, *sets, algorithm="graddiff", lr=0.01, mix=0.5, **QUICK)


@pytest.fixture(scope="module")
def held_out(request):
    data = request.getfixturevalue("digits_data")
    return data.x_test, data.y_test


@pytest.fixture(scope="module")
def checked(request, report, sets, held_out):
    return stabkit.verify(report, request.getfixturevalue("digits_mlp"), *sets, test=held_out, repeats=2)


def test_it_runs_at_below_and_above_the_critical_step(report, checked):
    steps = {r.place: r.lr for r in checked.runs}
    assert list(steps) == ["asked", "below", "at", "above"]
    assert steps["asked"] == 0.01
    assert [steps[p] / report.critical_lr for p in ("below", "at", "above")] == pytest.approx([1 / 3, 1, 3])
    assert {(r.place, r.seed) for r in checked.runs} == {(p, 10_000 + i) for p in steps for i in (0, 1)}
    predicted = {r.place: r.predicted for r in checked.runs}
    assert predicted["below"] is False
    assert predicted["above"] is True
    assert predicted["at"] is None


def test_every_outcome_is_that_of_the_real_run(digits_mlp, sets, held_out, checked, report):
    problem = UnlearningProblem(digits_mlp, *sets, test=held_out)
    for row in checked.runs:
        real = run(problem, stabkit.GradDiff(lr=row.lr, mix=0.5, steps=30), seed=row.seed)
        assert (row.diverged, row.divergence_step) == (real.diverged, real.divergence_step)
        assert row.accuracies == accuracies(problem, real.model)
        assert list(row.steps) == [c.step for c in real.trajectory]
        assert row.hit is (None if row.predicted is None else row.predicted == real.diverged)
    assert {r.diverged for r in checked.runs} == {True, False}
    assert checked.before == accuracies(problem, digits_mlp)
    assert checked.before.test > 0.85


def test_the_hit_rate_counts_predictions_alone(checked):
    counted = [r for r in checked.runs if r.predicted is not None]
    assert checked.hit_rate == sum(r.predicted == r.diverged for r in counted) / len(counted)
    flipped = tuple(dataclasses.replace(r, diverged=not r.diverged) for r in checked.runs)
    assert dataclasses.replace(checked, runs=flipped).hit_rate == pytest.approx(1 - checked.hit_rate)
    edges = tuple(r for r in checked.runs if r.predicted is None)
    assert dataclasses.replace(checked, runs=edges).hit_rate is None


def test_the_table_shows_prediction_beside_outcome(checked):
    text = str(checked)
    for word in ("asked", "below", "at", "above", "before", "RA", "FA", "TA", "edge", "predictions right"):
        assert word in text
    lines = [line for line in text.splitlines() if line.startswith("above")]
    assert len(lines) == 2
    assert all("diverged at" in line for line in lines)
    html = checked._repr_html_()
    assert "<table" in html
    assert "diverged at" in html


def test_a_retrained_model_stands_beside_it(digits_mlp, sets, report, held_out):
    gold = MLP(64, 10, hidden=(24,), seed=5)
    checked = stabkit.verify(report, digits_mlp, *sets, gold=gold, test=held_out)
    problem = UnlearningProblem(digits_mlp, *sets, test=held_out)
    assert checked.gold == accuracies(problem, gold)
    assert "retrained" in str(checked)


def test_without_a_critical_step_only_the_asked_run_is_made(digits_mlp, sets, report):
    unbounded = dataclasses.replace(report, critical_lr=math.inf)
    assert [r.place for r in stabkit.verify(unbounded, digits_mlp, *sets).runs] == ["asked"]


def test_another_algorithm_is_refused(digits_mlp, sets, report):
    with pytest.raises(ValueError, match=r"must be the object that was predicted, a 'graddiff'; got 'agu'"):
        stabkit.verify(report, digits_mlp, *sets, algorithm=stabkit.AGU())
    with pytest.raises(ValueError, match=r"must be the object that was predicted, a 'graddiff'; got 'graddiff'"):
        stabkit.verify(report, digits_mlp, *sets, algorithm="graddiff")


def test_a_marginal_verdict_is_not_counted(digits_mlp, sets, report):
    marginal = dataclasses.replace(report, verdict="marginal", critical_lr=math.inf)
    (only,) = stabkit.verify(marginal, digits_mlp, *sets).runs
    assert only.predicted is None


def test_a_report_from_a_file_can_be_verified(digits_mlp, sets, report, tmp_path):
    report.to_json(tmp_path / "report.json")
    loaded = stabkit.Report.from_json(tmp_path / "report.json")
    fresh, again = (stabkit.verify(r, digits_mlp, *sets) for r in (report, loaded))
    assert fresh.to_dict() == again.to_dict()


def test_written_json_holds_what_was_found(checked, tmp_path):
    text = checked.to_json(tmp_path / "verification.json")
    assert (tmp_path / "verification.json").read_text(encoding="utf-8") == text
    plain = json.loads(text)
    assert plain["hit_rate"] == checked.hit_rate
    assert len(plain["runs"]) == 8
    assert plain["runs"][0]["accuracies"]["retain"] == checked.runs[0].accuracies.retain


def test_the_plot_draws_every_run(checked):
    from matplotlib import pyplot as plt

    figure, ax = checked.plot()
    figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1  # beside the curves, and all of it drawn
    assert ax.get_legend().get_window_extent().x1 <= figure.bbox.x1
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sum(label.startswith("above, lr") for label in labels) == 2
    plt.close(figure)


def test_a_run_that_leaves_the_numbers_is_drawn_to_the_top(report):
    from matplotlib import pyplot as plt

    from stabkit.plots import plot_trajectories

    with plt.rc_context({"axes.prop_cycle": plt.cycler(color=plt.get_cmap("tab10").colors)}):  # tuples, not names
        figure, ax = plot_trajectories(report, [("broken", (0, 1, 2, 3), (0.1, 0.2, math.inf, math.nan))])
    broken = next(line for line in ax.get_lines() if line.get_label() == "broken")
    (arrow,) = (line for line in ax.get_lines() if line.get_marker() == "^")
    assert (arrow.get_xdata()[0], arrow.get_ydata()[0]) == (2, broken.get_ydata()[2])
    assert arrow.get_ydata()[0] > report.run.divergence_level
    figure.canvas.draw()
    plt.close(figure)


def other_model():
    return MLP(64, 10, hidden=(25,))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"factor": 1.0}, ValueError, "`factor` of `verify` .*; got 1"),
        ({"repeats": 0}, ValueError, "`repeats` of `verify` must be a whole number >= 1; got 0"),
        ({"seed": -3}, ValueError, "`seed` of `verify` must be a whole number >= 0; got -3"),
        ({"model": other_model()}, ValueError, "`model` of `verify` .* 1810 trainable parameters; got 1885"),
        (
            {"cut": "forget"},
            ValueError,
            r"`forget` of `verify` must be the one of the report, with \d+ samples; got 20",
        ),
        (
            {"cut": "retain"},
            ValueError,
            r"`retain` of `verify` must be the one of the report, with \d+ samples; got 200",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_what_does_not_belong_to_the_report_is_refused(digits_mlp, sets, report, arguments, error, message):
    forget, retain = sets
    cut = arguments.pop("cut", None)
    if cut == "forget":
        forget = tuple(t[:20] for t in forget)
    if cut == "retain":
        retain = tuple(t[:200] for t in retain)
    with pytest.raises(error, match=message):
        stabkit.verify(report, arguments.pop("model", digits_mlp), forget, retain, **arguments)


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_data_of_the_same_size_that_were_not_predicted_on_are_refused(digits_mlp, sets, report):
    forget, retain = sets
    swapped = retain[0], retain[1].roll(1)
    with pytest.raises(
        ValueError, match=r"`model` and `retain` of `verify` must be those of the report, whose retain loss"
    ):
        stabkit.verify(report, digits_mlp, forget, swapped)


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning", "ignore::stabkit.LowConfidenceWarning")
def test_a_retrained_model_keeps_its_own_statistics():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))

    def network(shift):
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).eval()
        with torch.no_grad():
            model[0].running_mean.fill_(shift)
            model[1].weight.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]))
            model[1].bias.zero_()
        return model

    labels = (x[:, 0] < 5).long()  # by the shifted statistics every sample is of class 1
    sets = (x[:20], labels[:20]), (x[20:], labels[20:])
    report = stabkit.predict(network(0.0), *sets, lr=0.01, rank=4, steps=3, batch_size=8)
    checked = stabkit.verify(report, network(0.0), *sets, gold=network(5.0))
    assert checked.gold.retain == 1.0
    assert checked.before.retain < 0.9


def test_random_state_is_left_alone(digits_mlp, sets, report):
    before = torch.get_rng_state()
    stabkit.verify(report, digits_mlp, *sets)
    assert torch.equal(torch.get_rng_state(), before)
