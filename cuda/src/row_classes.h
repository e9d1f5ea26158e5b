// Rows of a result grouped so that TMA can address each group; store.cuh says why.
#pragma once

#include <cstdint>
#include <numeric>

namespace jaxfp8 {

inline constexpr int kMaxClasses = 8;

// Rows that are equal modulo `count` start at the same place within `unit` elements: at `count`
// places, `step` elements apart. The classes are numbered by that place.
struct RowClasses {
  int count = 1;
  int factor = 0;  // row r is of the class r * factor % count
  int step = 0;

  static constexpr RowClasses of(int64_t pitch, int unit) {
    int const step = static_cast<int>(std::gcd(pitch, static_cast<int64_t>(unit)));
    int const count = unit / step;
    if (count == 1) return {};
    return {count, static_cast<int>(pitch / step % count), step};
  }

  constexpr int unit() const { return count * step; }

  // As many as the largest class has; the others have that or one less.
  constexpr int rows(int m) const { return (m + count - 1) / count; }
};

}  // namespace jaxfp8
