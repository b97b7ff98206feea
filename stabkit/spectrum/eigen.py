"""Extreme eigenpairs of a curvature operator, each with its residual.

Block Lanczos with full reorthogonalisation and thick restarts (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000), or
SciPy's LOBPCG (Knyazev, SIAM J. Sci. Comput. 23, 2001).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import Tensor

from stabkit._progress import progress_bar
from stabkit._validate import check_choice, check_int, check_real
from stabkit.curvature.operators import CurvatureOperator
from stabkit.spectrum._common import ROUNDING, Stall, gaussian, orthonormal, product
from stabkit.spectrum.checkpoint import Checkpoint
from stabkit.spectrum.outcome import SolverOutcome

OWNER = "extreme_eigenpairs"
WHICH = ("both", "largest", "smallest")
METHODS = ("lanczos", "lobpcg")
SPARE_BASIS = 20  # vectors kept beyond the least, by default
WIDENINGS = 2  # times it is doubled before the run counts as stagnated
SCALE_STEPS = 4  # power steps behind the scale LOBPCG works in
LOBPCG_OVERHEAD = 3  # block products beyond `maxiter` that SciPy makes: the first image, one iteration more, the last
NO_RESTART = 60  # of SciPy's restartControl: its restarts would cost products that are not in the budget


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenpairs:
    """Eigenpairs at one or both ends of a symmetric operator's spectrum, by ascending eigenvalue.

    Attributes:
        values: Rayleigh quotients of the vectors, shape (k,), float64.
        vectors: Unit vectors, shape (d, k), in the operator's dtype and on its device.
        residuals: ‖Av - λv‖ of every pair, recomputed, shape (k,); a true eigenvalue lies within this of each value.
        scale: The largest |λ| met, which the tolerance is a share of.
        outcome: How the run ended, with its reason and remedy.
        products: Matrix-vector products behind the pairs, those before a resumed checkpoint included.
        restarts: Times the basis was cut back to the wanted pairs.
        widened: Times the basis was doubled and given fresh directions because the residuals had stopped falling.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    scale: float
    outcome: SolverOutcome
    products: int
    restarts: int = 0
    widened: int = 0

    @property
    def converged(self) -> bool:
        """Whether every pair met the tolerance; otherwise these are the best there were."""
        return self.outcome is SolverOutcome.CONVERGED

    @property
    def reason(self) -> str:
        """Why the run ended."""
        return self.outcome.reason

    @property
    def remedy(self) -> str:
        """What to change if that is not good enough."""
        return self.outcome.remedy

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
    once = min(d, block + wanted if method == "lanczos" else SCALE_STEPS + wanted * (LOBPCG_OVERHEAD + 2))
    check_int(
        max_products, name="max_products", owner=OWNER, low=once, remedy="One block and the residuals take as many."
    )
    accepted = max(tolerance, ROUNDING * torch.finfo(operator.dtype).eps)
    if d <= min(small, max_products):
        return _dense(operator, which, ends, accepted)
    if method == "lobpcg":
        return _lobpcg(operator, which, ends, accepted, max_products, seed, progress)
    store = None
    if checkpoint is not None:
        settings = {"ends": ends, "which": which, "block": block, "basis": kept, "seed": seed}
        store = Checkpoint(checkpoint, operator, settings, owner=OWNER)
    krylov = Krylov(operator, which=which, ends=ends, block=block, basis=kept, seed=seed)
    return _lanczos(krylov, accepted, max_products, progress, store, checkpoint_every)


