"""How float32 matrices are multiplied: in float32, or in TF32, which accelerators do faster with ten bits of mantissa.

PyTorch convolves in TF32 by default where the accelerator can, and multiplies matrices so where the caller has said so.
Derivatives of derivatives lose more of that than a forward pass does, so predictions decide it for themselves, and curvature
that is asked for by itself is in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import torch

PRECISIONS = ("float32", "tf32")
BACKENDS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")

_decided: ContextVar[bool] = ContextVar("decided", default=False)  # whether `arithmetic` is around what is computed


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Multiply in float32 unless `arithmetic` has been told otherwise around this.

    Yields:
        Nothing.
    """
    if _decided.get():
        yield
        return
    with arithmetic("float32"):
        yield


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Multiply float32 matrices as asked, and as before afterwards.

    Args:
        precision: "float32" or "tf32"; the latter changes nothing where the device has no TF32.

    Yields:
        Nothing.
    """
    older, newer, token = _older(), _newer(), _decided.set(True)
    whole = precision == "float32"
    try:
        _set(("highest" if whole else "high", not whole), ["ieee" if whole else "tf32"] * len(newer))
        yield
    finally:
        _set(older, newer)
        _decided.reset(token)


def _older() -> tuple[str, bool] | None:
    """What the interface before torch 2.9 says; None where the caller has used the newer one and it refuses to."""
    try:
        return torch.get_float32_matmul_precision(), bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return None


def _newer() -> list[str]:
    """What the interface since torch 2.9 says of every backend; nothing before."""
    return [backend.fp32_precision for backend in _backends()]


def _set(older: tuple[str, bool] | None, newer: list[str]) -> None:
    """Set both, the older one first: it sets the newer one too, and PyTorch wants them to agree."""
    if older is not None:
        torch.set_float32_matmul_precision(older[0])
        torch.backends.cudnn.allow_tf32 = older[1]
    for backend, value in zip(_backends(), newer, strict=True):
        backend.fp32_precision = value


def _backends() -> list[Any]:
    """Where the newer interface keeps the choice."""
    known = hasattr(torch.backends, "fp32_precision")
    return [attrgetter(name)(torch.backends) for name in BACKENDS] if known else []
