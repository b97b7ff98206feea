"""Gates: how far each layer may move, given its heavy-tailed exponent (theory §8)."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stabkit._errors import ExponentWarning, caller_level
from stabkit._validate import check_choice, check_real
from stabkit._wrappers import plain_parameters
from stabkit.heavy_tail.matrices import PARTS, block_index
from stabkit.heavy_tail.table import LayerExponent, LayerExponents

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEUTRAL = 1.0
UNTRUSTED = ("neutral", "gate")
NAMED = 3  # layers a warning names
PARAMETRISED = re.compile(r"parametrizations\.(\w+)\.\w+$")


@dataclass(frozen=True, kw_only=True)
class LayerGates:
    """Exponents and the gates they lead to.

    Attributes:
        exponents: The measured table.
        gates: ν by layer name, in the table's order; 1 for a layer without an exponent, and for one whose exponent is not
            trusted unless untrusted="gate" asked for it.
    """

    exponents: LayerExponents
    gates: dict[str, float]

    def __str__(self) -> str:
        width = max((len(name) for name in self.gates), default=5)
        lines = [f"{'layer'.ljust(width)}  exponent  gate   "]
        for row in self.exponents.rows:
            gate = self.gates[row.name]
            why = (
                "" if row.trusted else f"{'neutral' if gate == NEUTRAL else 'gated, though not trusted'}: {row.reason}"
            )
            lines.append(f"{row.name.ljust(width)}  {row.exponent:8.3f}  {gate:.3f}  {why}".rstrip())
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Every layer's gate as a bar, with its exponent; where that is not trusted the bar is hatched.

        Args:
            ax: Axes to draw in; new ones when None.

        Returns:
            Figure and axes.
        """
        from stabkit.plots import figure_of  # plots are loaded only when drawn

        rows = self.exponents.rows
        figure, ax = figure_of(ax, size=(6.4, 1.4 + 0.22 * max(len(rows), 4)))
        for place, row in enumerate(rows):
            fill, hatch = ("#4a6fa5", None) if row.trusted else ("none", "////")
            ax.barh(place, self.gates[row.name], 0.7, facecolor=fill, edgecolor="#4a6fa5", hatch=hatch)
            exponent = f"ξ = {row.exponent:.2f}" if math.isfinite(row.exponent) else "no ξ"
            text = exponent + ("" if row.trusted else ", not trusted")
            ax.text(1.03, place, text, verticalalignment="center", fontsize="small")
        ax.set_yticks(range(len(rows)), [row.name for row in rows], fontsize="small")
        ax.set_ylim(len(rows) - 0.4, -0.6)  # in the network's order, from above
        ax.set_xlim(0, 1.7)  # with room for the exponents
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
        ax.axvline(NEUTRAL, color="black", linewidth=1, linestyle=":")
        ax.set_xlabel("gate ν; 1 leaves a layer as it is")
        ax.set_title("gates by layer, from their exponents ξ")
        return figure, ax


def check_window(owner: str, floor: float, low: float, high: float, width: float) -> None:
    """Check the gate's settings.

    Args:
        owner: The public function or class they belong to.
        floor: Smallest gate.
        low: Lower end of the window.
        high: Upper end.
        width: Width of the window's flanks.

    Raises:
        ValueError: If one is out of range or the window is empty.
    """
    check_real(floor, name="floor", owner=owner, low=0, high=1, remedy="1 switches the gate off.")
    check_real(low, name="low", owner=owner)
    check_real(high, name="high", owner=owner)
    check_real(width, name="width", owner=owner, low=0, low_open=True)
    if high <= low:
        raise ValueError(f"`high` of `{owner}` must be greater than `low`; got low={low:g}, high={high:g}. Swap them.")


def spectral_gate(
    exponent: float | Tensor, *, floor: float = 0.1, low: float = 2.0, high: float = 6.0, width: float = 0.5
) -> float | Tensor:
    """ν(ξ) = floor + (1 - floor)·s(ξ), a smooth window: near 1 inside [low, high], near the floor far outside.

    s(ξ) = σ((ξ-low)/width)·σ((high-ξ)/width), divided by its value at the centre, where it is largest, so 0 < s <= 1
    and s is about one half at either end (theory §8). The window's form is our choice.

    Args:
        exponent: ξ, a number or a tensor of them; finite.
        floor: Smallest gate, in [0, 1].
        low: Lower end of the window.
        high: Upper end of the window.
        width: Width of the flanks, in units of ξ.

    Returns:
        ν in [floor, 1], a float for a number and a tensor of the same shape for a tensor.

    Raises:
        ValueError: If the exponent is not finite or the window is empty.
    """
    check_window("spectral_gate", floor, low, high, width)
    values = exponent if isinstance(exponent, Tensor) else torch.tensor(float(exponent), dtype=torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"`exponent` of `spectral_gate` must be finite; got {exponent}. Leave a layer without an exponent at 1, as "
            "`gate_per_parameter` does."
        )
    centre = 1 / (1 + math.exp(-(high - low) / (2 * width))) ** 2
    window = torch.sigmoid((values - low) / width) * torch.sigmoid((high - values) / width) / centre
    gate = floor + (1 - floor) * window.clamp(max=1.0)
    return gate if isinstance(exponent, Tensor) else float(gate)


