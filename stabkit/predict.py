"""`predict`: from a model and two data sets to a verdict with its evidence. Nothing numerical of its own."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy
import torch
from torch import nn

from stabkit import stability
from stabkit._errors import LowConfidenceWarning, caller_level
from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int, check_seed
from stabkit._version import __version__
from stabkit.algorithms import Algorithm, resolve_algorithm
from stabkit.boundary import (
    CriticalValue,
    Frontier,
    critical_lr,
    critical_mix,
    frontier,
    staged_critical_lr,
    staged_critical_mix,
)
from stabkit.calibration import calibration
from stabkit.cause import find_cause, linearisation_errors
from stabkit.curvature import LinearisedNetwork
from stabkit.losses import Loss, PerSampleLoss
from stabkit.measure import Measurement, measure
from stabkit.modes import CostEstimate, Sizes, choose_settings, estimate_cost
from stabkit.precision import PRECISIONS, arithmetic
from stabkit.problem import UnlearningProblem
from stabkit.recommendations import Recommendations
from stabkit.remedy import recommend
from stabkit.report import Check, CoherenceSummary, Cost, Report, RolloutSummary, Run, Thresholds
from stabkit.rollout import Rollout, rollout
from stabkit.runner import check_coupled
from stabkit.samples import Data
from stabkit.staged import MAX_AWAKENED, staged_rollout

STABLE_BELOW, DIVERGES_ABOVE = 0.25, 0.75  # of P(diverge); between them the verdict is "marginal"
HORIZON_GROWTH = 1e3  # of the mean square, at `Thresholds.horizon_lr`
LYAPUNOV_STEPS, LYAPUNOV_RUNS = 100, 16
DAMPING = 1e-3  # ε of T5, as a share of λ_max(H_R)
MAX_LINEARISATION_ERROR = 1.0
MIN_CAPTURED = 0.5
MIN_CAPTURED_COUPLED = (
    0.2  # of coupled batches, whose statistics add directions that matter little: benchmarks/batchnorm.py
)
MAX_TF32_ERROR = 1e-2
MAX_CHANGE = 0.5  # of P(diverge), with half the rank or half the samples
CAPTURED = "captured output sensitivity"
FRONTIER_POINTS = 20  # of each axis of the map, where the caller names none


def predict(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    algorithm: str | Algorithm = "graddiff",
    lr: float | None = None,
    mix: float | None = None,
    batch_size: int | None = None,
    forget_batch_size: int | None = None,
    steps: int | None = None,
    sampling: str | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    weight_decay: float | None = None,
    max_gradient_norm: float | None = None,
    lr_schedule: str | Sequence[float] | None = None,
    loss: str | PerSampleLoss | Loss = "cross_entropy",
    batchnorm: str = "frozen",
    curvature: str = "hessian",
    mode: str = "standard",
    budget: float | str | None = None,
    rank: int | str | None = None,
    retain_samples: int | str | None = None,
    forget_samples: int | str | None = None,
    spectrum_samples: int | str | None = None,
    seeds: int = 3,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: str = "float32",
    progress: bool = False,
) -> Report:
    """Say whether an unlearning run will diverge, before it is run.

    The verdict rests on the rollout of the run on the linearised network (T14); the linear theory (T3-T13) stands beside
    it as evidence and says why. Settings left out keep the algorithm's own values.

    Args:
        model: The trained network; never altered.
        forget: What to forget: DataLoader, Dataset, (x, y) tensors, dict of tensors with labels, or batches.
        retain: What to retain, in any of the same forms.
        algorithm: A name, such as "graddiff", "agu", "sragu", "salun", "scrub" or "sfr_on" (all are in
            `stabkit.algorithms.ALGORITHMS`), or an algorithm object, which has settings of its own.
        lr: Step size η > 0.
        mix: α in [0, 1]: 0 descends on the retain set alone, 1 ascends on the forget set alone.
        batch_size: Retain samples a step.
        forget_batch_size: Forget samples a step; the smaller of `batch_size` and the forget set when None.
        steps: Number K of steps.
        sampling: "without_replacement", "with_replacement" or "poisson".
        momentum: Heavy-ball momentum in [0, 1).
        nesterov: Whether momentum is Nesterov's.
        weight_decay: γ >= 0, as in torch.optim.SGD.
        max_gradient_norm: Largest norm of a step's preconditioned gradient, which is scaled down to it.
        lr_schedule: "cosine", "warmup", or a factor for each step.
        loss: "cross_entropy", "causal_lm", "mse" or a callable giving per-sample losses.
        batchnorm: "frozen": running statistics, in the prediction and in the run it is about. "batch": every batch by its
            own statistics, as in train mode, the running ones drifting along.
        curvature: Whose extreme eigenvalues to report, "hessian" or "ggn".
        mode: "fast": a small linearisation and spectrum. "standard": larger ones. "thorough": beside those, the
            linearised network is left for real steps on a copy wherever its loss is not the real one's any more, which finds
            runs that break, or do not, because features move, and costs a few runs. "auto": the most thorough of them within
            `budget`.
        budget: For "auto": gradient-equivalents, or seconds as text, such as "30s"; what the run itself takes when None.
        rank: Directions of the linearisation; the mode's when None, and found, so that 95 % of the outputs' sensitivity is
            captured, when "auto".
        retain_samples: Retain samples to linearise; the mode's when None, and "all" takes all.
        forget_samples: Forget samples to linearise, likewise.
        spectrum_samples: Samples of each set behind the eigenvalues, likewise.
        seeds: Rollouts behind the probability.
        seed: Seed of everything random here; the caller's random state is left as it was.
        device: Where to compute; where the model is when None.
        dtype: Dtype of the network's derivatives; the model's, but at least float32, when None.
        precision: "float32": products of float32 matrices are in float32, whatever PyTorch is set to. "tf32": in TF32, where
            the device has it; two more curvature products say in the report's checks what that does.
        progress: Whether to show progress bars.

    Returns:
        The report. Cost: some 25 Hessian-vector products over the spectrum's samples and 2·O per-sample gradients of the
        linearised ones; the rest needs no network pass, but for the staged rollouts of a thorough one: one for each seed and
        some sixteen for the critical step size and mix, each between a few forward passes and a run. `predict_cost` tells
        it before, `report.costs` after.

    Raises:
        ValueError: If an argument is out of its domain.
    """
    check_choice(curvature, name="curvature", owner="predict", choices=("ggn", "hessian"))
    check_int(seeds, name="seeds", owner="predict", low=1)
    check_seed(seed, owner="predict")
    check_choice(precision, name="precision", owner="predict", choices=PRECISIONS)
    sizes = Sizes(
        rank=rank, retain_samples=retain_samples, forget_samples=forget_samples, spectrum_samples=spectrum_samples
    )
    chosen = resolve_algorithm(
        algorithm,
        owner="predict",
        lr=lr,
        mix=mix,
        batch_size=batch_size,
        forget_batch_size=forget_batch_size,
        steps=steps,
        sampling=sampling,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        max_gradient_norm=max_gradient_norm,
        lr_schedule=lr_schedule,
    )
    problem = UnlearningProblem(model, forget, retain, loss=loss, batchnorm=batchnorm, device=device, dtype=dtype)
    _check_batches(problem, chosen)
    with preserved_rng():
        settings = choose_settings(
            problem, chosen, mode=mode, budget=budget, sizes=sizes, curvature=curvature, seed=seed, seeds=seeds
        )
        measurement = measure(problem, chosen, replace(settings, precision=precision), progress=progress)
        report = judge(measurement, range(seed, seed + seeds), progress=progress)
    _warn_if_unsure(report)
    return report


def predict_cost(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    algorithm: str | Algorithm = "graddiff",
    steps: int | None = None,
    batch_size: int | None = None,
    loss: str | PerSampleLoss | Loss = "cross_entropy",
    batchnorm: str = "frozen",
    mode: str = "standard",
    budget: float | str | None = None,
    rank: int | str | None = None,
    retain_samples: int | str | None = None,
    forget_samples: int | str | None = None,
    spectrum_samples: int | str | None = None,
    seeds: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CostEstimate:
    """Tell what `predict` would cost, and what the run itself would: a dry run.

    Args:
        model: The trained network; never altered.
        forget: What to forget, in any form that `predict` takes.
        retain: What to retain, likewise.
        algorithm: A name or an algorithm object.
        steps: Number K of steps; the algorithm's own when None.
        batch_size: Retain samples a step; the algorithm's own when None.
        loss: "cross_entropy", "causal_lm", "mse" or a callable giving per-sample losses.
        batchnorm: As `predict` has it.
        mode: As `predict` has it.
        budget: As `predict` has it.
        rank: As `predict` has it.
        retain_samples: As `predict` has it.
        forget_samples: As `predict` has it.
        spectrum_samples: As `predict` has it.
        seeds: Rollouts behind the probability.
        device: Where to compute; where the model is when None.
        dtype: Dtype of the network's derivatives; the model's, but at least float32, when None.

    Returns:
        The estimate; it prints as a table. Cost: reading the data, and a few passes over 64 samples to time a gradient.
    """
    chosen = resolve_algorithm(algorithm, owner="predict_cost", steps=steps, batch_size=batch_size)
    sizes = Sizes(
        rank=rank, retain_samples=retain_samples, forget_samples=forget_samples, spectrum_samples=spectrum_samples
    )
    problem = UnlearningProblem(model, forget, retain, loss=loss, batchnorm=batchnorm, device=device, dtype=dtype)
    settings = choose_settings(
        problem, chosen, mode=mode, budget=budget, sizes=sizes, curvature="hessian", seed=0, seeds=seeds
    )
    return estimate_cost(problem, chosen, settings, seeds=seeds)


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
    rolled = rollout(
        network,
        algorithm,
        lr=[algorithm.lr],
        mix=[algorithm.mix],
        batch_sizes=batch_sizes,
        seeds=seeds,
        progress=progress,
    )
    spent = Cost(stage="staged rollouts", seconds=0.0, gradient_equivalents=0.0)  # on the critical step size
    if limits is None:
        limits = _limits(measurement, batch_sizes, seeds)
        spent = limits.staged
    lr_detail, thresholds = limits.lr, _thresholds(measurement, batch_sizes, limits)
    mix_detail = critical_mix(network, algorithm, batch_sizes=batch_sizes, seeds=seeds)
    theory = Cost(
        stage="rollouts and theory",
        seconds=time.perf_counter() - start - spent.seconds,
        gradient_equivalents=(network.retain.samples + network.forget.samples) / 3,
    )
    verdict_by = _verdict_by(measurement, rolled, mix_detail, seeds, progress=progress)
    mix_detail, (error, awake) = verdict_by.mix, linearisation_errors(problem, network, rolled)
    probability = float(verdict_by.rollout.probability[0])
    used = calibration(verdict_by.rollout.kind)
    checks = (
        *_checks(measurement, error, awake),
        *(() if verdict_by.real_steps else _change_checks(measurement, rolled, seeds)),
    )
    return Report(
        verdict=_verdict(probability),
        probability=probability,
        mode=measurement.settings.mode,
        divergence_step=verdict_by.rollout.expected_divergence_step()[0],
        critical_lr=lr_detail.value if lr_detail.found else math.inf,
        critical_lr_interval=used.interval(lr_detail.value, lr_detail.low, lr_detail.high)
        if lr_detail.found
        else (lr_detail.scanned[1], math.inf),
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
        advice=_advice(algorithm, lr_detail, mix_detail, probability),
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
    guess = min(mix.value, 1.0)
    staged_mix, spent = staged_critical_mix(
        problem, network, algorithm, batch_sizes=batch_sizes, seed=seeds[0], guess=guess
    )
    return _VerdictBy(
        rollout=found.rollout,
        mix=staged_mix,
        real_steps=found.real_steps,
        gradients=found.gradient_equivalents + spent,
    )


def _check_batches(problem: UnlearningProblem, algorithm: Algorithm) -> None:
    """Refuse what `run` would refuse."""
    batch_sizes = algorithm.batch_sizes(problem)
    if problem.batchnorm == "batch":
        check_coupled(algorithm, batch_sizes)


def _warn_if_unsure(report: Report) -> None:
    """Say once, at the caller's line, why a report's confidence is low."""
    failed = [check for check in report.checks if not check.passed]
    if failed:
        reasons = "; ".join(
            f"{check.name} {'unknown' if check.value is None else f'{check.value:.3g}'} where "
            f"{'at least' if check.name == CAPTURED else 'at most'} {check.threshold:.3g} is wanted ({check.remedy})"
            for check in failed
        )
        warnings.warn(f"the prediction has low confidence: {reasons}", LowConfidenceWarning, stacklevel=caller_level())


def _verdict(probability: float) -> str:
    if probability < STABLE_BELOW:
        return "stable"
    return "diverges" if probability > DIVERGES_ABOVE else "marginal"


def _at(measurement: Measurement, seeds: Sequence[int], limits: _Limits, /, **changes: object) -> Report:
    """Judge other settings; only the mix needs new curvature products."""
    algorithm = measurement.algorithm.replace(**changes)
    _check_batches(measurement.problem, algorithm)
    with preserved_rng():
        kept = limits if set(changes) <= {"lr"} - algorithm.preconditioner_reads else None
        report = judge(measurement.with_algorithm(algorithm), seeds, limits=kept)
    _warn_if_unsure(report)
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
    )


def _dynamics(measurement: Measurement, batch_sizes: tuple[int, int]) -> stability.LinearDynamics:
    return stability.LinearDynamics(
        retain=measurement.retain,
        forget=measurement.forget,
        mix=measurement.algorithm.mix,
        batch_sizes=batch_sizes,
        sampling=measurement.algorithm.sampling,
        weight_decay=measurement.algorithm.weight_decay,
        metric=measurement.network.metric.cpu(),
        anchor=measurement.network.anchor.cpu(),
    )


def _step_limit(measurement: Measurement) -> float:
    """2(1+β)/λ_max(D) (T4), or its value for Nesterov's momentum."""
    algorithm = measurement.algorithm
    return stability.step_limit(_edges(measurement)[1], momentum=algorithm.momentum, nesterov=algorithm.nesterov)


