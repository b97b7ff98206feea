"""What is measured before a prediction: its values, what is reused, what is counted, what is left alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

import stabkit.measure
from stabkit.algorithms import AGU, SRAGU, FineTune, GradDiff
from stabkit.coherence import coherence
from stabkit.curvature import GGNOperator, HessianOperator, linearise
from stabkit.heavy_tail import layer_exponents
from stabkit.judge import judge
from stabkit.measure import COHERENCE_SAMPLES, MeasureSettings, measure
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem
from stabkit.training import train
from tests.cases import CASES, dense_ggn, dense_hessian

pytestmark = [
    pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning"),
    pytest.mark.filterwarnings("ignore::stabkit.ExponentWarning"),
]
SMALL = MeasureSettings(curvature="hessian", rank=12, retain_samples=9, forget_samples=5, spectrum_samples=8, seed=3)
WHOLE = MeasureSettings(
    curvature="hessian", rank=1000, retain_samples=None, forget_samples=None, spectrum_samples=None, seed=0
)
STAGES = ["preconditioner", "spectrum", "linearisation", "coherence", "layer exponents"]


def problem_of(case):
    with torch.random.fork_rng():
        torch.manual_seed(case)
        return CASES[case].problem()


def costs_of(measurement):
    assert [c.stage for c in measurement.costs] == STAGES
    assert all(c.seconds >= 0 for c in measurement.costs)
    return {c.stage: c.gradient_equivalents for c in measurement.costs}


# ------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize(
    "algorithm",
    [GradDiff(mix=0.3), AGU(mix=0.7), GradDiff(mix=0.0), GradDiff(mix=1.0)],
    ids=lambda a: f"{a.name}-{a.mix}",
)
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: CASES[i].name)
def test_the_spectrum_is_the_dense_ones_ends(case, algorithm, kind):
    problem = problem_of(case)
    found = measure(problem, algorithm, replace(WHOLE, curvature=kind)).spectrum
    dense = dense_hessian if kind == "hessian" else dense_ggn
    p = torch.ones(problem.size, dtype=torch.float64)
    if isinstance(algorithm, AGU):
        p = algorithm.preconditioner(problem).diagonal
    root = p.sqrt()
    retain, forget = (root[:, None] * dense(problem, which) * root for which in ("retain", "forget"))
    values = torch.linalg.eigvalsh((1 - algorithm.mix) * retain - algorithm.mix * forget)
    scale = float(values.abs().max())
    assert found.pairs.smallest == pytest.approx(float(values[0]), abs=5e-3 * scale)
    assert found.pairs.largest == pytest.approx(float(values[-1]), abs=5e-3 * scale)
    vectors = found.pairs.vectors
    torch.testing.assert_close(found.retain, (vectors * (retain @ vectors)).sum(0), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.forget, (vectors * (forget @ vectors)).sum(0), rtol=1e-7, atol=1e-9)
    parts = (1 - algorithm.mix) * found.retain - algorithm.mix * found.forget
    torch.testing.assert_close(parts, found.pairs.values, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize(("kind", "mix"), [("hessian", 0.3), ("ggn", 0.0)])
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: CASES[i].name)
def test_mean_stability_is_that_of_the_dense_ends(case, kind, mix):
    problem = problem_of(case)
    dense = dense_hessian if kind == "hessian" else dense_ggn
    values = torch.linalg.eigvalsh((1 - mix) * dense(problem, "retain") - mix * dense(problem, "forget"))
    low, high = float(values[0]), float(values[-1])
    # Clearly negative, or rounding: a little below zero is not looked for.
    assert low < -2e-3 * high if mix else low > -1e-8 * high
    for share in (0.5, 0.95, 1.05):
        algorithm = GradDiff(mix=mix, lr=share * 2 / high, batch_size=4, steps=5)
        found = judge(measure(problem, algorithm, replace(WHOLE, curvature=kind)), [0]).thresholds
        assert found.mean_stable == (share < 1 and not mix)


@pytest.mark.parametrize("seed", range(6))
def test_a_smallest_eigenvalue_far_below_the_largest_is_found(seed):
    g = torch.Generator().manual_seed(seed)
    x, y = blobs(g, classes=5, inputs=6)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
    problem = UnlearningProblem(train(model, x, y, epochs=60, lr=1e-2), (x[:30], y[:30]), (x[30:], y[30:]))
    dense = 0.95 * dense_hessian(problem, "retain") - 0.05 * dense_hessian(problem, "forget")
    values = torch.linalg.eigvalsh(dense)
    assert -0.2 * float(values[-1]) < float(values[0]) < 0
    found = measure(problem, GradDiff(mix=0.05), WHOLE).spectrum.pairs
    assert found.smallest == pytest.approx(float(values[0]), rel=2e-2)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_convex_problems_are_stable_in_the_mean(kind, dtype):
    """Softmax regression has directions without curvature, whose quotient rounding may put below zero."""
    for seed in range(10):
        x, y = blobs(torch.Generator().manual_seed(seed), classes=3, inputs=2)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            linear = nn.Linear(2, 3)
        model = train(linear, x, y, epochs=20, lr=1e-2).to(dtype)
        problem = UnlearningProblem(model, (x[:20].to(dtype), y[:20]), (x[20:].to(dtype), y[20:]))
        measurement = measure(problem, FineTune(lr=0.01, steps=5), replace(WHOLE, curvature=kind))
        assert judge(measurement, [0]).thresholds.mean_stable


def blobs(generator, *, classes, inputs):
    """Overlapping classes of points."""
    centres = 1.2 * torch.randn(classes, inputs, generator=generator)
    y = torch.randint(0, classes, (300,), generator=generator)
    return centres[y] + torch.randn(300, inputs, generator=generator), y


def test_the_parts_are_those_of_the_modules_below():
    problem, algorithm = problem_of(0), AGU(mix=0.4)
    found = measure(problem, algorithm, SMALL)
    assert torch.equal(found.preconditioner.diagonal, algorithm.preconditioner(problem).diagonal)
    network = linearise(
        problem, found.preconditioner, rank=12, retain_samples=9, forget_samples=5, sketch_samples=None, seed=3
    )
    assert torch.equal(found.network.basis, network.basis)
    for which in ("retain", "forget"):
        factors = getattr(network, which).factors(problem.loss)
        assert torch.equal(getattr(found, which).factors, factors.factors)
        assert torch.equal(getattr(found, which).gradients, factors.gradients)
    assert (found.retain.samples, found.retain.population) == (9, 14)
    assert (found.forget.samples, found.forget.population) == (5, 6)
    expected = coherence(found.retain, found.forget, mix=0.4, seed=3)
    assert (found.coherence.retain, found.coherence.mixed) == (expected.retain, expected.mixed)
    assert (found.problem, found.algorithm, found.settings) == (problem, algorithm, SMALL)


def test_coherence_looks_at_a_bounded_number_of_samples(digits_mlp, class_deletion):
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    settings = MeasureSettings(
        curvature="ggn", rank=10, retain_samples=300, forget_samples=40, spectrum_samples=50, seed=0
    )
    found = measure(problem, GradDiff(), settings)
    assert found.retain.samples == 300 > COHERENCE_SAMPLES
    assert found.coherence.gram_retain.shape == (COHERENCE_SAMPLES, COHERENCE_SAMPLES)
    assert found.coherence.gram_forget.shape == (40, 40)


@pytest.mark.parametrize("algorithm", [GradDiff(), SRAGU()], ids=lambda a: a.name)
def test_layers_have_their_exponents_and_gates(digits_mlp, class_deletion, algorithm):
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    settings = replace(WHOLE, rank=5, retain_samples=20, forget_samples=20, spectrum_samples=20)
    found = measure(problem, algorithm, settings).layers
    table = layer_exponents(problem.new_model(), seed=0)
    assert [row.layer for row in found] == [row.name for row in table.rows]
    for row, expected in zip(found, table.rows, strict=True):
        assert row.trusted == expected.trusted
        assert row.note == expected.reason
        if isinstance(algorithm, GradDiff):
            assert row.gate == 1.0
            assert row.exponent == (expected.exponent if np.isfinite(expected.exponent) else None)
        else:
            assert row.gate == algorithm.gates(problem).gates[row.layer]


# ------------------------------------------------------------------ reuse


def refuse(*_, **__):
    raise AssertionError("measured again")


FREE = [
    {"lr": 0.7},
    {"steps": 3},
    {"batch_size": 2},
    {"forget_batch_size": 2},
    {"sampling": "poisson"},
    {"momentum": 0.5},
]


@pytest.mark.parametrize("changes", [*FREE, {"lr": 0.7, "steps": 3, "momentum": 0.1}, {}], ids=str)
def test_settings_that_no_measurement_depends_on_are_free(monkeypatch, changes):
    first = measure(problem_of(0), AGU(mix=0.3), SMALL)
    for name in ("linearise", "extreme_eigenpairs", "coherence", "layer_exponents", "curvature_operator"):
        monkeypatch.setattr(stabkit.measure, name, refuse)
    monkeypatch.setattr(AGU, "preconditioner", refuse)
    changed = first.algorithm.replace(**changes)
    again = first.with_algorithm(changed)
    assert again.algorithm is changed
    for name in (
        "problem",
        "settings",
        "preconditioner",
        "spectrum",
        "network",
        "retain",
        "forget",
        "coherence",
        "layers",
    ):
        assert getattr(again, name) is getattr(first, name)
    assert set(costs_of(again).values()) == {0.0}
    assert all(c.seconds == 0 for c in again.costs)
    assert costs_of(first)["spectrum"] > 0


def test_a_new_mix_has_its_spectrum_and_coherence_measured_and_nothing_else(monkeypatch):
    problem = problem_of(0)
    first = measure(problem, AGU(mix=0.3), SMALL)
    fresh = measure(problem, AGU(mix=0.8, lr=0.2), SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(stabkit.measure, "linearise", refuse)
        patch.setattr(stabkit.measure, "layer_exponents", refuse)
        patch.setattr(AGU, "preconditioner", refuse)
        again = first.with_algorithm(first.algorithm.replace(mix=0.8, lr=0.2))
    for name in ("problem", "settings", "preconditioner", "network", "layers"):
        assert getattr(again, name) is getattr(first, name)
    assert again.algorithm.mix == 0.8
    for name in ("values", "vectors"):
        torch.testing.assert_close(getattr(again.spectrum.pairs, name), getattr(fresh.spectrum.pairs, name))
        assert not torch.allclose(getattr(again.spectrum.pairs, name), getattr(first.spectrum.pairs, name))
    assert again.coherence.mixed == pytest.approx(fresh.coherence.mixed)
    assert again.coherence.mixed != pytest.approx(first.coherence.mixed)
    assert again.coherence.retain == pytest.approx(first.coherence.retain)
    costs = costs_of(again)
    assert costs.pop("spectrum") == costs_of(fresh)["spectrum"] > 0
    assert set(costs.values()) == {0.0}


@dataclass(frozen=True, kw_only=True)
class Blended(GradDiff):
    """A user's algorithm with a setting of its own, which its preconditioner reads."""

    name = "blended"
    share: float = 0.5

    def preconditioner(self, problem):
        return Diagonal(torch.full((problem.size,), self.share, dtype=problem.dtype))


