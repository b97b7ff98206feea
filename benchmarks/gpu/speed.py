"""What everything costs on the device: products, spectra, Grams, maps, predictions, layer exponents; what precision is lost.

Times are medians of several after one to warm up, read when the device has finished. Products are also given in gradients (a
forward and a backward pass) of the same network and batch. Peers are timed where they are installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.compiler.config
from torch import Tensor, nn

import stabkit
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.store import Store, timed
from benchmarks.gpu.tasks import Task
from benchmarks.gpu.unlearning import PUBLISHED_BATCH, problem_of
from stabkit.algorithms import GradDiff, SFROn
from stabkit.curvature import DataOperator, GGNOperator, HessianOperator, curvature_gram
from stabkit.frontier import frontier
from stabkit.heavy_tail import layer_exponents
from stabkit.measure import measure
from stabkit.modes import MODES, Sizes
from stabkit.precision import arithmetic
from stabkit.problem import Parameters, UnlearningProblem
from stabkit.runner import RunResult, run
from stabkit.spectrum import extreme_eigenpairs
from stabkit.stability import LinearDynamics, stability_map

BLOCK, ENDS, TOLERANCE, MAP_POINTS = 8, 5, 1e-3, 20
GRAM_SAMPLES = (4, 2)  # times the batch over 8: retain and forget samples of the Gram
STEP_BATCHES = (32, 128)
NOT_INSTALLED = "not installed"
COMPILER = "inductor"  # of torch.compile: PyTorch's own, which generates code; tests take one that needs no compiler


def median(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of several times, after one call to warm up."""
    function()
    return statistics.median(timed(function, device)[1] for _ in range(repeats))


def subject(store: Store, task: Task, *, dtype: torch.dtype | None = None) -> UnlearningProblem:
    """The trained network, asked to forget a random tenth."""
    model = store.load_weights(f"train-{task.name}", task.build(0))
    sets = task.sets("random10")
    if dtype is None:
        return problem_of(model, task, sets)
    few = 2 * task.scale.batch  # what is read in another precision is checked in it first
    retain, forget = ((x[:few], y[:few]) for x, y in (sets.retain, sets.forget))
    return UnlearningProblem(model, forget, retain, dtype=dtype)


def products(store: Store, task: Task) -> dict[str, Any]:
    """Hessian and Gauss-Newton products of one batch, one vector and a block of eight, in gradients of that batch.

    All in float32, those of others too.
    """
    with arithmetic("float32"):
        return {"kind": "products", "multiplied": "float32", **_products(store, task)}


def _products(store: Store, task: Task) -> dict[str, Any]:
    """The rows."""
    problem, device, repeats = subject(store, task), store.device, task.scale.repeats
    indices = torch.arange(task.scale.batch)
    inputs, targets = problem.retain.batch(indices)
    model = problem.new_model()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient() -> None:
        torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), parameters)

    unit = median(gradient, device, repeats)
    block = torch.randn(problem.size, BLOCK, generator=torch.Generator().manual_seed(1)).to(device)
    rows: dict[str, Any] = {"gradient_seconds": unit, "batch": task.scale.batch, "parameters": problem.size}
    for name, cls in (("hvp", HessianOperator), ("ggn", GGNOperator)):
        for kept in (True, False):
            operator: DataOperator = cls(problem, problem.retain, indices=indices, batch_size=task.scale.batch)
            operator.kept = kept
            which = "" if kept else "_not_kept"
            rows[f"{name}{which}"] = median(lambda o=operator: o @ block[:, 0], device, repeats) / unit
            if kept:
                rows[f"{name}_of_{BLOCK}"] = median(lambda o=operator: o @ block, device, repeats) / unit / BLOCK
            del operator
    rows[f"hvp_of_{BLOCK}_batched"] = _batched(problem, (inputs, targets), block, device, repeats) / unit / BLOCK
    rows |= _forward_over_reverse(problem, (inputs, targets), block[:, 0], unit, device, repeats)
    rows |= _curvlinops(model, parameters, (inputs, targets), block, unit, device, repeats)
    return rows


def _batched(
    problem: UnlearningProblem, batch: tuple[Tensor, Tensor], block: Tensor, device: torch.device, repeats: int
) -> float:
    """Seconds of a block of Hessian products whose vectors go through a kept graph together, which operators do not do."""
    inputs, targets = batch
    leaves = {name: p.detach().requires_grad_() for name, p in problem.parameters.items()}
    at = list(leaves.values())
    with torch.enable_grad():
        loss = problem.loss.per_sample(problem.outputs(leaves, inputs), targets).mean()
        gradient = torch.autograd.grad(loss, at, create_graph=True)
    columns = [problem.unflatten(column) for column in block.T]
    stacked = [torch.stack([column[name] for column in columns]) for name in leaves]

    def together() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradient, at, stacked, retain_graph=True, is_grads_batched=True)

    return median(together, device, repeats)


