"""Settings of the algorithms, their preconditioners against the formula, and how batches are drawn."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stabkit._serialise import to_plain
from stabkit.algorithms import (
    AGU,
    ALGORITHMS,
    SRAGU,
    Algorithm,
    FineTune,
    GradDiff,
    GradientAscent,
    L1Sparse,
    StepPlan,
    StopRule,
    resolve_algorithm,
)
from stabkit.algorithms.agu import normalised_sensitivity
from stabkit.curvature import gradients as gradients_module
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from stabkit.sampling import SAMPLINGS, batch_streams, index_stream, noise_level
from tests.cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")


def small_problem(n_forget=4, n_retain=9):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n_forget + n_retain, 4, generator=g), torch.randint(0, 3, (n_forget + n_retain,), generator=g)
    return UnlearningProblem(MLP(4, 3, hidden=(5,)), (x[:n_forget], y[:n_forget]), (x[n_forget:], y[n_forget:]))


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("kind", ALGORITHMS.values())
@pytest.mark.parametrize(
    ("setting", "value", "error", "message"),
    [
        ("lr", 0, ValueError, r"`lr` of `{}` must be a finite number in \(0, inf\); got 0\. A small"),
        ("lr", -0.1, ValueError, r"got -0\.1"),
        ("lr", float("inf"), ValueError, r"got inf"),
        ("lr", float("nan"), ValueError, r"got nan"),
        ("lr", "0.1", TypeError, r"`lr` of `{}` .* got '0\.1'"),
        ("lr", True, TypeError, r"got True"),
        ("mix", 1.4, ValueError, r"`mix` of `{}` must be a finite number in \[0, 1\]; got 1\.4\. 0 is retain only"),
        ("mix", -1e-9, ValueError, r"got -1e-09"),
        ("mix", None, TypeError, r"got None"),
        ("steps", 0, ValueError, r"`steps` of `{}` must be a whole number >= 1; got 0"),
        (
            "steps",
            10**9,
            ValueError,
            r"`steps` of `{}` must be a whole number in \[1, 1000000\]; got 1000000000\. Each is taken",
        ),
        ("steps", 2.0, TypeError, r"`steps` of `{}` must be a whole number >= 1; got 2\.0"),
        ("batch_size", 0, ValueError, r"`batch_size` of `{}` must be a whole number >= 1; got 0"),
        ("batch_size", "8", TypeError, r"got '8'"),
        ("forget_batch_size", -3, ValueError, r"`forget_batch_size` of `{}` must be a whole number >= 1; got -3"),
        ("sampling", "poison", ValueError, r"`sampling` of `{}` .* got 'poison'. Did you mean 'poisson'"),
        ("sampling", 3, TypeError, r"`sampling` of `{}` must be one of 'poisson', .*; got 3"),
        ("momentum", 1, ValueError, r"`momentum` of `{}` must be a finite number in \[0, 1\); got 1"),
        ("momentum", -0.5, ValueError, r"got -0\.5"),
        ("nesterov", 1, TypeError, "`nesterov` of `{}` must be True or False; got 1"),
        (
            "weight_decay",
            -1e-4,
            ValueError,
            r"`weight_decay` of `{}` must be a finite number in \[0, inf\); got -0\.0001",
        ),
        (
            "max_gradient_norm",
            0.0,
            ValueError,
            r"`max_gradient_norm` of `{}` .*\(0, inf\); got 0\.0\. None clips nothing",
        ),
        ("lr_schedule", "cosin", ValueError, "`lr_schedule` of `{}` .* got 'cosin'. Did you mean 'cosine'"),
        (
            "lr_schedule",
            [1.0, 0.5],
            ValueError,
            "`lr_schedule` of `{}` must hold one factor for each of the .* got 2 of",
        ),
        ("forget_schedule", 0.5, TypeError, r"`forget_schedule` of `{}` must hold one factor a step; got 0\.5"),
        ("forget_schedule", "none", ValueError, "`forget_schedule` of `{}` .* got 'none'"),
        ("forget_every", 1, ValueError, "`forget_every` of `{}` must be a whole number >= 2; got 1. None takes both"),
        ("forget_every", 2.5, TypeError, r"`forget_every` of `{}` .* got 2\.5"),
    ],
)
def test_settings_out_of_their_domain_are_refused(kind, setting, value, error, message):
    with pytest.raises(error, match=message.format(kind.__name__)):
        kind(**{setting: value})
    with pytest.raises(error, match=message.format(kind.__name__)):
        resolve_algorithm(kind.name).replace(**{setting: value})


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_settings_that_do_not_go_together_are_refused(kind):
    with pytest.raises(ValueError, match=f"`momentum` of `{kind.__name__}` must be above 0 with nesterov=True; got 0"):
        kind(nesterov=True, momentum=0.0)
    with pytest.raises(ValueError, match=rf"`lr_schedule\[1\]` of `{kind.__name__}` .*\[0, inf\); got -1\.0"):
        kind(steps=2, lr_schedule=[1.0, -1.0])
    with pytest.raises(ValueError, match=f"`lr_schedule` of `{kind.__name__}` .*each of the 3 steps; got 2 of them"):
        kind(steps=2, lr_schedule=(1.0, 0.5)).replace(steps=3)


@pytest.mark.parametrize("values", [[1, 0.5], (1.0, 0.5), np.array([1.0, 0.5]), torch.tensor([1.0, 0.5])])
def test_a_schedule_may_come_in_many_forms(values):
    algorithm = GradDiff(steps=2, lr_schedule=values)
    assert algorithm.lr_schedule == (1.0, 0.5)
    assert algorithm.settings()["lr_schedule"] == [1.0, 0.5]  # as JSON has it
    assert algorithm.replace(lr=0.3).replace(lr=algorithm.lr) == algorithm


def test_a_plan_is_made_of_schedules_and_cycles():
    assert GradDiff(steps=3).plan() == (StepPlan(),) * 3
    plan = GradDiff(steps=5, forget_every=2, forget_schedule=[1, 2, 3, 4, 5], max_gradient_norm=2).plan()
    assert [(p.retain, p.forget) for p in plan] == [(0, 1), (1, 0), (0, 3), (1, 0), (0, 5)]
    assert {p.max_norm for p in plan} == {2.0}
    warm = [p.lr for p in GradDiff(steps=40, lr_schedule="warmup").plan()]
    assert warm == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 37])
    assert [p.lr for p in GradDiff(steps=4, lr_schedule="linear").plan()] == pytest.approx([1, 0.75, 0.5, 0.25])
    cosine = [p.lr for p in GradDiff(steps=4, lr_schedule="cosine").plan()]
    assert cosine == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


def test_an_algorithm_without_a_name_is_refused_where_it_is_defined():
    with pytest.raises(
        TypeError, match=r"`name` of `Nameless` must be a string, .*; got None. Write name = 'nameless'"
    ):

        class Nameless(Algorithm):
            pass

    with pytest.raises(TypeError, match=r"`name` of `Numbered` must be a string, .*; got 7"):

        class Numbered(Algorithm):
            name = 7


@pytest.mark.parametrize("kind", [AGU, SRAGU])
@pytest.mark.parametrize("setting", ["drift_tolerance", "leakage_bound"])
def test_stop_settings_must_not_be_negative(kind, setting):
    message = rf"`{setting}` of `{kind.__name__}` must be a finite number in \[0, inf\); got -1\. None switches it off"
    with pytest.raises(ValueError, match=message):
        kind(**{setting: -1})
    with pytest.raises(TypeError, match="got 'never'"):
        kind(**{setting: "never"})
    assert kind(**{setting: None}).settings()[setting] is None


def test_fixed_mixes_are_fixed():
    with pytest.raises(ValueError, match=r"`mix` of `FineTune` must be 0, .*; got 0\.5\. Use GradDiff"):
        FineTune(mix=0.5)
    with pytest.raises(ValueError, match=r"`mix` of `L1Sparse` must be 0, .*; got 0\.5\. Use GradDiff"):
        L1Sparse(mix=0.5)
    with pytest.raises(ValueError, match=r"`mix` of `GradientAscent` must be 1, .*; got 0\.5\. .*algorithm='graddiff'"):
        GradientAscent(mix=0.5)
    assert (FineTune().mix, GradientAscent().mix) == (0, 1)


def test_names_resolve_with_settings():
    assert resolve_algorithm("graddiff", lr=0.3, mix=None) == GradDiff(lr=0.3)
    assert resolve_algorithm(AGU(lr=0.3), steps=7, lr=None) == AGU(lr=0.3, steps=7)
    assert resolve_algorithm(GradDiff(mix=0.2), mix=0.0).mix == 0  # 0 is a setting, None is not
    for name, kind in ALGORITHMS.items():
        assert type(resolve_algorithm(name)) is kind
        assert kind.name == name


@pytest.mark.parametrize(
    ("algorithm", "settings", "error", "message"),
    [
        ("gradiff", {}, ValueError, "`algorithm` of `resolve_algorithm` .* got 'gradiff'. Did you mean 'graddiff'"),
        ("gradiff", {"owner": "predict"}, ValueError, "`algorithm` of `predict` must be one of"),
        ("SRAGU", {}, ValueError, "got 'SRAGU'. Did you mean 'sragu'"),
        ("fine_tune", {}, ValueError, "Did you mean 'finetune'"),
        ("xyzzy", {}, ValueError, r"one of 'agu', 'finetune', 'ga', 'graddiff', .* 'sragu'; got 'xyzzy'\.$"),
        (
            "retrain",
            {"owner": "predict"},
            ValueError,
            r"`algorithm` of `predict` must be one of 'agu', .*; got 'retrain'\. Training from scratch ascends no loss "
            r".*, so it is not predicted: call stabkit\.retrain\(problem",
        ),
        ("Retraining", {}, ValueError, "got 'Retraining'. Training from scratch"),
        (GradDiff, {}, TypeError, "must be a name or an Algorithm object; got the class GradDiff. For instance"),
        (None, {"owner": "predict"}, TypeError, "`algorithm` of `predict` must be a name or an Algorithm .*; got None"),
        ("agu", {"learning_rate": 1}, TypeError, "`AGU` has no setting 'learning_rate'; it has batch_size, .*, lr,"),
        (GradDiff(), {"floor": 1}, TypeError, "`GradDiff` has no setting 'floor'"),
    ],
)
def test_unknown_names_and_settings_are_refused(algorithm, settings, error, message):
    with pytest.raises(error, match=message):
        resolve_algorithm(algorithm, **settings)


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_settings_make_the_same_algorithm_again(kind):
    algorithm = kind(lr=0.3, steps=5, batch_size=2, forget_batch_size=1, sampling="poisson", momentum=0.5)
    assert kind(**algorithm.settings()) == algorithm
    with pytest.raises(AttributeError, match="lr"):
        algorithm.lr = 1.0


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_numpy_settings_become_plain_ones(kind):
    """A report holds them as JSON."""
    algorithm = kind(lr=np.float32(0.5), steps=np.int64(5), batch_size=np.int32(3), momentum=np.float64(0.25))
    assert to_plain(algorithm.settings())["steps"] == 5
    assert {type(algorithm.lr), type(algorithm.steps), type(algorithm.momentum)} == {float, int}
    if kind is AGU:
        assert type(AGU(drift_tolerance=np.float32(0.5)).drift_tolerance) is float


# ------------------------------------------------------------------ batch sizes


def test_batch_sizes():
    problem = small_problem(n_forget=4, n_retain=9)
    assert GradDiff(batch_size=9).batch_sizes(problem) == (9, 4)
    assert GradDiff(batch_size=3).batch_sizes(problem) == (3, 3)
    assert GradDiff(batch_size=3, forget_batch_size=4).batch_sizes(problem) == (3, 4)
    assert GradientAscent(batch_size=64).batch_sizes(problem) == (9, 4)  # it never draws retain samples
    assert FineTune(batch_size=3, forget_batch_size=64).batch_sizes(problem) == (3, 4)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (GradDiff(batch_size=10), "`batch_size` of `GradDiff` must be at most the retain set's 9 samples; got 10"),
        (FineTune(batch_size=64), "`batch_size` of `FineTune` must be at most the retain set's 9 samples; got 64"),
        (
            AGU(batch_size=2, forget_batch_size=5),
            "`forget_batch_size` of `AGU` must be at most the forget set's 4 samples; got 5",
        ),
    ],
)
def test_a_batch_larger_than_its_set_is_refused(algorithm, message):
    with pytest.raises(ValueError, match=message):
        algorithm.batch_sizes(small_problem(n_forget=4, n_retain=9))


# ------------------------------------------------------------------ stop rule


def test_a_stop_rule_decides_elementwise():
    drift, leakage = torch.tensor([1e-9, 1e-3, 1.0, float("nan")]), torch.tensor([0.0, 0.5, 2.0, float("nan")])
    assert StopRule().decide(drift, leakage).tolist() == [False] * 4
    assert not StopRule().active
    assert StopRule(drift_tolerance=1e-3).decide(drift, None).tolist() == [True, False, False, False]
    assert StopRule(drift_tolerance=1e-3).decide(drift, None, moves=False).tolist() == [False] * 4
    assert StopRule(leakage_bound=0.5).decide(drift, leakage).tolist() == [False, False, True, False]
    assert StopRule(leakage_bound=0.5).decide(drift, None).tolist() == [False] * 4
    both = StopRule(drift_tolerance=1e-3, leakage_bound=0.5)
    assert both.active
    assert both.decide(drift, leakage).tolist() == [True, False, True, False]
    assert AGU(drift_tolerance=0.1, leakage_bound=2).stop_rule() == StopRule(drift_tolerance=0.1, leakage_bound=2.0)
    for algorithm in (GradDiff(), FineTune(), GradientAscent()):
        assert not algorithm.stop_rule().active


# ------------------------------------------------------------------ preconditioners


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_agu_is_the_mean_absolute_gradient_of_each_forget_sample(case, monkeypatch):
    problem = case.problem()
    leaf = problem.vector().requires_grad_()
    total = torch.zeros_like(leaf)
    for i in range(problem.forget.size):
        inputs, target = problem.forget.batch(torch.tensor([i]))
        loss = problem.loss.per_sample(problem.outputs(problem.unflatten(leaf), inputs), target)
        (gradient,) = torch.autograd.grad(loss[0], leaf)
        total += gradient.abs()
    expected = total / total.max()
    found = AGU().preconditioner(problem)
    torch.testing.assert_close(found.diagonal, expected.detach(), rtol=1e-9, atol=1e-12)
    assert float(found.diagonal.max()) == 1
    monkeypatch.setattr(gradients_module, "GRADIENT_BYTES", 2 * 8 * problem.size)  # one sample at a time
    torch.testing.assert_close(normalised_sensitivity(problem), expected.detach(), rtol=1e-9, atol=1e-12)
    assert AGU().preconditioner_cost(problem) == problem.forget.size
    assert GradDiff().preconditioner_cost(problem) == 0
    assert isinstance(GradDiff().preconditioner(problem), Identity)


def test_agu_needs_a_gradient():
    x = torch.randn(6, 3, generator=seeded(0))
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    problem = UnlearningProblem(model, (x[:2], torch.zeros(2, 2)), (x[2:], torch.ones(4, 2)), loss="mse")
    with pytest.raises(ValueError, match=r"forget set's gradients must not all be zero for AGU; got .* of 0"):
        AGU().preconditioner(problem)


@given(seed=st.integers(0, 999), columns=st.integers(1, 3))
def test_a_preconditioner_is_the_square_of_its_root(seed, columns):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(5, generator=g)
    for vectors in (torch.randn(5, generator=g), torch.randn(5, columns, generator=g).double()):
        for preconditioner, dense in ((Diagonal(p), p.diag()), (Identity(), torch.eye(5))):
            twice = preconditioner.sqrt(preconditioner.sqrt(vectors))
            torch.testing.assert_close(twice, preconditioner.apply(vectors))
            torch.testing.assert_close(preconditioner.apply(vectors), dense.to(vectors.dtype) @ vectors)


@pytest.mark.parametrize(("entry", "shown"), [(-0.5, "-0.5"), (float("nan"), "nan")])
def test_a_diagonal_must_be_finite_and_not_negative(entry, shown):
    with pytest.raises(ValueError, match=rf"`diagonal` of `Diagonal` .* smallest entry of {shown}"):
        Diagonal(torch.tensor([1.0, entry]))
    with pytest.raises(ValueError, match="`diagonal` of `Diagonal` must be finite"):
        Diagonal(torch.tensor([1.0, float("inf")]))


# ------------------------------------------------------------------ sampling


def take(stream, count):
    return list(itertools.islice(stream, count))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@given(size=st.integers(1, 30), data=st.data(), seed=st.integers(0, 10**6))
def test_without_replacement_an_epoch_has_no_repeats(size, data, seed):
    batch = data.draw(st.integers(1, size))
    stream = index_stream(size, batch, "without_replacement", seeded(seed))
    for _ in range(3):
        epoch = torch.cat(take(stream, size // batch)).tolist()
        assert len(epoch) == len(set(epoch)) == size // batch * batch
        assert set(epoch) <= set(range(size))


@given(size=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_with_replacement_every_batch_is_full(size, batch, seed):
    for indices in take(index_stream(size, batch, "with_replacement", seeded(seed)), 5):
        assert indices.shape == (batch,)
        assert 0 <= int(indices.min()) <= int(indices.max()) < size


def frequencies_fit(counts, share, draws):
    """Every index is drawn as often as it should be, within 5 standard errors."""
    error = (share * (1 - share) / draws) ** 0.5
    assert float((counts / draws - share).abs().max()) < 5 * error


@pytest.mark.parametrize("sampling", ["without_replacement", "poisson"])
def test_every_index_enters_at_the_rate_of_the_batch(sampling):
    size, batch, draws = 12, 5, 6000
    counts, lengths = torch.zeros(size), []
    for indices in take(index_stream(size, batch, sampling, seeded(0)), draws):
        assert len(set(indices.tolist())) == indices.numel()
        counts[indices] += 1
        lengths.append(indices.numel())
    frequencies_fit(counts, batch / size, draws)
    variance = size * (batch / size) * (1 - batch / size) if sampling == "poisson" else 0.0
    assert np.var(lengths) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("population", "batch"), [(9, 4), (40, 7), (5, 5), (6, 1)])
def test_variance_of_a_batch_mean_is_the_noise_level(sampling, population, batch):
    """c(B, n) times the samples' covariance, or under Poisson sampling their second moment (table under T6)."""
    draws = 4000
    values = torch.randn(population, generator=seeded(5), dtype=torch.float64) + 1
    means = []
    for seed in range(draws):  # a fresh stream each time: within an epoch, batches are not independent
        (indices,) = take(index_stream(population, batch, sampling, seeded(seed)), 1)
        means.append(float(values[indices].sum()) / batch)
    means = np.array(means)
    spread = values.square().mean() if sampling == "poisson" else values.var(unbiased=False)
    expected = noise_level(batch, population, sampling) * float(spread)
    error = np.std((means - means.mean()) ** 2) / np.sqrt(draws)
    assert abs(means.var() - expected) <= 5 * error + 1e-12
    assert abs(means.mean() - float(values.mean())) <= 5 * means.std() / np.sqrt(draws) + 1e-12


