"""The report: a verdict, the evidence behind it, and how it shows itself. Values only; nothing is computed here."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stabkit._serialise import Stored, write_atomically
from stabkit._table import Shown, Table
from stabkit.boundary import CriticalValue
from stabkit.calibration import Calibration
from stabkit.frontier import Frontier, Outcome
from stabkit.recommendations import Recommendations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stabkit.preconditioner import Preconditioner

# What a report asks again with, in its own process.
HELD = ("_frontier", "_at", "_recommend", "_staged", "_preconditioner")
# Name of the check that a marginal verdict passes, as it claims neither side.
MARGIN = "critical step size on the other side"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was asked about.

    Attributes:
        algorithm: Registered name of the algorithm.
        settings: Its settings by name.
        batch_sizes: Retain and forget samples a step.
        model: Class of the model.
        parameters: Number d of trainable parameters.
        retain_size: Retain samples.
        forget_size: Forget samples.
        loss: Name of the per-sample loss.
        batchnorm: Treatment of BatchNorm statistics.
        divergence_level: Retain loss of the best constant predictor.
        check_every: Steps from one look at the losses to the next.
        retain_loss: Retain loss at θ*, of up to 512 samples.
        forget_loss: Forget loss at θ*, of as many.
        device: Where it was computed.
        dtype: Dtype of the network's derivatives.
        seed: Seed of the prediction.
        versions: Versions of stabkit, torch, numpy and scipy.
        own: Whether the algorithm is of a class of the caller's, whatever its name.
    """

    algorithm: str
    settings: dict[str, Any]
    batch_sizes: tuple[int, int]
    model: str
    parameters: int
    retain_size: int
    forget_size: int
    loss: str
    batchnorm: str
    divergence_level: float
    check_every: int
    retain_loss: float
    forget_loss: float
    device: str
    dtype: str
    seed: int
    versions: dict[str, str]
    own: bool = False

    @property
    def lr(self) -> float:
        """Step size η."""
        return float(self.settings["lr"])

    @property
    def mix(self) -> float:
        """Mix α."""
        return float(self.settings["mix"])

    @property
    def steps(self) -> int:
        """Number K of steps."""
        return int(self.settings["steps"])

    @property
    def adaptive(self) -> bool:
        """Whether the steps are AdamW's."""
        return self.settings.get("optimizer") == "adamw"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the linear theory says (theory §§2-4), in the preconditioned coordinates.

    Momentum enters the first five and the verdict; the mean square and the rules are those of the run without it.

    Attributes:
        curvature: "hessian" or "ggn": whose eigenvalues are in the next three fields.
        smallest: λ_min(D), weight decay included.
        largest: λ_max(D).
        residuals: Eigen-residuals of the two.
        converged: Whether the eigen-solver met its tolerance.
        step_limit: 2(1+β)/λ_max(D), with Nesterov's momentum a 1+2β-th of that, above which the mean overshoots (T4);
            infinity without positive curvature.
        mean_stable: Whether λ_min(D) >= 0 and lr <= step_limit (T4).
        asymptotic_mix: Mix above which D is indefinite, from the damped pencil (T5), on the compressed curvature.
        damping: ε of that pencil.
        radius: ρ(T_η), growth factor of the mean square a step (T6), on the compressed curvature.
        growth: K·ln ρ (T8).
        radius_lower_bound: The best of the cheap lower bounds on ρ (T10).
        lyapunov: Growth rate of ln‖δ‖ a step for almost every run (theory §3), by simulation; at most ½ ln ρ. Below 0 with ρ
            above 1, rare runs alone carry the mean square.
        lyapunov_error: Its standard error; NaN where it is minus infinity.
        mean_square_lr: Largest asymptotically mean-square stable step (T7); 0 if D is indefinite.
        horizon_lr: Largest step at which the mean square grows less than a thousandfold within the K steps.
        coherence_rule: Whether the published coherence rule calls divergence (T13).
        self_loop: Whether the self-loop bound calls divergence (theory §4).
        outside: What the run does that this theory has otherwise, in clauses.
    """

    curvature: str
    smallest: float
    largest: float
    residuals: tuple[float, float]
    converged: bool
    step_limit: float
    mean_stable: bool
    asymptotic_mix: float
    damping: float
    radius: float
    growth: float
    radius_lower_bound: float
    lyapunov: float
    lyapunov_error: float
    mean_square_lr: float
    horizon_lr: float
    coherence_rule: bool
    self_loop: bool
    outside: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CoherenceSummary:
    """How aligned the per-sample curvatures are (T11, T12). None where there is no curvature to compare.

    Attributes:
        retain: σ of the retain samples; 1: orthogonal, larger: aligned.
        forget: σ of the forget samples.
        cross: Coherence between the sets, in [0, 1].
        cosine: Cosine between the mean curvatures, in [0, 1].
        mixed: σ of the mixed per-pair curvatures.
        samples: Retain and forget samples compared.
        pairs_sampled: Whether pairs were sampled for `mixed`.
    """

    retain: float | None
    forget: float | None
    cross: float | None
    cosine: float | None
    mixed: float | None
    samples: tuple[int, int]
    pairs_sampled: bool


@dataclass(frozen=True, kw_only=True)
class RolloutSummary:
    """What the rolled-out linearised network did (T14).

    Attributes:
        seeds: Number of seeds.
        probability: P(diverge) by these rollouts alone.
        score: Log of the worst retain loss over the divergence level, per seed; positive: diverged.
        steps: Checked steps.
        retain_loss: Median over seeds at each check.
        retain_low: Smallest over seeds.
        retain_high: Largest over seeds.
        forget_loss: Median over seeds at each check.
        stopped_step: Median last step; below K where a stop rule ends the run.
        samples: Retain and forget samples linearised.
        rank: Number r of coordinates.
        real_steps: Steps of a seed's run that were taken on the real network, on average; 0 unless staged.
    """

    seeds: int
    probability: float
    score: tuple[float, ...]
    steps: tuple[int, ...]
    retain_loss: tuple[float, ...]
    retain_low: tuple[float, ...]
    retain_high: tuple[float, ...]
    forget_loss: tuple[float, ...]
    stopped_step: float
    samples: tuple[int, int]
    rank: int
    real_steps: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """One layer's or one sample's part of a whole.

    Attributes:
        name: Layer name, or sample index as text.
        share: Its part, in [0, 1].
    """

    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What breaks first, and where.

    Attributes:
        mechanism: "overshoot" (what lies beyond `Thresholds.step_limit` grows fastest), "ascent" (curvature that the forget
            set makes negative does), "saddle" (curvature that the retain set itself makes negative), "noise" (only the mean
            square grows; not named with momentum), "nonlinear" (predicted to diverge without any of these) or "none".
        eigenvalue: Eigenvalue of D in that direction; without a growing one, the one nearest to growing.
        retain_curvature: vᵀH_R v there, preconditioned.
        forget_curvature: vᵀH_F v there.
        eigenvector_layers: The direction split by layer, largest first; shares sum to 1.
        displacement_layers: The rolled-out displacement θ - θ* split by layer, largest first.
        retain_samples: Retain samples that carry most of the direction's retain curvature, by index in the retain set.
        forget_samples: Forget samples that carry most of its forget curvature, by index in the forget set.
    """

    mechanism: str
    eigenvalue: float
    retain_curvature: float
    forget_curvature: float
    eigenvector_layers: tuple[Share, ...]
    displacement_layers: tuple[Share, ...]
    retain_samples: tuple[Share, ...]
    forget_samples: tuple[Share, ...]


