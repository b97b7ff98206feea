"""Products with the Jacobian of the network's outputs in its parameters, J of shape (m, O, d), which is never held whole.

Two ways to the same product. Forward and reverse mode cost k passes for k vectors. Rows cost O reverse passes, whatever
k is, hold the Jacobian of a few samples at a time, and multiply its O·d numbers with k vectors. They win where a sample has
fewer outputs than there are vectors and its passes use each weight many times, as convolutions do; of fully connected
layers a pass costs no more than a row times a vector.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from stabkit._errors import MemoryWarning
from stabkit._memory import is_out_of_memory, pass_bytes
from stabkit.preconditioner import Preconditioner
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Inputs, Samples, map_tensors, tensors_of

T = TypeVar("T")

ROW_BYTES = 256 * 2**20  # of Jacobian rows held at once, at least
ROWS_OF_LARGE = 4  # samples whose rows are held at once, of a network that has so many parameters that few fit
BLOCK_BYTES = 512 * 2**20  # of parameter-sized vectors held at once by a batched forward or reverse pass, at least
PRODUCT_BATCH = 256


def jvp_block(
    problem: UnlearningProblem, inputs: Inputs, block: Tensor, *, at_once: int | None = None, coupled: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs f and their directional derivatives J V on one batch.

    Args:
        problem: The unlearning problem.
        inputs: Inputs of b samples.
        block: V of shape (d, k).
        at_once: Vectors pushed through together; all when None.
        coupled: Whether the batch is normalised by its own statistics, through which derivatives pass.

    Returns:
        Outputs (b, ...) and J V of shape (b, O, k). Cost: about k forward passes of two.

    Raises:
        RuntimeError: If memory runs out.
    """
    forward = problem.batch_outputs if coupled else problem.outputs

    def function(parameters: Parameters) -> Tensor:
        return forward(parameters, inputs)

    def push(vector: Tensor) -> Tensor:
        return jvp(function, (problem.parameters,), (problem.unflatten(vector),))[1]

    with torch.no_grad():
        outputs = function(problem.parameters)
    try:
        with torch.no_grad():
            chunks = block.split(at_once or block.shape[1], dim=1)
            parts = [vmap(push, in_dims=1, out_dims=-1)(chunk) for chunk in chunks]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # No forward mode, or none in batches: J v as the derivative of u -> J^T u, by reverse mode alone.
        leaves = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
        dummy = torch.zeros_like(outputs, requires_grad=True)
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                function(leaves),
                list(leaves.values()),
                grad_outputs=dummy,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            flat = torch.cat([p.reshape(-1) for p in pulled])
        parts = [torch.autograd.grad(flat, dummy, grad_outputs=v, retain_graph=True)[0].unsqueeze(-1) for v in block.T]
    return outputs, torch.cat(parts, dim=-1).reshape(outputs.shape[0], -1, block.shape[1])


def vjp_block(
    problem: UnlearningProblem, inputs: Inputs, cotangents: Tensor, *, at_once: int | None = None, coupled: bool = False
) -> Tensor:
    """Sum over one batch of J_i^T U_i.

    Args:
        problem: The unlearning problem.
        inputs: Inputs of b samples.
        cotangents: U of shape (b, O, k).
        at_once: Vectors pulled back together; all when None.
        coupled: Whether the batch is normalised by its own statistics, through which derivatives pass.

    Returns:
        Block of shape (d, k). Cost: one forward and k backward passes.

    Raises:
        RuntimeError: If memory runs out.
    """
    forward = problem.batch_outputs if coupled else problem.outputs
    primal = vjp(lambda parameters: forward(parameters, inputs), problem.parameters)
    outputs, pull = primal[0], primal[1]
    result = torch.empty(problem.size, cotangents.shape[2], dtype=problem.dtype, device=problem.device)
    at_once = at_once or cotangents.shape[2]
    for chunk, place in zip(cotangents.split(at_once, dim=2), result.split(at_once, dim=1), strict=True):
        shaped = chunk.reshape(*outputs.shape, chunk.shape[-1])
        try:
            (pulled,) = vmap(pull, in_dims=-1, out_dims=-1)(shaped)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            columns = [pull(u.contiguous())[0] for u in shaped.movedim(-1, 0)]  # one after the other
            pulled = {name: torch.stack([c[name] for c in columns], dim=-1) for name in problem.parameters}
        flat = [pulled[name].detach().reshape(-1, chunk.shape[-1]) for name in problem.parameters]
        place.copy_(torch.cat(flat))
    return result


