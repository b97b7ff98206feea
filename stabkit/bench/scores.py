"""How right the predictions were: over settings, over boundaries, and for the baselines beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, log_loss, roc_auc_score

from stabkit.bench.records import CellResult, Prediction, Record

GROWTH = math.log(1e3)  # of the mean square, which the growth rule calls divergence
CERTAIN = 1e-3  # what one wrong certainty may cost in log loss

KINDS = ("one", "staged")
BOUNDARIES = (*KINDS, "again")
REAL = ("observed", "again")  # runs whose boundaries a prediction is about: it knows the batches of neither


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How right one predictor was. What needs both outcomes is NaN where only one occurs.

    Attributes:
        balanced_accuracy: Mean of the shares of diverging and of stable runs that were called so, at P = 1/2.
        auc: Area under the ROC curve; NaN for a rule without a score.
        brier: Mean squared error of P(diverge); NaN for a rule without a probability.
        log_loss: Mean of -ln P of what happened, P kept within 0.001 of certainty; NaN likewise.
        step_ratio: Median of predicted over observed divergence step, where both are; NaN where none is.
    """

    balanced_accuracy: float
    auc: float
    brier: float
    log_loss: float
    step_ratio: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one cell, or of several pooled.

    Attributes:
        settings: Number of real runs.
        share_diverged: Share of them that diverged.
        one: P from one linearisation.
        staged: P from the staged rollout.
        growth: K·ln ρ(T_η) > ln 1000, and as a score.
        step_limit: η > 2(1+β)/λ_max(D).
        coherence_rule: The coherence rule.
        again: A real run with other batches, in a predictor's place: what the batches alone leave open.
    """

    settings: int
    share_diverged: float
    one: Quality
    staged: Quality
    growth: Quality
    step_limit: Quality
    coherence_rule: Quality
    again: Quality


def scores(records: Sequence[Record]) -> Scores:
    """Score some settings.

    Args:
        records: At least one setting.

    Returns:
        The scores.

    Raises:
        ValueError: If there is no setting.
    """
    if not records:
        raise ValueError("`records` of `scores` must hold at least one setting; got none. Run a cell first.")
    happened = np.array([r.diverged for r in records])
    both = 0 < happened.sum() < happened.size

    def rule(calls: np.ndarray, score: np.ndarray | None = None) -> Quality:
        return Quality(
            balanced_accuracy=float(balanced_accuracy_score(happened, calls)) if both else math.nan,
            auc=float(roc_auc_score(happened, score)) if both and score is not None else math.nan,
            brier=math.nan,
            log_loss=math.nan,
            step_ratio=math.nan,
        )

    def predictor(said: Sequence[Prediction]) -> Quality:
        p = np.array([prediction.probability for prediction in said])
        ratios = [
            prediction.step / record.divergence_step
            for prediction, record in zip(said, records, strict=True)
            if prediction.step is not None and record.divergence_step  # past the level at step 0 there is no ratio
        ]
        return replace(
            rule(p >= 0.5, p),
            brier=float(brier_score_loss(happened.astype(int), p, pos_label=1)),
            log_loss=float(log_loss(happened, p.clip(CERTAIN, 1 - CERTAIN), labels=[False, True])),
            step_ratio=float(np.median(ratios)) if ratios else math.nan,
        )

    growth = np.nan_to_num(np.array([r.growth for r in records]), neginf=-1e300, posinf=1e300)
    return Scores(
        settings=len(records),
        share_diverged=float(happened.mean()),
        one=predictor([r.one for r in records]),
        staged=predictor([r.staged for r in records]),
        growth=rule(growth > GROWTH, growth),
        step_limit=rule(np.array([r.lr > r.step_limit for r in records])),
        coherence_rule=rule(np.array([r.coherence_rule for r in records])),
        again=rule(np.array([r.again for r in records])),
    )


def pooled(results: Sequence[CellResult]) -> Scores:
    """Score all settings of several cells together.

    Args:
        results: The cells, all of one role: what was calibrated on is never pooled with what is evaluated.

    Returns:
        The scores.

    Raises:
        ValueError: If the cells are of different roles.
    """
    roles = {result.cell.role for result in results}
    if len(roles) > 1:
        raise ValueError(
            f"`results` of `pooled` must be of one role; got {', '.join(sorted(roles))}. Split them first."
        )
    return scores([record for result in results for record in result.records])


def boundary_ratios(result: CellResult, kind: str, *, of: str = "observed") -> list[float]:
    """Predicted over real critical step size, for every mix whose boundary the grid brackets in both.

    Args:
        result: One cell's settings for one seed.
        kind: "one", "staged", or "again" for the runs with other batches.
        of: Whose real critical step size, "observed" or "again".

    Returns:
        Ratios, at most one a mix.
    """
    pairs = [(getattr(boundary, kind), getattr(boundary, of)) for boundary in result.boundaries]
    return [predicted / real for predicted, real in pairs if predicted is not None and real is not None]
