"""Which matrices a network has, their exponents against weightwatcher, and when an exponent is believed."""

import contextlib
import copy
import dataclasses
import io
import json
import logging
import math
import random
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import stabkit.heavy_tail.layers
from stabkit.heavy_tail import LayerExponents, fit_power_law, gate_per_parameter, layer_exponents, layer_spectrum
from stabkit.heavy_tail.layers import gram_eigenvalues, layer_seed, marchenko_pastur, shuffle
from stabkit.heavy_tail.matrices import block_index


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is stored (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.zeros(outputs))


def seeded(build, seed=0):
    """A network with reproducible weights of very unequal sizes, so that exponents differ between its layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.randn_like(parameter).exp())
    return model


def planted(rows, columns, exponent, seed):
    """A linear layer whose squared singular values are a Pareto sample, in random directions."""
    g = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q for n in (rows, columns))
    values = (1 - torch.rand(k, generator=g, dtype=torch.float64)) ** (-1 / (exponent - 1))
    layer = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        layer.weight.copy_(left @ torch.diag(values.sqrt()) @ right.T)
    return layer


def mlp():
    return nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 48, 5),
        nn.Flatten(),
        nn.Linear(192, 80),
        nn.Embedding(90, 24),
    )


def residual_shapes():
    """The convolution shapes of a residual network: stem, 3x3 blocks, strided 1x1 shortcuts, head."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, bias=False),
        nn.Conv2d(64, 64, 3, bias=False),
        nn.Conv2d(64, 128, 3, stride=2, bias=False),
        nn.Conv2d(64, 128, 1, stride=2, bias=False),
        nn.Conv2d(128, 256, 3, bias=False),
        nn.Linear(256, 100),
    )


@pytest.fixture(scope="module")
def weightwatcher_details():
    """A function giving weightwatcher's table of a network, keyed by layer name, in silence."""
    pytest.importorskip("weightwatcher")
    level = logging.root.manager.disable

    def details(model):
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import weightwatcher

            logging.disable(logging.CRITICAL)
            try:
                table = weightwatcher.WeightWatcher(model=copy.deepcopy(model)).analyze(pool=True)
            finally:
                logging.disable(level)
        return {row["longname"]: row for row in table.to_dict("records")}

    return details


@pytest.mark.parametrize("build", [mlp, cnn, residual_shapes])
@pytest.mark.parametrize("seed", [0, 1])
def test_exponents_match_weightwatcher(build, seed, weightwatcher_details):
    model = seeded(build, seed)
    table = layer_exponents(model, shuffles=0)
    reference = weightwatcher_details(model)
    assert set(reference) == set(table.names())
    for row in table.rows:
        theirs = reference[row.name]
        assert row.exponent == pytest.approx(theirs["alpha"], abs=1e-3)
        assert row.standard_error == pytest.approx(theirs["sigma"], abs=1e-3)
        assert row.distance == pytest.approx(theirs["D"], abs=1e-4)
        assert (row.n_tail, row.eigenvalues) == (theirs["num_pl_spikes"], theirs["num_evals"])
        assert row.stable_rank == pytest.approx(theirs["stable_rank"], rel=1e-4)
        if not row.kind.startswith("conv"):  # it divides the eigenvalues of convolutions by 2
            assert row.alpha_weighted == pytest.approx(theirs["alpha_weighted"], abs=2e-3)
            assert row.log_alpha_norm == pytest.approx(theirs["log_alpha_norm"], abs=2e-3)


@given(seed=st.integers(0, 10**6), a=st.integers(1, 40), b=st.integers(1, 40), s=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_gram_eigenvalues_are_squared_singular_values(seed, a, b, s):
    stack = torch.randn(s, a, b, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    expected = torch.linalg.svdvals(stack.detach().double()).square().flatten().sort().values
    assert torch.allclose(gram_eigenvalues(stack), expected, atol=1e-11 * float(expected[-1]) + 1e-14)


def test_gram_in_pieces(monkeypatch):
    stack = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0))
    whole = gram_eigenvalues(stack)
    monkeypatch.setattr("stabkit.heavy_tail.layers.CHUNK", 2 * 7 * 3)
    assert torch.allclose(gram_eigenvalues(stack), whole, rtol=1e-12)


