"""Membership attacks against scikit-learn and exact resampling; the likelihood-ratio attack against a known ratio."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve
from sklearn.svm import SVC

from stabkit.deletion import random_fraction
from stabkit.metrics import lira_scores, membership_attacks, parameters_of, sample_statistics
from stabkit.metrics.membership import CONVENTIONS, best_threshold, share_below
from stabkit.metrics.statistics import SampleStatistics, label_statistics
from stabkit.models import MLP
from stabkit.problem import UnlearningProblem
from stabkit.training import train

FEATURES = ("confidence", "entropy", "modified_entropy", "loss")
NAMES = {f"{f}/{c}" for f in FEATURES for c in ("threshold", "logistic", "svc")} | {"all/logistic", "all/svc"}


def simulated(n, sureness, seed):
    """Statistics of n samples with ten classes whose label is the surer, the larger `sureness`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 1, 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (n, 1), generator=generator)
    gain = sureness + torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    return label_statistics(logits.scatter_add(-1, labels.unsqueeze(-1), gain), labels)


def named(attacks):
    return {attack.name: attack for attack in attacks}


@pytest.fixture(scope="module")
def leaky():
    """Forget samples half-way between members and non-members."""
    sets = simulated(301, 2.5, 0), simulated(900, 4.0, 1), simulated(600, 1.0, 2)
    return sets, named(membership_attacks(*sets, replicates=200, seed=3))


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    members, others = np.round(rng.normal(0.7, 1, 40), 1), np.round(rng.normal(0, 1, 25), 1)  # with ties
    scores, labels = np.concatenate([members, others]), np.repeat([1, 0], [40, 25])
    threshold = best_threshold(torch.from_numpy(members), torch.from_numpy(others))
    false, hits, _ = roc_curve(labels, scores, drop_intermediate=False)
    found = balanced_accuracy_score(labels, scores >= threshold)
    assert found == pytest.approx((1 + (hits - false).max()) / 2)
    higher = [t for t in scores if t > threshold]
    assert all(balanced_accuracy_score(labels, scores >= t + 1e-9) < found for t in higher)


def test_where_nothing_tells_them_apart_nobody_is_called_a_member():
    same = torch.ones(5)
    assert best_threshold(same, same) == math.inf
    assert best_threshold(same, same + 1) == math.inf  # members below: the direction is fixed
    assert best_threshold(same + 1, same) == 1.5


def test_the_area_is_scikit_learns():
    rng = np.random.default_rng(1)
    members, others = np.round(rng.normal(0.5, 1, 50), 1), np.round(rng.normal(0, 1, 70), 1)
    below = share_below(torch.from_numpy(members), torch.from_numpy(others))
    area = roc_auc_score(np.repeat([1, 0], [50, 70]), np.concatenate([members, others]))
    assert float(below.mean()) == pytest.approx(area)


