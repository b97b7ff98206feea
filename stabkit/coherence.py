"""Coherence of per-sample curvature, within and between the retain and the forget set (T11, T12)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._validate import check_int, check_real
from stabkit.curvature.factors import SampleFactors

BLOCK_ENTRIES = 2**24  # of V_i V_jᵀ held at once, 128 MiB
ROUNDING = 1e-12  # what counts as zero beside the largest of the matrices that were subtracted


@dataclass(frozen=True, kw_only=True, eq=False)
class Coherence:
    """How far the samples' curvatures share directions. NaN where a set has no curvature at all.

    Attributes:
        retain: σ_R = λ_max(S^{RR}) / max_i ‖H_i‖₂ (T11), at least 1: 1 for rank-one samples that curve along directions of
            their own.
        forget: σ_F.
        cross: ‖G^{RF}‖₂ / √(‖G^{RR}‖₂ ‖G^{FF}‖₂), in [0, 1], with G_ij = tr(H_i H_j) = S_ij². With S itself the ratio can
            pass 1 where the sets spread over the same space along different axes: |v·w| is no inner product (theory §4).
        cosine: tr(H_R H_F) / (‖H_R‖_F ‖H_F‖_F) of the mean curvatures, in [0, 1].
        mixed: σ_mix over retain-forget pairs (T12).
        mix: The α it is for.
        pairs: Number of pairs behind it.
        pairs_sampled: Whether these are a random sample of all pairs.
        populations: n_R and n_F, which the samples stand for.
        gram_retain: tr(H_i H_j) within the retain samples, shape (m_R, m_R).
        gram_forget: The same within the forget samples, shape (m_F, m_F).
        gram_cross: Between them, shape (m_R, m_F).
    """

    retain: float
    forget: float
    cross: float
    cosine: float
    mixed: float
    mix: float
    pairs: int
    pairs_sampled: bool
    populations: tuple[int, int]
    gram_retain: Tensor
    gram_forget: Tensor
    gram_cross: Tensor

    def for_rule(self) -> float:
        """σ as T13 takes it, for the whole population: σ_R at mix 0, σ_F at mix 1, σ_mix between.

        The eigenvalues of S grow in proportion to the samples it is made of, once they are many; that is how a sample's σ
        is carried over to the n samples of the set, or to as many pairs as the larger set has samples. Where samples share
        few directions it comes out too large, and the rule speaks less often (theory §4).

        Returns:
            The extrapolated σ.
        """
        n_retain, n_forget = self.populations
        if self.mix == 0:
            return self.retain * n_retain / self.gram_retain.shape[0]
        if self.mix == 1:
            return self.forget * n_forget / self.gram_forget.shape[0]
        return self.mixed * max(n_retain, n_forget) / self.pairs


def coherence(
    retain: SampleFactors, forget: SampleFactors, *, mix: float, max_pairs: int = 1024, seed: int = 0
) -> Coherence:
    """Coherence within the sets, between them, and of their mixture (T11, T12).

    Args:
        retain: Per-sample curvature of m_R retain samples.
        forget: Of m_F forget samples, in the same coordinates.
        mix: α in [0, 1].
        max_pairs: Pairs (r, f) to use for σ_mix at most; a random sample of all where there are more.
        seed: Seed of that sample.

    Returns:
        The coherence. Cost (m_R + m_F)²·C²·r for the Gram blocks and pairs²·2 for σ_mix, with at most 128 MiB of
        products at once.

    Raises:
        ValueError: If an argument is out of its domain.
    """
    check_real(mix, name="mix", owner="coherence", low=0, high=1)
    check_int(max_pairs, name="max_pairs", owner="coherence", low=1)
    if retain.rank != forget.rank:
        raise ValueError(
            f"`retain` and `forget` of `coherence` must be given in the same coordinates; got {retain.rank} and "
            f"{forget.rank} of them. Take both from one linearisation."
        )
    grams = (_gram(retain, retain), _gram(forget, forget), _gram(retain, forget))
    within = [_norm(gram) for gram in grams[:2]]
    size_retain, size_forget, size_cross = (float(torch.linalg.matrix_norm(gram, 2)) for gram in grams)
    chosen, sampled = _pairs(retain.samples, forget.samples, max_pairs, seed)
    return Coherence(
        retain=_ratio(within[0], float(spectral_norms(retain).max())),
        forget=_ratio(within[1], float(spectral_norms(forget).max())),
        cross=_ratio(size_cross, math.sqrt(size_retain * size_forget)),
        cosine=_ratio(float(grams[2].mean()), math.sqrt(max(0.0, float(grams[0].mean()) * float(grams[1].mean())))),
        mixed=_mixed(retain, forget, grams, chosen, mix),
        mix=mix,
        pairs=chosen.shape[0],
        pairs_sampled=sampled,
        populations=(retain.population, forget.population),
        gram_retain=grams[0],
        gram_forget=grams[1],
        gram_cross=grams[2],
    )


def spectral_norms(part: SampleFactors) -> Tensor:
    """‖H_i‖₂ of every sample.

    Args:
        part: Per-sample factors.

    Returns:
        Shape (m,). Cost m·C²·r: a QR of V_iᵀ and a C×C eigenproblem each.
    """
    upper = torch.linalg.qr(part.factors.transpose(1, 2), mode="r").R
    signed = upper if part.signs is None else upper * part.signs.unsqueeze(1)
    return torch.linalg.eigvalsh(signed @ upper.transpose(1, 2)).abs().amax(-1)


def _gram(a: SampleFactors, b: SampleFactors) -> Tensor:
    """tr(H_i H_j) = Σ_kl s_k s_l (v_ik · v_jl)², shape (m_a, m_b); block rows within the memory budget."""
    rows = b.factors.reshape(-1, b.rank)
    chunk = max(1, BLOCK_ENTRIES // max(1, a.factors.shape[1] * rows.shape[0]))
    blocks = []
    for start in range(0, a.samples, chunk):
        part = a.factors[start : start + chunk]
        products = (part.reshape(-1, a.rank) @ rows.T).square()
        products = products.reshape(part.shape[0], part.shape[1], b.samples, -1)
        if a.signs is not None:
            products = products * a.signs[start : start + chunk, :, None, None]
        if b.signs is not None:
            products = products * b.signs
        blocks.append(products.sum((1, 3)))
    return torch.cat(blocks)


def _norm(gram: Tensor) -> float:
    """Largest singular value of S, S_ij = √max(0, tr(H_i H_j))."""
    return float(torch.linalg.matrix_norm(gram.clamp(min=0).sqrt(), 2))


def _pairs(m_retain: int, m_forget: int, limit: int, seed: int) -> tuple[Tensor, bool]:
    """Retain and forget index of each pair, shape (pairs, 2), and whether they are a sample of all."""
    total = m_retain * m_forget
    if total <= limit:
        flat = torch.arange(total)
    else:
        flat = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
    return torch.stack([flat // m_forget, flat % m_forget], 1), total > limit


def _mixed(
    retain: SampleFactors, forget: SampleFactors, grams: tuple[Tensor, Tensor, Tensor], pairs: Tensor, mix: float
) -> float:
    """σ_mix of A_rf = (1-α)H_r - αH_f over the pairs (T12)."""
    r, f = pairs.to(grams[0].device).unbind(1)
    across = grams[2][r][:, f]
    traces = (1 - mix) ** 2 * grams[0][r][:, r] - mix * (1 - mix) * (across + across.T) + mix**2 * grams[1][f][:, f]
    factors = torch.cat([math.sqrt(1 - mix) * retain.factors[r], math.sqrt(mix) * forget.factors[f]], 1)
    signs = torch.cat([_signs(retain)[r], -_signs(forget)[f]], 1)
    stacked = SampleFactors(
        factors=factors, signs=signs, gradients=factors.new_zeros(r.numel(), retain.rank), population=r.numel()
    )
    largest = float(spectral_norms(stacked).max())
    # Where the two sets cancel in every pair, what is left is rounding and has no coherence.
    size = math.sqrt(float(torch.maximum(grams[0].diagonal().max(), grams[1].diagonal().max())))
    return _ratio(_norm(traces), largest if largest > ROUNDING * size else 0.0)


def _signs(part: SampleFactors) -> Tensor:
    return torch.ones_like(part.factors[..., 0]) if part.signs is None else part.signs


def _ratio(value: float, scale: float) -> float:
    return value / scale if scale > 0 else math.nan
