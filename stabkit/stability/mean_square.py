"""Exact growth of the second moment: the spectral radius of the map of a step, or of a cycle of steps (T6, T8).

Symmetric matrices are handled as vectors of their upper triangle with off-diagonal entries times √2, so that the inner
product is Frobenius' and the self-adjoint map is a symmetric matrix there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from stabkit._validate import check_real
from stabkit.stability.bounds import eigenvector_quotients
from stabkit.stability.dynamics import LinearDynamics
from stabkit.stability.optimiser import Optimiser, Step, is_scalar, planned_steps
from stabkit.stability.pair import Pair, step_pair

DENSE_RANK = 12  # up to here all r(r+1)/2 images are computed at once
DENSE_SIZE = 100  # the same, of numbers in a state with momentum or of a cycle
_ROOT_TWO = math.sqrt(2)

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanSquare:
    """How the second moment grows (T6, T8).

    Attributes:
        radius: ρ: the factor by which E‖δ‖² grows a cycle, in the end; at most 1 is stable.
        cycle: Steps in a cycle; 1 where all steps are alike.
        eigenmatrix: The second moment of δ that grows so, shape (r, r), positive semi-definite with trace 1.
        residual: ‖T(Σ) - ρΣ‖_F for it, divided by its Frobenius norm; with momentum of the state (δ, ηv).
    """

    radius: float
    cycle: int
    eigenmatrix: Tensor
    residual: float

    @property
    def radius_a_step(self) -> float:
        """The factor a step, on average over the cycle."""
        return self.radius ** (1 / self.cycle)

    def growth(self, steps: int) -> float:
        """K·ln ρ: logarithm of the growth of E‖δ‖² over a horizon (T8).

        Args:
            steps: Number K of steps.

        Returns:
            The logarithm; minus infinity if ρ is zero.
        """
        return steps / self.cycle * math.log(self.radius) if self.radius > 0 else -math.inf


def mean_square(
    dynamics: LinearDynamics,
    lr: float | Sequence[float],
    *,
    mix: float | Sequence[float] | None = None,
    optimiser: Optimiser | None = None,
    tolerance: float = 1e-5,
) -> MeanSquare:
    """ρ, the spectral radius of the second-moment map of a step, or of a cycle of steps that repeats (T6).

    Args:
        dynamics: The linearised process.
        lr: Step size η > 0, or that of every step of a cycle, such as `stabkit.schedules.alternating` gives for one.
        mix: α, or that of every step of the cycle; the dynamics' own when None.
        optimiser: Momentum and the place of weight decay; plain steps when None.
        tolerance: Residual at which to stop, relative to ρ. A plain step's map is self-adjoint, which makes ρ at least as
            exact, and where one direction leads, far more so; with momentum or in a cycle the map is not.

    Returns:
        Radius and eigenmatrix. Cost: some 20 applications of the map where one direction leads; many flat directions, all
        with growth near 1, take hundreds.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or the step sizes and mixes of a cycle differ in number.
    """
    check_real(tolerance, name="tolerance", owner="mean_square", low=0, low_open=True)
    cycle = max((len(value) for value in (lr, mix) if not is_scalar(value)), default=1)  # type: ignore[arg-type]
    if cycle == 0:
        raise ValueError("`lr` and `mix` of `mean_square` must hold at least one step's value; got none.")
    plan = list(planned_steps(dynamics, lr, mix, cycle, owner="mean_square"))
    how = optimiser or Optimiser()
    if cycle == 1 and how.momentum == 0:
        step = plan[0]
        return mean_square_from(step.dynamics, step.lr, tolerance, start_matrix(step.dynamics, step.lr))
    return _of_cycle(plan, how, tolerance)


def _of_cycle(plan: list[Step], how: Optimiser, tolerance: float) -> MeanSquare:
    """Spectral radius of a composed map, by Arnoldi from a positive definite start, which overlaps any semi-definite one."""
    dynamics = plan[0].dynamics
    rank, like = dynamics.rank, dynamics.mean_gradient()
    scale = max(step.lr for step in plan) or 1.0  # velocities in units of steps
    pack, unpack = _packing(rank, like)
    single = rank * (rank + 1) // 2
    momentum = how.momentum > 0

    def cycle(pair: Pair) -> Pair:
        for step in plan:
            pair = step_pair(pair, step, how, step.dynamics.noise(pair.delta))
        return pair

    def to_pair(vector: np.ndarray) -> Pair:
        if not momentum:
            zero = torch.zeros(rank, rank, dtype=like.dtype, device=like.device)
            return Pair(delta=unpack(vector), cross=zero, velocity=zero)
        cross = torch.as_tensor(vector[single : single + rank * rank].reshape(rank, rank)).to(like)
        velocity = unpack(vector[single + rank * rank :])
        return Pair(delta=unpack(vector[:single]), cross=cross / scale, velocity=velocity / scale**2)

    def to_vector(pair: Pair) -> np.ndarray:
        if not momentum:
            return pack(pair.delta)
        cross = (scale * pair.cross).double().cpu().numpy().ravel()
        return np.concatenate([pack(pair.delta), cross, pack(scale**2 * pair.velocity)])

    def image(vector: np.ndarray) -> np.ndarray:
        return to_vector(cycle(to_pair(vector.ravel())))

    eye = torch.eye(rank, dtype=like.dtype, device=like.device)
    start = to_vector(Pair(delta=eye, cross=torch.zeros_like(eye), velocity=eye / scale**2))
    if start.size <= DENSE_SIZE:
        matrix = np.stack([image(e) for e in np.eye(start.size)], axis=1)
        values, vectors = np.linalg.eig(matrix)
    else:
        linear = scipy.sparse.linalg.LinearOperator((start.size,) * 2, matvec=image, dtype=np.float64)
        values, vectors = scipy.sparse.linalg.eigs(linear, k=1, which="LM", v0=start, tol=tolerance)
    # The map keeps a cone, so ρ itself is an eigenvalue; of several as large the real positive one has the cone's vector.
    radius = float(np.abs(values).max())
    near = np.flatnonzero(np.abs(values) >= radius * (1 - 1e-9))
    vector = vectors[:, near[np.argmax(values.real[near])]]
    turned = vector * np.exp(-1j * np.angle(vector[np.abs(vector).argmax()]))
    vector = np.ascontiguousarray(turned.real)
    delta = unpack(vector[:single])
    sign = 1.0 if float(delta.trace()) >= 0 else -1.0
    residual = float(np.linalg.norm(image(vector) - radius * vector) / np.linalg.norm(vector))
    lambdas, basis = torch.linalg.eigh(sign * delta)
    delta = (basis * lambdas.clamp(min=0)) @ basis.T
    trace = float(delta.trace())
    return MeanSquare(
        radius=radius, cycle=len(plan), eigenmatrix=delta / trace if trace > 0 else eye / rank, residual=residual
    )


def start_matrix(dynamics: LinearDynamics, lr: float) -> Tensor:
    """The best Rayleigh quotient's vvᵀ, and some identity, which every positive semi-definite eigenmatrix overlaps.

    Args:
        dynamics: The linearised process.
        lr: Step size η.

    Returns:
        Symmetric matrix of shape (r, r).
    """
    quotients, vectors = eigenvector_quotients(dynamics, lr)
    v = vectors[:, int(quotients.argmax())]
    return torch.outer(v, v) + torch.eye(dynamics.rank, dtype=v.dtype, device=v.device) / (10 * dynamics.rank)


def mean_square_from(dynamics: LinearDynamics, lr: float, tolerance: float, start: Tensor) -> MeanSquare:
    """ρ(T_η) of a plain step, from a given start.

    Args:
        dynamics: The linearised process.
        lr: Step size η.
        tolerance: Residual at which to stop, relative to ρ.
        start: Symmetric matrix of shape (r, r).

    Returns:
        Radius and eigenmatrix.
    """
    radius, sigma = largest_eigenpair(lambda s: dynamics.apply(s, lr), start, tolerance)
    # Where ρ is repeated an eigenmatrix need not be semi-definite, but its positive part is one too: T_η keeps semi-definite
    # matrices so, hence |Σ| has no smaller Rayleigh quotient than Σ.
    values, vectors = torch.linalg.eigh(sigma if float(sigma.trace()) >= 0 else -sigma)
    sigma = (vectors * values.clamp(min=0)) @ vectors.T
    sigma = sigma / sigma.trace()
    residual = float((dynamics.apply(sigma, lr) - radius * sigma).norm() / sigma.norm())
    return MeanSquare(radius=radius, cycle=1, eigenmatrix=sigma, residual=residual)


def _packing(size: int, like: Tensor) -> tuple[Callable[[Tensor], np.ndarray], Callable[[np.ndarray], Tensor]]:
    """Symmetric matrix to vector of its upper triangle, with Frobenius' inner product, and back."""
    rows, columns = np.triu_indices(size)
    weight = np.where(rows == columns, 1.0, _ROOT_TWO)

    def unpack(vector: np.ndarray) -> Tensor:
        matrix = np.zeros((size, size))
        matrix[rows, columns] = vector / weight
        matrix[columns, rows] = matrix[rows, columns]
        return torch.as_tensor(matrix).to(like)

    def pack(matrix: Tensor) -> np.ndarray:
        values = ((matrix + matrix.T) / 2).double().cpu().numpy()
        return np.asarray(values[rows, columns] * weight)

    return pack, unpack


def largest_eigenpair(operator: Map, start: Tensor, tolerance: float) -> tuple[float, Tensor]:
    """Largest eigenvalue and unit eigenmatrix of a self-adjoint map on symmetric matrices.

    Args:
        operator: The map.
        start: Symmetric matrix of shape (r, r) to start from.
        tolerance: Residual at which to stop, relative to the eigenvalue.

    Returns:
        The eigenvalue and its eigenmatrix.
    """
    size = start.shape[0]
    pack, unpack = _packing(size, start)
    count = size * (size + 1) // 2
    if size <= DENSE_RANK:
        images = np.stack([pack(operator(unpack(e))) for e in np.eye(count)], axis=1)
        values, vectors = np.linalg.eigh((images + images.T) / 2)
        return float(values[-1]), unpack(vectors[:, -1])
    linear = scipy.sparse.linalg.LinearOperator(
        (count, count), matvec=lambda v: pack(operator(unpack(v.ravel()))), dtype=np.float64
    )
    values, vectors = scipy.sparse.linalg.eigsh(linear, k=1, which="LA", v0=pack(start), tol=tolerance)
    return float(values[0]), unpack(vectors[:, 0])
