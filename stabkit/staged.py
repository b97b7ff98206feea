"""A rollout that linearises anew where the last linearisation stops being true (theory §6).

The network is linearised at θ*, the run rolled out, and the real network evaluated at the predicted parameters: how far
its outputs are from the linearised ones, relative to how far those moved, is the error. Where it passes a level, the
network is linearised there and the same run, same batches, rolled on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabkit._progress import progress_bar
from stabkit._validate import check_int, check_real
from stabkit.algorithms.base import Algorithm
from stabkit.curvature import LinearisedNetwork, linearise
from stabkit.problem import UnlearningProblem
from stabkit.rollout import Rollout, Start, loss_scale, rollout

# A compromise between cost and error, made on calibration cells of the benchmark. Few samples make a stage cheap and a
# little too ready to break: more of them are worth trying where the verdict matters.
MAX_ERROR = 0.4
STAGE_SAMPLES, STAGE_RANK = (192, 96), 50
MAX_STAGES = 24


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One linearisation and the part of the run that it stands for.

    Attributes:
        first_step: Where in the run the network is linearised.
        last_step: Last step taken from this stage.
        error: Relative error of the linearised outputs there.
        retain_loss: The real network's retain loss at the predicted parameters of `first_step`, on the linearised samples.
        forget_loss: The same for the forget samples.
    """

    first_step: int
    last_step: int
    error: float
    retain_loss: float
    forget_loss: float


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedRollout:
    """What the run did, stage by stage.

    Attributes:
        rollout: The whole run, S seeds at one setting, as one linearisation's rollout would be. Its coordinates are those
            where the first stage ends.
        stages: For each seed its stages, in order.
        gradient_equivalents: Per-sample gradient evaluations beyond those of the first linearisation.
    """

    rollout: Rollout
    stages: tuple[tuple[Stage, ...], ...]
    gradient_equivalents: float


def staged_rollout(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    max_error: float = MAX_ERROR,
    max_stages: int = MAX_STAGES,
    rank: int = STAGE_RANK,
    retain_samples: int | None = STAGE_SAMPLES[0],
    forget_samples: int | None = STAGE_SAMPLES[1],
    seed: int = 0,
    progress: bool = False,
) -> StagedRollout:
    """Roll one setting out, linearising anew whenever the error passes a level.

    Args:
        problem: The unlearning problem.
        network: Its linearisation at θ*, with which every seed begins.
        algorithm: The algorithm with its step size and mix.
        batch_sizes: B_R and B_F.
        seeds: One run each.
        max_error: Relative error of the outputs at which a stage ends.
        max_stages: Linearisations of a run, the first included; the last stage goes on to the end whatever its error.
        rank: Directions of the later linearisations.
        retain_samples: Retain samples of those; all when None.
        forget_samples: Forget samples of those; all when None.
        seed: Seed of the linearisations' samples and sketches.
        progress: Whether to show a progress bar.

    Returns:
        The rollout. Cost of every further stage and seed: a linearisation of `STAGE_SAMPLES`, 2·min(O, 60) gradients of
        each, and forward passes over them at log2(steps) places.

    Raises:
        ValueError: If an argument is out of its domain, or batches are normalised by their own statistics.
    """
    if problem.batchnorm == "batch":
        raise ValueError(
            "`batchnorm` of `UnlearningProblem` must be 'frozen' for staged rollouts; got 'batch'. Predict with "
            "mode='standard'."
        )
    check_real(max_error, name="max_error", owner="staged_rollout", low=0, low_open=True)
    check_int(max_stages, name="max_stages", owner="staged_rollout", low=1)
    if len(seeds) == 0:
        raise ValueError("`seeds` of `staged_rollout` must name at least one seed; got none.")
    again = {"rank": rank, "retain_samples": retain_samples, "forget_samples": forget_samples, "seed": seed}
    parts, histories, spent = [], [], 0.0
    for one in progress_bar(list(seeds), "staged rollout", progress):
        run = _Staged(problem, network, algorithm, batch_sizes, one, again)
        parts.append(run.roll(max_error, max_stages))
        histories.append(tuple(run.stages))
        spent += run.gradients
    fields = ("score", "divergence_step", "stopped_step", "retain_loss", "forget_loss", "coordinates")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
    return StagedRollout(rollout=replace(parts[0], **joined), stages=tuple(histories), gradient_equivalents=spent)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The real network at parameters that were predicted: its outputs' distance from the linearised ones, and its losses."""

    error: float
    retain_loss: float
    forget_loss: float


