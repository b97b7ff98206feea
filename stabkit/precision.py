"""How float32 matrices are multiplied: in float32, or in TF32, which accelerators do faster with ten bits of mantissa.

PyTorch convolves in TF32 by default where the accelerator can, and multiplies matrices so where the caller has said so.
Derivatives of derivatives lose more of that than a forward pass does, so predictions decide it for themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch

PRECISIONS = ("float32", "tf32")
BACKENDS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
LEGACY = ("cuda.matmul", "cudnn")  # before torch 2.9


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Multiply float32 matrices as asked, and as before afterwards.

    Args:
        precision: "float32" or "tf32"; the latter changes nothing where the device has no TF32.

    Yields:
        Nothing.
    """
    settings = _settings(precision)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _settings(precision: str) -> list[tuple[Any, str, Any]]:
    """Where PyTorch keeps the choice, and what it is to be there."""
    if hasattr(torch.backends, "fp32_precision"):
        value = "ieee" if precision == "float32" else "tf32"
        return [(attrgetter(name)(torch.backends), "fp32_precision", value) for name in BACKENDS]
    return [(attrgetter(name)(torch.backends), "allow_tf32", precision == "tf32") for name in LEGACY]
