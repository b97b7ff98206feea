"""A rollout that leaves the linearised network for the real one where it stops being true (theory §6).

The run is rolled out on the network linearised at θ*, and the real network evaluated at the predicted parameters. From the
step up to which its loss and its outputs are those of the linearised network, and its outputs depend on no parameters that
were dormant at θ*, the same run, same batches, goes on with real steps on a copy. A setting on which the linearisation is
right so costs a few forward passes, and one that leaves it at once costs the run. Of an AdamW run the linearisation knows
a sample of the parameters alone, so that there is nowhere to hand over, and where batches are normalised by their own
statistics it knows other batches than the run's, whose places are elsewhere: all steps of these are real.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabkit._progress import progress_bar
from stabkit._validate import check_real
from stabkit.algorithms.base import Algorithm
from stabkit.calibration import MAX_AWAKENED
from stabkit.curvature import LinearisedNetwork, LinearisedSet
from stabkit.curvature.dormant import SAMPLES, awakened
from stabkit.network import check_modes
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.rollout import SCORE_CAP, Rollout, loss_scale, players_of, rollout
from stabkit.steps import Position, check_coupled, steps_from
from stabkit.updates import Moments

# Chosen on calibration cells of the benchmark: half of either does hardly better there and costs half as much again.
MAX_LOSS_ERROR, MAX_OUTPUT_ERROR = 0.05, 0.2
PATH_STEPS = 4  # real ones, first and before a place, which show whether a run goes where the linearised one goes
ROUNDING = 100  # epsilons of the outputs: they move no less, as far as can be told
MAX_PATH_ERROR = 0.5  # of the outputs then, relative to how far they moved; own choice: see papers/theory.md
PAST_CROSSING = 10  # steps further than a crossing, which show how far past the level a run goes


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Where one seed's run leaves the linearised network.

    Attributes:
        step: Last step that is taken from the linearisation.
        real_steps: Steps that are taken on the real network after it; 0 where the linearisation holds to the end.
        loss_error: Error of the linearised retain loss at `step`, as a share of the divergence level.
        output_error: Error of the linearised outputs there, relative to how far they moved.
        path_error: How far the outputs of a few steps are from those of the linearised steps, relative to how far they
            moved: of the first ones, or of those before `step` where that is more; 0 where that was not looked at.
    """

    step: int
    real_steps: int
    loss_error: float
    output_error: float
    path_error: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedRollout:
    """What the run did.

    Attributes:
        rollout: The whole run, S seeds at one setting, as one linearisation's rollout would be. Its coordinates are those of
            the handover, or of the linearised run where all steps are real unasked (AdamW, batchnorm="batch"); its score
            and losses go ten steps past a crossing, and on to the next look.
        handovers: One for each seed.
        gradient_equivalents: Per-sample gradient evaluations beyond those of the linearisation; a forward pass counts as a
            third.
    """

    rollout: Rollout
    handovers: tuple[Handover, ...]
    gradient_equivalents: float

    @property
    def real_steps(self) -> float:
        """Steps taken on the real network, mean over the seeds."""
        return sum(handover.real_steps for handover in self.handovers) / len(self.handovers)


