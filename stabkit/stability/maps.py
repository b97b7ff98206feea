"""Maps of the growth rate over two settings at a time, and the contours in them (T8)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from stabkit._progress import progress_bar
from stabkit._table import Shown, number
from stabkit._validate import check_choice, check_int, check_real
from stabkit.stability.dynamics import LinearDynamics
from stabkit.stability.mean_square import mean_square
from stabkit.stability.optimiser import Optimiser
from stabkit.stability.reduced import Setting, reduced_radii

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = ("lr", "mix", "retain_batch", "forget_batch", "batch", "momentum")
LOGARITHMIC = ("lr", "retain_batch", "forget_batch", "batch")


@dataclass(frozen=True, kw_only=True, eq=False)
class StabilityMap(Shown):
    """ρ over a grid of two settings, the others held fixed.

    Attributes:
        names: The two axes, of `AXES`.
        values: Their values, ascending, shapes (n_1,) and (n_2,).
        radius: ρ of T_η, shape (n_1, n_2): the factor by which E‖δ‖² grows a step, in the end.
        residual: What its eigenmatrix leaves unsolved, relative to ρ, the same shape.
        applications: Second moments that the samples' curvature was applied to, where momentum is 0 throughout; else None.
    """

    names: tuple[str, str]
    values: tuple[np.ndarray, np.ndarray]
    radius: np.ndarray
    residual: np.ndarray
    applications: int | None

    def __str__(self) -> str:
        axes = " and ".join(
            f"{name} ({len(values)} values, {number(float(values.min()))} to {number(float(values.max()))})"
            for name, values in zip(self.names, self.values, strict=True)
        )
        low, high = float(self.radius.min()), float(self.radius.max())
        worst = float(self.residual.max())
        return (
            f"Mean-square stability over {axes}: ρ from {number(low)} to {number(high)}, below 1 on "
            f"{float((self.radius < 1).mean()):.0%} of the grid; relative residuals up to {number(worst)}"
        )

    def growth(self, steps: int) -> np.ndarray:
        """K·ln ρ (T8).

        Args:
            steps: Horizon K >= 1.

        Returns:
            Shape (n_1, n_2); minus infinity where ρ is 0.
        """
        check_int(steps, name="steps", owner="StabilityMap.growth", low=1)
        with np.errstate(divide="ignore"):
            return steps * np.log(self.radius)

    def contour(self, steps: int, growth: float = 1.0) -> list[np.ndarray]:
        """Lines K·ln ρ = ln G: where the second moment grows just so much within the horizon.

        Args:
            steps: Horizon K >= 1.
            growth: Factor G > 0; 1 is the boundary of mean-square stability.

        Returns:
            Polylines of shape (points, 2), a value of the first and of the second setting each; interpolated linearly in
            ln ρ and in the settings, step size and batch in logarithms. None where the map does not cross the level.

        Raises:
            ValueError: If the factor is not positive, or a setting has but one value.
        """
        from contourpy import contour_generator

        check_real(growth, name="growth", owner="StabilityMap.contour", low=0, low_open=True)
        level = math.log(growth)
        height = np.clip(self.growth(steps), level - 1e6, level + 1e6)
        x, y = (
            np.log(values) if name in LOGARITHMIC else values
            for name, values in zip(self.names, self.values, strict=True)
        )
        if min(x.size, y.size) < 2:
            raise ValueError(
                f"`contour` of a map needs two values of each setting; got {x.size} of {self.names[0]} and {y.size} of "
                f"{self.names[1]}. Ask `stability_map` for more."
            )
        lines = contour_generator(y, x, height).lines(level)
        points = [np.asarray(line)[:, ::-1] for line in lines]
        logarithmic = np.array([name in LOGARITHMIC for name in self.names])
        return [np.where(logarithmic, np.exp(line), line) for line in points]

    def plot(self, steps: int, *, growth: float = 1.0, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Heatmap of K·ln ρ with the contour of one growth.

        Args:
            steps: Horizon K >= 1.
            growth: Factor G of the contour.
            ax: Axes to draw in; new ones when None.

        Returns:
            Figure and axes.
        """
        from stabkit.plots import plot_stability_map  # plots are loaded only when drawn

        return plot_stability_map(self, steps=steps, growth=growth, ax=ax)


