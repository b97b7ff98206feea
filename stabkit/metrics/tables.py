"""An audit as tables of text: shares in per cent, everything with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabkit._table import Table
from stabkit.metrics.bootstrap import Estimate
from stabkit.metrics.membership import SETS
from stabkit.metrics.relearn import Relearning

if TYPE_CHECKING:
    from stabkit.metrics.result import Audit

ORIGINAL, GOLD = "original", "gold"
MISSING, NOT_FINITE = "–", "not finite"
DISTANCES = ("kl_from_gold", "kl_to_gold", "js", "prediction_divergence", "activation_distance")


def summary_table(audit: Audit) -> Table:
    """Accuracies, membership, average gap and relearning, model by model; losses for accuracies where there are no classes.

    Args:
        audit: The audit.

    Returns:
        The table.
    """
    if not has_classes(audit):
        return _loss_summary(audit)
    gold, rows = any(model.name == GOLD for model in audit.models), []
    for model in audit.models:
        attack = model.attack(audit.gap_attack)
        missing = NOT_FINITE if model.forget.loss is None and model.test is not None else MISSING
        rows.append((
            model.name,
            *(percent(None if s is None else s.accuracy) for s in (model.forget, model.retain, model.test)),
            percent(model.unlearning_accuracy),
            percent(None if attack is None else attack.forget_called_member, missing),
            percent(model.average_gap, missing if gold else MISSING),
            steps(model.relearning),
        ))
    forget, retain, test = audit.sizes
    rates = ("FA %", "RA %", "TA %", "UA %", "MIA: called member %")
    return Table(
        title=f"Audit on {forget} forget, {retain} retain and {test} test samples",
        columns=("model", *rates, "avg gap, points", "relearn, steps"),
        rows=tuple(rows),
        footer=f"MIA by {_attack(audit)}; {100 * audit.level:g} % bootstrap intervals over samples in brackets",
    )


def _attack(audit: Audit) -> str:
    """The attack behind the MIA, and on which models it does no better than chance."""
    tried = {model.name: found for model in audit.models if (found := model.attack(audit.gap_attack)) is not None}
    chance = [name for name, found in tried.items() if found.at_chance]
    if not chance:
        return audit.gap_attack
    where = "every model" if len(chance) == len(tried) else ", ".join(chance)
    return f"{audit.gap_attack}, by its AUC at chance on {where}: the MIA and its part of a gap say little there"


def has_classes(audit: Audit) -> bool:
    """Whether the audit's loss has classes, without which accuracies, most attacks and distances are not defined.

    Args:
        audit: The audit.

    Returns:
        True if any model has an accuracy: one whose outputs are not finite has one too.
    """
    return any(model.forget.accuracy is not None for model in audit.models)


def _loss_summary(audit: Audit) -> Table:
    """The summary where there are no classes: losses, and of the rest what is defined and was asked for."""
    forget, retain, test = audit.sizes
    columns: dict[str, list[str]] = {"model": [model.name for model in audit.models]}
    for name, size in zip(("forget", "retain", "test"), audit.sizes, strict=True):
        if size:
            parts = [model.on(name) for model in audit.models]
            columns[f"{name} loss"] = [plain(None if part is None else part.loss, NOT_FINITE) for part in parts]
    notes = []
    attacks = [model.attack(audit.gap_attack) for model in audit.models]
    if any(attack is not None for attack in attacks):
        shown = [NOT_FINITE if attack is None else percent(attack.forget_called_member) for attack in attacks]
        columns["MIA: called member %"] = shown
        notes.append(f"MIA by {_attack(audit)}")
    if any(model.relearning is not None for model in audit.models):
        columns["relearn, steps"] = [steps(model.relearning) for model in audit.models]
    notes.append(f"{100 * audit.level:g} % bootstrap intervals over samples in brackets")
    notes.append(f"the loss {audit.loss!r} has no classes, so that accuracies and distances are not defined")
    return Table(
        title=f"Audit on {forget} forget, {retain} retain and {test} test samples",
        columns=tuple(columns),
        rows=tuple(zip(*columns.values(), strict=True)),
        footer="; ".join(notes),
    )


def distance_table(audit: Audit) -> Table:
    """Losses and distances to the gold model, set by set; losses alone where there are no classes.

    Args:
        audit: The audit.

    Returns:
        The table.
    """
    rows = []
    for model in audit.models:
        for name in SETS:
            found = model.on(name)
            if found is None:
                continue
            shown = [None if found.distances is None else getattr(found.distances, key) for key in DISTANCES]
            *nats, differing, length = shown
            missing = MISSING if found.distances is None else NOT_FINITE
            cells = (*(plain(value, missing) for value in nats), percent(differing, missing), plain(length, missing))
            rows.append((model.name, name, plain(found.loss, NOT_FINITE), *cells))
    if not has_classes(audit):
        return Table(
            title="Losses",
            columns=("model", "set", "loss"),
            rows=tuple(row[:3] for row in rows),
            footer=f"{100 * audit.level:g} % bootstrap intervals over samples in brackets",
        )
    distances = ("KL(gold‖model)", "KL(model‖gold)", "JS", "differing %", "L2 of probabilities")
    return Table(
        title="Losses, and distances to the gold model",
        columns=("model", "set", "loss", *distances),
        rows=tuple(rows),
        footer=f"divergences in nats; {100 * audit.level:g} % bootstrap intervals over samples in brackets",
    )


def membership_table(audit: Audit) -> Table:
    """Every attack on every model.

    Args:
        audit: The audit.

    Returns:
        The table.
    """
    rows = [
        (
            model.name,
            attack.name,
            percent(attack.forget_called_member),
            percent(attack.forget_called_non_member),
            plain(attack.auc),
            percent(attack.balanced_accuracy),
            attack.convention,
        )
        for model in audit.models
        for attack in model.membership
    ]
    rates = ("forget called member %", "non-member %", "AUC", "balanced accuracy %")
    return Table(
        title="Membership inference; members are the positive class",
        columns=("model", "attack", *rates, "paper"),
        rows=tuple(rows),
        footer="AUC (chance 0.5) and balanced accuracy (chance 50 %) on the halves of retain and test that no attack was "
        "fitted on",
    )


def markdown(table: Table) -> str:
    """A table as Markdown.

    Args:
        table: The table.

    Returns:
        Title, table and footer.
    """
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([f"**{table.title}**", "", *body, "", table.footer])


def percent(value: Estimate | None, missing: str = MISSING) -> str:
    """A share in per cent with its interval.

    Args:
        value: The share; None where there is none.
        missing: What to say then.

    Returns:
        Text.
    """
    if value is None:
        return missing
    return f"{100 * value.value:.2f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def plain(value: Estimate | None, missing: str = MISSING) -> str:
    """A number with its interval.

    Args:
        value: The number; None where there is none.
        missing: What to say then.

    Returns:
        Text.
    """
    return missing if value is None else f"{value.value:.3g} [{value.low:.2g}, {value.high:.2g}]"


def steps(value: Relearning | None) -> str:
    """Relearning steps with their interval.

    Args:
        value: The relearning; None where it was not asked for.

    Returns:
        Text.
    """
    if value is None:
        return MISSING
    ends = [f">{value.limit}" if end is None else str(end) for end in (value.low, value.high)]
    return (str(value.steps) if value.reached else f"not in {value.limit}") + f" [{ends[0]}, {ends[1]}]"
