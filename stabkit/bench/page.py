"""The benchmark as a page: tables by role and cell, the reliability curve and the boundary ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stabkit._serialise import write_atomically
from stabkit.bench.misses import NEAR, draw_worst
from stabkit.bench.records import HALVINGS, ROLLOUT_SEEDS, SPAN
from stabkit.bench.scores import KINDS
from stabkit.calibration import FAR_ERROR
from stabkit.modes import MODES

PREDICTORS = (
    ("stabkit, staged rollout (mode thorough)", "staged"),
    ("stabkit, one linearisation (mode standard)", "one"),
    ("K·ln ρ(T) > ln 1000", "growth"),
    ("η > 2(1+β)/λ_max(D)", "step_limit"),
    ("coherence rule", "coherence_rule"),
    ("a real run with other batches", "again"),
)
FIGURES = ("balanced_accuracy", "auc", "brier", "log_loss", "step_ratio")
MOST = 4  # cells that are named beside the misses
COLOURS = {"one": "#0072b2", "staged": "#d55e00"}
BELOW = {
    "near": f"one linearisation, error up to {FAR_ERROR:g} at half of it",
    "far": "one linearisation, beyond",
}
NAMES = {"one": "one linearisation", "staged": "staged", "again": "real runs with other batches"}


def write_page(summary: dict[str, Any], path: str | Path) -> Path:
    """Write a summary as Markdown with its figures beside it.

    Args:
        summary: What `verify_cells` gave.
        path: The page; figures lie in `figures` beside it.

    Returns:
        The path.
    """
    target = Path(path)
    parts = [
        "# Predictions against real runs",
        f"Seeds {summary['seeds']}, each of which adds as many runs to a cell as it has settings; versions "
        f"{summary['versions']}. Every prediction was made before the runs it is about.\n"
        f"Step sizes reach from the smallest predicted boundary over {SPAN:g} to {SPAN:g} times the largest; neighbours "
        f"differ by a factor of {_number(summary['grid_factor'])} (median).\n"
        f"Where the grid brackets a boundary, its interval is halved {HALVINGS} times, by further runs for the observed "
        "one and by further predictions for the predicted one.\n"
        "P(diverge) comes from the scores and boundaries recorded before the runs. Constants were chosen on the calibration "
        "cells alone; that staged rollouts go on with real steps was decided after misses on evaluation cells of seed 0 had "
        "been seen, and so was the stretch of half-trained models' scores, which moves P but never to the other side of one "
        "half; that a staged prediction here takes the three seeds of `predict`, not one to save time, after one's Brier "
        "score had. That P is half of what the rollouts say and half of what the boundary says was decided when the "
        "reliability of the rollouts alone had been seen on all cells; its width is that of the calibration cells. That "
        "both real runs of these give the interval, and for staged rollouts AdamW's cells too, was decided when it had held "
        "eight instead of nine in ten of the evaluation's critical step sizes. That intervals of one linearisation hang on "
        "its error below was decided after misses on a network that is none of these. That "
        "staged rollouts take a run's first steps for real was decided after a trial on a network that is none of these, "
        "and a look at those steps in a dozen cells, and that they hold the last steps before every place that they look at "
        "against real ones after a trial on cells that are none of these. That AdamW's runs are rolled out in sampled "
        "parameters, and in how many, was decided after a look at some of the cells' networks, those of evaluation cells "
        "among them.",
        *_without_path(summary["without_path"], summary["files"]),
        *([f"Not run: {', '.join(summary['missing'])}."] if summary["missing"] else []),
    ]
    for role, found in summary["roles"].items():
        place = role.lower().replace(" ", "_")
        figure = target.parent / "figures" / f"verify_{place}.png"
        _draw(found, figure)
        worst = figure.with_name(f"verify_{place}_worst.png")
        draw_worst(found["worst"], worst)
        parts += _section(role, found, f"figures/{figure.name}", f"figures/{worst.name}")
    return write_atomically(target, "\n\n".join(parts) + "\n")


def _without_path(keys: Sequence[str], files: int) -> list[str]:
    """Which records are of staged rollouts that looked less at where a run goes."""
    if not keys:
        return []
    return [
        f"{len(keys)} of {files} records are from before staged rollouts held the last steps before every place that they "
        f"look at against real ones: {', '.join(dict.fromkeys(keys))}."
    ]


def _section(role: str, found: dict[str, Any], figure: str, worst: str) -> list[str]:
    """Paragraphs of one role."""
    pool, boundary, cost = found["pooled"], found["boundary"], found["cost"]
    held = " or ".join(f"{retain} retain and {forget} forget samples" for retain, forget in found["most_samples"])
    standard = MODES["standard"]
    return [
        f"## {role[0].upper()}{role[1:]}",
        f"{pool['settings']:,} real runs on the grids, a share of {_number(pool['share_diverged'])} diverged, and "
        f"{found['boundary_runs']:,} more at the boundaries; each was run again with "
        "other batches, which is as far as a prediction that does not know the batches can go.\n"
        f"Up to {held} were linearised; `predict` takes up to "
        f"{standard.retain_samples} and {standard.forget_samples} unless its mode is fast.\n"
        f"A map of all settings from one linearisation costs {_number(cost['measure_over_run'])} + "
        f"{_number(cost['frontier_over_run'])} real runs (measuring + rolling out, medians, in CPU seconds). One staged "
        f"prediction, {len(ROLLOUT_SEEDS)} seeds, costs {_number(cost['staged_over_run'])} runs in CPU seconds and "
        f"{_number(cost['staged_over_run_gradients'])} in gradients: the runs are short.",
        _table(
            ("predictor", "balanced accuracy", "AUC", "Brier", "log loss", "divergence step, predicted / observed"),
            [
                (name, *(_number(quality[of]) for of in FIGURES))
                for name, quality in (
                    *((name, pool[key]) for name, key in PREDICTORS),
                    *((f"{NAMES[kind]}, its rollouts alone", found["rollouts_alone"][kind]) for kind in KINDS),
                )
            ],
        ),
        _table(
            (
                "critical step size",
                "boundaries",
                "median predicted / observed",
                "within 1.5",
                "within 2",
                "over 2 times too large",
                "real ones in the interval at nine in ten",
            ),
            [
                (
                    name,
                    b["boundaries"],
                    _number(b["median_ratio"]),
                    _number(b["within_1.5"]),
                    _number(b["within_2"]),
                    _number(b["over_2"]),
                    _number(b["in_interval"]),
                )
                for name, b in (
                    *((NAMES[kind], b) for kind, b in boundary.items()),
                    *(
                        (BELOW[place], b)
                        for place, b in found["one_by_error"].items()
                        if found["one_by_error"]["far"]["boundaries"]
                    ),
                )
            ],
        ),
        f"![reliability and boundary ratios]({figure})",
        "Where predictions were wrong:",
        _table(
            (
                "predictor",
                "missed runs",
                "called stable, diverged",
                "of these in the last tenth of the steps",
                "called diverging, held",
                "real run with other batches also wrong",
                f"within {NEAR:g} times the observed critical step",
                "most of them in",
            ),
            [_missed(NAMES[kind], m) for kind, m in found["misses"].items()],
        ),
        "The cells that staged rollouts are least right about, each with its worst seed: filled runs diverged, circled ones "
        "were called the other way by the staged rollout; balanced accuracy of staged rollout / one linearisation.",
        f"![worst cells]({worst})",
        "In every cell the staged rollout's figure comes first and the one linearisation's after it.",
        _table(
            ("cell", "runs", "diverged", "balanced accuracy", "AUC", "Brier", "boundaries", "within 1.5", "within 2"),
            [
                (
                    key,
                    cell["scores"]["settings"],
                    _number(cell["scores"]["share_diverged"]),
                    *(_both(cell["scores"], of) for of in ("balanced_accuracy", "auc", "brier")),
                    cell["boundary"]["staged"]["boundaries"],
                    *(_both(cell["boundary"], of) for of in ("within_1.5", "within_2")),
                )
                for key, cell in found["cells"].items()
            ],
        ),
    ]


def _missed(name: str, found: dict[str, Any]) -> tuple[object, ...]:
    """One kind's row of the table of misses."""
    most = ", ".join(f"{key} ({count})" for key, count in list(found["cells"].items())[:MOST])
    return (
        name,
        found["runs"],
        found["called_stable"],
        found["late"],
        found["runs"] - found["called_stable"],
        found["by_batches"],
        found["near"],
        most or "–",
    )


