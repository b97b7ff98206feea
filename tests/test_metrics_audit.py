"""`audit`: its numbers against plain computations on the models, and how it shows and stores them."""

import copy
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from scipy.stats import entropy
from torch import nn

from stabkit.algorithms import GradDiff
from stabkit.deletion import random_fraction
from stabkit.metrics import Accuracies, Audit, Estimate, Shadows, accuracies, audit, average_gap, relearn_time
from stabkit.metrics.tables import markdown, steps
from stabkit.models import MLP
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from stabkit.training import train
from tests.cases import CASES
from tests.conftest import split

# FA, RA, TA, MIA and Avg.D of Huang et al. 2024 (CIFAR-10, 10 %, ResNet-18)
PUBLISHED = {
    "FT": (99.90, 99.99, 94.94, 88.25, 4.52),
    "GA": (93.91, 93.76, 87.00, 77.19, 4.66),
    "RL": (95.99, 99.98, 93.85, 31.44, 11.32),
    "SalUn": (100.00, 99.99, 94.89, 67.54, 3.03),
    "BadTeacher": (98.88, 99.99, 94.63, 61.77, 4.26),
    "SCRUB": (99.44, 99.88, 94.13, 87.43, 4.43),
    "SFR-on": (96.58, 99.88, 94.19, 72.26, 1.20),
}
RETRAINED = (95.62, 100.00, 95.34, 74.84)


@pytest.fixture(scope="module")
def nets(request):
    data = request.getfixturevalue("digits_data")
    forget, retain = split(data, random_fraction(data.y_train, 0.2))
    original = train(MLP(64, 10, hidden=(24,)), data.x_train, data.y_train, epochs=12, lr=5e-3)
    gold = train(MLP(64, 10, hidden=(24,), seed=1), *retain, epochs=12, lr=5e-3, seed=1)
    problem = UnlearningProblem(original, forget, retain, test=(data.x_test, data.y_test))
    broken = copy.deepcopy(original)
    with torch.no_grad():
        broken[-1].bias[0] = math.nan
    unlearned = run(problem, GradDiff(lr=0.05, mix=0.5, steps=40, batch_size=32)).model
    return problem, gold, {"graddiff": unlearned, "broken": broken}


@pytest.fixture(scope="module")
def found(nets):
    problem, gold, models = nets
    return audit(problem, models, gold=gold, replicates=200, relearn_lr=0.2, relearn_limit=30)


def pairs(problem):
    sets = {"forget": problem.forget, "retain": problem.retain, "test": problem.test}
    return {name: samples.batch(torch.arange(samples.size)) for name, samples in sets.items()}


def test_rates_losses_and_distances_against_plain_computations(nets, found):
    problem, gold, models = nets
    assert [m.name for m in found.models] == ["original", "gold", "graddiff", "broken"]
    nets_by_name = {"original": problem.new_model(), "gold": gold, "graddiff": models["graddiff"]}
    for name, net in nets_by_name.items():
        for place, (x, y) in pairs(problem).items():
            part = found[name].on(place)
            with torch.no_grad():
                f, g = net(x).double(), gold(x).double()
            p, q = f.softmax(1).numpy(), g.softmax(1).numpy()
            assert part.accuracy.value == pytest.approx(float((f.argmax(1) == y).double().mean()))
            assert part.loss.value == pytest.approx(float(nn.functional.cross_entropy(f, y)), rel=1e-6)
            if name == "gold":
                assert part.distances is None
                continue
            distances = part.distances
            assert distances.kl_from_gold.value == pytest.approx(entropy(q, p, axis=1).mean(), rel=1e-6)
            assert distances.kl_to_gold.value == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-6)
            assert 0 < distances.js.value < distances.kl_to_gold.value
            differing = (p.argmax(1) != q.argmax(1)).mean()
            assert distances.prediction_divergence.value == pytest.approx(differing)
            length = np.linalg.norm(p - q, axis=1).mean()
            assert distances.activation_distance.value == pytest.approx(length, rel=1e-6)
            for value in (part.accuracy, part.loss, *vars(distances).values()):
                assert value.low <= value.value <= value.high
                assert value.low < value.high
        assert found[name].accuracies == accuracies(problem, net)
        assert found[name].unlearning_accuracy.value == pytest.approx(1 - found[name].forget.accuracy.value)
        assert found[name].accuracies.unlearning == pytest.approx(1 - found[name].forget.accuracy.value)
    assert found["graddiff"].forget.loss.low > found["original"].forget.loss.value  # it has forgotten something
    assert found.sizes == (problem.forget.size, problem.retain.size, problem.test.size)


