"""Where a run stops being safe: the critical step size and the critical mix, by rollout (T14)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from stabkit._validate import check_real
from stabkit.algorithms.base import Algorithm
from stabkit.curvature.lowrank import LinearisedNetwork
from stabkit.problem import UnlearningProblem
from stabkit.rollout import Rollout, rollout
from stabkit.staged import staged_rollout

DECADES_AROUND = (3, 2)  # below and above the guess, in the first scan
POINTS_PER_DECADE = 5
ADAMW_GUESS = 0.01  # step size over the parameters' root mean square
EXTENSIONS = 3  # downwards by three decades each, while even the smallest step diverges
MIX_POINTS = 21
REFINEMENTS = 2
REFINED_POINTS = 7
STAGED_DOUBLINGS = 10  # either way of the guess
STAGED_MIXES = 9
STAGED_HALVINGS = 3
# Below a crossing, where batches are normalised by their own statistics: runs there may break, hold and break again.
LOOKS_BELOW = (2**0.5, 2.0, 2**1.5)

Setting = tuple[float, float]  # step size and mix
Found = TypeVar("Found")
Search = Generator[list[Setting], Rollout, Found]  # asks for settings, is sent their rollout, and returns what it found


@dataclass(frozen=True, kw_only=True)
class CriticalValue:
    """First value of one setting at which a run is predicted to diverge, the others held fixed.

    Of one linearisation it is found by a scan and refinement, as nothing says that divergence is monotone in a setting; by
    staged rollouts of one seed, by halving between two settings, and then `low` and `high` are these and no spread of seeds,
    but in a report, where they are as far apart at least as those of one linearisation's seeds. They may miss a
    crossing below the one that they find.

    Attributes:
        value: Where P(diverge) first passes one half; the upper end of the scan (`found` false) if it never does.
        low: Largest tested value below the first crossing of the earliest seed: the lower end of the seeds' spread. The
            scan's lower end where a seed crosses even there, and its upper end where none crosses.
        high: First crossing of the latest seed: the upper end of the seeds' spread, and of the scan if one never crosses.
        found: Whether P(diverge) passed one half anywhere in the scan.
        scanned: Lower and upper end of the scan; both the algorithm's own value where it cannot be chosen.
    """

    value: float
    low: float
    high: float
    found: bool
    scanned: tuple[float, float]

    @property
    def bracketed(self) -> bool:
        """Whether a run holds below it: a scan that crosses from its first value on has found no boundary."""
        return self.found and self.value > self.scanned[0]

    def with_spread_of(self, other: CriticalValue, *, most: float = math.inf) -> CriticalValue:
        """This value of one seed, with the spread that another way has over several.

        Args:
            other: What the other way found.
            most: The largest value there is.

        Returns:
            The same value, `low` and `high` no nearer to it than the other's are to theirs, in proportion; as it is where
            either found none.
        """
        if not (self.found and other.found and other.value > 0):
            return self
        low, high = (self.value * end / other.value for end in (other.low, other.high))
        return replace(self, low=min(self.low, low), high=min(max(self.high, high), most))


def adamw_guess(problem: UnlearningProblem) -> float:
    """A step size of the order of an AdamW run's critical one, where a scan may begin.

    A step moves each parameter by about η, whatever the curvature, and some hundred steps of a hundredth of their size leave
    little of a network.

    Args:
        problem: The unlearning problem.

    Returns:
        A hundredth of the parameters' root mean square, or of 1 where all of them are 0.
    """
    return ADAMW_GUESS * (float(problem.vector().double().square().mean().sqrt()) or 1.0)


def critical_lr(
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    guess: float,
) -> CriticalValue:
    """Critical step size at the algorithm's mix.

    Args:
        network: The compressed network.
        algorithm: The algorithm; its own step size says how far to look where nothing breaks.
        batch_sizes: B_R and B_F.
        seeds: One rollout each.
        guess: A step size of the right order, such as 2/λ_max(D); the scan reaches from 1/1000 to 100 times it.

    Returns:
        The critical value. Cost: rollouts of 40 settings a seed, of 15 more for every three decades further down that even
        the smallest step diverges, and of 5 for every decade up to the algorithm's own step size where none diverges.

    Raises:
        ValueError: If the guess is not a finite number above 0.
    """
    check_real(guess, name="guess", owner="critical_lr", low=0, low_open=True)
    return _alone(_search_lr(algorithm.mix, guess, algorithm.lr), network, algorithm, batch_sizes, seeds)


def critical_mix(
    network: LinearisedNetwork, algorithm: Algorithm, *, batch_sizes: tuple[int, int], seeds: Sequence[int]
) -> CriticalValue:
    """Critical mix at the algorithm's step size.

    Args:
        network: The compressed network.
        algorithm: Everything but the mix is read from it.
        batch_sizes: B_R and B_F.
        seeds: One rollout each.

    Returns:
        The critical value in [0, 1]; 0 where even fine-tuning at this step diverges. Cost: rollouts of about 35 settings
        a seed.
    """
    return _alone(_search_mix(algorithm.lr), network, algorithm, batch_sizes, seeds)


class Surroundings(NamedTuple):
    """What one linearisation says about a run and the settings around it.

    Attributes:
        rolled: The rollout of the algorithm as it is.
        lr: Critical step size at its mix; None where it was not asked for.
        mix: Critical mix at its step size; its own mix, not found, where that is not one's to choose.
    """

    rolled: Rollout
    lr: CriticalValue | None
    mix: CriticalValue


def surroundings(
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    guess: float | None,
    progress: bool = False,
) -> Surroundings:
    """The run and both critical values, from rollouts of all of their settings side by side.

    Args:
        network: The compressed network.
        algorithm: The algorithm.
        batch_sizes: B_R and B_F.
        seeds: One rollout each.
        guess: As `critical_lr` has it; None where the critical step size is not asked for.
        progress: Whether to show a progress bar.

    Returns:
        All three, as they would be found one after another. Cost: the same settings in three rollouts instead of seven:
        48 settings a seed, then 14 and 14.

    Raises:
        ValueError: If the guess is not a finite number above 0.
    """
    if guess is not None:
        check_real(guess, name="guess", owner="surroundings", low=0, low_open=True)
    rolled, lr, mix = _together(
        (
            _search_one(algorithm.lr, algorithm.mix),
            _nothing() if guess is None else _search_lr(algorithm.mix, guess, algorithm.lr),
            _nothing() if algorithm.fixed_mix else _search_mix(algorithm.lr),
        ),
        network,
        algorithm,
        batch_sizes,
        seeds,
        progress=progress,
    )
    own = algorithm.mix
    fixed = CriticalValue(value=own, low=own, high=own, found=False, scanned=(own, own))
    return Surroundings(rolled=rolled, lr=lr, mix=mix or fixed)


def staged_critical_lr(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seed: int,
    guess: float,
) -> tuple[CriticalValue, float]:
    """Critical step size at the algorithm's mix by staged rollouts.

    Args:
        problem: The unlearning problem.
        network: Its linearisation at θ*.
        algorithm: Everything but the step size is read from it.
        batch_sizes: B_R and B_F.
        seed: The one run that is rolled out.
        guess: Where to begin, such as the critical step size of one linearisation.

    Returns:
        The critical value, to a factor of 1.1, its `low` and `high` the interval it was halved down to; and gradients spent.
        Cost: some eight staged rollouts: at the guess, by factors of 2 away from it, three halvings. With batchnorm="batch"
        three more below the crossing, where one that breaks begins the search anew.

    Raises:
        ValueError: If the guess is not a finite number above 0.
    """
    check_real(guess, name="guess", owner="staged_critical_lr", low=0, low_open=True)
    search = _StagedSearch(problem, network, batch_sizes, seed, lambda lr: algorithm.replace(lr=lr))

    def around(lr: float) -> CriticalValue:
        places = [lr * 2.0**k for k in range(-STAGED_DOUBLINGS, STAGED_DOUBLINGS + 1)]
        return search.find(places, STAGED_DOUBLINGS, lambda a, b: math.sqrt(a * b))

    found = around(guess)
    while found.bracketed and problem.batchnorm == "batch":
        breaking = [lr for lr in (found.value / by for by in LOOKS_BELOW) if search.diverges(lr)]
        if not breaking:
            break
        found = around(breaking[-1])
    return found, search.gradients


def staged_critical_mix(
    problem: UnlearningProblem,
    network: LinearisedNetwork,
    algorithm: Algorithm,
    *,
    batch_sizes: tuple[int, int],
    seed: int,
    guess: float,
) -> tuple[CriticalValue, float]:
    """Critical mix at the algorithm's step size by staged rollouts.

    Args:
        problem: The unlearning problem.
        network: Its linearisation at θ*.
        algorithm: Everything but the mix is read from it.
        batch_sizes: B_R and B_F.
        seed: The one run that is rolled out.
        guess: Where to begin, in [0, 1].

    Returns:
        The critical value, to 0.02, and gradients spent. Cost: some eight staged rollouts.

    Raises:
        ValueError: If the guess is outside of [0, 1].
    """
    check_real(guess, name="guess", owner="staged_critical_mix", low=0, high=1)
    places = np.linspace(0, 1, STAGED_MIXES).tolist()
    search = _StagedSearch(problem, network, batch_sizes, seed, lambda mix: algorithm.replace(mix=mix))
    return search.find(places, round(guess * (STAGED_MIXES - 1)), lambda a, b: (a + b) / 2), search.gradients


class _StagedSearch:
    """Where staged rollouts begin to diverge, from a guess outwards; no setting is rolled out twice."""

    def __init__(
        self,
        problem: UnlearningProblem,
        network: LinearisedNetwork,
        batch_sizes: tuple[int, int],
        seed: int,
        changed: Callable[[float], Algorithm],
    ) -> None:
        self._problem, self._network, self._batch_sizes, self._seed = problem, network, batch_sizes, seed
        self._changed = changed
        self._known: dict[float, bool] = {}
        self.gradients = 0.0

    def diverges(self, value: float) -> bool:
        """Whether P(diverge) is at least one half.

        Args:
            value: Of the setting that is searched.

        Returns:
            Whether it is.
        """
        if value not in self._known:
            found = staged_rollout(
                self._problem, self._network, self._changed(value), batch_sizes=self._batch_sizes, seeds=[self._seed]
            )
            self.gradients += found.gradient_equivalents
            self._known[value] = bool(found.rollout.probability[0] >= 0.5)
        return self._known[value]

    def find(self, places: Sequence[float], start: int, middle: Callable[[float, float], float]) -> CriticalValue:
        """Walk to where neighbours differ, then halve."""
        scanned = places[0], places[-1]
        place, diverges = start, self.diverges(places[start])
        while 0 <= (following := place - 1 if diverges else place + 1) < len(places):
            after = self.diverges(places[following])
            if after != diverges:
                break
            place = following
        else:
            edge = places[place]
            return CriticalValue(value=edge, low=edge, high=edge, found=diverges, scanned=scanned)
        low, high = sorted((places[place], places[following]))
        for _ in range(STAGED_HALVINGS):
            between = middle(low, high)
            low, high = (low, between) if self.diverges(between) else (between, high)
        return CriticalValue(value=high, low=low, high=high, found=True, scanned=scanned)


def _search_one(lr: float, mix: float) -> Search[Rollout]:
    """One setting."""
    return (yield [(lr, mix)])


def _nothing() -> Search[None]:
    """Asks for no rollout."""
    return
    yield []


def _search_lr(mix: float, guess: float, asked: float) -> Search[CriticalValue]:
    """Scan step sizes around a guess, down while even the smallest diverges or up to the asked one, then refine."""
    below, above = DECADES_AROUND
    low = guess * 10.0**-below
    scan = _Scan(lambda value: (value, mix))
    yield from scan.add(np.geomspace(low, guess * 10.0**above, 1 + POINTS_PER_DECADE * (below + above)))
    for _ in range(EXTENSIONS):
        if not scan.pooled[0]:
            break
        low = scan.values[0]
        yield from scan.add(np.geomspace(low * 1e-3, low, 1 + POINTS_PER_DECADE * 3)[:-1])
    top = scan.values[-1]
    if asked > top and not scan.pooled.any():
        decades = math.ceil(math.log10(asked / top))
        yield from scan.add(np.geomspace(top, asked, 1 + POINTS_PER_DECADE * decades)[1:])
    return (yield from scan.first_crossing(np.geomspace))


def _search_mix(lr: float) -> Search[CriticalValue]:
    """Scan mixes, then refine."""
    scan = _Scan(lambda value: (lr, value))
    yield from scan.add(np.linspace(0, 1, MIX_POINTS))
    return (yield from scan.first_crossing(np.linspace))


def _alone(
    search: Search[Found],
    network: LinearisedNetwork,
    algorithm: Algorithm,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
) -> Found:
    """What one search finds."""
    found: Found = _together([search], network, algorithm, batch_sizes, seeds)[0]
    return found


def _together(
    searches: Sequence[Search[Any]],
    network: LinearisedNetwork,
    algorithm: Algorithm,
    batch_sizes: tuple[int, int],
    seeds: Sequence[int],
    *,
    progress: bool = False,
) -> list[Any]:
    """What each search finds, every round of their settings rolled out side by side: steps cost more than settings do."""
    found: list[Any] = [None] * len(searches)
    sent: list[Rollout | None] = [None] * len(searches)
    going = set(range(len(searches)))
    while True:
        asked: list[list[Setting]] = [[] for _ in searches]
        for i in sorted(going):
            try:
                asked[i] = searches[i].send(sent[i])  # type: ignore[arg-type]  # a generator is begun with None
            except StopIteration as stop:
                found[i] = stop.value
                going.remove(i)
        if not going:
            return found
        settings = [setting for part in asked for setting in part]
        result = rollout(
            network,
            algorithm,
            lr=[lr for lr, _ in settings],
            mix=[mix for _, mix in settings],
            batch_sizes=batch_sizes,
            seeds=seeds,
            progress=progress,
        )
        first = 0
        for i, part in enumerate(asked):
            sent[i] = result.settings(first, first + len(part))
            first += len(part)


class _Scan:
    """Values of one setting in ascending order, and at which of them the seeds and their mean P(diverge) cross."""

    def __init__(self, setting: Callable[[float], Setting]) -> None:
        self._setting = setting
        self.values: list[float] = []
        self.pooled = torch.zeros(0, dtype=torch.bool)  # (G,)
        self.crossed = torch.zeros(0, 0, dtype=torch.bool)  # (S, G)

    def add(self, values: np.ndarray) -> Search[None]:
        """Have further values rolled out: where P(diverge) passes one half, and where each seed crosses."""
        result = yield [self._setting(value) for value in values.tolist()]
        pooled, crossed = result.probability >= 0.5, result.score >= 0
        if self.values:
            pooled, crossed = torch.cat([self.pooled, pooled]), torch.cat([self.crossed, crossed], dim=1)
        merged = np.array([*self.values, *values.tolist()])
        order = np.argsort(merged)
        self.values, self.pooled, self.crossed = merged[order].tolist(), pooled[order], crossed[:, order]

    def first_crossing(self, space: Callable[[float, float, int], np.ndarray]) -> Search[CriticalValue]:
        """Refine where the seeds' mean first crosses, and read the seeds' own first crossings off the same values."""
        for _ in range(REFINEMENTS):
            low, high = _bracket(self.values, self.pooled)
            if low == high:
                break
            yield from self.add(space(low, high, REFINED_POINTS + 2)[1:-1])
        brackets = [_bracket(self.values, row) for row in (self.pooled, *self.crossed)]
        return CriticalValue(
            value=brackets[0][1],
            low=min(low for low, _ in brackets),
            high=max(high for _, high in brackets),
            found=bool(self.pooled.any()),
            scanned=(self.values[0], self.values[-1]),
        )


def _bracket(values: list[float], crosses: Tensor) -> tuple[float, float]:
    """Last value before the first crossing and the crossing itself; both an end of the scan if there is no such pair."""
    if not bool(crosses.any()):
        return values[-1], values[-1]
    first = int(crosses.int().argmax())
    return values[max(first - 1, 0)], values[first]
