#include "cpu/spmm_t.h"

#include <cstring>

#include "cpu/gather_sum.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// The sum over some entries; those up to `last` come after them.
template <typename T> Gather<T> gather(const SpmmTArgs& args, Range entries, int64_t last) {
  return {static_cast<const Accumulator<T>*>(args.values) + entries.begin, args.rows + entries.begin,
          entries.end - entries.begin, last - entries.end, static_cast<const T*>(args.x), args.x_stride,
          args.cached};
}

}  // namespace

void spmm_t(const SpmmTArgs& args, int64_t latent_begin, int64_t latent_end) {
  if (args.D == 0) return;  // nothing to write, and no address that memset may be given
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t m = latent_begin; m < latent_end; ++m) {
      int64_t begin = args.offsets[m], count = args.offsets[m + 1] - begin;
      T* out = static_cast<T*>(args.out) + m * args.D;
      if (count == 0) std::memset(static_cast<void*>(out), 0, args.D * sizeof(T));
      else if (count <= kSegment)
        gather_sum(gather<T>(args, {begin, begin + count}, args.offsets[latent_end]), args.D, out);
    }
  });
}

void spmm_t_segments(const SpmmTArgs& args, const Range* segments, void* partials, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t s = begin; s < end; ++s)
      gather_sum(gather<T>(args, segments[s], segments[s].end), args.D,
                 static_cast<Accumulator<T>*>(partials) + s * args.D);
  });
}

void spmm_t_join(const SpmmTArgs& args, const Hot* hot, const void* partials, int64_t hot_begin, int64_t hot_end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* partial = static_cast<const Accumulator<T>*>(partials);
    for (const Hot* of = hot + hot_begin; of < hot + hot_end; ++of) {
      T* out = static_cast<T*>(args.out) + of->latent * args.D;
      for (int64_t d = 0; d < args.D; ++d) {
        Accumulator<T> total = 0;
        for (int64_t s = of->begin; s < of->end; ++s) total += partial[s * args.D + d];
        from_float(total, out[d]);
      }
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
