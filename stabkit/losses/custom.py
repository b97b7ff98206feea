"""A caller's own per-sample loss, with its derivatives found automatically."""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from stabkit._memory import is_out_of_memory
from stabkit.losses.base import NAMED, Loss, PerSampleLoss

STEPS, GRADIENT = 500, 1e-8  # of the search for the best constant output, at most and when to stop
UNBOUNDED = 1e6  # a mean loss that falls by so many times its size has no minimum


class CustomLoss(Loss):
    """A caller's own per-sample loss, differentiated automatically; in single precision where it holds tensors of that.

    Its output Hessian is found sample by sample and its negative eigenvalues are dropped, as generalised Gauss-Newton
    curvature needs a convex loss in the outputs. Cost O(m·O³), so meant for few outputs a sample.
    """

    def __init__(self, function: PerSampleLoss) -> None:
        self.function = function
        name = getattr(function, "__name__", type(function).__name__)
        self.name = f"custom {name}" if name in NAMED else name  # the caller's own is not the library's

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The caller's loss of every sample.

        Args:
            outputs: Network outputs, shape (m, ...).
            targets: Targets of the same m samples.

        Returns:
            Losses, shape (m,).

        Raises:
            TypeError: If the callable does not return a tensor.
            ValueError: If it does not return one loss a sample.
        """
        losses = self._called(outputs, targets)
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"`loss` must return a tensor of per-sample losses; {self.name!r} returned {type(losses).__name__}."
            )
        if losses.shape != outputs.shape[:1]:
            raise ValueError(
                f"`loss` must return one loss per sample, shape ({outputs.shape[0]},); {self.name!r} returned shape "
                f"{tuple(losses.shape)}. Use reduction='none' and average over everything but the first axis."
            )
        return losses

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the summed losses in the outputs.

        Args:
            outputs: Network outputs, shape (m, ...).
            targets: Targets of the same m samples.

        Returns:
            Tensor of the outputs' shape.
        """
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.per_sample(leaf, targets).sum(), leaf)
        return gradient

    def hessian_apply(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """Λ X with Λ's negative part dropped.

        Args:
            outputs: Network outputs, shape (m, ...), O numbers a sample.
            targets: Targets of the same m samples.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k).
        """
        factor = self._factor(outputs, targets)
        return factor @ (factor.transpose(1, 2) @ block)

    def factor_transpose(self, outputs: Tensor, targets: Tensor, block: Tensor) -> Tensor:
        """L^T X with L from the eigendecomposition of Λ.

        Args:
            outputs: Network outputs, shape (m, ...), O numbers a sample.
            targets: Targets of the same m samples.
            block: X of shape (m, O, k).

        Returns:
            Tensor of shape (m, O, k).
        """
        return self._factor(outputs, targets).transpose(1, 2) @ block

    def check_targets(self, outputs: Tensor, targets: Tensor, *, name: str) -> None:
        """The loss must take these outputs and targets, and outputs beyond those seen, as a linearised network gives them.

        Args:
            outputs: Outputs of at least one sample.
            targets: Targets of the whole set.
            name: The set's name, for the message.

        Raises:
            TypeError: If the callable fails on the outputs.
            ValueError: If it refuses outputs a little beyond.
        """
        if outputs.dim() < 2:
            return  # the problem says what is wrong with that
        some = targets[: outputs.shape[0]]
        try:
            found = self._called(outputs, some)
        except Exception as error:  # whatever a caller's function may raise
            if is_out_of_memory(error):
                raise
            raise TypeError(
                f"`loss` must take (outputs, targets) and give losses of shape (m,); {self.name!r} fails on outputs "
                f"{tuple(outputs.shape)} and targets {tuple(some.shape)} {some.dtype} of `{name}` with "
                f"{type(error).__name__}: {error}."
            ) from error
        if not isinstance(found, Tensor):
            return  # `per_sample` says so
        for beyond in (-1, 1):
            there = outputs + beyond * (1 + outputs.abs()).where(outputs.isfinite(), 0)
            cause: Exception | None = None
            said = "it is not a number"
            try:
                bad = bool(self._called(there, some).isnan().any())
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                bad, cause, said = True, error, str(error)
            if bad:
                raise ValueError(
                    f"`loss` must be defined for all outputs, as a linearised network's may be any; {self.name!r} is not "
                    f"for some beyond those of the model ({said}). Let the model return raw outputs, and use a loss of "
                    "logits or of logarithms: binary_cross_entropy_with_logits in place of binary_cross_entropy."
                ) from cause

    def constant_level(self, outputs: Tensor, targets: Tensor) -> float:
        """Mean loss of the best constant output.

        Args:
            outputs: Outputs of at least one sample; the search starts at their mean, where the loss is defined.
            targets: Targets of the whole set.

        Returns:
            The smallest mean loss reached. Cost: up to 500 steps of up to O Hessian products of the loss over the whole set.

        Raises:
            RuntimeError: If the loss fails on a constant output.
            ValueError: If the search leaves the numbers or falls without end, or the loss has no second derivative.
        """
        data = targets.double() if targets.is_floating_point() else targets
        shape = outputs.shape[1:]

        def mean_loss(constant: Tensor) -> Tensor:
            return self.per_sample(constant.reshape(1, *shape).expand(data.shape[0], *shape), data).mean()

        first = outputs.detach().double().mean(0).reshape(-1)
        start = float(mean_loss(first))
        try:
            level = _minimum(mean_loss, first)
        except RuntimeError as error:  # a NotImplementedError is one
            if "derivative for" not in str(error):
                raise
            raise ValueError(
                f"`loss` must be differentiable twice; got {self.name!r}, of which PyTorch has no second derivative "
                f"({error}). Write it with operations that have one."
            ) from error
        if not math.isfinite(level) or level < start - UNBOUNDED * (1 + abs(start)):
            raise ValueError(
                f"`loss` must have a smallest mean over constant outputs, as divergence is measured against it; that of "
                f"{self.name!r} fell from {start:.4g} to {level:.4g}. Use a loss of raw outputs; where the "
                "model returns log-probabilities, loss='cross_entropy' gives the same numbers."
            )
        return level

    def _called(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The caller's function, in single precision where double does not go with tensors of its own; (m, 1) as (m,)."""
        try:
            return _one_each(self.function(outputs, targets), outputs)
        except RuntimeError as error:
            if outputs.dtype != torch.float64 or is_out_of_memory(error):
                raise
            plain = targets.float() if targets.is_floating_point() else targets
            return _one_each(self.function(outputs.float(), plain), outputs).double()

    def _factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """L of shape (m, O, O) with LL^T the positive part of every Λ_i."""
        flat = outputs.detach().reshape(outputs.shape[0], -1)
        shape = outputs.shape[1:]

        def single(row: Tensor, target: Tensor) -> Tensor:
            return self._called(row.reshape(1, *shape), target.unsqueeze(0))[0]

        try:
            hessian = torch.func.vmap(torch.func.hessian(single))(flat, targets)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Control flow that depends on values: sample by sample.
            with torch.enable_grad():
                found = [
                    torch.autograd.functional.hessian(lambda row, y=y: single(row, y), row)
                    for row, y in zip(flat, targets, strict=True)
                ]
            hessian = torch.stack(found)
        values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.transpose(1, 2)))
        return vectors * values.clamp_min(0).sqrt().unsqueeze(1)


