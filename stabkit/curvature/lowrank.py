"""The network linearised at θ* and compressed: outputs f(θ) ≈ f(θ*) + Φ c in r coordinates c.

With V (d, r) the leading right singular directions of J P^{1/2} over sampled retain and forget examples, a displacement
θ - θ* = P^{1/2} V c moves the outputs of sample i by Φ_i c, Φ_i = J_i P^{1/2} V. In these coordinates a preconditioned
step is a plain gradient step, so one compression serves every step size, mix and batch size (theory §§5-6).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabkit._validate import check_int, check_real
from stabkit.curvature.factors import SampleFactors
from stabkit.curvature.jacobian import ScaledJacobian
from stabkit.losses import Loss
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.samples import Samples

OVERSAMPLING = 10
FIRST_RANK = 50  # where the rank is to be found
PROBES = 8  # behind `LinearisedNetwork.captured`


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearisedSet:
    """One set's outputs at θ* and their derivatives in the compressed coordinates.

    Attributes:
        outputs: f_i(θ*), shape (m, ...), O numbers a sample.
        features: Φ_i, shape (m, O, r).
        targets: Targets of the m samples.
        indices: Which samples of the set these are, shape (m,).
        population: Number n of samples in the whole set.
    """

    outputs: Tensor
    features: Tensor
    targets: Tensor
    indices: Tensor
    population: int

    @property
    def samples(self) -> int:
        """Number m of samples held."""
        return self.outputs.shape[0]

    def factors(self, loss: Loss) -> SampleFactors:
        """Per-sample Gauss-Newton factors and gradients in the compressed coordinates.

        Args:
            loss: The per-sample loss.

        Returns:
            Factors V_i = L_i^T Φ_i of shape (m, O, r) and gradients Φ_i^T s_i of shape (m, r), float64.
        """
        outputs, features = self.outputs.double(), self.features.double()
        targets = self.targets.double() if self.targets.is_floating_point() else self.targets
        residual = loss.residual(outputs, targets).flatten(1)
        return SampleFactors(
            factors=loss.factor_transpose(outputs, targets, features).detach(),
            gradients=torch.einsum("mor,mo->mr", features, residual),
            population=self.population,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearisedNetwork:
    """Both sets in the same compressed coordinates, and the way back to parameters.

    Attributes:
        retain: The retain samples.
        forget: The forget samples.
        basis: V, orthonormal, shape (d, r).
        preconditioner: P.
        loss: The per-sample loss.
        divergence_level: Retain loss at which a run counts as diverged.
        metric: V^T P V, shape (r, r): ‖θ - θ*‖² = c^T metric c.
        anchor: V^T P^{1/2} θ*, shape (r,): <θ - θ*, θ*> = anchor · c.
        anchor_norm: ‖θ*‖.
        singular_values: Of the (weighted) J P^{1/2}, the r kept, descending.
        captured: Share of ‖J P^{1/2}‖_F² that the r directions carry, estimated for each set; the smaller of the two.
        gradient_equivalents: Per-sample gradient evaluations spent; a forward pass counts as a third.
    """

    retain: LinearisedSet
    forget: LinearisedSet
    basis: Tensor
    preconditioner: Preconditioner
    loss: Loss
    divergence_level: float
    metric: Tensor
    anchor: Tensor
    anchor_norm: float
    singular_values: Tensor
    captured: float
    gradient_equivalents: float

    @property
    def rank(self) -> int:
        """Number r of coordinates."""
        return self.basis.shape[1]

    def displacement(self, coordinates: Tensor) -> Tensor:
        """θ - θ* = P^{1/2} V c.

        Args:
            coordinates: c, shape (r,).

        Returns:
            Vector of shape (d,).
        """
        return self.preconditioner.sqrt(self.basis @ coordinates.to(self.basis.dtype))


def linearise(
    problem: UnlearningProblem,
    preconditioner: Preconditioner,
    *,
    rank: int | None = 100,
    tolerance: float = 0.05,
    retain_samples: int | None = 512,
    forget_samples: int | None = 256,
    seed: int = 0,
) -> LinearisedNetwork:
    """Compress J P^{1/2} of sampled examples by a randomised singular value decomposition (Halko et al. 2011).

    The mean gradients of both sets join the sketch, which so holds the first step of any mix. Each set's rows are weighted
    by 1/√m, so a small forget set keeps its directions.

    Args:
        problem: The unlearning problem.
        preconditioner: P of the algorithm.
        rank: Number r of directions to keep; fewer when the samples give fewer. When None it is doubled, from 50 on, until
            all but `tolerance` is captured.
        tolerance: Share of ‖J P^{1/2}‖_F² that may be missing where the rank is None.
        retain_samples: Retain examples to sample; all when None.
        forget_samples: Forget examples to sample; all when None.
        seed: Seed of the sample and of the sketch.

    Returns:
        The compressed network. Cost: about 2·min(O, r)·m per-sample gradients, or 2·r·m where a sample's O·d derivatives
        are too many to hold; memory d·r for the basis and m·O·r for the features. A rank that is found costs that again
        for each doubling.
    """
    if rank is not None:
        check_int(rank, name="rank", owner="linearise", low=1, remedy="None finds one.")
    check_real(tolerance, name="tolerance", owner="linearise", low=0, high=1)
    for name, count in (("retain_samples", retain_samples), ("forget_samples", forget_samples)):
        if count is not None:
            check_int(count, name=name, owner="linearise", low=1, remedy="None takes all of them.")
    samples = retain_samples, forget_samples
    if rank is not None:
        return _compressed(problem, preconditioner, rank, samples, seed)
    tried, spent = FIRST_RANK, 0.0
    while True:
        network = _compressed(problem, preconditioner, tried, samples, seed)
        spent += network.gradient_equivalents
        if network.captured >= 1 - tolerance or network.rank < tried:  # fewer than asked for: there are no more
            return replace(network, gradient_equivalents=spent)
        tried *= 2


def _compressed(
    problem: UnlearningProblem,
    preconditioner: Preconditioner,
    rank: int,
    counts: tuple[int | None, int | None],
    seed: int,
) -> LinearisedNetwork:
    """The linearisation at a given rank."""
    generator = torch.Generator().manual_seed(seed)
    sets: list[Samples] = [problem.retain, problem.forget]
    indices = [problem.retain.subset(counts[0], seed), problem.forget.subset(counts[1], seed + 1)]
    jacobians = [ScaledJacobian(problem, s, i, preconditioner) for s, i in zip(sets, indices, strict=True)]
    evaluated = [problem.evaluate(s, indices=i) for s, i in zip(sets, indices, strict=True)]
    rows = sum(i.numel() * j.outputs_per_sample for i, j in zip(indices, jacobians, strict=True))
    width = min(rank + OVERSAMPLING, rows, problem.size)

    # Columns of P^{1/2} J^T: noise, summed over the sets; either set's mean gradient; random signs, kept to be held against.
    sketch = torch.zeros(problem.size, width + 2, dtype=problem.dtype, device=problem.device)
    probed = []
    for place, (jacobian, (outputs, targets, _)) in enumerate(zip(jacobians, evaluated, strict=True)):
        m, o = outputs.shape[0], jacobian.outputs_per_sample
        noise = torch.randn(m, o, width, generator=generator, dtype=torch.float32) / m**0.5
        signs = 2.0 * torch.randint(0, 2, (m, o, PROBES), generator=generator) - 1.0
        drawn = torch.cat([noise, signs], dim=2).to(problem.device, problem.dtype)
        residual = problem.loss.residual(outputs, targets).reshape(m, o, 1) / m
        pulled = jacobian.transpose_matmul(torch.cat([drawn, residual], dim=2))
        sketch[:, :width] += pulled[:, :width]
        sketch[:, width + place] = pulled[:, -1]
        probed.append(pulled[:, width:-1].clone())
    basis = torch.linalg.qr(sketch).Q  # d columns where the sketch has more
    spent = sum(
        i.numel() * (_passes(j, width + PROBES + 1) + _passes(j, basis.shape[1]) + 1 / 3)
        for i, j in zip(indices, jacobians, strict=True)
    )
    features = [jacobian @ basis for jacobian in jacobians]

    # Weighted features: their right singular vectors rotate the sketch's basis to the leading directions.
    weighted = torch.cat([f.flatten(0, 1) / f.shape[0] ** 0.5 for f in features]).double()
    energies, rotation = torch.linalg.eigh(weighted.T @ weighted)
    kept = energies.flip(0)[:rank].clamp_min(0)
    keep = max(1, int((kept > kept[0] * torch.finfo(problem.dtype).eps ** 2).sum()))
    rotation = rotation.flip(1)[:, :keep]
    basis = (basis.double() @ rotation).to(problem.dtype)
    theta = problem.vector()
    root = preconditioner.sqrt(basis)
    linearised = [
        LinearisedSet(
            outputs=outputs,
            features=(f.double() @ rotation).to(problem.dtype),
            targets=targets,
            indices=chosen,
            population=samples.size,
        )
        for samples, chosen, f, (outputs, targets, _) in zip(sets, indices, features, evaluated, strict=True)
    ]
    return LinearisedNetwork(
        retain=linearised[0],
        forget=linearised[1],
        basis=basis,
        preconditioner=preconditioner,
        loss=problem.loss,
        divergence_level=problem.divergence_level,
        metric=(root.T @ root).double(),
        anchor=(root.T @ theta).double(),
        anchor_norm=float(theta.double().norm()),
        singular_values=kept[:keep].sqrt(),
        captured=min(_captured(basis, block) for block in probed),
        gradient_equivalents=spent,
    )


def _captured(basis: Tensor, probed: Tensor) -> float:
    """Share of ‖J P^{1/2}‖_F² inside the basis, from P^{1/2} J^T u for random signs u (Hutchinson)."""
    # E‖P^{1/2} J^T u‖² is the squared norm, and E‖V^T P^{1/2} J^T u‖² the part inside.
    whole = float(probed.double().square().sum())
    return min(float((basis.T @ probed).double().square().sum()) / whole, 1.0) if whole > 0 else 1.0


def _passes(jacobian: ScaledJacobian, vectors: int) -> int:
    """Passes a sample that one product with a block takes."""
    return jacobian.outputs_per_sample if jacobian.by_rows(vectors) else vectors
