"""stabkit: will this unlearning run blow up?"""

from stabkit._errors import (
    ExponentWarning,
    LowConfidenceWarning,
    StabkitWarning,
    TrainModeWarning,
    UntrainedModelWarning,
)

from stabkit._version import __version__

__all__ = [
    "ExponentWarning",
    "LowConfidenceWarning",
    "StabkitWarning",
    "TrainModeWarning",
    "UntrainedModelWarning",
    "__version__",
]
