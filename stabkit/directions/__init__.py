"""Directions that unlearn, the inverses they are made with, and what an update costs the retained data (theory §8).

`cg`, `diagonals` and `kronecker` invert damped curvature, `retain_inverse` chooses among them for a problem. `remain` has
the two steepest directions, `preconditioner` the matrix P that makes one of them a step of the form T1, `saliency` its 0/1
stand-in, and `update` takes a finished update apart.
"""

from stabkit.curvature.gradients import mean_gradient
from stabkit.directions.cg import DampedSolution, SolveOutcome, damped_inverse
from stabkit.directions.diagonals import DiagonalEstimate, diagonal_inverse, fisher_diagonal, hutchinson_diagonal
from stabkit.directions.kronecker import KroneckerInverse, kronecker_inverse
from stabkit.directions.preconditioner import LowRank, RemainOperator, RemainPreconditioner, remain_preconditioner
from stabkit.directions.remain import UnlearningDirections, unlearning_directions
from stabkit.directions.retain_inverse import RetainInverse
from stabkit.directions.saliency import Saliency, saliency
from stabkit.directions.update import UpdateDecomposition, UpdatePart, decompose_update

__all__ = [
    "DampedSolution",
    "DiagonalEstimate",
    "KroneckerInverse",
    "LowRank",
    "RemainOperator",
    "RemainPreconditioner",
    "RetainInverse",
    "Saliency",
    "SolveOutcome",
    "UnlearningDirections",
    "UpdateDecomposition",
    "UpdatePart",
    "damped_inverse",
    "decompose_update",
    "diagonal_inverse",
    "fisher_diagonal",
    "hutchinson_diagonal",
    "kronecker_inverse",
    "mean_gradient",
    "remain_preconditioner",
    "saliency",
    "unlearning_directions",
]
