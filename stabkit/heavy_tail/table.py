"""The table of layer exponents: what was measured, how far to trust it, and what was left out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class LayerExponent:
    """One layer's spectrum, its exponent, and the evidence for it.

    Rows are equal if all fields are, NaN to NaN.

    Attributes:
        name: Layer name; [q], [k], [v] or a kernel position names a part of one parameter.
        module: Module that holds the weight.
        parameter: Full name of the parameter.
        kind: "linear", "embedding", "conv2d", "attention", "recurrent", ...
        shape: Shape of the weight or part.
        exponent: ξ; NaN if undefined.
        standard_error: Of ξ, with λ_min taken as known.
        interval: 95 % bootstrap interval, or None.
        n_tail: Eigenvalues in the tail.
        eigenvalues: Eigenvalues in all, the numerically zero ones included.
        distance: Kolmogorov-Smirnov distance of the fit.
        lambda_min: Start of the tail.
        lambda_max: Largest eigenvalue.
        alpha_weighted: ξ·log10 λ_max.
        log_alpha_norm: log10 Σ λ^ξ over all eigenvalues above the threshold.
        stable_rank: Σλ / λ_max.
        mp_edge: Upper edge of the Marchenko-Pastur bulk, in units of λ.
        spikes: Eigenvalues beyond that edge and its fluctuations.
        null_low: Smallest exponent of the same entries in random order, of the copies that were compared; NaN if none was.
        null_high: Largest such exponent; NaN if none was compared.
        flags: Everything unusual, in plain words.
        trusted: Whether the exponent may be acted on.
        reason: Why it is not trusted; empty if it is.
        axis: Axis along which a fused parameter is split.
        part: Which part of a fused query-key-value parameter, or None.
        heads: Heads over which the parts are interleaved.
        kernel: Kernel position of a convolution's slice, or None.
        p_value: Goodness of fit: share of synthetic samples that fit worse; None unless asked for.
        sizes: Rows of q, k and v in each of `heads`; None for thirds.
    """

    name: str
    module: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    exponent: float
    standard_error: float
    interval: tuple[float, float] | None
    n_tail: int
    eigenvalues: int
    distance: float
    lambda_min: float
    lambda_max: float
    alpha_weighted: float
    log_alpha_norm: float
    stable_rank: float
    mp_edge: float
    spikes: int
    null_low: float
    null_high: float
    flags: tuple[str, ...]
    trusted: bool
    reason: str
    axis: int = 0
    part: int | None = None
    heads: int = 1
    kernel: tuple[int, ...] | None = None
    p_value: float | None = None
    sizes: tuple[int, ...] | None = None

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, LayerExponent) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, self.parameter, self.shape, self.eigenvalues))  # no field that may be NaN

    def _values(self) -> dict[str, Any]:
        """Values for JSON, in which NaN equals itself."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


TEXTS = ("name", "module", "parameter", "kind", "reason")
TUPLES = ("shape", "interval", "flags", "kernel", "sizes")
COLUMNS = ("layer", "kind", "shape", "exponent", "± se", "null", "tail", "of", "KS", "trusted", "why not")


@dataclass(frozen=True, kw_only=True)
class LayerExponents:
    """Exponents of a network's layers, in the network's order.

    Attributes:
        rows: One entry a layer or part of one.
        skipped: (parameter name, why) for everything else.
        method: Estimator used.
        conv: How convolutions were read.
        shuffles: Shuffled copies that each layer is compared with at most.
        seed: Seed of shuffles and bootstrap.
        tail: Size of the tails that was asked for; None: the estimator's own.
    """

    rows: tuple[LayerExponent, ...]
    skipped: tuple[tuple[str, str], ...]
    method: str
    conv: str
    shuffles: int
    seed: int
    tail: int | float | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> LayerExponent:
        """The row of one layer.

        Args:
            name: Its name.

        Returns:
            The row.

        Raises:
            KeyError: If there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        why = dict(self.skipped).get(name)
        raise KeyError(f"no exponent for {name!r}" + (f": {why}" if why else f"; rows are {self.names()}"))

    def names(self) -> list[str]:
        """Names of the rows, in order."""
        return [row.name for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinite numbers become the strings "nan", "inf" and "-inf".

        Returns:
            What `from_dict` reads; the table that it makes, also by way of JSON, equals this one.
        """
        rows = [row._values() for row in self.rows]
        settings = {key: getattr(self, key) for key in ("method", "conv", "shuffles", "seed", "tail")}
        return {"schema": SCHEMA, **settings, "rows": rows, "skipped": [list(pair) for pair in self.skipped]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerExponents:
        """Read `to_dict`'s output back.

        Args:
            data: The mapping.

        Returns:
            The table.

        Raises:
            ValueError: If it was written in another schema.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"`data` of `LayerExponents.from_dict` must have schema {SCHEMA}; got {data.get('schema')!r}. Measure the "
                "exponents again with `layer_exponents`."
            )
        return cls(
            rows=tuple(LayerExponent(**{key: _read(key, value) for key, value in row.items()}) for row in data["rows"]),
            skipped=tuple((name, why) for name, why in data["skipped"]),
            method=data["method"],
            conv=data["conv"],
            shuffles=data["shuffles"],
            seed=data["seed"],
            tail=data.get("tail"),
        )

    def to_dataframe(self) -> Any:
        """The rows as a pandas table.

        Returns:
            A `pandas.DataFrame`, one row a layer, one column a field.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "`LayerExponents.to_dataframe` needs pandas, which is not installed. Install pandas, or use `to_dict()`."
            ) from error
        names = [f.name for f in fields(LayerExponent)]
        return pandas.DataFrame([{name: getattr(row, name) for name in names} for row in self.rows], columns=names)

    def __str__(self) -> str:
        lines = [COLUMNS] + [_cells(row) for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        if self.skipped:
            text.append(f"left out: {len(self.skipped)} parameters")
            text += [f"  {name}: {why}" for name, why in self.skipped]
        return "\n".join(text)


def _cells(row: LayerExponent) -> tuple[str, ...]:
    null = "" if math.isnan(row.null_low) else f"{row.null_low:.2f}..{row.null_high:.2f}"
    return (
        row.name,
        row.kind,
        "x".join(map(str, row.shape)),
        f"{row.exponent:.3f}",
        f"{row.standard_error:.3f}",
        null,
        str(row.n_tail),
        str(row.eigenvalues),
        f"{row.distance:.4f}",
        "yes" if row.trusted else "no",
        row.reason,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _read(key: str, value: Any) -> Any:
    if key in TUPLES and value is not None:
        return tuple(value if key == "flags" else (float(v) if key == "interval" else v for v in value))
    if isinstance(value, str) and value in {"nan", "inf", "-inf"} and key not in TEXTS:
        return float(value)
    return value
