"""How batches are drawn, and the variance of their means."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SAMPLINGS = ("without_replacement", "with_replacement", "poisson")


def noise_level(batch: int, population: int, sampling: str) -> float:
    """c(B, n): variance of a batch mean per unit of spread among the samples (table under T6).

    Args:
        batch: Batch size B; the expected one under Poisson sampling.
        population: Set size n.
        sampling: One of `SAMPLINGS`.

    Returns:
        The factor, >= 0. It multiplies the samples' covariance, under Poisson sampling their second moment.
    """
    if sampling == "with_replacement":
        return 1 / batch
    if sampling == "poisson":
        return (1 - batch / population) / batch
    return (population - batch) / (batch * (population - 1)) if population > 1 else 0.0


def index_stream(size: int, batch: int, sampling: str, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of sample indices under one sampling scheme.

    Args:
        size: Number n of samples to draw from.
        batch: Batch size B; the expected one under Poisson sampling.
        sampling: One of `SAMPLINGS`.
        generator: Source of randomness, on the CPU.

    Yields:
        Indices of shape (B,), or of a random length, possibly 0, under Poisson sampling.
    """
    while True:
        if sampling == "poisson":
            yield (torch.rand(size, generator=generator, dtype=torch.float32) < batch / size).nonzero().flatten()
        elif sampling == "with_replacement":
            yield torch.randint(0, size, (batch,), generator=generator)
        else:
            order = torch.randperm(size, generator=generator)
            for start in range(0, size - batch + 1, batch):
                yield order[start : start + batch]


def batch_streams(
    sizes: tuple[int, int], batches: tuple[int, int], sampling: str, seed: int
) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """The retain and the forget stream of one seeded run, independent of each other.

    Args:
        sizes: Samples to draw from in the retain and the forget set.
        batches: Batch sizes B_R and B_F.
        sampling: One of `SAMPLINGS`.
        seed: The run's seed.

    Returns:
        Two endless iterators of index tensors.
    """
    retain, forget = (
        index_stream(sizes[i], batches[i], sampling, torch.Generator().manual_seed(2 * seed + i)) for i in (0, 1)
    )
    return retain, forget
