"""Linear stability of an unlearning run: what its first and second moment do near the trained parameters.

`dynamics` holds the two-set process and its second-moment map, `mean` what the mean process needs, `mean_square` the exact
growth of the second moment, `bounds` the cheap sufficient conditions for divergence that are reported beside it, `moments`
the expected course of a run with its drift, and `linear_process` sampled courses.
"""

from stabkit.stability.bounds import RuleVerdict, coherence_rule, rayleigh_bounds, self_loop
from stabkit.stability.dynamics import LinearDynamics
from stabkit.stability.linear_process import LinearProcess, LyapunovExponent, lyapunov_exponent, simulate
from stabkit.stability.mean import CriticalMix, MeanStability, critical_mix, mean_growth, mean_stability, step_limit
from stabkit.stability.mean_square import MeanSquare, critical_lr_mean_square, critical_lr_within, mean_square
from stabkit.stability.moments import Moments, moments

__all__ = [
    "CriticalMix",
    "LinearDynamics",
    "LinearProcess",
    "LyapunovExponent",
    "MeanSquare",
    "MeanStability",
    "Moments",
    "RuleVerdict",
    "coherence_rule",
    "critical_lr_mean_square",
    "critical_lr_within",
    "critical_mix",
    "lyapunov_exponent",
    "mean_growth",
    "mean_square",
    "mean_stability",
    "moments",
    "rayleigh_bounds",
    "self_loop",
    "simulate",
    "step_limit",
]
