"""The reference networks: their sizes, shapes, seeds, and that the library can use each of them."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from stabkit.curvature.gradients import gradient_blocks
from stabkit.heavy_tail import layer_exponents
from stabkit.models import MLP, CausalLM, ResNet, SmallCNN, TabularMLP, VisionTransformer
from stabkit.problem import UnlearningProblem


def rng_states():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in numpy]


def size(model):
    return sum(p.numel() for p in model.parameters())


IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
TOKENS = torch.arange(12).view(2, 6) % 7
BUILDS = {
    "mlp": (lambda s: MLP(192, 5, hidden=(9,), seed=s), IMAGES, (2, 5)),
    "tabular": (lambda s: TabularMLP(14, 2, hidden=(9, 6), seed=s), torch.ones(2, 14), (2, 2)),
    "cnn": (lambda s: SmallCNN(3, 8, 5, width=4, hidden=9, seed=s), IMAGES, (2, 5)),
    "resnet-batch": (lambda s: ResNet(3, 5, blocks=(1, 1), width=8, seed=s), IMAGES, (2, 5)),
    "resnet-group": (lambda s: ResNet(3, 5, blocks=(1, 1), width=8, norm="group", seed=s), IMAGES, (2, 5)),
    "vit": (lambda s: VisionTransformer(3, 8, 5, width=8, depth=1, heads=2, seed=s), IMAGES, (2, 5)),
    "lm": (lambda s: CausalLM(7, context=8, width=8, depth=1, heads=2, seed=s), TOKENS, (2, 6, 7)),
}


@pytest.mark.parametrize("name", BUILDS)
def test_networks_are_seeded_and_have_their_shapes(name):
    build, inputs, shape = BUILDS[name]
    before = rng_states()
    first, again, other = (build(s) for s in (0, 0, 1))
    assert rng_states() == before
    state = first.state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    changed = [key for key, value in other.state_dict().items() if not torch.equal(state[key], value)]
    assert {key for key, p in first.named_parameters() if p.dim() > 1} <= set(changed)
    assert first.eval()(inputs).shape == shape


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (lambda: ResNet(3, 10), 11_173_962),
        (lambda: ResNet(3, 10, norm="group"), 11_173_962),
        (lambda: ResNet(3, 100), 11_173_962 + 90 * 513),
        (lambda: ResNet(3, 10, blocks=(3, 3, 3), width=16), 272_474),  # He et al.: 0.27 M
        (lambda: SmallCNN(1, 28, 10), 105_866),
        (lambda: MLP(784, 10, hidden=(100,)), 79_510),
        (lambda: TabularMLP(108, 2), 108 * 128 + 128 + 256 + 128 * 64 + 64 + 128 + 64 * 2 + 2),
        # embeddings once, 12 w² + 13 w a block, the last normalisation
        (lambda: CausalLM(50, context=32, width=24, depth=3, heads=4), 50 * 24 + 32 * 24 + 3 * (12 * 576 + 312) + 48),
    ],
)
def test_parameter_counts(model, parameters):
    assert size(model()) == parameters


def test_gpt2_small_has_its_published_size():
    with torch.device("meta"):
        model = CausalLM(50257, context=1024, width=768, depth=12, heads=12)
    assert size(model) == 124_439_808


def test_group_normalisation_keeps_no_statistics():
    assert not list(ResNet(3, 5, blocks=(1,), width=8, norm="group").buffers())
    assert list(ResNet(3, 5, blocks=(1,), width=8).buffers())


@pytest.mark.parametrize(("width", "groups"), [(4, 1), (8, 1), (12, 1), (16, 2), (18, 2), (64, 8)])
def test_groups_of_channels(width, groups):
    model = ResNet(3, 5, blocks=(1,), width=width, norm="group")
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {groups}
    assert ResNet(3, 5, blocks=(1,), width=28)  # with BatchNorm any width will do


def built(name, seed):
    """The parts of a reference network, drawn in its order from PyTorch's own layers."""
    torch.manual_seed(seed)
    if name == "cnn":
        return [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(32, 9), nn.Linear(9, 5)]
    if name == "vit":
        patches, positions = nn.Conv2d(3, 8, 4), nn.ParameterList([0.02 * torch.randn(1, 4, 8)])
        return [positions, patches, nn.TransformerEncoderLayer(8, 2, 32), nn.LayerNorm(8), nn.Linear(8, 5)]
    if name.startswith("resnet"):
        norm = nn.BatchNorm2d if name == "resnet-batch" else lambda count: nn.GroupNorm(count // 8, count)
        shapes = [(3, 8, 3), (8, 8, 3), (8, 8, 3), (8, 16, 3), (16, 16, 3), (8, 16, 1)]
        layers = [layer for i, o, k in shapes for layer in (nn.Conv2d(i, o, k, bias=False), norm(o))]
        return [*layers, nn.Linear(16, 5)]
    tokens, positions = nn.Embedding(7, 8), nn.Embedding(8, 8)
    block = [nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)]
    parts = [tokens, positions, *block, nn.LayerNorm(8)]
    nn.Linear(8, 7, bias=False)  # the head, whose weights are then the tokens'
    for part in parts:
        if not isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
    return parts


