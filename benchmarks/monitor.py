"""How far ahead the run-time guard warns, how often for nothing, and what stopping or shrinking the step then saves.

    python benchmarks/monitor.py

writes benchmarks/results/monitor.json, in about six minutes on one core (`--quick`: half a minute). Every run is a plain
PyTorch loop over the digits, with batch losses as any loop has them, at step sizes around the predicted boundary and several
mixes. A run diverges where its loss on a fixed sample of the retain set reaches the level; the guard never sees that sample.
A warning leads by the number of steps that were still to be taken when it came. The constants of `stabkit.monitor` were
chosen on the calibration cells (multilayer perceptrons); the evaluation cells (convolutional networks) had no part in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stabkit
from stabkit.algorithms import GradDiff
from stabkit.bench.cells import Cell, prepared
from stabkit.boundary import critical_lr
from stabkit.judge import judge
from stabkit.measure import measure
from stabkit.modes import MODES, Sizes
from stabkit.monitor import Monitor
from stabkit.problem import UnlearningProblem
from stabkit.report import Report
from stabkit.rollout import rollout

STEPS = 100
MIXES = (0.1, 0.3, 0.6)
FACTORS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.4, 2.0, 4.0)  # of the predicted critical step size
ROLLOUT_SEEDS = (0, 1, 2)
RUN_SEED = 777  # of the real runs' batches; the rollouts draw others
WATCHED = 256  # retain samples that decide whether a run has diverged
LEADS = (1, 3, 5, 10)
FAST = 5  # runs that cross by this step overshoot; nothing but the first few updates can tell


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cell with its batch size."""

    cell: Cell
    batch: int = 64

    @property
    def name(self) -> str:
        """Name of the cell and the batch size."""
        return f"{self.cell.key}-b{self.batch}"


def cases(model: str, role: str, others: Iterable[tuple[str, int, float]]) -> list[Case]:
    """A network's cases: deletion, batch size and momentum."""
    return [
        Case(
            cell=Cell(
                dataset="digits",
                model=model,
                deletion=deletion,
                algorithm="graddiff",
                momentum=momentum,
                steps=STEPS,
                role=role,
            ),
            batch=batch,
        )
        for deletion, batch, momentum in others
    ]


