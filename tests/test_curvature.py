"""Curvature products and the compressed linearisation against dense truth (theory §11: 7, 8, 9)."""

import curvlinops
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stabkit.curvature import (
    GGNOperator,
    HessianOperator,
    MixedOperator,
    PreconditionedOperator,
    curvature_operator,
    linearise,
)
from stabkit.curvature.jacobian import jvp_block, vjp_block
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.spectrum import extreme_eigenpairs
from tests.cases import CASES, compare_products, dense_ggn, dense_hessian, dense_jacobian, dense_output_hessian

# Operators are true at any parameters, trained or not.
pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
RTOL = 1e-9


cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@cases
@pytest.mark.parametrize("batch_size", [3, 512])
def test_hessian_products_equal_autograd(case, batch_size):
    problem = case.problem()
    operator = HessianOperator(problem, problem.retain, batch_size=batch_size)
    compare_products(operator, dense_hessian(problem, "retain"), rtol=RTOL)


@cases
def test_ggn_products_equal_dense_and_are_psd(case):
    problem = case.problem()
    dense = dense_ggn(problem, "forget")
    compare_products(GGNOperator(problem, problem.forget, batch_size=3), dense, rtol=RTOL)
    assert float(torch.linalg.eigvalsh(dense)[0]) >= -1e-12


@cases
def test_loss_derivatives_equal_autograd(case):
    problem = case.problem()
    outputs, targets, _ = problem.evaluate(problem.retain)
    truth = dense_output_hessian(problem.loss, outputs, targets)
    o = truth.shape[1]
    eye = torch.eye(o, dtype=truth.dtype).expand(outputs.shape[0], o, o)
    torch.testing.assert_close(problem.loss.hessian_apply(outputs, targets, eye), truth, rtol=RTOL, atol=1e-12)
    factor = problem.loss.factor_transpose(outputs, targets, eye)
    torch.testing.assert_close(factor.transpose(1, 2) @ factor, truth, rtol=1e-8, atol=1e-10)
    leaf = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss.per_sample(leaf, targets).sum(), leaf)
    torch.testing.assert_close(problem.loss.residual(outputs, targets), gradient, rtol=RTOL, atol=1e-12)


