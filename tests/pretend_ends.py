"""What ends early, and solves, on a pretended accelerator and on the CPU; as a program it prints what came out as JSON."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from pretend_gpu import compared, waits

import stabkit
from stabkit.curvature import GGNOperator
from stabkit.curvature.lowrank import linearise
from stabkit.directions import damped_inverse
from stabkit.models import ResNet
from stabkit.rollout import roll
from stabkit.steps import Position, steps_from
from stabkit.updates import Moments

STEPS = 60
ENDS = {  # each between two looks
    "none": {"drift_tolerance": 1e-9},
    "drift": {"drift_tolerance": 7.5e-6},
    "leakage": {"drift_tolerance": None, "leakage_bound": 0.4, "lr": 2.0, "mix": 0.7},
    "momentum": {"drift_tolerance": 1.1e-5, "momentum": 0.5, "leakage_bound": 50.0},
    "poisson": {"drift_tolerance": 5e-6, "sampling": "poisson"},
}


def endings(model, forget, retain, device) -> dict[str, Any]:
    """Where a device's runs and rollouts end by their algorithm's rule, and how often the host has waited."""
    found: dict[str, Any] = {}
    problem = stabkit.UnlearningProblem(model, forget, retain, device=device)
    preconditioner = stabkit.AGU().step_preconditioner(problem)
    network = linearise(problem, preconditioner, rank=12)

    def told(algorithm, **options):
        """All that a run says, to the last bit."""
        options |= {"preconditioner": preconditioner, "monitor_samples": 32, "stop_on_divergence": False}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            if options.pop("writes", False):
                options |= {"checkpoint": path, "checkpoint_every": 7}
            waits.clear()
            run = stabkit.run(problem, algorithm, **options)
            waited = dict(waits)
            weights = [p.tolist() for p in run.model.parameters()]
            if path.exists():  # the run that is over is read from there
                again = stabkit.run(problem, algorithm, **options)
                assert (again.stop_reason, again.steps) == (run.stop_reason, run.steps)
                assert weights == [p.tolist() for p in again.model.parameters()]
        trajectory = [(c.step, c.retain_loss, c.forget_loss, c.distance) for c in run.trajectory]
        counts = run.gradient_equivalents, run.last_good_step, run.divergence_step
        return {"ends": (run.stop_reason, run.steps), "bits": (trajectory, weights, counts), "waits": waited}

    def walked(algorithm, looks):
        """Where single steps lead, at their looks."""
        theta = problem.vector()
        start = Position(step=0, theta=theta, moments=Moments.zero(algorithm, theta))
        waits.clear()
        sizes = algorithm.batch_sizes(problem)
        for at in steps_from(problem, algorithm, preconditioner, start, batch_sizes=sizes, seed=0, looks=looks):
            if at.stopped or at.step == STEPS:
                break
        waited = dict(waits)
        moments = at.moments.first.tolist()
        return {
            "ends": (at.step, at.stopped, at.gradient_equivalents),
            "bits": (at.theta.tolist(), moments),
            "waits": waited,
        }

    def rolled(algorithm, **options):
        """Where rollouts of two seeds and three step sizes end, on the device."""
        little, roll.HOST_WORK = roll.HOST_WORK, 0
        waits.clear()
        out = roll.rollout(
            network,
            algorithm,
            lr=[f * algorithm.lr for f in (0.5, 1.0, 40.0)],
            mix=[0.3, 0.3, 0.7],
            batch_sizes=algorithm.batch_sizes(problem),
            **options,
        )
        roll.HOST_WORK = little
        numbers = out.score, out.divergence_step.nan_to_num(-1.0), out.retain_loss, out.forget_loss, out.coordinates
        return {"ends": out.stopped_step.tolist(), "bits": [n.tolist() for n in numbers], "waits": dict(waits)}

    for kind in (stabkit.AGU, stabkit.SRAGU):
        for name in ENDS if kind is stabkit.AGU else ("none", "drift", "leakage"):
            algorithm = kind(**{
                "lr": 0.05,
                "mix": 0.3,
                "steps": STEPS,
                "batch_size": 16,
                "lr_schedule": "linear",
                **ENDS[name],
            })
            case = {
                "run": told(algorithm),
                "told": told(algorithm, on_step=lambda record: None),
                "written": told(algorithm, writes=True),
            }
            if kind is stabkit.AGU:
                looks = frozenset(range(10, STEPS + 1, 10))
                case |= {"walk": walked(algorithm, looks), "walk_told": walked(algorithm, None)}
                case["rollout"] = rolled(algorithm, seeds=[0, 1])
                parts = [rolled(algorithm, seeds=[s], on_step=lambda *_: None) for s in (0, 1)]
                case["rollout_told"] = {
                    "ends": [row for part in parts for row in part["ends"]],
                    "bits": [[row for part in parts for row in part["bits"][i]] for i in range(len(parts[0]["bits"]))],
                    "waits": {},
                }
            found[f"{kind.name}_{name}"] = case
    normalised = stabkit.UnlearningProblem(normalised_model(), forget, retain, device=device, batchnorm="batch")
    algorithm = stabkit.AGU(lr=0.05, mix=0.3, steps=40, batch_size=16, lr_schedule="linear", drift_tolerance=5e-4)
    for name, options in (("batchnorm", {}), ("batchnorm_told", {"on_step": lambda record: None})):
        run = stabkit.run(normalised, algorithm, monitor_samples=32, stop_on_divergence=False, **options)
        state = {key: value.tolist() for key, value in run.model.state_dict().items()}
        found[name] = {"ends": (run.stop_reason, run.steps), "bits": state}
    operator = GGNOperator(problem, problem.retain)
    right = torch.randn(problem.size, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right[:, 0] = 0.0
    right[:, 1] = (operator @ right[:, 1].to(operator.device)).cpu()  # which is solved sooner
    steps = []

    class Counted(GGNOperator):
        def __matmul__(self, block):
            steps.append(block.shape[1])
            return super().__matmul__(block)

    operator = Counted(problem, problem.retain)
    waits.clear()
    solution = damped_inverse(operator, right, damping=0.05, tolerance=1e-8)
    found["solve"] = {
        "products": solution.products,
        "steps": len(steps),
        "vectors": solution.vectors.tolist(),
        "residuals": solution.residuals.tolist(),
        "curvature": solution.curvature,
        "waits": dict(waits),
    }
    return found


def normalised_model():
    model = ResNet(1, 4, blocks=(1,), width=4, seed=0).double()
    model(
        torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )  # running statistics
    return model.eval()


if __name__ == "__main__":
    compared(endings)