def _edges(measurement: Measurement) -> tuple[float, float]:
    """λ_min and λ_max of D with weight decay, whose γP is added to first order at either eigenvector."""
    pairs, decay = measurement.spectrum.pairs, measurement.algorithm.weight_decay
    vectors = pairs.vectors[:, [0, -1]]
    pulls = decay * (vectors * measurement.preconditioner.apply(vectors)).sum(0) if decay else torch.zeros(2)
    return pairs.smallest + float(pulls[0]), pairs.largest + float(pulls[1])


def _limits(measurement: Measurement, batch_sizes: tuple[int, int], seeds: Sequence[int]) -> _Limits:
    algorithm, dynamics, limit = measurement.algorithm, _dynamics(measurement, batch_sizes), _step_limit(measurement)
    # Where no curvature is positive, runs diverge along the most negative one.
    smallest = _edges(measurement)[0]
    guess = limit if math.isfinite(limit) else 2 / -smallest if smallest < 0 else algorithm.lr
    lr, spent = critical_lr(measurement.network, algorithm, batch_sizes=batch_sizes, seeds=seeds, guess=guess), 0.0
    start = time.perf_counter()
    if measurement.settings.staged:
        lr, spent = staged_critical_lr(
            measurement.problem, measurement.network, algorithm, batch_sizes=batch_sizes, seed=seeds[0], guess=lr.value
        )
    return _Limits(
        lr=lr,
        staged=Cost(stage="staged rollouts", seconds=time.perf_counter() - start, gradient_equivalents=spent),
        mean_square_lr=stability.critical_lr_mean_square(dynamics),
        horizon_lr=stability.critical_lr_within(dynamics, algorithm.steps, HORIZON_GROWTH),
    )


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
        mean_stable=smallest >= -float(pairs.residuals[0]) and algorithm.lr <= limit,
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


