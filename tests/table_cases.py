"""A kernel table of three rows, and measured shapes, for the tests of the benchmarks."""

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
