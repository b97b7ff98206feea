"""The shared argument checks: what they let through, and that they name what they refuse."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int, check_real

reals = st.floats(allow_nan=False, allow_infinity=False)


@given(value=reals, low=reals, high=reals, low_open=st.booleans(), high_open=st.booleans())
def test_reals_pass_exactly_inside_their_interval(value, low, high, low_open, high_open):
    inside = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
    ends = {"low": low, "high": high, "low_open": low_open, "high_open": high_open}
    if inside:
        assert check_real(value, name="x", owner="f", **ends) == value
    else:
        with pytest.raises(ValueError, match="`x` of `f` must be a finite number in "):
            check_real(value, name="x", owner="f", **ends)


@pytest.mark.parametrize(
    ("value", "ends", "error", "message"),
    [
        (
            1.5,
            {"low": 0, "high": 1},
            ValueError,
            r"^`mix` of `predict` must be a finite number in \[0, 1\]; got 1\.5\.$",
        ),
        (0, {"low": 0, "low_open": True}, ValueError, r"in \(0, inf\); got 0\."),
        (1, {"low": 0, "high": 1, "high_open": True}, ValueError, r"in \[0, 1\); got 1\."),
        (math.nan, {}, ValueError, r"in \(-inf, inf\); got nan"),
        (-math.inf, {}, ValueError, r"got -inf"),
        ("1", {}, TypeError, r"got '1'"),
        (None, {}, TypeError, r"got None"),
        (False, {}, TypeError, r"got False"),
        (1j, {}, TypeError, r"got 1j"),
        (np.array([1.0]), {}, TypeError, r"got array\(\[1\.\]\)"),
        (2, {"high": 1, "remedy": "Use less."}, ValueError, r"got 2\. Use less\.$"),
    ],
)
def test_reals_that_are_refused(value, ends, error, message):
    with pytest.raises(error, match=message):
        check_real(value, name="mix", owner="predict", **ends)


def test_numbers_of_other_libraries_become_plain():
    for value in (np.float32(0.5), np.float64(0.5), np.float16(0.5)):
        assert type(check_real(value, name="x", owner="f")) is float
    assert type(check_real(3, name="x", owner="f")) is float
    assert type(check_int(np.int64(3), name="x", owner="f", low=1)) is int


@given(value=st.integers(), low=st.integers(), high=st.none() | st.integers())
def test_whole_numbers_pass_exactly_inside_their_interval(value, low, high):
    if value >= low and (high is None or value <= high):
        assert check_int(value, name="x", owner="f", low=low, high=high) == value
    else:
        with pytest.raises(ValueError, match=f"`x` of `f` must be a whole number .*; got {value}"):
            check_int(value, name="x", owner="f", low=low, high=high)


@pytest.mark.parametrize(
    ("value", "ends", "error", "message"),
    [
        (0, {"low": 1}, ValueError, r"^`steps` of `run` must be a whole number >= 1; got 0\.$"),
        (9, {"low": 1, "high": 8}, ValueError, r"a whole number in \[1, 8\]; got 9"),
        (9, {"low": 1, "high": 8, "remedy": "Take 8."}, ValueError, r"got 9\. Take 8\.$"),
        (2.0, {"low": 1}, TypeError, r"a whole number >= 1; got 2\.0"),
        (True, {"low": 0}, TypeError, r"got True"),
        ("2", {"low": 0}, TypeError, r"got '2'"),
    ],
)
def test_whole_numbers_that_are_refused(value, ends, error, message):
    with pytest.raises(error, match=message):
        check_int(value, name="steps", owner="run", **ends)


CHOICES = ("graddiff", "agu", "sragu")


@given(choice=st.sampled_from(CHOICES), position=st.integers(0, 7), letter=st.characters(codec="ascii"))
def test_one_wrong_letter_is_corrected(choice, position, letter):
    position %= len(choice)
    typed = choice[:position] + letter + choice[position + 1 :]
    if typed in CHOICES:
        assert check_choice(typed, name="x", owner="f", choices=CHOICES) == typed
    else:
        with pytest.raises(ValueError, match=r"Did you mean '(graddiff|agu|sragu)'") as caught:
            check_choice(typed, name="x", owner="f", choices=CHOICES)
        assert repr(typed) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("GradDiff", ValueError, "got 'GradDiff'. Did you mean 'graddiff'"),
        ("sragu ", ValueError, "Did you mean 'sragu'"),
        ("zzz", ValueError, r"^`algorithm` of `f` must be one of 'agu', 'graddiff', 'sragu'; got 'zzz'\.$"),
        (3, TypeError, r"must be one of 'agu', 'graddiff', 'sragu'; got 3\.$"),
    ],
)
def test_choices_that_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        check_choice(value, name="algorithm", owner="f", choices=CHOICES)


def test_random_states_are_put_back():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    with preserved_rng():
        inside = draw()
    assert draw() == inside
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])

    def fail():
        with preserved_rng():
            draw()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert draw() == inside
