"""Curvature of the loss: matrix-free operators, Jacobian products and per-sample factors in few coordinates."""

from stabkit.curvature.factors import SampleFactors
from stabkit.curvature.jacobian import ScaledJacobian
from stabkit.curvature.lowrank import LinearisedNetwork, LinearisedSet, linearise
from stabkit.curvature.operators import (
    CurvatureOperator,
    GGNOperator,
    HessianOperator,
    MixedOperator,
    PreconditionedOperator,
    curvature_operator,
)

__all__ = [
    "CurvatureOperator",
    "GGNOperator",
    "HessianOperator",
    "LinearisedNetwork",
    "LinearisedSet",
    "MixedOperator",
    "PreconditionedOperator",
    "SampleFactors",
    "ScaledJacobian",
    "curvature_operator",
    "linearise",
]
