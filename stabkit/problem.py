"""The unlearning problem: a trained model, its loss, what to forget and what to retain, validated once.

Everything later reads the model through `UnlearningProblem`, as a function of one flat parameter vector. The caller's
model is copied on entry; its parameters, buffers, mode, hooks, gradients and the global random state stay as they were.
"""

import contextlib
import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from stabkit._errors import OverlapWarning, ProbabilityWarning, UntrainedModelWarning, caller_level
from stabkit._memory import is_out_of_memory
from stabkit._rng import preserved_rng
from stabkit._validate import check_choice
from stabkit.losses import IGNORE_INDEX, CrossEntropy, Loss, PerSampleLoss, resolve_loss
from stabkit.network import (
    arguments,
    check_layers,
    check_stateless,
    checked_device,
    differentiable_attention,
    output_tensor,
    plain_copy,
    unwrapped,
    warn_train_mode,
)
from stabkit.reading import READS, Reading, labelled_positions, largest_logits, logits_to_read
from stabkit.samples import EXTRA_PARTS, Data, Inputs, Samples, as_samples, map_tensors, tensors_of

Parameters = dict[str, Tensor]
EVALUATION_BATCH = 1024
EVALUATION_BYTES = 256 * 2**20  # of a batch's outputs, which makes batches of long outputs smaller
BATCHNORMS = ("frozen", "batch")
EVALUATED = 512  # samples of each set behind the losses at θ*: of a large set more would cost as much as a prediction
PROBES = 16  # forget samples that are looked for in the retain set
MOVED_SAMPLES = 4  # through which gradients away from θ* are compared
PROBABILITIES = 1e-4  # how far from 1 the sum of outputs may be that are probabilities
SAME_LOSS = 1e-4  # relative: of a sample alone and among others, from the same outputs
COUPLING = 0.01  # of the largest output: more than other kernels for another batch size make


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
        batchnorm: "frozen": BatchNorm layers use their running statistics, in runs and in predictions alike. "batch": a
            step's passes use the statistics of its batches, which the running ones follow; "frozen" where there is no such
            layer.
        statistics: Running statistics of the BatchNorm layers at θ*, by buffer name; empty when frozen.
        model_name: Class of the model.
        retain_loss: Mean retain loss at θ*, of up to 512 samples.
        forget_loss: Mean forget loss at θ*, of as many.
        divergence_level: Mean retain loss of the best constant predictor (theory §7); a run that reaches it diverges.
        widest_output: Numbers that the network itself gives for a sample, which a pass holds whatever is read of them.
        checking_gradients: What the losses at θ* took; a forward pass counts as a third of a gradient.
        reading_gradients: What `reading` spent to make this problem; a forward pass counts as a third of a gradient.
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

        Cost: forward passes over up to 512 samples of each set; the data themselves are read in full.

        Args:
            model: The trained network. It must return a tensor, or an object with `.logits`. What torch.compile,
                DataParallel or DistributedDataParallel wrapped is read without them.
            forget: What to forget: DataLoader, Dataset, (x, y) tensors, dict of tensors with labels, or batches.
            retain: What to retain, in any of the same forms.
            loss: "cross_entropy", "causal_lm", "mse", or a callable (outputs, targets) -> losses of shape (m,).
            test: Held-out data, in any of the same forms.
            batchnorm: "frozen": running statistics, which no run changes. "batch": as in a training loop that keeps the
                BatchNorm layers in train mode, with a pass for the retain batch and one for the forget batch.
            device: Where to compute; where the model is when None.
            dtype: Floating dtype to compute in; the model's, but at least float32, when None.

        Raises:
            TypeError: If the model is not a module or cannot be copied, or data or targets have a wrong type.
            RuntimeError: If it is made under torch.inference_mode().
            ValueError: If data are empty, overlapping, not finite or out of range, the model is not deterministic, couples
                samples or writes into its buffers in eval mode, computes again in its backward pass, is on the meta device
                or has no trainable parameter, the loss couples samples or writes into the outputs, either cuts the graph, a
                set has one sample where batches need two, or device or dtype cannot be used.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` of `UnlearningProblem` must be a torch.nn.Module; got {type(model).__name__}.")
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "`UnlearningProblem` must be made where derivatives can be taken; got torch.inference_mode(). Leave that "
                "block; torch.no_grad() does no harm."
            )
        model = unwrapped(model)
        check_layers(model)
        self.model_name = type(model).__name__
        check_choice(batchnorm, name="batchnorm", owner="UnlearningProblem", choices=BATCHNORMS)
        has_statistics = any(isinstance(module, _BatchNorm) for module in model.modules())
        self.batchnorm = batchnorm if has_statistics else "frozen"
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
        self.device = checked_device(device) if device is not None else first.device
        self.dtype = dtype or (first.dtype if first.dtype in {torch.float32, torch.float64} else torch.float32)
        warn_train_mode(model, frozen=self.batchnorm == "frozen")
        with preserved_rng():
            self._module = plain_copy(model).to(self.device, self.dtype)
        self._training = {name: module.training for name, module in self._module.named_modules()}
        self._sparse = [
            name for name, module in self._module.named_modules() if getattr(module, "sparse", False) is True
        ]
        self._module.eval()
        for parameter in self._module.parameters():
            parameter.grad = None
        for module in self._module.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # sparse gradients have no derivatives of their own; `new_model` has them again
        for module in self._module.modules():  # they watch or edit .backward(), and torch.func cannot pass through them
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        self.parameters: Parameters = {
            name: p.detach() for name, p in self._module.named_parameters() if p.requires_grad
        }
        self.size = sum(p.numel() for p in self.parameters.values())
        self._constants: Parameters = {
            name: t.detach()
            for name, t in (*self._module.named_parameters(), *self._module.named_buffers())
            if name not in self.parameters
        }
        self._normalisations = [m for m in self._module.modules() if isinstance(m, _BatchNorm)]
        self.statistics: Parameters = {}
        if self.batchnorm == "batch":
            kept = {id(t) for layer in self._normalisations for t in layer._buffers.values() if t is not None}
            self.statistics = {name: t.detach() for name, t in self._module.named_buffers() if id(t) in kept}
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
        self._class_axis = -1
        self._readings: dict[str, UnlearningProblem] = {}
        self.reading_gradients = 0.0
        self.widest_output = 1
        self._whole: UnlearningProblem | None = None  # what this one reads parts of
        with preserved_rng(), torch.no_grad():
            self._check()
        self.test = None if test is None else self.read(test, name="test")

    # ------------------------------------------------------------------ the network as a function of its parameters

    def outputs(self, parameters: Parameters, inputs: Inputs) -> Tensor:
        """Network outputs at the given trainable parameters; differentiable in them, twice and in forward mode.

        Args:
            parameters: Trainable parameters by name. Running statistics that are among them take the place of θ*'s.
            inputs: Inputs of b samples: a tensor, a tuple of arguments or a dict of keyword arguments.

        Returns:
            Outputs of shape (b, ...). Cost: one forward pass.

        Raises:
            TypeError: If the model returns no tensor and nothing with `.logits`.
        """
        return self._read(parameters, inputs)

    def batch_outputs(self, parameters: Parameters, inputs: Inputs, *, statistics: Parameters | None = None) -> Tensor:
        """Outputs with the BatchNorm layers in train mode, so that those of a sample depend on the whole batch.

        Args:
            parameters: Trainable parameters by name.
            inputs: Inputs of b >= 2 samples.
            statistics: Running statistics, which are updated in place by each layer's own rule, as in a training pass of
                PyTorch; when None there are none to update, and `torch.func` can pass through.

        Returns:
            Outputs of shape (b, ...), differentiable through the batch's statistics. Dropout stays off. Cost: one forward
            pass.
        """
        try:
            for layer in self._normalisations:
                layer.training, layer.track_running_stats = True, statistics is not None
            return self._read({**parameters, **(statistics or {})}, inputs)
        finally:
            for layer in self._normalisations:
                layer.training, layer.track_running_stats = False, True

    def _read(self, parameters: Parameters, inputs: Inputs) -> Tensor:
        """The outputs, or what is read of them."""
        if isinstance(inputs, Reading):
            return inputs.pick(output_tensor(self._call(parameters, inputs.inputs)), self._class_axis)
        return output_tensor(self._call(parameters, inputs))

    def _call(self, parameters: Parameters, inputs: Inputs) -> Any:
        """Whatever the network returns."""
        tensors = {**self._constants, **self.parameters, **parameters}
        placed = {place: tensors[name] for place, name in self._places.items()}
        own = map_tensors(
            torch.clone, inputs
        )  # a first layer may work in place, which transformed functions do not forgive
        with differentiable_attention():
            return functional_call(self._module, placed, *arguments(own), tie_weights=False)

    def outputs_of(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """What another model says in eval mode, by its own forward pass and not by the problem's.

        Args:
            model: Any model; a copy of it is called.
            inputs: Inputs of b samples, on the problem's device and in its dtype.

        Returns:
            Outputs of shape (b, ...), without gradients. Cost: a copy of the model and a forward pass.
        """
        positional, named = arguments(inputs)
        with preserved_rng(), torch.no_grad(), differentiable_attention():
            copied = plain_copy(model).to(self.device, self.dtype).eval()
            return output_tensor(copied(*positional, **named))

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

    def at(self, vector: Tensor) -> "UnlearningProblem":
        """The same problem at other parameters, for curvature and linearisations there.

        Args:
            vector: Parameters θ, shape (d,).

        Returns:
            A problem whose `parameters` are these. Data, level and constants are shared; `retain_loss` and `forget_loss`
            stay those at θ*.

        Raises:
            ValueError: If the vector is of another length.
        """
        if vector.shape != (self.size,):
            raise ValueError(
                f"`vector` of `UnlearningProblem.at` must be of shape ({self.size},); got {tuple(vector.shape)}. "
                "`flatten` makes one from parameters by name."
            )
        moved = copy.copy(self)
        moved.parameters = self.unflatten(vector.detach().to(self.device, self.dtype))
        moved._readings = {}
        moved._whole = self._whole and self._whole.at(vector)
        return moved

    @property
    def whole(self) -> "UnlearningProblem":
        """The problem that this one reads parts of the outputs of; itself where it reads them all."""
        return self._whole or self

    def reading(self, reads: str = "loss") -> "UnlearningProblem":
        """The same problem with outputs that hold what a cross-entropy reads and no more, so that they can be linearised.

        Positions without a label are left out, and where that at least halves what is left, down to some 1,000 numbers a
        sample, all but the label's logit and the largest ones at θ* are merged into their logsumexp. Losses and their
        derivatives in θ are those of the problem itself, at every θ.

        Args:
            reads: "loss"; "labelled": the whole distribution at labelled positions, so that no logits are merged; "all":
                everything, so that nothing is left out.

        Returns:
            The problem, made once; the whole one where there is nothing to leave out, as for one label and few classes, and
            for other losses. Cost: a forward pass of every sample if logits are merged, as `reading_gradients` says.
        """
        check_choice(reads, name="reads", owner="UnlearningProblem.reading", choices=READS)
        whole = self.whole
        if type(whole.loss) is not CrossEntropy or reads == "all":
            return whole
        if reads not in whole._readings:
            with preserved_rng(), torch.no_grad():
                whole._readings[reads] = whole._reading(whole.loss, merge=reads == "loss")
        return whole._readings[reads]

    def _reading(self, loss: CrossEntropy, *, merge: bool) -> "UnlearningProblem":
        first = torch.zeros(1, dtype=torch.int64)
        outputs = self.outputs(self.parameters, self.retain.batch(first)[0])
        sets = self.retain, self.forget
        labels = [loss.labels(samples.targets()) for samples in sets]
        most = max(int((found != IGNORE_INDEX).sum(1).max()) for found in labels)
        one = self.retain.targets()[:1]
        _, positions, classes = loss.aligned(outputs, one)[0].shape
        axis = loss.class_axis(outputs, one)
        count = logits_to_read(most, classes) if merge else 0
        if count == 0 and most == positions:
            return self
        read = copy.copy(self)
        read._whole = self
        read._class_axis = axis
        read.reading_gradients = (self.retain.size + self.forget.size) / 3 if count else 0.0
        read.loss = CrossEntropy(name=loss.name)
        read.retain, read.forget = (
            self._picked(samples, found, labelled_positions(found, most), count, axis)
            for samples, found in zip(sets, labels, strict=True)
        )
        read.test = None
        return read

    def _picked(self, samples: Samples, labels: Tensor, positions: Tensor, count: int, axis: int) -> Samples:
        """A set with the places at which its outputs are read."""
        labels = labels.gather(1, positions)
        if count:
            parts = []
            for chunk in torch.arange(samples.size).split(self.evaluation_batch):
                here = positions[chunk.to(positions.device)]
                read = Reading(samples.batch(chunk)[0], here, here.new_empty(*here.shape, 0))
                rows = read.pick(self.outputs(self.parameters, read.inputs), axis)
                parts.append(largest_logits(rows, labels[chunk.to(labels.device)], count))
            logits = torch.cat(parts)
            labels = torch.where(labels == IGNORE_INDEX, labels, 0)  # the label's logit is the first
        else:
            logits = positions.new_empty(*positions.shape, 0)

        def fetch(indices: Tensor, inputs: Inputs, _: Tensor) -> tuple[Inputs, Tensor]:
            chosen = indices.to(positions.device)
            return Reading(inputs, positions[chosen], logits[chosen]), labels[chosen]

        return samples.mapped(fetch)

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
            parameters: Trainable parameters, and running statistics other than θ*'s; θ* when None.
            indices: Which of its samples; all when None.

        Returns:
            Outputs (m, ...), targets (m, ...) and per-sample losses (m,). Cost: m forward passes. Where the outputs are not
            needed, `losses` holds none of them.
        """
        parameters = self.parameters if parameters is None else parameters
        outputs, targets = [], []
        with torch.no_grad():
            for inputs, batch_targets in samples.batches(self.evaluation_batch, indices):
                outputs.append(self.outputs(parameters, inputs))
                targets.append(batch_targets)
            f, y = torch.cat(outputs), torch.cat(targets)
            return f, y, self.loss.per_sample(f, y)

    def losses(self, samples: Samples, parameters: Parameters | None = None, indices: Tensor | None = None) -> Tensor:
        """Losses of a set, without gradients.

        Args:
            samples: Which set.
            parameters: Trainable parameters, and running statistics other than θ*'s; θ* when None.
            indices: Which of its samples; all when None.

        Returns:
            Per-sample losses (m,). Cost: m forward passes; outputs of one batch are held at a time.
        """
        parameters = self.parameters if parameters is None else parameters
        with torch.no_grad():
            return torch.cat([
                self.loss.per_sample(self.outputs(parameters, inputs), targets)
                for inputs, targets in samples.batches(self.evaluation_batch, indices)
            ])

    @property
    def evaluation_batch(self) -> int:
        """Samples to pass at once, so that their outputs stay few."""
        return max(1, min(EVALUATION_BATCH, EVALUATION_BYTES // (self.widest_output * self.dtype.itemsize)))

    def new_model(self, parameters: Parameters | None = None) -> nn.Module:
        """A fresh copy of the model, in the mode the caller's was in.

        Args:
            parameters: Trainable parameters, and running statistics, to put in; the problem's own when None.

        Returns:
            A new module that shares no memory with the caller's. Forward hooks are copied, backward hooks are not.
        """
        with preserved_rng():
            model = copy.deepcopy(self._module)
        own = dict((*model.named_parameters(), *model.named_buffers()))
        with torch.no_grad():
            for name, value in (self.parameters if parameters is None else parameters).items():
                own[name].copy_(value)
        for name, module in model.named_modules():
            module.training = self._training[name]
            if name in self._sparse and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = True
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
            if value.is_meta:
                raise ValueError(
                    f"`model` of `UnlearningProblem` must hold its weights; {name!r} is on the meta device. Give it memory "
                    "with model.to_empty(device='cpu') and load its state_dict."
                )
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
            if self.batchnorm == "batch" and samples.size == 1:
                raise ValueError(
                    f"`{samples.name}` must hold at least two samples with batchnorm='batch'; got 1, and a batch of one has "
                    "no variance. Use batchnorm='frozen'."
                )
            self._check_finite(samples)
            self._check_outputs(samples)
        self._check_stateless()
        twins = self.forget.twins(self.retain, PROBES)
        if 2 * twins > min(PROBES, self.forget.size):
            warnings.warn(
                f"`forget` and `retain` should not overlap; of {min(PROBES, self.forget.size)} forget samples looked at, "
                f"{twins} are in the retain set too, with the same target. Remove them there, unless they are meant as "
                "duplicates: what is kept cannot be forgotten.",
                OverlapWarning,
                stacklevel=caller_level(),
            )
        outputs = self.outputs(self.parameters, self.retain.batch(torch.zeros(1, dtype=torch.int64))[0])
        self.divergence_level = self.loss.constant_level(outputs, self.retain.targets())
        evaluated = [samples.subset(EVALUATED, 0) for samples in (self.retain, self.forget)]
        self.retain_loss, self.forget_loss = (
            float(self.losses(samples, indices=indices).mean())
            for samples, indices in zip((self.retain, self.forget), evaluated, strict=True)
        )
        self.checking_gradients = sum(indices.numel() for indices in evaluated) / 3
        if self.retain_loss >= self.divergence_level:
            warnings.warn(
                f"`model` has retain loss {self.retain_loss:.4g}, no better than the best constant prediction "
                f"({self.divergence_level:.4g}), so every run counts as diverged from its first step. Check that the "
                "model is trained, and that the loss and the inputs' preprocessing are the ones it was trained with.",
                UntrainedModelWarning,
                stacklevel=caller_level(),
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
        """A few samples through the model: output type, determinism, one loss a sample, finite losses, no coupling."""
        inputs, targets = samples.batch(torch.arange(min(3, samples.size)))
        outputs = self._first_outputs(inputs, samples.name)
        self.widest_output = max(self.widest_output, outputs[0].numel() if outputs.dim() else 1)
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
        if type(self.loss) is CrossEntropy and samples is self.retain:
            sums = outputs.sum(1)
            if bool((outputs >= 0).all()) and bool(((sums - 1).abs() < PROBABILITIES).all()) and outputs.shape[1] > 1:
                warnings.warn(
                    "`model` seems to return probabilities, as its outputs are none below 0 and sum to 1, and cross-entropy "
                    "takes the softmax of them once more. Return logits, unless it was trained this way.",
                    ProbabilityWarning,
                    stacklevel=caller_level(),
                )
        self._check_losses(outputs, targets, samples.name)
        self._check_differentiable(inputs, targets, samples.name)
        alone = self._first_outputs(samples.batch(torch.zeros(1, dtype=torch.int64))[0], samples.name)
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

    def _check_losses(self, outputs: Tensor, targets: Tensor, name: str) -> None:
        """Losses of a few samples: finite, each of its own sample, and the outputs left as they are."""
        before = outputs.clone()
        losses = self.loss.per_sample(outputs, targets)
        if not torch.equal(outputs.nan_to_num(), before.nan_to_num()):
            raise ValueError(
                f"`loss` must leave the outputs as they are; got {self.loss.name!r}, which writes into them. Use o - t in "
                "place of o.sub_(t)."
            )
        if not bool(torch.isfinite(losses).all()):
            raise ValueError(
                f"losses of `{name}` must be finite at the trained parameters; got {losses.tolist()}. Check the "
                "loss and the inputs' scale."
            )
        alone = self.loss.per_sample(outputs[:1], targets[:1])
        if not torch.allclose(alone, losses[:1], rtol=SAME_LOSS, atol=SAME_LOSS * float(losses.abs().max())):
            raise ValueError(
                f"`loss` must give a sample the same loss whatever else is in its batch; got {self.loss.name!r}, whose "
                f"first one of `{name}` is {float(losses.flatten()[0]):.4g} among others and "
                f"{float(alone.flatten()[0]):.4g} alone. Leave means over the batch out of it."
            )

    def _check_differentiable(self, inputs: Inputs, targets: Tensor, name: str) -> None:
        """Whether derivatives reach the parameters, through the model and through the loss."""
        with torch.enable_grad():
            leaves = {key: p.detach().requires_grad_() for key, p in self.parameters.items()}
            outputs = self.outputs(leaves, inputs)
            losses = self.loss.per_sample(outputs, targets) if outputs.requires_grad else outputs
        for what, found, owner in (("outputs", outputs, "model"), (f"losses of {self.loss.name!r}", losses, "loss")):
            if not found.requires_grad:
                raise ValueError(
                    f"`{owner}` must be differentiable; got {what} without derivatives in the parameters, for `{name}`. "
                    "Remove torch.no_grad(), detach() and detours through NumPy from it."
                )

    def _check_stateless(self) -> None:
        """Whether the network is a function of its parameters, also in its backward pass."""
        few = min(MOVED_SAMPLES, self.evaluation_batch, self.retain.size)
        inputs, targets = self.retain.batch(torch.arange(few))
        check_stateless(
            self._module,
            self.parameters,
            inputs,
            outputs=lambda parameters: self.outputs(parameters, inputs),
            loss=lambda outputs: self.loss.per_sample(outputs, targets).sum(),
        )

    def _first_outputs(self, inputs: Inputs, name: str) -> Tensor:
        """Outputs of a few samples; if the model cannot take them, an error that names the set and what to do."""
        try:
            raw = self._call(self.parameters, inputs)
        except Exception as error:  # a forward pass fails in as many ways as there are layers
            if is_out_of_memory(error):
                raise
            said = f"{type(error).__name__}: {error}"
            integers = next((t for t in tensors_of(inputs) if not t.is_floating_point()), None)
            if integers is not None and self._takes_floats(inputs):
                raise TypeError(
                    f"inputs of `{name}` must be floating point for this model; got integers from {int(integers.min())} to "
                    f"{int(integers.max())}, on which its forward pass fails ({said}). Convert them as in training, for "
                    "instance x.float() / 255; nothing is rescaled unasked."
                ) from error
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_of(inputs))
            remedy = "Give inputs of the shape, type and range that it was trained on."
            if isinstance(error, TypeError) and isinstance(inputs, dict):
                remedy = f"It is given {', '.join(inputs)} by name: leave out the columns that it does not know."
            elif isinstance(error, TypeError) and isinstance(inputs, tuple):
                remedy = EXTRA_PARTS
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"`model` of `UnlearningProblem` must take the inputs of `{name}`; got {said}, for {shapes}. {remedy}"
            ) from error
        return output_tensor(raw)

    def _takes_floats(self, inputs: Inputs) -> bool:
        """Whether the same numbers in floating point are what the model wants."""
        with contextlib.suppress(Exception):
            self._call(self.parameters, map_tensors(lambda t: t.to(self.dtype), inputs))
            return True
        return False
