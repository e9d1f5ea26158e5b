"""Reinforcement learning as it is run: a float trainer, FP8 rollouts, and reloads in between.

    python examples/rollout.py [--steps 200] [--seeds 3] [--out DIRECTORY] [--quick]

A small language model learns by policy gradient to write its prompt backwards: 30 tokens, layers
of 100, 300 and 340, which FP8 tensor cores could not read unpadded. One process holds the trainer
(float32, optax, with a value head as baseline), the policy that rolls out (padded FP8, without
that head) and a smaller draft model, distilled from the rollouts to propose tokens for speculative
decoding. Policy and draft are reloaded every 5 steps, on the device and in place.

The same runs, seed by seed, with other dense layers:
    float32   trainer and rollouts in float32: what is to be reached
    FP8       float32 trainer, FP8 rollouts; the importance ratio makes up for the difference
    FP8 both  the trainer's layers round to FP8 too (straight-through), so a reload leaves no gap

Exits with 1 if FP8 earns less, a reload does not close the gap, or anything recompiles or moves.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rollout_loop import ARMS, Settings, Step, run
from rollout_report import (
    Results,
    problems,
    save_json,
    save_plot,
    table_by_arm,
    table_by_step,
    verdict,
)


QUICK = Settings(steps=300, batch=64, length=4)


def run_all(
    settings: Settings, seeds: int, show: Callable[[str, Step | None], None] = lambda *_: None
) -> Results:
    """Every arm with every seed; `show` hears of each step, and first of each run."""
    results: Results = {arm.name: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            title = f"{arm.name}, seed {seed}"
            show(f"{title}, compiling" if seed == 0 else title, None)
            rows = []
            for row in run(arm, seed, settings):
                rows.append(row)
                show(title, row)
            results[arm.name].append(rows)
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, help="of each run (200; 300 with --quick)")
    parser.add_argument("--seeds", type=int, help="runs of each kind (3; 1 with --quick)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIRECTORY")
    parser.add_argument("--quick", action="store_true", help="one seed, shorter prompts")
    options = parser.parse_args(arguments)
    seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    if seeds < 1:
        parser.error(f"--seeds must be at least 1, but it is {seeds}")
    try:
        settings = QUICK if options.quick else Settings()
        if options.steps is not None:
            settings = dataclasses.replace(settings, steps=options.steps)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(ARMS) * seeds * settings.steps)

        def show(title: str, row: Step | None) -> None:
            reward = f": reward {row.reward:.2f}" if row else ""
            progress.update(task, description=title + reward, advance=1 if row else 0)

        results = run_all(settings, seeds, show)
    console.print(table_by_step(results), table_by_arm(results))
    save_json(results, settings, options.out / "rollout.json")
    save_plot(results, settings, options.out / "rollout.png")
    console.print(f"Curves: {options.out / 'rollout.png'}; all figures: rollout.json beside it")
    console.print(verdict(results), soft_wrap=True)
    return 1 if problems(results) else 0


if __name__ == "__main__":
    sys.exit(main())
