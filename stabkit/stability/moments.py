"""Exact first and second moment of a run, drift included, step by step (T9).

The second moment of (δ, 1) evolves linearly. It is carried as mean and covariance, so that what is certain stays exactly so:
the batch noise is that of H_i δ + g_i, a linear function of (δ, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._validate import check_int, check_real
from stabkit.curvature.factors import SampleFactors
from stabkit.stability.dynamics import LinearDynamics


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Expected course of the linearised run; index k is after k steps.

    Attributes:
        lr: The step size η.
        squared_distance: E‖δ_k‖², shape (K+1,). Infinite from the step on at which double precision overflows.
        retain_loss: E[½ δᵀH_Rδ + ḡ_Rᵀδ], the change of the quadratic retain loss, shape (K+1,); after an overflow infinite,
            with the last sign.
        forget_loss: The same of the forget set.
        mean: E[δ_K], shape (r,); after an overflow that of the last step before it.
        covariance: Cov[δ_K], shape (r, r), at the same step.
    """

    lr: float
    squared_distance: Tensor
    retain_loss: Tensor
    forget_loss: Tensor
    mean: Tensor
    covariance: Tensor


def moments(
    dynamics: LinearDynamics,
    *,
    lr: float,
    steps: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    start: Tensor | None = None,
) -> Moments:
    """E‖δ_k‖² and both expected quadratic losses for every k up to K, exactly (T9).

    Args:
        dynamics: The linearised process, whose gradients drive the drift.
        lr: Step size η > 0.
        steps: Number K >= 1 of steps.
        momentum: Heavy-ball β in [0, 1): δ⁺ = δ - η (A δ + b) + β (δ - δ⁻), at rest at the start.
        weight_decay: γ >= 0: adds γδ to the gradient, a pull towards where the run was linearised. An optimiser's pulls
            towards the origin: the constant part γθ* of that belongs in the gradients.
        start: δ_0, shape (r,); zero when None.

    Returns:
        The course of the moments. Cost a step: 2·(m_R + m_F)·C·r² + some r³ multiplications.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or the start has the wrong shape.
    """
    check_run(lr, steps, momentum, weight_decay, owner="moments")
    d, drift = dynamics.mean_hessian(), dynamics.mean_gradient()
    if start is not None and start.shape != drift.shape:
        raise ValueError(
            f"`start` of `moments` must have shape ({dynamics.rank},), one entry for each coordinate; got shape "
            f"{tuple(start.shape)}. Project it onto the basis of the linearisation."
        )
    eye = torch.eye(dynamics.rank, dtype=d.dtype, device=d.device)
    mean = torch.zeros_like(drift) if start is None else start.to(drift)
    before = mean
    now, lag, old = torch.zeros_like(d), torch.zeros_like(d), torch.zeros_like(d)  # Cov of (δ,δ), (δ,δ⁻), (δ⁻,δ⁻)
    forward = (1 + momentum - lr * weight_decay) * eye - lr * d
    courses: list[tuple[float, ...]] = [_observe(dynamics, mean, now)]
    while len(courses) <= steps:
        noise = lr**2 * _noise(dynamics, mean, now)
        crossed = momentum * forward @ lag
        now, lag, old = (
            forward @ now @ forward.T - crossed - crossed.T + momentum**2 * old + noise,
            forward @ now - momentum * lag.T,
            now,
        )
        ahead = mean + momentum * (mean - before) - lr * (d @ mean + weight_decay * mean + drift)
        observed = _observe(dynamics, ahead, now)
        if not all(map(math.isfinite, observed)):
            last = courses[-1]
            endless = (math.inf, *(math.copysign(math.inf, value) for value in last[1:]))
            courses.extend([endless] * (steps + 1 - len(courses)))
            now = old
            break
        mean, before = ahead, mean
        courses.append(observed)
    squared, retain, forget = torch.tensor(courses, dtype=d.dtype, device=d.device).unbind(1)
    return Moments(
        lr=lr, squared_distance=squared, retain_loss=retain, forget_loss=forget, mean=mean, covariance=(now + now.T) / 2
    )


def check_run(lr: float, steps: int, momentum: float, weight_decay: float, *, owner: str) -> None:
    """Check the arguments that every course of the linearised run takes.

    Args:
        lr: Step size.
        steps: Number of steps.
        momentum: Heavy-ball coefficient.
        weight_decay: Weight decay.
        owner: The function that was called.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain.
    """
    check_real(lr, name="lr", owner=owner, low=0, low_open=True)
    check_int(steps, name="steps", owner=owner, low=1)
    check_real(momentum, name="momentum", owner=owner, low=0, high=1, high_open=True)
    check_real(weight_decay, name="weight_decay", owner=owner, low=0)


def _noise(dynamics: LinearDynamics, mean: Tensor, covariance: Tensor) -> Tensor:
    """Covariance of the mixed batch gradient A_k δ + b_k given the sets, averaged over δ, shape (r, r)."""
    total = torch.zeros_like(covariance)
    for weight, part in zip(dynamics.noise_weights(), (dynamics.retain, dynamics.forget), strict=True):
        if weight == 0:
            continue
        at_mean = _products(part, mean) + part.gradients  # (m, r): H_i μ + g_i
        spread = part.sandwich(covariance)
        if dynamics.sampling != "poisson":
            hessian = part.mean()
            spread = spread - hessian @ covariance @ hessian
            at_mean = at_mean - at_mean.mean(0)
        total = total + weight * (spread + at_mean.T @ at_mean / part.samples)
    return total


def _products(part: SampleFactors, vector: Tensor) -> Tensor:
    """H_i v of every sample, shape (m, r)."""
    rows = part.factors @ vector  # (m, C)
    if part.signs is not None:
        rows = rows * part.signs
    return (rows.unsqueeze(1) @ part.factors).squeeze(1)


def _observe(dynamics: LinearDynamics, mean: Tensor, covariance: Tensor) -> tuple[float, float, float]:
    """E‖δ‖² and the expected quadratic change of the retain and the forget loss."""
    second = covariance + torch.outer(mean, mean)
    retain, forget = (
        float((part.mean() * second).sum() / 2 + part.mean_gradient() @ mean)
        for part in (dynamics.retain, dynamics.forget)
    )
    return float(second.trace()), retain, forget
