"""Runs an unlearning algorithm for real, watches for divergence, and hands back a new model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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
from stabkit.algorithms.base import Algorithm
from stabkit.algorithms.contract import check_plan
from stabkit.graphs import NetworkGraphs, check_graphs
from stabkit.network import check_modes
from stabkit.preconditioner import Preconditioner
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.steps import StepRecord, Steps, StepState, check_coupled, copies
from stabkit.updates import Moments

MONITOR_SAMPLES = 512
PRECISIONS = ("full", "bfloat16")


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
        model: A new model with the final parameters, and running statistics where they moved, in the mode the original was
            in and in the problem's dtype.
        diverged: Whether the retain loss reached the best constant predictor's at any look, or anything became non-finite.
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


def check_steps(steps: int, check_every: int) -> tuple[int, ...]:
    """Steps after which a run's losses are looked at, in reality and in the rollout alike.

    A run that overshoots peaks within a few steps and may fall back to a dead network, so the first ones are all looked at.

    Args:
        steps: Steps of the run.
        check_every: Distance of the later looks.

    Returns:
        0, each of the first `check_every` steps, every `check_every`-th one, and the last.
    """
    first = range(min(check_every, steps) + 1)
    return tuple(sorted({*first, *range(0, steps + 1, check_every), steps}))


@dataclass(kw_only=True)
class _State(StepState):
    """What a run carries from one step to the next, and what it has seen, but for its batches, drawn again from the seed."""

    good: Tensor
    good_statistics: Parameters
    good_step: int = -1
    divergence_step: int = -1
    trajectory: list[Checkpoint] = field(default_factory=list)

    def arrays(self) -> _checkpoint.State:
        """As plain arrays."""
        rows = [(c.step, c.retain_loss, c.forget_loss, c.distance) for c in self.trajectory]
        return {
            "theta": self.theta.cpu().numpy(),
            "velocity": self.moments.first.cpu().numpy(),
            **({} if self.moments.second is None else {"squares": self.moments.second.cpu().numpy()}),
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
        for name in ("theta", "good"):
            setattr(self, name, torch.as_tensor(arrays[name]).to(self.theta))
        first, second = (
            torch.as_tensor(arrays[name]).to(self.theta) if name in arrays else None for name in ("velocity", "squares")
        )
        assert first is not None
        self.moments = Moments(first=first, second=second)
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
    check_every: int | None = None,
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
        preconditioner: P, where it is already at hand, as `Report.preconditioner`; computed from the algorithm otherwise.
        seed: Seed of the batches; the caller's random state is left as it was.
        check_every: Steps between two looks at the losses; the first ones and the last are always looked at
            (`check_steps`). The problem's when None.
        monitor_samples: Samples of each set the losses are watched on; all when None.
        stop_on_divergence: Whether to end the run at the check that finds it diverged.
        precision: "full", or "bfloat16": passes of the steps under autocast, with float32 parameters, updates and looks.
            Full is what PyTorch multiplies by, as in a loop of one's own: on CUDA convolutions are in TF32 unless
            torch.backends says otherwise. Predictions are in float32.
        cuda_graphs: Whether to record the network's passes as CUDA graphs and replay them, which saves the time of
            launching their kernels one by one. For a GPU and frozen BatchNorm, and best with batches of one size: those of a
            fifth size are passed as ever.
        on_step: Called after every step, which an accelerator is then waited for. If it raises StopIteration the run ends
            there and returns; any other exception ends it too and reaches the caller, after the state is written where there
            is a `checkpoint`.
        checkpoint: File that holds the state: written whole or not at all, resumed from where it exists, left in place at
            the end. A resumed run returns on the CPU bit for bit what an uninterrupted one does. It takes 3·d numbers, 4·d
            with AdamW.
        checkpoint_every: Steps from one writing to the next; a killed run repeats at most so many.
        progress: Whether to show a progress bar.

    Returns:
        The new model and what happened. Cost: B_R + B_F gradients a step, a forward pass at θ* more where the algorithm
        `needs_original`, and a forward pass over the monitored samples at each look.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain, or the checkpoint is unreadable or of another run.
        RuntimeError: If the network's passes cannot be recorded with `cuda_graphs`, or it is called under torch.autocast or
            torch.inference_mode().
    """
    for name, value, kind in (("problem", problem, UnlearningProblem), ("algorithm", algorithm, Algorithm)):
        if not isinstance(value, kind):
            raise TypeError(
                f"`{name}` of `run` must be an object of {kind.__name__}; got {value!r:.60}. For instance "
                "run(UnlearningProblem(model, forget, retain), GradDiff(lr=0.01))."
            )
    check_modes("run")
    check_seed(seed, owner="run")
    check_every = problem.check_every if check_every is None else check_every
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
    check_plan(algorithm)
    batches = algorithm.batch_sizes(problem)
    if problem.batchnorm == "batch":
        check_coupled(algorithm, batches)
    watched = [s.subset(monitor_samples, seed=0) for s in (problem.retain, problem.forget)]
    anchor = problem.vector()
    state = _State(
        theta=anchor.clone(),
        moments=Moments.zero(algorithm, anchor),
        good=anchor.clone(),
        statistics=copies(problem.statistics),
        good_statistics=copies(problem.statistics),
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
                state.good, state.good_step, state.good_statistics = state.theta, step, copies(state.statistics)
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
        steps = Steps(problem, algorithm, preconditioner, batches, seed, precision, graphs)
        steps.skip(state.taken)
        remaining = range(state.taken + 1, algorithm.steps + 1) if state.stop_reason == "steps" else range(0)

        def save() -> None:
            if store is not None:
                store.save({**state.arrays(), **{name: mark.cpu().numpy() for name, mark in marks.items()}})

        for step in progress_bar(remaining, f"run {algorithm.name}", progress):
            writes = store is not None and step % checkpoint_every == 0
            due = step in checks or writes or on_step is not None
            record = steps.take(state, measured=on_step is not None, settled=due)
            if step in checks or state.stop_reason != "steps":
                look(state.taken)  # an earlier step where the algorithm's rule has ended the run since the last look
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
            if writes:
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


def _marks(problem: UnlearningProblem, preconditioner: Preconditioner) -> dict[str, Tensor]:
    """What a problem is known again by: its weights, what P makes of a fixed vector, and its losses at θ*."""
    theta = problem.vector()
    vector = torch.randn(problem.size, generator=torch.Generator().manual_seed(0)).to(theta)
    losses = torch.tensor([problem.retain_loss, problem.forget_loss, problem.divergence_level]).to(theta)
    return {"weights": theta, "preconditioner": preconditioner.apply(vector), "losses": losses}