class _Staged:
    """One seed's run."""

    def __init__(
        self,
        problem: UnlearningProblem,
        network: LinearisedNetwork,
        algorithm: Algorithm,
        batch_sizes: tuple[int, int],
        seed: int,
        again: dict[str, Any],
    ) -> None:
        self._problem, self._first, self._algorithm = problem, network, algorithm
        self._batch_sizes, self._seed, self._again = batch_sizes, seed, again
        self._scale = loss_scale(network)
        self.stages: list[Stage] = []
        self.gradients = 0.0

    def roll(self, max_error: float, max_stages: int) -> Rollout:
        """All stages."""
        network, theta = self._first, self._problem.vector()
        step, velocity = 0, network.metric.new_zeros(network.rank)
        whole: Rollout | None = None
        first: Tensor | None = None
        while True:
            rolled, path = self._stage(network, step, velocity)
            whole = rolled if whole is None else self._joined(whole, rolled, step)
            crossing = float(rolled.divergence_step[0, 0])
            ahead = [k for k in path if k > step and not k > crossing]
            final = len(self.stages) + 1 >= max_stages
            last, seen = self._believed(network, theta, path, ahead, max_error, final=final)
            self.stages.append(self._record(network, step, last, seen.error))
            if first is None:
                first = path[last][0].reshape(1, 1, -1).double().cpu()
            if not ahead:
                break
            if last == ahead[-1]:
                whole = self._corrected(whole, last, seen)
                if final or math.isnan(crossing) or float(whole.divergence_step[0, 0]) == last:
                    break
            coordinates, momentum = path[last]
            push = network.basis @ momentum.to(network.basis)
            theta = theta + network.displacement(coordinates)
            network = self._linearised(theta)
            # What of the velocity leaves the new coordinates moves the outputs little: that is how they are chosen.
            step, velocity = last, (network.basis.T @ push).to(network.metric)
        return replace(whole, coordinates=first, kind="staged")

    def _stage(
        self, network: LinearisedNetwork, step: int, velocity: Tensor
    ) -> tuple[Rollout, dict[int, tuple[Tensor, Tensor]]]:
        """The run from a step on, and its coordinates and velocities after every step."""
        path: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(k: int, at: Tensor, momentum: Tensor) -> None:
            path[k] = at[0].clone(), momentum[0].clone()

        rolled = rollout(
            network,
            self._algorithm,
            lr=[self._algorithm.lr],
            mix=[self._algorithm.mix],
            batch_sizes=self._batch_sizes,
            seeds=[self._seed],
            start=Start(step=step, velocity=velocity),
            on_step=keep,
        )
        return rolled, path

    def _believed(
        self,
        network: LinearisedNetwork,
        theta: Tensor,
        path: dict[int, tuple[Tensor, Tensor]],
        ahead: list[int],
        max_error: float,
        *,
        final: bool,
    ) -> tuple[int, _Seen]:
        """Last look up to which the linearised outputs are right, at least the next one, and the real network there."""
        if not ahead:
            here = next(iter(path))
            return here, self._real(network, theta, path[here][0])
        seen = self._real(network, theta, path[ahead[-1]][0])
        if final or seen.error <= max_error:
            return ahead[-1], seen
        low, high = 0, len(ahead) - 1
        best: _Seen | None = None
        while high - low > 1:
            middle = (low + high) // 2
            looked = self._real(network, theta, path[ahead[middle]][0])
            if looked.error <= max_error:
                low, best = middle, looked
            else:
                high = middle
        return ahead[low], best or self._real(network, theta, path[ahead[low]][0])

    def _real(self, network: LinearisedNetwork, theta: Tensor, coordinates: Tensor) -> _Seen:
        """‖f(θ + δ) - f(θ) - Φc‖ / ‖Φc‖ over the linearised samples, and the losses at θ + δ."""
        if not bool(torch.isfinite(coordinates).all()):
            return _Seen(error=math.inf, retain_loss=math.inf, forget_loss=math.inf)
        parameters = self._problem.unflatten(theta + network.displacement(coordinates))
        wrong = moved = 0.0
        losses = []
        for samples, part in ((self._problem.retain, network.retain), (self._problem.forget, network.forget)):
            outputs, _, loss = self._problem.evaluate(samples, parameters, part.indices)
            real, mean = outputs.double(), float(loss.double().mean())
            change = (part.features.double() @ coordinates.double()).reshape(real.shape)
            wrong += float((real - part.outputs.double() - change).square().sum())
            moved += float(change.square().sum())
            losses.append(mean if math.isfinite(mean) else math.inf)
            self.gradients += part.samples / 3
        error = math.inf if not math.isfinite(wrong) else math.sqrt(wrong / moved) if moved > 0 else 0.0
        return _Seen(error=error, retain_loss=losses[0], forget_loss=losses[1])

    def _joined(self, before: Rollout, after: Rollout, step: int) -> Rollout:
        """A run up to a step from one rollout, which has not crossed before it, and from then on from another."""
        place = int((before.steps < step).sum())
        losses: dict[str, Any] = {
            name: torch.cat([getattr(before, name)[..., :place], getattr(after, name)[..., place:]], dim=-1)
            for name in ("retain_loss", "forget_loss")
        }
        worst = self._scale.score(losses["retain_loss"][..., :place].amax(-1)) if place else after.score
        return replace(after, score=torch.maximum(after.score, worst), **losses)

    def _corrected(self, whole: Rollout, last: int, seen: _Seen) -> Rollout:
        """At the last look of a run, or where it crosses, the real network's losses have the say."""
        steps = whole.steps.tolist()
        place = steps.index(last) if last in steps else next(i for i, k in enumerate(steps) if k > last)
        retain, forget = whole.retain_loss.clone(), whole.forget_loss.clone()
        retain[..., place], forget[..., place] = seen.retain_loss, seen.forget_loss
        reached = self._scale.score(retain[..., place])
        crossed = float(whole.divergence_step[0, 0])
        if bool(reached >= 0):  # what lies beyond may be worse still
            step = last if math.isnan(crossed) else crossed
            score = torch.maximum(whole.score, reached)
        else:
            step, score = math.nan, self._scale.score(retain[..., : place + 1].amax(-1))
        if math.isnan(crossed):  # the run has ended: its losses stay
            retain[..., place:], forget[..., place:] = seen.retain_loss, seen.forget_loss
        return replace(
            whole,
            retain_loss=retain,
            forget_loss=forget,
            score=score,
            divergence_step=torch.full_like(whole.divergence_step, step),
        )

    def _linearised(self, theta: Tensor) -> LinearisedNetwork:
        """The network linearised at other parameters, from the same samples."""
        first = self._first
        network = linearise(
            self._problem.at(theta),
            first.preconditioner,
            **self._again,
        )
        self.gradients += network.gradient_equivalents
        parts = []
        for samples, part in ((self._problem.retain, network.retain), (self._problem.forget, network.forget)):
            self.gradients += part.samples / 3
            parts.append(replace(part, original=self._problem.evaluate(samples, indices=part.indices)[0]))
        return replace(network, retain=parts[0], forget=parts[1])

    def _record(self, network: LinearisedNetwork, step: int, last: int, error: float) -> Stage:
        """What a stage was."""
        losses = [
            float(network.loss.per_sample(part.outputs.double(), part.targets).mean())
            for part in (network.retain, network.forget)
        ]
        return Stage(first_step=step, last_step=last, error=error, retain_loss=losses[0], forget_loss=losses[1])
