"""Runs an unlearning algorithm for real, watches for divergence, and hands back a new model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabkit._progress import progress_bar
from stabkit._rng import preserved_rng
from stabkit._validate import check_int
from stabkit.algorithms.base import Algorithm
from stabkit.preconditioner import Preconditioner
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Inputs, map_tensors, tensors_of
from stabkit.sampling import batch_streams

CHECK_EVERY = 10
MONITOR_SAMPLES = 2048


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One look at a run while it goes.

    Attributes:
        step: Steps taken so far.
        retain_loss: Mean loss on the monitored retain samples; NaN or infinity once the run has left the numbers.
        forget_loss: The same on the monitored forget samples.
        distance: ‖θ - θ*‖.
    """

    step: int
    retain_loss: float
    forget_loss: float
    distance: float


@dataclass(frozen=True, kw_only=True, eq=False)
class RunResult:
    """What a real run did.

    Attributes:
        model: A new model with the final parameters, in the mode the original was in.
        diverged: Whether the retain loss ever reached the best constant predictor's, or anything became non-finite.
        divergence_step: First checked step at which it had; None if it never did.
        stop_reason: "steps", "drift", "leakage" or "diverged".
        steps: Steps taken.
        trajectory: The checks, from step 0 on.
        seed: Seed of the batches.
        gradient_equivalents: Per-sample gradients evaluated, the preconditioner's apart; a forward pass counts as a third.
    """

    model: nn.Module
    diverged: bool
    divergence_step: int | None
    stop_reason: str
    steps: int
    trajectory: tuple[Checkpoint, ...]
    seed: int
    gradient_equivalents: float

    @property
    def worst_retain_loss(self) -> float:
        """Largest retain loss seen; infinity if any check was not finite."""
        losses = [c.retain_loss for c in self.trajectory]
        return max(losses) if all(map(math.isfinite, losses)) else math.inf


def check_steps(steps: int, check_every: int) -> tuple[int, ...]:
    """Steps after which a run's losses are looked at, in reality and in the rollout alike.

    A run that overshoots peaks within a few steps and may fall back to a dead network, so the first ones are all looked at.

    Args:
        steps: Steps of the run.
        check_every: Distance of the later looks.

    Returns:
        0, each of the first `check_every` steps, every `check_every`-th one, and the last.
    """
    return tuple(k for k in range(steps + 1) if k <= check_every or k % check_every == 0 or k == steps)


def run(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    *,
    preconditioner: Preconditioner | None = None,
    seed: int = 0,
    check_every: int = CHECK_EVERY,
    monitor_samples: int | None = MONITOR_SAMPLES,
    stop_on_divergence: bool = True,
    progress: bool = False,
) -> RunResult:
    """Run an algorithm from θ* (T1).

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm with its settings.
        preconditioner: P, where it is already at hand; computed from the algorithm otherwise.
        seed: Seed of the batches; the caller's random state is left as it was.
        check_every: Steps between two looks at the losses; the first ones and the last are always looked at
            (`check_steps`).
        monitor_samples: Samples of each set the losses are watched on; all when None.
        stop_on_divergence: Whether to end the run at the check that finds it diverged.
        progress: Whether to show a progress bar.

    Returns:
        The new model and what happened. Cost: B_R + B_F gradients a step, and a forward pass over the monitored samples
        at each look.

    Raises:
        TypeError: If problem or algorithm is something else.
    """
    for name, value, kind in (("problem", problem, UnlearningProblem), ("algorithm", algorithm, Algorithm)):
        if not isinstance(value, kind):
            raise TypeError(
                f"`{name}` of `run` must be an object of {kind.__name__}; got {value!r:.60}. For instance "
                "run(UnlearningProblem(model, forget, retain), GradDiff(lr=0.01))."
            )
    check_int(seed, name="seed", owner="run", low=0)
    check_int(check_every, name="check_every", owner="run", low=1)
    if monitor_samples is not None:
        check_int(monitor_samples, name="monitor_samples", owner="run", low=1, remedy="None watches all of them.")
    sizes = problem.retain.size, problem.forget.size
    batches = algorithm.batch_sizes(problem)
    if preconditioner is None:
        preconditioner = algorithm.preconditioner(problem)
    retain_stream, forget_stream = batch_streams(sizes, batches, algorithm.sampling, seed)
    watched = [s.subset(monitor_samples, seed=0) for s in (problem.retain, problem.forget)]
    anchor = problem.vector()
    theta = anchor.clone()
    velocity = torch.zeros_like(theta)
    rule = algorithm.stop_rule()
    checks = frozenset(check_steps(algorithm.steps, check_every))
    trajectory: list[Checkpoint] = []
    divergence_step: int | None = None
    stop_reason, last, taken = "steps", algorithm.steps, 0
    gradients = 0.0

    def look(step: int) -> bool:
        """Record the losses; whether the run counts as diverged."""
        parameters = problem.unflatten(theta)
        losses = [
            float(problem.evaluate(s, parameters, i)[2].mean())
            for s, i in zip((problem.retain, problem.forget), watched, strict=True)
        ]
        distance = float((theta - anchor).norm())
        trajectory.append(Checkpoint(step=step, retain_loss=losses[0], forget_loss=losses[1], distance=distance))
        return not (all(map(math.isfinite, (*losses, distance))) and losses[0] < problem.divergence_level)

    with preserved_rng():
        if look(0):
            divergence_step = 0
            if stop_on_divergence:
                stop_reason, last = "diverged", 0
        for step in progress_bar(range(1, last + 1), f"run {algorithm.name}", progress):
            retain, forget = next(retain_stream), next(forget_stream)
            need_leakage = rule.leakage_bound is not None
            gradient, leakage = _mixed_gradient(
                problem, theta, retain, forget, algorithm, batches, need_leakage=need_leakage
            )
            gradients += (algorithm.mix < 1) * retain.numel() + (algorithm.mix > 0) * forget.numel()
            gradients += need_leakage * forget.numel() * 2 / 3
            velocity = algorithm.momentum * velocity + preconditioner.apply(gradient)
            change = -algorithm.lr * velocity
            drift = change.norm() / theta.norm()
            theta = theta + change
            taken = step
            if rule.active and bool(rule.decide(drift, leakage)):
                moved_little = rule.drift_tolerance is not None and bool(drift < rule.drift_tolerance)
                stop_reason = "drift" if moved_little else "leakage"
            if (step in checks or stop_reason != "steps") and look(step):
                divergence_step = step if divergence_step is None else divergence_step
                if stop_on_divergence:
                    stop_reason = "diverged"
            if stop_reason != "steps":
                break
    watched_total = sum(i.numel() for i in watched) * len(trajectory)
    return RunResult(
        model=problem.new_model(problem.unflatten(theta)),
        diverged=divergence_step is not None,
        divergence_step=divergence_step,
        stop_reason=stop_reason,
        steps=taken,
        trajectory=tuple(trajectory),
        seed=seed,
        gradient_equivalents=gradients + watched_total / 3,
    )


