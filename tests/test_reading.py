"""Reading parts of the outputs changes no loss and no derivative of one, and lets long outputs be linearised."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit._errors import UntrainedModelWarning
from stabkit.algorithms import AGU, NPO, GradDiff, RandomLabels, RemainNewton, resolve_algorithm
from stabkit.measure import MeasureSettings, measure
from stabkit.models import CausalLM
from stabkit.problem import UnlearningProblem
from stabkit.reading import FEWEST_LOGITS, MANY_OUTPUTS, Reading, logits_to_read
from stabkit.runner import run
from stabkit.staged import staged_rollout
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
    [("sequence", 11, False), ("map", 5, False), ("sequence", 600, True), ("map", 700, True), ("plain", 2500, True)],
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
    assert logits_to_read(1, 2 * MANY_OUTPUTS - 1) == 0  # merging would not halve them
    assert logits_to_read(1, 2 * MANY_OUTPUTS) + 1 == MANY_OUTPUTS
    assert logits_to_read(MANY_OUTPUTS, 50_000) == FEWEST_LOGITS


class Masked(GradDiff):
    """A residual of one's own, which counts positions from the end."""

    name = "masked"

    def forget_residual(self, loss, batch):
        residual = loss.residual(batch.outputs, batch.targets)
        residual[:, -3] = 0
        return residual


class Steeper(NPO):
    """One's own on top of the library's."""

    name = "steeper"

    def forget_residual(self, loss, batch):
        return 2 * super().forget_residual(loss, batch)


class Quiet(Masked):
    """The same, and says what it reads."""

    name = "quiet"
    residual_reads = "labelled"


def test_who_reads_more_than_the_loss_keeps_more():
    """Distillation and a leakage bound depend on every logit, random labels on positions, one's own residuals on all."""
    reads = {name: resolve_algorithm(name).reads for name in stabkit.algorithms.ALGORITHMS}
    more = {"scrub": "labelled", "random_labels": "all", "salun": "all"}
    assert reads == {name: more.get(name, "loss") for name in reads}
    assert AGU(leakage_bound=0.1).reads == "labelled"
    assert (Masked().reads, Steeper().reads, Quiet().reads) == ("all", "all", "labelled")
    problem = problem_of("sequence", 600, 0)
    labelled = problem.reading("labelled")
    assert labelled.outputs(labelled.parameters, labelled.retain.batch(torch.arange(1))[0]).shape == (1, 4, 600)
    assert problem.reading().reading("labelled") is labelled
    assert labelled.reading() is problem.reading()
    assert labelled.reading("all") is problem is labelled.whole
    with pytest.raises(ValueError, match=r"`residual_reads` of `Vague` must be one of .*; got 'some'"):
        type("Vague", (GradDiff,), {"name": "vague", "residual_reads": "some"})
    theta = problem.vector() + 0.1
    moved = problem.reading().at(theta)
    torch.testing.assert_close(moved.losses(moved.retain), problem.at(theta).losses(problem.retain))
    assert torch.equal(moved.whole.vector(), theta)


@pytest.mark.filterwarnings("ignore:the prediction has low confidence")
@pytest.mark.parametrize("algorithm", [Masked(), RemainNewton(rank=4), RandomLabels()], ids=lambda a: a.name)
def test_the_prediction_has_the_runs_preconditioner_and_residuals(algorithm):
    """A thorough prediction that believes nothing is the run itself, with whatever the algorithm reads."""
    x = torch.randint(0, 600, (9, 6), generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[:, :2] = -100
    model = train(CausalLM(600, context=6, width=8, depth=1, seed=0), x, y, epochs=80, lr=1e-2, loss="causal_lm")
    problem = UnlearningProblem(model, (x[:3], y[:3]), (x[3:], y[3:]), loss="causal_lm", dtype=torch.float64)
    chosen = algorithm.replace(lr=1e-3, mix=0.4, steps=4, batch_size=3)
    sizes = {"retain_samples": None, "forget_samples": None, "spectrum_samples": 4}
    settings = MeasureSettings(curvature="hessian", rank=20, seed=0, **sizes)
    measured = measure(problem, chosen, settings)
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(measured.preconditioner.apply(vector), chosen.step_preconditioner(problem).apply(vector))
    found = staged_rollout(
        measured.problem,
        measured.network,
        chosen,
        batch_sizes=chosen.batch_sizes(problem),
        seeds=[3],
        max_loss_error=1e-15,
        max_output_error=1e-15,
    )
    assert found.real_steps == 4
    real = run(problem, chosen, seed=3, monitor_samples=None, stop_on_divergence=False)
    assert float(found.rollout.retain_loss[0, 0, -1]) == pytest.approx(real.trajectory[-1].retain_loss, rel=1e-6)
    assert float(found.rollout.forget_loss[0, 0, -1]) == pytest.approx(real.trajectory[-1].forget_loss, rel=1e-6)


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
    below, above = (
        [run(problem, chosen.replace(lr=report.critical_lr * factor), seed=s).diverged for s in range(5, 13)]
        for factor in (1 / 3, 3)
    )
    assert sum(below) < 0.25 * len(below)  # what "stable" and "diverges" say of P
    assert sum(above) > 0.75 * len(above)
    assert report.at(lr=report.critical_lr / 3).verdict == "stable"
    assert report.at(lr=report.critical_lr * 3).verdict == "diverges"
