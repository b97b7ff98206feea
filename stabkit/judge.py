"""From a measurement to a report: the verdict, and all that stands beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Context
from typing import Any

import numpy as np
import scipy
import torch

from stabkit import stability
from stabkit._rng import preserved_rng
from stabkit._version import __version__
from stabkit.algorithms import ALGORITHMS, Algorithm
from stabkit.boundary import (
    CriticalValue,
    adamw_guess,
    staged_critical_lr,
    staged_critical_mix,
    surroundings,
)
from stabkit.calibration import RISK, beyond, calibration, combined
from stabkit.cause import find_cause, linearisation_errors, start_errors
from stabkit.checks import change_checks, margin_check, trust_checks, warn_if_unsure
from stabkit.curvature import SampleFactors
from stabkit.curvature.dormant import SAMPLES
from stabkit.frontier import Frontier, frontier
from stabkit.measure import FEWEST_SAMPLES, THEORY_ROWS, Measurement
from stabkit.precision import arithmetic
from stabkit.problem import UnlearningProblem
from stabkit.recommendations import Recommendations
from stabkit.remedy import recommend
from stabkit.report import CoherenceSummary, Cost, Report, RolloutSummary, Run, Thresholds
from stabkit.rollout import Rollout, rollout
from stabkit.spectrum._common import ROUNDING
from stabkit.staged import first_look, staged_rollout
from stabkit.steps import check_coupled

STABLE_BELOW, DIVERGES_ABOVE = 0.25, 0.75  # of P(diverge); between them the verdict is "marginal"
HORIZON_GROWTH = 1e3  # of the mean square, at `Thresholds.horizon_lr`
LYAPUNOV_STEPS, LYAPUNOV_RUNS = 100, 16
ADVISED = 2.0  # how far below the critical step size an advised one lies at least; rule of thumb
NEGLIGIBLE = 1e-3  # negative curvature, as a share of the largest
DAMPING = 1e-3  # ε of T5, as a share of λ_max(H_R)
FRONTIER_POINTS = 20  # of each axis of the map, where the caller names none


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """Critical step sizes: whatever the step size in question, they are the same."""

    lr: CriticalValue
    mean_square_lr: float
    horizon_lr: float
    staged: Cost


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
        guess=None if limits else _guess(measurement),
        progress=progress,
    )
    spent = Cost(stage="staged rollouts", seconds=0.0, gradient_equivalents=0.0)  # on the critical step size
    if limits is None:
        assert one_lr is not None
        limits = _limits(measurement, batch_sizes, seeds, one_lr)
        spent = limits.staged
    lr_detail, thresholds = limits.lr, _thresholds(measurement, batch_sizes, limits)
    theory = Cost(
        stage="rollouts and theory",
        seconds=time.perf_counter() - start - spent.seconds,
        gradient_equivalents=(network.retain.samples + network.forget.samples) / 3
        + (2 * SAMPLES if network.dormant and not measurement.settings.staged else 0)
        + (first_look(algorithm) * sum(batch_sizes) if algorithm.adaptive else 0),
    )
    verdict_by = _verdict_by(measurement, rolled, mix_detail, seeds, progress=progress)
    mix_detail = verdict_by.mix
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
    used = calibration(verdict_by.rollout.kind)
    interval = (lr_detail.scanned[1], math.inf)
    if lr_detail.found:
        interval = used.interval(lr_detail.value, lr_detail.low, lr_detail.high)
    past = float(algorithm.lr > interval[0])  # of a scan that found no boundary
    if lr_detail.bracketed:
        past = beyond(algorithm.lr, lr_detail.value, interval)
        probability = combined(probability, algorithm.lr, lr_detail.value, interval)
    verdict = verdict_of(probability)
    checks = (
        *trust_checks(measurement, rolled, error, awake),
        *(() if verdict_by.real_steps else change_checks(measurement, rolled, seeds)),
        margin_check(past, interval, verdict, staged=measurement.settings.staged),
    )
    return Report(
        verdict=verdict,
        probability=probability,
        mode=measurement.settings.mode,
        divergence_step=verdict_by.rollout.expected_divergence_step()[0],
        critical_lr=lr_detail.value if lr_detail.found else math.inf,
        critical_lr_interval=interval,
        critical_mix=mix_detail.value if mix_detail.found else math.inf,
        critical_lr_detail=lr_detail,
        critical_mix_detail=mix_detail,
        calibration=used,
        run=_run(measurement, batch_sizes, seeds[0]),
        thresholds=thresholds,
        coherence=_coherence(measurement),
        rollout=_rollout_summary(verdict_by, measurement, len(seeds)),
        cause=find_cause(measurement, rolled, mean_square_growth=thresholds.growth),
        layers=measurement.layers,
        checks=checks,
        linearisation_error=error,
        advice=_advice(
            algorithm,
            lr_detail,
            mix_detail,
            probability,
            max(ADVISED, used.margin(RISK)),
            sure=all(check.passed for check in checks),
        ),
        costs=(
            *measurement.costs,
            theory,
            *(
                [
                    replace(
                        spent,
                        seconds=time.perf_counter() - start - theory.seconds,
                        gradient_equivalents=verdict_by.gradients + spent.gradient_equivalents,
                    )
                ]
                if measurement.settings.staged
                else []
            ),
        ),
        _frontier=lambda **grid: _frontier(measurement, seeds, lr_detail, **grid),
        _at=lambda **changes: _at(measurement, seeds, limits, **changes),
        _recommend=lambda *, risk: _recommended(measurement, seeds, risk),
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
    """Refuse batches that `run` would refuse.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm.

    Raises:
        ValueError: If batches are larger than the sets, or have no variance to be normalised by.
    """
    batch_sizes = algorithm.batch_sizes(problem)
    if problem.batchnorm == "batch":
        check_coupled(algorithm, batch_sizes)


def verdict_of(probability: float) -> str:
    """The verdict that a P(diverge) is.

    Args:
        probability: P(diverge).

    Returns:
        "stable", "marginal" or "diverges".
    """
    if probability < STABLE_BELOW:
        return "stable"
    return "diverges" if probability > DIVERGES_ABOVE else "marginal"


def _at(measurement: Measurement, seeds: Sequence[int], limits: _Limits, /, **changes: object) -> Report:
    """Judge other settings; only the mix needs new curvature products."""
    algorithm = measurement.algorithm.replace(**changes)
    check_batches(measurement.problem, algorithm)
    with preserved_rng():
        kept = limits if set(changes) <= {"lr"} - algorithm.preconditioner_reads else None
        report = judge(measurement.with_algorithm(algorithm), seeds, limits=kept)
    warn_if_unsure(report.checks)
    return report


def _recommended(measurement: Measurement, seeds: Sequence[int], risk: float) -> Recommendations:
    with arithmetic(measurement.settings.precision):
        return recommend(measurement, seeds, risk=risk)


def _frontier(
    measurement: Measurement,
    seeds: Sequence[int],
    detail: CriticalValue,
    *,
    lr: Sequence[float] | None,
    mix: Sequence[float] | None,
    progress: bool,
) -> Frontier:
    algorithm = measurement.algorithm
    batch_sizes = algorithm.batch_sizes(measurement.problem)
    mixes = np.linspace(0, 1, FRONTIER_POINTS) if mix is None else np.atleast_1d(np.asarray(mix, dtype=float))
    if mixes.size == 0:
        raise ValueError(
            "`mix` of `Report.frontier` must hold at least one value; got none. None takes 20 from 0 to 1."
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


def _dynamics(measurement: Measurement, batch_sizes: tuple[int, int]) -> stability.LinearDynamics:
    plain = 1 / measurement.momentum_share  # what leaves momentum out has all of P
    return stability.LinearDynamics(
        retain=_light(measurement.retain).scaled(plain),
        forget=_light(measurement.forget).scaled(plain),
        mix=measurement.algorithm.mix,
        batch_sizes=batch_sizes,
        sampling=measurement.algorithm.sampling,
        **_decay(measurement),
    )


def _decay(measurement: Measurement) -> dict[str, Any]:
    """Weight decay in the linear theory; AdamW's, which is outside of P, is left to the rollouts."""
    if measurement.algorithm.adaptive:
        return {}
    network = measurement.network
    return {
        "weight_decay": measurement.algorithm.weight_decay,
        "metric": network.metric.cpu(),
        "anchor": network.anchor.cpu(),
    }


