"""A problem reads the caller's model without touching it, checks it once, and names what is wrong."""

import copy
import math
import random
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.data import DataLoader, Subset, TensorDataset

import stabkit
from stabkit._errors import TrainModeWarning, UntrainedModelWarning
from stabkit.algorithms import AGU, FineTune, GradDiff
from stabkit.models import MLP
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from tests.cases import CASES, Output, ResidualBlockNet, mean_loss

untrained = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
INF, NAN = float("inf"), float("nan")


def data(n=12, features=4, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=g), torch.randint(0, classes, (n,), generator=g)


X, Y = data()
FORGET, RETAIN = (X[:4], Y[:4]), (X[4:], Y[4:])


def model_and_sets(**kwargs):
    return MLP(4, 3, hidden=(5,), **kwargs), FORGET, RETAIN


def with_value(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[1] = value
    return changed


# ------------------------------------------------------------------ nothing of the caller's is touched


class Nosy(nn.Module):
    """BatchNorm and Dropout in one of two modes, a frozen layer, a buffer and a tied weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.alias = self.head
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x):
        return self.head(self.drop(self.second(torch.relu(self.norm(self.first(x)))))) * self.scale


def nosy():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Nosy()
    model.second.requires_grad_(False)
    model.norm.running_mean.fill_(0.1)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def snapshot(model):
    """Everything a caller could notice, with the identity of the tensors themselves."""
    return {
        "state": {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "grad": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules(remove_duplicate=False)},
        "hooks": [
            (list(m._forward_hooks.items()), list(m._forward_pre_hooks.items()), list(m._backward_hooks.items()))
            for m in model.modules()
        ],
        "rng": rng_states(),
    }


def rng_states():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), random.getstate(), numpy[1].copy(), numpy[2:]


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        np.testing.assert_array_equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


@untrained
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("algorithm", [GradDiff(steps=3, batch_size=2), AGU(steps=3, batch_size=2), FineTune(steps=3)])
@pytest.mark.filterwarnings("ignore::stabkit.TrainModeWarning")
def test_the_model_and_the_random_state_are_left_alone(training, algorithm):
    model = nosy().train(training)
    model.second.eval()
    model.second.register_forward_hook(lambda module, arguments, output: output + 0.0)
    model.head.register_full_backward_hook(lambda module, inputs, outputs: None)
    loader = DataLoader(TensorDataset(*RETAIN), batch_size=3, shuffle=True)
    before = snapshot(model)
    problem = UnlearningProblem(model, FORGET, loader)
    assert_same(snapshot(model), before)
    result = run(problem, algorithm.replace(batch_size=2), stop_on_divergence=False)
    assert_same(snapshot(model), before)
    new = result.model
    assert new is not model
    assert {t.data_ptr() for t in new.state_dict().values()}.isdisjoint(
        t.data_ptr() for t in model.state_dict().values()
    )
    assert {n: m.training for n, m in new.named_modules()} == {n: m.training for n, m in model.named_modules()}
    assert {n: p.requires_grad for n, p in new.named_parameters()} == before["requires_grad"]
    assert all(p.grad is None for p in new.parameters())
    for name, value in new.state_dict().items():
        moved = not torch.equal(value, model.state_dict()[name])
        assert moved == name.startswith(("first", "norm.weight", "norm.bias", "head", "alias")), name


@untrained
def test_the_data_are_left_alone():
    x, y = X.clone(), Y.clone()
    versions = x._version, y._version
    run(UnlearningProblem(MLP(4, 3), (x[:4], y[:4]), (x[4:], y[4:])), GradDiff(steps=2, batch_size=2))
    assert (x._version, y._version) == versions
    torch.testing.assert_close((x, y), (X, Y), rtol=0, atol=0)


@untrained
def test_layers_that_work_in_place_do_not_reach_the_data():
    x = X.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    problem = UnlearningProblem(model, (x[:4], Y[:4]), (x[4:], Y[4:]))
    run(problem, AGU(steps=2, batch_size=8, forget_batch_size=4), stop_on_divergence=False)
    assert torch.equal(x, X)


@untrained
def test_a_layer_used_twice_is_one_layer():
    """`functional_call` leaves its own tensors behind in such a layer unless told where each one lives."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3))
    problem = UnlearningProblem(model, FORGET, RETAIN)
    assert list(problem.parameters) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    run(problem, AGU(lr=0.5, steps=2, batch_size=2), stop_on_divergence=False)
    copied = problem.new_model()
    assert copied[0] is copied[2]
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in copied.parameters())
    assert torch.equal(copied[2].weight, layer.weight)
    moved = problem.unflatten(problem.vector() + 0.1)
    with torch.no_grad():
        torch.testing.assert_close(problem.new_model(moved)(X), problem.outputs(moved, X))


