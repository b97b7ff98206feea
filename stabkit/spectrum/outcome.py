"""How an iterative eigensolver ended, as data: why, and what to do about it."""

from __future__ import annotations

import enum


class SolverOutcome(enum.Enum):
    """End of an eigensolver's run; `reason` says what happened and `remedy` which argument to change."""

    CONVERGED = "every residual is within the tolerance", "nothing to do"
    BUDGET = (
        "the products ran out before every residual was within the tolerance",
        "raise `max_products`, or loosen `tolerance`; with a checkpoint the run goes on from where it stopped",
    )
    STAGNATED = (
        "the residuals stopped falling: (a) the wanted eigenvalues are packed too densely for this basis, (b) the products "
        "are noisier than the tolerance, or the operator is not symmetric",
        "widen `basis` and `block`, loosen `tolerance`, or compute in float64",
    )
    INACCURATE = (
        "the recurrence converged and the recomputed residuals did not: (a) rounding, or products that differ from call to "
        "call, (b) the operator is not symmetric",
        "compute in float64 with dropout off, or loosen `tolerance`; check the symmetry of an operator of your own",
    )

    @property
    def reason(self) -> str:
        """What happened."""
        return self.value[0]

    @property
    def remedy(self) -> str:
        """What to change."""
        return self.value[1]
