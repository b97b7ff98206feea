"""Extreme eigenpairs of a curvature operator, each with its residual."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh
from torch import Tensor

from stabkit._validate import check_int, check_real
from stabkit.curvature.operators import CurvatureOperator


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenpairs:
    """Eigenpairs at one or both ends of a symmetric operator's spectrum, by ascending eigenvalue.

    Attributes:
        values: Ritz values, shape (k,), float64.
        vectors: Unit Ritz vectors, shape (d, k), float64.
        residuals: ‖Av - λv‖ of every pair, shape (k,); a true eigenvalue lies within this of each value.
        converged: Whether every pair asked for met the tolerance; otherwise these are the ones that did, or the best.
        products: Matrix-vector products spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    products: int

    @property
    def smallest(self) -> float:
        """The smallest of the values."""
        return float(self.values[0])

    @property
    def largest(self) -> float:
        """The largest of the values."""
        return float(self.values[-1])


def extreme_eigenpairs(
    operator: CurvatureOperator,
    *,
    ends: int = 1,
    tolerance: float = 1e-3,
    max_restarts: int = 20,
    seed: int = 0,
) -> Eigenpairs:
    """Lowest and highest eigenpairs by SciPy's implicitly restarted Lanczos (ARPACK, `eigsh` with which="BE").

    Args:
        operator: Symmetric operator of order d.
        ends: Pairs to find at each end.
        tolerance: Relative accuracy of the eigenvalues asked of ARPACK.
        max_restarts: Restarts after which what is there is returned with `converged=False`.
        seed: Seed of the start vector.

    Returns:
        The pairs, with their true residuals. Cost: about 20 to 100 products, one more block for the residuals; memory
        about 20·d numbers.
    """
    check_int(ends, name="ends", owner="extreme_eigenpairs", low=1)
    check_real(tolerance, name="tolerance", owner="extreme_eigenpairs", low=0)
    check_int(max_restarts, name="max_restarts", owner="extreme_eigenpairs", low=1)
    d = operator.shape[0]
    before = operator.products
    start = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if d <= 4 * ends + 4:
        # Too small for Lanczos: the whole matrix costs d products.
        dense = (operator @ torch.eye(d, dtype=operator.dtype, device=operator.device)).double().cpu()
        all_values, all_vectors = torch.linalg.eigh((dense + dense.T) / 2)
        chosen = sorted({*range(min(ends, d)), *range(max(0, d - ends), d)})
        return _pairs(
            operator, all_values[chosen].numpy(), all_vectors[:, chosen].numpy(), converged=True, before=before
        )
    matrix = operator.to_scipy()
    size = min(d, max(4 * ends + 12, 20))
    if not np.any(matrix @ start.numpy()):
        # ARPACK refuses the zero matrix; any vector is then an eigenvector.
        vectors = np.linalg.qr(start.numpy().reshape(-1, 1))[0]
        return _pairs(operator, np.zeros(1), vectors, converged=True, before=before)
    try:
        values, vectors = eigsh(
            matrix, k=2 * ends, which="BE", v0=start.numpy(), tol=tolerance, ncv=size, maxiter=max_restarts
        )
        converged = True
    except ArpackNoConvergence as stopped:
        values, vectors, converged = stopped.eigenvalues, stopped.eigenvectors, False
    except ArpackError:
        values, vectors, converged = np.empty(0), np.empty((d, 0)), False
    if values.size == 0:
        # Nothing converged: the Rayleigh quotient of a few power steps is a value with an honest residual.
        vector = start.numpy() / np.linalg.norm(start.numpy())
        for _ in range(10):
            vector = matrix @ vector
            vector /= np.linalg.norm(vector)
        values, vectors = np.array([vector @ (matrix @ vector)]), vector[:, None]
    order = np.argsort(values)
    return _pairs(operator, values[order], vectors[:, order], converged=converged, before=before)


def _pairs(
    operator: CurvatureOperator, values: np.ndarray, vectors: np.ndarray, *, converged: bool, before: int
) -> Eigenpairs:
    block = torch.from_numpy(np.ascontiguousarray(vectors))
    lam = torch.from_numpy(np.ascontiguousarray(values)).double()
    image = (operator @ block.to(operator.device, operator.dtype)).double().cpu()
    return Eigenpairs(
        values=lam,
        vectors=block,
        residuals=(image - block * lam).norm(dim=0),
        converged=converged,
        products=operator.products - before,
    )
