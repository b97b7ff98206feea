"""Per-sample losses with what the theory needs of them: residuals, output Hessians and the best constant's level.

Outputs are the network's raw outputs f of shape (m, ...) and the loss is one number per sample. With O output numbers
a sample, s_i = dl_i/df_i has O entries and Λ_i = d²l_i/df_i² is O x O; both are applied without being formed wherever a
closed form exists (theory §5).
"""

import abc
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stabkit._memory import is_out_of_memory
from stabkit._validate import check_choice

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]

NAMED = ("cross_entropy", "causal_lm", "mse")
IGNORE_INDEX = -100
NEWTON_STEPS = 200
UNBOUNDED = 1e6  # a mean loss that falls by so many times its size has no minimum


class Loss(abc.ABC):
    """One number per sample, its first two derivatives in the outputs, and its best constant level."""

    name: str

    @abc.abstractmethod
    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of every sample.

        Args:
            outputs: Network outputs, shape (m, ...).
            targets: Targets of the same m samples.

        Returns:
            Losses in nats or squared units, shape (m,).
        """

    @abc.abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of every sample's loss in its own outputs, s_i of T14.

        Args:
            outputs: Network outputs, shape (m, ...).
            targets: Targets of the same m samples.

        Returns:
            Tensor of the outputs' shape.
        """

    @abc.abstractmethod
    def hessian_apply(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """Λ_i X_i for every sample.

        Args:
            outputs: Network outputs, shape (m, ...), O numbers a sample.
            targets: Targets of the same m samples.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k).
        """

    @abc.abstractmethod
    def factor_transpose(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """L_i^T X_i with Λ_i = L_i L_i^T, the step from output Jacobians to curvature factors.

        Args:
            outputs: Network outputs, shape (m, ...), O numbers a sample.
            targets: Targets of the same m samples.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k).
        """

    @abc.abstractmethod
    def constant_level(self, outputs: Tensor, targets: Tensor) -> float:
        """Smallest mean loss that any constant output reaches on these targets (theory §7).

        Args:
            outputs: Any outputs of the right trailing shape, shape (1, ...) suffices.
            targets: Targets of the whole set.

        Returns:
            The level, in the loss's own units.
        """

    def divergence(self, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
        """How far every sample's prediction has moved, the quantity behind AGU's leakage bound (theory §8).

        Args:
            before: Outputs of the original model, shape (m, ...).
            after: Outputs of the current one, the same shape.
            targets: Targets of the same m samples; a loss without positions to ignore has no use for them.

        Returns:
            Mean squared change of a sample's outputs, shape (m,), in squared output units.
        """
        return (after - before).square().reshape(after.shape[0], -1).mean(1)

    def counted(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Which outputs the loss reads at all, so that others do not count as sensitivity.

        Args:
            outputs: Network outputs, shape (m, ...), O numbers a sample.
            targets: Targets of the same m samples.

        Returns:
            Booleans of shape (m, O), or None where every output counts.
        """
        return None

    def check_targets(self, outputs: Tensor, targets: Tensor, *, name: str) -> None:  # noqa: B027
        """Raise if the targets cannot belong to these outputs.

        Args:
            outputs: Outputs of at least one sample, shape (b, ...).
            targets: Targets of the whole set.
            name: The set's name, for the message.
        """


class CrossEntropy(Loss):
    """Softmax cross-entropy: of one label a sample, or the mean over a sequence's or map's labelled positions.

    The class axis is the outputs' last one, or their second one where only that fits the targets (PyTorch's own
    convention for maps). Positions labelled -100 do not count.

    Attributes:
        shift: Whether position t predicts label t+1, as causal language models do.
        name: What reports call it.
    """

    def __init__(self, *, shift: bool = False, name: str | None = None) -> None:
        self.shift = shift
        self.name = name or ("causal_lm" if shift else "cross_entropy")

    def _align(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Logits (m, T, C), labels (m, T), and whether the class axis was moved."""
        moved = outputs.dim() > 2 and outputs.shape[1:-1] != targets.shape[1:]
        logits = outputs.movedim(1, -1) if moved else outputs
        m, classes = logits.shape[0], logits.shape[-1]
        return logits.reshape(m, -1, classes), targets.reshape(m, -1), moved

    def _shifted(self, labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if self.shift else labels

    def _labels_and_weights(self, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Labels aligned with the positions that predict them, and each position's weight in its sample's mean."""
        labels = self._shifted(labels)
        valid = labels != IGNORE_INDEX
        weights = valid.to(dtype)
        if labels.shape[1] > 1:  # of a single position the mean is its own
            weights = weights / valid.sum(1, keepdim=True).clamp_min(1)
        return labels.clamp_min(0), weights

    def aligned(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the labels they predict, position by position.

        Args:
            outputs: Logits, shape (m, C), (m, T, C) or (m, C, T...).
            targets: Integer labels, shape (m,) or (m, T...).

        Returns:
            Logits (m, T, C) and labels (m, T); -100 marks positions that do not count.
        """
        logits, labels, _ = self._align(outputs, targets)
        return logits, self._shifted(labels)

    def labels(self, targets: Tensor) -> Tensor:
        """Labels of a whole set, aligned with the positions that predict them.

        Args:
            targets: Integer labels, shape (n,) or (n, T...).

        Returns:
            Shape (n, T); -100 marks positions that do not count.
        """
        return self._shifted(targets.reshape(targets.shape[0], -1))

    def class_axis(self, outputs: Tensor, targets: Tensor) -> int:
        """Where the classes lie in the outputs.

        Args:
            outputs: Logits, shape (m, C), (m, T, C) or (m, C, T...).
            targets: Integer labels, shape (m,) or (m, T...).

        Returns:
            1 or -1.
        """
        return 1 if self._align(outputs, targets)[2] else -1

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over labelled positions of -log p(label).

        Args:
            outputs: Logits, shape (m, C), (m, T, C) or (m, C, T...).
            targets: Integer labels, shape (m,) or (m, T...).

        Returns:
            Losses in nats, shape (m,).
        """
        logits, labels, _ = self._align(outputs, targets)
        labels, weights = self._labels_and_weights(labels, logits.dtype)
        picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return ((logits.logsumexp(-1) - picked) * weights).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """softmax(f) - onehot(label), weighted as the positions are.

        Args:
            outputs: Logits, shape (m, C), (m, T, C) or (m, C, T...).
            targets: Integer labels, shape (m,) or (m, T...).

        Returns:
            Tensor of the outputs' shape.
        """
        logits, labels, moved = self._align(outputs, targets)
        labels, weights = self._labels_and_weights(labels, logits.dtype)
        weights = weights.unsqueeze(-1)
        residual = (logits.softmax(-1) * weights).scatter_add(-1, labels.unsqueeze(-1), -weights)
        return self._restore(residual, outputs, moved)

    def hessian_apply(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """(diag(p) - pp^T) X, position by position.

        Args:
            outputs: Logits, O numbers a sample.
            targets: Integer labels.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k). Cost 2·m·O·k.
        """
        p, w, x, moved = self._positions(outputs, targets, block)
        result = p * (x - (p * x).sum(2, keepdim=True)) * w
        return self._flatten_block(result, outputs, moved)

    def factor_transpose(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """L^T X with L = diag(√p) - p√p^T, since LL^T = diag(p) - pp^T.

        Args:
            outputs: Logits, O numbers a sample.
            targets: Integer labels.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k). Cost 2·m·O·k.
        """
        p, w, x, moved = self._positions(outputs, targets, block)
        result = p.sqrt() * (x - (p * x).sum(2, keepdim=True)) * w.sqrt()
        return self._flatten_block(result, outputs, moved)

    def divergence(self, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
        """KL divergence from the original predictive distribution to the current one, over the labelled positions.

        Args:
            before: Logits of the original model, shape (m, C), (m, T, C) or (m, C, T...).
            after: Logits of the current one, the same shape.
            targets: Integer labels; they say which positions count.

        Returns:
            Divergences in nats, shape (m,).
        """
        old, labels, _ = self._align(before, targets)
        new, _, _ = self._align(after, targets)
        _, weights = self._labels_and_weights(labels, old.dtype)
        old, new = old.log_softmax(-1), new.log_softmax(-1)
        return ((old.exp() * (old - new)).sum(-1) * weights).sum(1)

    def counted(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The logits of labelled positions.

        Args:
            outputs: Logits, shape (m, C), (m, T, C) or (m, C, T...).
            targets: Integer labels, shape (m,) or (m, T...).

        Returns:
            Booleans of shape (m, O), or None where every position is labelled.
        """
        logits, labels, moved = self._align(outputs, targets)
        valid = self._shifted(labels) != IGNORE_INDEX
        if bool(valid.all()):
            return None
        return self._restore(valid.unsqueeze(-1).expand_as(logits), outputs, moved).flatten(1)

    def constant_level(self, outputs: Tensor, targets: Tensor) -> float:
        """Entropy of the label frequencies, every labelled sample weighing alike, in nats.

        A sample without a single label has loss 0 and counts as such. Where all labels are the same, which a constant
        predicts perfectly, it is that of guessing: ln C.

        Args:
            outputs: Logits of at least one sample; only their class count is read.
            targets: Integer labels of the whole set.

        Returns:
            The entropy; near ln C for balanced classes.
        """
        labels = targets.reshape(targets.shape[0], -1)
        labels, weights = self._labels_and_weights(labels, torch.float64)
        frequency = torch.zeros(int(labels.max()) + 1, dtype=torch.float64, device=labels.device)
        frequency.scatter_add_(0, labels.reshape(-1), weights.reshape(-1))
        frequency = frequency[frequency > 0]
        if frequency.numel() == 1:
            return float(frequency / targets.shape[0]) * math.log(self.aligned(outputs, targets[:1])[0].shape[-1])
        entropy = -(frequency * (frequency / frequency.sum()).log()).sum()
        return float(entropy / targets.shape[0])

    def check_targets(self, outputs: Tensor, targets: Tensor, *, name: str) -> None:
        """Labels must be integers in [0, C), or -100.

        Args:
            outputs: Logits of at least one sample.
            targets: Labels of the whole set.
            name: The set's name, for the message.

        Raises:
            TypeError: If the labels are not integers.
            ValueError: If a label is out of range, or the shapes cannot belong together.
        """
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(
                f"targets of `{name}` must be integer class labels for loss={self.name!r}; got {targets.dtype}. "
                "Use targets.long(), or loss='mse' for regression."
            )
        if self.shift and targets.dim() < 2:
            raise ValueError(
                f"targets of `{name}` must be token labels of shape (n, T) for loss='causal_lm'; got shape "
                f"{tuple(targets.shape)}. Use loss='cross_entropy' for one label a sample."
            )
        last, second = outputs.shape[1:-1], outputs.shape[2:]
        if outputs.dim() < 2 or targets.shape[1:] not in {last, second}:
            raise ValueError(
                f"targets of `{name}` must have one label per position of the outputs; got targets "
                f"{tuple(targets.shape)} for outputs {tuple(outputs.shape)}. The class axis of the outputs must be the "
                "last or the second one."
            )
        logits, _, _ = self._align(outputs[:1], targets[:1])
        classes = logits.shape[-1]
        if not bool((self._shifted(targets.reshape(targets.shape[0], -1)) != IGNORE_INDEX).any()):
            where, got = (" after the first position", "none") if self.shift else ("", f"only {IGNORE_INDEX}")
            raise ValueError(f"targets of `{name}` must hold at least one label{where}; got {got}.")
        used = targets[targets != IGNORE_INDEX]
        low, high = int(used.min()), int(used.max())
        if low < 0 or high >= classes:
            bad = low if low < 0 else high
            remedy = f"Relabel the classes, or use {IGNORE_INDEX} for positions to ignore."
            if classes == 1:
                remedy = (
                    "One output is no choice of classes: give the model two, or float targets and a loss such as "
                    "torch.nn.BCEWithLogitsLoss(reduction='none')."
                )
            raise ValueError(
                f"targets of `{name}` must be in [0, {classes - 1}], as the model has {classes} outputs; got {bad}. {remedy}"
            )

    def _positions(self, outputs: Tensor, targets: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Probabilities (m, T, C, 1), weights (m, T, 1, 1) and the block as (m, T, C, k)."""
        logits, labels, moved = self._align(outputs, targets)
        _, weights = self._labels_and_weights(labels, logits.dtype)
        m, k = block.shape[0], block.shape[-1]
        shaped = block.reshape(m, *outputs.shape[1:], k)
        if moved:
            shaped = shaped.movedim(1, -2)
        x = shaped.reshape(m, *logits.shape[1:], k)
        return logits.softmax(-1).unsqueeze(-1), weights[:, :, None, None], x, moved

    @staticmethod
    def _restore(values: Tensor, outputs: Tensor, moved: bool) -> Tensor:
        if not moved:
            return values.reshape(outputs.shape)
        m, classes, *positions = outputs.shape
        return values.reshape(m, *positions, classes).movedim(-1, 1)

    @staticmethod
    def _flatten_block(values: Tensor, outputs: Tensor, moved: bool) -> Tensor:
        m, k = values.shape[0], values.shape[-1]
        if moved:
            _, classes, *positions = outputs.shape
            values = values.reshape(m, *positions, classes, k).movedim(-2, 1)
        return values.reshape(m, -1, k)


class SquaredError(Loss):
    """Mean over a sample's outputs of the squared difference to its targets."""

    name = "mse"

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """mean over the O outputs of (f - y)².

        Args:
            outputs: Predictions, shape (m, ...).
            targets: Targets, the same shape, or (m,) for one output.

        Returns:
            Losses, shape (m,).
        """
        return (outputs - targets.reshape(outputs.shape)).square().reshape(outputs.shape[0], -1).mean(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """2 (f - y) / O.

        Args:
            outputs: Predictions, shape (m, ...).
            targets: Targets, the same shape, or (m,) for one output.

        Returns:
            Tensor of the outputs' shape.
        """
        return (outputs - targets.reshape(outputs.shape)) * (2.0 / outputs[0].numel())

    def hessian_apply(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """(2/O) X.

        Args:
            outputs: Predictions, shape (m, ...), O numbers a sample.
            targets: Unused; squared error has a constant Hessian.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k).
        """
        return block * (2.0 / block.shape[1])

    def factor_transpose(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """√(2/O) X.

        Args:
            outputs: Predictions, shape (m, ...), O numbers a sample.
            targets: Unused; squared error has a constant Hessian.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k).
        """
        return block * math.sqrt(2.0 / block.shape[1])

    def constant_level(self, outputs: Tensor, targets: Tensor) -> float:
        """Variance of the targets, averaged over output dimensions.

        Args:
            outputs: Unused.
            targets: Targets of the whole set, shape (n, ...).

        Returns:
            The variance (division by n), in squared target units.
        """
        return float(targets.double().reshape(targets.shape[0], -1).var(0, unbiased=False).mean())

    def check_targets(self, outputs: Tensor, targets: Tensor, *, name: str) -> None:
        """Targets must be real numbers, as many per sample as the model has outputs.

        Args:
            outputs: Predictions of at least one sample.
            targets: Targets of the whole set.
            name: The set's name, for the message.

        Raises:
            TypeError: If the targets are not floating point.
            ValueError: If their shape does not fit the outputs.
        """
        if not targets.is_floating_point():
            raise TypeError(
                f"targets of `{name}` must be floating point for loss='mse'; got {targets.dtype}. Use targets.float()."
            )
        if targets[0].numel() != outputs[0].numel():
            raise ValueError(
                f"targets of `{name}` must have {outputs[0].numel()} numbers a sample, as the model's outputs have; got "
                f"shape {tuple(targets.shape)} for outputs {tuple(outputs.shape)}."
            )


class CustomLoss(Loss):
    """A caller's own per-sample loss, differentiated automatically; in single precision where it holds tensors of that.

    Its output Hessian is found sample by sample and its negative eigenvalues are dropped, as generalised Gauss-Newton
    curvature needs a convex loss in the outputs. Cost O(m·O³), so meant for few outputs a sample.
    """

    def __init__(self, function: PerSampleLoss) -> None:
        self.function = function
        name = getattr(function, "__name__", type(function).__name__)
        self.name = f"custom {name}" if name in NAMED else name  # the caller's own is not the library's

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The caller's loss of every sample.

        Args:
            outputs: Network outputs, shape (m, ...).
            targets: Targets of the same m samples.

        Returns:
            Losses, shape (m,).

        Raises:
            TypeError: If the callable does not return a tensor.
            ValueError: If it does not return one loss a sample.
        """
        losses = self._called(outputs, targets)
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"`loss` must return a tensor of per-sample losses; {self.name!r} returned {type(losses).__name__}."
            )
        if losses.shape != outputs.shape[:1]:
            raise ValueError(
                f"`loss` must return one loss per sample, shape ({outputs.shape[0]},); {self.name!r} returned shape "
                f"{tuple(losses.shape)}. Use reduction='none' and average over everything but the first axis."
            )
        return losses

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the summed losses in the outputs.

        Args:
            outputs: Network outputs, shape (m, ...).
            targets: Targets of the same m samples.

        Returns:
            Tensor of the outputs' shape.
        """
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.per_sample(leaf, targets).sum(), leaf)
        return gradient

    def hessian_apply(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """Λ X with Λ's negative part dropped.

        Args:
            outputs: Network outputs, shape (m, ...), O numbers a sample.
            targets: Targets of the same m samples.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k).
        """
        factor = self._factor(outputs, targets)
        return factor @ (factor.transpose(1, 2) @ block)

    def factor_transpose(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """L^T X with L from the eigendecomposition of Λ.

        Args:
            outputs: Network outputs, shape (m, ...), O numbers a sample.
            targets: Targets of the same m samples.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k).
        """
        return self._factor(outputs, targets).transpose(1, 2) @ block

    def check_targets(self, outputs: Tensor, targets: Tensor, *, name: str) -> None:
        """The loss must take these outputs and targets, and outputs beyond those seen, as a linearised network gives them.

        Args:
            outputs: Outputs of at least one sample.
            targets: Targets of the whole set.
            name: The set's name, for the message.

        Raises:
            TypeError: If the callable fails on the outputs.
            ValueError: If it refuses outputs a little beyond.
        """
        if outputs.dim() < 2:
            return  # the problem says what is wrong with that
        some = targets[: outputs.shape[0]]
        try:
            found = self._called(outputs, some)
        except Exception as error:  # whatever a caller's function may raise
            if is_out_of_memory(error):
                raise
            raise TypeError(
                f"`loss` must take (outputs, targets) and give losses of shape (m,); {self.name!r} fails on outputs "
                f"{tuple(outputs.shape)} and targets {tuple(some.shape)} {some.dtype} of `{name}` with "
                f"{type(error).__name__}: {error}."
            ) from error
        if not isinstance(found, Tensor):
            return  # `per_sample` says so
        for beyond in (-1, 1):
            there = outputs + beyond * (1 + outputs.abs()).where(outputs.isfinite(), 0)
            cause: Exception | None = None
            said = "it is not a number"
            try:
                bad = bool(self._called(there, some).isnan().any())
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                bad, cause, said = True, error, str(error)
            if bad:
                raise ValueError(
                    f"`loss` must be defined for all outputs, as a linearised network's may be any; {self.name!r} is not "
                    f"for some beyond those of the model ({said}). Let the model return raw outputs, and use a loss of "
                    "logits or of logarithms: binary_cross_entropy_with_logits in place of binary_cross_entropy."
                ) from cause

    def constant_level(self, outputs: Tensor, targets: Tensor) -> float:
        """Mean loss of the best constant output, found by Newton's method.

        Args:
            outputs: Outputs of at least one sample; the search starts at their mean, where the loss is defined.
            targets: Targets of the whole set.

        Returns:
            The smallest mean loss reached.

        Raises:
            RuntimeError: If the loss fails on a constant output.
            ValueError: If the search leaves the numbers or falls without end, or the loss has no second derivative.
        """
        data = targets.double() if targets.is_floating_point() else targets
        shape = outputs.shape[1:]

        def mean_loss(constant: Tensor) -> Tensor:
            return self.per_sample(constant.reshape(1, *shape).expand(data.shape[0], *shape), data).mean()

        first = outputs.detach().double().mean(0).reshape(-1)
        start = float(mean_loss(first))
        try:
            level = _minimum(mean_loss, first)
        except RuntimeError as error:  # a NotImplementedError is one
            if "derivative for" not in str(error):
                raise
            raise ValueError(
                f"`loss` must be differentiable twice; got {self.name!r}, of which PyTorch has no second derivative "
                f"({error}). Write it with operations that have one."
            ) from error
        if not math.isfinite(level) or level < start - UNBOUNDED * (1 + abs(start)):
            raise ValueError(
                f"`loss` must have a smallest mean over constant outputs, as divergence is measured against it; that of "
                f"{self.name!r} fell from {start:.4g} to {level:.4g}. Use a loss of raw outputs; where the "
                "model returns log-probabilities, loss='cross_entropy' gives the same numbers."
            )
        return level

    def _called(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The caller's function, in single precision where double does not go with tensors of its own."""
        try:
            return self.function(outputs, targets)
        except RuntimeError as error:
            if outputs.dtype != torch.float64 or is_out_of_memory(error):
                raise
            plain = targets.float() if targets.is_floating_point() else targets
            return self.function(outputs.float(), plain).double()

    def _factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """L of shape (m, O, O) with LL^T the positive part of every Λ_i."""
        flat = outputs.detach().reshape(outputs.shape[0], -1)
        shape = outputs.shape[1:]

        def single(row: Tensor, target: Tensor) -> Tensor:
            return self._called(row.reshape(1, *shape), target.unsqueeze(0))[0]

        try:
            hessian = torch.func.vmap(torch.func.hessian(single))(flat, targets)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Control flow that depends on values: sample by sample.
            with torch.enable_grad():
                found = [
                    torch.autograd.functional.hessian(lambda row, y=y: single(row, y), row)
                    for row, y in zip(flat, targets, strict=True)
                ]
            hessian = torch.stack(found)
        values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.transpose(1, 2)))
        return vectors * values.clamp_min(0).sqrt().unsqueeze(1)


def _minimum(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Value that Newton's method with halved steps reaches from x, shape (O,); infinite wherever it is undefined."""

    def value(at: Tensor) -> float:
        try:
            result = float(function(at))
        except (RuntimeError, ValueError):  # as PyTorch's own losses raise outside their domain
            return math.inf
        return math.inf if math.isnan(result) else result

    best = value(x)
    for _ in range(NEWTON_STEPS):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(function(leaf), leaf)
            values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(function, x))
        # |eigenvalues|, so that every step descends, also from a concave part.
        step = -vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-9))
        slope, length = float(gradient @ step), 1.0
        while (reached := value(x + length * step)) > best + 1e-4 * length * slope and length > 1e-15:
            length /= 2
        if not best - reached > 1e-14 * (1 + abs(best)):
            break
        x, best = x + length * step, reached
    return best


def resolve_loss(loss: str | PerSampleLoss | Loss) -> Loss:
    """The loss object behind a name, a callable or a loss object.

    Args:
        loss: "cross_entropy", "causal_lm", "mse", a callable (outputs, targets) -> losses of shape (m,), or a `Loss`.

    Returns:
        The loss object.

    Raises:
        TypeError: If it is neither a name nor callable.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type):
        raise TypeError(
            f"`loss` must be a callable giving per-sample losses; got the class {loss.__name__}. Pass an instance, such as "
            f"{loss.__name__}(reduction='none')."
        )
    if callable(loss):
        return CustomLoss(loss)
    if not isinstance(loss, str):
        raise TypeError(
            f"`loss` must be 'cross_entropy', 'causal_lm', 'mse' or a callable giving per-sample losses; got {loss!r}."
        )
    check_choice(loss, name="loss", owner="UnlearningProblem", choices=NAMED)
    return SquaredError() if loss == "mse" else CrossEntropy(shift=loss == "causal_lm")
