"""Mean squared error."""

import math

from torch import Tensor

from stabkit.losses.base import Loss


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
