"""Data operators: exact on every kind of model, kept graphs or not, within a memory budget, on the architectures in use."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit._memory import free_memory, is_out_of_memory, memory_budget
from stabkit.curvature import (
    CurvatureOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    MixedOperator,
    PreconditionedOperator,
    RestrictedOperator,
    curvature_gram,
    curvature_operator,
)
from stabkit.curvature.gradients import mean_gradient
from stabkit.models import MLP, ResNet, VisionTransformer
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem
from tests.cases import CASES, compare_products, dense_ggn, dense_hessian, mean_loss, problem_of

RTOL = 1e-8
CPU = torch.device("cpu")
untrained = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
case_of = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def dense_fisher(problem, which):
    """Per-sample gradients by autograd, one sample at a time."""
    samples = getattr(problem, which)
    rows = []
    for i in range(samples.size):
        inputs, targets = samples.batch(torch.tensor([i]))
        leaves = {n: p.clone().requires_grad_() for n, p in problem.parameters.items()}
        loss = problem.loss.per_sample(problem.outputs(leaves, inputs), targets).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    g = torch.stack(rows)
    return g.T @ g / g.shape[0]


DENSE = {"hessian": dense_hessian, "ggn": dense_ggn, "fisher": dense_fisher}


@untrained
@case_of
@pytest.mark.parametrize("kind", list(DENSE))
@pytest.mark.parametrize("memory", [None, 1], ids=["kept", "recomputed"])
def test_products_are_those_of_the_dense_matrix(case, kind, memory):
    problem = case.problem()
    operator = curvature_operator(problem, problem.retain, kind=kind, memory=memory)
    assert operator.kept == (memory is None)
    assert operator.batch_size == (512 if memory is None else 1)
    dense = DENSE[kind](problem, "retain")
    compare_products(operator, dense, rtol=RTOL)
    compare_products(operator, dense, rtol=RTOL, seed=1)  # and again, from what was kept


@untrained
@given(
    batch_size=st.integers(1, 20), count=st.integers(1, 14), kind=st.sampled_from(list(DENSE)), seed=st.integers(0, 99)
)
def test_batches_and_chosen_samples_do_not_change_the_mean(batch_size, count, kind, seed):
    problem = CASES[0].problem()
    chosen = torch.randperm(problem.retain.size, generator=torch.Generator().manual_seed(seed))[:count]
    whole = curvature_operator(problem, problem.retain, kind=kind, indices=chosen)
    batched = type(whole)(problem, problem.retain, indices=chosen, batch_size=batch_size, memory=1)
    singles = [curvature_operator(problem, problem.retain, kind=kind, indices=i.reshape(1), memory=1) for i in chosen]
    v = torch.randn(problem.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(batched @ v, whole @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(s @ v for s in singles) / count, whole @ v, rtol=1e-10, atol=1e-12)


def test_a_kept_graph_is_built_once(digits_mlp, random_deletion, monkeypatch):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    for kind, memory, expected in (("hessian", None, 3), ("hessian", 1_000_000, 3 * 4), ("ggn", None, 3)):
        operator = type(curvature_operator(problem, problem.forget, kind=kind))(
            problem, problem.forget, batch_size=50, memory=memory
        )
        if memory is not None:
            operator.kept = False
        passes = []
        original = problem.outputs
        monkeypatch.setattr(problem, "outputs", lambda *a, f=original, p=passes: (p.append(1), f(*a))[1])
        built = operator._batch_product
        batches = []
        monkeypatch.setattr(operator, "_batch_product", lambda *a, f=built, b=batches: (b.append(1), f(*a))[1])
        for _ in range(4):
            operator @ torch.ones(problem.size)
        monkeypatch.setattr(problem, "outputs", original)
        assert len(batches) == expected  # 144 samples in three batches
        assert len(passes) >= len(batches)


@untrained
@pytest.mark.parametrize("kind", list(DENSE))
def test_a_linear_model_has_no_curvature_in_a_linear_loss(kind):
    x, y = torch.randn(6, 3), torch.zeros(6, 1)
    problem = UnlearningProblem(
        nn.Linear(3, 1), (x[:2], y[:2]), (x[2:], y[2:]), loss=lambda f, t: torch.relu(f[:, 0] + 100)
    )
    product = curvature_operator(problem, problem.retain, kind=kind) @ torch.ones(4)
    if kind == "fisher":
        rows = torch.cat([x[2:], torch.ones(4, 1)], 1)
        torch.testing.assert_close(product, rows.T @ rows @ torch.ones(4) / 4)
    else:
        assert torch.equal(product, torch.zeros(4))


# ------------------------------------------------------------------ restricted to layers


@untrained
@case_of
def test_a_restricted_operator_is_the_diagonal_block(case):
    problem = case.problem()
    dense = dense_hessian(problem, "retain")
    layers = list(dict.fromkeys(problem.layer_of().values()))
    chosen = layers[-1:] if len(layers) == 1 else [layers[0], layers[-1]]
    operator = RestrictedOperator(HessianOperator(problem, problem.retain), problem, chosen)
    block = dense[operator.places][:, operator.places]
    assert operator.shape == tuple(block.shape)
    compare_products(operator, block, rtol=RTOL)


@untrained
def test_the_parent_stands_for_its_layers_and_unknown_ones_are_refused():
    problem = CASES[4].problem()
    operator = HessianOperator(problem, problem.retain)
    parts = RestrictedOperator(operator, problem, ["attention"])
    names = [n for n in problem.parameters if n.startswith("attention.")]
    assert parts.shape[0] == sum(problem.parameters[n].numel() for n in names)
    assert RestrictedOperator(operator, problem, [""]).shape == operator.shape
    with pytest.raises(ValueError, match=r"`layers` of `RestrictedOperator` must name at least one layer; got none"):
        RestrictedOperator(operator, problem, [])
    with pytest.raises(ValueError, match=r"with trainable parameters; got 'att'\. There are 'embedding', 'attention"):
        RestrictedOperator(operator, problem, ["norm", "att"])


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("given", "expected"),
    [(5, 5), ("7", 7), ("4GB", 4 * 2**30), ("1.5 kb", 1536), ("2M", 2 * 2**20), ("3tb", 3 * 2**40)],
)
def test_budgets_are_read(given, expected):
    assert memory_budget(given, owner="f", device=CPU) == expected


def test_without_a_budget_it_is_a_share_of_what_is_free():
    assert 2**20 < memory_budget(None, owner="f", device=CPU) <= 0.5 * free_memory(CPU)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (0, ValueError, "`memory` of `f` must be a positive amount; got 0"),
        ("-1GB", ValueError, "must be a positive amount; got '-1GB'"),
        ("much", ValueError, "got 'much'. Use bytes or text"),
        (1.5, TypeError, r"`memory` of `f` must be a whole number or text; got 1\.5"),
        (True, TypeError, "got True"),
    ],
)
def test_budgets_that_are_none_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        memory_budget(given, owner="f", device=CPU)


def test_a_budget_bounds_what_is_held(digits_mlp, random_deletion):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    roomy = HessianOperator(problem, problem.retain, memory="1GB")
    per_sample = roomy._bytes_per_sample()
    assert 4 * 64 < per_sample < 100_000  # at least its input, in float32
    tight = HessianOperator(problem, problem.retain, memory=100 * per_sample)
    assert (tight.batch_size, tight.kept) == (100, False)
    assert (roomy.batch_size, roomy.kept) == (512, True)
    exact = HessianOperator(problem, problem.retain, memory=problem.retain.size * per_sample)
    assert exact.kept


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("CPU: can't allocate memory: 8")])
def test_out_of_memory_halves_the_batch_once_and_is_told(digits_mlp, random_deletion, monkeypatch, error):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    operator = HessianOperator(problem, problem.forget)
    v = torch.ones(problem.size)
    expected = HessianOperator(problem, problem.forget) @ v
    original = problem.outputs

    def small(parameters, inputs):
        if inputs.shape[0] > 40:
            raise error
        return original(parameters, inputs)

    monkeypatch.setattr(problem, "outputs", small)
    operator.batch_size = 128
    with pytest.warns(stabkit.MemoryWarning) as caught:
        result = operator @ v
    told = [str(w.message) for w in caught]
    assert ["goes on with 64 samples" in told[0], "goes on with 32 samples" in told[1], len(told)] == [True, True, 2]
    torch.testing.assert_close(result, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(operator @ v, expected)  # it stays small


def test_other_errors_pass_and_nothing_left_to_halve_is_an_error(digits_mlp, random_deletion, monkeypatch):
    problem = UnlearningProblem(digits_mlp, *random_deletion)
    operator = HessianOperator(problem, problem.forget, batch_size=2)

    def fails(error):
        def outputs(parameters, inputs):
            raise error

        monkeypatch.setattr(problem, "outputs", outputs)

    fails(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        operator @ torch.ones(problem.size)
    fails(torch.OutOfMemoryError("out of memory"))
    with (
        pytest.warns(stabkit.MemoryWarning, match="1 samples a batch"),
        pytest.raises(MemoryError, match="a `HessianOperator` product ran out of memory with one sample a batch"),
    ):
        operator @ torch.ones(problem.size)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


# ------------------------------------------------------------------ falling back


class NoForward(torch.autograd.Function):
    """An operation with a reverse mode and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh().square())


