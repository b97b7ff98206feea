"""What a problem must be for predictions to be about it: each check refuses by name, with what came and what to do."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stabkit._errors import OverlapWarning, ProbabilityWarning, TrainModeWarning, caller_level
from stabkit._memory import is_out_of_memory
from stabkit.data import EXTRA_PARTS
from stabkit.losses import CrossEntropy
from stabkit.network import arguments, check_stateless, differentiable_attention, known_to_differ, output_tensor
from stabkit.samples import Inputs, Samples, map_tensors, tensors_of

if TYPE_CHECKING:
    from stabkit.problem.problem import UnlearningProblem

PROBES = 16  # forget samples that are looked for in the retain set
MOVED_SAMPLES = 4  # through which gradients away from θ* are compared
MODE_SAMPLES = 16  # whose outputs are compared between train and eval mode
OTHER_MODE = 1e-3  # of the outputs' size: more than rounding
REACHING_SAMPLES = 64  # of each set, that decide whether any loss depends on a parameter
PROBABILITIES = 1e-4  # how far from 1 the sum of outputs may be that are probabilities
SAME_LOSS = 1e-4  # relative: of a sample alone and among others, from the same outputs
DECODER = "Labels go to the loss: add 'decoder_input_ids', as prepare_decoder_input_ids_from_labels makes them."
COUPLING = 0.01  # of the largest output: more than other kernels for another batch size make


def check_weights(named: Iterable[tuple[str, Tensor]], *, masks: Collection[str] = ()) -> None:
    """Refuse weights that are not there, or not finite.

    Args:
        named: Every parameter and buffer by name.
        masks: Names of buffers, which may hold infinity, as attention masks do.

    Raises:
        ValueError: If one is on the meta device, or holds NaN or, where it is none of the latter, infinity.
    """
    for name, value in named:
        if value.is_meta:
            raise ValueError(
                f"`model` of `UnlearningProblem` must hold its weights; {name!r} is on the meta device. Give it memory "
                "with model.to_empty(device='cpu') and load its state_dict."
            )
        broken = torch.isnan(value) if name in masks else ~torch.isfinite(value)
        if value.is_floating_point() and bool(broken.any()):
            raise ValueError(
                f"`model` of `UnlearningProblem` must have finite weights; {name!r} holds NaN"
                f"{'' if name in masks else ' or infinity'}. Load the checkpoint from before training failed."
            )


def check_sets(forget: Samples, retain: Samples, *, batchnorm: str) -> None:
    """Refuse sets that share samples, by their place in memory or in a data set, or are too small.

    Args:
        forget: What to forget.
        retain: What to retain.
        batchnorm: "batch" where batches need two samples.

    Raises:
        ValueError: If they do, or one has a single sample there.
    """
    shared = forget.overlap(retain)
    if shared:
        raise ValueError(
            f"`forget` and `retain` must not overlap; they share {shared} samples. Remove the forget samples from "
            "the retain set, e.g. with two disjoint index lists."
        )
    for samples in (forget, retain):
        if batchnorm == "batch" and samples.size == 1:
            raise ValueError(
                f"`{samples.name}` must hold at least two samples with batchnorm='batch'; got 1, and a batch of one has "
                "no variance. Use batchnorm='frozen'."
            )


def check_alike(samples: Samples, retain: Samples) -> None:
    """Refuse sets of which one has inputs that the other lacks.

    Args:
        samples: What to forget, or to test on, which the model takes.
        retain: What to retain, which it takes too.

    Raises:
        ValueError: If they differ.
    """
    parts = [_parts(part.batch(torch.zeros(1, dtype=torch.int64))[0]) for part in (samples, retain)]
    if parts[0] != parts[1]:
        raise ValueError(
            f"`{samples.name}` and `retain` must hold the same inputs; got {parts[0]} and {parts[1]}. What one of them "
            "lacks, such as an attention mask, the model would make up for that one alone."
        )


def _parts(inputs: Inputs) -> str:
    """What a sample's inputs consist of, in words."""
    if isinstance(inputs, dict):
        return ", ".join(map(repr, sorted(inputs)))
    return f"a tuple of {len(inputs)}" if isinstance(inputs, tuple) else "one tensor"


