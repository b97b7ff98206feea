"""Fine-tuning with a pull towards sparse weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from stabkit._validate import check_real
from stabkit.algorithms.base import PlainSteps
from stabkit.algorithms.fine_tune import FineTune
from stabkit.algorithms.plan import StepPlan
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem


@dataclass(frozen=True, kw_only=True)
class L1Sparse(FineTune):
    """P = I and α = 0: every step descends the retain loss plus λ_k ‖θ‖₁, with λ_k falling evenly to 0 over the run.

    Jia et al. (NeurIPS 2023, arXiv 2304.04934), as their released fine-tuning loop has it: the penalty falls with the epoch,
    here with the step. The default of 10⁻⁴ is that of public CIFAR-10 scripts built on that code; the derivative at 0 is 0.

    The rollout has the pull of the signs at θ*: exact until a weight passes zero. The linear theory (T3-T13) leaves it out;
    a constant pull changes the drift b and no eigenvalue.

    Attributes:
        penalty: λ_1 >= 0; 0 is FineTune.
    """

    name: ClassVar[str] = "l1_sparse"

    penalty: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        penalty = check_real(self.penalty, name="penalty", owner=type(self).__name__, low=0)
        object.__setattr__(self, "penalty", penalty)

    @property
    def outside_theory(self) -> tuple[str, ...]:
        """The pull, beside what schedules and clipping do.

        Returns:
            Clauses for a report.
        """
        pull = "weights are pulled towards 0, which moves the drift and no eigenvalue"
        return (*([pull] if self.penalty else []), *super().outside_theory)

    def plan(self) -> tuple[StepPlan, ...]:
        """Retain steps with the pull of the step.

        Returns:
            One entry a step.
        """
        plans = super().plan()
        return tuple(replace(p, pull=self.penalty * (1 - k / self.steps)) for k, p in enumerate(plans))

    def _beginning(self, steps: int) -> dict[str, object] | None:
        """None with a penalty, which falls to 0 within any run."""
        return None if self.penalty else super()._beginning(steps)

    def preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """The identity, with the signs that the pull goes against.

        Args:
            problem: The unlearning problem.

        Returns:
            The preconditioner.
        """
        return PlainSteps(signs=problem.vector().sign())
