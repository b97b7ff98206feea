"""Which matrices a network is made of: every weight found, split where it is several matrices, or left out by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stabkit._wrappers import plain_modules
from stabkit.heavy_tail.fused import Layout, fused_name, layout_of, not_split

PARTS = ("q", "k", "v")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightMatrix:
    """One linear map of the network, or several that are pooled.

    Attributes:
        name: Layer name, with [q], [k], [v] or a kernel position where a parameter holds several.
        module: Name of the module that holds it.
        parameter: Full name of the parameter; of the effective weight if it is parametrised.
        kind: "linear", "embedding", "conv2d", "attention", "recurrent", ...
        weight: The values this entry reads, detached, a view where possible.
        stack: Shape (s, a, b) the values are read in: s matrices whose spectra are pooled.
        permute: Axes that bring `weight` into the order of `stack`.
        axis: Axis of the parameter along which it was split.
        part: Which part of a fused query-key-value weight, or None.
        heads: Heads over which the parts are interleaved; 1 for three contiguous blocks.
        sizes: Rows of q, k and v in each of these; None for thirds.
        kernel: Kernel position of one slice, or None.
        flags: What is known to limit trust before any fit.
    """

    name: str
    module: str
    parameter: str
    kind: str
    weight: Tensor
    stack: tuple[int, int, int]
    permute: tuple[int, ...] = ()
    axis: int = 0
    part: int | None = None
    heads: int = 1
    sizes: tuple[int, ...] | None = None
    kernel: tuple[int, ...] | None = None
    flags: tuple[str, ...] = ()

    def matrices(self) -> Tensor:
        """The matrices themselves.

        Returns:
            Shape (s, a, b), in the parameter's dtype.
        """
        return (self.weight.permute(self.permute) if self.permute else self.weight).reshape(self.stack)


Entry = WeightMatrix | tuple[str, str]  # a matrix, or (parameter name, why it is left out)


def block_index(size: int, part: int, heads: int, sizes: tuple[int, ...] | None = None) -> Tensor:
    """Positions of one part of a fused query-key-value axis.

    Args:
        size: Length of the axis, a multiple of heads·Σ sizes.
        part: 0 for queries, 1 for keys, 2 for values.
        heads: Heads over which the parts are interleaved; 1 for contiguous ones.
        sizes: Numbers of each part in a head; thirds when None.

    Returns:
        Shape (heads·sizes[part],), on the CPU.
    """
    widths = sizes or (size // (len(PARTS) * heads),) * len(PARTS)
    begin = sum(widths[:part])
    return torch.arange(size).view(heads, -1)[:, begin : begin + widths[part]].reshape(-1)


def weight_matrices(model: nn.Module, *, conv: str = "pooled") -> Iterator[Entry]:
    """Walk a network in its own order.

    Args:
        model: The network; it is only read, and names are without wrappers, as those of torch.compile.
        conv: "pooled": the kernel positions of a convolution share one spectrum; "slices": each has its own.

    Yields:
        A matrix, or (parameter name, reason) for what has none. Every parameter name appears in one or the other.
    """
    owners: dict[int, str] = {}
    modules: dict[int, str] = {}
    for name, module in plain_modules(model):
        again = modules.get(id(module))
        modules.setdefault(id(module), name)
        if ".parametrizations." in f".{name}.":  # reported with the module whose weight they make
            continue
        if again is None:
            yield from _module_entries(model, name, module, owners, conv)
        else:
            for key, _ in module.named_parameters(recurse=False):
                yield _join(name, key), f"the same module as {again!r}"


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _module_entries(
    model: nn.Module, name: str, module: nn.Module, owners: dict[int, str], conv: str
) -> Iterator[Entry]:
    parametrised = parametrize.is_parametrized(module)
    if parametrised:
        # Reading a parametrised weight may advance its state (spectral norm's power iteration): read a copy's.
        frozen = copy.deepcopy(module).eval()
        computed = {key: getattr(frozen, key) for key in frozen.parametrizations}  # type: ignore[union-attr]
    else:
        computed = {}
    hooked = "weight_v" in module._parameters or "weight_orig" in module._parameters
    for key, parameter in (*module._parameters.items(), *computed.items()):
        if parameter is None:
            continue
        full = _join(name, key)
        if key not in computed:
            first = owners.setdefault(id(parameter), full)
            if first != full:
                yield full, f"tied to {first!r}, which is counted"
                continue
        reason = _why_not(key, parameter, module, hooked)
        if reason:
            yield full, reason
            continue
        yield from _read(model, name, key, module, parameter.detach(), conv)
    for key in computed:
        stored = [n for n, _ in module.parametrizations[key].named_parameters()]  # type: ignore[index, union-attr]
        for inner in stored:
            yield _join(name, "parametrizations", key, inner), f"part of the parametrised {_join(name, key)!r}"


def _why_not(key: str, parameter: Tensor, module: nn.Module, hooked: bool) -> str:
    """Why a parameter is no weight matrix; empty if it may be one."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "not initialised yet: run one batch through the model"
    # Other libraries' normalisation layers are known by their class name, and hold vectors only.
    if isinstance(module, NORMALISATIONS) or (parameter.dim() < 2 and "norm" in type(module).__name__.lower()):
        return f"normalisation layer ({type(module).__name__})"
    if "bias" in key:
        return "a bias"
    if parameter.dim() < 2:
        return f"{parameter.dim()}-D weight"
    if parameter.is_meta:
        return "on the meta device: load the weights first"
    if not parameter.is_floating_point():
        return f"dtype {parameter.dtype}".replace("torch.", "") + " has no real spectrum here"
    if hooked:
        return "a hook computes the weight in the forward pass: make it permanent, or use a parametrization"
    if parameter.numel() == 0:
        return f"empty, shape {tuple(parameter.shape)}"
    return ""


