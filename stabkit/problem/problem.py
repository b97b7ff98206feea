"""The unlearning problem: a trained model, its loss, what to forget and what to retain, validated once.

Everything later reads the model through `UnlearningProblem`, as a function of one flat parameter vector. The caller's
model is copied on entry; its parameters, buffers, mode, hooks, gradients and the global random state stay as they were.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from stabkit._errors import PrecisionWarning, UntrainedModelWarning, caller_level
from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int
from stabkit.data import Data, as_samples
from stabkit.losses import IGNORE_INDEX, CrossEntropy, Loss, PerSampleLoss, resolve_loss
from stabkit.network import (
    arguments,
    check_layers,
    check_modes,
    checked_device,
    differentiable_attention,
    normalises,
    output_tensor,
    plain_copy,
    sharing_copy,
    unwrapped,
    warn_train_mode,
)
from stabkit.problem.checks import (
    check_alike,
    check_function,
    check_samples,
    check_sets,
    check_weights,
    unreached,
    warn_of_twins,
    warn_other_mode,
)
from stabkit.reading import READS, Reading, labelled_positions, largest_logits, logits_to_read
from stabkit.samples import Inputs, Samples, map_tensors

Parameters = dict[str, Tensor]
EVALUATION_BATCH = 1024
EVALUATION_BYTES = 256 * 2**20  # of a batch's outputs, which makes batches of long outputs smaller
BATCHNORMS = ("frozen", "batch")
CHECK_EVERY = 10  # steps from one look at the losses of a run to the next
# Hugging Face's hook for activation checkpointing, which stays when that is switched off and which torch.func refuses.
GRADIENT_HOOK = "make_inputs_require_grad"
EVALUATED = 512  # samples of each set behind the losses at θ*: of a large set more would cost as much as a prediction


class UnlearningProblem:
    """A model, a per-sample loss, a forget set and a retain set, checked once and never altered.

    Attributes:
        forget: The samples to forget, n_f of them.
        retain: The samples to retain, n_r of them.
        test: Held-out samples, or None.
        loss: The per-sample loss.
        parameters: Trainable parameters θ* by name, detached copies, but for unreached ones.
        unreached: Names of trainable parameters that no loss depends on. They have no gradient, so that torch.optim leaves
            them as they are, without decay; here they are held fixed.
        size: Number d of trainable parameters.
        device: Where the computation runs.
        dtype: Floating dtype of the network's computation.
        batchnorm: "frozen": BatchNorm layers use their running statistics, in runs and in predictions alike. "batch": a
            step's passes use the statistics of its batches, which the running ones follow; "frozen" where there is no such
            layer.
        statistics: Running statistics at θ* of the BatchNorm layers that follow batches, by buffer name; empty when frozen.
        model_name: Class of the model.
        normalised: Whether layers divide by the size of a sample's own activations, as LayerNorm and GroupNorm do.
        retain_loss: Mean retain loss at θ*, of up to 512 samples.
        forget_loss: Mean forget loss at θ*, of as many.
        divergence_level: Mean retain loss of the best constant predictor (theory §7); a run that reaches it at a look has
            diverged.
        check_every: Steps from one look to the next, in runs and rollouts.
        widest_output: Numbers that the network itself gives for a sample, which a pass holds whatever is read of them.
        checking_gradients: What the losses at θ* and the unreached parameters took; a forward pass counts as a third of a
            gradient.
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
        check_every: int = CHECK_EVERY,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Read and check everything. The model is copied; data are read when needed and must stay as they are meanwhile.

        Cost: forward passes over up to 512 samples of each set, and gradients of four samples, or of up to 64 of each set
        where no loss depends on some parameter; the data themselves are read in full.

        Args:
            model: The trained network. It must return a tensor, or an object with `.logits`. What torch.compile,
                DataParallel or DistributedDataParallel wrapped is read without them. Its forward hooks are called in the
                passes of the copy too, so what they gather changes.
            forget: What to forget: DataLoader, Dataset, (x, y) tensors, dict of tensors with labels, or batches.
            retain: What to retain, in any of the same forms.
            loss: "cross_entropy", "causal_lm", "mse", or a callable (outputs, targets) -> losses of shape (m,).
            test: Held-out data, in any of the same forms.
            batchnorm: "frozen": running statistics, which no run changes. "batch": as in a training loop that keeps the
                BatchNorm layers in train mode, with a pass for the retain batch and one for the forget batch. Of a model
                that has some of them in train mode, the others stay in eval mode; where none is, all are taken to be.
            check_every: Steps from one look at the losses to the next; each of as many first ones, and the last, is looked
                at too. What spikes between two looks goes unseen.
            device: Where to compute; where the model is when None.
            dtype: Floating dtype to compute in; the model's, but at least float32, when None.

        Raises:
            TypeError: If the model is not a module or cannot be copied, or data or targets have a wrong type.
            RuntimeError: If it is made under torch.inference_mode() or torch.autocast.
            ValueError: If data are empty, overlapping, not finite or out of range, the model is not deterministic, couples
                samples or writes into its buffers in eval mode, computes again in its backward pass, is on the meta device
                or has no trainable parameter, the loss couples samples or writes into the outputs, either cuts the graph, a
                set has one sample where batches need two, or device or dtype cannot be used.
        """
        if not isinstance(model, nn.Module):
            held = isinstance(getattr(model, "model", None), nn.Module)  # what `run` and `retrain` return
            remedy = (
                "Its `.model` is one." if held else "Load a state_dict, or a file of one, into a network of its class."
            )
            raise TypeError(
                f"`model` of `UnlearningProblem` must be a torch.nn.Module; got {type(model).__name__}. {remedy}"
            )
        check_modes("UnlearningProblem")
        model = unwrapped(model)
        check_layers(model)
        self.model_name = type(model).__name__
        check_choice(batchnorm, name="batchnorm", owner="UnlearningProblem", choices=BATCHNORMS)
        self.check_every = check_int(check_every, name="check_every", owner="UnlearningProblem", low=1)
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
        if dtype is None and first.dtype != self.dtype:
            warnings.warn(
                f"`model` is in {first.dtype}, and predictions and runs compute in {self.dtype}. A loop that keeps its "
                "parameters in fewer bits rounds small steps away, and may hold where this breaks. Keep them in float32, as "
                "under torch.autocast, to agree; dtype=torch.float32 takes this warning away.",
                PrecisionWarning,
                stacklevel=caller_level(),
            )
        warn_train_mode(model, frozen=self.batchnorm == "frozen")
        with preserved_rng():
            self._module = plain_copy(model).to(self.device, self.dtype)
        self.normalised = normalises(self._module)
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
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "").startswith(GRADIENT_HOOK):
                    del module._forward_hooks[key]
        # What passes leave in attributes is of no use to a copy, and of torch.func's transforms no copy can be made of it.
        self._untouched = sharing_copy(self._module)
        self.parameters: Parameters = {
            name: p.detach() for name, p in self._module.named_parameters() if p.requires_grad
        }
        self.size = sum(p.numel() for p in self.parameters.values())
        self._constants: Parameters = {
            name: t.detach()
            for name, t in (*self._module.named_parameters(), *self._module.named_buffers())
            if name not in self.parameters
        }
        layers = {name: module for name, module in self._module.named_modules() if isinstance(module, _BatchNorm)}
        trained = [module for name, module in layers.items() if self._training[name]]
        self._normalisations = trained or list(layers.values())  # those that batchnorm="batch" has in train mode
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
        self.checking_gradients = 0.0
        self.widest_output = 1
        self._whole: UnlearningProblem | None = None  # what this one reads parts of
        with preserved_rng(), torch.no_grad():
            check_weights(
                (*self.parameters.items(), *self._constants.items()), masks=dict(self._module.named_buffers())
            )
            check_sets(self.forget, self.retain, batchnorm=self.batchnorm)
            for samples in (self.forget, self.retain):
                self._admit(samples)
            check_alike(self.forget, self.retain)
            check_function(self, self._untouched)
            warn_other_mode(self, self._untouched, self._training)
            self._leave_out_unreached()
            warn_of_twins(self.forget, self.retain)
            self._evaluate()
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
        """Outputs with BatchNorm layers in train mode, so that those of a sample depend on the whole batch.

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
            return inputs.pick(output_tensor(self.call(parameters, inputs.inputs)), self._class_axis)
        return output_tensor(self.call(parameters, inputs))

    def call(self, parameters: Parameters, inputs: Inputs) -> Any:
        """Whatever the network returns, before its outputs are read.

        Args:
            parameters: Trainable parameters by name.
            inputs: Inputs of b samples.

        Returns:
            A tensor, or an object of any kind. Cost: one forward pass.
        """
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
            self._admit(samples)
            check_alike(samples, self.retain)
        return samples

    def _admit(self, samples: Samples) -> None:
        """Check a set, and learn how wide the network's outputs are."""
        self.widest_output = max(self.widest_output, check_samples(self, samples, self._untouched))

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
            A new module that shares no memory with the caller's, in the problem's dtype: at least float32, whatever the
            caller's is in. Forward hooks are copied, backward hooks and those for activation checkpointing are not.
        """
        with preserved_rng():
            model = copy.deepcopy(self._untouched)
        own = dict((*model.named_parameters(), *model.named_buffers()))
        with torch.no_grad():
            for name, value in (self.parameters if parameters is None else parameters).items():
                own[name].copy_(value)
        for name, module in model.named_modules():
            module.training = self._training[name]
            if name in self._sparse and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = True
        return model

    def _evaluate(self) -> None:
        """The losses at θ*, and the level at which a run diverges."""
        outputs = self.outputs(self.parameters, self.retain.batch(torch.zeros(1, dtype=torch.int64))[0])
        self.divergence_level = self.loss.constant_level(outputs, self.retain.targets())
        evaluated = [samples.subset(EVALUATED, 0) for samples in (self.retain, self.forget)]
        self.retain_loss, self.forget_loss = (
            float(self.losses(samples, indices=indices).mean())
            for samples, indices in zip((self.retain, self.forget), evaluated, strict=True)
        )
        self.checking_gradients += sum(indices.numel() for indices in evaluated) / 3
        if self.retain_loss >= self.divergence_level:
            texts = isinstance(self.loss, CrossEntropy) and not self.loss.shift and outputs.dim() == 3
            hint = " Labels that are the inputs' own tokens are shifted by loss='causal_lm'." if texts else ""
            warnings.warn(
                f"`model` has retain loss {self.retain_loss:.4g}, no better than the best constant prediction "
                f"({self.divergence_level:.4g}), so every run counts as diverged from its first step. Check that the "
                "model is trained, and that the loss and the inputs' preprocessing are the ones it was trained with."
                f"{hint}",
                UntrainedModelWarning,
                stacklevel=caller_level(),
            )

    def _leave_out_unreached(self) -> None:
        """Hold fixed what no optimiser of PyTorch would move."""
        self.unreached, gradients = unreached(self)
        self.checking_gradients += gradients
        self._constants |= {name: self.parameters.pop(name) for name in self.unreached}
        self.size = sum(p.numel() for p in self.parameters.values())

    def layer_of(self) -> dict[str, str]:
        """Which module each trainable parameter belongs to.

        Returns:
            Module name by parameter name; "" is the model itself.
        """
        return {name: name.rpartition(".")[0] for name in self.parameters}
