"""One cell, predicted over a grid of settings and then run at every one of them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stabkit import stability
from stabkit._errors import StabkitWarning
from stabkit._rng import preserved_rng
from stabkit.algorithms import Algorithm, resolve_algorithm
from stabkit.bench.cells import Cell, prepared
from stabkit.boundary import adamw_guess, critical_lr
from stabkit.cause import errors_below
from stabkit.coherence import coherence
from stabkit.measure import Measurement, measure
from stabkit.modes import MODES, Sizes
from stabkit.problem import UnlearningProblem
from stabkit.rollout import Rollout, rollout
from stabkit.runner import RunResult, run
from stabkit.staged import PATH_STEPS, staged_rollout

MIXES = (0.05, 0.2, 0.4, 0.6, 0.9)
POINTS = 10
SPAN = 10.0  # the grid of step sizes reaches so far past the smallest and the largest predicted boundary
SHARPNESS = 4.0  # of the logistic in `Prediction.crosses`
HALVINGS = 3  # of the interval around a boundary on the grid, in the logarithm
ROLLOUT_SEEDS = (0, 1, 2)  # as many as `predict` rolls out unless told otherwise
FIRST_RUN_SEED = 777  # of the real runs' batches; the rollouts draw others
OTHER_RUN_SEED = 1777  # of the runs beside them, which show how far the batches alone decide
BATCH = 64
WATCHED = 512  # samples of each set behind a real run's verdict
COHERENCE_SAMPLES = 64  # of each set, behind the coherence rule


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one kind of rollout said of one setting.

    Attributes:
        probability: P(diverge).
        scores: Each seed's ln(worst retain loss / divergence level).
        step: Divergence step; None where none is predicted.
    """

    probability: float
    scores: tuple[float, ...]
    step: float | None

    @property
    def crosses(self) -> bool:
        """Whether most of the seeds' weight lies past the level; no calibration moves this."""
        return bool(np.mean(1 / (1 + np.exp(-SHARPNESS * np.array(self.scores)))) >= 0.5)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was said of one setting and what happened.

    Attributes:
        lr: Step size.
        mix: Mix.
        one: Prediction from one linearisation.
        staged: Prediction of the staged rollout.
        growth: K·ln ρ(T_η) of plain steps (T8).
        step_limit: 2(1+β)/λ_max(D) (T4), of the compressed curvature.
        coherence_rule: Whether T13 calls divergence.
        diverged: What the real run did.
        divergence_step: When; None if it did not.
        again: What a real run with other batches did.
    """

    lr: float
    mix: float
    one: Prediction
    staged: Prediction
    growth: float
    step_limit: float
    coherence_rule: bool
    diverged: bool
    divergence_step: int | None
    again: bool


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The critical step size at one mix, each found on the grid and then by halving.

    Attributes:
        mix: The mix.
        observed: Of the real runs; None where the grid does not bracket it.
        one: Predicted from one linearisation; None likewise.
        staged: Predicted by the staged rollout; None likewise.
        again: Of the real runs with other batches; None likewise.
        error_below: Relative error of the linearised outputs at half the step size that one linearisation predicts; None of
            AdamW's runs and where that is not bracketed.
    """

    mix: float
    observed: float | None
    one: float | None
    staged: float | None
    again: float | None
    error_below: float | None = None


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """All settings of one cell for one seed.

    Attributes:
        cell: The cell.
        seed: Seed of data, training, deletion and runs.
        records: The settings.
        boundaries: Critical step sizes, one for each mix.
        measure_seconds: CPU seconds of everything before the first rollout.
        frontier_seconds: Of predicting all settings from one linearisation.
        staged_seconds: Of one setting's staged rollouts, all seeds, on average.
        run_seconds: Of one real run, on average.
        staged_gradients: Per-sample gradients of one setting's staged rollouts, on average.
        run_gradients: Of one real run of all its steps.
        linearised_samples: Retain and forget samples linearised.
        captured: Share of the outputs' sensitivity inside the linearisation.
        most_samples: Retain and forget samples to linearise at most.
        path_steps: Real steps that staged rollouts took first, to see where the run goes.
        path_held: Whether they also held the last steps before every place that they looked at against real ones; False in
            records from before they did.
    """

    cell: Cell
    seed: int
    records: tuple[Record, ...]
    boundaries: tuple[Boundary, ...]
    measure_seconds: float
    frontier_seconds: float
    staged_seconds: float
    run_seconds: float
    staged_gradients: float
    run_gradients: float
    linearised_samples: tuple[int, int]
    captured: float
    most_samples: tuple[int, int]
    path_steps: int
    path_held: bool


