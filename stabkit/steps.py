"""The steps of a run: batches, gradients of the algorithm's loss, clipping, decay, optimiser (T1, T15)."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stabkit.algorithms.base import Algorithm, Batch, PlainSteps
from stabkit.algorithms.contract import checked_residual
from stabkit.algorithms.plan import StepPlan, StopRule
from stabkit.graphs import NetworkGraphs
from stabkit.preconditioner import Preconditioner
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Inputs, Samples, layout, map_tensors, tensors_of
from stabkit.sampling import batch_streams
from stabkit.updates import Moments, updated

CLIP_EPSILON = 1e-6  # added to a norm before it divides, as torch.nn.utils.clip_grad_norm_ does


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


@dataclass(kw_only=True)
class StepState:
    """What a run's steps change.

    Attributes:
        theta: Parameters, shape (d,).
        moments: What the optimiser carries on, of shape (d,).
        statistics: Running statistics of BatchNorm layers by buffer name, changed in place by the passes.
        taken: Steps taken so far.
        stop_reason: "steps", or why no step is to follow.
        gradients: Per-sample gradients evaluated so far; a forward pass counts as a third.
    """

    theta: Tensor
    moments: Moments
    statistics: Parameters
    taken: int = 0
    stop_reason: str = "steps"
    gradients: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Position:
    """Where a run is between two steps.

    Attributes:
        step: Steps taken so far.
        theta: Parameters, shape (d,).
        moments: What the optimiser carries on, of shape (d,).
        statistics: Running statistics of BatchNorm layers by buffer name; empty where those are frozen.
        stopped: Whether the algorithm's own rule ends the run here.
        gradient_equivalents: Per-sample gradients of the steps since the position begun from.
    """

    step: int
    theta: Tensor
    moments: Moments
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
    players: tuple[Tensor, Tensor] | None = None,
    looks: Container[int] | None = None,
) -> Iterator[Position]:
    """The steps of a run from the middle of it on, with the batches that a whole run of that seed has.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm.
        preconditioner: Its P.
        start: Where to begin.
        batch_sizes: B_R and B_F.
        seed: Seed of the batches.
        players: For every retain and every forget sample the one that stands in for it; each for itself when None.
        looks: Steps whose positions are read; all when None. On an accelerator it is only there, and at the last step, that
            a position says whether the algorithm's rule has ended the run, and then it is the one where that was.

    Yields:
        The position after each step, to the last one or where the algorithm's rule ends the run. Cost of each: B_R + B_F
        gradients.
    """
    state = StepState(theta=start.theta, moments=start.moments, statistics=copies(start.statistics), taken=start.step)
    steps = Steps(problem, algorithm, preconditioner, batch_sizes, seed, "full", players=players)
    steps.skip(start.step)
    while state.taken < algorithm.steps and state.stop_reason == "steps":
        ahead = state.taken + 1
        steps.take(state, measured=False, settled=looks is None or ahead in looks or ahead == algorithm.steps)
        yield Position(
            step=state.taken,
            theta=state.theta,
            moments=state.moments,
            statistics=copies(state.statistics),
            stopped=state.stop_reason != "steps",
            gradient_equivalents=state.gradients,
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


def copies(tensors: Parameters) -> Parameters:
    """Tensors that may be changed in place."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


