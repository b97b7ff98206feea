"""BatchNorm in train mode: runs are PyTorch's own, and predictions linearise the pass of whole batches."""

import copy
import itertools

import pytest
import torch
from torch import nn

import stabkit
from stabkit.algorithms import AGU, SCRUB, FineTune, GradDiff
from stabkit.curvature import ScaledJacobian, linearisation_cost, linearise, ritz_residuals
from stabkit.curvature import jacobian as jacobian_module
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.runner import run
from stabkit.sampling import batch_streams
from stabkit.staged import staged_rollout
from stabkit.training import train

SIZES = (20, 12)  # retain and forget


class Net(nn.Module):
    """BatchNorm of images and of features, with dropout and a residual connection."""

    def __init__(self, momentum=0.1, dropout=0.5):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3, momentum=momentum)
        self.branch = nn.Conv2d(3, 3, 3, padding=1)
        self.inner = nn.BatchNorm1d(3, momentum=momentum)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        h = torch.tanh(self.norm(self.stem(x)))
        h = h + torch.tanh(self.branch(h))
        return self.head(self.dropout(self.inner(h.mean((2, 3)))))


def trained(momentum=0.1, steps=30, loss="cross_entropy"):
    """A network after some steps in train mode, and its data, in float64."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Net(momentum, dropout=0.0).double().train()
        y = torch.randint(0, 3, (sum(SIZES),), generator=g)
        x = torch.randn(sum(SIZES), 1, 4, 4, generator=g, dtype=torch.float64) + y.view(-1, 1, 1, 1) - 1
        if loss == "mse":
            y = nn.functional.one_hot(y, 3).double()
        optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(steps):
            optimiser.zero_grad()
            (nn.functional.mse_loss if loss == "mse" else nn.functional.cross_entropy)(model(x), y).backward()
            optimiser.step()
    model.dropout.p = 0.5
    return model.eval(), x, y


def problem_of(model, x, y, batchnorm="batch", **settings):
    n = SIZES[0]
    return UnlearningProblem(model, (x[n:], y[n:]), (x[:n], y[:n]), batchnorm=batchnorm, **settings)


def by_torch(model, problem, algorithm, *, seed=0):
    """The run as people write it: BatchNorm in train mode, a pass for each batch, torch.optim.SGD; and every eval loss."""
    model = copy.deepcopy(model).train()
    model.dropout.eval()
    optimiser = torch.optim.SGD(
        model.parameters(), lr=algorithm.lr, momentum=algorithm.momentum, weight_decay=algorithm.weight_decay
    )
    streams = batch_streams(SIZES, algorithm.batch_sizes(problem), algorithm.sampling, seed)
    looks = []
    for plan in (*algorithm.plan(), None):
        evaluated = copy.deepcopy(model).eval()
        with torch.no_grad():
            looks.append([
                float(nn.functional.cross_entropy(evaluated(s.batch(torch.arange(s.size))[0]), s.targets()))
                for s in (problem.retain, problem.forget)
            ])
        if plan is None:
            break
        optimiser.zero_grad()
        weights = (1 - algorithm.mix) * plan.retain, -algorithm.mix * plan.forget
        for samples, stream, weight in zip((problem.retain, problem.forget), streams, weights, strict=True):
            if weight:
                inputs, targets = samples.batch(next(stream))
                (weight * nn.functional.cross_entropy(model(inputs), targets)).backward()
        optimiser.step()
    return model, looks


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    "algorithm",
    [
        GradDiff(lr=0.1, mix=0.3, steps=8, batch_size=5, momentum=0.9),
        GradDiff(lr=0.2, mix=0.3, steps=8, batch_size=6, forget_every=3, weight_decay=0.01),
        FineTune(lr=0.2, steps=5, batch_size=4),
    ],
    ids=["momentum", "forget-every-decay", "fine-tune"],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_run_is_pytorchs_own_in_train_mode(algorithm, momentum):
    model, x, y = trained(momentum)
    problem = problem_of(model, x, y)
    result = run(problem, algorithm, seed=3, check_every=1, stop_on_divergence=False)
    expected, looks = by_torch(model, problem, algorithm, seed=3)
    found, before = result.model.state_dict(), model.state_dict()
    assert not result.model.training
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
        assert not torch.equal(value, before[name])
    seen = [[c.retain_loss, c.forget_loss] for c in result.trajectory]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(looks), rtol=1e-9, atol=1e-11)
    frozen = run(problem_of(model, x, y, "frozen"), algorithm, seed=3, check_every=1, stop_on_divergence=False)
    assert torch.equal(frozen.model.norm.running_mean, model.norm.running_mean)
    assert abs(frozen.trajectory[-1].retain_loss - seen[-1][0]) > 1e-3


def test_the_model_is_left_alone_and_nothing_is_said_of_train_mode():
    model, x, y = trained()
    model.train()
    model.dropout.eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    problem = problem_of(model, x, y)
    statistics = {name: t.clone() for name, t in problem.statistics.items()}
    result = run(problem, GradDiff(lr=0.1, steps=3, batch_size=4))
    network = linearise(problem, Identity(), batch_sizes=(4, 4))
    rollout(network, GradDiff(steps=3, batch_size=4), lr=[0.1], mix=[0.5], batch_sizes=(4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, statistics[name]) for name, value in problem.statistics.items())
    assert sorted(statistics) == sorted(
        f"{layer}.{kind}"
        for layer in ("inner", "norm")
        for kind in ("num_batches_tracked", "running_mean", "running_var")
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert model.norm.training
    assert model.norm.track_running_stats
    assert result.model.norm.training
    assert not result.model.dropout.training


def test_without_batchnorm_there_is_nothing_to_couple():
    model, x, y = MLP(16, 3, hidden=(5,)).double(), *trained()[1:]
    results = []
    for kind in ("batch", "frozen"):
        with pytest.warns(stabkit.UntrainedModelWarning):
            problem = problem_of(model, x, y, kind)
        assert (problem.batchnorm, problem.statistics) == ("frozen", {})
        algorithm = GradDiff(lr=0.1, steps=3, batch_size=4, sampling="poisson")
        results.append(run(problem, algorithm, stop_on_divergence=False))
    assert results[0].trajectory == results[1].trajectory


def test_a_resumed_run_is_the_whole_one_with_its_statistics(tmp_path):
    model, x, y = trained()
    problem = problem_of(model, x, y)
    algorithm = GradDiff(lr=0.3, mix=0.6, steps=30, batch_size=5, momentum=0.5)
    settings = {"seed": 1, "check_every": 3, "stop_on_divergence": False}
    whole = run(problem, algorithm, **settings)
    assert whole.diverged
    assert whole.last_good_step > 0

    def interrupt(record):
        if record.step == whole.last_good_step + 2:
            raise KeyboardInterrupt

    file = tmp_path / "run.npz"
    with pytest.raises(KeyboardInterrupt):
        run(problem, algorithm, checkpoint=file, on_step=interrupt, **settings)
    resumed = run(problem, algorithm, checkpoint=file, **settings)
    assert resumed.trajectory == whole.trajectory
    for ours, theirs in ((resumed.model, whole.model), (resumed.last_good_model, whole.last_good_model)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
    good = run(problem, algorithm.replace(steps=whole.last_good_step), **settings).model.state_dict()
    assert all(torch.equal(value, good[name]) for name, value in whole.last_good_model.state_dict().items())
    with pytest.raises(ValueError, match="with batchnorm 'batch', not 'frozen'"):
        run(problem_of(model, x, y, "frozen"), algorithm, checkpoint=file, **settings)


def test_a_hook_is_told_losses_as_the_steps_passes_have_them():
    model, x, y = trained()
    problem = problem_of(model, x, y)
    algorithm = GradDiff(lr=0.1, mix=0.3, steps=1, batch_size=5)
    seen = []
    run(problem, algorithm, on_step=seen.append)
    passed, expected = copy.deepcopy(model).train(), []
    passed.dropout.eval()
    for samples, stream in zip(
        (problem.retain, problem.forget), batch_streams(SIZES, (5, 5), algorithm.sampling, 0), strict=True
    ):
        inputs, targets = samples.batch(next(stream))
        expected.append(float(nn.functional.cross_entropy(passed(inputs), targets).detach()))
    assert [seen[0].retain_loss, seen[0].forget_loss] == pytest.approx(expected)


def test_leakage_is_of_the_network_in_eval_mode():
    model, x, y = trained()
    problem = problem_of(model, x, y)
    inputs, _ = problem.forget.batch(torch.arange(SIZES[1]))
    free = AGU(lr=0.2, mix=0.3, batch_size=10, forget_batch_size=SIZES[1], drift_tolerance=None)
    before, leaked = model(inputs).detach().log_softmax(1), []
    for steps in range(1, 8):
        now = run(problem, free.replace(steps=steps), stop_on_divergence=False).model.eval()(inputs).log_softmax(1)
        leaked.append(float((before.exp() * (before - now.detach())).sum(1).mean()))
    place = max(range(7), key=lambda k: leaked[k])
    assert place > 0
    earlier = max(leaked[:place])
    bound = (earlier + leaked[place]) / 2
    result = run(problem, free.replace(steps=20, leakage_bound=bound), stop_on_divergence=False)
    assert (result.stop_reason, result.steps) == ("leakage", place + 2)


# ------------------------------------------------------------------ linearisations


def dense(model, x, chosen):
    """Outputs and Jacobian (m, O, d) of batches passed in train mode, output by output."""
    outputs, rows = [], []
    for batch in chosen:
        passed = copy.deepcopy(model).train()
        passed.dropout.eval()
        f = passed(x[batch])
        outputs.append(f.detach())
        for value in f.flatten():
            gradients = torch.autograd.grad(value, list(passed.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.cat(outputs), torch.stack(rows).view(sum(map(len, chosen)), 3, -1)


def test_products_are_those_of_whole_batches():
    model, x, y = trained()
    problem = problem_of(model, x, y)
    order = torch.randperm(SIZES[0], generator=torch.Generator().manual_seed(2))[:11]
    outputs, jacobian = dense(model, x, order.split([5, 6]))
    g = torch.Generator().manual_seed(3)
    p = torch.rand(problem.size, generator=g, dtype=torch.float64) + 0.5
    block = torch.randn(problem.size, 4, generator=g, dtype=torch.float64)
    cotangents = torch.randn(11, 3, 4, generator=g, dtype=torch.float64)
    found = ScaledJacobian(problem, problem.retain, order, Diagonal(p), coupled=5)
    assert not found.by_rows(1000)
    assert found.passes(4) == 4
    torch.testing.assert_close(found.outputs(), outputs)
    root = p.sqrt()
    torch.testing.assert_close(found @ block, jacobian @ (root[:, None] * block))
    pulled = root[:, None] * torch.einsum("mod,mok->dk", jacobian, cotangents)
    torch.testing.assert_close(found.transpose_matmul(cotangents), pulled)
    alone = ScaledJacobian(problem, problem.retain, order, Diagonal(p))
    assert float((alone @ block - found @ block).norm()) > 0.1 * float((found @ block).norm())
    torch.testing.assert_close(alone.outputs(), problem.evaluate(problem.retain, indices=order)[0])


@pytest.mark.parametrize("sizes", [(6, 4), None])
def test_linearisations_are_of_whole_batches(sizes):
    model, x, y = trained()
    problem = problem_of(model, x, y)
    settings = {"rank": 10_000, "retain_samples": 13, "forget_samples": 100, "batch_sizes": sizes}
    network = linearise(problem, Identity(), **settings)
    held = (12, 12) if sizes else SIZES  # whole batches; without sizes, batches of 64 are the sets
    assert (network.retain.samples, network.forget.samples) == held
    for part, samples, size, offset in (
        (network.retain, problem.retain, (sizes or SIZES)[0], 0),
        (network.forget, problem.forget, (sizes or SIZES)[1], SIZES[0]),
    ):
        assert part.coupled == size
        assert part.indices.unique().numel() == part.samples
        assert not torch.equal(part.indices, part.indices.sort().values)
        outputs, jacobian = dense(model, x, (part.indices + offset).split(size))
        torch.testing.assert_close(part.outputs, outputs)
        torch.testing.assert_close(part.features, jacobian @ network.basis, atol=1e-8, rtol=1e-6)
        evaluated, targets, _ = problem.evaluate(samples, indices=part.indices)
        assert torch.equal(part.original, evaluated)
        assert torch.equal(part.targets, targets)
    assert network.captured == pytest.approx(1.0)
    assert float(ritz_residuals(problem, network).max()) < 1e-10


@pytest.mark.parametrize("asked", [None, 1, 9])
def test_directions_are_drawn_from_whole_batches_and_that_is_what_is_told(asked):
    model, x, y = trained()
    problem = problem_of(model, x, y)
    settings = {"rank": 2, "retain_samples": 15, "forget_samples": 8, "sketch_samples": asked}
    network = linearise(problem, Identity(), batch_sizes=(5, 4), **settings)
    outputs = network.retain.features.shape[1]
    told = linearisation_cost((15, 8), SIZES, outputs, 2, sketch_samples=asked, batch_sizes=(5, 4))
    assert network.gradient_equivalents == pytest.approx(told)
    part = network.retain
    _, jacobian = dense(model, x, part.indices.split(5))
    torch.testing.assert_close(part.features, jacobian @ network.basis, atol=1e-8, rtol=1e-6)


def test_a_resumed_linearisation_is_the_whole_one(tmp_path, monkeypatch):
    model, x, y = trained()
    problem = problem_of(model, x, y)
    settings = {"rank": 6, "batch_sizes": (5, 4), "checkpoint_every": 1}
    whole = linearise(problem, Identity(), **settings)
    file, passes = tmp_path / "linearisation.npz", itertools.count()
    push = jacobian_module.jvp_block

    def killed(*arguments, **options):
        if next(passes) == 2:
            raise KeyboardInterrupt
        return push(*arguments, **options)

    monkeypatch.setattr(jacobian_module, "jvp_block", killed)
    with pytest.raises(KeyboardInterrupt):
        linearise(problem, Identity(), checkpoint=file, **settings)
    resumed = linearise(problem, Identity(), checkpoint=file, **settings)
    assert torch.equal(resumed.basis, whole.basis)
    assert torch.equal(resumed.retain.features, whole.retain.features)
    with pytest.raises(ValueError, match=r"with batch_sizes \[5, 4\], not \[4, 4\]"):
        linearise(problem, Identity(), checkpoint=file, **{**settings, "batch_sizes": (4, 4)})


def test_out_of_memory_takes_fewer_vectors_and_leaves_batches_whole(monkeypatch):
    model, x, y = trained()
    problem = problem_of(model, x, y)
    jacobian = ScaledJacobian(problem, problem.retain, torch.arange(12), Identity(), coupled=6)
    block = torch.randn(problem.size, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = jacobian @ block
    push = jacobian_module.jvp_block
    room = 3

    def small(problem, inputs, block, *, at_once, **options):
        if at_once > room:
            raise torch.OutOfMemoryError("x")
        assert len(inputs) == 6
        return push(problem, inputs, block, at_once=at_once, **options)

    monkeypatch.setattr(jacobian_module, "jvp_block", small)
    with pytest.warns(stabkit.MemoryWarning) as caught:
        found = jacobian @ block
    said = "out of memory: products with the Jacobian go on with {} vectors at a time"
    assert [str(w.message)[: len(said) - 1] for w in caught] == [said.format(4), said.format(2)]
    torch.testing.assert_close(found, expected)
    room = 0
    again = ScaledJacobian(problem, problem.retain, torch.arange(12), Identity(), memory=1, coupled=6)
    with pytest.raises(MemoryError, match=r"a product of 8 vectors .* with one vector and 6 samples at a time"):
        again @ block


# ------------------------------------------------------------------ rollouts


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_small_steps_are_the_real_ones_to_first_order(loss):
    """Whole retain sets whose statistics the running ones are, and these one step behind: momentum 1.

    What the rollout then leaves out is of second order, that step, and of order 1/n, n being 400: running variances are
    unbiased ones.
    """
    copies = 20
    model, x, y = trained(loss=loss)
    n = SIZES[0]
    forget, retain = (x[n:], y[n:]), (torch.cat([x[:n]] * copies), torch.cat([y[:n]] * copies))
    model.train().dropout.eval()
    model.norm.momentum = model.inner.momentum = 1.0
    model(retain[0])
    problem = UnlearningProblem(model.eval(), forget, retain, loss=loss, batchnorm="batch")
    algorithm = FineTune(lr=1e-6, steps=30, batch_size=n * copies)
    real = run(problem, algorithm, check_every=1)
    sizes = algorithm.batch_sizes(problem)
    network = linearise(problem, Identity(), rank=10_000, retain_samples=None, forget_samples=None, batch_sizes=sizes)
    rolled = rollout(network, algorithm, lr=[algorithm.lr], mix=[0.0], batch_sizes=sizes, seeds=[0], check_every=1)
    c = rolled.coordinates[0, 0]
    moved = torch.cat([p.detach().flatten() for p in real.model.parameters()]) - problem.vector()
    assert float((network.displacement(c) - moved).norm()) < 1e-4 * float(moved.norm())
    assert float(rolled.retain_loss[0, 0, 0]) == pytest.approx(real.trajectory[0].retain_loss, rel=1e-12)
    change = real.trajectory[-1].retain_loss - real.trajectory[0].retain_loss
    assert float(rolled.retain_loss[0, 0, -1] - rolled.retain_loss[0, 0, 0]) == pytest.approx(change, rel=5e-3)
    # With statistics held fixed the loss would change otherwise.
    part = network.retain
    still = ScaledJacobian(problem, problem.retain, part.indices, Identity()) @ network.basis
    outputs = part.original + still @ c
    fixed = float(problem.loss.per_sample(outputs, part.targets).mean()) - real.trajectory[0].retain_loss
    assert abs(fixed / change - 1) > 1e-2


def test_what_algorithms_compare_with_is_the_network_in_eval_mode():
    """SCRUB's teacher is the original network in eval mode, in a run and in its rollout."""
    model, x, y = trained()
    problem = problem_of(model, x, y)
    algorithm = SCRUB(lr=1e-4, steps=1, batch_size=SIZES[0], weight_decay=0.0)
    sizes = algorithm.batch_sizes(problem)
    real = run(problem, algorithm)
    network = linearise(problem, Identity(), rank=10_000, retain_samples=None, forget_samples=None, batch_sizes=sizes)
    rolled = rollout(network, algorithm, lr=[1e-4], mix=[algorithm.mix], batch_sizes=sizes, seeds=[0])
    moved = torch.cat([p.detach().flatten() for p in real.model.parameters()]) - problem.vector()
    found = network.displacement(rolled.coordinates[0, 0])
    assert float((found - moved).norm()) < 1e-6 * float(moved.norm())


