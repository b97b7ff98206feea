"""A randomised range finder for the rows of J P^{1/2} that grows, keeps what it has, and can be put down at any sample.

With A the rows of J P^{1/2} of both sets, each set's divided by √m, and Ω a block of Gaussian columns, AᵀΩ spans nearly the
leading right singular directions of A (Halko, Martinsson and Tropp, SIAM Rev. 53, 2011, §4.1); power iterations (AᵀA)^q AᵀΩ
span them more nearly (§4.5). A may be of the first few samples of each set: many rows tell the curvature along a
direction, few are enough to find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from stabkit._checkpoint import State
from stabkit.curvature.jacobian import ScaledJacobian
from stabkit.curvature.orthonormal import orthonormal, tall_qr
from stabkit.preconditioner import Preconditioner

PROBES = 8  # random signs of each set, which stay out of the basis and so can judge it
OWN = PROBES + 1  # columns of the very first pull that belong to one set alone: its signs and its mean gradient


def random_signs(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Signs of the probes.

    Args:
        shape: Samples and outputs, (m', O).
        generator: Of the signs.

    Returns:
        Shape (m', O, PROBES), on the CPU.
    """
    return 2.0 * torch.randint(0, 2, (*shape, PROBES), generator=generator) - 1.0


def gaussian_columns(
    shapes: Sequence[tuple[int, int]], width: int, generator: torch.Generator, like: Tensor
) -> list[Tensor]:
    """Ω, column by column, so that the first ones are the same whatever their number.

    Args:
        shapes: Samples and outputs of either set, (m', O).
        width: Columns.
        generator: Of the entries.
        like: A tensor with the dtype and on the device to have them in.

    Returns:
        Of either set, shape (m', O, width), divided by √m'.
    """
    columns = [
        [torch.randn(shape, generator=generator, dtype=torch.float32) / shape[0] ** 0.5 for shape in shapes]
        for _ in range(width)
    ]
    return [torch.stack(column, dim=2).to(like) for column in zip(*columns, strict=True)]


