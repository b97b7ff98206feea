"""The warnings stabkit issues, one class per cause, so that a user can silence exactly one of them."""

import os
import sys
from types import FrameType

_PACKAGE = os.path.dirname(__file__) + os.sep


class StabkitWarning(UserWarning):
    """Base of every warning that stabkit issues."""


class TrainModeWarning(StabkitWarning):
    """The model or a layer of it was in train mode; the message says how it is treated."""


class PrecisionWarning(StabkitWarning):
    """The model's parameters are of fewer bits than what predictions and runs compute in."""


class UntrainedModelWarning(StabkitWarning):
    """The model already does no better than a constant on the retain set."""


class OverlapWarning(StabkitWarning):
    """Most forget samples seem to be in the retain set too."""


class ProbabilityWarning(StabkitWarning):
    """The model seems to return probabilities where the loss takes logits."""


class LowConfidenceWarning(StabkitWarning):
    """A number or a model was computed but should not be trusted far; the message says why."""


class TargetWarning(StabkitWarning):
    """No setting reaches the target that `tune` was given, or it was reached before the run."""


class ClassAxisWarning(StabkitWarning):
    """The classes of the outputs may lie along either of two axes; the last one is taken."""


class UnlabelledWarning(StabkitWarning):
    """Some samples have no label at all, and count as a loss of 0."""


class ScheduleWarning(StabkitWarning):
    """An optimizer is on a scheduler that the prediction was not told of."""


class BudgetWarning(StabkitWarning):
    """Even the fastest mode is estimated to cost more than the budget; it is taken all the same."""


class ExponentWarning(StabkitWarning):
    """A layer's heavy-tailed exponent is missing or not trustworthy, so its gate is neutral."""


class MemoryWarning(StabkitWarning):
    """Memory ran out and the computation goes on in smaller pieces; the message says with what."""


class FallbackWarning(StabkitWarning):
    """A faster way of computing failed on this model and a slower one is used; results are the same."""


def caller_level() -> int:
    """The `stacklevel` with which `warnings.warn`, called on the same line, points at the line that called stabkit.

    That is the caller of the outermost function of the package: PyTorch or a progress bar may stand between two of its own.

    Returns:
        Frames up to there, counted as `warnings.warn` counts them.
    """
    frame: FrameType | None = sys._getframe(1)
    level = found = 1
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            found = level + 1
        frame, level = frame.f_back, level + 1
    return found
