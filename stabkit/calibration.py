"""From a rollout's score to a probability, and what recorded runs say of both kinds of rollout.

P(diverge) is the mean over the rollout's seeds of sigmoid(slope·score), score being the logarithm of the worst retain loss
over the divergence level: one half where the rollout itself crosses. `stabkit bench calibrate` measures it on the
benchmark's calibration cells, which no figure of the evaluation contains.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stabkit._serialise import from_plain
from stabkit._validate import check_choice

KINDS = ("one", "staged")
SHIPPED = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bin of a reliability curve.

    Attributes:
        said: Mean P(diverge).
        happened: Share of the runs that diverged.
        settings: Number of runs.
    """

    said: float
    happened: float
    settings: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How the scores of one kind of rollout become probabilities, and what that rests on.

    Attributes:
        kind: "one" or "staged".
        slope: Factor of the score, set by hand.
        step_factor: Factor either way of the critical step size within which the observed one lay for nine in ten
            boundaries of the calibration cells, by split conformal prediction; None where there is none.
        runs: Real runs behind it.
        cells: Names of their cells.
        brier: Mean squared error of P on those runs.
        reliability: P against shares on those runs.
    """

    kind: str
    slope: float
    step_factor: float | None
    runs: int
    cells: tuple[str, ...]
    brier: float | None
    reliability: tuple[Bin, ...]

    def probability(self, score: Tensor) -> Tensor:
        """P(diverge) of settings.

        Args:
            score: Shape (S, ...), S seeds.

        Returns:
            Mean over the seeds, shape (...).
        """
        return torch.sigmoid(self.slope * score).mean(0)

    def interval(self, value: float, low: float, high: float) -> tuple[float, float]:
        """Where the critical step size lies, at nine in ten.

        Args:
            value: The predicted one.
            low: Lower end of the seeds' spread.
            high: Upper end.

        Returns:
            The spread, widened to the conformal factor either way.
        """
        factor = self.step_factor or 1.0
        return min(low, value / factor), max(high, value * factor)


@functools.cache
def calibration(kind: str) -> Calibration:
    """The shipped calibration.

    Args:
        kind: "one" for rollouts on one linearisation, "staged" for those that go on with real steps.

    Returns:
        The calibration.
    """
    check_choice(kind, name="kind", owner="calibration", choices=KINDS)
    plain = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return from_plain(Calibration, plain[kind])