def exponent_of(*matrices):
    return fit_power_law(torch.cat([torch.linalg.svdvals(m.detach().double()).square() for m in matrices])).exponent


def test_fused_attention_is_three_layers():
    model = seeded(lambda: nn.MultiheadAttention(32, 4))
    table = layer_exponents(model, shuffles=0)
    assert table.names() == ["in_proj_weight[q]", "in_proj_weight[k]", "in_proj_weight[v]", "out_proj"]
    for row, block in zip(table.rows, model.in_proj_weight.split(32), strict=False):
        assert row.exponent == pytest.approx(exponent_of(block), rel=1e-6)
        assert row.shape == (32, 32)


def test_separate_attention_projections():
    table = layer_exponents(seeded(lambda: nn.MultiheadAttention(32, 4, kdim=20, vdim=24)), shuffles=0)
    assert table.names() == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]
    assert table["k_proj_weight"].shape == (32, 20)


def test_fused_linear_and_conv1d_projections():
    model = seeded(
        lambda: nn.ModuleDict({"qkv": nn.Linear(24, 72), "c_attn": Conv1D(72, 24), "wide": nn.Linear(24, 72)})
    )
    table = layer_exponents(model, shuffles=0)
    assert table.names() == [f"{n}[{p}]" for n in ("qkv", "c_attn") for p in "qkv"] + ["wide"]
    assert table["qkv[k]"].exponent == pytest.approx(exponent_of(model["qkv"].weight[24:48]), rel=1e-6)
    assert table["c_attn[v]"].exponent == pytest.approx(exponent_of(model["c_attn"].weight[:, 48:]), rel=1e-6)
    assert table["c_attn[v]"].axis == 1


class MegatronAttention(nn.Module):
    def __init__(self, heads=None):
        super().__init__()
        if heads:
            self.num_heads = heads
        self.query_key_value = nn.Linear(24, 72)


def test_projections_interleaved_by_head():
    model = seeded(lambda: MegatronAttention(4))
    table = layer_exponents(model, shuffles=0)
    keys = model.query_key_value.weight.view(4, 3, 6, 24)[:, 1].reshape(24, 24)
    assert table["query_key_value[k]"].exponent == pytest.approx(exponent_of(keys), rel=1e-6)
    unknown = layer_exponents(seeded(MegatronAttention), shuffles=0)
    assert unknown.names() == ["query_key_value"]
    assert "fused q,k,v not separable: number of heads unknown" in unknown.rows[0].flags


@given(heads=st.integers(1, 6), width=st.integers(1, 5))
def test_block_indices_partition_the_axis(heads, width):
    size = 3 * heads * width
    blocks = torch.cat([block_index(size, part, heads) for part in range(3)])
    assert blocks.sort().values.tolist() == list(range(size))


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: nn.Conv1d(6, 10, 4), "conv1d"),
        (lambda: nn.Conv3d(4, 9, (2, 3, 2)), "conv3d"),
        (lambda: nn.ConvTranspose2d(6, 11, 3), "conv_transpose2d"),
        (lambda: nn.ConvTranspose1d(6, 12, 3, groups=2), "conv_transpose1d"),
        (lambda: nn.Conv2d(12, 18, 3, groups=3), "conv2d"),
    ],
)
def test_convolutions_pool_groups_and_positions(build, kind):
    model = seeded(build)
    row = layer_exponents(model, shuffles=0).rows[0]
    groups = model.groups
    blocks = [
        block[:, :, position]
        for block in model.weight.flatten(2).chunk(groups)
        for position in range(model.weight.flatten(2).shape[2])
    ]
    assert row.kind == kind
    assert row.shape == tuple(model.weight.shape)
    assert row.eigenvalues == sum(min(b.shape) for b in blocks)
    assert row.exponent == pytest.approx(exponent_of(*blocks), rel=1e-6)


