"""How thorough a prediction is, what that costs, and which mode fits a budget; known before anything is computed."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, fields, replace

import torch

from stabkit._errors import BudgetWarning, caller_level
from stabkit._table import Shown, Table
from stabkit._validate import check_choice, check_int, check_real
from stabkit.algorithms import Algorithm
from stabkit.boundary import LOOKS_BELOW
from stabkit.curvature import (
    COPIES,
    THEORY_DIRECTIONS,
    basis_fits,
    columns_at_once,
    coordinates_cost,
    forward_size,
    linearisation_cost,
    row_budget,
    rows_kept,
    rows_pay,
)
from stabkit.curvature.dormant import SAMPLES
from stabkit.measure import (
    COHERENCE_ROWS,
    COHERENCE_SAMPLES,
    FEWEST_SAMPLES,
    MOST_DIRECTIONS,
    THEORY_ROWS,
    MeasureSettings,
    coordinate_count,
    coordinate_samples,
    products_cost,
)
from stabkit.problem import UnlearningProblem
from stabkit.report import Cost
from stabkit.runner import check_steps
from stabkit.staged import PATH_STEPS

SPECTRUM_PRODUCTS = 14  # that the two extreme eigenpairs take, with the quotients; typical, not a bound
CHECKING = "checking the problem"  # the stage before all others
# What a staged rollout of one seed takes beside its first steps: a share of the run for real, with the looks there, and
# passes over what is linearised at some places. Typical of the benchmark's grids (verify.md there), the larger share of
# those of networks of ten million parameters, which are linear for fewer steps (gpu/results.md).
TYPICAL_SHARE, LARGE_SHARE, PLACES = 0.2, 0.5, 2
LARGE = 10**6  # parameters, between the two
# Of a run all of whose steps and looks are real but for what comes after a crossing; typical of AdamW's cells there.
REAL_SHARE = 0.7
COUPLED_SHARE = 1.0  # the same in train mode: nearly all of a run on average (benchmarks/batchnorm.py)
# Of the work on what has been linearised, typical: settings rolled out, products with a map of moments, operations a second.
ROLLED_SETTINGS, THEORY_PRODUCTS, OPERATIONS_A_SECOND = 200, 300, 6e10
# Rollouts one after another, which scans of side-by-side settings, two checks and a look below the boundary make, and what
# a step of one takes however small the network is, for each set it draws from: calls of small operations. Typical of one
# core with a perceptron of 227 parameters and three seeds.
ROLLOUTS, STEP_SECONDS = 6, 2e-4
THEORY_SECONDS = 0.4  # of the searches for the theory's limits, however small the network is; typical of one core
STAGED_SCAN = 8  # staged rollouts, one seed each, that find the critical step size, and as many the critical mix
# Gradients times parameters up to which "auto" is thorough without being asked: a minute or two of one core, and of a GPU
# that does a fifth of what an H200 does in runs of ResNet-18 (benchmarks/gpu). Own choice.
SMALL_WORK, SMALL_GPU_WORK = 2e10, 2e12
TIMED_BATCH = 64
UNBOUNDED = 10**9  # outputs of a sample, where its rows do not fit into memory


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How much one mode measures; None stands for all, and for a rank that is found.

    Attributes:
        name: "fast", "standard" or "thorough".
        rank: Directions of the linearisation.
        retain_samples: Retain samples to linearise.
        forget_samples: Forget samples to linearise.
        spectrum_samples: Samples of each set behind the eigenvalues.
        sketch_samples: Samples of each set that the directions are drawn from, as `linearise` has it.
        staged: Whether the verdict and the critical step size come from staged rollouts.
    """

    name: str
    rank: int | None
    retain_samples: int | None
    forget_samples: int | None
    spectrum_samples: int | None
    sketch_samples: int
    staged: bool


_STANDARD = Mode(
    name="standard",
    rank=100,
    retain_samples=896,
    forget_samples=448,
    spectrum_samples=256,
    sketch_samples=96,
    staged=False,
)
MODES = {
    "fast": Mode(
        name="fast",
        rank=40,
        retain_samples=160,
        forget_samples=144,
        spectrum_samples=20,
        sketch_samples=40,
        staged=False,
    ),
    "standard": _STANDARD,
    "thorough": replace(_STANDARD, name="thorough", staged=True),
}


