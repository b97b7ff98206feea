"""Per-sample losses and their derivatives against PyTorch, and the best constant's level against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import hessian

from stabkit.losses import IGNORE_INDEX, CrossEntropy, CustomLoss, Loss, SquaredError, resolve_loss

seeds = st.integers(0, 10**6)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(2, 5))  # m, T, C


def normal(*shape, seed, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, classes, seed, ignored=0.0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, classes, shape, generator=g)
    values[torch.rand(shape, generator=g) < ignored] = IGNORE_INDEX
    return values


def logistic(outputs, targets):
    return F.softplus(-targets * outputs).sum(1)


def draw_case(kind, shape, seed):
    """A loss, outputs and targets in float64."""
    m, t, c = shape
    if kind == "labels":
        return CrossEntropy(), normal(m, c, seed=seed), labels(m, classes=c, seed=seed)
    if kind == "sequence":
        return CrossEntropy(), normal(m, t, c, seed=seed), labels(m, t, classes=c, seed=seed, ignored=0.3)
    if kind == "map":
        return CrossEntropy(), normal(m, c, t + c, 2, seed=seed), labels(m, t + c, 2, classes=c, seed=seed, ignored=0.3)
    if kind == "causal":
        return CrossEntropy(shift=True), normal(m, t, c, seed=seed), labels(m, t, classes=c, seed=seed, ignored=0.3)
    if kind == "squared":
        return SquaredError(), normal(m, t, c, seed=seed), normal(m, t, c, seed=seed + 1)
    if kind == "squared, one output":
        return SquaredError(), normal(m, seed=seed), normal(m, seed=seed + 1)
    targets = labels(m, c, classes=2, seed=seed).double() * 2 - 1
    return CustomLoss(logistic), normal(m, c, seed=seed), targets


KINDS = ["labels", "sequence", "map", "causal", "squared", "squared, one output", "custom"]
kinds = pytest.mark.parametrize("kind", KINDS)


def reference(kind, outputs, targets):
    """Sample by sample through torch.nn.functional."""
    values = []
    for f, y in zip(outputs, targets, strict=True):
        if kind.startswith("squared"):
            values.append(F.mse_loss(f, y))
        elif kind == "custom":
            values.append(F.soft_margin_loss(f, y, reduction="sum"))
        else:
            if kind == "causal":
                f, y = f[:-1], y[1:]
            if kind == "labels":
                f, y = f.unsqueeze(0), y.unsqueeze(0)
            if kind == "map":
                f = f.unsqueeze(0)
                y = y.unsqueeze(0)
            counted = bool((y != IGNORE_INDEX).any())
            values.append(F.cross_entropy(f, y) if counted else f.new_zeros(()))
    return torch.stack(values)


@kinds
@given(shape=shapes, seed=seeds)
def test_per_sample_values_are_those_of_torch(kind, shape, seed):
    loss, outputs, targets = draw_case(kind, shape, seed)
    torch.testing.assert_close(loss.per_sample(outputs, targets), reference(kind, outputs, targets))


@kinds
@given(shape=shapes, seed=seeds, columns=st.integers(1, 3))
def test_derivatives_are_those_of_autograd(kind, shape, seed, columns):
    loss, outputs, targets = draw_case(kind, shape, seed)
    leaf = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.per_sample(leaf, targets).sum(), leaf)
    torch.testing.assert_close(loss.residual(outputs, targets), gradient, rtol=1e-10, atol=1e-13)

    m = outputs.shape[0]
    curvature = []
    for f, y in zip(outputs, targets, strict=True):

        def single(flat, f=f, y=y):
            return loss.per_sample(flat.reshape(1, *f.shape), y.unsqueeze(0))[0]

        curvature.append(hessian(single)(f.reshape(-1)))
    curvature = torch.stack(curvature)  # Λ: (m, O, O)
    o = curvature.shape[1]
    block = normal(m, o, columns, seed=seed + 2)
    torch.testing.assert_close(loss.hessian_apply(outputs, targets, block), curvature @ block, rtol=1e-8, atol=1e-10)
    half = loss.factor_transpose(outputs, targets, block)
    assert half.shape == block.shape
    expected = block.transpose(1, 2) @ curvature @ block
    torch.testing.assert_close(half.transpose(1, 2) @ half, expected, rtol=1e-8, atol=1e-8)


@given(shape=shapes, seed=seeds)
def test_both_places_of_the_class_axis_agree(shape, seed):
    m, t, c = shape
    last = normal(m, t + c, c, seed=seed)
    targets = labels(m, t + c, classes=c, seed=seed, ignored=0.2)
    second, loss = last.movedim(-1, 1), CrossEntropy()
    torch.testing.assert_close(loss.per_sample(second, targets), loss.per_sample(last, targets))
    torch.testing.assert_close(loss.residual(second, targets).movedim(1, -1), loss.residual(last, targets))
    after = normal(m, t + c, c, seed=seed + 1)
    torch.testing.assert_close(
        loss.divergence(second, after.movedim(-1, 1), targets), loss.divergence(last, after, targets)
    )


def test_causal_labels_are_shifted_by_one():
    outputs, targets = normal(2, 4, 3, seed=0), torch.tensor([[0, 1, 2, 1], [2, IGNORE_INDEX, 1, IGNORE_INDEX]])
    log_p = outputs.log_softmax(-1)
    by_hand = torch.stack([-(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[0, 2, 1]) / 3, -log_p[1, 1, 1]])
    loss = CrossEntropy(shift=True)
    torch.testing.assert_close(loss.per_sample(outputs, targets), by_hand)
    assert loss.residual(outputs, targets)[:, -1].eq(0).all()
    _, aligned = loss.aligned(outputs, targets)
    assert aligned.tolist() == [[1, 2, 1, -100], [-100, 1, -100, -100]]


@given(seed=seeds)
def test_concave_parts_of_a_custom_loss_are_dropped(seed):
    """sin(f₀)² + f₁² has curvature of either sign in its first output."""
    loss = CustomLoss(lambda f, y: f[:, 0].sin().square() + f[:, 1].square() * y)
    outputs, targets = normal(4, 2, seed=seed), torch.rand(4, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64).expand(4, 2, 2)
    applied = loss.hessian_apply(outputs, targets, eye)
    expected = torch.stack([(2 * (2 * outputs[:, 0]).cos()).clamp_min(0), 2 * targets], 1)
    torch.testing.assert_close(applied, torch.diag_embed(expected), atol=1e-10, rtol=1e-8)
    half = loss.factor_transpose(outputs, targets, eye)
    torch.testing.assert_close(half.transpose(1, 2) @ half, applied, atol=1e-10, rtol=1e-8)


# ------------------------------------------------------------------ the best constant


@given(counts=st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(sum))
def test_level_of_class_labels_is_the_entropy_of_their_frequencies(counts):
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    total = sum(counts)
    entropy = -sum(k / total * math.log(k / total) for k in counts if k)
    level = CrossEntropy().constant_level(torch.zeros(1, len(counts)), targets)
    if sum(k > 0 for k in counts) == 1:  # a constant is perfect here, so it is guessing that a run is held against
        assert level == pytest.approx(math.log(len(counts)), rel=1e-12)
        return
    assert level == pytest.approx(entropy, rel=1e-12, abs=1e-14)
    best = torch.tensor(counts).double().log().clamp_min(-1e9).expand(total, -1)
    assert float(CrossEntropy().per_sample(best, targets).mean()) == pytest.approx(level, rel=1e-9, abs=1e-12)


@given(shape=shapes, seed=seeds, shift=st.booleans())
def test_level_of_sequences_is_the_least_any_constant_reaches(shape, seed, shift):
    m, t, c = shape
    loss = CrossEntropy(shift=shift)
    targets = labels(m, t + 1, classes=c, seed=seed, ignored=0.5)
    outputs = torch.zeros(1, t + 1, c, dtype=torch.float64)
    level = loss.constant_level(outputs, targets)
    _, seen = loss.aligned(outputs.expand(m, -1, -1), targets)
    weight = torch.zeros(c, dtype=torch.float64)
    for row in seen:
        used = row[row != IGNORE_INDEX]
        for label in used:
            weight[label] += 1 / len(used)
    if int((weight > 0).sum()) == 1:
        assert level == pytest.approx(math.log(c) * float(weight.sum()) / m, rel=1e-9)
        return
    constant = weight.log().clamp_min(-1e6).expand(m, t + 1, c)
    reached = float(loss.per_sample(constant, targets).mean())
    assert level == pytest.approx(reached, rel=1e-9, abs=1e-12)
    other = normal(c, seed=seed + 1).expand(m, t + 1, c)
    assert float(loss.per_sample(other, targets).mean()) >= level - 1e-12


def test_level_of_tokens_is_their_unigram_entropy():
    tokens = torch.tensor([[0, 1, 1, 2], [3, 1, 0, 1]])
    level = CrossEntropy(shift=True).constant_level(torch.zeros(1, 4, 4), tokens)  # 1 1 2 1 0 1: the first are context
    assert level == pytest.approx(-(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(1 / 6)))


@given(shape=shapes, seed=seeds)
def test_level_of_regression_is_the_variance(shape, seed):
    targets = normal(*shape, seed=seed)
    loss = SquaredError()
    level = loss.constant_level(targets[:1], targets)
    best = targets.mean(0, keepdim=True).expand_as(targets)
    assert level == pytest.approx(float(loss.per_sample(best, targets).mean()), rel=1e-12, abs=1e-12)


@given(seed=seeds)
def test_level_of_a_robust_loss_is_found(seed):
    """Huber's loss has no curvature far out, and the absolute error none at all: its best constant is the median."""
    targets = normal(31, 2, seed=seed)
    median = targets.median(0).values
    absolute = CustomLoss(lambda f, y: (f - y).abs().sum(1))
    least = float(absolute.per_sample(median.expand_as(targets), targets).mean())
    assert absolute.constant_level(torch.zeros(1, 2), targets) == pytest.approx(least, rel=0.02)
    huber = CustomLoss(lambda f, y: F.huber_loss(f, y, reduction="none").sum(1))
    level = huber.constant_level(torch.full((1, 2), 50.0), targets)
    grid = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    columns = F.huber_loss(grid[:, None, None].expand(-1, 31, 2), targets.expand(3001, -1, -1), reduction="none").mean(
        1
    )
    assert level == pytest.approx(float(columns.min(0).values.sum()), abs=1e-5)


