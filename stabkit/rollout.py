"""Rolls a whole unlearning run out on the linearised network, with the true loss and without network passes (T14).

In the compressed coordinates c of `LinearisedNetwork` one preconditioned step is

    c⁺ = c - η [ (1-α) mean_{i in batch_R} Φ_i^T s_i(f_i + Φ_i c) - α mean_{i in batch_F} Φ_i^T s_i(f_i + Φ_i c) ]

with s_i the loss's derivative in the outputs, or what the algorithm puts in its place; clipping, weight decay, momentum and
schedules are those of `run`. AdamW's steps are taken parameter by parameter on a sample of them instead (T15), whose
coordinates are those of `CoordinateNetwork`. Many settings (step size, mix) roll side by side over the same batches.

With batchnorm="batch" f and Φ are those of coupled batches. Losses are looked at in eval mode, where the outputs are taken
to be f_eval + Φ c, as if the running statistics followed the parameters at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabkit._memory import pass_bytes
from stabkit._progress import progress_bar
from stabkit._validate import check_int, check_real
from stabkit.algorithms.base import Algorithm, Batch, PlainSteps, StepPlan
from stabkit.calibration import calibration
from stabkit.curvature.coordinates import CoordinateNetwork
from stabkit.curvature.linearised import LinearisedNetwork, LinearisedSet
from stabkit.losses import Loss
from stabkit.runner import check_steps
from stabkit.sampling import batch_streams
from stabkit.steps import CLIP_EPSILON
from stabkit.updates import Moments, updated

SCORE_CAP = 3.0  # score at which a setting stops rolling: e³ times the divergence level
PLAYERS_SEED = 2**31  # added to a stream's seed, so that who stands in for whom is independent of the batches
DRAWN_AT_ONCE = 64  # steps whose batches are drawn together
DRAWN_INDICES = 2**18  # of those batches, together
LOOK_BYTES = 64 * 2**20  # of the outputs that losses are looked at of together
STEP_BYTES = 16 * 2**20  # of a step's outputs and features: more than that leaves a CPU's caches


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """What the linearised network did, for S seeds and G settings.

    Attributes:
        lr: Step sizes, shape (G,), as they were given.
        mix: Mixes, shape (G,).
        score: Largest log ratio of the retain loss to the divergence level, capped at `SCORE_CAP`, shape (S, G). From 0 on
            this seed's run crosses. Below, it is stretched where the loss at θ* would score more than -1, to be -1 there.
            `SCORE_CAP` where any loss is not finite, or the level is passed at θ*; a loss that is negative at θ* is counted
            from there. A staged rollout's is the largest up to one look past the crossing.
        divergence_step: First checked step past the level, shape (S, G); NaN where it is never passed.
        stopped_step: Last step taken, shape (S, G); earlier than K where a stop rule ended the run.
        steps: The checked steps, shape (T,).
        retain_loss: Mean loss of the retain samples at the checks, infinity in place of NaN, shape (S, G, T); constant after
            a run has ended.
        forget_loss: The same for the forget samples.
        coordinates: c where the run crossed the level, or at its end, shape (S, G, r).
        kind: "one", "adamw" or "staged": whose calibration the probability is read from.
    """

    lr: Tensor
    mix: Tensor
    score: Tensor
    divergence_step: Tensor
    stopped_step: Tensor
    steps: Tensor
    retain_loss: Tensor
    forget_loss: Tensor
    coordinates: Tensor
    kind: str = "one"

    @property
    def probability(self) -> Tensor:
        """P(diverge) of every setting by its rollouts alone, shape (G,): each seed's logistic, averaged (theory §7)."""
        return calibration(self.kind).probability(self.score)

    def settings(self, first: int, last: int) -> Rollout:
        """The rollout of some neighbouring settings.

        Args:
            first: Place of the first of them.
            last: Place after the last one.

        Returns:
            Theirs, which shares this one's memory.
        """
        kept = slice(first, last)
        per_seed = ("score", "divergence_step", "stopped_step", "retain_loss", "forget_loss", "coordinates")
        parts: dict[str, Any] = {name: getattr(self, name)[:, kept] for name in per_seed}
        return replace(self, lr=self.lr[kept], mix=self.mix[kept], **parts)

    def expected_divergence_step(self) -> list[float | None]:
        """Median divergence step over the seeds that cross, per setting; None where fewer than half of them do.

        Returns:
            G entries.
        """
        medians: list[float | None] = []
        for column in self.divergence_step.T:
            crossed = column[column.isfinite()]
            medians.append(float(crossed.median()) if 2 * crossed.numel() >= column.numel() else None)
        return medians


