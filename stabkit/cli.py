"""The command line: data to stdout, narration to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stabkit._serialise import dumps
from stabkit._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command-line arguments; the process's own when None.

    Returns:
        Exit status: 0 when the command did its work, 2 for wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="stabkit", description="Says whether a machine-unlearning run will diverge, before it is run."
    )
    parser.add_argument("--version", action="version", version=f"stabkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="predict, explain, run and check on scikit-learn's digits")
    demo.add_argument("--output", default="demo", help="folder for report.html and demo.json (default: demo)")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    demo.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    demo.add_argument("--quiet", action="store_true", help="no narration and no progress bars")
    bench = commands.add_parser("bench", help="hold predictions against many real runs")
    jobs = bench.add_subparsers(dest="job", required=True)
    verify = jobs.add_parser("verify", help="predict and run cells of data set, network, deletion and algorithm")
    verify.add_argument("--folder", default="verify", help="where results lie; what is there is kept (default: verify)")
    verify.add_argument("--cells", nargs="+", help="cells, or beginnings of their names; all when left out")
    verify.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    verify.add_argument("--jobs", type=int, default=1, help="processes, one thread each (default: 1)")
    verify.add_argument("--quick", action="store_true", help="eight settings a cell, to try it out")
    verify.add_argument("--stored", action="store_true", help="run nothing, sum up what the folder holds")
    verify.add_argument("--page", help="the Markdown page to write (default: verify.md in the folder)")
    verify.add_argument("--json", action="store_true", help="print the summary as JSON instead of the page")
    fit = jobs.add_parser("calibrate", help="interval and Brier score from the calibration cells that a folder holds")
    fit.add_argument("--folder", default="verify", help="where `bench verify` left its files (default: verify)")
    fit.add_argument("--output", required=True, help="the file to write, such as stabkit/calibration.json")
    options = parser.parse_args(arguments)
    if options.command == "demo":
        return _demo(options)
    return _verify_cells(options) if options.job == "verify" else _calibrate(options)


def _demo(options: argparse.Namespace) -> int:
    from stabkit.demo import run_demo  # imports torch: not needed for --help

    try:
        result = run_demo(options.output, seed=options.seed, progress=not options.quiet and sys.stderr.isatty())
    except (OSError, ValueError) as error:
        print(f"stabkit demo: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(result.to_json())
    else:
        print(result.predictions())
        print()
        print(result.outcomes())
    if not options.quiet:
        print(f"\nWrote {result.report_path} in {result.seconds:.0f} s.", file=sys.stderr)
    return 0


def _verify_cells(options: argparse.Namespace) -> int:
    from stabkit.bench import verify_cells, write_page

    try:
        summary = verify_cells(
            options.folder,
            cells=options.cells,
            seeds=options.seeds,
            jobs=options.jobs,
            quick=options.quick,
            stored=options.stored,
        )
        page = write_page(summary, options.page or Path(options.folder) / "verify.md")
    except (OSError, ValueError) as error:
        print(f"stabkit bench verify: {error}", file=sys.stderr)
        return 2
    print(dumps(summary) if options.json else page.read_text(encoding="utf-8"))
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from stabkit.bench import calibrate

    try:
        fitted = calibrate(options.folder, options.output)
    except (OSError, ValueError) as error:
        print(f"stabkit bench calibrate: {error}", file=sys.stderr)
        return 2
    for kind, found in fitted.items():
        brier = "–" if found.brier is None else f"{found.brier:.3g}"
        print(f"{kind}: slope {found.slope:.3g}, Brier {brier}, {found.runs} runs")
    return 0
