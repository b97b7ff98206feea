"""Random per-sample curvature and two-set dynamics, for hypothesis and for seeded loops."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from stabkit.curvature.factors import SampleFactors
from stabkit.sampling import SAMPLINGS
from stabkit.stability import LinearDynamics

FAMILIES = ("independent", "aligned", "separate", "flat")


def random_factors(
    seed, *, samples, rows, rank, family="independent", scale=1.0, signed=False, drift=False, population=None
):
    """One set's factors: independent directions, nearly one shared, one axis each, or none along the last axis."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = normal(samples, rows, rank)
    if family == "aligned":
        factors = normal(1, 1, rank) + 0.1 * factors
    elif family == "separate":
        axes = torch.eye(rank, dtype=torch.float64)[torch.arange(samples) % rank]
        factors = factors[..., :1] * axes.unsqueeze(1)
    elif family == "flat":
        factors = factors * (torch.arange(rank) < max(1, rank - 1))
    return SampleFactors(
        factors=scale * factors / rows**0.5,
        gradients=normal(samples, rank) if drift else torch.zeros(samples, rank, dtype=torch.float64),
        signs=torch.sign(normal(samples, rows)) if signed else None,
        population=samples if population is None else population,
    )


@st.composite
def sample_factors(draw, *, rank=None, max_samples=8, signed=None, larger_population=None):
    """Factors of 1 to `max_samples` samples; `signed` and `larger_population` are drawn where None."""
    samples = draw(st.integers(1, max_samples))
    copies = draw(st.integers(1, 4)) if larger_population in {None, True} else 1
    return random_factors(
        draw(st.integers(0, 2**32 - 1)),
        samples=samples,
        rows=draw(st.integers(1, 3)),
        rank=draw(st.integers(1, 6)) if rank is None else rank,
        family=draw(st.sampled_from(FAMILIES)),
        scale=draw(st.sampled_from((0.1, 1.0, 10.0))),
        signed=draw(st.booleans()) if signed is None else signed,
        drift=draw(st.booleans()),
        population=copies * samples,
    )


@st.composite
def two_sets(draw, *, rank=None, max_samples=8, signed=None, larger_population=None, mix=None, sampling=None):
    """Two-set dynamics; what is None is drawn."""
    r = draw(st.integers(1, 6)) if rank is None else rank
    options = {"rank": r, "max_samples": max_samples, "signed": signed, "larger_population": larger_population}
    retain, forget = draw(sample_factors(**options)), draw(sample_factors(**options))
    return LinearDynamics(
        retain=retain,
        forget=forget,
        mix=draw(st.sampled_from((0.0, 0.05, 0.3, 0.7, 1.0))) if mix is None else mix,
        batch_sizes=(draw(st.integers(1, retain.population)), draw(st.integers(1, forget.population))),
        sampling=draw(st.sampled_from(SAMPLINGS)) if sampling is None else sampling,
    )


def random_matrix(seed, rank, *, semidefinite=False):
    """A symmetric matrix, or a positive semi-definite one of random rank."""
    generator = torch.Generator().manual_seed(seed)
    columns = 1 + seed % rank if semidefinite else rank
    x = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return x @ x.T if semidefinite else x + x.T


def unit_lr(dynamics):
    """The inverse of the curvature's scale: a step size that is neither tiny nor huge."""
    size = max(float(part.matrices().abs().amax()) for part in (dynamics.retain, dynamics.forget))
    return 1 / max(size, 1e-12)


def rotated(part, orthogonal):
    """The same samples in another orthonormal basis."""
    return replace(part, factors=part.factors @ orthogonal, gradients=part.gradients @ orthogonal)