@untrained
def test_the_random_state_survives_an_error():
    before = rng_states()
    with pytest.raises(ValueError, match="`forget` must give the same sample"):
        UnlearningProblem(MLP(4, 3), Noisy(), RETAIN)
    assert_same(rng_states(), before)


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.randn(4) + np.random.rand() + random.random(), 0  # noqa: NPY002


# ------------------------------------------------------------------ the network as a function


@untrained
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_losses_are_those_of_the_model_itself(case):
    problem = case.problem()
    vector = problem.vector()
    assert vector.shape == (problem.size,)
    torch.testing.assert_close(problem.flatten(problem.unflatten(vector)), vector, rtol=0, atol=0)
    for which, expected in (("retain", problem.retain_loss), ("forget", problem.forget_loss)):
        assert float(mean_loss(problem, which)(vector)) == pytest.approx(expected, rel=1e-12)
    moved = problem.unflatten(vector + 0.01)
    model = problem.new_model(moved)
    inputs, _ = problem.forget.batch(torch.arange(3))
    with torch.no_grad():
        raw = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    torch.testing.assert_close(getattr(raw, "logits", raw), problem.outputs(moved, inputs))
    torch.testing.assert_close(problem.vector(), vector, rtol=0, atol=0)


@untrained
def test_every_form_of_data_gives_the_same_losses():
    model = MLP(4, 3, hidden=(5,))
    whole = TensorDataset(X, Y)
    forms = [
        (FORGET, RETAIN),
        (Subset(whole, range(4)), Subset(whole, range(4, 12))),
        (DataLoader(Subset(whole, range(4)), batch_size=3), DataLoader(Subset(whole, range(4, 12)), shuffle=True)),
        ([FORGET], [(X[4:7], Y[4:7]), (X[7:], Y[7:])]),
        ((b for b in [FORGET]), ((X[i : i + 2], Y[i : i + 2]) for i in range(4, 12, 2))),
        (({"input": X[:4]}, Y[:4]), {"input": X[4:], "labels": Y[4:]}),
    ]
    problems = [UnlearningProblem(model, forget, retain) for forget, retain in forms]
    losses = [(p.forget_loss, p.retain_loss, p.divergence_level) for p in problems]
    assert losses == [losses[0]] * len(forms)
    with torch.no_grad():
        truth = [float(nn.functional.cross_entropy(model(x), y)) for x, y in (FORGET, RETAIN)]
    assert losses[0][:2] == pytest.approx(truth, rel=1e-6)


@untrained
def test_evaluation_of_chosen_samples_and_in_several_batches(monkeypatch):
    problem = UnlearningProblem(*model_and_sets())
    chosen = torch.tensor([5, 0, 2])
    outputs, targets, losses = problem.evaluate(problem.retain, indices=chosen)
    everything = problem.evaluate(problem.retain)
    monkeypatch.setattr("stabkit.problem.problem.EVALUATION_BATCH", 3)
    for part, all_at_once, in_batches in zip(
        (outputs, targets, losses), everything, problem.evaluate(problem.retain), strict=True
    ):
        torch.testing.assert_close(part, all_at_once[chosen])
        torch.testing.assert_close(in_batches, all_at_once)
        assert not part.requires_grad


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale):
        return {"logits": self.linear(x) * scale, "loss": None}


@untrained
def test_several_inputs_and_a_dict_of_outputs():
    model, scale = TwoInputs(), torch.rand(12, 1) + 0.5
    problem = UnlearningProblem(model, ((X[:4], scale[:4]), Y[:4]), ((X[4:], scale[4:]), Y[4:]))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(X[4:], scale[4:])["logits"], Y[4:])
    assert problem.retain_loss == pytest.approx(float(expected), rel=1e-6)


