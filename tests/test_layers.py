"""The package's layers: every module imports from lower ones alone, and the numerical core needs no plots and no HTML."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "stabkit"

# From the bottom up; a module may import its own layer's package-mates and anything below. The order is the data's way:
# problem -> curvature -> measured quantities -> stability -> prediction -> report -> verification.
LAYERS = [
    {
        "_version",
        "_errors",
        "_rng",
        "_progress",
        "_validate",
        "_wrappers",
        "_table",
        "_serialise",
        "_memory",
        "_checkpoint",
        "precision",
    },
    {"sampling", "schedules", "samples", "losses", "heavy_tail", "parallel", "calibration"},
    {"reading", "network", "data"},
    {"problem", "models", "training", "datasets"},
    {"preconditioner", "metrics", "graphs"},
    {"curvature"},
    {"adam", "deletion", "synthetic", "spectrum", "coherence", "stability"},
    {"directions"},
    {"algorithms"},
    {"updates"},
    {"steps"},
    {"runner"},
    {"rollout"},
    {"staged"},
    {"boundary", "frontier", "recommendations"},
    {"report"},
    {"measure", "monitor"},
    {"cause", "theory", "verdict"},
    {"modes", "plots", "remedy"},
    {"render"},
    {"checks"},
    {"judge", "verify"},
    {"predict"},
    {"tune"},
    {"demo", "bench"},
    {"cli", ""},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Results show themselves: methods load plots and pages when called, never on import.
DRAWING = {"plots", "render"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    """The top-level module or subpackage a file belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path):
    """(room, whether at import time) of every stabkit import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            child.parent = parent
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stabkit":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("stabkit.")]
        up, lazy = node, False
        while hasattr(up, "parent"):
            up = up.parent
            lazy |= isinstance(up, ast.FunctionDef)
        for name in names:
            yield name, not lazy


def test_the_table_of_layers_names_every_module():
    assert {room(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_from_below(path):
    own = room(path)
    for name, eager in imported(path):
        if not eager and name in DRAWING:
            continue
        assert name == own or LEVEL[name] < LEVEL[own], f"{own} imports {name}"


def test_the_same_layer_means_no_acquaintance():
    table = {(room(path), name) for path in MODULES for name, _ in imported(path)}
    assert ("predict", "measure") in table  # the reader of imports reads
    assert not {pair for pair in table if pair[0] != pair[1] and LEVEL[pair[0]] == LEVEL[pair[1]]}


@pytest.mark.parametrize("blocked", [("matplotlib", "jinja2"), ("transformers", "curvlinops", "weightwatcher")])
def test_the_core_predicts_without(blocked):
    program = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import torch, stabkit, warnings
warnings.simplefilter("ignore")
x, y = torch.randn(30, 4), torch.arange(30) % 3
model = torch.nn.Sequential(torch.nn.Linear(4, 3))
report = stabkit.predict(model, (x[:10], y[:10]), (x[10:], y[10:]), lr=0.1, rank=4, steps=5, batch_size=4)
report.frontier(lr=[0.1, 1.0], mix=[0.2])
stabkit.verify(report, model, (x[:10], y[:10]), (x[10:], y[10:]))
report.to_json()
print(report.summary().split()[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"STABLE", "MARGINAL", "DIVERGES"}