def test_convolution_slices():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(12, 16, (2, 3)), nn.Conv2d(16, 8, 1)))
    table = layer_exponents(model, conv="slices", shuffles=0)
    assert table.names() == [f"0[{i},{j}]" for i in range(2) for j in range(3)] + ["1"]
    assert table["0[1,2]"].exponent == pytest.approx(exponent_of(model[0].weight[:, :, 1, 2]), rel=1e-6)
    assert table["0[1,2]"].kernel == (1, 2)


def test_depthwise_convolution_is_not_believed():
    row = layer_exponents(seeded(lambda: nn.Conv2d(64, 64, 3, groups=64)), shuffles=0).rows[0]
    assert row.eigenvalues == 64 * 9
    assert row.reason.startswith("one row or column: the matrices are vectors")


def test_recurrent_layers():
    table = layer_exponents(
        seeded(lambda: nn.ModuleDict({"l": nn.LSTM(20, 16, 2), "g": nn.GRUCell(8, 24)})), shuffles=0
    )
    assert table.names() == [f"l.weight_{p}_l{i}" for i in (0, 1) for p in ("ih", "hh")] + [
        "g.weight_ih",
        "g.weight_hh",
    ]
    assert table["l.weight_ih_l0"].shape == (64, 20)
    assert {row.kind for row in table.rows} == {"recurrent"}


def test_tied_and_shared_weights_count_once():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(60, 24)
            self.block = nn.Linear(24, 24)
            self.again = self.block
            self.head = nn.Linear(24, 60, bias=False)
            self.head.weight = self.embed.weight

    table = layer_exponents(Language(), shuffles=0)
    assert table.names() == ["embed", "block"]
    assert dict(table.skipped)["head.weight"] == "tied to 'embed.weight', which is counted"
    assert dict(table.skipped)["again.weight"] == "the same module as 'block'"


