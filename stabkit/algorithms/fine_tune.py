"""Fine-tuning on the retain set alone."""

from dataclasses import dataclass
from typing import ClassVar

from stabkit.algorithms.base import Algorithm


@dataclass(frozen=True, kw_only=True)
class FineTune(Algorithm):
    """P = I and α = 0: every step descends the retain loss (theory §8).

    Attributes:
        mix: Always 0.
    """

    name: ClassVar[str] = "finetune"
    fixed_mix: ClassVar[bool] = True

    mix: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix != 0:
            raise ValueError(
                f"`mix` of `{type(self).__name__}` must be 0, as it takes no forget gradient; got {self.mix!r}. Use "
                "GradDiff for a mix above 0."
            )