# ------------------------------------------------------------------ what cannot be


def test_batches_without_variance_are_refused():
    model, x, y = trained()
    problem = problem_of(model, x, y)
    with pytest.raises(ValueError, match=r"batches of `GradDiff` must hold at least two samples .*; got 1"):
        run(problem, GradDiff(batch_size=4, forget_batch_size=1))
    assert run(problem, FineTune(batch_size=4, forget_batch_size=1, steps=1, lr=1e-3)).steps == 1
    with pytest.raises(ValueError, match=r"`sampling` of `GradDiff` must .* with batchnorm='batch'; got 'poisson'"):
        run(problem, GradDiff(batch_size=4, sampling="poisson"))
    with pytest.raises(ValueError, match="`batch_sizes` of `linearise` must be a whole number >= 2; got 1"):
        linearise(problem, Identity(), batch_sizes=(4, 1))
    with pytest.raises(ValueError, match=r"`forget` must hold at least two samples with batchnorm='batch'; got 1"):
        UnlearningProblem(model, (x[:1], y[:1]), (x[1:], y[1:]), batchnorm="batch")


# ------------------------------------------------------------------ the whole way


def test_a_train_mode_prediction_is_of_the_runs_own_batches(random_deletion):
    """Near θ* the linearised coupled outputs are right, the batch size is the run's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))
    forget, retain = random_deletion
    model = train(model, *retain, epochs=4, lr=0.01, seed=0)
    settings = {"steps": 10, "seeds": 1, "rank": 60, "retain_samples": 128, "forget_samples": 64, "batchnorm": "batch"}
    report = stabkit.predict(model, forget, retain, lr=1e-4, mix=0.3, batch_size=32, **settings)
    assert report.run.batchnorm == "batch"
    assert report.linearisation_error < 0.2
    other = report.at(batch_size=16)
    assert {c.stage: c.gradient_equivalents for c in other.costs}["linearisation"] > 0  # other batches, other features
    assert not {"batch size"} & {item.remedy for item in report.recommend().items}
    thorough = stabkit.predict(model, forget, retain, lr=1e-4, mix=0.3, batch_size=32, mode="thorough", **settings)
    assert thorough.run.batchnorm == "batch"
    assert thorough.calibration.kind == "staged"


@pytest.mark.parametrize("momentum", [0.1, None])  # of the running statistics; None: their plain average
def test_a_train_mode_run_is_staged_with_its_own_statistics(random_deletion, momentum):
    """Which are those of the real run, as all of its steps are."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24, momentum=momentum), nn.ReLU(), nn.Linear(24, 10)
    forget, retain = random_deletion
    model = train(nn.Sequential(*layers), *retain, epochs=4, lr=0.01, seed=0)
    problem = UnlearningProblem(model, forget, retain, batchnorm="batch", dtype=torch.float64)
    algorithm = stabkit.GradDiff(batch_size=16, lr=0.05, mix=0.3, steps=9, momentum=0.5)
    network = linearise(problem, Identity(), rank=40, retain_samples=64, forget_samples=64, batch_sizes=(16, 16))
    options = {"batch_sizes": (16, 16), "seeds": [4]}
    for lr in (0.05, 1e-6):  # where the linearised network is wrong, and where it is right
        chosen = algorithm.replace(lr=lr)
        found = staged_rollout(problem, network, chosen, **options)
        assert found.handovers[0].step == 0
        assert found.real_steps == 9
        real = run(problem, chosen, seed=4, monitor_samples=None)
        parameters = {name: p.detach().double() for name, p in real.model.named_parameters()}
        buffers = {name: b for name, b in real.model.named_buffers() if name in problem.statistics}
        truth = problem.evaluate(problem.retain, {**parameters, **buffers}, network.retain.indices)[2].mean()
        assert float(found.rollout.retain_loss[0, 0, -1]) == pytest.approx(float(truth), rel=1e-9)
    still = problem.evaluate(problem.retain, None, network.retain.indices)[2].mean()
    assert abs(float(still - truth)) > 0.005 * float(truth)  # the statistics alone have moved it
    with pytest.raises(
        ValueError, match="`sampling` of `GradDiff` must give batches of one size with batchnorm='batch'"
    ):
        staged_rollout(problem, network, algorithm.replace(sampling="poisson"), **options)
