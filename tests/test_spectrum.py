"""Eigenpairs, densities, traces and pencils from products alone, against dense truth, closed forms and peers."""

import json
import math
import os
import random

import curvlinops
import matplotlib as mpl
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from stabkit.curvature import GGNOperator, HessianOperator, MixedOperator, curvature_operator
from stabkit.curvature import orthonormal as orthonormal_module
from stabkit.curvature.operators import CurvatureOperator
from stabkit.curvature.orthonormal import orthonormal, tall_qr
from stabkit.models import MLP
from stabkit.problem import UnlearningProblem
from stabkit.spectrum import (
    SolverOutcome,
    affordable_basis,
    eigen,
    extreme_eigenpairs,
    frobenius_norm,
    generalised_eigenpairs,
    spectral_density,
    squared_frobenius,
    trace,
)
from stabkit.spectrum._common import rademacher
from stabkit.stability import critical_mix
from tests.cases import CASES, dense_ggn, dense_hessian

# Operators are true at any parameters, trained or not.
pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
KINDS = ("gaussian", "integers", "clusters", "low rank", "semi-definite", "zero", "identity", "decay")


class KilledError(Exception):
    """What a test's kill raises."""


class DenseOperator(CurvatureOperator):
    """A matrix in an operator's clothes, which can die after some products and can be noisy."""

    def __init__(self, matrix, *, dies_after=math.inf, noise=0.0):
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix
        self.dies_after = dies_after
        self.noise = noise
        self.generator = torch.Generator().manual_seed(0)

    def _matmat(self, block):
        if self.products > self.dies_after:
            raise KilledError
        image = self.matrix @ block
        if self.noise:
            image = image + self.noise * torch.randn(block.shape, generator=self.generator, dtype=block.dtype)
        return image