def test_the_gap_is_the_papers(nets, found):
    for name, (*values, gap) in PUBLISHED.items():
        assert average_gap(values, RETRAINED) == pytest.approx(gap, abs=0.011), name
    for values in (
        (0.63, 99.88, 94.06, 2.70),
        (7.61, 99.67, 92.83, 37.36),
    ):  # in SalUn's sense of UA and MIA, and turned
        gold = (5.24, 100, 94.26, 12.88)
        turned, other = ((100 - ua, ra, ta, 100 - mia) for ua, ra, ta, mia in (values, gold))
        assert average_gap(values, gold) == pytest.approx(average_gap(turned, other))
    for name in ("original", "graddiff"):
        model, gold = found[name], found["gold"]
        mine, theirs = (
            [
                *(m.on(place).accuracy.value for place in ("forget", "retain", "test")),
                m.attack("entropy/logistic").forget_called_member.value,
            ]
            for m in (model, gold)
        )
        assert model.average_gap.value == pytest.approx(average_gap(mine, theirs))
        assert 0 < model.average_gap.low < model.average_gap.high
    assert found["gold"].average_gap is None


def test_intervals_of_a_gap_are_paired(nets):
    """The gold model under another name is at distance 0 in every resample."""
    problem, gold, _ = nets
    again = audit(problem, {"twin": gold}, gold=gold, replicates=50)["twin"]
    assert dataclasses.astuple(again.average_gap) == (0, 0, 0)
    assert dataclasses.astuple(again.forget.distances.kl_from_gold) == (0, 0, 0)
    assert dataclasses.astuple(again.test.distances.prediction_divergence) == (0, 0, 0)


def test_another_attack_for_the_gap(nets, found):
    problem, gold, models = nets
    other = audit(problem, models, gold=gold, replicates=200, gap_attack="confidence/svc")
    assert other["graddiff"].membership == found["graddiff"].membership
    shares = [other[n].attack("confidence/svc").forget_called_non_member.value for n in ("graddiff", "gold")]
    first = [found[n].attack("entropy/logistic").forget_called_member.value for n in ("graddiff", "gold")]
    moved = (abs(shares[0] - shares[1]) - abs(first[0] - first[1])) / 4
    assert other["graddiff"].average_gap.value - found["graddiff"].average_gap.value == pytest.approx(moved)


def test_few_attacks_are_those_of_all(nets, found):
    problem, gold, models = nets
    few = audit(problem, models, gold=gold, replicates=200, attacks=["entropy/logistic"])
    for name in ("original", "graddiff"):
        (only,) = few[name].membership
        assert only == found[name].attack("entropy/logistic")
    assert few["graddiff"].average_gap == found["graddiff"].average_gap
    with pytest.raises(
        ValueError, match=r"`attacks` of `audit` must hold gap_attack='entropy/logistic'; got \['loss/svc'\]"
    ):
        audit(problem, models, gold=gold, attacks=["loss/svc"])
    with pytest.raises(ValueError, match=r"`attacks` of `audit` must be one of .*; got 'loss'"):
        audit(problem, models, gold=gold, attacks=["loss"])


def test_a_model_that_left_the_numbers_stays_in_the_table(found):
    broken = found["broken"]
    assert broken.accuracies == Accuracies(retain=0, forget=0, test=0)
    assert broken.unlearning_accuracy.value == 1
    assert broken.forget.loss is None
    assert broken.forget.distances.kl_from_gold is None
    assert broken.forget.distances.prediction_divergence.value == 1
    assert broken.membership == ()
    assert broken.average_gap is None
    assert not broken.relearning.reached
    row = next(row for row in found.table().rows if row[0] == "broken")
    assert row[1:6] == ("0.00 [0.0, 0.0]",) * 3 + ("100.00 [100.0, 100.0]", "not finite")
    assert row[6:] == ("not finite", "not in 30 [>30, >30]")
    far = next(row for row in found.distance_table().rows if row[0] == "broken")
    assert far[2:] == ("not finite",) * 4 + ("100.00 [100.0, 100.0]", "not finite")


