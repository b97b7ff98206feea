import copy
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, dense_ggn, dense_jacobian, dense_output_hessian
from curvlinops import GGNLinearOperator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabkit.coherence import coherence
from stabkit.curvature import SampleFactors, curvature_gram, linearise
from stabkit.curvature.gram import gram as gram_file
from stabkit.curvature.gram.calls import Tracer
from stabkit.models import MLP, SmallCNN
from stabkit.preconditioner import Diagonal, Identity, Preconditioner
from stabkit.problem import UnlearningProblem

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def randomised(model, seed=0):
    """Weights and running statistics that are no special values."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.5, generator=generator)
    return model


def problem_of(model, *shape, samples=6, classes=3, integers=0, seed=1, loss="cross_entropy"):
    """Two forget samples and the rest to retain, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, integers, (samples, *shape), generator=g) if integers else None
    x = torch.randn(samples, *shape, generator=g, dtype=torch.float64) if x is None else x
    y = torch.randn(samples, classes, generator=g).double() if loss == "mse" else torch.arange(samples) % classes
    return UnlearningProblem(randomised(model, seed), (x[:2], y[:2]), (x[2:], y[2:]), loss=loss)


class Pooled(nn.Module):
    """A body's channels averaged over space, then classified."""

    def __init__(self, body, channels, classes=3):
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)).flatten(2).mean(2))


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.layer, self.rms, self.head = nn.LayerNorm([4, 5]), nn.RMSNorm(5), nn.Linear(20, 3)
        self.frozen = nn.LayerNorm(5, elementwise_affine=False)

    def forward(self, x):
        h = torch.tanh(self.group(self.conv(x)))
        return self.head((self.rms(self.layer(h)) + self.frozen(h)).flatten(1))


class Words(nn.Module):
    """Embedding with a padding row, positions that no sample changes, and a linear map at every position."""

    def __init__(self, padding=2):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4, padding_idx=padding), nn.Embedding(5, 4)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        h = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(self.mix(h)).mean(1))


class Twice(nn.Module):
    """One layer used twice, one weight in two modules, one embedding table as output weights."""

    def __init__(self):
        super().__init__()
        self.inner, self.other, self.table = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Embedding(3, 4)
        self.tied = nn.Linear(4, 4)
        self.other.weight = self.tied.weight

    def forward(self, x):
        h = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        h = h + torch.tanh(self.other(self.tied(h)))
        return F.linear(h + self.table(torch.zeros(len(x), dtype=torch.int64)), self.table.weight)


class Bare(nn.Module):
    """A parameter of no layer; a weight that is used by its layer and beside it; a bias used as a weight elsewhere."""

    def __init__(self):
        super().__init__()
        self.scale, self.first, self.second = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = torch.tanh(self.first(x * self.scale))
        return self.second(h @ self.first.weight + F.linear(self.first.weight, self.first.weight).mean(0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class SwappedAxes(nn.Module):
    """Positions before samples, as many of them as samples, and both in one axis: no batch axis to guess."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x.transpose(0, 1)))
        h = torch.tanh(self.second(h.reshape(-1, 4))).reshape(h.shape)
        return self.head(h.sum(0))


class TransposedWeights(nn.Module):
    """Linear maps written as `addmm` with weights the other way round, as GPT-2 has them."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.head = nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.addmm(self.b, x.reshape(-1, 4), self.w).reshape(*x.shape[:-1], 5)
        return self.head(torch.tanh(h).mean(1))


def convolutions():
    return Pooled(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), dilation=(1, 2), groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 4, (3, 2), padding="same", groups=4, bias=False),
            nn.Tanh(),
            nn.Conv2d(4, 3, 2, padding=1, padding_mode="circular"),
        ),
        3,
    )


