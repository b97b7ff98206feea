"""On an accelerator: nothing is mixed with the host's tensors, results are the CPU's, and inner loops do not wait.

The accelerator is a pretended one (tests/pretend_gpu.py, tests/pretend_ends.py), in a process of its own.
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


def said_by(program):
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]  # "two devices" stands there, with the place
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return said_by(PROGRAM)


@pytest.fixture(scope="module")
def ends():
    return said_by(PROGRAM.with_name("pretend_ends.py"))


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


ENDED_STEPS = 60  # as in pretend_ends.py
ENDED = {"none": "steps", "drift": "drift", "leakage": "leakage", "momentum": "drift", "poisson": "drift"}
RUNS = [("agu", name) for name in ENDED] + [("sragu", name) for name in ("none", "drift", "leakage")]


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_a_stop_rule_that_is_read_at_looks_ends_a_run_where_it_is_met(ends, kind, name):
    """To the bit where it ends one that is asked in every step, as `on_step` has it, and where it does on the CPU."""
    host, there = (ends[where][f"{kind}_{name}"] for where in ("cpu", "device"))
    looks = check_steps(ENDED_STEPS, 10)
    reason, last = host["run"]["ends"]
    assert reason == ENDED[name]
    assert (last in looks) == (name == "none")  # between two looks
    for case in (host, there):
        for way in ("run", "told", "written"):
            assert case[way]["ends"] == [reason, last]
            assert case[way]["bits"] == case["told"]["bits"], way
    assert there["run"]["bits"][2] == host["run"]["bits"][2]
    for here, at in zip(host["run"]["bits"][0], there["run"]["bits"][0], strict=True):
        assert at == pytest.approx(here, rel=1e-6)
    waits = there["run"]["waits"]
    read = sum(step < last for step in looks) + (name != "none")  # the next look after it
    assert waits["steps.py:_watch"] <= read
    assert sum(waits.values()) <= 4 * (read + 2)
    assert there["told"]["waits"]["steps.py:_watch"] >= last
    assert there["written"]["waits"]["steps.py:_watch"] <= read + last // 7 + 1
    assert host["run"]["waits"] == {}


@pytest.mark.parametrize("name", ENDED)
def test_so_it_ends_single_steps_and_rollouts(ends, name):
    host, there = (ends[where][f"agu_{name}"] for where in ("cpu", "device"))
    for case in (host, there):
        assert case["walk"]["ends"] == case["walk_told"]["ends"] == host["walk"]["ends"]
        assert case["walk"]["bits"] == case["walk_told"]["bits"]
        assert case["rollout"]["ends"] == case["rollout_told"]["ends"] == host["rollout"]["ends"]
        for one, other in zip(case["rollout"]["bits"], case["rollout_told"]["bits"], strict=True):
            assert one == pytest.approx(torch.tensor(other).numpy(), rel=1e-6, abs=1e-9)
    assert host["walk"]["ends"][:2] == [host["run"]["ends"][1], name != "none"]
    assert (
        there["walk"]["waits"]["steps.py:_watch"] <= ENDED_STEPS // 10 < there["walk_told"]["waits"]["steps.py:_watch"]
    )
    lasts = {last for row in host["rollout"]["ends"] for last in row}
    assert (lasts == {ENDED_STEPS}) == (name == "none")
    groups = 2 if name == "poisson" else 1  # of seeds side by side
    looks = len(check_steps(ENDED_STEPS, 10))
    assert there["rollout"]["waits"]["rollout/roll.py:_roll_seeds"] <= groups * looks
    assert sum(there["rollout"]["waits"].values()) <= groups * (looks + 1) + 2 * 3 * looks


def test_running_statistics_stand_still_where_a_run_has_ended(ends):
    for where in ("cpu", "device"):
        assert ends[where]["batchnorm"]["ends"] == ["drift", 22]
        assert ends[where]["batchnorm"] == ends[where]["batchnorm_told"]


def test_conjugate_gradients_wait_once_a_step(ends):
    host, there = (ends[where]["solve"] for where in ("cpu", "device"))
    assert there["products"] == host["products"] > 20
    for key in ("vectors", "curvature"):
        torch.testing.assert_close(torch.tensor(there[key]), torch.tensor(host[key]), rtol=1e-6, atol=1e-6)
    waits = {place: count for place, count in there["waits"].items() if place.startswith("directions/cg.py")}
    assert waits.pop("directions/cg.py:read") == there["steps"] == host["steps"] < there["products"]
    assert waits == {"directions/cg.py:damped_inverse": 2}  # whether the right-hand sides are finite, and their norms
    assert "spectrum/_common.py:product" not in there["waits"]
    assert host["waits"] == {}
