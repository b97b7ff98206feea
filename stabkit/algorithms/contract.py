"""What a class of the caller's own must keep to, said before anything is measured or run."""

from __future__ import annotations

import functools
import inspect
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stabkit._validate import check_real
from stabkit.algorithms.plan import StepPlan, StopRule

if TYPE_CHECKING:
    from stabkit.algorithms.base import Algorithm, Batch
    from stabkit.losses import Loss


def is_of_the_package(kind: type[Algorithm], method: str) -> bool:
    """Whether an algorithm's method is this package's and no one's own.

    Args:
        kind: The algorithm's class.
        method: The method's name.

    Returns:
        Whether the class that defines it lies in this package.
    """
    defines = next(base for base in kind.__mro__ if method in vars(base))
    return defines.__module__.startswith("stabkit.")


@functools.cache
def check_class(kind: type[Algorithm]) -> None:
    """Refuse settings that are no fields, which copies of an algorithm, as every prediction makes them, would lose.

    Args:
        kind: The algorithm's class.

    Raises:
        TypeError: If its constructor takes what is no field, or it sets another default than its fields have.
    """
    own = {f.name: f for f in fields(kind) if f.init}
    hidden = [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in own and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    changed = [
        name for name, f in own.items() if f.default is not MISSING and getattr(kind, name, f.default) is not f.default
    ]
    for name, what in ((hidden, "an argument of `__init__`"), (changed, "an attribute of the class")):
        if name:
            raise TypeError(
                f"`{name[0]}` of `{kind.__name__}` must be a field of a dataclass, as copies with other settings are made "
                f"of fields; got {what} alone. Write `{name[0]}: float = ...`, or its type, in the class, and "
                "@dataclass(frozen=True, kw_only=True) above it."
            )


def check_plan(algorithm: Algorithm) -> None:
    """Refuse a plan or a stop rule of a class's own that no run and no rollout can follow.

    Args:
        algorithm: The algorithm.

    Raises:
        TypeError: If the plan holds anything but `StepPlan`s, or the stop rule is no `StopRule`.
        ValueError: If the plan has not an entry for each step, or a factor is out of its domain.
    """
    owner = type(algorithm).__name__
    rule: object = algorithm.stop_rule()
    if not isinstance(rule, StopRule):
        raise TypeError(
            f"`stop_rule` of `{owner}` must return a stabkit.StopRule; got {rule!r:.60}. StopRule() never stops; one of "
            "your own is a subclass of it with another `decide`, and another `active` where no bound is set."
        )
    if is_of_the_package(type(algorithm), "plan"):
        return
    plan = algorithm.plan()
    if len(plan) != algorithm.steps:
        raise ValueError(
            f"`plan` of `{owner}` must hold one entry for each of the {algorithm.steps} steps; got {len(plan)}. Go by "
            "self.steps, as predictions look at shorter and longer runs too."
        )
    for k, step in enumerate(plan):
        if not isinstance(step, StepPlan):
            raise TypeError(
                f"`plan` of `{owner}` must hold stabkit.algorithms.StepPlan objects; got {step!r:.60} at place {k}."
            )
        check_real(step.lr, name=f"plan()[{k}].lr", owner=owner, low=0)
        for name in ("retain", "forget", "pull"):
            check_real(getattr(step, name), name=f"plan()[{k}].{name}", owner=owner)
        if step.max_norm is not None:
            check_real(step.max_norm, name=f"plan()[{k}].max_norm", owner=owner, low=0, low_open=True)


def checked_residual(algorithm: Algorithm, loss: Loss, batch: Batch, *, forget: bool) -> Tensor:
    """What a step descends or climbs, as the algorithm has it.

    Args:
        algorithm: The algorithm.
        loss: The problem's loss.
        batch: The batch.
        forget: Whether it is of the forget set.

    Returns:
        `forget_residual` or `retain_residual` of the batch.

    Raises:
        AttributeError: As the algorithm's own method raises it.
        TypeError: Likewise; both with a note where it may have read outputs that it has not asked for.
        ValueError: If that is no tensor of the outputs' shape.
    """
    chosen = algorithm.forget_residual if forget else algorithm.retain_residual
    try:
        with torch.enable_grad():  # a class of the caller's own may have its derivative from autograd
            found: object = chosen(loss, batch)
    except (AttributeError, TypeError) as error:
        if batch.original is None:
            error.add_note(
                f"`batch.original` is None, as `{type(algorithm).__name__}` does not ask for the outputs at the trained "
                "parameters: with `needs_original: ClassVar[bool] = True` in the class it does."
            )
        raise
    if not isinstance(found, Tensor) or found.shape != batch.outputs.shape:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(
            f"`{chosen.__name__}` of `{type(algorithm).__name__}` must return the loss's derivative in the outputs, a "
            f"tensor of their shape {tuple(batch.outputs.shape)}; got {got:.80}."
        )
    return found.detach()
