"""What every registered algorithm owes: settings that survive, a semi-definite P, runs that repeat, and an exact rollout."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit._serialise import to_plain
from stabkit.algorithms import AGU, ALGORITHMS, SRAGU, Algorithm, GradDiff, L1Sparse, StepPlan, resolve_algorithm
from stabkit.curvature import linearise
from stabkit.directions import LowRank
from stabkit.judge import check_batches
from stabkit.preconditioner import Diagonal, Identity, Preconditioner, check_preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.runner import run
from stabkit.sampling import SAMPLINGS
from tests.cases import CASES
from tests.test_rollout import compare_to_run, linear_problem

pytestmark = [
    pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning"),
    pytest.mark.filterwarnings("ignore::stabkit.ExponentWarning"),
    pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning"),
]
every = pytest.mark.parametrize("kind", ALGORITHMS.values(), ids=list(ALGORITHMS))
ONE_SIDED = {"finetune", "ga", "l1_sparse"}  # their mix is fixed
FEW = {"sfr_on": {"fisher_samples": 64}, "remain_newton": {"rank": 3, "curvature_samples": 24}}  # as tests are quick
PAIRS = [  # random labels need classes
    pytest.param(kind, loss, id=f"{name}-{loss}")
    for name, kind in ALGORITHMS.items()
    for loss in ("mse", "cross_entropy")
    if loss == "cross_entropy" or name not in {"random_labels", "salun"}
]


def small(kind, **changes):
    """The algorithm on batches that small sets hold, with steps enough for each kind of them."""
    return kind(**{"steps": 14, "batch_size": 5, "forget_batch_size": 3, **FEW.get(kind.name, {}), **changes})


def final_vector(problem, result):
    own = dict(result.model.named_parameters())
    return torch.cat([own[name].detach().reshape(-1) for name in problem.parameters])


@every
def test_the_name_is_the_class(kind):
    assert resolve_algorithm(kind.name) == kind()
    assert kind.name == kind.name.lower()
    assert "rollout" in kind.__doc__ or kind.name in {"agu", "sragu", "ga", "graddiff", "finetune"}  # what is predicted


@every
def test_settings_survive_replacing_and_json(kind):
    algorithm = small(kind, lr=0.25, sampling="poisson", momentum=0.5, weight_decay=0.1, lr_schedule=[1.0] * 14)
    again = kind(**json.loads(json.dumps(to_plain(algorithm.settings()))))
    assert again == algorithm
    assert hash(again) == hash(algorithm)
    assert algorithm.replace() == algorithm
    changed = algorithm.replace(lr=0.5, nesterov=True)
    assert (changed.lr, changed.nesterov, changed.replace(lr=0.25, nesterov=False)) == (0.5, True, algorithm)


@every
def test_the_plan_has_every_step(kind):
    for steps in (1, 7, 30):
        plan = small(kind, steps=steps).plan()
        assert len(plan) == steps
        assert all(min(p.lr, p.retain, p.forget, p.pull) >= 0 for p in plan)
        assert any(p.retain * (kind().mix < 1) or p.forget * (kind().mix > 0) for p in plan)


@every
def test_the_preconditioner_is_semi_definite_and_its_root_is_one(kind):
    problem = linear_problem("cross_entropy")
    p = small(kind).preconditioner(problem)
    dense = p.apply(torch.eye(problem.size, dtype=torch.float64))
    torch.testing.assert_close(dense, dense.T)
    values = torch.linalg.eigvalsh(dense)
    assert float(values[0]) >= -1e-12 * float(values[-1])
    root = p.sqrt(torch.eye(problem.size, dtype=torch.float64))
    torch.testing.assert_close(root @ root, dense)
    assert small(kind).preconditioner_cost(problem) >= 0


@every
def test_a_seed_is_a_run_and_nothing_else_is_touched(kind, digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = kind(lr=0.01, steps=6, batch_size=16, **FEW.get(kind.name, {}))
    state, rng = {k: t.clone() for k, t in digits_mlp.state_dict().items()}, torch.get_rng_state()
    first, again, other = (run(problem, algorithm, seed=s) for s in (3, 3, 4))
    assert torch.equal(final_vector(problem, first), final_vector(problem, again))
    assert first.trajectory == again.trajectory
    assert not torch.equal(final_vector(problem, first), final_vector(problem, other))
    assert first.trajectory[-1].distance > 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, state[k]) for k, t in digits_mlp.state_dict().items())


@functools.cache
def prepared(kind, loss):
    """A linear problem with the algorithm's P, which none of the drawn settings changes."""
    problem = far_from_zero(loss) if kind is L1Sparse else linear_problem(loss)
    return problem, small(kind).preconditioner(problem)