def jacobian_rows(problem: UnlearningProblem, inputs: Inputs) -> Tensor:
    """Per-sample Jacobians of one small batch.

    Args:
        problem: The unlearning problem.
        inputs: Inputs of b samples.

    Returns:
        Tensor of shape (b, O, d). Cost: one forward and O backward passes a sample; memory b·O·d.

    Raises:
        RuntimeError: If memory runs out.
    """

    def single(parameters: Parameters, sample: Inputs) -> Tensor:
        return problem.outputs(parameters, map_tensors(lambda t: t.unsqueeze(0), sample)).reshape(-1)

    try:
        with torch.no_grad():
            rows = vmap(jacrev(single), in_dims=(None, 0))(problem.parameters, inputs)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # Recurrent layers, masks and control flow that depend on values: sample by sample, and as right.
        count = next(tensors_of(inputs)).shape[0]
        return torch.stack([_rows_of_one(problem, single, inputs, i) for i in range(count)])
    parts = [rows[name].reshape(*rows[name].shape[:2], -1) for name in problem.parameters]
    return torch.cat(parts, dim=2)


def _rows_of_one(
    problem: UnlearningProblem, single: Callable[[Parameters, Inputs], Tensor], inputs: Inputs, index: int
) -> Tensor:
    """Jacobian of one sample, (O, d), by plain reverse mode."""
    leaves = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
    with torch.enable_grad():
        outputs = single(leaves, map_tensors(lambda t: t[index], inputs))
    rows = []
    for output in outputs:
        row = torch.autograd.grad(
            output, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows)


