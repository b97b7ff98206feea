"""`audit`: several unlearned models beside the original and a retrained one, from one pass of each over every set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from stabkit._progress import progress_bar
from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int, check_real, check_seed
from stabkit.data import Data
from stabkit.losses import CrossEntropy
from stabkit.metrics.accuracy import parameters_of
from stabkit.metrics.bootstrap import Estimate, Resamples, estimate
from stabkit.metrics.lira import Shadows, lira_scores
from stabkit.metrics.membership import SETS, SIGNS, Drawn, attack_names, check_halves, draw_attacks
from stabkit.metrics.relearn import Relearning, relearn_time
from stabkit.metrics.result import Audit, Distances, ModelAudit, SetAudit
from stabkit.metrics.statistics import (
    AUDIT_BATCH,
    LabelStatistics,
    SampleDistances,
    SampleStatistics,
    sample_statistics,
)
from stabkit.metrics.tables import GOLD, ORIGINAL
from stabkit.problem import UnlearningProblem
from stabkit.samples import Samples

GAP_ATTACK = "entropy/logistic"
ATTACKS = attack_names(tuple(SIGNS))

# A statistic's numerators and denominators, (n,) each.
Column = tuple[Tensor, Tensor]


def audit(
    problem: UnlearningProblem,
    models: Mapping[str, nn.Module],
    *,
    gold: nn.Module | None = None,
    test: Data | Samples | None = None,
    shadows: Shadows | None = None,
    gap_attack: str = GAP_ATTACK,
    attacks: Sequence[str] | None = None,
    relearn_lr: float | None = None,
    relearn_limit: int = 100,
    level: float = 0.95,
    replicates: int = 1000,
    batch_size: int = AUDIT_BATCH,
    seed: int = 0,
    progress: bool = False,
) -> Audit:
    """Accuracies, losses, membership attacks, distances to the gold model, average gap and relearning time of models.

    Rates are shares in [0, 1]. Every interval is a percentile bootstrap over the samples of the sets, with the same
    resamples for all models, so that differences between models are paired. It is about these models: how far another
    training seed would have come out is not in it. That of an average gap tends to lie high where the gap is near 0, as
    absolute differences cannot be negative.

    Args:
        problem: The unlearning problem; its model is the original.
        models: Unlearned models of the same architecture, by name; not altered.
        gold: A model of that architecture, retrained without the forget set.
        test: Held-out samples; the problem's own when None. Without any there are no attacks and no gap. After the deletion
            of a class leave that class out of it: there is no right answer left for it, so that TA would fall for having
            forgotten, and attacks want non-members drawn like the retain set.
        shadows: Shadow models for the likelihood-ratio attack "lira/threshold".
        gap_attack: Whose `forget_called_member` is the MIA of the average gap. Gaps are the same in either sense of MIA,
            and for UA as for FA.
        attacks: Names of the attacks to make, `gap_attack` among them; all when None. The support vector classifiers take
            most of an audit's time.
        relearn_lr: Step size of relearning the forget set (`relearn_time`), which is left out when None.
        relearn_limit: Steps of relearning at most.
        level: Nominal coverage of the intervals, in (0, 1).
        replicates: Bootstrap resamples.
        batch_size: Samples a forward pass; choose it small for language models.
        seed: Of resamples, of the attacks' halves and of relearning's batches.
        progress: Whether to show a progress bar.

    Returns:
        The audit. Cost: one forward pass of each model over all sets, and the relearning. Memory: the models' parameters
        on the problem's device, and a count for each resample and sample.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its domain, a model has another architecture, the test set shares samples with
            retain or forget set, either of test and retain set is too small to be halved for the attacks, or shadow models
            do not cover a sample.
    """
    _check(problem, models, gap_attack, shadows)
    for attack in attacks or ():
        check_choice(attack, name="attacks", owner="audit", choices=ATTACKS)
    if attacks is not None and gap_attack not in attacks:
        raise ValueError(f"`attacks` of `audit` must hold gap_attack={gap_attack!r}; got {list(attacks)}. Add it.")
    check_real(level, name="level", owner="audit", low=0, high=1, low_open=True, high_open=True)
    check_int(replicates, name="replicates", owner="audit", low=1)
    check_int(batch_size, name="batch_size", owner="audit", low=1)
    check_seed(seed, owner="audit")
    if relearn_lr is not None:
        check_real(relearn_lr, name="relearn_lr", owner="audit", low=0, low_open=True)
    check_int(relearn_limit, name="relearn_limit", owner="audit", low=1)
    with preserved_rng():
        retrained = {} if gold is None else {GOLD: gold}
        judged = {ORIGINAL: problem.new_model(), **retrained, **models}
        parameters = {
            name: parameters_of(problem, model, name="gold" if name == GOLD else f"models[{name!r}]")
            for name, model in judged.items()
        }
        for place, model in enumerate(() if shadows is None else shadows.models):
            parameters_of(problem, model, name=f"shadows.models[{place}]")  # before any long pass
    sets = _sets(problem, test)
    if shadows is not None:
        _check_shadows(shadows, problem, sets)
    for name in ("retain", "test") if "test" in sets else ():
        check_halves(sets[name].size, name=name, owner="audit")
    with preserved_rng():
        against = None if gold is None else GOLD
        passes = {
            name: sample_statistics(problem, samples, parameters, gold=against, batch_size=batch_size)
            for name, samples in progress_bar(sets.items(), "audit", progress)
        }
        generator = torch.Generator().manual_seed(seed)
        resamples = {name: Resamples(samples.size, replicates, generator) for name, samples in sets.items()}
        scores = _lira(problem, sets, shadows, passes, batch_size)
        measured = {
            name: _Measured({key: passes[key][name] for key in sets}, resamples, scores.get(name, {}), seed, attacks)
            for name in parameters
        }
        relearned = {
            name: None
            if relearn_lr is None
            else relearn_time(
                problem,
                model,
                lr=relearn_lr,
                limit=relearn_limit,
                level=level,
                replicates=replicates,
                seed=seed,
            )
            for name, model in judged.items()
        }
    return Audit(
        models=tuple(
            found.audit(name, level, gap_attack, measured.get(GOLD) if name != GOLD else None, relearned[name])
            for name, found in measured.items()
        ),
        level=level,
        replicates=replicates,
        seed=seed,
        gap_attack=gap_attack,
        sizes=(problem.forget.size, problem.retain.size, sets["test"].size if "test" in sets else 0),
        loss=problem.loss.name,
    )


def average_gap(values: Sequence[float], gold: Sequence[float]) -> float:
    """Mean absolute difference of a model's numbers to the gold model's, as in the papers' tables.

    Args:
        values: FA (or UA), RA, TA and MIA, all in one unit.
        gold: The same of the gold model.

    Returns:
        The gap, in that unit; the same for FA as for UA and for either sense of MIA.

    Raises:
        ValueError: If there are not as many numbers in both.
    """
    if len(values) != len(gold) or not len(values):
        raise ValueError(
            f"`values` and `gold` of `average_gap` must hold as many numbers, at least one; got {len(values)} and "
            f"{len(gold)}."
        )
    return sum(abs(a - b) for a, b in zip(values, gold, strict=True)) / len(values)


class _Measured:
    """One model's statistics on the sets and their resamples, shape (1 + replicates,) each."""

    def __init__(
        self,
        passes: Mapping[str, tuple[SampleStatistics, SampleDistances | None]],
        resamples: Mapping[str, Resamples],
        scores: Mapping[str, Tensor],
        seed: int,
        attacks: Sequence[str] | None,
    ) -> None:
        self.draws = {
            name: _ratios(resamples[name], _columns(statistics, distances))
            for name, (statistics, distances) in passes.items()
        }
        self.attacks: dict[str, Drawn] = {}
        if "test" in passes:
            self.attacks = draw_attacks({name: passes[name][0] for name in SETS}, scores, resamples, seed, attacks)

    def audit(
        self, name: str, level: float, gap_attack: str, gold: _Measured | None, relearning: Relearning | None
    ) -> ModelAudit:
        """The result, with the gap to the gold model if there is one."""
        sets = {key: self._set(key, level) for key in self.draws}
        return ModelAudit(
            name=name,
            forget=sets["forget"],
            retain=sets["retain"],
            test=sets.get("test"),
            membership=tuple(drawn.attack(attack, level) for attack, drawn in self.attacks.items()),
            average_gap=None if gold is None else self._gap(gold, gap_attack, level),
            relearning=relearning,
        )

    def _set(self, name: str, level: float) -> SetAudit:
        """One set's estimates."""
        found: dict[str, Estimate | None] = {key: estimate(draws, level) for key, draws in self.draws[name].items()}
        accuracy, loss = found.pop("accuracy", None), found.pop("loss")
        return SetAudit(accuracy=accuracy, loss=loss, distances=Distances(**found) if found else None)

    def _gap(self, gold: _Measured, gap_attack: str, level: float) -> Estimate | None:
        """Average gap; None where accuracies or attack are missing."""
        if gap_attack not in self.attacks or gap_attack not in gold.attacks or "accuracy" not in self.draws["forget"]:
            return None
        own, other = (
            [*(side.draws[name]["accuracy"] for name in SETS), side.attacks[gap_attack].member] for side in (self, gold)
        )
        return estimate((torch.stack(own) - torch.stack(other)).abs().mean(0), level)


