"""Products with the Jacobian of the network's outputs in its parameters, J of shape (m, O, d), which is never held whole.

Two ways to the same product. Forward and reverse mode cost k passes for k vectors. Rows cost O reverse passes, whatever
k is, and hold the Jacobian of a few samples at a time; they win when a sample has fewer outputs than there are vectors.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

from stabkit.preconditioner import Preconditioner
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Inputs, Samples, map_tensors, tensors_of

ROW_BYTES = 256 * 2**20  # of Jacobian rows held at once
BLOCK_BYTES = 512 * 2**20  # of parameter-sized vectors held at once by a batched forward or reverse pass
PRODUCT_BATCH = 256


def _vectors_at_once(problem: UnlearningProblem) -> int:
    return max(1, BLOCK_BYTES // (4 * problem.size * problem.dtype.itemsize))


def jvp_block(problem: UnlearningProblem, inputs: Inputs, block: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs f and their directional derivatives J V on one batch.

    Args:
        problem: The unlearning problem.
        inputs: Inputs of b samples.
        block: V of shape (d, k).

    Returns:
        Outputs (b, ...) and J V of shape (b, O, k). Cost: about k forward passes of two.
    """

    def function(parameters: Parameters) -> Tensor:
        return problem.outputs(parameters, inputs)

    def push(vector: Tensor) -> Tensor:
        return jvp(function, (problem.parameters,), (problem.unflatten(vector),))[1]

    with torch.no_grad():
        outputs = function(problem.parameters)
    try:
        with torch.no_grad():
            chunks = block.split(_vectors_at_once(problem), dim=1)
            parts = [vmap(push, in_dims=1, out_dims=-1)(chunk) for chunk in chunks]
    except RuntimeError:
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


def vjp_block(problem: UnlearningProblem, inputs: Inputs, cotangents: Tensor) -> Tensor:
    """Sum over one batch of J_i^T U_i.

    Args:
        problem: The unlearning problem.
        inputs: Inputs of b samples.
        cotangents: U of shape (b, O, k).

    Returns:
        Block of shape (d, k). Cost: one forward and k backward passes.
    """
    primal = vjp(lambda parameters: problem.outputs(parameters, inputs), problem.parameters)
    outputs, pull = primal[0], primal[1]
    parts = []
    for chunk in cotangents.split(_vectors_at_once(problem), dim=2):
        shaped = chunk.reshape(*outputs.shape, chunk.shape[-1])
        try:
            (pulled,) = vmap(pull, in_dims=-1, out_dims=-1)(shaped)
        except RuntimeError:
            columns = [pull(u.contiguous())[0] for u in shaped.movedim(-1, 0)]  # one after the other
            pulled = {name: torch.stack([c[name] for c in columns], dim=-1) for name in problem.parameters}
        parts.append(torch.cat([pulled[name].reshape(-1, chunk.shape[-1]) for name in problem.parameters]))
    return torch.cat(parts, dim=1).detach()


def jacobian_rows(problem: UnlearningProblem, inputs: Inputs) -> Tensor:
    """Per-sample Jacobians of one small batch.

    Args:
        problem: The unlearning problem.
        inputs: Inputs of b samples.

    Returns:
        Tensor of shape (b, O, d). Cost: one forward and O backward passes a sample; memory b·O·d.
    """

    def single(parameters: Parameters, sample: Inputs) -> Tensor:
        return problem.outputs(parameters, map_tensors(lambda t: t.unsqueeze(0), sample)).reshape(-1)

    try:
        with torch.no_grad():
            rows = vmap(jacrev(single), in_dims=(None, 0))(problem.parameters, inputs)
    except RuntimeError:
        # Recurrent layers, masks and control flow that depend on values: sample by sample, and as right.
        count = next(tensors_of(inputs)).shape[0]
        return torch.stack([_rows_of_one(problem, single, inputs, i) for i in range(count)])
    parts = [rows[name].flatten(2) for name in problem.parameters]
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


class ScaledJacobian:
    """J P^{1/2} over chosen samples of one set: (m, O, d), known by its products with blocks.

    Attributes:
        outputs_per_sample: O.
    """

    def __init__(
        self, problem: UnlearningProblem, samples: Samples, indices: Tensor, preconditioner: Preconditioner
    ) -> None:
        self._problem = problem
        self._samples = samples
        self._indices = indices
        self._preconditioner = preconditioner
        first, _ = samples.batch(indices[:1])
        self.outputs_per_sample = problem.outputs(problem.parameters, first).numel()

    def __matmul__(self, block: Tensor) -> Tensor:
        scaled = self._preconditioner.sqrt(block)
        if self.by_rows(block.shape[1]):
            return torch.cat([rows @ scaled for rows, _ in self._rows()])
        parts = [
            jvp_block(self._problem, inputs, scaled)[1]
            for inputs, _ in self._samples.batches(PRODUCT_BATCH, self._indices)
        ]
        return torch.cat(parts)

    def transpose_matmul(self, cotangents: Tensor) -> Tensor:
        """P^{1/2} J^T U, summed over the samples.

        Args:
            cotangents: U of shape (m, O, k).

        Returns:
            Block of shape (d, k). Cost: min(O, k) backward passes a sample.
        """
        k = cotangents.shape[2]
        total = torch.zeros(self._problem.size, k, dtype=self._problem.dtype, device=self._problem.device)
        start = 0
        if self.by_rows(k):
            for rows, count in self._rows():
                total += rows.flatten(0, 1).T @ cotangents[start : start + count].flatten(0, 1)
                start += count
        else:
            for inputs, targets in self._samples.batches(PRODUCT_BATCH, self._indices):
                count = targets.shape[0]
                total += vjp_block(self._problem, inputs, cotangents[start : start + count])
                start += count
        return self._preconditioner.sqrt(total)

    def by_rows(self, vectors: int) -> bool:
        """Whether a product goes by rows of the Jacobian.

        Args:
            vectors: Number k of vectors in the block.

        Returns:
            True where that takes fewer passes, O instead of k, and one sample's rows fit into memory.
        """
        row_bytes = self.outputs_per_sample * self._problem.size * self._problem.dtype.itemsize
        return self.outputs_per_sample < vectors and row_bytes <= ROW_BYTES

    def _rows(self) -> Iterator[tuple[Tensor, int]]:
        row_bytes = self.outputs_per_sample * self._problem.size * self._problem.dtype.itemsize
        for inputs, targets in self._samples.batches(max(1, ROW_BYTES // (2 * row_bytes)), self._indices):
            yield jacobian_rows(self._problem, inputs), targets.shape[0]
