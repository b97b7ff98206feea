"""The network linearised at θ* and compressed: outputs f(θ) ≈ f(θ*) + Φ c in r coordinates c.

With V (d, r) the leading right singular directions of J P^{1/2} over sampled retain and forget examples, a displacement
θ - θ* = P^{1/2} V c moves the outputs of sample i by Φ_i c, Φ_i = J_i P^{1/2} V. In these coordinates a preconditioned
step is a plain gradient step, so one compression serves every step size, mix and batch size (theory §§5-6).

With batchnorm="batch" the outputs of a batch depend on it as a whole. J is then the Jacobian of whole batches' outputs, in
batches of the size that the run has, and a compression serves that batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stabkit._checkpoint import Checkpoint, State
from stabkit._errors import MemoryWarning
from stabkit._memory import memory_budget
from stabkit._progress import progress_bar
from stabkit._validate import check_int, check_real
from stabkit.curvature.dormant import dormant_tensors
from stabkit.curvature.jacobian import ScaledJacobian
from stabkit.curvature.linearised import LinearisedNetwork, LinearisedSet, given_factors
from stabkit.curvature.matrix_free import MatrixFreeNetwork, PulledSketch
from stabkit.curvature.orthonormal import ROWS_AT_ONCE, rotated
from stabkit.curvature.room import EXTRA, WHOLE, Room, first_rank, holds_basis, samples_drawn_from
from stabkit.curvature.sketch import PROBES, RowSketch
from stabkit.network import check_modes
from stabkit.precision import float32_by_default
from stabkit.preconditioner import Preconditioner
from stabkit.problem import UnlearningProblem
from stabkit.samples import Samples

__all__ = ["LinearisedNetwork", "LinearisedSet", "linearise", "ritz_residuals"]

OWNER = "linearise"
COUPLED_BATCH = 64


@float32_by_default()
def linearise(
    problem: UnlearningProblem,
    preconditioner: Preconditioner,
    *,
    rank: int | None = 100,
    tolerance: float = 0.05,
    max_rank: int | None = None,
    retain_samples: int | None = 896,
    forget_samples: int | None = 448,
    sketch_samples: int | None = 96,
    batch_sizes: tuple[int, int] | None = None,
    power_iterations: int = 0,
    landmarks: Sequence[Tensor] = (),
    paces: Tensor | None = None,
    decays: Tensor | None = None,
    memory: int | str | None = None,
    hold: bool | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 256,
) -> LinearisedNetwork:
    """Compress J P^{1/2} of sampled examples by a randomised singular value decomposition (Halko et al. 2011).

    The mean gradients of both sets join the sketch, which so holds the first step of any mix. Each set's rows are weighted
    by 1/√m, so a small forget set keeps its directions.

    Args:
        problem: The unlearning problem.
        preconditioner: P of the algorithm.
        rank: Number r of directions to keep; fewer when the samples give fewer. When None it is doubled, from 50 on, until
            all but `tolerance` is captured; what was computed is kept, and without power iterations the directions are to
            rounding those of asking for that rank.
        tolerance: Share of ‖J P^{1/2}‖_F² that may be missing where the rank is None.
        max_rank: Largest rank that is found where the rank is None; no bound when None.
        retain_samples: Retain examples to sample; all when None.
        forget_samples: Forget examples to sample; all when None.
        sketch_samples: How many examples of each set the directions are drawn from, or as many as have four outputs for each
            direction where those are more. All when None, of a set of up to 256 that is held whole, where the rank is
            found, and with power iterations. Many examples are needed to tell the curvature along a direction, above all
            that of one set from the other's, and far fewer to find it.
        batch_sizes: B_R and B_F of the run, which matter with batchnorm="batch" alone: the samples, rounded to whole
            batches, are put at random into batches of these sizes. 64, or the whole set where it is smaller, when None.
        power_iterations: Subspace iterations, which bring the directions nearer the true singular ones where those past r
            are not small (Halko et al. 2011, §4.5); `ritz_residuals` measures how near.
        landmarks: Vectors u of shape (d,) whose P^{1/2} u the coordinates have to span besides the r directions: θ* where
            weights decay, so that what the decay does outside of the r directions is not lost.
        paces: Factors of the step size, shape (d,), that P has in it and clipped gradients have not; none when None.
        decays: Factors of the weight decay, shape (d,); all 1 when None.
        memory: Bytes, or text such as "4GB", that basis, sketch, features and passes may take together; the activations of
            a pass come on top. When None, what is free.
        hold: Whether to hold the basis. One that is not held is made anew from the samples that its directions are drawn
            from, a few columns at a time, wherever it is asked for: the same network to rounding, of a model of any size,
            without directions that in float32 have less than about 1e-5 of the leading one's squared singular value.
            When None, it is held where it fits into memory; and where the rank is found, power iterations are asked for or
            the state is to be written, which need it.
        seed: Seed of the sample and of the sketch.
        progress: Whether to show a progress bar over the samples.
        checkpoint: File that holds the state: written whole or not at all, resumed from where it exists, left in place at
            the end. A resumed run returns on the CPU bit for bit what an uninterrupted one does, and may have another
            `tolerance`. It takes up to 2·d·(r + 28) numbers on disk.
        checkpoint_every: Samples that a walk passes from one writing to the next; a killed run repeats at most these and one
            batch.

    Returns:
        The compressed network. Cost: about 2·min(O, r)·m·(1 + power_iterations) per-sample gradients, or 2·r·m·(1 +
        power_iterations) where a sample's O·d derivatives are too many to hold, and little more than half of it where
        directions are drawn from few samples. A rank that is found multiplies new
        directions alone: it costs the latter just once, but the former for each doubling. Coupled samples have no rows of
        their own, so they cost the latter. Memory: twice (d + m·O)·(r + 28) numbers. Of a basis that is not held, about
        (m + 3·m')·r gradients, of m' samples that directions are drawn from, and twice m'·r where P is not the identity;
        memory: m·O·(r + 28) numbers, and some ten vectors of d.

    Raises:
        RuntimeError: Under torch.inference_mode() or torch.autocast, or with another default device than the CPU.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain or a landmark of another shape, a basis that has to be held does not
            fit into memory, or the checkpoint is unreadable or of another problem or other settings.
    """
    check_modes(OWNER)
    if rank is not None:
        check_int(rank, name="rank", owner=OWNER, low=1, remedy="None finds one.")
    check_real(tolerance, name="tolerance", owner=OWNER, low=0, high=1)
    if max_rank is not None:
        check_int(max_rank, name="max_rank", owner=OWNER, low=1, remedy="None sets no bound.")
    for name, count in (
        ("retain_samples", retain_samples),
        ("forget_samples", forget_samples),
        ("sketch_samples", sketch_samples),
    ):
        if count is not None:
            check_int(count, name=name, owner=OWNER, low=1, remedy="None takes all of them.")
    check_int(power_iterations, name="power_iterations", owner=OWNER, low=0)
    check_int(checkpoint_every, name="checkpoint_every", owner=OWNER, low=1)
    budget = None if memory is None else memory_budget(memory, owner=OWNER, device=problem.device)
    both = problem.retain, problem.forget
    coupled = coupled_sizes(problem, batch_sizes)
    indices = [
        chosen_samples(samples, count, size, seed + i, shuffled=sketch_samples is not None)
        for i, (samples, count, size) in enumerate(zip(both, (retain_samples, forget_samples), coupled, strict=True))
    ]
    store = None
    if checkpoint is not None:
        settings = {
            "order": problem.size,
            "dtype": str(problem.dtype),
            "rank": rank,
            "retain_samples": indices[0].numel(),
            "forget_samples": indices[1].numel(),
            "power_iterations": power_iterations,
            "seed": seed,
            "batch_sizes": list(coupled),
            "sketch_samples": sketch_samples,
            "landmarks": len(landmarks),
        }
        store = Checkpoint(checkpoint, "linearisation", settings, owner=OWNER)

    jacobians = [
        ScaledJacobian(
            problem, samples, chosen, preconditioner, memory=None if budget is None else budget // 4, coupled=size
        )
        for samples, chosen, size in zip(both, indices, coupled, strict=True)
    ]
    rows = sum(len(j) * j.outputs_per_sample for j in jacobians)
    room = Room(problem, rows, budget, beside=EXTRA + len(landmarks))
    most = max_rank or problem.size
    asked = rank or first_rank(most)
    held = holds_basis(room, asked, hold, needed=rank is None or power_iterations > 0 or store is not None)
    if held:
        room.check(asked, memory)
    evaluated = [problem.evaluate(samples, indices=chosen)[:2] for samples, chosen in zip(both, indices, strict=True)]
    for jacobian, seen in zip(jacobians, evaluated, strict=True):
        jacobian.counted = problem.loss.counted(*seen)
    passed = [
        outputs if size is None else jacobian.outputs()
        for jacobian, size, (outputs, _) in zip(jacobians, coupled, evaluated, strict=True)
    ]
    residuals = [
        problem.loss.residual(outputs, targets).flatten(1)
        for outputs, (_, targets) in zip(passed, evaluated, strict=True)
    ]
    theta = problem.vector()
    drawn_from = [
        j.whole_batches(
            samples_drawn_from(len(j), samples.size, j.outputs_per_sample, rank, sketch_samples, power_iterations)
        )
        for j, samples in zip(jacobians, both, strict=True)
    ]
    beside = _beside(problem, preconditioner, landmarks)
    weights = [None if paces is None else torch.where(paces == 0, 0.0, 1 / paces.square()), decays]
    anchors = [theta, theta if decays is None else decays.to(theta) * theta]
    sketch: RowSketch | PulledSketch
    if not held:
        sketch = PulledSketch(
            jacobians,
            residuals,
            preconditioner,
            theta,
            landmarks=beside,
            drawn_from=drawn_from,
            weights=[None, *(w for w in weights if w is not None)],
            anchors=anchors,
            seed=seed,
        )
        width = room.width(asked)
        steps = _one_by_one(sketch.grow(width))
        for _ in progress_bar(steps, f"{OWNER}, rank {asked}", progress, total=sketch.columns_to_walk(width)):
            pass
        energies, rotation, captured = _leading(sketch, asked, drawn_from)
    else:
        sketch = RowSketch(
            jacobians,
            residuals,
            preconditioner,
            theta,
            landmarks=beside,
            drawn_from=drawn_from,
            power_iterations=power_iterations,
            seed=seed,
        )
        save = None
        if store is not None:
            signs = torch.randn(problem.size, generator=torch.Generator().manual_seed(0)).to(theta)
            marks = {
                "weights": theta,
                "preconditioner": preconditioner.sqrt(signs),
                "outputs": torch.cat([outputs.flatten() for outputs in passed]),
                "loss derivatives": torch.cat([residual.flatten() for residual in residuals]),
            }
            _resume(store, sketch, marks)
            save = _saver(store, marks)
            asked = sketch.rank or asked

        while True:
            width = room.width(asked)
            if store is None:  # a resumed run, which has no rows, is to cost what an uninterrupted one does
                for jacobian, drawn in zip(jacobians, drawn_from, strict=True):
                    jacobian.keep_rows(drawn, room.spare(asked) * drawn / sum(drawn_from))
            steps = _one_by_one(sketch.grow(asked, width, save, checkpoint_every))
            label = f"{OWNER}, rank {asked}"
            for _ in progress_bar(steps, label, progress, total=sketch.samples_to_walk(width)):
                pass
            energies, rotation, captured = _leading(sketch, asked, drawn_from)
            if rank is not None or captured >= 1 - tolerance or energies.numel() < asked or asked >= most:
                break  # enough, or there are no more
            further = min(2 * asked, most)
            if not room.holds(further):
                warnings.warn(
                    f"`linearise` stops at rank {asked}, which captures {captured:.1%} of the outputs' sensitivity and not "
                    f"{1 - tolerance:.1%}: there is no memory for rank {further}. Raise `memory` or `tolerance`, or lower "
                    "`retain_samples` and `forget_samples`.",
                    MemoryWarning,
                    stacklevel=2,
                )
                break
            asked = further
        for jacobian in jacobians:
            jacobian.keep_rows(0, 0)

    leading = rotation.shape[1]
    if beside.shape[1]:
        energies, rotation = _with_landmarks(sketch, beside, energies, rotation)
    features = [rotated(f, rotation) for f in sketch.features]
    gradients, dormant = sketch.gradients, dormant_tensors(problem, sketch.probes)
    if isinstance(sketch, PulledSketch):
        basis, more = theta.new_empty(0, rotation.shape[1]), {"directions": sketch.basis.turned(rotation)}
        metrics = [rotation.T @ metric @ rotation for metric in sketch.metrics]
        along = [rotation.T @ anchor for anchor in sketch.anchors]
    else:
        basis, more = rotated(sketch.basis, rotation), {}
        root = preconditioner.sqrt(basis)
        metrics = [root.T @ root, *(_weighted(root, w) for w in weights if w is not None)]
        along = [root.T @ u for u in anchors]
    del sketch  # which is as large as the basis
    sets = [
        LinearisedSet(
            outputs=passed[i],
            features=features[i],
            targets=evaluated[i][1],
            indices=indices[i],
            population=samples.size,
            original=None if coupled[i] is None else evaluated[i][0],
            coupled=coupled[i],
        )
        for i, samples in enumerate(both)
    ]
    passes = 1 if coupled == (None, None) else 2  # forward, of every sample
    kind = MatrixFreeNetwork if more else LinearisedNetwork
    return kind(
        retain=sets[0],
        forget=sets[1],
        basis=basis,
        preconditioner=preconditioner,
        loss=problem.loss,
        divergence_level=problem.divergence_level,
        check_every=problem.check_every,
        metric=metrics[0].double(),
        anchor=along[0].double(),
        anchor_norm=float(theta.double().norm()),
        gradient_metric=metrics[0 if paces is None else 1].double(),
        decay_metric=metrics[0 if decays is None else -1].double(),
        decay_anchor=along[1].double(),
        singular_values=energies.sqrt(),
        landmarks=rotation.shape[1] - leading,
        layered=given_factors(paces=paces, decays=decays),
        captured=captured,
        gradient_equivalents=gradients + passes * sum(map(len, jacobians)) / 3,
        dormant=dormant,
        **more,
    )


def _weighted(root: Tensor, weights: Tensor) -> Tensor:
    """Rᵀ diag(w) R of a tall R, some rows at a time."""
    found = root.new_zeros(root.shape[1], root.shape[1])
    for rows, w in zip(root.split(ROWS_AT_ONCE), weights.to(root).split(ROWS_AT_ONCE), strict=True):
        found += rows.T @ (rows * w.unsqueeze(1))
    return found


@float32_by_default()
def ritz_residuals(problem: UnlearningProblem, network: LinearisedNetwork, *, progress: bool = False) -> Tensor:
    """How far each direction v_j of a linearisation is from a true singular one: ‖(A - s_j² I) v_j‖ / s_1² (theory §5).

    A = P^{1/2} Jᵀ J P^{1/2} is of the samples that the linearisation holds, each set's rows weighted by 1/√m as there. A is
    symmetric, so an eigenvalue of it lies within s_1² times the residual of every s_j².

    Args:
        problem: The problem that was linearised.
        network: Its linearisation.
        progress: Whether to show a progress bar over the samples.

    Returns:
        Residuals of shape (r,), float64; of landmarks' directions too, which are no singular ones. Cost: min(O, r)·m
        per-sample gradients; memory: twice the columns that there are at a time. Of a
        basis that is not held r·m, and r pulls over the samples that it is drawn from.

    Raises:
        ValueError: If the linearisation is of another problem.
    """
    pairs = (problem.retain, network.retain), (problem.forget, network.forget)
    ours = (problem.size, problem.retain.size, problem.forget.size)
    theirs = (network.parameters, network.retain.population, network.forget.population)
    if ours != theirs:
        raise ValueError(
            f"`network` of `ritz_residuals` must be a linearisation of `problem`, with (parameters, retain samples, forget "
            f"samples) {ours}; got one of {theirs}. Linearise this problem."
        )
    energies, found = network.singular_values.square(), []

    jacobians = [
        ScaledJacobian(problem, samples, held.indices, network.preconditioner, coupled=held.coupled)
        for samples, held in pairs
    ]

    def walk() -> Iterator[int]:
        for place, block in network.columns():
            image = torch.zeros_like(block)
            for jacobian, (_, held) in zip(jacobians, pairs, strict=True):
                before = 0
                for done in jacobian.add_transposed(held.features[..., place] / held.samples, image):
                    yield (done - before) * block.shape[1]
                    before = done
            residuals = network.preconditioner.sqrt(image) - block * energies[place].to(block)
            found.append(torch.linalg.vector_norm(residuals, dim=0, dtype=torch.float64).cpu())

    total = network.rank * sum(held.samples for _, held in pairs)
    for _ in progress_bar(_one_by_one(walk()), "ritz_residuals", progress, total=total):
        pass
    scale = float(energies[0])
    return torch.cat(found) / (scale if scale > 0 else 1.0)


def coupled_sizes(problem: UnlearningProblem, batch_sizes: tuple[int, int] | None) -> tuple[int | None, int | None]:
    """Sizes of coupled batches of both sets; None where samples are not coupled."""
    if problem.batchnorm == "frozen":
        return None, None
    sizes = [COUPLED_BATCH, COUPLED_BATCH] if batch_sizes is None else list(batch_sizes)
    for size in sizes:
        check_int(size, name="batch_sizes", owner=OWNER, low=2, remedy="A batch of one sample has no variance.")
    return min(sizes[0], problem.retain.size), min(sizes[1], problem.forget.size)


def chosen_samples(samples: Samples, count: int | None, size: int | None, seed: int, *, shuffled: bool) -> Tensor:
    """A sample, of whole batches where samples are coupled; in random order then, and where the first ones are to be one."""
    if size is not None and count is not None:
        count = max(1, round(count / size)) * size
    chosen = samples.subset(count, seed)
    small = chosen.numel() == samples.size <= WHOLE
    if size is None and (small or not shuffled):
        return chosen
    return chosen[torch.randperm(chosen.numel(), generator=torch.Generator().manual_seed(seed))]


def _beside(problem: UnlearningProblem, preconditioner: Preconditioner, landmarks: Sequence[Tensor]) -> Tensor:
    """P^{1/2} u of every landmark u, (d, l), without those that P takes nothing of."""
    for u in landmarks:
        if tuple(u.shape) != (problem.size,):
            raise ValueError(
                f"`landmarks` of `{OWNER}` must be vectors of shape ({problem.size},); got one of shape {tuple(u.shape)}."
            )
    theta = problem.vector()
    if not landmarks:
        return theta.new_empty(problem.size, 0)
    rooted = preconditioner.sqrt(torch.stack([u.to(theta) for u in landmarks], 1))
    return rooted[:, torch.linalg.vector_norm(rooted, dim=0) > 0]


def _resume(store: Checkpoint, sketch: RowSketch, marks: dict[str, Tensor]) -> None:
    """Take over the file's state if there is one, and if it is of the same problem."""
    state = store.load()
    if state is None:
        return
    for name, mark in marks.items():
        store.recognise(state[name], mark, what=name, exact=name == "weights")
    sketch.load(state)


def _saver(store: Checkpoint, marks: dict[str, Tensor]) -> Callable[[State], None]:
    """Writes a state with what the problem is known again by."""
    known = {name: mark.cpu().numpy() for name, mark in marks.items()}
    return lambda state: store.save({**state, **known})


def _one_by_one(counts: Iterable[int]) -> Iterator[None]:
    """One item a sample, for a bar that counts samples."""
    for count in counts:
        for _ in range(count):
            yield


def _leading(sketch: RowSketch | PulledSketch, rank: int, drawn_from: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """Squared singular values of A Q, descending; the rotation of Q to their directions; the share that they capture."""
    like = sketch.features[0]
    gram = torch.zeros(like.shape[2], like.shape[2], dtype=torch.float64, device=like.device)
    for features in sketch.features:
        for part in features.flatten(0, 1).split(ROWS_AT_ONCE):
            gram += part.double().T @ part.double() / len(features)
    energies, rotation = torch.linalg.eigh(gram)
    rows = sum(
        features.shape[0] * features.shape[1] for features in sketch.features
    )  # past as many there is only rounding
    energies = energies.flip(0)[: min(rank, rows)].clamp_min(0)
    keep = max(1, int((energies > energies[0] * torch.finfo(like.dtype).eps ** 2).sum()))
    rotation = rotation.flip(1)[:, :keep]
    # E‖P^{1/2} J^T u‖² over random signs u is the squared norm, and E‖V^T P^{1/2} J^T u‖² the part inside (Hutchinson).
    overlaps, whole = sketch.probed
    inside = (rotation.T @ overlaps).square().sum(0)
    shares = [
        _share(float(part) / PROBES, float(of) / PROBES, features, rotation, drawn)
        for part, of, features, drawn in zip(
            inside.view(-1, PROBES).sum(1), whole.view(-1, PROBES).sum(1), sketch.features, drawn_from, strict=True
        )
    ]
    return energies[:keep], rotation, min(shares)


def _with_landmarks(
    sketch: RowSketch | PulledSketch, beside: Tensor, energies: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """Both with what the landmarks have outside of the leading directions, after those."""
    columns = sketch.against(beside)
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    for _ in range(2):  # once more for what rounding leaves
        columns = columns - rotation @ (rotation.T @ columns)
    added, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    added = added[:, sizes > torch.finfo(beside.dtype).eps ** 0.5]
    moved = [
        sum((part.double() @ added).square().sum(0) for part in features.flatten(0, 1).split(ROWS_AT_ONCE))
        / len(features)
        for features in sketch.features
    ]
    return torch.cat([energies, moved[0] + moved[1]]), torch.cat([rotation, added], 1)


def _share(inside: float, whole: float, features: Tensor, rotation: Tensor, drawn: int) -> float:
    """What the directions capture of a set's sensitivity, of which that of the samples drawn from is known from probes."""
    if whole <= 0:
        return 1.0
    if drawn == len(features):
        return min(inside / whole, 1.0)
    held = [
        float(sum((rows.double() @ rotation).square().sum() for rows in part.flatten(0, 1).split(ROWS_AT_ONCE)))
        for part in (features[:drawn], features[drawn:])
    ]
    # The others are as sensitive on average, and what the drawn ones have inside is known, not estimated.
    each = (held[0] + max(whole - inside, 0.0)) / drawn
    others = len(features) - drawn
    return min((held[0] + min(held[1], each * others)) / (each * len(features)), 1.0)
