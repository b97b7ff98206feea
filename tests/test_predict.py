"""`predict` as a user calls it: the verdict, what it leaves alone, every form of model and data, every error."""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stabkit
import stabkit.judge
from stabkit.algorithms import GradDiff
from stabkit.curvature import linearise
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from tests.cases import CASES, Output

QUICK = {"rank": 20, "retain_samples": 96, "forget_samples": 48, "spectrum_samples": 96, "seeds": 2, "steps": 30}
SMALL = {"rank": 6, "seeds": 2, "steps": 8, "batch_size": 4}
NAN = float("nan")
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 4, generator=G), torch.arange(40) % 3
FORGET, RETAIN = (X[:10], Y[:10]), (X[10:], Y[10:])

untrained = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
unsure = pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")


def state(model):
    """Everything about a model and the random generators that a call could change."""
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
    }


def same(left, right):
    tensors = all(torch.equal(left["tensors"][k], right["tensors"][k]) for k in left["tensors"])
    grads = all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(left["grads"], right["grads"], strict=True)
    )
    rest = all(left[k] == right[k] for k in ("modes", "flags", "hooks", "python"))
    return (
        tensors
        and grads
        and rest
        and torch.equal(left["torch"], right["torch"])
        and (left["numpy"] == right["numpy"]).all()
    )


def working_tree():
    root = Path(__file__).parent.parent
    shown = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    return shown.returncode, shown.stdout


# ------------------------------------------------------------------ the verdict


@pytest.mark.parametrize("algorithm", ["graddiff", "agu"])
def test_far_below_the_critical_step_is_stable_and_far_above_diverges(digits_mlp, class_deletion, algorithm):
    report = stabkit.predict(digits_mlp, *class_deletion, algorithm=algorithm, mix=0.5, **QUICK)
    assert report.critical_lr_detail.found
    safe, unsafe = report.at(lr=report.critical_lr / 10), report.at(lr=report.critical_lr * 10)
    assert (safe.verdict, unsafe.verdict) == ("stable", "diverges")
    assert safe.probability < 0.25 < 0.75 < unsafe.probability
    assert safe.divergence_step is None
    assert 1 <= unsafe.divergence_step <= 30
    assert safe.critical_lr == unsafe.critical_lr == report.critical_lr
    assert report.critical_lr_detail.low <= report.critical_lr <= report.critical_lr_detail.high


def test_at_the_critical_mix_the_verdict_turns(digits_mlp, class_deletion):
    report = stabkit.predict(digits_mlp, *class_deletion, lr=0.05, mix=0.1, **QUICK)
    assert 0 < report.critical_mix < 1
    assert report.at(mix=report.critical_mix).probability >= 0.5
    assert report.at(mix=0.9 * report.critical_mix_detail.low).probability < 0.5


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")  # of steps near the boundary
@pytest.mark.parametrize("changes", [{"lr": 0.3}, {"mix": 0.7}, {"steps": 12}, {"batch_size": 8}, {"momentum": 0.5}])
def test_asking_again_is_predicting_again(digits_mlp, class_deletion, changes):
    settings = {**QUICK, "lr": 0.03, "mix": 0.3, "batch_size": 32}
    asked = stabkit.predict(digits_mlp, *class_deletion, **settings).at(**changes)
    fresh = stabkit.predict(digits_mlp, *class_deletion, **{**settings, **changes})
    left, right = ({k: v for k, v in r.to_dict().items() if k != "costs"} for r in (asked, fresh))
    guessed = {"critical_lr", "critical_lr_detail"}  # scanned from another first guess where no 2/λ gives one
    assert {k: v for k, v in left.items() if k not in guessed} == {k: v for k, v in right.items() if k not in guessed}
    assert asked.critical_lr == pytest.approx(fresh.critical_lr, rel=0.1)


def test_the_same_seed_gives_the_same_report_and_another_one_another(digits_mlp, class_deletion):
    reports = [stabkit.predict(digits_mlp, *class_deletion, lr=0.1, seed=s, **QUICK).to_dict() for s in (3, 3, 4)]
    for report in reports:
        report.pop("costs")
    assert reports[0] == reports[1]
    assert reports[0]["rollout"] != reports[2]["rollout"]


