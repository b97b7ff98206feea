"""Write benchmarks/README.md from the stored results, so that no figure in it is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def load(name: str) -> dict[str, Any] | None:
    """A stored result, if it is there."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def digits_grid(found: dict[str, Any]) -> str:
    """Predictions against real runs on digits."""
    named = {"all runs": found["pooled"], **found["cells"]}
    rows = [
        (
            name,
            s["settings"],
            f"{s['share_diverged']:.2f}",
            f"{s['balanced_accuracy']:.3f}",
            f"{s['auc']:.3f}",
            f"{s['brier']:.3f}",
            f"{s['balanced_accuracy_of_step_limit']:.3f}",
        )
        for name, s in named.items()
    ]
    columns = ("runs", "count", "diverged", "balanced accuracy", "AUC", "Brier", "balanced accuracy of η > 2/λ_max")
    return "\n".join([
        "## Predictions against real runs on digits",
        "",
        f"`python benchmarks/digits_grid.py`: a small CNN, {found['steps']} steps, seeds {found['seeds']}.",
        "",
        table(columns, rows),
    ])


def products(found: dict[str, Any]) -> str:
    """Hessian and GGN products against the peers."""

    def cell(rows: dict[str, float], key: str) -> str:
        return f"{rows[key]:.2f}" if key in rows else "–"

    lines = []
    for threads in (1, 2):
        for model, rows in found.get(f"products_{threads}_threads", {}).items():
            for product in ("hvp", "ggn"):
                lines.append((
                    model,
                    threads,
                    product.upper(),
                    cell(rows, f"stabkit_{product}"),
                    cell(rows, f"stabkit_{product}_block"),
                    cell(rows, f"stabkit_{product}_not_kept"),
                    cell(rows, f"stabkit_{product}_first"),
                    cell(rows, f"curvlinops_{product}"),
                    cell(rows, f"curvlinops_{product}_block"),
                    cell(rows, f"pyhessian_{product}"),
                ))
    columns = (
        "network",
        "threads",
        "product",
        "ours",
        "of 8",
        "graph not kept",
        "first",
        "curvlinops",
        "of 8",
        "PyHessian",
    )
    text = [
        "## Curvature products and spectra",
        "",
        f"`python benchmarks/curvature.py` on {found['device']}, versions {found['versions']}.",
        'Costs in gradients of the same batch; "of 8" is a vector\'s share of a block of eight; "first" includes building',
        "the graph.",
        "",
        table(columns, lines),
    ]
    spectrum = found.get("spectrum_resnet20")
    if spectrum:
        rows = [
            (
                "stabkit, both ends at once",
                f"{spectrum['stabkit_eigen_seconds']:.1f}",
                spectrum["stabkit_eigen_products"],
                f"{spectrum['stabkit_eigen_residual']:.1e}",
            ),
            (
                "curvlinops with SciPy's eigsh, one end after the other",
                f"{spectrum['curvlinops_eigsh_seconds']:.1f}",
                spectrum["curvlinops_eigsh_products"],
                f"{spectrum['curvlinops_eigsh_residual']:.1e}",
            ),
        ]
        if "pyhessian_top_only_seconds" in spectrum:
            rows.append((
                "PyHessian, largest magnitudes only",
                f"{spectrum['pyhessian_top_only_seconds']:.1f}",
                "–",
                f"values off by {spectrum['pyhessian_top_difference']:.1e}",
            ))
        text += [
            "",
            "Five eigenpairs at each end of ResNet-20's Hessian, one thread; residuals as shares of the largest eigenvalue:",
            "",
            table(("solver", "seconds", "products", "largest residual"), rows),
            "",
            f"A spectral density from 10 probes of 20 steps: {spectrum['stabkit_density_seconds']:.1f} s; curvlinops "
            f"{spectrum['curvlinops_density_seconds']:.1f} s.",
            "",
            "Half the peers' seconds, the aim, is missed by a little in both. The density, which does next to nothing",
            f"beside its 200 products, takes {spectrum['stabkit_density_seconds'] / 200:.2f} s for each, the eigensolver "
            f"{spectrum['stabkit_eigen_seconds'] / spectrum['stabkit_eigen_products']:.2f} s with its reorthogonalisation,",
            f"curvlinops with SciPy {spectrum['curvlinops_eigsh_seconds'] / spectrum['curvlinops_eigsh_products']:.2f} s.",
        ]
    if "cost_curves" in found:
        slopes = ", ".join(f"{name}: {curve['slope']:.2f}" for name, curve in found["cost_curves"].items())
        text += [
            "",
            f"Exponents of a Hessian product's time in samples n, parameters d, classes C, vectors k: {slopes}.",
        ]
    if "gram_curves" in found:
        slopes = ", ".join(f"{name}: {curve['slope']:.2f}" for name, curve in found["gram_curves"].items())
        text += ["", f"Exponents of the time of a small CNN's per-sample Gram in samples m, classes C: {slopes}."]
    return "\n".join(text)


