"""The main job on bundled real data: train, predict, explain, run, compare, report."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from stabkit._errors import StabkitWarning
from stabkit._progress import progress_bar
from stabkit._serialise import dumps, to_plain, write_atomically
from stabkit._table import Table
from stabkit._validate import check_seed
from stabkit.algorithms import ALGORITHMS, Algorithm
from stabkit.datasets import Deletion, TensorSplit, digits
from stabkit.deletion import one_class, random_fraction
from stabkit.frontier import Outcome
from stabkit.metrics import accuracies
from stabkit.models import SmallCNN
from stabkit.preconditioner import Preconditioner
from stabkit.predict import predict
from stabkit.problem import UnlearningProblem
from stabkit.report import Report
from stabkit.runner import run
from stabkit.training import train

STEPS = 150
MIX = 0.3
ASIDE = 4.0  # the safe step is this far below the predicted critical one, the unsafe one as far above
MAP_MIXES = (0.1, 0.3, 0.5, 0.7, 0.9)
MAP_FACTORS = (0.1, 0.5, 2.0, 10.0)
MAP_STEPS = 25
FORGOTTEN_CLASS = 3
RUN_SEED = 20_000


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """One prediction and its real run.

    Attributes:
        deletion: What was forgotten.
        algorithm: Name of the algorithm.
        lr: Step size.
        mix: Mix.
        verdict: Predicted.
        probability: Predicted P(diverge).
        predicted_step: Predicted divergence step.
        critical_lr: Predicted critical step size.
        diverged: What the real run did.
        divergence_step: When.
        retain: RA after the run.
        forget: FA after the run.
        test: TA after the run.
    """

    deletion: str
    algorithm: str
    lr: float
    mix: float
    verdict: str
    probability: float
    predicted_step: float | None
    critical_lr: float
    diverged: bool
    divergence_step: int | None
    retain: float | None
    forget: float | None
    test: float | None

    @property
    def hit(self) -> bool:
        """Whether P(diverge) was on the right side of one half."""
        return (self.probability >= 0.5) == self.diverged


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything the demo measured.

    Attributes:
        runs: Predictions with their real runs.
        marks: Further real runs on the drawn frontier.
        test_accuracy: Of the trained model.
        notes: Warnings met on the way, each once.
        seconds: How long it all took.
        report_path: Where the HTML report lies.
    """

    runs: tuple[DemoRun, ...]
    marks: tuple[Outcome, ...]
    test_accuracy: float
    notes: tuple[str, ...]
    seconds: float
    report_path: str

    def predictions(self) -> Table:
        """What was predicted.

        Returns:
            The table.
        """
        return Table(
            title=f"Predictions, before any run ({STEPS} steps, model at {self.test_accuracy:.1%} test accuracy)",
            columns=("forget", "algorithm", "lr", "mix", "verdict", "P(diverge)", "at step", "critical lr"),
            rows=tuple(
                (
                    r.deletion,
                    r.algorithm,
                    f"{r.lr:.3g}",
                    f"{r.mix:.2g}",
                    r.verdict,
                    f"{r.probability:.2f}",
                    "–" if r.predicted_step is None else f"{r.predicted_step:.0f}",
                    f"{r.critical_lr:.3g}",
                )
                for r in self.runs
            ),
            footer="\n".join(self.notes),
        )

    def outcomes(self) -> Table:
        """What happened, beside what was predicted.

        Returns:
            The table, the hit rate below.
        """

        def percent(value: float | None) -> str:
            return "–" if value is None else f"{value:.1%}"

        hits = sum(r.hit for r in self.runs)
        return Table(
            title="Outcomes of the real runs",
            columns=("forget", "algorithm", "lr", "verdict", "outcome", "", "RA", "FA", "TA"),
            rows=tuple(
                (
                    r.deletion,
                    r.algorithm,
                    f"{r.lr:.3g}",
                    r.verdict,
                    f"diverged at {r.divergence_step}" if r.diverged else "stable",
                    "hit" if r.hit else "miss",
                    percent(r.retain),
                    percent(r.forget),
                    percent(r.test),
                )
                for r in self.runs
            ),
            footer=f"{hits} of {len(self.runs)} predictions right; hit rate {hits / len(self.runs):.2f}",
        )

    def to_json(self) -> str:
        """Strict JSON.

        Returns:
            The text.
        """
        return dumps(to_plain(self))


