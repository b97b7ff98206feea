"""Everything that is measured on the network before a prediction: preconditioner, spectrum, linearisation, curvature."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabkit._progress import progress_bar
from stabkit.adam import frozen_adam
from stabkit.algorithms import SRAGU, Algorithm
from stabkit.algorithms.base import PlainSteps
from stabkit.algorithms.contract import is_of_the_package
from stabkit.coherence import Coherence, coherence
from stabkit.curvature import (
    CoordinateNetwork,
    LinearisedNetwork,
    MixedOperator,
    PreconditionedOperator,
    SampleFactors,
    curvature_operator,
    forward_size,
    linearise,
    sample_coordinates,
)
from stabkit.heavy_tail import layer_exponents
from stabkit.precision import arithmetic
from stabkit.preconditioner import Diagonal, Preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.report import Cost, LayerGate
from stabkit.spectrum import Eigenpairs, affordable_basis, extreme_eigenpairs

COHERENCE_SAMPLES = 256  # of each set, and fewer where their factors have more rows in all than the next number
COHERENCE_ROWS, THEORY_ROWS, FEWEST_SAMPLES = 2**12, 2**14, 16
MOST_DIRECTIONS = 400  # of a rank that is found: what the theory's maps cost grows with its square
# Of a product with a graph that is kept and took a gradient more; typical of convolutions (benchmarks/curvature.py).
PRODUCT_GRADIENTS = {"hessian": 2.5, "ggn": 1.5}
# What PyTorch says of layers that lack a derivative which a prediction takes.
UNDIFFERENTIABLE = (
    "derivative for",
    "from the 'Sparse",
    "functorch transforms",
    "Invalid strides",
    "data pointer of Tensor",  # of packed sequences
    "saved tensor hooks",  # of torch.utils.checkpoint
)
# Parameters that an AdamW run is rolled out in, for each direction of another's linearisation; fewer where real steps
# decide, and the rollout only says where to begin.
COORDINATES, COORDINATES_OF_STAGED = 8, 1
# Fewer too where each sample has many outputs, as texts have: derivatives of one sample, and outputs of either set, of so
# many samples at least.
COORDINATE_ENTRIES, COORDINATE_ROWS, FEWEST_ROLLED = 2**17, 2**15, 64
SECOND_MOMENT_READS = frozenset({"batch_size", "forget_batch_size", "sampling"})  # and the mix
# Settings that no measurement depends on.
FREE_SETTINGS = frozenset({
    "lr",
    "steps",
    "batch_size",
    "forget_batch_size",
    "sampling",
    "momentum",
    "nesterov",
    "weight_decay",
    "max_gradient_norm",
    "lr_schedule",
    "forget_schedule",
    "forget_every",
})


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How much to measure.

    Attributes:
        curvature: "hessian" or "ggn", of the spectrum.
        rank: Directions of the linearisation; found when None.
        retain_samples: Retain samples to linearise; all when None.
        forget_samples: Forget samples to linearise; all when None.
        spectrum_samples: Samples of each set behind the spectrum; all when None.
        sketch_samples: Samples of each set that the directions are drawn from, as `linearise` has it; all when None.
        seed: Seed of samples, sketches and start vectors.
        mode: Name of what chose the above.
        staged: Whether the verdict is to come from staged rollouts.
        precision: How float32 is multiplied, "float32" or "tf32".
    """

    curvature: str
    rank: int | None
    retain_samples: int | None
    forget_samples: int | None
    spectrum_samples: int | None
    seed: int
    sketch_samples: int | None = None
    mode: str = "standard"
    staged: bool = False
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """The extreme eigenpairs of the preconditioned D, with the two parts of each eigenvalue.

    Attributes:
        pairs: Lowest and highest eigenpair of P^{1/2} D P^{1/2}.
        retain: vᵀH_R v for each vector, shape (k,).
        forget: vᵀH_F v for each vector, shape (k,).
        tf32_error: ‖Dv - D'v‖ / ‖Dv‖ for a random v, D' multiplied in TF32; None where none was used.
    """

    pairs: Eigenpairs
    retain: Tensor
    forget: Tensor
    tf32_error: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """What one prediction, and every further question to it, is made from.

    Attributes:
        problem: The unlearning problem.
        algorithm: The algorithm, whose mix and preconditioner were used.
        settings: How much was measured.
        preconditioner: P.
        spectrum: Extreme eigenpairs of D.
        network: The compressed linearised network, whose preconditioner is that of the spectrum: P, or for AdamW the frozen
            second moment's with P in it.
        retain: Retain curvature factors in the compressed coordinates.
        forget: Forget curvature factors.
        coherence: Their coherence.
        layers: Heavy-tailed exponents and gates.
        costs: What each stage cost.
    """

    problem: UnlearningProblem
    algorithm: Algorithm
    settings: MeasureSettings
    preconditioner: Preconditioner
    spectrum: Spectrum
    network: LinearisedNetwork
    retain: SampleFactors
    forget: SampleFactors
    coherence: Coherence
    layers: tuple[LayerGate, ...]
    costs: tuple[Cost, ...]

    @property
    def momentum_share(self) -> float:
        """What the theory's P holds of its own, 1-β₁ for AdamW: a mean of gradients is a velocity of so much of each."""
        return 1 - self.algorithm.betas[0] if self.algorithm.adaptive else 1.0

    def with_algorithm(self, algorithm: Algorithm) -> Measurement:
        """The measurement for other settings of the same algorithm.

        Args:
            algorithm: The changed algorithm.

        Returns:
            This measurement about the other settings, and free of charge, if step size, steps, batches, sampling, momentum
            or a weight decay that was there already changed. A new mix, or another algorithm where P = I for both, has its
            spectrum and coherence measured, and so have other batches or another sampling of an AdamW run, on which its
            frozen second moment depends; any other setting, or another algorithm, everything. P of a class that is not
            this package's is computed anew, and everything measured where it has changed.
        """
        # Along a direction that is not there yet, but for sampled parameters.
        begins = algorithm.weight_decay and not (self.algorithm.weight_decay or algorithm.adaptive)
        if type(algorithm) is not type(self.algorithm):
            plain = type(algorithm).preconditioner is type(self.algorithm).preconditioner is Algorithm.preconditioner
            plain = plain and algorithm.layer_lr == self.algorithm.layer_lr and not begins
            plain = plain and algorithm.layer_weight_decay == self.algorithm.layer_weight_decay
            plain = plain and algorithm.adaptive == self.algorithm.adaptive
            return measure(self.problem, algorithm, self.settings, reuse=self if plain else None)
        before, after = self.algorithm.settings(), algorithm.settings()
        # A tensor, whose comparison is one of its entries, is the same where it is the same object.
        changed = {key for key, value in after.items() if before[key] is not value and _differ(before[key], value)}
        sizes = {"batch_size", "forget_batch_size"} if self.problem.batchnorm == "batch" else set()
        if begins or changed & (algorithm.preconditioner_reads | sizes) or not self._has_preconditioner_of(algorithm):
            return measure(self.problem, algorithm, self.settings)
        if changed <= FREE_SETTINGS - (SECOND_MOMENT_READS if algorithm.adaptive else set()):
            free = tuple(replace(cost, seconds=0.0, gradient_equivalents=0.0) for cost in self.costs)
            return replace(self, algorithm=algorithm, costs=free)
        reuse = self if changed <= {*FREE_SETTINGS, "mix"} else None
        return measure(self.problem, algorithm, self.settings, reuse=reuse)

    def _has_preconditioner_of(self, algorithm: Algorithm) -> bool:
        """Whether P is the same at other settings, which a class of the caller's own may read without a word."""
        if is_of_the_package(type(algorithm), "preconditioner"):
            return True
        whole = self.problem.whole
        probe = torch.linspace(1, 2, whole.size, dtype=whole.dtype, device=whole.device)
        before, after = (P.apply(probe) for P in (self.preconditioner, algorithm.step_preconditioner(whole)))
        return torch.allclose(before, after)


