"""Descent on the retain set and ascent on the forget set at once."""

from dataclasses import dataclass
from typing import ClassVar

from stabkit.algorithms.base import Algorithm


@dataclass(frozen=True, kw_only=True)
class GradDiff(Algorithm):
    """P = I and any mix; also known as NegGrad+ (theory §8)."""

    name: ClassVar[str] = "graddiff"