def test_relearning_is_part_of_it(nets, found):
    problem, gold, models = nets
    for name, net in (("graddiff", models["graddiff"]), ("gold", gold)):
        assert found[name].relearning == relearn_time(problem, net, lr=0.2, limit=30, replicates=200)
    assert found["original"].relearning.steps == 0
    assert found["graddiff"].relearning.steps > 0


def test_every_model_passes_once_over_every_set(nets, monkeypatch):
    problem, gold, models = nets
    rows = []
    original = UnlearningProblem.outputs
    monkeypatch.setattr(UnlearningProblem, "outputs", lambda s, p, i: rows.append(len(i)) or original(s, p, i))
    audit(problem, models, gold=gold, replicates=5, batch_size=100)
    few = 3  # to see that each computes what the problem's model does
    assert sum(rows) == 4 * (few + problem.forget.size + problem.retain.size + problem.test.size)
    assert max(rows) == 100


def test_models_and_random_state_stay_as_they_were(nets):
    problem, gold, models = nets
    net = copy.deepcopy(models["graddiff"]).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, other = (
        audit(problem, {"net": net}, gold=gold, replicates=20, relearn_lr=0.1, relearn_limit=2) for _ in range(2)
    )
    assert one == other
    assert audit(problem, {"net": net}, gold=gold, replicates=20, seed=1) != one
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_batches_change_nothing(nets, found):
    problem, gold, models = nets
    other = audit(problem, models, gold=gold, replicates=200, batch_size=37)
    for mine, theirs in zip(found.models[:3], other.models[:3], strict=True):
        assert mine.accuracies == theirs.accuracies
        assert mine.test.loss.high == pytest.approx(theirs.test.loss.high, rel=1e-5)


