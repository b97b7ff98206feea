"""Retraining starts anew, sees the retain set alone, and is the SGD it says it is."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stabkit import LowConfidenceWarning
from stabkit.algorithms import FineTune, GradDiff, L1Sparse, retrain
from stabkit.algorithms.plan import StopRule
from stabkit.models import MLP, CausalLM, VisionTransformer
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem
from stabkit.sampling import batch_streams
from tests.cases import CASES, ResidualBlockNet

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")


def vector(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_it_is_sgd_from_a_fresh_network():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=g), torch.randint(0, 3, (20,), generator=g)
    problem = UnlearningProblem(MLP(4, 3, hidden=(5,), seed=1), (x[:6], y[:6]), (x[6:], y[6:]))
    training = FineTune(
        lr=0.1,
        steps=8,
        batch_size=5,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.01,
        lr_schedule="cosine",
        max_gradient_norm=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        fresh = MLP(4, 3, hidden=(5,))
    start = vector(fresh).clone()
    found = retrain(problem, training, initial=fresh, seed=7)
    assert torch.equal(vector(fresh), start)
    optimiser = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    stream, _ = batch_streams((14, 6), (5, 5), "without_replacement", 7)
    losses = []
    for k in range(8):
        chosen = next(stream)
        optimiser.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * k / 8)) / 2
        optimiser.zero_grad()
        loss = F.cross_entropy(fresh(x[6:][chosen]), y[6:][chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fresh.parameters(), 0.3)
        optimiser.step()
        losses.append(float(loss.detach()))
    torch.testing.assert_close(vector(found.model), vector(fresh))
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert (found.steps, found.seed, found.gradient_equivalents) == (8, 7, 40)
    assert all(p.grad is None for p in found.model.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_layers_have_step_sizes_and_decays_of_their_own(optimizer):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=g), torch.randint(0, 3, (20,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        fresh = MLP(4, 3, hidden=(5,))
    problem = UnlearningProblem(MLP(4, 3, hidden=(5,), seed=1), (x[:6], y[:6]), (x[6:], y[6:]))
    first, last = (layer for layer in fresh.modules() if isinstance(layer, nn.Linear))
    names = {id(module): name for name, module in fresh.named_modules()}
    training = FineTune(
        lr=0.1,
        steps=4,
        batch_size=14,
        lr_schedule="linear",
        weight_decay=0.2,
        optimizer=optimizer,
        layer_lr={names[id(first)]: 0.5},
        layer_weight_decay={f"{names[id(last)]}.bias": 0.0},
    )
    found = retrain(problem, training, initial=fresh, seed=7)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    rule = kind([
        {"params": first.parameters(), "lr": 0.05, "weight_decay": 0.2},
        {"params": last.weight, "lr": 0.1, "weight_decay": 0.2},
        {"params": last.bias, "lr": 0.1, "weight_decay": 0.0},
    ])
    schedule = torch.optim.lr_scheduler.LinearLR(rule, 1.0, 0.0, total_iters=4)
    for _ in range(4):
        rule.zero_grad()
        F.cross_entropy(fresh(x[6:]), y[6:]).backward()
        rule.step()
        schedule.step()
    torch.testing.assert_close(vector(found.model), vector(fresh))
    with pytest.raises(
        ValueError, match="`layer_weight_decay` of `FineTune` must name layers of the model; got 'head'"
    ):
        retrain(problem, training.replace(layer_weight_decay={"head": 0.0}))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_pull_towards_sparse_weights_is_part_of_it(optimizer):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=g), torch.randint(0, 3, (20,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        fresh = MLP(4, 3, hidden=(5,))
    problem = UnlearningProblem(MLP(4, 3, hidden=(5,), seed=1), (x[:6], y[:6]), (x[6:], y[6:]))
    training = L1Sparse(
        lr=0.1, steps=6, batch_size=14, penalty=0.2, weight_decay=0.01, max_gradient_norm=0.3, optimizer=optimizer
    )
    found = retrain(problem, training, initial=fresh, seed=7)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    rule = kind(fresh.parameters(), lr=0.1, weight_decay=0.01)
    for k in range(6):
        rule.zero_grad()
        F.cross_entropy(fresh(x[6:]), y[6:]).backward()
        torch.nn.utils.clip_grad_norm_(fresh.parameters(), 0.3)
        for p in fresh.parameters():
            p.grad += 0.2 * (1 - k / 6) * p.detach().sign()
        rule.step()
    torch.testing.assert_close(vector(found.model), vector(fresh))
    plain = retrain(problem, FineTune(lr=0.1, steps=6, batch_size=14), seed=7).model
    sparse = retrain(problem, L1Sparse(lr=0.1, steps=6, batch_size=14, penalty=1.0), seed=7).model
    assert float(vector(sparse).abs().sum()) < 0.8 * float(vector(plain).abs().sum())


class Weighted(FineTune):
    name = "weighted"

    def retain_residual(self, loss, batch):
        return 2 * loss.residual(batch.outputs, batch.targets)


class Stopping(FineTune):
    name = "stopping"

    def stop_rule(self):
        return StopRule(drift_tolerance=0.1)


class Scaled(FineTune):
    name = "scaled"

    def preconditioner(self, problem):
        return Diagonal(torch.full((problem.size,), 0.5))


@pytest.mark.parametrize(
    ("kind", "settings", "got"),
    [
        (FineTune, {"forget_every": 3}, "a FineTune with forget_every=3"),
        (Weighted, {}, "a Weighted with a `retain_residual` of its own"),
        (Stopping, {}, "a Stopping with a stop rule"),
        (Scaled, {}, "a Scaled with a preconditioner"),
    ],
)
def test_what_training_from_scratch_would_leave_out_is_refused(kind, settings, got):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=g), torch.arange(12) % 3
    problem = UnlearningProblem(MLP(4, 3, hidden=(5,), seed=1), (x[:3], y[:3]), (x[3:], y[3:]))
    with pytest.raises(
        ValueError, match=f"`training` of `retrain` must take plain steps .*; got {got}, .* Use FineTune"
    ):
        retrain(problem, kind(steps=2, batch_size=3, **settings))


def test_starting_from_the_trained_weights_is_warned_of():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=g), torch.arange(12) % 3
    model = MLP(4, 3, hidden=(5,))
    problem = UnlearningProblem(model, (x[:3], y[:3]), (x[3:], y[3:]))
    training = FineTune(steps=2, batch_size=3)
    with pytest.warns(LowConfidenceWarning, match="has seen the forget set.* Pass a freshly initialised") as caught:
        retrain(problem, training, initial=model)
    assert [w.filename for w in caught] == [__file__]
    retrain(problem, training, initial=MLP(4, 3, hidden=(5,), seed=1))


def test_it_forgets_and_learns(digits_mlp, class_deletion, digits_data):
    problem = UnlearningProblem(digits_mlp, *class_deletion)
    training = FineTune(lr=0.2, steps=200, batch_size=64, momentum=0.9)
    before, rng = vector(digits_mlp).clone(), torch.get_rng_state()
    first, again, other = (retrain(problem, training, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(vector(digits_mlp), before)
    assert torch.equal(vector(first.model), vector(again.model))
    assert not torch.equal(vector(first.model), vector(other.model))

    def accuracy(pair):
        return float((first.model(pair[0]).argmax(1) == pair[1]).double().mean())

    forget, retain = class_deletion
    assert accuracy(retain) > 0.9
    assert accuracy(forget) == 0  # it has never seen the class


def test_the_initialisation_is_the_seeds(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    still = FineTune(lr=1e-12, steps=1, batch_size=16)
    first, again, other = (vector(retrain(problem, still, seed=s).model) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 0.01
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fresh = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 10))
    torch.testing.assert_close(first, vector(fresh))  # PyTorch's own initialisation


def test_batchnorm_and_modes():
    """Statistics are learned anew, in train mode; the model comes back in the mode of the one given."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 4, 4, generator=g) + 5, torch.arange(24) % 3
    model = ResidualBlockNet()
    with torch.no_grad():
        model.norm.running_mean.fill_(100.0)
    problem = UnlearningProblem(model.eval(), (x[:6], y[:6]), (x[6:], y[6:]))
    found = retrain(problem, FineTune(lr=0.05, steps=60, batch_size=9)).model
    assert not found.training
    assert not found.norm.training
    inputs = found.stem(x[6:])
    torch.testing.assert_close(found.norm.running_mean, inputs.mean((0, 2, 3)), rtol=0.3, atol=0.3)