@untrained
def test_precision_and_frozen_layers():
    model = MLP(4, 3, hidden=(5,))
    model[1].weight.requires_grad_(False)
    problem = UnlearningProblem(model, FORGET, RETAIN, dtype=torch.float64)
    assert problem.size == sum(p.numel() for p in model.parameters()) - 20
    assert problem.vector().dtype == torch.float64
    assert problem.evaluate(problem.forget)[0].dtype == torch.float64
    assert set(problem.parameters) == {"1.bias", "3.weight", "3.bias"}
    assert problem.layer_of() == {"1.bias": "1", "3.weight": "3", "3.bias": "3"}
    with pytest.warns(stabkit.PrecisionWarning):
        half = UnlearningProblem(copy.deepcopy(model).bfloat16(), FORGET, RETAIN)
    assert half.dtype == torch.float32
    assert model[1].weight.dtype == torch.float32


@untrained
def test_a_test_set_is_read_like_the_others():
    problem = UnlearningProblem(*model_and_sets(), test=(X, Y))
    assert (problem.test.name, problem.test.size) == ("test", 12)
    with pytest.raises(ValueError, match=r"inputs of `test` must be finite; got 1 NaN"):
        problem.read((with_value(X, NAN), Y), name="test")
    with pytest.raises(ValueError, match=r"targets of `test` must be in \[0, 2\].*got 7"):
        problem.read((X, with_value(Y, 7)), name="test")


@untrained
def test_the_problem_at_other_parameters():
    model = MLP(4, 3, hidden=(5,))
    problem = UnlearningProblem(model, FORGET, RETAIN)
    before, losses = problem.vector().clone(), (problem.forget_loss, problem.retain_loss)
    vector = before + 0.1
    moved = problem.at(vector)
    torch.testing.assert_close(moved.vector(), vector, rtol=0, atol=0)
    torch.testing.assert_close(problem.vector(), before, rtol=0, atol=0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
        expected = other(X[4:])
        torch.testing.assert_close(moved.outputs({}, X[4:]), expected)
        torch.testing.assert_close(moved.new_model()(X[4:]), expected)
        torch.testing.assert_close(moved.evaluate(moved.retain)[0], expected)
        torch.testing.assert_close(problem.new_model()(X), model(X), rtol=0, atol=0)
    assert (moved.forget_loss, moved.retain_loss) == losses
    assert (moved.forget, moved.divergence_level) == (problem.forget, problem.divergence_level)
    half = problem.at(vector.double().requires_grad_())
    assert (half.vector().dtype, half.vector().requires_grad) == (torch.float32, False)
    with pytest.raises(ValueError, match=r"`vector` of `UnlearningProblem.at` must be of shape \(43,\); got \(42,\)"):
        problem.at(vector[1:])


@untrained
def test_another_models_outputs_are_its_own():
    problem = UnlearningProblem(*model_and_sets())
    other = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 2)).double()
    before = snapshot(other)
    said = problem.outputs_of(other, X)
    assert_same(snapshot(other), before)
    with torch.no_grad():
        torch.testing.assert_close(said, copy.deepcopy(other).eval()(X.double()).float())


# ------------------------------------------------------------------ wrapped models


def wrappers():
    """One network in each of the wrappers that PyTorch has."""
    yield "compiled", torch.compile, {}
    yield "compiled inside", lambda m: nn.Sequential(torch.compile(m[0]), *m[1:]), {}
    yield "compiled in place", lambda m: m.compile() or m, {}
    yield "data parallel", nn.DataParallel, {}
    yield "data parallel, then compiled", lambda m: torch.compile(nn.DataParallel(m)), {}
    yield "data parallel inside", lambda m: nn.Sequential(nn.DataParallel(m[0]), *m[1:]), {}
    yield "distributed", nn.parallel.DistributedDataParallel, {}


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@untrained
@pytest.mark.parametrize("wrap", [wrap for _, wrap, _ in wrappers()], ids=[name for name, _, _ in wrappers()])
def test_wrappers_are_taken_off(wrap, one_process):
    """Compiled code has no second derivative, and the stateless call refuses the parallel ones."""
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plain = UnlearningProblem(inner, FORGET, RETAIN)
    model = wrap(copy.deepcopy(inner)).train()
    before = snapshot(model)
    problem = UnlearningProblem(model, FORGET, RETAIN)
    assert_same(snapshot(model), before)
    assert (problem.model_name, list(problem.parameters)) == ("Sequential", list(plain.parameters))
    torch.testing.assert_close(problem.vector(), plain.vector(), rtol=0, atol=0)
    hessians = [
        torch.autograd.functional.hessian(
            lambda v, p=p: p.loss.per_sample(p.outputs(p.unflatten(v), X), Y).mean(), p.vector()
        )
        for p in (problem, plain)
    ]
    torch.testing.assert_close(*hessians)
    copied = problem.new_model()
    assert {name: type(m) for name, m in copied.named_modules()} == {n: type(m) for n, m in inner.named_modules()}
    assert all(m.training for m in copied.modules())


