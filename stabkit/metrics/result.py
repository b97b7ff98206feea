"""What an audit found, and how it shows itself."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stabkit._serialise import Stored
from stabkit._table import Table
from stabkit.metrics.accuracy import Accuracies
from stabkit.metrics.bootstrap import Estimate
from stabkit.metrics.membership import SETS, Attack
from stabkit.metrics.relearn import Relearning
from stabkit.metrics.tables import (
    DISTANCES,
    distance_table,
    has_classes,
    markdown,
    membership_table,
    summary_table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Distances:
    """How far a model's predictions are from the gold model's on one set; None where not finite.

    A share counts labelled positions; the rest are means over a sample's positions, then over samples.

    Attributes:
        kl_from_gold: KL(gold ‖ model), in nats.
        kl_to_gold: KL(model ‖ gold), in nats.
        js: Jensen-Shannon divergence, in nats, at most ln 2.
        prediction_divergence: Share of labelled positions where the two predict different classes.
        activation_distance: Mean L2 distance of the predicted probabilities, at most √2.
    """

    kl_from_gold: Estimate | None
    kl_to_gold: Estimate | None
    js: Estimate | None
    prediction_divergence: Estimate | None
    activation_distance: Estimate | None


@dataclass(frozen=True, kw_only=True)
class SetAudit:
    """One model on one set.

    Attributes:
        accuracy: Share of labelled positions predicted right; None if the loss has no classes.
        loss: Mean loss per sample, in the loss's units (nats for cross-entropy); None if not finite.
        distances: To the gold model; None without one, for itself, and if the loss has no classes.
    """

    accuracy: Estimate | None
    loss: Estimate | None
    distances: Distances | None


@dataclass(frozen=True, kw_only=True)
class ModelAudit:
    """One model of an audit.

    Attributes:
        name: "original", "gold", or the name it was given.
        forget: On the forget set.
        retain: On the retain set.
        test: On the test set; None without one.
        membership: Membership attacks; none without a test set, and on what is not finite.
        average_gap: Mean of |FA|, |RA|, |TA| and |MIA| differences to the gold model, a share; None without one, for itself,
            and where one of the four is missing.
        relearning: Steps to relearn the forget set; None if not asked for.
    """

    name: str
    forget: SetAudit
    retain: SetAudit
    test: SetAudit | None
    membership: tuple[Attack, ...]
    average_gap: Estimate | None
    relearning: Relearning | None

    @property
    def accuracies(self) -> Accuracies:
        """RA, FA and TA as shares, without intervals."""
        found = {name: getattr(self.on(name), "accuracy", None) for name in SETS}
        return Accuracies(**{name: None if value is None else value.value for name, value in found.items()})

    @property
    def unlearning_accuracy(self) -> Estimate | None:
        """UA = 1 - FA, a share."""
        return None if self.forget.accuracy is None else self.forget.accuracy.complement

    def attack(self, name: str) -> Attack | None:
        """One membership attack.

        Args:
            name: Feature and classifier, as in "entropy/logistic".

        Returns:
            The attack; None if it was not possible.
        """
        return next((found for found in self.membership if found.name == name), None)

    def on(self, name: str) -> SetAudit | None:
        """The audit of one set.

        Args:
            name: "forget", "retain" or "test".

        Returns:
            The audit; None without such a set.
        """
        return {"forget": self.forget, "retain": self.retain, "test": self.test}[name]


@dataclass(frozen=True, kw_only=True)
class Audit(Stored):
    """Several models beside the original and a retrained one.

    **Units.** Every rate is a share in [0, 1] here and in what is written to files; the tables and the plot show per cent.
    FA, RA and TA are accuracies on the forget, retain and test set and UA = 1 - FA. Members are the positive class of every
    attack: `forget_called_member` and its complement are both given, since papers report either as "MIA".

    Attributes:
        models: The original, the gold model if there is one, and the others in the order they came.
        level: Nominal coverage of every interval.
        replicates: Bootstrap resamples.
        seed: Of halves and resamples.
        gap_attack: The attack whose `forget_called_member` is the MIA of the tables and of the average gap.
        sizes: Samples of the forget, retain and test set, 0 without one.
        loss: Name of the loss.
    """

    schema: ClassVar[int] = 1

    models: tuple[ModelAudit, ...]
    level: float
    replicates: int
    seed: int
    gap_attack: str
    sizes: tuple[int, int, int]
    loss: str

    def __getitem__(self, name: str) -> ModelAudit:
        """One model's audit.

        Args:
            name: Its name.

        Returns:
            The audit.

        Raises:
            KeyError: If there is none.
        """
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(f"no model {name!r} in the audit; there are {[model.name for model in self.models]}")

    def table(self) -> Table:
        """Accuracies, membership, average gap and relearning, model by model, in per cent; without classes the losses.

        Returns:
            The table.
        """
        return summary_table(self)

    def distance_table(self) -> Table:
        """Losses and distances to the gold model, set by set.

        Returns:
            The table.
        """
        return distance_table(self)

    def membership_table(self) -> Table:
        """Every attack on every model.

        Returns:
            The table.
        """
        return membership_table(self)

    def tables(self) -> tuple[Table, ...]:
        """All three tables.

        Returns:
            `table`, `distance_table` and `membership_table`.
        """
        return self.table(), self.distance_table(), self.membership_table()

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._shown()))

    def _shown(self) -> tuple[Table, ...]:
        """The tables to print; without classes the first has the losses already."""
        return (self.table(), self.distance_table()) if has_classes(self) else (self.table(),)

    def _repr_html_(self) -> str:
        from stabkit.render import table_html

        return "".join(table_html(table) for table in self._shown())

    def to_markdown(self) -> str:
        """All three tables as Markdown.

        Returns:
            The text.
        """
        return "\n\n".join(map(markdown, self.tables())) + "\n"

    @property
    def panels(self) -> tuple[str, ...]:
        """What the axes of `plot` hold, in their order; without classes the sets' losses, and MIA if it was possible."""
        if has_classes(self):
            return ("FA", "RA", "TA", "MIA", "distance")
        losses = [f"{name} loss" for name, size in zip(SETS, self.sizes, strict=True) if size]
        attacked = any(model.attack(self.gap_attack) is not None for model in self.models)
        return (*losses, "MIA") if attacked else tuple(losses)

    def plot(self, axes: Sequence[Axes] | None = None) -> tuple[Figure, Sequence[Axes]]:
        """Every model's rates beside the gold model's, and its distance from it, with their intervals.

        Args:
            axes: One axes to draw in for each of `panels`; a new figure when None.

        Returns:
            Figure and the axes.

        Raises:
            TypeError: If these are not so many axes.
        """
        from stabkit.plots import plot_audit  # plots are loaded only when drawn

        number = len(self.panels)
        if axes is not None and (not hasattr(axes, "__len__") or len(axes) != number):
            got = f"{len(axes)} of them" if hasattr(axes, "__len__") else f"one {type(axes).__name__}"
            raise TypeError(
                f"`axes` of `Audit.plot` must be {number} axes, for {', '.join(self.panels)}; got {got}. Make them with "
                f"matplotlib's subplots(1, {number})."
            )
        return plot_audit(self, axes=axes)

    def rows(self) -> list[dict[str, Any]]:
        """Every number of the audit as one line of a long table.

        Returns:
            Dictionaries with model, set, quantity, value, low and high; shares, nats, or steps (infinite beyond the limit).
            What is missing has no line.
        """
        found: list[dict[str, Any]] = []

        def add(model: str, place: str, quantity: str, value: Estimate | None) -> None:
            if value is not None:
                ends = {"value": value.value, "low": value.low, "high": value.high}
                found.append({"model": model, "set": place, "quantity": quantity, **ends})

        for model in self.models:
            for name in SETS:
                part = model.on(name)
                if part is None:
                    continue
                add(model.name, name, "accuracy", part.accuracy)
                add(model.name, name, "loss", part.loss)
                for key in DISTANCES if part.distances is not None else ():
                    add(model.name, name, key, getattr(part.distances, key))
            for attack in model.membership:
                for key in ("forget_called_member", "forget_called_non_member"):
                    add(model.name, "forget", f"{attack.name} {key}", getattr(attack, key))
                for key in ("auc", "balanced_accuracy"):
                    add(model.name, "held out", f"{attack.name} {key}", getattr(attack, key))
            add(model.name, "all", "average_gap", model.average_gap)
            if model.relearning is not None:
                ends = (model.relearning.steps, model.relearning.low, model.relearning.high)
                value, low, high = (math.inf if end is None else float(end) for end in ends)
                add(model.name, "forget", "relearning_steps", Estimate(value=value, low=low, high=high))
        return found

    def to_dataframe(self) -> Any:
        """`rows` as a pandas table.

        Returns:
            A `pandas.DataFrame` with the columns model, set, quantity, value, low and high.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "`Audit.to_dataframe` needs pandas, which is not installed. Install pandas, or use `rows()`."
            ) from error
        return pandas.DataFrame(self.rows(), columns=["model", "set", "quantity", "value", "low", "high"])
