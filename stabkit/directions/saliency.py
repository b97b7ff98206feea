"""Which parameters matter more to the forget set than to the retain set, as a 0/1 mask (theory §8)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stabkit._table import Shown, number
from stabkit._validate import check_int, check_real
from stabkit.directions.diagonals import fisher_diagonal
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem


@dataclass(frozen=True, kw_only=True, eq=False)
class Saliency(Shown):
    """The mask, and what it was made from.

    Attributes:
        mask: True where the parameter moves, shape (d,).
        forget: Diagonal of the empirical Fisher of the forget set, shape (d,), float64.
        retain: The same of the retain set.
        threshold: γ.
        unseen: Parameters without a gradient on either set, 0/0: the mask leaves them out.
    """

    mask: Tensor
    forget: Tensor
    retain: Tensor
    threshold: float
    unseen: int

    @property
    def share(self) -> float:
        """Share of the parameters that move."""
        return float(self.mask.double().mean())

    def preconditioner(self) -> Diagonal:
        """P = diag(mask).

        Returns:
            The mask as a preconditioner, in float64.
        """
        return Diagonal(self.mask.double())

    def __str__(self) -> str:
        return (
            f"Saliency mask: {self.share:.1%} of {self.mask.numel():,} parameters move, those whose Fisher information on "
            f"the forget set is at least {number(self.threshold)} times that on the retain set; {self.unseen:,} have "
            "a gradient on neither and stay"
        )


def saliency(
    problem: UnlearningProblem, *, threshold: float = 1.0, samples: int | None = None, seed: int = 0
) -> Saliency:
    """The mask F_jj(F) / F_jj(R) >= γ, F the empirical Fisher: the diagonal stand-in for H_F H_R^{-1}.

    From mean squares of per-sample gradients; squares of batch means, as the released code of SFR-on takes, would depend on
    the batch size. A parameter that only the forget set uses is in the mask whatever γ is. One that neither set uses is not,
    as nothing says that forgetting needs it; in that code its ratio counts as 1.

    Args:
        problem: The unlearning problem.
        threshold: γ >= 0.
        samples: Samples of each set; all when None.
        seed: Seed of their choice.

    Returns:
        The mask. Cost: one gradient for each of those samples.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain.
    """
    check_real(threshold, name="threshold", owner="saliency", low=0)
    if samples is not None:
        check_int(samples, name="samples", owner="saliency", low=1, remedy="None takes all of them.")
    forget, retain = (
        fisher_diagonal(problem, part, indices=part.subset(samples, seed)) for part in (problem.forget, problem.retain)
    )
    # F > 0 decides 0/0; the product decides the rest without a division.
    return Saliency(
        mask=(forget > 0) & (forget >= threshold * retain),
        forget=forget,
        retain=retain,
        threshold=float(threshold),
        unseen=int(((forget == 0) & (retain == 0)).sum()),
    )