@given(seed=seeds)
def test_level_of_a_custom_loss_is_found(seed):
    """For Poisson regression the best constant is the log of the mean count."""
    targets = torch.randint(0, 9, (40, 2), generator=torch.Generator().manual_seed(seed)).float()

    def poisson(outputs, y):
        return (outputs.exp() - y * outputs).sum(1)

    mean = targets.double().mean(0)
    expected = float((mean - mean * mean.log()).sum())
    level = CustomLoss(poisson).constant_level(torch.zeros(3, 2), targets)
    assert level == pytest.approx(expected, rel=1e-7)


def test_a_custom_loss_of_integer_labels_has_the_level_of_cross_entropy():
    targets = labels(60, classes=4, seed=0)
    custom = CustomLoss(nn.CrossEntropyLoss(reduction="none"))
    expected = CrossEntropy().constant_level(torch.zeros(1, 4), targets)
    assert custom.constant_level(torch.zeros(1, 4), targets) == pytest.approx(expected, rel=1e-6)


def test_a_custom_loss_of_probabilities_or_rates_is_searched_where_it_is_defined():
    """From zero, where neither logarithm exists, the search would go astray."""
    targets = torch.randint(0, 2, (50, 1), generator=torch.Generator().manual_seed(0)).float()
    mean = float(targets.double().mean())

    def binary(outputs, y):
        return F.binary_cross_entropy(outputs, y, reduction="none").mean(1)

    def rate(outputs, y):
        return (outputs - y * outputs.log()).sum(1)

    entropy = -mean * math.log(mean) - (1 - mean) * math.log(1 - mean)
    start = torch.tensor([[0.4], [0.5]])
    assert CustomLoss(binary).constant_level(start, targets) == pytest.approx(entropy, rel=1e-6)
    assert CustomLoss(rate).constant_level(start, targets) == pytest.approx(mean - mean * math.log(mean), rel=1e-6)