def eigenvalues(kind, size, generator):
    """A spectrum with whatever makes eigensolvers stumble."""
    if kind == "gaussian":
        return torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "integers":
        return torch.randint(-3, 4, (size,), generator=generator).double()
    if kind == "clusters":
        centres = torch.randint(-2, 3, (size,), generator=generator).double()
        return centres + 1e-7 * torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "low rank":
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        values[size // 4 :] = 0
        return values
    if kind == "semi-definite":
        return torch.rand(size, generator=generator, dtype=torch.float64)
    if kind == "decay":
        return 0.5 ** torch.arange(size, dtype=torch.float64)
    return torch.zeros(size, dtype=torch.float64) if kind == "zero" else torch.ones(size, dtype=torch.float64)


def symmetric(values, generator):
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = q @ torch.diag(values) @ q.T
    return (matrix + matrix.T) / 2


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_symmetric(size, seed, kind="gaussian"):
    generator = seeded(seed)
    return symmetric(eigenvalues(kind, size, generator), generator)


# ---- extreme eigenpairs


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_extreme_eigenpairs_of_networks(case, mix):
    problem = case.problem()
    operators = [HessianOperator(problem, s) for s in (problem.retain, problem.forget)]
    dense = (1 - mix) * dense_hessian(problem, "retain") - mix * dense_hessian(problem, "forget")
    truth = torch.linalg.eigvalsh(dense)
    pairs = extreme_eigenpairs(MixedOperator(*operators, mix), ends=2, tolerance=1e-8, basis=12, max_products=5000)
    expected = torch.cat([truth[:2], truth[-2:]])
    torch.testing.assert_close(pairs.values, expected, rtol=1e-6, atol=1e-8)
    assert pairs.converged
    assert pairs.products > 0
    assert float(pairs.residuals.max()) < 1e-4 * float(truth.abs().max())
    image = dense @ pairs.vectors
    torch.testing.assert_close(
        pairs.residuals, (image - pairs.vectors * pairs.values).norm(dim=0), atol=1e-9, rtol=1e-6
    )


@example(14, "clusters", 1e-12, torch.float64, "largest", 1, 1, 0, "lanczos", 0)  # two doublings are too few
@example(25, "clusters", 1e-12, torch.float64, "largest", 1, 1, 0, "lanczos", 0)
@given(
    size=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from((1e-12, 1.0, 1e12)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    which=st.sampled_from(("both", "largest", "smallest")),
    ends=st.integers(1, 4),
    block=st.integers(1, 4),
    extra=st.integers(0, 10),
    method=st.sampled_from(("lanczos", "lobpcg")),
    seed=st.integers(0, 99),
)
def test_pairs_are_true_eigenpairs_of_any_symmetric_matrix(
    size, kind, scale, dtype, which, ends, block, extra, method, seed
):
    """Whatever the outcome: residuals are the true ones and bound the error; converged means what it says."""
    matrix = (scale * random_symmetric(size, seed, kind)).to(dtype)
    operator = DenseOperator(matrix)
    wanted = ends * (2 if which == "both" else 1)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    pairs = extreme_eigenpairs(
        operator,
        ends=ends,
        which=which,
        block=block,
        basis=wanted + 2 * block + extra,
        method=method,
        tolerance=tolerance,
        max_products=3000,
        seed=seed,
    )
    truth = torch.linalg.eigvalsh(matrix.double())
    top = max(float(truth.abs().max()), 1e-300)
    rounding = 200 * torch.finfo(dtype).eps * top
    assert pairs.products == operator.products <= 3000
    assert pairs.values.numel() == min(size, wanted)
    assert bool((pairs.values.diff() >= 0).all())
    image = matrix.double() @ pairs.vectors.double()
    recomputed = (image - pairs.vectors.double() * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, recomputed, rtol=1e-3, atol=rounding)
    distance = (pairs.values.unsqueeze(1) - truth).abs().amin(1)
    assert bool((distance <= recomputed + rounding).all())
    gram = pairs.vectors.double().T @ pairs.vectors.double()
    separate = method == "lanczos" or which != "both"  # LOBPCG's two ends come from two runs
    if separate:
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-3)
    if pairs.converged:
        assert bool((pairs.residuals <= max(tolerance, 100 * torch.finfo(dtype).eps) * pairs.scale).all())
        slack = tolerance * top + rounding
        if which != "largest":
            assert abs(pairs.smallest - float(truth[0])) <= slack
        if which != "smallest":
            assert abs(pairs.largest - float(truth[-1])) <= slack
    if method == "lanczos":
        assert pairs.converged


@given(
    size=st.integers(1, 60),
    rank=st.integers(0, 60),
    ends=st.integers(1, 4),
    more=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_lanczos_counts_repeated_eigenvalues_up_to_the_block(size, rank, ends, more, seed):
    """Low rank and zero matrices included: an invariant subspace must not stop it."""
    generator = seeded(seed)
    values = torch.randint(-3, 4, (size,), generator=generator).double()
    values[rank:] = 0
    operator = DenseOperator(symmetric(values, generator))
    pairs = extreme_eigenpairs(operator, ends=ends, block=ends + more, tolerance=1e-9, max_products=2000, seed=seed)
    truth = values.sort().values
    chosen = sorted({*range(min(ends, size)), *range(max(0, size - ends), size)})
    assert pairs.converged
    torch.testing.assert_close(pairs.values, truth[chosen], atol=1e-7, rtol=0)


@pytest.mark.parametrize("which", ["both", "largest", "smallest"])
def test_both_methods_agree(which):
    operator = DenseOperator(random_symmetric(150, 3, "semi-definite"))
    results = [
        extreme_eigenpairs(operator, ends=2, which=which, method=method, tolerance=1e-7, max_products=4000)
        for method in ("lanczos", "lobpcg")
    ]
    assert all(r.converged for r in results)
    torch.testing.assert_close(results[0].values, results[1].values, rtol=0, atol=1e-9)
    overlap = (results[0].vectors * results[1].vectors).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
@pytest.mark.parametrize("budget", [25, 40, 61])
def test_the_budget_is_kept_and_running_out_is_said(method, budget):
    operator = DenseOperator(random_symmetric(300, 4, "semi-definite"))
    pairs = extreme_eigenpairs(operator, ends=2, method=method, tolerance=1e-9, max_products=budget)
    assert pairs.outcome is SolverOutcome.BUDGET
    assert not pairs.converged
    assert "`max_products`" in pairs.remedy
    assert "products ran out" in pairs.reason
    assert budget - 8 <= operator.products == pairs.products <= budget


def test_a_budget_below_the_order_is_kept_by_a_small_matrix_too():
    operator = DenseOperator(random_symmetric(20, 5))
    pairs = extreme_eigenpairs(operator, max_products=10)
    assert operator.products <= 10
    assert bool(pairs.residuals.isfinite().all())


def test_unconverged_eigenpairs_of_a_network_say_so(random_deletion, digits_mlp):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    operator = curvature_operator(problem, problem.forget, kind="ggn")
    pairs = extreme_eigenpairs(operator, ends=3, tolerance=0, max_products=20)
    assert pairs.outcome is SolverOutcome.BUDGET
    assert pairs.products <= 20
    assert bool(pairs.residuals.isfinite().all())


def test_eigenvalues_packed_too_densely_widen_the_basis_and_then_count_as_stagnated():
    values = torch.rand(1500, generator=seeded(0), dtype=torch.float64) ** 4
    diagonal = DiagonalOperator(values)
    pairs = extreme_eigenpairs(diagonal, tolerance=1e-9, basis=6, max_products=10_000)
    assert pairs.outcome is SolverOutcome.STAGNATED
    assert pairs.widened == 2
    assert pairs.restarts > 6
    assert pairs.products < 2000
    assert "`basis`" in pairs.remedy
    assert "stopped falling" in pairs.reason


def test_a_widened_basis_finds_what_a_narrow_one_does_not():
    values = torch.linspace(0, 1, 300, dtype=torch.float64)
    pairs = extreme_eigenpairs(DiagonalOperator(values), tolerance=1e-9, basis=6, max_products=10_000)
    assert pairs.converged
    assert pairs.widened > 0
    assert pairs.smallest == pytest.approx(0, abs=1e-12)
    assert pairs.largest == pytest.approx(1, abs=1e-12)


class DiagonalOperator(CurvatureOperator):
    """diag(values), without a matrix."""

    def __init__(self, values):
        super().__init__(values.numel(), values.dtype, values.device)
        self.values = values

    def _matmat(self, block):
        return self.values.unsqueeze(1) * block


def test_little_memory_makes_the_basis_smaller_and_the_pairs_no_worse(monkeypatch):
    values = torch.linspace(-1, 3, 400, dtype=torch.float64)
    values[-1] = 5
    operator = DiagonalOperator(values)
    products = []
    for vectors, basis in ((10**6, 24), (40, 17), (0, 8)):
        monkeypatch.setattr(eigen, "free_memory", lambda device, vectors=vectors: vectors * 400 * 8)
        assert affordable_basis(operator) == basis
        pairs = extreme_eigenpairs(operator, tolerance=1e-6, block=1, basis=basis, max_products=2000)
        assert pairs.converged
        torch.testing.assert_close(pairs.values, values[[0, -1]], rtol=0, atol=1e-9)
        products.append(pairs.products)
    assert products[0] < products[-1]
    monkeypatch.undo()
    assert extreme_eigenpairs(operator, block=1, basis=24).products == extreme_eigenpairs(operator, block=1).products


def test_noisy_products_are_not_called_converged():
    operator = DenseOperator(random_symmetric(100, 1), noise=1e-2)
    pairs = extreme_eigenpairs(operator, tolerance=1e-4, max_products=2000)
    assert pairs.outcome in {SolverOutcome.INACCURATE, SolverOutcome.STAGNATED}
    assert "float64" in pairs.remedy


def test_an_operator_that_is_not_symmetric_is_not_called_converged():
    matrix = random_symmetric(100, 1) + torch.triu(torch.full((100, 100), 0.5, dtype=torch.float64), 1)
    pairs = extreme_eigenpairs(DenseOperator(matrix), max_products=2000)
    assert pairs.outcome in {SolverOutcome.INACCURATE, SolverOutcome.STAGNATED}
    assert "not symmetric" in pairs.reason


def test_eigenpairs_repeat_and_depend_on_the_seed():
    operator = DenseOperator(random_symmetric(120, 2, "semi-definite"))
    first, second, other = (extreme_eigenpairs(operator, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.vectors, other.vectors)


@pytest.mark.parametrize("narrow", [0, 3, 5])
def test_orthonormal_directions_of_a_deficient_block_span_it_and_stay_orthogonal(narrow):
    generator = seeded(7)
    basis = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64)).Q
    own = torch.randn(12, narrow, generator=generator, dtype=torch.float64)
    block = own @ torch.randn(narrow, 5, generator=generator, dtype=torch.float64) + basis @ torch.ones(4, 5).double()
    q, coupling = orthonormal(block, basis, width=5, floor=1e-12, generator=generator)
    whole = torch.cat([basis, q], 1)
    torch.testing.assert_close(whole.T @ whole, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(q @ coupling, block - basis @ (basis.T @ block), rtol=0, atol=1e-12)
    assert float(coupling[narrow:].abs().sum()) <= 1e-12


def test_a_block_without_new_directions_gives_way_to_random_ones():
    """Coordinate vectors are what QR itself would put in, and the basis has them."""
    basis = torch.eye(10, 4, dtype=torch.float64)
    block = torch.zeros(10, 3, dtype=torch.float64)
    drawn = []
    for seed in (0, 0, 1):
        q, coupling = orthonormal(block, basis, width=3, floor=0.0, generator=seeded(seed))
        whole = torch.cat([basis, q], 1)
        torch.testing.assert_close(whole.T @ whole, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-13)
        assert float(coupling.abs().sum()) == 0
        drawn.append(q)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])


