"""What a linearisation takes, in gradients and in memory, and whether its basis fits."""

from __future__ import annotations

from collections.abc import Sequence

from stabkit._memory import free_memory, pass_bytes
from stabkit.curvature.sketch import OWN, PROBES
from stabkit.problem import UnlearningProblem

OVERSAMPLING = 10
FIRST_RANK = 50  # where the rank is to be found
EXTRA = 2 + 2 * PROBES  # columns of the first pull that are not Gaussian
WHOLE = 256  # samples of a set held whole, up to which directions are drawn from all of them
SKETCH_ROWS = 4  # that directions are drawn from, for each of them, at least


def linearisation_cost(
    samples: Sequence[int],
    populations: Sequence[int],
    outputs: int,
    rank: int | None,
    *,
    max_rank: int | None = None,
    sketch_samples: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    landmarks: int = 0,
    hold: bool = True,
    products: int = 0,
    rows_kept: float = 0.0,
) -> float:
    """What `linearise` takes without power iterations.

    Args:
        samples: Samples m of each set.
        populations: Samples n that each set has.
        outputs: Outputs O of each.
        rank: Directions to keep; when None, as many as `max_rank` are taken to be found.
        max_rank: As `linearise` has it, where the rank is None.
        sketch_samples: As `linearise` has it.
        batch_sizes: Batch sizes of each set, where the samples of a batch have no outputs of their own, as with
            batchnorm="batch"; None otherwise.
        landmarks: How many there are.
        hold: Whether the basis is held, which a rank that is found needs.
        products: Where it is not, metrics to find besides VᵀV: for a P that is not the identity, and for factors.
        rows_kept: Samples whose rows are kept from one product to the next, where products go by rows.

    Returns:
        Per-sample gradients: two walks for each block of directions, by rows or by vectors where those are fewer, the mean
        gradient, and a forward pass, or two of coupled samples. Of a basis that is not held all goes by vectors: over the
        samples that directions are drawn from two pulls of each column and a push, and a push over all samples.
    """
    most = rank or max_rank or FIRST_RANK
    blocks = [rank or first_rank(most)]
    while sum(blocks) < most:
        blocks.append(min(sum(blocks), most - sum(blocks)))
    drawn = [samples_drawn_from(m, n, outputs, rank, sketch_samples) for m, n in zip(samples, populations, strict=True)]
    if batch_sizes is not None:
        drawn = [min(m, -(-k // size) * size) for m, k, size in zip(samples, drawn, batch_sizes, strict=True)]
    passes = 1 if batch_sizes is None else 2  # forward
    if not hold and rank is not None:
        gaussian, columns = rank + OVERSAMPLING, rank + OVERSAMPLING + 2 + landmarks
        walked = PROBES + 2 * gaussian + (1 + products) * columns + landmarks
        return sum(samples) * (1 + columns + passes / 3) + sum(drawn) * walked
    total = sum(samples) - sum(drawn) + sum(samples) * passes / 3
    for place, block in enumerate(blocks):
        vectors = block + (0 if place else OVERSAMPLING)
        walks = (sum(drawn), vectors + (0 if place else OWN)), (sum(samples), vectors + (0 if place else 2 + landmarks))
        for walk, (met, columns) in enumerate(walks):
            by_rows = batch_sizes is None and outputs < columns
            again = min(rows_kept, sum(drawn)) if by_rows and (place or walk) else 0.0  # their rows are there already
            total += (met - again) * (outputs if by_rows else columns)
    return total


def samples_drawn_from(
    samples: int, population: int, outputs: int, rank: int | None, asked: int | None, power_iterations: int = 0
) -> int:
    """How many of a set's samples directions are drawn from: all of a small set held whole, where each is met often."""
    if asked is None or rank is None or power_iterations or samples == population <= WHOLE:
        return samples
    return min(samples, max(asked, -(-SKETCH_ROWS * (rank + OVERSAMPLING) // outputs)))


def first_rank(most: int) -> int:
    """Directions to begin with where the rank is to be found, of so many at most."""
    return min(FIRST_RANK, most)


def basis_fits(problem: UnlearningProblem, rows: int, rank: int | None, *, landmarks: int = 0) -> bool:
    """Whether `linearise` holds the basis when it is not told to.

    Args:
        problem: The unlearning problem.
        rows: Outputs of all samples to linearise.
        rank: Directions; it does where None.
        landmarks: How many there are.

    Returns:
        Whether it does.
    """
    return rank is None or Room(problem, rows, None, beside=EXTRA + landmarks).holds(rank)


def rows_kept(problem: UnlearningProblem, samples: int, outputs: int, rank: int, *, landmarks: int = 0) -> float:
    """Of how many samples `linearise` keeps the rows of J from one product to the next, when it is given no memory.

    Args:
        problem: The unlearning problem.
        samples: Samples to linearise, of both sets.
        outputs: Outputs O of each.
        rank: Directions.
        landmarks: How many there are.

    Returns:
        As many as fit into the memory, whether or not there are so many.
    """
    room = Room(problem, samples * outputs, None, beside=EXTRA + landmarks)
    return room.spare(rank) / (outputs * problem.size * problem.dtype.itemsize)


def holds_basis(room: Room, rank: int, asked: bool | None, *, needed: bool) -> bool:
    """Whether to hold the basis."""
    if asked is False and needed:
        raise ValueError(
            "`hold` of `linearise` must not be False with a rank that is found, power iterations or a checkpoint, all of "
            "which need the basis; got False. Give `rank`, and leave the others out."
        )
    return needed or (room.holds(rank) if asked is None else asked)


class Room:
    """How wide a sketch may be."""

    def __init__(self, problem: UnlearningProblem, rows: int, budget: int | None, *, beside: int) -> None:
        self._beside = beside  # columns that are not Gaussian
        self._full = min(rows, problem.size)
        self._given = budget is not None
        self._for_rows = float(pass_bytes(0, problem.device, wanted=2**62))  # an eighth of the memory
        self._column = 2 * (problem.size + rows) * problem.dtype.itemsize  # each is there as it was and as it becomes
        self._bytes = float(free_memory(problem.device))
        if budget is not None:
            self._bytes = budget - budget // 4  # a quarter for passes

    def width(self, rank: int) -> int:
        """Gaussian columns for a rank; no more than there are rows."""
        return min(rank + OVERSAMPLING, self._full)

    def holds(self, rank: int) -> bool:
        """Whether the memory suffices for a rank."""
        return self._column * (self.width(rank) + self._beside) <= self._bytes

    def spare(self, rank: int) -> float:
        """Bytes beside a rank's basis and features for rows of J: half of them, or all that a budget leaves."""
        left = self._bytes - self._column * (self.width(rank) + self._beside)
        return max(0.0, left if self._given else min(left / 2, self._for_rows))

    def check(self, rank: int, memory: int | str | None) -> None:
        """Refuse a rank for which it does not."""
        if self.holds(rank):
            return
        fits = self._bytes // self._column - self._beside - OVERSAMPLING
        lower = f"`rank` to {fits}, or " if fits >= 1 else ""
        raise ValueError(
            f"`memory` of `linearise` must hold the basis and the features of rank {rank}, "
            f"{_text(self._column * (self.width(rank) + self._beside))}; got {memory!r}, of which {_text(self._bytes)} are "
            f"for them. Lower {lower}`retain_samples` and `forget_samples`, or give more memory."
        )


def _text(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.3g} GB" if count >= 2**30 else f"{count / 2**20:.3g} MB"
