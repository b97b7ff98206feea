"""stabkit: will this unlearning run blow up?"""

from stabkit._errors import (
    ExponentWarning,
    LowConfidenceWarning,
    StabkitWarning,
    TrainModeWarning,
    UntrainedModelWarning,
)

__version__ = "0.1.0"

__all__ = [
    "ExponentWarning",
    "LowConfidenceWarning",
    "StabkitWarning",
    "TrainModeWarning",
    "UntrainedModelWarning",
    "__version__",
]
