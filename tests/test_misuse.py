"""Mistakes that would give a wrong answer without a word: models that compute again, sets that overlap, softmax twice."""

from __future__ import annotations

import copy
import re
import warnings

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.checkpoint import checkpoint

import stabkit
from stabkit.algorithms import ALGORITHMS
from stabkit.curvature import linearise
from stabkit.data import as_samples
from stabkit.frontier import Outcome
from stabkit.modes import ROLLOUTS, STEP_SECONDS, THEORY_SECONDS
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.training import train

CPU = torch.device("cpu")
G = torch.Generator().manual_seed(0)
X = torch.randn(200, 6, generator=G)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5)
FORGET, RETAIN = (X[:40], Y[:40]), (X[40:], Y[40:])
SMALL = {"batch_size": 8, "steps": 20, "lr": 0.05, "seeds": 1, "mode": "fast"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return train(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), X, Y, epochs=20, lr=0.02)


class Recomputing(nn.Module):
    """Activation checkpointing around the first layers."""

    def __init__(self, inner, on=True):
        super().__init__()
        self.inner, self.on = copy.deepcopy(inner), on

    def forward(self, x):
        hidden = checkpoint(self.inner[:2], x, use_reentrant=False) if self.on else self.inner[:2](x)
        return self.inner[2](hidden)


def test_a_model_that_computes_again_in_its_backward_pass_is_refused(model):
    with pytest.raises(
        ValueError, match=r"`model` must not compute again in its backward pass.*off by 0\.\d+ of their"
    ):
        UnlearningProblem(Recomputing(model).eval(), FORGET, RETAIN)
    assert UnlearningProblem(Recomputing(model, on=False).eval(), FORGET, RETAIN).size == 163


def test_weights_read_through_another_reference_are_refused(model):
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)
            self.weights = [self.inner[2].weight]

        def forward(self, x):
            return self.inner[1](self.inner[0](x)) @ self.weights[0].T + self.inner[2].bias

    with pytest.raises(
        ValueError, match=r"must read its weights from its registered parameters: its outputs at .* are off"
    ):
        UnlearningProblem(Aliased().eval(), FORGET, RETAIN)


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_a_check_keeps_to_the_batches_that_memory_allows(model, monkeypatch):
    """Of a model with wide outputs few samples go through at once, here as everywhere."""
    seen = []

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.up = copy.deepcopy(model), nn.Linear(3, 40_000)

        def forward(self, x):
            seen.append(len(x))
            return self.up(self.inner(x))

    monkeypatch.setattr("stabkit.problem.problem.EVALUATION_BYTES", 2 * 40_000 * 4)
    UnlearningProblem(Wide().eval(), FORGET, RETAIN)
    assert max(seen) == 3  # what a first look takes of any model


@pytest.mark.parametrize("error", [ValueError, AssertionError, IndexError, KeyError])
def test_a_model_that_cannot_be_called_elsewhere_is_left_to_its_run(model, error):
    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = copy.deepcopy(model), nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            if float(self.scale.detach()) != 1.0:
                raise error("only as it was trained")
            return self.inner(x) * self.scale

    assert UnlearningProblem(Guarded().eval(), FORGET, RETAIN).size == 164


def test_forget_samples_that_are_retained_too_are_noticed_by_value(model):
    chosen = torch.arange(0, 200, 5)  # fancy indexing copies, so that nothing else tells
    with pytest.warns(
        stabkit.OverlapWarning, match="of 16 forget samples looked at, 16 are in the retain set too"
    ) as w:
        UnlearningProblem(model, (X[chosen], Y[chosen]), (X, Y))
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UnlearningProblem(model, FORGET, RETAIN)
        UnlearningProblem(model, (X[chosen], (Y[chosen] + 1) % 3), (X, Y))  # relabelled: not the same samples


def test_twins_are_rows_that_agree_in_everything():
    def samples(inputs, targets, name="forget"):
        return as_samples((inputs, targets), name=name, device=CPU, dtype=torch.float32)

    x, y = X[:10].clone(), torch.arange(10)
    other = x.clone()
    other[3, 0] += 1  # apart in one number that is not the middle one
    labels = y.clone()
    labels[4] = 0
    assert samples(x, y).twins(samples(x.clone(), y), 10) == 10
    assert samples(x, y).twins(samples(other, y), 10) == 9
    assert samples(x, y).twins(samples(other, labels), 10) == 8
    assert samples(x, y).twins(samples(x[:, :4], y), 10) == 0
    alike = torch.zeros(10, 100)  # rows that differ in one number that no first look takes
    alike[torch.arange(10), 1] = torch.arange(10.0)
    same = torch.zeros(10).long()
    assert samples(alike, same).twins(samples(alike[:4], same[:4]), 10) == 4
    assert samples(x, y).twins(samples(x[:2], y[:2]), 4) == 1  # of rows 0, 3, 6 and 9
    both = {"inputs": x, "mask": torch.ones(10, 2)}
    masked = {"inputs": x, "mask": torch.zeros(10, 2)}
    assert samples(both, y).twins(samples(both, y), 10) == 10
    assert samples(both, y).twins(samples(masked, y), 10) == 0


