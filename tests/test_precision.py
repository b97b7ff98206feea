"""Predictions multiply float32 as they say, and leave PyTorch as the caller set it."""

from __future__ import annotations

from operator import attrgetter
from typing import ClassVar

import pytest
import torch
from torch import nn

import stabkit
from stabkit.curvature import GGNOperator, HessianOperator, curvature_gram, linearise
from stabkit.curvature.gradients import mean_gradient
from stabkit.directions import fisher_diagonal
from stabkit.models import MLP
from stabkit.precision import BACKENDS, PRECISIONS, arithmetic
from stabkit.preconditioner import Identity

NEW = hasattr(torch.backends, "fp32_precision")


def state():
    if NEW:
        return {name: attrgetter(name)(torch.backends).fp32_precision for name in BACKENDS}
    return {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}


def older():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def exact():
    return "ieee" if NEW else False


@pytest.fixture(params=["highest", "high", "medium"])
def callers(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_callers_choice_comes_back(callers, precision):
    before, answers = state(), older()
    with arithmetic(precision):
        assert older() == (precision == "tf32",) * 2
        assert set(state().values()) == {exact() if precision == "float32" else ("tf32" if NEW else True)}
        with arithmetic("float32"):
            assert set(state().values()) == {exact()}
        assert (set(state().values()) == {exact()}) == (precision == "float32")
    assert state() == before
    assert torch.get_float32_matmul_precision() == callers
    assert older() == answers
    with arithmetic(precision), torch.backends.cudnn.flags(enabled=True):  # a model may ask the older interface
        assert torch.backends.cudnn.allow_tf32
    assert state() == before
    assert older() == answers
    with pytest.raises(ZeroDivisionError), arithmetic(precision):
        raise ZeroDivisionError
    assert state() == before


@pytest.mark.skipif(not NEW, reason="one interface")
def test_a_caller_of_the_newer_interface_is_left_with_it():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        chosen = state()
        with arithmetic("float32"):
            assert set(state().values()) == {"ieee"}
        assert state() == chosen
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class Noting(nn.Module):
    """Notes how matrices would be multiplied during each forward pass, copies of it in the same list."""

    seen: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.inner = MLP(6, 3, hidden=(8,), seed=0)

    def forward(self, x):
        self.seen.append(next(iter(state().values())))
        return self.inner(x)


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_predictions_multiply_as_they_say(callers, precision):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=generator), torch.randint(3, (60,), generator=generator)
    model, before = Noting(), state()
    Noting.seen.clear()
    settings = {"batch_size": 8, "steps": 6, "seeds": 1, "lr": 1e-3, "mode": "fast"}
    report = stabkit.predict(model, (x[:20], y[:20]), (x[20:], y[20:]), precision=precision, **settings)
    assert state() == before
    checks = {check.name: check for check in report.checks}
    seen = list(Noting.seen)
    if precision == "float32":
        assert exact() in seen
        assert "error of TF32" not in checks
    else:
        assert ("tf32" if NEW else True) in seen
        assert exact() in seen  # what it is compared with
        assert 0 <= checks["error of TF32"].value <= 1e-2  # nothing, where the device has no TF32
    with pytest.raises(ValueError, match=r"`precision` of `predict` must be one of .*; got 'half'"):
        stabkit.predict(model, (x[:20], y[:20]), (x[20:], y[20:]), precision="half", **settings)


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_curvature_by_itself_is_in_float32_whatever_the_caller_has_set(callers):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 6, generator=generator), torch.randint(3, (24,), generator=generator)
    problem, before = stabkit.UnlearningProblem(Noting(), (x[:8], y[:8]), (x[8:], y[8:])), state()

    for name, call in {
        "Hessian": lambda: HessianOperator(problem, problem.retain) @ torch.ones(problem.size),
        "Gauss-Newton": lambda: GGNOperator(problem, problem.forget) @ torch.ones(problem.size),
        "Gram": lambda: curvature_gram(problem, (problem.retain, problem.forget)),
        "linearisation": lambda: linearise(problem, Identity()),
        "mean gradient": lambda: mean_gradient(problem, problem.forget),
        "per-sample gradients": lambda: fisher_diagonal(problem, problem.forget),
    }.items():
        Noting.seen.clear()
        call()
        # Operators look at the size of a sample's graph before; that is a shape and no number.
        assert Noting.seen[-1] == exact(), name
        assert state() == before
        Noting.seen.clear()
        with arithmetic("tf32"):  # something around it has decided
            call()
        assert Noting.seen[-1] == ("tf32" if NEW else True), name
