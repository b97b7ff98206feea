"""(H + λI)^{-1} v from products alone, by conjugate gradients for many right-hand sides at once.

Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49, 1952; with an outcome that says why the solve ended.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._memory import sent
from stabkit._progress import progress_bar
from stabkit._table import Shown, number
from stabkit._validate import check_int, check_real
from stabkit.curvature.operators import CurvatureOperator
from stabkit.preconditioner import Diagonal
from stabkit.spectrum._common import ROUNDING, check_product

OWNER = "damped_inverse"
SLACK = 0.9  # of the tolerance is aimed at: the residual carried along and the true one differ by rounding
IMPROVED = 0.5  # a restart from the true residual must bring it below this share, or rounding has the last word


class SolveOutcome(enum.Enum):
    """End of a linear solve; `reason` says what happened and `remedy` which argument to change."""

    CONVERGED = "every residual is within the tolerance", "nothing to do"
    BUDGET = (
        "the products ran out before every residual was within the tolerance",
        "raise `max_products`, `damping` or `tolerance`, or give a `preconditioner`",
    )
    INDEFINITE = (
        "a search direction met curvature that the damping does not make positive: (a) H has negative eigenvalues, as a "
        "Hessian has, (b) H is singular and the damping is 0",
        "raise `damping` well above minus the smallest curvature met, or take the Gauss-Newton matrix",
    )
    INACCURATE = (
        "the residual carried along converged and the recomputed one did not: (a) rounding, as the damping is small beside "
        "the largest curvature, (b) products that differ from call to call, or an operator that is not symmetric",
        "compute in float64, raise `damping`, or loosen `tolerance`",
    )

    @property
    def reason(self) -> str:
        """What happened."""
        return self.value[0]

    @property
    def remedy(self) -> str:
        """What to change."""
        return self.value[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class DampedSolution(Shown):
    """Solutions of (H + λI) x = v, one for each right-hand side.

    Attributes:
        vectors: x, of the right-hand sides' shape (d,) or (d, k), in the operator's dtype and on its device.
        residuals: ‖v - (H + λI)x‖ / ‖v‖ of each, recomputed, shape (k,), float64; 0 where v = 0.
        curvature: Smallest pᵀHp / pᵀp over the search directions p, without the damping: H has an eigenvalue no larger.
            Infinite where there was nothing to solve.
        damping: λ.
        outcome: How the solve ended, with its reason and remedy: INDEFINITE before BUDGET before INACCURATE where right-hand
            sides differ.
        products: Matrix-vector products spent on all of them.
    """

    vectors: Tensor
    residuals: Tensor
    curvature: float
    damping: float
    outcome: SolveOutcome
    products: int

    @property
    def converged(self) -> bool:
        """Whether every residual met the tolerance; otherwise these are the best there were."""
        return self.outcome is SolveOutcome.CONVERGED

    @property
    def reason(self) -> str:
        """Why the solve ended."""
        return self.outcome.reason

    @property
    def remedy(self) -> str:
        """What to change if that is not good enough."""
        return self.outcome.remedy

    def __str__(self) -> str:
        size, sides = self.vectors.shape[0], self.residuals.numel()
        worst = float(self.residuals.max()) if sides else 0.0
        advice = "" if self.converged else f"; {self.remedy}"
        return (
            f"(H + λI) x = v with λ = {number(self.damping)}: {sides} right-hand {'side' if sides == 1 else 'sides'} of "
            f"{size:,} numbers, relative residuals up to {number(worst)} after {self.products:,} products: "
            f"{self.reason}{advice}"
        )


def damped_inverse(
    operator: CurvatureOperator,
    vectors: Tensor,
    *,
    damping: float,
    tolerance: float = 1e-4,
    max_products: int = 200,
    preconditioner: Diagonal | None = None,
    progress: bool = False,
) -> DampedSolution:
    """(H + λI)^{-1} v by conjugate gradients, for one vector or a block of them.

    Every right-hand side has its own recurrence. They share one block product a step, and those that have converged drop
    out of it. Where the recomputed residual is larger than the one carried along, the recurrence starts again from it.

    Args:
        operator: H, symmetric of order d.
        vectors: Right-hand sides v, shape (d,) or (d, k).
        damping: λ >= 0. H + λI must be positive definite where the search goes.
        tolerance: Largest ‖v - (H + λI)x‖ to accept, as a share of ‖v‖; no tighter than 100 rounding units.
        max_products: Products for each right-hand side, at least 2, after which the best there is is returned; never
            exceeded.
        preconditioner: diag(p), p > 0, near (H + λI)^{-1}; it changes how fast the solve is, not the solution.
            It helps where parameters differ in scale. A Gauss-Newton matrix of low rank it may spread out: over the small
            network of the demo plain steps were 1.3 to 5 times cheaper.
        progress: Whether to show a progress bar over the steps.

    Returns:
        The solutions with their true residuals. Cost: a product for each step and right-hand side, the steps about
        ½√κ·ln(2/tolerance) with κ the condition of H + λI and fewer where its eigenvalues cluster, and one product more to
        recompute a residual. Memory: 5·d·k numbers.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain or does not fit the operator, or the products are not finite.
    """
    check_real(damping, name="damping", owner=OWNER, low=0)
    check_real(tolerance, name="tolerance", owner=OWNER, low=0)
    check_int(max_products, name="max_products", owner=OWNER, low=2, remedy="A step and its residual take as many.")
    d = operator.shape[0]
    if vectors.dim() not in {1, 2} or vectors.shape[0] != d:
        raise ValueError(
            f"`vectors` of `{OWNER}` must be of shape ({d},) or ({d}, k), as the operator is of order {d}; got "
            f"{tuple(vectors.shape)}."
        )
    right = vectors.to(operator.device, operator.dtype).reshape(d, -1)
    wrong = right.numel() - int(torch.isfinite(right).sum())
    if wrong:
        raise ValueError(
            f"`vectors` of `{OWNER}` must be finite; got {wrong} of {right.numel()} entries NaN or infinite."
        )
    accepted = max(tolerance, ROUNDING * torch.finfo(operator.dtype).eps)
    solve = _Solve(operator, damping, preconditioner_column(preconditioner, operator), max_products, progress)
    norms = right.norm(dim=0, dtype=torch.float64).cpu()
    x, residual = torch.zeros_like(right), right.clone()
    relative = (norms > 0).double()
    indefinite = torch.zeros(norms.numel(), dtype=torch.bool)
    left = (norms > 0).nonzero().flatten()
    while left.numel() and solve.steps_left:
        columns = sent(left, right.device)
        found, met = solve.descend(residual[:, columns], SLACK * accepted * norms[left])
        x[:, columns] += found
        image, finite = solve.damped(x[:, columns])
        rest = right[:, columns] - image
        residual[:, columns] = rest
        before, sizes = relative[left], solve.read([rest.norm(dim=0, dtype=torch.float64)], image, finite)[0]
        relative[left] = sizes / norms[left]
        indefinite[left[met]] = True
        left = left[~met & (relative[left] > accepted) & (relative[left] < IMPROVED * before)]
    missed = relative > accepted
    outcome = SolveOutcome.CONVERGED
    if bool((missed & indefinite).any()):
        outcome = SolveOutcome.INDEFINITE
    elif bool(missed.any()):
        outcome = SolveOutcome.INACCURATE if solve.steps_left else SolveOutcome.BUDGET
    return DampedSolution(
        vectors=x.reshape(vectors.shape),
        residuals=relative,
        curvature=solve.curvature,
        damping=float(damping),
        outcome=outcome,
        products=solve.products,
    )


class _Solve:
    """Conjugate gradients on H + λI with a common budget of block products."""

    def __init__(
        self, operator: CurvatureOperator, damping: float, scale: Tensor | None, max_products: int, progress: bool
    ) -> None:
        self._operator, self._damping, self._scale = operator, damping, scale
        self._bar: Iterator[int] = iter(progress_bar(range(max_products), "damped inverse", progress))
        self._floor = 10 * torch.finfo(operator.dtype).eps
        self._room = max_products
        self.products = 0
        self.curvature = math.inf

    @property
    def steps_left(self) -> int:
        """Steps that leave a product for the residual."""
        return max(0, self._room - 1)

    def damped(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """(H + λI) X, one block product, and how many entries of HX are finite; `read` checks that all of them are."""
        next(self._bar, None)
        self._room -= 1
        self.products += block.shape[1]
        image = self._operator @ block
        return image + self._damping * block, torch.isfinite(image).sum()

    def read(self, rows: list[Tensor], image: Tensor, finite: Tensor) -> Tensor:
        """Numbers that came of a product, a row for each kind, on the host, which waits for them once."""
        found = torch.cat([*rows, finite.double().reshape(1)]).cpu()
        check_product(int(found[-1]), image.numel(), owner=OWNER)
        return found[:-1].reshape(len(rows), -1)

    def descend(self, residual: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections to x from residuals (d, k), and which columns met curvature that is not positive."""
        x = torch.zeros_like(residual)
        met = torch.zeros(residual.shape[1], dtype=torch.bool)
        active = torch.arange(residual.shape[1])
        columns = sent(active, residual.device)
        r, p = residual, self._precondition(residual)
        energy = _dot(r, p)  # rᵀMr
        while active.numel() and self.steps_left:
            image, finite = self.damped(p)
            bent, length = _dot(p, image), _dot(p, p)  # pᵀ(H + λI)p
            # Beside rounding; on a definite matrix of condition κ, pᵀAp is at least 2‖p‖‖Ap‖/√κ.
            sound = bent > self._floor * (length * _dot(image, image)).sqrt()
            step = torch.where(sound, energy / bent, 0.0).to(r)
            x[:, columns] += p * step
            r = r - image * step
            curvatures, even, sizes = self.read(
                [bent / length, sound.double(), r.norm(dim=0, dtype=torch.float64)], image, finite
            )
            self.curvature = min(self.curvature, float(curvatures.min()) - self._damping)
            met[active[even == 0]] = True
            going = (even > 0) & (sizes > goals[active])
            if not bool(going.all()):
                places = sent(going.nonzero().flatten(), r.device)
                active, columns = active[going], columns[places]
                r, p, energy = r[:, places], p[:, places], energy[places]
            z = self._precondition(r)
            renewed = _dot(r, z)
            p = z + p * (renewed / energy).to(r)
            energy = renewed
        return x, met

    def _precondition(self, block: Tensor) -> Tensor:
        return block if self._scale is None else block * self._scale


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the columns, shape (k,), summed in float64."""
    return (left * right).sum(0, dtype=torch.float64)


def preconditioner_column(
    preconditioner: Diagonal | None, operator: CurvatureOperator, *, owner: str = OWNER
) -> Tensor | None:
    """The preconditioner's diagonal as a column, checked.

    Args:
        preconditioner: diag(p), p > 0, or None.
        operator: H.
        owner: The public function or class that was given it, for the error.

    Returns:
        p, shape (d, 1), on the operator's device; None where there is none.

    Raises:
        TypeError: If it is no `Diagonal`.
        ValueError: If it is of another order than the operator, or an entry is not positive.
    """
    if preconditioner is None:
        return None
    if not isinstance(preconditioner, Diagonal):
        raise TypeError(
            f"`preconditioner` of `{owner}` must be a Diagonal or None; got {type(preconditioner).__name__}. "
            "`diagonal_inverse` makes one."
        )
    diagonal = preconditioner.diagonal.to(operator.device, operator.dtype)
    if diagonal.shape != operator.shape[:1]:
        raise ValueError(
            f"`preconditioner` of `{owner}` must be of the operator's order {operator.shape[0]}; got "
            f"{tuple(diagonal.shape)}."
        )
    if not bool((diagonal > 0).all()):
        raise ValueError(
            f"`preconditioner` of `{owner}` must have positive entries; got {float(diagonal.min()):g}. A parameter with 0 "
            "would never be solved for: raise the damping of `diagonal_inverse`."
        )
    return diagonal.unsqueeze(1)