def test_without_gold_and_test(nets):
    problem, _, models = nets
    bare = UnlearningProblem(problem.new_model(), *(pairs(problem)[n] for n in ("forget", "retain")))
    found = audit(bare, {"graddiff": models["graddiff"]}, replicates=20)
    assert [m.name for m in found.models] == ["original", "graddiff"]
    model = found["graddiff"]
    assert (model.test, model.membership, model.average_gap, model.relearning) == (None, (), None, None)
    assert model.forget.distances is None
    assert found.sizes[2] == 0
    assert model.accuracies.test is None
    assert found.table().rows[1][3] == "–"
    test = pairs(problem)["test"]
    later = audit(bare, {"graddiff": models["graddiff"]}, test=test, replicates=20)
    assert later == audit(problem, {"graddiff": models["graddiff"]}, replicates=20)
    assert later == audit(bare, {"graddiff": models["graddiff"]}, test=bare.read(test, name="test"), replicates=20)


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_a_language_model_is_counted_token_by_token():
    problem = next(c for c in CASES if c.name == "tied-language-model").problem()
    other = problem.new_model()
    with torch.no_grad():
        other.embedding.weight.mul_(-1.5)
    tokens = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    test = {"input_ids": tokens, "labels": tokens.clone()}
    found = audit(problem, {"other": other}, gold=other, test=test, replicates=30, batch_size=2)
    assert found["original"].accuracies == accuracies(
        problem, problem.new_model(), test=problem.read(test, name="test")
    )
    assert found["original"].forget.loss.value == pytest.approx(problem.forget_loss)
    assert found["original"].forget.distances.kl_from_gold.value > 0
    assert found["other"].average_gap.value == 0
    assert found["original"].attack("loss/threshold") is not None


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_a_loss_without_classes():
    problem = next(c for c in CASES if c.name == "mlp-squared-error").problem()
    generator = torch.Generator().manual_seed(0)
    test = (
        torch.randn(8, 3, generator=generator, dtype=torch.float64),
        torch.randn(8, 2, generator=generator, dtype=torch.float64),
    )
    found = audit(problem, {"same": problem.new_model()}, gold=problem.new_model(), test=test, replicates=20)
    model = found["same"]
    assert model.accuracies == Accuracies(retain=None, forget=None, test=None)
    assert model.accuracies.unlearning is None
    assert model.unlearning_accuracy is None
    assert model.forget.distances is None
    assert model.average_gap is None
    assert model.forget.loss.value == pytest.approx(problem.forget_loss)
    assert {a.feature for a in model.membership} == {"loss"}
    assert Audit.from_json(found.to_json()) == found
    text = str(found)  # nothing that is not defined
    for word in ("FA %", "–", "avg gap", "KL(", "entropy/logistic", "MIA"):
        assert word not in text
    assert found.table().columns == ("model", "forget loss", "retain loss", "test loss")
    assert f"{model.forget.loss.value:.3g} [" in text
    assert "the loss 'mse' has no classes" in text
    assert found._repr_html_().count("<table") == 1
    assert found.distance_table().columns == ("model", "set", "loss")
    assert found.to_markdown()
    figure, axes = found.plot()
    for ax, place in zip(axes, ("forget", "retain", "test"), strict=True):
        assert ax.get_title() == f"{place} loss"
        assert ax.containers[0].lines[0].get_xdata()[1] == model.on(place).loss.value
        assert any(np.allclose(line.get_xdata(), found["gold"].on(place).loss.value) for line in ax.lines)
    plt.close(figure)
    asked = audit(problem, {}, test=test, gap_attack="loss/logistic", relearn_lr=0.1, relearn_limit=2, replicates=20)
    assert asked.table().columns[4:] == ("MIA: called member %", "relearn, steps")
    assert "MIA by loss/logistic" in str(asked)
    figure, axes = asked.plot()
    assert [ax.get_title() for ax in axes] == ["forget loss", "retain loss", "test loss", "MIA, %"]
    plt.close(figure)


@pytest.mark.parametrize("online", [True, False])
def test_likelihood_ratio_with_shadow_models(digits_data, online):
    """Every sample is in half of the shadow models; the forgotten ones are members of the original, not of gold."""
    x, y = digits_data.x_train[:240], torch.randint(0, 10, (240,), generator=torch.Generator().manual_seed(0))
    cuts = {"forget": slice(60), "retain": slice(60, 150), "test": slice(150, 240)}
    forget, retain, test = ((x[cut], y[cut]) for cut in cuts.values())

    def trained(rows, seed):
        return train(MLP(64, 10, hidden=(64,), seed=seed), x[rows], y[rows], epochs=40, lr=5e-3, seed=seed)

    generator = torch.Generator().manual_seed(1)
    masks = torch.stack([torch.rand(240, generator=generator) for _ in range(16)]).argsort(0).argsort(0) < 8
    nets = [trained(mask.nonzero().flatten(), seed) for seed, mask in enumerate(masks)]
    parts = {name: masks[:, cut] for name, cut in cuts.items()}
    shadows = Shadows(models=nets, **{name: part.numpy() for name, part in parts.items()}, online=online)
    assert all(torch.equal(getattr(shadows, name), part) for name, part in parts.items())
    problem = UnlearningProblem(trained(torch.arange(150), 50), forget, retain, test=test)
    gold = trained(torch.arange(60, 150), 51)
    found = audit(problem, {}, gold=gold, shadows=shadows, replicates=100, gap_attack="lira/threshold")
    kept, gone = (found[name].attack("lira/threshold") for name in ("original", "gold"))
    assert kept.auc.low > 0.7
    assert kept.forget_called_member.low > 0.7
    assert gone.forget_called_member.high < 0.5
    assert found["original"].average_gap.value > 0.2
    assert (kept.feature, kept.classifier, kept.convention) == ("lira", "threshold", "")
    bare = UnlearningProblem(problem.new_model(), forget, retain)
    with pytest.raises(ValueError, match=r"`shadows` of `audit` must come with a test set; got None"):
        audit(bare, {}, shadows=shadows)