@untrained
def test_parametrised_weights_are_read_through():
    model = MLP(4, 3, hidden=(5,))
    parametrizations.weight_norm(model[1])
    parametrizations.spectral_norm(model[3])
    problem = UnlearningProblem(model.eval(), FORGET, RETAIN)
    moved = problem.unflatten(problem.vector() + 0.1)
    with torch.no_grad():
        torch.testing.assert_close(problem.new_model(moved)(X), problem.outputs(moved, X))
        assert not torch.allclose(problem.outputs(moved, X), model(X))


# ------------------------------------------------------------------ modes


@untrained
def test_batchnorm_in_train_mode_is_frozen_and_said():
    model = ResidualBlockNet().train()
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(TrainModeWarning, match=r"BatchNorm layer 'norm' is in train mode.*batchnorm='frozen'") as record:
        problem = UnlearningProblem(model, (x[:3], Y[:3]), (x[3:], Y[3:8]))
    assert record[0].filename == __file__
    assert model.training
    assert model.norm.training
    with torch.no_grad():
        frozen = nn.functional.cross_entropy(copy.deepcopy(model).eval()(x[3:]), Y[3:8])
    assert problem.retain_loss == pytest.approx(float(frozen), rel=1e-5)
    result = run(problem, GradDiff(steps=3, batch_size=2), stop_on_divergence=False)
    for name, buffer in result.model.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name])
    assert result.model.norm.training


@untrained
def test_dropout_in_train_mode_is_switched_off_and_said():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Dropout(0.2), nn.Linear(5, 3))
    with pytest.warns(TrainModeWarning, match=r"Dropout layer '1' and 1 more are in train mode.*switch dropout off"):
        problem = UnlearningProblem(model, FORGET, RETAIN)
    assert model[1].training
    assert torch.equal(problem.evaluate(problem.retain)[0], problem.evaluate(problem.retain)[0])


class Aside(nn.Module):
    """Another shape of outputs in train mode, as of auxiliary heads."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.cat([self.layer(x)] * (1 + self.training), 1)


class Dropping(nn.Module):
    """Dropout by a function, which no layer tells of."""

    def __init__(self, p):
        super().__init__()
        self.p, self.first, self.norm, self.second = p, nn.Linear(4, 20), nn.BatchNorm1d(20), nn.Linear(20, 3)

    def forward(self, x):
        hidden = nn.functional.dropout(torch.relu(self.norm(self.first(x))), self.p, self.training)
        return self.second(hidden)


@untrained
def test_dropout_that_is_no_layer_is_said_too():
    model = Dropping(0.5).train()
    before = snapshot(model)
    with pytest.warns(TrainModeWarning) as record:
        UnlearningProblem(model, FORGET, RETAIN)
    assert_same(snapshot(model), before)
    assert [str(w.message).split()[0] for w in record if w.category is TrainModeWarning] == ["BatchNorm", "`model`"]
    assert record[-1].filename == __file__
    normalising = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten())
    with pytest.warns(TrainModeWarning, match=r"`model` is in train mode, in which its outputs are off by"):
        UnlearningProblem(nn.Sequential(normalising, nn.Linear(4, 3)).train(), FORGET, RETAIN)
    with pytest.warns(TrainModeWarning, match=r"in which its outputs are others"):
        UnlearningProblem(Aside().train(), FORGET, RETAIN)
    silent = Dropping(0.5)
    for parameter in silent.second.parameters():
        nn.init.zeros_(parameter)
    silent.norm.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainModeWarning)
        UnlearningProblem(silent, FORGET, RETAIN)  # outputs of 0 in either mode
        UnlearningProblem(Dropping(0.5).eval(), FORGET, RETAIN)
        UnlearningProblem(Dropping(0.0).train(), FORGET, RETAIN, batchnorm="batch")


@untrained
def test_only_normalisations_in_train_mode_follow_batches():
    """A backbone whose BatchNorm layers are held in eval mode, below one that is trained, step for step as in torch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
    )
    model = model.double()
    model[1].running_mean.fill_(0.3)
    mine = copy.deepcopy(model).train()
    mine[1].eval()
    sets = [(x.double(), y) for x, y in (FORGET, RETAIN)]
    problem = UnlearningProblem(mine, *sets, batchnorm="batch")
    assert set(problem.statistics) == {"4.running_mean", "4.running_var", "4.num_batches_tracked"}
    algorithm = GradDiff(lr=0.1, mix=0.3, steps=3, batch_size=8, forget_batch_size=4)
    found = run(problem, algorithm, stop_on_divergence=False).model
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        retain, forget = (nn.functional.cross_entropy(mine(x), y) for x, y in (sets[1], sets[0]))
        (0.7 * retain - 0.3 * forget).backward()
        optimizer.step()
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert not found[1].training
    every = UnlearningProblem(model.eval(), *sets, batchnorm="batch")
    assert len(every.statistics) == 6


