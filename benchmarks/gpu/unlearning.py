"""Predict first, then run: cells of step sizes and mixes around a predicted boundary, published settings, audits.

A cell's predictions are what `stabkit.predict` would say, from θ* and the data alone, but that staged rollouts are of one
seed; they are on disk before the first run starts, and the runs are those that the file names. Real runs draw other batches
than the rollouts did.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

import stabkit
from benchmarks.algorithms import ATTACK, measured
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.store import Store, now, timed
from benchmarks.gpu.tasks import Sets, Task
from stabkit.algorithms import SCRUB, Algorithm, GradDiff, GradientAscent, SalUn, SFROn, resolve_algorithm
from stabkit.boundary import CriticalValue, staged_critical_lr
from stabkit.judge import judge
from stabkit.measure import Measurement, measure
from stabkit.metrics import audit
from stabkit.modes import MODES, Sizes
from stabkit.precision import arithmetic
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.report import Report
from stabkit.runner import RunResult, run
from stabkit.staged import staged_rollout

FIRST_RUN_SEED = 777  # of the real runs' batches; the rollouts draw others
CIFAR_RETAIN, CIFAR_FORGET, PUBLISHED_BATCH = 45_000, 5_000, 128  # of the published runs: random 10 % of CIFAR-10
EPOCH = (
    CIFAR_RETAIN // PUBLISHED_BATCH
)  # steps: the loop runs through the retain set, the forget set coming round again
FORGET_EPOCH = -(-CIFAR_FORGET // PUBLISHED_BATCH)
ADAM_LR = 1e-5  # open-unlearning's AdamW
ADAM_EPOCHS, ADAM_BATCH, ADAM_DECAY = 10, 32, 0.01
GOLDS = (
    ("resnet18", "random10"),
    ("resnet18", "class"),
    ("resnet18", "random50"),
)  # deletions with a retrained network


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination to predict and run.

    Attributes:
        task: Name of the task.
        deletion: Name of the deletion.
        algorithm: Name of the algorithm, with its own settings but for step size, mix, steps and batches.
        mixes: How many of the scale's mixes, where the algorithm leaves the mix free.
        batchnorm: "frozen" (the library's default, and what most cells have) or "batch", in prediction and runs.
        optimizer: "sgd" or "adamw", in both.
    """

    task: str
    deletion: str
    algorithm: str
    mixes: int = 2
    batchnorm: str = "frozen"
    optimizer: str = "sgd"

    @property
    def key(self) -> str:
        """Name of the cell, fit for a file."""
        unusual = [*(["batch"] if self.batchnorm == "batch" else []), *(["adamw"] if self.optimizer == "adamw" else [])]
        return "-".join([self.task, self.deletion, self.algorithm, *unusual])


@dataclass(frozen=True, kw_only=True)
class Published:
    """A setting that was published with what became of it.

    Attributes:
        name: What to call it.
        task: Name of the task.
        deletion: Name of the deletion.
        make: The setting as stabkit has it, on a problem and at a scale.
        outcome: "collapse" or "safe".
        source: Where it comes from and what was reported.
        differs: What of it stabkit's run does otherwise.
        mode: How it is predicted; "thorough" for AdamW's runs, whose network one linearisation is not right about.
    """

    name: str
    task: str
    deletion: str
    make: Callable[[UnlearningProblem, Scale], Algorithm]
    outcome: str
    source: str
    differs: str
    mode: str = "standard"


def problem_of(model: nn.Module, task: Task, sets: Sets, *, batchnorm: str = "frozen") -> UnlearningProblem:
    """The unlearning problem of a deletion."""
    return UnlearningProblem(model, sets.forget, sets.retain, loss=task.loss, test=sets.test, batchnorm=batchnorm)


# ---------------------------------------------------------------------- cells


