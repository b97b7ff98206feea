"""One kind of progress bar for the whole library; it writes to stderr and vanishes when done."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress_bar(items: Iterable[T], label: str, show: bool, total: int | None = None) -> Iterable[T]:
    """Wrap an iterable in a progress bar.

    Args:
        items: What to iterate.
        label: What is being done.
        show: Whether to show anything.
        total: Number of items, where `items` has no length.

    Returns:
        The same items.
    """
    if not show:
        return items
    from tqdm.auto import tqdm  # in a notebook without widgets it warns on import, which only a bar is worth

    return tqdm(items, desc=label, total=total, leave=False)