def halves(n, seed=3):
    """Calibration and held-out rows, drawn here again as the module says."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 2].sort().values, order[n // 2 :].sort().values


@pytest.mark.parametrize("name", sorted(NAMES - {"all/svc", "all/logistic"}))
def test_an_attack_again_by_hand(leaky, name):
    sets, found = leaky
    feature, classifier = name.split("/")
    forget, retain, test = (s.loss if feature == "loss" else getattr(s.labels, feature) for s in sets)
    (fit_retain, held_retain), (fit_test, held_test) = halves(900), halves(600)
    members, others = retain[fit_retain].numpy(), test[fit_test].numpy()
    if classifier == "threshold":
        sign = 1 if feature == "confidence" else -1
        cut = best_threshold(torch.from_numpy(sign * members), torch.from_numpy(sign * others))

        def judge(values):
            return sign * values.numpy(), sign * values.numpy() >= cut

    else:
        model = LogisticRegression(class_weight="balanced", tol=1e-10)
        if classifier == "svc":
            generator, model = torch.Generator().manual_seed(3), SVC(C=3, gamma=1, random_state=0)
            members, others = (v[torch.randperm(len(v), generator=generator)[:300].numpy()] for v in (members, others))
        model.fit(np.concatenate([members, others]).reshape(-1, 1), np.repeat([1, 0], [len(members), len(others)]))

        def judge(values):
            rows = values.reshape(-1, 1).numpy()
            return model.decision_function(rows), model.predict(rows).astype(bool)

    attack, truth = found[name], np.repeat([1, 0], [450, 300])
    judged = torch.cat([retain[held_retain], test[held_test]])
    assert attack.forget_called_member.value == pytest.approx(judge(forget)[1].mean())
    assert attack.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(truth, judge(judged)[1]))
    assert attack.auc.value == pytest.approx(roc_auc_score(truth, judge(judged)[0]), abs=1e-9)
    assert (attack.feature, attack.classifier) == (feature, classifier)


def test_every_attack_finds_the_leak_and_reports_both_senses(leaky):
    _, found = leaky
    assert set(found) == NAMES
    for attack in found.values():
        assert attack.auc.low > 0.75
        assert attack.balanced_accuracy.low > 0.65
        assert 0.35 < attack.forget_called_member.value < 0.95
        assert attack.forget_called_non_member == attack.forget_called_member.complement
        assert attack.forget_called_member.low <= attack.forget_called_member.value <= attack.forget_called_member.high
        assert attack.convention == CONVENTIONS.get(attack.name, "")
    assert "SFR-on" in found["entropy/logistic"].convention
    assert found["entropy/logistic"].convention.endswith("is forget_called_member")
    assert "SalUn" in found["confidence/svc"].convention
    assert found["confidence/svc"].convention.endswith("is forget_called_non_member")


@pytest.mark.parametrize("kind", ["member", "non-member"])
def test_the_sense_of_membership(kind):
    """Forget samples like the retain set are called members, those like the test set are not."""
    forget = simulated(300, 6.0 if kind == "member" else -1.0, 7)
    found = membership_attacks(forget, simulated(600, 6.0, 1), simulated(600, -1.0, 2), replicates=20)
    shares = [attack.forget_called_member.value for attack in found]
    assert all(share > 0.9 if kind == "member" else share < 0.1 for share in shares)


def test_samples_of_one_distribution_are_at_chance():
    sets = [simulated(1500, 2.0, seed) for seed in (10, 11, 12)]
    for attack in membership_attacks(*sets, replicates=300, level=0.999):
        assert attack.auc.low < 0.5 < attack.auc.high
        assert attack.balanced_accuracy.low < 0.5 < attack.balanced_accuracy.high
        assert attack.auc.value == pytest.approx(0.5, abs=0.06)  # 3.3 standard errors with 750 + 750 held out


def test_resampled_areas_are_those_of_resampled_scores(leaky):
    """The first-order components give the interval that resampling the scores themselves gives."""
    sets, found = leaky
    (_, held_retain), (_, held_test) = halves(900), halves(600)
    members, others = (-sets[k].loss[held].numpy() for k, held in ((1, held_retain), (2, held_test)))
    rng, truth = np.random.default_rng(0), np.repeat([1, 0], [450, 300])
    areas = [
        roc_auc_score(truth, np.concatenate([rng.choice(members, 450), rng.choice(others, 300)])) for _ in range(400)
    ]
    low, high = np.quantile(areas, [0.025, 0.975])
    attack = found["loss/threshold"]
    assert (attack.auc.low, attack.auc.high) == pytest.approx((low, high), abs=0.2 * (high - low))


def test_nothing_that_is_judged_was_fitted_on(leaky):
    """Other held-out samples change the judgement and not the rule: the forget set is called as before."""
    (forget, retain, test), found = leaky
    (_, held_retain), (_, held_test) = halves(900), halves(600)
    retain, test = (replaced(s, held, forget) for s, held in ((retain, held_retain), (test, held_test)))
    again = named(membership_attacks(forget, retain, test, replicates=200, seed=3))
    for name, attack in found.items():
        assert again[name].forget_called_member == attack.forget_called_member
        assert again[name].auc.value == 0.5  # they are all the same now
        assert attack.auc.value > 0.75


def replaced(statistics, held, by):
    """The same statistics with the other's average at every held-out place."""

    def put(values, other):
        return values.clone().index_fill_(0, held, float(other.mean()))

    labels = {n: put(v, getattr(by.labels, n)) for n, v in vars(statistics.labels).items() if n != "counted"}
    changed = type(statistics.labels)(counted=statistics.labels.counted, **labels)
    return SampleStatistics(loss=put(statistics.loss, by.loss), labels=changed)