def _light(part: SampleFactors) -> SampleFactors:
    """Fewer samples where each has much curvature, as texts have: what the theory's maps cost grows with both."""
    return part.thin(max(FEWEST_SAMPLES, THEORY_ROWS // part.factors.shape[1]))


def _step_limit(measurement: Measurement) -> float:
    """2(1+β)/λ_max(D) (T4), or its value for Nesterov's momentum."""
    algorithm = measurement.algorithm
    return stability.step_limit(_edges(measurement)[1], momentum=algorithm.inertia, nesterov=algorithm.nesterov)


def _edges(measurement: Measurement) -> tuple[float, float]:
    """λ_min and λ_max of D with weight decay, whose γP is added to first order at either eigenvector."""
    pairs, algorithm = measurement.spectrum.pairs, measurement.algorithm
    decay = 0.0 if algorithm.adaptive else algorithm.weight_decay
    vectors = pairs.vectors[:, [0, -1]]
    pulls = decay * (vectors * measurement.preconditioner.apply(vectors)).sum(0) if decay else torch.zeros(2)
    return pairs.smallest + float(pulls[0]), pairs.largest + float(pulls[1])


def _guess(measurement: Measurement) -> float:
    """A step size of the order of the critical one."""
    if measurement.algorithm.adaptive:
        # Not below what is asked about, which the scan is to reach past.
        return max(adamw_guess(measurement.problem), measurement.algorithm.lr)
    limit = _step_limit(measurement)
    if math.isfinite(limit):
        return limit
    # Where no curvature is positive, runs diverge along the most negative one.
    smallest = _edges(measurement)[0]
    return 2 / -smallest if -smallest > _negligible(measurement) else measurement.algorithm.lr


def _negligible(measurement: Measurement) -> float:
    """Negative curvature that counts as none; less than its residual may be real, as no quotient lies below λ_min."""
    pairs = measurement.spectrum.pairs
    rounding = ROUNDING * torch.finfo(pairs.vectors.dtype).eps
    return max(min(float(pairs.residuals[0]), NEGLIGIBLE * pairs.scale), rounding * pairs.scale)


def _limits(measurement: Measurement, batch_sizes: tuple[int, int], seeds: Sequence[int], lr: CriticalValue) -> _Limits:
    """The critical step sizes, of which that of one linearisation is known."""
    algorithm, dynamics, spent = measurement.algorithm, _dynamics(measurement, batch_sizes), 0.0
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
    return _Limits(
        lr=lr,
        staged=Cost(stage="staged rollouts", seconds=time.perf_counter() - start, gradient_equivalents=spent),
        mean_square_lr=stability.critical_lr_mean_square(dynamics),
        horizon_lr=stability.critical_lr_within(dynamics, algorithm.steps, HORIZON_GROWTH),
    )


def _typical_seed(
    measurement: Measurement, algorithm: Algorithm, batch_sizes: tuple[int, int], seeds: Sequence[int]
) -> int:
    """The seed in the middle of all by one linearisation: a staged search follows one, and they differ."""
    if len(seeds) < 3:
        return seeds[0]
    setting: dict[str, Any] = {"lr": [algorithm.lr], "mix": [algorithm.mix], "batch_sizes": batch_sizes}
    rolled = rollout(measurement.network, algorithm, seeds=seeds, **setting)
    return seeds[int(rolled.score[:, 0].argsort(stable=True)[len(seeds) // 2])]


def _thresholds(measurement: Measurement, batch_sizes: tuple[int, int], limits: _Limits) -> Thresholds:
    algorithm, pairs = measurement.algorithm, measurement.spectrum.pairs
    dynamics, limit = _dynamics(measurement, batch_sizes), _step_limit(measurement)
    smallest, largest = _edges(measurement)
    retain_mean = measurement.retain.mean()
    damping = DAMPING * float(torch.linalg.eigvalsh(retain_mean)[-1]) or torch.finfo(torch.float64).tiny ** 0.5
    mean_square = stability.mean_square(dynamics, algorithm.lr)
    typical = _typical_growth(dynamics, algorithm.lr)
    rule = stability.coherence_rule(dynamics, algorithm.lr, sigma=measurement.coherence.for_rule())
    return Thresholds(
        curvature=measurement.settings.curvature,
        smallest=smallest,
        largest=largest,
        residuals=(float(pairs.residuals[0]), float(pairs.residuals[-1])),
        converged=pairs.converged,
        step_limit=limit,
        mean_stable=smallest >= -_negligible(measurement) and algorithm.lr <= limit,
        asymptotic_mix=stability.critical_mix(retain_mean, measurement.forget.mean(), damping=damping).mix,
        damping=damping,
        radius=mean_square.radius,
        growth=mean_square.growth(algorithm.steps),
        radius_lower_bound=stability.rayleigh_bounds(dynamics, algorithm.lr),
        lyapunov=typical.value,
        lyapunov_error=typical.standard_error,
        mean_square_lr=limits.mean_square_lr,
        horizon_lr=limits.horizon_lr,
        coherence_rule=rule.diverges,
        self_loop=stability.self_loop(dynamics, algorithm.lr),
    )


def _typical_growth(dynamics: stability.LinearDynamics, lr: float) -> stability.LyapunovExponent:
    """Lyapunov exponent, the sets' sizes rounded to multiples of the samples that stand for them."""
    parts = [
        replace(part, population=part.samples * max(1, round(part.population / part.samples)))
        for part in (dynamics.retain, dynamics.forget)
    ]
    sizes = [min(batch, part.population) for batch, part in zip(dynamics.batch_sizes, parts, strict=True)]
    rounded = replace(dynamics, retain=parts[0], forget=parts[1], batch_sizes=(sizes[0], sizes[1]))
    return stability.lyapunov_exponent(rounded, lr=lr, steps=LYAPUNOV_STEPS, runs=LYAPUNOV_RUNS, seed=0)


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


def _advice(
    algorithm: Algorithm,
    lr_detail: CriticalValue,
    mix_detail: CriticalValue,
    probability: float,
    margin: float,
    *,
    sure: bool,
) -> tuple[str, ...]:
    """What to do, in words: a margin below the critical step size, and half the critical mix."""
    if probability < STABLE_BELOW:
        advice = [
            "Run it."
            if sure
            else "Run it, but not unwatched: the confidence is low, and below stands why and what helps."
        ]
        if lr_detail.found and lr_detail.value < margin * algorithm.lr:
            advice.append(
                f"The step size is within a factor {margin:.2g} of the critical one, {lr_detail.value:.3g}: leave a margin."
            )
        return tuple(advice)
    advice = []
    if lr_detail.found and lr_detail.value <= lr_detail.scanned[0]:
        return (
            f"No step size down to {lr_detail.value:.2g} is safe: the model is at or past the divergence level already.",
        )
    if lr_detail.found:
        advice.append(
            f"Keep mix {algorithm.mix:.3g} and lower the step size to {_two_digits(lr_detail.low / margin)} or less."
        )
    if mix_detail.found and mix_detail.low > 0:
        advice.append(
            f"Or keep step size {algorithm.lr:.3g} and lower the mix to {_two_digits(mix_detail.low / 2)} or less."
        )
    elif mix_detail.found:
        advice.append(
            "At this step size no mix is safe, not even fine-tuning on the retain set: only a smaller step helps."
        )
    too = "batches and schedules" if algorithm.adaptive else "batches, schedules and clipping"
    advice.append(f"`report.recommend()` has {too} too, with the losses each is predicted to reach.")
    return tuple(advice)


def _two_digits(bound: float) -> str:
    """An upper bound for reading, rounded down."""
    return f"{float(Context(prec=2, rounding=ROUND_DOWN).create_decimal(repr(bound))):.2g}"
