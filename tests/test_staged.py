"""The staged rollout: the real run where nothing is believed, the plain rollout where one linearisation is right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stabkit.algorithms import AGU, SCRUB, FineTune, GradDiff, SalUn, SFROn
from stabkit.curvature import linearise
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import SCORE_CAP, rollout
from stabkit.runner import run
from stabkit.staged import _Run, first_look, staged_rollout

STEPS = 14
NOTHING = {"max_loss_error": 1e-15, "max_output_error": 1e-15}


def small_problem(model, **options):
    """Three classes of 60 points, and the model a little trained on them."""
    g = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    x = torch.randn(60, 4, generator=g, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5)
    x = x.to(dtype)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return UnlearningProblem(model, (x[:16], y[:16]), (x[16:], y[16:]), **options)


def curved():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def everything(problem, preconditioner, rank=10_000):
    return linearise(problem, preconditioner, rank=rank, retain_samples=None, forget_samples=None)


def staged(problem, algorithm, *, seed=3, preconditioner=None, rank=10_000, **options):
    preconditioner = preconditioner or algorithm.preconditioner(problem)
    sizes = algorithm.batch_sizes(problem)
    network = everything(problem, preconditioner, rank)
    return staged_rollout(problem, network, algorithm, batch_sizes=sizes, seeds=[seed], **options)


def real_run(problem, algorithm, *, seed=3, preconditioner=None):
    preconditioner = preconditioner or algorithm.preconditioner(problem)
    return run(
        problem, algorithm, preconditioner=preconditioner, seed=seed, stop_on_divergence=False, monitor_samples=None
    )


def compare(found, real, upto=math.inf):
    """Losses at every look up to a step."""
    looks = [c for c in real.trajectory if c.step <= upto]
    assert [c.step for c in looks] == [k for k in found.rollout.steps.tolist() if k <= min(upto, real.steps)]
    for name in ("retain_loss", "forget_loss"):
        truth = torch.tensor([getattr(c, name) for c in looks], dtype=torch.float64)
        torch.testing.assert_close(getattr(found.rollout, name)[0, 0, : len(looks)], truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "algorithm",
    [
        GradDiff(lr=0.1, mix=0.4, steps=STEPS, batch_size=8),
        GradDiff(lr=0.02, mix=0.4, steps=STEPS, batch_size=8, momentum=0.9),
        GradDiff(lr=0.05, mix=0.4, steps=STEPS, batch_size=8, momentum=0.8, nesterov=True, weight_decay=0.1),
        GradDiff(lr=0.5, mix=0.6, steps=STEPS, batch_size=8, max_gradient_norm=0.2, lr_schedule="cosine"),
        GradDiff(lr=0.2, mix=0.4, steps=STEPS, batch_size=8, forget_every=3, sampling="poisson"),
        FineTune(lr=0.5, steps=STEPS, batch_size=8),
        SCRUB(lr=0.1, steps=STEPS, batch_size=8),
        SalUn(lr=0.1, steps=STEPS, batch_size=8),
        SFROn(lr=0.05, steps=STEPS, batch_size=8),
    ],
    ids=lambda a: f"{a.name}-{a.momentum:g}-{a.max_gradient_norm or 0:g}-{a.forget_every or 0}",
)
def test_where_nothing_is_believed_it_is_the_real_run(algorithm):
    problem = small_problem(curved())
    real = real_run(problem, algorithm)
    assert not real.diverged
    found = staged(problem, algorithm, rank=7, **NOTHING)
    assert found.handovers[0].step == 0
    assert found.real_steps == STEPS
    compare(found, real)
    assert bool(found.rollout.divergence_step.isnan().all())
    # One linearisation is not enough for that: the test is about something.
    once = rollout(
        everything(problem, algorithm.preconditioner(problem), 7),
        algorithm,
        lr=[algorithm.lr],
        mix=[algorithm.mix],
        batch_sizes=algorithm.batch_sizes(problem),
        seeds=[3],
    )
    assert float((once.retain_loss - found.rollout.retain_loss).abs().max()) > 1e-4


@pytest.mark.parametrize("check_every", [1, 10])
def test_ten_steps_past_a_crossing_say_how_far_the_run_goes(check_every):
    """The looks after it may be one step apart, and the run grows a little in each."""
    problem = small_problem(curved(), check_every=check_every)
    algorithm = GradDiff(lr=0.2, mix=0.8, steps=80, batch_size=16)
    real = real_run(problem, algorithm)
    levels = [(c.step, math.log(c.retain_loss / problem.divergence_level)) for c in real.trajectory]
    crossing = next(step for step, score in levels if score >= 0)
    last = next(step for step, _ in levels if step >= crossing + 10)
    assert last < 80
    found = staged(problem, algorithm, rank=7, **NOTHING)
    assert found.rollout.divergence_step.item() == crossing
    assert found.real_steps == last
    worst = max(score for step, score in levels if step <= last)
    assert found.rollout.score.item() == pytest.approx(worst, abs=1e-6)
    assert worst < SCORE_CAP  # which would have ended it
    if check_every == 1:  # the next look says much less
        assert worst > 3 * max(score for step, score in levels if step <= crossing + 1)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_what_is_handed_over_is_where_the_run_is(momentum, preconditioned):
    """Of a linear network all is right: whatever the bounds, parameters and velocity carry on as in the real run."""
    torch.manual_seed(1)
    problem = small_problem(nn.Linear(4, 3).double())
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    preconditioner = Diagonal(p) if preconditioned else Identity()
    algorithm = GradDiff(lr=0.3 if momentum else 1.0, mix=0.5, steps=30, batch_size=8, momentum=momentum)
    real = real_run(problem, algorithm, preconditioner=preconditioner)
    assert real.diverged
    found = staged(problem, algorithm, preconditioner=preconditioner)
    handover = found.handovers[0]
    crossing = next(c.step for c in real.trajectory if c.retain_loss >= problem.divergence_level)
    assert 0 < handover.step < crossing == int(found.rollout.divergence_step[0, 0])
    # One look further than the crossing, and not one more.
    after = next((c.step for c in real.trajectory if c.step > crossing), crossing)
    assert handover.step + handover.real_steps == after
    compare(found, real, upto=after)
    worst = max(c.retain_loss for c in real.trajectory if c.step <= after)
    assert float(found.rollout.score[0, 0]) == pytest.approx(math.log(worst / problem.divergence_level), rel=1e-6)


def test_a_linear_network_is_left_nowhere_and_gives_the_plain_rollout():
    torch.manual_seed(1)
    problem = small_problem(nn.Linear(4, 3).double())
    algorithm = GradDiff(lr=0.1, mix=0.5, steps=30, batch_size=8, momentum=0.5)
    found = staged(problem, algorithm, seed=0)
    plain = rollout(everything(problem, Identity()), algorithm, lr=[0.1], mix=[0.5], batch_sizes=(8, 8), seeds=[0])
    assert float(plain.score[0, 0]) < 0
    assert found.rollout.kind == "staged"
    assert found.handovers[0].step == 30
    assert found.real_steps == 0
    assert found.handovers[0].output_error < 1e-9
    torch.testing.assert_close(found.rollout.retain_loss, plain.retain_loss)
    torch.testing.assert_close(found.rollout.score, plain.score)


def test_either_bound_decides():
    problem = small_problem(curved())
    algorithm = GradDiff(lr=0.05, mix=0.4, steps=60, batch_size=8)
    loose = {"max_loss_error": 10.0, "max_output_error": 10.0}
    assert staged(problem, algorithm, **loose).real_steps == 0
    for bound, between in (("max_loss_error", 1e-5), ("max_output_error", 0.01)):
        handovers = [
            staged(problem, algorithm, **{**loose, bound: value}).handovers[0] for value in (1e-12, between, 10.0)
        ]
        assert handovers[0].step < handovers[1].step < handovers[2].step == 60, bound
        assert 0 < getattr(handovers[1], bound.removeprefix("max_")) <= between


def test_steps_before_a_place_are_held_against_real_ones():
    """Small steps at first say little of large ones later, before which the run goes on for real."""
    problem = small_problem(curved())
    schedule = (0.1,) * 6 + (1.0,) * (STEPS - 6)
    algorithm = GradDiff(lr=0.8, mix=0.4, steps=STEPS, batch_size=8, lr_schedule=schedule)
    network = linearise(problem, Identity(), rank=4, retain_samples=None, forget_samples=None)
    loose = {"max_loss_error": 10.0, "max_output_error": 10.0}
    believed, trusting = (
        rolled_out(problem, network, algorithm, max_path_error=bound, **loose) for bound in (0.5, 1e9)
    )
    assert trusting.handovers[0].step == STEPS
    assert trusting.handovers[0].path_error > 0.5
    assert 0 < believed.handovers[0].step < STEPS
    assert believed.handovers[0].path_error <= 0.5
    real = real_run(problem, algorithm).trajectory[-1].forget_loss
    wrong = [abs(float(found.rollout.forget_loss[0, 0, -1]) - real) for found in (believed, trusting)]
    assert 5 * wrong[0] < wrong[1]
    # Halfway is looked at as well where the end is right.
    wide = linearise(problem, Identity(), rank=40, retain_samples=None, forget_samples=None)
    steps = [
        rolled_out(problem, wide, algorithm, max_path_error=bound, **loose).handovers[0].step
        for bound in (0.1, 0.2, 0.3)
    ]
    assert steps == sorted(steps)
    assert steps[0] < steps[2] == STEPS


@pytest.mark.parametrize("rule", [{"drift_tolerance": 0.01}, {"leakage_bound": 0.02, "lr": 2.0}])
@pytest.mark.parametrize(
    "options", [NOTHING, {"max_loss_error": 10.0, "max_output_error": 10.0, "max_path_error": 10.0}]
)
def test_the_algorithms_own_rule_ends_it(rule, options):
    problem = small_problem(curved())
    changes = {"lr": 0.05, "drift_tolerance": None, "leakage_bound": None, **rule}
    algorithm = AGU(mix=0.3, steps=60, batch_size=8, **changes)
    real = real_run(problem, algorithm)
    assert real.stop_reason in {"drift", "leakage"}
    assert real.steps < 60
    found = staged(problem, algorithm, **options)
    handover = found.handovers[0]
    if options is NOTHING:
        assert handover.real_steps == real.steps == int(found.rollout.stopped_step[0, 0])
        assert float(found.rollout.retain_loss[0, 0, -1]) == pytest.approx(real.trajectory[-1].retain_loss, rel=1e-6)
    else:
        assert handover.real_steps == 0
        assert handover.step == int(found.rollout.stopped_step[0, 0]) < 60


def test_rounding_is_no_error():
    """In single precision a step too small to move the outputs past rounding is believed."""
    problem = small_problem(curved().float())
    found = staged(problem, GradDiff(lr=1e-7, mix=0.4, steps=30, batch_size=8))
    assert found.real_steps == 0
    # First steps; at the end of the run and halfway four more, with two passes for these; three others: first, end and peak.
    n, batches = problem.retain.size + problem.forget.size, 4 * 16
    assert found.gradient_equivalents == pytest.approx(3 * batches + (3 + 2 * 2) * n / 3)


def test_seeds_are_runs_of_their_own():
    problem = small_problem(curved())
    algorithm = GradDiff(lr=0.3, mix=0.5, steps=60, batch_size=8)
    network = everything(problem, Identity())
    both = staged_rollout(problem, network, algorithm, batch_sizes=(8, 8), seeds=[0, 1])
    assert both.rollout.score.shape == (2, 1)
    for i, handover in enumerate(both.handovers):
        one = staged_rollout(problem, network, algorithm, batch_sizes=(8, 8), seeds=[i])
        assert one.handovers == (handover,)
        torch.testing.assert_close(one.rollout.retain_loss[0], both.rollout.retain_loss[i])
    assert both.real_steps == sum(h.real_steps for h in both.handovers) / 2 > 0
    assert both.gradient_equivalents > 16 * 2 * both.real_steps


def test_a_model_past_the_level_is_left_at_that():
    problem = small_problem(curved())
    problem.divergence_level = problem.retain_loss / 2
    found = staged(problem, GradDiff(lr=0.1, steps=5, batch_size=8))
    assert found.rollout.divergence_step.item() == 0
    assert found.real_steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_loss_error": 0.0}, r"`max_loss_error` of `staged_rollout` must .*; got 0\.0"),
        ({"max_output_error": -1.0}, r"`max_output_error` of `staged_rollout` must .*; got -1\.0"),
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


# ---------------------------------------------------------------------- the path


def narrow(problem, algorithm, rank, *, samples=None, seed=0):
    """A linearisation of few directions, and of a few samples if asked for."""
    counts = {"retain_samples": samples, "forget_samples": samples and samples // 2}
    return linearise(problem, algorithm.preconditioner(problem), rank=rank, seed=seed, **counts)


def rolled_out(problem, network, algorithm, **options):
    return staged_rollout(problem, network, algorithm, batch_sizes=algorithm.batch_sizes(problem), seeds=[3], **options)


def test_a_run_that_leaves_the_linearisations_directions_is_stepped_for_real():
    """Where the real network agrees all along a path that the run does not take."""
    problem = small_problem(curved())
    algorithm = GradDiff(lr=0.4, mix=0.4, steps=STEPS, batch_size=8)
    network = narrow(problem, algorithm, 1)
    trusting = rolled_out(problem, network, algorithm, max_path_error=1e9)
    assert trusting.real_steps == 0  # its outputs and losses are right where it looks
    found = rolled_out(problem, network, algorithm)
    (handover,) = found.handovers
    assert handover.path_error > 0.5
    assert (handover.step, handover.real_steps) == (0, STEPS)
    real = real_run(problem, algorithm)
    compare(found, real)
    end = real.trajectory[-1].forget_loss
    assert abs(float(trusting.rollout.forget_loss[0, 0, -1]) - end) > 0.2 * end
    whole = rolled_out(problem, narrow(problem, algorithm, 10_000), algorithm)
    assert whole.handovers[0].path_error < 0.3


@pytest.mark.parametrize(
    "algorithm", [GradDiff(lr=0.01, mix=0.4), GradDiff(lr=0.01, mix=0.4, momentum=0.8), AGU(lr=0.05)]
)
def test_the_path_of_a_linear_network_is_right_with_samples_that_stand_in_too(algorithm):
    """The batches of its real steps are those of the linearised ones, not the run's own, which other samples are in."""
    torch.manual_seed(0)
    problem = small_problem(nn.Linear(4, 3).double())
    algorithm = algorithm.replace(steps=STEPS, batch_size=8)
    for samples in (None, 20):
        network = narrow(problem, algorithm, 10_000, samples=samples)
        found = rolled_out(problem, network, algorithm)
        assert found.handovers[0].path_error < 1e-6
        assert found.real_steps == 0