def test_probabilities_are_not_taken_for_logits(model):
    softened = nn.Sequential(*copy.deepcopy(list(model)), nn.Softmax(1)).eval()
    with pytest.warns(stabkit.ProbabilityWarning, match="seems to return probabilities"):
        UnlearningProblem(softened, FORGET, RETAIN)
    logarithms = nn.Sequential(*copy.deepcopy(list(model)), nn.LogSoftmax(1)).eval()
    plain = UnlearningProblem(model, FORGET, RETAIN)  # no warning is an error here
    assert UnlearningProblem(logarithms, FORGET, RETAIN).retain_loss == pytest.approx(plain.retain_loss, rel=1e-5)


def test_one_output_is_no_choice_of_classes():
    one = nn.Sequential(nn.Linear(6, 1))
    with pytest.raises(ValueError, match=r"as the model has 1 outputs; got [12]\. One output is no choice of classes"):
        UnlearningProblem(one, FORGET, RETAIN)


def test_rows_of_numbers_are_inputs(model):
    listed = UnlearningProblem(model, (X[:40].tolist(), Y[:40]), RETAIN)
    assert listed.forget_loss == UnlearningProblem(model, FORGET, RETAIN).forget_loss


def test_a_loss_without_a_second_derivative_is_named(model):
    with pytest.raises(ValueError, match=r"`loss` must be differentiable twice; got 'MultiMarginLoss'"):
        UnlearningProblem(model, FORGET, RETAIN, loss=nn.MultiMarginLoss(reduction="none"))


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
@pytest.mark.parametrize("mode", ["standard", "thorough"])
@pytest.mark.parametrize("name", [name for name, kind in ALGORITHMS.items() if kind.fixed_mix])
def test_algorithms_with_a_mix_of_their_own_have_no_critical_one(model, name, mode):
    report = stabkit.predict(model, FORGET, RETAIN, algorithm=name, **{**SMALL, "mode": mode, "lr": 2.0})
    detail = report.critical_mix_detail
    assert not detail.found
    assert detail.scanned == (detail.value, detail.value)
    assert report.fixed_mix
    # Nothing is said of what cannot be chosen, but in the list of settings and in words for the curvature.
    told = [line for line in report.summary().splitlines() if not line.lstrip().startswith(("algorithm ", "mixed σ"))]
    assert not re.search(r"\bmix\b", "\n".join(told))
    front = report.frontier()
    assert front.mix.tolist() == [detail.value]
    assert 0 <= front.probability.min() < front.probability.max() <= 1
    figure, axes = front.plot(outcomes=[Outcome(lr=2.0, mix=detail.value, diverged=True)])
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), front.probability[:, 0])
    assert "mix" not in f"{axes.get_xlabel()}{axes.get_title()}"
    plt.close(figure)
    with pytest.raises(ValueError, match=rf"`mix` of `Report.frontier` must be left out for '{name}'.*; got 0\.5"):
        report.frontier(mix=[0.5])


def test_a_rank_that_is_found_has_a_bound(model):
    problem = UnlearningProblem(model, FORGET, RETAIN)
    whole = linearise(problem, Identity(), rank=None, tolerance=0.0)
    assert whole.rank > 60
    assert linearise(problem, Identity(), rank=None, tolerance=0.0, max_rank=60).rank == 60
    assert linearise(problem, Identity(), rank=None, tolerance=0.0, max_rank=10).rank == 10
    assert linearise(problem, Identity(), rank=20, max_rank=10).rank == 20
    with pytest.raises(ValueError, match=r"`max_rank` of `linearise` .*got 0"):
        linearise(problem, Identity(), rank=None, max_rank=0)