@dataclass(frozen=True, kw_only=True)
class LayerGate:
    """One layer's heavy-tailed exponent and what the algorithm makes of it.

    Attributes:
        layer: Name of the weight matrix.
        exponent: ξ; None where undefined.
        standard_error: Of ξ; None where undefined.
        trusted: Whether there is evidence enough to act on it.
        gate: ν; 1 where neutral, or where the algorithm has no gate.
        note: Why it is not trusted, or "".
    """

    layer: str
    exponent: float | None
    standard_error: float | None
    trusted: bool
    gate: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test of the report's own trustworthiness.

    Attributes:
        name: What is checked.
        value: What was found; None if it could not be.
        threshold: What it is held against.
        passed: Whether it is fine.
        meaning: What it says.
        remedy: What to do if it failed.
    """

    name: str
    value: float | None
    threshold: float
    passed: bool
    meaning: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage cost.

    Attributes:
        stage: Its name.
        seconds: Wall-clock seconds.
        gradient_equivalents: Per-sample gradient evaluations.
    """

    stage: str
    seconds: float
    gradient_equivalents: float


@dataclass(frozen=True, kw_only=True)
class Report(Shown, Stored):
    """A prediction for one run, with its evidence.

    One read from a file equals the one that was written, shows itself and can be verified; it cannot be asked for a new
    frontier or for other settings.

    Attributes:
        verdict: "stable", "marginal" or "diverges".
        probability: P(diverge) within the run's steps: the mean of what the rollouts say and of the probability that the
            critical step size is smaller than the run's (theory §7); the former alone where the scan found none, and with
            one half for the latter beyond where the linearised network was found right. Maps make it rise with the step
            size; reports of several step sizes need not.
        mode: "fast", "standard" or "thorough".
        divergence_step: Median predicted step of divergence; None where fewer than half of the seeds diverge.
        critical_lr: Smallest step size predicted to diverge at this mix; infinity if none was found in the scan.
        critical_lr_interval: Where it lies at nine in ten: the seeds' spread, and the conformal factors of the calibration.
            From 0 on where the scan found no step size that holds; where it found none that breaks, from the largest one on
            up to which the linearised network was found right.
        critical_lr_error: Relative error of the outputs linearised at θ* after a run of half that step size, or, if it is
            larger, of the run in question where its step size is smaller still. The interval is chosen by it. None of staged
            predictions and AdamW's, and where the scan found no boundary.
        critical_mix: Smallest mix predicted to diverge at this step size; infinity if none is, up to 1, or
            the algorithm has but one.
        critical_lr_detail: Its scan and spread over seeds.
        critical_mix_detail: Its scan and spread over seeds.
        calibration: What the probability rests on.
        run: What was asked about.
        thresholds: What the linear theory says.
        coherence: Alignment of per-sample curvatures.
        rollout: What the rolled-out run did.
        cause: What breaks first.
        layers: Heavy-tailed exponents and gates.
        checks: How far to trust this.
        linearisation_error: Relative error of the outputs linearised at θ* at the displacement predicted from there, or
            after the first steps of an AdamW run; infinity if the real outputs there are not finite.
        advice: What to do, in words.
        costs: What it cost, by stage.
    """

    schema: ClassVar[int] = 8

    verdict: str
    probability: float
    mode: str
    divergence_step: float | None
    critical_lr: float
    critical_lr_interval: tuple[float, float]
    critical_lr_error: float | None
    critical_mix: float
    critical_lr_detail: CriticalValue
    critical_mix_detail: CriticalValue
    calibration: Calibration
    run: Run
    thresholds: Thresholds
    coherence: CoherenceSummary
    rollout: RolloutSummary
    cause: Cause
    layers: tuple[LayerGate, ...]
    checks: tuple[Check, ...]
    linearisation_error: float
    advice: tuple[str, ...]
    costs: tuple[Cost, ...]
    # How to ask again without measuring again; not part of the report's value, absent after loading from a file.
    _frontier: Callable[..., Frontier] | None = field(default=None, compare=False, repr=False)
    _at: Callable[..., Report] | None = field(default=None, compare=False, repr=False)
    _recommend: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    _staged: Callable[[], float] | None = field(default=None, compare=False, repr=False)
    _preconditioner: Any = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        gone = dict.fromkeys(HELD)
        return {**self.__dict__, **gone}  # a pickled one has the values alone

    def __copy__(self) -> Report:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        again = object.__new__(type(self))
        again.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        # What was measured is only ever read, so that a copy asks the same again; networks are not doubled for it.
        again.__dict__.update({name: self.__dict__[name] for name in HELD})
        return again

    def __hash__(self) -> int:  # of some values: settings are a dictionary, which has none
        return hash((self.verdict, self.probability, self.critical_lr, self.critical_mix, self.thresholds))

    @property
    def confidence(self) -> str:
        """Of the verdict: "high", if every check passed, or "low"; of the critical step size the interval tells."""
        return "high" if all(check.passed for check in self.checks) else "low"

    @property
    def fixed_mix(self) -> bool:
        """Whether the algorithm has but one mix, as fine-tuning and gradient ascent have: none to scan and to advise."""
        return self.critical_mix_detail.scanned[0] == self.critical_mix_detail.scanned[1]

    def _held(self, name: str) -> Any:
        """What the prediction left to ask again with."""
        value = getattr(self, f"_{name}")
        if value is None:
            raise RuntimeError(
                f"`{name}` of `Report` needs what was measured, which a report from a file or a pickle does not hold; call "
                "predict(...) again in this process."
            )
        return value

    @property
    def preconditioner(self) -> Preconditioner:
        """P of the run, masks included, which `run(..., preconditioner=report.preconditioner)` then need not compute again.

        It is on the device and in the dtype of the prediction.

        Raises:
            RuntimeError: If this report is from a file or a pickle.
        """
        held: Preconditioner = self._held("preconditioner")
        return held

    def frontier(
        self, *, lr: Sequence[float] | None = None, mix: Sequence[float] | None = None, progress: bool = False
    ) -> Frontier:
        """Predict a whole grid of step sizes and mixes from what is measured already; no network pass.

        Args:
            lr: Step sizes; 20 around the boundaries of all mixes when None.
            mix: Mixes; 20 from 0 to 1 when None, or the one there is of an algorithm that has but one. The preconditioner is
                that of the report's own setting throughout.
            progress: Whether to show a progress bar.

        Returns:
            The map.

        Raises:
            RuntimeError: If this report was loaded from a file, which does not hold the linearised network.
            ValueError: If a value is out of its domain, or a mix is none of the algorithm's.
        """
        found: Frontier = self._held("frontier")(lr=lr, mix=mix, progress=progress)
        return found

    def at(self, **changes: object) -> Report:
        """The report for other settings of the same algorithm, measured quantities reused.

        Args:
            **changes: Any setting of the algorithm. Step size, steps, batches, sampling, momentum, clipping, schedules and a
                weight decay that was there already need nothing measured; a new mix has its spectrum measured anew, and
                AdamW's batches and sampling too, what the preconditioner reads everything. With fewer steps a schedule given
                factor by factor is cut to them, and one with a name is that of the shorter run; with more steps the former
                has to be given anew.

        Returns:
            A new report. Cost: rollouts, one forward pass over the linearised samples, an AdamW run's first steps, and what
            is measured anew.

        Raises:
            RuntimeError: If this report is from a file or a pickle.
        """
        report: Report = self._held("at")(**changes)
        return report

    def recommend(self, *, risk: float = 0.05) -> Recommendations:
        """What to do instead: settings that hold, what they reach, and the Pareto front over step size, mix and steps.

        Args:
            risk: Largest P(diverge) that counts as holding, in (0, 1). Allow more where the retain loss at θ* is near half
                the divergence level or above: P is past 0.05 there from the start.

        Returns:
            The recommendations; they print as a table, and `plot` draws the front. Cost: rollouts of some 300 settings a
            seed; in a thorough report staged rollouts of every way out too.

        Raises:
            RuntimeError: If this report is from a file or a pickle.
        """
        found: Recommendations = self._held("recommend")(risk=risk)
        return found

    def plot(self, axes: Sequence[Axes] | None = None) -> tuple[Figure, Sequence[Axes]]:
        """Predicted losses over the run, P(diverge) against the step size's limits, and the layers that break.

        Args:
            axes: Two axes to draw in; a new figure when None.

        Returns:
            Figure and axes.

        Raises:
            TypeError: If these are not two axes.
        """
        from stabkit.plots import plot_report  # plots are loaded only when drawn

        if axes is not None and (not hasattr(axes, "__len__") or len(axes) != 2):
            got = f"{len(axes)} of them" if hasattr(axes, "__len__") else f"one {type(axes).__name__}"
            raise TypeError(
                f"`axes` of `Report.plot` must be two axes; got {got}. Make them with matplotlib's subplots(1, 2)."
            )
        return plot_report(self, axes=axes)

    def summary(self) -> str:
        """The whole report as text, complete without the plots.

        Returns:
            Several lines.
        """
        from stabkit.render import report_text

        return report_text(self)

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        from stabkit.render import report_html

        return report_html(self)

    def save_html(
        self,
        path: str | os.PathLike[str],
        *,
        frontier: Frontier | None = None,
        outcomes: Sequence[Outcome] = (),
        tables: Sequence[Table] = (),
    ) -> Path:
        """Write the report as one self-contained HTML file, plots inside, no script.

        Args:
            path: Where to.
            frontier: A frontier to draw as well; computed on the default grid when None, but of a report loaded from a file,
                whose page says that there is none.
            outcomes: Real runs to mark on it.
            tables: Tables to show before the evidence, such as a verification's `table()`.

        Returns:
            The path.

        Raises:
            TypeError: If a table is none.
        """
        from stabkit.render import report_page

        wrong = [tables] if isinstance(tables, Table) else [table for table in tables if not isinstance(table, Table)]
        if wrong:
            raise TypeError(
                f"`tables` of `Report.save_html` must be a list of tables; got {type(wrong[0]).__name__}. Of what `verify` "
                "returned, pass [check.table()]."
            )
        if frontier is None and self._frontier is not None:
            frontier = self.frontier()
        page = report_page(self, frontier=frontier, outcomes=outcomes, tables=tables)
        return write_atomically(path, page)