def test_the_best_constant_of_many_outputs():
    """Cross-entropy of every pixel of a map, with a loss of overlap that couples them, against a gradient method."""
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (40, 8, 8), generator=g)
    targets[:, :4] = 1

    def overlap(outputs, y):
        p, hot = outputs.softmax(1), F.one_hot(y, 3).movedim(-1, 1).to(outputs)
        shared = 1 - 2 * (p * hot).sum((1, 2, 3)) / (p + hot).sum((1, 2, 3))
        return shared + F.cross_entropy(outputs, y, reduction="none").mean((1, 2))

    level = CustomLoss(overlap).constant_level(torch.randn(2, 3, 8, 8, generator=g), targets)
    best = torch.zeros(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([best], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        search.zero_grad()
        value = overlap(best.expand(40, 3, 8, 8), targets).mean()
        value.backward()
        return value

    search.step(closure)
    assert level == pytest.approx(float(closure()), abs=1e-4)


def test_the_best_constant_is_searched_where_the_outputs_are():
    """On an accelerator NumPy is given copies; a distance has no second derivative where a constant meets a target."""
    targets = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0], [2.0, 0.5]])

    def distance(outputs, y):
        return (outputs - y).norm(dim=1)

    level = CustomLoss(distance).constant_level(targets[:1].as_subclass(Elsewhere), targets.as_subclass(Elsewhere))
    assert 0 < level <= float(distance(torch.zeros(5, 2), targets).mean()) + 1e-6


