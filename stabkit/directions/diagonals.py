"""Diagonals of curvature matrices, which invert entry by entry: estimated from products, or exact from gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._progress import progress_bar
from stabkit._validate import check_int, check_real
from stabkit.curvature.gradients import gradient_blocks, summed_squares
from stabkit.curvature.operators import CurvatureOperator
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem
from stabkit.samples import Samples
from stabkit.spectrum._common import product, rademacher


@dataclass(frozen=True, kw_only=True, eq=False)
class DiagonalEstimate:
    """diag(H) as a mean over independent probes, entry by entry.

    Attributes:
        values: The estimate, shape (d,), float64.
        standard_error: Of every entry, from the spread over probes, shape (d,); 0 where it is exact.
        samples: Independent probes behind the error.
        products: Matrix-vector products spent.
    """

    values: Tensor
    standard_error: Tensor
    samples: int
    products: int

    def inverse(self, damping: float) -> Diagonal:
        """diag(1 / (max(h, 0) + λ)).

        Args:
            damping: λ > 0.

        Returns:
            The damped inverse, an entry that came out negative counting as 0.
        """
        return diagonal_inverse(self.values, damping=damping)


def hutchinson_diagonal(
    operator: CurvatureOperator, *, probes: int = 100, at_once: int = 16, seed: int = 0, progress: bool = False
) -> DiagonalEstimate:
    """diag(H) as the mean of z ∘ Hz over random signs z (Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57, 2007).

    Args:
        operator: Symmetric operator of order d.
        probes: Signs to draw, at least 2; from d on the unit vectors take their place, which are exact.
        at_once: Vectors multiplied at once.
        seed: Seed of the signs.
        progress: Whether to show a progress bar over the blocks.

    Returns:
        The estimate, unbiased; an entry's variance is Σ_{l≠j} H_jl² / probes, in which small entries of heavy rows drown.
        Cost: min(probes, d) products. Memory: d·(2·at_once + 3) numbers.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain or the products are not finite.
    """
    owner = "hutchinson_diagonal"
    check_int(probes, name="probes", owner=owner, low=2, remedy="One has no standard error.")
    check_int(at_once, name="at_once", owner=owner, low=1)
    d = operator.shape[0]
    exact, count = probes >= d, min(probes, d)
    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros(d, dtype=torch.float64, device=operator.device)
    scatter = torch.zeros_like(mean)  # sum of squared deviations from the mean
    for start in progress_bar(range(0, count, at_once), "diagonal", progress):
        width = min(at_once, count - start)
        if exact:
            block = torch.zeros(d, width, dtype=operator.dtype, device=operator.device)
            block[torch.arange(start, start + width), torch.arange(width)] = 1
        else:
            block = rademacher(d, width, generator).T.to(operator.device, operator.dtype)
        forms = (block * product(operator, block, owner=owner)).double()
        if exact:
            mean += forms.sum(1)
            continue
        shift = forms.mean(1) - mean  # two means into one (Chan, Golub and LeVeque)
        scatter += (forms - forms.mean(1, keepdim=True)).square().sum(1) + shift.square() * start * width / (
            start + width
        )
        mean += shift * (width / (start + width))
    error = torch.zeros_like(mean) if exact else (scatter / (count - 1)).sqrt() / math.sqrt(count)
    return DiagonalEstimate(values=mean, standard_error=error, samples=count, products=count)


def fisher_diagonal(problem: UnlearningProblem, samples: Samples, *, indices: Tensor | None = None) -> Tensor:
    """Diagonal of the empirical Fisher of one set, mean_i g_i ∘ g_i: exact.

    Squares of per-sample gradients, not of a batch's mean, which would fall with the batch's size.

    Args:
        problem: The unlearning problem.
        samples: The set.
        indices: Which of its samples; all when None.

    Returns:
        Vector of shape (d,), float64, entries >= 0. Cost: one gradient a sample.
    """
    total = torch.zeros(problem.size, dtype=torch.float64, device=problem.device)
    for block in gradient_blocks(problem, samples, indices):
        total += summed_squares(problem, block)
    return total / (samples.size if indices is None else indices.numel())


def diagonal_inverse(diagonal: Tensor, *, damping: float) -> Diagonal:
    """diag(1 / (max(h, 0) + λ)).

    Args:
        diagonal: h, shape (d,). Negative entries, which a Hessian may have and an estimate may get, count as 0.
        damping: λ > 0.

    Returns:
        The damped inverse as a preconditioner.

    Raises:
        TypeError: If the damping is no number.
        ValueError: If the damping is not positive.
    """
    remedy = "An entry of 0 has no inverse without it."
    check_real(damping, name="damping", owner="diagonal_inverse", low=0, low_open=True, remedy=remedy)
    return Diagonal(1 / (diagonal.clamp_min(0) + damping))
