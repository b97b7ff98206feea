"""Models, losses and settings off the beaten track: predicted as they run, or refused with a word of advice."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stabkit
from stabkit.algorithms import GradDiff
from stabkit.cli import main
from stabkit.curvature import linearise
from stabkit.preconditioner import Identity
from stabkit.problem import UnlearningProblem
from stabkit.rollout import rollout
from stabkit.runner import run
from stabkit.staged import staged_rollout

STEPS = 40


@pytest.fixture(scope="module")
def points():
    """Three overlapping blobs."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 3
    return torch.randn(3, 10, generator=g)[y] + torch.randn(200, 10, generator=g), y


def fitted(model, points, loss=F.cross_entropy):
    x, y = points
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    return model.eval()


def halves(points):
    x, y = points
    return (x[:30], y[:30]), (x[30:], y[30:])


class Adapted(nn.Module):
    """A frozen network with a low-rank adapter that begins at 0."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.1 * torch.randn(2, 10, generator=torch.Generator().manual_seed(1)))
        self.up = nn.Parameter(torch.zeros(16, 2))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.base[2](torch.relu(self.base[0](x) + x @ self.down.T @ self.up.T))


@pytest.fixture(scope="module")
def adapted(points):
    torch.manual_seed(0)
    return Adapted(fitted(nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3)), points))


def dormant_check(report):
    (check,) = (c for c in report.checks if c.name == "sensitivity to dormant parameters")
    return check


@pytest.mark.filterwarnings("ignore:the prediction has low confidence")
def test_an_adapter_that_begins_at_zero_is_not_trusted_to_one_linearisation(adapted, points):
    """What `down` adds is not there at θ*: outputs stay right along the predicted run, and the run diverges all the same."""
    forget, retain = halves(points)
    problem = UnlearningProblem(adapted, forget, retain)
    assert problem.unreached == ("unused",)
    assert linearise(problem, Identity()).dormant == ("down",)
    asked = {"mix": 0.5, "steps": STEPS, "batch_size": 32}
    reports = {}
    for lr, diverges in ((0.3, False), (4.0, True)):
        real = [run(problem, GradDiff(lr=lr, **asked), seed=s).diverged for s in (5, 6)]
        assert real == [diverges, diverges]
        thorough = stabkit.predict(adapted, forget, retain, lr=lr, mode="thorough", **asked)
        assert (thorough.verdict == "diverges") == diverges
        reports[lr] = stabkit.predict(adapted, forget, retain, lr=lr, mode="standard", **asked)
        assert reports[lr].verdict == "stable"  # one linearisation does not see it
    assert dormant_check(reports[0.3]).passed
    assert not dormant_check(reports[4.0]).passed
    assert reports[4.0].confidence == "low"
    assert "thorough" in dormant_check(reports[4.0]).remedy


def test_tensors_that_stay_dormant_are_nobodys_concern(points):
    torch.manual_seed(0)

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.spare = nn.Linear(10, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) + 0.0 * self.spare(x[:, :4])

    report = stabkit.predict(fitted(Spare(), points), *halves(points), lr=0.01, steps=10, mode="standard")
    assert dormant_check(report).value == 0


@pytest.mark.parametrize("algorithm", ["graddiff", "sragu"])
def test_a_parameter_without_an_axis(points, algorithm):
    """A learned temperature, as contrastive models have."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.temperature = nn.Linear(10, 3), nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.layer(x) * self.temperature.exp()

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stabkit.StabkitWarning)  # 13 numbers are too few for an exponent
        report = stabkit.predict(fitted(Scaled(), points), *halves(points), algorithm=algorithm, steps=20)
        assert math.isfinite(report.probability)
        assert report.at(lr=report.critical_lr * 10).verdict == "diverges"


