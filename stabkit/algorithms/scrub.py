"""SCRUB: away from the original predictions on the forget set, close to them on the retain set."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from stabkit._validate import check_real
from stabkit.algorithms.base import Algorithm, Batch
from stabkit.algorithms.plan import StepPlan
from stabkit.losses import Loss


@dataclass(frozen=True, kw_only=True)
class SCRUB(Algorithm):
    """P = I; forget ("max") steps climb τ² KL(p_θ*^τ ‖ p_θ^τ), retain ("min") steps descend γ ℓ + δ τ² KL(p_θ*^τ ‖ p_θ^τ).

    Kurmanji et al. (NeurIPS 2023, arXiv 2302.09880). Defaults are the CIFAR-10 settings in the reimplementation that SFR-on
    was compared with (github.com/K1nght/Unified-Unlearning-w-Remain-Geometry, commit 1837bf6): γ = 0.99, δ = 0.001, τ = 4,
    step size 8·10⁻⁵ with a cosine, momentum 0.9, weight decay 5·10⁻⁴, max steps in the first 2 of 6 epochs. There each
    epoch has its max steps first; here a max step opens each cycle of `forget_every`, 10 for the ratio of batches at a
    deletion of a tenth. Both kinds of step have weight 1 at mix=0.5: weights are 2α and 2(1-α). The moving average, which is
    off in that code, is left out. Without classes the mean squared change of the outputs takes KL's place.

    The rollout covers it as it is. The linear theory (T3-T13) does not: it has the losses' curvature and gradient, where the
    KL has the Gauss-Newton curvature of cross-entropy and gradient 0 at θ*, so that the first max step does nothing.

    Attributes:
        loss_weight: γ >= 0.
        divergence_weight: δ >= 0.
        temperature: τ > 0, by which outputs are divided in the KL.
        forget_share: Share of the run, from its start, that has max steps; in [0, 1].
    """

    name: ClassVar[str] = "scrub"
    residual_reads: ClassVar[str] = "labelled"
    needs_original: ClassVar[bool] = True

    lr: float = 8e-5
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_schedule: str | tuple[float, ...] | None = "cosine"
    forget_every: int | None = 10
    loss_weight: float = 0.99
    divergence_weight: float = 0.001
    temperature: float = 4.0
    forget_share: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        plain = {
            key: check_real(getattr(self, key), name=key, owner=owner, low=0)
            for key in ("loss_weight", "divergence_weight")
        }
        plain["temperature"] = check_real(self.temperature, name="temperature", owner=owner, low=0, low_open=True)
        plain["forget_share"] = check_real(self.forget_share, name="forget_share", owner=owner, low=0, high=1)
        for key, value in plain.items():
            object.__setattr__(self, key, value)

    @property
    def outside_theory(self) -> tuple[str, ...]:
        """The divergence, beside what cycles and schedules do.

        Returns:
            Clauses for a report.
        """
        return (
            "forget steps climb a divergence from the outputs at θ*, which is flat there",
            *super().outside_theory,
        )

    def plan(self) -> tuple[StepPlan, ...]:
        """Max steps while they last, min steps in between and after.

        Returns:
            One entry a step.
        """
        last = self.forget_share * self.steps
        return tuple(
            replace(p, retain=2 * p.retain, forget=2 * p.forget) if k < last else replace(p, retain=2.0, forget=0.0)
            for k, p in enumerate(super().plan())
        )

    def _beginning(self, steps: int) -> dict[str, object] | None:
        """The same max steps, which are a larger share of fewer steps."""
        beginning = super()._beginning(steps)
        last = math.ceil(self.forget_share * self.steps)
        # Half a step below the edge, which rounding cannot reach.
        share = min(1.0, (last - 0.5) / steps) if last else 0.0
        return None if beginning is None else {**beginning, "forget_share": share}

    def retain_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """Derivative of γ ℓ + δ τ² KL.

        Args:
            loss: The problem's loss.
            batch: The retain batch.

        Returns:
            Tensor of the outputs' shape.
        """
        own = self.loss_weight * loss.residual(batch.outputs, batch.targets)
        return own + self.divergence_weight * self._divergence_residual(loss, batch)

    def forget_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """Derivative of τ² KL.

        Args:
            loss: The problem's loss.
            batch: The forget batch.

        Returns:
            Tensor of the outputs' shape.
        """
        return self._divergence_residual(loss, batch)

    def _divergence_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """Derivative in the outputs of τ² times the divergence from the original predictions, both at temperature τ."""
        assert batch.original is not None  # `needs_original`
        leaf = batch.outputs.detach().requires_grad_()
        with torch.enable_grad():
            moved = loss.divergence(batch.original / self.temperature, leaf / self.temperature, batch.targets)
            (gradient,) = torch.autograd.grad(self.temperature**2 * moved.sum(), leaf)
        return gradient