def test_any_other_setting_has_everything_measured():
    first = measure(problem_of(0), Blended(mix=0.3, share=0.5), SMALL)
    again = first.with_algorithm(first.algorithm.replace(share=0.25))
    assert float(again.preconditioner.diagonal[0]) == 0.25
    for name in ("preconditioner", "spectrum", "network", "coherence"):
        assert getattr(again, name) is not getattr(first, name)
    assert again.spectrum.pairs.largest == pytest.approx(first.spectrum.pairs.largest / 2, rel=1e-2)
    assert costs_of(again)["linearisation"] == costs_of(first)["linearisation"] > 0


@pytest.mark.parametrize("other", [FineTune(), GradDiff(mix=0.0)], ids=lambda a: a.name)
def test_another_algorithm_has_everything_measured(other):
    """Its preconditioner may be another one, whatever the settings."""
    first = measure(problem_of(0), AGU(mix=0.0), SMALL)
    again = first.with_algorithm(other)
    fresh = measure(first.problem, other, SMALL)
    assert again.algorithm is other
    assert again.network is not first.network
    assert again.spectrum.pairs.largest == pytest.approx(fresh.spectrum.pairs.largest)


def test_algorithms_without_a_preconditioner_share_a_linearisation():
    first = measure(problem_of(0), GradDiff(mix=0.3), SMALL)
    again = first.with_algorithm(FineTune())
    assert again.network is first.network
    assert costs_of(again)["linearisation"] == 0
    fresh = measure(first.problem, FineTune(), SMALL)
    assert again.spectrum.pairs.largest == pytest.approx(fresh.spectrum.pairs.largest)
    assert first.with_algorithm(AGU(mix=0.3)).network is not first.network


