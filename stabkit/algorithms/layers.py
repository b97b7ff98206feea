"""Factors that layers' steps or weight decays have of their own, by the beginnings of parameter names."""

from __future__ import annotations

from collections.abc import Mapping

from stabkit._validate import check_real


def checked_factors(given: object, setting: str, owner: str) -> dict[str, float] | None:
    """Factors of layers in plain values.

    Args:
        given: What the setting was given.
        setting: Its name, for the error.
        owner: The algorithm, likewise.

    Returns:
        Factors by the beginnings of names; None for None.

    Raises:
        TypeError: If it is no mapping, or an empty one.
        ValueError: If a factor is not finite or below 0.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        raise TypeError(
            f"`{setting}` of `{owner}` must map beginnings of parameter names to factors; got {given!r:.80}. "
            'For instance {"layer4": 0.1}, or None.'
        )
    return {
        str(name): check_real(factor, name=f"{setting}[{name!r}]", owner=owner, low=0) for name, factor in given.items()
    }


def is_within(parameter: str, name: str) -> bool:
    """Whether a parameter belongs to a layer.

    Args:
        parameter: Its name.
        name: The layer's.

    Returns:
        Whether it does.
    """
    return parameter == name or parameter.startswith(f"{name}.")


def layer_factor(parameter: str, factors: Mapping[str, float] | None) -> float:
    """A parameter's factor.

    Args:
        parameter: Its name.
        factors: Factors by the beginning of names, as `layer_lr` has them.

    Returns:
        That of the longest name that fits; 1 where none does.
    """
    fitting = [name for name in factors or {} if is_within(parameter, name)]
    return (factors or {})[max(fitting, key=len)] if fitting else 1.0
