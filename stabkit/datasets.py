"""Real data sets as tensors, and how to split one into what to forget and what to retain."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from stabkit._validate import check_int, check_real


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorSplit:
    """Training and test data as tensors.

    Attributes:
        x_train: Training inputs, shape (n, ...).
        y_train: Training labels, shape (n,).
        x_test: Test inputs.
        y_test: Test labels.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Deletion:
    """What to forget and what to retain, as row numbers of a training set.

    Attributes:
        name: How the rows were chosen.
        forget: Rows to forget, sorted.
        retain: All other rows, sorted.
    """

    name: str
    forget: Tensor
    retain: Tensor


def digits(*, test_share: float = 0.2, seed: int = 0) -> TensorSplit:
    """scikit-learn's bundled 8x8 handwritten digits: 1,797 images, ten classes, scaled to [0, 1].

    Args:
        test_share: Share held out as the test set.
        seed: Seed of the split.

    Returns:
        Images of shape (n, 1, 8, 8), float32, and labels, int64.
    """
    check_real(test_share, name="test_share", owner="digits", low=0, high=1, low_open=True, high_open=True)
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = round(test_share * len(y))
    test, train = order[:held], order[held:]
    return TensorSplit(x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test])


def delete_random(labels: Tensor, *, share: float, seed: int = 0) -> Deletion:
    """Forget a uniformly random share of the rows.

    Args:
        labels: Training labels, shape (n,).
        share: Share to forget, in (0, 1).
        seed: Seed of the choice.

    Returns:
        The deletion.
    """
    check_real(share, name="share", owner="delete_random", low=0, high=1, low_open=True, high_open=True)
    n = labels.shape[0]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = min(n - 1, max(1, round(share * n)))
    return Deletion(name=f"random {share:.0%}", forget=order[:count].sort().values, retain=order[count:].sort().values)


def delete_class(labels: Tensor, *, label: int) -> Deletion:
    """Forget every row of one class.

    Args:
        labels: Training labels, shape (n,).
        label: The class to forget.

    Returns:
        The deletion.

    Raises:
        ValueError: If no row, or every row, has that label.
    """
    check_int(label, name="label", owner="delete_class", low=0)
    chosen = labels == label
    if not bool(chosen.any()) or bool(chosen.all()):
        raise ValueError(
            f"`label` of `delete_class` must occur in some rows and not in all; got {label} with labels "
            f"{sorted(set(labels.tolist()))[:20]}."
        )
    return Deletion(name=f"class {label}", forget=chosen.nonzero().flatten(), retain=(~chosen).nonzero().flatten())
