"""Small reference networks for demonstrations, tests and benchmarks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stabkit._rng import preserved_rng


class MLP(nn.Sequential):
    """Fully connected network on flattened inputs."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.ReLU,
        seed: int = 0,
    ) -> None:
        """Build it with seeded weights.

        Args:
            inputs: Numbers per sample.
            outputs: Outputs per sample.
            hidden: Width of every hidden layer.
            activation: Class of the activation.
            seed: Seed of the initial weights; the global random state is not used up.
        """
        with preserved_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Flatten()]
            for width in hidden:
                layers += [nn.Linear(inputs, width), activation()]
                inputs = width
            super().__init__(*layers, nn.Linear(inputs, outputs))


class SmallCNN(nn.Module):
    """Two convolutions with pooling, then two linear layers.

    Attributes:
        features: The convolutional part.
        head: The linear part.
    """

    def __init__(
        self, channels: int, size: int, outputs: int, *, width: int = 16, hidden: int = 64, seed: int = 0
    ) -> None:
        """Build it with seeded weights.

        Args:
            channels: Input channels.
            size: Height and width of the input, a multiple of 4.
            outputs: Outputs per sample.
            width: Channels of the first convolution; the second has twice as many.
            hidden: Width of the hidden linear layer.
            seed: Seed of the initial weights; the global random state is not used up.
        """
        super().__init__()
        with preserved_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(width, 2 * width, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            self.head = nn.Sequential(
                nn.Flatten(),
                nn.Linear(2 * width * (size // 4) ** 2, hidden),
                nn.ReLU(),
                nn.Linear(hidden, outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: Images of shape (b, channels, size, size).

        Returns:
            Logits of shape (b, outputs).
        """
        return self.head(self.features(x))
