"""Warnings point at the line that called stabkit, however deep they arise."""

import os
import warnings

import pytest
import torch
from torch import nn

import stabkit
from stabkit._errors import StabkitWarning, TrainModeWarning, caller_level
from stabkit.models import MLP

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
FOLDER = os.path.dirname(stabkit.__file__)


def inside(name, code):
    """A function whose code claims to stand in a file of the package."""
    scope = {"warnings": warnings, "caller_level": caller_level, "StabkitWarning": StabkitWarning}
    exec(compile(code, os.path.join(FOLDER, name), "exec"), scope)
    return scope["function"]


WARN = "def function():\n    warnings.warn('heard', StabkitWarning, stacklevel=caller_level())"
CALL = "def function(other):\n    return other()"
WALK = "def function(other):\n    yield other()"


def outside(function):
    """Another library between two functions of the package."""
    return function()


DEPTHS = {
    "directly": lambda warn, call: warn(),
    "through one": lambda warn, call: call(warn),
    "through two": lambda warn, call: call(lambda: call(warn)),  # with a function of another file between
    "through another library": lambda warn, call: call(lambda: outside(warn)),
    "through a generator": lambda warn, call: next(inside("walk.py", WALK)(warn)),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_level_is_that_of_the_caller_at_any_depth(depth):
    with pytest.warns(StabkitWarning, match="heard") as record:
        DEPTHS[depth](inside("deep.py", WARN), inside("curvature/upper.py", CALL))
    assert (record[0].filename, record[0].lineno) == (__file__, DEPTHS[depth].__code__.co_firstlineno)


def test_a_folder_of_a_similar_name_is_outside():
    scope = {"warnings": warnings, "caller_level": caller_level}
    code = "def function():\n    warnings.warn('heard', UserWarning, stacklevel=caller_level())"
    exec(compile(code, FOLDER + "_extra/user.py", "exec"), scope)
    with pytest.warns(UserWarning, match="heard") as record:
        scope["function"]()
    assert record[0].filename == FOLDER + "_extra/user.py"


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_a_warning_through_predict_points_here():
    model = nn.Sequential(MLP(4, 3, hidden=(5,)), nn.Dropout(0.5))
    with (
        pytest.warns(TrainModeWarning, match="Dropout layer '1'") as record,
        pytest.raises(ValueError, match="`batch_size` of `GradDiff`"),
    ):
        stabkit.predict(model, (X[:4], Y[:4]), (X[4:], Y[4:]), algorithm="graddiff", batch_size=99)
    assert {entry.filename for entry in record} == {__file__}