@dataclass(frozen=True, kw_only=True)
class CostEstimate(Shown):
    """What a prediction will cost, beside what the run itself would.

    Attributes:
        mode: The mode.
        stages: Gradient-equivalents and seconds of every stage. Typical figures: how many products, stages and settings
            they take is known only afterwards. Seconds of the work that no gradient is in, on what has been linearised, are
            of one CPU core.
        run: The same for the run that the prediction is about.
        memory_bytes: What the linearisation holds: its basis, features and one batch of parameter-sized vectors.
    """

    mode: str
    stages: tuple[Cost, ...]
    run: Cost
    memory_bytes: int

    @property
    def gradient_equivalents(self) -> float:
        """Of all stages."""
        return sum(stage.gradient_equivalents for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def table(self) -> Table:
        """Stages beside the run.

        Returns:
            The table.
        """
        rows = [*self.stages, self.run]
        share = self.gradient_equivalents / self.run.gradient_equivalents
        return Table(
            title=f"Estimated cost of a {self.mode} prediction",
            columns=("stage", "gradient-equivalents", "seconds"),
            rows=tuple((row.stage, f"{row.gradient_equivalents:,.0f}", f"{row.seconds:.2g}") for row in rows),
            footer=f"{share:.2g} times the run's own gradients; {self.memory_bytes / 2**20:,.0f} MiB",
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        from stabkit.render import table_html

        return table_html(self.table())


def estimate_cost(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    settings: MeasureSettings,
    *,
    seeds: int,
    seconds_per_gradient: float | None = None,
) -> CostEstimate:
    """Tell a prediction's cost before it is made.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm.
        settings: How much is to be measured.
        seeds: Rollouts behind the probability.
        seconds_per_gradient: Seconds of one per-sample gradient; timed on one batch when None.

    Returns:
        The estimate. Cost: a forward pass of one sample, three passes over 64 where the gradient is timed, and what
        `UnlearningProblem.reading` takes.
    """
    read = problem.reading(algorithm.reads)
    inputs, _ = read.retain.batch(torch.zeros(1, dtype=torch.int64))
    outputs, passed = forward_size(read, inputs)
    held = [
        size if asked is None else min(asked, size)
        for asked, size in (
            (settings.retain_samples, problem.retain.size),
            (settings.forget_samples, problem.forget.size),
        )
    ]
    watched = sum(
        size if settings.spectrum_samples is None else min(settings.spectrum_samples, size)
        for size in (problem.retain.size, problem.forget.size)
    )
    rank, coupled = settings.rank or MOST_DIRECTIONS, problem.batchnorm == "batch"
    by_rows = outputs * problem.size * problem.dtype.itemsize <= row_budget(problem, outputs)
    landmarks = int(bool(algorithm.weight_decay))
    kept_whole = algorithm.adaptive or basis_fits(problem, sum(held) * outputs, settings.rank, landmarks=landmarks)
    kept = 0.0  # vector by vector there are no rows to keep
    if by_rows and not coupled and rows_pay(outputs, rank, size=problem.size, operations=passed):
        kept = rows_kept(problem, sum(held), outputs, rank, landmarks=landmarks)
    linearisation = linearisation_cost(
        held,
        (problem.retain.size, problem.forget.size),
        outputs if by_rows else UNBOUNDED,
        settings.rank,
        max_rank=MOST_DIRECTIONS,
        sketch_samples=settings.sketch_samples,
        batch_sizes=algorithm.batch_sizes(problem) if coupled else None,
        landmarks=landmarks,
        hold=kept_whole,
        products=1,
        rows_kept=kept,
    )
    if algorithm.adaptive:
        rank = coordinate_count(settings, outputs)
        held = list(coordinate_samples(problem, settings, outputs))
        linearisation = coordinates_cost(held, outputs, rank, coupled=coupled)
    gradients = {
        CHECKING: problem.checking_gradients,
        "preconditioner": algorithm.preconditioner_cost(problem),
        "spectrum": products_cost(settings.curvature, SPECTRUM_PRODUCTS, watched),
        "linearisation": linearisation,
        "coherence": 0.0,
        "rollouts and theory": sum(held) / 3 * (1 if settings.staged or algorithm.adaptive else 2),
    }
    if algorithm.adaptive:
        second = (problem.retain.size, problem.forget.size)
        gradients["preconditioner"] += sum(min(settings.retain_samples or size, size) for size in second)
        gradients["rollouts and theory"] += PATH_STEPS * sum(algorithm.batch_sizes(problem))
    # Work of these that is none of the network's.
    directions = min(rank, THEORY_DIRECTIONS) if algorithm.adaptive else rank  # that the theory is computed in
    curvature_rows = min(outputs, directions)  # of a sample's factor
    compared = min(COHERENCE_SAMPLES, max(FEWEST_SAMPLES, COHERENCE_ROWS // curvature_rows))
    kept = sum(min(size, max(FEWEST_SAMPLES, THEORY_ROWS // curvature_rows)) for size in held)
    rolled = algorithm.steps * 4 * sum(algorithm.batch_sizes(problem))
    looks = len(check_steps(algorithm.steps, problem.check_every))
    rolled += looks * 2 * sum(held)
    # Beside the passes: rows times the block, or what goes through the network with each vector that rows are counted for.
    each_pass = 2 * problem.size * rank
    if not rows_pay(outputs, rank, size=problem.size, operations=passed):
        each_pass = 2 * passed * rank // outputs
    if not kept_whole or not by_rows or coupled or outputs >= rank:
        each_pass = 0
    operations = {
        "linearisation": 0
        if algorithm.adaptive
        else each_pass * linearisation + 8 * problem.size * rank**2 * kept_whole,
        "coherence": 2 * directions * (sum(min(size, compared) for size in held) * curvature_rows) ** 2,
        "rollouts and theory": THEORY_PRODUCTS * 6 * kept * curvature_rows * directions**2
        + ROLLED_SETTINGS * seeds * outputs * rank * rolled,
    }
    each_step = STEP_SECONDS * algorithm.steps * ((algorithm.mix < 1) + (algorithm.mix > 0))
    small = {"rollouts and theory": THEORY_SECONDS + ROLLOUTS * each_step}  # seconds of calls, whatever they compute
    if read.reading_gradients:
        gradients["reading"] = read.reading_gradients
    run = algorithm.steps * float(sum(algorithm.batch_sizes(problem)))
    if settings.staged:
        share = TYPICAL_SHARE if problem.size < LARGE else LARGE_SHARE
        # First steps, and those before each place with two passes over few samples.
        each_rollout = share * run + (1 + PLACES) * PATH_STEPS * sum(algorithm.batch_sizes(problem))
        each_rollout += (PLACES + share * looks) * sum(held) / 3 + PLACES * 2 * sum(min(SAMPLES, m) for m in held) / 3
        if algorithm.adaptive or coupled:
            each_rollout = (COUPLED_SHARE if coupled else REAL_SHARE) * (run + looks * sum(held) / 3)
        scans = 1 if algorithm.fixed_mix else 2
        below = len(LOOKS_BELOW) if coupled else 0
        staged = seeds + scans * STAGED_SCAN + below
        gradients["staged rollouts"] = staged * each_rollout
        small["staged rollouts"] = staged * each_step  # each is rolled out on the linearisation first
    each = _seconds_per_gradient(problem) if seconds_per_gradient is None else seconds_per_gradient
    vectors = 0 if algorithm.adaptive else 3 * rank
    if not kept_whole:
        vectors = min(vectors, (COPIES + 1) * columns_at_once(problem.size, problem.vector()))
    return CostEstimate(
        mode=settings.mode,
        stages=tuple(
            Cost(
                stage=name,
                seconds=count * each + operations.get(name, 0.0) / OPERATIONS_A_SECOND + small.get(name, 0.0),
                gradient_equivalents=float(count),
            )
            for name, count in gradients.items()
        ),
        run=Cost(stage=f"the run, {algorithm.steps} steps", seconds=run * each, gradient_equivalents=run),
        memory_bytes=problem.dtype.itemsize * (problem.size * vectors + sum(held) * outputs * 2 * rank),
    )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the caller asks for beside the mode: None for the mode's own, "auto" for a rank that is found, "all" for all.

    Attributes:
        rank: Directions of the linearisation.
        retain_samples: Retain samples to linearise.
        forget_samples: Forget samples to linearise.
        spectrum_samples: Samples of each set behind the eigenvalues.
    """

    rank: int | str | None = None
    retain_samples: int | str | None = None
    forget_samples: int | str | None = None
    spectrum_samples: int | str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            word = "auto" if field.name == "rank" else "all"
            remedy = f"{word!r} {'finds one' if word == 'auto' else 'takes all'}, and None is as the mode has it."
            if isinstance(value, str):
                check_choice(value, name=field.name, owner="predict", choices=(word,))
            elif value is not None:
                check_int(value, name=field.name, owner="predict", low=1, remedy=remedy)

    def settings(self, mode: Mode, *, curvature: str, seed: int) -> MeasureSettings:
        """What is to be measured.

        Args:
            mode: What it does not say is the mode's.
            curvature: "hessian" or "ggn".
            seed: Seed of everything random.

        Returns:
            The settings.
        """

        def chosen(name: str) -> int | None:
            value = getattr(self, name)
            return getattr(mode, name) if value is None else None if isinstance(value, str) else value

        return MeasureSettings(
            curvature=curvature,
            rank=chosen("rank"),
            retain_samples=chosen("retain_samples"),
            forget_samples=chosen("forget_samples"),
            spectrum_samples=chosen("spectrum_samples"),
            sketch_samples=mode.sketch_samples,
            seed=seed,
            mode=mode.name,
            staged=mode.staged,
        )


def choose_settings(
    problem: UnlearningProblem,
    algorithm: Algorithm,
    *,
    mode: str,
    budget: float | str | None,
    sizes: Sizes,
    curvature: str,
    seed: int,
    seeds: int,
) -> MeasureSettings:
    """What a mode measures; for "auto" the most thorough one within a budget, or that suits the network's size.

    Args:
        problem: The unlearning problem.
        algorithm: The algorithm.
        mode: "fast", "standard", "thorough" or "auto".
        budget: For "auto": gradient-equivalents, or seconds as text, such as "30s". None: "thorough" where its gradients
            times the number of parameters come to no more than 2e10, on CUDA 2e12; "standard" elsewhere.
        sizes: What the caller asks for beside the mode.
        curvature: "hessian" or "ggn".
        seed: Seed of everything random.
        seeds: Rollouts behind the probability.

    Returns:
        The settings; those of "fast", with a `BudgetWarning`, where no mode fits a budget. Cost: where seconds are counted,
        three passes over 64 samples.

    Raises:
        ValueError: If the mode or the budget is none, or a budget is given for another mode.
    """
    check_choice(mode, name="mode", owner="predict", choices=(*MODES, "auto"))
    if mode != "auto":
        if budget is not None:
            raise ValueError(
                f"`budget` of `predict` must be left out with mode={mode!r}, which has its own cost; got {budget!r}. Use "
                "mode='auto'."
            )
        return sizes.settings(MODES[mode], curvature=curvature, seed=seed)
    wanted = {name: sizes.settings(chosen, curvature=curvature, seed=seed) for name, chosen in MODES.items()}

    def cost(name: str, each: float) -> CostEstimate:
        return estimate_cost(problem, algorithm, wanted[name], seeds=seeds, seconds_per_gradient=each)

    if budget is None:
        # Counted, not timed: the same call takes the same mode on every machine of a kind.
        work = cost("thorough", 0.0).gradient_equivalents * problem.size
        return wanted["thorough" if work <= small_work(problem.device) else "standard"]
    allowed, timed = _allowed(budget), isinstance(budget, str)
    each = _seconds_per_gradient(problem) if timed else 0.0
    spent = math.inf
    for name in ("thorough", "standard", "fast"):
        estimate = cost(name, each)
        spent = estimate.seconds if timed else estimate.gradient_equivalents
        if spent <= allowed:
            return wanted[name]
    unit = "seconds" if timed else "gradient-equivalents"
    costliest = max(estimate.stages, key=lambda stage: stage.seconds if timed else stage.gradient_equivalents)
    warnings.warn(
        f"`budget` of `predict` must allow for the fast mode, estimated to take {spent:,.3g} {unit}; got {budget!r}. It is "
        f"taken all the same. Most of it is {costliest.stage!r}; `predict_cost` with mode='fast' tells all stages.",
        BudgetWarning,
        stacklevel=caller_level(),
    )
    return wanted["fast"]


def small_work(device: torch.device) -> float:
    """Work up to which a prediction is thorough without being asked.

    Args:
        device: Where it is computed.

    Returns:
        Per-sample gradients times parameters.
    """
    return SMALL_GPU_WORK if device.type == "cuda" else SMALL_WORK


def _allowed(budget: float | str) -> float:
    """A checked budget as a number, of gradients or of seconds."""
    remedy = "200_000 are gradient-equivalents, '30s' seconds, and None goes by the network's size."
    if isinstance(budget, str):
        try:
            value: float = float(budget.strip().removesuffix("s")) if budget.strip().endswith("s") else math.nan
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`budget` of `predict` must be a number above 0 or seconds; got {budget!r}. {remedy}")
        return value
    return check_real(budget, name="budget", owner="predict", low=0, low_open=True, remedy=remedy)


def _seconds_per_gradient(problem: UnlearningProblem) -> float:
    """One per-sample gradient, timed on a batch after one for warming up."""
    indices = torch.arange(min(TIMED_BATCH, problem.retain.size))
    inputs, targets = problem.retain.batch(indices)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        leaves = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
        with torch.enable_grad():
            loss = problem.loss.per_sample(problem.outputs(leaves, inputs), targets).mean()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        seconds = time.perf_counter() - start
        del grads
    return seconds / indices.numel()
