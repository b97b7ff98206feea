"""`tune`: an algorithm whose settings are predicted to hold and to forget enough, without a real run."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stabkit._errors import LowConfidenceWarning, TargetWarning, caller_level
from stabkit._validate import check_real
from stabkit.algorithms import Algorithm, resolve_algorithm
from stabkit.calibration import RISK
from stabkit.checks import CAPTURED, MARGIN, SAMPLES
from stabkit.data import Data
from stabkit.losses import CrossEntropy, Loss, PerSampleLoss
from stabkit.metrics.audit import check_held_out
from stabkit.predict import predict
from stabkit.problem import UnlearningProblem
from stabkit.remedy import BACKING_OFF, algorithm_at
from stabkit.report import Report

SPECTRUM_SAMPLES = 8  # of each set: the eigenvalues only say where to begin the scan of step sizes
LITTLE = 0.05  # of the way to the best constant prediction's loss, where no target is given
NEAR = 0.9  # of the way to the target, from where on it counts as reached where staged rollouts say another loss
# Of a report's checks those that say nothing of the run itself: a smaller step cannot pass them, as they are about what was
# measured, or only a much smaller one, which keeps a margin and forgets little.
NOT_OF_THE_RUN = frozenset({CAPTURED, SAMPLES, MARGIN, "relative eigen-residual", "error of TF32"})


def tune(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    algorithm: str | Algorithm = "graddiff",
    test: Data | None = None,
    forget_loss: float | None = None,
    risk: float = RISK,
    loss: str | PerSampleLoss | Loss = "cross_entropy",
    **settings: Any,
) -> Algorithm:
    """Choose step size, mix and number of steps from the predicted Pareto front.

    Of all that hold, the setting that harms the retain set least while the forget loss reaches a target. The front has no
    margin in the step size, as the ways out of `recommend` have, and rests on one linearisation: so a report is made of what
    was chosen, and the step size lowered while its rollouts are above the risk, or while a check says that the linearised
    network may be wrong there and a staged rollout, which takes real steps then, is above it.
    Forgetting has gone far enough where the forget samples look like samples that were never seen: hence the held-out loss
    as the target.

    Args:
        model: The trained network; never altered.
        forget: What to forget, in any form that `predict` takes.
        retain: What to retain, likewise.
        algorithm: A name, or an algorithm object; its `steps` are the most that are taken. A shorter run is the beginning of
            that one, with as many of the factors of its schedules; where its plan cannot be cut all steps are taken.
        test: Held-out data of the kind that is forgotten, whose typical loss becomes the target: of a cross-entropy that of
            the mean probability of the right labels, which a few confident mistakes leave alone; the mean of other losses.
            The forget set's mean loss is what is to reach it.
        forget_loss: The target itself, in place of `test`. With neither it is the best constant predictor's loss, as near as
            can be; a `TargetWarning` says where a given target is not reached, and where next to nothing is forgotten.
        risk: Largest P(diverge) by the rollouts alone, in (0, 1): what is chosen may lie close to the boundary, where a
            report's P, which also weighs how uncertain that is, is larger. A `LowConfidenceWarning` says where even the
            smallest step size that was tried is above it, and where a check of the report about what was chosen fails, but
            for that of the margin.
        loss: "cross_entropy", "causal_lm", "mse" or a callable giving per-sample losses.
        **settings: Anything else that `predict` takes but for `lr` and `mix`, which are chosen here: batch_size, steps,
            seed, progress; its mode is "standard" unless it or a budget is given.

    Returns:
        The algorithm, ready for `run`. Cost: one linearisation, the eigenvalues of few samples, rollouts of some 450
        settings, and one to six times what `Report.at` takes, at most one of them with a new mix, each with a staged rollout
        of one seed, about a run at most, where the linearised network may be wrong; in mode="thorough" staged rollouts of
        the ways out that `recommend` has, and those of such reports.

    Raises:
        TypeError: If an argument is none of `predict`'s, or is to be chosen here.
        ValueError: If both `test` and `forget_loss` are given, `test` holds samples of the other sets, the risk is out of
            its domain, or no setting holds.
    """
    if test is not None and forget_loss is not None:
        raise ValueError(
            f"`forget_loss` of `tune` must be left out where `test` is given; got {forget_loss!r}. The target is one or the "
            "other."
        )
    check_real(risk, name="risk", owner="tune", low=0, high=1, low_open=True, high_open=True)
    unknown = sorted(settings.keys() - inspect.signature(predict).parameters.keys())
    if unknown:
        raise TypeError(
            f"`tune` must be given what it or `predict` takes; got {unknown[0]!r}. `help(stabkit.predict)` lists it."
        )
    for name in sorted({"lr", "mix"} & settings.keys()):
        raise TypeError(
            f"`{name}` of `tune` must be left out, as it is what `tune` chooses; got {settings[name]!r}. `predict` takes it."
        )
    target = None if forget_loss is None else check_real(forget_loss, name="forget_loss", owner="tune")
    chosen = resolve_algorithm(algorithm, owner="tune")
    mode = "auto" if "budget" in settings else "standard"
    settings = {"mode": mode, "spectrum_samples": SPECTRUM_SAMPLES, **settings}
    if target is None and test is not None:
        problem = UnlearningProblem(
            model, forget, retain, loss=loss, test=test, device=settings.get("device"), dtype=settings.get("dtype")
        )
        assert problem.test is not None
        check_held_out(problem.test, problem, owner="tune")
        target = _typical_loss(problem)
    with _unwarned():  # of the step size that was begun with, which is not the one chosen
        report = predict(model, forget, retain, algorithm=chosen, loss=loss, **settings)
    found = report.recommend(risk=risk)
    wanted = report.run.divergence_level if target is None else target
    point = found.reaching(wanted)
    asked = chosen.replace(**report.run.settings)
    tuned, said = _holding(report, asked, algorithm_at(asked, point), risk)
    reached = said.rollout.forget_loss[-1]
    short = point.forget_loss < wanted or _way(report, reached, wanted) < NEAR
    if report.run.forget_loss >= wanted:
        warnings.warn(
            f"the forget loss is {report.run.forget_loss:.4g} before the run, and so past its target, {wanted:.4g}: by this "
            "measure nothing is left to forget, and the setting that harms least is chosen, however much it forgets. Give a "
            "higher `forget_loss`.",
            TargetWarning,
            stacklevel=caller_level(),
        )
    elif short and (target is not None or _way(report, reached, report.run.divergence_level) < LITTLE):
        why = "no setting that is predicted to hold does"
        if tuned.lr < point.lr:
            why = f"the step size that comes nearest, {point.lr:.3g}, may break the run, and {tuned.lr:.3g} is taken"
        elif point.forget_loss >= wanted:
            why = f"the one linearisation that the front rests on says {point.forget_loss:.4g} of the setting chosen"
        warnings.warn(
            f"the forget loss is predicted to come to {reached:.4g} and not to its target, {wanted:.4g}: {why}. Raise "
            f"`risk` or `steps`, {_closer(report)}or lower the target.",
            TargetWarning,
            stacklevel=caller_level(),
        )
    rolled = said.rollout.probability
    doubts = [f"P(diverge) {rolled:.2g} where at most {risk:.2g} is wanted"] * (rolled > risk)
    doubts += [
        f"{check.name} {_number(check.value)} ({check.remedy})"
        for check in said.checks
        if not check.passed and check.name != MARGIN  # near the boundary it may be
    ]
    if doubts:
        warnings.warn(
            f"the setting that was chosen, step size {tuned.lr:.3g}, mix {tuned.mix:.3g} and {tuned.steps} steps, is "
            f"predicted with low confidence to hold: {'; '.join(doubts)}. For a surer one {_closer(report)}take a smaller "
            "step size, or check with verify().",
            LowConfidenceWarning,
            stacklevel=caller_level(),
        )
    return tuned


def _holding(report: Report, asked: Algorithm, tuned: Algorithm, risk: float) -> tuple[Algorithm, Report]:
    """The setting, its step size lowered while its own report says that it may break; and that report."""
    before, after, lr = asked.settings(), tuned.settings(), tuned.lr
    with _unwarned():
        said = report.at(**{name: value for name, value in after.items() if value != before[name]})
        for factor in BACKING_OFF[1:]:
            if _holds(said, risk):
                break
            tuned = tuned.replace(lr=factor * lr)
            said = said.at(lr=tuned.lr)
    return tuned, said


def _holds(said: Report, risk: float) -> bool:
    """Whether the rollouts of a setting hold, and a staged one too where the linearised network may be wrong there."""
    if said.rollout.probability > risk:
        return False
    if said.mode == "thorough" or all(check.passed or check.name in NOT_OF_THE_RUN for check in said.checks):
        return True
    assert said._staged is not None  # as it was made here
    return said._staged() <= risk


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without warnings about settings that are only looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowConfidenceWarning)
        yield


def _closer(report: Report) -> str:
    """The mode that knows the boundary better, where there is one."""
    return (
        ""
        if report.mode == "thorough"
        else "take mode='thorough', which takes real steps where the linearised network is wrong, "
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _way(report: Report, forget_loss: float, target: float) -> float:
    """Share of the way from the forget loss before the run to a target."""
    before = report.run.forget_loss
    return (forget_loss - before) / (target - before) if target > before else 1.0


def _typical_loss(problem: UnlearningProblem) -> float | None:
    """Of the held-out samples: a mean of cross-entropies would be that of the few which are wrong."""
    if problem.test is None:
        return None
    losses = problem.losses(problem.test).double()
    if isinstance(problem.loss, CrossEntropy):
        return math.log(losses.numel()) - float(torch.logsumexp(-losses, 0))
    return float(losses.mean())
