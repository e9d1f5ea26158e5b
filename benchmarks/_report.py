"""Tables, progress, and a JSON that says where its numbers come from."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("cuda/src", "jaxfp8")
SUFFIXES = (".py", ".h", ".cu", ".cuh", ".cc")
NO_GPU = (
    "There is no Hopper GPU here: these are tiny shapes on a CPU, which show that the benchmark "
    "runs. They are no GPU numbers, and say nothing about one."
)

# A cell, or a cell and its style.
Cell = str | tuple[str, str]


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A rich table; plain text, and a line that says so, where rich is missing.

    A column's name may hold line breaks.
    """
    styled = [[cell if isinstance(cell, tuple) else (cell, "") for cell in row] for row in rows]
    assert all(len(row) == len(columns) for row in styled), "a cell for each column"
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        flat = [column.replace("\n", " ") for column in columns]
        _print_plain(title, flat, [[text for text, _ in row] for row in styled])
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in styled:
        table.add_row(*(Text(text, style) for text, style in row))
    # A pipe has no width: rich would take 80 and cut.
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _print_plain(title: str, columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    print(f"\n{title}  (plain text: `pip install rich` for a table)")
    for row in (columns, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def ratio_cell(ratio: float | None) -> Cell:
    """A ratio, green where ours is at least as fast and red where it clearly is not."""
    if ratio is None:
        return "-"
    return f"{ratio:.2f}", "green" if ratio >= 1 else "red" if ratio < 0.95 else ""


def number(value: float | None, digits: int) -> str:
    """The number with that many digits after the point; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


class Progress:
    """A line on stderr for each of `total` steps, with the time so far and to come."""

    def __init__(self, total: int):
        self.total = total
        self.start = time.perf_counter()

    def steps(self, items: Iterable[Any], label: Callable[[Any], str] = str) -> Iterator[Any]:
        for done, item in enumerate(items):
            taken = time.perf_counter() - self.start
            left = f", about {taken / done * (self.total - done):.0f} s left" if done else ""
            self.say(f"[{done + 1}/{self.total}] {label(item)}, {taken:.0f} s so far{left}")
            yield item

    @staticmethod
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def environment(device: str | None = None) -> dict[str, Any]:
    """GPU, driver, date, versions, command, commit and a hash of the sources."""
    name, driver = _nvidia_smi()
    return {
        "gpu": name,
        "driver": driver,
        "device": device or name or platform.machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "command": "python -m benchmarks " + shlex.join(_without_out(sys.argv[1:])),
        "git_commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "source_hash": source_hash(),
    }


def _without_out(arguments: list[str]) -> list[str]:
    """The arguments but `--out DIR`: where somebody keeps results is nobody's business."""
    if "--out" not in arguments:
        return arguments
    at = arguments.index("--out")
    return arguments[:at] + arguments[at + 2 :]


def source_hash() -> str:
    """SHA-256 over the names and contents of the kernels' and the package's sources."""
    digest = hashlib.sha256()
    files = (path for folder in SOURCES for path in (ROOT / folder).rglob("*"))
    for path in sorted(path for path in files if path.suffix in SUFFIXES):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def gpu_name() -> str | None:
    """The first GPU's name, without touching it; None where there is no driver."""
    return _nvidia_smi()[0]


def write_json(folder: Path, name: str, content: dict[str, Any], *, quiet: bool = False) -> Path:
    """`folder/name.json`, `name-cpu.json` for what is no GPU number; says so unless `quiet`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{'' if content['is_gpu_number'] else '-cpu'}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    if not quiet:
        print(f"Written: {path}")
    return path


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "numpy", "torch", "jaxfp8-cuda13"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _nvidia_smi() -> tuple[str | None, str | None]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = (_output(query) or "").splitlines()
    if not lines or "," not in lines[0]:
        return None, None
    name, driver = lines[0].split(",")
    return name.strip(), driver.strip()


def _git(*arguments: str) -> str | None:
    return _output(["git", "-C", str(ROOT), *arguments])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
