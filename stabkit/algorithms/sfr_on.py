"""SFR-on: masked, sample-weighted ascent every few retain steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from stabkit._validate import check_int, check_real
from stabkit.algorithms.base import Algorithm, Batch, PlainSteps
from stabkit.algorithms.plan import StepPlan
from stabkit.directions import fisher_diagonal
from stabkit.losses import Loss
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem

LOSS_FLOOR = 0.01  # of the batch's mean loss: smaller losses weigh as much as this one would


@dataclass(frozen=True, kw_only=True)
class SFROn(Algorithm):
    """Retain steps with P = I and, as the first of each cycle, a forget step with P = diag(m) and sample weights.

        θ⁺ = θ + η_k 2α a_k m ∘ Σ_i ω_i g_i,  ω_i ∝ ℓ_i^(-λ), Σ ω_i = 1;     θ⁺ = θ - η_k 2(1-α) ĝ_R

    Huang et al. (NeurIPS 2024, arXiv 2409.19732). Defaults are the CIFAR-10 constants of the released code
    (github.com/K1nght/Unified-Unlearning-w-Remain-Geometry, commit 1837bf6): SGD 0.01 with a cosine, momentum 0.9, weight
    decay 5·10⁻⁴, 5 retain steps after each forget step, forget weight a from 25 along a cosine to 0, λ = 0.5, threshold 1,
    forget gradients clipped to norm 7. Its 1500 retain steps are 1800 steps of both kinds here. mix=0.5 is the published
    ratio. What that code does beside the paper, and what is done here:

    - Its average of slow weights is switched off; there is none here.
    - One momentum buffer serves both kinds of step, and decay is not masked: kept, so that masked weights move in forget
      steps too.
    - Its mask is a ratio of squared batch means; here of per-sample gradients, which no batch size enters. A weight without
      forget gradient is masked.
    - A sample fitted exactly takes its batch over; here losses below a hundredth of the batch's mean weigh like that.
    - Forget weight and step size both decay, and only forget gradients are clipped: kept.
    - Its step size falls with each retain step, here with every step of either kind; BatchNorm is frozen here.

    The rollout covers it, up to rounding where the linearisation has full rank. The linear theory (T3-T13) is about one P
    and both sets in each step, and not about this cycle.

    Attributes:
        forget_weight: a at the first step, > 0.
        loss_power: λ >= 0; 0 weighs all samples alike.
        threshold: γ >= 0: m_j = 1 where the forget set's diagonal Fisher information is at least γ times the retain set's; 0
            masks nothing that has a forget gradient.
        fisher_samples: Samples of each set behind the Fisher information; all when None.
    """

    name: ClassVar[str] = "sfr_on"
    residual_reads: ClassVar[str] = "loss"

    steps: int = 1800
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_gradient_norm: float | None = 7.0
    lr_schedule: str | tuple[float, ...] | None = "cosine"
    forget_schedule: str | tuple[float, ...] | None = "cosine"
    forget_every: int | None = 6
    forget_weight: float = 25.0
    loss_power: float = 0.5
    threshold: float = 1.0
    fisher_samples: int | None = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        plain: dict[str, object] = {
            "forget_weight": check_real(self.forget_weight, name="forget_weight", owner=owner, low=0, low_open=True),
            "loss_power": check_real(self.loss_power, name="loss_power", owner=owner, low=0),
            "threshold": check_real(self.threshold, name="threshold", owner=owner, low=0),
        }
        if self.fisher_samples is not None:
            remedy = "None takes all of them."
            count = check_int(self.fisher_samples, name="fisher_samples", owner=owner, low=1, remedy=remedy)
            plain["fisher_samples"] = count
        for key, value in plain.items():
            object.__setattr__(self, key, value)

    @property
    def outside_theory(self) -> tuple[str, ...]:
        """Mask and weights, beside what cycles and schedules do.

        Returns:
            Clauses for a report.
        """
        return ("forget gradients are masked and weighted by sample", *super().outside_theory)

    def plan(self) -> tuple[StepPlan, ...]:
        """Forget steps, weighted and clipped, and retain steps.

        Returns:
            One entry a step.
        """
        return tuple(
            replace(
                p,
                retain=2 * p.retain,
                forget=2 * self.forget_weight * p.forget,
                max_norm=p.max_norm if p.forget else None,
            )
            for p in super().plan()
        )

    def preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """The identity, with the mask of the forget gradients.

        Args:
            problem: The unlearning problem.

        Returns:
            The preconditioner. Cost: a per-sample gradient of every sample behind the Fisher information.
        """
        forget, retain = (
            fisher_diagonal(problem, s, indices=s.subset(self.fisher_samples, seed=0))
            for s in (problem.forget, problem.retain)
        )
        mask = (forget >= self.threshold * retain) & (forget > 0)
        return PlainSteps(forget_mask=mask.to(problem.dtype))

    def preconditioner_cost(self, problem: UnlearningProblem) -> float:
        """One gradient a sample of both sets' part.

        Args:
            problem: The unlearning problem.

        Returns:
            The number of samples.
        """
        sets = problem.forget, problem.retain
        return float(sum(s.size if self.fisher_samples is None else min(s.size, self.fisher_samples) for s in sets))

    def forget_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """The loss's derivative, each sample's times b ω_i.

        Args:
            loss: The problem's loss.
            batch: The forget batch.

        Returns:
            Tensor of the outputs' shape.
        """
        residual = loss.residual(batch.outputs, batch.targets)
        if self.loss_power == 0:
            return residual
        losses = loss.per_sample(batch.outputs, batch.targets).reshape(batch.copies, -1)
        floor = (LOSS_FLOOR * losses.mean(1, keepdim=True)).clamp_min(torch.finfo(losses.dtype).tiny)
        weights = (losses.maximum(floor) / floor) ** -self.loss_power
        weights = weights * (losses.shape[1] / weights.sum(1, keepdim=True))
        return residual * weights.reshape(-1, *[1] * (residual.dim() - 1))