def _columns(statistics: SampleStatistics, distances: SampleDistances | None) -> dict[str, Column]:
    """What is averaged over a set, by name."""
    columns = {"loss": (statistics.loss, torch.ones_like(statistics.loss))}
    if statistics.labels is not None:
        columns["accuracy"] = statistics.labels.right, statistics.labels.counted
    if distances is not None:
        has = distances.counted > 0
        means = {
            "kl_from_gold": distances.kl_from_gold,
            "kl_to_gold": distances.kl_to_gold,
            "js": distances.js,
            "activation_distance": distances.activation,
        }
        columns["prediction_divergence"] = distances.differing, distances.counted
        columns |= {name: (values.where(has, 0.0), has.double()) for name, values in means.items()}
    return columns


def _ratios(resamples: Resamples, columns: Mapping[str, Column]) -> dict[str, Tensor]:
    """Every column's ratio on the set and its resamples."""
    above, below = (torch.stack([pair[side] for pair in columns.values()], 1) for side in (0, 1))
    return dict(zip(columns, resamples.ratios(above, below).T, strict=True))


def _lira(
    problem: UnlearningProblem,
    sets: Mapping[str, Samples],
    shadows: Shadows | None,
    passes: Mapping[str, Mapping[str, tuple[SampleStatistics, SampleDistances | None]]],
    batch_size: int,
) -> dict[str, dict[str, Tensor]]:
    """Likelihood-ratio scores by model and set; empty without shadow models. One shadow model is on the device at a time."""
    if shadows is None:
        return {}
    scores: dict[str, dict[str, Tensor]] = {name: {} for name in passes["forget"]}
    values: dict[str, list[Tensor]] = {key: [] for key in sets}
    for model in shadows.models:
        parameters = {"": parameters_of(problem, model)}
        for key, samples in sets.items():
            values[key].append(_scaled(sample_statistics(problem, samples, parameters, batch_size=batch_size)[""][0]))
    for key in sets:
        trained_on: Tensor = getattr(shadows, key).cpu()
        for name, (statistics, _) in passes[key].items():
            scores[name][key] = lira_scores(
                _scaled(statistics),
                torch.stack(values[key]),
                trained_on,
                online=shadows.online,
                fixed_variance=shadows.fixed_variance,
            )
    return scores


