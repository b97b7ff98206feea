"""Spectra of curvature operators from products alone: extreme eigenpairs, density, trace, and the pencil of T5.

`eigen` holds the eigenpairs at the ends, `density` the whole distribution, `trace` trace and Frobenius norm, `pencil` the
generalised eigenpairs of forget against retain curvature. Every number comes with a residual or a standard error, and every
computation can keep its state in a file (`checkpoint`) and go on from there.
"""

from stabkit.spectrum.density import DensityCurve, SpectralDensity, spectral_density
from stabkit.spectrum.eigen import Eigenpairs, affordable_basis, extreme_eigenpairs
from stabkit.spectrum.estimate import Estimate
from stabkit.spectrum.outcome import SolverOutcome
from stabkit.spectrum.pencil import PencilEigenpairs, generalised_eigenpairs
from stabkit.spectrum.trace import frobenius_norm, squared_frobenius, trace

__all__ = [
    "DensityCurve",
    "Eigenpairs",
    "Estimate",
    "PencilEigenpairs",
    "SolverOutcome",
    "SpectralDensity",
    "affordable_basis",
    "extreme_eigenpairs",
    "frobenius_norm",
    "generalised_eigenpairs",
    "spectral_density",
    "squared_frobenius",
    "trace",
]