def rollout(
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    lr: Sequence[float] | Tensor,
    mix: Sequence[float] | Tensor,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int] = (0, 1, 2),
    check_every: int | None = None,
    dtype: torch.dtype | None = None,
    on_step: Callable[[int, Tensor, Moments], object] | None = None,
    progress: bool = False,
) -> Rollout:
    """Roll out an algorithm at several settings at once.

    A seed draws the very batches that `run` draws. Where the network holds only a sample of m < n, those samples play
    themselves and stand in for the others, each for equally many up to one, so that a batch's mean varies as over the
    whole set (the table under T6).

    Args:
        network: The compressed network; for AdamW one of `sample_coordinates`.
        algorithm: Everything but its lr and mix is read from it. Where decay or a pull moves the parameters outside the
            coordinates, the drift of its stop rule leaves that out.
        lr: Step sizes, G of them.
        mix: Mixes, G of them.
        batch_sizes: B_R and B_F.
        seeds: One run each; whole numbers >= 0.
        check_every: Steps between two looks at the losses, as in `run`; the network's when None.
        dtype: Floating dtype of the iteration; the features' own when None.
        on_step: Called at the start and after every step with the step, the coordinates and the moments of the settings
            that still run, (G', r) each.
        progress: Whether to show a progress bar.

    Returns:
        The rollout. Cost a step: 4·S·G·(B_R + B_F)·O·r operations; no network pass. Memory G·m·O of one set at a check, for
        as many of the G settings as make 64 MB of it, and S·(G + r)·(B_R + B_F)·O at a step, for as many of the S seeds as
        make 16 MB of it, or an eighth of what is free on an accelerator; indices of both sets, and of the batches of up to
        64 steps, for each seed.

    Raises:
        ValueError: If `lr` and `mix` differ in length or are empty, there is no seed, a value is out of its domain, or the
            network is not one for the algorithm's optimiser.
    """
    if algorithm.adaptive != isinstance(network, CoordinateNetwork):
        made = "sample_coordinates" if algorithm.adaptive else "linearise"
        raise ValueError(
            f"`network` of `rollout` must be one of `{made}` for an algorithm with optimizer={algorithm.optimizer!r}; got a "
            f"{type(network).__name__}."
        )
    check_every = network.check_every if check_every is None else check_every
    check_int(check_every, name="check_every", owner="rollout", low=1)
    etas = torch.as_tensor(lr, dtype=torch.float64).reshape(-1)
    alphas = torch.as_tensor(mix, dtype=torch.float64).reshape(-1)
    if etas.shape != alphas.shape or etas.numel() == 0:
        raise ValueError(
            f"`lr` and `mix` of `rollout` must be equally many, and at least one; got {etas.numel()} and {alphas.numel()}."
        )
    for eta, alpha in zip(etas.tolist(), alphas.tolist(), strict=True):
        check_real(eta, name="lr", owner="rollout", low=0, low_open=True)
        check_real(alpha, name="mix", owner="rollout", low=0, high=1)
    if len(seeds) == 0:
        raise ValueError("`seeds` of `rollout` must name at least one seed; got none.")
    for seed in seeds:
        check_int(seed, name="seeds", owner="rollout", low=0)
    for size, part in zip(batch_sizes, (network.retain, network.forget), strict=True):
        check_int(size, name="batch_sizes", owner="rollout", low=1, high=part.population, remedy="Use smaller batches.")
    checks = check_steps(algorithm.steps, check_every)
    like = network.retain.features.new_empty(0, dtype=dtype)
    landmarks = _landmarks(network, like)
    # Seeds go side by side too, but for batches of different lengths and for `on_step`, which is told of one run at a time.
    at_once = 1
    if algorithm.sampling != "poisson" and on_step is None:
        width = max(batch_sizes) * network.retain.outputs[0].numel() * like.element_size()
        at_once = max(1, pass_bytes(STEP_BYTES, like.device) // ((etas.numel() + network.rank) * width))
    groups = [[int(seed) for seed in seeds[k : k + at_once]] for k in range(0, len(seeds), at_once)]
    parts = [
        _roll_seeds(
            network,
            algorithm,
            etas.cpu(),
            alphas.cpu(),
            batch_sizes,
            group,
            checks,
            landmarks,
            on_step,
            like,
            progress=progress,
        )
        for group in groups
    ]
    joined: dict[str, Any] = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    kind = "adamw" if algorithm.adaptive else "one"
    return Rollout(lr=etas.cpu(), mix=alphas.cpu(), steps=torch.tensor(checks), kind=kind, **joined)


class _Part:
    """One set during a rollout: its samples in the working dtype and each of S seeds' stream of batches of them."""

    def __init__(
        self,
        part: LinearisedSet,
        streams: Sequence[Iterator[Tensor]],
        batch_size: int,
        seeds: Sequence[int],
        dtype: torch.dtype,
        *,
        at_once: int,
    ) -> None:
        self.outputs = part.outputs.to(dtype)
        self._original = self.outputs if part.original is None else part.original.to(dtype)
        self.features = part.features.to(dtype)
        self._offset = None if part.eval_outputs is None else part.eval_outputs.to(dtype) - self.outputs
        self.targets = part.targets.to(dtype) if part.targets.is_floating_point() else part.targets
        self._streams, self._players = streams, [_players(part, seed) for seed in seeds]
        self._drawn, self._at_once = iter(()), at_once
        self.batch_size = batch_size

    def draw(self) -> Tensor:
        """The next batch of every seed, (S, b), on the network's device."""
        found: Tensor | None = next(self._drawn, None)
        if found is None:
            # Several steps' at once: a transfer in each would keep an accelerator waiting.
            drawn = [
                torch.stack([
                    players[next(stream)] for stream, players in zip(self._streams, self._players, strict=True)
                ])
                for _ in range(self._at_once)
            ]
            self._drawn = iter(torch.stack(drawn).to(self.outputs.device))
            found = next(self._drawn)
        return found

    def original(self, indices: Tensor, settings: int) -> Tensor:
        """Outputs at θ* of batches (S, b), each G times one after another: (S·G·b, ...)."""
        return _repeat(self._original[indices], settings)

    def at(self, c: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of batches (S, b) at coordinates c (S, G, r), (S·G·b, ...), their targets, and features (S, b·O, r)."""
        base, rows = self.outputs[indices], self.features[indices].flatten(1, 2)
        moved = torch.baddbmm(base.flatten(1).unsqueeze(1), c, rows.mT)  # f_i + Φ_i c: (S, G, b·O)
        return moved.reshape(-1, *base.shape[2:]), _repeat(self.targets[indices], c.shape[1]), rows

    def mean_losses(self, loss: Loss, c: Tensor) -> Tensor:
        """Mean losses of the whole set at coordinates c (G, r): (G,), float64 on the CPU."""
        size = self.outputs.numel() * self.outputs.element_size()
        means = []
        for some in c.split(max(1, pass_bytes(LOOK_BYTES, c.device) // size)):
            targets = self.targets.repeat(len(some), *[1] * (self.targets.dim() - 1))
            each = loss.per_sample(self.looked_at(some.unsqueeze(0)), targets)
            means.append(each.reshape(len(some), -1).mean(1))
        return torch.cat(means).double().cpu()

    def looked_at(self, c: Tensor, indices: Tensor | None = None) -> Tensor:
        """Outputs in eval mode of batches (S, b), or of the whole set, at coordinates c (S, G, r), as (S·G·b, ...)."""
        if indices is None:
            base, rows = self.outputs.unsqueeze(0), self.features.flatten(0, 1).unsqueeze(0)
            offset = None if self._offset is None else self._offset.unsqueeze(0)
        else:
            base, rows = self.outputs[indices], self.features[indices].flatten(1, 2)
            offset = None if self._offset is None else self._offset[indices]
        base = base if offset is None else base + offset
        moved = base.flatten(1).unsqueeze(1) + c @ rows.mT
        return moved.reshape(-1, *base.shape[2:])


def players_of(network: LinearisedNetwork, seed: int) -> tuple[Tensor, Tensor]:
    """Which samples play in a seed's rollout: for every sample of both sets the held one that has its part.

    Args:
        network: The compressed network.
        seed: The rollout's.

    Returns:
        Indices in the retain and in the forget set, of as many entries as these have samples.
    """
    held = network.retain, network.forget
    retain, forget = (part.indices.cpu()[_players(part, 2 * seed + i)] for i, part in enumerate(held))
    return retain, forget


def _players(part: LinearisedSet, seed: int) -> Tensor:
    """Which of the m held samples plays each of the n: itself where held; the others are shared out evenly at random."""
    m, n = part.samples, part.population
    players = torch.full((n,), -1)
    players[part.indices.cpu()] = torch.arange(m)
    generator = torch.Generator().manual_seed(PLAYERS_SEED + seed)
    # Each round plays every held sample once.
    rounds = torch.rand(-(-(n - m) // m), m, generator=generator, dtype=torch.float32).argsort(1)
    players[players < 0] = rounds.flatten()[: n - m]
    return players


def _repeat(values: Tensor, times: int) -> Tensor:
    """Rows (S, b, ...) as (S·G·b, ...): each b of them G times one after another."""
    seeds, b = values.shape[:2]
    return values.unsqueeze(1).expand(seeds, times, b, *values.shape[2:]).reshape(-1, *values.shape[2:])


def _roll_seeds(
    network: LinearisedNetwork,
    algorithm: Algorithm,
    etas: Tensor,
    alphas: Tensor,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    checks: Sequence[int],
    landmarks: tuple[Tensor | None, Tensor | None],
    on_step: Callable[[int, Tensor, Moments], object] | None,
    like: Tensor,
    *,
    progress: bool,
) -> dict[str, Tensor]:
    """Some seeds' runs at all settings; settings that have ended for all of them leave the working set."""
    # What decides which settings go on lies on the host, so that an accelerator is waited for at the looks alone, and in
    # every step by a stop rule.
    settings, count, rank, dtype, device = etas.numel(), len(seeds), network.rank, like.dtype, like.device
    sets = (network.retain, network.forget)
    streams = [
        batch_streams((sets[0].population, sets[1].population), batch_sizes, algorithm.sampling, s) for s in seeds
    ]
    most = max(1, DRAWN_INDICES // (count * max(batch_sizes)))
    # Poisson batches differ in length.
    at_once = 1 if algorithm.sampling == "poisson" else min(DRAWN_AT_ONCE, most, algorithm.steps)
    retain, forget = (
        _Part(
            sets[i],
            [pair[i] for pair in streams],
            batch_sizes[i],
            [2 * seed + i for seed in seeds],
            dtype,
            at_once=at_once,
        )
        for i in (0, 1)
    )
    metric, anchor = network.metric.to(dtype), network.anchor.to(dtype)
    field = _Field(network, algorithm, retain, forget, seeds, metric, anchor, *landmarks)
    per_parameter = _PerParameter(network, algorithm, like) if isinstance(network, CoordinateNetwork) else None
    plans = algorithm.plan()
    rule = algorithm.stop_rule()
    scale = loss_scale(network)

    score = torch.full((count, settings), -math.inf, dtype=torch.float64)
    divergence_step = torch.full((count, settings), math.nan, dtype=torch.float64)
    stopped_step = torch.full((count, settings), float(algorithm.steps), dtype=torch.float64)
    losses = torch.zeros(2, count, settings, len(checks), dtype=torch.float64)
    coordinates = torch.zeros(count, settings, rank, dtype=torch.float64)
    # The working set: columns of the above that still run for some seed, with their coordinates and moments, and which
    # of the seeds they run for.
    alive = torch.arange(settings)
    running = torch.ones(count, settings, dtype=torch.bool)
    c = torch.zeros(count, settings, rank, dtype=dtype, device=device)
    moments = Moments.zero(algorithm, c)

    def look(position: int, step: int, seen: Tensor) -> Tensor:
        """Record the losses of some runs of the working set, (S, G'), from this check on; which of them go on."""
        goes_on = seen.clone()
        for i in range(count):  # one at a time: the whole sets are looked at, whose outputs are large
            chosen = seen[i]
            if not bool(chosen.any()):
                continue
            rows, at = (alive, c[i]) if bool(chosen.all()) else (alive[chosen], c[i][chosen.to(device)])
            for place, part in enumerate((retain, forget)):
                mean = part.mean_losses(network.loss, at)
                losses[place, i, rows, position:] = mean.nan_to_num(nan=math.inf, posinf=math.inf).unsqueeze(1)
            now = losses[:, i, rows, position]
            reached = scale.score(now[0])
            reached[~now.isfinite().all(0)] = SCORE_CAP
            score[i, rows] = torch.maximum(score[i, rows], reached)
            if step == 0:
                score[i, rows[reached >= 0]] = (
                    SCORE_CAP  # past the level before the first step: nothing is left to predict
                )
            before = divergence_step[i, rows].isnan()
            coordinates[i, rows[before]] = at.double().cpu()[before]
            divergence_step[i, rows[before & (reached >= 0)]] = float(step)
            goes_on[i, chosen] = reached < SCORE_CAP
        return goes_on

    def driven() -> tuple[Tensor, tuple[_Share, _Share]]:
        """Minus the step sizes of the working set, (G', 1), and what its settings take of either set."""
        mixes, shares = alphas[alive], []
        for part, weights in ((retain, 1 - mixes), (forget, -mixes)):
            taken = weights != 0
            values = (weights / part.batch_size).to(like).unsqueeze(1)
            shares.append(_Share(weights=values, any_taken=bool(taken.any()), all_taken=bool(taken.all())))
        return -etas[alive].to(like).unsqueeze(1), (shares[0], shares[1])

    descent, shares = driven()
    if on_step is not None:
        on_step(0, c[0], moments[0])
    running &= look(0, 0, running)
    position = 1
    for step in progress_bar(range(1, algorithm.steps + 1), "rollout", progress):
        going = running.any(0)
        if not bool(going.all()):
            alive, running = alive[going], running[:, going]
            if alive.numel() == 0:
                break
            left = (slice(None), going.to(device))
            c, moments = c[left], moments[left]
            descent, shares = driven()
        direction, leakage = field.at(c, shares, plans[step - 1], step, leakage=rule.leakage_bound is not None)
        if per_parameter is None:
            ahead, moments = updated(algorithm, moments, direction, step)
        else:
            ahead, moments = per_parameter.ahead(c, moments, direction, step)
        change = (descent * plans[step - 1].lr) * ahead
        ended = torch.zeros_like(running)
        if rule.active:
            moved = ((change @ metric) * change).sum(-1).clamp_min(0)
            norm = network.anchor_norm**2 + 2 * c @ anchor + ((c @ metric) * c).sum(-1)
            ended = rule.decide((moved / norm).sqrt(), leakage).cpu() & running
            for i, column in ended.nonzero().tolist():
                stopped_step[i, alive[column]] = float(step)
        c = c + change
        if on_step is not None:
            on_step(step, c[0], moments[0])
        due = step == checks[position]
        seen = running if due else ended  # a setting that ends is looked at when it does, the others not
        if bool(seen.any()):
            goes_on = look(position, step, seen)
            running = running & ~ended & (goes_on | ~seen)
        position += due
    return {
        "score": score,
        "divergence_step": divergence_step,
        "stopped_step": stopped_step,
        "retain_loss": losses[0],
        "forget_loss": losses[1],
        "coordinates": coordinates,
    }


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """How near a retain loss is to the divergence level.

    Attributes:
        floor: Where losses are counted from: 0, or the loss at θ* where that is negative.
        room: How far the level lies above it, > 0.
        stretch: Factor of scores below the level, >= 1, which puts the loss at θ* at -1 or below.
    """

    floor: float
    room: float
    stretch: float

    def score(self, loss: Tensor) -> Tensor:
        """Log ratio to the level, 0 where it is reached.

        Args:
            loss: Retain losses, any shape.

        Returns:
            The same shape, at most `SCORE_CAP`.
        """
        ratio = ((loss - self.floor) / self.room).clamp_min(0).log().clamp_max(SCORE_CAP)
        return torch.where(ratio < 0, ratio * self.stretch, ratio)


def loss_scale(network: LinearisedNetwork) -> LossScale:
    """The scale of a run's scores.

    Args:
        network: The compressed network at θ*.

    Returns:
        The scale. A network whose loss is close to the level before the first step is not half diverged for it, so its
        scores are stretched.
    """
    part = network.retain
    outputs = part.outputs if part.original is None else part.original
    start = float(network.loss.per_sample(outputs, part.targets).double().mean())
    floor, level = min(0.0, start), network.divergence_level
    if not level > floor:  # the run has diverged before its first step
        return LossScale(floor=level - 1, room=1.0, stretch=1.0)
    share = (start - floor) / (level - floor)
    near = math.exp(-1) < share < 1
    return LossScale(floor=floor, room=level - floor, stretch=-1 / math.log(share) if near else 1.0)


def _landmarks(network: LinearisedNetwork, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Vᵀ M V of the forget gradients' mask and Vᵀ sign(θ*), where the algorithm has them."""
    preconditioner = network.run_preconditioner
    if not isinstance(preconditioner, PlainSteps):
        return None, None
    mask, signs = preconditioner.forget_mask, preconditioner.signs
    return (
        None if mask is None else network.masked(mask).to(like),
        None if signs is None else network.gradient_along(signs).to(like),
    )


class _PerParameter:
    """AdamW's steps in the coordinates of sampled parameters (T15)."""

    def __init__(self, network: CoordinateNetwork, algorithm: Algorithm, like: Tensor) -> None:
        self._algorithm = algorithm
        self._lift, self._reach, self._home, self._pace = (
            part.to(like) for part in (network.lift, network.weights.sqrt(), network.anchor, network.pace)
        )

    def ahead(self, c: Tensor, moments: Moments, direction: Tensor, step: int) -> tuple[Tensor, Moments]:
        """What the step size multiplies at coordinates c (S, G, r), and the moments after the step."""
        moved, moments = updated(self._algorithm, moments, direction * self._lift, step)
        return self._pace * (self._reach * moved + self._algorithm.weight_decay * (c + self._home)), moments


@dataclass(frozen=True, kw_only=True, eq=False)
class _Share:
    """What G settings take of one set.

    Attributes:
        weights: (1-α)/B_R or -α/B_F, shape (G, 1).
        any_taken: Whether one of them is not 0.
        all_taken: Whether none of them is.
    """

    weights: Tensor
    any_taken: bool
    all_taken: bool


class _Field:
    """The direction of a step anywhere in the coordinates, for S seeds and at G settings side by side."""

    def __init__(
        self,
        network: LinearisedNetwork,
        algorithm: Algorithm,
        retain: _Part,
        forget: _Part,
        seeds: Sequence[int],
        metric: Tensor,
        anchor: Tensor,
        mask: Tensor | None,
        signs: Tensor | None,
    ) -> None:
        self._loss, self._algorithm, self._seeds = network.loss, algorithm, tuple(seeds)
        self._retain, self._forget = retain, forget
        self._metric, self._anchor, self._mask, self._signs = metric, anchor, mask, signs
        self._gradient_metric = network.gradient_metric.to(metric)
        self._masks_inside = mask is None or network.masks_inside
        self._decay = 0.0 if algorithm.adaptive else algorithm.weight_decay  # AdamW's is no part of the gradient

    def at(
        self, c: Tensor, shares: tuple[_Share, _Share], plan: StepPlan, step: int, *, leakage: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The step's direction, (S, G, r), and the forget batch's prediction divergence (S, G) if asked for."""
        retain, _ = self._gradient(self._retain, c, shares[0], plan.retain, step, leakage=False)
        forget, divergence = self._gradient(self._forget, c, shares[1], plan.forget, step, leakage=leakage)
        masked = forget if self._mask is None else forget @ self._mask
        direction = retain + masked
        if plan.max_norm is not None:
            # P ĝ = P^{1/2} V h with h these coordinates, so its square is hᵀ metric h. A mask M takes the forget part out
            # of the span of V, where P = I: ‖V h_R + M V h_F‖².
            if self._masks_inside:
                square = ((direction @ self._gradient_metric) * direction).sum(-1)
            else:
                square = (retain * retain + 2 * retain * masked + forget * masked).sum(-1)
            norm = square.clamp_min(0).sqrt().unsqueeze(-1)
            direction = direction * (plan.max_norm / (norm + CLIP_EPSILON)).clamp_max(1.0)
        if self._decay:
            direction = direction + self._decay * (c @ self._metric + self._anchor)
        if plan.pull and self._signs is not None:
            direction = direction + plan.pull * self._signs
        return direction, divergence

    def _gradient(
        self, part: _Part, c: Tensor, share: _Share, drawn: float, step: int, *, leakage: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One set's share of the direction, and its prediction divergence if asked for."""
        seeds, settings = c.shape[:2]
        if not (drawn or leakage):  # as in a run, the set draws nothing
            return torch.zeros_like(c), None
        indices = part.draw()
        # Leakage is watched even where the forget set does not drive the run.
        if indices.numel() == 0 or not (leakage or (drawn and share.any_taken)):
            return torch.zeros_like(c), None
        outputs, targets, rows = part.at(c, indices)
        original = part.original(indices, settings) if leakage or self._algorithm.needs_original else None
        batch = Batch(
            outputs=outputs,
            targets=targets,
            original=original,
            copies=seeds * settings,
            step=step,
            seeds=self._seeds,
        )
        chosen = self._algorithm.forget_residual if part is self._forget else self._algorithm.retain_residual
        found = chosen(self._loss, batch)
        if not isinstance(found, Tensor) or found.shape != outputs.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise ValueError(
                f"`{chosen.__name__}` of `{type(self._algorithm).__name__}` must return the loss's derivative in the "
                f"outputs, a tensor of their shape {tuple(outputs.shape)}; got {got:.80}."
            )
        residual = found.reshape(seeds, settings, -1)  # s_i: (S, G, b·O)
        weights = share.weights if drawn == 1 else share.weights * drawn
        gradient = (residual @ rows) * weights
        if not (share.all_taken and drawn):  # what is not taken may have left the numbers
            gradient = torch.where(weights == 0, 0.0, gradient)
        if not leakage:
            return gradient, None
        now = part.looked_at(c, indices)
        assert original is not None
        return gradient, self._loss.divergence(original, now, targets).reshape(seeds, settings, -1).mean(-1)
