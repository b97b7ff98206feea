"""A random estimate with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor

from stabkit._validate import check_real


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over independent probes, with its error.

    Attributes:
        value: The estimate.
        standard_error: Of `value`, from the spread over probes; 0 where it is exact.
        samples: Independent probes behind the error.
        products: Matrix-vector products spent.
    """

    value: float
    standard_error: float
    samples: int
    products: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student-t interval for the truth.

        Args:
            level: Confidence level in (0, 1).

        Returns:
            Lower and upper end.
        """
        check_real(level, name="level", owner="Estimate.interval", low=0, high=1, low_open=True, high_open=True)
        if self.standard_error == 0:
            return self.value, self.value
        half = float(scipy.stats.t.ppf((1 + level) / 2, self.samples - 1)) * self.standard_error
        return self.value - half, self.value + half


def from_samples(samples: Tensor, *, products: int, shift: float = 0.0) -> Estimate:
    """Estimate from one number a probe.

    Args:
        samples: Shape (m,), m >= 2, float64.
        products: Matrix-vector products spent.
        shift: Known part to add.

    Returns:
        Mean plus shift, with the mean's standard error.
    """
    count = samples.numel()
    return Estimate(
        value=shift + float(samples.mean()),
        standard_error=float(torch.std(samples)) / math.sqrt(count),
        samples=count,
        products=products,
    )
