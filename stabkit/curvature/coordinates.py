"""The network linearised at θ* and seen through a sample of its parameters: what AdamW's steps need (T15).

AdamW treats each parameter by itself, so no few directions carry its steps. A sample of parameters does: parameter j is
taken with probability π_j and counts w_j = 1/π_j times. In the coordinates c_j = √w_j (θ - θ*)_j, with Φ_ij = √w_j J_ij, the
outputs f(θ*) + Φ c are those of the linearised network on average over the draws, and h = Φᵀ s has h_j = √w_j g_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from stabkit.curvature.dormant import dormant_tensors
from stabkit.curvature.factors import SampleFactors
from stabkit.curvature.gradients import gradient_blocks, summed_squares
from stabkit.curvature.jacobian import ScaledJacobian
from stabkit.curvature.linearised import ROWS_AT_ONCE, LinearisedNetwork, LinearisedSet, given_factors
from stabkit.curvature.lowrank import chosen_samples, coupled_sizes
from stabkit.precision import float32_by_default
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem

EVENLY = 0.1  # share of the sample that is drawn evenly, so that no parameter counts more than ten times d/r
SENSED = 48  # samples of each set that say how sensitive the outputs are to each parameter
THEORY_DIRECTIONS = 100  # that the linear theory is computed in


@dataclass(frozen=True, kw_only=True, eq=False)
class CoordinateNetwork(LinearisedNetwork):
    """Both sets in the coordinates of r sampled parameters, in random order.

    V has √w_k at the k-th sampled parameter in column k and is not held: `basis` has no rows. `preconditioner` is that of
    the linear theory, frozen Adam's, which the rollout does not read; P = I in `metric`, the identity, and `anchor`,
    √w ∘ θ*. `singular_values` are the norms of the columns of Φ, and `captured` is 1: nothing is left out on average.

    Attributes:
        size: Number d of parameters.
        places: Which of them were sampled, shape (r,).
        weights: w, shape (r,).
        run_p: P of the algorithm, diagonal.
        lift: a/√w with a the diagonal of that P, shape (r,): the gradient that AdamW is given is lift ∘ h.
        pace: Factor of the step size of each parameter's layer, shape (r,).
        scales: √p with p the diagonal of the theory's P, shape (r,).
    """

    masks_inside: ClassVar[bool] = True

    size: int
    places: Tensor
    weights: Tensor
    run_p: Preconditioner
    lift: Tensor
    pace: Tensor
    scales: Tensor

    @property
    def run_preconditioner(self) -> Preconditioner:
        """P as the steps of a run apply it, before AdamW."""
        return self.run_p

    @cached_property
    def directions(self) -> Tensor:
        """Leading right singular vectors of Φ diag(√p), shape (r, q), float64: what the linear theory is computed in."""
        gram = torch.zeros(self.rank, self.rank, dtype=torch.float64, device=self.weights.device)
        for part in (self.retain, self.forget):
            for rows in part.features.flatten(0, 1).split(ROWS_AT_ONCE):
                gram += rows.double().T @ rows.double() / part.samples
        gram *= self.scales.double().unsqueeze(1) * self.scales.double()
        return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :THEORY_DIRECTIONS]

    def masked(self, mask: Tensor) -> Tensor:
        """What a mask does to a gradient in the coordinates.

        Args:
            mask: Shape (d,).

        Returns:
            Diagonal matrix, shape (r, r).
        """
        return torch.diag(mask[self.places].to(self.weights))

    def gradient_along(self, vector: Tensor) -> Tensor:
        """A gradient in the coordinates.

        Args:
            vector: Shape (d,).

        Returns:
            √w ∘ u where sampled, shape (r,).
        """
        return vector[self.places].to(self.weights) * self.weights.sqrt()

    def with_paces(self, paces: Tensor | None) -> CoordinateNetwork:
        """The network with other step sizes of its layers.

        Args:
            paces: Factors of the step size, shape (d,); all 1 when None.

        Returns:
            The network, which shares this one's memory.
        """
        pace = torch.ones_like(self.weights) if paces is None else paces[self.places].to(self.weights)
        return replace(self, pace=pace)

    def with_theory(self, frozen: Preconditioner) -> CoordinateNetwork:
        """The network with another P of the linear theory, which changes no rollout.

        Args:
            frozen: diag(p).

        Returns:
            The network, which shares this one's memory.
        """
        return replace(
            self, preconditioner=frozen, scales=_diagonal(frozen, self.size, self.weights)[self.places].sqrt()
        )

    def factors(self) -> tuple[SampleFactors, SampleFactors]:
        """Both sets' curvature factors in the leading directions.

        Returns:
            Retain and forget factors.
        """
        turning = self.scales.double().unsqueeze(1) * self.directions
        turned = [
            replace(part, features=part.features @ turning.to(part.features)) for part in (self.retain, self.forget)
        ]
        return turned[0].factors(self.loss), turned[1].factors(self.loss)

    def inside(self, vector: Tensor) -> Tensor:
        """A direction of the preconditioned problem in the leading directions.

        Args:
            vector: Shape (d,).

        Returns:
            Estimate of its coordinates, shape (q,), float64 on the CPU.
        """
        return (self.directions.T @ self.gradient_along(vector).to(self.directions)).cpu()

    def thinned(self, *, rank: int | None = None, samples: float = 1.0) -> CoordinateNetwork:
        """A part of the sampled parameters, which then count for more, and of the samples.

        Args:
            rank: Parameters to keep; all when None.
            samples: Part of the samples to keep, as of any linearised network.

        Returns:
            The smaller network.
        """
        r = self.rank if rank is None else min(rank, self.rank)
        more = (self.rank / r) ** 0.5
        sets = [
            part.thinned(samples) if part.samples < part.population else part for part in (self.retain, self.forget)
        ]
        return replace(
            self,
            retain=replace(sets[0], features=sets[0].features[..., :r] * more),
            forget=replace(sets[1], features=sets[1].features[..., :r] * more),
            basis=self.basis[:, :r],
            metric=self.metric[:r, :r],
            anchor=self.anchor[:r] * more,
            gradient_metric=self.gradient_metric[:r, :r],
            decay_metric=self.decay_metric[:r, :r],
            decay_anchor=self.decay_anchor[:r] * more,
            singular_values=self.singular_values[:r] * more,
            places=self.places[:r],
            weights=self.weights[:r] * more**2,
            lift=self.lift[:r] / more,
            pace=self.pace[:r],
            scales=self.scales[:r],
        )

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Refused: where the parameters are that were not sampled is not known.

        Args:
            coordinates: c, shape (r,).

        Raises:
            TypeError: Always. `movement` has what layers share.
        """
        raise TypeError(
            "`displacement` of `CoordinateNetwork` must not be asked: it knows a sample of the parameters alone. Use "
            "`movement` for what each layer has of it, on average."
        )

    def movement(self, coordinates: Tensor) -> Tensor:
        """A vector whose energy in any group of parameters is that of θ - θ* on average: √w (θ - θ*) where sampled.

        Args:
            coordinates: c, shape (r,).

        Returns:
            Vector of shape (d,), 0 at the parameters that were not sampled.
        """
        found = self.basis.new_zeros(self.size)
        found[self.places] = coordinates.to(found)
        return found


