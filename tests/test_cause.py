"""Which mechanism breaks a run, along what, and how far the linearisation is to be believed."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import scipy.optimize
import torch
from torch import nn

import stabkit
from stabkit import stability
from stabkit.algorithms import (
    AGU,
    NPO,
    SCRUB,
    FineTune,
    GradDiff,
    GradientAscent,
    L1Sparse,
    RandomLabels,
    RemainNewton,
    SalUn,
    SFROn,
)
from stabkit.cause import TOP_SAMPLES, find_cause, linearisation_errors
from stabkit.curvature import linearise
from stabkit.measure import MeasureSettings, measure
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.runner import run
from stabkit.verdict import advice
from tests.cases import CASES, dense_ggn, dense_hessian, dense_jacobian, dense_output_hessian

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
WHOLE = MeasureSettings(
    curvature="ggn", rank=1000, retain_samples=None, forget_samples=None, spectrum_samples=None, seed=0
)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem_of(case):
    with torch.random.fork_rng():
        torch.manual_seed(case)
        return CASES[case].problem()


def linear_problem():
    """Least squares with a top curvature that is no one's alone."""
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.copy_(normal(0, 1, 4))
        model.bias.zero_()
    x = normal(1, 30, 4)
    y = model(x).detach() + 0.1 * normal(2, 30, 1)
    return UnlearningProblem(model, (x[:10], y[:10]), (x[10:], y[10:]), loss="mse")


def found_for(problem, algorithm, *, settings=WHOLE, seeds=(0,), level=None):
    """The cause, and everything it was made from, the mean square's growth (T8) included."""
    measurement = measure(problem, algorithm, settings)
    network = measurement.network if level is None else replace(measurement.network, divergence_level=level)
    batches = algorithm.batch_sizes(problem)
    rolled = rollout(network, algorithm, lr=[algorithm.lr], mix=[algorithm.mix], batch_sizes=batches, seeds=seeds)
    dynamics = stability.LinearDynamics(
        retain=measurement.retain,
        forget=measurement.forget,
        mix=algorithm.mix,
        batch_sizes=batches,
        sampling=algorithm.sampling,
    )
    growth = stability.mean_square(dynamics, algorithm.lr).growth(algorithm.steps)
    return find_cause(measurement, rolled, mean_square_growth=growth), rolled, measurement, growth


def eigenvalues(problem, mix):
    d = (1 - mix) * dense_hessian(problem, "retain") - mix * dense_hessian(problem, "forget")
    return torch.linalg.eigvalsh(d)


# ------------------------------------------------------------------ mechanisms


def test_descent_on_random_labels_is_no_ascent():
    """D has the forget curvature with the sign of ascent; what grows by it alone is no mechanism of a run that descends."""
    settings = {"lr": 0.05, "mix": 0.9, "steps": 40, "batch_size": 4, "forget_batch_size": 4}
    for algorithm, mechanisms in (
        (GradDiff(**settings), {"ascent"}),
        (SalUn(forgetting="ascent", share=1.0, **settings), {"ascent"}),
        (SalUn(share=1.0, **settings), {"none", "nonlinear"}),
        (RandomLabels(**settings), {"none", "nonlinear"}),
    ):
        cause, _, measurement, _ = found_for(problem_of(0), algorithm)
        assert float(measurement.spectrum.pairs.smallest) < 0
        assert cause.mechanism in mechanisms, algorithm.name