def stability_map(
    dynamics: LinearDynamics,
    axes: dict[str, Sequence[float]],
    *,
    lr: float | None = None,
    optimiser: Optimiser | None = None,
    tolerance: float = 1e-3,
    max_basis: int = 300,
    progress: bool = False,
) -> StabilityMap:
    """ρ(T_η) over any two of step size, mix, batch sizes and momentum, from one set of per-sample curvature (T6, T8).

    Args:
        dynamics: The linearised process; what is no axis is read from it.
        axes: Two settings with their values, in any order: "lr", "mix", "retain_batch", "forget_batch", "batch" (of both
            sets, but no more than a set has) or "momentum".
        lr: Step size, where it is no axis.
        optimiser: Momentum, where it is no axis, and its kind; plain steps when None.
        tolerance: Residual of an eigenmatrix at which its setting counts as solved, relative to ρ; the error of ρ is of
            second order in it where the eigenvalue stands alone.
        max_basis: Second moments kept at most, where momentum is 0 throughout.
        progress: Whether to show a progress bar.

    Returns:
        The map. Cost without momentum: some 50 to 200 applications of the samples' curvature for the whole map, whatever
        its size, each 2·(m_R + m_F)·C·r², and memory of 4·r² numbers for each. With momentum some 20 to 100 applications for
        every point.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there are not two axes, one has no values or values out of its domain, or the step size is missing.
    """
    owner = "stability_map"
    if len(axes) != 2:
        raise ValueError(f"`axes` of `{owner}` must name two settings; got {len(axes)} of them. Choose two of {AXES}.")
    for name, values in axes.items():
        check_choice(name, name="axes", owner=owner, choices=AXES)
        if len(values) == 0:
            raise ValueError(f"`axes` of `{owner}` must hold values; got none for {name!r}.")
    if {"batch", "retain_batch"} <= set(axes) or {"batch", "forget_batch"} <= set(axes):
        raise ValueError(
            f'`axes` of `{owner}` must not set a batch size twice; got {sorted(axes)}. "batch" sets both sets\' sizes.'
        )
    if ("lr" in axes) == (lr is not None):
        raise ValueError(
            f"`lr` of `{owner}` must be given exactly where it is no axis; got lr={lr!r} with axes {sorted(axes)}."
        )
    check_real(tolerance, name="tolerance", owner=owner, low=0, low_open=True)
    check_int(max_basis, name="max_basis", owner=owner, low=16)
    first, second = axes
    names = first, second
    grids = np.unique(np.asarray(axes[first], dtype=float)), np.unique(np.asarray(axes[second], dtype=float))
    how = optimiser or Optimiser()
    grid = [{first: float(a), second: float(b)} for a, b in itertools.product(*grids)]
    settings = [_setting(dynamics, point, lr, owner) for point in grid]
    momenta = [_momentum(point, how, owner) for point in grid]
    shape = grids[0].size, grids[1].size
    if not any(momenta):
        radius, residual, applications = reduced_radii(
            dynamics, settings, tolerance=tolerance, max_basis=max_basis, progress=progress
        )
        return StabilityMap(
            names=names,
            values=grids,
            radius=radius.clamp(min=0).cpu().numpy().reshape(shape),
            residual=residual.cpu().numpy().reshape(shape),
            applications=applications,
        )
    found = []
    for setting, beta in progress_bar(list(zip(settings, momenta, strict=True)), "stability map", progress):
        process = replace(dynamics, mix=setting.mix, batch_sizes=setting.batch_sizes)
        nesterov = how.nesterov and beta > 0
        kind = Optimiser(momentum=beta, nesterov=nesterov, decoupled=how.decoupled)
        found.append(mean_square(process, setting.lr, optimiser=kind, tolerance=tolerance))
    return StabilityMap(
        names=names,
        values=grids,
        radius=np.array([f.radius for f in found]).reshape(shape),
        residual=np.array([f.residual / f.radius if f.radius > 0 else 0.0 for f in found]).reshape(shape),
        applications=None,
    )


def _setting(dynamics: LinearDynamics, point: dict[str, float], lr: float | None, owner: str) -> Setting:
    """The setting at a point of the grid, checked."""
    eta = check_real(point.get("lr", lr), name="lr", owner=owner, low=0, low_open=True)
    alpha = check_real(point.get("mix", dynamics.mix), name="mix", owner=owner, low=0, high=1)
    sizes = []
    for place, part in enumerate((dynamics.retain, dynamics.forget)):
        name = ("retain_batch", "forget_batch")[place]
        limit = None if dynamics.sampling == "with_replacement" else part.population
        if "batch" in point:
            common = _whole(point["batch"], "batch", owner)
            sizes.append(common if limit is None else min(common, limit))
        elif name in point:
            sizes.append(check_int(_whole(point[name], name, owner), name=name, owner=owner, low=1, high=limit))
        else:
            sizes.append(dynamics.batch_sizes[place])
    return Setting(lr=eta, mix=alpha, batch_sizes=(sizes[0], sizes[1]))


def _whole(value: float, name: str, owner: str) -> int:
    """A batch size out of an array of floats."""
    return check_int(int(value) if float(value).is_integer() else value, name=name, owner=owner, low=1)


def _momentum(point: dict[str, float], how: Optimiser, owner: str) -> float:
    return check_real(point.get("momentum", how.momentum), name="momentum", owner=owner, low=0, high=1, high_open=True)