def test_frozen_parameters_stay():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=g), torch.arange(12) % 3
    model = MLP(4, 3, hidden=(5,))
    first = next(model.parameters())
    first.requires_grad_(False)
    problem = UnlearningProblem(model, (x[:3], y[:3]), (x[3:], y[3:]))
    found = retrain(problem, FineTune(lr=0.1, steps=3, batch_size=3)).model
    assert torch.equal(next(found.parameters()), first)
    assert not torch.equal(list(found.parameters())[-1], list(model.parameters())[-1])


@pytest.mark.parametrize("sampling", ["poisson", "with_replacement"])
def test_it_takes_dictionaries_attention_and_poisson_batches(sampling):
    problem = CASES[4].problem()
    training = FineTune(lr=0.3, steps=40, batch_size=1 if sampling == "poisson" else 4, sampling=sampling)
    found = retrain(problem, training, seed=1)
    assert found.steps == 40
    own = dict(found.model.named_parameters())
    assert own["embedding.weight"] is found.model.head.weight
    if sampling == "poisson":
        assert 0.0 in found.losses  # an empty batch
        assert found.gradient_equivalents == pytest.approx(40, abs=5 * 40**0.5)


def regression(**settings):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    problem = UnlearningProblem(nn.Linear(4, 1), (x[:3], x[:3, :1]), (x[3:], x[3:, :1]), loss="mse")
    return problem, FineTune(lr=1e20, steps=50, batch_size=3, **settings)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_that_is_not_finite_ends_it(optimizer):
    problem, training = regression(optimizer=optimizer)
    with pytest.warns(
        LowConfidenceWarning, match="`retrain` stopped at step .* of 50, as the batch loss .*lr=1e"
    ) as caught:
        found = retrain(problem, training)
    assert [w.filename for w in caught] == [__file__]
    assert found.diverged
    assert not math.isfinite(found.losses[-1])
    assert all(map(math.isfinite, found.losses[:-1]))
    assert found.steps == len(found.losses) - 2  # the last loss is after one step more than the last finite one
    assert f"the model is that of {found.steps} steps" in str(caught[0].message)
    assert found.gradient_equivalents == 3 * len(found.losses)
    # Its model is that of as many steps alone, and its loss is the last finite one.
    if found.steps:
        fewer = retrain(problem, training.replace(steps=found.steps))
        assert not fewer.diverged
        assert torch.equal(vector(found.model), vector(fewer.model))
    assert bool(torch.isfinite(vector(found.model)).all())


