"""The direction of a step anywhere in the coordinates: gradients, clipping, decay, and AdamW's steps (T14, T15)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit.algorithms.base import Algorithm, Batch, PlainSteps
from stabkit.algorithms.contract import checked_residual
from stabkit.algorithms.plan import StepPlan
from stabkit.curvature.coordinates import CoordinateNetwork
from stabkit.curvature.linearised import LinearisedNetwork
from stabkit.rollout.sets import RolledSet
from stabkit.steps import CLIP_EPSILON
from stabkit.updates import Moments, updated


def mask_and_signs(network: LinearisedNetwork, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What an algorithm has taken from θ* beside its P, in the coordinates.

    Args:
        network: The compressed network.
        like: A tensor of the working dtype and device.

    Returns:
        Vᵀ M V of the forget gradients' mask and Vᵀ sign(θ*), each None where there is none.
    """
    preconditioner = network.run_preconditioner
    if not isinstance(preconditioner, PlainSteps):
        return None, None
    mask, signs = preconditioner.forget_mask, preconditioner.signs
    return (
        None if mask is None else network.masked(mask).to(like),
        None if signs is None else network.gradient_along(signs).to(like),
    )


class PerParameter:
    """AdamW's steps in the coordinates of sampled parameters (T15)."""

    def __init__(self, network: CoordinateNetwork, algorithm: Algorithm, like: Tensor) -> None:
        """Take what is needed of a network.

        Args:
            network: The network.
            algorithm: Its betas, eps and decay.
            like: A tensor of the working dtype and device.
        """
        self._algorithm = algorithm
        self._lift, self._reach, self._pace = (
            part.to(like) for part in (network.lift, network.weights.sqrt(), network.pace)
        )
        self._decays, self._home = network.decay_metric.diagonal().to(like), network.decay_anchor.to(like)

    def ahead(self, c: Tensor, moments: Moments, direction: Tensor, step: int) -> tuple[Tensor, Moments]:
        """What the step size multiplies.

        Args:
            c: Coordinates, shape (S, G, r).
            moments: What the step before left, of that shape.
            direction: h of the step, clipped, of that shape.
            step: The step's number, from 1.

        Returns:
            Minus what c changes by at a step size of 1, of that shape, and the moments after the step.
        """
        moved, moments = updated(self._algorithm, moments, direction * self._lift, step)
        decay = self._algorithm.weight_decay * (self._decays * c + self._home)
        return self._pace * (self._reach * moved + decay), moments


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """What G settings take of one set.

    Attributes:
        weights: (1-α)/B_R or -α/B_F, shape (G, 1).
        any_taken: Whether one of them is not 0.
        all_taken: Whether none of them is.
    """

    weights: Tensor
    any_taken: bool
    all_taken: bool


class Field:
    """The direction of a step anywhere in the coordinates, for S seeds and at G settings side by side."""

    def __init__(
        self,
        network: LinearisedNetwork,
        algorithm: Algorithm,
        retain: RolledSet,
        forget: RolledSet,
        seeds: Sequence[int],
        like: Tensor,
        mask: Tensor | None,
        signs: Tensor | None,
    ) -> None:
        """Take the sets and what lies in the coordinates.

        Args:
            network: The compressed network.
            algorithm: The algorithm; its step size and mix are in the shares.
            retain: The retain set.
            forget: The forget set.
            seeds: Seeds of the runs.
            like: A tensor of the working dtype and device.
            mask: As `mask_and_signs` has it.
            signs: Likewise.
        """
        self._loss, self._algorithm, self._seeds = network.loss, algorithm, tuple(seeds)
        self._retain, self._forget = retain, forget
        self._mask, self._signs = mask, signs
        self._gradient_metric, self._decay_metric, self._decay_anchor = (
            part.to(like) for part in (network.gradient_metric, network.decay_metric, network.decay_anchor)
        )
        self._masks_inside = mask is None or network.masks_inside
        self._decay = 0.0 if algorithm.adaptive else algorithm.weight_decay  # AdamW's is no part of the gradient
        self.drawn = 0, 0  # samples of either set that the last step's gradient is of

    def at(
        self, c: Tensor, shares: tuple[Share, Share], plan: StepPlan, step: int, *, leakage: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The step's direction.

        Args:
            c: Coordinates, shape (S, G, r).
            shares: What the settings take of the retain and of the forget set.
            plan: What the step does.
            step: Its number, from 1.
            leakage: Whether the forget batch's prediction divergence is asked for.

        Returns:
            h, clipped and with SGD's decay, shape (S, G, r), and that divergence, shape (S, G), or None.
        """
        retain, _, first = self._gradient(self._retain, c, shares[0], plan.retain, step, leakage=False)
        forget, divergence, second = self._gradient(self._forget, c, shares[1], plan.forget, step, leakage=leakage)
        self.drawn = first if plan.retain else 0, second if plan.forget else 0
        masked = forget if self._mask is None else forget @ self._mask
        direction = retain + masked
        if plan.max_norm is not None:
            # P ĝ = P^{1/2} V h with h these coordinates, so its square is hᵀ metric h, but for layers' step sizes. A mask M
            # takes the forget part out of the span of V, where P = I: ‖V h_R + M V h_F‖².
            if self._masks_inside:
                square = ((direction @ self._gradient_metric) * direction).sum(-1)
            else:
                square = (retain * retain + 2 * retain * masked + forget * masked).sum(-1)
            norm = square.clamp_min(0).sqrt().unsqueeze(-1)
            direction = direction * (plan.max_norm / (norm + CLIP_EPSILON)).clamp_max(1.0)
        if self._decay:
            direction = direction + self._decay * (c @ self._decay_metric + self._decay_anchor)
        if plan.pull and self._signs is not None:
            direction = direction + plan.pull * self._signs
        return direction, divergence

    def _gradient(
        self, part: RolledSet, c: Tensor, share: Share, drawn: float, step: int, *, leakage: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """One set's share of the direction, its prediction divergence if asked for, and how many samples were drawn."""
        seeds, settings = c.shape[:2]
        if not (drawn or leakage):  # as in a run, the set draws nothing
            return torch.zeros_like(c), None, 0
        indices = part.draw()
        # Leakage is watched even where the forget set does not drive the run.
        if indices.numel() == 0 or not (leakage or (drawn and share.any_taken)):
            return torch.zeros_like(c), None, indices.numel()
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
        found = checked_residual(self._algorithm, self._loss, batch, forget=part is self._forget)
        residual = found.reshape(seeds, settings, -1)  # s_i: (S, G, b·O)
        weights = share.weights if drawn == 1 else share.weights * drawn
        gradient = (residual @ rows) * weights
        if not (share.all_taken and drawn):  # what is not taken may have left the numbers
            gradient = torch.where(weights == 0, 0.0, gradient)
        if not leakage:
            return gradient, None, indices.numel()
        now = part.looked_at(c, indices)
        assert original is not None
        divergence = self._loss.divergence(original, now, targets).reshape(seeds, settings, -1).mean(-1)
        return gradient, divergence, indices.numel()
