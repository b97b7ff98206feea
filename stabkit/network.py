"""A PyTorch module as the problem takes it: copied without wrappers, checked, called and asked for its outputs."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from stabkit._errors import TrainModeWarning, caller_level
from stabkit._memory import is_out_of_memory
from stabkit._wrappers import unwrapped
from stabkit.samples import Inputs

MOVED, MAX_APART = 0.3, 1e-3  # how far parameters are moved for a comparison with a copy, and how far it may be off
# Forward pre-hooks that compute a weight anew in every pass and leave it behind, where no copy can be made of it.
RECOMPUTING: dict[type, str] = {
    WeightNorm: "Use torch.nn.utils.parametrizations.weight_norm instead, after torch.nn.utils.remove_weight_norm.",
    SpectralNorm: "Use torch.nn.utils.parametrizations.spectral_norm instead, after torch.nn.utils.remove_spectral_norm.",
    BasePruningMethod: "Make the pruning permanent with torch.nn.utils.prune.remove.",
}


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without wrappers at any depth, as derivatives need it: compiled code has first ones alone.

    Args:
        model: A module.

    Returns:
        The copy; parameters are in the model's own order.

    Raises:
        RuntimeError: If memory runs out.
        TypeError: If the model cannot be copied.
    """
    model = unwrapped(model)
    # What forward passes left in attributes is part of a graph, which copy.deepcopy refuses.
    left = {id(found): found.detach().clone() for found in _left(model)}
    try:
        copied = copy.deepcopy(model, left)
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise TypeError(
            f"`model` must be one that copy.deepcopy can copy; got {type(model).__name__}, on which it fails "
            f"({type(error).__name__}: {error}). Delete open files, locks and the like from its attributes."
        ) from error
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            module._modules[name] = None if child is None else unwrapped(child)
    return copied


def sharing_copy(module: nn.Module) -> nn.Module:
    """A copy with the very parameters and buffers of a module, whose other attributes stay what they are now.

    Args:
        module: The module.

    Returns:
        The copy.
    """
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def _left(model: nn.Module) -> Iterator[Tensor]:
    """Tensors within a graph in the modules' attributes, in lists, tuples and dictionaries too."""
    looked = set[int]()

    def within(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            if not value.is_leaf:
                yield value
        elif isinstance(value, list | tuple | dict) and id(value) not in looked:
            looked.add(id(value))
            for part in value.values() if isinstance(value, dict) else value:
                yield from within(part)

    for module in model.modules():
        for key, value in vars(module).items():
            if key not in {"_parameters", "_buffers", "_modules"}:
                yield from within(value)


def normalises(model: nn.Module) -> bool:
    """Whether layers divide by the size of a sample's own activations, as LayerNorm and GroupNorm do.

    Args:
        model: A module.

    Returns:
        True if one is called a norm, of PyTorch's or of one's own making, and is no BatchNorm.
    """
    named = (module for module in model.modules() if not isinstance(module, _BatchNorm))
    return any("Norm" in name and not name.startswith("_") for name in (type(module).__name__ for module in named))


def check_modes(owner: str) -> None:
    """Refuse modes of PyTorch in which derivatives or random numbers are not to be had, or numbers are not what they seem.

    Args:
        owner: Function or class that is called, for messages.

    Raises:
        RuntimeError: Under torch.inference_mode() or torch.autocast, or with another default device than the CPU.
    """
    home = torch.get_default_device().type
    if home != "cpu":
        raise RuntimeError(
            f"`{owner}` must be called with the CPU as PyTorch's default device, on which batches and samples are drawn; "
            f"got {home!r}. Call torch.set_default_device('cpu') before; `device`, or where the model lies, says where to "
            "compute."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"`{owner}` must be called where derivatives can be taken; got torch.inference_mode(). Leave that block; "
            "torch.no_grad() does no harm."
        )
    lowered = next((kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)), None)
    if lowered is not None:
        raise RuntimeError(
            f"`{owner}` must be called outside of torch.autocast, which rounds what is to be exact; got one of {lowered!r}. "
            "Leave that block; precision='bfloat16' of `run` is for runs under it."
        )


