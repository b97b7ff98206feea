"""The unlearning problem, and the checks that it passes when it is made."""

from stabkit.problem.problem import CHECK_EVERY, Parameters, UnlearningProblem

__all__ = ["CHECK_EVERY", "Parameters", "UnlearningProblem"]
