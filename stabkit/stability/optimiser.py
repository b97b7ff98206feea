"""How gradients become steps: momentum, weight decay's place, and step sizes and mixes that change from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from stabkit._validate import check_int, check_real
from stabkit.stability.dynamics import LinearDynamics


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """v⁺ = βv + g and δ⁺ = δ - ηv⁺, with g = A δ + b: what torch.optim.SGD does without dampening.

    Adam whose second-moment estimate stands still is the same thing: P = diag(1/(√v̂ + ε)) (`frozen_adam`), β = β₁ and
    η(1-β₁) as the step size, divided by 1-β₁^k in step k as long as that bias correction matters. AdamW's decoupled decay is
    multiplied by that step size here and by η there: give γ/(1-β₁), and leave bias correction out, which is none of its.

    Attributes:
        momentum: β in [0, 1).
        nesterov: δ⁺ = δ - η(g + βv⁺) instead, Nesterov's momentum as PyTorch has it.
        decoupled: Weight decay moves the parameters by -ηγ(δ + anchor) outside P and momentum (AdamW), in place of joining
            the gradient (SGD, Adam). Then the dynamics' metric is the identity and its anchor P^{-1/2} θ*.
    """

    momentum: float = 0.0
    nesterov: bool = False
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_real(self.momentum, name="momentum", owner="Optimiser", low=0, high=1, high_open=True)
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "`momentum` of `Optimiser` must be above 0 with nesterov=True; got 0. Leave `nesterov` out: without "
                "momentum there is nothing to look ahead along."
            )

    @property
    def gradient_share(self) -> float:
        """s in δ⁺ = δ - η(s g + q v): 1, or 1+β with Nesterov's momentum."""
        return 1 + self.momentum if self.nesterov else 1.0

    @property
    def velocity_share(self) -> float:
        """q in δ⁺ = δ - η(s g + q v): β, or β² with Nesterov's momentum."""
        return self.momentum**2 if self.nesterov else self.momentum

    def advance(
        self, delta: Tensor, velocity: Tensor, gradient: Tensor, pull: Tensor, lr: float
    ) -> tuple[Tensor, Tensor]:
        """δ and v after a step.

        Args:
            delta: δ, any shape.
            velocity: v, the same shape.
            gradient: Gradient of the losses.
            pull: Weight decay's part of it.
            lr: η.

        Returns:
            The new δ and v.
        """
        if not self.decoupled:
            gradient = gradient + pull
        change = self.gradient_share * gradient + self.velocity_share * velocity
        if self.decoupled:
            change = change + pull
        return delta - lr * change, self.momentum * velocity + gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step of a run.

    Attributes:
        lr: η_k.
        dynamics: The process at the mix α_k.
    """

    lr: float
    dynamics: LinearDynamics


def planned_steps(
    dynamics: LinearDynamics,
    lr: float | Sequence[float],
    mix: float | Sequence[float] | None,
    steps: int,
    *,
    owner: str,
) -> Iterator[Step]:
    """Check a plan of step sizes and mixes, and go through it.

    Args:
        dynamics: The process; its own mix serves where `mix` is None.
        lr: η, or η_k of every step.
        mix: α, or α_k of every step.
        steps: Number K of steps.
        owner: The function that was called.

    Returns:
        The K steps.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or a sequence has another length than K.
    """
    check_int(steps, name="steps", owner=owner, low=1)
    lrs = _sequence(lr, steps, name="lr", owner=owner)
    mixes = [dynamics.mix] * steps if mix is None else _sequence(mix, steps, name="mix", owner=owner)
    for place, value in enumerate(lrs):
        name = "lr" if is_scalar(lr) else f"lr[{place}]"
        # A pause, η_k = 0, is a step too; a run of nothing but pauses is none.
        check_real(value, name=name, owner=owner, low=0, low_open=is_scalar(lr))
    for place, value in enumerate(mixes):
        check_real(value, name="mix" if is_scalar(mix) else f"mix[{place}]", owner=owner, low=0, high=1)
    known = {dynamics.mix: dynamics}
    for value in mixes:
        known.setdefault(float(value), dynamics.at(float(value)))
    return (Step(lr=float(eta), dynamics=known[float(alpha)]) for eta, alpha in zip(lrs, mixes, strict=True))


def is_scalar(value: object) -> bool:
    """Whether a value is one for every step, a number or an array without an axis.

    Args:
        value: A number or a sequence.

    Returns:
        False for what has a length.
    """
    return not hasattr(value, "__len__") or (hasattr(value, "ndim") and value.ndim == 0)


def _sequence(value: float | Sequence[float], steps: int, *, name: str, owner: str) -> list[float]:
    if is_scalar(value):
        return [value.item() if hasattr(value, "item") else value] * steps  # type: ignore[list-item]  # scalar
    values = list(value)  # type: ignore[arg-type]  # a sequence
    if len(values) != steps:
        raise ValueError(
            f"`{name}` of `{owner}` must be one number, or one for each of the {steps} steps; got {len(values)} of them. "
            "stabkit.schedules makes them."
        )
    return values