@cases
@settings(max_examples=8)
@given(mix=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_mixed_and_preconditioned_products(case, mix, seed):
    problem = case.problem()
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(problem.size, generator=generator, dtype=torch.float64)
    retain, forget = (GGNOperator(problem, s, batch_size=64, memory=1) for s in (problem.retain, problem.forget))
    dense = (1 - mix) * dense_ggn(problem, "retain") - mix * dense_ggn(problem, "forget")
    root = p.sqrt().unsqueeze(1)
    operator = PreconditionedOperator(MixedOperator(retain, forget, mix), Diagonal(p))
    compare_products(operator, root * dense * root.T, rtol=RTOL, seed=seed)
    # Property 8: P D, which is what a run applies, has the spectrum of the symmetric form.
    unsymmetric = torch.linalg.eigvals(p.unsqueeze(1) * dense)
    symmetric = torch.linalg.eigvalsh(root * dense * root.T)
    scale = float(symmetric.abs().max()) + 1e-12
    np.testing.assert_allclose(np.sort(unsymmetric.real.numpy()), symmetric.numpy(), atol=1e-6 * scale)


@cases
def test_blocks_of_jacobian_products(case):
    problem = case.problem()
    outputs, _, jacobian = dense_jacobian(problem, "forget")
    inputs, _ = problem.forget.batch(torch.arange(problem.forget.size))
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(problem.size, 4, generator=generator, dtype=torch.float64)
    u = torch.randn(*jacobian.shape[:2], 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(jvp_block(problem, inputs, v)[1], jacobian @ v, rtol=RTOL, atol=1e-10)
    torch.testing.assert_close(
        vjp_block(problem, inputs, u), torch.einsum("mod,mok->dk", jacobian, u), rtol=RTOL, atol=1e-10
    )
    assert jvp_block(problem, inputs, v)[0].shape == outputs.shape


@cases
@pytest.mark.parametrize("preconditioned", [False, True])
def test_full_rank_linearisation_is_exact(case, preconditioned):
    """Property 7: in as many directions as there are rows, compressed curvature is the dense one."""
    problem = case.problem()
    generator = torch.Generator().manual_seed(9)
    p = torch.rand(problem.size, generator=generator, dtype=torch.float64) + 0.1
    preconditioner = Diagonal(p) if preconditioned else Identity()
    network = linearise(problem, preconditioner, rank=10_000, retain_samples=None, forget_samples=None)
    root = p.sqrt() if preconditioned else torch.ones_like(p)
    assert network.captured == pytest.approx(1.0, abs=1e-8)
    for which in ("retain", "forget"):
        part = getattr(network, which)
        factors = part.factors(problem.loss)
        outputs, targets, jacobian = dense_jacobian(problem, which)
        counted = problem.loss.counted(outputs, targets)  # what the loss does not read has no rows
        rows = jacobian * root if counted is None else jacobian * root * counted.unsqueeze(-1)
        torch.testing.assert_close(part.features @ network.basis.T, rows, rtol=1e-6, atol=1e-7)
        restored = network.basis @ factors.mean() @ network.basis.T
        torch.testing.assert_close(restored, root[:, None] * dense_ggn(problem, which) * root, rtol=1e-6, atol=1e-7)
    c = torch.randn(network.rank, generator=generator, dtype=torch.float64)
    displacement = network.displacement(c)
    assert float(c @ network.metric @ c) == pytest.approx(float(displacement.square().sum()))
    assert float(network.anchor @ c) == pytest.approx(float(problem.vector() @ displacement))


def test_sampled_linearisation_stands_for_the_whole_set(random_deletion, digits_mlp):
    forget, retain = random_deletion
    problem = UnlearningProblem(digits_mlp, forget, retain)
    network = linearise(problem, Identity(), rank=60, retain_samples=256, forget_samples=100, seed=3)
    assert (network.retain.samples, network.retain.population) == (256, len(retain[1]))
    assert network.forget.factors(problem.loss).population == len(forget[1])
    assert 0.5 < network.captured <= 1.0
    top = float(torch.linalg.eigvalsh(network.retain.factors(problem.loss).mean())[-1])
    whole = extreme_eigenpairs(curvature_operator(problem, problem.retain, kind="ggn")).largest
    assert top == pytest.approx(whole, rel=0.25)


def test_against_curvlinops():
    torch.manual_seed(0)
    model = MLP(4, 3, hidden=(5,), activation=nn.Tanh).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    problem = UnlearningProblem(model, (x[:4], y[:4]), (x[4:], y[4:]))
    parameters = list(model.parameters())
    data = [(x[4:], y[4:])]
    loss = nn.CrossEntropyLoss()
    for ours, theirs in (
        (HessianOperator(problem, problem.retain), curvlinops.HessianLinearOperator),
        (GGNOperator(problem, problem.retain), curvlinops.GGNLinearOperator),
    ):
        peer = theirs(model, loss, parameters, data)
        eye = torch.eye(problem.size, dtype=torch.float64)
        torch.testing.assert_close(ours @ eye, peer @ eye, rtol=RTOL, atol=1e-12)


def test_an_operator_refuses_a_vector_of_another_length():
    problem = CASES[0].problem()
    operator = GGNOperator(problem, problem.retain)
    with pytest.raises(ValueError, match=r"got \(5,\)"):
        operator @ torch.zeros(5)


def test_a_mix_outside_its_domain_is_refused():
    problem = CASES[0].problem()
    operator = GGNOperator(problem, problem.retain)
    with pytest.raises(ValueError, match=r"`mix` of `MixedOperator`.*got 1\.5"):
        MixedOperator(operator, operator, 1.5)


def test_a_preconditioner_must_not_be_negative():
    with pytest.raises(ValueError, match=r"smallest entry of -1"):
        Diagonal(torch.tensor([1.0, -1.0]))