def gram(found: dict[str, Any]) -> str:
    """The Gram of per-sample curvature against rows of the Jacobian."""
    rows = [
        (
            name,
            case["samples"],
            f"{case['parameters']:,}",
            f"{case['memory'] / 2**20:.0f} MiB",
            case["passes"],
            f"{case['times_faster']['rows-chunked']:.1f} / {case['times_faster']['rows']:.1f}",
            f"{case['times_less_memory']['rows-chunked']:.1f} / {case['times_less_memory']['rows']:.1f}",
        )
        for name, case in found["cases"].items()
    ]
    columns = ("case", "m", "d", "budget", "passes", "times faster", "times less memory")
    return "\n".join([
        "## Gram of per-sample curvature",
        "",
        "`python benchmarks/gram.py`: against vmap(jacrev), in chunks of 8 samples / all at once; ten outputs a sample, CPU",
        "seconds on one thread.",
        "",
        table(columns, rows),
        "",
        "The aim of 2 is missed on the residual network: its early layers have more positions than weights a filter, so",
        "that the cheapest way is to make those layers' rows, as the Jacobian does; the backward passes are the same.",
    ])


def parallel(found: dict[str, Any]) -> str:
    """One rank against two."""
    return "\n".join([
        "## Two ranks",
        "",
        f"`python benchmarks/parallel.py`: a Hessian product of {found['model']} over {found['samples']} samples takes "
        f"{found['seconds_one_rank']:.2f} s on",
        f"one rank and {found['seconds_two_ranks']:.2f} s on two ({found['speedup']:.2f} times faster), one thread each on "
        f"{found['cores']} cores.",
    ])


def frontier(found: dict[str, Any]) -> str:
    """The map of mean-square growth."""
    rows = [
        (
            row["rank"],
            f"{row['captured']:.2f}",
            f"{row['decomposition_seconds']:.1f}",
            f"{row['map_seconds']:.2f}",
            row["applications"],
            f"{row['seconds_of_one_setting']:.2f}",
            f"{row['dense_seconds']:.1f}" if "dense_seconds" in row else "–",
            f"{row['largest_difference']:.0e}",
        )
        for row in found["ranks"]
    ]
    columns = (
        "rank",
        "captured",
        "decomposition, s",
        f"{found['settings']} settings, s",
        "applications",
        "one alone, s",
        "one dense, s",
        "largest relative difference",
    )
    return "\n".join([
        "## The exact stability frontier",
        "",
        f"`python benchmarks/frontier.py`: ρ(T_η) over {found['settings']} step sizes and mixes of a digits CNN with "
        f"{found['parameters']:,} parameters and {found['samples']}",
        "samples, CPU seconds on one thread. The difference is that to five settings solved alone.",
        "",
        table(columns, rows),
        "",
        f"The same settings rolled out take {found['rollout_seconds']:.1f} s; one real run of 100 steps "
        f"{found['real_run_seconds']:.1f} s.",
        "",
        "From a trained network to the rolled-out map, every setting with three seeds, in CPU seconds of one real run of as",
        "many steps. The map needs the linearisation alone. A fast `predict` linearises fewer samples in fewer",
        "directions, a lean one takes the eigenvalues of few samples, which no verdict rests on; each looks for critical",
        "values, causes and exponents too.",
        "",
        table(
            (
                "cell",
                "parameters",
                "steps",
                "map",
                "linearisation + map",
                "fast predict + map",
                "lean predict + map",
                "predict + map",
            ),
            [
                (
                    row["cell"],
                    f"{row['parameters']:,}",
                    row["steps"],
                    *(
                        f"{sum(row.get(f'{part}_seconds', 0.0) for part in parts) / row['run_seconds']:.2f}"
                        for parts in (
                            ("map",),
                            ("linearisation", "map"),
                            ("fast_predict", "fast_map"),
                            ("lean_predict", "map"),
                            ("predict", "map"),
                        )
                    ),
                )
                for row in found["whole"]
            ],
        ),
    ])


