"""P = (H_R + λI)^{-1} H_F (H_R + λI)^{-1}, the preconditioner of unlearning in the retained outputs' metric (theory §8).

Matrix-free as an operator; with a symmetric root, as T2's coordinates need it, as a matrix of low rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stabkit._validate import check_int
from stabkit.curvature.operators import CurvatureOperator
from stabkit.directions.remain import forget_curvature
from stabkit.directions.retain_inverse import RetainInverse, resolve_inverse
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.spectrum import Estimate, SolverOutcome, extreme_eigenpairs
from stabkit.spectrum._common import rademacher
from stabkit.spectrum.estimate import from_samples

OWNER = "remain_preconditioner"
EIGEN_TOLERANCE = 1e-4  # any orthonormal directions make a valid P; near eigenvectors make a good one
PROBES = 8


@dataclass(frozen=True, eq=False)
class LowRank(Preconditioner):
    """P = W Wᵀ, with the symmetric root Q Σ Qᵀ where Q Σ comes from the singular value decomposition of W.

    T2 holds for any root B with P = B Bᵀ, but the coordinates of a linearisation are made with the symmetric one.

    Attributes:
        factor: W, shape (d, q).
    """

    factor: Tensor

    def __post_init__(self) -> None:
        if self.factor.dim() != 2:
            raise ValueError(f"`factor` of `LowRank` must be of shape (d, q); got {tuple(self.factor.shape)}.")
        wrong = self.factor.numel() - int(torch.isfinite(self.factor).sum())
        if wrong:
            raise ValueError(
                f"`factor` of `LowRank` must be finite; got {wrong} of {self.factor.numel()} entries NaN or infinite."
            )

    def apply(self, vectors: Tensor) -> Tensor:
        """W Wᵀ v.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            Tensor of the same shape. Cost: 2·d·q multiplications a vector.
        """
        factor = self.factor.to(vectors.device, vectors.dtype)
        return factor @ (factor.T @ vectors)

    def sqrt(self, vectors: Tensor) -> Tensor:
        """Q Σ Qᵀ v.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            Tensor of the same shape. Cost: 2·d·q multiplications a vector, and d·q² once.
        """
        left, scaled = (part.to(vectors.device, vectors.dtype) for part in self._root)
        return scaled @ (left.T @ vectors)

    @property
    def norm(self) -> float:
        """λ_max(P)."""
        left, scaled = self._root
        return float((left * scaled).sum(0).max().square()) if left.shape[1] else 0.0

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor]:
        """Q and Q Σ, each of shape (d, q)."""
        left, strengths, _ = torch.linalg.svd(self.factor, full_matrices=False)
        return left, left * strengths


class RemainOperator(CurvatureOperator):
    """P = (H_R + λI)^{-1} H_F (H_R + λI)^{-1} by its products: two solves and one product with H_F a vector.

    Symmetric, and semi-definite if H_F is, up to the tolerance of the solves. It has no root that products alone give, so it
    is no `Preconditioner`; `extreme_eigenpairs` and `trace` take it.
    """

    def __init__(
        self, problem: UnlearningProblem, inverse: RetainInverse, *, forget_samples: int | None = 512, seed: int = 0
    ) -> None:
        """Put it together.

        Args:
            problem: The unlearning problem.
            inverse: (H_R + λI)^{-1}.
            forget_samples: Forget samples behind H_F; all when None.
            seed: Seed of their choice.
        """
        super().__init__(problem.size, problem.dtype, problem.device)
        self.inverse = inverse
        self.forget = forget_curvature(problem, inverse, forget_samples, seed, owner="RemainOperator")

    def _matmat(self, block: Tensor) -> Tensor:
        return self.inverse.apply(self.forget @ self.inverse.apply(block))


@dataclass(frozen=True, eq=False, kw_only=True)
class RemainPreconditioner(LowRank):
    """P = s (H_R + λI)^{-1} U S Uᵀ (H_R + λI)^{-1} with U S Uᵀ of the q leading eigenpairs of H_F.

    Its factor is W = √s (H_R + λI)^{-1} U S^{1/2}.

    Attributes:
        damping: λ.
        scale: s, by which P is 1 in the direction that it stretches most.
        captured: Share of the trace of P that q eigenpairs have, with the standard error of the rest's estimate.
        eigenpairs: How the search for them ended; those there were make a valid P all the same.
        products: Products spent with H_R and with H_F.
        gradient_equivalents: Per-sample gradients behind them.
    """

    damping: float
    scale: float
    captured: Estimate
    eigenpairs: SolverOutcome
    products: tuple[int, int]
    gradient_equivalents: float


def remain_preconditioner(
    problem: UnlearningProblem,
    *,
    rank: int = 50,
    inverse: str | RetainInverse = "cg",
    forget_samples: int | None = 512,
    seed: int = 0,
) -> RemainPreconditioner:
    """The preconditioner of remain-Newton steps, of rank q: what lies outside the q directions does not move.

    H_F of a Gauss-Newton kind has rank at most (C - 1)·n_F for C classes; with q as large P is exact. Below that the leading
    eigenpairs of H_F are not those of P, as flat directions of H_R count for more in P; `captured` says what is missing.

    Args:
        problem: The unlearning problem.
        rank: q, the number of eigenpairs of H_F.
        inverse: (H_R + λI)^{-1} with Gauss-Newton curvature, or the name of a method of `RetainInverse`, which is then taken
            with its defaults.
        forget_samples: Forget samples behind H_F; all when None.
        seed: Seed of samples, start vectors and probes.

    Returns:
        The preconditioner. Cost: up to 8·q + 100 products with H_F for the eigenpairs, and q + 8 solves. Memory: about 8·d·q
        numbers.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, the curvature is not Gauss-Newton, or H_F is zero.
    """
    check_int(rank, name="rank", owner=OWNER, low=1)
    inverse = resolve_inverse(problem, inverse, seed=seed, owner=OWNER)
    if inverse.curvature != "ggn":
        raise ValueError(
            f"`inverse` of `{OWNER}` must be of curvature 'ggn', with which P is positive semi-definite; got "
            f"{inverse.curvature!r}."
        )
    forget = forget_curvature(problem, inverse, forget_samples, seed, owner=OWNER)
    rank, before = min(rank, problem.size), inverse.operator.products
    pairs = extreme_eigenpairs(
        forget,
        ends=rank,
        which="largest",
        tolerance=EIGEN_TOLERANCE,
        max_products=8 * rank + 100,
        block=min(8, rank),
        seed=seed,
    )
    if not pairs.largest > 0:
        raise ValueError(
            f"`problem` of `{OWNER}` must have curvature on the forget set; got a largest eigenvalue of "
            f"{pairs.largest:.3g}. The model fits these samples to rounding: use GradDiff."
        )
    weighed = pairs.vectors * pairs.values.clamp_min(0).sqrt().to(pairs.vectors)  # U S^{1/2}
    probes = rademacher(problem.size, PROBES, torch.Generator().manual_seed(seed)).T.to(weighed)
    solved = inverse.apply(torch.cat([weighed, probes], 1))
    factor, probed = solved[:, :rank], solved[:, rank:]
    # zᵀ(H_R + λI)^{-1} [H_F - U S Uᵀ] (H_R + λI)^{-1} z
    whole, inside = (probed * (forget @ probed)).sum(0).double(), (weighed.T @ probed).square().sum(0).double()
    rest = from_samples((whole - inside).cpu(), products=PROBES)
    kept = float(factor.double().square().sum())
    total = kept + max(rest.value, 0.0)
    stretch = LowRank(factor).norm
    spent = inverse.operator.products - before, forget.products
    samples = inverse.indices.numel(), problem.forget.subset(forget_samples, seed).numel()
    return RemainPreconditioner(
        factor=factor / math.sqrt(stretch),
        damping=inverse.damping,
        scale=1 / stretch,
        captured=Estimate(
            value=kept / total,
            standard_error=rest.standard_error * kept / total**2,
            samples=PROBES,
            products=PROBES,
        ),
        eigenpairs=pairs.outcome,
        products=spent,
        gradient_equivalents=2.0 * sum(p * m for p, m in zip(spent, samples, strict=True)),
    )
