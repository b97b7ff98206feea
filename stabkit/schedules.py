"""Step sizes and mixes that change over a run, as arrays with one entry a step.

A schedule of factors multiplies a step size: `0.1 * cosine(300)`. What takes `lr` or `mix` by step takes any such array.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stabkit._validate import check_int, check_real


def warmup(steps: int, *, over: int) -> np.ndarray:
    """Factors that rise evenly to 1 and stay there: k/over in step k = 1, 2, ...

    Args:
        steps: Number K of steps.
        over: Steps until 1 is reached, >= 1.

    Returns:
        Shape (K,), in (0, 1].
    """
    check_int(steps, name="steps", owner="warmup", low=1)
    check_int(over, name="over", owner="warmup", low=1)
    return np.minimum(np.arange(1, steps + 1) / over, 1.0)


def cosine(steps: int, *, end: float = 0.0) -> np.ndarray:
    """Factors that fall from 1 along half a cosine towards `end`, which step K+1 would have: torch's CosineAnnealingLR.

    Args:
        steps: Number K of steps.
        end: Last factor, in [0, 1].

    Returns:
        Shape (K,).
    """
    check_int(steps, name="steps", owner="cosine", low=1)
    check_real(end, name="end", owner="cosine", low=0, high=1)
    return end + (1 - end) * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2


def linear(steps: int, *, end: float = 0.0) -> np.ndarray:
    """Factors that fall evenly from 1 towards `end`, which step K+1 would have: the default of Hugging Face's Trainer.

    Args:
        steps: Number K of steps.
        end: Last factor, in [0, 1].

    Returns:
        Shape (K,).
    """
    check_int(steps, name="steps", owner="linear", low=1)
    check_real(end, name="end", owner="linear", low=0, high=1)
    return 1 - (1 - end) * np.arange(steps) / steps


def staircase(steps: int, *, at: Sequence[int], factor: float = 0.1) -> np.ndarray:
    """Factors that are multiplied by `factor` after each of some steps: torch's MultiStepLR.

    Args:
        steps: Number K of steps.
        at: Numbers of steps after which to multiply, each >= 1.
        factor: By how much, in (0, 1].

    Returns:
        Shape (K,).
    """
    check_int(steps, name="steps", owner="staircase", low=1)
    check_real(factor, name="factor", owner="staircase", low=0, high=1, low_open=True)
    for place, step in enumerate(at):
        check_int(step, name=f"at[{place}]", owner="staircase", low=1)
    passed = (np.arange(steps)[:, None] >= np.asarray(list(at), dtype=int)[None, :]).sum(1)
    return np.asarray(factor**passed, dtype=float)


def alternating(
    steps: int, *, lr: float, forget_lr: float | None = None, retain_steps: int = 1, forget_steps: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Step sizes and mixes of a run that takes turns: some steps forward on the retain set, then some of ascent.

    A retain step has mix 0, a forget step mix 1, so that T1 covers both.

    Args:
        steps: Number K of steps, of both kinds together.
        lr: Step size of the retain steps.
        forget_lr: Step size of the forget steps; that of the retain steps when None.
        retain_steps: Retain steps a cycle, >= 1; they come first.
        forget_steps: Forget steps a cycle, >= 1.

    Returns:
        Step sizes and mixes, each of shape (K,).
    """
    check_int(steps, name="steps", owner="alternating", low=1)
    check_real(lr, name="lr", owner="alternating", low=0, low_open=True)
    ascent = lr if forget_lr is None else check_real(forget_lr, name="forget_lr", owner="alternating", low=0)
    check_int(retain_steps, name="retain_steps", owner="alternating", low=1)
    check_int(forget_steps, name="forget_steps", owner="alternating", low=1)
    forgets = np.arange(steps) % (retain_steps + forget_steps) >= retain_steps
    return np.where(forgets, ascent, lr), forgets.astype(float)
