"""Signal-plus-noise data and a two-layer ReLU network on it, with per-sample curvature in closed form (theory §10).

A sample has two patches, yμ and ξ ~ N(0, σ_p² (I - μμᵀ/‖μ‖²)), in random order (Cao et al. 2022, arXiv 2202.06526). The
network's margin f = F_{+1} - F_{-1} is piecewise linear in its filters where the activation is ReLU. Away from kinks the
logistic loss ℓ(f) therefore has the rank-one Hessian ℓ''(f) ∇f ∇fᵀ: Hessian and Gauss-Newton curvature are the same, and
everything that the stability theory reads is known without differentiating anything.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabkit._rng import preserved_rng
from stabkit._validate import check_choice, check_int, check_real, check_seed
from stabkit.curvature.factors import SampleFactors

PATCHES = 2
SPANNED = 1e-8  # share of a gradient's squared norm that a basis may miss


@dataclass(frozen=True, kw_only=True, eq=False)
class SignalNoiseData:
    """Samples of one signal patch and one noise patch each.

    Attributes:
        x: Patches, shape (n, 2, d).
        y: Labels, 0 for class -1 and 1 for class +1, shape (n,), int64.
        mu: The signal μ of class +1, shape (d,).
        noise: σ_p, standard deviation of the noise in every direction orthogonal to μ.
        signal_patch: Which patch holds the signal, 0 or 1, shape (n,).
        flipped: Which labels contradict their sample's signal, shape (n,), bool.
    """

    x: Tensor
    y: Tensor
    mu: Tensor
    noise: float
    signal_patch: Tensor
    flipped: Tensor

    @property
    def samples(self) -> int:
        """Number n of samples."""
        return self.x.shape[0]

    @property
    def snr(self) -> float:
        """‖μ‖ / (σ_p √d)."""
        return float(self.mu.double().norm()) / (self.noise * math.sqrt(self.mu.numel()))

    def subset(self, rows: Tensor) -> SignalNoiseData:
        """Some of the samples.

        Args:
            rows: Row numbers, shape (k,).

        Returns:
            Those samples, in that order.
        """
        return SignalNoiseData(
            x=self.x[rows],
            y=self.y[rows],
            mu=self.mu,
            noise=self.noise,
            signal_patch=self.signal_patch[rows],
            flipped=self.flipped[rows],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SignalNoiseSplit:
    """What to forget, what to retain, and what neither was trained on.

    Attributes:
        forget: The samples to forget.
        retain: The other training samples.
        test: Samples held out of training.
    """

    forget: SignalNoiseData
    retain: SignalNoiseData
    test: SignalNoiseData


def signal_noise_data(
    samples: int,
    *,
    dimension: int,
    signal: float,
    noise: float,
    label_noise: float = 0.0,
    direction: Tensor | None = None,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> SignalNoiseData:
    """Draw samples of the model of Cao et al. 2022, with classes that are equally likely.

    One seed draws the same labels, patch orders and standard normal noise at every signal, noise level and direction, so
    that what differs between two such data sets is due to these alone.

    Args:
        samples: Number n of samples.
        dimension: Length d >= 2 of a patch.
        signal: ‖μ‖ > 0.
        noise: σ_p > 0.
        label_noise: Probability in [0, 1) that a label is not that of the sample's signal.
        direction: Direction of μ, shape (d,), of any length but 0; the first axis when None.
        seed: Seed of everything drawn; the global random state is not used up.
        dtype: Floating dtype of the patches.

    Returns:
        The data.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or the direction has the wrong shape or no length.
    """
    owner = "signal_noise_data"
    check_int(samples, name="samples", owner=owner, low=1)
    check_int(dimension, name="dimension", owner=owner, low=2, remedy="One direction is the signal's.")
    check_real(signal, name="signal", owner=owner, low=0, low_open=True)
    check_real(noise, name="noise", owner=owner, low=0, low_open=True)
    check_real(label_noise, name="label_noise", owner=owner, low=0, high=1, high_open=True)
    check_seed(seed, owner=owner)
    if direction is None:
        direction = torch.zeros(dimension, dtype=torch.float64)
        direction[0] = 1.0
    elif direction.shape != (dimension,) or not 0 < float(direction.norm()) < math.inf:
        raise ValueError(
            f"`direction` of `{owner}` must be a vector of {dimension} numbers and finite length above 0; got shape "
            f"{tuple(direction.shape)} and length {float(direction.norm()):g}. None takes the first axis."
        )
    unit = direction.double() / direction.double().norm()
    generator = torch.Generator().manual_seed(seed)
    sign = 2 * torch.randint(0, 2, (samples,), generator=generator) - 1
    place = torch.randint(0, 2, (samples,), generator=generator)
    flipped = torch.rand(samples, generator=generator, dtype=torch.float64) < label_noise
    xi = noise * torch.randn(samples, dimension, generator=generator, dtype=torch.float64)
    xi = xi - torch.outer(xi @ unit, unit)
    rows = torch.arange(samples)
    x = torch.empty(samples, PATCHES, dimension, dtype=torch.float64)
    x[rows, place] = sign.unsqueeze(1) * signal * unit
    x[rows, 1 - place] = xi
    label = torch.where(flipped, -sign, sign)
    return SignalNoiseData(
        x=x.to(dtype),
        y=(label + 1) // 2,
        mu=(signal * unit).to(dtype),
        noise=float(noise),
        signal_patch=place,
        flipped=flipped,
    )


def split_signal_noise(
    data: SignalNoiseData,
    *,
    forget: str = "random",
    share: float = 0.2,
    label: int = 1,
    test_share: float = 0.2,
    seed: int = 0,
) -> SignalNoiseSplit:
    """Hold out a test set, and split the rest into what to forget and what to retain.

    Args:
        data: The samples.
        forget: "random" for a random share of the training samples, "class" for one class, "flipped" for the samples
            whose labels contradict their signal.
        share: Share of the training samples to forget, in (0, 1); only read for "random".
        label: The class to forget, 0 or 1; only read for "class".
        test_share: Share held out, in [0, 1).
        seed: Seed of both choices.

    Returns:
        The split. Each part keeps the order the samples were drawn in.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or nothing would be left to forget or to retain.
    """
    owner = "split_signal_noise"
    check_choice(forget, name="forget", owner=owner, choices=("random", "class", "flipped"))
    check_real(share, name="share", owner=owner, low=0, high=1, low_open=True, high_open=True)
    check_int(label, name="label", owner=owner, low=0, high=1)
    check_real(test_share, name="test_share", owner=owner, low=0, high=1, high_open=True)
    order = torch.randperm(data.samples, generator=torch.Generator().manual_seed(seed))
    held = round(test_share * data.samples)
    test, train = order[:held].sort().values, order[held:]
    if forget == "random":
        chosen = torch.arange(train.numel()) < round(share * train.numel())
    elif forget == "class":
        chosen = data.y[train] == label
    else:
        chosen = data.flipped[train]
    count = int(chosen.sum())
    if not 0 < count < train.numel():
        raise ValueError(
            f"`forget` of `{owner}` must choose some of the training samples and not all; got {forget!r}, which chooses "
            f"{count} of {train.numel()}. Draw more samples, or choose another way."
        )
    return SignalNoiseSplit(
        forget=data.subset(train[chosen].sort().values),
        retain=data.subset(train[~chosen].sort().values),
        test=data.subset(test),
    )


class SignalNoiseCNN(nn.Module):
    """Two-layer convolutional network on two patches with a fixed second layer.

    F_j = (1/m) Σ_r [φ⟨w_{j,r}, patch 1⟩ + φ⟨w_{j,r}, patch 2⟩] with φ(z) = max(z, 0)^q. Its outputs are (F_{-1}, F_{+1}), so
    that cross-entropy is the logistic loss ln(1 + exp(-y f)) of the margin f = F_{+1} - F_{-1}.

    Attributes:
        filters: w, shape (2, m, d); the first m are those of class -1.
        power: q: 1 is ReLU.
    """

    def __init__(self, dimension: int, *, filters: int = 10, init: float = 0.01, power: int = 1, seed: int = 0) -> None:
        """Build it with seeded normal weights.

        Args:
            dimension: Length d of a patch.
            filters: Number m of filters of each class.
            init: Standard deviation σ_0 > 0 of the weights.
            power: q >= 1.
            seed: Seed of the initial weights; the global random state is not used up.
        """
        super().__init__()
        owner = "SignalNoiseCNN"
        check_int(dimension, name="dimension", owner=owner, low=1)
        check_int(filters, name="filters", owner=owner, low=1)
        check_real(init, name="init", owner=owner, low=0, low_open=True, remedy="At 0 no filter is ever active.")
        self.power = check_int(power, name="power", owner=owner, low=1)
        check_seed(seed, owner=owner)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(2, filters, dimension, generator=generator, dtype=torch.float64)
        self.filters = nn.Parameter((init * drawn).float())

    def forward(self, x: Tensor) -> Tensor:
        """Both outputs.

        Args:
            x: Patches, shape (b, 2, d).

        Returns:
            (F_{-1}, F_{+1}), shape (b, 2). Cost 4·b·m·d multiplications.
        """
        active = torch.einsum("jrd,bpd->bjrp", self.filters, x).relu()
        return active.pow(self.power).sum(3).mean(2)


def fit(
    model: SignalNoiseCNN,
    x: Tensor,
    y: Tensor,
    *,
    target: float = 0.05,
    lr: float | None = None,
    max_steps: int = 50_000,
) -> SignalNoiseCNN:
    """Train a copy by full-batch gradient descent until the mean logistic loss is at a target.

    Args:
        model: Where to start; not altered.
        x: Patches, shape (n, 2, d).
        y: Labels in {0, 1}, shape (n,).
        target: Mean loss to stop at, above 0.
        lr: Step size. When None 2m / max_i (‖x_i1‖ + ‖x_i2‖)², which for ReLU is half of what no sample's curvature can
            make unstable.
        max_steps: Steps to take at most.

    Returns:
        A new model in eval mode. Cost 8·n·m·d multiplications a step.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its domain, or no step size is given for another activation than ReLU.
        RuntimeError: If the target is not reached.
    """
    owner = "fit"
    check_real(target, name="target", owner=owner, low=0, low_open=True)
    check_int(max_steps, name="max_steps", owner=owner, low=1)
    _check_samples(x, y, model, owner=owner)
    if lr is None:
        if model.power != 1:
            raise ValueError(
                f"`lr` of `{owner}` must be given where the activation is not ReLU; got None at power {model.power}. "
                "Its curvature grows with the filters, so that no step size is safe for all of training."
            )
        # ‖∇f_i‖² <= (2/m) (‖x_i1‖ + ‖x_i2‖)² and ℓ'' <= 1/4: this is 1/λ for the largest λ there can be.
        lr = 2 * model.filters.shape[1] / float(x.double().norm(dim=2).sum(1).square().max())
    check_real(lr, name="lr", owner=owner, low=0, low_open=True)
    with preserved_rng():
        trained = copy.deepcopy(model).eval()
    x = x.to(trained.filters)
    loss = math.nan
    for _ in range(max_steps + 1):
        mean = nn.functional.cross_entropy(trained(x), y)
        loss = mean.item()
        if loss <= target:
            return trained
        (gradient,) = torch.autograd.grad(mean, trained.filters)
        with torch.no_grad():
            trained.filters.sub_(lr * gradient)
    raise RuntimeError(
        f"`target` of `{owner}` must be reached within {max_steps} steps; got a loss of {loss:.4g} where {target:g} was "
        f"asked for, at step size {lr:.4g}. Allow more steps, or ask for a larger loss."
    )


def signal_noise_factors(
    model: SignalNoiseCNN, x: Tensor, y: Tensor, *, basis: Tensor | None = None, population: int | None = None
) -> SampleFactors:
    """Per-sample curvature V_i = √ℓ'' ∇f_iᵀ and gradients ℓ' ∇f_i of the logistic loss, in closed form.

    For ReLU this is the Hessian itself, away from kinks; for q > 1 it is the Gauss-Newton part.

    Args:
        model: The network.
        x: Patches, shape (n, 2, d).
        y: Labels in {0, 1}, shape (n,).
        basis: Orthonormal coordinates from `signal_noise_basis`, shape (2·m·d, r); those of the filters, flattened, when
            None. Sets that are to be compared need one basis for them all.
        population: Number of samples that these stand for; n when None.

    Returns:
        One factor a sample, shape (n, 1, r) in float64. Cost 8·n·m·d multiplications, and 2·n·m·d·r for a change of basis.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data do not fit the model, or the basis does not span the samples' gradients.
    """
    owner = "signal_noise_factors"
    _check_samples(x, y, model, owner=owner)
    population = x.shape[0] if population is None else population
    check_int(population, name="population", owner=owner, low=x.shape[0])
    margins, rows = _margin_gradients(model, x)
    if basis is not None:
        if basis.dim() != 2 or basis.shape[0] != rows.shape[1]:
            raise ValueError(
                f"`basis` of `{owner}` must have {rows.shape[1]} rows, one for each weight; got shape "
                f"{tuple(basis.shape)}. `signal_noise_basis` makes one."
            )
        inside = rows @ basis.to(rows)
        whole = rows.square().sum(1)
        lost = whole - inside.square().sum(1)
        missing = float((lost / whole.clamp_min(torch.finfo(rows.dtype).tiny)).max())
        if missing > SPANNED:
            raise ValueError(
                f"`basis` of `{owner}` must span the gradients of all samples; got one that misses {missing:.3g} of a "
                "squared norm. Make it by `signal_noise_basis` from all sets together."
            )
        rows = inside
    sign = 2.0 * y.to(rows) - 1
    residual = -sign * torch.sigmoid(-sign * margins)  # ℓ' of ln(1 + exp(-y f))
    curvature = torch.sigmoid(margins) * torch.sigmoid(-margins)  # ℓ''
    return SampleFactors(
        factors=(curvature.sqrt().unsqueeze(1) * rows).unsqueeze(1),
        gradients=residual.unsqueeze(1) * rows,
        population=population,
    )


def signal_noise_basis(model: SignalNoiseCNN, *inputs: Tensor) -> Tensor:
    """Orthonormal basis of what the margins' gradients span over all the given samples.

    Every gradient and every per-sample curvature there lies in it, so nothing is lost; r is at most the number of samples.

    Args:
        model: The network.
        *inputs: Patches of one or more sets, each of shape (n, 2, d).

    Returns:
        Shape (2·m·d, r), float64: a displacement of the filters by c in these coordinates is `basis @ c`, reshaped to
        (2, m, d). Cost 2·n²·m·d multiplications and more.

    Raises:
        ValueError: If there are no inputs, or they do not fit the model.
    """
    owner = "signal_noise_basis"
    if not inputs:
        raise ValueError(f"`inputs` of `{owner}` must be at least one set of patches; got none.")
    for x in inputs:
        _check_patches(x, model, owner=owner)
    rows = torch.cat([_margin_gradients(model, x)[1] for x in inputs])
    # Directions alone matter: rows of unit length keep a small gradient from being taken for rounding.
    length = rows.norm(dim=1, keepdim=True)
    _, values, directions = torch.linalg.svd(rows / torch.where(length > 0, length, 1.0), full_matrices=False)
    rank = int((values > values[0] * torch.finfo(rows.dtype).eps * max(rows.shape)).sum())
    return directions[: max(1, rank)].T.contiguous()


def signal_noise_gram(model: SignalNoiseCNN, x: Tensor, other: Tensor | None = None) -> Tensor:
    """Inner products of the margins' gradients, ⟨∇f_i, ∇f_j⟩, without forming one.

    = (1/m²) Σ_pq ⟨x_ip, x_jq⟩ ⟨φ'_ip, φ'_jq⟩ with φ'_ip the slopes of all 2m filters at patch p of sample i.

    Args:
        model: The network.
        x: Patches, shape (n, 2, d).
        other: Patches of a second set, shape (k, 2, d); the first again when None.

    Returns:
        Shape (n, k), float64. Cost 4·n·k·(2m + d) multiplications.

    Raises:
        ValueError: If the data do not fit the model.
    """
    owner = "signal_noise_gram"
    sets = [x] if other is None else [x, other]
    parts = []
    for patches in sets:
        _check_patches(patches, model, owner=owner)
        slopes = _slopes(model, patches)[1].permute(0, 3, 1, 2).flatten(2)  # (n, 2, 2m)
        parts.append((patches.double().flatten(0, 1), slopes.flatten(0, 1)))
    (a, slope_a), (b, slope_b) = parts[0], parts[-1]
    products = (a @ b.T) * (slope_a @ slope_b.T)
    shape = sets[0].shape[0], PATCHES, sets[-1].shape[0], PATCHES
    return products.reshape(shape).sum((1, 3)) / model.filters.shape[1] ** 2


def _slopes(model: SignalNoiseCNN, x: Tensor) -> tuple[Tensor, Tensor]:
    """φ and φ' of every filter at every patch in float64, each (n, 2, m, patches)."""
    x = x.double()
    before = torch.einsum("jrd,npd->njrp", model.filters.detach().to(x), x)
    active = before.relu()
    return active.pow(model.power), model.power * active.pow(model.power - 1) * (before > 0)


