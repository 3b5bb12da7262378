// Exact scores of what a screen has left, latent-major: a row of the weight is read once for all tokens that want it.
#pragma once

#include <memory>

#include "cpu/dot.h"
#include "cpu/screen.h"

namespace fastsparse::FASTSPARSE_ISA {

// Of one row, in the order of their latents.
struct Survivors {
  const int32_t* latents;
  int64_t count;
};

// The `place`-th survivor of a row.
struct Survivor { int64_t row, place; };

template <int Count, typename T, typename Put>
void score_survivors(const Rows& x, const T* atom, const Survivor* survivors, float bias, const Put& put) {
  const T* rows[Count];
  for (int i = 0; i < Count; ++i) rows[i] = static_cast<const T*>(x.data) + survivors[i].row * x.stride;
  float products[Count];
  dots<Count>(atom, rows, x.D, products);
  for (int i = 0; i < Count; ++i) put(survivors[i].row, survivors[i].place, products[i] + bias);
}

// Calls put(row, place, score) of each survivor. each(visit) calls visit(latent, survivor), twice in the same order, for
// all of latents [latent_begin, latent_end).
template <typename Each, typename Put>
void refine_each(const RefineArgs& args, int64_t latent_begin, int64_t latent_end, const Each& each, const Put& put) {
  constexpr int together = 4;
  int64_t latents = latent_end - latent_begin;
  // A stable counting sort by latent. Counts are kept two places on: filling then leaves each list's begin.
  struct Offset { int64_t value; };
  std::unique_ptr<Offset[]> offsets(new Offset[latents + 2]());
  each([&](int64_t latent, Survivor) { ++offsets[latent - latent_begin + 2].value; });
  for (int64_t m = 1; m <= latents; ++m) offsets[m + 1].value += offsets[m].value;
  std::unique_ptr<Survivor[]> survivors(new Survivor[offsets[latents + 1].value]);
  each([&](int64_t latent, Survivor survivor) {
    survivors[offsets[latent - latent_begin + 1].value++] = survivor;
  });

  with_type(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8) {
      auto wanted_after = [&](int64_t m) {
        do ++m;
        while (m < latents && offsets[m].value == offsets[m + 1].value);
        return m;
      };
      for (int64_t m = wanted_after(-1), next; m < latents; m = next) {
        next = wanted_after(m);
        if (next < latents) {  // which no processor guesses
          const T* row = row_of<T>(args.weight, latent_begin + next);
          for (int64_t d = 0; d < args.weight.D; d += 64 / int64_t(sizeof(T))) prefetch(row + d);
        }
        int64_t position = latent_begin + m, end = offsets[m + 1].value, i = offsets[m].value;
        const T* atom = row_of<T>(args.weight, position);
        float bias = args.bias[position];
        for (; i + together <= end; i += together)
          score_survivors<together>(args.x, atom, &survivors[i], bias, put);
        for (; i < end; ++i) score_survivors<1>(args.x, atom, &survivors[i], bias, put);
      }
    }
  });
}

// The same of rows' lists: survivors_of(row) are those of a row.
template <typename Of, typename Put>
void refine(const RefineArgs& args, const Of& survivors_of, int64_t latent_begin, int64_t latent_end, const Put& put) {
  auto each = [&](auto&& visit) {
    for (int64_t n = 0; n < args.N; ++n) {
      Survivors row = survivors_of(n);
      int64_t i = 0;
      for (int64_t rest = row.count; rest > 0;) {
        int64_t half = rest / 2;
        bool before = row.latents[i + half] < latent_begin;
        i = before ? i + half + 1 : i;
        rest = before ? rest - half - 1 : half;
      }
      for (; i < row.count && row.latents[i] < latent_end; ++i) visit(row.latents[i], Survivor{n, i});
    }
  };
  refine_each(args, latent_begin, latent_end, each, put);
}

}  // namespace fastsparse::FASTSPARSE_ISA