# ---------------------------------------------------------------------------- how it shows itself


def test_text_tables(found):
    text = str(found)
    for word in (
        "FA %",
        "UA %",
        "called member %",
        "avg gap",
        "KL(gold‖model)",
        "KL(model‖gold)",
        "JS",
        "95 % bootstrap",
    ):
        assert word in text
    line = next(line for line in text.splitlines() if line.startswith("graddiff"))
    forget = found["graddiff"].forget.accuracy
    assert f"{100 * forget.value:.2f} [{100 * forget.low:.1f}, {100 * forget.high:.1f}]" in line
    attacks = found.membership_table()
    assert len(attacks.rows) == 3 * 14
    row = next(r for r in attacks.rows if r[:2] == ("gold", "confidence/svc"))
    assert "SalUn" in row[-1]
    share = found["gold"].attack("confidence/svc").forget_called_member.value
    assert row[2].startswith(f"{100 * share:.2f} ")
    assert row[3].startswith(f"{100 - 100 * share:.2f} ")
    html = found._repr_html_()
    assert html.count("<table") == 2
    assert "graddiff" in html


def test_markdown_tables(found):
    text = found.to_markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == sum(2 + len(table.rows) for table in found.tables())
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 9
    odd = dataclasses.replace(found.table(), rows=(("a|b", *("",) * 7),))
    assert r"| a\|b |" in markdown(odd)


def test_steps_in_words(found):
    relearning = found["graddiff"].relearning
    assert steps(dataclasses.replace(relearning, steps=4, low=3, high=None)) == "4 [3, >30]"
    assert steps(dataclasses.replace(relearning, steps=None, low=3, high=None)) == "not in 30 [3, >30]"
    assert steps(None) == "–"


def test_json_is_strict_and_comes_back_equal(found, tmp_path):
    assert Audit.from_json(found.to_json(tmp_path / "audit.json")) == found
    assert Audit.from_json(tmp_path / "audit.json") == found
    plain = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert plain["schema"] == 1
    attack = plain["models"][0]["membership"][0]
    total = attack["forget_called_member"]["value"] + attack["forget_called_non_member"]["value"]
    assert total == pytest.approx(1)
    with pytest.raises(ValueError, match=r"`plain` of `Audit.from_dict` must have schema 1; got 2\. Make it anew"):
        Audit.from_dict({**plain, "schema": 2})


def test_a_dataframe_has_every_number(found, monkeypatch):
    frame = pytest.importorskip("pandas") and found.to_dataframe()
    assert list(frame.columns) == ["model", "set", "quantity", "value", "low", "high"]
    chosen = frame[(frame.model == "graddiff") & (frame.quantity == "kl_from_gold")].set_index("set")
    assert chosen.loc["retain", "low"] == found["graddiff"].retain.distances.kl_from_gold.low
    relearned = frame[frame.quantity == "relearning_steps"].set_index("model")
    assert relearned.loc["broken", "value"] == math.inf
    assert relearned.loc["graddiff", "value"] == found["graddiff"].relearning.steps
    rate = frame[(frame.model == "gold") & (frame.quantity == "entropy/logistic forget_called_member")]
    assert rate.value.item() == found["gold"].attack("entropy/logistic").forget_called_member.value
    assert frame[(frame.model == "broken") & (frame.quantity == "loss")].empty
    assert len(frame[frame.quantity == "average_gap"]) == 2
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"`Audit.to_dataframe` needs pandas, .* or use `rows\(\)`"):
        found.to_dataframe()


def test_an_unknown_name(found):
    with pytest.raises(KeyError, match=r"no model 'salun' in the audit; there are \['original', 'gold', 'graddiff'"):
        found["salun"]
    assert found["gold"].attack("lira/threshold") is None


