"""The two sets during a rollout: whose samples play whom, the batches, and outputs at coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stabkit._memory import pass_bytes, sent
from stabkit.curvature.linearised import LinearisedNetwork, LinearisedSet
from stabkit.losses import Loss

PLAYERS_SEED = 2**31  # added to a stream's seed, so that who stands in for whom is independent of the batches
LOOK_BYTES = 64 * 2**20  # of the outputs that losses are looked at of together


class RolledSet:
    """One set during a rollout: its samples in the working dtype and each of S seeds' stream of batches of them."""

    def __init__(
        self,
        part: LinearisedSet,
        streams: Sequence[Iterator[Tensor]],
        batch_size: int,
        seeds: Sequence[int],
        dtype: torch.dtype,
        *,
        at_once: int,
    ) -> None:
        """Take a set.

        Args:
            part: The linearised set.
            streams: Each seed's stream of batches.
            batch_size: B.
            seeds: Of who stands in for whom, one for each stream.
            dtype: The working dtype.
            at_once: Steps whose batches are drawn together.
        """
        self.outputs = part.outputs.to(dtype)
        self._original = self.outputs if part.original is None else part.original.to(dtype)
        self.features = part.features.to(dtype)
        self._offset = None if part.original is None else self._original - self.outputs
        self.targets = part.targets.to(dtype) if part.targets.is_floating_point() else part.targets
        self._streams, self._players = streams, [_players(part, seed) for seed in seeds]
        self._drawn, self._at_once = iter(()), at_once
        self.batch_size = batch_size

    def draw(self) -> Tensor:
        """The next batch of every seed.

        Returns:
            Indices into the held samples, shape (S, b), on the network's device.
        """
        found: Tensor | None = next(self._drawn, None)
        if found is None:
            # Several steps' at once: a transfer in each would keep an accelerator waiting.
            drawn = [
                torch.stack([
                    players[next(stream)] for stream, players in zip(self._streams, self._players, strict=True)
                ])
                for _ in range(self._at_once)
            ]
            self._drawn = iter(sent(torch.stack(drawn), self.outputs.device))
            found = next(self._drawn)
        return found

    def original(self, indices: Tensor, settings: int) -> Tensor:
        """Outputs at θ* of batches.

        Args:
            indices: The batches, shape (S, b).
            settings: Number G of settings.

        Returns:
            Each batch's G times one after another, shape (S·G·b, ...).
        """
        return _repeat(self._original[indices], settings)

    def at(self, c: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a step reads of batches.

        Args:
            c: Coordinates, shape (S, G, r).
            indices: The batches, shape (S, b).

        Returns:
            Outputs there and targets, shapes (S·G·b, ...), and features, shape (S, b·O, r).
        """
        base, rows = self.outputs[indices], self.features[indices].flatten(1, 2)
        moved = torch.baddbmm(base.flatten(1).unsqueeze(1), c, rows.mT)  # f_i + Φ_i c: (S, G, b·O)
        return moved.reshape(-1, *base.shape[2:]), _repeat(self.targets[indices], c.shape[1]), rows

    def mean_losses(self, loss: Loss, c: Tensor) -> Tensor:
        """Mean losses of the whole set.

        Args:
            loss: The per-sample loss.
            c: Coordinates, shape (G, r).

        Returns:
            Shape (G,), float64 on the CPU.
        """
        size = self.outputs.numel() * self.outputs.element_size()
        means = []
        for some in c.split(max(1, pass_bytes(LOOK_BYTES, c.device) // size)):
            targets = self.targets.repeat(len(some), *[1] * (self.targets.dim() - 1))
            each = loss.per_sample(self.looked_at(some.unsqueeze(0)), targets)
            means.append(each.reshape(len(some), -1).mean(1))
        return torch.cat(means).double().cpu()

    def looked_at(self, c: Tensor, indices: Tensor | None = None) -> Tensor:
        """Outputs in eval mode.

        Args:
            c: Coordinates, shape (S, G, r).
            indices: Batches, shape (S, b); the whole set when None.

        Returns:
            Shape (S·G·b, ...).
        """
        if indices is None:
            base, rows = self.outputs.unsqueeze(0), self.features.flatten(0, 1).unsqueeze(0)
            offset = None if self._offset is None else self._offset.unsqueeze(0)
        else:
            base, rows = self.outputs[indices], self.features[indices].flatten(1, 2)
            offset = None if self._offset is None else self._offset[indices]
        base = base if offset is None else base + offset
        moved = base.flatten(1).unsqueeze(1) + c @ rows.mT
        return moved.reshape(-1, *base.shape[2:])


def players_of(network: LinearisedNetwork, seed: int) -> tuple[Tensor, Tensor]:
    """Which samples play in a seed's rollout: for every sample of both sets the held one that has its part.

    Args:
        network: The compressed network.
        seed: The rollout's.

    Returns:
        Indices in the retain and in the forget set, of as many entries as these have samples.
    """
    held = network.retain, network.forget
    retain, forget = (part.indices.cpu()[_players(part, 2 * seed + i)] for i, part in enumerate(held))
    return retain, forget


def _players(part: LinearisedSet, seed: int) -> Tensor:
    """Which of the m held samples plays each of the n: itself where held; the others are shared out evenly at random."""
    m, n = part.samples, part.population
    players = torch.full((n,), -1)
    players[part.indices.cpu()] = torch.arange(m)
    generator = torch.Generator().manual_seed(PLAYERS_SEED + seed)
    # Each round plays every held sample once.
    rounds = torch.rand(-(-(n - m) // m), m, generator=generator, dtype=torch.float32).argsort(1)
    players[players < 0] = rounds.flatten()[: n - m]
    return players


def _repeat(values: Tensor, times: int) -> Tensor:
    """Rows (S, b, ...) as (S·G·b, ...): each b of them G times one after another."""
    seeds, b = values.shape[:2]
    return values.unsqueeze(1).expand(seeds, times, b, *values.shape[2:]).reshape(-1, *values.shape[2:])