def _scaled(statistics: SampleStatistics) -> Tensor:
    """Logit-scaled confidences; 0 for a sample without a label, which no attack looks at."""
    labels = cast("LabelStatistics", statistics.labels)  # `_check_shadows` has seen to it
    return labels.scaled.where(labels.counted > 0, 0.0)


def _check_shadows(shadows: Shadows, problem: UnlearningProblem, sets: Mapping[str, Samples]) -> None:
    """Refuse, before any pass, shadow models that the attack could not be made with."""
    if "test" not in sets:
        raise ValueError("`shadows` of `audit` must come with a test set; got None for `test`. Pass held-out samples.")
    if not isinstance(problem.loss, CrossEntropy):
        raise ValueError(
            "`shadows` of `audit` must be None where the loss has no classes, as there is no confidence to compare; got "
            "shadow models."
        )
    shadows.check_fit({name: samples.size for name, samples in sets.items()})


def _sets(problem: UnlearningProblem, test: Data | Samples | None) -> dict[str, Samples]:
    """The sets by name, the test set checked to be held out."""
    given = problem.test if test is None else test
    held_out = given if given is None or isinstance(given, Samples) else problem.read(given, name="test")
    sets = {"forget": problem.forget, "retain": problem.retain}
    if held_out is None:
        return sets
    check_held_out(held_out, problem, owner="audit")
    return {**sets, "test": held_out}