def _diagonal(preconditioner: Preconditioner, size: int, like: Tensor) -> Tensor:
    """The diagonal of a diagonal P."""
    return preconditioner.apply(like.new_ones(size))


def coordinates_cost(samples: Sequence[int], outputs: int, count: int, *, coupled: bool) -> float:
    """What `sample_coordinates` takes.

    Args:
        samples: Samples of each set that are linearised.
        outputs: Outputs O of each.
        count: Parameters r to draw.
        coupled: Whether batches are coupled.

    Returns:
        Per-sample gradients; a forward pass counts as a third.
    """
    passes = (count if coupled else min(outputs, count)) + (2 if coupled else 1) / 3
    return sum(samples) * passes + sum(min(SENSED, m) for m in samples)


@float32_by_default()
def sample_coordinates(
    problem: UnlearningProblem,
    frozen: Preconditioner,
    *,
    run_p: Preconditioner,
    paces: Tensor | None = None,
    decays: Tensor | None = None,
    count: int = 400,
    retain_samples: int | None = 896,
    forget_samples: int | None = 448,
    batch_sizes: tuple[int, int] | None = None,
    seed: int = 0,
) -> CoordinateNetwork:
    """Linearise a network in a sample of its parameters.

    They are drawn systematically, nine tenths of them in proportion to the root mean square of the outputs' derivatives
    times the layer's step size, as AdamW moves each by about that, and one tenth evenly. Parameters that P or their layer's
    step size holds still are never drawn.

    Args:
        problem: The unlearning problem.
        frozen: diag(p), the P of the linear theory, such as frozen Adam's with the algorithm's P in it.
        run_p: The algorithm's P, diagonal.
        paces: Factors of the step size, shape (d,); all 1 when None.
        decays: Factors of the weight decay, likewise.
        count: Parameters to draw, r; all that move where they are fewer.
        retain_samples: Retain examples to sample; all when None.
        forget_samples: Forget examples to sample; all when None.
        batch_sizes: B_R and B_F of the run, which matter with batchnorm="batch" alone, as in `linearise`.
        seed: Seed of both samples.

    Returns:
        The network. Cost: min(O, r) passes for each sample, a forward pass, and up to 96 gradients; memory: Φ, and rows or
        vectors as a product with J holds them.

    Raises:
        ValueError: If P holds every parameter still.
    """
    both = problem.retain, problem.forget
    coupled = coupled_sizes(problem, batch_sizes)
    indices = [
        chosen_samples(samples, asked, size, seed + i, shuffled=True)
        for i, (samples, asked, size) in enumerate(zip(both, (retain_samples, forget_samples), coupled, strict=True))
    ]
    theta = problem.vector()
    own = _diagonal(run_p, problem.size, theta)
    sensitivity = _sensitivity(problem, indices, seed).to(theta)
    pace, decay = (torch.ones_like(theta) if factors is None else factors.to(theta) for factors in (paces, decays))
    places, weights = _drawn(sensitivity.sqrt() * pace, (own > 0) & (pace > 0), count, seed)
    places = places.to(theta.device)
    w = weights.to(theta)
    scale = w.sqrt()

    sets = []
    for samples, chosen, size in zip(both, indices, coupled, strict=True):
        jacobian = ScaledJacobian(problem, samples, chosen, run_p, coupled=size)
        outputs, targets, _ = problem.evaluate(samples, indices=chosen)
        jacobian.counted = problem.loss.counted(outputs, targets)
        sets.append(
            LinearisedSet(
                outputs=outputs if size is None else jacobian.outputs(),
                features=jacobian.columns(places, scale),
                targets=targets,
                indices=chosen,
                population=samples.size,
                original=None if size is None else outputs,
                coupled=size,
            )
        )
    return CoordinateNetwork(
        retain=sets[0],
        forget=sets[1],
        basis=theta.new_empty(0, places.numel()),
        preconditioner=frozen,
        loss=problem.loss,
        divergence_level=problem.divergence_level,
        check_every=problem.check_every,
        metric=torch.eye(places.numel(), dtype=torch.float64, device=theta.device),
        anchor=(scale * theta[places]).double(),
        anchor_norm=float(theta.double().norm()),
        gradient_metric=torch.diag(w * (own[places] / scale).square()),
        decay_metric=torch.diag(decay[places].double()),
        decay_anchor=(scale * decay[places] * theta[places]).double(),
        singular_values=sum(
            (part.features.double().square().sum((0, 1)) / part.samples for part in sets), start=torch.zeros(()).to(w)
        ).sqrt(),
        captured=1.0,
        gradient_equivalents=coordinates_cost(
            [part.samples for part in sets],
            sets[0].features.shape[1],
            places.numel(),
            coupled=coupled != (None, None),
        ),
        dormant=dormant_tensors(problem, sensitivity.sqrt().unsqueeze(1)),
        layered=given_factors(paces=paces, decays=decays),
        size=problem.size,
        places=places,
        weights=w,
        run_p=run_p,
        lift=own[places] / scale,
        pace=pace[places],
        scales=_diagonal(frozen, problem.size, theta)[places].sqrt(),
    )


