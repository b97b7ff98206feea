"""Training and test data as tensors, seeded parts of them, and deletions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._table import Shown
from stabkit._validate import check_int


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorSplit:
    """Training and test data as tensors.

    Attributes:
        x_train: Training inputs, shape (n, ...).
        y_train: Training labels, shape (n,).
        x_test: Test inputs.
        y_test: Test labels.
        features: Name of every input column of a table; empty for images.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    features: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Deletion(Shown):
    """What to forget and what to retain, as row numbers of a training set.

    Attributes:
        name: How the rows were chosen.
        forget: Rows to forget, sorted.
        retain: All other rows, sorted.
        seed: Seed of the choice; None where nothing is drawn.
    """

    name: str
    forget: Tensor
    retain: Tensor
    seed: int | None = None

    @property
    def forget_count(self) -> int:
        """Number of rows to forget."""
        return len(self.forget)

    @property
    def retain_count(self) -> int:
        """Number of rows to retain."""
        return len(self.retain)

    def __str__(self) -> str:
        drawn = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.name}: {self.forget_count:,} rows to forget, {self.retain_count:,} to retain{drawn}"


def stratified_rows(labels: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """A random part of a set that holds the classes in the set's own proportions, to within one row each.

    Args:
        labels: Labels, shape (n,).
        count: Rows to draw, in [1, n].
        seed: Seed of the draw; the global random state is not used up.

    Returns:
        Row numbers, sorted, shape (count,), on the CPU.
    """
    labels = labels.cpu()
    check_int(count, name="count", owner="stratified_rows", low=1, high=len(labels))
    generator = torch.Generator().manual_seed(seed)
    _, place, sizes = labels.unique(return_inverse=True, return_counts=True)
    exact = count * sizes.double() / len(labels)
    quota = exact.floor().long()
    # What rounding down left over goes to the classes that lost most.
    short = (exact - quota).argsort(descending=True, stable=True)[: count - int(quota.sum())]
    quota[short] += 1
    drawn = [
        rows[torch.randperm(len(rows), generator=generator)[:wanted]]
        for rows, wanted in zip(((place == c).nonzero().flatten() for c in range(len(sizes))), quota, strict=True)
    ]
    return torch.cat(drawn).sort().values


def take_part(x: Tensor, y: Tensor, count: int | None, *, seed: int, name: str, owner: str) -> tuple[Tensor, Tensor]:
    """A stratified part of inputs and labels.

    Args:
        x: Inputs, shape (n, ...).
        y: Labels, shape (n,).
        count: Rows to draw; all when None.
        seed: Seed of the draw.
        name: What the caller calls `count`.
        owner: The public function it belongs to.

    Returns:
        Inputs and labels of the part.
    """
    if count is None:
        return x, y
    check_int(count, name=name, owner=owner, low=1, high=len(y), remedy="None takes all.")
    rows = stratified_rows(y, count, seed=seed)
    return x[rows], y[rows]
