"""Block Lanczos with full reorthogonalisation and thick restarts (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stabkit._progress import progress_bar
from stabkit.curvature.operators import CurvatureOperator
from stabkit.curvature.orthonormal import orthonormal, tall_qr
from stabkit.spectrum._common import ROWS_AT_ONCE, Stall, gaussian, product
from stabkit.spectrum.checkpoint import OperatorCheckpoint
from stabkit.spectrum.eigenpairs import OWNER, Eigenpairs, places, recomputed
from stabkit.spectrum.outcome import SolverOutcome

WIDENINGS = 2  # times at least that the basis is doubled before the run counts as stagnated
SMALL = 128  # order up to which doubling goes on until the basis is the whole space


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
        self.new = tall_qr(start)[0]
        self.projected = torch.zeros(0, 0, dtype=torch.float64)  # H
        self.coupling = torch.zeros(0, 0, dtype=torch.float64)  # B
        self.start = self.image = self.new[
            :, :1
        ].clone()  # a vector and its image, by which the operator is known again
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
        turned = rotation[:, keep].to(self.vectors)
        for rows in self.vectors.split(ROWS_AT_ONCE):  # no second basis beside it
            rows[:, : len(keep)] = rows[:, : self.size] @ turned
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
            "start": self.start.cpu().numpy(),
            "image": self.image.cpu().numpy(),
            "projected": self.projected.numpy(),
            "coupling": self.coupling.numpy(),
            "mark": np.array(self.stall.mark),
            "counters": np.array(counters, dtype=np.int64),
            "generator": self.generator.get_state().numpy(),
        }

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over a saved state."""
        vectors, self.new, self.start, self.image = (
            torch.as_tensor(state[name], dtype=self.operator.dtype, device=self.operator.device)
            for name in ("vectors", "new", "start", "image")
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


def lanczos(
    krylov: Krylov,
    tolerance: float,
    max_products: int,
    progress: bool,
    store: OperatorCheckpoint | None,
    every: int,
) -> Eigenpairs:
    """Advance until converged, out of products, or stuck.

    Args:
        krylov: A fresh Krylov basis.
        tolerance: Largest residual to accept, as a share of the largest |λ|.
        max_products: Products after which the best there is is returned.
        progress: Whether to show a progress bar over the blocks.
        store: Where the state is kept; nowhere when None.
        every: Blocks from one writing to the next.

    Returns:
        The wanted pairs.
    """
    operator = krylov.operator
    d = operator.shape[0]
    wanted = krylov.ends * (2 if krylov.which == "both" else 1)
    saved = store.load() if store else None
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
            spent = krylov.widened >= WIDENINGS and d > SMALL
            if stalled and (spent or krylov.basis >= d):
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
    pairs = recomputed(operator, vectors, scale=scale, tolerance=tolerance, outcome=outcome, products=krylov.products)
    return replace(pairs, restarts=krylov.restarts, widened=krylov.widened)


def _bordered(matrix: Tensor, column: Tensor) -> Tensor:
    """VᵀAV with the new block's column, and its transpose as row."""
    old, width = matrix.shape[0], column.shape[1]
    whole = torch.zeros(old + width, old + width, dtype=torch.float64)
    whole[:old, :old] = matrix
    whole[:, old:] = column
    whole[old:, :] = column.T
    whole[old:, old:] = (column[old:] + column[old:].T) / 2
    return whole
