"""What the linear theory (T3-T13) says of a measurement: the thresholds that stand beside the rollout's verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from stabkit import stability
from stabkit.boundary import adamw_guess
from stabkit.curvature import SampleFactors
from stabkit.measure import FEWEST_SAMPLES, THEORY_ROWS, Measurement
from stabkit.report import Thresholds
from stabkit.spectrum._common import ROUNDING

HORIZON_GROWTH = 1e3  # of the mean square, at `Thresholds.horizon_lr`
LYAPUNOV_STEPS, LYAPUNOV_RUNS = 100, 16
NEGLIGIBLE = 1e-3  # negative curvature, as a share of the largest
DAMPING = 1e-3  # ε of T5, as a share of λ_max(H_R)


def _dynamics(measurement: Measurement, batch_sizes: tuple[int, int]) -> stability.LinearDynamics:
    plain = 1 / measurement.momentum_share  # what leaves momentum out has all of P
    return stability.LinearDynamics(
        retain=_light(measurement.retain).scaled(plain),
        forget=_light(measurement.forget).scaled(plain),
        mix=measurement.algorithm.mix,
        batch_sizes=batch_sizes,
        sampling=measurement.algorithm.sampling,
        **_decay(measurement),
    )


def _decay(measurement: Measurement) -> dict[str, Any]:
    """Weight decay in the linear theory; AdamW's, which is outside of P, is left to the rollouts."""
    if measurement.algorithm.adaptive:
        return {}
    network = measurement.network
    return {
        "weight_decay": measurement.algorithm.weight_decay,
        "metric": network.decay_metric.cpu(),
        "anchor": network.decay_anchor.cpu(),
    }


