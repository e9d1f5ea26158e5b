"""The kernel table as the benchmarks read it, and what they make of measured times."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # the benchmarks are run from a checkout, not installed
    sys.path.append(str(ROOT))

from benchmarks import _between, _search, _table, shapes, tune  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.shapes import Gemm  # noqa: E402


SMALL, LARGE = "fast_swap_pp_64x16x256_2x1", "fast_coop_128x256x128_2x1"
MIDDLE, PROMOTED = "fast_pp_128x128x128_1x1", "promoted_coop_128x128x128_2x1"
# A wave of the small one takes 16 rows of x and 66 x 128 features, of the others 128 and 132 x 128.
TABLE = f"""
inline constexpr Row kTable[] = {{
    // kernel   k_tile  tile  launch
    {{Kernel::{SMALL},  0.25, 0.5, 1.0}},
    {{Kernel::{MIDDLE},  0.5, 1.0, 2.0}},
    {{Kernel::{PROMOTED},     0.5, 2, 0}},
}};
inline constexpr int kMultiprocessors = 132;
inline constexpr int kFewRows = 64;
inline constexpr int64_t kCacheBytes = 50000000;
inline constexpr double kMemoryRate = 4e6, kCacheRate = 100e6, kMemoryStart = 2.0;
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.h"
    path.write_text(TABLE)
    return path


def test_rows_and_constants_are_read(table):
    read = _table.read(table)
    assert list(read.rows) == [
        _table.Row(SMALL, 0.25, 0.5, 1.0),
        _table.Row(MIDDLE, 0.5, 1.0, 2.0),
        _table.Row(PROMOTED, 0.5, 2.0, 0.0),
    ]
    assert read.memory == _table.Memory(132, 64, 50_000_000, 4e6, 100e6, 2.0)
    assert [row.kind for row in read.rows] == ["fast", "fast", "promoted"]


def test_a_time_by_hand(table):
    """64 rows are 4 tiles of 16, 8192 features 64 clusters of 128: 256 on 66 at a time, 4 waves."""
    read = _table.read(table)
    m, n, k = 64, 8192, 1000
    compute = 4 * (4 * 0.25 + 0.5) + 1.0  # 4 steps of 256 along K
    once = n * k + m * k + 2 * m * n
    again = 256 * (128 + 16) * k - once
    memory = once / 4e6 + again / 100e6 + 2.0
    expected = (compute**6 + memory**6) ** (1 / 6)
    assert _table.expected_time(read.rows[0], read.memory, Gemm(m, n, k)) == pytest.approx(expected)
    # Nothing is read again where one tile has it all.
    assert _table.Work.of(MIDDLE, read.memory, Gemm(1, 1, 16)) == _table.Work(
        1, 1, pytest.approx(2.0 + 34 / 4e6 + (256 * 16 - 34) / 100e6)
    )


def test_the_row_that_takes_least_is_chosen(table):
    read = _table.read(table)
    assert read.chosen(Gemm(16, 4096, 4096), "fast") == SMALL
    assert read.chosen(Gemm(512, 4096, 4096), "fast") == MIDDLE
    # From 64 rows on not the small one, whatever it is expected to take.
    assert [read.chosen(Gemm(m, 1280, 128), "fast") for m in (63, 64)] == [SMALL, MIDDLE]
    assert read.chosen(Gemm(16, 4096, 4096), "promoted") == PROMOTED


