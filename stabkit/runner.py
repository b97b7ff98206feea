"""Runs an unlearning algorithm for real, watches for divergence, and hands back a new model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stabkit import _checkpoint
from stabkit._progress import progress_bar
from stabkit._rng import preserved_rng
from stabkit._serialise import to_plain
from stabkit._validate import check_choice, check_int, check_seed
from stabkit.algorithms.base import Algorithm, Batch, PlainSteps, StepPlan
from stabkit.graphs import NetworkGraphs, check_graphs
from stabkit.preconditioner import Identity, Preconditioner
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.reading import Reading
from stabkit.samples import Inputs, Samples, map_tensors, tensors_of
from stabkit.sampling import batch_streams

CHECK_EVERY = 10
MONITOR_SAMPLES = 2048
PRECISIONS = ("full", "bfloat16")
CLIP_EPSILON = 1e-6  # added to a norm before it divides, as torch.nn.utils.clip_grad_norm_ does


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


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step, as `on_step` is told of it.

    Attributes:
        step: Its number, from 1.
        lr: Its step size ηκ_k.
        retain_weight: (1-α)ρ_k.
        forget_weight: αφ_k.
        gradient_norm: Norm of the preconditioned gradient of the losses, before it is clipped.
        step_norm: ‖θ_k - θ_(k-1)‖.
        retain_loss: Mean loss of the step's retain batch before the step, as the step's pass has it; None where the retain
            set has no part in the step.
        forget_loss: The same for the forget batch.
    """

    step: int
    lr: float
    retain_weight: float
    forget_weight: float
    gradient_norm: float
    step_norm: float
    retain_loss: float | None
    forget_loss: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RunResult:
    """What a real run did.

    Attributes:
        model: A new model with the final parameters, and running statistics where they moved, in the mode the original was
            in.
        diverged: Whether the retain loss ever reached the best constant predictor's, or anything became non-finite.
        divergence_step: First checked step at which it had; None if it never did.
        stop_reason: "steps", "drift", "leakage", "diverged" or "on_step" (the caller's hook raised StopIteration).
        steps: Steps taken.
        trajectory: The checks, from step 0 on.
        seed: Seed of the batches.
        gradient_equivalents: Per-sample gradients evaluated, the preconditioner's apart; a forward pass counts as a third.
        last_good_model: The model of the last check before `divergence_step`, `model` itself where the run did not diverge;
            None where it counts as diverged from step 0 on.
        last_good_step: That check's step; None likewise.
    """

    model: nn.Module
    diverged: bool
    divergence_step: int | None
    stop_reason: str
    steps: int
    trajectory: tuple[Checkpoint, ...]
    seed: int
    gradient_equivalents: float
    last_good_model: nn.Module | None = None
    last_good_step: int | None = None

    @property
    def worst_retain_loss(self) -> float:
        """Largest retain loss seen; infinity if any check was not finite."""
        losses = [c.retain_loss for c in self.trajectory]
        return max(losses) if all(map(math.isfinite, losses)) else math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Position:
    """Where a run is between two steps.

    Attributes:
        step: Steps taken so far.
        theta: Parameters, shape (d,).
        velocity: What momentum carries on, shape (d,).
        statistics: Running statistics of BatchNorm layers by buffer name; empty where those are frozen.
        stopped: Whether the algorithm's own rule ends the run here.
        gradient_equivalents: Per-sample gradients of the steps since the position begun from.
    """

    step: int
    theta: Tensor
    velocity: Tensor
    statistics: Parameters = field(default_factory=dict)
    stopped: bool = False
    gradient_equivalents: float = 0.0


def steps_from(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    preconditioner: Preconditioner,
    start: Position,
    *,
    batch_sizes: tuple[int, int],
    seed: int,
) -> Iterator[Position]:
    """The steps of a run from the middle of it on, with the batches that a whole run of that seed has.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm.
        preconditioner: Its P.
        start: Where to begin.
        batch_sizes: B_R and B_F.
        seed: Seed of the batches.

    Yields:
        The position after each step, to the last one or where the algorithm's rule ends the run. Cost of each: B_R + B_F
        gradients.
    """
    state = _State(
        theta=start.theta,
        velocity=start.velocity,
        good=start.theta,
        statistics=_copies(start.statistics),
        good_statistics={},
        taken=start.step,
    )
    steps = _Steps(problem, algorithm, preconditioner, batch_sizes, seed, "full")
    steps.skip(start.step)
    while state.taken < algorithm.steps and state.stop_reason == "steps":
        steps.take(state, measured=False)
        yield Position(
            step=state.taken,
            theta=state.theta,
            velocity=state.velocity,
            statistics=_copies(state.statistics),
            stopped=state.stop_reason != "steps",
            gradient_equivalents=state.gradients,
        )


