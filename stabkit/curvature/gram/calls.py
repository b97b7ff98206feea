"""Calls of a network in which a parameter's gradient is a sum of outer products, found while the network runs.

A linear map, a convolution, a normalisation or an embedding used at T positions of one sample has the weight gradient
Σ_t y_t x_tᵀ, with x_t its inputs and y_t the gradients of its outputs. The calls are found at the level of PyTorch's
functions, not of modules, so a weight shared by two layers, used twice, padded circularly or used outside its module is
seen as what it is. Nothing is attached to the network, so nothing can be left behind.
"""

from __future__ import annotations

import abc
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stabkit.problem import Parameters


class Layer(abc.ABC):
    """How one call's weight gradient is a sum of outer products: `groups` blocks, each `features` x `inputs`.

    Attributes:
        groups: Blocks of the weight, whose gradients are separate.
        features: Rows g of a block.
        inputs: Columns a of a block.
    """

    groups: int
    features: int
    inputs: int

    @abc.abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """Inputs of b samples, (b, ...) as the call got them, to (b, groups, a, T)."""

    @abc.abstractmethod
    def cotangents(self, y: Tensor) -> Tensor:
        """Output gradients of b samples in c directions, (b, c, ...), to (b, c, groups, g, T)."""

    def blocks(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight to (groups, g, a)."""
        return weight.reshape(self.groups, self.features, self.inputs)


@dataclass(frozen=True)
class Linear(Layer):
    """x Wᵀ + b, or x W + b where `transposed`."""

    features: int
    inputs: int
    transposed: bool = False
    groups: int = 1

    def positions(self, x: Tensor) -> Tensor:
        """(b, ..., a) to (b, 1, a, T)."""
        return x.reshape(x.shape[0], 1, -1, self.inputs).transpose(2, 3)

    def cotangents(self, y: Tensor) -> Tensor:
        """(b, c, ..., g) to (b, c, 1, g, T)."""
        return y.reshape(*y.shape[:2], 1, -1, self.features).transpose(3, 4)

    def blocks(self, weight: Tensor) -> Tensor:
        """(g, a), or (a, g) where transposed, to (1, g, a)."""
        return (weight.T if self.transposed else weight).unsqueeze(0)


@dataclass(frozen=True)
class Convolution(Layer):
    """Convolution in any number of dimensions, as a linear map of its patches."""

    groups: int
    features: int
    kernel: tuple[int, ...]
    channels: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]  # low and high, last dimension first, as `pad` takes it

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """Numbers in a group's patch."""
        return self.channels // self.groups * math.prod(self.kernel)

    def positions(self, x: Tensor) -> Tensor:
        """(b, [n,] channels, space) to patches (b, groups, a, n·L)."""
        space = len(self.kernel)
        x = F.pad(x.reshape(x.shape[0], -1, self.channels, *x.shape[-space:]), self.padding)
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(3 + axis, gap * (size - 1) + 1, step)[..., ::gap]
        # (b, n, channels, L..., kernel...) -> (b, channels, kernel..., n, L...): one copy, in the reshape
        order = (0, 2, *range(3 + space, 3 + 2 * space), 1, *range(3, 3 + space))
        x = x.permute(order)
        return x.reshape(x.shape[0], self.groups, self.inputs, -1)

    def cotangents(self, y: Tensor) -> Tensor:
        """(b, c, [n,] groups·g, space) to (b, c, groups, g, n·L)."""
        out = self.groups * self.features
        y = y.reshape(*y.shape[:2], -1, out, math.prod(y.shape[-len(self.kernel) :])).movedim(2, 3)
        return y.reshape(*y.shape[:2], self.groups, self.features, -1)


@dataclass(frozen=True)
class Scale(Layer):
    """Scale and shift of normalised inputs, channel by channel: `groups` blocks of 1 x 1."""

    groups: int
    channels_last: bool
    features: int = 1
    inputs: int = 1

    def positions(self, x: Tensor) -> Tensor:
        """Normalised inputs (b, ...) to (b, channels, 1, T)."""
        return self._channels_first(x.unsqueeze(1)).squeeze(1).unsqueeze(2)

    def cotangents(self, y: Tensor) -> Tensor:
        """(b, c, ...) to (b, c, channels, 1, T)."""
        return self._channels_first(y).unsqueeze(3)

    def _channels_first(self, y: Tensor) -> Tensor:
        if self.channels_last:
            return y.reshape(*y.shape[:2], -1, self.groups).transpose(2, 3)
        y = y.movedim(3, 2)  # (b, c, n, channels, ...)
        return y.reshape(*y.shape[:2], self.groups, -1)


@dataclass(frozen=True)
class Embedding(Layer):
    """Rows of a table: a linear map of one-hot inputs, of which only the row numbers are kept."""

    inputs: int
    features: int
    padding: int | None
    groups: int = 1

    def positions(self, x: Tensor) -> Tensor:
        """Row numbers (b, ...) to (b, T); -1 where no gradient flows."""
        rows = x.reshape(x.shape[0], -1)
        return rows if self.padding is None else rows.masked_fill(rows == self.padding, -1)

    def cotangents(self, y: Tensor) -> Tensor:
        """(b, c, ..., g) to (b, c, 1, g, T)."""
        return y.reshape(*y.shape[:2], 1, -1, self.features).transpose(3, 4)

    def blocks(self, weight: Tensor) -> Tensor:
        """(rows, g) to (1, g, rows)."""
        return weight.T.unsqueeze(0)


# ---------------------------------------------------------------------- which functions are understood

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """How to read one PyTorch function's arguments.

    Attributes:
        signature: Its parameters.
        layer: The layer of a call, or None for a call that is left to automatic differentiation.
        captured: The tensor whose `positions` the layer takes.
        weight: Name of the weight argument.
        bias: Name of the bias argument.
    """

    signature: inspect.Signature
    layer: Callable[[Arguments], Layer | None]
    captured: Callable[[Arguments], Tensor]
    weight: str = "weight"
    bias: str = "bias"

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments | None:
        """All arguments by name, defaults filled in; None for a call of another form, with `out=` for instance."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return dict(bound.arguments)


def _signature(text: str) -> inspect.Signature:
    """Signature of builtins that have none: names and defaults, everything after * by keyword."""
    parameters: list[inspect.Parameter] = []
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for item in text.split(", "):
        if item == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        name, _, default = item.partition("=")
        values = {"None": None, "False": False, "0": 0, "1": 1, "1e-5": 1e-5, "0.1": 0.1, "2.0": 2.0}
        parameters.append(
            inspect.Parameter(name, kind, default=values[default] if default else inspect.Parameter.empty)
        )
    return inspect.Signature(parameters)


def _linear(call: Arguments) -> Layer | None:
    weight = call["weight"]
    return Linear(*weight.shape) if weight.dim() == 2 else None


def _addmm(call: Arguments) -> Layer | None:
    if call["beta"] != 1 or call["alpha"] != 1 or call["input"].shape != call["mat2"].shape[1:]:
        return None
    return Linear(call["mat2"].shape[1], call["mat2"].shape[0], transposed=True)


def _convolution(call: Arguments) -> Layer:
    weight = call["weight"]
    out, _, *kernel = weight.shape
    space, groups = len(kernel), call["groups"]

    def numbers(value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * space if len(values) == 1 else values

    dilation = numbers(call["dilation"])
    if call["padding"] == "same":
        totals = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in numbers(0 if call["padding"] == "valid" else call["padding"])]
    return Convolution(
        groups=groups,
        features=out // groups,
        kernel=tuple(kernel),
        channels=weight.shape[1] * groups,
        stride=numbers(call["stride"]),
        dilation=dilation,
        padding=tuple(p for pair in reversed(pads) for p in pair),
    )


def _embedding(call: Arguments) -> Layer | None:
    if call["max_norm"] is not None or call["scale_grad_by_freq"] or call["sparse"]:
        return None
    rows, features = call["weight"].shape
    padding = call["padding_idx"]
    return Embedding(rows, features, None if padding is None else padding % rows)


def _feature_norm(call: Arguments) -> Layer:
    return Scale(math.prod(call["normalized_shape"]), channels_last=True)


def _channel_norm(call: Arguments) -> Layer | None:
    if call.get("training"):  # batch statistics couple the positions
        return None
    return Scale(call["input"].shape[1], channels_last=False)


def _normalised(function: Any) -> Callable[[Arguments], Tensor]:
    return lambda call: function(**{key: None if key in {"weight", "bias"} else value for key, value in call.items()})


def _input(call: Arguments) -> Tensor:
    return call["input"]


_CONVOLUTION = Rule(
    _signature("input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1"), _convolution, _input
)
_NORMS = {
    F.layer_norm: ("input, normalized_shape, weight=None, bias=None, eps=1e-5", _feature_norm),
    F.rms_norm: ("input, normalized_shape, weight=None, eps=None", _feature_norm),
    F.group_norm: ("input, num_groups, weight=None, bias=None, eps=1e-5", _channel_norm),
    F.batch_norm: (
        "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5",
        _channel_norm,
    ),
}
RULES: dict[Any, Rule] = {
    F.linear: Rule(_signature("input, weight, bias=None"), _linear, _input),
    torch.addmm: Rule(
        _signature("input, mat1, mat2, *, beta=1, alpha=1"), _addmm, lambda call: call["mat1"], "mat2", "input"
    ),
    F.conv1d: _CONVOLUTION,
    F.conv2d: _CONVOLUTION,
    F.conv3d: _CONVOLUTION,
    F.embedding: Rule(
        _signature(
            "input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False"
        ),
        _embedding,
        _input,
    ),
    **{norm: Rule(_signature(text), layer, _normalised(norm)) for norm, (text, layer) in _NORMS.items()},
}


# ---------------------------------------------------------------------- the network watched while it runs


@dataclass(frozen=True)
class Call:
    """One understood call in a network's pass over one sample.

    Attributes:
        layer: Its geometry.
        weight: Name of the trainable parameter that is its weight, or None.
        bias: Of its bias, or None.
        shape: Shape of its output for a batch of one.
    """

    layer: Layer
    weight: str | None
    bias: str | None
    shape: torch.Size


class _Watcher(TorchFunctionMode):
    """Passes every function through, the understood calls of the named tensors by way of `_call`."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func)
        bound = None if rule is None else rule.bind(args, kwargs or {})
        if rule is None or bound is None:
            return self._other(func(*args, **(kwargs or {})))
        weight, bias = self._names.get(id(bound[rule.weight])), self._names.get(id(bound.get(rule.bias)))
        layer = None if weight is None and bias is None else rule.layer(bound)
        if layer is None:
            return self._other(func(*args, **(kwargs or {})))
        return self._call(func, rule, bound, layer, weight, bias)

    def _other(self, result: Any) -> Any:
        return result

    def _call(
        self, func: Any, rule: Rule, bound: Arguments, layer: Layer, weight: str | None, bias: str | None
    ) -> Tensor:
        """Run an understood call."""
        raise NotImplementedError


class Tracer(_Watcher):
    """Lists the understood calls, and cuts their weights off the graph: what still has a gradient is used elsewhere.

    Attributes:
        calls: The calls, in order.
        activations: Numbers in all results, views apart: an estimate of what a graph holds.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__(names)
        self.calls: list[Call] = []
        self.activations = 0

    def _other(self, result: Any) -> Any:
        if isinstance(result, Tensor) and result._base is None:
            self.activations += result.numel()
        return result

    def _call(
        self, func: Any, rule: Rule, bound: Arguments, layer: Layer, weight: str | None, bias: str | None
    ) -> Tensor:
        for key, name in ((rule.weight, weight), (rule.bias, bias)):
            if name is not None:
                bound = {**bound, key: bound[key].detach()}
        result = self._other(func(**bound))
        self.calls.append(Call(layer, weight, bias, result.shape))
        return result


class Capturer(_Watcher):
    """Keeps the wanted calls' inputs, and adds to their outputs the zeros whose gradients are the outputs' gradients.

    Attributes:
        inputs: What was kept, by the call's number.
    """

    def __init__(self, names: dict[int, str], zeros: dict[int, Tensor]) -> None:
        super().__init__(names)
        self._zeros = zeros
        self._count = -1
        self.inputs: dict[int, Tensor] = {}

    def _call(
        self, func: Any, rule: Rule, bound: Arguments, layer: Layer, weight: str | None, bias: str | None
    ) -> Tensor:
        self._count += 1
        result = _affine(bound) if func is F.batch_norm else func(**bound)
        if self._count not in self._zeros:
            return result
        self.inputs[self._count] = rule.captured(bound).detach()
        return result + self._zeros[self._count]


def _affine(call: Arguments) -> Tensor:
    """BatchNorm with running statistics as what it is, which `vmap` takes several times faster."""
    x, mean, scale = call["input"], call["running_mean"], (call["running_var"] + call["eps"]).rsqrt()
    if call["weight"] is not None:
        scale = scale * call["weight"]
    shift = -mean * scale if call["bias"] is None else call["bias"] - mean * scale
    shape = (-1, *(1 for _ in x.shape[2:]))
    return x * scale.reshape(shape) + shift.reshape(shape)


def names_of(parameters: Parameters, left_out: set[str]) -> dict[int, str]:
    """Names by the tensors' identity.

    Args:
        parameters: Tensors by name.
        left_out: Names to leave out.

    Returns:
        Name by `id`.
    """
    return {id(tensor): name for name, tensor in parameters.items() if name not in left_out}
