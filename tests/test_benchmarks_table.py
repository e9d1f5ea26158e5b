"""The kernel table as the benchmarks read it, and its choices beside measured times."""

import pytest
from table_cases import (
    LARGE,
    MIDDLE,
    PROMOTED,
    SMALL,
    TABLE,
    measured,
    table_file,
    the_plugins_choices,
)

from benchmarks import _between, _table, shapes
from benchmarks.shapes import Gemm


@pytest.fixture
def table(tmp_path):
    return table_file(tmp_path)


def test_rows_and_constants_are_read(table):
    read = _table.read(table)
    assert list(read.rows) == [
        _table.Row(SMALL, 0.25, 0.5, 1.0),
        _table.Row(MIDDLE, 0.5, 1.0, 2.0),
        _table.Row(PROMOTED, 0.5, 2.0, 0.0),
    ]
    assert read.memory == _table.Memory(132, 4e6, 100e6, 2.0, 1e5, 0.2)
    assert [row.kind for row in read.rows] == ["fast", "fast", "promoted"]


def test_a_time_by_hand(table):
    """64 rows are 4 tiles of 16, 8192 features 64 clusters of 128: 256 on 66 at a time, 4 waves."""
    read = _table.read(table)
    m, n, k = 64, 8192, 1000
    # 4 steps of 256 along K. 58 of 66 clusters have a fourth tile: its steps take a little less.
    waves = 4 - 0.2 * 8 / 66
    compute = waves * 4 * 0.25 + 4 * 0.5 + 1.0
    once = n * k + m * k + 2 * m * n
    again = 256 * (128 + 16) * k - once
    memory = once / 4e6 + again / 100e6 + 2.0  # 116 - 66 of them are enough for the memory
    expected = (compute**6 + memory**6) ** (1 / 6)
    assert _table.expected_time(read.rows[0], read.memory, Gemm(m, n, k)) == pytest.approx(expected)
    # Nothing is read again where one tile has it all, and one of 132 is nearly none.
    assert _table.Work.of(MIDDLE, read.memory, Gemm(1, 1, 16)) == _table.Work(
        1,
        pytest.approx(1 - 0.2 * 131 / 132),
        pytest.approx(2.0 + 34 / 4e6 + (256 * 16 - 34) / 100e6 + 34 * (1 / 1e5 - 1 / 4e6)),
    )


def test_few_multiprocessors_do_not_take_all_that_the_memory_gives(table):
    """Of 80 in a wave 52 share their pair with nobody; the 14 other pairs have twice as much."""
    memory = _table.read(table).memory
    narrow = "fast_swap_pp_64x16x256_1x1"
    for blocks, behind in ((64, 0.0), (80, 1e-5 - 14 / 4e6), (132, 0.0), (140, 1e-5 - 8 / 4e6)):
        n = blocks * 64
        once = n * 4096 + 4096 + 2 * n
        again = blocks * (64 + 16) * 4096 - once
        expected = memory.start + once / 4e6 + again / 100e6 + once / blocks * behind
        work = _table.Work.of(narrow, memory, Gemm(1, n, 4096))
        assert work.memory_time == pytest.approx(expected)


def test_clusters_of_four_are_fewer_than_the_blocks_would_allow(table):
    """Each of 8 GPCs may leave two multiprocessors over."""
    memory = _table.read(table).memory
    assert [memory.resident_clusters(size) for size in (1, 2, 4)] == [132, 66, 29]
    four = MIDDLE.replace("1x1", "1x4")
    waves = [_table.Work.of(four, memory, Gemm(128, 512 * n, 128)).waves for n in (29, 30, 58, 59)]
    assert waves == [1, 2, 2, 3]


def test_the_row_that_takes_least_is_chosen(table):
    read = _table.read(table)
    assert read.chosen(Gemm(16, 4096, 4096), "fast") == SMALL
    assert read.chosen(Gemm(512, 4096, 4096), "fast") == MIDDLE
    assert read.chosen(Gemm(16, 4096, 4096), "promoted") == PROMOTED


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kTable[]", "kRows[]", "has no `kTable"),
        ("0.25, 0.5, 1.0", "0.25, 0.5", "on a line of its own"),
        (f"Kernel::{SMALL}", "Kernel::something", "on a line of its own"),
        (f"    {{Kernel::{PROMOTED},     0.5, 2, 0}},\n", "", "no row of a promoted kernel"),
        ("kCacheRate", "kOther", "has no `kCacheRate"),
    ],
)
def test_a_table_of_another_form_is_refused(table, old, new, message):
    assert old in TABLE
    table.write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        _table.read(table)


