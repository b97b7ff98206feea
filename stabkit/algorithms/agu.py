"""AGU: every parameter moves in proportion to how sensitive the forget loss is to it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad, vmap

from stabkit._validate import check_real
from stabkit.algorithms.base import Algorithm, StopRule
from stabkit.preconditioner import Diagonal, Preconditioner
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Inputs, map_tensors

GRADIENT_BYTES = 256 * 2**20  # of per-sample gradients held at once


@dataclass(frozen=True, kw_only=True)
class AGU(Algorithm):
    """P = diag(R / max R) with R_j the mean absolute per-sample gradient on the forget set (theory §8).

    Written from the abstract of Ghannam & Mahareek (2025), which gives no formulas: sensitivities on the forget set scale
    the update, and a run stops on drift or leakage. Chosen here: the mean of absolute per-sample gradients, the division by
    the largest, taking them once, at θ*, and both tolerances.

    Attributes:
        drift_tolerance: Stop once a step moves the parameters by less than this share of their norm; None: never.
        leakage_bound: Stop once predictions on the forget batch have moved this far, in nats of mean KL; None: never.
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

    def single(parameters: Parameters, sample: Inputs, target: Tensor) -> Tensor:
        outputs = problem.outputs(parameters, map_tensors(lambda t: t.unsqueeze(0), sample))
        return problem.loss.per_sample(outputs, target.unsqueeze(0)).sum()

    per_sample = vmap(grad(single), in_dims=(None, 0, 0))
    total = torch.zeros(problem.size, dtype=torch.float64, device=problem.device)
    batch = max(1, GRADIENT_BYTES // (2 * problem.size * problem.dtype.itemsize))
    for inputs, targets in problem.forget.batches(batch):
        try:
            gradients = per_sample(problem.parameters, inputs, targets)
        except RuntimeError:
            # What cannot be batched over samples goes one by one.
            singles = [
                grad(single)(problem.parameters, map_tensors(itemgetter(i), inputs), targets[i])
                for i in range(targets.shape[0])
            ]
            gradients = {name: torch.stack([s[name] for s in singles]) for name in problem.parameters}
        total += problem.flatten({name: g.detach().abs().sum(0) for name, g in gradients.items()})
    largest = float(total.max())
    if largest == 0:
        raise ValueError(
            "the forget set's gradients must not all be zero for AGU; got a largest sensitivity of 0. The model fits these "
            "samples exactly: use GradDiff, whose steps are not scaled by sensitivity."
        )
    return (total / largest).to(problem.dtype)
