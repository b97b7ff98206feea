"""From a measurement to a report: the verdict, and all that stands beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy
import torch

from stabkit._rng import preserved_rng
from stabkit._version import __version__
from stabkit.algorithms import ALGORITHMS, Algorithm
from stabkit.algorithms.base import PlainSteps
from stabkit.algorithms.contract import check_plan
from stabkit.boundary import (
    CriticalValue,
    staged_critical_lr,
    staged_critical_mix,
    surroundings,
)
from stabkit.calibration import RISK, Calibration, beyond, calibration, combined, kind_at
from stabkit.cause import errors_below, find_cause, linearisation_errors, reach, start_errors
from stabkit.checks import change_checks, margin_check, seeds_check, trust_checks, warn_if_unsure
from stabkit.curvature.dormant import SAMPLES
from stabkit.frontier import Frontier, frontier
from stabkit.measure import Measurement
from stabkit.network import check_modes
from stabkit.precision import arithmetic
from stabkit.problem import UnlearningProblem
from stabkit.recommendations import Recommendations
from stabkit.remedy import recommend
from stabkit.report import CoherenceSummary, Cost, Report, RolloutSummary, Run
from stabkit.rollout import Rollout, rollout
from stabkit.staged import first_look, staged_rollout
from stabkit.steps import check_coupled
from stabkit.theory import critical_steps, step_guess, thresholds
from stabkit.verdict import advice, verdict_of

ADVISED = 2.0  # how far below the critical step size an advised one lies at least; rule of thumb
UNKNOWN = 0.5  # probability that a step size is past a critical one of which nothing is known
FRONTIER_POINTS = 20  # of each axis of the map, where the caller names none


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """Critical step sizes: whatever the step size in question, they are the same."""

    lr: CriticalValue
    mean_square_lr: float
    horizon_lr: float
    staged: Cost
    error_below: float | None
    awake_below: float = 0.0
    scanned_to: float = math.inf  # the largest step size of the scan
    looks: int = 0  # runs of other step sizes at whose end the real outputs were looked at


def judge(
    measurement: Measurement, seeds: Sequence[int], *, limits: _Limits | None = None, progress: bool = False
) -> Report:
    """Turn a measurement into a report.

    Args:
        measurement: What was measured, with the algorithm it is about.
        seeds: Seeds of the rollouts.
        limits: The critical step sizes, if an earlier report differs in its step size alone.
        progress: Whether to show a progress bar.

    Returns:
        The report.
    """
    with arithmetic(measurement.settings.precision):
        return _judged(measurement, seeds, limits, progress=progress)


def _judged(measurement: Measurement, seeds: Sequence[int], limits: _Limits | None, *, progress: bool) -> Report:
    """The verdict and all that stands beside it."""
    start = time.perf_counter()
    problem, algorithm, network = measurement.problem, measurement.algorithm, measurement.network
    batch_sizes = algorithm.batch_sizes(problem)
    rolled, one_lr, mix_detail = surroundings(
        network,
        algorithm,
        batch_sizes=batch_sizes,
        seeds=seeds,
        guess=None if limits else step_guess(measurement),
        progress=progress,
    )
    spent = Cost(stage="staged rollouts", seconds=0.0, gradient_equivalents=0.0)  # on the critical step size
    looks = 1  # at the real outputs at predicted parameters
    if limits is None:
        assert one_lr is not None
        limits = _limits(measurement, batch_sizes, seeds, one_lr)
        spent, looks = limits.staged, looks + limits.looks
    theory_says = thresholds(
        measurement, batch_sizes, mean_square_lr=limits.mean_square_lr, horizon_lr=limits.horizon_lr
    )
    each_look = (network.retain.samples + network.forget.samples) / 3 + network.displacement_gradients
    if network.dormant and not measurement.settings.staged:
        each_look += 2 * SAMPLES
    theory = Cost(
        stage="rollouts and theory",
        seconds=time.perf_counter() - start - spent.seconds,
        gradient_equivalents=looks * each_look
        + _walks(measurement) * network.displacement_gradients
        + (first_look(algorithm) * sum(batch_sizes) if algorithm.adaptive else 0),
    )
    verdict_by = _verdict_by(measurement, rolled, mix_detail, seeds, progress=progress)
    mix_detail = verdict_by.mix
    again = _crossing_below(measurement, limits, verdict_by.rollout, batch_sizes, seeds)
    limits = again or limits
    lr_detail = _with_seeds_at(limits.lr, algorithm.lr, verdict_by.rollout)
    spent_again = again.staged.gradient_equivalents if again else 0.0
    if algorithm.adaptive:
        error, awake = start_errors(
            problem,
            network,
            algorithm,
            batch_sizes=batch_sizes,
            seed=seeds[0],
            staged=measurement.settings.staged,
        )
    else:
        error, awake = linearisation_errors(problem, network, rolled, staged=measurement.settings.staged)
    probability = float(verdict_by.rollout.probability[0])
    below = limits.error_below
    if below is not None and algorithm.lr < limits.lr.value / 2:
        below = max(below, error)  # that of the run in question tells of the critical step size as well
    used = calibration(kind_at(verdict_by.rollout.kind, below, limits.awake_below))
    interval = _interval(used, lr_detail)
    # Where the scan found nothing that holds, or nothing that breaks.
    past = float(lr_detail.found or algorithm.lr > interval[0])
    if past and not lr_detail.found and used.kind == "one":  # a staged rollout of the run itself knows
        probability = (probability + UNKNOWN) / 2
    if lr_detail.bracketed:
        past = beyond(algorithm.lr, lr_detail.value, interval)
        probability = combined(probability, algorithm.lr, lr_detail.value, interval)
    verdict = verdict_of(probability)
    checks = (
        *trust_checks(measurement, rolled, error, awake),
        *(() if verdict_by.real_steps else change_checks(measurement, rolled, seeds)),
        margin_check(past, interval, verdict, staged=measurement.settings.staged),
        *seeds_check(verdict_by.rollout, algorithm.lr, _interval(used, limits.lr)),
    )
    cause = find_cause(measurement, rolled, mean_square_growth=theory_says.growth)
    if not measurement.settings.staged:  # all that is left to be timed
        theory = replace(theory, seconds=time.perf_counter() - start)
    return Report(
        verdict=verdict,
        probability=probability,
        mode=measurement.settings.mode,
        divergence_step=verdict_by.rollout.expected_divergence_step()[0],
        critical_lr=lr_detail.value if lr_detail.found else math.inf,
        critical_lr_interval=interval,
        critical_lr_error=below,
        critical_mix=mix_detail.value if mix_detail.found else math.inf,
        critical_lr_detail=lr_detail,
        critical_mix_detail=mix_detail,
        calibration=used,
        run=_run(measurement, batch_sizes, seeds[0]),
        thresholds=theory_says,
        coherence=_coherence(measurement),
        rollout=_rollout_summary(verdict_by, measurement, len(seeds)),
        cause=cause,
        layers=measurement.layers,
        checks=checks,
        linearisation_error=error,
        advice=advice(
            algorithm,
            lr_detail,
            mix_detail,
            probability,
            max(ADVISED, used.margin(RISK)),
            sure=all(check.passed for check in checks),
            near=used.kind in {"one", "staged"},
        ),
        costs=(
            *measurement.costs,
            theory,
            *(
                [
                    replace(
                        spent,
                        seconds=time.perf_counter() - start - theory.seconds,
                        gradient_equivalents=verdict_by.gradients + spent.gradient_equivalents + spent_again,
                    )
                ]
                if measurement.settings.staged
                else []
            ),
        ),
        _frontier=lambda **grid: _frontier(measurement, seeds, lr_detail, **grid),
        _at=lambda **changes: _at(measurement, seeds, limits, **changes),
        _recommend=lambda *, risk: _recommended(measurement, seeds, risk, used.kind),
        _staged=lambda: _staged_probability(measurement, seeds[0]),
        _preconditioner=measurement.preconditioner,
    )


@dataclass(frozen=True, kw_only=True)
class _VerdictBy:
    """What the verdict is read from: the one linearisation's rollout, or the staged one."""

    rollout: Rollout
    mix: CriticalValue
    real_steps: float = 0.0
    gradients: float = 0.0


