"""Predictions against real runs on digits, over a whole grid: the figure that everything else serves."""

from __future__ import annotations

import pytest

from benchmarks.digits_grid import GRIDS, MIXES, scores, settings_of

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning")


@pytest.fixture(scope="module")
def settings():
    return settings_of(seed=0)


def test_balanced_accuracy_over_steps_mixes_deletions_and_algorithms(settings):
    assert len({(s.deletion, s.algorithm, s.lr, s.mix) for s in settings}) == 2 * 2 * 9 * 4 == len(settings)
    assert len(MIXES) >= 4
    assert all(len(grid) >= 8 for grid in GRIDS.values())
    found = scores(settings)
    print(found)
    assert 0.25 < found["share_diverged"] < 0.75  # both outcomes are well represented
    assert found["balanced_accuracy"] >= 0.90
    assert found["balanced_accuracy"] > found["balanced_accuracy_of_step_limit"] + 0.1


def test_predicted_divergence_steps_are_those_of_the_runs(settings):
    both = [s for s in settings if s.predicted_step is not None and s.divergence_step is not None]
    assert len(both) > 50
    close = [s for s in both if max(s.predicted_step / s.divergence_step, s.divergence_step / s.predicted_step) <= 2]
    assert len(close) >= 0.8 * len(both)
