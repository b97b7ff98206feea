"""Terms of a Gram, added block by block to its lower triangle, and what they are computed from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stabkit.curvature.gram.plan import AUTOGRAD, GRAMS, TOKENS, Part, Unit

BLOCK_ROWS = 128  # of the triangle: small blocks skip more above the diagonal, and are still long products


class LowerGram:
    """Symmetric matrix of m samples' C rows each, of which the blocks on and below the diagonal are summed.

    Attributes:
        matrix: The matrix, (m·C, m·C); whole after `finish`.
    """

    def __init__(self, samples: int, directions: int, dtype: torch.dtype, device: torch.device, workspace: int) -> None:
        rows = samples * directions
        self.matrix = torch.zeros(rows, rows, dtype=dtype, device=device)
        self._samples, self._directions = samples, directions
        self._workspace = workspace
        self._block = max(1, min(BLOCK_ROWS, workspace // max(1, 2 * rows)) // directions)

    def add_rows(self, rows: Tensor) -> None:
        """Add X Xᵀ.

        Args:
            rows: X, shape (m·C, q).
        """
        for start, stop in self._blocks():
            self._add(start, stop, 0, stop, rows[start:stop] @ rows[:stop].T)

    def add_grams(self, inputs: Tensor, cotangents: Tensor) -> None:
        """Add Σ_ts (x_t · x_s) (y_t · y_s), group by group.

        Args:
            inputs: (m, groups, a, T).
            cotangents: (m, C, groups, g, T).
        """
        C, T = self._directions, inputs.shape[-1]
        count = max(1, int((self._workspace / (2 * C**2 * T**2)) ** 0.5))
        blocks = [(s, min(s + count, self._samples)) for s in range(0, self._samples, count)]
        for group in range(inputs.shape[1]):
            x = inputs[:, group].transpose(1, 2)  # (m, T, a)
            y = cotangents[:, :, group].transpose(2, 3)  # (m, C, T, g)
            for start, stop in blocks:
                left_x, left_y = x[start:stop].flatten(0, 1), y[start:stop].flatten(0, 2)
                for other, end in blocks:
                    if other > start:
                        break
                    i, j = stop - start, end - other
                    across = (left_y @ y[other:end].flatten(0, 2).T).view(i, C, T, j, C, T)
                    across *= (left_x @ x[other:end].flatten(0, 1).T).view(i, 1, T, j, 1, T)
                    term = across.sum((2, 5)) if T > 1 else across[:, :, 0, :, :, 0]
                    self._add(start * C, stop * C, other * C, end * C, term.reshape(i * C, j * C))

    def add_tokens(self, tokens: Tensor, cotangents: Tensor, root: Tensor | None) -> None:
        """Add an embedding's term: each token's summed output gradients, over the samples that hold it.

        Args:
            tokens: (m, T); -1 where no gradient flows.
            cotangents: (m, C, g, T).
            root: P^{1/2} as (g, rows of the table), or None for ones.
        """
        offsets = torch.arange(self._directions, device=tokens.device)
        for token in tokens.unique().tolist():
            if token < 0:
                continue
            hits = tokens == token
            holders = hits.any(1).nonzero().squeeze(1)
            weights = hits[holders].to(cotangents.dtype)
            rows = torch.einsum("mcgt,mt->mcg", cotangents[holders], weights)
            if root is not None:
                rows = rows * root[:, token]
            rows = rows.flatten(0, 1)
            where = (holders.unsqueeze(1) * self._directions + offsets).reshape(-1)
            for chunk, left in zip(where.split(BLOCK_ROWS), rows.split(BLOCK_ROWS), strict=True):
                block = (left @ rows.T).to(self.matrix.dtype)
                self.matrix.index_put_((chunk.unsqueeze(1), where.unsqueeze(0)), block, accumulate=True)

    def finish(self) -> Tensor:
        """Mirror the lower triangle.

        Returns:
            The whole matrix, exactly symmetric.
        """
        for start, stop in self._blocks():
            self.matrix[:start, start:stop] = self.matrix[start:stop, :start].T
            block = self.matrix[start:stop, start:stop]
            block.copy_(block.tril() + block.tril(-1).T)
        return self.matrix

    def _add(self, start: int, stop: int, left: int, right: int, term: Tensor) -> None:
        self.matrix[start:stop, left:right] += term.to(self.matrix.dtype)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        size = self._block * self._directions
        for start in range(0, self.matrix.shape[0], size):
            yield start, min(start + size, self.matrix.shape[0])


class Held:
    """What one part keeps of all samples during a pass, and its term of the Gram afterwards."""

    def __init__(self, part: Part, samples: int, directions: int, dtype: torch.dtype, device: torch.device) -> None:
        unit = part.unit
        self.part = part
        self._inputs: Tensor | None = None
        if unit.hold_gradients:
            shape: tuple[int, ...] = (samples, directions, part.width * unit.piece_size)
        elif unit.groups > 1:
            shape = (samples, directions, part.width, unit.features, unit.positions)
        else:
            shape = (samples, directions, 1, part.width, unit.positions)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        if not unit.hold_gradients:
            tokens = unit.method == TOKENS
            groups = part.width if unit.groups > 1 else 1
            inputs = (samples, unit.positions) if tokens else (samples, groups, unit.inputs, unit.positions)
            self._inputs = torch.empty(inputs, dtype=torch.int64 if tokens else dtype, device=device)

    def put(self, rows: slice, columns: slice, inputs: Tensor | None, cotangents: Tensor) -> None:
        """Keep one batch in some directions.

        Args:
            rows: Its samples.
            columns: Its directions.
            inputs: (b, groups, a, T), (b, T) for tokens, None for "autograd".
            cotangents: (b, c, groups, g, T), or the gradients (b, c, p) for "autograd".
        """
        part = self.part
        if part.unit.method == AUTOGRAD:
            self._values[rows, columns] = cotangents[..., part.start : part.stop]
            return
        assert inputs is not None
        inputs, cotangents = cut(part, inputs, cotangents)
        if part.unit.hold_gradients:
            self._values[rows, columns] = form(inputs, cotangents).flatten(2)
            return
        assert self._inputs is not None
        self._inputs[rows] = inputs
        self._values[rows, columns] = cotangents

    def contribute(self, gram: LowerGram, root: Tensor | float, workspace: int) -> None:
        """Add this part's term.

        Args:
            gram: Where to.
            root: P^{1/2} of the whole unit, (groups, g, a), or one number for all of it.
            workspace: Numbers that may be held meanwhile.
        """
        unit, values, inputs = self.part.unit, self._values, self._inputs
        if inputs is None:
            rows = values.flatten(0, 1)
            rows *= root if isinstance(root, float) else _part_root(self.part, root).reshape(-1)
            gram.add_rows(rows)
        elif unit.method == GRAMS:  # P is constant over the weight and over the bias: it scales the inputs
            inputs *= root if isinstance(root, float) else _part_root(self.part, root)[:, 0, :, None]
            gram.add_grams(inputs, values)
        elif unit.method == TOKENS:
            if isinstance(root, float):
                values *= root
            gram.add_tokens(
                inputs, values.squeeze(2), None if isinstance(root, float) else _part_root(self.part, root)[0]
            )
        else:
            width = max(1, workspace // (values.shape[0] * values.shape[1] * unit.piece_size))
            for start in range(0, self.part.width, width):
                piece = Part(unit, start, min(start + width, self.part.width))
                rows = form(*cut(piece, inputs, values)).flatten(2).flatten(0, 1)
                if isinstance(root, float):
                    rows *= root
                else:
                    absolute = Part(unit, self.part.start + piece.start, self.part.start + piece.stop)
                    rows *= _part_root(absolute, root).reshape(-1)
                gram.add_rows(rows)
                del rows  # before the next ones are formed


def cut(part: Part, inputs: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """The part's pieces of inputs (b, groups, a, T) and output gradients (b, c, groups, g, T)."""
    if part.unit.groups > 1:
        return inputs[:, part.start : part.stop], cotangents[:, :, part.start : part.stop]
    return inputs, cotangents[:, :, :, part.start : part.stop]


def form(inputs: Tensor, cotangents: Tensor) -> Tensor:
    """Per-sample gradients Σ_t y_t x_tᵀ, (b, c, groups, g, a)."""
    return torch.einsum("bcngt,bnat->bcnga", cotangents, inputs)


def join(positions: list[Tensor]) -> Tensor:
    """All calls' positions, the last axis, after each other."""
    return positions[0] if len(positions) == 1 else torch.cat(positions, -1)


def unit_inputs(unit: Unit, inputs: list[Tensor]) -> Tensor:
    """Inputs of all calls at all positions, with the bias's ones below: (b, groups, a, T)."""
    joined = join(inputs)
    if unit.method == TOKENS or unit.bias is None:
        return joined
    ones = joined.new_ones(joined.shape[0], joined.shape[1], 1, joined.shape[3])
    return ones if unit.weight is None else torch.cat([joined, ones], 2)


def _part_root(part: Part, root: Tensor) -> Tensor:
    if part.unit.groups > 1 or (part.unit.method == AUTOGRAD and root.dim() == 1):
        return root[part.start : part.stop]
    return root[:, part.start : part.stop]
