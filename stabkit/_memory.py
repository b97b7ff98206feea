"""How much memory a computation may take, and how to notice that it took too much."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}
FALLBACK = 2 * 2**30  # where the system does not tell what is free
AUTOMATIC_SHARE = 0.25  # of what is free: two operators and their caller live side by side
PASS_SHARE = 0.125  # of what is free on an accelerator, for what one pass holds


def memory_budget(memory: int | str | None, *, owner: str, device: torch.device) -> int:
    """Bytes that a computation may hold.

    Args:
        memory: Bytes, or text such as "4GB" (powers of 1024); a quarter of what is free when None.
        owner: Function or class it belongs to, for messages.
        device: Whose memory.

    Returns:
        Bytes, at least 1.

    Raises:
        TypeError: If it is neither a whole number nor text.
        ValueError: If it cannot be read, or is not positive.
    """
    if memory is None:
        return max(1, int(AUTOMATIC_SHARE * free_memory(device)))
    remedy = 'Use bytes or text such as "4GB".'
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise TypeError(f"`memory` of `{owner}` must be a whole number or text; got {memory!r}. {remedy}")
    amount = float(memory) if isinstance(memory, int) else _read(memory)
    if not amount >= 1:
        raise ValueError(f"`memory` of `{owner}` must be a positive amount; got {memory!r}. {remedy}")
    return int(amount)


def pass_bytes(least: int, device: torch.device, *, wanted: int = 0) -> int:
    """Bytes that one batched pass may hold.

    Args:
        least: What is enough on a CPU, where larger blocks only leave the caches.
        device: Where it runs.
        wanted: What would be better there, if it is no more than an eighth of the memory.

    Returns:
        Either, or on an accelerator an eighth of what is free, if it is more: there few large passes are the fast ones.
    """
    if device.type == "cuda":
        return max(least, int(PASS_SHARE * free_memory(device)))
    # Of all memory, not of what is free: results are then the same to the bit from call to call.
    return max(least, int(min(wanted, PASS_SHARE * host_memory())))


def _read(text: str) -> float:
    """Bytes from text; NaN where it cannot be read."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?b?)\s*", text.lower())
    if match is None:
        return float("nan")
    number, unit = match.groups()
    return float(number) * UNITS[unit if unit in UNITS else unit + "b"]


def host_memory() -> float:
    """All of the host's memory.

    Returns:
        Bytes; 2 GB where the system does not tell.
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return FALLBACK


def free_memory(device: torch.device) -> int:
    """Bytes free on a device.

    Args:
        device: CPU or GPU.

    Returns:
        Bytes, of a GPU no more than the process's own share of its memory leaves; 2 GB where the system does not tell.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # since torch 2.8
        share = 1.0 if fraction is None else fraction(device.index)
        return max(0, min(free + reserved, int(share * total)) - allocated)
    try:
        # What a system without swap can hand out, with the page cache that it would give up.
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next((line for line in lines if line.startswith("MemAvailable:")), None)
        if available is not None:
            return 1024 * int(available.split()[1])
    except OSError:
        pass  # no Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return FALLBACK


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out.

    Args:
        error: What was raised.

    Returns:
        True for PyTorch's out-of-memory errors of every device and for Python's own.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, which the host does not wait for where that is CUDA's.

    Args:
        tensor: On any device.
        device: Where it is to be.

    Returns:
        The tensor itself if it is there, or a copy.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would be waited for
    return tensor.to(device)
