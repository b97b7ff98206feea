"""NPO: ascent on the forget set that dies away where the answers have become unlikely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabkit._validate import check_real
from stabkit.algorithms.base import Algorithm, Batch
from stabkit.losses import IGNORE_INDEX, CrossEntropy, Loss


@dataclass(frozen=True, kw_only=True)
class NPO(Algorithm):
    """P = I; forget steps descend -(2/β) log σ(-β log(π_θ/π_θ*)), retain steps the loss: NPO beside GradDiff's retain part.

        θ⁺ = θ - η [ (1-α) mean_R ∇ℓ_i - α mean_F W_i n_i ∇ℓ_i ],   W_i = 2 π_θ^β/(π_θ^β + π_θ*^β) = 2 σ(-β n_i (ℓ_i - ℓ_i*))

    Zhang, Lin, Bai & Mei (COLM 2024, arXiv 2404.05868). π is the probability of a sample's whole answer, ln π = -n_i ℓ_i
    with n_i its labelled tokens and ℓ_i their mean loss; π_θ* that of the original model. W_i is 1 at θ*, falls to 0 as the
    answer is forgotten and is 2 at most, so that ascent slows down where gradient ascent runs away; β → 0 leaves ascent on
    n_i ℓ_i.

    Sum, not mean: the paper has the answer's log-probability, the sum over its tokens, in ratio and gradient, and so have
    the authors' code (github.com/licong-lin/negative-preference-optimization, `get_batch_loss`) and open-unlearning
    (`compute_batch_nll`). The retain loss is a mean over tokens in all three. mix=0.5 is their ratio of one to one; at the
    same mix the forget part is n_i times GradDiff's. In classification n_i is 1. For losses without labels -ℓ_i takes
    ln π's place and n_i is 1. β = 0.1 is the authors' constant for TOFU; they step with AdamW, here it is SGD.

    The rollout covers it as it is. The linear theory (T3-T13) does not: at θ*, where all W_i are 1, the forget part has n_i
    times the gradient it assumes and the curvature n_i H_i - (β/2) n_i² g_i g_iᵀ for its H_i.

    Attributes:
        beta: β > 0, the inverse temperature: the larger, the sooner ascent on a sample ends.
    """

    name: ClassVar[str] = "npo"
    residual_reads: ClassVar[str] = "loss"
    needs_original: ClassVar[bool] = True

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        beta = check_real(self.beta, name="beta", owner=type(self).__name__, low=0, low_open=True)
        object.__setattr__(self, "beta", beta)

    @property
    def outside_theory(self) -> tuple[str, ...]:
        """The weights, beside what schedules and clipping do.

        Returns:
            Clauses for a report.
        """
        return (
            "a forget sample counts by its tokens, and less the unlikelier its answer has become",
            *super().outside_theory,
        )

    def forget_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """The loss's derivative, each sample's times W_i n_i: minus that of the NPO loss.

        Args:
            loss: The problem's loss.
            batch: The forget batch.

        Returns:
            Tensor of the outputs' shape.
        """
        assert batch.original is not None  # `needs_original`
        risen = loss.per_sample(batch.outputs, batch.targets) - loss.per_sample(batch.original, batch.targets)
        tokens = _tokens(loss, batch).to(risen)
        weights = 2 * tokens * torch.sigmoid(-self.beta * tokens * risen)
        residual = loss.residual(batch.outputs, batch.targets)
        return residual * weights.reshape(-1, *[1] * (residual.dim() - 1))


def _tokens(loss: Loss, batch: Batch) -> Tensor:
    """Labelled positions of every sample, whose mean its loss is; 1 for losses without labels."""
    if not isinstance(loss, CrossEntropy):
        return torch.ones(batch.outputs.shape[0])
    _, labels = loss.aligned(batch.outputs, batch.targets)
    return (labels != IGNORE_INDEX).sum(1)
