"""Looks for settings that are predicted to hold, on the linearisation that a prediction has made already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stabkit._validate import check_real
from stabkit.algorithms import NPO, Algorithm, GradDiff, GradientAscent
from stabkit.algorithms.plan import factors_of
from stabkit.boundary import critical_lr
from stabkit.calibration import FAR_ERROR, MAX_AWAKENED, RISK, calibration
from stabkit.cause import layer_shares, linearisation_errors, reach
from stabkit.curvature import CoordinateNetwork, LinearisedNetwork
from stabkit.measure import Measurement, linearised
from stabkit.preconditioner import Diagonal, Identity
from stabkit.recommendations import ParetoPoint, Recommendation, Recommendations
from stabkit.rollout import Rollout, loss_scale, rollout
from stabkit.staged import staged_rollout
from stabkit.theory import step_guess

POINTS = 24  # of a line of step sizes, mixes or clipping norms
REACH = 100.0  # how far below the critical step size the line begins
FRONT_STEPS, FRONT_MIXES = 16, 9  # step sizes and mixes behind the Pareto front
LARGEST_BATCH = 8  # times the one asked about
DAMPING = (0.3, 0.1)  # factors of the step size of the layers that break
DAMPED_SHARE = 0.8  # of the predicted displacement that those layers hold together
PLANNED = frozenset({"lr_schedule", "forget_schedule", "max_gradient_norm"})  # settings that nothing but the plan reads
BACKING_OFF = (1.0, 0.7, 0.5, 0.35, 0.25, 0.12)  # factors of the step size that staged rollouts try


def recommend(measurement: Measurement, seeds: Sequence[int], *, kind: str, risk: float = RISK) -> Recommendations:
    """Look for settings that hold, on the linearisation that a prediction has made already.

    Args:
        measurement: What the prediction measured, with the algorithm and the setting that was asked about.
        seeds: Rollouts behind every probability.
        kind: Of the report's calibration, which says how far from the boundary to stay.
        risk: Largest P(diverge) that counts as holding, in (0, 1). Where the retain loss at θ* is near half the divergence
            level or above, P is past 0.05 from the start (theory §7) and nothing holds: allow more.

    Returns:
        The recommendations. A setting holds if the P of its rollouts is within the risk at its own step size and at a margin
        times it, beyond which the critical one must lie for a report's P to be about within the risk, and if the linearised
        network is right at the end of its run. Cost: rollouts of some 400 settings a seed, up to some 50 forward passes over
        what is linearised, and one or two linearisations for layer damping; for a thorough prediction two to twelve staged
        rollouts for each way out.

    Raises:
        ValueError: If the risk is out of its domain.
    """
    check_real(risk, name="risk", owner="recommend", low=0, high=1, low_open=True, high_open=True)
    search = _Search(measurement, seeds, kind, risk)
    asked = search.asked()
    items = [item for item in search.ways_out() if item is not None]
    if search.kind == "staged":
        asked, items = search.confirmed(asked, first=True), [search.confirmed(item) for item in items]
    return Recommendations(
        algorithm=measurement.algorithm.name,
        risk=risk,
        kind=search.kind,
        margin=search.margin,
        asked=asked,
        items=tuple(items),
        front=search.front(items),
    )


class _Search:
    """Rollouts of changed settings on one linearisation."""

    def __init__(self, measurement: Measurement, seeds: Sequence[int], kind: str, risk: float) -> None:
        self._problem, self._network, self._algorithm = (
            measurement.problem,
            measurement.network,
            measurement.algorithm,
        )
        self._measurement = measurement
        self._seeds, self._risk = seeds, risk
        self.kind, self.margin = kind, calibration(kind).margin(risk)
        self._scale = loss_scale(self._network)

    def _roll(self, algorithm: Algorithm, lrs: Sequence[float], mixes: Sequence[float]) -> Rollout:
        return rollout(
            self._network,
            algorithm,
            lr=lrs,
            mix=mixes,
            batch_sizes=algorithm.batch_sizes(self._problem),
            seeds=self._seeds,
        )

    def _with_margin(
        self, algorithm: Algorithm, lrs: Sequence[float], mixes: Sequence[float]
    ) -> tuple[Rollout, list[float]]:
        """Settings, and the P of each at the margin times its step size."""
        rolled = self._roll(algorithm, [*lrs, *(self.margin * lr for lr in lrs)], [*mixes, *mixes])
        return rolled, rolled.probability[len(lrs) :].tolist()

    def _item(
        self,
        remedy: str,
        changes: dict[str, Any],
        rolled: Rollout,
        place: int,
        further: float | None,
        network: LinearisedNetwork | None = None,
        algorithm: str | None = None,
    ) -> Recommendation:
        """One setting of a rollout as a recommendation; it holds if its P, that at the margin and the error are small."""
        probability = float(rolled.probability[place])
        likely = further is not None and max(probability, further) <= self._risk
        error = self._error(network or self._network, rolled, place) if likely else None
        return Recommendation(
            remedy=remedy,
            changes=changes,
            probability=probability,
            retain_loss=float(rolled.retain_loss[:, place, -1].mean()),
            forget_loss=float(rolled.forget_loss[:, place, -1].mean()),
            further_probability=further,
            error=error,
            holds=likely and (error is None or error <= FAR_ERROR),
            algorithm=algorithm,
        )

    def _error(self, network: LinearisedNetwork, rolled: Rollout, place: int) -> float | None:
        """How wrong the linearised network is at the end of a run; infinity where what was dormant has come to matter."""
        if self.kind == "staged" or self._algorithm.adaptive:  # to be confirmed, or nowhere to look
            return None
        error, awake = linearisation_errors(self._problem, network, rolled.settings(place, place + 1))
        return error if awake <= MAX_AWAKENED else math.inf

    def asked(self) -> Recommendation:
        """The setting that was asked about."""
        rolled, further = self._with_margin(self._algorithm, [self._algorithm.lr], [self._algorithm.mix])
        changes = {"lr": self._algorithm.lr}
        if not self._algorithm.fixed_mix:
            changes["mix"] = self._algorithm.mix
        return self._item("as asked", changes, rolled, 0, further[0])

    def ways_out(self) -> list[Recommendation | None]:
        """Every remedy, with its strongest setting that holds, or its safest where none does."""
        a = self._algorithm
        n_retain, n_forget = self._problem.retain.size, self._problem.forget.size
        mixes = np.linspace(1, 0, POINTS) * (a.mix or 1.0)
        return [
            self._line("step size", "lr", self._steps()),
            self._line("mix", "mix", mixes.tolist()) if not a.fixed_mix else None,
            *(
                self._settings(remedy, changes)
                for remedy, changes in (
                    ("warm-up", self._scheduled("lr_schedule", "warmup")),
                    ("decay", self._scheduled("lr_schedule", "cosine")),
                    ("forget decay", self._scheduled("forget_schedule", "cosine")),
                    ("no weight decay", {"weight_decay": 0.0}),
                )
            ),
            self._batches(n_retain, n_forget),
            self._clipping(),
            self._damping(),
            *self._others(),
        ]

    def _scheduled(self, name: str, shape: str) -> dict[str, Any]:
        """A schedule, times the one that the run has already; that one itself where it is of the same name."""
        steps, present = self._algorithm.steps, getattr(self._algorithm, name)
        if present in {None, shape}:
            return {name: shape}
        pairs = zip(factors_of(present, steps), factors_of(shape, steps), strict=True)
        return {name: tuple(there * more for there, more in pairs)}

    def _steps(self) -> list[float]:
        """Step sizes from the critical one down; from where the linearised network is right, where none is critical."""
        batch_sizes = self._algorithm.batch_sizes(self._problem)
        asked, further = self._algorithm.lr, step_guess(self._measurement)
        options: dict[str, Any] = {"batch_sizes": batch_sizes, "seeds": self._seeds}
        found = critical_lr(self._network, self._algorithm, guess=asked, **options)
        if not found.found and further > asked:  # what is asked about may be far too small
            found = critical_lr(self._network, self._algorithm, guess=further, **options)
        end = found.value
        if not found.found and self.kind != "staged" and not self._algorithm.adaptive:
            end, _ = reach(
                self._problem,
                self._network,
                self._algorithm,
                found.scanned,
                batch_sizes=batch_sizes,
                seed=self._seeds[0],
            )
        return np.geomspace(end, end / REACH, POINTS).tolist()

    def _line(self, remedy: str, name: str, values: Sequence[float], other: Algorithm | None = None) -> Recommendation:
        """Along one setting, of another algorithm if given, from strong to weak: the strongest that holds with all after."""
        algorithm = self._algorithm if other is None else other
        lrs = values if name == "lr" else [algorithm.lr] * len(values)
        mixes = values if name == "mix" else [algorithm.mix] * len(values)
        rolled, further = self._with_margin(algorithm, lrs, mixes)
        worst = [max(pair) for pair in zip(rolled.probability.tolist(), further, strict=False)]
        found = None
        for place in range(_strongest(worst, self._risk), len(values)):
            changes, of = {name: float(values[place])}, None if other is None else other.name
            found = self._item(remedy, changes, rolled, place, further[place], algorithm=of)
            if not found.unsure:
                break
        assert found is not None
        return found

    def _settings(self, remedy: str, changes: dict[str, Any]) -> Recommendation | None:
        """The asked-for step and mix with other settings."""
        if all(getattr(self._algorithm, name) == value for name, value in changes.items()):
            return None
        changed = self._algorithm.replace(**changes)
        # A plan of a class's own need not read them.
        if changes.keys() <= PLANNED and changed.plan() == self._algorithm.plan():
            return None
        rolled, further = self._with_margin(changed, [changed.lr], [changed.mix])
        return self._item(remedy, changes, rolled, 0, further[0])

    def _batches(self, n_retain: int, n_forget: int) -> Recommendation | None:
        """The smallest larger batch that holds; the largest where none does."""
        if self._problem.batchnorm == "batch":  # the linearisation is that of batches of one size
            return None
        size, tried = self._algorithm.batch_size, None
        while size < min(n_retain, LARGEST_BATCH * self._algorithm.batch_size):
            size = min(2 * size, n_retain)
            tried = self._settings("batch size", {"batch_size": size, "forget_batch_size": min(size, n_forget)})
            if tried is None or tried.holds:
                break
        return tried

    def _clipping(self) -> Recommendation | None:
        """The largest clipping norm that holds, from the norm of the first steps down; AdamW undoes clipping."""
        if self._algorithm.adaptive or 0 in (self._algorithm.layer_lr or {}).values():
            return None
        part = self._network
        gradient = torch.zeros(part.rank, dtype=torch.float64)
        for samples, weight in ((part.retain, 1 - self._algorithm.mix), (part.forget, self._algorithm.mix)):
            gradient += weight * samples.gradients(part.loss).square().mean(0).sqrt()
        largest = float(((gradient @ part.gradient_metric.double().cpu()) @ gradient).clamp_min(0).sqrt())
        if not largest > 0:
            return None
        best: Recommendation | None = None
        for norm in (10 * largest * np.geomspace(1, 1e-4, 9)).tolist():
            best = self._settings("clipping", {"max_gradient_norm": float(norm)})
            if best is None or best.holds:
                break
        return best

    def _damping(self) -> Recommendation | None:
        """The layers that the run moves most, damped; none where P is not diagonal, or one layer is all there is."""
        if type(self._measurement.preconditioner) not in {Identity, Diagonal} or self._algorithm.layer_lr is not None:
            return None
        asked = self._roll(self._algorithm, [self._algorithm.lr], [self._algorithm.mix])
        moved = self._network.movement(asked.coordinates[0, 0].to(self._problem.device))
        layers, held = [], 0.0
        for layer in layer_shares(self._problem, moved):
            layers.append(layer.name)
            held += layer.share
            if held >= DAMPED_SHARE:
                break
        if not layers or len(layers) == len(set(self._problem.layer_of().values())):
            return None
        found = None
        for factor in DAMPING:
            damped = self._algorithm.replace(layer_lr=dict.fromkeys(layers, factor))
            network = self._linearised(damped)
            rolled = rollout(
                network,
                damped,
                lr=[damped.lr, self.margin * damped.lr],
                mix=[damped.mix] * 2,
                batch_sizes=damped.batch_sizes(self._problem),
                seeds=self._seeds,
            )
            further = float(rolled.probability[1])
            found = self._item("layer damping", {"layer_lr": damped.layer_lr}, rolled, 0, further, network)
            if found.holds:
                break
        return found

    def _others(self) -> list[Recommendation]:
        """Other algorithms on the same linearisation, whose P is the identity too.

        Ascent alone is given a retain part, and ascent on the loss the weights that let it die away.

        Returns:
            The strongest mix of each that holds, or its safest.
        """
        asked = type(self._algorithm)
        if asked not in {GradientAscent, GradDiff}:
            return []
        kinds: list[type[Algorithm]] = [GradDiff, NPO] if asked is GradientAscent else [NPO]
        mixes = (np.linspace(1, 0, POINTS + 1)[1:-1] * self._algorithm.mix).tolist()
        if asked is GradDiff:
            mixes = [self._algorithm.mix, *mixes]
        return [self._line("algorithm", "mix", mixes, self._algorithm.turned_into(kind)) for kind in kinds]

    def _linearised(self, algorithm: Algorithm) -> LinearisedNetwork:
        """The network compressed anew for an algorithm whose P is another, as the measurement was; AdamW keeps its own."""
        if isinstance(self._network, CoordinateNetwork):
            return self._network.with_paces(algorithm.layer_factors(self._problem.whole))
        preconditioner = algorithm.step_preconditioner(self._problem.whole)
        settings = self._measurement.settings
        return linearised(self._problem, algorithm, preconditioner, settings, scaling=preconditioner)

    def confirmed(self, item: Recommendation, *, first: bool = False) -> Recommendation:
        """The same setting by a staged rollout; its step size lowered until it holds, unless it is the one asked about."""
        best = item
        for factor in BACKING_OFF[:1] if first else BACKING_OFF:
            changed = item.apply(self._algorithm)
            changes = dict(item.changes) if factor == 1 else {**item.changes, "lr": changed.lr * factor}
            changed = changed.replace(**changes)
            network = self._network
            if "layer_lr" in changes:
                network = self._linearised(changed)
            rolled = self._staged(network, changed)
            further = None
            if float(rolled.probability[0]) <= self._risk:
                beyond = self._staged(network, changed.replace(lr=self.margin * changed.lr))
                further = float(beyond.probability[0])
            best = self._item(item.remedy, changes, rolled, 0, further, algorithm=item.algorithm)
            if best.holds:
                break
        return best

    def _staged(self, network: LinearisedNetwork, algorithm: Algorithm) -> Rollout:
        """One setting on a linearisation, and for real where that is left."""
        batch_sizes = algorithm.batch_sizes(self._problem)
        return staged_rollout(self._problem, network, algorithm, batch_sizes=batch_sizes, seeds=self._seeds).rollout

    def front(self, items: Sequence[Recommendation]) -> tuple[ParetoPoint, ...]:
        """What no other step size, mix and number of steps beats in both losses, of a grid and of the ways out."""
        steps = self._steps()
        lrs = np.geomspace(3 * steps[0], steps[-1], FRONT_STEPS)
        fixed = self._algorithm.fixed_mix
        mixes = np.array([self._algorithm.mix]) if fixed else np.arange(1, FRONT_MIXES + 1) / (FRONT_MIXES + 1)
        eta, alpha = (grid.ravel() for grid in np.meshgrid(lrs, mixes, indexing="ij"))
        rolled = self._roll(self._algorithm, eta.tolist(), alpha.tolist())
        reached = self._scale.score(rolled.retain_loss).cummax(-1).values  # (S, G, T)
        probability = calibration(rolled.kind).probability(reached)
        retain, forget = rolled.retain_loss.mean(0), rolled.forget_loss.mean(0)
        known = (probability <= self._risk) & retain.isfinite() & forget.isfinite()
        points = [
            ParetoPoint(
                lr=float(eta[g]),
                mix=float(alpha[g]),
                steps=int(rolled.steps[t]),
                probability=float(probability[g, t]),
                retain_loss=float(retain[g, t]),
                forget_loss=float(forget[g, t]),
            )
            for g, t in known.nonzero().tolist()
            if int(rolled.steps[t]) > 0
        ]
        points += [
            ParetoPoint(
                lr=float(item.changes.get("lr", self._algorithm.lr)),
                mix=float(item.changes.get("mix", self._algorithm.mix)),
                steps=self._algorithm.steps,
                probability=item.probability,
                retain_loss=item.retain_loss,
                forget_loss=item.forget_loss,
            )
            for item in items
            if item.holds and item.algorithm is None and set(item.changes) <= {"lr", "mix"}
        ]
        return _undominated(points, self._algorithm)


def _strongest(probability: Sequence[float], risk: float) -> int:
    """First of the settings, strong to weak, from which on all hold; the safest where none does."""
    first = max((place + 1 for place, p in enumerate(probability) if p > risk), default=0)
    return first if first < len(probability) else int(np.argmin(probability))


def _undominated(points: Sequence[ParetoPoint], algorithm: Algorithm) -> tuple[ParetoPoint, ...]:
    """Points of which none has both losses worse than another's, ascending in both; of the runs that can be asked for."""
    front: list[ParetoPoint] = []
    lowest = math.inf
    ends: dict[int, bool] = {}  # whether a run of so many steps is the beginning of the algorithm's
    for point in sorted(points, key=lambda p: (-p.forget_loss, p.retain_loss, p.steps)):
        if point.retain_loss >= lowest:
            continue
        if point.steps not in ends:
            ends[point.steps] = algorithm.shortened(point.steps) is not None
        if ends[point.steps]:
            front.append(point)
            lowest = point.retain_loss
    return tuple(reversed(front))


def algorithm_at(algorithm: Algorithm, point: ParetoPoint) -> Algorithm:
    """An algorithm with a point's settings.

    Args:
        algorithm: The algorithm that the front is of.
        point: The point. Of fewer steps it is the beginning of the algorithm's run, its schedules cut and not squeezed.

    Returns:
        The changed algorithm.

    Raises:
        ValueError: If the algorithm has no such beginning.
    """
    cut = algorithm.shortened(point.steps)
    if cut is None:
        raise ValueError(
            f"`point` of `algorithm_at` must have the {algorithm.steps} steps of {type(algorithm).__name__}, whose plan "
            f"depends on how many there are; got {point.steps}. Take a point of that algorithm's own front."
        )
    return cut.replace(lr=point.lr) if cut.fixed_mix else cut.replace(lr=point.lr, mix=point.mix)