def cell(store: Store, task: Task, spec: Cell, job: str) -> dict[str, Any]:
    """Predict a cell and run it.

    Args:
        store: Where the original lies and the predictions go.
        task: The cell's task.
        spec: The cell.
        job: Name of the job, under which the predictions are kept.

    Returns:
        Every run beside what was said of it, the boundaries, and the run at the advised step size, with its audit where
        there is a retrained network.
    """
    scale = task.scale
    model = store.load_weights(f"train-{spec.task}", task.build(0))
    sets = task.sets(spec.deletion)
    algorithm = _algorithm(spec, scale)
    problem = problem_of(model, task, sets, batchnorm=spec.batchnorm)
    said, mark = store.predicted(job, f"train-{spec.task}", lambda: _predict_cell(problem, task, spec, algorithm))
    preconditioner, preconditioning = timed(lambda: algorithm.step_preconditioner(problem), store.device)
    bench = _Runs(store, problem, preconditioner, scale.watched)
    settings, boundaries = [], []
    for line in said["mixes"]:
        at = algorithm if algorithm.fixed_mix else algorithm.replace(mix=line["mix"])
        crossed = []
        for point in line["grid"]:
            found = [bench.real(at.replace(lr=point["lr"]), seed) for seed in scale.seeds]
            crossed.append(2 * sum(one["diverged"] for one in found) >= len(found))
            settings.append({
                "mix": line["mix"],
                "lr": point["lr"],
                **{key: [one[key] for one in found] for key in found[0]},  # a list over the seeds each
            })
        boundaries.append({
            "mix": line["mix"],
            "predicted": line["critical_lr"] if line["found"] else None,
            "staged": line["staged"]["critical_lr"] if line["staged"]["found"] else None,
            "observed": _boundary(bench, at, [point["lr"] for point in line["grid"]], crossed, scale),
        })
    advised = algorithm.replace(lr=said["advised_lr"])
    safe, result = bench.kept(advised, scale.seeds[0])
    return {
        "kind": "cell",
        "cell": asdict(spec),
        "predictions": mark,
        "first_run": bench.first,
        "settings": settings,
        "boundaries": boundaries,
        "advised": {"lr": advised.lr, "mix": advised.mix, **safe},
        "audit": _audited(store, task, spec.deletion, problem, result),
        "steps": algorithm.steps,
        "path_held": True,  # what records from before staged rollouts looked at their path lack
        "seeds": list(scale.seeds),
        "seconds": {
            **said["seconds"],
            "preconditioner": preconditioning,
            "full_run": statistics.median(bench.full) if bench.full else None,
        },
        "gradients": {
            "predict": said["gradients"],
            "staged": said["staged_gradients"],
            "full_run": bench.gradients,
        },
        "retain_loss": problem.retain_loss,
        "forget_loss": problem.forget_loss,
        "divergence_level": problem.divergence_level,
        "parameters": problem.size,
        "sizes": [problem.forget.size, problem.retain.size],
    }


def _predict_cell(problem: UnlearningProblem, task: Task, spec: Cell, algorithm: Algorithm) -> dict[str, Any]:
    """What one linearisation and staged rollouts say of each mix, and of the step sizes around its boundary.

    Measured and judged as `predict` does it, in steps, so that one measurement serves both kinds of prediction.
    """
    scale, device = task.scale, task.device
    sizes = dict(scale.measured[spec.task])
    seeds, precision = range(sizes.pop("seeds")), sizes.pop("precision", "float32")
    settings = replace(Sizes(**sizes).settings(MODES["standard"], curvature="hessian", seed=0), precision=precision)
    measurement, measuring = timed(lambda: measure(problem, algorithm, settings), device)
    report, judging = timed(lambda: judge(measurement, seeds), device)
    mixes = (algorithm.mix,) if algorithm.fixed_mix else scale.mixes[: spec.mixes]
    lines, others, maps, staging, staged_gradients = [], 0.0, 0.0, 0.0, 0.0
    for mix in mixes:
        here, found = report, measurement
        if mix != algorithm.mix:
            found, took = timed(lambda mix=mix: measurement.with_algorithm(algorithm.replace(mix=mix)), device)
            here, took_more = timed(lambda found=found: judge(found, seeds), device)
            others += took + took_more
        detail = here.critical_lr_detail
        guess = detail.value if detail.found else min(here.thresholds.step_limit, detail.scanned[1])
        staged = _Staged(found)
        edge, took = timed(lambda staged=staged, guess=guess: staged.boundary(guess), device)
        centre = edge.value if edge.found else guess
        lrs = np.geomspace(centre / scale.span, centre * scale.span, scale.points).tolist()
        points, took_more = timed(lambda staged=staged, lrs=lrs: [staged.at(lr) for lr in lrs], device)
        staging, staged_gradients = staging + took + took_more, staged_gradients + staged.gradients
        frontier, took = timed(lambda here=here, lrs=lrs, mix=mix: here.frontier(lr=lrs, mix=[mix]), device)
        maps += took
        lines.append({
            "mix": mix,
            "critical_lr": _finite(here.critical_lr),
            "interval": [_finite(end) for end in here.critical_lr_interval],
            "found": detail.found,
            "scanned": list(detail.scanned),
            "step_limit": _finite(here.thresholds.step_limit),
            "confidence": here.confidence,
            "staged": {"critical_lr": edge.value, "low": edge.low, "found": edge.found, "scanned": list(edge.scanned)},
            "grid": [
                {
                    "lr": lr,
                    "probability": float(frontier.probability[i, 0]),
                    "score": _finite(float(frontier.score[i, 0])),
                    "divergence_step": _finite(float(frontier.divergence_step[i, 0])),
                    "staged": points[i],
                }
                for i, lr in enumerate(lrs)
            ],
        })
    return {
        "algorithm": algorithm.settings(),
        "mixes": lines,
        "advised_lr": _advised(report, lines[0]["staged"]),
        "asked": {
            "lr": algorithm.lr,
            "mix": algorithm.mix,
            "verdict": report.verdict,
            "probability": report.probability,
        },
        "divergence_level": report.run.divergence_level,
        "checks": {check.name: check.value for check in report.checks},
        "seconds": {"predict": measuring + judging, "other_mixes": others, "maps": maps, "staged": staging},
        "staged_gradients": staged_gradients,
        **_spent(report),
    }