def _differ(before: object, after: object) -> bool:
    """Whether a setting has changed; one that cannot be compared as a whole has."""
    try:
        return bool(before != after)
    except (RuntimeError, ValueError):
        return True


def measure(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    settings: MeasureSettings,
    *,
    reuse: Measurement | None = None,
    progress: bool = False,
) -> Measurement:
    """Measure what a prediction for this algorithm needs.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm; its mix and its preconditioner matter here.
        settings: How much to measure.
        reuse: A measurement of the same problem with the same preconditioner, to take P and the linearisation from.
        progress: Whether to show a progress bar over the stages.

    Returns:
        The measurement. Cost: some 15 Hessian-vector products over the spectrum's samples, O per-sample gradients of
        each linearised one and of each that directions are drawn from, and what the preconditioner takes.

    Raises:
        RuntimeError: If the model fails otherwise.
        ValueError: If the model or the loss is not differentiable twice.
    """
    with arithmetic(settings.precision):
        read = problem.reading(algorithm.reads)
        reuse = reuse if reuse and reuse.problem is read else None
        try:
            return _measured(read, algorithm, settings, reuse, progress=progress)
        except RuntimeError as error:  # a NotImplementedError is one
            if not any(words in str(error) for words in UNDIFFERENTIABLE):
                raise
            raise ValueError(
                f"`model` and `loss` of `predict` must be differentiable twice; got {problem.model_name} with loss "
                f"{problem.loss.name!r}, of which a layer is not ({error}). Replace it, as nn.EmbeddingBag by nn.Embedding "
                "and a sum, packed sequences by padded ones, of which the last true step is taken, checkpointing by "
                "a plain call; or let it have what is missing: a torch.autograd.Function `setup_context`, experts of "
                "Hugging Face's models `set_experts_implementation('eager')`."
            ) from error


