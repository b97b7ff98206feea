"""Adam's preconditioner at θ*, held still: what makes an Adam run an instance of T1 (theory §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from stabkit._validate import check_real
from stabkit.curvature.gradients import gradient_blocks, summed_squares
from stabkit.preconditioner import Diagonal, Preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.samples import Samples
from stabkit.sampling import noise_level


def frozen_adam(
    problem: UnlearningProblem,
    *,
    mix: float,
    batch_sizes: tuple[int, int],
    sampling: str = "without_replacement",
    eps: float = 1e-8,
    samples: int | None = 2048,
    seed: int = 0,
    preconditioner: Preconditioner | None = None,
    forget_mask: Tensor | None = None,
) -> Diagonal:
    """P = diag(1/(√v + ε)), v the mean square of a step's batch gradient at θ*, where Adam's running mean would settle.

    An approximation, good while a run stays where v is: Adam lets v follow the run, at the rate 1-β₂ a step, and grow with
    it. A run whose gradients grow, as under ascent, may be said to break at smaller steps than it does. With η(1-β₁) as the
    step size, β₁ as the momentum and γ/(1-β₁) as decoupled decay (`stabkit.stability.Optimiser`) the linear theory applies;
    rollouts have the true AdamW (T15).

    Args:
        problem: The unlearning problem.
        mix: α in [0, 1].
        batch_sizes: B_R and B_F, which set how noisy the gradient is.
        sampling: "without_replacement", "with_replacement" or "poisson".
        eps: Adam's ε > 0.
        samples: Samples of each set to take gradients of; all when None.
        seed: Seed of that choice.
        preconditioner: Diagonal P that the gradient goes through before; the identity when None.
        forget_mask: 0/1 mask of the forget gradients alone, shape (d,); all ones when None.

    Returns:
        The preconditioner, P in it where there is one: diag(p/(√v + ε)) with v that of Pĝ. 0 where v is: a parameter
        without gradients stays where it is. Cost: one gradient a sample.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain.
    """
    check_real(mix, name="mix", owner="frozen_adam", low=0, high=1)
    check_real(eps, name="eps", owner="frozen_adam", low=0, low_open=True)
    drift = torch.zeros(problem.size, dtype=torch.float64, device=problem.device)
    spread = torch.zeros_like(drift)
    for place, (part, weight) in enumerate(((problem.retain, 1 - mix), (problem.forget, -mix))):
        if weight == 0:
            continue
        mean, second = _gradient_moments(problem, part, part.subset(samples, seed + place))
        if place and forget_mask is not None:
            mean, second = mean * forget_mask, second * forget_mask
        drift += weight * mean
        noise = noise_level(batch_sizes[place], part.size, sampling)
        spread += weight**2 * noise * (second if sampling == "poisson" else second - mean.square())
    root = (drift.square() + spread.clamp_min(0)).sqrt()
    own = torch.ones_like(root)
    if preconditioner is not None:
        own = preconditioner.apply(problem.vector().new_ones(problem.size)).double()
    return Diagonal((own * (root > 0) / (own * root + eps)).to(problem.dtype))


def _gradient_moments(problem: UnlearningProblem, samples: Samples, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of the samples' gradients, each of shape (d,), float64."""
    first = torch.zeros(problem.size, dtype=torch.float64, device=problem.device)
    second = torch.zeros_like(first)
    for block in gradient_blocks(problem, samples, indices):
        first += problem.flatten({name: g.sum(0, dtype=torch.float64) for name, g in block.items()})
        second += summed_squares(problem, block)
    return first / indices.numel(), second / indices.numel()
