"""Accuracies against a plain loop over samples."""

import copy

import pytest
import torch
from torch import nn

from stabkit.algorithms import GradDiff
from stabkit.losses import IGNORE_INDEX
from stabkit.metrics import Accuracies, accuracies, accuracy, parameters_of
from stabkit.models import MLP
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from tests.cases import CASES

untrained = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")


def by_loop(model, x, y):
    right = 0
    with torch.no_grad():
        for image, label in zip(x, y, strict=True):
            right += int(model(image.unsqueeze(0)).argmax()) == int(label)
    return right / len(y)


def test_accuracies_of_a_run(digits_mlp, digits_data, class_deletion):
    test = digits_data.x_test, digits_data.y_test
    problem = UnlearningProblem(digits_mlp, *class_deletion, test=test)
    model = run(problem, GradDiff(lr=0.05, mix=0.3, steps=40, batch_size=32)).model
    (forget, retain), seen = class_deletion, []
    for net in (digits_mlp, model):
        found = accuracies(problem, net)
        expected = [by_loop(net, *pair) for pair in (retain, forget, test)]
        assert (found.retain, found.forget, found.test) == pytest.approx(tuple(expected), abs=1e-12)
        seen.append(found)
    assert seen[0].forget > 0.8
    assert seen[1].forget < seen[0].forget


def test_a_test_set_handed_over_later(digits_mlp, digits_data, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    assert accuracies(problem, digits_mlp).test is None
    later = problem.read((digits_data.x_test[:50], digits_data.y_test[:50]), name="test")
    expected = by_loop(digits_mlp, digits_data.x_test[:50], digits_data.y_test[:50])
    assert accuracies(problem, digits_mlp, test=later).test == pytest.approx(expected)


@untrained
def test_a_language_model_is_right_token_by_token():
    problem = next(c for c in CASES if c.name == "tied-language-model").problem()
    model, right, counted = problem.new_model(), 0, 0
    inputs, targets = problem.forget.batch(torch.arange(problem.forget.size))
    logits = model(**inputs).logits
    for i in range(len(targets)):
        for t in range(targets.shape[1] - 1):
            if targets[i, t + 1] != IGNORE_INDEX:
                counted += 1
                right += int(logits[i, t].argmax() == targets[i, t + 1])
    assert counted == 4 * 4 - 2
    assert accuracies(problem, model).forget == pytest.approx(right / counted)


@untrained
def test_a_loss_without_classes_has_no_accuracy():
    problem = next(c for c in CASES if c.name == "mlp-squared-error").problem()
    assert accuracies(problem, problem.new_model()) == Accuracies(retain=None, forget=None, test=None)


def test_a_model_that_left_the_numbers_gets_none_right(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    for value in (float("nan"), float("inf")):
        broken = copy.deepcopy(digits_mlp)
        with torch.no_grad():
            broken[-1].bias[0] = value
        assert accuracy(problem, problem.forget, parameters_of(problem, broken)) == 0


def test_another_architecture_is_refused(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    with pytest.raises(ValueError, match=r"parameter '1.weight' of shape \(24, 64\), as .*; got \(8, 64\)"):
        accuracies(problem, MLP(64, 10, hidden=(8,)))
    with pytest.raises(ValueError, match=r"parameter '1.weight' of shape \(24, 64\), as .*; got none"):
        accuracies(problem, nn.Linear(64, 10))
