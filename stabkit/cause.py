"""Why a run breaks: the direction that grows first, split by layer and by sample, and how far to believe it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabkit.algorithms import Algorithm
from stabkit.calibration import FAR_ERROR, MAX_AWAKENED
from stabkit.curvature.dormant import awakened
from stabkit.curvature.factors import SampleFactors
from stabkit.curvature.jacobian import ScaledJacobian
from stabkit.curvature.linearised import SMALL_MOVE, LinearisedNetwork
from stabkit.measure import Measurement
from stabkit.problem import UnlearningProblem
from stabkit.report import Cause, Share
from stabkit.rollout import Rollout, rollout
from stabkit.stability import mean_growth
from stabkit.staged import first_steps, rounding

TOP_SAMPLES = 10


def find_cause(measurement: Measurement, rolled: Rollout, *, mean_square_growth: float) -> Cause:
    """The eigenvector of the mixed curvature that breaks first (T4), and where the rolled-out run goes.

    Growth a step is above 1 for η·λ > 2(1+β), with momentum β, for less with Nesterov's, and for λ < 0. A direction is named
    as the mechanism if it grows by at least a factor e within the run; what creeps, along negative curvature or in the mean
    square, by the time that the rollout breaks, if it does.

    Args:
        measurement: Spectrum and linearised network.
        rolled: Rollout of the one setting that is asked about.
        mean_square_growth: K·ln ρ(T_η) (T8), which is that of plain steps: with momentum it names no mechanism.

    Returns:
        The cause. Cost: none on the network, but a pull and a push over the samples that directions are drawn from where
        the basis is not held.
    """
    problem, spectrum, algorithm = measurement.problem, measurement.spectrum, measurement.algorithm
    values = spectrum.pairs.values
    growth = mean_growth(values, algorithm.lr, momentum=algorithm.inertia, nesterov=algorithm.nesterov)
    place = int(growth.argmax())
    value = float(values[place])
    retain, forget = float(spectrum.retain[place]), float(spectrum.forget[place])
    vector = spectrum.pairs.vectors[:, place].to(problem.device, problem.dtype)
    displacement = measurement.network.movement(rolled.coordinates[0, 0].to(problem.device))

    inside = measurement.network.inside(vector)
    factor = float(growth[place])
    breaks = rolled.expected_divergence_step()[0]
    lasts = breaks / algorithm.steps if breaks else 1.0  # share of the steps that there is to grow in
    grows = factor > 1 and algorithm.steps * math.log(factor) * (1 if value > 0 else lasts) >= 1
    ascended = algorithm.mix * forget >= -min(0.0, (1 - algorithm.mix) * retain)
    mechanism = "none"
    # Of an algorithm that descends on the forget set D has that set's curvature with the wrong sign.
    if grows and (value > 0 or not ascended or algorithm.ascends):
        mechanism = "overshoot" if value > 0 else "ascent" if ascended else "saddle"
    elif (
        algorithm.ascends and algorithm.inertia == 0 and mean_square_growth * lasts >= 2
    ):  # of the square: a factor e of the displacement
        mechanism = "noise"
    elif float(rolled.probability[0]) >= 0.5:
        mechanism = "nonlinear"
    return Cause(
        mechanism=mechanism,
        eigenvalue=value,
        retain_curvature=retain,
        forget_curvature=forget,
        eigenvector_layers=layer_shares(problem, vector),
        displacement_layers=layer_shares(problem, displacement),
        retain_samples=_sample_shares(measurement.retain, measurement.network.retain.indices, inside),
        forget_samples=_sample_shares(measurement.forget, measurement.network.forget.indices, inside),
    )


def linearisation_errors(
    problem: UnlearningProblem, network: LinearisedNetwork, rolled: Rollout, *, staged: bool = False
) -> tuple[float, float]:
    """How wrong the linearised network is at the rolled-out displacement δ of the first seed (theory §6).

    A run that diverged is looked at on the way, where the linearised retain loss first meets the divergence level: what lies
    far beyond need not be right for the verdict to be.

    Args:
        problem: The unlearning problem.
        network: The compressed network.
        rolled: Rollout of the one setting that is asked about.
        staged: Whether a staged rollout looks after dormant tensors itself; their share is then left at 0.

    Returns:
        ‖f(θ* + δ) - f(θ*) - Φc‖ / ‖Φc‖ over the linearised samples of both sets, infinity where outputs are not finite, and
        the share of the outputs' sensitivity there that is to tensors which were dormant at θ*. Cost: one forward pass over
        the samples, and gradients of up to 128 where there are such tensors.
    """
    c = rolled.coordinates[0, 0].to(network.basis.device)
    if not bool(torch.isfinite(c).all()):
        return math.inf, 0.0
    c = c * _share_to_level(network, c, problem.divergence_level)
    return _errors_at(problem, network, c, problem.vector() + network.displacement(c), staged=staged)


def errors_below(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    critical: float,
    *,
    batch_sizes: tuple[int, int],
    seed: int,
) -> tuple[float, float]:
    """How wrong the linearised network is at the end of a run of half the critical step size, by `linearisation_errors`.

    Args:
        problem: The unlearning problem.
        network: The compressed network.
        algorithm: Everything but the step size is read from it.
        critical: The critical step size.
        batch_sizes: B_R and B_F.
        seed: Of the rollout.

    Returns:
        The error, and the share of the sensitivity there that is to tensors dormant at θ*. Cost: a rollout, a forward pass
        over the linearised samples, and gradients of up to 128 where there are such tensors.
    """
    rolled = rollout(network, algorithm, lr=[critical / 2], mix=[algorithm.mix], batch_sizes=batch_sizes, seeds=[seed])
    return linearisation_errors(problem, network, rolled)


def reach(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    scanned: tuple[float, float],
    *,
    batch_sizes: tuple[int, int],
    seed: int,
) -> tuple[float, int]:
    """Step size up to which the linearised network is right to the end of a run, where no scanned one breaks.

    Args:
        problem: The unlearning problem.
        network: The compressed network.
        algorithm: Everything but the step size is read from it.
        scanned: Lower and upper end of the scan.
        batch_sizes: B_R and B_F.
        seed: Of the rollouts.

    Returns:
        The upper end where it is right there, the lower end where it is wrong even there, and otherwise what halving the
        scan's logarithm finds, to a tenth; and how many rollouts that took, up to eight. Cost: those, each with a look as
        `linearisation_errors` has it.
    """

    def right(lr: float) -> bool:
        rolled = rollout(network, algorithm, lr=[lr], mix=[algorithm.mix], batch_sizes=batch_sizes, seeds=[seed])
        error, awake = linearisation_errors(problem, network, rolled)
        return error <= FAR_ERROR and awake <= MAX_AWAKENED

    low, high = scanned
    looks = 1
    if right(high):
        return high, looks
    while high > 1.1 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if right(middle) else (low, middle)
        looks += 1
    return low, looks


def start_errors(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seed: int,
    staged: bool = False,
) -> tuple[float, float]:
    """How wrong the linearised network is after a run's first steps, where no rollout says where all parameters are (T15).

    Args:
        problem: The unlearning problem.
        network: Its linearisation in sampled parameters.
        algorithm: The algorithm with its step size and mix.
        batch_sizes: B_R and B_F.
        seed: Seed of the batches.
        staged: As `linearisation_errors` has it.

    Returns:
        What `linearisation_errors` returns. Cost: as `staged.first_steps` and that have it.
    """
    c, theta = first_steps(problem, network, algorithm, batch_sizes=batch_sizes, seed=seed)
    return _errors_at(problem, network, c, theta, staged=staged, least=rounding(theta))


def _errors_at(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    c: Tensor,
    theta: Tensor,
    *,
    staged: bool,
    least: float = SMALL_MOVE,
) -> tuple[float, float]:
    """Relative error of the outputs f(θ*) + Φc at θ, and the dormant tensors' share of the sensitivity there."""
    there = problem.at(theta)
    outputs = [
        ScaledJacobian(there, samples, part.indices, network.preconditioner, coupled=part.coupled).outputs()
        for samples, part in ((problem.retain, network.retain), (problem.forget, network.forget))
    ]
    error = network.output_error(c, outputs, least=least)
    return error, 0.0 if staged else awakened(problem, network, there.parameters)