def confidence(found: dict[str, Any]) -> str:
    """Wrong verdicts of one linearisation, by how wrong its outputs are."""
    used = found["used"]
    places = [(name, where) for name in found["verdicts"] for where in ("within", "beyond")]

    def told(side: dict[str, Any]) -> str:
        share = "–" if side["share"] is None else f"{side['share']:.3f}"
        return f"{side['wrong']} of {side['settings']} ({share})"

    def rows(verdicts: dict[str, Any]) -> list[tuple[str, ...]]:
        return [
            (f"{bound['bound']:g}", *(told(verdicts[name]["bounds"][k][where]) for name, where in places))
            for k, bound in enumerate(verdicts["stable"]["bounds"])
        ]

    columns = ("bound", *(f"called {name}, {where} it" for name, where in places))
    return "\n".join([
        "## How wrong a linearisation may be",
        "",
        f"`python benchmarks/confidence.py`: the {len(found['cells'])} calibration cells, verdicts of one linearisation "
        "against",
        "the recorded runs. The error is that of the linearised outputs at the predicted parameters, relative to how far",
        "they moved; each entry says how many of the verdicts were wrong. A report's confidence is low beyond an error of",
        f"{used['stable']:g} where it says stable, and of {used['diverging']:g} where it says diverging.",
        "",
        table(columns, rows(found["verdicts"])),
        "",
        f"The same for the {len(found['adamw']['cells'])} calibration cells of AdamW's runs, whose error is that after the",
        f"first steps; there confidence is low beyond {used['stable']:g} and {found['adamw']['used']:g}.",
        "",
        table(columns, rows(found["adamw"]["verdicts"])),
        "",
        "Confidence is low, too, where the critical step size lies on the other side of the run's with a probability above",
        "0.1, of either kind of prediction. Wrong verdicts, but for marginal ones, with all seeds of these cells, there and",
        "elsewhere:",
        "",
        table(
            ("runs by", "prediction", "near the boundary", "clear of it"),
            [
                (
                    {"sgd": "SGD", "adamw": "AdamW"}[optimizer],
                    {"one": "one linearisation", "staged": "staged"}[kind],
                    told(sides["near"]),
                    told(sides["clear"]),
                )
                for optimizer, kinds in found["margins"].items()
                for kind, sides in kinds.items()
            ],
        ),
    ])


def normalised(found: dict[str, Any]) -> str:
    """Wrong verdicts of divergence by one linearisation, with layers that normalise and without."""
    rows = []
    for network in dict.fromkeys(cell["network"] for cell in found["cells"]):
        for deletion in ("class", "random"):
            mine = [cell for cell in found["cells"] if (cell["network"], cell["deletion"]) == (network, deletion)]
            ratios = [cell["critical_lr"] / edge for cell in mine for edge in cell["observed"] if edge is not None]
            called = [s for cell in mine for s in cell["settings"] if s["called_diverging"]]
            errors = sorted(math.inf if s["error"] is None else s["error"] for s in called)
            wrong = sum(not s["diverged"] for s in called)
            rows.append((
                network,
                deletion,
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{wrong} of {len(called)}",
                f"{errors[0]:.2f} to {errors[-1]:.2f}",
            ))
    return "\n".join([
        "## Layers that normalise",
        "",
        f"`python benchmarks/normalised.py`: {len(found['cells'])} cells on digits, GradDiff and AGU, one linearisation;",
        "critical step sizes predicted over observed, and how many of the verdicts of divergence were wrong, at up to 27",
        "times the predicted one.",
        "",
        table(("network", "deletion", "critical step size", "wrong", "error of the linearised outputs"), rows),
    ])


def adamw(found: dict[str, Any]) -> str:
    """Critical step sizes of AdamW runs by how many parameters they are rolled out in, over the observed ones."""
    counts = [row["parameters"] for row in found["cells"][0]["predicted"]]
    rows = [
        (
            cell["cell"],
            f"{cell['parameters']:,}",
            sum(cell["samples"]) * cell["outputs"],
            *(" ".join(f"{lr / cell['observed']:.2f}" for lr in row["critical_lr"]) for row in cell["predicted"]),
        )
        for cell in found["cells"]
    ]
    return "\n".join([
        "## AdamW in samples of the parameters",
        "",
        "`STABKIT_DATA=... python benchmarks/adamw.py`: critical step sizes of GradDiff by AdamW, predicted from",
        f"one linearisation over observed (median of {len(found['settings']['run_seeds'])} real runs), for three samples",
        "of each number of parameters.",
        "",
        table(("cell", "parameters", "outputs linearised", *(f"in {count:,}" for count in counts)), rows),
    ])


