"""Training from a fresh initialisation on the retain set alone: what unlearning is measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit._progress import progress_bar
from stabkit._rng import preserved_rng
from stabkit._validate import check_seed
from stabkit.algorithms.base import layer_factor
from stabkit.algorithms.fine_tune import FineTune
from stabkit.problem import UnlearningProblem
from stabkit.samples import Inputs
from stabkit.sampling import batch_streams


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrained:
    """A model that never saw the forget set.

    Attributes:
        model: The new model, in the mode the original was in.
        steps: Steps taken; fewer than asked for where the loss stopped being finite.
        losses: Mean batch loss of every step.
        seed: Seed of the initialisation and of the batches.
        gradient_equivalents: Per-sample gradients evaluated.
    """

    model: nn.Module
    steps: int
    losses: tuple[float, ...]
    seed: int
    gradient_equivalents: float


def retrain(
    problem: UnlearningProblem,
    training: FineTune,
    *,
    initial: nn.Module | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Retrained:
    """Train from scratch on the retain set.

    It is no Algorithm: it does not start at θ*, so nothing here predicts it. Unlike `run` it trains in train mode, as a
    fresh network has no BatchNorm statistics to freeze; settings are those of FineTune, with torch.optim.SGD or AdamW.

    Args:
        problem: The unlearning problem, for the architecture, the loss and the retain set.
        training: Step size, steps, batches, momentum, decay, clipping and schedule.
        initial: A freshly initialised network, which is copied; when None the problem's own, with every layer's
            `reset_parameters` called.
        seed: Seed; the caller's random state is left as it was.
        progress: Whether to show a progress bar.

    Returns:
        The model and how it got there. Cost: B_R gradients a step.

    Raises:
        TypeError: If `training` is not a FineTune.
        ValueError: If a layer cannot be initialised anew, or the batch is too large.
    """
    if not isinstance(training, FineTune):
        raise TypeError(
            f"`training` of `retrain` must be a FineTune, as nothing is forgotten here; got {training!r:.60}. For instance "
            "FineTune(lr=0.1, steps=1000, momentum=0.9, weight_decay=5e-4)."
        )
    check_seed(seed, owner="retrain")
    training.layer_factors(problem), training.decay_factors(problem)  # which refuse unknown names
    sizes, batches = (problem.retain.size, problem.forget.size), training.batch_sizes(problem)
    stream, _ = batch_streams(sizes, batches, training.sampling, seed)
    losses: list[float] = []
    with preserved_rng():
        torch.manual_seed(seed)
        model = problem.new_model()
        modes = {name: module.training for name, module in model.named_modules()}
        if initial is None:
            _initialise(model)
        else:
            try:
                model.load_state_dict(initial.state_dict())
            except RuntimeError as error:
                raise ValueError(
                    f"`initial` of `retrain` must be a model like the problem's, a {problem.model_name}; got a "
                    f"{type(initial).__name__} whose weights differ ({error}). None initialises one anew."
                ) from error
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = _groups(model, training)
        rates = [float(group["lr"]) for group in groups]
        optimiser: torch.optim.Optimizer
        if training.adaptive:
            optimiser = torch.optim.AdamW(groups, betas=training.betas, eps=training.eps)
        else:
            optimiser = torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, nesterov=training.nesterov)
        model.train()
        gradients = 0
        for plan in progress_bar(training.plan(), "retrain", progress):
            indices = next(stream)
            inputs, targets = problem.retain.batch(indices)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * plan.lr
            optimiser.zero_grad()
            if indices.numel():  # an empty Poisson batch has no gradient
                with torch.enable_grad():
                    loss = problem.loss.per_sample(_outputs(model, inputs), targets).sum() / batches[0]
                    loss.backward()
                losses.append(float(loss.detach()))
            else:
                losses.append(0.0)
            if plan.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, plan.max_norm)
            optimiser.step()
            gradients += indices.numel()
            if not math.isfinite(losses[-1]):
                break
        for name, module in model.named_modules():
            module.training = modes[name]
        for parameter in model.parameters():
            parameter.grad = None
    return Retrained(
        model=model, steps=len(losses), losses=tuple(losses), seed=seed, gradient_equivalents=float(gradients)
    )


def _initialise(model: nn.Module) -> None:
    """Start every layer anew, statistics included; parameters that are not trained stay as they are."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
        elif any(p.requires_grad for p in module.parameters(recurse=False)):
            raise ValueError(
                f"`initial` of `retrain` must be given for this model: its layer {name!r}, a {type(module).__name__}, has "
                "parameters and no `reset_parameters`; got None. Pass a freshly built network."
            )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in kept.items():
            own[name].copy_(value)


def _groups(model: nn.Module, training: FineTune) -> list[dict[str, Any]]:
    """Parameters by their layer's step size and weight decay, as torch.optim takes them."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = training.lr * layer_factor(name, training.layer_lr)
            decay = training.weight_decay * layer_factor(name, training.layer_weight_decay)
            found.setdefault((rate, decay), []).append(p)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in found.items()]


def _outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """What the model returns, or its logits."""
    arguments: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
    raw = model(**inputs) if isinstance(inputs, dict) else model(*arguments)
    if isinstance(raw, Tensor):
        return raw
    return raw["logits"] if isinstance(raw, dict) else raw.logits
