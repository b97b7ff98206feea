"""Where the queries, keys and values of fused weights are: known layouts are split, every other such layer is flagged."""

import types

import pytest
import torch
from torch import nn

from stabkit.heavy_tail import LayerExponents, gate_per_parameter, layer_exponents
from stabkit.heavy_tail.fused import Layout, layout_of
from stabkit.heavy_tail.matrices import WeightMatrix, block_index, weight_matrices


def attention(kind, layer, outputs, *, inputs=48, config=None, dense=nn.Linear, **stated):
    """A module of a class of that name with one fused layer, and with the attributes that its original has."""
    module = type(kind, (nn.Module,), {})()
    setattr(module, layer, dense(inputs, outputs))
    for name, value in stated.items():
        setattr(module, name, value)
    if config is not None:
        module.config = types.SimpleNamespace(**config)
    return module


def rows(start, stop, every=None, total=144):
    """Numbers of rows: from start to stop in every so many rows."""
    every = every or total
    return [i for i in range(total) if start <= i % every < stop]


def thirds(heads=1, total=144):
    width = total // (3 * heads)
    return [rows(p * width, (p + 1) * width, 3 * width, total) for p in range(3)]


GROUPED = [rows(0, 48, total=96), rows(48, 72, total=96), rows(72, 96, total=96)]
ONE_KEY = [rows(0, 48, total=72), rows(48, 60, total=72), rows(60, 72, total=72)]
FOUR = {"num_attention_heads": 4}
SPLIT = {
    "gpt2": (attention("GPT2Attention", "c_attn", 144, num_heads=4, head_dim=12), thirds()),
    "starcoder, one key": (attention("GPTBigCodeAttention", "c_attn", 72, multi_query=True, num_heads=4), ONE_KEY),
    "starcoder": (attention("GPTBigCodeAttention", "c_attn", 144, multi_query=False, num_heads=4), thirds(4)),
    "timm": (attention("Attention", "qkv", 144, num_heads=4, head_dim=12), thirds()),
    "timm, wider inside": (attention("Attention", "qkv", 144, inputs=32, num_heads=4, head_dim=12), thirds()),
    "wider inside": (attention("Sam2MultiScaleAttention", "qkv", 144, inputs=24, dim_out=48), thirds()),
    "tinyvit": (attention("Attention", "qkv", 144, num_heads=4, key_dim=12, d=12), thirds(4)),
    "levit": (
        attention("Attention", "qkv", 192, num_heads=4, key_dim=12, val_dim=24),
        [rows(0, 12, 48, 192), rows(12, 24, 48, 192), rows(24, 48, 48, 192)],
    ),
    "coatnet": (attention("AttentionCl", "qkv", 144, num_heads=4, dim_head=12, head_first=True), thirds(4)),
    "exaone": (
        attention("VisionAttention", "qkv", 96, num_heads=4, num_key_value_heads=2, head_dim=12),
        GROUPED,
    ),
    "modernbert": (attention("ModernBertAttention", "Wqkv", 144, head_dim=12, config=FOUR), thirds()),
    "dbrx": (attention("DbrxAttention", "Wqkv", 96, num_heads=4, num_key_value_heads=2, head_dim=12), GROUPED),
    "torchvision": (attention("RelativePositionalMultiHeadAttention", "to_qkv", 144), thirds()),
    "phi3": (
        attention("Phi3Attention", "qkv_proj", 96, head_dim=12, config={**FOUR, "num_key_value_heads": 2}),
        GROUPED,
    ),
    "phi3, as many": (
        attention("Phi3Attention", "qkv_proj", 144, head_dim=12, config={**FOUR, "num_key_value_heads": 4}),
        thirds(),
    ),
    "vllm": (attention("LlamaAttention", "qkv_proj", 96, q_size=48, kv_size=24), GROUPED),
    "minimax": (attention("MiniMaxLightningAttention", "qkv_proj", 144, head_dim=12, **FOUR), thirds(4)),
    "bloom": (attention("BloomAttention", "query_key_value", 144, num_heads=4), thirds(4)),
    "falcon 7b": (
        attention(
            "FalconAttention",
            "query_key_value",
            72,
            num_heads=4,
            num_kv_heads=1,
            multi_query=True,
            new_decoder_architecture=False,
        ),
        ONE_KEY,
    ),
    "falcon 40b": (
        attention("FalconAttention", "query_key_value", 96, num_heads=4, num_kv_heads=2, new_decoder_architecture=True),
        [rows(0, 24, 48, 96), rows(24, 36, 48, 96), rows(36, 48, 48, 96)],
    ),
    "deberta": (attention("DisentangledSelfAttention", "in_proj", 144, attention_head_size=12, **FOUR), thirds(4)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_known_layouts_are_split(name):
    model, expected = SPLIT[name]
    (layer,) = model.children()
    found = [entry for entry in weight_matrices(model) if isinstance(entry, WeightMatrix)]
    assert [entry.name[-3:] for entry in found] == ["[q]", "[k]", "[v]"]
    assert sorted(i for own in expected for i in own) == list(range(layer.out_features))
    for part, (entry, own) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(entry.weight, layer.weight[own])
        assert block_index(layer.out_features, part, entry.heads, entry.sizes).tolist() == own
        assert not entry.flags


@pytest.mark.parametrize("name", ["exaone", "levit", "falcon 40b", "deberta"])
def test_gates_lie_where_the_parts_are(name):
    model, expected = SPLIT[name]
    table = layer_exponents(model, shuffles=0)
    again = LayerExponents.from_dict(table.to_dict())
    assert [row.sizes for row in again.rows] == [row.sizes for row in table.rows]
    gates = gate_per_parameter(model, again, untrusted="gate", low=1.0, high=9.0, width=2.0)
    weight, bias = gates.values()
    values = [float(weight[own[0], 0]) for own in expected]
    assert len(set(values)) == 3
    for own, value in zip(expected, values, strict=True):
        assert set(weight[own, 0].tolist()) == {value}
        assert set(bias[own].tolist()) == {value}


def test_a_parent_or_the_models_configuration_may_state_the_heads():
    model = nn.Sequential(nn.ModuleDict({"attn": attention("Phi3Attention", "qkv_proj", 96, num_key_value_heads=2)}))
    assert "number of heads unknown" in layer_exponents(model, shuffles=0).rows[0].reason
    model.config = types.SimpleNamespace(num_attention_heads=4)
    assert [row.shape for row in layer_exponents(model, shuffles=0).rows] == [(48, 48), (24, 48), (24, 48)]


def test_an_adapters_layer_inside_is_split_as_the_layer_itself():
    model = attention("GPT2Attention", "c_attn", 144)
    model.c_attn = nn.ModuleDict({"base_layer": model.c_attn, "lora_A": nn.Linear(48, 4)})
    assert layer_exponents(model, shuffles=0).names() == [f"c_attn.base_layer[{p}]" for p in "qkv"] + ["c_attn.lora_A"]


FLAGGED = {
    "deberta": (
        attention("DisentangledSelfAttention", "in_proj", 144),
        "fused weight not separable: number of heads unknown",
    ),
    "lfm2": (attention("Lfm2ShortConv", "in_proj", 144), "the order of 'in_proj' in a Lfm2ShortConv is not known"),
    "mamba": (attention("MambaMixer", "in_proj", 192), "the order of 'in_proj' in a MambaMixer is not known"),
    "phi3": (attention("Phi3Attention", "qkv_proj", 96, head_dim=12), "number of heads unknown"),
    "phi3, other heads": (
        attention("Phi3Attention", "qkv_proj", 96, head_dim=8, config={**FOUR, "num_key_value_heads": 2}),
        "96 outputs are not what 4 heads with 2 of keys and values make",
    ),
    "codegen": (
        attention("CodeGenAttention", "qkv_proj", 144, head_dim=12, **FOUR),
        "fused q,k,v not separable: the order of 'qkv_proj' in a CodeGenAttention is not known",
    ),
    "wider inside": (attention("Attention", "qkv", 144, inputs=32, num_heads=4), "144 outputs for 32 inputs"),
    "levit": (attention("Attention", "qkv", 96, num_heads=4, key_dim=12), "96 outputs are not what its heads make"),
    "grouped": (
        attention("VisionAttention", "qkv", 144, num_heads=4, num_key_value_heads=3),
        "144 outputs are not what 4 heads with 3 of keys and values make",
    ),
    "grouped megatron": (
        attention("Attention", "query_key_value", 96, num_heads=4, num_key_value_heads=2),
        "the order of 4 heads with 2 of keys and values is not known",
    ),
    "falcon": (
        attention("Falcon", "query_key_value", 90, num_heads=4, num_kv_heads=3, new_decoder_architecture=True),
        "90 outputs are not what 4 heads with 3 of keys and values make",
    ),
    "bloom": (attention("BloomAttention", "query_key_value", 144, num_heads=5), "5 heads do not divide 48"),
    "bloom, other sizes": (attention("BloomAttention", "query_key_value", 96, num_heads=4), "96 outputs for 48 inputs"),
    "cross-attention": (attention("GPT2Attention", "c_attn", 96), "96 outputs for 48 inputs"),
    "keys and values": (attention("Attention", "kv", 96), "fused weight not separable: the order of 'kv'"),
    "internlm2": (attention("InternLM2Attention", "wqkv", 144), "fused q,k,v not separable: the order of 'wqkv'"),
    "baichuan": (attention("BaichuanAttention", "W_pack", 144), "fused q,k,v not separable: the order of 'W_pack'"),
    "megatron core": (attention("SelfAttention", "linear_qkv", 144), "the order of 'linear_qkv'"),
    "gated": (attention("Phi3MLP", "gate_up_proj", 96), "fused weight not separable: the order of 'gate_up_proj'"),
    "convolution": (
        nn.ModuleDict({"qkv": nn.Conv2d(48, 144, 1)}),
        "fused weight not separable: 'qkv' is a convolution",
    ),
    "transposed": (nn.ModuleDict({"in_proj": nn.ConvTranspose1d(48, 96, 1)}), "'in_proj' is a convolution"),
}


@pytest.mark.parametrize("name", FLAGGED)
def test_what_seems_fused_and_is_not_split_is_not_trusted(name):
    model, reason = FLAGGED[name]
    table = layer_exponents(model, shuffles=0)
    (row,) = table.rows
    assert row.part is None
    assert not row.trusted
    assert "fused" in row.reason
    assert reason in row.reason
    assert row.reason.split("; ")[0] in row.flags


@pytest.mark.parametrize(
    ("name", "outputs", "inputs"),
    [("in_proj", 48, 48), ("out", 144, 48), ("kvass", 144, 48), ("fc.linear", 96, 48), ("in_proj_a", 4, 48)],
)
def test_other_layers_are_left_as_they_are(name, outputs, inputs):
    assert layout_of(name, (), outputs, inputs) is None


def test_an_in_proj_is_three_blocks_in_torchs_own_attention_alone():
    own = nn.MultiheadAttention(48, 4)
    assert layout_of("in_proj", (own,), 144, 48) == Layout(sizes=(48, 48, 48))
    assert isinstance(layout_of("in_proj", (nn.Module(),), 144, 48), str)


def transformers_models():
    """Configurations and classes of small networks, by name."""
    t = pytest.importorskip("transformers")
    common = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 30}
    common |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    wide = {**common, "intermediate_size": 32, "max_position_embeddings": 16}
    gpt = {"n_embd": 48, "n_head": 4, "n_layer": 1, "n_positions": 16, "vocab_size": 30}
    gpt |= {"bos_token_id": 1, "eos_token_id": 2}
    return {
        "deberta": (t.DebertaConfig(**wide), t.DebertaModel),
        "phi3": (t.Phi3Config(**wide, num_key_value_heads=2), t.Phi3Model),
        "modernbert": (t.ModernBertConfig(**wide, cls_token_id=1, sep_token_id=2), t.ModernBertModel),
        "gpt2": (t.GPT2Config(**gpt), t.GPT2Model),
        "starcoder": (t.GPTBigCodeConfig(**gpt, multi_query=False), t.GPTBigCodeModel),
        "starcoder, one key": (t.GPTBigCodeConfig(**gpt, multi_query=True), t.GPTBigCodeModel),
        "falcon, one key": (t.FalconConfig(**common, multi_query=True), t.FalconModel),
        "falcon": (t.FalconConfig(**common, multi_query=False), t.FalconModel),
        "falcon, grouped": (
            t.FalconConfig(**common, new_decoder_architecture=True, num_kv_heads=2),
            t.FalconModel,
        ),
        "neox": (t.GPTNeoXConfig(**wide), t.GPTNeoXModel),
    }


@pytest.mark.parametrize(
    "name",
    [
        "deberta",
        "phi3",
        "modernbert",
        "gpt2",
        "starcoder",
        "starcoder, one key",
        "falcon, one key",
        "falcon",
        "falcon, grouped",
        "neox",
    ],
)
def test_the_parts_do_in_attention_what_their_names_say(name):
    """Without queries attention is as without keys, evenly spread; without values it gives nothing."""
    config, kind = transformers_models()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    tokens = torch.arange(12).view(2, 6) + 3
    parts = {row.name[-3:]: row for row in layer_exponents(model, shuffles=0).rows if row.part is not None}
    assert set(parts) == {"[q]", "[k]", "[v]"}
    parameter = dict(model.named_parameters())[parts["[q]"].parameter]
    weight = parameter.detach().clone()

    def without(*chosen):
        with torch.no_grad():
            parameter.copy_(weight)
            for row in (parts[label] for label in chosen):
                index = block_index(weight.shape[row.axis], row.part, row.heads, row.sizes)
                parameter.index_fill_(row.axis, index, 0)
            return model(tokens).last_hidden_state

    torch.testing.assert_close(without("[q]"), without("[k]"))
    torch.testing.assert_close(without("[v]"), without("[q]", "[k]", "[v]"))
    assert float((without("[q]") - without()).abs().max()) > 0.01
    assert float((without("[v]") - without("[q]")).abs().max()) > 0.01
