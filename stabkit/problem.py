"""The unlearning problem: a trained model, its loss, what to forget and what to retain, validated once.

Everything later reads the model through `UnlearningProblem`, as a function of one flat parameter vector. The caller's
model is copied on entry; its parameters, buffers, mode, hooks, gradients and the global random state stay as they were.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from stabkit._errors import TrainModeWarning, UntrainedModelWarning
from stabkit._rng import preserved_rng
from stabkit._validate import check_choice
from stabkit.losses import Loss, PerSampleLoss, resolve_loss
from stabkit.samples import Data, Inputs, Samples, as_samples, tensors_of

Parameters = dict[str, Tensor]
EVALUATION_BATCH = 1024


class UnlearningProblem:
    """A model, a per-sample loss, a forget set and a retain set, checked once and never altered.

    Attributes:
        forget: The samples to forget, n_f of them.
        retain: The samples to retain, n_r of them.
        test: Held-out samples, or None.
        loss: The per-sample loss.
        parameters: Trainable parameters θ* by name, detached copies.
        size: Number d of trainable parameters.
        device: Where the computation runs.
        dtype: Floating dtype of the network's computation.
        batchnorm: "frozen": BatchNorm layers use their running statistics, in runs and in predictions alike.
        model_name: Class of the model.
        retain_loss: Mean retain loss at θ*.
        forget_loss: Mean forget loss at θ*.
        divergence_level: Mean retain loss of the best constant predictor (theory §7); a run that reaches it diverges.
    """

    def __init__(
        self,
        model: nn.Module,
        forget: Data,
        retain: Data,
        *,
        loss: str | PerSampleLoss | Loss = "cross_entropy",
        test: Data | None = None,
        batchnorm: str = "frozen",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Read and check everything. The model is copied; data are read when needed and must stay as they are meanwhile.

        Args:
            model: The trained network. It must return a tensor, or an object with `.logits`.
            forget: What to forget: DataLoader, Dataset, (x, y) tensors, dict of tensors with labels, or batches.
            retain: What to retain, in any of the same forms.
            loss: "cross_entropy", "causal_lm", "mse", or a callable (outputs, targets) -> losses of shape (m,).
            test: Held-out data, in any of the same forms.
            batchnorm: "frozen" is the one treatment there is: running statistics, which no run changes.
            device: Where to compute; where the model is when None.
            dtype: Floating dtype to compute in; the model's, but at least float32, when None.

        Raises:
            TypeError: If the model is not a module, or data or targets have a wrong type.
            ValueError: If data are empty, overlapping, not finite or out of range, the model is not deterministic or has no
                trainable parameter, or device or dtype cannot be used.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` of `UnlearningProblem` must be a torch.nn.Module; got {type(model).__name__}.")
        self.model_name = type(model).__name__
        self.batchnorm = check_choice(batchnorm, name="batchnorm", owner="UnlearningProblem", choices=("frozen",))
        first = next((p for p in model.parameters() if p.requires_grad), None)
        if first is None:
            raise ValueError(
                "`model` of `UnlearningProblem` must have a trainable parameter; got none with requires_grad=True. "
                "Unfreeze the layers that unlearning may change."
            )
        if dtype not in {None, torch.float32, torch.float64}:
            raise ValueError(
                f"`dtype` of `UnlearningProblem` must be torch.float32 or torch.float64; got {dtype!r}. None takes the "
                "model's, but at least float32."
            )
        self.device = _checked_device(device) if device is not None else first.device
        self.dtype = dtype or (first.dtype if first.dtype in {torch.float32, torch.float64} else torch.float32)
        _warn_train_mode(model)
        with preserved_rng():
            self._module = copy.deepcopy(model).to(self.device, self.dtype).eval()
        for parameter in self._module.parameters():
            parameter.grad = None
        for module in self._module.modules():  # they watch or edit .backward(), and torch.func cannot pass through them
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        self._training = {name: module.training for name, module in model.named_modules()}
        self.parameters: Parameters = {
            name: p.detach() for name, p in self._module.named_parameters() if p.requires_grad
        }
        self.size = sum(p.numel() for p in self.parameters.values())
        self._constants: Parameters = {
            name: t.detach()
            for name, t in (*self._module.named_parameters(), *self._module.named_buffers())
            if name not in self.parameters
        }
        named = (*self._module.named_parameters(), *self._module.named_buffers())
        names = {id(tensor): name for name, tensor in named}
        # Every attribute that holds a tensor, once. Left to find tied weights by itself, `functional_call` would not put
        # the tensors back where one layer is registered under two names.
        self._places = {
            f"{prefix}.{key}" if prefix else key: names[id(tensor)]
            for prefix, module in self._module.named_modules()
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        self.loss = resolve_loss(loss)
        self.forget = as_samples(forget, name="forget", device=self.device, dtype=self.dtype)
        self.retain = as_samples(retain, name="retain", device=self.device, dtype=self.dtype)
        with preserved_rng(), torch.no_grad():
            self._check()
        self.test = None if test is None else self.read(test, name="test")

    # ------------------------------------------------------------------ the network as a function of its parameters

    def outputs(self, parameters: Parameters, inputs: Inputs) -> Tensor:
        """Network outputs at the given trainable parameters; differentiable in them, twice and in forward mode.

        Args:
            parameters: Trainable parameters by name.
            inputs: Inputs of b samples: a tensor, a tuple of arguments or a dict of keyword arguments.

        Returns:
            Outputs of shape (b, ...). Cost: one forward pass.

        Raises:
            TypeError: If the model returns no tensor and nothing with `.logits`.
        """
        tensors = {**self._constants, **self.parameters, **parameters}
        placed = {place: tensors[name] for place, name in self._places.items()}
        with _differentiable_attention():
            raw = functional_call(self._module, placed, *_arguments(inputs), tie_weights=False)
        return _output_tensor(raw)

    def flatten(self, parameters: Parameters) -> Tensor:
        """One vector from parameters by name, in the model's own order.

        Args:
            parameters: Tensors shaped like the trainable parameters.

        Returns:
            Vector of shape (d,).
        """
        return torch.cat([parameters[name].reshape(-1) for name in self.parameters])

    def unflatten(self, vector: Tensor) -> Parameters:
        """Parameters by name from one vector.

        Args:
            vector: Shape (d,).

        Returns:
            Views of the vector, shaped like the trainable parameters.
        """
        pieces = vector.split([p.numel() for p in self.parameters.values()])
        return {name: piece.view_as(p) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    def vector(self) -> Tensor:
        """Trained parameters θ* as one vector.

        Returns:
            Vector of shape (d,).
        """
        return self.flatten(self.parameters)

    # ------------------------------------------------------------------ evaluation

    def read(self, data: Data, *, name: str) -> Samples:
        """Read and check a further data set, for instance a test set handed over later.

        Args:
            data: Any accepted form of data.
            name: What to call it in messages.

        Returns:
            The samples.
        """
        samples = as_samples(data, name=name, device=self.device, dtype=self.dtype)
        with preserved_rng(), torch.no_grad():
            self._check_finite(samples)
            self._check_outputs(samples)
        return samples

    def evaluate(
        self, samples: Samples, parameters: Parameters | None = None, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, targets and losses of a set, without gradients.

        Args:
            samples: Which set.
            parameters: Trainable parameters; θ* when None.
            indices: Which of its samples; all when None.

        Returns:
            Outputs (m, ...), targets (m, ...) and per-sample losses (m,). Cost: m forward passes.
        """
        parameters = self.parameters if parameters is None else parameters
        outputs, targets = [], []
        with torch.no_grad():
            for inputs, batch_targets in samples.batches(EVALUATION_BATCH, indices):
                outputs.append(self.outputs(parameters, inputs))
                targets.append(batch_targets)
            f, y = torch.cat(outputs), torch.cat(targets)
            return f, y, self.loss.per_sample(f, y)

    def new_model(self, parameters: Parameters | None = None) -> nn.Module:
        """A fresh copy of the model, in the mode the caller's was in.

        Args:
            parameters: Trainable parameters to put in; θ* when None.

        Returns:
            A new module that shares no memory with the caller's. Forward hooks are copied, backward hooks are not.
        """
        with preserved_rng():
            model = copy.deepcopy(self._module)
        if parameters is not None:
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in parameters.items():
                    own[name].copy_(value)
        for name, module in model.named_modules():
            module.training = self._training[name]
        return model

    def layer_of(self) -> dict[str, str]:
        """Which module each trainable parameter belongs to.

        Returns:
            Module name by parameter name; "" is the model itself.
        """
        return {name: name.rpartition(".")[0] for name in self.parameters}

    # ------------------------------------------------------------------ validation

    def _check(self) -> None:
        for name, value in (*self.parameters.items(), *self._constants.items()):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"`model` of `UnlearningProblem` must have finite weights; {name!r} holds NaN or infinity. Load the "
                    "checkpoint from before training failed."
                )
        shared = self.forget.overlap(self.retain)
        if shared:
            raise ValueError(
                f"`forget` and `retain` must not overlap; they share {shared} samples. Remove the forget samples from "
                "the retain set, e.g. with two disjoint index lists."
            )
        for samples in (self.forget, self.retain):
            self._check_finite(samples)
            self._check_outputs(samples)
        _, _, losses = self.evaluate(self.retain)
        outputs = self.outputs(self.parameters, self.retain.batch(torch.zeros(1, dtype=torch.int64))[0])
        self.divergence_level = self.loss.constant_level(outputs, self.retain.targets())
        self.retain_loss = float(losses.mean())
        self.forget_loss = float(self.evaluate(self.forget)[2].mean())
        if self.retain_loss >= self.divergence_level:
            warnings.warn(
                f"`model` has retain loss {self.retain_loss:.4g}, no better than the best constant prediction "
                f"({self.divergence_level:.4g}), so every run counts as diverged from its first step. Check that the "
                "model is trained, and that the loss and the inputs' preprocessing are the ones it was trained with.",
                UntrainedModelWarning,
                stacklevel=3,
            )

    @staticmethod
    def _check_finite(samples: Samples) -> None:
        for inputs, targets in samples.batches(4096):
            for what, tensors in (("inputs", tensors_of(inputs)), ("targets", iter([targets]))):
                for tensor in tensors:
                    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                        bad = int((~torch.isfinite(tensor)).sum())
                        raise ValueError(
                            f"{what} of `{samples.name}` must be finite; got {bad} NaN or infinite values. Drop or "
                            "impute them first."
                        )

    def _check_outputs(self, samples: Samples) -> None:
        """A few samples through the model: output type, determinism, one loss a sample, finite losses."""
        inputs, targets = samples.batch(torch.arange(min(3, samples.size)))
        outputs = self.outputs(self.parameters, inputs)
        again = self.outputs(self.parameters, inputs)
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
        self.loss.check_targets(outputs, samples.targets(), name=samples.name)
        if outputs.dim() < 2:
            raise ValueError(
                f"`model` must return a row of outputs per sample; got shape {tuple(outputs.shape)} for "
                f"{outputs.shape[0]} samples of `{samples.name}`. Return shape (m, 1), for instance without the squeeze."
            )
        losses = self.loss.per_sample(outputs, targets)
        if not bool(torch.isfinite(losses).all()):
            raise ValueError(
                f"losses of `{samples.name}` must be finite at the trained parameters; got {losses.tolist()}. Check the "
                "loss and the inputs' scale."
            )


