"""Remain-Newton: gradient steps measured by what they do to the retained outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stabkit._validate import check_choice, check_int, check_real, check_seed
from stabkit.algorithms.base import Algorithm
from stabkit.directions.preconditioner import PROBES, remain_preconditioner
from stabkit.directions.retain_inverse import METHODS, RetainInverse
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem

SOLVE_PRODUCTS = 120  # ½√κ·ln(2/tolerance) at κ = 1000, the default damping's, and a tolerance of a thousandth


@dataclass(frozen=True, kw_only=True)
class RemainNewton(Algorithm):
    """P = s (H_R + λI)^{-1} H_F (H_R + λI)^{-1}, of rank q and scaled to norm 1, at any mix (theory §8).

    With α = 1 it is the steepest ascent in the retained outputs' metric that Huang et al. (arXiv 2409.19732) derive, with P
    taken once, at θ*, instead of anew at every step. Chosen here: the Gauss-Newton curvature, which makes P semi-definite;
    its q leading directions; the scale s, so that a step size is comparable with that of plain steps; the damping, on which
    P depends wherever H_R is flat; the default mix, since a run without retain steps has nothing that bounds it.

    P is fixed and semi-definite, so all of the linear theory holds for it by T2's substitution, and the rollout too. With
    weight decay the rollout is of first order, as for every P that is no projection.

    Attributes:
        rank: q, the number of eigenpairs of H_F.
        damping: λ > 0; 10⁻³ λ_max(H_R) when None.
        inverse: How (H_R + λI)^{-1} is applied: a method of `stabkit.directions.RetainInverse`.
        curvature_samples: Samples of each set behind the curvature; all when None.
        seed: Seed of their choice and of the eigensolver.
    """

    name: ClassVar[str] = "remain_newton"

    rank: int = 50
    damping: float | None = None
    inverse: str = "cg"
    curvature_samples: int | None = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if self.adaptive:
            raise ValueError(
                f"`optimizer` of `{owner}` must be 'sgd', as its P is no `Diagonal`; got 'adamw', which takes each "
                "parameter by itself. Leave it out."
            )
        plain: dict[str, object] = {
            "rank": check_int(self.rank, name="rank", owner=owner, low=1),
            "seed": check_seed(self.seed, owner=owner),
        }
        if self.damping is not None:
            remedy = "None takes a thousandth of λ_max(H_R)."
            plain["damping"] = check_real(
                self.damping, name="damping", owner=owner, low=0, low_open=True, remedy=remedy
            )
        check_choice(self.inverse, name="inverse", owner=owner, choices=METHODS)
        if self.curvature_samples is not None:
            remedy = "None takes all of them."
            count = check_int(self.curvature_samples, name="curvature_samples", owner=owner, low=1, remedy=remedy)
            plain["curvature_samples"] = count
        for key, value in plain.items():
            object.__setattr__(self, key, value)

    def preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """The matrix of rank q.

        Args:
            problem: The unlearning problem.

        Returns:
            The preconditioner. Cost: up to 8·q + 100 products with H_F, and q + 8 solves with H_R.
        """
        inverse = RetainInverse(
            problem, method=self.inverse, damping=self.damping, samples=self.curvature_samples, seed=self.seed
        )
        return remain_preconditioner(
            problem, rank=self.rank, inverse=inverse, forget_samples=self.curvature_samples, seed=self.seed
        )

    def preconditioner_cost(self, problem: UnlearningProblem) -> float:
        """What the eigenpairs of H_F and the solves take at most, or nearly: what was spent is known afterwards.

        Args:
            problem: The unlearning problem.

        Returns:
            Two gradients for each of 8·q + 100 products, a forget sample, and with conjugate gradients for each of
            (q + 8)·120, a retain sample: the bound of those at the default damping.
        """
        retain, forget = (
            s.size if self.curvature_samples is None else min(s.size, self.curvature_samples)
            for s in (problem.retain, problem.forget)
        )
        rank = min(self.rank, problem.size)
        solves = (rank + PROBES) * SOLVE_PRODUCTS if self.inverse == "cg" else 0
        return 2.0 * ((8 * rank + 100) * forget + solves * retain)
