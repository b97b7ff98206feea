"""Unlearning directions against dense algebra and closed-form retraining; the remain preconditioner, its root, its runs."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit import Algorithm, UnlearningProblem
from stabkit.curvature import GGNOperator, MixedOperator, PreconditionedOperator
from stabkit.directions import (
    LowRank,
    RemainOperator,
    RetainInverse,
    mean_gradient,
    remain_preconditioner,
    saliency,
    unlearning_directions,
)
from stabkit.spectrum import SolverOutcome, extreme_eigenpairs
from tests.cases import CASES, dense_ggn, dense_hessian, mean_loss

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")

EXACT = {"tolerance": 1e-11, "max_products": 2000}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def damped_inverse_of(matrix, damping):
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=torch.float64))


def gradient(problem, which):
    return torch.autograd.functional.jacobian(mean_loss(problem, which), problem.vector())


# ------------------------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mean_gradients_are_autograds(case):
    problem = case.problem()
    for which in ("retain", "forget"):
        samples = getattr(problem, which)
        torch.testing.assert_close(mean_gradient(problem, samples), gradient(problem, which))
    two = mean_gradient(problem, problem.forget, indices=torch.tensor([1]))
    three = mean_gradient(problem, problem.forget, indices=torch.tensor([0, 1])) * 2
    one = mean_gradient(problem, problem.forget, indices=torch.tensor([0]))
    torch.testing.assert_close(three, one + two)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_both_directions_are_the_dense_formulas(case, curvature):
    problem = case.problem()
    dense = dense_ggn if curvature == "ggn" else dense_hessian
    retain, forget = dense(problem, "retain"), dense(problem, "forget")
    damping = 1.5 * abs(float(torch.linalg.eigvalsh(retain)[0])) + 0.05 * float(torch.linalg.eigvalsh(retain)[-1])
    inverse = RetainInverse(problem, damping=damping, curvature=curvature, **EXACT)
    found = unlearning_directions(problem, inverse=inverse)
    g_forget, g_retain = gradient(problem, "forget"), gradient(problem, "retain")
    m, n = problem.forget.size, problem.retain.size
    pulled = forget @ damped_inverse_of(retain, damping) @ g_forget
    assert found.weights == pytest.approx((m / (m + n) * m / n, n / (m + n)))
    scale = float(pulled.norm())
    expected = found.weights[0] * pulled - found.weights[1] * g_retain
    torch.testing.assert_close(found.euclidean, expected, rtol=1e-6, atol=1e-7 * scale)
    expected = damped_inverse_of(retain, damping) @ pulled
    torch.testing.assert_close(found.remain, expected, rtol=1e-6, atol=1e-7 * float(expected.norm()))
    assert (found.damping, found.method, found.outcome) == (damping, "cg", inverse.outcome)


def fitted_regression(retain=30, forget=10, features=4, noise=0.5):
    """Least squares at its minimum over both sets, and the parameters that retraining would give."""
    x = normal(retain + forget, features, seed=3)
    y = x @ normal(features, 1, seed=4) + noise * normal(retain + forget, 1, seed=5)

    def fit(x, y):
        return torch.linalg.lstsq(x, y).solution.T

    model = nn.Linear(features, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(fit(x, y))
    problem = UnlearningProblem(model, (x[:forget], y[:forget]), (x[forget:], y[forget:]), loss="mse")
    return problem, fit(x[forget:], y[forget:]).flatten()


def test_least_squares_takes_the_euclidean_direction_to_the_retrained_model():
    problem, retrained = fitted_regression()
    inverse = RetainInverse(problem, damping=1e-12, **EXACT)
    found = unlearning_directions(problem, inverse=inverse)
    m, n = problem.forget.size, problem.retain.size
    mixed = (m * dense_ggn(problem, "forget") + n * dense_ggn(problem, "retain")) / (m + n)
    # -∇ of ½ (θ - θ_r)ᵀ(p_F H_F + p_R H_R)(θ - θ_r) at θ*, with the true θ_r
    torch.testing.assert_close(found.euclidean, mixed @ (retrained - problem.vector()), rtol=1e-7, atol=1e-9)
    # and one Newton step on the retain loss is retraining
    newton = m / n * inverse.apply(found.forget_gradient)
    torch.testing.assert_close(problem.vector() + newton, retrained, rtol=1e-7, atol=1e-9)


def test_no_direction_forgets_more_at_the_same_cost_to_the_retained_predictions():
    problem = CASES[0].problem()
    retain, forget = dense_ggn(problem, "retain"), dense_ggn(problem, "forget")
    found = unlearning_directions(problem, inverse=RetainInverse(problem, damping=0.02, **EXACT))
    wanted = forget @ damped_inverse_of(retain, 0.02) @ found.forget_gradient
    metric = retain + 0.02 * torch.eye(problem.size, dtype=torch.float64)

    def gain(direction):
        return float((wanted @ direction) ** 2 / (direction @ metric @ direction))

    best = gain(found.remain)
    others = [found.euclidean, wanted, found.forget_gradient, *normal(20, problem.size)]
    nearby = [found.remain + 0.1 * found.remain.norm() * d / d.norm() for d in normal(20, problem.size, seed=1)]
    assert max(gain(d) for d in [*others, *nearby]) < best


@pytest.mark.parametrize("method", ["diagonal", "fisher", "kfac", "ekfac"])
def test_the_other_inverses_give_their_own_directions(method):
    problem = CASES[0].problem()
    inverse = RetainInverse(problem, method=method, damping=0.05)
    found = unlearning_directions(problem, inverse=inverse, weights=(1.0, 0.0))
    pulled = dense_ggn(problem, "forget") @ inverse.apply(found.forget_gradient)
    torch.testing.assert_close(found.euclidean, pulled)
    torch.testing.assert_close(found.remain, inverse.apply(pulled))
    assert (found.method, found.outcome) == (method, None)


def test_directions_by_default_state_their_damping():
    problem = CASES[0].problem()
    largest = float(torch.linalg.eigvalsh(dense_ggn(problem, "retain"))[-1])
    found = unlearning_directions(problem)
    assert found.damping == pytest.approx(1e-3 * largest, rel=0.02)
    assert found.outcome is not None


def test_weights_may_be_a_list():
    problem = CASES[0].problem()
    one, other = (unlearning_directions(problem, inverse="fisher", weights=w) for w in ((1.0, 2.0), [1, 2]))
    assert one.weights == other.weights == (1.0, 2.0)
    assert isinstance(other.weights, tuple)
    torch.testing.assert_close(one.euclidean, other.euclidean)


def test_directions_print_their_norms():
    problem = CASES[0].problem()
    found = unlearning_directions(problem)
    lines = str(found).splitlines()
    assert lines[0] == f"Unlearning directions of 43 parameters, λ = {found.damping:.3g}"
    assert [line.split()[:2] for line in lines[3:7]] == [
        [name, f"{float(getattr(found, name).norm()):.3g}"]
        for name in ("euclidean", "remain", "forget_gradient", "retain_gradient")
    ]
    assert lines[-1] == f"H_R inverted by 'cg': {found.outcome.reason}"
    assert str(unlearning_directions(problem, inverse="fisher")).splitlines()[-1] == "H_R inverted by 'fisher'"


def test_an_inverse_may_be_named():
    problem = CASES[0].problem()
    named = unlearning_directions(problem, inverse="fisher")
    made = unlearning_directions(problem, inverse=RetainInverse(problem, method="fisher"))
    assert torch.equal(named.remain, made.remain)
    assert remain_preconditioner(problem, inverse="fisher", rank=2).damping == named.damping
    with pytest.raises(
        TypeError, match=r"`inverse` of `unlearning_directions` must be a RetainInverse or .*; got float"
    ):
        unlearning_directions(problem, inverse=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": (1.0, -2.0)}, r"`weights\[1\]` of `unlearning_directions` must be .*; got -2.0"),
        ({"forget_samples": 0}, r"`forget_samples` of `unlearning_directions` must be .*; got 0"),
        ({"weights": (1.0,)}, r"`weights` of `unlearning_directions` must be a pair \(w_F, w_R\), .*; got 1 values"),
        ({"weights": [1.0, 2.0, 3.0]}, r"`weights` of `unlearning_directions` must be a pair .*; got 3 values\. None"),
    ],
)
def test_a_wrong_direction_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        unlearning_directions(CASES[0].problem(), **arguments)


@pytest.mark.parametrize("weights", [1.0, "12"])
def test_weights_are_two_numbers(weights):
    with pytest.raises(TypeError, match=rf"`weights` of `unlearning_directions` .*; got {type(weights).__name__}\."):
        unlearning_directions(CASES[0].problem(), weights=weights)
    with pytest.raises(
        TypeError, match=r"`weights\[1\]` of `unlearning_directions` must be a finite number.*; got '2'"
    ):
        unlearning_directions(CASES[0].problem(), weights=(1.0, "2"))


# ----------------------------------------------------------------------------------------------------------- low rank


@given(
    d=st.integers(1, 12), q=st.integers(1, 12), decades=st.integers(0, 6), twice=st.booleans(), seed=st.integers(0, 999)
)
def test_a_low_rank_matrix_and_its_symmetric_root(d, q, decades, twice, seed):
    factor = normal(d, q, seed=seed) * torch.logspace(-decades, 0, q, dtype=torch.float64)
    if twice:  # of lower rank than it has columns
        factor = torch.cat([factor, factor[:, :1]], 1)
    dense = factor @ factor.T
    vectors = normal(d, 3, seed=seed + 1)
    low = LowRank(factor)
    scale = float(dense.norm())
    torch.testing.assert_close(low.apply(vectors), dense @ vectors, rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(low.apply(vectors[:, 0]), dense @ vectors[:, 0], rtol=1e-9, atol=1e-12 * scale)
    root = low.sqrt(torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(root, root.T, rtol=1e-9, atol=1e-9 * scale**0.5)
    torch.testing.assert_close(root @ root, dense, rtol=1e-9, atol=1e-9 * scale)
    assert float(torch.linalg.eigvalsh((root + root.T) / 2)[0]) >= -1e-9 * scale**0.5
    assert low.norm == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-9)
    torch.testing.assert_close(low.sqrt(vectors[:, 1]), root @ vectors[:, 1], rtol=1e-9, atol=1e-9 * scale**0.5)


def test_the_root_is_scipys():
    factor = normal(6, 6)
    root = torch.from_numpy(np.real(scipy.linalg.sqrtm((factor @ factor.T).numpy())))
    torch.testing.assert_close(LowRank(factor).sqrt(torch.eye(6, dtype=torch.float64)), root, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.ones(3), r"`factor` of `LowRank` must be of shape \(d, q\); got \(3,\)"),
        (torch.tensor([[1.0], [np.inf]]), r"`factor` of `LowRank` must be finite; got 1 of 2"),
    ],
)
def test_what_is_no_factor_is_refused(factor, message):
    with pytest.raises(ValueError, match=message):
        LowRank(factor)


# ------------------------------------------------------------------------------------------------ remain preconditioner


def dense_p(problem, damping, rank=None):
    """(H_R + λI)^{-1} H_F (H_R + λI)^{-1}, with the leading part of H_F alone if a rank is given."""
    forget = dense_ggn(problem, "forget")
    if rank is not None:
        values, vectors = torch.linalg.eigh(forget)
        forget = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    inverse = damped_inverse_of(dense_ggn(problem, "retain"), damping)
    return inverse @ forget @ inverse


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=lambda c: c.name)
def test_matrix_free_and_low_rank_are_the_dense_matrix(case):
    problem = case.problem()
    dense = dense_p(problem, 0.05)
    inverse = RetainInverse(problem, damping=0.05, **EXACT)
    eye = torch.eye(problem.size, dtype=torch.float64)
    operator = RemainOperator(problem, inverse)
    torch.testing.assert_close(operator @ eye, dense, rtol=1e-6, atol=1e-7 * float(dense.norm()))
    low = remain_preconditioner(problem, inverse=inverse, rank=problem.size)
    largest = float(torch.linalg.eigvalsh(dense)[-1])
    torch.testing.assert_close(low.apply(eye), dense / largest, rtol=1e-5, atol=1e-6)
    root = low.sqrt(eye)
    torch.testing.assert_close(root @ root, dense / largest, rtol=1e-5, atol=1e-6)
    assert low.scale == pytest.approx(1 / largest, rel=1e-6)
    assert low.norm == pytest.approx(1.0, rel=1e-6)
    assert low.captured.value == pytest.approx(1.0, abs=1e-6)
    assert low.damping == 0.05
    pairs = extreme_eigenpairs(operator, which="largest")
    assert pairs.largest == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_lower_rank_keeps_the_leading_forget_curvature_and_says_what_it_lacks(rank):
    problem = CASES[0].problem()
    inverse = RetainInverse(problem, damping=0.05, **EXACT)
    low = remain_preconditioner(problem, inverse=inverse, rank=rank)
    dense, whole = dense_p(problem, 0.05, rank), dense_p(problem, 0.05)
    eye = torch.eye(problem.size, dtype=torch.float64)
    torch.testing.assert_close(low.apply(eye) / low.scale, dense, rtol=1e-3, atol=1e-3 * float(dense.norm()))
    true = float(dense.trace() / whole.trace())
    assert abs(low.captured.value - true) < 5 * low.captured.standard_error + 1e-4
    assert low.captured.value < 1 - 1e-4
    assert low.eigenpairs is SolverOutcome.CONVERGED
    assert low.factor.shape == (problem.size, rank)
    assert low.products[0] == inverse.operator.products
    assert low.products[1] >= rank + 8


def test_in_its_coordinates_the_mixed_curvature_has_the_spectrum_of_the_preconditioned_one():
    problem = CASES[0].problem()
    low = remain_preconditioner(problem, inverse=RetainInverse(problem, damping=0.05), rank=4)
    mixed = MixedOperator(GGNOperator(problem, problem.retain), GGNOperator(problem, problem.forget), 0.4)
    d = problem.size
    eye = torch.eye(d, dtype=torch.float64)
    symmetric = PreconditionedOperator(mixed, low) @ eye
    values = torch.linalg.eigvalsh((symmetric + symmetric.T) / 2)
    plain = torch.linalg.eigvals(low.apply(mixed @ eye)).real.sort().values
    torch.testing.assert_close(values, plain, rtol=1e-6, atol=1e-8)
    assert int((values.abs() > 1e-9).sum()) == 4


def test_the_remain_direction_is_the_preconditioned_ascent_step():
    problem = CASES[0].problem()
    inverse = RetainInverse(problem, damping=0.05, **EXACT)
    low = remain_preconditioner(problem, inverse=inverse, rank=problem.size)
    found = unlearning_directions(problem, inverse=inverse)
    torch.testing.assert_close(low.apply(found.forget_gradient) / low.scale, found.remain, rtol=1e-5, atol=1e-6)


def test_only_gauss_newton_curvature_makes_a_preconditioner():
    problem = CASES[0].problem()
    inverse = RetainInverse(problem, damping=10.0, curvature="hessian")
    with pytest.raises(
        ValueError, match=r"`inverse` of `remain_preconditioner` must be of curvature 'ggn'.*got 'hessian'"
    ):
        remain_preconditioner(problem, inverse=inverse)


def test_a_forget_set_without_curvature_is_refused():
    x, y = normal(12, 3), normal(12, 2, seed=1)

    def absolute(outputs, targets):
        return (outputs - targets).abs().sum(1)

    problem = UnlearningProblem(nn.Linear(3, 2).double(), (x[:4], y[:4]), (x[4:], y[4:]), loss=absolute)
    with pytest.raises(ValueError, match="must have curvature on the forget set; got a largest eigenvalue of 0"):
        remain_preconditioner(problem, inverse=RetainInverse(problem, damping=1.0))


def test_a_rank_is_a_positive_number():
    with pytest.raises(ValueError, match=r"`rank` of `remain_preconditioner` must be .*; got 0"):
        remain_preconditioner(CASES[0].problem(), rank=0)


@dataclass(frozen=True, kw_only=True)
class RemainNewton(Algorithm):
    """T1 with the remain preconditioner."""

    name: ClassVar[str] = "remain_newton"

    def preconditioner(self, problem):
        return remain_preconditioner(problem, rank=20, inverse=RetainInverse(problem, samples=256))


def test_remain_newton_steps_are_predicted_and_forget_at_little_cost(digits_mlp, class_deletion):
    forget, retain = class_deletion
    algorithm = RemainNewton(lr=0.1, steps=50)
    report = stabkit.predict(digits_mlp, forget, retain, algorithm=algorithm, retain_samples=256, forget_samples=100)
    assert report.verdict == "stable"
    assert report.critical_lr > 0.1
    problem = UnlearningProblem(digits_mlp, forget, retain)
    near, far = (stabkit.run(problem, algorithm.replace(lr=lr)) for lr in (0.1, 100.0))
    assert not near.diverged
    assert far.diverged
    end = near.trajectory[-1]
    assert end.forget_loss > 4 * problem.forget_loss
    assert end.retain_loss < 1.1 * problem.retain_loss


# ------------------------------------------------------------------------------------------------------------- saliency


def dense_fisher_diagonal(problem, which):
    rows = []
    for i in range(getattr(problem, which).size):
        rows.append(mean_gradient(problem, getattr(problem, which), indices=torch.tensor([i])))
    return torch.stack(rows).square().mean(0)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 4.0])
def test_the_mask_is_the_ratio_of_fisher_diagonals(threshold):
    problem = CASES[0].problem()
    found = saliency(problem, threshold=threshold)
    forget, retain = (dense_fisher_diagonal(problem, which) for which in ("forget", "retain"))
    assert torch.equal(found.mask, forget / retain >= threshold)
    assert found.unseen == 0
    assert found.share == float(found.mask.double().mean())
    torch.testing.assert_close(found.preconditioner().apply(normal(problem.size)), normal(problem.size) * found.mask)


def test_parameters_that_neither_set_uses_stay_and_those_of_the_forget_set_alone_move():
    x = normal(12, 3)
    x[:, 0] = 0  # no sample has it
    x[4:, 1] = 0  # forget samples alone
    x[:4, 2] = 0  # retain samples alone
    y = normal(12, 1, seed=1)
    problem = UnlearningProblem(nn.Linear(3, 1, bias=False).double(), (x[:4], y[:4]), (x[4:], y[4:]), loss="mse")
    for threshold in (0.0, 1.0, 1e9):
        found = saliency(problem, threshold=threshold)
        assert found.mask.tolist() == [False, True, False]
        assert found.unseen == 1


def test_a_mask_prints_its_share():
    found = saliency(CASES[0].problem(), threshold=2.0)
    text = str(found)
    assert f"{found.share:.1%} of 43 parameters move" in text
    assert "at least 2 times that on the retain set; 0 have a gradient on neither" in text


def test_a_sample_of_the_sets_is_enough_for_a_mask():
    problem = CASES[0].problem()
    found = saliency(problem, samples=3, seed=2)
    chosen = problem.forget.subset(3, 2)
    rows = torch.stack([mean_gradient(problem, problem.forget, indices=i.reshape(1)) for i in chosen])
    torch.testing.assert_close(found.forget, rows.square().mean(0))


@pytest.mark.parametrize(("name", "value"), [("threshold", -1.0), ("samples", 0)])
def test_saliencys_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` of `saliency` must be .*; got {value}"):
        saliency(CASES[0].problem(), **{name: value})