def _checked_device(device: torch.device | str) -> torch.device:
    """The device, if it is there."""
    remedy = "Use None for where the model is, or 'cpu'."
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` of `UnlearningProblem` must name a device; got {device!r}. {remedy}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"`device` of `UnlearningProblem` must be available; got {device!r} where there is no CUDA. {remedy}"
        )
    return found


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention by the kernels that have second and forward-mode derivatives; PyTorch's choices as they were afterwards."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, tuple):
        return inputs, {}
    return (inputs,), {}


def _output_tensor(raw: Any) -> Tensor:
    if isinstance(raw, Tensor):
        return raw
    logits = raw.get("logits") if isinstance(raw, dict) else getattr(raw, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"`model` must return a tensor or an object with `.logits`; got {type(raw).__name__}. Wrap it in a module that "
        "returns its predictions alone."
    )


def _warn_train_mode(model: nn.Module) -> None:
    """Say what is done with BatchNorm and Dropout layers that are in train mode."""
    normalised = [
        name
        for name, module in model.named_modules()
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    dropped = [
        name
        for name, module in model.named_modules()
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    if normalised:
        warnings.warn(
            f"BatchNorm layer {normalised[0]!r}"
            + (f" and {len(normalised) - 1} more are" if normalised[1:] else " is")
            + " in train mode. With batchnorm='frozen' predictions and runs use the running statistics and leave them "
            "unchanged; a training loop that keeps train mode is not what is predicted. Call model.eval() to agree.",
            TrainModeWarning,
            stacklevel=3,
        )
    if dropped:
        warnings.warn(
            f"Dropout layer {dropped[0]!r}"
            + (f" and {len(dropped) - 1} more are" if dropped[1:] else " is")
            + " in train mode. Predictions and runs switch dropout off. Call model.eval() to agree.",
            TrainModeWarning,
            stacklevel=3,
        )
