"""What each step of a run does, when a run ends before its last one, and schedules as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabkit import schedules
from stabkit._validate import check_choice, check_real

SCHEDULES = ("cosine", "linear", "warmup")
WARMUP_SHARE = 10  # a warm-up takes this part of the steps: a tenth


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a run ends before its last step. Evaluated by the runner and by the rollout on the same quantities.

    Attributes:
        drift_tolerance: Stop when one step moves the parameters by less than this share of their norm; None: never. A step
            whose schedule has a factor of 0 is no step of this kind: it moves nothing wherever the run is.
        leakage_bound: Stop when the mean KL divergence, in nats, from the original model's predictions on the forget
            batch to the current ones passes this; None: never.
    """

    drift_tolerance: float | None = None
    leakage_bound: float | None = None

    @property
    def active(self) -> bool:
        """Whether any condition is set."""
        return self.drift_tolerance is not None or self.leakage_bound is not None

    def decide(self, drift: Tensor, leakage: Tensor | None, *, moves: bool | Tensor = True) -> Tensor:
        """Whether to stop, elementwise.

        Args:
            drift: Relative parameter change of the last step, any shape.
            leakage: Mean prediction divergence on the forget batch before the step, the same shape; None if unused.
            moves: Whether the step's factor of the step size is above 0 and its batches hold any sample that counts, of a
                shape that goes with the above: a step that takes nothing stands still without having arrived.

        Returns:
            Boolean tensor of the same shape.
        """
        stop = torch.zeros_like(drift, dtype=torch.bool)
        if self.drift_tolerance is not None:
            stop |= (drift < self.drift_tolerance) & moves
        if self.leakage_bound is not None and leakage is not None:
            stop |= leakage > self.leakage_bound
        return stop


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one step does with the two gradients.

    Attributes:
        lr: κ, which multiplies the step size.
        retain: ρ, which multiplies the retain gradient's weight 1-α; at 0 no retain batch is drawn.
        forget: φ, which multiplies the forget gradient's weight α; at 0 no forget batch is drawn.
        max_norm: Norm that the preconditioned gradient of the losses is clipped to; None: it is not.
        pull: Factor of sign(θ) in the gradient, the derivative of pull·‖θ‖₁.
    """

    lr: float = 1.0
    retain: float = 1.0
    forget: float = 1.0
    max_norm: float | None = None
    pull: float = 0.0


def checked_schedule(
    schedule: str | Sequence[float] | None, steps: int, *, name: str, owner: str
) -> str | tuple[float, ...] | None:
    """A schedule in plain values.

    Args:
        schedule: As a setting has it.
        steps: K.
        name: Its name, for messages.
        owner: The algorithm's, likewise.

    Returns:
        A name, K factors, or None.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it is no known name, of another length, or a factor is out of its domain.
    """
    if schedule is None:
        return None
    remedy = "None, 'cosine', 'linear', 'warmup' or an array from stabkit.schedules will do."
    if isinstance(schedule, str):
        return check_choice(schedule, name=name, owner=owner, choices=SCHEDULES)
    if not hasattr(schedule, "__len__"):
        raise TypeError(f"`{name}` of `{owner}` must hold one factor a step; got {schedule!r}. {remedy}")
    values = schedule.tolist() if isinstance(schedule, np.ndarray | Tensor) else schedule
    if len(values) != steps:
        raise ValueError(
            f"`{name}` of `{owner}` must hold one factor for each of the {steps} steps; got {len(values)} of them. {remedy}"
        )
    return tuple(check_real(v, name=f"{name}[{k}]", owner=owner, low=0) for k, v in enumerate(values))


def factors_of(schedule: str | Sequence[float] | None, steps: int) -> list[float]:
    """A checked schedule step by step.

    Args:
        schedule: What `checked_schedule` gave.
        steps: K.

    Returns:
        K factors.
    """
    if schedule is None:
        return [1.0] * steps
    if schedule == "cosine":
        return schedules.cosine(steps).tolist()
    if schedule == "linear":
        return schedules.linear(steps).tolist()
    if schedule == "warmup":
        return schedules.warmup(steps, over=max(1, steps // WARMUP_SHARE)).tolist()
    return [float(value) for value in schedule]