class Elsewhere(torch.Tensor):
    """A tensor that NumPy cannot read before it is copied to the CPU, as those of an accelerator."""

    def cpu(self, *args, **kwargs):
        return self.as_subclass(torch.Tensor)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")


@pytest.mark.parametrize("function", [lambda f, y: f.sum(1), lambda f, y: f[:, 0].log()])
def test_a_custom_loss_without_a_best_constant_is_refused(function):
    """Negative log-likelihoods of log-probabilities are linear in them: the level would be minus infinity."""
    with pytest.raises(ValueError, match=r"that of '<lambda>' fell from -?\d.* to (-\d|-inf).*Use a loss of raw"):
        CustomLoss(function).constant_level(torch.full((1, 2), 0.7), torch.zeros(9))


# ------------------------------------------------------------------ prediction divergence


@given(shape=shapes, seed=seeds)
def test_divergence_of_classes_is_kullback_leibler(shape, seed):
    m, t, c = shape
    before, after = normal(m, t, c, seed=seed), normal(m, t, c, seed=seed + 1)
    targets = labels(m, t, classes=c, seed=seed, ignored=0.3)
    expected = []
    for i in range(m):
        p, q = before[i].softmax(-1), after[i].softmax(-1)
        kl = (p * (p / q).log()).sum(-1)[targets[i] != IGNORE_INDEX]
        expected.append(kl.mean() if kl.numel() else kl.sum())
    loss = CrossEntropy()
    found = loss.divergence(before, after, targets)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-12)
    assert float(found.min()) >= -1e-12
    assert loss.divergence(before, before, targets).abs().max() < 1e-12


def test_divergence_of_saturated_outputs_is_finite():
    before, after = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert float(CrossEntropy().divergence(before, after, torch.tensor([0]))) == pytest.approx(200)


@given(shape=shapes, seed=seeds)
def test_divergence_of_regression_is_the_mean_square_of_the_change(shape, seed):
    before, after = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    for loss in (SquaredError(), CustomLoss(logistic)):
        found = loss.divergence(before, after, torch.zeros(shape[0]))
        torch.testing.assert_close(found, torch.stack([F.mse_loss(a, b) for a, b in zip(after, before, strict=True)]))
    flat = SquaredError().divergence(before[:, 0, 0], after[:, 0, 0], before)
    torch.testing.assert_close(flat, (after - before)[:, 0, 0].square())


# ------------------------------------------------------------------ names and errors