def samples(found: dict[str, Any]) -> str:
    """Critical step sizes of linearisations of several sizes, over the real ones."""
    rows = []
    for case in found["cases"]:
        real = statistics.median(case["real"])
        for size in case["sizes"]:
            said = size["predictions"]

            def ratios(name: str, said: list[dict[str, Any]] = said, real: float = real) -> str:
                return " ".join(f"{row[name] / real:.2f}" for row in said) if name in said[0] else "–"

            drawn = "all" if size["drawn_from"] is None else str(size["drawn_from"])
            rows.append((
                f"{case['dataset']}, {case['deletion']}",
                size["name"],
                f"{size['rank']}, {size['retain']} + {size['forget']}, {drawn}",
                f"{statistics.mean(row['gradient_equivalents'] for row in said):,.0f}",
                f"{statistics.mean(row['captured'] for row in said):.2f}",
                ratios("critical_lr"),
                ratios("staged_critical_lr"),
            ))
    observed = "; ".join(
        f"{case['dataset']}, {case['deletion']} {' '.join(f'{lr:.3g}' for lr in case['real'])}"
        for case in found["cases"]
    )
    return "\n".join([
        "## How many samples a linearisation needs",
        "",
        f"`python benchmarks/samples.py`: a small CNN on all of MNIST and of CIFAR-10, GradDiff at mix {found['mix']:g}, "
        f"{found['steps']} steps, batches of {found['batch']}.",
        "Critical step sizes over the median of the real ones, three seeds of the linearisation each. Observed, of three",
        f"seeds of real runs: {observed}.",
        "",
        table(
            (
                "case",
                "size",
                "directions, samples, of which drawn from",
                "gradients",
                "captured",
                "one linearisation / observed",
                "staged / observed",
            ),
            rows,
        ),
        "",
        "More samples settle at the linearised network's own boundary. Where that is not the real one, features move, and",
        "staged rollouts follow them.",
    ])


def dexter(found: dict[str, Any]) -> str:
    """Batch size against coherence, the unlearning map and the alarms on random families."""
    kinds = {"shared": "σ samples share a direction", "equiangular": "equiangular samples"}
    rows = [
        (
            kinds.get(m["kind"], m["kind"]),
            m["sampling"].replace("_", " "),
            m["lr"],
            m["shares"]["cells"],
            m["shares"]["unstable"],
            f"{m['shares']['right_by_cloned_runs']:.3f}",
            f"{m['shares']['right_by_lyapunov']:.3f}",
            m["shares"]["unstable_but_almost_surely_shrinking"],
            f"{m['shares']['rule_fires_on_unstable']} / {m['shares']['rule_fires_on_stable']}",
        )
        for m in found["maps"]
    ]
    columns = (
        "construction",
        "sampling",
        "η",
        "cells",
        "unstable",
        "right: mean square",
        "right: typical run",
        "unstable, yet a typical run shrinks",
        "T13 fires on unstable / stable",
    )
    alarms, shares = found["alarms"], found["unlearning"]["shares"]
    return "\n".join([
        "## Batch size against coherence (Dexter et al. 2024)",
        "",
        f"`python benchmarks/dexter.py`: rank-one families of {found['samples']} samples with λ_max(H) = "
        f"{found['curvature']:g}; ρ(T_η) = 1 against simulated linear SGD, whose mean",
        f"square is followed by {found['cloned']['runs']} cloned runs, as rare runs carry it.",
        "",
        table(columns, rows),
        "",
        "![maps](figures/dexter_maps.png)",
        "",
        f"Unlearning on a linear regression, {shares['cells']} settings of step size and mix within the horizon: exact "
        f"growth is right in {shares['right_by_exact_growth']:.3f} of them",
        f"without drift (ρ alone in {shares['right_by_radius']:.3f}), the moments with drift in "
        f"{shares['right_by_moments']:.3f}.",
        "",
        "![unlearning](figures/dexter_unlearning.png)",
        "",
        f"Over {alarms['families']:,} random families of positive semi-definite curvature, one set, Poisson sampling, "
        f"{alarms['unstable']:,} of them unstable: T13 fires",
        f"on {alarms['rule_on_unstable']:,} unstable and {alarms['rule_on_stable']} stable ones (its noise condition alone "
        f"on {alarms['noise_condition_on_unstable']:,}), the self-loop bound on {alarms['self_loop_on_unstable']:,} and "
        f"{alarms['self_loop_on_stable']}, the",
        f"Rayleigh bounds T10 on {alarms['rayleigh_on_unstable']:,} and {alarms['rayleigh_on_stable']}.",
    ])


