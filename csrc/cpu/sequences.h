// The sequences of a batch, and tensors along them, as kernels see them.
#pragma once

#include <cstdint>

namespace fastsparse {

// Sequence s is row s, all of its T steps, or those of row 0 from bounds[s] to before bounds[s + 1].
struct Sequences {
  const int64_t* bounds;  // (count + 1), checked, or null
  int64_t count, T;
};

// A tensor (B, T, ..., H), such as (B, T, 3, H), whose channels are neighbours: where the rest is, in elements.
struct Series {
  const void* data;  // null: there is none
  int64_t row, step, part, column;  // column: of (B, T, 2, 2, H), within a part
};

}  // namespace fastsparse

#ifdef FASTSPARSE_ISA
namespace fastsparse::FASTSPARSE_ISA {

// The steps of a sequence, and the row that they are in.
struct Steps { int64_t row, begin, end; };

inline Steps steps_of(const Sequences& sequences, int64_t s) {
  if (sequences.bounds) return {0, sequences.bounds[s], sequences.bounds[s + 1]};
  return {s, 0, sequences.T};
}

template <typename T> inline const T* at(const Series& series, int64_t row, int64_t step, int64_t channel) {
  return static_cast<const T*>(series.data) + row * series.row + step * series.step + channel;
}

}  // namespace fastsparse::FASTSPARSE_ISA
#endif
