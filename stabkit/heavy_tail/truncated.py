"""Power law with an exponential cut-off, p(λ) ∝ λ^(-α) exp(-Λλ) on λ >= λ_min, by maximum likelihood.

In y = λ/λ_min and β = Λ·λ_min this is a two-parameter exponential family with statistics (ln y, y), so the negative
log-likelihood is convex in (α, β), its gradient is a difference of means, and its Hessian their covariance.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(256)
NEGLIGIBLE = 50.0  # e^-50 of the density's height is left out of the integrals
MIN_CUTOFF = 1e-9  # smallest β; below it the cut-off lies beyond any spectrum


@dataclass(frozen=True, kw_only=True)
class TruncatedFit:
    """Maximum-likelihood parameters.

    Attributes:
        exponent: α.
        cutoff: Λ, in units of 1/λ.
        distance: Kolmogorov-Smirnov distance on the tail.
        standard_error: Of α, from the inverse Fisher information with λ_min taken as known.
        converged: Whether the optimiser met its tolerance.
    """

    exponent: float
    cutoff: float
    distance: float
    standard_error: float
    converged: bool


def fit_truncated(logs: Array) -> TruncatedFit:
    """Fit a tail, all of it at or above its first eigenvalue.

    Args:
        logs: Ascending logarithms of the tail, shape (n,), n >= 2 and not all equal.

    Returns:
        The fit; the pure power law is the limit Λ -> 0 and is returned as such a small Λ. Cost O(n) + 256 nodes a step.
    """
    height = logs - logs[0]  # ln y
    mean_log, mean_y = float(height.mean()), float(np.exp(height).mean())

    def objective(point: Array) -> tuple[float, Array]:
        log_z, expected_log, expected_y = _moments(point[0], np.exp(point[1]))[:3]
        value = point[0] * mean_log + np.exp(point[1]) * mean_y + log_z
        return value, np.array([mean_log - expected_log, np.exp(point[1]) * (mean_y - expected_y)])

    # β in logarithms keeps it positive and its scale free.
    best = minimize(
        objective,
        np.array([1 + 0.8 / mean_log, np.log(0.1 / mean_y)]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-20.0, 1e4), (np.log(MIN_CUTOFF), np.log(1e4))],
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 500},
    )
    exponent, beta = float(best.x[0]), float(np.exp(best.x[1]))
    *_, covariance = _moments(exponent, beta)
    variance = float(np.linalg.pinv(covariance)[0, 0]) / len(logs)
    n = len(logs)
    distance = float(np.max(np.abs(_cdf(exponent, beta, height) - np.arange(n) / n)))
    return TruncatedFit(
        exponent=exponent,
        cutoff=beta / float(np.exp(logs[0])),
        distance=distance,
        standard_error=float(np.sqrt(max(variance, 0.0))),
        converged=bool(best.success),
    )


def _range(exponent: float, beta: float) -> float:
    """Upper end T of t = ln y beyond which y^(1-α) e^(-βy) is negligible."""
    by_cutoff = np.log1p(NEGLIGIBLE / beta)
    for _ in range(8):  # a rising power (α < 1) pushes the end out a little
        by_cutoff = np.log1p((NEGLIGIBLE + max(0.0, 1 - exponent) * by_cutoff) / beta)
    by_power = NEGLIGIBLE / (exponent - 1) if exponent > 1 else np.inf
    return float(min(by_cutoff, by_power))


def _log_density(exponent: float, beta: float, t: Array) -> Array:
    """Log of the density of t = ln y, up to its normaliser, with e^(-β) taken out."""
    return (1 - exponent) * t - beta * np.expm1(t)


def _moments(exponent: float, beta: float) -> tuple[float, float, float, Array]:
    """ln Z, E[ln y], E[y] and the covariance (2, 2) of (ln y, y)."""
    end = _range(exponent, beta)
    t = 0.5 * end * (NODES + 1)
    logs = _log_density(exponent, beta, t)
    peak = float(logs.max())
    mass = WEIGHTS * np.exp(logs - peak) * 0.5 * end
    z = float(mass.sum())
    statistics = np.stack([t, np.exp(t)])
    share = mass / z
    means = statistics @ share
    centred = statistics - means[:, None]
    return np.log(z) + peak - beta, float(means[0]), float(means[1]), (centred * share) @ centred.T


def _cdf(exponent: float, beta: float, height: Array) -> Array:
    """P(ln y <= h) on a fine trapezoid grid, shape of `height`."""
    grid = np.linspace(0.0, _range(exponent, beta), 20001)
    logs = _log_density(exponent, beta, grid)
    density = np.exp(logs - logs.max())
    area = np.append(0.0, np.cumsum(0.5 * (density[1:] + density[:-1])))
    return np.interp(height, grid, area / area[-1])
