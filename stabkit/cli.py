"""The command line: data to stdout, narration to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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
    options = parser.parse_args(arguments)

    from stabkit.demo import run_demo  # imports torch: not needed for --help

    result = run_demo(options.output, seed=options.seed, progress=not options.quiet and sys.stderr.isatty())
    if options.json:
        print(result.to_json())
    else:
        print(result.predictions())
        print()
        print(result.outcomes())
    if not options.quiet:
        print(f"\nWrote {result.report_path} in {result.seconds:.0f} s.", file=sys.stderr)
    return 0
