"""Plain values and back without loss, strict JSON, and files that are never half written."""

from __future__ import annotations

import json
import math
import os
import stat
import typing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabkit._serialise import dumps, from_plain, to_plain, write_atomically


@dataclass(frozen=True, kw_only=True)
class Leaf:
    number: float
    count: int
    word: str
    flag: bool
    maybe: float | None
    pair: tuple[float, str]


@dataclass(frozen=True, kw_only=True)
class Branch:
    leaf: Leaf | None
    leaves: tuple[Leaf, ...]
    numbers: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    table: dict[str, float]
    nested: dict[str, Leaf]
    settings: dict[str, typing.Any]
    old_style: typing.Optional[int]  # noqa: UP045
    cache: list[int] = field(default_factory=list, compare=False)


numbers = st.floats() | st.sampled_from([math.inf, -math.inf, math.nan, 0.1 + 0.2, 5e-324, -0.0])
words = st.text(max_size=8) | st.sampled_from(["NaN", "Infinity", "-Infinity", "é∞", ""])
leaves = st.builds(
    Leaf,
    number=numbers,
    count=st.integers(),
    word=words,
    flag=st.booleans(),
    maybe=st.none() | numbers,
    pair=st.tuples(numbers, words),
)
branches = st.builds(
    Branch,
    leaf=st.none() | leaves,
    leaves=st.lists(leaves, max_size=3).map(tuple),
    numbers=st.lists(numbers, max_size=4).map(tuple),
    rows=st.lists(st.lists(numbers, max_size=3).map(tuple), max_size=3).map(tuple),
    table=st.dictionaries(words, numbers, max_size=3),
    nested=st.dictionaries(words, leaves, max_size=2),
    settings=st.dictionaries(words, st.none() | st.booleans() | st.integers() | words, max_size=3),
    old_style=st.none() | st.integers(),
)


def identical(left, right):
    """Equality down to types and the sign of zero, where NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        same = left == right and math.copysign(1, left) == math.copysign(1, right)
        return same or (math.isnan(left) and math.isnan(right))
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(identical, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(identical(left[key], right[key]) for key in left)
    if isinstance(left, Leaf | Branch):
        return all(identical(v, vars(right)[k]) for k, v in vars(left).items() if k != "cache")
    return left == right


@given(value=branches)
def test_round_trip(value):
    text = dumps(to_plain(value))
    restored = from_plain(Branch, json.loads(text))
    assert identical(restored, value)
    assert dumps(to_plain(restored)) == text


@given(value=branches)
def test_the_text_is_strict_json(value):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads(dumps(to_plain(value)), parse_constant=refuse)


def test_fields_that_are_not_compared_are_left_out():
    value = Branch(
        leaf=None, leaves=(), numbers=(), rows=(), table={}, nested={}, settings={}, old_style=None, cache=[1]
    )
    assert "cache" not in to_plain(value)
    assert from_plain(Branch, to_plain(value)).cache == []


def test_integers_become_floats_where_floats_are_meant():
    assert identical(from_plain(tuple[float, ...], [1, 2]), (1.0, 2.0))


def test_text_that_is_not_plain_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(math.inf)


@pytest.mark.parametrize(("value", "kind"), [({1, 2}, "set"), (1j, "complex"), (Leaf, "type"), (b"x", "bytes")])
def test_values_without_a_plain_form_are_refused(value, kind):
    with pytest.raises(TypeError, match=f"a file holds plain values only; got {kind} as 'key'"):
        to_plain({"key": [value]})


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (
            lambda plain: {k: v for k, v in plain.items() if k != "word"},
            r"got \['count', 'flag', 'maybe', 'number', 'pair'",
        ),
        (lambda plain: {**plain, "extra": 1}, "got .*'extra'"),
        (lambda plain: [plain], "got list"),
    ],
)
def test_missing_and_unknown_fields_are_refused(change, shown):
    plain = to_plain(Leaf(number=1.0, count=1, word="", flag=True, maybe=None, pair=(1.0, "")))
    with pytest.raises(ValueError, match=f"`Leaf` needs the fields .*'word'.*; {shown}"):
        from_plain(Leaf, change(plain))
    with pytest.raises(ValueError, match="`Leaf` needs the fields"):
        from_plain(tuple[Leaf, ...], [change(plain)])


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", [str, Path])
def test_files_are_written_where_asked(tmp_path, kind):
    target = tmp_path / "new" / "folder" / "é.json"
    assert write_atomically(kind(target), "∞\n") == target
    assert target.read_text(encoding="utf-8") == "∞\n"
    write_atomically(kind(target), "shorter")
    assert target.read_text(encoding="utf-8") == "shorter"
    assert os.listdir(target.parent) == ["é.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_atomically("report.json", "x") == Path("report.json")
    assert (tmp_path / "report.json").read_text() == "x"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):  # half of the text would have been written
        write_atomically(target, "x" * 100_000 + "\ud800")

    def full(self, other):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    target.write_text("old")

    def interrupted(self, mode):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "chmod", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]
