"""README's tables of figures are those of the files in benchmarks/results."""

import importlib.util
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def rewritten():
    spec = importlib.util.spec_from_file_location("_tables", ROOT / "tools" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rewritten


def test_every_figure_of_a_table_is_in_a_file(rewritten):
    text, changed = rewritten(README)
    assert changed == []
    assert text == README


@pytest.mark.parametrize(
    ("head", "line"),
    [
        ("M × N × K", "| 8192 × 8192 × 8192 |"),
        ("M × N × K", "| **60 shapes, geometric mean (worst)** |"),
        ("block", "| 4096→14336→4096 | 1024 |"),
        ("stack, M", "| the same, `nn.scan` |"),
        ("weights given as", "| Flax `[K, N]` |"),
        ("weights in", "| numpy | `[K, N]` |"),
    ],
)
def test_another_figure_is_seen_and_mended(head, line, rewritten):
    start = README.index(line)
    row = README[start : README.index("\n", start)]
    digit = max(i for i, c in enumerate(row) if c.isdigit())
    wrong = row[:digit] + str((int(row[digit]) + 1) % 10) + row[digit + 1 :]
    assert rewritten(README.replace(row, wrong, 1)) == (README, [head])


def test_columns_in_another_order_are_seen(rewritten):
    head = "| block | M | ours, busy | bf16 `nn.Dense`, busy |"
    assert head in README
    swapped = README.replace(head, "| block | M | bf16 `nn.Dense`, busy | ours, busy |")
    with pytest.raises(ValueError, match="not in list"):
        rewritten(swapped)
