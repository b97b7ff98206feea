"""Calibration: what `stabkit/calibration.json` ships, from recorded cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stabkit.bench.records import Boundary, CellResult, Prediction, Record
from stabkit.bench.scores import KINDS, REAL, boundary_ratios
from stabkit.calibration import COVERAGE, Bin, Calibration, combined, kind_at

SLOPE = 4.0  # set by hand
BINS = 10


def reliability(said: Sequence[float], happened: Sequence[bool]) -> tuple[Bin, ...]:
    """Mean P(diverge) and share diverged in ten equal bins of P; empty ones are left out.

    Args:
        said: Probabilities.
        happened: Whether each run diverged.

    Returns:
        The bins.
    """
    p, y = np.asarray(said, dtype=float), np.asarray(happened, dtype=float)
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    return tuple(
        Bin(said=float(p[place == b].mean()), happened=float(y[place == b].mean()), settings=int(n))
        for b in range(BINS)
        if (n := (place == b).sum())
    )


def fit_calibration(
    results: Sequence[CellResult], kind: str, *, name: str | None = None, sided: bool = False
) -> Calibration:
    """How good the probability is on some cells, and the conformal factor of the critical step size.

    Every boundary counts twice, with that of either real run: an interval is of where a run with any batches breaks.
    The slope is not fitted. For one linearisation least log loss asks for a lower one at hardly a better Brier score, and
    a run which leaves the loss of a half-trained model where it is would then be taken for a risk.

    Args:
        results: Cells that no evaluation contains.
        kind: "one" or "staged".
        name: What it is shipped as; the kind when None.
        sided: Whether the interval has a factor for either end, each for one boundary in twenty, or one for both.

    Returns:
        The calibration, with its own runs' Brier score and reliability.

    Raises:
        ValueError: If a cell is one of the evaluation, or there is none.
    """
    wrong = sorted({r.cell.key for r in results if not r.cell.role.endswith("calibration")})
    if wrong or not results:
        raise ValueError(
            "`results` of `fit_calibration` must be cells of the calibration, at least one; got "
            f"{', '.join(wrong) or 'none'}. What is calibrated on cannot evaluate."
        )
    logs = np.log([ratio for result in results for of in REAL for ratio in boundary_ratios(result, kind, of=of)])
    count = sum(
        getattr(b, kind) is not None and (b.observed or b.again) is not None for r in results for b in r.boundaries
    )
    each = (1 + COVERAGE) / 2
    below, above = (_conformal(logs, each, count), _conformal(-logs, each, count)) if sided else (None, None)
    fitted = Calibration(
        kind=name or kind,
        slope=SLOPE,
        step_factor=below if sided else _conformal(np.abs(logs), COVERAGE, count),
        step_factor_above=above,
        runs=sum(len(result.records) for result in results),
        cells=tuple(dict.fromkeys(result.cell.key for result in results)),
        brier=None,
        reliability=(),
    )
    said = [with_probabilities(result, {kind: fitted}) for result in results]
    p = [getattr(record, kind).probability for result in said for record in result.records]
    happened = [record.diverged for result in said for record in result.records]
    return replace(
        fitted,
        brier=float(np.square(np.array(p) - np.array(happened)).mean()),
        reliability=reliability(p, happened),
    )


def _conformal(logs: np.ndarray, share: float, boundaries: int) -> float | None:
    """The factor, at least 1, below which a share of ratios lies, by split conformal prediction; None of too few."""
    # Several runs of a boundary are alike: what counts are the boundaries (Dunn, Wasserman & Ramdas 2022).
    rank = math.ceil(share * (boundaries + 1) * logs.size / boundaries) if boundaries else 1
    return max(1.0, float(np.exp(np.sort(logs)[rank - 1]))) if rank <= logs.size else None


def by_error(results: Sequence[CellResult]) -> tuple[list[CellResult], list[CellResult]]:
    """Boundaries of one linearisation that is near the network at half the critical step size, and those where it is far.

    Args:
        results: Cells.

    Returns:
        Either with the settings at their mixes. Where no boundary was found or nobody looked, settings are with the former.
    """
    split: tuple[list[CellResult], list[CellResult]] = [], []
    for result in results:
        is_far = {b.mix: kind_at("one", b.error_below) == "far" for b in result.boundaries}
        for place, part in enumerate(split):
            records = tuple(r for r in result.records if is_far.get(r.mix, False) == bool(place))
            boundaries = tuple(b for b in result.boundaries if is_far[b.mix] == bool(place))
            if records:
                part.append(replace(result, records=records, boundaries=boundaries))
    return split


def of_boundary(calibrations: Mapping[str, Calibration], kind: str, boundary: Boundary | None) -> Calibration:
    """The calibration of a prediction, by how wrong the linearisation is below the boundary.

    Args:
        calibrations: By kind; "far" is taken for "one" where it is there and the linearisation is far.
        kind: "one" or "staged".
        boundary: The boundary; None where there is none.

    Returns:
        The calibration.
    """
    chosen = kind_at(kind, None if boundary is None else boundary.error_below)
    return calibrations.get(chosen, calibrations[kind])


def with_probabilities(result: CellResult, calibrations: Mapping[str, Calibration]) -> CellResult:
    """A cell with the probabilities that calibrations give what was recorded before its runs.

    They are a report's, but for the seeds' spread, which is not on record and by which a report's interval may be wider.

    Args:
        result: The cell's settings, with their scores and the predicted boundaries.
        calibrations: The calibration of each kind of rollout to look at; "far" beside "one" for its far boundaries.

    Returns:
        The same settings. Where the grid brackets no predicted boundary at a setting's mix, P is that of the rollouts alone.
    """
    boundaries = {b.mix: b for b in result.boundaries}

    def with_probability(record: Record, kind: str) -> Prediction:
        said: Prediction = getattr(record, kind)
        boundary = boundaries.get(record.mix)
        used = of_boundary(calibrations, kind, boundary)
        critical: float | None = None if boundary is None else getattr(boundary, kind)
        p = float(used.probability(torch.tensor(said.scores, dtype=torch.float64)))
        if critical is not None:
            p = combined(p, record.lr, critical, used.interval(critical, critical, critical))
        return replace(said, probability=p)

    def with_all(record: Record) -> Record:
        changes: dict[str, Any] = {kind: with_probability(record, kind) for kind in KINDS if kind in calibrations}
        return replace(record, **changes)

    return replace(result, records=tuple(map(with_all, result.records)))
