"""Data sets as tensors, and how to split one into what to forget and what to retain.

MNIST, CIFAR-10 and Adult are read from the folder that the environment variable STABKIT_DATA names, or, where it is not
set, fetched once from OpenML by scikit-learn, which caches them. Either way their content is compared with the published
one, and the published split into training and test data is kept. The digits come with scikit-learn; profiles are made up.
"""

from stabkit.datasets.images import CIFAR10_MEAN, CIFAR10_STD, MNIST_MEAN, MNIST_STD, cifar10, digits, mnist
from stabkit.datasets.profiles import ProfileSplit, profiles
from stabkit.datasets.splits import Deletion, TensorSplit, stratified_rows
from stabkit.datasets.tabular import adult

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "MNIST_MEAN",
    "MNIST_STD",
    "Deletion",
    "ProfileSplit",
    "TensorSplit",
    "adult",
    "cifar10",
    "digits",
    "mnist",
    "profiles",
    "stratified_rows",
]
