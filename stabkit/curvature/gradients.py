"""Gradients at θ*: of single samples, a block at a time, and their mean over a set."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor
from torch.func import grad, vmap

from stabkit._memory import is_out_of_memory, pass_bytes
from stabkit.precision import float32_by_default
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Inputs, Samples, checked_indices, map_tensors

GRADIENT_BYTES = 256 * 2**20  # of per-sample gradients held at once, at least
SQUARED_BYTES = 2**20  # of them, in double precision, that are squared at once, at least: they stay in a CPU's caches
MEAN_BATCH = 256


@float32_by_default()
def mean_gradient(problem: UnlearningProblem, samples: Samples, *, indices: Tensor | None = None) -> Tensor:
    """ḡ_S.

    Args:
        problem: The unlearning problem.
        samples: The set S.
        indices: Which of its samples; all when None.

    Returns:
        Vector of shape (d,) in the problem's dtype. Cost: one gradient a sample, in batches.
    """
    indices = checked_indices(samples, indices, owner="mean_gradient")
    total = torch.zeros(problem.size, dtype=torch.float64, device=problem.device)
    for inputs, targets in samples.batches(MEAN_BATCH, indices):
        leaves = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
        with torch.enable_grad():
            losses = problem.loss.per_sample(problem.outputs(leaves, inputs), targets)
            found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        total += problem.flatten(dict(zip(leaves, found, strict=True))).double()
    return (total / indices.numel()).to(problem.dtype)


def gradient_blocks(
    problem: UnlearningProblem,
    samples: Samples,
    indices: Tensor | None = None,
    *,
    cotangents: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of ℓ_i at θ*, or of u_i·f_i, for one block of samples after another.

    Args:
        problem: The unlearning problem.
        samples: The set.
        indices: Which of its samples; all when None.
        cotangents: u_i for each of them, of the outputs' shape (m, ...); the loss's gradients when None.

    Yields:
        Gradients by parameter name, each of shape (b, *parameter), detached; at most 256 MiB of them, or one sample's,
        and more on an accelerator. Cost: one gradient a sample. What cannot be batched over samples goes one by one.

    Raises:
        RuntimeError: If memory runs out.
    """

    def single(parameters: Parameters, sample: Inputs, target: Tensor) -> Tensor:
        outputs = problem.outputs(parameters, map_tensors(lambda t: t.unsqueeze(0), sample))
        if cotangents is not None:  # which then take the targets' place
            return (outputs * target).sum()
        return problem.loss.per_sample(outputs, target.unsqueeze(0)).sum()

    per_sample = vmap(grad(single), in_dims=(None, 0, 0))
    batch = max(1, pass_bytes(GRADIENT_BYTES, problem.device) // (2 * problem.size * problem.dtype.itemsize))
    done = 0
    for inputs, targets in samples.batches(batch, indices):
        if cotangents is not None:
            targets = cotangents[done : done + targets.shape[0]]
            done += targets.shape[0]
        with float32_by_default():
            try:
                gradients = per_sample(problem.parameters, inputs, targets)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                singles = [
                    grad(single)(problem.parameters, map_tensors(itemgetter(i), inputs), targets[i])
                    for i in range(targets.shape[0])
                ]
                gradients = {name: torch.stack([s[name] for s in singles]) for name in problem.parameters}
        yield {name: g.detach() for name, g in gradients.items()}


def summed_squares(problem: UnlearningProblem, block: Parameters) -> Tensor:
    """Σ_i g_i ∘ g_i of a block of `gradient_blocks`.

    Args:
        problem: The unlearning problem.
        block: Gradients by parameter name, each of shape (b, *parameter).

    Returns:
        Vector of shape (d,), float64. Memory: a few samples' gradients in double precision.
    """
    sums = {}
    for name, gradients in block.items():
        rows = max(1, pass_bytes(SQUARED_BYTES, problem.device) // (8 * max(1, gradients[0].numel())))
        total = torch.zeros(gradients.shape[1:], dtype=torch.float64, device=gradients.device)
        for some in gradients.split(rows):
            total += some.double().square().sum(0)
        sums[name] = total
    return problem.flatten(sums)
