"""Trace and Frobenius norm of an operator from random probes, with standard errors.

Hutchinson's estimator with random signs, and Hutch++ (Meyer, Musco, Musco and Woodruff, SOSA 2021), which takes the trace
on a randomised range (Halko, Martinsson and Tropp, SIAM Rev. 53, 2011) exactly and estimates the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stabkit._progress import progress_bar
from stabkit._validate import check_choice, check_int
from stabkit.curvature.operators import CurvatureOperator
from stabkit.spectrum._common import product, rademacher
from stabkit.spectrum.estimate import Estimate, from_samples

METHODS = ("hutch++", "hutchinson")
LEAST_PROBES = 2  # for a standard error


def trace(
    operator: CurvatureOperator,
    *,
    method: str = "hutch++",
    max_products: int = 60,
    at_once: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """Trace of a symmetric operator, unbiased.

    Args:
        operator: Symmetric operator of order d.
        method: "hutchinson": variance 2(‖A‖_F² - Σ A_ii²)/m. "hutch++": a third of the products finds the dominant
            range, a third takes the trace there, the rest estimate what remains; exact up to rounding where the rank is at
            most max_products/3, and for any semi-definite matrix an error of order tr(A)/m instead of tr(A)/√m.
        max_products: Products to spend, at least 2 for Hutchinson and 6 for Hutch++; no more than d are made, which give the
            exact trace.
        at_once: Vectors multiplied at once.
        seed: Seed of the probes.
        progress: Whether to show a progress bar over the blocks.

    Returns:
        The trace; its standard error is 0 where d products gave it. Cost: max_products products. Memory: d·(at_once + a
        third of max_products for Hutch++) numbers.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain, or the products are not finite.
    """
    return _estimate(
        operator,
        lambda x, image: (x * image).sum(0, dtype=torch.float64),  # zᵀAz
        method=method,
        max_products=max_products,
        at_once=at_once,
        seed=seed,
        progress=progress,
        owner="trace",
    )


def squared_frobenius(
    operator: CurvatureOperator,
    *,
    method: str = "hutch++",
    max_products: int = 60,
    at_once: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """‖A‖_F² = tr(A²), the sum of the squared eigenvalues, unbiased.

    Args:
        operator: Symmetric operator of order d.
        method: As in `trace`, applied to A²: ‖Az‖² is zᵀA²z at one product.
        max_products: As in `trace`.
        at_once: Vectors multiplied at once.
        seed: Seed of the probes.
        progress: Whether to show a progress bar over the blocks.

    Returns:
        The estimate. Cost and memory: those of `trace`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain, or the products are not finite.
    """
    return _estimate(
        operator,
        lambda x, image: image.double().square().sum(0),
        method=method,
        max_products=max_products,
        at_once=at_once,
        seed=seed,
        progress=progress,
        owner="squared_frobenius",
    )


def frobenius_norm(
    operator: CurvatureOperator,
    *,
    method: str = "hutch++",
    max_products: int = 60,
    at_once: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """‖A‖_F, as the root of `squared_frobenius`.

    Args:
        operator: Symmetric operator of order d.
        method: As in `squared_frobenius`.
        max_products: As in `squared_frobenius`.
        at_once: Vectors multiplied at once.
        seed: Seed of the probes.
        progress: Whether to show a progress bar over the blocks.

    Returns:
        The estimate; its standard error is carried over to first order, and its bias is of second order in it.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain, or the products are not finite.
    """
    squared = squared_frobenius(
        operator, method=method, max_products=max_products, at_once=at_once, seed=seed, progress=progress
    )
    root = math.sqrt(squared.value)
    return Estimate(
        value=root,
        standard_error=squared.standard_error / (2 * root) if root > 0 else 0.0,
        samples=squared.samples,
        products=squared.products,
    )


def _estimate(
    operator: CurvatureOperator,
    form: Callable[[Tensor, Tensor], Tensor],
    *,
    method: str,
    max_products: int,
    at_once: int,
    seed: int,
    progress: bool,
    owner: str,
) -> Estimate:
    """Trace of the quadratic form of a matrix that commutes with A, given by the form of each column and its image."""
    check_choice(method, name="method", owner=owner, choices=METHODS)
    least = LEAST_PROBES * (3 if method == "hutch++" else 1)
    check_int(max_products, name="max_products", owner=owner, low=least, remedy="Fewer have no standard error.")
    check_int(at_once, name="at_once", owner=owner, low=1)
    d, before = operator.shape[0], operator.products
    if d <= max_products:
        eye = torch.eye(d, dtype=operator.dtype, device=operator.device)
        exact = float(form(eye, product(operator, eye, owner=owner)).sum())
        return Estimate(value=exact, standard_error=0.0, samples=d, products=d)
    generator = torch.Generator().manual_seed(seed)
    rank = max_products // 3 if method == "hutch++" else 0
    sizes = [
        (stage, min(at_once, count - i))
        for stage, count in _stages(rank, max_products)
        for i in range(0, count, at_once)
    ]
    range_basis = torch.empty(d, 0, dtype=operator.dtype, device=operator.device)
    sketches: list[Tensor] = []
    samples: list[Tensor] = []
    inside = 0.0
    taken = 0
    for stage, count in progress_bar(sizes, owner, progress):
        if stage == "range":
            if taken == 0:
                range_basis = torch.linalg.qr(torch.cat(sketches, 1)).Q
            block = range_basis[:, taken : taken + count]
            inside += float(form(block, product(operator, block, owner=owner)).sum())
            taken += count
            continue
        block = rademacher(d, count, generator).T.to(operator.device, operator.dtype)
        if stage == "sketch":
            sketches.append(product(operator, block, owner=owner))
        else:
            block = block - range_basis @ (range_basis.T @ block)
            samples.append(form(block, product(operator, block, owner=owner)).cpu())
    return from_samples(torch.cat(samples), products=operator.products - before, shift=inside)


def _stages(rank: int, max_products: int) -> list[tuple[str, int]]:
    """Products of each stage."""
    return [("sketch", rank), ("range", rank), ("probe", max_products - 2 * rank)]
