"""The bundled data, deletions, the reference networks and their training loop."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from stabkit.datasets import delete_class, delete_random, digits
from stabkit.models import MLP, SmallCNN
from stabkit.training import train

LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=60).map(torch.tensor)


def test_digits_are_those_of_scikit_learn(digits_data):
    data = digits_data
    assert (data.x_train.shape, data.x_test.shape) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float32, torch.int64)
    x = torch.cat([data.x_train, data.x_test]).flatten(1) * 16
    rows = torch.cat([x, torch.cat([data.y_train, data.y_test]).unsqueeze(1)], 1)
    bunch = load_digits()
    truth = torch.from_numpy(np.column_stack([bunch.data, bunch.target])).float()
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, truth.tolist()))


def test_the_split_depends_on_its_seed_alone():
    first, again, other = digits(seed=3), digits(seed=3), digits(seed=4, test_share=0.5)
    assert torch.equal(first.x_test, again.x_test)
    assert not torch.equal(first.y_test[:100], other.y_test[:100])
    assert len(other.y_test) == round(0.5 * 1797)


@given(labels=LABELS, share=st.floats(0.001, 0.999), seed=st.integers(0, 999))
def test_a_random_deletion_is_a_partition(labels, share, seed):
    n = len(labels)
    deletion = delete_random(labels, share=share, seed=seed)
    assert sorted([*deletion.forget.tolist(), *deletion.retain.tolist()]) == list(range(n))
    assert deletion.forget.tolist() == sorted(deletion.forget.tolist())
    assert deletion.retain.tolist() == sorted(deletion.retain.tolist())
    assert len(deletion.forget) == min(n - 1, max(1, round(share * n)))
    assert torch.equal(deletion.forget, delete_random(labels, share=share, seed=seed).forget)


@given(labels=LABELS, label=st.integers(0, 5))
def test_a_class_deletion_is_that_class(labels, label):
    if label not in labels or bool((labels == label).all()):
        with pytest.raises(ValueError, match=rf"`label` of `delete_class` .*; got {label} with labels \["):
            delete_class(labels, label=label)
    else:
        deletion = delete_class(labels, label=label)
        assert deletion.name == f"class {label}"
        assert deletion.forget.tolist() == [i for i, y in enumerate(labels.tolist()) if y == label]
        assert deletion.retain.tolist() == [i for i, y in enumerate(labels.tolist()) if y != label]


def test_a_random_deletion_is_named_by_its_share():
    assert delete_random(torch.arange(50), share=0.1).name == "random 10%"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: digits(test_share=1), ValueError, r"`test_share` of `digits` .*\(0, 1\); got 1"),
        (lambda: delete_random(torch.arange(9), share=0), ValueError, r"`share` of `delete_random` .*\(0, 1\); got 0"),
        (lambda: delete_random(torch.arange(9), share="all"), TypeError, r"got 'all'"),
        (lambda: delete_class(torch.arange(9), label=-1), ValueError, r"`label` of `delete_class` .* >= 0; got -1"),
        (lambda: delete_class(torch.arange(9), label=1.5), TypeError, r"got 1\.5"),
    ],
)
def test_settings_of_a_deletion_are_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------ networks and training


def rng_states():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in numpy]


@pytest.mark.parametrize("build", [lambda s: MLP(64, 10, seed=s), lambda s: SmallCNN(1, 8, 10, seed=s)])
def test_networks_are_seeded(build):
    before = rng_states()
    first, again, other = (build(s).state_dict() for s in (0, 0, 1))
    assert rng_states() == before
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert build(0)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_widths_and_activation():
    model = MLP(6, 2, hidden=(5, 4), activation=nn.Tanh)
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [5, 4, 2]
    assert sum(isinstance(m, nn.Tanh) for m in model) == 2
    assert SmallCNN(3, 12, 7, width=4, hidden=9)(torch.zeros(2, 3, 12, 12)).shape == (2, 7)


def test_training_is_seeded_and_learns(digits_data):
    def fit(seed):
        model = nn.Sequential(MLP(64, 32, hidden=()), nn.ReLU(), nn.Dropout(0.2), MLP(32, 10, hidden=(), seed=1))
        return train(model, digits_data.x_train, digits_data.y_train, epochs=3, lr=1e-2, seed=seed)

    before = rng_states()
    first, again, other = fit(0), fit(0), fit(1)
    assert rng_states() == before
    assert not first.training
    state = first.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert not all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    right = (first(digits_data.x_test).argmax(1) == digits_data.y_test).float().mean()
    assert float(right) > 0.8


def test_training_takes_one_step_and_any_loss():
    x, y = torch.ones(4, 2), torch.full((4, 1), 3.0)
    model = MLP(2, 1, hidden=())
    before = float(nn.functional.mse_loss(model(x), y).detach())
    train(model, x, y, epochs=1, batch_size=4, loss=nn.functional.mse_loss)
    train(model, x, y, epochs=200, lr=0.05, batch_size=3, weight_decay=1e-4, loss=nn.functional.mse_loss)
    assert float(nn.functional.mse_loss(model(x), y).detach()) < 1e-2 * before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "`epochs` of `train` must be a whole number >= 1; got 0"),
        ({"lr": 0}, r"`lr` of `train` .*\(0, inf\); got 0"),
        ({"batch_size": 0}, "`batch_size` of `train` must be a whole number >= 1; got 0"),
        ({"weight_decay": -1}, r"`weight_decay` of `train` .*\[0, inf\); got -1"),
    ],
)
def test_settings_of_training_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        train(MLP(2, 2), torch.ones(4, 2), torch.zeros(4).long(), **{"epochs": 1, **settings})


def test_training_shows_its_progress_on_request(capsys):
    train(MLP(2, 2), torch.ones(4, 2), torch.zeros(4).long(), epochs=2, progress=True)
    assert "train" in capsys.readouterr().err
