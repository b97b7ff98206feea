"""How soon plain training on the forget set brings back what was unlearned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int, check_real, check_seed
from stabkit.losses import CrossEntropy
from stabkit.metrics.accuracy import parameters_of
from stabkit.metrics.bootstrap import Resamples
from stabkit.metrics.statistics import sample_statistics
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.sampling import index_stream


@dataclass(frozen=True, kw_only=True)
class Relearning:
    """Steps until the forget set is known again as well as the original model knew it.

    Attributes:
        steps: Steps of plain SGD; None if `limit` steps did not reach it.
        low: Lower end of its interval over forget samples; None if that is beyond `limit`.
        high: Upper end; None if that is beyond `limit`.
        limit: Steps tried at most.
        by: "loss" or "accuracy".
        target: Forget loss to come down to, or accuracy to come up to.
        start: Forget loss or accuracy before the first step; None if not finite.
        lr: Step size.
        batch_size: Batch size.
        margin: How far from the original's value the target is, relatively.
    """

    steps: int | None
    low: int | None
    high: int | None
    limit: int
    by: str
    target: float
    start: float | None
    lr: float
    batch_size: int
    margin: float

    @property
    def reached(self) -> bool:
        """Whether the target was reached within the limit."""
        return self.steps is not None


def relearn_time(
    problem: UnlearningProblem,
    model: nn.Module,
    *,
    lr: float,
    limit: int = 100,
    batch_size: int = 64,
    by: str = "loss",
    margin: float = 0.05,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> Relearning:
    """Steps of plain SGD on the forget set until its loss is at most (1 + margin) times the original model's.

    By accuracy, until it is at least (1 - margin) times the original's. The whole forget set is looked at after every step,
    starting with none. The interval is over the forget samples that loss or accuracy are averaged over, with the one run
    as it went; another seed's run differs as well. (Golatkar et al. 2020 count epochs.)

    Args:
        problem: The unlearning problem; its model is the original.
        model: The unlearned model, of the same architecture; not altered. Only what the problem trains is trained.
        lr: Step size.
        limit: Steps to try at most.
        batch_size: Forget samples a step, at most all of them.
        by: "loss" or "accuracy".
        margin: Relative distance from the original's value that counts as back, in [0, 1].
        level: Nominal coverage of the interval.
        replicates: Bootstrap resamples.
        seed: Of the batches and the resamples.

    Returns:
        The steps, or that they did not suffice. Cost: a batch of gradients and a forward pass over the forget set a step,
        until the interval's upper end is known or the limit is reached.

    Raises:
        ValueError: If accuracy is asked for and the loss has no classes, or an argument is out of its domain.
    """
    check_real(lr, name="lr", owner="relearn_time", low=0, low_open=True)
    check_int(limit, name="limit", owner="relearn_time", low=1)
    check_int(batch_size, name="batch_size", owner="relearn_time", low=1)
    check_choice(by, name="by", owner="relearn_time", choices=("loss", "accuracy"))
    check_real(margin, name="margin", owner="relearn_time", low=0, high=1)
    check_real(level, name="level", owner="relearn_time", low=0, high=1, low_open=True, high_open=True)
    check_int(replicates, name="replicates", owner="relearn_time", low=1)
    check_seed(seed, owner="relearn_time")
    if by == "accuracy" and not isinstance(problem.loss, CrossEntropy):
        raise ValueError(
            f"`by` of `relearn_time` must be 'loss' where the loss has no classes; got 'accuracy' for {problem.loss.name!r}."
        )
    resamples = Resamples(problem.forget.size, replicates, torch.Generator().manual_seed(2 * seed))
    size = min(batch_size, problem.forget.size)
    stream = index_stream(problem.forget.size, size, "without_replacement", torch.Generator().manual_seed(2 * seed + 1))
    parameters = parameters_of(problem, model)
    with preserved_rng():
        original = _look(problem, problem.parameters, by, resamples)
        target = original * (1 + margin if by == "loss" else 1 - margin)
        now = _look(problem, parameters, by, resamples)
        start = float(now[0])
        first = torch.full_like(now, math.inf)
        for step in range(limit + 1):
            if step > 0:
                parameters = _descend(problem, parameters, next(stream), lr)
                now = _look(problem, parameters, by, resamples)
            there = now <= target if by == "loss" else now >= target
            first = first.where(first.isfinite() | ~there, step)
            low, high = _ends(first, level)
            if (first[0].isfinite() and high is not None) or not bool(now[0].isfinite()):
                break
    return Relearning(
        steps=int(first[0]) if bool(first[0].isfinite()) else None,
        low=low,
        high=high,
        limit=limit,
        by=by,
        target=float(target[0]),
        start=start if math.isfinite(start) else None,
        lr=lr,
        batch_size=size,
        margin=margin,
    )


def _look(problem: UnlearningProblem, parameters: Parameters, by: str, resamples: Resamples) -> Tensor:
    """Forget loss or accuracy on the set and on its resamples; NaN once the model has left the numbers."""
    found, _ = sample_statistics(problem, problem.forget, {"": parameters})[""]
    if by == "loss" or found.labels is None:
        return resamples.means(found.loss.unsqueeze(1))[:, 0]
    accuracy = resamples.ratios(found.labels.right.unsqueeze(1), found.labels.counted.unsqueeze(1))[:, 0]
    return accuracy if bool(found.loss.isfinite().all()) else torch.full_like(accuracy, math.nan)


def _descend(problem: UnlearningProblem, parameters: Parameters, indices: Tensor, lr: float) -> Parameters:
    """One step of SGD on the mean loss of a batch."""
    trained = {name: parameters[name].detach().requires_grad_() for name in problem.parameters}
    inputs, targets = problem.forget.batch(indices)
    with torch.enable_grad():
        loss = problem.loss.per_sample(problem.outputs({**parameters, **trained}, inputs), targets).mean()
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
    steps = zip(trained.items(), gradients, strict=True)
    return {**parameters, **{name: value.detach() - lr * gradient for (name, value), gradient in steps}}


def _ends(first: Tensor, level: float) -> tuple[int | None, int | None]:
    """Percentile interval of the resamples' steps; None beyond the limit."""
    ordered = first[1:].sort().values
    places = [int(share * (len(ordered) - 1) + 0.5) for share in ((1 - level) / 2, (1 + level) / 2)]
    low, high = (float(ordered[place]) for place in places)
    return (int(low) if math.isfinite(low) else None), (int(high) if math.isfinite(high) else None)
