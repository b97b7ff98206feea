"""What a proposed update costs the retained data, and which part of it does the harm (theory §8)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._table import Shown, Table, number
from stabkit._validate import check_choice, check_int
from stabkit.curvature import GGNOperator, curvature_operator
from stabkit.curvature.gradients import mean_gradient
from stabkit.problem import UnlearningProblem
from stabkit.spectrum import Eigenpairs, extreme_eigenpairs

OWNER = "decompose_update"
EIGEN_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdatePart(Shown):
    """One part of an update, δ, and its cost on the retain set.

    Attributes:
        update: δ, shape (d,).
        share: ‖δ‖² as a share of the whole update's.
        divergence: Mean divergence of the predictions at θ* + δ from those at θ*, measured: KL(original ‖ updated) in nats
            for cross-entropy, mean squared change for squared error, in general the loss's Bregman divergence.
        predicted_divergence: ½ δᵀGδ, G the Gauss-Newton matrix: the same to second order.
        loss_change: Mean retain loss at θ* + δ minus that at θ*, measured.
        predicted_loss_change: ḡ_Rᵀδ + ½ δᵀH_Rδ.
    """

    update: Tensor
    share: float
    divergence: float
    predicted_divergence: float
    loss_change: float
    predicted_loss_change: float

    def __str__(self) -> str:
        return (
            f"update of norm {number(float(self.update.norm()))}, {self.share:.1%} of the whole's square: divergence "
            f"{number(self.divergence)} (predicted {number(self.predicted_divergence)}), loss change "
            f"{number(self.loss_change)} (predicted {number(self.predicted_loss_change)})"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdateDecomposition(Shown):
    """An update as the sum of what harms the retained data and what leaves it as it is.

    Attributes:
        whole: The update itself.
        harming: Its projection on the leading eigenvectors of G, the retain set's Gauss-Newton matrix.
        preserving: The rest.
        eigenpairs: Those eigenvectors, with residuals and outcome.
        samples: Retain samples behind every number.
        curvature: "hessian" or "ggn", of the predicted loss change.
    """

    whole: UpdatePart
    harming: UpdatePart
    preserving: UpdatePart
    eigenpairs: Eigenpairs
    samples: int
    curvature: str

    @property
    def harm(self) -> float:
        """Share of the predicted divergence ½ δᵀGδ that the harming part has; 0 where there is none.

        The parts' predicted divergences add up to the whole's as far as the eigenvectors are exact.
        """
        whole = self.whole.predicted_divergence
        return self.harming.predicted_divergence / whole if whole > 0 else 0.0

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """The parts as a table, with how far they can be trusted.

        Returns:
            Text of several lines.
        """
        rows = []
        for name in ("whole", "harming", "preserving"):
            part: UpdatePart = getattr(self, name)
            numbers = (part.divergence, part.predicted_divergence, part.loss_change, part.predicted_loss_change)
            rows.append((name, f"{part.share:.1%}", *map(number, numbers)))
        pairs = self.eigenpairs
        table = Table(
            title=f"Cost of the update on {self.samples} retain samples",
            columns=("part", "share of ‖δ‖²", "divergence", "predicted", "loss change", "predicted"),
            rows=tuple(rows),
            footer=f"The {pairs.values.numel()} most curved directions carry {self.harm:.1%} of the predicted divergence. "
            f"Predictions are of second order, that of the loss with the {self.curvature}.\n"
            f"Eigenvectors: {pairs.reason} (residuals up to {float(pairs.residuals.max()):.2g} beside {pairs.scale:.3g}).",
        )
        return str(table)


def decompose_update(
    problem: UnlearningProblem,
    update: Tensor,
    *,
    directions: int = 20,
    curvature: str = "hessian",
    samples: int | None = 512,
    max_products: int = 300,
    seed: int = 0,
) -> UpdateDecomposition:
    """Split an update of θ* into what the retained predictions feel and what they do not, and measure both.

    With G = Σ λ_j u_j u_jᵀ the retain set's Gauss-Newton matrix, the mean divergence of its predictions is ½ δᵀGδ + O(‖δ‖³):
    KL(p ‖ p′) has its minimum 0 at δ = 0 and the Fisher information, which is G, as its Hessian there. The harming part is
    the projection on the leading u_j.

    Args:
        problem: The unlearning problem.
        update: δ = θ - θ*, shape (d,).
        directions: How many leading eigenvectors count as harming.
        curvature: "hessian" or "ggn", of the predicted loss change.
        samples: Retain samples behind every number; all when None.
        max_products: Products for the eigenvectors.
        seed: Seed of samples and start vectors.

    Returns:
        The parts, predicted and measured. Cost: the eigenvectors' products, six more at most, one gradient and four forward
        passes a sample. Measured numbers are of the network itself; where they leave the predicted ones behind, the update
        is past the second order.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or the update is zero, not finite or of another length.
    """
    check_int(directions, name="directions", owner=OWNER, low=1)
    check_choice(curvature, name="curvature", owner=OWNER, choices=("hessian", "ggn"))
    if samples is not None:
        check_int(samples, name="samples", owner=OWNER, low=1, remedy="None takes all of them.")
    if not isinstance(update, Tensor):
        raise TypeError(
            f"`update` of `{OWNER}` must be a tensor of shape ({problem.size},); got {type(update).__name__}. "
            "`problem.flatten` makes one of tensors by name, torch.from_numpy of an array."
        )
    if update.shape != (problem.size,):
        raise ValueError(
            f"`update` of `{OWNER}` must be of shape ({problem.size},), one number a trainable parameter; got "
            f"{tuple(update.shape)}. `problem.flatten` makes one vector of tensors by name."
        )
    update = update.detach().to(problem.device, problem.dtype)
    size = float(update.norm(dtype=torch.float64))
    if not math.isfinite(size) or size == 0:
        raise ValueError(f"`update` of `{OWNER}` must be finite and not zero; got one of norm {size:g}.")
    indices = problem.retain.subset(samples, seed)
    operator = GGNOperator(problem, problem.retain, indices=indices)
    pairs = extreme_eigenpairs(
        operator,
        ends=min(directions, problem.size),
        which="largest",
        tolerance=EIGEN_TOLERANCE,
        block=min(8, directions),
        max_products=max_products,
        seed=seed,
    )
    harming = pairs.vectors @ (pairs.vectors.T @ update)
    parts = torch.stack([update, harming, update - harming], 1)  # (d, 3)
    gradient = mean_gradient(problem, problem.retain, indices=indices)
    bent = operator @ parts
    felt = bent if curvature == "ggn" else curvature_operator(problem, problem.retain, indices=indices) @ parts
    divergences, changes = _measured(problem, parts, indices)
    shares = parts.double().square().sum(0) / size**2
    predicted = (parts * bent).sum(0, dtype=torch.float64) / 2
    expected = (gradient.double() @ parts.double()) + (parts * felt).sum(0, dtype=torch.float64) / 2
    whole, harm, preserve = (
        UpdatePart(
            update=parts[:, place].clone(),
            share=float(shares[place]),
            divergence=divergences[place],
            predicted_divergence=float(predicted[place]),
            loss_change=changes[place],
            predicted_loss_change=float(expected[place]),
        )
        for place in range(3)
    )
    return UpdateDecomposition(
        whole=whole, harming=harm, preserving=preserve, eigenpairs=pairs, samples=indices.numel(), curvature=curvature
    )


def _measured(problem: UnlearningProblem, parts: Tensor, indices: Tensor) -> tuple[list[float], list[float]]:
    """Mean divergence and mean loss change on the retain samples, for each column."""
    outputs, targets, _ = problem.evaluate(problem.retain, indices=indices)
    outputs = outputs.double()
    before, slope = problem.loss.per_sample(outputs, targets), problem.loss.residual(outputs, targets)
    divergences, changes = [], []
    for part in parts.T:
        moved, _, _ = problem.evaluate(problem.retain, problem.unflatten(problem.vector() + part), indices)
        moved = moved.double()
        change = problem.loss.per_sample(moved, targets) - before
        # ℓ(f') - ℓ(f) - sᵀ(f' - f): for cross-entropy lse(f') - lse(f) - pᵀ(f' - f), which is KL(p ‖ p').
        linear = (slope * (moved - outputs)).flatten(1).sum(1)
        divergences.append(float((change - linear).mean()))
        changes.append(float(change.mean()))
    return divergences, changes
