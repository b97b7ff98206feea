"""What a coherence measurement found, and the further questions that its Gram answers without new products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stabkit._table import Shown, Table, number
from stabkit.coherence.classes import ClassCoherence, class_coherence
from stabkit.coherence.contributions import Contributions, contributions
from stabkit.coherence.heatmap import Heatmap, arrange
from stabkit.coherence.interval import CoherenceInterval, coherence_interval
from stabkit.coherence.statistics import per_sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Coherence(Shown):
    """How far the samples' curvatures share directions. NaN where a set has no curvature at all.

    Attributes:
        retain: σ_R = λ_max(S^{RR}) / max_i ‖H_i‖₂ (T11), at least 1: 1 for rank-one samples that curve along directions of
            their own.
        forget: σ_F.
        cross: ‖G^{RF}‖₂ / √(‖G^{RR}‖₂ ‖G^{FF}‖₂), in [0, 1], with G_ij = tr(H_i H_j) = S_ij². With S itself the ratio can
            pass 1 where the sets spread over the same space along different axes: |v·w| is no inner product (theory §4).
        cosine: tr(H_R H_F) / (‖H_R‖_F ‖H_F‖_F) of the mean curvatures, in [0, 1]; with signed factors in [-1, 1].
        mixed: σ_mix over retain-forget pairs (T12).
        mix: The α it is for.
        pairs: Number of pairs behind it.
        pairs_sampled: Whether these are a random sample of all pairs.
        populations: n_R and n_F, which the samples stand for.
        gram_retain: tr(H_i H_j) within the retain samples, shape (m_R, m_R).
        gram_forget: The same within the forget samples, shape (m_F, m_F).
        gram_cross: Between them, shape (m_R, m_F).
        norms_retain: ‖H_i‖₂ of the retain samples, shape (m_R,).
        norms_forget: Of the forget samples, shape (m_F,).
        pair_samples: Places of the retain and of the forget sample of each pair, shape (pairs, 2).
        pair_norms: ‖A_rf‖₂ of each pair, shape (pairs,).
    """

    retain: float
    forget: float
    cross: float
    cosine: float
    mixed: float
    mix: float
    pairs: int
    pairs_sampled: bool
    populations: tuple[int, int]
    gram_retain: Tensor
    gram_forget: Tensor
    gram_cross: Tensor
    norms_retain: Tensor
    norms_forget: Tensor
    pair_samples: Tensor
    pair_norms: Tensor

    def __str__(self) -> str:
        pairs = f"of {self.pairs:,} pairs sampled" if self.pairs_sampled else f"of all {self.pairs:,} pairs"
        rows = (
            ("retain σ", self.retain, "1: orthogonal curvatures"),
            ("forget σ", self.forget, "likewise"),
            ("retain-forget", self.cross, "0: separate directions, 1: the same"),
            ("curvature cosine", self.cosine, "of the mean curvatures"),
            ("mixed σ", self.mixed, f"at mix {number(self.mix)}, {pairs}"),
        )
        table = Table(
            title=f"Coherence of {self.samples[0]} retain and {self.samples[1]} forget samples",
            columns=("quantity", "value", "meaning"),
            rows=tuple((name, number(value), meaning) for name, value, meaning in rows),
        )
        return str(table)

    @property
    def samples(self) -> tuple[int, int]:
        """m_R and m_F."""
        return self.norms_retain.numel(), self.norms_forget.numel()

    @property
    def gram(self) -> Tensor:
        """tr(H_i H_j) of all samples, retain first, shape (m_R + m_F, m_R + m_F)."""
        upper = torch.cat([self.gram_retain, self.gram_cross], 1)
        return torch.cat([upper, torch.cat([self.gram_cross.T, self.gram_forget], 1)])

    def for_rule(self) -> float:
        """σ as T13 takes it, for the whole population: σ_R at mix 0, σ_F at mix 1, σ_mix between.

        The eigenvalues of S grow in proportion to the samples it is made of, once they are many; that is how a sample's σ
        is carried over to the n samples of the set, or to as many pairs as the larger set has samples. Where samples share
        few directions it comes out too large, and the rule speaks less often (theory §4).

        Returns:
            The extrapolated σ.
        """
        n_retain, n_forget = self.populations
        if self.mix == 0:
            return self.retain * n_retain / self.samples[0]
        if self.mix == 1:
            return self.forget * n_forget / self.samples[1]
        return self.mixed * max(n_retain, n_forget) / self.pairs

    def by_class(self, labels: tuple[Any, Any]) -> ClassCoherence:
        """T11 between the classes of either set.

        Args:
            labels: Class of each retain and of each forget sample, one integer a sample, in the samples' order.

        Returns:
            The groups' coherence; a set of one class is one group. Cost: m² for each group; no new products.

        Raises:
            ValueError: If the labels are not one integer a sample.
        """
        checked = per_sample(labels, self.samples, name="labels", what="labels", owner="Coherence.by_class")
        norms = torch.cat([self.norms_retain, self.norms_forget])
        return class_coherence(self.gram.double().cpu(), norms.double().cpu(), checked)

    def contributions(self, indices: tuple[Any, Any] | None = None) -> Contributions:
        """Which samples carry σ_R, σ_F and κ, and which retain samples steps on the forget set move most.

        Args:
            indices: Dataset index of each retain and of each forget sample, in the samples' order; their places when None.

        Returns:
            Shares and exposures; what they are and are not is said there. Cost (m_R + m_F)³; no new products.

        Raises:
            ValueError: If the indices are not one integer a sample.
        """
        given = tuple(torch.arange(m) for m in self.samples) if indices is None else indices
        owner = "Coherence.contributions"
        checked = per_sample(given, self.samples, name="indices", what="indices", owner=owner)
        grams = (g.double().cpu() for g in (self.gram_retain, self.gram_forget, self.gram_cross))
        return contributions((next(grams), next(grams), next(grams)), checked)

    def interval(self, *, level: float = 0.9, replicates: int = 200, seed: int = 0) -> CoherenceInterval:
        """Sampling error of the five numbers: `coherence_interval`, which says what the intervals cover.

        Args:
            level: Nominal coverage, in (0, 1).
            replicates: Halves to draw of each set.
            seed: Of the halves.

        Returns:
            The intervals.
        """
        return coherence_interval(self, level=level, replicates=replicates, seed=seed)

    def heatmap(
        self, *, labels: tuple[Any, Any] | None = None, normalise: bool = True, max_samples: int = 300
    ) -> Heatmap:
        """S of retain and forget samples together, in an order that shows its structure.

        Args:
            labels: Class of each retain and of each forget sample, to order by class within each set; within a class, and
                without classes, samples stand in the order of their shares in λ_max of the set's own S.
            normalise: Whether to divide S_ij by √(S_ii S_jj), which leaves alignment alone, in [0, 1].
            max_samples: Samples to show at most: evenly spread ones of that order, in proportion to the sets.

        Returns:
            The matrix and what its rows are.

        Raises:
            ValueError: If an argument is out of its domain.
        """
        owner = "Coherence.heatmap"
        checked = (
            None if labels is None else per_sample(labels, self.samples, name="labels", what="labels", owner=owner)
        )
        return arrange(self.gram.double().cpu(), self.samples, checked, normalise=normalise, max_samples=max_samples)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        labels: tuple[Any, Any] | None = None,
        normalise: bool = True,
        max_samples: int = 300,
    ) -> tuple[Figure, Axes]:
        """Heatmap of S with the sets, and the classes if given, marked off.

        Args:
            ax: Axes to draw in; new ones when None.
            labels: As for `heatmap`.
            normalise: As for `heatmap`.
            max_samples: As for `heatmap`; the title says where fewer than all are shown.

        Returns:
            Figure and axes.
        """
        from stabkit.plots import plot_coherence  # plots are loaded only when drawn

        return plot_coherence(self, ax=ax, labels=labels, normalise=normalise, max_samples=max_samples)
