"""Training from a fresh initialisation on the retain set alone: what unlearning is measured against."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabkit._errors import LowConfidenceWarning, caller_level
from stabkit._progress import progress_bar
from stabkit._rng import preserved_rng
from stabkit._validate import check_seed
from stabkit.algorithms.base import Algorithm
from stabkit.algorithms.fine_tune import FineTune
from stabkit.algorithms.layers import layer_factor
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.samples import Inputs
from stabkit.sampling import batch_streams


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrained:
    """A model that never saw the forget set.

    Attributes:
        model: The new model, in the mode the original was in.
        steps: Steps that it has taken; fewer than asked for where training diverged.
        losses: Mean batch loss of every step that was begun, the last one not finite where it stopped at that.
        seed: Seed of the initialisation and of the batches.
        gradient_equivalents: Per-sample gradients evaluated.
        diverged: Whether the loss or the weights stopped being finite. The model is then the last one that gave a finite
            batch loss, or the initial one if none did.
    """

    model: nn.Module
    steps: int
    losses: tuple[float, ...]
    seed: int
    gradient_equivalents: float
    diverged: bool = False


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
    fresh network has no BatchNorm statistics to freeze; settings are those of FineTune, with torch.optim.SGD or AdamW, or
    of L1Sparse, whose pull towards sparse weights joins the gradient as in its runs.

    Args:
        problem: The unlearning problem, for the architecture, the loss and the retain set.
        training: Step size, steps, batches, momentum, decay, clipping, schedule and pull.
        initial: A freshly initialised network, which is copied; when None the problem's own, with every layer's
            `reset_parameters` called. The trained weights themselves bring a LowConfidenceWarning: they have seen the
            forget set.
        seed: Seed; the caller's random state is left as it was.
        progress: Whether to show a progress bar.

    Returns:
        The model and how it got there; where training diverged, with a LowConfidenceWarning, the last model whose loss was
        finite. Cost: B_R gradients a step, and a copy of the weights.

    Raises:
        TypeError: If `training` is not a FineTune.
        ValueError: If a layer cannot be initialised anew, the batch is too large, or `training` has steps that are not
            plain ones on the retain loss: steps left out, a residual, a preconditioner or a stop rule of its own.
    """
    if not isinstance(training, FineTune):
        raise TypeError(
            f"`training` of `retrain` must be a FineTune, as nothing is forgotten here; got {training!r:.60}. For instance "
            "FineTune(lr=0.1, steps=1000, momentum=0.9, weight_decay=5e-4)."
        )
    check_seed(seed, owner="retrain")
    plans = training.plan()
    _check_plain(problem, training)
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
            _warn_of_trained(problem, model)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = _groups(model, training)
        rates = [float(group["lr"]) for group in groups]
        optimiser: torch.optim.Optimizer
        if training.adaptive:
            optimiser = torch.optim.AdamW(groups, betas=training.betas, eps=training.eps)
        else:
            optimiser = torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, nesterov=training.nesterov)
        model.train()
        gradients, good_step = 0, 0
        state = [*model.parameters(), *model.buffers()]
        good = [value.detach().clone() for value in state]
        for taken, plan in enumerate(progress_bar(plans, "retrain", progress)):
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
                gradients += indices.numel()
                if not math.isfinite(losses[-1]) or not _finite(model.buffers()):  # statistics overflow before the loss
                    break
                good_step = taken
                _copy(state, good)
            else:
                losses.append(0.0)
            if plan.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, plan.max_norm)
            if plan.pull:  # after clipping, which is of the losses' gradient alone
                for parameter in trained:
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter.detach().sign(), alpha=plan.pull)
            optimiser.step()
        # The last step's weights have no loss yet.
        diverged = not math.isfinite(losses[-1]) or not _finite(state)
        if diverged:
            _copy(good, state)
            _warn_of_divergence(training, losses, good_step)
        for name, module in model.named_modules():
            module.training = modes[name]
        for parameter in model.parameters():
            parameter.grad = None
    return Retrained(
        model=model,
        steps=good_step if diverged else len(losses),
        losses=tuple(losses),
        seed=seed,
        gradient_equivalents=float(gradients),
        diverged=diverged,
    )


def _finite(values: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite, with one wait for the device."""
    marks = [torch.isfinite(value).all() for value in values]
    return not marks or bool(torch.stack(marks).all())


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    """Copy values in place, but for views that hold a number several times, which nothing has changed."""
    for value, own in zip(source, target, strict=True):
        if 0 not in own.stride():
            own.copy_(value)


def _check_plain(problem: UnlearningProblem, training: FineTune) -> None:
    """Raise if a run of the settings would do what training from scratch does not."""
    own = None
    if any(plan.retain != 1 for plan in training.plan()):
        own = f"forget_every={training.forget_every!r}" if training.forget_every else "a plan that weighs retain steps"
    elif type(training).retain_residual is not Algorithm.retain_residual:
        own = "a `retain_residual` of its own"
    elif training.stop_rule().active:
        own = "a stop rule"
    elif not isinstance(training.preconditioner(problem), Identity):
        own = "a preconditioner"
    if own is not None:
        raise ValueError(
            f"`training` of `retrain` must take plain steps on the retain loss, the same weight in each; got a "
            f"{type(training).__name__} with {own}, which has no part in training from scratch. Use FineTune or L1Sparse "
            "without it."
        )


def _warn_of_trained(problem: UnlearningProblem, model: nn.Module) -> None:
    """Say so where the weights to start from are θ*."""
    own = dict(model.named_parameters())
    if all(torch.equal(own[name], value) for name, value in problem.parameters.items()):
        warnings.warn(
            "`initial` of `retrain` has the trained model's own weights: what comes of them has seen the forget set, and "
            "nothing can be measured against it. Pass a freshly initialised network, or None.",
            LowConfidenceWarning,
            stacklevel=caller_level(),
        )


def _warn_of_divergence(training: FineTune, losses: Sequence[float], good_step: int) -> None:
    """Say that training ended early, where, and what the model is."""
    what = "weights or statistics" if math.isfinite(losses[-1]) else "batch loss"
    warnings.warn(
        f"`retrain` stopped at step {len(losses)} of {training.steps}, as the {what} stopped being finite "
        f"with lr={training.lr:g}: the model is that of {good_step} steps, the last with a finite loss, and nothing can be "
        "measured against it. Lower `lr`, or clip with `max_gradient_norm`.",
        LowConfidenceWarning,
        stacklevel=caller_level(),
    )


def _initialise(model: nn.Module) -> None:
    """Start every layer anew, statistics included; parameters that are not trained stay as they are.

    Layers come before what they are parts of, whose own rules have the last word: those of attention and of `CausalLM`.

    Raises:
        ValueError: If a layer has no rule.
    """
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for name, module in _inside_out(model):
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


def _inside_out(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules.

    Yields:
        Names and modules, each after those inside it, otherwise in order.
    """
    for key, child in module.named_children():
        yield from _inside_out(child, f"{name}.{key}" if name else key)
    yield name, module


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
