"""The spectral gate, its layout over parameters, and the algorithm built on it."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from torch import nn
from torch.nn.utils import parametrizations

from stabkit import ExponentWarning
from stabkit.algorithms.agu import AGU, normalised_sensitivity
from stabkit.algorithms.sragu import SRAGU
from stabkit.heavy_tail import gate_layers, gate_per_parameter, layer_exponents, spectral_gate
from stabkit.problem import UnlearningProblem

WINDOWS = {"floor": st.floats(0, 1), "low": st.floats(1, 3), "span": st.floats(0.1, 8), "width": st.floats(0.05, 3)}


def window(floor, low, span, width):
    return {"floor": floor, "low": low, "high": low + span, "width": width}


def heavy_tailed_(layer, exponent, seed):
    """Give a layer a Pareto spectrum in random directions."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = layer.weight.shape
    k = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q for n in (rows, columns))
    values = (1 - torch.rand(k, generator=g, dtype=torch.float64)) ** (-1 / (exponent - 1))
    with torch.no_grad():
        layer.weight.copy_(0.3 * left @ torch.diag(values.sqrt()) @ right.T)


@pytest.fixture
def model():
    """One layer with a heavy tail, a normalisation layer, and an output layer too small to judge."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(120, 200), nn.ReLU(), nn.LayerNorm(200), nn.Linear(200, 4)).eval()
    heavy_tailed_(net[0], 2.2, 0)
    return net


@pytest.fixture
def problem(model):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(60, 120, generator=g)
    with torch.no_grad():  # the labels are its own predictions, so it is no worse than a constant
        y = model(x).argmax(1)
    return UnlearningProblem(model, (x[:12], y[:12]), (x[12:], y[12:]))


@given(exponent=st.floats(-50, 300), **WINDOWS)
def test_gate_stays_between_floor_and_one(exponent, floor, low, span, width):
    gate = spectral_gate(exponent, **window(floor, low, span, width))
    assert floor <= gate <= 1 or gate == pytest.approx(floor, abs=1e-15)


@given(**WINDOWS)
def test_gate_is_one_at_the_centre_and_symmetric(floor, low, span, width):
    settings_ = window(floor, low, span, width)
    centre = low + span / 2
    assert spectral_gate(centre, **settings_) == pytest.approx(1, abs=1e-12)
    for offset in (0.3, 1.0, 4.0):
        left, right = (spectral_gate(centre + sign * offset, **settings_) for sign in (-1, 1))
        assert left == pytest.approx(right, rel=1e-9, abs=1e-12)


@given(**WINDOWS)
def test_gate_rises_to_the_centre_and_falls_after_it(floor, low, span, width):
    centre = low + span / 2
    grid = torch.linspace(-10, 10, 401, dtype=torch.float64)
    gates = spectral_gate(centre + grid, **window(floor, low, span, width))
    steps = gates.diff()
    assert (steps[:200] >= -1e-12).all()
    assert (steps[200:] <= 1e-12).all()


@given(**WINDOWS)
@settings(max_examples=30, deadline=None)
def test_gate_is_smooth(floor, low, span, width):
    points = torch.linspace(-5, 15, 50, dtype=torch.float64)
    settings_ = window(floor, low, span, width)

    def gate(x):
        return spectral_gate(x, **settings_)

    h = 1e-5
    slope = torch.func.vmap(torch.func.grad(lambda x: gate_unclamped(x, **settings_)))(points)
    numeric = (gate(points + h) - gate(points - h)) / (2 * h)
    assert torch.allclose(slope, numeric, atol=1e-5)
    peak = 1 / (1 + math.exp(-span / (2 * width))) ** 2
    assert slope.abs().max() <= (1 - floor) / (4 * width * peak) + 1e-9  # a logistic's steepest slope is 1/4


def gate_unclamped(x, *, floor, low, high, width):
    """The formula as the documentation states it."""
    centre = (low + high) / 2

    def s(t):
        return 1 / (1 + torch.exp(-(t - low) / width)) / (1 + torch.exp(-(high - t) / width))

    return floor + (1 - floor) * s(x) / s(torch.tensor(centre, dtype=torch.float64))


def test_gate_at_the_edges_and_far_away():
    # At an end the near logistic is 1/2 and the far one 1/(1+e^-8); the centre's value is 1/(1+e^-4)².
    end = 0.1 + 0.9 * 0.5 / (1 + math.exp(-8)) * (1 + math.exp(-4)) ** 2
    assert spectral_gate(2.0) == pytest.approx(end, rel=1e-12)
    assert spectral_gate(6.0) == pytest.approx(end, rel=1e-12)
    assert spectral_gate(44.0) == pytest.approx(0.1, abs=1e-12)
    assert spectral_gate(1.0, floor=0.0, width=0.01) < 1e-40
    assert isinstance(spectral_gate(3.0), float)
    assert spectral_gate(torch.full((2, 3), 3.0)).shape == (2, 3)


@pytest.mark.parametrize(
    ("exponent", "kwargs", "match"),
    [
        (math.nan, {}, r"`exponent` of `spectral_gate` must be finite; got nan"),
        (math.inf, {}, r"`exponent` of `spectral_gate` must be finite; got inf"),
        (3.0, {"floor": 1.2}, r"`floor` of `spectral_gate` .*got 1.2"),
        (3.0, {"width": 0.0}, r"`width` of `spectral_gate` .*got 0.0"),
        (3.0, {"low": 7.0}, r"`high` of `spectral_gate` must be greater than `low`; got low=7, high=6"),
    ],
)
def test_gate_errors_name_what_came(exponent, kwargs, match):
    with pytest.raises(ValueError, match=match):
        spectral_gate(exponent, **kwargs)


def believed(table):
    """The same table with every layer trusted, to test the layout apart from the evidence."""
    data = table.to_dict()
    for row in data["rows"]:
        row.update(trusted=True, reason="")
    return type(table).from_dict(data)


def test_layers_have_their_gate_and_the_rest_is_neutral(model):
    table = believed(layer_exponents(model, shuffles=0))
    gates = gate_per_parameter(model, table)
    expected = {name: spectral_gate(table[name].exponent) for name in ("0", "3")}
    assert set(gates) == {name for name, _ in model.named_parameters()}
    for layer, gate in expected.items():
        for part in ("weight", "bias"):
            assert float(gates[f"{layer}.{part}"]) == pytest.approx(gate, rel=1e-6)
    assert expected["0"] != expected["3"]
    assert float(gates["2.weight"]) == float(gates["2.bias"]) == 1.0


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is stored (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.zeros(outputs))


def test_fused_projections_are_gated_block_by_block():
    model = nn.ModuleDict({"c_attn": Conv1D(72, 24), "attention": nn.MultiheadAttention(24, 3)})
    with torch.no_grad():
        for weight in (model["c_attn"].weight, model["attention"].in_proj_weight):
            weight.mul_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).exp())
    table = believed(layer_exponents(model, shuffles=0))
    gates = gate_per_parameter(model, table)
    for name, parameter in model.named_parameters():
        assert gates[name].expand(parameter.shape).shape == parameter.shape
    for layer, weight, bias, axis in (
        ("c_attn", "c_attn.weight", "c_attn.bias", 1),
        ("attention.in_proj_weight", "attention.in_proj_weight", "attention.in_proj_bias", 0),
    ):
        nus = [spectral_gate(table[f"{layer}[{part}]"].exponent) for part in "qkv"]
        assert len({round(nu, 6) for nu in nus}) == 3
        line = torch.tensor(nus).repeat_interleave(24).float()
        assert torch.allclose(gates[bias], line)
        assert torch.allclose(gates[weight], line.unsqueeze(1 - axis))


def test_interleaved_heads_are_gated_where_they_lie():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 4
            self.query_key_value = nn.Linear(24, 72)

    model = Attention()
    with torch.no_grad():
        model.query_key_value.weight.mul_(torch.randn(72, 24, generator=torch.Generator().manual_seed(5)).exp())
    table = believed(layer_exponents(model, shuffles=0))
    nus = torch.tensor([spectral_gate(row.exponent) for row in table.rows]).float()
    gates = gate_per_parameter(model, table)
    expected = nus.view(1, 3, 1).expand(4, 3, 6).reshape(72)
    assert torch.allclose(gates["query_key_value.bias"], expected)
    assert torch.allclose(gates["query_key_value.weight"], expected.unsqueeze(1))


def test_slices_of_a_convolution_are_gated_by_position():
    model = nn.Conv2d(12, 16, (2, 3))
    table = believed(layer_exponents(model, conv="slices", shuffles=0))
    gates = gate_per_parameter(model, table)
    nus = torch.tensor([spectral_gate(row.exponent) for row in table.rows]).float()
    assert torch.allclose(gates["weight"], nus.view(1, 1, 2, 3))
    assert float(gates["bias"]) == pytest.approx(float(nus.mean()), rel=1e-6)


def test_parametrised_and_recurrent_weights():
    model = nn.ModuleDict({"fc": parametrizations.weight_norm(nn.Linear(20, 30)), "rnn": nn.GRU(20, 10)})
    table = believed(layer_exponents(model, shuffles=0))
    gates = gate_per_parameter(model, table)
    nu = spectral_gate(table["fc"].exponent)
    for name in ("fc.bias", "fc.parametrizations.weight.original0", "fc.parametrizations.weight.original1"):
        assert float(gates[name]) == pytest.approx(nu, rel=1e-6)
    for part in ("ih", "hh"):
        nu = spectral_gate(table[f"rnn.weight_{part}_l0"].exponent)
        assert float(gates[f"rnn.bias_{part}_l0"]) == pytest.approx(nu, rel=1e-6)


def test_untrusted_layers_are_neutral_with_one_warning(model):
    table = layer_exponents(model, shuffles=9)
    assert [row.trusted for row in table.rows] == [True, False]
    match = r"the exponents of 1 of 2 layers cannot be trusted.*'3' \(4 eigenvalues, fewer than 50"
    with pytest.warns(ExponentWarning, match=match) as caught:
        gates = gate_per_parameter(model, table)
    assert len(caught) == 1
    assert float(gates["3.weight"]) == 1.0
    assert float(gates["0.weight"]) == pytest.approx(spectral_gate(table["0"].exponent), rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forced = gate_per_parameter(model, table, untrusted="gate")
    assert float(forced["3.weight"]) == pytest.approx(spectral_gate(table["3"].exponent), rel=1e-6)


def test_undefined_layers_are_neutral_even_when_forced(model):
    with torch.no_grad():
        model[3].weight.zero_()
    table = layer_exponents(model, shuffles=0)
    assert gate_layers(table, untrusted="gate").gates["3"] == 1.0


def test_foreign_exponents_are_refused(model):
    table = layer_exponents(nn.ModuleDict({"other": nn.Linear(9, 9)}), shuffles=0)
    with pytest.raises(ValueError, match=r"must come from this model; got one for 'other\.weight'"):
        gate_per_parameter(model, table)
    with pytest.raises(ValueError, match=r"`untrusted` of `gate_layers` .*got 'ignore'"):
        gate_layers(table, untrusted="ignore")


def test_preconditioner_is_gate_times_sensitivity(problem):
    algorithm = SRAGU(low=2.5)
    with pytest.warns(ExponentWarning, match="1 of 2 layers"):
        diagonal = algorithm.preconditioner(problem).diagonal
    sensitivity = normalised_sensitivity(problem)
    table = algorithm.gates(problem)
    assert table.gates["0"] < 0.9
    gates = {"0": table.gates["0"], "2": 1.0, "3": 1.0}
    expected = torch.cat([
        gates[name.partition(".")[0]] * sensitivity_of.reshape(-1)
        for name, sensitivity_of in problem.unflatten(sensitivity).items()
    ])
    assert torch.allclose(diagonal, expected)
    assert diagonal.dtype == problem.dtype


def test_an_open_gate_is_agu(problem):
    with pytest.warns(ExponentWarning, match="1 of 2 layers"):
        opened = SRAGU(floor=1.0).preconditioner(problem).diagonal
    assert torch.equal(opened, AGU().preconditioner(problem).diagonal)


def test_frozen_parameters_are_left_out(model):
    model[0].weight.requires_grad_(False)
    x = torch.randn(20, 120, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    problem = UnlearningProblem(model, (x[:5], y[:5]), (x[5:], y[5:]))
    with pytest.warns(ExponentWarning, match="1 of 2 layers"):
        assert SRAGU().preconditioner(problem).diagonal.shape == (problem.size,)


def test_gates_say_why(problem):
    table = SRAGU(seed=3).gates(problem)
    assert set(table.gates) == {"0", "3"}
    text = str(table)
    assert f"{table.gates['0']:.3f}" in text
    assert "neutral: 4 eigenvalues, fewer than 50" in text


def test_what_is_applied_is_what_is_shown(problem):
    """untrusted="gate" acts on an exponent of few eigenvalues, and the table, the plot and the report say so."""
    algorithm = SRAGU(untrusted="gate", low=2.5, seed=3)
    diagonal = problem.unflatten(algorithm.preconditioner(problem).diagonal)["3.weight"]
    sensitivity = problem.unflatten(normalised_sensitivity(problem))["3.weight"]
    applied = float((diagonal / sensitivity).nanmean())
    table = algorithm.gates(problem)
    assert not table.exponents["3"].trusted
    assert table.gates["3"] == pytest.approx(applied, rel=1e-4)
    assert table.gates["3"] < 0.99
    line = next(line for line in str(table).splitlines() if line.startswith("3"))
    assert f"{applied:.3f}  gated, though not trusted: 4 eigenvalues, fewer than 50" in line
    assert "neutral" not in str(table)
    figure, ax = table.plot()
    assert [bar.get_width() for bar in ax.patches] == list(table.gates.values())
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [not row.trusted for row in table.exponents.rows]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "3"]
    assert f"ξ = {table.exponents['3'].exponent:.2f}, not trusted" in {text.get_text() for text in ax.texts}
    assert table.plot(ax)[1] is ax
    plt.close(figure)


def test_stops_on_drift_only():
    rule = SRAGU().stop_rule()
    assert rule.drift_tolerance == AGU().drift_tolerance
    assert rule.leakage_bound is None


def test_same_seed_same_gates_and_nothing_altered(model, problem):
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    algorithm = SRAGU(untrusted="gate")
    first, second = (algorithm.preconditioner(problem).diagonal for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"floor": -0.1}, ValueError, r"`floor` of `SRAGU` .*got -0.1"),
        ({"low": 6.0}, ValueError, r"`high` of `SRAGU` must be greater than `low`; got low=6, high=6"),
        ({"high": "six"}, TypeError, r"`high` of `SRAGU` .*got 'six'"),
        ({"width": -1.0}, ValueError, r"`width` of `SRAGU` .*got -1.0"),
        ({"untrusted": "neutrall"}, ValueError, r"`untrusted` of `SRAGU` .*Did you mean 'neutral'"),
        ({"shuffles": -1}, ValueError, r"`shuffles` of `SRAGU` .*got -1"),
        ({"seed": -1}, ValueError, r"`seed` of `SRAGU` .*got -1"),
        ({"lr": 0.0}, ValueError, r"`lr` of `SRAGU` .*got 0.0"),
    ],
)
def test_settings_are_checked(kwargs, error, match):
    with pytest.raises(error, match=match):
        SRAGU(**kwargs)


def test_replace_and_settings():
    changed = SRAGU(floor=0.3).replace(width=1.0)
    assert (changed.floor, changed.width, changed.name) == (0.3, 1.0, "sragu")
    assert SRAGU(**changed.settings()) == changed
