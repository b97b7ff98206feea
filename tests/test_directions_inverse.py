"""Damped inverses: conjugate gradients against dense solves and SciPy, diagonals against dense matrices, and K-FAC."""

import math
import sys

import curvlinops
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stabkit import LowConfidenceWarning, UnlearningProblem
from stabkit.curvature import FisherOperator, GGNOperator, HessianOperator
from stabkit.curvature.operators import CurvatureOperator
from stabkit.directions import (
    RetainInverse,
    SolveOutcome,
    damped_inverse,
    diagonal_inverse,
    fisher_diagonal,
    hutchinson_diagonal,
    kronecker_inverse,
)
from stabkit.preconditioner import Diagonal, Identity
from tests.cases import CASES, dense_ggn, dense_hessian

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")


class Matrix(CurvatureOperator):
    """A dense matrix as an operator."""

    def __init__(self, matrix):
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, block):
        return self.matrix @ block


def spectrum_matrix(values, seed=0, dtype=torch.float64):
    """A symmetric matrix with the given eigenvalues in random directions."""
    values = torch.as_tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    return ((q * values) @ q.T).to(dtype)


def block(d, k, seed=1, dtype=torch.float64):
    return torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


@given(
    d=st.integers(1, 25),
    k=st.integers(1, 4),
    decades=st.floats(0, 5),
    damping=st.sampled_from((0.0, 1e-3, 0.3)),
    jacobi=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_solution_is_the_dense_one_whatever_the_condition(d, k, decades, damping, jacobi, seed):
    matrix = spectrum_matrix(torch.logspace(-decades, 0, d, dtype=torch.float64), seed)
    right = block(d, k, seed)
    scale = diagonal_inverse(matrix.diag(), damping=damping + 1e-9) if jacobi else None
    operator = Matrix(matrix)
    solution = damped_inverse(
        operator, right, damping=damping, tolerance=1e-10, max_products=3000, preconditioner=scale
    )
    assert solution.converged, solution
    assert str(solution).startswith(f"(H + λI) x = v with λ = {damping:.3g}: {k} right-hand side")
    assert str(solution).endswith(f" after {solution.products:,} products: {solution.reason}")
    exact = torch.linalg.solve(damped(matrix, damping), right)
    # ‖x - x*‖ ≤ ‖A⁻¹‖ ‖r‖
    bound = 1.1e-10 * right.norm(dim=0) / (10**-decades + damping)
    assert bool(((solution.vectors - exact).norm(dim=0) <= bound + 1e-12 * exact.norm(dim=0)).all())
    true = (right - damped(matrix, damping) @ solution.vectors).norm(dim=0) / right.norm(dim=0)
    rounding = 10 * 2.3e-16 * (1 + damping) / (10**-decades + damping)  # eps‖A‖‖x‖/‖v‖, as either residual is off by
    torch.testing.assert_close(solution.residuals, true, rtol=1e-3, atol=rounding)
    assert solution.products == operator.products
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    assert solution.curvature >= lowest - 1e-9


@pytest.mark.parametrize("jacobi", [False, True])
def test_step_for_step_scipys_conjugate_gradients(jacobi):
    d, steps = 60, 9
    matrix = spectrum_matrix(torch.logspace(-3, 0, d, dtype=torch.float64)) + torch.diag(torch.arange(d).double())
    right = block(d, 3)
    scale = diagonal_inverse(matrix.diag(), damping=0.1) if jacobi else None
    solution = damped_inverse(
        Matrix(matrix), right, damping=0.1, tolerance=0, max_products=steps + 1, preconditioner=scale
    )
    assert solution.outcome is SolveOutcome.BUDGET
    assert solution.products == 3 * (steps + 1)
    preconditioner = None if scale is None else torch.diag(scale.diagonal).numpy()
    for column in range(3):
        theirs, _ = scipy.sparse.linalg.cg(
            damped(matrix, 0.1).numpy(), right[:, column].numpy(), rtol=0, maxiter=steps, M=preconditioner
        )
        torch.testing.assert_close(solution.vectors[:, column], torch.from_numpy(theirs), rtol=1e-8, atol=1e-10)


def test_a_jacobi_preconditioner_saves_products_on_badly_scaled_parameters():
    scales = torch.logspace(-3, 3, 40, dtype=torch.float64)
    matrix = scales[:, None] * damped(0.1 * spectrum_matrix(torch.linspace(0, 1, 40)), 1.0) * scales
    right = block(40, 1)
    plain, scaled = (
        damped_inverse(
            Matrix(matrix), right, damping=1e-9, tolerance=1e-8, max_products=4000, preconditioner=preconditioner
        )
        for preconditioner in (None, diagonal_inverse(matrix.diag(), damping=1e-9))
    )
    assert scaled.converged
    assert scaled.products * 5 < plain.products


def test_what_has_converged_drops_out():
    values = torch.ones(50, dtype=torch.float64)
    values[:20] = torch.logspace(-4, 0, 20)
    matrix = torch.diag(values)
    right = torch.zeros(50, 3, dtype=torch.float64)
    right[40, 0] = 1.0  # an eigenvector: one step
    right[:, 1] = 1.0  # 20 clusters
    operator = Matrix(matrix)
    solution = damped_inverse(operator, right, damping=0.0, tolerance=1e-8)
    one = damped_inverse(Matrix(matrix), right[:, 1], damping=0.0, tolerance=1e-8)
    assert solution.converged
    assert solution.products == operator.products == one.products + 2  # a step and its residual; the third is zero
    assert float(solution.residuals[2]) == 0 == float(solution.vectors[:, 2].norm())
    assert one.vectors.shape == (50,)
    torch.testing.assert_close(solution.vectors[:, 1], one.vectors)


def test_nothing_to_solve_costs_nothing():
    solution = damped_inverse(Matrix(torch.eye(3)), torch.zeros(3), damping=0.0)
    assert (solution.products, solution.converged, solution.curvature) == (0, True, math.inf)


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_an_indefinite_matrix_is_met_and_said(damping):
    values = [-0.5, 0.1, 0.4, 1.0, 2.0]
    solution = damped_inverse(Matrix(spectrum_matrix(values)), block(5, 2), damping=damping)
    assert solution.outcome is SolveOutcome.INDEFINITE
    assert -0.5 <= solution.curvature <= -damping
    assert "negative eigenvalues" in solution.reason
    assert "damping" in solution.remedy
    assert bool(torch.isfinite(solution.vectors).all())
    assert damped_inverse(Matrix(spectrum_matrix(values)), block(5, 2), damping=0.6).converged


def test_a_singular_matrix_without_damping_is_met_too():
    matrix = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    right = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    assert damped_inverse(Matrix(matrix), right, damping=0.0).outcome is SolveOutcome.INDEFINITE
    right[0] = 0.0  # in the range all is well
    solution = damped_inverse(Matrix(matrix), right, damping=0.0)
    assert solution.converged
    torch.testing.assert_close(solution.vectors, torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))


