"""The power-law exponent of a spectrum's tail, with its error, fit tests, and a reason whenever it is undefined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabkit._validate import check_choice, check_int, check_real, check_seed
from stabkit.heavy_tail.scan import Array, Scan, ks_distance, log_excess, scan
from stabkit.heavy_tail.truncated import fit_truncated

EIGENVALUE_FLOOR = 1e-5  # weightwatcher's threshold, absolute
METHODS = ("mle", "hill", "truncated")
CONFIDENCE = 0.95
MIN_BOOTSTRAP = 20
OWNER = "fit_power_law"


@dataclass(frozen=True, kw_only=True)
class PowerLawFit:
    """A fitted tail p(λ) ∝ λ^(-ξ) on λ >= λ_min. An undefined fit has NaN numbers and says why in `reason`.

    Attributes:
        exponent: ξ.
        lambda_min: Smallest eigenvalue of the tail, or for Hill the largest one outside it.
        lambda_max: Largest eigenvalue.
        n_tail: Eigenvalues in the tail.
        n: Eigenvalues above the threshold.
        distance: Kolmogorov-Smirnov distance between tail and fit.
        standard_error: Of ξ, with λ_min taken as known: (ξ-1)/√n_tail, or from the Fisher information if truncated.
        interval: 95 % bootstrap percentile interval that repeats the choice of λ_min; None unless asked for.
        p_value: Share of synthetic samples that fit worse than the data; None unless asked for.
        method: "mle", "hill" or "truncated".
        cutoff: Λ of exp(-Λλ), for the truncated law only.
        near_minima: Whether other starts of the tail fit nearly as well and give another exponent.
        ties: Whether two eigenvalues of the tail coincide.
        reason: Why the fit is undefined; empty if it is defined.
    """

    exponent: float
    lambda_min: float
    lambda_max: float
    n_tail: int
    n: int
    distance: float
    standard_error: float
    method: str
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    cutoff: float | None = None
    near_minima: bool = False
    ties: bool = False
    reason: str = ""

    @property
    def defined(self) -> bool:
        """Whether there is an exponent at all."""
        return not self.reason


def fit_power_law(
    eigenvalues: Tensor | NDArray[np.floating] | Sequence[float],
    *,
    method: str = "mle",
    tail: int | float | None = None,
    bootstrap: int = 0,
    p_value_draws: int = 0,
    threshold: float = EIGENVALUE_FLOOR,
    seed: int = 0,
) -> PowerLawFit:
    """Fit the tail of a spectrum.

    "mle": ξ = 1 + n/Σ ln(λ_i/λ_min) with λ_min by the smallest Kolmogorov-Smirnov distance (Clauset, Shalizi & Newman
    2009, eq. 3.1 and §3.3), by weightwatcher 0.7.7's rules: the first minimum on ties, the largest eigenvalue is no
    candidate, and below 20 eigenvalues the bias-corrected ξ = 1 + (n-1)/Σ over tails of at least 8.
    "hill": ξ = 1 + k/Σ ln(λ_i/λ_(k+1)) over the k largest (Hill 1975). A fixed k follows the matrix's aspect ratio more
    than its tail; prefer "mle".
    "truncated": λ^(-ξ) exp(-Λλ) above the same λ_min, by maximum likelihood.

    Args:
        eigenvalues: λ, squared singular values, in any order; one-dimensional after flattening.
        method: "mle", "hill" or "truncated".
        tail: Fixes the tail instead of searching it: a number of eigenvalues (all there are, if fewer), or a share in
            (0, 1). None: search, or the upper half for Hill.
        bootstrap: Resamples for `interval`; 0 for none, otherwise at least 20.
        p_value_draws: Synthetic samples for `p_value` (semi-parametric, Clauset et al. §4); "mle" only.
        threshold: Eigenvalues at or below it are numerically zero and ignored.
        seed: Seed of the resampling; the global random state is not touched.

    Returns:
        The fit. Cost O(n log n) to sort, O(48 n) to scan; each resample costs the same again.

    Raises:
        ValueError: If an argument is out of range, or a p-value is asked of another method than "mle".

    References:
        Clauset, Shalizi & Newman, "Power-law distributions in empirical data", SIAM Review 51 (2009).
        Hill, "A simple general approach to inference about the tail of a distribution", Annals of Statistics 3 (1975).
        Martin, Peng & Mahoney, "Predicting trends in the quality of state-of-the-art neural networks without access to
        training or testing data", Nature Communications 12 (2021).
    """
    check_choice(method, name="method", owner=OWNER, choices=METHODS)
    share = check_tail(tail, owner=OWNER)
    check_bootstrap(bootstrap, owner=OWNER)
    check_p_value_draws(p_value_draws, method, owner=OWNER)
    check_real(threshold, name="threshold", owner=OWNER, low=0)
    check_seed(seed, owner=OWNER)
    values = _as_array(eigenvalues)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        return _undefined(method, 0, math.nan, f"{bad} of {len(values)} eigenvalues are NaN or infinite")
    kept = np.sort(values[values > threshold])
    largest = float(kept[-1]) if len(kept) else math.nan
    if len(kept) < 2:
        return _undefined(method, len(kept), largest, f"fewer than 2 eigenvalues above {threshold:g}: {len(kept)}")
    logs = np.log(kept)
    if logs[-1] == logs[0]:
        return _undefined(method, len(kept), largest, f"all {len(kept)} eigenvalues are equal")
    point = _point(logs, method, share, rivals=True)
    if point is None:
        return _undefined(method, len(kept), largest, "all eigenvalues of the tail are equal")
    exponent, start, distance, error, cutoff, near = point
    hill = method == "hill"
    # Hill's λ_min is the first eigenvalue below its tail.
    members = kept[start + 1 :] if hill else kept[start:]
    rng = np.random.default_rng(seed)
    interval = _bootstrap(logs, method, share, bootstrap, rng) if bootstrap else None
    p_value = _p_value(logs, start, exponent, distance, share, p_value_draws, rng) if p_value_draws else None
    return PowerLawFit(
        exponent=exponent,
        lambda_min=float(kept[start]),
        lambda_max=largest,
        n_tail=len(members),
        n=len(kept),
        distance=distance,
        standard_error=error,
        method=method,
        interval=interval,
        p_value=p_value,
        cutoff=cutoff,
        near_minima=near,
        ties=bool((np.diff(members) == 0).any()),
    )


def check_tail(tail: object, *, owner: str) -> int | float | None:
    """Check a tail size.

    Args:
        tail: None, a whole number >= 2, or a share in (0, 1).
        owner: The public function it belongs to.

    Returns:
        The value; a share as a Python float.
    """
    if tail is None:
        return None
    remedy = "Give a number of eigenvalues, or a share of them in (0, 1)."
    if isinstance(tail, float):
        return check_real(tail, name="tail", owner=owner, low=0, high=1, low_open=True, high_open=True, remedy=remedy)
    return check_int(tail, name="tail", owner=owner, low=2, remedy=remedy)


def check_bootstrap(draws: object, *, owner: str) -> int:
    """Check a number of resamples.

    Args:
        draws: 0, or a whole number >= 20.
        owner: The public function it belongs to.

    Returns:
        The value.

    Raises:
        ValueError: If it is between.
    """
    number = check_int(draws, name="bootstrap", owner=owner, low=0)
    if 0 < number < MIN_BOOTSTRAP:
        raise ValueError(
            f"`bootstrap` of `{owner}` must be 0 or at least {MIN_BOOTSTRAP}; got {number}. A 95 % interval needs the "
            "ends of the resampled exponents: use 200."
        )
    return number


def check_p_value_draws(draws: object, method: str, *, owner: str) -> int:
    """Check a number of synthetic samples.

    Args:
        draws: 0, or for "mle" any whole number above.
        method: The estimator.
        owner: The public function it belongs to.

    Returns:
        The value.

    Raises:
        ValueError: If it is out of range or the method has none.
    """
    number = check_int(draws, name="p_value_draws", owner=owner, low=0)
    if number and method != "mle":
        raise ValueError(
            f"`p_value_draws` of `{owner}` must be 0 for method {method!r}; got {number}. Use method='mle'."
        )
    return number


def _as_array(eigenvalues: Tensor | NDArray[np.floating] | Sequence[float]) -> Array:
    if isinstance(eigenvalues, Tensor):
        eigenvalues = eigenvalues.detach().to("cpu", torch.float64).numpy()
    return np.asarray(eigenvalues, dtype=np.float64).reshape(-1)


def _undefined(method: str, n: int, largest: float, reason: str) -> PowerLawFit:
    return PowerLawFit(
        exponent=math.nan,
        lambda_min=math.nan,
        lambda_max=largest,
        n_tail=0,
        n=n,
        distance=math.nan,
        standard_error=math.nan,
        method=method,
        reason=reason,
    )


def _point(
    logs: Array, method: str, tail: int | float | None, *, rivals: bool = False
) -> tuple[float, int, float, float, float | None, bool] | None:
    """Exponent, index of λ_min, distance, standard error, cut-off and rival flag; None if degenerate."""
    total = len(logs)
    if method == "hill":
        k = _tail_size(0.5 if tail is None else tail, total - 1)
        start = total - k - 1
        excess = float((logs[start + 1 :] - logs[start]).sum())
        if excess <= 0:
            return None
        slope = k / excess
        height = logs[start + 1 :] - logs[start]
        distance = float(np.max(np.abs(1 - np.exp(-slope * height) - np.arange(k) / k)))
        return 1 + slope, start, distance, slope / math.sqrt(k), None, False
    found: Scan | None
    if tail is None:
        found = scan(logs, rivals=rivals)
    else:
        start = total - _tail_size(tail, total)
        excess = float(log_excess(logs[start:])[0])
        slope = (total - start) / excess if excess > 0 else math.nan
        found = Scan(start=start, exponent=1 + slope, distance=ks_distance(logs, start, slope)) if excess > 0 else None
    if found is None:
        return None
    if method == "truncated":
        cut = fit_truncated(logs[found.start :])
        return cut.exponent, found.start, cut.distance, cut.standard_error, cut.cutoff, False
    error = (found.exponent - 1) / math.sqrt(total - found.start)
    return found.exponent, found.start, found.distance, error, None, found.rival


def _tail_size(tail: int | float, total: int) -> int:
    size = math.ceil(tail * total) if isinstance(tail, float) else tail
    return max(1, min(size, total))


def _bootstrap(
    logs: Array, method: str, tail: int | float | None, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentile interval of the exponent over resamples of the whole spectrum, the choice of λ_min included."""
    found = []
    for _ in range(draws):
        sample = np.sort(rng.choice(logs, size=len(logs)))
        point = _point(sample, method, tail)
        if point is not None:
            found.append(point[0])
    if not found:
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _p_value(
    logs: Array,
    start: int,
    exponent: float,
    distance: float,
    tail: int | float | None,
    draws: int,
    rng: np.random.Generator,
) -> float:
    """Share of synthetic spectra, body resampled and tail drawn from the fit, whose own fit is at least as distant."""
    total, body = len(logs), logs[:start]
    worse = 0
    for _ in range(draws):
        in_tail = int((rng.random(total) >= start / total).sum()) if start else total
        drawn = logs[start] + rng.exponential(1 / (exponent - 1), size=in_tail)
        sample = np.concatenate([rng.choice(body, size=total - in_tail), drawn]) if in_tail < total else drawn
        point = _point(np.sort(sample), "mle", tail)
        worse += point is not None and point[2] >= distance
    return worse / draws
