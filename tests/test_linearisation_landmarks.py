"""What moves a run's parameters whatever the gradients, weight decay and an L1 penalty, stays in the coordinates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit.algorithms import FineTune, GradDiff, L1Sparse, SalUn
from stabkit.curvature import linearisation_cost, linearise
from stabkit.measure import landmarks, measure
from stabkit.models import MLP
from stabkit.modes import MODES, Sizes
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.runner import run
from tests.cases import go_by_rows

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
SIZES = {"retain_samples": None, "forget_samples": None, "sketch_samples": None}


def problem_of(seed=0, n=60):
    """Few directions hold little of θ*: 206 parameters."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(8, 2, hidden=(18,), activation=nn.Tanh).double()
    x = torch.randn(n, 8, generator=g, dtype=torch.float64)
    with torch.no_grad():
        list(model.parameters())[-2].mul_(8)  # sure of itself, so that its loss is below the level
        y = model(x).argmax(1)
    return UnlearningProblem(model, (x[:15], y[:15]), (x[15:], y[15:]))


def masks(problem):
    kept = (torch.arange(problem.size) % 3 > 0).double()
    return Diagonal(kept)


@pytest.mark.parametrize("precondition", [lambda problem: Identity(), masks], ids=["identity", "mask"])
@pytest.mark.parametrize("rank", [1, 6, None])
@pytest.mark.parametrize("iterations", [0, 1])
def test_the_basis_spans_the_landmarks_besides_the_leading_directions(precondition, rank, iterations):
    problem = problem_of()
    p, g = precondition(problem), torch.Generator().manual_seed(5)
    marks = [problem.vector(), torch.randn(problem.size, generator=g, dtype=torch.float64)]
    settings = {"rank": rank, "max_rank": 12, "tolerance": 0.3, "power_iterations": iterations, **SIZES}
    plain = linearise(problem, p, **settings)
    network = linearise(problem, p, landmarks=marks, **settings)
    assert (plain.landmarks, network.landmarks) == (0, 2)
    assert network.rank == plain.rank + 2
    torch.testing.assert_close(network.basis.T @ network.basis, torch.eye(network.rank, dtype=torch.float64))
    for u in marks:
        rooted = p.sqrt(u)
        left = rooted - network.basis @ (network.basis.T @ rooted)
        assert left.norm() < 1e-10 * rooted.norm()
        outside = rooted - plain.basis @ (plain.basis.T @ rooted)
        assert outside.norm() > 0.1 * rooted.norm()  # which they did not
    # The leading directions carry what they did, or a little more, and the features are those of the directions.
    r = plain.rank
    assert bool((network.singular_values[:r] >= plain.singular_values - 1e-10).all())
    for samples, part in ((problem.retain, network.retain), (problem.forget, network.forget)):
        inputs, _ = samples.batch(part.indices)

        def outputs(theta, inputs=inputs):
            return problem.outputs(problem.unflatten(theta), inputs)

        for j in (0, r, r + 1):
            moved = torch.func.jvp(outputs, (problem.vector(),), (p.sqrt(network.basis[:, j]),))[1]
            torch.testing.assert_close(part.features[..., j], moved, rtol=1e-8, atol=1e-10)


def test_what_is_spanned_already_or_taken_nothing_of_adds_no_direction():
    problem = problem_of()
    network = linearise(problem, Identity(), rank=20, **SIZES)
    inside = network.basis @ torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    again = linearise(problem, Identity(), rank=20, landmarks=[inside, torch.zeros_like(inside)], **SIZES)
    assert again.landmarks <= 1  # the leading ones turn a little with another column to draw from
    outside = torch.zeros(problem.size, dtype=torch.float64)
    outside[0] = 1.0  # which the mask takes out
    assert linearise(problem, masks(problem), rank=5, landmarks=[outside], **SIZES).landmarks == 0
    everything = linearise(problem, Identity(), rank=problem.size, landmarks=[problem.vector()], **SIZES)
    assert everything.rank <= problem.size


def test_a_landmark_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`landmarks` of `linearise` must be vectors of shape \(200,\); got one of"):
        linearise(problem_of(), Identity(), landmarks=[torch.ones(3)])


def test_half_the_rank_keeps_the_landmarks():
    problem = problem_of()
    network = linearise(problem, Identity(), rank=10, landmarks=[problem.vector()], **SIZES)
    half = network.thinned(rank=6)
    assert (half.rank, half.landmarks, network.rank) == (6, 1, 11)
    kept = [0, 1, 2, 3, 4, 10]
    assert torch.equal(half.basis, network.basis[:, kept])
    assert torch.equal(half.metric, network.metric[kept][:, kept])
    assert torch.equal(half.anchor, network.anchor[kept])
    assert torch.equal(half.singular_values, network.singular_values[kept])
    assert torch.equal(half.retain.features, network.retain.features[..., kept])
    assert network.thinned().rank == 11


@pytest.mark.parametrize("by_rows", [True, False])
def test_landmarks_cost_what_is_said(monkeypatch, by_rows):
    problem = problem_of()
    go_by_rows(monkeypatch, by_rows)
    network = linearise(problem, Identity(), rank=4, landmarks=[problem.vector()], **SIZES)
    told = linearisation_cost((45, 15), (45, 15), 2 if by_rows else 10**9, 4, landmarks=1, rows_kept=60)
    assert network.gradient_equivalents == pytest.approx(told)


# ---------------------------------------------------------------------- runs