# ------------------------------------------------------------------ costs


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_products_with_the_curvature_are_counted_sample_by_sample(monkeypatch, kind, mix):
    """So many gradients a product and sample, over the samples that each product walked, and one a sample for its graph."""
    walked, each, graphs = 0, {"hessian": 2.5, "ggn": 1.5}[kind], {}
    cls = HessianOperator if kind == "hessian" else GGNOperator
    product = cls._matmat

    def counted(self, block):
        nonlocal walked
        walked += block.shape[1] * self._indices.numel()
        graphs[id(self)] = self._indices.numel()
        return product(self, block)

    monkeypatch.setattr(cls, "_matmat", counted)
    algorithm = AGU(mix=mix)
    found = measure(problem_of(0), algorithm, replace(SMALL, curvature=kind))
    costs = costs_of(found)
    assert costs["spectrum"] == each * walked + sum(graphs.values()) > 0
    assert costs["preconditioner"] == 6  # one gradient a forget sample
    assert costs["linearisation"] == found.network.gradient_equivalents > 0
    assert costs["coherence"] == costs["layer exponents"] == 0
    assert costs_of(measure(problem_of(0), GradDiff(mix=mix), SMALL))["preconditioner"] == 0


def test_time_is_that_of_the_stages(monkeypatch):
    """A clock that ticks once a look: every stage takes one tick."""
    ticks = iter(range(1000))
    monkeypatch.setattr(stabkit.measure.time, "perf_counter", lambda: float(next(ticks)))
    found = measure(problem_of(0), GradDiff(), SMALL)
    assert [c.seconds for c in found.costs] == [1.0] * 5


