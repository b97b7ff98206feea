"""Where the second moment leaves its bounds: the largest step size, the range of mixes, the smallest batch (T7, T8).

How each is found depends on what is known of the growth rate ρ as a function of it. Without momentum ρ is convex in the step
size and in the mix, so that bracketing finds the edges of the one interval there is; it falls with the batch size, with or
without momentum, so that bisection finds the smallest. With momentum neither is known for step size and mix, which are
scanned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from stabkit._validate import check_choice, check_int, check_real
from stabkit.stability.dynamics import LinearDynamics
from stabkit.stability.mean import step_limit
from stabkit.stability.mean_square import largest_eigenpair, mean_square, mean_square_from, start_matrix
from stabkit.stability.optimiser import Optimiser

ROUNDING = 1e-10  # what counts as zero beside D's largest eigenvalue
BEYOND = 1.3  # from one step size to the next where the scanned ones hold no crossing
SCANNED_DECADES = 4  # of step sizes below the one at which the mean overshoots
SCANNED_LRS = 33
SCANNED_MIXES = 41
SLACK = 1e-6  # of K·ln ρ: where no growth is allowed, rounding may not forbid a rate of exactly 1


def critical_lr_mean_square(dynamics: LinearDynamics, *, tolerance: float = 1e-6) -> float:
    """The largest step size that is stable in mean square: η* = 2/λ_max(C†E) (T7).

    Args:
        dynamics: The linearised process.
        tolerance: Relative accuracy.

    Returns:
        η*; 0 if D has a negative eigenvalue, or if batches act where D vanishes; infinite if there is no curvature.
        Cost: some 20 to 100 applications of E.
    """
    values, basis = torch.linalg.eigh(dynamics.mean_hessian())
    scale = float(values.abs().max())
    eye = torch.eye(dynamics.rank, dtype=values.dtype, device=values.device)
    total = float(dynamics.quadratic(eye).trace())
    if total == 0:
        return math.inf
    cut = ROUNDING * scale
    flat = values <= cut
    if float(values[0]) < -cut or bool(flat.all()):
        return 0.0
    null = basis[:, flat]
    # Where C vanishes, -2C + ηE is negative semi-definite only if E vanishes too, and E(Π) = 0 says that A_k Π = 0.
    if flat.any() and float(dynamics.quadratic(null @ null.T).trace()) > ROUNDING * total:
        return 0.0
    # In D's eigenbasis C is a diagonal: (λ_a + λ_b)/2.
    kept, v = values[~flat], basis[:, ~flat]
    root = ((kept[:, None] + kept[None, :]) / 2).rsqrt()

    def scaled(sigma: Tensor) -> Tensor:
        return root * (v.T @ dynamics.quadratic(v @ (root * sigma) @ v.T) @ v)

    largest, _ = largest_eigenpair(scaled, torch.diag(kept), tolerance)
    return 2 / largest


def critical_lr_within(
    dynamics: LinearDynamics,
    steps: int,
    growth: float,
    *,
    optimiser: Optimiser | None = None,
    tolerance: float = 1e-4,
) -> float:
    """The largest step size whose second moment grows at most by a factor within a horizon, K·ln ρ(T_η) <= ln G (T8).

    For any symmetric U, ρ(T_η) is at least ⟨U, T_η U⟩, a parabola in η that is 1 at η = 0. Its right crossing of the allowed
    rate is an upper bound, and the eigenmatrix found there gives the next parabola: a Newton iteration from above on a
    convex function, which therefore cannot miss. With momentum the step sizes over four decades below 2(1+β)/λ_max(D) are
    scanned (less for Nesterov's), eight a decade, and further up or down where the crossing is not among them; the first one
    found is bisected.

    Args:
        dynamics: The linearised process.
        steps: Horizon K >= 1.
        growth: Allowed factor G, >= 1; 1 asks for T7.
        optimiser: Momentum and the place of weight decay; plain steps when None.
        tolerance: Relative accuracy of the step size.

    Returns:
        The step size; 0 if none, infinite if every one will do. Cost: some 4 to 10 times that of `mean_square`; with
        momentum up to 50 times.

    Raises:
        ValueError: If the horizon or the growth is below 1.
    """
    check_int(steps, name="steps", owner="critical_lr_within", low=1)
    check_real(growth, name="growth", owner="critical_lr_within", low=1)
    check_real(tolerance, name="tolerance", owner="critical_lr_within", low=0, low_open=True)
    if optimiser is not None and optimiser.momentum > 0:
        excess = _excess(dynamics, steps, growth, optimiser)
        return _scanned_lr(dynamics, optimiser, excess, tolerance, some=growth > 1)
    if growth == 1:  # directions without curvature then hold ρ at 1, and the parabola through them says nothing
        return critical_lr_mean_square(dynamics)
    allowed = math.expm1(math.log(growth) / steps)
    d = dynamics.mean_hessian()

    def crossing(u: Tensor) -> float:
        slope = float((u * (d @ u)).sum())  # ⟨U, C U⟩ for a unit U
        bend = float((u * dynamics.quadratic(u)).sum())
        if bend <= 0:
            return math.inf
        return max(0.0, (slope + math.sqrt(max(0.0, slope**2 + bend * allowed))) / bend)

    start = torch.eye(dynamics.rank, dtype=d.dtype, device=d.device) / math.sqrt(dynamics.rank)
    lr = crossing(start)
    sigma = start_matrix(dynamics, lr) if 0 < lr < math.inf else start
    while 0 < lr < math.inf:
        found = mean_square_from(dynamics, lr, 1e-2 * tolerance, sigma)
        sigma = found.eigenmatrix
        lower = crossing(sigma / sigma.norm())
        if lower >= lr * (1 - tolerance):
            return min(lower, lr)
        lr = lower
    return lr


@dataclass(frozen=True, kw_only=True)
class MixRange:
    """Mixes whose second moment stays in bounds over a horizon, at one step size.

    Attributes:
        low: Smallest such mix; above 0 where fine-tuning on the retain set alone leaves the bounds; NaN if there is none.
        high: Largest such mix, up to which from `low` all are such; NaN if there is none.
        method: "bracketing", exact to the tolerance, as growth is convex in the mix; or "scan", with momentum: the first
            range found on a grid, its edges bisected.
    """

    low: float
    high: float
    method: str

    @property
    def found(self) -> bool:
        """Whether any mix stays in bounds."""
        return not math.isnan(self.high)


def critical_mix_within(
    dynamics: LinearDynamics,
    *,
    lr: float,
    steps: int,
    growth: float,
    optimiser: Optimiser | None = None,
    tolerance: float = 1e-3,
) -> MixRange:
    """The mixes at which the second moment grows at most by a factor within a horizon, K·ln ρ <= ln G (T8).

    For any Σ, ⟨Σ, T Σ⟩ is a parabola in α that opens upward, and ρ the maximum of such: convex, hence the mixes are one
    interval. With momentum that is not known, and a grid of 41 mixes is scanned.

    Args:
        dynamics: The linearised process; its mix is left out.
        lr: Step size η > 0.
        steps: Horizon K >= 1.
        growth: Allowed factor G, >= 1.
        optimiser: Momentum and the place of weight decay; plain steps when None.
        tolerance: Absolute accuracy of the mixes.

    Returns:
        The range. Cost: 2 to 40 times that of `mean_square`; with momentum up to 60 times.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain.
    """
    owner = "critical_mix_within"
    check_real(lr, name="lr", owner=owner, low=0, low_open=True)
    check_int(steps, name="steps", owner=owner, low=1)
    check_real(growth, name="growth", owner=owner, low=1)
    check_real(tolerance, name="tolerance", owner=owner, low=0, low_open=True)
    how = optimiser or Optimiser()

    def excess(mix: float) -> float:
        return _excess(dynamics.at(mix), steps, growth, how)(lr)

    if how.momentum > 0:
        grid = np.linspace(0, 1, SCANNED_MIXES)
        inside = [excess(float(mix)) <= 0 for mix in grid]
        if not any(inside):
            return MixRange(low=math.nan, high=math.nan, method="scan")
        first = inside.index(True)
        last = next((i for i in range(first, len(grid)) if not inside[i]), len(grid)) - 1
        low = 0.0 if first == 0 else _bisect(excess, float(grid[first]), float(grid[first - 1]), tolerance)
        high = 1.0 if last == len(grid) - 1 else _bisect(excess, float(grid[last]), float(grid[last + 1]), tolerance)
        return MixRange(low=low, high=high, method="scan")
    ends = excess(0.0) <= 0, excess(1.0) <= 0
    best = 0.0 if ends[0] else 1.0
    if not any(ends):
        best = float(scipy.optimize.minimize_scalar(excess, bounds=(0, 1), options={"xatol": tolerance / 10}).x)
        if excess(best) > 0:
            return MixRange(low=math.nan, high=math.nan, method="bracketing")
    return MixRange(
        low=0.0 if ends[0] else _bisect(excess, best, 0.0, tolerance),
        high=1.0 if ends[1] else _bisect(excess, best, 1.0, tolerance),
        method="bracketing",
    )


def critical_batch_within(
    dynamics: LinearDynamics,
    *,
    lr: float,
    steps: int,
    growth: float,
    which: str = "both",
    optimiser: Optimiser | None = None,
) -> int | None:
    """The smallest batch whose second moment grows at most by a factor within a horizon, K·ln ρ <= ln G (T8).

    The noise level falls with the batch size, and with it ρ, as the map keeps semi-definite matrices so: bisection.

    Args:
        dynamics: The linearised process; a batch size in question is left out.
        lr: Step size η > 0.
        steps: Horizon K >= 1.
        growth: Allowed factor G, >= 1.
        which: "retain" or "forget", with the other set's batch as it is, or "both": the same size for both, but no more
            than a set has.
        optimiser: Momentum and the place of weight decay; plain steps when None.

    Returns:
        The batch size, at most the (larger) set's; None if even full batches do not stay in bounds. With replacement a batch
        of n samples is no full batch, but larger ones are not looked at either. Cost: log₂ n times that of `mean_square`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain.
    """
    owner = "critical_batch_within"
    check_real(lr, name="lr", owner=owner, low=0, low_open=True)
    check_int(steps, name="steps", owner=owner, low=1)
    check_real(growth, name="growth", owner=owner, low=1)
    check_choice(which, name="which", owner=owner, choices=("retain", "forget", "both"))
    populations = dynamics.retain.population, dynamics.forget.population
    chosen = {"retain": (True, False), "forget": (False, True), "both": (True, True)}[which]

    def fits(batch: int) -> bool:
        sizes = tuple(
            min(batch, population) if mine else kept
            for mine, population, kept in zip(chosen, populations, dynamics.batch_sizes, strict=True)
        )
        changed = replace(dynamics, batch_sizes=(sizes[0], sizes[1]))
        return _excess(changed, steps, growth, optimiser or Optimiser())(lr) <= 0

    low, high = 0, max(n for mine, n in zip(chosen, populations, strict=True) if mine)
    if not fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _excess(dynamics: LinearDynamics, steps: int, growth: float, how: Optimiser) -> Callable[[float], float]:
    """K·ln ρ - ln G as a function of the step size."""

    def excess(lr: float) -> float:
        return mean_square(dynamics, lr, optimiser=how).growth(steps) - math.log(growth) - SLACK

    return excess


def _scanned_lr(
    dynamics: LinearDynamics, how: Optimiser, excess: Callable[[float], float], tolerance: float, *, some: bool
) -> float:
    """First crossing on a grid of step sizes, bisected; where `some` growth is allowed small enough steps always will do."""
    values = torch.linalg.eigvalsh(dynamics.mean_hessian())
    largest = float(values.abs().max())
    if largest == 0:
        return math.inf
    top = step_limit(largest, momentum=how.momentum, nesterov=how.nesterov)  # beyond it the mean overshoots
    grid = np.geomspace(top * 10.0**-SCANNED_DECADES, top * 1.01, SCANNED_LRS)
    crossed = next((i for i, lr in enumerate(grid) if excess(float(lr)) > 0), None)
    if crossed == 0 and not some:
        return 0.0
    if crossed is None:  # above, where it is once steps are large enough: K·ln ρ grows without end
        inside, outside = float(grid[-1]), BEYOND * float(grid[-1])
        while excess(outside) <= 0:
            inside, outside = outside, BEYOND * outside
            if not math.isfinite(outside):
                return math.inf
    elif crossed == 0:  # below: what grows slowly takes the horizon's many steps
        inside, outside = float(grid[0]) / BEYOND, float(grid[0])
        while excess(inside) > 0:
            inside, outside = inside / BEYOND, inside
            if inside == 0:
                return 0.0
    else:
        inside, outside = float(grid[crossed - 1]), float(grid[crossed])
    return math.exp(_bisect(lambda x: excess(math.exp(x)), math.log(inside), math.log(outside), tolerance))


def _bisect(excess: Callable[[float], float], inside: float, outside: float, tolerance: float) -> float:
    """The last value known to be inside, within a tolerance of one known to be outside."""
    while abs(outside - inside) > tolerance:
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
    return inside