def _checks(measurement: Measurement, error: float, awake: float) -> tuple[Check, ...]:
    network, pairs = measurement.network, measurement.spectrum.pairs
    scale = max(abs(pairs.smallest), abs(pairs.largest))
    residual = float(pairs.residuals.max()) / scale if scale > 0 else 0.0
    least = MIN_CAPTURED_COUPLED if measurement.problem.batchnorm == "batch" else MIN_CAPTURED
    rough = measurement.spectrum.tf32_error
    tf32 = Check(
        name="error of TF32",
        value=rough,
        threshold=MAX_TF32_ERROR,
        passed=rough is None or rough <= MAX_TF32_ERROR,
        meaning="How far a curvature product in TF32 is from one in float32, relative to it.",
        remedy="Predict with precision='float32'.",
    )
    linearised = Check(
        name="linearisation error",
        value=error,
        threshold=MAX_LINEARISATION_ERROR,
        passed=error <= MAX_LINEARISATION_ERROR,
        meaning="How far the real outputs at the predicted parameters are from the linearised ones, relative to how far "
        "those moved; for a diverging run, where its loss meets the divergence level.",
        remedy="mode='thorough' leaves the linearised network where it is wrong; otherwise leave a margin and check with "
        "verify().",
    )
    dormant = Check(
        name="sensitivity to dormant parameters",
        value=awake,
        threshold=MAX_AWAKENED,
        passed=awake <= MAX_AWAKENED,
        meaning="Share of the outputs' sensitivity, at the predicted parameters, that is to tensors on which they do not "
        "depend before the run, as adapters that begin at 0 hold; the linearised network never moves them.",
        remedy="mode='thorough' goes on with real steps there.",
    )
    return (
        *([] if rough is None else [tf32]),
        *([] if measurement.settings.staged else [linearised]),
        *([] if measurement.settings.staged or not network.dormant else [dormant]),
        Check(
            name=CAPTURED,
            value=network.captured,
            threshold=least,
            passed=network.captured >= least,
            meaning="Share of the outputs' sensitivity to the parameters that the compressed directions hold.",
            remedy="Raise `rank`.",
        ),
        Check(
            name="relative eigen-residual",
            value=residual,
            threshold=1e-2,
            passed=residual <= 1e-2,
            meaning="How exact the extreme eigenvalues of the mixed curvature are.",
            remedy="Compute in float64 with `dtype`.",
        ),
    )