def _minimum(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Value that a trust-region method (Steihaug 1983) reaches from x, shape (O,), by Hessian products, O a step at most."""

    def value(at: np.ndarray) -> float:
        try:
            result = float(function(torch.as_tensor(at, device=x.device)))
        except (RuntimeError, ValueError):  # as PyTorch's own losses raise outside their domain, which is never entered
            return math.inf
        return math.inf if math.isnan(result) else result

    @torch.enable_grad()
    def slope(at: np.ndarray, *, graph: bool = False) -> tuple[Tensor, Tensor]:
        leaf = torch.tensor(at, device=x.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=graph)
        return leaf, gradient

    @torch.enable_grad()
    def product(at: np.ndarray, along: np.ndarray) -> np.ndarray:
        leaf, gradient = slope(at, graph=True)
        if not gradient.requires_grad:  # of a loss without curvature
            return np.zeros_like(along)
        direction = torch.as_tensor(along, device=x.device)
        found = torch.autograd.grad(gradient @ direction, leaf, allow_unused=True)[0]
        return np.zeros_like(along) if found is None else _finite(found)

    def finite_slope(at: np.ndarray) -> np.ndarray:
        return _finite(slope(at)[1])

    start = x.cpu().numpy()
    result = minimize(
        value,
        start,
        jac=finite_slope,
        hessp=product,
        method="trust-ncg",
        options={"gtol": GRADIENT, "maxiter": STEPS, "max_trust_radius": 1e12},
    )
    steeper = np.linalg.norm(result.jac) > UNBOUNDED * (1 + np.linalg.norm(finite_slope(start)))
    return -math.inf if steeper and not result.success else float(result.fun)  # it falls the faster the further it goes


def _finite(found: Tensor) -> np.ndarray:
    """A derivative; none where it does not exist, which ends the search there or makes its step one of plain descent."""
    plain = found.detach().cpu().numpy()
    return plain if np.isfinite(plain).all() else np.zeros_like(plain)


def _one_each(losses: Tensor, outputs: Tensor) -> Tensor:
    """What a loss of one output a sample returns, without the output's axis."""
    one = isinstance(losses, Tensor) and losses.shape == (outputs.shape[0], 1)
    return losses.squeeze(1) if one else losses
