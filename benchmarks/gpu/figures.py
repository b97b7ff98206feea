"""Predicted against observed critical step sizes, and what was said of every run, as one figure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

MARKERS = {"one": ("x", "one linearisation"), "staged": ("o", "staged rollouts")}


class Edge(NamedTuple):
    """A critical step size as predicted, by one linearisation ("one") or staged rollouts ("staged"), and as observed."""

    network: str
    kind: str
    predicted: float
    observed: float


class Said(NamedTuple):
    """P(diverge) of a run by staged rollouts, its step size over the observed critical one, and what became of it."""

    network: str
    ratio: float
    probability: float
    diverged: bool


def draw(edges: Iterable[Edge], runs: Iterable[Said], path: Path) -> Path:
    """Draw both and write the figure.

    Args:
        edges: Boundaries that both sides have.
        runs: Runs at mixes whose boundary was observed.
        path: The PNG file; its folder is made if missing.

    Returns:
        The path.
    """
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    edges, runs = list(edges), list(runs)
    networks = list(dict.fromkeys([*(e.network for e in edges), *(r.network for r in runs)]))
    colours = {name: f"C{place}" for place, name in enumerate(networks)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
    ends = np.array([v for e in edges for v in (e.predicted, e.observed)] or [0.1, 1.0])
    ends = np.array([ends.min() / 1.5, ends.max() * 1.5])
    left.plot(ends, ends, color="grey", linewidth=1)
    left.fill_between(ends, ends / 1.5, ends * 1.5, color="grey", alpha=0.2, linewidth=0)
    for edge in edges:
        colour = colours[edge.network]
        filled = {"facecolors": "none", "edgecolors": colour} if edge.kind == "staged" else {"color": colour}
        left.scatter(edge.observed, edge.predicted, marker=MARKERS[edge.kind][0], s=34, zorder=3, **filled)
    left.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    left.set(xlabel="observed critical step size", ylabel="predicted", title="critical step sizes (band: 1.5 times)")
    spread = np.random.default_rng(0).uniform(-0.012, 0.012, len(runs))  # many lie on each other at 0 and at 1
    for said, shift in zip(runs, spread, strict=True):
        marker = "x" if said.diverged else "."
        right.scatter(
            said.ratio, said.probability + shift, s=18, marker=marker, color=colours[said.network], linewidths=0.9
        )
    right.axvline(1, color="grey", linewidth=1)
    right.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    right.set(xscale="log", xlabel="step size / observed critical one", ylabel="P(diverge), staged rollouts")
    ticks = [0.125, 0.25, 0.5, 1, 2, 4, 8]
    right.set(title="runs (crosses: diverged)", xticks=ticks, xticklabels=[f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    handles = [Line2D([], [], color=colours[name], marker="s", linestyle="", label=name) for name in networks]
    handles += [
        Line2D([], [], color="black", marker=marker, fillstyle="none", linestyle="", label=label)
        for marker, label in MARKERS.values()
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
