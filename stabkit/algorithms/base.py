"""What an unlearning algorithm is to stabkit: a preconditioner, a mix, a batch scheme, a plan of steps and stop rules (T1).

    g = clip( P [ (1-α) ρ_k ĝ_R(θ) - α φ_k ĝ_F(θ) ] ) + γ P θ,   v⁺ = β v + g,   θ⁺ = θ - η κ_k v⁺

with κ_k, ρ_k, φ_k the plan's factors, all 1 unless a schedule says otherwise, and ĝ the batch means of the loss's
derivatives, or of what a subclass puts in their place. With optimizer="adamw" the clipped g goes through AdamW (T15). The
runner and the rollout both read these, so a new algorithm is a small subclass and is predicted unchanged.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from stabkit._memory import sent
from stabkit._validate import check_choice, check_int, check_real
from stabkit.algorithms.contract import check_class
from stabkit.algorithms.layers import checked_factors, is_within, layer_factor
from stabkit.algorithms.plan import StepPlan, StopRule, checked_schedule, factors_of
from stabkit.losses import Loss
from stabkit.preconditioner import Diagonal, Identity, Preconditioner, check_preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.reading import READS
from stabkit.sampling import SAMPLINGS

OPTIMIZERS = ("sgd", "adamw")
# Own bound: every rollout takes each of them, whatever the network, and a plan holds them all.
MOST_STEPS = 10**6


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One set's batch as an algorithm's loss sees it: one in a run, C of them side by side in a rollout.

    Those are one for each seed and setting, the settings of one seed after those of another; the settings of a seed have the
    same b samples.

    Attributes:
        outputs: Current outputs of C·b samples, shape (C·b, ...); the b samples of one batch follow those of another.
        targets: Their targets, shape (C·b, ...).
        original: Outputs at θ*, of the outputs' shape; None for an algorithm without `needs_original`, unless its rollout
            watches the leakage.
        copies: C; 1 in a run.
        step: Number of the step, from 1.
        seeds: Seeds of the runs, each for equally many of the batches.
    """

    outputs: Tensor
    targets: Tensor
    original: Tensor | None
    copies: int
    step: int
    seeds: tuple[int, ...]

    def drawn(self, draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> Tensor:
        """Random values for every target, which belong to this step of a run, the same in a run and in its rollout.

        Args:
            draw: Gives values of a shape, that of one batch's targets, from a fresh generator.

        Returns:
            Values of the targets' shape and dtype; all settings of a seed have the same.
        """
        shape = self.targets.shape[0] // self.copies, *self.targets.shape[1:]
        parts = [
            torch.from_numpy(draw(np.random.default_rng([seed, self.step]), shape)).repeat(
                self.copies // len(self.seeds), *[1] * (len(shape) - 1)
            )
            for seed in self.seeds
        ]
        return sent(torch.cat(parts).to(self.targets.dtype), self.targets.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainSteps(Identity):
    """P = I, with what else an algorithm takes from θ* and the rollout has to know.

    Attributes:
        forget_mask: 0/1 mask of the forget gradients alone, shape (d,); None: all ones.
        signs: sign(θ*), shape (d,), which a pull towards zero goes against; None where there is none.
    """

    forget_mask: Tensor | None = None
    signs: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Algorithm(abc.ABC):
    """One unlearning algorithm with its settings. Immutable; `replace` gives a changed copy.

    Attributes:
        lr: Step size η > 0.
        mix: α in [0, 1]: 0 descends on the retain set alone, 1 ascends on the forget set alone.
        steps: Number of steps K, in [1, 10⁶].
        batch_size: Retain samples a step, B_R.
        forget_batch_size: Forget samples a step, B_F; the smaller of `batch_size` and the forget set when None.
        sampling: "without_replacement" (a shuffling loader that drops a last short batch), "with_replacement" or
            "poisson" (every sample enters with probability B/n; sums are divided by B).
        momentum: Heavy-ball momentum β in [0, 1).
        nesterov: Nesterov's momentum instead, as torch.optim.SGD has it; needs a momentum above 0.
        weight_decay: γ >= 0; γθ joins the gradient before P and momentum, as in torch.optim.SGD. The rollout is exact for
            P = I and for masks; for another P it leaves out what decay moves out of its coordinates and back, which is of
            second order in γ.
        max_gradient_norm: Norm that Pĝ, the preconditioned gradient of the losses, is clipped to in every step, as by
            torch.nn.utils.clip_grad_norm_ with P applied to the gradients before; None: never. Of the plain gradient
            under P ≠ I a rollout knows no norm: what P takes away never enters its coordinates. `layer_lr` comes after, as
            groups' step sizes do; with SGD it holds no layer still then, whose gradients no rollout knows.
        lr_schedule: Factors of the step size: "cosine" or "linear" (from 1 towards 0 over the run), "warmup" (rising over
            its first tenth), K numbers >= 0, or None (all 1). `stabkit.schedules` makes them.
        forget_schedule: Factors of the forget gradient's weight, in the same forms.
        layer_lr: Factors >= 0 of the step size of single layers, by the beginning of their parameters' names, as parameter
            groups would have them: {"layer4": 0.1} damps what lies in layer4. Where several fit, the longest name counts;
            other layers keep 1. P becomes D^{1/2} P D^{1/2} with these factors in D, for a P that is diagonal; AdamW's steps
            are multiplied by them.
        layer_weight_decay: Factors >= 0 of γ of single layers, in the same form: {"norm": 0, "fc.bias": 0} lets those alone.
        forget_every: Cycles of so many steps, >= 2: the first of each cycle is a forget step of weight α, the others are
            retain steps of weight 1-α. Both sets in every step when None.
        optimizer: "sgd", which has momentum, Nesterov's and decay as above, or "adamw", whose steps are those of
            torch.optim.AdamW: the gradient, after P and clipping, is divided by the root of its running mean square, and
            γθ is decoupled from it, but for what P holds still (T15). P must then be diagonal, and `momentum` 0, to which a
            class's usual one falls.
        betas: β₁ and β₂ of AdamW, in [0, 1).
        eps: AdamW's ε > 0.
    """

    name: ClassVar[str]
    # Whether `retain_residual` or `forget_residual` read the outputs at θ*, which cost a run a forward pass.
    needs_original: ClassVar[bool] = False
    # What the residuals read of the outputs, one of `READS`; a subclass with residuals of its own says so itself.
    residual_reads: ClassVar[str] = "loss"
    # Whether the algorithm has but one mix, as gradient ascent has 1 and fine-tuning 0.
    fixed_mix: ClassVar[bool] = False
    # Settings among those below that a subclass's preconditioner reads: a prediction for another value measures anew. Maps
    # and critical values keep P as it is at the value asked about.
    preconditioner_reads: ClassVar[frozenset[str]] = frozenset()

    lr: float = 0.01
    mix: float = 0.5
    steps: int = 100
    batch_size: int = 64
    forget_batch_size: int | None = None
    sampling: str = "without_replacement"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    max_gradient_norm: float | None = None
    lr_schedule: str | Sequence[float] | None = None
    forget_schedule: str | Sequence[float] | None = None
    forget_every: int | None = None
    layer_lr: Mapping[str, float] | None = None
    layer_weight_decay: Mapping[str, float] | None = None
    optimizer: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        check_choice(cls.residual_reads, name="residual_reads", owner=cls.__name__, choices=READS)
        if not isinstance(getattr(cls, "name", None), str):
            raise TypeError(
                f"`name` of `{cls.__name__}` must be a string, as every Algorithm has one that reports carry; got "
                f"{getattr(cls, 'name', None)!r}. Write name = {cls.__name__.lower()!r} in the class."
            )

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if type(self) is Algorithm:
            raise TypeError("`Algorithm` is what algorithms are made from and none itself. Use GradDiff for P = I.")
        check_class(type(self))
        remedy = "A small one takes small steps; which loss is ascended is set by `mix`."
        lr = check_real(self.lr, name="lr", owner=owner, low=0, low_open=True, remedy=remedy)
        remedy = "0 is retain only, 1 is forget only."
        mix = check_real(self.mix, name="mix", owner=owner, low=0, high=1, remedy=remedy)
        plain: dict[str, object] = {"lr": lr, "mix": mix}
        steps = check_int(self.steps, name="steps", owner=owner, low=1)
        remedy = "Each is taken, by a run and by every rollout of it: ask about the first ones."  # of too many
        plain["steps"] = check_int(steps, name="steps", owner=owner, low=1, high=MOST_STEPS, remedy=remedy)
        plain["batch_size"] = check_int(self.batch_size, name="batch_size", owner=owner, low=1)
        if self.forget_batch_size is not None:
            size = check_int(self.forget_batch_size, name="forget_batch_size", owner=owner, low=1)
            plain["forget_batch_size"] = size
        check_choice(self.sampling, name="sampling", owner=owner, choices=SAMPLINGS)
        plain |= self._checked_optimizer()
        plain["momentum"] = check_real(self.momentum, name="momentum", owner=owner, low=0, high=1, high_open=True)
        if self.adaptive:
            plain["momentum"] = 0.0
        if not isinstance(self.nesterov, bool | np.bool_):
            raise TypeError(f"`nesterov` of `{owner}` must be True or False; got {self.nesterov!r}.")
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                f"`momentum` of `{owner}` must be above 0 with nesterov=True; got {self.momentum!r}. Leave `nesterov` out: "
                "without momentum there is nothing to look ahead along."
            )
        plain["nesterov"] = bool(self.nesterov)
        plain["weight_decay"] = check_real(self.weight_decay, name="weight_decay", owner=owner, low=0)
        if self.max_gradient_norm is not None:
            norm = check_real(
                self.max_gradient_norm,
                name="max_gradient_norm",
                owner=owner,
                low=0,
                low_open=True,
                remedy="None clips nothing.",
            )
            plain["max_gradient_norm"] = norm
        for key in ("lr_schedule", "forget_schedule"):
            plain[key] = checked_schedule(getattr(self, key), int(self.steps), name=key, owner=owner)
        if self.forget_every is not None:
            remedy = "None takes both sets in every step; mix=1 takes forget steps alone."
            every = check_int(self.forget_every, name="forget_every", owner=owner, low=2, remedy=remedy)
            plain["forget_every"] = every
        for key in ("layer_lr", "layer_weight_decay"):
            plain[key] = checked_factors(getattr(self, key), key, owner)
        still = [name for name, factor in (self.layer_lr or {}).items() if factor == 0]
        if still and self.max_gradient_norm is not None and not self.adaptive:
            raise ValueError(
                f"`layer_lr` of `{owner}` must be above 0 with max_gradient_norm={self.max_gradient_norm!r} and SGD, as "
                f"gradients of layers that stand still count for torch.nn.utils.clip_grad_norm_ too; got 0 for {still[0]!r}."
                " Freeze them in the model with requires_grad_(False), or clip nothing with max_gradient_norm=None."
            )
        for key, value in plain.items():  # NumPy scalars become Python's, which reports can write
            object.__setattr__(self, key, value)

    def _checked_optimizer(self) -> dict[str, object]:
        """What AdamW is set to, in plain values."""
        owner = type(self).__name__
        if isinstance(self.optimizer, torch.optim.Optimizer):
            kind = type(self.optimizer).__name__
            raise TypeError(
                f"`optimizer` of `{owner}` must be 'sgd' or 'adamw'; got a {kind} object. `predict` takes that, and "
                f"{owner}(**stabkit.algorithms.optimizer_settings(optimizer, model)) its settings."
            )
        check_choice(self.optimizer, name="optimizer", owner=owner, choices=OPTIMIZERS)
        if self.adaptive and self.nesterov:
            raise ValueError(
                f"`nesterov` of `{owner}` must be False with optimizer='adamw'; got True. AdamW has momentum of its own: "
                "leave out `momentum` too."
            )
        if self.adaptive and self.momentum not in {0, type(self).momentum}:
            raise ValueError(
                f"`momentum` of `{owner}` must be 0 with optimizer='adamw'; got {self.momentum!r}. Its own is betas[0]: set "
                "momentum=0."
            )
        given = self.betas.tolist() if isinstance(self.betas, np.ndarray | Tensor) else self.betas
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
            raise TypeError(
                f"`betas` of `{owner}` must be two numbers; got {self.betas!r:.60}. PyTorch's are (0.9, 0.999)."
            )
        betas = tuple(
            check_real(value, name=f"betas[{k}]", owner=owner, low=0, high=1, high_open=True)
            for k, value in enumerate(given)
        )
        return {"betas": betas, "eps": check_real(self.eps, name="eps", owner=owner, low=0, low_open=True)}

    @property
    def adaptive(self) -> bool:
        """Whether steps are AdamW's.

        Returns:
            True for "adamw".
        """
        return self.optimizer == "adamw"

    @property
    def inertia(self) -> float:
        """β of the linear theory: what of a step the next one carries on.

        Returns:
            `momentum`, or β₁ of AdamW.
        """
        return self.betas[0] if self.adaptive else self.momentum

    def preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """P, computed once at the trained parameters.

        A subclass whose P goes by one of the settings above names it in `preconditioner_reads`; its own go without saying.

        Args:
            problem: The unlearning problem.

        Returns:
            The preconditioner; the identity unless a subclass says otherwise.
        """
        return Identity()

    def step_preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """P as the steps have it: `preconditioner`, with the factors of `layer_lr` but for AdamW.

        Args:
            problem: The unlearning problem.

        Returns:
            The preconditioner.

        Raises:
            TypeError: If `preconditioner` gives anything but a preconditioner.
            ValueError: If that is no symmetric positive semi-definite matrix of the problem's size with its root, a name of
                `layer_lr` fits no parameter, or P is not diagonal.
        """
        plain = self.preconditioner(problem)
        check_preconditioner(plain, problem.vector(), owner=type(self).__name__)
        factors = self.layer_factors(problem)
        if self.adaptive:
            if not isinstance(plain, Identity | Diagonal):
                raise ValueError(
                    f"`optimizer` of `{type(self).__name__}` must be 'sgd', as its P is no `Diagonal`; got 'adamw', which "
                    "takes each parameter by itself. Leave it out."
                )
            return plain
        if factors is None:
            return plain
        if type(plain) is Identity:
            return Diagonal(factors)
        if type(plain) is Diagonal:
            return Diagonal(plain.diagonal * factors.to(plain.diagonal))
        masked = isinstance(plain, PlainSteps)
        raise ValueError(
            f"`layer_lr` of `{type(self).__name__}` must be None, as "
            f"{'SGD goes by a mask or signs of its own there' if masked else 'its P is not diagonal'}; got "
            f"{dict(self.layer_lr or {})!r:.80}. Give all layers, or all groups of an optimizer, one step size"
            f"{', or take AdamW' if masked else ''}."
        )

    def layer_factors(self, problem: UnlearningProblem) -> Tensor | None:
        """`layer_lr` parameter by parameter.

        Args:
            problem: The unlearning problem.

        Returns:
            Factors of the step size, shape (d,); None where there are none.

        Raises:
            ValueError: If a name of `layer_lr` fits no parameter.
        """
        return self._by_parameter(problem, "layer_lr")

    def decay_factors(self, problem: UnlearningProblem) -> Tensor | None:
        """`layer_weight_decay` parameter by parameter.

        Args:
            problem: The unlearning problem.

        Returns:
            Factors of the weight decay, shape (d,); None where there are none.

        Raises:
            ValueError: If a name of `layer_weight_decay` fits no parameter.
        """
        return self._by_parameter(problem, "layer_weight_decay")

    def _by_parameter(self, problem: UnlearningProblem, setting: str) -> Tensor | None:
        """Factors of layers as a vector."""
        factors: Mapping[str, float] | None = getattr(self, setting)
        if factors is None:
            return None
        for name in factors:
            if not any(is_within(parameter, name) for parameter in (*problem.parameters, *problem.unreached)):
                layers = ", ".join(dict.fromkeys(problem.layer_of().values()))
                raise ValueError(
                    f"`{setting}` of `{type(self).__name__}` must name layers of the model; got {name!r}, which no "
                    f"trainable parameter begins with. There are {layers:.300}."
                )
        return torch.cat([
            torch.full((p.numel(),), layer_factor(parameter, factors), dtype=p.dtype, device=p.device)
            for parameter, p in problem.parameters.items()
        ])

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

    def plan(self) -> tuple[StepPlan, ...]:
        """What each of the K steps does.

        Returns:
            One entry a step, from the schedules and `forget_every`.
        """
        lrs, weights = (factors_of(schedule, self.steps) for schedule in (self.lr_schedule, self.forget_schedule))
        every = self.forget_every
        return tuple(
            StepPlan(
                lr=lr,
                retain=float(every is None or k % every > 0),
                forget=weight if every is None or k % every == 0 else 0.0,
                max_norm=self.max_gradient_norm,
            )
            for k, (lr, weight) in enumerate(zip(lrs, weights, strict=True))
        )

    def retain_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """Derivative in the outputs of what retain steps descend, sample by sample.

        Args:
            loss: The problem's loss.
            batch: The retain batch.

        Returns:
            Tensor of the outputs' shape; the loss's own derivative unless a subclass says otherwise.
        """
        return loss.residual(batch.outputs, batch.targets)

    def forget_residual(self, loss: Loss, batch: Batch) -> Tensor:
        """Derivative in the outputs of what forget steps climb, sample by sample.

        Args:
            loss: The problem's loss.
            batch: The forget batch.

        Returns:
            Tensor of the outputs' shape; the loss's own derivative unless a subclass says otherwise.
        """
        return loss.residual(batch.outputs, batch.targets)

    @property
    def ascends(self) -> bool:
        """Whether forget steps climb the forget loss, or something with its curvature.

        Returns:
            False where a subclass descends instead.
        """
        return True

    @property
    def outside_theory(self) -> tuple[str, ...]:
        """What these steps do that the linear theory (T3-T13), which has plain ascent and descent on the loss, does not.

        Returns:
            Clauses for a report; none where the theory is about all of it. A subclass adds its own.
        """
        own = any(
            getattr(type(self), name) is not getattr(Algorithm, name) for name in ("retain_residual", "forget_residual")
        )
        said = type(self).outside_theory is not Algorithm.outside_theory
        parts = {
            "losses are the algorithm's own": own and not said,
            "forget steps and retain steps take turns": self.forget_every is not None,
            "step sizes follow a schedule": self.lr_schedule is not None,
            "the forget set's weight follows a schedule": self.forget_schedule is not None,
            "gradients are clipped": self.max_gradient_norm is not None,
        }
        return tuple(part for part, there in parts.items() if there)

    @property
    def reads(self) -> str:
        """What a run depends on of the outputs, one of `READS`.

        Returns:
            The widest of what the residuals read, which is everything where a subclass has its own and does not say, and the
            labelled positions' distributions where a leakage bound is set.
        """
        kinds = [self._residual_reads(name) for name in ("retain_residual", "forget_residual")]
        if self.stop_rule().leakage_bound is not None:
            kinds.append("labelled")
        return max(kinds, key=READS.index)

    def _residual_reads(self, name: str) -> str:
        """What the class that defines a residual, or one made of it, says."""
        for kind in type(self).__mro__:
            if "residual_reads" in kind.__dict__:
                return str(kind.__dict__["residual_reads"])
            if name in kind.__dict__:
                return "all"
        raise AssertionError

    def check_problem(self, problem: UnlearningProblem) -> None:  # noqa: B027
        """Raise if the algorithm cannot be run on a problem.

        Args:
            problem: The unlearning problem.
        """

    def batch_sizes(self, problem: UnlearningProblem) -> tuple[int, int]:
        """B_R and B_F for a problem, which is checked.

        Args:
            problem: The unlearning problem.

        Returns:
            Retain and forget batch size.

        Raises:
            ValueError: If a batch would be larger than its set.
        """
        self.check_problem(problem)
        n_retain, n_forget = problem.retain.size, problem.forget.size
        if self.batch_size > n_retain and self.mix < 1:
            raise ValueError(
                f"`batch_size` of `{type(self).__name__}` must be at most the retain set's {n_retain} samples; got "
                f"{self.batch_size}. Give a smaller `batch_size`."
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
        known = {f.name for f in fields(self) if f.init}
        for key in changes:
            if key not in known:
                raise TypeError(f"`{type(self).__name__}` has no setting {key!r}; it has {', '.join(sorted(known))}.")
        return type(self)(**{**self.settings(), **changes})  # type: ignore[arg-type]

    def turned_into(self, kind: type[Algorithm]) -> Algorithm:
        """Another algorithm with what of the settings all have: steps, batches, schedules, optimiser.

        Args:
            kind: Its class.

        Returns:
            The algorithm; its mix is its own where it has but one.
        """
        shared = {f.name: getattr(self, f.name) for f in fields(Algorithm)}
        if kind.fixed_mix:
            del shared["mix"]
        return kind(**shared)

    def shortened(self, steps: int) -> Algorithm | None:
        """The same run, ended after fewer steps: schedules keep the factors they begin with and are not squeezed.

        `replace(steps=...)` asks for another run where a schedule has a name, or is counted from the run's length otherwise.

        Args:
            steps: How many, in [1, K].

        Returns:
            A new algorithm of the same class; None where no settings make such a run, as of `L1Sparse`, whose penalty always
            falls to 0. Cost: both plans, where a class has its own.

        Raises:
            ValueError: If there are fewer steps than that.
        """
        remedy = f"The run has {self.steps}."
        check_int(steps, name="steps", owner=f"{type(self).__name__}.shortened", low=1, high=self.steps, remedy=remedy)
        if steps == self.steps:
            return self
        beginning = self._beginning(steps)
        if beginning is None:
            return None
        cut = self.replace(**beginning)
        # A class's own plan may count from the end in ways that no setting follows.
        if type(self).plan is not Algorithm.plan and cut.plan() != self.plan()[:steps]:
            return None
        return cut

    def _beginning(self, steps: int) -> dict[str, object] | None:
        """What to set for the run's first steps alone: a class adds what else its plan counts from the run's length."""
        given = {key: getattr(self, key) for key in ("lr_schedule", "forget_schedule")}
        cut = {key: factors_of(value, self.steps)[:steps] for key, value in given.items() if value is not None}
        return {"steps": steps, **cut}

    def settings(self) -> dict[str, object]:
        """All settings by name.

        Returns:
            Plain values, as the constructor takes them and as JSON gives them back.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