def staged_rollout(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    max_loss_error: float = MAX_LOSS_ERROR,
    max_output_error: float = MAX_OUTPUT_ERROR,
    max_path_error: float = MAX_PATH_ERROR,
    progress: bool = False,
) -> StagedRollout:
    """Roll one setting out, on the real network where the linearised one is wrong and where it crosses the level.

    What weight decay or an L1 pull moves outside of the linearisation's directions is not handed over to the real steps.

    Args:
        problem: The unlearning problem.
        network: Its linearisation at θ*.
        algorithm: The algorithm with its step size and mix.
        batch_sizes: B_R and B_F.
        seeds: One run each.
        max_loss_error: Error of the retain loss, as a share of the divergence level, up to which the linearisation is kept.
        max_output_error: Error of the outputs, relative to how far they moved, up to which it is.
        max_path_error: How far, by the same measure, the outputs of a few steps may be from those of the linearised ones:
            beyond it the run is not where it is predicted to be, however right the outputs there. Where that are the first
            steps all are real; otherwise it goes on from an earlier place.
        progress: Whether to show a progress bar.

    Returns:
        The rollout. Cost of a seed: the first steps (`first_look`); forward passes over the linearised samples at up to
        log2(steps) + 3 places, at most of them with four real steps and two passes over up to 128 samples; then what the
        rest of the run costs, with passes over all of them at each look; gradients of up to 128 samples at each of those
        places where the network has dormant tensors. Of AdamW, and with batchnorm="batch", all steps are real.

    Raises:
        ValueError: If an argument is out of its domain, or batches may have no variance to be normalised by.
        RuntimeError: Under torch.inference_mode() or torch.autocast, or with another default device than the CPU.
    """
    check_modes("staged_rollout")
    check_real(max_loss_error, name="max_loss_error", owner="staged_rollout", low=0, low_open=True)
    check_real(max_output_error, name="max_output_error", owner="staged_rollout", low=0, low_open=True)
    check_real(max_path_error, name="max_path_error", owner="staged_rollout", low=0, low_open=True)
    if len(seeds) == 0:
        raise ValueError("`seeds` of `staged_rollout` must name at least one seed; got none.")
    bounds = max_loss_error, max_output_error, max_path_error
    if problem.batchnorm == "batch":
        check_coupled(algorithm, batch_sizes)
    runs = [_Run(problem, network, algorithm, batch_sizes, seed) for seed in seeds]
    parts = [run.roll(bounds) for run in progress_bar(runs, "staged rollout", progress)]
    fields = ("score", "divergence_step", "stopped_step", "retain_loss", "forget_loss", "coordinates")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part, _ in parts]) for name in fields}
    return StagedRollout(
        rollout=replace(parts[0][0], kind="staged", **joined),
        handovers=tuple(handover for _, handover in parts),
        gradient_equivalents=sum(run.gradients for run in runs),
    )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The real network at parameters that were predicted: its losses, and how wrong the linearised one is there."""

    loss_error: float
    output_error: float
    losses: tuple[float, float]
    awakened: float = 0.0
    path_error: float = 0.0

    def within(self, bounds: tuple[float, float, float]) -> bool:
        """Whether no error is beyond its bound, and the sensitivity not elsewhere than at θ*."""
        right = self.loss_error <= bounds[0] and self.output_error <= bounds[1]
        return right and self.path_error <= bounds[2] and self.awakened <= MAX_AWAKENED


def rounding(like: Tensor) -> float:
    """The least share of their size that outputs move by, as far as can be told.

    Args:
        like: A tensor of their dtype.

    Returns:
        The share.
    """
    return ROUNDING * torch.finfo(like.dtype).eps


class _Run:
    """One seed's run."""

    def __init__(
        self,
        problem: UnlearningProblem,
        network: LinearisedNetwork,
        algorithm: Algorithm,
        batch_sizes: tuple[int, int],
        seed: int,
    ) -> None:
        self._problem, self._network, self._algorithm = problem, network, algorithm
        self._batch_sizes, self._seed = batch_sizes, seed
        self._theta = problem.vector()
        self._scale = loss_scale(network)
        self.path: dict[int, tuple[Tensor, Moments]] = {}  # coordinates and moments after every step
        self.gradients = 0.0

    def linearised(self) -> Rollout:
        """One linearisation's rollout, whose path is kept."""

        def keep(step: int, coordinates: Tensor, moments: Moments) -> None:
            self.path[step] = coordinates[0].clone(), moments[0]

        return rollout(
            self._network,
            self._algorithm,
            lr=[self._algorithm.lr],
            mix=[self._algorithm.mix],
            batch_sizes=self._batch_sizes,
            seeds=[self._seed],
            on_step=keep,
        )

    def roll(self, bounds: tuple[float, float, float]) -> tuple[Rollout, Handover]:
        """Linearised as far as that is right, then for real."""
        rolled = self.linearised()
        crossing = float(rolled.divergence_step[0, 0])
        if crossing == 0:  # nothing is left to predict
            return rolled, Handover(step=0, real_steps=0, loss_error=0.0, output_error=0.0)
        if self._algorithm.adaptive or self._problem.batchnorm == "batch":
            rolled, real_steps = self._walked(rolled, 0)
            return rolled, Handover(step=0, real_steps=real_steps, loss_error=0.0, output_error=0.0)
        # A crossing is left to real steps: the path to it may be wrong where its end is not.
        ahead = [k for k in self.path if k > 0 and not k >= crossing]
        departed = self._path_error(ahead)
        if departed > bounds[2]:
            last, seen = 0, _Seen(loss_error=0.0, output_error=0.0, losses=(math.nan, math.nan))
        else:
            last, seen = self._believed(rolled, ahead, bounds)
        if ahead and last == ahead[-1] and math.isnan(crossing):
            rolled, real_steps = self._ended(rolled, last, seen), 0
        else:
            rolled, real_steps = self._walked(rolled, last)
        handover = Handover(
            step=last,
            real_steps=real_steps,
            loss_error=seen.loss_error,
            output_error=seen.output_error,
            path_error=max(departed, seen.path_error),
        )
        return replace(rolled, coordinates=self.path[last][0].reshape(1, 1, -1).double().cpu()), handover

    def _path_error(self, ahead: list[int]) -> float:
        """Error of the linearised outputs a few steps on, against real steps with the same batches, stand-ins included."""
        # The outputs at predicted parameters cannot show it: a gradient outside of the linearisation's directions moves the
        # real run and not the predicted one, which may be right about a place that the run never comes to.
        if not ahead:
            return 0.0
        at = self.stepped(ahead)
        outputs, _ = self._evaluated(self._problem.unflatten(at.theta))
        return self._network.output_error(self.path[at.step][0], outputs, least=rounding(self._theta))

    def stepped(self, ahead: list[int]) -> Position:
        """A few real steps, with the batches of the rollout, stand-ins included.

        Args:
            ahead: Steps of the path to look at.

        Returns:
            The position after up to `first_look` of them.
        """
        at = self._start()
        if not ahead:
            return at
        last = min(first_look(self._algorithm), ahead[-1])
        for at in self._steps(self._start(), last):
            if at.step == last or at.stopped:
                break
        self.gradients += at.gradient_equivalents
        return at

    def _steps(self, start: Position, last: int) -> Iterator[Position]:
        """Real steps, of which the last is looked at, with the batches of the rollout, stand-ins included."""
        return steps_from(
            self._problem,
            self._algorithm,
            self._network.run_preconditioner,
            start,
            batch_sizes=self._batch_sizes,
            seed=self._seed,
            players=players_of(self._network, self._seed),
            looks={last},
        )

    def _start(self) -> Position:
        """Before the first step."""
        statistics = self._problem.statistics if self._problem.batchnorm == "batch" else {}
        return Position(
            step=0, theta=self._theta, moments=Moments.zero(self._algorithm, self._theta), statistics=statistics
        )

    def _position(self, step: int) -> Position:
        """Where the linearised run is after a step."""
        coordinates, carried = self.path[step]
        return Position(
            step=step,
            theta=self._theta + self._displaced(coordinates),
            moments=Moments(
                first=self._displaced(carried.first) if self._algorithm.momentum else torch.zeros_like(self._theta)
            ),
            statistics={},
        )

    def _displaced(self, coordinates: Tensor) -> Tensor:
        """A displacement, which takes gradients where the basis is not held."""
        self.gradients += self._network.displacement_gradients
        return self._network.displacement(coordinates)

    def _recent_error(self, step: int) -> float:
        """Error of the linearised change of the outputs over the steps before a place, against real steps from there."""
        # Errors that are small wherever one looks add up to another place, and runs near the boundary magnify them. A
        # change of less than the run's average over as many steps counts as that: little comes of it.
        before = step - PATH_STEPS
        if before <= 0:
            return 0.0  # the first steps have been looked at
        at = start = self._position(before)
        for at in self._steps(start, step):
            if at.step == step or at.stopped:
                break
        network = self._few
        there, here = (self._evaluated(self._problem.unflatten(place.theta), network)[0] for place in (start, at))
        self.gradients += at.gradient_equivalents
        reached, began = self.path[at.step][0], self.path[before][0]
        gone = math.sqrt(
            sum(
                float((part.features @ reached.to(part.features)).double().square().sum())
                for part in (network.retain, network.forget)
            )
        )
        share = (at.step - before) / at.step
        return network.output_error(
            reached - began, here, before=there, least=rounding(self._theta), moved=gone * share
        )

    @functools.cached_property
    def _few(self) -> LinearisedNetwork:
        """The network with few samples of each set, which tell whether steps are alike."""

        def part(whole: LinearisedSet) -> LinearisedSet:
            return whole.picked(torch.linspace(0, whole.samples - 1, min(SAMPLES, whole.samples)).round().long())

        return replace(self._network, retain=part(self._network.retain), forget=part(self._network.forget))

    def _believed(self, rolled: Rollout, ahead: list[int], bounds: tuple[float, float, float]) -> tuple[int, _Seen]:
        """Last step up to which the linearisation is right, and the real network there."""
        candidates = [0, *ahead]
        seen = self._seen(candidates[-1])
        if seen.within(bounds):
            # The verdict is about the worst loss of the run, which may lie before its end.
            looks = [(float(loss), k) for k, loss in zip(rolled.steps.tolist(), rolled.retain_loss[0, 0], strict=True)]
            peak = max((look for look in looks if look[1] in set(ahead)), default=(0.0, candidates[-1]))[1]
            half = candidates[len(candidates) // 2]
            if peak != candidates[-1] and not self._seen(peak, path=False).within(bounds):
                candidates = candidates[: candidates.index(peak) + 1]
            elif self._recent_error(half) > bounds[2]:
                candidates = candidates[: candidates.index(half) + 1]
            else:
                return candidates[-1], seen
        low, high = 0, len(candidates) - 1
        best: _Seen | None = None
        while high - low > 1:
            middle = (low + high) // 2
            looked = self._seen(candidates[middle])
            if looked.within(bounds):
                low, best = middle, looked
            else:
                high = middle
        return candidates[low], best or self._seen(candidates[low])

    def _ended(self, rolled: Rollout, last: int, seen: _Seen) -> Rollout:
        """A run that is linearised to its end, where the real network's losses have the say."""
        place = sum(k < last for k in rolled.steps.tolist())
        losses = self._losses(rolled)
        for values, value in zip(losses.values(), seen.losses, strict=True):
            values[..., place:] = value
        reached = self._score(seen.losses)
        earlier = self._scale.score(losses["retain_loss"][..., :place]).amax(-1) if place else rolled.score
        return replace(
            rolled,
            score=earlier.clamp_min(reached),
            divergence_step=torch.full_like(rolled.divergence_step, float(last) if reached >= 0 else math.nan),
            **losses,
        )

    def _walked(self, rolled: Rollout, last: int) -> tuple[Rollout, int]:
        """Real steps from the last believed one on, written into the run's looks; and how many."""
        looks = rolled.steps.tolist()
        place = sum(k <= last for k in looks)  # the next look
        losses = self._losses(rolled)
        worst = float(self._scale.score(rolled.retain_loss[0, 0, :place]).max())
        crossed = math.nan
        at = start = self._position(last) if last else self._start()
        for at in steps_from(
            self._problem,
            self._algorithm,
            self._network.run_preconditioner,
            start,
            batch_sizes=self._batch_sizes,
            seed=self._seed,
            looks=frozenset(looks),
        ):
            if at.step != looks[place] and not at.stopped:
                continue
            _, found = self._evaluated({**self._problem.unflatten(at.theta), **at.statistics})
            for values, value in zip(losses.values(), found, strict=True):
                values[..., place:] = value  # what follows stays there if the run ends here
            place += at.step == looks[place]
            score = self._score(found)
            worst = max(worst, score)
            crossed = float(at.step) if score >= 0 and math.isnan(crossed) else crossed
            if worst >= SCORE_CAP or at.step >= crossed + PAST_CROSSING:
                break
        self.gradients += at.gradient_equivalents
        stopped = at.step if at.stopped else self._algorithm.steps
        walked = replace(
            rolled,
            score=torch.full_like(rolled.score, worst),
            divergence_step=torch.full_like(rolled.divergence_step, crossed),
            stopped_step=torch.full_like(rolled.stopped_step, float(stopped)),
            **losses,
        )
        return walked, at.step - last

    def _losses(self, rolled: Rollout) -> dict[str, Any]:
        """Copies of the losses at the looks, retain first."""
        return {name: getattr(rolled, name).clone() for name in ("retain_loss", "forget_loss")}

    def _score(self, losses: tuple[float, float]) -> float:
        """As a run counts: anything that is not finite has diverged."""
        if not all(map(math.isfinite, losses)):
            return SCORE_CAP
        return float(self._scale.score(torch.tensor(losses[0], dtype=torch.float64)))

    def _seen(self, step: int, *, path: bool = True) -> _Seen:
        """The real network at the parameters predicted for a step, and whether the run comes there."""
        network, coordinates = self._network, self.path[step][0]
        if not bool(torch.isfinite(coordinates).all()):
            return _Seen(loss_error=math.inf, output_error=math.inf, losses=(math.inf, math.inf))
        moved = self._problem.unflatten(self._theta + self._displaced(coordinates))
        outputs, losses = self._evaluated(moved)
        self.gradients += 2 * SAMPLES if network.dormant else 0
        part = network.retain
        change = (part.features @ coordinates.to(part.features)).double().reshape(part.outputs.shape)
        linear = float(network.loss.per_sample(part.outputs.double() + change, part.targets).mean())
        # How far either lies beyond the level does not matter.
        ends = [min(value, self._scale.floor + self._scale.room) for value in (losses[0], linear)]
        return _Seen(
            loss_error=abs(ends[0] - ends[1]) / self._scale.room if math.isfinite(ends[1]) else math.inf,
            output_error=network.output_error(coordinates, outputs),
            losses=losses,
            awakened=awakened(self._problem, network, moved),
            path_error=self._recent_error(step) if path else 0.0,
        )

    def _evaluated(
        self, parameters: Parameters, on: LinearisedNetwork | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
        """The real network's outputs and mean losses on the linearised samples, or those of another network."""
        outputs, means, held = [], [], on or self._network
        for samples, part in ((self._problem.retain, held.retain), (self._problem.forget, held.forget)):
            found, _, losses = self._problem.evaluate(samples, parameters, part.indices)
            mean = float(losses.double().mean())
            outputs.append(found)
            means.append(mean if math.isfinite(mean) else math.inf)
            self.gradients += part.samples / 3
        return (outputs[0], outputs[1]), (means[0], means[1])


def first_steps(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Where a run's first steps lead, linearised and for real: all that can be compared of sampled parameters.

    Args:
        problem: The unlearning problem.
        network: Its linearisation at θ*.
        algorithm: The algorithm with its step size and mix.
        batch_sizes: B_R and B_F.
        seed: Seed of the batches.

    Returns:
        Coordinates c, shape (r,), and parameters θ, shape (d,), after up to `first_look` steps, of which none but the last
        is past the divergence level. Cost: a rollout, and those steps.
    """
    run = _Run(problem, network, algorithm, batch_sizes, seed)
    crossing = float(run.linearised().divergence_step[0, 0])
    ahead = [k for k in run.path if k > 0 and not k > crossing]
    at = run.stepped(ahead)
    return run.path[at.step][0], at.theta


def first_look(algorithm: Algorithm) -> int:
    """The step by which a run has gone as far as `PATH_STEPS` whole ones, and each set that drives it as far as one.

    Schedules begin with small steps, in which nothing shows, and cycles with steps on one of the sets.

    Args:
        algorithm: The algorithm.

    Returns:
        The step, at most the last one.
    """
    plan, mix = algorithm.plan(), algorithm.mix
    lrs = torch.tensor([step.lr for step in plan], dtype=torch.float64)
    sets = [[step.retain for step in plan]] * (mix < 1) + [[step.forget for step in plan]] * (mix > 0)
    wanted = [(lrs, PATH_STEPS), *((lrs * torch.tensor(weights, dtype=torch.float64), 1) for weights in sets)]
    gone = torch.ones(len(plan), dtype=torch.bool)
    for lengths, least in wanted:
        gone &= lengths.cumsum(0) >= least * lengths.max()
    return int(gone.int().argmax()) + 1 if bool(gone.any()) else len(plan)