def test_the_seed_is_all_there_is_to_chance(leaky):
    sets, found = leaky
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert named(membership_attacks(*sets, replicates=200, seed=3)) == found
    assert named(membership_attacks(*sets, replicates=200, seed=4)) != found
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_a_loss_without_classes_is_attacked_by_its_losses():
    generator = torch.Generator().manual_seed(0)
    losses = [
        torch.rand(n, generator=generator, dtype=torch.float64) * scale for n, scale in ((40, 1), (200, 1), (200, 3))
    ]
    found = named(membership_attacks(*(SampleStatistics(loss=values) for values in losses), replicates=50))
    assert set(found) == {"loss/threshold", "loss/logistic", "loss/svc"}
    assert all(attack.auc.value > 0.75 for attack in found.values())


def test_samples_without_a_label_are_left_out():
    forget, retain, test = simulated(50, 2.0, 0), simulated(200, 4.0, 1), simulated(200, 1.0, 2)
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(50, 1, 10, generator=generator, dtype=torch.float64)
    nothing = label_statistics(logits, torch.full((50, 1), -100))
    parts = {n: torch.cat([v, getattr(nothing.labels, n)]) for n, v in vars(forget.labels).items()}
    more = SampleStatistics(loss=torch.cat([forget.loss, nothing.loss]), labels=type(forget.labels)(**parts))
    assert membership_attacks(nothing, retain, test, replicates=5) == ()
    one, other = (named(membership_attacks(f, retain, test, replicates=5)) for f in (forget, more))
    for name, attack in one.items():
        assert other[name].forget_called_member.value == attack.forget_called_member.value


def test_a_model_that_left_the_numbers_cannot_be_attacked(leaky):
    (forget, retain, test), _ = leaky
    spoilt = {n: v if n in {"counted", "right"} else v * math.nan for n, v in vars(forget.labels).items()}
    broken = SampleStatistics(loss=forget.loss * math.nan, labels=type(forget.labels)(**spoilt))
    assert membership_attacks(broken, retain, test, replicates=5) == ()


