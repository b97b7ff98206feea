"""A pretend accelerator: tensors with a device of their own whose work is done on the CPU.

It refuses operations on tensors of two devices, as an accelerator does, and counts how often the host waits for a value, and
how often it sends one. Run
as a program it predicts, runs and audits on it and on the CPU, and prints what came out as JSON: it registers a device for
the whole process, so tests start it in one of its own.
"""

from __future__ import annotations

import collections
import json
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")
TAKES_HOST_TENSORS = ("aten.index", "aten.copy_", "aten._to_copy", "aten._index_put_impl_")
waits: collections.Counter[str] = collections.Counter()
sends: collections.Counter[str] = collections.Counter()


class Backend(_DummyBackendModule):
    """What PyTorch asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def is_autocast_enabled(self):
        return False

    def synchronize(self, *_):
        pass

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(f"{NAME}:0")


def mine(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def caller() -> str:
    """The line of the package that asked."""
    frames = [f for f in traceback.extract_stack() if "/stabkit/" in f.filename]
    return f"{frames[-1].filename.rsplit('/stabkit/', 1)[1]}:{frames[-1].name}" if frames else "elsewhere"


class Pretend(torch.Tensor):
    """A tensor of the device, around one of the CPU."""

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    def __init__(self, raw):
        pass

    def tolist(self):
        waits[caller()] += 1
        return self.detach().cpu().tolist()

    def data_ptr(self):
        return self.raw.data_ptr()

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        parts = tuple(torch.tensor(i) if isinstance(i, list) else i for i in parts)
        return super().__getitem__(parts if isinstance(index, tuple) else parts[0])

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Pretend(self.raw.detach().clone())
            kind = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if kind else copy
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


def wrapped(x):
    return Pretend(x) if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) else x


def unwrapped(x):
    return x.raw if isinstance(x, Pretend) else x


def dispatched(func, args, kwargs):
    """One operation, done on the CPU; its results are of the device where they would be."""
    name, device = str(func), kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, Pretend)]
    others = [t for t in tensors if not isinstance(t, Pretend) and t.dim() > 0]
    goes = mine(device) if device is not None else bool(ours)
    if name.startswith("aten.copy_"):
        goes = isinstance(args[0], Pretend)
    leaves = ours and name.startswith("aten._to_copy") and device is not None and not mine(device)
    by_mask = name.startswith("aten.index.") and any(
        isinstance(t, Pretend) and t.dtype == torch.bool for t in tree_leaves(args[1])
    )
    if ours and (leaves or by_mask or any(word in name for word in WAITS)):
        waits[caller()] += 1
    if goes and others and name.startswith(TAKES_HOST_TENSORS):
        sends[caller()] += 1
    if ours and others and not name.startswith(TAKES_HOST_TENSORS):
        raise RuntimeError(f"two devices: {name} in {caller()}, with {[tuple(t.shape) for t in others]} on the CPU")
    args_, kwargs_ = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
    if mine(device):
        kwargs_["device"] = torch.device("cpu")
    zero = "_efficientzerotensor" in name
    result = torch.zeros(args_[0], dtype=kwargs_.get("dtype")) if zero else func(*args_, **kwargs_)
    if name.startswith("aten._to_copy") and result is args_[0]:
        result = result.clone()
    if not goes:
        return result
    result = tree_map(wrapped, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours else result


class Device(TorchDispatchMode):
    """Within it the device exists."""

    def __enter__(self):
        self._tensor = torch.tensor
        torch.tensor = self._made
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self._tensor
        return super().__exit__(*error)

    def _made(self, data, *, dtype=None, device=None, requires_grad=False):
        if not mine(device):
            return self._tensor(data, dtype=dtype, device=device, requires_grad=requires_grad)
        with _disable_current_modes():
            raw = self._tensor(data, dtype=dtype)
        return Pretend(raw)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if mine(kwargs.get("device")) or any(isinstance(t, Pretend) for t in tree_leaves((args, kwargs))):
            with torch._C.DisableTorchFunctionSubclass():
                return dispatched(func, args, kwargs)
        return func(*args, **kwargs)


STEPS = 120
SIZES = {"rank": 12, "retain_samples": 40, "forget_samples": 20, "spectrum_samples": 16, "seeds": 1}


def outcomes(model, forget, retain, device) -> dict[str, Any]:
    """What the library says and does on a device, and where the host has waited for it."""
    import stabkit
    from stabkit.rollout import roll

    found: dict[str, Any] = {}
    problem = stabkit.UnlearningProblem(model, forget, retain, device=device)
    for algorithm in (
        stabkit.GradDiff(steps=STEPS, batch_size=16, momentum=0.9, max_gradient_norm=5.0),
        stabkit.SFROn(steps=STEPS, batch_size=16),
        stabkit.FineTune(steps=STEPS, batch_size=16, optimizer="adamw", weight_decay=0.01, max_gradient_norm=5.0),
        stabkit.SalUn(steps=STEPS, batch_size=16),
        stabkit.AGU(steps=STEPS, batch_size=16),
    ):
        little = roll.HOST_WORK
        # Rollouts on the device, which are so small that they would be on the CPU; one prediction has them there.
        roll.HOST_WORK = little if algorithm.name == "graddiff" else 0
        report = stabkit.predict(model, forget, retain, algorithm=algorithm.replace(lr=0.02), device=device, **SIZES)
        roll.HOST_WORK = 0
        waits.clear()
        mix = [algorithm.mix if algorithm.fixed_mix else 0.5]
        frontier = report.frontier(lr=[1e-6, 1.0], mix=mix)
        rolling, roll.HOST_WORK = dict(waits), little
        waits.clear()
        near = report.frontier(lr=[1e-6, 1.0], mix=mix)
        moving = dict(waits)
        chosen = algorithm.replace(lr=1e-3)
        preconditioner = chosen.step_preconditioner(problem)
        waits.clear()
        sends.clear()
        run = stabkit.run(problem, chosen, preconditioner=preconditioner, monitor_samples=32)
        found[algorithm.name] = {
            "probability": report.probability,
            "critical_lr": report.critical_lr,
            "largest": report.thresholds.largest,
            "frontier": frontier.probability.tolist(),
            "near": near.probability.tolist(),
            "loss": run.trajectory[-1].retain_loss,
            "waits": {"run": dict(waits), "frontier": rolling, "near": moving},
            "sends": dict(sends),
        }
    for name, work in (("thorough", roll.HOST_WORK), ("thorough_there", 0)):
        roll.HOST_WORK, little = work, roll.HOST_WORK
        staged = stabkit.predict(model, forget, retain, lr=0.2, mode="thorough", device=device, **SIZES)
        found[name] = {"score": list(staged.rollout.score), "real_steps": staged.rollout.real_steps}
        roll.HOST_WORK = little
    audited = stabkit.audit(problem, {"run": run.model}, attacks=["entropy/logistic"], replicates=5)
    found["accuracy"] = audited["run"].retain.accuracy.value
    return found


def compared(found: Callable[..., dict[str, Any]]) -> None:
    """Print what is found of a trained network, its forget and retain sets on the CPU and on the device."""
    import warnings

    import stabkit
    from stabkit.curvature.data_operators import DataOperator
    from stabkit.models import SmallCNN
    from stabkit.training import train

    warnings.simplefilter("ignore", stabkit.StabkitWarning)
    torch.set_num_threads(1)
    DataOperator._saved_bytes = lambda self, count: 100_000 * count  # saved tensors of a pretended device have no size
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 1, 8, 8, generator=generator), torch.randint(4, (120,), generator=generator)
    model = train(SmallCNN(1, 8, 4, seed=0), x, y, epochs=25, lr=1e-2, batch_size=20)
    # In double precision: softmax rounds otherwise on the device, and rollouts near their boundary are chaotic.
    model, x = model.double(), x.double()
    sets = (x[:40], y[:40]), (x[40:], y[40:])
    host = found(model, *sets, "cpu")
    with Device():
        there = found(model, *sets, DEVICE)
    print(json.dumps({"cpu": host, "device": there}))


if __name__ == "__main__":
    compared(outcomes)
