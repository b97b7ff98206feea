"""Preconditioners P of a step (T1) and their square roots, which make a preconditioned problem symmetric (T2)."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

ROUGH = 10.0  # square roots of the rounding unit by which a checked preconditioner may be off


class Preconditioner(abc.ABC):
    """A positive semi-definite d x d matrix, applied to vectors (d,) or blocks (d, k).

    Attributes:
        gradient_equivalents: Per-sample gradients that it took to make; None where `Algorithm.preconditioner_cost` has it.
    """

    gradient_equivalents: float | None = None

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


def check_preconditioner(preconditioner: object, like: Tensor, *, owner: str) -> None:
    """Refuse what no prediction could be right for: P must be symmetric, P >= 0, and its root must be its root.

    Args:
        preconditioner: What an algorithm gave.
        like: A vector (d,) with the problem's dtype and device.
        owner: The algorithm, for the error.

    Raises:
        TypeError: If it is no `Preconditioner`.
        ValueError: If two random vectors show that it is not such a matrix. Cost: three products and four roots of a vector.
    """
    if not isinstance(preconditioner, Preconditioner):
        raise TypeError(
            f"`preconditioner` of `{owner}` must return a stabkit.preconditioner.Preconditioner; got "
            f"{type(preconditioner).__name__}. Diagonal(p) is the one with entries p, Identity() leaves steps as they are."
        )

    if isinstance(preconditioner, Identity) and type(preconditioner).apply is Identity.apply:
        return

    def refuse(what: str, remedy: str) -> None:
        raise ValueError(f"`preconditioner` of `{owner}` must return {what}; got {preconditioner!r:.80}. {remedy}")

    d = like.numel()
    block = torch.randn(d, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like)

    def done(name: str, vectors: Tensor) -> Tensor:
        try:
            found = getattr(preconditioner, name)(vectors)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"`preconditioner` of `{owner}` must return one that takes vectors (d,) and blocks (d, k) of the model's "
                f"d = {d} trainable parameters; got {preconditioner!r:.80}, which does not ({error})."
            ) from error
        if not isinstance(found, Tensor) or found.shape != vectors.shape or not bool(torch.isfinite(found).all()):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            refuse(
                f"one whose `{name}` gives a finite tensor of the argument's shape, {tuple(vectors.shape)}",
                f"It gave {got}, or what is not finite.",
            )
        return found

    moved, alone, rooted = done("apply", block), done("apply", block[:, 0]), done("sqrt", done("sqrt", block))
    rough = ROUGH * torch.finfo(like.dtype).eps ** 0.5
    size = float(block.norm() * moved.norm())
    products = block.T @ moved
    if float((moved[:, 0] - alone).norm()) > rough * float(moved.norm()):
        refuse(
            "one that does to a column of a block what it does to a vector",
            "Entries (d,) need unsqueeze(1) for a block.",
        )
    if abs(float(products[0, 1] - products[1, 0])) > rough * size:
        refuse("a symmetric P, uᵀPv = vᵀPu", "The theory, and the rollouts, are of a symmetric one.")
    if float(products.diagonal().min()) < -rough * size:
        refuse("a P >= 0, vᵀPv >= 0", "A negative direction would turn descent into ascent.")
    if float((rooted - moved).norm()) > rough * float(moved.norm()):
        refuse("one whose `sqrt` is the root of its `apply`, sqrt(sqrt(v)) = Pv", "The root of diag(p) is diag(√p).")


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