@pytest.mark.parametrize("scale", [1e6, 1e12])
def test_extreme_losses_are_fitted_without_a_murmur(scale):
    sets = [SampleStatistics(loss=simulated(100, s, k).loss * scale) for k, s in enumerate((2.0, 5.0, 0.0))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = named(membership_attacks(*sets, replicates=5))
    assert found["loss/logistic"].auc.value > 0.8
    assert found["loss/logistic"].balanced_accuracy.value > 0.7


@pytest.mark.parametrize(("n", "scale"), [(20, 1e3), (100, 1e-8)])
def test_features_that_hardly_vary_are_fitted_without_a_murmur(n, scale):
    """All but a few entropies are 0 where logits are large, and ln 10 but for rounding where they are small."""

    def scaled(sureness, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(n, 1, 10, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 10, (n, 1), generator=generator)
        return label_statistics(scale * (logits + sureness * torch.nn.functional.one_hot(labels, 10)), labels)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = named(membership_attacks(*(scaled(s, k) for k, s in enumerate((2.0, 5.0, 0.0))), replicates=5))
    assert {"entropy/logistic", "all/logistic"} <= set(found)


def test_numbers_too_large_to_be_squared_cannot_be_attacked():
    sets = [SampleStatistics(loss=simulated(100, s, k).loss * 1e200) for k, s in enumerate((2.0, 5.0, 0.0))]
    assert membership_attacks(*sets, replicates=5) == ()


def test_an_overfitted_model_is_found_out_and_an_honest_one_is_not(digits_data):
    """Random labels can only be known by heart; a model trained on other samples knows nothing of the forget set."""
    deletion = random_fraction(digits_data.y_train, 0.1)
    generator = torch.Generator().manual_seed(0)
    y, y_test = (torch.randint(0, 10, s.shape, generator=generator) for s in (digits_data.y_train, digits_data.y_test))
    forget, retain = ((digits_data.x_train[i], y[i]) for i in (deletion.forget, deletion.retain))
    model = train(MLP(64, 10, hidden=(256,)), digits_data.x_train, y, epochs=60, lr=5e-3)
    gold = train(MLP(64, 10, hidden=(256,)), *retain, epochs=60, lr=5e-3)
    problem = UnlearningProblem(model, forget, retain, test=(digits_data.x_test, y_test))

    def attacked(net, *sets, **options):
        parameters = {"": parameters_of(problem, net)}
        statistics = [sample_statistics(problem, samples, parameters)[""][0] for samples in sets]
        return named(membership_attacks(*statistics, replicates=200, **options))

    own, other = (attacked(net, problem.forget, problem.retain, problem.test) for net in (model, gold))
    for name in ("loss/threshold", "confidence/svc", "modified_entropy/threshold", "all/logistic"):
        assert own[name].auc.low > 0.8
        assert own[name].forget_called_member.low > 0.6  # it was trained on them
        assert other[name].forget_called_member.high < 0.4  # it was not
    # And of two halves that the model was not trained on, neither can be told from the other.
    half = len(y_test) // 2
    pieces = [
        problem.read((digits_data.x_test[cut], y_test[cut]), name="test") for cut in (slice(half), slice(half, None))
    ]
    for attack in attacked(model, problem.forget, *pieces, level=0.999).values():
        assert attack.auc.low <= 0.5 <= attack.auc.high


@pytest.mark.parametrize("name", ["retain", "test"])
def test_sets_too_small_to_halve(name):
    sets = {"forget": simulated(9, 1.0, 0), "retain": simulated(9, 1.0, 1), "test": simulated(9, 1.0, 2)}
    sets[name] = simulated(3, 1.0, 3)
    with pytest.raises(ValueError, match=rf"`{name}` of `membership_attacks` must have at least 4 labelled .*; got 3"):
        membership_attacks(**sets)


def test_arguments_out_of_their_domain(leaky):
    sets, _ = leaky
    with pytest.raises(ValueError, match=r"`level` of `membership_attacks` must be .* in \(0, 1\); got 1"):
        membership_attacks(*sets, level=1)
    with pytest.raises(ValueError, match=r"`replicates` of `membership_attacks` must be .* >= 1; got 0"):
        membership_attacks(*sets, replicates=0)
    with pytest.raises(ValueError, match=r"`seed` of `membership_attacks` must be .* >= 0; got -1"):
        membership_attacks(*sets, seed=-1)


# ---------------------------------------------------------------------------- likelihood-ratio attack


def toy(shadows, n, seed=0, fixed=True):
    """Scaled confidences that are Gaussian with known means: higher where the sample was trained on."""
    rng = np.random.default_rng(seed)
    out, gain = rng.normal(0, 2, n), rng.uniform(0.5, 3, n)
    deviation = np.full((2, n), [[0.7], [1.3]]) if fixed else rng.uniform(0.5, 2, (2, n))
    trained_on = rng.permuted(np.arange(shadows)[:, None].repeat(n, 1) % 2 == 0, axis=0)
    values = rng.normal(out + gain * trained_on, np.where(trained_on, *deviation))
    member = rng.random(n) < 0.5
    observed = rng.normal(out + gain * member, np.where(member, *deviation))
    known = norm.logpdf(observed, out + gain, deviation[0]) - norm.logpdf(observed, out, deviation[1])
    return [torch.from_numpy(a) for a in (observed, values, trained_on)], member, known, (out, deviation)


@pytest.mark.parametrize("fixed", [True, False])
def test_with_many_shadow_models_the_ratio_is_the_known_one(fixed):
    arguments, member, known, (out, deviation) = toy(8000, 100, fixed=fixed)
    found = lira_scores(*arguments, fixed_variance=fixed).numpy()
    np.testing.assert_allclose(found, known, atol=0.12 * (1 + np.abs(known)).max() / 4)
    assert np.corrcoef(found, known)[0, 1] > 0.999
    offline = lira_scores(*arguments, online=False, fixed_variance=fixed).numpy()
    np.testing.assert_allclose(norm.cdf(offline), norm.cdf(arguments[0].numpy(), out, deviation[1]), atol=0.03)
    assert roc_auc_score(member, found) == pytest.approx(roc_auc_score(member, known), abs=0.01)


def test_a_few_shadow_models_already_beat_one_threshold():
    arguments, member, known, _ = toy(16, 3000)
    online, offline = (roc_auc_score(member, lira_scores(*arguments, online=on).numpy()) for on in (True, False))
    plain = roc_auc_score(member, arguments[0].numpy())
    assert plain + 0.1 < online < roc_auc_score(member, known)
    assert plain + 0.05 < offline < online


def test_the_ratio_by_hand():
    shadows = torch.tensor([[1.0, 5.0], [3.0, 2.0], [-1.0, 0.0], [-2.0, 6.0]], dtype=torch.float64)
    trained_on = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1]]).bool()
    observed = torch.tensor([0.5, 4.0])
    free = lira_scores(observed, shadows, trained_on, fixed_variance=False)
    expected = [
        norm.logpdf(0.5, 2, math.sqrt(2)) - norm.logpdf(0.5, -1.5, math.sqrt(0.5)),
        norm.logpdf(4, 5.5, math.sqrt(0.5)) - norm.logpdf(4, 1, math.sqrt(2)),
    ]
    assert free.tolist() == pytest.approx(expected)
    # one variance: (2 + 0.5)/2 within samples, for models with the sample as for those without it
    both = norm.logpdf([0.5, 4], [2, 5.5], math.sqrt(1.25)) - norm.logpdf([0.5, 4], [-1.5, 1], math.sqrt(1.25))
    assert lira_scores(observed, shadows, trained_on).tolist() == pytest.approx(both.tolist())
    offline = lira_scores(observed, shadows, trained_on, online=False)
    assert offline.tolist() == pytest.approx([2 / math.sqrt(1.25), 3 / math.sqrt(1.25)])