def warn_of_twins(forget: Samples, retain: Samples) -> None:
    """Warn where most of a few forget samples are in the retain set by value.

    Args:
        forget: What to forget.
        retain: What to retain. Cost: it is read once.
    """
    twins = forget.twins(retain, PROBES)
    if 2 * twins > min(PROBES, forget.size):
        warnings.warn(
            f"`forget` and `retain` should not overlap; of {min(PROBES, forget.size)} forget samples looked at, "
            f"{twins} are in the retain set too, with the same target. Remove them there, unless they are meant as "
            "duplicates: what is kept cannot be forgotten.",
            OverlapWarning,
            stacklevel=caller_level(),
        )


def check_samples(problem: UnlearningProblem, samples: Samples, module: nn.Module) -> int:
    """Refuse data that the model and the loss cannot be predicted on.

    Args:
        problem: The model and the loss.
        samples: One of its sets.
        module: Its copy of the model.

    Returns:
        How many numbers the network gives for a sample. Cost: the set is read once; some passes over three samples.

    Raises:
        TypeError: If the model cannot take the inputs, or returns something else than outputs.
        ValueError: If inputs or targets are not finite or out of range, or the outputs or the losses are not each of its own
            sample, finite, the same in every pass and differentiable.
    """
    _check_finite(samples)
    _check_decoder(module, samples)
    return _check_outputs(problem, samples)


def check_function(problem: UnlearningProblem, module: nn.Module) -> None:
    """Refuse a network that is no function of its parameters, in its backward pass or in its buffers.

    Args:
        problem: The problem, whose data have been looked at.
        module: Its copy of the model.

    Raises:
        ValueError: If it is none.
    """
    few = min(MOVED_SAMPLES, problem.evaluation_batch, problem.retain.size)
    inputs, targets = problem.retain.batch(torch.arange(few))
    check_stateless(
        module,
        problem.parameters,
        inputs,
        outputs=lambda parameters: problem.outputs(parameters, inputs),
        loss=lambda outputs: problem.loss.per_sample(outputs, targets).sum(),
    )


def warn_other_mode(problem: UnlearningProblem, module: nn.Module, training: Mapping[str, bool]) -> None:
    """Say where a model was given in train mode and gives other outputs there, by what no layer's class tells.

    Args:
        problem: The problem, whose data have been looked at.
        module: Its copy of the model, which is left as it is.
        training: Which of its modules the caller has in train mode, by name.
    """
    if not any(training.values()):
        return
    copied = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for name, part in copied.named_modules():
        part.training = training[name] and not known_to_differ(part)
    few = torch.arange(min(MODE_SAMPLES, problem.evaluation_batch, problem.retain.size))
    inputs, _ = problem.retain.batch(few)
    there = problem.outputs(problem.parameters, inputs)
    positional, named = arguments(map_tensors(torch.clone, inputs))
    try:
        with differentiable_attention():
            found = output_tensor(copied(*positional, **named))
    except Exception:  # what a model does in train mode alone is not asked here
        return
    size = float(there.double().norm())
    apart = float((found - there).double().norm()) if found.shape == there.shape else math.nan
    if not apart <= OTHER_MODE * size:
        by = f"are off by {apart / size:.0%} of their size" if apart < math.inf and size > 0 else "are others"
        warnings.warn(
            f"`model` is in train mode, in which its outputs {by}: by dropout or stochastic depth that is no Dropout layer, "
            "or by another layer that knows both modes. Predictions and runs have it in eval mode. Call model.eval() to "
            "agree.",
            TrainModeWarning,
            stacklevel=caller_level(),
        )


def unreached(problem: UnlearningProblem) -> tuple[tuple[str, ...], int]:
    """Trainable parameters that no loss depends on, as those of a head that is not asked.

    Args:
        problem: The problem, whose data and function have been checked.

    Returns:
        Their names, and how many gradients that took: of a few samples where there are none, of up to 64 of each set
        otherwise, among which an expert of a mixture finds one that is sent to it.
    """
    left, spent = list(problem.parameters), 0
    for samples in (problem.retain, problem.forget):
        few = min(MOVED_SAMPLES, problem.evaluation_batch)
        for inputs, targets in samples.batches(few, samples.subset(REACHING_SAMPLES, 0)):
            leaves = {name: p.detach().requires_grad_(name in left) for name, p in problem.parameters.items()}
            with torch.enable_grad():
                loss = problem.loss.per_sample(problem.outputs(leaves, inputs), targets).sum()
            spent += targets.shape[0]
            if not loss.requires_grad:
                continue
            found = torch.autograd.grad(loss, [leaves[name] for name in left], allow_unused=True)
            left = [name for name, gradient in zip(left, found, strict=True) if gradient is None]
            if not left:
                return (), spent
    return tuple(left), spent