@settings(max_examples=settings.default.max_examples // 2)
@given(
    lr=st.sampled_from((0.01, 0.1, 0.5)),
    mix=st.sampled_from((0.2, 0.5, 1.0)),
    sampling=st.sampled_from(SAMPLINGS),
    options=st.sampled_from((
        {},
        {"momentum": 0.8, "weight_decay": 0.05},
        {"momentum": 0.5, "nesterov": True, "lr_schedule": "cosine"},
        {"max_gradient_norm": 0.1, "forget_every": 3},
        {"forget_every": None, "forget_schedule": "cosine", "max_gradient_norm": 0.2, "weight_decay": 0.1},
    )),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize(("kind", "loss"), PAIRS)
def test_a_linear_models_rollout_is_its_run(kind, loss, lr, mix, sampling, options, seed):
    """Property 12, step by step: a linear model is its own linearisation, and here J has full rank."""
    problem, preconditioner = prepared(kind, loss)
    algorithm = small(kind, lr=lr, sampling=sampling, **options)
    if kind.name not in ONE_SIDED:
        algorithm = algorithm.replace(mix=mix)
    if issubclass(kind, AGU):
        algorithm = algorithm.replace(drift_tolerance=None)
    if kind is L1Sparse:
        algorithm = algorithm.replace(penalty=0.05, lr=min(lr, 0.1))
    compare_to_run(problem, algorithm, seed=seed, check_every=1, preconditioner=preconditioner)


def far_from_zero(loss):
    """A linear problem whose weights keep their signs in a short run, as the rollout of a pull assumes."""
    plain = linear_problem(loss)
    model = plain.new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 2 * parameter.sign()
    (xf, _), (xr, _) = (s.batch(torch.arange(s.size)) for s in (plain.forget, plain.retain))
    noise = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        y = model(torch.cat([xf, xr])) + noise
    y = y if loss == "mse" else y.argmax(1)
    return UnlearningProblem(model, (xf, y[:8]), (xr, y[8:]), loss=loss)


@every
def test_settings_side_by_side_are_each_alone(kind):
    """What looks at a whole batch, as sample weights and drawn labels do, must look at each setting's own."""
    problem = linear_problem("cross_entropy")
    algorithm = small(kind, momentum=0.5, weight_decay=0.02)
    network = linearise(problem, algorithm.preconditioner(problem), rank=1000, retain_samples=None, forget_samples=None)
    network = replace(network, divergence_level=1e9)
    mixes = [algorithm.mix] * 3 if kind.name in ONE_SIDED else [0.2, 0.5, 0.9]
    pairs = list(zip([0.02, 0.3, 0.1], mixes, strict=True))

    def rolled(pairs):
        lr, mix = zip(*pairs, strict=True)
        return rollout(network, algorithm, lr=lr, mix=mix, batch_sizes=(5, 3), seeds=[0, 7])

    together = rolled(pairs)
    for g, pair in enumerate(pairs):
        alone = rolled([pair])
        for name in ("retain_loss", "forget_loss", "coordinates"):
            np.testing.assert_allclose(
                getattr(together, name)[:, g], getattr(alone, name)[:, 0], rtol=1e-9, atol=1e-12, err_msg=name
            )
    assert float((together.coordinates[:, 0] - together.coordinates[:, 1]).abs().max()) > 0


class Wide(nn.Module):
    """More parameters than outputs: the coordinates are not all of parameter space."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(40, 3, bias=False)

    def forward(self, x):
        return self.first(x)


@pytest.mark.parametrize(("kind", "loss"), PAIRS)
def test_outputs_are_exact_where_parameters_outnumber_them(kind, loss):
    """Masks, decay and pulls move what the coordinates do not hold; losses must not notice."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(18, 40, generator=g, dtype=torch.float64) / 40**0.5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wide().double()
    with torch.no_grad():
        model.first.weight += model.first.weight.sign()  # no sign changes in so short a run
    y = torch.randn(18, 3, generator=g, dtype=torch.float64)
    y = y if loss == "mse" else y.argmax(1)
    problem = UnlearningProblem(model, (x[:5], y[:5]), (x[5:], y[5:]), loss=loss)
    algorithm = small(kind, lr=0.1, momentum=0.6, weight_decay=0.0 if issubclass(kind, AGU) else 0.05)
    if kind is L1Sparse:
        algorithm = algorithm.replace(penalty=0.1)
    preconditioner = algorithm.preconditioner(problem)
    network = linearise(problem, preconditioner, rank=1000, retain_samples=None, forget_samples=None)
    assert network.rank < problem.size
    network = replace(network, divergence_level=1e9)
    problem.divergence_level = 1e9
    rolled = rollout(
        network, algorithm, lr=[algorithm.lr], mix=[algorithm.mix], batch_sizes=(5, 3), seeds=[3], check_every=1
    )
    real = run(problem, algorithm, preconditioner=preconditioner, seed=3, check_every=1)
    retain, forget = ([getattr(c, f"{s}_loss") for c in real.trajectory] for s in ("retain", "forget"))
    shown = len(retain)  # a stop rule may end both
    np.testing.assert_allclose(rolled.retain_loss[0, 0, :shown], retain, rtol=1e-8)
    np.testing.assert_allclose(rolled.forget_loss[0, 0, :shown], forget, rtol=1e-8)
    assert real.trajectory[-1].distance > 0


@every
@pytest.mark.parametrize("case", [0, 3, 4], ids=lambda i: CASES[i].name)
def test_a_networks_rollout_is_its_run_to_first_order(kind, case):
    """Outputs with positions, BatchNorm, tied weights: at small steps a network is its linearisation."""
    with torch.random.fork_rng():
        torch.manual_seed(case)
        problem = CASES[case].problem()
    algorithm = small(kind, lr=2e-6 if kind.name == "sfr_on" else 1e-4, steps=8, batch_size=4)
    network = linearise(
        problem, algorithm.preconditioner(problem), rank=10_000, retain_samples=None, forget_samples=None
    )
    problem.divergence_level = 1e9
    rolled = rollout(
        replace(network, divergence_level=1e9),
        algorithm,
        lr=[algorithm.lr],
        mix=[algorithm.mix],
        batch_sizes=(4, 3),
        seeds=[0],
        check_every=1,
    )
    real = run(problem, algorithm, check_every=1)
    for name, found in (("retain_loss", rolled.retain_loss), ("forget_loss", rolled.forget_loss)):
        losses = np.array([getattr(c, name) for c in real.trajectory])
        change = np.abs(losses - losses[0]).max()
        assert change > 1e-9
        np.testing.assert_allclose(found[0, 0, : losses.size], losses, rtol=0, atol=0.03 * change)


@pytest.mark.parametrize("kind", [AGU, SRAGU])
def test_stop_rules_end_run_and_rollout_together(kind):
    problem = linear_problem("cross_entropy")
    for rule, reason in (({"leakage_bound": 0.01}, "leakage"), ({"drift_tolerance": 0.05, "lr": 0.01}, "drift")):
        algorithm = kind(**{
            "lr": 0.3,
            "steps": 50,
            "batch_size": 5,
            "drift_tolerance": None,
            "forget_every": 3,
            **rule,
        })
        rolled, real = compare_to_run(problem, algorithm)
        assert real.stop_reason == reason
        assert float(rolled.stopped_step[0, 0]) == real.steps < 50


@every
def test_predict_takes_it(kind, digits_mlp, random_deletion):
    """The report's settings are the algorithm's, and survive its JSON."""
    algorithm = kind(lr=0.005, steps=5, batch_size=16, **FEW.get(kind.name, {}))
    sizes = {"rank": 8, "retain_samples": 40, "forget_samples": 40, "spectrum_samples": 40, "seeds": 1}
    report = stabkit.predict(digits_mlp, *random_deletion, algorithm=algorithm, **sizes)
    assert report.run.algorithm == kind.name
    assert kind(**report.run.settings) == algorithm
    assert stabkit.Report.from_json(report.to_json()).run.settings == report.run.settings
    assert report.verdict in {"stable", "marginal", "diverges"}


# ---------------------------------------------------------------------- what a subclass states


class _Stated(Preconditioner):
    """A P and a root from functions."""

    def __init__(self, apply, sqrt):
        self._apply, self._sqrt = apply, sqrt

    def apply(self, vectors):
        return self._apply(vectors)

    def sqrt(self, vectors):
        return self._sqrt(vectors)


def _entries(d):
    return torch.linspace(0.1, 2.0, d, dtype=torch.float64)


def _skewed(v):
    return v + torch.cat([v[1:], torch.zeros_like(v[:1])])


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda d: torch.ones(d), TypeError, r"must return a stabkit.preconditioner.Preconditioner; got Tensor"),
        (lambda d: Diagonal(torch.ones(10)), ValueError, r"vectors \(d,\) and blocks \(d, k\) of the model's d = "),
        (
            lambda d: _Stated(lambda v: v[:3], lambda v: v),
            ValueError,
            r"whose `apply` gives a finite tensor of the arg",
        ),
        (lambda d: _Stated(lambda v: v, lambda v: None), ValueError, r"whose `sqrt` gives a finite tensor"),
        (lambda d: _Stated(lambda v: v / 0, lambda v: v), ValueError, r"whose `apply` gives a finite tensor"),
        (lambda d: _Stated(_skewed, lambda v: v), ValueError, r"a symmetric P, uᵀPv = vᵀPu"),
        (lambda d: _Stated(lambda v: -v, lambda v: v), ValueError, r"a P >= 0, vᵀPv >= 0"),
        (lambda d: _Stated(lambda v: 0.25 * v, lambda v: 0.25 * v), ValueError, r"whose `sqrt` is the root of its"),
        (
            lambda d: _Stated(lambda v: v * (1 + (v.dim() > 1)), lambda v: 2**0.5 * v),
            ValueError,
            r"does to a column of a block what it does to a vector",
        ),
    ],
)
def test_a_preconditioner_that_is_none_is_refused_before_anything_is_measured(made, error, message):
    class Stated(GradDiff):
        name = "stated"

        def preconditioner(self, problem):
            return made(problem.size)

    problem = CASES[0].problem()
    for call in (lambda: Stated().step_preconditioner(problem), lambda: run(problem, Stated(steps=1, batch_size=2))):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "`preconditioner` of `Stated`" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 50), rank=st.integers(1, 5))
