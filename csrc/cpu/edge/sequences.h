// Sequences and what lies along them, from tensors.
#pragma once

#include <optional>

#include "cpu/edge/edge.h"
#include "cpu/sequences.h"

namespace fastsparse::edge {

// The sequences of B rows of T steps; throws unless cu_seqlens, where given, go from 0 to T and never down.
// `keep` holds what they point to.
Sequences sequences_of(const char* op, const std::optional<Tensor>& cu_seqlens, int64_t B, int64_t T, Tensor& keep);

// A tensor (..., H) with unit stride along its channels, copied only where it hasn't; along dimensions where all it has
// is repetitions, the copy has one.
Tensor with_unit_channels(const Tensor& tensor);

// Of what with_unit_channels returned, (B, T, ..., H); or of states, (S, ..., H).
Series series_of(const Tensor& tensor);
Series states_of(const Tensor& tensor);

// How channels are shared out: at most so many a task, which are halved, down to 16 (a cache line in fp32), until every
// thread has so many tasks.
struct Shares { int64_t channels, tasks; };
int64_t channels_a_task(int64_t sequences, int64_t H, Shares shares);

// Calls task(arguments..., s, channels) for all sequences and blocks of channels, a channel of one being so many bytes of
// work.
template <typename Task, typename... Arguments>
void parallel_channels(int64_t sequences, int64_t H, int64_t bytes, Shares shares, const Task& task,
                       const Arguments&... arguments) {
  int64_t width = channels_a_task(sequences, H, shares), blocks = (H + width - 1) / width;
  parallel(sequences * blocks, rows_a_task((width < H ? width : H) * bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t first = i % blocks * width;
      task(arguments..., i / blocks, Range{first, first + width < H ? first + width : H});
    }
  });
}

}  // namespace fastsparse::edge