def test_the_table_says_where_the_attack_is_at_chance(found):
    def with_auc(model, low, high):
        auc = Estimate(value=(low + high) / 2, low=low, high=high)
        attacks = tuple(dataclasses.replace(a, auc=auc) if a.name == found.gap_attack else a for a in model.membership)
        return dataclasses.replace(model, membership=attacks)

    def footer(*at_chance):
        models = tuple(with_auc(m, *((0.48, 0.53) if m.name in at_chance else (0.52, 0.6))) for m in found.models)
        return dataclasses.replace(found, models=models).table().footer

    assert "chance" not in footer()
    assert "at chance on gold, graddiff: " in footer("gold", "graddiff")
    assert "at chance on every model: " in footer("original", "gold", "graddiff")  # the broken one has no attack
    assert not any(a.at_chance for a in with_auc(found["gold"], 0.4, 0.49).membership if a.name == found.gap_attack)


def test_the_plot_shows_intervals_beside_golds(found, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a plot called show()"))
    figure, axes = found.plot()
    assert [ax.get_title() for ax in axes] == ["FA, %", "RA, %", "TA, %", "MIA, %", "KL(gold ‖ model), nats"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["original", "graddiff", "broken\n(not finite)"]
    for ax, place in zip(axes, ("forget", "retain", "test"), strict=False):
        (points, _, (bars,)) = ax.containers[0].lines
        shown = [found[n].on(place).accuracy for n in ("original", "graddiff")]  # the broken model's row is empty
        np.testing.assert_allclose(points.get_xdata(), [100 * e.value for e in shown])
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, [[100 * e.low, 100 * e.high] for e in shown])
        gold = found["gold"].on(place).accuracy
        assert any(np.allclose(line.get_xdata(), 100 * gold.value) for line in ax.lines)
    assert axes[4].get_xscale() == "log"
    assert [t.get_text() for t in axes[4].get_legend().get_texts()] == ["forget", "retain", "test"]
    figure.canvas.draw()
    plt.close(figure)


def test_the_plot_in_given_axes_without_gold(nets):
    problem, _, models = nets
    found = audit(problem, {"graddiff": models["graddiff"]}, replicates=20)
    figure, given = plt.subplots(1, 5)
    assert found.plot(axes=given)[0] is figure
    assert given[4].get_title() == "mean loss"
    (points, *_), *_ = given[4].containers
    assert points.get_xdata()[1] == found["graddiff"].forget.loss.value
    with pytest.raises(TypeError, match=r"`axes` of `Audit.plot` must be 5 axes, for FA, .*; got one Axes\."):
        found.plot(axes=given[0])
    with pytest.raises(TypeError, match=r"`axes` of `Audit.plot` must be 5 axes, .*; got 2 of them\."):
        found.plot(axes=given[:2])
    plt.close(figure)


# ---------------------------------------------------------------------------- refusals


def test_wrong_kinds(nets):
    problem, gold, models = nets
    with pytest.raises(TypeError, match=r"`problem` of `audit` must be an UnlearningProblem; got MLP"):
        audit(gold, models)
    with pytest.raises(TypeError, match=r"`models` of `audit` must be a mapping of names to modules; got list\."):
        audit(problem, [gold])
    with pytest.raises(TypeError, match=r"`models` of `audit` must be .* got dict of dict\."):
        audit(problem, {"a": dict(gold.state_dict())})
    with pytest.raises(ValueError, match=r"`models` of `audit` must not be called 'original' or 'gold'; got 'gold'"):
        audit(problem, {"gold": gold})
    with pytest.raises(ValueError, match=r"parameter '1.weight' of shape \(24, 64\), as .*; got \(8, 64\)"):
        audit(problem, {"small": MLP(64, 10, hidden=(8,))})
    with pytest.raises(TypeError, match=r"`gold` must be a torch.nn.Module; got OrderedDict\. Load a state_dict"):
        audit(problem, models, gold=gold.state_dict())
    result = run(problem, GradDiff(lr=0.05, steps=1))
    with pytest.raises(TypeError, match=r"got dict of RunResult\. Use \{\"salun\": result\.model\}"):
        audit(problem, {"a": result})
    with pytest.raises(TypeError, match=r"`gold` must be a torch.nn.Module; got RunResult\. Its `\.model` is one"):
        audit(problem, models, gold=result)
    with pytest.raises(
        TypeError, match=r"`shadows` of `audit` must be a Shadows; got dict\. Make one with stabkit\.metrics"
    ):
        audit(problem, models, shadows={"models": [gold]})


class Widened(nn.Sequential):
    """The problem's network with a second output layer of other shape behind its own."""

    def forward(self, x):
        return super().forward(x)[:, :4]


def test_another_architecture_is_refused_before_any_pass(nets, monkeypatch):
    """Also where names and shapes are the same: it is what the model computes that counts."""
    problem, gold, models = nets
    module = sys.modules[audit.__module__]
    monkeypatch.setattr(module, "sample_statistics", lambda *_, **__: pytest.fail("too late"))
    other = MLP(64, 10, hidden=(24,), activation=nn.Tanh)
    inputs, _ = problem.forget.batch(torch.arange(3))
    with torch.no_grad():
        apart = float((other(inputs) - MLP(64, 10, hidden=(24,))(inputs)).abs().max())
    masks = {name: torch.zeros(1, 1, dtype=torch.bool) for name in ("forget", "retain", "test")}
    for name, arguments in {
        "gold": {"gold": other},
        r"models\['tanh'\]": {"models": {"tanh": other}},
        r"shadows.models\[0\]": {"shadows": Shadows(models=[other], **masks)},
    }.items():
        with pytest.raises(
            ValueError, match=rf"`{name}` must compute what .*; got outputs that differ by {apart:.3g} on 3"
        ):
            audit(problem, arguments.pop("models", {}), **arguments)
    with pytest.raises(
        ValueError, match=r"`gold` must compute .*outputs of shape \(3, 4\) where the problem's has \(3, 10\)"
    ):
        audit(problem, models, gold=Widened(*gold))
    with pytest.raises(
        ValueError, match=r"`gold` must have a parameter '1.weight' of shape \(24, 64\).*; got \(8, 64\)"
    ):
        audit(problem, models, gold=MLP(64, 10, hidden=(8,)))


def test_wrapped_models_are_read_without_their_wrappers(nets):
    problem, gold, _ = nets
    plain = accuracies(problem, gold)
    for wrapped in (torch.compile(gold), nn.DataParallel(gold)):
        assert accuracies(problem, wrapped) == plain
    inner = copy.deepcopy(gold)
    inner[1] = torch.compile(inner[1])
    assert "1._orig_mod.weight" in dict(inner.named_parameters())
    assert accuracies(problem, inner) == plain


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ({"level": 1.5}, r"`level` of `audit` .* got 1\.5"),
        ({"replicates": 0}, r"`replicates` of `audit` .* got 0"),
        ({"batch_size": 0}, r"`batch_size` of `audit` .* got 0"),
        ({"seed": -1}, r"`seed` of `audit` .* got -1"),
        ({"relearn_lr": -0.1}, r"`relearn_lr` of `audit` .* got -0\.1"),
        ({"relearn_limit": 0}, r"`relearn_limit` of `audit` .* got 0"),
        (
            {"gap_attack": "entropy/logistics"},
            r"`gap_attack` of `audit` .* got 'entropy/logistics'\. Did you mean 'entropy/l",
        ),
        (
            {"gap_attack": "lira/threshold"},
            r"`gap_attack` of `audit` must .* no shadow models .*; got 'lira/threshold'",
        ),
    ],
)
def test_arguments_out_of_their_domain(nets, wrong, got):
    problem, gold, models = nets
    with pytest.raises(ValueError, match=got):
        audit(problem, models, gold=gold, **wrong)


