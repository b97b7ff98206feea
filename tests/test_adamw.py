"""AdamW: runs take torch's steps, and rollouts those of the linearised network, parameter by parameter (T15)."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit.adam import frozen_adam
from stabkit.algorithms import (
    AGU,
    SCRUB,
    FineTune,
    GradDiff,
    GradientAscent,
    L1Sparse,
    RemainNewton,
    SalUn,
    SFROn,
    retrain,
)
from stabkit.cause import start_errors
from stabkit.curvature import ScaledJacobian, linearise, sample_coordinates
from stabkit.datasets import digits
from stabkit.deletion import one_class
from stabkit.models import SmallCNN
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.runner import check_steps, run
from stabkit.sampling import SAMPLINGS, batch_streams
from stabkit.staged import staged_rollout
from stabkit.training import train
from tests.cases import CASES, jacobians_of, problem_of

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
ALGORITHMS = [
    GradDiff(lr=0.01, mix=0.3),
    GradDiff(lr=0.02, mix=0.4, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-3),
    GradDiff(lr=0.02, mix=0.6, max_gradient_norm=0.05, lr_schedule="cosine", betas=(0.0, 0.5)),
    GradDiff(lr=0.02, mix=0.4, forget_every=3, forget_schedule="cosine"),
    GradientAscent(lr=0.01),
    FineTune(lr=0.03, weight_decay=0.1),
    AGU(lr=0.02, mix=0.4),
    SalUn(lr=0.02),
    SalUn(lr=0.02, weight_decay=0.5),
    SCRUB(lr=0.02),
    SFROn(lr=0.02),
    L1Sparse(lr=0.02),
]
ALGORITHMS = [a.replace(optimizer="adamw", steps=9, batch_size=3, forget_batch_size=2) for a in ALGORITHMS]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.name}-{ALGORITHMS.index(a)}")


def final_vector(problem, result):
    own = dict(result.model.named_parameters())
    return torch.cat([own[name].detach().reshape(-1) for name in problem.parameters])


def everything(problem, algorithm, *, count=10**6, **options):
    """Every parameter that moves, every sample; p is no matter of a rollout, so one of its own."""
    run_p = algorithm.step_preconditioner(problem)
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    return sample_coordinates(
        problem,
        Diagonal((p * run_p.apply(torch.ones_like(p))).to(problem.dtype)),
        run_p=run_p,
        paces=algorithm.layer_factors(problem),
        decays=algorithm.decay_factors(problem),
        count=count,
        retain_samples=None,
        forget_samples=None,
        **options,
    )


def by_torch(problem, algorithm, seed, outputs_of, *, signs=None):
    """θ after every step of torch.optim.AdamW, with gradients by autograd through `outputs_of(θ, set, indices)`.

    A pull goes against signs that are given, as a rollout has those of θ*, or else those of θ.
    """
    from stabkit.algorithms.base import Batch, PlainSteps

    sizes, batches = (problem.retain.size, problem.forget.size), algorithm.batch_sizes(problem)
    streams = batch_streams(sizes, batches, algorithm.sampling, seed)
    p = algorithm.step_preconditioner(problem)
    plain = p if isinstance(p, PlainSteps) else PlainSteps()
    theta = nn.Parameter(problem.vector().clone())
    factors = algorithm.decay_factors(problem)
    decay = algorithm.weight_decay if factors is None else 0.0
    rule = torch.optim.AdamW([theta], lr=1.0, betas=algorithm.betas, eps=algorithm.eps, weight_decay=decay)
    course = [theta.detach().clone()]
    for step, plan in enumerate(algorithm.plan(), 1):
        total = torch.zeros_like(theta)
        sets = ((problem.retain, (1 - algorithm.mix) * plan.retain), (problem.forget, -algorithm.mix * plan.forget))
        for which, (samples, weight) in enumerate(sets):
            if not (plan.forget if which else plan.retain):
                continue
            indices = next(streams[which])
            if weight == 0 or indices.numel() == 0:
                continue
            outputs = outputs_of(theta, which, indices)
            _, targets = samples.batch(indices)
            batch = Batch(
                outputs=outputs.detach(),
                targets=targets,
                original=outputs_of(problem.vector(), which, indices).detach(),
                copies=1,
                step=step,
                seeds=(seed,),
            )
            chosen = algorithm.forget_residual if which else algorithm.retain_residual
            residual = chosen(problem.loss, batch) * weight / batches[which]
            (gradient,) = torch.autograd.grad((outputs * residual).sum(), theta)
            total += gradient if plain.forget_mask is None or not which else gradient * plain.forget_mask
        theta.grad = p.apply(total)
        if plan.max_norm is not None:
            nn.utils.clip_grad_norm_([theta], plan.max_norm)
        if plan.pull:
            theta.grad += plan.pull * (theta.detach().sign() if signs is None else signs)
        rule.param_groups[0]["lr"] = algorithm.lr * plan.lr
        if factors is not None:  # as groups of their own
            theta.data.mul_(1 - algorithm.lr * plan.lr * algorithm.weight_decay * factors)
        rule.step()
        held = p.apply(torch.ones_like(total)) == 0
        theta.data[held] = course[0][held]  # nor does it decay
        course.append(theta.detach().clone())
    return course


# ------------------------------------------------------------------ runs


@algorithms
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_run_is_torchs(algorithm, sampling):
    problem = problem_of(0)
    algorithm = algorithm.replace(sampling=sampling)

    def outputs_of(theta, which, indices):
        samples = problem.forget if which else problem.retain
        return problem.outputs(problem.unflatten(theta), samples.batch(indices)[0])

    expected = by_torch(problem, algorithm, 4, outputs_of)
    found = run(problem, algorithm, seed=4, stop_on_divergence=False)
    assert float((expected[-1] - expected[0]).norm()) > 1e-3
    torch.testing.assert_close(final_vector(problem, found), expected[-1], rtol=1e-9, atol=1e-11)


def test_layers_have_step_sizes_of_their_own():
    """As parameter groups: the gradient is not what the factors multiply, or AdamW would undo them."""
    problem = problem_of(0)
    algorithm = GradDiff(lr=0.02, mix=0.0, steps=5, batch_size=problem.retain.size, optimizer="adamw", weight_decay=0.2)
    names = list(problem.parameters)
    first = problem.layer_of()[names[0]]
    parameters = {name: nn.Parameter(p.clone()) for name, p in problem.parameters.items()}
    groups = [
        {"params": [p for name, p in parameters.items() if (problem.layer_of()[name] == first) == damped], "lr": lr}
        for damped, lr in ((True, 0.002), (False, 0.02))
    ]
    rule = torch.optim.AdamW(groups, weight_decay=0.2)
    inputs, targets = problem.retain.batch(torch.arange(problem.retain.size))
    for _ in range(5):
        rule.zero_grad()
        problem.loss.per_sample(problem.outputs(parameters, inputs), targets).mean().backward()
        rule.step()
    found = run(problem, algorithm.replace(layer_lr={first: 0.1}), stop_on_divergence=False)
    expected = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    torch.testing.assert_close(final_vector(problem, found), expected, rtol=1e-9, atol=1e-11)


def layers_of(problem):
    return list(dict.fromkeys(problem.layer_of().values()))


@pytest.mark.parametrize(("case", "number"), [(0, 1), (1, 1), (2, 1), (0, 6), (0, 8)])  # GradDiff, AGU and SalUn
def test_layers_decay_by_factors_of_their_own(case, number):
    layers = layers_of(problem_of(case))
    algorithm = ALGORITHMS[number].replace(weight_decay=0.6, layer_weight_decay={layers[0]: 0.0, layers[-1]: 0.25})
    problem = problem_of(case)

    def outputs_of(theta, which, indices):
        samples = problem.forget if which else problem.retain
        return problem.outputs(problem.unflatten(theta), samples.batch(indices)[0])

    found = run(problem, algorithm, seed=4, stop_on_divergence=False)
    expected = by_torch(problem, algorithm, 4, outputs_of)[-1]
    torch.testing.assert_close(final_vector(problem, found), expected, rtol=1e-9, atol=1e-11)
    alike = run(problem, algorithm.replace(layer_weight_decay=None), seed=4, stop_on_divergence=False)
    assert float((final_vector(problem, alike) - expected).norm()) > 1e-3
    compare(case, algorithm, 4)


def test_a_checkpoint_has_both_moments(tmp_path):
    problem, file = problem_of(0), tmp_path / "state.npz"
    algorithm = ALGORITHMS[1].replace(steps=8)
    whole = run(problem, algorithm, seed=1, stop_on_divergence=False)

    def stop(record):
        if record.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(problem, algorithm, seed=1, stop_on_divergence=False, checkpoint=file, on_step=stop)
    resumed = run(problem, algorithm, seed=1, stop_on_divergence=False, checkpoint=file)
    assert torch.equal(final_vector(problem, resumed), final_vector(problem, whole))
    with np.load(file, allow_pickle=False) as saved:
        assert float(np.abs(saved["squares"]).max()) > 0


# ------------------------------------------------------------------ rollouts


def linear(case):
    """Outputs of the network linearised at θ*, by its dense Jacobian."""
    problem = problem_of(case)

    def outputs_of(theta, which, indices):
        outputs, _, jacobian = jacobians_of(case)[which]
        moved = jacobian[indices] @ (theta - problem.vector())
        return outputs[indices] + moved.reshape(outputs[indices].shape)

    return outputs_of


def compare(case, algorithm, seed):
    """All parameters drawn: losses at every look, and where each parameter has moved at the end."""
    problem, sizes = problem_of(case), algorithm.batch_sizes(problem_of(case))
    network = replace(everything(problem, algorithm), divergence_level=1e9)
    found = rollout(
        network,
        algorithm,
        lr=[algorithm.lr],
        mix=[algorithm.mix],
        batch_sizes=sizes,
        seeds=[seed],
        check_every=3,
    )
    course = by_torch(problem, algorithm, seed, linear(case), signs=problem.vector().sign())
    looks = check_steps(algorithm.steps, 3)
    for which, name in enumerate(("retain_loss", "forget_loss")):
        samples = problem.forget if which else problem.retain
        everyone = torch.arange(samples.size)
        targets = samples.batch(everyone)[1]
        losses = [problem.loss.per_sample(linear(case)(course[k], which, everyone), targets).mean() for k in looks]
        np.testing.assert_allclose(getattr(found, name)[0, 0], torch.stack(losses), rtol=1e-6, atol=1e-9)
    moved = course[-1] - course[0]  # all are drawn that move, each for itself
    there = network.movement(found.coordinates[0, 0])
    torch.testing.assert_close(there, moved, rtol=1e-6, atol=1e-9)


@algorithms
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_rollout_is_adamw_on_the_linearised_network(algorithm, sampling):
    compare(0, algorithm.replace(sampling=sampling), 3)


@given(data=st.data())
@pytest.mark.parametrize("case", range(len(CASES)), ids=[c.name for c in CASES])
def test_whatever_the_loss_and_the_settings(case, data):
    problem = problem_of(case)
    algorithm = GradDiff(
        lr=10 ** data.draw(st.floats(-4, -1), "log10 lr"),
        mix=data.draw(st.sampled_from((0.0, 0.2, 0.7, 1.0)), "mix"),
        steps=data.draw(st.integers(1, 10), "steps"),
        batch_size=data.draw(st.integers(1, problem.retain.size), "B_R"),
        forget_batch_size=data.draw(st.integers(1, problem.forget.size), "B_F"),
        sampling=data.draw(st.sampled_from(SAMPLINGS), "sampling"),
        optimizer="adamw",
        betas=data.draw(st.tuples(st.floats(0, 0.95), st.floats(0.3, 0.9999)), "betas"),
        # So large that outputs which differ by rounding do not take steps of different signs.
        eps=10 ** data.draw(st.floats(-4, -1), "log10 eps"),
        weight_decay=data.draw(st.sampled_from((0.0, 0.5)), "decay"),
        max_gradient_norm=data.draw(st.sampled_from((None, 0.1)), "clip"),
    )
    compare(case, algorithm, data.draw(st.integers(0, 2**20), "seed"))


def test_layer_step_sizes_in_a_rollout():
    problem = problem_of(0)
    layers = list(dict.fromkeys(problem.layer_of().values()))
    algorithm = ALGORITHMS[1].replace(layer_lr={layers[0]: 0.1, layers[1]: 0.0})
    network = replace(everything(problem, algorithm), divergence_level=1e9)
    plain = replace(everything(problem, algorithm.replace(layer_lr=None)), divergence_level=1e9)
    settings = {"lr": [0.01], "mix": [0.4], "batch_sizes": (3, 2), "seeds": [0]}
    found, other = (rollout(n, algorithm, **settings) for n in (network, plain))
    again = rollout(plain.with_paces(algorithm.layer_factors(problem)), algorithm, **settings)
    moved, same, undamped = (
        n.movement(r.coordinates[0, 0]) for n, r in ((network, found), (plain, again), (plain, other))
    )
    torch.testing.assert_close(moved, same, rtol=1e-9, atol=1e-12)
    assert float((moved - undamped).norm()) > 1e-3
    parts = problem.unflatten(network.movement(found.coordinates[0, 0]))
    moved = dict.fromkeys(layers, 0.0)
    for name, part in parts.items():
        moved[problem.layer_of()[name]] += float(part.norm())
    assert moved[layers[1]] == 0 < moved[layers[0]]
    still = torch.cat([
        torch.full((p.numel(),), problem.layer_of()[n] == layers[1]) for n, p in problem.parameters.items()
    ])
    assert not bool(still[network.places].any())  # no place is wasted on what stands still
    assert bool(still[plain.places].any())


def test_where_all_parameters_are_is_not_to_be_had():
    network = everything(problem_of(0), ALGORITHMS[0], count=5)
    with pytest.raises(TypeError, match="`displacement` of `CoordinateNetwork` must not be asked"):
        network.displacement(torch.zeros(5))


# ------------------------------------------------------------------ the sample of parameters


def test_the_kernel_of_sampled_parameters_is_unbiased():
    """E[Φ Φᵀ] = J M Jᵀ over the draws, within five standard errors, entry by entry, M being what a mask lets move."""
    problem = problem_of(3)
    mask = torch.ones(problem.size, dtype=torch.float64)
    mask[::7] = 0
    outputs = jacobians_of(3)[0][2].flatten(0, 1)
    truth = (outputs * mask) @ outputs.T
    kernels = []
    for seed in range(150):
        network = sample_coordinates(
            problem, Identity(), run_p=Diagonal(mask), count=25, retain_samples=None, seed=seed
        )
        rows = network.retain.features[network.retain.indices.argsort()].flatten(0, 1)
        assert network.rank == 25
        assert bool((mask[network.places] == 1).all())
        kernels.append(rows @ rows.T)
    found = torch.stack(kernels)
    error = found.std(0) / len(kernels) ** 0.5
    assert float(((found.mean(0) - truth).abs() / (error + 1e-12)).max()) < 5
    assert float(error.max()) < 0.3 * float(truth.abs().max())  # and this says something


def test_half_of_the_parameters_count_twice():
    problem = problem_of(3)
    algorithm = ALGORITHMS[0]
    network = everything(problem, algorithm, count=40)
    half = network.thinned(rank=20)
    assert half.rank == 20
    assert torch.equal(half.places, network.places[:20])
    torch.testing.assert_close(half.weights, 2 * network.weights[:20])
    torch.testing.assert_close(half.retain.features, network.retain.features[..., :20] * math.sqrt(2))
    # What a parameter's move does to its own outputs is as before, and its gradient.
    move = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        half.retain.features @ (half.weights.sqrt() * move),
        2 * network.retain.features[..., :20] @ (network.weights[:20].sqrt() * move),
    )
    torch.testing.assert_close(
        half.lift * half.retain.features[0, 0], network.lift[:20] * network.retain.features[0, 0, :20]
    )


@pytest.mark.parametrize("case", range(len(CASES)), ids=[c.name for c in CASES])
@pytest.mark.parametrize("rows", [True, False])
def test_columns_are_the_jacobians(case, rows, monkeypatch):
    problem = problem_of(case)
    dense = jacobians_of(case)[0][2]
    places = torch.randperm(problem.size, generator=torch.Generator().manual_seed(0))[:13]
    factors = torch.rand(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    monkeypatch.setattr(ScaledJacobian, "_rows_are_fewer", lambda self, vectors: rows)
    jacobian = ScaledJacobian(problem, problem.retain, torch.arange(problem.retain.size), Identity())
    torch.testing.assert_close(jacobian.columns(places, factors), dense[..., places] * factors, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_frozen_adam_of_what_a_preconditioner_leaves(mix):
    problem = problem_of(0)
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p[:3] = 0
    settings = {"mix": mix, "batch_sizes": (3, 2), "eps": 1e-3}
    plain = frozen_adam(problem, **settings).diagonal
    root = 1 / plain - 1e-3
    found = frozen_adam(problem, **settings, preconditioner=Diagonal(p)).diagonal
    torch.testing.assert_close(found, p / (p * root + 1e-3))
    masked = frozen_adam(problem, **settings, forget_mask=torch.zeros_like(p)).diagonal
    if mix == 1:  # no gradient, no movement
        assert not bool(masked.any())
        return
    alone = frozen_adam(problem, **{**settings, "mix": 0.0}).diagonal
    torch.testing.assert_close(1 / masked - 1e-3, (1 - mix) * (1 / alone - 1e-3), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ predictions


@algorithms
def test_a_staged_rollout_is_the_run(algorithm):
    problem = problem_of(0)
    sizes = algorithm.batch_sizes(problem)
    network = replace(everything(problem, algorithm, count=5), divergence_level=1e9)
    found = staged_rollout(problem, network, algorithm, batch_sizes=sizes, seeds=[2])
    real = run(problem, algorithm, seed=2, stop_on_divergence=False, monitor_samples=None)
    assert found.real_steps == algorithm.steps
    assert found.rollout.steps.tolist() == [c.step for c in real.trajectory]
    for name in ("retain_loss", "forget_loss"):
        truth = [getattr(c, name) for c in real.trajectory]
        np.testing.assert_allclose(getattr(found.rollout, name)[0, 0], truth, rtol=1e-6)


def test_the_first_steps_tell_how_wrong_it_is():
    problem, algorithm = problem_of(0), ALGORITHMS[0]
    sizes = algorithm.batch_sizes(problem)

    def error(lr, count=10**6):
        changed = algorithm.replace(lr=lr)
        network = replace(everything(problem, changed, count=count), divergence_level=1e9)
        return start_errors(problem, network, changed, batch_sizes=sizes, seed=0)[0]

    assert error(1e-6) < 1e-3 < error(0.1)  # small steps are linear
    assert error(1e-6, count=6) > 0.05  # but few parameters are not all of them


@pytest.fixture(scope="module")
def classified():
    data = digits()
    x, y = data.x_train, data.y_train
    model = train(SmallCNN(1, 8, 10, seed=0), x, y, epochs=30, lr=3e-3)
    rows = one_class(y, 3)
    return model, (x[rows.forget], y[rows.forget]), (x[rows.retain], y[rows.retain])


@pytest.fixture(scope="module")
def report(classified):
    model, forget, retain = classified
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stabkit.LowConfidenceWarning)
        return stabkit.predict(model, forget, retain, lr=1e-3, mix=0.3, optimizer="adamw", mode="standard")


def test_the_critical_step_size_is_the_runs(classified, report):
    model, forget, retain = classified
    problem = UnlearningProblem(model, forget, retain)

    def breaks(lr):
        return run(problem, GradDiff(**{**report.run.settings, "lr": lr})).diverged

    assert not breaks(report.critical_lr / 2)
    assert breaks(report.critical_lr * 2)


def test_a_report_says_whose_steps_they_are(report):
    assert report.run.settings["optimizer"] == "adamw"
    assert "AdamW" in str(report)
    assert "AdamW" in report._repr_html_()
    again = stabkit.Report.from_json(report.to_json())
    assert again.run.settings == report.run.settings
    names = [check.name for check in report.checks]
    assert "linearisation error" in names
    assert "captured output sensitivity" not in names


def test_every_further_question(classified):
    model, forget, retain = classified
    report = stabkit.predict(model, forget, retain, lr=1e-3, mix=0.3, steps=50, optimizer="adamw", mode="fast", seeds=2)
    lower = report.at(lr=report.critical_lr / 20)
    assert lower.probability < 0.2 < report.at(lr=report.critical_lr * 20).probability
    assert report.at(mix=0.1).critical_lr > report.critical_lr
    bounds = [
        next(check.threshold for check in found.checks if check.name == "linearisation error")
        for found in (lower, report.at(lr=report.critical_lr * 20))
    ]
    assert bounds == [0.3, 0.5]  # of a run that is called stable, and of one that crosses
    front = report.frontier(lr=[report.critical_lr / 10, report.critical_lr * 10], mix=[0.3])
    assert front.probability[0, 0] < 0.5 < front.probability[1, 0]
    found = report.recommend()
    ways = {item.remedy: item for item in found.items}
    assert ways["step size"].holds
    assert ways["step size"].changes["lr"] < report.critical_lr
    assert "layer damping" in ways
    check = stabkit.verify(report, model, forget, retain)
    assert len(check.runs) == 4
    assert {one.place for one in check.runs} == {"asked", "below", "at", "above"}


def test_thorough_predictions_take_real_steps(classified):
    model, forget, retain = classified
    algorithm = GradientAscent(lr=1e-3, steps=30, optimizer="adamw")
    found = stabkit.predict(model, forget, retain, algorithm=algorithm, mode="thorough", seeds=1)
    assert found.rollout.real_steps > 0
    problem = UnlearningProblem(model, forget, retain)
    assert not run(problem, algorithm.replace(lr=found.critical_lr / 1.5)).diverged
    assert run(problem, algorithm.replace(lr=found.critical_lr * 1.5)).diverged


def test_normalised_batches(classified):
    """Coupled batches have no rows of their own, and their statistics move."""
    _, forget, retain = classified
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    model = train(model, *retain, epochs=10, lr=1e-2)
    found = stabkit.predict(
        model, forget, retain, lr=1e-4, steps=10, optimizer="adamw", batchnorm="batch", mode="standard", batch_size=32
    )
    assert found.linearisation_error < 0.5
    staged = stabkit.predict(
        model, forget, retain, lr=1e-2, steps=10, optimizer="adamw", batchnorm="batch", mode="thorough", batch_size=32
    )
    assert staged.rollout.real_steps > 0


def test_what_sleeps_at_first_wakes_up():
    """Of an adapter that begins at 0 one factor does not move the outputs before the other has moved."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(4, 3)
            self.down = nn.Linear(4, 2, bias=False)
            self.up = nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    model = Adapted()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    y = x[:, :3].argmax(1)
    model.base = train(nn.Sequential(model.base), x, y, epochs=20, lr=0.05)[0]
    model.base.requires_grad_(False)
    with pytest.warns(stabkit.LowConfidenceWarning, match="sensitivity to dormant parameters"):
        found = stabkit.predict(
            model,
            (x[:20], y[:20]),
            (x[20:], y[20:]),
            lr=0.3,
            steps=20,
            batch_size=8,
            optimizer="adamw",
            mode="standard",
        )
    checks = {check.name: check for check in found.checks}
    assert not checks["sensitivity to dormant parameters"].passed


