"""A rollout that leaves the linearised network where that stops being true (theory §6).

The run is rolled out on the network linearised at θ*, and the real network evaluated at the predicted parameters: how far
its retain loss is from the linearised one, as a share of the divergence level, is the error. Where it passes a bound the
same run, same batches, goes on with real steps: as many as another linearisation would cost, and then from one where it can
still save as many. A setting on which the first linearisation is right so costs a few forward passes, and one that leaves it
at once a run.
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
from stabkit.curvature import LinearisedNetwork, LinearisedSet, linearisation_cost, linearise
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.rollout import SCORE_CAP, Rollout, Start, loss_scale, rollout
from stabkit.runner import Position, statistics_along, steps_from

# Chosen on calibration cells of the benchmark: half of either does hardly better there and costs half as much again.
MAX_LOSS_ERROR, MAX_OUTPUT_ERROR = 0.05, 0.2
STAGE_SAMPLES, STAGE_RANK = (192, 96), 50  # of the later linearisations
MAX_STAGES = 24


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run that one linearisation stands for, or that was taken on the real network.

    Attributes:
        kind: "linearised" or "real".
        first_step: Where in the run it begins.
        last_step: Last step of it.
        loss_error: Error of the linearised retain loss there, as a share of the divergence level; 0 of real steps.
        output_error: Error of the linearised outputs there, relative to how far they moved; 0 of real steps.
        retain_loss: The real network's retain loss at `first_step`, on the linearised samples.
        forget_loss: The same for the forget samples.
    """

    kind: str
    first_step: int
    last_step: int
    loss_error: float
    output_error: float
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

    @property
    def real_steps(self) -> float:
        """Steps taken on the real network, mean over the seeds."""
        taken = sum(s.last_step - s.first_step for stages in self.stages for s in stages if s.kind == "real")
        return taken / len(self.stages)