def record_cell(cell: Cell, seed: int, *, quick: bool = False) -> CellResult:
    """Train, predict the whole grid, then run it.

    Args:
        cell: The cell.
        seed: Seed of everything.
        quick: Whether to take four step sizes, two mixes and no halving. An algorithm whose mix is its own has that alone.

    Returns:
        The records. Cost: training, staged rollouts of every seed at each setting, 50, and 15 more at the boundaries, and
        two real runs at as many; 8 settings and none more if quick.
    """
    with preserved_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", StabkitWarning)
        trained, deletion = prepared(cell, seed)
        x, y = trained.split.x_train, trained.split.y_train
        forget, retain = ((x[rows], y[rows]) for rows in (deletion.forget, deletion.retain))
        problem = UnlearningProblem(trained.model, forget, retain, loss=trained.loss)
        at = _Bench(problem, algorithm_of(cell, problem), seed)
        mixes = (at.algorithm.mix,) if at.algorithm.fixed_mix else MIXES[1:4:2] if quick else MIXES
        lrs = _grid(at.measurement, at.batch_sizes, mixes, 4 if quick else POINTS)
        settings = [(i, j) for i in range(len(lrs)) for j in range(len(mixes))]
        start = time.process_time()
        one = dict(zip(settings, at.one([lrs[i] for i, _ in settings], [mixes[j] for _, j in settings]), strict=True))
        frontier_seconds = time.process_time() - start
        staged = {(i, j): at.staged(lrs[i], mixes[j]) for i, j in settings}
        growth, limits, rules = _linear_theory(at.measurement, at.batch_sizes, lrs, mixes)
        predicted = [
            [
                at.boundary(kind, lrs, mix, [said[i, j].crosses for i in range(len(lrs))], quick)
                for kind, said in ((lambda lr, mix: at.one([lr], [mix])[0], one), (at.staged, staged))
            ]
            for j, mix in enumerate(mixes)
        ]
        errors = [at.error_below(mix, predicted[j][0]) for j, mix in enumerate(mixes)]
        # Everything that is predicted has been, before the first real run.
        real = {(i, j): at.real(lrs[i], mixes[j]) for i, j in settings}
        again = {(i, j): at.again(lrs[i], mixes[j]) for i, j in settings}
        records = [
            Record(
                lr=lrs[i],
                mix=mixes[j],
                one=one[i, j],
                staged=staged[i, j],
                growth=float(growth[i, j]),
                step_limit=limits[j],
                coherence_rule=bool(rules[i, j]),
                diverged=real[i, j].diverged,
                divergence_step=real[i, j].divergence_step,
                again=again[i, j].diverged,
            )
            for i, j in settings
        ]
        boundaries = []
        for j, mix in enumerate(mixes):
            observed, beside = (
                at.boundary(outcome, lrs, mix, [runs[i, j].diverged for i in range(len(lrs))], quick)
                for outcome, runs in ((at.real, real), (at.again, again))
            )
            one_edge, staged_edge = predicted[j]
            boundaries.append(
                Boundary(
                    mix=mix,
                    observed=observed,
                    one=one_edge,
                    staged=staged_edge,
                    again=beside,
                    error_below=errors[j],
                )
            )
    network = at.measurement.network
    return CellResult(
        cell=cell,
        seed=seed,
        records=tuple(records),
        boundaries=tuple(boundaries),
        measure_seconds=at.measure_seconds,
        frontier_seconds=frontier_seconds,
        staged_seconds=at.staged_seconds / at.staged_count,
        run_seconds=at.run_seconds / at.run_count,
        staged_gradients=at.staged_gradients / at.staged_count,
        run_gradients=float(cell.steps * sum(at.batch_sizes)),
        linearised_samples=(network.retain.samples, network.forget.samples),
        captured=network.captured,
        most_samples=at.most_samples,
        path_steps=PATH_STEPS,
        path_held=True,
    )