class Custom(nn.Module):
    """A network around it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(NoForward.apply(self.first(x)))


@untrained
@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_without_forward_mode_reverse_mode_serves_and_is_told(kind):
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    custom = Custom().double()
    plain = MLP(4, 3, hidden=(5,), activation=nn.Tanh).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), custom.state_dict().values(), strict=True)))
    problems = [UnlearningProblem(m, (x[:4], y[:4]), (x[4:], y[4:])) for m in (custom, plain)]
    v = torch.randn(problems[0].size, dtype=torch.float64)
    with pytest.warns(stabkit.FallbackWarning, match=r"computes Jv in reverse mode, as forward mode failed"):
        result = curvature_operator(problems[0], problems[0].retain, kind=kind) @ v
    torch.testing.assert_close(result, curvature_operator(problems[1], problems[1].retain, kind=kind) @ v)


# ------------------------------------------------------------------ architectures in use


def lm_problem():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double().eval()
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 31, (8, 10), generator=g)
    mask = torch.ones_like(tokens)
    mask[::2, 7:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    forget, retain = ({k: v[s] for k, v in batch.items()} for s in (slice(0, 3), slice(3, 8)))
    return UnlearningProblem(model, forget, retain, loss="causal_lm")


class Recurrent(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(3, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


def vision_problem(model, size=8):
    g = torch.Generator().manual_seed(2)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=g)
                module.running_var.uniform_(0.5, 1.5, generator=g)
    x, y = torch.randn(7, 3, size, size, generator=g, dtype=torch.float64), torch.arange(7) % 5
    return UnlearningProblem(model, (x[:3], y[:3]), (x[3:], y[3:]))


def lstm_problem():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Recurrent().double()
    x, y = torch.randn(7, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)), torch.arange(7) % 3
    return UnlearningProblem(model, (x[:3], y[:3]), (x[3:], y[3:]))


ARCHITECTURES = {
    "resnet18-batchnorm": lambda: vision_problem(ResNet(3, 5, width=4)),
    "resnet20-groupnorm": lambda: vision_problem(ResNet(3, 5, blocks=(3, 3, 3), width=8, norm="group")),
    "vision-transformer": lambda: vision_problem(VisionTransformer(3, 8, 5, width=8, depth=2, heads=2)),
    "gpt2": lm_problem,
    "lstm": lstm_problem,
}


@untrained
@pytest.mark.filterwarnings("ignore::stabkit.FallbackWarning")
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("memory", [None, 1], ids=["kept", "recomputed"])
def test_products_on_the_architectures_in_use(architecture, memory):
    problem = ARCHITECTURES[architecture]()
    function, theta = mean_loss(problem, "retain"), problem.vector()
    g = torch.Generator().manual_seed(5)
    v = torch.randn(problem.size, dtype=torch.float64, generator=g)
    v /= v.norm()

    # Hv by plain double backward through `functional_call`: nothing of the operators' code.
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient @ v, leaf)
    product = HessianOperator(problem, problem.retain, memory=memory) @ v
    torch.testing.assert_close(product, expected, rtol=RTOL, atol=1e-9)

    # Jv by central differences, then Λ and J^T by autograd.
    inputs, targets = problem.retain.batch(torch.arange(problem.retain.size))
    ahead, behind = (problem.outputs(problem.unflatten(theta + s * 1e-5 * v), inputs).detach() for s in (1, -1))
    tangent = (ahead - behind) / 2e-5
    leaves = {n: p.clone().requires_grad_() for n, p in problem.parameters.items()}
    outputs = problem.outputs(leaves, inputs)
    flat = tangent.reshape(tangent.shape[0], -1, 1)
    curved = problem.loss.hessian_apply(outputs.detach(), targets, flat).reshape(outputs.shape)
    pulled = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs=curved)
    expected = torch.cat([p.reshape(-1) for p in pulled]) / problem.retain.size
    operator = GGNOperator(problem, problem.retain, memory=memory)
    for product in (operator @ v, operator @ v):
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))
        assert float(v @ product) >= 0


@untrained
@pytest.mark.filterwarnings("ignore::stabkit.FallbackWarning")
def test_lstm_products_are_right_in_single_precision_too():
    problem = lstm_problem()
    sets = [s.batch(torch.arange(s.size)) for s in (problem.forget, problem.retain)]
    single = UnlearningProblem(problem.new_model().float(), *((x.float(), y) for x, y in sets))
    v = torch.randn(problem.size, generator=torch.Generator().manual_seed(6))
    for cls in (HessianOperator, FisherOperator, GGNOperator):
        exact, rounded = cls(problem, problem.retain), cls(single, single.retain)
        for _ in range(3):  # a graph that changes while it is used would show
            torch.testing.assert_close(rounded @ v, (exact @ v.double()).float(), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------ combination


@untrained
@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([True] * 4 + [False] * 4), ValueError, r"got torch.bool of shape .*mask.nonzero\(\).flatten\(\)"),
        (torch.empty(0, dtype=torch.int64), ValueError, r"shape \(m,\), m >= 1; got torch.int64 of shape \(0,\)"),
        (torch.tensor([-1, 2]), ValueError, r"must be in \[0, \d+\] for `retain`; got -1"),
        (torch.tensor([2, 10**6]), ValueError, "got 1000000"),
        (torch.tensor([0.5]), ValueError, "must be whole numbers"),
        (["a"], TypeError, "must be whole numbers of shape"),
    ],
)
def test_samples_that_are_not_there_are_refused(indices, error, message):
    """A mask was taken for samples and divided by its length; none gave NaN."""
    problem = problem_of(0)
    for ask in (
        lambda: curvature_operator(problem, problem.retain, indices=indices),
        lambda: mean_gradient(problem, problem.retain, indices=indices),
        lambda: curvature_gram(problem, problem.retain, indices=indices),
    ):
        with pytest.raises(error, match=message):
            ask()
    some = curvature_operator(problem, problem.retain, indices=[1, 2])
    chosen = curvature_operator(problem, problem.retain, indices=torch.tensor([1, 2]))
    vector = torch.ones(problem.size, dtype=problem.dtype)
    assert torch.equal(some @ vector, chosen @ vector)


@untrained
def test_what_operators_cannot_multiply_is_named():
    problem, other = problem_of(0), problem_of(1)
    operator = curvature_operator(problem, problem.retain)
    with pytest.raises(TypeError, match=r"must get a tensor; got ndarray. For NumPy arrays take `to_scipy\(\)`"):
        operator @ np.ones(problem.size)
    with pytest.raises(ValueError, match="must be of one order; got"):
        MixedOperator(operator, curvature_operator(other, other.forget), 0.5)
    with pytest.raises(ValueError, match="`preconditioner` of `PreconditionedOperator` must have"):
        PreconditionedOperator(operator, Diagonal(torch.ones(3, dtype=torch.float64)))


@untrained
def test_mixed_blocks_and_errors():
    problem = CASES[0].problem()
    retain, forget = (curvature_operator(problem, s) for s in (problem.retain, problem.forget))
    assert isinstance(retain, CurvatureOperator)
    mixed = MixedOperator(retain, forget, 0.3)
    dense = 0.7 * dense_hessian(problem, "retain") - 0.3 * dense_hessian(problem, "forget")
    compare_products(mixed, dense, rtol=RTOL)
    with pytest.raises(
        ValueError, match=r"`MixedOperator` @ vectors must get shape \(\d+,\) or \(\d+, k\); got \(3,\)"
    ):
        mixed @ torch.ones(3)
    with pytest.raises(ValueError, match=r"`kind` of `curvature_operator` .*got 'hesian'\. Did you mean 'hessian'"):
        curvature_operator(problem, problem.retain, kind="hesian")
    with pytest.raises(ValueError, match=r"`batch_size` of `GGNOperator` must be a whole number >= 1; got 0"):
        GGNOperator(problem, problem.retain, batch_size=0)