def test_what_tune_is_given_is_checked_before_anything_is_measured(model):
    with pytest.raises(ValueError, match=r"`risk` of `tune` .*got 0"):
        stabkit.tune(model, FORGET, RETAIN, risk=0)
    with pytest.raises(TypeError, match=r"`tune` must be given what it or `predict` takes; got 'stepss'"):
        stabkit.tune(model, FORGET, RETAIN, stepss=3)


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_a_folder_is_no_file(model, tmp_path):
    report = stabkit.predict(model, FORGET, RETAIN, **SMALL)
    with pytest.raises(IsADirectoryError, match=f"`path` must name a file; got the folder '{tmp_path}'"):
        report.to_json(tmp_path)


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_seconds_of_what_no_gradient_is_in_are_told_before(model):
    few, many = (
        stabkit.predict_cost(model, FORGET, RETAIN, rank=rank, mode="standard", steps=20, batch_size=8)
        for rank in (20, 160)
    )
    # Of 20 steps on both sets, and of searches, whatever they compute.
    calls = ROLLOUTS * STEP_SECONDS * 20 * 2 + THEORY_SECONDS
    theory = [next(s for s in cost.stages if s.stage == "rollouts and theory").seconds - calls for cost in (few, many)]
    assert theory[1] > 20 * theory[0]
    assert few.gradient_equivalents == many.gradient_equivalents


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_one_loss_a_sample_may_stand_in_a_column():
    """As PyTorch's own losses return it of models with one output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    y = (Y > 1).float().unsqueeze(1)
    column = nn.BCEWithLogitsLoss(reduction="none")
    problems = [
        UnlearningProblem(model, (X[:40], y[:40]), (X[40:], y[40:]), loss=loss)
        for loss in (column, lambda o, t: column(o, t).squeeze(1))
    ]
    outputs, targets, block = torch.randn(5, 1), y[:5], torch.randn(5, 1, 3)
    for name, arguments in {
        "per_sample": (outputs, targets),
        "residual": (outputs, targets),
        "hessian_apply": (outputs, targets, block),
        "factor_transpose": (outputs, targets, block),
    }.items():
        first, second = (getattr(problem.loss, name)(*arguments) for problem in problems)
        torch.testing.assert_close(first, second)
    assert problems[0].retain_loss == problems[1].retain_loss
    assert problems[0].divergence_level == pytest.approx(problems[1].divergence_level)
    with pytest.raises(ValueError, match=r"one loss per sample, shape \(3,\); .* returned shape \(3, 3\)"):
        UnlearningProblem(
            nn.Linear(6, 3), (X[:40], X[:40, :3]), (X[40:], X[40:, :3]), loss=nn.MSELoss(reduction="none")
        )


def test_one_hot_labels_are_known(model):
    hot = nn.functional.one_hot(Y, 3)
    with pytest.raises(ValueError, match=r"One-hot labels are given as targets\.argmax\(1\)"):
        UnlearningProblem(model, (X[:40], hot[:40]), (X[40:], hot[40:]))
    problem = UnlearningProblem(model, (X[:40], hot[:40].argmax(1)), (X[40:], hot[40:].argmax(1)))
    assert problem.retain_loss == UnlearningProblem(model, FORGET, RETAIN).retain_loss


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
@pytest.mark.parametrize("positions", [4, 5])
def test_classes_that_may_lie_along_two_axes_are_told_of(positions):
    class Labeller(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.last = last
            self.layer = nn.Conv1d(1, 4, 3, padding=1)

        def forward(self, x):
            scores = self.layer(x)  # (m, classes, positions)
            return scores.movedim(1, -1) if self.last else scores

    torch.manual_seed(0)
    x = torch.randn(30, 1, positions)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 0] > 1).long()
    model = Labeller(last=False)
    sets = (x[:6], y[:6]), (x[6:], y[6:])
    right = float(nn.functional.cross_entropy(model(x[6:]), y[6:]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", stabkit.ClassAxisWarning)
        problem = UnlearningProblem(model, *sets)
        told = [w for w in told if issubclass(w.category, stabkit.ClassAxisWarning)]
    assert bool(told) == (positions == 4)
    assert all(w.filename == __file__ and "movedim(1, -1)" in str(w.message) for w in told)
    assert (problem.retain_loss == pytest.approx(right)) == (positions != 4)
    moved = Labeller(last=True)
    moved.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if positions == 4 else "error", stabkit.ClassAxisWarning)
        assert UnlearningProblem(moved, *sets).retain_loss == pytest.approx(right)


def test_empty_parameters_have_no_squares(model):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)
            self.down, self.up = nn.Parameter(torch.zeros(0, 6)), nn.Parameter(torch.zeros(3, 0))

        def forward(self, x):
            return self.inner(x) + x @ self.down.T @ self.up.T

    reports = [
        stabkit.predict(m, FORGET, RETAIN, algorithm="sfr_on", batch_size=8, steps=6, lr=0.01, seeds=1, mode="fast")
        for m in (model, Adapted())
    ]
    assert reports[0].probability == pytest.approx(reports[1].probability)
    assert reports[0].critical_lr == pytest.approx(reports[1].critical_lr, rel=1e-3)


def test_a_loss_by_an_unknown_name_may_be_a_callable(model):
    with pytest.raises(ValueError, match=r"got 'ce'\. A callable giving per-sample losses is taken too"):
        UnlearningProblem(model, FORGET, RETAIN, loss="ce")
    with pytest.raises(ValueError, match=r"got 'cross_entrop'\. Did you mean 'cross_entropy'\?"):
        UnlearningProblem(model, FORGET, RETAIN, loss="cross_entrop")
