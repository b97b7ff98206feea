"""Every figure of the library. Each takes a result and returns figure and axes; none calls `show`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from stabkit.coherence import Coherence
from stabkit.frontier import Frontier, Outcome
from stabkit.heavy_tail import LayerSpectrum
from stabkit.metrics import Audit, Estimate, ModelAudit
from stabkit.metrics.membership import SETS
from stabkit.recommendations import Recommendations
from stabkit.report import Report
from stabkit.spectrum import SpectralDensity
from stabkit.stability import StabilityMap

HIGHEST = 1e3  # of the divergence level: losses beyond ten times that are drawn at the top
# Of a legend that may lie on curves.
BEHIND: dict[str, Any] = {"frameon": True, "framealpha": 0.7, "edgecolor": "none"}
COLOURS = {"stable": "#2a7f62", "marginal": "#b7791f", "diverges": "#b3382c"}


def figure_of(ax: Axes | None, *, size: tuple[float, float] = (6.4, 4.4)) -> tuple[Figure, Axes]:
    """The given axes with their figure, or new ones.

    Args:
        ax: Axes, or None.
        size: Size of a new figure, in inches.

    Returns:
        Figure and axes.
    """
    if ax is not None:
        return ax.get_figure(), ax  # type: ignore[return-value]
    figure, new = plt.subplots(figsize=size, layout="constrained")
    return figure, new


def _edges(values: np.ndarray, *, logarithmic: bool) -> np.ndarray:
    """Cell edges around cell centres."""
    centres = np.log(values) if logarithmic else values.astype(float)
    if centres.size == 1:
        edges = np.array([centres[0] - 0.5, centres[0] + 0.5])
    else:
        middle = (centres[1:] + centres[:-1]) / 2
        edges = np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
    return np.exp(edges) if logarithmic else edges


def plot_front(found: Recommendations, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Forget loss against retain loss: the Pareto front, the setting that was asked about and the ways out.

    Args:
        found: The recommendations.
        ax: Axes to draw in; new ones when None.

    Returns:
        Figure and axes.
    """
    figure, axes = figure_of(ax)
    front = found.front
    axes.plot(
        [p.retain_loss for p in front],
        [p.forget_loss for p in front],
        color="grey",
        marker=".",
        linewidth=1,
        label="Pareto front",
    )
    markers = itertools.cycle("*osD^vPXh")
    unsure = ", orange is unsure" if any(item.unsure for item in (found.asked, *found.items)) else ""
    for name, item in (("as asked", found.asked), *((i.remedy, i) for i in found.items)):
        if not (math.isfinite(item.retain_loss) and math.isfinite(item.forget_loss)):
            continue
        colour = COLOURS["stable" if item.holds else "marginal" if item.unsure else "diverges"]
        axes.scatter(
            [item.retain_loss], [item.forget_loss], color=colour, marker=next(markers), s=60, zorder=3, label=name
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="predicted retain loss",
        ylabel="predicted forget loss",
        title=f"{found.algorithm}: green holds, red does not{unsure} (risk {found.risk:.3g})",
    )
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return figure, axes


def plot_frontier(
    frontier: Frontier, *, ax: Axes | None = None, outcomes: Sequence[Outcome] = ()
) -> tuple[Figure, Axes]:
    """P(diverge) over step size and mix, its one-half line, and what real runs did; a curve where there is but one mix.

    Args:
        frontier: The predicted map.
        ax: Axes to draw in; new ones when None.
        outcomes: Real runs to mark: circles stayed stable, crosses diverged.

    Returns:
        Figure and axes.
    """
    figure, ax = figure_of(ax, size=(7.2, 4.8))
    if frontier.mix.size == 1:
        _plot_step_sizes(frontier, ax, outcomes)
        return figure, ax
    mesh = ax.pcolormesh(
        _edges(frontier.mix, logarithmic=False),
        _edges(frontier.lr, logarithmic=True),
        frontier.probability,
        cmap="RdYlBu_r",
        vmin=0,
        vmax=1,
    )
    figure.colorbar(mesh, ax=ax, label="P(diverge) by rollouts")
    handles = []
    inside = np.isfinite(frontier.critical_lr)
    if inside.any():
        ax.plot(frontier.mix[inside], frontier.critical_lr[inside], color="black", linewidth=1.6)
        handles.append(Line2D([], [], color="black", linewidth=1.6, label="critical step size (P = 1/2)"))
    for diverged, marker, label in ((False, "o", "real run: stable"), (True, "X", "real run: diverged")):
        points = [o for o in outcomes if o.diverged == diverged]
        if points:
            (drawn,) = ax.plot([p.mix for p in points], [p.lr for p in points], marker, linestyle="", label=label)
            drawn.set(markersize=9, markerfacecolor="white", markeredgecolor="black", markeredgewidth=1.2)
            handles.append(drawn)
    ax.set_yscale("log")
    ax.set_xlabel("mix α (0: retain only, 1: forget only)")
    ax.set_ylabel("step size η")
    ax.set_title(f"{frontier.algorithm}: stability frontier")
    if handles:
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(handles), frameon=False)
    return figure, ax


