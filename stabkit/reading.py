"""What a cross-entropy reads of a network's outputs, and no more: for sequences and large vocabularies.

A position without a label is not read. Of a position's C logits the loss needs the label's own and the logarithm of the sum
over all, which stays as it is when some are merged into their logsumexp. So a few logits and one for the rest have the same
loss at every θ, with the same derivatives in θ, from outputs that one can linearise (theory §5).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stabkit.losses import IGNORE_INDEX

# What an algorithm may read of the outputs: losses alone, the distributions at labelled positions, everything.
READS = ("loss", "labelled", "all")
MANY_OUTPUTS = 1000  # numbers a sample that merging leaves
FEWEST_LOGITS = 8  # of a position, the merged one not counted


class Reading(NamedTuple):
    """Inputs of b samples with the places at which their outputs are read.

    Attributes:
        inputs: What the network takes.
        positions: Which positions are read, int64, shape (b, P).
        logits: Which logits of each are read by themselves, the others being merged, int64, shape (b, P, k); all if k = 0.
    """

    inputs: Any
    positions: Tensor
    logits: Tensor

    def pick(self, outputs: Tensor, class_axis: int) -> Tensor:
        """The outputs that are read.

        Args:
            outputs: The network's, shape (b, T..., C) or (b, C, T...).
            class_axis: Where the C classes lie, 1 or -1.

        Returns:
            Shape (b, P, k + 1), or (b, P, C) where all logits are read.
        """
        rows = outputs.movedim(class_axis, -1)
        rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
        rows = rows.gather(1, self.positions.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        if self.logits.shape[-1] == 0:
            return rows
        merged = rows.scatter(-1, self.logits, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([rows.gather(-1, self.logits), merged], -1)


def logits_to_read(positions: int, classes: int) -> int:
    """How many logits of a position are read by themselves.

    Args:
        positions: Number P of positions that are read of a sample.
        classes: Number C of logits.

    Returns:
        As many as give `MANY_OUTPUTS` numbers a sample, at least 8; 0 where all are read, as merging would not halve them.
    """
    count = max(FEWEST_LOGITS, MANY_OUTPUTS // positions - 1)
    return count if 2 * (count + 1) <= classes else 0


def labelled_positions(labels: Tensor, count: int) -> Tensor:
    """Positions with a label, in their order.

    Args:
        labels: Labels aligned with the positions that predict them, shape (n, T).
        count: Number P of positions, no fewer than any sample has labels.

    Returns:
        Positions, shape (n, P); samples with fewer labels are filled up with unlabelled ones.
    """
    return (labels == IGNORE_INDEX).to(torch.int8).argsort(dim=1, stable=True)[:, :count]


def largest_logits(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    """The label's logit and the largest others.

    Args:
        rows: Logits at θ*, shape (b, P, C).
        labels: Labels, shape (b, P); -100 where there is none.
        count: Number k of logits.

    Returns:
        Places, the label's first, shape (b, P, k); where there is no label, the largest is in its place.
    """
    label = torch.where(labels == IGNORE_INDEX, rows.argmax(-1), labels).unsqueeze(-1)
    others = rows.scatter(-1, label, -math.inf).topk(count - 1, dim=-1).indices
    return torch.cat([label, others], -1).int()  # held for every sample
