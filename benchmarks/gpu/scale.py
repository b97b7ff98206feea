"""Sizes of the experiments: the full one for a GPU, and two that take the same way on a CPU.

The reduced one has trained networks of the same build on a part of the data and takes some hours of a core; the small
one only shows that every job runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabkit.datasets import TensorSplit, cifar10, profiles


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained.

    Attributes:
        epochs: Passes over the data.
        batch_size: Samples a step.
        lr: Peak step size of a one-cycle schedule.
        optimiser: "sgd" (Nesterov's momentum 0.9) or "adamw".
        weight_decay: Of every parameter.
        augment: Whether images are moved and mirrored; narrow networks then remember few of them, and little is to forget.
    """

    epochs: int
    batch_size: int
    lr: float
    optimiser: str
    weight_decay: float
    augment: bool = True


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of everything.

    Attributes:
        name: "full", "reduced" or "small".
        minutes: What any job is expected to take; what it says itself when None.
        images: Training images of CIFAR-10; all when None.
        test_images: Test images; all when None.
        people: Settings of the made-up profiles.
        networks: Settings of each network.
        training: How each is trained.
        steps: Steps of the runs of a cell, by task.
        batch_size: Samples of either set a step, by task.
        mixes: Mixes of a cell.
        points: Step sizes for each mix.
        span: The step sizes reach from the predicted boundary over this to this times it.
        seeds: Seeds of the real runs.
        halvings: Of the interval around an observed boundary.
        watched: Samples of each set that a run is watched on.
        measured: What `predict` is given for short runs, by task.
        measured_long: The same for runs of published lengths, which are rolled out at length.
        published_share: Share of the published numbers of steps, and of batch sizes, that is run.
        linearised: What a timed prediction is given of its mode's sizes; the mode's own when empty.
        batch: Samples of a timed product, and the most in a batch of either set of the runs that a cost is set beside.
        run_steps: Lengths of the runs that a prediction's cost is set beside: GradDiff's and SFR-on's.
        repeats: Of a timing.
        replicates: Bootstrap resamples of an audit.
    """

    name: str
    minutes: float | None
    images: int | None
    test_images: int | None
    people: Mapping[str, int]
    networks: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Training]
    steps: Mapping[str, int]
    batch_size: Mapping[str, int]
    mixes: tuple[float, ...]
    points: int
    span: float
    seeds: tuple[int, ...]
    halvings: int
    watched: int
    measured: Mapping[str, Mapping[str, Any]]
    measured_long: Mapping[str, Any]
    published_share: float
    linearised: Mapping[str, Any]
    batch: int
    run_steps: tuple[int, ...]
    repeats: int
    replicates: int

    def data(self, task: str) -> TensorSplit:
        """The task's data, on the CPU."""
        if task.startswith("lm"):
            return profiles(**self.people)
        return cifar10(subset=self.images, test_subset=self.test_images)


_IMAGES = {
    "rank": 60,
    "retain_samples": 448,
    "forget_samples": 224,
    "spectrum_samples": 256,
    "seeds": 3,
    "precision": "tf32",
}
_TEXT = {
    "rank": 50,
    "retain_samples": 160,
    "forget_samples": 80,
    "spectrum_samples": 256,
    "seeds": 3,
    "precision": "tf32",
}

