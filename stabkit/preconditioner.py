"""Preconditioners P of a step (T1) and their square roots, which make a preconditioned problem symmetric (T2)."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor


class Preconditioner(abc.ABC):
    """A positive semi-definite d x d matrix, applied to vectors (d,) or blocks (d, k)."""

    @abc.abstractmethod
    def apply(self, vectors: Tensor) -> Tensor:
        """P v.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            Tensor of the same shape.
        """

    @abc.abstractmethod
    def sqrt(self, vectors: Tensor) -> Tensor:
        """P^{1/2} v, the symmetric root.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            Tensor of the same shape.
        """


@dataclass(frozen=True)
class Identity(Preconditioner):
    """P = I: plain gradient steps."""

    def apply(self, vectors: Tensor) -> Tensor:
        """v itself.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            The argument.
        """
        return vectors

    def sqrt(self, vectors: Tensor) -> Tensor:
        """v itself.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            The argument.
        """
        return vectors


@dataclass(frozen=True, eq=False)
class Diagonal(Preconditioner):
    """P = diag(p) with p >= 0.

    Attributes:
        diagonal: p, shape (d,).
    """

    diagonal: Tensor

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.diagonal).all()) or bool((self.diagonal < 0).any()):
            worst = float(self.diagonal.min())
            raise ValueError(
                f"`diagonal` of `Diagonal` must be finite and >= 0; got a smallest entry of {worst:g}. A preconditioner "
                "with negative entries would turn descent into ascent."
            )

    def apply(self, vectors: Tensor) -> Tensor:
        """p ∘ v.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            Tensor of the same shape.
        """
        return vectors * self._like(self.diagonal, vectors)

    def sqrt(self, vectors: Tensor) -> Tensor:
        """√p ∘ v.

        Args:
            vectors: Shape (d,) or (d, k).

        Returns:
            Tensor of the same shape.
        """
        return vectors * self._like(self.diagonal.sqrt(), vectors)

    @staticmethod
    def _like(diagonal: Tensor, vectors: Tensor) -> Tensor:
        diagonal = diagonal.to(vectors.device, vectors.dtype)
        return diagonal if vectors.dim() == 1 else diagonal.unsqueeze(1)