def _verdict_by(
    measurement: Measurement, rolled: Rollout, mix: CriticalValue, seeds: Sequence[int], *, progress: bool
) -> _VerdictBy:
    """The staged rollout where the measurement asks for one."""
    problem, algorithm, network = measurement.problem, measurement.algorithm, measurement.network
    if not measurement.settings.staged:
        return _VerdictBy(rollout=rolled, mix=mix)
    batch_sizes = algorithm.batch_sizes(problem)
    found = staged_rollout(problem, network, algorithm, batch_sizes=batch_sizes, seeds=seeds, progress=progress)
    staged_mix, spent = mix, 0.0
    if not algorithm.fixed_mix:
        guess = min(mix.value, 1.0)
        seed = _typical_seed(measurement, algorithm.replace(mix=guess), batch_sizes, seeds)
        found_mix, spent = staged_critical_mix(
            problem, network, algorithm, batch_sizes=batch_sizes, seed=seed, guess=guess
        )
        staged_mix = found_mix.with_spread_of(mix, most=1.0)
    return _VerdictBy(
        rollout=found.rollout,
        mix=staged_mix,
        real_steps=found.real_steps,
        gradients=found.gradient_equivalents + spent,
    )


def check_batches(problem: UnlearningProblem, algorithm: Algorithm) -> None:
    """Refuse batches, and steps, that `run` would refuse.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm.

    Raises:
        TypeError: If the algorithm's own plan or stop rule is of another kind.
        ValueError: If batches are larger than the sets, or have no variance to be normalised by, or its plan is none.
    """
    check_plan(algorithm)
    batch_sizes = algorithm.batch_sizes(problem)
    if problem.batchnorm == "batch":
        check_coupled(algorithm, batch_sizes)


