"""A plain training loop for the reference networks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stabkit._progress import progress_bar
from stabkit._rng import preserved_rng
from stabkit._validate import check_int, check_real


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int = 64,
    weight_decay: float = 0.0,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Train a model in place with Adam and a one-cycle step size; leave it in eval mode.

    Args:
        model: The network; changed in place.
        x: Inputs, shape (n, ...).
        y: Targets, shape (n, ...).
        epochs: Passes over the data.
        lr: Peak step size.
        batch_size: Samples a step.
        weight_decay: Decoupled weight decay.
        loss: Mean loss of outputs and targets.
        seed: Seed of the shuffling; the global random state is not used up.
        progress: Whether to show a progress bar.

    Returns:
        The same model.
    """
    check_int(epochs, name="epochs", owner="train", low=1)
    check_real(lr, name="lr", owner="train", low=0, low_open=True)
    check_int(batch_size, name="batch_size", owner="train", low=1)
    check_real(weight_decay, name="weight_decay", owner="train", low=0)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    batches = -(-x.shape[0] // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * batches)
    model.train()
    with preserved_rng():
        torch.manual_seed(seed)
        for _ in progress_bar(range(epochs), "train", progress):
            for chosen in torch.randperm(x.shape[0], generator=generator).split(batch_size):
                optimiser.zero_grad()
                loss(model(x[chosen]), y[chosen]).backward()
                optimiser.step()
                schedule.step()
    return model.eval()
