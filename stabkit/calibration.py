"""From rollouts to a probability, and what recorded runs say of both kinds of rollout (theory §7).

What rollouts say of a setting is the mean over their seeds of sigmoid(slope·score), score being the logarithm of the worst
retain loss over the divergence level: one half where they cross. They are sure of themselves where the boundary that they
found is not, so a report's P(diverge) is the mean of that and of the probability that the critical step size lies below.
`stabkit bench calibrate` measures both on the benchmark's calibration cells, which no figure of the evaluation contains.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.special import expit
from torch import Tensor

from stabkit._serialise import from_plain
from stabkit._validate import check_choice

KINDS = ("one", "far", "staged", "adamw")
COVERAGE = 0.9  # of the interval of the critical step size
# Of the linearised outputs at half the critical step size, where the run is called stable: beyond it their critical step
# sizes are several times too large as often as not, and have a calibration of their own (benchmarks/verify.md).
FAR_ERROR = 0.3
MAX_AWAKENED = 0.1  # share of the sensitivity that is to parameters which were dormant at θ*
RISK = 0.05  # P(diverge) that a recommended run may have, unless asked otherwise
ODDS = math.log((1 + COVERAGE) / (1 - COVERAGE))  # log odds at its upper end
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
        kind: "one"; "far" for one linearisation that is far from the network at half its critical step size; "staged"; or
            "adamw" for one linearisation of an AdamW run.
        slope: Factor of the score, set by hand.
        step_factor: Factor either way of the critical step size within which the observed one lay for nine in ten
            boundaries of the calibration cells, by split conformal prediction; None where there is none. Where
            `step_factor_above` is another, of the lower end alone.
        runs: Real runs behind it.
        cells: Names of their cells.
        brier: Mean squared error of P on those runs.
        reliability: P against shares on those runs.
        step_factor_above: Factor of the upper end, where predictions err one way more than the other: each end then has
            the observed one beyond it for one boundary in twenty. None where both ends have the same.
    """

    kind: str
    slope: float
    step_factor: float | None
    runs: int
    cells: tuple[str, ...]
    brier: float | None
    reliability: tuple[Bin, ...]
    step_factor_above: float | None = None

    def probability(self, score: Tensor) -> Tensor:
        """P(diverge) of settings, by their rollouts alone.

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
        return min(low, value / factor), max(high, value * (self.step_factor_above or factor))

    def margin(self, risk: float) -> float:
        """How far below its critical step size a run must stay for a report's P(diverge) to be within a risk.

        Args:
            risk: The risk, in (0, 1).

        Returns:
            The least factor, 1 or more, by which the critical step size must be the larger one where rollouts hold.
        """
        past = 2 * risk  # of the two opinions that are averaged the rollouts' is 0
        if self.step_factor is None or past >= 0.5:
            return 1.0
        return math.exp(math.log((1 - past) / past) * math.log(self.step_factor) / ODDS)


def beyond(lr: float, critical: float, interval: tuple[float, float]) -> float:
    """Probability that a step size is past the critical one, whose logarithm is taken to be logistic.

    Args:
        lr: The step size.
        critical: The predicted critical one.
        interval: Where that lies at nine in ten, around it; each end says how wide its side is.

    Returns:
        One half at the critical step size, 0.05 and 0.95 at the ends of the interval; with no width a step from 0 to 1.
    """
    away = math.log(lr / critical)
    width = math.log(interval[1] / critical) if away > 0 else math.log(critical / interval[0])
    if width == 0:
        return float(away >= 0)
    return float(expit(ODDS * away / width))


def combined(rolled: float, lr: float, critical: float, interval: tuple[float, float]) -> float:
    """P(diverge) of a report: the mean of what its rollouts say and of what the boundary that they found says.

    Args:
        rolled: P(diverge) by the rollouts of the setting alone.
        lr: Its step size.
        critical: The predicted critical one.
        interval: Where that lies at nine in ten.

    Returns:
        A linear opinion pool of equal weights (Stone 1961).
    """
    return (rolled + beyond(lr, critical, interval)) / 2


def kind_at(kind: str, error: float | None, awake: float = 0.0) -> str:
    """Whose calibration a critical step size has.

    Args:
        kind: The rollout's.
        error: Relative error of the linearised outputs at half the critical step size; None where nothing looked.
        awake: Share of the outputs' sensitivity there that is to parameters which were dormant at θ*.

    Returns:
        "far" in place of "one" where the error is above `FAR_ERROR`, or the share above `MAX_AWAKENED`.
    """
    wrong = (error is not None and error > FAR_ERROR) or awake > MAX_AWAKENED
    return "far" if kind == "one" and wrong else kind


@functools.cache
def calibration(kind: str) -> Calibration:
    """The shipped calibration.

    Args:
        kind: "one" for rollouts on one linearisation, "far" where that is wrong at half the critical step size, "adamw" for
            those of AdamW's steps, "staged" for those that go on with real steps, whose ever.

    Returns:
        The calibration.
    """
    check_choice(kind, name="kind", owner="calibration", choices=KINDS)
    plain = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return from_plain(Calibration, plain[kind])