def _sensitivity(problem: UnlearningProblem, indices: Sequence[Tensor], seed: int) -> Tensor:
    """Σ_o J_io², its mean over some samples of either set, summed, by random signs: shape (d,), float64."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(problem.size, dtype=torch.float64, device=problem.device)
    for samples, chosen in zip((problem.retain, problem.forget), indices, strict=True):
        few = chosen[torch.linspace(0, chosen.numel() - 1, min(SENSED, chosen.numel())).round().long()]
        outputs, targets, _ = problem.evaluate(samples, indices=few)
        signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        counted = problem.loss.counted(outputs, targets)
        if counted is not None:
            signs = signs * counted.reshape(signs.shape)
        for block in gradient_blocks(problem, samples, few, cotangents=signs):
            total += summed_squares(problem, block) / few.numel()
    return total


def _drawn(sizes: Tensor, moving: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places of `count` parameters that move, drawn systematically by their sizes, and weights, in random order."""
    moving = moving.cpu()
    sizes = sizes.double().cpu() * moving
    if not bool((sizes > 0).any()):
        raise ValueError(
            "`preconditioner` of an AdamW run must let some parameter move that the outputs depend on; got one that holds "
            "all of them still. Keep more of them."
        )
    count = min(count, int(moving.sum()))
    chances = (1 - EVENLY) * sizes / sizes.sum() + EVENLY * moving / moving.sum()
    certain = torch.zeros_like(moving)
    while True:  # what would be drawn more than once is drawn for certain, and the others share the rest
        rest = chances.masked_fill(certain, 0.0)
        inclusion = torch.where(certain, 1.0, rest * ((count - int(certain.sum())) / rest.sum().clamp_min(1e-300)))
        over = (inclusion >= 1) & ~certain
        if not bool(over.any()):
            break
        certain |= over
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    passed = (inclusion.masked_fill(certain, 0.0).cumsum(0) + start).floor()
    taken = certain | (passed > torch.cat([torch.zeros(1, dtype=passed.dtype), passed[:-1]]))
    places = taken.nonzero().flatten()
    places = places[torch.randperm(places.numel(), generator=generator)]
    return places, 1 / inclusion[places]