# ---- checkpoints

SETTINGS = {"ends": 2, "tolerance": 1e-10, "basis": 14, "max_products": 4000}


def same(first, second):
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in ("values", "vectors", "residuals")) and (
        (first.outcome, first.products, first.restarts, first.widened, first.scale)
        == (second.outcome, second.products, second.restarts, second.widened, second.scale)
    )


@pytest.mark.parametrize("dies_after", [1, 9, 30, 77, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_killed_run_resumes_with_the_same_answer_and_few_products_more(tmp_path, dies_after, dtype):
    matrix = random_symmetric(200, 0, "semi-definite").to(dtype)
    path = tmp_path / "state.npz"
    settings = {**SETTINGS, "tolerance": 1e-10 if dtype == torch.float64 else 1e-5}
    whole = extreme_eigenpairs(DenseOperator(matrix), **settings)
    assert whole.products > 150
    killed, resumed = DenseOperator(matrix, dies_after=dies_after), DenseOperator(matrix)
    with pytest.raises(KilledError):
        extreme_eigenpairs(killed, checkpoint=path, **settings)
    again = extreme_eigenpairs(resumed, checkpoint=str(path), **settings)
    assert same(whole, again)
    # Four blocks of two at most were done twice, and one product recognises the operator.
    assert dies_after + resumed.products <= whole.products + 4 * 2 + 1
    assert os.listdir(tmp_path) == ["state.npz"]


@pytest.mark.parametrize(("power", "widened"), [(1, 1), (4, 2)])
def test_a_run_that_widened_its_basis_resumes_with_the_same_answer(tmp_path, power, widened):
    operator = DiagonalOperator(torch.linspace(0, 1, 300, dtype=torch.float64) ** power)
    settings = {"tolerance": 1e-12, "basis": 6}
    path = tmp_path / "state"
    whole = extreme_eigenpairs(operator, max_products=10_000, **settings)
    assert whole.widened == widened
    for budget in range(60, whole.products, max(70, whole.products // 8)):
        extreme_eigenpairs(operator, max_products=budget, checkpoint=path, **settings)
    assert same(whole, extreme_eigenpairs(operator, max_products=10_000, checkpoint=path, **settings))


def test_a_finished_checkpoint_answers_again_for_the_residuals_alone(tmp_path):
    matrix = random_symmetric(200, 0, "semi-definite")
    path = tmp_path / "state"
    first = extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, checkpoint_every=1000, **SETTINGS)
    operator = DenseOperator(matrix)
    assert same(first, extreme_eigenpairs(operator, checkpoint=path, **SETTINGS))
    assert operator.products == 1 + 4


def test_a_larger_budget_goes_on_from_the_checkpoint(tmp_path):
    matrix = random_symmetric(200, 0, "semi-definite")
    path = tmp_path / "state"
    short = {**SETTINGS, "max_products": 60}
    assert extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, **short).outcome is SolverOutcome.BUDGET
    operator = DenseOperator(matrix)
    whole = extreme_eigenpairs(DenseOperator(matrix), **SETTINGS)
    assert same(whole, extreme_eigenpairs(operator, checkpoint=path, **SETTINGS))
    assert operator.products < whole.products - 50


def test_a_kill_while_writing_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    matrix = random_symmetric(200, 0, "semi-definite")
    path = tmp_path / "state"
    extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, **{**SETTINGS, "max_products": 60})
    before = path.read_bytes()

    def dying(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying)
        with pytest.raises(KilledError):
            extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, **SETTINGS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]


@pytest.fixture
def written(tmp_path):
    """A checkpoint of one operator, half-way."""
    path = tmp_path / "state"
    matrix = random_symmetric(200, 0, "semi-definite")
    extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, **{**SETTINGS, "max_products": 60})
    return path, matrix


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ends": 3, "basis": 14}, r"`checkpoint` of `extreme_eigenpairs`.*state' with ends 2, not 3"),
        ({"basis": 15}, r"with basis 14, not 15"),
        ({"seed": 1}, r"with seed 0, not 1"),
        ({"which": "largest"}, r"with which 'both', not 'largest'"),
        ({"block": 3}, r"with block 2, not 3"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(written, setting, message):
    path, matrix = written
    with pytest.raises(ValueError, match=message):
        extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, **{**SETTINGS, **setting})