def _light(part: SampleFactors) -> SampleFactors:
    """Fewer samples where each has much curvature, as texts have: what the theory's maps cost grows with both."""
    return part.thin(max(FEWEST_SAMPLES, THEORY_ROWS // part.factors.shape[1]))


def _step_limit(measurement: Measurement) -> float:
    """2(1+β)/λ_max(D) (T4), or its value for Nesterov's momentum."""
    algorithm = measurement.algorithm
    return stability.step_limit(_edges(measurement)[1], momentum=algorithm.inertia, nesterov=algorithm.nesterov)


def _edges(measurement: Measurement) -> tuple[float, float]:
    """λ_min and λ_max of D with weight decay, whose part is added to first order at either eigenvector."""
    pairs, algorithm = measurement.spectrum.pairs, measurement.algorithm
    decay = 0.0 if algorithm.adaptive else algorithm.weight_decay
    if not decay:
        return pairs.smallest, pairs.largest
    vectors = measurement.preconditioner.sqrt(pairs.vectors[:, [0, -1]])
    factors = algorithm.decay_factors(measurement.problem.whole)
    kept = vectors if factors is None else vectors * factors.to(vectors).unsqueeze(1)
    pulls = decay * (vectors * kept).sum(0)
    return pairs.smallest + float(pulls[0]), pairs.largest + float(pulls[1])


def step_guess(measurement: Measurement) -> float:
    """A step size of the order of the critical one, where a scan may begin.

    Args:
        measurement: What was measured.

    Returns:
        `Thresholds.step_limit` where that is finite; for AdamW, and where no curvature is positive, another of the same use.
    """
    if measurement.algorithm.adaptive:
        # Not below what is asked about, which the scan is to reach past.
        return max(adamw_guess(measurement.problem), measurement.algorithm.lr)
    limit = _step_limit(measurement)
    if math.isfinite(limit):
        return limit
    # Where no curvature is positive, runs diverge along the most negative one.
    smallest = _edges(measurement)[0]
    return 2 / -smallest if -smallest > _negligible(measurement) else measurement.algorithm.lr


def _negligible(measurement: Measurement) -> float:
    """Negative curvature that counts as none; less than its residual may be real, as no quotient lies below λ_min."""
    pairs = measurement.spectrum.pairs
    rounding = ROUNDING * torch.finfo(pairs.vectors.dtype).eps
    return max(min(float(pairs.residuals[0]), NEGLIGIBLE * pairs.scale), rounding * pairs.scale)


def critical_steps(measurement: Measurement, batch_sizes: tuple[int, int]) -> tuple[float, float]:
    """Step sizes at which the second moment grows without end, and by a factor of a thousand over the run.

    Args:
        measurement: What was measured.
        batch_sizes: B_R and B_F.

    Returns:
        `Thresholds.mean_square_lr` and `Thresholds.horizon_lr`, whatever the step size in question. Cost: two searches, the
        first of some 20 to 100 applications of the second moment's map.
    """
    dynamics = _dynamics(measurement, batch_sizes)
    return (
        stability.critical_lr_mean_square(dynamics),
        stability.critical_lr_within(dynamics, measurement.algorithm.steps, HORIZON_GROWTH),
    )


def thresholds(
    measurement: Measurement, batch_sizes: tuple[int, int], *, mean_square_lr: float, horizon_lr: float
) -> Thresholds:
    """All of them at the algorithm's own step size and mix.

    Args:
        measurement: What was measured.
        batch_sizes: B_R and B_F.
        mean_square_lr: What `critical_steps` found first.
        horizon_lr: And what second.

    Returns:
        The thresholds. Cost: a map of second moments and a few simulated runs, in the compressed directions.
    """
    algorithm, pairs = measurement.algorithm, measurement.spectrum.pairs
    dynamics, limit = _dynamics(measurement, batch_sizes), _step_limit(measurement)
    smallest, largest = _edges(measurement)
    retain_mean = measurement.retain.mean()
    damping = DAMPING * float(torch.linalg.eigvalsh(retain_mean)[-1]) or torch.finfo(torch.float64).tiny ** 0.5
    mean_square = stability.mean_square(dynamics, algorithm.lr)
    typical = _typical_growth(dynamics, algorithm.lr)
    rule = stability.coherence_rule(dynamics, algorithm.lr, sigma=measurement.coherence.for_rule())
    return Thresholds(
        curvature=measurement.settings.curvature,
        smallest=smallest,
        largest=largest,
        residuals=(float(pairs.residuals[0]), float(pairs.residuals[-1])),
        converged=pairs.converged,
        step_limit=limit,
        mean_stable=smallest >= -_negligible(measurement) and algorithm.lr <= limit,
        asymptotic_mix=stability.critical_mix(retain_mean, measurement.forget.mean(), damping=damping).mix,
        damping=damping,
        radius=mean_square.radius,
        growth=mean_square.growth(algorithm.steps),
        radius_lower_bound=stability.rayleigh_bounds(dynamics, algorithm.lr),
        lyapunov=typical.value,
        lyapunov_error=typical.standard_error,
        mean_square_lr=mean_square_lr,
        horizon_lr=horizon_lr,
        coherence_rule=rule.diverges,
        outside=algorithm.outside_theory,
        self_loop=stability.self_loop(dynamics, algorithm.lr),
    )


def _typical_growth(dynamics: stability.LinearDynamics, lr: float) -> stability.LyapunovExponent:
    """Lyapunov exponent, the sets' sizes rounded to multiples of the samples that stand for them."""
    parts = [
        replace(part, population=part.samples * max(1, round(part.population / part.samples)))
        for part in (dynamics.retain, dynamics.forget)
    ]
    sizes = [min(batch, part.population) for batch, part in zip(dynamics.batch_sizes, parts, strict=True)]
    rounded = replace(dynamics, retain=parts[0], forget=parts[1], batch_sizes=(sizes[0], sizes[1]))
    return stability.lyapunov_exponent(rounded, lr=lr, steps=LYAPUNOV_STEPS, runs=LYAPUNOV_RUNS, seed=0)
