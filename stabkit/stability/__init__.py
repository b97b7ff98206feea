"""Linear stability of an unlearning run: what its first and second moment do near the trained parameters.

`dynamics` holds the two-set process and its second-moment map, `mean` what the mean process needs, `mean_square` the exact
growth of the second moment, `bounds` the cheap sufficient conditions for divergence that are reported beside it.
"""

from stabkit.stability.bounds import RuleVerdict, coherence_rule, rayleigh_bounds, self_loop
from stabkit.stability.dynamics import LinearDynamics
from stabkit.stability.mean import CriticalMix, MeanStability, critical_mix, mean_stability
from stabkit.stability.mean_square import MeanSquare, critical_lr_mean_square, critical_lr_within, mean_square

__all__ = [
    "CriticalMix",
    "LinearDynamics",
    "MeanSquare",
    "MeanStability",
    "RuleVerdict",
    "coherence_rule",
    "critical_lr_mean_square",
    "critical_lr_within",
    "critical_mix",
    "mean_square",
    "mean_stability",
    "rayleigh_bounds",
    "self_loop",
]
