"""Per-sample losses with what the theory needs of them: residuals, output Hessians and the best constant's level."""

from stabkit.losses.base import NAMED, Loss, PerSampleLoss
from stabkit.losses.cross_entropy import IGNORE_INDEX, CrossEntropy
from stabkit.losses.custom import CustomLoss
from stabkit.losses.resolve import resolve_loss
from stabkit.losses.squared import SquaredError

__all__ = [
    "IGNORE_INDEX",
    "NAMED",
    "CrossEntropy",
    "CustomLoss",
    "Loss",
    "PerSampleLoss",
    "SquaredError",
    "resolve_loss",
]