class _Bench:
    """One problem, what is measured on it, and how a setting is predicted and run."""

    def __init__(self, problem: UnlearningProblem, algorithm: Algorithm, seed: int) -> None:
        self.problem, self.algorithm, self.seed = problem, algorithm, seed
        self.batch_sizes = algorithm.batch_sizes(problem)
        start = time.process_time()
        settings = Sizes().settings(MODES["standard"], curvature="hessian", seed=seed)
        self.most_samples = (
            settings.retain_samples or problem.retain.size,
            settings.forget_samples or problem.forget.size,
        )
        self.measurement = measure(problem, algorithm, settings)
        self.measure_seconds = time.process_time() - start
        self.staged_seconds = self.run_seconds = self.staged_gradients = 0.0
        self.staged_count = self.run_count = 0

    def one(self, lrs: Sequence[float], mixes: Sequence[float]) -> list[Prediction]:
        """Settings side by side, by one linearisation."""
        rolled = rollout(
            self.measurement.network,
            self.algorithm,
            lr=lrs,
            mix=mixes,
            batch_sizes=self.batch_sizes,
            seeds=ROLLOUT_SEEDS,
        )
        return _said(rolled)

    def staged(self, lr: float, mix: float) -> Prediction:
        """By one, and real steps where it is left."""
        start = time.process_time()
        found = staged_rollout(
            self.measurement.problem,
            self.measurement.network,
            _set(self.algorithm, mix).replace(lr=lr),
            batch_sizes=self.batch_sizes,
            seeds=ROLLOUT_SEEDS,
        )
        self.staged_seconds += time.process_time() - start
        self.staged_gradients += found.gradient_equivalents
        self.staged_count += 1
        return _said(found.rollout)[0]

    def error_below(self, mix: float, critical: float | None) -> float | None:
        """Of the linearised outputs, at half a critical step size."""
        algorithm = _set(self.algorithm, mix)
        if critical is None or algorithm.adaptive:
            return None
        problem, network = self.measurement.problem, self.measurement.network
        seed = ROLLOUT_SEEDS[0]
        return errors_below(problem, network, algorithm, critical, batch_sizes=self.batch_sizes, seed=seed)[0]

    def real(self, lr: float, mix: float) -> RunResult:
        """For real."""
        return self._run(lr, mix, FIRST_RUN_SEED)

    def again(self, lr: float, mix: float) -> RunResult:
        """For real, with other batches."""
        return self._run(lr, mix, OTHER_RUN_SEED)

    def _run(self, lr: float, mix: float, first_seed: int) -> RunResult:
        start = time.process_time()
        changed = _set(self.algorithm, mix).replace(lr=lr)
        result = run(
            self.problem,
            changed,
            preconditioner=self.measurement.preconditioner,
            seed=first_seed + self.seed,
            monitor_samples=WATCHED,
        )
        self.run_seconds += time.process_time() - start
        self.run_count += 1
        return result

    def boundary(
        self,
        outcome: Callable[[float, float], Prediction | RunResult],
        lrs: Sequence[float],
        mix: float,
        crossed: Sequence[bool],
        quick: bool,
    ) -> float | None:
        """The first crossing on the grid, halved down to; None where the grid does not bracket it."""
        if not any(crossed) or crossed[0]:
            return None
        place = list(crossed).index(True)
        low, high = lrs[place - 1], lrs[place]
        for _ in range(0 if quick else HALVINGS):
            middle = math.sqrt(low * high)
            found = outcome(middle, mix)
            diverges = found.diverged if isinstance(found, RunResult) else found.crosses
            low, high = (low, middle) if diverges else (middle, high)
        return math.sqrt(low * high)