def test_class_weights_of_single_precision(points):
    """They meet outputs in double precision, where the level is looked for."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), reduction="none")
    torch.manual_seed(0)
    model = fitted(nn.Linear(10, 3), points, lambda f, y: loss(f, y).mean())
    report = stabkit.predict(model, *halves(points), loss=loss, steps=20, lr=0.01)
    same = nn.CrossEntropyLoss(weight=loss.weight.double(), reduction="none")
    exact = UnlearningProblem(model, *halves(points), loss=same, dtype=torch.float64)
    mixed = UnlearningProblem(model, *halves(points), loss=loss, dtype=torch.float64)
    assert mixed.retain_loss == pytest.approx(exact.retain_loss, rel=1e-5)
    assert report.run.divergence_level == pytest.approx(exact.divergence_level, rel=1e-5)
    assert report.at(lr=report.critical_lr * 10).verdict == "diverges"


def test_a_loss_whose_course_depends_on_values(points):
    def either(f, y):
        losses = F.cross_entropy(f, y, reduction="none")
        return losses if float(losses.max()) < 100 else losses.clamp_max(100)

    torch.manual_seed(0)
    model = fitted(nn.Linear(10, 3), points)
    found = stabkit.predict(model, *halves(points), loss=either, steps=10)
    plain = stabkit.predict(model, *halves(points), steps=10)
    assert found.critical_lr == pytest.approx(plain.critical_lr, rel=0.05)


def test_sparse_gradients_of_embeddings():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 20, (60, 4), generator=g)
    y = (x[:, 0] > 9).long()

    class Text(nn.Module):
        def __init__(self, *, sparse):
            super().__init__()
            self.words, self.head = nn.Embedding(20, 6, sparse=sparse), nn.Linear(24, 2)

        def forward(self, x):
            return self.head(self.words(x).flatten(1))

    torch.manual_seed(0)
    model = fitted(Text(sparse=False), (x, y))
    sparse = Text(sparse=True)
    sparse.load_state_dict(model.state_dict())
    sets, asked = ((x[:10], y[:10]), (x[10:], y[10:])), {"steps": 10, "batch_size": 16}
    assert stabkit.predict(sparse, *sets, **asked).critical_lr == stabkit.predict(model, *sets, **asked).critical_lr
    assert sparse.words.sparse
    assert UnlearningProblem(sparse, *sets).new_model().words.sparse


def test_where_no_curvature_is_positive_the_critical_step_does_not_hang_on_the_one_asked_about(points):
    x, _ = points
    torch.manual_seed(0)
    y = x @ torch.randn(10, 1)
    model = nn.Linear(10, 1)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T + 0.01)
        model.bias.zero_()
    asked = {"loss": "mse", "mix": 1.0, "steps": STEPS, "batch_size": 32}
    reports = [stabkit.predict(model, *halves((x, y)), lr=lr, **asked) for lr in (1e-5, 1e-2)]
    assert reports[0].critical_lr == pytest.approx(reports[1].critical_lr)
    assert math.isfinite(reports[0].critical_lr)
    assert reports[0].at(lr=reports[0].critical_lr * 3).verdict == "diverges"


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.bag(x.abs().long().clamp_max(19)))


def plain():
    torch.manual_seed(0)
    return nn.Linear(10, 3)


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def of_probabilities(f, y):
    return F.binary_cross_entropy(f, F.one_hot(y, 3).float(), reduction="none").sum(1)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (Bag, {}, ValueError, r"`model` and `loss` of `predict` must be differentiable twice; got Bag .*nn\.Embedding"),
        (
            lambda: nn.Sequential(plain(), nn.Sigmoid()),
            {"loss": of_probabilities},
            ValueError,
            r"`loss` must be defined for all outputs.*'of_probabilities'.*binary_cross_entropy_with_logits",
        ),
        (
            lambda: nn.Sequential(plain(), nn.Softmax(1)),
            {"loss": lambda p, y: -p.gather(1, y[:, None])[:, 0].log()},
            ValueError,
            r"`loss` must be defined for all outputs.*it is not a number.*of logarithms",
        ),
        (
            plain,
            {"loss": nn.CrossEntropyLoss},
            TypeError,
            r"`loss` must .* the class CrossEntropyLoss\. Pass an instance",
        ),
        (plain, {"loss": lambda f: f}, TypeError, r"`loss` must take \(outputs, targets\).*'<lambda>' fails"),
        (
            normalised,
            {"batchnorm": "batch", "sampling": "poisson"},
            ValueError,
            r"`sampling` of `GradDiff` must give batches of one size",
        ),
        (
            normalised,
            {"batchnorm": "batch", "batch_size": 1},
            ValueError,
            r"batches of `GradDiff` must hold at least two",
        ),
        (
            plain,
            {"seed": 2**63},
            ValueError,
            r"`seed` of `predict` must be a whole number in \[0, 4611686018427387904\]",
        ),
        (
            plain,
            {"device": "meta"},
            ValueError,
            r"`device` of `UnlearningProblem` must be one to compute on; got 'meta'",
        ),
        (
            lambda: nn.LazyLinear(3),
            {},
            ValueError,
            r"`model` .* must hold its weights; got the model itself .* LazyLinear",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused_by_name(points, model, options, error, message):
    made = model()
    if "loss" not in options and not isinstance(made, nn.LazyLinear):
        made = fitted(made, points)
    with pytest.raises(error, match=message):
        stabkit.predict(made, *halves(points), steps=10, **options)


def test_other_entry_points_refuse_by_name(points, capsys):
    model = fitted(plain(), points)
    with pytest.raises(RuntimeError, match=r"`UnlearningProblem` .*inference_mode\(\)"), torch.inference_mode():
        stabkit.predict(model, *halves(points))
    with pytest.raises(TypeError, match="`report` of `verify` must be what `predict` gave; got NoneType"):
        stabkit.verify(None, model, *halves(points))
    report = stabkit.predict(model, *halves(points), steps=5)
    with pytest.raises(TypeError, match="seeds"):
        report.at(seeds=5)
    problem = UnlearningProblem(model, *halves(points))
    with pytest.raises(ValueError, match="`initial` of `retrain` must be a model like the problem's, a Linear"):
        stabkit.retrain(problem, stabkit.FineTune(lr=0.1, steps=2), initial=nn.Linear(4, 3))
    assert main(["demo", "--seed", "-1"]) == 2
    assert main(["bench", "verify", "--seeds", "-1"]) == 2
    assert main(["bench", "verify", "--jobs", "0"]) == 2
    assert capsys.readouterr().err.count("must be") == 3


def test_a_target_out_of_reach_is_told(points):
    model = fitted(plain(), points)
    with pytest.warns(stabkit.TargetWarning, match=r"and not to its target, 1e\+09"):
        stabkit.tune(model, *halves(points), forget_loss=1e9, steps=10)


class Remembering(nn.Module):
    """Keeps what its last pass made in attributes, as feature extractors do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, 8), nn.Linear(8, 3)
        self.features, self.seen = None, []

    def forward(self, x):
        self.features = torch.tanh(self.first(x))
        self.seen = [self.features, {"x": self.features * 2}]
        return self.last(self.features)