def test_costs_are_stated_stage_by_stage(digits_mlp, class_deletion):
    report = stabkit.predict(digits_mlp, *class_deletion, algorithm="agu", lr=0.1, **QUICK)
    costs = {c.stage: c.gradient_equivalents for c in report.costs}
    assert list(costs) == [
        "checking the problem",
        "preconditioner",
        "spectrum",
        "linearisation",
        "coherence",
        "layer exponents",
        "rollouts and theory",
        "staged rollouts",
    ]
    # Losses at θ*, and the gradients of four samples that show whether the loss depends on all parameters.
    assert costs["checking the problem"] == sum(min(512, len(y)) for _, y in class_deletion) / 3 + 4
    assert costs["preconditioner"] == len(class_deletion[0][1])
    assert costs["linearisation"] == pytest.approx(2 * 10 * (96 + 48), rel=0.6)
    assert all(c.seconds >= 0 for c in report.costs)


@unsure
@pytest.mark.parametrize("what", ["errors_below", "linearisation_errors", "change_checks"])
def test_seconds_of_looks_and_checks_are_told(digits_mlp, class_deletion, monkeypatch, what):
    """Which need no gradient, or few, but take a part of the time."""
    wrapped = getattr(stabkit.judge, what)

    def slow(*given, **named):
        time.sleep(2)
        return wrapped(*given, **named)

    monkeypatch.setattr(stabkit.judge, what, slow)
    start = time.perf_counter()
    report = stabkit.predict(digits_mlp, *class_deletion, lr=0.1, mode="fast", **QUICK)
    taken, told = time.perf_counter() - start, sum(cost.seconds for cost in report.costs)
    assert taken - 1 < told <= taken


# ------------------------------------------------------------------ what is left alone


