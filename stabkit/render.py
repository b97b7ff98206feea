"""A report as text and as HTML, both from the same sections."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from stabkit._table import Table, number, setting
from stabkit.calibration import FAR_ERROR, beyond
from stabkit.frontier import Frontier, Outcome
from stabkit.report import MARGIN, Report

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

MECHANISMS = {
    "overshoot": "the step overshoots along the sharpest direction of the mixed curvature",
    "ascent": "ascent on the forget set outweighs descent on the retain set along a direction of negative mixed curvature",
    "saddle": "the retain loss itself curves downward along a direction, and the run slides along it",
    "noise": "batches differ so much in curvature that the mean square grows where the mean does not, or not in time",
    "nonlinear": "nothing grows near the trained weights; the run makes the curvature that breaks it on its way",
    "none": "nothing grows by more than a factor e within the run",
}
GROWING = ("overshoot", "ascent", "saddle", "noise")  # by the linear theory, whatever the verdict is
TOP_LAYERS = 5
STOP_SETTINGS = {"drift_tolerance": "drift below {}", "leakage_bound": "leakage above {}"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a section.

    Attributes:
        label: What it is.
        value: Its value, formatted.
        note: What it means, or its uncertainty.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled table of the report.

    Attributes:
        title: Its heading.
        rows: Its lines.
    """

    title: str
    rows: tuple[Row, ...]


def headline(report: Report) -> str:
    """The verdict in one sentence.

    Args:
        report: The report.

    Returns:
        Text.
    """
    run = report.run
    words = {
        "stable": "is predicted to stay stable",
        "marginal": "is near the edge",
        "diverges": "is predicted to diverge",
    }
    where = "" if report.divergence_step is None else f", near step {report.divergence_step:.0f}"
    rule, last = _stop_rule(report), f"{report.rollout.stopped_step:.0f}"
    early = f" Its {rule} is predicted to end it after step {last} of {run.steps}." if rule else ""
    mix = "" if report.fixed_mix else f" and mix {number(run.mix)}"
    return (
        f"{run.algorithm}{' by AdamW' if run.adaptive else ''} at step size {number(run.lr)}{mix}, "
        f"{run.steps} steps, {words[report.verdict]}{where}: P(diverge) = {report.probability:.2f}."
        f"{early}"
    )


def _stop_rule(report: Report) -> str:
    """What ends the run before its last step, in words; nothing where it goes on to that."""
    if not report.rollout.stopped_step < report.run.steps:
        return ""
    bounds = {name: report.run.settings.get(name) for name in STOP_SETTINGS}
    by = " or ".join(STOP_SETTINGS[name].format(number(bound)) for name, bound in bounds.items() if bound is not None)
    return f"stop rule ({by})" if by else "stop rule"


def sections(report: Report) -> tuple[Section, ...]:
    """Every table of the report.

    Args:
        report: The report.

    Returns:
        The sections; verdict and advice stand before them.
    """
    return (
        _limits(report),
        _why(report),
        _theory(report),
        _alignment(report),
        _layer_section(report),
        _trust(report),
        _about(report),
        _costs(report),
    )


def _error_below(report: Report) -> tuple[Row, ...]:
    """What the interval of the critical step size hangs on."""
    if report.critical_lr_error is None:
        return ()
    note = f"at half the critical step size; up to {number(FAR_ERROR)} the critical one is known well"
    if report.calibration.kind == "far":
        note = (
            f"at half the critical step size; beyond {number(FAR_ERROR)} that is often several times too large, hence the "
            "wide interval: mode='thorough' finds it closer"
        )
        if report.critical_lr_error <= FAR_ERROR:
            note = (
                "at half the critical step size; but parameters come to matter there on which the outputs did not depend, "
                "hence the wide interval: mode='thorough' goes on with real steps"
            )
    return (Row(label="error of the linearised outputs", value=number(report.critical_lr_error), note=note),)


def _layers_own(report: Report) -> tuple[Row, ...]:
    """Whose step sizes those of the report are."""
    factors = report.run.settings.get("layer_lr")
    if not factors:
        return ()
    note = "share that these layers take of any step size named here or in the advice; all others take the whole"
    return (Row(label="layers' factors", value=setting(factors), note=note),)


