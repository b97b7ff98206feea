"""The rollout against plain SGD on the linearised network, in parameters, and against real runs of linear models (T14)."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stabkit.rollout.roll
import stabkit.rollout.sets
from stabkit.algorithms import AGU, FineTune, GradDiff, GradientAscent, RandomLabels, SFROn
from stabkit.calibration import calibration
from stabkit.curvature import linearise
from stabkit.losses import CustomLoss
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import SCORE_CAP, rollout
from stabkit.runner import check_steps, run
from stabkit.sampling import SAMPLINGS, batch_streams, noise_level
from tests.cases import CASES, jacobians_of, problem_of

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
FIELDS = ("score", "divergence_step", "stopped_step", "retain_loss", "forget_loss", "coordinates")
cases = pytest.mark.parametrize("case", range(len(CASES)), ids=[c.name for c in CASES])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def network_of(case, preconditioned=False, level=1e9):
    """At full rank, with every sample; P = diag(p) with some entries zero, as AGU has them, or P = I."""
    problem = problem_of(case)
    p = torch.ones(problem.size, dtype=torch.float64)
    if preconditioned:
        p = torch.rand(problem.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        p = (p - 0.2).clamp_min(0)
    preconditioner = Diagonal(p) if preconditioned else Identity()
    network = linearise(problem, preconditioner, rank=10_000, retain_samples=None, forget_samples=None)
    return p, replace(network, divergence_level=level)


def sgd_on_the_linearised_network(problem, jacobians, p, algorithm, batches, seed, *, level, check_every):
    """T1 on f(θ*) + J (θ - θ*), one step after another in parameters; the loss's derivative by autograd."""
    sizes = tuple(outputs.shape[0] for outputs, _, _ in jacobians)
    streams = batch_streams(sizes, batches, algorithm.sampling, seed)
    theta = problem.vector()
    delta, velocity = torch.zeros_like(theta), torch.zeros_like(theta)
    rule, checks = algorithm.stop_rule(), check_steps(algorithm.steps, check_every)

    def outputs_at(delta, which, indices=None):
        outputs, targets, jacobian = jacobians[which]
        indices = torch.arange(sizes[which]) if indices is None else indices
        moved = outputs[indices] + (jacobian[indices] @ delta).reshape(outputs[indices].shape)
        return outputs[indices], moved, targets[indices]

    def loss(delta, which):
        _, outputs, targets = outputs_at(delta, which)
        mean = float(problem.loss.per_sample(outputs, targets).mean())
        return math.inf if math.isnan(mean) else mean

    begin = loss(delta, 0)
    floor = min(0.0, begin)
    room = (begin - floor) / (level - floor)
    stretch = max(1.0, -1 / math.log(room)) if 0 < room < 1 else 1.0
    losses, score, crossed, stopped, kept = [], -math.inf, math.nan, algorithm.steps, delta

    def look(step):
        """The log ratio of T14's definition; whether the run goes on."""
        nonlocal score, crossed, kept
        losses.append([loss(delta, which) for which in (0, 1)])
        share = max(0.0, losses[-1][0] - floor) / (level - floor)
        ratio = min(SCORE_CAP, math.log(share)) if share > 0 else -math.inf
        ratio = ratio * stretch if ratio < 0 else ratio
        ratio = ratio if all(map(math.isfinite, losses[-1])) else SCORE_CAP
        score = max(score, ratio)
        if math.isnan(crossed):
            kept = delta
            crossed = step if ratio >= 0 else crossed
        return ratio < SCORE_CAP

    going = look(0)
    for step in range(1, algorithm.steps + 1):
        if not going:
            break
        leaf = delta.clone().requires_grad_()
        objective = torch.zeros((), dtype=delta.dtype)
        leakage = None
        for which, weight in ((0, 1 - algorithm.mix), (1, -algorithm.mix)):
            indices = next(streams[which])
            if indices.numel() == 0:
                continue
            before, outputs, targets = outputs_at(leaf, which, indices)
            if weight:
                objective = objective + weight * problem.loss.per_sample(outputs, targets).sum() / batches[which]
            if which == 1 and rule.leakage_bound is not None:
                leakage = problem.loss.divergence(before, outputs.detach(), targets).mean()
        gradient = torch.zeros_like(delta)
        if objective.requires_grad:
            (gradient,) = torch.autograd.grad(objective, leaf)
        velocity = algorithm.momentum * velocity + p * gradient
        change = -algorithm.lr * velocity
        drift = change.norm() / (theta + delta).norm()
        ended = rule.active and bool(rule.decide(drift, leakage, moves=objective.requires_grad))  # not of nothing drawn
        delta = delta + change
        if ended:
            stopped = step
        if ended or step in checks:
            going = look(step) and not ended
    losses += [losses[-1]] * (len(checks) - len(losses))
    return {
        "score": score,
        "divergence_step": crossed,
        "stopped_step": float(stopped),
        "retain_loss": [pair[0] for pair in losses],
        "forget_loss": [pair[1] for pair in losses],
        "displacement": kept,
    }