def statistics_along(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    path: Iterable[Tensor],
    *,
    batch_sizes: tuple[int, int],
    seed: int,
) -> Iterator[Parameters]:
    """The running statistics that a run from θ* on has where its parameters are known.

    Args:
        problem: The unlearning problem, batchnorm="batch".
        algorithm: The algorithm.
        path: Parameters before each step, θ* first, each of shape (d,).
        batch_sizes: B_R and B_F.
        seed: Seed of the batches.

    Yields:
        Running statistics after each step, by buffer name. Cost of each: B_R + B_F forward passes.
    """
    statistics = _copies(problem.statistics)
    steps = _Steps(problem, algorithm, Identity(), batch_sizes, seed, "full")
    for plan, theta in zip(algorithm.plan(), path, strict=False):
        parameters = problem.unflatten(theta)
        weights = (1 - algorithm.mix) * plan.retain, algorithm.mix * plan.forget
        both = zip((problem.retain, problem.forget), steps.draw(plan), weights, strict=True)
        for samples, indices, weight in both:
            if weight and indices.numel():
                with torch.no_grad():
                    problem.batch_outputs(parameters, samples.batch(indices)[0], statistics=statistics)
        yield _copies(statistics)


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


@dataclass(kw_only=True)
class _State:
    """What a run carries from one step to the next, but for its batches, which are drawn again from the seed."""

    theta: Tensor
    velocity: Tensor
    good: Tensor
    statistics: Parameters  # running statistics, changed in place by the passes
    good_statistics: Parameters
    good_step: int = -1
    taken: int = 0
    divergence_step: int = -1
    stop_reason: str = "steps"
    gradients: float = 0.0
    trajectory: list[Checkpoint] = field(default_factory=list)

    def arrays(self) -> _checkpoint.State:
        """As plain arrays."""
        rows = [(c.step, c.retain_loss, c.forget_loss, c.distance) for c in self.trajectory]
        return {
            "theta": self.theta.cpu().numpy(),
            "velocity": self.velocity.cpu().numpy(),
            "good": self.good.cpu().numpy(),
            **{f"statistics.{name}": t.cpu().numpy() for name, t in self.statistics.items()},
            **{f"good_statistics.{name}": t.cpu().numpy() for name, t in self.good_statistics.items()},
            "counts": np.array([self.good_step, self.taken, self.divergence_step]),
            "stop_reason": np.array(self.stop_reason),
            "gradients": np.array(self.gradients),
            "trajectory": np.array(rows, dtype=np.float64),
        }

    def take(self, arrays: _checkpoint.State) -> None:
        """Go on from these."""
        for name in ("theta", "velocity", "good"):
            setattr(self, name, torch.as_tensor(arrays[name]).to(self.theta))
        for kind, tensors in (("statistics", self.statistics), ("good_statistics", self.good_statistics)):
            for name, tensor in tensors.items():
                tensors[name] = torch.as_tensor(arrays[f"{kind}.{name}"]).to(tensor)
        self.good_step, self.taken, self.divergence_step = (int(n) for n in arrays["counts"])
        self.stop_reason, self.gradients = str(arrays["stop_reason"]), float(arrays["gradients"])
        self.trajectory = [
            Checkpoint(step=int(step), retain_loss=float(retain), forget_loss=float(forget), distance=float(distance))
            for step, retain, forget, distance in arrays["trajectory"]
        ]