def forward_size(problem: UnlearningProblem, inputs: Inputs) -> tuple[int, int]:
    """How many numbers a forward pass gives and takes.

    Args:
        problem: The unlearning problem.
        inputs: Inputs of the samples.

    Returns:
        Outputs, and floating-point operations of products and convolutions, 2 for a multiplication with its addition; 0
        where PyTorch counts none of the model's. Cost: one forward pass.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = problem.outputs(problem.parameters, inputs)
    return outputs.numel(), int(counter.get_total_flops())


def rows_pay(outputs: int, vectors: int, *, size: int, operations: int) -> bool:
    """Whether a product of J with a block takes less work by J's rows than vector by vector.

    A derivative's pass takes some two forward passes either way, so the work of a sample is 2·O·(F + d·k) or 2·k·F: of fully
    connected layers, F = 2·d, vectors are less for any k that matters, of convolutions rows.

    Args:
        outputs: O.
        vectors: Number k of vectors in the block.
        size: d.
        operations: F, those of one sample's forward pass; 0 where they are not known.

    Returns:
        Whether it does; taken to where F is not known.
    """
    return not operations or outputs * (operations + size * vectors) <= vectors * operations


def row_budget(problem: UnlearningProblem, outputs: int) -> int:
    """How much a pass may hold in rows of J.

    Args:
        problem: The unlearning problem.
        outputs: O.

    Returns:
        Bytes; rows are no way where one sample's O·d numbers are more.
    """
    row = outputs * problem.size * problem.dtype.itemsize
    return pass_bytes(ROW_BYTES, problem.device, wanted=2 * ROWS_OF_LARGE * row)


class ScaledJacobian:
    """J P^{1/2} over chosen samples of one set: (m, O, d), known by its products with blocks.

    Attributes:
        outputs_per_sample: O.
        batch_size: Samples of a pass at most; halved for good where memory runs out, unless batches are coupled.
        counted: Outputs whose rows are to count, booleans of shape (m, O), the others' being taken for zero; all when None.
        reused: Samples that a product took kept rows of, counted once for each product.
    """

    def __init__(
        self,
        problem: UnlearningProblem,
        samples: Samples,
        indices: Tensor,
        preconditioner: Preconditioner,
        *,
        memory: int | None = None,
        coupled: int | None = None,
    ) -> None:
        """Choose the samples.

        Args:
            problem: The unlearning problem.
            samples: Which set.
            indices: Which of its samples, shape (m,).
            preconditioner: P.
            memory: Bytes that a pass may hold in rows of J or in parameter-sized vectors, one of them at least; some hundred
                megabytes when None, more on an accelerator. The network's own activations come on top.
            coupled: Size of the batches that are normalised by their own statistics, b: the samples form, in their order,
                round(m/b) batches as equal as can be, and J is that of their outputs together. None: no sample knows of
                another.
        """
        self._problem = problem
        self._samples = samples
        self._indices = indices
        self._preconditioner = preconditioner
        self.counted: Tensor | None = None
        self.reused = 0
        self._kept: dict[int, Tensor] = {}  # rows by the first sample of their batch
        self._keep_bytes = self._keep_until = 0
        first, _ = samples.batch(indices[:1])
        self.outputs_per_sample, self._operations = forward_size(problem, first)
        rows = row_budget(problem, self.outputs_per_sample)
        block = pass_bytes(BLOCK_BYTES, problem.device)
        self._row_budget = rows if memory is None else min(rows, memory)
        block = block if memory is None else min(block, memory)
        vector = 4 * problem.size * problem.dtype.itemsize  # what a batched pass holds of each
        widest = 4 * problem.widest_output * problem.dtype.itemsize  # and of each sample's outputs, vector by vector
        self.batch_size = max(1, min(PRODUCT_BATCH, block // widest))
        self._at_once = max(1, min(block // vector, block // (self.batch_size * widest)))
        self._coupled = coupled is not None
        self._ends: list[int] = []
        if coupled is not None:
            count, self.batch_size = max(1, round(len(self) / coupled)), coupled
            self._ends = [len(self) * (k + 1) // count for k in range(count)]

    def __len__(self) -> int:
        """Number m of samples."""
        return self._indices.numel()

    def whole_batches(self, count: int) -> int:
        """How many of the first samples to take for at least a number of them, without taking a coupled batch apart.

        Args:
            count: The number.

        Returns:
            It, or the end of the coupled batch that it falls into; m at most.
        """
        return min([end for end in self._ends if end >= count] or [min(count, len(self))])

    def keep_rows(self, first: int, memory: float) -> None:
        """Keep rows of J from one product to the next, where products go by rows.

        Args:
            first: Of how many of the first samples; a batch of rows ends there, whether they are kept or not.
            memory: Bytes that kept rows may take; what is kept beyond them is let go.
        """
        self._keep_until, self._keep_bytes = first, int(memory)
        while self._kept and self._kept_bytes() > self._keep_bytes:
            self._kept.popitem()

    def __matmul__(self, block: Tensor) -> Tensor:
        return torch.cat([part for _, part in self.images(block)])

    def outputs(self) -> Tensor:
        """What J is the Jacobian of.

        Returns:
            Outputs of the m samples, shape (m, ...), without gradients. Cost: m forward passes.
        """
        forward = self._problem.batch_outputs if self._coupled else self._problem.outputs

        def evaluate(inputs: Inputs, place: slice) -> Tensor:
            with torch.no_grad():
                return forward(self._problem.parameters, inputs)

        return torch.cat([part for _, part in self._batches(evaluate, 0, 0)])

    def transpose_matmul(self, cotangents: Tensor) -> Tensor:
        """P^{1/2} J^T U, summed over the samples.

        Args:
            cotangents: U of shape (m, O, k).

        Returns:
            Block of shape (d, k). Cost: O or k backward passes a sample, as `passes` says.
        """
        total = torch.zeros(
            self._problem.size, cotangents.shape[2], dtype=self._problem.dtype, device=self._problem.device
        )
        for _ in self.add_transposed(cotangents, total):
            pass
        return self._preconditioner.sqrt(total)

    def images(self, block: Tensor, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """J P^{1/2} V, batch by batch.

        Args:
            block: V of shape (d, k).
            start: First of the m samples to take.
            stop: The one after the last; all that are left when None.

        Yields:
            Samples done so far and the batch's images, (b, O, k). Cost: O or k passes a sample.
        """
        scaled = self._preconditioner.sqrt(block)

        def image(inputs: Inputs, place: slice) -> Tensor:
            if self.by_rows(block.shape[1]):
                moved = self._rows(inputs, place) @ scaled
            else:
                moved = jvp_block(self._problem, inputs, scaled, at_once=self._at_once, coupled=self._coupled)[1]
            return moved if self.counted is None else moved * self.counted[place].unsqueeze(-1)

        yield from self._batches(image, block.shape[1], start, stop)

    def columns(self, places: Tensor, factors: Tensor) -> Tensor:
        """Columns of J itself, without P^{1/2}.

        Args:
            places: Which of the d parameters, shape (k,).
            factors: What each column is multiplied by, shape (k,).

        Returns:
            Tensor of shape (m, O, k). Cost: O or k passes a sample, by rows wherever they are fewer and fit into memory.
        """
        k = places.numel()

        def pushed(inputs: Inputs, chosen: Tensor) -> Tensor:
            block = torch.zeros(self._problem.size, chosen.numel(), dtype=factors.dtype, device=factors.device)
            block[places[chosen], torch.arange(chosen.numel(), device=block.device)] = factors[chosen]
            return jvp_block(self._problem, inputs, block, coupled=self._coupled)[1]

        def taken(inputs: Inputs, place: slice) -> Tensor:
            if self._rows_are_fewer(k):
                found = jacobian_rows(self._problem, inputs)[..., places] * factors
            else:
                parts = torch.arange(k, device=places.device).split(self._at_once)
                found = torch.cat([pushed(inputs, chosen) for chosen in parts], dim=-1)
            return found if self.counted is None else found * self.counted[place].unsqueeze(-1)

        return torch.cat([part for _, part in self._batches(taken, k, 0, by_rows=self._rows_are_fewer(k))])

    def add_transposed(self, cotangents: Tensor, total: Tensor, start: int = 0) -> Iterator[int]:
        """Add J^T U to a sum, batch by batch; P^{1/2} is left to the caller.

        Args:
            cotangents: U of the first samples, all of them or fewer: shape (m', O, k).
            total: The sum, shape (d, k); changed in place.
            start: First of the m samples to take.

        Yields:
            Samples done so far. Cost: O or k backward passes for each of the m' samples.
        """

        def add(inputs: Inputs, place: slice) -> None:
            chosen = cotangents[place]
            if self.counted is not None:
                chosen = chosen * self.counted[place].unsqueeze(-1)
            if self.by_rows(cotangents.shape[2]):
                rows = self._rows(inputs, place)
                total.addmm_(rows.flatten(0, 1).T, chosen.flatten(0, 1))
            else:
                total.add_(vjp_block(self._problem, inputs, chosen, at_once=self._at_once, coupled=self._coupled))

        for done, _ in self._batches(add, cotangents.shape[2], start, cotangents.shape[0]):
            yield done

    def passes(self, vectors: int) -> int:
        """Passes a sample that one product with a block takes.

        Args:
            vectors: Number k of vectors in the block.

        Returns:
            O where rows fit into memory and are fewer, k otherwise. Vectors that are taken because they are less work than
            O rows count as those.
        """
        return self.outputs_per_sample if self._rows_are_fewer(vectors) else vectors

    def by_rows(self, vectors: int) -> bool:
        """Whether a product goes by rows of the Jacobian.

        Args:
            vectors: Number k of vectors in the block.

        Returns:
            True where that is less work and one sample's rows fit into memory; never where batches are coupled.
        """
        pay = rows_pay(self.outputs_per_sample, vectors, size=self._problem.size, operations=self._operations)
        return pay and self._rows_are_fewer(vectors)

    def _rows_are_fewer(self, vectors: int) -> bool:
        fits = self._row_bytes() <= self._row_budget
        return not self._coupled and self.outputs_per_sample < vectors and fits

    def _rows(self, inputs: Inputs, place: slice) -> Tensor:
        """Rows of one batch, kept ones where there are any, and kept where they are to be."""
        kept = self._kept.get(place.start)
        if kept is not None and len(kept) == place.stop - place.start:
            self.reused += len(kept)
            return kept
        rows = jacobian_rows(self._problem, inputs)
        size = rows.numel() * rows.element_size()
        if place.stop <= self._keep_until and kept is None and self._kept_bytes() + size <= self._keep_bytes:
            self._kept[place.start] = rows
        return rows

    def _kept_bytes(self) -> int:
        """Size of all kept rows."""
        return sum(rows.numel() * rows.element_size() for rows in self._kept.values())

    def _row_bytes(self) -> int:
        """Size of one sample's rows."""
        return self.outputs_per_sample * self._problem.size * self._problem.dtype.itemsize

    def _batches(
        self,
        function: Callable[[Inputs, slice], T],
        vectors: int,
        start: int,
        stop: int | None = None,
        *,
        by_rows: bool | None = None,
    ) -> Iterator[tuple[int, T]]:
        """Samples done and the function's value for every batch; smaller ones, or fewer vectors, where memory runs out."""
        last = len(self) if stop is None else stop
        by_rows = self.by_rows(vectors) if by_rows is None else by_rows
        while start < last:
            size = min(self.batch_size, last - start)
            if self._coupled:
                size = next(end for end in self._ends if end > start) - start
            if by_rows:
                size = max(1, min(size, self._row_budget // (2 * self._row_bytes())))
                if start < self._keep_until:  # the same batches with rows that are kept as without
                    size = min(size, self._keep_until - start)
            place = slice(start, start + size)
            try:
                inputs, _ = self._samples.batch(self._indices[place])
                value = function(inputs, place)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self._kept and (self._at_once if self._coupled else size) == 1:
                    least = f"one vector and {size} samples" if self._coupled else "one sample"
                    raise MemoryError(
                        f"a product of {vectors} vectors with the Jacobian ran out of memory with {least} at a time. "
                        "Lower `rank`, or compute in float32 or on another device."
                    ) from error
            else:
                start = place.stop
                yield start, value
                continue
            # Outside the handler, so that the failed pass's tensors are gone before the next one starts.
            if self._kept:  # these can be had again
                self.keep_rows(self._keep_until, 0)
                continue
            if self._coupled:
                self._at_once = max(1, min(self._at_once, vectors) // 2)
                left = f"{self._at_once} vectors"
            else:
                self.batch_size = size // 2
                left = f"{self.batch_size} samples"
            warnings.warn(
                f"out of memory: products with the Jacobian go on with {left} at a time. The results are the same to "
                "rounding.",
                MemoryWarning,
                stacklevel=2,
            )
