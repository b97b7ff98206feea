"""The Gram of all per-sample curvature factors, K = V Vᵀ (theory §5), without V."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from stabkit._memory import is_out_of_memory, memory_budget
from stabkit._progress import progress_bar
from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int
from stabkit.curvature.gram.calls import Capturer
from stabkit.curvature.gram.contract import Held, LowerGram, join, unit_inputs
from stabkit.curvature.gram.plan import AUTOGRAD, Part, Plan, Unit, choose, passes, plain, smallest, trace
from stabkit.precision import float32_by_default
from stabkit.preconditioner import Diagonal, Identity, Preconditioner
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.samples import Inputs, Samples, checked_indices, map_tensors

LARGEST_BATCH = 64
OWNER = "curvature_gram"


@dataclass(frozen=True, kw_only=True, eq=False)
class Gram:
    """Inner products of per-sample factor rows: K[(i,c), (j,e)] = v_ic · v_je, with row i·C + c.

    For rows "ggn", V_i = R_i J_i P^{1/2} with R_iᵀ R_i = Λ_i, so that H_i = V_iᵀ V_i is sample i's preconditioned
    Gauss-Newton curvature and every quantity here is exact for the whole parameter space. A factor is fixed up to a rotation
    of its rows, on which none of them depends; R_i is the one with the fewest rows, O - 1 for softmax over O classes. For
    rows "outputs", V_i = J_i P^{1/2}, and K is J P Jᵀ, the kernel of the function-space rollout (T14). With several sets,
    samples are numbered through in the sets' order.

    Attributes:
        matrix: K, shape (m·C, m·C), exactly symmetric.
        sizes: Samples of each set; m is their sum.
        rows_per_sample: C, rows of a sample's factor: O for "outputs", the largest rank of a Λ_i for "ggn".
        indices: Which samples of each set these are.
        populations: Sizes of the sets they are from.
        rows: "ggn" or "outputs".
        methods: How each parameter's term was made: "grams", "gradients", "tokens" or "autograd".
        passes: How often the data went through the network.
        gradient_equivalents: Per-sample gradient evaluations spent.
    """

    matrix: Tensor
    sizes: tuple[int, ...]
    rows_per_sample: int
    indices: tuple[Tensor, ...]
    populations: tuple[int, ...]
    rows: str
    methods: dict[str, str]
    passes: int
    gradient_equivalents: int

    @property
    def samples(self) -> int:
        """Number m of samples in all sets."""
        return sum(self.sizes)

    def block(self, first: int = 0, second: int | None = None) -> Tensor:
        """K between two sets, or within one.

        Args:
            first: Number of the set that the rows are of.
            second: Of the columns; the same when None.

        Returns:
            A view of shape (m_first·C, m_second·C).
        """
        return self.matrix[self._range(first), self._range(first if second is None else second)]

    def products(self) -> Tensor:
        """tr(H_i H_j) = ‖V_i V_jᵀ‖_F², the squares of the coherence matrix's entries (T11).

        Returns:
            Shape (m, m), non-negative. Cost (m·C)²; one sample's block row at a time.
        """
        m, C = self.samples, self.rows_per_sample
        blocks = self.matrix.view(m, C, m, C)
        return torch.stack([block.square().sum((0, 2)) for block in blocks])

    def traces(self) -> Tensor:
        """tr(H_i).

        Returns:
            Shape (m,).
        """
        return self.matrix.diagonal().reshape(self.samples, -1).sum(1)

    def spectral_norms(self) -> Tensor:
        """‖H_i‖₂, the largest eigenvalue of V_i V_iᵀ.

        Returns:
            Shape (m,). Cost m eigenproblems of order C.
        """
        m, C = self.samples, self.rows_per_sample
        own = self.matrix.view(m, C, m, C).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return torch.linalg.eigvalsh(own)[:, -1].clamp_min(0)

    def eigenvalues(self, which: int = 0) -> Tensor:
        """Eigenvalues of one set's mean curvature mean_i H_i, those of K/m; the d - m·C others, if any, are 0.

        Args:
            which: Number of the set.

        Returns:
            Shape (m·C,), descending; zeros within rounding where m·C passes the rank. Cost (m·C)³.
        """
        values = torch.linalg.eigvalsh(self.block(which)) / self.sizes[which]
        return values.flip(0).clamp_min(0)

    def _range(self, which: int) -> slice:
        check_int(which, name="which", owner="Gram", low=0, high=len(self.sizes) - 1)
        start = sum(self.sizes[:which])
        C = self.rows_per_sample
        return slice(start * C, (start + self.sizes[which]) * C)


@float32_by_default()
def curvature_gram(
    problem: UnlearningProblem,
    sets: Samples | Sequence[Samples],
    *,
    indices: Tensor | Sequence[Tensor | None] | None = None,
    preconditioner: Preconditioner | None = None,
    rows: str = "ggn",
    dtype: torch.dtype = torch.float64,
    memory: int | str | None = None,
    progress: bool = False,
) -> Gram:
    """Gram of per-sample curvature factors, summed over the layers; the (m·C) x d Jacobian is never held.

    A pass records the inputs and output gradients of as many layers as fit into memory, for all samples; their terms are
    then added to K, each the cheaper way of `plan.py`. Any module works: what is not understood, such as recurrent layers,
    `nn.MultiheadAttention` or a bare parameter, is differentiated automatically, sample by sample, parameter by parameter.

    Args:
        problem: The unlearning problem.
        sets: One set, or several for one joint Gram, e.g. `(problem.retain, problem.forget)`.
        indices: Which samples of the set, or of each set; all when None.
        preconditioner: P, identity or diagonal; identity when None. One that is not constant over a layer makes the
            layer's per-sample gradients necessary.
        rows: "ggn" for factors of the Gauss-Newton curvature, "outputs" for J_i P^{1/2}.
        dtype: Of the matrix. Terms are computed in the problem's dtype.
        memory: What may be held at once beside model and data, K included, in bytes or as text such as "4GB"; a quarter of
            what is free when None. Less memory means more passes.
        progress: Whether to show a progress bar.

    Returns:
        The Gram. Cost of a pass: m forward passes and m·C backward passes to the activations. Contractions: at most
        (m·C)²·d/2 multiplications, less by a factor of about C·a·g/(a/C + C·g) for an a x g linear layer without positions.

    Raises:
        TypeError: If an argument has a wrong type, or the preconditioner is not diagonal.
        ValueError: If an argument is out of its domain, the sets differ in outputs per sample, or K does not fit.
    """
    check_choice(rows, name="rows", owner=OWNER, choices=("ggn", "outputs"))
    budget = memory_budget(memory, owner=OWNER, device=problem.device)
    if dtype not in {torch.float32, torch.float64}:
        raise ValueError(f"`dtype` of `{OWNER}` must be torch.float32 or torch.float64; got {dtype}.")
    root = _root(problem, preconditioner)
    chosen = _chosen_samples(sets, indices)
    with preserved_rng(), torch.no_grad():
        outputs = _outputs_per_sample(problem, chosen)
        return _Builder(problem, chosen, outputs, root, rows, dtype, budget, progress).build()


class _Builder:
    """One Gram on its way: what the passes need to know."""

    def __init__(
        self,
        problem: UnlearningProblem,
        chosen: list[tuple[Samples, Tensor]],
        outputs: int,
        root: Parameters | None,
        rows: str,
        dtype: torch.dtype,
        memory: int,
        progress: bool,
    ) -> None:
        self.problem, self.chosen, self.outputs = problem, chosen, outputs
        self.root, self.rows, self.dtype, self.memory, self.progress = root, rows, dtype, memory, progress
        self.samples = sum(indices.numel() for _, indices in chosen)
        self.directions, self.total_rows = outputs, self.samples * outputs
        least = 4 * outputs**2 * problem.dtype.itemsize  # one sample's factor, on its way
        if least > memory:
            raise self._too_little(least)
        self._kept = torch.arange(outputs, device=problem.device)
        if rows == "ggn":
            self._kept = self._rank_rows()
        self.directions = self._kept.numel()
        self.total_rows = self.samples * self.directions

    def build(self) -> Gram:
        """Trace, then run; sample by sample where the network does not take `vmap`."""
        samples, indices = self.chosen[0]
        plan = trace(self.problem, samples.batch(indices[:1])[0])
        try:
            matrix, planned, runs = self._run(plan)
        except RuntimeError as error:  # no batching rule, or control flow that depends on the data
            if is_out_of_memory(error):
                raise
            matrix, planned, runs = self._run(plain(self.problem, plan.activations))
        used = {name: unit.method for unit in planned.units for name in unit.names}
        return Gram(
            matrix=matrix,
            sizes=tuple(indices.numel() for _, indices in self.chosen),
            rows_per_sample=self.directions,
            indices=tuple(indices for _, indices in self.chosen),
            populations=tuple(samples.size for samples, _ in self.chosen),
            rows=self.rows,
            methods={name: used.get(name, "unused") for name in self.problem.parameters},
            passes=runs,
            gradient_equivalents=runs * self.total_rows,
        )

    def _run(self, plan: Plan) -> tuple[Tensor, Plan, int]:
        """K, the plan with its methods, and the number of passes."""
        problem, size = self.problem, self.problem.dtype.itemsize
        own = self.total_rows**2 * self.dtype.itemsize
        free = max(0, self.memory - own) // size
        # A half for what is held of all samples, a half for a batch in the network, and after it for a contraction.
        plan = choose(plan, directions=self.directions, formed=self._uneven(), workspace=free // 2)
        need = smallest(plan, rows=self.total_rows, directions=self.directions)
        parts = list(passes(plan, rows=self.total_rows, directions=self.directions, budget=max(free // 2, need)))
        one = max(self._transient(plan, group, 1, 1) for group in parts) if parts else 0
        if free < 2 * max(need, one):
            raise self._too_little(own + 2 * size * max(need, one))
        gram = LowerGram(self.samples, self.directions, self.dtype, problem.device, free // 2)
        for group in progress_bar(parts, "curvature Gram", self.progress):
            held = [Held(part, self.samples, self.directions, problem.dtype, problem.device) for part in group]
            width = self._width(plan, group, free // 2)
            self._record(plan, held, *width)
            while held:
                part = held.pop()
                part.contribute(gram, self._unit_root(plan, part.part.unit), free // 2)
        return gram.finish(), plan, len(parts)

    def _too_little(self, least: int) -> ValueError:
        own = self.total_rows**2 * self.dtype.itemsize
        return ValueError(
            f"`memory` of `{OWNER}` must be at least {least} bytes for {self.samples} samples with {self.directions} rows "
            f"each, whose K alone takes {own}; got {self.memory}. Give more memory, fewer samples through `indices`, or "
            "dtype=torch.float32."
        )

    # ------------------------------------------------------------------ one pass

    def _record(self, plan: Plan, held: list[Held], batch: int, columns: int) -> None:
        """Fill `held` from one pass over the data."""
        extract = self._by_sample if plan.by_sample else self._by_batch
        start = 0
        for inputs, cotangents in self._cotangents(batch):
            stop = start + cotangents.shape[0]
            for first in range(0, self.directions, columns):
                some = cotangents[:, first : first + columns]
                found = extract(plan, [h.part for h in held], inputs, some)
                for keeper, (layer_inputs, values) in zip(held, found, strict=True):
                    keeper.put(slice(start, stop), slice(first, first + columns), layer_inputs, values)
            start = stop

    def _cotangents(self, batch: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Inputs of a batch and its output directions, (b, C, O): the factor's rows, or the axes."""
        for samples, indices in self.chosen:
            for inputs, targets in samples.batches(batch, indices):
                if self.rows == "ggn":
                    yield inputs, self._factor(inputs, targets)[:, self._kept]
                else:
                    axes = torch.eye(self.outputs, dtype=self.problem.dtype, device=self.problem.device)
                    yield inputs, axes.expand(targets.shape[0], -1, -1)

    def _factor(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """R_i with R_iᵀ R_i = Λ_i, (b, O, O), upper triangular: what is redundant in L_i is in rows of zeros."""
        outputs = self.problem.outputs(self.problem.parameters, inputs)
        axes = torch.eye(self.outputs, dtype=outputs.dtype, device=outputs.device).expand(outputs.shape[0], -1, -1)
        factor = self.problem.loss.factor_transpose(outputs, targets, axes).detach()
        return torch.linalg.qr(factor, mode="r").R

    def _rank_rows(self) -> Tensor:
        """Rows of the factors that are not zero for every sample; the first where all are."""
        used = torch.zeros(self.outputs, dtype=torch.bool, device=self.problem.device)
        rounding = 4 * self.outputs * torch.finfo(self.problem.dtype).eps
        batch = max(1, min(LARGEST_BATCH, self.memory // (4 * self.outputs**2 * self.problem.dtype.itemsize)))
        for samples, indices in self.chosen:
            for inputs, targets in samples.batches(batch, indices):
                factor = self._factor(inputs, targets)
                sizes = torch.linalg.vector_norm(factor, dim=2)
                used |= (sizes > rounding * sizes.amax(1, keepdim=True)).any(0)
        kept = used.nonzero().squeeze(1)
        return kept if kept.numel() else torch.zeros(1, dtype=torch.int64, device=used.device)

    def _by_batch(
        self, plan: Plan, parts: list[Part], inputs: Inputs, cotangents: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """What each part keeps of one batch, by `vmap` over the samples and over the directions."""
        problem = self.problem
        numbers = {number for part in parts for number in part.unit.calls}
        free = {part.unit.names[0]: problem.parameters[part.unit.names[0]] for part in parts if not part.unit.calls}

        def single(sample: Inputs, directions: Tensor) -> tuple[dict[int, Tensor], tuple[dict, dict]]:
            zeros = {n: directions.new_zeros(plan.calls[n].shape) for n in numbers}

            def function(zeros: dict[int, Tensor], parameters: Parameters) -> tuple[Tensor, dict[int, Tensor]]:
                capturer = Capturer(plan.intercepted, zeros)
                with capturer:
                    outputs = problem.outputs(parameters, map_tensors(lambda t: t.unsqueeze(0), sample))
                return outputs.reshape(-1), capturer.inputs

            primal: Any = vjp(function, zeros, free, has_aux=True)
            return primal[2], vmap(primal[1])(directions)

        captured, (gradients, parameters) = vmap(single)(inputs, cotangents)
        for part in parts:
            unit = part.unit
            if unit.method == AUTOGRAD:
                yield None, parameters[unit.names[0]].flatten(2)
                continue
            layers = [(n, plan.calls[n].layer) for n in unit.calls]
            joined = join([layer.cotangents(gradients[n]) for n, layer in layers])
            yield unit_inputs(unit, [layer.positions(captured[n]) for n, layer in layers]), joined

    def _by_sample(
        self, _: Plan, parts: list[Part], inputs: Inputs, cotangents: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """The same by plain reverse mode, one sample and one direction at a time."""
        problem, names = self.problem, [part.unit.names[0] for part in parts]
        found: list[list[Tensor]] = [[] for _ in names]
        for i, directions in enumerate(cotangents):
            index = torch.tensor([i], device=cotangents.device)
            leaves = {name: problem.parameters[name].detach().requires_grad_() for name in names}
            with torch.enable_grad():
                outputs = problem.outputs(
                    leaves, map_tensors(partial(torch.index_select, dim=0, index=index), inputs)
                ).reshape(-1)
            rows = [
                torch.autograd.grad(
                    outputs, list(leaves.values()), direction, retain_graph=True, materialize_grads=True
                )
                for direction in directions
            ]
            for values, columns in zip(found, zip(*rows, strict=True), strict=True):
                values.append(torch.stack([column.reshape(-1) for column in columns]))
        for values in found:
            yield None, torch.stack(values)

    # ------------------------------------------------------------------ memory

    def _width(self, plan: Plan, group: list[Part], budget: int) -> tuple[int, int]:
        """Samples and directions that go through the network at once."""
        if self._transient(plan, group, 1, self.directions) > budget:
            return 1, _largest(self.directions, lambda c: self._transient(plan, group, 1, c) <= budget)
        return _largest(
            LARGEST_BATCH, lambda b: self._transient(plan, group, b, self.directions) <= budget
        ), self.directions

    def _transient(self, plan: Plan, group: list[Part], batch: int, columns: int) -> int:
        """Numbers that a batch holds, about: the graph, gradients in all directions, and what parts are made of."""
        numbers = {n for part in group for n in part.unit.calls}
        outputs = [plan.calls[n].shape.numel() for n in numbers]
        largest = max((call.shape.numel() for call in plan.calls), default=0)
        free = sum(part.unit.size for part in group if part.unit.method == AUTOGRAD)
        parts = max(
            (
                unit.groups * unit.inputs * unit.positions + columns * unit.groups * unit.features * unit.positions
                for unit in (part.unit for part in group)
                if unit.method not in {AUTOGRAD, "tokens"}
            ),
            default=0,
        )
        per_direction = sum(outputs) + 3 * largest + 2 * free + 2 * self.outputs
        return batch * (2 * plan.activations + columns * per_direction + parts)

    # ------------------------------------------------------------------ preconditioner

    def _uneven(self) -> set[str]:
        """Parameters over which P is not constant."""
        if self.root is None:
            return set()
        return {name for name, r in self.root.items() if not bool((r == r.reshape(-1)[0]).all())}

    def _unit_root(self, plan: Plan, unit: Unit) -> Tensor | float:
        """P^{1/2} of a unit as its gradients lie, or one number."""
        if self.root is None:
            return 1.0
        pieces = [self.root[name] for name in unit.names]
        first = pieces[0].reshape(-1)[0]
        if all(bool((piece == first).all()) for piece in pieces):
            return float(first)
        if unit.method == AUTOGRAD:
            return pieces[0].reshape(-1)
        layer = plan.calls[unit.calls[0]].layer
        blocks = []
        if unit.weight is not None:
            blocks.append(layer.blocks(self.root[unit.weight]))
        if unit.bias is not None:
            blocks.append(self.root[unit.bias].reshape(unit.groups, unit.features, 1))
        return torch.cat(blocks, 2)


# ---------------------------------------------------------------------- arguments


def _root(problem: UnlearningProblem, preconditioner: Preconditioner | None) -> Parameters | None:
    """P^{1/2} by parameter, or None for the identity."""
    if preconditioner is None or isinstance(preconditioner, Identity):
        return None
    if not isinstance(preconditioner, Diagonal):
        raise TypeError(
            f"`preconditioner` of `{OWNER}` must be Identity or Diagonal, which act on each layer by itself; got "
            f"{type(preconditioner).__name__}. For another one use the compressed curvature of `linearise`."
        )
    if preconditioner.diagonal.shape != (problem.size,):
        raise ValueError(
            f"`preconditioner` of `{OWNER}` must have {problem.size} entries, as the model has trainable parameters; got "
            f"shape {tuple(preconditioner.diagonal.shape)}. Take it from the algorithm's own `preconditioner(problem)`."
        )
    return problem.unflatten(preconditioner.diagonal.to(problem.device, problem.dtype).sqrt())


def _chosen_samples(
    sets: Samples | Sequence[Samples], indices: Tensor | Sequence[Tensor | None] | None
) -> list[tuple[Samples, Tensor]]:
    """Each set with the indices of its samples."""
    if isinstance(sets, Samples):
        several: list[Samples] = [sets]
        wanted: list[Any] = [indices]
    else:
        several = list(sets)
        wanted = [None] * len(several) if indices is None else list(indices)
    if not several or not all(isinstance(s, Samples) for s in several):
        got = ", ".join(type(s).__name__ for s in several) or "nothing"
        raise TypeError(
            f"`sets` of `{OWNER}` must be samples of the problem, e.g. problem.retain, or several; got {got}."
        )
    if len(wanted) != len(several):
        raise ValueError(
            f"`indices` of `{OWNER}` must have one entry per set, None for all its samples; got {len(wanted)} for "
            f"{len(several)} sets."
        )
    return [(s, checked_indices(s, i, owner=OWNER)) for s, i in zip(several, wanted, strict=True)]


def _outputs_per_sample(problem: UnlearningProblem, chosen: list[tuple[Samples, Tensor]]) -> int:
    found = [problem.outputs(problem.parameters, s.batch(i[:1])[0]).numel() for s, i in chosen]
    if len(set(found)) > 1:
        raise ValueError(
            f"`sets` of `{OWNER}` must have the same number of outputs per sample; got {found}. Pad the sequences alike."
        )
    return found[0]


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Largest number in [1, limit] that fits, 1 if none does."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
