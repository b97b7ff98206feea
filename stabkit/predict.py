"""`predict`: from a model and two data sets to a verdict with its evidence. Nothing numerical of its own."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int, check_seed
from stabkit.algorithms import Algorithm, resolve_algorithm
from stabkit.checks import warn_if_unsure
from stabkit.data import Data
from stabkit.judge import check_batches, judge
from stabkit.losses import Loss, PerSampleLoss
from stabkit.measure import measure
from stabkit.modes import CHECKING, CostEstimate, Sizes, choose_settings, estimate_cost
from stabkit.precision import PRECISIONS
from stabkit.problem import CHECK_EVERY, UnlearningProblem
from stabkit.report import Cost, Report


def predict(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    algorithm: str | Algorithm = "graddiff",
    lr: float | None = None,
    mix: float | None = None,
    batch_size: int | None = None,
    forget_batch_size: int | None = None,
    steps: int | None = None,
    sampling: str | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    weight_decay: float | None = None,
    optimizer: str | torch.optim.Optimizer | None = None,
    max_gradient_norm: float | None = None,
    lr_schedule: str | Sequence[float] | None = None,
    loss: str | PerSampleLoss | Loss = "cross_entropy",
    batchnorm: str = "frozen",
    check_every: int = CHECK_EVERY,
    curvature: str = "hessian",
    mode: str = "auto",
    budget: float | str | None = None,
    rank: int | str | None = None,
    retain_samples: int | str | None = None,
    forget_samples: int | str | None = None,
    spectrum_samples: int | str | None = None,
    seeds: int = 3,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: str = "float32",
    progress: bool = False,
) -> Report:
    """Say whether an unlearning run will diverge, before it is run.

    The verdict rests on the rollout of the run on the linearised network (T14, T15); the linear theory (T3-T13) stands
    beside it as evidence and says why. Settings left out keep the algorithm's own values.

    Args:
        model: The trained network; never altered.
        forget: What to forget: DataLoader, Dataset, (x, y) tensors, dict of tensors with labels, or batches.
        retain: What to retain, in any of the same forms.
        algorithm: A name, such as "graddiff", "agu", "sragu", "salun", "scrub" or "sfr_on" (all are in
            `stabkit.algorithms.ALGORITHMS`), or an algorithm object, which has settings of its own.
        lr: Step size η > 0; where layers have factors of their own, as an optimizer's groups give them, that of factor 1.
        mix: α in [0, 1]: 0 descends on the retain set alone, 1 ascends on the forget set alone.
        batch_size: Retain samples a step.
        forget_batch_size: Forget samples a step; the smaller of `batch_size` and the forget set when None.
        steps: Number K of steps.
        sampling: "without_replacement", "with_replacement" or "poisson".
        momentum: Heavy-ball momentum in [0, 1).
        nesterov: Whether momentum is Nesterov's.
        weight_decay: γ >= 0, as in torch.optim.SGD, or AdamW, likewise.
        optimizer: "sgd", "adamw", or a new torch.optim.SGD or AdamW (or Adam without decay) of the model's parameters, whose
            step size, momentum or betas, decay and groups are the run's where no argument says otherwise: `lr` and
            `weight_decay` are the largest of its groups, and others keep their share. A scheduler on it is not read: its
            factors are `lr_schedule`, and a `ScheduleWarning` says so, but not of ReduceLROnPlateau, which cannot be seen.
            `optimizer_settings` gives an algorithm object for `run` the same. AdamW's rollouts
            follow a sample of the parameters (T15), and the linear theory is that of its second moment held still.
        max_gradient_norm: Largest norm of a step's preconditioned gradient, which is scaled down to it.
        lr_schedule: "cosine", "linear", "warmup", or a factor for each step.
        loss: "cross_entropy", "causal_lm", "mse" or a callable giving per-sample losses. A batch's loss is their plain mean:
            a training loop that divides by something else, as class weights' sum or the labelled tokens of the batch, takes
            steps of another length, to which `lr` must be scaled.
        batchnorm: "frozen": running statistics, in the prediction and in the run it is about. "batch": every batch by its
            own statistics, as in train mode, the running ones drifting along; of a model that has some BatchNorm layers in
            train mode, the others stay in eval mode.
        check_every: Steps from one look at the losses to the next, in the prediction and in the run it is about; each of as
            many first ones, and the last, is looked at too. A spike between two looks is no divergence; 1 misses none, and
            makes rollouts longer.
        curvature: Whose extreme eigenvalues to report, "hessian" or "ggn".
        mode: "fast": a small linearisation and spectrum. "standard": larger ones. "thorough": beside those, the
            linearised network is left for real steps on a copy wherever its loss is not the real one's any more, which finds
            runs that break, or do not, because features move, and takes some six times a run's gradients beside those of the
            linearisation, which are many for a short run; of AdamW's, and with batchnorm="batch", all steps are real and it
            takes some twenty times.
            "auto": the most thorough of them within `budget`; without one, thorough where network and run are small and
            standard elsewhere.
        budget: For "auto": gradient-equivalents, or seconds as text, such as "30s". None: gradients times parameters of a
            thorough prediction may come to 2e10, a minute or two of one core, on CUDA to 2e12. A `BudgetWarning` says so
            where even the fast mode is estimated to take more.
        rank: Directions of the linearisation; the mode's when None, and found, so that 95 % of the outputs' sensitivity is
            captured, when "auto". Of AdamW's a number of parameters goes with it (`measure.coordinate_count`).
        retain_samples: Retain samples to linearise; the mode's when None, and "all" takes all.
        forget_samples: Forget samples to linearise, likewise.
        spectrum_samples: Samples of each set behind the eigenvalues, likewise.
        seeds: Rollouts behind the probability.
        seed: Seed of everything random here; the caller's random state is left as it was.
        device: Where to compute; where the model is when None.
        dtype: Dtype of the network's derivatives; the model's, but at least float32, when None, with a `PrecisionWarning`
            where that is more than the model's.
        precision: "float32": products of float32 matrices are in float32, whatever PyTorch is set to. "tf32": in TF32, where
            the device has it; two more curvature products say in the report's checks what that does.
        progress: Whether to show progress bars.

    Returns:
        The report. Cost: some 15 Hessian-vector products over the spectrum's samples and some O per-sample gradients
        of each linearised one; the rest needs no more than a few forward passes, but for the staged rollouts of a thorough
        one: one a seed and some sixteen for the critical step size and mix, each between a few forward passes and a run.
        `predict_cost` tells it before, `report.costs` after.

    Raises:
        TypeError: If an argument is of another type, or `optimizer` of another class.
        ValueError: If an argument is out of its domain.
    """
    _check("predict", curvature=curvature, seeds=seeds, seed=seed, precision=precision)
    sizes = Sizes(
        rank=rank, retain_samples=retain_samples, forget_samples=forget_samples, spectrum_samples=spectrum_samples
    )
    chosen = resolve_algorithm(
        algorithm,
        owner="predict",
        model=model,
        lr=lr,
        mix=mix,
        batch_size=batch_size,
        forget_batch_size=forget_batch_size,
        steps=steps,
        sampling=sampling,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        optimizer=optimizer,
        max_gradient_norm=max_gradient_norm,
        lr_schedule=lr_schedule,
    )
    start = time.perf_counter()
    problem = UnlearningProblem(
        model,
        forget,
        retain,
        loss=loss,
        batchnorm=batchnorm,
        check_every=check_every,
        device=device,
        dtype=dtype,
    )
    checking = Cost(
        stage=CHECKING, seconds=time.perf_counter() - start, gradient_equivalents=problem.checking_gradients
    )
    check_batches(problem, chosen)
    with preserved_rng():
        settings = choose_settings(
            problem, chosen, mode=mode, budget=budget, sizes=sizes, curvature=curvature, seed=seed, seeds=seeds
        )
        measurement = measure(problem, chosen, replace(settings, precision=precision), progress=progress)
        report = judge(measurement, range(seed, seed + seeds), progress=progress)
    warn_if_unsure(report.checks)
    return replace(report, costs=(checking, *report.costs))


def _check(
    owner: str, *, curvature: str = "hessian", seeds: int = 1, seed: int = 0, precision: str = "float32"
) -> None:
    """What neither the algorithm nor the problem looks at."""
    check_choice(curvature, name="curvature", owner=owner, choices=("ggn", "hessian"))
    check_int(seeds, name="seeds", owner=owner, low=1)
    check_seed(seed, owner=owner)
    check_choice(precision, name="precision", owner=owner, choices=PRECISIONS)


def predict_cost(
    model: nn.Module,
    forget: Data,
    retain: Data,
    *,
    algorithm: str | Algorithm = "graddiff",
    loss: str | PerSampleLoss | Loss = "cross_entropy",
    batchnorm: str = "frozen",
    check_every: int = CHECK_EVERY,
    mode: str = "auto",
    budget: float | str | None = None,
    rank: int | str | None = None,
    retain_samples: int | str | None = None,
    forget_samples: int | str | None = None,
    spectrum_samples: int | str | None = None,
    seeds: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> CostEstimate:
    """Tell what `predict` would cost, and what the run itself would: a dry run.

    Args:
        model: The trained network; never altered.
        forget: What to forget, in any form that `predict` takes.
        retain: What to retain, likewise.
        algorithm: A name or an algorithm object.
        loss: "cross_entropy", "causal_lm", "mse" or a callable giving per-sample losses.
        batchnorm: As `predict` has it.
        check_every: As `predict` has it.
        mode: As `predict` has it.
        budget: As `predict` has it.
        rank: As `predict` has it.
        retain_samples: As `predict` has it.
        forget_samples: As `predict` has it.
        spectrum_samples: As `predict` has it.
        seeds: Rollouts behind the probability.
        device: Where to compute; where the model is when None.
        dtype: As `predict` has it.
        **settings: Anything else that `predict` takes: steps, batch_size, optimizer, weight_decay and others of the
            algorithm's settings, its own when left out. What does not change the cost, as lr, mix and seed, is let pass.

    Returns:
        The estimate; it prints as a table. Cost: reading the data, and a few passes over 64 samples to time a gradient.

    Raises:
        TypeError: If an argument is none of `predict`'s.
        ValueError: If an argument is out of its domain.
    """
    unknown = sorted(settings.keys() - inspect.signature(predict).parameters.keys())
    if unknown:
        raise TypeError(
            f"`predict_cost` must be given what `predict` takes; got {unknown[0]!r}. `help(stabkit.predict)` lists it."
        )
    _check("predict_cost", **{name: settings[name] for name in ("curvature", "seed", "precision") if name in settings})
    known = {field.name for field in fields(Algorithm)}
    its = {name: value for name, value in settings.items() if name in known}
    chosen = resolve_algorithm(algorithm, owner="predict_cost", model=model, **its)
    sizes = Sizes(
        rank=rank, retain_samples=retain_samples, forget_samples=forget_samples, spectrum_samples=spectrum_samples
    )
    problem = UnlearningProblem(
        model,
        forget,
        retain,
        loss=loss,
        batchnorm=batchnorm,
        check_every=check_every,
        device=device,
        dtype=dtype,
    )
    measured = choose_settings(
        problem, chosen, mode=mode, budget=budget, sizes=sizes, curvature="hessian", seed=0, seeds=seeds
    )
    return estimate_cost(problem, chosen, measured, seeds=seeds)