def _at(measurement: Measurement, seeds: Sequence[int], limits: _Limits, /, **changes: object) -> Report:
    """Judge other settings; only the mix needs new curvature products."""
    check_modes("Report.at")
    algorithm = _changed(measurement.algorithm, changes)
    check_batches(measurement.problem, algorithm)
    with preserved_rng():
        alike = set(changes) <= {"lr"} - algorithm.preconditioner_reads
        known = limits.lr.found or algorithm.lr <= limits.scanned_to
        kept = limits if alike and known else None
        report = judge(measurement.with_algorithm(algorithm), seeds, limits=kept)
    warn_if_unsure(report.checks)
    return report


def _changed(algorithm: Algorithm, changes: dict[str, object]) -> Algorithm:
    """Other settings; factors given one by one for more steps than are left are cut to these."""
    steps, cut = changes.get("steps"), {}
    if isinstance(steps, int) and 0 < steps < algorithm.steps:
        given = {name: getattr(algorithm, name) for name in ("lr_schedule", "forget_schedule")}
        cut = {name: value[:steps] for name, value in given.items() if isinstance(value, tuple)}
    return algorithm.replace(**{**cut, **changes})


def _recommended(measurement: Measurement, seeds: Sequence[int], risk: float, kind: str) -> Recommendations:
    check_modes("Report.recommend")
    with arithmetic(measurement.settings.precision):
        return recommend(measurement, seeds, risk=risk, kind=kind)


def _staged_probability(measurement: Measurement, seed: int) -> float:
    """P(diverge) by one staged rollout, whatever the report's mode."""
    check_modes("tune")
    algorithm = measurement.algorithm
    batch_sizes = algorithm.batch_sizes(measurement.problem)
    with arithmetic(measurement.settings.precision), preserved_rng():
        found = staged_rollout(
            measurement.problem, measurement.network, algorithm, batch_sizes=batch_sizes, seeds=[seed]
        )
    return float(found.rollout.probability[0])