CASES = [
    *cases("mlp", "calibration", [("random10", 64, 0.0), ("class", 64, 0.0), ("random10", 8, 0.0), ("class", 64, 0.9)]),
    *cases("tanh-mlp", "calibration", [("random10", 64, 0.0), ("class", 64, 0.0)]),
    *cases(
        "cnn",
        "evaluation",
        [
            ("random10", 64, 0.0),
            ("class", 64, 0.0),
            ("mislabelled", 64, 0.0),
            ("random10", 16, 0.0),
            ("class", 64, 0.9),
        ],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a loop saw before each of its steps, and the losses that decide about it.

    Attributes:
        seen: Retain batch loss, forget batch loss and gradient norm, shape (T, 3).
        retain: Loss on the watched retain samples before each step and after the last, length T + 1, or T if it was stopped.
        crossing: Step after which it was at the level; None if it never was.
        lr_factor: What the guard had made of the step size at the end.
    """

    seen: np.ndarray
    retain: np.ndarray
    crossing: int | None
    lr_factor: float


Pair = tuple[Tensor, Tensor]


def batches(data: Pair, size: int, seed: int) -> Iterator[Pair]:
    """Endless shuffled batches."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(data[0]))
    while True:
        order = torch.randperm(len(data[0]), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield data[0][rows], data[1][rows]


def unlearn(
    model: nn.Module,
    forget: Pair,
    retain: Pair,
    *,
    lr: float,
    mix: float,
    batch: int,
    momentum: float,
    seed: int,
    level: float,
    guard: Monitor | None = None,
) -> Trace:
    """The loop, as one would write it; it ends at the level."""
    net = copy.deepcopy(model)
    parameters = list(net.parameters())
    optimiser = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    retain_batches, forget_batches = batches(retain, batch, 2 * seed), batches(forget, batch, 2 * seed + 1)
    rows = torch.randperm(len(retain[0]), generator=torch.Generator().manual_seed(seed))[:WATCHED]
    watched = retain[0][rows], retain[1][rows]

    def watch() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(net(watched[0]), watched[1]))

    seen, losses, crossing, factor = [], [watch()], None, 1.0
    for step in range(STEPS):
        (x, y), (u, v) = next(retain_batches), next(forget_batches)
        retain_loss, forget_loss = F.cross_entropy(net(x), y), F.cross_entropy(net(u), v)
        optimiser.zero_grad()
        ((1 - mix) * retain_loss - mix * forget_loss).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        seen.append((retain_loss.item(), forget_loss.item(), norm.item()))
        if guard is not None:
            alert = guard.update(retain_loss, forget_loss, norm)
            if alert.stop:
                break
            factor = alert.lr_factor
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
        optimiser.step()
        losses.append(watch())
        if not losses[-1] < level:
            crossing = step + 1
            break
    return Trace(seen=np.array(seen), retain=np.array(losses), crossing=crossing, lr_factor=factor)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One step size and mix of a case, its report and its run."""

    case: Case
    seed: int
    lr: float
    mix: float
    report: Report
    trace: Trace
    again: Callable[[Monitor | None], Trace]

    @property
    def diverged(self) -> bool:
        """Whether the unguarded run reached the level."""
        return self.trace.crossing is not None


def settings_of(case: Case, seed: int, mixes: tuple[float, ...], factors: tuple[float, ...]) -> list[Setting]:
    """Train, predict and run all settings of a case."""
    trained, deletion = prepared(case.cell, seed)
    x, y = trained.split.x_train, trained.split.y_train
    forget, retain = ((x[rows], y[rows]) for rows in (deletion.forget, deletion.retain))
    problem = UnlearningProblem(trained.model, forget, retain)
    algorithm = GradDiff(lr=0.01, mix=mixes[0], steps=STEPS, batch_size=case.batch, momentum=case.cell.momentum)
    sizes = algorithm.batch_sizes(problem)
    measurement = measure(
        problem,
        algorithm,
        Sizes().settings(MODES["standard"], curvature="hessian", seed=seed),
    )
    base = judge(measurement, ROLLOUT_SEEDS)
    network = measurement.network
    found = []
    for mix in mixes:
        edge = critical_lr(network, algorithm.replace(mix=mix), batch_sizes=sizes, seeds=ROLLOUT_SEEDS, guess=0.1).value
        lrs = [edge * factor for factor in factors]
        rolled = rollout(network, algorithm, lr=lrs, mix=[mix] * len(lrs), batch_sizes=sizes, seeds=ROLLOUT_SEEDS)
        middle = {name: getattr(rolled, name).median(0).values for name in ("retain_loss", "forget_loss")}
        for i, lr in enumerate(lrs):
            curves = {name: tuple(curve[i].tolist()) for name, curve in middle.items()}
            report = replace(
                base,
                probability=float(rolled.probability[i]),
                divergence_step=rolled.expected_divergence_step()[i],
                run=replace(base.run, settings=algorithm.replace(lr=lr, mix=mix).settings()),
                rollout=replace(base.rollout, steps=tuple(rolled.steps.tolist()), **curves),
            )

            def again(guard: Monitor | None = None, lr: float = lr, mix: float = mix) -> Trace:
                return unlearn(
                    trained.model,
                    forget,
                    retain,
                    lr=lr,
                    mix=mix,
                    batch=case.batch,
                    momentum=case.cell.momentum,
                    seed=RUN_SEED + seed,
                    level=base.run.divergence_level,
                    guard=guard,
                )

            found.append(Setting(case=case, seed=seed, lr=lr, mix=mix, report=report, trace=again(), again=again))
    return found


# ---------------------------------------------------------------------- guards

FEEDS = ("retain_loss", "forget_loss", "gradient_norm")
Guard = Callable[[Setting], tuple[int | None, float]]  # first update with an alarm, from 0, and the crossing it expects


def watched_by(make: Callable[[Setting], Monitor], feeds: Sequence[str] = FEEDS) -> Guard:
    """A guard, played the recorded run."""

    def guard(setting: Setting) -> tuple[int | None, float]:
        monitor = make(setting)
        for step, row in enumerate(setting.trace.seen):
            values = dict(zip(FEEDS, row.tolist(), strict=True))
            alert = monitor.update(**{name: values[name] for name in feeds})
            if alert.state != "calm":
                return step, alert.crossing - 1  # updates are counted from 1, and the first sees step 0
        return None, math.inf

    return guard


def with_level(warn_ahead: int = 10, action: str = "warn") -> Callable[[Setting], Monitor]:
    """A guard that knows the level alone."""
    return lambda s: Monitor(level=s.report.run.divergence_level, warn_ahead=warn_ahead, action=action)


def with_report(warn_ahead: int = 10, action: str = "warn") -> Callable[[Setting], Monitor]:
    """A guard that knows the prediction."""
    return lambda s: Monitor(s.report, warn_ahead=warn_ahead, action=action)


def line(setting: Setting, window: int = 8, ahead: int = 10) -> tuple[int | None, float]:
    """The obvious rule: a least-squares line through the last logarithms of the retain loss, rising by 3 standard errors."""
    losses: deque[float] = deque(maxlen=window)
    x = np.arange(window) - (window - 1) / 2
    for step, row in enumerate(setting.trace.seen):
        losses.append(math.log(max(row[0], 1e-12)))
        if len(losses) < window:
            continue
        y = np.array(losses)
        slope = float(x @ y / (x @ x))
        residual = y - y.mean() - slope * x
        error = math.sqrt(float(residual @ residual) / (window - 2) / float(x @ x))
        to_go = math.log(setting.report.run.divergence_level) - float(y.mean() + slope * x[-1])
        if slope > 3 * error and to_go <= ahead * slope:
            return step, step + max(0.0, to_go / slope)
    return None, math.inf


def clock(setting: Setting, ahead: int = 10) -> tuple[int | None, float]:
    """The prediction alone: its divergence step, less the warning time, whatever the losses do."""
    predicted = setting.report.divergence_step
    if predicted is None:
        return None, math.inf
    step = max(0, math.ceil(predicted - ahead))
    return (step, float(predicted)) if step < len(setting.trace.seen) else (None, math.inf)


GUARDS: dict[str, Guard] = {
    "level": watched_by(with_level()),
    "report": watched_by(with_report()),
    "level, warn_ahead=4": watched_by(with_level(4)),
    "level, warn_ahead=16": watched_by(with_level(16)),
    "report, warn_ahead=4": watched_by(with_report(4)),
    "report, warn_ahead=16": watched_by(with_report(16)),
    "level, retain loss only": watched_by(with_level(), FEEDS[:1]),
    "level, no gradient norm": watched_by(with_level(), FEEDS[:2]),
    "report, retain loss only": watched_by(with_report(), FEEDS[:1]),
    "report, no gradient norm": watched_by(with_report(), FEEDS[:2]),
    "line through the log retain loss": line,
    "predicted step alone": clock,
}
ACTING = {"level": with_level, "report": with_report}


def share(hits: Iterable[bool]) -> float | None:
    """Mean of booleans; None of none."""
    found = list(hits)
    return round(sum(found) / len(found), 4) if found else None


def warnings_of(settings: Sequence[Setting], guard: Guard) -> dict[str, Any]:
    """How far ahead, and how often for nothing."""
    leads: list[int] = []
    ratios: list[float] = []
    slow: list[bool] = []
    false = 0
    for setting in settings:
        step, expected = guard(setting)
        crossing = setting.trace.crossing
        if crossing is None:
            false += step is not None
            continue
        lead = 0 if step is None else max(0, crossing - step)
        leads.append(lead)
        slow.append(crossing > FAST)
        if step is not None and lead > 0:
            ratios.append((expected - step) / lead)
    stable = len(settings) - len(leads)
    late = [lead for lead, is_slow in zip(leads, slow, strict=True) if is_slow]
    early = [lead for lead, is_slow in zip(leads, slow, strict=True) if not is_slow]
    return {
        "diverging": len(leads),
        "stable": stable,
        "false_alarms": round(false / stable, 4) if stable else None,
        "median_lead": float(np.median(leads)) if leads else None,
        "warned_ahead": {str(k): share(lead >= k for lead in leads) for k in LEADS},
        "slow": {
            "diverging": len(late),
            "median_lead": float(np.median(late)) if late else None,
            "warned_ahead": {str(k): share(lead >= k for lead in late) for k in LEADS},
        },
        "fast": {"diverging": len(early), "warned_ahead": {"1": share(lead >= 1 for lead in early)}},
        "expected_over_actual": float(np.round(np.median(ratios), 3)) if ratios else None,
    }


def actions_of(settings: Sequence[Setting], make: Callable[..., Callable[[Setting], Monitor]]) -> dict[str, Any]:
    """What stopping saves, and what shrinking does, on the runs that diverge without a guard."""
    stopped, rescued, ended, heights, forgotten, factors = [], [], [], [], [], []
    for setting in settings:
        if not setting.diverged:
            continue
        level = setting.report.run.divergence_level
        trace = setting.again(make(action="stop")(setting))
        stopped.append(trace.crossing is None)
        if trace.crossing is None:
            heights.append(float(trace.retain[-1]) / level)
        trace = setting.again(make(action="shrink")(setting))
        whole = trace.crossing is None and len(trace.retain) == STEPS + 1
        rescued.append(whole)
        ended.append(trace.crossing is None and not whole)
        if whole:
            forgotten.append(float(np.mean(trace.seen[-5:, 1]) / setting.report.run.forget_loss))
            factors.append(trace.lr_factor)
    return {
        "stopped_below_the_level": share(stopped),
        "median_retain_loss_when_stopped_over_level": float(np.round(np.median(heights), 3)) if heights else None,
        "shrink_rescues": share(rescued),
        "shrink_ends_below_the_level": share(ended),
        "median_forget_loss_of_rescued_over_start": float(np.round(np.median(forgotten), 2)) if forgotten else None,
        "median_lr_factor_of_rescued": float(np.median(factors)) if factors else None,
    }


def row_of(setting: Setting) -> dict[str, Any]:
    """One run, with what the two guards said of it."""
    alarms = {name: GUARDS[name](setting)[0] for name in ACTING}
    return {
        "case": setting.case.name,
        "role": setting.case.cell.role,
        "seed": setting.seed,
        "lr": setting.lr,
        "mix": setting.mix,
        "probability": setting.report.probability,
        "predicted_step": setting.report.divergence_step,
        "crossing": setting.trace.crossing,
        "worst_retain_loss_over_level": round(
            float(setting.trace.retain.max()) / setting.report.run.divergence_level, 4
        ),
        "alarm": alarms,
    }


def main() -> None:
    """Run all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case of each role, few settings")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "monitor.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", stabkit.StabkitWarning)
    start = time.process_time()
    chosen = [CASES[0], CASES[7]] if options.quick else CASES
    mixes, factors = (MIXES[1:2], FACTORS[1::3]) if options.quick else (MIXES, FACTORS)
    settings: list[Setting] = []
    for case in chosen:
        settings += settings_of(case, 0, mixes, factors)
        print(
            f"{case.name}: {sum(s.diverged for s in settings if s.case == case)} of {len(mixes) * len(factors)} diverge"
        )
    roles = {role: [s for s in settings if s.case.cell.role == role] for role in ("calibration", "evaluation")}
    result = {
        "guards": {
            role: {name: warnings_of(runs, guard) for name, guard in GUARDS.items()} for role, runs in roles.items()
        },
        "actions": {
            role: {name: actions_of(runs, make) for name, make in ACTING.items()} for role, runs in roles.items()
        },
        "cases": {
            case.name: {name: warnings_of([s for s in settings if s.case == case], GUARDS[name]) for name in ACTING}
            for case in chosen
        },
        "runs": [row_of(s) for s in settings],
        "steps": STEPS,
        "mixes": mixes,
        "factors": factors,
        "watched_samples": WATCHED,
        "seeds": {"data, training, deletion": 0, "rollouts": ROLLOUT_SEEDS, "runs": RUN_SEED},
        "versions": {
            "stabkit": stabkit.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "cpu_seconds": round(time.process_time() - start),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for role, found in result["guards"].items():
        for name, row in found.items():
            print(role, name, {key: value for key, value in row.items() if key != "fast"})
        print(role, result["actions"][role])


if __name__ == "__main__":
    main()
