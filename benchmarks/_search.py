"""Constants of the kernel table by what their choices cost, from others that are near.

Constants fitted to times explain those times; where two kernels take nearly the same, what a fit is
off by decides between them. So the fit is followed by a descent, one constant after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks import _table


STEPS = (0.08, 0.12, 0.04, 0.02)
ROUNDS = 3  # of all constants by one step, at most
LEAST_GAIN = 1e-3
OF_ROWS = (("k_tile",), ("tile",), ("launch",), ("k_tile", "tile", "launch"))
OF_MEMORY = ("rate", "cache_rate", "start", "pair_rate", "last_wave")


def refine(
    table: _table.Table, cost: Callable[[_table.Table], float], *, memory: bool = True
) -> _table.Table:
    """The table with each constant changed, by the `STEPS`, where that makes `cost` less.

    Args:
        table: where the search begins.
        cost: what is made less.
        memory: whether the memory's constants may change too.
    """
    least = cost(table)
    for step in STEPS:
        for _ in range(ROUNDS):
            before = least
            for change in _changes(len(table.rows), memory=memory):
                for factor in (1 - step, 1 + step):
                    changed = change(table, factor)
                    if (new := cost(changed)) < least - LEAST_GAIN:
                        table, least = changed, new
            if least == before:
                break
    return rounded(table)


def rounded(table: _table.Table) -> _table.Table:
    """As table.h writes it: nanoseconds, and what a memory gives to two or three digits."""
    rows = [
        _table.Row(row.kernel, round(row.k_tile, 3), round(row.tile, 3), round(row.launch, 3))
        for row in table.rows
    ]
    memory = table.memory
    memory = dataclasses.replace(
        memory,
        rate=round(memory.rate, -4),
        cache_rate=round(memory.cache_rate, -6),
        start=round(memory.start, 2),
        pair_rate=round(memory.pair_rate, -3),
        last_wave=round(memory.last_wave, 2),
    )
    return dataclasses.replace(table.with_rows(rows), memory=memory)


def _changes(rows: int, *, memory: bool) -> list[Callable[[_table.Table, float], _table.Table]]:
    return [
        *(_of_memory(name) for name in OF_MEMORY if memory),
        *(_of_row(index, names) for index in range(rows) for names in OF_ROWS),
    ]


def _of_memory(name: str) -> Callable[[_table.Table, float], _table.Table]:
    def change(table: _table.Table, factor: float) -> _table.Table:
        scaled = {name: getattr(table.memory, name) * factor}
        return dataclasses.replace(table, memory=dataclasses.replace(table.memory, **scaled))

    return change


def _of_row(index: int, names: tuple[str, ...]) -> Callable[[_table.Table, float], _table.Table]:
    def change(table: _table.Table, factor: float) -> _table.Table:
        rows = list(table.rows)
        scaled = {name: getattr(rows[index], name) * factor for name in names}
        rows[index] = dataclasses.replace(rows[index], **scaled)
        return table.with_rows(rows)

    return change
