"""What the spectral estimators share: checked products, random probes, a watch over stalling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.curvature.operators import CurvatureOperator

ROUNDING = 100  # rounding units of the dtype: no relative tolerance is tighter
ROWS_AT_ONCE = 2**18  # of vectors, that are taken to double precision or turned
PROGRESS = 0.9  # the worst residual must fall below this share of what it was
PATIENCE = 6  # within so many restarts, or the solver counts as stalled


@dataclass(kw_only=True)
class Stall:
    """Watches the residuals from restart to restart.

    Attributes:
        mark: The worst residual when it last fell markedly.
        idle: Restarts since.
    """

    mark: float = math.inf
    idle: int = 0

    def note(self, worst: float) -> bool:
        """Take in the worst residual at a restart.

        Args:
            worst: The residual.

        Returns:
            Whether the solver has stalled.
        """
        if worst < PROGRESS * self.mark:
            self.mark, self.idle = worst, 0
        else:
            self.idle += 1
        return self.idle >= PATIENCE


def product(operator: CurvatureOperator, block: Tensor, *, owner: str) -> Tensor:
    """Block product of an operator, refused where it is not finite.

    Args:
        operator: Symmetric operator of order d.
        block: Vectors, shape (d, k).
        owner: The public function that asks, for the error.

    Returns:
        A @ block, shape (d, k).

    Raises:
        ValueError: If an entry is NaN or infinite.
    """
    image = operator @ block
    check_product(int(torch.isfinite(image).sum()), image.numel(), owner=owner)
    return image


def check_product(finite: int, entries: int, *, owner: str) -> None:
    """Refuse a product that is not finite.

    Args:
        finite: How many of its entries are.
        entries: How many there are.
        owner: The public function that asked for it, for the error.

    Raises:
        ValueError: If an entry is NaN or infinite.
    """
    if finite < entries:
        raise ValueError(
            f"`operator` of `{owner}` must have finite products; got {entries - finite} of {entries} entries NaN or "
            "infinite. Look for NaN in weights and data; where the numbers are only too large, compute in float64."
        )


def rademacher(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Random signs, one probe a row, so that any split into blocks draws the same probes.

    Args:
        size: Length d.
        count: Number of probes.
        generator: Where they come from.

    Returns:
        Entries -1 and 1, shape (count, d), float64, on the CPU.
    """
    rows = [torch.randint(0, 2, (size,), generator=generator) for _ in range(count)]
    return torch.stack(rows).double() * 2 - 1


def gaussian(size: int, count: int, operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """Normal block of shape (d, count), drawn in float64 on the CPU, as the operator takes it."""
    block = torch.randn(size, count, generator=generator, dtype=torch.float64)
    return block.to(operator.device, operator.dtype)
