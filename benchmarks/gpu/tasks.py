"""The three networks with their data: how each is built, trained and retrained, and what it is asked to forget.

Training is quick rather than faithful to any paper: augmentation in batches on the device, bfloat16 and channels_last on
CUDA, one cycle of the step size, no look at the loss within an epoch, for which the device would have to wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.gpu.scale import Scale, Training
from stabkit.datasets import Deletion, ProfileSplit
from stabkit.deletion import forget_people, one_class, random_fraction
from stabkit.losses import resolve_loss
from stabkit.models import CausalLM, ResNet, VisionTransformer

PADDING = 4  # pixels by which an image is moved at most
CLASS = 3
PEOPLE_SHARE = 0.1
EVALUATION_BATCH = 1000
GOLD_SEED = 100  # a retrained network's, other than the original's

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sets:
    """What is forgotten and retained, and what was held out, on the device.

    Attributes:
        forget: Inputs and targets.
        retain: Inputs and targets.
        test: Inputs and targets; without a class that is forgotten, as nothing can be right about it.
    """

    forget: Pair
    retain: Pair
    test: Pair


class Task:
    """One network and its data.

    Attributes:
        name: "resnet18", "vit", "lm" or "lm-gpt2".
        loss: Name of the loss.
        scale: Sizes.
        device: Where data and networks are.
    """

    def __init__(self, name: str, scale: Scale, device: torch.device) -> None:
        self.name, self.scale, self.device = name, scale, device
        self.loss = "causal_lm" if name.startswith("lm") else "cross_entropy"

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        split = self.scale.data(self.name)
        self._person = split.person_train if isinstance(split, ProfileSplit) else None
        self._vocabulary = len(split.vocabulary) if isinstance(split, ProfileSplit) else 0
        x_train, y_train, x_test, y_test = (
            t.to(self.device) for t in (split.x_train, split.y_train, split.x_test, split.y_test)
        )
        if x_train.dim() == 4 and self.device.type == "cuda":  # the layout that its convolutions are fast in
            x_train, x_test = (t.to(memory_format=torch.channels_last) for t in (x_train, x_test))
        return x_train, y_train, x_test, y_test

    def build(self, seed: int) -> nn.Module:
        """The network with fresh weights, on the CPU."""
        x = self._split[0]
        settings = self.scale.networks[self.name]
        if self.name == "resnet18":
            return ResNet(x.shape[1], 10, seed=seed, **settings)
        if self.name == "vit":
            return VisionTransformer(x.shape[1], x.shape[2], 10, seed=seed, **settings)
        return CausalLM(self._vocabulary, context=x.shape[1], seed=seed, **settings)

    def deletion(self, name: str) -> Deletion:
        """Which rows to forget: "random10", "random50", "class" or "people"."""
        y = self._split[1].cpu()
        if name == "people":
            assert self._person is not None
            return forget_people(self._person, PEOPLE_SHARE)
        if name == "class":
            return one_class(y, CLASS)
        return random_fraction(y, int(name.removeprefix("random")) / 100)

    def sets(self, deletion: str) -> Sets:
        """The sets of a deletion."""
        x, y, x_test, y_test = self._split
        chosen = self.deletion(deletion)
        forget, retain = ((x[rows], y[rows]) for rows in (chosen.forget.to(x.device), chosen.retain.to(x.device)))
        seen = torch.isin(y_test, retain[1].unique()) if y_test.dim() == 1 else slice(None)
        return Sets(forget=forget, retain=retain, test=(x_test[seen], y_test[seen]))

    def trained(self, seed: int, deletion: str | None = None) -> tuple[nn.Module, dict[str, float]]:
        """Train on everything, or on what a deletion retains.

        Args:
            seed: Seed of weights, order and augmentation.
            deletion: What to leave out.

        Returns:
            The network in eval mode, and its accuracies as they were measured.
        """
        x, y, x_test, y_test = self._split
        if deletion is not None:
            sets = self.sets(deletion)
            (x, y), (x_test, y_test) = sets.retain, sets.test
        model = self.build(seed).to(self.device)
        fit(model, x, y, self.scale.training[self.name], loss=self.loss, seed=seed)
        found = {"train_accuracy": accuracy(model, x, y), "test_accuracy": accuracy(model, x_test, y_test)}
        return model, found


def fit(model: nn.Module, x: Tensor, y: Tensor, how: Training, *, loss: str, seed: int) -> None:
    """Train a network in place and leave it in eval mode.

    Args:
        model: The network.
        x: Inputs, on its device.
        y: Targets, likewise.
        how: Epochs, batches, step sizes, and whether images are moved and mirrored.
        loss: Name of the loss.
        seed: Seed of order and augmentation.

    Raises:
        RuntimeError: If an epoch ends with a loss that is not finite.
    """
    device, n = x.device, len(x)
    on_cuda, images = device.type == "cuda", x.dim() == 4
    if on_cuda and images:
        model.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    objective = resolve_loss(loss)
    steps = max(1, n // how.batch_size)  # a last short batch is left out: its BatchNorm statistics are poor
    rule: Optimizer
    if how.optimiser == "sgd":
        rule = SGD(model.parameters(), lr=how.lr, momentum=0.9, nesterov=True, weight_decay=how.weight_decay)
    else:
        rule = AdamW(model.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    rates = OneCycleLR(rule, how.lr, total_steps=how.epochs * steps, pct_start=0.25, cycle_momentum=False)
    model.train()
    for epoch in range(how.epochs):
        # All of an epoch's randomness at once: a transfer in every step would keep the device waiting.
        order = torch.randperm(n, generator=generator).to(device)
        moved = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator).to(device)
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(device)
        total = torch.zeros((), device=device)
        for k in range(steps):
            place = slice(k * how.batch_size, (k + 1) * how.batch_size)
            rows = order[place]
            inputs = augmented(x[rows], moved[:, place], mirrored[place]) if how.augment and images else x[rows]
            with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda):
                outputs = model(inputs)
            value = objective.per_sample(outputs.float(), y[rows]).mean()
            rule.zero_grad(set_to_none=True)
            value.backward()
            rule.step()
            rates.step()
            total += value.detach()
        if not math.isfinite(float(total)):
            raise RuntimeError(f"training left the numbers in epoch {epoch + 1} at a step size of up to {how.lr:g}")
    if on_cuda and images:
        model.to(memory_format=torch.contiguous_format)
    model.zero_grad(set_to_none=True)
    model.eval()


def augmented(x: Tensor, moved: Tensor, mirrored: Tensor) -> Tensor:
    """Images moved, what comes in mirrored at the edge, and some of them mirrored; all in one go.

    Args:
        x: Images of shape (b, c, h, w).
        moved: Pixels down and across, from 0 to 2·`PADDING`, of which `PADDING` leaves an image in place; shape (2, b).
        mirrored: Which to mirror left to right, shape (b,).

    Returns:
        Images of the same shape.
    """
    b, _, h, w = x.shape
    padded = nn.functional.pad(x, [PADDING] * 4, mode="reflect").permute(0, 2, 3, 1)  # (b, h+8, w+8, c)
    columns = torch.arange(w, device=x.device).expand(b, w)
    across = torch.where(mirrored[:, None], columns.flip(1), columns) + moved[1][:, None]
    down = torch.arange(h, device=x.device) + moved[0][:, None]
    batch = torch.arange(b, device=x.device)[:, None, None]
    return padded[batch, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of labels that are predicted right; of a text's answer tokens each counts alike."""
    loss = resolve_loss("causal_lm" if y.dim() > 1 else "cross_entropy")
    right = counted = 0
    with torch.no_grad():
        for inputs, targets in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True):
            logits, labels = loss.aligned(model(inputs), targets)  # type: ignore[attr-defined]
            right += int((logits.argmax(-1) == labels).sum())
            counted += int((labels >= 0).sum())
    return right / counted