class _Staged:
    """Staged rollouts of one seed: what `predict` in thorough mode says, without what it says besides."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self._batches = measurement.algorithm.batch_sizes(measurement.problem)
        self.gradients = 0.0

    def boundary(self, guess: float) -> CriticalValue:
        """The critical step size."""
        m = self._measurement
        with arithmetic(m.settings.precision):
            found, gradients = staged_critical_lr(
                m.problem, m.network, m.algorithm, batch_sizes=self._batches, seed=0, guess=guess
            )
        self.gradients += gradients
        return found

    def at(self, lr: float) -> dict[str, Any]:
        """P(diverge), score and divergence step at a step size."""
        m = self._measurement
        with arithmetic(m.settings.precision):
            found = staged_rollout(
                m.problem, m.network, m.algorithm.replace(lr=lr), batch_sizes=self._batches, seeds=[0]
            )
        self.gradients += found.gradient_equivalents
        rolled = found.rollout
        return {
            "probability": float(rolled.probability[0]),
            "score": _finite(float(rolled.score[0, 0])),
            "divergence_step": _finite(rolled.expected_divergence_step()[0]),
            "real_steps": found.real_steps,
        }


def _advised(report: Report, staged: dict[str, Any]) -> float:
    """Half the largest step size that nothing broke at, and no more than half of 2/λ_max: bolder than a report's advice."""
    detail = report.critical_lr_detail
    limits = [detail.low] if detail.found else []
    limits += [staged["low"]] if staged["found"] else []
    limits += [] if report.run.adaptive else [report.thresholds.step_limit]  # a still second moment's is far too small
    return 0.5 * min([*limits, detail.scanned[1]])


def _algorithm(spec: Cell, scale: Scale) -> Algorithm:
    """The cell's algorithm; a mix of 0.5 and more is for the runs of the grid."""
    batch = scale.batch_size[spec.task]
    plain = resolve_algorithm(spec.algorithm, steps=scale.steps[spec.task], batch_size=batch, optimizer=spec.optimizer)
    return plain if plain.fixed_mix else plain.replace(mix=scale.mixes[0])


class _Runs:
    """Real runs of one problem, the first one's time, and what full ones take."""

    def __init__(
        self, store: Store, problem: UnlearningProblem, preconditioner: Preconditioner, watched: int | None
    ) -> None:
        self._store, self._problem, self._preconditioner, self._watched = store, problem, preconditioner, watched
        self.first: str | None = None
        self.full: list[float] = []
        self.gradients = 0.0

    def real(self, algorithm: Algorithm, seed: int) -> dict[str, Any]:
        """What a run did."""
        return self.kept(algorithm, seed)[0]

    def kept(self, algorithm: Algorithm, seed: int) -> tuple[dict[str, Any], RunResult]:
        """The same, with its model."""
        self.first = self.first or now()
        result, seconds = timed(
            lambda: run(
                self._problem,
                algorithm,
                preconditioner=self._preconditioner,
                seed=FIRST_RUN_SEED + seed,
                monitor_samples=self._watched,
            ),
            self._store.device,
        )
        if result.steps == algorithm.steps:
            self.full.append(seconds)
            self.gradients = result.gradient_equivalents
        last = result.trajectory[-1]
        return {
            "diverged": result.diverged,
            "divergence_step": result.divergence_step,
            "steps": result.steps,
            "retain_loss": _finite(last.retain_loss),
            "forget_loss": _finite(last.forget_loss),
            "seconds": round(seconds, 4),
        }, result