def test_a_test_set_that_is_not_held_out(digits_data, nets):
    deletion = random_fraction(digits_data.y_train, 0.2)
    everything = torch.utils.data.TensorDataset(digits_data.x_train, digits_data.y_train)
    forget, retain = (torch.utils.data.Subset(everything, rows.tolist()) for rows in (deletion.forget, deletion.retain))
    problem = UnlearningProblem(nets[0].new_model(), forget, retain)
    for name, rows in (("forget", deletion.forget), ("retain", deletion.retain)):
        with pytest.raises(ValueError, match=rf"`test` of `audit` must hold no sample of `{name}`; they share 7"):
            audit(problem, {}, test=torch.utils.data.Subset(everything, rows[:7].tolist()))


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_shadow_models_need_classes():
    problem = next(c for c in CASES if c.name == "mlp-squared-error").problem()
    test = problem.read(problem.retain.batch(torch.arange(5)), name="test")
    masks = {name: torch.zeros(1, 1, dtype=torch.bool) for name in ("forget", "retain", "test")}
    with pytest.raises(ValueError, match=r"`shadows` of `audit` must be None where the loss has no classes"):
        audit(problem, {}, test=test, shadows=Shadows(models=[problem.new_model()], **masks), replicates=5)


def test_shadow_models_are_refused_before_any_pass(nets, monkeypatch):
    problem, gold, _ = nets
    monkeypatch.setattr(sys.modules[audit.__module__], "sample_statistics", lambda *_, **__: pytest.fail("too late"))
    sizes = {"forget": problem.forget.size, "retain": problem.retain.size, "test": problem.test.size}

    def shadows(rows=(True, True, False, False), **changed):
        masks = {name: torch.tensor(rows)[:, None].expand(len(rows), n) for name, n in sizes.items()}
        return {"models": [gold] * len(rows), **masks, **changed}

    for name, size in sizes.items():
        with pytest.raises(
            ValueError, match=rf"`{name}` of `Shadows` must have a column for each of the {size} .*; got 3"
        ):
            audit(problem, {}, shadows=Shadows(**shadows(**{name: np.eye(4, 3) == 1})))
        never = np.zeros((4, size), dtype=bool)
        with pytest.raises(
            ValueError, match=rf"`{name}` of `Shadows` .* 1 models trained on each sample; got 0 for s.*off"
        ):
            audit(problem, {}, shadows=Shadows(**shadows(**{name: never})))
        with pytest.raises(
            ValueError, match=rf"`{name}` of `Shadows` .* 2 models not trained on each sample; got 0 for"
        ):
            audit(problem, {}, shadows=Shadows(**shadows(**{name: ~never}), fixed_variance=False))
    with pytest.raises(
        ValueError, match=r"`forget` of `Shadows` .* at least 2 models trained on some sample; got 1 for e"
    ):
        audit(problem, {}, shadows=Shadows(**shadows((True, False, False))))


