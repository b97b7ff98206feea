"""Unlearning directions in the Euclidean metric and in that of the retained outputs (theory §8, Huang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from stabkit._table import Shown, Table, number
from stabkit._validate import check_int, check_real
from stabkit.curvature import DataOperator, curvature_operator
from stabkit.curvature.gradients import mean_gradient
from stabkit.directions.cg import SolveOutcome
from stabkit.directions.retain_inverse import RetainInverse, resolve_inverse
from stabkit.problem import UnlearningProblem


@dataclass(frozen=True, kw_only=True, eq=False)
class UnlearningDirections(Shown):
    """The two steepest directions of unlearning at θ*, to be added to the parameters.

    Attributes:
        euclidean: w_F H_F (H_R + λI)^{-1} ḡ_F - w_R ḡ_R, shape (d,): steepest descent on the second-order distance to the
            retrained model. Not of the form T1, as H_F H_R^{-1} is not symmetric and acts on one gradient alone.
        remain: (H_R + λI)^{-1} H_F (H_R + λI)^{-1} ḡ_F, shape (d,): the forget part in the metric H_R + λI, which is T1's
            step for α = 1 and P = (H_R + λI)^{-1} H_F (H_R + λI)^{-1}.
        forget_gradient: ḡ_F, shape (d,).
        retain_gradient: ḡ_R, shape (d,).
        weights: (w_F, w_R).
        damping: λ.
        method: How H_R was inverted.
        outcome: How the solves ended; None where there were none.
    """

    euclidean: Tensor
    remain: Tensor
    forget_gradient: Tensor
    retain_gradient: Tensor
    weights: tuple[float, float]
    damping: float
    method: str
    outcome: SolveOutcome | None

    def __str__(self) -> str:
        names = ("euclidean", "remain", "forget_gradient", "retain_gradient")
        table = Table(
            title=f"Unlearning directions of {self.euclidean.numel():,} parameters, λ = {number(self.damping)}",
            columns=("direction", "norm", "cosine to the forget gradient"),
            rows=tuple(
                (
                    name,
                    number(float(v.norm())),
                    number(float(nn.functional.cosine_similarity(v, self.forget_gradient, 0))),
                )
                for name, v in ((name, getattr(self, name)) for name in names)
            ),
            footer=f"H_R inverted by {self.method!r}" + (f": {self.outcome.reason}" if self.outcome else ""),
        )
        return str(table)


def unlearning_directions(
    problem: UnlearningProblem,
    *,
    inverse: str | RetainInverse = "cg",
    weights: tuple[float, float] | None = None,
    forget_samples: int | None = 512,
    seed: int = 0,
) -> UnlearningDirections:
    """Where to go from θ* to forget F, and where to go if the predictions on R are to stay.

    The distance to the retrained θ_r is J(θ) = ½ (θ - θ_r)ᵀ(p_F H_F + p_R H_R)(θ - θ_r) with p the sets' shares of the data.
    One Newton step puts θ_r at θ* - H_R^{-1} ḡ_R, and where θ* minimises the loss over both sets, n_R ḡ_R = -n_F ḡ_F. Hence
    -∇J(θ*) = w_F H_F H_R^{-1} ḡ_F - w_R ḡ_R with w_F = p_F n_F/n_R and w_R = p_R, to second order and up to damping.

    Args:
        problem: The unlearning problem.
        inverse: (H_R + λI)^{-1}, or the name of a method of `RetainInverse`, which is then taken with its defaults.
        weights: (w_F, w_R) in place of those.
        forget_samples: Forget samples behind H_F, of the inverse's kind of curvature; all when None.
        seed: Seed of their choice.

    Returns:
        Both directions. Cost: one gradient for every sample of both sets, two solves and a product with H_F.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain.
    """
    owner = "unlearning_directions"
    shares = [problem.forget.size, problem.retain.size]
    if weights is None:
        total = sum(shares)
        weights = shares[0] / total * shares[0] / shares[1], shares[1] / total
    if not isinstance(weights, tuple | list) or len(weights) != 2:
        got = f"{len(weights)} values" if isinstance(weights, tuple | list) else type(weights).__name__
        kind = ValueError if isinstance(weights, tuple | list) else TypeError
        raise kind(
            f"`weights` of `{owner}` must be a pair (w_F, w_R), one number for each set; got {got}. None takes those of the "
            "sets' sizes."
        )
    w_forget, w_retain = (
        check_real(weight, name=f"weights[{place}]", owner=owner, low=0) for place, weight in enumerate(weights)
    )
    inverse = resolve_inverse(problem, inverse, seed=seed, owner=owner)
    forget_gradient, retain_gradient = (mean_gradient(problem, s) for s in (problem.forget, problem.retain))
    forget = forget_curvature(problem, inverse, forget_samples, seed, owner=owner)
    pulled = forget @ inverse.apply(forget_gradient)  # H_F (H_R + λI)^{-1} ḡ_F
    return UnlearningDirections(
        euclidean=w_forget * pulled - w_retain * retain_gradient,
        remain=inverse.apply(pulled),
        forget_gradient=forget_gradient,
        retain_gradient=retain_gradient,
        weights=(w_forget, w_retain),
        damping=inverse.damping,
        method=inverse.method,
        outcome=inverse.outcome,
    )


def forget_curvature(
    problem: UnlearningProblem, inverse: RetainInverse, samples: int | None, seed: int, *, owner: str
) -> DataOperator:
    """H_F of the inverse's kind of curvature.

    Args:
        problem: The unlearning problem.
        inverse: (H_R + λI)^{-1}.
        samples: Forget samples; all when None.
        seed: Seed of their choice.
        owner: The public function that asks, for the error.

    Returns:
        The operator.

    Raises:
        TypeError: If the number of samples is no whole number.
        ValueError: If it is below 1.
    """
    if samples is not None:
        check_int(samples, name="forget_samples", owner=owner, low=1, remedy="None takes all of them.")
    indices = problem.forget.subset(samples, seed)
    return curvature_operator(problem, problem.forget, kind=inverse.curvature, indices=indices)
