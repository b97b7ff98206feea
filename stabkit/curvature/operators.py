"""Symmetric matrix-free operators of order d, and how they combine: mixed, preconditioned, restricted.

Every operator takes `@` on one vector (d,) or a block (d, k) and is never formed. What walks the data is in
`stabkit.curvature.data_operators`; the ones here cost what their parts cost.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from stabkit._validate import check_real
from stabkit.preconditioner import Diagonal, Preconditioner
from stabkit.problem import UnlearningProblem


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
        if not isinstance(vectors, Tensor):
            raise TypeError(
                f"`{type(self).__name__}` @ vectors must get a tensor; got {type(vectors).__name__}. For NumPy arrays take "
                "`to_scipy()`."
            )
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


class MixedOperator(CurvatureOperator):
    """(1-α) H_R - α H_F, the matrix that governs the mean of a step (T3). Indefinite in general."""

    def __init__(self, retain: CurvatureOperator, forget: CurvatureOperator, mix: float) -> None:
        if retain.shape != forget.shape:
            raise ValueError(
                f"`retain` and `forget` of `MixedOperator` must be of one order; got {retain.shape[0]} and "
                f"{forget.shape[0]}."
            )
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
        if isinstance(preconditioner, Diagonal) and preconditioner.diagonal.shape != (operator.shape[0],):
            raise ValueError(
                f"`preconditioner` of `PreconditionedOperator` must have {operator.shape[0]} entries, as the operator; got "
                f"shape {tuple(preconditioner.diagonal.shape)}."
            )
        self._operator = operator
        self._preconditioner = preconditioner

    def _matmat(self, block: Tensor) -> Tensor:
        return self._preconditioner.sqrt(self._operator @ self._preconditioner.sqrt(block))


class RestrictedOperator(CurvatureOperator):
    """The diagonal block of an operator that belongs to some layers' parameters: of order d_L, in the model's own order.

    Attributes:
        layers: The layers' names.
        places: Where their parameters lie in the whole vector, shape (d_L,).
    """

    def __init__(self, operator: CurvatureOperator, problem: UnlearningProblem, layers: Sequence[str]) -> None:
        """Choose the block.

        Args:
            operator: Operator over all d parameters. A product costs what one of it costs.
            problem: The unlearning problem.
            layers: Module names; one also stands for every module inside it.

        Raises:
            ValueError: If a layer has no trainable parameter, or there is no layer.
        """
        owned = problem.layer_of()
        if not layers:
            raise ValueError("`layers` of `RestrictedOperator` must name at least one layer; got none.")
        for layer in layers:
            if not any(_inside(name, layer) for name in owned.values()):
                raise ValueError(
                    f"`layers` of `RestrictedOperator` must name layers with trainable parameters; got {layer!r}. There "
                    f"are {', '.join(repr(name) for name in dict.fromkeys(owned.values()))}."
                )
        chosen = [
            torch.full((p.numel(),), any(_inside(owned[name], layer) for layer in layers))
            for name, p in problem.parameters.items()
        ]
        self.layers = tuple(layers)
        self.places = torch.cat(chosen).nonzero().flatten()
        super().__init__(self.places.numel(), operator.dtype, operator.device)
        self._operator = operator

    def _matmat(self, block: Tensor) -> Tensor:
        places = self.places.to(self.device)
        whole = torch.zeros(self._operator.shape[0], block.shape[1], dtype=self.dtype, device=self.device)
        whole[places] = block
        return (self._operator @ whole)[places]


def _inside(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.") or layer == ""
