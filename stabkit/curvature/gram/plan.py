"""What the Gram of per-sample gradients is summed from, how each part is done, and what is held at the same time.

The Gram is a sum over parameters. Each unit (a weight with its bias, mostly) adds its own term, by the cheapest of:

- "grams": (inputs · inputs) ∘ (output gradients · output gradients), summed over pairs of positions. No gradient is formed.
- "gradients": per-sample gradients of this unit alone, from inputs and output gradients, then their products.
- "tokens": an embedding, token by token, over the samples that hold it.
- "autograd": per-sample gradients of this parameter alone by automatic differentiation. Works for anything.

What a unit needs of all samples has to be there at once, so units share a pass over the data only as far as memory goes;
a unit that does not fit alone is cut along its output features, in which every term is a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from stabkit.curvature.gram.calls import Call, Embedding, Tracer, names_of
from stabkit.problem import UnlearningProblem
from stabkit.samples import Inputs

GRAMS, GRADIENTS, TOKENS, AUTOGRAD = "grams", "gradients", "tokens", "autograd"
Geometry = tuple[type, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters whose gradients are built together.

    Attributes:
        weight: Name of the weight, or None.
        bias: Name of the bias, or None.
        calls: Numbers of the understood calls that use them; none for "autograd".
        size: Numbers in them.
        groups: Blocks of the weight.
        features: Rows g of a block.
        inputs: Columns a of a block, that of the bias included.
        positions: T over all calls.
        method: One of the four.
        hold_gradients: Whether gradients are held for all samples, rather than inputs and output gradients.
    """

    weight: str | None
    bias: str | None
    calls: tuple[int, ...]
    size: int
    groups: int = 1
    features: int = 1
    inputs: int = 1
    positions: int = 0
    method: str = AUTOGRAD
    hold_gradients: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def pieces(self) -> int:
        """How finely the unit can be cut: into blocks if it has several, else into output features."""
        return self.groups if self.groups > 1 else self.features

    @property
    def piece_size(self) -> int:
        """Gradient numbers of a piece."""
        return self.inputs * self.features if self.groups > 1 else self.inputs

    def held(self, width: int, directions: int) -> float:
        """Numbers held per sample and direction for `width` pieces."""
        if self.hold_gradients:
            return width * self.piece_size
        if self.method == TOKENS:
            return self.positions * (width + 1 / directions)
        if self.groups > 1:
            return width * self.positions * (self.features + self.inputs / directions)
        return self.positions * (width + self.inputs / directions)


