// Binary search.
#pragma once

#include <cstdint>

namespace fastsparse::FASTSPARSE_ISA {

// The first i in [0, count) that `holds` for, from which on it does for all; `count` where it does for none.
template <typename Holds> inline int64_t first_where(int64_t count, const Holds& holds) {
  int64_t first = 0;
  for (int64_t end = count; first < end;) {
    int64_t middle = first + (end - first) / 2;
    if (holds(middle)) end = middle;
    else first = middle + 1;
  }
  return first;
}

}  // namespace fastsparse::FASTSPARSE_ISA
