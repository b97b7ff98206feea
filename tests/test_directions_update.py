"""An update taken apart: dense projections, predictions that hold to the stated order, measurements by other routes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stabkit import UnlearningProblem
from stabkit.directions import decompose_update, unlearning_directions
from tests.cases import CASES, dense_ggn, dense_hessian, mean_loss

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")


def direction(problem, seed=0):
    v = torch.randn(problem.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm()


def parts(found):
    return found.whole, found.harming, found.preserving


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("case", CASES[:4], ids=lambda c: c.name)
def test_parts_and_predictions_are_the_dense_ones(case, curvature):
    problem = case.problem()
    update = 0.1 * direction(problem)
    found = decompose_update(problem, update, directions=3, curvature=curvature)
    ggn = dense_ggn(problem, "retain")
    bent = dense_hessian(problem, "retain") if curvature == "hessian" else ggn
    gradient = torch.autograd.functional.jacobian(mean_loss(problem, "retain"), problem.vector())
    leading = torch.linalg.eigh(ggn).eigenvectors[:, -3:]
    harming = leading @ (leading.T @ update)
    for part, expected in zip(parts(found), (update, harming, update - harming), strict=True):
        torch.testing.assert_close(part.update, expected, rtol=1e-3, atol=1e-4 * float(update.norm()))
        exact = part.update
        assert part.share == pytest.approx(float(exact @ exact / (update @ update)))
        assert part.predicted_divergence == pytest.approx(float(exact @ ggn @ exact) / 2, rel=1e-6, abs=1e-12)
        assert part.predicted_loss_change == pytest.approx(
            float(gradient @ exact + exact @ bent @ exact / 2), rel=1e-6, abs=1e-12
        )
    assert found.harming.share + found.preserving.share == pytest.approx(1)
    total = found.harming.predicted_divergence + found.preserving.predicted_divergence
    assert total == pytest.approx(found.whole.predicted_divergence, rel=1e-3)
    assert found.harm == pytest.approx(found.harming.predicted_divergence / found.whole.predicted_divergence)
    assert found.samples == problem.retain.size


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_measured_numbers_are_those_of_the_moved_network(case):
    problem = case.problem()
    found = decompose_update(problem, 0.3 * direction(problem), directions=2)
    loss = mean_loss(problem, "retain")
    outputs, targets, _ = problem.evaluate(problem.retain)
    for part in parts(found):
        theta = problem.vector() + part.update
        assert part.loss_change == pytest.approx(float(loss(theta) - loss(problem.vector())), abs=1e-12)
        moved, _, _ = problem.evaluate(problem.retain, problem.unflatten(theta))
        if problem.loss.name == "poisson":  # f and f' by the definition of Bregman's divergence of exp
            expected = (moved.exp() - outputs.exp() - outputs.exp() * (moved - outputs)).sum(1)
        else:  # KL, and the mean squared change
            expected = problem.loss.divergence(outputs, moved, targets)
        assert part.divergence == pytest.approx(float(expected.mean()), rel=1e-9, abs=1e-13)
        assert part.divergence >= 0


def test_the_divergence_is_kl_in_nats():
    problem = CASES[0].problem()
    found = decompose_update(problem, 0.5 * direction(problem), directions=2)
    before = problem.evaluate(problem.retain)[0].log_softmax(1)
    after = problem.evaluate(problem.retain, problem.unflatten(problem.vector() + found.whole.update))[0].log_softmax(1)
    assert found.whole.divergence == pytest.approx(
        float(F.kl_div(after, before, reduction="batchmean", log_target=True))
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_predictions_are_right_to_second_order(case):
    problem = case.problem()
    errors = []
    for size in (0.004, 0.002):  # where the third order leads the fourth
        part = decompose_update(problem, size * direction(problem), directions=2).whole
        errors.append((
            abs(part.divergence - part.predicted_divergence),
            abs(part.loss_change - part.predicted_loss_change),
        ))
        assert part.divergence == pytest.approx(part.predicted_divergence, rel=0.02)
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine > 2**3 * 0.75  # of third order: half the step, an eighth of the error


def test_the_remain_direction_harms_less_than_the_plain_gradient_at_equal_length(digits_mlp, class_deletion):
    forget, retain = class_deletion
    problem = UnlearningProblem(digits_mlp, forget, retain)
    found = unlearning_directions(problem)
    ascent, remain = (
        decompose_update(problem, 0.3 * v / v.norm(), directions=10, samples=256)
        for v in (found.forget_gradient, found.remain)
    )
    assert remain.whole.predicted_divergence < 0.2 * ascent.whole.predicted_divergence
    assert remain.whole.divergence < 0.2 * ascent.whole.divergence
    assert ascent.harm > 0.8
    assert ascent.harming.divergence > 5 * ascent.preserving.divergence
    assert ascent.preserving.share + ascent.harming.share == pytest.approx(1, abs=1e-5)
    assert ascent.samples == 256


def test_the_summary_holds_every_number():
    problem = CASES[0].problem()
    found = decompose_update(problem, 0.1 * direction(problem), directions=4)
    text = found.summary()
    for part in parts(found):
        for number in (part.divergence, part.predicted_divergence, part.loss_change, part.predicted_loss_change):
            assert f"{number:.3g}" in text
    assert f"{found.harming.share:.1%}" in text
    assert f"The 4 most curved directions carry {found.harm:.1%}" in text
    assert "on 14 retain samples" in text
    assert "hessian" in text
    assert str(found) == text
    shown = str(found.harming)
    assert f"{found.harming.share:.1%} of the whole's square" in shown
    assert f"divergence {found.harming.divergence:.3g} " in shown
    assert "tensor" not in shown


def test_the_model_and_its_data_stay_as_they_were():
    problem = CASES[0].problem()
    before, update = problem.vector().clone(), direction(problem)
    state, kept = torch.random.get_rng_state(), update.clone()
    decompose_update(problem, update)
    assert torch.equal(problem.vector(), before)
    assert torch.equal(update, kept)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("update", "arguments", "message"),
    [
        (torch.zeros(3), {}, r"`update` of `decompose_update` must be of shape \(43,\).*; got \(3,\)"),
        (torch.zeros(43), {}, r"`update` .* must be finite and not zero; got one of norm 0\."),
        (torch.full((43,), math.nan), {}, r"`update` .* must be finite and not zero; got one of norm nan"),
        (torch.ones(43), {"directions": 0}, r"`directions` of `decompose_update` must be .*; got 0"),
        (torch.ones(43), {"samples": 0}, r"`samples` of `decompose_update` must be .*; got 0"),
        (torch.ones(43), {"curvature": "fisher"}, r"`curvature` of `decompose_update` must be .*; got 'fisher'"),
    ],
)
def test_what_is_no_update_is_refused(update, arguments, message):
    with pytest.raises(ValueError, match=message):
        decompose_update(CASES[0].problem(), update, **arguments)


@pytest.mark.parametrize(
    ("update", "got"), [({"0.weight": torch.ones(3)}, "dict"), (np.ones(43), "ndarray"), (None, "NoneType")]
)
def test_what_is_no_tensor_is_told_what_makes_one(update, got):
    with pytest.raises(
        TypeError, match=rf"`update` of .* a tensor of shape \(43,\); got {got}\. `problem\.flatten` makes one"
    ):
        decompose_update(CASES[0].problem(), update)
