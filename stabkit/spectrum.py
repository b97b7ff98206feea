"""Extreme eigenpairs of a curvature operator, each with its residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._validate import check_int, check_real
from stabkit.curvature.operators import CurvatureOperator


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenpairs:
    """Eigenpairs at one or both ends of a symmetric operator's spectrum, by ascending eigenvalue.

    Attributes:
        values: Ritz values, shape (k,), float64.
        vectors: Unit Ritz vectors, shape (d, k), in the operator's dtype and on its device.
        residuals: ‖Av - λv‖ of every pair, shape (k,); a true eigenvalue lies within this of each value.
        converged: Whether every pair met the tolerance; otherwise these are the best there were.
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
    block: int = 2,
    basis: int | None = None,
    max_products: int = 200,
    seed: int = 0,
) -> Eigenpairs:
    """Lowest and highest eigenpairs by block Lanczos with full reorthogonalisation and thick restarts.

    Both ends come from one Krylov space, at no more than one end's cost.

    Args:
        operator: Symmetric operator of order d.
        ends: Pairs to find at each end.
        tolerance: Largest residual to accept, as a share of the largest |λ|.
        block: Vectors multiplied at once.
        basis: Vectors kept, at least 2·ends + 2·block; 20 more than that when None.
        max_products: Products after which what is there is returned, with `converged=False` unless it is good enough.
        seed: Seed of the start vectors.

    Returns:
        The pairs, with their true residuals. Cost: about 20 to 60 products, 2·ends more for the residuals, and d·basis
        multiplications with each; memory 2·d·basis numbers.

    Raises:
        ValueError: If an argument is out of its domain.
    """
    owner = "extreme_eigenpairs"
    check_int(ends, name="ends", owner=owner, low=1)
    check_int(block, name="block", owner=owner, low=1)
    check_int(max_products, name="max_products", owner=owner, low=1)
    check_real(tolerance, name="tolerance", owner=owner, low=0)
    least = 2 * ends + 2 * block
    kept = least + 20 if basis is None else check_int(basis, name="basis", owner=owner, low=least)
    d, before = operator.shape[0], operator.products
    if d <= kept:
        # Too small for Lanczos: the whole matrix costs d products.
        dense = (operator @ torch.eye(d, dtype=operator.dtype, device=operator.device)).double()
        values, vectors = torch.linalg.eigh((dense + dense.T) / 2)
        chosen = _ends(d, ends)
        return _pairs(operator, values[chosen], vectors[:, chosen], tolerance, before)

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(d, block, generator=generator, dtype=torch.float64)
    new = _orthonormal(start.to(operator.device, operator.dtype), None, generator)[0]
    v = new[:, :0]
    projected = torch.zeros(0, 0, dtype=torch.float64, device=operator.device)  # Vᵀ A V
    while True:
        image = operator @ new  # A V_j, (d, p)
        v = torch.cat([v, new], 1)
        column = v.T @ image  # (k, p)
        projected = _bordered(projected, column.double())
        new, coupling = _orthonormal(image - v @ column, v, generator)  # A V_j = V H_j + V_{j+1} B
        values, rotation = torch.linalg.eigh(projected)
        chosen = _ends(values.numel(), ends)
        # A V y - θ V y = V_{j+1} B y_last: the residual without a product.
        residuals = (coupling.double() @ rotation[-block:, chosen]).norm(dim=0)
        done = values.numel() >= 2 * ends and bool((residuals <= tolerance * values.abs().max()).all())
        if done or operator.products - before + block > max_products or v.shape[1] + block > d:
            return _pairs(operator, values[chosen], v.double() @ rotation[:, chosen], tolerance, before)
        if v.shape[1] + block > kept:
            keep = _ends(values.numel(), ends + block // 2)
            v = v @ rotation[:, keep].to(v.dtype)
            projected = torch.diag(values[keep])


def _ends(size: int, ends: int) -> list[int]:
    """The lowest and the highest places of an ascending sequence."""
    return sorted({*range(min(ends, size)), *range(max(0, size - ends), size)})


def _bordered(matrix: Tensor, column: Tensor) -> Tensor:
    """VᵀAV with the new block's column, and its transpose as row."""
    old, width = matrix.shape[0], column.shape[1]
    whole = torch.zeros(old + width, old + width, dtype=matrix.dtype, device=matrix.device)
    whole[:old, :old] = matrix
    whole[:, old:] = column
    whole[old:, :] = column.T
    whole[old:, old:] = (column[old:] + column[old:].T) / 2
    return whole


def _orthonormal(block: Tensor, basis: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal Q, also to the basis, and B with block = QB; directions that ran out are replaced by random ones."""

    def cleaned(x: Tensor) -> Tensor:
        return x if basis is None else x - basis @ (basis.T @ x)

    scale = float(block.norm())
    q, upper = torch.linalg.qr(cleaned(block))
    floor = torch.finfo(block.dtype).eps * max(scale, torch.finfo(block.dtype).tiny) * 10
    lost = upper.diagonal().abs() <= floor
    if bool(lost.any()):
        fresh = torch.randn(block.shape, generator=generator, dtype=torch.float64).to(block)
        q = torch.where(lost, fresh, q)
        upper = torch.where(lost.unsqueeze(1), torch.zeros_like(upper), upper)
    # Twice is enough: QR of nearly parallel columns, and rounding in the first projection, leave traces of the basis.
    q, again = torch.linalg.qr(cleaned(q))
    return q, torch.where(lost.unsqueeze(1), torch.zeros_like(upper), again @ upper)


def _pairs(operator: CurvatureOperator, values: Tensor, vectors: Tensor, tolerance: float, before: int) -> Eigenpairs:
    block = vectors.to(operator.dtype)
    block = block / block.norm(dim=0)
    residuals = (operator @ block - block * values.to(block.dtype)).double().norm(dim=0)
    allowed = max(tolerance, 100 * torch.finfo(operator.dtype).eps) * float(values.abs().max())
    return Eigenpairs(
        values=values.cpu(),
        vectors=block,
        residuals=residuals.cpu(),
        converged=bool((residuals <= allowed).all()),
        products=operator.products - before,
    )
