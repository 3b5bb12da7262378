#include "cpu/sddmm.h"

#include "cpu/dot.h"
#include "cpu/search.h"

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

// Entries of row n.
template <typename T> void score_row(const SddmmArgs& args, int64_t n, Range entries) {
  auto *x = static_cast<const T*>(args.x) + n * args.x_stride, *weight = static_cast<const T*>(args.weight);
  T* out = static_cast<T*>(args.out);
  int64_t e = entries.begin;
  if (args.D == 1) {
    for (Accumulator<T> factor = to_float(*x); e < entries.end; ++e)
      from_float(factor * to_float(weight[args.indices[e] * args.weight_stride]), out[e]);
    return;
  }
  auto some = [&]<int Count>() {
    for (; e + Count <= entries.end; e += Count)
      score<Count>(x, weight, args.weight_stride, args.indices + e, args.D, out + e);
  };
  if constexpr (kVectorBytes == 64) some.template operator()<8>();
  some.template operator()<4>();
  some.template operator()<2>();
  some.template operator()<1>();
}

}  // namespace

void sddmm(const SddmmArgs& args, int64_t row_begin, int64_t row_end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t n = row_begin; n < row_end; ++n) score_row<T>(args, n, {n * args.k, (n + 1) * args.k});
  });
}

void sddmm_ragged(const SddmmArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    int64_t n = first_where(args.N, [&](int64_t row) { return args.offsets[row + 1] > begin; });
    for (int64_t e = begin; e < end; ++n) {
      int64_t last = args.offsets[n + 1] < end ? args.offsets[n + 1] : end;
      score_row<T>(args, n, {e, last});
      e = last;
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