def _forward_over_reverse(
    problem: UnlearningProblem,
    batch: tuple[Tensor, Tensor],
    vector: Tensor,
    unit: float,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """The Hessian product as a derivative of the gradient, with its passes each time and traced once."""
    inputs, targets = batch

    def gradient(parameters: Parameters) -> Parameters:
        def loss(moved: Parameters) -> Tensor:
            return problem.loss.per_sample(problem.outputs(moved, inputs), targets).mean()

        return dict(torch.func.grad(loss)(parameters))

    direction = problem.unflatten(vector)
    plain = median(lambda: torch.func.jvp(gradient, (problem.parameters,), (direction,)), device, repeats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of its own bookkeeping
        (_, push), tracing = timed(lambda: torch.func.linearize(gradient, problem.parameters), device)
    traced = median(lambda: push(direction), device, repeats)
    return {
        "hvp_forward_over_reverse": plain / unit,
        "hvp_forward_over_reverse_traced": traced / unit,
        "tracing_seconds": tracing,
    }


def _curvlinops(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batch: tuple[Tensor, Tensor],
    block: Tensor,
    unit: float,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """The same products by curvlinops."""
    if importlib.util.find_spec("curvlinops") is None:
        return {"curvlinops": NOT_INSTALLED}
    import curvlinops

    rows = {}
    for name, cls in (("hvp", curvlinops.HessianLinearOperator), ("ggn", curvlinops.GGNLinearOperator)):
        operator = cls(model, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False)
        rows[f"curvlinops_{name}"] = median(lambda o=operator: o @ block[:, 0], device, repeats) / unit
        rows[f"curvlinops_{name}_of_{BLOCK}"] = median(lambda o=operator: o @ block, device, repeats) / unit / BLOCK
    return rows


def spectrum(store: Store, task: Task) -> dict[str, Any]:
    """Five eigenpairs at each end, and the Gram of curvature factors."""
    problem, device, batch = subject(store, task), store.device, task.scale.batch
    indices = torch.arange(2 * batch)
    operator = HessianOperator(problem, problem.retain, indices=indices)
    operator @ torch.ones(problem.size, device=device)  # its graphs, and the device's kernels
    pairs, seconds = timed(
        lambda: extreme_eigenpairs(operator, ends=ENDS, tolerance=TOLERANCE, max_products=1000), device
    )
    retain, forget = (max(2, share * batch // 8) for share in GRAM_SAMPLES)
    chosen = [torch.arange(retain), torch.arange(forget)]
    gram, gram_seconds = timed(
        lambda: curvature_gram(problem, (problem.retain, problem.forget), indices=chosen), device
    )
    return {
        "kind": "spectrum",
        "multiplied": "float32",
        "samples": 2 * batch,
        "eigen_seconds": seconds,
        "eigen_products": pairs.products,
        "eigen_residual": float(pairs.residuals.max()) / pairs.scale,
        "eigen_converged": pairs.converged,
        "largest": pairs.largest,
        "smallest": pairs.smallest,
        "gram_seconds": gram_seconds,
        "gram_samples": list(gram.sizes),
        "gram_rows": gram.matrix.shape[0],
        "gram_passes": gram.passes,
    }


def predictions(store: Store, task: Task) -> dict[str, Any]:
    """`predict` in two modes, a map of 400 settings both ways, and the run that they are about."""
    problem, device, scale = subject(store, task), store.device, task.scale
    model, sets = problem.new_model(), task.sets("random10")
    batch = min(PUBLISHED_BATCH, scale.batch)
    plain = GradDiff(mix=0.2, batch_size=batch)
    rows: dict[str, Any] = {"kind": "predictions", "run_steps": list(scale.run_steps)}

    given = {key: value for key, value in scale.linearised.items() if key != "seeds"}
    settings = Sizes(**given).settings(MODES["standard"], curvature="hessian", seed=0)
    shortest = plain.replace(steps=scale.run_steps[0])
    measurement, rows["measure"] = timed(lambda: measure(problem, shortest, settings), device)
    rows["measure_gradients"] = sum(cost.gradient_equivalents for cost in measurement.costs)
    rows["measure_stages"] = {cost.stage: cost.seconds for cost in measurement.costs}
    rows["captured"] = measurement.network.captured
    sizes_of_batches = shortest.batch_sizes(problem)
    centre = 2 / float(torch.linalg.eigvalsh(measurement.retain.mean())[-1])
    lrs = np.geomspace(centre / 100, centre * 10, MAP_POINTS).tolist()
    mixes = np.linspace(0, 1, MAP_POINTS).tolist()
    _, rows["map_of_400_rolled_out"] = timed(
        lambda: frontier(measurement.network, shortest, lr=lrs, mix=mixes, batch_sizes=sizes_of_batches, seeds=(0,)),
        device,
    )
    dynamics = LinearDynamics(
        retain=measurement.retain,
        forget=measurement.forget,
        mix=0.2,
        batch_sizes=sizes_of_batches,
        sampling=shortest.sampling,
    )
    _, rows["map_of_400_exact"] = timed(lambda: stability_map(dynamics, {"lr": lrs, "mix": mixes}), device)
    for name, mode, multiplied in (
        ("predict_tf32", "standard", "tf32"),
        ("predict_fast", "fast", "float32"),
        ("predict_standard", "standard", "float32"),
    ):
        report, rows[name] = timed(
            lambda mode=mode, multiplied=multiplied: stabkit.predict(
                model, sets.forget, sets.retain, algorithm=shortest, mode=mode, precision=multiplied, **_own(task)
            ),
            device,
        )
        rows[f"{name}_critical_lr"] = report.critical_lr
        rows[f"{name}_gradients"] = sum(cost.gradient_equivalents for cost in report.costs)
        rows[f"{name}_stages"] = {cost.stage: cost.seconds for cost in report.costs}
    safe = 0.1 * min(report.critical_lr, report.thresholds.step_limit)
    result, rows["run"] = timed(lambda: run(problem, shortest.replace(lr=safe), monitor_samples=scale.watched), device)
    rows["run_gradients"], rows["run_diverged"] = _of_steps(result, scale), result.diverged
    return rows


def _own(task: Task) -> dict[str, Any]:
    """What a timed prediction is given: its mode's own sizes and the seeds of the cells, or tiny sizes."""
    return dict(task.scale.linearised) or {"seeds": task.scale.measured[task.name]["seeds"]}


def _of_steps(result: RunResult, scale: Scale) -> float:
    """Gradients of a run's steps alone, without its looks, which a loop of one's own would not take."""
    return result.gradient_equivalents - len(result.trajectory) * 2 * scale.watched / 3


def sfr_on(store: Store, task: Task) -> dict[str, Any]:
    """A fast prediction of SFR-on and the run that it is to be cheap beside, which takes the prediction's mask over."""
    problem, device, scale = subject(store, task), store.device, task.scale
    model, sets = problem.new_model(), task.sets("random10")
    plain = SFROn(steps=scale.run_steps[1], batch_size=min(PUBLISHED_BATCH, scale.batch))
    rows: dict[str, Any] = {"kind": "sfr_on", "sfr_on_steps": plain.steps}
    report, rows["predict_sfr_on"] = timed(
        lambda: stabkit.predict(model, sets.forget, sets.retain, algorithm=plain, mode="fast", **_own(task)), device
    )
    # A run that does not break, and so takes all of its steps.
    safe = plain.replace(lr=0.1 * min(report.critical_lr, report.thresholds.step_limit))
    result, rows["run_sfr_on"] = timed(
        lambda: run(problem, safe, preconditioner=report.preconditioner, monitor_samples=scale.watched), device
    )
    rows["run_sfr_on_gradients"], rows["run_sfr_on_diverged"] = _of_steps(result, scale), result.diverged
    rows["predict_sfr_on_gradients"] = sum(cost.gradient_equivalents for cost in report.costs)
    rows["predict_sfr_on_mask_gradients"] = sum(
        cost.gradient_equivalents for cost in report.costs if cost.stage == "preconditioner"
    )
    rows["predict_sfr_on_critical_lr"] = report.critical_lr
    rows["predict_sfr_on_stages"] = {cost.stage: cost.seconds for cost in report.costs}
    return rows


def exponents(store: Store, task: Task) -> dict[str, Any]:
    """Heavy-tailed exponents of every layer on the device, on the CPU, and by weightwatcher, in float32 on a GPU."""
    model = store.load_weights(f"train-{task.name}", task.build(0))
    device, host = store.device, torch.device("cpu")
    repeats = min(2, task.scale.repeats)
    rows: dict[str, Any] = {"kind": "exponents"}
    table, _ = timed(lambda: layer_exponents(model, shuffles=0), device)
    rows["device"] = median(lambda: layer_exponents(model, shuffles=0), device, repeats)
    rows["device_with_shuffles"] = timed(lambda: layer_exponents(model), device)[1]
    other = layer_exponents(model, shuffles=0, device="cpu")
    rows["cpu"] = timed(lambda: layer_exponents(model, shuffles=0, device="cpu"), device)[1]
    ours = {row.name: row.exponent for row in table.rows}
    rows["layers"] = len(ours)
    rows["largest_difference_to_cpu"] = _apart(ours, {row.name: row.exponent for row in other.rows})
    if importlib.util.find_spec("weightwatcher") is None:
        return {**rows, "weightwatcher": NOT_INSTALLED}
    with _silence():
        import weightwatcher

        copied = task.build(0)
        copied.load_state_dict(model.to(host).state_dict())
        found, rows["weightwatcher"] = timed(
            lambda: weightwatcher.WeightWatcher(model=copied).analyze(pool=True), device
        )
    theirs = {row["longname"]: row["alpha"] for row in found.to_dict("records")}
    return {**rows, "largest_difference_to_weightwatcher": _apart(ours, theirs)}


def _apart(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Largest difference over the layers that both have."""
    shared = ours.keys() & theirs.keys()
    return max((abs(ours[name] - theirs[name]) for name in shared if np.isfinite(theirs[name])), default=float("nan"))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what weightwatcher prints and logs."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def precision(store: Store, task: Task) -> dict[str, Any]:
    """Relative errors of a Hessian product in tf32 and bfloat16 beside float32, against float64."""
    indices = torch.arange(task.scale.batch)
    generator = torch.Generator().manual_seed(2)
    exact = subject(store, task, dtype=torch.float64)
    plain = subject(store, task, dtype=torch.float32)
    leaves = {name: p.detach().requires_grad_() for name, p in exact.parameters.items()}
    inputs, targets = exact.retain.batch(indices)
    with torch.enable_grad():
        loss = exact.loss.per_sample(exact.outputs(leaves, inputs), targets).mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    directions = {
        "random direction": torch.randn(exact.size, generator=generator, dtype=torch.float64).to(store.device),
        "gradient": torch.cat([g.reshape(-1) for g in gradients]),
    }
    rows: dict[str, Any] = {"kind": "precision", "batch": task.scale.batch, "errors": {}}
    for name, vector in directions.items():
        vector = vector / vector.norm()
        truth = HessianOperator(exact, exact.retain, indices=indices) @ vector
        found = {}
        for how, multiplied, lowered in (
            ("float32", arithmetic("float32"), False),
            ("as PyTorch multiplies by default", contextlib.nullcontext(), False),
            ("tf32", arithmetic("tf32"), False),
            ("bfloat16 autocast", arithmetic("float32"), True),
        ):
            with multiplied, torch.autocast(store.device.type, torch.bfloat16, enabled=lowered):
                operator = HessianOperator(plain, plain.retain, indices=indices)
                operator.kept = False
                product = (operator @ vector.float()).double()
            found[how] = {
                "relative_error": float((product - truth).norm() / truth.norm()),
                "curvature_error": float(vector @ (product - truth)) / float(vector @ truth),
            }
        rows["errors"][name] = found
    return rows


def steps(store: Store, task: Task) -> dict[str, Any]:
    """A run of small batches with its passes launched one by one, replayed from CUDA graphs, and under autocast."""
    problem, device = subject(store, task), store.device
    rows: dict[str, Any] = {"kind": "steps", "batch_sizes": list(STEP_BATCHES), "steps": task.scale.run_steps[0] // 5}
    if device.type != "cuda":
        return {**rows, "cuda_graphs": "no GPU"}
    for batch in (min(size, problem.forget.size) for size in STEP_BATCHES):
        plain = GradDiff(lr=1e-5, mix=0.2, batch_size=batch, steps=rows["steps"])
        ended = {}
        for name, how in {
            "plain": {},
            "cuda_graphs": {"cuda_graphs": True},
            "bfloat16": {"precision": "bfloat16"},
            "bfloat16_cuda_graphs": {"precision": "bfloat16", "cuda_graphs": True},
        }.items():
            result, seconds = timed(
                lambda how=how, plain=plain: run(
                    problem, plain, monitor_samples=plain.batch_size, check_every=plain.steps, **how
                ),
                device,
            )
            rows[f"{name}_{batch}_milliseconds_a_step"] = 1000 * seconds / plain.steps
            ended[name] = torch.cat([p.detach().reshape(-1) for p in result.model.parameters()])
        moved = ended["plain"] - problem.vector()
        for name in ("cuda_graphs", "bfloat16", "bfloat16_cuda_graphs"):
            rows[f"{name}_{batch}_difference"] = float((ended[name] - ended["plain"]).norm() / moved.norm())
    return rows


def compiled(store: Store, task: Task) -> dict[str, Any]:
    """Gradients and Hessian products by torch.compile beside those of runs and of eigenpairs, in gradients of runs.

    Runs take theirs by autograd, eigenpairs multiply with a graph of autograd's that is kept; neither is what is compiled,
    which goes through the passes of the gradient with each product, as one whose graph is not kept does.
    """
    uncached = torch.compiler.config.patch(force_disable_caches=True)  # each compiles as for the first time
    with arithmetic("float32"), uncached:
        return {
            "kind": "compiled",
            "multiplied": "float32",
            "batch_sizes": list(STEP_BATCHES),
            **_compiled(store, task),
        }


def _compiled(store: Store, task: Task) -> dict[str, Any]:
    """The rows."""
    problem, device, repeats = subject(store, task), store.device, 3 * task.scale.repeats
    model = problem.new_model()
    leaves = [p for p in model.parameters() if p.requires_grad]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    direction = problem.unflatten(torch.randn(problem.size, generator=torch.Generator().manual_seed(1)).to(device))

    def loss(at: Parameters, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, dict(at), (inputs,)), targets)

    def gradient(at: Parameters, inputs: Tensor, targets: Tensor) -> Parameters:
        return dict(torch.func.grad(loss)(at, inputs, targets))

    def product(at: Parameters, inputs: Tensor, targets: Tensor, along: Parameters) -> Parameters:
        return torch.func.jvp(lambda moved: gradient(moved, inputs, targets), (at,), (along,))[1]

    modes = ("default", "reduce-overhead") if device.type == "cuda" else ("default",)
    rows: dict[str, Any] = {}
    for size in STEP_BATCHES:
        indices = torch.arange(min(size, problem.forget.size))
        batch = problem.retain.batch(indices)

        def plain(batch: tuple[Tensor, Tensor] = batch) -> tuple[Tensor, ...]:
            return torch.autograd.grad(nn.functional.cross_entropy(model(batch[0]), batch[1]), leaves)

        unit = median(plain, device, repeats)
        operator = HessianOperator(problem, problem.retain, indices=indices, batch_size=indices.numel())
        vector = problem.flatten(direction)
        exact = operator @ vector
        rows[f"gradient_{size}_milliseconds"] = 1000 * unit
        rows[f"hvp_{size}"] = median(lambda o=operator, v=vector: o @ v, device, repeats) / unit
        single: DataOperator = HessianOperator(problem, problem.retain, indices=indices, batch_size=indices.numel())
        single.kept = False  # with the passes of the gradient, as the compiled one has them
        rows[f"hvp_{size}_not_kept"] = median(lambda o=single, v=vector: o @ v, device, repeats) / unit
        for mode in modes:
            name = "compiled" if mode == "default" else f"compiled_{mode.replace('-', '_')}"
            how: dict[str, Any] = (
                {"backend": COMPILER} if COMPILER != "inductor" or mode == "default" else {"mode": mode}
            )
            for what, function, args, truth in (
                ("gradient", gradient, (parameters, *batch), torch.cat([g.reshape(-1) for g in plain()])),
                ("hvp", product, (parameters, *batch, direction), exact),
            ):
                torch.compiler.reset()
                quick = torch.compile(function, **how)
                found, rows[f"{name}_{what}_{size}_compiling_seconds"] = timed(lambda q=quick, a=args: q(*a), device)
                found = problem.flatten(found)
                rows[f"{name}_{what}_{size}_difference"] = float((found - truth).norm() / truth.norm())
                rows[f"{name}_{what}_{size}"] = median(lambda q=quick, a=args: q(*a), device, repeats) / unit
    return rows


PARTS: dict[str, Callable[[Store, Task], dict[str, Any]]] = {
    "products": products,
    "spectrum": spectrum,
    "predictions": predictions,
    "sfr_on": sfr_on,
    "exponents": exponents,
    "precision": precision,
    "steps": steps,
    "compiled": compiled,
}
