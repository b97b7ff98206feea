"""Accuracies on the three sets: RA, FA, TA, and UA = 1 - FA; shares in [0, 1], counted label by label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabkit.losses import IGNORE_INDEX, CrossEntropy
from stabkit.network import plain_copy
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Share of right answers on each set; None where there is no such set, or the loss has no classes.

    Attributes:
        retain: RA, on the retain set.
        forget: FA, on the forget set.
        test: TA, on the test set.
    """

    retain: float | None
    forget: float | None
    test: float | None

    @property
    def unlearning(self) -> float | None:
        """UA = 1 - FA."""
        return None if self.forget is None else 1 - self.forget


def accuracies(problem: UnlearningProblem, model: nn.Module, *, test: Samples | None = None) -> Accuracies:
    """RA, FA and TA of a model of the problem's architecture.

    Args:
        problem: The unlearning problem.
        model: Its parameters and buffers are read; its BatchNorm uses its own running statistics.
        test: Held-out samples; the problem's own when None.

    Returns:
        The accuracies. Cost: one forward pass over all sets.
    """
    parameters = parameters_of(problem, model)
    sets = (problem.retain, problem.forget, test or problem.test)
    found = [None if samples is None else accuracy(problem, samples, parameters) for samples in sets]
    return Accuracies(retain=found[0], forget=found[1], test=found[2])


def parameters_of(problem: UnlearningProblem, model: nn.Module, *, name: str = "model") -> Parameters:
    """A model's parameters and buffers, by name, those included that the problem holds fixed.

    Args:
        problem: The unlearning problem.
        model: A model of the same architecture; not altered.
        name: What the caller's argument is called, for messages.

    Returns:
        Tensors on the problem's device, floating-point ones in its dtype. Cost: a copy of the model for the moment, and two
        forward passes over a few samples.

    Raises:
        TypeError: If it is no module.
        ValueError: If a parameter is missing or has another shape, or the problem's model, given these parameters, does not
            compute what the model itself does.
    """
    if not isinstance(model, nn.Module):
        held = isinstance(getattr(model, "model", None), nn.Module)  # what `run` and `retrain` return
        remedy = "Its `.model` is one." if held else "Load a state_dict into a copy of the original."
        raise TypeError(f"`{name}` must be a torch.nn.Module; got {type(model).__name__}. {remedy}")
    copied = plain_copy(model)  # whose names have no wrappers in them
    names = [key for key, _ in (*copied.named_parameters(), *copied.named_buffers())]
    own = dict(zip(names, (*model.parameters(), *model.buffers()), strict=True))
    del copied
    for key, value in problem.parameters.items():
        if key not in own or own[key].shape != value.shape:
            got = "none" if key not in own else str(tuple(own[key].shape))
            raise ValueError(
                f"`{name}` must have a parameter {key!r} of shape {tuple(value.shape)}, as the problem's model has; got "
                f"{got}. Use a model of the same architecture."
            )
    found = {
        key: tensor.detach().to(problem.device, problem.dtype if tensor.is_floating_point() else tensor.dtype)
        for key, tensor in own.items()
    }
    _check_function(problem, model, found, name)
    return found


def _check_function(problem: UnlearningProblem, model: nn.Module, parameters: Parameters, name: str) -> None:
    """Equal names and shapes are not enough: another activation would be left out of account without a word."""
    inputs, targets = problem.forget.batch(torch.arange(min(3, problem.forget.size)))
    said = problem.outputs_of(model, inputs)
    with torch.no_grad():
        ours = problem.outputs(parameters, inputs)
    if said.shape != ours.shape:
        got = f"outputs of shape {tuple(said.shape)} where the problem's has {tuple(ours.shape)}"
    elif not torch.allclose(said, ours, rtol=1e-3, atol=1e-5, equal_nan=True):
        got = f"outputs that differ by {float((said - ours).abs().max()):.3g}"
    else:
        return
    raise ValueError(
        f"`{name}` must compute what the problem's model computes with its parameters; got {got} on {targets.shape[0]} "
        "samples of `forget`. Use a model of the same architecture, activations and buffers included."
    )


def accuracy(problem: UnlearningProblem, samples: Samples, parameters: Parameters) -> float | None:
    """Share of labelled positions whose largest logit is the label's.

    Args:
        problem: The unlearning problem.
        samples: Which set.
        parameters: Trainable parameters.

    Returns:
        The share in [0, 1]; None for a loss without classes. A model whose outputs are not finite gets none right.
    """
    if not isinstance(problem.loss, CrossEntropy):
        return None
    outputs, targets, _ = problem.evaluate(samples, parameters)
    right, counted = _right(problem.loss, outputs, targets)
    return float(right.sum()) / max(int(counted.sum()), 1)


def _right(loss: CrossEntropy, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits, labels = loss.aligned(outputs, targets)
    counted = labels != IGNORE_INDEX
    right = (logits.argmax(-1) == labels) & counted & logits.isfinite().all(-1)
    return right, counted
