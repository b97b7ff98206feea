"""Gradient ascent on the forget set alone."""

from dataclasses import dataclass
from typing import ClassVar

from stabkit.algorithms.base import Algorithm


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Algorithm):
    """P = I and α = 1: every step climbs the forget loss (theory §8).

    Attributes:
        mix: Always 1.
    """

    name: ClassVar[str] = "ga"
    fixed_mix: ClassVar[bool] = True

    mix: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix != 1:
            raise ValueError(
                f"`mix` of `GradientAscent` must be 1, as 'ga' climbs the forget loss and nothing else; got {self.mix!r}. "
                "Leave it out, or use algorithm='graddiff' for a mix below 1."
            )
