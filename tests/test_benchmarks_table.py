"""The kernel table as the benchmarks read it, and what they make of measured times."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # the benchmarks are run from a checkout, not installed
    sys.path.append(str(ROOT))

from benchmarks import _between, _table, shapes, tune  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.shapes import Gemm  # noqa: E402


SMALL, LARGE = "fast_swap_pp_64x16x256_2x1", "fast_coop_128x256x128_2x1"
MIDDLE, PROMOTED = "fast_pp_128x128x128_1x1", "promoted_coop_128x128x128_2x1"
TABLE = f"""
struct Row {{
  Accumulation accumulation;
  int max_m, min_n, max_n, min_k;
  Kernel kernel;
  int swizzle;  // tiles walked together
}};
inline constexpr Row kTable[] = {{
    // clang-format off
    // accumulation      M     N from    to    K from  kernel   swizzle
    {{Accumulation::kFast, 16, 0, 2048, 0, Kernel::{SMALL}, 1}},   // ws 1.00-1.11
    {{Accumulation::kFast, kAny, 6144, 16383, 6144, Kernel::{LARGE}, 4}},// 128x128 0.94
    {{Accumulation::kFast, kAny, 0, kAny, 0, Kernel::{MIDDLE}, 1}},

    {{Accumulation::kPromoted, kAny, 0, kAny, 0, Kernel::{PROMOTED}, 1}},   // the only one
    // clang-format on
}};
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.h"
    path.write_text(TABLE)
    return path


def limits(max_m, min_n, max_n, min_k):
    return {"max_m": max_m, "min_n": min_n, "max_n": max_n, "min_k": min_k}


def test_the_rows_are_read_as_they_are_written(table):
    assert _table.read(table) == [
        _table.Row("fast", limits(16, 0, 2048, 0), SMALL, {"swizzle": 1}, "ws 1.00-1.11"),
        _table.Row("fast", limits(None, 6144, 16383, 6144), LARGE, {"swizzle": 4}, "128x128 0.94"),
        _table.Row("fast", limits(None, 0, None, 0), MIDDLE, {"swizzle": 1}, ""),
        _table.Row("promoted", limits(None, 0, None, 0), PROMOTED, {"swizzle": 1}, "the only one"),
    ]
    assert [str(row) for row in _table.read(table)][:3] == [
        "M<=16 N<=2048",
        "N>=6144 N<=16383 K>=6144",
        "any",
    ]


def test_a_further_limit_is_read_and_a_malformed_row_refused(table):
    wider = TABLE.replace("min_k;", "min_k, max_k;").replace(", Kernel::", ", 512, Kernel::")
    table.write_text(wider)
    assert {row.limits["max_k"] for row in _table.read(table)} == {512}
    with pytest.raises(ValueError, match="no row for 1x16x1024"):
        _table.select(_table.read(table), Gemm(1, 16, 1024), "fast")
    for written, wrong, message in (
        (", 1}},   // ws", "}},   // ws", "one is '{Accumulation::kFast, 16"),
        ("kFast, 16", "kFast, 4 * 4", "'4 . 4' is no number"),
        ("kPromoted", "kExact", "must be kFast or kPromoted"),
        ("struct Row", "struct Line", "no `struct Row"),
    ):
        table.write_text(TABLE.replace(written.replace("}}", "}"), wrong.replace("}}", "}")))
        with pytest.raises(ValueError, match=message):
            _table.read(table)


def test_the_first_row_that_matches_wins(table):
    rows = _table.read(table)
    picked = {
        (16, 2048, 64): 0,
        (17, 2048, 64): 2,
        (16, 2064, 64): 2,
        (1, 6144, 6144): 1,
        (1, 6144, 6128): 2,
        (9000, 16384, 6144): 2,
    }
    assert {shape: _table.select(rows, Gemm(*shape), "fast") for shape in picked} == picked
    assert _table.select(rows, Gemm(16, 2048, 64), "promoted") == 3


