"""Extreme eigenpairs of a curvature operator, each with its residual.

By block Lanczos (`krylov`), or by LOBPCG (`lobpcg`) as a second opinion; a small matrix is multiplied out.
"""

from __future__ import annotations

from pathlib import Path

import torch

from stabkit._memory import free_memory
from stabkit._validate import check_choice, check_int, check_real
from stabkit.curvature.operators import CurvatureOperator
from stabkit.spectrum._common import ROUNDING, product
from stabkit.spectrum.checkpoint import OperatorCheckpoint
from stabkit.spectrum.eigenpairs import OWNER, Eigenpairs, judged, places
from stabkit.spectrum.krylov import Krylov, lanczos
from stabkit.spectrum.lobpcg import least_products, lobpcg_eigenpairs
from stabkit.spectrum.outcome import SolverOutcome

WHICH = ("both", "largest", "smallest")
METHODS = ("lanczos", "lobpcg")
SPARE_BASIS, FEWEST_SPARE = 20, 4  # vectors kept beyond the least, by default; fewer where memory is short
BASIS_SHARE = 0.5  # of what is free


def extreme_eigenpairs(
    operator: CurvatureOperator,
    *,
    ends: int = 1,
    which: str = "both",
    method: str = "lanczos",
    tolerance: float = 1e-3,
    block: int = 2,
    basis: int | None = None,
    max_products: int = 200,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 4,
) -> Eigenpairs:
    """Lowest and highest eigenpairs, matrix-free: what T4 asks of D.

    Lanczos takes both ends from one Krylov space, at little more than one end's cost; an eigenvalue repeated more than
    `block` times may be given fewer times than it occurs. LOBPCG works in float64 on the CPU with a few vectors only,
    runs once for each end, and needs more products: it is the second opinion.

    Args:
        operator: Symmetric operator of order d.
        ends: Pairs to find at each end that `which` names.
        which: "both" ends, or the "largest" or the "smallest" eigenvalues alone.
        method: "lanczos" or "lobpcg".
        tolerance: Largest residual to accept, as a share of the largest |λ|; no tighter than 100 rounding units.
        block: Vectors that Lanczos multiplies at once.
        basis: Vectors that Lanczos keeps, at least the wanted pairs + 2·block; 20 more than that when None.
            `affordable_basis` has fewer where memory is short.
        max_products: Products after which the best there is is returned; never exceeded.
        seed: Seed of the start vectors.
        progress: Whether to show a progress bar over the blocks.
        checkpoint: File that holds the Krylov state of a Lanczos run: written whole or not at all, resumed from where it
            exists, left in place at the end. A resumed run returns on the CPU bit for bit what an uninterrupted one does,
            and may have another `tolerance` or `max_products`, the latter counting all runs together; one product more
            recognises the operator. A matrix small enough to be multiplied out writes none.
        checkpoint_every: Blocks from one writing to the next; a killed run repeats at most these.

    Returns:
        The pairs with their true residuals. Cost: about 20 to 60 products for one pair at each end, one more for each
        pair's residual, and 2·d·basis multiplications with each product. Memory: d·(basis + 3·block) numbers, LOBPCG about
        10·d·ends; a checkpoint takes as much on disk.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain, the products are not finite, or the checkpoint is unreadable or of
            another operator or other settings.
    """
    check_int(ends, name="ends", owner=OWNER, low=1)
    check_choice(which, name="which", owner=OWNER, choices=WHICH)
    check_choice(method, name="method", owner=OWNER, choices=METHODS)
    check_int(block, name="block", owner=OWNER, low=1)
    check_int(checkpoint_every, name="checkpoint_every", owner=OWNER, low=1)
    check_real(tolerance, name="tolerance", owner=OWNER, low=0)
    wanted = 2 * ends if which == "both" else ends
    least = wanted + 2 * block
    kept = least + SPARE_BASIS if basis is None else check_int(basis, name="basis", owner=OWNER, low=least)
    d = operator.shape[0]
    small = kept if method == "lanczos" else max(kept, 5 * ends)  # LOBPCG is not made for fewer than 5 rows a vector
    if method == "lobpcg" and checkpoint is not None:
        raise ValueError(
            f"`checkpoint` of `{OWNER}` must be None with method 'lobpcg', whose state is SciPy's; got {checkpoint!r}. "
            "Use method 'lanczos'."
        )
    once = min(d, block + wanted if method == "lanczos" else least_products(wanted))
    check_int(
        max_products, name="max_products", owner=OWNER, low=once, remedy="One block and the residuals take as many."
    )
    accepted = max(tolerance, ROUNDING * torch.finfo(operator.dtype).eps)
    if d <= min(small, max_products):
        return _dense(operator, which, ends, accepted)
    if method == "lobpcg":
        return lobpcg_eigenpairs(operator, which, ends, accepted, max_products, seed, progress)
    store = None
    if checkpoint is not None:
        settings = {"ends": ends, "which": which, "block": block, "basis": kept, "seed": seed}
        store = OperatorCheckpoint(checkpoint, "krylov", [operator], settings, owner=OWNER)
    krylov = Krylov(operator, which=which, ends=ends, block=block, basis=kept, seed=seed)
    return lanczos(krylov, accepted, max_products, progress, store, checkpoint_every)


def affordable_basis(operator: CurvatureOperator, *, wanted: int = 2, block: int = 1) -> int:
    """Vectors for Lanczos to keep: as by default, and fewer where they would take over half of the memory that is free.

    Args:
        operator: Symmetric operator of order d.
        wanted: Pairs to find, at both ends together.
        block: Vectors that are multiplied at once.

    Returns:
        The basis. A smaller one takes more products. It depends on the machine: ranks that compute together, and runs that
        are to be resumed, agree on one themselves.
    """
    least = wanted + 2 * block
    room = int(BASIS_SHARE * free_memory(operator.device) / (max(1, operator.shape[0]) * operator.dtype.itemsize))
    return least + min(SPARE_BASIS, max(FEWEST_SPARE, room - least - 3 * block))


def _dense(operator: CurvatureOperator, which: str, ends: int, tolerance: float) -> Eigenpairs:
    """A matrix too small for Lanczos, multiplied out: d products are exact, and give the residuals too."""
    d = operator.shape[0]
    matrix = product(operator, torch.eye(d, dtype=operator.dtype, device=operator.device), owner=OWNER).double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    vectors = vectors[:, places(d, ends, which)]
    image = matrix @ vectors
    return judged(
        vectors.to(operator.dtype),
        values=(vectors * image).sum(0),
        residuals=(image - vectors * (vectors * image).sum(0)).norm(dim=0),
        scale=float(values.abs().max()),
        tolerance=tolerance,
        outcome=SolverOutcome.CONVERGED,
        products=d,
    )
