"""Trace and Frobenius norm of an operator from random probes, with standard errors.

Hutchinson's estimator with random signs, and Hutch++ (Meyer, Musco, Musco and Woodruff, SOSA 2021), which takes the trace
on a randomised range (Halko, Martinsson and Tropp, SIAM Rev. 53, 2011) exactly and estimates the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from stabkit._checkpoint import State
from stabkit._progress import progress_bar
from stabkit._validate import check_choice, check_int
from stabkit.curvature.operators import CurvatureOperator
from stabkit.curvature.orthonormal import tall_qr
from stabkit.spectrum._common import product, rademacher
from stabkit.spectrum.checkpoint import OperatorCheckpoint
from stabkit.spectrum.estimate import Estimate, from_samples

METHODS = ("hutch++", "hutchinson")
LEAST_PROBES = 2  # for a standard error
Form = Callable[[Tensor, Tensor], Tensor]  # of vectors (d, k) and their images: (k,)


class TraceSettings(TypedDict, total=False):
    """What `trace` and its relatives take, each explained there, with the same defaults.

    Attributes:
        method: "hutch++" or "hutchinson".
        max_products: Products to spend.
        at_once: Vectors multiplied at once.
        seed: Seed of the probes.
        progress: Whether to show a progress bar over the blocks.
        checkpoint: File that holds the state.
        checkpoint_every: Blocks from one writing to the next.
    """

    method: str
    max_products: int
    at_once: int
    seed: int
    progress: bool
    checkpoint: str | Path | None
    checkpoint_every: int


def trace(
    operator: CurvatureOperator,
    *,
    method: str = "hutch++",
    max_products: int = 60,
    at_once: int = 16,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 4,
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
        checkpoint: File that holds the range found and the probes' forms: written whole or not at all, resumed from where it
            exists, left in place at the end. A resumed run returns on the CPU bit for bit what an uninterrupted one does;
            one product more recognises the operator. A matrix small enough to be multiplied out writes none.
        checkpoint_every: Blocks from one writing to the next; a killed run repeats at most these.

    Returns:
        The trace; its standard error is 0 where d products gave it. Cost: max_products products. Memory: d·(at_once + a
        third of max_products for Hutch++) numbers; a checkpoint takes d times that third on disk.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its domain, the products are not finite, or the checkpoint is unreadable or of
            another operator or other settings.
    """
    return _estimate(
        operator,
        lambda x, image: (x * image).sum(0, dtype=torch.float64),  # zᵀAz
        "trace",
        method=method,
        max_products=max_products,
        at_once=at_once,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )


def squared_frobenius(operator: CurvatureOperator, **settings: Unpack[TraceSettings]) -> Estimate:
    """‖A‖_F² = tr(A²), the sum of the squared eigenvalues, unbiased.

    Args:
        operator: Symmetric operator of order d.
        **settings: Those of `trace`, applied to A²: ‖Az‖² is zᵀA²z at one product.

    Returns:
        The estimate. Cost and memory: those of `trace`.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: As of `trace`.
    """
    return _estimate(operator, lambda x, image: image.double().square().sum(0), "squared_frobenius", **settings)


def frobenius_norm(operator: CurvatureOperator, **settings: Unpack[TraceSettings]) -> Estimate:
    """‖A‖_F, as the root of `squared_frobenius`.

    Args:
        operator: Symmetric operator of order d.
        **settings: Those of `trace`.

    Returns:
        The estimate; its standard error is carried over to first order, and its bias is of second order in it.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: As of `trace`.
    """
    squared = squared_frobenius(operator, **settings)
    root = math.sqrt(squared.value)
    return replace(squared, value=root, standard_error=squared.standard_error / (2 * root) if root > 0 else 0.0)