PROBLEMS = {
    **{case.name: case.problem for case in CASES},
    "convolutions": lambda: problem_of(convolutions(), 2, 7, 7),
    "3d": lambda: problem_of(Pooled(nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), 2), 1, 3, 4, 3),
    "norms": lambda: problem_of(Norms(), 2, 5),
    "batchnorm-without-weights": lambda: problem_of(
        Pooled(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3, affine=False)), 3), 2, 4
    ),
    "words": lambda: problem_of(Words(), 5, integers=9),
    "words-negative-padding": lambda: problem_of(Words(-2), 5, integers=9),
    "twice": lambda: problem_of(Twice(), 4),
    "bare": lambda: problem_of(Bare(), 4),
    "recurrent": lambda: problem_of(Recurrent(), 4, 3),
    "swapped-axes": lambda: problem_of(SwappedAxes(), 4, 3),
    "transposed-weights": lambda: problem_of(TransposedWeights(), 2, 4),
    "squared-error": lambda: problem_of(MLP(4, 3, hidden=(4,), activation=nn.Tanh), 4, loss="mse"),
}
problems = pytest.mark.parametrize("name", PROBLEMS)


def dense_kernel(problem, which="retain", p=None):
    """J P Jᵀ of a set, (m·O, m·O), from the whole Jacobian."""
    _, _, jacobian = dense_jacobian(problem, which)
    rows = jacobian.detach().flatten(0, 1)
    return (rows if p is None else rows * p) @ rows.T


def dense_hessians(problem, which="retain", p=None):
    """P^{1/2} J_iᵀ Λ_i J_i P^{1/2} of every sample."""
    outputs, targets, jacobian = dense_jacobian(problem, which)
    curvature = dense_output_hessian(problem.loss, outputs.detach(), targets)
    jacobian = jacobian.detach() if p is None else jacobian.detach() * p.sqrt()
    return jacobian.transpose(1, 2) @ curvature @ jacobian


def uneven(problem, seed=3):
    return torch.rand(problem.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


# ---------------------------------------------------------------------- exactness


@problems
def test_the_gram_is_that_of_the_dense_jacobian(name):
    problem = PROBLEMS[name]()
    gram = curvature_gram(problem, problem.retain, rows="outputs")
    torch.testing.assert_close(gram.matrix, dense_kernel(problem), **EXACT)
    assert torch.equal(gram.matrix, gram.matrix.T)


@problems
def test_an_uneven_preconditioner_weighs_every_parameter(name):
    problem = PROBLEMS[name]()
    p = uneven(problem)
    gram = curvature_gram(problem, problem.retain, rows="outputs", preconditioner=Diagonal(p))
    torch.testing.assert_close(gram.matrix, dense_kernel(problem, p=p), **EXACT)
    assert "grams" not in gram.methods.values()


@problems
def test_a_preconditioner_by_tensor_leaves_the_methods_as_they_are(name):
    problem = PROBLEMS[name]()
    p = torch.cat([torch.full((t.numel(),), 0.3 * k + 0.1) for k, t in enumerate(problem.parameters.values())]).double()
    gram = curvature_gram(problem, problem.retain, rows="outputs", preconditioner=Diagonal(p))
    torch.testing.assert_close(gram.matrix, dense_kernel(problem, p=p), **EXACT)
    assert gram.methods == curvature_gram(problem, problem.retain, rows="outputs").methods


@problems
def test_curvature_factors_give_the_dense_per_sample_curvatures(name):
    problem = PROBLEMS[name]()
    p = uneven(problem)
    gram = curvature_gram(problem, problem.retain, preconditioner=Diagonal(p))
    dense = dense_hessians(problem, p=p)
    m = dense.shape[0]
    products = torch.einsum("ide,jde->ij", dense, dense)
    scale = float(products.amax())
    torch.testing.assert_close(gram.products(), products, rtol=1e-9, atol=1e-11 * scale)
    torch.testing.assert_close(gram.traces(), dense.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gram.spectral_norms(), torch.linalg.eigvalsh(dense)[:, -1], rtol=1e-9, atol=1e-11)
    expected = torch.linalg.eigvalsh(dense.mean(0)).flip(0).clamp_min(0)
    count = min(gram.matrix.shape[0], problem.size)
    torch.testing.assert_close(gram.eigenvalues()[:count], expected[:count], rtol=1e-9, atol=1e-11)
    assert float(gram.eigenvalues()[count:].sum() + expected[count:].sum()) <= 1e-11 * scale**0.5
    assert gram.samples == m
    assert gram.sizes == (m,)


@given(
    space=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    seed=st.integers(0, 1000),
)
def test_every_convolution_is_exact(space, kernel, stride, dilation, padding, groups, bias, mode, seed):
    if padding == "same":
        stride = 1
    layer = (nn.Conv1d, nn.Conv2d)[space - 1]
    body = layer(4, 4, kernel, stride, padding, dilation, groups, bias, mode)
    problem = problem_of(Pooled(body, 4), 4, *[6, 5][:space], samples=4, seed=seed)
    gram = curvature_gram(problem, problem.retain, rows="outputs")
    torch.testing.assert_close(gram.matrix, dense_kernel(problem), **EXACT)
    assert "autograd" not in gram.methods.values()


@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - {"tied-language-model"}))
def test_the_least_memory_changes_the_passes_and_not_the_gram(name):
    problem = PROBLEMS[name]()
    plenty = curvature_gram(problem, problem.retain)
    with pytest.raises(ValueError, match="must be at least") as error:
        curvature_gram(problem, problem.retain, memory=8 * problem.retain.size**2 + 700)
    least = int(re.search(r"at least (\d+) bytes", str(error.value)).group(1))
    while True:  # an estimate of what is needed may grow with what is given, as methods change
        try:
            little = curvature_gram(problem, problem.retain, memory=least)
            break
        except ValueError as again:
            least = int(re.search(r"at least (\d+) bytes", str(again)).group(1))
    torch.testing.assert_close(little.matrix, plenty.matrix, **EXACT)
    assert plenty.passes == 1
    assert little.gradient_equivalents == little.passes * little.matrix.shape[0]