class Steps:
    """The steps of one run, in order: batches, gradients, clipping, decay, optimiser."""

    def __init__(
        self,
        problem: UnlearningProblem,
        algorithm: Algorithm,
        preconditioner: Preconditioner,
        batches: tuple[int, int],
        seed: int,
        precision: str,
        graphs: NetworkGraphs | None = None,
        players: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._players = players
        self._autocast, self._graphs = precision == "bfloat16", graphs
        self._problem, self._algorithm, self._preconditioner = problem, algorithm, preconditioner
        self._batches, self._seed = batches, seed
        self._streams = batch_streams((problem.retain.size, problem.forget.size), batches, algorithm.sampling, seed)
        self._plan = algorithm.plan()
        self._rule = algorithm.stop_rule()
        # A rule of another class may not be asked past its end.
        self._defers = problem.device.type != "cpu" and type(self._rule) is StopRule
        self._unread: list[float] = []  # gradients evaluated after each step since the rule was read
        # The step at which it has ended the run since then, below zero for leakage; 0 for none.
        self._ended: Tensor | None = None
        self._mask = preconditioner.forget_mask if isinstance(preconditioner, PlainSteps) else None
        self._paces, decays = algorithm.layer_factors(problem), algorithm.decay_factors(problem)
        self._decay: Tensor | float = algorithm.weight_decay
        if algorithm.weight_decay and decays is not None:
            self._decay = algorithm.weight_decay * decays
        if algorithm.weight_decay and algorithm.adaptive:  # SGD's goes through P
            theta = problem.vector()
            self._decay = self._decay * (preconditioner.apply(torch.ones_like(theta)) > 0).to(theta)

    def draw(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """The step's indices in both sets; nothing is drawn from a set that has no part in the step."""
        empty = torch.empty(0, dtype=torch.int64)
        watched = self._rule.leakage_bound is not None
        retain = next(self._streams[0]) if plan.retain else empty
        forget = next(self._streams[1]) if plan.forget or watched else empty
        return (retain, forget) if self._players is None else (self._players[0][retain], self._players[1][forget])

    def skip(self, steps: int) -> None:
        """Draw the batches of the steps before."""
        for plan in self._plan[:steps]:
            self.draw(plan)

    def take(self, state: StepState, *, measured: bool, settled: bool = True) -> StepRecord | None:
        """One step, in place, and what it was, if measured; settled, it is known whether the rule has ended the run."""
        before = replace(state, statistics=copies(state.statistics)) if self._unread else None
        algorithm, plan, theta = self._algorithm, self._plan[state.taken], state.theta
        retain, forget = self.draw(plan)
        weights = (1 - algorithm.mix) * plan.retain, algorithm.mix * plan.forget
        gradient, leakage, losses = self._gradient(theta, retain, forget, weights, state, measured=measured)
        direction = self._preconditioner.apply(gradient)
        norm = self._norm(direction) if plan.max_norm is not None or measured else None
        if plan.max_norm is not None and norm is not None:
            direction = direction * (plan.max_norm / (norm + CLIP_EPSILON)).clamp_max(1.0)
        decays = algorithm.weight_decay > 0
        if plan.pull or (decays and not algorithm.adaptive):
            decay = 0.0 if algorithm.adaptive else self._decay
            direction = direction + self._preconditioner.apply(decay * theta + plan.pull * theta.sign())
        ahead, moments = updated(algorithm, state.moments, direction, state.taken + 1)
        if algorithm.adaptive:
            ahead = ahead + self._decay * theta if decays else ahead
            ahead = ahead if self._paces is None else ahead * self._paces
        lr = algorithm.lr * plan.lr
        change = -lr * ahead
        state.theta, state.moments, state.taken = theta + change, moments, state.taken + 1
        if self._rule.active:
            # Under Poisson sampling a batch may be empty.
            moves = plan.lr > 0 and any(w and b.numel() for w, b in zip(weights, (retain, forget), strict=True))
            self._watch(state, before, change.norm() / theta.norm(), leakage, moves=moves, settled=settled)
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

    def _watch(
        self,
        state: StepState,
        before: StepState | None,
        drift: Tensor,
        leakage: Tensor | None,
        *,
        moves: bool,
        settled: bool,
    ) -> None:
        """Ask the rule after a step; an accelerator is waited for only where the answer is to be settled."""
        if before is None and (settled or not self._defers):
            if bool(self._rule.decide(drift, leakage, moves=moves)):
                still = bool(self._rule.decide(drift, None, moves=moves))
                state.stop_reason = "drift" if still else "leakage"
            return
        stop, unmoved = (self._rule.decide(drift, seen, moves=moves) for seen in (leakage, None))
        ended = torch.where(stop, torch.where(unmoved, state.taken, -state.taken), 0)
        if before is not None and self._ended is not None:
            # Once the run has ended, the steps up to the next look leave everything where it is.
            over = self._ended != 0
            ended = torch.where(over, self._ended, ended)
            state.theta = torch.where(over, before.theta, state.theta)
            state.moments = state.moments.kept(before.moments, over)
            for name, tensor in state.statistics.items():
                tensor.copy_(torch.where(over, before.statistics[name], tensor))
        self._ended = ended
        self._unread.append(state.gradients)
        if settled:
            step = int(ended)
            if step:
                state.gradients = self._unread[abs(step) - state.taken - 1]
                state.taken, state.stop_reason = abs(step), "drift" if step > 0 else "leakage"
            self._unread, self._ended = [], None

    def _norm(self, direction: Tensor) -> Tensor:
        """‖Pĝ‖ without the layers' step sizes, which SGD has in P."""
        if self._paces is None or self._algorithm.adaptive:
            return direction.norm()
        return (direction / self._paces).masked_fill(self._paces == 0, 0.0).norm()

    def _gradient(
        self,
        theta: Tensor,
        retain: Tensor,
        forget: Tensor,
        weights: tuple[float, float],
        state: StepState,
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
        together = joint and len(parts) == 2 and layout(parts[0].inputs) == layout(parts[1].inputs)
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
            with torch.enable_grad():
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
            with torch.no_grad():
                residual = checked_residual(self._algorithm, self._problem.loss, batch, forget=part.forget)
                residuals.append(part.weight * residual)
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


def _join(left: Inputs, right: Inputs) -> Inputs:
    """Both batches as one, tensor by tensor in the same order."""
    others = iter(list(tensors_of(right)))
    return map_tensors(lambda t: torch.cat([t, next(others)]), left)
