"""Parameters on which the outputs do not depend at θ*, but may once others have moved: adapters and gates that begin at 0.

A network linearised at θ* never moves them, and its outputs stay right while its gradient does not: of a low-rank adapter
B A with B = 0 only B moves, and what A adds to the curvature grows unseen (theory §6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabkit.curvature.linearised import LinearisedNetwork
from stabkit.problem import Parameters, UnlearningProblem

DORMANT = 1e-4  # sensitivity of a parameter, as a share of the mean, below which its tensor counts as dormant
SAMPLES = 64  # of each set
SEED = 0


def dormant_tensors(problem: UnlearningProblem, probes: Tensor) -> tuple[str, ...]:
    """Tensors whose parameters hardly move the outputs at θ*.

    Args:
        problem: The unlearning problem.
        probes: P^{1/2} J^T u of random signs u, shape (d, k), whose squares' mean is the sensitivity to each parameter.

    Returns:
        Their names; tensors that nothing uses are among them.
    """
    sensitivity = torch.linalg.vector_norm(probes, dim=1).double().square() / probes.shape[1]
    parts = problem.unflatten(sensitivity)
    means = torch.stack([part.mean() for part in parts.values()]).tolist()  # at once: each would be waited for
    least = DORMANT * float(sensitivity.mean())
    return tuple(name for name, mean in zip(parts, means, strict=True) if mean < least)


def awakened(problem: UnlearningProblem, network: LinearisedNetwork, parameters: Parameters) -> float:
    """Share of the outputs' sensitivity, ‖J(θ) P^{1/2}‖_F², that is to tensors which were dormant at θ*.

    Args:
        problem: The unlearning problem.
        network: Its linearisation at θ*.
        parameters: θ by name, and running statistics other than θ*'s.

    Returns:
        The larger share of the two sets, estimated with one random sign vector and at most 64 samples each; 0 where no
        tensor was dormant, which costs nothing, and where nothing is sensitive. Cost: that many gradients.
    """
    if not network.dormant:
        return 0.0
    generator = torch.Generator().manual_seed(SEED)
    leaves = {name: parameters[name].detach().requires_grad_() for name in problem.parameters}
    shares = [0.0]
    for samples, part in ((problem.retain, network.retain), (problem.forget, network.forget)):
        chosen = part.indices[torch.linspace(0, part.samples - 1, min(SAMPLES, part.samples)).round().long()]
        pulled = torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)
        for few in chosen.split(problem.evaluation_batch):
            inputs, targets = samples.batch(few)
            with torch.enable_grad():
                outputs = problem.outputs({**parameters, **leaves}, inputs)
                signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
                counted = network.loss.counted(outputs, targets)
                if counted is not None:
                    signs = signs * counted.reshape(signs.shape)
                found = torch.autograd.grad((outputs * signs).sum(), list(leaves.values()), materialize_grads=True)
            pulled += torch.cat([part.reshape(-1) for part in found])
        root = network.run_preconditioner.sqrt(pulled)
        parts = problem.unflatten(root)
        squares = torch.stack([part.double().square().sum() for part in parts.values()]).tolist()
        energies = dict(zip(parts, squares, strict=True))
        whole = sum(squares)
        if whole > 0:
            shares.append(sum(energies[name] for name in network.dormant) / whole)
    return max(shares)