def _plot_step_sizes(frontier: Frontier, ax: Axes, outcomes: Sequence[Outcome]) -> None:
    """P(diverge) against the step size; runs that stayed stable at the bottom, runs that diverged at the top."""
    ax.plot(frontier.lr, frontier.probability[:, 0], color="#4a6fa5", marker=".", label="P(diverge) by rollouts")
    critical = float(frontier.critical_lr[0])
    if math.isfinite(critical):
        ax.axvline(critical, color="black", linewidth=1.2, label=f"critical step size (P = 1/2), {critical:.3g}")
    for diverged, marker, label in ((False, "o", "real run: stable"), (True, "X", "real run: diverged")):
        lrs = [o.lr for o in outcomes if o.diverged == diverged]
        if lrs:
            (drawn,) = ax.plot(lrs, [float(diverged)] * len(lrs), marker, linestyle="", label=label, zorder=3)
            drawn.set(markersize=9, markerfacecolor="white", markeredgecolor="black", markeredgewidth=1.2)
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())  # labels between decades run into one another
    ax.set_ylim(-0.05, 1.05)
    ax.set_xlabel("step size η")
    ax.set_ylabel("P(diverge)")
    ax.set_title(f"{frontier.algorithm}: P(diverge) over step sizes")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def plot_stability_map(
    found: StabilityMap, *, steps: int, growth: float = 1.0, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """K·ln ρ over two settings, and the line of one growth.

    Args:
        found: The map.
        steps: Horizon K.
        growth: Factor G of the line K·ln ρ = ln G.
        ax: Axes to draw in; new ones when None.

    Returns:
        Figure and axes.
    """
    figure, ax = figure_of(ax, size=(7.2, 4.8))
    labels = {
        "lr": "step size η",
        "mix": "mix α (0: retain only, 1: forget only)",
        "retain_batch": "retain batch B_R",
        "forget_batch": "forget batch B_F",
        "batch": "batch size B",
        "momentum": "momentum β",
    }
    logarithmic = [name in {"lr", "retain_batch", "forget_batch", "batch"} for name in found.names]
    height = found.growth(steps)
    reach = float(np.clip(np.abs(height[np.isfinite(height)]), 1, 20).max(initial=1))
    mesh = ax.pcolormesh(
        _edges(found.values[1], logarithmic=logarithmic[1]),
        _edges(found.values[0], logarithmic=logarithmic[0]),
        np.clip(height, -reach, reach),
        cmap="RdYlBu_r",
        vmin=-reach,
        vmax=reach,
    )
    figure.colorbar(mesh, ax=ax, label=f"growth of E‖δ‖² over {steps} steps, K·ln ρ (cut at ±{reach:.0f})")
    if min(height.shape) > 1:
        for place, line in enumerate(found.contour(steps, growth)):
            ax.plot(
                line[:, 1],
                line[:, 0],
                color="black",
                linewidth=1.6,
                label=f"growth by {growth:g}" if place == 0 else None,
            )
            ax.legend(loc="upper right", frameon=True)
    ax.set_xlabel(labels[found.names[1]])
    ax.set_ylabel(labels[found.names[0]])
    ax.set_xscale("log" if logarithmic[1] else "linear")
    ax.set_yscale("log" if logarithmic[0] else "linear")
    ax.set_title("mean-square stability of the linearised run")
    return figure, ax


def plot_report(report: Report, *, axes: Sequence[Axes] | None = None) -> tuple[Figure, Sequence[Axes]]:
    """Predicted losses over the run beside the layers that carry the break.

    Args:
        report: The report.
        axes: Two axes to draw in; a new figure when None.

    Returns:
        Figure and the two axes.
    """
    if axes is None:
        figure, new = plt.subplots(1, 2, figsize=(10.5, 4.0), layout="constrained", width_ratios=(1.5, 1))
        axes = list(new)
    else:
        figure = axes[0].get_figure()  # type: ignore[assignment]
    _plot_losses(report, axes[0])
    _plot_layers(report, axes[1])
    return figure, axes


def _plot_losses(report: Report, ax: Axes, others: Sequence[Sequence[float]] = ()) -> float:
    """Predicted losses; returns the height at which larger losses are drawn, and the first that is not finite."""
    rollout, colour = report.rollout, COLOURS[report.verdict]
    curves = (rollout.retain_low, rollout.retain_high, rollout.retain_loss, rollout.forget_loss, *others)
    unit = abs(report.run.divergence_level) or 1.0  # of losses that may be negative
    largest = max((loss for curve in curves for loss in curve if math.isfinite(loss)), default=unit)
    top = 10 * max(unit, min(largest, HIGHEST * unit))
    low, high, retain, forget = (_upwards(curve, top) for curve in curves[:4])
    ax.fill_between(rollout.steps, low, high, color=colour, alpha=0.2)
    ax.plot(rollout.steps, retain, color=colour, label="retain, predicted")
    ax.plot(rollout.steps, forget, color="#4a6fa5", linestyle="--", label="forget, predicted")
    for curve, of in ((retain, colour), (forget, "#4a6fa5")):
        _mark_top(ax, rollout.steps, curve, top, of)
    ax.axhline(report.run.divergence_level, color="black", linewidth=1, linestyle=":", label="divergence level")
    if report.divergence_step is not None:
        ax.axvline(report.divergence_step, color=colour, linewidth=1, linestyle=":", label="predicted divergence step")
    if rollout.stopped_step < report.run.steps:
        ax.axvline(rollout.stopped_step, color="grey", linewidth=1, linestyle="-.", label="predicted early stop")
    ax.set_xlim(0, rollout.steps[-1])
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("mean loss")
    ax.set_title(f"{report.verdict}: P(diverge) = {report.probability:.2f}")
    ax.legend(**BEHIND, fontsize="small")
    return top


def _upwards(losses: Sequence[float], top: float) -> np.ndarray:
    """Losses for a logarithmic axis that ends at `top`: the first one that is not finite there, nothing after it."""
    array = np.array(losses, dtype=float)
    numbers = np.isfinite(array)
    array[numbers] = array[numbers].clip(1e-12, top)  # exactly zero has no place there
    first = np.flatnonzero(~numbers)
    if first.size:
        array[first[0]], array[first[0] + 1 :] = top, math.nan
    return array


def _mark_top(ax: Axes, steps: Sequence[int], losses: np.ndarray, top: float, colour: Any) -> None:
    """An arrow where a curve leaves the drawing."""
    at = np.flatnonzero(losses == top)
    if at.size:
        ax.plot([steps[at[0]]], [top], marker="^", color=colour, clip_on=False)


def _plot_layers(report: Report, ax: Axes) -> None:
    eigen = {s.name: s.share for s in report.cause.eigenvector_layers}
    moved = {s.name: s.share for s in report.cause.displacement_layers}
    names = sorted({*eigen, *moved}, key=lambda n: -max(eigen.get(n, 0.0), moved.get(n, 0.0)))[:10]
    place = np.arange(len(names))
    ax.barh(place - 0.2, [eigen.get(n, 0.0) for n in names], 0.4, color="#4a6fa5", label="breaking direction")
    ax.barh(place + 0.2, [moved.get(n, 0.0) for n in names], 0.4, color="#c98b3a", label="predicted movement")
    ax.set_yticks(place, names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of squared norm")
    mechanism = report.cause.mechanism
    ax.set_title(f"which layers ({mechanism})" if names and mechanism != "none" else "which layers")
    ax.legend(frameon=False, fontsize="small", loc="lower right")


def plot_trajectories(
    predicted: Report, runs: Sequence[tuple[str, Sequence[int], Sequence[float]]], *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Real retain losses over the predicted band; an arrow at the top where a loss is beyond it, or not finite.

    Args:
        predicted: The report about these settings.
        runs: Label, steps and retain losses of each real run.
        ax: Axes to draw in; new ones when None.

    Returns:
        Figure and axes.
    """
    given = ax is not None
    figure, ax = figure_of(ax, size=(8.4, 4.4))
    top = _plot_losses(predicted, ax, [losses for _, _, losses in runs])
    for label, steps, losses in runs:
        drawn = _upwards(losses, top)
        (line,) = ax.plot(steps, drawn, marker=".", linewidth=0.8, label=label)
        _mark_top(ax, steps, drawn, top, line.get_color())
    # Beside the curves, which are many; within axes of the caller's, beside which another may be.
    beside: dict[str, Any] = {} if given else {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    ax.legend(**BEHIND, **beside, fontsize="small")
    return figure, ax


def plot_density(
    density: SpectralDensity, *, ax: Axes | None = None, width: float | None = None
) -> tuple[Figure, Axes]:
    """Spectral density on a logarithmic scale, with its error band.

    Args:
        density: The quadratures.
        ax: Axes to draw in; new ones when None.
        width: Standard deviation of the smoothing Gaussian, in units of the eigenvalues; the density's own when None.

    Returns:
        Figure and axes.
    """
    figure, ax = figure_of(ax)
    curve = density.curve(width=width)
    grid, mean, error = (part.numpy() for part in (curve.grid, curve.density, curve.standard_error))
    floor = 0.1 / (density.size * curve.width * math.sqrt(2 * math.pi))  # a tenth of one eigenvalue's height
    ax.fill_between(
        grid,
        np.maximum(mean - error, floor),
        np.maximum(mean + error, floor),
        color="#4a6fa5",
        alpha=0.3,
        label=f"± one standard error of {density.nodes.shape[0]} probes",
    )
    ax.plot(grid, np.maximum(mean, floor), color="#4a6fa5", label=f"mean, smoothed by {curve.width:.2g}")
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("spectral density")
    ax.set_title(f"spectrum of {density.size} eigenvalues")
    ax.legend(frameon=False, fontsize="small")
    return figure, ax


def plot_esd(spectrum: LayerSpectrum, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Eigenvalue density of one layer on logarithmic axes, the same entries shuffled, the fitted tail and the random edge.

    Args:
        spectrum: The layer's eigenvalues and fit.
        ax: Axes to draw in; new ones when None.

    Returns:
        Figure and axes.

    Raises:
        ValueError: If the layer has no two different eigenvalues.
    """
    values, fit = spectrum.eigenvalues, spectrum.fit
    if len(values) < 2 or values[0] == values[-1]:
        raise ValueError(
            f"`spectrum` of `plot_esd` must have two different eigenvalues; got {len(values)} of layer {spectrum.name!r}: "
            f"{fit.reason}."
        )
    figure, ax = figure_of(ax)
    # The lowest thousandth would stretch the axis by orders of magnitude.
    low = min(
        np.quantile(values, 0.001), np.quantile(spectrum.shuffled, 0.001) if len(spectrum.shuffled) else values[-1]
    )
    high = max(values[-1], spectrum.shuffled.max(initial=0.0)) * 1.0001
    bins = np.geomspace(low, high, 2 + int(4 * len(values) ** (1 / 3)))
    widths = np.diff(bins)
    drawn = ((values, "#4a6fa5", "eigenvalues"), (spectrum.shuffled, "#8a8a8a", "entries in random order"))
    for numbers, colour, label in drawn:
        heights = np.histogram(numbers, bins)[0] / (max(1, len(numbers)) * widths)
        filled = numbers is values
        ax.stairs(heights, bins, fill=filled, color=colour, alpha=0.45 if filled else 1.0, linewidth=1.2, label=label)
    if fit.defined:
        grid, density = spectrum.tail()
        label = f"tail of {fit.n_tail}: ξ = {fit.exponent:.2f} ± {fit.standard_error:.2f}"
        ax.plot(grid, density, color="#b3382c", linewidth=1.8, label=label)
        ax.axvline(fit.lambda_min, color="#b3382c", linewidth=1, linestyle=":", label="start of the tail")
    ax.axvline(
        spectrum.mp_edge,
        color="black",
        linewidth=1,
        linestyle="--",
        label=f"Marchenko-Pastur edge, {spectrum.spikes} beyond",
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("eigenvalue λ of WᵀW")
    ax.set_ylabel("share of eigenvalues per unit of λ")
    ax.set_title(f"{spectrum.name}: {len(values)} eigenvalues")
    ax.legend(frameon=False, fontsize="small")
    return figure, ax


def plot_coherence(
    coherence: Coherence,
    *,
    ax: Axes | None = None,
    labels: tuple[Any, Any] | None = None,
    normalise: bool = True,
    max_samples: int = 300,
) -> tuple[Figure, Axes]:
    """S of retain and forget samples together as a heatmap (T11).

    Args:
        coherence: The coherence.
        ax: Axes to draw in; new ones when None.
        labels: Class of each retain and of each forget sample, to order and mark them by.
        normalise: Whether to divide S_ij by √(S_ii S_jj).
        max_samples: Samples to draw at most.

    Returns:
        Figure and axes.
    """
    figure, ax = figure_of(ax, size=(6.6, 5.6))
    drawn = coherence.heatmap(labels=labels, normalise=normalise, max_samples=max_samples)
    image = ax.imshow(drawn.values.numpy(), cmap="viridis", vmin=0, vmax=1 if normalise else None, interpolation="none")
    figure.colorbar(image, ax=ax, label="S_ij / √(S_ii S_jj)" if normalise else "S_ij = √tr(H_i H_j)")
    retain, forget = drawn.shown
    for draw in (ax.axhline, ax.axvline):
        for _, start, _ in drawn.groups:
            if start not in {0, retain}:
                draw(start - 0.5, color="white", linewidth=0.5, alpha=0.7)
        draw(retain - 0.5, color="#ff5a4d", linewidth=2)
    middles = [(retain - 1) / 2, retain + (forget - 1) / 2]
    # A class is named where its rows leave room for it.
    named = [
        (label, (start + stop - 1) / 2)
        for label, start, stop in drawn.groups
        if 40 * (stop - start) >= sum(drawn.shown)
    ]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(middles, ["retain", "forget"])
        axis.set_ticks([place for _, place in named], [str(label) for label, _ in named], minor=True)
        axis.remove_overlapping_locs = False  # a class in the middle of its set is named too
        axis.set_tick_params(which="major", length=0, pad=16 if named else 4)
        axis.set_tick_params(which="minor", length=2, labelsize="small")
    for text in ax.get_yticklabels():
        text.set(rotation=90, verticalalignment="center")
    total, shown = sum(coherence.samples), sum(drawn.shown)
    part = "" if shown == total else f"\n{retain} + {forget} of {coherence.samples[0]} + {coherence.samples[1]} samples"
    numbers = f"σ_R = {coherence.retain:.3g}, σ_F = {coherence.forget:.3g}, κ = {coherence.cross:.2g}"
    ax.set_title(f"coherence: {numbers}, σ_mix = {coherence.mixed:.3g}{part}")
    return figure, ax


def plot_audit(audit: Audit, *, axes: Sequence[Axes] | None = None) -> tuple[Figure, Sequence[Axes]]:
    """Every audited model beside the gold model: FA, RA, TA, MIA, and how far its predictions are from gold.

    Args:
        audit: The audit.
        axes: One axes to draw in for each of `Audit.panels`; a new figure when None.

    Returns:
        Figure and axes. Rates are in per cent; lines are intervals, and bands those of the gold model. The last axes hold
        KL(gold ‖ model) on each set, or the mean loss without a gold model. Where the loss has no classes the mean losses on
        the sets take the places of the accuracies, and there are no last axes. A model whose outputs are not finite has its
        row and no marks in it.
    """
    models = [model for model in audit.models if model.name != "gold"]
    gold = next((model for model in audit.models if model.name == "gold"), None)
    panels = audit.panels
    if axes is None:
        widths = [1.5 if panel == "distance" else 1 for panel in panels]
        size = (2.25 * sum(widths) + 0.2, 1.5 + 0.34 * len(models))
        figure, new = plt.subplots(1, len(panels), figsize=size, layout="constrained", width_ratios=widths)
        axes = list(new)
        band = "" if gold is None else "; the band is the gold model's"
        figure.suptitle(f"{100 * audit.level:g} % bootstrap intervals{band}", fontsize="medium")
    else:
        figure = axes[0].get_figure()  # type: ignore[assignment]
    finite = [model.forget.loss is not None for model in models]
    for ax, panel in zip(axes, panels, strict=True):
        if panel == "distance":
            _distances_to_gold(ax, models, gold is not None)
            continue
        losses = panel.endswith("loss")
        scale = 1 if losses else 100
        of_gold = None if gold is None else _found(gold, panel, audit.gap_attack)
        if of_gold is not None:
            ax.axvspan(scale * of_gold.low, scale * of_gold.high, color="#b7791f", alpha=0.2, linewidth=0)
            ax.axvline(scale * of_gold.value, color="#b7791f", linewidth=1.6)
        of_models = [
            _found(model, panel, audit.gap_attack) if fine else None for model, fine in zip(models, finite, strict=True)
        ]
        _intervals(ax, of_models, scale=scale, color="#333333", fmt="o")
        if losses:
            _log_scale(ax, [found for found in (*of_models, of_gold) if found is not None])
        ax.set_title(panel if losses else f"{panel}, %")
        ax.set_xlabel(f"called member\n{audit.gap_attack}" if panel == "MIA" else "")
    names = [model.name + ("" if fine else "\n(not finite)") for model, fine in zip(models, finite, strict=True)]
    for ax in axes:
        ax.set_yticks(range(len(models)), names if ax is axes[0] else [""] * len(models))
        ax.set_ylim(len(models) - 0.5, -0.5)
        ax.grid(axis="y", alpha=0.3)
    return figure, axes


def _found(model: ModelAudit, panel: str, attack: str) -> Estimate | None:
    """What a panel shows of a model: FA, RA, TA, MIA or the mean loss on a set."""
    if panel == "MIA":
        membership = model.attack(attack)
        return None if membership is None else membership.forget_called_member
    part = model.on({"FA": "forget", "RA": "retain", "TA": "test"}.get(panel) or panel.split()[0])
    if part is None:
        return None
    return part.loss if panel.endswith("loss") else part.accuracy


def _distances_to_gold(ax: Axes, models: Sequence[ModelAudit], to_gold: bool) -> None:
    """KL(gold ‖ model) of every model on each set, or its mean loss without a gold model."""
    found = {name: [_distance(model, name, to_gold) for model in models] for name in SETS}
    for place, (name, fmt) in enumerate(zip(SETS, "os^", strict=True)):
        _intervals(ax, found[name], offset=0.22 * (place - 1), color=f"C{place}", fmt=fmt, label=name)
    _log_scale(ax, [value for values in found.values() for value in values if value is not None])
    ax.set_title("KL(gold ‖ model), nats" if to_gold else "mean loss")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")


def _distance(model: ModelAudit, name: str, to_gold: bool) -> Estimate | None:
    """KL(gold ‖ model) on a set, or the mean loss."""
    part = model.on(name)
    if part is None or not to_gold:
        return None if part is None else part.loss
    return None if part.distances is None else part.distances.kl_from_gold


def _intervals(ax: Axes, rows: Sequence[Estimate | None], *, scale: float = 1, offset: float = 0, **style: Any) -> None:
    """A point with its interval in each row that has one."""
    shown = [(place + offset, found) for place, found in enumerate(rows) if found is not None]
    if shown:
        low, middle, high = (scale * np.array([(f.low, f.value, f.high) for _, f in shown])).T
        reach = np.maximum([middle - low, high - middle], 0)
        ax.errorbar(middle, [height for height, _ in shown], xerr=reach, markersize=4, linewidth=1.2, **style)


def _log_scale(ax: Axes, values: Sequence[Estimate]) -> None:
    """A logarithmic axis with readable ticks, where there is something above 0."""
    ends = [end for found in values for end in (found.low, found.high) if end > 0]
    if ends:
        ax.set_xscale("log")
        steps = (1, 2, 5) if max(ends) < 30 * min(ends) else (1,)
        ax.xaxis.set_major_locator(LogLocator(subs=steps))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