@unsure
@pytest.mark.filterwarnings("ignore::stabkit.ExponentWarning")
def test_model_data_random_state_and_files_are_left_alone(
    digits_mlp, class_deletion, digits_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tree = working_tree()
    digits_mlp[1].weight.grad = torch.ones_like(digits_mlp[1].weight)
    handle = digits_mlp[1].register_forward_hook(lambda module, arguments, output: None)
    data = [t.clone() for pair in class_deletion for t in pair]
    before = state(digits_mlp)
    report = stabkit.predict(digits_mlp, *class_deletion, algorithm="sragu", lr=0.1, **QUICK)
    assert same(state(digits_mlp), before)
    report.frontier(lr=[0.01, 0.1], mix=[0.2, 0.8])
    report.at(lr=0.2)
    report.summary()
    assert same(state(digits_mlp), before)
    stabkit.verify(report, digits_mlp, *class_deletion, test=(digits_data.x_test, digits_data.y_test))
    after = state(digits_mlp)
    handle.remove()
    digits_mlp[1].weight.grad = None
    assert same(after, before)
    assert all(torch.equal(a, b) for a, b in zip(data, [t for pair in class_deletion for t in pair], strict=True))
    assert list(tmp_path.iterdir()) == []
    assert working_tree() == tree


# ------------------------------------------------------------------ models and data of every form


@untrained
@unsure
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("algorithm", ["graddiff", "agu"])
def test_every_kind_of_model_gets_a_report(case, algorithm):
    problem = case.problem()
    sets = []
    for samples in (problem.forget, problem.retain):
        inputs, targets = samples.batch(torch.arange(samples.size))
        sets.append({**inputs, "labels": targets} if isinstance(inputs, dict) else (inputs, targets))
    report = stabkit.predict(
        problem.new_model(), *sets, loss=problem.loss, algorithm=algorithm, lr=0.01, mix=0.3, **SMALL
    )
    assert report.verdict in {"stable", "marginal", "diverges"}
    assert 0 <= report.probability <= 1
    assert report.run.parameters == problem.size
    assert math.isfinite(report.thresholds.largest)
    t = report.thresholds
    assert 0 < t.lyapunov_error < 0.05
    assert t.lyapunov <= math.log(t.radius) / 2 + 5 * t.lyapunov_error
    assert sum(s.share for s in report.cause.eigenvector_layers) == pytest.approx(1)
    assert "BatchNorm frozen" in report.summary()
    checked = stabkit.verify(report, problem.new_model(), *sets, loss=problem.loss)
    assert checked.runs[0].place == "asked"


@untrained
@unsure
def test_every_form_of_data_gives_the_same_report():
    model = MLP(4, 3, hidden=(8,))
    forget, retain = TensorDataset(*FORGET), TensorDataset(*RETAIN)
    forms = [
        (FORGET, RETAIN),
        (forget, retain),
        (DataLoader(forget, batch_size=3), DataLoader(retain, batch_size=7)),
        ([(X[:5], Y[:5]), (X[5:10], Y[5:10])], [RETAIN]),
    ]
    reports = [stabkit.predict(model, f, r, lr=0.1, **SMALL).to_dict() for f, r in forms]
    for report in reports:
        report.pop("costs")
        assert report == reports[0]


class Tripled(stabkit.Algorithm):
    """A user's own algorithm: three times the step on the first half of the parameters."""

    name = "tripled"

    def preconditioner(self, problem):
        scale = torch.ones(problem.size, dtype=problem.dtype)
        scale[: problem.size // 2] = 3.0
        return Diagonal(scale)


@unsure
def test_a_users_own_algorithm_is_predicted_and_verified_unchanged(digits_mlp, class_deletion):
    report = stabkit.predict(digits_mlp, *class_deletion, algorithm=Tripled(lr=0.02, mix=0.4), **QUICK)
    assert report.run.algorithm == "tripled"
    plain = stabkit.predict(digits_mlp, *class_deletion, lr=0.02, mix=0.4, **QUICK)
    assert report.thresholds.largest > 1.01 * plain.thresholds.largest
    with pytest.raises(
        ValueError, match="`algorithm` of `verify` must be given, as the report's 'tripled' is of a class"
    ):
        stabkit.verify(report, digits_mlp, *class_deletion)
    checked = stabkit.verify(report, digits_mlp, *class_deletion, algorithm=Tripled())
    assert checked.algorithm == "tripled"
    assert checked.runs[0].lr == 0.02


class Warming(stabkit.Algorithm):
    """A preconditioner that depends on the mix, and says so."""

    name = "warming"
    preconditioner_reads = frozenset({"mix"})

    def preconditioner(self, problem):
        return Diagonal(torch.full((problem.size,), 1 + 9 * self.mix, dtype=problem.dtype))


class Silent(Warming):
    """The same, which does not say so."""

    preconditioner_reads = frozenset()


@unsure
@pytest.mark.parametrize("kind", [Warming, Silent])
def test_a_preconditioner_that_reads_a_setting_is_computed_anew(digits_mlp, class_deletion, kind):
    report = stabkit.predict(digits_mlp, *class_deletion, algorithm=kind(lr=0.02, mix=0.1), **QUICK)
    fresh = stabkit.predict(digits_mlp, *class_deletion, algorithm=kind(lr=0.02, mix=0.6), **QUICK)
    assert report.at(mix=0.6).thresholds == fresh.thresholds
    assert report.at(lr=0.04).thresholds.largest == report.thresholds.largest


@dataclass
class Loss:
    """A callable with its own name."""

    __name__ = "half_squared"

    def __call__(self, outputs, targets):
        return (outputs - targets).square().sum(1) / 2


@untrained
@unsure
def test_a_callable_loss_is_named_and_asked_for_again():
    model, targets = MLP(4, 2, hidden=(8,)), torch.randn(40, 2, generator=G)
    sets = (X[:10], targets[:10]), (X[10:], targets[10:])
    report = stabkit.predict(model, *sets, loss=Loss(), lr=0.01, **SMALL)
    assert report.run.loss == "half_squared"
    with pytest.raises(
        ValueError, match="`loss` of `verify` must be given, as the report's 'half_squared' is a callable"
    ):
        stabkit.verify(report, model, *sets)
    assert stabkit.verify(report, model, *sets, loss=Loss()).runs[0].accuracies.retain is None


@unsure
def test_a_progress_bar_goes_to_stderr(digits_mlp, class_deletion, capfd):
    stabkit.predict(digits_mlp, *class_deletion, lr=0.1, **QUICK)
    silent = capfd.readouterr()
    assert (silent.out, silent.err) == ("", "")
    stabkit.predict(digits_mlp, *class_deletion, lr=0.1, progress=True, **QUICK)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "measure" in shown.err


def test_a_prediction_in_too_few_directions_says_so(digits_mlp, class_deletion):
    settings = {**QUICK, "rank": 1, "mode": "standard"}
    with pytest.warns(
        stabkit.LowConfidenceWarning, match=r"sensitivity .* at least 0.5 is wanted \(.*raise `rank`"
    ) as caught:
        report = stabkit.predict(digits_mlp, *class_deletion, lr=1e-4, **settings)
    assert report.confidence == "low"
    check = {c.name: c for c in report.checks}["captured output sensitivity"]
    assert not check.passed
    assert check.value < check.threshold
    with pytest.warns(stabkit.LowConfidenceWarning, match="raise `rank`") as again:
        report.at(lr=2e-4)
    assert {w.filename for w in (*caught, *again)} == {__file__}  # the caller's line, not the library's


def test_a_prediction_that_depends_on_its_size_says_so(digits_mlp, random_deletion):
    """Near the boundary a few samples of each set say another thing than more of them; all of them leave nothing to ask."""
    # In double precision, as settings side by side are rounded otherwise than alone.
    settings = {**QUICK, "rank": 40, "lr": 0.45, "mix": 0.3, "mode": "standard", "dtype": torch.float64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stabkit.StabkitWarning)
        few = stabkit.predict(digits_mlp, *random_deletion, **{**settings, "retain_samples": 40, "forget_samples": 20})
        every = stabkit.predict(
            digits_mlp, *random_deletion, **{**settings, "retain_samples": "all", "forget_samples": "all"}
        )
    problem = stabkit.UnlearningProblem(digits_mlp, *random_deletion, dtype=torch.float64)
    algorithm = GradDiff(steps=30, lr=0.45, mix=0.3)
    network = linearise(problem, Identity(), rank=40, retain_samples=40, forget_samples=20, seed=0)

    def said(other):
        sizes = algorithm.batch_sizes(problem)
        return float(rollout(other, algorithm, lr=[0.45], mix=[0.3], batch_sizes=sizes, seeds=[0, 1]).probability[0])

    whole = said(network)
    assert few.rollout.probability == pytest.approx(whole)
    for name, other in (("rank", network.thinned(rank=20)), ("samples", network.thinned(samples=0.5))):
        unsure, sure = ({c.name: c for c in report.checks}[f"change with half the {name}"] for report in (few, every))
        assert unsure.value == pytest.approx(abs(said(other) - whole))
        assert unsure.value > 0
        assert (sure.value == 0) == (name == "samples")


class Masked(nn.Module):
    """Control flow that depends on values, as attention masks bring it; no batching transform passes it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x) if float(x.detach().abs().max()) > -1 else self.layers(-x)


class Recurrent(nn.Module):
    """Single-precision recurrent kernels have neither forward mode nor a batching rule."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.recurrent(x.reshape(-1, 2, 2))[0][:, -1])


@untrained
@unsure
@pytest.mark.filterwarnings("ignore::stabkit.FallbackWarning")
@pytest.mark.parametrize("algorithm", ["graddiff", "agu"])
@pytest.mark.parametrize("model", [Masked, Recurrent])
@pytest.mark.parametrize("rank", [2, 30])
def test_models_that_cannot_be_batched_go_sample_by_sample(algorithm, model, rank):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = model()
    report = stabkit.predict(net, FORGET, RETAIN, algorithm=algorithm, lr=0.1, **{**SMALL, "rank": rank})
    assert 0 <= report.probability <= 1
    if model is Masked:  # the same network without the question
        plain = stabkit.predict(net.layers, FORGET, RETAIN, algorithm=algorithm, lr=0.1, **{**SMALL, "rank": rank})
        assert report.probability == pytest.approx(plain.probability, rel=1e-3)
        assert report.thresholds.largest == pytest.approx(plain.thresholds.largest, rel=1e-3)


def test_a_model_past_the_level_is_said_to_diverge_at_once():
    model = MLP(4, 3, hidden=(5,), seed=3)
    with torch.no_grad():
        model[-1].weight.mul_(30)
    with pytest.warns(stabkit.UntrainedModelWarning):
        report = stabkit.predict(model, FORGET, RETAIN, lr=0.01, **SMALL)
    assert (report.verdict, report.divergence_step) == ("diverges", 0)
    assert report.probability > 0.99
    assert report.advice[0].startswith("No step size down to")
    with pytest.warns(stabkit.UntrainedModelWarning):
        checked = stabkit.verify(report, model, FORGET, RETAIN)
    assert [(r.place, r.hit) for r in checked.runs] == [("asked", True)]


def test_the_default_dtype_of_the_session_changes_nothing(digits_mlp, class_deletion):
    plain = stabkit.predict(digits_mlp, *class_deletion, lr=0.05, **QUICK).to_dict()
    torch.set_default_dtype(torch.float64)
    try:
        other = stabkit.predict(digits_mlp, *class_deletion, lr=0.05, **QUICK).to_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for report in (plain, other):
        report.pop("costs")
    assert plain == other


@untrained
def test_a_retain_set_of_one_class_is_held_against_guessing():
    y = torch.cat([torch.ones(10), torch.zeros(30)]).long()
    problem = UnlearningProblem(MLP(4, 2, hidden=(5,)), (X[:10], y[:10]), (X[10:], y[10:]))
    assert problem.divergence_level == pytest.approx(math.log(2))


# ------------------------------------------------------------------ errors


def scalar_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


def model_with(value):
    model = MLP(4, 3, hidden=(5,))
    with torch.no_grad():
        model[1].weight[0] = value
    return model


BROKEN = X.clone()
BROKEN[12, 1] = NAN


@untrained
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"forget": (X[:0], Y[:0])}, ValueError, "`forget` must hold at least one sample; got an empty set"),
        ({"retain": (X[:0], Y[:0])}, ValueError, "`retain` must hold at least one sample; got an empty set"),
        ({"forget": RETAIN}, ValueError, "`forget` and `retain` must not overlap; they share 30 samples"),
        (
            {"batch_size": 31},
            ValueError,
            "`batch_size` of `GradDiff` must be at most the retain set's 30 samples; got 31",
        ),
        ({"forget_batch_size": 11}, ValueError, "`forget_batch_size` .* at most the forget set's 10 samples; got 11"),
        ({"forget": (X[:10], Y[:10] + 7)}, ValueError, r"targets of `forget` must be in \[0, 2\].*got"),
        ({"forget": (X[:10], Y[:10].float())}, TypeError, "targets of `forget` must be integer.*got torch.float32"),
        ({"retain": (BROKEN[10:], Y[10:])}, ValueError, "inputs of `retain` must be finite; got 1 NaN"),
        ({"model": model_with(NAN)}, ValueError, "must have finite weights; '1.weight' holds NaN"),
        ({"model": MLP(4, 3).requires_grad_(False)}, ValueError, "must have a trainable parameter"),
        ({"loss": scalar_loss}, ValueError, r"'scalar_loss' returned shape \(\)"),
        ({"lr": 0.0}, ValueError, "`lr` of `GradDiff` .*; got 0"),
        ({"lr": NAN}, ValueError, "`lr` of `GradDiff` .*got nan"),
        ({"mix": 1.4}, ValueError, r"`mix` of `GradDiff` must be .*\[0, 1\]; got 1.4"),
        ({"steps": 0}, ValueError, "`steps` of `GradDiff` must be a whole number >= 1; got 0"),
        ({"algorithm": "gradif"}, ValueError, "`algorithm` .*got 'gradif'. Did you mean 'graddiff'"),
        ({"algorithm": 3}, TypeError, "`algorithm` of `predict` must be a name or an Algorithm object; got 3"),
        ({"sampling": "poison"}, ValueError, "`sampling` .*got 'poison'. Did you mean 'poisson'"),
        ({"momentum": 1.0}, ValueError, r"`momentum` of `GradDiff` must be .*\[0, 1\); got 1"),
        ({"curvature": "fisher"}, ValueError, "`curvature` of `predict` must be one of 'ggn', 'hessian'; got 'fisher'"),
        ({"batchnorm": "train"}, ValueError, "`batchnorm` .*got 'train'"),
        ({"mode": "careful"}, ValueError, "`mode` of `predict` must be one of .*; got 'careful'"),
        ({"mode": "fast", "budget": 10}, ValueError, "`budget` of `predict` must be left out with mode='fast'.*got 10"),
        ({"mode": "auto", "budget": "soon"}, ValueError, "`budget` of `predict` must be .*; got 'soon'"),
        ({"mode": "auto", "budget": "-3s"}, ValueError, "`budget` of `predict` must be .*; got '-3s'"),
        ({"mode": "auto", "budget": -3}, ValueError, "`budget` of `predict` must be .*; got -3"),
        ({"rank": "all"}, ValueError, "`rank` of `predict` must be one of 'auto'; got 'all'"),
        ({"retain_samples": "auto"}, ValueError, "`retain_samples` of `predict` must be one of 'all'; got 'auto'"),
        ({"rank": 0}, ValueError, "`rank` of `predict` must be a whole number >= 1; got 0"),
        ({"seeds": 0}, ValueError, "`seeds` of `predict` must be a whole number >= 1; got 0"),
        ({"seed": -1}, ValueError, "`seed` of `predict` must be a whole number >= 0; got -1"),
        ({"retain_samples": 0}, ValueError, "`retain_samples` of `predict` must be a whole number >= 1; got 0"),
        ({"forget_samples": -2}, ValueError, "`forget_samples` of `predict` must be a whole number >= 1; got -2"),
        ({"spectrum_samples": 0.5}, TypeError, "`spectrum_samples` of `predict` must be a whole number >= 1; got 0.5"),
    ],
)
def test_what_is_wrong_is_said(arguments, error, message):
    call = {"model": MLP(4, 3, hidden=(5,)), "forget": FORGET, "retain": RETAIN, "batch_size": 5, **arguments}
    with pytest.raises(error, match=message):
        stabkit.predict(call.pop("model"), call.pop("forget"), call.pop("retain"), **call)