def _both(found: dict[str, Any], of: str) -> str:
    """A figure of both kinds of rollout."""
    return f"{_number(found['staged'][of])} / {_number(found['one'][of])}"


def _draw(found: dict[str, Any], path: Path) -> None:
    """Reliability curve beside a histogram of boundary ratios, for both kinds of rollout."""
    import numpy as np
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    for kind, colour in COLOURS.items():
        bins = found["reliability"][kind]
        sizes = [12 * math.log2(1 + b["settings"]) for b in bins]
        left.plot(
            [b["said"] for b in bins], [b["happened"] for b in bins], color=colour, linewidth=1, label=NAMES[kind]
        )
        left.scatter([b["said"] for b in bins], [b["happened"] for b in bins], s=sizes, color=colour, zorder=3)
        ratios = np.clip(np.array(found["ratios"][kind]), 0.1, 10)
        right.hist(np.log10(ratios), bins=np.linspace(-1, 1, 25), histtype="step", color=colour, linewidth=1.6)
    left.legend(frameon=False)
    left.set(xlabel="predicted P(diverge)", ylabel="share that diverged", title="reliability (area: number of runs)")
    for factor in (1 / 2, 1 / 1.5, 1.5, 2):
        right.axvline(math.log10(factor), color="black", linewidth=0.8, linestyle=":")
    right.set_xticks([-1, -0.5, 0, 0.5, 1], ["0.1", "0.32", "1", "3.2", "10"])
    right.set(xlabel="predicted / observed critical step", ylabel="boundaries", title="dotted: 1.5 and 2 times")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _number(value: Any) -> str:
    """Three significant digits; a dash for what is not defined."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
