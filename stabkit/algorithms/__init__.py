"""Unlearning algorithms, one file each: a preconditioner, a mix, a batch scheme, a plan of steps and a stop rule (T1)."""

import warnings

import torch
from torch import nn

from stabkit._errors import ScheduleWarning, caller_level
from stabkit._validate import check_choice
from stabkit.algorithms.agu import AGU
from stabkit.algorithms.base import Algorithm, Batch, PlainSteps
from stabkit.algorithms.fine_tune import FineTune
from stabkit.algorithms.grad_diff import GradDiff
from stabkit.algorithms.gradient_ascent import GradientAscent
from stabkit.algorithms.l1_sparse import L1Sparse
from stabkit.algorithms.npo import NPO
from stabkit.algorithms.optimizers import optimizer_settings
from stabkit.algorithms.plan import StepPlan, StopRule
from stabkit.algorithms.random_labels import RandomLabels
from stabkit.algorithms.remain_newton import RemainNewton
from stabkit.algorithms.retrain import Retrained, retrain
from stabkit.algorithms.salun import SalUn
from stabkit.algorithms.scrub import SCRUB
from stabkit.algorithms.sfr_on import SFROn
from stabkit.algorithms.sragu import SRAGU

ALGORITHMS: dict[str, type[Algorithm]] = {
    cls.name: cls
    for cls in (
        AGU,
        FineTune,
        GradDiff,
        GradientAscent,
        L1Sparse,
        NPO,
        RandomLabels,
        RemainNewton,
        SalUn,
        SCRUB,
        SFROn,
        SRAGU,
    )
}

RETRAINING = ("retrain", "retraining")  # no algorithm here, and near 'remain_newton' by its letters


def resolve_algorithm(
    algorithm: str | Algorithm,
    *,
    owner: str = "resolve_algorithm",
    model: nn.Module | None = None,
    **settings: object,
) -> Algorithm:
    """The algorithm object behind a name, with settings, or an object, with some settings replaced.

    Args:
        algorithm: A registered name, or an algorithm object.
        owner: The function that was called, for messages.
        model: The network whose parameters `optimizer` holds, where that is an object of torch.optim.
        **settings: Settings by name; those that are None are left as they are. An optimizer's go before the algorithm
            object's, and the other settings before either.

    Returns:
        The algorithm.

    Raises:
        TypeError: If `algorithm` is neither, or a setting does not exist.
        ValueError: If the name is unknown or that of retraining, a setting is out of its domain, or `optimizer_settings`
            refuses the optimizer.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if not isinstance(algorithm, str | Algorithm):
        what = f"the class {algorithm.__name__}" if isinstance(algorithm, type) else f"{algorithm!r:.60}"
        raise TypeError(
            f"`algorithm` of `{owner}` must be a name or an Algorithm object; got {what}. For instance 'graddiff', or "
            "GradDiff(lr=0.01)."
        )
    if isinstance(algorithm, str) and algorithm.lower() in (
        "retrain",
        "retraining",
    ):  # near 'remain_newton' by its letters
        raise ValueError(
            f"`algorithm` of `{owner}` must be one of {', '.join(map(repr, sorted(ALGORITHMS)))}; got {algorithm!r}. "
            "Training from scratch ascends no loss and does not start at the trained model, so it is not predicted: call "
            "stabkit.retrain(problem, stabkit.FineTune(lr=0.1, steps=1000)) for such a model."
        )
    of_class = {kind.__name__.lower(): name for name, kind in ALGORITHMS.items()}
    if isinstance(algorithm, str) and algorithm not in ALGORITHMS and algorithm.lower() in of_class:
        raise ValueError(
            f"`algorithm` of `{owner}` must be one of {', '.join(map(repr, sorted(ALGORITHMS)))}; got {algorithm!r}. "
            f"Did you mean {of_class[algorithm.lower()]!r}?"
        )
    if isinstance(algorithm, str):
        algorithm = ALGORITHMS[check_choice(algorithm, name="algorithm", owner=owner, choices=ALGORITHMS)]()
    optimizer = settings.get("optimizer")
    if isinstance(optimizer, torch.optim.Optimizer) and model is not None:
        del given["optimizer"]
        told = "lr_schedule" in given or algorithm.lr_schedule is not None
        given |= optimizer_settings(optimizer, model, given=given, owner=owner)  # its None of groups counts, too
        if not told and any("initial_lr" in group for group in optimizer.param_groups):
            warnings.warn(
                f"`optimizer` of `{owner}` is on a learning-rate scheduler, whose factors no optimizer tells: the step size "
                "is taken to stay as it begins. Give them as `lr_schedule`, a name or a factor for each step.",
                ScheduleWarning,
                stacklevel=caller_level(),
            )
    return algorithm.replace(**given)


__all__ = [
    "AGU",
    "ALGORITHMS",
    "NPO",
    "SCRUB",
    "SRAGU",
    "Algorithm",
    "Batch",
    "FineTune",
    "GradDiff",
    "GradientAscent",
    "L1Sparse",
    "PlainSteps",
    "RandomLabels",
    "RemainNewton",
    "Retrained",
    "SFROn",
    "SalUn",
    "StepPlan",
    "StopRule",
    "optimizer_settings",
    "resolve_algorithm",
    "retrain",
]