FULL = Scale(
    name="full",
    minutes=None,
    images=None,
    test_images=None,
    people={"people": 200, "test_people": 50, "facts": 5},
    networks={
        "resnet18": {},
        "vit": {"patch": 4, "width": 256, "depth": 9, "heads": 8},
        "lm": {"width": 384, "depth": 6, "heads": 6},
        "lm-gpt2": {"width": 768, "depth": 12, "heads": 12},
    },
    training={
        "resnet18": Training(epochs=20, batch_size=512, lr=0.4, optimiser="sgd", weight_decay=5e-4),
        "vit": Training(epochs=30, batch_size=512, lr=1e-3, optimiser="adamw", weight_decay=0.05),
        "lm": Training(epochs=80, batch_size=64, lr=1e-3, optimiser="adamw", weight_decay=0.0),
        "lm-gpt2": Training(epochs=60, batch_size=64, lr=4e-4, optimiser="adamw", weight_decay=0.0),
    },
    steps={"resnet18": 60, "vit": 60, "lm": 60, "lm-gpt2": 50},
    batch_size={"resnet18": 64, "vit": 64, "lm": 16, "lm-gpt2": 16},
    mixes=(0.2, 0.5),
    points=6,
    span=5.0,
    seeds=(0, 1, 2),
    halvings=2,
    watched=256,
    measured={
        "resnet18": _IMAGES,
        "vit": _IMAGES,
        "lm": _TEXT,
        # Each of rank + 19 columns of the sketch takes 0.34 GB, and there are several copies of them.
        "lm-gpt2": {**_TEXT, "rank": 12, "spectrum_samples": 128},
    },
    measured_long={**_IMAGES, "seeds": 1},
    published_share=1.0,
    linearised={},
    batch=256,
    run_steps=(500, 1500),
    repeats=7,
    replicates=200,
)
_FEW = {"rank": 60, "retain_samples": 448, "forget_samples": 224, "spectrum_samples": 64, "seeds": 3}
_FEW_TEXT = {"rank": 40, "retain_samples": 96, "forget_samples": 48, "spectrum_samples": 48, "seeds": 3}
REDUCED = Scale(
    name="reduced",
    minutes=4.0,
    images=10_000,
    test_images=2_000,
    people={"people": 60, "test_people": 15, "facts": 4},
    networks={
        "resnet18": {"width": 8},
        "vit": {"patch": 4, "width": 48, "depth": 4, "heads": 4},
        "lm": {"width": 48, "depth": 2, "heads": 4},
        "lm-gpt2": {"width": 96, "depth": 4, "heads": 6},
    },
    training={
        "resnet18": Training(epochs=16, batch_size=128, lr=0.2, optimiser="sgd", weight_decay=5e-4, augment=False),
        "vit": Training(epochs=16, batch_size=128, lr=2e-3, optimiser="adamw", weight_decay=0.05, augment=False),
        "lm": Training(epochs=60, batch_size=16, lr=5e-3, optimiser="adamw", weight_decay=0.0),
        "lm-gpt2": Training(epochs=60, batch_size=16, lr=3e-3, optimiser="adamw", weight_decay=0.0),
    },
    steps={"resnet18": 40, "vit": 40, "lm": 40, "lm-gpt2": 40},
    batch_size={"resnet18": 32, "vit": 32, "lm": 8, "lm-gpt2": 8},
    mixes=(0.2, 0.5),
    points=4,
    span=4.0,
    seeds=(0, 1, 2),
    halvings=1,
    watched=128,
    measured={"resnet18": _FEW, "vit": _FEW, "lm": _FEW_TEXT, "lm-gpt2": _FEW_TEXT},
    measured_long={**_FEW, "seeds": 1},
    published_share=0.2,  # the published epochs, on a fifth of the images
    linearised={},
    batch=256,
    run_steps=(500, 1500),
    repeats=3,
    replicates=100,
)
_TINY = {"rank": 16, "retain_samples": 40, "forget_samples": 20, "spectrum_samples": 16, "seeds": 2}
_TINY_TEXT = {"rank": 8, "retain_samples": 6, "forget_samples": 3, "spectrum_samples": 6, "seeds": 2}
SMALL = Scale(
    name="small",
    minutes=0.5,
    images=600,
    test_images=200,
    people={"people": 20, "test_people": 4, "facts": 2},
    networks={
        "resnet18": {"blocks": (1, 1), "width": 4},
        "vit": {"patch": 8, "width": 16, "depth": 2, "heads": 2},
        "lm": {"width": 16, "depth": 1, "heads": 2},
        "lm-gpt2": {"width": 24, "depth": 2, "heads": 2},
    },
    training={
        "resnet18": Training(epochs=20, batch_size=30, lr=0.1, optimiser="sgd", weight_decay=5e-4),
        "vit": Training(epochs=20, batch_size=30, lr=3e-3, optimiser="adamw", weight_decay=0.05),
        "lm": Training(epochs=100, batch_size=8, lr=2e-2, optimiser="adamw", weight_decay=0.0),
        "lm-gpt2": Training(epochs=80, batch_size=8, lr=1e-2, optimiser="adamw", weight_decay=0.0),
    },
    steps={"resnet18": 20, "vit": 20, "lm": 20, "lm-gpt2": 20},
    batch_size={"resnet18": 16, "vit": 16, "lm": 4, "lm-gpt2": 4},
    mixes=(0.2, 0.5),
    points=4,
    span=8.0,
    seeds=(0, 1),
    halvings=1,
    watched=64,
    measured={"resnet18": _TINY, "vit": _TINY, "lm": _TINY_TEXT, "lm-gpt2": _TINY_TEXT},
    measured_long=_TINY,
    published_share=0.015,
    linearised=_TINY,
    batch=8,
    run_steps=(10, 30),
    repeats=2,
    replicates=50,
)
SCALES = {scale.name: scale for scale in (FULL, REDUCED, SMALL)}
