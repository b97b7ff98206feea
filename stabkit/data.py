"""Every way of handing over data, read as `Samples`.

A `DataLoader`, a `Dataset`, an `(x, y)` pair of tensors, a dictionary of tensors or an iterable of batches will do. Small
sets are held as stacked tensors; larger map-style data sets are read as needed.
"""

from __future__ import annotations

import contextlib
import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from stabkit._memory import free_memory, sent
from stabkit._rng import preserved_rng
from stabkit.losses import IGNORE_INDEX
from stabkit.samples import Identity, Inputs, Samples, map_tensors, tensors_of

Data = DataLoader | Dataset | tuple[Any, Any] | Mapping[str, Tensor] | Iterable[Any]

REREAD = 8  # samples read twice, to find random augmentation
IN_MEMORY_BYTES = 4 * 2**30
RESIDENT_SHARE = 0.25  # of an accelerator's free memory, that one set may take
LABEL_KEYS = ("labels", "label", "targets", "target")
EXTRA_PARTS = (
    "A sample's last part is its target and those before are the model's inputs: where rows are (x, y, index), pass "
    "[(x, y) for x, y, _ in data]."
)


def as_samples(data: Any, *, name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    """Read any accepted form of data as `Samples`.

    The global random state is left as it was, also where a shuffling loader has to be iterated.

    Args:
        data: A DataLoader, map-style or iterable Dataset, (x, y) tensors, dictionary of tensors, or iterable of batches.
        name: "forget", "retain" or "test".
        device: Where batches go.
        dtype: Floating dtype of batches.

    Returns:
        The samples.

    Raises:
        TypeError: If the data has none of the accepted forms, or holds what is no number.
        ValueError: If the set is empty or on the meta device, or its parts differ in length or its samples in shape.
    """
    with preserved_rng():
        samples = _read(data, name, device, dtype)
    if samples.size == 0:
        spent = isinstance(data, Iterator)
        remedy = (
            "An iterator is used up by whoever reads it first: pass a list." if spent else "Check how it was selected."
        )
        raise ValueError(f"`{name}` must hold at least one sample; got an empty set. {remedy}")
    return samples


def sample_count(data: Any, *, name: str) -> int:
    """How many samples there are, none of them read where the data's length tells.

    Args:
        data: As `as_samples` takes them; rows of any kind where they come one by one, as no row is looked at.
        name: What the caller's argument is called.

    Returns:
        The number that `as_samples` would find.

    Raises:
        TypeError: If the data have to be read, and have none of the accepted forms.
        ValueError: If there are none, or they have to be read and do not fit together.
    """
    if isinstance(data, DataLoader) and _draws_all(data):
        data = data.dataset
    if hasattr(data, "__len__") and not isinstance(data, DataLoader | IterableDataset) and _is_rows(data) and len(data):
        return len(data)
    return as_samples(data, name=name, device=torch.device("cpu"), dtype=torch.get_default_dtype()).size


def _read(data: Any, name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    if is_array(data):
        kind = type(data).__name__.lower()
        raise TypeError(f"`{name}` must come with targets; got a single {kind}. Pass a pair (x, y).")
    if isinstance(data, DataLoader):
        return _read_loader(data, name, device, dtype)
    if isinstance(data, IterableDataset):
        loader = DataLoader(data, batch_size=256, collate_fn=lambda rows: _collate(rows, name))
        return _read_batches(loader, name, device, dtype)
    if isinstance(data, Mapping) or is_pair(data):
        return _in_memory(*_split(data, name), name=name, device=device, dtype=dtype)
    if _is_rows(data):
        return _read_dataset(data, default_collate, name, device, dtype)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        return _read_batches(data, name, device, dtype)
    raise TypeError(
        f"`{name}` must be a DataLoader, a Dataset, an (x, y) pair of tensors, a dict of tensors or an iterable of "
        f"batches; got {type(data).__name__}."
    )


def _is_rows(data: Any) -> bool:
    """Whether it gives single samples by number: a map-style Dataset, or a sequence of rows."""
    if isinstance(data, Dataset):
        return True
    if isinstance(data, str | bytes | Mapping) or is_array(data) or is_pair(data):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not _is_batches(data)


def is_pair(data: Any) -> bool:
    """Whether these are (inputs, targets) of a whole set; a list is an iterable of batches.

    Args:
        data: What the caller passed.

    Returns:
        Whether it is a 2-tuple of what holds numbers.
    """
    if not isinstance(data, tuple) or len(data) != 2:
        return False
    inputs, targets = data
    if isinstance(inputs, list) and is_array(targets) and not any(is_array(part) for part in inputs[:1]):
        return True  # rows of numbers
    return is_array(inputs) or (isinstance(inputs, tuple | Mapping) and is_array(targets))


def is_array(data: Any) -> bool:
    """Whether it is a tensor, or what NumPy can read: its own arrays and a table's columns.

    Args:
        data: What the caller passed.

    Returns:
        Whether it is.
    """
    return isinstance(data, Tensor) or hasattr(data, "__array__")


def _is_batches(data: Any) -> bool:
    """Whether a sequence's items are batches rather than single samples: their targets have a leading axis."""
    if not isinstance(data, Sequence) or len(data) == 0:
        return isinstance(data, Sequence)
    first = data[0]
    if isinstance(first, Mapping):
        return all(_axes(value) >= (1 if key in LABEL_KEYS else 2) for key, value in first.items())
    if not isinstance(first, tuple | list) or len(first) < 2:
        return False
    return isinstance(first[-1], Tensor | np.ndarray) and first[-1].ndim >= 1


def _axes(value: Any) -> int:
    """Axes of an array or of nested lists."""
    if isinstance(value, list):
        return 1 + (_axes(value[0]) if value else 0)
    return getattr(value, "ndim", 0)


def _split(batch: Any, name: str) -> tuple[Any, Tensor]:
    """Inputs and targets of one batch in any of its forms."""
    targets_of, inputs_of = f"targets of `{name}`", f"inputs of `{name}`"
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                inputs = {k: _tensor(v, f"column {k!r} of `{name}`") for k, v in batch.items() if k != key}
                return inputs, _tensor(batch[key], targets_of, _several(batch[key]))
        raise TypeError(
            f"`{name}` holds dict batches without targets: expected a key among {', '.join(LABEL_KEYS)}; got "
            f"{', '.join(map(str, batch))}."
        )
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        *leading, last = batch
        targets = _tensor(last, targets_of, EXTRA_PARTS if len(leading) > 1 else _several(last))
        first = leading[0] if len(leading) == 1 else tuple(leading)
        if isinstance(first, Mapping):
            return {key: _tensor(value, f"column {key!r} of `{name}`") for key, value in first.items()}, targets
        if isinstance(first, list) and first and not any(is_array(part) for part in first):
            return _tensor(first, inputs_of), targets
        if isinstance(first, tuple | list):
            return tuple(_tensor(value, inputs_of) for value in first), targets
        return _tensor(first, inputs_of), targets
    raise TypeError(
        f"`{name}` must give (inputs, targets) pairs or dicts with labels; got a batch of type {type(batch).__name__}. "
        "Pass two tensors as a tuple (x, y), and several inputs as ((x, z), y)."
    )


def _tensor(values: Any, what: str, remedy: str = "") -> Tensor:
    """One part of a batch as a tensor."""
    if not isinstance(values, Tensor | np.ndarray) and hasattr(values, "__array__"):
        values = np.array(values)  # a table's own array may not be writable
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refusal(values, what, error, remedy) from error
    if found.is_meta:
        raise ValueError(
            f"{what} must be numbers; got a tensor on the meta device, which has a shape {tuple(found.shape)} alone. "
            "Load the data onto the CPU or an accelerator."
        )
    return found


def _several(targets: Any) -> str:
    """What to do about targets of several parts; nothing to say of one."""
    parts = list(targets.values()) if isinstance(targets, Mapping) else targets
    several = isinstance(parts, tuple | list) and any(isinstance(part, Tensor | np.ndarray) for part in parts)
    return (
        "Put several targets side by side in one tensor, and take them apart in a loss of your own." if several else ""
    )


def _collate(rows: list[Any], name: str) -> Any:
    """Rows as one batch; a list of numbers in a row is a vector, where PyTorch's own collation sees so many inputs."""
    try:
        return default_collate([_vectors(row) for row in rows])
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise _refusal(rows, f"samples of `{name}`", error) from error


def _vectors(row: Any) -> Any:
    """A row with its lists of numbers as tensors."""

    def vector(part: Any) -> Any:
        is_numbers = isinstance(part, list) and all(isinstance(leaf, numbers.Number) for leaf in _leaves(part))
        return torch.as_tensor(part) if is_numbers else part

    if isinstance(row, Mapping):
        return {key: vector(part) for key, part in row.items()}
    return tuple(map(vector, row)) if isinstance(row, tuple | list) else row


def _leaves(tree: Any) -> Iterator[Any]:
    """What nested lists, dictionaries and arrays of objects hold."""
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "OSU":
        tree = tree.tolist()
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, tuple | list):
        for part in tree:
            yield from _leaves(part)
    else:
        yield tree


def _refusal(values: Any, what: str, error: Exception, remedy: str = "") -> TypeError | ValueError:
    """Why these make no tensor: something in them is no number, or they differ in shape."""
    plain = numbers.Number | np.generic | np.ndarray | Tensor
    odd = [leaf for leaf in _leaves(values) if isinstance(leaf, str) or not isinstance(leaf, plain)]
    if not odd:
        return ValueError(
            f"{what} must be numbers of one type and one shape; got {type(error).__name__}: {error}. "
            + (remedy or "Pad or crop them to one size (for text, pad to the longest and pass an attention mask).")
        )
    if odd[0] is None:
        remedy = remedy or "Leave out the column that is empty, or fill in what is missing."
    elif isinstance(odd[0], str):
        remedy = (
            remedy or "Encode text as numbers first: classes as 0 to C-1, words as token ids; leave out other columns."
        )
    else:
        remedy = remedy or "Convert them to tensors first."
    shown = odd[0] if odd[0] is None or isinstance(odd[0], str) else type(odd[0])
    return TypeError(f"{what} must be numbers; got {reprlib.repr(shown)}. {remedy}")


def _in_memory(
    inputs: Any,
    targets: Tensor,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    identity: Identity | None = None,
) -> Samples:
    lengths = {t.shape[0] if t.dim() else 0 for t in (*tensors_of(inputs), targets)}
    if len(lengths) != 1:
        raise ValueError(
            f"`{name}` must have as many inputs as targets; got leading sizes {sorted(lengths)}. One "
            "sample is x[:1], y[:1], with its axis."
        )
    size = lengths.pop()
    held: list[tuple[Any, Tensor]] = []  # from the first fetch on

    def fetch(indices: Tensor) -> tuple[Inputs, Tensor]:
        if not held:
            held.append(_resident((inputs, targets), device))
        x, y = held[0]
        rows: dict[torch.device, Tensor] = {}  # a transfer for each device, and no more

        def chosen(t: Tensor) -> Tensor:
            if t.device not in rows:
                rows[t.device] = sent(indices, t.device)
            return t[rows[t.device]]

        return map_tensors(chosen, x), chosen(y)

    if identity is None:
        identity = _addresses(inputs, np.arange(size))
    return Samples(name, size, fetch, identity, device, dtype)


def _resident(data: tuple[Any, Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """Data on an accelerator where there is room for them, so that no batch has to travel; as they are elsewhere."""
    if device.type == "cpu":
        return data
    away = sum(t.numel() * t.element_size() for t in tensors_of(data) if t.device != device)
    if away > RESIDENT_SHARE * free_memory(device):
        return data
    return map_tensors(lambda t: t.to(device), data[0]), data[1].to(device)


def _addresses(inputs: Any, indices: np.ndarray) -> Identity:
    """Where in memory the chosen rows of the first input tensor begin."""
    first = next(tensors_of(inputs), None)
    if first is None or first.numel() == 0 or first.stride(0) == 0:  # an expanded tensor's rows tell nothing
        return {}
    return {first.device: first.data_ptr() + indices * first.stride(0) * first.element_size()}


def _root_indices(dataset: Any, indices: np.ndarray) -> Identity:
    """Follow nested Subset, ConcatDataset and TensorDataset down to the underlying storage and its row numbers."""
    if isinstance(dataset, Subset):
        return _root_indices(dataset.dataset, np.asarray(dataset.indices, dtype=np.int64)[indices])
    if isinstance(dataset, ConcatDataset):
        found: Identity = {}
        start = 0
        for part, stop in zip(dataset.datasets, dataset.cumulative_sizes, strict=True):
            inside = indices[(indices >= start) & (indices < stop)] - start
            for key, rows in _root_indices(part, inside).items():
                found[key] = np.concatenate([found[key], rows]) if key in found else rows
            start = stop
        return found
    if isinstance(dataset, TensorDataset):
        return _addresses(dataset.tensors, indices)
    return {id(dataset): indices}


@contextlib.contextmanager
def _kept(generator: torch.Generator | None) -> Iterator[None]:
    """Give the caller's generator back as it was."""
    if generator is None:
        yield
        return
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)


def _draws_all(loader: DataLoader) -> bool:
    """Whether a loader over a map-style data set takes all of it, in order or shuffled, with PyTorch's own batches."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None or loader.batch_size is None:
        return False
    return isinstance(loader.sampler, SequentialSampler | RandomSampler)


def _read_loader(loader: DataLoader, name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None:
        return _read_batches(loader, name, device, dtype)
    if _draws_all(loader):
        return _read_dataset(dataset, loader.collate_fn, name, device, dtype)
    if loader.batch_size is None:  # the caller's own batch sampler
        chosen = sorted({int(index) for batch in loader.batch_sampler for index in batch})
    else:
        with _kept(getattr(loader.sampler, "generator", None)):
            drawn = [int(index) for index in loader.sampler]
        chosen = sorted(set(drawn))
        if len(chosen) < len(drawn):
            raise ValueError(
                f"the sampler of `{name}` must name every sample once; got {type(loader.sampler).__name__}, which drew "
                f"{len(drawn)} and {len(chosen)} different ones. Pass the data set itself: how batches are drawn is said by "
                "`sampling`."
            )
    return _read_dataset(Subset(dataset, chosen), loader.collate_fn, name, device, dtype)


def _read_dataset(
    dataset: Any, collate: Callable[[list[Any]], Any], name: str, device: torch.device, dtype: torch.dtype
) -> Samples:
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`{name}` must have a length; got {type(dataset).__name__}, which has none. Give the data set a `__len__`, or "
            "pass a list of its batches."
        )
    size = len(dataset)
    identity = _root_indices(dataset, np.arange(size))
    if size == 0:
        return Samples(name, 0, lambda _: (torch.empty(0), torch.empty(0)), identity, device, dtype)

    def fetch(indices: Tensor) -> tuple[Inputs, Tensor]:
        rows = [dataset[i] for i in indices.tolist()]
        return _split(_collate(rows, name) if collate is default_collate else collate(rows), name)

    inputs, targets = fetch(torch.zeros(1, dtype=torch.int64))
    for index in torch.linspace(0, size - 1, min(size, REREAD)).long().unique():
        once, again = (fetch(index.reshape(1))[0] for _ in range(2))
        for first, second in zip(tensors_of(once), tensors_of(again), strict=True):
            if first.shape != second.shape or not torch.equal(first.nan_to_num(), second.nan_to_num()):
                raise ValueError(
                    f"`{name}` must give the same sample each time; sample {int(index)} read twice differs. Random "
                    "augmentation makes the loss surface random: pass the set without it."
                )
    one = sum(t.numel() * t.element_size() for t in (*tensors_of(inputs), targets))
    if one * size > IN_MEMORY_BYTES:
        return Samples(name, size, fetch, identity, device, dtype)
    parts = [fetch(chunk) for chunk in torch.arange(size).split(1024)]
    stacked = _concatenate(parts, name)
    return _in_memory(*stacked, name=name, device=device, dtype=dtype, identity=identity)


def _read_batches(batches: Iterable[Any], name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    parts = [_split(batch, name) for batch in batches]
    if not parts:
        return Samples(name, 0, lambda _: (torch.empty(0), torch.empty(0)), {}, device, dtype)
    if any(t.dim() == 0 for inputs, targets in parts for t in (*tensors_of(inputs), targets)):
        raise ValueError(
            f"`{name}` must give batches, with the samples along the first axis; got single samples. Pass a Dataset, or "
            "a DataLoader with a batch size."
        )
    return _in_memory(*_concatenate(parts, name), name=name, device=device, dtype=dtype)


def _padded(parts: list[tuple[dict[str, Tensor], Tensor]]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Texts that a collator padded batch by batch, padded at the right to the longest of all.

    Args:
        parts: Inputs and targets of every batch.

    Returns:
        The same, every column of the mask's length filled with what stands under padding somewhere, integer targets with
        -100. As it is where no mask says what is padding, none is shown, or some is at the left, which moves positions.
    """
    masks = [inputs.get("attention_mask") for inputs, _ in parts]
    if not all(isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask[:, :1].all()) for mask in masks):
        return parts
    padding = [mask == 0 for mask in masks if mask is not None]
    shown = next((k for k, holes in enumerate(padding) if bool(holes.any())), None)
    if shown is None:
        return parts
    longest = max(holes.shape[1] for holes in padding)

    def filled(columns: list[Tensor], fill: Tensor | int) -> list[Tensor]:
        return [
            torch.cat([c, torch.as_tensor(fill).to(c).expand(c.shape[0], longest - c.shape[1], *c.shape[2:])], 1)
            for c in columns
        ]

    def texts(columns: list[Tensor]) -> bool:
        return all(c.dim() > 1 and c.shape[1] == holes.shape[1] for c, holes in zip(columns, padding, strict=True))

    every = {key: [inputs[key] for inputs, _ in parts] for key in parts[0][0]}
    targets = [target for _, target in parts]
    for key, columns in every.items():
        if texts(columns):
            every[key] = filled(columns, columns[shown][padding[shown]][0])
    if texts(targets) and not targets[0].is_floating_point():
        targets = filled(targets, IGNORE_INDEX)
    return [({key: every[key][k] for key in every}, target) for k, target in enumerate(targets)]


def _concatenate(parts: list[tuple[Any, Tensor]], name: str) -> tuple[Any, Tensor]:
    if len(parts) == 1:
        return parts[0]
    kinds = [sorted(inputs) if isinstance(inputs, dict) else len(list(tensors_of(inputs))) for inputs, _ in parts]
    odd = next((kind for kind in kinds if kind != kinds[0]), None)
    if odd is not None:
        raise ValueError(
            f"`{name}` must have the same inputs in every batch; got {kinds[0]} and {odd}. Fill in the rest."
        )
    if isinstance(parts[0][0], dict):  # in one order
        parts = _padded([({key: inputs[key] for key in parts[0][0]}, targets) for inputs, targets in parts])
    columns = list(zip(*([*tensors_of(inputs), targets] for inputs, targets in parts), strict=True))
    for tensors in columns:
        shapes = sorted({tuple(t.shape[1:]) for t in tensors})
        if len(shapes) > 1:
            raise ValueError(
                f"`{name}` must have samples of one shape; got {shapes[:4]}. Pad or crop them to one size (texts are "
                "padded here where an 'attention_mask' shows with what, at the right)."
            )
    *inputs, targets = map(torch.cat, columns)
    stacked = iter(inputs)
    return map_tensors(lambda _: next(stacked), parts[0][0]), targets