@pytest.mark.parametrize(
    ("algorithm", "clauses"),
    [
        (GradDiff(), ()),
        (GradDiff(optimizer="adamw"), ()),
        (AGU(), ()),
        (RemainNewton(), ()),
        (SalUn(forgetting="ascent"), ()),
        (SalUn(), ("random labels",)),
        (RandomLabels(), ("random labels",)),
        (RandomLabels(forget_every=3), ("random labels", "take turns")),
        (SCRUB(), ("flat there", "take turns", "schedule")),
        (SFROn(), ("weighted by sample", "take turns", "step sizes", "weight follows", "clipped")),
        (NPO(), ("counts by its tokens",)),
        (L1Sparse(), ("pulled towards 0",)),
        (L1Sparse(penalty=0.0), ()),
        (GradDiff(lr_schedule="cosine", max_gradient_norm=1.0), ("step sizes", "clipped")),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_the_linear_theory_leaves_out_is_said(algorithm, clauses):
    found = algorithm.outside_theory
    assert len(found) == len(clauses)
    for said, clause in zip(found, clauses, strict=True):
        assert clause in said


def test_residuals_of_ones_own_are_outside_of_the_linear_theory(digits_mlp, class_deletion):
    class Mine(GradDiff):
        name = "mine"

        def forget_residual(self, loss, batch):
            return 2 * super().forget_residual(loss, batch)

    report = stabkit.predict(digits_mlp, *class_deletion, algorithm=Mine(steps=3), mode="fast")
    assert report.thresholds.outside == ("losses are the algorithm's own",)
    assert "leaves out" in str(report)
    plain = stabkit.predict(digits_mlp, *class_deletion, algorithm=GradDiff(steps=3), mode="fast")
    assert plain.thresholds.outside == ()
    assert "leaves out" not in str(plain)


def test_overshoot():
    problem = linear_problem()
    top = float(eigenvalues(problem, 0.0)[-1])
    cause, rolled, _, _ = found_for(problem, FineTune(lr=2.5 / top, steps=40, batch_size=20))
    assert cause.mechanism == "overshoot"
    assert cause.eigenvalue == pytest.approx(top, rel=1e-6)
    assert cause.retain_curvature == pytest.approx(top, rel=1e-6)
    assert float(rolled.score[0, 0]) > 0
    below, _, _, _ = found_for(problem, FineTune(lr=1.9 / top, steps=40, batch_size=20))
    assert below.mechanism == "none"


def test_nesterovs_overshoot():
    """It begins at 2(1+β)/((1+2β)λ), long before heavy-ball's."""
    problem = linear_problem()
    top = float(eigenvalues(problem, 0.0)[-1])
    limit = stability.step_limit(top, momentum=0.9, nesterov=True)
    assert limit < 1.5 / top
    for factor, mechanism in ((1.3, "overshoot"), (0.9, "none")):
        asked = FineTune(lr=factor * limit, steps=60, batch_size=20, momentum=0.9, nesterov=True)
        cause, rolled, _, _ = found_for(problem, asked)
        assert cause.mechanism == mechanism
        assert (float(rolled.score[0, 0]) > 0) == (mechanism == "overshoot")
        if mechanism == "overshoot":
            assert cause.eigenvalue == pytest.approx(top, rel=1e-6)


def test_ascent():
    problem = linear_problem()
    values = eigenvalues(problem, 0.9)
    algorithm = GradDiff(lr=0.5 / float(values.abs().max()), mix=0.9, steps=40, batch_size=20, forget_batch_size=10)
    cause, rolled, measurement, _ = found_for(problem, algorithm)
    assert cause.mechanism == "ascent"
    assert cause.eigenvalue == pytest.approx(float(values[0]), rel=1e-6)
    assert cause.eigenvalue == pytest.approx(0.1 * cause.retain_curvature - 0.9 * cause.forget_curvature, rel=1e-9)
    assert float(rolled.score[0, 0]) > 0
    # The same direction in too few steps to grow by a factor e is no mechanism, be it that the run breaks before.
    growth = math.log(1 + algorithm.lr * abs(float(values[0])))
    before, after = math.floor(1 / growth), math.ceil(1 / growth)
    for last, squared, mechanism in (
        (before, 79.0 / before, "nonlinear"),  # of the whole run's 40 steps
        (before, 81.0 / before, "noise"),
        (after, 0.0, "ascent"),
    ):
        early = replace(rolled, divergence_step=torch.full_like(rolled.divergence_step, last))
        assert find_cause(measurement, early, mean_square_growth=squared).mechanism == mechanism
    for steps, mechanism in ((before, "none"), (after, "ascent")):
        assert found_for(problem, algorithm.replace(steps=steps))[0].mechanism == mechanism


class Product(nn.Module):
    """f = u·v·x: a saddle at the origin, for any target."""

    def __init__(self, u=0.01, v=0.02):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.tensor([[u]])), nn.Parameter(torch.tensor([[v]]))

    def forward(self, x):
        return x * self.u * self.v


def saddle_problem(retain_slope, forget_slope):
    x = normal(3, 12, 1).abs() + 0.5
    model = Product().double()
    return UnlearningProblem(
        model, (x[:4], forget_slope * x[:4]), (x[4:], retain_slope * x[4:]), loss="mse", dtype=torch.float64
    )


@pytest.mark.parametrize(
    ("slopes", "mix", "mechanism"),
    [
        ((1.0, 1.0), 0.0, "saddle"),
        ((1.0, -0.1), 0.2, "saddle"),  # both sets curve it down, the retain set more
        ((0.1, -1.0), 0.8, "ascent"),  # and the forget set more
    ],
)
def test_negative_curvature_belongs_to_the_set_that_makes_more_of_it(slopes, mix, mechanism):
    problem = saddle_problem(*slopes)
    settings = replace(WHOLE, curvature="hessian")
    algorithm = GradDiff(lr=0.1, mix=mix, steps=200, batch_size=8, forget_batch_size=4)
    cause, _, _, _ = found_for(problem, algorithm, settings=settings)
    values, vectors = torch.linalg.eigh(
        (1 - mix) * dense_hessian(problem, "retain") - mix * dense_hessian(problem, "forget")
    )
    assert cause.mechanism == mechanism
    assert cause.eigenvalue == pytest.approx(float(values[0]), rel=1e-6)
    for which, curvature in (("retain", cause.retain_curvature), ("forget", cause.forget_curvature)):
        dense = float(vectors[:, 0] @ dense_hessian(problem, which) @ vectors[:, 0])
        assert curvature == pytest.approx(dense, rel=1e-6, abs=1e-9)


def noisy_problem():
    """One retain sample in twenty carries nearly all curvature: stable on average, not in single draws."""
    x = torch.full((24, 1), 0.05, dtype=torch.float64)
    x[4] = 3.0
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    y = x + 0.3 * normal(5, 24, 1)
    return UnlearningProblem(model, (x[:4], y[:4]), (x[4:], y[4:]), loss="mse")


def test_noise():
    problem = noisy_problem()
    top = float(eigenvalues(problem, 0.0)[-1])
    algorithm = FineTune(lr=1.2 / top, steps=60, batch_size=1)
    cause, _, _, growth = found_for(problem, algorithm)
    assert growth >= 2
    assert cause.mechanism == "noise"
    full = algorithm.replace(batch_size=20)
    assert found_for(problem, full)[0].mechanism == "none"  # the same step without noise


def test_nonlinear():
    """Saturated softmaxes: no curvature at θ* to speak of, and a constant slope that carries the run across (theory §6)."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64).repeat(8, 1)
    labels = torch.tensor([0, 1]).repeat(8)
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[15.0, -30.0], [-15.0, 30.0]]))
    # The forget samples lie far on the wrong side; driving them further turns the retain samples' direction over.
    forget = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    problem = UnlearningProblem(model, forget, (x, labels))
    algorithm = GradientAscent(lr=0.5, steps=60, batch_size=4)
    cause, rolled, _, growth = found_for(problem, algorithm)
    assert cause.mechanism == "nonlinear"
    assert growth < 1e-6
    assert float(rolled.probability[0]) >= 0.5
    assert run(problem, algorithm).diverged
    assert found_for(problem, algorithm.replace(steps=20))[0].mechanism == "none"


def test_none():
    cause, rolled, _, growth = found_for(linear_problem(), GradDiff(lr=1e-4, mix=0.3, steps=5, batch_size=5))
    assert growth < 2
    assert float(rolled.probability[0]) < 0.5
    assert cause.mechanism == "none"


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_bears_longer_steps(momentum):
    """Heavy ball overshoots past (2 + 2β)/λ, not 2/λ; real runs of the linear model say the same."""
    problem = linear_problem()
    top = float(eigenvalues(problem, 0.0)[-1])
    algorithm = FineTune(steps=300, batch_size=20, momentum=momentum)
    for factor, mechanism in ((0.97, "none"), (1.03, "overshoot")):
        changed = algorithm.replace(lr=factor * (2 + 2 * momentum) / top)
        cause, rolled, _, _ = found_for(problem, changed)
        assert cause.mechanism == mechanism
        assert run(problem, changed).diverged == (mechanism == "overshoot") == bool(rolled.score[0, 0] >= 0)


def test_momentum_climbs_faster():
    """Where plain ascent grows too little to be named, ascent with momentum has grown tenfold."""
    problem = linear_problem()
    algorithm = GradDiff(lr=1.0, mix=0.9, steps=60, batch_size=20, forget_batch_size=10)
    algorithm = algorithm.replace(lr=0.5 / (60 * abs(float(eigenvalues(problem, 0.9)[0]))))
    assert found_for(problem, algorithm)[0].mechanism == "none"
    cause, _, _, _ = found_for(problem, algorithm.replace(momentum=0.9))
    assert cause.mechanism == "ascent"


# ------------------------------------------------------------------ shares


def dense_direction(problem, p, algorithm):
    """The eigenvector of P^{1/2} D P^{1/2} with the largest |1 - ηλ|, and P^{1/2}."""
    root = p.sqrt()
    d = (1 - algorithm.mix) * dense_ggn(problem, "retain") - algorithm.mix * dense_ggn(problem, "forget")
    values, vectors = torch.linalg.eigh(root[:, None] * d * root)
    place = int((1 - algorithm.lr * values).abs().argmax())
    return vectors[:, place], root


def dense_layers(problem, vector):
    energy = {}
    for name, part in problem.unflatten(vector).items():
        layer = name.rpartition(".")[0] or "(model)"
        energy[layer] = energy.get(layer, 0.0) + float(part.square().sum())
    return {name: value / sum(energy.values()) for name, value in energy.items()}


def check_shares(shares, expected, tolerance):
    assert {s.name: s.share for s in shares} == pytest.approx(expected, abs=tolerance)
    assert [s.share for s in shares] == sorted((s.share for s in shares), reverse=True)


@pytest.mark.parametrize("algorithm", [GradDiff(lr=0.1, mix=0.8), FineTune(lr=30.0), AGU(lr=0.1, mix=0.7)])
@pytest.mark.parametrize("case", [0, 1, 3, 4], ids=lambda i: CASES[i].name)
def test_layers_and_samples_are_those_of_the_dense_eigenvector(case, algorithm):
    problem = problem_of(case)
    algorithm = algorithm.replace(batch_size=4, steps=6)
    cause, rolled, measurement, _ = found_for(problem, algorithm, level=1e9)
    p = algorithm.preconditioner(problem).diagonal if isinstance(algorithm, AGU) else torch.ones(problem.size).double()
    vector, root = dense_direction(problem, p, algorithm)
    tolerance = 0.01  # of eigenvectors with residuals of 1e-3
    check_shares(cause.eigenvector_layers, dense_layers(problem, vector), tolerance)
    assert sum(s.share for s in cause.eigenvector_layers) == pytest.approx(1)

    displacement = measurement.network.displacement(rolled.coordinates[0, 0])
    check_shares(cause.displacement_layers, dense_layers(problem, displacement), 1e-9)

    for which, shares in (("retain", cause.retain_samples), ("forget", cause.forget_samples)):
        outputs, targets, jacobian = (t.detach() for t in dense_jacobian(problem, which))
        curved = dense_output_hessian(problem.loss, outputs, targets)
        moved = jacobian @ (root * vector)  # J_i P^{1/2} v: (m, O)
        parts = torch.einsum("mo,mop,mp->m", moved, curved, moved)
        dense = {str(i): float(share) for i, share in enumerate(parts / parts.sum())}
        check_shares(shares, {name: dense[name] for name in sorted(dense, key=dense.get)[-TOP_SAMPLES:]}, tolerance)
        if len(dense) <= TOP_SAMPLES:
            assert sum(s.share for s in shares) == pytest.approx(1)


def test_parameters_of_the_model_itself_are_a_layer():
    cause, _, _, _ = found_for(saddle_problem(1.0, 1.0), FineTune(lr=0.1, steps=5, batch_size=4))
    assert [s.name for s in cause.eigenvector_layers] == ["(model)"]


def test_samples_are_named_by_their_place_in_the_forget_set(digits_mlp, class_deletion):
    """Of a sampled forget set, the largest few, by their index in the whole set."""
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    settings = replace(WHOLE, rank=40, retain_samples=60, forget_samples=50, spectrum_samples=60)
    cause, _, measurement, _ = found_for(problem, GradDiff(lr=0.1, mix=0.9, steps=5), settings=settings)
    held = [str(i) for i in measurement.network.forget.indices.tolist()]
    named = [s.name for s in cause.forget_samples]
    assert len(set(named)) == len(named) == TOP_SAMPLES < len(held)
    assert set(named) <= set(held)
    assert max(map(int, named)) >= 50  # not a place among the samples held
    assert 0 < sum(s.share for s in cause.forget_samples) < 1


def test_what_is_not_finite_has_no_layers():
    problem = linear_problem()
    _, rolled, measurement, growth = found_for(problem, FineTune(steps=3, batch_size=4))
    blown = replace(rolled, coordinates=torch.full_like(rolled.coordinates, math.inf))
    assert find_cause(measurement, blown, mean_square_growth=growth).displacement_layers == ()
    still = replace(rolled, coordinates=torch.zeros_like(rolled.coordinates))
    assert find_cause(measurement, still, mean_square_growth=growth).displacement_layers == ()


def test_a_forget_set_without_curvature_has_no_samples():
    x, model = torch.zeros(4, 1, dtype=torch.float64), nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    retain = normal(0, 9, 1)
    problem = UnlearningProblem(model, (x, x), (retain, 1.1 * retain), loss="mse")
    cause, _, _, _ = found_for(problem, GradDiff(lr=0.01, steps=3, batch_size=4))
    assert cause.forget_samples == ()
    assert (cause.forget_curvature, cause.mechanism) == (0.0, "none")


# ------------------------------------------------------------------ how far to believe it


def whole_network(problem):
    return linearise(problem, Identity(), rank=1000, retain_samples=None, forget_samples=None)


def rolled_out(network, algorithm, batches=(4, 4), seeds=(0, 1)):
    return rollout(network, algorithm, lr=[algorithm.lr], mix=[algorithm.mix], batch_sizes=batches, seeds=seeds)


@pytest.mark.parametrize("lr", [0.01, 0.1, 10.0])
def test_a_linear_model_is_its_linearisation(lr):
    problem = linear_problem()
    network = whole_network(problem)
    rolled = rolled_out(network, GradDiff(lr=lr, mix=0.3, steps=20))
    assert linearisation_errors(problem, network, rolled)[0] < 1e-8


def direct_error(problem, coordinates, network, share):
    """‖f(θ* + δ) - f - Jδ‖ / ‖Jδ‖ over both sets and all outputs that count, from the dense Jacobian."""
    delta = share * network.displacement(coordinates)
    wrong = moved = 0.0
    for which in ("retain", "forget"):
        outputs, targets, jacobian = (t.detach() for t in dense_jacobian(problem, which))
        counted = problem.loss.counted(outputs, targets)
        counts = 1.0 if counted is None else counted.reshape(outputs.shape)
        samples = getattr(problem, which)
        inputs, _ = samples.batch(torch.arange(samples.size))
        real = problem.outputs(problem.unflatten(problem.vector() + delta), inputs).detach()
        change = (jacobian @ delta).reshape(outputs.shape)
        wrong += float(((real - outputs - change) * counts).square().sum())
        moved += float((change * counts).square().sum())
    return math.sqrt(wrong / moved)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: CASES[i].name)
def test_the_error_is_that_of_the_real_outputs(case):
    problem = problem_of(case)
    problem.divergence_level = 1e6
    network = replace(whole_network(problem), divergence_level=1e6)
    errors = []
    for lr in (0.01, 0.3):
        rolled = rolled_out(network, GradDiff(lr=lr, mix=0.4, steps=6))
        errors.append(linearisation_errors(problem, network, rolled)[0])
        assert errors[-1] == pytest.approx(direct_error(problem, rolled.coordinates[0, 0], network, 1.0), rel=1e-5)
    assert 0 < errors[0] < errors[1]


def test_a_diverged_run_is_looked_at_where_it_meets_the_level():
    problem = problem_of(1)
    level = 2 * problem.retain_loss
    problem.divergence_level = level
    network = replace(whole_network(problem), divergence_level=level)
    rolled = rolled_out(network, GradDiff(lr=30.0, mix=0.5, steps=6))
    c = rolled.coordinates[0, 0]

    def excess(share):
        outputs, targets, jacobian = (t.detach() for t in dense_jacobian(problem, "retain"))
        moved = outputs + share * (jacobian @ network.displacement(c)).reshape(outputs.shape)
        return float(problem.loss.per_sample(moved, targets).mean()) - level

    assert excess(1.0) > 0
    # Squared error is a parabola in the share: it may fall first, and then meets the level once.
    share = scipy.optimize.brentq(excess, 0, 1, xtol=1e-13)
    assert share < 0.9
    expected = direct_error(problem, c, network, share)
    assert linearisation_errors(problem, network, rolled)[0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected / direct_error(problem, c, network, 1.0) - 1) > 0.01


class Exponential(nn.Module):
    """Overflows where its linearisation does not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def forward(self, x):
        return (self.weight * x).exp()


def test_outputs_that_overflow_are_infinitely_wrong():
    x = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).unsqueeze(1)
    problem = UnlearningProblem(Exponential(), (x[:4], x[:4].exp()), (x[4:], x[4:].exp() + 0.1), loss="mse")
    problem.divergence_level = 1e12
    network = replace(whole_network(problem), divergence_level=1e12)
    rolled = rolled_out(network, FineTune(lr=0.01, steps=3))
    assert linearisation_errors(problem, network, rolled)[0] < 1
    sign = torch.sign(network.displacement(torch.ones(1).double()))
    far = replace(rolled, coordinates=torch.full_like(rolled.coordinates, 1e4) * sign)
    assert linearisation_errors(problem, network, far)[0] == math.inf
    for value in (math.inf, math.nan):
        broken = replace(rolled, coordinates=torch.full_like(rolled.coordinates, value))
        assert linearisation_errors(problem, network, broken)[0] == math.inf


