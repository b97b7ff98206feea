"""The unlearning problem, and the checks that it passes when it is made."""

from stabkit.problem.problem import Parameters, UnlearningProblem

__all__ = ["Parameters", "UnlearningProblem"]
