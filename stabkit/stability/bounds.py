"""Cheap sufficient conditions for divergence: Rayleigh quotients, the self-loop bound and the coherence rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._validate import check_real
from stabkit.curvature.factors import SampleFactors
from stabkit.stability.dynamics import LinearDynamics


def rayleigh_bounds(dynamics: LinearDynamics, lr: float) -> float:
    """A lower bound on ρ(T_η): the best Rayleigh quotient over vvᵀ, v each eigenvector of D, and the identity (T10).

    At vvᵀ with Dv = λv it is (1-ηλ)² + η² times the spread of the per-sample curvatures vᵀH_i v.

    Args:
        dynamics: The linearised process.
        lr: Step size η > 0.

    Returns:
        The bound: above 1 the run is unstable in mean square. Cost r³ + 2·(m_R + m_F)·C·r².

    Raises:
        ValueError: If the step size is not positive.
    """
    check_real(lr, name="lr", owner="rayleigh_bounds", low=0, low_open=True)
    quotients, _ = eigenvector_quotients(dynamics, lr)
    eye = torch.eye(dynamics.rank, dtype=quotients.dtype, device=quotients.device)
    flat = float(dynamics.apply(eye, lr).trace()) / dynamics.rank
    return max(float(quotients.max()), flat)


def eigenvector_quotients(dynamics: LinearDynamics, lr: float) -> tuple[Tensor, Tensor]:
    """⟨vvᵀ, T_η(vvᵀ)⟩ for each eigenvector v of D (T10).

    Args:
        dynamics: The linearised process.
        lr: Step size η.

    Returns:
        Quotients of shape (r,) and the eigenvectors as columns, shape (r, r), by ascending eigenvalue. Cost
        r³ + (m_R + m_F)·C·r².
    """
    values, vectors = torch.linalg.eigh(dynamics.mean_hessian())
    quotients = (1 - lr * values).square()
    for weight, part in zip(dynamics.noise_weights(), (dynamics.retain, dynamics.forget), strict=True):
        if weight > 0:
            curvature = _quotients(part, vectors)
            centre = 0.0 if dynamics.sampling == "poisson" else curvature.mean(0)
            quotients = quotients + lr**2 * weight * (curvature - centre).square().mean(0)
    return quotients, vectors


def self_loop(dynamics: LinearDynamics, lr: float) -> bool:
    """Whether one sample alone makes the run unstable in mean square.

    With h the steepest direction of sample i of set S, the noise term of ⟨hhᵀ, T_η(hhᵀ)⟩ has at least the share 1/n of that
    sample: η² w_S λ_max(H_i)²/n under Poisson sampling, η² w_S (λ_max(H_i) - hᵀH_S h)²/n otherwise, where the mean is taken
    out. w_S is the set's noise weight of T6. Above 1, so is ρ(T_η). Own; on one set under Poisson sampling at least as sharp
    as the noise condition of T13 (theory §4).

    Args:
        dynamics: The linearised process; its samples' curvature must be positive semi-definite or signed.
        lr: Step size η > 0.

    Returns:
        True only if unstable. Cost (m_R + m_F)·C²·r.

    Raises:
        ValueError: If the step size is not positive.
    """
    check_real(lr, name="lr", owner="self_loop", low=0, low_open=True)
    for weight, part in zip(dynamics.noise_weights(), (dynamics.retain, dynamics.forget), strict=True):
        if weight == 0:
            continue
        values, directions = steepest(part)
        if dynamics.sampling != "poisson":
            values = values - (directions @ part.mean() * directions).sum(1)
        if lr**2 * weight / part.population * float(values.square().max()) > 1:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class RuleVerdict:
    """What the coherence rule says (T13).

    Attributes:
        diverges: Whether either condition is met.
        curvature: λ_max(D): of H_R at mix 0; of -H_F at mix 1, where it is positive only for signed curvature.
        step_condition: 2/η: reached by the curvature, the mean overshoots.
        noise_condition: (σ/η)(n/B - 1)^{-1/2}: passed by the curvature, the noise grows; infinite for a full batch.
    """

    diverges: bool
    curvature: float
    step_condition: float
    noise_condition: float


def coherence_rule(dynamics: LinearDynamics, lr: float, *, sigma: float) -> RuleVerdict:
    """The rule of Dexter et al. 2024 (T13); with D and σ_mix in its place, its unlearning form.

    A theorem on one set (mix 0) of positive semi-definite curvature under Poisson sampling. With two sets it is a
    reconstruction, with n/B that of the larger set. There, and on one set under the other samplings, it fires on some stable
    runs (theory §4): reported, never relied on.

    Args:
        dynamics: The linearised process.
        lr: Step size η > 0.
        sigma: Coherence σ of the whole set, or σ_mix: `Coherence.for_rule`. NaN, where undefined, leaves the first
            condition alone.

    Returns:
        The verdict with both conditions.

    Raises:
        ValueError: If the step size is not positive.
    """
    check_real(lr, name="lr", owner="coherence_rule", low=0, low_open=True)
    parts = (dynamics.retain, dynamics.forget)
    larger = int(parts[1].population > parts[0].population)
    place = int(dynamics.mix) if dynamics.mix in (0, 1) else larger
    curvature = float(torch.linalg.eigvalsh(dynamics.mean_hessian()).max())
    ratio = parts[place].population / dynamics.batch_sizes[place]
    noise = sigma / lr / math.sqrt(ratio - 1) if ratio > 1 and not math.isnan(sigma) else math.inf
    return RuleVerdict(
        diverges=curvature >= 2 / lr or curvature > noise,
        curvature=curvature,
        step_condition=2 / lr,
        noise_condition=noise,
    )


def steepest(part: SampleFactors) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of every H_i, and its eigenvector.

    Args:
        part: Per-sample factors.

    Returns:
        Values of shape (m,) and unit vectors of shape (m, r). Cost m·C²·r: a QR of V_iᵀ and a small eigenproblem each.
    """
    q, upper = torch.linalg.qr(part.factors.transpose(1, 2))  # (m, r, k), (m, k, C)
    signed = upper if part.signs is None else upper * part.signs.unsqueeze(1)
    values, vectors = torch.linalg.eigh(signed @ upper.transpose(1, 2))
    return values[:, -1], (q @ vectors[:, :, -1:]).squeeze(-1)


def _quotients(part: SampleFactors, vectors: Tensor) -> Tensor:
    """vᵀH_i v for every sample and column, shape (m, k)."""
    squares = (part.factors @ vectors).square()
    return (squares if part.signs is None else squares * part.signs.unsqueeze(-1)).sum(1)
