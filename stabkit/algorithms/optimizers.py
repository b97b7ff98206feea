"""What a PyTorch optimizer object is set to, as settings of an algorithm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stabkit.network import unwrapped

SHARED = {"sgd": ("momentum", "nesterov", "weight_decay"), "adamw": ("betas", "eps", "weight_decay")}
# What is predicted for none of its settings but these.
ONLY: dict[str, Any] = {"dampening": 0, "maximize": False, "amsgrad": False}


def optimizer_settings(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    given: Mapping[str, object] | None = None,
    owner: str = "optimizer_settings",
) -> dict[str, object]:
    """Settings of an algorithm whose steps are an optimizer's.

    Args:
        optimizer: A new torch.optim.SGD, AdamW, or Adam without decay, of the model's parameters. It is only read.
        model: The network.
        given: Settings by name that are to hold whatever the optimizer says; those that are None are not given.
        owner: The function that was called, for messages.

    Returns:
        optimizer, lr (the largest of its groups), layer_lr (None, or the factors of parameters in groups of smaller ones, 0
        for trainable ones in no group), and momentum, nesterov and weight_decay, or betas, eps and weight_decay; what is
        given in place of each. `GradDiff(mix=0.3, **optimizer_settings(optimizer, model))` takes them. Learning-rate
        schedulers are objects of their own: `lr_schedule` has theirs.

    Raises:
        TypeError: If the optimizer is of another class.
        ValueError: If it has taken steps, holds parameters of another network, has an option that no prediction covers, or
            its groups differ in anything but the step size.
    """
    kind = _kind(optimizer, owner)
    if optimizer.state:
        raise ValueError(
            f"`optimizer` of `{owner}` must be new, as the run begins without moments; got one with those of "
            f"{len(optimizer.state)} parameters. Make another with the same settings."
        )
    for option, only in ONLY.items():
        got = next((group[option] for group in optimizer.param_groups if group.get(option, only) != only), only)
        if got != only:
            raise ValueError(f"`optimizer` of `{owner}` must have {option}={only}; got {got}. No run here has it.")
    settings: dict[str, object] = {"optimizer": kind, **_rates(optimizer, model, owner)}
    for name in SHARED[kind]:
        values = [group[name] for group in optimizer.param_groups]
        settings[name] = values[0]
        if any(value != values[0] for value in values) and (given or {}).get(name) is None:
            raise ValueError(
                f"`optimizer` of `{owner}` must have one {name} for all parameters; got {values[0]!r} and "
                f"{next(value for value in values if value != values[0])!r}. Say which is to be predicted with by {name}=..."
            )
    return settings | {name: value for name, value in (given or {}).items() if value is not None}


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


def _rates(optimizer: torch.optim.Optimizer, model: nn.Module, owner: str) -> dict[str, object]:
    """lr and layer_lr."""
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    names = {
        id(p): name.replace("_orig_mod.", "") for name, p in unwrapped(model).named_parameters() if p.requires_grad
    }
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    others = rates.keys() - names.keys() - frozen
    if others or not rates.keys() & names.keys():
        what = (
            f"{len(others)} of {len(rates)} parameters that are not the model's" if others else "none that is trainable"
        )
        raise ValueError(
            f"`optimizer` of `{owner}` must hold parameters of `model`; got {what}. Make it with `model.parameters()`."
        )
    largest = max(rates[key] for key in rates.keys() & names.keys())
    factors = {name: rates.get(key, 0.0) / largest for key, name in names.items()} if largest > 0 else {}
    kept = {name: factor for name, factor in factors.items() if not math.isclose(factor, 1.0)}
    return {"lr": largest, "layer_lr": kept or None}
