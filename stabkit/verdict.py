"""What a P(diverge) is called, and what to do, in words."""

from __future__ import annotations

from decimal import ROUND_DOWN, Context

from stabkit.algorithms import Algorithm
from stabkit.boundary import CriticalValue

STABLE_BELOW, DIVERGES_ABOVE = 0.25, 0.75  # of P(diverge); between them the verdict is "marginal"


def verdict_of(probability: float) -> str:
    """The verdict that a P(diverge) is.

    Args:
        probability: P(diverge).

    Returns:
        "stable", "marginal" or "diverges".
    """
    if probability < STABLE_BELOW:
        return "stable"
    return "diverges" if probability > DIVERGES_ABOVE else "marginal"


def advice(
    algorithm: Algorithm,
    lr_detail: CriticalValue,
    mix_detail: CriticalValue,
    probability: float,
    margin: float,
    *,
    sure: bool,
    near: bool,
) -> tuple[str, ...]:
    """What to do: a margin below the critical step size, and below the critical mix.

    Args:
        algorithm: The algorithm with its settings.
        lr_detail: The critical step size.
        mix_detail: The critical mix.
        probability: P(diverge) of the report.
        margin: How far below the critical step size an advised one lies, and an advised mix below the critical one.
        sure: Whether the report's confidence is high.
        near: Whether the linearised network is right as far as the boundary, or real steps have been taken; elsewhere how a
            smaller mix moves that boundary is not known.

    Returns:
        Sentences, what to do first first.
    """
    if probability < STABLE_BELOW:
        said = [
            "Run it."
            if sure
            else "Run it, but not unwatched: the confidence is low, and below stands why and what helps."
        ]
        if lr_detail.found and lr_detail.value < margin * algorithm.lr:
            times = lr_detail.value / algorithm.lr
            said.append(
                f"The critical step size, {lr_detail.value:.3g}, is {times:.2g} times this one: leave a margin of "
                f"{margin:.2g} times."
            )
        return tuple(said)
    said = []
    if lr_detail.found and lr_detail.value <= lr_detail.scanned[0]:
        return (
            f"No step size down to {lr_detail.value:.2g} is safe: the model is at or past the divergence level already.",
        )
    if lr_detail.found:
        lower = f"ower the step size to {_two_digits(lr_detail.low / margin)} or less."
        said.append(f"L{lower}" if algorithm.fixed_mix else f"Keep mix {algorithm.mix:.3g} and l{lower}")
    if not lr_detail.found and algorithm.lr > lr_detail.scanned[1]:
        said.append(
            f"No step size up to {_two_digits(lr_detail.scanned[1])} is predicted to break, and of larger ones one "
            "linearisation says nothing to rely on: stay below, or predict with mode='thorough'."
        )
    if mix_detail.found and mix_detail.low > 0:
        far = (
            f" to {_two_digits(mix_detail.low / margin)} or less." if near else ": `report.recommend()` looks how far."
        )
        said.append(f"Or keep step size {algorithm.lr:.3g} and lower the mix{far}")
    elif mix_detail.found:
        said.append(
            "At this step size no mix is safe, not even fine-tuning on the retain set: only a smaller step helps."
        )
    too = "batches and schedules" if algorithm.adaptive else "batches, schedules and clipping"
    said.append(f"`report.recommend()` has {too} too, with the losses each is predicted to reach.")
    return tuple(said)


def _two_digits(bound: float) -> str:
    """An upper bound for reading, rounded down."""
    return f"{float(Context(prec=2, rounding=ROUND_DOWN).create_decimal(repr(float(bound)))):.2g}"
