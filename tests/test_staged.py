"""The staged rollout: the real run where nothing is believed, the plain rollout where one linearisation is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabkit.algorithms import SCRUB, FineTune, GradDiff, SalUn, SFROn
from stabkit.curvature import linearise
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.runner import run
from stabkit.staged import staged_rollout

STEPS = 9  # all of them looked at, so that every one can have its own linearisation
EVERYTHING = {"rank": 10_000, "retain_samples": None, "forget_samples": None}


def small_problem(model):
    """Three classes of 60 points, and the model a little trained on them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return UnlearningProblem(model, (x[:16], y[:16]), (x[16:], y[16:]))


def curved():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def everything(problem, preconditioner):
    return linearise(problem, preconditioner, rank=10_000, retain_samples=None, forget_samples=None)


@pytest.mark.parametrize(
    "algorithm",
    [
        GradDiff(lr=0.5, mix=0.4, steps=STEPS, batch_size=8),
        GradDiff(lr=0.2, mix=0.4, steps=STEPS, batch_size=8, momentum=0.9),
        GradDiff(lr=0.3, mix=0.4, steps=STEPS, batch_size=8, momentum=0.8, nesterov=True, weight_decay=0.1),
        GradDiff(lr=0.5, mix=0.6, steps=STEPS, batch_size=8, max_gradient_norm=0.2, lr_schedule="cosine"),
        GradDiff(lr=0.5, mix=0.6, steps=STEPS, batch_size=8, forget_every=3, sampling="poisson"),
        FineTune(lr=0.5, steps=STEPS, batch_size=8),
        SCRUB(lr=0.5, steps=STEPS, batch_size=8),
        SalUn(lr=0.5, steps=STEPS, batch_size=8),
        SFROn(lr=0.2, steps=STEPS, batch_size=8),
    ],
    ids=lambda a: f"{a.name}-{a.momentum:g}-{a.max_gradient_norm or 0:g}-{a.forget_every or 0}",
)
@pytest.mark.parametrize("real_steps", [0, 2, None])
def test_where_nothing_is_believed_it_is_the_real_run(algorithm, real_steps):
    problem = small_problem(curved())
    preconditioner = algorithm.preconditioner(problem)
    found = staged_rollout(
        problem,
        everything(problem, preconditioner),
        algorithm,
        batch_sizes=algorithm.batch_sizes(problem),
        seeds=[3],
        max_loss_error=1e-15,
        max_stages=100,
        real_steps=real_steps,
        **EVERYTHING,
    )
    kinds = [stage.kind for stage in found.stages[0]]
    assert kinds.count("linearised") == {0: STEPS, 2: 2, None: 1}[real_steps]
    real = run(
        problem, algorithm, preconditioner=preconditioner, seed=3, stop_on_divergence=False, monitor_samples=None
    )
    assert [c.step for c in real.trajectory] == found.rollout.steps.tolist()
    for name in ("retain_loss", "forget_loss"):
        truth = torch.tensor([getattr(c, name) for c in real.trajectory], dtype=torch.float64)
        torch.testing.assert_close(getattr(found.rollout, name)[0, 0], truth, rtol=1e-6, atol=1e-8)
    # One linearisation is not enough for that: the test is about something.
    once = rollout(
        everything(problem, preconditioner),
        algorithm,
        lr=[algorithm.lr],
        mix=[algorithm.mix],
        batch_sizes=algorithm.batch_sizes(problem),
        seeds=[3],
    )
    assert float((once.retain_loss - found.rollout.retain_loss).abs().max()) > 1e-4


def test_stages_follow_on_one_another():
    problem = small_problem(curved())
    algorithm = GradDiff(lr=0.3, mix=0.5, steps=60, batch_size=8)
    network = everything(problem, Identity())
    found = staged_rollout(
        problem, network, algorithm, batch_sizes=(8, 8), seeds=[0, 1], max_loss_error=0.01, real_steps=5
    )
    assert found.rollout.kind == "staged"
    assert found.rollout.score.shape == (2, 1)
    for stages, crossing in zip(found.stages, found.rollout.divergence_step[:, 0], strict=True):
        assert len(stages) > 1
        assert stages[0].first_step == 0
        assert stages[0].retain_loss == pytest.approx(problem.retain_loss)
        assert [s.first_step for s in stages[1:]] == [s.last_step for s in stages[:-1]]
        assert stages[-1].last_step == (algorithm.steps if crossing.isnan() else int(crossing))
        assert {s.kind for s in stages} == {"linearised", "real"}
    steps = sum(s.last_step - s.first_step for stages in found.stages for s in stages if s.kind == "real")
    assert found.gradient_equivalents > 16 * steps


def test_a_linear_network_needs_one_stage_and_gives_the_plain_rollout():
    torch.manual_seed(1)
    problem = small_problem(nn.Linear(4, 3).double())
    algorithm = GradDiff(lr=0.1, mix=0.5, steps=30, batch_size=8, momentum=0.5)
    network = everything(problem, Identity())
    found = staged_rollout(problem, network, algorithm, batch_sizes=(8, 8), seeds=[0])
    plain = rollout(network, algorithm, lr=[0.1], mix=[0.5], batch_sizes=(8, 8), seeds=[0])
    assert float(plain.score[0, 0]) < 0
    assert len(found.stages[0]) == 1
    assert found.stages[0][0].output_error < 1e-9
    torch.testing.assert_close(found.rollout.retain_loss, plain.retain_loss)
    torch.testing.assert_close(found.rollout.score, plain.score)


def test_the_number_of_stages_is_kept_to():
    problem = small_problem(curved())
    algorithm = GradDiff(lr=0.3, mix=0.5, steps=60, batch_size=8)
    network = everything(problem, Identity())
    options = {"max_loss_error": 1e-9, "max_stages": 3, "real_steps": 0}
    found = staged_rollout(problem, network, algorithm, batch_sizes=(8, 8), seeds=[0], **options)
    assert len(found.stages[0]) == 3
    assert found.stages[0][-1].loss_error > 1e-9


def test_a_preconditioner_is_kept():
    problem = small_problem(curved())
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    algorithm = GradDiff(lr=0.5, mix=0.4, steps=STEPS, batch_size=8, momentum=0.7)
    preconditioner = Diagonal(p)
    found = staged_rollout(
        problem,
        everything(problem, preconditioner),
        algorithm,
        batch_sizes=(8, 8),
        seeds=[2],
        max_loss_error=1e-15,
        max_stages=100,
        real_steps=0,
        **EVERYTHING,
    )
    real = run(
        problem, algorithm, preconditioner=preconditioner, seed=2, stop_on_divergence=False, monitor_samples=None
    )
    truth = torch.tensor([c.retain_loss for c in real.trajectory], dtype=torch.float64)
    torch.testing.assert_close(found.rollout.retain_loss[0, 0], truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_loss_error": 0.0}, r"`max_loss_error` of `staged_rollout` must .*; got 0\.0"),
        ({"max_stages": 0}, r"`max_stages` of `staged_rollout` must .*; got 0"),
        ({"real_steps": -1}, r"`real_steps` of `staged_rollout` must .*; got -1"),
        ({"seeds": []}, r"`seeds` of `staged_rollout` must name at least one seed; got none"),
    ],
)
def test_bad_arguments_are_named(options, message):
    problem = small_problem(curved())
    algorithm = GradDiff(lr=0.5, steps=3, batch_size=8)
    with pytest.raises(ValueError, match=message):
        staged_rollout(
            problem, everything(problem, Identity()), algorithm, batch_sizes=(8, 8), **{"seeds": [0], **options}
        )