def _read(model: nn.Module, name: str, key: str, module: nn.Module, weight: Tensor, conv: str) -> Iterator[Entry]:
    """The matrices of one parameter of a known layer, or why there are none."""
    full = _join(name, key)
    if weight.dim() == 2:
        plain = WeightMatrix(
            name=full, module=name, parameter=full, kind="", weight=weight, stack=(1, weight.shape[0], weight.shape[1])
        )
        if isinstance(module, nn.MultiheadAttention):
            attention = replace(plain, kind="attention")
            third = weight.shape[0] // 3
            thirds = Layout(sizes=(third, third, third))
            yield from _split(attention, axis=0, layout=thirds) if key == "in_proj_weight" else (attention,)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            yield replace(plain, kind="recurrent")
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield replace(plain, name=name or key, kind="embedding")
        elif isinstance(module, nn.Linear) and key == "weight":
            yield from _dense(model, replace(plain, name=name or key, kind="linear"), axis=0)
        elif type(module).__name__.endswith("Conv1D") and key == "weight":
            yield from _dense(model, replace(plain, name=name or key, kind="linear"), axis=1)
        else:
            yield full, f"a parameter of {type(module).__name__}, which is no known layer type"
    elif isinstance(module, CONVOLUTIONS + TRANSPOSED) and key == "weight":
        yield from _convolution(name or key, name, full, module, weight, conv)
    else:
        yield full, f"{weight.dim()}-D parameter of {type(module).__name__}, which is no known layer type"


def _dense(model: nn.Module, matrix: WeightMatrix, *, axis: int) -> Iterator[WeightMatrix]:
    """A linear layer, split in three if it is a fused query-key-value projection; a flag says where that fails."""
    name = fused_name(matrix.module)
    outputs, inputs = matrix.weight.shape[axis], matrix.weight.shape[1 - axis]
    layout = layout_of(name, _holders(model, name), outputs, inputs)
    if isinstance(layout, Layout):
        yield from _split(replace(matrix, kind="attention"), axis=axis, layout=layout)
    else:
        yield matrix if layout is None else replace(matrix, flags=(layout,))


def _holders(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around a module, the nearest first."""
    within = dict(plain_modules(model)) if name else {}
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(within[name])
    return found


def _split(matrix: WeightMatrix, *, axis: int, layout: Layout) -> Iterator[WeightMatrix]:
    size = matrix.weight.shape[axis]
    sizes = None if len(set(layout.sizes)) == 1 else layout.sizes
    for part, label in enumerate(PARTS):
        index = block_index(size, part, layout.groups, sizes).to(matrix.weight.device)
        block = matrix.weight.index_select(axis, index)
        yield replace(
            matrix,
            name=f"{matrix.name}[{label}]",
            weight=block,
            stack=(1, block.shape[0], block.shape[1]),
            axis=axis,
            part=part,
            heads=layout.groups,
            sizes=sizes,
        )


def _convolution(
    name: str, module_name: str, full: str, module: nn.Module, weight: Tensor, conv: str
) -> Iterator[WeightMatrix]:
    """One matrix per group and kernel position: (outputs per group) x (inputs per group).

    Transposed convolutions store (inputs, outputs per group, *kernel), so their groups lie along the first axis too.

    Yields:
        The pooled matrices, or those of one kernel position at a time.
    """
    groups = int(module.groups)  # type: ignore[arg-type]
    rows, columns, *kernel = weight.shape
    grouped = weight.reshape(groups, rows // groups, columns, *kernel)
    spatial = tuple(range(3, grouped.dim()))
    kind = f"conv{'_transpose' if isinstance(module, TRANSPOSED) else ''}{len(kernel)}d"
    outputs, inputs = (columns, rows) if isinstance(module, TRANSPOSED) else (rows, columns)
    fused = not_split(fused_name(module_name), outputs, inputs)
    vectors = "one row or column: the matrices are vectors" if min(rows // groups, columns) == 1 else ""
    common = WeightMatrix(
        name=name,
        module=module_name,
        parameter=full,
        kind=kind,
        weight=grouped,
        stack=(groups * int(torch.tensor(kernel).prod()), rows // groups, columns),
        permute=(*spatial, 0, 1, 2),
        flags=tuple(flag for flag in (vectors, fused) if flag),
    )
    if conv == "pooled" or common.stack[0] == groups:
        yield common
        return
    for position in torch.cartesian_prod(*(torch.arange(k) for k in kernel)).reshape(-1, len(kernel)).tolist():
        yield replace(
            common,
            name=f"{name}[{','.join(map(str, position))}]",
            weight=grouped[(slice(None), slice(None), slice(None), *position)],
            stack=(groups, rows // groups, columns),
            permute=(),
            kernel=tuple(position),
        )
