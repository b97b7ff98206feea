"""What a PyTorch optimizer object is set to, as settings of an algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabkit._wrappers import plain_parameters

SHARED = {"sgd": ("momentum", "nesterov"), "adamw": ("betas", "eps")}
MOMENTUM = {"sgd": {}, "adamw": {"momentum": 0.0, "nesterov": False}}  # AdamW's own is among its betas
ARGUMENTS = ("momentum", "nesterov")  # of `predict` and its like, which take the place of what groups disagree about
OWNER = "optimizer_settings"
# What is predicted for none of its settings but these.
ONLY: dict[str, Any] = {"dampening": 0, "maximize": False, "amsgrad": False}


def optimizer_settings(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    given: Mapping[str, object] | None = None,
    owner: str = OWNER,
) -> dict[str, object]:
    """Settings of an algorithm whose steps are an optimizer's.

    Args:
        optimizer: A new torch.optim.SGD, AdamW, or Adam without decay, of the model's parameters. It is only read; of a
            learning-rate scheduler on it, whose factors `lr_schedule` takes, nothing is. `predict` sees that there is one
            and warns, but of ReduceLROnPlateau, which leaves no trace in the optimizer and has no factors known before.
        model: The network.
        given: Settings by name that are to hold whatever the optimizer says; those that are None are not given.
        owner: The function that was called, for messages.

    Returns:
        optimizer, lr and weight_decay (the largest of its groups, before any scheduler), layer_lr and layer_weight_decay
        (None, or the factors of parameters in groups of smaller ones; trainable ones in no group have a step size of 0),
        momentum and nesterov, and of AdamW betas and eps; what is given in place of each.
        `GradDiff(mix=0.3, **optimizer_settings(optimizer, model))` takes them.

    Raises:
        TypeError: If the optimizer is of another class.
        ValueError: If it has taken steps, holds parameters of another network, has an option that no prediction covers, or
            its groups differ in anything but step size and weight decay.
    """
    kind = _kind(optimizer, owner)
    told = {name: value for name, value in (given or {}).items() if value is not None}
    if optimizer.state:
        raise ValueError(
            f"`optimizer` of `{owner}` must be new, as the run begins without moments; got one with those of "
            f"{len(optimizer.state)} parameters. Make another with the same settings."
        )
    for option, only in ONLY.items():
        got = next((group[option] for group in optimizer.param_groups if group.get(option, only) != only), only)
        if got != only:
            raise ValueError(f"`optimizer` of `{owner}` must have {option}={only}; got {got}. No run here has it.")
    if any("max_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"`optimizer` of `{owner}` must not be on a cyclic schedule, which begins at a part of its largest step "
            "size and may change its momentum too; got one with OneCycleLR or CyclicLR. Make it anew with the largest step "
            "size, and give its factors as `lr_schedule`."
        )
    settings: dict[str, object] = {"optimizer": kind, **MOMENTUM[kind], **_groups(optimizer, model, owner)}
    for name in SHARED[kind]:
        values = [_plain(group[name]) for group in optimizer.param_groups]
        settings[name] = values[0]
        if any(value != values[0] for value in values) and name not in told:
            remedy = "Give all its groups the same."
            if owner == OWNER:
                remedy = f"Say which is to be predicted with by given={{{name!r}: {values[0]!r}}}."
            elif name in ARGUMENTS:
                remedy = f"Say which is to be predicted with by {name}={values[0]!r}."
            raise ValueError(
                f"`optimizer` of `{owner}` must have one {name} for all parameters; got {values[0]!r} and "
                f"{next(value for value in values if value != values[0])!r}. {remedy}"
            )
    return settings | told


def _plain(value: Any) -> Any:
    """A setting without tensors."""
    if isinstance(value, tuple | list):
        return tuple(_plain(part) for part in value)
    return float(value) if isinstance(value, Tensor) else value


def _kind(optimizer: object, owner: str) -> str:
    """Which of the two it is."""
    if type(optimizer) is torch.optim.SGD:
        return "sgd"
    if type(optimizer) is torch.optim.AdamW:
        return "adamw"
    if type(optimizer) is torch.optim.Adam:
        coupled = [group for group in optimizer.param_groups if not group.get("decoupled_weight_decay", False)]
        if all(group["weight_decay"] == 0 for group in coupled):
            return "adamw"
        raise ValueError(
            f"`optimizer` of `{owner}` must decouple its weight decay from the gradient; got Adam with weight_decay="
            f"{coupled[0]['weight_decay']!r}. torch.optim.AdamW does, and torch.optim.Adam without decay will do too."
        )
    raise TypeError(
        f"`optimizer` of `{owner}` must be 'sgd', 'adamw', or a torch.optim.SGD, AdamW or Adam; got "
        f"{type(optimizer).__module__}.{type(optimizer).__qualname__}. For one that takes the same "
        "steps as they do, make one of them with its settings."
    )


def _groups(optimizer: torch.optim.Optimizer, model: nn.Module, owner: str) -> dict[str, object]:
    """lr, weight_decay, and the factors of both by parameter."""
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    every = plain_parameters(model)
    names = {id(p): name for name, p in every.items() if p.requires_grad}
    others = held.keys() - {id(p) for p in every.values()}
    if others or not held.keys() & names.keys():
        what = (
            f"{len(others)} of {len(held)} parameters that are not the model's" if others else "none that is trainable"
        )
        raise ValueError(
            f"`optimizer` of `{owner}` must hold parameters of `model`; got {what}. Make it with `model.parameters()`."
        )
    own = {name: held[key] for key, name in names.items() if key in held}
    rates = dict.fromkeys(names.values(), 0.0)
    rates |= {name: float(group.get("initial_lr", group["lr"])) for name, group in own.items()}
    still = {name for name, rate in rates.items() if rate == 0 < max(rates.values())}  # where no decay is felt either
    decays = {name: float(group["weight_decay"]) for name, group in own.items() if name not in still}
    (lr, layer_lr), (decay, layer_decay) = _shared(rates), _shared(decays)
    return {"lr": lr, "layer_lr": layer_lr, "weight_decay": decay, "layer_weight_decay": layer_decay}


def _shared(values: dict[str, float]) -> tuple[float, dict[str, float] | None]:
    """The largest of them, and what the others are of it."""
    largest = max(values.values())
    factors = {name: round(value / largest, 12) for name, value in values.items()} if largest > 0 else {}
    return largest, {name: factor for name, factor in factors.items() if factor != 1} or None