def _check_finite(samples: Samples) -> None:
    for inputs, targets in samples.batches(4096):
        for what, tensors in (("inputs", tensors_of(inputs)), ("targets", iter([targets]))):
            for tensor in tensors:
                if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
                    bad = int((~torch.isfinite(tensor)).sum())
                    raise ValueError(
                        f"{what} of `{samples.name}` must be finite; got {bad} NaN or infinite values. Drop or "
                        "impute them first."
                    )


def _check_decoder(module: nn.Module, samples: Samples) -> None:
    """An encoder and decoder of Hugging Face's reads its labels, which go to the loss here; BART then decodes its inputs."""
    inputs, targets = samples.batch(torch.zeros(1, dtype=torch.int64))
    decodes = hasattr(module, "prepare_decoder_input_ids_from_labels")
    decodes = decodes and "decoder_input_ids" in inspect.signature(module.forward).parameters
    given = isinstance(inputs, dict) and not inputs.keys().isdisjoint({"decoder_input_ids", "decoder_inputs_embeds"})
    if decodes and targets.dim() > 1 and not given:
        raise ValueError(
            f"inputs of `{samples.name}` must hold what the decoder of {type(module).__name__} reads; got "
            f"{', '.join(inputs) if isinstance(inputs, dict) else 'none by name'}. {DECODER}"
        )


