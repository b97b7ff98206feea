"""One layer's spectrum against its row, the densities that are drawn, and the drawing."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from stabkit.heavy_tail import EIGENVALUE_FLOOR, fit_power_law, layer_exponents, layer_spectrum
from stabkit.heavy_tail.layers import gram_eigenvalues, layer_seed, shuffle
from stabkit.heavy_tail.matrices import WeightMatrix, weight_matrices
from stabkit.plots import plot_esd

mpl.use("agg")


@pytest.fixture(scope="module")
def model():
    g = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Conv2d(8, 24, 3), nn.Linear(90, 120, bias=False), nn.Linear(20, 60))
    with torch.no_grad():
        for parameter in net.parameters():
            size = torch.randn(parameter.shape, generator=g)
            parameter.copy_(size * torch.randn(parameter.shape, generator=g).exp())
    return net


@pytest.mark.parametrize("method", ["mle", "hill", "truncated"])
@pytest.mark.parametrize(("layer", "conv"), [("0", "pooled"), ("0[1,2]", "slices"), ("1", "pooled")])
def test_a_spectrum_is_that_of_its_row(model, layer, conv, method):
    row = layer_exponents(model, conv=conv, method=method, shuffles=1, seed=4)[layer]
    found = layer_spectrum(model, layer, conv=conv, method=method, seed=4)
    assert (found.fit.exponent, found.fit.n_tail, found.fit.lambda_min) == (row.exponent, row.n_tail, row.lambda_min)
    assert (found.mp_edge, found.spikes) == (row.mp_edge, row.spikes)
    assert found.eigenvalues.tolist() == sorted(found.eigenvalues.tolist())
    assert len(found.eigenvalues) == found.fit.n
    # The copy drawn is the first one that a row would be compared with.
    (entry,) = (e for e in weight_matrices(model, conv=conv) if isinstance(e, WeightMatrix) and e.name == layer)
    copied = gram_eigenvalues(shuffle(entry.matrices(), layer_seed(4, layer, 1))).numpy()
    assert found.shuffled == pytest.approx(copied[copied > EIGENVALUE_FLOOR], rel=1e-12)


def test_the_copy_drawn_is_the_one_compared_with():
    layer = nn.Linear(256, 512, bias=False)
    with torch.no_grad():  # orthogonal, but for singular values with a Pareto tail
        spread = (1 - (torch.arange(256) + 0.5) / 256) ** -0.25
        layer.weight.copy_(
            torch.linalg.qr(torch.randn(512, 256, generator=torch.Generator().manual_seed(0))).Q * spread
        )
    row = layer_exponents(layer, shuffles=1, seed=4).rows[0]
    found = layer_spectrum(layer, row.name, seed=4)
    assert fit_power_law(found.shuffled).exponent == row.null_low


def test_eigenvalues_are_squared_singular_values(model):
    truth = np.linalg.svd(model[1].weight.detach().double().numpy(), compute_uv=False) ** 2
    assert layer_spectrum(model, "1").eigenvalues == pytest.approx(np.sort(truth), rel=1e-9)


@pytest.mark.parametrize("method", ["mle", "hill", "truncated"])
def test_the_fitted_density_integrates_to_the_tails_share(model, method):
    found = layer_spectrum(model, "0", method=method)
    fit = found.fit
    grid, density = found.tail()
    assert (grid[0], grid[-1]) == (pytest.approx(fit.lambda_min), pytest.approx(fit.lambda_max))
    # The density beyond λ_max follows from its form; together they are the whole tail.
    far = np.geomspace(fit.lambda_max, 1e6 * fit.lambda_max, 40_001)
    cut = fit.cutoff or 0.0
    beyond = density[-1] * (far / far[0]) ** -fit.exponent * np.exp(-cut * (far - far[0]))
    inside = np.trapezoid(density * grid, np.log(grid))
    assert inside + np.trapezoid(beyond * far, np.log(far)) == pytest.approx(fit.n_tail / fit.n, rel=2e-3)
    slope = np.diff(np.log(density) + cut * grid) / np.diff(np.log(grid))
    assert slope == pytest.approx(-fit.exponent, rel=1e-6)


def test_the_drawing_holds_every_eigenvalue_and_the_fit(model):
    found = layer_spectrum(model, "1")
    figure, ax = found.plot()
    try:
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        heights, edges, _ = ax.patches[0].get_data()
        counted = heights * np.diff(edges) * len(found.eigenvalues)
        assert counted == pytest.approx(np.histogram(found.eigenvalues, edges)[0], abs=1e-9)
        assert counted.sum() >= 0.99 * len(found.eigenvalues)
        fit, start, edge = ax.lines
        assert fit.get_ydata() == pytest.approx(found.tail()[1])
        assert start.get_xdata()[0] == found.fit.lambda_min
        assert edge.get_xdata()[0] == found.mp_edge
        assert f"ξ = {found.fit.exponent:.2f} ± {found.fit.standard_error:.2f}" in fit.get_label()
        assert str(found.spikes) in edge.get_label()
        assert ax.get_title() == "1: 90 eigenvalues"
        other, same = plt.subplots()
        assert found.plot(same) == (other, same)
        plt.close(other)
    finally:
        plt.close(figure)


def test_layers_without_a_spectrum():
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(5))
        net[1].weight.zero_()
        net[2].weight[0, 0] = math.nan
    for layer, reason in (
        ("0", "all 5 eigenvalues are equal"),
        ("1", "fewer than 2 eigenvalues"),
        ("2", "NaN or infinite"),
    ):
        found = layer_spectrum(net, layer)
        assert not found.fit.defined
        assert [len(part) for part in found.tail()] == [0, 0]
        with pytest.raises(ValueError, match=rf"`spectrum` of `plot_esd` .*of layer '{layer}': .*{reason}"):
            plot_esd(found)


def test_nothing_is_altered(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    layer_spectrum(model, "0")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("layer", "kwargs", "message"),
    [
        ("3", {}, "`layer` of `layer_spectrum` must be one of '0', '1', '2'; got '3'"),
        ("1", {"conv": "pool"}, "`conv` of `layer_spectrum` must be one of 'pooled', 'slices'; got 'pool'"),
        ("1", {"method": "mel"}, "`method` of `layer_spectrum` .*; got 'mel'"),
        ("1", {"tail": 0.0}, r"`tail` of `layer_spectrum` must be a finite number in \(0, 1\); got 0\.0"),
        ("1", {"tail": 1}, "`tail` of `layer_spectrum` must be a whole number >= 2; got 1"),
        ("1", {"seed": -1}, "`seed` of `layer_spectrum` must be a whole number >= 0; got -1"),
    ],
)
def test_errors_name_what_came(model, layer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer_spectrum(model, layer, **kwargs)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"`model` of `layer_spectrum` must be a torch\.nn\.Module; got dict"):
        layer_spectrum({}, "0")