def _margin_gradients(model: SignalNoiseCNN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Margins f_i, shape (n,), and ∇f_i in the filters, shape (n, 2·m·d), float64."""
    values, slopes = _slopes(model, x)
    sign = torch.tensor([-1.0, 1.0], dtype=values.dtype, device=values.device)
    filters = model.filters.shape[1]
    margins = (values.sum((2, 3)) @ sign) / filters
    rows = torch.einsum("j,njrp,npd->njrd", sign / filters, slopes, x.double())
    return margins, rows.flatten(1)


def _check_patches(x: Tensor, model: SignalNoiseCNN, *, owner: str) -> None:
    """Patches must have the shape that the model reads."""
    expected = (PATCHES, model.filters.shape[2])
    if x.dim() != 3 or x.shape[0] == 0 or x.shape[1:] != expected:
        raise ValueError(
            f"`x` of `{owner}` must have shape (n, {expected[0]}, {expected[1]}) with n >= 1, as the model reads it; got "
            f"{tuple(x.shape)}."
        )


def _check_samples(x: Tensor, y: Tensor, model: SignalNoiseCNN, *, owner: str) -> None:
    """Patches and labels must belong together."""
    _check_patches(x, model, owner=owner)
    if y.shape != x.shape[:1] or y.dtype != torch.int64 or not bool(((y == 0) | (y == 1)).all()):
        raise ValueError(
            f"`y` of `{owner}` must be {x.shape[0]} labels 0 or 1 of dtype torch.int64, one a sample; got shape "
            f"{tuple(y.shape)}, {y.dtype}, values {sorted(set(y.flatten().tolist()))[:5]}."
        )
