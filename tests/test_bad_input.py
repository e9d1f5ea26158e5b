"""Every part refuses bad input by a message that helps, and changes nothing.

The table is put together from `CASES` of the modules `bad_input_*`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
from bad_input import Case
from update_cases import assert_same_bits


CASES: list[tuple[str, Case]] = [
    (module.stem.removeprefix("bad_input_"), case)
    for module in sorted(Path(__file__).parent.glob("bad_input_*.py"))
    for case in importlib.import_module(module.stem).CASES
]


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{part}: {c.name}") for part, c in CASES])
def test_is_refused_and_nothing_changes(case: Case, tmp_path: Path):
    tree, call = case.prepare(tmp_path)
    before = jax.tree.map(lambda leaf: np.array(leaf), tree)
    with pytest.raises(case.error) as caught:
        call()
    for words in case.says:
        assert words in str(caught.value), f"{words!r} is not in:\n{caught.value}"
    assert_same_bits(tree, before)


def test_the_table_is_long():
    assert len(CASES) >= 30