def test_promoted_tiles_of_few_rows_do_not_share_a_weight_past_the_cache(table):
    few = "promoted_swap_pp_64x32x128_1x1"
    read = _table.read(table)
    read = read.with_rows([*read.rows, _table.Row(few, 0.01, 0.0, 0.0)])
    sizes = [(33, 4096, 12207), (33, 4096, 12208), (32, 4096, 12208)]
    picked = [read.chosen(Gemm(*size), "promoted") for size in sizes]
    assert picked == [few, PROMOTED, few]


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
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    sizes = [(m, n, k) for n, k in shapes.BETWEEN_WEIGHTS for m in (1, *shapes.BETWEEN_ROWS, 9000)]
    sizes += [(m, n, k) for n, k in shapes.GEMM_WEIGHTS for m in shapes.GEMM_ROWS]
    sizes += [(m, 30528, 16) for m in (1, 100, 2**20)]
    calls = "".join(f"  show({m}, {n}, {k});\n" for m, n, k in sizes)
    source = tmp_path / "picks.cc"
    source.write_text(
        f'#include <cstdio>\n#include <initializer_list>\n#include "{_table.TABLE}"\n'
        "static void show(int m, int n, int k) {\n"
        "  for (bool promoted : {false, true}) {\n"
        "    std::puts(jaxfp8::spec_of(jaxfp8::choose(m, n, k, promoted)).name);\n"
        "  }\n"
        f"}}\nint main() {{\n{calls}}}\n"
    )
    program = tmp_path / "picks"
    command = [compiler, "-std=c++17", "-I", str(_table.TABLE.parent), "-o", str(program)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    names = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    table = _table.read()
    picked = [table.chosen(Gemm(*size), kind) for size in sizes for kind in _table.KINDS]
    assert picked == names
    assert len(set(picked)) > 12  # the table makes use of its kernels


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


def measured(m, n, k, times, chosen=None):
    """A shape as the GEMM benchmark writes it; times are microseconds, ratios those / 10."""
    named = {f"kernel {name}": time for name, time in times.items()}
    row = {"m": m, "n": n, "k": k, "microseconds": {"ours": 10.0, **named}}
    row["ratios"] = {name: time / 10 for name, time in named.items()}
    return row | ({"chosen": chosen} if chosen else {})


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


TRUE = {SMALL: (0.2, 0.4, 1.5), MIDDLE: (0.4, 0.5, 2.5)}


@pytest.fixture
def files(tmp_path, table):
    """Times that follow other constants than the table's, exactly; two shapes in both files."""
    memory = _table.read(table).memory
    contents = []
    sizes = itertools.product((16, 63, 512), ((1024, 4096), (8192, 8192), (4096, 512)))
    every = [Gemm(m, n, k) for m, (n, k) in sizes]
    for index, some in enumerate((every, every[:2])):
        rows = []
        for s in some:
            # The last file counts: of the two shapes of both, the first one's times are wrong.
            factor = 3.0 if index == 0 and s in every[:2] else 1.0
            times = {k: factor * _table.Work.of(k, memory, s).time(*c) for k, c in TRUE.items()}
            rows.append(measured(s.m, s.n, s.k, times | {"fast_gone": 0.1}))
        place = {"source_hash": str(index), "gpu": "none"}
        path = tmp_path / f"gemm-{index}.json"
        path.write_text(json.dumps({"is_gpu_number": False, "environment": place, "shapes": rows}))
        contents.append(path)
    return contents


def test_tuning_finds_the_constants_that_made_the_times(table, files, tmp_path, capsys):
    out, before = tmp_path / "out", table.read_text()
    assert main(["tune", *map(str, files), "--table", str(table), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "differ in their source_hash" in printed and "differ in their gpu" not in printed
    assert table.read_text() == before
    content = json.loads((out / "tune-cpu.json").read_text())
    small, middle, promoted = content["rows"]
    for row, true in ((small, TRUE[SMALL]), (middle, TRUE[MIDDLE])):
        assert row["shapes"] == 9 and row["deviation"] < 0.01
        # Where the memory hides a constant it is found less well.
        assert row["fitted"] == pytest.approx(true, rel=0.1)
    assert promoted["fitted"] == [0.5, 2.0, 0.0] and promoted["deviation"] is None
    assert content["choices"]["fitted shapes, fitted"]["fast"]["worst"] > 0.99
    for entry in content["faster"]:
        assert {entry["kernel"], entry["faster"]} == {SMALL, MIDDLE} and entry["gain"] > 1.02


def test_a_search_mends_a_choice(table):
    """Where two kernels are expected to take nearly the same, the times say which is better."""
    other = MIDDLE.replace("1x1", "1x2")
    rows = [_table.Row(MIDDLE, 0.5, 1.0, 2.0), _table.Row(other, 0.51, 1.0, 2.0)]
    present = _table.read(table).with_rows(rows)
    times = {Gemm(m, 4096, 4096): {MIDDLE: 11.0, other: 10.0} for m in (512, 1024, 2048)}
    assert {present.chosen(shape, "fast") for shape in times} == {MIDDLE}
    found = _search.refine(present, lambda candidate: tune.cost(candidate, times))
    assert {found.chosen(shape, "fast") for shape in times} == {other}
    assert tune.cost(found, times) == 0 < tune.cost(present, times)
    assert found == _search.rounded(found)
    # Nothing is changed where nothing is gained.
    assert _search.refine(found, lambda candidate: tune.cost(candidate, times)) == found


def test_a_kernel_that_was_not_timed_is_no_good_choice(table):
    shape = Gemm(16, 4096, 4096)
    times = {shape: {MIDDLE: 10.0, LARGE: 10.1}}
    present = _table.read(table)
    assert present.chosen(shape, "fast") == SMALL
    assert tune.cost(present, times) > 0.3
    timed = present.with_rows([row for row in present.rows if row.kernel != SMALL])
    assert tune.cost(timed, times) < 0.1


def test_shapes_held_out_are_not_fitted_to(table, files, tmp_path):
    wrong = json.loads(files[0].read_text())
    for row in wrong["shapes"]:
        row["microseconds"] = {name: 7.0 for name in row["microseconds"]}
    check = tmp_path / "check.json"
    check.write_text(json.dumps(wrong))
    contents = []
    for index, extra in enumerate(([], ["--check", str(check)])):
        out = tmp_path / str(index)
        options = ["--table", str(table), "--out", str(out), *extra]
        assert main(["tune", *map(str, files), *options]) == 0
        contents.append(json.loads((out / "tune-cpu.json").read_text()))
    assert contents[0]["rows"] == contents[1]["rows"]
    assert "other shapes, table" not in contents[0]["choices"]
    other = contents[1]["choices"]["other shapes, table"]["fast"]
    assert math.isclose(other["geometric_mean"], 1.0) and other["shapes"] == 9


def test_files_without_kernels_say_nothing_of_the_table(table, files, tmp_path):
    plain = json.loads(files[0].read_text())
    for row in plain["shapes"]:
        row["microseconds"] = {"ours": 1.0, "cublaslt": 1.1}
    files[0].write_text(json.dumps(plain))
    assert tune.times_of(_table.read(table), [plain]) == {}
    assert main(["tune", str(files[0]), "--table", str(table), "--out", str(tmp_path / "out")]) == 1


def test_the_committed_times_are_what_the_table_was_made_from(tmp_path):
    results = ROOT / "benchmarks" / "results"
    made_from = ["kernel-times", "kernel-times-check", "kernel-times-promoted"]
    held_out = ["kernel-times-held-out", "kernel-times-promoted-held-out"]
    files = [str(results / f"{name}.json") for name in made_from]
    check = ["--check", *(str(results / f"{name}.json") for name in held_out)]
    for kind, worst in (("fast", 0.9), ("promoted", 0.95)):
        out = tmp_path / kind
        assert main(["tune", "--only", kind, *files, *check, "--out", str(out)]) == 0
        content = json.loads(next(out.glob("tune*.json")).read_text())
        assert {row["kernel"].split("_")[0] for row in content["rows"]} == {kind}
        assert content["memory"]["searched"] == content["memory"]["written"]
        choices = {name: found[kind] for name, found in content["choices"].items()}
        table, searched = (choices[f"fitted shapes, {which}"] for which in ("table", "searched"))
        # Fast rows came with a search of the memory's constants too, which ends elsewhere.
        assert table["geometric_mean"] > searched["geometric_mean"] - 0.002
        for where in ("fitted shapes", "other shapes"):
            found = choices[f"{where}, table"]
            assert found["geometric_mean"] > 0.99 and found["worst"] > worst
