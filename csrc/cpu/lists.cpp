#include "cpu/lists.h"

#include "cpu/gather_sum.h"
#include "cpu/search.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// The sum over some entries; those up to `last` come after them.
template <typename T> Gather<T> gather(const ListsArgs& args, Range columns, Range entries, int64_t last) {
  return {static_cast<const Accumulator<T>*>(args.coefficients) + entries.begin, args.rows + entries.begin,
          entries.end - entries.begin, last - entries.end, static_cast<const T*>(args.matrix) + columns.begin,
          args.row_stride, args.fetch};
}

}  // namespace

void sum_lists(const ListsArgs& args, Range columns, int64_t begin, int64_t end) {
  auto first_from = [&](int64_t place) {
    return first_where(args.count, [&](int64_t i) { return args.offsets[i] + i >= place; });
  };
  Range lists{first_from(begin), first_from(end)};
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = lists.begin; i < lists.end; ++i) {
      Range entries{args.offsets[i], args.offsets[i + 1]};
      if (entries.end - entries.begin <= kSegment)
        gather_sum(gather<T>(args, columns, entries, args.offsets[lists.end]), columns.end - columns.begin,
                   static_cast<T*>(args.out) + i * args.D + columns.begin);
    }
  });
}

void sum_segments(const ListsArgs& args, Range columns, const Range* segments, void* partials, int64_t begin,
                  int64_t end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t s = begin; s < end; ++s)
      gather_sum(gather<T>(args, columns, segments[s], segments[s].end), columns.end - columns.begin,
                 static_cast<Accumulator<T>*>(partials) + s * args.D + columns.begin);
  });
}

void join_segments(const ListsArgs& args, const Hot* hot, const void* partials, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* partial = static_cast<const Accumulator<T>*>(partials);
    for (const Hot* of = hot + begin; of < hot + end; ++of) {
      T* out = static_cast<T*>(args.out) + of->list * args.D;
      for (int64_t d = 0; d < args.D; ++d) {
        Accumulator<T> total = 0;
        for (int64_t s = of->begin; s < of->end; ++s) total += partial[s * args.D + d];
        from_float(total, out[d]);
      }
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