class Noisy(nn.Module):
    """BatchNorm and Dropout, in train mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, x):
        return Output(self.layers(x))


@untrained
@unsure
def test_train_mode_is_told_and_frozen():
    model = Noisy().train()
    with (
        pytest.warns(stabkit.TrainModeWarning, match="BatchNorm"),
        pytest.warns(stabkit.TrainModeWarning, match="switch dropout off"),
    ):
        report = stabkit.predict(model, FORGET, RETAIN, lr=0.01, **SMALL)
    still = stabkit.predict(model.eval(), FORGET, RETAIN, lr=0.01, **SMALL)
    assert report.probability == still.probability
    assert report.run.batchnorm == "frozen"


@untrained
def test_the_divergence_level_is_the_best_constant(digits_mlp, random_deletion):
    report = stabkit.predict(digits_mlp, *random_deletion, lr=1e-3, **QUICK)
    counts = torch.bincount(random_deletion[1][1]).double()
    shares = counts / counts.sum()
    assert report.run.divergence_level == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-6)
    assert report.run.retain_loss == pytest.approx(UnlearningProblem(digits_mlp, *random_deletion).retain_loss)


def test_weight_decay_and_nesterov_enter_the_prediction(digits_mlp, random_deletion):
    options = {"lr": 0.05, "mix": 0.2, **QUICK, "mode": "standard"}
    plain = stabkit.predict(digits_mlp, *random_deletion, **options)
    decayed = plain.at(weight_decay=0.5)
    assert decayed.thresholds.largest == pytest.approx(plain.thresholds.largest + 0.5, rel=1e-6)
    assert decayed.thresholds.smallest == pytest.approx(plain.thresholds.smallest + 0.5, abs=1e-5)
    assert decayed.thresholds.radius < plain.thresholds.radius
    again = stabkit.predict(digits_mlp, *random_deletion, weight_decay=0.5, **options)
    assert again.thresholds == decayed.thresholds
    assert again.probability == decayed.probability
    heavy = plain.at(momentum=0.9)
    looking = heavy.at(nesterov=True)
    assert heavy.thresholds.step_limit == pytest.approx(1.9 * plain.thresholds.step_limit)
    assert looking.thresholds.step_limit == pytest.approx(1.9 / 2.8 * plain.thresholds.step_limit)
    assert looking.probability != heavy.probability
    clipped = plain.at(max_gradient_norm=1e-6)
    assert clipped.probability < 0.01
    assert plain.at(lr_schedule="cosine").critical_lr > plain.critical_lr


def test_a_run_may_take_the_mask_that_its_prediction_made(digits_mlp, random_deletion, monkeypatch):
    """The same steps to the bit, and no gradient spent on the mask again; a report from a file has none to give."""
    from stabkit.algorithms import sfr_on

    algorithm = stabkit.SFROn(lr=0.02, steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stabkit.StabkitWarning)
        report = stabkit.predict(
            digits_mlp, *random_deletion, algorithm=algorithm, **{**QUICK, "steps": 12, "mode": "standard"}
        )
    problem = stabkit.UnlearningProblem(digits_mlp, *random_deletion)
    own = stabkit.run(problem, algorithm, seed=3)
    assert not bool(report.preconditioner.forget_mask.all())
    computed = []
    monkeypatch.setattr(sfr_on, "fisher_diagonal", lambda *_, **__: computed.append(1))
    given = stabkit.run(problem, algorithm, seed=3, preconditioner=report.preconditioner)
    assert not computed
    assert given.trajectory == own.trajectory
    assert all(torch.equal(a, b) for a, b in zip(given.model.parameters(), own.model.parameters(), strict=True))
    assert report.at(lr=0.01).preconditioner is report.preconditioner
    for copy in (pickle.loads(pickle.dumps(report)), stabkit.Report.from_json(report.to_json())):
        with pytest.raises(RuntimeError, match=r"`preconditioner` of `Report` needs what was measured"):
            _ = copy.preconditioner


def test_the_looks_are_those_that_are_asked_for(digits_mlp, random_deletion):
    """In the prediction, in the runs that verify it, and in any other run of such a problem."""
    settings = {**QUICK, "mode": "standard", "lr": 0.3, "mix": 0.3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stabkit.StabkitWarning)
        every, tenth = (stabkit.predict(digits_mlp, *random_deletion, check_every=k, **settings) for k in (1, 10))
    assert every.rollout.steps == tuple(range(31))
    assert tenth.rollout.steps == (*range(11), 20, 30)
    assert (every.run.check_every, tenth.run.check_every) == (1, 10)
    assert every.critical_lr <= tenth.critical_lr  # who looks more often misses nothing that the other one sees
    assert "looked at after every step" in str(every)
    assert "looked at after each of the first 10 steps and every 10 steps" in str(tenth)
    check = stabkit.verify(every, digits_mlp, *random_deletion)
    assert {r.steps for r in check.runs if not r.diverged} == {tuple(range(31))}
    problem = stabkit.UnlearningProblem(digits_mlp, *random_deletion, check_every=7)
    algorithm = GradDiff(lr=0.01, mix=0.3, steps=30)
    run = stabkit.run(problem, algorithm)
    assert [c.step for c in run.trajectory] == [*range(8), 14, 21, 28, 30]
    assert run.trajectory == stabkit.run(problem, algorithm, check_every=7).trajectory
    assert len(stabkit.run(problem, algorithm, check_every=1).trajectory) == 31
    with pytest.raises(ValueError, match=r"`check_every` of `UnlearningProblem` must be .*; got 0"):
        stabkit.UnlearningProblem(digits_mlp, *random_deletion, check_every=0)


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_a_spike_between_two_looks_is_seen_by_who_looks_at_every_step():
    """One forget step throws a linear model past the level, and the retain step after it brings it back."""
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(8, 1)
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    sets = (torch.ones(4, 1, dtype=torch.float64), -torch.ones(4, 1, dtype=torch.float64)), (x, x.clone())
    algorithm = GradDiff(
        lr=1.0, mix=0.5, steps=20, batch_size=16, forget_batch_size=4, forget_schedule=(0.0,) * 14 + (1.0,) + (0.0,) * 5
    )
    for every, seen in ((1, True), (10, False)):
        problem = stabkit.UnlearningProblem(model, *sets, loss="mse", check_every=every)
        assert problem.divergence_level == pytest.approx(1.0)
        real = stabkit.run(problem, algorithm)
        report = stabkit.predict(model, *sets, loss="mse", algorithm=algorithm, check_every=every, mode="standard")
        assert real.diverged == seen
        assert (report.rollout.probability > 0.5) == seen
        assert report.divergence_step == real.divergence_step == (15 if seen else None)