def test_layers_that_do_not_fit_are_cut_and_take_more_passes():
    problem = problem_of(SmallCNN(1, 8, 3, width=4, hidden=8), 1, 8, 8, samples=42)
    dense, p = dense_kernel(problem), uneven(problem)
    passes = []
    for memory in (2**22, 2**19, 2**18):
        gram = curvature_gram(problem, problem.retain, rows="outputs", memory=memory)
        torch.testing.assert_close(gram.matrix, dense, **EXACT)
        gram = curvature_gram(problem, problem.retain, rows="outputs", memory=memory, preconditioner=Diagonal(p))
        torch.testing.assert_close(gram.matrix, dense_kernel(problem, p=p), **EXACT)
        passes.append(gram.passes)
    assert passes[0] == 1
    assert passes[0] < passes[1] < passes[2]


# ---------------------------------------------------------------------- what is not done


def test_each_kind_of_layer_is_done_by_its_own_method():
    methods = {}
    for name in PROBLEMS:
        problem = PROBLEMS[name]()
        methods[name] = curvature_gram(problem, problem.retain, rows="outputs").methods
    assert set(methods["convolutions"].values()) == {"gradients", "grams"}
    assert set(methods["norms"].values()) <= {"gradients", "grams"}
    assert methods["words"]["words.weight"] == methods["words"]["places.weight"] == "tokens"
    assert methods["twice"]["table.weight"] == "autograd"
    assert methods["twice"]["inner.weight"] != "autograd" != methods["twice"]["other.weight"]
    assert PROBLEMS["bare"]().unreached == ("unused",)
    assert methods["bare"] == {
        "scale": "autograd",
        "first.weight": "autograd",
        "first.bias": "gradients",
        "second.weight": "grams",
        "second.bias": "grams",
    }
    assert set(methods["recurrent"].values()) == {"autograd"}
    assert "autograd" not in methods["swapped-axes"].values()
    assert "autograd" not in methods["transposed-weights"].values()
    tied = methods["tied-language-model"]
    assert tied["embedding.weight"] == tied["attention.in_proj_weight"] == "autograd"
    assert tied["norm.weight"] == "gradients"