class RowSketch:
    """An orthonormal basis Q of what A does to parameters, with J P^{1/2} Q, grown block by block.

    A block takes some walks over the samples that are drawn from: a pull AᵀΩ, and a push A Q and a pull for each power
    iteration; and a push of all samples for the features. The very first pull goes over all of them, the others with their
    mean gradient alone. Between two batches of a walk a few arrays and a place are all there is to the state.

    Attributes:
        basis: Q, shape (d, c).
        features: J P^{1/2} Q of the retain and of the forget set, shapes (m, O, c).
        probes: P^{1/2} Jᵀu for random signs u of the samples drawn from, of the retain and then of the forget set, shape
            (d, 2·PROBES).
        rank: What the basis was last grown for; 0 at the beginning.
        drawn: Gaussian columns behind it.
        gradients: Per-sample gradients spent.
    """

    def __init__(
        self,
        jacobians: Sequence[ScaledJacobian],
        residuals: Sequence[Tensor],
        preconditioner: Preconditioner,
        like: Tensor,
        *,
        landmarks: Tensor,
        drawn_from: Sequence[int],
        power_iterations: int,
        seed: int,
    ) -> None:
        """Begin with nothing.

        Args:
            jacobians: J P^{1/2} of the retain and of the forget set.
            residuals: Derivatives of the losses in the outputs, shapes (m, O): what the mean gradients are pulled from.
            preconditioner: P.
            like: A vector (d,) with the dtype and on the device to compute in.
            landmarks: Columns (d, l) that the basis is to span besides.
            drawn_from: How many of the first samples of either set directions are drawn from.
            power_iterations: Applications of AᵀA to the Gaussian part of each block.
            seed: Seed of signs and Gaussian columns.
        """
        self._jacobians, self._residuals, self._preconditioner = jacobians, residuals, preconditioner
        self._like, self._landmarks, self._drawn_from = like, landmarks, tuple(drawn_from)
        # Which walks are pulls, by value: methods of this object in an attribute of it would keep both alive until Python
        # next looks for cycles, and an accelerator's memory with them.
        self._pulls = (True, *(False, True) * power_iterations, False)
        self._generator = torch.Generator().manual_seed(seed)
        self._before = self._generator.get_state()  # the draws of the block in the making
        self.basis = self.probes = like.new_empty(like.numel(), 0)
        self.features = [like.new_empty(len(j), j.outputs_per_sample, 0) for j in jacobians]
        self.rank = self.drawn = 0
        self.gradients = 0.0
        # The block in the making: its Gaussian columns; walk, set and sample it is at; its columns, images and gradients.
        self._width = self._walk = self._set = self._sample = 0
        self._block = self._mean_gradients = self.basis
        self._images = self.features

    def grow(self, rank: int, width: int, save: Callable[[State], None] | None = None, every: int = 1) -> Iterator[int]:
        """Add what is missing to `width` Gaussian columns, or go on with it where a saved state was loaded.

        Args:
            rank: What it is for.
            width: Gaussian columns to have in the end.
            save: Takes the state after so many samples, and at the end.
            every: Samples from one saving to the next.

        Yields:
            Samples that a walk has got past.
        """
        if self.rank != rank:
            full = self.basis.shape[1] == self._like.numel()
            self.rank, self._width, self._walk, self._set = rank, 0 if full else width - self.drawn, 0, 0
            self._before = self._generator.get_state()
        if self._width:
            unsaved = 0
            for count in self._block_steps():
                yield count
                unsaved += count
                if save and unsaved >= every:
                    save(self.state())
                    unsaved = 0
        if save:
            save(self.state())

    def samples_to_walk(self, width: int) -> int:
        """Samples that growing to a width takes, counted once for each walk.

        Args:
            width: Gaussian columns to have in the end.

        Returns:
            Their number.
        """
        every, drawn = sum(len(j) for j in self._jacobians), sum(self._drawn_from)
        gradients = 0 if self.drawn else every - drawn
        return gradients + (len(self._pulls) - 1) * drawn + every if width > self.drawn else 0

    # ------------------------------------------------------------------ one block

    def _block_steps(self) -> Iterator[int]:
        """Everything that is left to do for the block."""
        while self._walk < len(self._pulls):
            yield from self._pull() if self._pulls[self._walk] else self._push()
            self._walk, self._set = self._walk + 1, 0
        self.basis = torch.cat([self.basis, self._block], 1) if self.basis.shape[1] else self._block
        self.features = [torch.cat(pair, 2) for pair in zip(self.features, self._images, strict=True)]
        self.drawn += self._width
        self._width = 0
        self._block = self._mean_gradients = self._like.new_empty(self._like.numel(), 0)
        self._images = [image.new_empty(*image.shape[:2], 0) for image in self._images]

    def _pull(self) -> Iterator[int]:
        """P^{1/2} Jᵀ U of both sets, summed and orthonormalised: a new block."""
        cotangents = self._cotangents()
        first = self._walk == 0 and self.drawn == 0
        if (self._set, self._sample) == (0, 0):
            self._block = self._like.new_zeros(self._like.numel(), cotangents[0].shape[2] + first * OWN)
        while self._set < len(self._jacobians):
            yield from self._pull_set(cotangents[self._set], first=first)
            self._set, self._sample = self._set + 1, 0
        self._block = self._orthonormal(self._pulled(first))

    def _pull_set(self, chosen: Tensor, *, first: bool) -> Iterator[int]:
        """Add one set's part of a pull."""
        total = self._block
        if first:  # the sets share the columns in the middle
            total = total[:, OWN:] if self._set else total[:, :-OWN]
        if self._sample <= len(chosen):  # at the last one its walk may have been put down before it was counted
            walk = self._jacobians[self._set].add_transposed(chosen, total, self._sample)
            yield from self._through(walk, len(chosen), chosen.shape[2])
        if first:  # the mean gradient is that of all samples
            residual = self._residuals[self._set].unsqueeze(2)
            place = self._block.shape[1] - OWN if self._set else PROBES
            total, count = self._block[:, place : place + 1], len(residual) - len(chosen)
            walk = self._jacobians[self._set].add_transposed(residual / len(residual), total, self._sample)
            yield from self._through(walk, count, 1)

    def _pulled(self, first: bool) -> Tensor:
        """P^{1/2} of the block in the making, which it lets go of, with what joins its columns and without what does not."""
        pulled = self._preconditioner.sqrt(self._block)
        self._block = self._like.new_empty(self._like.numel(), 0)
        if first:
            self.probes = torch.cat([pulled[:, :PROBES], pulled[:, -PROBES:]], 1)
            self._mean_gradients = torch.cat([pulled[:, PROBES:OWN], pulled[:, -OWN:-PROBES]], 1)
            pulled = pulled[:, OWN:-OWN]
        if self._walk + 2 == len(self._pulls):
            # As they are, however many power iterations.
            pulled = torch.cat([pulled, self._mean_gradients, *([] if self.drawn else [self._landmarks])], 1)
        return pulled

    def _push(self) -> Iterator[int]:
        """J P^{1/2} times the block, for both sets."""
        columns = self._block.shape[1]
        if (self._set, self._sample) == (0, 0):
            shapes = zip(self._counts(), self._jacobians, strict=True)
            self._images = [self._like.new_empty(count, j.outputs_per_sample, columns) for count, j in shapes]
        while self._set < len(self._jacobians):
            images = self._images[self._set]
            yield from self._through(self._filled(images), len(images), columns)
            self._set, self._sample = self._set + 1, 0

    def _filled(self, images: Tensor) -> Iterator[int]:
        """Write a set's images down, batch by batch."""
        for done, part in self._jacobians[self._set].images(self._block, self._sample, len(images)):
            images[self._sample : done] = part
            yield done

    def _counts(self) -> Sequence[int]:
        """Samples of either set that the walk at hand goes over."""
        last = self._walk + 1 == len(self._pulls)
        return [len(j) for j in self._jacobians] if last else self._drawn_from

    def _through(self, walk: Iterator[int], samples: int, columns: int) -> Iterator[int]:
        """Follow a walk over so many of the set's samples, noting the place."""
        jacobian = self._jacobians[self._set]
        before = jacobian.reused
        for done in walk:
            count, self._sample = done - self._sample, done
            yield count
        self.gradients += (samples - (jacobian.reused - before)) * jacobian.passes(columns)

    def _cotangents(self) -> list[Tensor]:
        """What the pull at hand pulls back, (m, O, k) of either set: drawn at first, then the orthonormalised images."""
        if self._walk == 0:
            return self._draw()
        rows = torch.cat([image.flatten(0, 1) / len(image) ** 0.5 for image in self._images])
        parts = torch.linalg.qr(rows).Q.split([image.shape[0] * image.shape[1] for image in self._images])
        return [
            part.reshape(*image.shape[:2], -1) / len(image) ** 0.5
            for part, image in zip(parts, self._images, strict=True)
        ]

    def _draw(self) -> list[Tensor]:
        """Gaussian columns, with signs and loss derivatives before them or after where it is the first block."""
        self._generator.set_state(self._before)
        shapes = [(n, j.outputs_per_sample) for n, j in zip(self._drawn_from, self._jacobians, strict=True)]
        own = [] if self.drawn else [self._own(*pair) for pair in zip(shapes, self._residuals, strict=True)]
        normal = gaussian_columns(shapes, self._width, self._generator, self._like)
        if not own:
            return normal
        return [torch.cat([own[0], normal[0]], dim=2), torch.cat([normal[1], own[1].flip(2)], dim=2)]

    def _own(self, shape: tuple[int, int], residual: Tensor) -> Tensor:
        """Random signs, and the loss derivatives whose pull is the mean gradient: (m, O, OWN)."""
        signs = random_signs(shape, self._generator)
        return torch.cat([signs.to(self._like), (residual[: shape[0]] / len(residual)).unsqueeze(2)], dim=2)

    def _orthonormal(self, pulled: Tensor) -> Tensor:
        """An orthonormal basis of what a pulled block has beyond the basis; the block is lost."""
        if self.drawn == 0:
            return tall_qr(pulled, overwrite=True)[0]  # d columns where the block has more
        added, _ = orthonormal(
            pulled,
            self.basis,
            width=min(pulled.shape[1], self._like.numel() - self.basis.shape[1]),
            floor=10 * torch.finfo(pulled.dtype).eps * float(pulled.norm()),
            generator=self._generator,
        )
        return added

    # ------------------------------------------------------------------ what the basis has of other vectors

    @property
    def probed(self) -> tuple[Tensor, Tensor]:
        """Qᵀ times the probes, shape (c, 2·PROBES), and their squared norms, float64."""
        norms = torch.linalg.vector_norm(self.probes, dim=0, dtype=torch.float64)
        return (self.basis.T @ self.probes).double(), norms.square()

    def against(self, vectors: Tensor) -> Tensor:
        """Qᵀ times columns.

        Args:
            vectors: Shape (d, l).

        Returns:
            Shape (c, l), float64.
        """
        return (self.basis.T @ vectors).double()

    # ------------------------------------------------------------------ on disk

    def state(self) -> State:
        """The state.

        Returns:
            Everything that going on needs, as arrays.
        """
        tensors = {
            "basis": self.basis,
            "probes": self.probes,
            "block": self._block,
            "mean_gradients": self._mean_gradients,
            **{f"features_{i}": f for i, f in enumerate(self.features)},
            **{f"images_{i}": f for i, f in enumerate(self._images)},
            "before": self._before,
            "generator": self._generator.get_state(),
        }
        batches = [j.batch_size for j in self._jacobians]
        cursor = [self.rank, self.drawn, self._width, self._walk, self._set, self._sample, *batches]
        return {
            **{name: tensor.cpu().numpy() for name, tensor in tensors.items()},
            "cursor": np.array(cursor, dtype=np.int64),
            "gradients": np.array(self.gradients),
        }

    def load(self, state: State) -> None:
        """Take over a saved state.

        Args:
            state: What `state` gave.
        """

        def tensor(name: str) -> Tensor:
            return torch.as_tensor(state[name]).to(self._like)

        self.basis, self.probes = tensor("basis"), tensor("probes")
        self._block, self._mean_gradients = tensor("block"), tensor("mean_gradients")
        places = range(len(self._jacobians))
        self.features, self._images = ([tensor(f"{name}_{i}") for i in places] for name in ("features", "images"))
        self._before = torch.as_tensor(state["before"])
        self._generator.set_state(torch.as_tensor(state["generator"]))
        cursor = [int(c) for c in state["cursor"]]
        self.rank, self.drawn, self._width, self._walk, self._set, self._sample = cursor[:6]
        for jacobian, size in zip(self._jacobians, cursor[6:], strict=True):
            jacobian.batch_size = size
        self.gradients = float(state["gradients"])