def _mixed_gradient(
    problem: UnlearningProblem,
    theta: Tensor,
    retain: Tensor,
    forget: Tensor,
    algorithm: Algorithm,
    batches: tuple[int, int],
    *,
    need_leakage: bool,
) -> tuple[Tensor, Tensor | None]:
    """(1-α) ĝ_R - α ĝ_F over the two batches, and the forget batch's prediction divergence if asked for."""
    mix = algorithm.mix
    parameters: Parameters = {name: p.detach().requires_grad_() for name, p in problem.unflatten(theta).items()}
    parts = []
    if mix < 1 and retain.numel():
        parts.append((problem.retain.batch(retain), (1 - mix) / batches[0]))
    if mix > 0 and forget.numel():
        parts.append((problem.forget.batch(forget), -mix / batches[1]))
    leakage = None
    if need_leakage and forget.numel():
        inputs, targets = problem.forget.batch(forget)
        with torch.no_grad():
            before, now = problem.outputs(problem.parameters, inputs), problem.outputs(parameters, inputs)
            leakage = problem.loss.divergence(before, now, targets).mean()
    if not parts:
        return torch.zeros_like(theta), leakage
    with torch.enable_grad():
        objective = theta.new_zeros(())
        if len(parts) == 2 and _same_layout(parts[0][0], parts[1][0]):
            # One pass over both batches: half the kernel launches.
            (first, second) = parts
            inputs = _join(first[0][0], second[0][0])
            losses = problem.loss.per_sample(
                problem.outputs(parameters, inputs), torch.cat([first[0][1], second[0][1]])
            )
            split = first[0][1].shape[0]
            objective = first[1] * losses[:split].sum() + second[1] * losses[split:].sum()
        else:
            for (inputs, targets), weight in parts:
                losses = problem.loss.per_sample(problem.outputs(parameters, inputs), targets)
                objective = objective + weight * losses.sum()
        gradients = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in gradients]), leakage


def _same_layout(left: tuple[Inputs, Tensor], right: tuple[Inputs, Tensor]) -> bool:
    """Whether two batches can be joined tensor by tensor: the same keys in the same order, shapes and dtypes."""
    keys = [list(inputs) if isinstance(inputs, dict) else None for inputs, _ in (left, right)]
    shapes = [[(t.shape[1:], t.dtype) for t in tensors_of(batch)] for batch in (left, right)]
    return keys[0] == keys[1] and shapes[0] == shapes[1]


def _join(left: Inputs, right: Inputs) -> Inputs:
    """Both batches as one, tensor by tensor in the same order."""
    others = iter(list(tensors_of(right)))
    return map_tensors(lambda t: torch.cat([t, next(others)]), left)