@untrained
def test_parameters_in_fewer_bits_are_said():
    model = MLP(4, 3, hidden=(5,)).bfloat16()
    with pytest.warns(stabkit.PrecisionWarning, match=r"in torch\.bfloat16, and .* compute in torch\.float32"):
        problem = UnlearningProblem(model, FORGET, RETAIN)
    assert problem.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error", stabkit.PrecisionWarning)
        UnlearningProblem(model, FORGET, RETAIN, dtype=torch.float32)
        UnlearningProblem(MLP(4, 3, hidden=(5,)).double(), FORGET, RETAIN)


@untrained
def test_modes_that_change_nothing_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainModeWarning)
        UnlearningProblem(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)).train(), FORGET, RETAIN)
        UnlearningProblem(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).eval(), FORGET, RETAIN)


def test_an_untrained_model_is_told():
    model, forget, retain = model_and_sets()
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([5.0, 0, 0]))
    with pytest.warns(UntrainedModelWarning) as record:
        problem = UnlearningProblem(model, forget, retain)
    message = str(record[0].message)
    assert f"retain loss {problem.retain_loss:.4g}" in message
    assert f"({problem.divergence_level:.4g})" in message
    assert record[0].filename == __file__


def test_a_trained_model_is_read_without_warning(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    assert problem.retain_loss < 0.5 < 2.2 < problem.divergence_level < np.log(10)


# ------------------------------------------------------------------ errors


def build(model=None, forget=FORGET, retain=RETAIN, **kwargs):
    return UnlearningProblem(model or MLP(4, 3, hidden=(5,)), forget, retain, **kwargs)


class Returns(nn.Module):
    """A linear model whose outputs go through a function."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def broken(value, where="weight"):
    model = MLP(4, 3, hidden=(5,))
    with torch.no_grad():
        getattr(model[1], where)[0] = value
    return model


class Casting(nn.Module):
    """A model that scales whole-numbered pixels itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x / 255)


def with_hook(function):
    model = MLP(4, 3, hidden=(5,))
    function(model[1])
    return model


def locked():
    """It holds what no copy can be made of."""
    model = Returns(lambda f: f)
    model.lock = threading.Lock()
    return model


PIXELS = (torch.arange(48).reshape(12, 4) * 5).to(torch.uint8)


def broken_buffer():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    model[1].running_var[2] = NAN
    return model


