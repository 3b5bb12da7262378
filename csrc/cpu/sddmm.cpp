#include "cpu/sddmm.h"

#include "cpu/dot.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

template <int Count, typename T>
void score(const T* x, const T* weight, int64_t stride, const int64_t* indices, int64_t D, T* out) {
  const T* rows[Count];
  for (int i = 0; i < Count; ++i) rows[i] = weight + indices[i] * stride;
  Accumulator<T> scores[Count];
  dots<Count>(x, rows, D, scores);
  for (int i = 0; i < Count; ++i) from_float(scores[i], out[i]);
}

}  // namespace

void sddmm(const SddmmArgs& args, int64_t row_begin, int64_t row_end) {
  constexpr int together = kVectorBytes == 64 ? 8 : 4;
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* weight = static_cast<const T*>(args.weight);
    for (int64_t n = row_begin; n < row_end; ++n) {
      const T* x = static_cast<const T*>(args.x) + n * args.x_stride;
      const int64_t* indices = args.indices + n * args.k;
      T* out = static_cast<T*>(args.out) + n * args.k;
      int64_t j = 0;
      for (; j + together <= args.k; j += together)
        score<together>(x, weight, args.weight_stride, indices + j, args.D, out + j);
      for (; j < args.k; ++j) score<1>(x, weight, args.weight_stride, indices + j, args.D, out + j);
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