def check_layers(model: nn.Module) -> None:
    """Refuse what cannot be read as a function of its parameters, sample by sample.

    Args:
        model: A module.

    Raises:
        TypeError: If a layer is scripted, its weight is computed anew by a hook, or weights are complex.
        ValueError: If a layer has no weights yet, or normalises by the batch in eval mode too.
    """
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_complex():
            raise TypeError(
                f"`model` of `UnlearningProblem` must have real weights; got {name!r} of {value.dtype}. Hold real and "
                "imaginary part, as torch.view_as_real gives them, and join them in the forward pass with torch.complex."
            )
    for name, module in model.named_modules():
        where = f"layer {name!r}" if name else "the model itself"
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(
                f"`model` of `UnlearningProblem` must hold its weights; got {where} of type {type(module).__name__} before "
                "its first pass. Call the model on a batch, then train it."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"`model` of `UnlearningProblem` must be a Python module; got {where} of type {type(module).__name__}, made "
                "by torch.jit. Pass the module it was made from, with its state_dict loaded."
            )
        for hook in module._forward_pre_hooks.values():
            for kind, remedy in RECOMPUTING.items():
                if isinstance(hook, kind):
                    raise TypeError(
                        "`model` of `UnlearningProblem` must hold its weights as parameters; got "
                        f"{type(hook).__name__} on {where}, a hook that computes one anew in every pass. {remedy}"
                    )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"BatchNorm layers of `model` must have running statistics; got track_running_stats=False in {where}, which "
                "then normalises by each batch, so that no sample has outputs of its own. Train with running statistics, "
                "or use GroupNorm."
            )


