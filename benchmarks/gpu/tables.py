"""A page of tables from what the jobs left: results.json and predictions.json, as `run.py` gathers them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.figures import Edge, Said, draw
from benchmarks.gpu.scale import SCALES
from benchmarks.gpu.store import canonical, sha256
from stabkit._serialise import write_atomically
from stabkit.bench.records import Prediction, Record
from stabkit.bench.scores import Scores, scores
from stabkit.calibration import calibration, combined
from stabkit.checks import MAX_TF32_ERROR

KINDS = {"one": "one linearisation", "staged": "staged rollouts"}
NETWORKS = {
    "full": {
        "resnet18": "ResNet-18",
        "vit": "vision transformer",
        "lm": "language model",
        "lm-gpt2": "language model of GPT-2's size",
    },
    "reduced": {
        "resnet18": "ResNet-18 of an eighth of the width",
        "vit": "small vision transformer",
        "lm": "language model of two layers",
        "lm-gpt2": "language model of four layers",
    },
    "small": {
        "resnet18": "tiny ResNet",
        "vit": "tiny vision transformer",
        "lm": "tiny language model",
        "lm-gpt2": "tiny language model, two layers",
    },
}
# FA, RA, TA, MIA, average gap and KL of SFR-on's table: CIFAR-10, ResNet-18, random 10 %, per cent.
PAPER = {
    "gold": (95.62, 100.0, 95.34, 74.84, 0.0, 0.10),
    "ga": (93.91, 93.76, 87.00, 77.19, 4.66, 0.36),
    "salun": (100.0, 99.99, 94.89, 67.54, 3.03, 0.27),
    "scrub": (99.44, 99.88, 94.13, 87.43, 4.43, 0.25),
    "sfr_on": (96.58, 99.88, 94.19, 72.26, 1.20, 0.15),
}
# Average gaps as published, by deletion: SFR-on's table and SalUn's, of ResNet-18 on CIFAR-10. Their MIA has two scales.
GAPS = {
    "random10": {"SFR-on's": {name: row[4] for name, row in PAPER.items()}, "SalUn's": {"ga": 4.12, "salun": 1.15}},
    "random50": {"SalUn's": {"ga": 7.15, "salun": 2.65}},
}
ADDED = {"sgd": "", "adamw": ", AdamW"}  # to a network's name, by the optimiser of its runs
PUBLISHED_AS = {
    "sfr_on-paper": "sfr_on",
    "ga-sfr_on-paper": "ga",
    "salun-torchunlearn": "salun",
    "scrub-torchunlearn": "scrub",
}


def write(folder: str | Path, page: str | Path, *, total: int) -> Path:
    """Write the page, and its figure in `figures` beside it.

    Args:
        folder: Where results.json and predictions.json lie.
        page: The page.
        total: How many jobs there are.

    Returns:
        The page's path.
    """
    place = Path(folder)
    results = dict(sorted(_load(place / "results.json").items(), key=lambda item: item[1]["started"]))
    predictions = _load(place / "predictions.json")
    failures = _load(place / "failures.json")
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for key, entry in results.items():
        kinds.setdefault(entry["result"]["kind"], {})[key] = entry
    cells = {key: entry["result"] for key, entry in kinds.get("cell", {}).items()}
    scale = next((entry["scale"] for entry in results.values()), "full")
    names = NETWORKS[scale]
    parts = [
        _head(results, failures, total),
        _training(kinds.get("training", {}), names),
        _quality(cells, predictions, names, SCALES[scale].halvings),
        _figure(cells, predictions, names, Path(page)),
        _cells(cells, predictions),
        _published(kinds.get("published", {})),
        *_audits({**cells, **{key: entry["result"] for key, entry in kinds.get("published", {}).items()}}, names),
        _cost(
            cells,
            kinds.get("published", {}),
            [entry for kind in ("predictions", "sfr_on") for entry in kinds.get(kind, {}).values()],
        ),
        _speed(kinds),
        _order(results, predictions),
    ]
    return write_atomically(page, "\n\n".join(part for part in parts if part) + "\n")


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# ---------------------------------------------------------------------- sections


def _head(results: dict[str, Any], failures: dict[str, Any], total: int) -> str:
    """What this is and where it was made."""
    lines = ["# GPU experiments: predict first, then run"]
    if not results:
        return "\n\n".join([*lines, "No job has left a result yet."])
    last = max(results.values(), key=lambda entry: entry["finished"])
    scales, devices = ({entry[key] for entry in results.values()} for key in ("scale", "device"))
    if "small" in scales:
        lines.append(
            "**This is the reduced proof at CPU scale and no GPU result**: tiny stand-ins of the networks, some hundred\n"
            "images, twenty people, few steps and seeds. It shows that every job runs, in the same way as on a GPU, and\n"
            "nothing about ResNet-18, GPT-2 or speed."
        )
    if "reduced" in scales:
        lines.append(
            "**This is the reduced experiment on a CPU and no GPU result**: ResNet-18 with an eighth of its channels and\n"
            "other narrow networks, trained on a fifth of CIFAR-10's images, without augmentation so that they\n"
            "remember them, or on sixty people."
        )
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in last["versions"].items())
    multiplied = ", ".join(f"{name} {how}" for name, how in last["arithmetic"].items())
    noted = dict.fromkeys(entry["commit"] for entry in results.values() if entry.get("commit"))
    commits = ", ".join(text[:7] + text[40:] for text in noted)  # "and changes" is kept
    most = max(entry.get("jobs_at_once", 1) for entry in results.values())
    at_once = f"Up to {most} jobs went on at once, each in a process of its own, which makes their seconds longer"
    at_once = at_once if most > 1 else "One job went on at a time"
    said = "in TF32 and say its error" if "full" in scales else "in float32"
    lines.append(
        f"`PYTHONPATH=. python benchmarks/gpu/run.py --scale {'/'.join(sorted(scales))}` on {', '.join(sorted(devices))}: "
        f"{len(results)} of {total} jobs done, {len(failures)} failed.\n{versions}; commits {commits or 'not noted'}.\n"
        f"{at_once}; rows under *Speed and\n"
        "precision* and the first ones under *What a prediction costs* had the device to themselves. Other seconds are\n"
        "told as they came, whatever else the machine did.\n"
        "BatchNorm is frozen in runs and predictions, the library's default, but where a cell says `batch`.\n"
        f"Predictions about runs multiply {said}, runs as PyTorch does by default ({multiplied})."
    )
    for key, entry in failures.items():
        lines.append(f"Failed: `{key}`, {entry['error'].strip().splitlines()[-1]}")
    return "\n\n".join(lines)


def _training(entries: dict[str, Any], names: dict[str, str]) -> str:
    """Accuracies as measured."""
    if not entries:
        return ""
    rows = [
        (
            names[r["task"]],
            r["deletion"] or "nothing",
            f"{r['parameters']:,}",
            r["epochs"],
            f"{100 * r['train_accuracy']:.2f}",
            f"{100 * r['test_accuracy']:.2f}",
            f"{r['train_seconds']:.1f}",
        )
        for r in (entry["result"] for entry in entries.values())
    ]
    columns = ("network", "left out", "parameters", "epochs", "train accuracy %", "test accuracy %", "seconds")
    return "\n\n".join([
        "## Networks",
        "Accuracies without augmentation, as measured. A network that was lost between two calls was trained anew in the\n"
        "same way for what was left to do, and comes out a little otherwise; the row is of one of them.",
        _table(columns, rows),
    ])


def _quality(cells: dict[str, Any], predictions: dict[str, Any], names: dict[str, str], halvings: int) -> str:
    """Predictions against runs, network by network."""
    if not cells:
        return ""
    rows = []
    groups = {(task, by): name + ADDED[by] for by in ADDED for task, name in names.items()}
    for (task, by), name in groups.items():
        mine = {
            key: found
            for key, found in cells.items()
            if (found["cell"]["task"], _optimizer(found["cell"])) == (task, by)
        }
        if not mine:
            continue
        found, recorded = _scores(mine, predictions), _scores(mine, predictions, boundaries=False)
        for kind in KINDS:
            for scored, said, ratios in (
                (found, "", _ratios(mine, predictions, kind)),
                (recorded, ", as recorded", ("–",) * 5),
            ):
                quality = getattr(scored, kind)
                rows.append((
                    name,
                    len(mine),
                    found.settings,
                    f"{found.share_diverged:.2f}",
                    KINDS[kind] + said,
                    _number(quality.balanced_accuracy),
                    _number(quality.auc),
                    _number(quality.brier),
                    _number(quality.log_loss),
                    _number(quality.step_ratio),
                    *ratios,
                ))
        for what, quality in (("η > 2(1+β)/λ_max", found.step_limit), ("another real run", found.again)):
            dashes = ("–",) * 9
            rows.append((
                name,
                len(mine),
                found.settings,
                f"{found.share_diverged:.2f}",
                what,
                _number(quality.balanced_accuracy),
                *dashes,
            ))
    seeds = "/".join(str(count) for count in sorted({len(found["seeds"]) for found in cells.values()}))
    return "\n\n".join([
        "## Predictions against runs",
        "Every cell is a deletion and an algorithm; its runs are at step sizes around the boundary that staged rollouts,\n"
        f"or else one linearisation, predict for each mix, with {seeds} seeds of each. Ratios are of predicted over\n"
        "observed critical step sizes, where the grid brackets one; the interval is where it is to be at nine in ten, by\n"
        "the prediction or, of staged rollouts, by the present calibration. Staged rollouts are of one seed, where a\n"
        "thorough `predict` takes several. The other real run has other batches. P(diverge) is as such a report has it\n"
        "now, made of the rollouts' and of the boundary's that were recorded before the runs; that it takes in the latter\n"
        "was decided after them, on other runs (`benchmarks/verify.md`). *As recorded* is by the P that was written down\n"
        "before them, the rollouts' alone.",
        *_resolution(cells, halvings),
        _before_the_look(cells),
        *_rough(cells, predictions, names),
        _table(
            (
                "network",
                "cells",
                "runs",
                "diverged",
                "predicted by",
                "balanced accuracy",
                "AUC",
                "Brier",
                "log loss",
                "divergence step, predicted / observed",
                "boundaries",
                "median ratio",
                "within 1.5",
                "within 2",
                "in the interval",
            ),
            rows,
        ),
    ])


def _resolution(cells: dict[str, Any], halvings: int) -> Iterator[str]:
    """How near an observed boundary is known, by the widest step of a grid of runs and how often it is halved."""
    grids: dict[tuple[str, float], set[float]] = {}
    for key, found in cells.items():
        for setting in found["settings"]:
            grids.setdefault((key, setting["mix"]), set()).add(setting["lr"])
    steps = [high / low for lrs in grids.values() for low, high in pairwise(sorted(lrs))]
    if steps:
        step, times = max(steps), "1 halving" if halvings == 1 else f"{halvings} halvings"
        yield (
            "An observed critical step size is the middle of an interval whose ends are a factor of\n"
            f"{step**0.5**halvings:.2f} apart, a step of the grid ({step:.2f}) after {times}; no ratio is known closer."
        )


def _rough(cells: dict[str, Any], predictions: dict[str, Any], names: dict[str, str]) -> Iterator[str]:
    """Networks with cells where a product in TF32 is further off than a report lets pass."""
    told = []
    for task, name in names.items():
        checks = [
            predictions[key]["predictions"]["checks"] for key, found in cells.items() if found["cell"]["task"] == task
        ]
        errors = [error for check in checks if (error := check.get("error of TF32")) is not None]
        beyond = [error for error in errors if error > MAX_TF32_ERROR]
        if beyond:
            told.append(f"{name}, {len(beyond)} of {len(errors)} cells, {min(beyond):.3g} to {max(beyond):.3g}")
    if told:
        yield (
            f"A curvature product in TF32 is off by more than {MAX_TF32_ERROR:g}, the library's limit, relative to one in\n"
            f"float32: {'; '.join(told)}. These predictions are of low confidence for that alone."
        )


def _before_the_look(cells: dict[str, Any]) -> str:
    """Which cells are from before staged rollouts looked at their path."""
    early = [_name(found["cell"]) for found in cells.values() if not found.get("path_held")]
    if not early:
        return "Staged rollouts held the last steps before every place that they looked at against real ones."
    which = "All" if len(early) == len(cells) else f"{len(early)} of {len(cells)}"
    return (
        f"{which} cells are from before staged rollouts held the last steps before every place that they look at against\n"
        "real ones, as they do now, which makes them a little dearer and seldom changes what they say\n"
        "(`benchmarks/verify.md`)" + (f": {'; '.join(early)}." if len(early) < len(cells) else ".")
    )


def _figure(cells: dict[str, Any], predictions: dict[str, Any], names: dict[str, str], page: Path) -> str:
    """The figure of boundaries and runs."""
    edges, runs = list[Edge](), list[Said]()
    for key, found in cells.items():
        network = names[found["cell"]["task"]] + ADDED[_optimizer(found["cell"])]
        observed = {b["mix"]: b["observed"] for b in found["boundaries"]}
        edges += [
            Edge(network=network, kind=kind, predicted=b[name], observed=b["observed"])
            for b in found["boundaries"]
            for kind, name in (("one", "predicted"), ("staged", "staged"))
            if b[name] is not None and b["observed"] is not None
        ]
        runs += [
            Said(
                network=network,
                ratio=record.lr / observed[record.mix],
                probability=record.staged.probability,
                diverged=record.diverged,
            )
            for record in _records(found, predictions[key]["predictions"]["mixes"], boundaries=True)
            if observed[record.mix] is not None
        ]
    if not edges and not runs:
        return ""
    path = draw(edges, runs, page.parent / "figures" / f"{page.stem}.png")
    return f"![critical step sizes and runs](figures/{path.name})"


def _cells(cells: dict[str, Any], predictions: dict[str, Any]) -> str:
    """The same, cell by cell."""
    if not cells:
        return ""
    rows = []
    for key, found in cells.items():
        advised, scored = found["advised"], _scores({key: found}, predictions)
        edges = [
            " / ".join(_number(b[name]) for name in ("predicted", "staged", "observed")) for b in found["boundaries"]
        ]
        rows.append((
            _name(found["cell"]),
            scored.settings,
            f"{scored.share_diverged:.2f}",
            _number(scored.one.balanced_accuracy),
            _number(scored.staged.balanced_accuracy),
            " · ".join(edges),
            _number(_real_share(predictions[key], found["steps"])),
            f"{_number(advised['lr'])}: {'diverged' if advised['diverged'] else 'stable'}",
        ))
    return "\n\n".join([
        "## Cell by cell",
        "Critical step sizes by one linearisation / by staged rollouts / observed, for each mix; – where none was found in\n"
        "the scan, or the grid does not bracket one. Real steps are those that a staged rollout takes of a run's, mean\n"
        "over the grid. The advised step is half the largest that nothing broke at; what became of it is one run's.",
        _table(
            (
                "cell",
                "runs",
                "diverged",
                "accuracy, one",
                "accuracy, staged",
                "critical step size",
                "real steps",
                "advised step",
            ),
            rows,
        ),
    ])


def _real_share(prediction: dict[str, Any], steps: int) -> float:
    """Mean share of a run's steps that a cell's staged rollouts take on the real network."""
    points = [point["staged"]["real_steps"] for line in prediction["predictions"]["mixes"] for point in line["grid"]]
    return float(np.mean(points)) / steps


def _published(entries: dict[str, Any]) -> str:
    """Published settings: said, reported, happened."""
    if not entries:
        return ""
    rows, notes = [], []
    for entry in entries.values():
        r = entry["result"]
        said, run = r["said"], r["run"]
        happened = (
            f"diverged at {run['divergence_step']}" if run["diverged"] else f"retain loss {_number(run['retain_loss'])}"
        )
        rows.append((
            r["name"],
            _number(r["settings"]["lr"]),
            r["settings"]["steps"],
            f"{said['verdict']}, P = {said['probability']:.2f}",
            _number(said["critical_lr"]),
            r["outcome"],
            happened,
        ))
        notes.append(f"- {r['name']}: {r['source']}. {r['differs']}.")
    columns = ("setting", "step size", "steps", "predicted", "critical step size", "published", "here")
    return "\n\n".join([
        "## Published settings",
        "Each was run once: what happened here is one run's.",
        _table(columns, rows),
        "\n".join(notes),
    ])


def _audits(found: dict[str, dict[str, Any]], names: dict[str, str]) -> Iterator[str]:
    """A table for each deletion with a retrained network."""
    by_deletion: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, result in found.items():
        if not result.get("audit"):
            continue
        place = tuple(result.get("cell", result)[name] for name in ("task", "deletion"))
        audit = result["audit"]
        told = by_deletion.setdefault(place, {**audit, "models": {}})
        # Every audit has the original and the retrained network of its own call, which are the same up to rounding.
        told["models"] |= {name: entry for name, entry in audit["models"].items() if name != "unlearned"}
        name = key.removeprefix(f"cell-{place[0]}-{place[1]}-")
        told["models"][name] = audit["models"]["unlearned"]
    for (task, deletion), told in by_deletion.items():
        yield _audit({**told, "task": task, "deletion": deletion}, names)


def _audit(found: dict[str, Any], names: dict[str, str]) -> str:
    """Methods by their gap to the retrained network, and the published order beside it."""
    rows = []
    ours, tables = dict[str, list[float]](), GAPS.get(found["deletion"], {})
    for name, entry in found["models"].items():
        values = [_share(entry, key) for key in ("forget_accuracy", "retain_accuracy", "test_accuracy", "mia")]
        gap = entry["average_gap"]["value"] if entry.get("average_gap") else None
        method = _method(name)
        paper = PAPER.get(method) if found["deletion"] == "random10" else None
        if method != "gold" and gap is not None and any(method in table for table in tables.values()):
            ours.setdefault(method, []).append(gap)
        rows.append((
            gap if gap is not None else -1.0,
            (
                name,
                *values,
                "–" if gap is None else f"{100 * gap:.2f}",
                _number(entry["kl_forget"]["value"] if entry.get("kl_forget") else None),
                " ".join(f"{v:.2f}" for v in paper[:4]) if paper else "–",
                f"{paper[4]:.2f}" if paper else "–",
            ),
        ))
    rows.sort(key=lambda row: row[0])
    forget, retain, test = found["sizes"]
    text = [
        f"## Methods against a retrained network: {names[found['task']]}, {found['deletion']}",
        f"{forget} to forget, {retain} to retain, {test} test, per cent. MIA is the share of the forget set called member\n"
        f"by {found['attack']}; the gap is the mean difference to the retrained network in FA, RA, TA and MIA. Models\n"
        "named as algorithms are those of the cells, at the advised step; those and the published settings are one run\n"
        "each. Published: SFR-on's table, of ResNet-18.",
        _table(
            ("model", "FA", "RA", "TA", "MIA", "gap", "KL, forget set", "published FA RA TA MIA", "published gap"),
            [row for _, row in rows],
        ),
    ]
    ordered = set[str]()
    for whose, table in tables.items():
        shared = [name for name in ours if name in table]
        if len(shared) > 1:
            best = {name: min(ours[name]) for name in shared}
            order, theirs = (sorted(shared, key=lambda name, of=of: of[name]) for of in (best, table))
            text.append(f"By gap, best first: {' < '.join(order)} here; {' < '.join(theirs)} in {whose} table.")
            ordered.update(shared)
    several = [name for name in ours if name in ordered and len(ours[name]) > 1]
    if several:
        text.append(
            f"Of {', '.join(several)} there are two runs, at the advised step and at a published setting; the order takes\n"
            "the one with the smaller gap."
        )
    return "\n\n".join(text)


def _cost(cells: dict[str, Any], published: dict[str, Any], timings: Iterable[dict[str, Any]]) -> str:
    """What a prediction costs beside the run that it is about."""
    rows = []
    r: dict[str, Any] = {}
    for entry in timings:
        r |= entry["result"]
    if "run" in r:
        steps = r["run_steps"][0]
        for mode in ("fast", "standard"):
            rows.append((
                f"predict, mode {mode}, against a run of {steps} steps",
                _number(r[f"predict_{mode}"]),
                _number(r["run"]),
                _number(r[f"predict_{mode}"] / r["run"]),
                _number(r[f"predict_{mode}_gradients"] / r["run_gradients"]),
            ))
        for way in ("rolled_out", "exact"):
            rows.append((
                f"map of 400 settings, {way.replace('_', ' ')}, against a run of {steps} steps",
                _number(r[f"map_of_400_{way}"]),
                _number(r["run"]),
                _number(r[f"map_of_400_{way}"] / r["run"]),
                "–",
            ))
            whole = r["measure"] + r[f"map_of_400_{way}"]
            rows.append((
                "the same with the linearisation it is made from",
                _number(whole),
                _number(r["run"]),
                _number(whole / r["run"]),
                _number(r["measure_gradients"] / r["run_gradients"]) if "measure_gradients" in r else "–",
            ))
    if "run_sfr_on" in r:
        steps = r["sfr_on_steps"] if "sfr_on_steps" in r else r["run_steps"][1]  # once part of the other predictions
        rows.append((
            f"predict of SFR-on, mode fast, against SFR-on's run of {steps} steps",
            _number(r["predict_sfr_on"]),
            _number(r["run_sfr_on"]),
            _number(r["predict_sfr_on"] / r["run_sfr_on"]),
            _number(r["predict_sfr_on_gradients"] / r["run_sfr_on_gradients"]),
        ))
        if "predict_sfr_on_mask_gradients" in r:
            mask = r["predict_sfr_on_mask_gradients"]
            seconds = r["predict_sfr_on_stages"]["preconditioner"]
            rows.append((
                "the same beyond SFR-on's mask, which a run without a prediction has to make",
                _number(r["predict_sfr_on"] - seconds),
                _number(r["run_sfr_on"] + seconds),
                _number((r["predict_sfr_on"] - seconds) / (r["run_sfr_on"] + seconds)),
                _number((r["predict_sfr_on_gradients"] - mask) / (r["run_sfr_on_gradients"] + mask)),
            ))
    for entry in published.values():
        r = entry["result"]
        if not r["run"]["diverged"]:
            seconds, gradients = r["seconds"], r["gradients"]
            rows.append((
                f"{r['name']}, {r['settings']['steps']} steps",
                _number(seconds["predict"]),
                _number(seconds["run"]),
                _number(seconds["predict"] / seconds["run"]),
                _number(gradients["predict"] / gradients["run"]),
            ))
    for found in cells.values():
        seconds, gradients = found["seconds"], found["gradients"]
        if seconds["full_run"]:
            rows.append((
                f"{_name(found['cell'])}, {found['steps']} steps",
                _number(seconds["predict"]),
                _number(seconds["full_run"]),
                _number(seconds["predict"] / seconds["full_run"]),
                _number(gradients["predict"] / gradients["full_run"]),
                _number(seconds["staged"] / seconds["full_run"]),
                _number(gradients["staged"] / gradients["full_run"]),
            ))
    if not rows:
        return ""
    return "\n\n".join([
        "## What a prediction costs",
        "In seconds of wall clock, and as a share of one run, in seconds and in per-sample gradients. Runs of cells are\n"
        "short; what their staged rollouts cost comes on top, those of all step sizes and of the search for the boundary.",
        _table(
            (
                "prediction",
                "seconds",
                "run, seconds",
                "share",
                "share in gradients",
                "staged rollouts, share",
                "in gradients",
            ),
            [(*row, *("–",) * (7 - len(row))) for row in rows],
        ),
    ])


def _speed(kinds: dict[str, dict[str, Any]]) -> str:
    """Timings as they are, name by name."""
    titles = {
        "products": "Products, in gradients of the same batch",
        "spectrum": "Spectrum and Gram",
        "predictions": "Predictions and maps, seconds",
        "sfr_on": "A fast prediction of SFR-on and its run, seconds",
        "exponents": "Layer exponents, seconds",
        "steps": "Steps of a run, milliseconds",
        "compiled": "Compiled by torch.compile, in gradients that are not",
    }

    def again(kind: str, name: str) -> bool:
        """Whether a row was once part of one job and is now another's, which has it anew."""
        return kind == "predictions" and "sfr_on" in kinds and "sfr_on" in name

    parts = []
    for kind, title in titles.items():
        for entry in kinds.get(kind, {}).values():
            rows = [
                (name.replace("_", " "), _shown(value))
                for name, value in entry["result"].items()
                if name not in {"kind", "seeds"} and not isinstance(value, dict) and not again(kind, name)
            ]
            if kind in {"products", "spectrum"} and "multiplied" not in entry["result"]:
                rows.append(("multiplied", "as PyTorch does by default"))  # of records from before it was decided
            rows += [
                (f"{name.removesuffix('_stages').replace('_', ' ')}: {stage}", _shown(seconds))
                for name, stages in entry["result"].items()
                if name.endswith("_stages") and not again(kind, name)
                for stage, seconds in stages.items()
            ]
            parts += [f"### {title}", _table(("what", "value"), rows)]
    for entry in kinds.get("precision", {}).values():
        rows = [
            (direction, how, f"{error['relative_error']:.1e}", f"{error['curvature_error']:+.1e}")
            for direction, found in entry["result"]["errors"].items()
            for how, error in found.items()
        ]
        parts += [
            "### A Hessian product in lower precision, against float64",
            _table(("vector", "arithmetic", "‖Hv - exact‖/‖exact‖", "relative error of vᵀHv"), rows),
        ]
    return "\n\n".join(["## Speed and precision", *parts]) if parts else ""


