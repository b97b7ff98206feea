"""Softmax cross-entropy, of single labels and of sequences or maps of them."""

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stabkit._errors import ClassAxisWarning, UnlabelledWarning, caller_level
from stabkit.losses.base import Loss

IGNORE_INDEX = -100
FEW_CLASSES = 16  # of fewer, PyTorch's softmax on a CPU takes longer along the last axis than along the first


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
        picked = _along_classes(torch.log_softmax, logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return 0 - (picked * weights).sum(1)  # not -0.0

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
        residual = (_along_classes(torch.softmax, logits) * weights).scatter_add(-1, labels.unsqueeze(-1), -weights)
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
        old, new = (_along_classes(torch.log_softmax, logits) for logits in (old, new))
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
            remedy = "Use targets.long(), or loss='mse' for regression."
            if targets.dim() > 1 and targets.shape[1:] == outputs.shape[1:]:
                remedy = "Probabilities of the classes are taken by loss=nn.CrossEntropyLoss(reduction='none')."
            raise TypeError(
                f"targets of `{name}` must be integer class labels for loss={self.name!r}; got {targets.dtype}. {remedy}"
            )
        if self.shift and targets.dim() < 2:
            raise ValueError(
                f"targets of `{name}` must be token labels of shape (n, T) for loss='causal_lm'; got shape "
                f"{tuple(targets.shape)}. Use loss='cross_entropy' for one label a sample."
            )
        last, second = outputs.shape[1:-1], outputs.shape[2:]
        if outputs.dim() < 2 or targets.shape[1:] not in {last, second}:
            remedy = "The class axis of the outputs must be the last or the second one."
            if outputs.dim() == 2 and targets.shape[1:] == (1,):
                remedy = "Use targets.squeeze(1)."
            elif outputs.dim() == 2 and targets.shape[1:] == outputs.shape[1:]:
                remedy = "One-hot labels are given as targets.argmax(1)."
            elif outputs.dim() == 3 and targets.dim() == 2 and targets.shape[1] < outputs.shape[1]:
                remedy = f"Positions without a label, as those that prompt tuning adds, are labelled {IGNORE_INDEX}."
            raise ValueError(
                f"targets of `{name}` must have one label per position of the outputs; got targets of shape "
                f"{tuple(targets.shape[1:])} for outputs of shape {tuple(outputs.shape[1:])} a sample. {remedy}"
            )
        if outputs.dim() > 2 and last == second:
            warnings.warn(
                f"outputs of the model have shape {tuple(outputs.shape)} for targets {tuple(targets.shape)} of `{name}`, so "
                "that the classes may lie along the second axis or the last one; they are taken to lie along the last. If "
                "they do not, return outputs.movedim(1, -1) from the model.",
                ClassAxisWarning,
                stacklevel=caller_level(),
            )
        logits, _, _ = self._align(outputs[:1], targets[:1])
        classes = logits.shape[-1]
        bare = ~(self._shifted(targets.reshape(targets.shape[0], -1)) != IGNORE_INDEX).any(1)
        where, got = (" after the first position", "none") if self.shift else ("", f"only {IGNORE_INDEX}")
        if bool(bare.all()):
            raise ValueError(f"targets of `{name}` must hold at least one label{where}; got {got}.")
        if bool(bare.any()):
            warnings.warn(
                f"{int(bare.sum())} of the {bare.numel()} samples of `{name}` have no label{where}; each counts as a loss "
                "of 0 in the mean. Leave them out, unless your loop counts them too.",
                UnlabelledWarning,
                stacklevel=caller_level(),
            )
        used = targets[targets != IGNORE_INDEX]
        low, high = int(used.min()), int(used.max())
        if low < 0 or high >= classes:
            bad = low if low < 0 else high
            remedy = f"Relabel the classes, or use {IGNORE_INDEX} for positions to ignore."
            if classes == 1:
                remedy = (
                    "One output is no choice of classes: give the model two, or float targets of shape (n, 1) and a loss "
                    "such as torch.nn.BCEWithLogitsLoss(reduction='none')."
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
        return _along_classes(torch.softmax, logits).unsqueeze(-1), weights[:, :, None, None], x, moved

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


def _along_classes(function: Callable[[Tensor, int], Tensor], logits: Tensor) -> Tensor:
    """A softmax of logits (m, T, C) along their classes, along the axis that is quick."""
    classes = logits.shape[-1]
    if classes >= FEW_CLASSES or logits.device.type != "cpu":
        return function(logits, -1)
    return function(logits.reshape(-1, classes).T, 0).T.reshape(logits.shape)