def test_one_bad_right_hand_side_leaves_the_others_right():
    matrix = torch.diag(torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64))
    right = torch.eye(3, dtype=torch.float64)
    solution = damped_inverse(Matrix(matrix), right, damping=0.0)
    assert solution.outcome is SolveOutcome.INDEFINITE
    torch.testing.assert_close(solution.vectors[:, 1:], torch.diag(torch.tensor([0, 1, 0.5]).double())[:, 1:])
    assert solution.residuals.tolist() == [1.0, 0.0, 0.0]


def test_a_budget_that_runs_out_is_never_exceeded():
    matrix = spectrum_matrix(torch.logspace(-6, 0, 80, dtype=torch.float64))
    for budget in (2, 3, 10):
        operator = Matrix(matrix)
        solution = damped_inverse(operator, block(80, 2), damping=0.0, tolerance=1e-12, max_products=budget)
        assert solution.outcome is SolveOutcome.BUDGET
        assert operator.products == 2 * budget
        assert "max_products" in solution.remedy


def test_rounding_is_told_from_a_short_budget():
    class Noisy(Matrix):
        """Products that differ from call to call."""

        def _matmat(self, block):
            noise = torch.randn(block.shape, generator=self.generator, dtype=block.dtype)
            return self.matrix @ block + 1e-3 * block.norm() * noise

    operator = Noisy(spectrum_matrix(torch.linspace(1, 2, 30)))
    operator.generator = torch.Generator().manual_seed(0)
    solution = damped_inverse(operator, block(30, 1), damping=0.0, tolerance=1e-8, max_products=2000)
    assert solution.outcome is SolveOutcome.INACCURATE
    assert float(solution.residuals) > 1e-8


