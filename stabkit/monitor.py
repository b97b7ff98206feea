"""A guard for any training loop: it watches the losses go by and says, some steps ahead, that the run is about to diverge.

guard = stabkit.Monitor(report)                      # or Monitor(level=math.log(10))
lrs = [group["lr"] for group in optimiser.param_groups]
for step in range(steps):
    ...                                              # both batch losses, backward
    alert = guard.update(retain_loss, forget_loss, gradient_norm)
    if alert.stop:
        break
    for group, lr in zip(optimiser.param_groups, lrs):
        group["lr"] = lr * alert.lr_factor
    optimiser.step()

In `stabkit.run` it is a hook: run(..., on_step=stabkit.Monitor(report, action="stop").on_step).
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
from torch import Tensor

from stabkit._errors import StabkitWarning, caller_level
from stabkit._validate import check_choice, check_int, check_real
from stabkit.report import Report
from stabkit.steps import StepRecord

ACTIONS = ("shrink", "stop", "warn")
CALM, RISING, DIVERGED = "calm", "rising", "diverged"
# These four were chosen on the calibration runs of benchmarks/monitor.py, the next by hand.
SHORTEST_SPAN = 2  # of the losses' spans, which double from here
WARN_AHEAD = 10
SHRINK = 0.25
GRADIENT_POWER = 2.0  # what a gradient does once, the loss does squared
FAINT = 1e-3  # of a gradient norm: earlier ones below that are of steps that stood still, as SCRUB's first; own choice
SMALLEST = 0.01  # of the level: smaller losses count as this, that a factor between two of them is no rise
TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class Alert:
    """What the guard makes of the run so far.

    Attributes:
        step: Number of updates so far.
        state: "calm", "rising" (an alarm: the level is about to be reached) or "diverged" (it is reached, or a loss is not a
            finite number).
        crossing: Update at which the level will be reached, as far as anything says so; infinite otherwise. Growth slows
            down on the way, so it is early more often than late.
        unpredicted: Whether losses rise although the report had predicted that the run would stay below the level.
        lr_factor: What to multiply the original step size with; below 1 once a "shrink" guard has raised an alarm.
        stop: Whether to end the run, before its next step.
        message: The above in words.
    """

    step: int
    state: str
    crossing: float
    unpredicted: bool
    lr_factor: float
    stop: bool
    message: str


class Monitor:
    """Raises the alarm when the retain loss is about to reach the level of divergence.

    Divergence is what `predict` means by it: the retain loss reaches that of the best constant predictor, or a loss is not
    finite. By then it is too late, and the retain loss often stays at its floor until a few steps before, while the
    forget loss already grows with the diverging mode. Two rules look ahead, and either raises the alarm; only the second
    looks far (benchmarks/monitor.py).

    *Rise*: the mean of a loss over its last w values stands a factor q > 1 above the largest mean over w earlier ones, and
    q times the mean of the last w retain losses reaches the level: what has just happened need only happen once more. It is
    asked of both losses for w = 2, 4, 8, ... while 2w <= `warn_ahead`, and of the squared gradient norm for w = 1, which
    alone is quick enough for runs that overshoot within a few steps; not of a norm a thousand times all earlier ones, as
    after steps that stood still. Losses below 1 % of the level count as that. It cannot foresee a crossing in the very
    first step, batches of few samples raise many false alarms, and retain losses of some steps ago say nothing of now: a
    loop with retain steps in some of its iterations does well to look at a retain batch in the others too.

    *Course*, with a report that predicts a crossing at step c: each loss is looked up on the running maximum of its
    rolled-out curve (T14), log-linear between the checks. The run has come as far as the later of the two steps found, s,
    and has c - s steps to go; the alarm is raised at `warn_ahead` or fewer. After the step size was shrunk the prediction is
    of another run, and the rule rests.

    A loop of one's own asks before each step. The factor is that of the planned step size, not of the last one; and most of
    PyTorch's schedulers (StepLR, CosineAnnealingLR, ...) make the next step size from the one they find, so that it is put
    back before they go on:

        monitor = stabkit.Monitor(report, action="shrink")
        planned = [group["lr"] for group in optimizer.param_groups]
        for step in range(steps):
            ...  # losses of this step's batches, and their gradients
            alert = monitor.update(retain_loss, forget_loss, gradient_norm)
            if alert.stop:
                break
            for group, lr in zip(optimizer.param_groups, planned):
                group["lr"] = lr * alert.lr_factor
            optimizer.step()
            for group, lr in zip(optimizer.param_groups, planned):
                group["lr"] = lr
            scheduler.step()
            planned = [group["lr"] for group in optimizer.param_groups]

    Without a scheduler the last four lines are not needed.

    *Mixed precision.* torch.amp.GradScaler begins with a scale at which gradients overflow, and skips such steps: a gradient
    norm that is not finite beside finite losses is no divergence. It is left out of the rules, and said once, as a Python
    warning. The norm is taken of gradients without the scale, the losses before they are scaled:

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        alert = monitor.update(retain_loss, forget_loss, norm)
        ...  # stop, or change the step size, as above
        scaler.step(optimizer)
        scaler.update()

    A loop without a scaler has to skip such a step itself, or its weights are lost.

    Attributes:
        level: Retain loss that counts as diverged.
        step: Number of updates so far.
        alert: The last one that `on_step` had; None before.
    """

    def __init__(
        self,
        report: Report | None = None,
        *,
        level: float | None = None,
        warn_ahead: int = WARN_AHEAD,
        action: str = "warn",
        shrink: float = SHRINK,
    ) -> None:
        """Set the guard up, one for each run: it remembers the losses it has seen, and what it made of the step size.

        Args:
            report: A prediction for this very run.
            level: Retain loss that counts as diverged, in place of a report; ln C for C balanced classes.
            warn_ahead: How many steps ahead of a crossing to look, >= 4; more steps, more warnings and more false ones.
            action: What an alarm does: "warn" says so once, as a Python warning, "shrink" multiplies the step size, "stop"
                ends the run. At the level "shrink" stops as well, "warn" never does.
            shrink: Factor of "shrink", in (0, 1); applied at most once in two updates.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of its domain, or both or neither of report and level are given.
        """
        if (report is None) == (level is None):
            raise ValueError(
                "Either `report` or `level` of `Monitor` must be given; got "
                f"{'neither' if report is None else 'both'}. ln C is the level of C balanced classes."
            )
        if report is not None and not isinstance(report, Report):
            raise TypeError(
                f"`report` of `Monitor` must be a Report; got {report!r:.60}. A number is given as Monitor(level=...)."
            )
        self.level = check_real(report.run.divergence_level if report else level, name="level", owner="Monitor")
        self.warn_ahead = check_int(warn_ahead, name="warn_ahead", owner="Monitor", low=2 * SHORTEST_SPAN)
        self.action = check_choice(action, name="action", owner="Monitor", choices=ACTIONS)
        self.shrink = check_real(shrink, name="shrink", owner="Monitor", low=0, high=1, low_open=True, high_open=True)
        self.step = 0
        spans = [SHORTEST_SPAN]
        while 4 * spans[-1] <= self.warn_ahead:
            spans.append(2 * spans[-1])
        self._rises = {
            "retain loss": [_Rise(span) for span in spans],
            "forget loss": [_Rise(span) for span in spans],
            "gradient norm": [_Rise(1, power=GRADIENT_POWER, faint=FAINT)],
        }
        self._retain: deque[float] = deque(maxlen=spans[-1])
        self._floor = min(0.0, report.run.retain_loss) if report else math.nan
        self._start = self._height(report.run.retain_loss) if report else SMALLEST  # until a retain loss is seen
        self._course = _Course(report, self._height) if report else None
        self._predicted_stable = self._course is not None and math.isinf(self._course.crossing)
        self._factor = 1.0
        self._shrunk_at = -math.inf
        self.alert: Alert | None = None
        self._told = self._skips_told = False
        self._watched = 0  # number of the last step that `on_step` had

    def update(
        self,
        retain_loss: SupportsFloat | None = None,
        forget_loss: SupportsFloat | None = None,
        gradient_norm: SupportsFloat | None = None,
    ) -> Alert:
        """Take in what the loop has of one more step, best before it takes that step; any of the three may be missing.

        Args:
            retain_loss: Loss of the retain batch; a tensor of one number will do, as for the others.
            forget_loss: Loss of the forget batch, larger where more is forgotten.
            gradient_norm: Norm of the gradient that the step follows, before it is clipped or normalised; its unit is free.
                One that is not finite counts as divergence only where no loss comes with it.

        Returns:
            What to make of it; with action="warn" the first alarm is a Python warning too. Cost: some dozen operations on
            numbers; a value on an accelerator is waited for.

        Raises:
            TypeError: If a value is not a number.
            ValueError: If none is given.
        """
        alert = self._taken_in(retain_loss, forget_loss, gradient_norm)
        if self.action == "warn":
            self._warn(alert)
        return alert

    def _warn(self, alert: Alert) -> None:
        """Say so once where something is wrong."""
        if alert.state != CALM and not self._told:
            self._told = True
            warnings.warn(f"the run is watched: {alert.message}", StabkitWarning, stacklevel=caller_level())

    def _warn_of_overflow(self, norm: float) -> None:
        """Say once that a gradient is no step to take, though the losses are finite."""
        if not self._skips_told:
            self._skips_told = True
            warnings.warn(
                f"the gradient norm of step {self.step} is {norm} beside finite losses: such a step must be skipped, as "
                "torch.amp.GradScaler does by itself, and counts neither as divergence nor as a rise. This is said once.",
                StabkitWarning,
                stacklevel=caller_level(),
            )

    def _taken_in(
        self,
        retain_loss: SupportsFloat | None,
        forget_loss: SupportsFloat | None,
        gradient_norm: SupportsFloat | None,
    ) -> Alert:
        """What the values say."""
        given = {"retain loss": retain_loss, "forget loss": forget_loss, "gradient norm": gradient_norm}
        values = {name: _number(value, name) for name, value in given.items() if value is not None}
        if not values:
            raise ValueError(
                "`update` of `Monitor` must be given a retain_loss, a forget_loss or a gradient_norm; got none of them."
            )
        self.step += 1
        norm = values.pop("gradient norm", None)
        for name, value in values.items():
            if not math.isfinite(value):
                return self._alert(DIVERGED, float(self.step), f"the {name} is {value}")
        if norm is not None and not math.isfinite(norm):
            if not values:  # nothing says that the weights are still finite
                return self._alert(DIVERGED, float(self.step), f"the gradient norm is {norm}")
            self._warn_of_overflow(norm)
            norm = None
        if math.isnan(self._floor) and values:
            self._floor = min(0.0, *values.values())
        heights = {name: self._height(value) for name, value in values.items()}
        found = [self._risen(name, height) for name, height in heights.items()]
        if norm is not None:
            found.append(self._risen("gradient norm", norm))
        if "retain loss" in values:
            if np.mean(list(self._retain)[-SHORTEST_SPAN:]) >= 1:
                return self._alert(DIVERGED, float(self.step), f"the retain loss has reached {self.level:.3g}")
            if heights["retain loss"] >= 1:
                found.append((0.0, "the retain batch is past the level"))
        expected = math.inf
        if self._course is not None and self._factor == 1:
            expected = self._course.to_go(heights)
            found.append((expected if expected <= self.warn_ahead else math.inf, "the losses are as far as predicted"))
        to_go, why = min(found)
        if math.isinf(to_go):
            return self._alert(CALM, self.step + expected, "nothing rises towards the level")
        if self.action == "shrink" and self.step - self._shrunk_at >= SHORTEST_SPAN:
            self._factor *= self.shrink
            self._shrunk_at = self.step
        return self._alert(RISING, self.step + to_go, why)

    def on_step(self, record: StepRecord) -> None:
        """Watch `run` as its `on_step`. With action="stop" an alarm ends the run, whose reason then is "on_step".

        Args:
            record: What `run` tells of a step.

        Raises:
            StopIteration: If the run is to end.
            ValueError: If the action is "shrink", as the step size of a run is fixed; or the steps begin again, as in a
                second run: what the guard remembers is of the first.
        """
        if self.action == "shrink":
            raise ValueError(
                "`action` of `Monitor` must be 'warn' or 'stop' in `run`, whose step size is fixed; got 'shrink'. Shrink it "
                "in a loop of your own, or lower `lr`."
            )
        if record.step <= self._watched:
            raise ValueError(
                f"`on_step` of `Monitor` must watch one run, whose steps it remembers; got step {record.step} after step "
                f"{self._watched}. Make a new Monitor for each run."
            )
        self._watched = record.step
        self.alert = self.update(record.retain_loss, record.forget_loss, record.gradient_norm)
        self._warn(self.alert)
        if self.alert.stop:
            raise StopIteration

    def _height(self, loss: float) -> float:
        """A loss as a share of the level; of a loss that begins below 0 as a share of its rise from there."""
        floor = 0.0 if math.isnan(self._floor) else self._floor
        return max((loss - floor) / max(self.level - floor, TINY), SMALLEST)

    def _risen(self, name: str, value: float) -> tuple[float, str]:
        """Steps until the retain loss is at the level if this value rises on; infinite if that takes more than a span."""
        if name == "retain loss":
            self._retain.append(value)
        soonest = math.inf
        for rise in self._rises[name]:
            growth = rise.take(value, self.step)
            recent = list(self._retain)[-rise.span :] or [self._start]
            short = -math.log(sum(recent) / len(recent))
            if growth > 0 and short <= growth:
                rate = growth / rise.span
                back = math.log(rise.span * math.expm1(-rate) / math.expm1(-growth)) / rate  # of an exponential's mean
                soonest = min(soonest, max(0.0, short / rate - back) * rise.spacing)
        return soonest, f"the {name} has risen"

    def _alert(self, state: str, crossing: float, why: str) -> Alert:
        """The alert, with its message."""
        unpredicted = state != CALM and self._predicted_stable
        message = f"step {self.step}, {state}: {why}"
        if state == RISING:
            message += f"; the retain loss is expected at {self.level:.3g} by step {crossing:.0f}"
        if unpredicted:
            message += "; the run was predicted to stay below"
        if self._factor < 1:
            message += f"; the step size should be {self._factor:.3g} times the original"
        return Alert(
            step=self.step,
            state=state,
            crossing=crossing,
            unpredicted=unpredicted,
            lr_factor=self._factor,
            stop=self.action != "warn" and (state == DIVERGED or (state == RISING and self.action == "stop")),
            message=message + ".",
        )


class _Rise:
    """How far the mean of the last values stands above the largest mean of as many earlier ones."""

    def __init__(self, span: int, *, power: float = 1.0, faint: float = 0.0) -> None:
        self.span, self._power, self._faint = span, power, faint
        self._values: deque[float] = deque(maxlen=span)
        self._means: deque[float] = deque(maxlen=span)
        self._record = 0.0
        self._first, self._last, self._count = 0, 0, 0

    @property
    def spacing(self) -> float:
        """Steps from one value to the next: 1 unless the loop leaves values out."""
        return (self._last - self._first) / (self._count - 1) if self._count > 1 else 1.0

    def take(self, value: float, step: int) -> float:
        """ln q with one more value, times the power; 0 while there is nothing to compare with."""
        self._first = self._first if self._count else step
        self._last, self._count = step, self._count + 1
        self._values.append(value)
        if len(self._values) < self.span:
            return 0.0
        if len(self._means) == self.span:
            self._record = max(self._record, self._means[0])
        mean = sum(self._values) / self.span
        self._means.append(mean)
        told = mean > 0 and self._record > self._faint * mean
        return self._power * math.log(mean / self._record) if told else 0.0


class _Course:
    """Where a run stands on the rolled-out one."""

    def __init__(self, report: Report, height: Callable[[float], float]) -> None:
        rolled = report.rollout
        steps = np.array(rolled.steps, dtype=np.float64)
        logs = {
            name: np.log([height(loss) for loss in curve])
            for name, curve in (("retain loss", rolled.retain_loss), ("forget loss", rolled.forget_loss))
        }
        self.crossing = math.inf if report.divergence_step is None else float(report.divergence_step)
        retain = logs["retain loss"]
        past = np.flatnonzero(retain >= 0)
        if report.divergence_step is not None and past.size and past[0] > 0:
            i = int(past[0])  # the checks lie up to ten steps apart
            share = -retain[i - 1] / (retain[i] - retain[i - 1])
            self.crossing = float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
        self._curves = {}
        for name, curve in logs.items():
            envelope = np.maximum.accumulate(curve[np.isfinite(curve)])
            values, first = np.unique(envelope, return_index=True)
            self._curves[name] = values, steps[np.isfinite(curve)][first]

    def to_go(self, heights: dict[str, float]) -> float:
        """Steps to the predicted crossing from where the losses stand; infinite where none is predicted or none stands."""
        reached = [float(np.interp(math.log(h), *self._curves[name])) for name, h in heights.items()]
        return max(0.0, self.crossing - max(reached)) if reached else math.inf


def _number(value: SupportsFloat, name: str) -> float:
    """A number or a tensor of one as a float."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"`{name.replace(' ', '_')}` of `Monitor.update` must be one number; got {value!r:.60}. Give the batch's mean."
        ) from None
