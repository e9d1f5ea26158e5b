"""A kernel table of three rows, measured shapes, and what the plugin's own table chooses."""

import shutil
import subprocess

from benchmarks import _table


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
inline constexpr double kMemoryRate = 4e6, kCacheRate = 100e6, kMemoryStart = 2.0;
inline constexpr double kPairRate = 1e5;
inline constexpr double kLastWave = 0.2;
"""


def table_file(folder):
    path = folder / "table.h"
    path.write_text(TABLE)
    return path


def measured(m, n, k, times, chosen=None):
    """A shape as the GEMM benchmark writes it; times are microseconds, ratios those / 10."""
    named = {f"kernel {name}": time for name, time in times.items()}
    row = {"m": m, "n": n, "k": k, "microseconds": {"ours": 10.0, **named}}
    row["ratios"] = {name: time / 10 for name, time in named.items()}
    return row | ({"chosen": chosen} if chosen else {})


def the_plugins_choices(sizes, folder):
    """What a C++ compiler makes of table.h, or None without one.

    For each (M, N, K) the kernels of fast and of promoted accumulation, for each of the `Input`s in
    their order: whole tiles, quantized by the same call, rows alone.
    """
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    calls = "".join(f"  show({m}, {n}, {k});\n" for m, n, k in sizes)
    source = folder / "picks.cc"
    source.write_text(
        f'#include <cstdio>\n#include <initializer_list>\n#include "{_table.TABLE}"\n'
        "static void show(int m, int n, int k) {\n"
        "  for (bool promoted : {false, true}) {\n"
        "    using jaxfp8::Input;\n"
        "    for (auto in : {Input::kWholeTiles, Input::kQuantizedHere, Input::kRowsAlone}) {\n"
        "      auto const kernel = jaxfp8::choose(m, n, k, promoted, -1, in);\n"
        "      std::puts(jaxfp8::spec_of(kernel).name);\n"
        "    }\n"
        "  }\n"
        f"}}\nint main() {{\n{calls}}}\n"
    )
    program = folder / "picks"
    command = [compiler, "-std=c++17", "-I", str(_table.TABLE.parent), "-o", str(program)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    names = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    each = [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]
    return [tuple(each[i : i + 2]) for i in range(0, len(each), 2)]