@given(batch=st.integers(1, 50), extra=st.integers(0, 100))
def test_noise_levels_are_ordered(batch, extra):
    """Drawing without replacement is never noisier than with it, and a full batch has no noise."""
    n = batch + extra
    without = noise_level(batch, n, "without_replacement")
    assert 0 <= without <= noise_level(batch, n, "with_replacement") == 1 / batch
    assert 0 <= noise_level(batch, n, "poisson") <= 1 / batch
    if extra == 0:
        assert without == noise_level(batch, n, "poisson") == 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_streams_repeat_with_their_seed_and_are_independent(sampling):
    def draw(seed):
        retain, forget = batch_streams((20, 20), (8, 8), sampling, seed)
        return take(retain, 400), take(forget, 400)

    def same(left, right):
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

    first, again, other = draw(3), draw(3), draw(4)
    assert same(first[0], again[0])
    assert same(first[1], again[1])
    streams = [first[0], first[1], other[0], other[1]]
    hits = [torch.stack([torch.zeros(20).index_fill(0, i, 1.0) for i in stream]) for stream in streams]
    for a, b in itertools.combinations(range(4), 2):
        assert not same(streams[a], streams[b])
        joint = float((hits[a] * hits[b]).mean())  # the share of (step, index) pairs that both streams hold
        product = float(hits[a].mean() * hits[b].mean())
        assert joint == pytest.approx(product, abs=5 * (product * (1 - product) / 8000) ** 0.5)


def test_one_stream_does_not_move_with_the_other():
    """Drawing from the forget stream leaves the retain stream as it is."""
    retain, forget = batch_streams((20, 9), (8, 3), "without_replacement", 1)
    alone, _ = batch_streams((20, 4), (8, 2), "without_replacement", 1)
    for _ in range(10):
        next(forget)
        assert torch.equal(next(retain), next(alone))


def test_a_class_name_is_no_name_but_leads_to_it():
    for kind, name in (("GradientAscent", "ga"), ("SFROn", "sfr_on"), ("finetune".title(), "finetune")):
        with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
            resolve_algorithm(kind)
