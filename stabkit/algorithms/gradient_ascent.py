"""Gradient ascent on the forget set alone."""

from dataclasses import dataclass
from typing import ClassVar

from stabkit._validate import check_real
from stabkit.algorithms.base import Algorithm


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Algorithm):
    """P = I and α = 1: every step climbs the forget loss (theory §8).

    Attributes:
        mix: Always 1.
    """

    name: ClassVar[str] = "ga"

    mix: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(
            self.mix, name="mix", owner="GradientAscent", low=1, high=1, remedy="Use GradDiff for a mix below 1."
        )
