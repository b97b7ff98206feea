"""Frozen dataclasses to plain JSON values and back, without loss and without pickle."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def to_plain(value: Any) -> Any:
    """Dictionaries, lists, strings, numbers and None from nested dataclasses; strict JSON, so infinity becomes a string.

    Args:
        value: A dataclass, or what one holds. Fields that take no part in comparison are left out.

    Returns:
        Plain values.

    Raises:
        TypeError: If a value has no plain form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a report holds plain values only; got {type(value).__name__}.")


def from_plain(kind: Any, value: Any) -> Any:
    """Rebuild a value of an annotated type from its plain form.

    Args:
        kind: The type: a dataclass, a tuple, a union with None, or a plain type.
        value: What `to_plain` gave.

    Returns:
        The value.

    Raises:
        ValueError: If a field is missing or unknown.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        wanted = {f.name for f in dataclasses.fields(kind) if f.compare}
        if not isinstance(value, dict) or set(value) != wanted:
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            name = getattr(kind, "__name__", str(kind))
            raise ValueError(
                f"`{name}` needs the fields {sorted(wanted)}; got {got}. The file is not a stabkit report."
            )
        return kind(**{name: from_plain(hints[name], value[name]) for name in wanted})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        if value is None:
            return None
        return from_plain(next(a for a in arguments if a is not type(None)), value)
    if origin is tuple:
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(from_plain(a, item) for a, item in zip(inner, value, strict=True))
    if origin is dict:
        return {key: from_plain(arguments[1], item) for key, item in value.items()}
    if kind is float and value is not None:
        return _NOT_FINITE[value] if isinstance(value, str) else float(value)
    return value


def dumps(plain: Any) -> str:
    """Strict JSON text.

    Args:
        plain: Plain values.

    Returns:
        The text, two-space indented.
    """
    return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False)


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file so that a reader sees the old one or the new one, never half of it.

    Args:
        path: Where to; missing folders are made.
        text: What.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target
