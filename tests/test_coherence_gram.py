"""Coherence from the Gram of all curvature factors: as exact as dense Hessians, without a linearisation."""

import math
import re

import pytest
import torch

from stabkit.coherence import coherence, coherence_from_gram
from stabkit.curvature import SampleFactors, curvature_gram, linearise
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from tests.cases import CASES, dense_jacobian, dense_output_hessian

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
NAMES = ("retain", "forget", "cross", "cosine", "mixed")
TENSORS = ("gram_retain", "gram_forget", "gram_cross", "norms_retain", "norms_forget", "pair_norms")


def joint(problem, **options):
    return curvature_gram(problem, (problem.retain, problem.forget), **options)


def dense_curvatures(problem, which, p):
    """P^{1/2} J_iᵀ Λ_i J_i P^{1/2}, (m, d, d)."""
    outputs, targets, jacobian = dense_jacobian(problem, which)
    rows = jacobian.detach() * p.sqrt()
    return rows.transpose(1, 2) @ dense_output_hessian(problem.loss, outputs.detach(), targets) @ rows


def agree(found, expected, rtol=1e-7):
    size = float(expected.gram_retain.max() + expected.gram_forget.max())
    for name in TENSORS:
        scale = size if name.startswith("gram") else size**0.5
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=1e-7 * scale)
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert (found.pairs, found.pairs_sampled, found.mix) == (expected.pairs, expected.pairs_sampled, expected.mix)
    assert found.populations == expected.populations
    assert torch.equal(found.pair_samples, expected.pair_samples)


@cases
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_it_is_that_of_the_dense_curvatures(case, mix):
    problem = case.problem()
    p = torch.rand(problem.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = coherence_from_gram(joint(problem, preconditioner=Diagonal(p)), mix=mix)
    a, b = (dense_curvatures(problem, which, p) for which in ("retain", "forget"))
    products = [torch.einsum("ide,jde->ij", x, y) for x, y in ((a, a), (b, b), (a, b))]
    size = float(products[0].max() + products[1].max())
    for gram, dense in zip((found.gram_retain, found.gram_forget, found.gram_cross), products, strict=True):
        torch.testing.assert_close(gram, dense, rtol=1e-9, atol=1e-11 * size)
    pairs = torch.stack([(1 - mix) * a[r] - mix * b[f] for r, f in found.pair_samples.tolist()])
    norms = torch.linalg.matrix_norm(pairs, 2)
    torch.testing.assert_close(found.pair_norms, norms, rtol=1e-7, atol=1e-9 * size**0.5)
    traces = torch.einsum("ide,jde->ij", pairs, pairs).clamp(min=0).sqrt()
    assert found.mixed == pytest.approx(float(torch.linalg.matrix_norm(traces, 2) / norms.max()), rel=1e-6)
    h_r, h_f = a.mean(0), b.mean(0)
    assert found.cosine == pytest.approx(float((h_r * h_f).sum() / h_r.norm() / h_f.norm()))
    largest = float(torch.linalg.eigvalsh(a)[:, -1].max())
    assert found.retain == pytest.approx(float(torch.linalg.matrix_norm(products[0].sqrt(), 2)) / largest)


@cases
def test_at_full_rank_the_linearisation_gives_the_same(case):
    problem = case.problem()
    full = linearise(problem, Identity(), rank=problem.size, retain_samples=None, forget_samples=None)
    factors = [part.factors(problem.loss) for part in (full.retain, full.forget)]
    agree(coherence_from_gram(joint(problem), mix=0.3), coherence(*factors, mix=0.3), rtol=1e-6)


def test_chosen_samples_sampled_pairs_and_blocks_of_any_size(monkeypatch):
    problem = CASES[0].problem()
    chosen = torch.tensor([3, 0, 5, 9, 11]), torch.tensor([5, 2, 0])
    gram = joint(problem, indices=chosen)
    found = coherence_from_gram(gram, mix=0.4, max_pairs=11, seed=7)
    assert found.populations == (problem.retain.size, problem.forget.size)
    assert found.samples == (5, 3)
    assert (found.pairs, found.pairs_sampled) == (11, True)
    rows = torch.linalg.eigh(gram.matrix)
    factors = (rows.eigenvectors * rows.eigenvalues.clamp(min=0).sqrt()).reshape(8, gram.rows_per_sample, -1)
    parts = [
        SampleFactors(factors=part, gradients=part[:, 0], population=n)
        for part, n in zip(factors.split([5, 3]), found.populations, strict=True)
    ]
    agree(found, coherence(*parts, mix=0.4, max_pairs=11, seed=7))
    monkeypatch.setattr("stabkit.coherence.measure.BLOCK_ENTRIES", 1)
    torch.testing.assert_close(coherence_from_gram(gram, mix=0.4, max_pairs=11, seed=7).pair_norms, found.pair_norms)


@pytest.mark.filterwarnings("ignore::stabkit.OverlapWarning")  # the same samples on purpose
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_samples_cancel(dtype):
    torch.manual_seed(0)
    x, y = torch.randn(1, 4, dtype=torch.float64), torch.tensor([1])
    model = MLP(4, 3, hidden=(5,)).double()
    problem = UnlearningProblem(model, (x, y), (x.clone(), y.clone()))
    found = coherence_from_gram(joint(problem, dtype=dtype), mix=0.5)
    assert math.isnan(found.mixed)
    assert float(found.pair_norms[0]) <= 64 * torch.finfo(dtype).eps ** 0.5 * float(found.norms_retain[0])
    assert found.cosine == pytest.approx(1)
    assert coherence_from_gram(joint(problem, dtype=dtype), mix=0.4).mixed == pytest.approx(
        float(found.gram_retain[0, 0]) ** 0.5 / float(found.norms_retain[0]), rel=1e-3
    )


def test_what_the_gram_gives_answers_the_further_questions():
    problem = CASES[0].problem()
    found = coherence_from_gram(joint(problem), mix=0.3)
    labels = tuple(s.batch(torch.arange(s.size))[1] for s in (problem.retain, problem.forget))
    classes = found.by_class(labels)
    assert sum(classes.counts) == sum(found.samples)
    assert len(found.contributions().top("exposure", 3)) == 3
    # both sets were taken whole
    assert found.interval().retain.low == found.retain


def test_only_the_curvature_of_two_sets_will_do():
    problem = CASES[0].problem()
    gram = joint(problem)
    with pytest.raises(TypeError, match=r"`gram` of `coherence_from_gram` must be a Gram; got Tensor\."):
        coherence_from_gram(gram.matrix, mix=0.3)
    with pytest.raises(ValueError, match=re.escape("got rows 'ggn' of 1. Make it by curvature_gram(problem, (")):
        coherence_from_gram(curvature_gram(problem, problem.retain), mix=0.3)
    with pytest.raises(ValueError, match=r"of two sets; got rows 'outputs' of 2"):
        coherence_from_gram(joint(problem, rows="outputs"), mix=0.3)
    with pytest.raises(ValueError, match=r"`mix` of `coherence_from_gram` must be .* in \[0, 1\]; got 1\.5"):
        coherence_from_gram(gram, mix=1.5)
    with pytest.raises(ValueError, match=r"`max_pairs` of `coherence_from_gram` .* >= 1; got 0"):
        coherence_from_gram(gram, mix=0.5, max_pairs=0)