def test_the_theory_follows_the_mix_the_batches_and_the_layers(classified):
    """Frozen Adam's p is that of the setting, whatever was asked before; rollouts do not depend on it."""
    model, forget, retain = classified
    settings = {"optimizer": "adamw", "mode": "fast", "lr": 1e-4, "steps": 20, "seeds": 1}
    first = stabkit.predict(model, forget, retain, mix=0.05, **settings)
    for changes in ({"mix": 0.4}, {"batch_size": 8, "forget_batch_size": 8}, {"layer_lr": {"head": 0.01}}):
        later = first.at(**changes)
        algorithm = GradDiff(**{**first.run.settings, **changes})
        fresh = stabkit.predict(model, forget, retain, algorithm=algorithm, mode="fast", seeds=1)
        for name in ("largest", "horizon_lr", "growth"):
            assert getattr(later.thresholds, name) == pytest.approx(getattr(fresh.thresholds, name), rel=1e-3), name
            assert getattr(later.thresholds, name) != pytest.approx(getattr(first.thresholds, name), rel=1e-2), name
        assert later.critical_lr == pytest.approx(fresh.critical_lr)
    decayed = first.at(weight_decay=0.1)
    assert sum(cost.gradient_equivalents for cost in decayed.costs[:4]) == 0  # of which nothing is measured anew