def mulayoff(found: dict[str, Any]) -> str:
    """The mean-square threshold of a trained network."""
    claims = found["claims"]
    measured = claims["measured_over_threshold"]
    rows = [
        (
            row["batch"],
            f"{row['critical_lr'] / found['full_batch_limit']:.3f}",
            *(f"{measured[kind][i]:.3f}" for kind in ("fresh cloned", "fresh typical", "loader cloned")),
        )
        for i, row in enumerate(found["rows"])
    ]
    columns = (
        "B",
        "η* λ_max(H)/2",
        "measured/η*, mean square",
        "measured/η*, typical run",
        "measured/η*, mean square, shuffling loader",
    )
    return "\n".join([
        "## The mean-square threshold of a trained network (Mulayoff & Michaeli 2024)",
        "",
        f"`python benchmarks/mulayoff.py`: a network of {found['parameters']} parameters at an interpolating minimum of "
        f"squared loss on {found['samples']} samples; the step",
        "size at which real SGD leaves it against η* (T7), by batch size.",
        "",
        table(columns, rows),
        "",
        "![threshold](figures/mulayoff.png)",
    ])


def signal_noise(found: dict[str, Any]) -> str:
    """Coherence, predicted and measured critical settings on signal-plus-noise data."""
    rows = []
    for axis in ("noise varies", "signal varies"):
        claim = found["claims"][axis]
        rows.append((axis, "coherence σ_R, with SNR", f"{claim['coherence_with_snr']['rho']:+.2f}"))
        for mix in (0.2, 0.5):
            for unit, name in (
                ("absolute", "η"),
                ("in_units_of_m_over_mean_squared_input", "η E‖x‖²/m"),
                ("in_units_of_1_over_largest_retain_curvature", "η λ_max(H_R)"),
            ):
                rho = claim[f"step_at_mix_{mix}"][unit]["measured_with_coherence"]["rho"]
                rows.append((axis, f"measured critical {name} at mix {mix}, with σ_R", f"{rho:+.2f}"))
        rows.append((
            axis,
            "measured critical mix, with σ_R",
            f"{claim['mix']['with_coherence_measured']['rho']:+.2f}",
        ))
    agreement = [
        (
            place,
            name,
            f"{values['settings_right']:.3f}",
            f"{values['within_one_grid_point']:.2f}" if "within_one_grid_point" in values else "–",
            f"{values['median_ratio_to_measured']:.2f}" if "median_ratio_to_measured" in values else "–",
        )
        for place, key in (("sweep", "sweep_agreement"), ("phase diagram", "phase_agreement"))
        for name, values in (
            ("critical step by rollout (T14)", found[key]["rollout_lr"]),
            ("by the mean square within the horizon (T8)", found[key]["mean_square_lr"]),
            ("2/λ_max(D) (T4)", found[key]["step_limit"]),
            ("critical mix by rollout", found[key]["rollout_mix"]),
        )
    ]
    maps = [
        (m["snr"], m["targets"], m["cells"], f"{m['right']:.3f}", f"{m['right_by_growth_rate_alone']:.3f}")
        for m in found["maps"]
    ]
    return "\n".join([
        "## Signal-plus-noise data",
        "",
        f"`python benchmarks/signal_noise.py`: two-layer ReLU networks on the data of theory §10, real GradDiff runs of "
        f"{found['steps']} steps, seeds {found['plan']['seeds']}. Rank",
        "correlations over SNRs and seeds:",
        "",
        table(("axis", "what", "Spearman's ρ"), rows),
        "",
        "![coherence](figures/signal_noise_coherence.png)",
        "![steps](figures/signal_noise_steps.png)",
        "![mixes](figures/signal_noise_mixes.png)",
        "",
        "Predicted against measured critical settings; the sweep, and the phase diagram over the angle between the sets' "
        "signals:",
        "",
        table(("runs", "predictor", "settings right", "within a grid point", "median ratio"), agreement),
        "",
        "![phase diagram](figures/signal_noise_phase.png)",
        "",
        "Near θ*, exact moments (T9) against real runs over step size and mix.",
        found["escape"],
        "",
        table(("SNR", "targets", "cells", "right", "right by ρ alone (T8)"), maps),
        "",
        "![boundary](figures/signal_noise_boundary.png)",
    ])


