"""What an unlearning algorithm is to stabkit: a preconditioner, a mix, a batch scheme and stop rules (T1).

    θ⁺ = θ - η_k P [ (1-α_k) ĝ_R(θ) - α_k ĝ_F(θ) ]

The runner and the rollout both read these four, so a new algorithm is a small subclass and is predicted unchanged.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from stabkit._validate import check_choice, check_int, check_real
from stabkit.preconditioner import Identity, Preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.sampling import SAMPLINGS


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a run ends before its last step. Evaluated by the runner and by the rollout on the same quantities.

    Attributes:
        drift_tolerance: Stop when one step moves the parameters by less than this share of their norm; None: never.
        leakage_bound: Stop when the mean KL divergence, in nats, from the original model's predictions on the forget
            batch to the current ones passes this; None: never.
    """

    drift_tolerance: float | None = None
    leakage_bound: float | None = None

    @property
    def active(self) -> bool:
        """Whether any condition is set."""
        return self.drift_tolerance is not None or self.leakage_bound is not None

    def decide(self, drift: Tensor, leakage: Tensor | None) -> Tensor:
        """Whether to stop, elementwise.

        Args:
            drift: Relative parameter change of the last step, any shape.
            leakage: Mean prediction divergence on the forget batch before the step, the same shape; None if unused.

        Returns:
            Boolean tensor of the same shape.
        """
        stop = torch.zeros_like(drift, dtype=torch.bool)
        if self.drift_tolerance is not None:
            stop |= drift < self.drift_tolerance
        if self.leakage_bound is not None and leakage is not None:
            stop |= leakage > self.leakage_bound
        return stop


@dataclass(frozen=True, kw_only=True)
class Algorithm(abc.ABC):
    """One unlearning algorithm with its settings. Immutable; `replace` gives a changed copy.

    Attributes:
        lr: Step size η > 0.
        mix: α in [0, 1]: 0 descends on the retain set alone, 1 ascends on the forget set alone.
        steps: Number of steps K >= 1.
        batch_size: Retain samples a step, B_R.
        forget_batch_size: Forget samples a step, B_F; the smaller of `batch_size` and the forget set when None.
        sampling: "without_replacement" (a shuffling loader that drops a last short batch), "with_replacement" or
            "poisson" (every sample enters with probability B/n; sums are divided by B).
        momentum: Heavy-ball momentum β in [0, 1).
    """

    name: ClassVar[str]
    # Settings among those below that a subclass's preconditioner reads: a prediction for another value measures anew.
    preconditioner_reads: ClassVar[frozenset[str]] = frozenset()

    lr: float = 0.01
    mix: float = 0.5
    steps: int = 100
    batch_size: int = 64
    forget_batch_size: int | None = None
    sampling: str = "without_replacement"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        remedy = "The sign of each part is set by `mix`."
        lr = check_real(self.lr, name="lr", owner=owner, low=0, low_open=True, remedy=remedy)
        remedy = "0 is retain only, 1 is forget only."
        mix = check_real(self.mix, name="mix", owner=owner, low=0, high=1, remedy=remedy)
        plain: dict[str, float] = {"lr": lr, "mix": mix}
        plain["steps"] = check_int(self.steps, name="steps", owner=owner, low=1)
        plain["batch_size"] = check_int(self.batch_size, name="batch_size", owner=owner, low=1)
        if self.forget_batch_size is not None:
            size = check_int(self.forget_batch_size, name="forget_batch_size", owner=owner, low=1)
            plain["forget_batch_size"] = size
        check_choice(self.sampling, name="sampling", owner=owner, choices=SAMPLINGS)
        plain["momentum"] = check_real(self.momentum, name="momentum", owner=owner, low=0, high=1, high_open=True)
        for key, value in plain.items():  # NumPy scalars become Python's, which reports can write
            object.__setattr__(self, key, value)

    def preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """P, computed once at the trained parameters.

        Args:
            problem: The unlearning problem.

        Returns:
            The preconditioner; the identity unless a subclass says otherwise.
        """
        return Identity()

    def preconditioner_cost(self, problem: UnlearningProblem) -> float:
        """What `preconditioner` takes.

        Args:
            problem: The unlearning problem.

        Returns:
            Per-sample gradient evaluations; 0 for the identity.
        """
        return 0.0

    def stop_rule(self) -> StopRule:
        """When the run ends early.

        Returns:
            The rule; never, unless a subclass says otherwise.
        """
        return StopRule()

    def batch_sizes(self, problem: UnlearningProblem) -> tuple[int, int]:
        """B_R and B_F for a problem.

        Args:
            problem: The unlearning problem.

        Returns:
            Retain and forget batch size.

        Raises:
            ValueError: If a batch would be larger than its set.
        """
        n_retain, n_forget = problem.retain.size, problem.forget.size
        if self.batch_size > n_retain and self.mix < 1:
            raise ValueError(
                f"`batch_size` of `{type(self).__name__}` must be at most the retain set's {n_retain} samples; got "
                f"{self.batch_size}. Use a smaller batch."
            )
        if self.forget_batch_size is None:
            return min(self.batch_size, n_retain), min(self.batch_size, n_forget)
        if self.forget_batch_size > n_forget and self.mix > 0:
            raise ValueError(
                f"`forget_batch_size` of `{type(self).__name__}` must be at most the forget set's {n_forget} samples; got "
                f"{self.forget_batch_size}. Use a smaller batch, or leave it out."
            )
        return min(self.batch_size, n_retain), min(self.forget_batch_size, n_forget)

    def replace(self, **changes: object) -> Algorithm:
        """A copy with some settings changed.

        Args:
            **changes: Settings by name.

        Returns:
            A new algorithm of the same class.

        Raises:
            TypeError: If a setting does not exist.
        """
        known = {f.name for f in fields(self)}
        for key in changes:
            if key not in known:
                raise TypeError(f"`{type(self).__name__}` has no setting {key!r}; it has {', '.join(sorted(known))}.")
        return type(self)(**{**self.settings(), **changes})  # type: ignore[arg-type]

    def settings(self) -> dict[str, object]:
        """All settings by name.

        Returns:
            Plain values, as the constructor takes them.
        """
        return {f.name: getattr(self, f.name) for f in fields(self)}
