"""A linearisation whose directions are not held: V = P^{1/2} Jᵀ U + E C, known by its products, each a walk over samples.

Of a network with so many parameters that r vectors of them do not fit into memory. The directions are those that a held
basis has: U is of the samples that they are drawn from, and the few columns of E are the mean gradients and the landmarks.
VᵀV and the like follow from pushed columns, (P^{1/2} Jᵀ U)ᵀ x = Uᵀ J P^{1/2} x, so that a few columns at a time are all
that there ever is. Directions whose share of the squared sensitivity a Gram matrix cannot tell from rounding are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stabkit._memory import pass_bytes
from stabkit.curvature.jacobian import BLOCK_BYTES, ScaledJacobian
from stabkit.curvature.linearised import LinearisedNetwork
from stabkit.curvature.orthonormal import ROWS_AT_ONCE, rotated
from stabkit.curvature.sketch import PROBES, gaussian_columns, random_signs
from stabkit.preconditioner import Identity, Preconditioner

COPIES = 6  # that a walk holds of each column of a block: the block, its root, and what the passes need
# Eigenvalues of a Gram matrix up to so many times the rounding unit of the largest one are rounding: of a first round in
# float32 all directions that are sensitive to less than a hundred-thousandth of the leading one's square.
FLOOR = 100.0


def columns_at_once(size: int, like: Tensor) -> int:
    """How many parameter-sized columns a walk takes.

    Args:
        size: Number d of parameters.
        like: A tensor with their dtype and on their device.

    Returns:
        Columns, at least 1.
    """
    return max(1, pass_bytes(BLOCK_BYTES, like.device) // (COPIES * size * like.element_size()))


@dataclass(frozen=True, eq=False)
class PulledBasis:
    """Columns V = P^{1/2} Jᵀ U + E C, of which a few at a time are made.

    Attributes:
        jacobians: J P^{1/2} of the retain and of the forget set.
        cotangents: U of the first samples of either set, shapes (m', O, r).
        beside: E, shape (d, e).
        mixing: C, shape (e, r).
        preconditioner: P.
    """

    jacobians: tuple[ScaledJacobian, ...]
    cotangents: tuple[Tensor, ...]
    beside: Tensor
    mixing: Tensor
    preconditioner: Preconditioner

    @property
    def rank(self) -> int:
        """Number r of columns."""
        return self.mixing.shape[1]

    def turned(self, rotation: Tensor) -> PulledBasis:
        """Other columns of the same span.

        Args:
            rotation: Shape (r, r').

        Returns:
            V times it.
        """
        turned = [(u.double() @ rotation.to(u.device)).to(u) for u in self.cotangents]
        return replace(
            self,
            cotangents=tuple(turned),
            mixing=(self.mixing.double() @ rotation.to(self.mixing.device)).to(self.mixing),
        )

    def kept(self, columns: slice | Tensor) -> PulledBasis:
        """Some of the columns.

        Args:
            columns: Which.

        Returns:
            They.
        """
        return replace(self, cotangents=tuple(u[..., columns] for u in self.cotangents), mixing=self.mixing[:, columns])

    def times(self, coefficients: Tensor) -> Tensor:
        """V times few columns of coefficients.

        Args:
            coefficients: Shape (r, b).

        Returns:
            Shape (d, b). Cost: a pull of b vectors over the samples that directions are drawn from.
        """
        coefficients = coefficients.to(self.beside)
        total = self.beside.new_zeros(self.beside.shape[0], coefficients.shape[1])
        for jacobian, u in zip(self.jacobians, self.cotangents, strict=True):
            for _ in jacobian.add_transposed(u @ coefficients, total):
                pass
        return torch.addmm(self.preconditioner.sqrt(total), self.beside, self.mixing @ coefficients)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All columns, a few at a time.

        Yields:
            Which they are and the columns, (d, b). Cost: as `times` has it.
        """
        at_once = columns_at_once(self.beside.shape[0], self.beside)
        for place in _places(self.rank, at_once):
            unit = torch.zeros(self.rank, place.stop - place.start, dtype=self.beside.dtype, device=self.beside.device)
            unit[place] = torch.eye(place.stop - place.start, dtype=unit.dtype, device=unit.device)
            yield place, self.times(unit)

    def inner(self, block: Tensor) -> Tensor:
        """Vᵀ times a block.

        Args:
            block: Shape (d, b).

        Returns:
            Shape (r, b), float64. Cost: a push of b vectors over the samples that directions are drawn from.
        """
        images = [
            torch.cat([part for _, part in jacobian.images(block, 0, len(u))])
            for jacobian, u in zip(self.jacobians, self.cotangents, strict=True)
        ]
        return self.inner_of(block, images)

    def inner_of(self, block: Tensor, images: Sequence[Tensor]) -> Tensor:
        """The same of a block that has been pushed.

        Args:
            block: Shape (d, b).
            images: J P^{1/2} times it, of the samples that directions are drawn from at least, shapes (m, O, b).

        Returns:
            Shape (r, b), float64.
        """
        found = self.mixing.T.double() @ (self.beside.T @ block).double()
        for u, image in zip(self.cotangents, images, strict=True):
            for few, pushed in zip(u.split(256), image[: len(u)].split(256), strict=True):
                found += few.flatten(0, 1).T.double() @ pushed.flatten(0, 1).double()
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class MatrixFreeNetwork(LinearisedNetwork):
    """Both sets in the same compressed coordinates, V known by its products: `basis` has no rows.

    Attributes:
        directions: V.
    """

    directions: PulledBasis

    @cached_property
    def _found(self) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """Products with a mask or with signs, which every rollout asks for: by kind and vector, with the vector itself."""
        return {}

    def _once(self, kind: str, vector: Tensor, product: Callable[[], Tensor]) -> Tensor:
        """A product that is made the first time that it is asked for."""
        key = kind, id(vector)
        known = self._found.get(key)
        if known is None or known[0] is not vector:
            known = self._found[key] = vector, product()
        return known[1]

    @property
    def parameters(self) -> int:
        """Number d of parameters."""
        return self.directions.beside.shape[0]

    @property
    def displacement_gradients(self) -> float:
        """Per-sample gradients that a displacement takes."""
        return float(sum(map(len, self.directions.cotangents)))

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """V, a few columns at a time.

        Yields:
            Which they are and the columns, (d, b). Cost: r passes over the samples that directions are drawn from.
        """
        yield from self.directions.blocks()

    def masked(self, mask: Tensor) -> Tensor:
        """What a mask does to a gradient in the coordinates, where P = I.

        Args:
            mask: Shape (d,).

        Returns:
            V^T M V, shape (r, r). Cost: r pulls and pushes over the samples that directions are drawn from, once for a mask.
        """

        def product() -> Tensor:
            found = torch.empty(self.rank, self.rank, dtype=torch.float64, device=self.basis.device)
            for place, block in self.columns():
                found[:, place] = self.directions.inner(block * mask.to(block).unsqueeze(1))
            return ((found + found.T) / 2).to(self.basis)

        return self._once("mask", mask, product)

    def gradient_along(self, vector: Tensor) -> Tensor:
        """A gradient in the coordinates, where P = I.

        Args:
            vector: Shape (d,).

        Returns:
            V^T u, shape (r,). Cost: one push over the samples that directions are drawn from, once for a vector.
        """
        return self._once(
            "gradient",
            vector,
            lambda: self.directions.inner(vector.to(self.basis).unsqueeze(1)).squeeze(1).to(self.basis),
        )

    def inside(self, vector: Tensor) -> Tensor:
        """Coordinates of a direction of the preconditioned problem.

        Args:
            vector: Shape (d,).

        Returns:
            V^T v, shape (r,), float64 on the CPU. Cost: one push over the samples that directions are drawn from.
        """
        return self.directions.inner(vector.to(self.basis).unsqueeze(1)).squeeze(1).cpu()

    def displacement(self, coordinates: Tensor) -> Tensor:
        """θ - θ* = P^{1/2} V c.

        Args:
            coordinates: c, shape (r,).

        Returns:
            Vector of shape (d,). Cost: one pull over the samples that directions are drawn from.
        """
        return self.preconditioner.sqrt(self.directions.times(coordinates.to(self.basis).unsqueeze(1)).squeeze(1))

    def thinned(self, *, rank: int | None = None, samples: float = 1.0) -> MatrixFreeNetwork:
        """The leading directions and a random part of the samples.

        Args:
            rank: Directions to keep, of which the landmarks' are the last to go; all when None.
            samples: Part of the samples to keep, as of any linearised network.

        Returns:
            The smaller network.
        """
        found = super().thinned(rank=rank, samples=samples)
        assert isinstance(found, MatrixFreeNetwork)  # as `replace` keeps the class
        kept = self.kept_columns(rank)
        found = replace(found, directions=self.directions.kept(kept))
        for key, (vector, product) in self._found.items():
            found._found[key] = vector, product[kept][:, kept] if key[0] == "mask" else product[kept]
        return found


class PulledSketch:
    """What `RowSketch` finds, without holding it: the same random columns, pulled and pushed a few at a time.

    Two rounds: the first finds what makes the columns orthonormal, from their Gram matrix; the second takes these, which
    rounding leaves nearly so, and pushes them through all samples.

    Attributes:
        features: J P^{1/2} V of the retain and of the forget set, shapes (m, O, c).
        basis: V.
        probes: Root mean square of the probes, shape (d, 1).
        metrics: VᵀP^{1/2} diag(w) P^{1/2}V for each of the weights w asked for, shape (c, c), float64.
        anchors: VᵀP^{1/2} u for each of the vectors u asked for, shape (c,), float64.
        probed: Vᵀ times the probes, shape (c, 2·PROBES), and their squared norms, float64.
        gradients: Per-sample gradients spent.
    """

    features: list[Tensor]
    basis: PulledBasis
    probes: Tensor
    metrics: list[Tensor]
    anchors: list[Tensor]
    probed: tuple[Tensor, Tensor]

    def __init__(
        self,
        jacobians: Sequence[ScaledJacobian],
        residuals: Sequence[Tensor],
        preconditioner: Preconditioner,
        like: Tensor,
        *,
        landmarks: Tensor,
        drawn_from: Sequence[int],
        weights: Sequence[Tensor | None],
        anchors: Sequence[Tensor],
        seed: int,
    ) -> None:
        """Begin with nothing.

        Args:
            jacobians: J P^{1/2} of the retain and of the forget set.
            residuals: Derivatives of the losses in the outputs, shapes (m, O).
            preconditioner: P.
            like: A vector (d,) with the dtype and on the device to compute in.
            landmarks: Columns (d, l) that the basis is to span besides.
            drawn_from: How many of the first samples of either set directions are drawn from.
            weights: Entries w of the metrics to find, shape (d,); None for all ones.
            anchors: Vectors (d,) whose products with P^{1/2} V to find.
            seed: Seed of signs and Gaussian columns.
        """
        self._jacobians, self._residuals, self._preconditioner = tuple(jacobians), residuals, preconditioner
        self._like, self._landmarks, self._drawn_from = like, landmarks, tuple(drawn_from)
        self._weights, self._anchors = weights, anchors
        self._generator = torch.Generator().manual_seed(seed)
        self.gradients = 0.0

    def columns_to_walk(self, width: int) -> int:
        """Columns that both rounds take.

        Args:
            width: Gaussian columns.

        Returns:
            Their number, where none is found to be rounding.
        """
        return 2 * width + 2 + self._landmarks.shape[1]

    def grow(self, width: int) -> Iterator[int]:
        """Find everything.

        Args:
            width: Gaussian columns.

        Yields:
            Columns that have been done.
        """
        shapes = [(n, j.outputs_per_sample) for n, j in zip(self._drawn_from, self._jacobians, strict=True)]
        signs = [random_signs(shape, self._generator).to(self._like) for shape in shapes]
        normal = gaussian_columns(shapes, width, self._generator, self._like)
        beside = torch.cat([*self._mean_gradients(), self._landmarks], 1)
        whole = self._probed(signs)

        raw = self._basis(normal, beside, beside.new_zeros(beside.shape[1], width))
        gram = torch.empty(width + beside.shape[1], width + beside.shape[1], dtype=torch.float64, device=beside.device)
        gram[width:, width:] = _product(beside, beside)
        for place, block in raw.blocks():
            gram[:width, place] = raw.inner(block)
            gram[width:, place] = _product(beside, block)
            self.gradients += self._cost(block.shape[1], pushes=1)
            yield block.shape[1]
        gram[:width, width:] = gram[width:, :width].T
        mixed = _orthonormalising(gram, torch.finfo(self._like.dtype).eps)
        first = raw.turned(mixed[:width])
        yield from self._pushed(replace(first, mixing=mixed[width:].to(beside)), signs, whole)

    def _mean_gradients(self) -> list[Tensor]:
        """P^{1/2} times the mean gradient of either set, (d, 1), over all samples."""
        found = []
        for jacobian, residual in zip(self._jacobians, self._residuals, strict=True):
            found.append(jacobian.transpose_matmul(residual.unsqueeze(2) / len(residual)))
            self.gradients += len(jacobian) * jacobian.passes(1)
        return found

    def _probed(self, signs: Sequence[Tensor]) -> Tensor:
        """Squared norms of the probes P^{1/2} Jᵀu, of either set, which are not kept: shape (2·PROBES,), float64."""
        squares = self._like.new_zeros(self._like.numel())
        norms = []
        for jacobian, u in zip(self._jacobians, signs, strict=True):
            for few in u.split(columns_at_once(self._like.numel(), self._like), dim=2):
                probes = jacobian.transpose_matmul(few)
                norms.append(torch.linalg.vector_norm(probes, dim=0, dtype=torch.float64).square())
                squares += probes.square().sum(1)
                self.gradients += len(u) * jacobian.passes(few.shape[2])
        self.probes = squares.sqrt().unsqueeze(1) / (2 * PROBES) ** 0.5
        return torch.cat(norms)

    def _pushed(self, basis: PulledBasis, signs: Sequence[Tensor], whole: Tensor) -> Iterator[int]:
        """Features of all samples and whatever else is found of the columns, which are made orthonormal once more."""
        r, like = basis.rank, self._like.new_empty(0, dtype=torch.float64)
        gram, metrics = like.new_empty(r, r), [like.new_empty(r, r) for _ in self._weights]
        anchors = [like.new_empty(r) for _ in self._anchors]
        features = [self._like.new_empty(len(j), j.outputs_per_sample, r) for j in self._jacobians]
        for place, block in basis.blocks():
            for jacobian, found in zip(self._jacobians, features, strict=True):
                start = 0
                for done, part in jacobian.images(block):
                    found[start:done, :, place], start = part, done
                self.gradients += len(jacobian) * jacobian.passes(block.shape[1])
            gram[:, place] = basis.inner_of(block, [found[..., place] for found in features])
            root = self._preconditioner.sqrt(block)
            for metric, w in zip(metrics, self._weights, strict=True):
                metric[:, place] = gram[:, place] if self._plain(w) else basis.inner(self._weighted(root, w))
            for anchor, u in zip(anchors, self._anchors, strict=True):
                anchor[place] = (root.T @ u).double()
            again = sum(not self._plain(w) for w in self._weights)
            self.gradients += self._cost(block.shape[1], pushes=again)
            yield block.shape[1]
        turn = _orthonormalising(gram, torch.finfo(self._like.dtype).eps)
        self.basis = basis.turned(turn)
        self.features = [rotated(found, turn) for found in features]
        self.metrics = [turn.T @ ((m + m.T) / 2) @ turn for m in metrics]
        self.anchors = [turn.T @ anchor for anchor in anchors]
        inside = [
            found[: len(u)].flatten(0, 1).T @ u.flatten(0, 1) for found, u in zip(self.features, signs, strict=True)
        ]
        self.probed = torch.cat(inside, 1).double(), whole

    def _plain(self, w: Tensor | None) -> bool:
        """Whether a metric is VᵀV."""
        return w is None and isinstance(self._preconditioner, Identity)

    def _weighted(self, root: Tensor, w: Tensor | None) -> Tensor:
        """P^{1/2} diag(w) of P^{1/2} times a block."""
        return self._preconditioner.sqrt(root if w is None else root * w.to(root).unsqueeze(1))

    def _cost(self, columns: int, *, pushes: int) -> float:
        """Per-sample gradients of a pull of so many columns, and pushes, over the samples that directions are drawn from."""
        pairs = zip(self._jacobians, self._drawn_from, strict=True)
        return float((1 + pushes) * sum(count * j.passes(columns) for j, count in pairs))

    def _basis(self, cotangents: Sequence[Tensor], beside: Tensor, mixing: Tensor) -> PulledBasis:
        return PulledBasis(
            jacobians=self._jacobians,
            cotangents=tuple(cotangents),
            beside=beside,
            mixing=mixing,
            preconditioner=self._preconditioner,
        )

    def against(self, vectors: Tensor) -> Tensor:
        """Vᵀ times columns.

        Args:
            vectors: Shape (d, l).

        Returns:
            Shape (c, l), float64. Cost: a push of l vectors over the samples that directions are drawn from.
        """
        self.gradients += sum(
            n * j.passes(vectors.shape[1]) for j, n in zip(self._jacobians, self._drawn_from, strict=True)
        )
        return self.basis.inner(vectors)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """AᵀB in float64, of which there is never a whole copy."""
    found = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True):
        found += left.double().T @ right.double()
    return found


def _orthonormalising(gram: Tensor, eps: float) -> Tensor:
    """W with WᵀGW = I, shape (c, c'), of what is not rounding in a Gram matrix of columns of any lengths; 0 where all is."""
    sizes = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(sizes > 0, 1 / sizes, 0.0)
    values, vectors = torch.linalg.eigh(inverse.unsqueeze(1) * gram * inverse)
    if not bool(values[-1] > 0):  # nothing is sensitive; as of a basis that is held, one direction is left
        return torch.zeros_like(gram[:, :1])
    keep = values > FLOOR * eps * values[-1]
    return inverse.unsqueeze(1) * vectors[:, keep] / values[keep].sqrt()


def _places(count: int, at_once: int) -> Iterator[slice]:
    """Slices of so many columns."""
    for start in range(0, count, at_once):
        yield slice(start, min(start + at_once, count))