@pytest.mark.parametrize("schedule", ["warmup", tuple((k / STEPS) ** 3 for k in range(STEPS))])
def test_a_ramp_is_followed_to_where_something_shows(schedule):
    problem = small_problem(curved())
    algorithm = GradDiff(lr=0.4, mix=0.4, steps=STEPS, batch_size=8, lr_schedule=schedule)
    found = rolled_out(problem, narrow(problem, algorithm, 1), algorithm)
    assert found.handovers[0].path_error > 0.5
    assert found.real_steps == STEPS


def test_a_small_step_hides_nothing():
    problem = small_problem(curved())
    algorithm = GradDiff(lr=1e-8, mix=0.4, steps=STEPS, batch_size=8)
    assert rolled_out(problem, narrow(problem, algorithm, 1), algorithm).handovers[0].path_error > 0.5
    assert rolled_out(problem, narrow(problem, algorithm, 10_000), algorithm).handovers[0].path_error < 1e-3


def test_the_first_look_comes_when_either_set_has_gone_as_far_as_a_whole_step():
    plain = GradDiff(lr=1e-3, mix=0.4, steps=20, batch_size=8)
    for algorithm, last in (
        (plain, 4),
        (plain.replace(forget_schedule=(0.0,) * 5 + (1.0,) * 15), 6),
        (plain.replace(forget_schedule=(0.25,) * 19 + (0.5,)), 4),
        (plain.replace(lr_schedule=(0.1,) * 10 + (1.0,) * 10), 13),
        (plain.replace(steps=2), 2),
        (FineTune(lr=1e-3, steps=20, batch_size=8), 4),
        (GradDiff(lr=1e-3, mix=1.0, steps=20, batch_size=8, forget_every=5), 4),
    ):
        assert first_look(algorithm) == last, algorithm