@pytest.mark.parametrize("mode", ["fast", "thorough"])
def test_models_that_keep_activations_are_predicted_and_left_alone(points, mode):
    torch.manual_seed(0)
    model = fitted(Remembering(), points)
    with torch.enable_grad():
        model(points[0][:5])
    kept = model.features
    assert kept.grad_fn is not None
    report = stabkit.predict(model, *halves(points), lr=0.01, steps=10, mode=mode)
    assert model.features is kept
    torch.manual_seed(0)
    plain_one = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    plain_one.load_state_dict(dict(zip(plain_one.state_dict(), model.state_dict().values(), strict=True)))
    same = stabkit.predict(plain_one.eval(), *halves(points), lr=0.01, steps=10, mode=mode)
    assert report.critical_lr == pytest.approx(same.critical_lr, rel=1e-4)
    problem = UnlearningProblem(model, *halves(points))
    assert run(problem, GradDiff(lr=0.01, steps=3)).model.features is not kept


def test_complex_weights_are_refused_and_complex_inputs_are_not(points):
    class Waves(nn.Module):
        def __init__(self, held):
            super().__init__()
            self.layer = nn.Linear(10, 3)
            if held == "parameter":
                self.phase = nn.Parameter(torch.ones(10, dtype=torch.cfloat))
            else:
                self.register_buffer("phase", torch.ones(10, dtype=torch.cfloat))

        def forward(self, x):
            return self.layer((x * self.phase).real)

    for held in ("parameter", "buffer"):
        with pytest.raises(TypeError, match=r"must have real weights; got 'phase' of torch\.complex64.*view_as_real"):
            stabkit.predict(Waves(held), *halves(points), steps=5)

    class Magnitude(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 3)

        def forward(self, z):
            return self.layer(torch.cat([z.real, z.imag], 1)[:, :10])

    x, y = points
    waves = (torch.complex(x[:, :5], x[:, 5:]), y)
    torch.manual_seed(0)
    model = fitted(Magnitude(), waves)
    problem = UnlearningProblem(model, *halves(waves), dtype=torch.float64)
    real = nn.Linear(10, 3)
    real.load_state_dict(model.layer.state_dict())
    same = UnlearningProblem(real, *halves(points), dtype=torch.float64)
    assert problem.retain_loss == pytest.approx(same.retain_loss, rel=1e-12)
    with pytest.raises(ValueError, match=r"must take the inputs of `forget`; got RuntimeError"):
        UnlearningProblem(nn.Linear(5, 3).double(), *halves(waves))