def test_a_call_of_an_unknown_form_is_passed_through():
    x, w, b, out = torch.randn(2, 3), torch.randn(3, 4), torch.randn(4), torch.empty(2, 4)
    tracer = Tracer({id(w): "w"})
    with tracer:
        torch.addmm(b, x, w, out=out)
        torch.addmm(b, x, w, beta=2)
    assert tracer.calls == []
    torch.testing.assert_close(out, b + x @ w)
    with tracer:
        torch.addmm(b, x, w)
    assert [call.weight for call in tracer.calls] == ["w"]


def test_frozen_parameters_contribute_nothing():
    model = randomised(MLP(4, 3, hidden=(5,), activation=nn.Tanh))
    model[1].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=g, dtype=torch.float64), torch.arange(6) % 3
    problem = UnlearningProblem(model, (x[:2], y[:2]), (x[2:], y[2:]))
    gram = curvature_gram(problem, problem.retain, rows="outputs")
    torch.testing.assert_close(gram.matrix, dense_kernel(problem), **EXACT)
    assert set(gram.methods) == {"1.bias", "3.weight"}


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("preconditioned", [False, True])
def test_no_tensor_is_of_the_jacobians_size(preconditioned):
    problem = problem_of(SmallCNN(1, 12, 3, width=8, hidden=96), 1, 12, 12, samples=34)
    preconditioner = Diagonal(uneven(problem)) if preconditioned else None
    memory = 4 * 2**20
    with _Largest() as seen:
        curvature_gram(problem, problem.retain, rows="outputs", preconditioner=preconditioner, memory=memory)
    jacobian = 32 * 3 * problem.size
    assert 0 < seen.numel < jacobian / 4
    assert 8 * seen.numel <= memory
    with _Largest() as dense:  # the tracker does see a Jacobian
        dense_jacobian(problem, "retain")
    assert dense.numel >= jacobian


@pytest.mark.parametrize("name", ["residual-batchnorm", "recurrent", "tied-language-model"])
def test_problem_and_random_state_stay_as_they_were(name):
    problem = PROBLEMS[name]()
    before = copy.deepcopy(problem._module.state_dict())
    hooks = [
        dict(m._forward_hooks) | dict(m._forward_pre_hooks) | dict(m._backward_hooks) for m in problem._module.modules()
    ]
    parameters = {key: (value, value.clone()) for key, value in problem.parameters.items()}
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    curvature_gram(problem, problem.retain)
    assert states[0] == random.getstate()
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())
    assert hooks == [
        dict(m._forward_hooks) | dict(m._forward_pre_hooks) | dict(m._backward_hooks) for m in problem._module.modules()
    ]
    assert all(torch.equal(value, before[key]) for key, value in problem._module.state_dict().items())
    for key, (value, kept) in parameters.items():
        assert problem.parameters[key] is value
        assert torch.equal(value, kept)
        assert not value.requires_grad
        assert value.grad is None


# ---------------------------------------------------------------------- what is made of it


def dense_factors(problem, which):
    """V_i = L_iᵀ J_i in all coordinates."""
    outputs, targets, jacobian = dense_jacobian(problem, which)
    factors = problem.loss.factor_transpose(outputs.detach(), targets, jacobian.detach())
    return SampleFactors(
        factors=factors, gradients=torch.zeros(factors.shape[0], problem.size), population=factors.shape[0]
    )


