"""On an accelerator: nothing is mixed with the host's tensors, results are the CPU's, and inner loops do not wait.

The accelerator is a pretended one (tests/pretend_gpu.py), in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stabkit.runner import check_steps

PROGRAM = Path(__file__).with_name("pretend_gpu.py")
STEPS = 120  # as there
NAMES = ("graddiff", "sfr_on", "finetune", "salun", "agu")
pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices in Python",
)


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]  # "two devices" stands there, with the place
    return json.loads(done.stdout)


def test_results_are_those_of_the_cpu(found):
    host, there = found["cpu"], found["device"]
    assert there["accuracy"] == host["accuracy"]
    for name in NAMES:
        for key in ("probability", "critical_lr", "largest", "loss"):
            assert there[name][key] == pytest.approx(host[name][key], rel=1e-4), (name, key)
        probabilities = torch.tensor(host[name]["frontier"])
        for where in ("frontier", "near"):
            torch.testing.assert_close(torch.tensor(there[name][where]), probabilities, rtol=0, atol=1e-4)
        assert float(probabilities.max() - probabilities.min()) > 0.1  # there is a boundary to agree on
    for name in ("thorough", "thorough_there"):
        assert there[name]["score"] == pytest.approx(host[name]["score"], rel=1e-3)
        assert there[name]["real_steps"] == host[name]["real_steps"] > 0


@pytest.mark.parametrize("where", ["run", "frontier"])
def test_the_host_waits_at_looks_and_not_at_steps(found, where):
    most = 4 * len(check_steps(STEPS, 10)) + 4
    assert most < STEPS
    for name in NAMES:
        assert found["cpu"][name]["waits"][where] == {}
        waits = found["device"][name]["waits"][where]
        if name == "agu":  # whether to stop is read in every step, once
            place = "steps.py:take" if where == "run" else "rollout/roll.py:_roll_seeds"
            assert waits.pop(place) <= STEPS
        assert 0 < sum(waits.values()) <= most, waits


def test_a_step_sends_its_batches_and_no_more(found):
    """Indices of either set, once for inputs and targets; random labels too. All of it through pinned memory on CUDA."""
    looks = len(check_steps(STEPS, 10))
    for name, each in (("graddiff", 2), ("sfr_on", 1), ("finetune", 1), ("salun", 3), ("agu", 2)):
        sends = found["device"][name]["sends"]
        assert set(sends) == {"_memory.py:sent"}, sends
        assert sends["_memory.py:sent"] == each * STEPS + 2 * looks, name
        assert found["cpu"][name]["sends"] == {}


def test_small_rollouts_are_done_on_the_host(found):
    """Which is told of the network once, and waits at no look."""
    for name in ("graddiff", "sfr_on", "finetune", "salun"):
        waits = found["device"][name]["waits"]
        assert sum(waits["near"].values()) < sum(waits["frontier"].values())
        assert {where for where in waits["near"] if where.startswith("rollout/")} <= {
            "rollout/direction.py:mask_and_signs"
        }