def _share_to_level(network: LinearisedNetwork, c: Tensor, level: float) -> float:
    """The share of a displacement, at most 1, at which the linearised retain loss is at the level."""
    part = network.retain
    change = (part.features.double() @ c).reshape(part.outputs.shape)

    def above(share: float) -> bool:
        losses = network.loss.per_sample(part.outputs.double() + share * change, part.targets)
        return not float(losses.mean()) < level

    if not above(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return high


def layer_shares(problem: UnlearningProblem, vector: Tensor) -> tuple[Share, ...]:
    """Squared norm of a parameter vector by layer.

    Args:
        problem: The unlearning problem.
        vector: Shape (d,).

    Returns:
        Shares, largest first; none where the vector is zero or not finite.
    """
    layers = problem.layer_of()
    energy: dict[str, float] = {}
    for name, part in problem.unflatten(vector).items():
        energy[layers[name]] = energy.get(layers[name], 0.0) + float(part.double().square().sum())
    total = sum(energy.values())
    if not (math.isfinite(total) and total > 0):
        return ()
    ordered = sorted(energy.items(), key=lambda item: -item[1])
    return tuple(Share(name=layer or "(model)", share=value / total) for layer, value in ordered)


def _sample_shares(factors: SampleFactors, indices: Tensor, direction: Tensor) -> tuple[Share, ...]:
    """Each sample's part of its set's curvature along a direction given in compressed coordinates."""
    curvature = (factors.factors @ direction.to(factors.factors.device)).square().sum(1)
    total = float(curvature.sum())
    if not total > 0:
        return ()
    top = curvature.argsort(descending=True)[:TOP_SAMPLES]
    return tuple(Share(name=str(int(indices[i])), share=float(curvature[i]) / total) for i in top.cpu())
