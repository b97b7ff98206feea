"""What a rollout comes to: losses at the looks, scores, and P(diverge) from them (T14)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabkit.calibration import calibration
from stabkit.curvature.linearised import LinearisedNetwork

SCORE_CAP = 3.0  # score at which a setting stops rolling: e³ times the divergence level


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """What the linearised network did, for S seeds and G settings.

    Attributes:
        lr: Step sizes, shape (G,), as they were given.
        mix: Mixes, shape (G,).
        score: Largest log ratio of the retain loss to the divergence level, capped at `SCORE_CAP`, shape (S, G). From 0 on
            this seed's run crosses. Below, it is stretched where the loss at θ* would score more than -1, to be -1 there.
            `SCORE_CAP` where any loss is not finite, or the level is passed at θ*; a loss that is negative at θ* is counted
            from there. A staged rollout's is the largest up to the look ten steps past the crossing.
        divergence_step: First checked step past the level, shape (S, G); NaN where it is never passed.
        stopped_step: Last step taken, shape (S, G); earlier than K where a stop rule ended the run.
        steps: The checked steps, shape (T,).
        retain_loss: Mean loss of the retain samples at the checks, infinity in place of NaN, shape (S, G, T); constant after
            a run has ended.
        forget_loss: The same for the forget samples.
        coordinates: c where the run crossed the level, or at its end, shape (S, G, r).
        kind: "one", "adamw" or "staged": whose calibration the probability is read from.
    """

    lr: Tensor
    mix: Tensor
    score: Tensor
    divergence_step: Tensor
    stopped_step: Tensor
    steps: Tensor
    retain_loss: Tensor
    forget_loss: Tensor
    coordinates: Tensor
    kind: str = "one"

    @property
    def probability(self) -> Tensor:
        """P(diverge) of every setting by its rollouts alone, shape (G,): each seed's logistic, averaged (theory §7)."""
        return calibration(self.kind).probability(self.score)

    def settings(self, first: int, last: int) -> Rollout:
        """The rollout of some neighbouring settings.

        Args:
            first: Place of the first of them.
            last: Place after the last one.

        Returns:
            Theirs, which shares this one's memory.
        """
        kept = slice(first, last)
        per_seed = ("score", "divergence_step", "stopped_step", "retain_loss", "forget_loss", "coordinates")
        parts: dict[str, Any] = {name: getattr(self, name)[:, kept] for name in per_seed}
        return replace(self, lr=self.lr[kept], mix=self.mix[kept], **parts)

    def expected_divergence_step(self) -> list[float | None]:
        """Median divergence step over the seeds that cross, per setting; None where fewer than half of them do.

        Returns:
            G entries.
        """
        medians: list[float | None] = []
        for column in self.divergence_step.T:
            crossed = column[column.isfinite()]
            medians.append(float(crossed.median()) if 2 * crossed.numel() >= column.numel() else None)
        return medians


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """How near a retain loss is to the divergence level.

    Attributes:
        floor: Where losses are counted from: 0, or the loss at θ* where that is negative.
        room: How far the level lies above it, > 0.
        stretch: Factor of scores below the level, >= 1, which puts the loss at θ* at -1 or below.
    """

    floor: float
    room: float
    stretch: float

    def score(self, loss: Tensor) -> Tensor:
        """Log ratio to the level, 0 where it is reached.

        Args:
            loss: Retain losses, any shape.

        Returns:
            The same shape, at most `SCORE_CAP`.
        """
        ratio = ((loss - self.floor) / self.room).clamp_min(0).log().clamp_max(SCORE_CAP)
        return torch.where(ratio < 0, ratio * self.stretch, ratio)


def loss_scale(network: LinearisedNetwork) -> LossScale:
    """The scale of a run's scores.

    Args:
        network: The compressed network at θ*.

    Returns:
        The scale. A network whose loss is close to the level before the first step is not half diverged for it, so its
        scores are stretched.
    """
    part = network.retain
    outputs = part.outputs if part.original is None else part.original
    start = float(network.loss.per_sample(outputs, part.targets).double().mean())
    floor, level = min(0.0, start), network.divergence_level
    if not level > floor:  # the run has diverged before its first step
        return LossScale(floor=level - 1, room=1.0, stretch=1.0)
    share = (start - floor) / (level - floor)
    near = math.exp(-1) < share < 1
    return LossScale(floor=floor, room=level - floor, stretch=-1 / math.log(share) if near else 1.0)
