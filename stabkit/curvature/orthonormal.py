"""Orthonormal columns of tall matrices, and those that a block adds to a basis, with rounding told from content."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that are factorised at once. On a CPU as many as its caches hold are quicker than all, and more accurate in
# float32; an accelerator wants larger ones.
BLOCK, ACCELERATOR_BLOCK = 2**21, 2**26
ROWS_AT_ONCE = 2**16  # rotated in float64
TALL = 8  # rows of a block to a column at least, so that the triangles are an eighth of the matrix


def tall_qr(x: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """QR of a tall matrix of any size: by blocks of rows, then of their stacked triangles (Demmel et al. 2012).

    Args:
        x: Shape (d, c).
        overwrite: Whether Q may take the place of x, which is lost then.

    Returns:
        Q of shape (d, min(d, c)) with orthonormal columns, and R of shape (min(d, c), c). Cost: 4·d·c² multiplications and
        additions, and up to 5/8 as many again where it is done by blocks; memory: Q, unless it takes the place of x, and
        some blocks.
    """
    d, c = x.shape
    most = BLOCK if x.device.type == "cpu" else ACCELERATOR_BLOCK
    count = min(d // max(1, TALL * c), -(-x.numel() // most))
    if count <= 1:
        q, upper = torch.linalg.qr(x)
        return q, upper
    blocks = list(x.tensor_split(count))
    result, triangles, place = x if overwrite else torch.empty_like(x), [], 0
    for block in blocks:
        result[place : place + len(block)], upper = torch.linalg.qr(block)
        triangles.append(upper)
        place += len(block)
    q, upper = torch.linalg.qr(torch.cat(triangles))
    for block, rotation in zip(result.tensor_split(len(blocks)), q.split(c), strict=True):
        block.copy_(block @ rotation)
    return result, upper


def orthonormal(
    block: Tensor, basis: Tensor, *, width: int, floor: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Orthonormal directions that the block adds to a basis, strongest first, filled up with random ones.

    Args:
        block: W, shape (d, p).
        basis: Orthonormal columns, shape (d, k), with k + width <= d.
        width: Directions wanted.
        floor: Singular values of W's new part up to this count as rounding.
        generator: Of the random directions that replace those.

    Returns:
        Q, shape (d, width), orthonormal and orthogonal to the basis, and QᵀW, shape (width, p), float64 on the CPU.
    """
    block = _cleaned(block, basis)
    q, upper = tall_qr(block)
    left, strengths, _ = torch.linalg.svd(upper.double())
    q = q @ left.to(q.dtype)
    own = min(width, int((strengths > floor).sum()))
    fresh = torch.randn(block.shape[0], width - own, generator=generator, dtype=torch.float64)
    q = torch.cat([q[:, :own], fresh.to(q)], 1)
    # Again: dividing a weak direction by its length has magnified what rounding left of the basis in it.
    q = tall_qr(_cleaned(q, basis), overwrite=True)[0]
    q = tall_qr(_cleaned(q, basis), overwrite=True)[0]
    return q, (q.T @ block).double().cpu()


def _cleaned(x: Tensor, basis: Tensor) -> Tensor:
    """A copy without what it has of the basis."""
    x = torch.addmm(x, basis, basis.T @ x, alpha=-1)
    return x.addmm_(basis, basis.T @ x, alpha=-1)  # twice is enough (Kahan)


def rotated(rows: Tensor, rotation: Tensor) -> Tensor:
    """Rows times a rotation in float64, of which there is never a whole copy.

    Args:
        rows: Shape (..., c).
        rotation: Shape (c, r), float64.

    Returns:
        Shape (..., r), in the rows' dtype.
    """
    result = rows.new_empty(*rows.shape[:-1], rotation.shape[1])
    for part, place in zip(
        rows.flatten(0, -2).split(ROWS_AT_ONCE), result.flatten(0, -2).split(ROWS_AT_ONCE), strict=True
    ):
        place.copy_(part.double() @ rotation)
    return result
