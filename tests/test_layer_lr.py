"""Step sizes by layer: the steps they make, what they predict, and what is wrong with a bad one."""

from __future__ import annotations

import pytest
import torch

import stabkit
from stabkit.algorithms import AGU, GradDiff, RemainNewton
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem
from stabkit.runner import run


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
            lambda p: RemainNewton(layer_lr={"1": 0.1}, rank=2, curvature_samples=8).step_preconditioner(p),
            ValueError,
            r"`layer_lr` of `RemainNewton` must be None, as its P is not diagonal; got \{'1': 0\.1\}",
        ),
    ],
)
def test_bad_factors_are_named(digits_mlp, random_deletion, call, error, message):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    with pytest.raises(error, match=message):
        call(problem)