def _change_checks(measurement: Measurement, rolled: Rollout, seeds: Sequence[int]) -> tuple[Check, ...]:
    """Whether P(diverge) of one linearisation is another at half its size."""
    network, algorithm = measurement.network, measurement.algorithm
    batch_sizes = algorithm.batch_sizes(measurement.problem)

    def again(other: LinearisedNetwork) -> Rollout:
        return rollout(other, algorithm, lr=[algorithm.lr], mix=[algorithm.mix], batch_sizes=batch_sizes, seeds=seeds)

    others = (
        ("half the rank", again(network.thinned(rank=math.ceil(network.rank / 2))), "Raise `rank`."),
        (
            "half the samples",
            again(network.thinned(samples=0.5)),
            "Raise `retain_samples` and `forget_samples`.",
        ),
    )
    said = float(rolled.probability[0])
    changes = [abs(float(other.probability[0]) - said) for _, other, _ in others]
    return tuple(
        Check(
            name=f"change with {name}",
            value=change,
            threshold=MAX_CHANGE,
            passed=change <= MAX_CHANGE,
            meaning=f"How far P(diverge) of one linearisation is from that with {name}.",
            remedy=remedy,
        )
        for (name, _, remedy), change in zip(others, changes, strict=True)
    )


def _advice(
    algorithm: Algorithm, lr_detail: CriticalValue, mix_detail: CriticalValue, probability: float
) -> tuple[str, ...]:
    """What to do, in words; the margins of one half are rules of thumb."""
    if probability < STABLE_BELOW:
        advice = ["Run it."]
        if lr_detail.found and lr_detail.value < 2 * algorithm.lr:
            advice.append(
                f"The step size is within a factor 2 of the critical one, {lr_detail.value:.3g}: leave a margin."
            )
        return tuple(advice)
    advice = []
    if lr_detail.found and lr_detail.value <= lr_detail.scanned[0]:
        return (
            f"No step size down to {lr_detail.value:.2g} is safe: the model is at or past the divergence level already.",
        )
    if lr_detail.found:
        advice.append(f"Keep mix {algorithm.mix:.3g} and lower the step size to {lr_detail.low / 2:.2g} or less.")
    if mix_detail.found and mix_detail.low > 0:
        advice.append(f"Or keep step size {algorithm.lr:.3g} and lower the mix to {mix_detail.low / 2:.2g} or less.")
    elif mix_detail.found:
        advice.append(
            "At this step size no mix is safe, not even fine-tuning on the retain set: only a smaller step helps."
        )
    advice.append(
        "`report.recommend()` has batches, schedules and clipping too, with the losses each is predicted to reach."
    )
    return tuple(advice)
