"""The whole map of step sizes and mixes: where a run stops being safe, by rollout (T14)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stabkit._table import Shown, Table
from stabkit._validate import check_real
from stabkit.algorithms.base import Algorithm
from stabkit.curvature.lowrank import LinearisedNetwork
from stabkit.rollout import rollout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Frontier(Shown):
    """Predicted outcome over a grid of step sizes and mixes.

    Attributes:
        algorithm: Name of the algorithm.
        lr: Step sizes, ascending, shape (n_lr,).
        mix: Mixes, ascending, shape (n_mix,).
        probability: P(diverge) by the rollouts alone, shape (n_lr, n_mix); in each mix's column the largest so far, as a
            larger step is no safer. A report's also weighs how uncertain the boundary is, and so is nearer to one half.
        score: Mean over seeds of the logarithm of the worst retain loss over the divergence level, shape (n_lr, n_mix).
        divergence_step: Median predicted divergence step, NaN where none is predicted, shape (n_lr, n_mix).
        retain_loss: Predicted retain loss at the end of the run or when it blew up, mean over seeds, shape (n_lr, n_mix).
        forget_loss: The same for the forget set.
    """

    algorithm: str
    lr: np.ndarray
    mix: np.ndarray
    probability: np.ndarray
    score: np.ndarray
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

    def __str__(self) -> str:
        edges = ("–" if math.isnan(edge) else f"{edge:.3g}" for edge in self.critical_lr)
        return str(
            Table(
                title=f"{self.algorithm}: {self.lr.size} step sizes from {self.lr[0]:.3g} to {self.lr[-1]:.3g}, P(diverge)",
                columns=("mix", "critical step size", "P at the smallest", "P at the largest"),
                rows=tuple(
                    (f"{mix:.3g}", edge, f"{p[0]:.2f}", f"{p[-1]:.2f}")
                    for mix, edge, p in zip(self.mix, edges, self.probability.T, strict=True)
                ),
            )
        )

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

    Raises:
        ValueError: If there is no step size or no mix, or one is out of its domain.
    """
    for name, values in (("lr", lr), ("mix", mix)):
        if len(values) == 0:
            raise ValueError(f"`{name}` of `frontier` must name at least one value; got none.")
    for value in lr:
        check_real(value, name="lr", owner="frontier", low=0, low_open=True)
    for value in mix:
        check_real(value, name="mix", owner="frontier", low=0, high=1)
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
        probability=np.maximum.accumulate(result.probability.numpy().reshape(shape), axis=0),
        score=result.score.mean(0).numpy().reshape(shape),
        divergence_step=np.array(steps).reshape(shape),
        retain_loss=result.retain_loss[:, :, -1].mean(0).numpy().reshape(shape),
        forget_loss=result.forget_loss[:, :, -1].mean(0).numpy().reshape(shape),
    )
