"""Membership inference on the forget set: is it told from held-out data as the retain set is?

An attack is fitted on one half of the retain set (members) and of the test set (non-members), measured on the other
halves, and asked about the forget set. *Members are the positive class throughout*, and rates are shares in [0, 1].
Papers report opposite senses of the same number: see `Attack.convention`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabkit._validate import check_int, check_real, check_seed
from stabkit.metrics.bootstrap import Estimate, Resamples, interval
from stabkit.metrics.statistics import SampleStatistics

SIGNS = {
    "confidence": 1.0,
    "entropy": -1.0,
    "modified_entropy": -1.0,
    "loss": -1.0,
    "lira": 1.0,
}  # + where members score high
LEARNERS = ("logistic", "svc")
SVC_SAMPLES = 1000  # of each class at most: the fit is quadratic in them
FEWEST = 4  # samples of a set that is halved
LARGEST = 1e100  # number to fit a learner to: sums of squares stay finite
CONVENTIONS = {
    "entropy/logistic": "the MIA of SFR-on (Huang et al. 2024) is forget_called_member",
    "confidence/svc": "the MIA-efficacy of SalUn (Fan et al. 2024) is forget_called_non_member",
}
SETS = ("forget", "retain", "test")

# Scores, higher for members, and whether each sample is called one.
Rule = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What one membership attack says about a model; every rate is a share in [0, 1], members are positive.

    Attributes:
        feature: "confidence", "entropy", "modified_entropy", "loss", "all" of them together, or "lira".
        classifier: "threshold", "logistic" or "svc".
        forget_called_member: Share of forget samples called member.
        forget_called_non_member: Its complement.
        auc: P(a held-out retain sample scores above a held-out test sample), ties one half; 0.5 is chance.
        balanced_accuracy: Mean of the shares of held-out retain samples called member and of held-out test samples called
            non-member; 0.5 is chance.
        convention: Which paper's number equals which of the two shares, up to how samples are split; empty if none.
    """

    feature: str
    classifier: str
    forget_called_member: Estimate
    forget_called_non_member: Estimate
    auc: Estimate
    balanced_accuracy: Estimate
    convention: str

    @property
    def name(self) -> str:
        """Feature and classifier, as in "entropy/logistic"."""
        return f"{self.feature}/{self.classifier}"

    @property
    def at_chance(self) -> bool:
        """Whether the interval of the AUC holds one half: the shares may then be those of a coin's side."""
        return self.auc.low <= 0.5 <= self.auc.high


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """One attack's numbers on the sets and on their resamples, shape (1 + replicates,) each.

    Attributes:
        member: Share of forget samples called member.
        auc: Area under the curve of the held-out halves.
        balanced_accuracy: Balanced accuracy on them.
    """

    member: Tensor
    auc: Tensor
    balanced_accuracy: Tensor

    def attack(self, name: str, level: float) -> Attack:
        """The result with intervals.

        Args:
            name: Feature and classifier, joined by a stroke.
            level: Nominal coverage.

        Returns:
            The attack.
        """
        member, auc, balanced = (interval(draws, level) for draws in (self.member, self.auc, self.balanced_accuracy))
        feature, classifier = name.split("/")
        return Attack(
            feature=feature,
            classifier=classifier,
            forget_called_member=member,
            forget_called_non_member=member.complement,
            auc=auc,
            balanced_accuracy=balanced,
            convention=CONVENTIONS.get(name, ""),
        )


