"""Exact growth of the second moment: the largest eigenvalue of T_η, and the step sizes that keep it in bounds (T6-T8).

Symmetric matrices are handled as vectors of their upper triangle with off-diagonal entries times √2, so that the inner
product is Frobenius' and the self-adjoint map is a symmetric matrix there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from stabkit._validate import check_int, check_real
from stabkit.stability.bounds import eigenvector_quotients
from stabkit.stability.dynamics import LinearDynamics

DENSE_RANK = 12  # up to here all r(r+1)/2 images are computed at once
ROUNDING = 1e-10  # what counts as zero beside D's largest eigenvalue
_ROOT_TWO = math.sqrt(2)

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanSquare:
    """How the second moment grows at one step size (T6, T8).

    Attributes:
        lr: The step size η.
        radius: ρ(T_η): the factor by which E‖δ‖² grows a step, in the end; at most 1 is stable.
        eigenmatrix: The second moment that grows so, shape (r, r), positive semi-definite with trace 1.
        residual: ‖T_η(Σ) - ρΣ‖_F for it, divided by its Frobenius norm.
    """

    lr: float
    radius: float
    eigenmatrix: Tensor
    residual: float

    def growth(self, steps: int) -> float:
        """K·ln ρ: logarithm of the growth of E‖δ‖² over a horizon (T8).

        Args:
            steps: Number K of steps.

        Returns:
            The logarithm; minus infinity if ρ is zero.
        """
        return steps * math.log(self.radius) if self.radius > 0 else -math.inf


def mean_square(dynamics: LinearDynamics, lr: float, *, tolerance: float = 1e-5) -> MeanSquare:
    """ρ(T_η), the spectral radius of the second-moment map (T6).

    Args:
        dynamics: The linearised process.
        lr: Step size η > 0.
        tolerance: Residual at which to stop, relative to ρ; ρ is at least as exact, and where one direction leads, far
            more so.

    Returns:
        Radius and eigenmatrix. Cost: some 20 applications of T_η where one direction leads; many flat directions, all with
        growth near 1, take hundreds.

    Raises:
        ValueError: If the step size is not positive.
    """
    check_real(lr, name="lr", owner="mean_square", low=0, low_open=True)
    return _mean_square(dynamics, lr, tolerance, _start(dynamics, lr))


def critical_lr_mean_square(dynamics: LinearDynamics, *, tolerance: float = 1e-6) -> float:
    """The largest step size that is stable in mean square: η* = 2/λ_max(C†E) (T7).

    Args:
        dynamics: The linearised process.
        tolerance: Relative accuracy.

    Returns:
        η*; 0 if D has a negative eigenvalue, or if batches act where D vanishes; infinite if there is no curvature.
        Cost: some 20 to 100 applications of E.
    """
    values, basis = torch.linalg.eigh(dynamics.mean_hessian())
    scale = float(values.abs().max())
    eye = torch.eye(dynamics.rank, dtype=values.dtype, device=values.device)
    total = float(dynamics.quadratic(eye).trace())
    if total == 0:
        return math.inf
    cut = ROUNDING * scale
    flat = values <= cut
    if float(values[0]) < -cut or bool(flat.all()):
        return 0.0
    null = basis[:, flat]
    # Where C vanishes, -2C + ηE is negative semi-definite only if E vanishes too, and E(Π) = 0 says that A_k Π = 0.
    if flat.any() and float(dynamics.quadratic(null @ null.T).trace()) > ROUNDING * total:
        return 0.0
    # In D's eigenbasis C is a diagonal: (λ_a + λ_b)/2.
    kept, v = values[~flat], basis[:, ~flat]
    root = ((kept[:, None] + kept[None, :]) / 2).rsqrt()

    def scaled(sigma: Tensor) -> Tensor:
        return root * (v.T @ dynamics.quadratic(v @ (root * sigma) @ v.T) @ v)

    largest, _ = _largest(scaled, torch.diag(kept), tolerance)
    return 2 / largest


def critical_lr_within(dynamics: LinearDynamics, steps: int, growth: float, *, tolerance: float = 1e-4) -> float:
    """The largest step size whose second moment grows at most by a factor within a horizon, K·ln ρ(T_η) <= ln G (T8).

    For any symmetric U, ρ(T_η) is at least ⟨U, T_η U⟩, a parabola in η that is 1 at η = 0. Its right crossing of the allowed
    rate is an upper bound, and the eigenmatrix found there gives the next parabola: a Newton iteration from above on a
    convex function, which therefore cannot miss.

    Args:
        dynamics: The linearised process.
        steps: Horizon K >= 1.
        growth: Allowed factor G, >= 1; 1 asks for T7.
        tolerance: Relative accuracy of the step size.

    Returns:
        The step size; 0 if none, infinite if every one will do. Cost: some 4 to 10 times that of `mean_square`.

    Raises:
        ValueError: If the horizon or the growth is below 1.
    """
    check_int(steps, name="steps", owner="critical_lr_within", low=1)
    check_real(growth, name="growth", owner="critical_lr_within", low=1)
    if growth == 1:  # directions without curvature then hold ρ at 1, and the parabola through them says nothing
        return critical_lr_mean_square(dynamics)
    excess = math.expm1(math.log(growth) / steps)
    d = dynamics.mean_hessian()

    def crossing(u: Tensor) -> float:
        slope = float((u * (d @ u)).sum())  # ⟨U, C U⟩ for a unit U
        bend = float((u * dynamics.quadratic(u)).sum())
        if bend <= 0:
            return math.inf
        return max(0.0, (slope + math.sqrt(max(0.0, slope**2 + bend * excess))) / bend)

    start = torch.eye(dynamics.rank, dtype=d.dtype, device=d.device) / math.sqrt(dynamics.rank)
    lr = crossing(start)
    sigma = _start(dynamics, lr) if 0 < lr < math.inf else start
    while 0 < lr < math.inf:
        found = _mean_square(dynamics, lr, 1e-2 * tolerance, sigma)
        sigma = found.eigenmatrix
        lower = crossing(sigma / sigma.norm())
        if lower >= lr * (1 - tolerance):
            return min(lower, lr)
        lr = lower
    return lr


def _start(dynamics: LinearDynamics, lr: float) -> Tensor:
    """The best Rayleigh quotient's vvᵀ, and some identity, which every positive semi-definite eigenmatrix overlaps."""
    quotients, vectors = eigenvector_quotients(dynamics, lr)
    v = vectors[:, int(quotients.argmax())]
    return torch.outer(v, v) + torch.eye(dynamics.rank, dtype=v.dtype, device=v.device) / (10 * dynamics.rank)