def _order(results: dict[str, Any], predictions: dict[str, Any]) -> str:
    """That predictions came before runs."""
    rows, before, whole = [], 0, 0
    for key, entry in results.items():
        mark = entry["result"].get("predictions")
        if mark is None:
            continue
        first = entry["result"]["first_run"]
        held = key in predictions and sha256(canonical(predictions[key])) == mark["sha256"]
        before += mark["made"] < first
        whole += held
        rows.append((key, mark["made"], first, f"`{mark['sha256'][:16]}…`", "yes" if held else "no"))
    if not rows:
        return ""
    return "\n\n".join([
        "## Predictions came first",
        f"{before} of {len(rows)} predictions were made before their first run; {whole} still have the SHA-256 that their\n"
        "runs read.",
        _table(("job", "predicted", "first run", "SHA-256", "unchanged"), rows),
    ])


# ---------------------------------------------------------------------- numbers


def _scores(cells: dict[str, Any], predictions: dict[str, Any], *, boundaries: bool = True) -> Scores:
    """Quality over all runs of some cells, P(diverge) being a report's or that of the rollouts alone."""
    said = {key: predictions[key]["predictions"]["mixes"] for key in cells}
    return scores([record for key, found in cells.items() for record in _records(found, said[key], boundaries)])


def _records(found: dict[str, Any], said: list[dict[str, Any]], boundaries: bool) -> Iterator[Record]:
    """A cell's runs as the benchmark has them."""
    lines = {line["mix"]: line for line in said}
    points = {(line["mix"], point["lr"]): point for line in said for point in line["grid"]}
    for setting in found["settings"]:
        line, point = lines[setting["mix"]], points[setting["mix"], setting["lr"]]
        one, staged = (
            Prediction(
                probability=_probability(said["probability"], setting["lr"], line if boundaries else {}, kind),
                scores=() if said["score"] is None else (said["score"],),
                step=said["divergence_step"],
            )
            for kind, said in (("one", point), ("staged", point["staged"]))
        )
        limit = line["step_limit"]
        for place, diverged in enumerate(setting["diverged"]):
            yield Record(
                lr=setting["lr"],
                mix=setting["mix"],
                one=one,
                staged=staged,
                growth=math.nan,
                step_limit=math.inf if limit is None else limit,
                coherence_rule=False,
                diverged=diverged,
                divergence_step=setting["divergence_step"][place],
                again=setting["diverged"][place - 1],
            )


