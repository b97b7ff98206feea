"""Matrix-free curvature over whole data sets: Hessian, generalised Gauss-Newton, mixed and preconditioned operators.

Every operator is symmetric d x d, never formed, and takes `@` on one vector (d,) or a block (d, k). A product walks the
data once in mini-batches; a block shares the primal pass of each batch among its k vectors.
"""

from __future__ import annotations

import abc

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from stabkit._validate import check_real
from stabkit.curvature.jacobian import jvp_block, vjp_block
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.samples import Samples

DEFAULT_BATCH = 512


class CurvatureOperator(abc.ABC):
    """Symmetric matrix of order d known by its products.

    Attributes:
        shape: (d, d).
        dtype: Floating dtype of the products.
        device: Where they are computed.
        products: Vectors multiplied so far, for accounting.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device
        self.products = 0

    @abc.abstractmethod
    def _matmat(self, block: Tensor) -> Tensor:
        """Product with a block (d, k)."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() not in {1, 2} or vectors.shape[0] != self.shape[0]:
            raise ValueError(
                f"`{type(self).__name__}` @ vectors must get shape ({self.shape[0]},) or ({self.shape[0]}, k); got "
                f"{tuple(vectors.shape)}."
            )
        block = vectors.to(self.device, self.dtype).reshape(self.shape[0], -1)
        self.products += block.shape[1]
        return self._matmat(block).reshape(vectors.shape)

    def to_scipy(self) -> LinearOperator:
        """The operator for SciPy's solvers, in float64 at the interface.

        Returns:
            A `scipy.sparse.linalg.LinearOperator` of shape (d, d).
        """

        def product(array: np.ndarray) -> np.ndarray:
            vectors = torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)
            return (self @ vectors).double().cpu().numpy()

        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, dtype=np.float64)


class HessianOperator(CurvatureOperator):
    """Mean Hessian of the loss over one set, H_S (theory §1).

    Cost of a product with k vectors: per sample one gradient and k double backward passes, about 2k + 1 gradients.
    Memory: one batch's graph, times the vectors multiplied at once.
    """

    def __init__(
        self,
        problem: UnlearningProblem,
        samples: Samples,
        *,
        indices: Tensor | None = None,
        batch_size: int = DEFAULT_BATCH,
    ) -> None:
        super().__init__(problem.size, problem.dtype, problem.device)
        self._problem = problem
        self._samples = samples
        self._indices = torch.arange(samples.size) if indices is None else indices
        self._batch_size = batch_size

    def _matmat(self, block: Tensor) -> Tensor:
        problem = self._problem
        total = torch.zeros_like(block, dtype=torch.float64)
        leaves = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
        parameters = list(leaves.values())
        for inputs, targets in self._samples.batches(self._batch_size, self._indices):
            with torch.enable_grad():
                losses = problem.loss.per_sample(problem.outputs(leaves, inputs), targets)
                gradient = torch.autograd.grad(losses.sum(), parameters, create_graph=True)
            # v -> Hv = d(g·v)/dθ, batched over the k columns; the graph of g is built once.
            columns = torch.autograd.grad(
                gradient,
                parameters,
                grad_outputs=[
                    v.reshape(-1, *p.shape)
                    for v, p in zip(block.T.split([p.numel() for p in parameters], dim=1), parameters, strict=True)
                ],
                is_grads_batched=True,
                allow_unused=True,
                materialize_grads=True,
            )
            total += torch.cat([c.reshape(block.shape[1], -1) for c in columns], dim=1).T
        return (total / self._indices.numel()).to(self.dtype)


class GGNOperator(CurvatureOperator):
    """Mean generalised Gauss-Newton matrix over one set, mean_i J_i^T Λ_i J_i (theory §5). Positive semi-definite.

    Cost of a product with k vectors: per sample k forward-mode and k reverse passes, about 2k gradients.
    """

    def __init__(
        self,
        problem: UnlearningProblem,
        samples: Samples,
        *,
        indices: Tensor | None = None,
        batch_size: int = DEFAULT_BATCH,
    ) -> None:
        super().__init__(problem.size, problem.dtype, problem.device)
        self._problem = problem
        self._samples = samples
        self._indices = torch.arange(samples.size) if indices is None else indices
        self._batch_size = batch_size

    def _matmat(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block, dtype=torch.float64)
        for inputs, targets in self._samples.batches(self._batch_size, self._indices):
            outputs, tangents = jvp_block(self._problem, inputs, block)  # V -> JV: (b, O, k)
            curved = self._problem.loss.hessian_apply(outputs, targets, tangents)  # ΛJV: (b, O, k)
            total += vjp_block(self._problem, inputs, curved)  # J^TΛJV: (d, k)
        return (total / self._indices.numel()).to(self.dtype)


class MixedOperator(CurvatureOperator):
    """(1-α) H_R - α H_F, the matrix that governs the mean of a step (T3). Indefinite in general."""

    def __init__(self, retain: CurvatureOperator, forget: CurvatureOperator, mix: float) -> None:
        super().__init__(retain.shape[0], retain.dtype, retain.device)
        self.retain = retain
        self.forget = forget
        self.mix = check_real(mix, name="mix", owner="MixedOperator", low=0, high=1)

    def _matmat(self, block: Tensor) -> Tensor:
        result = torch.zeros_like(block)
        if self.mix < 1:
            result += (1 - self.mix) * (self.retain @ block)
        if self.mix > 0:
            result -= self.mix * (self.forget @ block)
        return result


class PreconditionedOperator(CurvatureOperator):
    """P^{1/2} H P^{1/2}: the operator in the coordinates where a preconditioned step is a plain one (T2)."""

    def __init__(self, operator: CurvatureOperator, preconditioner: Preconditioner) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self._operator = operator
        self._preconditioner = preconditioner

    def _matmat(self, block: Tensor) -> Tensor:
        return self._preconditioner.sqrt(self._operator @ self._preconditioner.sqrt(block))


def curvature_operator(
    problem: UnlearningProblem, samples: Samples, *, kind: str, indices: Tensor | None = None
) -> CurvatureOperator:
    """The Hessian or Gauss-Newton operator of one set.

    Args:
        problem: The unlearning problem.
        samples: Which set.
        kind: "hessian" or "ggn".
        indices: Which of its samples; all when None.

    Returns:
        The operator.
    """
    cls = HessianOperator if kind == "hessian" else GGNOperator
    return cls(problem, samples, indices=indices)
