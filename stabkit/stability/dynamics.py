"""The linearised two-set process and how one step maps its second moment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from stabkit._validate import check_choice, check_int, check_real
from stabkit.curvature.factors import SampleFactors
from stabkit.sampling import SAMPLINGS, noise_level


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearDynamics:
    """δ⁺ = (I - η A_k) δ - η b_k with A_k, b_k the mixed batch means of per-sample curvature and gradients (T2).

    Attributes:
        retain: Per-sample curvature of the retain set, preconditioned, in r coordinates.
        forget: The forget set's, in the same coordinates.
        mix: α in [0, 1].
        batch_sizes: B_R and B_F; the expected ones under Poisson sampling.
        sampling: "without_replacement" (B distinct samples, drawn afresh each step), "with_replacement" or "poisson".

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or the two sets differ in their coordinates.
    """

    retain: SampleFactors
    forget: SampleFactors
    mix: float
    batch_sizes: tuple[int, int]
    sampling: str

    def __post_init__(self) -> None:
        owner = "LinearDynamics"
        check_real(self.mix, name="mix", owner=owner, low=0, high=1)
        check_choice(self.sampling, name="sampling", owner=owner, choices=SAMPLINGS)
        if self.retain.rank != self.forget.rank:
            raise ValueError(
                f"`retain` and `forget` of `{owner}` must be given in the same coordinates; got {self.retain.rank} and "
                f"{self.forget.rank} of them. Take both from one linearisation."
            )
        if len(self.batch_sizes) != 2:
            raise ValueError(
                f"`batch_sizes` of `{owner}` must be two, for retain and forget; got {len(self.batch_sizes)} of them."
            )
        for i, (batch, part) in enumerate(zip(self.batch_sizes, (self.retain, self.forget), strict=True)):
            high = None if self.sampling == "with_replacement" else part.population
            remedy = "A batch without replacement cannot be larger than its set."
            check_int(batch, name=f"batch_sizes[{i}]", owner=owner, low=1, high=high, remedy=remedy)

    @property
    def rank(self) -> int:
        """Number r of coordinates."""
        return self.retain.rank

    def mean_hessian(self) -> Tensor:
        """D = (1-α) H_R - α H_F (T3).

        Returns:
            Symmetric matrix of shape (r, r).
        """
        return (1 - self.mix) * self._means[0] - self.mix * self._means[1]

    def mean_gradient(self) -> Tensor:
        """The drift b = (1-α) ḡ_R - α ḡ_F; zero only if the model has interpolated both sets.

        Returns:
            Vector of shape (r,).
        """
        return (1 - self.mix) * self.retain.mean_gradient() - self.mix * self.forget.mean_gradient()

    def noise_weights(self) -> tuple[float, float]:
        """(1-α)² c_R and α² c_F, with c(B, n) of the sampling scheme (table under T6).

        Returns:
            The retain and the forget set's weight, both >= 0.
        """
        retain, forget = (
            noise_level(batch, part.population, self.sampling)
            for batch, part in zip(self.batch_sizes, (self.retain, self.forget), strict=True)
        )
        return (1 - self.mix) ** 2 * retain, self.mix**2 * forget

    def quadratic(self, sigma: Tensor) -> Tensor:
        """E(Σ) = E[A_k Σ A_k], the part of T_η that goes with η² (T6).

        Args:
            sigma: Symmetric matrix Σ of shape (r, r).

        Returns:
            Symmetric matrix of shape (r, r). Cost 2·(m_R + m_F)·C·r² multiplications.
        """
        d = self.mean_hessian()
        total = d @ sigma @ d
        for weight, part, mean in zip(self.noise_weights(), (self.retain, self.forget), self._means, strict=True):
            if weight > 0:
                total = total + weight * part.sandwich(sigma)
                if self.sampling != "poisson":
                    total = total - weight * (mean @ sigma @ mean)
        return total

    def apply(self, sigma: Tensor, lr: float) -> Tensor:
        """T_η(Σ) = Σ - η (DΣ + ΣD) + η² E(Σ), the second moment after a step without drift (T6).

        Args:
            sigma: Symmetric matrix Σ of shape (r, r).
            lr: Step size η.

        Returns:
            Symmetric matrix of shape (r, r); positive semi-definite if Σ is. Cost that of `quadratic`.
        """
        d = self.mean_hessian()
        return sigma - lr * (d @ sigma + sigma @ d) + lr**2 * self.quadratic(sigma)

    @cached_property
    def _means(self) -> tuple[Tensor, Tensor]:
        """H_R and H_F, made once."""
        return self.retain.mean(), self.forget.mean()