@given(
    share=st.floats(0.05, 0.4),
    momentum=st.sampled_from([0.0, 0.9]),
    schedule=st.sampled_from([None, "cosine"]),
    masked=st.booleans(),
)
def test_decay_moves_the_parameters_as_in_the_run(share, momentum, schedule, masked):
    problem, lr, steps = problem_of(), 1e-7, 30  # the gradients do nothing at this step size
    decay = share * (1 - momentum) / (lr * steps)
    kind = SalUn if masked else GradDiff
    algorithm = kind(
        lr=lr, steps=steps, batch_size=5, mix=0.3, weight_decay=decay, momentum=momentum, lr_schedule=schedule
    )
    p = algorithm.step_preconditioner(problem)
    found = linearise(problem, p, rank=4, landmarks=landmarks(problem, algorithm, p), **SIZES)
    rolled = rollout(found, algorithm, lr=[lr], mix=[0.3], batch_sizes=(5, 5), seeds=[0])
    moved = found.displacement(rolled.coordinates[0, 0])
    real = run(problem, algorithm, preconditioner=p)
    there = torch.cat([v.detach().reshape(-1) for v in real.model.parameters()]) - problem.vector()
    assert real.steps == steps
    assert there.norm() > 0.003 * problem.vector().norm()
    assert (moved - there).norm() < 1e-4 * there.norm()
    without = linearise(problem, p, rank=4, **SIZES)
    lost = rollout(without, algorithm, lr=[lr], mix=[0.3], batch_sizes=(5, 5), seeds=[0])
    assert (without.displacement(lost.coordinates[0, 0]) - there).norm() > 0.3 * there.norm()


def test_the_pull_of_an_l1_penalty_moves_the_parameters_as_in_the_run():
    problem = problem_of()
    algorithm = L1Sparse(
        lr=1e-7, steps=30, batch_size=5, penalty=10.0
    )  # by 1.5e-5 in all, past no weight's zero but few
    p = algorithm.step_preconditioner(problem)
    found = linearise(problem, p, rank=4, landmarks=landmarks(problem, algorithm, p), **SIZES)
    rolled = rollout(found, algorithm, lr=[1e-7], mix=[0.0], batch_sizes=(5, 5), seeds=[0])
    real = run(problem, algorithm, preconditioner=p)
    there = torch.cat([v.detach().reshape(-1) for v in real.model.parameters()]) - problem.vector()
    assert there.abs().max() == pytest.approx(1e-7 * 10.0 * 15.5, rel=0.05)
    assert (found.displacement(rolled.coordinates[0, 0]) - there).norm() < 0.1 * there.norm()


def trained():
    """A problem on digits whose network is trained."""
    from stabkit.datasets import digits
    from stabkit.training import train

    data = digits()
    x, y = data.x_train.flatten(1)[:700], data.y_train[:700]
    model = train(nn.Sequential(nn.Flatten(), MLP(64, 10, hidden=(24,))), x, y, epochs=25, lr=3e-3)
    return UnlearningProblem(model, (x[:100], y[:100]), (x[100:], y[100:]))


@pytest.mark.parametrize(
    "algorithm",
    [
        GradDiff(lr=0.03, mix=0.1, steps=150, weight_decay=0.15),
        GradDiff(lr=0.01, mix=0.1, steps=100, weight_decay=0.1, momentum=0.9),
    ],
    ids=["plain", "momentum"],
)
def test_staged_predictions_know_what_decay_does_to_the_loss(algorithm):
    problem = trained()
    settings = Sizes(rank=30).settings(MODES["thorough"], curvature="hessian", seed=0)
    measurement = measure(problem, algorithm, settings)
    from stabkit.staged import staged_rollout

    found = staged_rollout(
        problem, measurement.network, algorithm, batch_sizes=algorithm.batch_sizes(problem), seeds=[0]
    )
    said = float(found.rollout.retain_loss[0, 0, -1])
    real = run(problem, algorithm, seed=777, monitor_samples=None)
    assert not real.diverged
    assert real.trajectory[-1].retain_loss > 2 * problem.retain_loss  # which is the decay's doing
    assert said == pytest.approx(real.trajectory[-1].retain_loss, rel=0.05)


def test_a_decay_that_was_not_measured_for_is_measured_and_another_one_is_free():
    problem = problem_of()
    settings = Sizes(rank=5).settings(MODES["fast"], curvature="hessian", seed=0)
    plain = measure(problem, GradDiff(lr=0.01, steps=10, batch_size=5), settings)
    assert plain.network.landmarks == 0
    decayed = plain.with_algorithm(plain.algorithm.replace(weight_decay=1e-3))
    assert decayed.network.landmarks == 1
    assert sum(cost.gradient_equivalents for cost in decayed.costs) > 0
    for other in (0.0, 5e-3):
        again = decayed.with_algorithm(decayed.algorithm.replace(weight_decay=other))
        assert again.network is decayed.network
        assert sum(cost.gradient_equivalents for cost in again.costs) == 0
    assert decayed.with_algorithm(decayed.algorithm.replace(mix=0.7)).network is decayed.network
    # Another algorithm with P = I reuses a network only if that has the direction too.
    other = FineTune(lr=0.01, steps=10, batch_size=5)
    assert plain.with_algorithm(other).network is plain.network
    assert plain.with_algorithm(other.replace(weight_decay=1e-3)).network.landmarks == 1
    assert decayed.with_algorithm(other.replace(weight_decay=1e-3)).network is decayed.network


def test_a_report_with_decay_says_what_a_run_does():
    problem = trained()
    algorithm = GradDiff(lr=0.03, mix=0.1, steps=150, weight_decay=0.15)
    report = stabkit.predict(
        problem.new_model(),
        *((s.batch(torch.arange(s.size))) for s in (problem.forget, problem.retain)),
        algorithm=algorithm,
    )
    assert report.verdict == "stable"
    assert math.isfinite(report.critical_lr)
