// How rows that are about to be gathered are prefetched, and in blocks of how many columns they are summed.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastsparse {

// far: from memory into the second level of the cache, which waits for more lines at once than the first.
// near: rows that are in the cache already, of whatever level, into the first, for which a short way ahead is enough.
// deep, wide: Zen 5's, in blocks of all registers: narrow rows into the first level, wide ones into the second.
enum class Fetch { far, near, deep, wide };

// Zen 4: at N=1024 D=768 M=16384 k=32 far took a fifth less time than any number of rows into the first level; at N=4096
// D=384 M=6144 k=16, which is in the cache, a tenth more than near. Zen 5: at both, deep is ahead of either by 5 to 25 %,
// most where a few rows have most of the uses; at D = 2048 to 4096 wide is ahead of all others, by 5 to 20 %. Zen 3, which
// has half the registers: far takes eight whole rows together, 5 to 40 % less time than blocks of columns, the more the
// wider the rows are.
inline Fetch fetch_of(bool cached, int64_t row_bytes) {
  if (cpu_features().zen5) return row_bytes <= 4096 ? Fetch::deep : Fetch::wide;
  return cached ? Fetch::near : Fetch::far;
}

}  // namespace fastsparse
