"""Where a run stops being safe: the critical step size, the critical mix, and the whole map, all by rollout (T14)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stabkit.algorithms.base import Algorithm
from stabkit.curvature.lowrank import LinearisedNetwork
from stabkit.rollout import Rollout, rollout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DECADES_AROUND = (3, 2)  # below and above the guess, in the first scan
POINTS_PER_DECADE = 5
EXTENSIONS = 3  # further scans of three decades downwards, while even the smallest step diverges
MIX_POINTS = 21
REFINEMENTS = 2
REFINED_POINTS = 7


@dataclass(frozen=True, kw_only=True)
class CriticalValue:
    """First value of one setting at which a run is predicted to diverge, the others held fixed.

    Found by a scan and refinement, not by bisection: nothing says that divergence is monotone in a setting.

    Attributes:
        value: Where P(diverge) first passes one half; the upper end of the scan (`found` false) if it never does.
        low: Largest tested value below the first crossing of the earliest seed: the lower end of the seeds' spread.
        high: First crossing of the latest seed: the upper end of the seeds' spread.
        found: Whether P(diverge) passed one half anywhere in the scan.
        scanned: Lower and upper end of the scan.
    """

    value: float
    low: float
    high: float
    found: bool
    scanned: tuple[float, float]


def critical_lr(
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    guess: float,
) -> CriticalValue:
    """Critical step size at the algorithm's mix.

    Args:
        network: The compressed network.
        algorithm: Everything but the step size is read from it.
        batch_sizes: B_R and B_F.
        seeds: One rollout each.
        guess: A step size of the right order, such as 2/λ_max(D); the scan reaches from 1/1000 to 100 times it.

    Returns:
        The critical value. Cost: rollouts of about 40 settings a seed.
    """

    def roll(values: Sequence[float]) -> Rollout:
        mixes = [algorithm.mix] * len(values)
        return rollout(network, algorithm, lr=values, mix=mixes, batch_sizes=batch_sizes, seeds=seeds)

    below, above = DECADES_AROUND
    low, high = guess * 10.0**-below, guess * 10.0**above
    for _ in range(EXTENSIONS + 1):
        points = 1 + round(POINTS_PER_DECADE * math.log10(high / low))
        found = _first_crossing(roll, np.geomspace(low, high, points).tolist(), np.geomspace)
        if not found.found or found.low > low:
            break
        low, high = low * 1e-3, low * 10 ** (1 / POINTS_PER_DECADE)
    return found


def critical_mix(
    network: LinearisedNetwork, algorithm: Algorithm, *, batch_sizes: tuple[int, int], seeds: Sequence[int]
) -> CriticalValue:
    """Critical mix at the algorithm's step size.

    Args:
        network: The compressed network.
        algorithm: Everything but the mix is read from it.
        batch_sizes: B_R and B_F.
        seeds: One rollout each.

    Returns:
        The critical value in [0, 1]; 0 where even fine-tuning at this step diverges. Cost: rollouts of about 35 settings
        a seed.
    """

    def roll(values: Sequence[float]) -> Rollout:
        steps = [algorithm.lr] * len(values)
        return rollout(network, algorithm, lr=steps, mix=values, batch_sizes=batch_sizes, seeds=seeds)

    return _first_crossing(roll, np.linspace(0, 1, MIX_POINTS).tolist(), np.linspace)


def _first_crossing(
    roll: Callable[[Sequence[float]], Rollout], values: list[float], space: Callable[[float, float, int], np.ndarray]
) -> CriticalValue:
    """Scan ascending values, then refine around the brackets in which the seeds and their mean first cross."""
    scanned = (values[0], values[-1])
    result = roll(values)
    pooled, crossed = result.probability >= 0.5, result.score >= 0  # (G,) and (S, G)
    for _ in range(REFINEMENTS):
        low, high = _bracket(values, pooled)
        if low == high:
            break
        finer = space(low, high, REFINED_POINTS + 2)[1:-1].tolist()
        added = roll(finer)
        order = np.argsort([*values, *finer])
        values = np.array([*values, *finer])[order].tolist()
        pooled = torch.cat([pooled, added.probability >= 0.5])[order]
        crossed = torch.cat([crossed, added.score >= 0], dim=1)[:, order]
    brackets = [_bracket(values, row) for row in (pooled, *crossed)]
    return CriticalValue(
        value=brackets[0][1],
        low=min(low for low, _ in brackets),
        high=max(high for _, high in brackets),
        found=bool(pooled.any()),
        scanned=scanned,
    )


def _bracket(values: list[float], crosses: Tensor) -> tuple[float, float]:
    """Last value before the first crossing and the crossing itself; both an end of the scan if there is no such pair."""
    if not bool(crosses.any()):
        return values[-1], values[-1]
    first = int(crosses.int().argmax())
    return values[max(first - 1, 0)], values[first]


@dataclass(frozen=True, kw_only=True, eq=False)
class Frontier:
    """Predicted outcome over a grid of step sizes and mixes.

    Attributes:
        algorithm: Name of the algorithm.
        lr: Step sizes, ascending, shape (n_lr,).
        mix: Mixes, ascending, shape (n_mix,).
        probability: P(diverge), shape (n_lr, n_mix).
        divergence_step: Median predicted divergence step, NaN where none is predicted, shape (n_lr, n_mix).
        retain_loss: Predicted retain loss at the end of the run or when it blew up, mean over seeds, shape (n_lr, n_mix).
        forget_loss: The same for the forget set.
    """

    algorithm: str
    lr: np.ndarray
    mix: np.ndarray
    probability: np.ndarray
    divergence_step: np.ndarray
    retain_loss: np.ndarray
    forget_loss: np.ndarray

    @property
    def critical_lr(self) -> np.ndarray:
        """Step size at which P(diverge) first passes one half, for each mix, shape (n_mix,).

        Log-linear between grid points; NaN where the grid does not bracket a crossing.
        """
        result = np.full(self.mix.size, math.nan)
        for column, p in enumerate(self.probability.T):
            above = np.flatnonzero(p >= 0.5)
            if above.size and above[0] > 0:
                left, right = above[0] - 1, above[0]
                share = (0.5 - p[left]) / (p[right] - p[left])
                result[column] = self.lr[left] * (self.lr[right] / self.lr[left]) ** share
        return result

    def plot(self, ax: Axes | None = None, outcomes: Sequence[Outcome] = ()) -> tuple[Figure, Axes]:
        """Heatmap of P(diverge) with the boundary drawn in and real runs marked.

        Args:
            ax: Axes to draw in; new ones when None.
            outcomes: Real runs to mark.

        Returns:
            Figure and axes.
        """
        from stabkit.plots import plot_frontier  # plots are loaded only when drawn

        return plot_frontier(self, ax=ax, outcomes=outcomes)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One real run on the map.

    Attributes:
        lr: Its step size.
        mix: Its mix.
        diverged: What it did.
    """

    lr: float
    mix: float
    diverged: bool


