"""Frozen dataclasses to plain JSON values and files and back, without loss and without pickle."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import reprlib
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

T = TypeVar("T")

SHOWN = 200  # characters of a path or text in a message
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def to_plain(value: Any, *, name: str = "") -> Any:
    """Dictionaries, lists, strings, numbers and None from nested dataclasses; strict JSON, so infinity becomes a string.

    Args:
        value: A dataclass, or what one holds. Fields that take no part in comparison are left out.
        name: Of the field or key that holds it, for the message.

    Returns:
        Plain values.

    Raises:
        TypeError: If a value has no plain form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name), name=f.name) for f in dataclasses.fields(value) if f.compare}
    if isinstance(value, dict):
        return {str(key): to_plain(item, name=str(key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item, name=name) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    place = f" as {name!r}" if name else ""
    raise TypeError(
        f"a file holds plain values only; got {type(value).__name__}{place}. Settings of an algorithm that is written, in a "
        "report or a checkpoint, are numbers, texts, and lists or dictionaries of them."
    )


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


class Stored:
    """How a frozen dataclass of plain values is written to JSON and read again.

    Attributes:
        schema: Version of its fields, written with them; what another version wrote is refused.
    """

    schema: ClassVar[int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: dictionaries, lists, strings, numbers and None.

        Returns:
            The fields, with the schema's version.
        """
        return {"schema": self.schema, **to_plain(self)}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Strict JSON; infinities are written as strings.

        Args:
            path: File to write as well, atomically.

        Returns:
            The text.
        """
        text = dumps(self.to_dict())
        if path is not None:
            write_atomically(path, text)
        return text

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """The object that `to_dict` came from.

        Args:
            plain: What `to_dict` gave.

        Returns:
            An equal object. What it cannot do from its values alone, it cannot do any more.

        Raises:
            TypeError: If it is no dictionary.
            ValueError: If the schema is another one, or the fields are not those of this kind.
        """
        what = f"`plain` of `{cls.__name__}.from_dict` must"
        if not isinstance(plain, dict):
            raise TypeError(f"{what} be a dictionary, as `to_dict` gives; got {reprlib.repr(plain)}.")
        schema = plain.get("schema")
        if schema != cls.schema:
            raise ValueError(
                f"{what} have schema {cls.schema}; got {schema!r}. Make it anew with this version of stabkit."
            )
        try:
            return from_plain(cls, {key: value for key, value in plain.items() if key != "schema"})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{what} hold what `to_dict` gives; got something else ({type(error).__name__}: {error}). Make it anew."
            ) from error

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Self:
        """Read from a file or from JSON text.

        Args:
            source: Path, or text that begins with a brace.

        Returns:
            An object equal to the one that was written.

        Raises:
            TypeError: If it is neither path nor text.
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no JSON, or no object of this kind.
        """
        what = f"`source` of `{cls.__name__}.from_json` must"
        if not isinstance(source, str | os.PathLike):
            raise TypeError(
                f"{what} be a path or JSON text; got {reprlib.repr(source)}. `from_dict` reads dictionaries."
            )
        text = os.fspath(source)
        shown = repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
        is_text = text.lstrip().startswith("{")
        if not is_text and not os.path.isfile(source):
            raise FileNotFoundError(
                f"{what} name a file or be JSON text, which begins with a brace; got {shown}. Check the path."
            )
        try:
            plain = json.loads(text if is_text else Path(source).read_text(encoding="utf-8"))
        except ValueError as error:  # not UTF-8, or not JSON
            raise ValueError(f"{what} hold JSON, as `to_json` writes it; got {shown} ({error}).") from error
        return cls.from_dict(plain)


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

    Raises:
        IsADirectoryError: If the path is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"`path` must name a file; got the folder {os.fspath(path)!r}. Add a file name.")
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