def _check_outputs(problem: UnlearningProblem, samples: Samples) -> int:
    """A few samples through the model: output type, determinism, one loss a sample, finite losses, no coupling."""
    inputs, targets = samples.batch(torch.arange(min(3, samples.size)))
    outputs = _first_outputs(problem, inputs, samples.name)
    again = problem.outputs(problem.parameters, inputs)
    if outputs.shape[:1] != targets.shape[:1]:
        raise ValueError(
            f"`model` must give one output per sample; got {tuple(outputs.shape)} for {targets.shape[0]} samples of "
            f"`{samples.name}`."
        )
    if not torch.allclose(outputs, again, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(
            "`model` must be deterministic in eval mode; two passes over the same batch differ by "
            f"{float((outputs - again).abs().max()):.3g}. Remove random layers that ignore eval()."
        )
    problem.loss.check_targets(outputs, samples.targets(), name=samples.name)
    if outputs.dim() < 2:
        raise ValueError(
            f"`model` must return a row of outputs per sample; got shape {tuple(outputs.shape)} for "
            f"{outputs.shape[0]} samples of `{samples.name}`. Return shape (m, 1), for instance without the squeeze."
        )
    if type(problem.loss) is CrossEntropy and samples is problem.retain:
        sums = outputs.sum(1)
        if bool((outputs >= 0).all()) and bool(((sums - 1).abs() < PROBABILITIES).all()) and outputs.shape[1] > 1:
            warnings.warn(
                "`model` seems to return probabilities, as its outputs are none below 0 and sum to 1, and cross-entropy "
                "takes the softmax of them once more. Return logits, unless it was trained this way.",
                ProbabilityWarning,
                stacklevel=caller_level(),
            )
    _check_losses(problem, outputs, targets, samples.name)
    _check_differentiable(problem, inputs, targets, samples.name)
    alone = _first_outputs(problem, samples.batch(torch.zeros(1, dtype=torch.int64))[0], samples.name)
    if alone.shape != outputs[:1].shape:
        raise ValueError(
            f"`model` must return a row of outputs per sample; got shape {tuple(alone.shape)} for one sample of "
            f"`{samples.name}` and {tuple(outputs.shape)} for {outputs.shape[0]}. Do not squeeze the first axis."
        )
    scale = float(outputs.where(outputs.isfinite(), 0).abs().max())
    if not torch.allclose(alone, outputs[:1], rtol=0, atol=COUPLING * scale, equal_nan=True):
        raise ValueError(
            "`model` must give a sample the same outputs whatever else is in its batch; those of the first sample of "
            f"`{samples.name}` alone differ by {float((alone - outputs[:1]).abs().max()):.3g}. Remove layers that mix "
            "samples, such as normalisation by the batch's own mean."
        )
    return outputs[0].numel()


def _check_losses(problem: UnlearningProblem, outputs: Tensor, targets: Tensor, name: str) -> None:
    """Losses of a few samples: finite, each of its own sample, and the outputs left as they are."""
    before = outputs.clone()
    losses = problem.loss.per_sample(outputs, targets)
    if not torch.equal(outputs.nan_to_num(), before.nan_to_num()):
        raise ValueError(
            f"`loss` must leave the outputs as they are; got {problem.loss.name!r}, which writes into them. Use o - t in "
            "place of o.sub_(t)."
        )
    if not bool(torch.isfinite(losses).all()):
        raise ValueError(
            f"losses of `{name}` must be finite at the trained parameters; got {losses.tolist()}. Check the "
            "loss and the inputs' scale."
        )
    alone = problem.loss.per_sample(outputs[:1], targets[:1])
    if not torch.allclose(alone, losses[:1], rtol=SAME_LOSS, atol=SAME_LOSS * float(losses.abs().max())):
        raise ValueError(
            f"`loss` must give a sample the same loss whatever else is in its batch; got {problem.loss.name!r}, whose "
            f"first one of `{name}` is {float(losses.flatten()[0]):.4g} among others and "
            f"{float(alone.flatten()[0]):.4g} alone. Leave means over the batch out of it."
        )


def _check_differentiable(problem: UnlearningProblem, inputs: Inputs, targets: Tensor, name: str) -> None:
    """Whether derivatives reach the parameters, through the model and through the loss."""
    with torch.enable_grad():
        leaves = {key: p.detach().requires_grad_() for key, p in problem.parameters.items()}
        outputs = problem.outputs(leaves, inputs)
        losses = problem.loss.per_sample(outputs, targets) if outputs.requires_grad else outputs
    for what, found, owner in (("outputs", outputs, "model"), (f"losses of {problem.loss.name!r}", losses, "loss")):
        if not found.requires_grad:
            raise ValueError(
                f"`{owner}` must be differentiable; got {what} without derivatives in the parameters, for `{name}`. "
                "Remove torch.no_grad(), detach() and detours through NumPy from it, and unmerge adapters."
            )


def _first_outputs(problem: UnlearningProblem, inputs: Inputs, name: str) -> Tensor:
    """Outputs of a few samples; if the model cannot take them, an error that names the set and what to do."""
    try:
        raw = problem.call(problem.parameters, inputs)
    except Exception as error:  # a forward pass fails in as many ways as there are layers
        if is_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error}"
        integers = next((t for t in tensors_of(inputs) if not (t.is_floating_point() or t.is_complex())), None)
        if integers is not None and _takes_floats(problem, inputs):
            raise TypeError(
                f"inputs of `{name}` must be floating point for this model; got integers from {int(integers.min())} to "
                f"{int(integers.max())}, on which its forward pass fails ({said}). Convert them as in training, for "
                "instance x.float() / 255; nothing is rescaled unasked."
            ) from error
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_of(inputs))
        remedy = "Give inputs of the shape, type and range that it was trained on."
        if "decoder_input_ids" in said:
            remedy = DECODER
        if isinstance(error, TypeError) and isinstance(inputs, dict):
            remedy = f"It is given {', '.join(inputs)} by name: leave out the columns that it does not know."
        elif isinstance(error, TypeError) and isinstance(inputs, tuple):
            remedy = EXTRA_PARTS
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"`model` of `UnlearningProblem` must take the inputs of `{name}`; got {said}, for {shapes}. {remedy}"
        ) from error
    return output_tensor(raw)


def _takes_floats(problem: UnlearningProblem, inputs: Inputs) -> bool:
    """Whether the same numbers in floating point are what the model wants."""
    with contextlib.suppress(Exception):
        problem.call(problem.parameters, map_tensors(lambda t: t.to(problem.dtype), inputs))
        return True
    return False