def test_a_checkpoint_of_another_operator_is_refused(written):
    path, matrix = written
    with pytest.raises(ValueError, match=r"with order 200, not 199"):
        extreme_eigenpairs(DenseOperator(matrix[1:, 1:].clone()), checkpoint=path, **SETTINGS)
    with pytest.raises(ValueError, match=r"with dtype 'torch.float64', not 'torch.float32'"):
        extreme_eigenpairs(DenseOperator(matrix.float()), checkpoint=path, **SETTINGS)
    other = DenseOperator(matrix + 1e-3 * random_symmetric(200, 9))
    with pytest.raises(ValueError, match=r"state', whose product with the start vector differs by \d"):
        extreme_eigenpairs(other, checkpoint=path, **SETTINGS)


def corruptions(path):
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    return {
        "empty": b"",
        "cut": content[:middle],
        "flipped": flipped,
        "text": b"not an archive",
        "pickle": b"\x80\x04N.",
    }


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "pickle"])
def test_a_damaged_checkpoint_is_refused(written, damage):
    path, matrix = written
    path.write_bytes(corruptions(path)[damage])
    with pytest.raises(ValueError, match=r"must be a file that it wrote; got '.*state', which cannot be read \(\w+"):
        extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, **SETTINGS)


def test_an_archive_of_something_else_is_refused(written):
    path, matrix = written
    with open(path, "wb") as file:
        np.savez(file, weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"which cannot be read \(KeyError: 'identity'\)"):
        extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, **SETTINGS)
    with open(path, "wb") as file:
        np.savez(file, identity=np.array(json.dumps({"format": "of old"})), image=np.zeros((200, 1)))
    with pytest.raises(ValueError, match=r"with format 'of old', not 'stabkit krylov state 2'"):
        extreme_eigenpairs(DenseOperator(matrix), checkpoint=path, **SETTINGS)


def test_a_checkpoint_needs_a_directory_a_path_and_lanczos(tmp_path):
    operator = DenseOperator(random_symmetric(100, 0))
    with pytest.raises(ValueError, match=r"must lie in an existing directory; got '.*missing/state'"):
        extreme_eigenpairs(operator, checkpoint=tmp_path / "missing" / "state")
    with pytest.raises(TypeError, match=r"`checkpoint` of `extreme_eigenpairs` must be a path or None; got 3"):
        extreme_eigenpairs(operator, checkpoint=3)
    with pytest.raises(ValueError, match=r"must be None with method 'lobpcg'.*; got 'state'"):
        extreme_eigenpairs(operator, checkpoint="state", method="lobpcg")


# ---- spectral density


@given(
    size=st.integers(1, 25),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from((1e-12, 1.0, 1e12)),
    probes=st.integers(2, 5),
    at_once=st.sampled_from((None, 1, 2)),
    seed=st.integers(0, 99),
)
def test_a_full_quadrature_has_each_probes_exact_moments(size, kind, scale, probes, at_once, seed):
    matrix = scale * random_symmetric(size, seed, kind)
    density = spectral_density(DenseOperator(matrix), n_probes=probes, steps=size + 3, at_once=at_once, seed=seed)
    z = rademacher(size, probes, seeded(seed)).T / math.sqrt(size)
    values, vectors = torch.linalg.eigh(matrix)
    top = float(values.abs().max())
    assert density.complete
    assert density.nodes.shape == (probes, size)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(probes, dtype=torch.float64), rtol=0, atol=1e-12)
    for order in range(6):
        each = ((vectors.T @ z) ** 2 * values.unsqueeze(1) ** order).sum(0)
        estimate = density.moment(order)
        assert estimate.value == pytest.approx(float(each.mean()), rel=1e-9, abs=1e-10 * top**order)
        error = float(each.std()) / math.sqrt(probes)
        assert estimate.standard_error == pytest.approx(error, rel=1e-6, abs=1e-9 * top**order)


def test_few_steps_are_exact_up_to_degree_twice_the_steps_less_one():
    matrix = random_symmetric(60, 1)
    density = spectral_density(DenseOperator(matrix), n_probes=3, steps=4, seed=5)
    z = rademacher(60, 3, seeded(5)).T / math.sqrt(60)
    power = z.clone()
    for order in range(9):
        truth = float((z * power).sum(0).mean())
        exact = density.moment(order).value == pytest.approx(truth, rel=1e-10, abs=1e-12)
        assert exact == (order <= 7)
        power = matrix @ power