def compare_to_sgd(case, preconditioned, algorithm, batches, seeds, *, level, check_every=3):
    p, network = network_of(case, preconditioned)
    network = replace(network, divergence_level=level)
    rolled = rollout(
        network,
        algorithm,
        lr=[algorithm.lr],
        mix=[algorithm.mix],
        batch_sizes=batches,
        seeds=seeds,
        check_every=check_every,
    )
    settings = {"level": level, "check_every": check_every}
    for s, seed in enumerate(seeds):
        expected = sgd_on_the_linearised_network(
            problem_of(case), jacobians_of(case), p, algorithm, batches, seed, **settings
        )
        displacement = expected.pop("displacement")
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(rolled, name)[s, 0], value, rtol=1e-6, atol=1e-8, err_msg=name)
        found = network.displacement(rolled.coordinates[s, 0])
        if bool(displacement.isfinite().all()):
            torch.testing.assert_close(found, displacement, rtol=1e-6, atol=1e-7 * (1 + float(displacement.norm())))
        else:
            assert not bool(found.isfinite().all())
    return rolled


# ------------------------------------------------------------------ theory §11, property 12


@given(data=st.data())
@cases
def test_a_rollout_is_sgd_on_the_linearised_network(case, data):
    """Property 12, for every loss: at full rank, with the batches that `run` draws, step by step."""
    problem = problem_of(case)
    algorithm = GradDiff(
        lr=10 ** data.draw(st.floats(-3, 0.5), "log10 lr"),
        mix=data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)), "mix"),
        steps=data.draw(st.integers(1, 11), "steps"),
        sampling=data.draw(st.sampled_from(SAMPLINGS), "sampling"),
        momentum=data.draw(st.sampled_from((0.0, 0.5, 0.9)), "momentum"),
    )
    sizes = problem.retain.size, problem.forget.size
    batches = tuple(data.draw(st.integers(1, n), "batch size") for n in sizes)
    seed = data.draw(st.integers(0, 2**20), "seed")
    level = data.draw(st.sampled_from((1.5, 20.0, 1e8)), "level") * abs(problem.retain_loss)
    compare_to_sgd(case, data.draw(st.booleans(), "P"), algorithm, batches, [seed, seed + 1], level=level)


