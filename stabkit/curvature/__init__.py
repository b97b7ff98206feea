"""Curvature of the loss: matrix-free operators, Jacobian products and per-sample factors in few coordinates."""

from stabkit.curvature.coordinates import (
    THEORY_DIRECTIONS,
    CoordinateNetwork,
    coordinates_cost,
    sample_coordinates,
)
from stabkit.curvature.data_operators import (
    DataOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    curvature_operator,
)
from stabkit.curvature.factors import SampleFactors
from stabkit.curvature.gram import Gram, curvature_gram
from stabkit.curvature.jacobian import ScaledJacobian, forward_size, rows_pay
from stabkit.curvature.lowrank import LinearisedNetwork, LinearisedSet, linearisation_cost, linearise, ritz_residuals
from stabkit.curvature.operators import (
    CurvatureOperator,
    MixedOperator,
    PreconditionedOperator,
    RestrictedOperator,
)

__all__ = [
    "THEORY_DIRECTIONS",
    "CoordinateNetwork",
    "CurvatureOperator",
    "DataOperator",
    "FisherOperator",
    "GGNOperator",
    "Gram",
    "HessianOperator",
    "LinearisedNetwork",
    "LinearisedSet",
    "MixedOperator",
    "PreconditionedOperator",
    "RestrictedOperator",
    "SampleFactors",
    "ScaledJacobian",
    "coordinates_cost",
    "curvature_gram",
    "curvature_operator",
    "forward_size",
    "linearisation_cost",
    "linearise",
    "ritz_residuals",
    "rows_pay",
    "sample_coordinates",
]