def test_the_plugins_own_table_agrees(tmp_path):
    """What a C++ compiler makes of table.h is the reference."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    sizes = [(m, n, k) for n, k in shapes.BETWEEN_WEIGHTS for m in (1, *shapes.BETWEEN_ROWS, 9000)]
    sizes += [(m, n, k) for n, k in shapes.GEMM_WEIGHTS for m in shapes.GEMM_ROWS]
    calls = "".join(f"  show({m}, {n}, {k});\n" for m, n, k in sizes)
    source = tmp_path / "picks.cc"
    source.write_text(
        "#include <cstdint>\n#include <cstdio>\n#include <initializer_list>\n"
        f'#include "{_table.TABLE}"\n'
        "static void show(int m, int n, int k) {\n"
        "  for (bool promoted : {false, true}) {\n"
        "    auto const& row = jaxfp8::select_row(m, n, k, promoted);\n"
        "    std::puts(jaxfp8::spec_of(row.kernel).name);\n"
        "  }\n"
        f"}}\nint main() {{\n{calls}}}\n"
    )
    program = tmp_path / "picks"
    command = [compiler, "-std=c++17", "-I", str(_table.TABLE.parent), "-o", str(program)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    names = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    rows = _table.read()
    picked = [
        rows[_table.select(rows, Gemm(*size), kind)].kernel
        for size in sizes
        for kind in _table.KINDS
    ]
    assert picked == names


def test_hopeless_kernels_are_left_out_by_their_tiles():
    assert (_table.tile_rows(SMALL), _table.tile_rows(LARGE)) == (16, 128)
    assert _table.tile_rows("fast_something_else") is None
    left_out = {
        kernel: [m for m in (1, *shapes.BETWEEN_ROWS) if not _between.is_worth_timing(kernel, m)]
        for kernel in (SMALL, "fast_swap_pp_64x64x256_1x1", MIDDLE, "fast_something_else")
    }
    assert left_out == {
        SMALL: [200, 300, 700, 1500, 3000, 6000],
        "fast_swap_pp_64x64x256_1x1": [],
        MIDDLE: [1, 3, 7, 17],
        "fast_something_else": [],
    }


def test_half_of_the_shapes_between_have_every_m_and_every_weight():
    everything = _between.todo(everything=True, on_gpu=True)
    half = _between.todo(everything=False, on_gpu=True)
    assert len(set(everything)) == 12 * 16 == 2 * len(half) and set(half) < set(everything)
    assert {shape.m for shape in half} == set(shapes.BETWEEN_ROWS)
    assert {(shape.n, shape.k) for shape in half} == set(shapes.BETWEEN_WEIGHTS)
    # Nothing of it is on the grid that the table was made from.
    assert not set(shapes.BETWEEN_ROWS) & set(shapes.GEMM_ROWS)


def measured(m, n, k, ratios, chosen=None):
    """A shape as the GEMM benchmark writes it."""
    named = {f"kernel {name}": ratio for name, ratio in ratios.items()}
    return {"m": m, "n": n, "k": k, "ratios": named} | ({"chosen": chosen} if chosen else {})


def test_the_tables_pick_beside_the_best(table):
    rows = _table.read(table)
    large, middle = Gemm(3000, 8192, 8192), Gemm(3000, 4096, 4096)
    shapes_of = [
        # Named outright it has another swizzle, so it competes; faster by 4 %.
        (large, {LARGE: 0.96, MIDDLE: 0.98, PROMOTED: 2.0}),
        # The pick against itself: noise.
        (middle, {LARGE: 1.08, MIDDLE: 0.99}),
    ]
    made = []
    for shape, ratios in shapes_of:
        row = measured(shape.m, shape.n, shape.k, ratios, _between.chosen(rows, shape))
        made.append(row | {"between": _between.compare(row)})
    first, second = (row["between"] for row in made)
    assert first["fast"] == {"best": LARGE, "best_over_chosen": 0.96, "twin": None}
    assert first["promoted"] == {"best": PROMOTED, "best_over_chosen": 1.0, "twin": 2.0}
    assert second == {"fast": {"best": MIDDLE, "best_over_chosen": 1.0, "twin": 0.99}}
    assert _between.summarise(made)["fast"] == {
        "geometric_mean": pytest.approx(0.96**0.5),
        "worst": 0.96,
        "worst_shape": "3000x8192x8192",
        "shapes": 2,
    }
    assert _between.panel_value(made[0], "fast") == 0.96
    assert _between.panel_value(made[1], "promoted") is None


@pytest.fixture
def files(tmp_path):
    """Two runs; the table has changed since the first, which does not say what it picked."""
    contents = [
        [
            measured(8, 2048, 64, {SMALL: 2.0, MIDDLE: 1.0}),
            measured(16, 1024, 64, {SMALL: 1.0, MIDDLE: 1.28}),
            measured(64, 1024, 64, {SMALL: 9.0, MIDDLE: 9.0}),  # measured again below
            measured(32, 1024, 64, {SMALL: 1.0}),
        ],
        [
            measured(64, 1024, 64, {SMALL: 1.25, MIDDLE: 1.0, PROMOTED: 2.0}),
            measured(
                64,
                8192,
                8192,
                {SMALL: 3.0, MIDDLE: 1.1, LARGE: 0.8},
                {"fast": {"kernel": LARGE, "swizzle": 4}},
            ),
        ],
    ]
    paths = []
    for index, rows in enumerate(contents):
        paths.append(tmp_path / f"gemm-{index}.json")
        place = {"source_hash": str(index), "gpu": "none"}
        content = {"is_gpu_number": False, "environment": place, "shapes": rows}
        paths[-1].write_text(json.dumps(content))
    return paths


def test_tuning_gives_every_rows_evidence_again(table, files, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--table", str(table), "--out", str(out), *map(str, files)]
    before = table.read_text()
    assert main(["tune", *options]) == 0
    printed = capsys.readouterr().out
    assert "differ in their source_hash" in printed and "differ in their gpu" not in printed
    assert table.read_text() == before
    content = json.loads((out / "tune-cpu.json").read_text())
    small, large, middle, promoted = content["rows"]

    # 8x2048x64: 1/2; 16x1024x64: 1.28/1. Together the other kernel takes 0.8 of the time.
    assert small["shapes"] == ["8x2048x64", "16x1024x64"]
    assert small["runner_up"] == MIDDLE and small["written"] == "ws 1.00-1.11"
    assert small["runner_up_over_row"] == [0.5, 1.28]
    assert small["gain"] == pytest.approx(1.25)
    assert small["gain_overall"] == pytest.approx(1.25 ** (2 / 4))

    # The row's kernel with its swizzle was "ours"; by name it had another, which is an alternative.
    assert large["runner_up"] == f"{LARGE} swizzle 1"
    assert large["gain"] == pytest.approx(1.25)

    # The later file counts.
    assert middle["shapes"] == ["64x1024x64"]
    assert middle["runner_up"] == SMALL and middle["runner_up_over_row"] == [1.25, 1.25]
    assert middle["gain"] == pytest.approx(0.8)
    # A shape of its own, and nobody else there.
    assert promoted["shapes"] == ["64x1024x64"] and "gain" not in promoted

    assert [(f["shape"], f["faster"], f["gain"]) for f in content["faster"]] == [
        ("8x2048x64", MIDDLE, 2.0),
        ("64x8192x8192", f"{LARGE} swizzle 1", 1.25),
    ]
    assert content["missing"] == [f"32x1024x64: {MIDDLE} was not timed"]
    fast = content["best_over_chosen"]["fast"]
    assert fast["geometric_mean"] == pytest.approx((0.5 * 0.8) ** (1 / 4))
    assert (fast["worst"], fast["worst_shape"], fast["shapes"]) == (0.5, "8x2048x64", 4)


def test_files_without_kernels_say_nothing_of_the_table(table, files, tmp_path):
    plain = json.loads(files[0].read_text())
    plain["shapes"] = [measured(8, 2048, 64, {}) | {"ratios": {"cublaslt": 1.1}}]
    files[0].write_text(json.dumps(plain))
    rows = _table.read(table)
    assert tune.relative_times(rows, [plain]) == ({}, [])
    assert main(["tune", str(files[0]), "--table", str(table), "--out", str(tmp_path / "out")]) == 1