def test_single_precision_reaches_what_it_can_by_starting_again():
    matrix = spectrum_matrix(torch.logspace(-4, 0, 200, dtype=torch.float64), dtype=torch.float32)
    right = block(200, 2, dtype=torch.float32)
    solution = damped_inverse(Matrix(matrix), right, damping=1e-4, tolerance=0, max_products=2000)
    true = (right.double() - damped(matrix.double(), 1e-4) @ solution.vectors.double()).norm(dim=0)
    assert bool((true / right.double().norm(dim=0) < 1e-4).all())
    torch.testing.assert_close(solution.residuals, true / right.double().norm(dim=0), rtol=0.5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_real_curvature(case):
    problem = case.problem()
    dense = dense_ggn(problem, "retain")
    damping = 0.01 * float(torch.linalg.eigvalsh(dense)[-1])
    right = block(problem.size, 2)
    solution = damped_inverse(
        GGNOperator(problem, problem.retain), right, damping=damping, tolerance=1e-10, max_products=500
    )
    assert solution.converged
    torch.testing.assert_close(
        solution.vectors, torch.linalg.solve(damped(dense, damping), right), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, r"`damping` of `damped_inverse` must be .*; got -1.0"),
        ({"tolerance": -2.0}, r"`tolerance` of `damped_inverse` must be .*; got -2.0"),
        ({"max_products": 1}, r"`max_products` of `damped_inverse` must be .*; got 1. A step"),
        ({"vectors": torch.zeros(4)}, r"`vectors` of `damped_inverse` must be of shape \(3,\).*got \(4,\)"),
        ({"vectors": torch.tensor([1.0, math.nan, 0])}, r"`vectors` .* must be finite; got 1 of 3"),
        ({"preconditioner": Diagonal(torch.ones(2))}, r"must be of the operator's order 3; got \(2,\)"),
        ({"preconditioner": Diagonal(torch.tensor([1.0, 0, 2]))}, r"must have positive entries; got 0\."),
    ],
)
def test_what_cannot_be_solved_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        damped_inverse(Matrix(torch.eye(3)), **{"vectors": torch.ones(3), "damping": 0.1, **arguments})


def test_other_preconditioners_are_refused_by_name():
    with pytest.raises(TypeError, match="must be a Diagonal or None; got Identity"):
        damped_inverse(Matrix(torch.eye(3)), torch.ones(3), damping=0.1, preconditioner=Identity())


# ------------------------------------------------------------------------------------------------------- diagonals


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_hutchinsons_diagonal_is_right_within_its_error(operator):
    problem = CASES[0].problem()
    dense = dense_hessian(problem, "retain") if operator is HessianOperator else dense_ggn(problem, "retain")
    estimate = hutchinson_diagonal(operator(problem, problem.retain), probes=problem.size - 1, seed=3)
    scores = (estimate.values - dense.diag()) / estimate.standard_error.clamp_min(1e-12)
    assert estimate.products == problem.size - 1
    assert float(scores.abs().max()) < 5
    assert 0.7 < float(scores.square().mean().sqrt()) < 1.3
    theory = ((dense.square().sum(1) - dense.diag().square()) / estimate.samples).sqrt()
    large = theory > 1e-3 * theory.max()
    torch.testing.assert_close(estimate.standard_error[large], theory[large], rtol=0.5, atol=0)