@pytest.mark.parametrize("name", ["cnn", "vit", "resnet-batch", "resnet-group", "lm"])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_seeds_weights_stay_what_they_were(name, seed):
    """Stored results are of these very weights."""
    with torch.random.fork_rng(devices=[]):
        parts = built(name, seed)
    found = list(BUILDS[name][0](seed).parameters())
    expected = [p for part in parts for p in part.parameters()]
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_vision_transformer_is_drawn_anew_as_it_was_built():
    model = BUILDS["vit"][0](0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.reset_parameters()
    truth = BUILDS["vit"][0](3).state_dict()
    assert all(torch.equal(value, truth[name]) for name, value in model.state_dict().items())


def test_a_language_model_is_drawn_anew_as_it_was_built():
    model = CausalLM(300, context=200, width=64, depth=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.reset_parameters()
    assert model.head.weight is model.tokens.weight
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05)
        else:
            assert set(parameter.tolist()) == ({1.0} if "norm" in name and "weight" in name else {0.0})


def test_widths_and_activation():
    model = MLP(6, 2, hidden=(5, 4), activation=nn.Tanh)
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [5, 4, 2]
    assert sum(isinstance(m, nn.Tanh) for m in model) == 2
    assert SmallCNN(3, 12, 7, width=4, hidden=9)(torch.zeros(2, 3, 12, 12)).shape == (2, 7)
    assert [m.out_features for m in TabularMLP(6, 2, hidden=(5, 4)) if isinstance(m, nn.Linear)] == [5, 4, 2]


def test_a_language_model_looks_back_only_and_at_positions():
    model = CausalLM(11, context=9, width=16, depth=2, heads=4).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    changed = tokens.clone()
    changed[0, 5] = 0
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-12)
    assert bool(((before - after)[:, 5:].abs().amax(-1) > 1e-6).all())
    assert not torch.allclose(before[0, 1], before[0, 3], atol=1e-6)  # the same token elsewhere


def test_a_language_models_embeddings_are_tied():
    model = CausalLM(11, width=8, heads=2)
    assert model.head.weight is model.tokens.weight
    assert copy.deepcopy(model).head.weight.data_ptr() != model.tokens.weight.data_ptr()
    names = [name for name, _ in model.named_parameters()]
    assert "head.weight" not in names
    rows = layer_exponents(model, shuffles=0).names()
    assert {"tokens", "blocks.0.qkv[q]", "blocks.0.qkv[k]", "blocks.0.qkv[v]"} <= set(rows)


@pytest.mark.parametrize("name", BUILDS)
def test_per_sample_gradients_are_those_of_autograd(name):
    build, inputs, _ = BUILDS[name]
    model = build(0).double().eval()
    x = inputs.double() if inputs.is_floating_point() else inputs
    x = torch.cat([x, x.flip(0)])
    y = x if name == "lm" else torch.tensor([0, 1, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = UnlearningProblem(
            model, (x[:1], y[:1]), (x[1:], y[1:]), loss="causal_lm" if name == "lm" else "cross_entropy"
        )
    (block,) = gradient_blocks(problem, problem.retain)
    outputs = model(x[2:3])
    if name == "lm":
        loss = nn.functional.cross_entropy(outputs[0, :-1], x[2, 1:])
    else:
        loss = nn.functional.cross_entropy(outputs, y[2:3])
    parameters = dict(model.named_parameters())
    truth = torch.autograd.grad(loss, list(parameters.values()))
    for key, gradient in zip(parameters, truth, strict=True):
        assert torch.allclose(block[key][1], gradient, atol=1e-9), key


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CausalLM(9, width=10, heads=4), "`width` of `CausalLM` must be a multiple of heads=4; got 10"),
        (lambda: CausalLM(9, heads=0), "`heads` of `CausalLM` must be a whole number >= 1; got 0"),
        (lambda: CausalLM(9, width=0), "`width` of `CausalLM` must be a whole number >= 1; got 0"),
        (lambda: VisionTransformer(3, 30, 5), "`size` of `VisionTransformer` must be a multiple of patch=4; got 30"),
        (
            lambda: VisionTransformer(3, 8, 5, patch=0),
            "`patch` of `VisionTransformer` must be a whole number >= 1; got 0",
        ),
        (lambda: VisionTransformer(3, 0, 5), "`size` of `VisionTransformer` must be a whole number >= 1; got 0"),
        (
            lambda: VisionTransformer(3, 8, 5, width=30),
            "`width` of `VisionTransformer` must be a multiple of heads=4; got 30",
        ),
        (lambda: SmallCNN(1, 3, 10), "`size` of `SmallCNN` must be a multiple of 4, .*; got 3. Pad or resize"),
        (lambda: SmallCNN(1, 30, 10), "`size` of `SmallCNN` must be a multiple of 4, .*; got 30"),
        (lambda: SmallCNN(1, 0, 10), "`size` of `SmallCNN` must be a whole number >= 1; got 0"),
        (
            lambda: ResNet(3, 5, norm="group", width=28),
            "`width` of `ResNet` .*; got 28, whose stage 1 has 28 channels for 3 groups. Take a multiple of 8",
        ),
        (lambda: ResNet(3, 5, norm="group", width=11), "got 11, whose stage 3 has 44 channels for 5 groups"),
        (lambda: ResNet(3, 5, blocks=(), norm="group", width=28), "got 28, whose stage 1 has 28 channels"),
        (lambda: ResNet(3, 5, width=0), "`width` of `ResNet` must be a whole number >= 1; got 0"),
        (lambda: CausalLM(9, context=3)(torch.zeros(1, 4).long()), "at most context=3 tokens a sequence; got 4"),
        (lambda: ResNet(3, 5, norm="layer"), "`norm` of `ResNet` must be one of 'batch', 'group'; got 'layer'"),
    ],
)
def test_settings_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()
