"""What the compressed linearisation is: outputs f(θ) ≈ f(θ*) + Φ c of two sets in the same r coordinates c."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from stabkit.curvature.factors import SampleFactors
from stabkit.losses import Loss
from stabkit.precision import arithmetic
from stabkit.preconditioner import Preconditioner
from stabkit.problem import CHECK_EVERY

FACTORED_AT_ONCE = 64  # samples, in float64
ROWS_AT_ONCE = 2**16  # of the basis, that are masked
SMALL_MOVE = 1e-3  # of the outputs, relative to their size


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearisedSet:
    """One set's outputs and their derivatives in the compressed coordinates, at θ* or wherever it is linearised.

    Attributes:
        outputs: f_i there, shape (m, ...), O numbers a sample: those that steps are taken from.
        features: Φ_i, shape (m, O, r); 0 for outputs that the loss does not read.
        targets: Targets of the m samples.
        indices: Which samples of the set these are, shape (m,).
        population: Number n of samples in the whole set.
        original: f_i(θ*) in eval mode, of the outputs' shape, where `outputs` are others, as where batches are coupled. None
            where they are the same.
        coupled: Size of the batches whose own statistics normalise them, so that outputs and features of a sample are those
            it has among the samples beside it; None where they are its own, in eval mode.
    """

    outputs: Tensor
    features: Tensor
    targets: Tensor
    indices: Tensor
    population: int
    original: Tensor | None = None
    coupled: int | None = None

    @property
    def samples(self) -> int:
        """Number m of samples held."""
        return self.outputs.shape[0]

    def thinned(self, share: float) -> LinearisedSet:
        """A random part of the samples, which stands for the same set.

        Args:
            share: Part of the samples to keep, in (0, 1].

        Returns:
            The part, the same at every call.
        """
        kept = torch.randperm(self.samples, generator=torch.Generator().manual_seed(0))
        return self.picked(kept[: math.ceil(share * self.samples)].sort().values)

    def picked(self, places: Tensor) -> LinearisedSet:
        """Some of the samples, which stand for the same set.

        Args:
            places: Which of the samples held, shape (m',), on the CPU.

        Returns:
            The part.
        """

        def of(values: Tensor) -> Tensor:
            return values[places.to(values.device)]

        return replace(
            self,
            outputs=of(self.outputs),
            features=of(self.features),
            targets=of(self.targets),
            indices=of(self.indices),
            original=None if self.original is None else of(self.original),
        )

    def on_host(self) -> LinearisedSet:
        """The set on the CPU.

        Returns:
            The set.
        """
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value.cpu() for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def factors(self, loss: Loss) -> SampleFactors:
        """Per-sample Gauss-Newton factors and gradients in the compressed coordinates.

        Args:
            loss: The per-sample loss.

        Returns:
            Factors V_i with V_i^T V_i = (L_i^T Φ_i)^T (L_i^T Φ_i), shape (m, C, r) with C = min(O, r), and gradients
            Φ_i^T s_i of shape (m, r), float64 on the CPU. Where a sample has more outputs than there are coordinates, as a
            language model's have, V_i is the triangular factor of L_i^T Φ_i: later costs grow with C².
        """
        factors = []
        for outputs, features, targets in self._in_double():
            rows = loss.factor_transpose(outputs, targets, features).detach()
            factors.append(torch.linalg.qr(rows, mode="r").R if rows.shape[1] > rows.shape[2] else rows)
        # The theory's matrices are small and many, which accelerators factor one by one.
        return SampleFactors(
            factors=torch.cat(factors).cpu(), gradients=self.gradients(loss), population=self.population
        )

    def gradients(self, loss: Loss) -> Tensor:
        """Per-sample gradients in the compressed coordinates.

        Args:
            loss: The per-sample loss.

        Returns:
            Φ_i^T s_i, shape (m, r), float64 on the CPU.
        """
        found = [
            torch.einsum("mor,mo->mr", features, loss.residual(outputs, targets).flatten(1))
            for outputs, features, targets in self._in_double()
        ]
        return torch.cat(found).cpu()

    def _in_double(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Outputs, features and targets of some samples at a time, in double precision."""
        for place in torch.arange(self.samples).split(FACTORED_AT_ONCE):
            outputs, features, targets = (t[place] for t in (self.outputs, self.features, self.targets))
            yield outputs.double(), features.double(), targets.double() if targets.is_floating_point() else targets


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearisedNetwork:
    """Both sets in the same compressed coordinates, and the way back to parameters.

    Attributes:
        retain: The retain samples.
        forget: The forget samples.
        basis: V, orthonormal, shape (d, r).
        preconditioner: P.
        loss: The per-sample loss.
        divergence_level: Retain loss at which a run counts as diverged.
        check_every: Steps from one look at it to the next.
        metric: V^T P V, shape (r, r): ‖θ - θ*‖² = c^T metric c.
        anchor: V^T P^{1/2} θ*, shape (r,): <θ - θ*, θ*> = anchor · c.
        anchor_norm: ‖θ*‖.
        gradient_metric: What the square of a clipped gradient's norm is by in the coordinates, shape (r, r): `metric`, or
            what it is without the layers' step sizes where P has them in it.
        decay_metric: V^T P^{1/2} E P^{1/2} V, shape (r, r), with the layers' factors of the weight decay in E: `metric`
            without.
        decay_anchor: V^T P^{1/2} E θ*, shape (r,): `anchor` without.
        singular_values: Of the (weighted) J P^{1/2}, the r kept, descending, but for the last ones of the landmarks'
            directions, which are ‖J P^{1/2} v‖.
        captured: Share of ‖J P^{1/2}‖_F² that the r directions carry, estimated for each set's samples, whether or not the
            directions were drawn from them; the smaller of the two.
        gradient_equivalents: Per-sample gradient evaluations spent; a forward pass counts as a third.
        dormant: Names of parameter tensors that hardly move the outputs at θ*.
        landmarks: How many of the directions, the last ones, are there to span the landmarks that `linearise` was given.
        layered: Which factors of layers it was given, of "paces" and "decays".
    """

    # Whether what a mask leaves of a gradient in the coordinates lies in them.
    masks_inside: ClassVar[bool] = False

    retain: LinearisedSet
    forget: LinearisedSet
    basis: Tensor
    preconditioner: Preconditioner
    loss: Loss
    divergence_level: float
    metric: Tensor
    anchor: Tensor
    anchor_norm: float
    gradient_metric: Tensor
    decay_metric: Tensor
    decay_anchor: Tensor
    singular_values: Tensor
    captured: float
    gradient_equivalents: float
    check_every: int = CHECK_EVERY
    dormant: tuple[str, ...] = ()
    landmarks: int = 0
    layered: frozenset[str] = frozenset()

    @property
    def rank(self) -> int:
        """Number r of coordinates."""
        return self.basis.shape[1]

    @property
    def parameters(self) -> int:
        """Number d of parameters."""
        return self.basis.shape[0]

    @property
    def displacement_gradients(self) -> float:
        """Per-sample gradients that a displacement takes: none of a basis that is held."""
        return 0.0

    @property
    def run_preconditioner(self) -> Preconditioner:
        """P as the steps of a run apply it."""
        return self.preconditioner

    def masked(self, mask: Tensor) -> Tensor:
        """What a mask does to a gradient in the coordinates, where P = I.

        Args:
            mask: Shape (d,).

        Returns:
            V^T M V, shape (r, r).
        """
        found = self.basis.new_zeros(self.rank, self.rank)
        for rows, kept in zip(self.basis.split(ROWS_AT_ONCE), mask.to(self.basis).split(ROWS_AT_ONCE), strict=True):
            found += rows.T @ (rows * kept.unsqueeze(1))
        return found

    def gradient_along(self, vector: Tensor) -> Tensor:
        """A gradient in the coordinates, where P = I.

        Args:
            vector: Shape (d,).

        Returns:
            V^T u, shape (r,).
        """
        return self.basis.T @ vector.to(self.basis)

    def factors(self) -> tuple[SampleFactors, SampleFactors]:
        """Both sets' curvature factors, in the coordinates that the linear theory is computed in.

        Returns:
            Retain and forget factors, as `LinearisedSet.factors` has them.
        """
        return self.retain.factors(self.loss), self.forget.factors(self.loss)

    def inside(self, vector: Tensor) -> Tensor:
        """Those coordinates of a direction of the preconditioned problem.

        Args:
            vector: Shape (d,).

        Returns:
            V^T v, shape (r,), float64 on the CPU.
        """
        return (self.basis.T @ vector).double().cpu()

    @cached_property
    def on_host(self) -> LinearisedNetwork:
        """The network with all but its basis on the CPU."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "basis"}
        moved: dict[str, Any] = {name: value.cpu() for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, retain=self.retain.on_host(), forget=self.forget.on_host(), **moved)

    def thinned(self, *, rank: int | None = None, samples: float = 1.0) -> LinearisedNetwork:
        """The leading directions and a random part of the samples, from which to see how much either matters.

        Args:
            rank: Directions to keep, of which the landmarks' are the last to go; all when None.
            samples: Part of the samples to keep, in (0, 1], of each set that is a sample itself; a whole set stays whole.

        Returns:
            The smaller network, which shares this one's memory where it can. `captured` stays that of all directions.
        """
        kept = self.kept_columns(rank)
        sets = [
            part.thinned(samples) if part.samples < part.population else part for part in (self.retain, self.forget)
        ]
        return replace(
            self,
            retain=replace(sets[0], features=sets[0].features[..., kept]),
            forget=replace(sets[1], features=sets[1].features[..., kept]),
            basis=self.basis[:, kept],
            metric=self.metric[kept][:, kept],
            anchor=self.anchor[kept],
            gradient_metric=self.gradient_metric[kept][:, kept],
            decay_metric=self.decay_metric[kept][:, kept],
            decay_anchor=self.decay_anchor[kept],
            singular_values=self.singular_values[kept],
            landmarks=min(self.landmarks, self.rank if rank is None else rank),
        )

    def kept_columns(self, rank: int | None) -> slice | Tensor:
        """Which directions fewer of them are.

        Args:
            rank: Directions to keep, of which the landmarks' are the last to go; all when None.

        Returns:
            Their places.
        """
        r = self.rank if rank is None else min(rank, self.rank)
        last = min(self.landmarks, r)
        if not last or r == self.rank:
            return slice(r)
        return torch.cat([torch.arange(r - last), torch.arange(self.rank - last, self.rank)]).to(self.basis.device)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """V, some columns at a time.

        Yields:
            Which they are and the columns, (d, b): here all of them.
        """
        yield slice(self.rank), self.basis

    def output_error(
        self,
        coordinates: Tensor,
        outputs: Sequence[Tensor],
        *,
        least: float = SMALL_MOVE,
        before: Sequence[Tensor] | None = None,
        moved: float = 0.0,
    ) -> float:
        """‖f(θ) - f(θ*) - Φc‖ / ‖Φc‖ over the samples of both sets and the outputs that the loss reads (theory §6).

        A movement of less than a small share of ‖f(θ*)‖ counts as one of that size: its error would be that of rounding.

        Args:
            coordinates: c, shape (r,).
            outputs: The real network's outputs f(θ) for the retain and for the forget samples, shapes (m, ...).
            least: That share.
            before: Outputs where the movement begins, of the same shapes; f(θ*) when None.
            moved: Size of a movement that a smaller one counts as.

        Returns:
            The relative error; infinity where outputs are not finite, 0 where nothing moves.
        """
        wrong, size, gone = 0.0, 0.0, 0.0
        start = (self.retain.outputs, self.forget.outputs) if before is None else before
        for part, real, began in zip((self.retain, self.forget), outputs, start, strict=True):
            with arithmetic("float32"):  # the check is not to inherit what it checks for
                change = (part.features @ coordinates.to(part.features)).double()
            error = real.double().flatten(1) - began.double().flatten(1) - change
            counted = self.loss.counted(part.outputs, part.targets)
            wrong += float((error if counted is None else error.masked_fill(~counted, 0.0)).square().sum())
            gone += float(change.square().sum())
            size += float(part.outputs.double().square().sum())
        if not math.isfinite(wrong):
            return math.inf
        gone = max(gone, least**2 * size, moved**2)
        return math.sqrt(wrong / gone) if gone > 0 else 0.0

    def displacement(self, coordinates: Tensor) -> Tensor:
        """θ - θ* = P^{1/2} V c.

        Args:
            coordinates: c, shape (r,).

        Returns:
            Vector of shape (d,).
        """
        return self.preconditioner.sqrt(self.basis @ coordinates.to(self.basis))

    def movement(self, coordinates: Tensor) -> Tensor:
        """A vector that has in any group of parameters the energy of θ - θ*.

        Args:
            coordinates: c, shape (r,).

        Returns:
            The displacement itself, shape (d,).
        """
        return self.displacement(coordinates)


def given_factors(**factors: Tensor | None) -> frozenset[str]:
    """Names of those that there are.

    Args:
        **factors: Factors of layers by name; None where there are none.

    Returns:
        The names.
    """
    return frozenset(name for name, value in factors.items() if value is not None)