@pytest.mark.parametrize("name", ["mlp-cross-entropy", "tied-language-model", "convolutions"])
def test_gram_compressed_and_dense_curvature_agree(name):
    problem = PROBLEMS[name]()
    gram = curvature_gram(problem, (problem.retain, problem.forget))
    full = linearise(problem, Identity(), rank=problem.size, retain_samples=None, forget_samples=None)
    compressed = [part.factors(problem.loss) for part in (full.retain, full.forget)]
    retain, forget = compressed
    through = coherence(retain, forget, mix=0.3)
    dense = coherence(dense_factors(problem, "retain"), dense_factors(problem, "forget"), mix=0.3)
    m = problem.retain.size
    products = gram.products()
    for expected in (through, dense):
        close = {"rtol": 1e-7, "atol": 1e-9 * float(products.amax())}
        torch.testing.assert_close(products[:m, :m], expected.gram_retain, **close)
        torch.testing.assert_close(products[m:, m:], expected.gram_forget, **close)
        torch.testing.assert_close(products[:m, m:], expected.gram_cross, **close)
        sigma = torch.linalg.matrix_norm(products[:m, :m].sqrt(), 2) / gram.spectral_norms()[:m].amax()
        assert float(sigma) == pytest.approx(expected.retain, rel=1e-7)
    for which, part in enumerate(("retain", "forget")):
        curvature = dense_ggn(problem, part).detach()
        exact = torch.linalg.eigvalsh(curvature).flip(0)
        count = min(exact.numel(), gram.block(which).shape[0])
        torch.testing.assert_close(gram.eigenvalues(which)[:count], exact[:count], rtol=1e-9, atol=1e-11)
        through_basis = torch.linalg.eigvalsh(compressed[which].mean()).flip(0)[:count]
        short = min(count, through_basis.numel())
        torch.testing.assert_close(through_basis[:short], exact[:short], rtol=1e-7, atol=1e-10)


def test_curvlinops_gives_the_same_trace_and_eigenvalues():
    problem = problem_of(SmallCNN(1, 8, 3, width=2, hidden=4), 1, 8, 8, samples=10)
    gram = curvature_gram(problem, problem.retain)
    model = problem.new_model()
    inputs, targets = problem.retain.batch(torch.arange(problem.retain.size))
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(inputs, targets)])
    dense = (operator @ torch.eye(problem.size, dtype=torch.float64)).detach()
    values = torch.linalg.eigvalsh((dense + dense.T) / 2).flip(0)
    rank = gram.matrix.shape[0]
    torch.testing.assert_close(gram.eigenvalues(), values[:rank], rtol=1e-8, atol=1e-11)
    assert float(gram.traces().mean()) == pytest.approx(float(dense.trace()), rel=1e-9)


def test_blocks_of_a_joint_gram_are_the_sets_own():
    problem = PROBLEMS["mlp-cross-entropy"]()
    chosen = torch.tensor([3, 0, 5]), None
    gram = curvature_gram(problem, (problem.retain, problem.forget), indices=chosen, rows="outputs")
    kernel = curvature_gram(problem, problem.retain, indices=chosen[0], rows="outputs")
    torch.testing.assert_close(gram.block(), kernel.matrix, **EXACT)
    rows = [dense_jacobian(problem, which)[2].detach() for which in ("retain", "forget")]
    rows[0] = rows[0][chosen[0]]
    torch.testing.assert_close(gram.block(0, 1), rows[0].flatten(0, 1) @ rows[1].flatten(0, 1).T, **EXACT)
    assert torch.equal(gram.block(1, 0), gram.block(0, 1).T)
    assert gram.sizes == (3, problem.forget.size)
    assert gram.populations == (problem.retain.size, problem.forget.size)
    assert torch.equal(gram.indices[0], chosen[0])
    assert gram.rows_per_sample == 3


def test_softmax_curvature_has_one_row_less_than_classes():
    problem = PROBLEMS["mlp-cross-entropy"]()
    assert curvature_gram(problem, problem.retain).rows_per_sample == 2
    problem = PROBLEMS["tied-language-model"]()  # 5 positions predict 4 labels among 7 words
    assert curvature_gram(problem, problem.retain).rows_per_sample == 4 * 6
    problem = PROBLEMS["squared-error"]()
    assert curvature_gram(problem, problem.retain).rows_per_sample == 3


def test_single_precision_matrix_and_network():
    problem = PROBLEMS["mlp-cross-entropy"]()
    gram = curvature_gram(problem, problem.retain, dtype=torch.float32)
    assert gram.matrix.dtype == torch.float32
    inputs, targets = problem.retain.batch(torch.arange(4))
    single = UnlearningProblem(
        problem.new_model().float(), (inputs.float()[:2], targets[:2]), (inputs[2:], targets[2:])
    )
    same = UnlearningProblem(problem.new_model(), (inputs[:2], targets[:2]), (inputs[2:], targets[2:]))
    low, high = curvature_gram(single, single.retain), curvature_gram(same, same.retain)
    assert low.matrix.dtype == torch.float64
    torch.testing.assert_close(low.products(), high.products(), rtol=1e-4, atol=1e-6)