def test_a_run_that_goes_nowhere_has_no_error():
    problem = linear_problem()
    network = whole_network(problem)
    rolled = rolled_out(network, FineTune(lr=0.01, steps=2))
    still = replace(rolled, coordinates=torch.zeros_like(rolled.coordinates))
    assert linearisation_errors(problem, network, still)[0] == 0


# ------------------------------------------------------------------ advice


def test_a_smaller_mix_is_advised_by_number_only_where_the_boundary_is_near(digits_mlp, class_deletion):
    settings = {"lr": 0.3, "mix": 0.4, "steps": 40, "seeds": 2}
    report = stabkit.predict(digits_mlp, *class_deletion, mode="thorough", **settings)
    said = next(line for line in report.advice if "lower the mix" in line)
    advised = float(re.search(r"lower the mix to ([\d.e-]+) or less", said).group(1))
    assert advised < report.critical_mix_detail.low
    assert report.at(mix=advised).rollout.probability <= 0.05
    details = GradDiff(lr=0.3, mix=0.4), report.critical_lr_detail, report.critical_mix_detail
    near, far = (advice(*details, 1.0, 4.0, sure=True, near=near) for near in (True, False))
    said = next(line for line in near if "lower the mix" in line)
    told = float(re.search(r"lower the mix to ([\d.e-]+) or less", said).group(1))
    assert told == pytest.approx(report.critical_mix_detail.low / 4, rel=0.1)
    assert told <= report.critical_mix_detail.low / 4
    assert "Or keep step size 0.3 and lower the mix: `report.recommend()` looks how far." in far