def _limits(report: Report) -> Section:
    lr, mix, rollout = report.critical_lr_detail, report.critical_mix_detail, report.rollout
    spread = "halving and seeds:" if report.calibration.kind == "staged" else "seeds:"
    interval = f"nine in ten: {number(report.critical_lr_interval[0])} to {number(report.critical_lr_interval[1])}"
    lr_value, lr_note = number(report.critical_lr), f"{spread} {number(lr.low)} to {number(lr.high)}; {interval}"
    if not lr.found:
        lr_note = f"none up to {number(lr.scanned[1])}"
    elif not lr.bracketed:
        lr_value, lr_note = "–", f"no step size down to {number(lr.value)} holds"
    mix_note = f"at this step size; {spread} {number(mix.low)} to {number(mix.high)}" if mix.found else "none up to 1"
    critical_mix = Row(label="critical mix", value=number(report.critical_mix), note=mix_note)
    rolled = f"of the rollouts alone: {rollout.probability:.2f}"
    if lr.bracketed:
        past = beyond(report.run.lr, lr.value, report.critical_lr_interval)
        rolled += f"; that the critical step size is smaller: {past:.2f}"
    return Section(
        title="Limits",
        rows=(
            Row(label="P(diverge)", value=f"{report.probability:.2f}", note=rolled),
            Row(
                label="critical step size",
                value=lr_value,
                note=lr_note if report.fixed_mix else f"at this mix; {lr_note}",
            ),
            *_layers_own(report),
            *_error_below(report),
            *([] if report.fixed_mix else [critical_mix]),
            Row(
                label="divergence step",
                value=number(report.divergence_step),
                note=f"median of {rollout.seeds} rollouts; {_looks(report.run.check_every)}",
            ),
            *_early_end(report),
            *_losses(report),
        ),
    )


def _early_end(report: Report) -> tuple[Row, ...]:
    """The row of a run that its stop rule ends."""
    rule = _stop_rule(report)
    if not rule:
        return ()
    note = f"of {report.run.steps}, by its {rule}: median of the rollouts, whose losses stay as they are from there on"
    return (Row(label="last step", value=f"{report.rollout.stopped_step:.0f}", note=note),)


def _losses(report: Report) -> tuple[Row, Row]:
    """Where both losses begin and what becomes of them, on the samples that the curves are of."""
    rollout, level = report.rollout, number(report.run.divergence_level)
    of = f"mean of the {rollout.samples[0]:,} samples linearised"
    forget = f"{number(rollout.forget_loss[0])} → {number(rollout.forget_loss[-1])}"
    if report.divergence_step is None:
        retain = f"{number(rollout.retain_loss[0])} → {number(rollout.retain_loss[-1])}"
        notes = f"predicted end, {of}; diverged from {level} on", "predicted end"
    else:  # the last look is of a run that was given up far beyond the level, or of one that came back
        retain = f"{number(rollout.retain_loss[0])} → {number(max(rollout.retain_loss))} at most"
        notes = (
            f"crosses {level}, from where on it counts as diverged, near step {report.divergence_step:.0f}; "
            f"{number(rollout.retain_loss[-1])} where it ends or is given up; {of}",
            "where it ends or is given up",
        )
    return Row(label="retain loss", value=retain, note=notes[0]), Row(label="forget loss", value=forget, note=notes[1])


def _looks(every: int) -> str:
    """How often a run is looked at, in words."""
    return (
        "looked at after every step"
        if every == 1
        else f"looked at after each of the first {every} steps and every {every} steps"
    )


def _why(report: Report) -> Section:
    cause = report.cause
    note = MECHANISMS[cause.mechanism]
    if report.verdict == "stable" and cause.mechanism in GROWING:
        note = f"what grows, but is not predicted to break the run: {note}"
    elif report.verdict != "stable" and cause.mechanism == "none":
        breaks = report.rollout.probability >= 0.5  # real steps of staged rollouts do, whatever the linear theory says
        note += (
            "; the run breaks on its way"
            if breaks
            else "; but the critical step size may lie below the one asked about"
        )
    return Section(
        title="Why",
        rows=(
            Row(
                label="mechanism",
                value=cause.mechanism,
                note=note + ("; with AdamW's second moment held still" if report.run.adaptive else ""),
            ),
            Row(
                label="direction",
                value=f"λ = {number(cause.eigenvalue)}",
                note=f"retain curvature {number(cause.retain_curvature)}, forget curvature {number(cause.forget_curvature)}",
            ),
            Row(label="its layers", value=_shares(cause.eigenvector_layers), note="squared norm of the eigenvector"),
            Row(
                label="layers that move",
                value=_shares(cause.displacement_layers),
                note="squared norm of the predicted displacement",
            ),
            Row(
                label="retain samples",
                value=_shares(cause.retain_samples),
                note="index: share of the retain curvature in that direction",
            ),
            Row(
                label="forget samples",
                value=_shares(cause.forget_samples),
                note="index: share of the forget curvature in that direction",
            ),
        ),
    )


def _shares(shares: Sequence[object]) -> str:
    parts = [f"{s.name}: {s.share:.0%}" for s in shares[:TOP_LAYERS]]  # type: ignore[attr-defined]
    rest = len(shares) - len(parts)
    return ", ".join(parts) + (f", {rest} more" if rest > 0 else "") if parts else "–"


