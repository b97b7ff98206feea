"""Signal-plus-noise data, its network, and the closed forms against automatic differentiation (theory §10, §11: 11)."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.func import functional_call, hessian

from stabkit.coherence import coherence
from stabkit.curvature import curvature_gram, linearise
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.synthetic import (
    SignalNoiseCNN,
    fit,
    signal_noise_basis,
    signal_noise_data,
    signal_noise_factors,
    signal_noise_gram,
    split_signal_noise,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SNRS = (0.1, 0.25, 0.6, 1.5, 4.0)
SEEDS = range(6)


@st.composite
def problems(draw, power=None, low=2):
    """A network with weights of order one, and data that fit it, in float64."""
    d = draw(st.integers(2, 6))
    seed = draw(st.integers(0, 10_000))
    data = signal_noise_data(
        draw(st.integers(low, 7)),
        dimension=d,
        signal=draw(st.sampled_from((0.3, 1.0, 3.0))),
        noise=draw(st.sampled_from((0.2, 1.0))),
        label_noise=draw(st.sampled_from((0.0, 0.4))),
        seed=seed,
        dtype=torch.float64,
    )
    q = draw(st.integers(1, 3)) if power is None else power
    model = SignalNoiseCNN(d, filters=draw(st.integers(1, 4)), init=0.7, power=q, seed=seed + 1).double()
    return model, data


def margin(model, filters, x):
    """f of one sample, written as the model is defined."""
    total = 0.0
    for j, sign in ((0, -1.0), (1, 1.0)):
        for w in filters[j]:
            for patch in x:
                total = total + sign * torch.clamp(w @ patch, min=0) ** model.power / filters.shape[1]
    return total


def logistic(model, filters, x, y):
    return F.softplus(-(2.0 * y - 1) * margin(model, filters, x))


# ---------------------------------------------------------------------------------------------------------------- data


@given(st.integers(1, 30), st.integers(2, 12), st.integers(0, 1000), st.booleans())
def test_a_sample_is_a_signal_and_noise_orthogonal_to_it(samples, dimension, seed, turned):
    direction = torch.randn(dimension, generator=torch.Generator().manual_seed(seed)) if turned else None
    data = signal_noise_data(
        samples, dimension=dimension, signal=1.7, noise=0.6, label_noise=0.3, direction=direction, seed=seed
    )
    assert data.x.shape == (samples, 2, dimension)
    rows = torch.arange(samples)
    signal, noise = data.x[rows, data.signal_patch], data.x[rows, 1 - data.signal_patch]
    sign = torch.where(data.flipped, -1.0, 1.0) * (2.0 * data.y - 1)
    torch.testing.assert_close(signal, sign.unsqueeze(1) * data.mu)
    torch.testing.assert_close(noise @ data.mu, torch.zeros(samples), rtol=0, atol=1e-5)
    assert data.snr == pytest.approx(1.7 / (0.6 * math.sqrt(dimension)))
    assert float(data.mu.norm()) == pytest.approx(1.7)
    if turned:
        assert float(F.cosine_similarity(data.mu, direction, dim=0)) == pytest.approx(1)


def test_noise_labels_and_places_are_distributed_as_stated():
    n, d = 20_000, 4
    data = signal_noise_data(n, dimension=d, signal=1.0, noise=2.0, label_noise=0.2, seed=3, dtype=torch.float64)
    noise = data.x[torch.arange(n), 1 - data.signal_patch]
    expected = 4 * torch.diag(torch.tensor([0.0, 1, 1, 1], dtype=torch.float64))
    # Standard errors: 4 √(2/n) of a variance, √(p(1-p)/n) of a share.
    torch.testing.assert_close(noise.T @ noise / n, expected, rtol=0, atol=5 * 4 * math.sqrt(2 / n))
    for share, truth in ((data.flipped, 0.2), (data.y, 0.5), (data.signal_patch, 0.5)):
        assert float(share.double().mean()) == pytest.approx(truth, abs=5 * math.sqrt(truth * (1 - truth) / n))


def test_one_seed_draws_the_same_at_every_level():
    a, b = (signal_noise_data(9, dimension=5, signal=s, noise=p, seed=4) for s, p in ((1.0, 0.5), (2.0, 1.5)))
    rows = torch.arange(9)
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.signal_patch, b.signal_patch)
    torch.testing.assert_close(3 * a.x[rows, 1 - a.signal_patch], b.x[rows, 1 - b.signal_patch])
    other = signal_noise_data(9, dimension=5, signal=1.0, noise=0.5, seed=5)
    assert not torch.equal(a.x, other.x)


@pytest.mark.parametrize("forget", ["random", "class", "flipped"])
def test_a_split_shares_out_every_sample_once(forget):
    data = signal_noise_data(60, dimension=3, signal=1.0, noise=1.0, label_noise=0.2, seed=6)
    parts = split_signal_noise(data, forget=forget, share=0.25, label=0, test_share=0.2, seed=7)
    assert parts.test.samples == 12
    together = torch.cat([parts.forget.x, parts.retain.x, parts.test.x]).flatten(1)
    assert torch.equal(together.unique(dim=0), data.x.flatten(1).unique(dim=0))
    if forget == "random":
        assert parts.forget.samples == 12
        other = split_signal_noise(data, share=0.25, seed=8)
        assert not torch.equal(other.forget.x, parts.forget.x)
    elif forget == "class":
        assert set(parts.forget.y.tolist()) == {0}
        assert set(parts.retain.y.tolist()) == {1}
    else:
        assert bool(parts.forget.flipped.all())
        assert not bool(parts.retain.flipped.any())


# --------------------------------------------------------------------------------------------------------------- model


@given(problems())
def test_cross_entropy_is_the_logistic_loss_of_the_margin(problem):
    model, data = problem
    outputs = model(data.x)
    ours = F.cross_entropy(outputs, data.y, reduction="none")
    truth = torch.stack([logistic(model, model.filters, x, y) for x, y in zip(data.x, data.y, strict=True)])
    torch.testing.assert_close(ours, truth, **EXACT)
    torch.testing.assert_close(
        outputs[:, 1] - outputs[:, 0], torch.stack([margin(model, model.filters, x) for x in data.x])
    )


def test_weights_follow_the_seed():
    a, b, c = (SignalNoiseCNN(4, filters=3, init=0.5, seed=s).filters for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    wide = SignalNoiseCNN(200, filters=50, init=0.5).filters
    assert float(wide.detach().std()) == pytest.approx(0.5, rel=0.02)


def test_fit_reaches_its_target_in_a_new_model():
    data = signal_noise_data(30, dimension=40, signal=1.0, noise=0.2, seed=0)
    model = SignalNoiseCNN(40, filters=5)
    before, state = model.filters.detach().clone(), torch.get_rng_state()
    trained = fit(model, data.x, data.y, target=0.1)
    assert torch.equal(model.filters, before)
    assert model.filters.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    loss = F.cross_entropy(trained(data.x), data.y).item()
    assert 0.09 < loss <= 0.1  # by small steps, so not far past it
    assert torch.equal(fit(model, data.x, data.y, target=0.1).filters, trained.filters)
    smooth = fit(SignalNoiseCNN(40, filters=5, init=0.1, power=2), data.x, data.y, target=0.1, lr=0.5)
    assert F.cross_entropy(smooth(data.x), data.y).item() <= 0.1


# --------------------------------------------------------------------------------------------------------- closed forms


@given(problems(power=1))
def test_factors_are_the_hessian_of_every_sample(problem):
    model, data = problem
    found = signal_noise_factors(model, data.x, data.y)
    size = model.filters.numel()
    assert found.factors.shape == (data.samples, 1, size)
    for i, (x, y) in enumerate(zip(data.x, data.y, strict=True)):

        def loss(theta, x=x, y=y):
            outputs = functional_call(model, {"filters": theta.view_as(model.filters)}, (x.unsqueeze(0),))
            return F.cross_entropy(outputs, y.unsqueeze(0))

        theta = model.filters.detach().reshape(-1)
        torch.testing.assert_close(found.matrices()[i], hessian(loss)(theta), **EXACT)
        torch.testing.assert_close(found.gradients[i], torch.func.grad(loss)(theta), **EXACT)


@given(problems(low=4))
@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_the_library_finds_the_same_curvature(problem):
    model, data = problem
    problem = UnlearningProblem(model, (data.x[:2], data.y[:2]), (data.x[2:], data.y[2:]))
    basis = signal_noise_basis(model, data.x)
    sets = [slice(0, 2), slice(2, None)]
    ours = [signal_noise_factors(model, data.x[s], data.y[s], basis=basis) for s in sets]
    network = linearise(problem, Identity(), rank=100, retain_samples=None, forget_samples=None)
    theirs = [part.factors(problem.loss) for part in (network.forget, network.retain)]
    scale = max(float(part.factors.square().sum()) for part in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert a.population == b.population
        small = 1e-9 * scale
        torch.testing.assert_close(
            torch.linalg.eigvalsh(a.mean())[-1], torch.linalg.eigvalsh(b.mean())[-1], rtol=1e-7, atol=small
        )
        # Nearly orthogonal gradients' product is exact to that of their norms, and a saturated one to the rounding of 1 - p.
        largest = max(scale, float(a.gradients.square().sum(1).max()))
        torch.testing.assert_close(
            a.gradients @ a.gradients.T, b.gradients @ b.gradients.T, rtol=1e-7, atol=1e-7 * largest
        )
    rows = torch.cat([part.factors.flatten(0, 1) for part in ours])
    gram = curvature_gram(problem, (problem.forget, problem.retain))
    blocks = gram.matrix.reshape(
        2 * (data.samples, gram.rows_per_sample)
    )  # factors are fixed up to a rotation of their rows
    traces = blocks.square().sum((1, 3))
    torch.testing.assert_close(traces, (rows @ rows.T).square(), rtol=1e-8, atol=1e-10 * scale**2)


@given(problems(), st.integers(1, 5))
def test_gram_is_that_of_the_gradients(problem, split):
    model, data = problem
    rows = []
    for x in data.x:
        filters = model.filters.detach().clone().requires_grad_()
        rows.append(torch.autograd.grad(margin(model, filters, x), filters)[0].flatten())
    truth = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(signal_noise_gram(model, data.x), truth, **EXACT)
    cut = min(split, data.samples - 1)
    torch.testing.assert_close(signal_noise_gram(model, data.x[:cut], data.x[cut:]), truth[:cut, cut:], **EXACT)


@given(problems())
def test_the_basis_is_orthonormal_and_loses_nothing(problem):
    model, data = problem
    cut = data.samples // 2
    basis = signal_noise_basis(model, data.x[:cut], data.x[cut:])
    assert basis.shape[1] <= data.samples
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), **EXACT)
    small, whole = (signal_noise_factors(model, data.x, data.y, basis=b) for b in (basis, None))
    torch.testing.assert_close(small.factors @ basis.T, whole.factors, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(small.gradients @ basis.T, whole.gradients, rtol=1e-7, atol=1e-10)


def test_a_network_without_an_active_filter_has_no_curvature():
    data = signal_noise_data(5, dimension=3, signal=1.0, noise=1.0, seed=0)
    model = SignalNoiseCNN(3, filters=2)
    with torch.no_grad():
        model.filters.zero_()
    basis = signal_noise_basis(model, data.x)
    found = signal_noise_factors(model, data.x, data.y, basis=basis)
    assert not bool(found.factors.any())
    assert not bool(found.gradients.any())


# ----------------------------------------------------------------------------------------- coherence and SNR (§11: 11)


def sigma(model, data):
    """σ_R."""
    basis = signal_noise_basis(model, data.x)
    part = signal_noise_factors(model, data.x, data.y, basis=basis)
    return coherence(part, part, mix=0.0, max_pairs=1).retain


def drawn(axis, snr, seed, *, samples=40, dimension=100):
    """The same draws at every SNR, reached by the noise at a fixed signal or by the signal at a fixed noise."""
    root = math.sqrt(dimension)
    signal, noise = (1.0, 1 / (snr * root)) if axis == "noise" else (snr, 1 / root)
    return signal_noise_data(samples, dimension=dimension, signal=signal, noise=noise, seed=seed, dtype=torch.float64)


def rises(table):
    """Whether every step up in SNR raises the mean over seeds, by more than three standard errors of that paired rise."""
    steps = table[:, 1:] - table[:, :-1]
    return bool((steps.mean(0) > 3 * steps.std(0) / math.sqrt(len(table))).all())


@pytest.mark.parametrize("axis", ["noise", "signal"])
def test_expected_coherence_rises_with_the_snr_at_initialisation(axis):
    table = torch.tensor([
        [sigma(SignalNoiseCNN(100, filters=10, seed=s).double(), drawn(axis, snr, s)) for snr in SNRS] for s in SEEDS
    ])
    assert rises(table)


@pytest.mark.parametrize("axis", ["noise", "signal"])
def test_expected_coherence_rises_with_the_snr_after_training(axis):
    def trained(snr, seed):
        data = drawn(axis, snr, seed)
        return sigma(fit(SignalNoiseCNN(100, filters=10, seed=seed).double(), data.x, data.y, target=0.1), data)

    table = torch.tensor([[trained(snr, s) for snr in SNRS] for s in SEEDS])
    assert rises(table)


def test_coherence_sits_on_the_floor_of_the_noise_while_signals_are_weaker_than_it():
    # Below n·SNR² = 1 there is nothing to rise: chance products of noise patches, of size 1/√d, set σ_R.
    def mean(snr):
        return sum(sigma(SignalNoiseCNN(100, filters=10, seed=s).double(), drawn("signal", snr, s)) for s in SEEDS) / 6

    floor = mean(1e-6)
    assert 1.3 < floor < 2.5
    assert mean(0.1 / math.sqrt(40)) == pytest.approx(floor, rel=1e-3)
    assert mean(10 / math.sqrt(40)) > 5 * floor


@pytest.mark.parametrize("snr", [0.5, 1.0, 2.0])
def test_a_wide_network_has_the_expected_coherence_at_initialisation(snr):
    # Half of all filters see a patch: ⟨∇f_i, ∇f_j⟩ is ‖μ‖²/m within a class, 0 between the two, (‖μ‖² + σ_p²d)/m for i = j,
    # and ℓ'' is 1/4 throughout. What is left out, the noise patches' chance products, is of relative size n/√d.
    data = drawn("signal", snr, 0, dimension=4000)
    model = SignalNoiseCNN(4000, filters=300, init=1e-4, seed=1)
    gram = signal_noise_gram(model, data.x)
    found = float(torch.linalg.eigvalsh(gram.abs())[-1] / gram.diagonal().max())
    largest_class = int(torch.bincount(data.y).max())
    assert found == pytest.approx(1 + (largest_class - 1) * snr**2 / (1 + snr**2), rel=0.05)


@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 12))
def test_pure_signal_has_the_coherence_of_its_classes(seed, samples, filters):
    # Every filter is active on one sign of μ alone: S has a block of ones for each class, times the filters active on it.
    data = signal_noise_data(samples, dimension=20, signal=1.0, noise=1e-9, seed=seed, dtype=torch.float64)
    model = SignalNoiseCNN(20, filters=filters, init=1e-6, seed=seed).double()
    along = model.filters.detach().flatten(0, 1) @ data.mu
    active = torch.stack([(along < 0).sum(), (along > 0).sum()])
    count = torch.bincount(data.y, minlength=2)
    present = active * (count > 0)
    assume(int(present.max()) > 0)
    assert sigma(model, data) == pytest.approx(float((active * count).max() / present.max()), rel=1e-4)


@given(problems(power=1), st.sampled_from((0.1, 3.0, 20.0)))
def test_only_the_ratio_of_signal_and_noise_matters(problem, scale):
    # The network is homogeneous: data times c with filters over c are the same run, with step sizes over c².
    model, data = problem
    other = SignalNoiseCNN(data.mu.numel(), filters=model.filters.shape[1]).double()
    with torch.no_grad():
        other.filters.copy_(model.filters / scale)
    one, two = (signal_noise_factors(m, x, data.y).factors for m, x in ((model, data.x), (other, scale * data.x)))
    torch.testing.assert_close(two, scale * one, rtol=1e-7, atol=1e-10)


# -------------------------------------------------------------------------------------------------------------- errors


def small():
    data = signal_noise_data(6, dimension=3, signal=1.0, noise=1.0, seed=0)
    return SignalNoiseCNN(3, filters=2, init=0.5), data


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 0}, ValueError, "`samples` of `signal_noise_data` must be a whole number >= 1; got 0"),
        ({"dimension": 1}, ValueError, "`dimension` of `signal_noise_data` must be a whole number >= 2; got 1"),
        ({"signal": 0.0}, ValueError, "`signal` of `signal_noise_data` must be a finite number in (0, inf); got 0.0"),
        ({"noise": -1.0}, ValueError, "`noise` of `signal_noise_data` must be a finite number in (0, inf); got -1.0"),
        (
            {"label_noise": 1.0},
            ValueError,
            "`label_noise` of `signal_noise_data` must be a finite number in [0, 1); got 1.0",
        ),
        ({"seed": -1}, ValueError, "`seed` of `signal_noise_data` must be a whole number >= 0; got -1"),
        ({"direction": torch.ones(4)}, ValueError, "a vector of 3 numbers and finite length above 0; got shape (4,)"),
        ({"direction": torch.zeros(3)}, ValueError, "got shape (3,) and length 0."),
    ],
)
def test_data_out_of_their_domain_are_errors(changes, error, message):
    arguments = {"samples": 5, "dimension": 3, "signal": 1.0, "noise": 1.0, "seed": 0, **changes}
    with pytest.raises(error, match=re.escape(message)):
        signal_noise_data(arguments.pop("samples"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget": "clas"}, "Did you mean 'class'?"),
        ({"share": 1.0}, "`share` of `split_signal_noise` must be a finite number in (0, 1); got 1.0"),
        ({"label": 2}, "`label` of `split_signal_noise` must be a whole number in [0, 1]; got 2"),
        ({"test_share": 1.0}, "`test_share` of `split_signal_noise` must be a finite number in [0, 1); got 1.0"),
        ({"forget": "flipped"}, "got 'flipped', which chooses 0 of 5"),
    ],
)
def test_splits_out_of_their_domain_are_errors(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split_signal_noise(small()[1], **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": 0}, "`filters` of `SignalNoiseCNN` must be a whole number >= 1; got 0"),
        ({"init": 0.0}, "`init` of `SignalNoiseCNN` must be a finite number in (0, inf); got 0.0. At 0 no filter"),
        ({"power": 0}, "`power` of `SignalNoiseCNN` must be a whole number >= 1; got 0"),
        ({"seed": -2}, "`seed` of `SignalNoiseCNN` must be a whole number >= 0; got -2"),
    ],
)
def test_networks_out_of_their_domain_are_errors(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SignalNoiseCNN(3, **changes)


def test_what_fit_cannot_do_is_an_error():
    model, data = small()
    with pytest.raises(RuntimeError, match=re.escape("reached within 2 steps; got a loss of 0.")):
        fit(model, data.x, data.y, target=1e-6, max_steps=2)
    squared = SignalNoiseCNN(3, filters=2, power=2)
    with pytest.raises(ValueError, match=r"`lr` of `fit` must be given .* got None at power 2"):
        fit(squared, data.x, data.y)
    with pytest.raises(ValueError, match=re.escape("`target` of `fit` must be a finite number in (0, inf); got 0")):
        fit(model, data.x, data.y, target=0.0)


def test_data_that_do_not_fit_the_network_are_errors():
    model, data = small()
    with pytest.raises(
        ValueError, match=re.escape("shape (n, 2, 3) with n >= 1, as the model reads it; got (6, 2, 2)")
    ):
        signal_noise_gram(model, data.x[..., :2])
    with pytest.raises(ValueError, match=re.escape("`x` of `signal_noise_basis` must have shape (n, 2, 3)")):
        signal_noise_basis(model, data.x, data.x[:0])
    with pytest.raises(ValueError, match="at least one set of patches; got none"):
        signal_noise_basis(model)
    with pytest.raises(
        ValueError, match=re.escape("must be 6 labels 0 or 1 of dtype torch.int64, one a sample; got shape (5,)")
    ):
        signal_noise_factors(model, data.x, data.y[:5])
    with pytest.raises(ValueError, match=re.escape("torch.float32, values [0.0, 1.0]")):
        fit(model, data.x, data.y.float())
    with pytest.raises(ValueError, match=re.escape("values [-1, 1]")):
        fit(model, data.x, 2 * data.y - 1)


def test_a_basis_must_hold_every_gradient():
    model, data = small()
    with pytest.raises(ValueError, match=re.escape("must have 12 rows, one for each weight; got shape (11, 2)")):
        signal_noise_factors(model, data.x, data.y, basis=torch.zeros(11, 2))
    narrow = signal_noise_basis(model, data.x[:1])
    with pytest.raises(ValueError, match=r"one that misses (0\.\d+|1) of a squared norm"):
        signal_noise_factors(model, data.x, data.y, basis=narrow)
    assert signal_noise_factors(model, data.x[:1], data.y[:1], basis=narrow, population=9).population == 9
    with pytest.raises(
        ValueError, match=re.escape("`population` of `signal_noise_factors` must be a whole number >= 6; got 2")
    ):
        signal_noise_factors(model, data.x, data.y, population=2)
