"""Small reference networks for demonstrations, tests and benchmarks."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int


class MLP(nn.Sequential):
    """Fully connected network on flattened inputs: (b, ...) with `inputs` numbers a sample to (b, outputs)."""

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


class TabularMLP(nn.Sequential):
    """Normalised fully connected network for rows of numbers, such as `datasets.adult` gives; no embeddings.

    Every hidden layer is linear, LayerNorm, GELU: smooth, and without statistics that training would carry along.
    """

    def __init__(self, inputs: int, outputs: int, *, hidden: Sequence[int] = (128, 64), seed: int = 0) -> None:
        """Build it with seeded weights.

        Args:
            inputs: Columns of a row; the input has shape (b, inputs).
            outputs: Outputs per row; the output has shape (b, outputs).
            hidden: Width of every hidden layer.
            seed: Seed of the initial weights; the global random state is not used up.
        """
        with preserved_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for width in hidden:
                layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.GELU()]
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

        Raises:
            ValueError: If the size is no multiple of 4.
        """
        super().__init__()
        check_int(size, name="size", owner="SmallCNN", low=1)
        if size % 4:  # both poolings halve it, and would leave out what is over
            raise ValueError(
                f"`size` of `SmallCNN` must be a multiple of 4, as it is halved twice; got {size}. Pad or resize the images."
            )
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


class _ResidualBlock(nn.Module):
    """Two convolutions with normalisation around a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.skip(x))


def _groups(channels: int) -> int:
    """Groups that a group normalisation has."""
    return max(1, channels // 8)


class ResNet(nn.Module):
    """Residual network with the stem for small images (He et al. 2016): ResNet-18 as it stands.

    `blocks=(3, 3, 3), width=16` is ResNet-20.

    Attributes:
        features: Stem and residual stages.
        head: The linear layer.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        norm: str = "batch",
        seed: int = 0,
    ) -> None:
        """Build it with seeded weights.

        Args:
            channels: Input channels.
            outputs: Outputs per sample.
            blocks: Residual blocks of each stage; every stage but the first halves the image and doubles the width.
            width: Channels of the first stage.
            norm: "batch" or "group" (no running statistics). A stage of c channels has c // 8 groups, at least one: of 8
                channels each where the width is a multiple of 8, and all of them together below 16.
            seed: Seed of the initial weights; the global random state is not used up.

        Raises:
            ValueError: If the channels of a stage do not divide into their groups.
        """
        super().__init__()
        check_choice(norm, name="norm", owner="ResNet", choices=("batch", "group"))
        check_int(width, name="width", owner="ResNet", low=1)
        for stage in range(max(1, len(blocks)) if norm == "group" else 0):
            count = width * 2**stage
            if count % _groups(count):
                raise ValueError(
                    "`width` of `ResNet` must give every stage channels that divide into c // 8 groups with "
                    f"norm='group'; got {width}, whose stage {stage + 1} has {count} channels for {_groups(count)} groups. "
                    "Take a multiple of 8, or norm='batch'."
                )

        def normalisation(count: int) -> nn.Module:
            return nn.BatchNorm2d(count) if norm == "batch" else nn.GroupNorm(_groups(count), count)

        with preserved_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                normalisation(width),
                nn.ReLU(),
            ]
            inputs = width
            for stage, count in enumerate(blocks):
                for place in range(count):
                    stride = 2 if stage and place == 0 else 1
                    layers.append(_ResidualBlock(inputs, width * 2**stage, stride, normalisation))
                    inputs = width * 2**stage
            self.features = nn.Sequential(*layers)
            self.head = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: Images of shape (b, channels, height, width).

        Returns:
            Logits of shape (b, outputs).
        """
        return self.head(self.features(x).mean((2, 3)))


def _check_heads(width: int, heads: int, *, owner: str) -> None:
    """Raise unless the numbers of a token divide among the heads."""
    check_int(width, name="width", owner=owner, low=1)
    check_int(heads, name="heads", owner=owner, low=1)
    if width % heads:
        raise ValueError(f"`width` of `{owner}` must be a multiple of heads={heads}; got {width}. Change either.")


def _reset(module: nn.Module) -> None:
    """Start a layer's own weights anew; attention has a method of another name."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