def _boundary(bench: _Runs, at: Algorithm, lrs: list[float], crossed: list[bool], scale: Scale) -> float | None:
    """Where half of the seeds begin to diverge, halved down to with the first; None where the grid brackets nothing."""
    if not any(crossed) or crossed[0]:
        return None
    place = crossed.index(True)
    low, high = lrs[place - 1], lrs[place]
    for _ in range(scale.halvings):
        middle = math.sqrt(low * high)
        diverged = bench.real(at.replace(lr=middle), scale.seeds[0])["diverged"]
        low, high = (low, middle) if diverged else (middle, high)
    return math.sqrt(low * high)


# ---------------------------------------------------------------------- published settings


def _torchunlearn(algorithm: Algorithm, *, weight: float = 1.0) -> Callable[[UnlearningProblem, Scale], Algorithm]:
    """SGD 0.01, momentum 0.9, decay 5e-4, 5 epochs of batches of 128 from both sets at once.

    Args:
        algorithm: The algorithm at its mix.
        weight: How much more its cost weighs there than here, which goes into the step size; decay keeps its pull.

    Returns:
        What makes the setting.
    """
    settings = {"lr": 0.01 * weight, "weight_decay": 5e-4 / weight, "momentum": 0.9}
    return lambda problem, scale: algorithm.replace(**settings, steps=5 * EPOCH, batch_size=PUBLISHED_BATCH)


def _as_trained(mix: float) -> Callable[[UnlearningProblem, Scale], Algorithm]:
    """AdamW at the step size that the network was trained with, which is open-unlearning's default: 1e-5 for both there."""

    def make(problem: UnlearningProblem, scale: Scale) -> Algorithm:
        batch, steps = _ten_epochs(problem)
        epoch = steps // ADAM_EPOCHS
        # Its schedule: up over the first epoch, then down to 0 over the others.
        rates = [*np.linspace(0, 1, epoch + 1)[1:], *np.linspace(1, 0, steps - epoch + 1)[1:]]
        plain = GradientAscent() if mix == 1 else GradDiff(mix=mix)
        return plain.replace(
            lr=scale.training["lm"].lr,
            steps=steps,
            batch_size=batch,
            optimizer="adamw",
            weight_decay=ADAM_DECAY,
            lr_schedule=rates,
        )

    return make