@pytest.mark.parametrize("kind", ["packed", "checkpointed"])
def test_passes_that_no_transform_goes_through_are_refused_with_a_remedy(points, kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.last = nn.GRU(2, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            steps = x.view(-1, 5, 2)
            lengths = torch.full((len(x),), 5)
            packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
            return self.last(self.cell(packed)[1][-1])

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(10, 8), nn.Linear(8, 3)

        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
            return self.last(hidden.tanh())

    torch.manual_seed(0)
    model = fitted(Recurrent() if kind == "packed" else Checkpointed(), points)
    with pytest.raises(ValueError, match=r"(?s)packed sequences by padded ones.*checkpointing by a plain call"):
        stabkit.predict(model, *halves(points), steps=5, mode="fast")


def test_autocast_is_refused(points):
    model = fitted(plain(), points)
    problem = UnlearningProblem(model, *halves(points))
    report = stabkit.predict(model, *halves(points), steps=5)
    network, plan = linearise(problem, Identity()), GradDiff(lr=0.01, steps=5)
    for call in (
        lambda: stabkit.predict(model, *halves(points), steps=5),
        lambda: rollout(network, plan, lr=[0.01], mix=[0.5], batch_sizes=(8, 8), seeds=[0]),
        lambda: staged_rollout(problem, network, plan, batch_sizes=(8, 8), seeds=[0]),
        lambda: run(problem, GradDiff(lr=0.01, steps=5)),
        lambda: linearise(problem, Identity()),
        lambda: report.at(lr=0.02),
        lambda: report.frontier(lr=[0.01], mix=[0.5]),
        report.recommend,
    ):
        with pytest.raises(RuntimeError, match=r"outside of torch\.autocast.*'cpu'"), torch.autocast("cpu"):
            call()


def test_another_default_device_is_refused(points):
    """Generators of batches are the CPU's, and PyTorch draws with them on the CPU alone."""
    model = fitted(plain(), points)
    report = stabkit.predict(model, *halves(points), steps=5)
    for call in (lambda: stabkit.predict(model, *halves(points), steps=5), lambda: report.at(lr=0.02)):
        with pytest.raises(RuntimeError, match=r"CPU as PyTorch's default device.*got 'meta'"), torch.device("meta"):
            call()


@pytest.mark.parametrize(
    "layer", [nn.LSTM(10, 3, num_layers=2, dropout=0.5), nn.MultiheadAttention(10, 2, dropout=0.5)]
)
def test_dropout_inside_of_a_layer_in_train_mode_is_told(points, layer):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = layer, nn.Linear(10, 3)

        def forward(self, x):
            return self.last(x)

    model = fitted(Dropping(), points).train()
    with pytest.warns(stabkit.TrainModeWarning, match="Dropout layer 'inner' is in train mode"):
        UnlearningProblem(model, *halves(points))


def test_a_sample_without_its_axis_is_told(points):
    x, y = points
    with pytest.raises(ValueError, match=r"One sample is x\[:1\]"):
        stabkit.predict(plain(), (x[0], y[0]), (x[30:], y[30:]), steps=5)


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
@pytest.mark.parametrize(
    ("layer", "bound"),
    [(nn.LayerNorm(8), 0.5), (nn.GroupNorm(2, 8), 0.5), (nn.BatchNorm1d(8), 1.0), (nn.Identity(), 1.0)],
)
def test_a_crossing_is_trusted_less_where_layers_normalise(points, layer, bound):
    torch.manual_seed(0)
    model = fitted(nn.Sequential(nn.Linear(10, 8), layer, nn.ReLU(), nn.Linear(8, 3)), points)
    report = stabkit.predict(model, *halves(points), lr=50.0, mix=0.5, steps=20, mode="standard")
    (check,) = (c for c in report.checks if c.name == "linearisation error")
    assert report.verdict == "diverges"
    assert check.threshold == bound
    assert check.passed == (check.value <= bound)


@pytest.mark.parametrize("form", [tuple, dict])
def test_several_targets_are_to_be_put_in_one_tensor(points, form):
    x, y = points
    targets = (y, torch.randn(200, 2)) if form is tuple else {"class": y, "box": torch.randn(200, 2)}
    with pytest.raises((TypeError, ValueError), match="Put several targets side by side in one tensor"):
        stabkit.predict(plain(), (x, targets), (x[30:], y[30:]), steps=5)


def test_a_map_prints_its_boundary(points):
    report = stabkit.predict(fitted(plain(), points), *halves(points), steps=10)
    found = report.frontier(lr=[1e-3, 1e-2, 1e3], mix=[0.2, 0.8])
    lines = str(found).splitlines()
    assert lines[0] == "graddiff: 3 step sizes from 0.001 to 1e+03, P(diverge)"
    assert [line.split()[0] for line in lines[3:]] == ["0.2", "0.8"]
    assert [float(line.split()[1]) for line in lines[3:]] == pytest.approx(found.critical_lr.tolist(), rel=6e-3)


def test_tuning_that_forgets_next_to_nothing_is_told(points):
    model = fitted(plain(), points)
    with pytest.warns(stabkit.TargetWarning, match="the forget loss is predicted to come to .* and not to its target"):
        stabkit.tune(model, *halves(points), steps=1, algorithm=stabkit.GradDiff(max_gradient_norm=1e-5))
