"""Data parallelism for curvature products: each rank holds a shard of the samples, one all-reduce for each block product.

Launch one process a rank, for instance with torchrun, and give every rank the same model and the same calls:

    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
    operator = curvature_operator(problem, problem.retain, parallel=DataParallel())
    extreme_eigenpairs(operator)                   # the same answer on every rank

A product with k vectors reduces d·k + 4 numbers in float64. A ring of p ranks sends 2(p-1)/p of that from each rank: for
d = 11 million (ResNet-18) and k = 2 some 350 MB, which 10 Gbit/s carry in 0.3 s, whatever the number of ranks; the gradients
behind it fall as 1/p. Everything else, the Lanczos vectors included, is computed by every rank for itself, so nothing
else is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from stabkit._validate import check_choice, check_real


@dataclass(frozen=True, kw_only=True, eq=False)
class DataParallel:
    """How the ranks of a process group share a data set.

    Attributes:
        holds: "all": every rank's problem holds all samples, and each takes its share of them; "shard": every rank's problem
            holds its own samples alone, as many as it likes.
        timeout: Seconds to wait for the other ranks in one product, after which there is an error instead of a hang.
        group: The process group; the default one when None.

    Raises:
        RuntimeError: If no process group has been started.
        ValueError: If `holds` or `timeout` is out of its domain.
    """

    holds: str = "all"
    timeout: float = 600.0
    group: Any = None

    def __post_init__(self) -> None:
        check_choice(self.holds, name="holds", owner="DataParallel", choices=("all", "shard"))
        check_real(self.timeout, name="timeout", owner="DataParallel", low=0, low_open=True)
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "`DataParallel` needs a process group; got none. Call torch.distributed.init_process_group on every rank, "
                "for instance under torchrun."
            )

    @property
    def rank(self) -> int:
        """This process's number."""
        return distributed.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return distributed.get_world_size(self.group)

    def shard(self, indices: Tensor) -> Tensor:
        """This rank's part of some samples.

        Args:
            indices: Sample indices, shape (m,).

        Returns:
            Every p-th of them with `holds="all"`, which may be none; all of them with `holds="shard"`.
        """
        return indices[self.rank :: self.ranks] if self.holds == "all" else indices

    def check_same(self, **facts: object) -> None:
        """Make sure that the ranks work on the same problem.

        Args:
            **facts: What must agree, by name.

        Raises:
            ValueError: If a rank has another value.
        """
        gathered: list[Any] = [None] * self.ranks
        if distributed.get_backend(self.group) == "gloo":  # the others have watchdogs of their own
            self._wait(lambda: distributed.monitored_barrier(self.group, timedelta(seconds=self.timeout)), "operator")
        distributed.all_gather_object(gathered, facts, group=self.group)
        for name, value in facts.items():
            values = [other.get(name) for other in gathered]  # a rank that holds a shard tells less
            if any(v != value for v in values):
                listed = ", ".join(f"{v} on rank {r}" for r, v in enumerate(values))
                raise ValueError(
                    f"all ranks must have the same {name}; got {listed}. Start every rank with the same model, set and seed."
                )

    def sum(self, total: Tensor, count: int, block: Tensor) -> tuple[Tensor, int]:
        """Sum a product over the ranks.

        Args:
            total: This rank's sum over its samples, float64, shape (d, k).
            count: How many samples it is over.
            block: The vectors that were multiplied, shape (d, k): they must be the same everywhere.

        Returns:
            The sum over all ranks' samples and their number. Cost: one all-reduce of d·k + 4 numbers.

        Raises:
            RuntimeError: If a rank does not answer in time, or multiplied other vectors.
        """
        check = float(block.double().square().sum() + block.double().sum())
        extra = torch.tensor([count, 1.0, check, check * check], dtype=torch.float64, device=total.device)
        payload = torch.cat([total.reshape(-1), extra])

        def reduce() -> None:
            work = distributed.all_reduce(payload, group=self.group, async_op=True)
            if work is not None:
                work.wait(timedelta(seconds=self.timeout))

        self._wait(reduce, "product")
        samples, ranks, first, second = payload[-4:].tolist()
        if abs(ranks * second - first * first) > 1e-9 * max(abs(ranks * second), 1e-300):
            raise RuntimeError(
                f"rank {self.rank} of {self.ranks}: the ranks multiplied different vectors. Make the same calls with the "
                "same seeds on every rank."
            )
        return payload[:-4].reshape(total.shape), round(samples)

    def _wait(self, action: Any, what: str) -> None:
        try:
            action()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.ranks} got no answer from the others for its {what} within {self.timeout:g} s. "
                "A rank has died, fallen behind or makes other calls; its own log says which. Restart all ranks, or raise "
                "`timeout` of `DataParallel`."
            ) from error
