"""Runs whose passes are replayed: the bookkeeping around CUDA graphs, and on a GPU the graphs themselves."""

from __future__ import annotations

import pytest
import torch

import stabkit.graphs
import stabkit.runner
from stabkit.algorithms import SCRUB, GradDiff, SFROn
from stabkit.graphs import MOST_SHAPES, NetworkGraphs
from stabkit.models import MLP, ResNet
from stabkit.problem import UnlearningProblem
from stabkit.runner import run


def problem_of(*, batchnorm="frozen", device="cpu", dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 8, 8, generator=g, dtype=dtype)
    model = ResNet(1, 3, blocks=(1,), width=4, seed=0).to(dtype)
    model(x)  # running statistics
    y = sure(model, x)
    return UnlearningProblem(model.eval(), (x[:20], y[:20]), (x[20:], y[20:]), batchnorm=batchnorm, device=device)


def sure(model, *inputs):
    """The model's own answers, which it is made to be sure of."""
    with torch.no_grad():
        weight, bias = list(model.parameters())[-2:]
        bias -= model.eval()(*inputs).mean(0)  # no class is everybody's
        weight.mul_(20)
        bias.mul_(20)
        return model(*inputs).argmax(1)


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = MLP(6, 3, hidden=(4,), seed=0)

    def forward(self, left, right):
        return self.inner(torch.cat([left, 2 * right], 1))


class Placed(torch.autograd.Function):
    """Values written to a place that the next ones are written to as well."""

    @staticmethod
    def forward(ctx, values, place):
        place.copy_(values)
        return place.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.fixture
def recorded(monkeypatch):
    """A stand-in for recording: what is to be recorded is called once with samples, and then with the same shapes only.

    As with a graph, every call's outputs lie in the same place.
    """
    shapes = []

    def record(function, samples):
        assert all(isinstance(sample, torch.Tensor) for sample in samples)
        assert [sample.requires_grad for sample in samples] == [True] + [False] * (len(samples) - 1)
        place = function(*samples).detach().clone()
        shapes.append([tuple(sample.shape) for sample in samples[1:]])

        def replay(*tensors):
            assert [(t.shape, t.dtype, t.requires_grad) for t in tensors] == [
                (t.shape, t.dtype, t.requires_grad) for t in samples
            ]
            return Placed.apply(function(*tensors), place)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(stabkit.runner, "check_graphs", lambda problem: None)
    return shapes


@pytest.mark.parametrize(
    ("algorithm", "shapes"),
    [
        (GradDiff(lr=0.1, mix=0.3, steps=6, batch_size=8), [(16, 1, 8, 8)]),  # both sets in one pass
        (GradDiff(lr=0.1, mix=1.0, steps=3, batch_size=8), [(8, 1, 8, 8)]),
        (SCRUB(lr=0.1, steps=8, batch_size=8), [(8, 1, 8, 8)]),
        (SFROn(lr=0.01, steps=8, batch_size=8, momentum=0.9), [(8, 1, 8, 8)]),  # now one set, now the other
    ],
)
def test_a_run_of_replayed_passes_is_the_run(recorded, algorithm, shapes):
    problem = problem_of()
    plain = run(problem, algorithm, seed=3)
    replayed = run(problem, algorithm, seed=3, cuda_graphs=True)
    assert sorted(shape for (shape,) in recorded) == shapes
    assert replayed.steps == plain.steps > 1
    for ours, theirs in zip(replayed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_batches_of_ever_new_lengths_are_passed_as_ever(recorded):
    algorithm = GradDiff(lr=1e-4, steps=20, batch_size=12, sampling="poisson")
    problem = problem_of()
    plain, replayed = (run(problem, algorithm, cuda_graphs=graphs) for graphs in (False, True))
    assert len(recorded) == MOST_SHAPES
    for ours, theirs in zip(replayed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_what_cannot_be_recorded_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"`cuda_graphs` of `run` needs a problem on a GPU; got one on 'cpu'"):
        run(problem_of(), GradDiff(steps=1), cuda_graphs=True)
    coupled = problem_of(batchnorm="batch")
    monkeypatch.setattr(coupled, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"`cuda_graphs` of `run` needs batchnorm='frozen'; got 'batch'"):
        stabkit.graphs.check_graphs(coupled)

    def fails(function, samples):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    problem = problem_of()
    with pytest.raises(RuntimeError, match=r"`cuda_graphs` .* ResNet said: operation not permitted .* Leave it out"):
        NetworkGraphs(problem, lowered=False).outputs(problem.vector().requires_grad_(), torch.zeros(2, 1, 8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_on_a_gpu_graphs_give_the_run(precision):
    problem = problem_of(device="cuda", dtype=torch.float32)
    algorithm = GradDiff(lr=0.05, steps=20, batch_size=8)
    plain, replayed = (run(problem, algorithm, precision=precision, cuda_graphs=graphs) for graphs in (False, True))
    for ours, theirs in zip(replayed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_inputs_in_another_order_are_another_pass(recorded):
    g = torch.Generator().manual_seed(2)
    left, right = torch.randn(40, 3, generator=g), torch.randn(40, 3, generator=g)
    model = Two()
    y = sure(model, left, right)
    forget = {"left": left[:10], "right": right[:10], "labels": y[:10]}
    retain = {"right": right[10:], "left": left[10:], "labels": y[10:]}
    problem = UnlearningProblem(model, forget, retain)
    algorithm = GradDiff(lr=0.1, steps=4, batch_size=5)
    plain, replayed = (run(problem, algorithm, cuda_graphs=graphs) for graphs in (False, True))
    assert len(recorded) == 2
    for ours, theirs in zip(replayed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_replayed_passes_need_no_gradients_to_be_on(recorded):
    problem, algorithm = problem_of(), GradDiff(lr=0.1, steps=3, batch_size=8)
    with torch.no_grad():
        replayed = run(problem, algorithm, cuda_graphs=True)
    for ours, theirs in zip(replayed.model.parameters(), run(problem, algorithm).model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_tuples_and_dictionaries_of_inputs_are_put_together_again(recorded):
    g = torch.Generator().manual_seed(1)
    left, right = torch.randn(40, 4, generator=g), torch.randn(40, 2, generator=g)
    model = Two()
    y = sure(model, left, right)
    for parts in (
        lambda rows: ((left[rows], right[rows]), y[rows]),
        lambda rows: {"left": left[rows], "right": right[rows], "labels": y[rows]},
    ):
        problem = UnlearningProblem(model, parts(slice(0, 10)), parts(slice(10, 40)))
        algorithm = GradDiff(lr=0.1, steps=3, batch_size=5)
        plain, replayed = (run(problem, algorithm, cuda_graphs=graphs) for graphs in (False, True))
        for ours, theirs in zip(replayed.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert [(10, 4), (10, 2)] in recorded