def exponents(found: dict[str, Any]) -> str:
    """Layer exponents against weightwatcher."""
    rows = [
        (
            name,
            entry["layers"],
            f"{entry['largest_difference']:.0e}",
            *(f"{entry['times_faster'][part]:.1f}" for part in ("eigenvalues", "fits", "exponents")),
            f"{entry['by_the_clock']['exponents']['times_faster']:.1f}",
            f"{entry['times_faster']['table']:.0f}",
            f"{entry['by_the_clock']['table']['times_faster']:.0f}",
            f"{entry['times_faster']['table_with_test']:.0f}",
            "{:.2f} to {:.2f}".format(*entry["edges"]),
        )
        for name, entry in found["weights"].items()
    ]
    entry = next(iter(found["weights"].values()))
    threads = entry["by_the_clock"]["exponents"]["threads"]
    columns = (
        "weights",
        "layers",
        "largest difference of ξ",
        "eigenvalues, times faster",
        "fits",
        "exponents",
        "exponents, by the clock",
        "whole table",
        "whole table, by the clock",
        "whole table, tested",
        "our edge over theirs",
    )
    return "\n".join([
        "## Layer exponents against weightwatcher",
        "",
        f"`python benchmarks/exponents.py`: every layer of {found['network']}, CPU seconds on one thread, and by the clock",
        f"with {threads}, weightwatcher with as many or one, whichever is quicker. The whole table has the edge of the",
        "random bulk and the spikes beyond it, for which weightwatcher is asked with `mp_fit`; tested, shuffled weights",
        "too, one copy by weightwatcher (`randomize`), by ours as many as decide whether a layer is trusted, up to "
        f"{entry['shuffles']}.",
        "",
        table(columns, rows),
        "",
        "For the exponents alone the aim of 10 is missed: what is left is the double-precision eigenvalues, which both",
        "compute. Weightwatcher searches for the edge that fits best, ours is what the eigenvalues below it say: nearly the",
        "same where weights are random, two definitions where tails are heavy.",
    ])


def algorithms(found: dict[str, Any]) -> str:
    """Every algorithm against a retrained gold, and the grids of AGU and SRAGU."""

    def share(value: dict[str, float] | None) -> str:
        if value is None:
            return "–"
        return f"{100 * value['mean']:.1f} ({100 * value['low']:.1f}–{100 * value['high']:.1f})"

    runs = [
        e for c in found["cells"].values() for name, e in c["algorithms"].items() if name not in {"original", "gold"}
    ]
    parts = [
        "## Algorithms against a retrained gold",
        "",
        f"`STABKIT_DATA=... python benchmarks/algorithms.py`: {found['steps']} steps at mix {found['mix']} (its own for "
        "those that have one), each at",
        "half the step size that was predicted safe before any run; mean and range over seeds, in per cent. MIA is the",
        'share of the forget set called member by the "entropy/logistic" attack, whose AUC between retain set and held-out',
        "data stands at each cell: near 0.5 it is at chance, and says little. The gap is the mean difference to the gold",
        "in FA, RA, TA and MIA. Half the safe step, from one linearisation, was no guarantee: "
        f"{sum(e['diverged'] for e in runs)} of {sum(e['runs'] for e in runs)} runs diverged,",
        "most of them where a class or the most influential samples are ascended on and features move.",
    ]
    for key, cell in found["cells"].items():
        rows = [
            (
                name,
                f"{entry['diverged']} of {entry['runs']}",
                share(entry["forget_accuracy"]),
                share(entry["retain_accuracy"]),
                share(entry["test_accuracy"]),
                share(entry["mia"]),
                share(entry["average_gap"]),
            )
            for name, entry in cell["algorithms"].items()
        ]
        sizes, auc = cell["sizes"], cell["algorithms"]["original"]["attack_auc"]
        parts += [
            "",
            f"**{key.rstrip('-')}** ({sizes[0]} to forget, {sizes[1]} to retain, {sizes[2]} test; the attack's AUC on the "
            f"original {auc['mean']:.2f}):",
            "",
            table(("model", "diverged", "FA", "RA", "TA", "MIA", "gap"), rows),
        ]
    rows = [
        (
            key.rstrip("-"),
            *(
                f"{grid['survived']} of {grid['runs']}, {share(grid['best_gap'])}"
                for grid in (cell["grids"]["agu"], cell["grids"]["sragu"])
            ),
            f"{min(min(g.values(), default=1) for g in cell['gates']):.2f}",
        )
        for key, cell in found["cells"].items()
    ]
    return "\n".join([
        *parts,
        "",
        "The same step sizes for AGU and SRAGU, from a tenth to ten times AGU's critical one: runs that survive, and the",
        "gap of the best of them:",
        "",
        table(("cell", "AGU", "SRAGU", "smallest gate"), rows),
        "",
        "![AGU beside SRAGU](figures/sragu_gate.png)",
    ])