def test_a_diagonal_matrix_has_no_error_at_all():
    values = torch.tensor([-1.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    density = spectral_density(DenseOperator(torch.diag(values)), n_probes=3, steps=10)
    assert density.moment(3).value == pytest.approx(float((values**3).mean()), rel=1e-12)
    assert density.moment(3).standard_error == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(density.nodes, values.expand(3, 4), rtol=0, atol=1e-12)


@given(kind=st.sampled_from(KINDS), scale=st.sampled_from((1e-12, 1.0, 1e12)), seed=st.integers(0, 99))
def test_the_density_integrates_to_one(kind, scale, seed):
    density = spectral_density(DenseOperator(scale * random_symmetric(30, seed, kind)), n_probes=3, steps=8, seed=seed)
    curve = density.curve()
    assert torch.trapezoid(curve.density, curve.grid).item() == pytest.approx(1, abs=2e-3)
    assert bool((curve.density >= 0).all())
    assert bool((curve.standard_error >= 0).all())
    twice = density.curve(curve.grid, width=2 * curve.width)
    assert float(twice.density.max()) < float(curve.density.max())


def test_the_density_is_the_dense_one_within_its_error_bars():
    matrix = random_symmetric(300, 0, "semi-definite")
    truth = torch.linalg.eigvalsh(matrix)
    density = spectral_density(DenseOperator(matrix), n_probes=20, steps=60)
    curve = density.curve(torch.linspace(0.1, 0.9, 9, dtype=torch.float64), width=0.1)
    gauss = torch.exp(-0.5 * ((curve.grid.unsqueeze(1) - truth) / 0.1) ** 2).mean(1) / (0.1 * math.sqrt(2 * math.pi))
    assert bool(((curve.density - gauss).abs() <= 4 * curve.standard_error).all())
    assert float(curve.standard_error.max()) < 0.05 * float(gauss.max())


def covered(estimates, truth, level):
    return np.mean([low <= truth <= high for low, high in (e.interval(level) for e in estimates)])


def test_error_bars_of_the_density_cover_the_truth_as_often_as_they_say():
    matrix = random_symmetric(80, 2)
    operator, truth = DenseOperator(matrix), float(torch.trace(matrix @ matrix)) / 80
    estimates = [spectral_density(operator, n_probes=6, steps=3, seed=s).moment(2) for s in range(300)]
    assert abs(covered(estimates, truth, 0.9) - 0.9) < 4 * math.sqrt(0.09 / 300)
    mean = np.mean([e.value for e in estimates])
    assert abs(mean - truth) < 4 * np.std([e.value for e in estimates]) / math.sqrt(300)


def test_probes_taken_a_few_at_a_time_are_the_same_probes():
    operator = DenseOperator(random_symmetric(50, 3))
    together = spectral_density(operator, n_probes=5, steps=12, seed=1)
    parts = spectral_density(operator, n_probes=5, steps=12, seed=1, at_once=2)
    torch.testing.assert_close(together.nodes, parts.nodes, rtol=0, atol=1e-10)
    torch.testing.assert_close(together.weights, parts.weights, rtol=0, atol=1e-10)
    assert together.products == parts.products == 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_float32_quadrature_is_the_float64_one_to_rounding(kind, scale):
    matrix = (scale * random_symmetric(40, 6, kind)).float()
    single = spectral_density(DenseOperator(matrix), n_probes=3, steps=10)
    double = spectral_density(DenseOperator(matrix.double()), n_probes=3, steps=10)
    for order in (1, 2, 3):
        size = (scale * 3) ** order
        assert single.moment(order).value == pytest.approx(double.moment(order).value, abs=1e-5 * size)


def test_the_densitys_budget_cuts_the_steps():
    operator = DenseOperator(random_symmetric(50, 3))
    density = spectral_density(operator, n_probes=4, steps=30, max_products=50)
    assert density.nodes.shape == (4, 12)
    assert operator.products == density.products == 48
    assert not density.complete


def test_the_density_draws_itself():
    mpl.use("Agg")
    density = spectral_density(DenseOperator(random_symmetric(50, 3)), n_probes=3, steps=12)
    figure, ax = density.plot(width=0.2)
    again = density.plot(ax, width=0.2)
    assert again == (figure, ax)
    line = ax.get_lines()[0]
    curve = density.curve(width=0.2)
    np.testing.assert_allclose(line.get_xdata(), curve.grid.numpy())
    inside = curve.density.numpy() > 1e-2
    np.testing.assert_allclose(line.get_ydata()[inside], curve.density.numpy()[inside])
    assert ax.get_yscale() == "log"
    assert "3 probes" in ax.get_legend().get_texts()[0].get_text()
    mpl.pyplot.close(figure)


# ---- trace and Frobenius norm


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("estimator", [trace, squared_frobenius])
def test_traces_are_unbiased_and_their_error_bars_cover(method, estimator):
    matrix = random_symmetric(60, 4)
    truth = float(torch.trace(matrix if estimator is trace else matrix @ matrix))
    operator = DenseOperator(matrix)
    estimates = [estimator(operator, method=method, max_products=24, seed=s) for s in range(300)]
    values = np.array([e.value for e in estimates])
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(300)
    assert abs(covered(estimates, truth, 0.9) - 0.9) < 4 * math.sqrt(0.09 / 300)
    errors = np.array([e.standard_error for e in estimates])
    assert math.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.15)


def test_hutchinsons_variance_is_the_closed_form():
    matrix = random_symmetric(40, 5)
    estimates = [trace(DenseOperator(matrix), method="hutchinson", max_products=10, seed=s).value for s in range(400)]
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum()) / 10
    assert np.var(estimates) == pytest.approx(variance, rel=5 * math.sqrt(2 / 400))


def test_hutch_pp_beats_hutchinson_by_an_order_on_a_decaying_spectrum():
    """Error O(1/m) against O(1/√m): ten times the products take Hutch++ far below."""
    values = 1 / torch.arange(1, 401, dtype=torch.float64) ** 1.5
    operator = DenseOperator(symmetric(values, seeded(0)))
    truth = float(values.sum())

    def error(method, products):
        seeds = range(30)
        found = [trace(operator, method=method, max_products=products, seed=s).value for s in seeds]
        return math.sqrt(np.mean((np.array(found) - truth) ** 2))

    assert error("hutch++", 120) < error("hutchinson", 120) / 5
    assert error("hutchinson", 12) / error("hutchinson", 120) == pytest.approx(math.sqrt(10), rel=0.4)
    assert error("hutch++", 12) / error("hutch++", 120) > 10