class Odd(nn.Module):
    """Everything that has no spectrum to fit."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.table = nn.Parameter(torch.randn(9, 8))
        self.norm = nn.LayerNorm((4, 8))
        self.scale = nn.PReLU(3)
        self.pair = nn.Bilinear(4, 5, 6)
        self.lazy = nn.LazyLinear(7)
        self.integers = nn.Linear(5, 5, bias=False)
        self.integers.weight = nn.Parameter(torch.ones(5, 5, dtype=torch.int32), requires_grad=False)
        self.empty = nn.Linear(0, 4, bias=False)
        self.meta = nn.Linear(5, 5, device="meta")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.hooked = torch.nn.utils.weight_norm(nn.Linear(5, 5))


def test_whatever_is_left_out_is_named_with_its_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Odd()
    table = layer_exponents(model, shuffles=0)
    why = dict(table.skipped)
    assert not table.rows
    assert set(why) == {name for name, _ in model.named_parameters()}
    assert why["token"] == "3-D parameter of Odd, which is no known layer type"
    assert why["table"] == "a parameter of Odd, which is no known layer type"
    assert why["norm.weight"] == "normalisation layer (LayerNorm)"
    assert why["scale.weight"] == "1-D weight"
    assert why["pair.weight"] == "3-D parameter of Bilinear, which is no known layer type"
    assert why["pair.bias"] == "a bias"
    assert why["lazy.weight"] == "not initialised yet: run one batch through the model"
    assert why["integers.weight"] == "dtype int32 has no real spectrum here"
    assert why["empty.weight"] == "empty, shape (4, 0)"
    assert why["meta.weight"] == "on the meta device: load the weights first"
    assert why["hooked.weight_v"].startswith("a hook computes the weight")


@pytest.mark.parametrize("build", [mlp, cnn, lambda: nn.LSTM(9, 5), lambda: nn.TransformerEncoderLayer(12, 3)])
@pytest.mark.parametrize("conv", ["pooled", "slices"])
def test_every_parameter_is_in_a_row_or_left_out(build, conv):
    model = build()
    table = layer_exponents(model, shuffles=0, conv=conv)
    counted, left_out = {row.parameter for row in table.rows}, {name for name, _ in table.skipped}
    assert not counted & left_out
    assert counted | left_out == {name for name, _ in model.named_parameters()}


def test_parametrised_weights_are_read_without_advancing_them():
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(12, 12)), parametrizations.weight_norm(nn.Linear(12, 9))
    )
    model.train()
    before = copy.deepcopy(model.state_dict())
    table = layer_exponents(model, shuffles=1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [row.parameter for row in table.rows] == ["0.weight", "1.weight"]
    assert dict(table.skipped)["1.parametrizations.weight.original0"] == "part of the parametrised '1.weight'"
    assert table.rows[1].exponent == pytest.approx(exponent_of(model[1].weight), rel=1e-6)


def test_nothing_is_altered():
    model = seeded(cnn).train()
    before = copy.deepcopy(model.state_dict())
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    layer_exponents(model, bootstrap=20, shuffles=2)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_seeds_repeat_and_do_not_depend_on_the_selection():
    model = seeded(mlp)
    whole = layer_exponents(model, bootstrap=20, shuffles=3, seed=1)
    assert whole == layer_exponents(model, bootstrap=20, shuffles=3, seed=1)
    assert layer_exponents(model, layers=["2"], bootstrap=20, shuffles=3, seed=1)["2"] == whole["2"]
    assert layer_exponents(model, layers=["2"], bootstrap=20, shuffles=3, seed=2)["2"].interval != whole["2"].interval


def test_selection_by_name_module_parameter_and_pattern():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24), "fc": nn.Linear(8, 9), "out": nn.Linear(9, 8)})
    for asked, expected in (
        (["fc"], ["fc"]),
        (["qkv"], ["qkv[q]", "qkv[k]", "qkv[v]"]),
        (["qkv[k]"], ["qkv[k]"]),
        (["out.weight", "f*"], ["fc", "out"]),
    ):
        table = layer_exponents(model, layers=asked, shuffles=0)
        assert table.names() == expected
        assert ("out", "not asked for by `layers`") in table.skipped or "out" in expected


def test_shuffling_destroys_a_planted_tail():
    layer = planted(512, 256, 3.0, 0)
    row = layer_exponents(layer, shuffles=9).rows[0]
    assert row.trusted
    assert row.reason == ""
    assert abs(row.exponent - 3) < 4 * row.standard_error
    assert row.exponent < row.null_low < row.null_high


def test_shuffles_stop_where_they_decide_nothing_more(monkeypatch):
    drawn = []

    def counted(matrices, seed):
        drawn.append(seed)
        return shuffle(matrices, seed)

    monkeypatch.setattr("stabkit.heavy_tail.layers.shuffle", counted)
    short = layer_exponents(nn.Linear(300, 10, bias=False)).rows[0]  # out by its size alone
    assert drawn == []
    assert math.isnan(short.null_low)
    assert "shuffled" not in short.reason
    assert layer_exponents(planted(512, 256, 3.0, 0)).rows[0].trusted
    assert len(drawn) == 9
    stopped = 0
    for seed in range(20):
        drawn.clear()
        noise = nn.Linear(256, 256, bias=False)
        with torch.no_grad():
            # Heavy-tailed entries without order: a tail to fit, and the same one after a shuffle.
            normal = torch.randn(256, 256, 2, generator=torch.Generator().manual_seed(seed)).unbind(-1)
            noise.weight.copy_(normal[0] * (1.5 * normal[1]).exp())
        row = layer_exponents(noise, seed=seed).rows[0]
        if drawn and not row.trusted:
            stopped += len(drawn) < 9
            # All copies but the last have larger exponents, and the last one's says why it is not trusted.
            fits = [fit_power_law(gram_eigenvalues(shuffle(noise.weight[None], s))).exponent for s in drawn]
            assert all(value > row.exponent for value in fits[:-1])
            assert fits[-1] == pytest.approx(row.null_low, rel=1e-9)  # to rounding, which hangs on LAPACK's threads
            assert row.null_low <= row.exponent
            assert f"not below the exponent of shuffled entries, {row.null_low:.2f}" in row.reason
    assert stopped > 0


def test_noise_is_hardly_ever_believed():
    # The last test alone passes noise once in ten; the others make it rarer still.
    believed = 0
    for seed in range(60):
        layer = nn.Linear(96, 96, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(96, 96, generator=torch.Generator().manual_seed(seed)))
        believed += layer_exponents(layer, seed=seed).rows[0].trusted
    assert believed <= 6


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        (nn.Linear(300, 10, bias=False), {}, "10 eigenvalues, fewer than 50"),
        (planted(200, 90, 3.0, 0), {"shuffles": 0}, "not compared with shuffled entries"),
        (planted(512, 256, 2.0, 0), {"bootstrap": 40}, "crosses 2"),
    ],
)
def test_reasons_not_to_believe(layer, options, reason):
    row = layer_exponents(layer, **options).rows[0]
    assert not row.trusted
    assert reason in row.reason


@pytest.mark.parametrize(
    ("exponent", "flag"),
    [
        (1.6, "over-trained by weightwatcher's rule: exponent below 2"),
        (3.0, None),
        (8.0, "under-trained by weightwatcher's rule: exponent above 6"),
    ],
)
def test_training_flags_are_notes(exponent, flag):
    row = layer_exponents(planted(512, 256, exponent, 0), shuffles=0).rows[0]
    said = [text for text in row.flags if "weightwatcher's rule" in text]
    assert said == ([flag] if flag else [])
    assert "weightwatcher" not in row.reason


def test_training_flags_agree_with_weightwatcher(weightwatcher_details):
    layers = {str(k): planted(300, 200, exponent, k) for k, exponent in enumerate((1.5, 1.9, 3.0, 5.5, 7.5, 9.0))}
    model = nn.Sequential(*layers.values())
    table, reference = layer_exponents(model, shuffles=0), weightwatcher_details(model)
    seen = set()
    for row in table.rows:
        ours = next((text.split()[0] for text in row.flags if "weightwatcher's rule" in text), "")
        assert ours == reference[row.name]["warning"]
        seen.add(ours)
    assert seen == {"over-trained", "under-trained", ""}


def test_p_values_on_request():
    layer = planted(256, 128, 3.0, 0)
    row = layer_exponents(layer, p_value_draws=20, shuffles=0).rows[0]
    spectrum = gram_eigenvalues(layer.weight.detach()[None])
    seed = layer_seed(0, "weight", 0)
    assert row.p_value == fit_power_law(spectrum, p_value_draws=20, seed=seed).p_value
    assert row.p_value > 0.1
    assert not any("rejected" in text for text in row.flags)
    assert layer_exponents(layer, shuffles=0).rows[0].p_value is None
    even = nn.Linear(300, 300, bias=False)
    with torch.no_grad():
        even.weight.copy_(torch.diag(torch.linspace(1, 2, 300).sqrt()))  # evenly spaced: nothing like a power law
    row = layer_exponents(even, p_value_draws=20, shuffles=0).rows[0]
    assert row.p_value == 0
    assert "power law rejected: p = 0" in row.flags
    assert "rejected" not in row.reason


@pytest.mark.parametrize("method", ["mle", "hill", "truncated"])
@pytest.mark.parametrize("tail", [None, 30, 0.2, np.float64(0.7)])
def test_tails_of_a_given_size(method, tail):
    layer = planted(256, 128, 3.0, 0)
    spectrum = gram_eigenvalues(layer.weight.detach()[None])
    truth = fit_power_law(spectrum, method=method, tail=tail)
    table = layer_exponents(layer, method=method, tail=tail, shuffles=1)
    (row,) = table.rows
    for name in ("exponent", "n_tail", "distance", "lambda_min", "standard_error"):
        assert getattr(row, name) == pytest.approx(getattr(truth, name), rel=1e-12)
    if not math.isnan(row.null_low):  # the copy's tail is of that size, too
        copied = gram_eigenvalues(shuffle(layer.weight.detach()[None], layer_seed(0, "weight", 1)))
        assert row.null_low == pytest.approx(fit_power_law(copied, method=method, tail=tail).exponent, rel=1e-9)
    assert table.tail == tail
    assert LayerExponents.from_dict(json.loads(json.dumps(table.to_dict()))).tail == tail
    found = layer_spectrum(layer, "weight", method=method, tail=tail)
    assert (found.fit.exponent, found.fit.n_tail) == pytest.approx((truth.exponent, truth.n_tail), rel=1e-12)


def test_a_tails_size_counts_in_intervals_and_p_values():
    layer = planted(256, 128, 3.0, 0)
    spectrum, seed = gram_eigenvalues(layer.weight.detach()[None]), layer_seed(0, "weight", 0)
    row = layer_exponents(layer, tail=0.3, bootstrap=20, p_value_draws=20, shuffles=0).rows[0]
    truth = fit_power_law(spectrum, tail=0.3, bootstrap=20, p_value_draws=20, seed=seed)
    assert row.interval == pytest.approx(truth.interval, rel=1e-9)
    assert row.p_value == truth.p_value


def test_tables_written_without_a_tail_are_read():
    table = layer_exponents(planted(60, 50, 3.0, 0), shuffles=0)
    plain = table.to_dict()
    del plain["tail"]
    for row in plain["rows"]:
        del row["sizes"]
    again = LayerExponents.from_dict(plain)
    assert again.tail is None
    assert again.rows[0].exponent == table.rows[0].exponent


def test_undefined_layers_are_undefined():
    model = nn.Sequential(*(nn.Linear(30, 30, bias=False) for _ in range(4)))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(30))
        model[1].weight.zero_()
        model[2].weight.fill_(1e-5)
        model[3].weight[0, 0] = math.nan
    table = layer_exponents(model, shuffles=1)
    for row in table.rows:
        assert math.isnan(row.exponent)
        assert not row.trusted
        assert row.reason.startswith("undefined: ")
    assert table["0"].reason == "undefined: all 30 eigenvalues are equal"
    assert table["3"].reason == "undefined: 30 of 30 eigenvalues are NaN or infinite"


def test_rank_deficiency_is_noted_but_no_reason():
    layer = planted(300, 128, 3.0, 0)
    with torch.no_grad():
        layer.weight[:, :20] = 0
    row = layer_exponents(layer, shuffles=0).rows[0]
    assert "rank deficient: 20 of 128 eigenvalues are numerically zero" in row.flags
    assert "rank deficient" not in row.reason


@pytest.mark.parametrize("shape", [(400, 400), (800, 200), (300, 240)])
def test_marchenko_pastur_edge_and_spikes(shape):
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(*shape, generator=g, dtype=torch.float64) * 0.3 / math.sqrt(max(shape))
    edge = 0.09 * (1 + math.sqrt(min(shape) / max(shape))) ** 2
    found, spikes = marchenko_pastur(gram_eigenvalues(noise[None]).numpy(), min(shape), max(shape))
    assert found == pytest.approx(edge, rel=0.03)
    assert spikes == 0
    u, v = (torch.linalg.qr(torch.randn(n, 3, generator=g, dtype=torch.float64)).Q for n in shape)
    found, spikes = marchenko_pastur(gram_eigenvalues((noise + 3 * u @ v.T)[None]).numpy(), min(shape), max(shape))
    assert found == pytest.approx(edge, rel=0.05)  # the spikes' own weight is not counted as noise
    assert spikes == 3


def test_table_survives_json():
    model = seeded(lambda: nn.Sequential(mlp(), nn.Conv2d(8, 12, 3), nn.Linear(3, 72), nn.Identity()))
    with torch.no_grad():
        model[0][0].weight.zero_()
    model.add_module("nan", nn.Linear(24, 72))  # a layer name that reads like a number
    for options in ({"shuffles": 2, "bootstrap": 20}, {"shuffles": 0, "conv": "slices"}):
        table = layer_exponents(model, **options)
        text = json.dumps(table.to_dict(), allow_nan=False)
        again = LayerExponents.from_dict(json.loads(text))
        assert again == table
        assert hash(again) == hash(table)
        assert repr(again) == repr(table)
        assert str(again) == str(table)
        assert again["nan"].module == "nan"
    assert any(math.isnan(row.null_low) for row in table.rows)
    first = table["0.2"]
    for other in (
        dataclasses.replace(first, exponent=first.exponent + 1e-9),
        dataclasses.replace(first, flags=("x",)),
        1,
    ):
        assert first != other
    odd = dataclasses.replace(table, rows=(dataclasses.replace(first, parameter="nan", kind="inf"),))
    assert LayerExponents.from_dict(odd.to_dict()) == odd
    with pytest.raises(ValueError, match="must have schema 1; got 7"):
        LayerExponents.from_dict({**table.to_dict(), "schema": 7})


def test_table_shows_rows_and_what_was_left_out():
    table = layer_exponents(seeded(mlp), shuffles=1)
    text = str(table)
    for row in table.rows:
        assert f"{row.exponent:.3f}" in text
    assert "0.bias: a bias" in text
    assert len(table) == 3
    with pytest.raises(KeyError, match=r"no exponent for '0\.bias': a bias"):
        table["0.bias"]
    with pytest.raises(KeyError, match=r"no exponent for 'zz'; rows are \['0', '2', '4'\]"):
        table["zz"]


def test_dataframe(monkeypatch):
    table = layer_exponents(seeded(mlp), shuffles=0)
    pytest.importorskip("pandas")
    frame = table.to_dataframe()
    assert frame["exponent"].tolist() == [row.exponent for row in table.rows]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="needs pandas, which is not installed"):
        table.to_dataframe()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = seeded(mlp).to(dtype)
    row = layer_exponents(model, layers=["0"], shuffles=0)["0"]
    assert row.exponent == pytest.approx(exponent_of(model[0].weight), rel=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"conv": "pool"}, ValueError, r"`conv` of `layer_exponents` .*got 'pool'. Did you mean 'pooled'"),
        ({"method": "MLE2"}, ValueError, r"`method` of `layer_exponents` .*got 'MLE2'"),
        ({"tail": 1}, ValueError, r"`tail` of `layer_exponents` must be a whole number >= 2; got 1\. Give a number"),
        ({"tail": 1.0}, ValueError, r"`tail` of `layer_exponents` must be a finite number in \(0, 1\); got 1\.0"),
        ({"tail": "half"}, TypeError, r"`tail` of `layer_exponents` must be a whole number >= 2; got 'half'"),
        ({"bootstrap": 3}, ValueError, r"`bootstrap` of `layer_exponents` must be 0 or at least 20; got 3"),
        ({"p_value_draws": -1}, ValueError, r"`p_value_draws` of `layer_exponents` .*got -1"),
        (
            {"p_value_draws": 5, "method": "hill"},
            ValueError,
            r"`p_value_draws` of `layer_exponents` must be 0 for method 'hill'; got 5",
        ),
        ({"shuffles": -2}, ValueError, r"`shuffles` of `layer_exponents` .*got -2"),
        ({"seed": "a"}, TypeError, r"`seed` of `layer_exponents` .*got 'a'"),
        ({"layers": "0"}, TypeError, r"must be a sequence of names; got the string '0'. Use \['0'\]"),
        ({"layers": ["0", "nine"]}, ValueError, r"got 'nine', which matches none of 3"),
    ],
)
def test_errors_name_what_came(kwargs, error, match):
    with pytest.raises(error, match=match):
        layer_exponents(mlp(), **kwargs)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"`model` of `layer_exponents` must be a torch\.nn\.Module; got dict"):
        layer_exponents({})


def test_layers_side_by_side_are_those_one_by_one(monkeypatch):
    model = seeded(cnn)
    places, solved, inside = set(), set(), set()
    plain = stabkit.heavy_tail.layers._gram_eigenvalues

    def seen(matrices, seed):
        places.add(threading.current_thread().name)
        inside.add(torch.get_num_threads())
        return shuffle(matrices, seed)

    def solving(matrix, *, step):
        solved.add(threading.current_thread().name)
        inside.add(torch.get_num_threads())
        return plain(matrix, step=step)

    monkeypatch.setattr("stabkit.heavy_tail.layers.shuffle", seen)
    monkeypatch.setattr("stabkit.heavy_tail.layers._gram_eigenvalues", solving)
    wide = nn.Sequential(*[planted(512, 256, 3.0, seed) for seed in range(4)], model)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer_exponents(wide, bootstrap=20)
        assert places == solved == {threading.main_thread().name}
        places.clear()
        solved.clear()
        torch.set_num_threads(3)
        inside.clear()
        together = layer_exponents(wide, bootstrap=20)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert len(places) > 1
    assert threading.main_thread().name not in places
    assert len(solved) > 1
    assert inside == {1}  # or each of these threads would start three more
    assert not solved & {*places, threading.main_thread().name}  # a convolution's matrices have threads of their own
    assert together == alone


def test_calls_at_once_limit_threads_one_after_the_other(monkeypatch):
    """The limit is the process's, and what was saved within another's limit would be left in place."""
    active, most = [], []

    @contextlib.contextmanager
    def limits(threads):
        active.append(threads)
        most.append(len(active))
        time.sleep(0.02)
        yield
        active.pop()

    monkeypatch.setattr("stabkit.heavy_tail.layers.threadpool_limits", limits)
    nets = [nn.Linear(60, 60) for _ in range(4)]
    workers = [threading.Thread(target=layer_exponents, args=(net,), kwargs={"shuffles": 0}) for net in nets]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1] * len(nets)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "parallel"])
def test_layers_are_named_without_wrappers(wrap):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        last = nn.Linear(4, 3)
    expected = layer_exponents(nn.Sequential(inner, last), shuffles=0)
    assert expected.names() == ["0.0", "0.2", "1"]
    for model in (wrap(nn.Sequential(inner, last)), nn.Sequential(wrap(inner), last)):
        found = layer_exponents(model, shuffles=0)
        assert str(found) == str(expected)
        assert [row.parameter for row in found.rows] == ["0.0.weight", "0.2.weight", "1.weight"]
        assert layer_spectrum(model, "0.2").name == "0.2"
        gates = gate_per_parameter(model, expected, untrusted="gate")
        assert list(gates) == [name for name, _ in model.named_parameters()]
        plain = gate_per_parameter(nn.Sequential(inner, last), expected, untrusted="gate")
        assert [float(gate) for gate in gates.values()] == [float(gate) for gate in plain.values()]


def test_heads_are_found_through_wrappers():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.query_key_value = nn.Linear(8, 24)

    found = layer_exponents(nn.Sequential(nn.DataParallel(Attention())), shuffles=0)
    assert [row.heads for row in found.rows] == [2, 2, 2]
    assert found.rows[0].name == "0.query_key_value[q]"
