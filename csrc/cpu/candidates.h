// Kernels' view of the candidates of a row (see topk_encode.h).
#pragma once

#include "cpu/simd.h"
#include "cpu/topk_encode.h"

namespace fastsparse::FASTSPARSE_ISA {

// One row's list.
template <typename C> struct List {
  C *first, *second;
  int32_t* latent;
  int32_t& count;
  C& threshold;

  List(const Candidates& candidates, int64_t n)
      : first(reinterpret_cast<C*>(static_cast<char*>(candidates.lists) +
                                   n * list_bytes(candidates.capacity, sizeof(C)))),
        second(first + candidates.capacity + kSlack),
        latent(reinterpret_cast<int32_t*>(second + candidates.capacity + kSlack)), count(candidates.count[n]),
        threshold(static_cast<C*>(candidates.threshold)[n]) {}

  void append(Vector<C> firsts, Vector<C> seconds, int64_t first_latent, uint32_t lanes) {
    compress(firsts, lanes, first + count);
    compress(seconds, lanes, second + count);
    compress_consecutive(int32_t(first_latent), lanes, latent + count);
    count += __builtin_popcount(lanes);
  }
};

template <typename C> struct Candidate {
  C key, score;
  int32_t latent;
};

// The order of the result: larger key first, NaN before all, ties to the lower latent.
struct Better {
  template <typename C> bool operator()(const Candidate<C>& a, const Candidate<C>& b) const {
    if (a.key > b.key) return true;
    if (a.key < b.key) return false;
    bool a_nan = a.key != a.key, b_nan = b.key != b.key;
    return a_nan != b_nan ? a_nan : a.latent < b.latent;
  }
};

}  // namespace fastsparse::FASTSPARSE_ISA