def _theory(report: Report) -> Section:
    t, run = report.thresholds, report.run
    steps, momentum = run.steps, run.settings.get("momentum", 0.0) or run.adaptive
    critical_mix = Row(
        label="asymptotic critical mix",
        value=number(t.asymptotic_mix),
        note=f"D turns indefinite above it; damping {number(t.damping)} (T5)",
    )
    what = "of AdamW with its second moment held still and without its decay; " if run.adaptive else ""
    return Section(
        title="Linear theory" + (f" ({what}mean square and rules: without the momentum)" if momentum else ""),
        rows=(
            *([Row(label="leaves out", value="of this run", note="; ".join(t.outside))] if t.outside else []),
            Row(
                label="λ_max(D), λ_min(D)",
                value=f"{number(t.largest)}, {number(t.smallest)}",
                note=f"{t.curvature}, residuals {number(t.residuals[1])}, {number(t.residuals[0])}"
                + ("" if t.converged else "; not converged"),
            ),
            Row(
                label=f"{_numerator(momentum, nesterov=run.settings.get('nesterov', False))}/λ_max(D)",
                value=number(t.step_limit),
                note="above it the mean overshoots (T4)",
            ),
            Row(
                label="mean stable forever",
                value="yes" if t.mean_stable else "no",
                note="λ_min(D) ≥ 0 and step size below that limit (T4); says little about a run of few steps",
            ),
            *([] if report.fixed_mix else [critical_mix]),
            Row(
                label="mean-square growth",
                value=f"ρ = {t.radius:.5g}",
                note=f"{steps}·ln ρ = {number(t.growth)} (T6, T8); at least {t.radius_lower_bound:.5g} (T10)",
            ),
            Row(
                label="growth of a typical run",
                value=f"{number(t.lyapunov)} ± {number(t.lyapunov_error)} a step",
                note=f"Lyapunov exponent, beside ½ ln ρ = {number(0.5 * math.log(t.radius)) if t.radius > 0 else '-∞'}",
            ),
            Row(
                label="mean-square step limits",
                value=f"{number(t.mean_square_lr)}, {number(t.horizon_lr)}",
                note=f"stable forever (T7); thousandfold growth within {steps} steps (T8)",
            ),
            Row(
                label="coherence rule",
                value="diverges" if t.coherence_rule else "silent",
                note="published rule (T13); proof only on one set under Poisson sampling, and silence is no promise",
            ),
            Row(label="self-loop bound", value="diverges" if t.self_loop else "silent", note="theory §4"),
        ),
    )


def _numerator(momentum: float, *, nesterov: bool) -> str:
    """Of the step size above which the mean overshoots (T4)."""
    if nesterov:
        return "2(1+β)/(1+2β)"
    return "2(1+β)" if momentum else "2"


def _alignment(report: Report) -> Section:
    c = report.coherence
    pairs = "pairs sampled" if c.pairs_sampled else "all pairs"
    return Section(
        title="Coherence",
        rows=(
            Row(
                label="retain σ", value=number(c.retain), note=f"{c.samples[0]} samples; 1: orthogonal curvatures (T11)"
            ),
            Row(label="forget σ", value=number(c.forget), note=f"{c.samples[1]} samples (T11)"),
            Row(label="retain-forget", value=number(c.cross), note="0: separate directions, 1: the same (T11)"),
            Row(label="curvature cosine", value=number(c.cosine), note="of the mean curvatures (T11)"),
            Row(label="mixed σ", value=number(c.mixed), note=f"{pairs} (T12)"),
        ),
    )


def _layer_section(report: Report) -> Section:
    rows = []
    for layer in report.layers:
        error = "" if layer.standard_error is None else f" ± {layer.standard_error:.2g}"
        # An exponent that is not trusted may be acted on all the same, with SRAGU's untrusted="gate".
        gate = [f"gate {layer.gate:.2f}"] if layer.trusted or layer.gate != 1 else []
        trust = ", ".join(gate + ([] if layer.trusted else [f"not trusted: {_first(layer.note)}"]))
        rows.append(Row(label=layer.layer, value=f"ξ = {number(layer.exponent)}{error}", note=trust))
    return Section(title="Layer exponents", rows=tuple(rows))


def _first(reasons: str) -> str:
    """The first of several reasons, and how many more there are; the report's data has them all."""
    first, *more = reasons.split("; ")
    return first + (f", and {len(more)} more" if more else "")


def _trust(report: Report) -> Section:
    c = report.calibration
    rows = [
        Row(
            label=check.name,
            value=f"{number(check.value)} ({'ok' if check.passed else 'fails'} at {number(check.threshold)})",
            note=check.meaning + ("" if check.passed else f" {check.remedy}"),
        )
        # A marginal verdict says that it may lie on either side.
        if not (check.name == MARGIN and report.verdict == "marginal")
        else Row(label=check.name, value="–", note="A marginal verdict claims neither side.")
        for check in report.checks
    ]
    rows.append(
        Row(
            label="P(diverge) on recorded runs",
            value=f"Brier score {number(c.brier)}",
            note=f"over {c.runs:,}, from which the interval of the critical step comes; benchmarks/verify.md has others",
        )
    )
    return Section(title=f"Confidence: {report.confidence}", rows=tuple(rows))


