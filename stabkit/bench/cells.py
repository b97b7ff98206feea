"""What is benchmarked: data set, network, deletion and algorithm, one cell each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stabkit.datasets import Deletion, ProfileSplit, TensorSplit, adult, cifar10, digits, mnist, profiles
from stabkit.deletion import forget_people, high_influence, mislabelled, one_class, random_fraction, subclass
from stabkit.models import MLP, CausalLM, ResNet, SmallCNN, TabularMLP, VisionTransformer
from stabkit.training import train


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network and the data it was trained on.

    Attributes:
        model: The network, in eval mode.
        split: Its data, labels as it saw them.
        loss: Name of the loss it was trained with.
    """

    model: nn.Module
    split: TensorSplit
    loss: str = "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination to predict and run.

    Attributes:
        dataset: Key of `DATASETS`.
        model: Key of `MODELS`.
        deletion: "random1", "random10", "random50", "class", "subclass", "influence", "mislabelled" or "people10".
        algorithm: Name of the algorithm.
        momentum: Heavy-ball momentum.
        steps: Steps of every run.
        role: "evaluation", or "calibration": what the probability may be fitted to, and never pooled with the others. Cells
            of AdamW's runs, "AdamW evaluation" and "AdamW calibration", are neither pooled with those of SGD's.
        optimizer: "sgd" or "adamw".
    """

    dataset: str
    model: str
    deletion: str
    algorithm: str
    momentum: float = 0.0
    steps: int = 100
    role: str = "evaluation"
    optimizer: str = "sgd"

    @property
    def key(self) -> str:
        """Name of the cell, fit for a file."""
        momentum = f"-m{self.momentum:g}" if self.momentum else ""
        optimizer = "" if self.optimizer == "sgd" else f"-{self.optimizer}"
        return f"{self.dataset}-{self.model}-{self.deletion}-{self.algorithm}{momentum}{optimizer}"


DATASETS: dict[str, Callable[[int], TensorSplit]] = {
    "digits": lambda seed: digits(seed=seed),
    "mnist": lambda seed: mnist(subset=2500, test_subset=1500, seed=seed),
    "adult": lambda seed: adult(subset=5000, test_subset=2500, seed=seed),
    "cifar10": lambda seed: cifar10(subset=2000, test_subset=1000, seed=seed),
    "profiles": lambda seed: profiles(seed=seed),
}
MODELS: dict[str, Callable[[TensorSplit, int], nn.Module]] = {
    "mlp": lambda split, seed: MLP(split.x_train[0].numel(), _classes(split), hidden=(64,), seed=seed),
    "wide-mlp": lambda split, seed: MLP(split.x_train[0].numel(), _classes(split), hidden=(512, 512), seed=seed),
    "tanh-mlp": lambda split, seed: MLP(
        split.x_train[0].numel(), _classes(split), hidden=(48, 48), activation=nn.Tanh, seed=seed
    ),
    "cnn": lambda split, seed: SmallCNN(split.x_train.shape[1], split.x_train.shape[2], _classes(split), seed=seed),
    "resnet": lambda split, seed: ResNet(
        split.x_train.shape[1], _classes(split), blocks=(1, 1, 1), width=8, norm="group", seed=seed
    ),
    "vit": lambda split, seed: VisionTransformer(
        split.x_train.shape[1], split.x_train.shape[2], _classes(split), patch=split.x_train.shape[2] // 4, seed=seed
    ),
    "tabular": lambda split, seed: TabularMLP(split.x_train.shape[1], _classes(split), hidden=(64, 32), seed=seed),
    "lm": lambda split, seed: CausalLM(
        len(_people(split).vocabulary), context=split.x_train.shape[1], width=48, depth=2, seed=seed
    ),
}
EPOCHS = {"digits": 30, "mnist": 8, "adult": 15, "cifar10": 15, "profiles": 150}
LOSSES = {"profiles": "causal_lm"}  # cross-entropy for the others
MISLABELLED = 0.1


def prepared(cell: Cell, seed: int) -> tuple[Trained, Deletion]:
    """Train the cell's network on its data and choose what to forget.

    Args:
        cell: The cell.
        seed: Seed of data, weights, training and deletion.

    Returns:
        The network with its data, and the deletion.
    """
    split = DATASETS[cell.dataset](seed)
    x, y = split.x_train, split.y_train
    chosen: Deletion | None = None
    if cell.deletion == "mislabelled":
        corrupted = mislabelled(y, MISLABELLED, seed=seed)
        chosen, y = corrupted, corrupted.y
    loss = LOSSES.get(cell.dataset, "cross_entropy")
    model = train(MODELS[cell.model](split, seed), x, y, epochs=EPOCHS[cell.dataset], lr=3e-3, loss=loss, seed=seed)
    trained = Trained(model=model, split=replace(split, y_train=y), loss=loss)
    return trained, chosen or _deletion(cell.deletion, trained, seed)


def _deletion(name: str, trained: Trained, seed: int) -> Deletion:
    x, y = trained.split.x_train, trained.split.y_train
    if name.startswith("people"):
        return forget_people(_people(trained.split).person_train, int(name.removeprefix("people")) / 100, seed=seed)
    if name.startswith("random"):
        return random_fraction(y, int(name.removeprefix("random")) / 100, seed=seed)
    if name == "class":
        return one_class(y, int(y.unique()[seed % y.unique().numel()]))
    if name == "subclass":
        return subclass((x, y), int(y.unique()[seed % y.unique().numel()]), seed=seed)
    return high_influence(trained.model, (x, y), 0.1, loss=trained.loss)


def _people(split: TensorSplit) -> ProfileSplit:
    """Data about people."""
    assert isinstance(split, ProfileSplit)
    return split


def _classes(split: TensorSplit) -> int:
    return int(torch.cat([split.y_train, split.y_test]).max()) + 1


# Calibration: two small networks on digits, every kind of algorithm among them, and cells where one linearisation fails,
# with momentum too. What was chosen or fitted was so on these alone.
CELLS: tuple[Cell, ...] = (
    *(
        Cell(dataset="digits", model=model, deletion=deletion, algorithm=algorithm, role="calibration")
        for model in ("mlp", "tanh-mlp")
        for deletion in ("random10", "class")
        for algorithm in ("graddiff", "agu")
    ),
    Cell(dataset="digits", model="mlp", deletion="random10", algorithm="graddiff", momentum=0.9, role="calibration"),
    *(
        Cell(dataset="digits", model=model, deletion=deletion, algorithm=algorithm, role="calibration")
        for model, deletion in (("mlp", "random10"), ("tanh-mlp", "class"))
        for algorithm in ("salun", "sfr_on")
    ),
    Cell(dataset="digits", model="cnn", deletion="mislabelled", algorithm="graddiff", role="calibration"),
    Cell(dataset="digits", model="cnn", deletion="mislabelled", algorithm="graddiff", momentum=0.9, role="calibration"),
    Cell(dataset="digits", model="resnet", deletion="class", algorithm="graddiff", role="calibration"),
    *(
        Cell(dataset="digits", model="cnn", deletion=deletion, algorithm="graddiff")
        for deletion in ("random1", "random10", "random50", "class", "influence")
    ),
    Cell(dataset="digits", model="cnn", deletion="random10", algorithm="graddiff", momentum=0.9),
    Cell(dataset="digits", model="cnn", deletion="class", algorithm="graddiff", momentum=0.9),
    *(
        Cell(dataset="digits", model="cnn", deletion=deletion, algorithm=algorithm)
        for deletion in ("random10", "class")
        for algorithm in ("agu", "sragu", "salun", "sfr_on")
    ),
    *(Cell(dataset="digits", model="cnn", deletion=deletion, algorithm="ga") for deletion in ("random10", "class")),
    Cell(dataset="digits", model="resnet", deletion="random10", algorithm="graddiff"),
    *(
        Cell(dataset="digits", model="vit", deletion=deletion, algorithm="graddiff")
        for deletion in ("random10", "class")
    ),
    *(
        Cell(dataset="adult", model="tabular", deletion=deletion, algorithm=algorithm)
        for deletion in ("random10", "influence")
        for algorithm in ("graddiff", "agu")
    ),
    Cell(dataset="adult", model="tabular", deletion="random10", algorithm="ga"),
    Cell(dataset="adult", model="tabular", deletion="mislabelled", algorithm="graddiff"),
    *(
        Cell(dataset="mnist", model="cnn", deletion=deletion, algorithm="graddiff")
        for deletion in ("random10", "class", "mislabelled")
    ),
    *(
        # Layers large enough for their exponents to be trusted.
        Cell(dataset="mnist", model="wide-mlp", deletion="random10", algorithm=algorithm)
        for algorithm in ("agu", "sragu")
    ),
    Cell(dataset="mnist", model="cnn", deletion="class", algorithm="graddiff", momentum=0.9),
    *(
        Cell(dataset="cifar10", model="cnn", deletion=deletion, algorithm="graddiff")
        for deletion in ("random10", "class")
    ),
    *(
        Cell(dataset="profiles", model="lm", deletion="people10", algorithm=algorithm)
        for algorithm in ("graddiff", "npo")
    ),
    *(
        Cell(
            dataset="digits",
            model=model,
            deletion=deletion,
            algorithm=algorithm,
            role="AdamW calibration",
            optimizer="adamw",
        )
        for model, deletion, algorithm in (
            ("mlp", "random10", "graddiff"),
            ("mlp", "class", "graddiff"),
            ("mlp", "class", "salun"),
            ("tanh-mlp", "random10", "agu"),
            ("tanh-mlp", "class", "graddiff"),
            ("cnn", "mislabelled", "graddiff"),
            ("resnet", "class", "graddiff"),
        )
    ),
    *(
        Cell(
            dataset=dataset,
            model=model,
            deletion=deletion,
            algorithm=algorithm,
            role="AdamW evaluation",
            optimizer="adamw",
        )
        for dataset, model, deletion, algorithm in (
            ("digits", "cnn", "random10", "graddiff"),
            ("digits", "cnn", "class", "graddiff"),
            ("digits", "cnn", "class", "agu"),
            ("digits", "cnn", "random10", "ga"),
            ("digits", "cnn", "random10", "salun"),
            ("digits", "cnn", "class", "sfr_on"),
            ("digits", "resnet", "random10", "graddiff"),
            ("digits", "vit", "class", "graddiff"),
            ("adult", "tabular", "random10", "graddiff"),
            ("adult", "tabular", "mislabelled", "graddiff"),
            ("mnist", "cnn", "class", "graddiff"),
            ("cifar10", "cnn", "random10", "graddiff"),
            ("profiles", "lm", "people10", "graddiff"),
            ("profiles", "lm", "people10", "npo"),
        )
    ),
)


def cells_named(names: Sequence[str] | None) -> tuple[Cell, ...]:
    """The cells whose key is one of some names, or begins with it.

    Args:
        names: Keys, or beginnings of keys where there is no such key; all cells when None.

    Returns:
        The cells, in their order.

    Raises:
        ValueError: If a name fits no cell.
    """
    if names is None:
        return CELLS
    keys = {cell.key for cell in CELLS}
    for name in names:
        if not any(key.startswith(name) for key in keys):
            raise ValueError(
                f"`cells` of `verify_cells` must name cells; got {name!r}, with which no key begins. There are "
                f"{', '.join(cell.key for cell in CELLS)}."
            )
    return tuple(
        cell for cell in CELLS if any(cell.key == name if name in keys else cell.key.startswith(name) for name in names)
    )