def _estimate(
    operator: CurvatureOperator,
    form: Form,
    owner: str,
    *,
    method: str = "hutch++",
    max_products: int = 60,
    at_once: int = 16,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 4,
) -> Estimate:
    """Trace of the quadratic form of a matrix that commutes with A, given by the form of each column and its image."""
    check_choice(method, name="method", owner=owner, choices=METHODS)
    least = LEAST_PROBES * (3 if method == "hutch++" else 1)
    check_int(max_products, name="max_products", owner=owner, low=least, remedy="Fewer have no standard error.")
    check_int(at_once, name="at_once", owner=owner, low=1)
    check_int(checkpoint_every, name="checkpoint_every", owner=owner, low=1)
    d = operator.shape[0]
    if d <= max_products:
        eye = torch.eye(d, dtype=operator.dtype, device=operator.device)
        exact = float(form(eye, product(operator, eye, owner=owner)).sum())
        return Estimate(value=exact, standard_error=0.0, samples=d, products=d)
    rank = max_products // 3 if method == "hutch++" else 0
    stages = [("sketch", rank), ("range", rank), ("probe", max_products - 2 * rank)]
    blocks = [(stage, min(at_once, count - i)) for stage, count in stages for i in range(0, count, at_once)]
    probing = _Probing(operator, form, seed, owner)
    store = None
    if checkpoint is not None:
        settings = {"method": method, "max_products": max_products, "at_once": at_once, "seed": seed}
        store = OperatorCheckpoint(checkpoint, owner, [operator], settings, owner=owner)
        state = store.load()
        if state is not None:
            probing.load(state)
    for stage, count in progress_bar(blocks[probing.blocks :], owner, progress):
        probing.spend(stage, count)
        if store and probing.blocks % checkpoint_every == 0:
            store.save(probing.state())
    if store:
        store.save(probing.state())
    return from_samples(probing.samples, products=max_products, shift=probing.inside)


class _Probing:
    """The estimate in the making.

    Attributes:
        blocks: Blocks of vectors multiplied.
        samples: The form of every probe so far.
        inside: Its trace on the part of the range that was multiplied so far.
    """

    def __init__(self, operator: CurvatureOperator, form: Form, seed: int, owner: str) -> None:
        self._operator, self._form, self._owner = operator, form, owner
        self._generator = torch.Generator().manual_seed(seed)
        self._range = torch.empty(operator.shape[0], 0, dtype=operator.dtype, device=operator.device)
        self._taken = 0  # columns of the range that were multiplied; before the first, it is no more than a sketch
        self._start = self._image = self._range
        self.blocks = 0
        self.samples = torch.empty(0, dtype=torch.float64)
        self.inside = 0.0

    def spend(self, stage: str, count: int) -> None:
        """Multiply so many vectors."""
        if stage == "range":
            if self._taken == 0:
                self._range = tall_qr(self._range)[0]
            block = self._range[:, self._taken : self._taken + count]
            self.inside += float(self._form(block, product(self._operator, block, owner=self._owner)).sum())
            self._taken += count
        else:
            drawn = rademacher(self._operator.shape[0], count, self._generator)
            block = drawn.T.to(self._operator.device, self._operator.dtype)
            if stage == "probe":
                block = block - self._range @ (self._range.T @ block)
            image = product(self._operator, block, owner=self._owner)
            if self.blocks == 0:
                self._start, self._image = block[:, :1].clone(), image[:, :1].clone()
            if stage == "probe":
                self.samples = torch.cat([self.samples, self._form(block, image).cpu()])
            else:
                self._range = torch.cat([self._range, image], 1)
        self.blocks += 1

    def state(self) -> State:
        """Everything that going on needs, as arrays."""
        return {
            "range": self._range.cpu().numpy(),
            "start": self._start.cpu().numpy(),
            "image": self._image.cpu().numpy(),
            "samples": self.samples.numpy(),
            "inside": np.array(self.inside),
            "counters": np.array([self.blocks, self._taken], dtype=np.int64),
            "generator": self._generator.get_state().numpy(),
        }

    def load(self, state: State) -> None:
        """Take over a saved state."""
        self._range, self._start, self._image = (
            torch.as_tensor(state[name]).to(self._operator.device) for name in ("range", "start", "image")
        )
        self.samples, self.inside = torch.as_tensor(state["samples"]), float(state["inside"])
        self.blocks, self._taken = (int(c) for c in state["counters"])
        self._generator.set_state(torch.as_tensor(state["generator"]))