def staged_rollout(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    max_loss_error: float = MAX_LOSS_ERROR,
    max_output_error: float = MAX_OUTPUT_ERROR,
    max_stages: int = MAX_STAGES,
    real_steps: int | None = None,
    rank: int = STAGE_RANK,
    retain_samples: int | None = STAGE_SAMPLES[0],
    forget_samples: int | None = STAGE_SAMPLES[1],
    seed: int = 0,
    progress: bool = False,
) -> StagedRollout:
    """Roll one setting out, on the real network wherever the linearised one's error passes a level.

    Args:
        problem: The unlearning problem.
        network: Its linearisation at θ*, with which every seed begins.
        algorithm: The algorithm with its step size and mix.
        batch_sizes: B_R and B_F.
        seeds: One run each.
        max_loss_error: Error of the retain loss, as a share of the divergence level, at which a linearisation is left.
        max_output_error: Error of the outputs, relative to how far they moved, at which it is left.
        max_stages: Linearisations of a run, the first included.
        real_steps: Real steps before the first further linearisation, twice as many before each one after that; as many
            as a linearisation costs when None. 0 takes none: the network is linearised anew at once, at least one step is
            taken from each, and the last one goes on to the end whatever its error.
        rank: Directions of the later linearisations.
        retain_samples: Retain samples of those; all when None.
        forget_samples: Forget samples of those; all when None.
        seed: Seed of the linearisations' samples and sketches.
        progress: Whether to show a progress bar.

    Returns:
        The rollout. Cost of a seed: forward passes over the linearised samples at up to log2(steps) + 2 places, B_R + B_F
        gradients a real step, and a linearisation of `retain_samples` + `forget_samples`, 2·min(O, rank + 10) gradients of
        each, for every further stage: those together cost no more than the run itself.

        With batchnorm="batch" there are no further linearisations, B_R + B_F forward passes a step of the first one, which
        the running statistics are known from, and as those move the outputs by themselves the loss's error counts alone.

    Raises:
        ValueError: If an argument is out of its domain, or no real steps are to be taken with batchnorm="batch".
    """
    check_real(max_loss_error, name="max_loss_error", owner="staged_rollout", low=0, low_open=True)
    check_real(max_output_error, name="max_output_error", owner="staged_rollout", low=0, low_open=True)
    check_int(max_stages, name="max_stages", owner="staged_rollout", low=1)
    if real_steps is not None:
        check_int(real_steps, name="real_steps", owner="staged_rollout", low=0, remedy="None finds a number.")
    if problem.batchnorm == "batch":
        if real_steps == 0:
            raise ValueError(
                "`real_steps` of `staged_rollout` must be above 0 with batchnorm='batch', whose running statistics no later "
                "linearisation knows; got 0. None finds a number."
            )
        max_stages, max_output_error = 1, math.inf
    if len(seeds) == 0:
        raise ValueError("`seeds` of `staged_rollout` must name at least one seed; got none.")
    again = {"rank": rank, "retain_samples": retain_samples, "forget_samples": forget_samples, "seed": seed}
    parts, histories, spent = [], [], 0.0
    for one in progress_bar(list(seeds), "staged rollout", progress):
        run = _Staged(problem, network, algorithm, batch_sizes, one, again)
        parts.append(run.roll((max_loss_error, max_output_error), max_stages, real_steps))
        histories.append(tuple(run.stages))
        spent += run.gradients
    fields = ("score", "divergence_step", "stopped_step", "retain_loss", "forget_loss", "coordinates")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
    return StagedRollout(rollout=replace(parts[0], **joined), stages=tuple(histories), gradient_equivalents=spent)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The real network at parameters that were predicted: its losses, and how far from them the linearised one's are."""

    loss_error: float
    output_error: float
    retain_loss: float
    forget_loss: float

    def within(self, bounds: tuple[float, float] | None) -> bool:
        """Whether neither error is beyond its bound."""
        return bounds is None or (self.loss_error <= bounds[0] and self.output_error <= bounds[1])


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
        self._statistics: list[Parameters] = []  # after each step of the first linearisation, with batchnorm="batch"
        self.stages: list[Stage] = []
        self.gradients = 0.0

    def roll(self, bounds: tuple[float, float], max_stages: int, real_steps: int | None) -> Rollout:
        """All stages."""
        network, at = self._first, self._begin()
        spell = self._spell() if real_steps is None else real_steps
        whole: Rollout | None = None
        first: Tensor | None = None
        linearisations = 1
        while True:
            rolled, path = self._stage(network, at)
            whole = rolled if whole is None else self._joined(whole, rolled, at.step)
            crossing = float(rolled.divergence_step[0, 0])
            # A crossing is left to real steps where there are any: the path to it may be wrong where its end is not.
            ahead = [k for k in path if k > at.step and not (k >= crossing if spell else k > crossing)]
            unbounded = linearisations >= max_stages and not spell
            if self._problem.batchnorm == "batch":
                self._statistics = self._followed(network, at, path, ahead)
            peak = int(rolled.steps[rolled.retain_loss[0, 0].argmax()])
            last, seen = self._believed(network, at, path, ahead, peak, None if unbounded else bounds, bool(spell))
            self.stages.append(self._record(network, at.step, last, seen))
            if first is None:
                first = path[last][0].reshape(1, 1, -1).double().cpu()
            if not ahead and not (spell and crossing > at.step):
                break
            if ahead and last == ahead[-1] and (math.isnan(crossing) or not spell):
                whole = self._corrected(whole, last, seen)
                if unbounded or math.isnan(crossing) or float(whole.divergence_step[0, 0]) == last:
                    break
            coordinates, momentum = path[last]
            at = Position(
                step=last,
                theta=at.theta + network.displacement(coordinates),
                velocity=network.displacement(momentum),
                statistics=self._known(last),
            )
            if spell:
                left = self._algorithm.steps - last
                # A linearisation is worth its cost where it can still save as many steps as it costs.
                count = left if linearisations >= max_stages or left <= 2 * spell else spell
                whole, at, ended = self._walked(whole, at, count, seen)
                if ended:
                    break
                spell *= 2
            network = self._linearised(at.theta)
            linearisations += 1
        return replace(whole, coordinates=first, kind="staged")

    def _begin(self) -> Position:
        """θ*, at rest."""
        theta = self._problem.vector()
        return Position(step=0, theta=theta, velocity=torch.zeros_like(theta))

    def _spell(self) -> int:
        """Steps that cost what a linearisation does."""
        outputs = self._first.retain.outputs[0].numel()
        asked = self._again["retain_samples"], self._again["forget_samples"]
        sizes = self._problem.retain.size, self._problem.forget.size
        samples = sum(n if m is None else min(m, n) for m, n in zip(asked, sizes, strict=True))
        return math.ceil(linearisation_cost(samples, outputs, self._again["rank"]) / sum(self._batch_sizes))

    def _followed(
        self, network: LinearisedNetwork, at: Position, path: dict[int, tuple[Tensor, Tensor]], ahead: list[int]
    ) -> list[Parameters]:
        """Running statistics after each of the steps of a linearisation at θ*."""
        finite = [k for k in ahead if bool(torch.isfinite(path[k][0]).all())]
        before = (at.theta + network.displacement(path[k - 1][0]) for k in finite)
        self.gradients += len(finite) * sum(self._batch_sizes) / 3
        return list(
            statistics_along(self._problem, self._algorithm, before, batch_sizes=self._batch_sizes, seed=self._seed)
        )

    def _known(self, step: int) -> Parameters:
        """Running statistics after a step; none where they are frozen."""
        if self._problem.batchnorm == "frozen":
            return {}
        return self._statistics[step - 1] if step else self._problem.statistics

    def _walked(self, whole: Rollout, start: Position, count: int, seen: _Seen) -> tuple[Rollout, Position, bool]:
        """Real steps, written into the run's looks; and whether the run has ended with them."""
        looks = whole.steps.tolist()
        place = sum(k <= start.step for k in looks)  # the next look
        losses = {name: getattr(whole, name).clone() for name in ("retain_loss", "forget_loss")}
        worst = float(self._scale.score(whole.retain_loss[0, 0, :place]).max())
        crossed = stopped = math.nan
        at, ended = start, False
        walk = steps_from(
            self._problem,
            self._algorithm,
            self._first.preconditioner,
            start,
            batch_sizes=self._batch_sizes,
            seed=self._seed,
        )
        # One look further than the crossing shows how far past the level the run goes.
        for at in walk:
            if at.step == looks[place] or at.stopped:
                before = crossed
                _, now = self._evaluated(self._first, {**self._problem.unflatten(at.theta), **at.statistics})
                for values, value in zip(losses.values(), now, strict=True):
                    values[..., place:] = value  # what follows stays there if the run ends here
                place += at.step == looks[place]
                score = (
                    float(self._scale.score(torch.tensor(now[0], dtype=torch.float64)))
                    if all(map(math.isfinite, now))
                    else SCORE_CAP
                )
                worst = max(worst, score)
                crossed = float(at.step) if score >= 0 and math.isnan(crossed) else crossed
                stopped = float(at.step) if at.stopped else math.nan
                ended = at.stopped or at.step == self._algorithm.steps or worst >= SCORE_CAP or not math.isnan(before)
            if ended or (at.step - start.step >= count and math.isnan(crossed)):
                break
        self.gradients += at.gradient_equivalents
        self.stages.append(
            Stage(
                kind="real",
                first_step=start.step,
                last_step=at.step,
                loss_error=0.0,
                output_error=0.0,
                retain_loss=seen.retain_loss,
                forget_loss=seen.forget_loss,
            )
        )
        found = replace(whole, **losses)
        if not ended:
            return found, at, False
        return (
            replace(
                found,
                score=torch.full_like(whole.score, worst),
                divergence_step=torch.full_like(whole.divergence_step, crossed),
                stopped_step=torch.full_like(
                    whole.stopped_step, self._algorithm.steps if math.isnan(stopped) else stopped
                ),
            ),
            at,
            True,
        )

    def _evaluated(
        self, network: LinearisedNetwork, parameters: Parameters
    ) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
        """The real network's outputs and mean losses on the samples of a linearisation."""
        outputs, means = [], []
        for samples, part in ((self._problem.retain, network.retain), (self._problem.forget, network.forget)):
            found, _, losses = self._problem.evaluate(samples, parameters, part.indices)
            mean = float(losses.double().mean())
            outputs.append(found)
            means.append(mean if math.isfinite(mean) else math.inf)
            self.gradients += part.samples / 3
        return (outputs[0], outputs[1]), (means[0], means[1])

    def _stage(self, network: LinearisedNetwork, at: Position) -> tuple[Rollout, dict[int, tuple[Tensor, Tensor]]]:
        """The run from a step on, and its coordinates and velocities after every step."""
        path: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(k: int, at: Tensor, momentum: Tensor) -> None:
            path[k] = at[0].clone(), momentum[0].clone()

        # What of the velocity leaves the new coordinates moves the outputs little: that is how they are chosen.
        pulled = network.basis.T @ network.preconditioner.sqrt(at.velocity)
        velocity = torch.linalg.lstsq(network.metric.double().cpu(), pulled.double().cpu().unsqueeze(1), driver="gelsd")
        rolled = rollout(
            network,
            self._algorithm,
            lr=[self._algorithm.lr],
            mix=[self._algorithm.mix],
            batch_sizes=self._batch_sizes,
            seeds=[self._seed],
            start=Start(step=at.step, velocity=velocity.solution.squeeze(1).to(network.metric)),
            on_step=keep,
        )
        return rolled, path

    def _believed(
        self,
        network: LinearisedNetwork,
        at: Position,
        path: dict[int, tuple[Tensor, Tensor]],
        ahead: list[int],
        peak: int,
        bounds: tuple[float, float] | None,
        may_stay: bool,
    ) -> tuple[int, _Seen]:
        """Last step up to which the linearised loss is right, at least the next one unless it may stay."""
        if not ahead:
            here = next(iter(path))
            return here, self._real(network, at, path, here)
        seen = self._real(network, at, path, ahead[-1])
        if seen.within(bounds):
            # The verdict is about the worst loss of the run, which may lie before its end.
            if peak not in ahead[:-1] or self._real(network, at, path, peak).within(bounds):
                return ahead[-1], seen
            ahead = ahead[: ahead.index(peak) + 1]
        if may_stay:
            ahead = [at.step, *ahead]
        low, high = 0, len(ahead) - 1
        best: _Seen | None = None
        while high - low > 1:
            middle = (low + high) // 2
            looked = self._real(network, at, path, ahead[middle])
            if looked.within(bounds):
                low, best = middle, looked
            else:
                high = middle
        return ahead[low], best or self._real(network, at, path, ahead[low])

    def _real(
        self, network: LinearisedNetwork, at: Position, path: dict[int, tuple[Tensor, Tensor]], step: int
    ) -> _Seen:
        """The real network at θ + δ after a step, against the linearised retain loss there."""
        coordinates = path[step][0]
        if not bool(torch.isfinite(coordinates).all()):
            return _Seen(loss_error=math.inf, output_error=math.inf, retain_loss=math.inf, forget_loss=math.inf)
        parameters = self._problem.unflatten(at.theta + network.displacement(coordinates))
        outputs, losses = self._evaluated(network, {**parameters, **self._known(step)})
        part = network.retain
        change = (part.features.double() @ coordinates.double()).reshape(part.outputs.shape)
        linear = float(network.loss.per_sample(_looked_at(part).double() + change, part.targets).mean())
        # How far either lies beyond the level does not matter.
        ends = [min(value, self._scale.floor + self._scale.room) for value in (losses[0], linear)]
        return _Seen(
            loss_error=abs(ends[0] - ends[1]) / self._scale.room if math.isfinite(ends[1]) else math.inf,
            output_error=network.output_error(coordinates, outputs, evaluated=True),
            retain_loss=losses[0],
            forget_loss=losses[1],
        )

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

    def _record(self, network: LinearisedNetwork, step: int, last: int, seen: _Seen) -> Stage:
        """What a stage was."""
        losses = [
            float(network.loss.per_sample(_looked_at(part).double(), part.targets).mean())
            for part in (network.retain, network.forget)
        ]
        return Stage(
            kind="linearised",
            first_step=step,
            last_step=last,
            loss_error=seen.loss_error,
            output_error=seen.output_error,
            retain_loss=losses[0],
            forget_loss=losses[1],
        )


def _looked_at(part: LinearisedSet) -> Tensor:
    """A set's outputs in eval mode where it is linearised."""
    return part.outputs if part.eval_outputs is None else part.eval_outputs