def gate_layers(
    exponents: LayerExponents,
    *,
    floor: float = 0.1,
    low: float = 2.0,
    high: float = 6.0,
    width: float = 0.5,
    untrusted: str = "neutral",
) -> LayerGates:
    """ν of every layer of a table, without a warning: the table says which layers are neutral and why.

    Args:
        exponents: From `layer_exponents`.
        floor: As in `spectral_gate`.
        low: As in `spectral_gate`.
        high: As in `spectral_gate`.
        width: As in `spectral_gate`.
        untrusted: "neutral" gives a layer whose exponent is not trusted ν = 1; "gate" uses whatever exponent it has.

    Returns:
        The gates by layer. A layer whose exponent is undefined has ν = 1 in either case.
    """
    check_window("gate_layers", floor, low, high, width)
    check_choice(untrusted, name="untrusted", owner="gate_layers", choices=UNTRUSTED)
    gates = {}
    for row in exponents.rows:
        used = math.isfinite(row.exponent) and (row.trusted or untrusted == "gate")
        gates[row.name] = (
            float(spectral_gate(row.exponent, floor=floor, low=low, high=high, width=width)) if used else NEUTRAL
        )
    return LayerGates(exponents=exponents, gates=gates)


def gate_per_parameter(
    model: nn.Module,
    exponents: LayerExponents,
    *,
    floor: float = 0.1,
    low: float = 2.0,
    high: float = 6.0,
    width: float = 0.5,
    untrusted: str = "neutral",
) -> dict[str, Tensor]:
    """One gate for every parameter of a network.

    A weight has its layer's ν, block by block for a fused query-key-value projection and position by position for a
    convolution fitted in slices (its bias has their mean). A bias and the parts of a parametrised weight follow their
    weight. Everything else (normalisation layers, unknown layers) is neutral.

    Args:
        model: The network the exponents were measured on; it is only read.
        exponents: From `layer_exponents`.
        floor: As in `spectral_gate`.
        low: As in `spectral_gate`.
        high: As in `spectral_gate`.
        width: As in `spectral_gate`.
        untrusted: "neutral" gives a layer whose exponent is not trusted ν = 1, with one `ExponentWarning` for all;
            "gate" uses whatever exponent it has.

    Returns:
        For each name of `model.named_parameters()` a tensor that broadcasts to that parameter, of its dtype and device.

    Raises:
        ValueError: If the table names a parameter that the model does not have.
    """
    gates = gate_layers(exponents, floor=floor, low=low, high=high, width=width, untrusted=untrusted).gates
    by_weight: dict[str, list[LayerExponent]] = {}
    for row in exponents.rows:
        by_weight.setdefault(row.parameter, []).append(row)
    plain = plain_parameters(model)  # as the table has them, without wrappers' names
    parameters = {name: p.detach() for name, p in plain.items()}
    weights = {name: _weight_of(name, by_weight) for name in parameters}
    stray = sorted(set(by_weight) - set(weights.values()))
    if stray:
        raise ValueError(
            f"`exponents` of `gate_per_parameter` must come from this model; got one for {stray[0]!r}, which it does not "
            "have. Call `layer_exponents` on this model."
        )
    found = {
        name: _spread(name == weights[name], parameter, by_weight.get(weights[name], []), gates)
        for name, parameter in parameters.items()
    }
    if untrusted == "neutral":
        _warn(exponents)
    names = {id(p): name for name, p in plain.items()}
    return {name: found[names[id(p)]] for name, p in model.named_parameters()}


def _weight_of(name: str, known: dict[str, list[LayerExponent]]) -> str:
    """Name of the weight whose gate a parameter shares."""
    name = PARAMETRISED.sub(r"\1", name)
    if name in known:
        return name
    head, _, last = name.rpartition(".")
    partner = last.replace("bias", "weight")
    return f"{head}.{partner}" if head else partner


def _spread(own: bool, parameter: Tensor, rows: list[LayerExponent], gates: dict[str, float]) -> Tensor:
    """The gates of one weight's rows, laid out over a parameter that belongs to it."""
    if not rows:
        return parameter.new_full((), NEUTRAL)
    first = rows[0]
    if first.part is not None:
        axis = first.axis if parameter.dim() > 1 else 0
        size = parameter.shape[axis]
        if size % (first.heads * sum(first.sizes or (1,) * len(PARTS))):  # a parametrised weight's magnitude, say
            return parameter.new_full((), NEUTRAL)
        line = parameter.new_ones(size)
        for row in rows:
            line[block_index(size, int(row.part or 0), row.heads, row.sizes).to(line.device)] = gates[row.name]
        return line.view([size if d == axis else 1 for d in range(parameter.dim())])
    if first.kernel is not None:
        if not own:
            return parameter.new_full((), sum(gates[row.name] for row in rows) / len(rows))
        grid = parameter.new_ones(parameter.shape[2:])
        for row in rows:
            grid[row.kernel] = gates[row.name]
        return grid.view(1, 1, *grid.shape)
    return parameter.new_full((), gates[first.name])


def _warn(exponents: LayerExponents) -> None:
    neutral = [row for row in exponents.rows if not row.trusted]
    if not neutral:
        return
    named = ", ".join(f"{row.name!r} ({row.reason})" for row in neutral[:NAMED])
    more = f", and {len(neutral) - NAMED} more" if len(neutral) > NAMED else ""
    warnings.warn(
        f"the exponents of {len(neutral)} of {len(exponents)} layers cannot be trusted, so these layers are not gated: "
        f"{named}{more}. Print the table of `layer_exponents` for all reasons; untrusted='gate' uses them anyway.",
        ExponentWarning,
        stacklevel=caller_level(),
    )