def test_preconditioners_that_are_ones_pass(dtype, seed, rank):
    g = torch.Generator().manual_seed(seed)
    factor = torch.randn(60, rank, generator=g, dtype=dtype)
    diagonal = torch.randn(60, generator=g, dtype=dtype).exp()
    dense = factor @ factor.T + torch.diag(diagonal)
    values, vectors = torch.linalg.eigh(dense.double())
    root = ((vectors * values.sqrt()) @ vectors.T).to(dtype)
    like = torch.ones(60, dtype=dtype)
    for p in (Identity(), Diagonal(diagonal), LowRank(factor), _Stated(lambda v: dense @ v, lambda v: root @ v)):
        check_preconditioner(p, like, owner="Mine")


def test_the_base_class_itself_is_no_algorithm():
    with pytest.raises(TypeError, match="`Algorithm` is what algorithms are made from and none itself"):
        Algorithm(lr=0.05)


class _Hidden(GradDiff):
    name = "hidden"

    def __init__(self, gamma=1.0, **settings):
        super().__init__(**settings)
        object.__setattr__(self, "gamma", gamma)


class _Undecorated(GradDiff):
    name = "undecorated"
    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class _Unannotated(GradDiff):
    name = "unannotated"
    momentum = 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _Hidden(gamma=0.2), "`gamma` of `_Hidden` must be a field .* got an argument of `__init__` alone"),
        (_Undecorated, "`momentum` of `_Undecorated` must be a field .* got an attribute of the class alone"),
        (_Unannotated, "`momentum` of `_Unannotated` must be a field .* got an attribute of the class alone"),
    ],
)
def test_settings_that_copies_would_lose_are_refused(make, message):
    """A prediction asks copies with other step sizes, which are made of the fields: of these with gamma=1, momentum=0."""
    with pytest.raises(TypeError, match=message):
        make()


