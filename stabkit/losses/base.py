"""What every loss can do: per-sample values, their derivatives in the outputs, and the best constant's level.

Outputs are the network's raw outputs f of shape (m, ...) and the loss is one number per sample. With O output numbers
a sample, s_i = dl_i/df_i has O entries and Λ_i = d²l_i/df_i² is O x O; both are applied without being formed wherever a
closed form exists (theory §5).
"""

import abc
from collections.abc import Callable

from torch import Tensor

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]

NAMED = ("cross_entropy", "causal_lm", "mse")  # losses that have a name of their own


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
