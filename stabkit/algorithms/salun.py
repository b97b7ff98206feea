"""SalUn: only the weights that the forget set's mean gradient is largest in move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabkit._validate import check_choice, check_real
from stabkit.algorithms.base import Algorithm, Batch
from stabkit.algorithms.random_labels import RANDOM_LABELS, random_label_residual, require_labels
from stabkit.curvature.gradients import mean_gradient
from stabkit.losses import Loss
from stabkit.preconditioner import Diagonal, Preconditioner
from stabkit.problem import UnlearningProblem

FORGETTING = ("ascent", "random_labels")


@dataclass(frozen=True, kw_only=True)
class SalUn(Algorithm):
    """P = diag(m), m_j = 1 for the `share` of parameters with the largest |ḡ_F|_j and 0 for the others (theory §8).

    Fan et al. (ICLR 2024, arXiv 2310.12508): a saliency mask from the forget set's gradient at θ*, and random labels on the
    forget set under it. Their CIFAR-10 runs take half of the weights, steps of 0.007 to 0.013 and momentum 0.9. Chosen here:
    the mask is of the gradient of the whole set at θ*; it multiplies retain gradients and weight decay too, so that what is
    masked stays exactly where it is; both sets are in every step, as for RandomLabels.

    With forgetting="ascent" it is T1 with P a projection, and T2's substitution makes all of the linear theory hold. With
    random labels the rollout covers it, the linear theory does not (see RandomLabels).

    Attributes:
        share: Share of the parameters that move, in (0, 1].
        forgetting: "random_labels" (the paper's) or "ascent" on the forget loss.
    """

    name: ClassVar[str] = "salun"
    residual_reads: ClassVar[str] = "all"

    share: float = 0.5
    forgetting: str = "random_labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        share = check_real(self.share, name="share", owner=owner, low=0, high=1, low_open=True)
        object.__setattr__(self, "share", share)
        check_choice(self.forgetting, name="forgetting", owner=owner, choices=FORGETTING)

    @property
    def ascends(self) -> bool:
        """Whether the forget loss is climbed.

        Returns:
            False with random labels.
        """
        return self.forgetting == "ascent"

    @property
    def outside_theory(self) -> tuple[str, ...]:
        """Random labels, beside what schedules and clipping do.

        Returns:
            Clauses for a report.
        """
        return (*([] if self.ascends else [RANDOM_LABELS]), *super().outside_theory)

    def check_problem(self, problem: UnlearningProblem) -> None:
        """There must be labels to draw, if they are.

        Args:
            problem: The unlearning problem.

        Raises:
            ValueError: If random labels are wanted and the loss is not a cross-entropy.
        """
        if self.forgetting == "random_labels":
            require_labels(problem, type(self).__name__)

    def preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """The mask.

        Args:
            problem: The unlearning problem.

        Returns:
            A diagonal of zeros and ones. Cost: n_f gradients.
        """
        gradient = mean_gradient(problem, problem.forget)
        count = max(1, round(self.share * problem.size))
        mask = torch.zeros_like(gradient)
        mask[gradient.abs().topk(count).indices] = 1
        return Diagonal(mask)

    def preconditioner_cost(self, problem: UnlearningProblem) -> float:
        """One gradient a forget sample.

        Args:
            problem: The unlearning problem.

        Returns:
            n_f.
        """
        return float(problem.forget.size)

    def forget_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """What forget steps climb: minus the cross-entropy to random labels, or the loss.

        Args:
            loss: The problem's loss.
            batch: The forget batch.

        Returns:
            Tensor of the outputs' shape.
        """
        if self.forgetting == "ascent":
            return super().forget_residual(loss, batch)
        return random_label_residual(loss, batch)
