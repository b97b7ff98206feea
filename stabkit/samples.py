"""The one form that a data set has inside: n samples that can be fetched by index, inputs being any tree of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]

# Rows of every storage that a set draws on, by the storage's key: what tells whether two sets share samples.
Identity = dict[object, np.ndarray]

FIRST_LOOKED_AT = 32  # numbers of a row that are compared before all of them


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of nested tuples, lists and dictionaries.

    Args:
        function: Maps a tensor to a tensor.
        tree: Nested structure of tensors.

    Returns:
        The same structure with mapped tensors.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        parts = (map_tensors(function, value) for value in tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a nested structure.

    Args:
        tree: Nested tuples, lists and dictionaries of tensors.

    Yields:
        The tensors, in order.
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_of(value)


def layout(tree: Any) -> Hashable:
    """What a nested structure of batches is made of, whatever their number: kinds, keys in order, shapes and dtypes.

    Args:
        tree: Nested tuples, lists and dictionaries of tensors.

    Returns:
        Something to compare and to look up by.
    """
    if isinstance(tree, Tensor):
        return tree.shape[1:], tree.dtype
    if isinstance(tree, Mapping):
        return "dict", tuple((key, layout(value)) for key, value in tree.items())
    if isinstance(tree, tuple | list):
        return type(tree).__name__, tuple(layout(value) for value in tree)
    return type(tree).__name__


class Samples:
    """n samples of inputs and targets, fetched by index.

    Attributes:
        name: "forget", "retain" or "test"; used in messages.
        size: Number n of samples.
        device: Where fetched batches are placed.
    """

    def __init__(
        self,
        name: str,
        size: int,
        fetch: Callable[[Tensor], tuple[Inputs, Tensor]],
        identity: Identity,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.size = size
        self.device = device
        self._fetch = fetch
        self._identity = identity
        self._dtype = dtype
        self._targets: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs and targets of some samples, on the problem's device and in its dtype.

        Args:
            indices: Sample indices, shape (b,), int64.

        Returns:
            Inputs with leading dimension b, and targets with leading dimension b.
        """
        inputs, targets = self._fetch(indices.cpu())
        return map_tensors(self._place, inputs), self._place(targets)

    def batches(self, batch_size: int, indices: Tensor | None = None) -> Iterator[tuple[Inputs, Tensor]]:
        """All samples, or the indexed ones, in order and in batches; the last may be smaller.

        Args:
            batch_size: Samples a batch.
            indices: Which samples, shape (m,); all of them when None.

        Yields:
            Inputs and targets of each batch.
        """
        order = torch.arange(self.size) if indices is None else indices
        for chunk in order.split(batch_size):
            yield self.batch(chunk)

    def targets(self) -> Tensor:
        """Targets of the whole set, read once and kept.

        Returns:
            Tensor with leading dimension n.
        """
        if self._targets is None:
            parts = [targets for _, targets in self.batches(4096)]
            self._targets = torch.cat(parts)
        return self._targets

    def mapped(self, function: Callable[[Tensor, Inputs, Tensor], tuple[Inputs, Tensor]]) -> Samples:
        """The same samples, each batch changed as it is fetched.

        Args:
            function: From sample indices (b,), inputs and targets to new inputs and targets.

        Returns:
            The samples.
        """
        changed = copy.copy(self)
        changed._fetch = lambda indices: function(indices, *self._fetch(indices))
        changed._targets = None
        return changed

    def subset(self, count: int | None, seed: int) -> Tensor:
        """Indices of a uniform sample without replacement, sorted; all indices when `count` covers the set.

        Args:
            count: Number of samples wanted, or None for all.
            seed: Seed of the draw.

        Returns:
            Indices of shape (min(count, n),), int64.
        """
        if count is None or count >= self.size:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.size, generator=generator)[:count].sort().values

    def overlap(self, other: Samples) -> int:
        """How many samples two sets provably share.

        Sets are compared by the data sets and indices they were built from and by the memory of their tensors, never
        by value: equal rows at different places may be legitimate duplicates.

        Args:
            other: The other set.

        Returns:
            Number of shared samples; 0 when nothing can be told.
        """
        common = self._identity.keys() & other._identity.keys()
        return sum(int(np.intersect1d(self._identity[key], other._identity[key]).size) for key in common)

    def twins(self, other: Samples, count: int) -> int:
        """How many of some samples the other set holds too, by value: all inputs and the target are the same numbers.

        Args:
            other: The other set.
            count: Samples of this one to look for, spread evenly; all where there are fewer.

        Returns:
            How many of them were found. Cost: reading the other set once.
        """
        rows = torch.linspace(0, self.size - 1, min(count, self.size)).long()
        wanted = _flat(*self.batch(rows))
        found = torch.zeros(len(rows), dtype=torch.bool)
        for inputs, targets in other.batches(4096):
            held = _flat(inputs, targets)
            if [part.shape[1:] for part in held] != [part.shape[1:] for part in wanted]:
                return 0
            for place, one in enumerate(zip(*wanted, strict=True)):
                if not found[place]:
                    found[place] = _holds(held, one)
        return int(found.sum())

    def _place(self, tensor: Tensor) -> Tensor:
        dtype = torch.int64
        if tensor.is_floating_point() or tensor.is_complex():
            dtype = self._dtype.to_complex() if tensor.is_complex() else self._dtype
        return tensor.to(self.device, torch.bool if tensor.dtype == torch.bool else dtype)


def _flat(inputs: Inputs, targets: Tensor) -> list[Tensor]:
    """Targets and inputs with one row of numbers a sample, (b, k) each; parts without numbers are left out."""
    parts = [part.reshape(part.shape[0], -1) for part in (targets, *tensors_of(inputs))]
    return [part for part in parts if part.shape[1]]


def _holds(held: Sequence[Tensor], one: Sequence[Tensor]) -> bool:
    """Whether a row of the parts (b, k) agrees with one sample's (k,) in every number."""
    rows = torch.arange(len(held[0]), device=held[0].device)
    for part, row in zip(held, one, strict=True):  # a few numbers of each first, which hardly any other row shares
        few = torch.linspace(0, row.numel() - 1, min(FIRST_LOOKED_AT, row.numel()), device=row.device).long()
        rows = rows[(part[rows[:, None], few] == row[few]).all(1)]
    return any(all(bool((part[k] == row).all()) for part, row in zip(held, one, strict=True)) for k in rows.tolist())


def checked_indices(samples: Samples, indices: Tensor | Sequence[int] | None, *, owner: str) -> Tensor:
    """Which samples of a set are meant.

    Args:
        samples: The set.
        indices: Whole numbers, shape (m,), m >= 1; all samples when None.
        owner: Function or class they were given to, for messages.

    Returns:
        The indices, on the CPU.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If they are none, no whole numbers, or out of the set.
    """
    if indices is None:
        return torch.arange(samples.size)
    try:
        found = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`indices` of `{owner}` must be whole numbers of shape (m,); got {type(indices).__name__}. {error}"
        ) from error
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool or found.numel() == 0:
        remedy = " Of a mask take mask.nonzero().flatten()." if found.dtype == torch.bool else ""
        raise ValueError(
            f"`indices` of `{owner}` must be whole numbers of shape (m,), m >= 1; got {found.dtype} of shape "
            f"{tuple(found.shape)}.{remedy}"
        )
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= samples.size:
        raise ValueError(
            f"`indices` of `{owner}` must be in [0, {samples.size - 1}] for `{samples.name}`; got "
            f"{low if low < 0 else high}."
        )
    return found.cpu()
