"""AGU: every parameter moves in proportion to how sensitive the forget loss is to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stabkit._validate import check_real
from stabkit.algorithms.base import Algorithm
from stabkit.algorithms.plan import StopRule
from stabkit.curvature.gradients import gradient_blocks
from stabkit.preconditioner import Diagonal, Preconditioner
from stabkit.problem import UnlearningProblem


@dataclass(frozen=True, kw_only=True)
class AGU(Algorithm):
    """P = diag(R / max R) with R_j the mean absolute per-sample gradient on the forget set (theory §8).

    Written from the abstract of Ghannam & Mahareek (2025), which gives no formulas: sensitivities on the forget set scale
    the update, and a run stops on drift or leakage. Chosen here: the mean of absolute per-sample gradients, the division by
    the largest, taking them once, at θ*, and both tolerances.

    Attributes:
        drift_tolerance: Stop once a step moves the parameters by less than this share of their norm; None: never.
        leakage_bound: Stop once predictions on the forget batch have moved this far, in nats of mean KL; None: never. Either
            ends a run at the step that it is met in. An accelerator is waited for at looks alone: from that step to the
            next look a run stands still there.
    """

    name: ClassVar[str] = "agu"

    drift_tolerance: float | None = 1e-8
    leakage_bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("drift_tolerance", "leakage_bound"):
            value = getattr(self, key)
            if value is not None:
                remedy = "None switches it off."
                plain = check_real(value, name=key, owner=type(self).__name__, low=0, remedy=remedy)
                object.__setattr__(self, key, plain)

    def preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """diag(R̃).

        Args:
            problem: The unlearning problem.

        Returns:
            The diagonal preconditioner. Cost: n_f per-sample gradients.
        """
        return Diagonal(normalised_sensitivity(problem))

    def preconditioner_cost(self, problem: UnlearningProblem) -> float:
        """One gradient a forget sample.

        Args:
            problem: The unlearning problem.

        Returns:
            n_f.
        """
        return float(problem.forget.size)

    def stop_rule(self) -> StopRule:
        """Drift and leakage.

        Returns:
            The rule.
        """
        return StopRule(drift_tolerance=self.drift_tolerance, leakage_bound=self.leakage_bound)


def normalised_sensitivity(problem: UnlearningProblem) -> Tensor:
    """R̃_j = R_j / max R, R_j = mean over the forget set of |∂l_i/∂θ_j|.

    Args:
        problem: The unlearning problem.

    Returns:
        Vector of shape (d,) with entries in [0, 1].

    Raises:
        ValueError: If every forget gradient is zero.
    """
    total = torch.zeros(problem.size, dtype=torch.float64, device=problem.device)
    for gradients in gradient_blocks(problem, problem.forget):
        total += problem.flatten({name: g.abs().sum(0) for name, g in gradients.items()})
    largest = float(total.max())
    if largest == 0:
        raise ValueError(
            "the forget set's gradients must not all be zero for AGU; got a largest sensitivity of 0. The model fits these "
            "samples exactly: use GradDiff, whose steps are not scaled by sensitivity."
        )
    return (total / largest).to(problem.dtype)
