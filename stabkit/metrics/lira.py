"""The likelihood-ratio attack (Carlini et al. 2022), with shadow models that were given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Shadows:
    """Models of the problem's architecture, each trained on a known part of all samples.

    Attributes:
        models: The S shadow models.
        forget: Whether shadow s was trained on forget sample i, shape (S, n_f), bool; a NumPy array will do, and so for the
            other two.
        retain: The same for the retain set, shape (S, n_r).
        test: The same for the test set, shape (S, n_t).
        online: Whether to use the models that were trained on a sample as well as those that were not.
        fixed_variance: Whether all samples share one variance, which fewer than about 64 models ask for.
    """

    models: Sequence[nn.Module]
    forget: Tensor
    retain: Tensor
    test: Tensor
    online: bool = True
    fixed_variance: bool = True

    def __post_init__(self) -> None:
        for name in ("forget", "retain", "test"):
            given = getattr(self, name)
            array = given if isinstance(given, Tensor) else np.array(given)
            if array.dtype not in {torch.bool, np.dtype(bool)}:
                raise TypeError(
                    f"`{name}` of `Shadows` must be boolean; got {array.dtype}. Pass `mask == 1` where 1 says that the "
                    "model was trained on the sample."
                )
            if array.ndim != 2 or len(array) != len(self.models):
                raise ValueError(
                    f"`{name}` of `Shadows` must be of shape ({len(self.models)}, n), a row for each model; got "
                    f"{tuple(array.shape)}."
                )
            object.__setattr__(self, name, torch.as_tensor(array))

    def check_fit(self, sizes: Mapping[str, int]) -> None:
        """Refuse masks that do not belong to some sets, or leave a sample without the models that it needs.

        Args:
            sizes: Samples of each set, by name.

        Raises:
            ValueError: If a mask has another number of samples, or a sample has too few models.
        """
        for name, size in sizes.items():
            mask: Tensor = getattr(self, name)
            if mask.shape[1] != size:
                raise ValueError(
                    f"`{name}` of `Shadows` must have a column for each of the {size} samples of that set; got "
                    f"{mask.shape[1]}."
                )
            _check_coverage(mask, online=self.online, fixed_variance=self.fixed_variance, what=f"`{name}` of `Shadows`")


def lira_scores(
    observed: Tensor, shadows: Tensor, trained_on: Tensor, *, online: bool = True, fixed_variance: bool = True
) -> Tensor:
    """Evidence that each sample was in a model's training set; higher for members.

    Online it is ln N(φ; μ_in, σ²_in) - ln N(φ; μ_out, σ²_out), the log-likelihood ratio of the model's scaled confidence φ
    under Gaussians fitted to the shadow models with and without the sample. Offline it is (φ - μ_out)/σ_out: the standard
    normal distribution function of it is the paper's 1 - P(Z > φ). Means are averages, as in the paper (its code takes
    medians). A shared variance is the pooled one within samples, not that of all values around one mean.

    Args:
        observed: φ = ln(p/(1-p)) of each sample under the model, shape (n,), as in `LabelStatistics.scaled`.
        shadows: The same under each shadow model, shape (S, n).
        trained_on: Whether shadow model s was trained on sample i, shape (S, n), bool.
        online: Whether to use models of both kinds; otherwise those without the sample alone.
        fixed_variance: Whether all samples share one variance for each kind of model.

    Returns:
        Scores, shape (n,), float64; in nats online, in standard deviations offline. NaN where `observed` is.

    Raises:
        TypeError: If `trained_on` is not boolean.
        ValueError: If shapes differ, shadow models' values are not finite or do not vary, or a sample has too few models.
    """
    if trained_on.dtype != torch.bool:
        raise TypeError(
            f"`trained_on` of `lira_scores` must be boolean; got {trained_on.dtype}. Use trained_on.bool() where 1 says "
            "that the model was trained on the sample."
        )
    if shadows.dim() != 2 or shadows.shape != trained_on.shape or shadows.shape[1:] != observed.shape:
        raise ValueError(
            "`shadows` and `trained_on` of `lira_scores` must have shape (S, n), with n values in `observed`; got "
            f"{tuple(shadows.shape)}, {tuple(trained_on.shape)} and {tuple(observed.shape)}."
        )
    if not bool(shadows.isfinite().all()):
        bad = int((~shadows.isfinite()).any(1).sum())
        raise ValueError(
            f"`shadows` of `lira_scores` must be finite; got {bad} shadow models with values that are not. Leave out "
            "models whose training diverged."
        )
    _check_coverage(trained_on, online=online, fixed_variance=fixed_variance, what="`trained_on` of `lira_scores`")
    observed, shadows = observed.double(), shadows.double()
    without, spread_without = _gaussian(shadows, ~trained_on, "not trained on", fixed_variance)
    if not online:
        return (observed - without) / spread_without
    within, spread_within = _gaussian(shadows, trained_on, "trained on", fixed_variance)
    first, second = (
        (observed - mean) / spread for mean, spread in ((within, spread_within), (without, spread_without))
    )
    return (second.square() - first.square()) / 2 + (spread_without / spread_within).log()


def _check_coverage(trained_on: Tensor, *, online: bool, fixed_variance: bool, what: str) -> None:
    """Raise unless every sample has the models that its Gaussians are fitted to."""
    fewest = 1 if fixed_variance else 2
    for kind, chosen in (("not trained on", ~trained_on), ("trained on", trained_on))[: 2 if online else 1]:
        count = chosen.sum(0)
        remedy = "Train more shadow models" + (", or use the offline attack." if chosen is trained_on else ".")
        if int(count.min()) < fewest:
            where = int(count.argmin())
            raise ValueError(
                f"{what} must have at least {fewest} models {kind} each sample; got {int(count[where])} for sample {where}. "
                + remedy
            )
        if int(count.max()) < 2:  # a variance in common is that within samples
            raise ValueError(f"{what} must have at least 2 models {kind} some sample; got 1 for each. {remedy}")


def _gaussian(values: Tensor, chosen: Tensor, kind: str, fixed_variance: bool) -> tuple[Tensor, Tensor]:
    """Means (n,) and standard deviations, (n,) or one for all, over the chosen models."""
    count = chosen.sum(0)
    mean = (values * chosen).sum(0) / count
    squares = ((values - mean).square() * chosen).sum(0)
    variance = squares.sum() / (count - 1).sum() if fixed_variance else squares / (count - 1)
    if not bool((variance > 0).all()):
        raise ValueError(
            f"`shadows` of `lira_scores` must vary over the models {kind} a sample; got variance "
            f"{float(variance.min()):.3g}. Train more shadow models, on different samples and from different seeds."
        )
    return mean, variance.sqrt()