def test_gold_networks_are_trained_by_it_too(classified):
    _, forget, retain = classified
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    problem = UnlearningProblem(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), forget, retain)
    training = FineTune(lr=1e-2, steps=3, batch_size=retain[1].numel(), optimizer="adamw", weight_decay=0.1)
    found = retrain(problem, training, initial=model).model
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    other.load_state_dict(model.state_dict())
    rule = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        rule.zero_grad()
        nn.functional.cross_entropy(other(retain[0]), retain[1]).backward()
        rule.step()
    for mine, its in zip(found.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_algorithms_by_name_leave_their_usual_momentum(classified):
    model, forget, retain = classified
    for name in ("scrub", "sfr_on"):
        assert stabkit.algorithms.resolve_algorithm(name, optimizer="adamw").momentum == 0
        usual = stabkit.algorithms.resolve_algorithm(name)
        assert usual.momentum == 0.9
        assert usual.replace(optimizer="adamw").momentum == 0
        estimate = stabkit.predict_cost(model, forget, retain, algorithm=name, optimizer="adamw", steps=5)
        assert estimate.gradient_equivalents > 0


def test_the_estimate_is_near_what_it_takes(classified):
    model, forget, retain = classified
    settings = {"optimizer": "adamw", "steps": 40, "mode": "thorough", "seeds": 2}
    said = {c.stage: c.gradient_equivalents for c in stabkit.predict_cost(model, forget, retain, **settings).stages}
    report = stabkit.predict(model, forget, retain, lr=1e-4, mix=0.3, **settings)
    took = {c.stage: c.gradient_equivalents for c in report.costs}
    assert said["linearisation"] == pytest.approx(took["linearisation"], rel=0.02)
    assert said["preconditioner"] == took["preconditioner"]
    assert 0.4 < said["staged rollouts"] / took["staged rollouts"] < 2.5


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adam"}, "`optimizer` of `GradDiff`"),
        (
            {"optimizer": "adamw", "momentum": 0.9},
            r"`momentum` of `GradDiff` must be 0 with optimizer='adamw'; got 0.9",
        ),
        ({"optimizer": "adamw", "momentum": 0.9, "nesterov": True}, r"`nesterov` of `GradDiff` must be False"),
        ({"betas": (0.9, 1.0)}, r"`betas\[1\]` of `GradDiff`"),
        ({"betas": (0.9,)}, "`betas` of `GradDiff` must be two numbers"),
        ({"betas": 0.9}, "`betas` of `GradDiff` must be two numbers"),
        ({"eps": 0.0}, "`eps` of `GradDiff`"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        GradDiff(**settings)


def test_arrays_will_do():
    assert GradDiff(betas=np.array([0.8, 0.9]), eps=np.float64(1e-6)).settings()["betas"] == [0.8, 0.9]


def test_each_parameter_by_itself_needs_a_diagonal_p():
    problem = problem_of(0)
    with pytest.raises(ValueError, match=r"`optimizer` of `RemainNewton` must be 'sgd', as its P is no `Diagonal`"):
        RemainNewton(optimizer="adamw")

    class Own(GradDiff):
        name = "own"

        def preconditioner(self, problem):
            return RemainNewton(rank=2).preconditioner(problem)

    with pytest.raises(ValueError, match=r"`optimizer` of `Own` must be 'sgd', as its P is no `Diagonal`"):
        run(problem, Own(optimizer="adamw", steps=1, batch_size=3))


def test_a_linearisation_is_of_one_optimiser():
    problem = problem_of(0)
    settings = {"lr": [0.1], "mix": [0.5], "batch_sizes": (3, 2)}
    network = linearise(problem, Identity(), rank=5)
    with pytest.raises(ValueError, match="`network` of `rollout` must be one of `sample_coordinates`"):
        rollout(network, ALGORITHMS[0], **settings)
    with pytest.raises(ValueError, match="`network` of `rollout` must be one of `linearise`"):
        rollout(everything(problem, ALGORITHMS[0]), GradDiff(), **settings)


def test_something_has_to_move():
    problem = problem_of(0)
    nothing = Diagonal(torch.zeros_like(problem.vector()))
    with pytest.raises(ValueError, match="must let some parameter move"):
        sample_coordinates(problem, nothing, run_p=nothing)
