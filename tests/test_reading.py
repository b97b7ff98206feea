"""Reading parts of the outputs changes no loss and no derivative of one, and lets long outputs be linearised."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit._errors import UntrainedModelWarning
from stabkit.algorithms import AGU, GradDiff, resolve_algorithm
from stabkit.models import CausalLM
from stabkit.problem import UnlearningProblem
from stabkit.reading import FEWEST_LOGITS, MANY_OUTPUTS, Reading, logits_to_read
from stabkit.runner import run
from stabkit.training import train


class PerPixel(nn.Module):
    """Classes of every pixel, class axis second."""

    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Conv2d(1, classes, 1)

    def forward(self, x):
        return self.layer(x).tanh()


def problem_of(kind, classes, seed):
    """A sequence, map or plain task, some positions without a label, in float64."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if kind == "sequence":
        x = torch.randint(0, classes, (9, 6), generator=g)
        y, model, loss = x.clone(), CausalLM(classes, context=6, width=8, depth=1, seed=seed), "causal_lm"
        y[:, :2] = -100
        y[::2, 4:] = -100
    elif kind == "map":
        x = torch.randn(9, 1, 3, 2, generator=g)
        y, model, loss = torch.randint(0, classes, (9, 3, 2), generator=g), PerPixel(classes), "cross_entropy"
        y[:, 0] = -100
        y[::2, 1, 0] = -100
    else:
        x = torch.randn(9, 4, generator=g)
        y, model, loss = torch.randint(0, classes, (9,), generator=g), nn.Linear(4, classes), "cross_entropy"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedModelWarning)
        return UnlearningProblem(model.eval(), (x[:3], y[:3]), (x[3:], y[3:]), loss=loss, dtype=torch.float64)


def losses(problem, theta):
    """Per-sample losses of both sets as functions of θ."""
    parameters = problem.unflatten(theta)
    parts = [samples.batch(torch.arange(samples.size)) for samples in (problem.retain, problem.forget)]
    return torch.cat([problem.loss.per_sample(problem.outputs(parameters, x), y) for x, y in parts])


@pytest.mark.parametrize(
    ("kind", "classes", "merged"),
    [("sequence", 11, False), ("map", 5, False), ("sequence", 300, True), ("map", 400, True), ("plain", 1200, True)],
)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99), size=st.floats(0.01, 3))
def test_losses_and_their_derivatives_stay_as_they_are(kind, classes, merged, seed, size):
    """At θ* and far from it, though the logits were chosen at θ*."""
    problem = problem_of(kind, classes, seed)
    read = problem.reading()
    inputs, targets = read.retain.batch(torch.arange(2))
    assert isinstance(inputs, Reading)
    outputs = read.outputs(read.parameters, inputs)
    positions = {"sequence": 4, "map": 4, "plain": 1}[kind]
    count = logits_to_read(positions, classes)
    assert (count > 0) == merged
    assert outputs.shape == (2, positions, count + 1 if merged else classes)
    assert outputs[0].numel() < problem.outputs(problem.parameters, inputs.inputs)[0].numel()
    assert targets.shape == (2, positions)
    theta = problem.vector()
    theta = theta + size * torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed), dtype=theta.dtype)
    ours, theirs = losses(read, theta), losses(problem, theta)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    gradients = [torch.func.jacrev(lambda t, p=p: losses(p, t))(theta) for p in (read, problem)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)
    # Forward over reverse, as Hessian-vector products take it.
    direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=theta.dtype)
    products = [
        torch.func.jvp(torch.func.grad(lambda t, p=p: losses(p, t).mean()), (theta,), (direction,))[1]
        for p in (read, problem)
    ]
    torch.testing.assert_close(*products, rtol=1e-6, atol=1e-9)
    assert (read.divergence_level, read.retain_loss, read.loss.name) == (
        problem.divergence_level,
        problem.retain_loss,
        problem.loss.name,
    )
    torch.testing.assert_close(problem.losses(problem.retain), problem.evaluate(problem.retain)[2])


def test_nothing_is_left_out_where_everything_is_read():
    problem = problem_of("plain", 10, 0)
    assert problem.reading() is problem
    x = torch.randn(8, 3)
    exact = nn.Linear(3, 3)
    exact.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    regression = UnlearningProblem(exact, (x[:3], x[:3]), (x[3:], x[3:]), loss="mse")
    assert regression.reading() is regression
    assert logits_to_read(1, MANY_OUTPUTS) == 0
    assert logits_to_read(1, MANY_OUTPUTS + 1) + 1 == MANY_OUTPUTS
    assert logits_to_read(MANY_OUTPUTS, 50_000) == FEWEST_LOGITS


def test_the_whole_distribution_is_kept_for_those_who_read_it():
    """Random labels, distillation and a leakage bound depend on every logit; the loss's weights do not."""
    wants = {name: resolve_algorithm(name).reads_distribution for name in ("ga", "graddiff", "npo", "sfr_on", "agu")}
    assert not any(wants.values())
    assert all(resolve_algorithm(name).reads_distribution for name in ("random_labels", "salun", "scrub"))
    assert AGU(leakage_bound=0.1).reads_distribution

    class Own(GradDiff):
        name = "own"

        def forget_residual(self, loss, batch):
            return loss.residual(batch.outputs, batch.targets)

    assert Own().reads_distribution
    problem = problem_of("sequence", 300, 0)
    whole = problem.reading(distribution=True)
    assert whole.outputs(whole.parameters, whole.retain.batch(torch.arange(1))[0]).shape == (1, 4, 300)
    assert problem.reading().reading(distribution=True) is whole
    assert whole.reading() is problem.reading()


@pytest.fixture(scope="module")
def memorised():
    """A language model with a vocabulary whose logits would not be linearised one by one, and what to forget of it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3000, (48, 8), generator=g)
    y = x.clone()
    y[:, :4] = -100
    model = train(CausalLM(3000, context=8, width=16, depth=1, seed=0), x, y, epochs=150, lr=1e-2, loss="causal_lm")
    return model, (x[:8], y[:8]), (x[8:], y[8:])


@pytest.mark.filterwarnings("ignore:the prediction has low confidence")  # each text asks for directions of its own
@pytest.mark.parametrize("algorithm", ["graddiff", "npo"])
def test_a_large_vocabulary_is_predicted_as_it_runs(memorised, algorithm):
    """Whose features by logit would take 48 · 8 · 3000 · 128 numbers, twice."""
    model, forget, retain = memorised
    before = torch.get_rng_state()
    asked = {"lr": 0.01, "mix": 0.3, "steps": 20, "batch_size": 8, "loss": "causal_lm", "mode": "thorough"}
    report = stabkit.predict(*memorised, algorithm=algorithm, **asked)
    assert torch.equal(before, torch.get_rng_state())
    assert report.run.loss == "causal_lm"
    problem = UnlearningProblem(model, forget, retain, loss="causal_lm")
    chosen = resolve_algorithm(algorithm, mix=0.3, steps=20, batch_size=8)
    ran = [
        run(problem, chosen.replace(lr=report.critical_lr * factor), seed=s).diverged
        for factor in (1 / 3, 3)
        for s in (5, 6)
    ]
    assert ran == [False, False, True, True]
    assert report.at(lr=report.critical_lr / 3).verdict == "stable"
    assert report.at(lr=report.critical_lr * 3).verdict == "diverges"