@given(rank=st.integers(0, 8), scale=st.sampled_from((1e-12, 1.0, 1e12)), seed=st.integers(0, 99))
def test_hutch_pp_is_exact_on_low_rank(rank, scale, seed):
    generator = seeded(seed)
    factor = torch.randn(50, rank, generator=generator, dtype=torch.float64)
    signs = torch.sign(torch.randn(rank, generator=generator, dtype=torch.float64))
    matrix = scale * (factor * signs) @ factor.T
    for estimator, truth, size in (
        (trace, torch.trace(matrix), matrix.norm()),
        (squared_frobenius, matrix.square().sum(), matrix.square().sum()),
    ):
        estimate = estimator(DenseOperator(matrix), max_products=24, seed=seed)
        assert estimate.value == pytest.approx(float(truth), rel=1e-10, abs=1e-10 * float(size))
        assert estimate.standard_error <= 1e-10 * float(size)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_as_many_products_as_rows_give_the_exact_trace(method):
    matrix = random_symmetric(12, 6)
    operator = DenseOperator(matrix)
    estimate = trace(operator, method=method, max_products=12)
    assert estimate.value == pytest.approx(float(torch.trace(matrix)), rel=1e-12)
    assert estimate.standard_error == 0
    assert estimate.interval() == (estimate.value, estimate.value)
    assert operator.products == estimate.products == 12
    assert frobenius_norm(operator, max_products=12).value == pytest.approx(float(matrix.norm()), rel=1e-12)


def test_the_frobenius_norm_is_the_root_with_its_error():
    matrix = random_symmetric(100, 7)
    squared = squared_frobenius(DenseOperator(matrix), seed=1)
    norm = frobenius_norm(DenseOperator(matrix), seed=1)
    assert norm.value**2 == pytest.approx(squared.value)
    assert norm.standard_error == pytest.approx(squared.standard_error / (2 * norm.value))
    low, high = norm.interval(0.999)
    assert low <= float(matrix.norm()) <= high
    zero = frobenius_norm(DenseOperator(torch.zeros(100, 100, dtype=torch.float64)))
    assert (zero.value, zero.standard_error) == (0, 0)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("products", [6, 7, 20, 59])
def test_traces_spend_their_products_whatever_the_blocks(method, products):
    operator = DenseOperator(random_symmetric(60, 8))
    results = [trace(operator, method=method, max_products=products, at_once=k) for k in (1, 7, 100)]
    assert operator.products == 3 * products
    for other in results[1:]:
        assert other.value == pytest.approx(results[0].value, rel=1e-10)
        assert other.standard_error == pytest.approx(results[0].standard_error, rel=1e-8)


# ---- the pencil


def pencil(seed, size, ranks, scale=1.0):
    generator = seeded(seed)
    matrices = []
    for rank in ranks:
        factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        matrices.append(
            scale * factor @ torch.diag(torch.rand(rank, generator=generator).double() ** 3) @ factor.T / size
        )
    return matrices


@given(
    size=st.integers(1, 70),
    forget_rank=st.integers(0, 20),
    retain_rank=st.integers(0, 70),
    damping=st.sampled_from((0.03, 0.3, 3.0)),
    scale=st.sampled_from((1e-9, 1.0, 1e9)),
    pairs=st.integers(1, 3),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 99),
)
def test_the_pencils_top_is_scipys(size, forget_rank, retain_rank, damping, scale, pairs, dtype, seed):
    forget, retain = (m.to(dtype) for m in pencil(seed, size, (forget_rank, retain_rank), scale))
    operators = DenseOperator(forget), DenseOperator(retain)
    eps = damping * scale
    tolerance = 1e-3 if dtype == torch.float32 else 1e-5
    found = generalised_eigenpairs(
        *operators, damping=eps, pairs=pairs, tolerance=tolerance, basis=16, max_products=2000, seed=seed
    )
    damped = retain.double() + eps * torch.eye(size, dtype=torch.float64)
    truth = scipy.linalg.eigh(forget.double().numpy(), damped.numpy(), eigvals_only=True)[-pairs:]
    assert found.converged
    top = max(float(np.abs(truth).max()), 1e-3)
    np.testing.assert_allclose(found.values.numpy(), truth, atol=(1e-3 if dtype == torch.float32 else 1e-6) * top)
    vectors = found.vectors.double()
    residuals = (forget.double() @ vectors - damped @ vectors * found.values).norm(dim=0)
    rounding = 1e3 * torch.finfo(dtype).eps * float(forget.norm() + top * damped.norm())
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=rounding)
    torch.testing.assert_close(vectors.norm(dim=0), torch.ones(len(truth), dtype=torch.float64), rtol=0, atol=1e-5)
    assert operators[0].products == operators[1].products == found.products <= 2000


@given(seed=st.integers(0, 99))
def test_the_pencils_error_bound_holds_at_any_budget(seed):
    forget, retain = pencil(seed, 80, (10, 30))
    damped = retain + 0.01 * torch.eye(80, dtype=torch.float64)
    truth = torch.as_tensor(scipy.linalg.eigh(forget.numpy(), damped.numpy(), eigvals_only=True))
    for budget in (6, 12, 30):
        found = generalised_eigenpairs(
            DenseOperator(forget), DenseOperator(retain), damping=0.01, pairs=2, max_products=budget, seed=seed
        )
        distance = (found.values.unsqueeze(1) - truth).abs().amin(1)
        assert bool((distance <= found.errors * (1 + 1e-9) + 1e-9).all())
        assert found.largest <= float(truth[-1]) * (1 + 1e-9)
        assert found.products <= budget


@pytest.mark.parametrize("case", CASES[:2], ids=lambda c: c.name)
def test_the_matrix_free_critical_mix_is_the_dense_one(case):
    problem = case.problem()
    found = generalised_eigenpairs(
        GGNOperator(problem, problem.forget), GGNOperator(problem, problem.retain), damping=0.05, basis=20
    )
    dense = critical_mix(dense_ggn(problem, "retain"), dense_ggn(problem, "forget"), damping=0.05)
    assert found.converged
    assert found.critical_mix == pytest.approx(dense.mix, rel=1e-4)
    assert found.damping == dense.damping
    assert float((found.vectors[:, -1] @ dense.direction).abs()) == pytest.approx(1, abs=1e-2)


