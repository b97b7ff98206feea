"""Calibration: what `stabkit/calibration.json` ships, from recorded cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from stabkit.bench.records import CellResult
from stabkit.bench.scores import boundary_ratios
from stabkit.calibration import Bin, Calibration

SLOPE = 4.0  # set by hand
COVERAGE = 0.9  # of the interval of the critical step size
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


def fit_calibration(results: Sequence[CellResult], kind: str) -> Calibration:
    """How good the probability is on some cells, and the conformal factor of the critical step size.

    The slope is not fitted. For one linearisation least log loss asks for a lower one at hardly a better Brier score, and
    a run which leaves the loss of a half-trained model where it is would then be taken for a risk.

    Args:
        results: Cells that no evaluation contains.
        kind: "one" or "staged".

    Returns:
        The calibration, with its own runs' Brier score and reliability.

    Raises:
        ValueError: If a cell is one of the evaluation, or there is none.
    """
    wrong = sorted({r.cell.key for r in results if r.cell.role != "calibration"})
    if wrong or not results:
        raise ValueError(
            "`results` of `fit_calibration` must be cells of the calibration, at least one; got "
            f"{', '.join(wrong) or 'none'}. What is calibrated on cannot evaluate."
        )
    records = [record for result in results for record in result.records]
    scores = torch.tensor([getattr(r, kind).scores for r in records], dtype=torch.float64).T
    happened = torch.tensor([r.diverged for r in records], dtype=torch.float64)
    plain = Calibration(
        kind=kind, slope=SLOPE, step_factor=None, runs=len(records), cells=(), brier=None, reliability=()
    )

    p = plain.probability(scores)
    away = np.sort(np.abs(np.log([ratio for result in results for ratio in boundary_ratios(result, kind)])))
    rank = math.ceil(COVERAGE * (away.size + 1))
    return replace(
        plain,
        step_factor=float(np.exp(away[rank - 1])) if rank <= away.size else None,
        cells=tuple(dict.fromkeys(result.cell.key for result in results)),
        brier=float((p - happened).square().mean()),
        reliability=reliability(p.tolist(), happened.bool().tolist()),
    )
