"""A run takes the steps of T1, sees divergence, stops for the right reason and leaves everything else alone."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.algorithms import AGU, FineTune, GradDiff, GradientAscent
from stabkit.algorithms.base import Algorithm
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from stabkit.sampling import SAMPLINGS, batch_streams
from tests.cases import CASES, mean_loss

untrained = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
ALGORITHMS = [
    GradientAscent(lr=0.05, batch_size=3),
    GradDiff(lr=0.05, mix=0.3, batch_size=3),
    FineTune(lr=0.05, batch_size=3),
    AGU(lr=0.5, mix=0.6, batch_size=3),
]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def final_vector(problem, result):
    own = dict(result.model.named_parameters())
    return torch.cat([own[name].detach().reshape(-1) for name in problem.parameters])


def by_hand(problem, algorithm, steps, *, sampling="without_replacement", momentum=0.0, seed=0):
    """θ after some steps of T1, from single-sample gradients by plain autograd through a fresh model."""
    sizes, batches = (problem.retain.size, problem.forget.size), algorithm.batch_sizes(problem)
    streams = batch_streams(sizes, batches, sampling, seed)
    p = torch.ones(problem.size, dtype=torch.float64)
    if isinstance(algorithm, AGU):
        p = algorithm.preconditioner(problem).diagonal
    theta, velocity = problem.vector(), torch.zeros_like(p)
    for retain, forget in itertools.islice(zip(*streams, strict=False), steps):
        direction = torch.zeros_like(theta)
        parts = ((problem.retain, retain, 1 - algorithm.mix), (problem.forget, forget, -algorithm.mix))
        for (samples, indices, weight), size in zip(parts, batches, strict=True):
            for i in indices.tolist():
                leaf = theta.clone().requires_grad_()
                inputs, target = samples.batch(torch.tensor([i]))
                loss = problem.loss.per_sample(problem.outputs(problem.unflatten(leaf), inputs), target)
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                direction += weight * gradient / size
        velocity = momentum * velocity + p * direction
        theta = theta - algorithm.lr * velocity
    return theta


@untrained
@cases
@algorithms
def test_one_step_is_that_of_t1(case, algorithm):
    problem = case.problem()
    result = run(problem, algorithm.replace(steps=1), stop_on_divergence=False)
    expected = by_hand(problem, algorithm, 1)
    assert float((expected - problem.vector()).norm()) > 0
    torch.testing.assert_close(final_vector(problem, result), expected, rtol=1e-10, atol=1e-12)


@untrained
@algorithms
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_several_steps_with_momentum_and_every_sampling(algorithm, sampling, momentum):
    problem = CASES[0].problem()
    algorithm = algorithm.replace(steps=6, sampling=sampling, momentum=momentum)
    result = run(problem, algorithm, seed=5, stop_on_divergence=False)
    expected = by_hand(problem, algorithm, 6, sampling=sampling, momentum=momentum, seed=5)
    assert (result.steps, result.stop_reason, result.seed) == (6, "steps", 5)
    torch.testing.assert_close(final_vector(problem, result), expected, rtol=1e-9, atol=1e-11)


@untrained
def test_full_batches_are_gradient_descent():
    problem = CASES[0].problem()
    algorithm = GradDiff(
        lr=0.1, mix=0.25, steps=4, batch_size=problem.retain.size, forget_batch_size=problem.forget.size
    )
    theta = problem.vector()
    for _ in range(4):
        leaf = theta.clone().requires_grad_()
        objective = 0.75 * mean_loss(problem, "retain")(leaf) - 0.25 * mean_loss(problem, "forget")(leaf)
        theta = theta - 0.1 * torch.autograd.grad(objective, leaf)[0]
    result = run(problem, algorithm, stop_on_divergence=False)
    torch.testing.assert_close(final_vector(problem, result), theta, rtol=1e-10, atol=1e-12)


@untrained
def test_a_preconditioner_at_hand_is_used():
    problem = CASES[0].problem()
    algorithm = GradDiff(lr=0.1, steps=3, batch_size=3)
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frozen = Diagonal(p * (torch.arange(problem.size) > 4))
    theta = final_vector(problem, run(problem, algorithm, preconditioner=frozen, stop_on_divergence=False))
    assert torch.equal(theta[:5], problem.vector()[:5])
    assert not torch.equal(theta[5:], problem.vector()[5:])


@untrained
def test_dict_batches_with_keys_in_another_order():
    """The two batches of a step may be one pass, but only tensor by tensor."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, scale):
            return self.linear(x) * scale.exp()

    g = torch.Generator().manual_seed(0)
    x, scale = (torch.randn(8, 3, generator=g, dtype=torch.float64) for _ in range(2))
    y, model = torch.randint(0, 3, (8,), generator=g), Weighted().double()
    retain = {"x": x[3:], "scale": scale[3:], "labels": y[3:]}
    algorithm = GradDiff(steps=3, batch_size=2)
    finals = []
    for forget in (
        {"x": x[:3], "scale": scale[:3], "labels": y[:3]},
        {"scale": scale[:3], "labels": y[:3], "x": x[:3]},
    ):
        problem = UnlearningProblem(model, forget, retain)
        finals.append(final_vector(problem, run(problem, algorithm, stop_on_divergence=False)))
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-12, atol=1e-12)


