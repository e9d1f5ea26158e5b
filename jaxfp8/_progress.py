"""A bar for long work: rich's where it is installed, else a line for each tenth."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show `what` on standard error, and give the function that adds to what is done.

    Args:
        what: a word or two.
        total: how much there is to do, or None where nobody knows.
        unit: of what, such as "batches"; "bytes" are shown as megabytes and gigabytes.
    """
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        yield _lines(what, total, unit)
        return
    count = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        count,
        progress.TextColumn("" if unit == "bytes" else unit),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.update(task, advance=amount)


@contextlib.contextmanager
def report(
    progress: bool | Callable[[int, int], None], what: str, total: int
) -> Iterator[Callable[[int], None]]:
    """The function that adds bytes to what is done, for an argument `progress` of the API.

    True shows a bar, a callable is told what is done and the total each time, False does nothing.
    """
    if callable(progress):
        tell, done = progress, 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            tell(done, total)

        yield advance
    elif progress:
        with progress_bar(what, total, "bytes") as advance_bar:
            yield advance_bar
    else:
        yield lambda amount: None


def _lines(what: str, total: int | None, unit: str) -> Callable[[int], None]:
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        before, done = done, done + amount
        if total is None:
            print(f"{what}: {done} {unit}", file=sys.stderr)
        elif before * 10 // max(total, 1) != done * 10 // max(total, 1):
            print(f"{what}: {done} of {total} {unit}", file=sys.stderr)

    return advance