def test_what_is_made_of_the_settings_is_none():
    @dataclass(frozen=True, kw_only=True)
    class Derived(GradDiff):
        name = "derived"
        gamma: float = 2.0
        square: float = field(init=False)

        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "square", self.gamma**2)

    again = Derived(gamma=3.0).replace(lr=0.5)
    assert (again.lr, again.gamma, again.square) == (0.5, 3.0, 9.0)
    assert "square" not in again.settings()
    with pytest.raises(TypeError, match="`Derived` has no setting 'square'"):
        again.replace(square=4.0)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ((StepPlan(),) * 3, ValueError, "`plan` of `Own` must hold one entry for each of the 4 steps; got 3"),
        ([{"lr": 1.0}] * 4, TypeError, "`plan` of `Own` must hold .*StepPlan objects; got {'lr': 1.0} at place 0"),
        ([StepPlan(lr=-1.0)] * 4, ValueError, r"`plan\(\)\[0\].lr` of `Own` must be a finite number in .* got -1.0"),
        ([StepPlan(forget=float("nan"))] * 4, ValueError, r"`plan\(\)\[0\].forget` of `Own` .* got nan"),
        ([StepPlan(max_norm=0.0)] * 4, ValueError, r"`plan\(\)\[0\].max_norm` of `Own` .* got 0.0"),
    ],
)
def test_a_plan_that_is_none_is_refused_before_anything_is_measured(plan, error, message):
    class Own(GradDiff):
        name = "own"

        def plan(self):
            return plan

    _refused(Own(steps=4, batch_size=2), error, message)


def test_a_stop_rule_that_is_none_is_refused_before_anything_is_measured():
    class Own(GradDiff):
        name = "own"

        def stop_rule(self):
            return None

    _refused(Own(steps=4, batch_size=2), TypeError, "`stop_rule` of `Own` must return a stabkit.StopRule; got None")


def _refused(algorithm, error, message):
    problem = CASES[0].problem()
    with pytest.raises(error, match=message):
        run(problem, algorithm)
    with pytest.raises(error, match=message):
        check_batches(problem, algorithm)  # the first thing that a prediction does with an algorithm