def test_both_sets_have_a_part_in_the_steps_that_are_looked_at(monkeypatch):
    """A schedule that begins with retain steps is followed into its first forget step."""
    import stabkit.staged

    problem = small_problem(curved())
    seen = []
    real = stabkit.staged.steps_from

    def counted(*arguments, players=None, **options):
        for at in real(*arguments, players=players, **options):
            if players is not None:
                seen.append(at.step)
            yield at

    monkeypatch.setattr(stabkit.staged, "steps_from", counted)
    plain = GradDiff(lr=1e-3, mix=0.4, steps=STEPS, batch_size=8)
    for algorithm, last in (
        (plain, 4),
        (plain.replace(forget_schedule=(0.0,) * 5 + (1.0,) * 9), 6),
        (plain.replace(steps=2), 2),
        (FineTune(lr=1e-3, steps=STEPS, batch_size=8), 4),
    ):
        seen.clear()
        rolled_out(problem, narrow(problem, algorithm, 10_000), algorithm)
        assert seen[:last] == list(range(1, last + 1)), algorithm
        assert last + 1 not in seen[last : last + 1], algorithm


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_velocity_is_displaced_where_there_is_momentum_alone(momentum):
    """Of a basis that is not held a displacement takes a walk over the samples."""
    problem = small_problem(curved())
    algorithm = GradDiff(lr=0.01, mix=0.3, steps=30, batch_size=8, momentum=momentum)
    network, asked = everything(problem, Identity()), []
    object.__setattr__(network, "displacement", lambda c: (asked.append(c), type(network).displacement(network, c))[1])
    run_ = _Run(problem, network, algorithm, (8, 8), 3)
    run_.linearised()
    at = run_._position(20)
    assert len(asked) == 1 + (momentum > 0)
    assert bool(at.moments.first.any()) == (momentum > 0)