def batchnorm(found: dict[str, Any]) -> str:
    """Train-mode runs, predicted as such and as frozen ones."""
    rows = [
        (
            {"batch": "batch, one linearisation", "staged": "batch, staged"}.get(name, name),
            f"{said['balanced_accuracy']:.3f}",
            said["missed"],
            said["false_alarms"],
            ", ".join(f"{ratio:.2f}" for ratio in said["critical_lr_ratios"]),
        )
        for name, said in found["summary"].items()
    ]
    return "\n".join([
        "## BatchNorm in train mode",
        "",
        f"`python benchmarks/batchnorm.py`: a BatchNorm residual network of {found['parameters']:,} parameters on digits,",
        f"{found['runs']} train-mode runs of {found['steps']} steps, {found['diverged']} of which diverged; predicted with",
        "the statistics of the run's batches, and with frozen ones. Rollouts have other batches than runs. A staged rollout",
        f"took {found['staged_gradients_over_run']:.2f} of a run's gradients on average.",
        "",
        table(
            (
                "batchnorm=",
                "balanced accuracy",
                "missed",
                "false alarms",
                "predicted / observed critical step, four cells",
            ),
            rows,
        ),
    ])


def monitor(found: dict[str, Any]) -> str:
    """The run-time guard."""
    guards, actions = found["guards"]["evaluation"], found["actions"]["evaluation"]
    first = guards["level"]
    rows = [
        (
            name,
            *(f"{guard['warned_ahead'][steps]:.2f}" for steps in ("1", "3", "5", "10")),
            f"{guard['median_lead']:.1f}",
            f"{guard['false_alarms']:.2f}",
        )
        for name, guard in guards.items()
    ]
    acts = [(name, f"{a['stopped_below_the_level']:.2f}", f"{a['shrink_rescues']:.2f}") for name, a in actions.items()]
    return "\n".join([
        "## The run-time guard",
        "",
        f"`python benchmarks/monitor.py`: plain training loops on digits, {found['steps']} steps; the rule's constants were",
        f"chosen on MLP cells, the figures are of the CNN's: {first['diverging']} runs that diverge, {first['stable']} that",
        "do not. Shares of diverging runs warned so many steps ahead, the median lead, and the share of stable runs with a",
        "false alarm:",
        "",
        table(("guard", "≥ 1", "≥ 3", "≥ 5", "≥ 10", "median lead", "false alarms"), rows),
        "",
        "What its actions are worth there, as shares of the diverging runs: stopped with the retain loss still below the",
        "level, and kept below it to the end by shrinking the step:",
        "",
        table(("guard", "stopped in time", "rescued by shrinking"), acts),
    ])


