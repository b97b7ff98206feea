"""SRAGU: AGU's sensitivities, gated layer by layer by the shape of the layer's weight spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from stabkit._validate import check_choice, check_int, check_seed
from stabkit.algorithms.agu import AGU, normalised_sensitivity
from stabkit.heavy_tail.gate import UNTRUSTED, LayerGates, check_window, gate_layers, gate_per_parameter
from stabkit.heavy_tail.layers import layer_exponents
from stabkit.heavy_tail.table import LayerExponents
from stabkit.preconditioner import Diagonal, Preconditioner
from stabkit.problem import UnlearningProblem


@dataclass(frozen=True, kw_only=True)
class SRAGU(AGU):
    """P = diag(ν_l(j) R̃_j): AGU's R̃ times a gate ν in [floor, 1] from layer l's heavy-tailed exponent (theory §8).

    Written from the abstract of SRAGU (arXiv 2602.09304), which gives no formulas: a heavy-tailed exponent per layer from
    the spectrum of the weights, a bounded weight made of it, AGU's sensitivities. Chosen here: the exponent is the
    maximum-likelihood one with a searched tail; the gate is a product of two logistics; exponents are measured once, at
    θ*; runs stop on drift alone unless a leakage bound is set; a layer whose exponent is not distinguishable from that of
    its own shuffled entries, or rests on too few eigenvalues, is left as AGU has it, with a warning. Small networks have
    only such layers, and there SRAGU is AGU.

    Attributes:
        floor: Smallest gate, in [0, 1]; 1 gives AGU.
        low: Lower end of the window of exponents that move freely.
        high: Upper end of that window.
        width: Width of the window's flanks.
        untrusted: "neutral": layers without a trustworthy exponent have ν = 1; "gate": gated by whatever exponent
            they have.
        shuffles: Shuffled copies of each layer that its exponent is compared with.
        seed: Seed of these shuffles.
    """

    name: ClassVar[str] = "sragu"

    floor: float = 0.1
    low: float = 2.0
    high: float = 6.0
    width: float = 0.5
    untrusted: str = "neutral"
    shuffles: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_window(owner, self.floor, self.low, self.high, self.width)
        check_choice(self.untrusted, name="untrusted", owner=owner, choices=UNTRUSTED)
        check_int(self.shuffles, name="shuffles", owner=owner, low=0)
        check_seed(self.seed, owner=owner)

    def preconditioner(self, problem: UnlearningProblem) -> Preconditioner:
        """diag(ν ∘ R̃).

        Args:
            problem: The unlearning problem.

        Returns:
            The diagonal preconditioner. Cost: n_f per-sample gradients, and `exponents`.
        """
        model = problem.new_model()
        gates = gate_per_parameter(
            model,
            self.exponents(problem),
            floor=self.floor,
            low=self.low,
            high=self.high,
            width=self.width,
            untrusted=self.untrusted,
        )
        spread = {name: gates[name].expand(p.shape) for name, p in problem.parameters.items()}
        with torch.no_grad():
            return Diagonal(problem.flatten(spread) * normalised_sensitivity(problem))

    def exponents(self, problem: UnlearningProblem) -> LayerExponents:
        """Exponents of the trained network's layers.

        Args:
            problem: The unlearning problem.

        Returns:
            The table. Cost: an eigenvalue problem a layer, and up to `shuffles` more.
        """
        return layer_exponents(problem.new_model(), shuffles=self.shuffles, seed=self.seed)

    def gates(self, problem: UnlearningProblem) -> LayerGates:
        """What the gate does to each layer and why, for reports.

        Args:
            problem: The unlearning problem.

        Returns:
            Exponents, whether each is trusted, and ν by layer. Cost: as `exponents`.
        """
        return gate_layers(
            self.exponents(problem),
            floor=self.floor,
            low=self.low,
            high=self.high,
            width=self.width,
            untrusted=self.untrusted,
        )