class VisionTransformer(nn.Module):
    """A small vision transformer with pre-normalisation and mean pooling (Dosovitskiy et al. 2021).

    Attributes:
        patches: Patch embedding.
        positions: Learned position embedding, shape (1, tokens, width).
        blocks: The encoder.
        head: Normalisation and the linear layer.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        outputs: int,
        *,
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        seed: int = 0,
    ) -> None:
        """Build it with seeded weights.

        Args:
            channels: Input channels.
            size: Height and width of the input, a multiple of `patch`.
            outputs: Outputs per sample.
            patch: Side of a patch.
            width: Numbers per token, a multiple of `heads`.
            depth: Encoder layers.
            heads: Attention heads.
            seed: Seed of the initial weights; the global random state is not used up.

        Raises:
            ValueError: If the size is no multiple of the patches, or the width none of the heads.
        """
        super().__init__()
        check_int(size, name="size", owner="VisionTransformer", low=1)
        check_int(patch, name="patch", owner="VisionTransformer", low=1)
        if size % patch:  # the last rows and columns would be in no patch
            raise ValueError(
                f"`size` of `VisionTransformer` must be a multiple of patch={patch}; got {size}. Change either, or resize "
                "the images."
            )
        _check_heads(width, heads, owner="VisionTransformer")
        with preserved_rng():
            torch.manual_seed(seed)
            self.patches = nn.Conv2d(channels, width, patch, stride=patch)
            self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
            self.blocks = nn.Sequential(
                *(
                    nn.TransformerEncoderLayer(
                        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                    )
                    for _ in range(depth)
                )
            )
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, as the constructor does, from the global random state."""
        self.patches.reset_parameters()
        self.positions.copy_(0.02 * torch.randn_like(self.positions))
        self.blocks.apply(_reset)
        self.head.apply(_reset)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: Images of shape (b, channels, size, size).

        Returns:
            Logits of shape (b, outputs).
        """
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


class _CausalBlock(nn.Module):
    """Pre-normalised attention to earlier positions, then a two-layer network, each around a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        # (b, t, 3·width) -> three of (b, heads, t, width/heads)
        q, k, v = self.qkv(self.norm_attention(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.norm_mlp(x))


class CausalLM(nn.Module):
    """A small GPT-2-like language model with tied input and output embeddings (Radford et al. 2019); no dropout.

    Train and unlearn it with loss="causal_lm" and the tokens themselves as targets: position t predicts token t + 1.

    Attributes:
        tokens: Token embedding, shape (vocabulary, width).
        positions: Learned position embedding, shape (context, width).
        blocks: The decoder.
        norm: Last normalisation.
        head: The output layer; its weight is the token embedding's.
    """

    def __init__(
        self, vocabulary: int, *, context: int = 64, width: int = 64, depth: int = 2, heads: int = 4, seed: int = 0
    ) -> None:
        """Build it with seeded weights: normal with standard deviation 0.02, biases zero, as in GPT-2.

        Args:
            vocabulary: Number of different tokens.
            context: Longest sequence.
            width: Numbers per token, a multiple of `heads`.
            depth: Decoder layers.
            heads: Attention heads.
            seed: Seed of the initial weights; the global random state is not used up.

        Raises:
            ValueError: If the width is no multiple of the heads.
        """
        super().__init__()
        _check_heads(width, heads, owner="CausalLM")
        with preserved_rng():
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(vocabulary, width)
            self.positions = nn.Embedding(context, width)
            self.blocks = nn.Sequential(*(_CausalBlock(width, heads) for _ in range(depth)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.reset_parameters()
        self.head.weight = self.tokens.weight

    def reset_parameters(self) -> None:
        """Draw all weights anew, as the constructor does, from the global random state."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores of the next token at every position.

        Args:
            input_ids: Tokens of shape (b, t), int64, t no longer than the context.

        Returns:
            Logits of shape (b, t, vocabulary).

        Raises:
            ValueError: If the sequences are longer than the context.
        """
        length, context = input_ids.shape[1], self.positions.num_embeddings
        if length > context:
            raise ValueError(
                f"`input_ids` of `CausalLM` must have at most context={context} tokens a sequence; got {length}. Cut the "
                "sequences, or build the model with a longer context."
            )
        places = torch.arange(length, device=input_ids.device)
        return self.head(self.norm(self.blocks(self.tokens(input_ids) + self.positions(places))))
