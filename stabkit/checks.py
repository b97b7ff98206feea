"""How far a report can be trusted: checks of the linearisation and of the spectrum, each with a bound and a remedy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from stabkit._errors import LowConfidenceWarning, caller_level
from stabkit.calibration import FAR_ERROR, MAX_AWAKENED, RISK
from stabkit.curvature import LinearisedNetwork
from stabkit.measure import Measurement
from stabkit.report import MARGIN, Check
from stabkit.rollout import Rollout, rollout
from stabkit.staged import MAX_PATH_ERROR

# Of the linearised outputs: of a run that is called stable, which a wrong network may hold where the real one breaks, and of
# one that crosses, which breaks for many a reason. Chosen on the benchmark's calibration cells: benchmarks/confidence.py.
MAX_ERROR_OF_A_STABLE_RUN, MAX_ERROR_OF_A_CROSSING = FAR_ERROR, 1.0
# Of a crossing where layers normalise: their outputs flatten where linearised ones grow, and the real run may hold. Of such
# verdicts more are wrong than of others: benchmarks/normalised.py.
MAX_ERROR_WHERE_NORMALISED = 0.5
MIN_CAPTURED_COUPLED = (
    0.2  # of coupled batches, whose statistics add directions that matter little: benchmarks/batchnorm.py
)
MIN_CAPTURED = 0.5
# Of a set that is not linearised whole: one sample in thirty more or less is no other set. Own choice, far below any mode's.
MIN_SAMPLES = 30
MAX_TF32_ERROR = 1e-2
MAX_CHANGE = 0.5  # of P(diverge), with half the rank or half the samples
CAPTURED = "captured output sensitivity"
SAMPLES = "linearised samples"
LEAST = (CAPTURED, SAMPLES)  # checks of what must not be less
MAX_SEEDS_AGAINST = 0.2  # share of the staged rollouts that end otherwise than the interval says; own choice


def trust_checks(measurement: Measurement, rolled: Rollout, error: float, awake: float) -> tuple[Check, ...]:
    """Whether the linearised network is the real one's likeness, and the spectrum exact.

    Args:
        measurement: What was measured.
        rolled: The one linearisation's rollout.
        error: Relative error of the linearised outputs at the predicted parameters.
        awake: Share of the sensitivity there that is to tensors dormant at θ*.

    Returns:
        The checks that concern the measurement's mode.
    """
    network, pairs = measurement.network, measurement.spectrum.pairs
    scale = max(abs(pairs.smallest), abs(pairs.largest))
    residual = float(pairs.residuals.max()) / scale if scale > 0 else 0.0
    least = MIN_CAPTURED_COUPLED if measurement.problem.batchnorm == "batch" else MIN_CAPTURED
    rough = measurement.spectrum.tf32_error
    tf32 = Check(
        name="error of TF32",
        value=rough,
        threshold=MAX_TF32_ERROR,
        passed=rough is None or rough <= MAX_TF32_ERROR,
        meaning="How far a curvature product in TF32 is from one in float32, relative to it.",
        remedy="Predict with precision='float32'.",
    )
    adaptive = measurement.algorithm.adaptive
    crossing = MAX_ERROR_WHERE_NORMALISED if measurement.problem.normalised else MAX_ERROR_OF_A_CROSSING
    crossing = MAX_PATH_ERROR if adaptive else crossing
    bound = MAX_ERROR_OF_A_STABLE_RUN if float(rolled.probability[0]) < 0.5 else crossing
    linearised = Check(
        name="linearisation error",
        value=error,
        threshold=bound,
        passed=error <= bound,
        meaning="How far the real outputs after the run's first steps are from the linearised ones, relative to how far "
        "those moved; later steps are not looked at."
        if adaptive
        else "How far the real outputs at the predicted parameters are from the linearised ones, relative to how far "
        "those moved; for a diverging run, where its loss meets the divergence level.",
        remedy=(
            "mode='thorough' takes real steps"
            if adaptive
            else "mode='thorough' leaves the linearised network where it is wrong"
        )
        + "; otherwise leave a margin and check with verify().",
    )
    dormant = Check(
        name="sensitivity to dormant parameters",
        value=awake,
        threshold=MAX_AWAKENED,
        passed=awake <= MAX_AWAKENED,
        meaning="Share of the outputs' sensitivity, at the predicted parameters, that is to tensors on which they do not "
        "depend before the run, as adapters that begin at 0 hold; the linearised network never moves them.",
        remedy="mode='thorough' goes on with real steps there.",
    )
    captured = Check(
        name=CAPTURED,
        value=network.captured,
        threshold=least,
        passed=network.captured >= least,
        meaning="Share of the outputs' sensitivity to the parameters that the compressed directions hold.",
        remedy="mode='thorough' takes real steps where a run leaves them; otherwise raise `rank`.",
    )
    few = [part.samples for part in (network.retain, network.forget) if part.samples < part.population]
    sampled = Check(
        name=SAMPLES,
        value=float(min(few, default=MIN_SAMPLES)),
        threshold=float(MIN_SAMPLES),
        passed=min(few, default=MIN_SAMPLES) >= MIN_SAMPLES,
        meaning="Samples that stand for a set, of the smaller one that is not linearised whole.",
        remedy="Raise `retain_samples` and `forget_samples`.",
    )
    return (
        *([] if rough is None else [tf32]),
        *([sampled] if few else []),
        *([] if measurement.settings.staged else [linearised]),
        *([] if measurement.settings.staged or not network.dormant else [dormant]),
        # Staged rollouts ask whether the run leaves these directions; of sampled parameters nothing is left out on average.
        *([] if adaptive or measurement.settings.staged else [captured]),
        Check(
            name="relative eigen-residual",
            value=residual,
            threshold=1e-2,
            passed=residual <= 1e-2,
            meaning="How exact the extreme eigenvalues of the mixed curvature are.",
            remedy="Compute in float64 with `dtype`.",
        ),
    )


def change_checks(measurement: Measurement, rolled: Rollout, seeds: Sequence[int]) -> tuple[Check, ...]:
    """Whether P(diverge) of one linearisation is another at half its size.

    Args:
        measurement: What was measured.
        rolled: The rollout in full.
        seeds: Its seeds.

    Returns:
        Two checks. Cost: two rollouts of one setting, or one where all samples are linearised.
    """
    network, algorithm = measurement.network, measurement.algorithm
    batch_sizes = algorithm.batch_sizes(measurement.problem)

    def again(other: LinearisedNetwork) -> Rollout:
        return rollout(other, algorithm, lr=[algorithm.lr], mix=[algorithm.mix], batch_sizes=batch_sizes, seeds=seeds)

    held = network.retain, network.forget
    whole = all(part.samples == part.population for part in held)  # so that half of the samples are all of them
    others = (
        ("half the rank", again(network.thinned(rank=math.ceil(network.rank / 2))), "Raise `rank`."),
        (
            "half the samples",
            rolled if whole else again(network.thinned(samples=0.5)),
            "Raise `retain_samples` and `forget_samples`.",
        ),
    )
    said = float(rolled.probability[0])
    changes = [abs(float(other.probability[0]) - said) for _, other, _ in others]
    return tuple(
        Check(
            name=f"change with {name}",
            value=change,
            threshold=MAX_CHANGE,
            passed=change <= MAX_CHANGE,
            meaning=f"How far P(diverge) of one linearisation is from that with {name}.",
            remedy=remedy,
        )
        for (name, _, remedy), change in zip(others, changes, strict=True)
    )


def margin_check(past: float, interval: tuple[float, float], verdict: str, *, staged: bool) -> Check:
    """Whether a run's step size keeps away from where the critical one may lie.

    One linearisation knows the boundary roughly, and many times as many of its verdicts near it are wrong as of the others
    (benchmarks/confidence.py). Staged rollouts find it closer, but near it runs are chaotic: a rollout that is right until
    late may hold where a run with the same batches breaks.

    Args:
        past: Probability that the run's step size is past the critical one, by `stabkit.calibration.beyond`.
        interval: Where the critical one lies, at nine in ten.
        verdict: The report's; a marginal one claims nothing, and passes.
        staged: Whether the boundary is that of staged rollouts.

    Returns:
        The check. What `recommend` calls safe passes it: its margin is that of the same probability.
    """
    wrong = {"stable": past, "diverges": 1 - past}.get(verdict, 0.0)
    least = 2 * RISK
    closer = "" if staged else "mode='thorough' finds the boundary closer; otherwise "
    keep = f"leave a margin: {interval[0] / 2:.2g} is a factor of two below all step sizes that may be critical."
    return Check(
        name=MARGIN,
        value=wrong,
        threshold=least,
        passed=wrong <= least,
        meaning="Probability that the critical step size lies on the other side of the run's than the verdict says, by "
        "where it was found and how far such boundaries were from those of real runs.",
        remedy=closer + (keep if verdict == "stable" else "check with verify()."),
    )


def seeds_check(rolled: Rollout, lr: float, interval: tuple[float, float]) -> tuple[Check, ...]:
    """Whether the staged rollouts of the run itself end as the interval of the critical step size has it.

    That is found with one seed, and where runs of other batches break at other step sizes the others may tell.

    Args:
        rolled: The rollout that the verdict is read from, one setting.
        lr: Its step size.
        interval: Where the critical step size lies, at nine in ten, without what these rollouts say.

    Returns:
        The check; none of one linearisation, whose critical step size is that of all of its seeds.
    """
    if rolled.kind != "staged":
        return ()
    breaks = (rolled.score[:, 0] >= 0).double()
    against = float(breaks.mean()) if lr < interval[0] else float(1 - breaks.mean()) if lr > interval[1] else 0.0
    return (
        Check(
            name="seeds against the critical step size",
            value=against,
            threshold=MAX_SEEDS_AGAINST,
            passed=against <= MAX_SEEDS_AGAINST,
            meaning="Share of the staged rollouts that break below all step sizes that may be critical, or hold above them.",
            remedy="Raise `seeds`, and check with verify().",
        ),
    )


def warn_if_unsure(checks: Sequence[Check]) -> None:
    """Say once, at the caller's line, why a report's confidence is low.

    Args:
        checks: The report's.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        reasons = "; ".join(
            f"{check.name} {'unknown' if check.value is None else f'{check.value:.3g}'} where "
            f"{'at least' if check.name in LEAST else 'at most'} {check.threshold:.3g} is wanted ({check.remedy})"
            for check in failed
        )
        warnings.warn(f"the prediction has low confidence: {reasons}", LowConfidenceWarning, stacklevel=caller_level())