def frontier(
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    lr: Sequence[float],
    mix: Sequence[float],
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    progress: bool = False,
) -> Frontier:
    """Predict every pair of a step size and a mix.

    Args:
        network: The compressed network.
        algorithm: Everything but step size and mix is read from it.
        lr: Step sizes, in any order.
        mix: Mixes, in any order.
        batch_sizes: B_R and B_F.
        seeds: One rollout each.
        progress: Whether to show a progress bar.

    Returns:
        The map. Cost: one rollout of n_lr·n_mix settings a seed; no network pass.
    """
    lrs, mixes = np.unique(np.asarray(lr, dtype=float)), np.unique(np.asarray(mix, dtype=float))
    eta, alpha = (grid.reshape(-1) for grid in np.meshgrid(lrs, mixes, indexing="ij"))
    result = rollout(
        network, algorithm, lr=eta.tolist(), mix=alpha.tolist(), batch_sizes=batch_sizes, seeds=seeds, progress=progress
    )
    shape = lrs.size, mixes.size
    steps = [math.nan if step is None else step for step in result.expected_divergence_step()]
    return Frontier(
        algorithm=algorithm.name,
        lr=lrs,
        mix=mixes,
        probability=result.probability.numpy().reshape(shape),
        divergence_step=np.array(steps).reshape(shape),
        retain_loss=result.retain_loss[:, :, -1].mean(0).numpy().reshape(shape),
        forget_loss=result.forget_loss[:, :, -1].mean(0).numpy().reshape(shape),
    )
