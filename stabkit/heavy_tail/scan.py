"""Where the power-law tail of a spectrum begins: the start with the smallest Kolmogorov-Smirnov distance.

Everything is a function of the logarithms L_0 <= ... <= L_{N-1} of the eigenvalues. Candidate i takes the n = N - i
largest, with exponent α_i = 1 + n / s_i, s_i = Σ_{j>=i} (L_j - L_i), and distance

    D_i = max_j |1 - exp((1-α_i)(L_j - L_i)) - (j-i)/n|,

the empirical distribution taken just left of each eigenvalue (weightwatcher's and powerlaw's convention).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALL_SAMPLE = 20  # below this many eigenvalues the bias-corrected rule applies
SMALL_TAIL = 8  # shortest tail that rule considers
PROBES = (8, 48)  # points of a tail at which its distance is bounded from below, at first and for what is left
ROUNDING = 1e-12  # distances closer than this may differ by rounding alone
RIVAL_SLACK = 1.1  # a start within 10 % of the smallest distance is a rival
RIVAL_ERRORS = 3.0  # if its exponent differs by this many standard errors


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The chosen start of the tail.

    Attributes:
        start: Index i of λ_min among the ascending eigenvalues.
        exponent: α_i.
        distance: D_i.
        rival: Whether another start fits nearly as well and gives another exponent; False if not looked for.
    """

    start: int
    exponent: float
    distance: float
    rival: bool = False


def log_excess(logs: Array) -> Array:
    """s_i = Σ_{j>=i} (L_j - L_i) for every i, as a sum of non-negative terms, so ties at the top give exactly 0.

    Args:
        logs: Ascending logarithms, shape (N,).

    Returns:
        Shape (N,); the last entry is 0. Cost O(N).
    """
    sizes = np.arange(len(logs) - 1, 0, -1)  # N - j for j = 1 .. N-1
    steps = sizes * np.diff(logs)
    return np.append(np.cumsum(steps[::-1])[::-1], 0.0)


def ks_distance(logs: Array, start: int, slope: float) -> float:
    """D_i for one start.

    Args:
        logs: Ascending logarithms, shape (N,).
        start: Index i.
        slope: α_i - 1.

    Returns:
        The Kolmogorov-Smirnov distance. Cost O(N - i).
    """
    tail = logs[start:] - logs[start]
    n = len(tail)
    return float(np.max(np.abs(1 - np.exp(-slope * tail) - np.arange(n) / n)))


def scan(logs: Array, *, rivals: bool = False) -> Scan | None:
    """The start with the smallest D_i, the first on ties; exactly what trying every start would give.

    All exponents come from one cumulative sum. Each D_i is bounded from below by its value on a few points, and full
    distances are computed in the order of these bounds until a bound passes the best distance found.

    Args:
        logs: Ascending logarithms of N >= 2 eigenvalues, shape (N,).
        rivals: Whether to look for other starts that fit nearly as well and give another exponent.

    Returns:
        The chosen start, or None if every candidate is degenerate (all eigenvalues equal). Cost O(8·N) to O(48·N), plus
        O(N) for each of the few full evaluations.
    """
    total = len(logs)
    excess = log_excess(logs)
    starts = np.flatnonzero(excess[:-1] > 0)
    if len(starts) == 0:
        return None
    sizes = total - starts
    if total < SMALL_SAMPLE:
        return _scan_small(logs, starts, (sizes - 1) / excess[starts])
    slopes = sizes / excess[starts]
    bounds = _lower_bounds(logs, starts, slopes, PROBES[0])
    first = int(np.argmin(bounds))
    ceiling = ks_distance(logs, int(starts[first]), float(slopes[first]))
    left = np.flatnonzero(bounds <= (RIVAL_SLACK if rivals else 1.0) * ceiling + ROUNDING)
    bounds[left] = _lower_bounds(logs, starts[left], slopes[left], PROBES[1])
    order = left[np.argsort(bounds[left], kind="stable")]
    best, chosen = ceiling, first
    for at in order.tolist():
        if bounds[at] > best + ROUNDING:
            break
        distance = ks_distance(logs, int(starts[at]), float(slopes[at]))
        if distance < best or (distance == best and at < chosen):
            best, chosen = distance, at
    rival = False
    if rivals:
        apart = RIVAL_ERRORS * slopes[chosen] / np.sqrt(sizes[chosen])
        others = order[(np.abs(slopes[order] - slopes[chosen]) > apart) & (bounds[order] <= RIVAL_SLACK * best)]
        rival = any(ks_distance(logs, int(starts[at]), float(slopes[at])) <= RIVAL_SLACK * best for at in others)
    return Scan(start=int(starts[chosen]), exponent=1 + float(slopes[chosen]), distance=best, rival=rival)


def _lower_bounds(logs: Array, starts: NDArray[np.int64], slopes: Array, probes: int) -> Array:
    """max |...| of D_i over evenly spaced members of each tail only, shape of `starts`."""
    sizes = (len(logs) - starts)[:, None]
    offsets = (np.linspace(0.0, 1.0, probes) * (sizes - 1)).astype(np.int64)  # (candidates, probes)
    heights = logs[starts[:, None] + offsets] - logs[starts, None]
    return np.abs(1 - np.exp(-slopes[:, None] * heights) - offsets / sizes).max(1)


def _scan_small(logs: Array, starts: NDArray[np.int64], slopes: Array) -> Scan:
    """Weightwatcher 0.7.7's result for N < 20: bias-corrected exponents, smallest D_i over tails of 8 or more."""
    long_enough = len(logs) - starts >= SMALL_TAIL
    if not long_enough.any():  # too few for any tail of 8: all of them are the tail
        long_enough[0] = True
    distances = [ks_distance(logs, int(i), float(s)) for i, s in zip(starts, slopes, strict=True)]
    chosen = int(np.argmin(np.where(long_enough, distances, np.inf)))
    return Scan(start=int(starts[chosen]), exponent=1 + float(slopes[chosen]), distance=distances[chosen])