def test_weights_that_are_not_finite_after_the_last_step_are_not_returned():
    problem, training = regression()
    initial = nn.Linear(4, 1)
    with torch.no_grad():
        initial.weight.fill_(1e10)
    with pytest.warns(LowConfidenceWarning, match="stopped at step 1 of 1, as the weights .* that of 0 steps"):
        found = retrain(problem, training.replace(lr=1e38, steps=1), initial=initial)
    assert (found.diverged, found.steps, len(found.losses)) == (True, 0, 1)
    assert bool(torch.isfinite(vector(found.model)).all())
    assert math.isfinite(found.losses[0])


def test_statistics_are_those_of_the_last_good_model_too():
    x = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 3
    problem = UnlearningProblem(ResidualBlockNet().eval(), (x[:3], y[:3]), (x[3:], y[3:]))
    training = FineTune(lr=1e30, steps=20, batch_size=3)
    with pytest.warns(LowConfidenceWarning, match="`retrain` stopped"):
        found = retrain(problem, training)
    assert all(bool(torch.isfinite(value).all()) for value in found.model.state_dict().values())
    assert int(found.model.norm.num_batches_tracked) == found.steps + 1  # that of its own finite loss, too


def test_a_first_loss_that_is_not_finite_leaves_the_initial_model():
    problem, training = regression()
    initial = nn.Linear(4, 1)
    with torch.no_grad():
        initial.weight.fill_(1e38)
    with pytest.warns(LowConfidenceWarning, match="stopped at step 1 of 50, as the batch loss .* that of 0 steps"):
        found = retrain(problem, training, initial=initial)
    assert found.steps == 0
    assert torch.equal(found.model.weight, initial.weight)