def test_a_forget_set_without_curvature_leaves_every_mix():
    zero, retain = torch.zeros(60, 60, dtype=torch.float64), pencil(0, 60, (10,))[0]
    found = generalised_eigenpairs(DenseOperator(zero), DenseOperator(retain), damping=0.1)
    assert found.converged
    assert found.critical_mix == 1.0
    negative = generalised_eigenpairs(DenseOperator(-torch.eye(60).double()), DenseOperator(retain), damping=0.1)
    assert negative.largest < 0
    assert negative.critical_mix == 1.0


def test_an_indefinite_pencil_is_refused_by_name():
    forget, retain = pencil(1, 90, (10, 20))
    retain = retain - 0.2 * torch.eye(90, dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=r"`damping` of `generalised_eigenpairs`.*got 0\.1, with which a unit direction has curvature -0\.\d+.*"
        r"Raise it well above 0\.[12]",
    ):
        generalised_eigenpairs(DenseOperator(forget), DenseOperator(retain), damping=0.1)


def test_a_pencil_says_how_it_ended():
    forget, retain = pencil(2, 400, (40, 100))
    operators = DenseOperator(forget), DenseOperator(retain)
    short = generalised_eigenpairs(*operators, damping=1e-3, max_products=10)
    assert short.outcome is SolverOutcome.BUDGET
    assert not short.converged
    undamped = generalised_eigenpairs(*operators, damping=0, max_products=30)
    assert bool(undamped.errors.isinf().all())
    noisy = generalised_eigenpairs(
        DenseOperator(forget, noise=1e-3), operators[1], damping=0.1, tolerance=1e-6, basis=8, max_products=5000
    )
    assert noisy.outcome in {SolverOutcome.STAGNATED, SolverOutcome.INACCURATE}


# ---- peers, and what holds for all of them


def small_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MLP(4, 3, hidden=(8,), activation=nn.Tanh).double()
    x, y = (
        torch.randn(40, 4, generator=seeded(1), dtype=torch.float64),
        torch.randint(0, 3, (40,), generator=seeded(2)),
    )
    problem = UnlearningProblem(model, (x[:10], y[:10]), (x[10:], y[10:]))
    peer = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x[10:], y[10:])])
    return problem, GGNOperator(problem, problem.retain), peer


def test_traces_agree_with_curvlinops():
    _, operator, peer = small_network()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for ours, theirs in (
            (trace(operator, method="hutchinson", max_products=60), curvlinops.hutchinson_trace),
            (trace(operator, method="hutch++", max_products=60), curvlinops.hutchpp_trace),
            (squared_frobenius(operator, method="hutchinson", max_products=60), curvlinops.hutchinson_squared_fro),
        ):
            draws = torch.stack([theirs(peer, 60) for _ in range(12)])
            spread = math.hypot(ours.standard_error, float(draws.std()) / math.sqrt(12))
            assert abs(ours.value - float(draws.mean())) < 5 * spread
            assert ours.standard_error < 0.5 * ours.value


def test_the_density_agrees_with_curvlinops():
    """Papyan's algorithm works on [-1, 1] with width 2/(ncv·√(8·ln κ)); there it is compared, as a distribution function."""
    _, operator, peer = small_network()
    top = extreme_eigenpairs(operator, tolerance=1e-8).largest
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        grid, theirs = curvlinops.lanczos_approximate_spectrum(
            peer, 30, num_points=400, num_repeats=40, boundaries=(0.0, top)
        )
    grid, theirs = torch.as_tensor(grid).double(), torch.as_tensor(theirs).double()
    width = float(grid[-1] - grid[0]) / 2 * 2 / (29 * math.sqrt(8 * math.log(3.0)))
    ours = spectral_density(operator, n_probes=40, steps=30).curve(grid, width=width)
    cumulative = [torch.cumulative_trapezoid(d, grid) for d in (theirs, ours.density)]
    cumulative = [c / c[-1] for c in cumulative]
    assert float((cumulative[0] - cumulative[1]).abs().max()) < 0.06


def test_nothing_touches_the_global_generators_or_the_model():
    problem, operator, _ = small_network()
    forget = GGNOperator(problem, problem.forget)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    weights = problem.vector().clone()
    extreme_eigenpairs(operator, which="smallest")
    extreme_eigenpairs(operator, basis=6)
    extreme_eigenpairs(operator, method="lobpcg", basis=6)
    spectral_density(operator, n_probes=2, steps=5)
    trace(operator, max_products=9)
    frobenius_norm(operator, method="hutchinson", max_products=9)
    generalised_eigenpairs(forget, operator, damping=0.1, basis=8)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    assert torch.equal(weights, problem.vector())


def test_random_estimates_repeat_and_depend_on_the_seed():
    forget, retain = pencil(3, 60, (10, 20))
    operator = DenseOperator(retain)
    assert trace(operator, max_products=12) == trace(operator, max_products=12)
    assert trace(operator, max_products=12) != trace(operator, max_products=12, seed=1)
    densities = [spectral_density(operator, n_probes=2, steps=6, seed=s) for s in (0, 0, 1)]
    assert torch.equal(densities[0].nodes, densities[1].nodes)
    assert not torch.equal(densities[0].nodes, densities[2].nodes)
    pairs = [generalised_eigenpairs(DenseOperator(forget), operator, damping=0.1, seed=s) for s in (0, 0, 1)]
    assert torch.equal(pairs[0].vectors, pairs[1].vectors)
    assert not torch.equal(pairs[0].vectors, pairs[2].vectors)