def _ten_epochs(problem: UnlearningProblem) -> tuple[int, int]:
    """Batch size and steps of open-unlearning's default epochs, through the forget set."""
    batch = min(ADAM_BATCH, problem.retain.size)
    return batch, ADAM_EPOCHS * max(1, problem.forget.size // min(batch, problem.forget.size))


def _as_long_as_adam(mix: float) -> Callable[[UnlearningProblem, Scale], Algorithm]:
    """GradDiff whose first step is as long as AdamW's, lr·√d: each of the d entries moves by lr in Adam's first step."""

    def make(problem: UnlearningProblem, scale: Scale) -> Algorithm:
        parameters = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
        total = torch.zeros(problem.size, device=problem.device, dtype=problem.dtype)
        for samples, weight in ((problem.retain, 1 - mix), (problem.forget, -mix)):
            for inputs, targets in samples.batches(ADAM_BATCH) if weight else ():
                with torch.enable_grad():
                    loss = problem.loss.per_sample(problem.outputs(parameters, inputs), targets).sum() / samples.size
                    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                total += weight * torch.cat([
                    (torch.zeros_like(p) if g is None else g).reshape(-1)
                    for g, p in zip(gradients, parameters.values(), strict=True)
                ])
        lr = ADAM_LR * math.sqrt(problem.size) / float(total.norm())
        batch, steps = _ten_epochs(problem)
        plain = GradientAscent() if mix == 1 else GradDiff(mix=mix)
        return plain.replace(lr=lr, steps=steps, batch_size=batch)

    return make


_TORCHUNLEARN = "torchunlearn's README: CIFAR-10, ResNet-18, random 10 %, SGD 0.01, momentum 0.9, 5 epochs, three seeds"
_FROZEN = "BatchNorm is frozen here and in train mode there; no augmentation here; the network was trained otherwise"
_SGD = (
    "SGD here, AdamW at 1e-5 there: the step size makes the first step as long as AdamW's, lr·√d; later ones follow the "
    "gradient here and keep that length there. Network and data are our own"
)
_TRAINED = (
    "AdamW, its decay, warm-up and schedule as there; the step size is the largest that our network was trained with, as it "
    "is there, where that is 1e-5. Network and data are our own"
)
PUBLISHED = (
    Published(
        name="neggrad-torchunlearn",
        task="resnet18",
        deletion="random10",
        make=_torchunlearn(GradDiff(mix=0.5)),
        outcome="collapse",
        source=f"{_TORCHUNLEARN}: RA/FA/TA 10.00/10.00/10.00",
        differs=f"The retain set's weight is that of its example, one half; {_FROZEN}",
    ),
    Published(
        name="scrub-torchunlearn",
        task="resnet18",
        deletion="random10",
        # Its cost is ℓ_R + KL_R - KL_F in every step, at temperature 1.
        make=_torchunlearn(
            SCRUB(
                mix=0.5,
                lr_schedule=None,
                forget_every=None,
                temperature=1.0,
                loss_weight=1.0,
                divergence_weight=1.0,
                forget_share=1.0,
            )
        ),
        outcome="collapse",
        source=f"{_TORCHUNLEARN}: RA/FA/TA 31.69/32.02/31.86",
        differs=_FROZEN,
    ),
    Published(
        name="salun-torchunlearn",
        task="resnet18",
        deletion="random10",
        make=_torchunlearn(SalUn(mix=0.5), weight=2.0),  # its cost is the sum of both sets', which a mix halves
        outcome="safe",
        source=f"{_TORCHUNLEARN}: RA/FA/TA 99.64/99.72/92.95",
        differs=_FROZEN,
    ),
    Published(
        name="sfr_on-paper",
        task="resnet18",
        deletion="random10",
        make=lambda problem, scale: SFROn(),
        outcome="safe",
        source="SFR-on's own settings and table: FA/RA/TA/MIA 96.58/99.88/94.19/72.26",
        differs=_FROZEN,
    ),
    Published(
        name="ga-sfr_on-paper",
        task="resnet18",
        deletion="random10",
        make=lambda problem, scale: GradientAscent(
            lr=1e-4, momentum=0.9, weight_decay=5e-4, steps=9 * FORGET_EPOCH, batch_size=PUBLISHED_BATCH
        ),
        outcome="safe",
        source="gradient ascent of SFR-on's table, 1e-4 and 9 epochs: FA/RA/TA/MIA 93.91/93.76/87.00/77.19",
        differs=_FROZEN + "; momentum and decay are that code's usual ones",
    ),
    Published(
        name="ga-open-unlearning",
        task="lm",
        deletion="people",
        make=_as_long_as_adam(1.0),
        outcome="collapse",
        source="open-unlearning's default step size, issue 167: GradAscent leaves a utility of 0.0",
        differs=_SGD,
    ),
    Published(
        name="graddiff-open-unlearning",
        task="lm",
        deletion="people",
        make=_as_long_as_adam(0.5),
        outcome="collapse",
        source="open-unlearning's default step size, issue 167: GradDiff destroys the model",
        differs=_SGD,
    ),
    Published(
        name="ga-open-unlearning-adamw",
        task="lm",
        deletion="people",
        make=_as_trained(1.0),
        outcome="collapse",
        source="open-unlearning's defaults, issue 167: GradAscent leaves a utility of 0.0",
        differs=_TRAINED,
        mode="thorough",
    ),
    Published(
        name="graddiff-open-unlearning-adamw",
        task="lm",
        deletion="people",
        make=_as_trained(0.5),
        outcome="collapse",
        source="open-unlearning's defaults, issue 167: GradDiff destroys the model",
        differs=_TRAINED,
        mode="thorough",
    ),
)


def published(store: Store, task: Task, setting: Published, job: str) -> dict[str, Any]:
    """Predict one published setting, then run it once.

    Args:
        store: Where the original lies and the prediction goes.
        task: Its task.
        setting: The setting.
        job: Name of the job.

    Returns:
        What was said, what was published and what happened.
    """
    scale = task.scale
    model = store.load_weights(f"train-{setting.task}", task.build(0))
    sets = task.sets(setting.deletion)
    problem = problem_of(model, task, sets)
    algorithm = _shortened(setting.make(problem, scale), problem, scale)
    sizes = scale.measured_long if setting.task == "resnet18" else scale.measured[setting.task]

    def make() -> dict[str, Any]:
        report, seconds = timed(
            lambda: stabkit.predict(
                model, sets.forget, sets.retain, algorithm=algorithm, loss=task.loss, mode=setting.mode, **sizes
            ),
            store.device,
        )
        return {
            "algorithm": algorithm.settings(),
            "verdict": report.verdict,
            "probability": report.probability,
            "divergence_step": report.divergence_step,
            "critical_lr": _finite(report.critical_lr),
            "interval": [_finite(end) for end in report.critical_lr_interval],
            "step_limit": _finite(report.thresholds.step_limit),
            "mechanism": report.cause.mechanism,
            "confidence": report.confidence,
            "checks": {check.name: check.value for check in report.checks},
            "seconds": {"predict": seconds},
            **_spent(report),
        }

    said, mark = store.predicted(job, f"train-{setting.task}", make)
    bench = _Runs(store, problem, algorithm.step_preconditioner(problem), scale.watched)
    done, result = bench.kept(algorithm, 0)
    return {
        "kind": "published",
        "name": setting.name,
        "task": setting.task,
        "deletion": setting.deletion,
        "algorithm": algorithm.name,
        "settings": algorithm.settings(),
        "outcome": setting.outcome,
        "source": setting.source,
        "differs": setting.differs,
        "predictions": mark,
        "first_run": bench.first,
        "said": {key: said[key] for key in ("verdict", "probability", "divergence_step", "critical_lr", "mechanism")},
        "run": done,
        "audit": _audited(store, task, setting.deletion, problem, result),
        "seeds": sorted({*range(sizes["seeds"]), FIRST_RUN_SEED}),  # network, rollouts and audit from 0 on; the run's
        "seconds": {"predict": said["seconds"]["predict"], "run": done["seconds"]},
        "gradients": {"predict": said["gradients"], "run": result.gradient_equivalents},
    }


def _shortened(algorithm: Algorithm, problem: UnlearningProblem, scale: Scale) -> Algorithm:
    """The scale's share of the steps, and batches no larger than the same share of both sets leaves room for."""
    if scale.published_share == 1:
        return algorithm
    steps = max(10, round(algorithm.steps * scale.published_share))
    batch = min(algorithm.batch_size, problem.retain.size // 10)
    rates = algorithm.lr_schedule
    if rates is not None and not isinstance(rates, str):  # the same course in fewer steps
        places = np.linspace(0, len(rates) - 1, steps)
        rates = np.interp(places, np.arange(len(rates)), rates)
    return algorithm.replace(steps=steps, batch_size=max(2, batch), lr_schedule=rates)


# ---------------------------------------------------------------------- audits


def _audited(
    store: Store, task: Task, deletion: str, problem: UnlearningProblem, result: RunResult
) -> dict[str, Any] | None:
    """FA, RA, TA, MIA, average gap and KL of what a run left, beside the original and the retrained network.

    None where there is no retrained network or the run diverged.
    """
    if (task.name, deletion) not in GOLDS or result.diverged:
        return None
    gold = store.load_weights(f"gold-{task.name}-{deletion}", task.build(0))
    found = audit(problem, {"unlearned": result.model}, gold=gold, attacks=[ATTACK], replicates=task.scale.replicates)
    return {
        "sizes": list(found.sizes),
        "attack": ATTACK,
        "models": {entry.name: measured(entry) for entry in found.models},
    }


def _spent(report: Report) -> dict[str, Any]:
    """Seconds of every stage of a prediction, and its per-sample gradients."""
    return {
        "stages": {cost.stage: round(cost.seconds, 4) for cost in report.costs},
        "gradients": sum(cost.gradient_equivalents for cost in report.costs),
    }


def _finite(value: float | None) -> float | None:
    """The number, or None where it is none."""
    return value if value is not None and math.isfinite(value) else None


def quiet() -> None:
    """Leave out warnings of low confidence: what they say is in the predictions' checks."""
    warnings.simplefilter("ignore", stabkit.StabkitWarning)
