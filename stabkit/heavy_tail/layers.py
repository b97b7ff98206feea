"""Heavy-tailed exponents of every layer of a network, each with the evidence for and against it."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import math
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from threadpoolctl import ThreadpoolController, threadpool_limits
from torch import Tensor, nn

from stabkit._validate import check_choice, check_int, check_seed
from stabkit.heavy_tail.fit import (
    EIGENVALUE_FLOOR,
    METHODS,
    PowerLawFit,
    check_bootstrap,
    check_p_value_draws,
    check_tail,
    fit_power_law,
)
from stabkit.heavy_tail.matrices import WeightMatrix, weight_matrices
from stabkit.heavy_tail.scan import Array
from stabkit.heavy_tail.table import LayerExponent, LayerExponents

OWNER = "layer_exponents"
CONV = ("pooled", "slices")
FEW_EIGENVALUES = 50
SHORT_TAIL = 20
WIDE_ERROR = 0.1  # σ/ξ
WINDOW = (2.0, 6.0)  # of well-trained layers (Martin et al. 2021); an interval should not cross its ends
REJECTED = 0.1  # p-values at or below it rule the power law out (Clauset et al. §4.1)
SIDE_BY_SIDE = 2**23  # entries of a weight up to which layers are measured side by side
LIMITING = threading.Lock()
CHUNK = 2**24  # entries converted to float64 at once


def layer_exponents(
    model: nn.Module,
    *,
    layers: Sequence[str] | None = None,
    conv: str = "pooled",
    method: str = "mle",
    tail: int | float | None = None,
    bootstrap: int = 0,
    p_value_draws: int = 0,
    shuffles: int = 9,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> LayerExponents:
    """Fit the spectrum of every weight matrix.

    Eigenvalues are those of WᵀW (no division by the larger dimension: exponents do not change with scale). A layer's
    exponent is trusted only if the tail is long enough, its error small, and it lies below the exponents of the same
    entries in random order: with k shuffles, noise passes that last test about once in k + 1 times. Thresholds are our
    choice, from the estimator's measured spread on Pareto samples and on Gaussian matrices.

    Args:
        model: The network; it is only read. Names are without what torch.compile, DataParallel or DistributedDataParallel
            put before them.
        layers: Layer, module or parameter names, or shell patterns; all when None.
        conv: "pooled": all kernel positions of a convolution give one spectrum; "slices": one row each.
        method: As in `fit_power_law`.
        tail: As in `fit_power_law`, the same for every layer and its shuffled copies: a share follows their sizes.
        bootstrap: Resamples for each interval; 0 for none.
        p_value_draws: Synthetic samples for each goodness-of-fit p-value; 0 for none, "mle" only.
        shuffles: Shuffled copies of each layer, at most: none where other evidence rules the exponent out, and no more once
            one copy's is as small. 0 leaves that test out, and then no exponent is trusted.
        seed: Seed of shuffles and bootstrap; a layer's draws do not depend on which others are fitted.
        device: Where to find eigenvalues; where each weight is when None (the CPU if that has no float64).

    Returns:
        The table. Cost per a x b matrix, a <= b: a²b for the Gram matrix and O(a³) for its eigenvalues, in float64, and as
        much again for every shuffled copy. As many layers are measured at once as PyTorch has threads, and on the CPU as
        many matrices; one by one where a weight has more than 8 million entries.

    Raises:
        TypeError: If the model is not a module, `layers` is one string, or `tail` is no number.
        ValueError: If an argument is out of range or a pattern matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` of `{OWNER}` must be a torch.nn.Module; got {type(model).__name__}.")
    check_choice(conv, name="conv", owner=OWNER, choices=CONV)
    check_choice(method, name="method", owner=OWNER, choices=METHODS)
    share = check_tail(tail, owner=OWNER)
    check_bootstrap(bootstrap, owner=OWNER)
    check_p_value_draws(p_value_draws, method, owner=OWNER)
    check_int(shuffles, name="shuffles", owner=OWNER, low=0)
    check_seed(seed, owner=OWNER)
    if isinstance(layers, str):
        raise TypeError(
            f"`layers` of `{OWNER}` must be a sequence of names; got the string {layers!r}. Use [{layers!r}]."
        )
    chosen: list[WeightMatrix] = []
    skipped: list[tuple[str, str]] = []
    unmatched = set(layers or ())
    known: list[str] = []
    for entry in weight_matrices(model, conv=conv):
        if not isinstance(entry, WeightMatrix):
            skipped.append(entry)
            continue
        known.append(entry.name)
        if layers is not None:
            hits = {p for p in layers if _matches(entry, p)}
            unmatched -= hits
            if not hits:
                skipped.append((entry.name, "not asked for by `layers`"))
                continue
        chosen.append(entry)
    if unmatched:
        missing = min(unmatched)
        near = difflib.get_close_matches(missing, known, n=1, cutoff=0.0)
        raise ValueError(
            f"`layers` of `{OWNER}` must match at least one layer each; got {missing!r}, which matches none of "
            f"{len(known)}." + (f" Did you mean {near[0]!r}?" if near else "")
        )
    measured = partial(
        _row,
        method=method,
        tail=share,
        bootstrap=bootstrap,
        p_value_draws=p_value_draws,
        shuffles=shuffles,
        seed=seed,
        device=device,
    )
    return LayerExponents(
        rows=_in_threads(measured, chosen, device),
        skipped=tuple(skipped),
        method=method,
        conv=conv,
        shuffles=shuffles,
        seed=seed,
        tail=share,
    )


def _in_threads(
    measured: Callable[..., LayerExponent], entries: Sequence[WeightMatrix], device: torch.device | str | None
) -> tuple[LayerExponent, ...]:
    """The rows; several layers at once, and on the CPU several matrices of each: LAPACK's own threads gain little."""
    devices = {entry.weight.device if device is None else torch.device(device) for entry in entries}
    kinds = {place.type for place in devices}
    threads = torch.get_num_threads()
    small = all(entry.weight.numel() <= SIDE_BY_SIDE for entry in entries)  # others fill memory, and LAPACK's threads
    if not (small and kinds <= {"cpu", "cuda"} and min(threads, len(entries)) > 1):
        with LIMITING, threadpool_limits(threads):  # in this thread, whose modes others do not have
            return tuple(map(measured, entries))
    workers = min(threads, len(entries))
    at_once = min(threads, sum(entry.stack[0] for entry in entries))
    accelerators = [place for place in devices if place.type == "cuda"]
    streams = [torch.cuda.current_stream(place) for place in accelerators]
    for place in accelerators:  # PyTorch loads its solvers at the first call, which must not come from two threads
        torch.linalg.eigvalsh(torch.eye(1, dtype=torch.float64, device=place))

    def on_stream(entry: WeightMatrix) -> LayerExponent:
        with contextlib.ExitStack() as stack:
            for stream in streams:  # an accelerator's part of the work stays in the caller's order
                stack.enter_context(torch.cuda.stream(stream))
            return measured(entry, beside=inner)

    openmp = ThreadpoolController().select(user_api="openmp")

    def single() -> None:
        """Keep PyTorch's operations in a new thread from starting as many threads again as the process may have."""
        torch.get_num_threads()  # at its first use PyTorch sets a thread's number
        openmp.limit(limits=1)

    # The longest first, so that none of them is waited for at the end.
    longest = sorted(range(len(entries)), key=lambda i: _work(entries[i]), reverse=True)
    # The limit is the process's: two calls at once would undo each other's.
    with (
        LIMITING,
        threadpool_limits(max(1, threads // at_once)),
        ThreadPoolExecutor(at_once, initializer=single) as inner,
        ThreadPoolExecutor(workers, initializer=single) as pool,
    ):
        rows = dict(zip(longest, pool.map(on_stream, [entries[i] for i in longest]), strict=True))
    return tuple(rows[i] for i in range(len(entries)))


def _work(entry: WeightMatrix) -> int:
    """Multiplications of a layer's Gram matrices, to which those of their eigenvalues are in proportion."""
    s, a, b = entry.stack
    return s * a * b * min(a, b)


def _matches(entry: WeightMatrix, pattern: str) -> bool:
    names = (entry.name, entry.module, entry.parameter)
    return pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in names)


def gram_eigenvalues(
    matrices: Tensor, *, device: torch.device | str | None = None, beside: Executor | None = None
) -> Tensor:
    """Squared singular values of a stack of matrices, pooled.

    Args:
        matrices: Shape (s, a, b), any floating dtype.
        device: Where to compute; the tensor's device when None.
        beside: Does several matrices at once on the CPU; one after another when None.

    Returns:
        Ascending eigenvalues, shape (s·min(a, b),), float64, on the CPU; rounding below zero is clipped.
    """
    target = torch.device(device) if device is not None else matrices.device
    if target.type == "mps":  # no float64 there
        target = torch.device("cpu")
    matrices = matrices.detach()
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT  # (s, a, b) with a <= b
    s, a, b = wide.shape
    step = max(1, CHUNK // (s * a))
    if target.type == "cpu":
        each = (map if beside is None else beside.map)(partial(_gram_eigenvalues, step=step), wide.cpu())
        values = torch.from_numpy(np.concatenate(list(each)))
    else:
        gram = torch.zeros(s, a, a, dtype=torch.float64, device=target)
        for start in range(0, b, step):
            piece = wide[:, :, start : start + step].to(target, torch.float64)
            gram.baddbmm_(piece, piece.mT)
        values = torch.linalg.eigvalsh(gram)
    return values.clamp(min=0).flatten().sort().values.cpu()


def _gram_eigenvalues(matrix: Tensor, *, step: int) -> Array:
    """Eigenvalues of one matrix's Gram matrix, summed over so many columns at a time."""
    # NumPy's LAPACK is up to 1.8 times faster than PyTorch's here, and it makes half of a product with itself.
    gram = np.zeros((matrix.shape[0], matrix.shape[0]))
    for piece in matrix.split(step, 1):
        part = piece.to(torch.float64).contiguous().numpy()
        gram += part @ part.T
    return np.linalg.eigvalsh(gram).astype(np.float64, copy=False)


def _row(
    entry: WeightMatrix,
    *,
    method: str,
    tail: int | float | None,
    bootstrap: int,
    p_value_draws: int,
    shuffles: int,
    seed: int,
    device: torch.device | str | None,
    beside: Executor | None = None,
) -> LayerExponent:
    """One layer's fit, null range and metrics."""
    matrices = entry.matrices().detach()
    s, a, b = entry.stack
    count = s * min(a, b)
    shape = tuple(entry.weight.shape) if entry.part is not None or entry.kernel is not None else _shape(entry)
    spectrum = spectrum_of(matrices, device=device, beside=beside)
    fit = fit_power_law(
        spectrum,
        method=method,
        tail=tail,
        bootstrap=bootstrap,
        p_value_draws=p_value_draws,
        seed=layer_seed(seed, entry.name, 0),
    )
    against = _against(fit, entry, count)
    null: list[float] = []
    # Shuffles cost most of all: none where the exponent is out already, and no more once one of them has put it out.
    for draw in range(shuffles if not against else 0):
        shuffled = shuffle(matrices, layer_seed(seed, entry.name, draw + 1))
        other = fit_power_law(gram_eigenvalues(shuffled, device=device, beside=beside), method=method, tail=tail)
        null += [other.exponent] if other.defined else []
        if null and fit.exponent >= null[-1]:
            break
    null_low, null_high = (min(null), max(null)) if null else (math.nan, math.nan)
    if not against:
        against = _against_null(fit.exponent, null)
    kept = spectrum[spectrum > EIGENVALUE_FLOOR]
    edge, spikes = marchenko_pastur(kept, min(a, b), max(a, b)) if fit.defined else (math.nan, 0)
    return LayerExponent(
        name=entry.name,
        module=entry.module,
        parameter=entry.parameter,
        kind=entry.kind,
        shape=shape,
        exponent=fit.exponent,
        standard_error=fit.standard_error,
        interval=fit.interval,
        n_tail=fit.n_tail,
        eigenvalues=count,
        distance=fit.distance,
        lambda_min=fit.lambda_min,
        lambda_max=fit.lambda_max,
        alpha_weighted=fit.exponent * math.log10(fit.lambda_max) if fit.defined else math.nan,
        log_alpha_norm=_log_power_sum(kept, fit.exponent) if fit.defined else math.nan,
        stable_rank=float(kept.sum() / kept[-1]) if len(kept) else math.nan,
        mp_edge=edge,
        spikes=spikes,
        null_low=null_low,
        null_high=null_high,
        flags=(*against, *_notes(fit, count)),
        trusted=not against,
        reason="; ".join(against),
        axis=entry.axis,
        part=entry.part,
        heads=entry.heads,
        sizes=entry.sizes,
        kernel=entry.kernel,
        p_value=fit.p_value,
    )


def _shape(entry: WeightMatrix) -> tuple[int, ...]:
    """The parameter's own shape: a grouped convolution's is held with its groups apart."""
    shape = tuple(entry.weight.shape)
    return (shape[0] * shape[1], *shape[2:]) if entry.permute else shape


def spectrum_of(matrices: Tensor, *, device: torch.device | str | None = None, beside: Executor | None = None) -> Array:
    """Squared singular values of a stack of matrices, pooled; all NaN where a weight is NaN or infinite.

    Args:
        matrices: Shape (s, a, b).
        device: As in `gram_eigenvalues`.
        beside: As in `gram_eigenvalues`.

    Returns:
        Ascending, shape (s·min(a, b),), float64.
    """
    if not bool(torch.isfinite(matrices).all()):
        return np.full(matrices.shape[0] * min(matrices.shape[1:]), math.nan)
    return gram_eigenvalues(matrices, device=device, beside=beside).numpy()


def layer_seed(seed: int, name: str, draw: int) -> int:
    """Seed of one draw for one layer, whatever other layers are fitted.

    Args:
        seed: The user's seed.
        name: The layer's name.
        draw: 0 for resampling, 1, 2, ... for shuffles.

    Returns:
        The seed.
    """
    return zlib.crc32(f"{seed}/{draw}/{name}".encode())


def shuffle(matrices: Tensor, seed: int) -> Tensor:
    """The same entries in random order.

    Args:
        matrices: Shape (s, a, b).
        seed: Seed of the order.

    Returns:
        A new tensor of the same shape.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(matrices.numel(), generator=generator).to(matrices.device)
    return matrices.reshape(-1)[order].view_as(matrices)


def _log_power_sum(values: Array, exponent: float) -> float:
    """log10 Σ λ^ξ without overflow."""
    logs = exponent * np.log(values)
    peak = logs.max()
    return float((peak + np.log(np.exp(logs - peak).sum())) / math.log(10))


def marchenko_pastur(values: Array, small: int, large: int) -> tuple[float, int]:
    """Upper edge of the random bulk and the eigenvalues beyond it.

    With the eigenvalues rescaled to mean 1, the edge is (σ(1 + 1/√Q))², Q = large/small, and an eigenvalue is a spike
    beyond edge + √τ, τ = edge^(2/3) small^(-2/3)/√Q being the Tracy-Widom scale: weightwatcher's margin, which is
    several times that scale. σ² is the mean of what is not a spike, repeated until it settles.

    Args:
        values: Ascending eigenvalues, shape (n,), positive.
        small: Smaller dimension of the matrix.
        large: Larger dimension.

    Returns:
        The edge in the units of `values`, and the number of spikes. Cost O(n) a round.
    """
    scaled = values / values.mean()
    ratio = large / small
    inside, edge = len(scaled), math.nan
    while inside > 0:
        edge = float(scaled[:inside].mean()) * (1 + 1 / math.sqrt(ratio)) ** 2
        margin = math.sqrt(edge ** (2 / 3) * small ** (-2 / 3) / math.sqrt(ratio))
        below = int(np.searchsorted(scaled, edge + margin, side="right"))
        if below >= inside:
            break
        inside = below
    return edge * float(values.mean()), len(scaled) - inside


def _against(fit: PowerLawFit, entry: WeightMatrix, count: int) -> list[str]:
    """What forbids acting on the exponent, but for the comparison with shuffled entries."""
    if not fit.defined:
        return [*entry.flags, f"undefined: {fit.reason}"]
    against = list(entry.flags)
    if count < FEW_EIGENVALUES:
        against.append(f"{count} eigenvalues, fewer than {FEW_EIGENVALUES}")
    if fit.n_tail < SHORT_TAIL:
        against.append(f"tail of {fit.n_tail}, fewer than {SHORT_TAIL}")
    if fit.standard_error > WIDE_ERROR * abs(fit.exponent):
        against.append(f"standard error {fit.standard_error / abs(fit.exponent):.0%} of the exponent")
    if fit.interval is not None:
        crossed = [f"{end:g}" for end in WINDOW if fit.interval[0] < end < fit.interval[1]]
        if crossed:
            against.append(f"interval [{fit.interval[0]:.2f}, {fit.interval[1]:.2f}] crosses {' and '.join(crossed)}")
    if fit.ties:
        against.append("equal eigenvalues in the tail")
    if fit.near_minima:
        against.append("other tails fit nearly as well and give other exponents")
    return against


def _against_null(exponent: float, null: Sequence[float]) -> list[str]:
    """What the comparison with shuffled entries says against an exponent."""
    if not null:
        return ["not compared with shuffled entries"]
    return [] if exponent < min(null) else [f"not below the exponent of shuffled entries, {min(null):.2f}"]


def _notes(fit: PowerLawFit, count: int) -> list[str]:
    """What is unusual without forbidding anything."""
    if not fit.defined:
        return []
    notes: list[str] = []
    if fit.exponent < WINDOW[0]:
        notes.append(f"over-trained by weightwatcher's rule: exponent below {WINDOW[0]:g}")
    elif fit.exponent > WINDOW[1]:
        notes.append(f"under-trained by weightwatcher's rule: exponent above {WINDOW[1]:g}")
    if fit.p_value is not None and fit.p_value <= REJECTED:
        notes.append(f"power law rejected: p = {fit.p_value:.2g}")
    if fit.n < count:
        notes.append(f"rank deficient: {count - fit.n} of {count} eigenvalues are numerically zero")
    return notes
