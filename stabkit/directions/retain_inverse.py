"""(H_R + λI)^{-1} of an unlearning problem, by whichever way, with the damping that belongs to it."""

from __future__ import annotations

import warnings

from torch import Tensor

from stabkit._errors import LowConfidenceWarning, caller_level
from stabkit._validate import check_choice, check_int, check_real, check_seed
from stabkit.curvature import DataOperator, curvature_operator
from stabkit.directions.cg import SolveOutcome, damped_inverse, preconditioner_column
from stabkit.directions.diagonals import diagonal_inverse, fisher_diagonal, hutchinson_diagonal
from stabkit.directions.kronecker import KroneckerInverse, kronecker_inverse
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem
from stabkit.spectrum import extreme_eigenpairs

METHODS = ("cg", "diagonal", "fisher", "kfac", "ekfac")
DAMPING_SHARE = 1e-3  # of the largest curvature, as under T5
SCALE_TOLERANCE = 1e-2  # to which that is found
PROBES = 100


class RetainInverse:
    """(H_R + λI)^{-1} at θ*, or an approximation of it.

    Attributes:
        method: "cg", "diagonal", "fisher", "kfac" or "ekfac".
        damping: λ: below it a curvature of the retain loss counts as none.
        curvature: "ggn" or "hessian", of H_R.
        operator: H_R over the chosen retain samples.
        indices: Those samples, shape (m,).
        outcome: How the worst of the solves so far ended; None where nothing is solved for.
    """

    def __init__(
        self,
        problem: UnlearningProblem,
        *,
        method: str = "cg",
        damping: float | None = None,
        curvature: str = "ggn",
        samples: int | None = 512,
        tolerance: float = 1e-3,
        max_products: int = 200,
        preconditioner: Diagonal | None = None,
        seed: int = 0,
    ) -> None:
        """Measure what the method needs.

        Args:
            problem: The unlearning problem.
            method: "cg" solves by conjugate gradients; "diagonal" takes the diagonal of H_R estimated from 100 random signs,
                "fisher" that of the empirical Fisher, exactly; "kfac" and "ekfac" are curvlinops's, an optional extra.
            damping: λ > 0; 10⁻³ λ_max(H_R) when None, our choice. What H_R^{-1} does in flat directions is 1/λ, so the
                damping is part of every result.
            curvature: "ggn", semi-definite where the loss is convex in the outputs, or "hessian". Only "cg" and "diagonal"
                read it, and λ_max.
            samples: Retain samples behind H_R; all when None.
            tolerance: Of the solves' residuals, as a share of the right-hand side. Only "cg", which solves, reads it and
                `max_products`.
            max_products: Products for each right-hand side of a solve, at least 2.
            preconditioner: diag(p), p > 0, near (H_R + λI)^{-1}, of "cg" alone; it changes how fast a solve is, not what it
                finds. `hutchinson_diagonal(inverse.operator).inverse(inverse.damping)` makes one of such an inverse without.
            seed: Seed of the samples and probes.

        Raises:
            ImportError: If curvlinops is wanted and not installed.
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of its domain, or H_R has no curvature to take a damping from.
        """
        owner = "RetainInverse"
        self.method = check_choice(method, name="method", owner=owner, choices=METHODS)
        check_choice(curvature, name="curvature", owner=owner, choices=("ggn", "hessian"))
        check_real(tolerance, name="tolerance", owner=owner, low=0)
        check_int(max_products, name="max_products", owner=owner, low=2, remedy="A step and its residual take as many.")
        check_seed(seed, owner=owner)
        if preconditioner is not None and method != "cg":
            raise ValueError(
                f"`preconditioner` of `{owner}` must be None where nothing is solved for; got one with method={method!r}. "
                "Take method='cg', or leave it out."
            )
        if damping is not None:
            check_real(damping, name="damping", owner=owner, low=0, low_open=True)
        if samples is not None:
            check_int(samples, name="samples", owner=owner, low=1, remedy="None takes all of them.")
        self.curvature = curvature
        self.indices = problem.retain.subset(samples, seed)
        self.operator: DataOperator = curvature_operator(problem, problem.retain, kind=curvature, indices=self.indices)
        preconditioner_column(preconditioner, self.operator, owner=owner)
        self._preconditioner = preconditioner
        self.damping = self._share_of_largest() if damping is None else float(damping)
        self.outcome: SolveOutcome | None = None
        self._tolerance, self._max_products = tolerance, max_products
        self._direct: Diagonal | KroneckerInverse | None = None
        if method == "diagonal":
            self._direct = hutchinson_diagonal(self.operator, probes=PROBES, seed=seed).inverse(self.damping)
        elif method == "fisher":
            diagonal = fisher_diagonal(problem, problem.retain, indices=self.indices)
            self._direct = diagonal_inverse(diagonal, damping=self.damping)
        elif method in {"kfac", "ekfac"}:
            self._direct = kronecker_inverse(
                problem, problem.retain, damping=self.damping, corrected=method == "ekfac", indices=self.indices
            )

    def apply(self, vectors: Tensor) -> Tensor:
        """(H_R + λI)^{-1} v.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            Tensor of the same shape. Cost: up to `max_products` products with H_R a vector by "cg", which warns where it did
            not converge; a multiplication otherwise.
        """
        if self._direct is not None:
            return self._direct.apply(vectors)
        solution = damped_inverse(
            self.operator,
            vectors,
            damping=self.damping,
            tolerance=self._tolerance,
            max_products=self._max_products,
            preconditioner=self._preconditioner,
        )
        if self.outcome is None or not solution.converged:
            self.outcome = solution.outcome
        if not solution.converged:
            warnings.warn(
                f"(H_R + {self.damping:.3g}·I)⁻¹ was not solved to {self._tolerance:g} but to "
                f"{float(solution.residuals.max()):.2g}: {solution.reason}. To mend it: {solution.remedy}.",
                LowConfidenceWarning,
                stacklevel=caller_level(),
            )
        return solution.vectors

    def _share_of_largest(self) -> float:
        """10⁻³ λ_max(H_R)."""
        largest = extreme_eigenpairs(self.operator, which="largest", tolerance=SCALE_TOLERANCE).largest
        if not largest > 0:
            raise ValueError(
                f"`damping` of `RetainInverse` must be given where H_R has no positive curvature; got None with a largest "
                f"eigenvalue of {largest:.3g}. The model fits the retain set to rounding, or its loss is linear."
            )
        return DAMPING_SHARE * largest


def resolve_inverse(
    problem: UnlearningProblem, inverse: str | RetainInverse, *, seed: int, owner: str
) -> RetainInverse:
    """The inverse behind a method's name, with its defaults, or the inverse itself.

    Args:
        problem: The unlearning problem.
        inverse: One of the methods of `RetainInverse`, or an object of that class.
        seed: Seed of an inverse made here.
        owner: The public function that asks, for the error.

    Returns:
        The inverse.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is no such method.
    """
    if isinstance(inverse, RetainInverse):
        return inverse
    if not isinstance(inverse, str):
        raise TypeError(
            f"`inverse` of `{owner}` must be a RetainInverse or the name of a method; got {type(inverse).__name__}. "
            "RetainInverse(problem, method='cg', damping=...) makes one."
        )
    return RetainInverse(problem, method=inverse, seed=seed)