def _frontier(
    measurement: Measurement,
    seeds: Sequence[int],
    detail: CriticalValue,
    *,
    lr: Sequence[float] | None,
    mix: Sequence[float] | None,
    progress: bool,
) -> Frontier:
    check_modes("Report.frontier")
    algorithm = measurement.algorithm
    batch_sizes = algorithm.batch_sizes(measurement.problem)
    every = np.array([algorithm.mix]) if algorithm.fixed_mix else np.linspace(0, 1, FRONTIER_POINTS)
    mixes = every if mix is None else np.atleast_1d(np.asarray(mix, dtype=float))
    if mixes.size == 0:
        raise ValueError(
            "`mix` of `Report.frontier` must hold at least one value; got none. None takes 20 from 0 to 1."
        )
    if algorithm.fixed_mix and bool((mixes != algorithm.mix).any()):
        raise ValueError(
            f"`mix` of `Report.frontier` must be left out for {algorithm.name!r}, whose mix is always {algorithm.mix:g}; "
            f"got {mixes[mixes != algorithm.mix][0]:g}. Use algorithm='graddiff' to choose one."
        )

    def rolled(lrs: np.ndarray, mixes: np.ndarray, seeds: Sequence[int], progress: bool) -> Frontier:
        with arithmetic(measurement.settings.precision):
            return frontier(
                measurement.network,
                algorithm,
                lr=lrs.tolist(),
                mix=mixes.tolist(),
                batch_sizes=batch_sizes,
                seeds=seeds,
                progress=progress,
            )

    if lr is not None:
        return rolled(np.atleast_1d(np.asarray(lr, dtype=float)), mixes, seeds, progress)
    # A coarse look with one seed says which step sizes are worth a fine grid: all boundaries and half a decade more.
    coarse = np.geomspace(detail.value * 1e-4, detail.value * 1e4, 4 * FRONTIER_POINTS // 5 + 1)
    looked = rolled(coarse, np.linspace(mixes.min(), mixes.max(), 6), seeds[:1], False).critical_lr
    edges = np.array([detail.value, *looked[np.isfinite(looked)]])
    return rolled(np.geomspace(edges.min() / 5, edges.max() * 5, FRONTIER_POINTS), mixes, seeds, progress)


def _run(measurement: Measurement, batch_sizes: tuple[int, int], seed: int) -> Run:
    problem, algorithm = measurement.problem, measurement.algorithm
    return Run(
        algorithm=algorithm.name,
        settings=algorithm.settings(),
        batch_sizes=batch_sizes,
        model=problem.model_name,
        parameters=problem.size,
        retain_size=problem.retain.size,
        forget_size=problem.forget.size,
        loss=problem.loss.name,
        batchnorm=problem.batchnorm,
        divergence_level=problem.divergence_level,
        check_every=problem.check_every,
        retain_loss=problem.retain_loss,
        forget_loss=problem.forget_loss,
        device=str(problem.device),
        dtype=str(problem.dtype).removeprefix("torch."),
        seed=seed,
        versions={
            "stabkit": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        own=ALGORITHMS.get(algorithm.name) is not type(algorithm),
    )


def _limits(measurement: Measurement, batch_sizes: tuple[int, int], seeds: Sequence[int], lr: CriticalValue) -> _Limits:
    """The critical step sizes, of which that of one linearisation is known."""
    algorithm, spent = measurement.algorithm, 0.0
    start = time.perf_counter()
    if measurement.settings.staged:
        found, spent = staged_critical_lr(
            measurement.problem,
            measurement.network,
            algorithm,
            batch_sizes=batch_sizes,
            seed=_typical_seed(measurement, algorithm.replace(lr=lr.value), batch_sizes, seeds),
            guess=lr.value,
        )
        lr = found.with_spread_of(lr)
    staged = Cost(stage="staged rollouts", seconds=time.perf_counter() - start, gradient_equivalents=spent)
    top = lr.scanned[1]
    problem, network, error, awake, looks = measurement.problem, measurement.network, None, 0.0, 0
    if not (measurement.settings.staged or algorithm.adaptive):
        setting: dict[str, Any] = {"batch_sizes": batch_sizes, "seed": seeds[0]}
        if lr.bracketed:
            error, awake = errors_below(problem, network, algorithm, lr.value, **setting)
            looks = 1
        elif not lr.found:
            # Beyond it a run that holds in the linearised network says nothing of the real one.
            end, looks = reach(problem, network, algorithm, lr.scanned, **setting)
            lr = CriticalValue(value=end, low=end, high=end, found=False, scanned=(lr.scanned[0], end))
    mean_square_lr, horizon_lr = critical_steps(measurement, batch_sizes)
    return _Limits(
        lr=lr,
        staged=staged,
        mean_square_lr=mean_square_lr,
        horizon_lr=horizon_lr,
        error_below=error,
        awake_below=awake,
        scanned_to=top,
        looks=looks,
    )


def _walks(measurement: Measurement) -> int:
    """Pulls and pushes of a vector that a basis which is not held takes: for the named cause, for a mask and for signs."""
    marks = measurement.network.run_preconditioner
    new = any(cost.stage == "linearisation" and cost.gradient_equivalents for cost in measurement.costs)
    if not (new and isinstance(marks, PlainSteps)):  # those of an earlier report are kept
        return 2
    return 2 + 2 * measurement.network.rank * (marks.forget_mask is not None) + (marks.signs is not None)


def _interval(used: Calibration, lr: CriticalValue) -> tuple[float, float]:
    """Where the critical step size lies at nine in ten."""
    if not lr.bracketed:
        return (0.0, lr.value) if lr.found else (lr.scanned[1], math.inf)
    return used.interval(lr.value, lr.low, lr.high)


def _with_seeds_at(critical: CriticalValue, lr: float, rolled: Rollout) -> CriticalValue:
    """The spread with what the seeds of a staged rollout do: one may break below the critical step size, or hold above."""
    if rolled.kind != "staged" or not critical.found:
        return critical
    breaks = rolled.score[:, 0] >= 0
    if lr < critical.low and bool(breaks.any()):
        return replace(critical, low=lr)
    if lr > critical.high and not bool(breaks.all()):
        return replace(critical, high=lr)
    return critical


def _crossing_below(
    measurement: Measurement,
    limits: _Limits,
    rolled: Rollout,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
) -> _Limits | None:
    """Limits with a lower critical step size, where staged rollouts break at a step size that the interval calls safe."""
    algorithm = measurement.algorithm
    safe = _interval(calibration(rolled.kind), limits.lr)[0]
    if rolled.kind != "staged" or algorithm.lr >= safe or not bool(rolled.probability[0] >= 0.5):
        return None
    start = time.perf_counter()
    # The seed in the middle of all where it breaks, or the next one that does.
    ordered = rolled.score[:, 0].argsort(stable=True).tolist()[len(seeds) // 2 :]
    breaking = [i for i in ordered if float(rolled.score[i, 0]) >= 0]
    found, spent = staged_critical_lr(
        measurement.problem,
        measurement.network,
        algorithm,
        batch_sizes=batch_sizes,
        seed=seeds[(breaking or ordered)[0]],
        guess=algorithm.lr,
    )
    staged = Cost(stage="staged rollouts", seconds=time.perf_counter() - start, gradient_equivalents=spent)
    return replace(limits, lr=found.with_spread_of(limits.lr), staged=staged)


def _typical_seed(
    measurement: Measurement, algorithm: Algorithm, batch_sizes: tuple[int, int], seeds: Sequence[int]
) -> int:
    """The seed in the middle of all by one linearisation: a staged search follows one, and they differ."""
    if len(seeds) < 3:
        return seeds[0]
    setting: dict[str, Any] = {"lr": [algorithm.lr], "mix": [algorithm.mix], "batch_sizes": batch_sizes}
    rolled = rollout(measurement.network, algorithm, seeds=seeds, **setting)
    return seeds[int(rolled.score[:, 0].argsort(stable=True)[len(seeds) // 2])]


def _coherence(measurement: Measurement) -> CoherenceSummary:
    found = measurement.coherence

    def defined(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return CoherenceSummary(
        retain=defined(found.retain),
        forget=defined(found.forget),
        cross=defined(found.cross),
        cosine=defined(found.cosine),
        mixed=defined(found.mixed),
        samples=(found.gram_retain.shape[0], found.gram_forget.shape[0]),
        pairs_sampled=found.pairs_sampled,
    )


def _rollout_summary(verdict_by: _VerdictBy, measurement: Measurement, seeds: int) -> RolloutSummary:
    network, rolled = measurement.network, verdict_by.rollout
    retain, forget = rolled.retain_loss[:, 0], rolled.forget_loss[:, 0]
    return RolloutSummary(
        seeds=seeds,
        probability=float(rolled.probability[0]),
        score=tuple(rolled.score[:, 0].tolist()),
        steps=tuple(rolled.steps.tolist()),
        retain_loss=tuple(retain.median(0).values.tolist()),
        retain_low=tuple(retain.min(0).values.tolist()),
        retain_high=tuple(retain.max(0).values.tolist()),
        forget_loss=tuple(forget.median(0).values.tolist()),
        stopped_step=float(rolled.stopped_step[:, 0].median()),
        samples=(network.retain.samples, network.forget.samples),
        rank=network.rank,
        real_steps=verdict_by.real_steps,
    )