def _about(report: Report) -> Section:
    run, rollout = report.run, report.rollout
    settings = ", ".join(f"{key}={setting(value)}" for key, value in run.settings.items())
    return Section(
        title="The run",
        rows=(
            Row(label="algorithm", value=run.algorithm, note=settings),
            Row(
                label="model", value=f"{run.model}, {run.parameters:,} parameters", note=f"{run.dtype} on {run.device}"
            ),
            Row(
                label="data",
                value=f"{run.retain_size:,} retain, {run.forget_size:,} forget",
                note=f"{run.loss}; batches of {run.batch_sizes[0]} and {run.batch_sizes[1]}; BatchNorm {run.batchnorm}",
            ),
            Row(
                label="prediction",
                value=f"{report.mode}: {rollout.seeds} rollouts in {rollout.rank} "
                + ("sampled parameters" if report.run.adaptive else "directions"),
                note=f"{rollout.samples[0]} retain and {rollout.samples[1]} forget samples linearised"
                + (f"; {rollout.real_steps:.3g} steps taken on the real network" if rollout.real_steps else "")
                + f"; seed {run.seed}",
            ),
            Row(label="versions", value=", ".join(f"{k} {v}" for k, v in run.versions.items())),
        ),
    )


def _costs(report: Report) -> Section:
    seconds = sum(c.seconds for c in report.costs)
    gradients = sum(c.gradient_equivalents for c in report.costs)
    run_cost = report.run.steps * sum(report.run.batch_sizes)
    return Section(
        title="Cost",
        rows=(
            *(
                Row(label=c.stage, value=f"{c.seconds:.2f} s", note=f"{c.gradient_equivalents:,.0f} sample gradients")
                if c.seconds
                else Row(label=c.stage, value="none", note="taken over from an earlier report on the same problem")
                for c in report.costs
            ),
            Row(
                label="together",
                value=f"{seconds:.2f} s",
                note=f"{gradients:,.0f} sample gradients; the run itself takes {run_cost:,}",
            ),
        ),
    )


def report_text(report: Report) -> str:
    """The report as plain text.

    Args:
        report: The report.

    Returns:
        Several lines.
    """
    lines = [f"{report.verdict.upper()}  {headline(report)}", ""]
    lines += ["What to do", *(f"  {i}. {text}" for i, text in enumerate(report.advice, 1)), ""]
    for section in sections(report):
        if not section.rows:
            continue
        lines.append(section.title)
        wide = max(len(row.label) for row in section.rows)
        for row in section.rows:
            note = f"  ({row.note})" if row.note else ""
            lines.append(f"  {row.label:<{wide}}  {row.value}{note}")
        lines.append("")
    return "\n".join(lines).rstrip()


@cache
def _template(name: str) -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stabkit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _embedded(figure: Figure) -> str:
    """The figure as a base64 PNG, closed afterwards."""
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def report_html(report: Report) -> str:
    """The report as an HTML fragment for a notebook; no script, no network.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    return _template("fragment.html").render(
        report=report,
        headline=headline(report),
        sections=sections(report),
        figures=[("Predicted run", _embedded(report.plot()[0]))],
        tables=[],
    )


def table_html(table: Table) -> str:
    """A table as an HTML fragment.

    Args:
        table: The table.

    Returns:
        HTML.
    """
    return _template("tables.html").render(tables=[table])


def report_page(
    report: Report,
    *,
    frontier: Frontier | None = None,
    outcomes: Sequence[Outcome] = (),
    tables: Sequence[Table] = (),
) -> str:
    """The report as one HTML page with its plots inside.

    Args:
        report: The report.
        frontier: A frontier to draw; where it is None the page says why there is none.
        outcomes: Real runs to mark on it.
        tables: Tables to put before the evidence.

    Returns:
        HTML.
    """
    figures: list[tuple[str, str | None]] = [("Predicted run", _embedded(report.plot()[0]))]
    if frontier is None:
        figures.append(("Stability frontier", None))
    else:
        title = "P(diverge) over step sizes" if report.fixed_mix else "Stability frontier"
        if report.calibration.kind == "staged":  # whose critical step size may be another
            title += ", from the one linearisation alone"
        figures.append((title, _embedded(frontier.plot(outcomes=outcomes)[0])))
    return _template("page.html").render(
        report=report,
        headline=headline(report),
        sections=sections(report),
        figures=figures,
        tables=tables,
    )
