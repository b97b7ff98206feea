"""`verify`: runs the algorithm around the predicted critical step size and holds the prediction against what happens."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stabkit._progress import progress_bar
from stabkit._rng import preserved_rng
from stabkit._serialise import dumps, to_plain, write_atomically
from stabkit._table import Shown, Table
from stabkit._validate import check_choice, check_int, check_real, check_seed
from stabkit.algorithms import ALGORITHMS, Algorithm
from stabkit.data import Data
from stabkit.frontier import Outcome
from stabkit.losses import NAMED, Loss, PerSampleLoss
from stabkit.metrics import Accuracies, accuracies
from stabkit.metrics.audit import check_held_out
from stabkit.problem import UnlearningProblem
from stabkit.report import Report
from stabkit.runner import run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAME_LOSS = 1e-3  # relative difference of losses that another device or dtype may make
FIRST_RUN_SEED = 10_000  # real runs draw other batches than the rollouts did


@dataclass(frozen=True, kw_only=True)
class VerifiedRun:
    """One real run beside its prediction.

    Attributes:
        place: "below", "at", "above" (the critical step size) or "asked" (the report's own setting).
        lr: Step size.
        mix: Mix.
        seed: Seed of its batches.
        predicted: Whether it was predicted to diverge; None where the prediction is "marginal", as at
            the critical step.
        diverged: Whether it did.
        divergence_step: First checked step past the level, or None.
        stop_reason: Why the run ended.
        retain_loss: Retain loss at its end; None if not finite.
        forget_loss: Forget loss at its end; None if not finite.
        accuracies: RA, FA and TA of the model it left.
        steps: Checked steps.
        trajectory: Retain loss at each; infinity where not finite.
    """

    place: str
    lr: float
    mix: float
    seed: int
    predicted: bool | None
    diverged: bool
    divergence_step: int | None
    stop_reason: str
    retain_loss: float | None
    forget_loss: float | None
    accuracies: Accuracies
    steps: tuple[int, ...]
    trajectory: tuple[float, ...]

    @property
    def hit(self) -> bool | None:
        """Whether the prediction was right; None where there is none."""
        return None if self.predicted is None else self.predicted == self.diverged


@dataclass(frozen=True, kw_only=True)
class Verification(Shown):
    """What the real runs said about a report.

    Attributes:
        algorithm: Name of the algorithm.
        critical_lr: The report's critical step size.
        runs: The real runs.
        before: Accuracies of the model that was given.
        gold: Accuracies of a model retrained without the forget set, if one was given.
    """

    algorithm: str
    critical_lr: float
    runs: tuple[VerifiedRun, ...]
    before: Accuracies
    gold: Accuracies | None
    _report: Report = field(compare=False, repr=False)

    @property
    def hit_rate(self) -> float | None:
        """Share of right predictions among the runs that have one; None if no run has."""
        hits = [r.hit for r in self.runs if r.hit is not None]
        return sum(hits) / len(hits) if hits else None

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The runs as marks for a frontier plot."""
        return tuple(Outcome(lr=r.lr, mix=r.mix, diverged=r.diverged) for r in self.runs)

    def table(self) -> Table:
        """Prediction against outcome, run by run.

        Returns:
            The table.
        """
        rows = [
            (
                r.place,
                f"{r.lr:.3g}",
                f"{r.mix:.3g}",
                {None: "edge", True: "diverges", False: "stable"}[r.predicted],
                f"diverged at {r.divergence_step}" if r.diverged else f"stable ({r.stop_reason})",
                {None: "", True: "hit", False: "miss"}[r.hit],
                _short(r.retain_loss),
                _short(r.forget_loss),
                *_percent(r.accuracies),
            )
            for r in self.runs
        ]
        rows.append(("before", "", "", "", "", "", "", "", *_percent(self.before)))
        if self.gold is not None:
            rows.append(("retrained", "", "", "", "", "", "", "", *_percent(self.gold)))
        counted = [r for r in self.runs if r.hit is not None]
        return Table(
            title=f"Verification of {self.algorithm}, critical step size {self.critical_lr:.3g}",
            columns=("run", "lr", "mix", "predicted", "outcome", "", "retain loss", "forget loss", "RA", "FA", "TA"),
            rows=tuple(rows),
            footer=f"{sum(bool(r.hit) for r in counted)} of {len(counted)} predictions right",
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        from stabkit.render import table_html

        return table_html(self.table())

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Real retain losses of the runs, over the predicted band of the report's own setting.

        Args:
            ax: Axes to draw in; new ones when None.

        Returns:
            Figure and axes.
        """
        from stabkit.plots import plot_trajectories  # plots are loaded only when drawn

        runs = [(f"{r.place}, lr {r.lr:.3g}", r.steps, r.trajectory) for r in self.runs]
        return plot_trajectories(self._report, runs, ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """Plain values.

        Returns:
            The verification with its hit rate.
        """
        return {**to_plain(self), "hit_rate": self.hit_rate}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Strict JSON.

        Args:
            path: File to write as well, atomically.

        Returns:
            The text.
        """
        text = dumps(self.to_dict())
        if path is not None:
            write_atomically(path, text)
        return text


def verify(
    report: Report,
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    test: Data | None = None,
    gold: nn.Module | None = None,
    algorithm: Algorithm | None = None,
    loss: str | PerSampleLoss | Loss | None = None,
    factor: float = 3.0,
    repeats: int = 1,
    seed: int = FIRST_RUN_SEED,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Verification:
    """Run the algorithm for real at the asked step and at, below and above the predicted critical one.

    Args:
        report: The prediction.
        model: The model it is about; never altered.
        forget: Its forget set.
        retain: Its retain set.
        test: Held-out data, for TA.
        gold: A model retrained without the forget set, for comparison.
        algorithm: The algorithm object, where the report's is not one of the library's own.
        loss: The per-sample loss, where the report's is a callable.
        factor: How far below and above the critical step size to go.
        repeats: Runs with different batches at each step size.
        seed: Seed of the first run's batches.
        device: Where to compute; where the model is when None.
        dtype: Floating dtype; the report's when None.
        progress: Whether to show progress bars.

    Returns:
        The table of predictions and outcomes. Cost: up to 4·repeats runs.

    Raises:
        TypeError: If the report is none.
        ValueError: If model or data are not those of the report, the test set is not held out, or the algorithm or the loss
            is needed and missing.
    """
    if not isinstance(report, Report):
        raise TypeError(f"`report` of `verify` must be what `predict` gave; got {type(report).__name__}.")
    check_real(factor, name="factor", owner="verify", low=1, low_open=True)
    check_int(repeats, name="repeats", owner="verify", low=1)
    check_seed(seed, owner="verify")
    chosen = _algorithm(report, algorithm)
    problem = UnlearningProblem(
        model,
        forget,
        retain,
        loss=_loss(report, loss),
        test=test,
        batchnorm=report.run.batchnorm,
        check_every=report.run.check_every,
        device=device,
        dtype=getattr(torch, report.run.dtype) if dtype is None else dtype,
    )
    _check_same(report, problem)
    if problem.test is not None:
        check_held_out(problem.test, problem, owner="verify")
    places: list[tuple[str, float, bool | None]] = [
        ("asked", report.run.lr, {"stable": False, "diverges": True}.get(report.verdict))
    ]
    if math.isfinite(report.critical_lr) and report.critical_lr_detail.bracketed:
        places += [
            ("below", report.critical_lr / factor, False),
            ("at", report.critical_lr, None),
            ("above", report.critical_lr * factor, True),
        ]
    jobs = [(place, seed + i) for place in places for i in range(repeats)]
    with preserved_rng():
        preconditioner = chosen.step_preconditioner(problem)
        runs = tuple(
            _verified(problem, chosen.replace(lr=lr), preconditioner, name, run_seed, predicted)
            for (name, lr, predicted), run_seed in progress_bar(jobs, "verify", progress)
        )
        return Verification(
            algorithm=chosen.name,
            critical_lr=report.critical_lr,
            runs=runs,
            before=accuracies(problem, model),
            gold=None if gold is None else accuracies(problem, gold),
            _report=report,
        )


def _verified(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    preconditioner: Any,
    place: str,
    seed: int,
    predicted: bool | None,
) -> VerifiedRun:
    result = run(problem, algorithm, preconditioner=preconditioner, seed=seed)
    last = result.trajectory[-1]
    return VerifiedRun(
        place=place,
        lr=algorithm.lr,
        mix=algorithm.mix,
        seed=seed,
        predicted=predicted,
        diverged=result.diverged,
        divergence_step=result.divergence_step,
        stop_reason=result.stop_reason,
        retain_loss=last.retain_loss if math.isfinite(last.retain_loss) else None,
        forget_loss=last.forget_loss if math.isfinite(last.forget_loss) else None,
        accuracies=accuracies(problem, result.model),
        steps=tuple(c.step for c in result.trajectory),
        trajectory=tuple(c.retain_loss if math.isfinite(c.retain_loss) else math.inf for c in result.trajectory),
    )


def _algorithm(report: Report, algorithm: Algorithm | None) -> Algorithm:
    if algorithm is not None:
        if not isinstance(algorithm, Algorithm) or algorithm.name != report.run.algorithm:
            got = repr(algorithm.name) if isinstance(algorithm, Algorithm) else repr(algorithm)
            raise ValueError(
                f"`algorithm` of `verify` must be the object that was predicted, a {report.run.algorithm!r}; got {got}. "
                "Leave it out for the library's own algorithms."
            )
        return algorithm.replace(**report.run.settings)
    if report.run.own or report.run.algorithm not in ALGORITHMS:
        raise ValueError(
            f"`algorithm` of `verify` must be given, as the report's {report.run.algorithm!r} is of a class that is not "
            "one of the library's; got None. Pass the object that was predicted."
        )
    return ALGORITHMS[report.run.algorithm]().replace(**report.run.settings)


def _loss(report: Report, loss: str | PerSampleLoss | Loss | None) -> str | PerSampleLoss | Loss:
    if loss is not None:
        return loss
    if report.run.loss not in NAMED:
        raise ValueError(
            f"`loss` of `verify` must be given, as the report's {report.run.loss!r} is a callable; got None. Pass the "
            "callable that was predicted with."
        )
    return check_choice(report.run.loss, name="loss", owner="verify", choices=NAMED)


def _check_same(report: Report, problem: UnlearningProblem) -> None:
    for name, expected, got in (
        ("model", report.run.parameters, problem.size),
        ("retain", report.run.retain_size, problem.retain.size),
        ("forget", report.run.forget_size, problem.forget.size),
    ):
        if expected != got:
            what = "trainable parameters" if name == "model" else "samples"
            raise ValueError(
                f"`{name}` of `verify` must be the one of the report, with {expected} {what}; got {got}. Predict again "
                "for other data or another model."
            )
    for name, before, now in (
        ("retain", report.run.retain_loss, problem.retain_loss),
        ("forget", report.run.forget_loss, problem.forget_loss),
    ):
        if not math.isclose(before, now, rel_tol=SAME_LOSS, abs_tol=SAME_LOSS * report.run.divergence_level):
            raise ValueError(
                f"`model` and `{name}` of `verify` must be those of the report, whose {name} loss is {before:.6g}; got "
                f"{now:.6g}. Predict again for other data or another model."
            )


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _percent(found: Accuracies) -> Sequence[str]:
    return ["–" if value is None else f"{value:.1%}" for value in (found.retain, found.forget, found.test)]