@given(
    lr=st.sampled_from((0.003, 0.03, 0.3, 3.0)),
    mix=st.sampled_from((0.0, 0.3, 1.0)),
    sampling=st.sampled_from(SAMPLINGS),
    drift=st.sampled_from((None, 1e-4, 1e-2)),
    leakage=st.sampled_from((None, 1e-3, 0.1)),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("case", [0, 1, 4], ids=lambda i: CASES[i].name)
def test_stop_rules_end_it_where_they_end_sgd(case, lr, mix, sampling, drift, leakage, seed):
    algorithm = AGU(lr=lr, mix=mix, steps=14, sampling=sampling, drift_tolerance=drift, leakage_bound=leakage)
    compare_to_sgd(case, True, algorithm, (4, 2), [seed, seed + 1], level=1e6)


def linear_problem(loss, *, seed=0, scale=1.0):
    """A model that is its own linearisation, with a forget set that disagrees with the retain set."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(4, 3).double()
    x = scale * normal(seed, 24, 4)
    with torch.no_grad():
        y = model(x)
    y = y + 0.3 * normal(seed + 1, 24, 3) if loss == "mse" else y.argmax(1)
    return UnlearningProblem(model, (x[:8], y[:8]), (x[8:], y[8:]), loss=loss)


def compare_to_run(problem, algorithm, *, seed=0, check_every=4, dtype=None, preconditioner=None):
    """A real run and its rollout, check by check; both go on past the divergence level until the score's cap."""
    preconditioner = preconditioner or algorithm.step_preconditioner(problem)
    network = linearise(
        problem,
        preconditioner,
        rank=1000,
        retain_samples=None,
        forget_samples=None,
        paces=algorithm.layer_factors(problem),
        decays=algorithm.decay_factors(problem),
    )
    rolled = rollout(
        network,
        algorithm,
        lr=[algorithm.lr],
        mix=[algorithm.mix],
        batch_sizes=algorithm.batch_sizes(problem),
        seeds=[seed],
        check_every=check_every,
        dtype=dtype,
    )
    real = run(
        problem,
        algorithm,
        preconditioner=preconditioner,
        seed=seed,
        check_every=check_every,
        stop_on_divergence=False,
    )
    capped = [c.retain_loss >= math.exp(SCORE_CAP) * problem.divergence_level for c in real.trajectory]
    shown = real.trajectory[: capped.index(True) + 1] if any(capped) else real.trajectory
    retain, forget = rolled.retain_loss[0, 0], rolled.forget_loss[0, 0]
    np.testing.assert_allclose(retain[: len(shown)], [c.retain_loss for c in shown], rtol=1e-7)
    np.testing.assert_allclose(forget[: len(shown)], [c.forget_loss for c in shown], rtol=1e-7)
    assert bool((retain[len(shown) :] == retain[len(shown) - 1]).all())  # constant after the end
    step = float(rolled.divergence_step[0, 0])
    assert (None if math.isnan(step) else step) == real.divergence_step
    if not any(capped):
        assert float(rolled.stopped_step[0, 0]) == real.steps
    if real.divergence_step is None:
        c = rolled.coordinates[0, 0]
        assert float(c @ network.metric @ c) ** 0.5 == pytest.approx(real.trajectory[-1].distance, rel=1e-6)
    return rolled, real


@given(
    lr=st.sampled_from((0.01, 0.1, 0.4, 1.5)),
    mix=st.sampled_from((0.0, 0.2, 0.6, 1.0)),
    sampling=st.sampled_from(SAMPLINGS),
    momentum=st.sampled_from((0.0, 0.8)),
    batches=st.tuples(st.integers(1, 16), st.integers(1, 8)),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_a_linear_models_rollout_is_its_run(loss, lr, mix, sampling, momentum, batches, seed):
    algorithm = GradDiff(
        lr=lr,
        mix=mix,
        steps=18,
        sampling=sampling,
        momentum=momentum,
        batch_size=batches[0],
        forget_batch_size=batches[1],
    )
    compare_to_run(linear_problem(loss), algorithm, seed=seed)


STEP_SETTINGS = st.fixed_dictionaries({
    "weight_decay": st.sampled_from((0.0, 0.03, 0.4)),
    "max_gradient_norm": st.sampled_from((None, 0.05, 1.0)),
    "lr_schedule": st.sampled_from((None, "cosine", "linear", "warmup", tuple(0.1 * (k % 3) for k in range(18)))),
    "forget_schedule": st.sampled_from((None, "cosine", "warmup", tuple(0.5 * (k % 3) for k in range(18)))),
    "forget_every": st.sampled_from((None, 2, 5)),
})
MOMENTA = st.sampled_from(({"momentum": 0.0}, {"momentum": 0.8}, {"momentum": 0.6, "nesterov": True}))


def masked(problem, seed):
    """A 0/1 diagonal, under which weight decay and the norm of a gradient stay inside the coordinates."""
    return Diagonal((normal(seed, problem.size) > -0.3).double())


@given(
    lr=st.sampled_from((0.02, 0.2, 1.0)),
    mix=st.sampled_from((0.0, 0.3, 1.0)),
    sampling=st.sampled_from(SAMPLINGS),
    settings=STEP_SETTINGS,
    momentum=MOMENTA,
    mask=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_every_setting_of_a_step_is_rolled_out_as_it_is_run(loss, lr, mix, sampling, settings, momentum, mask, seed):
    """Property 12 with decay, clipping, Nesterov's momentum, schedules and cycles of forget and retain steps."""
    problem = linear_problem(loss)
    algorithm = GradDiff(lr=lr, mix=mix, steps=18, sampling=sampling, batch_size=5, forget_batch_size=3, **settings)
    algorithm = algorithm.replace(**momentum)
    compare_to_run(problem, algorithm, seed=seed, preconditioner=masked(problem, seed) if mask else None)


LAYERS = st.sampled_from((None, {"weight": 0.3}, {"bias": 0.0}, {"weight": 0.0, "bias": 2.5}))


@given(
    lr=st.sampled_from((0.02, 0.2, 1.0)),
    mix=st.sampled_from((0.0, 0.3, 1.0)),
    settings=STEP_SETTINGS,
    momentum=MOMENTA,
    rates=LAYERS,
    decays=LAYERS,
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_layers_of_their_own_step_size_and_decay_are_rolled_out_as_they_are_run(
    loss, lr, mix, settings, momentum, rates, decays, seed
):
    if rates and 0 in rates.values():  # clipping is refused
        settings = {**settings, "max_gradient_norm": None}
    layers = {"layer_lr": rates, "layer_weight_decay": decays}
    algorithm = GradDiff(lr=lr, mix=mix, steps=18, batch_size=5, forget_batch_size=3, **settings, **layers)
    compare_to_run(linear_problem(loss), algorithm.replace(**momentum), seed=seed)


@pytest.mark.parametrize("optimizer", [{}, {"momentum": 0.5}])
def test_a_pause_of_the_schedule_is_no_drift_that_has_ended(optimizer):
    """A warm-up that begins at 0 moves nothing in its first step, and the run goes on all the same."""
    problem = linear_problem("cross_entropy")
    schedule = [0.0, 0.5, 1.0, 0.0, *[1.0] * 8]
    algorithm = AGU(lr=0.1, steps=12, batch_size=5, drift_tolerance=1e-8, lr_schedule=schedule, **optimizer)
    _, real = compare_to_run(problem, algorithm)
    assert (real.steps, real.stop_reason) == (12, "steps")
    _, real = compare_to_run(problem, algorithm.replace(drift_tolerance=1e9))
    assert (real.steps, real.stop_reason) == (2, "drift")  # in the first step that is none


@pytest.mark.parametrize("settings", [{"max_gradient_norm": 0.05}, {"lr_schedule": "cosine", "forget_every": 3}])
def test_clipping_and_schedules_are_exact_under_any_preconditioner(settings):
    """What is clipped is the norm of Pĝ, which the coordinates know; the norm of ĝ they do not."""
    problem = linear_problem("cross_entropy")
    p = Diagonal(torch.rand(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    algorithm = GradDiff(lr=0.5, mix=0.3, steps=30, batch_size=5, momentum=0.5, **settings)
    _, real = compare_to_run(problem, algorithm, preconditioner=p)
    free = run(problem, GradDiff(lr=0.5, mix=0.3, steps=30, batch_size=5, momentum=0.5), preconditioner=p)
    assert real.trajectory[-1].retain_loss != pytest.approx(free.trajectory[-1].retain_loss, rel=1e-3)


def test_weight_decay_under_a_general_preconditioner_is_exact_to_first_order_in_the_decay():
    """On a network whose parameters outnumber its outputs, so that decay moves what the coordinates do not hold."""
    problem = problem_of(1)
    p = Diagonal(torch.rand(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    network = linearise(problem, p, rank=10_000, retain_samples=None, forget_samples=None)
    assert network.rank < problem.size
    network = replace(network, divergence_level=1e9)
    jacobians = jacobians_of(1)
    errors, effects = [], []
    for decay in (0.04, 0.02):
        algorithm = GradDiff(lr=0.05, mix=0.0, steps=8, batch_size=13, weight_decay=decay)
        rolled = rollout(network, algorithm, lr=[0.05], mix=[0.0], batch_sizes=(13, 5), seeds=[0])
        outputs, targets, jacobian = jacobians[0]
        delta = torch.zeros(problem.size, dtype=torch.float64)
        for _ in range(8):
            f = outputs + (jacobian @ delta).reshape(outputs.shape)
            gradient = torch.einsum("mod,mo->d", jacobian, problem.loss.residual(f, targets).flatten(1)) / 13
            delta = delta - 0.05 * p.diagonal * (gradient + decay * (problem.vector() + delta))
        free = rollout(
            network, algorithm.replace(weight_decay=0.0), lr=[0.05], mix=[0.0], batch_sizes=(13, 5), seeds=[0]
        )
        found = network.retain.features @ rolled.coordinates[0, 0]
        exact, plain = jacobian @ delta, network.retain.features @ free.coordinates[0, 0]
        errors.append(float((found - exact).norm()))
        effects.append(float((plain - exact).norm()))
    assert errors[1] < errors[0] / 3  # of second order in the decay
    assert errors[0] < 0.05 * effects[0]


@pytest.mark.parametrize("algorithm", [GradientAscent(lr=0.3), FineTune(lr=0.05), AGU(lr=0.2, mix=0.4)])
def test_every_algorithm_of_a_linear_model(algorithm):
    rolled, _ = compare_to_run(linear_problem("cross_entropy"), algorithm.replace(steps=40, batch_size=5))
    assert rolled.lr.tolist() == [algorithm.lr]
    assert rolled.mix.tolist() == [algorithm.mix]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"drift_tolerance": 2e-3, "lr": 0.02, "mix": 0.0}, "drift"),
        ({"leakage_bound": 0.05, "lr": 0.3, "mix": 0.6}, "leakage"),
        ({"leakage_bound": 0.001, "lr": 0.3, "mix": 0.0}, "leakage"),  # fine-tuning moves forget predictions too
        ({"drift_tolerance": 0.0, "leakage_bound": 1e9, "lr": 0.1, "mix": 0.3}, "steps"),
    ],
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_linear_run_and_its_rollout_stop_at_one_step(settings, reason, sampling):
    problem = linear_problem("cross_entropy")
    algorithm = AGU(**{"drift_tolerance": None, **settings}, steps=400, batch_size=6, sampling=sampling)
    rolled, real = compare_to_run(problem, algorithm, check_every=50)
    assert real.stop_reason == reason
    assert float(rolled.stopped_step[0, 0]) == real.steps
    if reason != "steps":
        assert 1 < real.steps < 400


# ------------------------------------------------------------------ many settings, many seeds


settings = st.lists(
    st.tuples(st.sampled_from((0.01, 0.1, 0.5, 2.0, 30.0)), st.sampled_from((0.0, 0.1, 0.5, 1.0))),
    min_size=1,
    max_size=5,
)


def roll(network, algorithm, pairs, **options):
    lr, mix = zip(*pairs, strict=True)
    options = {"batch_sizes": (4, 2), "seeds": [3], "check_every": 5, **options}
    return rollout(network, algorithm, lr=lr, mix=mix, **options)


@given(
    pairs=settings,
    case=st.sampled_from(range(len(CASES))),
    sampling=st.sampled_from(SAMPLINGS),
    momentum=st.sampled_from((0.0, 0.6)),
    rule=st.sampled_from(({}, {"drift_tolerance": 1e-3}, {"leakage_bound": 0.02})),
    level=st.sampled_from((1.2, 3.0, 1e4)),
)
def test_a_batch_of_settings_is_each_alone(pairs, case, sampling, momentum, rule, level):
    """Settings that stop or blow up leave, and those that stay neither notice nor are looked at at other steps."""
    network = network_of(case, True)[1]
    network = replace(network, divergence_level=level * abs(problem_of(case).retain_loss))
    algorithm = AGU(**{"drift_tolerance": None, **rule}, steps=13, sampling=sampling, momentum=momentum)
    together = roll(network, algorithm, pairs)
    for g, pair in enumerate(pairs):
        alone = roll(network, algorithm, [pair])
        for name in FIELDS:
            found, wanted = (np.asarray(getattr(r, name)) for r in (together, alone))
            found, wanted = found[:, g], wanted[:, 0]
            rtol, atol = 1e-9, 1e-12
            if name == "coordinates":  # products of other shapes round by a share of the vector, not of each entry
                size = np.abs(wanted).max(-1, keepdims=True).clip(1e-2)
                found, wanted, rtol, atol = found / size, wanted / size, 0.0, 1e-10
            np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "algorithm",
    [
        GradDiff(steps=9),
        RandomLabels(steps=9),
        AGU(steps=70, drift_tolerance=None, leakage_bound=0.05),  # seeds stop at steps of their own
        SFROn(steps=9, batch_size=4, forget_every=3),
    ],
    ids=lambda algorithm: algorithm.name,
)
def test_seeds_are_independent_and_each_repeats_itself(algorithm):
    network = network_of(0)[1]
    pairs = [(0.1, 0.5), (0.3, 0.2)]
    together, again = (roll(network, algorithm, pairs, seeds=[4, 9, 5]) for _ in range(2))
    for name in FIELDS:
        assert torch.equal(getattr(together, name).nan_to_num(), getattr(again, name).nan_to_num())
        for s, seed in enumerate((4, 9, 5)):
            alone = getattr(roll(network, algorithm, pairs, seeds=[seed]), name)
            # Settings that end leave the working set for all seeds at once, which changes the rounding.
            np.testing.assert_allclose(getattr(together, name)[s], alone[0], rtol=1e-9, atol=1e-12, err_msg=name)
    assert not torch.equal(together.coordinates[0], together.coordinates[1])
    if algorithm.name == "agu":
        assert len(set(together.stopped_step[:, 0].tolist())) > 1


def test_seeds_share_a_step_as_far_as_its_memory_goes(monkeypatch):
    network = network_of(0)[1]
    pairs = [(0.1, 0.5), (0.3, 0.2)]
    together = roll(network, GradDiff(steps=9), pairs, seeds=range(5))
    alone = []
    plain = stabkit.rollout.roll._roll_seeds

    def noted(network, algorithm, etas, alphas, batch_sizes, seeds, *rest, **named):
        alone.append(list(seeds))
        return plain(network, algorithm, etas, alphas, batch_sizes, seeds, *rest, **named)

    monkeypatch.setattr(stabkit.rollout.roll, "_roll_seeds", noted)
    width = max(4, 2) * network.retain.outputs[0].numel() * network.retain.features.element_size()
    monkeypatch.setattr(stabkit.rollout.roll, "STEP_BYTES", 2 * (len(pairs) + network.rank) * width)
    parts = roll(network, GradDiff(steps=9), pairs, seeds=range(5))
    assert alone == [[0, 1], [2, 3], [4]]
    for name in FIELDS:
        np.testing.assert_allclose(getattr(together, name), getattr(parts, name), rtol=1e-9, atol=1e-12, err_msg=name)


def test_looks_are_taken_at_some_settings_at_a_time_where_outputs_are_large(monkeypatch):
    network = network_of(0)[1]
    pairs = [(0.1, 0.5), (0.3, 0.2), (0.2, 0.1)]
    together = roll(network, GradDiff(steps=9), pairs, seeds=range(2))
    plain, sizes = stabkit.rollout.sets.RolledSet.looked_at, []

    def noted(self, c, indices=None):
        sizes.append(c.shape[1])
        return plain(self, c, indices)

    monkeypatch.setattr(stabkit.rollout.sets.RolledSet, "looked_at", noted)
    outputs = network.retain.outputs
    monkeypatch.setattr(stabkit.rollout.sets, "LOOK_BYTES", 2 * outputs.numel() * outputs.element_size())
    parts = roll(network, GradDiff(steps=9), pairs, seeds=range(2))
    assert {1, 2} <= set(sizes)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(together, name), getattr(parts, name), rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_set_that_is_not_taken_has_no_part_whatever_its_gradient():
    """At mix 0 beside another mix, where the forget loss has no derivative: a run at mix 0 does not take one."""
    network = linearise(linear_problem("mse"), Identity(), rank=1000, retain_samples=None, forget_samples=None)
    rooted = CustomLoss(lambda outputs, targets: (outputs - targets).square().sum(1).sqrt())
    fitted = replace(network.forget, targets=network.forget.outputs.clone())
    network = replace(network, loss=rooted, forget=fitted, divergence_level=1e3)
    alone = roll(network, GradDiff(steps=6), [(0.01, 0.0)])
    together = roll(network, GradDiff(steps=6), [(0.01, 0.0), (0.01, 0.4)])
    assert bool(alone.retain_loss.isfinite().all())
    assert not bool(together.retain_loss[:, 1].isfinite().all())
    torch.testing.assert_close(together.retain_loss[:, 0], alone.retain_loss[:, 0], rtol=1e-12, atol=0)


def test_the_random_state_and_the_network_are_left_alone():
    network = network_of(0)[1]
    before = torch.get_rng_state(), network.retain.features.clone(), network.retain.outputs.clone()
    roll(network, AGU(steps=5, leakage_bound=0.1), [(0.1, 0.5)], seeds=range(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(network.retain.features, before[1])
    assert torch.equal(network.retain.outputs, before[2])


def test_a_progress_bar_is_drawn_on_request(capsys):
    roll(network_of(0)[1], GradDiff(steps=2), [(0.1, 0.5)])
    assert capsys.readouterr().err == ""
    roll(network_of(0)[1], GradDiff(steps=2), [(0.1, 0.5)], progress=True)
    assert "rollout" in capsys.readouterr().err


# ------------------------------------------------------------------ the monitor


@given(steps=st.integers(1, 40), check_every=st.integers(1, 15))
def test_the_losses_are_looked_at_where_a_run_looks(steps, check_every):
    rolled = roll(network_of(1)[1], GradDiff(steps=steps), [(1e-3, 0.5)], check_every=check_every)
    expected = {*range(min(steps, check_every) + 1), *range(0, steps + 1, check_every), steps}
    assert rolled.steps.tolist() == sorted(expected)
    assert rolled.retain_loss.shape == rolled.forget_loss.shape == (1, 1, len(expected))


def test_the_score_is_the_largest_log_ratio_and_is_capped():
    problem = linear_problem("mse")
    network = linearise(problem, Identity(), rank=100, retain_samples=None, forget_samples=None)
    pairs = [(0.01, 0.0), (0.05, 0.5), (40.0, 0.5)]
    rolled = roll(network, GradDiff(steps=60), pairs, seeds=[0, 1])
    ratio = (rolled.retain_loss / problem.divergence_level).log()
    stretch = max(1.0, -1 / float(ratio[0, 0, 0]))
    assert stretch > 1
    ratio = torch.where(ratio < 0, stretch * ratio, ratio)
    torch.testing.assert_close(rolled.score, ratio.max(2).values.clamp_max(SCORE_CAP))
    assert bool((rolled.score[:, 0] < 0).all())
    assert bool((rolled.score[:, 2] == SCORE_CAP).all())
    assert bool(((rolled.score >= 0) == rolled.divergence_step.isfinite()).all())
    for s in range(2):
        for g in range(3):
            passed = rolled.steps[ratio[s, g] >= 0]
            first = float(passed[0]) if passed.numel() else math.nan
            np.testing.assert_equal(float(rolled.divergence_step[s, g]), first)
    slope = calibration("one").slope
    torch.testing.assert_close(rolled.probability, torch.sigmoid(slope * rolled.score).mean(0))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_half_trained_model_is_not_half_diverged(share):
    """A step size of nothing leaves the loss where it was, which is no sign of divergence."""
    network = network_of(1)[1]
    start = float(roll(network, GradDiff(steps=1), [(1e-9, 0.0)], seeds=[0]).retain_loss[0, 0, 0])
    network = replace(network, divergence_level=start / share)
    rolled = roll(network, GradDiff(steps=40), [(1e-9, 0.0), (1e9, 1.0)], seeds=[0])
    still, gone = rolled.score[0].tolist()
    assert still == pytest.approx(min(-1.0, math.log(share)), rel=1e-5)
    assert float(rolled.probability[0]) < 0.05
    assert gone == SCORE_CAP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(4), ids=lambda i: CASES[i].name)
def test_what_is_not_finite_is_divergence(case, dtype):
    network = replace(network_of(case)[1], divergence_level=1e3)
    rolled = roll(
        network, GradDiff(steps=8), [(1e308 if dtype == torch.float64 else 1e38, 0.5), (1e-4, 0.5)], dtype=dtype
    )
    assert float(rolled.score[0, 0]) == SCORE_CAP
    assert 1 <= float(rolled.divergence_step[0, 0]) <= 2
    assert float(rolled.retain_loss[0, 0, -1]) > 1e30
    assert not bool(rolled.retain_loss.isnan().any())
    assert float(rolled.score[0, 1]) < 0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return self.weight * x


def test_a_forget_loss_that_overflows_is_divergence_as_in_a_run():
    """The retain loss stays small: its inputs are."""
    x = torch.linspace(0.01, 0.02, 12, dtype=torch.float64).unsqueeze(1)
    forget = -1e5 * x[:4]

    def loss(outputs, targets):
        return (outputs.exp() - targets * outputs).sum(1)

    problem = UnlearningProblem(
        Scaled(), (forget, -torch.ones(4, 1, dtype=torch.float64)), (x[4:], 2 * x[4:].exp()), loss=loss
    )
    network = replace(linearise(problem, Identity(), rank=1), divergence_level=1e9)
    problem.divergence_level = 1e9
    algorithm = GradDiff(lr=4e-3, mix=0.5, steps=4, batch_size=4)
    rolled = roll(network, algorithm, [(4e-3, 0.5)], batch_sizes=(4, 4), seeds=[0])
    real = run(problem, algorithm, seed=0)
    assert real.trajectory[-1].retain_loss < 1e6
    assert (float(rolled.score[0, 0]), float(rolled.divergence_step[0, 0])) == (SCORE_CAP, real.divergence_step)


def test_an_overflowing_loss_is_infinite_not_the_largest_number():
    network = replace(network_of(1)[1], divergence_level=1e3)
    rolled = roll(network, GradDiff(steps=3), [(1e200, 0.0)])
    assert float(rolled.retain_loss[0, 0, -1]) == math.inf


def test_a_network_past_the_level_at_the_start_has_diverged_there():
    network = replace(network_of(0)[1], divergence_level=0.5 * problem_of(0).retain_loss)
    rolled = roll(network, FineTune(steps=3), [(1e-3, 0.0)])
    assert float(rolled.divergence_step[0, 0]) == 0
    assert float(rolled.score[0, 0]) >= math.log(2) - 1e-9
    assert float(rolled.coordinates.abs().max()) == 0


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["positive", "negative"])
def test_a_loss_below_zero_is_judged_by_the_level_all_the_same(shift):
    """As in `run`, only the comparison with the level counts, of whatever sign the two are."""

    def loss(outputs, targets):
        return (outputs - targets).square().sum(1) - shift

    plain = linear_problem("mse")
    x, y = plain.retain.batch(torch.arange(16))
    forget = plain.forget.batch(torch.arange(8))
    problem = UnlearningProblem(plain.new_model(), forget, (x, y), loss=loss)
    assert (problem.divergence_level > 0) == (shift == 0)
    network = linearise(problem, Identity(), rank=100, retain_samples=None, forget_samples=None)
    for lr, mix in ((0.01, 0.0), (0.01, 0.4), (0.3, 0.5), (5.0, 0.5)):
        algorithm = GradDiff(lr=lr, mix=mix, steps=25, batch_size=4)
        rolled = roll(network, algorithm, [(lr, mix)], batch_sizes=(4, 4), seeds=[0], check_every=3)
        real = run(problem, algorithm, seed=0, check_every=3)
        step = float(rolled.divergence_step[0, 0])
        assert (None if math.isnan(step) else step) == real.divergence_step
        assert float(rolled.score[0, 0] >= 0) == float(rolled.probability[0] >= 0.5) == float(real.diverged)


def test_the_median_step_needs_half_of_the_seeds():
    rolled = roll(network_of(0)[1], GradDiff(steps=2), [(0.1, 0.5)] * 3, seeds=range(4))
    nan = math.nan
    steps = torch.tensor([[1.0, nan, nan], [4.0, 7.0, nan], [2.0, nan, 3.0], [9.0, nan, 5.0]])
    assert replace(rolled, divergence_step=steps).expected_divergence_step() == [2.0, None, 3.0]


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize(("mix", "every"), [(1.0, None), (0.5, 5), (0.5, None)])
def test_an_empty_poisson_batch_is_no_standstill(mix, every):
    """A step that draws nothing moves nothing, which is no drift that has ended: neither in a run nor in its rollout."""
    problem = linear_problem("mse")
    algorithm = AGU(
        lr=1e-3, mix=mix, steps=60, batch_size=1, forget_batch_size=1, sampling="poisson", forget_every=every
    )
    network = linearise(problem, algorithm.preconditioner(problem))
    batches = algorithm.batch_sizes(problem)
    retain, forget = batch_streams((problem.retain.size, problem.forget.size), batches, "poisson", 0)
    empty = [next(forget).numel() == 0 and (mix == 1 or next(retain).numel() == 0) for _ in range(60)]
    assert any(empty) or every is not None
    real = run(problem, algorithm, seed=0)
    rolled = rollout(network, algorithm, lr=[algorithm.lr], mix=[mix], batch_sizes=batches, seeds=[0])
    assert real.stop_reason == "steps"
    assert rolled.stopped_step.tolist() == [[60.0]]
    # Nor is a setting of the other mix held up by what it does not take.
    other = rollout(network, algorithm, lr=[1e-3, 1e-30], mix=[mix, mix], batch_sizes=batches, seeds=[0])
    assert other.stopped_step[0, 0] == 60
    assert other.stopped_step[0, 1] < 60


def test_an_empty_poisson_batch_adds_nothing():
    """At an expected batch of one in 16 and 8 most seeds have a step without a sample; every sum is over B, not its draw."""
    problem = linear_problem("mse")
    algorithm = GradDiff(lr=0.05, mix=0.5, steps=6, batch_size=1, sampling="poisson")
    sizes = []
    for seed in range(6):
        compare_to_run(problem, algorithm, seed=seed, check_every=2)
        streams = batch_streams((16, 8), (1, 1), "poisson", seed)
        sizes += [[next(stream).numel() for stream in streams] for _ in range(6)]
    assert [0, 0] in sizes
    assert any(max(pair) > 1 for pair in sizes)


def fixed_samples(problem, held):
    """A linearisation of the first `held` samples of each set, standing for the whole of it, at full rank."""
    network = linearise(problem, Identity(), rank=1000, retain_samples=None, forget_samples=None)

    def part(of, count):
        chosen = torch.arange(count)
        return replace(
            of, outputs=of.outputs[:count], features=of.features[:count], targets=of.targets[:count], indices=chosen
        )

    return replace(
        network,
        retain=part(network.retain, held[0]),
        forget=part(network.forget, held[1]),
        divergence_level=1e9,
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_batches_of_a_sample_vary_as_those_of_the_whole_set(sampling):
    """Mean and covariance of a step, over seeds, against c(B, n) of the table under T6: the samples held are m of n."""
    problem, lr, mix, batches, draws = linear_problem("mse"), 0.1, 0.4, (10, 3), 1200
    network = fixed_samples(problem, (8, 4))  # of 16 and 8
    algorithm = GradDiff(steps=1, sampling=sampling)
    rolled = roll(network, algorithm, [(lr, mix)], batch_sizes=batches, seeds=range(draws))
    steps = rolled.coordinates[:, 0]
    mean, covariance = torch.zeros(network.rank).double(), torch.zeros(network.rank, network.rank).double()
    for part, weight, batch in ((network.retain, 1 - mix, batches[0]), (network.forget, -mix, batches[1])):
        gradients = part.factors(network.loss).gradients
        mean -= lr * weight * gradients.mean(0)
        centred = gradients if sampling == "poisson" else gradients - gradients.mean(0)
        spread = centred.T @ centred / part.samples
        covariance += (lr * weight) ** 2 * noise_level(batch, part.population, sampling) * spread
    found = steps - mean
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    assert bool((found.mean(0).abs() <= 5 * deviation / draws**0.5 + 1e-12).all())
    error = found.T @ found / draws - covariance
    allowed = 6 * torch.outer(deviation, deviation) / (draws / 2) ** 0.5
    assert bool((error.abs() <= allowed + 1e-15).all())
    # Drawn from the m alone, as if they were all there is, batches would vary less; with replacement, more.
    assert float(found.square().sum(1).mean()) == pytest.approx(float(covariance.trace()), rel=0.05)


@pytest.mark.parametrize("held", [(8, 4), (5, 3), (16, 8)])
def test_full_batches_of_a_sample_have_its_mean_gradient(held):
    """At B = n nothing is left to chance; where m does not divide n, one more of n plays some samples than others."""
    problem, lr, mix = linear_problem("mse"), 0.1, 0.4
    network = fixed_samples(problem, held)
    rolled = roll(network, GradDiff(steps=1), [(lr, mix)], batch_sizes=(16, 8), seeds=range(40))
    gradients = [part.factors(network.loss).gradients for part in (network.retain, network.forget)]
    expected = -lr * ((1 - mix) * gradients[0].mean(0) - mix * gradients[1].mean(0))
    if held == (5, 3):
        coarse = sum(lr * (g.abs().sum(0) / n) for g, n in zip(gradients, (16, 8), strict=True))
        assert bool(((rolled.coordinates[:, 0] - expected).abs() <= coarse).all())
        torch.testing.assert_close(rolled.coordinates[:, 0].mean(0), expected, atol=0.3 * float(coarse.max()), rtol=0)
    else:
        torch.testing.assert_close(rolled.coordinates[:, 0], expected.expand(40, -1), rtol=1e-9, atol=1e-12)


def test_samples_that_are_held_play_themselves():
    """A batch of one is the sample that `run` draws, where it is held."""
    problem = linear_problem("mse")
    network = linearise(problem, Identity(), rank=1000, retain_samples=9, forget_samples=5, seed=2)
    held = network.retain.indices.tolist()
    gradients = network.retain.factors(network.loss).gradients
    matched = 0
    for seed in range(20):
        stream, _ = batch_streams((16, 8), (1, 1), "without_replacement", seed)
        drawn = int(next(stream))
        rolled = roll(network, FineTune(steps=1), [(0.1, 0.0)], batch_sizes=(1, 1), seeds=[seed])
        if drawn in held:
            matched += 1
            torch.testing.assert_close(rolled.coordinates[0, 0], -0.1 * gradients[held.index(drawn)])
    assert matched > 5


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_at_either_end_of_the_mix_the_other_set_does_not_count(mix):
    network = network_of(0)[1]
    algorithm = GradDiff(steps=6)
    plain = roll(network, algorithm, [(0.2, mix)])
    other = network.forget if mix == 0 else network.retain
    wrong = replace(other, targets=(other.targets + 1) % 3)
    changed = replace(network, **{"forget" if mix == 0 else "retain": wrong})
    assert torch.equal(roll(changed, algorithm, [(0.2, mix)]).coordinates, plain.coordinates)
    assert float(plain.coordinates.abs().max()) > 0


def test_a_lower_precision_is_the_same_run_up_to_rounding():
    network = network_of(0)[1]
    double, single = (roll(network, GradDiff(steps=9), [(0.2, 0.4)], dtype=t) for t in (None, torch.float32))
    torch.testing.assert_close(single.retain_loss, double.retain_loss, rtol=1e-4, atol=0)
    assert not torch.equal(single.retain_loss, double.retain_loss)
    assert single.lr.tolist() == [0.2]  # as asked, not as rounded


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": [0.1, 0.2]}, ValueError, "`lr` and `mix` of `rollout` must be equally many.*got 2 and 1"),
        ({"lr": [], "mix": []}, ValueError, "`lr` and `mix` of `rollout` .*at least one; got 0 and 0"),
        ({"lr": [0.0]}, ValueError, r"`lr` of `rollout` must be a finite number in \(0, inf\); got 0\.0"),
        ({"lr": [math.nan]}, ValueError, "`lr` of `rollout` .*got nan"),
        ({"lr": [math.inf]}, ValueError, "`lr` of `rollout` .*got inf"),
        ({"mix": [1.25]}, ValueError, r"`mix` of `rollout` must be a finite number in \[0, 1\]; got 1\.25"),
        ({"mix": [-0.5]}, ValueError, r"`mix` of `rollout` .*got -0\.5"),
        ({"seeds": []}, ValueError, "`seeds` of `rollout` must name at least one seed; got none"),
        ({"seeds": [0, -3]}, ValueError, "`seeds` of `rollout` must be a whole number >= 0; got -3"),
        ({"seeds": [0.5]}, TypeError, r"`seeds` of `rollout` must be a whole number >= 0; got 0\.5"),
        ({"check_every": 0}, ValueError, "`check_every` of `rollout` must be a whole number >= 1; got 0"),
        ({"check_every": 2.5}, TypeError, r"`check_every` of `rollout` .*got 2\.5"),
        ({"batch_sizes": (15, 2)}, ValueError, r"`batch_sizes` of `rollout` must be .*\[1, 14\]; got 15"),
        ({"batch_sizes": (4, 0)}, ValueError, r"`batch_sizes` of `rollout` must be .*\[1, 6\]; got 0"),
    ],
)
def test_what_is_wrong_is_said(changes, error, message):
    arguments = {"lr": [0.1], "mix": [0.5], "batch_sizes": (4, 2), "seeds": [0], **changes}
    with pytest.raises(error, match=message):
        rollout(network_of(0)[1], GradDiff(steps=2), **arguments)
