"""The table that chooses a kernel for each shape, read from cuda/src/table.h; never written.

Its rows are regular: `{Accumulation::kFast, 16, 0, kAny, 0, Kernel::name, 1}, // evidence`. What
the columns mean is read from `struct Row` above them, so a further limit or option needs no change
here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _report
from benchmarks.shapes import Gemm


TABLE = _report.ROOT / "cuda" / "src" / "table.h"
KINDS = ("fast", "promoted")
# How a kernel is launched when it is named outright, as `gemm --kernels all` does.
FORCED = {"swizzle": 1}

_STRUCT = re.compile(r"struct Row \{(.*?)\};", re.DOTALL)
_FIELD = re.compile(r"(?:Accumulation|Kernel|int|bool) ([\w, ]+);")
_ROWS = re.compile(r"kTable\[\] = \{(.*?)\n\};", re.DOTALL)
_ROW = re.compile(r"\s*\{([^{}]*)\}\s*,?\s*(?://\s*(.*))?")
_LIMIT = re.compile(r"(min|max)_([mnk])")
_ANY = 1 << 30
_TILE = re.compile(r"_(\d+)x(\d+)x\d+_\d+x\d+$")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: the limits of its shapes, and what it chooses.

    Attributes:
        kind: "fast" or "promoted".
        limits: inclusive, by name, such as `max_m`; None where the table says "any".
        options: how the kernel is launched, such as `swizzle`.
        evidence: the comment behind it.
    """

    kind: str
    limits: dict[str, int | None]
    kernel: str
    options: dict[str, int]
    evidence: str

    def matches(self, shape: Gemm, kind: str) -> bool:
        return kind == self.kind and all(
            limit is None or _within(getattr(shape, name[-1]), name, limit)
            for name, limit in self.limits.items()
        )

    def __str__(self) -> str:
        parts = []
        for name, limit in self.limits.items():
            if limit is not None and (limit > 0 or name.startswith("max")):
                parts.append(f"{name[-1].upper()}{'<=' if name[:3] == 'max' else '>='}{limit}")
        return " ".join(parts) or "any"


def read(path: Path = TABLE) -> list[Row]:
    """The rows in their order.

    Raises:
        ValueError: if the file does not look as this module expects.
    """
    text = path.read_text()
    struct, body = _STRUCT.search(text), _ROWS.search(text)
    if struct is None or body is None:
        raise ValueError(f"{path} has no `struct Row {{...}};` or no `kTable[] = {{...}};`.")
    fields = [name.strip() for names in _FIELD.findall(struct[1]) for name in names.split(",")]
    rows = []
    for line in body[1].splitlines():
        if "{" not in line.split("//")[0]:
            continue
        row = _ROW.fullmatch(line)
        values = [value.strip() for value in row[1].split(",")] if row else []
        if row is None or len(values) != len(fields):
            raise ValueError(
                f"a row of {path} is written {{{', '.join(fields)}}} on a line of its own, but "
                f"one is {line.strip()!r}."
            )
        rows.append(_row(dict(zip(fields, values, strict=True)), row[2] or "", line))
    return rows


def select(rows: Sequence[Row], shape: Gemm, kind: str) -> int:
    """The index of the first row that matches."""
    for index, row in enumerate(rows):
        if row.matches(shape, kind):
            return index
    raise ValueError(f"the table has no row for {shape}, {kind}.")


def tile_rows(kernel: str) -> int | None:
    """How many rows of x a kernel's tile has, by its name; None if that does not say."""
    tile = _TILE.search(kernel)
    # A swapped kernel's tile runs over output features first.
    return int(tile[2] if "_swap_" in kernel else tile[1]) if tile else None


def _within(size: int, name: str, limit: int) -> bool:
    return size <= limit if name.startswith("max") else size >= limit


def _row(values: dict[str, str], evidence: str, line: str) -> Row:
    limits: dict[str, int | None] = {}
    options: dict[str, int] = {}
    kind = values.pop("accumulation").removeprefix("Accumulation::k").lower()
    kernel = values.pop("kernel").removeprefix("Kernel::")
    if kind not in KINDS:
        raise ValueError(f"accumulation must be kFast or kPromoted, but a row is {line.strip()!r}.")
    for name, value in values.items():
        number = _number(value, line)
        if _LIMIT.fullmatch(name):
            limits[name] = None if number == _ANY else number
        else:
            options[name] = number
    return Row(kind, limits, kernel, options, evidence.strip())


def _number(value: str, line: str) -> int:
    if value == "kAny":
        return _ANY
    if value in ("true", "false"):
        return int(value == "true")
    if not value.isdigit():
        raise ValueError(f"{value!r} is no number, in the row {line.strip()!r}.")
    return int(value)
