// Groups of latents: equal, one after the other, k of each to be chosen.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastsparse {

// How many of M latents are in a group.
inline int64_t group_size(int64_t M, int64_t groups) {
  if (groups < 1 || M % groups != 0)
    throw std::invalid_argument("topk_encode: groups must be at least 1 and divide the number of latents (" +
                                std::to_string(M) + "), got groups=" + std::to_string(groups));
  return M / groups;
}

// Raises where there is a group of fewer eligible latents.
inline void check_chosen(int64_t k, int64_t eligible, int64_t groups) {
  if (k < 1 || k > eligible)
    throw std::invalid_argument("topk_encode: k must be between 1 and the number of eligible latents " +
                                std::string(groups > 1 ? "of every group (" : "(") + std::to_string(eligible) +
                                "), got k=" + std::to_string(k));
}

}  // namespace fastsparse