def _probability(rolled: float, lr: float, line: dict[str, Any], kind: str) -> float:
    """P(diverge) of a report whose rollouts say this, with the boundary that was predicted at the mix, if there is one."""
    edge = line if kind == "one" else line.get("staged", {})
    if not edge.get("found"):
        return rolled
    return combined(rolled, lr, edge["critical_lr"], _interval(line, kind))


def _interval(line: dict[str, Any], kind: str) -> tuple[float, float]:
    """Where the critical step size lies at nine in ten, by a mix's prediction."""
    if kind == "one":
        low, high = line["interval"]
        return low, high
    edge = line["staged"]
    return calibration(kind).interval(edge["critical_lr"], edge["low"], edge["critical_lr"])


def _ratios(cells: dict[str, Any], predictions: dict[str, Any], kind: str) -> tuple[str, ...]:
    """Boundaries that both sides have, the median ratio, the shares within 1.5 and 2, and that within the interval."""
    predicted = "predicted" if kind == "one" else "staged"
    both = [
        (b[predicted], b["observed"], _interval(line, kind))
        for key, found in cells.items()
        for b, line in zip(found["boundaries"], predictions[key]["predictions"]["mixes"], strict=True)
        if b[predicted] is not None and b["observed"] is not None
    ]
    if not both:
        return ("0", *("–",) * 4)
    ratios = np.array([said / happened for said, happened, _ in both])
    away = np.abs(np.log(ratios))
    return (
        str(len(ratios)),
        f"{np.median(ratios):.2f}",
        f"{(away <= math.log(1.5)).mean():.2f}",
        f"{(away <= math.log(2)).mean():.2f}",
        f"{np.mean([low <= happened <= high for _, happened, (low, high) in both]):.2f}",
    )


def _name(spec: dict[str, Any]) -> str:
    """A cell's name."""
    extra = ["batch"] if spec["batchnorm"] == "batch" else []
    extra += ["AdamW"] if _optimizer(spec) == "adamw" else []
    return ", ".join([spec["task"], spec["deletion"], spec["algorithm"], *extra])


def _optimizer(spec: dict[str, Any]) -> str:
    """Whose steps a cell's runs take; those on record from before AdamW's were there are SGD's."""
    return str(spec.get("optimizer", "sgd"))


def _method(name: str) -> str:
    """Which row of the published table a model belongs to."""
    if name.startswith("published-"):
        return PUBLISHED_AS.get(name.removeprefix("published-"), "")
    return name


def _share(entry: dict[str, Any], key: str) -> str:
    """A share in per cent."""
    return f"{100 * entry[key]['value']:.2f}" if entry.get(key) else "–"


def _shown(value: Any) -> str:
    """Any plain value."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else _number(value)


def _number(value: float | None) -> str:
    """Three digits, or a dash where there is no number."""
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
