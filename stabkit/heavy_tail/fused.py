"""How the rows of a fused query-key-value weight are laid out, as far as its name and the modules around it tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

# Layers inside others of which they hold the weight: a fused layer's name is the outer one's.
INNER = re.compile(r"(\.(base_layer|linear|conv|convolution))+$")
LOOKS_FUSED = re.compile(
    r"(^|_)(c_attn|w?q?kvz?|query_key_value|queries_keys_values|key_value|w_pack|gate_up)(_|$)", re.IGNORECASE
)
QKV = re.compile(r"c_attn|qkv|query_key_value|queries_keys_values|w_pack", re.IGNORECASE)
# These are plain layers as often as not: only so many outputs say that there are several.
SOMETIMES_FUSED = ("in_proj", "att_proj")
# GPT-2, timm, torchvision, ModernBERT, MPT, DBRX, LayoutLMv2: all queries, then all keys, then all values.
CONTIGUOUS = ("c_attn", "qkv", "Wqkv", "to_qkv", "qkv_linear")
HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_query_groups")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size")
WIDTHS = ("dim_out", "hidden_size_output", "all_head_size", "inner_dim", "attn_dim")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Order of a fused axis: the q, k and v of the first group, those of the second, ...

    Attributes:
        sizes: Rows of q, k and v in each group.
        groups: 1 for three contiguous blocks, else the heads, or the heads of keys and values.
    """

    sizes: tuple[int, int, int]
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What is stated nearest to a layer, each None where it is not.

    Attributes:
        queries: Heads of the queries.
        keys: Heads of the keys and of the values.
        width: Numbers in a head.
    """

    queries: int | None
    keys: int | None
    width: int | None


def fused_name(name: str) -> str:
    """A module's name without that of a layer inside, as adapters and layers with a normalisation put there.

    Args:
        name: Its full name.

    Returns:
        The name to judge it by.
    """
    return INNER.sub("", name)


def layout_of(name: str, holders: Sequence[nn.Module], outputs: int, inputs: int) -> Layout | str | None:
    """Where the queries, keys and values of a layer are.

    Args:
        name: The layer's full name, by `fused_name`.
        holders: The modules around it, the nearest first.
        outputs: Rows of the layer.
        inputs: Numbers that it reads.

    Returns:
        The layout; why it cannot be told, of a layer that seems fused; None for any other layer.
    """
    last = name.rpartition(".")[2]
    if last in SOMETIMES_FUSED:
        if outputs < 2 * inputs:
            return None
    elif not LOOKS_FUSED.search(last):
        return None
    found = _rule(last, holders, _stated(holders), outputs, inputs)
    if isinstance(found, Layout):
        if min(found.sizes) > 0 and found.groups * sum(found.sizes) == outputs:
            return found
        found = f"{outputs} outputs are not what its heads make"
    return f"fused {'q,k,v' if QKV.search(last) else 'weight'} not separable: {found}"


def not_split(name: str, outputs: int, inputs: int) -> str:
    """Why a layer that is never split seems fused.

    Args:
        name: The layer's full name, by `fused_name`.
        outputs: Rows of the layer.
        inputs: Numbers that it reads.

    Returns:
        The reason; empty if it does not.
    """
    found = layout_of(name, (), outputs, inputs)
    return "" if found is None else f"fused weight not separable: {name.rpartition('.')[2]!r} is a convolution"


def _rule(last: str, holders: Sequence[nn.Module], heads: Heads, outputs: int, inputs: int) -> Layout | str:
    holder = holders[0] if holders else None
    kind = type(holder).__name__
    if last == "in_proj":
        if isinstance(holder, nn.MultiheadAttention):
            return _contiguous(holder, heads, outputs, inputs)
        if kind == "DisentangledSelfAttention":  # DeBERTa's
            return _by_heads(holder, heads, outputs, inputs)
    if last == "query_key_value":  # Megatron's order: q, k, v of head 0, q, k, v of head 1, ...
        return _megatron(holder, heads, outputs, inputs)
    if last == "qkv_proj":
        if kind.startswith(("Phi3", "Phi4")):
            return _contiguous(holder, heads, outputs, inputs, stated=True)
        if kind.startswith("MiniMax"):
            return _by_heads(holder, heads, outputs, inputs)
        q, kv = (_number(holder, (name,)) for name in ("q_size", "kv_size"))
        if q and kv:
            return Layout(sizes=(q, kv, kv))
    if last in CONTIGUOUS:
        if last == "c_attn" and getattr(holder, "multi_query", None) is False:  # GPTBigCode's
            return _by_heads(holder, heads, outputs, inputs)
        key = _number(holder, ("key_dim",))
        if key and heads.queries:  # LeViT's and TinyViT's: values have a width of their own
            return Layout(sizes=(key, key, outputs // heads.queries - 2 * key), groups=heads.queries)
        if getattr(holder, "head_first", False) is True:  # CoAtNet's and MaxViT's, of timm
            return _by_heads(holder, heads, outputs, inputs)
        return _contiguous(holder, heads, outputs, inputs)
    return f"the order of {last!r}" + (f" in a {kind}" if holder is not None else "") + " is not known"


def _contiguous(
    holder: nn.Module | None, heads: Heads, outputs: int, inputs: int, *, stated: bool = False
) -> Layout | str:
    """All queries, all keys, all values; fewer keys and values than queries where heads are grouped."""
    keys = 1 if getattr(holder, "multi_query", False) is True else heads.keys
    if heads.queries is not None and keys is not None and (stated or keys != heads.queries):
        return _grouped(heads.queries, keys, heads.width, outputs)
    if stated:
        return "number of heads unknown"
    return _thirds(holder, heads, outputs, inputs)


def _grouped(queries: int, keys: int, width: int | None, outputs: int) -> Layout | str:
    """Contiguous blocks in proportion to the heads."""
    share, left = divmod(outputs, queries + 2 * keys)
    if left or width not in (None, share):
        return f"{outputs} outputs are not what {queries} heads with {keys} of keys and values make"
    return Layout(sizes=(queries * share, keys * share, keys * share))


def _thirds(holder: nn.Module | None, heads: Heads, outputs: int, inputs: int) -> Layout | str:
    """Three blocks of one size, which the inputs or an attribute have to confirm."""
    third, left = divmod(outputs, 3)
    confirmed = [inputs, *(_number(holder, (name,)) for name in WIDTHS)]
    if heads.queries is not None and heads.width is not None:
        confirmed.append(heads.queries * heads.width)
    if left or third not in confirmed:
        return f"{outputs} outputs for {inputs} inputs, and nothing says how many are queries"
    return Layout(sizes=(third, third, third))


def _by_heads(holder: nn.Module | None, heads: Heads, outputs: int, inputs: int) -> Layout | str:
    """The q, k, v of one head after those of another."""
    if heads.queries is None:
        return "number of heads unknown"
    thirds = _thirds(holder, heads, outputs, inputs)
    if isinstance(thirds, str):
        return thirds
    if thirds.sizes[0] % heads.queries:
        return f"{heads.queries} heads do not divide {thirds.sizes[0]}"
    width = thirds.sizes[0] // heads.queries
    return Layout(sizes=(width, width, width), groups=heads.queries)


def _megatron(holder: nn.Module | None, heads: Heads, outputs: int, inputs: int) -> Layout | str:
    if heads.queries is None:
        return "number of heads unknown"
    if getattr(holder, "new_decoder_architecture", False) is True and heads.keys:  # Falcon's: by heads of keys
        share, left = divmod(outputs, heads.queries + 2 * heads.keys)
        if left or heads.queries % heads.keys:
            return f"{outputs} outputs are not what {heads.queries} heads with {heads.keys} of keys and values make"
        return Layout(sizes=(heads.queries // heads.keys * share, share, share), groups=heads.keys)
    if getattr(holder, "multi_query", False) is True:
        return _grouped(heads.queries, 1, heads.width, outputs)
    if heads.keys not in (None, heads.queries):
        return f"the order of {heads.queries} heads with {heads.keys} of keys and values is not known"
    return _by_heads(holder, heads, outputs, inputs)


def _stated(holders: Sequence[nn.Module]) -> Heads:
    """Heads as the nearest module around, or its configuration, states them, and what else is stated up to there."""
    keys = width = None
    for holder in holders:
        sources = holder, getattr(holder, "config", None)
        found = {names: _first(sources, names) for names in (HEADS, KEY_HEADS, HEAD_WIDTHS)}
        keys, width = keys or found[KEY_HEADS], width or found[HEAD_WIDTHS]
        if found[HEADS]:
            return Heads(queries=found[HEADS], keys=keys, width=width)
    return Heads(queries=None, keys=keys, width=width)


def _first(sources: Sequence[object], names: Sequence[str]) -> int | None:
    return next((found for source in sources if (found := _number(source, names))), None)


def _number(source: object, names: Sequence[str]) -> int | None:
    """The first of a module's attributes that is a whole number above 0."""
    for name in names:
        value = getattr(source, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