def run(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    *,
    preconditioner: Preconditioner | None = None,
    seed: int = 0,
    check_every: int = CHECK_EVERY,
    monitor_samples: int | None = MONITOR_SAMPLES,
    stop_on_divergence: bool = True,
    precision: str = "full",
    cuda_graphs: bool = False,
    on_step: Callable[[StepRecord], object] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> RunResult:
    """Run an algorithm from θ* (T1).

    With batchnorm="batch" the retain and the forget batch are passed one after the other, each normalised by its own
    statistics, which gradients flow through and the running ones follow; looks at the losses use the running ones.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm with its settings.
        preconditioner: P, where it is already at hand; computed from the algorithm otherwise.
        seed: Seed of the batches; the caller's random state is left as it was.
        check_every: Steps between two looks at the losses; the first ones and the last are always looked at
            (`check_steps`).
        monitor_samples: Samples of each set the losses are watched on; all when None.
        stop_on_divergence: Whether to end the run at the check that finds it diverged.
        precision: "full", or "bfloat16": passes of the steps under autocast, with float32 parameters, updates and looks.
            Predictions are of full precision.
        cuda_graphs: Whether to record the network's passes as CUDA graphs and replay them, which saves the time of
            launching their kernels one by one. For a GPU, frozen BatchNorm and batches of one size.
        on_step: Called after every step. If it raises StopIteration the run ends there and returns; any other exception
            ends it too and reaches the caller, after the state is written where there is a `checkpoint`.
        checkpoint: File that holds the state: written whole or not at all, resumed from where it exists, left in place at
            the end. A resumed run returns on the CPU bit for bit what an uninterrupted one does. It takes 3·d numbers.
        checkpoint_every: Steps from one writing to the next; a killed run repeats at most so many.
        progress: Whether to show a progress bar.

    Returns:
        The new model and what happened. Cost: B_R + B_F gradients a step, a forward pass at θ* more where the algorithm
        `needs_original`, and a forward pass over the monitored samples at each look.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain, or the checkpoint is unreadable or of another run.
        RuntimeError: If the network's passes cannot be recorded with `cuda_graphs`.
    """
    for name, value, kind in (("problem", problem, UnlearningProblem), ("algorithm", algorithm, Algorithm)):
        if not isinstance(value, kind):
            raise TypeError(
                f"`{name}` of `run` must be an object of {kind.__name__}; got {value!r:.60}. For instance "
                "run(UnlearningProblem(model, forget, retain), GradDiff(lr=0.01))."
            )
    check_seed(seed, owner="run")
    check_int(check_every, name="check_every", owner="run", low=1)
    check_int(checkpoint_every, name="checkpoint_every", owner="run", low=1)
    if monitor_samples is not None:
        check_int(monitor_samples, name="monitor_samples", owner="run", low=1, remedy="None watches all of them.")
    check_choice(precision, name="precision", owner="run", choices=PRECISIONS)
    if precision != "full" and problem.dtype != torch.float32:
        raise ValueError(
            f"`precision` of `run` must be 'full' in {str(problem.dtype).removeprefix('torch.')}; got {precision!r}. "
            "Autocast lowers float32 alone."
        )
    if cuda_graphs:
        check_graphs(problem)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"`on_step` of `run` must be a function of a StepRecord or None; got {on_step!r}.")
    batches = algorithm.batch_sizes(problem)
    if problem.batchnorm == "batch":
        check_coupled(algorithm, batches)
    watched = [s.subset(monitor_samples, seed=0) for s in (problem.retain, problem.forget)]
    anchor = problem.vector()
    state = _State(
        theta=anchor.clone(),
        velocity=torch.zeros_like(anchor),
        good=anchor.clone(),
        statistics=_copies(problem.statistics),
        good_statistics=_copies(problem.statistics),
    )
    store = None
    if checkpoint is not None:
        identity = {
            "order": problem.size,
            "dtype": str(problem.dtype),
            "samples": [problem.retain.size, problem.forget.size],
            "algorithm": algorithm.name,
            "settings": json.loads(json.dumps(to_plain(algorithm.settings()))),
            "seed": seed,
            "check_every": check_every,
            "monitor_samples": monitor_samples,
            "stop_on_divergence": stop_on_divergence,
            "precision": precision,
            "batchnorm": problem.batchnorm,
        }
        store = _checkpoint.Checkpoint(checkpoint, "run", identity, owner="run")
    checks = frozenset(check_steps(algorithm.steps, check_every))

    def look(step: int) -> None:
        """Record the losses, and whether the run counts as diverged."""
        parameters = {**problem.unflatten(state.theta), **state.statistics}
        losses = [
            float(problem.losses(s, parameters, i).mean())
            for s, i in zip((problem.retain, problem.forget), watched, strict=True)
        ]
        distance = float((state.theta - anchor).norm())
        state.trajectory.append(Checkpoint(step=step, retain_loss=losses[0], forget_loss=losses[1], distance=distance))
        if all(map(math.isfinite, (*losses, distance))) and losses[0] < problem.divergence_level:
            if state.divergence_step < 0:
                state.good, state.good_step, state.good_statistics = state.theta, step, _copies(state.statistics)
            return
        state.divergence_step = step if state.divergence_step < 0 else state.divergence_step
        if stop_on_divergence:
            state.stop_reason = "diverged"

    with preserved_rng():
        if preconditioner is None:
            preconditioner = algorithm.step_preconditioner(problem)
        marks = _marks(problem, preconditioner) if store is not None else {}
        saved = store.load() if store is not None else None
        if store is not None and saved is not None:
            for name, mark in marks.items():
                store.recognise(saved[name], mark, what=name, exact=name == "weights")
            state.take(saved)
        else:
            look(0)
        graphs = NetworkGraphs(problem, lowered=precision == "bfloat16") if cuda_graphs else None
        steps = _Steps(problem, algorithm, preconditioner, batches, seed, precision, graphs)
        steps.skip(state.taken)
        remaining = range(state.taken + 1, algorithm.steps + 1) if state.stop_reason == "steps" else range(0)

        def save() -> None:
            if store is not None:
                store.save({**state.arrays(), **{name: mark.cpu().numpy() for name, mark in marks.items()}})

        for step in progress_bar(remaining, f"run {algorithm.name}", progress):
            record = steps.take(state, measured=on_step is not None)
            if step in checks or state.stop_reason != "steps":
                look(step)
            if on_step is not None and record is not None:
                try:
                    on_step(record)
                except StopIteration:
                    state.stop_reason = "on_step" if state.stop_reason == "steps" else state.stop_reason
                    if state.trajectory[-1].step != step:
                        look(step)
                except BaseException:
                    save()
                    raise
            if state.stop_reason != "steps":
                break
            if step % checkpoint_every == 0:
                save()
        save()
    model = problem.new_model({**problem.unflatten(state.theta), **state.statistics})
    last_good = None
    if state.good_step >= 0:
        last_good = model
        if state.divergence_step >= 0:
            last_good = problem.new_model({**problem.unflatten(state.good), **state.good_statistics})
    diverged = state.divergence_step >= 0
    watched_total = sum(i.numel() for i in watched) * len(state.trajectory)
    return RunResult(
        model=model,
        diverged=diverged,
        divergence_step=state.divergence_step if diverged else None,
        stop_reason=state.stop_reason,
        steps=state.taken,
        trajectory=tuple(state.trajectory),
        seed=seed,
        gradient_equivalents=state.gradients + watched_total / 3,
        last_good_model=last_good,
        last_good_step=state.good_step if last_good is not None else None,
    )


