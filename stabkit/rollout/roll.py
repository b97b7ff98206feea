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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stabkit._memory import pass_bytes, sent
from stabkit._progress import progress_bar
from stabkit._validate import check_int, check_real
from stabkit.algorithms.base import Algorithm
from stabkit.algorithms.plan import StopRule
from stabkit.curvature.coordinates import CoordinateNetwork
from stabkit.curvature.linearised import LinearisedNetwork
from stabkit.losses.custom import CustomLoss
from stabkit.network import check_modes
from stabkit.rollout.direction import Field, PerParameter, Share, mask_and_signs
from stabkit.rollout.result import SCORE_CAP, Rollout, loss_scale
from stabkit.rollout.sets import RolledSet
from stabkit.runner import check_steps
from stabkit.sampling import batch_streams
from stabkit.updates import Moments, updated

DRAWN_AT_ONCE = 64  # steps whose batches are drawn together
DRAWN_INDICES = 2**18  # of those batches, together
# Multiplications of a step that a CPU has done before an accelerator has been told of them; own estimate, not measured.
HOST_WORK = 2**23
STEP_BYTES = 16 * 2**20  # of a step's outputs and features: more than that leaves a CPU's caches


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
            that still run, (G', r) each, on the CPU where little work a step has the rollout be there.
        progress: Whether to show a progress bar.

    Returns:
        The rollout. Cost a step: 4·S·G·(B_R + B_F)·O·r operations; no network pass, but for what a mask or signs need of
        a basis that is not held, once. Memory G·m·O of one set at a check, for as many of the G settings as make 64 MB of
        it, and S·(G + r)·(B_R + B_F)·O at a step, for as many of the S seeds as make 16 MB of it, or an eighth of what is
        free on an accelerator; indices of both sets, and of the batches of up to 64 steps, for each seed.

    Raises:
        ValueError: If `lr` and `mix` differ in length or are empty, there is no seed, a value is out of its domain, or the
            network is not one for the algorithm's optimiser, or without its layers' factors.
        RuntimeError: Under torch.inference_mode() or torch.autocast, or with another default device than the CPU.
    """
    check_modes("rollout")
    if algorithm.adaptive != isinstance(network, CoordinateNetwork):
        made = "sample_coordinates" if algorithm.adaptive else "linearise"
        raise ValueError(
            f"`network` of `rollout` must be one of `{made}` for an algorithm with optimizer={algorithm.optimizer!r}; got a "
            f"{type(network).__name__}."
        )
    for setting, factors, read in (
        ("layer_weight_decay", "decays", algorithm.weight_decay > 0),
        ("layer_lr", "paces", algorithm.max_gradient_norm is not None and not algorithm.adaptive),
    ):
        if read and getattr(algorithm, setting) is not None and factors not in network.layered:
            raise ValueError(
                f"`network` of `rollout` must be made with `{factors}` for an algorithm with {setting}; got one without. "
                f"Give them to `linearise` or `sample_coordinates`: `{type(algorithm).__name__}` has them as "
                f"`{'decay' if factors == 'decays' else 'layer'}_factors(problem)`."
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
    if like.device.type != "cpu" and _is_light(network, algorithm, etas.numel() * len(seeds), batch_sizes, len(checks)):
        like = torch.empty(0, dtype=like.dtype)
    marks = mask_and_signs(network, like)
    network = network if like.device == network.retain.features.device else network.on_host
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
            marks,
            on_step,
            like,
            progress=progress,
        )
        for group in groups
    ]
    joined: dict[str, Any] = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    kind = "adamw" if algorithm.adaptive else "one"
    return Rollout(lr=etas.cpu(), mix=alphas.cpu(), steps=torch.tensor(checks), kind=kind, **joined)


def _is_light(
    network: LinearisedNetwork, algorithm: Algorithm, runs: int, batch_sizes: tuple[int, int], looks: int
) -> bool:
    """Whether a step is done sooner on the CPU; never of code of the user's, which may hold tensors of the accelerator."""
    own = all(type(part).__module__.startswith("stabkit.") for part in (network.loss, algorithm))
    if isinstance(network.loss, CustomLoss) or not own:
        return False
    seen = (network.retain.samples + network.forget.samples) * looks / algorithm.steps
    return runs * (sum(batch_sizes) + seen) * network.retain.features.shape[1] * network.rank <= HOST_WORK


def _roll_seeds(
    network: LinearisedNetwork,
    algorithm: Algorithm,
    etas: Tensor,
    alphas: Tensor,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    checks: Sequence[int],
    marks: tuple[Tensor | None, Tensor | None],
    on_step: Callable[[int, Tensor, Moments], object] | None,
    like: Tensor,
    *,
    progress: bool,
) -> dict[str, Tensor]:
    """Some seeds' runs at all settings; settings that have ended for all of them leave the working set."""
    # What decides which settings go on lies on the host, so that an accelerator is waited for at the looks alone. There a
    # run that its stop rule ends stands still up to the next look, but for `on_step`, which is told of each step.
    settings, count, rank, dtype, device = etas.numel(), len(seeds), network.rank, like.dtype, like.device
    sets = (network.retain, network.forget)
    streams = [
        batch_streams((sets[0].population, sets[1].population), batch_sizes, algorithm.sampling, s) for s in seeds
    ]
    most = max(1, DRAWN_INDICES // (count * max(batch_sizes)))
    # Poisson batches differ in length.
    at_once = 1 if algorithm.sampling == "poisson" else min(DRAWN_AT_ONCE, most, algorithm.steps)
    retain, forget = (
        RolledSet(
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
    field = Field(network, algorithm, retain, forget, seeds, like, *marks)
    per_parameter = PerParameter(network, algorithm, like) if isinstance(network, CoordinateNetwork) else None
    plans = algorithm.plan()
    rule = algorithm.stop_rule()
    at_once = device.type == "cpu" or on_step is not None or type(rule) is not StopRule
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
    ended_at = torch.zeros(count, settings, dtype=torch.int64, device=device)  # by the stop rule; 0: not yet

    def look(position: int, step: int, seen: Tensor) -> Tensor:
        """Record the losses of some runs of the working set, (S, G'), from this check on; which of them go on."""
        goes_on = seen.clone()
        for i in range(count):  # one at a time: the whole sets are looked at, whose outputs are large
            chosen = seen[i]
            if not bool(chosen.any()):
                continue
            rows, at = (alive, c[i]) if bool(chosen.all()) else (alive[chosen], c[i][places(chosen)])
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
            crosses = before & (reached >= 0)
            divergence_step[i, rows[crosses]] = stopped_step[i, rows[crosses]].clamp_max(step)
            goes_on[i, chosen] = reached < SCORE_CAP
        return goes_on

    def places(chosen: Tensor) -> Tensor:
        """Where a mask of the host holds, on the device, which a mask there would be waited for."""
        return sent(chosen.nonzero().flatten(), device)

    def driven() -> tuple[Tensor, tuple[Share, Share], Tensor]:
        """Minus the step sizes of the working set, (G', 1), what its settings take of either set, and whether, (2, G')."""
        mixes, shares = alphas[alive], []
        for part, weights in ((retain, 1 - mixes), (forget, -mixes)):
            taken = weights != 0
            values = (weights / part.batch_size).to(like).unsqueeze(1)
            shares.append(Share(weights=values, any_taken=bool(taken.any()), all_taken=bool(taken.all())))
        takes = sent(torch.stack([mixes < 1, mixes > 0]), device)
        return -etas[alive].to(like).unsqueeze(1), (shares[0], shares[1]), takes

    descent, shares, takes = driven()
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
            left = (slice(None), places(going))
            c, moments, ended_at = c[left], moments[left], ended_at[left]
            descent, shares, takes = driven()
        direction, leakage = field.at(c, shares, plans[step - 1], step, leakage=rule.leakage_bound is not None)
        if per_parameter is None:
            ahead, moments = updated(algorithm, moments, direction, step)
        else:
            ahead, moments = per_parameter.ahead(c, moments, direction, step)
        change = (descent * plans[step - 1].lr) * ahead
        due = step == checks[position]
        ended, ahead = torch.zeros_like(running), c + change
        if rule.active:
            moved = ((change @ metric) * change).sum(-1).clamp_min(0)
            norm = network.anchor_norm**2 + 2 * c @ anchor + ((c @ metric) * c).sum(-1)
            # Under Poisson sampling a batch may be empty.
            taken = (takes[0] & (field.drawn[0] > 0)) | (takes[1] & (field.drawn[1] > 0))
            stops = rule.decide((moved / norm).sqrt(), leakage, moves=taken & (plans[step - 1].lr > 0))
            if not at_once:
                ahead = torch.where((ended_at > 0).unsqueeze(-1), c, ahead)
            ended_at = torch.where(ended_at > 0, ended_at, stops * step)
            if at_once or due:
                found = ended_at.cpu()
                ended = (found > 0) & running
                for i, column in ended.nonzero().tolist():
                    stopped_step[i, alive[column]] = float(found[i, column])
        c = ahead
        if on_step is not None:
            on_step(step, c[0], moments[0])
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
