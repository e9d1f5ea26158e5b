"""`python -m benchmarks BENCHMARK [--help]`, from the root of a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import accuracy, checkpoint, gemm, inputs, layer, reload, stack, tune


BENCHMARKS = {
    "gemm": gemm,
    "layer": layer,
    "stack": stack,
    "inputs": inputs,
    "reload": reload,
    "accuracy": accuracy,
    "checkpoint": checkpoint,
    "tune": tune,
}
# The others measure no time.
TIMED = ("gemm", "layer", "stack", "inputs", "reload")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; 1 if a result that was to be timed is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--out",
            type=Path,
            default=Path(__file__).parent / "results",
            help="folder for the JSON and the plots (default: benchmarks/results)",
        )
        if name in TIMED:
            command.add_argument("--rounds", type=int, default=11, help="interleaved rounds")
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    return BENCHMARKS[options.benchmark].run(options)


if __name__ == "__main__":
    sys.exit(main())
