"""What to do instead: settings predicted to hold, each with what it would reach, and the Pareto front. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stabkit._serialise import Stored
from stabkit._table import Shown, Table, setting
from stabkit._validate import check_real

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stabkit.algorithms import Algorithm


UNSURE = "holds in a linearised network that is wrong there; mode='thorough' knows"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One way out.

    Attributes:
        remedy: "step size", "mix", "batch size", "warm-up", "decay" of the step size, "forget decay", "no weight decay",
            "clipping", "layer damping" or "algorithm".
        changes: Settings to change, by name, for `algorithm.replace`.
        algorithm: Name of another algorithm to take, with the settings that all have; None for the one in question.
        probability: P(diverge) with them, by the rollouts alone.
        retain_loss: Predicted retain loss at the end of the run, mean over the seeds.
        forget_loss: The same for the forget set.
        further_probability: The same at `Recommendations.margin` times the step size; None where it was not asked for, as
            staged rollouts do not hold here.
        error: Relative error of the linearised outputs at the end of the run, of the first seed; infinite where parameters
            come to matter that were dormant. None where that was not looked at: with staged rollouts, which look by
            themselves, of AdamW, and where either probability is beyond the risk.
        holds: Whether both probabilities are within the risk, and the error within what a stable run's may be.
    """

    remedy: str
    changes: dict[str, Any]
    probability: float
    further_probability: float | None
    retain_loss: float
    forget_loss: float
    holds: bool
    error: float | None = None
    algorithm: str | None = None

    def apply(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm that this advises.

        Args:
            algorithm: The one that was asked about.

        Returns:
            It with the changes, or another one with its settings and the changes.
        """
        from stabkit.algorithms import ALGORITHMS  # values are read without it

        kind = None if self.algorithm is None else ALGORITHMS[self.algorithm]
        return (algorithm if kind is None else algorithm.turned_into(kind)).replace(**self.changes)

    @property
    def unsure(self) -> bool:
        """Whether it would hold were the linearised network right there."""
        return self.error is not None and not self.holds


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """A setting that no other one beats in both losses.

    Fewer steps are the beginning of the run that was asked about, with the schedules of that: of an `algorithm` the run is
    `algorithm.shortened(point.steps).replace(lr=point.lr, mix=point.mix)`.

    Attributes:
        lr: Step size.
        mix: Mix.
        steps: Steps K, at most those of the run that was asked about; all of those where its plan cannot be cut.
        probability: P(diverge) within them, by the rollouts alone.
        retain_loss: Predicted retain loss after them.
        forget_loss: Predicted forget loss after them.
    """

    lr: float
    mix: float
    steps: int
    probability: float
    retain_loss: float
    forget_loss: float


@dataclass(frozen=True, kw_only=True)
class Recommendations(Shown, Stored):
    """What to do instead, and what is to be had at all.

    Attributes:
        algorithm: Name of the algorithm.
        risk: Largest P(diverge) of rollouts that counts as holding.
        margin: How many times its step size a setting must hold at too, so that a report's P is about within the risk.
        kind: "one", "far" or "adamw", as the calibration's, or "staged" where staged rollouts have confirmed every setting
            but the front's.
        asked: The setting that was asked about.
        items: Ways out, in the order of `remedy`; those that do not hold are there too.
        front: The Pareto front of forget loss (up) against retain loss (down), by one linearisation, ascending in both.
    """

    schema: ClassVar[int] = 4

    algorithm: str
    risk: float
    margin: float
    kind: str
    asked: Recommendation
    items: tuple[Recommendation, ...]
    front: tuple[ParetoPoint, ...]

    def reaching(self, forget_loss: float) -> ParetoPoint:
        """The point of the front that harms the retain set least while the forget loss reaches a target.

        Args:
            forget_loss: The target, such as the loss on held-out data.

        Returns:
            The point; the one of the largest forget loss where none reaches it.

        Raises:
            ValueError: If the front is empty, or the target is not finite.
        """
        check_real(forget_loss, name="forget_loss", owner="Recommendations.reaching")
        if not self.front:
            raise ValueError(
                f"`front` of `Recommendations` must hold a point; got none: nothing holds at a risk of {self.risk:.3g}. "
                "Raise `risk`."
            )
        return next((p for p in self.front if p.forget_loss >= forget_loss), self.front[-1])

    def table(self) -> Table:
        """Every way out beside the setting that was asked about.

        Returns:
            The table.
        """
        rows = [("as asked", self.asked), *((item.remedy, item) for item in self.items)]
        return Table(
            title=f"What to do instead with {self.algorithm}",
            columns=("remedy", "settings", "P", f"at {self.margin:.3g} lr", "retain loss", "forget loss", ""),
            rows=tuple(
                (
                    name,
                    ", ".join([
                        *([] if item.algorithm is None else [item.algorithm]),
                        *(f"{key}={setting(value)}" for key, value in item.changes.items()),
                    ]),
                    f"{item.probability:.2f}",
                    "–" if item.further_probability is None else f"{item.further_probability:.2f}",
                    f"{item.retain_loss:.3g}",
                    f"{item.forget_loss:.3g}",
                    "holds" if item.holds else "unsure" if item.unsure else "does not hold",
                )
                for name, item in rows
            ),
            footer=f"P(diverge) by rollouts, also at {self.margin:.3g} times the step size; risk {self.risk:.3g}; "
            "losses at the end of the run"
            + ("; confirmed by staged rollouts" if self.kind == "staged" else "")
            + (f". Unsure: {UNSURE}" if any(item.unsure for _, item in rows) else ""),
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        from stabkit.render import table_html

        return table_html(self.table())

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Forget loss against retain loss: the front, the setting that was asked about and the ways out.

        Args:
            ax: Axes to draw in; new ones when None.

        Returns:
            Figure and axes.
        """
        from stabkit.plots import plot_front

        return plot_front(self, ax=ax)