class Krylov:
    """A block Krylov basis V with VᵀAV, the next block, and the coupling B to it: A V = V H + Q B Eᵀ, E the last block.

    Full reorthogonalisation keeps V orthonormal to rounding; nothing of the recurrence is assumed, H is measured.
    """

    def __init__(
        self, operator: CurvatureOperator, *, which: str, ends: int, block: int, basis: int, seed: int
    ) -> None:
        self.operator = operator
        self.which, self.ends = which, ends
        self.basis = basis
        self.generator = torch.Generator().manual_seed(seed)
        d = operator.shape[0]
        self.size = 0
        self.vectors = self._room()  # V: the first `size` columns count
        start = gaussian(d, min(block, d), operator, self.generator)
        self.new = torch.linalg.qr(start).Q
        self.projected = torch.zeros(0, 0, dtype=torch.float64)  # H
        self.coupling = torch.zeros(0, 0, dtype=torch.float64)  # B
        self.image = self.new[:0]  # of the first start vector, by which the operator is known again
        self.products = self.restarts = self.widened = 0
        self.stall = Stall()

    def advance(self) -> None:
        """Multiply the new block and orthogonalise its image; one block product."""
        p, d = self.new.shape[1], self.operator.shape[0]
        v = self.vectors[:, : self.size + p]
        v[:, self.size :] = self.new
        image = product(self.operator, self.new, owner=OWNER)  # A V_j, (d, p)
        if self.products == 0:
            self.image = image[:, :1].clone()
        self.products += p
        self.size += p
        column = v.T @ image  # VᵀA V_j, (k, p)
        self.projected = _bordered(self.projected, column.double().cpu())
        scale = max(float(image.norm()), float(self.projected.abs().max()))
        self.new, self.coupling = orthonormal(
            image - v @ column,
            v,
            width=min(p, d - self.size),
            floor=10 * torch.finfo(image.dtype).eps * scale,
            generator=self.generator,
        )

    def ritz(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Wanted values, their rotations (k, wanted), the residuals that the recurrence implies, and the largest |θ|."""
        values, rotation = torch.linalg.eigh(self.projected)
        chosen = places(values.numel(), self.ends, self.which)
        # A V y - θ V y = Q B y_last: the residual without a product.
        implied = (self.coupling @ rotation[-self.coupling.shape[1] :, chosen]).norm(dim=0)
        return values[chosen], rotation[:, chosen], implied, float(values.abs().max())

    def restart(self) -> None:
        """Cut V back to the wanted Ritz vectors and their neighbours: a thick restart."""
        values, rotation = torch.linalg.eigh(self.projected)
        size, sides = values.numel(), 2 if self.which == "both" else 1
        # Half the room goes to neighbours, at both ends: dropped large eigenvalues come back and crowd the small out.
        spare = (self.basis - self.new.shape[1] - sides * self.ends) // 4
        keep = sorted({*places(size, spare, "both"), *places(size, self.ends + spare, self.which)})
        self.vectors[:, : len(keep)] = self.vectors[:, : self.size] @ rotation[:, keep].to(self.vectors)
        self.size = len(keep)
        self.projected = torch.diag(values[keep])
        self.restarts += 1

    def widen(self) -> None:
        """Double the basis and put as many fresh random directions beside the next block."""
        d, p = self.operator.shape[0], self.new.shape[1]
        known = torch.cat([self.vectors[:, : self.size], self.new], 1)
        width = min(p, d - known.shape[1])
        fresh = gaussian(d, width, self.operator, self.generator)
        added, _ = orthonormal(fresh, known, width=width, floor=0.0, generator=self.generator)
        self.new = torch.cat([self.new, added], 1)
        self.basis *= 2
        self.widened += 1
        self.stall.idle = 0
        self.vectors = self._room(self.vectors)

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as arrays."""
        counters = [self.products, self.restarts, self.widened, self.stall.idle, self.basis]
        return {
            "vectors": self.vectors[:, : self.size].cpu().numpy(),
            "new": self.new.cpu().numpy(),
            "image": self.image.cpu().numpy(),
            "projected": self.projected.numpy(),
            "coupling": self.coupling.numpy(),
            "mark": np.array(self.stall.mark),
            "counters": np.array(counters, dtype=np.int64),
            "generator": self.generator.get_state().numpy(),
        }

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a saved state."""
        vectors, self.new, self.image = (
            torch.as_tensor(state[name], dtype=self.operator.dtype, device=self.operator.device)
            for name in ("vectors", "new", "image")
        )
        self.projected = torch.as_tensor(state["projected"])
        self.coupling = torch.as_tensor(state["coupling"])
        self.products, self.restarts, self.widened, idle, self.basis = (int(c) for c in state["counters"])
        self.stall = Stall(mark=float(state["mark"]), idle=idle)
        self.generator.set_state(torch.as_tensor(state["generator"]))
        self.size = vectors.shape[1]
        self.vectors = self._room(vectors)

    def _room(self, vectors: Tensor | None = None) -> Tensor:
        """Space for a whole basis, with the vectors so far: always of one shape, as the bits of a product depend on it."""
        d = self.operator.shape[0]
        room = torch.empty(d, min(d, self.basis), dtype=self.operator.dtype, device=self.operator.device)
        if vectors is not None:
            room[:, : self.size] = vectors[:, : self.size]
        return room


def _lanczos(
    krylov: Krylov,
    tolerance: float,
    max_products: int,
    progress: bool,
    store: Checkpoint | None,
    every: int,
) -> Eigenpairs:
    """Advance until converged, out of products, or stuck."""
    operator = krylov.operator
    d = operator.shape[0]
    wanted = krylov.ends * (2 if krylov.which == "both" else 1)
    saved = store.load(krylov.new[:, :1]) if store else None
    if saved is not None:
        krylov.load(saved)
    else:
        krylov.advance()
    outcome = SolverOutcome.CONVERGED
    for blocks in progress_bar(itertools.count(1), "eigenpairs", progress):
        values, rotation, residuals, scale = krylov.ritz()
        worst = float(residuals.max())
        if values.numel() == wanted and worst <= tolerance * scale:
            break
        if krylov.products + krylov.new.shape[1] + wanted > max_products:
            outcome = SolverOutcome.BUDGET
            break
        if krylov.size + krylov.new.shape[1] > min(krylov.basis, d):
            stalled = krylov.stall.note(worst)
            if stalled and (krylov.widened == WIDENINGS or krylov.basis >= d):
                outcome = SolverOutcome.STAGNATED
                break
            krylov.restart()
            if stalled:
                krylov.widen()
        krylov.advance()
        if store and blocks % every == 0:
            store.save(krylov.state())
    if store:
        store.save(krylov.state())
    vectors = krylov.vectors[:, : krylov.size] @ rotation.to(krylov.vectors)
    return _pairs(
        operator,
        vectors,
        scale=scale,
        tolerance=tolerance,
        outcome=outcome,
        products=krylov.products,
        restarts=krylov.restarts,
        widened=krylov.widened,
    )


def _dense(operator: CurvatureOperator, which: str, ends: int, tolerance: float) -> Eigenpairs:
    """A matrix too small for Lanczos, multiplied out: d products are exact, and give the residuals too."""
    d = operator.shape[0]
    matrix = product(operator, torch.eye(d, dtype=operator.dtype, device=operator.device), owner=OWNER).double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    vectors = vectors[:, places(d, ends, which)]
    image = matrix @ vectors
    return _result(
        vectors.to(operator.dtype),
        values=(vectors * image).sum(0),
        residuals=(image - vectors * (vectors * image).sum(0)).norm(dim=0),
        scale=float(values.abs().max()),
        tolerance=tolerance,
        outcome=SolverOutcome.CONVERGED,
        products=d,
    )


def _lobpcg(
    operator: CurvatureOperator,
    which: str,
    ends: int,
    tolerance: float,
    max_products: int,
    seed: int,
    progress: bool,
) -> Eigenpairs:
    """SciPy's LOBPCG, once for each end, on the operator divided by its scale."""
    before, d = operator.products, operator.shape[0]
    generator = torch.Generator().manual_seed(seed)
    vector = gaussian(d, 1, operator, generator)
    scale = 0.0
    for _ in range(SCALE_STEPS):
        image = product(operator, vector / vector.norm(), owner=OWNER)
        scale = float(image.double().norm())
        if scale == 0:
            break
        vector = image
    unscaled = operator.to_scipy()
    sides = [side for side in ("smallest", "largest") if which in {side, "both"}]
    share = (max_products - SCALE_STEPS) // (len(sides) * ends) - 1  # block products of one end; the residuals take one
    found, exhausted = [], False
    for side in progress_bar(sides, "eigenpairs", progress):
        calls = itertools.count()

        def scaled(block: np.ndarray, calls: Iterator[int] = calls) -> np.ndarray:
            next(calls)
            return unscaled.matmat(block.reshape(d, -1)) / (scale if scale > 0 else 1.0)

        start = torch.linalg.qr(torch.randn(d, ends, generator=generator, dtype=torch.float64)).Q.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what SciPy warns of is the outcome here
            _, vectors = lobpcg(
                LinearOperator((d, d), matvec=scaled, matmat=scaled, dtype=np.float64),
                start,
                tol=tolerance / 2,  # SciPy holds a converged vector fixed, and its residual then grows a little
                maxiter=share - LOBPCG_OVERHEAD,
                largest=side == "largest",
                restartControl=NO_RESTART,
            )
        found.append(torch.as_tensor(vectors))
        exhausted |= next(calls) >= share
    spent = operator.products - before
    return _pairs(
        operator,
        torch.cat(found, 1).to(operator.device, operator.dtype),
        scale=scale,
        tolerance=tolerance,
        outcome=SolverOutcome.BUDGET if exhausted else SolverOutcome.STAGNATED,
        products=spent,
    )


def places(size: int, ends: int, which: str) -> list[int]:
    """Places of the wanted ones in an ascending sequence."""
    low = range(min(ends, size)) if which != "largest" else ()
    high = range(max(0, size - ends), size) if which != "smallest" else ()
    return sorted({*low, *high})


def _bordered(matrix: Tensor, column: Tensor) -> Tensor:
    """VᵀAV with the new block's column, and its transpose as row."""
    old, width = matrix.shape[0], column.shape[1]
    whole = torch.zeros(old + width, old + width, dtype=torch.float64)
    whole[:old, :old] = matrix
    whole[:, old:] = column
    whole[old:, :] = column.T
    whole[old:, old:] = (column[old:] + column[old:].T) / 2
    return whole


def _pairs(
    operator: CurvatureOperator,
    vectors: Tensor,
    *,
    scale: float,
    tolerance: float,
    outcome: SolverOutcome,
    products: int,
    restarts: int = 0,
    widened: int = 0,
) -> Eigenpairs:
    """Rayleigh quotients and true residuals of the vectors, at one product each."""
    vectors = vectors / vectors.norm(dim=0)
    image = product(operator, vectors, owner=OWNER).double()
    exact = vectors.double()
    values = (exact * image).sum(0) / exact.square().sum(0)
    return _result(
        vectors,
        values=values,
        residuals=(image - exact * values).norm(dim=0),
        scale=max(scale, float(values.abs().max())),
        tolerance=tolerance,
        outcome=outcome,
        products=products + vectors.shape[1],
        restarts=restarts,
        widened=widened,
    )


def _result(
    vectors: Tensor,
    *,
    values: Tensor,
    residuals: Tensor,
    scale: float,
    tolerance: float,
    outcome: SolverOutcome,
    products: int,
    restarts: int = 0,
    widened: int = 0,
) -> Eigenpairs:
    """The result, whose outcome the true residuals decide."""
    if bool((residuals <= tolerance * scale).all()):
        outcome = SolverOutcome.CONVERGED
    elif outcome is SolverOutcome.CONVERGED:
        outcome = SolverOutcome.INACCURATE
    order = values.argsort(stable=True)  # Rayleigh quotients may differ in order from the values they refine
    return Eigenpairs(
        values=values[order].cpu(),
        vectors=vectors[:, order],
        residuals=residuals[order].cpu(),
        scale=scale,
        outcome=outcome,
        products=products,
        restarts=restarts,
        widened=widened,
    )