def _measured(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    settings: MeasureSettings,
    reuse: Measurement | None,
    *,
    progress: bool,
) -> Measurement:
    """All stages."""
    costs: list[Cost] = []
    stages = iter(progress_bar(range(5), "measure", progress))

    next(stages)
    start = time.perf_counter()
    preconditioner = reuse.preconditioner if reuse else algorithm.step_preconditioner(problem.whole)
    told = preconditioner.gradient_equivalents
    spent = 0.0 if reuse else algorithm.preconditioner_cost(problem) if told is None else told
    scaling, frozen = preconditioner, 0.0
    if algorithm.adaptive:
        scaling, frozen = _frozen(problem, algorithm, preconditioner, settings)
    costs.append(Cost(stage="preconditioner", seconds=time.perf_counter() - start, gradient_equivalents=spent + frozen))

    if problem.reading_gradients:
        spent = 0.0 if reuse else problem.reading_gradients
        costs.append(Cost(stage="reading", seconds=0.0, gradient_equivalents=spent))

    next(stages)
    start = time.perf_counter()
    spectrum, products = _spectrum(problem, scaling, algorithm.mix, settings)
    costs.append(Cost(stage="spectrum", seconds=time.perf_counter() - start, gradient_equivalents=products))

    next(stages)
    start = time.perf_counter()
    network = reuse.network if reuse else linearised(problem, algorithm, preconditioner, settings, scaling)
    if isinstance(network, CoordinateNetwork):
        network = network.with_theory(scaling)
    spent = 0.0 if reuse else float(network.gradient_equivalents)
    costs.append(Cost(stage="linearisation", seconds=time.perf_counter() - start, gradient_equivalents=spent))

    next(stages)
    start = time.perf_counter()
    retain, forget = network.factors()
    few = min(COHERENCE_SAMPLES, max(FEWEST_SAMPLES, COHERENCE_ROWS // retain.factors.shape[1]))
    alignment = coherence(retain.thin(few), forget.thin(few), mix=algorithm.mix, seed=settings.seed)
    costs.append(Cost(stage="coherence", seconds=time.perf_counter() - start, gradient_equivalents=0.0))

    next(stages)
    start = time.perf_counter()
    layers = reuse.layers if reuse else _layers(problem.whole, algorithm)
    costs.append(Cost(stage="layer exponents", seconds=time.perf_counter() - start, gradient_equivalents=0.0))
    next(stages, None)
    return Measurement(
        problem=problem,
        algorithm=algorithm,
        settings=settings,
        preconditioner=preconditioner,
        spectrum=spectrum,
        network=network,
        retain=retain,
        forget=forget,
        coherence=alignment,
        layers=layers,
        costs=tuple(costs),
    )


def _frozen(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    preconditioner: Preconditioner,
    settings: MeasureSettings,
) -> tuple[Preconditioner, float]:
    """(1-β₁)·diag(p) with frozen Adam's p and layers' step sizes: with β₁ as momentum its steps are T1's; and its cost."""
    mask = preconditioner.forget_mask if isinstance(preconditioner, PlainSteps) else None
    found = frozen_adam(
        problem,
        mix=algorithm.mix,
        batch_sizes=algorithm.batch_sizes(problem),
        sampling=algorithm.sampling,
        eps=algorithm.eps,
        samples=settings.retain_samples,
        seed=settings.seed,
        preconditioner=preconditioner,
        forget_mask=mask,
    )
    parts = ((problem.retain, 1 - algorithm.mix), (problem.forget, algorithm.mix))
    spent = sum(part.subset(settings.retain_samples, settings.seed).numel() for part, share in parts if share)
    paces = algorithm.layer_factors(problem.whole)
    scales = found.diagonal if paces is None else found.diagonal * paces.to(found.diagonal)
    return Diagonal((1 - algorithm.betas[0]) * scales), float(spent)


def linearised(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    preconditioner: Preconditioner,
    settings: MeasureSettings,
    scaling: Preconditioner,
) -> LinearisedNetwork:
    """The network compressed for an algorithm, as every measurement and every remedy has it.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm.
        preconditioner: Its P.
        settings: How much to measure.
        scaling: The P of the linear theory: frozen Adam's, or the same.

    Returns:
        The compressed network. Cost: as `linearise` says, or `sample_coordinates`.
    """
    batch_sizes = algorithm.batch_sizes(problem) if problem.batchnorm == "batch" else None
    if algorithm.adaptive:
        first, _ = problem.retain.batch(torch.zeros(1, dtype=torch.int64))
        outputs = forward_size(problem, first)[0]
        retain, forget = coordinate_samples(problem, settings, outputs)
        return sample_coordinates(
            problem,
            scaling,
            run_p=preconditioner,
            paces=algorithm.layer_factors(problem.whole),
            decays=algorithm.decay_factors(problem.whole),
            count=coordinate_count(settings, outputs),
            retain_samples=retain,
            forget_samples=forget,
            batch_sizes=batch_sizes,
            seed=settings.seed,
        )
    return linearise(
        problem,
        preconditioner,
        rank=settings.rank,
        max_rank=MOST_DIRECTIONS,
        retain_samples=settings.retain_samples,
        forget_samples=settings.forget_samples,
        sketch_samples=settings.sketch_samples,
        landmarks=landmarks(problem, algorithm, preconditioner),
        paces=algorithm.layer_factors(problem.whole),
        decays=algorithm.decay_factors(problem.whole),
        batch_sizes=batch_sizes,
        seed=settings.seed,
    )


def coordinate_count(settings: MeasureSettings, outputs: int) -> int:
    """Parameters that an AdamW run is rolled out in.

    Args:
        settings: How much to measure.
        outputs: Outputs O of a sample.

    Returns:
        Their number r.
    """
    rank = settings.rank or MOST_DIRECTIONS
    return (
        rank * COORDINATES_OF_STAGED
        if settings.staged
        else max(rank, min(rank * COORDINATES, COORDINATE_ENTRIES // outputs))
    )


def coordinate_samples(problem: UnlearningProblem, settings: MeasureSettings, outputs: int) -> tuple[int, int]:
    """Samples of either set that are linearised for an AdamW run.

    Args:
        problem: The unlearning problem.
        settings: How much to measure.
        outputs: Outputs O of a sample.

    Returns:
        Retain and forget samples.
    """
    most = max(FEWEST_ROLLED, COORDINATE_ROWS // outputs)
    asked = (settings.retain_samples, settings.forget_samples)
    retain, forget = (
        min(most, part.size, part.size if count is None else count)
        for part, count in zip((problem.retain, problem.forget), asked, strict=True)
    )
    return retain, forget


def landmarks(problem: UnlearningProblem, algorithm: Algorithm, preconditioner: Preconditioner) -> list[Tensor]:
    """Where a run goes whatever the gradients: along what decays of θ*, and along its signs by an L1 penalty.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm.
        preconditioner: P of the algorithm.

    Returns:
        Vectors of shape (d,).
    """
    theta, factors = problem.vector(), algorithm.decay_factors(problem.whole)
    found = [theta if factors is None else theta * factors] if algorithm.weight_decay else []
    if isinstance(preconditioner, PlainSteps) and preconditioner.signs is not None:
        found.append(preconditioner.signs)
    return found


def _spectrum(
    problem: UnlearningProblem, preconditioner: Preconditioner, mix: float, settings: MeasureSettings
) -> tuple[Spectrum, float]:
    """Extreme eigenpairs of P^{1/2} D P^{1/2}, and the gradient-equivalents they took."""
    indices = [s.subset(settings.spectrum_samples, settings.seed) for s in (problem.retain, problem.forget)]

    def operators() -> tuple[PreconditionedOperator, PreconditionedOperator]:
        retain, forget = (
            PreconditionedOperator(
                curvature_operator(problem, samples, kind=settings.curvature, indices=chosen), preconditioner
            )
            for samples, chosen in zip((problem.retain, problem.forget), indices, strict=True)
        )
        return retain, forget

    def spent(pair: Sequence[PreconditionedOperator]) -> float:
        return sum(products_cost(settings.curvature, o.products, i.numel()) for o, i in zip(pair, indices, strict=True))

    retain, forget = operators()
    mixed = MixedOperator(retain, forget, mix)
    # One vector at a time: of as many products, a Krylov space of one start reaches twice the degree. The tolerance is a
    # share of the largest |λ|: at a looser one the smallest eigenvalue, often a twentieth of that, is not found.
    pairs = extreme_eigenpairs(mixed, block=1, basis=affordable_basis(mixed), seed=settings.seed)
    gradients, error = 0.0, None
    if settings.precision == "tf32":
        v = torch.randn(mixed.shape[0], generator=torch.Generator().manual_seed(settings.seed))
        v = v.to(problem.device, problem.dtype)
        with arithmetic("float32"):
            others = operators()
            exact = MixedOperator(*others, mix) @ v
        gradients = spent(others)
        error = float((mixed @ v - exact).double().norm() / exact.double().norm())
    vectors = pairs.vectors.to(problem.device, problem.dtype)
    # The quotient of the set that weighs less is measured, the other one follows from λ = (1-α) vᵀH_R v - α vᵀH_F v.
    lighter = retain if mix > 0.5 else forget
    measured = (vectors * (lighter @ vectors)).sum(0).double().cpu()
    followed = (
        (pairs.values + mix * measured) / (1 - mix) if mix <= 0.5 else ((1 - mix) * measured - pairs.values) / mix
    )
    quotients = (measured, followed) if mix > 0.5 else (followed, measured)
    gradients += spent((retain, forget))
    return Spectrum(pairs=pairs, retain=quotients[0], forget=quotients[1], tf32_error=error), gradients


def products_cost(curvature: str, products: int, samples: int) -> float:
    """What products with the curvature of some samples take.

    Args:
        curvature: "hessian" or "ggn".
        products: How many.
        samples: Of how many samples.

    Returns:
        Per-sample gradients, of graphs that are kept.
    """
    return (1 + PRODUCT_GRADIENTS[curvature] * products) * samples if products else 0.0


def _layers(problem: UnlearningProblem, algorithm: Algorithm) -> tuple[LayerGate, ...]:
    """Exponents of the trained layers; their gates where the algorithm has one."""
    if isinstance(algorithm, SRAGU):
        gated = algorithm.gates(problem)
        table, gates = gated.exponents, gated.gates
    else:
        table, gates = layer_exponents(problem.new_model(), seed=0), {}

    def defined(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return tuple(
        LayerGate(
            layer=row.name,
            exponent=defined(row.exponent),
            standard_error=defined(row.standard_error),
            trusted=row.trusted,
            gate=gates.get(row.name, 1.0),
            note=row.reason,
        )
        for row in table.rows
    )