def test_masks_that_are_none(nets):
    masks = {name: torch.zeros(1, 4, dtype=torch.bool) for name in ("forget", "retain", "test")}
    for wrong, kind in ((torch.ones(1, 4), "torch.float32"), (np.ones((1, 4), int), "int64"), ([[0, 1]], "int64")):
        with pytest.raises(TypeError, match=rf"`retain` of `Shadows` must be boolean; got {kind}\. Pass `mask == 1`"):
            Shadows(models=[nets[1]], **{**masks, "retain": wrong})
    for wrong, shape in ((torch.ones(4).bool(), r"\(4,\)"), (np.ones((2, 4), bool), r"\(2, 4\)")):
        with pytest.raises(ValueError, match=rf"`test` of `Shadows` must be of shape \(1, n\), .*; got {shape}"):
            Shadows(models=[nets[1]], **{**masks, "test": wrong})


def test_a_set_that_cannot_be_halved_is_refused_before_any_pass(nets, monkeypatch):
    problem, _, _ = nets
    monkeypatch.setattr(sys.modules[audit.__module__], "sample_statistics", lambda *_, **__: pytest.fail("too late"))
    few = problem.test.batch(torch.arange(3))
    with pytest.raises(ValueError, match=r"`test` of `audit` must have at least 4 labelled samples, .*; got 3\."):
        audit(problem, {}, test=few)
    small = UnlearningProblem(problem.new_model(), problem.forget.batch(torch.arange(9)), few)
    with pytest.raises(ValueError, match=r"`retain` of `audit` must have at least 4 labelled samples, .*; got 3\."):
        audit(small, {}, test=problem.test)


def test_average_gap_of_unequal_lists():
    with pytest.raises(ValueError, match=r"`values` and `gold` of `average_gap` .*; got 2 and 3"):
        average_gap([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"got 0 and 0"):
        average_gap([], [])