def test_progress_goes_to_stderr_alone(capsys):
    operator = DenseOperator(random_symmetric(60, 0))
    extreme_eigenpairs(operator, progress=True)
    extreme_eigenpairs(operator, method="lobpcg", progress=True)
    spectral_density(operator, n_probes=2, steps=4, progress=True)
    trace(operator, max_products=9, progress=True)
    generalised_eigenpairs(operator, DenseOperator(torch.eye(60).double()), damping=0.1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    for label in ("eigenpairs", "spectral density", "trace", "generalised eigenpairs"):
        assert label in err


def eye(size=3):
    return DenseOperator(torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("function", [extreme_eigenpairs, spectral_density, trace, squared_frobenius])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite_are_refused(function, bad):
    matrix = torch.eye(80, dtype=torch.float64)
    matrix[3, 3] = bad
    name = function.__name__
    with pytest.raises(
        ValueError, match=rf"`operator` of `{name}` must have finite products; got [1-9]\d* of \d+ entries"
    ):
        function(DenseOperator(matrix))


@pytest.mark.parametrize("side", [0, 1])
def test_a_pencils_products_must_be_finite_too(side):
    operators = [DenseOperator(torch.eye(80, dtype=torch.float64)) for _ in range(2)]
    operators[side].matrix[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"`operator` of `generalised_eigenpairs`.*got \d+ of \d+ entries NaN"):
        generalised_eigenpairs(*operators, damping=0.1)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"ends": 0}, ValueError, r"`ends` of `extreme_eigenpairs`.*got 0"),
        ({"which": "lowest"}, ValueError, r"`which` of `extreme_eigenpairs`.*got 'lowest'"),
        ({"method": "arnoldi"}, ValueError, r"`method` of `extreme_eigenpairs`.*got 'arnoldi'"),
        ({"block": 0}, ValueError, r"`block` of `extreme_eigenpairs`.*got 0"),
        ({"basis": 5}, ValueError, r"`basis` of `extreme_eigenpairs`.*>= 6; got 5"),
        ({"basis": 4, "which": "largest"}, ValueError, r"`basis` of `extreme_eigenpairs`.*>= 5; got 4"),
        ({"max_products": 0}, ValueError, r"`max_products` of `extreme_eigenpairs`.*got 0"),
        ({"checkpoint_every": 0}, ValueError, r"`checkpoint_every` of `extreme_eigenpairs`.*got 0"),
        ({"tolerance": -1.0}, ValueError, r"`tolerance` of `extreme_eigenpairs`.*got -1"),
        ({"ends": 1.5}, TypeError, r"`ends` of `extreme_eigenpairs`.*got 1\.5"),
    ],
)
def test_settings_of_the_eigensolver_are_checked(setting, error, message):
    with pytest.raises(error, match=message):
        extreme_eigenpairs(eye(), **setting)


@pytest.mark.parametrize(
    ("function", "setting", "message"),
    [
        (spectral_density, {"n_probes": 1}, r"`n_probes` of `spectral_density`.*>= 2; got 1.*no error bar"),
        (spectral_density, {"steps": 0}, r"`steps` of `spectral_density`.*got 0"),
        (spectral_density, {"at_once": 0}, r"`at_once` of `spectral_density`.*got 0"),
        (spectral_density, {"max_products": 7}, r"`max_products` of `spectral_density`.*>= 8; got 7"),
        (trace, {"method": "xtrace"}, r"`method` of `trace`.*got 'xtrace'"),
        (trace, {"max_products": 5}, r"`max_products` of `trace`.*>= 6; got 5"),
        (trace, {"method": "hutchinson", "max_products": 1}, r"`max_products` of `trace`.*>= 2; got 1"),
        (squared_frobenius, {"at_once": 0}, r"`at_once` of `squared_frobenius`.*got 0"),
        (frobenius_norm, {"max_products": 5}, r"`max_products` of `squared_frobenius`.*>= 6; got 5"),
    ],
)
def test_settings_of_the_estimators_are_checked(function, setting, message):
    with pytest.raises(ValueError, match=message):
        function(eye(), **setting)


def test_settings_of_results_are_checked():
    density = spectral_density(eye(), n_probes=2)
    with pytest.raises(ValueError, match=r"`order` of `SpectralDensity.moment`.*got -1"):
        density.moment(-1)
    with pytest.raises(ValueError, match=r"`width` of `SpectralDensity.curve`.*got 0"):
        density.curve(width=0.0)
    with pytest.raises(ValueError, match=r"`level` of `Estimate.interval`.*got 1\.0"):
        density.moment(1).interval(1.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"damping": -0.1}, r"`damping` of `generalised_eigenpairs`.*got -0\.1"),
        ({"pairs": 0}, r"`pairs` of `generalised_eigenpairs`.*got 0"),
        ({"tolerance": math.nan}, r"`tolerance` of `generalised_eigenpairs`.*got nan"),
        ({"basis": 5}, r"`basis` of `generalised_eigenpairs`.*>= 6; got 5"),
        ({"max_products": 2}, r"`max_products` of `generalised_eigenpairs`.*>= 3; got 2"),
    ],
)
def test_settings_of_the_pencil_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        generalised_eigenpairs(eye(), eye(), **{"damping": 0.1, **setting})


def test_the_operators_of_a_pencil_must_fit():
    with pytest.raises(ValueError, match=r"`forget` of `generalised_eigenpairs`.*got \(3, 3\).*beside \(4, 4\)"):
        generalised_eigenpairs(eye(3), eye(4), damping=0.1)
    with pytest.raises(ValueError, match=r"got \(3, 3\) torch\.float32 beside \(3, 3\) torch\.float64"):
        generalised_eigenpairs(DenseOperator(torch.eye(3)), eye(3), damping=0.1)


@given(
    d=st.integers(1, 200),
    c=st.integers(1, 12),
    largest=st.integers(1, 200),
    overwrite=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tall_matrices_are_factored_by_blocks(d, c, largest, overwrite, seed):
    x = torch.randn(d, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given = x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orthonormal_module, "BLOCK", largest)
        q, upper = tall_qr(given, overwrite=overwrite)
    if overwrite and d >= 2 * orthonormal_module.TALL * c and d * c > largest:
        assert q is given
    else:
        torch.testing.assert_close(given, x, rtol=0, atol=0)
    k = min(d, c)
    assert q.shape == (d, k)
    torch.testing.assert_close(q @ upper, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(q.T @ q, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, upper.triu(), rtol=0, atol=0)
    torch.testing.assert_close(upper.abs(), torch.linalg.qr(x).R.abs(), rtol=1e-6, atol=1e-9)