def test_the_plugins_own_table_agrees(tmp_path):
    """What a C++ compiler makes of table.h is the reference."""
    sizes = [(m, n, k) for n, k in shapes.BETWEEN_WEIGHTS for m in (1, *shapes.BETWEEN_ROWS, 9000)]
    sizes += [(m, n, k) for n, k in shapes.GEMM_WEIGHTS for m in shapes.GEMM_ROWS]
    sizes += [(m, 30528, 16) for m in (1, 100, 2**20)]
    choices = the_plugins_choices(sizes, tmp_path)
    if choices is None:
        pytest.skip("there is no C++ compiler")
    names = [name for of_shape in choices for of_kind in of_shape for name in of_kind]
    table = _table.read()
    picked = [table.chosen(Gemm(*size), kind) for size in sizes for kind in _table.KINDS]
    assert picked == names[::3]
    assert len(set(picked)) > 20  # the table makes use of its kernels
    each = [size for size in sizes for _ in _table.KINDS]
    behind = list(zip(each, picked, names[1::3], strict=True))
    alone = list(zip(each, picked, names[2::3], strict=True))
    # Behind the quantize kernel of a few rows others run, and only there.
    late = [case for case in behind if case[1] != case[2]]
    assert all(size[0] <= 32 and not name.endswith("_1x1") for size, name, _ in late)
    one, two = "fast_swap_pp_64x32x256_1x1", "fast_swap_pp_64x16x256_1x2"
    assert ((17, 4096, 14336), two, one) in late
    # An x of so many rows and no more has no cluster with many rows beside, unless it has many.
    assert ((16, 4096, 14336), two, one) in alone
    for (m, _, _), _, name in alone:
        rows = _cluster_rows(name)
        assert name.endswith("_1x1") or -m % rows < 16 or m > 128 and name[-3:] in ("1x2", "2x1")
    assert all(name == other for (m, _, _), name, other in alone if m % 512 == 0)


def _cluster_rows(kernel):
    """The rows of x that a cluster has."""
    tile, cluster = (part.split("x") for part in kernel.split("_")[-2:])
    axis = 1 if "_swap_" in kernel else 0
    return int(tile[axis]) * int(cluster[axis])


def test_hopeless_kernels_are_left_out_by_their_tiles():
    assert (_table.tile_rows(SMALL), _table.tile_rows(LARGE)) == (16, 128)
    assert _table.tile_rows("something_else") is None
    left_out = {
        kernel: [m for m in (1, *shapes.BETWEEN_ROWS) if not _between.is_worth_timing(kernel, m)]
        for kernel in (SMALL, "fast_swap_pp_64x64x256_1x1", MIDDLE, "something_else")
    }
    assert left_out == {
        SMALL: [200, 300, 700, 1500, 3000, 6000],
        "fast_swap_pp_64x64x256_1x1": [],
        MIDDLE: [1, 3, 7, 17],
        "something_else": [],
    }


def test_half_of_the_shapes_between_have_every_m_and_every_weight():
    everything = _between.todo(everything=True, on_gpu=True)
    half = _between.todo(everything=False, on_gpu=True)
    assert len(set(everything)) == 12 * 16 == 2 * len(half) and set(half) < set(everything)
    assert {shape.m for shape in half} == set(shapes.BETWEEN_ROWS)
    assert {(shape.n, shape.k) for shape in half} == set(shapes.BETWEEN_WEIGHTS)
    # Nothing of it is on the grid that the table was made from.
    assert not set(shapes.BETWEEN_ROWS) & set(shapes.GEMM_ROWS)


def test_the_tables_pick_beside_the_best(table):
    rows = _table.read(table)
    small, middle = Gemm(16, 4096, 4096), Gemm(512, 4096, 4096)
    shapes_of = [
        (small, {MIDDLE: 9.6, LARGE: 9.8, PROMOTED: 20.0}),
        # The pick against itself: noise.
        (middle, {LARGE: 10.8, MIDDLE: 9.9}),
    ]
    made = []
    for shape, times in shapes_of:
        row = measured(shape.m, shape.n, shape.k, times, _between.chosen(rows, shape))
        made.append(row | {"between": _between.compare(row)})
    first, second = (row["between"] for row in made)
    assert first["fast"] == {"best": MIDDLE, "best_over_chosen": 0.96, "twin": None}
    assert first["promoted"] == {"best": PROMOTED, "best_over_chosen": 1.0, "twin": 2.0}
    assert second == {"fast": {"best": MIDDLE, "best_over_chosen": 1.0, "twin": 0.99}}
    assert _between.summarise(made)["fast"] == {
        "geometric_mean": pytest.approx(0.96**0.5),
        "worst": 0.96,
        "worst_shape": str(small),
        "shapes": 2,
    }
    assert _between.panel_value(made[0], "fast") == 0.96
    assert _between.panel_value(made[1], "promoted") is None