def _said(rolled: Rollout) -> list[Prediction]:
    """A rollout's settings as predictions."""
    return [
        Prediction(probability=p, scores=tuple(scores), step=step)
        for p, scores, step in zip(
            rolled.probability.tolist(), rolled.score.T.tolist(), rolled.expected_divergence_step(), strict=True
        )
    ]


def algorithm_of(cell: Cell, problem: UnlearningProblem) -> Algorithm:
    """The cell's algorithm, its batches no larger than the sets.

    Args:
        cell: The cell.
        problem: Its problem.

    Returns:
        The algorithm, at a mix of the grid where that is one's to choose.
    """
    batch = min(BATCH, problem.retain.size)
    plain = resolve_algorithm(
        cell.algorithm,
        steps=cell.steps,
        batch_size=batch,
        momentum=cell.momentum or None,
        optimizer=cell.optimizer,
    )
    return _set(plain, MIXES[1])


def _set(algorithm: Algorithm, mix: float) -> Algorithm:
    """The algorithm at a mix, where that is one's to choose."""
    return algorithm if algorithm.fixed_mix else algorithm.replace(mix=mix)


def _grid(measurement: Measurement, batch_sizes: tuple[int, int], mixes: tuple[float, ...], points: int) -> list[float]:
    """Step sizes from a tenth of the smallest predicted boundary to ten times the largest."""
    algorithm = measurement.algorithm
    guess = 2 / float(torch.linalg.eigvalsh(measurement.retain.mean())[-1])
    guess = adamw_guess(measurement.problem) if algorithm.adaptive else guess
    edges = [
        critical_lr(
            measurement.network,
            _set(algorithm, mix),
            batch_sizes=batch_sizes,
            seeds=ROLLOUT_SEEDS[:1],
            guess=guess,
        ).value
        for mix in (mixes[0], mixes[-1])
    ]
    return np.geomspace(min(edges) / SPAN, max(edges) * SPAN, points).tolist()


def _linear_theory(
    measurement: Measurement, batch_sizes: tuple[int, int], lrs: list[float], mixes: tuple[float, ...]
) -> tuple[np.ndarray, list[float], np.ndarray]:
    """K·ln ρ over the grid, the mean's step limit at every mix, and the coherence rule over the grid."""
    algorithm = measurement.algorithm
    plain = 1 / measurement.momentum_share  # the step limit alone has the momentum
    dynamics = stability.LinearDynamics(
        retain=measurement.retain.scaled(plain),
        forget=measurement.forget.scaled(plain),
        mix=mixes[0],
        batch_sizes=batch_sizes,
        sampling=algorithm.sampling,
    )
    growth = stability.stability_map(dynamics, {"lr": lrs, "mix": mixes}).growth(algorithm.steps)
    limits, rules = [], np.zeros((len(lrs), len(mixes)), dtype=bool)
    for j, mix in enumerate(mixes):
        here = dynamics.at(mix)
        largest = float(torch.linalg.eigvalsh(here.mean_hessian())[-1])
        limits.append(stability.step_limit(largest / plain, momentum=algorithm.inertia, nesterov=algorithm.nesterov))
        sigma = coherence(here.retain.thin(COHERENCE_SAMPLES), here.forget.thin(COHERENCE_SAMPLES), mix=mix).for_rule()
        rules[:, j] = [stability.coherence_rule(here, lr, sigma=sigma).diverges for lr in lrs]
    return growth, limits, rules