@dataclass(frozen=True)
class Part:
    """Pieces [start, stop) of a unit."""

    unit: Unit
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Number of pieces."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything known before the first pass.

    Attributes:
        units: What the Gram is summed from.
        calls: The understood calls of the network.
        activations: Numbers that the graph of one sample holds, about.
        intercepted: Trainable parameters outside "autograd", by identity.
        by_sample: Whether samples go through the network one by one, as it does not take `vmap`.
    """

    units: tuple[Unit, ...]
    calls: tuple[Call, ...]
    activations: int
    intercepted: dict[int, str] = field(repr=False)
    by_sample: bool = False


def trace(problem: UnlearningProblem, inputs: Inputs) -> Plan:
    """Run the network on one sample and see where its trainable parameters go.

    Args:
        problem: The unlearning problem.
        inputs: Inputs of one sample, with a leading axis of 1.

    Returns:
        The units, their methods not yet chosen. Cost: two forward and one backward pass.
    """
    first = _trace(problem, inputs, set())
    left = first[1] | _mixed(first[0].calls)
    tracer, elsewhere = _trace(problem, inputs, left)
    calls = tuple(tracer.calls)
    uses: dict[str, list[tuple[int, str]]] = {}
    for number, call in enumerate(calls):
        for role, name in (("weight", call.weight), ("bias", call.bias)):
            if name is not None:
                uses.setdefault(name, []).append((number, role))
    # A parameter that this sample does not use can have no gradient at another: `vmap` takes no other path.
    size = {name: p.numel() for name, p in problem.parameters.items()}
    units = [_autograd(name, size[name]) for name in problem.parameters if name in elsewhere | left]
    merged: set[str] = set()
    for name, where in uses.items():
        if name in merged:
            continue
        numbers = tuple(number for number, _ in where)
        role = where[0][1]
        other = getattr(calls[numbers[0]], "bias" if role == "weight" else "weight")
        together = (
            other is not None
            and other != name
            and tuple(n for n, _ in uses[other]) == numbers
            and all({calls[n].weight, calls[n].bias} == {name, other} for n in numbers)
        )
        weight, bias = (name, other if together else None) if role == "weight" else (other if together else None, name)
        merged |= {name, other} if together else {name}
        units.append(_unit(calls, numbers, weight, bias, sum(size[n] for n in (weight, bias) if n is not None)))
    return Plan(
        units=tuple(units),
        calls=calls,
        activations=tracer.activations,
        intercepted=names_of(problem.parameters, left),
    )


def plain(problem: UnlearningProblem, activations: int) -> Plan:
    """Every parameter by automatic differentiation, sample by sample: for a network that `vmap` cannot take.

    Args:
        problem: The unlearning problem.
        activations: Numbers that the graph of one sample holds, about.

    Returns:
        The plan.
    """
    units = tuple(_autograd(name, p.numel()) for name, p in problem.parameters.items())
    return Plan(units=units, calls=(), activations=activations, intercepted={}, by_sample=True)


def choose(plan: Plan, *, directions: int, formed: set[str], workspace: int) -> Plan:
    """Choose each unit's method by its cost.

    Args:
        plan: What `trace` gave.
        directions: Number C of output directions.
        formed: Parameters whose gradients must be formed, as a preconditioner weighs their entries differently.
        workspace: Numbers that a contraction may hold.

    Returns:
        The plan with methods.
    """
    return replace(plan, units=tuple(_chosen(unit, directions, formed, workspace) for unit in plan.units))


def passes(plan: Plan, *, rows: int, directions: int, budget: int) -> Iterator[list[Part]]:
    """Parts that are done in the same pass over the data.

    Args:
        plan: The plan, methods chosen.
        rows: m·C.
        directions: C.
        budget: Numbers that may be held for all samples, at least what `smallest` says.

    Yields:
        Parts of each pass; every piece of every unit is in exactly one of them.
    """
    group: list[Part] = []
    left = budget / rows
    # Backwards, as the last layers' passes need not go back to the first ones.
    for unit in sorted(plan.units, key=lambda unit: -max(unit.calls, default=-1)):
        start = 0
        while start < unit.pieces:
            remaining = unit.pieces - start
            width = min(remaining, _fitting(unit, left, directions))
            whole_fits_later = unit.held(remaining, directions) <= budget / rows
            if width < 1 or (width < remaining and whole_fits_later and group):
                yield group
                group, left = [], budget / rows
                continue
            group.append(Part(unit, start, start + width))
            left -= unit.held(width, directions)
            start += width
    if group:
        yield group


def smallest(plan: Plan, *, rows: int, directions: int) -> int:
    """Numbers that must be held for all samples at least.

    Args:
        plan: The plan, methods chosen.
        rows: m·C.
        directions: C.

    Returns:
        What the largest single piece needs.
    """
    return max((int(rows * unit.held(1, directions)) + 1 for unit in plan.units), default=0)


def _fitting(unit: Unit, room: float, directions: int) -> int:
    """Pieces that fit into `room` numbers a row."""
    fixed = unit.held(0, directions)
    return int((room - fixed) / (unit.held(1, directions) - fixed) + 1e-9)


def _trace(problem: UnlearningProblem, inputs: Inputs, left_out: set[str]) -> tuple[Tracer, set[str]]:
    """The understood calls, and the parameters that reach the outputs by another way too."""
    leaves = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
    tracer = Tracer(names_of(leaves, left_out))
    with torch.enable_grad():
        with tracer:
            outputs = problem.outputs(leaves, inputs)
        if not outputs.requires_grad:
            return tracer, set()
        found = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    return tracer, {name for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _mixed(calls: list[Call]) -> set[str]:
    """Parameters used in ways whose outer products do not add up: an embedding's table as output weights, say."""
    seen: dict[str, set[object]] = {}
    for call in calls:
        layer = call.layer
        for role, name in (("weight", call.weight), ("bias", call.bias)):
            if name is not None:
                shape = (layer.groups, layer.features, layer.inputs if role == "weight" else 1)
                seen.setdefault(name, set()).add((role, type(layer), getattr(layer, "transposed", False), shape))
    return {name for name, kinds in seen.items() if len(kinds) > 1}


def _autograd(name: str, size: int) -> Unit:
    return Unit(weight=name, bias=None, calls=(), size=size, features=size)


def _unit(calls: tuple[Call, ...], numbers: tuple[int, ...], weight: str | None, bias: str | None, size: int) -> Unit:
    """A unit of understood calls; T from the shapes of their outputs."""
    layer = calls[numbers[0]].layer
    outputs = sum(calls[n].shape.numel() for n in numbers)
    return Unit(
        weight=weight,
        bias=bias,
        calls=numbers,
        size=size,
        groups=layer.groups,
        features=layer.features,
        inputs=layer.inputs * (weight is not None) + (bias is not None),
        positions=outputs // (layer.groups * layer.features),
        method=TOKENS if isinstance(layer, Embedding) else GRADIENTS,
    )


def _chosen(unit: Unit, directions: int, formed: set[str], workspace: int) -> Unit:
    """The unit with its method, by multiplications for one pair of samples."""
    if unit.method == AUTOGRAD:
        return unit
    pairs = replace(unit, hold_gradients=False)
    if unit.method == TOKENS:
        return pairs
    T, C, g, a = unit.positions, directions, unit.features, unit.inputs
    # Each of T² pairs of positions: a for the inputs, C²g for the output gradients, C² to combine. Against C²·g·a.
    by_grams = T**2 * (a + C**2 * (g + 1))
    fits = workspace >= 2 * C**2 * T**2
    if by_grams < C**2 * g * a and fits and not formed.intersection(unit.names):
        return replace(pairs, method=GRAMS)
    # Gradients are either held, or formed at the end from the pairs where these are fewer.
    return min(unit, pairs, key=lambda u: u.held(u.pieces, directions))
