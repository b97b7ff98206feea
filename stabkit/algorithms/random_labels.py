"""Random labels: forget by fitting noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabkit.algorithms.base import Algorithm, Batch
from stabkit.losses import IGNORE_INDEX, CrossEntropy, Loss
from stabkit.problem import UnlearningProblem

# Of the forget curvature in the linear theory.
RANDOM_LABELS = "forget samples are descended on with random labels, so that their curvature has the other sign"


@dataclass(frozen=True, kw_only=True)
class RandomLabels(Algorithm):
    """P = I; descent on the retain loss and on the forget samples' cross-entropy to labels drawn anew at every visit.

    With c_i the label drawn for forget sample i, uniform over all classes and its own among them,

        θ⁺ = θ - η [ (1-α) mean_R ∇ℓ(f_i, y_i) + α mean_F ∇ℓ(f_i, c_i) ]

    As in the released code of SalUn (arXiv 2310.12508) on CIFAR-10, labels are uniform and fresh at every visit. There,
    whole epochs over the forget set and over the retain set take turns; here both sets are in every step, weighted by
    `mix`, or take turns by `forget_every`. A label is drawn from the run's seed and the step's number.

    The rollout covers it as it is: the labels are the ones that `run` draws. The linear theory (T3-T13) does not, being
    about ascent on the true labels; here both parts descend, and it has the forget curvature with the wrong sign.
    """

    name: ClassVar[str] = "random_labels"
    residual_reads: ClassVar[str] = "all"

    @property
    def ascends(self) -> bool:
        """Both sets are descended on.

        Returns:
            False.
        """
        return False

    @property
    def outside_theory(self) -> tuple[str, ...]:
        """Descent on both sets, beside what schedules and clipping do.

        Returns:
            Clauses for a report.
        """
        return (RANDOM_LABELS, *super().outside_theory)

    def check_problem(self, problem: UnlearningProblem) -> None:
        """There must be labels to draw.

        Args:
            problem: The unlearning problem.

        Raises:
            ValueError: If its loss is not a cross-entropy.
        """
        require_labels(problem, type(self).__name__)

    def forget_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """Minus the derivative of the cross-entropy to random labels.

        Args:
            loss: The problem's loss, a cross-entropy.
            batch: The forget batch.

        Returns:
            Tensor of the outputs' shape.
        """
        return random_label_residual(loss, batch)


def require_labels(problem: UnlearningProblem, owner: str) -> None:
    """Raise unless the loss is a cross-entropy.

    Args:
        problem: The unlearning problem.
        owner: The algorithm that needs labels.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(problem.loss, CrossEntropy):
        raise ValueError(
            f"`loss` of a problem for `{owner}` must be 'cross_entropy' or 'causal_lm', as random labels are drawn among "
            f"classes; got {problem.loss.name!r}. Use GradDiff, which climbs any loss."
        )


def random_label_residual(loss: Loss, batch: Batch) -> Tensor:
    """Minus the derivative of the loss at labels drawn for this step; positions without a label stay without one.

    Args:
        loss: A cross-entropy.
        batch: The batch; all settings of a seed get the same labels.

    Returns:
        Tensor of the outputs' shape.

    Raises:
        TypeError: If the loss is something else.
    """
    if not isinstance(loss, CrossEntropy):
        raise TypeError(f"`loss` of `random_label_residual` must be a cross-entropy; got {loss.name!r}.")
    classes = loss.aligned(batch.outputs, batch.targets)[0].shape[-1]
    labels = batch.drawn(lambda generator, shape: generator.integers(classes, size=shape))
    return -loss.residual(batch.outputs, torch.where(batch.targets == IGNORE_INDEX, batch.targets, labels))