def test_names_resolve():
    assert isinstance(resolve_loss("mse"), SquaredError)
    assert isinstance(resolve_loss("cross_entropy"), CrossEntropy)
    causal = resolve_loss("causal_lm")
    assert (causal.shift, causal.name) == (True, "causal_lm")
    assert resolve_loss(causal) is causal
    assert isinstance(causal, Loss)
    custom = resolve_loss(logistic)
    assert (type(custom), custom.name) == (CustomLoss, "logistic")
    assert resolve_loss(nn.MSELoss(reduction="none")).name == "MSELoss"


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            "mae",
            ValueError,
            "`loss` of `UnlearningProblem` must be one of 'causal_lm', 'cross_entropy', 'mse'; got 'mae'",
        ),
        ("cross_entrop", ValueError, "Did you mean 'cross_entropy'"),
        (None, TypeError, "'causal_lm', 'mse' or a callable giving per-sample losses; got None"),
    ],
)
def test_a_wrong_name_is_refused(loss, error, message):
    with pytest.raises(error, match=message):
        resolve_loss(loss)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda f, y: f.mean(), ValueError, r"shape \(5,\); '<lambda>' returned shape \(\).*reduction='none'"),
        (lambda f, y: f, ValueError, r"returned shape \(5, 3\)"),
        (lambda f, y: 1.0, TypeError, "`loss` must return a tensor of per-sample losses; '<lambda>' returned float"),
    ],
)
def test_a_callable_must_give_one_loss_a_sample(function, error, message):
    with pytest.raises(error, match=message):
        CustomLoss(function).per_sample(torch.zeros(5, 3), torch.zeros(5))


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "error", "message"),
    [
        (CrossEntropy(), (2, 3), torch.tensor([0.0, 1.0]), TypeError, "targets of `retain` .* got torch.float32.*long"),
        (CrossEntropy(), (2, 3), torch.tensor([True, False]), TypeError, "got torch.bool"),
        (CrossEntropy(), (2, 3), torch.tensor([0, 3]), ValueError, r"in \[0, 2\], as the model has 3 outputs; got 3"),
        (CrossEntropy(), (2, 3), torch.tensor([0, -1]), ValueError, r"in \[0, 2\].*got -1\. Relabel"),
        (CrossEntropy(), (2, 3), torch.tensor([-100, -100]), ValueError, "at least one label; got only -100"),
        (
            CrossEntropy(),
            (2, 4, 3),
            torch.zeros(2, 5).long(),
            ValueError,
            r"shape \(5,\) for outputs of shape \(4, 3\) a",
        ),
        (
            CrossEntropy(),
            (2, 7, 3),
            torch.zeros(2, 5).long(),
            ValueError,
            r"\(7, 3\) a sample\. Positions without a label",
        ),
        (CrossEntropy(), (2,), torch.tensor([0, 1]), ValueError, r"shape \(\) for outputs of shape \(\) a sample"),
        (
            CrossEntropy(shift=True),
            (2, 3),
            torch.tensor([0, 1]),
            ValueError,
            r"token labels of shape \(n, T\) for loss='causal_lm'; got shape \(2,\). Use loss='cross_entropy'",
        ),
        (
            CrossEntropy(shift=True),
            (2, 4, 3),
            torch.tensor([[1, -100, -100, -100]] * 2),
            ValueError,
            "targets of `retain` must hold at least one label after the first position; got none",
        ),
        (CrossEntropy(shift=True), (2, 4, 3), torch.full((2, 4), 9), ValueError, r"in \[0, 2\].*got 9"),
        (SquaredError(), (2, 3), torch.tensor([[1, 2, 3]] * 2), TypeError, r"loss='mse'; got torch.int64.*float\(\)"),
        (SquaredError(), (2, 3), torch.zeros(2), ValueError, r"3 numbers a sample.*shape \(2,\) for outputs \(2, 3\)"),
    ],
)
def test_targets_must_fit_the_outputs(loss, outputs, targets, error, message):
    with pytest.raises(error, match=message):
        loss.check_targets(torch.zeros(outputs), targets, name="retain")


@pytest.mark.filterwarnings("ignore::stabkit.UnlabelledWarning")
def test_targets_that_fit_are_accepted():
    CrossEntropy().check_targets(torch.zeros(1, 3), torch.tensor([0, 2, -100]), name="retain")
    CrossEntropy().check_targets(torch.zeros(1, 3, 5, 4), torch.zeros(7, 5, 4).long(), name="retain")
    CrossEntropy().check_targets(torch.zeros(1, 5, 3), torch.zeros(7, 5).int(), name="retain")
    CrossEntropy(shift=True).check_targets(torch.zeros(1, 2, 3), torch.tensor([[-100, 1]]), name="retain")
    SquaredError().check_targets(torch.zeros(1, 1), torch.zeros(7), name="retain")