class Masked(nn.Module):
    """Attention over four positions, with the usual additive mask in a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 3)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

    def forward(self, x):
        seen = torch.softmax(self.mask.to(x) + x.unsqueeze(1), 2) @ x.unsqueeze(2)
        return self.inner(seen[:, -1])


@untrained
def test_a_mask_may_be_infinite():
    """Trained or frozen weights may not."""
    problem = UnlearningProblem(Masked(), (X[:4], Y[:4]), (X[4:], Y[4:]))
    assert math.isfinite(problem.retain_loss)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False).weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"must have finite weights; '0.weight' holds NaN or infinity"):
        UnlearningProblem(model, (X[:4], Y[:4]), (X[4:], Y[4:]))


FROZEN = MLP(4, 3).requires_grad_(False)
SHARED = TensorDataset(X, Y)


@untrained
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": lambda x: x}, TypeError, "`model` of `UnlearningProblem` must be a torch.nn.Module; got function"),
        (
            {"model": FROZEN.state_dict()},
            TypeError,
            "got OrderedDict. Load a state_dict, or a file of one, into a network",
        ),
        ({"model": SimpleNamespace(model=FROZEN)}, TypeError, "got SimpleNamespace. Its `.model` is one"),
        ({"forget": (X[:4], X[:4], Y[:4])}, TypeError, r"several inputs as \(\(x, z\), y\)"),
        ({"model": FROZEN}, ValueError, "must have a trainable parameter; got none with requires_grad=True"),
        (
            {"batchnorm": "train"},
            ValueError,
            "`batchnorm` of `UnlearningProblem` must be one of 'batch', 'frozen'; got 'train'",
        ),
        ({"forget": (X[:0], Y[:0])}, ValueError, "`forget` must hold at least one sample; got an empty set"),
        ({"retain": []}, ValueError, "`retain` must hold at least one sample; got an empty set"),
        ({"forget": RETAIN}, ValueError, "`forget` and `retain` must not overlap; they share 8 samples"),
        ({"forget": (X[:6], Y[:6])}, ValueError, "they share 2 samples"),
        ({"forget": SHARED, "retain": SHARED}, ValueError, "they share 12 samples"),
        ({"forget": Subset(SHARED, [0, 1, 5]), "retain": Subset(SHARED, [5, 6])}, ValueError, "they share 1 samples"),
        (
            {"forget": Subset(Subset(SHARED, [9, 8, 7]), [0, 2]), "retain": DataLoader(Subset(SHARED, [7, 9, 3]))},
            ValueError,
            "they share 2 samples",
        ),
        ({"model": broken(NAN)}, ValueError, "must have finite weights; '1.weight' holds NaN or infinity"),
        ({"model": broken(-INF, "bias")}, ValueError, "'1.bias' holds NaN or infinity"),
        ({"model": broken_buffer()}, ValueError, "'1.running_var' holds NaN"),
        ({"forget": (with_value(X[:4], NAN), Y[:4])}, ValueError, "inputs of `forget` must be finite; got 1 NaN"),
        ({"retain": (X[4:] / 0, Y[4:])}, ValueError, "inputs of `retain` must be finite; got 32 NaN or infinite"),
        (
            {
                "forget": (X[:4], X[:4, :3]),
                "retain": (X[4:], with_value(X[4:, :3].clone(), INF)),
                "loss": "mse",
            },
            ValueError,
            "targets of `retain` must be finite; got 1 NaN",
        ),
        (
            {"retain": (X[4:], with_value(Y[4:], 3))},
            ValueError,
            r"`retain` must be in \[0, 2\], as the model has 3.*3\.",
        ),
        ({"forget": (X[:4], with_value(Y[:4], -1))}, ValueError, r"targets of `forget` must be in \[0, 2\].*got -1"),
        ({"forget": (X[:4], Y[:4].float())}, TypeError, "targets of `forget` must be integer.*got torch.float32"),
        ({"forget": (X[:4], Y[:4] > 0)}, TypeError, "got torch.bool"),
        (
            {"retain": (X[4:], Y[4:, None])},
            ValueError,
            r"got targets of shape \(1,\) for outputs of shape \(3,\) a sample\. Use targets.squeeze",
        ),
        (
            {"retain": (X[4:], torch.full((8,), -100))},
            ValueError,
            "targets of `retain` must hold at least one label; got only -100",
        ),
        ({"loss": "mse"}, TypeError, "targets of `forget` must be floating point for loss='mse'; got torch.int64"),
        (
            {"forget": (X[:4], X[:4]), "loss": "mse"},
            ValueError,
            r"must have 3 numbers a sample.*got shape \(4, 4\) for outputs \(3, 3\)",
        ),
        ({"loss": "cross_entropie"}, ValueError, "`loss` .* got 'cross_entropie'. Did you mean 'cross_entropy'"),
        ({"loss": 3}, TypeError, "`loss` must be 'cross_entropy'.* got 3"),
        ({"loss": nn.CrossEntropyLoss()}, ValueError, r"shape \(3,\); 'CrossEntropyLoss' returned shape \(\)"),
        ({"loss": lambda f, y: f[:, 0].tolist()}, TypeError, "'<lambda>' returned list"),
        (
            {"loss": lambda f, y: f[:, 0] / 0},
            ValueError,
            r"losses of `forget` must be finite at the trained parameters; got \[-?inf",
        ),
        (
            {"model": Returns(lambda f: {"out": f, "aux": f})},
            TypeError,
            r"got dict of 'out', 'aux'\. Wrap it in a module",
        ),
        (
            {"forget": iter([])},
            ValueError,
            r"`forget` must hold at least one sample.* An iterator is used up by whoever",
        ),
        ({"model": Returns(lambda f: [f])}, TypeError, "`model` must return a tensor.*got list"),
        ({"model": Returns(lambda f: Output([1]))}, TypeError, "or an object with `.logits`; got Output"),
        (
            {"model": Returns(lambda f: f[:1])},
            ValueError,
            r"one output per sample; got \(1, 3\) for 3 samples of `forget`",
        ),
        ({"model": Returns(lambda f: f.sum())}, ValueError, r"one output per sample; got \(\) for 3 samples"),
        (
            {
                "model": Returns(lambda f: f[:, 0]),
                "forget": (X[:4], X[:4, 0]),
                "retain": (X[4:], X[4:, 0]),
                "loss": "mse",
            },
            ValueError,
            r"a row of outputs per sample; got shape \(3,\) for 3 samples of `forget`",
        ),
        ({"dtype": torch.float16}, ValueError, r"`dtype` .* must be torch.float32 or torch.float64; got torch.float16"),
        ({"dtype": "float32"}, ValueError, "must be torch.float32 or torch.float64; got 'float32'"),
        ({"device": "gpu"}, ValueError, "`device` of `UnlearningProblem` must name a device; got 'gpu'"),
        (
            {"forget": (PIXELS[:4], Y[:4])},
            TypeError,
            r"inputs of `forget` must be floating point .*; got integers from 0 to 55, .* \(RuntimeError: .*Long.* / 255;",
        ),
        (
            {"forget": (X[:4, :3], Y[:4])},
            ValueError,
            r"take the inputs of `forget`; got RuntimeError: .*\(3x3 and 4x5\), for \(3, 3\) torch.float32. Give inputs",
        ),
        (
            {"forget": {"inputs": X[:4], "labels": Y[:4]}},
            TypeError,
            "must take the inputs of `forget`; got TypeError: .*'inputs', for .* It is given inputs by name: leave out",
        ),
        (
            {"retain": TensorDataset(X[4:], Y[4:], torch.arange(8))},
            TypeError,
            r"the inputs of `retain`; got TypeError: .* but 3 were given, .* pass \[\(x, y\) for x, y, _ in data\]",
        ),
        (
            {"model": torch.jit.trace(MLP(4, 3), X)},
            TypeError,
            "must be a Python module; got the model itself of type TopLevelTracedModule, made by torch.jit",
        ),
        (
            {"model": nn.Sequential(nn.Linear(4, 3), torch.jit.trace(nn.ReLU(), X))},
            TypeError,
            "must be a Python module; got layer '1' of type TopLevelTracedModule",
        ),
        (
            {"model": with_hook(weight_norm)},
            TypeError,
            "hold its weights as parameters; got WeightNorm on layer '1', .*torch.nn.utils.parametrizations.weight_norm",
        ),
        (
            {"model": with_hook(spectral_norm)},
            TypeError,
            "got SpectralNorm on layer '1', .*torch.nn.utils.parametrizations.spectral_norm",
        ),
        (
            {"model": with_hook(lambda layer: prune.l1_unstructured(layer, "weight", 0.5))},
            TypeError,
            "got L1Unstructured on layer '1', .*torch.nn.utils.prune.remove",
        ),
        (
            {"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))},
            ValueError,
            "must have running statistics; got track_running_stats=False in layer '1', .*GroupNorm",
        ),
        (
            {"model": Returns(lambda f: f - f.mean(0))},
            ValueError,
            r"same outputs whatever else is in its batch; those of the first sample of `forget` alone differ by \d",
        ),
        (
            {"model": Returns(lambda f: f.squeeze())},
            ValueError,
            r"a row of outputs per sample; got shape \(3,\) for one sample of `forget` and \(3, 3\) for 3",
        ),
        (
            {"model": locked()},
            TypeError,
            r"`model` must be one that copy.deepcopy can copy; got Returns, on which it fails \(TypeError: cannot pickle",
        ),
        (
            {"model": Returns(lambda f: f.sum(1))},
            ValueError,
            r"got targets of shape \(\) for outputs of shape \(\) a sample",
        ),
        ({"model": Returns(lambda f: f + torch.rand(()))}, ValueError, "deterministic in eval mode; .* differ by 0"),
    ],
)
def test_what_is_wrong_with_a_problem_is_said(arguments, error, message):
    with pytest.raises(error, match=message):
        build(**arguments)


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_samples_without_any_label_are_told():
    labels = torch.where(torch.arange(8) < 2, -100, Y[4:])
    with pytest.warns(match="2 of the 8 samples of `retain` have no label; each counts as a loss of 0") as told:
        problem = build(retain=(X[4:], labels))
    assert stabkit.UnlabelledWarning in {warning.category for warning in told}
    assert float(problem.losses(problem.retain)[:2].sum()) == 0


def test_unshifted_labels_of_texts_are_hinted_at():
    """Cross-entropy of a causal model and its own tokens is that of copying them, at which it is bad."""
    tokens = torch.randint(0, 7, (12, 6), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
    with torch.no_grad():
        model[1].weight.mul_(20)  # sure of what it guesses
    for loss, hinted in (("cross_entropy", True), ("causal_lm", False)):
        with pytest.warns(UntrainedModelWarning) as told:
            UnlearningProblem(model, (tokens[:4], tokens[:4]), (tokens[4:], tokens[4:]), loss=loss)
        assert any("shifted by loss='causal_lm'" in str(warning.message) for warning in told) == hinted


@untrained
@pytest.mark.filterwarnings("ignore::stabkit.UnlabelledWarning")
def test_ignored_labels_are_allowed():
    assert build(retain=(X[4:], with_value(Y[4:], -100))).retain.size == 8


@untrained
def test_what_the_messages_say_to_do_works():
    assert build(forget=(PIXELS[:4].float() / 255, Y[:4])).forget.size == 4
    rows = TensorDataset(X[4:], Y[4:], torch.arange(8))
    problem = build(retain=[(x, y) for x, y, _ in rows])
    assert problem.retain_loss == build().retain_loss
    assert build(retain=[(x, y) for x, y, _ in DataLoader(rows, batch_size=3)]).retain_loss == problem.retain_loss
    model = with_hook(weight_norm)
    torch.nn.utils.remove_weight_norm(model[1])
    assert "1.parametrizations.weight.original0" in build(with_hook(parametrizations.weight_norm)).parameters
    assert build(model).size == problem.size


@untrained
def test_whole_numbers_that_a_model_takes_are_left_to_it():
    problem = build(Casting(), (PIXELS[:4], Y[:4]), (PIXELS[4:], Y[4:]))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(problem.new_model()(PIXELS[4:].float()), Y[4:])
    assert problem.retain_loss == pytest.approx(float(expected), rel=1e-6)
    words = nn.Sequential(nn.Embedding(80, 4), nn.Flatten(), nn.Linear(16, 3))
    assert build(words, (PIXELS[:1], Y[:1]), (PIXELS[1:4], Y[1:4])).size == 320 + 51
    with pytest.raises(ValueError, match=r"the inputs of `retain`; got IndexError: index out of range.* and range"):
        build(words, (PIXELS[:1], Y[:1]), (PIXELS[4:], Y[4:]))


@untrained
def test_running_out_of_memory_is_not_the_models_fault():
    def exhausted(f):
        raise torch.OutOfMemoryError("no room for 7 GiB")

    with pytest.raises(torch.OutOfMemoryError, match=r"^no room for 7 GiB$"):
        build(Returns(exhausted))


def test_the_losses_of_large_sets_are_those_of_a_sample(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 4, generator=g)
    y = (x[:, 0] > 0).long()
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]))
    seen = []
    whole = UnlearningProblem.losses

    def counted(self, samples, parameters=None, indices=None):
        seen.append(samples.size if indices is None else len(indices))
        return whole(self, samples, parameters, indices)

    monkeypatch.setattr(UnlearningProblem, "losses", counted)
    problem = UnlearningProblem(model, (x[:100], y[:100]), (x[100:], y[100:]))
    assert seen == [512, 100]
    assert problem.forget_loss == pytest.approx(float(whole(problem, problem.forget).mean()))
    every = whole(problem, problem.retain)
    error = float(every.std()) / 512**0.5
    assert 0 < abs(problem.retain_loss - float(every.mean())) < 4 * error
    again = UnlearningProblem(model, (x[:100], y[:100]), (x[100:], y[100:]))
    assert again.retain_loss == problem.retain_loss