# ------------------------------------------------------------------ repeatable, and nothing touched


def test_a_seed_decides_everything():
    first, again, other = (measure(problem_of(0), GradDiff(mix=0.4), replace(SMALL, seed=s)) for s in (3, 3, 4))
    assert torch.equal(first.network.basis, again.network.basis)
    assert torch.equal(first.spectrum.pairs.vectors, again.spectrum.pairs.vectors)
    assert first.coherence.mixed == again.coherence.mixed
    assert costs_of(first) == costs_of(again)
    assert not torch.equal(first.network.retain.indices, other.network.retain.indices)
    assert first.spectrum.pairs.largest != other.spectrum.pairs.largest


@pytest.mark.parametrize("algorithm", [GradDiff(), SRAGU()], ids=lambda a: a.name)
def test_the_problem_and_the_random_state_are_left_alone(digits_mlp, class_deletion, algorithm):
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    settings = replace(SMALL, rank=4, retain_samples=20, forget_samples=10)
    parameters = list(digits_mlp.parameters())
    kept = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in parameters]
    vector = problem.vector()
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    measure(problem, algorithm, settings).with_algorithm(algorithm.replace(mix=0.9))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert torch.equal(problem.vector(), vector)
    for parameter, (value, grad) in zip(parameters, kept, strict=True):
        assert torch.equal(parameter, value)
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)


def test_a_progress_bar_is_drawn_on_request(capsys):
    measure(problem_of(0), GradDiff(), SMALL)
    assert capsys.readouterr().err == ""
    measure(problem_of(0), GradDiff(), SMALL, progress=True)
    assert "measure" in capsys.readouterr().err


def test_a_setting_may_be_a_tensor():
    """As a mask that an algorithm of the caller's own is given: its comparison is no truth value."""

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Masked(GradDiff):
        name = "masked"
        mask: torch.Tensor

        def preconditioner(self, problem):
            return Diagonal(self.mask)

    problem = problem_of(0)
    first = measure(problem, Masked(mask=torch.ones(problem.size).double()), SMALL)
    assert first.with_algorithm(first.algorithm.replace(lr=0.5)).network is first.network
    again = first.with_algorithm(first.algorithm.replace(mask=torch.zeros(problem.size).double()))
    assert again.network is not first.network
