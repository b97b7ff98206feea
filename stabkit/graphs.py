"""The network's passes as CUDA graphs: recorded once for each shape of batch, then replayed.

A step of a small batch is some hundred short kernels, and the time goes into launching them one by one from Python. A graph
launches all of them at once. benchmarks/gpu/results.md says what that gains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from stabkit.problem import UnlearningProblem
from stabkit.samples import Inputs, layout, map_tensors, tensors_of

MOST_SHAPES = 4  # a graph keeps the memory of its passes; batches of further shapes are passed as ever


class NetworkGraphs:
    """Outputs of a network at changing parameters and batches, from recorded passes.

    Attributes:
        problem: The unlearning problem.
        lowered: Whether passes are under bfloat16 autocast.
    """

    def __init__(self, problem: UnlearningProblem, *, lowered: bool) -> None:
        self.problem, self.lowered = problem, lowered
        self._recorded: dict[Hashable, Callable[..., Tensor]] = {}

    def outputs(self, theta: Tensor, inputs: Inputs) -> Tensor | None:
        """What the network says, differentiable in its parameters.

        Gradients must be enabled.

        Args:
            theta: Parameters of shape (d,) that require gradients.
            inputs: Inputs of b samples.

        Returns:
            Outputs of shape (b, ...), which the next call overwrites; None for a batch of one shape too many. Cost: one
            forward pass, and a backward pass when it is differentiated; the first call of each shape takes several of both,
            and their memory stays taken.

        Raises:
            RuntimeError: If the network does what cannot be recorded, such as reading a number from the device.
        """
        tensors = list(tensors_of(inputs))
        kind = layout(inputs), tuple(t.shape for t in tensors)
        # On the problem's device, whatever the caller's is: recording is about the current one's stream.
        with torch.cuda.device(self.problem.device) if self.problem.device.type == "cuda" else nullcontext():
            if kind not in self._recorded:
                if len(self._recorded) == MOST_SHAPES:
                    return None
                self._recorded[kind] = self._record(theta, inputs)
            return self._recorded[kind](theta, *tensors)

    def _record(self, theta: Tensor, inputs: Inputs) -> Callable[..., Tensor]:
        """Warm up and record both passes of one shape of batch."""

        def passed(vector: Tensor, *tensors: Tensor) -> Tensor:
            given = iter(tensors)
            lowered = torch.autocast(
                self.problem.device.type, torch.bfloat16, enabled=self.lowered, cache_enabled=False
            )
            with lowered:
                return self.problem.outputs(self.problem.unflatten(vector), map_tensors(lambda _: next(given), inputs))

        samples = (theta.detach().clone().requires_grad_(), *(t.clone() for t in tensors_of(inputs)))
        try:
            with warnings.catch_warnings():
                # Recorded gradients come from torch.autograd.grad, which accumulates nothing.
                warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
                recorded = torch.cuda.make_graphed_callables(passed, samples)
        except RuntimeError as error:
            raise RuntimeError(
                f"`cuda_graphs` of `run` needs a network whose passes can be recorded; {self.problem.model_name} said: "
                f"{error}. Leave it out."
            ) from error
        return cast(Callable[..., Tensor], recorded)


def check_graphs(problem: UnlearningProblem) -> None:
    """Refuse what cannot be recorded.

    Args:
        problem: The unlearning problem.

    Raises:
        ValueError: If it is not on a GPU, or its BatchNorm follows the batches.
    """
    if problem.device.type != "cuda":
        raise ValueError(
            f"`cuda_graphs` of `run` needs a problem on a GPU; got one on {str(problem.device)!r}. Leave it out, or build "
            "the problem with device='cuda'."
        )
    if problem.batchnorm == "batch":
        raise ValueError(
            "`cuda_graphs` of `run` needs batchnorm='frozen'; got 'batch', whose running statistics change in every pass. "
            "Leave it out."
        )
