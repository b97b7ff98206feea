"""Per-sample curvature in a small orthonormal basis: what the stability theory reads.

A data set's per-sample Hessians are held as H_i = V_i^T S_i V_i with V_i of shape (C, r) and S_i a diagonal of signs
(all +1 for generalised Gauss-Newton curvature). In a basis of r directions every quantity of sections 2 to 4 of
`papers/theory.md` is a small dense problem, whatever the network's size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SampleFactors:
    """Per-sample curvature factors and gradients of one data set in r coordinates.

    Attributes:
        factors: V_i, shape (m, C, r), float64. H_i = V_i^T diag(signs_i) V_i.
        gradients: Per-sample gradients g_i at the trained parameters, shape (m, r), float64.
        signs: Signs of the factors' rows, shape (m, C), or None when every H_i is positive semi-definite.
        population: Number n of samples in the whole set; the m held here may be a sample of it.
    """

    factors: Tensor
    gradients: Tensor
    population: int
    signs: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number m of samples held."""
        return self.factors.shape[0]

    @property
    def rank(self) -> int:
        """Number r of coordinates."""
        return self.factors.shape[2]

    def thin(self, count: int) -> SampleFactors:
        """Evenly spread samples out of those held.

        Args:
            count: How many to keep at most.

        Returns:
            Factors of those samples, standing for the same population.
        """
        chosen = torch.linspace(0, self.samples - 1, min(count, self.samples)).round().long()
        signs = None if self.signs is None else self.signs[chosen]
        return replace(self, factors=self.factors[chosen], gradients=self.gradients[chosen], signs=signs)

    def scaled(self, factor: float) -> SampleFactors:
        """What they would be with another multiple of P.

        Args:
            factor: That multiple, > 0.

        Returns:
            Curvatures times it, and gradients times its root, as they are in P^{1/2}'s coordinates.
        """
        root = factor**0.5
        return self if factor == 1 else replace(self, factors=self.factors * root, gradients=self.gradients * root)

    def mean(self) -> Tensor:
        """Mean Hessian H_S = mean_i H_i.

        Returns:
            Symmetric matrix of shape (r, r). Cost m·C·r² multiplications.
        """
        m, _, r = self.factors.shape
        rows = self.factors.reshape(-1, r)
        signed = rows if self.signs is None else rows * self.signs.reshape(-1, 1)
        return rows.T @ signed / m

    def mean_gradient(self) -> Tensor:
        """Mean gradient, shape (r,).

        Returns:
            mean_i g_i.
        """
        return self.gradients.mean(0)

    def sandwich(self, sigma: Tensor) -> Tensor:
        """mean_i H_i Σ H_i, the part of T6 that no mean Hessian can give.

        Args:
            sigma: Symmetric matrix Σ of shape (r, r).

        Returns:
            Symmetric matrix of shape (r, r). Cost 2·m·C·r² multiplications; nothing of size m·r² is made.
        """
        m, c, r = self.factors.shape
        rows = self.factors.reshape(m * c, r)
        # V_i Σ V_iᵀ: (m, C, C); then Σ_i V_iᵀ S M S V_i: (r, r). The large products are plain matrix products.
        inner = (rows @ sigma).view(m, c, r) @ self.factors.transpose(1, 2)
        if self.signs is not None:
            inner = inner * self.signs.unsqueeze(-1) * self.signs.unsqueeze(-2)
        return rows.T @ (inner @ self.factors).view(m * c, r) / m

    def matrices(self) -> Tensor:
        """Dense per-sample Hessians, shape (m, r, r): for tests and small problems only.

        Returns:
            The stack of H_i.
        """
        signed = self.factors if self.signs is None else self.factors * self.signs.unsqueeze(-1)
        return self.factors.transpose(1, 2) @ signed