def test_the_split_into_blocks_changes_nothing():
    matrix = Matrix(spectrum_matrix(torch.linspace(-1, 2, 20)))
    one, other = (hutchinson_diagonal(matrix, probes=11, at_once=width, seed=5) for width in (3, 11))
    torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(one.standard_error, other.standard_error)


def test_with_as_many_probes_as_parameters_the_diagonal_is_exact():
    matrix = spectrum_matrix(torch.linspace(-1, 2, 10))
    estimate = hutchinson_diagonal(Matrix(matrix), probes=1000, at_once=4)
    torch.testing.assert_close(estimate.values, matrix.diag())
    assert float(estimate.standard_error.max()) == 0
    assert estimate.products == 10
    inverse = estimate.inverse(0.5).diagonal
    torch.testing.assert_close(inverse, 1 / (matrix.diag().clamp_min(0) + 0.5))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_fishers_diagonal_is_that_of_its_operator(case):
    problem = case.problem()
    chosen = torch.tensor([0, 2])
    for indices in (None, chosen):
        dense = FisherOperator(problem, problem.forget, indices=indices) @ torch.eye(problem.size).double()
        torch.testing.assert_close(fisher_diagonal(problem, problem.forget, indices=indices), dense.diag())


@pytest.mark.parametrize("damping", [0.0, -1.0])
def test_a_diagonal_needs_damping(damping):
    with pytest.raises(ValueError, match=f"`damping` of `diagonal_inverse` must be .*; got {damping}. An entry of 0"):
        diagonal_inverse(torch.ones(3), damping=damping)


