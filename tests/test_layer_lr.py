"""Step sizes by layer: the steps they make, what they predict, and what is wrong with a bad one."""

from __future__ import annotations

import pytest
import torch

import stabkit
from stabkit.algorithms import AGU, GradDiff, L1Sparse, RemainNewton
from stabkit.curvature import linearise
from stabkit.measure import MeasureSettings, measure
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.runner import run
from stabkit.theory import _dynamics, _edges


def test_a_layer_takes_its_own_share_of_a_step(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    plain = run(problem, GradDiff(lr=0.1, steps=1))
    damped = run(problem, GradDiff(lr=0.1, steps=1, layer_lr={"3": 0.25, "3.bias": 2.0}))
    factors = {"1.weight": 1.0, "1.bias": 1.0, "3.weight": 0.25, "3.bias": 2.0}
    for (name, before), after, other in zip(
        problem.parameters.items(), plain.model.parameters(), damped.model.parameters(), strict=True
    ):
        torch.testing.assert_close(other - before, factors[name] * (after - before), rtol=1e-4, atol=1e-7)


def test_a_frozen_layer_stays(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    after = dict(run(problem, GradDiff(lr=0.1, steps=5, layer_lr={"1": 0})).model.named_parameters())
    assert torch.equal(after["1.weight"], problem.parameters["1.weight"])
    assert not torch.equal(after["3.weight"], problem.parameters["3.weight"])


def test_factors_multiply_a_diagonal(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    plain = AGU().step_preconditioner(problem).diagonal
    damped = AGU(layer_lr={"1": 0.5}).step_preconditioner(problem)
    assert isinstance(damped, Diagonal)
    first = problem.parameters["1.weight"].numel() + problem.parameters["1.bias"].numel()
    torch.testing.assert_close(damped.diagonal, torch.cat([plain[:first] / 2, plain[first:]]))


def test_clipping_is_of_the_gradient_that_step_sizes_multiply(digits_mlp, random_deletion):
    """As torch.nn.utils.clip_grad_norm_ before a step of groups."""
    problem = UnlearningProblem(digits_mlp, *random_deletion, dtype=torch.float64)
    settings = {"lr": 0.1, "steps": 1, "max_gradient_norm": 1e-3}
    plain, damped = (run(problem, GradDiff(layer_lr=layers, **settings)) for layers in (None, {"3": 0.25}))
    for (name, before), after, other in zip(
        problem.parameters.items(), plain.model.parameters(), damped.model.parameters(), strict=True
    ):
        factor = 0.25 if name.startswith("3") else 1.0
        torch.testing.assert_close(other - before, factor * (after - before), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [({"weight_decay": 0.1, "layer_weight_decay": {"3": 0.0}}, "decays"), ({"layer_lr": {"3": 0.5}}, "paces")],
)
def test_a_network_that_lacks_layers_factors_is_refused(digits_mlp, random_deletion, settings, factors):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.01, steps=3, max_gradient_norm=0.1, **settings)
    p = algorithm.step_preconditioner(problem)
    sizes = {"rank": 8, "retain_samples": 16, "forget_samples": 8}
    rolling = {"lr": [0.01], "mix": [0.5], "batch_sizes": (8, 8)}
    with pytest.raises(ValueError, match=f"`network` of `rollout` must be made with `{factors}` for an algorithm with"):
        rollout(linearise(problem, p, **sizes), algorithm, **rolling)
    given = {"paces": algorithm.layer_factors(problem), "decays": algorithm.decay_factors(problem)}
    rollout(linearise(problem, p, **sizes, **given).thinned(rank=4), algorithm, **rolling)


def test_decay_of_layers_in_the_linear_theory(digits_mlp, random_deletion):
    """γ V^T P^{1/2} E P^{1/2} V joins D and γ V^T P^{1/2} E θ* the drift; λ of D moves by γ vᵀP^{1/2}EP^{1/2}v."""
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.1, weight_decay=0.5, layer_lr={"1": 0.5}, layer_weight_decay={"3": 0.0, "1.bias": 3.0})
    settings = MeasureSettings(
        curvature="hessian", rank=12, retain_samples=64, forget_samples=32, spectrum_samples=64, seed=0
    )
    found = measure(problem, algorithm, settings)
    network, theta = found.network, problem.vector()
    rates, decays = algorithm.layer_factors(problem), algorithm.decay_factors(problem)
    assert set(rates.tolist()) == {0.5, 1.0}
    assert set(decays.tolist()) == {0.0, 1.0, 3.0}
    rooted = rates.sqrt().unsqueeze(1) * network.basis
    metric, anchor = rooted.T @ (decays.unsqueeze(1) * rooted), rooted.T @ (decays * theta)
    dynamics = _dynamics(found, algorithm.batch_sizes(problem))
    torch.testing.assert_close(
        dynamics.decay_hessian(), 0.5 * metric.to(dynamics.decay_hessian()), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        dynamics.decay_gradient(), 0.5 * anchor.to(dynamics.decay_gradient()), rtol=1e-4, atol=1e-5
    )
    pairs, moved = found.spectrum.pairs, _edges(found)
    for place, before, after in ((0, pairs.smallest, moved[0]), (-1, pairs.largest, moved[1])):
        v = pairs.vectors[:, place]
        assert after - before == pytest.approx(0.5 * float((rates * decays * v * v).sum()), rel=1e-3)
    begun = decays * theta * rates.sqrt()  # lies in the coordinates
    outside = begun - network.basis @ (network.basis.T @ begun)
    assert float(outside.norm()) < 1e-4 * float(begun.norm())


@pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")
def test_damping_moves_the_critical_step_as_the_step_itself_does(digits_mlp, random_deletion):
    settings = {
        "rank": 30,
        "retain_samples": 128,
        "forget_samples": 64,
        "spectrum_samples": 64,
        "steps": 30,
        "seeds": 1,
    }
    plain = stabkit.predict(digits_mlp, *random_deletion, algorithm=GradDiff(lr=0.1), **settings)
    half = stabkit.predict(
        digits_mlp, *random_deletion, algorithm=GradDiff(lr=0.1, layer_lr={"1": 0.5, "3": 0.5}), **settings
    )
    assert half.critical_lr == pytest.approx(2 * plain.critical_lr, rel=0.1)
    assert stabkit.Report.from_json(half.to_json()) == half
    assert half.run.settings["layer_lr"] == {"1": 0.5, "3": 0.5}
    assert "layer_lr=0.5 of 1, 3," in str(half)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: GradDiff(layer_lr=0.1), TypeError, r"`layer_lr` of `GradDiff` must map .*; got 0\.1"),
        (lambda p: GradDiff(layer_lr={}), TypeError, r"`layer_lr` of `GradDiff` must map .*; got \{\}"),
        (lambda p: GradDiff(layer_lr={"1": -1.0}), ValueError, r"`layer_lr\['1'\]` of `GradDiff` must .*; got -1\.0"),
        (
            lambda p: GradDiff(layer_lr={"head": 0.1}).step_preconditioner(p),
            ValueError,
            r"`layer_lr` of `GradDiff` must name layers of the model; got 'head'.* There are 1, 3\.",
        ),
        (
            lambda p: GradDiff(layer_weight_decay={"3": "no"}),
            TypeError,
            r"`layer_weight_decay\['3'\]` of `GradDiff` must .*; got 'no'",
        ),
        (
            lambda p: GradDiff(layer_weight_decay={"head": 0.0}).decay_factors(p),
            ValueError,
            r"`layer_weight_decay` of `GradDiff` must name layers of the model; got 'head'",
        ),
        (
            lambda p: RemainNewton(layer_lr={"1": 0.1}, rank=2, curvature_samples=8).step_preconditioner(p),
            ValueError,
            r"`layer_lr` of `RemainNewton` must be None, as its P is not diagonal; got \{'1': 0\.1\}.* one step size\.$",
        ),
        (
            lambda p: L1Sparse(layer_lr={"1": 0.1}).step_preconditioner(p),
            ValueError,
            r"must be None, as SGD goes by a mask or signs of its own there; got .* one step size, or take AdamW\.$",
        ),
    ],
)
def test_bad_factors_are_named(digits_mlp, random_deletion, call, error, message):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    with pytest.raises(error, match=message):
        call(problem)
