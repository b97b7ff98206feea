"""The linearised two-set process and how one step maps its second moment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
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
        weight_decay: γ >= 0: adds γ (metric·δ + anchor) to the mean gradient.
        metric: P in the coordinates, with layers' factors of the decay, shape (r, r), as weight decay acts in them; the
            identity when None.
        anchor: P^{1/2} θ* in the coordinates, with those factors, shape (r,), so that weight decay pulls to the origin of
            parameter space; zero when None: it pulls to where the run was linearised.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or the two sets differ in their coordinates.
    """

    retain: SampleFactors
    forget: SampleFactors
    mix: float
    batch_sizes: tuple[int, int]
    sampling: str
    weight_decay: float = 0.0
    metric: Tensor | None = None
    anchor: Tensor | None = None

    def __post_init__(self) -> None:
        owner = "LinearDynamics"
        check_real(self.mix, name="mix", owner=owner, low=0, high=1)
        check_real(self.weight_decay, name="weight_decay", owner=owner, low=0)
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
        for name, value, shape in (("metric", self.metric, (self.rank,) * 2), ("anchor", self.anchor, (self.rank,))):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"`{name}` of `{owner}` must have shape {shape}, as the sets have {self.rank} coordinates; got shape "
                    f"{tuple(value.shape)}. Take it from the same linearisation."
                )

    @property
    def rank(self) -> int:
        """Number r of coordinates."""
        return self.retain.rank

    def at(self, mix: float) -> LinearDynamics:
        """The same process at another mix.

        Args:
            mix: α in [0, 1].

        Returns:
            A copy that shares all tensors.
        """
        other = replace(self, mix=mix)
        other.__dict__["means"] = self.means  # where the cached property keeps them
        return other

    def mean_hessian(self) -> Tensor:
        """D = (1-α) H_R - α H_F (T3), plus weight decay's γ·metric.

        Returns:
            Symmetric matrix of shape (r, r).
        """
        return self.loss_hessian() + self.decay_hessian()

    def loss_hessian(self) -> Tensor:
        """D of the losses alone.

        Returns:
            Symmetric matrix of shape (r, r).
        """
        return (1 - self.mix) * self.means[0] - self.mix * self.means[1]

    def decay_hessian(self) -> Tensor:
        """γ·metric.

        Returns:
            Symmetric matrix of shape (r, r).
        """
        like = self.retain.factors
        metric = torch.eye(self.rank, dtype=like.dtype, device=like.device) if self.metric is None else self.metric
        return self.weight_decay * metric.to(like)

    def mean_gradient(self) -> Tensor:
        """The drift b = (1-α) ḡ_R - α ḡ_F, plus γ·anchor; without decay zero only if both sets are interpolated.

        Returns:
            Vector of shape (r,).
        """
        return self.loss_gradient() + self.decay_gradient()

    def loss_gradient(self) -> Tensor:
        """b of the losses alone.

        Returns:
            Vector of shape (r,).
        """
        return (1 - self.mix) * self.retain.mean_gradient() - self.mix * self.forget.mean_gradient()

    def decay_gradient(self) -> Tensor:
        """γ·anchor.

        Returns:
            Vector of shape (r,).
        """
        zero = torch.zeros_like(self.retain.gradients[0])
        return zero if self.anchor is None else self.weight_decay * self.anchor.to(zero)

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
        return d @ sigma @ d + self.noise(sigma)

    def noise(self, sigma: Tensor) -> Tensor:
        """w_R V_R(Σ) + w_F V_F(Σ), the batches' part of `quadratic`.

        Args:
            sigma: Symmetric matrix Σ of shape (r, r).

        Returns:
            Symmetric matrix of shape (r, r). Cost 2·(m_R + m_F)·C·r² multiplications.
        """
        total = torch.zeros_like(sigma)
        for place, weight in enumerate(self.noise_weights()):
            if weight > 0:
                total = total + weight * self.spread(sigma, place)
        return total

    def spread(self, sigma: Tensor, place: int) -> Tensor:
        """V_S(Σ) of one set, as the sampling has it (table under T6).

        Args:
            sigma: Symmetric matrix Σ of shape (r, r).
            place: 0 for the retain set, 1 for the forget set.

        Returns:
            Symmetric matrix of shape (r, r). Cost 2·m·C·r² multiplications.
        """
        spread = (self.retain, self.forget)[place].sandwich(sigma)
        mean = self.means[place]
        return spread if self.sampling == "poisson" else spread - mean @ sigma @ mean

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
    def means(self) -> tuple[Tensor, Tensor]:
        """H_R and H_F, made once."""
        return self.retain.mean(), self.forget.mean()