def test_progress_is_written_to_stderr(capsys):
    problem = PROBLEMS["mlp-cross-entropy"]()
    curvature_gram(problem, problem.retain, progress=True)
    said = capsys.readouterr()
    assert "curvature Gram" in said.err
    assert not said.out


# ---------------------------------------------------------------------- errors


class Doubling(Preconditioner):
    def apply(self, vectors):
        return 2 * vectors

    def sqrt(self, vectors):
        return 2**0.5 * vectors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": "hessian"}, ValueError, "`rows` of `curvature_gram` must be one of 'ggn', 'outputs'; got 'hessian'"),
        ({"memory": 0}, ValueError, "`memory` of `curvature_gram` must be a positive amount; got 0"),
        (
            {"memory": 10**3},
            ValueError,
            r"at least \d+ bytes for 14 samples with 2 rows each, whose K alone takes 6272; got 1000",
        ),
        (
            {"memory": 100},
            ValueError,
            "at least 288 bytes for 14 samples with 3 rows each, whose K alone takes 14112; got 100",
        ),
        ({"dtype": torch.float16}, ValueError, "torch.float32 or torch.float64; got torch.float16"),
        ({"preconditioner": Doubling()}, TypeError, "must be Identity or Diagonal.*; got Doubling"),
        ({"preconditioner": Diagonal(torch.ones(3))}, ValueError, r"must have 43 entries.*; got shape \(3,\)"),
        (
            {"indices": torch.tensor([0.5])},
            ValueError,
            r"whole numbers of shape \(m,\).*; got torch.float32 of shape \(1,\)",
        ),
        ({"indices": torch.tensor([], dtype=torch.int64)}, ValueError, r"m >= 1; got torch.int64 of shape \(0,\)"),
        ({"indices": torch.tensor([0, 14])}, ValueError, r"in \[0, 13\] for `retain`; got 14"),
        ({"indices": torch.tensor([-1, 3])}, ValueError, r"in \[0, 13\] for `retain`; got -1"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    problem = PROBLEMS["mlp-cross-entropy"]()
    with pytest.raises(error, match=message):
        curvature_gram(problem, problem.retain, **change)


def test_bad_sets_are_named():
    problem = PROBLEMS["mlp-cross-entropy"]()
    with pytest.raises(TypeError, match=r"`sets` of `curvature_gram` must be samples.*; got str, str"):
        curvature_gram(problem, ("retain", "forget"))
    with pytest.raises(TypeError, match="got nothing"):
        curvature_gram(problem, ())
    with pytest.raises(ValueError, match=r"one entry per set.*; got 1 for 2 sets"):
        curvature_gram(problem, (problem.retain, problem.forget), indices=[None])
    gram = curvature_gram(problem, problem.retain)
    with pytest.raises(ValueError, match=r"`which` of `Gram` must be a whole number in \[0, 0\]; got 1"):
        gram.eigenvalues(1)


def test_sets_of_different_lengths_have_no_joint_gram():
    model = randomised(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)))
    short, long = torch.randint(0, 5, (3, 2)), torch.randint(0, 5, (4, 3))
    problem = UnlearningProblem(model, (short, short), (long, long))
    with pytest.raises(ValueError, match=r"same number of outputs per sample; got \[15, 10\]"):
        curvature_gram(problem, (problem.retain, problem.forget))


def test_memory_that_runs_out_is_no_missing_batching_rule(monkeypatch):
    """A CPU says so by a RuntimeError; going on sample by sample would take it for another one."""

    def out_of_memory(self, plan):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    problem = CASES[0].problem()
    monkeypatch.setattr(gram_file._Builder, "_run", out_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        curvature_gram(problem, problem.retain)