def check_coupled(algorithm: Algorithm, batches: tuple[int, int]) -> None:
    """Refuse batches that may have no variance to normalise by.

    Args:
        algorithm: The algorithm.
        batches: B_R and B_F.

    Raises:
        ValueError: If sampling is "poisson", or a batch that drives the run holds one sample.
    """
    if algorithm.sampling == "poisson":
        raise ValueError(
            f"`sampling` of `{type(algorithm).__name__}` must give batches of one size with batchnorm='batch'; got "
            "'poisson', which may draw a single sample. Use another, or batchnorm='frozen'."
        )
    for size, share in zip(batches, (1 - algorithm.mix, algorithm.mix), strict=True):
        if size < 2 and share > 0:
            raise ValueError(
                f"batches of `{type(algorithm).__name__}` must hold at least two samples with batchnorm='batch'; got "
                f"{size}, which has no variance. Use larger ones, or batchnorm='frozen'."
            )


def _copies(tensors: Parameters) -> Parameters:
    """Tensors that may be changed in place."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _marks(problem: UnlearningProblem, preconditioner: Preconditioner) -> dict[str, Tensor]:
    """What a problem is known again by: its weights, what P makes of a fixed vector, and its losses at θ*."""
    theta = problem.vector()
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(0)).to(theta)
    losses = torch.tensor([problem.retain_loss, problem.forget_loss, problem.divergence_level]).to(theta)
    return {"weights": theta, "preconditioner": preconditioner.apply(vector), "losses": losses}


class _Steps:
    """The steps of one run, in order: batches, gradients, clipping, decay, momentum."""

    def __init__(
        self,
        problem: UnlearningProblem,
        algorithm: Algorithm,
        preconditioner: Preconditioner,
        batches: tuple[int, int],
        seed: int,
        precision: str,
        graphs: NetworkGraphs | None = None,
    ) -> None:
        self._autocast, self._graphs = precision == "bfloat16", graphs
        self._problem, self._algorithm, self._preconditioner = problem, algorithm, preconditioner
        self._batches, self._seed = batches, seed
        self._streams = batch_streams((problem.retain.size, problem.forget.size), batches, algorithm.sampling, seed)
        self._plan = algorithm.plan()
        self._rule = algorithm.stop_rule()
        self._mask = preconditioner.forget_mask if isinstance(preconditioner, PlainSteps) else None

    def draw(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """The step's indices in both sets; nothing is drawn from a set that has no part in the step."""
        empty = torch.empty(0, dtype=torch.int64)
        watched = self._rule.leakage_bound is not None
        retain = next(self._streams[0]) if plan.retain else empty
        forget = next(self._streams[1]) if plan.forget or watched else empty
        return retain, forget

    def skip(self, steps: int) -> None:
        """Draw the batches of the steps before."""
        for plan in self._plan[:steps]:
            self.draw(plan)

    def take(self, state: _State, *, measured: bool) -> StepRecord | None:
        """One step, in place; what it was, if asked for."""
        algorithm, plan, theta = self._algorithm, self._plan[state.taken], state.theta
        retain, forget = self.draw(plan)
        weights = (1 - algorithm.mix) * plan.retain, algorithm.mix * plan.forget
        gradient, leakage, losses = self._gradient(theta, retain, forget, weights, state, measured=measured)
        direction = self._preconditioner.apply(gradient)
        norm = direction.norm() if plan.max_norm is not None or measured else None
        if plan.max_norm is not None and norm is not None:
            direction = direction * (plan.max_norm / (norm + CLIP_EPSILON)).clamp_max(1.0)
        if algorithm.weight_decay or plan.pull:
            pull = algorithm.weight_decay * theta + plan.pull * theta.sign()
            direction = direction + self._preconditioner.apply(pull)
        velocity = algorithm.momentum * state.velocity + direction
        lr = algorithm.lr * plan.lr
        change = -lr * (direction + algorithm.momentum * velocity if algorithm.nesterov else velocity)
        drift = change.norm() / theta.norm()
        state.theta, state.velocity, state.taken = theta + change, velocity, state.taken + 1
        if self._rule.active and bool(self._rule.decide(drift, leakage)):
            moved_little = self._rule.drift_tolerance is not None and bool(drift < self._rule.drift_tolerance)
            state.stop_reason = "drift" if moved_little else "leakage"
        if not measured or norm is None:
            return None
        return StepRecord(
            step=state.taken,
            lr=lr,
            retain_weight=weights[0],
            forget_weight=weights[1],
            gradient_norm=float(norm),
            step_norm=float(change.norm()),
            retain_loss=losses.get(False),
            forget_loss=losses.get(True),
        )

    def _gradient(
        self,
        theta: Tensor,
        retain: Tensor,
        forget: Tensor,
        weights: tuple[float, float],
        state: _State,
        *,
        measured: bool,
    ) -> tuple[Tensor, Tensor | None, dict[bool, float]]:
        """(1-α)ρ ĝ_R - αφ ĝ_F over the two batches, the forget batch's divergence, and losses by whether it is forgotten."""
        problem, algorithm = self._problem, self._algorithm
        parts: list[_Part] = []
        if weights[0] and retain.numel():
            state.gradients += retain.numel() * (4 / 3 if algorithm.needs_original else 1)
            parts.append(self._part(problem.retain, retain, weights[0] / self._batches[0], state.taken + 1))
        if weights[1] and forget.numel():
            state.gradients += forget.numel() * (4 / 3 if algorithm.needs_original else 1)
            parts.append(self._part(problem.forget, forget, -weights[1] / self._batches[1], state.taken + 1))
        parameters: Parameters = {name: p.detach().requires_grad_() for name, p in problem.unflatten(theta).items()}
        leakage = None
        if self._rule.leakage_bound is not None and forget.numel():
            state.gradients += forget.numel() * 2 / 3
            inputs, targets = problem.forget.batch(forget)
            with torch.no_grad():
                before = problem.outputs(problem.parameters, inputs)
                now = problem.outputs({**parameters, **state.statistics}, inputs)
                leakage = problem.loss.divergence(before, now, targets).mean()
        joint = self._mask is None and problem.batchnorm == "frozen"
        together = joint and len(parts) == 2 and _same_layout(parts[0].inputs, parts[1].inputs)
        gradient = torch.zeros_like(theta)
        losses: dict[bool, float] = {}
        # One pass over both batches: half the kernel launches.
        for group in [parts] if together else [[part] for part in parts]:
            share, seen = self._backward(theta, parameters, group, state.statistics, measured=measured)
            gradient += share * self._mask if self._mask is not None and group[0].forget else share
            losses |= seen
        return gradient, leakage, losses

    def _part(self, samples: Samples, indices: Tensor, weight: float, step: int) -> _Part:
        """One set's batch, with outputs at θ* where the algorithm reads them."""
        inputs, targets = samples.batch(indices)
        original = None
        if self._algorithm.needs_original:
            with torch.no_grad():
                original = self._problem.outputs(self._problem.parameters, inputs)
        forget = samples is self._problem.forget
        return _Part(inputs=inputs, targets=targets, original=original, weight=weight, forget=forget, step=step)

    def _backward(
        self, theta: Tensor, parameters: Parameters, parts: list[_Part], statistics: Parameters, *, measured: bool
    ) -> tuple[Tensor, dict[bool, float]]:
        """Σ weight·Jᵀs over the parts, in one pass; s by the algorithm from the outputs. And the losses if asked for."""
        inputs = parts[0].inputs if len(parts) == 1 else _join(parts[0].inputs, parts[1].inputs)
        recorded, leaves = None, list(parameters.values())
        if self._graphs is not None:
            leaf = theta.detach().requires_grad_()
            recorded = self._graphs.outputs(leaf, inputs)
            leaves = leaves if recorded is None else [leaf]
        lowered = torch.autocast(self._problem.device.type, torch.bfloat16, enabled=self._autocast)
        with torch.enable_grad(), lowered:
            if recorded is not None:
                outputs = recorded
            elif self._problem.batchnorm == "batch":
                outputs = self._problem.batch_outputs(parameters, inputs, statistics=statistics)
            else:
                outputs = self._problem.outputs(parameters, inputs)
            outputs = outputs.to(self._problem.dtype)
        residuals, start = [], 0
        losses: dict[bool, float] = {}
        for part in parts:
            stop = start + part.targets.shape[0]
            batch = Batch(
                outputs=outputs[start:stop].detach(),
                targets=part.targets,
                original=part.original,
                copies=1,
                step=part.step,
                seeds=(self._seed,),
            )
            residual = self._algorithm.forget_residual if part.forget else self._algorithm.retain_residual
            with torch.no_grad():
                residuals.append(part.weight * residual(self._problem.loss, batch))
                if measured:
                    losses[part.forget] = float(self._problem.loss.per_sample(batch.outputs, part.targets).mean())
            start = stop
        gradients = torch.autograd.grad(
            outputs,
            leaves,
            grad_outputs=torch.cat(residuals),
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([g.reshape(-1) for g in gradients]), losses


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """One set's batch of a step."""

    inputs: Inputs
    targets: Tensor
    original: Tensor | None
    weight: float
    forget: bool
    step: int


def _same_layout(left: Inputs, right: Inputs) -> bool:
    """Whether two batches can be joined tensor by tensor: the same keys in the same order, shapes and dtypes."""
    plain = [inputs.inputs if isinstance(inputs, Reading) else inputs for inputs in (left, right)]
    keys = [list(inputs) if isinstance(inputs, dict) else None for inputs in plain]
    shapes = [[(t.shape[1:], t.dtype) for t in tensors_of(inputs)] for inputs in (left, right)]
    return keys[0] == keys[1] and shapes[0] == shapes[1]


def _join(left: Inputs, right: Inputs) -> Inputs:
    """Both batches as one, tensor by tensor in the same order."""
    others = iter(list(tensors_of(right)))
    return map_tensors(lambda t: torch.cat([t, next(others)]), left)