def test_buffers_that_hold_one_number_several_times_do_no_harm():
    class Expanded(nn.Linear):
        def __init__(self):
            super().__init__(4, 1)
            self.register_buffer("places", torch.ones(1).expand(5))

    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    problem = UnlearningProblem(Expanded(), (x[:3], x[:3, :1]), (x[3:], x[3:, :1]), loss="mse")
    with pytest.warns(LowConfidenceWarning, match="as the batch loss"):
        found = retrain(problem, FineTune(lr=1e20, steps=5, batch_size=3))
    assert bool(torch.isfinite(vector(found.model)).all())
    assert found.model.places.tolist() == [1.0] * 5


def test_a_run_that_stays_finite_has_not_diverged():
    problem, training = regression()
    found = retrain(problem, training.replace(lr=0.01))
    assert not found.diverged
    assert found.steps == len(found.losses) == 50


def test_the_librarys_own_networks_start_as_they_are_built():
    """A language model with GPT-2's small weights, a vision transformer whatever its positions, attention with no biases."""
    tokens = torch.arange(48).view(8, 6) % 7
    language = CausalLM(200, context=100, width=64, depth=1)
    images, y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    vision = VisionTransformer(1, 8, 3, width=32, depth=1)
    for model, x, targets, loss in (
        (language, tokens, tokens, "causal_lm"),
        (vision, images, y, "cross_entropy"),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        problem = UnlearningProblem(model, (x[:3], targets[:3]), (x[3:], targets[3:]), loss=loss)
        found = retrain(problem, FineTune(lr=1e-12, steps=1, batch_size=2), seed=4).model
        kind = {"causal_lm": lambda: CausalLM(200, context=100, width=64, depth=1, seed=9)}
        fresh = kind.get(loss, lambda: VisionTransformer(1, 8, 3, width=32, depth=1, seed=9))()
        for (name, own), truth in zip(found.named_parameters(), fresh.parameters(), strict=True):
            if truth.dim() > 1:
                assert not torch.equal(own, truth)
            spread, expected = float(own.detach().std()), float(truth.detach().std())
            assert spread == pytest.approx(expected, rel=0.5 if truth.numel() < 200 else 0.15, abs=1e-9), name
    assert float(found.blocks[0].self_attn.out_proj.bias.detach().abs().max()) < 1e-9


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.weight * x


def test_what_is_wrong_is_said():
    x, y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    problem = UnlearningProblem(nn.Sequential(nn.Linear(3, 3), Scale()), (x[:3], y[:3]), (x[3:], y[3:]))
    training = FineTune(steps=2, batch_size=3)
    with pytest.raises(ValueError, match=r"`initial` of `retrain` .* its layer '1', a Scale, has .*; got None"):
        retrain(problem, training)
    assert retrain(problem, training, initial=nn.Sequential(nn.Linear(3, 3), Scale())).steps == 2
    with pytest.raises(TypeError, match=r"`training` of `retrain` must be a FineTune, .*; got GradDiff\(lr=0.01"):
        retrain(problem, GradDiff())
    with pytest.raises(ValueError, match="`seed` of `retrain` must be a whole number >= 0; got -1"):
        retrain(problem, training, seed=-1)
    with pytest.raises(
        ValueError, match="`batch_size` of `FineTune` must be at most the retain set's 9 samples; got 10"
    ):
        retrain(problem, training.replace(batch_size=10))