def remedy(found: dict[str, Any]) -> str:
    """Tuned settings against defaults and a grid."""

    def percent(entries: list[dict[str, Any] | None]) -> str:
        known = [e for e in entries if e and e["gap"] is not None]
        gaps = [f"{100 * sum(e[of] for e in known) / len(known):.1f}" for of in ("gap", "accuracy_gap") if known]
        return " / ".join(gaps) or "–"

    def shown(entries: list[dict[str, Any] | None]) -> str:
        runs = [e for e in entries if e]
        return f"{percent(entries)} ({sum(e['diverged'] for e in runs)} of {sum(e['runs'] for e in runs)})"

    rows, spoilt = [], 0
    aucs: list[float] = []  # of the attack on the untouched originals
    attack: dict[str, dict[str, list[float]]] = {}  # MIA's difference to the gold, by data set
    near: dict[str, list[float]] = {"gap": [], "accuracy_gap": []}  # of the tuned over the best of the grid, a row each
    for cell, seeds in found["cells"].items():
        for name in next(iter(seeds.values())):
            runs = [by[name] for by in seeds.values()]
            aucs += [r["original"]["attack_auc"] for r in runs]
            gaps = [r["tuned"]["gap"] for r in runs if r["tuned"]["gap"] is not None]
            spoilt += not gaps or sum(r["original"]["gap"] for r in runs) / len(runs) < sum(gaps) / len(gaps)
            for of, best in (("gap", "best_of_grid"), ("accuracy_gap", "best_accuracy_of_grid")):
                means = [sum(r[key][of] for r in runs) / len(runs) for key in ("tuned", best)]
                near[of].append(means[0] / means[1])
            of_data = attack.setdefault(cell.split("-")[0], {"tuned": [], "best_of_grid": []})
            for (
                key,
                told,
            ) in of_data.items():  # the gap is the mean of four differences, the other that of three of them
                told += [4 * r[key]["gap"] - 3 * r[key]["accuracy_gap"] for r in runs]
            rows.append((
                cell,
                name,
                len(runs),
                *(percent([r[key] for r in runs]) for key in ("original", "second_gold")),
                *(shown([r[key] for r in runs]) for key in ("tuned", "default", "best_of_grid")),
                f"{sum(r['grid_diverged'] for r in runs)} of {20 * len(runs)}",
                f"{sum(r['tuning_gradients_over_grid'] for r in runs) / len(runs):.2f}, "
                f"{sum(r['tuning_over_grid'] for r in runs) / len(runs):.2f}",
            ))
    return "\n".join([
        "## Does the remedy work?",
        "",
        f"`STABKIT_DATA=... python benchmarks/remedy.py`: `tune` before any run, at most {found['steps']} steps.",
        "Average gap to a retrained gold in per cent, over FA, RA, TA and MIA / over FA, RA and TA, and in brackets how",
        "many of the runs diverged. The best of a grid of 20 real runs is picked by the first of these gaps itself; a",
        "second gold differs from the first by its seed. Cost: `tune`'s gradients and CPU seconds over those of the 20",
        f"runs, which are short here. In {spoilt} of {len(rows)} rows the untouched original is nearer to the gold than",
        "the tuned model.",
        "",
        table(
            (
                "cell",
                "algorithm",
                "seeds",
                "original",
                "second gold",
                "tuned",
                "defaults",
                "best of grid",
                "grid diverged",
                "cost of tuning",
            ),
            rows,
        ),
        "",
        "Within 10 % of the best of the 20 runs, or better: "
        + "; ".join(
            f"{sum(ratio <= 1.1 for ratio in ratios)} of {len(ratios)} rows over {over}, the others "
            f"{min((x for x in ratios if x > 1.1), default=1):.1f} to {max(ratios):.1f} times off"
            for over, ratios in (
                ("all four", near["gap"]),
                ("FA, RA and TA (its own best of the 20)", near["accuracy_gap"]),
            )
        )
        + ".",
        "The grid's best is picked by the very gap it is judged by, membership attack included, and so with the gold at",
        "hand. `tune` sees neither: it aims at the loss of held-out data. By the attack alone, tuned models and the grid's",
        "best are off by "
        + "; ".join(
            f"{' and '.join(f'{100 * sum(values) / len(values):.0f}' for values in told.values())} points on {data}"
            for data, told in attack.items()
        )
        + ". The attack itself",
        f"tells an untouched original's retain set from held-out data with an AUC of {min(aucs):.2f} to {max(aucs):.2f}, "
        f"{statistics.median(aucs):.2f} in the median, where 0.5",
        "is chance: whom it calls a member, and with it a quarter of the gap over all four, says little here.",
    ])


def main() -> None:
    """Write the page."""
    parts = [
        "# Benchmarks",
        "Every figure below was read from `benchmarks/results/` by `python benchmarks/tables.py`; the command above each "
        "table\nmakes its result anew. `verify.md` has predictions against real runs over many cells (`stabkit bench "
        "verify`),\n`gpu/results.md` the experiments on a GPU, `gpu/reduced.md` the same jobs with narrow networks on "
        "a CPU. Speeds are ratios\nwithin one run, as absolute times depend on the machine.",
        "Some records of `verify.md`, which it names, are from before staged rollouts went ten steps past a crossing, and\n"
        "not one look, and held the last steps before every place that they look at against real ones.",
    ]
    for name, section in (
        ("digits_grid.json", digits_grid),
        ("curvature_cpu.json", products),
        ("curvature_cuda.json", products),
        ("gram.json", gram),
        ("parallel.json", parallel),
        ("confidence.json", confidence),
        ("normalised.json", normalised),
        ("adamw.json", adamw),
        ("samples.json", samples),
        ("frontier.json", frontier),
        ("dexter.json", dexter),
        ("mulayoff.json", mulayoff),
        ("signal_noise.json", signal_noise),
        ("exponents.json", exponents),
        ("algorithms.json", algorithms),
        ("remedy.json", remedy),
        ("batchnorm.json", batchnorm),
        ("monitor.json", monitor),
    ):
        found = load(name)
        if found is not None:
            parts.append(section(found))
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
