"""Where predictions were wrong: how many runs, which way, how near to the boundary, and the worst cells to be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stabkit.bench.records import CellResult, Record
from stabkit.bench.scores import KINDS, scores

WORST = 6  # cells that are drawn
LATE = 0.9  # of the steps, after which a divergence is late
NEAR = 2.0  # times the observed critical step size, either way


@dataclass(frozen=True, kw_only=True)
class Misses:
    """Settings on whose outcome one kind of rollout was wrong.

    Attributes:
        runs: How many.
        called_stable: Those that diverged all the same; the others were called diverging and did not.
        late: Of these, those that did so in the last tenth of their steps.
        by_batches: Those on which the real run with other batches was wrong too: its outcome was the predicted one.
        near: Those within a factor of two of the observed critical step size at their mix.
        cells: Missed runs by cell, the most first.
    """

    runs: int
    called_stable: int
    late: int
    by_batches: int
    near: int
    cells: dict[str, int]


def misses(results: Sequence[CellResult], kind: str) -> Misses:
    """Count what one kind of rollout missed.

    Args:
        results: Cells and seeds.
        kind: "one" or "staged".

    Returns:
        The counts.
    """
    found = [(result, record) for result in results for record in result.records if _wrong(record, kind)]
    counts: dict[str, int] = {}
    for result, _ in found:
        counts[result.cell.key] = counts.get(result.cell.key, 0) + 1
    return Misses(
        runs=len(found),
        called_stable=sum(record.diverged for _, record in found),
        late=sum((record.divergence_step or 0) > LATE * result.cell.steps for result, record in found),
        by_batches=sum(record.again != record.diverged for _, record in found),
        near=sum(_near(result, record) for result, record in found),
        cells=dict(sorted(counts.items(), key=lambda item: -item[1])),
    )


def _wrong(record: Record, kind: str) -> bool:
    return (getattr(record, kind).probability >= 0.5) != record.diverged


def _near(result: CellResult, record: Record) -> bool:
    """Whether the setting is within a factor of two of the observed boundary at its mix."""
    observed = next((b.observed for b in result.boundaries if b.mix == record.mix), None)
    return observed is not None and abs(math.log(record.lr / observed)) <= math.log(NEAR)


def worst(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Outcomes and predicted boundaries of the cells that staged rollouts are least right about.

    Args:
        results: Cells and seeds.

    Returns:
        Plain data of up to six cells, each with one seed: the settings as (lr, mix, diverged, P staged), the boundaries as
        (mix, observed, staged, one), and its balanced accuracies.
    """

    def accuracy(result: CellResult) -> float:
        found = scores(result.records).staged.balanced_accuracy
        return 1.0 if math.isnan(found) else found

    panels: list[dict[str, Any]] = []
    for result in sorted(results, key=accuracy):
        if len(panels) == WORST or result.cell.key in {panel["cell"] for panel in panels}:
            continue
        found = scores(result.records)
        panels.append({
            "cell": result.cell.key,
            "seed": result.seed,
            "balanced_accuracy": {kind: getattr(found, kind).balanced_accuracy for kind in KINDS},
            "settings": [[r.lr, r.mix, r.diverged, r.staged.probability] for r in result.records],
            "boundaries": [[b.mix, b.observed, b.staged, b.one] for b in result.boundaries],
        })
    return panels


def draw_worst(panels: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what `worst` found: runs over step size and mix, both predicted boundaries, and the missed runs.

    Args:
        panels: Its result.
        path: The image to write; its folder is made if missing.
    """
    from matplotlib import pyplot as plt

    rows = max(1, math.ceil(len(panels) / 3))
    figure, axes = plt.subplots(rows, 3, figsize=(11, 3.3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        mixes = sorted({mix for _, mix, _, _ in panel["settings"]})
        place = {mix: k for k, mix in enumerate(mixes)}
        for lr, mix, diverged, p in panel["settings"]:
            axis.plot(
                place[mix], lr, "o", markersize=5, markeredgecolor="#333333", color="#333333" if diverged else "white"
            )
            if (p >= 0.5) != diverged:
                axis.plot(
                    place[mix], lr, "o", markersize=11, markeredgecolor="#cc0000", color="none", markeredgewidth=1.5
                )
        for column, colour, name in ((2, "#d55e00", "staged"), (3, "#0072b2", "one linearisation")):
            lrs = [math.nan if b[column] is None else b[column] for b in panel["boundaries"]]
            at = [place[b[0]] for b in panel["boundaries"]]
            axis.plot(at, lrs, color=colour, linewidth=1.4, marker="_", markersize=12, label=name)
        axis.set(yscale="log", xlabel="mix", ylabel="step size")
        axis.set_xticks(np.arange(len(mixes)), [f"{mix:g}" for mix in mixes])
        said = panel["balanced_accuracy"]
        axis.set_title(f"{panel['cell']}, seed {panel['seed']}\n{said['staged']:.3f} / {said['one']:.3f}", fontsize=9)
    if panels:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            [f"boundary, {name}" for name in names],
            loc="outside lower center",
            ncols=2,
            frameon=False,
            fontsize=9,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
