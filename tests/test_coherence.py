"""Coherence of per-sample curvature: bounds, invariance, closed forms, dense truth (theory §11: 6)."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import stabkit.coherence.measure
from stabkit.coherence import coherence, spectral_norms
from stabkit.curvature.factors import SampleFactors
from tests.strategies import random_factors, rotated, two_sets

seeds = st.integers(0, 2**32 - 1)


def gram(a, b):
    return torch.einsum("ipq,jqp->ij", a.matrices(), b.matrices())


def close(found, truth, scale):
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11 * scale + 1e-300)


def root_norm(matrix):
    return float(torch.linalg.matrix_norm(matrix.clamp(min=0).sqrt(), 2))


def rank_one(vectors):
    rows = torch.as_tensor(vectors, dtype=torch.float64)
    return SampleFactors(factors=rows.unsqueeze(1), gradients=torch.zeros_like(rows), population=len(rows))


@given(two_sets(signed=False), st.floats(0, 1))
def test_coherences_lie_within_their_bounds(dynamics, mix):
    found = coherence(dynamics.retain, dynamics.forget, mix=mix)
    for value, part in ((found.retain, dynamics.retain), (found.forget, dynamics.forget)):
        if float(part.factors.abs().max()) == 0:
            assert math.isnan(value)
            continue
        h = part.matrices()
        largest = float(torch.linalg.eigvalsh(h)[:, -1].max())
        frobenius = float(torch.linalg.matrix_norm(h).max())
        assert 1 - 1e-9 <= value <= part.samples * frobenius / largest * (1 + 1e-9)
    assert math.isnan(found.cross) or -1e-9 <= found.cross <= 1 + 1e-9
    assert math.isnan(found.cosine) or -1e-9 <= found.cosine <= 1 + 1e-9


@given(two_sets(signed=True), st.floats(0, 1))
def test_signed_curvature_keeps_the_bounds(dynamics, mix):
    found = coherence(dynamics.retain, dynamics.forget, mix=mix)
    for value, part in ((found.retain, dynamics.retain), (found.forget, dynamics.forget)):
        h = part.matrices()
        largest = float(torch.linalg.matrix_norm(h, 2).max())
        frobenius = float(torch.linalg.matrix_norm(h).max())
        if largest > 1e-6 * frobenius:
            assert 1 - 1e-9 <= value <= part.samples * frobenius / largest * (1 + 1e-9)
    assert math.isnan(found.cross) or 0 <= found.cross <= 1 + 1e-9
    assert math.isnan(found.cosine) or abs(found.cosine) <= 1 + 1e-6
    assert math.isnan(found.mixed) or found.mixed >= 1 - 1e-6


@given(two_sets(), seeds)
def test_the_order_of_samples_changes_nothing(dynamics, seed):
    generator = torch.Generator().manual_seed(seed)

    def shuffled(part):
        order = torch.randperm(part.samples, generator=generator)
        signs = None if part.signs is None else part.signs[order]
        return replace(part, factors=part.factors[order], gradients=part.gradients[order], signs=signs), order

    (retain, by_retain), (forget, by_forget) = shuffled(dynamics.retain), shuffled(dynamics.forget)
    first = coherence(dynamics.retain, dynamics.forget, mix=0.3)
    second = coherence(retain, forget, mix=0.3)
    for name in ("retain", "forget", "cross", "cosine", "mixed"):
        assert getattr(second, name) == pytest.approx(getattr(first, name), rel=1e-6, nan_ok=True, abs=1e-9), name
    close(second.gram_cross, first.gram_cross[by_retain][:, by_forget], float(first.gram.abs().max()))
    close(second.norms_retain, first.norms_retain[by_retain], float(first.norms_retain.max()))


@given(two_sets(), st.floats(0, 1))
def test_every_number_equals_the_dense_definition(dynamics, mix):
    retain, forget = dynamics.retain, dynamics.forget
    a, b = retain.matrices(), forget.matrices()
    assume(float(a.abs().max()) > 1e-6)
    assume(float(b.abs().max()) > 1e-6)
    found = coherence(retain, forget, mix=mix)
    rr, ff, rf = gram(retain, retain), gram(forget, forget), gram(retain, forget)
    size = float(rr.abs().max() + ff.abs().max())
    close(found.gram_retain, rr, size)
    close(found.gram_forget, ff, size)
    close(found.gram_cross, rf, size)
    norms = [torch.linalg.matrix_norm(h, 2) for h in (a, b)]
    close(spectral_norms(retain), norms[0], size**0.5)
    close(spectral_norms(forget), norms[1], size**0.5)
    # A square root amplifies rounding where a product is all but zero.
    assert found.retain == pytest.approx(root_norm(rr) / float(norms[0].max()), rel=1e-6)
    assert found.forget == pytest.approx(root_norm(ff) / float(norms[1].max()), rel=1e-6)
    spectral = [float(torch.linalg.matrix_norm(g, 2)) for g in (rr, ff, rf)]
    assert found.cross == pytest.approx(spectral[2] / math.sqrt(spectral[0] * spectral[1]), rel=1e-9, abs=1e-12)
    h_r, h_f = a.mean(0), b.mean(0)
    if float(h_r.norm()) > 1e-3 * size**0.5 and float(h_f.norm()) > 1e-3 * size**0.5:
        cosine = float((h_r * h_f).sum() / (h_r.norm() * h_f.norm()))
        assert found.cosine == pytest.approx(cosine, abs=1e-6)
    # σ_mix with A_rf itself
    pairs = ((1 - mix) * a[:, None] - mix * b[None, :]).flatten(0, 1)
    largest = float(torch.linalg.matrix_norm(pairs, 2).max())
    traces = torch.einsum("ipq,jqp->ij", pairs, pairs)
    assert found.pairs == len(pairs)
    assert not found.pairs_sampled
    close(found.pair_norms, torch.linalg.matrix_norm(pairs, 2), size**0.5)
    both = torch.cat([a, b])
    close(found.gram, torch.einsum("ipq,jqp->ij", both, both), size)
    assert found.samples == (len(a), len(b))
    if largest > 1e-3 * size**0.5:
        assert found.mixed == pytest.approx(root_norm(traces) / largest, rel=1e-4)


@pytest.mark.parametrize("left", [1e-3, 1e-5])
def test_what_is_left_of_a_cancellation_is_measured(left):
    # A_rf = ½ left · e_i e_iᵀ for the pairs of a sample and its double; the others are not near.
    axes = torch.eye(2, dtype=torch.float64)
    found = coherence(rank_one(axes[:1] * (1 + left) ** 0.5), rank_one(axes[:1]), mix=0.5)
    assert found.pair_norms.tolist() == pytest.approx([left / 2], rel=1e-8)
    assert found.mixed == pytest.approx(1, rel=1e-4)


def test_what_rounding_leaves_of_a_cancellation_is_nothing():
    part = random_factors(0, samples=1, rows=3, rank=4)
    near = replace(part, factors=part.factors * (1 + 1e-9))
    assert math.isnan(coherence(near, part, mix=0.5).mixed)
    # not so where nothing is taken away, however small
    assert coherence(part, random_factors(0, samples=1, rows=3, rank=4, scale=0.0), mix=1 - 1e-9).mixed >= 1
    assert coherence(random_factors(0, samples=1, rows=3, rank=4, scale=0.0), part, mix=1e-9).mixed >= 1


@given(two_sets(), seeds)
def test_another_orthonormal_basis_changes_nothing(dynamics, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(dynamics.rank, dynamics.rank, generator=generator, dtype=torch.float64)).Q
    first = coherence(dynamics.retain, dynamics.forget, mix=0.3)
    second = coherence(rotated(dynamics.retain, q), rotated(dynamics.forget, q), mix=0.3)
    for name in ("retain", "forget", "cross", "mixed"):
        assert getattr(second, name) == pytest.approx(getattr(first, name), rel=1e-4, nan_ok=True, abs=1e-6), name
    size = float(first.gram_retain.abs().max() + first.gram_forget.abs().max())
    close(second.gram_retain, first.gram_retain, size)
    close(second.gram_cross, first.gram_cross, size)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_closed_forms(n):
    apart, together = rank_one(3.0 * torch.eye(n)), rank_one(torch.ones(n, 1) * torch.arange(1.0, n + 1))
    found = coherence(apart, together, mix=0.0)
    assert found.retain == pytest.approx(1)
    assert found.forget == pytest.approx(n)
    assert found.mixed == pytest.approx(n)  # at mix 0 every retain sample appears once for each forget sample
    lines = str(found).splitlines()
    assert lines[0] == f"Coherence of {n} retain and {n} forget samples"
    assert lines[3].split() == ["retain", "σ", "1", "1:", "orthogonal", "curvatures"]
    assert lines[-1].endswith(f"at mix 0, of all {n * n} pairs")
    same = coherence(together, together, mix=0.5)
    assert same.cross == pytest.approx(1)
    assert same.cosine == pytest.approx(1)
    assert math.isnan(same.mixed)  # A_rf = 0 for every pair


def test_sets_on_separate_axes_do_not_cohere():
    found = coherence(rank_one([[1.0, 0, 0], [2, 0, 0]]), rank_one([[0, 1.0, 0], [0, 0, 3]]), mix=0.5)
    assert found.cross == 0
    assert found.cosine == 0


def test_cross_is_one_for_two_bases_of_one_space():
    # Σ_ij |v_i · w_j| over unbiased bases is larger than either set's own norm: why `cross` takes squared products.
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    found = coherence(rank_one(torch.eye(4)), rank_one(hadamard), mix=0.5)
    assert root_norm(found.gram_cross) == pytest.approx(2)
    assert found.cross == pytest.approx(1)
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize("signed", [False, True])
def test_blocks_of_any_size_give_the_same(monkeypatch, signed):
    retain = random_factors(0, samples=7, rows=2, rank=4, signed=signed)
    forget = random_factors(1, samples=5, rows=3, rank=4, signed=signed)
    whole = coherence(retain, forget, mix=0.3)
    for entries in (1, 50, 100):
        monkeypatch.setattr(stabkit.coherence.measure, "BLOCK_ENTRIES", entries)
        parts = coherence(retain, forget, mix=0.3)
        for name in ("gram_retain", "gram_forget", "gram_cross", "pair_norms"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-13, atol=1e-13)


def test_no_curvature_is_undefined_and_no_crash():
    zero = random_factors(0, samples=3, rows=2, rank=4, scale=0.0)
    some = random_factors(1, samples=2, rows=2, rank=4)
    for retain, forget in ((zero, zero), (zero, some), (some, zero)):
        found = coherence(retain, forget, mix=0.5)
        assert math.isnan(found.cross)
        assert math.isnan(found.cosine)
        assert math.isnan(found.retain) == (retain is zero)
        assert math.isnan(found.forget) == (forget is zero)
        assert math.isnan(found.mixed) == (retain is forget)


def test_pairs_are_sampled_by_seed_beyond_the_limit():
    retain = random_factors(0, samples=6, rows=1, rank=3)
    forget = random_factors(1, samples=5, rows=1, rank=3)
    state = torch.random.get_rng_state()
    everything = coherence(retain, forget, mix=0.3, max_pairs=30)
    some = coherence(retain, forget, mix=0.3, max_pairs=29, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (everything.pairs, everything.pairs_sampled) == (30, False)
    assert (some.pairs, some.pairs_sampled) == (29, True)
    assert some.mixed == coherence(retain, forget, mix=0.3, max_pairs=29, seed=1).mixed
    few = [coherence(retain, forget, mix=0.3, max_pairs=4, seed=seed).mixed for seed in range(5)]
    assert len(set(few)) > 1
    assert max(few) <= 4 * math.sqrt(2) + 1e-9  # A_rf has rank 2


@pytest.mark.parametrize("copies", [1, 3])
def test_sigma_for_the_rule_is_that_of_the_whole_population(copies):
    retain = random_factors(0, samples=4, rows=2, rank=3, population=4 * copies)
    forget = random_factors(1, samples=5, rows=2, rank=3, population=5 * copies)

    def repeated(part):
        return replace(part, factors=part.factors.repeat(copies, 1, 1), gradients=part.gradients.repeat(copies, 1))

    whole = coherence(repeated(retain), repeated(forget), mix=0.3)
    assert coherence(retain, forget, mix=0.0).for_rule() == pytest.approx(whole.retain)
    assert coherence(retain, forget, mix=1.0).for_rule() == pytest.approx(whole.forget)
    mixed = coherence(retain, forget, mix=0.3)
    assert mixed.for_rule() == pytest.approx(mixed.mixed * 5 * copies / 20)


def test_arguments_are_checked():
    part = random_factors(0, samples=4, rows=1, rank=2)
    with pytest.raises(ValueError, match=r"`mix` of `coherence` must be .* in \[0, 1\]; got 2"):
        coherence(part, part, mix=2)
    with pytest.raises(ValueError, match=r"`max_pairs` of `coherence` must be a whole number >= 1; got 0"):
        coherence(part, part, mix=0.5, max_pairs=0)
    with pytest.raises(ValueError, match=r"same coordinates; got 2 and 3 of them"):
        coherence(part, random_factors(0, samples=4, rows=1, rank=3), mix=0.5)
