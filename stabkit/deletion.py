"""Which samples to forget: at random, by class, cluster or person, by influence, or because they were corrupted.

Data are an (x, y) pair of tensors, a torch Dataset or any other form that `UnlearningProblem` reads. Where labels are all
that matters, those will do, as a tensor, an array or a list; where the number of rows is, that will, and no row is read.
Nothing alters the caller's tensors, model or random state.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from stabkit._errors import UntrainedModelWarning
from stabkit._validate import check_int, check_real, check_seed
from stabkit.curvature.gradients import gradient_blocks
from stabkit.data import Data, as_samples, is_array, is_pair, sample_count
from stabkit.datasets import Deletion
from stabkit.losses import Loss, PerSampleLoss
from stabkit.problem import UnlearningProblem
from stabkit.samples import Inputs, map_tensors

RESTARTS = 10  # of k-means

Labels = Tensor | np.ndarray | Sequence[int]

__all__ = [
    "CorruptedDeletion",
    "Deletion",
    "forget_people",
    "gradient_norms",
    "high_influence",
    "mislabelled",
    "one_class",
    "poisoned",
    "random_fraction",
    "subclass",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class CorruptedDeletion(Deletion):
    """A deletion of rows that were corrupted on purpose, with the data to train on.

    Attributes:
        x: All inputs, those of the rows to forget changed; None where only labels are.
        y: All labels, those of the rows to forget changed.
    """

    x: Tensor | None
    y: Tensor

    def __str__(self) -> str:
        changed = "labels" if self.x is None else "inputs and labels"
        return f"{super().__str__()}; the {changed} to train on are changed in the rows to forget"


def random_fraction(data: int | Labels | Data, fraction: float, *, seed: int = 0) -> Deletion:
    """Forget a uniformly random part of the rows.

    Args:
        data: The data, their labels, or their number of rows. Of a data set with a length that alone is asked for: rows may
            be of any kind.
        fraction: Share to forget, in (0, 1), rounded to whole rows.
        seed: Seed of the choice.

    Returns:
        The deletion.
    """
    n = _size(data, "random_fraction")
    check_seed(seed, owner="random_fraction")
    count = _count(n, fraction, "random_fraction")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return _deletion(f"random {_percent(fraction)}", order[:count], n, seed)


def one_class(data: Labels | Data, label: int) -> Deletion:
    """Forget every row of one class.

    Args:
        data: The data, or their labels. Where every sample comes with its number too, pass the labels.
        label: The class, any whole number that occurs.

    Returns:
        The deletion.
    """
    labels = _labels(data, "one_class")
    return _deletion(f"class {label}", _rows_of(labels, label, "one_class"), len(labels), None)


def subclass(
    data: Data,
    label: int,
    *,
    clusters: int = 4,
    cluster: int = 0,
    features: Tensor | np.ndarray | None = None,
    seed: int = 0,
) -> Deletion:
    """Forget one cluster within a class, found by k-means.

    Args:
        data: The data.
        label: The class.
        clusters: Clusters k to divide it into.
        cluster: Which of them, the largest being 0.
        features: What to cluster by, shape (n, ...), such as a network's last hidden layer; the inputs when None.
        seed: Seed of k-means.

    Returns:
        The deletion.

    Raises:
        TypeError: If features are no numbers.
        ValueError: If the class has fewer different rows than clusters, or features do not match the data or are not finite.
    """
    inputs, labels = _tensors(data, "subclass")
    rows = _rows_of(labels, label, "subclass", whole=True)
    check_seed(seed, owner="subclass")
    check_int(clusters, name="clusters", owner="subclass", low=1)
    check_int(cluster, name="cluster", owner="subclass", low=0, high=clusters - 1)
    space = inputs if features is None else _array(features, "features", "subclass", "features", "Convert them first.")
    if space.dim() == 0 or len(space) != len(labels):
        got = len(space) if space.dim() else "a single number"
        raise ValueError(f"`features` of `subclass` must have one row a sample; got {got} for {len(labels)}.")
    chosen = space[rows.to(space.device)].reshape(len(rows), -1)
    finite = chosen.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"`{'data' if features is None else 'features'}` of `subclass` must be finite numbers to cluster by; got "
            f"{int((~finite).sum())} rows of class {label} with NaN or infinity. Leave them out, or fill in what is missing."
        )
    points = chosen.double().cpu().numpy()
    different = len(np.unique(points, axis=0))
    if different < clusters:
        raise ValueError(
            f"`clusters` of `subclass` must be at most the number of different rows of class {label}, {different}; got "
            f"{clusters}. Ask for fewer."
        )
    member = torch.from_numpy(KMeans(clusters, n_init=RESTARTS, random_state=seed % 2**32).fit_predict(points)).long()
    wanted = member.bincount(minlength=clusters).argsort(descending=True, stable=True)[cluster]
    return _deletion(f"subclass {cluster} of class {label}", rows[member == wanted], len(labels), seed)


def forget_people(person: Labels, fraction: float, *, seed: int = 0) -> Deletion:
    """Forget every row about a uniformly random part of the people, as whole people and not single facts ask to be.

    Args:
        person: Whom each row is about, such as `ProfileSplit.person_train`; integers, shape (n,).
        fraction: Share of the people to forget, in (0, 1), rounded to whole people.
        seed: Seed of the choice.

    Returns:
        The deletion.
    """
    labels = _labels(person, "forget_people")
    check_seed(seed, owner="forget_people")
    _check_one_each(labels, "forget_people")
    people = labels.unique()
    count = _count(len(people), fraction, "forget_people", what="people")
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed))
    chosen = people[order[:count].to(people.device)]
    return _deletion(f"people {_percent(fraction)}", torch.isin(labels, chosen).nonzero().flatten(), len(labels), seed)


def gradient_norms(model: nn.Module, data: Data, *, loss: str | PerSampleLoss | Loss = "cross_entropy") -> Tensor:
    """‖g_i‖, the norm of every sample's gradient at the model's parameters.

    Args:
        model: The trained network; read in eval mode.
        data: At least two samples.
        loss: As in `UnlearningProblem`.

    Returns:
        Shape (n,), float64, on the CPU. Cost: one gradient a sample.

    Raises:
        ValueError: If there are fewer than two samples.
    """
    inputs, targets = _read(data)
    if len(targets) < 2:
        raise ValueError(f"`data` of `gradient_norms` must hold at least 2 samples; got {len(targets)}.")
    first = map_tensors(lambda t: t[:1], inputs), targets[:1]
    rest = map_tensors(lambda t: t[1:], inputs), targets[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedModelWarning)  # it speaks of runs, and there is none
        problem = UnlearningProblem(model, first, rest, loss=loss)
    norms = [
        sum(g.flatten(1).double().square().sum(1) for g in block.values())
        for part in (problem.forget, problem.retain)
        for block in gradient_blocks(problem, part)
    ]
    return torch.cat(norms).sqrt().cpu()  # type: ignore[arg-type]


def high_influence(
    model: nn.Module, data: Data, fraction: float, *, loss: str | PerSampleLoss | Loss = "cross_entropy"
) -> Deletion:
    """Forget the samples with the largest gradients under a model: those whose ascent pulls hardest, an adversary's choice.

    The norm ‖g_i‖ is the influence of a sample on its own loss with the identity for the inverse Hessian; unlike that
    inverse it needs no damping to choose.

    Args:
        model: The trained network; read in eval mode.
        data: The data.
        fraction: Share to forget, in (0, 1), rounded to whole rows.
        loss: As in `UnlearningProblem`.

    Returns:
        The deletion; nothing is drawn, and ties go to the earlier row. Cost: one gradient a sample.

    References:
        Koh & Liang, "Understanding black-box predictions via influence functions", ICML (2017).
    """
    n = _size(data, "high_influence")
    count = _count(n, fraction, "high_influence")
    order = gradient_norms(model, data, loss=loss).argsort(descending=True, stable=True)
    return _deletion(f"high influence {_percent(fraction)}", order[:count], n, None)


def mislabelled(data: Labels | Data, fraction: float, *, seed: int = 0) -> CorruptedDeletion:
    """Give a random part of the rows a wrong label, uniform among the other classes, and forget them.

    Args:
        data: The data, or their labels, integers of one a row.
        fraction: Share to mislabel, in (0, 1), rounded to whole rows.
        seed: Seed of rows and labels.

    Returns:
        The deletion, with all labels, the wrong ones among them; train on these.

    Raises:
        ValueError: If there is only one class.
    """
    labels = _labels(data, "mislabelled")
    check_seed(seed, owner="mislabelled")
    _check_one_each(labels, "mislabelled")
    count = _count(len(labels), fraction, "mislabelled")
    classes, place = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"`data` of `mislabelled` must have at least two classes; got {classes.tolist()}.")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator)[:count].to(labels.device)
    shift = torch.randint(1, len(classes), (count,), generator=generator).to(labels.device)
    changed = labels.clone()
    changed[rows] = classes[(place[rows] + shift) % len(classes)]
    chosen = _deletion(f"mislabelled {_percent(fraction)}", rows, len(labels), seed)
    return CorruptedDeletion(**vars(chosen), x=None, y=changed)


def poisoned(
    data: Data,
    fraction: float,
    *,
    target: int,
    trigger: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> CorruptedDeletion:
    """Put a trigger into a random part of the rows of other classes, label them `target`, and forget them: a backdoor.

    Args:
        data: The data, inputs a tensor.
        fraction: Share of all rows to poison, in (0, 1), rounded to whole rows.
        target: The label the trigger is to stand for, one that occurs.
        trigger: From inputs (m, ...) to triggered ones of the same shape. When None, images get a square of a quarter of
            their side in the last corner, rows and sequences a last number, of the largest value in the data.
        seed: Seed of the rows.

    Returns:
        The deletion, with all inputs and labels, the poisoned among them; train on these.

    Raises:
        ValueError: If other classes have too few rows, or the trigger changes the shape.

    References:
        Gu, Dolan-Gavitt & Garg, "BadNets", arXiv 1708.06733 (2017).
    """
    inputs, labels = _tensors(data, "poisoned")
    check_seed(seed, owner="poisoned")
    n = len(labels)
    count = _count(n, fraction, "poisoned")
    own = _rows_of(labels, target, "poisoned", name="target")
    others = (labels != target).nonzero().flatten()
    if count > len(others):
        raise ValueError(
            f"`fraction` of `poisoned` must take no more rows than classes other than {target} have, {len(others)}; got "
            f"{fraction:g}, {count} rows, of {n} with {len(own)} of that class. Poison fewer."
        )
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    rows = others[order[:count].to(others.device)]
    clean = inputs[rows]
    marked = _corner(clean, inputs.max()) if trigger is None else trigger(clean.clone())
    if marked.shape != clean.shape:
        raise ValueError(
            f"`trigger` of `poisoned` must keep the shape {tuple(clean.shape)}; got {tuple(marked.shape)}. Return all the "
            "inputs it was given."
        )
    x, y = inputs.clone(), labels.clone()
    x[rows] = marked
    y[rows] = target
    chosen = _deletion(f"poisoned {_percent(fraction)}", rows, n, seed)
    return CorruptedDeletion(**vars(chosen), x=x, y=y)


def _corner(inputs: Tensor, value: Tensor) -> Tensor:
    """Copies with the last corner of an image, or the last number of a row, set to a value."""
    marked = inputs.clone()
    if inputs.dim() == 2:
        marked[:, -1] = value
    else:
        side = max(1, min(inputs.shape[-2:]) // 4)
        marked[..., -side:, -side:] = value
    return marked


def _deletion(name: str, rows: Tensor, n: int, seed: int | None) -> Deletion:
    """The deletion of some of n rows."""
    kept = torch.ones(n, dtype=torch.bool)
    kept[rows.cpu()] = False
    return Deletion(name=name, forget=(~kept).nonzero().flatten(), retain=kept.nonzero().flatten(), seed=seed)


def _percent(share: float) -> str:
    """A share for a name: 10%, 12.5%, 0.4%."""
    return f"{100 * share:.4g}%"


def _count(n: int, fraction: object, owner: str, *, what: str = "rows") -> int:
    """A share of n rows as a whole number that leaves something on either side."""
    share = check_real(fraction, name="fraction", owner=owner, low=0, high=1, low_open=True, high_open=True)
    count = round(share * n)
    if not 0 < count < n:
        raise ValueError(
            f"`fraction` of `{owner}` must leave at least one row to forget and one to retain; got {share:g} of {n} {what}, "
            f"which is {count}. Choose another share, or more data."
        )
    return count


def _rows_of(labels: Tensor, label: object, owner: str, *, name: str = "label", whole: bool = False) -> Tensor:
    """Rows of one class, which must be some rows and, unless `whole`, not all of them."""
    _check_one_each(labels, owner)
    chosen = (labels == check_int(label, name=name, owner=owner, low=None)).nonzero().flatten()
    if len(chosen) == 0 or (len(chosen) == len(labels) and not whole):
        raise ValueError(
            f"`{name}` of `{owner}` must occur in some rows and not in all; got {label} with labels "
            f"{sorted(set(labels.tolist()))[:20]}."
        )
    return chosen


def _check_one_each(labels: Tensor, owner: str) -> None:
    """Raise unless every row has one label."""
    if labels.dim() != 1:
        raise ValueError(f"labels of `{owner}` must be one a row, shape (n,); got shape {tuple(labels.shape)}.")


def _size(data: int | Labels | Data, owner: str) -> int:
    """Number of rows."""
    if isinstance(data, numbers.Integral):
        return check_int(data, name="data", owner=owner, low=2)
    return len(_labels(data, owner)) if _is_labels(data) else sample_count(data, name="data")  # type: ignore[arg-type]


def _is_labels(data: object) -> bool:
    """Whether these are labels alone: one array, or a list of whole numbers."""
    if isinstance(data, list | tuple) and len(data):
        single = isinstance(
            data, list
        )  # arrays of one number each, as rows of a data set hold; a tuple of two is a pair
        return all(
            isinstance(one, numbers.Integral) or (single and is_array(one) and np.ndim(one) == 0) for one in data
        )
    return is_array(data)


def _labels(data: Labels | Data, owner: str) -> Tensor:
    """Labels, shape (n,), where the caller has them."""
    if _is_labels(data):
        labels = _array(data, "data", owner, "labels", "Encode classes as 0 to C-1.")
    else:
        inputs, labels = _read(data)
        # A model would not take a sample's label or number as an input, but here none is asked.
        if isinstance(inputs, tuple) and not is_pair(data) and any(part.numel() == len(part) for part in inputs[1:]):
            raise ValueError(
                f"`data` of `{owner}` must tell which part of a row is its label; got rows of {len(inputs) + 1} parts, the "
                "last and one before it of one number each. Pass the labels alone, or where rows are (x, y, index) "
                "[(x, y) for x, y, _ in data]."
            )
    if labels.dim() == 0 or len(labels) == 0:
        raise ValueError(f"`data` of `{owner}` must have at least one row; got labels of shape {tuple(labels.shape)}.")
    return labels


def _array(values: object, name: str, owner: str, what: str, remedy: str) -> Tensor:
    """Numbers in one tensor: the caller's own where it is one, whole numbers as int64 elsewhere."""
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, list | tuple):
        values = [one.item() if isinstance(one, Tensor | np.ndarray) and one.ndim == 0 else one for one in values]
    try:
        found = torch.as_tensor(np.array(values))  # a copy, as a table's own array may not be writable
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`{name}` of `{owner}` must be {what} that are numbers; got {type(values).__name__} ({error}). {remedy}"
        ) from error
    return found if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool else found.long()


def _tensors(data: Data, owner: str) -> tuple[Tensor, Tensor]:
    """Inputs (n, ...) and labels (n,)."""
    inputs, labels = _read(data)
    if not isinstance(inputs, Tensor):
        several = isinstance(inputs, tuple)
        remedy = " Where rows are (x, y, index), pass [(x, y) for x, y, _ in data]." if several else ""
        raise TypeError(f"`data` of `{owner}` must have one tensor of inputs; got {type(inputs).__name__}.{remedy}")
    return inputs, labels


def _read(data: Data) -> tuple[Inputs, Tensor]:
    """Inputs and labels; the caller's own tensors where they come as a pair."""
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        inputs, labels = (part.detach() for part in data)
        if inputs.dim() and labels.dim() and 0 < len(inputs) == len(labels):
            return inputs, labels
    samples = as_samples(data, name="data", device=torch.device("cpu"), dtype=torch.get_default_dtype())
    return samples.batch(torch.arange(samples.size))