def run_demo(output: str | os.PathLike[str], *, seed: int = 0, progress: bool = False) -> DemoResult:
    """Train a CNN on digits, predict three algorithms on two deletions at two step sizes, then run them all.

    Args:
        output: Folder for `report.html` and `demo.json`.
        seed: Seed of everything random.
        progress: Whether to show progress bars.

    Returns:
        What was measured. Cost: one training, six measurements, some thirty runs; about a minute and a half on one core.

    Raises:
        OSError: If the folder cannot be made.
    """
    check_seed(seed, owner="run_demo")
    Path(output).mkdir(parents=True, exist_ok=True)  # rather here than after all the work
    start = time.perf_counter()
    data = digits(seed=seed)
    model = train(
        SmallCNN(1, 8, 10, seed=seed), data.x_train, data.y_train, epochs=30, lr=3e-3, seed=seed, progress=progress
    )
    deletions = (
        random_fraction(data.y_train, 0.1, seed=seed),
        one_class(data.y_train, FORGOTTEN_CLASS),
    )
    cases = [(deletion, name) for deletion in deletions for name in ("graddiff", "agu", "sragu")]
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StabkitWarning)
        # Every prediction is made before the first run.
        reports = [
            pair
            for deletion, name in progress_bar(cases, "predict", progress)
            for pair in _safe_and_unsafe(model, data, deletion, name, seed)
        ]
        for warning in caught:
            if str(warning.message) not in notes:
                notes.append(str(warning.message))
        runs = tuple(
            _real_run(model, data, deletion, report, seed)
            for deletion, report in progress_bar(reports, "run", progress)
        )
        deletion, report = reports[1]  # random deletion by GradDiff at its unsafe step
        marks = _marks(model, data, deletion, report, progress=progress)
    problem = _problem(model, data, deletions[0])
    test_accuracy = accuracies(problem, model).test or 0.0
    path = Path(output) / "report.html"
    result = DemoResult(
        runs=runs,
        marks=marks,
        test_accuracy=test_accuracy,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
        report_path=str(path),
    )
    marked = [mark.lr for mark in marks]
    drawn = report.frontier(lr=np.geomspace(min(marked) / 1.3, max(marked) * 1.3, MAP_STEPS).tolist())
    report.save_html(
        path,
        frontier=drawn,
        outcomes=marks,
        tables=[result.predictions(), result.outcomes(), report.recommend().table()],
    )
    write_atomically(Path(output) / "demo.json", result.to_json())
    return result


def _problem(model: nn.Module, data: TensorSplit, deletion: Deletion) -> UnlearningProblem:
    forget, retain = _sets(data, deletion)
    return UnlearningProblem(model, forget, retain, test=(data.x_test, data.y_test))


def _sets(data: TensorSplit, deletion: Deletion) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (
        (data.x_train[deletion.forget], data.y_train[deletion.forget]),
        (data.x_train[deletion.retain], data.y_train[deletion.retain]),
    )


def _safe_and_unsafe(
    model: nn.Module, data: TensorSplit, deletion: Deletion, name: str, seed: int
) -> list[tuple[Deletion, Report]]:
    """Reports well below and well above the predicted critical step size."""
    forget, retain = _sets(data, deletion)
    first = predict(model, forget, retain, algorithm=name, mix=MIX, steps=STEPS, seed=seed)
    return [(deletion, first.at(lr=first.critical_lr_detail.value * aside)) for aside in (1 / ASIDE, ASIDE)]


def _real_run(model: nn.Module, data: TensorSplit, deletion: Deletion, report: Report, seed: int) -> DemoRun:
    problem = _problem(model, data, deletion)
    algorithm = _algorithm(report)
    result = run(problem, algorithm, seed=RUN_SEED + seed)
    found = accuracies(problem, result.model)
    return DemoRun(
        deletion=deletion.name,
        algorithm=algorithm.name,
        lr=algorithm.lr,
        mix=algorithm.mix,
        verdict=report.verdict,
        probability=report.probability,
        predicted_step=report.divergence_step,
        critical_lr=report.critical_lr,
        diverged=result.diverged,
        divergence_step=result.divergence_step,
        retain=found.retain,
        forget=found.forget,
        test=found.test,
    )


def _algorithm(report: Report) -> Algorithm:
    return ALGORITHMS[report.run.algorithm]().replace(**report.run.settings)


def _marks(
    model: nn.Module, data: TensorSplit, deletion: Deletion, report: Report, *, progress: bool
) -> tuple[Outcome, ...]:
    """Real runs on both sides of the predicted boundary, for the map."""
    problem, algorithm = _problem(model, data, deletion), _algorithm(report)
    boundary = report.frontier(mix=MAP_MIXES)
    preconditioner: Preconditioner = algorithm.step_preconditioner(problem)
    settings = [
        (float(critical) * factor, mix)
        for mix, critical in zip(MAP_MIXES, boundary.critical_lr, strict=True)
        for factor in MAP_FACTORS
        if critical == critical
    ]
    return tuple(
        Outcome(
            lr=lr,
            mix=mix,
            diverged=run(
                problem, algorithm.replace(lr=lr, mix=mix), preconditioner=preconditioner, seed=RUN_SEED + 1
            ).diverged,
        )
        for lr, mix in progress_bar(settings, "map", progress)
    )
