"""`tune`: an algorithm whose settings are predicted to hold and to forget enough, without a real run."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
from torch import nn

from stabkit._errors import TargetWarning, caller_level
from stabkit._validate import check_real
from stabkit.algorithms import Algorithm, resolve_algorithm
from stabkit.calibration import RISK
from stabkit.data import Data
from stabkit.losses import CrossEntropy, Loss, PerSampleLoss
from stabkit.metrics.audit import check_held_out
from stabkit.predict import predict
from stabkit.problem import UnlearningProblem
from stabkit.remedy import algorithm_at
from stabkit.report import Report

SPECTRUM_SAMPLES = 8  # of each set: the eigenvalues only say where to begin the scan of step sizes
HALVINGS = 4  # of the step size, while staged rollouts do not confirm it
LITTLE = 0.05  # of the way to the best constant prediction's loss, where no target is given


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

    Of all that hold, the setting that harms the retain set least while the forget loss reaches a target; the front has no
    margin in the step size, as the ways out of `recommend` have. Forgetting has gone far enough where the forget samples
    look like samples that were never seen: hence the held-out loss as the target.

    Args:
        model: The trained network; never altered.
        forget: What to forget, in any form that `predict` takes.
        retain: What to retain, likewise.
        algorithm: A name, or an algorithm object; its `steps` are the most that are taken.
        test: Held-out data of the kind that is forgotten, whose typical loss becomes the target: of a cross-entropy that of
            the mean probability of the right labels, which a few confident mistakes leave alone; the mean of other losses.
            The forget set's mean loss is what is to reach it.
        forget_loss: The target itself, in place of `test`. With neither it is the best constant predictor's loss, as near as
            can be; a `TargetWarning` says where a given target is not reached, and where next to nothing is forgotten.
        risk: Largest P(diverge) by the rollouts alone, in (0, 1): what is chosen may lie close to the boundary, where a
            report's P, which also weighs how uncertain that is, is larger.
        loss: "cross_entropy", "causal_lm", "mse" or a callable giving per-sample losses.
        **settings: Anything else that `predict` takes but for `lr` and `mix`, which are chosen here: batch_size, steps,
            seed, progress; its mode is "standard" unless it or a budget is given.

    Returns:
        The algorithm, ready for `run`. Cost: one linearisation, the eigenvalues of few samples, and rollouts of some 450
        settings; in mode="thorough" also staged rollouts of the chosen setting, whose step size is lowered until they hold.

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
    report = predict(model, forget, retain, algorithm=chosen, loss=loss, **settings)
    found = report.recommend(risk=risk)
    wanted = report.run.divergence_level if target is None else target
    point = found.reaching(wanted)
    if report.run.forget_loss >= wanted:
        warnings.warn(
            f"the forget loss is {report.run.forget_loss:.4g} before the run, and so past its target, {wanted:.4g}: by this "
            "measure nothing is left to forget, and the setting that harms least is chosen, however much it forgets. Give a "
            "higher `forget_loss`.",
            TargetWarning,
            stacklevel=caller_level(),
        )
    elif point.forget_loss < wanted and (target is not None or _way(report, point.forget_loss) < LITTLE):
        warnings.warn(
            f"no setting that is predicted to hold brings the forget loss to {wanted:.4g}; the one chosen brings it to "
            f"{point.forget_loss:.4g}. Raise `risk` or `steps`, or lower the target.",
            TargetWarning,
            stacklevel=caller_level(),
        )
    tuned = algorithm_at(chosen.replace(**report.run.settings), point)
    for _ in range(HALVINGS if report.mode == "thorough" else 0):
        if report.at(lr=tuned.lr, steps=tuned.steps, **_mix(tuned)).rollout.probability <= risk:
            break
        tuned = tuned.replace(lr=tuned.lr / 2)
    return tuned


def _way(report: Report, forget_loss: float) -> float:
    """Share of the way from the forget loss before the run to that of the best constant prediction."""
    before = report.run.forget_loss
    return (forget_loss - before) / (report.run.divergence_level - before)


def _mix(algorithm: Algorithm) -> dict[str, float]:
    """The mix, where it is one's to choose."""
    return {} if algorithm.fixed_mix else {"mix": algorithm.mix}


def _typical_loss(problem: UnlearningProblem) -> float | None:
    """Of the held-out samples: a mean of cross-entropies would be that of the few which are wrong."""
    if problem.test is None:
        return None
    losses = problem.losses(problem.test).double()
    if isinstance(problem.loss, CrossEntropy):
        return math.log(losses.numel()) - float(torch.logsumexp(-losses, 0))
    return float(losses.mean())