def test_the_likelihood_ratio_is_refused_what_it_cannot_use():
    (observed, shadows, trained_on), *_ = toy(8, 5)
    with pytest.raises(TypeError, match=r"`trained_on` of `lira_scores` must be boolean; got torch.int64"):
        lira_scores(observed, shadows, trained_on.long())
    with pytest.raises(ValueError, match=r"must have shape \(S, n\), .*; got \(8, 4\), \(8, 5\) and \(5,\)"):
        lira_scores(observed, shadows[:, :4], trained_on)
    broken = shadows.clone()
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"`shadows` of `lira_scores` must be finite; got 1 shadow models"):
        lira_scores(observed, broken, trained_on)
    never = trained_on.clone()
    never[:, 3] = False
    with pytest.raises(ValueError, match=r"at least 1 models trained on each sample; got 0 for sample 3\. .*offline"):
        lira_scores(observed, shadows, never)
    assert bool(lira_scores(observed, shadows, never, online=False).isfinite().all())
    with pytest.raises(ValueError, match=r"at least 2 models not trained on each sample; got 0 for sample 3\."):
        lira_scores(observed, shadows, ~never, fixed_variance=False)
    few = torch.tensor([[True], [False]]).expand(2, 5)
    with pytest.raises(ValueError, match=r"at least 2 models not trained on some sample; got 1 for each\. Train more"):
        lira_scores(observed, shadows[:2], few)
    same = shadows[:1].expand(8, 5)
    with pytest.raises(ValueError, match=r"must vary over the models not trained on a sample; got variance 0"):
        lira_scores(observed, same, trained_on)
