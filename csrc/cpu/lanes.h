// Channels as the lanes of a vector: a whole one, or the first few lanes, of which no others are read or written.
#pragma once

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

struct AllLanes {
  template <typename T> Vector<Accumulator<T>> load(const T* from) const { return FASTSPARSE_ISA::load(from); }
  template <typename T> void store(Vector<Accumulator<T>> value, T* to) const { FASTSPARSE_ISA::store(value, to); }
};

struct FirstLanes {
  int count;

  template <typename T> Vector<Accumulator<T>> load(const T* from) const {
    T part[kLanes<Accumulator<T>>] = {};
    for (int i = 0; i < count; ++i) part[i] = from[i];
    return FASTSPARSE_ISA::load(part);
  }
  template <typename T> void store(Vector<Accumulator<T>> value, T* to) const {
    T part[kLanes<Accumulator<T>>];
    FASTSPARSE_ISA::store(value, part);
    for (int i = 0; i < count; ++i) to[i] = part[i];
  }

#if defined(__AVX512F__)
  uint32_t mask() const { return (1u << count) - 1; }
  Vector<float> load(const float* from) const { return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16(mask()), from); }
  Vector<double> load(const double* from) const {
    return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8(mask()), from);
  }
  Vector<float> load(const bf16* from) const {
    return (Vector<float>)(widen((Halves)_mm256_maskz_loadu_epi16(__mmask16(mask()), from)) << 16);
  }
  Vector<float> load(const f16* from) const {
    return (Vector<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(mask()), from));
  }
  void store(Vector<float> value, float* to) const { _mm512_mask_storeu_ps(to, __mmask16(mask()), (__m512)value); }
  void store(Vector<double> value, double* to) const { _mm512_mask_storeu_pd(to, __mmask8(mask()), (__m512d)value); }
#endif
};

// Calls f(channel, AllLanes or FirstLanes) for the vectors of C over the channels of a range.
template <typename C, typename F> inline void for_vectors(Range channels, const F& f) {
  int64_t h = channels.begin;
  for (; h + kLanes<C> <= channels.end; h += kLanes<C>) f(h, AllLanes{});
  if (h < channels.end) f(h, FirstLanes{int(channels.end - h)});
}

}  // namespace fastsparse::FASTSPARSE_ISA
