"""Extreme eigenpairs as a result, and how each solver's vectors become one: by quotients and residuals from new products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.curvature.operators import CurvatureOperator
from stabkit.spectrum._common import ROWS_AT_ONCE, product
from stabkit.spectrum.outcome import SolverOutcome

OWNER = "extreme_eigenpairs"


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenpairs:
    """Eigenpairs at one or both ends of a symmetric operator's spectrum, by ascending eigenvalue.

    Attributes:
        values: Rayleigh quotients of the vectors, shape (k,), float64.
        vectors: Unit vectors, shape (d, k), in the operator's dtype and on its device.
        residuals: ‖Av - λv‖ of every pair, recomputed, shape (k,); a true eigenvalue lies within this of each value.
        scale: The largest |λ| met, which the tolerance is a share of.
        outcome: How the run ended, with its reason and remedy.
        products: Matrix-vector products behind the pairs, those before a resumed checkpoint included.
        restarts: Times the basis was cut back to the wanted pairs.
        widened: Times the basis was doubled and given fresh directions because the residuals had stopped falling.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    scale: float
    outcome: SolverOutcome
    products: int
    restarts: int = 0
    widened: int = 0

    @property
    def converged(self) -> bool:
        """Whether every pair met the tolerance; otherwise these are the best there were."""
        return self.outcome is SolverOutcome.CONVERGED

    @property
    def reason(self) -> str:
        """Why the run ended."""
        return self.outcome.reason

    @property
    def remedy(self) -> str:
        """What to change if that is not good enough."""
        return self.outcome.remedy

    @property
    def smallest(self) -> float:
        """The smallest of the values."""
        return float(self.values[0])

    @property
    def largest(self) -> float:
        """The largest of the values."""
        return float(self.values[-1])


def places(size: int, ends: int, which: str) -> list[int]:
    """Places of the wanted ones in an ascending sequence."""
    low = range(min(ends, size)) if which != "largest" else ()
    high = range(max(0, size - ends), size) if which != "smallest" else ()
    return sorted({*low, *high})


def recomputed(
    operator: CurvatureOperator,
    vectors: Tensor,
    *,
    scale: float,
    tolerance: float,
    outcome: SolverOutcome,
    products: int,
) -> Eigenpairs:
    """Rayleigh quotients and true residuals of a solver's vectors, at one product each.

    Args:
        operator: Symmetric operator of order d.
        vectors: Shape (d, k), of any length each.
        scale: The largest |λ| that the solver met.
        tolerance: Largest residual to accept, as a share of the scale.
        outcome: How the solver ended.
        products: Products it spent.

    Returns:
        The pairs.
    """
    vectors = vectors / vectors.norm(dim=0)
    image = product(operator, vectors, owner=OWNER)
    # In double precision by some rows at a time, as whole copies would be four times the vectors.
    rows = list(zip(vectors.split(ROWS_AT_ONCE), image.split(ROWS_AT_ONCE), strict=True))
    squares = torch.stack([v.double().square().sum(0) for v, _ in rows]).sum(0)
    values = torch.stack([(v.double() * a.double()).sum(0) for v, a in rows]).sum(0) / squares
    wrong = torch.stack([(a.double() - v.double() * values).square().sum(0) for v, a in rows]).sum(0)
    return judged(
        vectors,
        values=values,
        residuals=wrong.sqrt(),
        scale=max(scale, float(values.abs().max())),
        tolerance=tolerance,
        outcome=outcome,
        products=products + vectors.shape[1],
    )


def judged(
    vectors: Tensor,
    *,
    values: Tensor,
    residuals: Tensor,
    scale: float,
    tolerance: float,
    outcome: SolverOutcome,
    products: int,
) -> Eigenpairs:
    """The result, whose outcome the true residuals decide.

    Args:
        vectors: Unit vectors, shape (d, k).
        values: Their Rayleigh quotients, shape (k,).
        residuals: ‖Av - λv‖ of each, shape (k,).
        scale: The largest |λ| met.
        tolerance: Largest residual to accept, as a share of the scale.
        outcome: How the solver ended.
        products: Products behind the pairs.

    Returns:
        The pairs by ascending value.
    """
    if bool((residuals <= tolerance * scale).all()):
        outcome = SolverOutcome.CONVERGED
    elif outcome is SolverOutcome.CONVERGED:
        outcome = SolverOutcome.INACCURATE
    order = values.argsort(stable=True)  # Rayleigh quotients may differ in order from the values they refine
    return Eigenpairs(
        values=values[order].cpu(),
        vectors=vectors[:, order],
        residuals=residuals[order].cpu(),
        scale=scale,
        outcome=outcome,
        products=products,
    )