@pytest.mark.parametrize(("name", "value"), [("probes", 1), ("at_once", 0)])
def test_hutchinsons_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` of `hutchinson_diagonal` must be .*; got {value}"):
        hutchinson_diagonal(Matrix(torch.eye(3)), **{name: value})


# ---------------------------------------------------------------------------------------------------- Kronecker factors


def one_layer(loss="mse"):
    """A single linear layer: there the Gauss-Newton matrix of squared error is a Kronecker product."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=g, dtype=torch.float64)
    y = torch.randn(20, 3, generator=g, dtype=torch.float64) if loss == "mse" else torch.arange(20) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3)).double()
    return UnlearningProblem(model, (x[:5], y[:5]), (x[5:], y[5:]), loss=loss)


@pytest.mark.parametrize("corrected", [False, True])
def test_kfac_is_exact_where_curvature_is_a_kronecker_product(corrected):
    problem = one_layer()
    chosen = torch.arange(0, 15, 2)
    inverse = kronecker_inverse(problem, problem.retain, damping=0.1, corrected=corrected, indices=chosen)
    dense = GGNOperator(problem, problem.retain, indices=chosen) @ torch.eye(problem.size, dtype=torch.float64)
    right = block(problem.size, 3)
    torch.testing.assert_close(
        inverse.apply(right), torch.linalg.solve(damped(dense, 0.1), right), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(inverse.apply(right[:, 0]), inverse.apply(right)[:, 0])


def convolutions():
    """A convolution and a linear layer, in a few parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    return one_layer_of(model, (1, 4, 4))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("case", [CASES[0].problem, convolutions])
def test_kfac_of_a_network_is_the_inverse_of_curvlinopss_own_matrix(case, corrected):
    problem = case()
    state = torch.random.get_rng_state()
    inverse = kronecker_inverse(problem, problem.retain, damping=0.05, corrected=corrected)
    assert torch.equal(state, torch.random.get_rng_state())
    model = problem.new_model()
    kind = curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator
    theirs = kind(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [problem.retain.batch(torch.arange(problem.retain.size))],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    eye = torch.eye(problem.size, dtype=torch.float64)
    dense = theirs @ eye
    ours = inverse.apply(eye)
    torch.testing.assert_close(ours @ damped(dense, 0.05), eye, rtol=0, atol=1e-6)
    assert float(torch.linalg.eigvalsh((ours + ours.T) / 2)[0]) > 0
    # It approximates the true matrix: nearer than its diagonal is.
    true = dense_ggn(problem, "retain")
    assert float((true - dense).norm()) < float((true - torch.diag(true.diag())).norm())


def test_without_curvlinops_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    problem = one_layer()
    with pytest.raises(ImportError, match=r"`kronecker_inverse` needs curvlinops.*pip install stabkit\[kfac\]"):
        kronecker_inverse(problem, problem.retain, damping=0.1)


class Grouped(nn.Module):
    """Channels that do not mix."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(2, 4, 2, groups=2)

    def forward(self, x):
        return self.features(x).mean((2, 3))


class Tied(nn.Module):
    """One layer's weight in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (lambda: one_layer_of(Grouped(), (2, 3, 3)), r"'features.weight' is of a Conv2d"),
        (lambda: one_layer_of(Tied(), (3,)), r"'first.weight' is shared by 2 layers"),
        (CASES[3].problem, r"'norm.weight' is of a BatchNorm2d"),
        (CASES[4].problem, r"got loss 'causal_lm' on outputs \(1, 5, 7\) of inputs of type dict"),
        (CASES[2].problem, r"got loss 'poisson'"),
    ],
    ids=["grouped", "tied", "batchnorm", "language model", "callable loss"],
)
def test_what_has_no_kronecker_factors_is_refused(problem, message):
    problem = problem()
    with pytest.raises(ValueError, match=message):
        kronecker_inverse(problem, problem.retain, damping=0.1)


def one_layer_of(model, shape):
    """A problem of random data for a model of few outputs."""
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0), dtype=next(model.parameters()).dtype)
    y = torch.arange(8) % 3
    return UnlearningProblem(model, (x[:3], y[:3]), (x[3:], y[3:]))


def test_kfac_needs_damping():
    problem = one_layer()
    with pytest.raises(ValueError, match=r"`damping` of `kronecker_inverse` must be .*; got 0. The factors"):
        kronecker_inverse(problem, problem.retain, damping=0)


# ------------------------------------------------------------------------------------------- the inverse of a problem


@pytest.mark.parametrize("method", ["cg", "diagonal", "fisher"])
def test_each_inverse_is_what_it_says(method):
    problem = CASES[0].problem()
    inverse = RetainInverse(problem, method=method, damping=0.02, tolerance=1e-9)
    right = block(problem.size, 2)
    if method == "cg":
        expected = torch.linalg.solve(damped(dense_ggn(problem, "retain"), 0.02), right)
    elif method == "fisher":
        expected = right / (fisher_diagonal(problem, problem.retain) + 0.02).unsqueeze(1)
    else:  # fewer parameters than probes: exact
        expected = right / (dense_ggn(problem, "retain").diag() + 0.02).unsqueeze(1)
    torch.testing.assert_close(inverse.apply(right), expected, rtol=1e-6, atol=1e-6)
    assert inverse.outcome is (SolveOutcome.CONVERGED if method == "cg" else None)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_the_kronecker_inverses_are_reached_by_name(method):
    problem = one_layer("cross_entropy")
    inverse = RetainInverse(problem, method=method, damping=0.1)
    direct = kronecker_inverse(problem, problem.retain, damping=0.1, corrected=method == "ekfac")
    torch.testing.assert_close(inverse.apply(torch.ones(15).double()), direct.apply(torch.ones(15).double()))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_the_default_damping_is_a_thousandth_of_the_largest_curvature(curvature):
    problem = CASES[0].problem()
    dense = dense_ggn(problem, "retain") if curvature == "ggn" else dense_hessian(problem, "retain")
    inverse = RetainInverse(problem, curvature=curvature)
    assert inverse.damping == pytest.approx(1e-3 * float(torch.linalg.eigvalsh(dense)[-1]), rel=0.02)


def test_a_solve_that_falls_short_warns_with_what_to_do():
    problem = CASES[0].problem()
    inverse = RetainInverse(problem, damping=1e-6, max_products=3)
    with pytest.warns(
        LowConfidenceWarning, match=r"\(H_R \+ 1e-06·I\)⁻¹ was not solved to 0.001.*raise `max_products`"
    ):
        inverse.apply(torch.ones(problem.size, dtype=torch.float64))
    assert inverse.outcome is SolveOutcome.BUDGET
    inverse.apply(torch.zeros(problem.size, dtype=torch.float64))
    assert inverse.outcome is SolveOutcome.BUDGET  # the worst so far


def test_a_preconditioner_is_taken_as_the_warning_says():
    scales = torch.logspace(-2, 2, 6, dtype=torch.float64)  # inputs, and so parameters, of very different scale
    x, y = block(40, 6) * scales, block(40, 1, seed=2)
    problem = UnlearningProblem(nn.Linear(6, 1, bias=False).double(), (x[:8], y[:8]), (x[8:], y[8:]), loss="mse")
    arguments = {"damping": 1e-6, "tolerance": 1e-9, "max_products": 9}
    plain = RetainInverse(problem, **arguments)
    right = torch.ones(problem.size, dtype=torch.float64)
    with pytest.warns(LowConfidenceWarning, match="or give a `preconditioner`"):
        plain.apply(right)
    scale = hutchinson_diagonal(plain.operator).inverse(plain.damping)
    inverse = RetainInverse(problem, preconditioner=scale, **arguments)
    expected = torch.linalg.solve(damped(dense_ggn(problem, "retain"), 1e-6), right)
    torch.testing.assert_close(inverse.apply(right), expected, rtol=1e-6, atol=0)
    assert inverse.outcome is SolveOutcome.CONVERGED


def absolute(outputs, targets):
    """A loss without curvature in the outputs."""
    return (outputs - targets).abs().sum(1)


def test_without_curvature_there_is_no_default_damping():
    x, y = block(12, 3), block(12, 2, seed=2)
    problem = UnlearningProblem(nn.Linear(3, 2).double(), (x[:4], y[:4]), (x[4:], y[4:]), loss=absolute)
    with pytest.raises(ValueError, match=r"`damping` of `RetainInverse` must be given .* largest eigenvalue of 0\."):
        RetainInverse(problem)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "cgs"}, ValueError, "`method` of `RetainInverse` must be one of .*; got 'cgs'. Did you mean 'cg'"),
        ({"curvature": "fisher"}, ValueError, "`curvature` of `RetainInverse` must be one of .*; got 'fisher'"),
        ({"damping": 0}, ValueError, "`damping` of `RetainInverse` must be .*; got 0"),
        ({"samples": 0}, ValueError, "`samples` of `RetainInverse` must be .*; got 0"),
        ({"damping": "1"}, TypeError, "`damping` of `RetainInverse` must be .*; got '1'"),
        ({"tolerance": "x"}, TypeError, "`tolerance` of `RetainInverse` must be .*; got 'x'"),
        ({"tolerance": -1.0, "method": "fisher"}, ValueError, r"`tolerance` of `RetainInverse` must be .*; got -1\.0"),
        ({"max_products": -3}, ValueError, "`max_products` of `RetainInverse` must be .*; got -3. A step"),
        (
            {"max_products": 2.5, "method": "fisher"},
            TypeError,
            r"`max_products` of `RetainInverse` must be .*; got 2\.5",
        ),
        ({"seed": "a"}, TypeError, "`seed` of `RetainInverse` must be .*; got 'a'"),
        (
            {"preconditioner": Identity()},
            TypeError,
            "`preconditioner` of `RetainInverse` must be a Diagonal or None; got Id",
        ),
        ({"preconditioner": Diagonal(torch.ones(2))}, ValueError, r"of `RetainInverse` must be .*order 43; got \(2,\)"),
        (
            {"preconditioner": Diagonal(torch.ones(43)), "method": "fisher"},
            ValueError,
            "`preconditioner` of `RetainInverse` must be None where .*; got one with method='fisher'. Take method='cg'",
        ),
    ],
)
def test_a_wrong_request_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        RetainInverse(CASES[0].problem(), **arguments)
