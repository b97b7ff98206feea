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
from stabkit.curvature.jacobian import ScaledJacobian, forward_size, row_budget, rows_pay
from stabkit.curvature.lowrank import (
    LinearisedNetwork,
    LinearisedSet,
    linearise,
    ritz_residuals,
)
from stabkit.curvature.matrix_free import COPIES, columns_at_once
from stabkit.curvature.operators import (
    CurvatureOperator,
    MixedOperator,
    PreconditionedOperator,
    RestrictedOperator,
)
from stabkit.curvature.room import basis_fits, linearisation_cost, rows_kept

__all__ = [
    "COPIES",
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
    "basis_fits",
    "columns_at_once",
    "coordinates_cost",
    "curvature_gram",
    "curvature_operator",
    "forward_size",
    "linearisation_cost",
    "linearise",
    "ritz_residuals",
    "row_budget",
    "rows_kept",
    "rows_pay",
    "sample_coordinates",
]
