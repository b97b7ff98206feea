"""Argument checks shared by every public entry point.

Each helper returns the checked value or raises an error that names the argument and its owner, what came, what was
expected and what to do about it.
"""

import difflib
import math
import numbers
from collections.abc import Iterable

LARGEST_SEED = 2**62  # leaves room for the seeds that are counted on from one
NEAR = 0.5  # likeness from which on a choice is suggested


def _message(name: str, owner: str, expected: str, got: object, remedy: str) -> str:
    return f"`{name}` of `{owner}` must be {expected}; got {got!r}. {remedy}".rstrip()


def check_real(
    value: object,
    *,
    name: str,
    owner: str,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    remedy: str = "",
) -> float:
    """Return `value` as a float if it is a finite real number in the interval.

    Args:
        value: What the caller passed.
        name: The argument's name.
        owner: The public function or class it belongs to.
        low: Lower end of the allowed interval.
        high: Upper end of the allowed interval.
        low_open: Whether the lower end itself is excluded.
        high_open: Whether the upper end itself is excluded.
        remedy: What the caller should do instead.

    Returns:
        The value as a Python float.

    Raises:
        TypeError: If the value is not a real number.
        ValueError: If it is not finite or outside the interval.
    """
    left = "(" if low_open or low == -math.inf else "["
    right = ")" if high_open or high == math.inf else "]"
    expected = f"a finite number in {left}{low:g}, {high:g}{right}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(_message(name, owner, expected, value, remedy))
    number = float(value)
    below = number <= low if low_open else number < low
    above = number >= high if high_open else number > high
    if not math.isfinite(number) or below or above:
        raise ValueError(_message(name, owner, expected, value, remedy))
    return number


def check_int(
    value: object, *, name: str, owner: str, low: int | None, high: int | None = None, remedy: str = ""
) -> int:
    """Return `value` as an int if it is a whole number in [low, high].

    Args:
        value: What the caller passed.
        name: The argument's name.
        owner: The public function or class it belongs to.
        low: Smallest allowed value, or None for no ends at all.
        high: Largest allowed value, or None for no upper end.
        remedy: What the caller should do instead.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: If the value is not a whole number.
        ValueError: If it is outside the interval.
    """
    expected = "a whole number"
    if low is not None:
        expected += f" >= {low}" if high is None else f" in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(_message(name, owner, expected, value, remedy))
    number = int(value)
    if low is not None and (number < low or (high is not None and number > high)):
        raise ValueError(_message(name, owner, expected, value, remedy))
    return number


def check_seed(value: object, *, name: str = "seed", owner: str) -> int:
    """Return `value` as an int if random generators take it and a few numbers past it.

    Args:
        value: What the caller passed.
        name: The argument's name.
        owner: The public function or class it belongs to.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: If the value is not a whole number.
        ValueError: If it is below 0 or too large.
    """
    number = check_int(value, name=name, owner=owner, low=0)
    return check_int(number, name=name, owner=owner, low=0, high=LARGEST_SEED)


def check_choice(value: object, *, name: str, owner: str, choices: Iterable[str], remedy: str = "") -> str:
    """Return `value` if it is one of `choices`; otherwise suggest the nearest one.

    Args:
        value: What the caller passed.
        name: The argument's name.
        owner: The public function or class it belongs to.
        choices: The allowed strings.
        remedy: What the caller should do where no choice is near.

    Returns:
        The value itself.

    Raises:
        TypeError: If the value is not a string.
        ValueError: If it is none of the choices.
    """
    options = sorted(choices)
    expected = "one of " + ", ".join(repr(option) for option in options)
    if not isinstance(value, str):
        raise TypeError(_message(name, owner, expected, value, ""))
    if value not in options:
        near = difflib.get_close_matches(value.lower(), options, n=1, cutoff=NEAR)
        raise ValueError(_message(name, owner, expected, value, f"Did you mean {near[0]!r}?" if near else remedy))
    return value
