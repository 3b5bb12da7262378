#include "cpu/spmm.h"

#include "cpu/gather_sum.h"

namespace fastsparse::FASTSPARSE_ISA {

void spmm(const SpmmArgs& args, Range columns, int64_t row_begin, int64_t row_end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* values = static_cast<const Accumulator<T>*>(args.values);
    auto* weight = static_cast<const T*>(args.weight);
    auto* out = static_cast<T*>(args.out);
    for (int64_t n = row_begin; n < row_end; ++n) {
      Gather<T> sum{values + n * args.k, args.indices + n * args.k, args.k, (row_end - n - 1) * args.k,
                    weight + columns.begin, args.weight_stride, args.fetch};
      gather_sum(sum, columns.end - columns.begin, out + n * args.D + columns.begin);
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