@untrained
def test_sets_of_different_lengths_and_target_shapes():
    """Sequences of 5 tokens to forget and of 3 to retain; regression targets (n,) beside (n, 1)."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, x):
            return self.linear(x.mean(1, keepdim=True))

    g = torch.Generator().manual_seed(0)
    long, short = torch.randn(4, 5, generator=g).double(), torch.randn(6, 3, generator=g).double()
    y = torch.randn(10, generator=g).double()
    for forget, retain in (((long, y[:4]), (short, y[4:])), ((long[:, :3], y[:4, None]), (short, y[4:]))):
        problem = UnlearningProblem(Pooled().double(), forget, retain, loss="mse")
        algorithm = GradDiff(lr=0.05, steps=2, batch_size=2)
        result = run(problem, algorithm, stop_on_divergence=False)
        torch.testing.assert_close(final_vector(problem, result), by_hand(problem, algorithm, 2))


# ------------------------------------------------------------------ decay, clipping, Nesterov, schedules, cycles


def by_torch(problem, algorithm, plan, *, seed=0):
    """The same run as people write it: torch.optim.SGD, clip_grad_norm_, a step size set before each step.

    `plan` has (factor of lr, weight of the retain loss, weight of the forget loss) for every step.
    """
    model = problem.new_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(
        trained,
        lr=algorithm.lr,
        momentum=algorithm.momentum,
        nesterov=algorithm.nesterov,
        weight_decay=algorithm.weight_decay,
    )
    sizes, batches = (problem.retain.size, problem.forget.size), algorithm.batch_sizes(problem)
    streams = batch_streams(sizes, batches, algorithm.sampling, seed)
    for factor, *weights in plan:
        optimiser.param_groups[0]["lr"] = factor * algorithm.lr
        optimiser.zero_grad()
        loss = 0.0 * trained[0].sum()
        for samples, stream, weight, size in zip(
            (problem.retain, problem.forget), streams, weights, batches, strict=True
        ):
            if weight is not None:
                inputs, targets = samples.batch(next(stream))
                loss = loss + weight * problem.loss.per_sample(model(inputs), targets).sum() / size
        loss.backward()
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if algorithm.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, algorithm.max_gradient_norm)
        optimiser.step()
    return torch.cat([p.detach().reshape(-1) for p in trained])


MIXED = GradDiff(lr=0.1, mix=0.3, steps=6, batch_size=3, sampling="with_replacement")
STEPS = range(6)
COSINE = [(1 + math.cos(math.pi * k / 6)) / 2 for k in STEPS]


@untrained
@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        ({"weight_decay": 0.2}, [(1, 0.7, -0.3)] * 6),
        ({"weight_decay": 0.2, "momentum": 0.8}, [(1, 0.7, -0.3)] * 6),
        ({"momentum": 0.8, "nesterov": True, "weight_decay": 0.05}, [(1, 0.7, -0.3)] * 6),
        ({"max_gradient_norm": 0.05, "momentum": 0.5, "weight_decay": 0.3}, [(1, 0.7, -0.3)] * 6),
        ({"max_gradient_norm": 1e3}, [(1, 0.7, -0.3)] * 6),
        ({"lr_schedule": "cosine", "momentum": 0.9}, [(c, 0.7, -0.3) for c in COSINE]),
        ({"lr_schedule": (1, 0, 2, 0.5, 0.1, 3)}, [(c, 0.7, -0.3) for c in (1, 0, 2, 0.5, 0.1, 3)]),
        ({"forget_schedule": "cosine"}, [(1, 0.7, -0.3 * c) for c in COSINE]),
        ({"forget_every": 2, "momentum": 0.9}, [(1, None, -0.3), (1, 0.7, None)] * 3),
        (
            {"forget_every": 3, "forget_schedule": (1, 9, 9, 0.5, 9, 9), "max_gradient_norm": 0.1},
            [(1, None, -0.3), (1, 0.7, None), (1, 0.7, None), (1, None, -0.15), (1, 0.7, None), (1, 0.7, None)],
        ),
    ],
)
@pytest.mark.parametrize("case", [0, 1, 3], ids=lambda i: CASES[i].name)
def test_a_run_is_what_torch_sgd_does(case, settings, plan):
    problem = CASES[case].problem()
    algorithm = MIXED.replace(**settings)
    result = run(problem, algorithm, seed=4, stop_on_divergence=False)
    expected = by_torch(problem, algorithm, plan, seed=4)
    assert not torch.allclose(
        expected, final_vector(problem, run(problem, MIXED, seed=4, stop_on_divergence=False))
    ) or (settings == {"max_gradient_norm": 1e3})
    torch.testing.assert_close(final_vector(problem, result), expected, rtol=1e-9, atol=1e-11)


@untrained
def test_what_is_clipped_is_the_preconditioned_gradient():
    problem = CASES[0].problem()
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    algorithm = MIXED.replace(steps=1, sampling="without_replacement", max_gradient_norm=0.01, weight_decay=0.5)
    result = run(problem, algorithm, preconditioner=Diagonal(p), stop_on_divergence=False)
    plain = run(
        problem, algorithm.replace(max_gradient_norm=None), preconditioner=Diagonal(p), stop_on_divergence=False
    )
    start = problem.vector()
    decay = 0.5 * p * start
    unclipped = (start - final_vector(problem, plain)) / 0.1 - decay
    assert float(unclipped.norm()) > 0.01
    found = (start - final_vector(problem, result)) / 0.1 - decay
    torch.testing.assert_close(found, unclipped * (0.01 / (float(unclipped.norm()) + 1e-6)), rtol=1e-9, atol=1e-12)


@untrained
def test_a_cycle_draws_from_the_set_whose_turn_it_is():
    """Retain steps go through their epoch without gaps, and only the samples of a step are counted."""
    problem = CASES[0].problem()
    algorithm = GradDiff(lr=1e-3, steps=9, batch_size=2, forget_batch_size=1, forget_every=3)
    result = run(problem, algorithm, monitor_samples=1, check_every=9, stop_on_divergence=False)
    assert result.gradient_equivalents == pytest.approx(6 * 2 + 3 * 1 + 10 * 2 / 3)


# ------------------------------------------------------------------ hooks, checkpoints, the last good model


def test_every_step_is_told_to_the_hook(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.05, mix=0.2, steps=7, batch_size=16, lr_schedule="cosine", forget_every=3, momentum=0.5)
    seen = []
    result = run(problem, algorithm, on_step=seen.append)
    plain = run(problem, algorithm)
    assert torch.equal(final_vector(problem, result), final_vector(problem, plain))
    assert [r.step for r in seen] == list(range(1, 8))
    assert [r.lr for r in seen] == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(7)])
    assert [(r.retain_weight, r.forget_weight) for r in seen[:4]] == [(0, 0.2), (0.8, 0), (0.8, 0), (0, 0.2)]
    assert result.trajectory[1].distance == pytest.approx(seen[0].step_norm, rel=1e-5)
    assert seen[0].step_norm == pytest.approx(0.05 * seen[0].gradient_norm, rel=1e-5)
    with pytest.raises(AttributeError, match="step"):
        seen[0].step = 3


def test_a_hook_is_told_the_losses_of_both_batches(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.2, mix=0.2, steps=3, batch_size=16, forget_every=2)
    seen = []
    run(problem, algorithm, seed=4, on_step=seen.append)
    retain, forget = batch_streams((problem.retain.size, problem.forget.size), (16, 16), algorithm.sampling, 4)
    for step, record in enumerate(seen):
        theta = final_vector(problem, run(problem, algorithm.replace(steps=step), seed=4)) if step else problem.vector()
        parameters = problem.unflatten(theta)
        forgets = step % 2 == 0  # the others retain
        samples, stream = (problem.forget, forget) if forgets else (problem.retain, retain)
        expected = float(problem.evaluate(samples, parameters, next(stream))[2].mean())
        told, other = (record.forget_loss, record.retain_loss) if forgets else (record.retain_loss, record.forget_loss)
        assert told == pytest.approx(expected, rel=1e-4)
        assert other is None
    both = []
    run(problem, GradDiff(lr=1e-3, mix=0.2, steps=1, batch_size=16), seed=4, on_step=both.append)
    streams = batch_streams((problem.retain.size, problem.forget.size), (16, 16), algorithm.sampling, 4)
    losses = [
        float(problem.evaluate(samples, indices=next(stream))[2].mean())
        for samples, stream in zip((problem.retain, problem.forget), streams, strict=True)
    ]
    assert [both[0].retain_loss, both[0].forget_loss] == pytest.approx(losses, rel=1e-4)


def test_a_hook_can_end_a_run(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.01, mix=0.2, steps=30, batch_size=16)

    def enough(record):
        if record.step == 14:
            raise StopIteration

    result = run(problem, algorithm, on_step=enough, check_every=10)
    assert (result.stop_reason, result.steps, result.diverged) == ("on_step", 14, False)
    assert [c.step for c in result.trajectory] == [*range(11), 14]
    assert result.trajectory[-1].distance == run(problem, algorithm.replace(steps=14)).trajectory[-1].distance


def test_an_exception_in_a_hook_reaches_the_caller_and_the_run_can_be_resumed(digits_mlp, random_deletion, tmp_path):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.05, mix=0.2, steps=12, batch_size=16, momentum=0.5)
    before = torch.get_rng_state()
    seen = []

    def fails(record):
        seen.append(record.step)
        if record.step == 5:
            raise RuntimeError("disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        run(problem, algorithm, on_step=fails, checkpoint=tmp_path / "run.npz")
    assert torch.equal(torch.get_rng_state(), before)
    result = run(problem, algorithm, on_step=fails, checkpoint=tmp_path / "run.npz")
    assert seen == list(range(1, 13))
    plain = run(problem, algorithm)
    assert torch.equal(final_vector(problem, result), final_vector(problem, plain))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("killed_at", [1, 3, 12])
def test_a_killed_run_resumes_bit_for_bit(digits_mlp, random_deletion, tmp_path, sampling, killed_at, monkeypatch):
    """Killed in the middle of a step: what is on disk, if anything, is up to two steps old."""
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = AGU(
        lr=0.3, mix=0.3, steps=13, batch_size=16, sampling=sampling, momentum=0.7, leakage_bound=9.0, forget_every=4
    )
    settings = {"seed": 3, "check_every": 3, "preconditioner": algorithm.preconditioner(problem)}
    plain = run(problem, algorithm, **settings)
    assert plain.steps == 13
    settings |= {"checkpoint": tmp_path / "run.npz", "checkpoint_every": 2}
    outputs, passes = UnlearningProblem.outputs, itertools.count(1)

    def dies(self, parameters, inputs):
        if torch.is_grad_enabled() and next(passes) == killed_at:
            raise Killed
        return outputs(self, parameters, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearningProblem, "outputs", dies)
        with pytest.raises(Killed):
            run(problem, algorithm, **settings)
    assert (tmp_path / "run.npz").exists() == (killed_at > 2)
    result = run(problem, algorithm, **settings)
    again = run(problem, algorithm, **settings)  # the file of a run that has ended is its result
    for one in (result, again):
        assert torch.equal(final_vector(problem, one), final_vector(problem, plain))
        assert one.trajectory == plain.trajectory
        assert (one.steps, one.stop_reason, one.gradient_equivalents) == (
            plain.steps,
            plain.stop_reason,
            plain.gradient_equivalents,
        )
    assert [f.name for f in tmp_path.iterdir()] == ["run.npz"]


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"lr": 0.2}, {}, r"with settings {'lr': 0\.1}, not {'lr': 0\.2}"),
        ({}, {"seed": 1}, "with seed 0, not 1"),
        ({}, {"check_every": 3}, "with check_every 10, not 3"),
        ({"steps": 9}, {}, "'steps': 5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(digits_mlp, random_deletion, tmp_path, changes, settings, message):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.1, steps=5, batch_size=16)
    run(problem, algorithm, checkpoint=tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        run(problem, algorithm.replace(**changes), checkpoint=tmp_path / "a", **settings)


def test_a_checkpoint_of_another_model_is_refused(digits_mlp, digits_cnn, random_deletion, tmp_path):
    algorithm = GradDiff(lr=0.1, steps=2, batch_size=16)
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    run(problem, algorithm, checkpoint=tmp_path / "a")
    moved = run(problem, algorithm).model
    with pytest.raises(ValueError, match="whose weights differs by"):
        run(UnlearningProblem(moved, *random_deletion), algorithm, checkpoint=tmp_path / "a")
    with pytest.raises(ValueError, match=f"with order {problem.size}"):
        run(UnlearningProblem(digits_cnn, *random_deletion), algorithm, checkpoint=tmp_path / "a")
    (tmp_path / "b").write_text("not one")
    with pytest.raises(ValueError, match=r"`checkpoint` of `run` must be a file that it wrote; got '.*b', which"):
        run(problem, algorithm, checkpoint=tmp_path / "b")


def test_the_last_good_model_is_kept(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.3, mix=0.9, steps=60, batch_size=32)
    for stop in (True, False):
        result = run(problem, algorithm, check_every=5, monitor_samples=None, stop_on_divergence=stop)
        good = [c for c in result.trajectory if c.step < result.divergence_step]
        assert result.last_good_step == good[-1].step < result.divergence_step
        own = dict(result.last_good_model.named_parameters())
        theta = torch.cat([own[name].detach().reshape(-1) for name in problem.parameters])
        assert float((theta - problem.vector()).norm()) == pytest.approx(good[-1].distance, rel=1e-6)
        loss = float(problem.evaluate(problem.retain, problem.unflatten(theta))[2].mean())
        assert loss == pytest.approx(good[-1].retain_loss, rel=1e-5)
    stable = run(problem, GradDiff(lr=0.001, mix=0.1, steps=3, batch_size=32))
    assert stable.last_good_model is stable.model
    assert stable.last_good_step == 3


# ------------------------------------------------------------------ seeds and state


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_seed_decides_the_run_bit_for_bit(digits_mlp, random_deletion, sampling):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.05, mix=0.2, steps=12, batch_size=16, sampling=sampling)
    first, again, other = (run(problem, algorithm, seed=s) for s in (7, 7, 8))
    assert torch.equal(final_vector(problem, first), final_vector(problem, again))
    assert first.trajectory == again.trajectory
    assert not torch.equal(final_vector(problem, first), final_vector(problem, other))
    assert first.trajectory[0] == other.trajectory[0]


def test_the_callers_model_data_and_random_state_are_left_alone(digits_mlp, random_deletion):
    calls = []
    handle = digits_mlp[1].register_forward_hook(lambda module, inputs, output: calls.append(module))
    try:
        state = {name: t.clone() for name, t in digits_mlp.state_dict().items()}
        problem = UnlearningProblem(digits_mlp, *random_deletion)
        start = problem.vector().clone()
        rng = torch.get_rng_state(), random.getstate(), [str(part) for part in np.random.get_state()]  # noqa: NPY002
        result = run(problem, AGU(lr=0.5, steps=5, batch_size=16, leakage_bound=10.0))
        assert torch.equal(torch.get_rng_state(), rng[0])
        assert random.getstate() == rng[1]
        assert [str(part) for part in np.random.get_state()] == rng[2]  # noqa: NPY002
        assert all(torch.equal(t, state[name]) for name, t in digits_mlp.state_dict().items())
        assert torch.equal(problem.vector(), start)
        assert list(digits_mlp[1]._forward_hooks) == [handle.id]
        assert digits_mlp[1] not in calls  # a hook may run, but on stabkit's copy
        assert result.model is not digits_mlp
        assert result.model.training == digits_mlp.training
    finally:
        handle.remove()


@untrained
def test_a_model_that_draws_numbers_leaves_the_random_state_alone():
    class Wasteful(nn.Linear):
        def forward(self, x):
            torch.rand(3)
            return super().forward(x) + 0 * random.random() + 0 * np.random.rand()  # noqa: NPY002

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 4, generator=g), torch.randint(0, 3, (10,), generator=g)
    model = Wasteful(4, 3)
    before = torch.get_rng_state(), random.getstate(), [str(part) for part in np.random.get_state()]  # noqa: NPY002
    problem = UnlearningProblem(model, (x[:3], y[:3]), (x[3:], y[3:]))
    run(problem, GradDiff(steps=2, batch_size=2), stop_on_divergence=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [str(part) for part in np.random.get_state()] == before[2]  # noqa: NPY002


# ------------------------------------------------------------------ what is watched


def test_a_stable_run(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    result = run(problem, GradDiff(lr=0.01, mix=0.1, steps=34, batch_size=32), check_every=10, monitor_samples=None)
    assert (result.diverged, result.divergence_step, result.stop_reason, result.steps) == (False, None, "steps", 34)
    assert [c.step for c in result.trajectory] == [*range(11), 20, 30, 34]
    assert result.trajectory[0].distance == 0
    first = result.trajectory[0]
    assert first.retain_loss == pytest.approx(float(problem.losses(problem.retain).mean()), rel=1e-6)
    assert first.forget_loss == pytest.approx(float(problem.losses(problem.forget).mean()), rel=1e-6)
    last, theta = result.trajectory[-1], final_vector(problem, result)
    assert last.distance == pytest.approx(float((theta - problem.vector()).norm()), rel=1e-6)
    losses = [float(problem.evaluate(s, problem.unflatten(theta))[2].mean()) for s in (problem.retain, problem.forget)]
    assert (last.retain_loss, last.forget_loss) == pytest.approx(tuple(losses), rel=1e-6)
    assert result.worst_retain_loss == max(c.retain_loss for c in result.trajectory) < problem.divergence_level


def test_fine_tuning_descends_and_ascent_climbs(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    down = run(problem, FineTune(lr=0.05, steps=60, batch_size=64)).trajectory
    up = run(problem, GradientAscent(lr=0.005, steps=20, batch_size=64)).trajectory
    assert down[-1].retain_loss < down[0].retain_loss
    assert up[-1].forget_loss > up[0].forget_loss


def test_a_loss_past_the_level_is_divergence(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.3, mix=0.9, steps=60, batch_size=32)
    result = run(problem, algorithm, check_every=5)
    assert result.diverged
    assert (result.stop_reason, result.steps) == ("diverged", result.divergence_step)
    *before, last = result.trajectory
    assert last.step == result.divergence_step
    assert math.isfinite(last.retain_loss)
    assert last.retain_loss >= problem.divergence_level
    assert all(c.retain_loss < problem.divergence_level for c in before)

    onwards = run(problem, algorithm, check_every=5, stop_on_divergence=False)
    assert (onwards.stop_reason, onwards.steps, onwards.divergence_step) == ("steps", 60, result.divergence_step)
    assert onwards.trajectory[: len(result.trajectory)] == result.trajectory
    assert [c.step for c in onwards.trajectory] == [0, 1, 2, 3, 4, *range(5, 61, 5)]


@pytest.mark.parametrize("lr", [1e8, 1e30])
def test_what_is_not_finite_is_divergence(digits_mlp, random_deletion, lr):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=lr, mix=0.5, steps=25, batch_size=32)
    result = run(problem, algorithm)
    assert (result.diverged, result.stop_reason, result.divergence_step) == (True, "diverged", 1)
    onwards = run(problem, algorithm, stop_on_divergence=False)
    assert onwards.steps == 25
    if lr == 1e30:
        assert not math.isfinite(onwards.trajectory[-1].retain_loss)
        assert onwards.worst_retain_loss == math.inf


def test_a_peak_that_falls_back_is_divergence(digits_cnn, random_deletion):
    problem = UnlearningProblem(digits_cnn, *random_deletion)
    result = run(problem, GradDiff(lr=0.3, mix=0.3, steps=20, batch_size=64), stop_on_divergence=False)
    losses = {c.step: c.retain_loss for c in result.trajectory}
    assert result.divergence_step < 10
    assert losses[10] < problem.divergence_level < max(losses.values())


def test_a_model_past_the_level_from_the_start():
    x = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # variance 1, mean 0
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.0)
    forget = (torch.ones(1, 1).double(), torch.tensor([[3.0]]).double())
    with pytest.warns(match="no better than the best constant"):
        problem = UnlearningProblem(model, forget, (x, y), loss="mse")
    assert problem.divergence_level == pytest.approx(1.0)
    result = run(problem, FineTune(lr=0.1, steps=5, batch_size=2))
    assert (result.stop_reason, result.steps, result.divergence_step, len(result.trajectory)) == ("diverged", 0, 0, 1)
    onwards = run(problem, FineTune(lr=0.1, steps=5, batch_size=2), stop_on_divergence=False)
    assert (onwards.diverged, onwards.divergence_step, onwards.steps) == (True, 0, 5)
    assert onwards.last_good_model is None
    assert onwards.last_good_step is None


def test_recovery_does_not_undo_divergence():
    """Heavy ball on one quadratic, ηλ = 3.6 and β = 0.9: stable, yet its first step multiplies the error by -2.6."""
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)  # 1 below the optimum: loss 1, where a constant has the targets' variance 4
    forget = (torch.ones(1, 1).double(), torch.tensor([[3.0]]).double())
    problem = UnlearningProblem(model, forget, (x, 2 * x), loss="mse")
    algorithm = FineTune(lr=1.8, momentum=0.9, steps=300, batch_size=2)
    result = run(problem, algorithm, check_every=1, stop_on_divergence=False)
    losses = [c.retain_loss for c in result.trajectory]
    assert losses[:2] == pytest.approx([1.0, 2.6**2])
    assert losses[-1] < 1e-6
    assert (result.diverged, result.divergence_step, result.stop_reason) == (True, 1, "steps")
    assert result.worst_retain_loss == max(losses)


@untrained
def test_monitored_samples_are_a_fixed_part(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    result = run(problem, GradDiff(lr=1e-12, steps=2, batch_size=8), check_every=1, monitor_samples=50)
    watched = problem.retain.subset(50, seed=0)
    expected = float(problem.evaluate(problem.retain, indices=watched)[2].mean())
    assert [c.retain_loss for c in result.trajectory] == pytest.approx([expected] * 3, rel=1e-5)


def test_gradients_are_counted(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    looks = (50 + 50) / 3 * 7  # at steps 0 to 5, and 7

    def count(algorithm):
        return run(problem, algorithm.replace(steps=7), check_every=5, monitor_samples=50).gradient_equivalents

    sizes = {"batch_size": 16, "forget_batch_size": 4}
    assert count(GradDiff(lr=1e-4, **sizes)) == pytest.approx(7 * (16 + 4) + looks)
    assert count(FineTune(lr=1e-4, **sizes)) == pytest.approx(7 * 16 + looks)
    assert count(GradientAscent(lr=1e-4, **sizes)) == pytest.approx(7 * 4 + looks)
    watched = count(AGU(lr=1e-4, leakage_bound=50.0, **sizes))
    assert watched == pytest.approx(7 * (16 + 4) + 7 * 4 * 2 / 3 + looks)
    poisson = count(GradDiff(lr=1e-4, sampling="poisson", **sizes)) - looks
    assert poisson == pytest.approx(7 * 20, abs=5 * (7 * 20) ** 0.5)
    assert poisson == pytest.approx(round(poisson), abs=1e-6)


# ------------------------------------------------------------------ stop rules


def test_leakage_ends_a_run(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    n_forget = problem.forget.size
    algorithm = AGU(lr=0.1, mix=0.5, steps=40, batch_size=64, forget_batch_size=n_forget, leakage_bound=0.05)
    free = run(problem, algorithm.replace(leakage_bound=None), check_every=1, monitor_samples=None)
    assert free.stop_reason == "steps"
    result = run(problem, algorithm, check_every=7, monitor_samples=None)
    assert (result.stop_reason, result.diverged) == ("leakage", False)
    assert 2 < result.steps < 40
    assert result.trajectory[-1].step == result.steps
    assert result.trajectory[-1].retain_loss == free.trajectory[result.steps].retain_loss
    # The bound was passed before the last step and not one step earlier.
    before, _, _ = problem.evaluate(problem.forget)
    leaked = []
    for steps in (result.steps - 2, result.steps - 1):
        theta = final_vector(problem, run(problem, algorithm.replace(leakage_bound=None, steps=steps)))
        after = problem.evaluate(problem.forget, problem.unflatten(theta))[0]
        p, q = before.softmax(-1), after.softmax(-1)
        leaked.append(float((p * (p.log() - q.log())).sum(-1).mean()))
    assert leaked[0] <= 0.05 < leaked[1]


def test_leakage_is_the_divergence_from_the_original_predictions(digits_mlp, random_deletion):
    """KL(before || now), not the other way round: the two pass a bound between them at different steps."""
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    settings = {"lr": 0.3, "mix": 0.3, "batch_size": problem.retain.size, "forget_batch_size": problem.forget.size}
    algorithm = AGU(steps=40, drift_tolerance=None, **settings)
    before, forward, backward = problem.evaluate(problem.forget)[0].double().log_softmax(1), [], []
    for steps in range(1, 41):
        theta = final_vector(problem, run(problem, algorithm.replace(steps=steps), stop_on_divergence=False))
        now = problem.evaluate(problem.forget, problem.unflatten(theta))[0].double().log_softmax(1)
        forward.append(float((before.exp() * (before - now)).sum(1).mean()))
        backward.append(float((now.exp() * (now - before)).sum(1).mean()))
    bound = (forward[30] + backward[30]) / 2
    passed = [next((k for k, v in enumerate(values, 1) if v > bound), 41) for values in (forward, backward)]
    assert passed[0] != passed[1]
    result = run(problem, algorithm.replace(leakage_bound=bound, steps=60), stop_on_divergence=False)
    assert (result.stop_reason, result.steps) == ("leakage", passed[0] + 1)


def test_drift_ends_a_run(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    result = run(problem, AGU(lr=1e-7, steps=30, batch_size=16, drift_tolerance=1e-3), check_every=10)
    assert (result.stop_reason, result.steps, result.diverged) == ("drift", 1, False)
    assert [c.step for c in result.trajectory] == [0, 1]
    assert run(problem, AGU(lr=1e-7, steps=3, batch_size=16, drift_tolerance=None)).stop_reason == "steps"


def test_drift_is_relative_to_the_parameters(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = AGU(lr=0.01, mix=0.3, steps=1, batch_size=problem.retain.size, drift_tolerance=None)
    moved = run(problem, algorithm).trajectory[-1].distance / float(problem.vector().norm())
    for tolerance, reason in ((1.01 * moved, "drift"), (0.99 * moved, "steps")):
        assert run(problem, algorithm.replace(drift_tolerance=tolerance)).stop_reason == reason


def test_a_diverged_run_says_so_before_any_other_reason(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = AGU(lr=1e6, steps=30, batch_size=16, leakage_bound=0.1)
    assert run(problem, algorithm).stop_reason == "diverged"
    onwards = run(problem, algorithm, stop_on_divergence=False)
    assert (onwards.stop_reason, onwards.diverged, onwards.steps) == ("leakage", True, 2)


# ------------------------------------------------------------------ a user's own algorithm, and errors


def test_a_users_algorithm_runs(digits_mlp, random_deletion):
    class HeadOnly(Algorithm):
        name = "head-only"

        def preconditioner(self, problem):
            last = list(problem.parameters)[-2:]
            parts = {n: torch.full_like(p, float(n in last)) for n, p in problem.parameters.items()}
            return Diagonal(problem.flatten(parts))

    problem = UnlearningProblem(digits_mlp, *random_deletion)
    result = run(problem, HeadOnly(lr=0.1, steps=3, batch_size=16))
    moved = {n: not torch.equal(p, problem.parameters[n]) for n, p in result.model.named_parameters()}
    assert list(moved.values()) == [False, False, True, True]


def test_a_users_residual_may_come_from_autograd(digits_mlp, random_deletion):
    class Ascent(GradDiff):
        name = "ascent"

        def forget_residual(self, loss, batch):
            outputs = batch.outputs.clone().requires_grad_()
            total = torch.nn.functional.cross_entropy(outputs, batch.targets, reduction="sum")
            return torch.autograd.grad(total, outputs)[0]

    problem = UnlearningProblem(digits_mlp, *random_deletion)
    with torch.no_grad():
        own = run(problem, Ascent(lr=0.1, steps=3, batch_size=16))
    plain = run(problem, GradDiff(lr=0.1, steps=3, batch_size=16))
    torch.testing.assert_close(final_vector(problem, own), final_vector(problem, plain))


@untrained
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"check_every": 0}, ValueError, "`check_every` of `run` must be a whole number >= 1; got 0"),
        ({"monitor_samples": 0}, ValueError, "`monitor_samples` of `run` .* got 0. None watches all of them"),
        ({"seed": -1}, ValueError, "`seed` of `run` must be a whole number >= 0; got -1"),
        ({"seed": "x"}, TypeError, "`seed` of `run` .* got 'x'"),
        ({"on_step": 3}, TypeError, "`on_step` of `run` must be a function of a StepRecord or None; got 3"),
        ({"checkpoint_every": 0}, ValueError, "`checkpoint_every` of `run` must be a whole number >= 1; got 0"),
        ({"checkpoint": 3}, TypeError, "`checkpoint` of `run` must be a path or None; got 3"),
        ({"checkpoint": "/no/such/place"}, ValueError, "`checkpoint` of `run` must lie in an existing directory"),
        ({"batch_size": 100}, ValueError, "`batch_size` of `GradDiff` must be at most the retain set's 7 .* got 100"),
        ({"forget_batch_size": 4}, ValueError, "`forget_batch_size` of `GradDiff` .* forget set's 3 .* got 4"),
    ],
)
def test_settings_of_a_run_are_checked(arguments, error, message):
    x, y = torch.randn(10, 4), torch.randint(0, 3, (10,))
    problem = UnlearningProblem(MLP(4, 3), (x[:3], y[:3]), (x[3:], y[3:]))
    sizes = {key: arguments.pop(key) for key in list(arguments) if key.endswith("batch_size")}
    with pytest.raises(error, match=message):
        run(problem, GradDiff(steps=1, **{"batch_size": 2, **sizes}), **arguments)


def test_a_progress_bar_is_drawn_on_request(digits_mlp, random_deletion, capsys):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    run(problem, GradDiff(lr=1e-3, steps=2, batch_size=8))
    assert capsys.readouterr() == ("", "")
    run(problem, GradDiff(lr=1e-3, steps=2, batch_size=8), progress=True)
    shown = capsys.readouterr()
    assert "run graddiff" in shown.err
    assert shown.out == ""


def test_what_cannot_be_run_is_said(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    with pytest.raises(TypeError, match=r"`algorithm` of `run` must be an object of Algorithm; got 'graddiff'"):
        run(problem, "graddiff")
    with pytest.raises(TypeError, match=r"`problem` of `run` must be an object of UnlearningProblem; got MLP"):
        run(digits_mlp, GradDiff())


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without one")
def test_a_gpu_that_is_not_there_is_said(digits_mlp, random_deletion):
    with pytest.raises(ValueError, match=r"`device` .* must be available; got 'cuda' where there is no CUDA"):
        UnlearningProblem(digits_mlp, *random_deletion, device="cuda")


def test_a_run_in_bfloat16_is_near_the_full_one(digits_mlp, random_deletion, tmp_path):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    algorithm = GradDiff(lr=0.05, mix=0.2, steps=20, momentum=0.5)
    full = run(problem, algorithm)
    low = run(problem, algorithm, precision="bfloat16", checkpoint=tmp_path / "low")
    moved = [final_vector(problem, result) - problem.vector() for result in (full, low)]
    distance = float((moved[1] - moved[0]).norm() / moved[0].norm())
    assert 1e-5 < distance < 0.05  # lowered, by about the eight bits of its mantissa
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    with pytest.raises(ValueError, match="precision"):  # another run's checkpoint
        run(problem, algorithm, checkpoint=tmp_path / "low")


def test_a_precision_that_is_none_is_said(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    with pytest.raises(ValueError, match="`precision` of `run` must be one of 'bfloat16', 'full'; got 'half'"):
        run(problem, GradDiff(), precision="half")
    double = UnlearningProblem(digits_mlp, *random_deletion, dtype=torch.float64)
    with pytest.raises(ValueError, match="`precision` of `run` must be 'full' in float64; got 'bfloat16'"):
        run(double, GradDiff(), precision="bfloat16")
