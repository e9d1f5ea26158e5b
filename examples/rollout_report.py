"""What `rollout.py` says of its runs: the checks, two tables, a plot and a JSON file."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rollout_loop import FLOAT, FP8, FP8_BOTH, Reload, Settings, Step
from rollout_policy import VOCABULARY
from watch import path_used


matplotlib.use("Agg")

# An arm's name, and its runs, one a seed.
Results = dict[str, list[list[Step]]]

# The bounds below were set from six seeds of the default run on a CPU.
LAST = 20  # steps over which the reward at the end is averaged
LEARNT = 0.9  # the optimum is 1, guessing earns 0.033, and float32 reached 0.996 to 0.998
REWARD_BOUND = 0.01  # the worst seed in FP8 was 0.003 below float32
# Means over all reloads of a run: rounding to e4m3 is 0.19 to 0.20 of what five steps of training
# have opened. A reload that does nothing leaves all of it.
GAP_LEFT = 0.5
GAP_BOTH = 1e-3  # it was 0 after every reload
ACCEPTED = 0.8  # 0.997 to 0.998


def problems(results: Results) -> list[str]:
    """What went wrong in any run, in words; nothing if all is well."""
    found = []
    for name, runs in results.items():
        for seed, rows in enumerate(runs):
            found += [f"{name}, seed {seed}: {text}" for text in _problems(name, rows)]
    for name, runs in results.items():
        for seed, (rows, wanted) in enumerate(zip(runs, results[FLOAT.name], strict=True)):
            if not reached(rows) >= reached(wanted) - REWARD_BOUND:
                found.append(
                    f"{name}, seed {seed}: reward {reached(rows):.3f}, more than {REWARD_BOUND} "
                    f"below float32's {reached(wanted):.3f}"
                )
    return found


def _problems(name: str, rows: list[Step]) -> Iterable[str]:
    done = reloads(rows)
    before, after = mean_gap(rows, "before"), mean_gap(rows, "after")
    if done[-1].recompiles:
        yield f"{done[-1].recompiles} recompiles after the first reload"
    if buffers := max(reload.moved for reload in done):
        yield f"{buffers} buffers moved"
    if not after <= GAP_LEFT * before:
        yield f"reloads left a log-prob gap of {after:.4f}, of {before:.4f} before them"
    if name == FP8_BOTH.name and not after <= GAP_BOTH:
        yield f"log-prob gap {after:.5f} after a reload, though the trainer rounds as well"
    if name == FLOAT.name and not reached(rows) >= LEARNT:
        yield f"reward {reached(rows):.3f}: too few steps to learn the task ({LEARNT})"
    if not done[-1].acceptance >= ACCEPTED:
        yield f"of the draft's tokens {done[-1].acceptance:.0%} are accepted, below {ACCEPTED:.0%}"


def reloads(rows: list[Step]) -> list[Reload]:
    return [row.reload for row in rows if row.reload]


def reached(rows: list[Step]) -> float:
    """The reward at the end of a run."""
    return statistics.fmean(row.reward for row in rows[-LAST:])


def mean_gap(rows: list[Step], which: str) -> float:
    """The gap `before` or `after` a reload, or of the policy `never` reloaded, over a run."""
    return statistics.fmean(getattr(reload, which).mean for reload in reloads(rows))


def verdict(results: Results) -> str:
    """One line: what was reached, or what went wrong."""
    if found := problems(results):
        return f"[bold red]FAILED:[/] {'; '.join(found)} ({path_used()})."
    rewards = ", ".join(
        f"{name} {statistics.fmean(map(reached, runs)):.3f}" for name, runs in results.items()
    )
    return (
        f"[bold green]OK:[/] rollouts in FP8 earn what rollouts in float32 earn, to {REWARD_BOUND} "
        f"in every seed ({rewards}), with no recompile and no buffer moved ({path_used()})."
    )


def table_by_step(results: Results, parts: int = 10) -> Table:
    """Reward since the last line, and what the reload at this step did; means over seeds."""
    table = Table(title="By step", box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("step", justify="right")
    for name in results:
        table.add_column(f"reward\n{name}", justify="right")
    for head in ("before", "max", "after", "max"):
        table.add_column(f"{FP8.name}'s gap\n{head}", justify="right")
    table.add_column(f"{FP8.name}'s\ndraft", justify="right")
    done = [row.step for row in results[FLOAT.name][0] if row.reload]
    last = 0
    for at in np.unique(np.linspace(-1, len(done) - 1, parts + 1).round().astype(int))[1:]:
        here = [reloads(rows)[at] for rows in results[FP8.name]]
        rewards = [
            statistics.fmean(row.reward for rows in runs for row in rows[last : done[at]])
            for runs in results.values()
        ]
        table.add_row(
            str(done[at]),
            *(f"{reward:.3f}" for reward in rewards),
            *_gap([r.before for r in here]),
            *_gap([r.after for r in here]),
            f"{statistics.fmean(r.acceptance for r in here):.0%}",
        )
        last = done[at]
    return table


def table_by_arm(results: Results) -> Table:
    """What each arm reached, and what its reloads cost, over all seeds and reloads."""
    table = Table(title="Over all seeds", box=box.SIMPLE, pad_edge=False)
    table.add_column()
    columns = summary(results)
    for name in columns:
        table.add_column(name, justify="right")
    for figure in columns[FLOAT.name]:
        table.add_row(figure, *(_short(column[figure]) for column in columns.values()))
    return table


def summary(results: Results) -> dict[str, dict[str, float]]:
    """The figures of each arm; gaps and times are over all reloads of all seeds."""
    return {name: _summary(runs) for name, runs in results.items()}


def _summary(runs: list[list[Step]]) -> dict[str, float]:
    done = [reload for rows in runs for reload in reloads(rows)]
    titles = {
        "before": "before a reload",
        "after": "after it",
        "never": "of a policy never reloaded",
    }
    gaps = {
        f"log-prob gap {title}, {kind}": combine(getattr(getattr(r, which), kind) for r in done)
        for which, title in titles.items()
        for kind, combine in (("mean", statistics.fmean), ("max", max))
    }
    return {
        f"reward in the last {LAST} steps": statistics.fmean(map(reached, runs)),
        "the same, worst seed": min(map(reached, runs)),
        **gaps,
        "draft's tokens accepted at the end": statistics.fmean(
            reloads(rows)[-1].acceptance for rows in runs
        ),
        "reload of the policy, ms, median": statistics.median(r.policy_ms for r in done),
        "reload of the draft, ms, median": statistics.median(r.draft_ms for r in done),
        "reloads, both": 2 * len(done),
        "recompiles after the first": max(r.recompiles for r in done),
        "buffers moved": max(r.moved for r in done),
    }


def _gap(gaps: list[Any]) -> tuple[str, str]:
    return f"{statistics.fmean(g.mean for g in gaps):.4f}", f"{max(g.max for g in gaps):.2f}"


def _short(value: float) -> str:
    return f"{value:.4g}"


def save_json(results: Results, settings: Settings, file: Path) -> None:
    """All rows of all runs, the summary and what went wrong."""
    content = {
        "settings": dataclasses.asdict(settings),
        "seeds": len(results[FLOAT.name]),
        "jax": jax.__version__,
        "path": path_used(),
        "problems": problems(results),
        "summary": summary(results),
        "runs": {
            name: [[dataclasses.asdict(row) for row in rows] for rows in runs]
            for name, runs in results.items()
        },
    }
    file.write_text(json.dumps(content) + "\n")


def save_plot(results: Results, settings: Settings, file: Path) -> None:
    """Reward, log-prob gap and acceptance over the steps, as a PNG; bands span the seeds."""
    figure = Figure(figsize=(8, 10), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=(3, 3, 2))
    steps = [row.step for row in results[FLOAT.name][0]]
    done = [row.step for row in results[FLOAT.name][0] if row.reload]
    for name, style in zip(results, ("-", "--", ":"), strict=False):
        _band(top, steps, results[name], lambda rows: [r.reward for r in rows], style, name)
    top.axhline(1 / VOCABULARY, color="grey", lw=0.8, label="guessing")
    top.set(ylabel="reward a token", title=f"Seeds: {len(results[FLOAT.name])}; {path_used()}")

    def gaps(which: str, kind: str) -> Callable[[list[Step]], list[float]]:
        return lambda rows: [getattr(getattr(r, which), kind) for r in reloads(rows)]

    for which, style, label in (
        ("never", ":", "FP8, never reloaded"),
        ("before", "--", f"FP8, before a reload ({settings.reload_every} updates old)"),
        ("after", "-", "FP8, after it: rounding to e4m3"),
    ):
        color = _band(middle, done, results[FP8.name], gaps(which, "mean"), style, label)
        highest = np.max([gaps(which, "max")(rows) for rows in results[FP8.name]], axis=0)
        middle.plot(done, highest, style, color=color, lw=0.7)
    middle.set(ylabel="|log p(trainer) - log p(policy)|, mean; thin: max", yscale="log")
    for name, style in zip(results, ("-", "--", ":"), strict=False):
        read = [[r.acceptance for r in reloads(rows)] for rows in results[name]]
        bottom.plot(done, np.mean(read, axis=0), style, label=name)
    bottom.set(ylabel="draft's tokens accepted", xlabel="step", ylim=(0, 1.02))
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def _band(axes: Any, x: list[int], runs: Any, read: Any, style: str, label: str) -> Any:
    curves = np.array([read(rows) for rows in runs])
    (line,) = axes.plot(x, curves.mean(0), style, label=label)
    axes.fill_between(x, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, lw=0)
    return line.get_color()