def _mean_square(dynamics: LinearDynamics, lr: float, tolerance: float, start: Tensor) -> MeanSquare:
    radius, sigma = _largest(lambda s: dynamics.apply(s, lr), start, tolerance)
    # Where ρ is repeated an eigenmatrix need not be semi-definite, but its positive part is one too: T_η keeps semi-definite
    # matrices so, hence |Σ| has no smaller Rayleigh quotient than Σ.
    values, vectors = torch.linalg.eigh(sigma if float(sigma.trace()) >= 0 else -sigma)
    sigma = (vectors * values.clamp(min=0)) @ vectors.T
    sigma = sigma / sigma.trace()
    residual = float((dynamics.apply(sigma, lr) - radius * sigma).norm() / sigma.norm())
    return MeanSquare(lr=lr, radius=radius, eigenmatrix=sigma, residual=residual)


def _largest(operator: Map, start: Tensor, tolerance: float) -> tuple[float, Tensor]:
    """Largest eigenvalue and unit eigenmatrix of a self-adjoint map on symmetric matrices, from a start matrix."""
    size = start.shape[0]
    rows, columns = np.triu_indices(size)
    weight = np.where(rows == columns, 1.0, _ROOT_TWO)

    def unpack(vector: np.ndarray) -> Tensor:
        matrix = np.zeros((size, size))
        matrix[rows, columns] = vector / weight
        matrix[columns, rows] = matrix[rows, columns]
        return torch.as_tensor(matrix).to(start)

    def pack(matrix: Tensor) -> np.ndarray:
        values = ((matrix + matrix.T) / 2).double().cpu().numpy()
        return values[rows, columns] * weight

    count = rows.size
    if size <= DENSE_RANK:
        images = np.stack([pack(operator(unpack(e))) for e in np.eye(count)], axis=1)
        values, vectors = np.linalg.eigh((images + images.T) / 2)
        return float(values[-1]), unpack(vectors[:, -1])
    linear = scipy.sparse.linalg.LinearOperator(
        (count, count), matvec=lambda v: pack(operator(unpack(v.ravel()))), dtype=np.float64
    )
    values, vectors = scipy.sparse.linalg.eigsh(linear, k=1, which="LA", v0=pack(start), tol=tolerance)
    return float(values[0]), unpack(vectors[:, 0])