def checked_device(device: torch.device | str) -> torch.device:
    """The device, if one can compute on it.

    Args:
        device: A device or its name.

    Returns:
        The device.

    Raises:
        ValueError: If it is none, not there, or holds no numbers.
    """
    remedy = "Use None for where the model is, or 'cpu'."
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` of `UnlearningProblem` must name a device; got {device!r}. {remedy}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"`device` of `UnlearningProblem` must be available; got {device!r} where there is no CUDA. {remedy}"
        )
    try:
        if found.type == "meta":
            raise NotImplementedError("it holds no numbers")
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"`device` of `UnlearningProblem` must be one to compute on; got {device!r} ({error}). {remedy}"
        ) from error
    return found


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention by the kernels that have second and forward-mode derivatives; PyTorch's choices as they were afterwards.

    Yields:
        Nothing.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def check_twice(gradient: Sequence[Tensor]) -> None:
    """Refuse a gradient that passes through a function which is differentiable once.

    Its graph ends there in a node that raises only if it is reached, and products with the Hessian lack what is beyond.

    Args:
        gradient: The gradient in each parameter, with its graph.

    Raises:
        ValueError: If it does.
    """
    waiting = [g.grad_fn for g in gradient if g.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().endswith("::Error"):
            raise ValueError(
                "`model` and `loss` must be differentiable twice; got a gradient that passes through a "
                "torch.autograd.Function with @once_differentiable. Write its backward pass with differentiable operations "
                "and without that mark."
            )
        following = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= following
        waiting += following


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a module is called with inputs.

    Args:
        inputs: A tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        Positional and keyword arguments.
    """
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, tuple):
        return inputs, {}
    return (inputs,), {}


def output_tensor(raw: Any) -> Tensor:
    """The predictions in what a module returns.

    Args:
        raw: A tensor, or a dict or object with `logits`.

    Returns:
        The tensor.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(raw, Tensor):
        return raw
    logits = raw.get("logits") if isinstance(raw, dict) else getattr(raw, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    holds = f" of {', '.join(map(repr, raw))}" if isinstance(raw, dict) else ""
    raise TypeError(
        f"`model` must return a tensor or an object with `.logits`; got {type(raw).__name__}{holds}. Wrap it in a module "
        "that returns its predictions alone."
    )


def check_stateless(
    module: nn.Module,
    parameters: dict[str, Tensor],
    inputs: Inputs,
    *,
    outputs: Callable[[dict[str, Tensor]], Tensor],
    loss: Callable[[Tensor], Tensor],
) -> None:
    """Refuse a module that is no function of its parameters, by outputs and gradients at others than its own.

    They are compared with those of a copy that has these parameters for its own. A module that computes again in its
    backward pass, as activation checkpointing makes one, finds its own back in place by then. What cannot be computed there
    is left unchecked: a model fails in as many ways as there are layers. Cost: two gradients of the samples, and a copy.

    Args:
        module: The module, in eval mode.
        parameters: Its trainable parameters by name.
        inputs: Inputs of a few samples.
        outputs: Its outputs as a function of such parameters.
        loss: A number to differentiate, from outputs.

    Raises:
        ValueError: If outputs or gradients are not those of the copy, or the forward pass writes into what it holds.
    """
    _check_buffers(parameters, inputs, outputs)
    try:
        with torch.enable_grad(), differentiable_attention():
            leaves = {name: value.requires_grad_() for name, value in _moved(parameters).items()}
            ours = _with_gradients(outputs(leaves), leaves, loss)
            copied = plain_copy(module).eval()
            own = dict(copied.named_parameters())
            for name, value in _moved(parameters).items():
                own[name].data.copy_(value)
            positional, named = arguments(inputs)
            found = output_tensor(copied(*positional, **named))
            theirs = _with_gradients(found, {name: own[name] for name in parameters}, loss)
    except Exception:
        return
    for place, (what, why, remedy) in enumerate((
        (
            "outputs",
            "read its weights from its registered parameters",
            "Keep no other reference to them, such as a list of weights.",
        ),
        (
            "gradients",
            "not compute again in its backward pass, as activation checkpointing does",
            "Switch it off, as `model.gradient_checkpointing_disable()` does on Hugging Face's models.",
        ),
    )):
        apart = sum(float((a - b).abs().square().sum()) for a, b in zip(ours[place], theirs[place], strict=True)) ** 0.5
        size = sum(float(b.abs().square().sum()) for b in theirs[place]) ** 0.5
        if apart > MAX_APART * size:
            raise ValueError(
                f"`model` must {why}: its {what} at other parameters than its own are off by {apart / size:.2g} of their "
                f"size. {remedy}"
            )


def _check_buffers(
    parameters: dict[str, Tensor], inputs: Inputs, outputs: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    """Refuse a forward pass that writes into what the module holds, which transformed functions must not."""
    try:
        torch.func.vjp(outputs, parameters)
    except RuntimeError as error:
        if "in-place" in str(error):
            raise ValueError(
                "`model` must not write into its buffers or weights in eval mode, as a counter of calls does; its forward "
                f"pass did ({str(error).splitlines()[0]:.160}). Count in a plain Python attribute, or in training mode only."
            ) from error
    except Exception:
        return


def _moved(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that are moved at random, always to the same place."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: p.detach() + MOVED * (p.abs().mean() + 0.1 * MOVED) * torch.randn(p.shape, generator=generator).to(p)
        for name, p in parameters.items()
    }


def _with_gradients(
    found: Tensor, leaves: dict[str, Tensor], loss: Callable[[Tensor], Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Outputs, and the loss's gradients in the leaves; the graph is gone with the call."""
    gradients = torch.autograd.grad(loss(found), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [found.detach()], gradients


def warn_train_mode(model: nn.Module, *, frozen: bool) -> None:
    """Say what is done with BatchNorm layers, if frozen, and Dropout layers that are in train mode.

    Args:
        model: A module.
        frozen: Whether BatchNorm layers use their running statistics.
    """
    normalised = [
        name for name, module in model.named_modules() if frozen and module.training and isinstance(module, _BatchNorm)
    ]
    dropped = [name for name, module in model.named_modules() if module.training and _drops(module)]
    if normalised:
        warnings.warn(
            f"BatchNorm layer {normalised[0]!r}"
            + (f" and {len(normalised) - 1} more are" if normalised[1:] else " is")
            + " in train mode. With batchnorm='frozen' predictions and runs use the running statistics and leave them "
            "unchanged; a training loop that keeps train mode is what batchnorm='batch' predicts. Call model.eval() to "
            "agree.",
            TrainModeWarning,
            stacklevel=caller_level(),
        )
    if dropped:
        warnings.warn(
            f"Dropout layer {dropped[0]!r}"
            + (f" and {len(dropped) - 1} more are" if dropped[1:] else " is")
            + " in train mode. Predictions and runs switch dropout off. Call model.eval() to agree.",
            TrainModeWarning,
            stacklevel=caller_level(),
        )


def known_to_differ(module: nn.Module) -> bool:
    """Whether a module is of a kind that `warn_train_mode` tells of by name.

    Args:
        module: A module.

    Returns:
        Whether it is a BatchNorm layer, or drops some of its activations in train mode.
    """
    return isinstance(module, _BatchNorm) or _drops(module)


def _drops(module: nn.Module) -> bool:
    """Whether a module drops some of its activations in train mode, by a layer of its own or inside of it."""
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