def membership_attacks(
    forget: SampleStatistics,
    retain: SampleStatistics,
    test: SampleStatistics,
    *,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> tuple[Attack, ...]:
    """Every attack on one model, from its statistics on the three sets.

    Thresholds maximise the balanced accuracy of the calibration halves; of equally good ones the highest, which calls the
    fewest samples members, is taken. Their direction is fixed: members are taken to have the higher confidence and the
    lower entropy, modified entropy and loss. Logistic regression has balanced class weights (as in SFR-on's code), the
    support vector classifier an RBF kernel with C = 3 and γ = 1/features on equally many samples of both classes, at most
    1000 each (as in SalUn's). One feature goes in as it is, all of them are standardised by the calibration halves.

    Intervals are over the samples that are judged. The attacks stay as they were fitted.

    Args:
        forget: Statistics of the forget set.
        retain: Statistics of the retain set, the members.
        test: Statistics of the test set, the non-members: drawn like the retain set, if the attack is to mean anything.
            After the deletion of a class leave that class out of it.
        level: Nominal coverage of the bootstrap intervals.
        replicates: Bootstrap resamples.
        seed: Of the halves and the resamples.

    Returns:
        Four threshold attacks and, of both learners, one for each feature and one for all; those on the loss alone where
        the loss has no classes. Features that are not finite, or beyond 10¹⁰⁰, give no attack. Cost: with 1000 samples of
        each class the five support vector classifiers take most of it, some seconds on one core for 50,000 samples to judge.

    Raises:
        ValueError: If a set is too small to be halved, or an argument is out of its domain.
    """
    check_real(level, name="level", owner="membership_attacks", low=0, high=1, low_open=True, high_open=True)
    check_int(replicates, name="replicates", owner="membership_attacks", low=1)
    check_seed(seed, owner="membership_attacks")
    sets = dict(zip(SETS, (forget, retain, test), strict=True))
    generator = torch.Generator().manual_seed(seed)
    resamples = {name: Resamples(len(sets[name].loss), replicates, generator) for name in SETS}
    drawn = draw_attacks(sets, {}, resamples, seed)
    return tuple(found.attack(name, level) for name, found in drawn.items())


def draw_attacks(
    sets: Mapping[str, SampleStatistics],
    scores: Mapping[str, Tensor],
    resamples: Mapping[str, Resamples],
    seed: int,
    only: Sequence[str] | None = None,
) -> dict[str, Drawn]:
    """Fit, judge and resample attacks on one model.

    Args:
        sets: Statistics of the forget, retain and test set.
        scores: Likelihood-ratio scores (`lira_scores`) of the same sets; empty where there are none.
        resamples: Resamples of the same sets.
        seed: Of the halves, which are the same for every model.
        only: Names of the attacks; all when None.

    Returns:
        Attacks by name.

    Raises:
        ValueError: If a set is too small to be halved.
    """
    kept = {name: _labelled(sets[name]) for name in SETS}
    calibration = {name: _half(kept[name], name, seed) for name in ("retain", "test")}
    judged = {"forget": kept["forget"], **{name: kept[name] & ~half for name, half in calibration.items()}}
    columns = {name: _features(sets[name], scores.get(name)) for name in SETS}
    names: list[str] = []
    sums: dict[str, list[Tensor]] = {name: [] for name in SETS}
    for attack, chosen in _attacks(list(columns["forget"])) if bool(kept["forget"].any()) else ():
        if only is not None and attack not in only:
            continue
        block = {name: torch.stack([columns[name][f] for f in chosen], 1) for name in SETS}
        if not all(bool((block[name][kept[name]].abs() < LARGEST).all()) for name in SETS):
            continue  # NaN is below nothing
        rule = _fit(attack, block["retain"][calibration["retain"]], block["test"][calibration["test"]], seed)
        (_, calls), (members, hits), (others, false) = (rule(block[name][judged[name]]) for name in SETS)
        # The area is the mean over members of the share of non-members below them, and the other way round: its
        # resamples are those of the two means, to first order (DeLong et al. 1988).
        over, under = share_below(members, others), 1 - share_below(others, members)
        names.append(attack)
        for name, values in (("forget", calls), ("retain", hits), ("retain", over), ("test", ~false), ("test", under)):
            whole = torch.zeros(len(judged[name]), dtype=torch.float64)
            sums[name].append(whole.masked_scatter(judged[name], values.double()))
    if not names:
        return {}
    ratios = {}
    for name in SETS:
        above = torch.stack(sums[name], 1)
        ratios[name] = resamples[name].ratios(above, judged[name].double().unsqueeze(1).expand_as(above))
    found = {}
    for place, attack in enumerate(names):
        member, over = ratios["retain"][:, 2 * place], ratios["retain"][:, 2 * place + 1]
        non_member, under = ratios["test"][:, 2 * place], ratios["test"][:, 2 * place + 1]
        found[attack] = Drawn(
            member=ratios["forget"][:, place],
            auc=(over + under - over[0]).clamp(0, 1),
            balanced_accuracy=(member + non_member) / 2,
        )
    return found


def attack_names(features: Sequence[str]) -> list[str]:
    """Names of the attacks on some features.

    Args:
        features: Names of features.

    Returns:
        Feature and classifier, joined by a stroke.
    """
    return [name for name, _ in _attacks(features)]


def best_threshold(members: Tensor, others: Tensor) -> float:
    """The score from which on a sample is called a member, with the largest balanced accuracy on these.

    Args:
        members: Scores of members, shape (m,).
        others: Scores of non-members, shape (n,).

    Returns:
        A value half-way between two neighbouring scores, or an infinity; of equally good ones the highest.
    """
    values = torch.cat([members, others]).unique()
    inner = (values[1:] + values[:-1]) / 2
    ends = values.new_tensor([-math.inf]), values.new_tensor([math.inf])
    candidates = torch.cat([ends[0], inner, ends[1]])
    hits = members.numel() - torch.searchsorted(members.sort().values, candidates)
    false = others.numel() - torch.searchsorted(others.sort().values, candidates)
    gain = hits * others.numel() - false * members.numel()  # whole numbers, so that ties are ties
    return float(candidates[gain == gain.max()][-1])


def share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Share of the others below each score, ties one half.

    Args:
        scores: Shape (m,).
        others: Shape (n,).

    Returns:
        Shares of shape (m,); their mean is the area under the ROC curve.
    """
    ordered = others.sort().values
    below, not_above = (torch.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return (below + not_above).double() / (2 * others.numel())


def _attacks(features: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Name and features of each attack."""
    single = [f for f in features if f != "lira"]
    found = [(f"{f}/threshold", [f]) for f in features]
    for learner in LEARNERS:
        found += [(f"{f}/{learner}", [f]) for f in single]
        if single[1:]:
            found.append((f"all/{learner}", single))
    return found


def _features(statistics: SampleStatistics, lira: Tensor | None) -> dict[str, Tensor]:
    """Features of a set by name."""
    found = {}
    if statistics.labels is not None:
        labels = statistics.labels
        found = {"confidence": labels.confidence, "entropy": labels.entropy}
        found["modified_entropy"] = labels.modified_entropy
    found["loss"] = statistics.loss
    return found if lira is None else {**found, "lira": lira}


def _labelled(statistics: SampleStatistics) -> Tensor:
    """Which samples have a label to say anything about."""
    if statistics.labels is None:
        return torch.ones_like(statistics.loss, dtype=torch.bool)
    return statistics.labels.counted > 0


def check_halves(count: int, *, name: str, owner: str) -> None:
    """Refuse a set that is too small to be halved.

    Args:
        count: Its labelled samples.
        name: "retain" or "test".
        owner: The public function that was given it, for the error.

    Raises:
        ValueError: If there are too few.
    """
    if count < FEWEST:
        raise ValueError(
            f"`{name}` of `{owner}` must have at least {FEWEST} labelled samples, to be halved; got {count}. Use a larger "
            "set."
        )


def _half(kept: Tensor, name: str, seed: int) -> Tensor:
    """Mask of the calibration half."""
    places = kept.nonzero().flatten()
    check_halves(places.numel(), name=name, owner="membership_attacks")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(places.numel(), generator=generator)
    return torch.zeros_like(kept).index_fill_(0, places[order[: places.numel() // 2]], True)


def _fit(attack: str, members: Tensor, others: Tensor, seed: int) -> Rule:
    """Fit an attack on the calibration halves, (m, k) and (n, k)."""
    feature, classifier = attack.split("/")
    if classifier == "threshold":
        sign = SIGNS[feature]
        return functools.partial(_above, sign=sign, threshold=best_threshold(sign * members[:, 0], sign * others[:, 0]))
    if classifier == "svc":
        size = min(len(members), len(others), SVC_SAMPLES)
        generator = torch.Generator().manual_seed(seed)
        members, others = (part[torch.randperm(len(part), generator=generator)[:size]] for part in (members, others))
    labels = np.repeat([1, 0], [len(members), len(others)])
    model = _fitted(classifier, torch.cat([members, others]).numpy(), labels, standardised=feature == "all")
    return functools.partial(_decide, model=model)


def _fitted(classifier: str, features: np.ndarray, labels: np.ndarray, *, standardised: bool) -> Any:
    """A classifier fitted to features (n, k) and labels (n,), without scikit-learn's word on how it got there."""
    from scipy.linalg import LinAlgWarning
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # seconds of import that only attacks need
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler
    from sklearn.svm import SVC

    if classifier == "svc":
        # Nothing here is random, but without a seed it takes one from NumPy's global state.
        model = SVC(C=3, gamma="auto", kernel="rbf", random_state=0)
        return (make_pipeline(StandardScaler(), model) if standardised else model).fit(features, labels)
    # Newton's method: it converges whatever the feature's scale, but for features of 10⁶ and more and those that hardly
    # vary. There it warns and hands over to L-BFGS, whose rule may be useless.
    model = LogisticRegression(class_weight="balanced", solver="newton-cholesky")
    with warnings.catch_warnings():
        for category in (ConvergenceWarning, LinAlgWarning):
            warnings.simplefilter("error", category)
        try:
            return (make_pipeline(StandardScaler(), model) if standardised else model).fit(features, labels)
        except (ConvergenceWarning, LinAlgWarning):
            pass
        # The same minimum in coordinates u = (x - μ)/s: the intercept is free, and |w_x|²/2 = |w_u|²/(2s²) makes C = s².
        # What then still warns has classes that are apart, where any rule between them will do.
        for category in (ConvergenceWarning, LinAlgWarning):
            warnings.simplefilter("ignore", category)
        if standardised:
            return make_pipeline(StandardScaler(), model).fit(features, labels)
        centre, scale = features.mean(0), max(1.0, float(features.std()))
        moved = FunctionTransformer(lambda x: (x - centre) / scale)
        return make_pipeline(moved, model.set_params(C=scale**2)).fit(features, labels)


def _above(features: Tensor, *, sign: float, threshold: float) -> tuple[Tensor, Tensor]:
    """The threshold's rule."""
    scores = sign * features[:, 0]
    return scores, scores >= threshold


def _decide(features: Tensor, *, model: Any) -> tuple[Tensor, Tensor]:
    """A learner's rule."""
    scores = torch.from_numpy(model.decision_function(features.numpy()))
    return scores, scores > 0
