"""Operators that walk a data set: Hessian, generalised Gauss-Newton, empirical Fisher.

A product walks the data in mini-batches and sums in float64. What a batch needs besides the vectors, its primal pass and
the graph behind it, is made once and, where all batches fit into the memory budget, kept for the products to come. The
k vectors of a block go through that graph one after the other: batching them through it costs about twice as much on a
CPU's convolutions, and k times the memory.
"""

from __future__ import annotations

import abc
import hashlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import jvp, linearize

from stabkit._errors import FallbackWarning, MemoryWarning, caller_level
from stabkit._memory import is_out_of_memory, memory_budget
from stabkit._validate import check_choice, check_int
from stabkit.curvature.operators import CurvatureOperator
from stabkit.network import check_twice
from stabkit.parallel import DataParallel
from stabkit.precision import float32_by_default
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Inputs, Samples, checked_indices, tensors_of

LARGEST_BATCH = 512
MARKED = 16  # samples that ranks compare
BatchProduct = Callable[[Tensor], Tensor]  # one vector (d,) -> one vector (d,), summed over the batch
# Problem, function of the parameters, u -> J^T u, outputs; gives v -> Jv.
Way = Callable[
    [UnlearningProblem, Callable[[Parameters], Tensor], Callable[[Tensor], Tensor], Tensor], Callable[[Tensor], Tensor]
]


