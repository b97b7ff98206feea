"""From a gradient to a step: what SGD's momentum or AdamW make of it (T1, T15), the same in a run and in its rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.algorithms.base import Algorithm


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """What an optimiser carries from one step to the next.

    Attributes:
        first: SGD's velocity, or AdamW's running mean of gradients m, of the parameters' shape.
        second: AdamW's running mean of their squares v, of the same shape; None for SGD.
    """

    first: Tensor
    second: Tensor | None = None

    @classmethod
    def zero(cls, algorithm: Algorithm, like: Tensor) -> Moments:
        """Before the first step.

        Args:
            algorithm: Whose optimiser it is.
            like: A tensor of the parameters' shape.

        Returns:
            Zeros.
        """
        return cls(first=torch.zeros_like(like), second=torch.zeros_like(like) if algorithm.adaptive else None)

    def __getitem__(self, place: object) -> Moments:
        """Part of them, by an index into both."""
        second = None if self.second is None else self.second[place]  # type: ignore[index]
        return Moments(first=self.first[place], second=second)  # type: ignore[index]

    def kept(self, before: Moments, over: Tensor) -> Moments:
        """These, or those of before.

        Args:
            before: Moments of the same shape.
            over: Whether to keep those, as a tensor of no dimension on their device, which is not waited for.

        Returns:
            Either.
        """
        second = None
        if self.second is not None and before.second is not None:
            second = torch.where(over, before.second, self.second)
        return Moments(first=torch.where(over, before.first, self.first), second=second)


def updated(algorithm: Algorithm, moments: Moments, gradient: Tensor, step: int) -> tuple[Tensor, Moments]:
    """What the step size multiplies, and what is carried on.

    Args:
        algorithm: Whose optimiser it is.
        moments: What the step before left.
        gradient: The step's direction, after P, clipping and SGD's decay; any shape.
        step: The step's number, from 1.

    Returns:
        SGD's velocity, looked ahead by Nesterov's, or AdamW's m̂/(√v̂ + ε) without its decay, in the gradient's shape; and the
        moments after the step.
    """
    if moments.second is None:
        velocity = algorithm.momentum * moments.first + gradient if algorithm.momentum else gradient
        ahead = gradient + algorithm.momentum * velocity if algorithm.nesterov else velocity
        return ahead, Moments(first=velocity)
    first_rate, second_rate = algorithm.betas
    first = torch.lerp(moments.first, gradient, 1 - first_rate)
    second = second_rate * moments.second + (1 - second_rate) * gradient.square()
    # As torch.optim.AdamW: both means begin at 0, which the early steps are freed from.
    root = second.sqrt() / (1 - second_rate**step) ** 0.5 + algorithm.eps
    return first / root / (1 - first_rate**step), Moments(first=first, second=second)
