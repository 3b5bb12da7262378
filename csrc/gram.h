// How large a Gram matrix may be that nobody asked for: what every compiled backend's method "auto" goes by.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastsparse {

// FASTSPARSE_GRAM_BYTES, 1 GiB unless told otherwise: "auto" makes no larger Gram matrix, and none larger is kept
// between calls. By the sizes alone, not by what happens to be free: the method mustn't differ between runs, ranks or
// replays.
inline int64_t gram_limit() {
  const char* told = std::getenv("FASTSPARSE_GRAM_BYTES");
  if (!told || !*told) return int64_t{1} << 30;
  char* end = nullptr;
  long long bytes = std::strtoll(told, &end, 10);
  if (*end || bytes < 0)
    throw std::invalid_argument("FASTSPARSE_GRAM_BYTES: must be a number of bytes, at least 0, got '" +
                                std::string(told) + "'");
  return int64_t(bytes);
}

// Whether the Gram matrix of M atoms, in sums of `element_bytes`, is within that limit.
inline bool gram_fits(int64_t M, int64_t element_bytes) { return M <= gram_limit() / element_bytes / (M > 0 ? M : 1); }

}  // namespace fastsparse