class DataOperator(CurvatureOperator):
    """Mean over the samples of one set of a per-sample matrix.

    Attributes:
        batch_size: Samples a batch; halved for good where memory runs out.
        kept: Whether the batches' graphs are kept between products.
    """

    def __init__(
        self,
        problem: UnlearningProblem,
        samples: Samples,
        *,
        indices: Tensor | None = None,
        batch_size: int | None = None,
        memory: int | str | None = None,
        parallel: DataParallel | None = None,
    ) -> None:
        """Plan the batches.

        Args:
            problem: The unlearning problem.
            samples: Which set.
            indices: Which of its samples, shape (m,); all when None.
            batch_size: Samples a batch; as many as the budget allows, at most 512, when None.
            memory: Budget in bytes or as text such as "4GB"; a quarter of what is free when None. It covers the graphs, not
                the vectors of the product.
            parallel: How ranks share the samples; this process does them all when None.
        """
        owner = type(self).__name__
        super().__init__(problem.size, problem.dtype, problem.device)
        self._problem = problem
        self._samples = samples
        self._indices = checked_indices(samples, indices, owner=owner)
        self._parallel = parallel
        if parallel is not None:
            whole = self._indices
            self._indices = parallel.shard(whole)
            parallel.check_same(
                operator=owner,
                holds=parallel.holds,
                set=samples.name,
                loss=problem.loss.name,
                **(_marks(samples, whole) if parallel.holds == "all" else {}),
                **{"number of parameters": problem.size, "weights": float(problem.vector().double().square().sum())},
            )
        budget = memory_budget(memory, owner=owner, device=problem.device)
        per_sample = self._bytes_per_sample()
        if batch_size is None:
            batch_size = max(1, min(LARGEST_BATCH, budget // per_sample))
        self.batch_size = check_int(batch_size, name="batch_size", owner=owner, low=1)
        self.kept = self._indices.numel() * per_sample <= budget
        self._graphs: list[BatchProduct] = []

    @abc.abstractmethod
    def _batch_product(self, inputs: Inputs, targets: Tensor) -> BatchProduct:
        """Do the primal pass of a batch; the product with any vector is then what is returned."""

    @float32_by_default()
    def _matmat(self, block: Tensor) -> Tensor:
        while True:
            try:
                return self._sum(block)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._graphs = []
                if self.batch_size == 1:
                    raise MemoryError(
                        f"a `{type(self).__name__}` product ran out of memory with one sample a batch. Compute in float32, "
                        "on fewer layers, or on another device."
                    ) from error
                self.batch_size = self.batch_size // 2
                self.kept = False
            # Outside the handler, so that the failed pass's tensors are gone before the next one starts.
            warnings.warn(
                f"out of memory: `{type(self).__name__}` goes on with {self.batch_size} samples a batch, keeping no graphs. "
                "Set `batch_size` or `memory` to start that way.",
                MemoryWarning,
                stacklevel=caller_level(),
            )

    def _sum(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block, dtype=torch.float64)
        if self._graphs:
            for graph in self._graphs:
                _add(total, graph, block)
        elif self._indices.numel():  # a rank may have no sample
            graphs = []
            for inputs, targets in self._samples.batches(self.batch_size, self._indices):
                graph = self._batch_product(inputs, targets)
                _add(total, graph, block)
                if self.kept:
                    graphs.append(graph)
            self._graphs = graphs
        count = self._indices.numel()
        if self._parallel is not None:
            total, count = self._parallel.sum(total, count, block)
        return (total / count).to(self.dtype)

    def _bytes_per_sample(self) -> int:
        """What one more sample adds to the graph of a gradient that can be differentiated again."""
        one, two = (self._saved_bytes(count) for count in (1, 2))
        return max(1, two - one)

    def _saved_bytes(self, count: int) -> int:
        held: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs, targets = self._samples.batch(torch.zeros(count, dtype=torch.int64))
        with saved_tensors_hooks(note, lambda tensor: tensor):
            _gradient_graph(self._problem, inputs, targets)
        return sum(held.values())


def _marks(samples: Samples, indices: Tensor) -> dict[str, object]:
    """What tells that two ranks hold the same samples in the same order, as far as a few of them tell."""
    some = indices[torch.linspace(0, len(indices) - 1, min(MARKED, len(indices))).long()]
    inputs, targets = samples.batch(some)
    places = torch.arange(1, len(some) + 1, dtype=torch.float64)
    sums = [float(t.cpu().double().reshape(len(some), -1).sum(1) @ places) for t in (*tensors_of(inputs), targets)]
    return {
        "number of samples": len(indices),
        "indices": hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16],
        "samples": sums,
    }


def _add(total: Tensor, graph: BatchProduct, block: Tensor) -> None:
    for column in range(block.shape[1]):
        total[:, column] += graph(block[:, column])


def _gradient_graph(
    problem: UnlearningProblem, inputs: Inputs, targets: Tensor
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Fresh leaves for the parameters, and the summed gradient in them with its graph."""
    leaves = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
    parameters = list(leaves.values())
    with torch.enable_grad():
        losses = problem.loss.per_sample(problem.outputs(leaves, inputs), targets)
        gradient = torch.autograd.grad(
            losses.sum(), parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
    return parameters, gradient


class HessianOperator(DataOperator):
    """Mean Hessian of the loss over one set, H_S (theory §1).

    Cost of a product with k vectors: one gradient a sample for the graph, unless it is kept, and about 2k more: each is a
    backward pass through the gradient's graph, twice as long as the loss's.
    """

    _known_twice = False  # whether the first batch's graph has been looked through

    def _batch_product(self, inputs: Inputs, targets: Tensor) -> BatchProduct:
        parameters, gradient = _gradient_graph(self._problem, inputs, targets)
        if not self._known_twice:
            check_twice(gradient)
            self._known_twice = True
        sizes = [p.numel() for p in parameters]
        curved = [place for place, g in enumerate(gradient) if g.requires_grad]  # the others are constant

        def product(vector: Tensor) -> Tensor:
            if not curved:
                return torch.zeros_like(vector)
            pieces = [piece.view_as(p) for piece, p in zip(vector.split(sizes), parameters, strict=True)]
            # v -> Hv = d(g·v)/dθ
            result = torch.autograd.grad(
                [gradient[place] for place in curved],
                parameters,
                grad_outputs=[pieces[place] for place in curved],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return torch.cat([r.reshape(-1) for r in result])

        return product


class _JacobianOperator(DataOperator):
    """mean_i J_i^T W_i J_i with J the derivative of some function of the parameters, W symmetric in its values."""

    _way: Way | None = None  # how Jv is computed, once that is known

    @abc.abstractmethod
    def _function(self, inputs: Inputs, targets: Tensor) -> Callable[[Parameters], Tensor]:
        """Of the parameters: outputs of shape (b, ...)."""

    @abc.abstractmethod
    def _weigh(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """W times tangents of shape (b, O, 1)."""

    def _batch_product(self, inputs: Inputs, targets: Tensor) -> BatchProduct:
        problem = self._problem
        function = self._function(inputs, targets)
        outputs, pull = _pull_back(function, problem.parameters)
        push = self._push_forward(function, pull, outputs)

        def product(vector: Tensor) -> Tensor:
            tangents = push(vector)  # v -> Jv: (b, ...)
            curved = self._weigh(outputs, targets, tangents.reshape(outputs.shape[0], -1, 1))  # WJv
            return pull(curved.reshape(outputs.shape))  # J^T W J v

        return product

    def _push_forward(
        self, function: Callable[[Parameters], Tensor], pull: Callable[[Tensor], Tensor], outputs: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """v -> Jv, the quickest way that was sound on the first batch."""
        ways: list[Way] = [_forward, _reverse]
        if self.kept:  # only then is a trace used more than once
            ways.insert(0, _traced)
        if self._way not in ways:
            self._way = self._soundest(ways, function, pull, outputs)
        return self._way(self._problem, function, pull, outputs)

    def _soundest(
        self,
        ways: list[Way],
        function: Callable[[Parameters], Tensor],
        pull: Callable[[Tensor], Tensor],
        outputs: Tensor,
    ) -> Way:
        """The first way that works and agrees with reverse mode; the last one is reverse mode itself."""
        reason = ""
        for way in ways[:-1]:
            try:
                push = way(self._problem, function, pull, outputs)
                if self._is_sound(push, pull, outputs):
                    return way
                reason = "it disagrees with reverse mode"
            except Exception as error:  # tracing and forward mode fail in as many ways as there are operations
                if is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
        warnings.warn(
            f"`{type(self).__name__}` computes Jv in reverse mode, as forward mode failed on this model ({reason}). "
            "Products are right and cost about half as much again.",
            FallbackWarning,
            stacklevel=caller_level(),
        )
        return ways[-1]

    def _is_sound(self, push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], outputs: Tensor) -> bool:
        """Whether v -> Jv gives the same twice, and <u, Jv> = <Jᵀu, v> for one random pair."""
        # Recurrent layers, for one, are traced without error, but the trace writes into its own constants.
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self._problem.size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        u = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        first, again, pulled = push(v).double(), push(v).double(), pull(u).double()
        eps = torch.finfo(self.dtype).eps
        difference = (u.double() * again).sum() - pulled @ v.double()
        scale = u.double().norm() * again.norm() + pulled.norm() * v.double().norm()
        repeats = (again - first).norm() <= 100 * eps * first.norm()
        return bool(repeats & (difference.abs() <= eps**0.5 * scale))


def _pull_back(
    function: Callable[[Parameters], Tensor], parameters: Parameters
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Outputs, and u -> J^T u over a graph that is kept."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad():
        outputs = function(leaves)

    def pull(cotangents: Tensor) -> Tensor:
        result = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            grad_outputs=cotangents,
            retain_graph=True,
            create_graph=cotangents.requires_grad,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([r.reshape(-1) for r in result])

    return outputs.detach(), pull


def _traced(
    problem: UnlearningProblem,
    function: Callable[[Parameters], Tensor],
    pull: Callable[[Tensor], Tensor],
    outputs: Tensor,
) -> Callable[[Tensor], Tensor]:
    """Forward mode, traced once and without the primal pass from then on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of its own bookkeeping
        _, push = linearize(function, problem.parameters)
    return lambda vector: push(problem.unflatten(vector)).detach()


def _forward(
    problem: UnlearningProblem,
    function: Callable[[Parameters], Tensor],
    pull: Callable[[Tensor], Tensor],
    outputs: Tensor,
) -> Callable[[Tensor], Tensor]:
    """Forward mode with its primal pass each time."""
    return lambda vector: jvp(function, (problem.parameters,), (problem.unflatten(vector),))[1].detach()


def _reverse(
    problem: UnlearningProblem,
    function: Callable[[Parameters], Tensor],
    pull: Callable[[Tensor], Tensor],
    outputs: Tensor,
) -> Callable[[Tensor], Tensor]:
    """The derivative of u -> J^T u in the direction v, by reverse mode alone."""
    dummy = torch.zeros_like(outputs, requires_grad=True)
    with torch.enable_grad():
        pulled = pull(dummy)

    def push(vector: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(pulled, dummy, grad_outputs=vector, retain_graph=True)
        return result

    return push


class GGNOperator(_JacobianOperator):
    """Mean generalised Gauss-Newton matrix over one set, mean_i J_i^T Λ_i J_i (theory §5). Positive semi-definite.

    Cost of a product with k vectors: k forward-mode and k reverse passes a sample, together about one gradient each where
    the graph is kept, two where it is not. Keeping it costs four gradients once, for the trace of the forward mode.
    """

    def _function(self, inputs: Inputs, targets: Tensor) -> Callable[[Parameters], Tensor]:
        return lambda parameters: self._problem.outputs(parameters, inputs)

    def _weigh(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        return self._problem.loss.hessian_apply(outputs, targets, tangents)


class FisherOperator(_JacobianOperator):
    """Empirical Fisher over one set, mean_i g_i g_i^T with g_i the sample's gradient. Positive semi-definite.

    Costs what `GGNOperator` costs; no per-sample gradient is ever held.
    """

    def _function(self, inputs: Inputs, targets: Tensor) -> Callable[[Parameters], Tensor]:
        return lambda parameters: self._problem.loss.per_sample(self._problem.outputs(parameters, inputs), targets)

    def _weigh(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        return tangents


KINDS: dict[str, type[DataOperator]] = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": FisherOperator}


def curvature_operator(
    problem: UnlearningProblem,
    samples: Samples,
    *,
    kind: str = "hessian",
    indices: Tensor | None = None,
    memory: int | str | None = None,
    parallel: DataParallel | None = None,
) -> DataOperator:
    """The curvature of one set.

    Args:
        problem: The unlearning problem.
        samples: Which set.
        kind: "hessian", "ggn" or "fisher".
        indices: Which of its samples; all when None.
        memory: Budget in bytes or as text such as "4GB"; a quarter of what is free when None.
        parallel: How ranks share the samples; this process does them all when None.

    Returns:
        The operator.
    """
    check_choice(kind, name="kind", owner="curvature_operator", choices=tuple(KINDS))
    return KINDS[kind](problem, samples, indices=indices, memory=memory, parallel=parallel)