def check_held_out(test: Samples, problem: UnlearningProblem, *, owner: str) -> None:
    """Refuse a test set that is not held out.

    Args:
        test: The test set.
        problem: The unlearning problem.
        owner: The public function that was given it, for the error.

    Raises:
        ValueError: If it shares samples with the forget or the retain set.
    """
    for name, samples in (("forget", problem.forget), ("retain", problem.retain)):
        shared = test.overlap(samples)
        if shared:
            raise ValueError(
                f"`test` of `{owner}` must hold no sample of `{name}`; they share {shared}. Leave them out of the test set."
            )


def _check(problem: object, models: object, gap_attack: str, shadows: Shadows | None) -> None:
    """Types and names."""
    if not isinstance(problem, UnlearningProblem):
        raise TypeError(
            f"`problem` of `audit` must be an UnlearningProblem; got {type(problem).__name__}. Make one of the original "
            "model, the forget and the retain set."
        )
    if not isinstance(models, Mapping) or not all(isinstance(model, nn.Module) for model in models.values()):
        kinds = type(models).__name__
        if isinstance(models, Mapping):
            kinds += " of " + ", ".join(sorted({type(model).__name__ for model in models.values()}))
        results = isinstance(models, Mapping) and any(hasattr(model, "model") for model in models.values())
        remedy = '{"salun": result.model}' if results else '{"salun": model}'  # `run` returns more than a model
        raise TypeError(f"`models` of `audit` must be a mapping of names to modules; got {kinds}. Use {remedy}.")
    if shadows is not None and not isinstance(shadows, Shadows):
        raise TypeError(
            f"`shadows` of `audit` must be a Shadows; got {type(shadows).__name__}. Make one with stabkit.metrics.Shadows("
            "models=..., forget=..., retain=..., test=...)."
        )
    taken = [name for name in models if name in {ORIGINAL, GOLD}]
    if taken:
        raise ValueError(
            f"`models` of `audit` must not be called {ORIGINAL!r} or {GOLD!r}; got {taken[0]!r}. The original is the "
            "problem's own model, and the retrained one is `gold`."
        )
    check_choice(gap_attack, name="gap_attack", owner="audit", choices=ATTACKS)
    if gap_attack.startswith("lira") and shadows is None:
        raise ValueError(
            f"`gap_attack` of `audit` must be an attack that needs no shadow models where there are none; got "
            f"{gap_attack!r}. Pass `shadows`."
        )
