"""One layer's eigenvalues beside its fit and the same entries in random order, to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stabkit._validate import check_choice, check_seed
from stabkit.heavy_tail.fit import EIGENVALUE_FLOOR, METHODS, PowerLawFit, check_tail, fit_power_law
from stabkit.heavy_tail.layers import CONV, layer_seed, marchenko_pastur, shuffle, spectrum_of
from stabkit.heavy_tail.matrices import WeightMatrix, weight_matrices
from stabkit.heavy_tail.scan import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWNER = "layer_spectrum"
POINTS = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSpectrum:
    """The empirical spectral density of one layer, as numbers.

    Attributes:
        name: The layer, as `layer_exponents` names it.
        eigenvalues: λ of WᵀW, ascending, shape (n,), the numerically zero ones left out.
        shuffled: The same of one shuffled copy of the entries.
        fit: The fitted tail.
        mp_edge: Upper edge of the Marchenko-Pastur bulk; NaN where there is no spectrum.
        spikes: Eigenvalues beyond that edge and its fluctuations.
    """

    name: str
    eigenvalues: Array
    shuffled: Array
    fit: PowerLawFit
    mp_edge: float
    spikes: int

    def tail(self) -> tuple[Array, Array]:
        """The fitted density over the tail.

        Returns:
            λ from λ_min to λ_max, evenly in its logarithm, and the density there, a share of all eigenvalues per unit of λ:
            it integrates to n_tail/n over λ >= λ_min. Both empty where the fit is undefined.
        """
        fit = self.fit
        if not fit.defined:
            return np.empty(0), np.empty(0)
        grid = np.geomspace(fit.lambda_min, fit.lambda_max, POINTS)
        logs = np.log(grid / fit.lambda_min)
        share = fit.n_tail / fit.n
        if fit.cutoff is None:
            return grid, share * (fit.exponent - 1) / fit.lambda_min * np.exp(-fit.exponent * logs)
        # ∫ y^(-ξ) e^(-β(y-1)) dy over y >= 1, in t = ln y up to where the integrand has died out
        beta = fit.cutoff * fit.lambda_min
        t = np.linspace(0.0, math.log1p(50 / beta), 20_001)
        mass = float(np.trapezoid(np.exp((1 - fit.exponent) * t - beta * np.expm1(t)), t))
        return grid, share / (fit.lambda_min * mass) * np.exp(-fit.exponent * logs - beta * np.expm1(logs))

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Histogram, shuffled copy, fitted tail and random edge.

        Args:
            ax: Axes to draw in; new ones when None.

        Returns:
            Figure and axes.
        """
        from stabkit.plots import plot_esd

        return plot_esd(self, ax=ax)


def layer_spectrum(
    model: nn.Module,
    layer: str,
    *,
    conv: str = "pooled",
    method: str = "mle",
    tail: int | float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> LayerSpectrum:
    """Eigenvalues and fit of one layer, those that its row in `layer_exponents` stands for.

    Args:
        model: The network; it is only read.
        layer: A row's name in `layer_exponents` of the same model and `conv`.
        conv: As in `layer_exponents`.
        method: As in `fit_power_law`.
        tail: As in `fit_power_law`.
        seed: Seed of the shuffled copy, the first that `layer_exponents` compares with.
        device: As in `layer_exponents`.

    Returns:
        The spectrum. Cost: twice the layer's in `layer_exponents` without shuffles.

    Raises:
        TypeError: If the model is not a module, or `tail` is no number.
        ValueError: If no layer has that name, or an argument is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` of `{OWNER}` must be a torch.nn.Module; got {type(model).__name__}.")
    check_choice(conv, name="conv", owner=OWNER, choices=CONV)
    check_choice(method, name="method", owner=OWNER, choices=METHODS)
    share = check_tail(tail, owner=OWNER)
    check_seed(seed, owner=OWNER)
    with torch.no_grad():
        entries = {e.name: e for e in weight_matrices(model, conv=conv) if isinstance(e, WeightMatrix)}
        check_choice(layer, name="layer", owner=OWNER, choices=entries)
        matrices = entries[layer].matrices()
        every = spectrum_of(matrices, device=device)
        shuffled = spectrum_of(shuffle(matrices, layer_seed(seed, layer, 1)), device=device)
    fit = fit_power_law(every, method=method, tail=share)
    kept = _kept(every)
    _, a, b = entries[layer].stack
    edge, spikes = marchenko_pastur(kept, min(a, b), max(a, b)) if len(kept) else (math.nan, 0)
    return LayerSpectrum(name=layer, eigenvalues=kept, shuffled=_kept(shuffled), fit=fit, mp_edge=edge, spikes=spikes)


def _kept(values: NDArray[np.float64]) -> Array:
    """What counts as an eigenvalue above zero."""
    return values[values > EIGENVALUE_FLOOR]
